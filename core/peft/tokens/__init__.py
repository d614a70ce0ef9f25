"""What enters or leaves the sequence."""
