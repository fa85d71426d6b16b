"""Studies: several models trained on the same data, and what they show side by side."""
