"""Tiny backbones of every family, built from their configurations: one row in FAMILIES each.

Values are a function of (seed, parameter name) and of nothing else: no library's initialisation enters, so stored
outputs stay valid and a failing test can be repeated.
"""

from __future__ import annotations

import copy
import functools
import io
import pickle
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from core.anatomy.families.transformers_decoders import codegen_attention, gpt_neo_attention
from core.random_state import seed_of

WIDTH = 32
"""Width of every family's feature."""
VOCABULARY = 50


class Pooled(nn.Module):
    """A thin wrapper, as a domain writes one: the library's model, and one feature a sample [batch, dim]."""

    def __init__(self, model: nn.Module, token: int | None = 0, padding: int | None = None) -> None:
        super().__init__()
        self.model = model
        self.decodes = hasattr(model, "encoder") and hasattr(model, "decoder")
        self.token, self.padding = token, padding

    def forward(self, inputs: Tensor) -> Tensor:
        """inputs [batch, ...] -> features [batch, dim]; ids equal to ``padding`` are masked out. A decoder gets the
        ids that its encoder gets."""
        options = {} if self.padding is None else {"attention_mask": (inputs != self.padding).long()}
        if self.decodes:
            options["decoder_input_ids"] = inputs
        out = self.model(inputs, **options)
        if self.token is None and not isinstance(out, Tensor):
            return out.pooler_output
        out = out if isinstance(out, Tensor) else out.last_hidden_state
        return out if out.dim() == 2 else out[:, self.token]


def _timm_vit(width: int = WIDTH, classes: int = 0) -> nn.Module:
    import timm

    return timm.create_model("vit_tiny_patch16_224", img_size=32, patch_size=8, embed_dim=width, depth=2, num_heads=4,
                             num_classes=classes)


