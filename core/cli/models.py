"""A model by what people call it: a domain's backbone, a name of timm or transformers, a folder."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from core.errors import ScionError, listed, nearest, one_line
from core.files import read_json

if TYPE_CHECKING:
    from torch import nn


MOST_CALLS = 30_000
"""Calls of torch that building a backbone may take: the largest ones take some 15,000, an absurd number in a stranger's
config.json any number."""

OF_TIMM = ("pretrained", "pretrained_cfg", "pretrained_cfg_overlay", "checkpoint_path", "cache_dir", "scriptable",
           "exportable", "no_jit")
"""Arguments of ``timm.create_model`` that are none of a model's."""


def shapes_of(name: str) -> nn.Module:
    """The model of that name on the meta device: its shapes, no weights, nothing downloaded.

    Raises:
        ScionError: nothing here knows the name without asking a hub.
    """
    return model_of(name, weights=False)


def model_of(name: str, weights: bool = True) -> nn.Module:
    """The model of that name, with its pretrained weights or (see `shapes_of`) without any.

    Raises:
        ScionError: nothing here knows the name, or its weights are not at hand.
    """
    if name.count(":") == 2:
        key, _, inner = name.rpartition(":")
        known = _domain_backbones()
        if key not in known:
            raise ScionError(f"no backbone {key}{nearest(key, known)}; there are {listed(known)}")
        return _built(known[key], inner, weights)
    if Path(name).is_dir():
        return _from_folder(Path(name), weights)
    knowing = {key: cls for key, cls in _domain_backbones().items() if name in _names_known(cls)}
    if len(knowing) > 1:
        choices = listed(f"{key}:{name}" for key in knowing)
        raise ScionError(f"several backbones are called {name!r}; write one of {choices}")
    if knowing:
        return _built(next(iter(knowing.values())), name, weights)
    return _from_timm(name, weights) or _from_transformers(name, weights)


def _domain_backbones() -> dict[str, Any]:
    """``audio:AST`` -> the class, for every backbone that an installed domain publishes."""
    import importlib
    import pkgutil

    from core.backbone import Backbone  # start-up time

    try:
        import domains
    except ImportError:
        return {}
    found: dict[str, Any] = {}
    for info in pkgutil.iter_modules(domains.__path__):
        try:
            module = importlib.import_module(f"domains.{info.name}")
            published = {name: getattr(module, name) for name in getattr(module, "__all__", ())}
        except ImportError:  # a domain whose libraries are not installed
            continue
        for name, cls in published.items():
            if isinstance(cls, type) and issubclass(cls, Backbone):
                found[f"{info.name}:{name}"] = cls
    return found


def _names_known(cls: type) -> list[str]:
    """The architectures that a domain's backbone can build without their weights: ``SHAPES`` in its file."""
    return list(getattr(sys.modules[cls.__module__], "SHAPES", ()))


def _built(cls: Any, name: str, weights: bool) -> nn.Module:
    return cls(name) if weights else _meta(lambda: cls(name, pretrained=False))


def _from_timm(name: str, weights: bool) -> nn.Module | None:
    try:
        import timm
    except ImportError:
        return None
    bare = name.removeprefix("hf-hub:").removeprefix("timm/")
    if timm.is_model(bare):
        if not weights:
            return _meta(lambda: timm.create_model(bare, pretrained=False))
        try:
            return timm.create_model(bare, pretrained=True).eval()
        except (OSError, RuntimeError) as error:
            raise ScionError(f"{name}: timm does not get its weights ({first_line(error)})") from None
    if bare != name:
        raise ScionError(f"timm has no model {bare!r}{nearest(bare.partition('.')[0], timm.list_models())}")
    return None


def _meta(make: Any) -> nn.Module:
    """What ``make`` builds, on the meta device: shapes without numbers."""
    from core.adapters.rehearsal import rehearsing  # start-up time

    with rehearsing(calls=MOST_CALLS):
        return make()


