"""What the subcommands do, apart from ``run``. Bad input raises ``ScionError``; a return value is an exit code."""

from __future__ import annotations

import json
import os
import shutil
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

from core.errors import ScionError, listed, nearest

if TYPE_CHECKING:
    from torch import Tensor, nn

    from core.anatomy import Anatomy, Site
    from core.data import DataModule
    from core.module import FineTuner

# ------------------------------------------------------------------------------------------------- questions


def methods(name: str | None, as_json: bool) -> int:
    """Print the table of all methods, or the card of one."""
    from core import report

    if as_json:
        print(json.dumps(report.card_json(name) if name else report.methods_json(), indent=1))
    else:
        print(report.card(name) if name else report.methods_table())
    return 0


def roles(model: str) -> int:
    """Print which roles a model has and which modules play them, from its shapes alone.

    Args:
        model: a name that one domain's backbone knows, ``audio:AST:nano`` where several do, a timm name, a folder with
            config.json, or a transformers id in the cache.
    """
    from core.anatomy import dissect

    anatomy = dissect(shapes_of(model))
    blocks = f"{len(anatomy.blocks)} blocks" if len(anatomy.blocks) != 1 else "1 block"
    print(f"{model}: {anatomy.family}, {blocks}")
    print("\n".join(role_table(anatomy)))
    return 0


def role_table(anatomy: Anatomy) -> list[str]:
    """One line for each role: number of sites, first and last module, shape, what stands there."""
    from core.anatomy import ROLES
    from core.report import aligned

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

    from core.backbone import Backbone

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
    import torch

    with torch.device("meta"):
        return make()


def _from_folder(folder: Path, weights: bool) -> nn.Module:
    file = folder / "config.json"
    try:
        config = json.loads(file.read_text())
    except FileNotFoundError:
        raise ScionError(f"no config.json in the folder {folder}") from None
    except ValueError:
        raise ScionError(f"{file} is not valid JSON") from None
    if "architecture" in config and "model_type" not in config:  # as timm writes it
        import timm

        arguments = {"num_classes": config.get("num_classes", 0), **config.get("model_args", {})}
        if not timm.is_model(config["architecture"]):
            raise ScionError(f"{file}: timm has no model {config['architecture']!r}")
        if weights:
            return timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
        return _meta(lambda: timm.create_model(config["architecture"], pretrained=False, **arguments))
    return _from_transformers(str(folder), weights)


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:150]


def _from_transformers(name: str, weights: bool) -> nn.Module:
    try:
        from transformers import AutoConfig, AutoModel
    except ImportError:
        raise ScionError(f"{name!r} is no model that is known here, and transformers is not installed") from None
    try:
        config = AutoConfig.from_pretrained(name, local_files_only=True)
    except (OSError, ValueError, KeyError) as error:
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
    if weights:
        try:
            return AutoModel.from_pretrained(name, local_files_only=True)
        except OSError as error:
            raise ScionError(f"{name}: its weights are not at hand ({_first_line(error)})") from None
    try:
        return _meta(lambda: AutoModel.from_config(config, attn_implementation="sdpa"))
    except (ValueError, ImportError):  # an architecture without that attention
        return _meta(lambda: AutoModel.from_config(config))


def describe(config: str, overrides: list[str], as_json: bool) -> int:
    """Print what each run that a configuration asks for will cost: parameters, FLOPs, bytes."""
    from core import cost
    from core.config import points
    from core.report import value_text
    from core.run import assemble

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


# ------------------------------------------------------------------------------------------------- merge


def merge(run: str, out: str) -> int:
    """Write the methods of a run into its backbone, and the plain backbone into a new folder ``out``.

    The folder holds the backbone as its own library saves it, ``head.safetensors`` and ``labels.json``.
    """
    from core.module import load_run

    target = _to_make(out)
    tuner = load_run(run)
    merge_methods(tuner)
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        scratch = Path(tempfile.mkdtemp(prefix=f".{target.name}.", dir=target.parent))
    except OSError as error:
        raise ScionError(f"{target.parent} cannot be written ({error.strerror})") from None
    try:
        save_plain(tuner, scratch)
        umask = os.umask(0)
        os.umask(umask)
        scratch.chmod(0o777 & ~umask)
        os.replace(scratch, target)
    except BaseException:
        shutil.rmtree(scratch, ignore_errors=True)
        raise
    print(f"{out}: a plain {type(tuner.backbone.model).__name__}, head.safetensors and labels.json")
    return 0


