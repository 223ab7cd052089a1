"""Accuracy under attack and corruption, with intervals and records of the measurement."""
