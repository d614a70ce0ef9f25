"""Causal language models of transformers, whose blocks are all alike within a model."""

from __future__ import annotations

import functools
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from core.anatomy.description import Description, Where, family
from core.anatomy.families.transformers import MODELS, blocks_of
from core.anatomy.layout import Rows

# ------------------------------------------------------------------------------------------------- like Llama


@family(f"{MODELS}.llama.modeling_llama:LlamaModel", f"{MODELS}.mistral.modeling_mistral:MistralModel",
        f"{MODELS}.qwen2.modeling_qwen2:Qwen2Model", f"{MODELS}.qwen3.modeling_qwen3:Qwen3Model",
        f"{MODELS}.gemma.modeling_gemma:GemmaModel", f"{MODELS}.starcoder2.modeling_starcoder2:Starcoder2Model")
def llama(model: Any) -> Description:
    """Llama and what is built like it: Mistral, Qwen2, Qwen3 (queries and keys have norms), Gemma, StarCoder2 (whose
    MLP has no gate)."""
    roles = _llama_roles(model)
    roles |= {"attention": "self_attn", "mlp": "mlp"}
    roles |= {"norm1": "input_layernorm", "norm2": "post_attention_layernorm"}
    return _llama_like(model, roles)


@family(f"{MODELS}.gemma2.modeling_gemma2:Gemma2Model", f"{MODELS}.gemma3.modeling_gemma3:Gemma3TextModel")
def gemma2(model: Any) -> Description:
    """Gemma 2 and 3: each sublayer has a norm in front and one behind, and the residual is added to the latter's
    output."""
    roles = _llama_roles(model)
    if not model._supports_sdpa:
        # Gemma 2 caps its scores by a tanh before the softmax, which torch's attention cannot.
        del roles["attend"]
    roles |= {"norm1": "input_layernorm", "norm2": "pre_feedforward_layernorm"}
    behind = {"attention": "post_attention_layernorm", "mlp": "post_feedforward_layernorm"}
    for sublayer, norm in behind.items():
        roles |= {sublayer: norm, f"{sublayer}.norm": norm}
    return _llama_like(model, roles)


def _llama_roles(model: Any) -> dict[str, Where]:
    """The roles inside the two sublayers."""
    roles: dict[str, Where] = {}
    roles |= {"q": "self_attn.q_proj", "k": "self_attn.k_proj", "v": "self_attn.v_proj", "o": "self_attn.o_proj"}
    if hasattr(model.layers[0].mlp, "gate_proj"):
        roles |= {"mlp.up": "mlp.up_proj", "mlp.gate": "mlp.gate_proj", "mlp.down": "mlp.down_proj"}
    else:
        roles |= {"mlp.up": "mlp.c_fc", "mlp.down": "mlp.c_proj"}
    roles["attend"] = "self_attn"
    if hasattr(model.layers[0].self_attn, "q_norm"):
        roles |= {"q.norm": "self_attn.q_norm", "k.norm": "self_attn.k_norm"}
    return roles


def _llama_like(model: Any, roles: dict[str, Where]) -> Description:
    widths = {"self_attn.head_dim": 1, "self_attn.scaling": -0.5}
    causal = not getattr(model.config, "use_bidirectional_attention", False)  # EmbeddingGemma sees both ways
    blocks = blocks_of(model, "layers", roles, causal=causal, cache="past_key_values", rotary="position_embeddings",
                       widths=widths)
    stem: dict[str, str | list[str]] = {"embed": "embed_tokens", "norm": "norm", "final_norm": "norm"}
    # Gemma's norms multiply by 1 + weight, and their weights begin at zero.
    is_gemma = type(model.norm).__name__.startswith("Gemma")
    return Description(blocks, stem, final="norm", text="", norm_offset=1.0 if is_gemma else 0.0)


