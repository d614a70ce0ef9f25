"""``lightning patch``: take what a run has learned as a patch, apply it to another base, add two."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from core.cli.failures import says_what_failed
from core.cli.merge import merge_methods, save_library_model, save_plain
from core.cli.models import model_of
from core.cli.new_folder import check_free, new_folder
from core.errors import ScionError, printable

if TYPE_CHECKING:
    from torch import nn

    from core.backbone import Backbone
    from core.patch import Patch
    from core.training.finetuner import FineTuner


@says_what_failed
def take(run: str, out: str, rank: int | None = None) -> int:
    """Write what a run's methods change, and its head, as a patch into a new folder ``out``.

    Args:
        run: folder of a finished run.
        out: a folder to make.
        rank: keep this rank of each matrix's change; None keeps all.
    """
    from core.patch import Patch  # start-up time
    from core.training.load_run import load_run  # start-up time

    target = check_free(out)
    patch = Patch.take(load_run(run), rank)
    with new_folder(target) as scratch:
        patch.save(scratch)
    print(printable(f"{out}: {_contents(patch)}, for {patch.architecture}"))
    return 0


@says_what_failed
def apply(patch: str, base: str, out: str, scale: float = 1.0) -> int:
    """Add a patch to the weights of another base, and save the result as a plain checkpoint in a new folder ``out``.

    Args:
        patch: folder of a patch.
        base: a run folder, whose methods are merged first, or a backbone's folder or name.
        out: a folder to make; it gets what `core.cli.commands.merge` writes.
        scale: factor of the patch.
    """
    from core.patch import Patch  # start-up time

    target, loaded = check_free(out), Patch.load(patch)
    try:
        model, tuner = _base(loaded, base)
        loaded.apply(tuner if loaded.beside and tuner is not None else model, scale, keep=False)
    except ScionError as error:
        raise ScionError(f"{patch} onto {base}: {error}") from error
    inner = getattr(model, "model", model)
    with new_folder(target) as scratch:
        if tuner is None:
            save_library_model(inner, scratch)
        else:
            save_plain(tuner, scratch)
    head = "" if tuner is None else ", head.safetensors and labels.json"
    print(printable(f"{out}: a plain {type(inner).__name__}{head}"))
    return 0


@says_what_failed
def add(one: str, other: str, out: str, scales: tuple[float, float] = (1.0, 1.0), head: str | None = None) -> int:
    """Write the sum of two patches into a new folder ``out``.

    Args:
        one: folder of a patch.
        other: likewise.
        out: a folder to make.
        scales: factors of the two.
        head: where both have a head: the ``first``, the ``second``, or ``none`` of them stays.
    """
    from core.patch import Patch  # start-up time

    target = check_free(out)
    first, second = Patch.load(one), Patch.load(other)
    if head in ("second", "none"):
        first = first.without_head()
    if head in ("first", "none"):
        second = second.without_head()
    patch = scales[0] * first + scales[1] * second
    with new_folder(target) as scratch:
        patch.save(scratch)
    print(printable(f"{out}: {_contents(patch)}"))
    return 0


def _contents(patch: Patch) -> str:
    heads = len(patch.head) + len(patch.beside)
    head = f" and a head of {heads} tensor{'s' * (heads != 1)}" if heads else ""
    return f"changes of {len(patch.changes)} parameter{'s' * (len(patch.changes) != 1)}{head}"


def _base(patch: Patch, base: str) -> tuple[nn.Module, FineTuner | None]:
    """The plain backbone that is to be changed, and what stands around it: with the patch's head where it brings one,
    otherwise with the head of the run."""
    from core.backbone import Backbone  # start-up time
    from core.training.load_run import load_run  # start-up time

    tuner: FineTuner | None = None
    if os.path.isdir(Path(base) / "adapter"):
        tuner = load_run(base)
        merge_methods(tuner)
        model: nn.Module = tuner.backbone
    elif patch.model.get("backbone"):
        model = _recorded_backbone(patch, base)
    else:
        model = model_of(base)
    if patch.beside:
        if not isinstance(model, Backbone) or not patch.model.get("task"):
            raise ScionError("its record does not say how to build the head that it brings; use core.Patch.apply")
        tuner = _around(patch, model)
    return model, tuner


def _recorded_backbone(patch: Patch, name: str) -> Backbone:
    """The backbone that the patch was trained with, with the weights of this folder or name."""
    from core.adapters.rehearsal import largest, rehearsing  # start-up time
    from core.backbone import Backbone  # start-up time
    from core.training.load_run import USUAL, hollow_backbone  # start-up time
    from core.training.recorded_model import build  # start-up time

    record = patch.model
    if largest(record["backbone"]) > USUAL:  # a stranger's record may ask for any size
        with rehearsing(USUAL):
            hollow_backbone(record["backbone"], record["seed"])
    name = str(Path(name).absolute()) if os.path.isdir(name) else name
    recorded: dict[str, Any] = {**record["backbone"], "name": name}
    return build(recorded, record["seed"], Backbone)


def _around(patch: Patch, backbone: Backbone) -> FineTuner:
    from core.tasks.base import Task  # start-up time
    from core.training.finetuner import FineTuner  # start-up time
    from core.training.recorded_model import build  # start-up time

    record = patch.model
    task = build(record["task"], record["seed"], Task)
    return FineTuner(backbone, task, record["classes"], record["multilabel"], seed=record["seed"])
