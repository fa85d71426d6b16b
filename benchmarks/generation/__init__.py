"""How fast generation is, against the machine's own limits and against named peers."""
