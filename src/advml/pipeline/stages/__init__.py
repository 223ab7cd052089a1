"""One module per DVC stage, named like the stage and like the command: load files, call the library, write files, log."""
