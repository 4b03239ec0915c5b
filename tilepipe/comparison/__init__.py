"""Two label maps of one place: opening them, laying them on each other, and showing where they differ."""
