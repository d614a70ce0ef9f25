"""A run that is killed at any moment and started again ends with the weights of an unbroken one, to the bit.

Children are forked from this process, which has imported everything, and killed by SIGKILL: after a random time, or
right behind the writing of a checkpoint. `make test-all` makes 20 tries a method at random times.
"""

from __future__ import annotations

import os
import random
import shutil
import signal
import time
from pathlib import Path

import pytest

ALL = bool(os.environ.get("SCION_ALL"))
OPTIONS = {
    "LoRA": ["--peft.dropout", "0.1"],                          # a static one, with noise
    "LTSFT": [],                                                # two stages
    "AdaLoRA": [],                                              # a schedule with running scores, a loss of its own
    "TriAdaptLoRA": [],                                         # tensors that appear in mid-run
    "MoS": ["--peft.rank", "2"],                                # shared tensors with indices
    "GaLore": ["--peft.rank", "4", "--peft.interval", "5"],     # an optimizer
    "IST": ["--peft", "LoRA", "--peft+=IST"],                   # other layers at each step, over another method
    "Hydra": ["--peft.dropout", "0.1"],
    "LIFT": ["--peft.rank", "2", "--peft.interval", "4"],       # positions that move with their moments
    "SpIEL": ["--peft.rank", "2", "--peft.interval", "5", "--peft.window", "2"],  # windows, an optimizer
    "RAMT": [],                                                 # two gradients, draws
    "Quantize": ["--peft", "LoRA", "--peft+=Quantize"],         # files in bits
    "VQT": ["--peft.keep", "0.5"],                              # a wider feature, two stages, a new head
    "LadderSideTuning": ["--peft.reduction", "2", "--peft.init", "fisher", "--peft.samples", "16"],  # data first
    "MTLoRA": ["--peft.tasks", "[one, two]"],                   # streams in the batch, tensors of the base
    "Pfeiffer": ["--peft", "{class: LanguageAdapter, trainable: false}", "--peft+={class: Pfeiffer, bottleneck: 4}"],
}
METHODS = list(OPTIONS)
QUICK = ("LoRA", "TriAdaptLoRA", "SpIEL", "VQT")
"""Those that the quick tier kills more often, and at random: plain, growing, with moving indices, in two stages."""
ONCE = ("AdaLoRA", "GaLore", "IST", "LadderSideTuning")
"""Those that it kills once: with running scores, an optimizer, over another method, with data first."""
PARTS = '''
import torch
from torch.utils.data import TensorDataset
from core.backbone import Backbone
from core.data import DataModule


class Squares(DataModule):
    """Noise with one of four patches bright."""

    def load(self):
        generator = torch.Generator().manual_seed(0)
        images, targets = torch.randn(96, 3, 16, 16, generator=generator), torch.arange(96) % 4
        for image, target in zip(images, targets):
            row, column = divmod(int(target), 2)
            image[:, 8 * row : 8 * row + 8, 8 * column : 8 * column + 8] += 1
        self.train_set = TensorDataset(images[:48], targets[:48])
        self.validation_set = TensorDataset(images[48:64], targets[48:64])
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


@pytest.fixture(scope="module")
def point_of(tmp_path_factory: pytest.TempPathFactory):
    home = tmp_path_factory.mktemp("parts")
    (home / "killed_parts.py").write_text(PARTS)
    (home / "killed.yaml").write_text(CONFIG)
    from core import report, run
    from core.config import points

    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(home)
        # drawing takes longer than training here
        patch.setattr(report, "_save", lambda *figure_and_path, **options: None)
        point = points(str(home / "killed.yaml"))[0]
        run.execute(point, tmp_path_factory.mktemp("warm"))  # imports what a child would import, and time with it
        yield lambda *overrides: points(str(home / "killed.yaml"), list(overrides))[0]


def child(point, folder: Path, stop_after: int | None = None) -> int:
    """Fork a process that runs ``point`` in ``folder``; with ``stop_after`` it dies right behind that checkpoint."""
    from core import run

    pid = os.fork()
    if pid:
        return pid
    code = 1
    try:
        quiet = os.open(os.devnull, os.O_WRONLY)
        os.dup2(quiet, 1)
        os.dup2(quiet, 2)
        if stop_after is not None:
            save, written = run.AtomicCheckpointIO.save_checkpoint, [0]

            def counted(self, *args, **kwargs):
                save(self, *args, **kwargs)
                written[0] += 1
                if written[0] == stop_after:
                    os.kill(os.getpid(), signal.SIGKILL)

            run.AtomicCheckpointIO.save_checkpoint = counted
        run.execute(point, folder)
        code = 0
    finally:
        os._exit(code)


def weights(folder: Path) -> bytes:
    return (folder / "adapter" / "adapter.safetensors").read_bytes()


def finish(point, folder: Path) -> bytes:
    import json

    record = folder / "metrics.json"
    if not record.is_file() or json.loads(record.read_text())["status"] == "running":
        _, status = os.waitpid(child(point, folder), 0)
        assert status == 0, "the resumed run failed"
    return weights(folder)


@pytest.mark.parametrize("method", [
    pytest.param(name, marks=() if name in QUICK + ONCE else pytest.mark.slow) for name in METHODS])
def test_killed_behind_a_checkpoint(point_of, tmp_path: Path, method: str) -> None:
    from core import run

    point = point_of("--peft", method, *OPTIONS.get(method, []))
    run.execute(point, tmp_path / "unbroken")
    reference = weights(tmp_path / "unbroken")
    total = 24 if method in ("LTSFT", "VQT") else 12  # two stages
    stops = range(1, total + 1) if ALL else (1, total // 2 + 1) if method in QUICK else (total // 2 + 1,)
    for stop in stops:
        folder = tmp_path / f"stop{stop}"
        os.waitpid(child(point, folder, stop), 0)
        assert finish(point, folder) == reference, f"killed behind checkpoint {stop}"


@pytest.mark.parametrize("method", [
    pytest.param(name, marks=() if name in QUICK else pytest.mark.slow) for name in METHODS])
def test_killed_at_random(point_of, tmp_path: Path, method: str) -> None:
    from core import run

    point = point_of("--peft", method, *OPTIONS.get(method, []))
    began = time.monotonic()
    run.execute(point, tmp_path / "unbroken")
    took = time.monotonic() - began
    reference = weights(tmp_path / "unbroken")
    chance = random.Random(0)
    for number in range(20 if ALL else 2):
        folder = tmp_path / "killed"
        shutil.rmtree(folder, ignore_errors=True)
        for _ in range(2):
            pid = child(point, folder)
            time.sleep(chance.uniform(0.05, took))
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
            if (folder / "adapter").exists():
                break
        assert finish(point, folder) == reference, f"try {number}"
