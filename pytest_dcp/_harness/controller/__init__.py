"""Code in pytest's own process: items, fixtures, worlds and reports."""
