"""timm's vision models as backbones: by name, from the papers' files, small, or with random weights.

    >>> backbone = TimmBackbone("nano", size=48)
    >>> backbone(pictures).shape            # pictures [batch, 3, 48, 48]
    torch.Size([batch, 128])

The model is timm's own and is loaded by timm's own functions, which also fit position embeddings, relative position
biases and patch embeddings to another input size; what is added is that a file which does not fill the model exactly is
refused. Source: https://github.com/huggingface/pytorch-image-models.
"""

from __future__ import annotations

import math
import os
import re
import warnings
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from core.anatomy import dissect
from core.backbone import Backbone
from core.data.download import reachable
from core.errors import ScionError, listed, nearest

Model = Any
"""Any model of timm. It is imported where it is needed: a wrong word in a configuration is told seconds earlier."""

NANOS: dict[str, tuple[str, dict[str, Any]]] = {
    "nano": ("vit_tiny_patch16_224", {"img_size": 48, "patch_size": 8, "embed_dim": 128, "depth": 4, "num_heads": 4,
                                      "mlp_ratio": 4.0}),
    "nano_swin": ("swin_tiny_patch4_window7_224", {"img_size": 48, "patch_size": 4, "window_size": 6, "embed_dim": 40,
                                                   "depths": (2, 2, 2), "num_heads": (2, 4, 8)}),
}
"""The small models that come along: timm's architecture, and the arguments that make it small."""

NANO = Path(__file__).parent
"""Where they lie, each in a folder of its name, as ``make_nano.py`` trained them: config.json, model.safetensors."""

DEFAULT = "vit_base_patch16_224.augreg_in21k"
"""What ``auto`` stands for where it can be had."""

_ANY = ("patch_embed", "norm", "block", "mlp.up", "mlp.down", "mlp", "norm2", "final_norm", "feature")
_VIT = (*_ANY, "embed", "qkv", "q", "k", "v", "o", "attend", "attention", "norm1")
_SWIN = (*_VIT, "downsample", "attention.branch", "position_bias")
_CONVNEXT = (*_ANY, "conv", "downsample")
SHAPES: dict[str, tuple[tuple[str, ...], int]] = {
    **{f"vit_{size}_patch16_224": (_VIT, 24 if size == "large" else 12) for size in ("tiny", "small", "base", "large")},
    **{f"deit_{size}_patch16_224": (_VIT, 12) for size in ("tiny", "small", "base")},
    **{f"swin_{size}_patch4_window7_224": (_SWIN, 12 if size == "tiny" else 24) for size in ("tiny", "small", "base")},
    **{f"convnext_{size}": (_CONVNEXT, 18 if size == "tiny" else 36) for size in ("tiny", "base")},
    "nano": (_VIT, 4), "nano_swin": (_SWIN, 6),
}
"""Roles and number of blocks of the usual architectures, by name. Any other of timm's can be built as well; methods
stand on those whose classes `core.anatomy.families` or the user's own description knows."""

WEIGHTS = ("model.safetensors", "pytorch_model.bin")
"""Files of weights in a folder or a hub's repository, the preferred one first."""

_SUFFIXES = {".npz": "npz", ".safetensors": "safetensors", ".pth": "torch", ".pt": "torch", ".bin": "torch",
             ".tar": "torch", ".ckpt": "torch"}


