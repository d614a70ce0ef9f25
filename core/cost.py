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
import inspect
import json
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
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
from core.method import OwnOptimizer, PEFTMethod, home_in, methods_on
from core.method.described import FileNames
from core.random_state import random_states, restore_random_states

Inputs = Tensor | tuple[Any, ...] | list[Any] | Mapping[str, Any]
Loss = Callable[[Any], Tensor]
Row = tuple[str, int | None, str]
"""Name, number and a note behind it."""


@dataclasses.dataclass(frozen=True)
class Cost:
    """Counts for one model and one batch; what needs an example input is None where none was given."""

    model: str
    """Class of the model."""
    methods: tuple[str, ...]
    """The methods attached to it, as they print."""
    parameters: dict[str, int]
    """Numbers by owner. ``total`` (all, whatever was added included), ``backbone`` (without methods and task heads),
    ``trained`` and its parts ``method``, ``norms`` (the option of that name), ``head``, ``beside`` (what only training
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
        methods = ", ".join(self.methods) or "no method"
        lines = [f"{self.model}: {methods}"]
        for name, value, note in [*self._parameter_rows(), *self._byte_rows(), *self._step_rows()]:
            if value is not None:
                lines.append(f"{name:<20}{value:>20,}  {note}".rstrip())
        return "\n".join(lines)

    def _parameter_rows(self) -> list[Row]:
        counts = self.parameters
        trained, total = counts["trained"], counts["total"]
        share = f"{trained / total:.4%} of all" if total else ""
        rows: list[Row] = [("parameters", total, "")]
        rows.append(("  of the backbone", counts["backbone"], ""))
        rows.append(("  trained", trained, share))
        for owner in ("method", "norms", "head", "beside", "other"):
            if owner in counts:
                rows.append((f"    {owner}", counts[owner], ""))
        rows.append(("  stored", counts["stored"], ""))
        return rows

    def _byte_rows(self) -> list[Row]:
        sizes = {
            "adapter bytes": self.adapter_bytes,
            "gradient bytes": self.gradient_bytes,
            "optimizer bytes": self.optimizer_bytes,
            "kept bytes": self.kept_bytes,
        }
        return [(name, size, _binary(size)) for name, size in sizes.items()]

    def _step_rows(self) -> list[Row]:
        return [
            ("FLOPs forward", self.forward_flops, ""),
            ("FLOPs backward", self.backward_flops, ""),
            ("operators forward", self.forward_operators, ""),
            ("operators backward", self.backward_operators, ""),
        ]


def describe(model: nn.Module, example_input: Inputs | None = None, loss: Loss | None = None) -> Cost:
    """Count what training ``model`` costs, without training it and without leaving a trace on it.

    Args:
        model: any module, with or without methods attached, on any device (``meta`` included).
        example_input: one batch: a tensor, a tuple of arguments, or a mapping (by name where the forward takes those
            names, else one argument). None counts parameters only. Values do not matter, unless the control flow reads
            them.
        loss: from the model's output to a scalar; it is counted with the model. By default the backward starts from the
            sum of the squares of all outputs, and only the model itself is counted.

    Raises:
        ScionError: an output without tensors, a loss that is no scalar, or a model on the meta device whose control
            flow reads values.
    """
    cost = _parameters(model)
    if example_input is None:
        return cost
    counted = _passes(model, example_input, loss)
    return dataclasses.replace(cost, **counted)


# ------------------------------------------------------------------------------------------------- parameters


@dataclasses.dataclass
class _Ownership:
    """Whose the tensors of a model are. Parameters are known by identity: tied ones have several names."""

    owner: dict[int, str] = dataclasses.field(default_factory=dict)
    """The owner of each trained parameter that has one."""
    stored: dict[str, Tensor] = dataclasses.field(default_factory=dict)
    """What the methods' file holds without a head."""
    file: dict[str, Tensor] = dataclasses.field(default_factory=dict)
    """What it holds."""
    outside: int = 0
    """Numbers in task heads, inside the methods' model and around it."""
    added: int = 0
    """Numbers of the methods."""


