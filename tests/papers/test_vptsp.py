"""Checks of VPTSP: prompts that are thrown away behind each block, proxies from a second pass, in plain torch."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from core.anatomy import Anatomy, dissect
from core.backbone import Backbone
from core.config.optimizer import OptimizerSettings
from core.data import EpochLoader, EpochSampler
from core.errors import ScionError
from core.graft import checkpoint_activations
from core.peft import method_class
from core.tasks import Classification, Embedding
from core.tasks.embedding import proxy_anchor
from core.training.finetuner import FineTuner
from core.training.head_files import outside
from core.training.load_run import load_run
from core.training.run_record import count, save_run_adapter
from tests.models import batch, make
from tests.rows import NO_ATTENTION, NO_CALL, Row, Variant
from tests.toolkit import distance, outputs, randomize, seeded, trainer


def vptsp_count(anatomy: Anatomy, method: Any) -> int:
    prompts = sum(max(0, method.tokens - i * method.step) * site.width
                  for i, site in enumerate(anatomy.sites("attend", method.layers)))
    biases = [p for name, p in anatomy.root.named_parameters()
              if name.rpartition(".")[2] == "bias" and name not in anatomy.head_names()] if method.biases else []
    return prompts + sum(p.numel() for p in biases)


ROWS = {
    "VPTSP": Row(
        {"prompts": Variant({"tokens": 4}, learns={"lr": 1e-2}, refused=dict.fromkeys(
            ("llama", "t5", "mistral", "gemma", "modernbert", "qwen3", "gemma2", "gemma3", "phi3"),
            "it has no bias to train; the other variant trains none")),
         "falling": Variant({"tokens": 3, "step": 1, "class_depth": 1, "biases": False, "gate": "gru"},
                            moves_base=False, learns={"tokens": 20, "lr": 1e-2})},
        trained=vptsp_count,
        cards=(("vit_b16", {}, 195_072),),
        bad=(({"tokens": -1}, "tokens -1"), ({"class_tokens": 0}, "class_tokens 0"), ({"depth": 0}, "depth 0"),
             ({"beta": 1.5}, "beta 1.5"), ({"gate_dropout": 1.0}, "gate_dropout 1"), ({"gate": "lstm"}, "'lstm'"),
             ({"step": -1}, "step -1")),
        random=True, commutes=None, operators=40, saved=0.9,
        artifact={"tokens": 1, "biases": False},
        refused={**NO_ATTENTION, **NO_CALL},
    ),
}

VPTSP: Any = method_class("VPTSP")
CLASSES = [f"bird {i}" for i in range(6)]
LABELS = torch.tensor([4, 4, 1, 1])
PICTURES = batch("timm_vit", 4)


class Around(Backbone):
    """A model as a domain's backbone."""

    def __init__(self, model: nn.Module, dim: int) -> None:
        super().__init__()
        self.model, self.dim = model, dim

    def forward(self, inputs: Tensor) -> Tensor:
        return self.model(inputs)


def tuner_with(family: str = "timm_vit", task: Any = None, optimizer: str = "AdamW", **options: Any) -> FineTuner:
    """A tiny model with the method on it, and what stands beside it, at values of a fixed seed."""
    with seeded(0):
        tuner = FineTuner(Around(make(family), 32), task or Embedding(dim=8), CLASSES,
                          optimizer=OptimizerSettings(optimizer, 1e-2))
    method = VPTSP(**{"tokens": 4, "class_tokens": 2, **options}).attach(tuner.backbone)
    randomize(method)
    tuner.fit_aside()
    return tuner.train()


def path_of(tuner: FineTuner) -> Any:
    return tuner.aside["VPTSP"]


def step(tuner: FineTuner, labels: Tensor = LABELS, pictures: Tensor = PICTURES) -> Tensor:
    """The loss of a training step."""
    return tuner._losses((pictures, labels), training=True).total


