"""Searches for stronger attacks and better training, and what makes them survive: the only package that imports optuna."""
