"""What messages say: what was found, in the words of the person who reads it, and what to do."""

from __future__ import annotations

import ast
import logging
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from core import cli, dissect, load_adapter, load_run, peft
from core.config.grid import points
from core.config.trainer_checks import check_trainer
from core.errors import ScionError
from core.peft.weights.lora import LoRA
from core.tasks import Classification
from core.training.finetuner import FineTuner
from core.training.run_log import RunLog
from core.training.run_record import save_run_adapter
from tests.models import batch, make, tied_llama
from tests.toolkit import distance, randomize

ROOT = Path(__file__).parents[2]
ESC50 = "domains/audio/esc50.yaml"


# ------------------------------------------------------------------------------------------------- configurations


@pytest.mark.parametrize(("name", "told"), [
    ("logger", r"trainer.logger: a run sets this itself \(it writes history.json, log.txt, .*\); leave it out"),
    ("callbacks", "the methods are those of the key peft"), ("default_root_dir", "its folder is --run_dir"),
    ("gpus", "it is called 'devices' here"), ("epochs", "it is called 'max_epochs' here"),
    ("max_epoch", "did you mean 'max_epochs'")])
def test_arguments_of_the_trainer(name: str, told: str) -> None:
    """An argument that the Trainer has is not said to be unknown; what others call it is known."""
    with pytest.raises(ScionError, match=told):
        check_trainer({name: "csv"})


@pytest.mark.parametrize(("words", "told"), [
    (["--lr", "1e-3"], "did you mean 'optimizer.lr'"), (["--batch_size", "4"], "did you mean 'data.batch_size'"),
    (["--epochs", "3"], "did you mean 'trainer.max_epochs'"), (["--seed", "1"], "did you mean 'seed_everything'"),
    (["--output_dir", "x"], "did you mean 'run_dir'"), (["--ckpt_path", "x"], "same --run_dir goes on"),
    (["--lr_scheduler.name", "step"], "must be one of 'cosine', 'linear', 'constant', not 'step'"),
    (["--peft.r", "8"], "it is called 'rank' here"), (["--peft.lora_alpha", "8"], "it is called 'alpha' here"),
    (["--peft", "null"], "LinearProbe trains the head alone"),
    (["--peft", "LoRA,BitFit"], r"a stack of methods is written \[LoRA, BitFit\]"),
    (["--peft", "[LoRA, LoRA]"], "two methods are called 'LoRA'; give one of them another name, as in {class: LoRA"),
    (["--optimizer.betas", "[0.9, 0.9]"], "optimizer.options.betas")])
def test_keys_that_people_look_for(words: list[str], told: str) -> None:
    with pytest.raises(ScionError, match=told):
        points(ESC50, words)


def test_one_word_where_a_list_belongs() -> None:
    from core.config.build import typed

    with pytest.raises(ScionError, match=r"must be a list .*, not 'q'; write \[q\]"):
        typed(LoRA, {"targets": "q"}, "peft")


def test_an_accelerator_that_is_not_there() -> None:
    absent = "tpu" if torch.cuda.is_available() else "cuda"
    with pytest.raises(ScionError, match=f"trainer.accelerator: .*'{absent}' asked for; auto takes what this machine"):
        check_trainer({"accelerator": absent})