def _timm_swin(width: int = WIDTH) -> nn.Module:
    import timm

    return timm.create_model("swin_tiny_patch4_window7_224", img_size=16, patch_size=2, window_size=4,
                             embed_dim=width // 2, depths=(2, 2), num_heads=(2, 4), num_classes=0, drop_path_rate=0.1)


def _bert(width: int = WIDTH) -> nn.Module:
    from transformers import BertConfig, BertModel

    config = BertConfig(vocab_size=VOCABULARY, hidden_size=width, num_hidden_layers=2, num_attention_heads=4,
                        intermediate_size=2 * width, max_position_embeddings=32)
    return BertModel(config, add_pooling_layer=False)


def _ast(width: int = WIDTH) -> nn.Module:
    from transformers import ASTConfig, ASTModel

    config = ASTConfig(hidden_size=width, num_hidden_layers=2, num_attention_heads=4, intermediate_size=2 * width,
                       patch_size=8, frequency_stride=8, time_stride=8, max_length=24, num_mel_bins=32)
    return ASTModel(config)


def _llama_config(width: int, **changes: Any) -> Any:
    from transformers import LlamaConfig

    return LlamaConfig(vocab_size=VOCABULARY, hidden_size=width, num_hidden_layers=2, num_attention_heads=4,
                       num_key_value_heads=2, intermediate_size=2 * width, max_position_embeddings=32, use_cache=False,
                       **changes)


def _llama(width: int = WIDTH) -> nn.Module:
    from transformers import LlamaModel

    return LlamaModel(_llama_config(width))


def t5_config(width: int = WIDTH, **changes: Any) -> Any:
    from transformers import T5Config

    return T5Config(**{"vocab_size": VOCABULARY, "d_model": width, "d_kv": width // 4, "d_ff": 2 * width,
                       "num_layers": 2, "num_heads": 4, "relative_attention_num_buckets": 8,
                       "relative_attention_max_distance": 16, "use_cache": False, **changes})


def _t5(width: int = WIDTH) -> nn.Module:
    from transformers import T5Model

    return T5Model(t5_config(width))


def _timm_eva(width: int = WIDTH) -> nn.Module:
    import timm

    return timm.create_model("eva02_tiny_patch14_224", img_size=32, patch_size=8, embed_dim=width, depth=2, num_heads=4,
                             num_classes=0, mlp_ratio=2, qkv_fused=True, global_pool="token")


def _timm_convnext(width: int = WIDTH) -> nn.Module:
    import timm

    return timm.create_model("convnext_atto", depths=(1, 1, 1, 1), dims=(width // 4, width // 4, width // 2, width),
                             num_classes=0, kernel_sizes=3, conv_mlp=False, patch_size=2)


def _vit(width: int = WIDTH) -> nn.Module:
    from transformers import ViTConfig, ViTModel

    config = ViTConfig(hidden_size=width, num_hidden_layers=2, num_attention_heads=4, intermediate_size=2 * width,
                       image_size=32, patch_size=8)
    return ViTModel(config, add_pooling_layer=False)


def _clip_configs(width: int) -> tuple[Any, Any]:
    from transformers import CLIPTextConfig, CLIPVisionConfig

    common: Any = {"hidden_size": width, "num_hidden_layers": 2, "num_attention_heads": 4,
                   "intermediate_size": 2 * width, "projection_dim": width}
    return (CLIPTextConfig(vocab_size=VOCABULARY, max_position_embeddings=32, eos_token_id=VOCABULARY - 1, **common),
            CLIPVisionConfig(image_size=32, patch_size=8, **common))


class _Towers(nn.Module):
    """Both towers of CLIP on one input: images, and with each a sentence that its pixels choose."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, images: Tensor) -> Tensor:
        ids = 1 + (images.flatten(1)[:, :12] > 0).long()
        out = self.model(input_ids=ids, pixel_values=images)
        return 4 * self.model.logit_scale * (out.text_embeds + out.image_embeds)  # type: ignore[operator]


def _clip(width: int = WIDTH) -> nn.Module:
    from transformers import CLIPConfig, CLIPModel

    text, vision = _clip_configs(width)
    return _Towers(CLIPModel(CLIPConfig(text_config=text.to_dict(), vision_config=vision.to_dict(),
                                        projection_dim=width)))


def _clip_text(width: int = WIDTH) -> nn.Module:
    from transformers import CLIPTextModel

    return CLIPTextModel(_clip_configs(width)[0])


def _clip_vision(width: int = WIDTH) -> nn.Module:
    from transformers import CLIPVisionModel

    return CLIPVisionModel(_clip_configs(width)[1])


def _roberta(width: int = WIDTH) -> nn.Module:
    from transformers import RobertaConfig, RobertaModel

    config = RobertaConfig(vocab_size=VOCABULARY, hidden_size=width, num_hidden_layers=2, num_attention_heads=4,
                           intermediate_size=2 * width, max_position_embeddings=40, pad_token_id=0)
    return RobertaModel(config, add_pooling_layer=False)


def _albert(width: int = WIDTH) -> nn.Module:
    from transformers import AlbertConfig, AlbertModel

    config = AlbertConfig(vocab_size=VOCABULARY, embedding_size=width // 2, hidden_size=width, num_hidden_layers=3,
                          num_attention_heads=4, intermediate_size=2 * width, max_position_embeddings=32)
    return AlbertModel(config, add_pooling_layer=False)


def _decoder(name: str, width: int = WIDTH, **changes: Any) -> nn.Module:
    import transformers

    config = getattr(transformers, f"{name}Config")(**{
        "vocab_size": VOCABULARY, "hidden_size": width, "num_hidden_layers": 2, "num_attention_heads": 4,
        "intermediate_size": 2 * width, "max_position_embeddings": 32, "use_cache": False, "bos_token_id": 0,
        "eos_token_id": 0, "pad_token_id": 0, **changes})
    return getattr(transformers, f"{name}Model")(config)


def _gpt2(width: int = WIDTH) -> nn.Module:
    from transformers import GPT2Config, GPT2Model

    return GPT2Model(GPT2Config(vocab_size=VOCABULARY, n_embd=width, n_layer=2, n_head=4, n_inner=2 * width,
                                n_positions=32, use_cache=False, bos_token_id=0, eos_token_id=0))


def _codegen(width: int = WIDTH) -> nn.Module:
    from transformers import CodeGenConfig, CodeGenModel

    return CodeGenModel(CodeGenConfig(vocab_size=VOCABULARY, n_embd=width, n_layer=2, n_head=4, n_inner=2 * width,
                                      n_positions=32, n_ctx=32, rotary_dim=4, use_cache=False, bos_token_id=0,
                                      eos_token_id=0))


def _distilbert(width: int = WIDTH) -> nn.Module:
    from transformers import DistilBertConfig, DistilBertModel

    return DistilBertModel(DistilBertConfig(vocab_size=VOCABULARY, dim=width, n_layers=2, n_heads=4,
                                            hidden_dim=2 * width, max_position_embeddings=32))


def _encoder(name: str, width: int = WIDTH, **changes: Any) -> nn.Module:
    import transformers

    config = getattr(transformers, f"{name}Config")(**{
        "vocab_size": VOCABULARY, "hidden_size": width, "num_hidden_layers": 2, "num_attention_heads": 4,
        "intermediate_size": 2 * width, "max_position_embeddings": 32, **changes})
    model = getattr(transformers, f"{name}Model")(config)
    if getattr(model, "pooler", None) is not None:
        model.pooler = None
    return model


def _electra(width: int = WIDTH) -> nn.Module:
    return _encoder("Electra", width, embedding_size=width // 2)


DEBERTA = {"relative_attention": True, "pos_att_type": ["p2c", "c2p"], "position_buckets": 8,
           "norm_rel_ebd": "layer_norm", "position_biased_input": False, "type_vocab_size": 0}
"""As in the published models, but for `share_att_key`, under which the maps of queries and keys run twice a forward."""
MODERNBERT = {"global_attn_every_n_layers": 2, "local_attention": 8, "pad_token_id": 0, "bos_token_id": 0,
              "eos_token_id": 0, "cls_token_id": 0, "sep_token_id": 0}


def _modernbert(width: int = WIDTH) -> nn.Module:
    from transformers.models.modernbert import modeling_modernbert as library

    if not isinstance(library.apply_rotary_pos_emb, functools.partial):
        library.apply_rotary_pos_emb = functools.partial(_rotated, library)  # type: ignore[assignment]
    return _encoder("ModernBert", width, **MODERNBERT)


def _rotated(library: Any, q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, unsqueeze_dim: int = 1
             ) -> tuple[Tensor, Tensor]:
    """ModernBERT's rotary positions, which it computes in float32 whatever comes in, float64 too."""
    wide = torch.float64 if q.dtype == torch.float64 else torch.float32
    cos, sin = cos.unsqueeze(unsqueeze_dim), sin.unsqueeze(unsqueeze_dim)
    turned = [part.to(wide) * cos + library.rotate_half(part.to(wide)) * sin for part in (q, k)]
    return turned[0].to(q.dtype), turned[1].to(k.dtype)


def _dinov2(width: int = WIDTH, **changes: Any) -> nn.Module:
    from transformers import Dinov2Config, Dinov2Model

    return Dinov2Model(Dinov2Config(**{
        "hidden_size": width, "num_hidden_layers": 2, "num_attention_heads": 4, "mlp_ratio": 3, "image_size": 32,
        "patch_size": 8, "use_swiglu_ffn": True, "use_mask_token": False, **changes}))


def _timm_dinov2(width: int = WIDTH) -> nn.Module:
    import timm

    return timm.create_model("vit_small_patch14_reg4_dinov2", img_size=32, patch_size=8, embed_dim=width, depth=2,
                             num_heads=4, num_classes=0)


class _Speech(nn.Module):
    """Whisper on one input: sound, and with it a sentence that its values choose."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, sound: Tensor) -> Tensor:
        ids = 1 + (sound[:, :12, 0] > 0).long()
        return self.model(sound, decoder_input_ids=ids).last_hidden_state


def whisper_config(width: int = WIDTH, **changes: Any) -> Any:
    from transformers import WhisperConfig

    return WhisperConfig(**{
        "vocab_size": VOCABULARY, "d_model": width, "num_mel_bins": 16, "encoder_layers": 2, "decoder_layers": 2,
        "encoder_attention_heads": 4, "decoder_attention_heads": 4, "encoder_ffn_dim": 2 * width,
        "decoder_ffn_dim": 2 * width, "max_source_positions": 9, "max_target_positions": 32, "use_cache": False,
        "pad_token_id": 0, "bos_token_id": 0, "eos_token_id": 0, "decoder_start_token_id": 1, **changes})


def _whisper(width: int = WIDTH) -> nn.Module:
    from transformers import WhisperModel

    return _Speech(WhisperModel(whisper_config(width)))


def _decoder_of(name: str, width: int = WIDTH, **changes: Any) -> nn.Module:
    """A decoder whose configuration has names of its own for what `_decoder` sets."""
    import transformers

    config = getattr(transformers, f"{name}Config")(
        vocab_size=VOCABULARY, use_cache=False, bos_token_id=0, eos_token_id=0, pad_token_id=0, **changes)
    return getattr(transformers, f"{name}Model")(config)


def _opt(width: int = WIDTH, **changes: Any) -> nn.Module:
    return _decoder("OPT", width, **{"ffn_dim": 2 * width, "word_embed_proj_dim": width, **changes})


def _bloom(width: int = WIDTH) -> nn.Module:
    return _decoder_of("Bloom", hidden_size=width, n_layer=2, n_head=4)


def _gpt_neo(width: int = WIDTH) -> nn.Module:
    return _decoder_of("GPTNeo", hidden_size=width, num_layers=2, num_heads=4, intermediate_size=2 * width,
                       max_position_embeddings=32, attention_types=[[["global", "local"], 1]], window_size=5)


def _gpt_bigcode(width: int = WIDTH, multi_query: bool = True) -> nn.Module:
    return _decoder_of("GPTBigCode", n_embd=width, n_layer=2, n_head=4, n_inner=2 * width, n_positions=32,
                       multi_query=multi_query)


def _qwen3(width: int = WIDTH) -> nn.Module:
    return _decoder("Qwen3", width, num_key_value_heads=2, head_dim=width // 4)


def _xglm(width: int = WIDTH) -> nn.Module:
    return _decoder_of("XGLM", d_model=width, ffn_dim=2 * width, num_layers=2, attention_heads=4,
                       max_position_embeddings=32)


def _uniform(size: int, shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    return (torch.rand(size, *shape, generator=generator) - 0.5) * 3.4  # unit variance


def _images(size: int, generator: torch.Generator, side: int = 32) -> Tensor:
    return _uniform(size, (3, side, side), generator)


def _ids(size: int, generator: torch.Generator) -> Tensor:
    return torch.randint(1, VOCABULARY, (size, 12), generator=generator)


def _padded_ids(size: int, generator: torch.Generator) -> Tensor:
    ids = _ids(size, generator)
    ids[1::2, -4:] = 0
    return ids


def _ids_padded_by_one(size: int, generator: torch.Generator) -> Tensor:
    """MPNet's padding is 1, whatever its configuration says."""
    ids = torch.randint(2, VOCABULARY, (size, 12), generator=generator)
    ids[1::2, -4:] = 1
    return ids


@dataclass(frozen=True)
class Family:
    """How a family's tiny model is built at a given width, and what goes in."""

    build: Callable[[int], nn.Module]
    inputs: Callable[[int, torch.Generator], Tensor]
    """(batch size, generator) -> inputs"""
    token: int | None = 0
    """The token whose state is the feature; None is the model's own pooling."""
    padding: int | None = None
    """The id that pads, where the model takes a padding mask."""
    attention: bool = True
    repeats: int = 1
    """How often a forward runs each block."""
    steps: int = 30
    """Within which a method halves a loss: more where a tiny model has few maps, one layer, or a feature of which half
    stands still."""
    operators: int = 0
    """Operators that a graft may add beyond its row's, to gather its part of a fused map or to norm more queries and
    keys."""
    rounding: float = 1.0
    """Factor on half-precision bounds: Gemma scales its embeddings, CLIP adds two towers."""
    saved: float = 1.0
    """Factor on the rows' shares of kept bytes, where the frozen part keeps a larger part of them."""


FAMILIES: dict[str, Family] = {
    "timm_vit": Family(_timm_vit, _images),
    "timm_swin": Family(_timm_swin, functools.partial(_images, side=16)),
    "bert": Family(_bert, _padded_ids, padding=0),  # masked attention
    "ast": Family(_ast, lambda size, generator: _uniform(size, (24, 32), generator)),
    "llama": Family(_llama, _ids, token=-1, rounding=1.03),  # causal attention, grouped queries
    "t5": Family(_t5, _padded_ids, token=-1, padding=0),  # two stacks, cross-attention, tied embeddings
}
"""Those that the quick tier's invariants meet."""

EVERY_FAMILY: dict[str, Family] = {
    **FAMILIES,
    "timm_eva": Family(_timm_eva, _images, saved=1.1),  # rotary positions in an image, fused, gated MLP
    "timm_convnext": Family(_timm_convnext, _images, attention=False, steps=90),  # no attention, channels first
    "vit": Family(_vit, _images),
    "clip": Family(_clip, _images, steps=90, rounding=1.2),  # two towers
    "clip_text": Family(_clip_text, _ids, token=-1, saved=1.07),
    "clip_vision": Family(_clip_vision, _images, token=None),
    "roberta": Family(_roberta, _padded_ids, padding=0),
    "albert": Family(_albert, _padded_ids, padding=0, repeats=3, steps=90, saved=1.2),  # one layer, several times
    "gpt2": Family(_gpt2, _ids, token=-1, saved=1.26),  # weights [in, out], fused
    "gpt_neox": Family(functools.partial(_decoder, "GPTNeoX"), _ids, token=-1, operators=1, saved=1.25),  # by heads
    "codegen": Family(_codegen, _ids, token=-1, saved=1.25),  # fused by quarters, attention beside the MLP
    "mistral": Family(functools.partial(_decoder, "Mistral", num_key_value_heads=2, sliding_window=11), _ids, token=-1,
                      rounding=1.1),
    "qwen2": Family(functools.partial(_decoder, "Qwen2", num_key_value_heads=2), _ids, token=-1),
    "gemma": Family(functools.partial(_decoder, "Gemma", num_key_value_heads=1, head_dim=16), _ids,
                    token=-1, rounding=1.3),
    "starcoder2": Family(functools.partial(_decoder, "Starcoder2", num_key_value_heads=2), _ids, token=-1,
                         saved=1.05),
    "distilbert": Family(_distilbert, _padded_ids, padding=0),
    "electra": Family(_electra, _padded_ids, padding=0),
    "mpnet": Family(functools.partial(_encoder, "MPNet"), _ids_padded_by_one, padding=1, steps=90),  # shared positions
    "deberta": Family(functools.partial(_encoder, "DebertaV2", **DEBERTA), _padded_ids, padding=0),  # own attention
    "modernbert": Family(_modernbert, _padded_ids, padding=0, saved=1.1),  # fused
    "dinov2": Family(_dinov2, _images, steps=90),  # scaled sublayers, gated MLP
    "timm_dinov2": Family(_timm_dinov2, _images),  # scaled sublayers, registers
    "whisper": Family(_whisper, lambda size, generator: _uniform(size, (16, 18), generator), token=-1),  # sound, text
    "qwen3": Family(_qwen3, _ids, token=-1, operators=4, rounding=1.15),  # norms of queries and keys
    "gemma2": Family(functools.partial(_decoder, "Gemma2", num_key_value_heads=2, head_dim=8, sliding_window=11,
                                       query_pre_attn_scalar=8, attn_logit_softcapping=2.0),
                     _ids, token=-1, saved=1.01),
    "gemma3": Family(functools.partial(_decoder, "Gemma3Text", num_key_value_heads=1, head_dim=16, sliding_window=11,
                                       query_pre_attn_scalar=256,
                                       layer_types=["sliding_attention", "full_attention"]),
                     _ids, token=-1, operators=7, saved=1.01),  # norms of queries, keys and sublayers
    "phi": Family(functools.partial(_decoder, "Phi"), _ids, token=-1, saved=1.08),  # attention beside the MLP
    "phi3": Family(functools.partial(_decoder, "Phi3", num_key_value_heads=2), _ids, token=-1),
    "opt": Family(_opt, _padded_ids, token=-1, padding=0, saved=1.17),  # an MLP of flat tokens
    "bloom": Family(_bloom, _padded_ids, token=-1, padding=0, steps=90, operators=2, saved=1.1),  # by heads, ALiBi
    "gpt_neo": Family(_gpt_neo, _ids, token=-1, saved=1.09),  # windows of tokens before
    "gpt_bigcode": Family(_gpt_bigcode, _ids, token=-1, saved=1.1),  # one head of keys and values, fused
    "xglm": Family(_xglm, _ids, token=-1, saved=1.05),
}
"""All: the long tier's invariants meet them, and each method walks through each once (tests/core/test_cells.py)."""


def spread(model: nn.Module, seed: int = 0) -> nn.Module:
    """Give every parameter values of unit-scale effect. Fresh models start near zero, and with zero biases, so that
    methods could hardly be told apart and a lost bias would not be seen."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            generator = torch.Generator().manual_seed(seed_of("tiny model", seed, name))
            values = torch.rand(parameter.shape, generator=generator, dtype=torch.float32) - 0.5
            if parameter.dim() > 1:
                parameter.copy_(0.5 * values)
            else:
                norm = "norm" in name.lower() or "ln_" in name
                parameter.copy_(0.3 * values + float(norm and name.endswith("weight")))
    return model


class _Mould(pickle.Pickler):
    """``copy.deepcopy`` done by pickle, ten times as fast: the model as bytes, its tensors aside, by number."""

    def __init__(self, model: nn.Module) -> None:
        self.stream = io.BytesIO()
        self.tensors: dict[int, Tensor] = {}
        super().__init__(self.stream, protocol=5)
        self.dump(model)

    def persistent_id(self, obj: Any) -> int | None:
        if not isinstance(obj, Tensor):
            return None
        self.tensors[id(obj)] = obj
        return id(obj)


class _Cast(pickle.Unpickler):
    def __init__(self, mould: _Mould) -> None:
        super().__init__(io.BytesIO(mould.stream.getvalue()))
        self.tensors, self.fresh = mould.tensors, {}

    def persistent_load(self, pid: Any) -> Tensor:
        if pid not in self.fresh:
            self.fresh[pid] = copy.deepcopy(self.tensors[pid])
        return self.fresh[pid]


@functools.cache
def _mould(family: str, seed: int, width: int) -> _Mould:
    with torch.random.fork_rng(devices=[]):
        model = EVERY_FAMILY[family].build(width)
    return _Mould(Pooled(spread(model, seed), EVERY_FAMILY[family].token, EVERY_FAMILY[family].padding).eval())


def make(family: str, seed: int = 0, dtype: torch.dtype = torch.float32, width: int = WIDTH) -> Pooled:
    """A tiny model in eval mode; the same seed gives the same weights."""
    model = _Cast(_mould(family, seed, width)).load().to(dtype)
    if dtype == torch.float64:
        _compute_norms_in_double(model)
    return model


def _compute_norms_in_double(model: nn.Module) -> None:
    """Libraries compute RMSNorm, and some their attention, in float32 whatever comes in: put torch's in place."""
    for module in list(model.modules()):
        kind = type(module).__name__
        if kind == "CodeGenAttention":
            module._attn = functools.partial(codegen_attention, nn.Dropout(0.0))  # type: ignore[assignment]
        elif kind == "GPTNeoSelfAttention":
            module._attn = functools.partial(gpt_neo_attention, module)  # type: ignore[assignment]
        elif kind in ("Gemma2Attention", "BloomAttention", "XGLMAttention"):
            module.__class__ = _in_double(type(module))
        for name, child in module.named_children():
            if type(child).__name__.endswith(("RMSNorm", "T5LayerNorm")) and not isinstance(child, nn.RMSNorm):
                epsilon = getattr(child, "variance_epsilon", None) or child.eps
                norm = (GemmaNorm if "Gemma" in type(child).__name__ else nn.RMSNorm)(
                    child.weight.shape[0], epsilon, dtype=torch.float64)  # type: ignore[arg-type]
                norm.weight = child.weight  # type: ignore[assignment]
                setattr(module, name, norm)


def doubled(model: nn.Module) -> nn.Module:
    """``model.double()``, whose forward holds: XGLM writes float64's lowest score into a number of the default type."""
    for module in model.modules():
        if type(module).__name__ == "XGLMAttention":
            module.__class__ = _in_double(type(module))
    return model.double()


@functools.cache
def _in_double(attention: type[nn.Module]) -> type[nn.Module]:
    """An attention's class, for arguments in float64."""

    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        with _Double():
            return attention.forward(self, *args, **kwargs)

    return type(attention.__name__, (attention,), {"forward": forward})


class _Double(TorchFunctionMode):
    """Softmax in the type of its argument; a new number (XGLM's lowest score) in float64, not in the default type."""

    def __torch_function__(self, func: Any, types: Any, args: tuple = (), kwargs: Any = None) -> Any:
        if func is nn.functional.softmax:
            kwargs = {**(kwargs or {}), "dtype": None}
        elif func is torch.full:
            kwargs = {"dtype": torch.float64, **(kwargs or {})}
        return func(*args, **(kwargs or {}))


class GemmaNorm(nn.RMSNorm):  # its name tells that it multiplies by 1 + weight, as in the library
    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.rms_norm(x, self.normalized_shape, None, self.eps) * (1 + self.weight)


def batch(family: str, size: int = 3, seed: int = 1, dtype: torch.dtype = torch.float32) -> Tensor:
    """Inputs for ``make(family)``."""
    inputs = EVERY_FAMILY[family].inputs(size, torch.Generator().manual_seed(seed))
    return inputs.to(dtype) if inputs.is_floating_point() else inputs


def with_head(seed: int = 0, classes: int = 4) -> nn.Module:
    """A timm ViT whose task head is inside the backbone."""
    with torch.random.fork_rng(devices=[]):
        return spread(_timm_vit(classes=classes), seed).eval()


def tied_llama(seed: int = 0) -> Any:
    """A language model whose output weight is its embedding."""
    from transformers import LlamaForCausalLM

    with torch.random.fork_rng(devices=[]):
        model = LlamaForCausalLM(_llama_config(WIDTH, tie_word_embeddings=True))
    return spread(model, seed).eval()
