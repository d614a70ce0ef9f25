"""ESC-50's layout: folds, subset, cache, augmentation, and what is said of a folder that is not right."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
import torch

from core.data import labelled
from core.errors import ScionError
from domains.audio import ESC50, clips, esc50, features

Tree = Callable[..., Path]


def _ready(**options: Any) -> Any:
    """A loaded ESC50; ``Any``, since the tests look into its three sets."""
    data = ESC50(**options)
    data.setup()
    return data


@pytest.fixture(autouse=True)
def offline(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(labelled, "reachable", lambda *_: False)


@pytest.mark.data
def test_real_folds_are_disjoint_and_complete(esc10: Path, cache: str) -> None:
    seen: list[int] = []
    for fold in range(1, 6):
        data = _ready(root=str(esc10), fold=fold, cache=cache)
        assert data.classes[:2] == ["dog", "rooster"] and data.origin == {"source": "real", "name": "ESC-10"}
        parts = [data.train_set.rows, data.validation_set.rows, data.test_set.rows]
        assert [len(part) for part in parts] == [240, 80, 80]
        assert len({row for part in parts for row in part}) == 400
        seen += parts[2]
        for part in (data.validation_set, data.test_set):
            assert np.bincount(part.targets).tolist() == [8] * 10
    assert sorted(seen) == list(range(400))


@pytest.mark.data
def test_real_recordings_at_44100_hz_match_their_16000_hz_copies(esc10: Path, cache: str) -> None:
    data = ESC50(root=str(esc10), cache=cache)
    errors = []
    for file in sorted((esc10 / "audio_44k_sample").glob("*.wav")):
        ours, theirs = data.read(file), data.read(esc10 / "audio" / file.name)
        assert ours.shape == theirs.shape == (500, 128)
        # resamplers differ near 8 kHz, and quantisation in digital silence
        loud = theirs[:, :115] > features.normalise(torch.tensor(-7.0))
        if loud.any():
            errors.append(float((ours - theirs)[:, :115][loud].abs().mean()))
    assert len(errors) >= 15 and np.mean(errors) < 0.02


def test_batches_and_example_agree(tree: Tree, cache: str) -> None:
    data = _ready(root=str(tree()), cache=cache, batch_size=4)
    banks, targets = next(iter(data.train_dataloader()))
    assert banks.shape == data.example(4).shape == (4, 500, 128) and banks.dtype == data.example().dtype
    assert targets.dtype == torch.int64 and data.classes == ["class_3", "class_17", "class_40"]
    assert set(data.test_set.targets) == {0, 1, 2}  # the table's numbers have holes
    bank, _ = data.test_set[0]
    torch.testing.assert_close(data.read(esc50.read_table(data.root)[0][0].file), bank, atol=1e-3, rtol=0)


def test_other_splits_and_the_subset(tree: Tree, cache: str) -> None:
    root = str(tree(targets=(3, 17, 40, 41)))
    data = _ready(root=root, cache=cache, validation_fold=None, frames=32)
    assert data.validation_set is None and data.val_dataloader() == [] and len(data.train_set) == 4 * 8
    assert data.frames == 32 and data.train_set[0][0].shape == (32, 128)
    data = _ready(root=root, cache=cache, fold=2, validation_fold=5, frames=32)
    table, _, _ = esc50.read_table(Path(root))
    assert {table[row].group for row in data.validation_set.rows} == {5}
    data = _ready(root=root, cache=cache, esc10=True, frames=32)
    assert data.classes == ["class_40"] and len(data.train_set) == 6


def test_flac_and_ogg_trees(tree: Tree, cache: str) -> None:
    for suffix in ("flac", "ogg"):
        root = tree(suffix=suffix, rate=22_050)
        assert len(_ready(root=str(root), cache=cache, frames=32).train_set) == 18
        root.rename(root.with_name(suffix))


def test_filterbanks_are_computed_once_and_keyed(tree: Tree, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root, cache = tree(), tmp_path / "cache"
    calls: list[Path] = []
    original = clips._bank
    monkeypatch.setattr(clips, "_bank", lambda file, *rest: (calls.append(file), original(file, *rest))[1])
    first = _ready(root=str(root), cache=str(cache), frames=32)
    again = _ready(root=str(root), cache=str(cache), frames=32, fold=3, specaugment=False)  # another fold, same banks
    assert len(calls) == 30 and isinstance(again.train_set.banks, np.memmap)
    assert np.array_equal(first.train_set.banks, again.train_set.banks)
    _ready(root=str(root), cache=str(cache), frames=48)  # another setting
    assert len(calls) == 60
    soundfile.write(esc50.read_table(root)[0][0].file, np.zeros(9000, np.float32), 16_000)  # another file
    _ready(root=str(root), cache=str(cache), frames=32)
    assert len(calls) == 90
    assert not list(cache.rglob(".writing-*"))


def test_bad_files_stop_or_are_listed(tree: Tree, cache: str) -> None:
    root = tree()
    files = [clip.file for clip in esc50.read_table(root)[0]]
    files[0].write_bytes(b"")
    with pytest.raises(ScionError, match="0 bytes.*skip_bad"):
        _ready(root=str(root), cache=cache, frames=32)
    files[1].write_text("no sound at all")
    files[7].unlink()
    data = _ready(root=str(root), cache=cache, frames=32, skip_bad=True)
    assert [str(file) in reason for file, reason in zip([files[0], files[1], files[7]], data.skipped, strict=True)]
    assert len(data.train_set) + len(data.validation_set) + len(data.test_set) == 27
    again = _ready(root=str(root), cache=cache, frames=32, skip_bad=True)  # this time from the cache
    assert again.skipped == data.skipped
    with pytest.raises(ScionError, match="0 bytes"):  # a cache that knows of them does not hide them
        _ready(root=str(root), cache=cache, frames=32)


def test_bad_folders_give_one_line(tree: Tree, tmp_path: Path, cache: str) -> None:
    def fails(words: str, **options: Any) -> None:
        with pytest.raises(ScionError, match=words) as caught:
            _ready(**{"root": str(root), "cache": cache, "frames": 32, **options})
        assert "\n" not in str(caught.value)

    root = tmp_path
    fails("no folder", root=str(tmp_path / "nowhere"))
    fails("no meta/esc50.csv")
    root = tree()
    table = root / "meta" / "esc50.csv"
    good = table.read_text()
    for text, words in (("", "empty"), (good.splitlines()[0], "no rows"), ("a,b\n1,2\n", "no column filename"),
                        (good.replace(",3,class_3", ",three,class_3"), "line 2"),
                        (good.replace(",17,class_17", ",3,class_17"), "3 is 'class_17' here and 'class_3' above"),
                        (good.replace("class_17", "class_3"), "3 targets but 2 category names")):
        table.write_text(text)
        fails(words)
    table.write_text("\n".join(line for line in good.splitlines() if ",3,class" not in line or line.startswith("1-")))
    fails("training set holds none of class_3")
    table.write_text("\n".join(line for line in good.splitlines() if not line.startswith("5-")))
    fails("data.fold: 5", fold=5)
    for options, words in (({"fold": 6}, "data.fold"), ({"validation_fold": 1}, "is the test fold"),
                           ({"frames": 3}, "data.frames"), ({"mixup": -1}, "data.mixup")):
        fails(words, **options)


def _epoch(data: ESC50, epoch: int) -> list[torch.Tensor]:
    loader: Any = data.train_dataloader()
    loader.sampler.set_epoch(epoch)
    return [torch.cat(column) for column in zip(*loader, strict=True)]


@pytest.mark.parametrize("mixup", [0.0, 0.3])
def test_augmentation_is_a_function_of_seed_epoch_and_index(tree: Tree, cache: str, mixup: float) -> None:
    root = str(tree())

    def data(**options: Any) -> ESC50:
        common = {"root": root, "cache": cache, "frames": 64, "mixup": mixup, "batch_size": 5, "seed": 1}
        return _ready(**{**common, **options})

    first, second = _epoch(data(), 3), _epoch(data(num_workers=2), 3)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    assert not torch.equal(first[0], _epoch(data(), 4)[0])
    assert not torch.equal(first[0], _epoch(data(seed=2), 3)[0])
    if mixup:
        assert first[1].shape == (18, 3)
        torch.testing.assert_close(first[1].sum(dim=1), torch.ones(18))
    plain = data().test_set
    assert plain is not None
    assert torch.equal(plain[0][0], plain[0][0]) and isinstance(plain[0][1], int)  # nothing is augmented at test


def test_dataset_statistics_are_those_of_the_training_folds(tree: Tree, cache: str) -> None:
    data = _ready(root=str(tree()), cache=cache, frames=28, normalise="dataset", specaugment=False)
    banks = torch.stack([data.train_set[index][0] for index in range(len(data.train_set))])
    assert abs(float(banks.mean())) < 1e-3 and abs(float(banks.std()) - 0.5) < 1e-3
    assert (ESC50(source="mini").mean, ESC50(source="mini").std) == features.AUDIOSET


def test_auto_falls_back_to_the_mini_and_says_so(tmp_path: Path) -> None:
    with pytest.warns(UserWarning, match="built-in mini"):
        data = ESC50(cache=str(tmp_path))
        assert data.frames == 112
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert ESC50(source="mini").example(2).shape == (2, 112, 128)  # asked for, so nothing to warn of
    with pytest.raises(ScionError, match="data.source real"):
        _ready(source="real", cache=str(tmp_path))


def test_download_is_checked(tree: Tree, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import shutil

    inside = tmp_path / "archive" / "ESC-50-master"
    inside.parent.mkdir()
    tree(folds=5, targets=tuple(range(3)), takes=1).rename(inside)
    shutil.make_archive(str(tmp_path / "esc"), "zip", inside.parent)
    assert ESC50.archive is not None
    monkeypatch.setattr(ESC50, "archive", replace(ESC50.archive, url=(tmp_path / "esc.zip").as_uri()))
    cache = tmp_path / "cache"
    with pytest.warns(UserWarning, match="MD5"), pytest.raises(ScionError, match="15 clips of 2000"):
        ESC50(cache=str(cache))._download()
    assert not list((cache / "audio").iterdir())  # nothing half-done is left behind
    monkeypatch.setattr(ESC50, "count", 15)
    monkeypatch.setattr(labelled, "reachable", lambda *_: True)
    with pytest.warns(UserWarning, match="MD5"):
        data = _ready(cache=str(cache), frames=32)
    assert data.origin == {"source": "real", "name": "3 classes in ESC-50's layout"}
    monkeypatch.setattr(labelled, "reachable", lambda *_: False)
    assert _ready(cache=str(cache), frames=32).origin["source"] == "real"  # now it is there
