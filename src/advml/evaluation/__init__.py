"""Accuracy under attack and corruption, with intervals and a record of how it was measured."""
