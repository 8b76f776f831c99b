"""`python -m pytest_dcp`, and the command `pytest-dcp`."""

import sys

from pytest_dcp._cli.main import main

if __name__ == "__main__":
    sys.exit(main())