def prepend(args: Any, own: Any) -> Any:
    return torch.cat([own.expand(len(args[0]), -1, -1), args[0]], 1), *args[1:]


def tokens_in(out: Any) -> int:
    return out.shape[1]


def cut(out: Any, own: Any) -> Any:
    return out[:, own.shape[1]:]


def inserted(model: nn.Module, prompts: list[Tensor]) -> list[Any]:
    """Prompts [1 or samples, tokens, dim] in front of each block's tokens, and out again behind it."""
    handles: list[Any] = []
    for block, own in zip(dissect(model).blocks, prompts, strict=True):
        handles.append(block.module.register_forward_pre_hook(lambda module, args, own=own: prepend(args, own)))
        handles.append(block.module.register_forward_hook(lambda module, args, out, own=own: cut(out, own)))
    return handles


def full_size(name: str, dim: int, **options: Any) -> dict[str, int]:
    """Counts on CUB's 100 training classes, without values."""
    import timm

    with torch.device("meta"):
        model = timm.create_model(name, num_classes=0)
        tuner = FineTuner(Around(model, model.num_features), Embedding(dim), [str(i) for i in range(100)])
        VPTSP(**options).attach(tuner.backbone)
        tuner.fit_aside()
    return count(tuner)


# ------------------------------------------------------------------------------------------------- counts


def test_1_counts_of_the_small_vit() -> None:
    """2,701,824 in all are published: 384 of them, in the gate, are never used, and are not made here."""
    counts = full_size("vit_small_patch16_224", 384)
    assert counts["backbone"] == 21_665_664 and counts["method"] == 51_456 + 12 * 10 * 384 == 97_536
    assert counts["head"] == 148_608 and counts["method"] + counts["head"] == 246_144
    gate, prompts, bias = 6 * 384**2 + 3 * 384, 12 * 100 * 3 * 384, 100 * 384
    assert counts["beside"] == gate + 148_608 + prompts + bias == 2_701_824 - 246_144 - 384


def test_2_counts_of_the_base_vit() -> None:
    """4,239,872 in all are published: 512 of the gate, and 1,152,000 of prompts in layers whose step leaves none."""
    counts = full_size("vit_base_patch16_224", 512, tokens=20, class_tokens=5, class_depth=4, class_step=5)
    assert counts["method"] == 102_912 + 184_320 and counts["method"] + counts["head"] == 682_496
    assert counts["beside"] == 4_239_872 - 682_496 - 512 - 3 * 100 * 5 * 768


# ------------------------------------------------------------------------------------------------- prompts


def test_3_each_layer_has_its_own_number_of_prompts() -> None:
    """In, the block run, out: falling by a step, to none at last; each block gives as many tokens as it got."""
    for options, lengths in (({"tokens": 5, "step": 3}, [5, 2]), ({"tokens": 3, "depth": 1}, [3, 0]),
                             ({"tokens": 2, "step": 2}, [2, 0]), ({"tokens": 3, "layers": (1,)}, [0, 3])):
        model, plain = make("timm_vit"), make("timm_vit")
        method = VPTSP(biases=False, **options).attach(model)
        randomize(method, size=1.0)
        own = {graft.site.block: graft.prompt for graft in method.grafts if graft.prompt is not None}
        assert [len(own[i]) if i in own else 0 for i in range(2)] == lengths
        lengths[:] = []
        for block in dissect(model).blocks:
            block.module.register_forward_hook(lambda module, args, out, seen=lengths: seen.append(tokens_in(out)))
        inserted(plain, [own[i].detach()[None] if i in own else torch.zeros(1, 0, 32) for i in range(2)])
        assert distance(outputs(model, PICTURES), outputs(plain, PICTURES)) < 1e-5
        assert lengths == [17, 17]


def test_3_no_prompts_are_the_frozen_model() -> None:
    model = make("timm_vit")
    method = VPTSP(tokens=0).attach(model)
    assert torch.equal(outputs(model, PICTURES), outputs(make("timm_vit"), PICTURES))
    assert set(method.trainable()) == set(method.start) and all(name.endswith("bias") for name in method.start)


