"""Compositions beside `Route`: methods fused, and methods that share a sequence; and what holds for all of them."""

from __future__ import annotations

import copy
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from core import load_adapter, peft
from core.anatomy import dissect
from core.compose import Average, Fuse, Route, Split
from core.errors import ScionError
from core.graft import checkpoint_activations
from core.method import methods_on
from core.peft import (  # type: ignore[attr-defined]
    AdaLoRA,
    Houlsby,
    LanguageAdapter,
    LoRA,
    Pfeiffer,
    PrefixTuning,
)
from tests.models import batch, make
from tests.toolkit import (
    EVERYTHING,
    Plain,
    differences,
    distance,
    loader,
    outputs,
    problem,
    randomize,
    same,
    snapshot,
    trace,
    train,
    trainer,
)

FAMILIES = ("timm_vit", "bert", "llama")


def pfeiffers(*names: str, **options: Any) -> list[Any]:
    return [Pfeiffer(**{"name": name, "bottleneck": 3, "init": "normal", **options}) for name in names]


def shaken(method: Any, size: float = 0.3) -> Any:
    """All its tensors moved, frozen ones too."""
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for tensor in method.tensors().values():
            tensor += size * torch.randn(tensor.shape, generator=generator).to(tensor)
    return method


def copied(one: Any, into: Any, name: str, prefix: str = "") -> None:
    """The tensors of one method within a composition, into the same method alone."""
    with torch.no_grad():
        for key, tensor in into.tensors().items():
            tensor.copy_(one.tensors()[key.replace(into.prefix, f"{one.prefix}{name}.")])


COMPOSITIONS: dict[str, Callable[[], Any]] = {
    "Route": lambda: Route(pfeiffers("a", "b")),
    "Fuse": lambda: Fuse(pfeiffers("a", "b", "c")),
    "Fuse Houlsby": lambda: Fuse([Houlsby(name=name, bottleneck=2, init="normal") for name in "ab"], dropout=0.0),
    "Split": lambda: Split(pfeiffers("a", "b"), by=5),
    "Split LoRA": lambda: Split([LoRA(name=name, rank=2, targets=("q", "mlp.up")) for name in "ab"], by=5),
    "Split LanguageAdapter": lambda: Split([LanguageAdapter(name=name, bottleneck=2) for name in "ab"], by=5),
    "Average": lambda: Average([LoRA(name=name, rank=2, targets=("q", "mlp.up")) for name in "abc"]),
    "nested": lambda: Route([Fuse(pfeiffers("a", "b"), name="fused"), Split(pfeiffers("c", "d"), by=5, name="split"),
                             LoRA(rank=2)]),
}


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("kind", COMPOSITIONS)
def test_on_off_saved_copied_removed(kind: str, family: str, tmp_path: Path) -> None:
    model, inputs = make(family), batch(family)
    left, values, expected = trace(model), snapshot(model), outputs(model, inputs)
    method = COMPOSITIONS[kind]().attach(model)
    shaken(method)
    now = outputs(model, inputs)
    assert distance(now, expected) > 1e-4 and same(values, snapshot(model))
    with method.disabled():
        assert torch.equal(outputs(model, inputs), expected)
    assert torch.equal(outputs(model, inputs), now)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(outputs(other, inputs), now)
        methods_on(other)[0].remove()
        assert torch.equal(outputs(other, inputs), expected)
    trained = method.trainable()
    assert method.counts()["method"] == sum(tensor.numel() for tensor in trained.values()) > 0
    assert {name for name, p in model.named_parameters() if p.requires_grad} == set(trained)
    assert len({id(tensor) for tensor in trained.values()}) == len(trained)
    method.save(tmp_path)
    fresh = make(family)
    loaded: Any = load_adapter(tmp_path, fresh)
    assert type(loaded) is type(method) and torch.equal(outputs(fresh, inputs), now)
    assert same(method.tensors(), loaded.tensors()) and (
        [m.name for m in loaded.methods] == [m.name for m in method.methods])
    state = model.state_dict()
    loaded.remove()
    again = eval(repr(method), {**{name: getattr(peft, name) for name in peft.registry()}, "Route": Route,
                                "Fuse": Fuse, "Split": Split, "Average": Average}).attach(fresh)
    assert not torch.equal(outputs(fresh, inputs), now)
    fresh.load_state_dict(state)
    assert torch.equal(outputs(fresh, inputs), now)
    again.remove()
    assert same(values, snapshot(fresh)) and not hasattr(fresh, "peft")
    with pytest.raises(ScionError, match="cannot be merged"):
        method.merge()
    method.remove()
    assert differences(left, trace(model)) == [] and torch.equal(outputs(model, inputs), expected)


