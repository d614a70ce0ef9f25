"""Which existing parameters may move."""
