"""Pictures: scenes that can be checked exactly, files of any kind, and codes of pictures as latents."""
