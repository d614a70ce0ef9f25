"""How Hugging Face peft writes each method that both libraries have, a file per method.

A file here has a table ``FORMS`` of the method's class with its `PeftForm`. A method of another distribution has its
form as the class attribute ``hf_form``.
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
        module = importlib.import_module(f"{__name__}.{file.stem}")
        found |= module.FORMS
    for name, module_name in registry().items():
        # Only other distributions' methods are imported here: ours have their forms in the files above.
        if not module_name.startswith("core."):
            cls = method_class(name)
            own = vars(cls).get("hf_form")
            if isinstance(own, PeftForm):
                found[cls] = own
    return dict(sorted(found.items(), key=lambda item: item[0].__name__))


def form_of(cls: type[PEFTMethod]) -> PeftForm | None:
    """How peft writes methods of this class, or None if it has no such method."""
    for base in cls.__mro__:
        own = vars(base).get("hf_form")
        form = own if isinstance(own, PeftForm) else all_forms().get(base)
        if form is not None:
            return form
        # A class that builds its grafts itself is another method than its parent, whose form would be wrong for it.
        if "build" in vars(base):
            return None
    return None