@pytest.mark.parametrize("kind", COMPOSITIONS)
def test_frozen_under_another_method(kind: str) -> None:
    """trainable=False: in the forward, and no gradient."""
    model, inputs = make("bert"), batch("bert")
    below = COMPOSITIONS[kind]()
    frozen = type(below)(**{**below.config, "trainable": False}).attach(model)
    shaken(frozen)
    now, values = outputs(model, inputs), {name: t.clone() for name, t in frozen.tensors().items()}
    assert frozen.trainable() == {} and not any(p.requires_grad for p in model.parameters())
    above = Pfeiffer(bottleneck=2).attach(model)
    assert torch.equal(outputs(model, inputs), now)
    train(model, above, "bert")
    assert same(values, frozen.tensors()) and distance(outputs(model, inputs), now) > 1e-4


@pytest.mark.parametrize("kind", [kind for kind in COMPOSITIONS if kind != "nested"] if EVERYTHING else
                         ["Fuse", "Split"])
def test_compiled_and_recomputed(kind: str) -> None:
    inputs, found = batch("bert"), []
    for way in ("plain", "recomputed", "compiled"):
        model = make("bert")
        method = shaken(COMPOSITIONS[kind]().attach(model))
        checkpoint_activations(model, way == "recomputed")
        run = torch.compile(model, backend="aot_eager", fullgraph=True) if way == "compiled" else model
        out = run(inputs)
        out.square().sum().backward()
        found.append((out, {name: tensor.grad for name, tensor in method.trainable().items()}))
    for out, gradients in found[1:]:
        assert distance(out, found[0][0]) < 1e-5
        for name, gradient in gradients.items():
            expected = found[0][1][name]
            assert (gradient is None) == (expected is None), name
            assert gradient is None or torch.allclose(gradient, expected, rtol=1e-4, atol=1e-5), name


@pytest.mark.parametrize("kind", ["Fuse", "Split", "Split LanguageAdapter"])
def test_half_precision(kind: str) -> None:
    inputs, found = batch("bert"), []
    for dtype in (torch.float32, torch.bfloat16):
        model = make("bert", dtype=dtype)
        method = shaken(COMPOSITIONS[kind]().attach(model))
        assert {tensor.dtype for tensor in method.tensors().values()} == {torch.float32}
        found.append(outputs(model, inputs))
    assert found[1].dtype == torch.bfloat16 and distance(found[1], found[0]) < 3e-2


def test_rows_of_a_batch_see_fused_and_split_variants() -> None:
    """Route over compositions: row i is what it is alone, with a boundary of its own."""
    model, inputs = make("bert"), batch("bert", 4)
    kinds = torch.zeros_like(inputs)
    for i, start in enumerate((3, 6, 12, 1)):
        kinds[i, start:] = 1
    route: Any = Route([Fuse(pfeiffers("a", "b"), name="fused"), Split(pfeiffers("c", "d"), by="token_type",
                                                                         name="split")]).attach(model)
    shaken(route)
    assert {graft.site.block for graft in route.grafts} == {0, 1, None}

    def run() -> Tensor:
        with torch.no_grad():
            return model.model(inputs, token_type_ids=kinds).last_hidden_state

    with route.route("fused"):
        fused = run()
    with route.route("split"):
        split = run()
    with route.route([1, 0, 1, 1]):
        mixed = run()
    assert distance(fused, split) > 1e-4
    for i, expected in enumerate((split, fused, split, split)):
        assert distance(mixed[i], expected[i]) < 1e-5
    assert route.adds_loss and route.loss_terms(None, None, None) is not None


