"""Tokens drawn so that a sample depends on its seed alone, and not on the batch in which it is written.

Adding noise of Gumbel's distribution to log-probabilities and taking the largest draws a token by its probability
(Gumbel 1954; Maddison et al. 2014, arXiv:1411.0030). The noise of a sample comes from a generator of its own.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from core.errors import ScionError
from core.random_state import seed_of
from core.text.generate_settings import GenerateSettings


class Noise:
    """The noise of one sample: a row for each step, the same on every machine.

    Args:
        seed: of all draws.
        prompt: the prompt's number.
        sample: the sample's number among those of the prompt.
    """

    def __init__(self, seed: int, prompt: int, sample: int) -> None:
        self.generator = torch.Generator().manual_seed(seed_of("generate", seed, prompt, sample))

    def next(self, size: int) -> Tensor:
        """The next step's noise [size]."""
        # In double precision: single precision has no numbers between 1 - 2^-24 and 1, and rare tokens need them.
        uniform = torch.rand(size, dtype=torch.float64, generator=self.generator)
        return -torch.log(-torch.log(uniform))


class Drawing:
    """A processor of logits behind those of transformers: adds each sample's noise, so that the largest is a draw.

    Args:
        noises: of the batch's samples, in their order.
    """

    def __init__(self, noises: Sequence[Noise]) -> None:
        self.noises = noises

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """scores [samples, vocabulary] -> scores with noise, in double precision"""
        noise = torch.stack([noise.next(scores.shape[1]) for noise in self.noises])
        return scores.double() + noise.to(scores.device)


class FiniteScores:
    """A processor of logits that stops at the first score that is no number.

    Args:
        names: what messages call the batch's prompts.
    """

    def __init__(self, names: Sequence[str]) -> None:
        self.names = names

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """scores [rows, vocabulary] -> the same"""
        wrong = scores.isnan() | scores.isposinf()
        rows = wrong.any(dim=1)
        if rows.any():
            beams = len(scores) // len(self.names)
            name = self.names[int(rows.nonzero()[0]) // beams]
            raise ScionError(f"{name}: the model's scores of the next token are not finite (NaN); look at the weights "
                             "and at the floating-point type")
        return scores


def processors(settings: GenerateSettings, names: Sequence[str], noises: Sequence[Noise]) -> Any:
    """What happens to the scores of a batch before the largest is taken, as transformers' list of processors."""
    from transformers import LogitsProcessorList
    from transformers.generation.logits_process import TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

    found: list[Any] = [FiniteScores(names)]
    if settings.draws:
        found.append(TemperatureLogitsWarper(float(settings.temperature)))
        if settings.top_k:
            found.append(TopKLogitsWarper(settings.top_k))
        if settings.top_p < 1:
            found.append(TopPLogitsWarper(settings.top_p))
        found.append(Drawing(noises))
    return LogitsProcessorList(found)
