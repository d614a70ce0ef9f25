"""Models by name: what a name leads to, and what is said of one that leads nowhere."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from core import hub
from core.errors import ScionError
from core.hub import Source, Wanted


def never(_: str) -> bool:
    return False


def always(_: str) -> bool:
    return True


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache of the hub."""
    folder = tmp_path / "cache"
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(folder))
    return folder


def put(cache: Path, name: str, files: dict[str, Any]) -> Path:
    """Put files into the cache as the hub's client lays them out."""
    repository = cache / f"models--{name.replace('/', '--')}"
    snapshot = repository / "snapshots" / "abc"
    snapshot.mkdir(parents=True)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("abc")
    for file, content in files.items():
        (snapshot / file).write_text(json.dumps(content))
    return snapshot


def folder_of(tmp_path: Path, **files: Any) -> Path:
    folder = tmp_path / "folder"
    folder.mkdir()
    for name, content in files.items():
        (folder / name.replace("__", ".")).write_text(json.dumps(content))
    return folder


def test_auto_is_the_default_or_the_small_one(cache: Path) -> None:
    assert hub.auto("some/model", always) == ("some/model", None)
    with pytest.warns(UserWarning, match="some/model is not cached and the hub does not answer, so this is the built"):
        name, note = hub.auto("some/model", never)
    assert name == "nano" and "built-in nano" in str(note)
    with pytest.raises(ScionError, match="auto: some/model is not cached .*; connect, or give a local folder"):
        hub.auto("some/model", never, nano=None)
    put(cache, "some/model", {"config.json": {}, "model.safetensors": 0})
    assert hub.auto("some/model", never) == ("some/model", None)


def test_cached_is_with_all_shards(cache: Path) -> None:
    shards = {"weight_map": {"a": "one.safetensors", "b": "two.safetensors"}}
    snapshot = put(cache, "some/model", {"config.json": {}, "model.safetensors.index.json": shards,
                                         "one.safetensors": 0})
    assert not hub.is_cached("some/model") and hub.is_cached("some/model", weights=False)
    (snapshot / "two.safetensors").write_text("0")
    assert hub.is_cached("some/model")
    (snapshot / "model.safetensors.index.json").write_text("damaged")
    assert not hub.is_cached("some/model")


def test_what_a_name_leads_to(cache: Path, tmp_path: Path) -> None:
    folder = folder_of(tmp_path, config__json={}, model__safetensors=0)
    wanted = Wanted("a thing", nano=folder, nano_maker="make it")
    assert hub.find("nano", wanted) == Source("nano", "nano", str(folder), f"its files in {folder} are damaged")
    found = hub.find(str(folder), wanted)
    assert (found.kind, found.where, found.problem) == ("local", str(folder), "not a readable thing checkpoint")
    assert hub.find("some/model", wanted, ask=always).options == {}
    put(cache, "some/model", {"config.json": {}, "model.safetensors": 0})
    assert hub.find("some/model", wanted, ask=never).options == {"local_files_only": True}


def test_names_that_lead_nowhere(cache: Path, tmp_path: Path) -> None:
    folder = folder_of(tmp_path, config__json={})
    with_nano, without = Wanted("a thing", ["some/model"], folder, "make it"), Wanted("a thing", ["some/model"])
    for name, wanted, words in (
            ("nano", with_nano, "nano's weights are missing here; make them by make it$"),
            ("nano", without, "'nano' is neither auto, a hub id .owner/name. nor a folder"),
            ("some-model", with_nano, "neither auto, nano, a hub id .* .did you mean 'some/model'"),
            ("some/model", with_nano, "connect, or take a local folder or the built-in nano$"),
            ("some/model", without, "connect, or take a local folder$"),
            ("a..b/--c", without, "no name of a model on the hub"),
            ("/nowhere", without, "no config.json in the folder /nowhere"),
            (str(folder), without, "no model.safetensors in .*pickled weights are not read; save them again")):
        with pytest.raises(ScionError, match=words) as caught:
            hub.find(name, wanted, ask=never)
        assert "\n" not in str(caught.value)
    assert hub.find(str(folder), without, weights=False).kind == "local"


def test_type_before_weights(tmp_path: Path) -> None:
    folder = folder_of(tmp_path, config__json={"model_type": "vit"}, model__safetensors="not read")
    source = hub.find(str(folder), Wanted("a text encoder"))

    def no_class(_: str) -> Any:
        pytest.fail("the type is refused before")

    with pytest.raises(ScionError, match="is a model of type 'vit'; 'bert' or 'roberta' wanted"):
        hub.load(source, Wanted("a text encoder"), ["bert", "roberta"], no_class)
    with pytest.raises(ScionError, match="is a model of type 'vit'; a text encoder wanted"):
        hub.load(source, Wanted("a text encoder"), list("abcd"), no_class)


def test_code_beside_the_weights_is_never_run(tmp_path: Path) -> None:
    from transformers import BertConfig, BertModel

    folder = tmp_path / "model"
    tiny = BertConfig(vocab_size=20, hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8)
    BertModel(tiny).save_pretrained(folder)
    config = json.loads((folder / "config.json").read_text())
    config["auto_map"] = {"AutoModel": "code.Evil", "AutoConfig": "code.Evil"}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "code.py").write_text(f"open({str(tmp_path / 'was here')!r}, 'w').close()\nclass Evil: pass\n")
    source = hub.find(str(folder), Wanted("a BERT"))
    model = hub.load(source, Wanted("a BERT"), ["bert"], lambda _: BertModel)
    assert isinstance(model, BertModel) and not (tmp_path / "was here").exists()


def test_what_files_lack_is_named(tmp_path: Path) -> None:
    from transformers import BertConfig, BertModel

    tiny = BertConfig(vocab_size=20, hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8)
    BertModel(tiny, add_pooling_layer=False).save_pretrained(tmp_path)
    source, wanted = hub.find(str(tmp_path), Wanted("a BERT")), Wanted("a BERT")
    with pytest.raises(ScionError, match=r"lacks pooler.dense.bias, pooler.dense.weight: not a whole BERT"):
        hub.load(source, wanted, ["bert"], lambda _: BertModel)
    model = hub.load(source, wanted, ["bert"], lambda _: BertModel, may_lack=lambda name: name.startswith("pooler."))
    assert model.pooler is not None