def test_members_add_their_losses() -> None:
    route: Any = Route([AdaLoRA(name="a", rank=4, target_rank=2), AdaLoRA(name="b", rank=4, target_rank=2)])
    route.attach(make("bert"))
    alone: Any = AdaLoRA(name="a", rank=4, target_rank=2).attach(make("bert"))
    copied(route, alone, "a")
    terms = [method.loss_terms(None, None, None) for method in route.methods]
    assert route.adds_loss and torch.equal(terms[0], alone.loss_terms(None, None, None))
    torch.testing.assert_close(route.loss_terms(None, None, None), terms[0] + terms[1])


# ------------------------------------------------------------------------------------------------- fuse


def bottleneck(graft: Any, z: Tensor) -> Tensor:
    return graft.up(torch.relu(graft.down(z)))


def fused(graft: Any, z: Tensor, changes: list[Tensor]) -> Tensor:
    """The paper's equations, adapter by adapter."""
    scores = torch.stack([((graft.query(z)) * graft.key(a)).sum(-1) for a in changes], -1).softmax(-1)
    return sum(scores[..., n, None] * graft.value(a) for n, a in enumerate(changes))  # type: ignore[return-value]


@pytest.mark.parametrize("family", ["timm_vit", "bert"])
def test_fusion_is_the_papers(family: str) -> None:
    model, inputs = make(family, dtype=torch.float64), batch(family, dtype=torch.float64)
    fuse: Any = Fuse(pfeiffers("a", "b", "c")).attach(model)
    shaken(fuse)
    graft: Any = fuse.grafts[0]
    block: Any = dissect(model).blocks[0].module
    parts = [fuse.branch(method)[0] for method in fuse.methods]
    seen: dict[str, Tensor] = {}
    block.register_forward_hook(lambda module, args, out: seen.update(out=out))
    if family == "bert":
        block.attention.register_forward_hook(lambda module, args, out: seen.update(x=out[0]))
    else:
        block.norm2.register_forward_hook(lambda module, args, out: seen.update(x=args[0], z=out))
    outputs(model, inputs)
    x = seen["x"]
    with torch.no_grad(), fuse.disabled():
        if family == "bert":
            h, norm = block.output.dense(block.intermediate(x)), block.output.LayerNorm
            z = norm(h + x)
            expected = norm(h + fused(graft, z, [bottleneck(part, z) for part in parts]) + x)
        else:
            h = block.mlp(block.norm2(x))
            expected = x + h + fused(graft, h, [bottleneck(part, h) for part in parts])
    assert distance(seen["out"], expected) < 1e-12


def test_published_count_of_fusion() -> None:
    from transformers import BertConfig, BertModel

    with torch.device("meta"):
        one, two = (BertModel(BertConfig()) for _ in range(2))
    assert Fuse([Pfeiffer(name=name) for name in "abc"]).attach(one).counts()["method"] == 21_252_096
    counts = Fuse([Pfeiffer(name=name) for name in "ab"], dropout=0.0).attach(two).counts()
    assert counts["method"] == 21_252_096 - 12 * 768 and counts["stored"] == counts["method"] + 2 * 894_528


