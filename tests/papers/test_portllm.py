"""Checks of PortLLM: the checks by their numbers there."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from core import load_adapter
from core.adapters.load import fingerprint
from core.anatomy import dissect
from core.errors import ScionError
from core.patch import Patch, residual_report
from core.peft import method_class
from tests.models import batch, make
from tests.rows import Row, Variant
from tests.toolkit import distance, outputs, randomize, same, snapshot, trace


def patched(method: Any) -> None:
    """As made from a saved patch of rank 2, with values of zero."""
    anatomy = dissect(method.root)
    weights = {site.weight_name: site.full_weight for site in anatomy.sites(
        ("mlp.up", "o") if "o" in anatomy.roles else ("mlp.up",))}
    method.restructure({"changes": {name: [[weight.shape[0], 2], [2, weight.numel() // weight.shape[0]]]
                                    for name, weight in weights.items()}})


ROWS = {
    "PortLLM": Row(
        {"low rank": Variant({"scale": 0.5}, patched, trains=False)},
        trained=lambda anatomy, method: 0,
        bad=(({"patch": "nowhere"}, "patch.json"),),
        operators=4, saved=0.5,
        absent=("test_checkpoint", "test_resume", "test_reproducible", "test_nothing_to_train", "test_adapter_file",
                "test_no_graph_below_the_first_graft", "test_what_the_rows_share_cannot_be_routed"),
    ),
}

PortLLM: Any = method_class("PortLLM")
SEVEN = ("q", "k", "v", "o", "mlp.gate", "mlp.up", "mlp.down")
pytestmark = pytest.mark.filterwarnings("ignore:the patch is carried")


def trained(family: str = "bert", name: str = "LoRA", seed: int = 0, **options: Any) -> tuple[nn.Module, Any]:
    """A model with a method whose values are random."""
    model = make(family)
    method = method_class(name)(**options).attach(model)
    randomize(method, seed=seed)
    return model, method


def test_1_count_of_mistral_7b(tmp_path: Path) -> None:
    from transformers import LlamaConfig, LlamaModel  # Mistral-7B's shapes

    with torch.device("meta"):
        model = LlamaModel(LlamaConfig(hidden_size=4096, intermediate_size=14336, num_hidden_layers=32,
                                       num_attention_heads=32, num_key_value_heads=8))
    method: Any = method_class("LoRA")(rank=8, targets=SEVEN).attach(model)  # type: ignore[call-arg]
    assert sum(part.numel() for graft in method.grafts for part in graft.factors()) == 20_971_520


@pytest.mark.parametrize(("family", "name", "options"), [
    ("bert", "LoRA", {"targets": ("q", "mlp.up")}), ("timm_vit", "LoRA", {"targets": ("q", "v", "patch_embed")}),
    ("llama", "DoRA", {}), ("ast", "Hydra", {}), ("timm_vit", "BitFit", {}), ("bert", "FullFineTuning", {}),
    ("timm_swin", "TriAdaptLoRA", {}), ("bert", "MoS", {"rank": 2, "targets": ("q",)}), ("bert", "AdaLoRA", {})])
def test_3_and_4_branch_equals_merge_and_comes_out(family: str, name: str, options: dict, tmp_path: Path) -> None:
    """On the old base both give the tuned model's outputs; on a new one they agree; removal is exact."""
    tuned, method = trained(family, name, **options)
    inputs = batch(family)
    expected, left, values = outputs(tuned, inputs), trace(tuned), snapshot(tuned)
    patch = Patch.take(tuned)
    assert same(values, snapshot(tuned)) and trace(tuned) == left and torch.equal(outputs(tuned, inputs), expected)
    patch.save(tmp_path)
    for seed in (0, 1):
        merged, branch = make(family, seed=seed), make(family, seed=seed)
        start, before = snapshot(merged), outputs(merged, inputs)
        applied = Patch.load(tmp_path).apply(merged)
        port = PortLLM(patch=str(tmp_path)).attach(branch)
        assert distance(outputs(merged, inputs), outputs(branch, inputs)) < 1e-5
        assert seed or distance(outputs(merged, inputs), expected) < 1e-5
        assert distance(outputs(merged, inputs), before) > 1e-4
        applied.remove()
        port.remove()
        assert same(start, snapshot(merged)) and torch.equal(outputs(merged, inputs), before)


