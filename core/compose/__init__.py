"""Compositions of methods. A list of methods is a stack; here is what a list cannot say.

``Route`` holds methods side by side, one at a time or each for its own rows of a batch::

    languages = Route([LoRA(name="en"), LoRA(name="sw")]).attach(model)
    with languages.route("sw"):                     # the whole batch
        model(x)
    with languages.route([0, 1, 1, 0]):             # each row its own
        model(x)

``Split`` gives each its own part of the sequence, ``Average`` takes the mean of their changes, and ``Fuse`` learns to
mix what trained adapters do::

    Split([LanguageAdapter(name="en"), LanguageAdapter(name="sw")], by="token_type")
    Average(["runs/seed0/adapter", "runs/seed1/adapter"], weights=[2, 1])
    Fuse(["runs/sentiment/adapter", "runs/entailment/adapter"])

Methods are given as objects, as ``{"class": "LoRA", ...}``, or, to start from trained ones, as folders: ``"folder"``,
or ``{"adapter": "folder", "name": "a name of its own", "trainable": False}``; or as `core.load_method` gives them.
"""

from core.compose.average import Average
from core.compose.fuse import Fuse
from core.compose.route import Route
from core.compose.side_by_side import SideBySide
from core.compose.split import Split

__all__ = ["Average", "Fuse", "Route", "SideBySide", "Split"]