def test_fusion_starts_as_a_mean_and_learns() -> None:
    """V starts as the identity: with equal adapters the first output is that of one; adapters stay as they are."""
    model, inputs = make("bert"), batch("bert")
    fuse: Any = Fuse(pfeiffers("a", "b")).attach(model)
    with torch.no_grad():
        for one, two in zip(*(fuse.branch(method) for method in fuse.methods), strict=True):
            for mine, theirs in zip(two.parameters(), one.parameters(), strict=True):
                mine.copy_(theirs)
    alone_model = make("bert")
    alone: Any = Pfeiffer(name="a", bottleneck=3).attach(alone_model)
    copied(fuse, alone, "a")
    assert distance(outputs(model, inputs), outputs(alone_model, inputs)) < 1e-4
    graft: Any = fuse.grafts[0]
    value = graft.value.weight
    assert torch.equal(value.diagonal(), torch.ones(32)) and float(value[0, 1].detach()) == pytest.approx(1e-6)
    shaken(fuse)
    before = {name: tensor.clone() for name, tensor in fuse.tensors().items()}
    (inputs, labels), head = problem("bert", size=8)[0][0], problem("bert", size=8)[1]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        torch.nn.functional.cross_entropy(model.train()(inputs) @ head, labels).backward()
    model.eval()
    assert all(tensor.grad is not None and tensor.grad.any() for tensor in fuse.trainable().values())
    train(model, fuse, "bert", steps=4)
    after = fuse.tensors()
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    assert moved == set(fuse.trainable())
    assert not any(name.split(".")[2] in ("a", "b") for name in moved)


def test_penalty_on_the_values() -> None:
    fuse: Any = Fuse(pfeiffers("a", "b"), penalty=0.02).attach(make("bert"))
    shaken(fuse)
    eye = torch.eye(32)
    expected = 0.02 * sum(float((graft.value.weight - eye).square().sum()) for graft in fuse.grafts)
    term = fuse.loss_terms(None, None, None)
    assert float(term) == pytest.approx(expected, rel=1e-5) and fuse.adds_loss
    term.backward()
    gradient = fuse.grafts[0].value.weight.grad
    torch.testing.assert_close(gradient, 0.04 * (fuse.grafts[0].value.weight.detach() - eye))
    assert not Fuse(pfeiffers("a", "b"), penalty=0.0).adds_loss
    assert Fuse(pfeiffers("a", "b"), penalty=0.0).attach(make("bert")).loss_terms(None, None, None) is None


@pytest.fixture
def folders(tmp_path: Path) -> list[str]:
    """Two trained adapters of one name, and one of another width."""
    found = []
    for i, width in enumerate((3, 3, 4)):
        model = make("bert")
        method = shaken(Pfeiffer(bottleneck=width, init="normal", seed=i).attach(model))
        found.append(str(method.save(tmp_path / f"adapter {i}")))
    return found


def test_from_folders(folders: list[str], tmp_path: Path) -> None:
    model, inputs = make("bert"), batch("bert")
    entries = [folders[0], {"adapter": folders[1], "name": "other"}, {"adapter": folders[2], "name": "wide"},
               {"class": "Pfeiffer", "name": "fresh", "bottleneck": 2}]
    fuse: Any = peft.make("Fuse", {"methods": entries})
    assert repr(fuse) == f"Fuse(methods={[*entries[:3], fuse.methods[3]]!r})" and not fuse.identity_at_start
    fuse.attach(model)
    for entry, name in zip(entries[:3], ("Pfeiffer", "other", "wide"), strict=True):
        source = make("bert")
        alone: Any = load_adapter(entry if isinstance(entry, str) else entry["adapter"], source)
        for key, tensor in alone.tensors().items():
            assert torch.equal(tensor, fuse.tensors()[key.replace(alone.prefix, f"{fuse.prefix}{name}.")])
    shaken(fuse)
    now = outputs(model, inputs)
    fuse.save(tmp_path / "fused")
    for folder in folders:
        shutil.rmtree(folder)
    fresh = make("bert")
    loaded: Any = load_adapter(tmp_path / "fused", fresh)
    assert torch.equal(outputs(fresh, inputs), now) and [m.name for m in loaded.methods] == [
        "Pfeiffer", "other", "wide", "fresh"]