def test_start() -> None:
    """Xavier-normal of [1, tokens, dim], and of [classes, tokens, dim]; B of Xavier-uniform / 8; G of unit length."""
    model = make("timm_vit")
    values = torch.cat([graft.prompt for graft in VPTSP(tokens=200).attach(model).grafts]).flatten()
    assert float(values.detach().std()) == pytest.approx((2 / (32 * 201)) ** 0.5, rel=0.05)
    path = path_of(tuner_with(class_tokens=100))
    assert float(path.table.weight.detach().std()) == pytest.approx((2 / (32 * (100 + 6))) ** 0.5, rel=0.05)
    assert torch.allclose(path.running.norm(dim=-1), torch.ones(6))
    weight = path.gate.from_state.weight
    assert 0.95 * (6 / 16) ** 0.5 < weight.abs().max() <= (6 / 16) ** 0.5 and not path.gate.from_input.bias.any()


# ------------------------------------------------------------------------------------------------- the second pass


def expected_proxies(tuner: FineTuner, kind: str = "relu") -> Tensor:
    """The formulas, sample by sample, with the class's prompts put into a plain copy of the model."""
    path, plain = path_of(tuner), Around(make("timm_vit"), 32)
    values = dict(tuner.backbone.named_parameters())
    for name, tensor in plain.named_parameters():  # the trained biases belong to both passes
        tensor.data = values[name].data
    table, running = path.table.weight.detach(), path.running.clone()
    (wu, wr, wn), (uu, ur, un) = (module.weight.detach().chunk(3) for module in (path.gate.from_input,
                                                                                 path.gate.from_state))
    bu, br, bn = path.gate.from_input.bias.detach().chunk(3)
    for c in (4, 1):
        handles = inserted(plain, [table[c, i * 2 * 32:(i + 1) * 2 * 32].view(1, 2, 32) for i in range(2)])
        h = running[c]
        for picture in PICTURES[LABELS == c]:
            with torch.no_grad():
                p = F.normalize(path.head(plain(picture[None])), dim=-1)[0]
            u, r = torch.sigmoid(wu @ p + uu @ h + bu), torch.sigmoid(wr @ p + ur @ h + br)
            n = getattr(torch, "relu" if kind == "relu" else "tanh")(wn @ p + r * (un @ h) + bn)
            h = (1 - u) * n + u * h
        running[c] = h / h.norm()
        for handle in handles:
            handle.remove()
    bias: Any = tuner.task.proxies
    return F.normalize(0.3 * bias.detach() + 0.7 * running, dim=-1)


@pytest.mark.parametrize("kind", ["relu", "gru"])
def test_4_proxies_are_the_formula(kind: str) -> None:
    """Three of six classes have no sample in the batch; they keep their running value."""
    tuner = tuner_with(gate=kind, beta=0.3)
    with torch.no_grad():
        for parameter in path_of(tuner).gate.parameters():
            parameter.add_(0.3 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(0)))
    expected, before = expected_proxies(tuner, kind), path_of(tuner).running.clone()
    loss = step(tuner)
    wanted = proxy_anchor(tuner(PICTURES), LABELS, expected)
    assert float(loss.detach()) == pytest.approx(float(wanted.detach()), rel=1e-5)
    assert float(wanted.detach()) != pytest.approx(float(tuner.loss((PICTURES, LABELS)).detach()), rel=1e-3)
    moved = (path_of(tuner).running - before).abs().amax(-1) > 1e-3
    assert moved.tolist() == [False, True, False, False, True, False]


