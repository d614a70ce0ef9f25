"""What methods compute from a Trainer's data, and the Trainer's samples as a training step gets them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from core.callbacks.exact_resume import gather
from core.errors import ScionError
from core.random_state import random_states, restore_random_states, seed_of

if TYPE_CHECKING:
    import lightning.pytorch as L

    from core.method.base import PEFTMethod


def prepare_in_trainer(method: PEFTMethod, trainer: L.Trainer, pl_module: Any) -> None:
    """`Prepared.prepare` on the Trainer's data and in its precision.

    Several processes see the same samples, and draw alike. Data and random states are afterwards where they were.

    Raises:
        ScionError: the loss of a sample is not finite.
    """
    prepared: Any = method
    if not prepared.prepares or method.prepared or not method.attached or not hasattr(pl_module, "methods"):
        return
    loader: Any = trainer.train_dataloader
    generator = torch.Generator().manual_seed(seed_of(method.seed, method.name, "prepare"))
    order = torch.randperm(len(loader.dataset), generator=generator).tolist()
    read: list[int] = []

    def samples() -> Iterator[Any]:
        for index in order:
            read.append(index)
            yield training_batch(trainer, [index])

    def loss(batch: Any) -> Tensor:
        with trainer.precision_plugin.forward_context():
            value = pl_module.loss(batch)
        if not bool(torch.isfinite(value)):
            raise ScionError(f"{method.name}: the loss of {sample_name(trainer, read[-1])} is {float(value)}, before "
                             "anything is trained; look at the sample")
        return value

    states = random_states()
    restore_random_states(gather(states, trainer)[0])
    prepared.prepare(samples(), loss)
    restore_random_states(states)


def training_batch(trainer: L.Trainer, indices: Iterable[int]) -> Any:
    """These samples of the training set as a training step gets them: one batch, in the Trainer's precision and on its
    device."""
    loader: Any = trainer.train_dataloader
    batch = loader.collate_fn([loader.dataset[i] for i in indices])
    return trainer.strategy.batch_to_device(trainer.precision_plugin.convert_input(batch))


def sample_name(trainer: L.Trainer, index: int, dataset: Any = None) -> str:
    """What a sample is called, in the training set unless another is given: its file, where the data know it."""
    name_of = getattr(trainer.datamodule, "name_of", None)  # type: ignore[attr-defined]
    if name_of is None:
        return f"sample {index}"
    loader: Any = trainer.train_dataloader
    return name_of(loader.dataset if dataset is None else dataset, index)