def test_trained_adapters_are_routed_and_split(folders: list[str]) -> None:
    entries = [folders[0], {"adapter": folders[1], "name": "other"}]
    model, inputs = make("bert"), batch("bert")
    route: Any = Route(entries).attach(model)
    alone = make("bert")
    load_adapter(folders[1], alone)
    with route.route("other"):
        assert torch.equal(outputs(model, inputs), outputs(alone, inputs))
    route.remove()
    Split(entries, by=0).attach(model)
    assert torch.equal(outputs(model, inputs), outputs(alone, inputs))


def test_bad_folders(folders: list[str], tmp_path: Path) -> None:
    stack = make("bert")
    methods = [Pfeiffer(bottleneck=2).attach(stack), LoRA(rank=2).attach(stack)]
    from core.adapters.load import save_adapter

    save_adapter(methods, tmp_path / "stack")
    for entries, words in (([folders[0], folders[1]], "names of their own"), ([str(tmp_path / "none"), folders[0]],
                           "no adapter.json"), ([{"adapter": folders[0], "rank": 2}, folders[1]], "not 'rank'"),
                           ([str(tmp_path / "stack"), folders[1]], "holds 2 methods")):
        with pytest.raises(ScionError, match=words):
            Fuse(entries)
    fuse = Fuse([folders[0], {"adapter": folders[1], "name": "other"}])
    for model, words in ((make("bert", seed=3), "another base"), (make("bert", width=16), "another base")):
        left = trace(model)
        with pytest.raises(ScionError, match=words):
            fuse.attach(model)
        assert differences(left, trace(model)) == []
    fuse.trained["other"][2]["more"] = torch.zeros(2)
    with pytest.raises(ScionError, match=r"more is \[2\] in the file, absent here"):
        fuse.attach(make("bert"))


@pytest.mark.parametrize(("method", "options"), [("AdaLoRA", {}), ("VQT", {"keep": 0.5})])
def test_what_steers_its_training_trains_alone(method: str, options: dict[str, Any], tmp_path: Path) -> None:
    """Schedules and stages are refused where a Route is to be trained, not where it stands."""
    route = [peft.make(method, {**options, "name": name, "trainable": name == "b"}) for name in "ab"]
    Route(copy.deepcopy(route)).attach(make("ast"))
    with pytest.raises(ScionError, match="Route: b steers its own training"):
        trainer(tmp_path, Route(route), max_steps=1).fit(Plain(make("ast")), loader("ast"))


@pytest.mark.parametrize(("methods", "words"), [
    (lambda: [LoRA(name=name) for name in "ab"], "LoRAGraft.*no change of a block's hidden state"),
    (lambda: [PrefixTuning(name=name, tokens=2) for name in "ab"], "no change of a block's hidden state"),
    (lambda: [LanguageAdapter(name=name) for name in "ab"], "invertible=False"),
    (lambda: [Pfeiffer(), Houlsby()], "same sites"),
    (lambda: [Pfeiffer(name="a", layers=(0,)), Pfeiffer(name="b")], "same sites"),
])
def test_what_cannot_be_fused(methods: Callable[[], list[Any]], words: str) -> None:
    model = make("bert")
    left = trace(model)
    with pytest.raises(ScionError, match=words) as refusal:
        Fuse(methods()).attach(model)
    assert "\n" not in str(refusal.value) and differences(left, trace(model)) == []


