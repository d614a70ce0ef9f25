"""Convolutions of every padding: what a method adds beside the map is what merging writes into it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from core import peft
from core.anatomy import BlockDescription, Description, family
from tests.toolkit import distance, outputs, randomize

MODES = ("zeros", "reflect", "circular", "replicate")
KINDS = {"LoRA": {"rank": 2}, "rsLoRA": {"rank": 2}, "PiSSA": {"rank": 2}, "DoRA": {"rank": 2}, "AdaLoRA": {"rank": 2},
         "TriAdaptLoRA": {"rank": 2}, "MoS": {"rank": 2}, "VeRA": {"rank": 4}, "SVFit": {}, "Bone": {"rank": 2},
         "Hydra": {}, "FacT": {"rank": 2}, "Consolidator": {"groups": 1}, "LoHa": {"rank": 2}, "LoKr": {"rank": 2},
         "FourierFT": {"frequencies": 6}, "OFT": {"block": 2}, "SSF": {}, "SensitivityTuning": {"count": 40, "rank": 1}}


class OwnPadding(nn.Conv2d):
    """A convolution that pads in its own forward, as TensorFlow's "same" is written."""

    def forward(self, input: Tensor) -> Tensor:
        return F.conv2d(F.pad(input, (0, 2, 1, 1)), self.weight, self.bias, self.stride)


class Maps(nn.Module):
    """Two blocks of a 3 x 3 and a 1 x 1 convolution on maps [batch, 8, height, width]."""

    def __init__(self, mode: str, **geometry: Any) -> None:
        super().__init__()
        kind = OwnPadding if mode == "own" else nn.Conv2d
        own = {} if mode == "own" else {"padding_mode": mode, "padding": 1, **geometry}
        self.blocks = nn.ModuleList(nn.Sequential(kind(8, 8, 3, **own), nn.GELU(), nn.Conv2d(8, 8, 1))
                                    for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = x + block(x)
        return x.mean((-2, -1))


@family("tests.core.test_convolutions:Maps", f"{__name__}:Maps")
def maps(model: Any) -> Description:
    return Description([BlockDescription(path=f"blocks.{i}", dim=8, heads=None, roles={"conv": "0", "mlp.down": "2"})
                        for i in range(2)])


def _made(mode: str, **geometry: Any) -> tuple[nn.Module, Tensor]:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return Maps(mode, **geometry).double().eval(), torch.randn(2, 8, 6, 6, dtype=torch.float64)


def _merges(name: str, config: dict[str, Any], model: nn.Module, inputs: Tensor) -> None:
    method = peft.method_class(name)(**config)
    start = outputs(model, inputs)
    method.attach(model)
    randomize(method, size=0.3)
    expected = outputs(model, inputs)
    assert distance(expected, start) > 1e-3
    method.merge()
    assert distance(outputs(model, inputs), expected) < 1e-10


@pytest.mark.parametrize("mode", [*MODES, "own"])
@pytest.mark.parametrize("name", KINDS)
def test_padding(name: str, mode: str) -> None:
    _merges(name, {**KINDS[name], "targets": ("conv",)}, *_made(mode))


@pytest.mark.parametrize("geometry", [{"groups": 2}, {"dilation": 2, "padding": 2}, {"padding": "same"}], ids=str)
@pytest.mark.parametrize("name", ["LoRA", "DoRA"])
def test_geometry(name: str, geometry: dict[str, Any]) -> None:
    _merges(name, {"rank": 2, "targets": ("conv",)}, *_made("circular", **geometry))


def test_scaled_inputs() -> None:
    _merges("IA3", {"outputs": ("conv",), "inputs": ("mlp.down",)}, *_made("reflect"))


@pytest.mark.parametrize("name", ["LoRA", "SSF", "Hydra", "IA3"])
def test_a_map_without_a_batch_axis(name: str) -> None:
    """[8, height, width] gives what it gives as a batch of one."""
    model, inputs = _made("replicate")
    targets = {"outputs": ("conv",), "inputs": ()} if name == "IA3" else {"targets": ("conv",)}
    method: Any = peft.method_class(name)(**targets).attach(model)
    randomize(method, size=0.3)
    assert distance(outputs(model, inputs[0]), outputs(model, inputs[:1])[0]) < 1e-12