def test_5_patches_add(tmp_path: Path) -> None:
    one, two = (Patch.take(trained(seed=seed, targets=targets)[0])
                for seed, targets in ((1, ("q", "v")), (2, ("v", "mlp.up"))))

    def weights(*patches: Patch, scale: float = 1.0) -> dict[str, torch.Tensor]:
        model = make("bert")
        for patch in patches:
            patch.apply(model, scale)
        return snapshot(model)

    def close(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
        return all(bool(((a[name] - b[name]).abs() <= 1e-6).all()) for name in a)

    assert close(weights(one, two), weights(two, one)) and close(weights(one, two), weights(one + two))
    assert same(weights(one, scale=0.0), weights()) and close(weights(one, one, scale=0.5), weights(one))
    assert close(weights(one + two - two), weights(one)) and close(weights(2 * one - one), weights(one))
    assert all(change.down is not None for change in one.changes.values())


def test_6_portability() -> None:
    """On another base one layer's output changes by exactly s B A x."""
    tuned, method = trained(targets=("q",), layers=(0,), rank=3, alpha=6)
    other = make("bert", seed=1)
    [graft] = method.grafts
    x = torch.randn(2, 32)
    layer = other.get_submodule(graft.site.path)
    before = layer(x)
    with pytest.warns(UserWarning, match="carried from base"):
        Patch.take(tuned).apply(other)
    assert distance(layer(x) - before, 2 * x @ graft.A.t() @ graft.B.t()) < 1e-5


def test_7_training_free() -> None:
    model = make("bert").requires_grad_(False)
    patch = Patch.take(trained()[0])
    with torch.autograd.graph.saved_tensors_hooks(lambda t: pytest.fail("a tensor was kept"), lambda t: t):
        applied = patch.apply(model, keep=False)
    assert not applied.before and not applied.after
    with pytest.raises(ScionError, match="keep=False"):
        applied.remove()
    assert not any(p.requires_grad or p.grad is not None for p in model.parameters())


def test_8_and_9_a_patch_works_on_an_evolved_base() -> None:
    """On a base that has drifted by 2 % of its norm the patch brings most of what it brought on its own; the report
    says how far two patches are apart."""
    tuned, method = trained(targets=("q", "v", "mlp.up", "mlp.down"), seed=3)
    inputs = batch("bert")
    wanted = outputs(tuned, inputs)
    patch = Patch.take(tuned)
    newer = make("bert")
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in newer.parameters():
            if parameter.dim() > 1:
                drift = torch.randn(parameter.shape, generator=generator)
                parameter += 0.02 * drift * parameter.norm() / drift.norm()
    gap = distance(outputs(newer, inputs), wanted)
    patch.apply(newer)
    assert distance(outputs(newer, inputs), wanted) < 0.5 * gap
    other = Patch.take(trained(targets=("q", "v", "mlp.up", "mlp.down"), seed=4)[0])
    report = residual_report(patch, other, make("bert"))
    assert report.keys() == patch.changes.keys()
    assert all(entry["norm"] > 0 and 0 < entry["rank"] <= 16 for entry in report.values())


def test_10_refusals_change_nothing(tmp_path: Path) -> None:
    patch = Patch.take(trained(targets=("q", "mlp.up"))[0])
    wide = make("bert", width=64)
    values = snapshot(wide)
    with pytest.raises(ScionError, match=r"another architecture: .*\[32, 32\] in the patch, \[64, 64\] here"):
        patch.apply(wide)
    with pytest.raises(ScionError, match="is not here"):
        patch.apply(make("ast"))
    bad = Patch({name: change.scaled(float("nan")) for name, change in patch.changes.items()}, patch.base)
    with pytest.raises(ScionError, match="not finite"):
        bad.apply(make("bert"))
    assert same(values, snapshot(wide))
    with pytest.raises(ScionError, match="nothing to take"):
        Patch.take(make("bert"))
    with pytest.raises(ScionError, match="Houlsby cannot be merged"):
        Patch.take(trained(name="Houlsby")[0])
    with pytest.raises(ScionError, match="patch.json"):
        Patch.load(tmp_path)
    patch.save(tmp_path)
    file = tmp_path / "patch.safetensors"
    file.write_bytes(file.read_bytes()[:200])
    with pytest.raises(ScionError, match="damaged"):
        Patch.load(tmp_path)


def test_truncation_and_order(tmp_path: Path) -> None:
    tuned, _ = trained(name="FullFineTuning")
    whole, low = Patch.take(tuned), Patch.take(tuned, rank=2)
    name = next(name for name, change in whole.changes.items() if len(change.shape) == 2)
    u, s, v = torch.linalg.svd(whole.changes[name].dense())
    assert distance(low.changes[name].dense(), (u[:, :2] * s[:2]) @ v[:2]) < 1e-5
    model = make("bert")
    first = whole.apply(model)
    low.apply(model)
    with pytest.raises(ScionError, match="remove what came later"):
        first.remove()


def test_the_adapter_holds_the_patch(tmp_path: Path) -> None:
    """A saved PortLLM needs the patch's folder no more."""
    Patch.take(trained(targets=("q", "mlp.up"))[0]).save(tmp_path / "patch")
    model, inputs = make("bert", seed=1), batch("bert")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        port = PortLLM(patch=str(tmp_path / "patch"), scale=0.5).attach(model)
    port.save(tmp_path / "adapter")
    (tmp_path / "patch" / "patch.json").unlink()
    fresh = make("bert", seed=1)
    load_adapter(tmp_path / "adapter", fresh)
    assert torch.equal(outputs(fresh, inputs), outputs(model, inputs))
    assert fingerprint(make("bert", seed=1)) == fresh.peft.fingerprint  # type: ignore[union-attr]
