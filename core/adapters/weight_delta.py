"""Patches: what attached methods change in a model, as numbers to add to it, or to another base of the same shapes.

    patch = Patch.take(model)                      # model with LoRA attached and trained
    patch.save("boolq")
    applied = Patch.load("boolq").apply(newer)     # merged into the new base, with a warning that it is another
    applied.remove()                               # and bit for bit out again
    (0.5 * patch + other).apply(newer)

A head that was trained with the methods travels along, also one beside the backbone: take the patch from the
`FineTuner` and apply it to one. A patch knows the architecture that it belongs to, and is refused on any other.

A change is dense, or low-rank where the method says so. It is frozen to numbers on the base that it was trained on: of
a method whose formula reads the weight (DoRA), the numbers are carried, not the formula. Source: Khan et al. 2024
(PortLLM), arXiv:2410.10870, where it was made for LoRA.
"""

from __future__ import annotations

import hashlib
import math
import os
import warnings
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any, NotRequired, TypedDict

import torch
from torch import Tensor, nn

from core.adapters.load import OUTSIDE, ModelRecord, fingerprint
from core.anatomy import dissect
from core.errors import ScionError, listed, one_line
from core.files import read_json
from core.json_types import Digest, Rule, Shapes, check, shown
from core.method import home_in, methods_on, uncompiled
from core.method.fingerprint import Fingerprint
from core.tensors import check_fit, check_values, checksum, kind_of, read_tensors, write_with_record

FORMAT = 1
TENSORS, RECORD = "patch.safetensors", "patch.json"


@dataclass(frozen=True)
class Change:
    """What is added to one parameter: a dense tensor, or ``up @ down`` in the layout [out, in]."""

    up: Tensor
    """[out, rank], or the dense change itself."""
    down: Tensor | None = None
    """[rank, in]; None where the change is dense."""
    shape: tuple[int, ...] = ()

    def dense(self) -> Tensor:
        """The change in the parameter's shape, in float32 or wider."""
        if self.down is None:
            return self.up
        return (self.up @ self.down).view(self.shape)

    def scaled(self, factor: float) -> Change:
        return Change(self.up * factor, self.down, self.shape)

    def plus(self, other: Change) -> Change:
        """The sum: low-rank if both are and the sum still has fewer numbers."""
        if self.down is not None and other.down is not None:
            up, down = torch.cat([self.up, other.up], dim=1), torch.cat([self.down, other.down])
            if up.numel() + down.numel() < self.up.shape[0] * self.down.shape[1]:
                return Change(up, down, self.shape)
        return Change(self.dense() + other.dense(), None, self.shape)

    def truncated(self, rank: int) -> Change:
        """The nearest change of this rank (singular value decomposition); vectors stay as they are."""
        if len(self.shape) < 2:
            return self
        u, s, v = torch.linalg.svd(self.dense().flatten(1), full_matrices=False)
        return Change(u[:, :rank] * s[:rank], v[:rank].contiguous(), self.shape)


