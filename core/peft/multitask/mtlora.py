"""MTLoRA: one trunk for several dense tasks, shared and task-specific low-rank changes (Agiza et al. 2024,
arXiv:2403.20320)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn

from core.anatomy import Anatomy, Block, Site, renamed
from core.errors import ScionError
from core.graft import Graft
from core.method import PEFTMethod, key_of
from core.method.options import at_least, probability
from core.peft.weights.lora import LoRAGraft

SPLIT = ("o", "cross.o")
"""Where the tasks' streams leave the shared one, on which alone attention runs."""
OWN = (*SPLIT, "mlp.up", "mlp.gate", "mlp.down")
"""Linear maps of a stage's last block in which each task has a low-rank change of its own."""
TRAINED = ("norm1", "cross.norm", "norm2", "norm", "patch_embed", "position_bias", "downsample")


Mode = Literal["matrix", "matrixv2"]


class Stage(nn.Module):
    """What the grafts of one stage share: its tasks, and what the last forward gave them.

    From the input of its last block on, the batch has 1 + T times its rows: the shared stream's, then each task's.
    """

    def __init__(self, tasks: Sequence[str]) -> None:
        super().__init__()
        self.names = ("shared", *tasks)
        self.grafts: list[Graft] = []
        self.streams: dict[str, Tensor] = {}

    @property
    def flows(self) -> bool:
        """Whether all that it takes is switched on; if not, the tasks have the shared stream."""
        return all(graft.active for graft in self.grafts)

    def shared(self, x: Tensor) -> Tensor:
        """The rows of the shared stream."""
        return x[: len(x) // len(self.names)]

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "streams": {}}  # of a forward, not of the model


class StageGraft(Graft):
    """A graft of a stage's last block, or behind it."""

    folds = True

    def __init__(self, site: Site, stage: Stage) -> None:
        super().__init__(site)
        self.stage = stage
        stage.grafts.append(self)


class Fold(StageGraft):
    """At the block's input all streams are the shared one."""

    def before(self, x: Tensor) -> Tensor:
        self.stage.streams = {}
        return torch.cat([x] * len(self.stage.names)) if self.stage.flows else x


class Share(StageGraft):
    """Attention, and the norm before it, see the shared stream alone."""

    def before(self, x: Tensor) -> Tensor:
        return self.stage.shared(x) if self.stage.flows else x


class Publish(StageGraft):
    """Behind the stage the streams are handed out, and the shared one goes on."""

    def after(self, x: Tensor, y: Tensor) -> Tensor:
        names = self.stage.names
        parts = y.chunk(len(names)) if self.stage.flows else [y] * len(names)
        self.stage.streams = {name: part.movedim(self.site.channel_axis, -1).flatten(1, -2)
                              for name, part in zip(names, parts, strict=True)}
        return self.stage.shared(y) if self.stage.flows else y


class FoldAndPublish(Fold, Publish):
    """Both, where nothing stands between the stage's last block and its output."""


class LowRank(nn.Module):
    """B A x, with A [rank, in] Kaiming-uniform (a = sqrt 5) and B [out, rank] zeros."""

    def __init__(self, site: Site, rank: int) -> None:
        super().__init__()
        self.A = nn.Parameter(torch.empty(rank, site.in_features))
        self.B = nn.Parameter(torch.zeros(site.out_features, rank))
        nn.init.kaiming_uniform_(self.A, a=math.sqrt(5))

    def forward(self, site: Site, x: Tensor, scale: float) -> Tensor:
        return site.low_rank(x.to(self.A.dtype), self.A, self.B, scale)


class TaskGraft(StageGraft):
    """y = W x + b + s B A dropout(x) for the shared stream, y_t = W x + b + s B_t A_t x_t for each task, to which
    ``matrixv2`` adds s B A dropout(x)."""

    def __init__(self, site: Site, stage: Stage, rank: int, task_rank: int, scale: float, dropout: float, mode: Mode
                 ) -> None:
        super().__init__(site, stage)
        self.mode = mode
        self.all = LowRank(site, rank) if rank else None
        self.tasks = nn.ModuleDict({key_of(task): LowRank(site, task_rank) for task in stage.names[1:]})
        self.scale, self.dropout = scale, nn.Dropout(dropout)

    def before(self, x: Tensor) -> Tensor:
        if self.site.role in SPLIT or not self.stage.flows:
            return x
        shared: Any = self.stage.shared(x)
        shared.streams = x  # `after` meets this very tensor: nothing is left behind if it is never called
        return shared

    def after(self, x: Tensor, y: Tensor) -> Tensor:
        scale, dropped = self.strength * self.scale, self.dropout(x)
        out = y if self.all is None else y + self.all(self.site, dropped, scale).to(y.dtype)
        if not self.stage.flows:
            return out
        streams = [dropped] * len(self.tasks)
        if self.site.role not in SPLIT:
            _, *streams = x.streams.chunk(len(self.stage.names))  # type: ignore[attr-defined]
        common = y if self.mode == "matrix" else out
        tasks = [common + task(self.site, x_t, scale).to(y.dtype)
                 for task, x_t in zip(self.tasks.values(), streams, strict=True)]
        return torch.cat([out, *tasks])


