"""The ``lightning`` command."""

from core.cli.entry import main

__all__ = ["main"]
