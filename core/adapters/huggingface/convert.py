"""Both ways with Hugging Face peft: its adapter folders are read and written here, without importing it.

How peft writes one method is in `forms`, a file for each method; what all have in common is in `form`.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from core.adapters.filling import Content, load_tensors
from core.adapters.huggingface.form import BASE, CONFIG, MODEL, TENSORS, Inexpressible, LoRAShapedForm, PeftForm
from core.adapters.huggingface.forms import all_forms, form_of
from core.adapters.huggingface.wrapped import WrappedModel
from core.adapters.reading import open_adapter, refusal, restore
from core.adapters.rehearsal import hollow, is_small, reach, rehearsing, twin
from core.errors import ScionError, listed, one_line
from core.files import read_json, write_json
from core.graft import Carrier
from core.method import PEFTMethod, methods_on, uncompiled
from core.method.saving import RECORD
from core.tensors import kind_of, read_tensors, write_tensors

Place = WrappedModel  # its former name
VERSION = "0.21.2"
"""The version of peft whose way of writing is meant."""

LARGEST_CONFIG = 16 * 2**20
"""Bytes of a config."""


def to_peft(adapter: str | Path | PEFTMethod | Sequence[PEFTMethod], model: nn.Module, folder: str | Path) -> Path:
    """Write methods as an adapter that ``peft.PeftModel.from_pretrained(model, folder)`` opens.

    A method that peft does not have, or with options or places that it cannot express, is written as peft's LoRA (with
    a warning) if its change of the weights is of low rank, and refused otherwise.

    Args:
        adapter: a method attached to ``model``, several that peft can hold in one adapter, or a folder to load first.
        model: the backbone; peft's names are those inside the library's own model in it.
        folder: gets ``adapter_config.json`` and ``adapter_model.safetensors``.

    Returns:
        The folder.

    Raises:
        ScionError: peft cannot hold this; the message names the option or the wrapped.
    """
    if isinstance(adapter, (str, Path)):
        methods = _loaded(adapter, model)
        try:
            return to_peft(methods, model, folder)
        finally:
            for method in reversed(methods):
                method.remove()
    methods = [adapter] if isinstance(adapter, PEFTMethod) else list(adapter)
    root = uncompiled(model)
    for method in methods:
        if not method.attached or method.root is not root:
            raise ScionError(f"{method.name} is not attached to this {type(root).__name__}, or is merged")
        _check_alone(method)
    wrapped = WrappedModel(root)
    config, tensors = _written(methods, wrapped)
    head, saved = _head(wrapped, root)
    library_config = getattr(wrapped.model, "config", None)
    common: dict[str, Any] = {"peft_version": VERSION, "task_type": wrapped.task(), "inference_mode": True,
                              "bias": "none"}
    common["base_model_name_or_path"] = getattr(library_config, "_name_or_path", None)
    if head:
        common["modules_to_save"] = head
    # The form's keys come last: prompts and prefixes name a task of their own where the model's class says none.
    write_folder(folder, {**common, **config}, {**tensors, **saved})
    return Path(folder)


def _check_alone(method: PEFTMethod) -> None:
    """Refuse a method whose own tensors do not say all that it does."""
    if method.members:
        raise ScionError(f"{method.name}: a peft adapter holds one method, and this is {len(method.members)}; export "
                         "them one by one")
    for graft in method.grafts:
        carrier = Carrier.of(graft)
        if carrier is not None:
            other = next(iter(carrier.grafts))
            raise ScionError(f"{method.name}: {type(other).__name__} changes its tensors, which peft cannot do; export "
                             "the method without it")
        as_trained = graft.strength == 1 and graft.batch is None and graft.live
        if not as_trained:
            raise ScionError(f"{method.name}: {graft.site.name} is switched, weighed or routed, which peft cannot "
                             "hold")


def _written(methods: list[PEFTMethod], wrapped: WrappedModel) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Config and tensors of the methods, in their own form if peft has it, and as LoRA otherwise."""
    forms = list(dict.fromkeys(form_of(type(method)) for method in methods))
    try:
        form = _only_form(forms, methods)
        config, tensors = form.write(methods, wrapped)
        return {"peft_type": form.kind, **config}, tensors
    except Inexpressible as reason:
        # Methods that train the base's own tensors, or have no grafts, change more than grafts can say.
        if any(method.base_at_start or not method.grafts for method in methods):
            raise
        form = LoRAShapedForm()
        try:
            config, tensors = form.write([_SummedMethods(methods)], wrapped)  # type: ignore[list-item]
        except Inexpressible:
            raise reason from None  # why the method has no form of its own says more than why LoRA does not fit
        warnings.warn(f"{reason}; written as LoRA, which does the same", stacklevel=4)
        return {"peft_type": form.kind, **config}, tensors


