"""Accuracy under attack: what is measured, how sure it is, and the record of how it was made."""
