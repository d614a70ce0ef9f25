"""Adapters, checkpoints, patches and peft folders from a stranger: one line, at once, and the model is as it was."""

from __future__ import annotations

import collections
import io
import json
import os
import pickle
import signal
import struct
import threading
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.utils._python_dispatch import TorchDispatchMode

from core import load_adapter
from core.adapters.huggingface.convert import CONFIG, to_peft
from core.adapters.huggingface.convert import TENSORS as THEIR_TENSORS
from core.adapters.load import RECORD, TENSORS, save_adapter
from core.errors import ScionError
from core.method import PEFTMethod
from core.patch import Patch
from core.peft import LoRA, Quantize  # type: ignore[attr-defined]
from core.record import types_of
from tests.methods import METHODS, Cell
from tests.models import make
from tests.toolkit import Plain, differences, randomize, same, snapshot, trace

LARGE = 2**27
"""Numbers that nothing on a tiny model may ask for."""


class Spy(TorchDispatchMode):
    """Stops a tensor of memory before it is made, and remembers that it was asked for."""

    def __init__(self) -> None:
        super().__init__()
        self.asked: list[Any] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        sizes = args[0] if args and isinstance(args[0], (list, tuple)) else [args[0]] if args else []
        device = kwargs.get("device")
        if all(isinstance(size, int) for size in sizes) and (device is None or torch.device(device).type != "meta"):
            numbers = 1
            for size in sizes:
                numbers *= size
            if numbers > LARGE:
                self.asked.append((func, sizes))
                raise MemoryError(str(sizes))
        return func(*args, **kwargs)


