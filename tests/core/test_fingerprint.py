"""The fingerprint of a base: copies in half precision, the ends of tensors, and files of earlier versions."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from core import load_adapter
from core.adapters.load import RECORD, fingerprint
from core.errors import ScionError
from core.method.fingerprint import SAMPLES, TAIL, Fingerprint, places
from core.peft import method_class
from tests.models import make
from tests.toolkit import Plain, randomize, same

COPIED = ("timm_vit", "bert", "llama", "timm_convnext")


def _saved(family: str, folder: Path, dtype: torch.dtype = torch.float32) -> Any:
    targets = ("mlp.up",) if family == "timm_convnext" else ("q", "v")
    method: Any = method_class("LoRA")(rank=2, targets=targets).attach(make(family, dtype=dtype))  # type: ignore
    randomize(method)
    method.save(folder)
    return method


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("family", COPIED)
def test_half_precision_copies(family: str, dtype: torch.dtype, tmp_path: Path) -> None:
    """An adapter of a float32 base goes onto its copies, and one of a copy onto the original."""
    method = _saved(family, tmp_path / "one")
    loaded = load_adapter(tmp_path / "one", make(family, dtype=dtype))
    assert same(method.tensors(), loaded.tensors())
    _saved(family, tmp_path / "two", dtype)
    load_adapter(tmp_path / "two", make(family))
    with pytest.raises(ScionError, match="another base"):
        load_adapter(tmp_path / "one", make(family, seed=1, dtype=dtype))


def test_a_checkpoint_onto_a_copy() -> None:
    """Within a module of one's own, as Lightning loads it."""
    module = Plain(make("timm_vit"))
    method = method_class("LoRA")().attach(module.backbone)
    randomize(method)
    copy = Plain(make("timm_vit", dtype=torch.float16))
    twin = method_class("LoRA")().attach(copy.backbone)
    copy.load_state_dict(module.state_dict(), strict=False)
    assert same(method.tensors(), twin.tensors())
    with pytest.raises(ScionError, match="another base"):
        other = Plain(make("timm_vit", seed=1))
        method_class("LoRA")().attach(other.backbone)
        other.load_state_dict(module.state_dict(), strict=False)


@pytest.mark.parametrize("row", [0, -1, -2, -5])
def test_rows_at_the_ends(row: int, tmp_path: Path) -> None:
    """An embedding whose first, last, or one of the last rows is another."""
    _saved("bert", tmp_path)
    model: Any = make("bert")
    with torch.no_grad():
        words = model.model.embeddings.word_embeddings.weight
        words[row] += 1
    with pytest.raises(ScionError, match="another base"):
        load_adapter(tmp_path, model)


def test_places() -> None:
    for size in (0, 1, SAMPLES, SAMPLES + TAIL, SAMPLES + TAIL + 1, 1000, 10**6, 30522 * 768, 2**33):
        found = places(size).tolist()
        assert len(found) == min(size, SAMPLES + TAIL) and all(0 <= place < size for place in found)
        assert not size or {0, size - 1} <= set(found)
    tail = sorted(place for place in places(10**6).tolist() if place > 10**6 - 10**6 // SAMPLES)
    assert len(tail) == TAIL + 1 and tail[-2] > 10**6 - 100


def test_a_file_of_an_earlier_version(tmp_path: Path) -> None:
    """Its base has one digest, which is compared as it was."""
    _saved("bert", tmp_path)
    record = json.loads((tmp_path / RECORD).read_text())
    whole = record["base"]["fingerprint"]
    record["base"]["fingerprint"] = whole.partition("-")[0]
    (tmp_path / RECORD).write_text(json.dumps(record))
    load_adapter(tmp_path, make("bert"))
    load_adapter(tmp_path, make("bert", dtype=torch.bfloat16))
    with pytest.raises(ScionError, match="another base"):
        load_adapter(tmp_path, make("bert", seed=1))


def test_equality() -> None:
    one = fingerprint(make("timm_vit"))
    assert isinstance(one, Fingerprint) and [len(part) for part in one.split("-")] == [16, 12, 12]
    plain = str.__str__(one)
    assert one == plain and plain == one and not one != plain and not plain != one
    for other in ("a-b-c", "a", f"{one.split('-')[0]}-b-c", ""):
        assert one != other and other != one and not one == other
    first, bfloat, half = one.split("-")
    assert one == first and one == f"x-{bfloat}-y" and one == f"x-y-{half}" and one != None  # noqa: E711
