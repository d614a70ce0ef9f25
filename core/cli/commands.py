"""What the subcommands do, apart from ``run``. Bad input raises ``ScionError``; a return value is an exit code.

A run's folder and an adapter may come from a stranger: nothing that they name is imported, but for what Scion and the
installed domains publish.
"""

from __future__ import annotations

import contextlib
import functools
import json
import math
import os
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from core.errors import ScionError, listed, nearest, one_line, printable
from core.files import check_regular, read_json

if TYPE_CHECKING:
    from torch import Tensor, nn

    from core.anatomy import Anatomy, Site
    from core.data import DataModule
    from core.training.finetuner import FineTuner

def says_what_failed(command: Callable[..., int]) -> Callable[..., int]:
    """The command, with an error of the system told as bad input is: a full disk, a folder that cannot be read."""

    @functools.wraps(command)
    def run(*arguments: Any, **options: Any) -> int:
        try:
            code = command(*arguments, **options)
            sys.stdout.flush()
            return code
        except BrokenPipeError:  # whoever reads has seen enough
            raise
        except OSError as error:
            with contextlib.suppress(OSError, ValueError):  # what could not be printed is not tried again at the end
                sys.stdout.flush()
            name = printable(error.filename) + ": " if error.filename is not None else ""
            raise ScionError(f"{name}{error.strerror or one_line(error)}") from error

    return run


# ------------------------------------------------------------------------------------------------- questions


@says_what_failed
def methods(name: str | None, as_json: bool, **filters: Any) -> int:
    """Print the table of all methods, or the card of one; ``filters`` are those of `core.report.methods_json`."""
    from core import report  # start-up time

    if as_json:
        print(json.dumps(report.card_json(name) if name else report.methods_json(**filters), indent=1))
    else:
        print(report.card(name) if name else report.methods_table(**filters))
    return 0


@says_what_failed
def roles(model: str) -> int:
    """Print which roles a model has and which modules play them, from its shapes alone.

    Args:
        model: a name that one domain's backbone knows, ``audio:AST:nano`` where several do, a timm name, a folder with
            config.json, or a transformers id in the cache.
    """
    from core.anatomy import dissect  # start-up time

    anatomy = dissect(shapes_of(model))
    blocks = f"{len(anatomy.blocks)} blocks" if len(anatomy.blocks) != 1 else "1 block"
    print(f"{model}: {anatomy.family}, {blocks}")
    print("\n".join(role_table(anatomy)))
    return 0


def role_table(anatomy: Anatomy) -> list[str]:
    """One line for each role: number of sites, first and last module, shape, what stands there."""
    from core.anatomy import ROLES  # start-up time
    from core.report import aligned  # start-up time

    places: dict[str, list[Site]] = {}
    for site in anatomy.all_sites():
        places.setdefault(site.role, []).append(site)
    body = []
    for role in sorted(places, key=lambda role: [*ROLES, role].index(role)):
        sites = places[role]
        shapes = list(dict.fromkeys(map(_shape, sites)))
        body.append([role, str(len(sites)), sites[0].path or "(itself)", sites[-1].path if len(sites) > 1 else "",
                     shapes[0] if len(shapes) == 1 else f"{shapes[0]} .. {shapes[-1]}", ROLES.get(role, "")])
    return aligned(["role", "sites", "first module", "last module", "shape", "what stands there"], body, left=6)


