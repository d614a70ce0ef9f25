"""What a run costs, counted before it runs: parameters, FLOPs, bytes kept for backward, operators.

    >>> LoRA(rank=8).attach(model)
    >>> cost = describe(model, images)
    >>> print(cost)
    >>> cost.kept_bytes, cost.to_dict()

One forward and backward in the model's train mode, on stand-ins: fake CPU tensors of the same shapes and types, without
values. So nothing is computed, the model, its gradients and all random states stay as they are, a model on the meta
device will do, and the numbers are the same on every machine. A CPU's kernels are counted: a GPU keeps other
bookkeeping beside the same activations (dropout's mask in one byte an element instead of a number's size, say).
"""

from __future__ import annotations

import dataclasses
import json
import weakref
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import DataDependentOutputException, DynamicOutputShapeException, FakeTensorMode
from torch.autograd.graph import saved_tensors_hooks
from torch.func import functional_call
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count

from core.errors import ScionError
from core.method import OwnOptimizer, home_in, methods_on
from core.random_state import random_states, restore_random_states

Inputs = Tensor | tuple[Any, ...] | list[Any] | Mapping[str, Any]
Loss = Callable[[Any], Tensor]


@dataclasses.dataclass(frozen=True)
class Cost:
    """Counts for one model and one batch; what needs an example input is None where none was given."""

    model: str
    """Class of the model."""
    methods: tuple[str, ...]
    """The methods attached to it, as they print."""
    parameters: dict[str, int]
    """Numbers by owner. ``total`` (all, whatever was added included), ``backbone`` (without methods and task heads),
    ``trained`` and its parts ``method``, ``norms`` (the option of that name), ``head``, ``beside`` (what training alone
    needs, where there is any), ``other`` (trained, but by no method), and ``stored``, what the methods' file holds
    without a head."""
    gradient_bytes: int
    """One gradient for each trained parameter, in its own type."""
    optimizer_bytes: int
    """Adam's two moments for each trained parameter, in its own type (not the step, 4 bytes a tensor); for methods that
    bring an optimizer, what that one keeps."""
    adapter_bytes: int
    """Size of ``adapter.safetensors`` as ``method.save`` writes it: with a trained head inside the methods' model,
    without one outside of it. 0 without a method."""
    kept_bytes: int | None = None
    """What the forward keeps for the backward, each storage once. Not counted: parameters and buffers, which are there
    anyway, and the batch."""
    forward_flops: int | None = None
    """Of matrix products, convolutions and attention; a multiplication and an addition are two."""
    backward_flops: int | None = None
    forward_operators: int | None = None
    """Operators that PyTorch dispatches below autograd, views included."""
    backward_operators: int | None = None

    def to_dict(self) -> dict[str, Any]:
        """All counts as JSON can hold them."""
        return {**dataclasses.asdict(self), "methods": list(self.methods)}

    def __str__(self) -> str:
        trained, total = self.parameters["trained"], self.parameters["total"]
        rows: list[tuple[str, int | None, str]] = [
            ("parameters", total, ""), ("  of the backbone", self.parameters["backbone"], ""),
            ("  trained", trained, f"{trained / total:.4%} of all" if total else ""),
            *((f"    {owner}", self.parameters[owner], "") for owner in ("method", "norms", "head", "beside", "other")
              if owner in self.parameters),
            ("  stored", self.parameters["stored"], ""),
            *((name.replace("_bytes", " bytes"), value, _binary(value)) for name, value in (
                ("adapter_bytes", self.adapter_bytes), ("gradient_bytes", self.gradient_bytes),
                ("optimizer_bytes", self.optimizer_bytes), ("kept_bytes", self.kept_bytes))),
            ("FLOPs forward", self.forward_flops, ""), ("FLOPs backward", self.backward_flops, ""),
            ("operators forward", self.forward_operators, ""), ("operators backward", self.backward_operators, ""),
        ]
        lines = [f"{name:<20}{value:>20,}  {note}".rstrip() for name, value, note in rows if value is not None]
        return "\n".join([f"{self.model}: {', '.join(self.methods) or 'no method'}", *lines])


def describe(model: nn.Module, example_input: Inputs | None = None, loss: Loss | None = None) -> Cost:
    """Count what training ``model`` costs, without training it and without leaving a trace on it.

    Args:
        model: any module, with or without methods attached, on any device (``meta`` included).
        example_input: one batch: a tensor, a tuple of arguments, or a mapping of named ones. None counts parameters
            only. Values do not matter, unless the model's control flow reads them.
        loss: from the model's output to a scalar; it is counted with the model. By default the backward starts from the
            sum of the squares of all outputs, and only the model itself is counted.

    Raises:
        ScionError: an output without tensors, a loss that is no scalar, or a model on the meta device whose control
            flow reads values.
    """
    cost = _parameters(model)
    return cost if example_input is None else dataclasses.replace(cost, **_passes(model, example_input, loss))


# ------------------------------------------------------------------------------------------------- parameters


