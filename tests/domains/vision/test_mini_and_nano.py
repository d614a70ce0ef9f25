"""The embedded default: a mini that is always the same, nanos that are small, and knowledge that carries over."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from core.errors import ScionError
from domains.vision import draw, make_nano, mini
from domains.vision.backbones import NANOS

FOLDER = Path(make_nano.__file__).parent


# ---- drawing


def test_a_disc_covers_its_area_wherever_it_lies() -> None:
    forms = draw.bank([draw.disc()])
    x = np.array([24.0, 20.3, 27.7])
    distance, u, v = draw.place(forms, np.zeros(3, dtype=int), x, x, np.array([10.0, 5.0, 12.5]), np.zeros(3))
    area = draw.cover(distance).sum(axis=(1, 2))
    assert np.allclose(area, np.pi * np.array([10, 5, 12.5]) ** 2, rtol=0.02)
    assert np.allclose(u[0, 24, 34], 1.05) and np.allclose(v[0, 34, 24], 1.05)  # the centre of a pixel is at a half


def test_angles_turn_clockwise_as_seen() -> None:
    forms = draw.bank([draw.box(1, 0.2)])
    middle = np.array([24.0])
    distance, _, _ = draw.place(forms, np.array([0]), middle, middle, np.array([15.0]), np.array([np.pi / 4]))
    inside = distance[0] < 0
    assert inside[33, 33] and inside[15, 15] and not inside[33, 15] and not inside[15, 33]


def test_forms_are_signed_distances() -> None:
    square, star = draw.box(0.5, 0.5), draw.star(5, 0.5)
    middle = draw.FINE // 2
    assert square[middle, middle] == pytest.approx(-0.5, abs=0.04) and square[0, 0] == pytest.approx(0.9 * 2**0.5)
    assert star[middle, middle] < 0 < star[0, 0]


def test_overlaid_colours_can_be_told_apart() -> None:
    rng = draw.generator("test")
    ground = draw.colours(rng, 500)
    assert np.abs(draw.unlike(rng, ground) - ground).max(axis=1).mean() > 0.4
    assert ground.shape == (500, 3) and 0 <= ground.min() and ground.max() <= 1


def test_drawing_is_quick_enough_for_the_pretraining() -> None:
    import time

    make_nano.batch("quick", n=32)
    start = time.process_time()
    make_nano.batch("quick", n=128)
    assert time.process_time() - start < 0.5  # some 50 ms on an idle core


# ---- the mini


@pytest.mark.parametrize("task", mini.TASKS)
def test_mini_is_deterministic_and_balanced(task: str) -> None:
    classes = len(mini.TASKS[task].classes)
    assert len(set(mini.TASKS[task].classes)) == classes
    pictures, targets = mini.split(task, "validation")
    assert pictures.shape == (200, 3, 48, 48) and pictures.dtype == torch.uint8 and targets.dtype == torch.int64
    counts = torch.bincount(targets, minlength=classes)
    assert len(counts) == classes and counts.max() - counts.min() <= 1
    assert targets[:20].unique().numel() > 2  # shuffled
    mini._split.cache_clear()
    again = mini.split(task, "validation")
    assert torch.equal(pictures, again[0]) and torch.equal(targets, again[1])
    assert not torch.equal(pictures, mini.split(task, "validation", 1)[0])
    assert pictures.float().std(dim=(1, 2, 3)).min() > 1  # no picture is blank


def test_mini_splits_have_their_sizes_and_differ() -> None:
    assert mini.SIZE == 48 and mini.SIZES == {"train": 800, "validation": 200, "test": 500}
    found = {which: mini.split("position", which)[0] for which in mini.SIZES}
    assert {which: len(pictures) for which, pictures in found.items()} == mini.SIZES
    assert not torch.equal(found["train"][:200], found["validation"])
    assert {task.group for task in mini.TASKS.values()} == {"natural", "specialized", "structured"}
    assert mini.split("position", "test") is mini.split("position", "test")


@pytest.mark.parametrize("number", [0, 1])
def test_digits_of_two_splits_share_no_original(number: int) -> None:
    used = {which: mini.digit_originals(which, number) for which in mini.SIZES}
    everything = np.concatenate([originals.reshape(-1) for originals in used.values()])
    assert len(everything) == sum(mini.SIZES.values()) == len(set(everything.tolist()))
    _, digits = mini._originals()
    for which, originals in used.items():
        assert originals.shape == (10, mini.SIZES[which] // 10)
        assert (digits[originals] == np.arange(10)[:, None]).all()


def test_targets_say_what_is_drawn() -> None:
    """One object on an even ground, so that its mask can be had from the picture itself."""
    rng = draw.generator("test")
    for painter in (mini._position, mini._orientation):
        targets = np.arange(8).repeat(40)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(mini, "_canvas", lambda rng, n: (np.zeros((n, 3, 48, 48), dtype=np.float32),
                                                           *np.zeros((2, n, 3), dtype=np.float32)))
            mask = painter(rng, targets).max(axis=1)
        mask = mask / mask.max(axis=(1, 2), keepdims=True)
        weight = mask / mask.sum(axis=(1, 2), keepdims=True)
        y, x = np.mgrid[:48, :48] + 0.5
        dx = x - (weight * x).sum(axis=(1, 2), keepdims=True)
        dy = y - (weight * y).sum(axis=(1, 2), keepdims=True)
        if painter is mini._position:
            middle = (weight * x).sum(axis=(1, 2))
            assert np.abs((middle - 10) / 4 - targets).max() < 1.0  # a wedge's or heart's centre is not its mean
        else:
            angle = 0.5 * np.arctan2(-2 * (weight * dx * dy).sum(axis=(1, 2)),
                                     (weight * (dx**2 - dy**2)).sum(axis=(1, 2))) % np.pi
            assert ((angle / (np.pi / 8)).astype(int) == targets).mean() > 0.97


def test_counted_objects_do_not_touch() -> None:
    rng = draw.generator("test")
    for count in mini.COUNTS:
        spots = mini._apart(rng, count)[:count]
        gaps = np.hypot(*(spots[:, None, :2] - spots[None, :, :2]).transpose(2, 0, 1)) - spots[:, 2] - spots[:, 2:]
        assert (gaps[~np.eye(count, dtype=bool)] > 1).all()
        assert (spots[:, :2] > spots[:, 2:]).all() and (spots[:, :2] + spots[:, 2:] < 48).all()


def test_emblems() -> None:
    train, test = mini.retrieval("train"), mini.retrieval("test")
    for pictures, targets in (train, test):
        assert pictures.shape == (400, 3, 48, 48) and torch.bincount(targets).tolist() == [20] * 20
    assert not set(mini.RETRIEVAL_CLASSES["train"]) & set(mini.RETRIEVAL_CLASSES["test"])
    species = [tuple(mini._species(number)) for number in range(40)]
    assert len(set(species)) == 40 and species[0] == tuple(mini._species(0))
    varieties = [frozenset(mini._variety(number)) for number in range(10)]
    assert len(set(varieties)) == 10 == len(set(mini.FINE_CLASSES))
    assert varieties == [frozenset(replace(part, x=-part.x) for part in variety) for variety in varieties]  # mirrored
    for which, size in {"train": 300, "validation": 100, "test": 300}.items():
        pictures, targets = mini.fine_grained(which)
        assert pictures.shape == (size, 3, 48, 48) and torch.bincount(targets).tolist() == [size // 10] * 10


def test_unknown_names_are_answered_with_the_right_ones() -> None:
    with pytest.raises(ScionError, match="no task 'digit'.*did you mean 'digits'.*textures"):
        mini.split("digit", "train")
    with pytest.raises(ScionError, match="no split 'val'.*train, validation, test"):
        mini.split("digits", "val")
    with pytest.raises(ScionError, match="no split 'validation'.*train, test"):
        mini.retrieval("validation")


# ---- the pretraining


def test_classes_of_mini_and_nano_do_not_overlap() -> None:
    asked = set(make_nano.CLASSES)
    assert len(asked) == len(make_nano.CLASSES) == 24 + 12 + 8 + 3
    shown = {name for task in mini.TASKS.values() for name in task.classes}
    shown |= {*mini.SURFACES, *mini.FINE_CLASSES, *mini.RETRIEVAL_CLASSES["train"], *mini.RETRIEVAL_CLASSES["test"]}
    assert not asked & shown
    alike = [(a, b) for a, one in enumerate(make_nano._forms()) for b, other in enumerate(mini._shapes())
             if ((one < 0) != (other < 0)).mean() < 0.02]
    assert not alike  # no silhouette either


def test_pretraining_pictures() -> None:
    pictures, wanted, drawn = make_nano.batch(0, "test", n=64)
    assert pictures.shape == (64, 3, 48, 48) and -1 <= pictures.min() < pictures.max() <= 1
    assert drawn.shape == (64, 2, 12, 12) and 0 <= drawn.min() and drawn.max() <= 1
    assert set(wanted) == set(make_nano.HEADS)
    assert all(0 <= wanted[name].min() and wanted[name].max() < count for name, count in make_nano.HEADS.items())
    again = make_nano.batch(0, "test", n=64)
    assert torch.equal(pictures, again[0]) and not torch.equal(pictures, make_nano.batch(1, "test", n=64)[0])
    assert drawn.mean(dim=(2, 3)).min() > 0.001  # a main form and something beside it in every picture


@pytest.mark.parametrize("name", NANOS)
def test_pretraining_is_decided_by_its_seed(name: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    import timm

    monkeypatch.setattr(make_nano, "HELD_OUT", 1)
    small = make_nano.batch
    monkeypatch.setattr(make_nano, "batch", lambda *seed: small(*seed, n=8))
    network, report = make_nano.train(name, seed=3, steps=2)
    assert set(report) == {*make_nano.HEADS, "sketch_error"}
    again, _ = make_nano.train(name, seed=3, steps=2)
    other, _ = make_nano.train(name, seed=4, steps=2)
    assert all(torch.equal(a, b) for a, b in zip(network.parameters(), again.parameters(), strict=True))
    assert not torch.equal(network.sketch.weight, other.sketch.weight)
    make_nano.save(network, {"seed": 3, **report}, name, tmp_path / name)
    assert sorted(file.name for file in tmp_path.rglob("*") if file.is_file()) == [
        "config.json", "model.safetensors", "training.json"]
    loaded = timm.create_model(f"local-dir:{tmp_path / name}", pretrained=True).eval()
    pictures = small(0, n=2)[0]
    assert torch.equal(loaded(pictures), network.model(pictures))


# ---- the nanos


def _load(name: str, pretrained: bool = True) -> torch.nn.Module:
    import timm

    torch.manual_seed(0)
    return timm.create_model(f"local-dir:{FOLDER / name}", pretrained=pretrained).eval()


@pytest.mark.parametrize("name", NANOS)
def test_nano_is_small_and_whole(name: str) -> None:
    assert all(file.stat().st_size <= 4_000_000 for file in (FOLDER / name).iterdir())
    architecture, arguments = NANOS[name]
    config = json.loads((FOLDER / name / "config.json").read_text())
    assert config["architecture"] == architecture and config["num_classes"] == 0
    kept = {key: tuple(value) if isinstance(value, list) else value for key, value in config["model_args"].items()}
    assert {**arguments, "img_size": (48, 48)}.items() <= kept.items()
    assert config["pretrained_cfg"]["mean"] == config["pretrained_cfg"]["std"] == [0.5] * 3
    model = _load(name)
    with torch.no_grad():
        assert model(torch.zeros(2, 3, 48, 48)).isfinite().all()


@pytest.mark.parametrize("name", NANOS)
def test_nano_was_trained_within_the_budget(name: str) -> None:
    report = json.loads((FOLDER / name / "training.json").read_text())
    assert report["steps"] == make_nano.STEPS[name] and report["seed"] == 0
    assert report["core_seconds"] <= 2 * 30 * 60  # half an hour on two cores
    better = {"form": 8, "filling": 5, "bearing": 1.2, "more": 1.1}  # than chance, on pictures that it did not see
    assert all(report[head] > better[head] / count for head, count in make_nano.HEADS.items()), report


@torch.no_grad()
def _features(model: torch.nn.Module, pictures: Tensor) -> np.ndarray:
    return torch.cat([model(part / 127.5 - 1) for part in pictures.split(100)]).double().numpy()


@pytest.mark.parametrize("name", NANOS)
def test_what_a_nano_knows_carries_over_to_the_mini(name: str) -> None:
    from sklearn.linear_model import RidgeClassifier
    from sklearn.preprocessing import StandardScaler

    (train, targets), (test, wanted) = mini.split("textures", "train"), mini.split("textures", "validation")
    score = {}
    for pretrained in (True, False):
        model, scaler = _load(name, pretrained), StandardScaler()
        inputs = scaler.fit_transform(_features(model, train[:400]))
        probe = RidgeClassifier(alpha=10.0).fit(inputs, targets[:400].numpy())
        score[pretrained] = probe.score(scaler.transform(_features(model, test)), wanted.numpy())
    assert score[True] > score[False] + 0.1, score