def _only_form(forms: list[PeftForm | None], methods: list[PEFTMethod]) -> PeftForm:
    """The one form of all methods; refused where they have none or several, or train norms beside themselves."""
    for method in methods:
        if method.norm_names:
            raise Inexpressible(f"{method.name}: norms={list(method.norms)} are trained beside it, which a peft "
                                "adapter does not hold")
    form = forms[0]
    if len(forms) > 1 or form is None:
        names = listed(method.name for method in methods)
        if len(methods) == 1:
            raise Inexpressible(f"{names}: peft has no such method")
        raise Inexpressible(f"{names}: a peft adapter holds one method")
    return form


class _SummedMethods:
    """Several methods whose changes of low rank add up, as one: what `LoRAShapedForm` reads of a method."""

    def __init__(self, methods: list[PEFTMethod]) -> None:
        self.name = listed(method.name for method in methods)
        self.config: dict[str, Any] = {}
        self.grafts = [graft for method in methods for graft in method.grafts]


def _head(wrapped: WrappedModel, root: nn.Module) -> tuple[list[str], dict[str, Tensor]]:
    """The trained head inside the model: its modules' names, and its tensors."""
    inside = f"{wrapped.base}." if wrapped.base else ""
    heads = wrapped.anatomy.head_names()
    found: dict[str, Tensor] = {}
    for name, parameter in root.named_parameters():
        if name in heads and parameter.requires_grad and name.startswith(inside):
            found[name.removeprefix(inside)] = parameter.detach()
    # peft names the model's own module that the head is, or is in: the first part of the names.
    modules = list(dict.fromkeys(name.partition(".")[0] for name in found))
    return modules, {f"{MODEL}{name}": tensor for name, tensor in found.items()}


def write_folder(folder: str | Path, config: dict[str, Any], tensors: dict[str, Tensor]) -> None:
    """Write both files of a peft adapter, the config last: a folder without one is taken for no adapter."""
    target = Path(folder)
    try:
        target.mkdir(parents=True, exist_ok=True)
        write_tensors(target / TENSORS, tensors)
        write_json(target / CONFIG, dict(sorted(config.items())), indent=2)
    except OSError as error:
        raise ScionError(f"{folder} cannot be written ({error.strerror or error})") from None


def _loaded(source: str | Path, model: nn.Module) -> list[PEFTMethod]:
    """The methods in a folder, attached to ``model``."""
    if is_peft(source):
        found = from_peft(source, model)
        return found if isinstance(found, list) else [found]
    saved = open_adapter(source)
    return restore(saved.record, saved.tensors, model, where=str(source), check_whole=saved.check_whole)


def is_peft(source: str | Path) -> bool:
    """Whether ``source`` is a folder that peft wrote."""
    folder = Path(source)
    return os.path.isfile(folder / CONFIG) and not os.path.isfile(folder / RECORD)


