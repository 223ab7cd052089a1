"""Attacks ascend a per-example objective inside a threat model; they know neither schemes nor labels."""
