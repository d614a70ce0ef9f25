"""`FineTuner`, the LightningModule that hosts a backbone, a task and any methods; and the settings of its optimizer."""

from __future__ import annotations

import importlib
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Literal

import lightning.pytorch as L
import torch
from torch import Tensor, nn

from core.adapters.load import (
    Saved,
    attach,
    keep_only_owned,
    load_tensors,
    open_adapter,
    refusal,
    restore,
    split_checkpoint,
)
from core.adapters.rehearsal import SMALL, hollow, largest, reach, rehearsing
from core.anatomy import dissect
from core.backbone import Backbone
from core.config.schema import Optimizer, Schedule
from core.config.schema import check as check_shape
from core.data import EpochLoader, Share, seed_of
from core.errors import ScionError, listed, nearest, one_line
from core.graft import Graft, checkpoint_activations
from core.method import PEFTMethod, home_in, key_of, methods_on, sample_name
from core.method.beside import OUTSIDE
from core.optim import Together, steps_of
from core.random_state import part_random_states
from core.record import check_arguments, is_finite, plain, signature
from core.tasks.base import STAGES, Task
from core.tensors import check_fit, check_values
from core.training import exact_resume
from core.training.finite import Losses, broken_rows, check_trained
from core.training.tally import LossSum, compute, joint, load_metric_states, mean_loss, metric_states


@dataclass
class OptimizerSettings:
    """The optimizer, by its name in ``torch.optim``.

    Args:
        name: ``AdamW``, ``SGD``, ...
        lr: learning rate; ``auto`` takes the recommended one of each method.
        weight_decay: on tensors with two axes or more; ``auto`` takes the recommended one of each method.
        options: further arguments of the optimizer (``betas``, ``eps``, ``momentum``).
    """

    name: str = "AdamW"
    lr: float | Literal["auto"] = "auto"
    weight_decay: float | Literal["auto"] = "auto"
    options: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        check_shape(asdict(self), Optimizer, "optimizer")
        if not is_finite(asdict(self)):
            raise ScionError("optimizer: a number that is not finite")


@dataclass
class ScheduleSettings:
    """The learning rate over the run, step by step.

    Args:
        name: ``cosine`` or ``linear`` (down to ``final``), or ``constant``.
        warmup: share of all steps (below 1), or their number, of linear warm-up.
        final: the last learning rate as a share of the first.
    """

    name: Literal["cosine", "linear", "constant"] = "cosine"
    warmup: float = 0.0
    final: float = 0.0

    def __post_init__(self) -> None:
        check_shape(asdict(self), Schedule, "lr_scheduler")
        if not is_finite(asdict(self)):
            raise ScionError("lr_scheduler: a number that is not finite")

    def factor(self, step: int, total: int) -> float:
        """What the learning rate is multiplied by at ``step`` of ``total``."""
        warmup = steps_of(self.warmup, total)
        if step < warmup:
            return (step + 1) / (warmup + 1)
        if self.name == "constant":
            return 1.0
        done = min(1.0, (step - warmup) / max(1.0, total - warmup))
        falling = (1 + math.cos(math.pi * done)) / 2 if self.name == "cosine" else 1 - done
        return self.final + (1 - self.final) * falling