class MTLoRA(PEFTMethod):
    """Low-rank changes that all tasks share, and in the last block of each stage some of each task's own, which give
    every task a feature of its own for the price of one trunk.

    Equation: y = W x + b + s B A dropout(x) in all blocks; in a stage's last one, behind attention, also
        y_t = W x + b + s B_t A_t x_t for each task t, W on the shared x alone; x_t is the task's stream, which starts
        at o as the shared one. The streams pass the downsampling behind the stage and end; the next stage starts from
        the shared stream. A Kaiming-uniform (a = sqrt 5), B zeros
    Trains: rank (in + out) a target, task_rank (in + out) a task and map of the last blocks, and base tensors;
        Swin-T, 4 tasks, rank 16: 1,130,496 + 276,480 + 1,599,546; ViT-B/16, one task: 3,023,616
    Merges: no, W x is shared with y_t, which must not have B A
    Source: Agiza et al. 2024, arXiv:2403.20320, section 3, and its released configuration (mode "matrix"); learning
        rate for a batch of 512, which the paper scales with the batch. It trains with drop-path:
        backbone_mode="train". MTLoRA+ is downsample="lora". Without a trunk's final norm, which theirs has not. Left
        out: tasks' parts in every block, whose streams would need an attention of their own, and the mode "addition"

    ``streams`` has the tasks' features of the last forward. The model's own output is the shared stream's: only a loss
    on ``streams`` trains the tasks' parts, and only one on that output the shared change of the last mlp.down, which
    the paper counts though its losses never reach it.

    Args:
        tasks: names of the tasks.
        rank: rank of the shared changes, at least 1.
        task_rank: rank of each task's changes, at least 1.
        scale: factor s of all changes, not divided by the rank.
        dropout: probability of dropping an input of the shared A, in [0, 1).
        targets: roles with a shared change; None is every linear map of the blocks.
        train: roles of the backbone's own tensors that are trained; None is all norms but the final one, the patch
            embedding, the attention's position tables and the downsampling; with ``layers``, those inside them.
        downsample: ``train`` trains the maps between the stages, where there are any; ``lora`` gives them a shared
            change instead.
        mode: ``matrix``, or ``matrixv2``: y_t has the shared change s B A x too.
    """

    tags = ("unified", ("linear", "norms", "composition"))
    moves_base = True
    needs = ("o", "mlp.up")
    inference_cost = "each task's stream runs through its low-rank maps in the last block of every stage"
    recommended = {"lr": 5e-4, "weight_decay": 0.05}

    def __init__(self, tasks: Sequence[str] = ("task",), rank: int = 16, task_rank: int = 4, scale: float = 4.0,
                 dropout: float = 0.05, targets: Sequence[str] | None = None, train: Sequence[str] | None = None,
                 downsample: Literal["train", "lora"] = "train", mode: Mode = "matrix", **common: Any) -> None:
        super().__init__(**common)
        names = tuple(tasks)
        if isinstance(tasks, str) or not names or len({"shared", *names}) != len(names) + 1 or not all(names):
            raise ScionError(f"MTLoRA: tasks {tasks!r} must be a list of different names, none of them 'shared'")
        at_least(1, "MTLoRA", rank=rank, task_rank=task_rank)
        if scale == 0:
            raise ScionError(f"MTLoRA: scale {scale} must not be zero")
        probability("MTLoRA", dropout=dropout)
        if downsample not in ("train", "lora"):
            raise ScionError(f"MTLoRA: downsample {downsample!r} is not 'train' or 'lora'")
        if mode not in ("matrix", "matrixv2"):
            raise ScionError(f"MTLoRA: mode {mode!r} is not 'matrix' or 'matrixv2'")
        self.form: Mode = mode
        self.tasks, self.rank, self.task_rank, self.scale, self.dropout = names, rank, task_rank, scale, dropout
        self.targets, self.downsample = None if targets is None else tuple(targets), downsample
        self.roles = None if train is None else tuple(train)
        self.stages: dict[int | None, Stage] = {}

    @property
    def streams(self) -> list[dict[str, Tensor]]:
        """Of the last forward, for each stage: ``"shared"`` and each task's name -> feature [batch, tokens, channels].
        Behind an image stage, tokens are its map's rows, one after the other."""
        return [stage.streams for stage in self.stages.values()]

    # --------------------------------------------------------------------------------- where

    def ends(self, anatomy: Anatomy) -> list[tuple[Block, Site | None]]:
        """The last block of each stage in ``layers``, with the downsampling behind it."""
        keep = anatomy.layer_indices(self.layers, self.name)
        between: list[Site | None] = [*anatomy.stem.get("downsample", ())]
        if len(between) != len(anatomy.stages) - 1:
            between = [None] * len(anatomy.stages)
        found = zip((stage[-1] for stage in anatomy.stages), [*between, None], strict=False)
        return [(block, site) for block, site in found if block.index in keep]

    def adapted(self, anatomy: Anatomy) -> list[Site]:
        """Sites with a shared change."""
        roles = dict.fromkeys(anatomy.linear_roles() if self.targets is None else self.targets)
        if self.downsample == "lora" and "downsample" in anatomy.roles:
            roles["downsample"] = None
        return anatomy.sites(roles, self.layers, self.name)

    def shares(self, block: Block) -> tuple[str, str]:
        """What sees the shared stream alone in a block."""
        return ("norm1", "cross.norm") if block.pre_norm else ("attend", "cross.attend")

    def sites(self, anatomy: Anatomy) -> list[Site]:
        found = self.adapted(anatomy)
        for block, between in self.ends(anatomy):
            found += [block.sites[role] for role in ("block", *self.shares(block), *OWN) if role in block.sites]
            if between is not None:
                found.append(renamed(between, name=f"{between.name}.streams"))
        return list({site.name: site for site in found}.values())

    def check(self, anatomy: Anatomy) -> None:
        for site in self.adapted(anatomy):
            if site.kind == "module":
                raise ScionError(f"{self.name}: {site.name} ({type(site.module).__name__}) has no linear weight")
        ends = self.ends(anatomy)
        if not ends:
            raise ScionError(f"{self.name}: layers={self.layers} has no stage's last block, where each task has its "
                             f"part: take one of {[stage[-1].index for stage in anatomy.stages]}")
        for block, _ in ends:
            if block.described.repeats > 1 or "norm2" not in block.sites:
                why = "runs several times" if block.described.repeats > 1 else "has its attention beside its MLP"
                raise ScionError(f"{self.name}: block {block.index} of {anatomy.family} {why}, so that streams would "
                                 "part and meet again")
            if not block.pre_norm and "attend" not in block.sites:
                raise ScionError(f"{self.name}: {anatomy.family} does not have the role 'attend', where the streams "
                                 "could be parted (where attention is torch's, build the model with sdpa attention)")
            for role in OWN:
                if role in block.sites and block.sites[role].rows is not None:
                    raise ScionError(f"{self.name}: {block.index}.{role} is part of a fused map, whose rows the "
                                     "streams cannot share")

    def base_parameters(self, anatomy: Anatomy) -> list[str]:
        roles = self.roles
        if roles is None:
            roles = [role for role in TRAINED if role in anatomy.roles
                     and (role != "downsample" or self.downsample == "train")]
        final = anatomy.stem.get("final_norm", []) if self.roles is None else []
        left_out = {name for site in final for name in site.parameter_names}
        sites = anatomy.sites(roles, self.layers, self.name) if roles else []
        return [name for site in sites if self.layers is None or site.block is not None
                for name in site.parameter_names if name not in left_out]

    # --------------------------------------------------------------------------------- what

    def shared(self, module: nn.Module, sites: list[Site]) -> None:
        ends = [site.block for site in sites if site.role == "block"]
        exits = [site.name for site in sites if site.name.endswith(".streams")]
        self.stages = {end: Stage(self.tasks) for end in ends}
        self.exits = dict(zip(exits, self.stages.values(), strict=False))

    def build(self, site: Site) -> Graft:
        if site.name in self.exits:
            return Publish(site, self.exits[site.name])
        stage = self.stages.get(site.block)
        if stage is not None and site.role in OWN:
            rank = self.rank if self.targets is None or site.role in self.targets else 0
            return TaskGraft(site, stage, rank, self.task_rank, self.scale, self.dropout, self.form)
        if stage is None or site.kind != "module":
            return LoRAGraft(site, self.rank, self.scale, self.dropout)
        if site.role == "block":
            return (Fold if stage in self.exits.values() else FoldAndPublish)(site, stage)
        return Share(site, stage)

    def may_lack_gradient(self) -> set[str]:
        """The tasks' own parts where a loss is on the model's output, which depends on the shared stream alone; and the
        last shared change where it is on the tasks' streams, of which none passes it."""
        ends = [graft for graft in self.grafts if isinstance(graft, TaskGraft)]
        parts: list[nn.Module | None] = [graft.tasks for graft in ends]
        parts += [graft.all for graft in ends if graft.site.role == "mlp.down"][-1:]
        found = {id(tensor) for part in parts if part is not None for tensor in part.parameters()}
        return {name for name, tensor in self.trainable().items() if id(tensor) in found}