def test_folders_in_the_place_of_others(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").touch()
    with pytest.raises(ScionError, match="its configuration is .*config.yaml"):
        points(str(tmp_path), [])
    with pytest.raises(ScionError, match="no adapter.json in a folder adapter here; give the folder of a run"):
        load_run(str(tmp_path))


@pytest.mark.parametrize(("name", "role"), [("query", "q"), ("v_proj", "v"), ("fc1", "mlp.up")])
def test_a_modules_name_as_a_target(name: str, role: str) -> None:
    with pytest.raises(ScionError, match=f"target {name!r} matches nothing in BertModel .did you mean {role!r}"):
        LoRA(targets=(name,)).attach(make("bert"))


def test_a_configuration_by_its_bare_name() -> None:
    with pytest.raises(ScionError, match="did you mean 'domains/audio/esc50.yaml'") as error:
        points("esc50", [])
    assert str(error.value).count(ESC50) == 2  # the hint, and once in the list


def test_warnings_of_commands_are_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without the line of code that they come from; and the interpreter has its own form back."""
    before, seen = warnings.formatwarning, []

    def dispatch(*_: Any) -> int:
        seen.append(warnings.formatwarning("the nano", UserWarning, __file__, 20, "import ast"))
        return 0

    monkeypatch.setattr("core.cli.entry._dispatch", dispatch)
    assert cli.main(["methods"]) == 0
    assert seen == ["UserWarning: the nano\n"] and warnings.formatwarning is before


def test_the_log_of_a_run_holds_its_warnings(tmp_path: Path) -> None:
    """Those before there is a folder as those after, and the lines of epochs."""
    with RunLog() as messages:
        warnings.formatwarning("the nano", UserWarning, __file__, 20)  # what Python calls for one that is shown
        messages.write_to(tmp_path / "log.txt")
        warnings.formatwarning("a short epoch", UserWarning, __file__, 20)
        logging.getLogger("scion").info("epoch 1/1")
    lines = (tmp_path / "log.txt").read_text().splitlines()
    assert [line.partition(": ")[2] for line in lines] == ["UserWarning: the nano", "UserWarning: a short epoch",
                                                           "epoch 1/1"]


def test_bars_are_for_terminals() -> None:
    """Every bar says where it is off: a file would get hundreds of pieces of it."""
    for file in [*(ROOT / "core").rglob("*.py"), *(ROOT / "domains").rglob("*.py")]:
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.Call) and getattr(node.func, "id", "") == "tqdm":
                assert "disable" in [keyword.arg for keyword in node.keywords], f"{file}:{node.lineno}"


# ------------------------------------------------------------------------------------------------- models


def test_an_unknown_anatomy_names_the_librarys_class(monkeypatch: pytest.MonkeyPatch) -> None:
    """Not the wrapper's, however many there are; and before weights are asked for that nothing can be done with."""
    from domains.vision import TimmBackbone, backbones

    told = r"anatomy of ResNet \(in {}\) is unknown .*family\('timm.models.resnet:ResNet'\)"
    backbone = TimmBackbone("resnet18", pretrained=False)
    for model in (backbone, nn.Sequential(backbone)):
        with pytest.raises(ScionError, match=told.format(type(model).__name__)):
            dissect(model)
    monkeypatch.setattr(backbones, "reachable", lambda url: False)
    monkeypatch.setattr(backbones, "_cached", lambda repository, file: None)
    with pytest.raises(ScionError, match="anatomy of ResNet is unknown"):
        TimmBackbone("resnet18")
    with pytest.raises(ScionError, match="not in the cache"):
        TimmBackbone("vit_tiny_patch16_224")
    own = nn.Module()
    own.body = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    with pytest.raises(ScionError, match="anatomy of Module is unknown"):  # torch's containers are nobody's backbone
        dissect(own)


def test_an_adapter_of_a_run_on_another_size_points_to_load_run(tmp_path: Path) -> None:
    from domains.audio import AST

    with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        tuner = FineTuner(AST("nano", frames=48), Classification(), ["hiss", "hum"]).eval()
        other = AST("nano", frames=64)
    randomize(LoRA(rank=2).attach(tuner.backbone))
    save_run_adapter(tuner, tmp_path / "run" / "adapter")
    with pytest.raises(ScionError, match=r"another base .*core.load_run\('.*run'\) builds the run's own backbone"):
        load_adapter(tmp_path / "run", other)
    inputs = torch.randn(2, 48, 128)
    assert torch.equal(load_run(str(tmp_path / "run"))(inputs), tuner(inputs))


# ------------------------------------------------------------------------------------------------- methods


def test_a_second_method_of_one_name() -> None:
    model = make("bert")
    first = LoRA().attach(model)
    with pytest.raises(ScionError, match=r"take it off first \(.remove\(\)\); to have both, one on the other, name"):
        LoRA().attach(model)
    first.remove()
    LoRA().attach(model)


def test_the_way_out_of_a_tie(tmp_path: Path) -> None:
    """What the message says to do can be done: the method then merges, and computes what it did before."""
    model, inputs = tied_llama(), batch("llama")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        method = LoRA(rank=2, targets=("lm_head",)).attach(model)
    randomize(method)
    method.save(tmp_path)
    expected = model(inputs).logits
    with pytest.raises(ScionError, match=r"tied to .*embed_tokens.weight, .*untie them .*model.lm_head.weight = torch"):
        method.merge()
    free = tied_llama()
    free.lm_head.weight = torch.nn.Parameter(free.lm_head.weight.detach().clone())
    free.config.tie_word_embeddings = False
    loaded = load_adapter(tmp_path, free)
    loaded.merge()
    assert distance(free(inputs).logits, expected) < 1e-5


def test_after_half_a_weight_is_still_made() -> None:
    """There is no Fourier transform in half precision."""
    model, method = make("timm_vit"), peft.make("FourierFT", {"frequencies": 20, "init": "normal"})
    method.attach(model)
    expected = model(batch("timm_vit"))
    model.half()
    assert distance(model(batch("timm_vit").half()).float(), expected) < 0.05


@pytest.mark.parametrize("before", [True, False])
def test_timms_own_checkpointing_does_not_go_with_a_ladder(before: bool) -> None:
    model: Any = make("timm_vit")
    if before:
        model.model.set_grad_checkpointing(True)
    peft.make("LadderSideTuning", {}).attach(model)
    model.model.set_grad_checkpointing(True)
    with pytest.raises(ScionError, match=r"grad_checkpointing runs blocks again.*checkpoint_activations\(model\)"):
        model.train()(batch("timm_vit"))