class TimmBackbone(Backbone):
    """A vision model of timm as a backbone: pictures [batch, 3, size, size] in, timm's pooled feature [batch, dim] out.

    Args:
        name: ``auto`` (ViT-B/16 of ImageNet-21k if it is cached or can be fetched, else ``nano`` with a warning), a
            name of timm with or without its tag, ``hf-hub:OWNER/NAME``, ``nano``, ``nano_swin``, a folder with
            config.json and model.safetensors as timm writes it, or ``ARCHITECTURE@FILE`` for a file of weights alone. A
            name given explicitly never falls back. A classifier that comes with the weights is dropped.
        pretrained: False builds the architecture of that name with random weights.
        size: side of the pictures in pixels; None takes the data's, and where they have none the checkpoint's.
        drop_path: rate of stochastic depth at the last block, growing linearly from 0 at the first.
        form: how FILE is read: ``torch`` (a state dict, alone or under ``state_dict``, ``model`` or ``model_ema``),
            ``safetensors``, or ``npz``, in which Google published the ViTs; ``auto`` goes by its ending.

    Raises:
        ScionError: for a name that is unknown or cannot be fetched within seconds, a file that is damaged, pickled or
            made for another architecture, and a size that is no multiple of the patch.
    """

    def __init__(self, name: str = "auto", pretrained: bool = True, size: int | None = None, drop_path: float = 0.0,
                 form: Literal["auto", "torch", "safetensors", "npz"] = "auto") -> None:
        super().__init__()
        if size is not None and size < 1:
            raise ScionError(f"backbone.size: {size} is too small, at least 1 wanted")
        if not 0 <= drop_path < 1:
            raise ScionError(f"backbone.drop_path: {drop_path} is no rate, 0 <= drop_path < 1 wanted")
        note = None
        if name == "auto":
            name, note = _auto() if pretrained else (DEFAULT, None)
        source = _source(name, pretrained, form)
        model, self.size = _build(source, size, drop_path)
        self.model = model
        self.dim = getattr(model, "head_hidden_size", None) or model.num_features
        self.origin = {"name": name, "pretrained": pretrained, "kind": source.kind, "size": self.size,
                       **({"note": note} if note else {})}

    @classmethod
    def outline(cls, name: str) -> tuple[Sequence[str], int] | None:
        return SHAPES.get(re.split("[.@]", name.removeprefix("timm/"), maxsplit=1)[0])

    def forward(self, inputs: Tensor) -> Tensor:
        """pictures [batch, 3, size, size] -> features [batch, dim]"""
        if inputs.dim() != 4 or inputs.shape[1:] != (3, self.size, self.size):
            raise ScionError(f"backbone TimmBackbone wants pictures [batch, 3, {self.size}, {self.size}], got "
                             f"{list(inputs.shape)}: set backbone.size to the data's size")
        # The model has no classes, so what it gives is its feature. It must be called as a module: what stands at the
        # parameters that it holds itself (a class token, positions) acts through its hooks.
        return self.model(inputs)


# ------------------------------------------------------------------------------------------------- names


@dataclass(frozen=True)
class _Source:
    """Where a model comes from: what ``timm.create_model`` calls it, with which arguments, and its file of weights."""

    kind: str
    name: str
    model: str
    file: Path | None = None
    form: str = ""
    arguments: dict[str, Any] = field(default_factory=dict)


def _source(name: str, pretrained: bool, form: str) -> _Source:
    kind = "local" if pretrained else "random"
    if name in NANOS:
        if not pretrained:
            return _Source("random", name, NANOS[name][0], arguments=NANOS[name][1])
        if not (NANO / name / WEIGHTS[0]).is_file():
            raise ScionError(f"backbone.name: {name}'s weights are missing here; make them by python -m "
                             "domains.vision.make_nano")
        return _from_folder("nano", name, NANO / name, True)
    path = Path(os.path.expanduser(name))
    if os.path.isdir(path):
        return _from_folder(kind, name, path, pretrained)
    if os.path.isfile(path) or name.startswith((".", "/", "~")):
        raise ScionError(f"backbone.name: {name!r} is a file of weights alone; write ARCHITECTURE@{name}"
                         if os.path.isfile(path) else f"backbone.name: no folder {name}")
    bare = name.removeprefix("hf-hub:").removeprefix("timm/")
    architecture, at, rest = bare.partition("@")
    if at and bare == name and "/" not in architecture:
        file = Path(os.path.expanduser(rest))
        _check_known(architecture)
        if not os.path.isfile(file):
            raise ScionError(f"backbone.name: no file {rest}")
        return _Source(kind, name, architecture, file if pretrained else None, _form_of(file, form))
    if "/" in bare or (bare != name and not _timm().is_model(bare)):
        repository = name.removeprefix("hf-hub:")
        if repository.count("/") != 1:
            raise ScionError(f"backbone.name: {name!r} is neither auto, a name of timm, hf-hub:OWNER/NAME, a folder, "
                             "ARCHITECTURE@FILE, nano nor nano_swin")
        folder = _fetch(name, repository, "config.json").parent
        if pretrained:
            _fetch(name, repository, *WEIGHTS)
        return _from_folder("hub" if pretrained else "random", name, folder, pretrained)
    _check_known(bare)
    return _Source("hub" if pretrained else "random", name, bare)


