"""`PEFTMethod`: what all methods share. A method says where its grafts are and what they are; the rest is here.

A method is a Lightning callback::

    Trainer(callbacks=[LoRA(rank=8)]).fit(module)        # any LightningModule that has .backbone or .model

and works on any ``nn.Module`` with a known anatomy just as well::

    method = LoRA(rank=8).attach(model)
    optimizer = torch.optim.AdamW(method.trainable().values())

What an author writes is in `core.method.definition`, what users do with a method in `core.method.on_model`, and what
only some methods can do in `core.method.abilities`.
"""

from __future__ import annotations

import math
import warnings
import weakref
from typing import TYPE_CHECKING, Any

import torch
from lightning.pytorch import Callback
from lightning.pytorch.core.optimizer import _MockOptimizer
from torch import nn

from core.callbacks.exact_resume import ExactResume
from core.errors import ScionError, listed, nearest
from core.method import membership
from core.method.abilities import AddsLoss, OwnOptimizer, Prepared, Scheduled
from core.method.attached import Home, keep_only_owned
from core.method.former import FormerMembers, adopt
from core.method.other_libraries import watch_loading
from core.method.training_checks import (
    GradientWatch,
    check_averages,
    check_launcher,
    check_model,
    check_optimizers,
    check_place,
    warn_of_recomputing,
)

if TYPE_CHECKING:
    import lightning.pytorch as L


