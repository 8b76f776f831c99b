"""What several tests share: states and storages to save, sessions to run, plans to draw."""