@family(f"{MODELS}.phi3.modeling_phi3:Phi3Model")
def phi3(model: Any) -> Description:
    """Llama with fused maps: queries, keys and values are one, the MLP's gate and its first map are one."""
    config = model.config
    attention = model.layers[0].self_attn
    queries = config.num_attention_heads * attention.head_dim
    keys = config.num_key_value_heads * attention.head_dim
    inner = config.intermediate_size
    roles = _consecutive("self_attn.qkv_proj", queries, keys)
    roles["o"] = "self_attn.o_proj"
    roles["mlp.gate"] = ("mlp.gate_up_proj", Rows(0, inner))
    roles["mlp.up"] = ("mlp.gate_up_proj", Rows(inner, 2 * inner))
    roles["mlp.down"] = "mlp.down_proj"
    roles |= {"attend": "self_attn", "attention": "resid_attn_dropout", "mlp": "resid_mlp_dropout"}
    roles |= {"norm1": "input_layernorm", "norm2": "post_attention_layernorm"}
    return _llama_like(model, roles)


@family(f"{MODELS}.phi.modeling_phi:PhiModel")
def phi(model: Any) -> Description:
    """Attention and MLP read one norm and run side by side; only the first part of each head is turned by positions."""
    roles: dict[str, Where] = {}
    roles |= {"q": "self_attn.q_proj", "k": "self_attn.k_proj", "v": "self_attn.v_proj", "o": "self_attn.dense"}
    roles |= {"mlp.up": "mlp.fc1", "mlp.down": "mlp.fc2"}
    # Both sublayers leave through one dropout module, which therefore is neither's own.
    roles |= {"attend": "self_attn", "attention": "self_attn", "mlp": "mlp", "norm1": "input_layernorm"}
    if model.config.qk_layernorm:
        roles |= {"q.norm": "self_attn.q_layernorm", "k.norm": "self_attn.k_layernorm"}
    widths = {"self_attn.head_dim": 1, "self_attn.rotary_ndims": 1, "self_attn.scaling": -0.5}
    blocks = blocks_of(model, "layers", roles, causal=True, cache="past_key_values", rotary="position_embeddings",
                       widths=widths)
    norm = "final_layernorm"
    return Description(blocks, {"embed": "embed_dropout", "norm": norm, "final_norm": norm}, final=norm, text="")


# ------------------------------------------------------------------------------------------------- like GPT-2


@family(f"{MODELS}.gpt2.modeling_gpt2:GPT2Model")
def gpt2(model: Any) -> Description:
    """Its maps are transformers' Conv1D, with weights [in, out]."""
    dim = model.config.hidden_size
    roles = _consecutive("attn.c_attn", dim, dim)
    roles |= {"o": "attn.c_proj", "mlp.up": "mlp.c_fc", "mlp.down": "mlp.c_proj"}
    roles |= {"attend": "attn", "attention": "attn", "mlp": "mlp"}
    roles |= {"norm1": "ln_1", "norm2": "ln_2"}
    widths = {"attn.head_dim": 1, "attn.embed_dim": 1, "attn.split_size": 1, "attn.scaling": -0.5}
    blocks = blocks_of(model, "h", roles, causal=True, cache="past_key_values", widths=widths)
    # The dropout is the one module behind the sum of the embeddings of tokens and of positions.
    return Description(blocks, {"embed": "drop", "norm": "ln_f", "final_norm": "ln_f"}, final="ln_f", text="")