def test_4_the_first_pass_is_left_alone() -> None:
    """Same outputs as without the second pass, and the model's own prompts again behind it; a gradient reaches
    everything that is trained, the class prompts of the batch's classes alone."""
    tuner = tuner_with()
    alone = tuner(PICTURES)
    losses = tuner._losses((PICTURES, LABELS), training=True)
    assert torch.equal(losses.outputs, alone) and torch.equal(tuner(PICTURES), alone)
    assert all(graft.shown is None for graft in tuner.methods[0].grafts)  # type: ignore[attr-defined]
    losses.total.backward()
    rows = path_of(tuner).table.weight.grad.coalesce()
    assert rows.indices().tolist() == [[1, 4]] and rows.values().any(1).all()
    skip = {id(tensor) for name, tensor in tuner.methods[0].trainable().items() if name in tuner.methods[0].resting()}
    skip.add(id(path_of(tuner).table.weight))
    for name, parameter in tuner.named_parameters():
        if parameter.requires_grad and id(parameter) not in skip:
            assert parameter.grad is not None and parameter.grad.any(), name


def test_4_an_error_brings_the_own_prompts_back() -> None:
    tuner = tuner_with()
    handle = tuner.backbone.register_forward_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        tuner.methods[0].training_loss(tuner, (PICTURES, LABELS), None)
    handle.remove()
    assert all(graft.shown is None for graft in tuner.methods[0].grafts)  # type: ignore[attr-defined]


@pytest.mark.parametrize("family", ["timm_vit", "timm_swin", "vit", "timm_eva"])
def test_4_each_sample_sees_the_prompts_of_its_class(family: str) -> None:
    """As if a method with that class's prompts as its own saw it alone, windows of a map included."""
    tuner, pictures = tuner_with(family, biases=False), batch(family, 4)
    method: Any = tuner.methods[0]
    shown = path_of(tuner).prompts(LABELS[::2])
    with torch.no_grad(), method._showing(shown, 2):
        both = tuner.eval().backbone(pictures)
    for i, rows in enumerate((slice(0, 2), slice(2, 4))):
        for graft, prompts in zip(method.grafts, shown, strict=True):
            graft.prompt.data = prompts[i].detach()
        assert distance(both[rows], outputs(tuner.backbone, pictures[rows])) < 1e-5


def test_4_activation_checkpointing() -> None:
    """What is recomputed in backward sees the prompts that its own forward saw."""
    found = []
    for on in (False, True):
        tuner = tuner_with()
        checkpoint_activations(tuner.backbone, on)
        step(tuner).backward()
        found.append([p.grad.to_dense() for p in tuner.parameters() if p.grad is not None])
    assert len(found[0]) == len(found[1]) > 20
    assert all(distance(one, two) < 1e-4 for one, two in zip(*found, strict=True) if two.abs().max() > 1e-6)


def test_5_evaluation_needs_no_labels() -> None:
    """And leaves G; so does the plain loss of a batch."""
    tuner = tuner_with()
    before = path_of(tuner).running.clone()
    tuner.eval()
    with torch.no_grad():
        tuner(PICTURES)
        tuner.validation_step((PICTURES, torch.tensor([90, 91, 90, 92])), 0)
    tuner.loss((PICTURES, torch.tensor([0, 1, 0, 1])))
    assert torch.equal(path_of(tuner).running, before)


# ------------------------------------------------------------------------------------------------- G


def test_6_with_beta_one_it_is_plain_proxy_anchor() -> None:
    tuner, task = tuner_with(beta=1.0), Embedding(dim=8)
    assert not len(tuner.aside)
    assert torch.equal(step(tuner), tuner.task.loss(tuner(PICTURES), LABELS))  # type: ignore[arg-type]
    beside = tuner_with(beta=0.5, task=task)
    path_of(beside)  # there is one otherwise
    loss = path_of(beside)(torch.zeros(2, 2, 32), LABELS[::2], beside.task.proxies, 1.0)
    assert torch.allclose(loss, F.normalize(beside.task.proxies, dim=-1))  # type: ignore[arg-type]


def test_6_a_closed_gate_keeps_g() -> None:
    tuner = tuner_with()
    path = path_of(tuner)
    before = path.running.clone()
    with torch.no_grad():
        path.gate.from_input.bias[:8] = 1e4
    step(tuner)
    assert distance(path.running, before) < 1e-6


