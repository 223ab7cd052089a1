"""Searches for stronger attacks and better training, resumable after kills; the only package that imports optuna."""
