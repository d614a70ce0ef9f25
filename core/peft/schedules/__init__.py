"""Methods that decide what other methods train, and when."""
