"""Adapters that travel: from under a language-model head to the bare encoder, under a classifier, and back."""

from __future__ import annotations

import copy
import json
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from core import dissect, load_adapter
from core.adapters.load import RECORD, read_adapter, save_adapter
from core.compose import Fuse, Route
from core.errors import ScionError
from core.method import methods_on
from core.method.described import Names
from core.patch import Patch
from core.peft import LTSFT, BitFit, FullFineTuning, LanguageAdapter, LoRA, Pfeiffer
from tests.models import WIDTH, t5_config
from tests.toolkit import randomize, seeded

SIZES: dict[str, Any] = {"vocab_size": 50, "hidden_size": WIDTH, "num_hidden_layers": 2, "num_attention_heads": 4,
                         "intermediate_size": 2 * WIDTH, "max_position_embeddings": 32}
INPUTS = {"input_ids": torch.arange(2, 16).view(2, 7)}


class Wrapped(nn.Module):
    """As a domain's backbone is: the library's model in ``model``, and a tensor of its own."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model, self.scale = model, nn.Parameter(torch.ones(1))


def _make(name: str, seed: int = 0, **options: Any) -> Any:
    """A class of transformers, tiny and random."""
    import transformers

    family = name.partition("For")[0].removesuffix("Model").removesuffix("LMHead").removesuffix("Encoder")
    if family == "T5":
        config: Any = t5_config()
    else:
        sizes = {**SIZES, "embedding_size": WIDTH} if family == "Albert" else SIZES
        config = getattr(transformers, f"{family}Config")(**sizes)
    with seeded(seed):
        return getattr(transformers, name)(config, **options).eval()


def _backbone(model: nn.Module) -> nn.Module:
    return model.get_submodule(dissect(model).inputs.path)


def _twin(name: str, original: nn.Module, **options: Any) -> Any:
    """Another class with the weights of ``original``'s backbone; what is around them, and a pooler, is random."""
    model = _make(name, seed=9, **options)
    state = _backbone(original).state_dict()
    own = {key: tensor for key, tensor in state.items() if not key.startswith(("pooler.", "peft."))}
    loaded = _backbone(model).load_state_dict(own, strict=False)
    assert all(key.startswith("pooler.") for key in loaded.missing_keys)
    return model


def _states(model: nn.Module) -> Tensor:
    """What the backbone in ``model`` gives."""
    model.eval()
    backbone: Any = _backbone(model)
    inputs = dict(INPUTS)
    if hasattr(backbone, "decoder"):
        inputs["decoder_input_ids"] = INPUTS["input_ids"]
    with torch.no_grad():
        output = backbone(**inputs, output_hidden_states=True)
    if "last_hidden_state" in output:
        return output.last_hidden_state
    return output.decoder_hidden_states[-1]


def _ltsft(**options: Any) -> Any:
    return LTSFT(density=0.1, **options)


def _train(method: Any, model: nn.Module) -> Tensor:
    """Attach, move, and with several stages go on to the last; returns the backbone's states."""
    method.attach(model)
    randomize(method)
    if method.stages:
        method.advance()
        randomize(method)
    return _states(model)


def _loads(folder: Path, model: nn.Module) -> list[str]:
    """Load an adapter with base="same"; what it warns of."""
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        load_adapter(folder, model)
    return [str(warning.message).removeprefix(f"{folder}: ") for warning in told]


METHODS: dict[str, Callable[[], Any]] = {
    "LoRA": lambda: LoRA(rank=2), "LanguageAdapter": LanguageAdapter, "LTSFT": lambda: _ltsft(exclude=("lm_head",)),
}
CLASSES = [
    ("BertForMaskedLM", ["BertModel", "BertForSequenceClassification", "BertForTokenClassification"]),
    ("AlbertForMaskedLM", ["AlbertModel", "AlbertForSequenceClassification"]),
    ("RobertaForMaskedLM", ["RobertaModel", "RobertaForSequenceClassification"]),
    ("LlamaForCausalLM", ["LlamaModel", "LlamaForSequenceClassification"]),
    ("GPT2LMHeadModel", ["GPT2Model"]),
    ("T5ForConditionalGeneration", ["T5Model"]),
]


@pytest.mark.parametrize("method", ["LoRA", "LanguageAdapter", "LTSFT"])
@pytest.mark.parametrize(("source", "targets"), CLASSES, ids=[name for name, _ in CLASSES])
def test_there_and_back(source: str, targets: list[str], method: str, tmp_path: Path) -> None:
    original = _make(source)
    trained = METHODS[method]()
    model = copy.deepcopy(original)
    expected = _train(trained, model)
    trained.save(tmp_path / "there")
    for target in targets:
        other = _twin(target, original)
        if target != targets[0]:
            other = Wrapped(other)
        _loads(tmp_path / "there", other)
        assert torch.equal(_states(other), expected)
        save_adapter(methods_on(other), tmp_path / "back")
        again = copy.deepcopy(original)
        _loads(tmp_path / "back", again)
        assert torch.equal(_states(again), expected)
        with pytest.raises(ScionError, match="another base"):
            load_adapter(tmp_path / "there", _make(target, seed=1))