def test_7_g_over_steps() -> None:
    """Unit rows, no gradient into what was, and a graph that does not grow."""
    tuner, sizes = tuner_with(), []
    path = path_of(tuner)
    optimizer = torch.optim.SGD([p for p in tuner.parameters() if p.requires_grad], 0.1)
    for labels in (LABELS, torch.tensor([2, 2, 4, 4]), LABELS, LABELS):
        before = path.running.clone()
        loss = step(tuner, labels)
        seen, waiting = set(), [loss.grad_fn]
        while waiting:
            node: Any = waiting.pop()
            if node is not None and node not in seen:
                seen.add(node)
                waiting += [following for following, _ in node.next_functions]
        sizes.append(len(seen))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        assert torch.allclose(path.running.norm(dim=-1), torch.ones(6), atol=1e-6)
        assert not path.running.requires_grad and path.running.grad_fn is None
        assert not torch.equal(path.running[labels], before[labels])
    assert len(set(sizes)) == 1


def test_7_half_precision() -> None:
    tuner = tuner_with()
    with torch.autocast("cpu", torch.bfloat16):
        loss = step(tuner)
    loss.backward()
    assert loss.dtype == path_of(tuner).running.dtype == torch.float32 and torch.isfinite(loss)
    assert torch.allclose(path_of(tuner).running.norm(dim=-1), torch.ones(6), atol=1e-6)


@pytest.mark.parametrize("kind", [torch.bfloat16, torch.float64])
def test_7_one_precision_throughout(kind: torch.dtype) -> None:
    tuner = tuner_with().to(kind)
    loss = step(tuner, pictures=PICTURES.to(kind))
    loss.backward()
    assert path_of(tuner).running.dtype == kind and torch.isfinite(loss)
    assert all(p.grad is not None and p.grad.dtype == kind for p in path_of(tuner).gate.parameters())


# ------------------------------------------------------------------------------------------------- the table


@pytest.mark.parametrize("bank", [True, False])
def test_8_only_the_rows_of_the_batch_move(bank: bool) -> None:
    """Three steps with two classes each, every class once: each row and its moments are what Adam over the whole table
    gives at the step in which its class comes up; until then, and from then on, it stands still. (eps is nothing here,
    for SparseAdam adds it before its correction of the moments, and Adam behind it.)"""
    tuner = tuner_with(bank=bank)
    table = path_of(tuner).table
    rows = torch.optim.SparseAdam([table.weight], lr=0.01, eps=1e-16)
    whole = nn.Parameter(table.weight.detach().clone())
    dense = torch.optim.Adam([whole], lr=0.01, eps=1e-16)
    start, expected = whole.detach().clone(), {}
    for labels in (torch.tensor([0, 0, 3, 3]), torch.tensor([5, 5, 1, 1]), torch.tensor([2, 2, 4, 4])):
        tuner.zero_grad()
        step(tuner, labels).backward()
        whole.grad = table.weight.grad.to_dense()
        rows.step()
        dense.step()
        for c in set(labels.tolist()):
            moments = dense.state[whole]
            expected[c] = [t[c].clone() for t in (whole.detach(), moments["exp_avg"], moments["exp_avg_sq"])]
            assert not torch.equal(expected[c][0], start[c])
        state = rows.state[table.weight]
        for c in range(6):
            now = [t[c] for t in (table.weight.detach(), state["exp_avg"], state["exp_avg_sq"])]
            zeros = torch.zeros_like(start[c])
            assert all(torch.allclose(one, two, rtol=1e-4, atol=1e-7) for one, two in zip(
                now, expected.get(c, [start[c], zeros, zeros]), strict=True)), c
    assert not torch.equal(whole[0], expected[0][0])  # over the whole table the first rows have drifted on