@dataclass(frozen=True)
class Patch:
    """Changes by parameter name, and the base that they were trained on."""

    changes: dict[str, Change]
    base: str = ""
    """Fingerprint of that base; empty where there were several."""
    head: dict[str, Tensor] = field(default_factory=dict)
    """Tensors of a task head inside the model, as they were trained: they travel along, and replace."""
    architecture: str = ""
    """Of the base (`architecture_of`); empty in patches of earlier versions."""
    beside: dict[str, Tensor] = field(default_factory=dict)
    """Tensors that were trained beside the backbone, by their names in the module around it, in the form in which an
    adapter holds them. They replace as well."""
    model: dict[str, Any] = field(default_factory=dict)
    """How to build the backbone and the task of a `FineTuner`, as adapters record it."""

    # --------------------------------------------------------------------------------- making one

    @classmethod
    def take(cls, model: nn.Module, rank: int | None = None) -> Patch:
        """What the methods attached to ``model`` change; the model stays as it is.

        Args:
            model: a backbone with mergeable methods attached, or the LightningModule around one: the head of that is
                taken along.
            rank: keep this rank of each matrix's change; None keeps all.

        Raises:
            ScionError: no method, or one that cannot be merged, or not without new parameters.
        """
        if rank is not None and rank < 1:
            raise ScionError(f"Patch.take: rank {rank} must be at least 1")
        around = uncompiled(model)
        methods = methods_on(around)
        if not methods:
            raise ScionError("Patch.take: no method is attached to this model, so there is nothing to take")
        _, root = home_in(around)  # type: ignore[misc]
        if any(method.root is not root for method in methods):
            raise ScionError("Patch.take: methods are attached to several modules in this model; give one of them")
        home = root.get_submodule("peft")
        base, heads = str(home.fingerprint), list(home.heads)  # type: ignore[arg-type]
        parameters = dict(root.named_parameters())
        head = {name: parameters[name].detach().cpu().clone() for name in heads if parameters[name].requires_grad}
        architecture = architecture_of(root)
        changes: dict[str, Change] = {}
        before = {name: p.detach().clone() for name, p in parameters.items() if not name.startswith("peft.")}
        before.update({name: start.to(parameters[name]) for m in methods for name, start in m.base_at_start.items()})
        low = _factors(root)
        merged = []
        try:
            for method in methods:
                method.merge()
                merged.append(method)
            _check_nothing_new(root, before)
            for name, start in before.items():
                now = root.get_parameter(name).detach()
                if name not in heads and not torch.equal(now, start):
                    change = low.get(name) or Change((now.double() - start.double()).float().cpu(), None,
                                                     tuple(start.shape))
                    changes[name] = change if rank is None else change.truncated(rank)
        finally:
            for method in reversed(merged):
                method.unmerge()
        patch = cls(changes, base, head, architecture)
        return patch if around is root else replace(patch, **_surroundings(around, root))

    # --------------------------------------------------------------------------------- arithmetic

    def __mul__(self, factor: float) -> Patch:
        return replace(self, changes={name: change.scaled(factor) for name, change in self.changes.items()})

    __rmul__ = __mul__

    def __neg__(self) -> Patch:
        return self * -1.0

    def __add__(self, other: Patch) -> Patch:
        """The sum of both; a task head in both refuses, for heads do not add up."""
        both = [*(self.head.keys() & other.head.keys()), *(self.beside.keys() & other.beside.keys())]
        if both:
            raise ScionError(f"two patches bring the task head {listed(sorted(both), 2)}, and heads do not add up: "
                             "take one of them without its head (without_head(); on the command line --head)")
        if self.architecture and other.architecture and self.architecture != other.architecture:
            raise ScionError(f"the patches belong to two architectures, {self.architecture} and {other.architecture}")
        changes = dict(self.changes)
        for name, change in other.changes.items():
            if name in changes and changes[name].shape != change.shape:
                raise ScionError(f"the patches do not fit: {name} is {list(changes[name].shape)} and "
                                 f"{list(change.shape)}")
            changes[name] = changes[name].plus(change) if name in changes else change
        return Patch(changes, self.base if Fingerprint(self.base) == Fingerprint(other.base) else "",
                     {**self.head, **other.head}, self.architecture or other.architecture,
                     {**self.beside, **other.beside}, (self if self.beside or not other.beside else other).model)

    def __sub__(self, other: Patch) -> Patch:
        return self + (-other).without_head()

    def without_head(self) -> Patch:
        """The changes of the backbone alone."""
        return replace(self, head={}, beside={})

    # --------------------------------------------------------------------------------- applying

    def check(self, model: nn.Module) -> dict[str, nn.Parameter]:
        """The parameters of the backbone ``model`` that the patch means; every one of its entries must have its place.

        Raises:
            ScionError: a name that is missing, a shape that differs, another architecture though all names fit, values
                that are not finite.
        """
        parameters = dict(model.named_parameters())
        wanted = {**{name: change.shape for name, change in self.changes.items()},
                  **{name: tuple(tensor.shape) for name, tensor in self.head.items()}}
        missing = [name for name in wanted if name not in parameters]
        if missing:
            raise ScionError(f"the patch belongs to another architecture: {listed(missing, 3)} is not here")
        for name, shape in wanted.items():
            if tuple(parameters[name].shape) != shape:
                raise ScionError(f"the patch belongs to another architecture: {name} is {list(shape)} in the patch, "
                                 f"{list(parameters[name].shape)} here")
        here = architecture_of(model)
        if self.architecture and here != self.architecture:
            raise ScionError(f"the patch belongs to another architecture: {self.architecture}, and this is {here}; "
                             "class, names and shapes of all parameters must be the same")
        for name, change in self.changes.items():
            if not all(bool(torch.isfinite(part).all()) for part in (change.up, change.down) if part is not None):
                raise ScionError(f"the patch holds values that are not finite, at {name}")
        anatomy = dissect(model)
        base = fingerprint(model, without=anatomy.head_names())
        if self.base and base != self.base:
            warnings.warn(f"the patch is carried from base {self.base} to {base}", stacklevel=3)
        return {name: parameters[name] for name in wanted}

    def warn_of_head(self) -> None:
        """Say that what belongs beside the backbone is not applied."""
        if self.beside:
            warnings.warn(f"the patch's head ({listed(sorted(self.beside), 2)}) is not applied: it belongs beside the "
                          "backbone; apply the patch to the FineTuner, or module, around it", stacklevel=3)

    @torch.no_grad()
    def apply(self, model: nn.Module, scale: float = 1.0, keep: bool = True) -> Applied:
        """Add ``scale`` times the patch to the weights of ``model``, one parameter at a time; all or nothing.

        Args:
            model: plain, of the patch's architecture; or the LightningModule around such a backbone, whose head is
                replaced by that of the patch.
            scale: factor of the patch.
            keep: keep the weights as they were, to take the patch out again; False needs no more memory than the
                largest change.

        Returns:
            What takes it out again, bit for bit (where ``keep``).
        """
        model = uncompiled(model)
        if methods_on(model):
            raise ScionError("the model has methods attached: apply the patch before them")
        prefix, root = self._backbone_in(model)
        places = {f"{prefix}{name}": parameter for name, parameter in self.check(root).items()}
        around: dict[str, nn.Parameter] = {}
        if model is root:
            self.warn_of_head()
        else:
            around = self._places_beside(model)
        before: dict[str, Tensor] = {}
        if keep:
            before = {name: parameter.detach().clone() for name, parameter in around.items()}
        try:
            for name, parameter in places.items():
                if keep:
                    before[name] = parameter.detach().clone()
                own = name.removeprefix(prefix)
                if own in self.head:
                    parameter.copy_(self.head[own])
                else:
                    wide = torch.promote_types(parameter.dtype, torch.float32)
                    change = scale * self.changes[own].dense().to(parameter.device, wide)
                    parameter.copy_(parameter.to(wide) + change)
            places |= around
            self._write_beside(model, around)
        except BaseException:
            for name, kept in before.items():
                places[name].copy_(kept)
            raise
        return Applied(model, before, {name: places[name].detach().clone() for name in before}, keep)

    def _backbone_in(self, model: nn.Module) -> tuple[str, nn.Module]:
        """What stands before the names of the backbone's parameters in ``model``, and the backbone: ``model`` itself,
        or its ``.backbone`` or ``.model`` where it has a head beside that."""
        names = {name for name, _ in model.named_parameters()}
        wanted = [*self.changes, *self.head]
        for name in ("backbone", "model"):
            inner = getattr(model, name, None)
            if isinstance(inner, nn.Module) and not names.issuperset(wanted):
                inner = uncompiled(inner)
                [path] = [path for path, module in model.named_modules() if module is inner]
                return f"{path}.", inner
        return "", model

    def _places_beside(self, model: nn.Module) -> dict[str, nn.Parameter]:
        """The parameters beside the backbone that the patch replaces; whatever is wrong with them is told here.

        Raises:
            ScionError: the head of ``model`` is for other classes, or of another shape.
        """
        from core.training.finetuner import FineTuner  # only for a run's own module
        from core.training.head_files import load_outside  # only for a run's own module

        if not self.beside:
            return {}
        where = "the patch's head"
        parameters = dict(model.named_parameters())
        try:
            if isinstance(model, FineTuner):
                told, here = self.model.get("classes", []), list(getattr(model.task, "classes", []))
                if told and here and told != here:
                    raise ScionError(f"{where}: it is for the classes {listed(told, 4)}, the model's for "
                                     f"{listed(here, 4)}")
                load_outside(model, self._named_beside(), where, write=False)
                for name, tensor in self.beside.items():
                    check_values(tensor, tensor, name, where)
                left = {id(p) for p in [*model.backbone.parameters(), *model.beside_inference()]}
                return {name: p for name, p in parameters.items() if id(p) not in left}
            for name, tensor in self.beside.items():
                if name not in parameters:
                    raise ScionError(f"{where}: {name} is not in {type(model).__name__}")
                check_fit(tensor, parameters[name], name, where)
                check_values(tensor, parameters[name], name, where)
        except ScionError as error:
            raise ScionError(f"{error}; give the backbone alone to apply the patch without its head") from None
        return {name: parameters[name] for name in self.beside}

    def _write_beside(self, model: nn.Module, places: dict[str, nn.Parameter]) -> None:
        from core.training.finetuner import FineTuner  # only for a run's own module
        from core.training.head_files import load_outside  # only for a run's own module

        if isinstance(model, FineTuner) and places:
            load_outside(model, self._named_beside(), "the patch's head")
            return
        for name, parameter in places.items():
            parameter.copy_(self.beside[name])

    def _named_beside(self) -> dict[str, Tensor]:
        return {f"{OUTSIDE}{name}": tensor for name, tensor in self.beside.items()}

    # --------------------------------------------------------------------------------- files

    def save(self, folder: str | Path) -> Path:
        """Write ``patch.safetensors`` and ``patch.json`` into ``folder``. The record names every tensor."""
        tensors = {f"head:{name}": tensor for name, tensor in self.head.items()}
        tensors |= {f"beside:{name}": tensor for name, tensor in self.beside.items()}
        shapes = {}
        for name, change in self.changes.items():
            shapes[name] = list(change.shape)
            tensors[f"up:{name}" if change.down is not None else f"dense:{name}"] = change.up
            if change.down is not None:
                tensors[f"down:{name}"] = change.down
        held = {name: list(tensor.shape) for name, tensor in sorted(tensors.items())}
        record = {"format": FORMAT, "base": str(self.base), "architecture": self.architecture, "shapes": shapes,
                  "tensors": held}
        if self.model:
            record["model"] = self.model
        target = Path(folder)
        write_with_record(target / TENSORS, tensors, target / RECORD, record)
        return target

    @classmethod
    def load(cls, folder: str | Path) -> Patch:
        """The patch in ``folder``.

        Raises:
            ScionError: no patch, or a damaged one: also one whose record and tensors do not name each other in full.
        """
        path = Path(folder)
        if not os.path.isfile(path / RECORD):
            raise ScionError(f"{folder}: no {RECORD} here; give a folder that Patch.save wrote")
        record = read_json(path / RECORD)
        if isinstance(record, dict) and record.get("format") != FORMAT:
            raise ScionError(f"{path / RECORD}: format {shown(record.get('format'))} is unknown; this version reads "
                             f"{FORMAT}")
        check(record, PatchRecord, f"{path / RECORD}")
        lost = [name for name in LATER if name not in record]
        if lost and any(name in record for name in ("architecture", "tensors", "model")):
            raise ScionError(f"{path / RECORD}: damaged, its {listed(lost)} is gone; copy the patch again")
        tensors = read_tensors(path / TENSORS)
        if not lost:
            _check_held({name: list(tensor.shape) for name, tensor in tensors.items()}, record["tensors"], str(path))
        changes = {name: _change(name, shape, tensors, str(path)) for name, shape in record["shapes"].items()}
        head, beside = ({name.removeprefix(kind): tensors.pop(name) for name in list(tensors) if name.startswith(kind)}
                        for kind in ("head:", "beside:"))
        if tensors:
            raise ScionError(f"{path}: holds {listed(map(one_line, tensors), 3)}, which the record does not name")
        for name, tensor in head.items():
            _check_numbers(tensor, name, str(path))
        for name, tensor in beside.items():
            check_values(tensor, tensor, one_line(name), str(path))
        if "sha256" in record and checksum(path / TENSORS) != record["sha256"]:
            raise ScionError(f"{path / TENSORS}: not the tensors that {RECORD} was written with, for their checksums "
                             "differ; copy both files again")
        return cls(changes, record["base"], head, record.get("architecture", ""), beside, record.get("model", {}))


