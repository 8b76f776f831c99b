"""`show --html`: a checkpoint's layout as one page that needs nothing but a browser."""
