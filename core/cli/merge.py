"""``lightning merge``: a run's methods written into its backbone, saved as a plain model."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from core.cli.failures import says_what_failed
from core.cli.new_folder import check_free, new_folder
from core.errors import ScionError, listed, printable

if TYPE_CHECKING:
    from torch import Tensor

    from core.anatomy import Site
    from core.training.finetuner import FineTuner


@says_what_failed
def merge(run: str, out: str) -> int:
    """Write the methods of a run into its backbone, and the plain backbone into a new folder ``out``.

    The folder holds the backbone as its own library saves it, with a tokenizer where it has one and what
    sentence-transformers reads of an encoder of texts, ``labels.json``, and ``head.safetensors`` if the task has
    a head of its own.
    """
    from core.training.load_run import load_run  # start-up time

    target = check_free(out)
    tuner = load_run(run)
    merge_methods(tuner)
    with new_folder(target) as scratch:
        has_head = save_plain(tuner, scratch)
        note = tuner.backbone.save_beside(scratch)
    files = "head.safetensors and labels.json" if has_head else "labels.json"
    separator = ", " if has_head else " and "
    what = f"a plain {type(tuner.backbone.model).__name__}{separator}{files}"
    print(f"{printable(out)}: {what}{'; ' if note else ''}{note}")
    return 0


def merge_methods(tuner: FineTuner) -> None:
    """Merge all methods of a run, in their order of attachment: what came later was applied to what came before it.

    Raises:
        ScionError: a method cannot be merged (the message names all of them), or the merged weight does not do what the
            stack did.
    """
    methods = tuner.methods
    stuck = [method for method in methods if not method.mergeable]
    if stuck:
        costs = "; ".join(dict.fromkeys(method.inference_cost for method in stuck))
        raise ScionError(f"{listed(method.name for method in stuck)} cannot be written into the weights ({costs})")
    sites: dict[str, Site] = {}
    for method in methods:
        for graft in method.grafts:
            sites[graft.site.path] = graft.site
    before = {path: _probe(site) for path, site in sites.items()}
    for method in methods:
        method.merge()
    # methods that can each be merged may act on each other in the stack, so that the result is tried on numbers
    for path, site in sites.items():
        was, now = before[path], _probe(site)
        if was is None or now is None:
            continue
        difference = float((now - was).abs().max())
        if difference > 1e-3 * float(was.abs().max()):
            raise ScionError(f"{listed(method.name for method in methods)} cannot be merged together: at {site.name} "
                             "the merged weight gives other values than the stack")


def _probe(site: Site) -> Tensor | None:
    """What the site's module makes of fixed random numbers; None where it is no linear map."""
    import torch

    weight = site.full_weight
    if site.kind == "linear":
        shape = (8, weight.shape[1])
    elif site.kind == "conv1d":
        shape = (8, weight.shape[0])
    elif site.kind == "conv":
        shape = (2, int(site.module.in_channels), *weight.shape[2:])  # type: ignore[arg-type]
    else:
        return None
    numbers = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        return site.module(numbers.to(weight))


def save_plain(tuner: FineTuner, folder: Path) -> bool:
    """The library's model as the library saves it, and the task's head beside it; returns whether there is a head."""
    from safetensors.torch import save_file

    save_library_model(tuner.backbone.model, folder)
    head = tuner.task.plain_head()
    tensors = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in head.state_dict().items()}
    if tensors:
        save_file(tensors, folder / "head.safetensors", metadata={"format": "pt"})
    classes = list(getattr(tuner.task, "classes", []))
    multilabel = bool(tuner.hparams.get("multilabel"))
    labels = {"classes": classes, "multilabel": multilabel, "task": type(tuner.task).__name__, "head": str(head),
              "features": int(tuner.backbone.dim)}
    (folder / "labels.json").write_text(json.dumps(labels, indent=1) + "\n")
    return bool(tensors)


def save_library_model(model: Any, folder: Path) -> None:
    """A model as its own library saves it."""
    from safetensors.torch import save_model

    if hasattr(model, "save_pretrained"):
        from transformers.utils import logging as messages  # loaded already, with the model

        if not sys.stderr.isatty():
            messages.disable_progress_bar()
        model.save_pretrained(folder)
    elif hasattr(model, "pretrained_cfg"):  # loads by timm.create_model("local-dir:FOLDER")
        from timm.models import save_for_hf

        save_for_hf(model, str(folder), safe_serialization=True)
    else:
        save_model(model, str(folder / "model.safetensors"), metadata={"format": "pt"})
        record = {"class": f"{type(model).__module__}.{type(model).__qualname__}"}
        (folder / "config.json").write_text(json.dumps(record, indent=1) + "\n")
