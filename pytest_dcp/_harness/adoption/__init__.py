"""Unmodified tests that start processes of their own: `pytest --dcp-adopt` runs those as ranks.

Imported only with the option. The theory of operation is in `session`.
"""
