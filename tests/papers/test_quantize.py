"""Checks of Quantize: the checks by their numbers there."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from safetensors.torch import load_file
from torch import Tensor, nn

from core import FineTuner, load_adapter
from core.adapters.load import TENSORS
from core.anatomy import parameter_sites
from core.backbone import Backbone
from core.errors import ScionError
from core.peft import method_class
from core.peft.weights.quantize import QuantizedGraft, positive_levels
from core.tasks import Classification
from core.training.head_files import outside
from core.training.run_record import save_run_adapter
from tests.models import batch, make
from tests.papers.training import run
from tests.rows import Row, Variant
from tests.toolkit import distance, outputs, randomize

ROWS = {
    "Quantize": Row(
        {"alone": Variant(trains=False)},
        trained=lambda anatomy, method: 0,
        bad=(({"bits": 3}, "bits 3"), ({"methods": ("LoRAA",)}, "'LoRAA'")),
        saved=0.0,
        absent=("test_nothing_to_train", "test_checkpoint", "test_resume", "test_reproducible",
                "test_no_graph_below_the_first_graft"),
    ),
}

Quantize: Any = method_class("Quantize")
LoRA: Any = method_class("LoRA")
Houlsby: Any = method_class("Houlsby")
AdaptFormer: Any = method_class("AdaptFormer")


class Whole(Backbone):
    """A full-size model as a backbone."""

    def __init__(self, model: nn.Module, dim: int) -> None:
        super().__init__()
        self.model, self.dim = model, dim

    def forward(self, inputs: Tensor) -> Tensor:
        return self.model(inputs)


def _timm(name: str = "vit_base_patch16_224") -> nn.Module:
    import timm

    return timm.create_model(name, num_classes=0)


def _bytes(tensors: dict[str, Tensor]) -> int:
    return sum(t.numel() * t.element_size() for t in tensors.values())


@pytest.mark.parametrize(("name", "host", "numbers", "size"), [
    ("vit_base_patch16_224", lambda: LoRA(rank=32), 1_179_648, 147_840),
    ("vit_base_patch16_224", lambda: AdaptFormer(bottleneck=32, biases=False), 589_824, 73_920),
    ("swin_base_patch4_window7_224", lambda: LoRA(rank=32), 1_540_096, 193_280),
    ("swin_base_patch4_window7_224", lambda: AdaptFormer(bottleneck=32, biases=False), 770_048, 96_640),
], ids=["ViT-B, LoRA", "ViT-B, AdaptFormer", "Swin-B, LoRA", "Swin-B, AdaptFormer"])
def test_1_bytes(name: str, host: Any, numbers: int, size: int) -> None:
    """In 1 bit, a number takes an eighth of a byte and a matrix 8 bytes more: LoRA of rank 32 on q and v; a bottleneck
    of 32 beside each MLP, without biases. Swin-B has 12,032 channels in its 24 blocks."""
    with torch.device("meta"):
        model = _timm(name)
    method = host().attach(model)
    assert method.counts()["method"] == numbers
    quantize = Quantize(bits=1).attach(model)
    stored = method.tensors()
    assert _bytes(stored) == size == numbers // 8 + 8 * len(quantize.grafts)
    assert {t.dtype for t in stored.values()} == {torch.uint8, torch.float32} and not quantize.tensors()


def _task(device: str, host: Any, bits: int | None) -> FineTuner:
    """100 classes on ViT-B/16."""
    with torch.random.fork_rng(devices=[]), torch.device(device):
        torch.manual_seed(0)
        tuner = FineTuner(Whole(_timm(), 768), Classification(bits=bits), [str(i) for i in range(100)])
    host().attach(tuner.backbone)
    Quantize(bits=1).attach(tuner.backbone)
    return tuner


@pytest.mark.parametrize(("host", "bits", "size"), [
    (lambda: AdaptFormer(bottleneck=32, biases=False), 1, 83_528),
    (lambda: AdaptFormer(bottleneck=1, biases=False), 1, 12_104),
    (lambda: LoRA(rank=32), 1, 157_448),
    (lambda: AdaptFormer(bottleneck=32, biases=False), None, 381_520),
], ids=["AdaptFormer", "AdaptFormer h=1", "LoRA", "AdaptFormer, head in full precision"])
def test_2_task_file(host: Any, bits: int | None, size: int) -> None:
    """Methods and head; a head of 1 bit has 96 bytes a class and 8 more, one in full precision 4 x 769 a class."""
    tuner = _task("meta", host, bits)
    head = outside(tuner)
    assert _bytes(head) == (4 * 769 * 100 if bits is None else 96 * 100 + 8)
    assert _bytes(tuner.methods[0].tensors()) + _bytes(head) == size


def test_2_task_file_as_written(tmp_path: Path) -> None:
    """The tensors in the file of a run; before them a header that names them."""
    save_run_adapter(_task("cpu", lambda: AdaptFormer(bottleneck=32, biases=False), 1), tmp_path)
    file = tmp_path / TENSORS
    assert _bytes(load_file(file)) == 83_528
    assert file.stat().st_size - 8 - int.from_bytes(file.read_bytes()[:8], "little") == 83_528


def _quantized(bits: int, family: str = "timm_vit", host: Any = None, dtype: torch.dtype = torch.float32
               ) -> tuple[nn.Module, Any, Any]:
    model = make(family, dtype=dtype)
    method = (LoRA(rank=4) if host is None else host).attach(model)
    quantize = Quantize(bits=bits).attach(model)
    randomize(method)
    return model, method, quantize


@pytest.mark.parametrize("host", ["LoRA", "Houlsby", "AdaLoRA", "DoRA"])
@pytest.mark.parametrize("bits", [1, 2, 4])
def test_3_round_trip(bits: int, host: str, tmp_path: Path) -> None:
    """A file computes the same to the bit; each matrix has 2^bits values and bits / 8 bytes a number."""
    model, method, quantize = _quantized(bits, host=method_class(host)())
    inputs = batch("timm_vit")
    for graft in quantize.grafts:
        matrix = graft.site.full_weight
        values = graft(matrix, verb="weight").detach().unique()
        assert min(2**bits, matrix.numel()) // 3 < len(values) <= 2**bits
        if bits == 1:
            expected = matrix.mean() + torch.tensor([-0.67449, 0.67449]) * matrix.std()
            if graft.noise is None:
                torch.testing.assert_close(values, expected.detach())
        parts = graft.pack(matrix.detach())
        assert parts["codes"].numel() == math.ceil(matrix.numel() * bits / 8)
    from core.adapters.load import save_adapter

    save_adapter([method, quantize], tmp_path)
    other = make("timm_vit")
    loaded = load_adapter(tmp_path, other)
    assert torch.equal(outputs(other, inputs), outputs(model, inputs))
    again = tmp_path / "again"
    save_adapter(loaded, again)
    one, two = load_file(tmp_path / "adapter.safetensors"), load_file(again / "adapter.safetensors")
    assert one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in one)


@pytest.mark.parametrize(("bits", "published"), [
    (1, [0.67449]), (2, [0.37775, 1.26572]),
    (4, [0.10555, 0.31904, 0.54007, 0.77519, 1.03401, 1.33311, 1.70774, 2.26549])])
def test_4_levels_are_a_fixed_point(bits: int, published: list[float]) -> None:
    """Middles between levels and medians of what lies between middles, in turn, move nothing any more."""
    levels = torch.tensor(positive_levels(bits), dtype=torch.float64)
    assert torch.allclose(levels, torch.tensor(published, dtype=torch.float64), atol=5e-6, rtol=0)
    middles = torch.cat([torch.zeros(1), (levels[1:] + levels[:-1]) / 2, torch.full((1,), torch.inf)])
    shares = torch.special.ndtr(middles.double())
    assert float((torch.special.ndtri((shares[1:] + shares[:-1]) / 2) - levels).abs().max()) < 1e-9


def test_4_levels() -> None:
    """1 bit: E (z - Q)^2 = 0.3786, and the level is the median of |z|; all levels are the medians of their bins."""
    z = torch.special.ndtri(torch.arange(1, 2_000_000, dtype=torch.float64) / 2_000_000)
    for bits in (1, 2, 4):
        graft = QuantizedGraft(parameter_sites(nn.Linear(4, 4), ["weight"])[0], bits)
        _, codes = graft._codes(z, torch.tensor(0.0), torch.tensor(1.0 - 1e-5))
        for code, level in enumerate(graft.levels.tolist()):
            assert float(z[codes == code].median()) == pytest.approx(level, abs=2e-3)
        if bits == 1:
            assert float((z - graft.levels.double()[codes]).pow(2).mean()) == pytest.approx(0.3786, abs=1e-4)


@pytest.mark.parametrize("bits", [1, 2, 4])
def test_5_gradient(bits: int) -> None:
    """Of the latent matrix: with Q for the identity, and through mean and deviation."""
    linear = nn.Linear(6, 5, dtype=torch.float64)
    graft = QuantizedGraft(parameter_sites(linear, ["weight"])[0], bits)
    w = linear.weight.detach().clone().requires_grad_()
    upstream = torch.randn(5, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    (graft.weight(w) * upstream).sum().backward()
    with torch.no_grad():
        n, mean, deviation = w.numel(), w.mean(), w.std()
        z = (w - mean) / (deviation + 1e-5)
        q = (graft.weight(w) - mean) / deviation
        of_deviation = (w - mean) / ((n - 1) * deviation)
        direct = deviation / (deviation + 1e-5) * (upstream - upstream.mean())
        through = ((q - z * deviation / (deviation + 1e-5)) * upstream).sum() * of_deviation
        torch.testing.assert_close(w.grad, direct + through + upstream.mean(), rtol=1e-8, atol=1e-10)


def test_6_merging() -> None:
    """LoRA merges as quantized; Quantize itself refuses, and so does a bottleneck."""
    model, method, quantize = _quantized(1, dtype=torch.float64)
    inputs = batch("timm_vit", dtype=torch.float64)
    before = outputs(model, inputs)
    with quantize.disabled():
        assert distance(outputs(model, inputs), before) > 1e-3
    method.merge()
    assert distance(outputs(model, inputs), before) < 1e-10
    with pytest.raises(ScionError, match="cannot be merged"):
        quantize.merge()


def test_6_the_start_is_no_identity_but_learns() -> None:
    """The zeros of B are seen as small noise, of which 1 bit makes +-0.67 sigma; every matrix has a gradient."""
    model, inputs = make("timm_vit"), batch("timm_vit")
    plain = outputs(model, inputs)
    method = LoRA().attach(model)
    Quantize().attach(model)
    assert 0 < distance(outputs(model, inputs), plain) < 0.2
    model(inputs).pow(2).sum().backward()
    assert all(bool(t.grad.any()) and bool(torch.isfinite(t.grad).all()) for t in method.trainable().values())


@pytest.mark.parametrize("host", [lambda: LoRA(rank=4), lambda: AdaptFormer(bottleneck=4, biases=False)],
                         ids=["LoRA", "AdaptFormer"])
def test_6_and_7_in_full_precision_and_at_scale_zero(host: Any) -> None:
    """The hosts alone start as the identity; with s = 0 a quantized one leaves the backbone as it is, to the bit."""
    model, inputs = make("timm_vit"), batch("timm_vit")
    plain = outputs(model, inputs)
    method = host().attach(model)
    assert torch.equal(outputs(model, inputs), plain) and method.mergeable == (method.name == "LoRA")
    Quantize().attach(model)
    assert not torch.equal(outputs(model, inputs), plain)
    for graft in method.grafts:
        graft.scale = 0.0
    assert torch.equal(outputs(model, inputs), plain)


def test_hosts_are_named_or_refused() -> None:
    model = make("timm_vit")
    LoRA(name="one").attach(model)
    LoRA(name="two").attach(model)
    with pytest.raises(ScionError, match="did you mean 'two'|attached before it are one, two"):
        Quantize(methods=["twoo"]).attach(model)
    quantize = Quantize(methods=["two"]).attach(model)
    assert all(".two." in graft.site.name for graft in quantize.grafts) and len(quantize.grafts) == 8
    shared = make("timm_vit")
    method_class("MoS")(rank=2, targets=("q", "mlp.down")).attach(shared)  # type: ignore[call-arg]
    with pytest.raises(ScionError, match="cannot be quantized"):
        Quantize().attach(shared)
    with pytest.raises(ScionError, match="bits 3"):
        Quantize(bits=3)


def test_trains_resumes_and_is_stored_small(tmp_path: Path) -> None:
    def methods() -> list[Any]:
        return [LoRA(rank=8), Quantize(bits=1)]

    whole = run(tmp_path, *methods(), listen=ModelCheckpoint(tmp_path, "{step}", every_n_train_steps=5, save_top_k=-1))
    again = run(tmp_path, *methods(), checkpoint=tmp_path / "step=5.ckpt")
    for (name, one), two in zip(whole.state_dict().items(), again.state_dict().values(), strict=True):
        assert torch.equal(one, two), name
    stored: dict[str, Tensor] = whole.methods[0].tensors()
    numbers = sum(t.numel() for t in whole.methods[0].trainable().values())
    assert sum(t.numel() * t.element_size() for t in stored.values()) == numbers // 8 + 8 * len(stored) // 2
    whole.eval()
    images = torch.randn(3, 3, 16, 16)
    from core.adapters.load import save_adapter
    from tests.papers.training import Deep

    save_adapter(whole.methods, tmp_path / "adapter")
    torch.manual_seed(0)
    fresh = Deep().eval()
    load_adapter(tmp_path / "adapter", fresh)
    with torch.no_grad():
        assert torch.equal(fresh(images), whole.backbone(images))


def test_alone_it_refuses_to_train(tmp_path: Path) -> None:
    with pytest.raises(ScionError, match="put it behind one"):
        run(tmp_path, Quantize())