def _shape(site: Site) -> str:
    if site.kind == "conv":
        return str(list(site.full_weight.shape))
    if site.kind != "module":
        return f"[{site.out_features}, {site.in_features}]"
    if site.role == "attend" and site.heads is not None:
        keys = f" ({site.heads.key} of keys)" if site.heads.key != site.heads.query else ""
        return f"{site.heads.query} heads{keys} x {site.heads.width}"
    weight = getattr(site.module, "weight", None)
    if weight is not None:
        return str(list(weight.shape))
    return f"hidden {site.width}" if site.width else type(site.module).__name__


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
        domain, class_name, inner = name.split(":")
        known = _domain_backbones()
        if f"{domain}:{class_name}" not in known:
            raise ScionError(f"no backbone {domain}:{class_name}{nearest(f'{domain}:{class_name}', known)}; "
                             f"there are {listed(known)}")
        return _built(known[f"{domain}:{class_name}"], inner, weights)
    if Path(name).is_dir():
        return _from_folder(Path(name), weights)
    knowing = {key: cls for key, cls in _domain_backbones().items() if name in _names_known(cls)}
    if len(knowing) > 1:
        raise ScionError(f"several backbones are called {name!r}; write one of "
                         f"{listed(f'{key}:{name}' for key in knowing)}")
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
        found |= {f"{info.name}:{name}": cls for name, cls in published.items()
                  if isinstance(cls, type) and issubclass(cls, Backbone)}
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
            raise ScionError(f"{name}: timm does not get its weights ({_first_line(error)})") from None
    if bare != name:
        raise ScionError(f"timm has no model {bare!r}{nearest(bare.partition('.')[0], timm.list_models())}")
    return None


def _meta(make: Any) -> nn.Module:
    from core.adapters.rehearsal import rehearsing  # start-up time

    with rehearsing(calls=MOST_CALLS):
        return make()


MOST_CALLS = 30_000
"""Calls of torch that building a backbone may take: the largest ones take some 15,000, an absurd number in a stranger's
config.json any number."""
OF_TIMM = ("pretrained", "pretrained_cfg", "pretrained_cfg_overlay", "checkpoint_path", "cache_dir", "scriptable",
           "exportable", "no_jit")
"""Arguments of ``timm.create_model`` that are none of a model's."""


def _from_folder(folder: Path, weights: bool) -> nn.Module:
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
        raise ScionError(f"{folder}: not a model that timm can build ({_first_line(error)})") from None


def _check_size(hollow: nn.Module, folder: Path) -> None:
    """Refuse a config.json that asks for far more numbers than the files of weights beside it can hold."""
    numbers = sum(parameter.numel() for parameter in hollow.parameters())
    held = sum(file.stat().st_size for file in folder.iterdir() if file.is_file())
    if numbers > 4 * held:
        raise ScionError(f"{folder}/config.json: asks for {numbers:,} numbers, and the files there are {held:,} bytes")


def _first_line(error: Exception) -> str:
    return one_line((str(error).strip().splitlines() or [type(error).__name__])[0][:150])


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
                             f"({_first_line(error)})") from None
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
            raise ScionError(f"{name}: not a model that transformers can build ({_first_line(error)})") from None
        raise ScionError(f"{name}: its weights are not at hand ({_first_line(error)})") from None


@says_what_failed
def describe(config: str, overrides: list[str], as_json: bool, trust: bool = False) -> int:
    """Print what each run that a configuration asks for will cost: parameters, FLOPs, bytes.

    Args:
        config: a configuration, which may name any class: it is code. That of a run's folder may not.
        overrides: what the command line changes in it.
        as_json: print JSON.
        trust: whether a run's configuration may name any class too.
    """
    from core import cost  # start-up time
    from core.config import points  # start-up time
    from core.report import value_text  # start-up time
    from core.training.run import assemble  # start-up time

    if not trust:
        _check_published(config)
    found = points(config, overrides)
    records: list[dict[str, Any]] = []
    for point in found:
        assembly = assemble(point, read=False)
        for method in assembly.methods:
            method.attach(assembly.tuner.backbone)
        assembly.tuner.fit_head()
        assembly.tuner.fit_aside()
        batch = assembly.data.example(assembly.data.batch_size)
        counted = cost.describe(assembly.tuner.train(), batch)
        axes = {axis: value_text(value) for axis, value in point.axes.items()}
        if as_json:
            records.append({"axes": axes, "batch": list(batch.shape), **counted.to_dict()})
        else:
            head = ", ".join(f"{axis}={value}" for axis, value in axes.items())
            print(f"{head + ': ' if head else ''}one step on a batch {list(batch.shape)}")
            if assembly.tuner.aside:
                print("training runs the backbone once more for what stands beside it; FLOPs and kept bytes leave it "
                      "out")
            print(counted, end="\n\n" if point is not found[-1] else "\n")
    if as_json:
        print(json.dumps(records if len(records) > 1 or found[0].axes else records[0], indent=1, default=str))
    return 0