def _parameters(model: nn.Module) -> Cost:
    methods = methods_on(model)
    trained = {id(p): p for p in model.parameters() if p.requires_grad}
    owner: dict[int, str] = {}
    stored: dict[str, Tensor] = {}
    file: dict[str, Tensor] = {}
    outside = added = 0
    if methods:
        path, root = home_in(model) or ("", model)
        home: Any = root.peft
        inside = dict(root.named_parameters())
        for method in methods:
            stored.update(method.tensors())
            norms = set(method.norm_names)
            for name, tensor in method.trainable().items():
                owner.setdefault(id(tensor), "norms" if name in norms else "method")
        heads = {name: inside[name].detach() for name in home.heads}
        file = {**stored, **{name: tensor for name, tensor in heads.items() if inside[name].requires_grad}}
        mine = {id(p) for p in inside.values()}
        beside = {id(p) for p in getattr(model, "beside_inference", list)()}
        around = {id(p): p for p in model.parameters() if id(p) not in mine}
        for key in [*(id(inside[name]) for name in heads), *around]:  # a task's head may stand outside of the backbone
            if key in trained:
                owner.setdefault(key, "beside" if key in beside else "head")
        outside = sum(t.numel() for t in heads.values()) + sum(p.numel() for p in around.values())
        added = sum(p.numel() for p in home.parameters())
    owners = ("total", "backbone", "trained", "method", "norms", "head", *(["beside"] if "beside" in owner.values() else
                                                                          []), "other", "stored")
    counts: dict[str, int] = dict.fromkeys(owners, 0)
    for key, tensor in trained.items():
        counts[owner.get(key, "other")] += tensor.numel()
    counts["total"] = sum(p.numel() for p in model.parameters())
    counts["backbone"] = counts["total"] - added - outside
    counts["trained"] = sum(p.numel() for p in trained.values())
    counts["stored"] = sum(tensor.numel() for tensor in stored.values())
    gradients = sum(p.numel() * p.element_size() for p in trained.values())
    moments = 2 * gradients
    for method in methods:
        if isinstance(method, OwnOptimizer):
            adam = sum(2 * p.numel() * p.element_size() for p in method.trainable().values() if id(p) in trained)
            moments += method.optimizer_bytes() - adam
    return Cost(model=type(model).__name__, methods=tuple(map(repr, methods)), parameters=counts,
                gradient_bytes=gradients, optimizer_bytes=moments,
                adapter_bytes=safetensors_bytes(file) if methods else 0)


_NAMES = {"float64": "F64", "float32": "F32", "float16": "F16", "bfloat16": "BF16", "int64": "I64", "int32": "I32",
          "int16": "I16", "int8": "I8", "uint64": "U64", "uint32": "U32", "uint16": "U16", "uint8": "U8",
          "bool": "BOOL", "complex64": "C64", "float8_e4m3fn": "F8_E4M3", "float8_e5m2": "F8_E5M2"}