@family(f"{MODELS}.gpt_bigcode.modeling_gpt_bigcode:GPTBigCodeModel")
def gpt_bigcode(model: Any) -> Description:
    """StarCoder's first: GPT-2 with one head of keys and values for all queries. Where a configuration gives each head
    its own (multi_query=False), the fused projection holds query, key and value head by head."""
    config = model.config
    dim, heads = config.hidden_size, config.num_attention_heads
    width = dim // heads
    if config.multi_query:
        roles = _consecutive("attn.c_attn", dim, width)
    else:
        roles = _head_by_head("attn.c_attn", heads, width)
    roles |= {"o": "attn.c_proj", "mlp.up": "mlp.c_fc", "mlp.down": "mlp.c_proj"}
    roles |= {"attend": "attn", "attention": "attn", "mlp": "mlp"}
    roles |= {"norm1": "ln_1", "norm2": "ln_2"}
    widths: dict[str, float] = {"attn.head_dim": 1, "attn.embed_dim": 1, "attn.kv_dim": 1}
    if config.scale_attn_weights:
        widths["attn.scaling"] = -0.5
    blocks = blocks_of(model, "h", roles, causal=True, cache="layer_past", widths=widths)
    for block in blocks:
        block.heads = (heads, 1 if config.multi_query else heads, width)
    return Description(blocks, {"embed": "drop", "norm": "ln_f", "final_norm": "ln_f"}, final="ln_f", text="")


@family(f"{MODELS}.gpt_neo.modeling_gpt_neo:GPTNeoModel")
def gpt_neo(model: Any) -> Description:
    """Every other layer sees a window of the tokens before, by a mask of its own; scores are not scaled."""
    own = "attn.attention"
    roles: dict[str, Where] = {"q": f"{own}.q_proj", "k": f"{own}.k_proj", "v": f"{own}.v_proj"}
    roles |= {"o": f"{own}.out_proj", "mlp.up": "mlp.c_fc", "mlp.down": "mlp.c_proj"}
    roles |= {"attention": "attn", "mlp": "mlp", "norm1": "ln_1", "norm2": "ln_2"}
    is_written_out = type(model.h[0].attn.attention).__name__ == "GPTNeoSelfAttention"
    if is_written_out:
        roles["attend"] = own
    widths = {f"{own}.head_dim": 1, f"{own}.embed_dim": 1}
    blocks = blocks_of(model, "h", roles, causal=True, cache="layer_past", widths=widths)
    for block, module in zip(blocks, model.h, strict=True):
        if is_written_out:
            # As CodeGen's: a call is put in place of products and a softmax, for `attend` to rewrite.
            as_one_call = functools.partial(gpt_neo_attention, module.attn.attention)
            block.while_active = {"attend": {f"{own}._attn": as_one_call}}
    return Description(blocks, {"embed": "drop", "norm": "ln_f", "final_norm": "ln_f"}, final="ln_f", text="")


@family(f"{MODELS}.gpt_neox.modeling_gpt_neox:GPTNeoXModel")
def gpt_neox(model: Any) -> Description:
    """Its fused projection holds query, key and value of the first head, then those of the second, and so on."""
    heads = model.config.num_attention_heads
    width = model.config.hidden_size // heads
    roles = _head_by_head("attention.query_key_value", heads, width)
    roles |= {"o": "attention.dense", "mlp.up": "mlp.dense_h_to_4h", "mlp.down": "mlp.dense_4h_to_h"}
    roles |= {"attend": "attention", "attention": "post_attention_dropout", "mlp": "post_mlp_dropout"}
    roles |= {"norm1": "input_layernorm", "norm2": "post_attention_layernorm"}
    widths = {"attention.head_size": 1, "attention.rotary_ndims": 1, "attention.scaling": -0.5}
    blocks = blocks_of(model, "layers", roles, causal=True, cache="layer_past", rotary="position_embeddings",
                       widths=widths)
    norm = "final_layer_norm"
    return Description(blocks, {"embed": "emb_dropout", "norm": norm, "final_norm": norm}, final=norm, text="")


