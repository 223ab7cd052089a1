"""`python -m advml`, for DVC's queue workers, which import their own copy of the sources through PYTHONPATH."""

from advml.cli import main

main()
