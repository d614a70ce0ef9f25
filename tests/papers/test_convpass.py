"""Checks of Convpass: its entry, on blocks written out."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from core.anatomy import Anatomy, dissect
from core.errors import ScionError
from core.graft import hidden_in, hidden_out
from core.peft import method_class
from tests.models import batch, make
from tests.rows import Row, Variant
from tests.toolkit import distance, outputs, randomize


def convpass_count(anatomy: Anatomy, method: Any) -> int:
    m = method.bottleneck
    return sum(2 * m * s.width + 9 * m * m + 2 * m + s.width for s in method.sites(anatomy))


ROWS = {
    "Convpass": Row(
        {"both": Variant({"bottleneck": 4, "dropout": 0.0}, learns={"lr": 1e-2}),
         "mlp": Variant({"bottleneck": 3, "targets": ("mlp",), "scale": 4.0}, learns={"lr": 1e-2})},
        trained=convpass_count,
        cards=(("vit_b16", {}, 327_552), ("vit_b16", {"targets": ("attention",)}, 163_776)),
        bad=(({"bottleneck": 0}, "bottleneck 0"), ({"scale": 0}, "scale 0"), ({"dropout": 1.0}, "dropout 1"),
             ({"targets": ("q",)}, "no sublayer")),
        random=True, operators=24, saved=0.9, without_attention={"targets": ("mlp",)},
        artifact={"bottleneck": 1},
        refused={family: f"the tokens of {name} are no grid" for family, name in {
            "bert": "BertModel", "roberta": "RobertaModel", "albert": "AlbertModel", "t5": "T5Model",
            "llama": "LlamaModel", "mistral": "MistralModel", "qwen2": "Qwen2Model", "gemma": "GemmaModel",
            "starcoder2": "Starcoder2Model", "gpt2": "GPT2Model", "gpt_neox": "GPTNeoXModel", "codegen": "CodeGenModel",
            "clip_text": "CLIPTextModel", "distilbert": "DistilBertModel", "electra": "ElectraModel",
            "mpnet": "MPNetModel", "deberta": "DebertaV2Model", "modernbert": "ModernBertModel",
            "qwen3": "Qwen3Model", "gemma2": "Gemma2Model", "gemma3": "Gemma3TextModel",
            "phi": "PhiModel", "phi3": "Phi3Model", "opt": "OPTDecoder", "bloom": "BloomModel",
            "gpt_neo": "GPTNeoModel", "gpt_bigcode": "GPTBigCodeModel", "xglm": "XGLMModel"}.items()},
    ),
}

Convpass: Any = method_class("Convpass")


def _quick(x: Tensor) -> Tensor:
    return x * torch.sigmoid(1.702 * x)


def convolved(graft: Any, x: Tensor, height: int, width: int, special: int) -> Tensor:
    """1x1 down, QuickGELU, a 3x3 convolution on the grid, and on each special token as an image of one pixel, then
    QuickGELU, 1x1 up, times s."""
    z = _quick(F.linear(x, graft.down.weight, graft.down.bias))
    image = z[:, special:].reshape(len(z), height, width, -1).permute(0, 3, 1, 2)
    image = F.conv2d(image, graft.conv.weight, graft.conv.bias, padding=1)
    pixels = [F.conv2d(z[:, i, :, None, None], graft.conv.weight, graft.conv.bias, padding=1).flatten(1)[:, None]
              for i in range(special)]
    z = torch.cat([*pixels, image.flatten(2).transpose(1, 2)], 1)
    return graft.scale * F.linear(_quick(z), graft.up.weight, graft.up.bias)


@pytest.mark.parametrize(("family", "height", "width", "special"), [
    ("timm_vit", 4, 4, 1), ("vit", 4, 4, 1), ("ast", 4, 3, 2), ("clip_vision", 4, 4, 1)])
def test_1_beside_both_sublayers(family: str, height: int, width: int, special: int) -> None:
    """x + attn(norm1 x) + s conv(norm1 x), and so at the MLP; a spectrogram's grid is no square."""
    model = make(family, dtype=torch.float64)
    method = Convpass(bottleneck=3, scale=0.7, dropout=0.0).attach(model)
    randomize(method, size=0.5)
    seen: dict[str, tuple[Any, tuple, dict[str, Any], Tensor]] = {}
    for graft in method.grafts:
        graft.site.module.register_forward_hook(lambda module, args, kwargs, out, graft=graft: seen.update({
            graft.site.name: (graft, args, kwargs, hidden_out(out))}), with_kwargs=True)
    outputs(model, batch(family, dtype=torch.float64))
    calls = dict(seen)
    assert list(calls) == ["0.attention", "0.mlp", "1.attention", "1.mlp"]
    for graft, args, kwargs, found in calls.values():
        with torch.no_grad(), method.disabled():
            frozen = hidden_out(graft.site.module(*args, **kwargs))
        change = convolved(graft, hidden_in(args, kwargs), height, width, special).detach()
        assert distance(found, frozen + change) < 1e-12 and distance(found, frozen) > 1e-2


