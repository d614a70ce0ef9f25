"""docs/families.md: its examples are taken out of the page and run, and its messages are those that appear."""

from __future__ import annotations

import dataclasses
import importlib
import re
import runpy
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from core import dissect, load_adapter
from core.anatomy import FAMILIES, ROLES, BlockDescription, Description, Rows
from core.errors import ScionError
from core.peft import LoRA, method_class
from tests.papers.sites import numbers
from tests.toolkit import distance, outputs, randomize, seeded

PAGE = (Path(__file__).parents[1] / "docs" / "families.md").read_text(encoding="utf-8")
FILES = dict(re.findall(r"^```python file=(\S+)\n(.*?)^```$", PAGE, re.MULTILINE | re.DOTALL))
ERRORS = dict(re.findall(r"^```text error=(\S+)\n(.*?)\n```$", PAGE, re.MULTILINE | re.DOTALL))
CLASSES = "acme.encoder:AcmeEncoder", "acme.detector:AcmeDetector"


@pytest.fixture
def acme(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """The page's files on the import path; gives the module of a name."""
    for name, content in FILES.items():
        file = tmp_path / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(content, encoding="utf-8")
    monkeypatch.syspath_prepend(tmp_path)
    yield lambda name: importlib.import_module(f"acme.{name}")
    for name in [name for name in sys.modules if name.partition(".")[0] == "acme"]:
        del sys.modules[name]
    for name in CLASSES:
        FAMILIES.pop(name, None)


def encoder(acme: Any, described: bool = True, **options: Any) -> Any:
    """The page's encoder with random values, in double precision."""
    if described:
        acme("scion")
    with seeded(0):
        model = acme("encoder").AcmeEncoder(**options).double().eval()
    with torch.no_grad():
        for i, tensor in enumerate(model.parameters()):
            tensor += 0.1 * numbers(*tensor.shape, seed=i)
    return model


def ids() -> Tensor:
    return torch.randint(100, (2, 7), generator=torch.Generator().manual_seed(0))


def method(cls: str, /, **options: Any) -> Any:
    return method_class(cls)(**options)


# ------------------------------------------------------------------------------------------------- the page


def test_every_role_is_on_the_page() -> None:
    page = PAGE.partition("## The block")[0]
    assert dict(re.findall(r"^\| `([a-z0-9._]+)` \| (.+) \|$", page, re.MULTILINE)) == ROLES


def test_every_field_is_on_the_page() -> None:
    table = PAGE.partition("## The block")[2].partition("**Norms.**")[0]
    named = set(re.findall(r"`(\w+)`", " ".join(line.split("|")[1] for line in table.splitlines() if line[:1] == "|")))
    assert named == {field.name for field in dataclasses.fields(BlockDescription)}
    assert all(f"`{field.name}`" in PAGE or f"{field.name}=" in PAGE for field in dataclasses.fields(Description))


# ------------------------------------------------------------------------------------------------- the examples


def test_the_example_runs(acme: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with torch.random.fork_rng(devices=[]):
        found = runpy.run_path(str(tmp_path / "use.py"))
    printed = capsys.readouterr().out
    assert "layers.2.attention.qkv" in printed and "4 heads x 8" in printed
    counts = {"LoRA": 3 * 4 * (2 * (32 + 32) + (32 + 64)), "Houlsby": 3 * 2 * (2 * 8 * 32 + 8 + 32),
              "PrefixTuning": 3 * 5 * 2 * 32}
    assert str(counts) in printed
    trained = [*found["adapters"].trainable().values(), *found["prefix"].trainable().values()]
    assert all(tensor.grad is not None for tensor in trained)


@pytest.mark.parametrize("name", ["LoRA", "Houlsby"])
def test_identity_at_the_start(acme: Any, name: str) -> None:
    model, inputs = encoder(acme), ids()
    expected = outputs(model, inputs)
    method(name).attach(model)
    assert torch.equal(outputs(model, inputs), expected)


@pytest.mark.parametrize("role", ["q", "k", "v"])
def test_a_role_is_what_it_says(acme: Any, role: str) -> None:
    """A change at q changes the queries of all heads, and neither keys nor values; so do k and v."""
    model, inputs = encoder(acme), ids()
    attention = model.layers[1].attention
    x = numbers(2, 7, 32)

    def parts() -> dict[str, Tensor]:
        with torch.no_grad():
            found = attention.qkv(x).unflatten(-1, (4, 3, 8))
        return {name: found[:, :, :, i] for i, name in enumerate("qkv")}

    before = parts()
    lora = method("LoRA", targets=(role,), rank=2).attach(model)
    randomize(lora)
    after = parts()
    for name in "qkv":
        changed = (after[name] != before[name]).flatten(3).any(-1).any(0).any(0)  # by head
        assert changed.tolist() == [name == role] * 4
    expected = outputs(model, inputs)
    lora.merge()
    assert distance(outputs(model, inputs), expected) < 1e-12


def test_parts_of_the_gated_mlp(acme: Any) -> None:
    model = encoder(acme)
    mlp, x = model.layers[0].mlp, numbers(2, 7, 32)
    for role, place in (("mlp.gate", 0), ("mlp.up", 1)):
        lora = method("LoRA", targets=(role,), layers=(0,), rank=2, name=role.replace(".", "-")).attach(model)
        randomize(lora)
        with torch.no_grad():
            found = mlp.gate_up(x).chunk(2, -1)
            with lora.disabled():
                base = mlp.gate_up(x).chunk(2, -1)
        assert [torch.equal(*pair) for pair in zip(found, base, strict=True)] == [place == 1, place == 0]


def test_prefixes_in_the_attention(acme: Any) -> None:
    """softmax(q [P_k; K]^T) [P_v; V]; the attribute is as it was where the method is switched off or gone."""
    model, inputs = encoder(acme), ids()
    expected = outputs(model, inputs)
    prefix = method("PrefixTuning", tokens=3, layers=(0,)).attach(model)
    randomize(prefix, size=0.5)
    attention = model.layers[0].attention
    x = numbers(2, 7, 32)
    with torch.no_grad():
        found = attention(x)
        with prefix.disabled():
            assert not attention.use_kernel
            q, k, v = attention.qkv(x).unflatten(-1, (4, 3, 8)).permute(3, 0, 2, 1, 4)
        keys, values = prefix.grafts[0].prefix.split(32, 1)
        k = torch.cat([keys.unflatten(1, (4, 8)).transpose(0, 1).expand(2, -1, -1, -1), k], 2)
        v = torch.cat([values.unflatten(1, (4, 8)).transpose(0, 1).expand(2, -1, -1, -1), v], 2)
        mixed = torch.softmax(q @ k.transpose(-1, -2) / 8 ** 0.5, -1) @ v
        assert distance(found, F.linear(mixed.transpose(1, 2).flatten(2), attention.out.weight, attention.out.bias)
                        ) < 1e-12
    assert attention.use_kernel and distance(outputs(model, inputs), expected) > 1e-6
    prefix.remove()
    assert not attention.use_kernel and torch.equal(outputs(model, inputs), expected)


def test_adapter_file_and_a_wrapper(acme: Any, tmp_path: Path) -> None:
    """Attached to a module around the encoder, whose other part is its head; saved and loaded."""
    def wrapped() -> nn.Module:
        model = nn.Module()
        model.encoder = encoder(acme)
        model.classify = nn.Linear(32, 3).double()
        model.forward = lambda x: model.encoder(x)  # type: ignore[method-assign, operator]
        return model

    model, inputs = wrapped(), ids()
    lora = method("LoRA").attach(model)
    assert lora.counts()["head"] == 3 * 33 and dissect(model).blocks[0].path == "encoder.layers.0"
    randomize(lora)
    lora.save(tmp_path / "adapter")
    fresh = wrapped()
    load_adapter(tmp_path / "adapter", fresh)
    assert torch.equal(outputs(fresh, inputs), outputs(model, inputs))


@pytest.mark.parametrize("name", [
    "LoRA", "BitFit", "SSF", "Houlsby", "PrefixTuning", "IA3", "LTSFT", "Pfeiffer", "VPT"])
def test_methods_of_each_kind(acme: Any, name: str) -> None:
    """Each trains what it says it trains, and leaves no trace."""
    model, inputs = encoder(acme), ids()
    expected = outputs(model, inputs)
    attached = method(name).attach(model)
    (model(inputs) * numbers(2, 32)).sum().backward()
    assert all(tensor.grad is not None for tensor in attached.trainable().values())
    attached.remove()
    assert torch.equal(outputs(model, inputs), expected) and not hasattr(model, "peft")


def test_the_convolutional_example(acme: Any) -> None:
    model = acme("detector").AcmeDetector().double().eval()
    inputs = numbers(2, 1, 64)
    anatomy = dissect(model)
    assert [len(stage) for stage in anatomy.stages] == [2, 2] and [b.dim for b in anatomy.blocks] == [16, 16, 32, 32]
    assert anatomy.blocks[2].entry is not None and anatomy.blocks[2].entry.path == "joints.0"
    assert anatomy.roles["downsample"] == 1 and "stage1.mlp.up" in anatomy._staged()
    before = outputs(model, inputs)
    lora = method("LoRA", rank=2, targets=("conv", "mlp.up", "downsample")).attach(model)
    assert torch.equal(outputs(model, inputs), before)
    randomize(lora)
    trained = outputs(model, inputs)
    lora.merge()
    assert distance(outputs(model, inputs), trained) < 1e-12 and distance(trained, before) > 1e-6
    with pytest.raises(ScionError, match="'attention' matches nothing in AcmeDetector"):
        method("Houlsby").attach(acme("detector").AcmeDetector())


# ------------------------------------------------------------------------------------------------- messages


def message(name: str, found: str) -> bool:
    """Whether the page's message, whose dots stand for anything, is the one found."""
    parts = [re.escape(part) for part in ERRORS[name].split("...")]
    return re.fullmatch(".*?".join(parts), found) is not None


def redescribed(**changes: Any) -> None:
    """The encoder's description with fields of its blocks changed; ``roles`` are added."""
    describe = FAMILIES[CLASSES[0]]

    def other(model: Any) -> Description:
        description = describe(model)
        for block in description.blocks:
            for field, value in changes.items():
                setattr(block, field, {**block.roles, **value} if field == "roles" else value)
        return description

    FAMILIES[CLASSES[0]] = other


def test_unknown(acme: Any) -> None:
    with pytest.raises(ScionError) as caught:
        LoRA().attach(encoder(acme, described=False))
    assert message("unknown", str(caught.value))


@pytest.mark.parametrize(("name", "changes"), [
    ("path", {"roles": {"o": "attention.output"}}), ("role", {"roles": {"mlp.upp": "mlp.down"}}),
    ("rows", {"roles": {"mlp.up": ("mlp.gate_up", Rows(64, 192))}}), ("heads", {"heads": (8, 8, 8)}),
    ("attribute", {"while_active": {"attend": {"attention.kernel": True}}})])
def test_wrong_descriptions(acme: Any, name: str, changes: dict[str, Any]) -> None:
    model = encoder(acme)
    redescribed(**changes)
    with pytest.raises(ScionError) as caught:
        LoRA().attach(model)
    assert message(name, str(caught.value)) and not hasattr(model, "peft")


def test_attention_that_is_not_called(acme: Any) -> None:
    model = encoder(acme)
    redescribed(while_active={})
    method("PrefixTuning").attach(model)
    with pytest.raises(ScionError) as caught:
        model(ids())
    assert message("never_called", str(caught.value))
    bare = encoder(acme)
    describe = FAMILIES[CLASSES[0]]

    def without(model: Any) -> Description:
        description = describe(model)
        for block in description.blocks:
            block.roles = {role: where for role, where in block.roles.items() if role != "attend"}
        return description

    FAMILIES[CLASSES[0]] = without
    with pytest.raises(ScionError) as caught:
        method("PrefixTuning").attach(bare)
    assert message("no_attend", str(caught.value)) and not hasattr(bare, "peft")


def test_wrong_targets(acme: Any) -> None:
    with pytest.raises(ScionError) as caught:
        method("LoRA", targets=("mlp.uo",)).attach(encoder(acme))
    assert message("target", str(caught.value))

    class Pair(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = encoder(acme), encoder(acme)

    with pytest.raises(ScionError) as caught:
        LoRA().attach(Pair())
    assert message("two", str(caught.value))


def test_every_message_is_tested() -> None:
    tested = Path(__file__).read_text(encoding="utf-8")
    assert ERRORS and all(f'"{name}"' in tested for name in ERRORS)
