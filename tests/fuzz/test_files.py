"""Sounds, pictures and tables with any bytes in them."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.fuzz.mutations import changed_bytes
from tests.fuzz.watch import refused_or, tries

SOUNDS = {".wav": "WAV", ".flac": "FLAC", ".ogg": "OGG", ".aiff": "AIFF"}
PICTURES = {".png": "PNG", ".jpg": "JPEG", ".gif": "GIF", ".bmp": "BMP", ".tif": "TIFF", ".webp": "WEBP", ".ppm": "PPM"}


@pytest.fixture(scope="module")
def sounds() -> dict[str, bytes]:
    import soundfile

    found = {}
    for ending, kind in SOUNDS.items():
        buffer = io.BytesIO()
        soundfile.write(buffer, np.random.default_rng(0).standard_normal(2000) * 0.1, 8000, format=kind)
        found[ending] = buffer.getvalue()
    return found


@pytest.fixture(scope="module")
def drawn() -> dict[str, bytes]:
    from PIL import Image

    picture = Image.fromarray(np.random.default_rng(0).integers(0, 255, (24, 20, 3), dtype=np.uint8))
    found = {}
    for ending, kind in PICTURES.items():
        buffer = io.BytesIO()
        picture.save(buffer, kind)
        found[ending] = buffer.getvalue()
    return found


@tries(60, 800)
@given(ending=st.sampled_from(list(SOUNDS)), data=st.data())
def test_sounds(sounds: dict[str, bytes], tmp_path_factory: pytest.TempPathFactory, ending: str, data: Any) -> None:
    """What is read is finite, and no longer than was asked for."""
    from domains.audio.features import RATE, read_waveform

    file = tmp_path_factory.getbasetemp() / f"sound{ending}"
    file.write_bytes(data.draw(changed_bytes(sounds[ending])))

    def read() -> None:
        waveform = read_waveform(file, seconds=1.0)
        assert waveform.isfinite().all() and 0 < len(waveform) <= RATE

    refused_or(read)


@tries(60, 800)
@given(ending=st.sampled_from(list(PICTURES)), data=st.data())
def test_pictures(drawn: dict[str, bytes], tmp_path_factory: pytest.TempPathFactory, ending: str, data: Any) -> None:
    from domains.vision.images import read_picture

    file = tmp_path_factory.getbasetemp() / f"picture{ending}"
    file.write_bytes(data.draw(changed_bytes(drawn[ending])))
    refused_or(lambda: read_picture(file))


TABLE = b"filename,label,split\na.wav,one,train\nb.wav,two,train\nc.wav,one,test\nd.wav,two,test\n"


@pytest.fixture(scope="module")
def folder(sounds: dict[str, bytes], tmp_path_factory: pytest.TempPathFactory) -> Path:
    home = tmp_path_factory.mktemp("clips")
    for name in "abcd":
        (home / f"{name}.wav").write_bytes(sounds[".wav"])
    return home


@tries(40, 500)
@given(table=st.one_of(changed_bytes(TABLE), st.binary(max_size=60)), skip=st.booleans())
def test_tables(folder: Path, tmp_path_factory: pytest.TempPathFactory, table: bytes, skip: bool) -> None:
    from domains.audio import AudioFolder

    (folder / "table.csv").write_bytes(table)
    cache = str(tmp_path_factory.getbasetemp() / "cache")
    data = AudioFolder(str(folder), table="table.csv", source="real", skip_bad=skip, cache=cache)
    refused_or(lambda: data.setup("fit"))
