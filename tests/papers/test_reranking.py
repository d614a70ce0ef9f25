"""Checks of LanguageAdapter, with Pfeiffer, Split and LTSFT: a reranker put together from languages and a task."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from core import load_adapter
from core.anatomy import Anatomy, dissect
from core.compose import Split
from core.errors import ScionError
from core.peft import method_class
from tests.models import VOCABULARY, WIDTH, batch, make, tied_llama
from tests.rows import Row, Variant, bottleneck_count
from tests.toolkit import distance, outputs, randomize, same, snapshot, train


def language_adapter_count(anatomy: Anatomy, method: Any) -> int:
    dim, last = anatomy.blocks[0].dim, anatomy.blocks[-1].dim
    invertible = 4 * (dim // 2) * (dim // 4) + 2 * (dim // 2 + dim // 4) if method.invertible else 0
    dropped = 2 * method.width(last) * last + method.width(last) + last if method.drop_last else 0
    return bottleneck_count(anatomy, method) + invertible - dropped


ROWS = {
    "LanguageAdapter": Row(
        {"invertible": Variant({"bottleneck": 4}, learns={"lr": 1e-2}),
         "drop_last": Variant({"reduction": 8, "init": "normal", "drop_last": True}, learns={"lr": 1e-2}),
         "plain": Variant({"bottleneck": 4, "invertible": False}, learns={"lr": 1e-2})},
        trained=language_adapter_count,
        cards=(("bert_base", {}, 7_387_776), ("bert_base", {"drop_last": True}, 6_796_800)),
        bad=(({"bottleneck": 0}, "bottleneck 0"), ({"reduction": 0}, "reduction 0"), ({"init": "zero"}, "'zero'")),
        random=True, commutes=False, operators=12, saved=0.9, without_attention={"invertible": False},
        artifact={"bottleneck": 1},
    ),
}

LanguageAdapter: Any = method_class("LanguageAdapter")
Pfeiffer: Any = method_class("Pfeiffer")
LTSFT: Any = method_class("LTSFT")


def _mbert(kind: str = "BertModel") -> nn.Module:
    import transformers

    config = transformers.BertConfig(vocab_size=105_879)
    config.num_labels = 1
    with torch.device("meta"):
        return getattr(transformers, kind)(config)


def _masked_language_model() -> Any:
    import transformers

    config = transformers.BertConfig(vocab_size=VOCABULARY, hidden_size=WIDTH, num_hidden_layers=2,
                                     num_attention_heads=4, intermediate_size=64)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return transformers.BertForMaskedLM(config).eval()


def test_1_mbert() -> None:
    assert sum(p.numel() for p in _mbert().parameters()) == 167_356_416
    assert sum(p.numel() for p in _mbert("BertForSequenceClassification").parameters()) == 167_357_185


@pytest.mark.parametrize(("options", "count"), [
    ({"reduction": 1}, 14_174_208), ({"reduction": 2}, 7_091_712), ({"reduction": 4}, 3_550_464),
    ({"reduction": 8}, 1_779_840), ({}, 894_528), ({"reduction": 32}, 451_872)])
def test_2_ranking_adapters(options: dict[str, Any], count: int) -> None:
    counts = Pfeiffer(**options).attach(_mbert("BertForSequenceClassification")).counts()
    assert counts["method"] == count and counts["head"] == 769


def test_2_language_adapter() -> None:
    model = _mbert("BertForMaskedLM")
    total = sum(p.numel() for p in model.parameters())
    method = LanguageAdapter().attach(model)
    invertible = sum(p.numel() for p in method.grafts[0].parameters())
    assert invertible == 2 * (384 * 192 + 192 + 192 * 384 + 384) == 296_064
    assert method.counts()["method"] == 7_091_712 + 296_064 == 7_387_776
    assert total == 167_463_831 and round(7_387_776 / total, 4) == 0.0441
    assert LanguageAdapter(drop_last=True).attach(_mbert()).counts()["method"] == 6_796_800
    assert LanguageAdapter(layers=range(11)).attach(_mbert()).counts()["method"] == 6_796_800
    assert LanguageAdapter(invertible=False).attach(_mbert()).counts()["method"] == 7_091_712


def test_3_inverse_and_volume() -> None:
    """inverse(forward(e)) = e within 1e-6, and the Jacobian's determinant is 1."""
    method = LanguageAdapter(bottleneck=2).attach(make("bert"))
    randomize(method, size=0.3)
    graft: Any = method.grafts[0]
    e = torch.randn(4, 7, WIDTH, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        y = graft.after(e, e)
        assert distance(y, e) > 0.1
        assert (graft.invert(y) - e).abs().max() < 1e-6 * max(1.0, float(y.abs().max()))
    graft.double()
    point = e[0, 0].double()
    jacobian: Any = torch.autograd.functional.jacobian(lambda x: graft.after(x, x), point)
    assert float(torch.linalg.det(jacobian)) == pytest.approx(1.0, abs=1e-10)
    assert float((jacobian - torch.eye(WIDTH)).abs().max()) > 0.1
    half, other = e[..., :16].double(), e[..., 16:].double()  # y1 = e1 + F(e2), y2 = e2 + G(y1)
    y1 = half + graft.F(other)
    assert distance(graft.after(e, e.double()), torch.cat([y1, other + graft.G(y1)], -1)) < 1e-12


@pytest.mark.parametrize("wrapped", [False, True])
def test_3_inverse_stands_before_the_vocabulary(wrapped: bool) -> None:
    """After the head's transform, before its projection; the plain model where F = G = 0."""
    model, ids = _masked_language_model(), batch("bert")
    root: Any = model
    if wrapped:
        root = nn.Module()
        root.model = model
        root.forward = lambda ids: model(ids)  # type: ignore[method-assign]
    with torch.no_grad():
        expected = model(ids).logits
        method = LanguageAdapter(bottleneck=2, layers=()).attach(root)
        assert torch.equal(model(ids).logits, expected)
        randomize(method, size=0.3)
        graft: Any = method.grafts[0]
        head = model.cls.predictions
        seen: list[Tensor] = []
        head.transform.register_forward_hook(lambda module, args, out: seen.append(out))
        found = model(ids).logits
        assert distance(found, head.decoder.__class__.forward(head.decoder, graft.invert(seen[0]))) < 1e-5
    assert [graft.site.role for graft in method.grafts] == ["embed", "lm_head"]
    tied = tied_llama()
    causal = LanguageAdapter(bottleneck=2).attach(tied)
    assert causal.grafts[-1].site.module is tied.lm_head
    tied(batch("llama")).logits.square().mean().backward()
    assert any(t.grad is not None and t.grad.any() for name, t in causal.trainable().items() if ".embed." in name)


def test_4_zero_up_is_the_plain_layer_exactly() -> None:
    """stack(LA, RA) with U = 0 and b_U = 0: LN(h + x), to the bit."""
    model, inputs = make("bert"), batch("bert")
    expected = outputs(model, inputs)
    methods = [LanguageAdapter().attach(model), Pfeiffer().attach(model)]
    with torch.no_grad():
        for method in methods:
            for graft in method.grafts:
                if hasattr(graft, "down"):
                    graft.down.weight.normal_()
                    graft.down.bias.normal_()
    assert torch.equal(outputs(model, inputs), expected)


def test_4_stack_of_two_kinds() -> None:
    """z1 = LN(h + x), h1 = A_LA(z1) + h, z2 = LN(h1 + x), h2 = A_RA(z2) + h1, out = LN(h2 + x)"""
    model = make("bert", dtype=torch.float64)
    language = LanguageAdapter(bottleneck=3, invertible=False).attach(model)
    ranking = Pfeiffer(bottleneck=2).attach(model)
    for method in (language, ranking):
        randomize(method, size=0.3)
    one, two = language.grafts[0], ranking.grafts[0]
    layer: Any = dissect(model).blocks[0].module.output
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(2, 5, 64, dtype=torch.float64, generator=generator)
    x = torch.randn(2, 5, WIDTH, dtype=torch.float64, generator=generator)
    with torch.no_grad():
        found = layer(hidden, x)
        h, norm = layer.dense(hidden), layer.LayerNorm.forward
        h1 = one.up(torch.relu(one.down(norm(h + x)))) + h
        h2 = two.up(torch.relu(two.down(norm(h1 + x)))) + h1
        assert distance(found, norm(h2 + x)) < 1e-12


def test_5_rewinds_and_keeps_to_the_mask() -> None:
    """Before the sparse phase all start values are back, bit for bit; after it nothing outside the mask has moved, and
    at most K entries have; more than there are is refused."""
    count = 150
    model = make("bert")
    start = snapshot(model)
    method = LTSFT(count=count).attach(model)
    train(model, method, "bert")
    assert not same(start, snapshot(model))
    method.advance()
    assert same(start, snapshot(model))
    train(model, method, "bert", steps=5)
    method.merge()
    changed = {name: value != start[name] for name, value in snapshot(model).items()}
    assert 0 < sum(int(mask.sum()) for mask in changed.values()) <= count
    total = sum(p.numel() for p in make("bert").parameters())
    with pytest.raises(ScionError, match=f"count {total + 1}"):
        LTSFT(count=total + 1).attach(make("bert"))


def test_6_composition_of_masks(tmp_path: Any) -> None:
    """Ranking's and language's sparse changes, applied in either order, and taken back, bit for bit; and from files."""
    folders, inputs = {}, batch("bert")
    for i, name in enumerate(("language", "ranking")):
        model = make("bert")
        method = LTSFT(count=200, name=name).attach(model)
        generator = torch.Generator().manual_seed(i)
        with torch.no_grad():
            for tensor in method.trainable().values():
                tensor += 0.1 * torch.randn(tensor.shape, generator=generator)
        method.advance()
        randomize(method, seed=i)
        folders[name] = method.save(tmp_path / name)
    found = []
    for order in (("language", "ranking"), ("ranking", "language")):
        model = make("bert")
        start = snapshot(model)
        methods: list[Any] = [load_adapter(folders[name], model) for name in order]
        unmerged = outputs(model, inputs)
        for method in methods:
            method.merge()
        assert distance(outputs(model, inputs), unmerged) < 1e-5
        found.append(snapshot(model))
        for method in reversed(methods):
            method.unmerge()
            method.remove()
        assert same(start, snapshot(model))
    assert max(float((found[0][name] - found[1][name]).abs().max()) for name in found[0]) < 1e-6


def test_7_split_with_one_language_is_the_stack() -> None:
    """LA_query = LA_doc under a ranking adapter: split(LA, LA) -> RA equals stack(LA, RA)."""
    inputs, found = batch("bert"), []
    language = LanguageAdapter(bottleneck=3).attach(make("bert"))
    randomize(language, size=0.2)
    for split in (False, True):
        model = make("bert")
        below: Any = LanguageAdapter(bottleneck=3, trainable=False) if not split else Split(
            [LanguageAdapter(bottleneck=3, name=name) for name in ("query", "document")], by=4, trainable=False)
        below.attach(model)
        above = Pfeiffer(bottleneck=2).attach(model)
        with torch.no_grad():
            for name, tensor in below.tensors().items():
                key = name.removeprefix(below.prefix)
                key = key.partition(".")[2] if split else key
                tensor.copy_(language.tensors()[f"{language.prefix}{key}"])
        randomize(above, size=0.2)
        found.append(outputs(model, inputs))
    assert torch.equal(*found)


def test_8_language_is_swapped_under_the_ranking_adapter(tmp_path: Any) -> None:
    """Trained on English, asked in another language: the ranking adapter stays as it is."""
    inputs, folders = batch("bert"), {}
    for i, name in enumerate(("en", "fi")):
        model = make("bert")
        method = LanguageAdapter(bottleneck=3).attach(model)
        randomize(method, seed=i)
        folders[name] = method.save(tmp_path / name)
    model = make("bert")
    english: Any = load_adapter(folders["en"], model)
    english.freeze()
    ranking = Pfeiffer(bottleneck=2).attach(model)
    train(model, ranking, "bert")
    folders["ranking"] = ranking.save(tmp_path / "ranking")
    assert same(english.tensors(), load_adapter(folders["en"], make("bert")).tensors())
    trained, values = outputs(model, inputs), {name: t.clone() for name, t in ranking.tensors().items()}
    for language in ("en", "fi"):
        fresh = make("bert")
        load_adapter(folders[language], fresh)
        again: Any = load_adapter(folders["ranking"], fresh)
        assert same(values, again.tensors())
        assert torch.equal(outputs(fresh, inputs), trained) == (language == "en")


def test_3_odd_widths_have_no_halves() -> None:
    anatomy = dissect(make("timm_vit"))
    anatomy.blocks[0].dim = 33
    with pytest.raises(ScionError, match="33 wide: take invertible=False"):
        LanguageAdapter().check(anatomy)
    LanguageAdapter(invertible=False).check(anatomy)
