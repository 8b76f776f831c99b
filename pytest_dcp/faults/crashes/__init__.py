"""The states in which a crash can leave a folder: recorded, enumerated, tried."""