@contextmanager
def in_time(seconds: float = 60) -> Iterator[None]:
    """A hang fails instead of staying for ever."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def stop(*_: Any) -> None:
        raise KeyboardInterrupt(f"not done in {seconds} seconds")

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def refusal(act: Callable[[], Any]) -> str:
    """The one line in which ``act`` is refused, without large memory."""
    with in_time(), Spy() as spy, pytest.raises(ScionError) as caught:
        act()
    message = str(caught.value)
    assert not spy.asked, spy.asked
    assert message and "\n" not in message and len(message) < 2000
    return message


def refused(source: Path, family: str = "timm_vit", **options: Any) -> str:
    """The line in which loading is refused; the model is as it was."""
    model = make(family)
    left, values = trace(model), snapshot(model)
    message = refusal(lambda: load_adapter(source, model, **options))
    assert differences(left, trace(model)) == [] and same(values, snapshot(model))
    return message


@pytest.fixture
def adapter(tmp_path: Path) -> Path:
    """LoRA of rank 2 with random values."""
    model = make("timm_vit")
    method = LoRA(rank=2).attach(model)
    randomize(method)
    return method.save(tmp_path / "adapter")


def record_of(folder: Path) -> dict[str, Any]:
    return json.loads((folder / RECORD).read_text())


def write(folder: Path, record: Any) -> None:
    (folder / RECORD).write_text(record if isinstance(record, str) else json.dumps(record))


def changed(value: Any, path: str, new: Any) -> Any:
    """A copy of plain data with another value at a path, ``methods.0.name``."""
    copy = json.loads(json.dumps(value))
    *parts, last = [int(part) if part.isdigit() else part for part in path.split(".")]
    node = copy
    for part in parts:
        node = node[part]
    node[last] = new
    return copy


# ------------------------------------------------------------------------------------------------- sizes


def cells() -> list[Cell]:
    """Each method once, on the first of a few families that can have it."""
    return [next(cell for family in ("timm_vit", "bert", "t5") if not (cell := Cell(name, next(iter(row.variants)),
                                                                                  family)).refused)
            for name, row in METHODS.items()]


@pytest.mark.parametrize("cell", cells(), ids=str)
def test_absurd_sizes(cell: Cell, tmp_path: Path) -> None:
    """A whole number in a record may say anything: what it asks for is compared with the file before it is built."""
    method = cell.attach(make(cell.family))
    folder = method.save(tmp_path)
    record = record_of(folder)
    for name, kind in types_of(type(method)).items():
        if name == "seed" or "int" not in str(kind) or "Sequence" in str(kind):
            continue
        write(folder, changed(record, f"methods.0.config.{name}", 10**9))
        with in_time(), Spy() as spy:
            try:
                load_adapter(folder, make(cell.family))  # of steps and samples any number will do
            except ScionError as error:
                assert "\n" not in str(error)
        assert not spy.asked, (name, spy.asked)


@pytest.mark.parametrize("path, value", [
    ("rank", 10**6), ("rank", 2**62), ("rank", 10**400), ("layers", [10**12]), ("layers", [0] * 10**5),
    ("targets", ["q", "v"] * 10**5), ("targets", ["x" * 900] * 1000), ("targets", ["x" * 10**5]), ("alpha", 1e308)])
def test_absurd_values(adapter: Path, path: str, value: Any) -> None:
    write(adapter, changed(record_of(adapter), f"methods.0.config.{path}", value))
    if path != "alpha":  # a finite factor, which nothing is made of
        refused(adapter)


@pytest.mark.parametrize("method, structure", [
    ("LoFiT", {"stage": "offsets", "heads": {"0.o": 10**12}}), ("TriAdaptLoRA", {"blocks": {"0.q": [1] * 10**5}}),
    ("PortLLM", {"changes": {"model.norm.weight": [[10**12, 1], [1, 10**12]]}}), ("HalfFineTuning", {"round": 10**15}),
    ("LTSFT", {"stage": "sparse", "entries": {"model.norm.weight": [10**12, 32]}}), ("VQT", {"kept": 10**12}),
    ("LIFT", {"left": {"0.qkv": 10**12}}), ("SensitivityTuning", {"plan": {"0.q": 10**12}}), ("LoRA", {"x": 1}),
    ("PST", {"sparsity": 7}), ("HalfFineTuning", {"round": "one"}), ("FourierFT", {"shapes": {"0.q": "wide"}})])
def test_absurd_structures(method: str, structure: dict[str, Any], tmp_path: Path) -> None:
    cell = Cell(method, next(iter(METHODS[method].variants)), "timm_vit")
    folder = cell.attach(make(cell.family)).save(tmp_path)
    write(folder, changed(record_of(folder), "methods.0.structure", structure))
    if structure == {"round": 10**15}:  # all of it has been drawn long before, so that this is a round like another
        with in_time():
            load_adapter(folder, make(cell.family))
    else:
        refused(folder)


def test_a_composition_of_folders_is_not_larger_than_they_are(adapter: Path) -> None:
    from core.compose import Route

    write(adapter, changed(record_of(adapter), "methods.0.config.rank", 10**6))
    model = make("timm_vit")
    assert "in the file" in refusal(lambda: Route([str(adapter), LoRA(name="other")]).attach(model))


# ------------------------------------------------------------------------------------------------- records


WRONG = (None, True, 3, -1.5, "x", [], [1], {}, {"a": 1}, "\x1b[31m\n\ud800")


@pytest.mark.parametrize("path", [
    "format", "methods", "methods.0", "methods.0.class", "methods.0.name", "methods.0.config", "methods.0.structure",
    "methods.0.config.rank", "methods.0.config.targets", "methods.0.config.dropout", "methods.0.config.layers",
    "methods.0.config.head", "methods.0.config.trainable", "base", "base.class", "base.fingerprint",
    "base.stacks", "base.pooler", "apart", "versions", "model", "sha256"])
def test_wrong_types(adapter: Path, path: str) -> None:
    record = record_of(adapter)
    fine = {"methods.0.structure": ({},), "methods.0.config.rank": (3,), "methods.0.config.targets": (None,),
            "methods.0.config.layers": (None,), "methods.0.config.trainable": (True,), "base.class": ("x", WRONG[-1]),
            "methods.0.config.dropout": (), "versions": ({},), "methods.0.name": ("x",),
            "base.stacks": ({},), "base.pooler": (), "apart": ([],)}
    for value in WRONG:
        if path == "methods.0.config.rank" or value not in fine.get(path, ()) or type(value) is bool and value not in (
                fine.get(path, ())):
            write(adapter, changed(record, path, value))
            message = refused(adapter)
            assert message.isprintable(), message


@pytest.mark.parametrize("text", [
    "", "[]", "null", "[" * 10**5, '{"format": 1, "format": 1}', '{"format": NaN}', '{"a": 1e999}', "\x00",
    '{"format": ' + "9" * 5000 + "}", '{"format": 1, "methods": [], "base": {}}', "\ud800"], ids=str.__len__)
def test_no_json_of_ours(adapter: Path, text: str) -> None:
    (adapter / RECORD).write_bytes(text.encode("utf-8", "surrogatepass"))
    assert str(adapter) in refused(adapter)


def test_a_key_twice_is_refused(adapter: Path) -> None:
    text = (adapter / RECORD).read_text()
    write(adapter, text.replace('"rank": 2', '"rank": 2, "rank": 2'))
    assert "not valid JSON" in refused(adapter)


def test_nothing_that_a_record_points_to_is_opened(adapter: Path, tmp_path: Path) -> None:
    """Not the folder of a patch, nor an adapter within a composition."""
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    (tmp_path / "patch").mkdir()
    os.mkfifo(tmp_path / "patch" / "patch.json")
    record = record_of(adapter)
    port = {"class": "PortLLM", "name": "PortLLM", "config": {"patch": str(tmp_path / "patch")}, "structure": {}}
    write(adapter, changed(record, "methods", [port]))
    assert "no method here" in refused(adapter)  # built without the patch, so that the tensors are left over
    for entry in (str(adapter), {"adapter": str(adapter)}, {"class_path": "LoRA", "init_args": {}}, 5, {"class": 5}):
        route = {"class": "Route", "name": "Route", "config": {"methods": [entry]}, "structure": {}}
        write(adapter, changed(record, "methods", [route]))
        refused(adapter)


# ------------------------------------------------------------------------------------------------- tensors


@pytest.mark.parametrize("change, words", [
    (lambda t: t.to(torch.int32), "holds int32 in the file, float32 here"), (lambda t: t > 0, "holds bool"),
    (lambda t: t.to(torch.complex64), "holds complex64"), (lambda t: t * torch.nan, "not finite"),
    (lambda t: t + torch.inf, "not finite"), (lambda t: t.double() * 1e300, "not finite"),
    (lambda t: t.to(torch.float8_e4m3fn) * torch.nan, "not finite")],
    ids=["int", "bool", "complex", "nan", "inf", "double", "float8"])
def test_numbers_of_another_kind(adapter: Path, change: Callable[[torch.Tensor], torch.Tensor], words: str) -> None:
    """Floats of another width are converted, as ever."""
    tensors = load_file(adapter / TENSORS)
    name = sorted(tensors)[0]
    record = record_of(adapter)
    del record["sha256"]  # as files from before have it
    write(adapter, record)
    for kind in (torch.float16, torch.bfloat16, torch.float64):
        save_file({**tensors, name: tensors[name].to(kind)}, adapter / TENSORS)
        load_adapter(adapter, make("timm_vit"))
    try:
        spoiled = change(tensors[name])
    except NotImplementedError:
        spoiled = torch.full(tensors[name].shape, torch.nan).to(torch.float8_e4m3fn)
    save_file({**tensors, name: spoiled}, adapter / TENSORS)
    message = refused(adapter)
    assert words in message and name in message


@pytest.mark.parametrize("method, buffer", [("APET", "index"), ("LIFT", "index"), ("MoS", "index_A"),
                                            ("SpIEL", "index")])
def test_positions_that_do_not_exist(method: str, buffer: str, tmp_path: Path) -> None:
    cell = Cell(method, next(iter(METHODS[method].variants)), "timm_vit")
    folder = cell.attach(make(cell.family)).save(tmp_path)
    record = record_of(folder)
    del record["sha256"]
    write(folder, record)
    tensors = load_file(folder / TENSORS)
    name = next(name for name in tensors if name.endswith(f".{buffer}"))
    for value in (-1, 2**31 - 1):
        save_file({**tensors, name: torch.full_like(tensors[name], value)}, folder / TENSORS)
        assert "are possible here" in refused(folder)


def test_packed_numbers_that_are_not_finite(tmp_path: Path) -> None:
    model = make("timm_vit")
    methods = [LoRA(rank=2).attach(model), Quantize().attach(model)]
    save_adapter(methods, tmp_path)
    record = record_of(tmp_path)
    del record["sha256"]
    write(tmp_path, record)
    tensors = load_file(tmp_path / TENSORS)
    name = next(name for name in tensors if name.endswith(".scale"))
    save_file({**tensors, name: torch.full_like(tensors[name], 3e38)}, tmp_path / TENSORS)
    assert "not finite" in refused(tmp_path)


def test_two_files_of_different_adapters(adapter: Path, tmp_path: Path) -> None:
    """A write that broke off between the two leaves no adapter; files from before have no checksum."""
    randomize(method := LoRA(rank=2, alpha=7).attach(make("timm_vit")), seed=3)
    method.save(tmp_path / "other")
    (adapter / TENSORS).write_bytes((tmp_path / "other" / TENSORS).read_bytes())
    assert "checksums differ" in refused(adapter)
    record = record_of(adapter)
    del record["sha256"]
    write(adapter, record)
    load_adapter(adapter, make("timm_vit"))


def test_a_full_disk_is_one_line(adapter: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    method = load_adapter(adapter, make("timm_vit"))
    (tmp_path / "file").write_text("mine")
    assert "cannot be written" in refusal(lambda: method.save(tmp_path / "file"))
    import safetensors.torch

    def full(*_: Any, **__: Any) -> None:
        raise safetensors.SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")

    monkeypatch.setattr(safetensors.torch, "save_file", full)
    assert "No space left on device" in refusal(lambda: method.save(tmp_path / "new"))
    assert not list((tmp_path / "new").iterdir())


# ------------------------------------------------------------------------------------------------- odd files


def odd(path: Path, kind: str) -> None:
    """Something else in the place of a file."""
    if path.exists():
        path.unlink()
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "device":
        path.symlink_to("/dev/zero")
    elif kind == "loop":
        path.symlink_to(path)
    else:
        path.mkdir()


@pytest.mark.parametrize("kind", ["pipe", "device", "loop", "folder"])
def test_odd_files(adapter: Path, kind: str, tmp_path: Path) -> None:
    """A pipe in the place of a file would be read for ever."""
    model = make("timm_vit")
    method = load_adapter(adapter, model)
    to_peft(method, model, tmp_path / "peft")
    Patch.take(model).save(tmp_path / "patch")
    for folder, file, read in (
            ("adapter", RECORD, refused), ("adapter", TENSORS, refused), ("peft", CONFIG, refused),
            ("peft", THEIR_TENSORS, refused),
            ("patch", "patch.json", lambda folder: refusal(lambda: Patch.load(folder))),
            ("patch", "patch.safetensors", lambda folder: refusal(lambda: Patch.load(folder)))):
        path = tmp_path / folder / file
        content = path.read_bytes()
        odd(path, kind)
        assert str(tmp_path / folder) in read(tmp_path / folder), file
        path.rmdir() if kind == "folder" else path.unlink()
        path.write_bytes(content)
    odd(tmp_path / "last.ckpt", kind)
    refused(tmp_path / "last.ckpt")


@pytest.mark.parametrize("content", [
    b"", b"\xff" * 8, struct.pack("<Q", 2**40), struct.pack("<Q", 2**20) + b"{}", struct.pack("<Q", 2) + b"[]",
    struct.pack("<Q", 70) + b'{"a":{"dtype":"F32","shape":[2000000000000],"data_offsets":[0,8]}}    ' + bytes(8)])
def test_damaged_safetensors(adapter: Path, content: bytes) -> None:
    (adapter / TENSORS).write_bytes(content)
    assert TENSORS in refused(adapter)


# ------------------------------------------------------------------------------------------------- checkpoints


class Trap:
    """What would run something when it is unpickled."""

    def __reduce__(self) -> Any:
        return os.system, ("touch /tmp/a-pickle-was-run",)


class Bomb:
    def __reduce__(self) -> Any:
        return bytearray, (2**34,)


def state(**changes: Any) -> dict[str, Any]:
    """The state dict of a module with LoRA."""
    module = Plain(make("timm_vit"))
    LoRA(rank=2).attach(module.backbone)
    return {**{name: value for name, value in module.state_dict().items() if "lora" in name.lower()}, **changes}


EXTRA = "backbone.peft.LoRA._extra_state"


def text(value: str) -> torch.Tensor:
    return torch.frombuffer(bytearray(value.encode()), dtype=torch.uint8)


@pytest.mark.parametrize("content", [
    None, [], {}, {"state_dict": None}, {"state_dict": [1]}, {"state_dict": {1: 2}}, {"state_dict": {"a": 1}},
    {"state_dict": {"a\x1b[31m": torch.zeros(2)}}, Trap(), {"state_dict": Trap()}, Bomb(),
    lambda: {"state_dict": state(**{EXTRA: text("{")})}, lambda: {"state_dict": state(**{EXTRA: torch.zeros(3)})},
    lambda: {"state_dict": state(**{EXTRA: text("[" * 10**5)})}, lambda: {"state_dict": state(**{EXTRA: "x"})},
    lambda: {"state_dict": state(**{EXTRA: text('{"class": "LoRA", "name": "a.b", "config": {}, "base": ""}')})},
    lambda: {"state_dict": state(**{EXTRA: text('{"class": ["LoRA"], "name": "L", "config": {}, "base": ""}')})},
    lambda: {"state_dict": state(**{"backbone.peft.LoRA.0-q.A": 5})},
    lambda: {"state_dict": state(**{"backbone.peft.LoRA.0-q.A": torch.zeros(2, 32).to_sparse()})},
    lambda: {"state_dict": state(**{"backbone.peft.LoRA.0-q.A": torch.zeros(1).expand(10**12)})},
    lambda: {"state_dict": state(**{"backbone.peft.LoRA.0-q.A": torch.full((2, 32), torch.nan)})},
    lambda: {"state_dict": state(**{"backbone.peft.LoRA.0-q.A": torch.quantize_per_tensor(
        torch.zeros(2, 32), 1.0, 0, torch.qint8)})},
    lambda: {"state_dict": state(**{"backbone.peft.LoRA.0-q.A": torch.zeros(2, 32, device="meta")})},
    lambda: {"state_dict": collections.OrderedDict(state(**{EXTRA: torch.randint(256, (99,), dtype=torch.uint8)}))},
], ids=range(24))
def test_hostile_checkpoints(content: Any, tmp_path: Path) -> None:
    file = tmp_path / "last.ckpt"
    torch.save(content() if callable(content) and not isinstance(content, type) else content, file)
    assert str(file) in refused(file)
    assert not Path("/tmp/a-pickle-was-run").exists()


def test_checkpoints_of_other_forms(tmp_path: Path) -> None:
    """Plain pickles, and archives that are larger unpacked than packed."""
    file = tmp_path / "last.ckpt"
    good = {"state_dict": state()}
    torch.save(good, file)
    load_adapter(file, make("timm_vit"))
    buffer = io.BytesIO()
    with zipfile.ZipFile(file) as old, zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as new:
        for member in old.infolist():
            new.writestr(member.filename, old.read(member))
    for content in (pickle.dumps(Trap()), pickle.dumps(good["state_dict"].keys().__len__()), b"PK\x03\x04",
                    buffer.getvalue(), file.read_bytes()[:-200], b"PK\x03\x04" + bytes(1000)):
        (tmp_path / "other.ckpt").write_bytes(content)
        assert "not a readable checkpoint" in refused(tmp_path / "other.ckpt")
    torch.save(good, tmp_path / "legacy.ckpt", _use_new_zipfile_serialization=False)
    assert "release 1.6" in refused(tmp_path / "legacy.ckpt")


# ------------------------------------------------------------------------------------------------- peft folders


@pytest.fixture
def theirs(adapter: Path, tmp_path: Path) -> Path:
    model = make("timm_vit")
    return to_peft(load_adapter(adapter, model), model, tmp_path / "peft")


FUNNY = [None, True, -1, 10**12, 1.5, "x", [], ["x"], {}, {"x": 1}, {"(a+)+$": 3}, {"(": 3}, "(((((a*)*)*)*)*)*$"]


@pytest.mark.parametrize("key", [
    "peft_type", "r", "lora_alpha", "lora_dropout", "use_rslora", "target_modules", "modules_to_save", "rank_pattern",
    "alpha_pattern", "bias", "use_dora", "fan_in_fan_out", "layers_to_transform"])
def test_hostile_peft_configs(theirs: Path, key: str) -> None:
    config = json.loads((theirs / CONFIG).read_text())
    for value in FUNNY:
        (theirs / CONFIG).write_text(json.dumps({**config, key: value}))
        with in_time(), Spy() as spy:
            try:
                load_adapter(theirs, make("timm_vit"))
            except ScionError as error:
                assert "\n" not in str(error)
        assert not spy.asked
    for content in ("", "[]", "{", '{"peft_type": 3}', '{"peft_type": "LORA", "r": NaN}'):
        (theirs / CONFIG).write_text(content)
        refused(theirs)


def test_a_pattern_without_end_is_refused(theirs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from core.adapters.huggingface import patterns

    monkeypatch.setattr(patterns, "PATIENCE", 1e-3)  # the pattern takes a fifth of a second
    config = json.loads((theirs / CONFIG).read_text())
    pattern = "(.*)" * 8 + "".join(rf"\{group}" for group in range(8, 0, -1)) + "[!?]"
    (theirs / CONFIG).write_text(json.dumps({**config, "rank_pattern": {pattern: 3}}))
    with in_time(), pytest.raises(ScionError, match="too long"):
        load_adapter(theirs, make("timm_vit"))


@pytest.mark.parametrize("kind, config", [
    ("VERA", {"r": 10**9}), ("OFT", {"oft_block_size": 10**9}), ("ADALORA", {"init_r": 10**9, "target_r": 1}),
    ("FOURIERFT", {"n_frequency": 10**12, "scaling": 1.0}), ("MISS", {"r": 10**9, "mini_r": 10**9}), ("OFT", {}),
    ("PROMPT_TUNING", {"num_virtual_tokens": 10**9}), ("PREFIX_TUNING", {"num_virtual_tokens": 3, "token_dim": 10**9}),
    ("BOFT", {"boft_block_size": "x"}), ("LOKR", {"r": 10**9, "alpha": 1, "decompose_factor": 10**9}), ("LOHA", {}),
    ("IA3", {"feedforward_modules": 3}), ("LN_TUNING", {"target_modules": {}})])
def test_other_types_of_peft(theirs: Path, kind: str, config: dict[str, Any]) -> None:
    """With LoRA's tensors in the file, or those of the type by their names alone."""
    (theirs / CONFIG).write_text(json.dumps({"peft_type": kind, **config}))
    refused(theirs, "bert")
    names = {"VERA": "vera_lambda_d", "OFT": "oft_R.weight", "ADALORA": "lora_E", "FOURIERFT": "fourierft_spectrum",
             "MISS": "miss_block", "BOFT": "boft_R", "LOKR": "lokr_w1", "LOHA": "hada_w1_a", "IA3": "ia3_l",
             "LN_TUNING": "ln_tuning_layers.weight"}
    name = f"base_model.model.encoder.layer.0.attention.self.query.{names[kind]}" if kind in names else \
        "prompt_embeddings"
    save_file({name: torch.zeros(2, 6)}, theirs / THEIR_TENSORS)
    refused(theirs, "bert")


