"""All figures: one file per kind of figure, and a common style."""
