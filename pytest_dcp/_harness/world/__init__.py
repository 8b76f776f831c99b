"""A running world as its controller sees it: states, deaths, exchanges, outcome."""