class FineTuner(L.LightningModule):
    """A backbone, a task on its features, and whatever methods are attached to the backbone.

    Methods arrive as callbacks of the Trainer, or are attached by hand before training. ``load_from_checkpoint``
    rebuilds them from the checkpoint, without a Trainer.

    Args:
        backbone: a `Backbone` (or what a checkpoint recorded of one).
        task: a `Task`, built for the data's classes, or to be built from ``classes``.
        classes: names of the classes, where the task is not built yet.
        multilabel: whether a sample may have several labels.
        optimizer: settings of the optimizer.
        schedule: settings of the learning rate's schedule.
        checkpointing: recompute activations in backward instead of keeping them.
        seed: random state in which a recorded backbone and task are built (one with random weights is then the same).
    """

    def __init__(self, backbone: Backbone | dict[str, Any], task: Task | dict[str, Any],
                 classes: Sequence[str] = (), multilabel: bool = False,
                 optimizer: OptimizerSettings | dict[str, Any] | None = None,
                 schedule: ScheduleSettings | dict[str, Any] | None = None, checkpointing: bool = False,
                 seed: int = 0) -> None:
        super().__init__()
        self.backbone: Backbone = build(backbone, seed, Backbone) if isinstance(backbone, dict) else backbone
        self.task: Task = build(task, seed, Task) if isinstance(task, dict) else task
        self.head_dim: int | None = None
        """Width of the features that the head reads; None where the task came with its head."""
        if not hasattr(self.task, "head"):
            if not classes:
                raise ScionError("FineTuner: the task is not built; give classes=[...]")
            self.head_dim = self.backbone.dim
            self.task.build(self.head_dim, classes, multilabel)
        self.optimizer = (optimizer if isinstance(optimizer, OptimizerSettings)
                          else OptimizerSettings(**(optimizer or {})))
        self.schedule = schedule if isinstance(schedule, ScheduleSettings) else ScheduleSettings(**(schedule or {}))
        self.aside = nn.ModuleDict()
        """What methods put beside the model for training alone, by their names (`PEFTMethod.beside`)."""
        self.sums = {stage: LossSum() for stage in STAGES}
        """The main loss of the present epoch so far, by stage."""
        self.penalties = {stage: LossSum() for stage in STAGES}
        """What methods added to it (`PEFTMethod.loss_terms`)."""
        self.share = 1.0
        """What this process's loss of the present batch is multiplied by (`core.data.Share.weight`)."""
        self.tables: dict[str, Tensor] = {}
        """Metrics that are no single number (a confusion matrix), as last computed."""
        self._broken: dict[str, str] = {}  # stage -> what was first found not finite in validation or test
        self._resume: dict[str, Any] | None = None
        self.checkpointing = checkpointing
        if checkpointing:
            checkpoint_activations(self.backbone)
        keep_only_owned(self)
        specs = {"backbone": spec(self.backbone), "task": spec(self.task)}
        rest = {"classes": list(classes), "multilabel": multilabel, "optimizer": plain(asdict(self.optimizer)),
                "schedule": plain(asdict(self.schedule)), "checkpointing": checkpointing, "seed": seed}
        self.save_hyperparameters({**{k: v for k, v in specs.items() if v}, **rest}, logger=False)

    @property
    def methods(self) -> list[PEFTMethod]:
        """The methods attached to the backbone."""
        return methods_on(self)

    def forward(self, inputs: Tensor) -> Tensor:
        """inputs -> the task's outputs"""
        features = self.backbone(inputs)
        if self.head_dim is not None and features.shape[-1] != self.head_dim:
            raise ScionError(f"the head reads {self.head_dim} features, the backbone with its methods gives "
                             f"{features.shape[-1]}: call fit_head() once the methods are attached")
        return self.task(features)

    @property
    def feature_dim(self) -> int:
        """Width of the backbone's feature with the methods that are attached to it."""
        dim = self.backbone.dim
        if any(type(method).feature_dim is not PEFTMethod.feature_dim for method in self.methods):
            anatomy = dissect(self.backbone)
            for method in self.methods:
                dim = method.feature_dim(dim, anatomy)
        return dim

    def fit_head(self) -> None:
        """Build the head anew where the attached methods give a feature of another width than it reads. A Trainer and
        all that loads a model do so by themselves; the global random state stays as it is."""
        dim = self.feature_dim
        if self.head_dim in (None, dim):
            return
        parameter = next(self.task.parameters())
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed_of(self.hparams["seed"], "head", dim))
            self.task.build(dim, self.hparams["classes"], self.hparams["multilabel"])
        self.task.to(parameter.device, parameter.dtype).train(self.training)
        self.head_dim = dim

    def setup(self, stage: str) -> None:
        """Callbacks have attached their methods by now; neither a checkpoint is loaded nor an optimizer made yet."""
        trainer = getattr(self, "_trainer", None)
        if self.task.compares and trainer is not None and trainer.world_size > 1:
            raise ScionError(f"trainer.devices: {trainer.world_size} processes; samples are compared with all "
                             "others in one process, so 1 is wanted for this task")
        self.fit_head()
        if stage == "fit":
            self._resume = None
            self.fit_aside()
        if trainer is not None:
            exact_resume.convert_early(trainer, self)

    def fit_aside(self) -> None:
        """Make what the attached methods want beside the model for training, where it is not there yet."""
        for method in self.methods:
            key = key_of(method.name)
            module = method.beside(self) if method.is_trained and key not in self.aside else None
            if module is not None and len(self.aside):
                raise ScionError(f"{method.name}: {listed(self.aside)} stands beside the model already, and one method "
                                 "alone can give the loss in the task's place")
            if module is not None:
                self.aside[key] = module.to(self.device).train(self.training)

    def beside_inference(self) -> list[nn.Parameter]:
        """Parameters that inference does not need: the task's, and what stands beside the model."""
        own = [p for name, p in self.task.named_parameters() if name.partition(".")[0] in self.task.training_only]
        return [*own, *self.aside.parameters()]

    def tensors_beside(self) -> dict[str, Tensor]:
        """What stands beside the backbone, as an adapter holds it (`core.method.beside`)."""
        return outside(self)

    def load_beside(self, tensors: dict[str, Tensor], where: str, write: bool = True) -> None:
        """Copy what stood beside the backbone into it (`core.method.beside`)."""
        self.fit_head()
        load_outside(self, tensors, where, write)

    def loss(self, batch: Any) -> Tensor:
        """The task's loss of a batch plus what the methods add to it; logs nothing."""
        return self._losses(batch)[1]

    def _losses(self, batch: Any, training: bool = False) -> tuple[Tensor, Tensor]:
        """Outputs and loss."""
        losses = self._parts(batch, training)
        return losses.outputs, losses.total

    def _parts(self, batch: Any, training: bool = False) -> Losses:
        inputs, targets = batch
        outputs = self(inputs)
        terms = [(method.name, method.loss_terms(self, batch, outputs)) for method in self.methods]  # of this pass
        own = ((method.name, method.training_loss(self, batch, outputs)) for method in self.methods
               if training and method.is_trained)
        source, main = next((found for found in own if found[1] is not None), ("the task", None))
        main = self.task.loss(outputs, targets) if main is None else main
        return Losses(outputs, source, main, [(name, term) for name, term in terms if term is not None])

    def training_step(self, batch: Any, index: int) -> Tensor | None:
        share = self._share("train", batch, index)
        self.share = share.weight
        losses = self._parts(batch, training=True)
        self._stop_unless_finite(losses, batch, index)
        self._count("train", losses, batch[1], share)
        return losses.total if share.weight == 1 else losses.total * share.weight

    def validation_step(self, batch: Any, index: int) -> None:
        self._evaluate("validation", batch, index)

    def test_step(self, batch: Any, index: int) -> None:
        self._evaluate("test", batch, index)

    def _evaluate(self, stage: str, batch: Any, index: int) -> None:
        share = self._share(stage, batch, index)
        if not share.own:
            return
        if self.task.compares:
            outputs = self(batch[0]).detach()
            self.task.collection(stage).update(outputs, batch[1])
            losses = Losses(outputs, "the task", outputs.float().sum(), [])
        else:
            losses = self._parts(batch)
            self._count(stage, losses, batch[1], share)
        if stage not in self._broken and not bool(torch.isfinite(losses.total)):
            self._broken[stage] = self._not_finite(losses, stage, batch, index)

    # --------------------------------------------------------------------------------- what an epoch adds up

    def _share(self, stage: str, batch: Any, index: int) -> Share:
        """How much of the joint batch is this process's."""
        loader = self._loader(stage)
        if loader is None or loader.epoch_sampler is None or loader.epoch_sampler.processes()[1] == 1:
            return Share(len(batch[1]), len(batch[1]), 1)
        return loader.epoch_sampler.share(index)

    def _loader(self, stage: str) -> EpochLoader | None:
        names = {"train": "train_dataloader", "validation": "val_dataloaders", "test": "test_dataloaders"}
        loader = getattr(self._trainer, names[stage], None)
        return loader if isinstance(loader, EpochLoader) else None

    def _count(self, stage: str, losses: Losses, targets: Tensor, share: Share) -> None:
        """Take a batch into the epoch's loss and metrics, if its samples are this process's."""
        if not share.own:
            return
        hard = targets
        if targets.is_floating_point():  # class weights, of mixup for one, or the zeros and ones of several labels
            hard = (targets >= 0.5).int() if self.task.multilabel else targets.argmax(-1)
        self.task.collection(stage).update(self.task.scores(losses.outputs.detach()), hard)
        self.sums[stage].add(losses.main, len(targets))
        if losses.terms:
            self.penalties[stage].add(losses.total.detach() - losses.main.detach(), len(targets))

    def _begin_epoch(self, stage: str) -> None:
        self.sums[stage].reset()
        self.penalties[stage].reset()
        self.task.collection(stage).reset()
        self._broken.pop(stage, None)

    def _epoch_state(self, stage: str) -> dict[str, Any]:
        """What this process has added up so far in an epoch."""
        return {"loss": self.sums[stage].state(), "penalty": self.penalties[stage].state(),
                "metrics": metric_states(self.task.collection(stage))}

    def _log_epoch(self, stage: str) -> None:
        """Log the mean loss and the metrics of an epoch, over all processes; what methods add to the loss stands apart,
        as ``penalty``, so that methods can be compared by the loss."""
        metrics, losses, broken = self.task.collection(stage), [self.sums[stage].state()], [self._broken.get(stage)]
        penalties = [self.penalties[stage].state()]
        if self.trainer.world_size > 1:
            parts = exact_resume.gather({**self._epoch_state(stage), "broken": broken[0]}, self.trainer)
            losses, broken = [part["loss"] for part in parts], [part["broken"] for part in parts]
            penalties = [part["penalty"] for part in parts]
            metrics = joint(metrics, [part["metrics"] for part in parts])
        for told in broken:
            if told is not None:
                raise ScionError(f"{self._when(stage)}: {told}")
        found: dict[str, Tensor] = {}
        if any(loss["samples"] for loss in losses):
            found["loss"] = mean_loss(losses).to(self.device)
        if any(penalty["samples"] for penalty in penalties):
            found["penalty"] = mean_loss(penalties).to(self.device)
        for name, value in {**found, **compute(metrics)}.items():
            if value.dim():
                self.tables[f"{stage}/{name}"] = value.cpu()
                continue
            if not bool(torch.isfinite(value)):
                raise ScionError(f"{self._when(stage)}: {name} is {float(value)}")
            shown = stage == "train" if name == "loss" else name == self.task.selects[0]
            # Lightning wants to hear how numbers of several processes are joined: these are the same in all.
            joined: dict[str, Any] = {"sync_dist": True, "reduce_fx": "max"} if self.trainer.world_size > 1 else {}
            self.log(f"{stage}/{name}", value, prog_bar=shown, **joined)
        self._begin_epoch(stage)

    def on_fit_start(self) -> None:
        self.tables = {}
        exact_resume.keep_open(self.trainer, self._resume)

    def on_test_start(self) -> None:
        self.tables = {}

    def on_train_epoch_start(self) -> None:  # a resumed run that goes on in mid-epoch does not come here
        self._begin_epoch("train")

    def on_validation_epoch_start(self) -> None:
        self._begin_epoch("validation")

    def on_test_epoch_start(self) -> None:
        self._begin_epoch("test")

    def on_train_epoch_end(self) -> None:
        self._log_epoch("train")

    def on_validation_epoch_end(self) -> None:
        self._log_epoch("validation")

    def on_test_epoch_end(self) -> None:
        self._log_epoch("test")

    # --------------------------------------------------------------------------------- what is not finite

    def _when(self, stage: str) -> str:
        """Which stage, for a message, and in training which epoch."""
        what = {"train": "training"}.get(stage, stage)
        return f"{what}, epoch {self.trainer.current_epoch + 1}" if self.trainer.state.fn == "fit" else what

    def _stop_unless_finite(self, losses: Losses, batch: Any, index: int) -> None:
        """Stop at the first loss that is not finite, before it moves a weight; all processes stop together."""
        trainer: L.Trainer = self._trainer  # type: ignore[assignment]
        finite = torch.isfinite(losses.total.detach())
        together = trainer is not None and trainer.world_size > 1
        if together:
            everywhere = finite.float()
            torch.distributed.all_reduce(everywhere, torch.distributed.ReduceOp.MIN)
        else:
            everywhere = finite
        if bool(everywhere):
            return
        told = None if bool(finite) else self._not_finite(losses, "train", batch, index)
        told = next(filter(None, exact_resume.gather(told, trainer) if together else [told]))
        step = f", step {trainer.global_step + 1}" if trainer is not None else ""
        raise ScionError(f"{self._when('train') if trainer is not None else 'training'}{step}: {told}")

    def _not_finite(self, losses: Losses, stage: str, batch: Any, index: int) -> str:
        """Which part of a batch's loss is not finite, and for which samples."""
        inputs, targets = batch
        broken = broken_rows(inputs, len(targets))
        part = "the inputs are not finite"
        if not broken:
            broken = broken_rows(losses.outputs, len(targets))
            part = "the outputs of the head are not finite"
            if broken and broken_rows(self._features(inputs), len(targets)):
                part = "the features of the backbone are not finite"
        if not broken:
            part = losses.culprit()
        names = self._sample_names(stage, index, broken or list(range(len(targets))))
        hint = "look at the samples" if 0 < len(broken) < len(targets) else (
            "a smaller optimizer.lr may help, or a look at the samples")
        return f"{part} ({listed(names, 4)}); {hint}"

    def _features(self, inputs: Any) -> Tensor:
        training = self.training
        with torch.no_grad():
            self.eval()
            features = self.backbone(inputs)
            self.train(training)
        return features

    def _sample_names(self, stage: str, index: int, rows: list[int]) -> list[str]:
        """What the samples in these rows of a batch are called: their files, where the data know them."""
        loader = self._loader(stage)
        places = loader.indices(index) if loader is not None else []
        if loader is None or not places:
            return [f"row {row} of batch {index}" for row in rows]
        return [sample_name(self.trainer, places[row], loader.dataset) for row in rows]

    def on_train_end(self) -> None:
        check_trained(self, "the training came to nothing")

    # --------------------------------------------------------------------------------- resuming

    resumes_exactly: ClassVar[bool] = True
    """It keeps random states and the place in the data itself, so that its methods need not."""

    def on_train_start(self) -> None:
        """All callbacks have begun by now, and methods have seen their data."""
        resume, self._resume = self._resume, None
        if resume is None:
            exact_resume.go_on_with_loops(self.trainer)
            part_random_states(self.global_rank)
            return
        own = exact_resume.restore(self.trainer, resume)
        if "train" in own:
            self.sums["train"].load(own["train"]["loss"])
            if "penalty" in own["train"]:
                self.penalties["train"].load(own["train"]["penalty"])
            load_metric_states(self.task.collection("train"), own["train"]["metrics"])

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        check_trained(self, "no checkpoint is written, and the last one stays")
        if self._trainer is not None and "optimizer_states" in checkpoint:
            exact_resume.save(self.trainer, checkpoint, {"train": self._epoch_state("train")})

    # --------------------------------------------------------------------------------- optimizer

    def param_groups(self) -> list[dict[str, Any]]:
        """Groups for the optimizer: exactly the trained tensors, once each, with learning rates and decay resolved.

        The task head and other tensors that no method owns take the first method's recommendation.
        """
        return [group for _, groups in self._groups() for group in groups]

    def _groups(self) -> list[tuple[PEFTMethod | None, list[dict[str, Any]]]]:
        """Groups by the method that they belong to; those of None are nobody's."""
        methods = [method for method in self.methods if method.is_trained]
        first = methods[0].suggested if methods else PEFTMethod.recommended
        first = {**first, "lr": first.get("head_lr", first["lr"])}
        found: list[tuple[PEFTMethod | None, list[dict[str, Any]]]] = [
            (method, [self._group(group, method.suggested) for group in method.param_groups()]) for method in methods]
        seen = {id(tensor) for _, groups in found for group in groups for tensor in group["params"]}
        rest = {name: p for name, p in self.named_parameters() if p.requires_grad and id(p) not in seen}
        tables = {id(m.weight) for m in self.modules() if isinstance(m, nn.Embedding) and m.sparse}
        loose: dict[tuple[float, bool, bool], list[nn.Parameter]] = {(1.0, False, False): [], (1.0, False, True): []}
        for name, p in rest.items():
            loose.setdefault((self._lr_factor(name), id(p) in tables, p.dim() < 2), []).append(p)
        groups = [{"params": params, "lr_factor": factor, **({"weight_decay": 0.0} if vectors else {}),
                   **({"rows": True} if rows else {})}
                  for (factor, rows, vectors), params in loose.items() if params]
        return [*found, (None, [self._group(group, first) for group in groups])]

    def _lr_factor(self, name: str) -> float:
        return next((factor for start, factor in self.task.lr_factors.items() if name.startswith(f"task.{start}")), 1.0)

    def _group(self, group: dict[str, Any], recommended: dict[str, float]) -> dict[str, Any]:
        lr = recommended["lr"] if self.optimizer.lr == "auto" else self.optimizer.lr
        decay = recommended["weight_decay"] if self.optimizer.weight_decay == "auto" else self.optimizer.weight_decay
        group = dict(group)
        return {"lr": lr * group.pop("lr_factor", 1.0), "weight_decay": decay, **group}

    def configure_optimizers(self) -> Any:
        known = [name for name in dir(torch.optim) if isinstance(getattr(torch.optim, name), type)]
        if self.optimizer.name not in known:
            raise ScionError(f"optimizer.name: torch.optim has no {self.optimizer.name!r}"
                             f"{nearest(self.optimizer.name, known)}")
        options, made, ordinary, tables = self.optimizer.options, [], [], []
        try:
            for method, groups in self._groups():
                own = method.make_optimizer(groups, **options) if method is not None and groups else None
                if own is None:
                    ordinary += [group for group in groups if not group.get("rows")]
                    tables += [group for group in groups if group.get("rows")]
                else:
                    made.append(own)
            if ordinary:
                made.insert(0, getattr(torch.optim, self.optimizer.name)(ordinary, **options))
            if tables:  # embeddings with sparse gradients: Adam for the rows that a batch has read, and no others
                made.append(torch.optim.SparseAdam(tables, **{k: options[k] for k in ("betas", "eps") if k in options}))
        except TypeError as error:
            raise ScionError(f"optimizer.options: {error}") from None
        if tables and self.trainer.gradient_clip_val:
            raise ScionError("trainer.gradient_clip_val: the sparse gradients of what a method keeps for each class "
                             "cannot be clipped; leave it out")
        if not made:
            raise ScionError("nothing to train: every tensor is frozen and there is no head")
        optimizer = made[0] if len(made) == 1 else Together(made)
        total = int(self.trainer.estimated_stepping_batches)
        schedule = self.schedule
        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: schedule.factor(step, total))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    # --------------------------------------------------------------------------------- checkpoints

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Rebuild the methods that the checkpoint holds, where they are not attached yet, and the head for them."""
        if self._trainer is not None and self._trainer.state.fn == "fit":
            self._resume = checkpoint.get("resume")
        if not any("._extra_state" in name for name in checkpoint["state_dict"]):
            return
        is_bare = home_in(self) is None
        record, tensors = split_checkpoint(checkpoint["state_dict"], "the checkpoint", made=not is_bare)
        if is_bare:
            restore(record, tensors, self.backbone, where="the checkpoint")
        else:
            structures = {saved["name"]: saved.get("structure", {}) for saved in record["methods"]}
            for method in self.methods:
                method.restructure(structures.get(method.name, {}))
        self.fit_head()
        if any(name.startswith("aside.") for name in checkpoint["state_dict"]):
            self.fit_aside()


def outside(tuner: FineTuner) -> dict[str, Tensor]:
    """The parameters around the backbone, under the names and in the form that an adapter gives them."""
    found = _around(tuner)
    for name, packing in _packings(tuner).items():
        found |= {f"{name}.{part}": stored for part, stored in packing.pack(found.pop(name)).items()}
    return found


def _around(tuner: FineTuner) -> dict[str, Tensor]:
    inside = {id(p) for p in [*tuner.backbone.parameters(), *tuner.beside_inference()]}
    return {f"{OUTSIDE}{name}": p.detach() for name, p in tuner.named_parameters() if id(p) not in inside}


def _packings(tuner: FineTuner) -> dict[str, Graft]:
    return {f"{OUTSIDE}task.{name}": packing for name, packing in tuner.task.packings().items()}


def load_outside(tuner: FineTuner, tensors: dict[str, Tensor], where: str, write: bool = True) -> None:
    """Copy a saved head into ``tuner``; missing, extra and misshapen tensors, and values that are not finite, are
    refused before any is written."""
    into = outside(tuner)
    given = {name: tensor for name, tensor in tensors.items() if name.startswith(OUTSIDE)}
    if into.keys() != given.keys():
        raise ScionError(f"{where}: the head's tensors are {listed(map(one_line, sorted(given)), 4)}, wanted "
                         f"{listed(sorted(into), 4)}")
    for name, tensor in into.items():
        check_fit(given[name], tensor, name, where)
    if not write:
        return
    for name, tensor in into.items():
        check_values(given[name], tensor, name, where)
    packings = _packings(tuner)
    around = _around(tuner)
    unpacked: dict[str, Tensor] = {}
    for name, packing in packings.items():
        parts = {part.removeprefix(f"{name}."): given[part] for part in given if part.startswith(f"{name}.")}
        unpacked[name] = torch.empty_like(around[name])
        packing.unpack(parts, unpacked[name])
        check_values(unpacked[name], around[name], name, where)
    for name, tensor in around.items():
        tensor.copy_(unpacked[name] if name in unpacked else given[name])


def load_run(folder: str, device: str = "cpu") -> FineTuner:
    """The model of a finished run, from the folder that ``lightning run`` left.

    Nothing is built but what ``core.tasks`` and the installed domains publish, and the methods of the registry.

    Raises:
        ScionError: a damaged adapter, or a backbone that only its own program can build.
    """
    path = Path(folder) / "adapter"
    if not path.is_dir():
        raise ScionError(f"{folder}: no adapter.json in a folder adapter here; give the folder of a run")
    saved = open_adapter(path)
    model = saved.record.get("model") or {}
    if not model.get("backbone") or not model.get("task"):
        raise ScionError(f"{path}: the record does not say how to build backbone and task (they are no domain's); "
                         "build the backbone and use core.load_adapter")
    try:
        _rehearse(saved, str(path))
        tuner = _around_backbone(model, build(model["backbone"], model["seed"], Backbone))
        own = {name: tensor for name, tensor in saved.tensors.items() if not name.startswith(OUTSIDE)}
        restore(saved.record, own, tuner.backbone, where=str(path), check_whole=saved.check_whole)
        _prepare_head(tuner)
        load_outside(tuner, saved.tensors, str(path))
    except Exception as error:
        what = str(refusal(error)).removeprefix(f"{path}: ")
        raise ScionError(f"{path}: {what}") from (None if isinstance(error, ScionError) else error)
    return tuner.to(device).eval()


def _around_backbone(model: dict[str, Any], backbone: Any) -> FineTuner:
    """What a record says of a run's model, around its backbone."""
    task = build(model["task"], model["seed"], Task)
    return FineTuner(backbone, task, model["classes"], model["multilabel"], seed=model["seed"])


