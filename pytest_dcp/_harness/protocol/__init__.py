"""Messages between controller and ranks, and the description of a world."""
