"""What is learned (schemes, objectives), under which adversary (regimes), and the loop that learns it."""
