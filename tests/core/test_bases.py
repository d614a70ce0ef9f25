"""Bases that no method can stand on: one line, and nothing has changed."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from core import describe, load_adapter, peft
from core.errors import ScionError
from tests.models import batch, make
from tests.toolkit import differences, outputs, trace


class Codes(nn.Linear):
    """A linear map with its weight in eight bits, as bitsandbytes keeps it."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__(linear.in_features, linear.out_features)
        self.weight = nn.Parameter((100 * linear.weight.detach()).to(torch.int8), requires_grad=False)

    def forward(self, input: Tensor) -> Tensor:
        return nn.functional.linear(input, self.weight.float() / 100, self.bias)


class Int8Tensor(torch.Tensor):
    """A tensor of torchao's kind."""


Int8Tensor.__module__ = "torchao.quantization"


class Packed(nn.Module):
    """A linear map whose weight is packed in a buffer, as GPTQ's."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.register_buffer("qweight", torch.zeros(linear.in_features // 8, linear.out_features, dtype=torch.int32))
        self.in_features, self.out_features = linear.in_features, linear.out_features

    def forward(self, input: Tensor) -> Tensor:
        return input.new_zeros(*input.shape[:-1], self.out_features)


Packed.__module__ = "gptqmodel.nn_modules.qlinear"


def _swap(model: Any, kind: Callable[[nn.Linear], nn.Module]) -> Any:
    for path, module in list(model.named_modules()):
        if type(module) is nn.Linear:
            model.set_submodule(path, kind(module))
    return model


def _subclass(model: Any) -> Any:
    for module in model.modules():
        if type(module) is nn.Linear:
            module.weight = nn.Parameter(module.weight.detach().as_subclass(Int8Tensor), requires_grad=False)
    return model


def _eight_bits(model: Any) -> Any:
    for module in model.modules():
        if type(module) is nn.Linear:
            module.weight = nn.Parameter(module.weight.detach().to(torch.float8_e4m3fn), requires_grad=False)
    return model


def _offloaded(model: Any) -> Any:
    from accelerate import cpu_offload

    return cpu_offload(model, execution_device=torch.device("cpu"))


def _half_empty(model: Any) -> Any:
    model.model.blocks[1].to("meta")
    return model


def _lazy(model: Any) -> Any:
    model.head = nn.LazyLinear(3)
    return model


BASES: dict[str, tuple[Callable[[Any], Any], str]] = {
    "int8 parameters": (lambda model: _swap(model, Codes), r"qkv.weight is quantized \(Codes\)"),
    "a subclass": (_subclass, r"qkv.weight is quantized \(Int8Tensor\)"),
    "float8": (_eight_bits, r"qkv.weight is quantized \(Linear\)"),
    "packed": (lambda model: _swap(model, Packed), "holds a quantized weight"),
    "dynamic": (lambda model: torch.ao.quantization.quantize_dynamic(model, {nn.Linear}), "holds a quantized weight"),
    "offloaded": (_offloaded, "offloaded by accelerate"),
    "half empty": (_half_empty, "12 of the 30 parameters of Pooled are on the meta device"),
    "lazy": (_lazy, "head.weight gets its shape with the first forward"),
}


@pytest.mark.parametrize("name", ["LoRA", "DoRA", "Houlsby", "PrefixTuning", "SSF", "FullFineTuning"])
@pytest.mark.parametrize("base", BASES)
def test_refused_in_a_line(base: str, name: str) -> None:
    change, words = BASES[base]
    model = change(make("timm_vit"))
    left = trace(model) if base != "lazy" else {}
    with pytest.raises(ScionError, match=words) as refusal:
        peft.method_class(name)().attach(model)
    assert "\n" not in str(refusal.value)
    assert base == "lazy" or differences(left, trace(model)) == []


@pytest.mark.parametrize("name", ["LoRA", "Houlsby", "LinearProbe"])
def test_a_model_without_parameters(name: str) -> None:
    class Bare(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x

    with pytest.raises(ScionError, match=f"{name}: Bare has no parameters"):
        peft.method_class(name)().attach(Bare())


def test_an_adapter_onto_such_a_base(tmp_path: Path) -> None:
    peft.method_class("LoRA")().attach(make("timm_vit")).save(tmp_path)
    for change, words in BASES.values():
        with pytest.raises(ScionError, match=words):
            load_adapter(tmp_path, change(make("timm_vit")))


@pytest.mark.parametrize("name", ["BitFit", "LayerNormTuning", "LinearProbe"])
def test_what_touches_no_quantized_weight_stands(name: str) -> None:
    model, inputs = _swap(make("timm_vit"), Codes), batch("timm_vit")
    expected = outputs(model, inputs)
    method = peft.method_class(name)().attach(model)
    assert torch.equal(outputs(model, inputs), expected) and method.attached


def test_a_base_that_is_meta_as_a_whole_stands() -> None:
    """It is counted, and may get its values later."""
    model = make("timm_vit").to("meta")
    method = peft.method_class("LoRA")().attach(model)
    assert describe(model).parameters["method"] == method.counts()["method"] > 0
