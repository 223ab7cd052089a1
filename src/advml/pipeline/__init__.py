"""Implementation of the commands: stages (`stages/`), their shared parts, and `advml repro`."""