def test_bad_values() -> None:
    pair = pfeiffers("a", "b")
    for make_it, words in ((lambda: Fuse(pair[:1]), "nothing to choose"),
                           (lambda: Fuse(pair, dropout=1.0), "dropout 1"),
                           (lambda: Fuse(pair, penalty=-1), "penalty -1"), (lambda: Fuse(pair, layers=(0,)), "layers"),
                           (lambda: Fuse([*pair, LoRA(norms=("norm",))]), "trains the backbone itself"),
                           (lambda: Average(pair[:1]), "its own average"),
                           (lambda: Average(pair, weights=[1]), "1 weights of 2"),
                           (lambda: Average(pair, weights=[1, -1]), "numbers from 0"),
                           (lambda: Average(pair, weights=[0, 0]), "not all of them 0"),
                           (lambda: Split(pair[:1]), "two methods"), (lambda: Split(pair, by=-1), "by -1"),
                           (lambda: Split(pair, by="token_typ"), "'token_type'"),
                           (lambda: Split(pair, by="separator"), "go together"),
                           (lambda: Split(pair, by=3, separator=4), "go together")):
        with pytest.raises(ScionError, match=words):
            make_it()


# ------------------------------------------------------------------------------------------------- average


@pytest.mark.parametrize("family", FAMILIES)
def test_the_average_of_linear_changes_is_one_change(family: str) -> None:
    """Shares 3/4 and 1/4 of two LoRAs: one whose matrices stand side by side, scaled by them."""
    model, inputs = make(family, dtype=torch.float64), batch(family, dtype=torch.float64)
    average: Any = shaken(Average([LoRA(name=name, rank=2, targets=("mlp.up",)) for name in "ab"], weights=[3, 1]
                                  ).attach(model))
    plain = make(family, dtype=torch.float64)
    one: Any = LoRA(name="one", rank=4, alpha=4, targets=("mlp.up",)).attach(plain)
    tensors = average.tensors()
    with torch.no_grad():
        for key, tensor in one.tensors().items():
            parts = [tensors[key.replace(one.prefix, f"{average.prefix}{name}.")].double() for name in "ab"]
            if key.endswith(".B"):
                parts = [0.75 * parts[0], 0.25 * parts[1]]
            tensor.copy_(torch.cat(parts, 1 if key.endswith(".B") else 0))
    assert distance(outputs(model, inputs), outputs(plain, inputs)) < 1e-6


def test_averages_of_trained_adapters(tmp_path: Path) -> None:
    """Of folders; a weight of 0 leaves a method out; all that stands on the same sites goes, and nothing else."""
    folders = []
    for name in "ab":
        model = make("bert")
        shaken(Pfeiffer(bottleneck=2, name=name).attach(model)).save(tmp_path / name)
        folders.append(str(tmp_path / name))
    alone = make("bert")
    load_adapter(folders[1], alone)
    model, inputs = make("bert"), batch("bert")
    Average(folders, weights=[0, 2]).attach(model)
    assert distance(outputs(model, inputs), outputs(alone, inputs)) < 1e-6
    with pytest.raises(ScionError, match="at the same sites"):
        Average([Pfeiffer(bottleneck=2, name="a"), LoRA(name="b")]).attach(make("bert"))
    with pytest.raises(ScionError, match="cannot be averaged"):
        Average([peft.make("LoKr", {"name": name}) for name in "ab"]).attach(make("bert"))


# ------------------------------------------------------------------------------------------------- split


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("cls", [Pfeiffer, Houlsby, LanguageAdapter, LoRA])
def test_equal_halves_are_one_adapter(cls: Any, family: str) -> None:
    options = {"rank": 2} if cls is LoRA else {"bottleneck": 3, "init": "normal"}
    model, one, inputs = make(family), make(family), batch(family)
    split: Any = Split([cls(name=name, **options) for name in "ab"]).attach(model)
    single: Any = shaken(cls(name="a", **options).attach(one))
    with torch.no_grad():
        for key, tensor in split.tensors().items():
            tensor.copy_(single.tensors()[f"{single.prefix}{key.removeprefix(split.prefix)[2:]}"])
    expected = outputs(one, inputs)
    for at in (0, 1, 5, [2, 0, 7], torch.tensor([12, 1, 99])):
        with split.at(at):
            assert torch.equal(outputs(model, inputs), expected)
    with pytest.raises(ScionError, match="by="):
        outputs(model, inputs)


