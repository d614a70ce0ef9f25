"""timm's models by name, by file and by shape: what is loaded is what timm loads, and what does not fit is refused."""

from __future__ import annotations

import time
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from safetensors.torch import load_file, save_file
from timm.layers.drop import DropPath
from timm.models import save_for_hf
from torch import Tensor

from core import peft
from core.anatomy import dissect
from core.cli.merge import save_plain
from core.errors import ScionError
from core.peft import make
from core.tasks import Classification
from core.training.finetuner import FineTuner
from core.training.load_run import load_run
from core.training.recorded_model import build, spec
from core.training.run_record import save_run_adapter
from domains.vision import TimmBackbone, backbones

VIT, SWIN = "vit_tiny_patch16_224", "swin_tiny_patch4_window7_224"
BIG_VIT, BIG_SWIN = "vit_base_patch16_224", "swin_base_patch4_window7_224"
CLASSES = 7
Arrays = dict[str, np.ndarray]


@pytest.fixture(autouse=True)
def nowhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An empty cache, and a host that never answers (an address set apart for documentation)."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://192.0.2.1")


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Random weights of the small architectures, in each form."""
    folder = tmp_path_factory.mktemp("weights")
    np.savez(folder / "vit.npz", **published(192, 12, 3, 16))  # type: ignore[arg-type]
    for name, architecture in (("vit", VIT), ("swin", SWIN)):
        write_states(folder, name, architecture)
    yield folder


def write_states(folder: Path, name: str, architecture: str) -> None:
    """A state dict with a classifier, as .pth and as .safetensors."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = timm.create_model(architecture, num_classes=CLASSES)
        state = {key: torch.randn_like(tensor) * 0.02 if tensor.is_floating_point() else tensor
                 for key, tensor in model.state_dict().items()}
    torch.save(state, folder / f"{name}.pth")
    save_file(state, folder / f"{name}.safetensors")


