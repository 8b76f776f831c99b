"""`python -m pytest_dcp`."""

import sys

from pytest_dcp._swap.command import main

if __name__ == "__main__":
    sys.exit(main())
