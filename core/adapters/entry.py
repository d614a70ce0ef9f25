"""A trained adapter among the methods of a run: the methods that a folder holds, with their values."""

from __future__ import annotations

import os
import warnings
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from core.adapters.filling import Content, load_tensors
from core.adapters.huggingface.convert import is_peft
from core.adapters.reading import base_of, method_of, open_adapter, refusal, rehearse
from core.anatomy import Anatomy, dissect
from core.errors import ScionError, listed
from core.json_types import check
from core.method import PEFTMethod, Spec, key_of
from core.method.beside import OUTSIDE
from core.method.contents import live_tensors
from core.method.described import FileNames
from core.method.saving import FROM_ROOT, check_tokenizer


def load_method(folder: str | Path, name: str | None = None, trainable: bool = False,
                base: Literal["same", "any"] = "same") -> Any:
    """The method that a folder holds, not attached yet: its values come onto the model when it is attached.

    So a trained adapter can stand among other methods, as a callback of a Trainer or in `core.compose`::

        Trainer(callbacks=[load_method("runs/sw/adapter"), Pfeiffer()])

    Args:
        folder: an adapter folder, or the folder of a run.
        name: the method's name on the model, if it is to be another one than in the file.
        trainable: whether it goes on training; by default it stays in the forward as it is.
        base: ``any`` takes an adapter that was trained on other weights of the same shapes, with a warning.

    Returns:
        The method, or the list of methods where several were saved; all of them must be attached, in their order.

    Raises:
        ScionError: no adapter there, a damaged one, or one whose methods are not all of it.
    """
    methods = Trained(str(folder), name, trainable, base).methods
    return methods[0] if len(methods) == 1 else methods


class Trained:
    """A trained adapter as an entry of ``peft``: ``{adapter: FOLDER}`` means its methods, with their values.

    Args:
        adapter: an adapter folder, or the folder of a run.
        name: the method's name in this run; by default its name in the folder.
        trainable: whether it goes on training; by default it stays in the forward as it is.
        base: ``any`` takes an adapter that was trained on other weights of the same shapes, with a warning.
    """

    def __init__(self, adapter: str, name: str | None = None, trainable: bool = False,
                 base: Literal["same", "any"] = "same") -> None:
        check(name, str | None, adapter, "name")
        check(trainable, bool, adapter, "trainable")
        check(base, Literal["same", "any"], adapter, "base")
        self.methods = _methods(adapter, name, trainable, base)


def _methods(folder: str, name: str | None, trainable: bool, base: str) -> list[PEFTMethod]:
    """The methods in a folder, each with the values that it takes when it is attached."""
    if os.path.isdir(folder) and is_peft(folder):
        raise ScionError(f"{folder}: a folder of Hugging Face peft; `lightning import` makes an adapter folder of it")
    if os.path.lexists(folder) and not os.path.isdir(folder):
        raise ScionError(f"{folder}: a file; a trained adapter is an adapter folder, or the folder of a run")
    saved = open_adapter(folder)
    saved.check_whole()
    specs: list[Spec] = saved.record["methods"]
    names = [spec["name"] for spec in specs]
    if name is not None and len(names) > 1:
        raise ScionError(f"{folder}: holds {len(names)} methods ({listed(names)}), and name: {name} can be that of one "
                         "only; leave it out")
    unfrozen = saved.record.get("unfrozen", ())
    if unfrozen:
        raise ScionError(f"{folder}: parameters of the base were trained beside its methods ({listed(unfrozen, 2)}), "
                         "which no method brings along; core.load_adapter loads them")
    found: list[PEFTMethod] = []
    for spec in specs:
        method = method_of(spec, name=name or spec["name"], trainable=trainable)
        method.values = SavedValues(folder, saved.record, saved.tensors, spec, base, found)
        method.identity_at_start = False
        if method.stages:
            method.stages = ()  # what led here is over; a saved stage is gone on with as it is
        found.append(method)
    return found


