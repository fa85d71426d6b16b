"""What Cola DLM is compared with: models of equal size that predict tokens themselves."""
