"""Checks of IST: the checks by their numbers there."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from core.anatomy import dissect
from core.errors import ScionError
from core.peft import method_class
from tests.models import batch, make
from tests.papers.training import Deep, run
from tests.rows import Row, Variant
from tests.toolkit import Plain, distance, loader, outputs, randomize, same, snapshot, trainer

ROWS = {
    "IST": Row(
        {"alone": Variant(trains=False)},
        trained=lambda anatomy, method: 0,
        bad=(({"share": 0.0}, "share 0"), ({"suppressed": 1.5}, "suppressed 1.5"), ({"candidates": 1}, "candidates 1"),
             ({"refresh": 0}, "refresh 0")),
        saved=0.0,
        absent=("test_nothing_to_train", "test_checkpoint", "test_resume", "test_reproducible",
                "test_no_graph_below_the_first_graft"),
    ),
}

IST: Any = method_class("IST")


def hosts() -> list[Any]:
    return [method_class("LoRA")(rank=2, targets=("q", "mlp.up")), IST(refresh=4)]  # type: ignore[call-arg]


def test_2_share_of_layers() -> None:
    """12 layers: 3 are trained at a step, 6 suppressed; 73,728 of 294,912 numbers."""
    import timm

    with torch.device("meta"):
        model = timm.create_model("vit_base_patch16_224", num_classes=0)
    lora: Any = method_class("LoRA")(rank=8, targets=("qkv",)).attach(model)  # type: ignore[call-arg]
    ist = IST().attach(model)
    ist.importance = torch.zeros(12)
    layers = ist.layers_at(0)
    assert len(set(layers)) == 3 and all(len(set(s)) == 6 for s in ist.sets_at(10))
    assert lora.counts()["method"] == 294_912
    ist.activate(layers)
    assert sum(t.numel() for t in lora.module.parameters() if t.requires_grad) == 73_728
    ist.release()
    assert lora.counts()["method"] == 294_912


def test_3_idle_layers_stay_bit_equal(tmp_path: Path) -> None:
    """With weight decay on; what stands outside the layers (the head) is trained at every step."""
    from lightning.pytorch import Callback

    class Watch(Callback):
        seen: list[list[int]] = []

        def on_train_batch_start(self, trainer: Any, module: Any, *_: Any) -> None:
            self.lora, self.ist = module.methods
            self.before = [[t.clone() for t in group] for group in self.ist.tensors_of_layers()]
            self.wanted, self.head = self.ist.layers_at(self.ist.steps), next(module.task.parameters()).clone()

        def on_train_batch_end(self, trainer: Any, module: Any, *_: Any) -> None:
            after = self.ist.tensors_of_layers()
            moved = [i for i, (a, b) in enumerate(zip(self.before, after, strict=True))
                     if not all(torch.equal(x, y) for x, y in zip(a, b, strict=True))]
            assert moved == self.wanted and len(moved) == 2
            assert not torch.equal(self.head, next(module.task.parameters()))
            self.seen.append(moved)

    watch = Watch()
    module = run(tmp_path, *hosts(), listen=watch)
    assert len(watch.seen) == 12 and len({tuple(s) for s in watch.seen}) > 3
    assert all(p.requires_grad for group in module.methods[1].tensors_of_layers() for p in group)  # type: ignore[attr-defined]


def test_4_score_update() -> None:
    ist = IST()
    ist.importance = torch.zeros(4)
    ist.score([[0, 1], [1, 2], [2, 3]], [1.0, 0.8, 1.2])
    torch.testing.assert_close(ist.importance, torch.tensor([-0.0123, 0.1790, 0.0123, -0.1790]), atol=1e-4, rtol=0)


def test_5_sampling() -> None:
    """A layer with a large I is hardly ever trained; frequencies follow sigmoid(-I)."""
    ist = IST(share=0.25)
    ist.importance = torch.tensor([5.0, -5.0, -5.0, -5.0])
    assert sum(ist.layers_at(step) == [0] for step in range(2000)) < 10
    ist.importance = torch.tensor([1.0, 0.0, -1.0, 0.5])
    counts = torch.bincount(torch.tensor([ist.layers_at(step)[0] for step in range(4000)]), minlength=4)
    expected = torch.sigmoid(-ist.importance)
    expected = 4000 * expected / expected.sum()
    assert float(((counts - expected) ** 2 / expected).sum()) < 16.3  # chi-square, 3 degrees of freedom, 0.1 %


def test_6_comparison_leaves_no_trace(tmp_path: Path) -> None:
    """Parameters, buffers, modes, scales and random states are what they were; suppression itself has an effect."""
    from lightning.pytorch import Callback

    class Compare(Callback):
        done = False

        def on_train_batch_end(self, trainer: Any, module: Any, outputs: Any, batch: Any, index: int) -> None:
            if trainer.global_step != 6:
                return
            ist = module.methods[1]
            state = {name: t.clone() for name, t in module.state_dict().items()}
            modes = {name: m.training for name, m in module.named_modules()}
            drawn = torch.get_rng_state()
            losses = ist._losses([[0, 1, 2, 3], [4, 5, 6, 7], []])
            assert len(set(losses)) == 3
            assert all(torch.equal(t, state[name]) for name, t in module.state_dict().items())
            assert modes == {name: m.training for name, m in module.named_modules()}
            assert torch.equal(drawn, torch.get_rng_state())
            assert all(graft.strength == 1 for graft in module.methods[0].grafts)
            self.done = True

    compare = Compare()
    run(tmp_path, *hosts(), listen=compare)
    assert compare.done


def test_7_nothing_is_kept_below_the_lowest_layer() -> None:
    backbone = Deep()
    method_class("LoRA")(rank=2).attach(backbone)  # type: ignore[call-arg]
    ist = IST().attach(backbone)
    ist.importance = torch.zeros(8)
    ist.activate([5, 6])
    inputs: dict[int, bool] = {}
    for index, block in enumerate(backbone.model.blocks):
        block.register_forward_pre_hook(lambda m, args, i=index: inputs.update({i: args[0].requires_grad}))
    backbone(torch.randn(2, 3, 16, 16)).sum().backward()
    assert inputs == {i: i > 5 for i in range(8)}


@pytest.mark.parametrize("host", ["LoRA", "DoRA", "Houlsby", "PrefixTuning"])
def test_8_any_host(host: str, tmp_path: Path) -> None:
    module = run(tmp_path, method_class(host)(), IST(refresh=3), steps=7)
    assert module.methods[1].importance.abs().sum() > 0  # type: ignore[attr-defined]


def _suppressed(host: str, config: dict[str, Any], layers: list[int]) -> tuple[Any, Any, Any]:
    """Model, host with random values, and outputs with what it adds in ``layers`` suppressed; all comes back."""
    model, inputs = make("timm_vit", dtype=torch.float64), batch("timm_vit", dtype=torch.float64)
    method: Any = method_class(host)(**config).attach(model)
    ist = IST().attach(model)
    randomize(method, size=0.3)
    before, values = outputs(model, inputs), snapshot(model)
    with ist.suppressing(layers):
        found = outputs(model, inputs)
    assert torch.equal(outputs(model, inputs), before) and same(snapshot(model), values)
    return model, method, found


def test_suppression_of_dora() -> None:
    """m (W + s B A) x / |W + s B A| with s a quarter of what it was; the magnitude m stays."""
    model, method, found = _suppressed("DoRA", {"rank": 2}, [1])
    for graft in method.grafts:
        factor = 0.25 if graft.site.block == 1 else 1.0
        weight = graft.site.matrix(graft.site.full_weight.detach()) + factor * graft.scale * graft.B @ graft.A
        weight = (graft.magnitude / weight.norm(dim=1))[:, None] * weight
        with torch.no_grad():
            graft.site.full_weight.copy_(graft.site.unmatrix(weight, graft.site.full_weight))
    method.remove()
    assert distance(found, outputs(model, batch("timm_vit", dtype=torch.float64))) < 1e-12


PRODUCTS = {"LoRA": ".B", "LoKr": ".C", "PiSSA": "none"}
"""Hosts whose change is a product, and the factor that is multiplied in its place; PiSSA has a scale."""


@pytest.mark.parametrize(("host", "config"), [
    ("OFT", {"block": 4}), ("OFT", {"block": 4, "terms": 0, "targets": ("mlp.up",)}), ("BOFT", {"factors": 2}),
    ("LoRA", {}), ("PiSSA", {"rank": 2}), ("LoKr", {"rank": 1}), ("SVFit", {}), ("Bat", {"rank": 2}),
    ("IA3", {}), ("BitFit", {}), ("FullFineTuning", {}), ("LayerNormTuning", {})], ids=str)
def test_suppression_multiplies_the_distance_from_the_start(host: str, config: dict[str, Any]) -> None:
    """Of what is trained: angles of rotations, scales less one, weights less their start; a rotation stays one."""
    model, method, found = _suppressed(host, config, [0, 1])
    start: Any = method_class(host)(**config, name="start").attach(make("timm_vit", dtype=torch.float64))
    ends = dict(start.trainable())
    with torch.no_grad():
        for name, tensor in method.trainable().items():
            if host in PRODUCTS:
                tensor.mul_(0.25 if name.endswith(PRODUCTS[host]) else 1.0)
            elif "peft." in name or any(name.startswith(f"{block.path}.") for block in dissect(model).blocks):
                first = ends[name.replace(f"peft.{host}.", "peft.start.")]
                tensor.copy_(first + 0.25 * (tensor - first))
    for graft in method.grafts if host == "PiSSA" else ():
        graft.scale *= 0.25
    assert distance(found, outputs(model, batch("timm_vit", dtype=torch.float64))) < 1e-10


def test_suppression_of_entries_of_parameters() -> None:
    """Entries that lie in a layer's tensors are the layer's, whichever module they stand at."""
    model, inputs = make("timm_vit", dtype=torch.float64), batch("timm_vit", dtype=torch.float64)
    method: Any = method_class("LTSFT")(count=400).attach(model)  # type: ignore[call-arg]
    randomize(method)
    method.advance()
    randomize(method, size=0.3)
    ist = IST().attach(model)
    with ist.suppressing([0, 1]):
        found = outputs(model, inputs)
    for graft in method.grafts:
        if ".blocks." in graft.site.weight_name:
            graft.values.data *= 0.25
    assert distance(found, outputs(model, inputs)) < 1e-12


def test_what_stands_for_all_layers_is_not_suppressed() -> None:
    """Prompts that enter at the first block, and a side network's final map; a step of the ladder is."""
    model, inputs = make("timm_vit"), batch("timm_vit")
    method_class("VPT")(deep=False).attach(model)  # type: ignore[call-arg]
    expected, ist = outputs(model, inputs), IST().attach(model)
    with ist.suppressing([0, 1]):
        assert torch.equal(outputs(model, inputs), expected)
    assert not any(ist.tensors_of_layers())
    _, method, found = _suppressed("LadderSideTuning", {"reduction": 4, "dropout": 0.0}, [1])
    model = make("timm_vit", dtype=torch.float64)
    twin: Any = method_class("LadderSideTuning")(reduction=4, dropout=0.0).attach(model)  # type: ignore[call-arg]
    twin.module.load_state_dict(method.module.state_dict())
    graft = next(graft for graft in twin.grafts if graft.site.block == 1)
    step = graft._step
    graft._step = lambda u, call, dtype: graft.run.state + 0.25 * (step(u, call, dtype) - graft.run.state)
    assert distance(found, outputs(model, batch("timm_vit", dtype=torch.float64))) < 1e-12


