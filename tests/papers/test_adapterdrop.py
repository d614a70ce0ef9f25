"""Checks of AdapterDrop: over other methods, in training and after it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from core import load_adapter
from core.compose import Route
from core.errors import ScionError
from core.peft import method_class
from tests.models import batch, make
from tests.papers.training import Deep, run
from tests.rows import Row, Variant
from tests.toolkit import Plain, distance, loader, operators, outputs, randomize, trainer

ROWS = {
    "AdapterDrop": Row(
        {"alone": Variant({"drop": 1}, trains=False)},
        trained=lambda anatomy, method: 0,
        bad=(({"drop": 0}, "drop 0"), ({"drop": "some"}, "'some'"), ({"drop": 99}, "drop 99"),
             ({"drop": "random", "maximum": 99}, "maximum 99"), ({"inference": -1}, "inference -1")),
        saved=0.0,
        absent=("test_nothing_to_train", "test_checkpoint", "test_resume", "test_reproducible",
                "test_no_graph_below_the_first_graft"),
        refused={"albert": "its one layer runs many times, so that there is no first layer to leave out"},
    ),
}

AdapterDrop: Any = method_class("AdapterDrop")
Pfeiffer: Any = method_class("Pfeiffer")
LoRA: Any = method_class("LoRA")


def test_1_count() -> None:
    """Pfeiffer, m = 48, n = 5: 7 / 12 of 894,528."""
    from transformers import BertConfig, BertModel

    with torch.device("meta"):
        model: nn.Module = BertModel(BertConfig())
    host = Pfeiffer().attach(model)
    drop = AdapterDrop(drop=5).attach(model)
    assert host.counts()["method"] == 521_808
    drop.remove()
    assert host.counts()["method"] == 894_528


@pytest.mark.parametrize("host", [lambda: Pfeiffer(bottleneck=4), lambda: LoRA(rank=2), lambda: method_class(
    "PrefixTuning")(tokens=2), lambda: method_class("DoRA")(rank=2)])  # type: ignore[call-arg]
def test_2_the_same_as_without_these_layers(host: Any) -> None:
    """Output, operators and what is kept for backward: as if the host had stood in the other layers alone."""
    torch.manual_seed(0)
    inputs = torch.randn(2, 3, 16, 16)
    model, method = Deep().eval(), host()
    fewer, reference = Deep().eval(), type(method)(**{**method.config, "layers": range(3, 8)})
    fewer.load_state_dict(model.state_dict())
    method.attach(model)
    reference.attach(fewer)
    randomize(method)
    AdapterDrop(drop=3).attach(model)
    with torch.no_grad():
        for name, tensor in reference.live_tensors().items():
            tensor.copy_(method.live_tensors()[name])
    assert torch.equal(outputs(model, inputs), outputs(fewer, inputs))
    assert operators(model, inputs) == operators(fewer, inputs)
    seen: dict[int, bool] = {}
    blocks: Any = model.model.blocks
    for index, block in enumerate(blocks):
        block.register_forward_pre_hook(lambda m, args, i=index: seen.update({i: args[0].requires_grad}))
    model(inputs).sum().backward()
    assert seen == {i: i > 3 for i in range(8)}
    names = {name for name, p in model.named_parameters() if p.grad is not None}
    assert names == {name for name, p in fewer.named_parameters() if p.requires_grad}


def test_3_number_of_a_step() -> None:
    """Uniform over 0 .. 7 (chi-square, 7 degrees of freedom, 0.1 %), a function of seed and step alone."""
    model = Deep()
    LoRA(rank=1).attach(model)
    drop = AdapterDrop(drop="random").attach(model)
    counts = torch.bincount(torch.tensor([drop.number_at(step) for step in range(2000)]), minlength=8)
    assert len(counts) == 8 and float(((counts - 250.0) ** 2 / 250).sum()) < 24.3
    assert [drop.number_at(step) for step in range(9)] == [drop.number_at(step) for step in range(9)]


@pytest.mark.parametrize("inference", [0, 3])
def test_4_random_in_training(inference: int, tmp_path: Path) -> None:
    """Tensors of dropped layers stay bit-equal in a step, all others move; evaluation has ``inference`` dropped."""
    from lightning.pytorch import Callback

    class Watch(Callback):
        seen: list[int] = []

        def on_train_batch_start(self, trainer: Any, module: Any, *_: Any) -> None:
            self.host, self.drop = module.methods
            self.before = [[t.clone() for t in g.parameters()] for g in self.host.grafts]

        def on_train_batch_end(self, trainer: Any, module: Any, *_: Any) -> None:
            moved = [i for i, graft in enumerate(self.host.grafts) if not all(
                torch.equal(a, b) for a, b in zip(self.before[i], graft.parameters(), strict=True))]
            number = self.drop.number_at(trainer.global_step - 1)
            assert moved == list(range(number, 8))
            self.seen.append(number)

    watch = Watch()
    module = run(tmp_path, Pfeiffer(bottleneck=4, init="normal"), AdapterDrop(drop="random", inference=inference),
                 listen=watch)
    assert len(set(watch.seen)) > 3 and min(watch.seen) < 3
    assert [graft.dropped for graft in module.methods[0].grafts] == [i < inference for i in range(8)]  # type: ignore[attr-defined]


def test_4_resumed_run_equals_the_unbroken_one(tmp_path: Path) -> None:
    from lightning.pytorch.callbacks import ModelCheckpoint

    def hosts() -> list[Any]:
        return [LoRA(rank=2), AdapterDrop(drop="random", inference=2)]

    whole = run(tmp_path, *hosts(), listen=ModelCheckpoint(tmp_path, "{step}", every_n_train_steps=6, save_top_k=-1))
    again = run(tmp_path, *hosts(), checkpoint=tmp_path / "step=6.ckpt")
    for one, two in zip(whole.parameters(), again.parameters(), strict=True):
        assert torch.equal(one, two)


def test_5_number_at_inference(tmp_path: Path) -> None:
    """One trained model with any number dropped, whole within ``disabled``; files bring the number along."""
    model, inputs = make("bert"), batch("bert")
    base = outputs(model, inputs)
    host = Pfeiffer(bottleneck=4).attach(model)
    randomize(host)
    full = outputs(model, inputs)
    drop = AdapterDrop(drop="random", inference=1, maximum=1).attach(model)
    one = outputs(model, inputs)
    assert distance(one, full) > 1e-4
    with drop.disabled():
        assert torch.equal(outputs(model, inputs), full)
    with drop.dropped(2):
        assert torch.equal(outputs(model, inputs), base)
    with drop.dropped(0):
        assert torch.equal(outputs(model, inputs), full)
    assert torch.equal(outputs(model, inputs), one)
    from core.adapters.load import save_adapter

    save_adapter([host, drop], tmp_path)
    fresh = make("bert")
    load_adapter(tmp_path, fresh)
    assert torch.equal(outputs(fresh, inputs), one)
    drop.remove()
    assert torch.equal(outputs(model, inputs), full)


def test_6_merge_leaves_out_what_is_dropped() -> None:
    model, inputs = make("timm_vit", dtype=torch.float64), batch("timm_vit", dtype=torch.float64)
    host = LoRA(rank=2).attach(model)
    randomize(host)
    drop = AdapterDrop(drop=1).attach(model)
    expected = outputs(model, inputs)
    with pytest.raises(ScionError, match="merge LoRA first"):
        drop.merge()
    host.merge()
    assert distance(outputs(model, inputs), expected) < 1e-12
    drop.merge()
    assert distance(outputs(model, inputs), expected) < 1e-12 and not hasattr(model, "peft")
    drop.unmerge()
    host.unmerge()
    assert torch.equal(outputs(model, inputs), expected)


def test_7_routed_variants_are_dropped_alike() -> None:
    """A route chooses among what is left, in the dropped layers nothing."""
    model, inputs = make("timm_vit"), batch("timm_vit", 2)
    route = Route([LoRA(name=name, rank=2) for name in ("a", "b")])
    route.attach(model)
    randomize(route)
    AdapterDrop(drop=1).attach(model)
    found = {}
    for i, name in enumerate(("a", "b")):
        other = make("timm_vit")
        lora = LoRA(name=name, rank=2, layers=(1,)).attach(other)
        with torch.no_grad():
            for key, tensor in lora.live_tensors().items():
                tensor.copy_(route.live_tensors()[key.replace(f"peft.{name}.", f"{route.prefix}{name}.")])
        found[name] = outputs(other, inputs)
        with route.route(name):
            assert torch.equal(outputs(model, inputs), found[name])
        with route.route([i, i]):
            assert distance(outputs(model, inputs), found[name]) < 1e-5
    assert torch.equal(outputs(model, inputs), found["a"]) and distance(*found.values()) > 1e-4


def test_8_refusals(tmp_path: Path) -> None:
    with pytest.raises(ScionError, match="put it behind one"):
        run(tmp_path, AdapterDrop())
    with pytest.raises(ScionError, match="put it behind one"):
        module = Plain(make("timm_vit"))
        trainer(tmp_path, method_class("BitFit")(), AdapterDrop(drop=1), max_steps=1).fit(module, loader("timm_vit"))


@pytest.mark.parametrize(("host", "config"), [
    ("VPT", {"deep": False}), ("PromptTuning", {}), ("PTuning", {"hidden": 8})])
def test_prompts_of_all_layers_stay(host: str, config: dict[str, Any]) -> None:
    """They enter at the first layer and leave behind the last: they are no layer's own."""
    model, inputs = make("timm_vit"), batch("timm_vit")
    method_class(host)(**config).attach(model)
    expected = outputs(model, inputs)
    AdapterDrop(drop=1).attach(model)
    assert torch.equal(outputs(model, inputs), expected)
