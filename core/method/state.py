"""A method's tensors as a module, and its record in a state dict and in files."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any, NotRequired, TypedDict

import torch
from torch import Tensor, nn

from core.errors import ScionError
from core.files import parse_json
from core.json_types import Digest, Name, check, check_fields
from core.method.attached import Home
from core.method.definition import MethodDefinition
from core.method.described import BaseRecord
from core.record import plain, signature

if TYPE_CHECKING:
    from core.method.base import PEFTMethod

Spec = TypedDict("Spec", {"class": str, "name": Name, "config": dict[str, Any],
                          "structure": NotRequired[dict[str, Any]]})
"""What `spec_of` gives, and files hold."""
Own = TypedDict("Own", {"class": str, "name": Name, "config": dict[str, Any], "structure": NotRequired[dict[str, Any]],
                        "base": Digest, "described": NotRequired[BaseRecord]})
"""A method's record in a checkpoint: its spec, and its base's fingerprint, also that of the described model alone."""
LARGEST_STATE = 16 * 2**20
"""Bytes of such a record."""


class MethodModule(nn.Module):
    """All tensors that one method adds: shared ones directly, each graft under its site's name."""

    def __init__(self, method: PEFTMethod) -> None:
        super().__init__()
        self.method = method

    def get_extra_state(self) -> Tensor:
        home = getattr(self.method.root, "peft", None)
        record = self.method.spec()
        record["base"] = home.fingerprint if isinstance(home, Home) else ""
        if isinstance(home, Home) and home.base is not None:
            record["described"] = home.base.record()
        return torch.frombuffer(bytearray(json.dumps(record).encode()), dtype=torch.uint8).clone()

    def set_extra_state(self, state: Tensor) -> None:
        saved = decode_extra_state(state, "the checkpoint")
        home: Home = self.method.root.peft  # type: ignore[union-attr, assignment]
        if saved["class"] != type(self.method).__name__:
            raise ScionError(f"the checkpoint holds {saved['class']} where {type(self.method).__name__} is attached")
        if home.without_values:  # built on the meta device: the values arrive with this very checkpoint
            home.fingerprint, home.without_values = saved["base"], False
            home.base = home.base_now().as_recorded(saved["base"], saved.get("described"))
        if saved["base"] != home.fingerprint:
            raise ScionError(f"{self.method.name} was trained on another base ({saved['base']}) than this one "
                             f"({home.fingerprint}): build the same backbone with the same weights")
        check_structure(type(self.method), saved.get("structure", {}), "the checkpoint")
        self.method.restructure(saved.get("structure", {}))
        self.method.prepared = True


def spec_of(method: PEFTMethod) -> dict[str, Any]:
    """How to make a method again, as JSON: the class's name in the registry, its arguments, its structure."""
    config = {key: plain(value) for key, value in method.config.items()}
    for key in method.start_only:
        config[key] = plain(signature(type(method)).parameters[key].default)
    return {"class": type(method).__name__, "name": method.name, "config": config, "structure": method.structure()}


def decode_extra_state(state: Any, where: str) -> dict[str, Any]:
    """The JSON record in a method's ``_extra_state``: spec and base fingerprint.

    Raises:
        ScionError: it is no such record; begins with ``where``.
    """
    # From a stranger's file: everything that reading its bytes could trip over is looked at first.
    is_bytes = isinstance(state, Tensor) and state.dtype == torch.uint8 and state.dim() == 1
    if not is_bytes or state.is_meta or state.layout != torch.strided or state.numel() > LARGEST_STATE:
        raise ScionError(f"{where}: a method's record is damaged")
    try:
        record = parse_json(state.cpu().numpy().tobytes().decode())
    except (ValueError, RecursionError):
        raise ScionError(f"{where}: a method's record is damaged") from None
    check(record, Own, where)
    return record


def check_structure(cls: type[MethodDefinition], structure: Any, where: str) -> None:
    """Refuse what this class's `MethodDefinition.structure` cannot have given.

    Raises:
        ScionError: begins with ``where`` and says what is wrong.
    """
    has_none = cls.structure is MethodDefinition.structure
    fields = {} if has_none else cls.structure_types
    if fields is not None:
        check_fields(structure, fields, where, f"{cls.__name__}.structure")


def shapes_by_site(method: PEFTMethod) -> dict[str, list[int]]:
    """The weights' shapes by site: part of the `structure` of methods whose tensors do not show them."""
    return {graft.site.weight_name: list(graft.site.full_weight.shape) for graft in method.grafts}


def check_shapes(method: PEFTMethod, saved: dict[str, list[int]], here: dict[str, list[int]] | None = None) -> None:
    """Refuse, in `restructure`, weights that differ from the ``saved`` shapes.

    Args:
        method: an attached one.
        saved: shapes by name.
        here: those of the model; None is `shapes_by_site`.

    Raises:
        ScionError: names the weight and both shapes.
    """
    for name, shape in (shapes_by_site(method) if here is None else here).items():
        if saved.get(name, shape) != shape:
            raise ScionError(f"{method.name}: {name} is {saved[name]} in the file, {shape} here")