def _from_folder(kind: str, name: str, folder: Path, weights: bool) -> _Source:
    if not (folder / "config.json").is_file():
        raise ScionError(f"backbone.name: no config.json in the folder {folder}")
    found = [folder / file for file in WEIGHTS if (folder / file).is_file()]
    if weights and not found:
        raise ScionError(f"backbone.name: no {' or '.join(WEIGHTS)} in the folder {folder}")
    file = found[0] if weights else None
    return _Source(kind, name, f"local-dir:{folder}", file, _SUFFIXES[file.suffix] if file else "")


def _form_of(file: Path, form: str) -> str:
    known = dict.fromkeys(_SUFFIXES.values())
    if form not in ("auto", *known):
        raise ScionError(f"backbone.form: {form!r} is neither auto nor one of {listed(known)}")
    if form == "auto" and file.suffix.lower() not in _SUFFIXES:
        raise ScionError(f"backbone.form: the ending of {file} does not tell how to read it; give one of "
                         f"{listed(known)}")
    return _SUFFIXES[file.suffix.lower()] if form == "auto" else form


def _check_known(name: str) -> None:
    """Refuse what timm does not have: an architecture, or weights of it that are named by a tag."""
    timm, (architecture, _, tag) = _timm(), name.partition(".")
    if not timm.is_model(architecture):
        known = [*timm.list_models(), "auto", *NANOS]
        raise ScionError(f"backbone.name: timm has no model {architecture!r}{nearest(architecture, known)}")
    known = timm.list_pretrained(f"{architecture}.*") if tag else [name]
    if name not in known:
        raise ScionError(f"backbone.name: {architecture} has no weights {tag!r}{nearest(name, known)}; there are "
                         f"{listed(one.partition('.')[2] for one in known)}")


def _auto() -> tuple[str, str | None]:
    """What ``auto`` resolves to, and the warning to keep with the results."""
    from huggingface_hub import constants

    if _cached(f"timm/{DEFAULT}", WEIGHTS[0]) or reachable(constants.ENDPOINT):
        return DEFAULT, None
    note = f"backbone.name auto: {DEFAULT} is not cached and the hub does not answer, so this is the built-in nano"
    warnings.warn(note, stacklevel=3)
    return "nano", note


# ------------------------------------------------------------------------------------------------- files


def _cached(repository: str, file: str) -> Path | None:
    from huggingface_hub import try_to_load_from_cache

    repository, _, revision = repository.partition("@")
    try:
        found = try_to_load_from_cache(repository, file, revision=revision or None)
    except ValueError:
        raise ScionError(f"backbone.name: {repository!r} is no name of a model on the hub, as OWNER/NAME") from None
    return Path(found) if isinstance(found, str) else None


def _fetch(name: str, repository: str, *files: str) -> Path:
    """The first of these files that a repository of the hub holds, from the cache or else from the net."""
    from huggingface_hub import constants, hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError

    cached = [found for file in files if (found := _cached(repository, file))]
    if cached:
        return cached[0]
    if not reachable(constants.ENDPOINT):
        raise ScionError(f"backbone.name: {name!r} is not in the cache and the hub does not answer; connect, or take "
                         "a local file or the built-in nano")
    owner, _, revision = repository.partition("@")
    for file in files:
        try:
            return Path(hf_hub_download(owner, file, revision=revision or None))
        except EntryNotFoundError:
            continue
        except Exception as error:  # from the hub, the net or the disk: whatever it was, the file is not to be had
            raise ScionError(f"backbone.name: {name!r}: the hub does not give it ({_line(error)})") from None
    raise ScionError(f"backbone.name: {name!r}: no {' or '.join(files)} on the hub")


