"""What measures speed; run from a clone."""
