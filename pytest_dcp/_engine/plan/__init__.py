"""What to write and what to read, decided on columns. Pure: no file, process or collective."""