def _check_published(config: str) -> None:
    """Refuse the configuration in a run's folder where it names a class by its full path."""
    from core.config import read  # start-up time

    file = Path(config)
    if not (file.name == "config.yaml" and os.path.lexists(file.parent / "metrics.json") and file.is_file()):
        return
    raw = read(file)
    for name in _classes_named(raw):
        if "." in name:
            raise ScionError(f"{file}: {printable(name)} is a full path, and the configuration of a run imports none; "
                             "pass --trust if the run is your own")
    domain = raw.get("domain")
    if domain and not str(domain).isidentifier():
        raise ScionError(f"{file}: domain {printable(domain)} is no plain word")


def _classes_named(node: Any, key: str = "") -> Iterator[str]:
    """Everything in a configuration that stands where a class can stand."""
    if isinstance(node, dict):
        for name, value in node.items():
            yield from _classes_named(value, str(name).rpartition(".")[2])
    elif isinstance(node, list):
        for value in node:
            yield from _classes_named(value, key)
    elif isinstance(node, str) and key in ("class", "class_path", "backbone", "task", "data", "peft", "methods"):
        yield node


# ------------------------------------------------------------------------------------------------- merge


@says_what_failed
def merge(run: str, out: str) -> int:
    """Write the methods of a run into its backbone, and the plain backbone into a new folder ``out``.

    The folder holds the backbone as its own library saves it, ``head.safetensors`` and ``labels.json``.
    """
    from core.training.load_run import load_run  # start-up time

    target = check_free(out)
    tuner = load_run(run)
    merge_methods(tuner)
    with new_folder(target) as scratch:
        save_plain(tuner, scratch)
    print(f"{printable(out)}: a plain {type(tuner.backbone.model).__name__}, head.safetensors and labels.json")
    return 0


def check_free(folder: str) -> Path:
    """The path of a folder to make: there is nothing, or an empty folder.

    Raises:
        ScionError: something is there.
    """
    target = Path(folder)
    if os.path.isdir(target):
        if any(target.iterdir()):
            raise ScionError(f"{folder} exists and is not empty; give a folder to make")
    elif os.path.lexists(target):
        what = "a link that leads nowhere" if target.is_symlink() else "a file"
        raise ScionError(f"{folder} is {what}; give a folder to make")
    return target


@contextlib.contextmanager
def new_folder(target: Path) -> Iterator[Path]:
    """A folder to write into, which becomes ``target`` when everything is written, and leaves nothing otherwise.

    Args:
        target: as `check_free` gives it; an empty folder that is there stays, and gets the files.

    Raises:
        ScionError: it cannot be written.
    """
    from safetensors import SafetensorError

    made: list[Path] = []
    is_there = os.path.isdir(target)
    scratch: Path | None = None
    placed: list[Path] = []
    try:
        missing = [target] if is_there else [folder for folder in target.absolute().parents if not folder.exists()]
        for folder in () if is_there else reversed(missing):
            folder.mkdir()
            made.append(folder)
        beside = target if is_there else target.absolute().parent
        scratch = Path(tempfile.mkdtemp(prefix=".writing-", dir=beside))
        yield scratch
        umask = os.umask(0)
        os.umask(umask)
        if is_there:
            for file in sorted(scratch.iterdir()):
                os.replace(file, target / file.name)
                placed.append(target / file.name)
            scratch.rmdir()
        else:
            scratch.chmod(0o777 & ~umask)
            os.replace(scratch, target.absolute())
    except BaseException as error:
        for file in placed:
            file.unlink(missing_ok=True)
        if scratch is not None:
            shutil.rmtree(scratch, ignore_errors=True)
        for folder in reversed(made):
            with contextlib.suppress(OSError):
                folder.rmdir()
        if isinstance(error, ScionError):
            raise ScionError(str(error).replace(str(scratch), str(target))) from error
        if isinstance(error, OSError | SafetensorError):
            reason = getattr(error, "strerror", None) or one_line(error)
            raise ScionError(f"{target} cannot be written ({reason})") from None
        raise