def test_each_adapter_sees_its_positions_alone() -> None:
    """In a layer taken alone: the first's gradient is zero from the boundary on, the second's before it."""
    model = make("bert", dtype=torch.float64)
    split: Any = shaken(Split(pfeiffers("a", "b"), by=4).attach(model))
    layer: Any = dissect(model).blocks[0].module.output
    generator = torch.Generator().manual_seed(0)
    h = torch.randn(2, 9, 64, dtype=torch.float64, generator=generator)
    x = torch.randn(2, 9, 32, dtype=torch.float64, generator=generator)
    first, second = (list(split.branch(method)[0].parameters()) for method in split.methods)
    out = layer(h, x).square().sum((0, 2))
    for position in range(9):
        mine, other = (first, second) if position < 4 else (second, first)
        gradients = torch.autograd.grad(out[position], [*mine, *other], retain_graph=True)
        assert any(gradient.any() for gradient in gradients[:len(mine)])
        assert not any(gradient.any() for gradient in gradients[len(mine):])


def run(model: Any, ids: Tensor, kinds: Tensor | None = None) -> Tensor:
    return model.model(ids, token_type_ids=kinds).last_hidden_state


STARTS = (3, 7, 12, 0)


def pairs() -> tuple[Tensor, Tensor]:
    """Four sequences of twelve and their token types; the third has one part only."""
    ids = batch("bert", 4)
    return ids, (torch.arange(12) >= torch.tensor(STARTS)[:, None]).long()


def test_by_token_type() -> None:
    model, (ids, kinds) = make("bert"), pairs()
    split: Any = shaken(Split(pfeiffers("a", "b"), by="token_type").attach(model))
    with torch.no_grad():
        found = run(model, ids, kinds)
        with split.at(STARTS):
            assert torch.equal(found, run(model, ids, kinds))
        with split.at(5):
            assert not torch.equal(found, run(model, ids, kinds))
        assert torch.equal(found, run(model, ids, kinds))
        with pytest.raises(ScionError, match="token_type_ids"):
            run(model, ids)
        for i in range(4):  # each sample as in a batch of its own
            assert distance(run(model, ids[i:i + 1], kinds[i:i + 1])[0], found[i]) < 1e-5
    with pytest.raises(ScionError, match="3 samples are split, but 4 rows"), split.at([1, 2, 3]):
        run(model, ids, kinds)
    for bad in ([[1]], -1, [2, -1]):
        with pytest.raises(ScionError, match="one index a sample"), split.at(bad):
            pass


@pytest.mark.parametrize("family", ["bert", "llama"])
@pytest.mark.parametrize("run_of", [1, 2])
def test_by_separator(family: str, run_of: int) -> None:
    """What follows [SEP], or the </s></s> of XLM-R."""
    model, ids = make(family), torch.randint(1, 40, (3, 12), generator=torch.Generator().manual_seed(0))
    for i, place in enumerate((2, 5, 8)):
        ids[i, place:place + run_of] = 45
    ids[:, 11] = 45
    split: Any = shaken(Split(pfeiffers("a", "b"), by="separator", separator=45).attach(model))
    found = outputs(model.model, ids).last_hidden_state  # type: ignore[attr-defined]
    with split.at([place + run_of for place in (2, 5, 8)]):
        assert torch.equal(found, outputs(model.model, ids).last_hidden_state)  # type: ignore[attr-defined]
    with pytest.raises(ScionError, match="input_ids, which were not given"), torch.no_grad():
        model.model(inputs_embeds=torch.zeros(1, 3, 32))


