"""The networks, their configurations, and the files they are kept in."""
