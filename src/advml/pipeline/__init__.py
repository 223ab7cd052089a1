"""What the commands do: its stages (`stages/`), what they share, and how `advml repro` runs them."""