def safetensors_bytes(tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None) -> int:
    """Size of the safetensors file that would hold ``tensors``, without writing it: 8 bytes, the header padded to a
    multiple of 8, the data.

    Args:
        metadata: the file's own; None is what adapters have.
    """
    header: dict[str, Any] = {"__metadata__": dict(metadata or {"format": "pt"})}
    end = 0
    for name, tensor in sorted(tensors.items(), key=lambda item: (-item[1].element_size(), item[0])):
        start, end = end, end + tensor.numel() * tensor.element_size()
        kind = str(tensor.dtype).removeprefix("torch.")
        header[name] = {"dtype": _NAMES[kind], "shape": list(tensor.shape), "data_offsets": [start, end]}
    length = len(json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode())
    return 8 + -(-length // 8) * 8 + end


# ------------------------------------------------------------------------------------------------- one step


def _passes(model: nn.Module, inputs: Inputs, loss: Loss | None) -> dict[str, int]:
    try:
        return _step(model, inputs, loss, fake=True)
    except (DataDependentOutputException, DynamicOutputShapeException) as error:
        # The forward reads values (`.item()`, rows under a mask): only a real step can follow it.
        if any(p.is_meta for p in model.parameters()):
            raise ScionError(f"describe: the forward of {type(model).__name__} reads values ({error.func}), and a "
                             "model on the meta device has none: give it weights, or no example_input") from None
    return _step(model, inputs, loss, fake=False)


def _step(model: nn.Module, inputs: Inputs, loss: Loss | None, fake: bool) -> dict[str, int]:
    """One forward and backward to count operators, and a forward of its own for what it keeps: hooks on saved tensors
    would add operators."""
    with _stand_ins(model, inputs, fake) as (forward, _):
        operators = _Operators()
        with FlopCounterMode(display=False, custom_mapping=_ATTENTION) as flops:
            with operators:
                ends = _ends(forward(), loss)
            flops_there, operators_there = flops.get_total_flops(), operators.count
            # The squares' own operators are not the model's: their gradient is given instead.
            starts = [None] * len(ends) if loss else [2 * end.detach() for end in ends]
            with operators:
                if ends:
                    torch.autograd.backward(ends, starts)
            flops_back = flops.get_total_flops() - flops_there
    with _stand_ins(model, inputs, fake) as (forward, there_anyway):
        kept: weakref.WeakSet[_Kept] = weakref.WeakSet()

        def pack(tensor: Tensor) -> _Kept:
            entry = _Kept(tensor)
            kept.add(entry)  # it lives as long as the graph that holds it: what is dropped on the way is not counted
            return entry

        with saved_tensors_hooks(pack, lambda entry: entry.tensor):
            ends = _ends(forward(), loss)
        storages = {storage._cdata: storage.nbytes() for storage in (e.tensor.untyped_storage() for e in kept)}
        kept_bytes = sum(size for key, size in storages.items() if key not in there_anyway)
        del ends
    return {"kept_bytes": kept_bytes, "forward_flops": flops_there, "backward_flops": flops_back,
            "forward_operators": operators_there, "backward_operators": operators.count - operators_there}


@contextmanager
def _stand_ins(model: nn.Module, inputs: Inputs, fake: bool) -> Iterator[tuple[Callable[[], Any], set[int]]]:
    """The model's forward on ``inputs`` with other tensors in its place, and the storages that are there anyway.

    Fake parameters have no values; real ones share theirs with the model, so that gradients go elsewhere. The batch and
    the buffers (as copies) keep their values, which libraries look at when they make masks. Whatever a forward sets on
    modules or draws from generators is taken back.
    """
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    before: list[tuple[nn.Module, dict[str, Any], dict[str, Any], dict[str, Any]]] = [
        (module, dict(vars(module)), dict(module._parameters), dict(module._buffers)) for module in model.modules()]
    states = random_states()

    def hollow(tensor: Tensor) -> Tensor:
        with mode:
            return torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device="cpu")

    def solid(tensor: Tensor) -> Tensor:
        return hollow(tensor) if tensor.is_meta else tensor.detach().cpu()

    try:
        with torch.inference_mode(False), torch.enable_grad():
            model.train()
            tensors: dict[str, Tensor] = {
                name: nn.Parameter(hollow(p) if fake else solid(p), requires_grad=p.requires_grad)
                for name, p in model.named_parameters()}
            tensors.update({name: solid(b).clone() for name, b in model.named_buffers()})
            batch = tree_map_only(Tensor, solid, inputs)
            args, kwargs = ((), dict(batch)) if isinstance(batch, Mapping) else \
                (tuple(batch), {}) if isinstance(batch, (tuple, list)) else ((batch,), {})
            there_anyway = {t.untyped_storage()._cdata for t in [*tensors.values(), *tree_leaves(batch)]
                            if isinstance(t, Tensor)}
            yield lambda: functional_call(model, tensors, args, kwargs), there_anyway
    finally:
        for module, state, parameters, buffers in before:
            vars(module).clear()
            vars(module).update(state)
            module._parameters.clear()
            module._parameters.update(parameters)
            module._buffers.clear()
            module._buffers.update(buffers)
        restore_random_states(states)


def _ends(output: Any, loss: Loss | None) -> list[Tensor]:
    """Where the backward starts: the loss, or all outputs that depend on something trained."""
    if loss is not None:
        value = loss(output)
        if not isinstance(value, Tensor) or value.numel() != 1:
            what = list(value.shape) if isinstance(value, Tensor) else type(value).__name__
            raise ScionError(f"describe: loss must return a scalar tensor, not {what}")
        return [value] if value.requires_grad else []
    found = list(_tensors(output))
    if not found:
        raise ScionError(f"describe: the model returns no tensor but {type(output).__name__}; give a loss of it")
    return [tensor for tensor in found if tensor.requires_grad]


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, Mapping):
        value = list(value.values())
    if isinstance(value, (tuple, list)):
        for item in value:
            yield from _tensors(item)


class _Kept:
    """A tensor that the graph keeps, in a box that can be watched."""

    __slots__ = ("__weakref__", "tensor")

    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor


class _Operators(TorchDispatchMode):
    """Counts what is dispatched while it is entered."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None) -> Any:
        self.count += func.namespace != "prim"  # fake tensors ask for their device
        return func(*args, **(kwargs or {}))


# PyTorch's counter has no formula for the CPU's attention; the number of key heads may be smaller (grouped queries).


def _attention(q: Any, k: Any, v: Any, *rest: Any, **named: Any) -> int:
    return sdpa_flop_count(q, (k[0], q[1], *k[2:]), (v[0], q[1], *v[2:]))


def _attention_backward(grad: Any, q: Any, k: Any, v: Any, *rest: Any, **named: Any) -> int:
    return sdpa_backward_flop_count(grad, q, (k[0], q[1], *k[2:]), (v[0], q[1], *v[2:]))


_ATTENTION = {torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _attention,
              torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward: _attention_backward}


def _binary(size: int | None) -> str:
    """A size in words: 1.2 MiB."""
    if size is None or size < 1024:
        return ""
    power = min((size.bit_length() - 1) // 10, 4)
    return f"{size / 1024**power:.1f} {('', 'KiB', 'MiB', 'GiB', 'TiB')[power]}"