def merge_methods(tuner: FineTuner) -> None:
    """Merge all methods of a run, in their order of attachment: what came later was applied to what came before it.

    Raises:
        ScionError: a method cannot be merged (the message names all of them), or the merged weight does not do what the
            stack did.
    """
    methods = tuner.methods
    stuck = [method for method in methods if not method.mergeable]
    if stuck:
        raise ScionError(f"{listed(method.name for method in stuck)} cannot be written into the weights "
                         f"({'; '.join(dict.fromkeys(method.inference_cost for method in stuck))})")
    sites = list({site.path: site for method in methods for site in (graft.site for graft in method.grafts)}.values())
    before = {site.path: _probe(site) for site in sites}
    for method in methods:
        method.merge()
    for site in sites:
        was, now = before[site.path], _probe(site)
        if was is not None and now is not None and float((now - was).abs().max()) > 1e-3 * float(was.abs().max()):
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


def save_plain(tuner: FineTuner, folder: Path) -> None:
    """The library's model as the library saves it, and the task's head beside it."""
    from safetensors.torch import save_file

    save_library_model(tuner.backbone.model, folder)
    head = tuner.task.plain_head()
    tensors = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in head.state_dict().items()}
    save_file(tensors, folder / "head.safetensors", metadata={"format": "pt"})
    labels = {"classes": list(getattr(tuner.task, "classes", [])), "multilabel": bool(tuner.hparams.get("multilabel")),
              "task": type(tuner.task).__name__, "head": str(head), "features": int(tuner.backbone.dim)}
    (folder / "labels.json").write_text(json.dumps(labels, indent=1) + "\n")


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


# ------------------------------------------------------------------------------------------------- export, import


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


# ------------------------------------------------------------------------------------------------- predict


@says_what_failed
def predict(run: str, files: list[str], as_json: bool, trust: bool = False) -> int:
    """Print a label and a score for each file, and for each in a folder; 2 if one could not be read, the others are
    labelled all the same.

    Args:
        run: folder of a finished run.
        files: to label, or folders of them.
        as_json: print JSON.
        trust: whether the run's configuration may name a data class by its full path, which runs that module.
    """
    import torch
    from tqdm import tqdm

    from core.report import MOST  # start-up time
    from core.training.gallery import caption  # start-up time
    from core.training.load_run import load_run  # start-up time

    if not files:
        raise ScionError("no files given")
    tuner = load_run(run, "cuda" if torch.cuda.is_available() else "cpu")
    data = data_of(run, trust)
    _check_agreement(run, tuner, data)
    files = [name for file in files for name in _inside(file, data)]
    if tuner.task.compares:
        return _compare(run, tuner, data, files, as_json)
    size = max(1, min(data.batch_size, len(files)))
    results: list[dict[str, Any]] = []
    shown: list[tuple[Tensor, str]] = []
    with tqdm(total=len(files), unit="file", disable=len(files) <= 8 or not sys.stderr.isatty(),
              file=sys.stderr) as bar:

        def fail(entry: dict[str, Any], reason: object) -> None:
            entry["error"] = _failure(entry["file"], reason)
            bar.write(entry["error"], file=sys.stderr)

        for start in range(0, len(files), size):
            inputs, readable = [], []
            chunk: list[dict[str, Any]] = [{"file": file} for file in files[start:start + size]]
            for entry in chunk:
                one = _input(entry["file"], data)
                if isinstance(one, Exception):
                    fail(entry, one)
                    continue
                inputs.append(one)
                readable.append(entry)
            outputs = _outputs(tuner, inputs) if inputs else []
            for entry, one, output in zip(readable, inputs, outputs, strict=True):
                [prediction] = tuner.task.predict(output[None])
                if not (bool(output.isfinite().all()) and math.isfinite(prediction["score"])):
                    fail(entry, "the model's outputs are not finite")
                    continue
                entry.update(prediction)
                if len(shown) < MOST:
                    shown.append((one, f"{caption(entry)}\n{Path(entry['file']).name}"))
                if not as_json:
                    label = ", ".join(entry["labels"]) or "-" if "labels" in entry else entry["label"]
                    bar.write(f"{printable(entry['file'])}\t{printable(label)}\t{entry['score']:.4f}", file=sys.stdout)
            results += chunk
            bar.update(len(chunk))
    if as_json:
        print(json.dumps(results, indent=1, allow_nan=False))
    _show(run, data, shown)
    return 2 if any("error" in entry for entry in results) else 0


