"""Filterbanks against transformers' extractor, files of all kinds, and augmentation as a function of its seed."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch

from core.errors import ScionError
from domains.audio import features


def _tone(hertz: float, rate: int, seconds: float) -> np.ndarray:
    return (0.5 * np.sin(2 * np.pi * hertz * np.arange(round(rate * seconds)) / rate)).astype(np.float32)


@pytest.mark.parametrize("seconds", [0.7, 5.0, 6.3])
def test_filterbank_equals_transformers_extractor(seconds: float) -> None:
    from transformers import ASTFeatureExtractor

    wave = np.random.default_rng(0).standard_normal(round(16_000 * seconds)).astype(np.float32) * 0.1 + 0.05
    theirs = ASTFeatureExtractor(max_length=500)(wave, sampling_rate=16_000, return_tensors="pt")["input_values"][0]
    ours = features.normalise(features.filterbank(torch.from_numpy(wave), frames=500))
    assert ours.shape == (500, 128)
    torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=0)


def test_frames_and_samples_agree() -> None:
    for frames in (16, 112, 500):
        assert features.filterbank(torch.randn(features.samples(frames))).shape == (frames, 128)
        assert features.filterbank(torch.randn(features.samples(frames) - 1)).shape == (frames - 1, 128)


@pytest.mark.parametrize("rate", [8_000, 22_050, 44_100, 48_000])
def test_any_rate_is_resampled(rate: int, tmp_path: Path) -> None:
    soundfile.write(tmp_path / "a.wav", _tone(1000, rate, 1), rate)
    wave = features.read_waveform(tmp_path / "a.wav")
    assert abs(len(wave) - 16_000) <= 1
    # away from the edges the tone is what it would have been at 16 kHz
    wanted = torch.from_numpy(_tone(1000, 16_000, 1))
    torch.testing.assert_close(wave[500:15_000], wanted[500:15_000], atol=5e-3, rtol=0)


def test_stereo_becomes_mono(tmp_path: Path) -> None:
    left, right = _tone(500, 16_000, 0.5), _tone(900, 16_000, 0.5)
    soundfile.write(tmp_path / "a.wav", np.stack([left, right], axis=1), 16_000, subtype="FLOAT")
    torch.testing.assert_close(features.read_waveform(tmp_path / "a.wav"), torch.from_numpy((left + right) / 2))
    both = features.filterbank(torch.from_numpy(np.stack([left, right])))
    torch.testing.assert_close(both, features.filterbank(torch.from_numpy((left + right) / 2)))


@pytest.mark.parametrize("suffix", ["wav", "flac", "ogg"])
def test_formats(suffix: str, tmp_path: Path) -> None:
    tone = _tone(800, 16_000, 1)
    soundfile.write(tmp_path / f"a.{suffix}", tone, 16_000)
    wave = features.read_waveform(tmp_path / f"a.{suffix}")
    assert len(wave) == 16_000
    assert (wave - torch.from_numpy(tone)).abs().mean() < (0.02 if suffix == "ogg" else 1e-4)


def test_short_clips_are_padded_and_long_ones_cut(tmp_path: Path) -> None:
    soundfile.write(tmp_path / "short.wav", _tone(800, 16_000, 0.01), 16_000)  # less than one window
    soundfile.write(tmp_path / "long.wav", _tone(800, 44_100, 30), 44_100)
    short = features.filterbank(features.read_waveform(tmp_path / "short.wav"), frames=100)
    assert short.shape == (100, 128) and short[0].abs().sum() > 0 and short[1:].abs().sum() == 0
    whole = features.filterbank(features.read_waveform(tmp_path / "long.wav"))
    part = features.read_waveform(tmp_path / "long.wav", seconds=features.samples(100) / 16_000)
    assert len(part) == features.samples(100)  # only the beginning is decoded
    torch.testing.assert_close(features.filterbank(part, frames=100), whole[:100], atol=1e-3, rtol=0)


def test_bad_files_are_named(tmp_path: Path) -> None:
    (tmp_path / "empty.wav").touch()
    (tmp_path / "text.wav").write_text("this is no sound\n" * 20)
    soundfile.write(tmp_path / "silent.wav", np.zeros(0, np.float32), 16_000)
    soundfile.write(tmp_path / "nan.wav", np.full(4000, np.nan, np.float32), 16_000, subtype="FLOAT")
    for suffix in ("wav", "flac", "ogg"):
        whole = tmp_path / f"whole.{suffix}"
        soundfile.write(whole, _tone(800, 16_000, 2), 16_000)
        assert len(features.read_waveform(whole)) == 32_000 and not features.missing_bytes(whole)
        (tmp_path / f"cut.{suffix}").write_bytes(whole.read_bytes()[: whole.stat().st_size // 2])
    for name, words in (("cut.wav", "cut short"), ("cut.flac", "sound file"), ("cut.ogg", "sound file"),
                        ("empty.wav", "0 bytes"), ("text.wav", "no readable sound"), ("silent.wav", "no samples"),
                        ("nan.wav", "not numbers"), ("absent.wav", "cannot be read")):
        with pytest.raises(ScionError, match=words) as caught:
            features.read_waveform(tmp_path / name)
        assert name in str(caught.value) and "\n" not in str(caught.value)


def test_specaugment_masks_one_band_and_one_stretch() -> None:
    bank = torch.ones(500, 128)
    again = [features.specaugment(bank, torch.Generator().manual_seed(seed)) for seed in (0, 0, 1)]
    assert torch.equal(again[0], again[1]) and not torch.equal(again[0], again[2])
    assert bool((bank == 1).all())
    widths = []
    for seed in range(60):
        hidden = features.specaugment(bank, torch.Generator().manual_seed(seed)) == 0
        widths.append((int(hidden.all(dim=0).sum()), int(hidden.all(dim=1).sum())))
    assert max(width for width, _ in widths) <= 24 and max(width for _, width in widths) <= 80
    assert max(width for width, _ in widths) > 18 and max(width for _, width in widths) > 60


def test_torchaudio_first_imported_where_tensors_have_no_values(monkeypatch: pytest.MonkeyPatch) -> None:
    """As transformers does it while a model is built on the meta device."""
    import torchaudio.compliance.kaldi as kaldi

    waveform = torch.linspace(-1, 1, 2000)
    expected = features.filterbank(waveform)
    monkeypatch.setattr(kaldi, "EPSILON", kaldi.EPSILON.to("meta"))
    assert torch.equal(features.filterbank(waveform), expected)