def _to_make(folder: str) -> Path:
    target = Path(folder)
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise ScionError(f"{folder} exists and is not empty; give a folder to make")
    return target


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
    from safetensors.torch import save_file, save_model

    model: Any = tuner.backbone.model
    if hasattr(model, "save_pretrained"):
        model.save_pretrained(folder)
    elif hasattr(model, "pretrained_cfg"):  # loads by timm.create_model("local-dir:FOLDER")
        from timm.models import save_for_hf

        save_for_hf(model, str(folder), safe_serialization=True)
    else:
        save_model(model, str(folder / "model.safetensors"), metadata={"format": "pt"})
        record = {"class": f"{type(model).__module__}.{type(model).__qualname__}"}
        (folder / "config.json").write_text(json.dumps(record, indent=1) + "\n")
    head = tuner.task.plain_head()
    tensors = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in head.state_dict().items()}
    save_file(tensors, folder / "head.safetensors", metadata={"format": "pt"})
    labels = {"classes": list(getattr(tuner.task, "classes", [])), "multilabel": bool(tuner.hparams.get("multilabel")),
              "task": type(tuner.task).__name__, "head": str(head), "features": int(tuner.backbone.dim)}
    (folder / "labels.json").write_text(json.dumps(labels, indent=1) + "\n")


# ------------------------------------------------------------------------------------------------- export, import


def export(adapter: str, out: str, model: str | None) -> int:
    """Write a run's or an adapter's methods into a new folder ``out``, as Hugging Face peft writes them."""
    from core.artifact import load_adapter, read_adapter
    from core.interop import CONFIG, to_peft
    from core.module import load_run

    target = _to_make(out)
    if model is not None:
        backbone: Any = model_of(model)
        loaded = load_adapter(adapter, backbone)
        methods = loaded if isinstance(loaded, list) else [loaded]
        inner = backbone
    else:
        if not (read_adapter(adapter)[0].get("model") or {}).get("backbone"):
            raise ScionError(f"{adapter}: does not say which backbone it is for; name it with --model")
        tuner = load_run(adapter)
        backbone, methods, inner = tuner.backbone, tuner.methods, tuner.backbone.model
    to_peft(methods, backbone, target)
    kind = json.loads((target / CONFIG).read_text())["peft_type"]
    print(f"{out}: a peft adapter ({kind}) for {type(inner).__name__}; a task's head is no part of it")
    return 0


def import_(folder: str, out: str, model: str) -> int:
    """Read an adapter folder of Hugging Face peft for ``model``, and save it as an adapter in a new folder ``out``."""
    from core.artifact import save_adapter
    from core.interop import from_peft

    target = _to_make(out)
    loaded = from_peft(folder, model_of(model))
    methods = loaded if isinstance(loaded, list) else [loaded]
    save_adapter(methods, target)
    print(f"{out}: {', '.join(map(repr, methods))}, for {model}")
    return 0


# ------------------------------------------------------------------------------------------------- predict


def predict(run: str, files: list[str], as_json: bool) -> int:
    """Print a label and a score for each file, and for each in a folder; 2 if one could not be read, the others are
    labelled all the same."""
    import torch
    from tqdm import tqdm

    from core.module import load_run
    from core.pictures import caption
    from core.report import MOST

    if not files:
        raise ScionError("no files given")
    tuner = load_run(run, "cuda" if torch.cuda.is_available() else "cpu")
    data = data_of(run)
    files = [name for file in files for name in _inside(file, data)]
    if tuner.task.compares:
        return _compare(run, tuner, data, files, as_json)
    size = max(1, min(data.batch_size, len(files)))
    results: list[dict[str, Any]] = []
    shown: list[tuple[Tensor, str]] = []
    with tqdm(total=len(files), unit="file", disable=len(files) <= 8 or not sys.stderr.isatty(),
              file=sys.stderr) as bar, torch.inference_mode():
        for start in range(0, len(files), size):
            inputs, readable = [], []
            chunk: list[dict[str, Any]] = []
            for file in files[start:start + size]:
                entry: dict[str, Any] = {"file": file}
                chunk.append(entry)
                try:
                    inputs.append(data.read(file))
                    readable.append(entry)
                except (ScionError, OSError) as error:
                    text = " ".join(str(error).split())
                    entry["error"] = text if file in text else f"{file}: {text}"
                    bar.write(entry["error"], file=sys.stderr)
            if inputs:
                outputs = tuner(torch.stack(inputs).to(next(tuner.parameters()).device))
                for entry, prediction in zip(readable, tuner.task.predict(outputs), strict=True):
                    entry.update(prediction)
            shown += [(one, f"{caption(entry)}\n{Path(entry['file']).name}") for one, entry in zip(
                inputs, readable, strict=True)][:MOST - len(shown)]
            for entry in readable if not as_json else []:
                label = ", ".join(entry["labels"]) or "-" if "labels" in entry else entry["label"]
                bar.write(f"{entry['file']}\t{label}\t{entry['score']:.4f}", file=sys.stdout)
            results += chunk
            bar.update(len(chunk))
    if as_json:
        print(json.dumps(results, indent=1))
    _show(run, data, shown)
    return 2 if any("error" in entry for entry in results) else 0


