"""From a sound file to the filterbank that an Audio Spectrogram Transformer reads, and SpecAugment on it.

Numerics are those of transformers' ``ASTFeatureExtractor`` (16 kHz, 25 ms windows every 10 ms, 128 mel bins, logarithm,
Kaldi's pre-emphasis and per-window removal of the mean), equal to the last bit on the same waveform. AST's authors also
subtract the mean of the whole clip; Kaldi's removal in each window makes that a no-op, so it is not repeated here.
Filterbank: https://kaldi-asr.org; SpecAugment: https://arxiv.org/abs/1904.08779.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor

from core.errors import ScionError

RATE = 16_000
"""Samples a second that the filterbank expects."""
BINS = 128
"""Mel bins."""
SHIFT, WINDOW = 160, 400
"""Samples between two frames (10 ms), and samples in one (25 ms)."""
AUDIOSET = (-4.2677393, 4.5689974)
"""Mean and standard deviation of AudioSet's filterbanks, with which the AST checkpoints were trained."""


SUFFIXES = frozenset(f".{name}" for name in (
    "wav flac ogg oga opus mp3 aif aiff aifc au snd caf w64 rf64 voc nist sph "  # libsndfile reads these
    "m4a aac wma amr mp4 webm").split())  # and not these, which are refused by name rather than overlooked
"""Endings of sound files."""


def samples(frames: int) -> int:
    """Samples at 16 kHz that give exactly ``frames`` frames."""
    return (frames - 1) * SHIFT + WINDOW


def read_waveform(file: str | Path, seconds: float | None = None, start: float = 0.0) -> Tensor:
    """A sound file as mono at 16 kHz, [samples], values in [-1, 1].

    Args:
        file: anything libsndfile opens: WAV, FLAC, OGG, ...; any rate, any number of channels.
        seconds: read no more than this, however long the file is; None reads all.
        start: where to begin, in seconds.

    Raises:
        ScionError: names the file that is missing, empty, no sound, or holds values that are no numbers.
    """
    import soundfile

    file = Path(file)
    try:
        if file.is_dir():
            raise ScionError(f"{file}: a folder without sound files")
        if file.stat().st_size == 0:
            raise ScionError(f"{file}: the sound file is empty (0 bytes); fetch it again or take it out of the list")
        with soundfile.SoundFile(file) as sound:
            rate, whole = sound.samplerate, sound.frames
            first = round(start * rate)
            if first and first >= whole:
                raise ScionError(f"{file}: lasts {whole / rate:.1f} s, nothing is left from {start:g} s on")
            sound.seek(first)
            # a little more than asked for: the resampler's filter looks beyond the end
            most = -1 if seconds is None else math.ceil((seconds + 0.1) * rate)
            data = sound.read(most, dtype="float32", always_2d=True)
        if missing_bytes(file) or len(data) < min(whole - first, most if most >= 0 else whole):
            raise ScionError(f"{file}: the sound file is cut short; fetch it again or take it out of the list")
    except OSError as error:
        raise ScionError(f"{file}: cannot be read ({error.strerror or error})") from None
    except soundfile.LibsndfileError as error:
        reason = str(error.error_string).strip().rstrip(".")
        raise ScionError(f"{file}: no readable sound file, WAV, FLAC or OGG wanted ({reason})") from None
    if len(data) == 0:
        raise ScionError(f"{file}: the sound file holds no samples; fetch it again or take it out of the list")
    waveform = torch.from_numpy(data).mean(dim=1)
    if not torch.isfinite(waveform).all():
        raise ScionError(f"{file}: the sound file holds values that are not numbers")
    waveform = resample(waveform, rate)
    return waveform if seconds is None else waveform[: round(seconds * RATE)]


def missing_bytes(file: Path) -> int:
    """Bytes that a RIFF file's chunks announce and the file does not have; libsndfile reads such a file as if it were
    whole. Sizes that a stream's writer left open do not count, nor does padding at the end."""
    size = file.stat().st_size
    with open(file, "rb") as stream:
        if stream.read(4) != b"RIFF":
            return 0
        position = 12
        while position + 8 <= size:
            stream.seek(position)
            kind, length = struct.unpack("<4sI", stream.read(8))
            if kind == b"data":
                return 0 if length in (0, 0xFFFFFFFF, 0x7FFFFFFF) else max(0, position + 8 + length - size)
            position += 8 + length + length % 2
    return 0


def resample(waveform: Tensor, rate: int) -> Tensor:
    """``waveform`` [samples] from ``rate`` to 16 kHz (windowed sinc)."""
    if rate == RATE:
        return waveform
    import torchaudio.functional

    return torchaudio.functional.resample(waveform, rate, RATE)


def filterbank(waveform: Tensor, rate: int = RATE, frames: int | None = None) -> Tensor:
    """Logarithmic mel energies [frames, 128] of ``waveform`` [samples] or [channels, samples].

    Args:
        waveform: sound; several channels are averaged.
        rate: its samples a second; resampled to 16 kHz where it differs.
        frames: cut or pad to this length; None keeps the clip's own. Padding is the value 0, put in before
            normalisation, as ``ASTFeatureExtractor`` does.
    """
    import torchaudio.compliance.kaldi

    if waveform.dim() == 2:
        waveform = waveform.mean(dim=0)
    waveform = resample(waveform, rate)
    if frames is not None:
        waveform = waveform[: samples(frames)]
    if waveform.numel() < WINDOW:  # Kaldi gives no frame at all for less than one window
        waveform = torch.nn.functional.pad(waveform, (0, WINDOW - waveform.numel()))
    bank = torchaudio.compliance.kaldi.fbank(waveform[None], sample_frequency=RATE, window_type="hanning",
                                             num_mel_bins=BINS)
    return bank if frames is None else fit(bank, frames)


@contextmanager
def one_thread() -> Iterator[None]:
    """Many small filterbanks in a row: a single thread is faster, and far faster where other work runs beside it."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def fit(bank: Tensor, frames: int) -> Tensor:
    """``bank`` [any, bins] cut, or padded with 0 at its end, to [frames, bins]."""
    return torch.nn.functional.pad(bank[:frames], (0, 0, 0, max(frames - bank.shape[0], 0)))


def normalise(bank: Tensor, mean: float = AUDIOSET[0], std: float = AUDIOSET[1]) -> Tensor:
    """``(bank - mean) / (2 std)``: about half a unit of spread, AST's convention."""
    return (bank - mean) / (2 * std)


def specaugment(bank: Tensor, generator: torch.Generator, frequency: int = 24, time: int = 80) -> Tensor:
    """A copy of the normalised ``bank`` [frames, bins] with one band and one stretch of time set to 0, the mean.

    Args:
        bank: normalised filterbank.
        generator: the only source of chance.
        frequency: most bins masked (uniform from 0).
        time: most frames masked (uniform from 0).
    """
    bank = bank.clone()
    for dim, most in ((1, frequency), (0, time)):
        most = min(most, bank.shape[dim])
        width = int(torch.randint(most + 1, (), generator=generator))
        start = int(torch.randint(bank.shape[dim] - width + 1, (), generator=generator))
        bank.narrow(dim, start, width).zero_()
    return bank
