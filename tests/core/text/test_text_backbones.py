"""Text models as backbones: their readings, whichever side is padded, and what is said of folders that will not do."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from core.anatomy import dissect
from core.errors import ScionError
from core.peft import LoRA
from core.text.backbones import LanguageModel, TextEncoder
from tests.core.text import tiny

TEXTS = ["the cat sleeps", "dog", "what is the dog : one two three"]
ENCODERS = [("bert", "Bert"), ("roberta", "Roberta"), ("distilbert", "DistilBert"), ("deberta-v2", "DebertaV2"),
            ("albert", "Albert")]


def batch(backbone: Any, texts: list[str], side: Any = "right") -> dict[str, Tensor]:
    return backbone.tokenizer.pad_encoded(backbone.tokenizer.encode(texts), side)


# ------------------------------------------------------------------------------------------------- encoders


@pytest.mark.parametrize(("kind", "stem"), ENCODERS)
def test_features_and_tokens(kind: str, stem: str, tmp_path: Path) -> None:
    import transformers

    where = tiny.folder(tmp_path, kind, f"{stem}Model")
    encoder = TextEncoder(where).eval()
    inputs = batch(encoder, TEXTS)
    whole = getattr(transformers, f"{stem}Model").from_pretrained(where).eval()
    reads = {name: value for name, value in inputs.items() if name != "token_type_ids"}
    states = whole(**reads).last_hidden_state
    assert encoder.readings == ("feature", "tokens") and encoder.dim == 16 == encoder.width("tokens")
    torch.testing.assert_close(encoder.tokens(inputs), states)
    means = torch.stack([states[row, :int(count)].mean(0) for row, count in enumerate(inputs["attention_mask"].sum(1))])
    torch.testing.assert_close(encoder(inputs), means)
    torch.testing.assert_close(TextEncoder(where, pooling="cls").eval()(inputs), states[:, 0])
    torch.testing.assert_close(encoder(batch(encoder, TEXTS[1:2])), means[1:2])  # padding is not read
    assert encoder.origin == {"name": where, "pretrained": True, "kind": "local",
                              "note": "the tokenizer has 22 ids, the model's embedding 24 rows"}
    assert encoder.max_length == {"bert": 40, "roberta": 40, "deberta-v2": 40}.get(kind, 512)
    with pytest.raises(ScionError, match="was built without its language-model head; set head: true"):
        encoder.logits(inputs, inputs["attention_mask"] == 1)


@pytest.mark.parametrize(("kind", "stem"), ENCODERS)
def test_logits_at_some_positions(kind: str, stem: str, tmp_path: Path) -> None:
    encoder = TextEncoder(tiny.folder(tmp_path, kind, f"{stem}ForMaskedLM"), head=True).double().eval()
    assert encoder.readings == ("feature", "tokens", "logits") and encoder.width("logits") == tiny.SIZE + 2
    inputs = batch(encoder, TEXTS)
    whole: Any = encoder.model(**{name: inputs[name] for name in ("input_ids", "attention_mask")})
    where = torch.rand(inputs["input_ids"].shape, generator=torch.Generator().manual_seed(0)) < 0.4
    found = encoder.logits(inputs, where)
    torch.testing.assert_close(found, whole.logits[where], rtol=0, atol=1e-12)
    assert encoder.logits(inputs, torch.zeros_like(where)).shape == (0, tiny.SIZE + 2)
    torch.testing.assert_close(encoder.model(**{name: inputs[name] for name in ("input_ids", "attention_mask")}).logits,
                               whole.logits)  # nothing stays on the model
    with pytest.raises(ScionError, match=r"want a boolean mask \[3, 10\], got torch.int64 \[3, 10\]"):
        encoder.logits(inputs, inputs["attention_mask"])


def test_the_whole_matrix_is_never_made(tmp_path: Path) -> None:
    """Nor is it kept for the backward pass: no tensor that is saved has more numbers than labels by vocabulary."""
    encoder = TextEncoder(tiny.folder(tmp_path, "bert", "BertForMaskedLM"), head=True)
    inputs = {name: value.repeat(40, 1) for name, value in batch(encoder, TEXTS).items()}
    where = torch.zeros_like(inputs["input_ids"], dtype=torch.bool)
    where[:, 1] = True
    sizes: list[int] = []

    def keep(tensor: Tensor) -> Tensor:
        if tensor.shape[-1:] == (encoder.vocabulary,) or tensor.shape[:1] == (encoder.vocabulary,):
            sizes.append(tensor.numel() // encoder.vocabulary)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        logits = encoder.logits(inputs, where)
        nn.functional.cross_entropy(logits, inputs["input_ids"][where]).backward()
    assert logits.shape == (120, encoder.vocabulary) and sizes and max(sizes) <= 120


@pytest.mark.parametrize(("kind", "model_class"), [("bert", "BertForMaskedLM"), ("roberta", "RobertaForMaskedLM"),
                                                   ("t5", "T5ForConditionalGeneration")])
def test_without_values(kind: str, model_class: str, tmp_path: Path) -> None:
    """As costs are counted: a model and a batch on the meta device, only the choice of positions has values."""
    where = tiny.folder(tmp_path, kind, model_class)
    backbone: Any = TextEncoder(where, head=True) if kind in tiny.ENCODERS else LanguageModel(where)
    inputs = {name: value.to("meta") for name, value in batch(backbone, TEXTS).items()}
    shape = inputs["input_ids"].shape
    if kind == "t5":
        inputs["decoder_input_ids"] = inputs["input_ids"]
    backbone.to("meta")
    chosen = torch.zeros(shape, dtype=torch.bool)
    chosen[:, :2] = True
    assert backbone.logits(inputs, chosen).shape == (6, backbone.vocabulary)
    assert backbone.tokens(inputs).shape == (*shape, 16) and backbone(inputs).shape == (3, 16)


def test_a_method_acts_in_every_reading(tmp_path: Path) -> None:
    encoder = TextEncoder(tiny.folder(tmp_path, "bert", "BertForMaskedLM"), head=True).eval()
    inputs = batch(encoder, TEXTS)
    chosen = inputs["attention_mask"] == 1

    def readings() -> list[Tensor]:
        return [encoder(inputs), encoder.tokens(inputs), encoder.logits(inputs, chosen)]

    before = readings()
    assert dissect(encoder).family == "BertModel" and "lm_head" in dissect(encoder).roles
    method = LoRA(rank=2)
    method.attach(encoder)
    for tensor in method.trainable().values():
        nn.init.normal_(tensor)
    assert all((new - old).abs().max() > 1e-3 for new, old in zip(readings(), before, strict=True))
    with method.disabled():
        assert all(torch.equal(new, old) for new, old in zip(readings(), before, strict=True))


def test_types_reach_models_that_know_them(tmp_path: Path) -> None:
    bert = TextEncoder(tiny.folder(tmp_path / "bert", "bert", "BertModel")).eval()
    roberta = TextEncoder(tiny.folder(tmp_path / "roberta", "roberta", "RobertaModel")).eval()
    for encoder, is_told in ((bert, True), (roberta, False)):
        inputs = encoder.tokenizer.pad_encoded(encoder.tokenizer.encode(["cat"], ["dog"]))
        assert inputs["token_type_ids"].sum() == 2
        without = encoder({**inputs, "token_type_ids": torch.zeros_like(inputs["token_type_ids"])})
        assert torch.equal(encoder(inputs), without) is not is_told


def test_poolers(tmp_path: Path) -> None:
    where = tiny.folder(tmp_path / "bert", "bert", "BertModel")
    encoder = TextEncoder(where, pooling="pooler").eval()
    inputs = batch(encoder, TEXTS)
    pooler: Any = encoder.model.pooler
    torch.testing.assert_close(encoder(inputs), pooler(encoder.tokens(inputs)))
    assert TextEncoder(where).model.pooler is None  # it would be drawn at random where a file has none
    for kind, stem, words in (("distilbert", "DistilBertModel", "DistilBertModel has no pooler; take mean or cls"),
                              ("bert", "BertForMaskedLM", "has no pooler beside its language-model head")):
        with pytest.raises(ScionError, match=words):
            TextEncoder(tiny.folder(tmp_path / stem, kind, stem), pooling="pooler", head="MaskedLM" in stem)


# ------------------------------------------------------------------------------------------- sentence-transformers


@pytest.mark.parametrize("mode", ["cls", "mean"])
def test_embeddings_are_those_of_sentence_transformers(mode: Any, tmp_path: Path) -> None:
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.base.modules import Normalize, Transformer
    from sentence_transformers.sentence_transformer.modules import Pooling

    plain = tiny.folder(tmp_path / "plain", "bert", "BertModel")
    modules = [Transformer(plain, max_seq_length=8), Pooling(16, mode)]
    modules += [Normalize()] if mode == "mean" else []
    prompts = {"query": "query : ", "passage": ""}
    theirs = SentenceTransformer(modules=modules, prompts=prompts, device="cpu").eval()
    theirs.save(str(tmp_path / "saved"))
    ours = TextEncoder(str(tmp_path / "saved")).eval()
    assert (ours.pooling, ours.normalise, ours.max_length) == (mode, mode == "mean", 8)
    assert ours.prompts == {**prompts, "document": ""}  # which it adds
    for prompt in ("query", None):
        texts = ours.prompted(TEXTS, prompt)
        inputs = ours.tokenizer.pad(ours.tokenizer.ids(texts, ours.max_length))
        with torch.no_grad():
            found = ours(inputs)
        expected = theirs.encode(TEXTS, prompt_name=prompt, convert_to_tensor=True)
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)
    with pytest.raises(ScionError, match="no prompt 'answer'; there are document, passage, query"):
        ours.prompted(TEXTS, "answer")


def test_what_a_sentence_folder_may_say(tmp_path: Path) -> None:
    where = Path(tiny.folder(tmp_path, "bert", "BertModel"))

    def say(pooling: dict[str, Any], *further: str) -> None:
        kinds = [("", "models.Transformer"), ("1_Pooling", "models.Pooling"), *[("", kind) for kind in further]]
        modules = [{"path": path, "type": f"sentence_transformers.{kind}"} for path, kind in kinds]
        (where / "modules.json").write_text(json.dumps(modules))
        (where / "1_Pooling").mkdir(exist_ok=True)
        (where / "1_Pooling" / "config.json").write_text(json.dumps(pooling))

    say({"pooling_mode_cls_token": True, "pooling_mode_mean_tokens": False}, "models.Normalize")
    (where / "sentence_bert_config.json").write_text(json.dumps({"max_seq_length": 7, "do_lower_case": True}))
    encoder = TextEncoder(str(where))
    assert (encoder.pooling, encoder.normalise, encoder.max_length) == ("cls", True, 7)
    assert encoder.prompted(["The Cat"]) == ["the cat"] and TextEncoder(str(where), max_length=9).max_length == 9
    inputs = batch(encoder, TEXTS)
    assert torch.allclose(encoder(inputs).norm(dim=1), torch.ones(3))
    for pooling, further, words in (({"pooling_mode": "max"}, (), "the pooling max"),
                                    ({"pooling_mode": ["cls", "mean"]}, (), "the pooling cls, mean"),
                                    ({"pooling_mode": "mean"}, ("models.Dense",), "Dense"),
                                    ({"pooling_mode": "mean", "include_prompt": False}, (), "without the prompt")):
        say(pooling, *further)
        with pytest.raises(ScionError, match=f"also take .*{words}.*choose pooling: mean or cls"):
            TextEncoder(str(where))
        assert TextEncoder(str(where), pooling="mean").pooling == "mean"
    (where / "modules.json").write_text("[1]")
    with pytest.raises(ScionError, match="not the list that sentence-transformers writes"):
        TextEncoder(str(where))


# ------------------------------------------------------------------------------------------------- language models


CAUSAL = [("llama", "LlamaForCausalLM"), ("gpt2", "GPT2LMHeadModel"), ("gpt_neox", "GPTNeoXForCausalLM"),
          ("codegen", "CodeGenForCausalLM"), ("opt", "OPTForCausalLM"), ("gemma3_text", "Gemma3ForCausalLM")]


@pytest.mark.parametrize(("kind", "model_class"), CAUSAL)
def test_a_causal_model_on_either_side(kind: str, model_class: str, tmp_path: Path) -> None:
    model = LanguageModel(tiny.folder(tmp_path, kind, model_class)).double().eval()
    whole: Any = model.model
    left, right = batch(model, TEXTS, "left"), batch(model, TEXTS)
    torch.testing.assert_close(model(left), model(right), rtol=0, atol=1e-12)
    for row, text in enumerate(TEXTS):
        alone = batch(model, [text])
        ids = alone["input_ids"]
        logits = whole(input_ids=ids).logits
        torch.testing.assert_close(model(right)[row:row + 1], model.tokens(alone)[:, -1], rtol=0, atol=1e-12)
        last = torch.zeros_like(ids, dtype=torch.bool)
        last[:, -1] = True
        torch.testing.assert_close(model.logits(alone, last), logits[:, -1], rtol=0, atol=1e-12)
    where = right["attention_mask"] == 1
    rows = [whole(input_ids=batch(model, [text])["input_ids"]).logits[0] for text in TEXTS]
    torch.testing.assert_close(model.logits(right, where), torch.cat(rows), rtol=0, atol=1e-12)


@pytest.mark.parametrize("precision", [torch.float32, torch.float64])
def test_bloom_in_either_precision(precision: torch.dtype, tmp_path: Path) -> None:
    """In double precision transformers' BLOOM itself gives NaN for a padded batch: its softmax is a single one."""
    where = tiny.folder(tmp_path, "bloom", "BloomForCausalLM")
    model = LanguageModel(where).to(precision).eval()
    left, right = batch(model, TEXTS, "left"), batch(model, TEXTS)
    torch.testing.assert_close(model(left), model(right), rtol=0, atol=1e-5)
    alone = torch.cat([model(batch(model, [text])) for text in TEXTS])
    torch.testing.assert_close(model(left), alone, rtol=0, atol=1e-5)
    plain = type(model.model).from_pretrained(where, dtype=precision).eval()  # type: ignore[attr-defined]
    arguments = {name: left[name] for name in ("input_ids", "attention_mask")}
    theirs = plain(**arguments).logits
    assert bool(theirs.isnan().any()) == (precision == torch.float64)
    if precision == torch.float32:
        assert torch.equal(theirs, model.model(**arguments).logits)


