"""Everything that is drawn. One file per kind of picture, one style for all."""