LATER = ("architecture", "tensors", "sha256")
"""Keys that records have had since a patch knows its architecture: all of them, or none."""
Signature = Annotated[str, Rule(lambda text: text.isprintable() and len(text) <= 300, "the name of an architecture")]


class PatchRecord(TypedDict):
    """What patch.json holds."""

    format: int
    base: Digest
    shapes: Shapes
    architecture: NotRequired[Signature]
    tensors: NotRequired[Shapes]
    """Names of all tensors in the file, with their shapes."""
    model: NotRequired[ModelRecord]
    sha256: NotRequired[Digest]


def architecture_of(model: nn.Module) -> str:
    """The class that a backbone is described as, and a digest of the names and shapes of all its parameters: equal for
    two models of one architecture, whatever their values. A task head and what methods have added do not count."""
    anatomy = dissect(model)
    heads = anatomy.head_names()
    parts = sorted(f"{name}{list(p.shape)}" for name, p in model.named_parameters()
                   if name not in heads and not name.startswith("peft."))
    digest = hashlib.sha256("\n".join([anatomy.family, *parts]).encode()).hexdigest()
    return f"{anatomy.family} {digest[:16]}"


def _surroundings(around: nn.Module, root: nn.Module) -> dict[str, Any]:
    """What a patch holds of the module around the backbone: what is trained beside it, and how both are built."""
    from core.training.finetuner import FineTuner  # only for a run's own module
    from core.training.head_files import outside  # only for a run's own module
    from core.training.recorded_model import model_record  # only for a run's own module

    if isinstance(around, FineTuner):
        beside = {name.removeprefix(OUTSIDE): tensor for name, tensor in outside(around).items()}
        found: dict[str, Any] = {"model": model_record(around)}
    else:
        inside = {id(p) for p in root.parameters()}
        beside = {name: p for name, p in around.named_parameters() if id(p) not in inside and p.requires_grad}
        found = {}
    return {**found, "beside": {name: tensor.detach().cpu().clone() for name, tensor in beside.items()}}


