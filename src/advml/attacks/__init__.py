"""Attacks: maximise a per-example objective inside a threat model, independently of schemes and labels."""
