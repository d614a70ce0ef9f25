"""A training step asks little of Python."""

from __future__ import annotations

from benchmarks.step_calls import count_calls


def test_calls_of_a_step() -> None:
    calls = count_calls()
    assert calls["lora.py:LoRAGraft.delta"] == 8  # q and v of four layers
    assert sum(calls.values()) <= 200
