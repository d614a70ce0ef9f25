"""What is wrong with a command line is told before the backbone's library is imported, which takes seconds."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

RUN = ["run", "domains/audio/esc50.yaml", "--data.source", "mini", "--model.backbone.name", "nano"]
CASES: list[tuple[list[str], str]] = [
    (["--peft", "Lora"], "did you mean 'LoRA'"),
    (["--peft", "LoRA", "--peft.rnak", "4"], "did you mean 'rank'"),
    (["--peft", "LoRA", "--peft.rank", "0"], "rank 0 must be at least 1"),
    (["--peft", "LoRA", "--peft.targets=[nothing]"], "target 'nothing' matches nothing in AST"),
    (["--peft", "LoRA", "--peft.targets=[q,mlp.gate]"], "target 'mlp.gate' matches nothing in AST"),
    (["--peft", "BitFit", "--peft.layers=[0,99]"], "layer 99 does not exist; AST has the layers 0 to 3"),
    (["--model.task.num_classes", "7"], "7 classes are asked for, the data has 10"),
    (["--trainer.max_epoch", "3"], "did you mean 'max_epochs'"),
    (["--data.fold", "9"], "9 is not one of the folds"),
    (["--data.source", "real", "--data.root", "nowhere"], "no folder nowhere"),
]
SCRIPT = """
import contextlib, io, json, sys
from core.cli import main
told = []
for words in json.loads(sys.argv[1]):
    with contextlib.redirect_stderr(io.StringIO()) as stream, contextlib.redirect_stdout(io.StringIO()) as out:
        code = main(words)
    told.append([code, stream.getvalue(), out.getvalue(), "transformers" in sys.modules])
print(json.dumps(told))
"""


def test_refusals_come_early(tmp_path: Path) -> None:
    lines = [[*RUN, *words, "--run_dir", str(tmp_path / "run")] for words, _ in CASES]
    done = subprocess.run([sys.executable, "-c", SCRIPT, json.dumps(lines)], capture_output=True, text=True, check=True)
    for (words, wanted), (code, line, out, late) in zip(CASES, json.loads(done.stdout), strict=True):
        assert (code, out, late) == (2, "", False), words
        assert line.startswith("lightning run: ") and line.count("\n") == 1 and wanted in line
    assert not (tmp_path / "run").exists()


def test_debug_shows_the_traceback(tmp_path: Path) -> None:
    for words in (["--debug", *RUN], [*RUN, "--debug"]):
        command = [sys.executable, "-m", "core", *words, "--peft", "LoRAA"]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert done.returncode == 2 and "Traceback" in done.stderr and "no method is called 'LoRAA'" in done.stderr


def test_an_adapter_of_another_run_is_refused(tmp_path: Path) -> None:
    (tmp_path / "adapter").mkdir()
    (tmp_path / "adapter" / "adapter.json").write_text('{"base": {"fingerprint": "one"}}')
    (tmp_path / "metrics.json").write_text('{"backbone": {"fingerprint": "two"}}')
    for words in (["predict", str(tmp_path), "x.wav"], ["merge", str(tmp_path), str(tmp_path / "out")]):
        done = subprocess.run([sys.executable, "-m", "core", *words], capture_output=True, text=True, check=False)
        assert done.returncode == 2 and "belongs to another base (fingerprint one)" in done.stderr
        assert done.stderr.count("\n") == 1