@pytest.mark.parametrize(("kind", "model_class"), [("t5", "T5ForConditionalGeneration"),
                                                   ("bart", "BartForConditionalGeneration")])
def test_encoder_and_decoder(kind: str, model_class: str, tmp_path: Path) -> None:
    model = LanguageModel(tiny.folder(tmp_path, kind, model_class)).double().eval()
    whole: Any = model.model
    inputs = batch(model, TEXTS)
    labels = torch.tensor([[8, 9, 6, -100], [9, 6, -100, -100], [7, 8, 9, 6]])
    expected = whole(**{name: inputs[name] for name in ("input_ids", "attention_mask")}, labels=labels)
    where = labels != -100
    found = model.logits({**inputs, "labels": labels}, where)
    torch.testing.assert_close(found, expected.logits[where], rtol=0, atol=1e-12)
    loss = nn.functional.cross_entropy(found, labels[where])
    torch.testing.assert_close(loss, expected.loss, rtol=0, atol=1e-12)
    states = model.tokens({**inputs, "labels": labels})
    assert states.shape == (3, 4, 16)
    feature = model({**inputs, "labels": labels})
    torch.testing.assert_close(feature, states[torch.arange(3), torch.tensor([2, 1, 3])])
    start = torch.full((3, 1), 5)
    assert torch.equal(model(inputs), model({**inputs, "decoder_input_ids": start}))


