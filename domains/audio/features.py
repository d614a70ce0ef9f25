"""From a sound file to the filterbank that an Audio Spectrogram Transformer reads, and SpecAugment on it.

Numerics are those of transformers' ``ASTFeatureExtractor`` (16 kHz, 25 ms windows every 10 ms, 128 mel bins, logarithm,
Kaldi's pre-emphasis and per-window removal of the mean), equal to the last bit on the same waveform. AST's authors also
subtract the mean of the whole clip; Kaldi's removal in each window makes that a no-op, so it is not repeated here.
Filterbank: https://kaldi-asr.org; SpecAugment: https://arxiv.org/abs/1904.08779.
"""

from __future__ import annotations

import math
import os
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from fractions import Fraction
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from core.errors import ScionError
from core.files import open_regular

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


RATES = 100, 4_000_000
"""Samples a second between which a sound file is taken at its word."""
VALUES = 2**20
"""Values that are decoded at a time, whatever a file's head announces."""


def read_waveform(file: str | Path, seconds: float | None = None, start: float = 0.0) -> Tensor:
    """A sound file as mono at 16 kHz, [samples], values in [-1, 1].

    Args:
        file: anything libsndfile opens: WAV, FLAC, OGG, ...; any rate, any number of channels.
        seconds: read no more than this, however long the file is; None reads all.
        start: where to begin, in seconds.

    Raises:
        ScionError: names the file that is missing, empty, no sound, or holds values that are no numbers.
    """
    file = Path(file)
    with open_sound(file) as sound:
        rate, whole = sound.samplerate, sound.frames
        first = round(start * rate)
        if first and first >= whole:
            raise ScionError(f"{file}: lasts {whole / rate:.1f} s, nothing is left from {start:g} s on")
        sound.seek(first)
        # a little more than asked for: the resampler's filter looks beyond the end
        most = whole - first if seconds is None else min(math.ceil((seconds + 0.1) * rate), whole - first)
        waveform = _mono(sound, most)
        whole_file = not missing_bytes(file) and len(waveform) == most
    if not whole_file:
        raise ScionError(f"{file}: the sound file is cut short; fetch it again or take it out of the list")
    if len(waveform) == 0:
        raise ScionError(f"{file}: the sound file holds no samples; fetch it again or take it out of the list")
    if not torch.isfinite(waveform).all():
        raise ScionError(f"{file}: the sound file holds values that are not numbers")
    waveform = resample(waveform, rate)
    return waveform if seconds is None else waveform[: round(seconds * RATE)]


@contextmanager
def open_sound(file: Path) -> Iterator[Any]:
    """A sound file as soundfile's, its head checked; what goes wrong while it is open is told by its name.

    It is opened here and given to libsndfile by its number: libsndfile would wait for a pipe, read standard input for
    a file called "-", and take the ending of a name for a promise.

    Raises:
        ScionError: names the file that is missing, empty, no sound, or of a rate that no sound has.
    """
    import soundfile

    try:
        if os.path.isdir(file):
            os.scandir(file).close()  # says so where it may not be looked into
            raise ScionError(f"{file}: a folder without sound files")
        with open_regular(file) as stream:
            if os.fstat(stream.fileno()).st_size == 0:
                raise ScionError(f"{file}: the sound file is empty (0 bytes); fetch it again or take it out of the "
                                 "list")
            with soundfile.SoundFile(stream.fileno(), closefd=False) as sound:
                if not RATES[0] <= sound.samplerate <= RATES[1]:
                    raise ScionError(f"{file}: {sound.samplerate:,} samples a second, which no sound has; {RATES[0]} "
                                     f"to {RATES[1]:,} wanted")
                yield sound
    except ScionError:
        raise
    except OSError as error:
        raise ScionError(f"{file}: cannot be read ({error.strerror or error})") from None
    except soundfile.LibsndfileError as error:
        reason = str(error.error_string).strip().rstrip(".")
        raise ScionError(f"{file}: no readable sound file, WAV, FLAC or OGG wanted ({reason})") from None
    except (soundfile.SoundFileError, ValueError, OverflowError) as error:  # of a head with impossible numbers
        raise ScionError(f"{file}: no readable sound file ({error})") from None


