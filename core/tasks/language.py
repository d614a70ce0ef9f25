"""Tasks on a text model's own head: to say the next token, or the hidden ones."""

from __future__ import annotations

from typing import Any, Literal

import torch.nn.functional as F
from torch import Tensor, nn

from core.data.info import DataInfo
from core.errors import ScionError
from core.tasks.base import Task
from core.text.head import open_head
from core.text.tokens import IGNORED


class LanguageModelling(Task):
    """The backbone's own head says the next token; cross-entropy as a mean over all labelled positions of a step.

    Targets are ``{"labels": [batch, tokens]}`` or that tensor, with -100 where nothing is to be said, each at the
    position that says it (`core.text.sequence.causal_batch`). Beside the labels there may be ``positions`` [labels],
    where they count, numbered through the batch: then nothing looks into them, as on the meta device. Logits are
    computed at labelled positions only. Measured by perplexity, e^(sum of the negative log-likelihoods / labels), and
    the share of tokens that are the likeliest.

    Args:
        head: ``train`` trains the backbone's own head (transform, bias, map to the vocabulary) beside the methods, and
            saves it with them; ``frozen`` leaves it as it was pretrained.
        untie: give the head's map to the vocabulary a weight of its own, a copy, where the model ties it to the
            embedding, which would else be trained with it.
    """

    reads = "logits"
    selects = ("perplexity", "min")

    def __init__(self, head: Literal["frozen", "train"] = "frozen", untie: bool = False) -> None:
        super().__init__()
        if head not in ("frozen", "train"):
            raise ScionError(f"model.task.head: {head!r} is neither frozen nor train")
        if untie and head == "frozen":
            raise ScionError("model.task.untie: a head that stays frozen needs no weight of its own; set head: train, "
                             "or leave untie out")
        self.trains_head, self.untie = head == "train", untie

    def prepare(self, backbone: Any) -> None:
        if not self.trains_head:
            backbone.trained_head = ()
        elif not backbone.trained_head:
            backbone.trained_head = open_head(backbone, self.untie)

    def build(self, dim: Any, info: DataInfo) -> None:
        from torchmetrics import MetricCollection
        from torchmetrics.classification import MulticlassAccuracy
        from torchmetrics.text import Perplexity

        self.head = nn.Identity()  # the backbone has it
        # averaged over tokens the number of classes plays no part, and the ids' range is the tokenizer's business
        accuracy = MulticlassAccuracy(info.vocabulary or 2, average="micro", validate_args=False)
        metrics = MetricCollection({"perplexity": Perplexity(ignore_index=IGNORED), "accuracy": accuracy},
                                   compute_groups=False)
        self.set_metrics(dict(metrics.items()))

    def reading_options(self, inputs: Any, targets: Any = None) -> dict[str, Any]:
        """Where logits are wanted: at the labels, or, without any, at all tokens that are no padding."""
        if targets is None:
            return {"where": inputs["attention_mask"].bool()}
        positions = _positions_in(targets)
        return {"where": labels_in(targets) != IGNORED if positions is None else positions}

    def counts(self, outputs: Tensor, targets: Any) -> int:
        return len(outputs)

    def loss(self, outputs: Tensor, targets: Any) -> Tensor:
        """outputs [labels, vocabulary] -> the mean negative log-likelihood"""
        return F.cross_entropy(outputs.float() if outputs.dtype.itemsize < 4 else outputs, chosen_labels(targets))

    def update(self, stage: str, outputs: Tensor, targets: Any) -> None:
        if not len(outputs):
            return
        labels = chosen_labels(targets)
        metrics = self.collection(stage)
        metrics["perplexity"].update(outputs[None], labels[None])
        metrics["accuracy"].update(outputs.argmax(-1), labels)

    def predict(self, outputs: Tensor) -> list[dict[str, Any]]:
        """Nothing: what the model says is made by generation (`core.text.generate`)."""
        return []


class MaskedLM(LanguageModelling):
    """The backbone's own head says the tokens that are hidden in a text, by cross-entropy as a mean over all of them.

    Which are hidden is up to the data (`core.text.masking`): 15 % of the pieces that are no special ones, drawn by
    (seed, epoch, sample), of them 80 % hidden, 10 % another piece and 10 % as they were.

    Args:
        head, untie: see `LanguageModelling`.

    Source: Devlin et al. 2018, arXiv:1810.04805, section 3.1
    """


def labels_in(targets: Any) -> Tensor:
    """The labels [batch, tokens] of a batch's targets.

    Raises:
        ScionError: they have none.
    """
    found = targets.get("labels") if isinstance(targets, dict) else targets
    if not isinstance(found, Tensor):
        raise ScionError("model.task: targets have no labels; a language model's are {'labels': [batch, tokens]}")
    return found


def chosen_labels(targets: Any) -> Tensor:
    """The labels of a batch that count [labels], row by row."""
    labels = labels_in(targets)
    positions = _positions_in(targets)
    return labels[labels != IGNORED] if positions is None else labels.flatten()[positions]


def _positions_in(targets: Any) -> Tensor | None:
    """Where the labels that count are, if the targets say it."""
    return targets.get("positions") if isinstance(targets, dict) else None