def test_number_types(tmp_path: Path) -> None:
    where = tiny.folder(tmp_path, "llama", "LlamaForCausalLM")
    for name, expected in (("bfloat16", torch.bfloat16), ("auto", torch.float32), ("float32", torch.float32)):
        for pretrained in (True, False):
            model = LanguageModel(where, pretrained=pretrained, dtype=name)  # type: ignore[arg-type]
            assert {parameter.dtype for parameter in model.parameters()} == {expected}
    assert model.origin["kind"] == "random" and LanguageModel(where).origin["kind"] == "local"


# ------------------------------------------------------------------------------------------------- names and refusals


class Small(LanguageModel):
    """As a domain would have it."""

    default = "some/model"


def test_auto_and_nano_are_the_domains(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("core.hub.reachable", lambda *_: False)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(ScionError, match="TextEncoder has no default that auto could stand for"):
        TextEncoder()
    with pytest.raises(ScionError, match="auto: some/model is not cached .*; connect, or give a local folder"):
        Small()
    with pytest.raises(ScionError, match="'nano' is neither auto, a hub id"):
        Small("nano")
    nano = tmp_path / "nano"
    tiny.folder(nano, "llama", "LlamaForCausalLM")
    monkeypatch.setattr(Small, "nano_folder", nano)
    with pytest.warns(UserWarning, match="built-in nano"):
        model = Small()
    assert model.origin["kind"] == "nano" and model.origin["note"].startswith("backbone.name auto: some/model")


def test_models_that_will_not_do(tmp_path: Path) -> None:
    bert = tiny.folder(tmp_path / "bert", "bert", "BertModel")
    llama = tiny.folder(tmp_path / "llama", "llama", "LlamaForCausalLM")
    short = tiny.folder(tmp_path / "short", "bert", "BertModel", tiny.tokenizer(extra=("x", "y", "z")))
    odd = tiny.folder(tmp_path / "odd", "bert", "BertModel")
    (Path(odd) / "config.json").write_text("{")
    for build, words in (
            (lambda: LanguageModel(bert), "of type 'bert'; a language model wanted"),
            (lambda: TextEncoder(llama), "of type 'llama'; a text encoder wanted"),
            (lambda: TextEncoder(llama, head=True), "of type 'llama'; a text encoder wanted"),
            (lambda: TextEncoder(bert, head=True), r"lacks cls\.predictions.*: not a whole text encoder"),
            (lambda: TextEncoder(short), "has 25 ids and the model's embedding 24 rows"),
            (lambda: TextEncoder(odd), "not a readable text encoder checkpoint .*not a valid JSON"),
            (lambda: TextEncoder(bert, max_length=41), "max_length: 41 tokens, and the model has 40 positions"),
            (lambda: TextEncoder(bert, max_length=0), "backbone.max_length: 0 is too small"),
            (lambda: TextEncoder("/nowhere"), "no config.json")):
        with pytest.raises(ScionError, match=words) as caught:
            build()
        assert "\n" not in str(caught.value)


def test_inputs_that_will_not_do(tmp_path: Path) -> None:
    encoder = TextEncoder(tiny.folder(tmp_path, "bert", "BertModel"))
    with pytest.raises(ScionError, match="wants a mapping with input_ids .*, got Tensor"):
        encoder(torch.zeros(2, 3))  # type: ignore[arg-type]
    with pytest.raises(ScionError, match="got a mapping of text"):
        encoder({"text": torch.zeros(2, 3)})
    with pytest.raises(ScionError, match=r"wants input_ids \[batch, tokens\], got \[3\]"):
        encoder({"input_ids": torch.zeros(3, dtype=torch.long)})
    with pytest.raises(ScionError, match="41 tokens, and the model has 40 positions"):
        encoder({"input_ids": torch.zeros(1, 41, dtype=torch.long)})
