"""Embedding: unit vectors, the Proxy-Anchor loss, retrieval metrics, and what of it a run keeps."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import lightning.pytorch as L
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from core.backbone import Backbone
from core.config.optimizer import OptimizerSettings
from core.errors import ScionError
from core.peft import method_class
from core.tasks import Embedding
from core.tasks.embedding import BOTH, ENTRIES, GALLERY, QUERY, Retrieval, neighbours, proxy_anchor
from core.training.finetuner import FineTuner
from core.training.head_files import outside
from core.training.run_record import count
from tests.models import batch, make

CLASSES = [f"bird {i}" for i in range(6)]
Tuned: Any = method_class("BitFit")


def vectors(count: int, dim: int = 8, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return F.normalize(torch.randn(count, dim, generator=torch.Generator().manual_seed(seed)), dim=-1).to(dtype)


def task(**options: Any) -> Embedding:
    made = Embedding(**{"dim": 8, **options})
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        made.build(4, CLASSES)
    return made


class Around(Backbone):
    """A tiny ViT as a domain's backbone."""

    def __init__(self) -> None:
        super().__init__()
        self.model, self.dim = make("timm_vit").model, 32

    def forward(self, inputs: Tensor) -> Tensor:
        return self.model(inputs)


# ------------------------------------------------------------------------------------------------- loss


def written_out(z: Tensor, labels: Tensor, proxies: Tensor, alpha: float, margin: float) -> float:
    """The loss's formula, number by number."""
    total = 0.0
    for c, proxy in enumerate(proxies.tolist()):
        length = math.sqrt(sum(x * x for x in proxy))
        of, others = 0.0, 0.0
        for row, label in zip(z.tolist(), labels.tolist(), strict=True):
            similarity = sum(a * b for a, b in zip(row, proxy, strict=True)) / length
            if label == c:
                of += math.exp(-alpha * (similarity - margin))
            else:
                others += math.exp(alpha * (similarity + margin))
        total += math.log(1 + of) + math.log(1 + others)
    return total / len(proxies)


@pytest.mark.parametrize(("alpha", "margin"), [(32.0, 0.1), (3.0, 0.4)])
def test_loss_is_the_formula(alpha: float, margin: float) -> None:
    """Classes 3 to 5 have no sample in the batch and add 0 to the first term."""
    z, labels, proxies = vectors(8), torch.tensor([0, 0, 2, 2, 2, 1, 1, 0]), 3 * vectors(6, seed=1)
    assert float(proxy_anchor(z, labels, proxies, alpha, margin)) == pytest.approx(
        written_out(z, labels, proxies, alpha, margin), rel=1e-5)


@pytest.mark.parametrize("present", [6, 3])
def test_loss_beside_the_library(present: int) -> None:
    """pytorch-metric-learning averages the first term over the classes in the batch, as Kim et al. do, and this one
    over all: so they agree where all are there, and otherwise but for the factor of that term."""
    from pytorch_metric_learning import losses

    z, labels, proxies = vectors(12), torch.arange(12) % present, vectors(6, seed=1)
    theirs = losses.ProxyAnchorLoss(6, 8, margin=0.1, alpha=32)
    with torch.no_grad():
        theirs.proxies.copy_(proxies)
    terms = theirs.compute_loss(z, labels, None, z, labels)
    attracted, repelled = (terms[name]["losses"].sum() / 6 for name in ("pos_loss", "neg_loss"))
    torch.testing.assert_close(proxy_anchor(z, labels, proxies), attracted + repelled)
    if present == 6:
        torch.testing.assert_close(proxy_anchor(z, labels, proxies), theirs(z, labels))
    else:
        torch.testing.assert_close(6 / present * attracted + repelled, theirs(z, labels))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_loss_of_half_precision_is_finite(dtype: torch.dtype) -> None:
    """With classes that no sample has, and one that all have; e^(32 * 1.1) is beyond fp16."""
    for labels in (torch.tensor([0, 0, 2, 2]), torch.zeros(4, dtype=torch.int64)):
        z, proxies = vectors(4, dtype=dtype).requires_grad_(), vectors(6, seed=1, dtype=dtype).requires_grad_()
        loss = proxy_anchor(z, labels, proxies)
        loss.backward()
        assert loss.dtype == torch.float32 and torch.isfinite(loss)
        assert all(t.grad is not None and torch.isfinite(t.grad).all() and t.grad.any() for t in (z, proxies))
        wanted = proxy_anchor(z.detach().float(), labels, proxies.detach().float())
        assert float(loss.detach()) == pytest.approx(float(wanted), rel=1e-3)


# ------------------------------------------------------------------------------------------------- retrieval


def clusters(classes: int = 7, each: int = 6, noise: float = 0.7) -> tuple[Tensor, Tensor]:
    labels = torch.arange(classes * each) % classes
    return F.normalize(vectors(classes)[labels] + noise * vectors(classes * each, seed=1), dim=-1), labels