def _from_folder(folder: Path, weights: bool) -> nn.Module:
    """The model in a folder that timm or transformers wrote."""
    from core.json_types import check  # start-up time

    file = folder / "config.json"
    if not os.path.lexists(file):
        raise ScionError(f"no config.json in the folder {folder}")
    config = read_json(file)
    check(config, dict[str, Any], str(file))
    if "architecture" not in config or "model_type" in config:
        return _from_transformers(str(folder), weights)
    import timm  # as timm writes it

    arguments = config.get("model_args") or {}
    check(config["architecture"], str, str(file), "architecture")
    check(arguments, dict[str, Any], str(file), "model_args")
    if not timm.is_model(config["architecture"]):
        raise ScionError(f"{file}: timm has no model {config['architecture']!r}")
    for name in OF_TIMM:
        if name in arguments:
            raise ScionError(f"{file}: model_args.{name} is no argument of a model")
    arguments = {"num_classes": config.get("num_classes", 0), **arguments}
    try:
        hollow = _meta(lambda: timm.create_model(config["architecture"], pretrained=False, **arguments))
        if not weights:
            return hollow
        _check_size(hollow, folder)
        return timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
    except ScionError:
        raise
    except Exception as error:  # from any of a thousand architectures, or from what fits a file to it
        raise ScionError(f"{folder}: not a model that timm can build ({first_line(error)})") from None


def _check_size(hollow: nn.Module, folder: Path) -> None:
    """Refuse a config.json that asks for far more numbers than the files of weights beside it can hold."""
    numbers = sum(parameter.numel() for parameter in hollow.parameters())
    held = sum(file.stat().st_size for file in folder.iterdir() if file.is_file())
    if numbers > 4 * held:
        raise ScionError(f"{folder}/config.json: asks for {numbers:,} numbers, and the files there are {held:,} bytes")


def first_line(error: Exception) -> str:
    """The first line of what an exception says, cut where it is long; its name where it says nothing."""
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return one_line(lines[0][:150])


def _from_transformers(name: str, weights: bool) -> nn.Module:
    try:
        from transformers import AutoConfig, AutoModel
    except ImportError:
        raise ScionError(f"{name!r} is no model that is known here, and transformers is not installed") from None

    safe: dict[str, Any] = {"local_files_only": True, "trust_remote_code": False}
    try:
        config = AutoConfig.from_pretrained(name, **safe)
    except Exception as error:  # what is wrong with a config.json comes up in any line of the library
        if Path(name).is_dir() and "auto_map" in read_json(Path(name) / "config.json"):
            raise ScionError(f"{name}/config.json: asks to run code of its own (auto_map), which is never done; give a "
                             "model that transformers itself has") from None
        if Path(name).is_dir():
            raise ScionError(f"{name}/config.json: not a model that transformers knows "
                             f"({first_line(error)})") from None
        known = [inner for cls in _domain_backbones().values() for inner in _names_known(cls)]
        try:
            import timm

            known += timm.list_models()
        except ImportError:
            pass
        raise ScionError(f"{name!r} is not known{nearest(name, known)}: wanted a name of a domain's backbone, a timm "
                         "name, a folder with config.json, or a transformers id in the cache (nothing is downloaded "
                         "for this)") from None
    # The attention is said here: a config.json may name one that is fetched from a hub, and is code.
    hollow, kind = None, "sdpa"
    try:
        try:
            hollow = _meta(lambda: AutoModel.from_config(config, attn_implementation=kind, trust_remote_code=False))
        except (ValueError, ImportError):  # an architecture without that attention
            kind = "eager"
            hollow = _meta(lambda: AutoModel.from_config(config, attn_implementation=kind, trust_remote_code=False))
        if not weights:
            return hollow
        if Path(name).is_dir():
            _check_size(hollow, Path(name))
        return AutoModel.from_pretrained(name, attn_implementation=kind, weights_only=True, **safe)
    except ScionError:
        raise
    except Exception as error:
        if hollow is None:
            raise ScionError(f"{name}: not a model that transformers can build ({first_line(error)})") from None
        raise ScionError(f"{name}: its weights are not at hand ({first_line(error)})") from None
