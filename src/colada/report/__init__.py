"""Pages that show what a run or an evaluation came to."""
