"""Deep metric learning: samples become unit vectors, those of one class close together, also of classes never seen.

Trained with the Proxy-Anchor loss (Kim et al. 2020, arXiv:2003.13911), measured by retrieval: Recall@K, and mean
average precision at R (Musgrave et al. 2020, arXiv:2003.08505).
"""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchmetrics import Metric, MetricCollection
from torchmetrics.utilities import dim_zero_cat

from core.data.info import DataInfo
from core.errors import ScionError
from core.tasks.base import Shown, Task

BOTH, QUERY, GALLERY = 0, 1, 2
"""Roles of a sample in retrieval: it asks and can be found (but not by itself), it only asks, it can only be found."""
ENTRIES = 2**25
"""Similarities that are held at a time: 128 MiB."""
SHOWN = (8, 5)
"""Queries for a picture, and neighbours of each."""


def proxy_anchor(z: Tensor, labels: Tensor, proxies: Tensor, alpha: float = 32.0, margin: float = 0.1) -> Tensor:
    """The Proxy-Anchor loss, in float32 at least, with both terms averaged over all classes:

    mean_c log(1 + sum_{b of c} e^(-alpha (S_bc - margin))) + mean_c log(1 + sum_{b not of c} e^(alpha (S_bc + margin)))

    with S = z q^T. A class without a sample in the batch adds 0 to the first term. (Kim et al. average that over the
    classes in the batch instead; this is the form in the code of Ren et al. 2024, arXiv:2402.02340.)

    Args:
        z: unit vectors [batch, dim].
        labels: classes [batch].
        proxies: one vector of any length a class [classes, dim].
    """
    kind = torch.promote_types(z.dtype, torch.float32)
    # alpha would multiply the rounding errors that similarities have in half precision
    with torch.autocast(z.device.type, enabled=False):
        similarity = z.to(kind) @ F.normalize(proxies.to(kind), dim=-1).t()
        same = F.one_hot(labels, len(proxies)).bool()
        attracted = _log_one_plus(-alpha * (similarity - margin), same)
        repelled = _log_one_plus(alpha * (similarity + margin), ~same)
        return (attracted + repelled).mean()


def _log_one_plus(x: Tensor, mask: Tensor) -> Tensor:
    """log(1 + sum of e^x over the rows in ``mask``): [batch, classes] -> [classes]."""
    x = x.masked_fill(~mask, torch.finfo(x.dtype).min)  # with minus infinity a class without rows has no gradient: NaN
    return torch.cat([x, x.new_zeros(1, x.shape[1])]).logsumexp(0)


def projection(dim: int, out: int, norm: bool = True) -> nn.Sequential:
    """A layer norm and a linear map, Xavier-uniform, from features [batch, dim] to [batch, out]."""
    linear = nn.Linear(dim, out)
    nn.init.xavier_uniform_(linear.weight)
    nn.init.zeros_(linear.bias)
    if norm:
        return nn.Sequential(nn.LayerNorm(dim), linear)
    return nn.Sequential(linear)


# ------------------------------------------------------------------------------------------------- neighbours