def _weights_of(name: str, config: dict[str, Any]) -> Path:
    """The weights that timm's table names for a model: on the hub, or for a few at an address of their own."""
    if config.get("hf_hub_id"):
        file = config.get("hf_hub_filename")
        return _fetch(name, config["hf_hub_id"], *((file,) if file else WEIGHTS))
    url = config.get("url")
    if not url:
        raise ScionError(f"backbone.name: timm has no weights of {name}; give a tag, a file, or pretrained: false")
    file = Path(torch.hub.get_dir()) / "checkpoints" / url.rpartition("/")[2]
    if not os.path.isfile(file):
        if not reachable(url):
            raise ScionError(f"backbone.name: {name!r} is not in the cache and {url} does not answer; connect, or take "
                             "a local file or the built-in nano")
        try:
            file.parent.mkdir(parents=True, exist_ok=True)
            torch.hub.download_url_to_file(url, str(file))
        except Exception as error:  # from the net or the disk: whatever it was, the file is not to be had
            raise ScionError(f"backbone.name: {name!r}: {url} does not come to {file.parent} ({_line(error)})"
                             ) from None
    return file


def _read(source: _Source, file: Path) -> dict[str, Tensor]:
    """The tensors of a file in timm's form, by name."""
    from safetensors.torch import load_file
    from timm.models import clean_state_dict, load_state_dict

    try:
        tensors: Any = (clean_state_dict(load_file(file)) if source.form == "safetensors"
                        else load_state_dict(str(file)))
    except Exception as error:  # from safetensors, torch or zipfile: whatever it was, the file cannot be read
        raise ScionError(f"backbone.name: {source.name!r}: {file} is damaged, not of the form {source.form}, or holds "
                         f"pickled objects, which are not read ({_line(error)})") from None
    if not isinstance(tensors, dict) or not tensors or not all(isinstance(t, Tensor) for t in tensors.values()):
        raise ScionError(f"backbone.name: {source.name!r}: {file} holds no state dict")
    return tensors


def _shapes_in(file: Path, most: int) -> dict[str, tuple[int, ...]]:
    """The shapes of the arrays in an npz file, from their headers.

    Raises:
        ScionError: one of them is a pickled object, or together they have more than ``most`` bytes: a few packed ones
            may stand for any number.
    """
    from numpy.lib import format as npy

    shapes: dict[str, tuple[int, ...]] = {}
    size = 0
    with zipfile.ZipFile(file) as archive:
        for member in archive.namelist():
            with archive.open(member) as stream:
                first = npy.read_magic(stream) == (1, 0)
                shape, _, kind = (npy.read_array_header_1_0 if first else npy.read_array_header_2_0)(stream)
            if kind.hasobject:
                raise ScionError(f"{member} is a pickled object, which is not read")
            size += math.prod(map(abs, shape)) * kind.itemsize
            if size > most:
                raise ScionError(f"it unpacks to more than {most / 1e6:,.0f} MB, far more than the architecture has")
            shapes[member.removesuffix(".npy")] = shape
    return shapes


