"""A run that takes a second, and children that do it: forked from this process, which has imported everything."""

from __future__ import annotations

import json
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from core.config import Point

PointOf = Callable[..., Point]
PARTS = '''
import torch
from torch.utils.data import TensorDataset
from core.backbone import Backbone
from core.data import DataModule


class Squares(DataModule):
    """Noise with one of four patches bright."""

    def __init__(self, no_validation: bool = False, **common):
        super().__init__(**common)
        self.no_validation = no_validation

    def load(self):
        generator = torch.Generator().manual_seed(0)
        images, targets = torch.randn(96, 3, 16, 16, generator=generator), torch.arange(96) % 4
        for image, target in zip(images, targets):
            row, column = divmod(int(target), 2)
            image[:, 8 * row : 8 * row + 8, 8 * column : 8 * column + 8] += 1
        self.train_set = TensorDataset(images[:48], targets[:48])
        self.validation_set = None if self.no_validation else TensorDataset(images[48:64], targets[48:64])
        self.test_set = TensorDataset(images[64:], targets[64:])
        self.classes, self.origin = list("abcd"), {"source": "mini", "name": "squares"}

    def example(self, batch_size=1):
        return torch.zeros(batch_size, 3, 16, 16)

    def read(self, file):
        raise NotImplementedError


class SmallViT(Backbone):
    def __init__(self, name="small", pretrained=False):
        super().__init__()
        import timm

        self.model = timm.create_model("vit_tiny_patch16_224", img_size=16, patch_size=8, embed_dim=16, depth=2,
                                       num_heads=2, num_classes=0, drop_path_rate=0.2)
        self.dim, self.origin = 16, {"name": name, "pretrained": pretrained, "kind": "random"}

    def forward(self, inputs):
        return self.model(inputs)
'''
CONFIG = """
model: {backbone: killed_parts.SmallViT, task: {class_path: Classification, init_args: {dropout: 0.1}}}
data: {class_path: killed_parts.Squares, init_args: {batch_size: 8}}
peft: LoRA
optimizer: {lr: 1.0e-2}
trainer: {max_epochs: 3, checkpoint_every_n_steps: 2, enable_progress_bar: false, accelerator: cpu}
"""


def put_domain(patch: pytest.MonkeyPatch, home: Path, name: str, code: str) -> None:
    """Put a domain with this code on the import path, as long as ``patch`` holds."""
    folder = home / "domains" / name
    folder.mkdir(parents=True)
    (folder / "__init__.py").write_text(code)
    patch.syspath_prepend(home)


def forget_domain(name: str) -> None:
    """Let the next import of a domain read its code again."""
    for module in [module for module in sys.modules if module.startswith(f"domains.{name}")]:
        del sys.modules[module]


def tiny_domain(patch: pytest.MonkeyPatch, home: Path, name: str, more: str) -> Path:
    """The configuration of the tiny run with its parts, and ``more`` behind them, as a domain, whose runs can be loaded
    again; no picture is drawn."""
    put_domain(patch, home, name, PARTS + more)
    patch.setattr("core.report.plots.save_figure", lambda *figure_and_path, **options: None)
    file = home / f"{name}.yaml"
    file.write_text(CONFIG.replace("killed_parts.", "") + f"domain: {name}\n")
    return file


def fork(work: Callable[[], int], output: Path | None = None) -> int:
    """The process number of a child that does ``work`` and exits with what it returns; what it prints goes to
    ``output``."""
    pid = os.fork()
    if pid:
        return pid
    code = 99
    try:
        target = os.open(output or os.devnull, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(target, 1)
        os.dup2(target, 2)
        sys.stdout, sys.stderr = (open(handle, "w", closefd=False) for handle in (1, 2))  # pytest has put its own there
        code = work()
    except BaseException:
        import traceback

        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def exit_code(pid: int) -> int:
    """The exit code of a child, or minus the signal that ended it."""
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def signal_behind(number: int, sign: int) -> None:
    """In a child: send ``sign`` to oneself right behind the writing of the ``number``-th checkpoint."""
    from core.training.checkpoints import AtomicCheckpointIO

    save, written = AtomicCheckpointIO.save_checkpoint, [0]

    def counted(self: Any, *args: Any, **kwargs: Any) -> None:
        save(self, *args, **kwargs)
        written[0] += 1
        if written[0] == number:
            os.kill(os.getpid(), sign)

    AtomicCheckpointIO.save_checkpoint = counted  # type: ignore[method-assign]


def child(point: Point, folder: Path, stop_after: int | None = None) -> int:
    """A child that runs ``point`` in ``folder``; with ``stop_after`` it dies right behind that checkpoint."""
    from core.training.run import execute

    def work() -> int:
        if stop_after is not None:
            signal_behind(stop_after, signal.SIGKILL)
        execute(point, folder)
        return 0

    return fork(work)


def weights(folder: Path) -> bytes:
    return (folder / "adapter" / "adapter.safetensors").read_bytes()


def results(folder: Path) -> dict[str, Any]:
    """All that a run leaves and that must not depend on how often it was interrupted."""
    record = json.loads((folder / "metrics.json").read_text())
    stages = [{key: value for key, value in stage.items() if key != "seconds"}
              for stage in record.pop("stages", {}).values()]
    for key in ("seconds", "peak_memory_bytes"):
        record.pop(key, None)
    return {"weights": weights(folder), "record": record, "stages": stages,
            "history": json.loads((folder / "history.json").read_text())}


def is_finished(folder: Path) -> bool:
    record = folder / "metrics.json"
    return record.is_file() and json.loads(record.read_text())["status"] == "finished"


def finish(point: Point, folder: Path) -> bytes:
    """Run to the end what was interrupted; returns the weights."""
    if not is_finished(folder):
        assert exit_code(child(point, folder)) == 0, "the resumed run failed"
    return weights(folder)
