"""Studies; run from a clone."""