def _check_agreement(run: str, tuner: FineTuner, data: DataModule) -> None:
    """Refuse data of other sizes than the backbone's, which takes them from the data where it is not told them."""
    from core.record import signature  # start-up time

    if not os.path.lexists(Path(run) / "data_state.json"):
        return
    for name in signature(type(tuner.backbone)).parameters:
        here, there = getattr(data, name, None), getattr(tuner.backbone, name, None)
        if isinstance(here, int) and isinstance(there, int) and here != there:
            raise ScionError(f"{run}: the data have {name} {here}, the backbone was trained with {there}")


def _input(file: str, data: DataModule) -> Tensor | Exception:
    """A file as the model reads it, or why that cannot be."""
    try:
        check_regular(file)
        one = data.read(file)
        if one.is_floating_point() and not bool(one.isfinite().all()):
            raise ScionError(f"{file}: holds values that are not finite")
        return one
    except Exception as error:  # whatever a decoder says of a file, the others are labelled all the same
        return error


def _outputs(tuner: FineTuner, inputs: list[Tensor]) -> Tensor:
    """What the model gives for these inputs, on the CPU."""
    import torch

    try:
        with torch.inference_mode():
            return tuner(torch.stack(inputs).to(next(tuner.parameters()).device)).cpu()
    except ScionError:
        raise
    except Exception as error:  # inputs of another shape, memory that is not there
        raise ScionError(f"the model cannot compute this ({_first_line(error)})") from error


def _failure(file: str, reason: object) -> str:
    """Why a file has no prediction, in one line with its name."""
    text, name = one_line(reason) or type(reason).__name__, printable(file)
    return text if name in text else f"{name}: {text}"


def _show(run: str, data: DataModule, shown: list[tuple[Tensor, str]], columns: int = 8) -> None:
    """The picture of the first files, in the run's folder."""
    from core.training.gallery import of_files  # start-up time

    file = Path(run) / "predictions.png"
    texts = ["\n".join(map(printable, text.split("\n"))) for _, text in shown]
    try:
        if of_files(data, [one for one, _ in shown], texts, file, columns=columns):
            print(f"pictures: {printable(file)}", file=sys.stderr)
    except OSError as error:  # what was asked for is printed already
        print(f"{printable(file)}: cannot be written ({error.strerror})", file=sys.stderr)