def _prepare_head(tuner: FineTuner) -> None:
    """The head as inference has it, for the methods that are attached."""
    tuner.fit_head()
    for name in tuner.task.training_only:  # the file does not hold it, and untrained it means nothing
        setattr(tuner.task, name, None)


def _rehearse(saved: Saved, where: str) -> None:
    """Refuse a run whose backbone would be absurdly large, or whose methods or head have other shapes than the tensors
    of the file, before any of it takes memory (`core.adapters.rehearsal`)."""
    model = saved.record["model"]
    sizes = [largest(model["backbone"]), largest(model["task"]), len(model["classes"]),
             *(reach(spec["config"]) for spec in saved.record["methods"])]
    if max(sizes) <= USUAL:
        return
    with rehearsing(len(saved.tensors) + USUAL):
        backbone = hollow_backbone(model["backbone"], model["seed"])
        tuner = _around_backbone(model, backbone)
        tensors = hollow({name: tensor for name, tensor in saved.tensors.items() if not name.startswith(OUTSIDE)})
        attach(saved.record["methods"], backbone, done := [])
        load_tensors(done, tensors, where, write=False, unfrozen=saved.record.get("unfrozen", ()))
        _prepare_head(tuner)
        load_outside(tuner, hollow(saved.tensors), where, write=False)


