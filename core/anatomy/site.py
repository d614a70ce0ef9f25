"""A named place in a backbone, and what a graft can do there without knowing how the module lays out its tensors."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from core.anatomy.description import class_names
from core.anatomy.layout import Heads, Rows

if TYPE_CHECKING:
    from core.anatomy.anatomy import Block


@dataclass(eq=False)
class SitePlace:
    """Where a site is: a role, the module that plays it, and its tensors by their names."""

    name: str
    role: str
    path: str
    module: nn.Module
    block: int | None = None
    rows: Rows | None = None
    heads: Heads | None = None
    width: int = 0
    """Channels of the hidden state that leaves the site; they are its last axis."""
    around: Block | None = None
    """The block that holds it."""
    parameter: str = "weight"
    """Which of the module's parameters the verb ``weight`` sees."""
    tied: tuple[nn.Module, ...] = ()
    """Other modules that hold the same parameter under the same name."""
    while_active: tuple[tuple[nn.Module, str, Any], ...] = ()
    """(module, attribute, value) that must be so while a graft is active here."""
    per_token: dict[str, str] = field(default_factory=dict)
    """Further arguments of the module that belong to the tokens it is called with."""
    offset: float = 0.0
    """What a norm adds to its weight before it multiplies."""
    by_weight: bool = False
    """The map is never called as a module: a graft here acts by what it would write into the weight."""
    whole: tuple[tuple[str, nn.Module], ...] = ()
    """Of a language-model head all its parts, with their paths; the site itself is its map to the vocabulary."""

    @property
    def kind(self) -> str:
        """``linear`` (weight [out, in]), ``conv1d`` (transformers' [in, out]), ``conv`` (convolution) or ``module``."""
        if self.role == "parameter":
            return "module"
        if isinstance(self.module, nn.Linear) or self.by_weight:
            return "linear"
        # A transposed convolution has its axes the other way round, and none of the matrices below would fit.
        if isinstance(self.module, nn.modules.conv._ConvNd) and not self.module.transposed:
            return "conv"
        # By its name, so that transformers is not imported for models that are none of its own.
        if "transformers.pytorch_utils:Conv1D" in class_names(self.module):
            return "conv1d"
        return "module"

    @property
    def full_weight(self) -> nn.Parameter:
        """The module's own parameter, whole, in the module's layout."""
        return getattr(self.module, self.parameter)

    @property
    def weight_name(self) -> str:
        """The parameter's name in the root's state dict."""
        return self._in_root(self.parameter)

    def _in_root(self, name: str) -> str:
        """The name in the root's state dict of something that the module calls ``name``."""
        return f"{self.path}.{name}" if self.path else name

    @property
    def parameter_names(self) -> list[str]:
        """Names in the root's state dict of all that the site holds: its module's parameters, or the one it is."""
        if self.by_weight:
            return [self.weight_name] if self.bias is None else [self.weight_name, self.bias_name]
        if self.parameter != "weight":
            return [self.weight_name]
        if self.whole:
            names = []
            for path, part in self.whole:
                names += [f"{path}.{name}" for name, _ in part.named_parameters()]
            return names
        return [self._in_root(name) for name, _ in self.module.named_parameters()]

    @property
    def out_axis(self) -> int:
        """The axis of the weight that counts the output's channels."""
        return 1 if self.kind == "conv1d" else 0

    @property
    def bias_parameter(self) -> str:
        """The name of the module's parameter that is added behind the map."""
        return "in_proj_bias" if self.by_weight else "bias"

    @property
    def bias_name(self) -> str:
        """The bias's name in the root's state dict, whether or not there is one."""
        return self._in_root(self.bias_parameter)

    @property
    def bias(self) -> Tensor | None:
        """The site's part of the bias [out]."""
        bias = getattr(self.module, self.bias_parameter, None)
        if bias is None or self.rows is None:
            return bias
        return self.rows.take(bias)

    @property
    def takes_bias(self) -> bool:
        """Whether merging may change the module's bias, or give it one: it must be called as a whole and look for it.
        Norms by root mean square do not."""
        if self.bias is not None:
            return True
        # torch's own layers read weight and bias also where they do not call the module. What another library's module
        # must be set to call (EVA's qkv), it computes from the weight only as soon as no graft is active.
        look_for_it = (nn.TransformerEncoder, nn.TransformerEncoderLayer, nn.MultiheadAttention)
        called = all(isinstance(owner, look_for_it) for owner, _, _ in self.while_active)
        return "bias" in self.module._parameters and called


