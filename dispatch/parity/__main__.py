"""`python -m dispatch.parity`."""

import sys

from dispatch.parity.command import main

if __name__ == "__main__":
    sys.exit(main())
