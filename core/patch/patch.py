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

import warnings
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import LightningModule
from torch import Tensor, nn

from core.anatomy import dissect
from core.errors import ScionError, listed
from core.method import methods_on, uncompiled
from core.method.beside import OUTSIDE, KnowsItsHead
from core.method.described import Base, Names
from core.method.fingerprint import Fingerprint
from core.patch.change import PatchData
from core.patch.files import read_files, write_files
from core.patch.take import architecture_of, take_from
from core.tensors import check_fit, check_values


class Patch(PatchData):
    """Changes by parameter name, and the base that they were trained on."""

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
        return cls(**vars(take_from(model, rank)))

    # --------------------------------------------------------------------------------- arithmetic

    def __mul__(self, factor: float) -> Patch:
        changes = {name: change.scaled(factor) for name, change in self.changes.items()}
        return replace(self, changes=changes)

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
        other = other.named_from(self.path)
        for name, change in other.changes.items():
            if name in changes and changes[name].shape != change.shape:
                raise ScionError(f"the patches do not fit: {name} is {list(changes[name].shape)} and "
                                 f"{list(change.shape)}")
            changes[name] = changes[name].plus(change) if name in changes else change
        # Compared as fingerprints: those of one model in float32 and in bfloat16 are equal, though their texts differ.
        base = self.base if Fingerprint(self.base) == Fingerprint(other.base) else ""
        head = {**self.head, **other.head}
        architecture = self.architecture or other.architecture
        beside = {**self.beside, **other.beside}
        # The record of a model describes the head beside it, so it comes from the patch that has one.
        described = self if self.beside or not other.beside else other
        path = other.path if self.path is None else self.path
        return Patch(changes, base, head, architecture, beside, described.model, path)

    def __sub__(self, other: Patch) -> Patch:
        return self + (-other).without_head()

    def without_head(self) -> Patch:
        """The changes of the backbone, without a head."""
        return replace(self, head={}, beside={})

    # --------------------------------------------------------------------------------- applying

    def named_from(self, path: str | None) -> Patch:
        """The patch under the names of a module that has the described model at ``path``."""
        if self.path is None or path is None or path == self.path:
            return self
        here, there = Names(self.path), Names(path)

        def renamed(parts: dict[str, Any]) -> dict[str, Any]:
            return {there.in_root(here.in_file(name)) or name: part for name, part in parts.items()}

        return replace(self, changes=renamed(self.changes), head=renamed(self.head), path=path)

    def on(self, model: nn.Module) -> Patch:
        """The patch under the names of ``model``, a backbone.

        Warns:
            UserWarning: what it changes outside the described model is not here, and left out.
        """
        if self.path is None:
            return self
        path = dissect(model).inputs.path
        patch = self.named_from(path)
        known, names = {name for name, _ in model.named_parameters()}, Names(path)
        absent = {name for name in (*patch.changes, *patch.head) if name not in known and names.is_apart(name)}
        if not absent:
            return patch
        warnings.warn(f"the patch's {listed(sorted(absent), 3)} lies apart from the backbone, {type(model).__name__} "
                      "has no such tensors, and they are left out", stacklevel=3)
        changes = {name: change for name, change in patch.changes.items() if name not in absent}
        head = {name: tensor for name, tensor in patch.head.items() if name not in absent}
        return replace(patch, changes=changes, head=head)

    def check(self, model: nn.Module) -> dict[str, nn.Parameter]:
        """The parameters of the backbone ``model`` that the patch changes; each of its entries must fit one. The patch
        has the names of ``model`` (`on`).

        Raises:
            ScionError: a name that is missing, a shape that differs, another architecture though all names fit, values
                that are not finite.
        """
        parameters = dict(model.named_parameters())
        shapes = {name: change.shape for name, change in self.changes.items()}
        shapes |= {name: tuple(tensor.shape) for name, tensor in self.head.items()}
        missing = [name for name in shapes if name not in parameters]
        if missing:
            raise ScionError(f"the patch belongs to another architecture: {listed(missing, 3)} is not here")
        for name, shape in shapes.items():
            if tuple(parameters[name].shape) != shape:
                raise ScionError(f"the patch belongs to another architecture: {name} is {list(shape)} in the patch, "
                                 f"{list(parameters[name].shape)} here")
        from_root = self.path is None
        here = architecture_of(model, from_root)
        if self.architecture and here != self.architecture:
            raise ScionError(f"the patch belongs to another architecture: {self.architecture}, and this is {here}; "
                             "class, names and shapes of all parameters must be the same")
        for name, change in self.changes.items():
            if not (_is_finite(change.up) and _is_finite(change.down)):
                raise ScionError(f"the patch holds values that are not finite, at {name}")
        base = Base.of(dissect(model)).fingerprint(from_root)
        if self.base and base != self.base:
            warnings.warn(f"the patch is carried from base {self.base} to {base}", stacklevel=3)
        return {name: parameters[name] for name in shapes}

    def warn_of_head(self) -> None:
        """Warn that what belongs beside the backbone is not applied."""
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
        # Everything that may be refused comes before the first parameter is written.
        patch = self.on(root)
        places = {f"{prefix}{name}": parameter for name, parameter in patch.check(root).items()}
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
                patch._write(name.removeprefix(prefix), parameter, scale)
            places |= around
            self._write_beside(model, around)
        except BaseException:  # a key press in the middle as well
            for name, kept in before.items():
                places[name].copy_(kept)
            raise
        after = {name: places[name].detach().clone() for name in before}
        return Applied(model, before, after, keep)

    def _write(self, name: str, parameter: nn.Parameter, scale: float) -> None:
        """Replace a parameter of a head, or add the scaled change to one of the backbone."""
        if name in self.head:
            parameter.copy_(self.head[name])
            return
        # The sum is made in float32 at least, and rounded once.
        wide = torch.promote_types(parameter.dtype, torch.float32)
        change = scale * self.changes[name].dense().to(parameter.device, wide)
        parameter.copy_(parameter.to(wide) + change)

    def _backbone_in(self, model: nn.Module) -> tuple[str, nn.Module]:
        """The prefix of the names of the backbone's parameters in ``model``, and the backbone: ``model`` itself, or
        its ``.backbone`` or ``.model`` where it has a head beside that."""
        names = {name for name, _ in model.named_parameters()}
        has_own_names = names.issuperset([*self.changes, *self.head])
        # What is in no LightningModule and brings no head beside it is a backbone, under whatever names.
        is_backbone = self.path is not None and not self.beside and not isinstance(model, LightningModule)
        if has_own_names or is_backbone:
            return "", model
        for name in ("backbone", "model"):
            inner = getattr(model, name, None)
            if isinstance(inner, nn.Module):
                inner = uncompiled(inner)
                [path] = [path for path, module in model.named_modules() if module is inner]
                return f"{path}.", inner
        return "", model

    def _places_beside(self, model: nn.Module) -> dict[str, nn.Parameter]:
        """The parameters beside the backbone that the patch replaces, checked before any of them is written.

        Raises:
            ScionError: the head of ``model`` is for other classes, or of another shape.
        """
        if not self.beside:
            return {}
        where = "the patch's head"
        parameters = dict(model.named_parameters())
        try:
            for name, tensor in self.beside.items():
                check_values(tensor, tensor, name, where)
            if isinstance(model, KnowsItsHead):
                self._check_classes(model.model_record(), where)
                model.load_beside(self._named_beside(), where, write=False)
                return model.parameters_beside()
            for name, tensor in self.beside.items():
                if name not in parameters:
                    raise ScionError(f"{where}: {name} is not in {type(model).__name__}")
                check_fit(tensor, parameters[name], name, where)
        except ScionError as error:
            raise ScionError(f"{error}; give the backbone alone to apply the patch without its head") from None
        return {name: parameters[name] for name in self.beside}

    def _check_classes(self, here: dict[str, Any], where: str) -> None:
        """Refuse a head for other classes than the model's, where both are known: as many would fit all the same."""
        own = self.model.get("classes", [])
        others = here.get("classes", [])
        if own and others and own != others:
            raise ScionError(f"{where}: it is for the classes {listed(own, 4)}, the model's for {listed(others, 4)}")

    def _write_beside(self, model: nn.Module, places: dict[str, nn.Parameter]) -> None:
        """Replace the parameters beside the backbone."""
        if isinstance(model, KnowsItsHead) and places:
            model.load_beside(self._named_beside(), "the patch's head")
            return
        for name, parameter in places.items():
            parameter.copy_(self.beside[name])

    def _named_beside(self) -> dict[str, Tensor]:
        """The tensors beside the backbone as an adapter names them."""
        return {f"{OUTSIDE}{name}": tensor for name, tensor in self.beside.items()}

    # --------------------------------------------------------------------------------- files

    def save(self, folder: str | Path) -> Path:
        """Write ``patch.safetensors`` and ``patch.json`` into ``folder``. The record names every tensor."""
        return write_files(self, folder)

    @classmethod
    def load(cls, folder: str | Path) -> Patch:
        """The patch in ``folder``.

        Raises:
            ScionError: no patch, or a damaged one: also one whose record and tensors do not name each other in full.
        """
        return cls(**vars(read_files(folder)))


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
    """How far the patch trained on the old base is from the one trained on ``model``, for each parameter.

    That is the norm of C = new - old, its share of |W + old|, its largest entry, and its rank. A report, no test: two
    equally good runs from different starts may be far apart.
    """
    found: dict[str, dict[str, float]] = {}
    for name in old.changes.keys() & new.changes.keys():
        one = old.changes[name].dense()
        rest = new.changes[name].dense() - one
        whole = model.get_parameter(name).detach().to(one) + one
        norm = rest.norm()
        rank = 1.0
        if rest.dim() > 1:
            rank = float(torch.linalg.matrix_rank(rest.flatten(1), rtol=tolerance))
        found[name] = {"norm": float(norm), "share": float(norm / whole.norm()), "largest": float(rest.abs().max()),
                       "rank": rank}
    return found


def _is_finite(part: Tensor | None) -> bool:
    """Whether all values of a part of a change are finite; a part that does not exist has none that is not."""
    return part is None or bool(torch.isfinite(part).all())
