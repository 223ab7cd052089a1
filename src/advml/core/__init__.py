"""Files, paths, devices, progress and messages, which all other packages use."""