def test_8_the_bank_stays_on_the_cpu() -> None:
    table = path_of(tuner_with(bank=True)).table
    beside = nn.ModuleDict({"table": table, "other": nn.Linear(2, 2)}).to("meta", torch.bfloat16)
    assert table.weight.device.type == "cpu" and table.weight.dtype == torch.float32
    assert beside["other"].weight.is_meta  # type: ignore[union-attr]


# ------------------------------------------------------------------------------------------------- runs


def run(folder: Path, *callbacks: Any, checkpoint: Path | None = None, method: Any = None, accumulate: int = 1,
        **settings: Any) -> tuple[FineTuner, Any]:
    """A tuner fitted for some steps on batches of three classes, two samples each."""
    with seeded(0):
        tuner = FineTuner(Around(make("timm_vit"), 32), Embedding(dim=8), CLASSES,
                          optimizer=OptimizerSettings("AdamW", 1e-2))
    order = torch.tensor([0, 2, 4, 1, 3, 5, 2, 1, 0, 5, 4, 3]).repeat_interleave(2)
    loader = EpochLoader(TensorDataset(batch("timm_vit", 24), order), batch_size=6,
                         sampler=EpochSampler(24, False, 0), generator=torch.Generator().manual_seed(0))
    method = method or VPTSP(tokens=4, class_tokens=2, gate_dropout=0.1, bank=True)
    fit = trainer(folder, method, *callbacks, accumulate_grad_batches=accumulate,
                  enable_checkpointing=any(isinstance(c, ModelCheckpoint) for c in callbacks),
                  **{"max_steps": 6, **settings})
    with seeded(1):
        fit.fit(tuner, loader, ckpt_path=checkpoint)
    return tuner, fit


def test_9_resuming_is_exact(tmp_path: Path) -> None:
    """Within an epoch: G, proxies, table, moments and losses; the checkpoint alone makes the whole tuner again."""
    keep = ModelCheckpoint(tmp_path, "{step}", every_n_train_steps=3, save_top_k=-1)
    whole, fit_whole = run(tmp_path, keep)
    again, fit = run(tmp_path, checkpoint=tmp_path / "step=3.ckpt")
    one, two = whole.state_dict(), again.state_dict()
    assert one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in one)
    assert {"task.proxies", "aside.VPTSP.running", "aside.VPTSP.table.weight"} < set(one)
    states = [f.optimizers[0].state_dict()["optimizers"] for f in (fit_whole, fit)]
    assert len(states[0]) == 2  # AdamW, and Adam for the table's rows
    for first, second in zip(*states, strict=True):
        assert first["param_groups"] == second["param_groups"] and first["state"].keys() == second["state"].keys()
        for key, values in first["state"].items():
            assert all(torch.equal(torch.as_tensor(v), torch.as_tensor(second["state"][key][n]))
                       for n, v in values.items())
    rates = sorted(group["lr"] for group in whole.param_groups())
    assert rates[-1] == pytest.approx(20 * rates[0])

    fresh = FineTuner(Around(make("timm_vit"), 32), Embedding(dim=8), CLASSES)
    state = torch.load(tmp_path / "step=6.ckpt", weights_only=True)
    fresh.on_load_checkpoint(state)
    fresh.load_state_dict(state["state_dict"])
    assert torch.equal(fresh.eval()(PICTURES), whole.eval()(PICTURES))
    assert torch.equal(path_of(fresh).running, one["aside.VPTSP.running"])


def test_9_the_bank_changes_no_number(tmp_path: Path) -> None:
    one, two = (run(tmp_path, method=VPTSP(tokens=4, class_tokens=2, bank=bank))[0].state_dict()
                for bank in (False, True))
    assert all(torch.equal(one[name], two[name]) for name in one if not name.endswith("_extra_state"))


def test_9_accumulation(tmp_path: Path) -> None:
    """Two batches a step, of different classes: the rows of both move, and no others."""
    tuner, _ = run(tmp_path, accumulate=2, max_steps=1)
    start = path_of(run(tmp_path, max_steps=0)[0]).table.weight
    assert (path_of(tuner).table.weight != start).any(1).all()
    once = path_of(run(tmp_path, max_steps=1)[0]).table.weight
    assert (once != start).any(1).tolist() == [True, False, True, False, True, False]


