"""What the tests of the matrix share. Nothing here moves the global random state."""

from __future__ import annotations

import os
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import lightning.pytorch as L
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from core.data import EpochLoader, EpochSampler
from core.method import PEFTMethod
from tests.models import EVERY_FAMILY, WIDTH, batch

if TYPE_CHECKING:
    from tests.methods import Cell  # which reads the rows of all papers, whose checks use this file

EVERYTHING = bool(os.environ.get("SCION_ALL"))
"""Run the long tier: every row, in every variant, on a share of all families (make test-all)."""

TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 3e-3}
"""Of merged against unmerged outputs, relative to the output's scale."""

CLASSES = 4

LIGHT = ("timm_vit", "timm_swin", "timm_vit", "bert", "timm_vit", "timm_vit", "ast", "timm_vit", "timm_vit", "llama",
         "timm_vit", "timm_vit", "t5", "timm_vit", "timm_vit")
"""For rows that compile or train: models of transformers take two to three times as long as timm's ViT."""


def invariant(number: int, text: str, where: Callable[[Cell], bool] | None = None, families: Sequence[str] = ()
              ) -> Any:
    """Mark a test that takes ``cell`` as a row of the matrix.

    Args:
        number: of the invariant.
        text: what it says, for the table.
        where: the cells to which it applies.
        families: through which the quick tier turns, some more often than others; all equally when not given.
    """
    return pytest.mark.invariant(number, text, where=where, families=families)


# ------------------------------------------------------------------------------------------------- values


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """The global random state seeded, and back as it was afterwards."""
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        yield


def randomize(method: PEFTMethod, seed: int = 0, size: float = 0.1) -> None:
    """Move every trained tensor away from its start."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for tensor in method.trainable().values():
            tensor += size * torch.randn(tensor.shape, generator=generator).to(tensor)


def snapshot(model: nn.Module) -> dict[str, Tensor]:
    """Copies of all parameters and buffers outside ``peft``."""
    return {name: tensor.detach().clone() for name, tensor in [*model.named_parameters(), *model.named_buffers()]
            if not name.startswith("peft.")}


def same(before: dict[str, Tensor], after: dict[str, Tensor]) -> bool:
    """Whether two sets of tensors have the same names and the same bits."""
    return before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)


def tolerance(family: str, dtype: torch.dtype, bound: float | None = None) -> float:
    """How far outputs may lie apart: ``bound``, or that of `TOLERANCE`; in half precision times the family's factor."""
    return (bound or TOLERANCE[dtype]) * (EVERY_FAMILY[family].rounding if dtype.itemsize == 2 else 1)


def distance(a: Tensor, b: Tensor) -> float:
    """Largest difference, relative to the scale of ``b``; infinite between different shapes."""
    if a.shape != b.shape:
        return float("inf")
    return ((a.double() - b.double()).abs().max() / b.double().abs().max()).item()


def outputs(model: nn.Module, inputs: Tensor) -> Tensor:
    with torch.no_grad():
        return model(inputs)


_PLAIN = {bool, int, float, str, type(None)}
_SIZED = {dict, OrderedDict, list, set, tuple}


def trace(model: nn.Module) -> dict[str, Any]:
    """All that a method might leave behind: for each module its class, its attributes, the sizes of its containers
    (hooks, parametrizations) and its plain flags; for each parameter identity, type and ``requires_grad``."""
    found: dict[str, Any] = {"modes": torch._C._len_torch_function_stack()}
    for path, module in model.named_modules():
        attributes: dict[str, Any] = {"class": type(module)}
        for name, value in vars(module).items():
            kind = type(value)
            attributes[name] = value if kind in _PLAIN else (kind, len(value)) if kind in _SIZED else kind
        found[path] = attributes
    for path, parameter in model.named_parameters(remove_duplicate=False):
        found[f"{path}()"] = (id(parameter), type(parameter), parameter.dtype, parameter.shape, parameter.requires_grad,
                              parameter._backward_hooks is None)
    return found


def differences(before: dict[str, Any], after: dict[str, Any]) -> list[str]:
    """Where two traces differ, for a message."""
    found = []
    for key in before.keys() | after.keys():
        one, two = before.get(key), after.get(key)
        if isinstance(one, dict) and isinstance(two, dict):
            found += [f"{key}.{name}: {one.get(name)} -> {two.get(name)}" for name in one.keys() | two.keys()
                      if one.get(name) != two.get(name)]
        elif one != two:
            found.append(f"{key}: {one} -> {two}")
    return sorted(found)


# ------------------------------------------------------------------------------------------------- training


def problem(family: str, size: int = 2, dtype: torch.dtype = torch.float32
            ) -> tuple[list[tuple[Tensor, Tensor]], Tensor]:
    """Two batches with random labels, and a frozen random head of unit variance [width, classes]."""
    generator = torch.Generator().manual_seed(0)
    head = torch.randn(WIDTH, CLASSES, generator=generator).to(dtype)
    labels = [torch.randint(CLASSES, (size,), generator=generator) for _ in range(2)]
    return [(batch(family, size, seed=i + 1, dtype=dtype), label) for i, label in enumerate(labels)], head