def test_1_the_grid_is_the_spectrogram_s() -> None:
    """A convolution on AST's tokens reaches the patches beside each other in time and frequency, and no others."""
    model = make("ast")
    inner: Any = model.model
    grid = dissect(model).blocks[0].grid
    assert grid is not None
    sound = torch.zeros(1, 24, 32)
    with torch.no_grad():
        silence = inner.embeddings(sound)
        for time in range(3):
            for mel in range(4):
                patch = sound.clone()
                patch[:, 8 * time:8 * time + 8, 8 * mel:8 * mel + 8] = 1.0
                special, image = grid.split((inner.embeddings(patch) - silence).abs())
                assert not special.any()
                where = (image.sum(1)[0] > 1e-6).nonzero().tolist()
                assert where == [[mel, time]]


def test_2_swin_convolves_the_whole_map() -> None:
    """Beside attention in (shifted) windows it reads the map behind the norm, uncut, and is added to the map."""
    model, plain, inputs = make("timm_swin"), make("timm_swin"), batch("timm_swin")
    method = Convpass(bottleneck=3, scale=0.7, dropout=0.0).attach(model)
    randomize(method, size=0.3)
    grafts = {graft.site.name: graft for graft in method.grafts}
    assert "0.attention.branch" in grafts

    def written_out(block: Any, index: int) -> Any:
        def forward(x: Tensor) -> Tensor:
            b, h, w, c = x.shape
            normed = block.norm1(x)
            change = convolved(grafts[f"{index}.attention.branch"], normed.reshape(b, h * w, c), h, w, 0)
            x = x + block._attn(normed) + change.view(b, h, w, c)
            normed = block.norm2(x).reshape(b, h * w, c)
            change = convolved(grafts[f"{index}.mlp"], normed, h, w, 0)
            return x + (block.mlp(normed) + change).view(b, h, w, c)
        return forward

    for index, block in enumerate(dissect(plain).blocks):
        block.module.forward = written_out(block.module, index)
    expected = outputs(plain, inputs)
    assert distance(expected, outputs(make("timm_swin"), inputs)) > 1e-2
    assert distance(outputs(model, inputs), expected) < 1e-5


def test_3_start() -> None:
    """Down Xavier, up zero, the convolution a centre tap that leaves its channels as they are."""
    model, inputs = make("timm_vit"), batch("timm_vit")
    expected = outputs(model, inputs)
    method = Convpass(bottleneck=5).attach(model)
    assert torch.equal(outputs(model, inputs), expected)
    for graft in method.grafts:
        image = torch.randn(1, 5, 4, 4, generator=torch.Generator().manual_seed(0))
        with torch.no_grad():
            assert torch.equal(graft.conv(image), image)
        assert graft.down.weight.abs().max() <= (6 / (32 + 5)) ** 0.5 and not graft.up.weight.any()


def test_4_other_sizes() -> None:
    """Images of another size than the described one are taken to be square; what is no grid is refused."""
    model: Any = make("timm_vit").model
    method = Convpass(bottleneck=3, dropout=0.0).attach(model)
    randomize(method)
    x = torch.randn(2, 1 + 9, 32, generator=torch.Generator().manual_seed(0))
    block = dissect(model).blocks[0]
    with torch.no_grad():
        grown = block.module(x)
        graft: Any = next(g for g in method.grafts if g.site.name == "0.mlp")
        assert graft.site.around.grid.split(x)[1].shape == (2, 32, 3, 3) and grown.shape == x.shape
        with pytest.raises(ScionError, match="nor a square"):
            block.module(x[:, :-1])
