"""``lightning export`` and ``lightning import``: adapters to Hugging Face peft's form and from it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from core.cli.failures import says_what_failed
from core.cli.models import model_of
from core.cli.new_folder import check_free, new_folder
from core.errors import ScionError, printable
from core.files import read_json

if TYPE_CHECKING:

    pass


@says_what_failed
def export(adapter: str, out: str, model: str | None) -> int:
    """Write a run's or an adapter's methods into a new folder ``out``, as Hugging Face peft writes them."""
    from core.adapters.huggingface.convert import CONFIG, to_peft  # start-up time
    from core.adapters.load import load_adapter, open_adapter  # start-up time
    from core.training.load_run import load_run  # start-up time

    target = check_free(out)
    if model is not None:
        backbone: Any = model_of(model)
        loaded = load_adapter(adapter, backbone)
        methods = loaded if isinstance(loaded, list) else [loaded]
        inner = backbone
    else:
        if not (open_adapter(adapter).record.get("model") or {}).get("backbone"):
            raise ScionError(f"{adapter}: does not say which backbone it is for; name it with --model")
        tuner = load_run(adapter)
        backbone, methods, inner = tuner.backbone, tuner.methods, tuner.backbone.model
    with new_folder(target) as scratch:
        to_peft(methods, backbone, scratch)
        kind = read_json(scratch / CONFIG)["peft_type"]
    print(f"{printable(out)}: a peft adapter ({kind}) for {type(inner).__name__}; a task's head is no part of it")
    return 0


@says_what_failed
def import_(folder: str, out: str, model: str) -> int:
    """Read an adapter folder of Hugging Face peft for ``model``, and save it as an adapter in a new folder ``out``."""
    from core.adapters.huggingface.convert import from_peft  # start-up time
    from core.adapters.load import save_adapter  # start-up time

    target = check_free(out)
    loaded = from_peft(folder, model_of(model))
    methods = loaded if isinstance(loaded, list) else [loaded]
    with new_folder(target) as scratch:
        save_adapter(methods, scratch)
    print(printable(f"{out}: {', '.join(map(repr, methods))}, for {model}"))
    return 0