def narrowed(features: Tensor) -> Tensor:
    """Features [batch, WIDTH] for a head that knows nothing of methods: where one has made the feature wider, through
    a frozen random map."""
    width = features.shape[-1]
    if width == WIDTH:
        return features
    return features @ torch.randn(width, WIDTH, generator=torch.Generator().manual_seed(width)).to(features)


def uneven(output: Tensor) -> Tensor:
    """A scalar of any output that also sees one whose plain sum of squares is constant, a normalised one."""
    return (output * torch.linspace(0.5, 1.5, output.shape[-1]).to(output)).square().sum()


def loss_of(model: nn.Module, head: Tensor, inputs: Tensor, labels: Tensor) -> Tensor:
    return F.cross_entropy(narrowed(model(inputs)) @ head, labels)


def optimizer_of(method: PEFTMethod, lr: float | None = None, weight_decay: float | None = None
                 ) -> torch.optim.Optimizer:
    """AdamW in the method's groups, at its recommended settings unless others are given."""
    settings: dict[str, Any] = {"lr": method.suggested["lr"] if lr is None else lr,
                "weight_decay": method.recommended["weight_decay"] if weight_decay is None else weight_decay}
    groups = method.param_groups() or [{"params": [nn.Parameter(torch.zeros(1))]}]
    return method.make_optimizer(groups, **settings) or torch.optim.AdamW(groups, **settings)


def train(model: nn.Module, method: PEFTMethod, family: str, steps: int = 3, lr: float | None = 1e-2,
          weight_decay: float | None = 0.1, seed: int = 0) -> None:
    """``steps`` steps of AdamW on two batches; the model is left in eval mode."""
    batches, head = problem(family, dtype=next(model.parameters()).dtype)
    optimizer = optimizer_of(method, lr, weight_decay)
    model.train()
    with seeded(seed):
        for step in range(steps):
            loss = loss_of(model, head, *batches[step % 2])
            optimizer.zero_grad()
            if loss.requires_grad:
                loss.backward()
            optimizer.step()
    model.eval()


class Counter(TorchDispatchMode):
    """Counts dispatched operators; views and other free ones are left out."""

    free = ("view", "_unsafe_view", "t", "transpose", "permute", "expand", "slice", "select", "unsqueeze", "squeeze",
            "detach", "alias", "unbind", "split", "reshape", "narrow", "as_strided")

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None) -> Any:
        name = func.overloadpacket.__name__
        if name not in self.free:
            self.names.append(name)
        return func(*args, **(kwargs or {}))


def operators(model: nn.Module, inputs: Tensor) -> list[str]:
    """Names of the operators that a forward without gradients dispatches."""
    with torch.no_grad(), Counter() as counter:
        model(inputs)
    return counter.names


def saved_bytes(model: nn.Module, inputs: Tensor) -> int:
    """Bytes that a forward keeps for backward, parameters and buffers left out."""
    own = {tensor.untyped_storage().data_ptr() for tensor in [*model.parameters(), *model.buffers()]}
    kept: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        alive = model(inputs)
    del alive
    return sum(kept.values())


# ------------------------------------------------------------------------------------------------- Lightning


class Plain(L.LightningModule):
    """A user's LightningModule, which knows nothing of Scion."""

    def __init__(self, backbone: nn.Module, lr: float = 1e-2) -> None:
        super().__init__()
        self.backbone = backbone
        with seeded(0):
            self.head = nn.Linear(WIDTH, CLASSES)
        self.lr = lr
        self.make: Callable[[], torch.optim.Optimizer] | None = None  # in place of AdamW
        self.losses: list[float] = []

    def training_step(self, samples: tuple[Tensor, Tensor], index: int) -> Tensor:
        inputs, labels = samples
        loss = F.cross_entropy(self.head(narrowed(self.backbone(inputs))).float(), labels)
        self.losses.append(loss.item())
        return loss

    def test_step(self, samples: tuple[Tensor, Tensor], index: int) -> None:
        self.log("test_loss", F.cross_entropy(self.head(narrowed(self.backbone(samples[0]))).float(), samples[1]))

    def configure_optimizers(self) -> Any:
        optimizer = self.make() if self.make else torch.optim.AdamW(
            [p for p in self.parameters() if p.requires_grad], self.lr)
        return [optimizer], [torch.optim.lr_scheduler.StepLR(optimizer, 1, gamma=0.5)]


def loader(family: str, size: int = 12, batch_size: int = 2, shuffle: bool = True) -> EpochLoader:
    """``size`` samples with labels, in the order of (seed, epoch)."""
    generator = torch.Generator().manual_seed(0)
    labels = torch.randint(CLASSES, (size,), generator=generator)
    samples = torch.utils.data.TensorDataset(batch(family, size), labels)
    return EpochLoader(samples, batch_size=batch_size, sampler=EpochSampler(size, shuffle, seed=0),
                       generator=torch.Generator().manual_seed(0))


def trainer(folder: Any, *callbacks: Any, **settings: Any) -> L.Trainer:
    """A quiet Trainer on the CPU that writes only where it is told."""
    defaults: dict[str, Any] = {"accelerator": "cpu", "devices": 1, "logger": False, "enable_progress_bar": False,
                                "enable_model_summary": False, "enable_checkpointing": False, "max_epochs": -1}
    return L.Trainer(callbacks=list(callbacks), default_root_dir=folder, **{**defaults, **settings})