def _check_nothing_new(root: nn.Module, before: dict[str, Tensor]) -> None:
    """Refuse methods whose merging has made parameters that the base does not have."""
    made = [name for name, _ in root.named_parameters() if name not in before and not name.startswith("peft.")]
    if made:
        raise ScionError(f"Patch.take: merging makes {listed(made, 2)}, which the base does not have, and a patch adds "
                         "to what is there alone; save the merged model instead")


def _check_held(held: dict[str, list[int]], named: dict[str, list[int]], where: str) -> None:
    """Refuse a file and a record that do not name the same tensors."""
    missing, extra = (sorted(one.keys() - other.keys()) for one, other in ((named, held), (held, named)))
    if missing:
        raise ScionError(f"{where}: {listed(map(one_line, missing), 3)} is missing, which the record names; copy the "
                         "patch again")
    if extra:
        raise ScionError(f"{where}: holds {listed(map(one_line, extra), 3)}, which the record does not name")
    for name, shape in named.items():
        if held[name] != shape:
            raise ScionError(f"{where}: {one_line(name)} is {held[name]}, and {shape} in the record")


def _change(name: str, shape: list[int], tensors: dict[str, Tensor], where: str) -> Change:
    """Takes one parameter's change from ``tensors``."""
    dense, up, down = (tensors.pop(f"{kind}:{name}", None) for kind in ("dense", "up", "down"))
    if dense is not None and up is None and down is None:
        fits = list(dense.shape) == shape
    else:
        fits = dense is None and up is not None and down is not None and up.dim() == down.dim() == 2 and (
            up.shape[1] == down.shape[0]) and bool(shape) and [up.shape[0], down.shape[1]] == [
            shape[0], math.prod(shape[1:])]
    if not fits:
        raise ScionError(f"{where}: the tensors of {one_line(name)} are not those of a change of shape {shape}")
    for tensor in (dense, up, down):
        if tensor is not None:
            _check_numbers(tensor, name, where)
    return Change(dense if up is None else up, down, tuple(shape))  # type: ignore[arg-type]