USUAL = 2048
"""Sizes up to which nothing that a record describes takes much memory."""
MARGIN = 4
"""How many times as many numbers a backbone may have with its recorded arguments as with its name alone."""


def hollow_backbone(recorded: dict[str, Any], seed: int) -> Backbone:
    """The recorded backbone on the meta device, where it is about as large as its name says."""
    cls = published(recorded, Backbone)
    untrained = {"pretrained": False} if "pretrained" in signature(cls).parameters else {}
    name = {"name": recorded["name"]} if "name" in recorded else {}
    backbone = build({**recorded, **untrained}, seed, Backbone)
    usual = build({"class": recorded["class"], **name, **untrained}, seed, Backbone)
    numbers, limit = (sum(p.numel() for p in one.parameters()) for one in (backbone, usual))
    if numbers > MARGIN * limit + SMALL:
        raise ScionError(f"the backbone would have {numbers:,} numbers with its recorded arguments, and "
                         f"{recorded.get('name', recorded['class'])} has {limit:,}")
    return backbone


# ------------------------------------------------------------------------------------------------- specs


def model_record(tuner: FineTuner) -> dict[str, Any]:
    """How to build the backbone and the task of ``tuner``, as adapters and patches record it."""
    return {"backbone": spec(tuner.backbone), "task": spec(tuner.task),
            "classes": list(getattr(tuner.task, "classes", [])), "multilabel": tuner.hparams["multilabel"],
            "seed": tuner.hparams["seed"]}