@dataclass(eq=False)
class Site(SitePlace):
    """A named place in a backbone: how its tensors are laid out, and maps beside its own."""

    def rerun(self, x: Tensor, arguments: Mapping[str, Any], hidden: str) -> Tensor:
        """The frozen module called once more, on tokens ``x`` that are not the call's own, without the hooks at it (so
        without any graft of this site); those of modules inside it take part. Nothing is checkpointed.

        Args:
            x: another hidden state [batch, tokens, dim].
            arguments: those of the call, by name; masks and caches are left out, positions are the last token's.
            hidden: the name of the hidden state among them.
        """
        kept = {name: self._for_other_tokens(name, value) for name, value in arguments.items()}
        kept[hidden] = x
        # The class's forward: transformers' checkpointing and our hooks are both in the module's __call__.
        output = type(self.module).forward(self.module, **kept)
        return output[0] if isinstance(output, tuple) else output

    def _for_other_tokens(self, name: str, value: Any) -> Any:
        """An argument of the call, as it is given to a call with other tokens."""
        fates = {"none": lambda value: None, "last": _last, "": lambda value: value}
        fate = fates[self.per_token.get(name, "")]
        return fate(value)

    @property
    def out_features(self) -> int:
        """Rows of the weight that belong to the site."""
        if self.rows is not None:
            return len(self.rows)
        return self.full_weight.shape[self.out_axis]

    @property
    def in_features(self) -> int:
        """Numbers that one output row reads: for a convolution (in / groups) x kernel."""
        weight = self.full_weight
        return weight.numel() // weight.shape[self.out_axis]

    @property
    def channel_axis(self) -> int:
        """Axis of the channels in the site's output, from the end: before the space axes behind a convolution or a
        norm of images, else the last."""
        if self.kind == "conv":
            return 1 - self.full_weight.dim()  # the weight has two axes beside those of space
        return -3 if type(self.module).__name__.endswith("Norm2d") else -1

    def take(self, y: Tensor) -> Tensor:
        """The site's channels of its module's output."""
        return y if self.rows is None else self.rows.take(y, self.channel_axis)

    def put(self, y: Tensor, part: Tensor) -> Tensor:
        """Its module's output with the site's channels replaced, as a new tensor of the same type."""
        part = part.to(y.dtype)
        return part if self.rows is None else self.rows.put(y, part, self.channel_axis)

    def per_channel(self, vector: Tensor) -> Tensor:
        """A vector [out] shaped so that it broadcasts over the site's output."""
        if self.kind != "conv":
            return vector
        space = self.full_weight.dim() - 2
        return vector.view(-1, *[1] * space)

    def low_rank(self, x: Tensor, down: Tensor, up: Tensor, scale: float = 1.0) -> Tensor:
        """``scale up @ down`` applied to the site's input as its own weight would be, without forming the product.

        Args:
            x: the site's input, in the type of ``down``.
            down: [rank, in].
            up: [out, rank].
        """
        if self.kind == "conv" and self.module.groups > 1:  # type: ignore[operator]
            # Each group sees other channels: the product is the weight itself.
            product = scale * up @ down
            return self._convolve(x, product.view(-1, *self.full_weight.shape[1:]))
        hidden = self.project(x, down)
        scaled = hidden if scale == 1 else hidden * scale
        return self.mix(scaled, up)

    def project(self, x: Tensor, matrix: Tensor) -> Tensor:
        """``matrix`` [rank, in] applied to the site's input as its own weight would be -> rank channels."""
        if self.kind != "conv":
            return F.linear(x, matrix)
        return self._convolve(x, matrix.view(-1, *self.full_weight.shape[1:]))

    def mix(self, y: Tensor, matrix: Tensor) -> Tensor:
        """``matrix`` [out, in] applied to the channels of a tensor on the site's output side."""
        if self.kind != "conv":
            return F.linear(y, matrix)
        space = self.full_weight.dim() - 2
        convolve = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}[space]
        kernel = matrix.view(*matrix.shape, *[1] * space)  # a kernel of one point
        return convolve(y, kernel)

    def _convolve(self, x: Tensor, weight: Tensor) -> Tensor:
        """What the site's convolution makes of ``x`` with another weight and no bias; it pads and strides as ever."""
        conv: Any = self.module
        if type(conv).forward in (nn.Conv1d.forward, nn.Conv2d.forward, nn.Conv3d.forward):
            return conv._conv_forward(x, weight, None)
        # A subclass pads or standardises in its own way: it is lent the other weight for one call.
        held = dict(conv._parameters)
        conv._parameters.update(weight=weight, bias=None)
        try:
            return type(conv).forward(conv, x)
        finally:
            conv._parameters.update(held)

    def matrix(self, weight: Tensor) -> Tensor:
        """The site's part of ``weight`` (the module's layout) as a matrix [out, in]."""
        if self.kind == "module":
            return weight
        rows = self._as_rows(weight)
        return rows if self.rows is None else self.rows.take(rows)

    def _as_rows(self, weight: Tensor) -> Tensor:
        """``weight`` (the layout of a linear map) with one row for each output channel."""
        return weight.t() if self.kind == "conv1d" else weight.flatten(1)

    def unmatrix(self, matrix: Tensor, weight: Tensor) -> Tensor:
        """``weight`` (the module's layout) with the site's part replaced by ``matrix`` [out, in], as a new tensor."""
        if self.kind == "module":
            return matrix
        if self.rows is not None:
            whole = self._as_rows(weight).to(matrix.dtype)
            matrix = self.rows.put(whole, matrix)
        return matrix.t() if self.kind == "conv1d" else matrix.reshape(weight.shape)


def _last(value: Any) -> Any:
    """The last token's part of positions (ids [.., tokens] or embeddings [.., tokens, width]) or of a mask [.., tokens,
    keys], or of a tuple of these."""
    if isinstance(value, (tuple, list)):
        return tuple(_last(part) for part in value)
    if not isinstance(value, Tensor):
        return value
    if value.dtype in (torch.int32, torch.int64):  # ids of positions have no axis behind that of the tokens
        return value[..., -1:]
    return value[..., -1:, :]