def _compare(run: str, tuner: FineTuner, data: DataModule, files: list[str], as_json: bool) -> int:
    """Print for each file those of the others that are nearest; 2 if one could not be read."""
    import torch
    from tqdm import tqdm

    from core.tasks.embedding import SHOWN, neighbours  # start-up time

    inputs, readable, vectors, results = [], [], [], []
    for file in tqdm(files, unit="file", disable=len(files) <= 8 or not sys.stderr.isatty(), file=sys.stderr):
        results.append({"file": file})
        one = _input(file, data)
        vector = one if isinstance(one, Exception) else _outputs(tuner, [one])[0]
        if isinstance(vector, Exception) or not bool(vector.isfinite().all()):
            reason = vector if isinstance(vector, Exception) else "the model's outputs are not finite"
            results[-1]["error"] = _failure(file, reason)
            tqdm.write(results[-1]["error"], file=sys.stderr)
            continue
        vectors.append(vector)
        readable.append(results[-1])
        inputs.append(one)
    if len(vectors) < 2:
        raise ScionError(f"{len(vectors)} readable file{'s' * (len(vectors) != 1)}; this run compares files with each "
                         "other, so at least two are wanted")
    places, scores = neighbours(torch.stack(vectors), SHOWN[1])
    shown: list[tuple[Tensor, str]] = []
    for row, (entry, near, score) in enumerate(zip(readable, places.tolist(), scores.tolist(), strict=True)):
        entry["neighbours"] = [{"file": readable[i]["file"], "score": round(value, 4)}
                               for i, value in zip(near, score, strict=True)]
        if not as_json:
            print("\t".join([printable(entry["file"]), *(f"{printable(one['file'])} {one['score']:.4f}"
                                                         for one in entry["neighbours"])]))
        if row < SHOWN[0]:
            shown += [(inputs[row], f"query\n{Path(entry['file']).name}"), *(
                (inputs[i], f"{value:.2f}\n{Path(readable[i]['file']).name}")
                for i, value in zip(near, score, strict=True))]
    if as_json:
        print(json.dumps(results, indent=1, allow_nan=False))
    _show(run, data, shown, columns=1 + len(places[0]))
    return 2 if any("error" in entry for entry in results) else 0


def _inside(file: str, data: DataModule) -> list[str]:
    """The files that a name on the command line stands for: itself, or what a folder holds. An empty folder stays, so
    that it is named as what cannot be read."""
    try:
        found = [str(inner) for inner in data.files(Path(file))] if os.path.isdir(file) else []
    except OSError:  # told when it is read
        found = []
    return found or [file]


LARGEST_SIZE = 1_000_000
"""What a number in the data section of a run may be, at most: a stranger's may ask for any memory."""


def data_of(run: str, trust: bool = False) -> DataModule:
    """The datamodule of a run, ready to ``read`` files: from its config.yaml, and what it saved of the data.

    Args:
        run: the run's folder.
        trust: whether a class may be named by its full path, so that its module is imported.

    Raises:
        ScionError: no such folder, something in it is damaged, or a class is none that an installed domain publishes.
    """
    from core.config import make, read  # start-up time
    from core.data import DataModule  # start-up time
    from core.json_types import check  # start-up time

    file = Path(run) / "config.yaml"
    if not os.path.isfile(file):
        raise ScionError(f"{file}: missing; predict needs a whole run folder, not an adapter alone")
    config = read(file)
    part, domain = config.get("data"), config.get("domain") or ""
    if not isinstance(part, dict) or "class_path" not in part:
        raise ScionError(f"{file}: no data section with a class_path")
    check(part["class_path"], str, str(file), "data.class_path")
    check(part.get("init_args", {}), dict[str, Any], str(file), "data.init_args")
    check(domain, str, str(file), "domain")
    if "." in part["class_path"] and not trust:
        raise ScionError(f"{file}: data.class_path {printable(part['class_path'])} is a full path, and predict imports "
                         "what the installed domains publish alone; pass --trust if the run is your own")
    if domain and not domain.isidentifier():
        raise ScionError(f"{file}: domain {printable(domain)} is no plain word")
    for name, value in part.get("init_args", {}).items():
        if isinstance(value, int) and abs(value) > LARGEST_SIZE and name != "seed":
            raise ScionError(f"{file}: data.{name} {value} is more than any data need")
    data: DataModule = make({"init_args": {}, **part}, "data", domain, DataModule)
    state = Path(run) / "data_state.json"
    if os.path.lexists(state):
        saved = read_json(state)
        try:
            check(saved, dict[str, Any], str(state))
            data.load_state(saved)
        except ScionError:
            raise
        except Exception as error:  # it knows what it has saved, and nothing else
            raise ScionError(f"{state}: damaged ({type(error).__name__}: {_first_line(error)})") from None
    return data
