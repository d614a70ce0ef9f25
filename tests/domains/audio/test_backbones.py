"""AST by name, by path and by shape; its position table; and what is said of names that lead nowhere."""

from __future__ import annotations

import json
import time
from pathlib import Path

import pytest
import torch

from core.anatomy import dissect
from core.errors import ScionError
from domains.audio import AST, backbones
from domains.audio.backbones import DEFAULT, resize_positions


@pytest.mark.parametrize(("frames", "size"), [(500, 85_708_032), (400, 85_615_872), (100, 85_339_392)])
def test_size_of_ast_base(frames: int, size: int) -> None:
    with torch.device("meta"):
        backbone = AST(name=DEFAULT, pretrained=False, frames=frames)
    assert sum(parameter.numel() for parameter in backbone.model.parameters()) == size
    assert backbone.dim == 768 and backbone.model.config._attn_implementation == "sdpa"
    tokens = {500: 590, 400: 470, 100: 110}[frames]
    assert backbone.model.embeddings.position_embeddings.shape == (1, tokens, 768)


def test_outline_is_what_is_built() -> None:
    for name in backbones.SHAPES:
        with torch.device("meta"):
            anatomy = dissect(AST(name=name, pretrained=False))
        assert AST.outline(name) == (backbones.ROLES, len(anatomy.blocks))
        assert set(backbones.ROLES) == set(anatomy.roles)
    assert AST.outline("auto") is None


def test_feature_is_the_mean_over_all_tokens() -> None:
    backbone = AST("nano", pretrained=False, frames=48).eval()
    bank = torch.randn(2, 48, 128)
    tokens = backbone.model(bank).last_hidden_state
    assert tokens.shape == (2, 2 + 8 * 3, 128)
    assert torch.equal(backbone(bank), tokens.mean(dim=1))
    with pytest.raises(ScionError, match=r"\[batch, 48, 128\], got \[2, 64, 128\]"):
        backbone(torch.randn(2, 64, 128))


def test_positions_are_cut_or_interpolated() -> None:
    table = torch.arange(2 + 12 * 101, dtype=torch.float32).view(1, -1, 1)
    cut = resize_positions(table, (12, 101), (12, 49))
    assert torch.equal(cut[:, :2], table[:, :2])  # the special two stay
    assert torch.equal(cut[0, 2:, 0].view(12, 49), table[0, 2:, 0].view(12, 101)[:, 26:75])  # the middle is kept
    line = resize_positions(table, (12, 101), (12, 101))
    assert torch.equal(line, table)
    ramp = torch.cat([torch.zeros(2), torch.arange(4.0).repeat(3)]).view(1, -1, 1)
    longer = resize_positions(ramp, (3, 4), (3, 8))[0, 2:, 0].view(3, 8)
    torch.testing.assert_close(longer[1], torch.tensor([0, 0.25, 0.75, 1.25, 1.75, 2.25, 2.75, 3.0]))
    finer = resize_positions(ramp, (3, 4), (5, 2))[0, 2:, 0].view(5, 2)  # one axis grows, one is cut
    torch.testing.assert_close(finer, torch.tensor([1.0, 2.0]).expand(5, 2))


def test_lengths_strides_and_zero_positions(tmp_path: Path) -> None:
    torch.manual_seed(0)
    AST("nano", pretrained=False, frames=64).model.save_pretrained(tmp_path)
    same = AST(str(tmp_path)).eval()
    assert same.frames == 64 and same.origin == {"name": str(tmp_path), "pretrained": True, "kind": "local"}
    zero = AST(str(tmp_path), frames=64, zero_positions=True)
    assert not zero.model.embeddings.position_embeddings.any()
    denser = AST(str(tmp_path), frames=100, frequency_stride=10, time_stride=10).eval()
    assert denser.model.embeddings.position_embeddings.shape == (1, 110, 128)
    assert denser(torch.randn(1, 100, 128)).shape == (1, 128)
    bank = torch.randn(1, 64, 128)
    torch.manual_seed(0)
    assert torch.equal(same(bank), AST("nano", pretrained=False, frames=64).eval()(bank))


def test_a_checkpoint_with_a_classifier_and_old_names_loads(tmp_path: Path) -> None:
    """As the AudioSet checkpoint is: a classifier on top, layers under ``encoder.layer``."""
    from safetensors.torch import load_file, save_file
    from transformers import ASTConfig, ASTForAudioClassification

    torch.manual_seed(0)
    config = ASTConfig(**{**backbones.SHAPES["nano"], "num_hidden_layers": 2, "max_length": 64, "num_labels": 5})
    ASTForAudioClassification(config).save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    tensors = load_file(file)
    assert any("encoder.layer.1.attention.attention.query" in name for name in tensors)  # saved under the old names
    save_file({name: tensor + 0.01 for name, tensor in tensors.items()}, file, metadata={"format": "pt"})
    backbone = AST(str(tmp_path))
    whole = ASTForAudioClassification.from_pretrained(tmp_path)
    ours, theirs = backbone.model.state_dict(), whole.audio_spectrogram_transformer.state_dict()
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_names_that_lead_nowhere_give_one_line_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # a cache without the model, and a host that never answers (an address set apart for documentation)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://192.0.2.1")
    pickled, other, broken = tmp_path / "pickled", tmp_path / "other", tmp_path / "broken"
    for folder in (pickled, other, broken):
        folder.mkdir()
        (folder / "config.json").write_text(json.dumps({"model_type": "audio-spectrogram-transformer"}))
    (pickled / "pytorch_model.bin").write_bytes(b"x")
    (other / "config.json").write_text(json.dumps({"model_type": "bert"}))
    for folder in (other, broken):
        (folder / "model.safetensors").write_bytes(b"not safetensors")
    for name, words in ((DEFAULT, "hub does not answer"), ("nana", "did you mean 'nano'"),
                        ("/nowhere", "no config.json"), (str(pickled), "no model.safetensors"),
                        (str(other), "type 'bert'"), (str(broken), "broken")):
        start = time.monotonic()
        with pytest.raises(ScionError, match=words) as caught:
            AST(name)
        assert "\n" not in str(caught.value)
        assert time.monotonic() - start < 5  # the promise to the user, not a measurement
    with pytest.raises(ScionError, match="no shapes are known for 'MIT/ast'"):
        AST("MIT/ast", pretrained=False)
    with pytest.raises(ScionError, match="backbone.frames"):
        AST("nano", pretrained=False, frames=8)


def test_auto_falls_back_to_nano_and_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(backbones, "reachable", lambda *_: False)
    with pytest.warns(UserWarning, match="built-in nano"):
        backbone = AST("auto", frames=112)
    assert backbone.origin["kind"] == "nano" and "built-in nano" in backbone.origin["note"]
