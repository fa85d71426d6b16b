"""Training data: sources to documents, documents to token streams, streams to fixed-length rows."""

from colada.data.documents import Document, Split, find_files, read_documents
from colada.data.rows import Rows
from colada.data.stream import TokenStream, tokenize

__all__ = ["Document", "Rows", "Split", "TokenStream", "find_files", "read_documents", "tokenize"]
