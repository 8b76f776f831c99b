"""What runs in pytest's own process: items, fixtures, worlds and reports."""
