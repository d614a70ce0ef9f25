"""Low-rank and other re-parameterisations of a weight."""
