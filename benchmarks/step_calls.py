"""How many Python functions of ours one training step calls: LoRA on q and v of four layers of a tiny BERT.

    python -m benchmarks.step_calls
"""

from __future__ import annotations

import sys
from collections import Counter
from pathlib import Path
from typing import Any

import torch

from core.peft import LoRA  # type: ignore[attr-defined]

CORE = str(Path(__file__).parents[1] / "core")


def model_and_input() -> tuple[torch.nn.Module, torch.Tensor]:
    """A BERT of four layers with random weights, and a batch of token ids [2, 8]."""
    from transformers import BertConfig, BertModel

    torch.manual_seed(0)
    config = BertConfig(vocab_size=50, hidden_size=32, num_hidden_layers=4, num_attention_heads=4,
                        intermediate_size=64, max_position_embeddings=16)
    return BertModel(config), torch.randint(0, 50, (2, 8))


def count_calls() -> Counter[str]:
    """Calls of the core's functions in one step (forward, backward, optimizer), by function."""
    model, ids = model_and_input()
    method = LoRA(rank=4, targets=("q", "v")).attach(model)
    optimizer = torch.optim.AdamW(list(method.trainable().values()))
    model.train()

    def step() -> None:
        model(ids).last_hidden_state.square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()

    step()  # the first one fills caches
    calls: Counter[str] = Counter()

    def count(frame: Any, event: str, argument: Any) -> None:
        if event == "call" and frame.f_code.co_filename.startswith(CORE):
            calls[f"{Path(frame.f_code.co_filename).name}:{frame.f_code.co_qualname}"] += 1

    sys.setprofile(count)
    try:
        step()
    finally:
        sys.setprofile(None)
    return calls


def main() -> None:
    calls = count_calls()
    for name, number in calls.most_common():
        print(f"{number:6}  {name}")
    print(f"{sum(calls.values()):6}  calls of the core in one step")


if __name__ == "__main__":
    main()