def test_their_pickles_and_odd_tensors(theirs: Path) -> None:
    tensors = load_file(theirs / THEIR_TENSORS)
    name = sorted(tensors)[0]
    for spoiled in (tensors[name].to(torch.int64), tensors[name].to(torch.complex64), tensors[name] * torch.nan):
        save_file({**tensors, name: spoiled}, theirs / THEIR_TENSORS)
        assert name.removeprefix("base_model.model.")[:10] in refused(theirs) or "finite" in refused(theirs)
    (theirs / THEIR_TENSORS).unlink()
    torch.save(Trap(), theirs / "adapter_model.bin")
    assert "a pickle" in refused(theirs)


# ------------------------------------------------------------------------------------------------- patches


@pytest.mark.parametrize("change", [
    {"format": 2}, {"format": "1"}, {"base": 3}, {"shapes": []}, {"shapes": {"a": "b"}}, {"shapes": {"a": [1]}},
    {"shapes": {}}, {"sha256": "0" * 64}, {"more": 1}])
def test_hostile_patches(change: dict[str, Any], tmp_path: Path) -> None:
    model = make("timm_vit")
    randomize(LoRA(rank=2).attach(model))
    Patch.take(model).save(tmp_path)
    Patch.load(tmp_path)
    record = json.loads((tmp_path / "patch.json").read_text())
    (tmp_path / "patch.json").write_text(json.dumps({**record, **change}))
    refusal(lambda: Patch.load(tmp_path))


def test_patches_that_are_not_finite(tmp_path: Path) -> None:
    model = make("timm_vit")
    randomize(LoRA(rank=2).attach(model))
    Patch.take(model).save(tmp_path)
    record = json.loads((tmp_path / "patch.json").read_text())
    for key in ("architecture", "tensors", "sha256"):  # as files from before have it
        del record[key]
    (tmp_path / "patch.json").write_text(json.dumps(record))
    tensors = load_file(tmp_path / "patch.safetensors")
    name = sorted(tensors)[0]
    for spoiled in (tensors[name] * torch.nan, tensors[name].long(), tensors[name][:, :1]):
        save_file({**tensors, name: spoiled.contiguous()}, tmp_path / "patch.safetensors")
        refusal(lambda: Patch.load(tmp_path))


def test_every_structure_is_described() -> None:
    """A method that saves a structure says what is in it, so that a stranger's can be checked."""
    for cell in cells():
        if cell.cls.structure is not PEFTMethod.structure:
            assert cell.cls.structure_types is not None, cell