def _parameters(model: nn.Module) -> Cost:
    methods = methods_on(model)
    trained = {id(p): p for p in model.parameters() if p.requires_grad}
    ownership = _ownership(model, methods, trained) if methods else _Ownership()
    gradient_bytes = _bytes(trained.values())
    adapter_bytes = safetensors_bytes(ownership.file) if methods else 0
    return Cost(
        model=type(model).__name__,
        methods=tuple(map(repr, methods)),
        parameters=_counts(model, trained, ownership),
        gradient_bytes=gradient_bytes,
        optimizer_bytes=_optimizer_bytes(methods, trained, gradient_bytes),
        adapter_bytes=adapter_bytes,
    )


def _numbers(tensors: Iterable[Tensor]) -> int:
    return sum(tensor.numel() for tensor in tensors)


def _bytes(tensors: Iterable[Tensor]) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def _ownership(model: nn.Module, methods: Sequence[PEFTMethod], trained: dict[int, nn.Parameter]) -> _Ownership:
    found = _Ownership()
    _, root = home_in(model) or ("", model)
    home: Any = root.peft
    inside = dict(root.named_parameters())
    # What several methods train is the first one's, hence `setdefault`.
    for method in methods:
        found.stored.update(method.tensors())
        norms = set(method.norm_names)
        for name, tensor in method.trainable().items():
            found.owner.setdefault(id(tensor), "norms" if name in norms else "method")
    heads = {name: inside[name].detach() for name in home.heads}
    trained_heads = {name: head for name, head in heads.items() if inside[name].requires_grad}
    names = FileNames(home.base.names, home.methods.values())
    found.file = {names.of(name): tensor for name, tensor in (found.stored | trained_heads).items()}
    around = _around(model, inside)
    beside = {id(p) for p in getattr(model, "beside_inference", list)()}
    in_heads = [id(inside[name]) for name in heads]
    for key in [*in_heads, *around]:  # a task's head may be outside of the backbone
        if key in trained:
            found.owner.setdefault(key, "beside" if key in beside else "head")
    found.outside = _numbers(heads.values()) + _numbers(around.values())
    found.added = _numbers(home.parameters())
    return found


def _around(model: nn.Module, inside: dict[str, nn.Parameter]) -> dict[int, nn.Parameter]:
    """The model's parameters that are not ``inside`` the methods' model."""
    known = {id(p) for p in inside.values()}
    return {id(p): p for p in model.parameters() if id(p) not in known}


def _counts(model: nn.Module, trained: dict[int, nn.Parameter], ownership: _Ownership) -> dict[str, int]:
    names = ["total", "backbone", "trained", "method", "norms", "head"]
    if "beside" in ownership.owner.values():
        names.append("beside")
    names += ["other", "stored"]
    counts = dict.fromkeys(names, 0)
    for key, parameter in trained.items():
        owner = ownership.owner.get(key, "other")
        counts[owner] += parameter.numel()
    counts["total"] = _numbers(model.parameters())
    counts["backbone"] = counts["total"] - ownership.added - ownership.outside
    counts["trained"] = _numbers(trained.values())
    counts["stored"] = _numbers(ownership.stored.values())
    return counts