def spec(part: nn.Module) -> dict[str, Any] | None:
    """How to build a domain's backbone or a task again: ``{"class": "audio:AST", arguments}``, or None for a class that
    belongs to neither. A name that was ``auto`` is recorded as what it stood for, a path as an absolute one."""
    module = type(part).__module__.split(".")
    home = {"domains": module[1] if len(module) > 1 else "", "core": "core.tasks"}.get(module[0])
    config = getattr(part, "config", None)
    if not home or not isinstance(config, dict):
        return None
    found = {"class": f"{home}:{type(part).__name__}", **plain(config)}
    if isinstance(part, Backbone) and "name" in part.origin:
        name = str(part.origin["name"])
        if part.origin.get("kind") == "local":
            start = 0 if Path(name).expanduser().exists() else name.find("@") + 1  # a path, or ARCHITECTURE@PATH
            name = name[:start] + str(Path(name[start:]).expanduser().absolute())
        found["name"] = name
    return found


def published(recorded: dict[str, Any], base: type) -> type:
    """The class that a record names, ``"audio:AST"`` or ``"core.tasks:Classification"``: one that ``core.tasks`` or an
    installed domain publishes. No other module is imported.

    Raises:
        ScionError: there is no such class, or it is no ``base``.
    """
    home, _, name = one_line(recorded.get("class")).partition(":")
    module = importlib.import_module("core.tasks") if home == "core.tasks" else _domain(home)
    names = list(getattr(module, "__all__", ()))
    if name not in names:
        raise ScionError(f"{home} publishes no class {name!r}{nearest(name, names)}")
    found = getattr(module, name)
    if not (isinstance(found, type) and issubclass(found, base)):
        raise ScionError(f"{home}:{name} is no {base.__name__}")
    return found


def _domain(name: str) -> Any:
    """An installed domain's package."""
    import pkgutil

    try:
        import domains
    except ImportError:
        installed = []
    else:
        installed = [info.name for info in pkgutil.iter_modules(domains.__path__)]
    if name not in installed:
        raise ScionError(f"no domain is called {name!r}{nearest(name, installed)}; installed are "
                         f"{listed(installed) or 'none'}")
    try:
        return importlib.import_module(f"domains.{name}")
    except ImportError as error:
        raise ScionError(f"the domain {name} cannot be imported ({one_line(error)})") from None


def build(recorded: dict[str, Any], seed: int = 0, base: type = nn.Module) -> Any:
    """The part that `spec` described: a class that ``core.tasks`` or a domain publishes, with arguments of the right
    types. Random weights are those of ``seed``; the global random state stays as it is.

    Raises:
        ScionError: no such class, none of this ``base``, or wrong arguments.
    """
    cls = published(recorded, base)
    arguments = {key: value for key, value in recorded.items() if key != "class"}
    check_arguments(cls, arguments, recorded["class"])
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return cls(**arguments)
