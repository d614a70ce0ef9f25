"""The embedded default: a mini that is always the same, a nano that is small, and knowledge that carries over."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from domains.audio import AST, ESC50, make_nano, mini
from domains.audio.backbones import NANO
from domains.audio.features import normalise


def test_mini_is_deterministic_and_balanced() -> None:
    for name in mini.CLASSES:
        wave = mini.clip(name, "train", 1, 0)
        assert wave.shape == (18_160,) and np.isfinite(wave).all() and 0.01 < np.abs(wave).max() <= 1
        assert np.array_equal(wave, mini.clip(name, "train", 1, 0))
        assert not np.array_equal(wave, mini.clip(name, "test", 1, 0))
    banks, targets = mini.split("validation", 1)
    assert banks.shape == (100, 112, 128) and torch.bincount(targets).tolist() == [10] * 10


def test_mini_as_a_datamodule() -> None:
    data: Any = ESC50(source="mini")
    data.setup()
    assert [len(part) for part in (data.train_set, data.validation_set, data.test_set)] == [400, 100, 400]
    assert data.origin == {"source": "mini", "name": "mini ESC (10 synthetic sounds)"}
    assert data.classes == list(mini.CLASSES)
    banks, targets = next(iter(data.train_dataloader()))
    assert banks.shape == (32, 112, 128) and targets.shape == (32,)


def test_classes_of_mini_and_nano_do_not_overlap() -> None:
    assert len(mini.CLASSES) == 10 and len(make_nano.CLASSES) == 64 == len(set(make_nano.CLASSES))
    assert not set(mini.CLASSES) & set(make_nano.CLASSES)


@pytest.mark.parametrize("frames", [112, 512])
def test_pretraining_clips(frames: int) -> None:
    for target in (0, 13, 38, 63):
        wave = make_nano.clip(target, frames, 0)
        assert np.isfinite(wave).all() and np.array_equal(wave, make_nano.clip(target, frames, 0))
    source, gesture = make_nano.Pretraining()(torch.randn(2, frames, 128))
    assert source.shape == gesture.shape == (2, 8)


def test_pretraining_is_decided_by_its_seed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(make_nano, "LENGTHS", {112: (8, 8), 512: (2, 2)})
    monkeypatch.setattr(make_nano, "_accuracy", lambda *_: [0.5, 0.5])
    network, report = make_nano.train(seed=3, steps=4)
    make_nano.save(network, report, tmp_path / "nano")
    backbone = AST(str(tmp_path / "nano"), frames=112)
    saved, trained = backbone.model.state_dict(), network.model.state_dict()
    assert torch.equal(saved["layers.0.mlp.fc1.weight"], trained["layers.0.mlp.fc1.weight"])
    again, _ = make_nano.train(seed=3, steps=4)
    assert all(torch.equal(a, b) for a, b in zip(network.parameters(), again.parameters(), strict=True))


def test_nano_is_small_and_whole() -> None:
    assert sum(file.stat().st_size for file in NANO.iterdir()) <= 4_000_000
    for frames in (112, 500):
        backbone = AST("nano", frames=frames)
        assert backbone.origin == {"name": "nano", "pretrained": True, "kind": "nano"}
        assert backbone(torch.zeros(1, frames, 128)).isfinite().all()


@torch.no_grad()
def _features(backbone: AST, banks: Tensor) -> Tensor:
    found = torch.cat([backbone.eval()(part) for part in normalise(banks).split(50)])
    return (found - found.mean(0)) / (found.std(0) + 1e-6)


def _probe(train: Tensor, targets: Tensor, test: Tensor, wanted: Tensor) -> float:
    """Accuracy of ridge regression onto the classes."""
    inputs = torch.cat([train, torch.ones(len(train), 1)], dim=1).double()
    onto = torch.nn.functional.one_hot(targets).double()
    weight = torch.linalg.solve(inputs.T @ inputs + 10 * torch.eye(inputs.shape[1]), inputs.T @ onto)
    guess = torch.cat([test, torch.ones(len(test), 1)], dim=1).double() @ weight
    return float((guess.argmax(1) == wanted).float().mean())


def test_what_nano_knows_carries_over_to_the_mini() -> None:
    (train, targets), (test, wanted) = mini.split("train", 1), mini.split("test", 1)
    score = {}
    for pretrained in (True, False):
        torch.manual_seed(0)
        backbone = AST("nano", pretrained=pretrained, frames=mini.FRAMES)
        score[pretrained] = _probe(_features(backbone, train), targets, _features(backbone, test), wanted)
    assert score[True] > score[False] + 0.1 > 0.2
