"""Trained adapters among the methods of a run: ``{adapter: FOLDER}`` in a list, alone, in compositions, in stages."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from core import load_method, load_run
from core.adapters.entry import Trained
from core.adapters.load import load_adapter, save_adapter
from core.cli.entry import main
from core.component import TRAINED_OPTIONS
from core.compose import Route
from core.config import points, rehearse
from core.config.page import fields_text, resolved
from core.errors import ScionError
from core.record import signature
from core.training.assemble import assemble
from core.training.measure import measure
from core.training.run import execute
from tests.core.tiny_run import PointOf, child, is_finished, tiny_domain, weights
from tests.models import batch, make
from tests.toolkit import differences, distance, outputs, trace

LANGUAGE = "{class: LanguageAdapter, name: sw, reduction: 4}"
SHORT = ("--trainer.max_epochs", "1")


@pytest.fixture(scope="module")
def tiny_config(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The tiny run's parts as a domain, whose runs can be loaded again."""
    names = '\n\n__all__ = ["SmallViT", "Squares"]\n'
    with pytest.MonkeyPatch.context() as patch:
        file = tiny_domain(patch, tmp_path_factory.mktemp("path"), "squares", names)
        yield file


@pytest.fixture
def point_of(tiny_config: Path) -> PointOf:
    return lambda *overrides: points(str(tiny_config), list(overrides))[0]


