"""Methods that are optimizers."""
