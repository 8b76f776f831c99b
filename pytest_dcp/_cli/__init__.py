"""The commands `pytest-dcp` and `python -m pytest_dcp`; all but `run` need the extra `cli`."""
