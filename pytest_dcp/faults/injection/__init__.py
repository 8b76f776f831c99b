"""Where and when a fault acts."""
