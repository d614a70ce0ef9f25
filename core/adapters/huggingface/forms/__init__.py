"""How Hugging Face peft writes each method that it has, a file for each of ours.

A file here has a table ``FORMS``: the method's class with its `PeftForm`. A method of another distribution has its form
as the class attribute ``hf_form``.
"""

from __future__ import annotations

import functools
import importlib
from pathlib import Path

from core.adapters.huggingface.form import PeftForm
from core.method import PEFTMethod
from core.peft import method_class, registry


@functools.cache
def all_forms() -> dict[type[PEFTMethod], PeftForm]:
    """Every method that peft has, in the order of their names."""
    found: dict[type[PEFTMethod], PeftForm] = {}
    for file in sorted(Path(__file__).parent.glob("[!_]*.py")):
        found |= importlib.import_module(f"{__name__}.{file.stem}").FORMS
    for name, module in registry().items():
        if not module.startswith("core."):
            cls = method_class(name)
            if isinstance(vars(cls).get("hf_form"), PeftForm):
                found[cls] = cls.hf_form
    return dict(sorted(found.items(), key=lambda item: item[0].__name__))


def form_of(cls: type[PEFTMethod]) -> PeftForm | None:
    """How peft writes methods of this class; a subclass that builds other grafts is another method."""
    for base in cls.__mro__:
        own = vars(base).get("hf_form")
        form = own if isinstance(own, PeftForm) else all_forms().get(base)
        if form is not None:
            return form
        if "build" in vars(base):
            return None
    return None