@dataclass
class SavedValues:
    """What a file holds of one method, until that is on a model."""

    folder: str
    record: dict[str, Any]
    tensors: dict[str, Tensor]
    """All tensors of the file, by their names there."""
    spec: Spec
    base: str = "same"
    together: list[PEFTMethod] = field(default_factory=list)
    """All methods of the file, this one too: one may store the tensors of another."""
    is_used: bool = False

    def own(self) -> dict[str, Tensor]:
        """The method's tensors by their names in its module, as the file has them."""
        prefix = f"peft.{key_of(self.spec['name'])}."
        return {name.removeprefix(prefix): one for name, one in self.tensors.items() if name.startswith(prefix)}

    # ------------------------------------------------------------------------------- before it is attached

    def check(self, method: PEFTMethod, anatomy: Anatomy) -> None:
        """Refuse a model that the values do not fit; nothing changes.

        Raises:
            ScionError: another base, a method that its name is a part of, values that were used up.
        """
        if self.is_used:
            raise ScionError(f"{method.name}: its values went onto another model already; load {self.folder} again")
        has_values = not any(parameter.is_meta for parameter in anatomy.root.parameters())
        if has_values:  # else there is nothing to compare with
            self._check_base(method, anatomy)
            check_tokenizer(self.record, anatomy.root, self.folder, carry=self.base != "same")
            check_name(method, self.spec, anatomy, self.folder)
        self._rehearse(method, anatomy)

    def _check_base(self, method: PEFTMethod, anatomy: Anatomy) -> None:
        here, from_root = base_of(anatomy), self.record["format"] == FROM_ROOT
        recorded = self.record["base"]
        if here.agrees(recorded, from_root):
            return
        prints = f"fingerprint {recorded['fingerprint']}, here {here.fingerprint(from_root)}"
        if self.base == "same":
            raise ScionError(f"{self.folder}: the adapter belongs to another base ({prints}); {method.name} needs the "
                             "backbone that it was trained on, or base: any to carry it over")
        moved = self._of_base(anatomy)
        if moved:
            raise ScionError(f"{self.folder}: the adapter belongs to another base ({prints}) and holds values of its "
                             f"tensors ({listed(moved, 2)}), not the change of them; it cannot be carried over")
        warnings.warn(f"{self.folder}: carried from base {recorded['fingerprint']} to "
                      f"{here.fingerprint(from_root)}", stacklevel=3)

    def _of_base(self, anatomy: Anatomy) -> list[str]:
        """Names in the file of tensors of the base itself."""
        names = self._content(anatomy, {}).names
        heads = {names.in_file(name) for name in anatomy.head_names()}
        return [name for name in self.tensors if not name.startswith(("peft.", OUTSIDE)) and name not in heads]

    def _rehearse(self, method: PEFTMethod, anatomy: Anatomy) -> None:
        """Refuse methods that would be larger than their file (see `core.adapters.rehearsal`); once for all of it."""
        if method is not self.together[0] or hasattr(anatomy.root, "peft"):
            return
        own = {name: tensor for name, tensor in self.tensors.items() if not name.startswith(OUTSIDE)}
        content = Content.of(self.record, own, anatomy)
        try:
            rehearse(content, anatomy.root, self.folder)
        except Exception as error:
            what = str(refusal(error)).removeprefix(f"{self.folder}: ")
            raise ScionError(f"{self.folder}: {what}") from error

    def owned(self, anatomy: Anatomy) -> set[str]:
        """Names in the root of the base's tensors whose values the file holds."""
        names = self._content(anatomy, {}).names
        return {own for own in map(names.in_root, self._of_base(anatomy)) if own is not None}

    # ------------------------------------------------------------------------------- when it is attached

    def fill(self, method: PEFTMethod) -> None:
        """Bring an attached method into its saved structure, and write its values, with those of methods of the same
        file that waited for it.

        Raises:
            ScionError: tensors that do not fit the method on this model.
        """
        root = method.need_root()
        anatomy = dissect(root)
        method.restructure(self._content(anatomy, {}).specs[0].get("structure", {}))
        waiting = [one for one in self.together if one.root is root and _waits(one)]
        tensors: dict[str, Tensor] = {}
        for one in waiting:
            tensors |= self._tensors_of(one, anatomy)
        content = self._content(anatomy, tensors)
        renamed = {self._under_name(name, method) for name in content.apart}
        content = replace(content, apart=content.apart | renamed)
        try:
            load_tensors(waiting, content, self.folder, write=False)
        except ScionError:
            # A later method of the same file may be the one that packs these.
            if method is self.together[-1]:
                raise
            return
        load_tensors(waiting, content, self.folder)
        for one in waiting:
            if isinstance(one.values, SavedValues):
                one.values.is_used, one.values.tensors = True, {}

    def _under_name(self, name: str, method: PEFTMethod) -> str:
        """What a tensor of the file's method is called under the name that it has here."""
        prefix = f"peft.{key_of(self.spec['name'])}."
        return method.prefix + name.removeprefix(prefix) if name.startswith(prefix) else name

    def _tensors_of(self, method: PEFTMethod, anatomy: Anatomy) -> dict[str, Tensor]:
        """One method's tensors in the file, by the names that a file of this model would give them."""
        assert isinstance(method.values, SavedValues)
        found = {f"{method.prefix}{name}": tensor for name, tensor in method.values.own().items()}
        names = FileNames(self._content(anatomy, {}).names, [method])
        for name in map(names.of, live_tensors(method)):
            if name in self.tensors and not name.startswith("peft."):
                found[name] = self.tensors[name]
        return found

    def _content(self, anatomy: Anatomy, tensors: dict[str, Tensor]) -> Content:
        """The file's content as if it held this method alone, with ``tensors``."""
        content = Content.of({**self.record, "methods": [self.spec]}, tensors, anatomy)
        return replace(content, unfrozen=())


def check_name(method: PEFTMethod, spec: Spec, anatomy: Anatomy, folder: str) -> None:
    """Refuse another name than the file's where tensors that no file holds follow from the name and the seed."""
    if method.name == spec["name"]:
        return
    here, there = _unsaved(method, anatomy), _unsaved(method_of(spec), anatomy)
    for name, buffer in here.items():
        if name not in there or not torch.equal(buffer, there[name]):
            raise ScionError(f"{folder}: {type(method).__name__} draws {name} by its name, so that it must be called "
                             f"{spec['name']} here too; leave name out")


def _waits(method: PEFTMethod) -> bool:
    """Whether a method is still without the values that it came with."""
    return isinstance(method.values, SavedValues) and not method.values.is_used


def _unsaved(method: PEFTMethod, anatomy: Anatomy) -> dict[str, Tensor]:
    """The buffers that the method would have on this model and that no file holds."""
    values, method.values = method.values, None  # they were looked at already
    try:
        plan = method.plan_on(anatomy)
    finally:
        method.values = values
    before = dict(vars(method))
    module = nn.Module()
    try:
        vars(method).update(plan.numbers)
        method.fill(module, plan)
    finally:
        vars(method).clear()
        vars(method).update(before)
    saved = module.state_dict().keys()
    return {name: buffer for name, buffer in module.named_buffers() if name not in saved}
