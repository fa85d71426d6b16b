"""Training data: sources to documents, documents to token shards, token streams to fixed-length rows."""