def test_9_what_a_file_holds(tmp_path: Path) -> None:
    """Prompts, biases and head; a run's model comes back without all that training alone had."""
    from domains.audio import AST

    with seeded(0):
        tuner = FineTuner(AST("nano", pretrained=False, frames=48), Embedding(dim=8), CLASSES)
    method = VPTSP(tokens=3).attach(tuner.backbone)
    randomize(method)
    tuner.fit_aside()
    save_run_adapter(tuner, tmp_path / "adapter")
    loaded = load_run(str(tmp_path))
    sounds = torch.randn(3, 48, 128, generator=torch.Generator().manual_seed(0))
    assert torch.equal(outputs(loaded, sounds), outputs(tuner.eval(), sounds))
    assert not len(loaded.aside) and loaded.task.proxies is None
    assert set(outside(loaded)) == set(outside(tuner)) == {
        f"outside.task.head.{name}" for name in ("0.weight", "0.bias", "1.weight", "1.bias")}
    assert loaded.task.predict(outputs(loaded, sounds))[0]["label"] is None


def test_in_a_classification_it_is_its_prompts_and_biases(tmp_path: Path) -> None:
    tuner = tuner_with(task=Classification())
    assert not len(tuner.aside) and count(tuner)["beside"] == 0
    assert torch.equal(step(tuner), F.cross_entropy(tuner(PICTURES), LABELS))


def test_beside_other_methods(tmp_path: Path) -> None:
    """Another method on the model takes part in both passes."""
    tuner = tuner_with(biases=False)
    lora: Any = method_class("LoRA")(rank=2).attach(tuner.backbone)
    plain = step(tuner)
    path_of(tuner).running.copy_(path_of(tuner_with(biases=False)).running)
    randomize(lora)
    changed = step(tuner)
    assert not torch.allclose(plain, changed)
    changed.backward()
    assert all(p.grad is not None and p.grad.any() for p in lora.trainable().values())


# ------------------------------------------------------------------------------------------------- refusals


@pytest.mark.parametrize("labels", [[1, 1, 1, 2], [1, 2, 1, 2], [1, 1, 2, 2, 1, 1]])
def test_wrong_batches_are_refused(labels: list[int]) -> None:
    """Classes of different numbers, not in a row, or twice."""
    tuner = tuner_with()
    with pytest.raises(ScionError, match="each of its classes once.*MetricLearning"):
        step(tuner, torch.tensor(labels), batch("timm_vit", len(labels)))
    with pytest.raises(ScionError, match="each of its classes once"):
        step(tuner, torch.rand(4, 6))
    roles = torch.stack([LABELS, torch.zeros_like(LABELS)], 1)
    assert torch.isfinite(step(tuner, roles))


def test_what_cannot_be_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ScionError, match="attend"):
        VPTSP().attach(make("timm_convnext"))
    with pytest.raises(ScionError, match="set biases to false"):
        VPTSP().attach(make("llama"))
    with pytest.raises(ScionError, match="gradient_clip_val"):
        run(tmp_path, gradient_clip_val=1.0)
    tuner = tuner_with(task=Embedding(dim=8))
    tuner.aside.clear()
    tuner._trainer = type("Trainer", (), {"world_size": 2})()  # type: ignore[assignment]
    with pytest.raises(ScionError, match="set trainer.devices to 1"):
        tuner.fit_aside()
    with pytest.raises(ScionError, match="trainer.devices: 2 processes; samples are compared"):
        tuner.setup("test")
    two = tuner_with(task=Embedding(dim=8))
    VPTSP(tokens=1, biases=False, name="second").attach(two.backbone)
    with pytest.raises(ScionError, match="second: VPTSP stands beside the model already"):
        two.fit_aside()
