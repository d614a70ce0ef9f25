"""Two methods that share a sequence, each for its own part of it."""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from core.anatomy import Anatomy, Site
from core.compose.joined import Joined, JoinedMethods
from core.errors import ScionError, nearest
from core.graft import Graft


class SplitGraft(Joined):
    """The first graft's output at positions below the sample's boundary, the second's from there on."""

    spans_tokens = True
    sample_attributes = ("start",)
    momentary = (*Graft.momentary, "start")
    start: int | Tensor | None = None
    """First position of the second graft: one for all samples, or [batch]."""

    def before(self, x: Tensor) -> Tensor:
        first, second = (part(x, verb="before") for part in self.parts)
        return self._split(first, second)

    def after(self, x: Tensor, y: Tensor) -> Tensor:
        first, second = (part(x, y, verb="after") for part in self.parts)
        return self._split(first, second)

    def _split(self, first: Tensor, second: Tensor) -> Tensor:
        start, name = self.start, self.site.name
        if start is None:
            raise ScionError("Split: nothing says where the sequence is split: give by=..., or run within at(...)")
        if first.dim() != 3:
            raise ScionError(f"Split: {name} has states of shape {list(first.shape)}, not [batch, positions, channels]")
        if isinstance(start, Tensor):
            if self.batch is not None:
                start = start[self.batch]
            # a block may see more rows than samples, as where windows of one sample lie side by side in the batch
            times, rest = divmod(len(first), max(1, len(start)))
            if rest:
                raise ScionError(f"Split: {len(start)} samples are split, but {len(first)} rows arrive at {name}")
            start = start.repeat_interleave(times)[:, None, None]  # [rows, 1, 1]
        positions = torch.arange(first.shape[1], device=first.device)[:, None]  # [positions, 1]
        return torch.where(positions < start, first, second)


class Boundary(Graft):
    """Reads from the model's inputs where each sample's second part begins, and leaves them as they are."""

    def __init__(self, site: Site, by: str, separator: int | None, splits: Sequence[SplitGraft]) -> None:
        super().__init__(site)
        self.by = by
        self.separator = separator
        self.splits = list(splits)
        self.wanted, self.position = read_by(site, by)

    def notice(self, args: tuple, kwargs: dict[str, Any]) -> None:
        ids = args[self.position] if self.position < len(args) else kwargs.get(self.wanted)
        if ids is None:
            raise ScionError(f"Split: by={self.by!r} reads the model's {self.wanted}, which were not given")
        if self.by == "token_type":
            second = ids == 1
        else:  # what follows the first separator, or the first run of them
            separators = ids == self.separator
            second = (separators.cumsum(-1) > 0) & ~separators
        # the positions before the first one of the second part; all where there is none
        start = (second.cumsum(-1) == 0).sum(-1)
        for graft in self.splits:
            graft.start = start


def read_by(site: Site, by: str) -> tuple[str, int]:
    """Name and place of the model's argument that says where to split; "" where it has none."""
    names = list(inspect.signature(site.module.forward).parameters)
    wanted = "token_type_ids" if by == "token_type" else "input_ids"
    if wanted not in names:
        return "", 0
    return wanted, names.index(wanted)


class Split(JoinedMethods):
    """Two methods that share a sequence: the first for its beginning, the second for the rest (query and document).

    Equation: h_t is method 1's for positions t < s, and method 2's for t >= s, at each of their sites
    Trains: the sum of its methods
    Merges: no, positions have weights of their own
    Source: Litschko et al. 2022, COLING (modular rerankers), where s is the first token of type 1. It belongs to whole
        sequences: a decoder with a cache sees single positions

    Args:
        methods: two, each with a name of its own, that stand at the same sites.
        by: the position s; or ``token_type``, the first token of type 1; or ``separator``, what follows the first
            separator or run of separators; None leaves it to ``at``.
        separator: the separator's id.
    """

    tags = ("unified", ("composition",))
    inference_cost = "both methods compute all positions"
    refusal = "cannot be split by positions; what changes states in the blocks or at the embedding can"

    def __init__(self, methods: Sequence[Any], by: int | str | None = None, separator: int | None = None, **common: Any
                 ) -> None:
        super().__init__(methods, **common)
        if len(self.methods) != 2:
            raise ScionError(f"Split: two methods share a sequence, got {len(self.methods)}")
        if not _is_boundary(by):
            raise ScionError(f"Split: by {by!r} is no position, nor 'token_type' or 'separator'"
                             f"{nearest(str(by), ('token_type', 'separator'))}")
        if (by == "separator") != (separator is not None):
            raise ScionError(f"Split: by='separator' and separator=<its id> go together, got by={by!r} and "
                             f"separator={separator}")
        self.by = by
        self.separator = separator

    def check(self, anatomy: Anatomy) -> None:
        super().check(anatomy)
        if isinstance(self.by, str) and not read_by(anatomy.inputs, self.by)[0]:
            raise ScionError(f"{self.name}: no input of {anatomy.family} says where to split by {self.by!r}")

    def fits(self, part: Graft) -> bool:
        return part.site.block is not None or part.site.role == "embed"

    def join(self, site: Site, parts: list[Graft]) -> Joined:
        graft = SplitGraft(site, parts)
        graft.start = self.by if isinstance(self.by, int) else None
        return graft

    def arrange(self, module: nn.Module, anatomy: Anatomy) -> None:
        super().arrange(module, anatomy)
        if isinstance(self.by, str):
            splits = [graft for graft in self.standing(module) if isinstance(graft, SplitGraft)]
            module.boundary = Boundary(anatomy.inputs, self.by, self.separator, splits)

    @contextlib.contextmanager
    def at(self, positions: int | Tensor | Sequence[int]) -> Iterator[None]:
        """Within this context sample i is split at ``positions[i]``, or all at one position."""
        self.need_root()
        start = self._starts(positions)
        splits = [graft for graft in self.grafts if isinstance(graft, SplitGraft)]
        readers = [graft for graft in self.grafts if isinstance(graft, Boundary)]
        starts_before = [graft.start for graft in splits]
        active_before = [graft.active for graft in readers]
        try:
            for graft in splits:
                graft.start = start
            for graft in readers:  # which would set it anew in every forward
                graft.active = False
            yield
        finally:
            for graft, before in zip(splits, starts_before, strict=True):
                graft.start = before
            for graft, active in zip(readers, active_before, strict=True):
                graft.active = active

    def _starts(self, positions: int | Tensor | Sequence[int]) -> int | Tensor:
        """Where the second part begins: one position, or [batch] on the model's device."""
        start: int | Tensor
        if isinstance(positions, int):
            start = positions
        else:
            device = next(self.module.parameters()).device
            start = torch.as_tensor(positions, device=device).long()
        has_wrong_shape = isinstance(start, Tensor) and start.dim() != 1
        if has_wrong_shape or bool((torch.as_tensor(start) < 0).any()):
            raise ScionError(f"{self.name}: positions are one index a sample, from 0")
        return start


def _is_boundary(by: Any) -> bool:
    """Whether ``Split`` can be split by this."""
    if by is None or by in ("token_type", "separator"):
        return True
    return isinstance(by, int) and not isinstance(by, bool) and by >= 0
