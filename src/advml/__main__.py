"""Entry point `python -m advml`, which DVC runs; workers of its queue import their own copy of the sources through PYTHONPATH."""

import os
import sys

from advml.engine import fork_server

# Under `advml repro`, let the fork server, which has already imported torch, run the command; see advml.engine.fork_server.
code = fork_server.forward(os.environ[fork_server.ADDRESS], sys.argv[1:]) if fork_server.ADDRESS in os.environ else None
if code is None:
    from advml.cli import main

    main()
sys.exit(code)
