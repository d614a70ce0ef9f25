"""What an epoch adds up, the mean loss and the metrics of one stage: over all processes, and across an interruption."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torchmetrics import Metric, MetricCollection
from torchmetrics.utilities import dim_zero_cat

States = dict[str, dict[str, Any]]
"""Of each metric, by its name: how often it was updated, and its values (tensors, or lists of them) on the CPU."""


class LossSum:
    """A running mean of batches' mean losses, by their numbers of samples."""

    def __init__(self) -> None:
        self.reset()

    def reset(self) -> None:
        self.total, self.samples = torch.zeros(()), 0

    def add(self, loss: Tensor, samples: int) -> None:
        """Take in the mean loss of so many samples."""
        loss = loss.detach()
        if self.total.device != loss.device:
            self.total = self.total.to(loss.device)
        wide = torch.promote_types(loss.dtype, torch.float32)
        self.total = self.total + loss.to(wide) * samples
        self.samples += samples

    def state(self) -> dict[str, Any]:
        return {"total": self.total.cpu(), "samples": self.samples}

    def load(self, state: dict[str, Any]) -> None:
        self.total, self.samples = state["total"], state["samples"]


def mean_loss(states: list[dict[str, Any]]) -> Tensor:
    """The mean over what all processes have added up."""
    samples = torch.tensor(sum(state["samples"] for state in states))
    if len(states) == 1:
        return states[0]["total"] / samples
    totals = torch.stack([state["total"].double() for state in states])
    return (totals.sum() / samples).to(states[0]["total"].dtype)


# ------------------------------------------------------------------------------------------------- metrics


def _metrics(collection: MetricCollection) -> dict[str, Metric]:
    return {name: metric for name, metric in collection.named_modules() if isinstance(metric, Metric)}


def metric_states(collection: MetricCollection) -> States:
    """What the metrics have added up so far in this process, loadable with ``weights_only=True``."""
    found: States = {}
    for name, metric in _metrics(collection).items():
        values = {attribute: _on(value, torch.device("cpu")) for attribute, value in metric.metric_state.items()}
        found[name] = {"updates": metric.update_count, "values": values}
    return found


def load_metric_states(collection: MetricCollection, states: States) -> None:
    """Undo of `metric_states`."""
    for name, metric in _metrics(collection).items():
        _load(metric, states[name]["values"], states[name]["updates"])


def joint(collection: MetricCollection, states: list[States]) -> MetricCollection:
    """The metrics of all processes together: a copy of this one's, with the ``states`` of all of them."""
    together = collection.clone()
    together.reset()
    for name, metric in _metrics(together).items():
        parts = [state[name] for state in states if state[name]["updates"]]
        if not parts:
            continue
        values: dict[str, Any] = {}
        for attribute, reduction in metric._reductions.items():
            found = [part["values"][attribute] for part in parts]
            if isinstance(found[0], list):
                values[attribute] = [tensor for tensors in found for tensor in tensors]
            elif reduction is dim_zero_cat:
                values[attribute] = torch.cat(found)
            else:
                stacked = torch.stack(found)
                values[attribute] = stacked if reduction is None else reduction(stacked)  # type: ignore[operator]
        _load(metric, values, sum(part["updates"] for part in parts))
    return together


def compute(collection: MetricCollection) -> dict[str, Any]:
    """What the metrics say of what they hold; torchmetrics, left alone, would gather from the other processes here."""
    for metric in _metrics(collection).values():
        metric.distributed_available_fn = _never
    return collection.compute()


def _never() -> bool:
    return False


def _load(metric: Metric, values: dict[str, Any], updates: int) -> None:
    for attribute, value in values.items():
        setattr(metric, attribute, _on(value, metric.device))
    metric._update_count, metric._computed = updates, None


def _on(value: Any, device: torch.device) -> Any:
    """A tensor, or a list of them, on ``device``: a copy, for metrics go on writing into theirs."""
    return [tensor.to(device) for tensor in value] if isinstance(value, list) else value.to(device, copy=True)