def neighbours(z: Tensor, k: int, gallery: Tensor | None = None, places: Tensor | None = None
               ) -> tuple[Tensor, Tensor]:
    """The nearest vectors of each by cosine similarity, the nearest first.

    Args:
        z: vectors that ask [queries, dim].
        k: how many are wanted; fewer come where there are not so many.
        gallery: vectors among which they are found [size, dim]; None is ``z`` itself.
        places: where in the gallery each query stands [queries], so that it does not find itself, -1 for those that do
            not; None is the order of ``z`` where that is the gallery, otherwise -1.

    Returns:
        Places in the gallery and similarities, each [queries, k].
    """
    if places is None and gallery is None:
        places = torch.arange(len(z), device=z.device)
    elif places is None:
        places = z.new_full((len(z),), -1).long()
    z = F.normalize(z.float(), dim=-1)
    gallery = z if gallery is None else F.normalize(gallery.float(), dim=-1)
    # as soon as one query is in the gallery all find one vector less, so that the result is a matrix
    itself = int(bool((places >= 0).any()))
    k = min(k, len(gallery) - itself)
    found: list[Tensor] = []
    similarities: list[Tensor] = []
    size = max(1, ENTRIES // max(1, len(gallery)))
    for some, own in zip(z.split(size), places.split(size), strict=True):
        similarity = some @ gallery.t()  # [some, gallery]
        inside = (own >= 0).nonzero().flatten()
        similarity[inside, own[inside]] = -torch.inf
        values, indices = similarity.topk(k, dim=1)
        found.append(indices)
        similarities.append(values)
    return torch.cat(found), torch.cat(similarities)


class Retrieval(Metric):
    """How well a sample's nearest neighbours, by cosine similarity, are of its class.

    ``recall_<k>``: the share of queries with one of their class among the k nearest. ``map_r``: mean average precision
    at R, where R is the number of others of the class (Musgrave et al. 2020, arXiv:2003.08505, section 3.3).
    ``map_r_official``: R counts the query itself where it is in the gallery, the convention of VPTSP's published
    numbers. ``neighbours``: for a few queries, spread evenly, their own number and their nearest neighbours' [queries,
    1 + neighbours], in the order in which the samples came; within one process alone.

    A query whose class has nothing to be found is left out; where all are, every number is 0.

    Args:
        ks: the k of ``recall_<k>``.
    """

    full_state_update = False
    embeddings: list[Tensor]
    targets: list[Tensor]

    def __init__(self, ks: Sequence[int] = (1, 2, 4, 8), **common: Any) -> None:
        super().__init__(**common)
        self.ks = tuple(ks)
        self.add_state("embeddings", default=[], dist_reduce_fx="cat")
        self.add_state("targets", default=[], dist_reduce_fx="cat")

    def update(self, embeddings: Tensor, targets: Tensor) -> None:
        """embeddings [batch, dim]; targets [batch], or [batch, 2] with each sample's role (`BOTH`, `QUERY`,
        `GALLERY`)."""
        if targets.dim() != 2:
            targets = F.pad(targets[:, None], (0, 1), value=BOTH)
        self.embeddings.append(embeddings.float())
        self.targets.append(targets)

    def compute(self) -> dict[str, Tensor]:
        z = dim_zero_cat(self.embeddings)
        labels, roles = dim_zero_cat(self.targets).t()
        gallery = (roles != QUERY).nonzero().flatten()
        places = torch.full_like(roles, -1)
        places[gallery] = torch.arange(len(gallery), device=places.device)
        _, kind, counts = labels.unique(return_inverse=True, return_counts=True)
        # each class's size in the gallery: that among all samples would count the ones that only ask
        counts = counts.new_zeros(counts.shape).index_add(0, kind[gallery], torch.ones_like(gallery))
        relevant = counts[kind] - (roles == BOTH).long()  # others of its class that each could find
        asking = (roles != GALLERY) & (relevant > 0)
        names = [f"recall_{k}" for k in self.ks] + ["map_r", "map_r_official"]
        sums = torch.zeros(len(names), dtype=torch.float64)
        size = max(1, ENTRIES // len(z))
        for role in (BOTH, QUERY):
            queries = (asking & (roles == role)).nonzero().flatten()
            for some in queries.split(size):
                if len(some):  # an empty tensor is split into one empty part
                    sizes = counts[kind[some]]
                    means = self._means(z, labels, gallery, places, sizes, some, role == BOTH)
                    sums += len(some) * means
        queries_in_all = asking.sum().clamp(min=1).cpu()
        overall = (sums / queries_in_all).float().to(z.device)
        found = dict(zip(names, overall, strict=True))
        in_parallel = torch.distributed.is_available() and torch.distributed.is_initialized()
        if asking.any() and not in_parallel:
            found["neighbours"] = _neighbours_shown(z, asking, gallery, places)
        return found

    def _means(self, z: Tensor, labels: Tensor, gallery: Tensor, places: Tensor, counts: Tensor, some: Tensor,
               inside: bool) -> Tensor:
        """The metrics of ``some`` queries, which are all in the gallery or all not; ``counts`` [queries] are the
        sizes of their classes there."""
        from pytorch_metric_learning.utils.accuracy_calculator import EQUALITY, mean_average_precision

        most = max(*self.ks, int(counts.max()))
        nearest = neighbours(z[some], most, z[gallery], places[some])[0]
        found = labels[gallery][nearest].cpu()  # [queries, most]
        wanted = labels[some][:, None].cpu()  # [queries, 1]
        hits = found == wanted
        recalls = [hits[:, :k].any(1).double().mean() for k in self.ks]
        kinds = {int(label): int(count) for label, count in zip(wanted, counts, strict=True)}
        sizes = torch.tensor(list(kinds))[:, None], torch.tensor(list(kinds.values()))
        # the second is the official one, whose R counts the query itself also where it is in the gallery
        averages = [mean_average_precision(found, wanted, left_out, sizes, False, False, EQUALITY, at_r=True)
                    for left_out in (inside, False)]
        return torch.tensor([*recalls, *averages], dtype=torch.float64)


def _neighbours_shown(z: Tensor, asking: Tensor, gallery: Tensor, places: Tensor) -> Tensor:
    """A few queries and their nearest neighbours, by their numbers [queries, 1 + neighbours]."""
    queries = asking.nonzero().flatten()
    count = min(SHOWN[0], len(queries))
    spread = torch.linspace(0, len(queries) - 1, count, device=z.device)
    shown = queries[spread.round().long()]
    nearest = neighbours(z[shown], SHOWN[1], z[gallery], places[shown])[0]
    return torch.cat([shown[:, None], gallery[nearest]], 1)


# ------------------------------------------------------------------------------------------------- the task


class Embedding(Task):
    """Unit vectors z = normalise(W LayerNorm(feature) + b), trained by Proxy-Anchor and measured by retrieval.

    A target is a class [batch], or a class and a role in retrieval [batch, 2] (`Retrieval.update`). The classes of
    validation and test may be others than those of training, so the loss is computed in training alone. The proxies,
    one trained vector for each class, start as Xavier-uniform values / 8; they are in checkpoints, but in no adapter.

    Args:
        dim: width of z.
        alpha: the loss's scale.
        margin: the loss's margin.
        proxy_lr_factor: learning rate of the proxies as a multiple of the main one.
        ks: the k of Recall@k; a run may select its checkpoint by the first.
        norm: whether a layer norm stands before the map.

    Source: Kim et al. 2020, arXiv:2003.13911, equation 4; values of Ren et al. 2024, arXiv:2402.02340
    """

    compares = True
    training_only = ("proxies",)
    needs_classes = True

    def __init__(self, dim: int = 512, alpha: float = 32.0, margin: float = 0.1, proxy_lr_factor: float = 20.0,
                 ks: Sequence[int] = (1, 2, 4, 8), norm: bool = True) -> None:
        super().__init__()
        if dim < 1 or alpha <= 0 or proxy_lr_factor <= 0:
            raise ScionError(f"Embedding: dim {dim} must be at least 1, alpha {alpha} and proxy_lr_factor "
                             f"{proxy_lr_factor} positive")
        if not ks or min(ks) < 1:
            raise ScionError(f"Embedding: ks {list(ks)} must name at least one k, each at least 1")
        self.dim = dim
        self.alpha = alpha
        self.margin = margin
        self.ks = tuple(ks)
        self.norm = norm
        self.lr_factors = {"proxies": proxy_lr_factor}
        self.selects = (f"recall_{self.ks[0]}", "max")
        self.classes: list[str] = []
        self.proxies: nn.Parameter | None = None

    def check(self, classes: Sequence[str]) -> None:
        if len(classes) < 2:
            raise ScionError(f"model.task: Embedding compares classes, and the data has {len(classes)}")

    def build(self, dim: int, info: DataInfo | Sequence[str], multilabel: bool = False) -> None:
        info = DataInfo.of(info, multilabel)
        classes = info.classes
        self.check(classes)
        if info.multilabel:
            raise ScionError("model.task: Embedding wants one label a sample, the data has several")
        if importlib.util.find_spec("pytorch_metric_learning") is None:
            raise ScionError("model.task: Embedding measures with pytorch-metric-learning, which is not installed: "
                             "pip install 'scion-peft[vision]'")
        self.classes = list(classes)
        self.head = self.new_head(dim)
        start = nn.init.xavier_uniform_(torch.empty(len(classes), self.dim))
        self.proxies = nn.Parameter(start / 8)
        self.set_metrics({"retrieval": Retrieval(self.ks)})
        self.metrics["train_"] = MetricCollection({})  # shuffled batches of a changing model: nothing to retrieve from

    def new_head(self, dim: int) -> nn.Module:
        """Another head like the task's, for features [batch, dim]."""
        return projection(dim, self.dim, self.norm)

    def forward(self, features: Tensor) -> Tensor:
        """features [batch, features] -> unit vectors [batch, dim]"""
        return F.normalize(self.head(features), dim=-1)

    def loss(self, outputs: Tensor, targets: Tensor, proxies: Tensor | None = None) -> Tensor:
        """Proxy-Anchor, with other ``proxies`` [classes, dim] in place of the task's own where they are given."""
        if proxies is None:
            proxies = self.proxies
        if proxies is None:
            raise ScionError("Embedding: the proxies are gone, for a finished run keeps what inference needs alone; "
                             "train from its checkpoint")
        labels = targets if targets.dim() == 1 else targets[:, 0]
        return proxy_anchor(outputs, labels, proxies, self.alpha, self.margin)

    def show(self, rows: Sequence[int], outputs: Tensor, targets: Sequence[Any]) -> list[Shown]:
        """The first sample asks, the others are its neighbours: right where they are of its class."""
        query, *found = [class_of(target) for target in targets]
        shown = [Shown(rows[0], f"query\nclass {query}")]
        for place, (row, found_class) in enumerate(zip(rows[1:], found, strict=True), start=1):
            shown.append(Shown(row, f"neighbour {place}\nclass {found_class}", found_class == query))
        return shown

    def predict(self, outputs: Tensor) -> list[dict[str, Any]]:
        """The training class whose proxy is nearest, with cosine similarities as scores. A finished run has no proxies
        any more, and then the label is None: its samples have `neighbours`, but no classes."""
        if self.proxies is None:
            return [{"label": None, "score": 0.0, "scores": {}} for _ in outputs]
        places, values = neighbours(outputs, 5, self.proxies.detach())
        found = []
        for row, scores in zip(places.tolist(), values.tolist(), strict=True):
            named = {self.classes[i]: round(score, 4) for i, score in zip(row, scores, strict=True)}
            label = self.classes[row[0]]
            found.append({"label": label, "score": round(scores[0], 4), "scores": named})
        return found


def class_of(target: Any) -> int:
    """The class in a target, which may have a sample's role beside it."""
    if isinstance(target, Tensor) and target.dim():
        return int(target[0])
    return int(target)
