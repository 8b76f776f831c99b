"""`python -m pytest_dcp`."""

import sys

from pytest_dcp._swap.command import main

sys.exit(main())
