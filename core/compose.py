"""Placeholder for compositions."""
__all__: list[str] = []
