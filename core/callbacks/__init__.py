"""Callbacks of a Trainer that are no methods."""