@pytest.fixture(scope="module")
def language(tiny_config: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run of a language adapter, called ``sw``."""
    folder = tmp_path_factory.mktemp("language") / "run"
    execute(points(str(tiny_config), ["--peft", LANGUAGE, *SHORT])[0], folder)
    return folder


@pytest.fixture
def copied(language: Path, tmp_path: Path) -> Path:
    """A copy of that run, to be taken away."""
    return Path(shutil.copytree(language, tmp_path / "sw"))


def tensors_of(folder: Path) -> dict[str, Tensor]:
    return load_file(folder / "adapter" / "adapter.safetensors")


def start_with(name: str, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {key: tensor for key, tensor in tensors.items() if key.startswith(f"peft.{name}.")}


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(tensor, other[name]) for name, tensor in one.items())


def test_it_stays_as_it_is_below_another_method(point_of: PointOf, copied: Path, tmp_path: Path) -> None:
    entry = f"{{adapter: {copied}, trainable: false}}"
    point = point_of("--peft", entry, "--peft+={class: Pfeiffer, bottleneck: 4}", *SHORT)
    metrics = execute(point, tmp_path / "run")
    before, after = tensors_of(copied), tensors_of(tmp_path / "run")
    assert same(start_with("sw", before), start_with("sw", after)) and start_with("sw", before)
    fresh = assemble(point, read=False)
    for method in fresh.methods:
        method.attach(fresh.backbone)
    assert [method.name for method in fresh.methods] == ["sw", "Pfeiffer"] and not fresh.methods[0].is_trained
    started = {name: tensor.clone() for name, tensor in fresh.methods[1].tensors().items()}
    assert all(not torch.equal(tensor, after[name]) for name, tensor in started.items())
    trained = {name for name, p in fresh.tuner.named_parameters() if p.requires_grad}
    assert {name.removeprefix("backbone.") for name in trained if "peft" in name} == set(started)
    record = json.loads((tmp_path / "run" / "adapter" / "adapter.json").read_text())
    assert [spec["class"] for spec in record["methods"]] == ["LanguageAdapter", "Pfeiffer"]
    assert str(copied) not in json.dumps(record) and record["methods"][0]["config"]["trainable"] is False
    assert metrics["config_hash"] == point.hash and str(copied) in (tmp_path / "run" / "config.yaml").read_text()

    shutil.rmtree(copied)
    tuner = load_run(str(tmp_path / "run"))
    found = dict(tuner.backbone.named_parameters())
    assert all(torch.equal(found[name], tensor) for name, tensor in after.items() if name.startswith("peft."))
    with pytest.raises(ScionError, match="no adapter.json here"):
        assemble(point, read=False)


def test_the_command_needs_the_folder_no_more(tiny_config: Path, copied: Path, tmp_path: Path,
                                              capsys: pytest.CaptureFixture[str]) -> None:
    run = tmp_path / "run"
    words = ["--peft", f'{{"adapter": "{copied}"}}', "--peft+=Pfeiffer", *SHORT, "--run_dir", str(run)]
    assert main(["run", str(tiny_config), *words]) == 0
    shutil.rmtree(copied)
    assert main(["test", str(run)]) == 0
    measured = json.loads((run / "tests" / "0" / "metrics.json").read_text())
    assert measured["metrics"]["test"] == pytest.approx(
        json.loads((run / "metrics.json").read_text())["metrics"]["test"], abs=1e-6)
    capsys.readouterr()
    assert main(["run", str(tiny_config), *words[:-1], str(tmp_path / "other")]) == 2
    assert "no adapter.json here" in capsys.readouterr().err and not (tmp_path / "other").exists()


def test_it_goes_on_when_the_folder_is_gone(tiny_config: Path, copied: Path, tmp_path: Path) -> None:
    """Killed behind its second checkpoint; the second time by the command, which rehearses before it goes on."""
    entry = f"{{adapter: {copied}}}"
    split = f"{{class: Split, by: 2, methods: [{entry}, {{class: LanguageAdapter, name: so, reduction: 4}}]}}"
    kinds = {"stack": ["--peft", entry, "--peft+=LoRA"], "split": ["--peft", split],
             "stages": ["--stages.first", "{}", "--stages.second", f"{{peft: [{entry}, LoRA]}}"]}
    for name, words in kinds.items():
        words = [*words, *SHORT]
        point = points(str(tiny_config), words)[0]
        execute(point, tmp_path / name)
        broken = tmp_path / f"{name} killed"
        os.waitpid(child(point, broken, 2), 0)
        assert not is_finished(broken)
        hidden = copied.rename(tmp_path / "hidden")
        try:
            assert main(["run", str(tiny_config), *words, "--run_dir", str(broken)]) == 0
        finally:
            hidden.rename(copied)
        assert weights(broken) == weights(tmp_path / name), name


def test_in_training_again(point_of: PointOf, language: Path, tmp_path: Path) -> None:
    point = point_of("--peft", f"{{adapter: {language}, name: again}}", "--peft.trainable", "true", *SHORT)
    assert point.config["peft"]["init_args"] == {"adapter": str(language), "name": "again", "trainable": True}
    execute(point, tmp_path / "run")
    before, after = tensors_of(language), tensors_of(tmp_path / "run")
    moved = {name.replace("peft.sw.", "peft.again."): tensor for name, tensor in start_with("sw", before).items()}
    assert moved.keys() == start_with("again", after).keys()
    assert not any(torch.equal(tensor, after[name]) for name, tensor in moved.items())
    steps = 6  # of at most the learning rate each
    assert all((tensor - after[name]).abs().max() < 1.5 * steps * 1e-2 for name, tensor in moved.items())


def test_a_folder_with_several_methods(tmp_path: Path) -> None:
    """In their order; Quantize stores LoRA's tensors, so that these wait for it."""
    from core.peft import LoRA, Quantize  # type: ignore[attr-defined]

    model, inputs = make("bert"), batch("bert")
    methods: list[Any] = [LoRA(rank=2).attach(model), Quantize().attach(model)]
    with torch.no_grad():
        for tensor in methods[0].trainable().values():
            tensor.normal_(std=0.2)
    save_adapter(methods, tmp_path)
    fresh, loaded = make("bert"), make("bert")
    load_adapter(tmp_path, loaded)
    for method in load_method(tmp_path):
        method.attach(fresh)
    assert torch.equal(outputs(fresh, inputs), outputs(loaded, inputs))
    assert distance(outputs(fresh, inputs), outputs(make("bert"), inputs)) > 1e-3
    with pytest.raises(ScionError, match="holds 2 methods .LoRA, Quantize., and name: x can be that of one only"):
        load_method(tmp_path, name="x")
    with pytest.raises(ScionError, match="holds 2 methods"):
        Route([load_method(tmp_path)[0]])


def trained_on(model: Any, method: Any) -> Any:
    method.attach(model)
    with torch.no_grad():
        for tensor in method.trainable().values():
            tensor += 0.1 * torch.randn(tensor.shape, generator=torch.Generator().manual_seed(3)).to(tensor)
    return method


def test_methods_that_moved_the_base(tmp_path: Path) -> None:
    from core.peft import LTSFT, BitFit, LoRA  # type: ignore[attr-defined]

    model, inputs = make("bert"), batch("bert")
    sparse = trained_on(model, LTSFT(count=40, backbone_mode="eval"))
    sparse.advance()
    with torch.no_grad():
        for tensor in sparse.trainable().values():
            tensor.fill_(0.3)
    expected = outputs(model, inputs)
    sparse.save(tmp_path / "sparse")
    trained_on(make("bert"), BitFit()).save(tmp_path / "biases")

    fresh = make("bert")
    first = load_method(tmp_path / "sparse", name="mask")
    assert first.stages == ()
    first.attach(fresh)
    assert torch.equal(outputs(fresh, inputs), expected) and first.trainable() == {}
    LoRA(rank=2).attach(fresh)
    BitFit().attach(fresh)  # a sparse method owns no tensor whole
    assert torch.equal(outputs(fresh, inputs), expected)

    other = make("bert")
    BitFit(name="mine").attach(other)
    left = trace(other)
    with pytest.raises(ScionError, match="is trained by mine already; a tensor of the backbone has one owner"):
        load_method(tmp_path / "biases").attach(other)
    assert differences(left, trace(other)) == []


def test_two_owners_are_refused_before_the_data_are_read(point_of: PointOf, tmp_path: Path,
                                                         monkeypatch: pytest.MonkeyPatch) -> None:
    execute(point_of("--peft", "BitFit", *SHORT), tmp_path / "biases")
    point = point_of("--peft", f"{{adapter: {tmp_path / 'biases'}, name: first}}", "--peft+=BitFit")
    monkeypatch.setattr("domains.squares.Squares.load", lambda self: pytest.fail("the data were read"))
    with pytest.raises(ScionError, match="BitFit: .* is trained by first already"):
        assemble(point)


def test_six_entries_under_route_are_six_single_ones(tmp_path: Path) -> None:
    from core.peft import LanguageAdapter  # type: ignore[attr-defined]

    inputs, entries, alone = batch("bert", size=6), [], []
    for number, name in enumerate(("sw", "so", "ha", "yo", "am", "ig")):
        model = make("bert")
        generator = torch.Generator().manual_seed(number)
        method: Any = LanguageAdapter(bottleneck=4).attach(model)
        with torch.no_grad():
            for tensor in method.trainable().values():
                tensor += 0.3 * torch.randn(tensor.shape, generator=generator)
        method.save(tmp_path / name)
        entries.append({"adapter": str(tmp_path / name), "name": name, "trainable": False})
        alone.append(outputs(model, inputs)[number])
    for methods in (entries, [load_method(one["adapter"], one["name"]) for one in entries]):
        model = make("bert")
        route: Any = Route(methods).attach(model)
        assert route.trainable() == {}
        with route.route([0, 1, 2, 3, 4, 5]):
            together = outputs(model, inputs)
        torch.testing.assert_close(together, torch.stack(alone), rtol=0, atol=1e-5)
    assert distance(alone[0], alone[1]) > 1e-3


def test_what_is_drawn_by_name_keeps_its_name(tmp_path: Path) -> None:
    from core.peft import VeRA  # type: ignore[attr-defined]

    model, inputs = make("bert"), batch("bert")
    trained_on(model, VeRA(rank=4)).save(tmp_path)
    fresh = make("bert")
    load_method(tmp_path).attach(fresh)
    assert torch.equal(outputs(fresh, inputs), outputs(model, inputs))
    with pytest.raises(ScionError, match="must be called VeRA here too; leave name out"):
        load_method(tmp_path, name="other").attach(make("bert"))
    with pytest.raises(ScionError, match="must be called VeRA here too"):
        Route([{"adapter": str(tmp_path), "name": "other"}]).attach(make("bert"))


def test_another_base(tmp_path: Path) -> None:
    from core.peft import BitFit, LoRA  # type: ignore[attr-defined]

    trained_on(make("bert"), LoRA(rank=2)).save(tmp_path / "lora")
    trained_on(make("bert"), BitFit()).save(tmp_path / "biases")
    for other in (make("bert", seed=3), make("bert", width=16)):
        left = trace(other)
        with pytest.raises(ScionError, match="belongs to another base .fingerprint"):
            load_method(tmp_path / "lora").attach(other)
        assert differences(left, trace(other)) == []
    with pytest.warns(UserWarning, match="carried from base"):
        load_method(tmp_path / "lora", base="any").attach(make("bert", seed=3))
    with pytest.raises(ScionError, match="cannot be carried over"):
        load_method(tmp_path / "biases", base="any").attach(make("bert", seed=3))
    method = load_method(tmp_path / "lora").attach(make("bert"))
    method.remove()
    with pytest.raises(ScionError, match="load .* again"):
        method.attach(make("bert"))


def test_another_tokenizer(tmp_path: Path) -> None:
    from core.peft import LoRA  # type: ignore[attr-defined]

    def with_tokenizer(fingerprint: str) -> Any:
        model: Any = make("bert")
        model.tokenizer_fingerprint = fingerprint
        return model

    trained_on(with_tokenizer("one"), LoRA(rank=2)).save(tmp_path)
    load_method(tmp_path).attach(with_tokenizer("one"))
    for method in (load_method(tmp_path), Route([{"adapter": str(tmp_path)}])):
        with pytest.raises(ScionError, match="was trained with another tokenizer .fingerprint one, here two"):
            method.attach(with_tokenizer("two"))
    with pytest.warns(UserWarning, match="carried from the tokenizer one to two"):
        load_method(tmp_path, base="any").attach(with_tokenizer("two"))


def test_words_on_the_command_line(tiny_config: Path, language: Path) -> None:
    def peft(*words: str) -> Any:
        return points(str(tiny_config), list(words))[0].config["peft"]

    entry = {"class_path": "Trained", "init_args": {"adapter": str(language)}}
    lora = {"class_path": "LoRA", "init_args": {}}
    assert peft("--peft", f'{{"adapter": "{language}"}}') == entry
    assert peft("--peft", f"[{{adapter: {language}}}, LoRA]") == [entry, lora]
    assert peft(f"--peft+={{adapter: {language}}}") == [lora, entry]
    assert peft(f"--peft+={{adapter: {language}, name: a}}", "--peft.a.trainable", "true")[1]["init_args"] == {
        "adapter": str(language), "name": "a", "trainable": True}
    stage = points(str(tiny_config), ["--stages.one", f"{{peft: {{adapter: {language}}}}}"])[0].config["stages"]["one"]
    assert stage["peft"] == entry
    found = points(str(tiny_config), ["--over", f"peft=LoRA,{{adapter: {language}}}"])
    assert [point.axes["peft"] for point in found] == ["LoRA", str(language)]
    assert len({point.name for point in found}) == 2
    rehearse(found)
    assert f"adapter: {language}" in resolved(found)
    assert "--peft.trainable  bool = False" in fields_text(found[1])
    assert tuple(signature(Trained).parameters) == TRAINED_OPTIONS


@pytest.mark.parametrize(("words", "text"), [
    ("{adapter: HERE, trainble: false}", "peft.trainble: a trained adapter has no option 'trainble' .did you mean "
                                         "'trainable'"),
    ("{adapter: HERE, trainable: maybe}", "peft.trainable: must be true or false, not 'maybe'"),
    ("{adapter: [HERE]}", "peft.adapter: must be a folder, not "),
    ("{adapter: HERE, base: other}", "base"),
    ("{adapter: nowhere}", "nowhere: no adapter.json here"),
    ("{class: Route, methods: [{adapter: HERE, nme: a}]}", "trainable, not 'nme' .did you mean 'name'"),
    ("{class: Route, methods: [{adapter: HERE, trainable: 3}]}", "Route.*trainable"),
    ("[{adapter: HERE}, {adapter: HERE}]", "two methods are called 'sw'; give one of them another name"),
    ("[{adapter: HERE}, {class: LoRA, name: sw}]", "two methods are called 'sw'"),
])
def test_what_is_refused_before_anything_is_built(tiny_config: Path, language: Path, words: str, text: str) -> None:
    with pytest.raises(ScionError, match=text) as caught:
        rehearse(points(str(tiny_config), ["--peft", words.replace("HERE", str(language))]))
    assert "\n" not in str(caught.value)


def test_a_frozen_one_in_a_later_stage(point_of: PointOf, copied: Path, tmp_path: Path) -> None:
    """The first stage trains it on; the second names it again, frozen."""
    trained, frozen = (f"{{peft: [{{adapter: {copied}, trainable: {word}}}, LoRA]}}" for word in ("true", "false"))
    point = point_of("--stages.first", trained, "--stages.second", frozen, *SHORT)
    execute(point, tmp_path / "run")
    first = load_file(tmp_path / "run" / "stages" / "first" / "adapter" / "adapter.safetensors")
    last = tensors_of(tmp_path / "run")
    assert same(start_with("sw", first), start_with("sw", last))
    assert not same(start_with("sw", first), start_with("sw", tensors_of(copied)))
    assert not same(start_with("LoRA", first), start_with("LoRA", last))
    folder = measure(tmp_path / "run", point)
    assert json.loads((folder / "metrics.json").read_text())["changed"] == []
