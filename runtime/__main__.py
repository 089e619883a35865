"""`python -m runtime` is the command `trimtab` of the code in the working directory, whatever else is installed."""

import sys

from runtime.cli import main

sys.exit(main())