@family(f"{MODELS}.codegen.modeling_codegen:CodeGenModel")
def codegen(model: Any) -> Description:
    """Attention and MLP read one norm and run side by side. The fused projection was laid out for four accelerators:
    each quarter of its rows holds the queries, the values and the keys of a quarter of the heads."""
    heads = model.config.num_attention_heads
    width = model.config.hidden_size // heads
    quarter = heads // 4 * width
    roles: dict[str, Where] = {"qkv": "attn.qkv_proj"}
    for i, role in enumerate("qvk"):
        roles[role] = ("attn.qkv_proj", _every_third(i, 4, quarter))
    roles |= {"o": "attn.out_proj", "mlp.up": "mlp.fc_in", "mlp.down": "mlp.fc_out"}
    roles |= {"attend": "attn", "attention": "attn", "mlp": "mlp", "norm1": "ln_1"}
    widths, tables = {}, ()
    if model.config.rotary_dim is not None:  # else the table is as wide as the state, and not as a head
        widths = {"attn.head_dim": 1, "attn.embed_dim": 1, "attn.rotary_dim": 1, "attn.scale_attn": 0.5}
        tables = ("attn.embed_positions",)
    blocks = blocks_of(model, "h", roles, causal=True, cache="layer_past", widths=widths, tables=tables)
    for block, module in zip(blocks, model.h, strict=True):
        # Its attention is written out as products and a softmax: a call is put there for `attend` to rewrite.
        as_one_call = functools.partial(codegen_attention, module.attn.attn_dropout)
        block.while_active = {"attend": {"attn._attn": as_one_call}}
    return Description(blocks, {"embed": "drop", "norm": "ln_f", "final_norm": "ln_f"}, final="ln_f", text="")


# ------------------------------------------------------------------------------------------------- BLOOM, OPT, XGLM