def test_the_record_says_the_form(tmp_path: Path) -> None:
    """Names count from the encoder, in the structure and among the tensors; the fingerprint is the encoder's."""
    models = [_make("BertForMaskedLM")]
    models += [_twin("BertModel", models[0]), _twin("BertModel", models[0], add_pooling_layer=False)]
    records = []
    for number, model in enumerate(models):
        method = _ltsft(exclude=("lm_head", "pool"))
        _train(method, model)
        method.save(tmp_path / str(number))
        record, tensors = read_adapter(tmp_path / str(number))
        records.append(record)
        assert record["format"] == 2
        assert all(name.startswith(("peft.LTSFT.e", "peft.LTSFT.around-cls")) for name in tensors)
        entries = record["methods"][0]["structure"]["entries"]
        assert all(name.startswith(("embeddings.", "encoder.", "around.cls.")) for name in entries)
    assert len({record["base"]["fingerprint"] for record in records}) == 1
    assert ["pooler" in record["base"] for record in records] == [False, True, False]


def test_what_lies_apart(tmp_path: Path) -> None:
    """A head that was trained comes back where there is one, and is left out aloud where there is none."""
    original = _make("BertForMaskedLM")
    model = copy.deepcopy(original)
    method = FullFineTuning()
    expected = _train(method, model)
    with torch.no_grad():
        scores = model(**INPUTS).logits
    method.save(tmp_path)
    again = Wrapped(copy.deepcopy(original))
    assert _loads(tmp_path, again) == []
    again.eval()
    with torch.no_grad():
        assert torch.equal(again.model(**INPUTS).logits, scores)
    bare = _twin("BertModel", original)
    pooler = bare.pooler.dense.weight.detach().clone()
    [told] = _loads(tmp_path, bare)
    assert told.startswith("left out, because BertModel has no such tensors") and "around.cls.predictions.bias" in told
    assert torch.equal(_states(bare), expected) and torch.equal(bare.pooler.dense.weight, pooler)
    apart = json.loads((tmp_path / RECORD).read_text())["apart"]
    assert all(name.startswith("around.cls.") for name in apart) and len(apart) == 5


def test_a_classifier_of_its_own(tmp_path: Path) -> None:
    """It comes back under the same class, is left out elsewhere, and one of another size is refused with a way out."""
    original = _make("BertForSequenceClassification")
    model = copy.deepcopy(original)
    method = BitFit(exclude=("pool",))
    _train(method, model)
    with torch.no_grad():
        model.classifier.weight += 1
        expected = model(**INPUTS).logits
    method.save(tmp_path)
    again = copy.deepcopy(original)
    assert _loads(tmp_path, again) == []
    again.eval()
    with torch.no_grad():
        assert torch.equal(again(**INPUTS).logits, expected)
    [told] = _loads(tmp_path, _twin("BertForMaskedLM", original))
    assert "around.classifier.bias, around.classifier.weight" in told
    wide = copy.deepcopy(original)
    wide.classifier = nn.Linear(WIDTH, 5)
    with pytest.raises(ScionError, match="load the adapter into the model's bert alone"):
        load_adapter(tmp_path, wide)
    [told] = _loads(tmp_path, wide.bert)
    assert "around.classifier" in told


def test_another_pooler_is_told(tmp_path: Path) -> None:
    original = _make("BertModel")
    method = LoRA().attach(copy.deepcopy(original))
    method.save(tmp_path)
    assert _loads(tmp_path, copy.deepcopy(original)) == []
    assert _loads(tmp_path, _twin("BertModel", original, add_pooling_layer=False)) == []
    [told] = _loads(tmp_path, _twin("BertModel", original))
    assert told.startswith("the pooler here has other values")


def test_encoder_alone(tmp_path: Path) -> None:
    """T5's encoder by itself is the same base as the encoder in the whole model, for what stands in the encoder."""
    whole = _make("T5ForConditionalGeneration")
    method = LoRA(targets=("encoder.q",)).attach(whole)
    randomize(method)
    method.save(tmp_path / "one")
    alone: Any = _make("T5EncoderModel", seed=9)
    alone.load_state_dict({name: tensor for name, tensor in whole.state_dict().items() if "peft" not in name},
                          strict=False)
    assert _loads(tmp_path / "one", alone) == []
    with torch.no_grad():
        expected = whole.encoder(**INPUTS).last_hidden_state
        assert torch.equal(alone(**INPUTS).last_hidden_state, expected)
    save_adapter(methods_on(alone), tmp_path / "two")
    method.remove()
    assert _loads(tmp_path / "two", _twin("T5Model", whole)) == []
    with pytest.raises(ScionError, match="another base"):
        load_adapter(tmp_path / "one", _make("T5EncoderModel", seed=3))
    both = LoRA().attach(_twin("T5Model", whole))
    both.save(tmp_path / "both")
    with pytest.raises(ScionError, match="no method here has"):
        load_adapter(tmp_path / "both", _twin_encoder(whole))


