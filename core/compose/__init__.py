"""Compositions of methods. A list of methods is a stack; here is what a list cannot say."""

from core.compose.compose import Fuse, Route, SideBySide, Split

__all__ = ["Fuse", "Route", "SideBySide", "Split"]