@family(f"{MODELS}.bloom.modeling_bloom:BloomModel")
def bloom(model: Any) -> Description:
    """Distances between tokens are added to the scores (ALiBi). Its attention is written out amid its forward, so that
    no call of torch's could be rewritten."""
    config = model.config
    heads, own = config.num_attention_heads, "self_attention"
    roles = _head_by_head(f"{own}.query_key_value", heads, config.hidden_size // heads)
    # Attention and MLP add the residual themselves; what they add leaves their last map, but for a functional dropout.
    roles |= {"o": f"{own}.dense", "attention": f"{own}.dense"}
    roles |= {"mlp.up": "mlp.dense_h_to_4h", "mlp.down": "mlp.dense_4h_to_h", "mlp": "mlp.dense_4h_to_h"}
    roles |= {"norm1": "input_layernorm", "norm2": "post_attention_layernorm"}
    widths = {f"{own}.hidden_size": 1, f"{own}.head_dim": 1, f"{own}.split_size": 1, f"{own}.inv_norm_factor": -0.5}
    blocks = blocks_of(model, "h", roles, causal=True, cache="layer_past", widths=widths)
    first = "word_embeddings_layernorm"
    stem: dict[str, str | list[str]] = {"embed": first, "norm": [first, "ln_f"], "final_norm": "ln_f"}
    return Description(blocks, stem, final="ln_f", text="")


# OPTForCausalLM calls the decoder inside OPTModel, past OPTModel itself: the decoder is what all of them share.
@family(f"{MODELS}.opt.modeling_opt:OPTDecoder")
def opt(model: Any) -> Description:
    """OPT; its size of 350 million has the norms behind the sums, and embeddings narrower than its states."""
    config = model.config
    roles = _fairseq_roles()
    roles["attend"] = "self_attn"
    widths = {"self_attn.head_dim": 1, "self_attn.embed_dim": 1, "self_attn.scaling": -0.5}
    blocks = blocks_of(model, "layers", roles, causal=True, cache="past_key_values", widths=widths,
                       pre_norm=config.do_layer_norm_before, flat=("mlp",))
    # Behind the sum of embeddings and positions there is no module.
    narrow = model.project_in is not None
    stem: dict[str, str | list[str]] = {"embed": "project_in" if narrow else "embed_tokens"}
    if model.final_layer_norm is None:
        return Description(blocks, stem, text="")
    norm = "final_layer_norm"
    stem |= {"norm": norm, "final_norm": norm}
    return Description(blocks, stem, final=norm, text="")


@family(f"{MODELS}.xglm.modeling_xglm:XGLMModel")
def xglm(model: Any) -> Description:
    """Positions are sines; attention is written out amid its forward, so that no call of torch's could be rewritten."""
    widths = {"self_attn.head_dim": 1, "self_attn.embed_dim": 1, "self_attn.scaling": -0.5}
    blocks = blocks_of(model, "layers", _fairseq_roles(), causal=True, cache="past_key_values", widths=widths)
    norm = "layer_norm"
    return Description(blocks, {"embed": "embed_tokens", "norm": norm, "final_norm": norm}, final=norm, text="")


def _fairseq_roles() -> dict[str, Where]:
    """The roles in a block with the names that fairseq gave its modules; the block's last norm is called final."""
    roles: dict[str, Where] = {}
    roles |= {"q": "self_attn.q_proj", "k": "self_attn.k_proj", "v": "self_attn.v_proj", "o": "self_attn.out_proj"}
    roles |= {"mlp.up": "fc1", "mlp.down": "fc2"}
    # Between a sublayer's last map and the sum there is a functional dropout only.
    roles |= {"attention": "self_attn", "mlp": "fc2"}
    roles |= {"norm1": "self_attn_layer_norm", "norm2": "final_layer_norm"}
    return roles


# ------------------------------------------------------------------------------------------------- what they share


def _consecutive(path: str, queries: int, keys: int) -> dict[str, Where]:
    """A fused projection whose rows are all queries', then all keys', then all values'."""
    roles: dict[str, Where] = {"qkv": path}
    roles["q"] = (path, Rows(0, queries))
    roles["k"] = (path, Rows(queries, queries + keys))
    roles["v"] = (path, Rows(queries + keys, queries + 2 * keys))
    return roles


def _head_by_head(path: str, heads: int, width: int) -> dict[str, Where]:
    """A fused projection that holds query, key and value of the first head, then those of the second, and so on."""
    roles: dict[str, Where] = {"qkv": path}
    for i, role in enumerate("qkv"):
        roles[role] = (path, _every_third(i, heads, width))
    return roles


def _every_third(first: int, count: int, size: int) -> Rows:
    """The rows of every third of ``3 * count`` parts of ``size`` rows each, from the part ``first`` on."""
    index: list[int] = []
    for group in range(count):
        part = 3 * group + first
        index += range(part * size, (part + 1) * size)
    return Rows(index=tuple(index))


def codegen_attention(dropout: nn.Dropout, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None
                      ) -> tuple[Tensor, None]:
    """What CodeGenAttention._attn computes, as one call."""
    # CodeGen turns queries and keys to float32 for its scores; torch's attention takes one type for all.
    if mask is not None and mask.dtype != torch.bool:
        mask = mask.to(v.dtype)
    rate = dropout.p if dropout.training else 0.0
    output = F.scaled_dot_product_attention(q.to(v.dtype), k.to(v.dtype), v, mask, rate)
    return output, None


def gpt_neo_attention(attention: Any, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None
                      ) -> tuple[Tensor, None]:
    """What GPTNeoSelfAttention._attn computes, as one call."""
    queries, keys = q.shape[-2], k.shape[-2]
    seen = attention.bias[:, :, keys - queries:keys, :keys]  # by layer: all tokens before, or a window of them
    if mask is None:
        mask = seen
    elif mask.dtype == torch.bool:
        mask = mask & seen
    else:
        # A number as low as this, and not minus infinity, as the library's: a row of padding alone has a softmax.
        mask = mask.to(v.dtype).masked_fill(~seen, torch.finfo(v.dtype).min)
    rate = attention.attn_dropout.p if attention.attn_dropout.training else 0.0
    output = F.scaled_dot_product_attention(q.to(v.dtype), k.to(v.dtype), v, mask, rate, scale=1.0)
    return output, None
