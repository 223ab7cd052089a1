"""`python -m advml`, as DVC runs it: workers of its queue import their own copy of the sources through PYTHONPATH."""

import os
import sys

from advml import warm

# Under `advml repro` another process has already imported torch; see advml.warm.
code = warm.forward(os.environ[warm.ADDRESS], sys.argv[1:]) if warm.ADDRESS in os.environ else None
if code is None:
    from advml.cli import main

    main()
sys.exit(code)