@pytest.mark.parametrize("host", ["LoHa", "BOFT", "LoRA", "DoRA"])
def test_backward_sees_the_strength_of_its_forward(host: str) -> None:
    """Also where the weight is made again in backward."""
    found = []
    for early in (True, False):
        model, inputs = make("timm_vit", dtype=torch.float64), batch("timm_vit", dtype=torch.float64)
        method: Any = method_class(host)().attach(model)
        randomize(method, size=0.3)
        with IST().attach(model).suppressing([0]):
            loss = model(inputs).square().sum()
            if early:
                loss.backward()
        if not early:
            loss.backward()
        found.append([p.grad for p in method.trainable().values()])
    assert all(torch.equal(one, two) for one, two in zip(*found, strict=True))


def test_resumed_run_equals_the_unbroken_one(tmp_path: Path) -> None:
    from lightning.pytorch.callbacks import ModelCheckpoint

    whole = run(tmp_path, *hosts(), listen=ModelCheckpoint(tmp_path, "{step}", every_n_train_steps=6, save_top_k=-1))
    again = run(tmp_path, *hosts(), checkpoint=tmp_path / "step=6.ckpt")
    for one, two in zip(whole.parameters(), again.parameters(), strict=True):
        assert torch.equal(one, two)
    assert torch.equal(whole.methods[1].importance, again.methods[1].importance)  # type: ignore[attr-defined, arg-type]


def test_refusals(tmp_path: Path) -> None:
    with pytest.raises(ScionError, match="put it behind a method"):
        run(tmp_path, IST())
    with pytest.raises(ScionError, match="no loss"):
        module: nn.Module = Plain(make("timm_vit"))
        trainer(tmp_path, method_class("LoRA")(), IST(), max_steps=1).fit(module, loader("timm_vit"))  # type: ignore[arg-type]
