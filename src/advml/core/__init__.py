"""Basic parts used by all other packages: files, paths, devices, progress, messages."""