def read_folder(folder: str | Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Config and tensors of a peft adapter."""
    path = Path(folder)
    if not os.path.lexists(path / CONFIG):
        raise ScionError(f"{folder}: no {CONFIG} here; give the folder of a peft adapter")
    config = read_json(path / CONFIG, LARGEST_CONFIG)
    if not isinstance(config, dict) or not isinstance(config.get("peft_type"), str):
        raise ScionError(f"{path / CONFIG}: damaged, or not the config of a peft adapter")
    pickled = path / "adapter_model.bin"
    if not os.path.isfile(path / TENSORS) and os.path.isfile(pickled):
        raise ScionError(f"{pickled}: a pickle, which can run anything when it is opened; save the "
                         f"adapter as {TENSORS} (save_pretrained of any recent peft does)")
    tensors = read_tensors(path / TENSORS)
    for name, tensor in tensors.items():
        if kind_of(tensor) != "float":
            raise ScionError(f"{path / TENSORS}: {one_line(name)} holds {tensor.dtype}, where numbers of a method are "
                             "wanted")
    return config, tensors


def method_for(config: dict[str, Any], where: str) -> tuple[type[PEFTMethod], PeftForm]:
    """The method that a config means."""
    for cls, form in all_forms().items():
        if form.kind == config["peft_type"] and form.matches(config):
            return cls, form
    known = sorted({form.kind for form in all_forms().values()})
    raise ScionError(f"{where}: peft_type {config['peft_type']} is no method here; those that are: "
                     f"{listed(known, 40)}")


def from_peft(folder: str | Path, model: nn.Module, name: str | None = None) -> Any:
    """Attach the methods that a peft adapter holds to ``model``.

    Args:
        folder: of ``PeftModel.save_pretrained``, with safetensors.
        model: the plain backbone on which peft would open it, or a module around or inside that.
        name: of the method; None is its class's.

    Returns:
        The method; the list of methods where modules differ in their options (``rank_pattern``), or where no roles and
        layers of one method are exactly the adapter's modules.

    Raises:
        ScionError: an option, a tensor or a module that has no counterpart here; the model is untouched then.
    """
    where = str(folder)
    config, given = read_folder(folder)
    cls, form = method_for(config, where)
    form.check(config, cls, f"{where}/{CONFIG}")
    root = uncompiled(model)
    done: list[PEFTMethod] = []
    try:
        form.refuse(config, where)
        _rehearse(form, cls, config, given, root, where, name)
        tensors = _build(form, cls, config, given, root, where, name, done)
        load_tensors(done, Content([], tensors), where)
    except Exception as error:
        # In reverse: each put back what it found, and a later one may stand on an earlier one's change.
        for method in reversed(done):
            method.remove()
        text = str(refusal(error))
        if where not in text:
            text = f"{where}: {text}"
        raise ScionError(text) from (None if isinstance(error, ScionError) else error)
    return done[0] if len(done) == 1 else done


def _build(form: PeftForm, cls: type[PEFTMethod], config: dict[str, Any], tensors: dict[str, Tensor], root: nn.Module,
           where: str, name: str | None, done: list[PEFTMethod]) -> dict[str, Tensor]:
    """Attach the methods that a folder means to ``root``, and list them in ``done`` as they are attached, for the
    caller to remove after an error. Returns their tensors, by their names in the root."""
    given = dict(tensors)
    before = {method.name for method in methods_on(root)}
    base = name or cls.__name__
    wrapped = WrappedModel(root, where)
    # Each step takes its tensors out of given: what is left in the end belongs to nothing.
    plans = form.read(config, given, wrapped)
    found = _read_head(given, wrapped, config)
    shared = _read_shared(given)
    if given:
        raise ScionError(f"{where}: holds {listed(map(one_line, given), 3)}, which is nothing that {cls.__name__} has")
    for number, plan in enumerate(plans, 1):
        label = base if len(plans) == 1 else f"{base}-{number}"
        if label in before:
            raise ScionError(f"{where}: a method called {label} is attached already; give this one another name")
        # The class's name is the default, and is not recorded as an argument where it is not given.
        named = {} if label == cls.__name__ else {"name": label}
        method = cls(**plan.arguments, **named)
        method.attach(root)
        done.append(method)
        found |= form.collect(method, plan, config, shared)
    return found


def _rehearse(form: PeftForm, cls: type[PEFTMethod], config: dict[str, Any], tensors: dict[str, Tensor],
              root: nn.Module, where: str, name: str | None) -> None:
    """Refuse what would be larger than the tensors of the file, without building it: see `core.adapters.rehearsal`."""
    size_keys = form.sizes()
    sizes = {key: value for key, value in config.items() if key in size_keys}
    if is_small(reach(sizes), root):
        return
    hollow_root = twin(root)
    if hollow_root is None:
        return
    count = len(tensors) + len(list(root.parameters()))
    done: list[PEFTMethod] = []
    with rehearsing(count):
        found = _build(form, cls, config, hollow(tensors), hollow_root, where, name, done)
        load_tensors(done, Content([], found), where, write=False)


def _read_head(given: dict[str, Tensor], wrapped: WrappedModel, config: dict[str, Any]) -> dict[str, Tensor]:
    """Take from ``given`` the tensors of ``modules_to_save``: heads of the root, by their names in it."""
    saved = config.get("modules_to_save") or []
    found: dict[str, Tensor] = {}
    for key in list(given):
        if not any(f".{module}." in key for module in saved):
            continue
        short = key.removeprefix(MODEL)
        name = f"{wrapped.base}.{short}".lstrip(".")
        if name not in wrapped.anatomy.head_names():
            raise ScionError(f"{wrapped.where}: modules_to_save holds {short}, which is no head of "
                             f"{type(wrapped.model).__name__}; load it onto the model with that head")
        found[name] = given.pop(key)
    return found


def _read_shared(given: dict[str, Tensor]) -> dict[str, Tensor]:
    """Take from ``given`` the tensors of no module, by their names after ``base_model.``."""
    shared: dict[str, Tensor] = {}
    for key in list(given):
        if key.startswith(BASE) and not key.startswith(MODEL):
            shared[key.removeprefix(BASE)] = given.pop(key)
    return shared