def measured(z: Tensor, targets: Tensor, ks: tuple[int, ...] = (1, 2, 4)) -> dict[str, Tensor]:
    metric = Retrieval(ks)
    for part in range(0, len(z), 10):
        metric.update(z[part:part + 10], targets[part:part + 10])
    return metric.compute()


def by_hand(z: Tensor, labels: Tensor, roles: Tensor, extra: int, k: int) -> tuple[float, float]:
    """Recall@k, and mean average precision at R, query by query; ``extra`` is added to R for queries in the gallery."""
    recalls, averages = [], []
    for i in range(len(z)):
        others = [j for j in range(len(z)) if j != i and roles[j] != QUERY]
        if roles[i] == GALLERY or not any(labels[j] == labels[i] for j in others):
            continue
        ranked = sorted(others, key=lambda j: -float(z[i] @ z[j]))
        hits = [bool(labels[j] == labels[i]) for j in ranked]
        size = sum(hits) + (extra if roles[i] == BOTH else 0)
        recalls.append(any(hits[:k]))
        averages.append(sum(sum(hits[:n + 1]) / (n + 1) for n in range(min(size, len(hits))) if hits[n]) / size)
    return sum(recalls) / len(recalls), sum(averages) / len(averages)


@pytest.mark.parametrize("roles", ["one set", "query and gallery", "mixed"])
def test_metrics_by_hand(roles: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whether the similarities come in one piece or in many; a class with one sample has nothing to find."""
    z, labels = clusters()
    labels[5] = 99
    part = {"one set": torch.zeros_like(labels), "query and gallery": 1 + torch.arange(len(z)) % 2,
            "mixed": torch.arange(len(z)) % 3}[roles]
    targets = labels if roles == "one set" else torch.stack([labels, part], 1)
    whole = measured(z, targets)
    for k in (1, 2, 4):
        recall, standard = by_hand(z, labels, part, 0, k)
        assert float(whole[f"recall_{k}"]) == pytest.approx(recall, abs=1e-6)
        assert float(whole["map_r"]) == pytest.approx(standard, abs=1e-6)
    assert float(whole["map_r_official"]) == pytest.approx(by_hand(z, labels, part, 1, 1)[1], abs=1e-6)
    assert 0.1 < float(whole["map_r"]) < 0.9 and float(whole["recall_1"]) < 0.99
    monkeypatch.setattr("core.tasks.embedding.ENTRIES", 200)
    pieces = measured(z, targets)
    assert all(torch.allclose(pieces[name], value) for name, value in whole.items())
    assert ENTRIES == 2**25


def test_metrics_beside_the_library() -> None:
    from pytorch_metric_learning.utils import accuracy_calculator as accuracy

    z, labels = clusters()

    def knn(query: Tensor, k: int, reference: Tensor, itself: bool) -> tuple[Tensor, Tensor]:
        distances = torch.cdist(query, reference)
        if itself:
            distances.fill_diagonal_(torch.inf)
        found = distances.topk(k, largest=False)
        return found.values, found.indices

    theirs = accuracy.AccuracyCalculator(include=("precision_at_1", "mean_average_precision_at_r"), k="max_bin_count",
                                         knn_func=knn, kmeans_func=knn).get_accuracy(z, labels)
    ours = measured(z, labels)
    assert float(ours["recall_1"]) == pytest.approx(theirs["precision_at_1"])
    assert float(ours["map_r"]) == pytest.approx(theirs["mean_average_precision_at_r"])


def test_perfect_and_hopeless() -> None:
    z = F.normalize(torch.eye(4), dim=-1).repeat_interleave(3, 0)
    found = measured(z, torch.arange(12) // 3)
    assert all(float(found[name]) == 1 for name in ("recall_1", "recall_4", "map_r"))
    assert float(found["map_r_official"]) == pytest.approx(2 / 3)  # of three places two are of the class
    hopeless = measured(z, torch.arange(12))
    assert all(float(value) == 0 for value in hopeless.values()) and "neighbours" not in hopeless


def test_neighbours_for_a_picture() -> None:
    z, labels = clusters()
    shown = measured(z, labels)["neighbours"]
    assert shown.shape == (8, 6) and shown[0, 0] == 0 and shown[-1, 0] == len(z) - 1
    assert shown[:, 0].diff().min() >= 5  # spread over the whole set
    for query, *rest in shown.tolist():
        ranked = [j for j in (z @ z[query]).argsort(descending=True).tolist() if j != query]
        assert rest == ranked[:5]
    roles = torch.where(torch.arange(len(z)) < 20, GALLERY, QUERY)
    apart = measured(z, torch.stack([labels, roles], 1))["neighbours"]
    assert apart[:, 0].min() == 20 and apart[:, 1:].max() < 20


def test_neighbours() -> None:
    z = vectors(5)
    places, values = neighbours(2 * z, 9)  # of any length, and no more than there are
    assert places.shape == values.shape == (5, 4) and not (places == torch.arange(5)[:, None]).any()
    assert (values.diff(dim=1) <= 0).all() and torch.allclose(values[0, 0], z[0] @ z[places[0, 0]])
    assert neighbours(z[:2], 3, z)[0][:, 0].tolist() == [0, 1]  # given apart, a query may find itself


# ------------------------------------------------------------------------------------------------- the task


def test_head_and_outputs() -> None:
    made = task()
    head: Any = made.head
    norm, linear = head
    assert isinstance(norm, nn.LayerNorm) and not linear.bias.any()
    assert linear.weight.abs().max() <= math.sqrt(6 / 12)
    bound = math.sqrt(6 / (6 + 8)) / 8
    assert made.proxies is not None and 0.7 * bound < made.proxies.abs().max() <= bound
    z = made(torch.randn(3, 4, generator=torch.Generator().manual_seed(0)))
    assert z.shape == (3, 8) and torch.allclose(z.norm(dim=-1), torch.ones(3))
    plain: Any = task(norm=False).head
    assert len(plain) == 1 and made.selects == ("recall_1", "max")
    labels = torch.tensor([0, 0, 2])
    roles = torch.stack([labels, torch.zeros(3, dtype=torch.int64)], 1)
    assert torch.equal(made.loss(z, labels), made.loss(z, roles))
    assert torch.equal(made.loss(z, labels), proxy_anchor(z, labels, made.proxies))


def test_predictions_name_the_nearest_training_class() -> None:
    made = task()
    assert made.proxies is not None
    found = made.predict(5 * made.proxies.detach()[[4, 1]])
    assert [entry["label"] for entry in found] == ["bird 4", "bird 1"] and found[0]["score"] == 1
    made.proxies = None
    assert made.predict(vectors(2))[0]["label"] is None
    with pytest.raises(ScionError, match="proxies are gone"):
        made.loss(vectors(2), torch.tensor([0, 1]))


def test_wrong_settings_are_refused() -> None:
    for options, words in (({"dim": 0}, "dim 0"), ({"alpha": 0.0}, "alpha 0"), ({"ks": ()}, "at least one"),
                           ({"ks": (0,)}, r"ks \[0\]"), ({"proxy_lr_factor": 0.0}, "proxy_lr_factor 0")):
        with pytest.raises(ScionError, match=words):
            Embedding(**options)  # type: ignore[arg-type]
    with pytest.raises(ScionError, match="one label"):
        Embedding().build(4, CLASSES, multilabel=True)
    with pytest.raises(ScionError, match="the data has 1"):
        Embedding().check(["one"])


def test_a_run_of_epochs(tmp_path: Path) -> None:
    """Loss in training alone, retrieval at validation and test, on classes that training has not; proxies learn at
    their own rate, are counted apart and stay out of the file."""
    tuner = FineTuner(Around(), Embedding(dim=8, proxy_lr_factor=5.0, ks=(1, 2)), CLASSES,
                      optimizer=OptimizerSettings(lr=1e-3))
    method = Tuned().attach(tuner.backbone)
    train = TensorDataset(batch("timm_vit", 12), torch.arange(12) % 6)
    other = TensorDataset(batch("timm_vit", 12, seed=1), 40 + torch.arange(12) % 3)
    fit = L.Trainer(accelerator="cpu", devices=1, max_epochs=2, logger=False, enable_progress_bar=False,
                    enable_model_summary=False, enable_checkpointing=False, default_root_dir=tmp_path)
    proxies: Any = tuner.task.proxies
    start = proxies.detach().clone()
    fit.fit(tuner, DataLoader(train, 6), DataLoader(other, 5))
    assert set(fit.callback_metrics) == {"train/loss", *(f"validation/{name}" for name in (
        "recall_1", "recall_2", "map_r", "map_r_official"))}
    rates = {group["lr"] for group in tuner.param_groups()}
    assert rates == {1e-3, 5e-3} and not torch.equal(proxies, start)
    [found] = fit.test(tuner, DataLoader(other, 5), verbose=False)
    assert set(found) == {"test/recall_1", "test/recall_2", "test/map_r", "test/map_r_official"}
    assert tuner.tables["test/neighbours"].shape == (8, 6)
    z = torch.cat([tuner.eval()(inputs).detach() for inputs, _ in DataLoader(other, 5)])
    assert float(measured(z, other.tensors[1])["map_r"]) == pytest.approx(found["test/map_r"], abs=1e-6)
    counts = count(tuner)
    assert counts["beside"] == 6 * 8 and counts["head"] == 32 * 8 + 8 + 2 * 32
    assert set(outside(tuner)) == {f"outside.task.head.{n}" for n in ("0.weight", "0.bias", "1.weight", "1.bias")}
    assert "task.proxies" in tuner.state_dict() and method.counts()["method"] == counts["method"]