def test_two_forwards_with_recomputation() -> None:
    """Each recomputed block is split where it was in its own forward."""
    ids, kinds = pairs()
    found: list[list[Tensor]] = []
    for on in (False, True):
        model = make("bert")
        split: Any = shaken(Split(pfeiffers("a", "b"), by="token_type").attach(model))
        checkpoint_activations(model, on)
        loss = run(model, ids, kinds).square().sum() + run(model, ids.flip(0), kinds).square().sum()
        loss.backward()
        found.append([tensor.grad.clone() for tensor in split.trainable().values()])
    assert all(torch.allclose(one, two, rtol=1e-4, atol=1e-5) for one, two in zip(*found, strict=True))


def test_ranking_adapter_on_split_language_adapters() -> None:
    """Query and document each through their language's frozen adapter, then one ranking adapter over both."""
    model, (ids, kinds) = make("bert"), pairs()
    languages: Any = Split([LanguageAdapter(name=name, bottleneck=3) for name in ("query", "document")],
                           by="token_type", trainable=False).attach(model)
    shaken(languages)
    ranking = Pfeiffer(bottleneck=2).attach(model)
    before = run(model, ids, kinds).detach()
    randomize(ranking)
    run(model, ids, kinds).square().sum().backward()
    assert all(tensor.grad is not None and tensor.grad.any() for tensor in ranking.trainable().values())
    ranking.remove()
    assert torch.equal(run(model, ids, kinds).detach(), before)
    first, second = make("bert"), make("bert")
    for name, other in (("query", first), ("document", second)):
        copied(languages, LanguageAdapter(name=name, bottleneck=3).attach(other), name)
    embedded = {}
    for name, other in (("split", model), ("query", first), ("document", second)):
        other.model.embeddings.register_forward_hook(  # type: ignore[union-attr]
            lambda module, args, out, name=name: embedded.update({name: out}))
        with torch.no_grad():
            run(other, ids, kinds)
    mine = kinds[..., None] == 0
    assert torch.equal(embedded["split"], torch.where(mine, embedded["query"], embedded["document"]))


def test_what_cannot_be_split() -> None:
    for family, methods, options, words in (
            ("bert", [PrefixTuning(name=name, tokens=2) for name in "ab"], {"by": 2}, "cannot be split by positions"),
            ("timm_vit", pfeiffers("a", "b"), {"by": "token_type"}, "'token_type'"),
            ("llama", pfeiffers("a", "b"), {"by": "token_type"}, "'token_type'"),
            ("timm_vit", pfeiffers("a", "b"), {"by": "separator", "separator": 1}, "'separator'"),
            ("timm_swin", pfeiffers("a", "b"), {"by": "separator", "separator": 1}, "'separator'"),
            ("bert", [Pfeiffer(), Houlsby()], {"by": 2}, "same sites")):
        model = make(family)
        left = trace(model)
        with pytest.raises(ScionError, match=words) as refusal:
            Split(methods, **options).attach(model)
        assert "\n" not in str(refusal.value) and differences(left, trace(model)) == []
    swin = make("timm_swin")
    Split([LanguageAdapter(name=name, bottleneck=2) for name in "ab"], by=2).attach(swin)
    with pytest.raises(ScionError, match="positions, channels"):
        outputs(swin, batch("timm_swin"))
    with pytest.raises(ScionError, match="Split is not attached"), Split(pfeiffers("a", "b")).at(3):
        pass


class Ranker(nn.Module):
    """A wrapper whose head is beside the backbone."""

    def __init__(self) -> None:
        super().__init__()
        self.model = make("bert").model
        self.head = nn.Linear(32, 1)

    def forward(self, ids: Tensor, kinds: Tensor) -> Tensor:
        return self.head(self.model(ids, token_type_ids=kinds).last_hidden_state[:, 0])


def test_in_a_wrapper_with_a_head() -> None:
    model, (ids, kinds) = Ranker(), pairs()
    split: Any = Split(pfeiffers("query", "document"), by="token_type").attach(model)
    assert split.counts()["head"] == 33
    model(ids, kinds).sum().backward()
    assert all(tensor.grad is not None for tensor in split.trainable().values())