def published(width: int, depth: int, heads: int, patch: int, grid: int = 14) -> Arrays:
    """Random weights under the names and in the layout in which Google published the ViTs."""
    rng = np.random.default_rng(0)
    into: dict[str, tuple[int, ...]] = {
        "cls": (1, 1, width), "embedding/kernel": (patch, patch, 3, width), "embedding/bias": (width,),
        "Transformer/posembed_input/pos_embedding": (1, 1 + grid * grid, width),
        "Transformer/encoder_norm/scale": (width,), "Transformer/encoder_norm/bias": (width,),
        "head/kernel": (width, CLASSES), "head/bias": (CLASSES,), "pre_logits/kernel": (width, width),
        "pre_logits/bias": (width,)}
    for i in range(depth):
        block = f"Transformer/encoderblock_{i}"
        attention, mlp = f"{block}/MultiHeadDotProductAttention_1", f"{block}/MlpBlock_3"
        into |= {f"{block}/LayerNorm_{k}/{part}": (width,) for k in (0, 2) for part in ("scale", "bias")}
        for name in ("query", "key", "value"):
            into |= {f"{attention}/{name}/kernel": (width, heads, width // heads),
                     f"{attention}/{name}/bias": (heads, width // heads)}
        into |= {f"{attention}/out/kernel": (heads, width // heads, width), f"{attention}/out/bias": (width,),
                 f"{mlp}/Dense_0/kernel": (width, 4 * width), f"{mlp}/Dense_0/bias": (4 * width,),
                 f"{mlp}/Dense_1/kernel": (4 * width, width), f"{mlp}/Dense_1/bias": (width,)}
    return {name: rng.standard_normal(shape, dtype=np.float32) * np.float32(0.05) for name, shape in into.items()}


def by_timm(architecture: str, file: Path, **arguments: Any) -> Any:
    """The same file, as timm loads it when it is asked directly."""
    where = {"file": str(file), "custom_load": file.suffix == ".npz"}
    return timm.create_model(architecture, pretrained=True, pretrained_cfg_overlay=where, num_classes=0, **arguments)


def assert_same(ours: TimmBackbone, theirs: Any, size: int = 224) -> None:
    """Bit for bit: all tensors, and the feature of random pictures."""
    mine, other = ours.model.state_dict(), theirs.state_dict()
    assert mine.keys() == other.keys() and all(torch.equal(mine[name], other[name]) for name in mine)
    pictures = torch.randn(1, 3, size, size, generator=torch.Generator().manual_seed(1))
    with torch.inference_mode():
        features = ours.eval()(pictures)
        assert torch.equal(features, theirs.eval()(pictures))
    assert features.shape == (1, ours.dim) and features.isfinite().all() and features.std() > 0


def one_line(name: str, words: str, **arguments: Any) -> str:
    with pytest.raises(ScionError, match=words) as caught:
        TimmBackbone(name, **arguments)
    text = str(caught.value)
    assert text.startswith("backbone.") and "\n" not in text and len(text) < 800
    return text


# ------------------------------------------------------------------------------------------------- local files


@pytest.mark.parametrize(("architecture", "file"), [
    (VIT, "vit.npz"), (VIT, "vit.safetensors"), (VIT, "vit.pth"), (SWIN, "swin.safetensors"), (SWIN, "swin.pth")])
def test_local_files_load_as_timm_loads_them(architecture: str, file: str, files: Path) -> None:
    ours = TimmBackbone(f"{architecture}@{files / file}")
    assert_same(ours, by_timm(architecture, files / file))
    assert ours.origin == {"name": f"{architecture}@{files / file}", "pretrained": True, "kind": "local", "size": 224}
    assert "state_dict" not in ours.model.pretrained_cfg  # type: ignore[operator]


@pytest.mark.slow
@pytest.mark.parametrize(("architecture", "ending"), [
    (BIG_VIT, ".npz"), (BIG_VIT, ".safetensors"), (BIG_VIT, ".pth"), (BIG_SWIN, ".safetensors"), (BIG_SWIN, ".pth")])
def test_full_size_files_load_as_timm_loads_them(architecture: str, ending: str, tmp_path: Path) -> None:
    if ending == ".npz":
        np.savez(tmp_path / "big.npz", **published(768, 12, 12, 16))  # type: ignore[arg-type]
    else:
        write_states(tmp_path, "big", architecture)
    file = tmp_path / f"big{ending}"
    assert_same(TimmBackbone(f"{architecture}@{file}"), by_timm(architecture, file))


def test_published_arrays_land_where_they_belong(files: Path) -> None:
    """Without timm's own loader: the layouts, written down once more."""
    arrays, state = np.load(files / "vit.npz"), TimmBackbone(f"{VIT}@{files / 'vit.npz'}").model.state_dict()
    block = "Transformer/encoderblock_5"
    keys = arrays[f"{block}/MultiHeadDotProductAttention_1/key/kernel"].reshape(192, 192).T
    assert np.array_equal(state["blocks.5.attn.qkv.weight"][192:384].numpy(), keys)
    out = arrays[f"{block}/MultiHeadDotProductAttention_1/out/kernel"].reshape(192, 192).T
    assert np.array_equal(state["blocks.5.attn.proj.weight"].numpy(), out)
    assert np.array_equal(state["blocks.5.mlp.fc1.weight"].numpy(), arrays[f"{block}/MlpBlock_3/Dense_0/kernel"].T)
    assert np.array_equal(state["patch_embed.proj.weight"].numpy(), arrays["embedding/kernel"].transpose(3, 2, 0, 1))
    assert not any(name.startswith("head") for name in state)


@pytest.mark.parametrize(("architecture", "file"), [
    (VIT, "vit.npz"), (VIT, "vit.safetensors"), (SWIN, "swin.safetensors")])
def test_another_size_is_interpolated_as_timm_does_it(architecture: str, file: str, files: Path) -> None:
    ours = TimmBackbone(f"{architecture}@{files / file}", size=96)
    assert_same(ours, by_timm(architecture, files / file, img_size=96), size=96)
    assert ours.size == ours.origin["size"] == 96
    if architecture == VIT:
        assert ours.model.pos_embed.shape == (1, 1 + 36, 192)
    with pytest.raises(ScionError, match=r"\[batch, 3, 96, 96\], got \[1, 3, 224, 224\]: set backbone.size"):
        ours(torch.zeros(1, 3, 224, 224))


@pytest.mark.parametrize("wrap", [
    lambda state: {"state_dict": state, "epoch": 3}, lambda state: {"model": state},
    lambda state: {"model_ema": state, "model": {name: tensor + 1 for name, tensor in state.items()}},
    lambda state: {"state_dict": {f"module.{name}": tensor for name, tensor in state.items()}},
    lambda state: {name: tensor for name, tensor in state.items() if not name.startswith("head.")}])
def test_wrapped_and_headless_state_dicts(wrap: Any, files: Path, tmp_path: Path) -> None:
    state = torch.load(files / "vit.pth", weights_only=True)
    torch.save(wrap(state), tmp_path / "wrapped.bin")
    loaded = TimmBackbone(f"{VIT}@{tmp_path / 'wrapped.bin'}").model.state_dict()
    assert len(loaded) == len(state) - 2 and all(torch.equal(loaded[name], state[name]) for name in loaded)


def test_swin_under_its_authors_names(files: Path, tmp_path: Path) -> None:
    """Merging at the end of a stage, the classifier beside the last norm, buffers in the file."""
    state = torch.load(files / "swin.pth", weights_only=True)
    old: dict[str, Tensor] = {"layers.0.blocks.1.attn_mask": torch.zeros(64, 49, 49),
                              "layers.0.blocks.0.attn.relative_position_index": torch.zeros(49, 49)}
    for name, tensor in state.items():
        parts = name.replace("head.fc.", "head.").split(".")
        if "downsample" in parts:
            parts[1] = str(int(parts[1]) - 1)
        old[".".join(parts)] = tensor
    torch.save({"model": old}, tmp_path / "old.pth")
    ours = TimmBackbone(f"{SWIN}@{tmp_path / 'old.pth'}")
    assert_same(ours, by_timm(SWIN, files / "swin.pth"))


def test_the_form_may_be_said(files: Path, tmp_path: Path) -> None:
    for file, form in (("vit.npz", "npz"), ("vit.safetensors", "safetensors"), ("vit.pth", "torch")):
        link = tmp_path / "weights"
        link.unlink(missing_ok=True)
        link.symlink_to(files / file)
        backbone = TimmBackbone(f"{VIT}@{link}", form=form)  # type: ignore[arg-type]
        assert torch.equal(backbone.model.state_dict()["cls_token"], by_timm(VIT, files / file).cls_token)
        one_line(f"{VIT}@{link}", "the ending of .* does not tell how to read it; give one of npz, safetensors, torch")
    one_line(f"{VIT}@{files / 'vit.npz'}", "neither auto nor one of", form="pickle")


def test_a_folder_as_timm_writes_it(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = timm.create_model(VIT, depth=2, img_size=64, num_classes=CLASSES)
    save_for_hf(model, str(tmp_path), model_args={"depth": 2, "img_size": 64}, safe_serialization=True)
    ours = TimmBackbone(str(tmp_path))
    assert_same(ours, timm.create_model(f"local-dir:{tmp_path}", pretrained=True, num_classes=0), size=64)
    assert ours.origin == {"name": str(tmp_path), "pretrained": True, "kind": "local", "size": 64}
    other = timm.create_model(f"local-dir:{tmp_path}", pretrained=True, num_classes=0, img_size=32)
    assert_same(TimmBackbone(str(tmp_path), size=32), other, size=32)
    random = TimmBackbone(str(tmp_path), pretrained=False)
    assert random.origin["kind"] == "random" and len(dissect(random).blocks) == 2
    (tmp_path / "model.safetensors").unlink()
    one_line(str(tmp_path), "no model.safetensors or pytorch_model.bin in the folder")
    (tmp_path / "config.json").write_text("{")
    one_line(str(tmp_path), "timm does not build it", pretrained=False)


# ------------------------------------------------------------------------------------------------- the hub


def in_cache(cache: Path, repository: str, file: Path) -> None:
    """What the hub's client leaves of a download."""
    home = cache / f"models--{repository.replace('/', '--')}"
    (home / "refs").mkdir(parents=True, exist_ok=True)
    (home / "refs" / "main").write_text("0" * 40)
    (home / "snapshots" / ("0" * 40)).mkdir(parents=True, exist_ok=True)
    (home / "snapshots" / ("0" * 40) / file.name).symlink_to(file)


def test_cached_models_are_loaded_without_the_net(files: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def asked(*_: Any) -> bool:
        raise AssertionError("the net was asked")

    monkeypatch.setattr(backbones, "reachable", asked)
    (tmp_path / "model.safetensors").symlink_to(files / "vit.safetensors")
    in_cache(tmp_path / "hub", f"timm/{VIT}.augreg_in21k", tmp_path / "model.safetensors")
    for name in (f"{VIT}.augreg_in21k", f"timm/{VIT}.augreg_in21k", f"hf-hub:timm/{VIT}.augreg_in21k"):
        backbone = TimmBackbone(name)
        assert backbone.origin == {"name": name, "pretrained": True, "kind": "hub", "size": 224}
    assert_same(backbone, by_timm(VIT, files / "vit.safetensors"))
    monkeypatch.setattr(backbones, "DEFAULT", f"{VIT}.augreg_in21k")
    assert TimmBackbone().origin["name"] == f"{VIT}.augreg_in21k"


def test_other_peoples_repositories(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = timm.create_model(VIT, depth=1, img_size=32, num_classes=0)
    save_for_hf(model, str(tmp_path / "saved"), model_args={"depth": 1, "img_size": 32}, safe_serialization=True)
    for file in ("config.json", "model.safetensors"):
        in_cache(tmp_path / "hub", "someone/tiny", tmp_path / "saved" / file)
    backbone = TimmBackbone("hf-hub:someone/tiny")
    assert backbone.origin["kind"] == "hub" and backbone.size == 32
    assert torch.equal(backbone.model.pos_embed, model.pos_embed)  # type: ignore[arg-type]
    one_line("someone/other", "not in the cache and the hub does not answer")
    one_line("hf-hub:a/b/c", "neither auto, a name of timm")


def small_nano(folder: Path, name: str = "nano") -> None:
    architecture, arguments = backbones.NANOS[name]
    torch.manual_seed(0)
    model = timm.create_model(architecture, num_classes=0, **arguments)
    save_for_hf(model, str(folder / name), model_args=arguments, safe_serialization=True)


def test_auto_falls_back_to_nano_and_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backbones, "NANO", tmp_path)
    monkeypatch.setattr(backbones, "reachable", lambda *_: False)
    one_line("nano", "weights are missing here; make them by python -m domains.vision.make_nano")
    small_nano(tmp_path)
    with pytest.warns(UserWarning, match="built-in nano"):
        backbone = TimmBackbone(size=64)
    assert backbone.origin["kind"] == backbone.origin["name"] == "nano" and "nano" in backbone.origin["note"]
    assert backbone(torch.zeros(2, 3, 64, 64)).shape == (2, 128)
    assert spec(backbone) == {"class": "vision:TimmBackbone", "name": "nano", "pretrained": True, "size": 64,
                              "drop_path": 0.0, "form": "auto"}


@pytest.mark.parametrize(("name", "dim", "blocks"), [("nano", 128, 4), ("nano_swin", 160, 6)])
def test_nanos(name: str, dim: int, blocks: int) -> None:
    folder = backbones.NANO / name
    if not (folder / "model.safetensors").is_file():
        pytest.skip(f"{folder / 'model.safetensors'} is not there yet: python -m domains.vision.make_nano {name}")
    assert (folder / "model.safetensors").stat().st_size <= 4 * 1024 ** 2
    backbone = TimmBackbone(name).eval()
    assert backbone.origin == {"name": name, "pretrained": True, "kind": "nano", "size": 48}
    assert backbone.dim == dim and len(dissect(backbone).blocks) == blocks
    stored = load_file(folder / "model.safetensors")
    assert all(torch.equal(tensor, stored[key]) for key, tensor in backbone.model.state_dict().items())
    random = TimmBackbone(name, pretrained=False)
    shapes = [{key: tensor.shape for key, tensor in b.model.state_dict().items()} for b in (backbone, random)]
    assert shapes[0] == shapes[1]
    assert TimmBackbone(name, size=96).eval()(torch.zeros(2, 3, 96, 96)).shape == (2, dim)


# ------------------------------------------------------------------------------------------------- shapes


@pytest.mark.parametrize("name", backbones.SHAPES)
def test_outline_is_what_is_built(name: str) -> None:
    with torch.device("meta"):
        backbone = TimmBackbone(name, pretrained=False)
    assert all(parameter.is_meta for parameter in backbone.parameters())
    anatomy, outline = dissect(backbone), TimmBackbone.outline(name)
    assert outline is not None and set(outline[0]) == set(anatomy.roles) and outline[1] == len(anatomy.blocks)


def test_outline_of_other_spellings() -> None:
    assert TimmBackbone.outline(f"{VIT}.augreg_in21k") == TimmBackbone.outline(f"{VIT}@/some/file.npz") \
        == TimmBackbone.outline(f"timm/{VIT}") == TimmBackbone.outline(VIT)
    assert TimmBackbone.outline("auto") is TimmBackbone.outline("./folder") is None


@pytest.mark.parametrize(("name", "size"), [(BIG_VIT, 85_798_656), (BIG_SWIN, 86_743_224), ("convnext_tiny", None)])
def test_size_without_a_classifier(name: str, size: int | None) -> None:
    with torch.device("meta"):
        backbone = TimmBackbone(name, pretrained=False)
    found = sum(parameter.numel() for parameter in backbone.parameters())
    with torch.device("meta"):
        assert found == sum(p.numel() for p in timm.create_model(name, num_classes=0).parameters())
    assert size in (None, found)


@pytest.mark.parametrize(("name", "size"), [
    ("convnext_atto", 70), ("resnet18", 64), ("mobilenetv3_small_050", 64), ("vgg11", 64), (SWIN, 96),
    ("eva02_tiny_patch14_224", 28), ("vit_base_patch16_siglip_224", 32), ("deit_tiny_distilled_patch16_224", 32),
    ("xcit_nano_12_p16_224", 32), ("nano", None), ("nano_swin", None)])
def test_any_architecture_gives_one_feature_of_its_width(name: str, size: int | None) -> None:
    with torch.device("meta"):
        backbone = TimmBackbone(name, pretrained=False, size=size).eval()
        features = backbone(torch.zeros(2, 3, backbone.size, backbone.size))
    assert features.shape == (2, backbone.dim) and backbone.size == (size or 48)


def test_random_weights_are_timms_and_follow_the_seed() -> None:
    torch.manual_seed(3)
    ours = TimmBackbone("nano", pretrained=False, drop_path=0.1)
    torch.manual_seed(3)
    theirs = timm.create_model(backbones.NANOS["nano"][0], num_classes=0, drop_path_rate=0.1,
                               **backbones.NANOS["nano"][1])
    assert_same(ours, theirs, size=48)
    assert ours.origin == {"name": "nano", "pretrained": False, "kind": "random", "size": 48}
    assert TimmBackbone("convnext_atto", pretrained=False, size=80).size == 80


def test_drop_path() -> None:
    def rates(backbone: TimmBackbone) -> list[float]:
        return [module.drop_prob for module in backbone.modules() if isinstance(module, DropPath)]

    with torch.device("meta"):
        given = rates(TimmBackbone("nano_swin", pretrained=False, drop_path=0.3))
        assert rates(TimmBackbone("nano_swin", pretrained=False)) == []  # timm's own default for Swin is 0.1
    assert given == sorted(given) and max(given) == pytest.approx(0.3)
    one_line("vgg11", "backbone.drop_path: vgg11 has no stochastic depth", pretrained=False, drop_path=0.1)
    one_line("nano", "drop_path: 1.0 is no rate", pretrained=False, drop_path=1.0)


# ------------------------------------------------------------------------------------------------- refusals


def test_names_that_lead_nowhere_give_one_line_at_once(files: Path, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    for name, words in (
            ("vit_base_patch16_22", "timm has no model 'vit_base_patch16_22' .did you mean .*'vit_base_patch16_224'"),
            ("nanno", "did you mean 'nano'"),
            (f"{VIT}.augreg_in22k", f"{VIT} has no weights 'augreg_in22k' .did you mean '{VIT}.augreg_in21k"),
            (f"{VIT}.augreg_in21k", "is not in the cache and the hub does not answer"),
            (f"{VIT}@/nowhere/weights.pth", "no file /nowhere/weights.pth"),
            (f"vit_tini_patch16_224@{files / 'vit.pth'}", f"no model 'vit_tini_patch16_224' .did you mean '{VIT}'"),
            (str(files / "vit.pth"), "is a file of weights alone; write ARCHITECTURE@"),
            ("/nowhere", "no folder /nowhere"), (str(tmp_path / "empty"), "no config.json in the folder")):
        start = time.monotonic()
        one_line(name, words)
        assert time.monotonic() - start < 5  # the promise to the user, not a measurement
    one_line("vit_base_patch16_22", "timm has no model", pretrained=False)


def test_damaged_files(files: Path, tmp_path: Path) -> None:
    for name in ("vit.npz", "vit.pth", "vit.safetensors"):
        whole = (files / name).read_bytes()
        for content in (whole[:len(whole) // 2], b"", b"<html>not found</html>"):
            (tmp_path / name).write_bytes(content)
            assert str(tmp_path / name) in one_line(f"{VIT}@{tmp_path / name}", "damaged")
    middle = len(whole := (files / "vit.npz").read_bytes()) // 2
    (tmp_path / "vit.npz").write_bytes(whole[:middle] + bytes(64) + whole[middle + 64:])
    one_line(f"{VIT}@{tmp_path / 'vit.npz'}", "damaged.*CRC")


def test_files_of_another_architecture(files: Path) -> None:
    one_line(f"{SWIN}@{files / 'vit.pth'}", "does not fit the architecture")
    one_line(f"{VIT}@{files / 'swin.safetensors'}", "does not fit the architecture")
    one_line(f"vit_small_patch16_224@{files / 'vit.pth'}", "does not fit the architecture .*size mismatch")
    one_line(f"vit_small_patch16_224@{files / 'vit.npz'}", r"is \[.*192.*\] in the file, \[.*384.*\] in the")
    one_line(f"{SWIN}@{files / 'vit.npz'}", "timm reads no npz file into a SwinTransformer")
    one_line(f"vit_tiny_patch16_384@{files / 'swin.pth'}", "does not fit the architecture")


def test_files_that_lack_or_exceed(files: Path, tmp_path: Path) -> None:
    arrays = dict(np.load(files / "vit.npz"))
    state = torch.load(files / "vit.pth", weights_only=True)

    def npz(words: str, **changes: Any) -> None:
        kept = {**arrays, **changes}
        np.savez(tmp_path / "changed.npz", **{name: value for name, value in kept.items() if value is not None})
        one_line(f"{VIT}@{tmp_path / 'changed.npz'}", words)

    def pth(words: str, **changes: Any) -> None:
        kept = {**state, **changes}
        torch.save({name: value for name, value in kept.items() if value is not None}, tmp_path / "changed.pth")
        one_line(f"{VIT}@{tmp_path / 'changed.pth'}", words)

    npz("Transformer/encoderblock_3/LayerNorm_0/bias", **{"Transformer/encoderblock_3/LayerNorm_0/bias": None})
    npz("13 blocks in the file, 12 in the arch", **{"Transformer/encoderblock_12/LayerNorm_0/bias": np.zeros(192)})
    # one number for all channels: copied without a word, were shapes not compared
    npz(r"norm.bias is \[1\] in the file, \[192\]", **{"Transformer/encoder_norm/bias": np.zeros(1, np.float32)})
    pth('Missing key.*"blocks.3.norm1.bias"', **{"blocks.3.norm1.bias": None})
    pth('Unexpected key.*"blocks.12.norm1.bias"', **{"blocks.12.norm1.bias": torch.zeros(192)})
    pth("size mismatch for norm.bias", **{"norm.bias": torch.zeros(1)})
    layer_scale = "vit_small_patch14_dinov2"  # has tensors that the published form knows nothing of
    np.savez(tmp_path / "small.npz", **published(384, 12, 6, 14, grid=37))  # type: ignore[arg-type]
    one_line(f"{layer_scale}@{tmp_path / 'small.npz'}", "the file lacks blocks.0.ls1.gamma")


def test_pickled_objects_are_not_read(files: Path, tmp_path: Path) -> None:
    done = tmp_path / "executed"

    class Trap:
        def __reduce__(self) -> Any:
            return Path.touch, (done,)

    torch.save({"state_dict": torch.load(files / "vit.pth", weights_only=True), "more": Trap()}, tmp_path / "a.pth")
    one_line(f"{VIT}@{tmp_path / 'a.pth'}", "pickled objects, which are not read")
    arrays = dict(np.load(files / "vit.npz"))
    for name in ("cls", "something_else"):
        np.savez(tmp_path / "a.npz", **{**arrays, name: np.array([Trap()], dtype=object)})
        one_line(f"{VIT}@{tmp_path / 'a.npz'}", f"{name}.npy is a pickled object, which is not read")
    assert not done.exists()
    torch.save({"state_dict": {"a": 1}}, tmp_path / "a.pth")
    one_line(f"{VIT}@{tmp_path / 'a.pth'}", "holds no state dict")


@pytest.mark.parametrize(("name", "size", "words"), [
    (VIT, 100, f"100 is no multiple of the patch of {VIT}, 16"), ("nano_swin", 50, "no multiple of the patch"),
    (VIT, 8, "no multiple"), ("nano", 0, "backbone.size: 0 is too small")])
def test_sizes_that_do_not_fit(name: str, size: int, words: str) -> None:
    assert "backbone.size" in one_line(name, words, size=size, pretrained=False)


# ------------------------------------------------------------------------------------------------- in a run


def test_an_adapter_rebuilds_its_backbone(files: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """From a path relative to where the run was started, found again from elsewhere."""
    monkeypatch.chdir(files)
    backbone = TimmBackbone(f"{VIT}@vit.npz", size=64, drop_path=0.1)
    tuner = FineTuner(backbone, Classification(), ["left", "right"], checkpointing=True)
    method = make("LoRA", {"rank": 2}).attach(tuner.backbone)
    torch.manual_seed(0)
    pictures = torch.randn(2, 3, 64, 64)
    loss = tuner.loss((pictures, torch.tensor([0, 1])))
    loss.backward()
    trained = method.trainable().values()
    assert trained and all(p.grad is not None for p in trained) and not backbone.model.pos_embed.requires_grad
    with torch.no_grad():
        for tensor in method.trainable().values():
            tensor.add_(torch.randn_like(tensor) * 0.1)
    save_run_adapter(tuner, tmp_path / "adapter")
    monkeypatch.chdir(tmp_path)
    again = load_run(str(tmp_path))
    assert again.backbone.config["name"] == f"{VIT}@{files / 'vit.npz'}"
    with torch.inference_mode():
        assert torch.equal(again(pictures), tuner.eval()(pictures))
        assert not torch.equal(again.backbone(pictures), TimmBackbone(again.backbone.config["name"],
                                                                      size=64).eval()(pictures))


def test_what_merge_writes_is_read_by_timm_and_here(files: Path, tmp_path: Path) -> None:
    backbone = TimmBackbone(f"{VIT}@{files / 'vit.pth'}", size=64)
    save_plain(FineTuner(backbone, Classification(), ["left", "right"]), tmp_path)
    assert_same(TimmBackbone(str(tmp_path)), backbone.model, size=64)
    assert_same(backbone, timm.create_model(f"local-dir:{tmp_path}", pretrained=True), size=64)


def test_a_recorded_backbone_with_random_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recorded = spec(TimmBackbone("nano", pretrained=False, size=32, drop_path=0.2))
    assert recorded is not None
    first, second = build(recorded, 5), build(recorded, 5)
    assert_same(first, second.model, size=32)
    small_nano(tmp_path)  # a folder whose name holds an @ is a folder all the same
    (tmp_path / "nano").rename(tmp_path / "nano@home")
    monkeypatch.chdir(tmp_path)
    recorded = spec(TimmBackbone("nano@home"))
    assert recorded is not None and recorded["name"] == str(tmp_path / "nano@home")


@pytest.mark.slow
def test_nothing_heavy_is_imported_with_the_domain() -> None:
    import subprocess
    import sys

    code = ("import sys, domains.vision.backbones; "
            "print([name for name in ('timm', 'torchvision', 'transformers', 'lightning') if name in sys.modules])")
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert shown.strip() == "[]"


def test_a_name_of_old_still_works() -> None:
    with warnings.catch_warnings(), torch.device("meta"):
        warnings.simplefilter("ignore")
        backbone = TimmBackbone("vit_base_patch16_224_in21k", pretrained=False)
    assert backbone.model.pretrained_cfg["hf_hub_id"] == "timm/vit_base_patch16_224.augreg_in21k"  # type: ignore


def test_what_the_model_holds_itself_can_be_adapted() -> None:
    """The class token and the positions belong to no part of the model, so that it must be called as a module."""
    backbone = TimmBackbone(name="nano")
    method: Any = peft.method_class("LTSFT")().attach(backbone)
    pictures = torch.randn(2, 3, backbone.size, backbone.size)
    backbone(pictures).square().mean().backward()
    torch.optim.SGD(method.trainable().values(), lr=0.1).step()
    method.advance()
    backbone(pictures).square().mean().backward()
    trained = method.trainable()
    assert any("cls_token" in name for name in trained) and any("pos_embed" in name for name in trained)
    assert [name for name, tensor in trained.items() if tensor.grad is None] == []