def _mono(sound: Any, most: int) -> Tensor:
    """Up to ``most`` samples from where ``sound`` stands, its channels averaged. They are decoded a piece at a time,
    so that what is kept is what is there, and not what the head announces."""
    size = max(VALUES // sound.channels, 1)
    pieces = [torch.empty(0)]
    while most > 0:
        piece = sound.read(min(most, size), dtype="float32", always_2d=True)
        pieces.append(torch.from_numpy(piece).mean(dim=1))
        most = most - len(piece) if len(piece) == min(most, size) else 0
    return torch.cat(pieces)


CHUNKS = 10_000
"""Chunks of a RIFF file that are looked at for its sound; real ones have a few."""


def missing_bytes(file: Path) -> int:
    """Bytes that a RIFF file's chunks announce and the file does not have; libsndfile reads such a file as if it were
    whole. Sizes that a stream's writer left open do not count, nor does padding at the end."""
    with open_regular(file) as stream:
        size = os.fstat(stream.fileno()).st_size
        if stream.read(4) != b"RIFF":
            return 0
        position = 12
        for _ in range(CHUNKS):
            stream.seek(position)
            head = stream.read(8)
            if len(head) < 8:
                break
            kind, length = struct.unpack("<4sI", head)
            if kind == b"data":
                return 0 if length in (0, 0xFFFFFFFF, 0x7FFFFFFF) else max(0, position + 8 + length - size)
            position += 8 + length + length % 2
    return 0


# ------------------------------------------------------------------------------------------------- rates


KERNEL = 2**21
"""Values of the largest kernel that torchaudio may make: it has one filter for each sample of the rates' common period.
Those of all usual rates fit (the largest is 11,025 Hz's with 291,200), while 24,001 Hz would take 384 million."""
PERIOD = 2**18
"""Samples of the longest common period of two rates that is kept to exactly."""
WIDTH, ROLLOFF = 6, 0.99
"""torchaudio's filter: zero crossings to each side, and where it ends as a part of the lower rate's limit."""


def resample(waveform: Tensor, rate: int) -> Tensor:
    """``waveform`` [samples] from ``rate`` to 16 kHz (windowed sinc).

    By torchaudio where the rates have a short common period, as the usual ones do; else by SciPy's polyphase resampler
    with the same filter, equal to 1e-4 of the loudest sample. Rates above 262 kHz with no short common period are
    rounded by at most 4 parts in a million, less than the clocks of sound cards are off.
    """
    up, down = ratio(rate)
    if up == down:
        return waveform
    if kernel_size(up, down) <= KERNEL:
        import torchaudio.functional

        return torchaudio.functional.resample(waveform, down, up)
    from scipy.signal import resample_poly

    length = -(-len(waveform) * up // down)  # as torchaudio rounds it
    moved = resample_poly(waveform.numpy(), up, down, window=sinc_filter(up, down))
    return torch.from_numpy(moved[:length].astype(np.float32))


def ratio(rate: int) -> tuple[int, int]:
    """16 kHz and ``rate`` in smallest numbers."""
    exact = Fraction(rate, RATE)
    if exact.numerator > PERIOD:
        exact = exact.limit_denominator(int(PERIOD / exact))
    return exact.denominator, exact.numerator


def kernel_size(up: int, down: int) -> int:
    """Values of torchaudio's kernel from ``down`` to ``up``."""
    return up * (2 * math.ceil(WIDTH * down / (min(up, down) * ROLLOFF)) + down)


@lru_cache(maxsize=4)
def sinc_filter(up: int, down: int) -> NDArray[np.float32]:
    """torchaudio's filter as one row of numbers at the rates' least common multiple, for SciPy to scale by ``up``."""
    reach = math.floor(WIDTH * max(up, down) / ROLLOFF)
    crossings = np.arange(-reach, reach + 1) * (ROLLOFF / max(up, down))
    window = np.cos(crossings * (np.pi / WIDTH / 2)) ** 2
    return (np.sinc(crossings) * window * (ROLLOFF / max(up, down))).astype(np.float32)


def _kaldi() -> Any:
    """torchaudio's copy of Kaldi. It makes a tensor as it is imported, and transformers imports it at any moment, also
    while a model is built without values: the tensor would have none either."""
    import torchaudio.compliance.kaldi as kaldi

    if kaldi.EPSILON.is_meta:
        kaldi.EPSILON = torch.tensor(torch.finfo(torch.float).eps, device="cpu")
    return kaldi


def filterbank(waveform: Tensor, rate: int = RATE, frames: int | None = None) -> Tensor:
    """Logarithmic mel energies [frames, 128] of ``waveform`` [samples] or [channels, samples].

    Args:
        waveform: sound; several channels are averaged.
        rate: its samples a second; resampled to 16 kHz where it differs.
        frames: cut or pad to this length; None keeps the clip's own. Padding is the value 0, put in before
            normalisation, as ``ASTFeatureExtractor`` does.
    """
    if waveform.dim() == 2:
        waveform = waveform.mean(dim=0)
    waveform = resample(waveform, rate)
    if frames is not None:
        waveform = waveform[: samples(frames)]
    if waveform.numel() < WINDOW:  # Kaldi gives no frame at all for less than one window
        waveform = torch.nn.functional.pad(waveform, (0, WINDOW - waveform.numel()))
    bank = _kaldi().fbank(waveform[None], sample_frequency=RATE, window_type="hanning", num_mel_bins=BINS)
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
