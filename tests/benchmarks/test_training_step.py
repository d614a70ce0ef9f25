"""The comparison with peft runs, on narrow models; no time is asserted."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("peft")
pytest.importorskip("timm")
pytest.importorskip("transformers")

from benchmarks.training_step import PAIRS, main, measure, median_of_ratios, random_base, ratio_of_medians


@pytest.mark.parametrize("model, method", [("nano_vit", "LoRA"), ("nano_bert", "PrefixTuning")])
def test_a_row(model: str, method: str, tmp_path: Path) -> None:
    files = ["--json", str(tmp_path / "speed.json"), "--table", str(tmp_path / "speed.md")]
    assert main(["--model", model, "--methods", method, "--repeats", "2", "--warmup", "0", *files]) == 0
    (row,) = json.loads((tmp_path / "speed.json").read_text())["rows"]
    assert row["ours"]["trained"] == row["theirs"]["trained"] > 0
    assert 0 < row["ours"]["kept_bytes"] <= row["theirs"]["kept_bytes"]
    assert row["interval"][0] <= row["ratio"] <= row["interval"][1]
    assert f"| {method} | {row['ratio']:.3f}" in (tmp_path / "speed.md").read_text()


@pytest.mark.slow
@pytest.mark.parametrize("model", ["nano_vit", "nano_bert"])
@pytest.mark.parametrize("method", PAIRS)
def test_bytes_kept_and_equal_start(model: str, method: str) -> None:
    if PAIRS[method].sites == "prompts" and model == "nano_vit":
        pytest.skip("peft's prompts need a transformers model")
    row = measure(model, random_base(model), method, repeats=1, warmup=0)
    assert row.ours["kept_bytes"] <= row.theirs["kept_bytes"]
    assert row.start_difference is None or row.start_difference < 1e-5


def test_ratio_of_medians() -> None:
    times = np.array([[2.0, 1.0], [4.0, 2.0], [9.0, 3.0]])
    ratio, (low, high) = ratio_of_medians(times)
    assert ratio == 2.0 and low == 2.0 and high == 3.0


def test_median_of_ratios_does_not_feel_a_slow_phase() -> None:
    steady = np.array([[1.0, 1.0], [1.01, 1.0], [0.99, 1.0], [1.0, 1.0], [1.0, 1.0]] * 4)
    slow = steady * np.where(np.arange(20) < 10, 1.0, 1.6)[:, None]
    slow[10, 0] /= 1.6  # the phase begins within a pair
    ratio, (low, high) = median_of_ratios(slow)
    assert ratio == 1.0 and low == pytest.approx(1, abs=0.011) and high == pytest.approx(1, abs=0.011)
    assert ratio_of_medians(slow)[0] < 0.8


def test_an_unknown_method(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--methods", "Lora"]) == 2
    assert "did you mean 'LoRA'" in capsys.readouterr().err