class _Written(TorchFunctionMode):
    """Notes which tensors are copied into, and refuses shapes that differ: ``copy_`` alone would repeat the smaller."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.missing = {id(tensor): name for name, tensor in model.named_parameters()}

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is Tensor.copy_:
            into, values = args[:2]
            name = self.missing.pop(id(into), "a tensor")
            if into.shape != values.shape:
                raise ScionError(f"{name} is {list(values.shape)} in the file, {list(into.shape)} in the architecture")
        return func(*args, **(kwargs or {}))


# ------------------------------------------------------------------------------------------------- models


def _timm() -> Any:
    with torch.device("cpu"):  # what it keeps from its import must not be a meta tensor
        import timm

    return timm


def _create(source: _Source, problem: str = "timm does not build it", **arguments: Any) -> Model:
    try:
        return _timm().create_model(source.model, **{"num_classes": 0, **source.arguments, **arguments})
    except Exception as error:  # from any of a thousand architectures, or from what fits a file to it
        raise ScionError(f"backbone.name: {source.name!r}: {problem} ({_line(error)})") from None


def _outline(source: _Source, drop_path: float) -> tuple[Model, dict[str, Any]]:
    """The model without any tensors, to ask what it takes; and its rate of stochastic depth as timm wants it told."""
    rate: dict[str, Any] = {"drop_path_rate": drop_path}  # 0 too is told, for some have a rate of their own
    with torch.device("meta"):
        try:
            return _create(source, **rate), rate
        except ScionError:
            outline = _create(source)
    if drop_path:
        raise ScionError(f"backbone.drop_path: {source.name} has no stochastic depth")
    return outline, {}


def _build(source: _Source, size: int | None, drop_path: float) -> tuple[Model, int]:
    """The model, without a classifier, and the side of the pictures that it takes."""
    outline, arguments = _outline(source, drop_path)
    config: dict[str, Any] = outline.pretrained_cfg
    patches: Any = getattr(outline, "patch_embed", None)
    fixed = getattr(patches, "img_size", None)
    own = _side(fixed or config["input_size"][1:])
    size = size or own
    patch = _side(patches.patch_size) if fixed else 1
    if size % patch:
        raise ScionError(f"backbone.size: {size} is no multiple of the patch of {source.name}, {patch}")
    if size != own and (fixed or config["fixed_input_size"]):
        arguments["img_size"] = size
    if source.kind == "random":
        return _create(source, **arguments), size
    try:
        file = source.file or _weights_of(source.name, config)
    except ScionError:
        dissect(outline)  # what no method can stand on is not worth fetching
        raise
    if source.form == "npz":
        return _load_npz(source, file, arguments), size
    tensors = _read(source, file)
    # Built with the classifier that the file holds, if any: timm then takes nothing less than a complete file.
    names = config.get("classifier") or ()
    places = [place for name in ([names] if isinstance(names, str) else names)
              for place in (name, name.rpartition(".")[0])]
    classes = next((len(tensors[f"{place}.weight"]) for place in places if f"{place}.weight" in tensors), 0)
    where = {"state_dict": tensors, "num_classes": classes, "label_offset": 0, "source": None}
    model = _create(source, f"{file} does not fit the architecture", pretrained=True, num_classes=classes,
                    pretrained_cfg_overlay=where, **arguments)
    del model.pretrained_cfg["state_dict"]
    if classes:
        model.reset_classifier(0)
    return model, size


def _side(sides: int | Sequence[int]) -> int:
    return sides if isinstance(sides, int) else sides[0]


def _load_npz(source: _Source, file: Path, arguments: dict[str, Any]) -> Model:
    model = _create(source, **arguments)
    if not hasattr(model, "load_pretrained"):
        raise ScionError(f"backbone.name: {source.name!r}: timm reads no npz file into a {type(model).__name__}")
    try:
        # four bytes a number, and room for a classifier of many classes
        shapes = _shapes_in(file, 4 * 4 * sum(parameter.numel() for parameter in model.parameters()) + 2**26)
        blocks = {match[1] for name in shapes if (match := re.search(r"Transformer/encoderblock_(\d+)/", name))}
        if blocks and len(blocks) != len(model.blocks):
            raise ScionError(f"{len(blocks)} blocks in the file, {len(model.blocks)} in the architecture")
        with _Written(model) as written:
            model.load_pretrained(str(file))
        if written.missing:
            raise ScionError(f"the file lacks {listed(written.missing.values(), 3)}")
    except Exception as error:  # from numpy, zipfile or timm: whatever it was, the file cannot be used
        raise ScionError(f"backbone.name: {source.name!r}: {file} is damaged or does not fit the architecture "
                         f"({_line(error)})") from None
    return model


def _line(error: Exception) -> str:
    """What an error says, in one line: of several lines that of the whole is left out, and each is cut."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [repr(error)]
    return " ".join(line[:150] for line in (lines[1:4] or lines))
