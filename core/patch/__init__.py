"""Patches: what attached methods change in a model, as numbers to add to it, or to another base."""

from core.patch.change import Change
from core.patch.files import FORMAT, RECORD, TENSORS
from core.patch.patch import Applied, Patch, residual_report
from core.patch.take import architecture_of

__all__ = ["FORMAT", "RECORD", "TENSORS", "Applied", "Change", "Patch", "architecture_of", "residual_report"]