def _optimizer_bytes(methods: Sequence[PEFTMethod], trained: dict[int, nn.Parameter], gradient_bytes: int) -> int:
    """Adam's two moments, each as large as the gradients; what a method's optimizer keeps replaces its share."""
    size = 2 * gradient_bytes
    for method in methods:
        if isinstance(method, OwnOptimizer):
            own = [p for p in method.trainable().values() if id(p) in trained]
            size += method.optimizer_bytes() - 2 * _bytes(own)
    return size


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
    # The library's order, wide types first and then by name: offsets with more digits make a longer header.
    for name, tensor in sorted(tensors.items(), key=lambda item: (-item[1].element_size(), item[0])):
        start = end
        end += tensor.numel() * tensor.element_size()
        kind = _NAMES[str(tensor.dtype).removeprefix("torch.")]
        header[name] = {"dtype": kind, "shape": list(tensor.shape), "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False)
    length = len(text.encode())
    padded = -(-length // 8) * 8
    return 8 + padded + end


# ------------------------------------------------------------------------------------------------- one step


def _passes(model: nn.Module, inputs: Inputs, loss: Loss | None) -> dict[str, int]:
    try:
        return _step(model, inputs, loss, fake=True)
    except (DataDependentOutputException, DynamicOutputShapeException) as error:
        # The forward reads values (`.item()`, rows under a mask): only a real step can follow it.
        if any(p.is_meta for p in model.parameters()):
            name = type(model).__name__
            raise ScionError(f"describe: the forward of {name} reads values ({error.func}), and a "
                             "model on the meta device has none: give it weights, or no example_input") from None
    return _step(model, inputs, loss, fake=False)


def _step(model: nn.Module, inputs: Inputs, loss: Loss | None, fake: bool) -> dict[str, int]:
    """One forward and backward to count operators, and another forward for what it keeps: hooks on saved tensors
    would add operators."""
    counts = _count_operators(model, inputs, loss, fake)
    kept = _kept_bytes(model, inputs, loss, fake)
    return {"kept_bytes": kept, **counts}


def _count_operators(model: nn.Module, inputs: Inputs, loss: Loss | None, fake: bool) -> dict[str, int]:
    with stand_ins(model, inputs, fake) as (forward, _):
        operators = _Operators()
        with FlopCounterMode(display=False, custom_mapping=ATTENTION_FLOPS) as flops:
            with operators:
                ends = _ends(forward(), loss)
            forward_flops = flops.get_total_flops()
            forward_operators = operators.count
            # The squares' operators are not the model's: their gradient is given instead.
            starts = [None] * len(ends) if loss else [2 * end.detach() for end in ends]
            with operators:
                if ends:
                    torch.autograd.backward(ends, starts)
            all_flops = flops.get_total_flops()
    return {
        "forward_flops": forward_flops,
        "backward_flops": all_flops - forward_flops,
        "forward_operators": forward_operators,
        "backward_operators": operators.count - forward_operators,
    }


def _kept_bytes(model: nn.Module, inputs: Inputs, loss: Loss | None, fake: bool) -> int:
    kept: weakref.WeakSet[_Kept] = weakref.WeakSet()

    def pack(tensor: Tensor) -> _Kept:
        entry = _Kept(tensor)
        kept.add(entry)  # it lives as long as the graph that holds it: what is dropped on the way is not counted
        return entry

    with stand_ins(model, inputs, fake) as (forward, there_anyway):
        with saved_tensors_hooks(pack, lambda entry: entry.tensor):
            ends = _ends(forward(), loss)
        sizes = _storage_sizes(entry.tensor for entry in kept)
        del ends  # and with it the graph, up to here the one thing that keeps the entries
    return sum(size for key, size in sizes.items() if key not in there_anyway)


def _storage_sizes(tensors: Iterable[Tensor]) -> dict[int, int]:
    """Bytes of each storage, by its address: views of one tensor share a storage."""
    sizes: dict[int, int] = {}
    for tensor in tensors:
        storage = tensor.untyped_storage()
        sizes[storage._cdata] = storage.nbytes()
    return sizes


@dataclasses.dataclass(frozen=True)
class _Contents:
    """What a module held before a step."""

    module: nn.Module
    attributes: dict[str, Any]
    parameters: dict[str, Any]
    buffers: dict[str, Any]


@contextmanager
def stand_ins(model: nn.Module, inputs: Inputs, fake: bool) -> Iterator[tuple[Callable[[], Any], set[int]]]:
    """The model's forward on ``inputs`` with other tensors in its place, and the storages that are there anyway.

    Fake parameters have no values; real ones share theirs with the model, so that gradients go elsewhere. The batch and
    the buffers (as copies) keep their values, which libraries look at when they make masks. Whatever a forward sets on
    modules or draws from generators is taken back.
    """
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    before = _contents(model)
    states = random_states()

    def hollow(tensor: Tensor) -> Tensor:
        with mode:
            return torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device="cpu")

    def solid(tensor: Tensor) -> Tensor:
        return hollow(tensor) if tensor.is_meta else tensor.detach().cpu()

    try:
        with torch.inference_mode(False), torch.enable_grad():
            # The mode that is paid for: in the other one dropout, for example, keeps nothing.
            model.train()
            tensors: dict[str, Tensor] = {}
            for name, parameter in model.named_parameters():
                values = hollow(parameter) if fake else solid(parameter)
                tensors[name] = nn.Parameter(values, requires_grad=parameter.requires_grad)
            for name, buffer in model.named_buffers():
                tensors[name] = solid(buffer).clone()  # a batch norm writes into its buffers
            batch = tree_map_only(Tensor, solid, inputs)
            args, kwargs = _arguments(model, batch)
            there_anyway: set[int] = set()
            for leaf in [*tensors.values(), *tree_leaves(batch)]:
                if isinstance(leaf, Tensor):
                    there_anyway.add(leaf.untyped_storage()._cdata)
            yield lambda: functional_call(model, tensors, args, kwargs), there_anyway
    finally:
        _put_back(before)
        restore_random_states(states)


def _contents(model: nn.Module) -> list[_Contents]:
    """What every module holds: attributes, parameters and buffers."""
    found = []
    for module in model.modules():
        # `vars` holds the two dictionaries themselves, which a forward may change in place: hence copies of them.
        attributes = dict(vars(module))
        parameters = dict(module._parameters)
        buffers = dict(module._buffers)
        found.append(_Contents(module, attributes, parameters, buffers))
    return found


def _put_back(before: list[_Contents]) -> None:
    for entry in before:
        module = entry.module
        # Attributes first: the dictionaries of parameters and buffers are among them.
        vars(module).clear()
        vars(module).update(entry.attributes)
        module._parameters.clear()
        module._parameters.update(entry.parameters)
        module._buffers.clear()
        module._buffers.update(entry.buffers)


def _arguments(model: nn.Module, batch: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """A batch as the arguments of a forward: a mapping by name, or as one argument where the forward takes no such
    names (a `core.backbone.Backbone`, say)."""
    if isinstance(batch, Mapping):
        parameters = inspect.signature(model.forward).parameters
        takes_any = any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values())
        if takes_any or set(batch) <= set(parameters):
            return (), dict(batch)
        return (batch,), {}
    if isinstance(batch, (tuple, list)):
        return tuple(batch), {}
    return (batch,), {}


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
    """The tensors of an output, however nested; a mapping (a ModelOutput, say) is looked at as its values."""
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
        if func.namespace != "prim":  # fake tensors ask for their device
            self.count += 1
        return func(*args, **(kwargs or {}))


# PyTorch's counter has no formula for the CPU's attention; the number of key heads may be smaller (grouped queries).


def _attention(q: Any, k: Any, v: Any, *rest: Any, **named: Any) -> int:
    keys = (k[0], q[1], *k[2:])
    values = (v[0], q[1], *v[2:])
    return sdpa_flop_count(q, keys, values)


def _attention_backward(grad: Any, q: Any, k: Any, v: Any, *rest: Any, **named: Any) -> int:
    keys = (k[0], q[1], *k[2:])
    values = (v[0], q[1], *v[2:])
    return sdpa_backward_flop_count(grad, q, keys, values)


ATTENTION_FLOPS = {torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _attention,
              torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward: _attention_backward}


def _binary(size: int | None) -> str:
    """A size in words: 1.2 MiB."""
    if size is None or size < 1024:
        return ""
    units = ("", "KiB", "MiB", "GiB", "TiB")
    power = min((size.bit_length() - 1) // 10, 4)
    return f"{size / 1024**power:.1f} {units[power]}"
