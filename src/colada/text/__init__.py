"""What text is to the models: ids, conversations, and ids spelled out again."""
