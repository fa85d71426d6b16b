"""Training: the recipe, the two stages, and what is shown while they run."""