def _twin_encoder(whole: nn.Module) -> nn.Module:
    alone = _make("T5EncoderModel", seed=9)
    alone.load_state_dict(whole.state_dict(), strict=False)
    return alone


def test_stacks_and_compositions(tmp_path: Path) -> None:
    original = _make("BertForMaskedLM")
    for number, make in enumerate((
            lambda: [LoRA(name="a"), _ltsft(exclude=("lm_head",))],
            lambda: [Route([LoRA(name="a"), LoRA(name="b")])],
            lambda: [Fuse([Pfeiffer(name="a"), Pfeiffer(name="b")])])):
        model, folder = copy.deepcopy(original), tmp_path / str(number)
        methods = make()
        for method in methods:
            _train(method, model)
        save_adapter(methods, folder)
        expected = _states(model)
        other = _twin("BertForSequenceClassification", original)
        assert all(told.startswith("left out") for told in _loads(folder, other))
        assert torch.equal(_states(other), expected)


def test_a_member_from_a_folder(tmp_path: Path) -> None:
    """A method that was trained under a language-model head takes part in a composition on another class."""
    original = _make("BertForMaskedLM")
    trained = LoRA(name="sw")
    expected = _train(trained, copy.deepcopy(original))
    trained.save(tmp_path)
    other = _twin("BertModel", original)
    route = Route([str(tmp_path), LoRA(name="en")]).attach(other)
    with route.route("sw"):
        assert torch.equal(_states(other), expected)
    with pytest.raises(ScionError, match="belongs to another base"):
        Route([str(tmp_path)]).attach(_make("BertModel", seed=1))


def test_carried(tmp_path: Path) -> None:
    """base="any", and the change of the base's own tensors from the module that they were trained in."""
    original = _make("BertForMaskedLM")
    _train(sparse := _ltsft(exclude=("lm_head",)), copy.deepcopy(original))
    sparse.save(tmp_path / "sparse")
    other = _make("BertModel", seed=1)
    with pytest.warns(UserWarning, match="carried from base"):
        load_adapter(tmp_path / "sparse", other, base="any")
    full = FullFineTuning(exclude=("lm_head", "pool"))
    _train(full, model := copy.deepcopy(original))
    full.save(tmp_path / "full")
    start = _make("BertModel", seed=1)
    other = copy.deepcopy(start)
    with pytest.warns(UserWarning, match="carried from base"):
        load_adapter(tmp_path / "full", other, base=original)
    name = "encoder.layer.1.output.dense.weight"
    change = model.bert.get_parameter(name) - original.bert.get_parameter(name)
    torch.testing.assert_close(other.get_parameter(name), start.get_parameter(name) + change)


def test_names() -> None:
    """In a file and back, on roots of several depths."""
    deep = Names("backbone.model.bert", apart=("backbone.model.bert.pooler",))
    for own, there in (("backbone.model.bert.a.w", "a.w"), ("backbone.model.cls.w", "around.cls.w"),
                       ("backbone.scale", "around.around.scale"), ("head.w", "around.around.around.head.w")):
        assert deep.in_file(own) == there and deep.in_root(there) == own
    assert [deep.is_apart(f"backbone.model.{name}") for name in ("bert.a", "bert.pooler.w", "bertha.w")] == [
        False, True, True]
    assert Names().in_file("a.w") == "a.w" and Names().in_root("around.cls.w") is None
    assert Names("model", from_root=True).in_file("model.a") == "model.a"


def test_a_patch_travels(tmp_path: Path) -> None:
    """Taken under a language-model head, applied to the bare encoder and under a classifier in a wrapper."""
    original = _make("BertForMaskedLM")
    _train(LoRA(rank=2), model := copy.deepcopy(original))
    Patch.take(model).save(tmp_path)
    patch = Patch.load(tmp_path)
    merged = copy.deepcopy(original)
    patch.apply(merged)
    for other in (_twin("BertModel", original), Wrapped(_twin("BertForSequenceClassification", original))):
        before = _states(other)
        applied = patch.apply(other)
        assert torch.equal(_states(other), _states(merged)) and not torch.equal(before, _states(other))
        applied.remove()
        assert torch.equal(_states(other), before)
    with pytest.warns(UserWarning, match="carried from base"):
        patch.apply(_make("BertModel", seed=1))
