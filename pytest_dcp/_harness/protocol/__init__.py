"""What controller and ranks say to each other, and what a world is."""