class PEFTMethod(FormerMembers, Callback):
    """Base of all methods: a Trainer's callback that attaches itself, and checks that training reaches it."""

    steps = 0
    """Steps of the optimizer so far, where the method is `Scheduled`."""
    total = 0
    gradient_watch: GradientWatch | None = None
    """Looks for trained tensors that never get a gradient; None where that is in order."""
    _resume: dict[str, Any] | None = None

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        adopt(cls)

    def __getstate__(self) -> dict[str, Any]:
        # Lightning hangs its logging functions, and with them the Trainer, on every callback.
        state = {key: value for key, value in self.__dict__.items() if key not in ("log", "log_dict")}
        return {**state, "lightning_module": None, "membership": membership.Membership()}

    @property
    def state_key(self) -> str:
        return f"{type(self).__name__}:{self.name}"

    # ------------------------------------------------------------------------------- before training

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Graft once, before weights are restored and before the optimizer is made."""
        if self.root is None:
            check_launcher(self, trainer)
            root = self._find_root(pl_module)
            if root is None:
                self._wait_for_configure_model(pl_module)
            else:
                self.attach(root)
        else:
            check_place(self, pl_module)
        self.lightning_module = weakref.ref(pl_module)
        keep_only_owned(pl_module)
        if stage == "fit":
            check_averages(self, trainer, pl_module)
            if not hasattr(pl_module, "methods"):
                self._warn_of_own_module(pl_module)
        if self.attached:
            self._home().keep_float32 = True
        self._resume = None
        if hasattr(trainer, "callbacks"):
            ExactResume.ensure(trainer)

    def teardown(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        if self.attached:
            self._home().keep_float32 = False

    def _home(self) -> Home:
        return self.need_root().peft  # type: ignore[return-value]

    def _warn_of_own_module(self, pl_module: nn.Module) -> None:
        """Say what a LightningModule other than `FineTuner` must do itself."""
        kind = type(pl_module).__name__
        if isinstance(self, OwnOptimizer):
            warnings.warn(f"{self.name} is an optimizer: {kind}.configure_optimizers should return "
                          "method.make_optimizer(method.param_groups()), as core.FineTuner does", stacklevel=3)
        if isinstance(self, Prepared) and self.prepares and not self.prepared:
            warnings.warn(f"{self.name} computes start values from data: call method.prepare(batches, loss) before "
                          "fitting, or use core.FineTuner", stacklevel=3)
        if isinstance(self, AddsLoss) and self.adds_loss:
            warnings.warn(f"{self.name}: {kind} does not add the method's own loss; add "
                          "method.loss_terms(self, batch, outputs) to yours, or use core.FineTuner", stacklevel=3)

    def _find_root(self, pl_module: nn.Module) -> nn.Module | None:
        """The backbone in a LightningModule; None where that is only made in ``configure_model``."""
        if self.on is not None:
            try:
                return pl_module.get_submodule(self.on)
            except AttributeError:
                names = [name for name, _ in pl_module.named_modules() if name]
                raise ScionError(f"{self.name}: on={self.on!r} names no module of {type(pl_module).__name__}"
                                 f"{nearest(self.on, names)}") from None
        for name in ("backbone", "model"):
            root = getattr(pl_module, name, None)
            if isinstance(root, nn.Module):
                return root
        if is_overridden(pl_module, "configure_model") and not getattr(pl_module, "_scion_configured", False):
            return None
        raise ScionError(f"{self.name}: {type(pl_module).__name__} has neither .backbone nor .model; name the backbone "
                         f"with on=... (its children are {listed(name for name, _ in pl_module.named_children())})")

    def _wait_for_configure_model(self, pl_module: Any) -> None:
        """The backbone is only made in ``configure_model``: graft at the end of that."""
        original = pl_module.configure_model

        def configure_model() -> None:
            original()
            if self.root is None:
                pl_module.__dict__.pop("configure_model", None)
                pl_module._scion_configured = True
                root = self._find_root(pl_module)
                assert root is not None
                self.attach(root)

        pl_module.__dict__["configure_model"] = configure_model

    # ------------------------------------------------------------------------------- in training

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.gradient_watch = GradientWatch(self) if self.attached else None

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if self.attached:
            check_model(self)
            warn_of_recomputing(self.need_root(), self.name)
            if not all(isinstance(optimizer, _MockOptimizer) for optimizer in trainer.optimizers):
                check_optimizers(self, trainer.optimizers)
        if isinstance(self, Scheduled) and self.is_scheduled:
            self._follow_trainer(trainer, pl_module)
        resume, self._resume = self._resume, None
        if resume is not None:
            self._go_on(resume)
        elif isinstance(self, Prepared):
            self.prepare_in(trainer, pl_module)

    def _follow_trainer(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        assert isinstance(self, Scheduled)
        self.membership.end()  # of a run that an error ended
        total = trainer.estimated_stepping_batches
        if math.isinf(total):
            raise ScionError(f"{self.name} follows a schedule over the whole run: give the Trainer max_epochs or "
                             "max_steps")
        self.steps = 0
        self.membership.handle = self.follow(trainer.optimizers[0], int(total), pl_module)

    def _go_on(self, resume: dict[str, Any]) -> None:
        """What a checkpoint keeps of the method beside its tensors."""
        parameters = dict(self.need_root().named_parameters())
        for name in resume.get("unfrozen", {}).get(self.name, ()):  # a callback that did so will not do it again
            parameters[name].requires_grad_(True)
        own = dict(resume.get("methods", {}).get(self.name, {}))
        if own and isinstance(self, Scheduled):
            self.steps = own.pop("steps")
            self.load_training_state(own)

    def on_after_backward(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if self.gradient_watch is not None:
            self.gradient_watch.look(trainer.optimizers, 1 / trainer.accumulate_grad_batches)

    def on_before_optimizer_step(self, trainer: L.Trainer, pl_module: L.LightningModule,
                                 optimizer: torch.optim.Optimizer) -> None:
        membership.average_late(self.membership.late)

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.membership.end()

    # ------------------------------------------------------------------------------- checkpoints

    def on_save_checkpoint(self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
        resume = checkpoint.setdefault("resume", {"methods": {}})
        if self.attached:
            unfrozen = resume.setdefault("unfrozen", {})
            unfrozen[self.name] = sorted(self._home().unfrozen())
        if isinstance(self, Scheduled) and self.is_scheduled:
            resume["methods"][self.name] = {"steps": self.steps, **self.training_state()}

    def on_load_checkpoint(self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
        self._resume = checkpoint.get("resume")


def is_overridden(module: Any, hook: str) -> bool:
    """Whether a LightningModule defines ``hook`` itself."""
    import lightning.pytorch as L

    return getattr(type(module), hook, None) is not getattr(L.LightningModule, hook)


watch_loading()