def _check_numbers(tensor: Tensor, name: str, where: str) -> None:
    if kind_of(tensor) != "float":
        raise ScionError(f"{where}: {one_line(name)} holds {tensor.dtype}, where a change is of floats")
    check_values(tensor, tensor, one_line(name), where)


@dataclass(frozen=True)
class Applied:
    """A patch in a model."""

    model: nn.Module
    before: dict[str, Tensor]
    after: dict[str, Tensor]
    kept: bool = True

    @torch.no_grad()
    def remove(self) -> None:
        """Put the weights back, bit for bit.

        Raises:
            ScionError: they have changed since: take out first what was added later; or they were not kept.
        """
        if not self.kept:
            raise ScionError("the weights were not kept when the patch was applied (keep=False)")
        parameters = dict(self.model.named_parameters())
        for name, value in self.after.items():
            if not torch.equal(parameters[name].detach(), value):
                raise ScionError(f"{name} has changed since the patch was applied; remove what came later first")
        for name, value in self.before.items():
            parameters[name].copy_(value)


def residual_report(old: Patch, new: Patch, model: nn.Module, tolerance: float = 1e-6) -> dict[str, dict[str, float]]:
    """For each parameter, how far the patch trained on the old base is from the one trained on ``model``: the norm of
    C = new - old, its share of |W + old|, its largest entry, and its rank. A report, no test: two equally good runs
    from different starts may be far apart."""
    found: dict[str, dict[str, float]] = {}
    for name in old.changes.keys() & new.changes.keys():
        one, other = old.changes[name].dense(), new.changes[name].dense()
        rest = other - one
        whole = model.get_parameter(name).detach().to(one) + one
        found[name] = {"norm": float(rest.norm()), "share": float(rest.norm() / whole.norm()),
                       "largest": float(rest.abs().max()),
                       "rank": float(torch.linalg.matrix_rank(rest.flatten(1), rtol=tolerance))
                       if rest.dim() > 1 else 1.0}
    return found


def _factors(model: nn.Module) -> dict[str, Change]:
    """Low-rank changes, exact, of parameters that grafts with ``factors`` alone change."""
    found: dict[str, Change] = {}
    spoiled: set[str] = set()
    for method in methods_on(model):
        spoiled |= set(method.base_at_start)
        for graft in method.grafts:
            site, name = graft.site, graft.site.weight_name
            parts = graft(verb="factors")
            if parts is None or site.kind == "conv1d":
                spoiled.add(name)
                continue
            up, down = (part.detach().float().cpu() for part in parts)
            if site.rows is not None:
                rows = torch.zeros(site.full_weight.shape[0], up.shape[1])
                up = site.rows.put(rows, up)
            change = Change(up, down, tuple(site.full_weight.shape))
            found[name] = found[name].plus(change) if name in found else change
    return {name: change for name, change in found.items() if name not in spoiled}
