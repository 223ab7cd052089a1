"""All pictures: one file per kind, one style for all."""
