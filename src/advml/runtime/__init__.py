"""How a stage runs: the machine and its randomness, and state that survives a kill."""