def _show(run: str, data: DataModule, shown: list[tuple[Tensor, str]], columns: int = 8) -> None:
    """The picture of the first files, in the run's folder."""
    from core.pictures import of_files

    file = Path(run) / "predictions.png"
    try:
        if of_files(data, [one for one, _ in shown], [text for _, text in shown], file, columns=columns):
            print(f"pictures: {file}", file=sys.stderr)
    except OSError as error:  # what was asked for is printed already
        print(f"{file}: cannot be written ({error.strerror})", file=sys.stderr)


def _compare(run: str, tuner: FineTuner, data: DataModule, files: list[str], as_json: bool) -> int:
    """Print for each file those of the others that are nearest; 2 if one could not be read."""
    import torch
    from tqdm import tqdm

    from core.tasks.embedding import SHOWN, neighbours

    inputs, readable, vectors, results = [], [], [], []
    with torch.inference_mode():
        for file in tqdm(files, unit="file", disable=len(files) <= 8 or not sys.stderr.isatty(), file=sys.stderr):
            results.append({"file": file})
            try:
                one = data.read(file)
            except (ScionError, OSError) as error:
                text = " ".join(str(error).split())
                results[-1]["error"] = text if file in text else f"{file}: {text}"
                tqdm.write(results[-1]["error"], file=sys.stderr)
                continue
            vectors.append(tuner(one[None].to(next(tuner.parameters()).device))[0].cpu())
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
            print("\t".join([entry["file"], *(f"{one['file']} {one['score']:.4f}" for one in entry["neighbours"])]))
        if row < SHOWN[0]:
            shown += [(inputs[row], f"query\n{Path(entry['file']).name}"), *(
                (inputs[i], f"{value:.2f}\n{Path(readable[i]['file']).name}")
                for i, value in zip(near, score, strict=True))]
    if as_json:
        print(json.dumps(results, indent=1))
    _show(run, data, shown, columns=1 + len(places[0]))
    return 2 if any("error" in entry for entry in results) else 0


def _inside(file: str, data: DataModule) -> list[str]:
    """The files that a name on the command line stands for: itself, or what a folder holds. An empty folder stays, so
    that it is named as what cannot be read."""
    found = [str(inner) for inner in data.files(Path(file))] if Path(file).is_dir() else []
    return found or [file]


def data_of(run: str) -> DataModule:
    """The datamodule of a run, ready to ``read`` files: from its config.yaml, and what it saved of the data."""
    from core.config import make, read
    from core.data import DataModule

    file = Path(run) / "config.yaml"
    if not file.is_file():
        raise ScionError(f"{file}: missing; predict needs a whole run folder, not an adapter alone")
    config = read(file)
    part = config.get("data")
    if not isinstance(part, dict) or "class_path" not in part:
        raise ScionError(f"{file}: no data section with a class_path")
    state = Path(run) / "data_state.json"
    data: DataModule = make({"init_args": {}, **part}, "data", str(config.get("domain") or ""), DataModule)
    if state.is_file():
        try:
            data.load_state(json.loads(state.read_text()))
        except (ValueError, KeyError, TypeError) as error:
            raise ScionError(f"{state}: damaged ({error})") from None
    return data
