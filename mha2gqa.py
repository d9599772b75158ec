# SPDX-License-Identifier: Apache-2.0
# One file of the project mha2gqa, to be copied into other projects. Its tests, its trainer
# (train_gqa.py) and the text of the licence are there. Please leave these lines in a copy.
"""mha2gqa: turn a multi-head-attention LLaMA checkpoint into a grouped-query-attention one.

    python mha2gqa.py MODEL OUT --kv-heads 8 --text c4.jsonl

In multi-head attention (MHA) every query head has a key head and a value head of its own, and the
KV cache holds all of them. In grouped-query attention (GQA) a group of query heads shares one key
head and one value head. The simplest conversion averages the heads of each group (mean-pooling,
Ainslie et al. 2023). It loses much, because the heads of a trained model live in unrelated bases.
But the basis of a head is arbitrary. Rotate its values and rotate the output projection back, or
rotate its keys and its queries together: the model computes the same. So "Align Attention Heads
Before Merging Them" (Jin et al. 2024, arXiv 2412.20677, "the paper" below) rotates the heads of a
group until they agree, and only then averages them.

Rotations are not the only maps that leave a model unchanged. The default here goes one step
further, to linear maps; then it trains attention: in each block alone to reproduce the source's
hidden states, and at last in all blocks together to reproduce its predictions.

The map of this file:

     1  the model               LLaMA, with the parameter names of its checkpoints
     2  statistics              Gram matrices of keys and values on calibration text
     3  alignment               the maps under which heads agree best
     4  grouping                which heads share
     5  map and merge           apply the maps to a block's weights, average the heads of a group
     6  masks and losses        for the trainer beside this file; the conversion needs KL alone
     7  the walk and the refit  one block after the other: align, merge, train it to fit
     8  convert and evaluate    the two things that this file is for
        --- a reader may stop here: the rest reads, checks and writes files ---
     9  checkpoints             reading and writing Hugging Face directories
    10  text and tokenizers     from files to rows of token ids
    11  report, command line

Shape suffixes: B batch, T time, N tokens, L layers, D hidden, H query heads, K KV heads (a model's
own; of a conversion the source's), G target KV heads, M units per group, Q query heads per unit,
E head dim, P = E/2 RoPE planes, V vocabulary, C copies; in the annealer R restarts, S steps.
A *unit* is one source KV head with the Q = H/K query heads that read it; a group is M = K/G units.
"""

import argparse
import array
import contextlib
import dataclasses
import errno
import functools
import gzip
import json
import logging
import math
import os
import random
import re
import shlex
import shutil
import signal
import sys
import tempfile
import textwrap
import time
import warnings
import zipfile
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

__version__ = "0.4.0"
__all__ = [
    "LlamaConfig", "Llama", "parse_config", "load_config", "load_checkpoint", "load_tokenizer",
    "new_checkpoint", "Corpus", "text_rows", "Method", "convert_weights", "convert", "evaluate",
    "plot", "converted_blocks", "refit_block", "joint_refit", "block_statistics", "procrustes",
    "rope_procrustes", "generalized_procrustes", "shared_keys", "shared_values", "head_similarity",
    "discarded_energy", "anneal_groups", "HeadMaps", "transform", "merge", "hard_concrete",
    "l0_loss", "kl_loss", "bild_loss",
]

PathLike = str | os.PathLike[str]
Device = torch.device | str | None
Weights = Mapping[str, Tensor]  # by parameter name; of one block, named as in `Block`

# ---- 1 the model ---------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class LlamaConfig:
    """A model's shape; the fields are config.json's own keys (defaults: transformers' for llama).

    `num_key_value_heads` 0 becomes num_attention_heads, which is MHA; `head_dim` 0 becomes
    hidden_size / num_attention_heads.
    `rope_scaling` is None or a mapping with `rope_type` linear or llama3 and that type's fields.
    `raw` is config.json as it was read, so that unknown keys can be written back.
    Raises ValueError for sizes that do not fit together.
    """

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    _: dataclasses.KW_ONLY
    num_key_value_heads: int = 0
    head_dim: int = 0
    max_position_embeddings: int = 2048
    rms_norm_eps: float = 1e-6
    rope_theta: float = 10000.0
    rope_scaling: Mapping[str, Any] | None = None
    hidden_act: str = "silu"
    attention_bias: bool = False
    mlp_bias: bool = False
    tie_word_embeddings: bool = False
    model_type: str = "llama"
    bos_token_id: int | None = None
    eos_token_id: int | Sequence[int] | None = None
    raw: Mapping[str, Any] = dataclasses.field(default_factory=dict, repr=False, compare=False)

    def __post_init__(self):
        for name, default in (("num_key_value_heads", self.num_attention_heads),
                              ("head_dim", self.hidden_size // self.num_attention_heads)):
            object.__setattr__(self, name, getattr(self, name) or default)
        if self.num_attention_heads % self.num_key_value_heads:
            raise ValueError(f"num_key_value_heads {self.num_key_value_heads} does not divide "
                             f"num_attention_heads {self.num_attention_heads}")
        if self.head_dim % 2 or self.head_dim < 2:
            raise ValueError(f"head_dim is {self.head_dim}, but RoPE needs an even one")

    @property
    def eos_ids(self) -> list[int]:
        """At most one: the token that ends a text, of several the first."""
        eos = self.eos_token_id
        return [eos] if isinstance(eos, int) else list(eos or ())[:1]

    @property
    def qkv_bias(self) -> bool:
        return self.model_type == "qwen2" or self.o_bias

    @property
    def o_bias(self) -> bool:
        return self.model_type in ("llama", "qwen3") and self.attention_bias

    @property
    def qk_norm(self) -> bool:
        return self.model_type == "qwen3"

    @property
    def ffn_bias(self) -> bool:
        return self.model_type == "llama" and self.mlp_bias


def gqa_config(config: LlamaConfig, kv_heads: int) -> LlamaConfig:
    """The config with fewer KV heads; raises ValueError unless they divide the source's."""
    source = config.num_key_value_heads
    choices = [g for g in range(1, source) if source % g == 0]
    if kv_heads not in choices:
        raise ValueError(f"{kv_heads} KV heads: the source has {source}, choose one of "
                         f"{', '.join(map(str, choices)) or '(none: nothing to merge)'}")
    return dataclasses.replace(config, num_key_value_heads=kv_heads)


class Llama(nn.Module):
    """LLaMA with the parameter names of its Hugging Face checkpoints, MHA or GQA.

    `Llama(config).load_state_dict(weights)` takes what `load_checkpoint` returned; `model(tokens)`
    gives logits (B, T, V) for token ids (B, T) of int64. There is no dropout, so train and eval
    mode are the same.
    """

    def __init__(self, config: LlamaConfig):
        super().__init__()
        self.config = config
        self.model = Decoder(config)
        if not config.tie_word_embeddings:
            self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)

    def forward(
        self, tokens_BT: Tensor, document_BT: Tensor | tuple[Tensor, Tensor] | None = None,
        readout: Callable[[Tensor, Tensor], Tensor] = F.linear
    ) -> Tensor:
        """Logits (B, T, V); or whatever `readout(hidden_BTD, head_VD)` makes of the hidden states.

        `document_BT`, a tensor that numbers the documents of packed rows, each a run of tokens, or
        `document_positions` of it: attention and positions then never cross from one into the next.
        None: each row is one document.
        `readout` is for losses that must not hold all logits at once. It runs within the forward
        because FSDP gathers the head's weight only there.
        """
        return readout(self.model(tokens_BT, document_BT), self.head_weight)

    @property
    def head_weight(self) -> Tensor:
        """The weight (V, D) that makes logits of hidden states."""
        tied = self.config.tie_word_embeddings
        return self.model.embed_tokens.weight if tied else self.lm_head.weight


class Decoder(nn.Module):
    """What checkpoints call `model`: the embedding, the blocks and the last norm."""

    def __init__(self, config: LlamaConfig):
        super().__init__()
        self.config = config
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(Block(config) for _ in range(config.num_hidden_layers))
        self.norm = RMSNorm(config)

    def forward(self, tokens_BT, document_BT=None):
        x_BTD = self.embed_tokens(tokens_BT)
        rope, ends = _rope_and_ends(self.config, x_BTD, document_BT)
        for block in self.layers:
            x_BTD = block(x_BTD, rope, ends)
        return self.norm(x_BTD)


class Block(nn.Module):
    """One layer: attention, then MLP, each added to the hidden states."""

    def __init__(self, config: LlamaConfig):
        super().__init__()
        self.config = config
        self.input_layernorm = RMSNorm(config)
        self.self_attn = Attention(config)
        self.post_attention_layernorm = RMSNorm(config)
        self.mlp = MLP(config)

    def forward(self, x_BTD, rope, ends=None):
        x_BTD = x_BTD + self.self_attn(self.input_layernorm(x_BTD), rope, ends)
        return x_BTD + self.mlp(self.post_attention_layernorm(x_BTD))


class Attention(nn.Module):
    """Query head h reads KV head h // (H/K)."""

    def __init__(self, config: LlamaConfig):
        super().__init__()
        self.head_dim, bias = config.head_dim, config.qkv_bias
        q_size = config.num_attention_heads * config.head_dim
        kv_size = config.num_key_value_heads * config.head_dim
        self.q_proj = nn.Linear(config.hidden_size, q_size, bias=bias)
        self.k_proj = nn.Linear(config.hidden_size, kv_size, bias=bias)
        self.v_proj = nn.Linear(config.hidden_size, kv_size, bias=bias)
        self.o_proj = nn.Linear(q_size, config.hidden_size, bias=config.o_bias)
        self.q_norm, self.k_norm = (  # of each head (Henry et al. 2020)
            RMSNorm(config, config.head_dim) if config.qk_norm else nn.Identity() for _ in "qk")

    def forward(self, x_BTD, rope, ends=None):
        def heads(y):  # (B, T, heads·E) -> (B, heads, T, E)
            return y.unflatten(-1, (-1, self.head_dim)).transpose(1, 2)

        q_BHTE = _apply_rope(self.q_norm(heads(self.q_proj(x_BTD))), rope)
        k_BKTE = _apply_rope(self.k_norm(heads(self.k_proj(x_BTD))), rope)
        v_BKTE = heads(self.v_proj(x_BTD))
        # subtle: under autocast the values are in bf16, and RoPE has made float32 of the others.
        y_BHTE = causal_attention(q_BHTE.to(v_BKTE), k_BKTE.to(v_BKTE), v_BKTE, ends)
        return self.o_proj(y_BHTE.transpose(1, 2).flatten(2))


def causal_attention(
    q_BHTE: Tensor, k_BKTE: Tensor, v_BKTE: Tensor, ends: Tensor | None = None
) -> Tensor:
    """softmax(q kᵀ / √E) v over each token and those before it in its document: (B, H, T, E).

    Query head h reads KV head h // (H/K). `ends`, int32: where in the rows, laid end to end, one
    document ends and the next begins, 0 and B·T included; None: each row is one document. (With a
    mask of documents instead, CUDA would take a kernel that stores the T × T scores.)
    """
    half = q_BHTE.dtype in (torch.bfloat16, torch.float16)
    if q_BHTE.is_cuda and not half:  # the memory-efficient kernel knows nothing of shared heads
        n = q_BHTE.shape[1] // k_BKTE.shape[1]
        k_BKTE, v_BKTE = (x.repeat_interleave(n, dim=1) for x in (k_BKTE, v_BKTE))
    shared = k_BKTE.shape[1] < q_BHTE.shape[1]
    attend = functools.partial(F.scaled_dot_product_attention, is_causal=True, enable_gqa=shared)
    if ends is None:
        return attend(q_BHTE, k_BKTE, v_BKTE)
    # All rows end to end: N = B·T.
    qkv = [x.transpose(1, 2).flatten(0, 1) for x in (q_BHTE, k_BKTE, v_BKTE)]
    if q_BHTE.is_cuda and half and q_BHTE.shape[-1] % 8 == 0 and torch.__version__ >= "2.12":
        # subtle: no string is compared here. Before 2.12 the arguments had other names.
        from torch.nn.attention.varlen import varlen_attn

        longest = q_BHTE.shape[2]
        y_NHE: Any = varlen_attn(qkv[0], qkv[1], qkv[2], ends, ends, longest, longest,
                                 window_size=(-1, 0), enable_gqa=shared)
    else:
        y_NHE = _by_documents(attend, ends, *qkv)
    return y_NHE.unflatten(0, (len(q_BHTE), -1)).transpose(1, 2)


def _by_documents(attend: Callable[..., Tensor], ends: Tensor, *qkv: Tensor) -> Tensor:
    """`attend` (1, heads, T, E) to one document after the other: (N, H, E)."""
    sizes = ends.diff().tolist()
    documents = zip(*(x.split(sizes) for x in qkv), strict=True)
    return torch.cat([attend(*(x.transpose(0, 1)[None] for x in document))[0].transpose(0, 1)
                      for document in documents])


class MLP(nn.Module):
    """SwiGLU (Shazeer 2020)."""

    def __init__(self, config: LlamaConfig):
        super().__init__()
        hidden, inner, bias = config.hidden_size, config.intermediate_size, config.ffn_bias
        self.gate_proj = nn.Linear(hidden, inner, bias=bias)
        self.up_proj = nn.Linear(hidden, inner, bias=bias)
        self.down_proj = nn.Linear(inner, hidden, bias=bias)

    def forward(self, x):
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class RMSNorm(nn.Module):
    """weight · x / √(mean x² + eps) (Zhang and Sennrich 2019)."""

    def __init__(self, config: LlamaConfig, size: int = 0):
        super().__init__()
        self.eps = config.rms_norm_eps
        self.weight = nn.Parameter(torch.ones(size or config.hidden_size))

    def forward(self, x):
        return _rms_norm(x, self.weight, self.eps)


def _rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """`RMSNorm` of x, computed in float32 at least."""
    return weight * F.rms_norm(at_least_float32(x), x.shape[-1:], eps=eps).to(x.dtype)


def at_least_float32(x: Tensor) -> Tensor:
    """x in float32; a float64 tensor stays as it is."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def _inverse_frequencies(config: LlamaConfig, device=None) -> Tensor:
    """RoPE's θ_p (P,), radians per position, in float32 as transformers has them."""
    exponent_P = torch.arange(0, config.head_dim, 2, device=device).float() / config.head_dim
    theta_P = 1.0 / config.rope_theta**exponent_P
    rope = config.rope_scaling or {}
    if rope.get("rope_type") == "linear":
        return theta_P / rope["factor"]
    if rope.get("rope_type") == "llama3":
        # Low frequencies are divided by the factor, high ones kept, those between interpolated.
        low, high = rope["low_freq_factor"], rope["high_freq_factor"]
        turns_P = rope["original_max_position_embeddings"] * theta_P / (2 * math.pi)
        keep_P = ((turns_P - low) / (high - low)).clamp(0, 1)
        return (1 - keep_P) * theta_P / rope["factor"] + keep_P * theta_P
    return theta_P


def document_positions(document_BT: Tensor, device) -> tuple[Tensor, Tensor]:
    """(The position (B, T) of each token in its document, the `ends` of `causal_attention`).

    If `document_BT` is in the host's memory, this does not wait for the GPU.
    """
    begins_BT = F.pad(document_BT.diff() != 0, (1, 0), value=True)
    time_T = torch.arange(begins_BT.shape[1], device=begins_BT.device)
    position_BT = time_T - (time_T * begins_BT).cummax(-1).values
    ends = F.pad(begins_BT.flatten().nonzero()[:, 0], (0, 1), value=begins_BT.numel()).int()
    return position_BT.to(device, non_blocking=True), ends.to(device, non_blocking=True)


def _rope_and_ends(config: LlamaConfig, x_BTD: Tensor, document_BT=None):
    """((cos, sin) of shape (B or 1, 1, T, P), the `ends` of `causal_attention`).

    subtle: computed at every call, and not a buffer, which would hold garbage after meta device ->
    to_empty -> load, and be wrong if it were rounded to bf16.
    """
    if isinstance(document_BT, Tensor):
        document_BT = document_positions(document_BT, x_BTD.device)
    time_T = torch.arange(x_BTD.shape[1], device=x_BTD.device)
    position_BT, ends = document_BT or (time_T[None], None)
    angle = position_BT[:, None, :, None].float() * _inverse_frequencies(config, x_BTD.device)
    return (angle.cos().to(x_BTD.dtype), angle.sin().to(x_BTD.dtype)), ends


def _apply_rope(x_BHTE: Tensor, rope: tuple[Tensor, Tensor]) -> Tensor:
    """Rotate plane p, the complex number x_p + i·x_(p + E/2), by exp(i·position·θ_p)."""
    (x, y), (cos, sin) = x_BHTE.chunk(2, dim=-1), rope
    return torch.cat([x * cos - y * sin, y * cos + x * sin], dim=-1)


# ---- 2 statistics --------------------------------------------------------------------------------

# No cache of keys or values is ever stored: alignment needs only their inner products, summed over
# the calibration tokens. That is K² blocks of E × E, however many tokens there are.


@dataclasses.dataclass(frozen=True)
class BlockStatistics:
    """What the alignment of a block needs to know, on the CPU in float64.

    key_PKK: Σ_n z_i[n] conj(z_j[n]) in each RoPE plane, complex. value_KKEE: Σ_n v_i[n]ᵀ v_j[n],
    vectors as rows. query_KP: Σ_n |q[n]|² over the query heads of each unit, in each plane.
    output_KEE: S_i = (Σ WoᵀWo)^½ over the query heads of each unit, so ‖v S_i‖² = Σ ‖v Woᵀ‖²: how
    much a value v changes the output. n_tokens: how many tokens the sums are over.
    key_power_K and free_plane_P are None unless keys are normed, as in Qwen3. Then key_PKK is of
    what comes out of the norm; key_power_K is Σ_n |k[n]|² before it; free_plane_P says which planes
    may turn, see `_free_keys`.
    """

    key_PKK: Tensor
    value_KKEE: Tensor
    query_KP: Tensor
    output_KEE: Tensor
    n_tokens: int
    key_power_K: Tensor | None = None
    free_plane_P: Tensor | None = None


def block_statistics(
    config: LlamaConfig, weights: Weights, x_BTD: Tensor, metric: str = "dist"
) -> BlockStatistics:
    """The statistics of a block on the hidden states that enter it.

    weights: the block's, named as in `Block`. metric: "cos" first scales every key and value vector
    to length 1 (eq. 7, 8), "dist" does not. Gram products, of some 4,096 tokens at a time, are made
    in float32 at least, and summed up in float64. Of at most 65,536 tokens, which may leave
    directions unseen, they are made in float64: rounding in float32 would look like energy there.
    """
    sums: dict[str, Tensor] = {}

    def add(name: str, products: Tensor) -> None:
        double = torch.promote_types(products.dtype, torch.float64)
        sums[name] = sums.get(name, 0) + products.to(double)

    for rows in x_BTD.split(max(1, 4096 // x_BTD.shape[1])):
        y_BTD = _rms_norm(rows, weights["input_layernorm.weight"].to(rows), config.rms_norm_eps)
        for name, gram in (("q", _query_power), ("k", key_gram), ("v", value_gram)):
            weight = weights[f"self_attn.{name}_proj.weight"]
            bias, norm = map(weights.get, (
                f"self_attn.{name}_proj.bias", f"self_attn.{name}_norm.weight"))
            with _autocast(rows.device, rows.shape[-1]):
                heads = F.linear(y_BTD, weight.to(rows), None if bias is None else bias.to(rows))
            heads = heads.double() if x_BTD[..., 0].numel() <= 65_536 else at_least_float32(heads)
            heads_NKE = heads.flatten(0, 1).unflatten(-1, (-1, config.head_dim))
            if norm is not None:
                add(f"{name} power", heads_NKE.double().square().sum((0, 2)))
                heads_NKE = _rms_norm(heads_NKE, norm.to(heads_NKE), config.rms_norm_eps)
            if metric == "cos" and name != "q":
                heads_NKE = F.normalize(heads_NKE, dim=-1)
            add(name, gram(heads_NKE))
    # To the CPU: that is where hundreds of small decompositions are fast, also `_output_root`'s.
    sums = {name: total.cpu() for name, total in sums.items()}
    query_KP = sums["q"].unflatten(0, (config.num_key_value_heads, -1)).sum(1)
    free_plane_P = None
    if config.qk_norm:
        q_2P, k_2P = (weights[f"self_attn.{name}_norm.weight"].cpu().view(2, -1) for name in "qk")
        free_plane_P = (q_2P[0] == q_2P[1]) & (k_2P[0] == k_2P[1])
    return BlockStatistics(sums["k"], sums["v"], query_KP, _output_root(config, weights),
                           x_BTD[..., 0].numel(), sums.get("k power"), free_plane_P)


def value_gram(v_NKE: Tensor) -> Tensor:
    """Gram blocks C_ij = Σ_n v_i[n]ᵀ v_j[n] of all pairs of heads: (K, K, E, E)."""
    v = v_NKE.flatten(1)
    return (v.T @ v).unflatten(1, v_NKE.shape[1:]).unflatten(0, v_NKE.shape[1:]).transpose(1, 2)


def key_gram(k_NKE: Tensor) -> Tensor:
    """Hermitian M_p[i, j] = Σ_n z_i[n] conj(z_j[n]) of each RoPE plane: complex (P, K, K).

    z_p = k_p + i·k_(p + E/2). It is the same before and after RoPE, which multiplies the keys of
    all heads by the same phase.
    """
    k = k_NKE.shape[1]
    # As products of real numbers, which are several times faster: real parts, then imaginary ones.
    xy_PNK = k_NKE.unflatten(-1, (2, -1)).permute(3, 0, 2, 1).flatten(2)
    gram = (xy_PNK.mT @ xy_PNK).unflatten(-1, (2, k)).unflatten(1, (2, k))
    return torch.complex(gram[:, 0, :, 0] + gram[:, 1, :, 1], gram[:, 1, :, 0] - gram[:, 0, :, 1])


def _free_keys(gram_PKK: Tensor, free_plane_P: Tensor | None) -> Tensor:
    """`key_gram` of the keys as far as maps are free to make them agree.

    All of it, unless keys are normed, as Qwen3's: there each head's query and key goes through
    RMSNorm, whose weights all heads share, and then through RoPE. The norm takes any length out, so
    only rotations are left of the free maps; and a plane whose two weights differ (of the queries'
    norm or of the keys') may not turn, but only change its sign: then the real part is all that
    there is to gain. (In trained models that is nearly every plane.)
    """
    if free_plane_P is None:
        return gram_PKK
    return torch.where(free_plane_P[:, None, None], gram_PKK, gram_PKK.real.to(gram_PKK.dtype))


def _query_power(q_NHE: Tensor) -> Tensor:
    """Σ_n |q|² (H, P) of each head in each RoPE plane."""
    x, y = q_NHE.chunk(2, dim=-1)
    return x.square().sum(0) + y.square().sum(0)


def _output_root(config: LlamaConfig, weights: Weights) -> Tensor:
    """S_i = (Σ WoᵀWo)^½ (K, E, E) over the query heads of a unit: ‖v S_i‖² = Σ ‖v Woᵀ‖²."""
    heads = (config.num_key_value_heads, -1, config.head_dim)
    wo_KQED = weights["self_attn.o_proj.weight"].double().mT.unflatten(0, heads)
    value, vector = torch.linalg.eigh((wo_KQED @ wo_KQED.mT).sum(1).cpu())
    root = value.clamp(min=1e-12 * value.max() + _FLOOR).sqrt()  # not 0: it will be inverted
    return (vector * root[..., None, :]) @ vector.mT


# ---- 3 alignment ---------------------------------------------------------------------------------

# What may be changed without changing the model: the values of a unit may be multiplied by any
# invertible matrix, if Wo is multiplied by its inverse. For keys the map must commute with RoPE, or
# scores would depend on the position: in each plane only multiplication by a complex number does.


def _polar(a: Tensor) -> Tensor:
    """The unitary q of shape (…, E, E) with the greatest Re⟨a, q⟩: U Vᴴ of a = U S Vᴴ.

    For a single complex number, which a head is in a RoPE plane, it is the phase a/|a|.
    """
    if a.is_complex() and a.shape[-1] == 1:
        return torch.polar(torch.ones_like(a.real), a.angle())
    u, _, vh = torch.linalg.svd(a)
    return u @ vh


def procrustes(a_NE: Tensor, b_NE: Tensor) -> Tensor:
    """The orthogonal map that takes one matrix closest to another.

        q = argmin ‖a q − b‖ over qᵀq = 1  =  U Vᵀ,  where aᵀ b = U S Vᵀ

    (Schönemann 1966; eq. 5, 6.) Returns q (E, E), of either determinant. Raises ValueError unless a
    and b are matrices of one shape.

    >>> a = torch.tensor([[1.0, 0.0], [0.0, 2.0], [3.0, 1.0]])
    >>> q = torch.tensor([[0.0, 1.0], [-1.0, 0.0]])
    >>> torch.allclose(procrustes(a, a @ q), q, atol=1e-6)
    True
    """
    _check_pair(a_NE, b_NE)
    return _polar(a_NE.mT @ b_NE)


def rope_procrustes(a_NE: Tensor, b_NE: Tensor) -> Tensor:
    """The map that takes one matrix closest to another, of those that commute with RoPE.

        α_p = argmin Σ_n |exp(iα_p) a_p[n] − b_p[n]|²  =  arg Σ_n b_p[n] conj(a_p[n])

    These are rotations by one angle α_p in each plane (eq. 14). Plane p is the complex number of
    dimensions (p, p + E/2), as in Hugging Face checkpoints. Returns q (E, E) for a q ≈ b. Raises
    ValueError unless a and b are matrices of one shape with an even E.

    >>> a = torch.tensor([[1.0, 0.0], [0.0, 2.0], [3.0, 1.0]])
    >>> reflected = a * torch.tensor([1.0, -1.0])  # no rotation of the plane can undo it
    >>> torch.linalg.det(rope_procrustes(a, reflected)).round()
    tensor(1.)
    """
    _check_pair(a_NE, b_NE)
    if a_NE.shape[1] % 2:
        raise ValueError(f"E is {a_NE.shape[1]}, but RoPE needs an even one")
    gram_P22 = key_gram(torch.stack([b_NE, a_NE], dim=1))
    c_P = _polar(gram_P22[:, 0, 1, None, None]).flatten()
    cos, sin = c_P.real.diag(), c_P.imag.diag()
    return torch.cat([torch.cat([cos, sin], dim=1), torch.cat([-sin, cos], dim=1)])


def _check_pair(a_NE: Tensor, b_NE: Tensor) -> None:
    """Raise ValueError unless both are matrices (N, E)."""
    if a_NE.ndim != 2 or a_NE.shape != b_NE.shape:
        found = f"{list(a_NE.shape)} and {list(b_NE.shape)}"
        raise ValueError(f"expected two matrices (N, E) of one shape, found {found}")


def _inner_products(gram: Tensor, maps: Tensor) -> Tensor:
    """Re⟨Y_i, Y_j⟩ (…, M, M) of the mapped heads Y_i = X_i q_i: Re tr(q_iᴴ C_ij q_j)."""
    left = maps.mH[..., :, None, :, :] @ gram  # (…, M, M, E, E)
    return (left * maps.mT[..., None, :, :, :]).sum((-1, -2)).real


def generalized_procrustes(gram: Tensor, rope: bool = False) -> tuple[Tensor, Tensor]:
    """Rotate the M heads of a group so that they agree best (algorithm 1, in Gram space).

        maximise  Σ_(i<j) ⟨X_i q_i, X_j q_j⟩  =  Σ_(i<j) tr(q_iᵀ C_ij q_j),   C_ij = X_iᵀ X_j
        one round, for each head in turn:  q_i ← U Vᵀ,  where Σ_(j≠i) C_ij q_j = U S Vᵀ

    gram: C_ij as (…, M, M, E, E), real; or with rope=True Σ_n z_i conj(z_j) as (…, P, M, M),
    complex, where each plane is a problem of its own. Leading dimensions are separate problems.
    Returns (maps, history). maps: (…, M, E, E) orthogonal, X_i q_i agree; or (…, P, M) complex of
    modulus 1, c_i z_i agree; the first head's map is the identity. history: the objective
    (rounds + 1, …) or (rounds + 1, …, P), which never falls. Raises ValueError for another shape.

    Each update is the exact maximum over that head's map. Algorithm 1 of the paper rotates all
    heads onto one mean that contains them, which is monotone, too, but takes several times as many
    rounds. A round starts ahead of the maps, by momentum (Nesterov 1983), which is dropped where it
    gains nothing. Stops when every problem gains less than 1e-8 of its objective in a round
    without it, or after 500.

    >>> x_NE = torch.randn(50, 4, dtype=torch.float64)
    >>> x_MNE = torch.stack([x_NE, x_NE.flip(1), -x_NE])
    >>> maps, _ = generalized_procrustes(torch.einsum("ine,jnf->ijef", x_MNE, x_MNE))
    >>> torch.allclose(x_MNE @ maps, x_NE.expand(3, 50, 4))
    True
    """
    if gram.ndim < (3 if rope else 4) or gram.shape[-1] != gram.shape[-2]:
        raise ValueError(f"expected a Gram (…, M, M, E, E) or (…, P, M, M), found {[*gram.shape]}")
    # A RoPE plane is a head of one complex number; and Σ z_i conj(z_j) = conj(X_iᴴ X_j).
    gram = gram.conj()[..., None, None] if rope else gram
    maps = _polar(gram[..., :, 0, :, :])  # the start: every head onto the first (eq. 6)
    maps[..., 0, :, :] = torch.eye(gram.shape[-1], dtype=gram.dtype, device=gram.device)
    history = [_inner_products(gram, maps).triu(1).sum((-1, -2))]
    before, run = maps, torch.ones_like(history[0])  # run: rounds since the momentum's last start
    for _ in range(500):
        ahead = maps + ((run - 1) / (run + 2))[..., None, None, None] * (maps - before)
        for i in range(gram.shape[-4]):  # q_i ← polar(Σ_(j≠i) C_ij q_j)
            js = [j for j in range(gram.shape[-4]) if j != i]
            ahead[..., i, :, :] = _polar((gram[..., i, js, :, :] @ ahead[..., js, :, :]).sum(-3))
        gain = _inner_products(gram, ahead).triu(1).sum((-1, -2)) - history[-1]
        moves = gain > 1e-8 * history[-1].abs()
        if not (moves | (run > 1)).any():
            break
        run = torch.where(moves, run + 1, 1)
        better = (gain > 0)[..., None, None, None]
        before, maps = maps, torch.where(better, ahead, maps)
        history.append(history[-1] + gain.clamp(min=0))
    maps = maps @ maps[..., :1, :, :].mH  # a rotation common to all heads is free
    return (maps[..., 0, 0] if rope else maps), torch.stack(history)


# Of energies in float64. TINY is added, so that heads of zeros do not divide 0 by 0. FLOOR is the
# least energy of what will be inverted.
_TINY, _FLOOR = 1e-100, 1e-30


def shared_keys(gram_PMM: Tensor, power_MP: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The one key that serves M heads best: a weighted PCA of rank 1 in each RoPE plane.

        minimise  Σ_i ω_i Σ_n |z_i[n] − a_i s[n]|²  over the shared key s and complex numbers a_i

    Heads need not become alike to share a key s. It is enough that each is some multiple of it,
    z_i ≈ a_i s: scores are Re q_i conj(z_i), so the query takes the factor, q_i → conj(a_i) q_i.
    ω_i is the power Σ |q_i|² of the queries that read head i: so an error in z_i is weighted by its
    effect on the scores, if errors and queries are independent.
    The solution (Eckart and Young 1936): with λ and u the leading eigenvalue and eigenvector of
    √ω_i C_ij √ω_j,

        s = mean of c_i z_i,   c_i = M σ √ω_i conj(u_i),   a_i = u_i / (σ √ω_i)

    It is a mean because that is what `merge` takes. Any σ will do; σ² = mean of C_ii / λ gives s
    the mean power of the M heads, which keeps the weights near their size.
    gram: (…, P, M, M), C_ij = Σ_n z_i conj(z_j). power: ω (…, M, P). Returns (maps c, inverse maps
    a, kept): complex (…, M, P) twice, and the share (…) of the energy Σ ω_i |z_i|² that is kept.

    >>> z_N = torch.randn(50, dtype=torch.complex128)
    >>> z_MN = torch.stack([z_N, 2j * z_N])
    >>> maps_MP, inverses_MP, kept = shared_keys((z_MN @ z_MN.mH)[None], torch.ones(2, 1).double())
    >>> s_N = (maps_MP * z_MN).mean(0)
    >>> torch.allclose(inverses_MP * s_N, z_MN)
    True
    """
    m = power_MP.shape[-2]
    # subtle: not 0, since queries without power in a plane would divide by it.
    root_PM = power_MP.mT.clamp(min=1e-9 * power_MP.max() + _FLOOR).sqrt()
    energy_PM, vector_PMM = torch.linalg.eigh(
        root_PM[..., :, None] * gram_PMM * root_PM[..., None, :])
    best_P, u_PM = energy_PM[..., -1], vector_PMM[..., -1]
    power_P = gram_PMM.diagonal(dim1=-2, dim2=-1).real.mean(-1)
    sigma_PM = (power_P.clamp(min=_TINY) / best_P.clamp(min=_TINY)).sqrt()[..., None]
    maps_PM = m * sigma_PM * root_PM * u_PM.conj()
    inverses_PM = u_PM / (sigma_PM * root_PM)
    kept = (best_P.sum(-1) + _TINY) / (energy_PM.sum((-1, -2)) + _TINY)
    return maps_PM.mT, inverses_PM.mT, kept


def shared_values(gram_MMEE: Tensor, root_MEE: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The one value head that serves M heads best: a weighted PCA of rank E.

        minimise  Σ_i Σ_n ‖(v_i[n] − w[n] r_i) S_i‖²  over the shared value w and matrices r_i

    The same as `shared_keys` with matrices for numbers: it is enough that each v_i is some linear
    map of one shared value w (rows are vectors), since Wo can take r_i. An error in v_i is weighted
    by its effect on the output, hence S_i. With U the E leading eigenvectors (M·E, E) of the Gram
    of all v_i S_i side by side, U_i their rows of head i, and λ the sum of their eigenvalues,

        w = mean of v_i q_i,   q_i = M σ S_i U_i,   r_i = U_iᵀ S_i⁻¹ / σ,   σ² = mean of tr C_ii / λ

    gram: (…, M, M, E, E), C_ij = Σ_n v_iᵀ v_j. root: S (…, M, E, E), symmetric, see
    `BlockStatistics`. Returns (maps q, inverse maps r, kept): (…, M, E, E) twice, and the share (…)
    of the energy Σ ‖v_i S_i‖² that is kept.

    >>> v_NE = torch.randn(50, 4, dtype=torch.float64)
    >>> v_MNE = torch.stack([v_NE, v_NE @ torch.randn(4, 4, dtype=torch.float64)])
    >>> gram, root = torch.einsum("ine,jnf->ijef", v_MNE, v_MNE), torch.eye(4).double()
    >>> maps_MEE, inverses_MEE, kept = shared_values(gram, root.expand(2, 4, 4))
    >>> w_NE = (v_MNE @ maps_MEE).mean(0)
    >>> torch.allclose(w_NE @ inverses_MEE, v_MNE)
    True
    """
    m, e = root_MEE.shape[-3], root_MEE.shape[-1]
    weighted = root_MEE[..., :, None, :, :] @ gram_MMEE @ root_MEE[..., None, :, :, :]
    energy, vector = torch.linalg.eigh(_block_matrix(weighted))
    u_MEE = vector[..., -e:].unflatten(-2, (m, e))
    best, power = energy[..., -e:].sum(-1), gram_MMEE.diagonal(dim1=-4, dim2=-3)
    power = power.diagonal(dim1=-3, dim2=-2).sum((-1, -2)) / m
    sigma = (power.clamp(min=_TINY) / best.clamp(min=_TINY)).sqrt()[..., None, None, None]
    maps_MEE = m * sigma * root_MEE @ u_MEE
    inverses_MEE = u_MEE.mT @ torch.linalg.inv(root_MEE) / sigma
    kept = (best + _TINY) / (energy.sum(-1) + _TINY)
    return maps_MEE, inverses_MEE, kept


def _block_matrix(blocks_MMEE: Tensor) -> Tensor:
    """The matrix (…, M·E, M·E) of blocks (…, M, M, E, E)."""
    return blocks_MMEE.transpose(-3, -2).flatten(-2).flatten(-3, -2)


# ---- 4 grouping ----------------------------------------------------------------------------------


def head_similarity(gram: Tensor, n_tokens: int, metric: str, rope: bool = False) -> Tensor:
    """How alike two heads are after the best rotation of the one onto the other: s (K, K).

        cos:   s_ij = max_q ⟨X_i, X_j q⟩ / N                                     (eq. 18, 19)
        dist:  s_ij = −min_q ‖X_i − X_j q‖² / N                                  (eq. 22, squared)

    The best inner product is the nuclear norm ‖C_ij‖_* for values and Σ_p |M_p[i, j]| for keys.
    gram: (K, K, E, E) real or, with rope=True, (P, K, K) complex, summed over `n_tokens`; for "cos"
    of vectors of length 1. The square of the distance is what the paper's code uses. Raises
    ValueError for another metric.
    """
    inner_KK = gram.abs().sum(0) if rope else torch.linalg.svdvals(gram).sum(-1)
    return _similarity(inner_KK, n_tokens, metric)


def _similarity(inner_KK: Tensor, n_tokens: int, metric: str) -> Tensor:
    """The similarity of heads by their inner products ⟨Y_i, Y_j⟩ (…, K, K) over `n_tokens`."""
    if metric == "cos":
        return inner_KK / n_tokens
    if metric != "dist":
        raise ValueError(f"metric {metric!r}: expected cos or dist")
    power_K = inner_KK.diagonal(dim1=-2, dim2=-1)
    return (2 * inner_KK - power_K[..., :, None] - power_K[..., None, :]) / n_tokens


def discarded_energy(statistics: BlockStatistics) -> tuple[Tensor, Tensor]:
    """What is lost if two heads share one: (loss (K, K), kept (2, K, K)), symmetric.

        loss_ij = keys_ij / mean keys + values_ij / mean values

    keys_ij and values_ij: the energy that linear alignment loses. In each plane a shared key keeps
    one of the pair's two eigenvalues, and the smaller one is lost (of normed keys, which only turn,
    half of |x − y|² at the best rotation). A shared value keeps E of the pair's 2E eigenvalues, and
    the E smallest are lost. The loss of a larger group is taken to be the sum over its pairs.
    kept: the share of the mean pair's energy that stays, mean of keys' and values'; first with
    heads as they are, where both become their mean, then aligned.
    """
    k, e = statistics.output_KEE.shape[:2]
    s_KEE, pairs = statistics.output_KEE, torch.combinations(torch.arange(k))
    found = []  # (3: lost as they are, lost aligned, energy; keys or values; pairs)
    for chunk in pairs.split(64):  # all at once would be a gigabyte
        i, j = chunk[:, :, None], chunk[:, None, :]
        z, v = statistics.key_PKK[:, i, j], statistics.value_KKEE[i, j]
        root = statistics.query_KP.sqrt()[chunk].movedim(-1, 0)  # (P, pairs, 2)
        if statistics.free_plane_P is None:
            keys = torch.linalg.eigvalsh(  # in ascending order
                root[..., :, None] * z * root[..., None, :])
        else:  # heads of one length that only turn: the best they can share is their mean
            agree = _free_keys(z[..., 0, 1, None], statistics.free_plane_P)[..., 0].abs()
            mean = z.diagonal(dim1=-2, dim2=-1).real.mean(-1)
            keys = torch.stack([mean - agree, mean + agree], -1)
            keys *= root.square().mean(-1, keepdim=True)
        values = torch.linalg.eigvalsh(_block_matrix(s_KEE[i] @ v @ s_KEE[j]))
        # Of x and y with weights a and b, a |x − (x+y)/2|² + b |y − (x+y)/2|² = (a+b)/4 |x − y|².
        z_apart = (z[..., 0, 0] + z[..., 1, 1] - 2 * z[..., 0, 1]).real
        v_apart = v[:, 0, 0] + v[:, 1, 1] - 2 * v[:, 0, 1]
        as_they_are = torch.stack([(root.square().sum(-1) * z_apart).sum(0),
                                   ((s_KEE @ s_KEE)[chunk].sum(1) * v_apart).sum((1, 2))]) / 4
        aligned = torch.stack([keys[..., 0].sum(0), values[:, :e].sum(1)])
        energy = torch.stack([keys.sum((0, 2)), values.sum(1)])
        found.append(torch.stack([as_they_are, aligned, energy]))
    as_they_are, aligned, energy = torch.cat(found, dim=2)
    # subtle: losses below a 1e-12th of the energy are rounding, and count as none.
    energy = energy.mean(1, keepdim=True).clamp(min=_TINY)
    loss = (aligned / aligned.mean(1, keepdim=True).clamp(min=1e-12 * energy)).sum(0)
    kept = [1 - (lost / energy).mean(0) for lost in (as_they_are, aligned)]
    tables = torch.zeros(3, k, k, dtype=torch.float64)
    tables[:, pairs[:, 0], pairs[:, 1]] = torch.stack([loss, *kept])
    tables += tables.mT.clone()
    return tables[0], tables[1:]


def anneal_groups(
    s_KK: Tensor | np.ndarray, n_groups: int, seed: int = 0, temperature: float = 2.0
) -> list[list[int]]:
    """Split K heads into equal groups that hold the most similar heads.

        maximise  Σ over groups, Σ_(i<j in the group) s_ij                       (eq. 23, 24)

    Simulated annealing by swaps of two heads (algorithm 2), 512 restarts of 8 K² steps side by side
    (half as many still found the best for 40 heads). `temperature` is the initial one, in standard
    deviations of s; it falls to a hundredth of that. 0 is the paper's rule: improvements only.
    Returns `n_groups` sorted lists, ordered by their first heads. Raises ValueError if `n_groups`
    does not divide K or s is not a square matrix of finite numbers.

    >>> anneal_groups(np.array([[0, 1, 9, 1], [1, 0, 1, 8], [9, 1, 0, 1], [1, 8, 1, 0]]), 2)
    [[0, 2], [1, 3]]
    """
    s = torch.as_tensor(s_KK, dtype=torch.float64, device="cpu").numpy().copy()
    k = len(s)
    if s.shape != (k, k) or not np.isfinite(s).all():
        raise ValueError(f"expected a square matrix of finite similarities, found {s.tolist()}")
    if n_groups < 1 or k % n_groups:
        raise ValueError(f"{k} heads cannot be split into {n_groups} equal groups")
    s = (s + s.T) / 2
    np.fill_diagonal(s, 0)
    rng = np.random.default_rng(seed)
    group_RK = rng.permuted(np.tile(np.arange(k) * n_groups // k, (512, 1)), axis=1)
    group_RK = _metropolis_swaps(s, group_RK, 8 * k * k, temperature * s.std(), rng)
    best_K = group_RK[((group_RK[:, :, None] == group_RK[:, None, :]) * s).sum((1, 2)).argmax()]
    return sorted(np.flatnonzero(best_K == g).tolist() for g in range(n_groups))


def _metropolis_swaps(s_KK, group_RK, steps, temperature, rng) -> np.ndarray:
    """Propose a swap in every restart; accept it if u < exp(gain / T), u uniform in (0, 1).

    That is gain > T log u, and −log u has the exponential distribution.
    With a[r, i, g] the sum of s between head i and the heads of group g, in restart r: if heads i
    and j of groups g and h change places, the score gains
    a[i, h] − a[i, g] + a[j, g] − a[j, h] − 2 s_ij. The first and third terms count s_ij as if one
    joined the other, but they stay apart.
    """
    group_RK, rows = group_RK.copy(), np.arange(len(group_RK))
    a_RKG = s_KK @ (group_RK[:, :, None] == np.arange(group_RK.max() + 1)).astype(np.float64)
    cooling = temperature * np.geomspace(1, 0.01, steps)
    i_SR, j_SR = rng.integers(len(s_KK), size=(2, steps, len(rows)))
    threshold_SR = -cooling[:, None] * rng.exponential(size=(steps, len(rows)))
    for i, j, threshold in zip(i_SR, j_SR, threshold_SR, strict=True):
        gi, gj = group_RK[rows, i], group_RK[rows, j]
        gain = a_RKG[rows, i, gj] - a_RKG[rows, i, gi] + a_RKG[rows, j, gi] - a_RKG[rows, j, gj]
        gain -= 2 * s_KK[i, j]
        r = np.flatnonzero((gi != gj) & (gain > threshold))
        i, j, gi, gj = i[r], j[r], gi[r], gj[r]
        moved = s_KK[i] - s_KK[j]  # head i leaves group gi and joins gj, head j the other way
        a_RKG[r, :, gi] -= moved
        a_RKG[r, :, gj] += moved
        group_RK[r, i], group_RK[r, j] = gj, gi
    return group_RK


# ---- 5 map and merge -----------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class HeadMaps:
    """How the K units of a block are mapped, in the order of their groups (eq. 12-17).

        keys    z_i → c_i z_i, read back as z_i ≈ a_i (c_i z_i):   Wq_i → conj(a_i) Wq_i
        values  v_i → v_i q_i, read back as v_i ≈ (v_i q_i) r_i:   Wo_i → Wo_i r_iᵀ

    key_KP: c, one complex number for each RoPE plane. value_KEE: q. key_inverse_KP: a.
    value_inverse_KEE: r. With a = 1/c and r = q⁻¹ the block computes the same, for any c but 0 and
    any invertible q. With linear alignment the brackets are the shared head instead, which is the
    mean of the mapped ones: see `shared_keys`.
    """

    key_KP: Tensor
    value_KEE: Tensor
    key_inverse_KP: Tensor
    value_inverse_KEE: Tensor


def transform(
    weights: Weights, config: LlamaConfig, order_K: Sequence[int], maps: HeadMaps
) -> dict[str, Tensor]:
    """A block's weights with its units in a new order, and mapped.

    Attention's weights come back in float64, so that only the last cast rounds.
    """
    mapped = dict(weights)
    for name, weight in weights.items():
        part = name.removeprefix("self_attn.")[:6]
        if part not in ("q_proj", "k_proj", "v_proj", "o_proj") or name.endswith("o_proj.bias"):
            continue  # the output's bias belongs to no head
        rows = weight.double().mT if part == "o_proj" else weight.double()  # Wo's heads are columns
        w_KQED = rows.reshape(config.num_key_value_heads, -1, config.head_dim, rows[0].numel())
        w_KQED = w_KQED[torch.as_tensor(order_K)]
        if part in ("q_proj", "k_proj"):
            c_KP = maps.key_KP if part == "k_proj" else maps.key_inverse_KP.conj()
            z_KQPD = torch.complex(*w_KQED.chunk(2, dim=2)) * c_KP.to(rows.device)[:, None, :, None]
            w_KQED = torch.cat([z_KQPD.real, z_KQPD.imag], dim=2)
        else:  # Wv -> qᵀ Wv, Wo -> Wo rᵀ, and (Wo rᵀ)ᵀ = r Woᵀ
            left_KEE = maps.value_KEE.mT if part == "v_proj" else maps.value_inverse_KEE
            w_KQED = left_KEE.to(rows.device)[:, None] @ w_KQED
        rows = w_KQED.reshape(rows.shape)
        mapped[name] = rows.mT.contiguous() if part == "o_proj" else rows
    return mapped


def merge(weights: Weights, config: LlamaConfig, kv_heads: int) -> dict[str, Tensor]:
    """A block with each run of K/G neighbouring key and value heads averaged into one (eq. 25, 26).

    Of untouched weights this is the mean-pooling of Ainslie et al. 2023. Averaged tensors come back
    in float64.
    """
    out = dict(weights)
    for name, weight in weights.items():
        if name.startswith(("self_attn.k_proj.", "self_attn.v_proj.")):
            w_KED = weight.double().reshape(config.num_key_value_heads, config.head_dim, -1)
            merged = w_KED.unflatten(0, (kv_heads, -1)).mean(1)
            out[name] = merged.reshape(-1, *weight.shape[1:])
    return out


# ---- 6 masks and losses --------------------------------------------------------------------------

# The paper's way of training: masks let the original heads fade into the merged ones, while the
# student's logits are held to the teacher's. The conversion itself needs only `kl_loss`.

# The hard concrete distribution of Louizos et al. 2017: temperature β, stretched to (γ, ζ).
_BETA, _GAMMA, _ZETA = 2 / 3, -0.1, 1.1


def hard_concrete(log_alpha: Tensor, generator: torch.Generator | None = None) -> Tensor:
    """Masks in [0, 1], which are exactly 0 and exactly 1 with probabilities above zero.

        s = σ((log u − log(1 − u) + log α) / β),   z = min(1, max(0, s (ζ − γ) + γ))

    with u uniform from the generator; no generator means no sampling: s = σ(log α) (Louizos et al.
    2017, eq. 10-13). Returns z of log_alpha's shape.

    >>> hard_concrete(torch.tensor([-20.0, 0.0, 20.0]))
    tensor([0.0000, 0.5000, 1.0000])
    """
    s = torch.sigmoid(log_alpha)
    if generator is not None:
        u = torch.rand(log_alpha.shape, generator=generator, device=log_alpha.device)
        s = torch.sigmoid((torch.logit(u.to(log_alpha.dtype)) + log_alpha) / _BETA)
    return (s * (_ZETA - _GAMMA) + _GAMMA).clamp(0, 1)


def open_probability(log_alpha: Tensor) -> Tensor:
    """P(z > 0) = σ(log α − β log(−γ/ζ)), of log_alpha's shape (Louizos et al. 2017, eq. 12)."""
    return torch.sigmoid(log_alpha - _BETA * math.log(-_GAMMA / _ZETA))


def l0_loss(log_alpha: Tensor, target: float) -> Tensor:
    """|s − T| + (s − T)², a scalar, with s the mean P(z > 0) over all masks (eq. 29)."""
    gap = open_probability(log_alpha).mean() - target
    return gap.abs() + gap.square()


def kl_loss(student: Tensor, teacher: Tensor, temperature: float = 1.0) -> Tensor:
    """KL(teacher ‖ student) = Σ_v t_v (log t_v − log s_v) of logits (…, V).

    Both are divided by the temperature; there is no factor T². Computed in float32 at least.
    Returns nats for each token, (…), not reduced.
    """
    log_s, log_t = (F.log_softmax(at_least_float32(x) / temperature, dim=-1)
                    for x in (student, teacher))
    return (log_t.exp() * (log_t - log_s)).sum(-1)


def bild_loss(
    student: Tensor, teacher: Tensor, top_k: int = 16, temperature: float = 3.0
) -> Tensor:
    """Bi-directional logits difference loss (Li et al. 2024) of logits (…, V).

        Σ over leader in (teacher, student):  KL(softmax(Δ^t / T) ‖ softmax(Δ^s / T)),
        Δ = (l_i − l_j for all i < j among the leader's k greatest logits)

    The softmax is over the k(k − 1)/2 pairs. The leader's choice is a constant to the gradient;
    there is no factor T². Returns nats for each token, (…), not reduced. Raises ValueError if
    `top_k` is less than 2 or more than V.

    >>> teacher = torch.tensor([[3.0, 2.0, 0.0]])
    >>> bild_loss(teacher + 5, teacher, top_k=3)  # only differences count
    tensor([0.])
    """
    if not 2 <= top_k <= student.shape[-1]:
        raise ValueError(f"top_k {top_k}: expected 2 to the vocabulary's {student.shape[-1]}")
    i, j = torch.triu_indices(top_k, top_k, 1, device=student.device)
    losses = []
    for leader in (teacher, student):
        ids = leader.detach().topk(top_k, dim=-1).indices
        student_k, teacher_k = (at_least_float32(x.gather(-1, ids)) for x in (student, teacher))
        losses.append(kl_loss(student_k[..., i] - student_k[..., j],
                              teacher_k[..., i] - teacher_k[..., j], temperature))
    return losses[0] + losses[1]


# ---- 7 the walk and the refit --------------------------------------------------------------------


@dataclasses.dataclass(frozen=True, kw_only=True)
class Method:
    """How to convert. Checks itself and fills in its defaults; raises ValueError.

    align: "linear", the maps onto one shared head that serves the group best; "rotation", the
    paper's; or "none", plain averages. refit: train each block's attention to reproduce the
    source's hidden states (None: with "linear"). joint: then that of all blocks together to
    reproduce its predictions, see `joint_refit` (None: with a refit). group: the heads of a group
    lose the least "energy" together, have similar "value"s or "key"s, or are "adjacent" (None:
    energy, value, adjacent for the three ways to align). metric of similarity: "dist" or "cos".
    seed: for all that is random.
    """

    CHOICES: ClassVar = {"align": ("linear", "rotation", "none"), "metric": ("dist", "cos"),
                         "group": ("energy", "value", "key", "adjacent")}
    GROUP_FOR: ClassVar = {"linear": "energy", "rotation": "value", "none": "adjacent"}

    align: str = "linear"
    refit: bool | None = None
    joint: bool | None = None
    group: str | None = None
    metric: str = "dist"
    seed: int = 0

    def __post_init__(self):
        refit = self.align == "linear" if self.refit is None else self.refit
        defaults = {"refit": refit, "joint": refit, "group": self.GROUP_FOR.get(self.align)}
        for name, default in defaults.items():
            if getattr(self, name) is None:
                object.__setattr__(self, name, default)
        for name, choices in self.CHOICES.items():
            if getattr(self, name) not in choices:
                raise ValueError(f"{name} {getattr(self, name)!r}: expected {', '.join(choices)}")
        if self.metric == "cos" and (self.align == "linear" or self.group == "energy"):
            raise ValueError("metric cos: linear alignment and groups by energy weigh errors, not "
                             "angles, and need dist")
        if not 0 <= self.seed < 2**32:
            raise ValueError(f"seed {self.seed}: expected 0 to {2**32 - 1}")


@dataclasses.dataclass(frozen=True)
class ConvertedBlock:
    """What `converted_blocks` yields; weights are named as in `Block`.

    aligned: with its units mapped and in the order of their groups, before the merge; empty after a
    refit, which changes other weights, too. converted: the result, in the source's dtype. report:
    its groups and how well they fit.
    """

    aligned: dict[str, Tensor]
    converted: dict[str, Tensor]
    report: dict[str, Any]


@torch.no_grad()
def converted_blocks(
    config: LlamaConfig, weights: Weights, tokens_BT: Tensor, kv_heads: int,
    method: Method = Method(), device: Device = None, document_BT: Tensor | None = None
) -> Iterator[ConvertedBlock]:
    """Convert one block after the other: in memory is this one alone, as it was and as it becomes.

    tokens_BT: rows of text to calibrate with, see `refit_rows`; `document_BT` as in
    `Llama.forward`. device: where to compute; None: where the weights are.
    Two streams of hidden states walk along. The source's gives the statistics, and each block's
    output is what its refit should reproduce. The converted model's is what the refit starts from.
    Raises ValueError for too few rows, and for weights or hidden states that are not finite.
    """
    new_config = gqa_config(config, kv_heads)
    rows_BT, document_BT = refit_rows(config, weights, tokens_BT, method, device, document_BT)
    source_x = embed(weights, rows_BT, device)
    converted_x = source_x.clone() if method.refit else torch.empty(0)
    for i in range(config.num_hidden_layers):
        source, seed = read_block(weights, i, device), method.seed + i
        statistics = block_statistics(config, source, source_x, method.metric)
        _run_block_(config, source, source_x, f"block {i}", document_BT)
        # source_x now holds the hidden states after the block, which are the refit's target.
        groups, of_pairs = _choose_groups(statistics, kv_heads, method, seed)
        maps, of_maps = _align_groups(statistics, groups, method)
        report = {"groups": groups, **of_pairs, **of_maps}
        aligned = transform(source, config, sum(groups, []), maps)
        converted = _cast_like(source, merge(aligned, config, kv_heads))
        if method.refit:
            aligned = {}  # in float64: too large to keep
            converted, report["refit"] = refit_block(
                new_config, converted, converted_x, source_x, seed, document_BT)
            _run_block_(new_config, converted, converted_x, f"converted block {i}", document_BT)
        yield ConvertedBlock(aligned, converted, report)


def _choose_groups(
    statistics: BlockStatistics, kv_heads: int, method: Method, seed: int
) -> tuple[list[list[int]], dict[str, Any]]:
    """The units of each of `kv_heads` groups; and for the report how well each pair fits, before
    and after it is aligned: the share of energy that stays or, of values or keys, the similarity.
    """
    if method.group == "adjacent":
        return torch.arange(len(statistics.output_KEE)).view(kv_heads, -1).tolist(), {}
    if method.group == "energy":
        loss_KK, (before_KK, after_KK) = discarded_energy(statistics)
        s_KK = -loss_KK
    else:
        by_key, gram = method.group == "key", statistics.value_KKEE
        gram = _free_keys(statistics.key_PKK, statistics.free_plane_P) if by_key else gram
        inner_KK = gram.real.sum(0) if by_key else gram.diagonal(dim1=-2, dim2=-1).sum(-1)
        before_KK = _similarity(inner_KK, statistics.n_tokens, method.metric)
        s_KK = after_KK = head_similarity(gram, statistics.n_tokens, method.metric, rope=by_key)
    pairs = {"before": before_KK, "after": after_KK}
    if method.align == "none":
        s_KK, pairs = before_KK, {"before": before_KK}
    rounded = {name: [[float(f"{s:.3g}") for s in row] for row in found.tolist()]
               for name, found in pairs.items()}
    return anneal_groups(s_KK, kv_heads, seed), {"pairs": rounded}


def _align_groups(
    statistics: BlockStatistics, groups: list[list[int]], method: Method
) -> tuple[HeadMaps, dict[str, Any]]:
    """The maps of a block's units, in the order of the groups; and for the report the share of
    energy that the shared heads of linear alignment keep."""
    g_GM, kept = torch.tensor(groups), dict[str, Tensor]()
    i, j = g_GM[:, :, None], g_GM[:, None, :]
    value_GMMEE, key_GPMM = statistics.value_KKEE[i, j], statistics.key_PKK[:, i, j].movedim(0, 1)
    keys = key_inverses = torch.ones_like(key_GPMM[..., 0]).mT  # (G, M, P): as they are
    values = torch.eye(value_GMMEE.shape[-1]).to(value_GMMEE).expand(*g_GM.shape, -1, -1)
    # As if heads had been seen to be equal in all planes and directions, with this little energy
    # (less would drown in rounding): maps that the text does not determine would be arbitrary.
    key_GPMM = key_GPMM + (1e-9 * key_GPMM.abs().max() + _FLOOR)
    value_GMMEE = value_GMMEE + (1e-9 * value_GMMEE.abs().max() + _FLOOR) * values[:, :, None]
    if method.align == "linear" and statistics.free_plane_P is None:
        keys, key_inverses, kept["key"] = shared_keys(key_GPMM, statistics.query_KP[g_GM])
    elif method.align != "none":
        keys, key_inverses = _rotated_keys(key_GPMM, statistics, g_GM)
    if method.align == "rotation":
        values, _ = generalized_procrustes(value_GMMEE)
    value_inverses = torch.linalg.inv(values)
    if method.align == "linear":
        values, value_inverses, kept["value"] = shared_values(
            value_GMMEE, statistics.output_KEE[g_GM])
    maps = HeadMaps(*(t.flatten(0, 1) for t in (keys, values, key_inverses, value_inverses)))
    return maps, {"energy_kept": {name: share.mean().item() for name, share in kept.items()}}


def _rotated_keys(
    gram_GPMM: Tensor, statistics: BlockStatistics, g_GM: Tensor
) -> tuple[Tensor, Tensor]:
    """The rotations under which the keys of each group agree best, and their inverses: (G, M, P).

    Of normed keys signs alone where planes may not turn, see `_free_keys`; and scaled so that all
    heads of a group weigh the same in their mean. No inverse undoes the scale: the norm takes it
    out of each head and of the mean.
    """
    keys, _ = generalized_procrustes(gram_GPMM, rope=True)
    if statistics.free_plane_P is None or statistics.key_power_K is None:  # both or neither
        return keys.mT, 1 / keys.mT
    signs, _ = generalized_procrustes(gram_GPMM.real[..., None, None])
    keys = torch.where(statistics.free_plane_P[:, None], keys, signs[..., 0, 0].to(keys.dtype)).mT
    root_GM = (statistics.key_power_K[g_GM] + _TINY).sqrt()
    return keys * (root_GM.mean(1, keepdim=True) / root_GM)[..., None], 1 / keys


# Chosen by held-out loss and KL, in rows of 256 tokens, on a saturated model of 30 blocks, 576 wide
# (3 KV heads to 1), and on two small ones, 96 and 256 wide.
_REFIT_TOKENS = 512  # per step: with few tokens, more and smaller steps
_MUON_RATE = 0.1  # how much a step at the highest rate changes matrices; times √error
_REFIT_RATE = 0.4  # of norms and biases: how much a step changes an output, relative to it
_JOINT_RATE = 0.1  # the same where all blocks change at once; less if there is little to mend


@torch.no_grad()
def refit_block(
    config: LlamaConfig, weights: Weights, x_BTD: Tensor, target_BTD: Tensor, seed: int,
    document_BT: Tensor | None = None
) -> tuple[dict[str, Tensor], dict[str, float]]:
    """Train a converted block's attention and norms to make `target` of x.

    x: hidden states of the converted model before the block. target: the source's after it. So the
    block learns to compensate both for its own merge and for the errors of the blocks before it.
    Returns (weights, its `_hidden_state_error` before and after, see `_fit`).
    """
    block = _empty_block(config)

    def error(trained, rows):
        document = None if document_BT is None else document_BT[rows]
        rows = rows.to(x_BTD.device, non_blocking=True)
        x = at_least_float32(x_BTD[rows])
        y_BTD = _forward(block, {**weights, **trained}, x, _rope_and_ends(config, x, document))
        return _hidden_state_error(y_BTD, target_BTD[rows])

    fitted, error_of = _fit(config, _trainable(weights), error, x_BTD[..., 0], seed)
    return {**weights, **fitted}, error_of


def _trainable(weights: Weights) -> dict[str, Tensor]:
    """Those of a block's or a model's weights that a refit trains: attention and the blocks' norms.

    The MLPs are two thirds of a model. They have lost nothing, and take more tokens to train.
    """
    return {name: w for name, w in weights.items() if "self_attn." in name or "layernorm." in name}


def _hidden_state_error(y_BTD: Tensor, target_BTD: Tensor) -> Tensor:
    """The mean over tokens of log(1 + ‖y − target‖² / ‖target‖²), a scalar.

    Relative to each token's length, as the next norm sees it: large models make a few tokens a
    thousand times longer than the rest (most often the first of a row), and these would decide
    alone. The logarithm is for a token that only one of the two models makes so long.
    """
    y_BTD, target_BTD = at_least_float32(y_BTD), at_least_float32(target_BTD)
    square_BT = (y_BTD - target_BTD).square().sum(-1)
    return (square_BT / target_BTD.square().sum(-1).clamp(min=1e-30)).log1p().mean()


@torch.no_grad()
def joint_refit(
    config: LlamaConfig, weights: Weights, converted: Weights, tokens_BT: Tensor, kv_heads: int,
    method: Method = Method(), device: Device = None
) -> tuple[dict[str, Tensor], dict[str, float]]:
    """Train attention and norms of all converted blocks together.

        minimise  the mean over tokens of KL(source ‖ converted), see `kl_loss`

    A block alone cannot know which of its errors the output will notice. One pass over the tokens:
    in a second one the KL on other text rose. (A block's own refit bears several.)
    config, weights: the source's. converted: what `converted_blocks` made of it, with the names of
    a checkpoint. tokens_BT, method, device: as there; each row is one document. Returns (the
    weights that were trained, KL in nats/token before and after, see `_fit`).
    Memory: some 18 bytes for each weight that is trained, and one block, which is run again in the
    backward pass (Chen et al. 2016).
    """
    rows_BT, _ = refit_rows(config, weights, tokens_BT, method, device)
    target_BTD = _hidden_states(config, weights, rows_BT, device, "target")
    device = target_BTD.device
    start = {name: w.to(device) for name, w in _trainable(converted).items()}
    frozen = {name: w for name, w in weights.items() if name not in start}
    needed = sum(w.nbytes for w in frozen.values()) + 24 * sum(w.numel() for w in start.values())
    torch.cuda.empty_cache()  # what the walk no longer uses is free
    resident = device.type != "cuda" or needed < torch.cuda.mem_get_info(device)[0]
    # If there is no room for MLPs, they are read in each step.
    frozen = {n: w.to(device) if resident or ".mlp." not in n else w for n, w in frozen.items()}
    readout, rows_BT = _readout(config, frozen, target_BTD), rows_BT.to(device)
    empty = _empty_block(gqa_config(config, kv_heads))

    def kl(trained, rows):
        rows = rows.to(device, non_blocking=True)
        x_BTD = embed(frozen, rows_BT[rows], device)
        rope_and_ends = _rope_and_ends(config, x_BTD)
        for i in range(config.num_hidden_layers):
            # subtle: `checkpoint` walks through its arguments at each call; weights are none.
            run = functools.partial(_forward, empty, block_weights({**frozen, **trained}, i),
                                    rope_and_ends=rope_and_ends)
            x_BTD = checkpoint(run, x_BTD, use_reentrant=False, preserve_rng_state=False)
        return kl_loss(readout(x_BTD), readout(target_BTD[rows])).mean()

    return _fit(config, start, kl, rows_BT, method.seed, joint=True)


def refit_rows(
    config: LlamaConfig, weights: Weights, tokens_BT: Tensor, method: Method, device: Device,
    document_BT: Tensor | None = None
) -> tuple[Tensor, Tensor | None]:
    """The `calibration_rows` and, behind them, more text of the same kind for a refit: `_copies` of
    them, each with half of its tokens replaced. Returns (rows, their documents).

    What replaces them is drawn from what the source predicts there, given the row as it is. Such
    text reads badly, but served a refit as well as text that the model wrote from scratch; and it
    takes one forward for all tokens at once, where writing takes one for each. None of the rows
    that the refit is judged by is copied: their copies would be trained on.
    """
    tokens_BT = calibration_rows(tokens_BT, method).long().cpu()
    if document_BT is not None:
        document_BT = calibration_rows(document_BT, method).cpu()
    copies = _copies(config, tokens_BT.numel(), method)
    if not copies:
        return tokens_BT, document_BT
    n_judges = _held_out_rows((copies + 1) * len(tokens_BT))  # of `_fit`, or one more
    x_BTD = _hidden_states(config, weights, tokens_BT, device, "resample", document_BT)
    tokens_BT, readout = tokens_BT.to(x_BTD.device), _readout(config, weights, x_BTD)
    generator = torch.Generator(x_BTD.device).manual_seed(method.seed)
    drawn_BTC = torch.stack([
        readout(x_TD).softmax(-1).multinomial(copies, replacement=True, generator=generator)
        for x_TD in x_BTD[n_judges:, :-1]])
    drawn_CBT, copies_CBT = drawn_BTC.movedim(-1, 0), tokens_BT[n_judges:].repeat(copies, 1, 1)
    half_CBT = torch.empty_like(drawn_CBT).bernoulli_(0.5, generator=generator).bool()
    if document_BT is not None:  # the first token of each stays
        half_CBT &= (document_BT[n_judges:].diff() == 0).to(half_CBT.device)
        document_BT = torch.cat([document_BT, document_BT[n_judges:].repeat(copies, 1)])
    copies_CBT[..., 1:] = torch.where(half_CBT, drawn_CBT, copies_CBT[..., 1:])
    return torch.cat([tokens_BT, copies_CBT.flatten(0, 1)]), document_BT


def _copies(config: LlamaConfig, n_tokens: int, method: Method) -> int:
    """How many copies of so many tokens to add for a refit, so that there are 100 · D; at most 7.

    Attention has some 4 D² weights a block to train, and each token tells D numbers.
    """
    if not (method.refit or method.joint):
        return 0
    return min(math.ceil(100 * config.hidden_size / n_tokens) - 1, 7)


def _hidden_states(
    config: LlamaConfig, weights: Weights, tokens_BT: Tensor, device: Device, bar: str,
    document_BT: Tensor | None = None
) -> Tensor:
    """The hidden states (B, T, D) after the last block."""
    x_BTD = embed(weights, tokens_BT, device)
    for i in progress(range(config.num_hidden_layers), bar):
        _run_block_(config, read_block(weights, i, device), x_BTD, f"block {i}", document_BT)
    return x_BTD


def calibration_rows(rows_BT: Tensor, method: Method) -> Tensor:
    """The rows, cut into equal ones of at most 512 tokens, a refit's step.

    A step is one row at least, and more and smaller steps make a better model, also when it is then
    measured in longer rows, in less time. Raises ValueError without a row to calibrate with; of a
    refit, one more to judge it by.
    """
    length = rows_BT.shape[1] // math.ceil(rows_BT.shape[1] / _REFIT_TOKENS)
    rows_BT = rows_BT[:, : rows_BT.shape[1] // length * length].reshape(-1, length)
    if len(rows_BT) < (least := 2 if method.refit or method.joint else 1):
        raise ValueError(f"{least} rows of {length} tokens are needed to calibrate with, found "
                         f"{len(rows_BT)}; more text, a smaller --seq-len, or --no-refit and "
                         "--no-joint")
    return rows_BT


def _fit(
    config: LlamaConfig, weights: Weights, loss: Callable[[Weights, Tensor], Tensor],
    tokens_BT: Tensor, seed: int, joint: bool = False
) -> tuple[dict[str, Tensor], dict[str, float]]:
    """Minimise `loss(weights, rows)`; returns (weights, {"before", "after"}).

    Matrices by Muon and the rest by Adam; if `joint` all by Adam, in one epoch. The first fortieth
    of the rows is held out and the loss measured there, with the weights rounded to their dtype; if
    it does not fall, or is not finite, they stay as they were.
    """
    size = max(1, _REFIT_TOKENS // tokens_BT.shape[1])
    held_out, rows = torch.arange(len(tokens_BT)).tensor_split([_held_out_rows(len(tokens_BT))])
    generator = torch.Generator().manual_seed(seed)
    batches = [batch for _ in range(1 if joint else _refit_epochs(tokens_BT.numel()))
               for batch in rows[torch.randperm(len(rows), generator=generator)].split(size)]
    new = {name: at_least_float32(w).clone().requires_grad_() for name, w in weights.items()}

    def held_out_loss(w):
        return sum(len(r) * loss(w, r).item() for r in held_out.split(size)) / len(held_out)

    before = held_out_loss(weights)
    root = math.sqrt(max(before, 0))  # KL is quadratic in what is wrong with the logits
    matrices = {name: w for name, w in new.items() if "_proj.weight" in name and not joint}
    steps = [_muon(matrices, config.head_dim, _MUON_RATE * root),
             _adam(new, min(_JOINT_RATE, root / 2) if joint else _REFIT_RATE, without=matrices)]
    bar = progress(batches, "joint refit" if joint else "refit", leave=False, delay=1)
    for at, batch in enumerate(bar):
        with torch.enable_grad(), _autocast(tokens_BT.device, config.hidden_size, refit=True):
            error = loss(new, batch)
        error.backward()
        for step in steps:
            step(lr_factor(at, len(batches)))
    fitted = _cast_like(weights, {name: w.detach() for name, w in new.items()})
    after = held_out_loss(fitted)
    fitted, after = (fitted, after) if after < before else (dict(weights), before)
    return fitted, {"before": before, "after": after}


def _muon(weights: Weights, head_dim: int, rate: float) -> Callable[[float], None]:
    """The function that makes a step of Muon (Jordan et al. 2024), each head by itself.

        b ← b + 0.15 (g − b),   u = g + 0.85 (b − g)                  (Nesterov's momentum)
        W ← W − factor · rate · rms(W) · √max(E, D) · orthogonal(u)

    of each head's gradient g, (E, D), or (D, E) of the output. √max(E, D) makes the entries of an
    orthogonal matrix about 1; so a step of factor 1 changes W's, of its whole matrix as it was at
    first, by `rate` of their size.
    """
    def heads(name, w):  # (D, H·E) -> (H, E, D); or (H·E, D)
        return (w.mT if "o_proj" in name else w).unflatten(0, (-1, head_dim))

    scales = {n: rate * _rms(w) * math.sqrt(max(heads(n, w).shape[1:])) for n, w in weights.items()}
    momentum = {name: torch.zeros_like(w) for name, w in weights.items()}

    def step(factor):
        for name, w in weights.items():
            g: Any = w.grad
            u = g.lerp(momentum[name].lerp_(g, 0.15), 0.85)
            heads(name, w.detach()).sub_(_orthogonal(heads(name, u)), alpha=factor * scales[name])
            w.grad = None

    return step


def _orthogonal(u_HED: Tensor) -> Tensor:
    """Matrices with all their singular values made about 1 (0.7 to 1.2).

    Five Newton-Schulz rounds, X ← P X with P = aI + bA + cA² and A = XXᵀ, from X = u / ‖u‖; a, b, c
    of Jordan et al. 2024. All P are polynomials of the first A, and A becomes PAP: so the rounds
    are made with these E × E matrices, a fifth of the work, and X is multiplied once.
    """
    x_HED = u_HED / u_HED.norm(dim=(1, 2), keepdim=True).clamp(min=1e-30)
    a_HEE = x_HED @ x_HED.mT  # subtle: A has the squares of singular values; TF32 is too coarse
    all_HEE = unit = torch.eye(a_HEE.shape[-1], dtype=a_HEE.dtype, device=a_HEE.device)
    for _ in range(5):
        p_HEE = 3.4445 * unit - 4.7750 * a_HEE + 2.0315 * a_HEE @ a_HEE
        all_HEE, a_HEE = p_HEE @ all_HEE, p_HEE @ a_HEE @ p_HEE
    return all_HEE @ x_HED


def _adam(weights: Weights, rate: float, without: Weights) -> Callable[[float], None]:
    """The function that makes a step of Adam (Kingma and Ba 2014) on the other weights.

        rate of each weight = factor · rate · rms(W) / √columns

    For an input of ±1 and a row of n entries: a step of Adam changes each by about its rate r. The
    changes have the signs of the input, so they add up, and the output changes by n r. The entries
    themselves have random signs, and add up to about √n rms(W). So the output changes by the same
    share, `rate`, at any width. (Norm weights and biases act on one entry each, so they move by
    less, rate / √n; a bias of zeros takes its matrix's rms.)
    """
    rms = {name: _rms(w) for name, w in weights.items()}
    groups = [{"params": w, "rate": rate * (rms[name] or rms[name.replace("bias", "weight")])
               / math.sqrt(w.shape[-1])} for name, w in weights.items() if name not in without]
    # eps: gradients of a relative error can be far smaller than Adam's usual 1e-8.
    adam = torch.optim.Adam(groups, betas=(0.9, 0.95), eps=1e-15, fused=True)

    def step(factor):
        for group in adam.param_groups:
            group["lr"] = factor * group["rate"]
        adam.step()
        adam.zero_grad()

    return step


def _held_out_rows(n_rows: int) -> int:
    """How many of the first rows a refit is judged by, and never trained on."""
    return math.ceil(n_rows / 40)


def _autocast(device: torch.device, width: int, refit: bool = False) -> torch.autocast:
    """Products of matrices so wide in bf16, if the device gains by that; on CPUs in refits alone.

    On a GPU that is ten times faster than float32. What is added up, hidden states and Gram
    matrices, stays in float32 or better.
    """
    cpu_features: Mapping[str, Any] = getattr(torch.cpu, "get_capabilities", dict)()
    fast = (torch.cuda.is_bf16_supported(including_emulation=False) if device.type == "cuda" else
            refit and (cpu_features.get("avx512_bf16") or cpu_features.get("amx_bf16")))
    return torch.autocast(device.type, torch.bfloat16, enabled=width >= 256 and bool(fast))


def _refit_epochs(n_tokens: int) -> int:
    """Passes of a block's refit: 5 over 40,000 tokens, 4 over 65,536, 2 over 262,144, 1 over 2 M.

    In between, steps grow with the square root of the tokens: with much text, less is gained by
    seeing it again.
    """
    return max(1, min(5, round(4 * math.sqrt(65_536 / n_tokens))))


def _rms(w: Tensor) -> float:
    """√ mean w²."""
    return at_least_float32(w).square().mean().sqrt().item()


def _cast_like(like: Weights, weights: Weights) -> dict[str, Tensor]:
    """The weights, each in the dtype of the one of that name."""
    return {name: w.to(like[name].dtype) for name, w in weights.items()}


def lr_factor(step: int, steps: int) -> float:
    """Share of the highest rate: up from 0 over 32 steps (or a tenth of all), a cosine down to 0.

    0 at step 0: if the student is still its teacher, the first gradient is only rounding error,
    which Adam would scale up to a full step.
    """
    warm_up = min(32, max(1, steps // 10))
    return min(1.0, step / warm_up) * (1 + math.cos(math.pi * step / steps)) / 2


def _empty_block(config: LlamaConfig) -> Block:
    """A block on the meta device, whose weights are given at each call."""
    with torch.device("meta"):
        return Block(config)


def _forward(block: Block, weights: Weights, x_BTD: Tensor, rope_and_ends: tuple) -> Tensor:
    """The hidden states after a block with these weights, in the dtype and on the device of x."""
    # subtle: both at once would cast in the host's memory, and send twice the bytes.
    weights = {name: w.to(x_BTD.device).to(x_BTD.dtype) for name, w in weights.items()}
    return torch.func.functional_call(block, weights, (x_BTD, *rope_and_ends), strict=True)


def _run_block_(
    config: LlamaConfig, weights: Weights, x_BTD: Tensor, name: str,
    document_BT: Tensor | None = None
) -> None:
    """Overwrite the hidden states by those after the block, a few rows at a time.

    Raises ValueError with the block's name if they are not finite: every stream comes through here.
    """
    block, size = _empty_block(config), max(1, 4096 // x_BTD.shape[1])
    weights = {n: w.to(x_BTD.device).to(x_BTD.dtype) for n, w in weights.items()}  # once for all
    with _autocast(x_BTD.device, x_BTD.shape[-1]):
        for at in range(0, len(x_BTD), size):
            rows = slice(at, at + size)
            document = None if document_BT is None else document_BT[rows]
            x = x_BTD[rows]
            x_BTD[rows] = _forward(block, weights, x, _rope_and_ends(config, x, document))
    if not x_BTD.sum().isfinite():  # no mask of all of them
        raise ValueError(f"{name}: its hidden states on this text are not finite")


def embed(weights: Weights, tokens_BT: Tensor, device) -> Tensor:
    """The hidden states (B, T, D) that enter the first block, in float32."""
    table_VD = weights["model.embed_tokens.weight"]
    return F.embedding(tokens_BT.to(table_VD.device), table_VD).to(device, torch.float32)


def block_prefix(i: int) -> str:
    """What the names of block i's tensors begin with."""
    return f"model.layers.{i}."


def block_weights(weights: Weights, i: int) -> dict[str, Tensor]:
    """The weights of block i, named as in `Block`."""
    prefix = block_prefix(i)
    return {n.removeprefix(prefix): w for n, w in weights.items() if n.startswith(prefix)}


def non_block_weights(weights: Weights) -> dict[str, Tensor]:
    """Embedding, last norm and head."""
    return {n: w for n, w in weights.items() if not n.startswith("model.layers.")}


def read_block(weights: Weights, i: int, device) -> dict[str, Tensor]:
    """Block i's weights on the device; raises ValueError if one is not finite."""
    block = block_weights(weights, i)
    _check_finite(block, block_prefix(i))  # before it moves, which waits for what a GPU has to do
    return {name: w.to(device) for name, w in block.items()}


def _check_finite(weights: Weights, prefix: str = "") -> None:
    """Raise ValueError for the first tensor with a value that is not finite."""
    for name, weight in weights.items():
        if not all(torch.isfinite(bound) for bound in weight.aminmax()):
            raise ValueError(f"tensor {prefix}{name} holds values that are not finite")


# ---- 8 convert and evaluate ----------------------------------------------------------------------


@torch.no_grad()
def convert_weights(
    config: LlamaConfig, weights: Weights, tokens_BT: Tensor, kv_heads: int,
    method: Method = Method(), device: Device = None
) -> tuple[LlamaConfig, dict[str, Tensor], dict[str, Any]]:
    """Convert a model in memory to `kv_heads` KV heads; returns (its config, weights, report).

    config: see `parse_config`. weights: a state dict with transformers' names; that of the result
    has the same names, dtypes and devices, and what was not converted is not copied.
    tokens_BT: rows of text to calibrate with. device: where to compute; None: where the weights
    are. report: of each block, its groups and how well they fit; "joint_kl", in nats/token, before
    and after the joint refit. Raises ValueError for weights that are not the config's, too few rows
    and what is not finite.
    """
    checked, out, layers = _check_weights(config, weights), dict(weights), []
    blocks, report = _converted(config, checked, tokens_BT, kv_heads, method, device)
    for i, block in enumerate(blocks):
        layers.append(block.report)
        of_block = {block_prefix(i) + name: w for name, w in _trainable(block.converted).items()}
        out |= {name: w.to(weights[name].device) for name, w in of_block.items()}
    return gqa_config(config, kv_heads), out, {**report, "layers": layers}


def _converted(
    config: LlamaConfig, weights: Weights, tokens_BT: Tensor, kv_heads: int, method: Method,
    device: Device
) -> tuple[Iterable[ConvertedBlock], dict[str, Any]]:
    """(The blocks after all that the method asks for, what the report says of all of them)."""
    _check_finite(non_block_weights(weights))
    walk = converted_blocks(config, weights, tokens_BT, kv_heads, method, device)
    blocks = progress(walk, "convert", config.num_hidden_layers)
    if not method.joint:
        return blocks, {}
    reports, converted, report = list[Any](), dict(weights), dict[str, Any](joint_kl=None)
    for i, block in enumerate(blocks):
        reports.append(block.report)
        converted |= {block_prefix(i) + n: w for n, w in _trainable(block.converted).items()}
        del block  # or the last one would stay in memory
    try:
        fitted, report["joint_kl"] = joint_refit(
            config, weights, converted, tokens_BT, kv_heads, method, device)
        converted |= fitted
    except (MemoryError, RuntimeError) as error:
        if not _no_memory(error):
            raise
        warnings.warn("no memory for the joint refit: blocks stay as they are", stacklevel=3)
    blocks = (ConvertedBlock({}, block_weights(converted, i), r) for i, r in enumerate(reports))
    return blocks, report


def _no_memory(e: BaseException) -> bool:
    """Whether it is torch's, CUDA's or Python's way to say so."""
    return isinstance(e, MemoryError) or bool(re.search("alloc|out of memory", str(e), re.I))


@torch.no_grad()
def convert(
    model: PathLike, out_dir: PathLike, kv_heads: int, corpus: "Corpus", method: Method = Method(),
    device: str = "auto", dry_run: bool = False
) -> dict[str, Any]:
    """Convert a checkpoint to `kv_heads` KV heads; returns the report.

    model: a Hugging Face directory, or its name on the hub. What will be done is said to the logger
    "mha2gqa"; `dry_run` ends there, after all checks but that of the disk's size.
    Hidden states and products are in float32, on a GPU products in bf16; the output keeps the
    source's dtype. Memory holds one block and the tokens' hidden states, however deep the model; in
    the joint refit some 18 bytes for each weight of attention, too.

    `out_dir` becomes a Hugging Face directory with `mha2gqa.json`, the report: scores in
    nats/token, sizes in bytes, times in seconds. It is there whole or not at all. Raises
    ValueError for bad input, as early as possible; OSError if writing fails.
    """
    start, place = time.perf_counter(), _pick_device(device)
    _check_new_directory(out_dir)
    gqa_config(load_config(model_folder(model, weights=False)), kv_heads)  # before a download
    folder = model_folder(model)
    config, weights = load_checkpoint(folder)
    companion_files(folder)
    rows, held_out = text_rows(folder, config, corpus, method.seed)
    rows = calibration_rows(rows, method)
    report = report_header(model, config, weights, kv_heads, method) | {
        "device": str(place), "corpus": dataclasses.asdict(corpus),
        "tokens": {"calibration": rows.numel(), "calibration_seq_len": rows.shape[1],
                   "held_out": held_out.numel(), "seq_len": held_out.shape[1]}}
    _say_plan(report, config, method, place)
    if dry_run:
        return report
    with new_checkpoint(out_dir, gqa_config(config, kv_heads), weights, folder) as writer:
        blocks, of_all = _converted(config, weights, rows, kv_heads, method, place)
        report |= of_all | _write_and_score(
            writer.write, config, weights, kv_heads, blocks, held_out, place)
        report |= {"seconds": time.perf_counter() - start, "peak_memory_bytes": _peak_memory(place)}
        write_report(writer.folder, report, folder)
    return report


def _write_and_score(
    write: Callable[[Weights], None], config: LlamaConfig, weights: Weights, kv_heads: int,
    blocks: Iterable[ConvertedBlock], held_out_BT: Tensor, device: torch.device
) -> dict[str, Any]:
    """Write the blocks, and run the held-out tokens through three models at once.

    Returns for the report the scores of the source, of its mean-pooled and of its converted model,
    see `_mean_scores`; and what each block says of itself, with "hidden_state_error", that of the
    written model on the held-out rows.
    """
    layers, new_config = [], gqa_config(config, kv_heads)
    source_x = embed(weights, held_out_BT, device)
    pooled_x, converted_x = source_x.clone(), source_x.clone()
    for i, block in enumerate(blocks):
        source = read_block(weights, i, device)
        pooled = _cast_like(source, merge(source, config, kv_heads))
        _run_block_(config, source, source_x, f"block {i}")
        _run_block_(new_config, pooled, pooled_x, f"mean-pooled block {i}")
        _run_block_(new_config, block.converted, converted_x, f"converted block {i}")
        errors = [*map(_hidden_state_error, converted_x, source_x)]  # row by row
        layers.append({**block.report, "hidden_state_error": torch.stack(errors).mean().item()})
        write({block_prefix(i) + n: w for n, w in block.converted.items()})
    write(non_block_weights(weights))
    streams = {"source": source_x, "mean_pooled": pooled_x, "converted": converted_x}
    return {"scores": _mean_scores(config, weights, streams, held_out_BT), "layers": layers}


@torch.no_grad()
def evaluate(model: PathLike, corpus: "Corpus", seed: int = 0, device: str = "auto") -> dict:
    """{"loss", in nats/token, "held_out_tokens"} of a model, with the same protocol as `convert`.

    With the same corpus and seed the held-out rows are the same. Raises ValueError for bad input.
    """
    place, folder = _pick_device(device), model_folder(model)
    config, weights = load_checkpoint(folder)
    _, held_out = text_rows(folder, config, corpus, seed)
    x_BTD = _hidden_states(config, weights, held_out, place, "evaluate")
    scores = _mean_scores(config, weights, {"source": x_BTD}, held_out)
    return {"loss": scores["source"]["loss"], "held_out_tokens": held_out.numel()}


def _mean_scores(
    config: LlamaConfig, weights: Weights, streams: Mapping[str, Tensor], tokens_BT: Tensor
) -> dict[str, dict[str, float]]:
    """{"loss", "kl"} of each stream, that is KL(source ‖ it), in nats/token over the T − 1
    predictions of a row.

    streams: hidden states (B, T, D) after the last block; one of them is "source".
    """
    readout, device = _readout(config, weights, streams["source"]), streams["source"].device
    sums = dict.fromkeys(streams, torch.zeros(2, dtype=torch.float64, device=device))
    for row, tokens_T in enumerate(tokens_BT.to(device)):
        for at in torch.arange(len(tokens_T) - 1, device=device).split(256):
            logits = {name: readout(x[row, at]) for name, x in streams.items()}
            for name, x_TV in logits.items():
                loss = F.cross_entropy(x_TV, tokens_T[at + 1], reduction="sum")
                kl = kl_loss(x_TV, logits["source"]).sum()
                sums[name] = sums[name] + torch.stack([loss, kl])
    n = tokens_BT[:, 1:].numel()
    return {name: dict(zip(("loss", "kl"), (total / n).tolist(), strict=True))
            for name, total in sums.items()}


def _readout(config: LlamaConfig, weights: Weights, like: Tensor) -> Callable[[Tensor], Tensor]:
    """The function that makes logits of the last block's hidden states, such as `like`."""
    norm = weights["model.norm.weight"].to(like)
    head = weights.get("lm_head.weight", weights["model.embed_tokens.weight"]).to(like)
    return lambda x_BTD: F.linear(_rms_norm(x_BTD, norm, config.rms_norm_eps), head)


# ==================================================================================================
# A reader may stop here. What follows reads files, checks them, and writes them.
# ==================================================================================================

# ---- 9 checkpoints -------------------------------------------------------------------------------

# The block of these model types is LLaMA's, and Yi's old files are. Qwen2 has biases on q, k and v
# by definition. With what transformers takes for keys that are not in config.json, where that
# differs from `LlamaConfig`'s own defaults.
_MODEL_TYPES: dict[str, dict[str, int]] = {
    "llama": {}, "mistral": {"num_key_value_heads": 8, "max_position_embeddings": 131_072},
    "qwen2": {"num_key_value_heads": 32, "max_position_embeddings": 32_768},
    "qwen3": {"num_key_value_heads": 32, "head_dim": 128, "max_position_embeddings": 32_768},
}
_ROPE_FIELDS: dict[str, tuple[str, ...]] = {
    "default": (), "linear": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
}


def _rope_parameters(raw: Mapping[str, Any]) -> dict[str, Any]:
    """Old files have rope_theta at the top and the rest in rope_scaling, new ones all of it in
    rope_parameters; as in transformers rope_scaling wins, and so does a nested rope_theta. But of
    llama3's original_max_position_embeddings the one at the top does, and without any it is
    max_position_embeddings."""
    rope = raw.get("rope_scaling") or raw.get("rope_parameters") or {}
    rope = {"rope_type": rope.get("type", "default"), **rope}
    if rope["rope_type"] == "llama3":
        name = "original_max_position_embeddings"
        found = raw.get(name), rope.get(name), raw.get("max_position_embeddings")
        rope[name] = next((n for n in found if n is not None), None)
    return rope


def _refuse_unsupported(raw: Mapping[str, Any], rope: Mapping[str, Any]) -> None:
    """Raise ValueError that names the first thing that this file's model does not compute."""
    kind, layer_types = raw.get("model_type"), set(raw.get("layer_types") or [])
    # subtle: without the key a window is 4096. Qwen's begins at a layer, or layers have types.
    window = raw.get("sliding_window", 4096) if kind == "mistral" or (
        kind != "llama" and raw.get("use_sliding_window") and not layer_types
        and raw.get("max_window_layers", 28) < raw.get("num_hidden_layers", 0)) else None
    partial = rope.get("partial_rotary_factor") or raw.get("partial_rotary_factor") or 1
    unsupported = {
        f"model_type {kind!r} (supported: {', '.join(_MODEL_TYPES)})": kind not in _MODEL_TYPES,
        f"hidden_act {raw.get('hidden_act')!r} (supported: silu)":
            raw.get("hidden_act", "silu") not in ("silu", "swish"),
        "attention that is not causal (is_causal)": not raw.get("is_causal", True),
        "partial rotary embedding": partial != 1,
        f"sliding window of {window} (by default 4096; null is none)": window is not None,
        f"layer_types {sorted(layer_types)}": layer_types - {"full_attention"},
        f"rope type {rope['rope_type']!r} (supported: {', '.join(_ROPE_FIELDS)})":
            rope["rope_type"] not in _ROPE_FIELDS,
    }
    for name, found in unsupported.items():
        if found:
            raise ValueError(f"not supported: {name}")


def model_folder(model: PathLike, weights: bool = True) -> Path:
    """The directory of a model: itself, or what the Hugging Face hub has under that name.

    What is on this machine wins. `weights` False: config.json alone. Raises ValueError if there is
    no such directory and the hub cannot be asked, or has no such model.
    """
    if Path(model).exists():
        return Path(model)
    from huggingface_hub import snapshot_download

    files = ["*.json", "tokenizer*", "*.model", "model*.safetensors", "*.md", "LICENSE*", "NOTICE*",
             "chat_template*"] if weights else ["config.json"]
    try:
        folder = Path(snapshot_download(str(model), allow_patterns=files))
        if weights and not list(folder.glob("model*.safetensors")):
            snapshot_download(str(model), allow_patterns=["pytorch_model*.bin"])
    except Exception as error:  # of several packages
        reason = textwrap.shorten(f"{type(error).__name__}: {error}", 160)
        raise ValueError(f"{model}: no such directory (MODEL is one, with config.json, weights and "
                         f"tokenizer), and not from the hub ({reason})") from None
    return folder


def load_checkpoint(path: PathLike) -> tuple[LlamaConfig, dict[str, Tensor]]:
    """Read a Hugging Face model directory: `(config, weights)`, weights by parameter name.

    The tensors are mapped from their files: a page is read when it is first used, and costs no
    anonymous memory. Names and shapes are those of `Llama(config)`: prefixes that torch.compile,
    DDP and FSDP left are stripped, left-over tables of `rotary_emb` and a stored copy of tied
    embeddings are dropped. Raises ValueError for anything that is not such a checkpoint.
    """
    config, weights = load_config(path), dict[str, Tensor]()
    wrappers = r"\b(module|_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\."
    for file in _weight_files(Path(path)):
        weights |= {re.sub(wrappers, "", name): w for name, w in _read_tensors(file).items()
                    if ".rotary_emb." not in name}
    try:
        return config, _check_weights(config, weights)
    except ValueError as error:
        raise ValueError(f"{path}: its weights are not those of config.json: {error}") from None


def _check_weights(config: LlamaConfig, weights: Weights) -> dict[str, Tensor]:
    """The weights without a copy of tied embeddings; ValueError if they are not the config's."""
    weights = dict(weights)
    if config.tie_word_embeddings and "lm_head.weight" in weights:
        # A file may hold both of the tied tensors, or only one of them, under either name.
        head = weights.pop("lm_head.weight")
        if not torch.equal(weights.setdefault("model.embed_tokens.weight", head), head):
            raise ValueError("tie_word_embeddings is true, but there is a head of its own; set it "
                             "to false, or remove lm_head.weight")
    for name, weight in weights.items():
        if weight.dtype not in (torch.float32, torch.float16, torch.bfloat16):
            raise ValueError(f"{name} is {weight.dtype}, expected float32, float16 or bfloat16 "
                             "(quantised weights must be dequantised first)")
    try:
        with torch.device("meta"):
            Llama(config).load_state_dict(weights, assign=True)
    except RuntimeError as error:
        reason = "; ".join(textwrap.shorten(s, 150) for s in str(error).splitlines()[:3])
        raise ValueError(reason) from None
    return weights


def load_config(path: PathLike) -> LlamaConfig:
    """The config of a model directory; raises ValueError that names what is not supported."""
    file = Path(path) / "config.json"
    return parse_config(read_json(file), f"{file}: ")


def parse_config(raw: Mapping[str, Any], where: str = "") -> LlamaConfig:
    """The config of config.json's keys, from anywhere, as `model.config.to_dict()` of transformers.

    Raises ValueError that names what is not supported, behind `where`.
    """
    try:
        return _parse_config(raw)
    except (ValueError, TypeError, AttributeError) as error:  # the last two: of values' types
        raise ValueError(f"{where}{error}") from None


def _parse_config(raw: Mapping[str, Any]) -> LlamaConfig:
    """`parse_config`, which says what values of another type raise here."""
    raw = {**raw, "model_type": "llama"} if raw.get("model_type") == "Yi" else raw
    rope = _rope_parameters(raw)
    _refuse_unsupported(raw, rope)
    given = {name: value for name, value in {**raw, **rope}.items() if value is not None}
    # What is absent has its default here, and what is null `LlamaConfig`'s.
    given = {**{n: v for n, v in _MODEL_TYPES[raw["model_type"]].items() if n not in raw}, **given}
    fields = {f.name: f for f in dataclasses.fields(LlamaConfig) if f.name != "raw"}
    rope_fields = _ROPE_FIELDS[rope["rope_type"]]
    for name in (*(name for name, f in fields.items() if not f.kw_only), *rope_fields):
        if name not in given:
            raise ValueError(f"no {name}")
    for name in given.keys() & {*fields, *rope_fields}:
        value, kind = given[name], fields[name].type if name in fields else float
        most = 2**28 if kind is int else 1e30  # products of two are sizes of tensors
        if kind in (int, float) and not (type(value) in (int, kind) and 0 < value < most):
            raise ValueError(f"{name} is {value!r:.40}, expected a positive number below {most}")
    given |= {"hidden_act": "silu",  # swish is another name for it
              "rope_scaling": None if rope["rope_type"] == "default" else rope}
    config = LlamaConfig(**{n: value for n, value in given.items() if n in fields}, raw=raw)
    for token in config.eos_ids:
        if type(token) is not int or not 0 <= token < config.vocab_size:
            raise ValueError(f"eos_token_id is {token!r}, expected one of the vocabulary's 0 to "
                             f"{config.vocab_size - 1}, or null")
    return config


def _config_json(config: LlamaConfig) -> dict[str, Any]:
    """The content of config.json: what was read, with only num_key_value_heads changed.

    RoPE's parameters are written in transformers' old spelling, too, if they have only the new one.
    What names code of the source's own goes: the result is a model that every engine knows. So
    does quantization_config, which stays behind where weights were dequantised.
    """
    fields = {f.name: getattr(config, f.name) for f in dataclasses.fields(config)}
    kept = {n: value for n, value in fields.pop("raw").items()
            if n not in ("auto_map", "quantization_config")}
    if not kept:
        kept = {**fields, "sliding_window": None}  # absent, it would be 4096 in mistral's
    elif "rope_parameters" in kept:  # readers that know only the old spelling would be wrong
        kept |= {name: fields[name] for name in ("rope_theta", "rope_scaling")
                 if kept.get(name) is None}
    return {**kept, "architectures": [f"{config.model_type.capitalize()}ForCausalLM"],
            "num_key_value_heads": config.num_key_value_heads}


def read_json(file: Path) -> dict[str, Any]:
    """The object in a JSON file; raises ValueError with the file's name if there is none."""
    try:
        value = json.loads(file.read_text(encoding="utf-8-sig"))
    except (OSError, ValueError, RecursionError) as error:
        reason = getattr(error, "strerror", None) or error
        raise ValueError(f"{file}: cannot be read ({reason})") from None
    if not isinstance(value, dict):
        raise ValueError(f"{file}: expected a JSON object")
    return value


def write_json(file: Path, value) -> None:
    """Write a value as an indented JSON file."""
    file.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")


def _weight_files(folder: Path) -> list[Path]:
    """The checkpoint's weight files, in the order in which transformers looks for them."""
    for name in ("model.safetensors", "pytorch_model.bin"):
        if (folder / name).is_file():  # subtle: an index beside it is of older weights
            return [folder / name]
        index = folder / f"{name}.index.json"
        if index.is_file():
            weight_map = read_json(index).get("weight_map")
            if not isinstance(weight_map, dict):
                raise ValueError(f"{index}: has no weight_map")
            return [folder / n for n in sorted({Path(str(n)).name for n in weight_map.values()})]
    raise ValueError(f"{folder}: no model.safetensors, no pytorch_model.bin, no index of either")


def _read_tensors(file: Path) -> dict[str, Tensor]:
    """All tensors of one weight file, mapped and not read."""
    from safetensors.torch import load_file

    try:
        file.open("rb").close()  # safetensors says of all that it cannot open, that it is not there
        if file.suffix == ".safetensors":
            return load_file(file)
        mapped = zipfile.is_zipfile(file)  # older files, which are no archives, are read whole
        tensors = torch.load(file, map_location="cpu", weights_only=True, mmap=mapped)
    except Exception as error:  # a broken file can make torch.load raise almost anything
        reason = textwrap.shorten(str(error) or type(error).__name__, 120)
        advice = "" if isinstance(error, OSError) else (
            "; if it is cut, or only a Git LFS pointer, download it again")
        raise ValueError(f"{file}: cannot be read ({reason}){advice}") from None
    if not isinstance(tensors, dict) or not all(isinstance(w, Tensor) for w in tensors.values()):
        raise ValueError(f"{file}: holds more than tensors; save the model's state dict by itself")
    return tensors


_SHARD_BYTES = 10**9  # of a file with more than one block; so much is held until it is written


@dataclasses.dataclass
class _CheckpointWriter:
    """A checkpoint directory that is being written, see `new_checkpoint`."""

    folder: Path
    files: dict[str, list[str]]  # the names of the tensors of each file, in the order of writing
    buffer: dict[str, Tensor] = dataclasses.field(default_factory=dict)

    def write(self, weights: Weights) -> None:
        """Take some of the weights; a file is written once all of its tensors are there."""
        from safetensors import SafetensorError
        from safetensors.torch import save_file

        # subtle: copies, for tensors that share memory, are mapped, or are not contiguous.
        self.buffer |= {name: w.cpu().clone(memory_format=torch.contiguous_format)
                        for name, w in weights.items()}
        for file in [f for f, names in self.files.items() if self.buffer.keys() >= {*names}]:
            tensors = {name: self.buffer.pop(name) for name in self.files.pop(file)}
            try:
                save_file(tensors, self.folder / file, {"format": "pt"})
            except SafetensorError as error:
                raise OSError(f"{self.folder / file}: cannot be written ({error})") from None


def _plan_files(
    config: LlamaConfig, like: Weights
) -> tuple[dict[str, list[str]], dict[str, Any]]:
    """(The names of the tensors of each file, as `_CheckpointWriter` takes them; the index)."""
    with torch.device("meta"):
        sizes = {n: p.numel() * like[n].element_size() for n, p in Llama(config).named_parameters()}
    prefixes = map(block_prefix, range(config.num_hidden_layers))
    parts = [[n for n in sizes if n.startswith(prefix)] for prefix in prefixes]
    shards: list[list[str]] = [[]]
    for part in [*parts, [n for n in sizes if not n.startswith("model.layers.")]]:
        if shards[-1] and sum(sizes[n] for n in shards[-1] + part) > _SHARD_BYTES:
            shards.append([])
        shards[-1] += part
    files = {f"model-{i:05d}-of-{len(shards):05d}.safetensors": names
             for i, names in enumerate(shards, 1)}
    files = files if len(shards) > 1 else {"model.safetensors": shards[0]}
    return files, {"metadata": {"total_size": sum(sizes.values())},
                   "weight_map": {n: file for file, names in files.items() for n in names}}


@contextlib.contextmanager
def new_checkpoint(
    path: PathLike, config: LlamaConfig, like: Weights, tokenizer_from: PathLike | None = None
) -> Iterator[_CheckpointWriter]:
    """A Hugging Face directory to write block by block; it is there whole or not at all.

    `writer.write` in the with block takes some of its weights, block by block and then what is
    outside of the blocks, of the dtypes in `like`. They come with index and config.json, and the
    tokenizer and generation files of the directory `tokenizer_from`; then the directory gets its
    name. Raises ValueError if there is something of that name or the disk has not enough bytes
    free, OSError if writing fails.
    """
    files, index = _plan_files(config, like)
    _check_new_directory(path, index["metadata"]["total_size"])
    folder = Path(f"{Path(path).absolute()}.partial")
    folder.mkdir()
    try:
        if len(files) > 1:
            write_json(folder / "model.safetensors.index.json", index)
        write_json(folder / "config.json", _config_json(config))
        for file in companion_files(tokenizer_from) if tokenizer_from else ():
            shutil.copyfile(file, folder / file.name)
        writer = _CheckpointWriter(folder, files)
        yield writer
        if writer.files:
            raise ValueError(f"{path}: not all weights of {min(writer.files)} were written")
        for file in folder.glob("*.safetensors"):  # safetensors lets only their owner read them
            shutil.copymode(folder / "config.json", file)
        rename_when_on_disk(folder, Path(path))
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise


def companion_files(folder: PathLike) -> list[Path]:
    """What a result takes over as it is; raises OSError for a file that cannot be opened."""
    names = (r"(tokenizer|chat_template|LICENSE|NOTICE).*|.*\.model|merges\.txt|"
             r"(special_tokens_map|added_tokens|vocab|generation_config)\.json")
    # Not glob(), which would leave out a link to nothing.
    found = [f for f in Path(folder).iterdir() if re.fullmatch(names, f.name) and not f.is_dir()]
    for file in found:
        file.open("rb").close()
    return found


def _check_new_directory(path: PathLike, size: int = 0) -> None:
    """Raise ValueError unless a directory of `size` bytes can be made there."""
    path = Path(path).absolute()
    if os.path.lexists(path):
        raise ValueError(f"{path}: exists; choose another OUT, or remove it")
    if os.path.lexists(f"{path}.partial"):
        raise ValueError(f"{path}.partial: exists, from a run that was killed or is still writing; "
                         "remove it, or choose another OUT")
    if not path.parent.is_dir() or not os.access(path.parent, os.W_OK):
        raise ValueError(f"{path.parent}: no such directory, or no permission to write into it")
    free = shutil.disk_usage(path.parent).free
    if free < size:
        raise ValueError(f"{path.parent}: {size:,} bytes are needed, {free:,} are free on the disk")


def rename_when_on_disk(new: Path, path: Path) -> None:
    """Give a file or a directory that is finished its name, once its contents are on the disk.

    Otherwise a machine that dies could leave the name, and nothing or a part behind it.
    """
    for file in filter(Path.is_file, [new, *new.rglob("*")]):
        with open(file, "rb+") as opened:
            os.fsync(opened.fileno())
    new.replace(path)


# ---- 10 text and tokenizers ----------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Corpus:
    """Text to calibrate with, and to measure on. Checks itself; raises ValueError.

    files, eval_files: one path or several, `.jsonl` or `.json` of records with a "text" field, one
    a line, or `.txt`, one document; or these with `.gz`. tokens: how many to read of `files`.
    seq_len: tokens per row, None: 2,048 or the model's context if that is less. Without eval_files
    the first 10 % of what is read are held out.
    """

    files: PathLike | Sequence[PathLike]
    eval_files: PathLike | Sequence[PathLike] = ()
    tokens: int = 262_144
    seq_len: int | None = None

    def __post_init__(self):
        if type(self.tokens) is not int or self.tokens < 1:
            raise ValueError(f"tokens {self.tokens!r}: expected a positive whole number")
        for name in ("files", "eval_files"):
            files = getattr(self, name)
            files = [files] if isinstance(files, (str, os.PathLike)) else files
            object.__setattr__(self, name, [os.fspath(file) for file in files])
            for file in getattr(self, name):
                if not re.search(r"\.(jsonl|json|txt)(\.gz)?$", file):
                    raise ValueError(f"{file}: expected a name that ends in .jsonl or .json (one "
                                     "record a line) or .txt (one document), or these with .gz")
                if not os.path.isfile(file):
                    raise ValueError(f"{file}: no such file")


def text_rows(
    model_dir: PathLike, config: LlamaConfig, corpus: Corpus, seed: int = 0
) -> tuple[Tensor, Tensor]:
    """(calibration rows, held-out rows) of a corpus, both (rows, seq_len).

    Held out are the rows of `eval_files` or else the first 10 % of those read, and never more than
    65,536 tokens (so that from 655,360 on they stay the same if more is read). Without `files`
    there are no calibration rows. Warns if the text is shorter than `tokens`; raises ValueError for
    bad files or too little text.
    """
    seq_len, encode = row_length(config, corpus.seq_len), load_tokenizer(model_dir)

    def rows(files, n_tokens, n_least):
        # No tokenizer makes tokens of 16 characters on average.
        documents = _Documents(files, 16 * n_tokens)
        found = _pack_rows(documents, encode, config, n_tokens, seq_len, seed)
        if len(found) < n_least:
            raise ValueError(f"too little text in {', '.join(files) or 'no files'}, or too few "
                             f"--tokens: {n_least} rows of {seq_len} tokens are needed")
        return found

    held_out = torch.empty(0, seq_len, dtype=torch.int64)
    if corpus.eval_files:
        held_out = rows(corpus.eval_files, max(seq_len, 65_536), 1)
        if not corpus.files:
            return held_out[:0], held_out
    calibration = rows(corpus.files, corpus.tokens, 1 if corpus.eval_files else 2)
    if len(calibration) < corpus.tokens // seq_len:
        warnings.warn(f"the text has {calibration.numel():,} tokens in whole rows of {seq_len}, "
                      f"not the {corpus.tokens:,} asked for: using those", stacklevel=2)
    if not corpus.eval_files:
        n = max(1, min(len(calibration) // 10, 65_536 // seq_len))
        held_out, calibration = calibration[:n], calibration[n:]
    return calibration, held_out


def row_length(config: LlamaConfig, seq_len: int | None) -> int:
    """Tokens a row: `seq_len`, or min(2048, max_position_embeddings); ValueError if longer."""
    limit = config.max_position_embeddings
    seq_len = min(2048, limit) if seq_len is None else seq_len
    if not 2 <= seq_len <= limit:
        raise ValueError(f"sequence length {seq_len}: expected 2 to {limit} for this model")
    return seq_len


class _Documents(Sequence[str]):
    """The documents of text files that are not blank, in their order.

    Each is read from the disk when it is asked for, from its place in the file or, of `.gz`, in an
    unpacked copy: little is held of a large text. Of a `.txt` `longest` characters are read at
    most. Raises ValueError with file and line for what cannot be read.
    """

    def __init__(self, paths: Sequence[str], longest: int):
        self.paths, self.longest = list(paths), longest
        if any(path.endswith(".gz") for path in paths):
            self.folder = tempfile.TemporaryDirectory()  # of the copies; goes with this object
        self.places = array.array("q")  # of each document: which file, the first byte, the line
        for n, path in enumerate(paths):
            n_before = len(self)
            try:
                if path.endswith(".gz"):
                    self.paths[n] = os.path.join(self.folder.name, str(n))
                    with gzip.open(path) as packed, open(self.paths[n], "wb") as unpacked:
                        shutil.copyfileobj(packed, unpacked)
                self._find(n, path)
            except (OSError, EOFError, UnicodeError, zlib.error) as error:
                if getattr(error, "errno", 0) in (errno.ENOSPC, errno.EDQUOT):
                    raise OSError(f"{self.folder.name}: {error}, to unpack {path}") from None
                raise ValueError(f"{path}: cannot be read ({error})") from None
            if len(self) == n_before:
                raise ValueError(f"{path}: holds no text")

    def _find(self, n: int, name: str) -> None:
        """Note the places of the documents of file n."""
        if ".txt" in name[-7:]:
            self.places.extend([n, 0, 0])
            if not self[len(self) - 1].strip():
                del self.places[-3:]
            return
        at = 0
        with open(self.paths[n], "rb") as file:
            for number, line in enumerate(file, 1):
                if line.strip() and _record_text(f"{name}, line {number}", line).strip():
                    self.places.extend([n, at, number])
                at += len(line)

    def __len__(self) -> int:
        return len(self.places) // 3

    def __getitem__(self, i):
        if not 0 <= i < len(self):
            raise IndexError(i)
        n, at, number = self.places[3 * i : 3 * i + 3]
        if not number:
            with open(self.paths[n], encoding="utf-8-sig", newline="") as file:
                return file.read(self.longest)
        with open(self.paths[n], "rb") as file:
            file.seek(at)
            return _record_text(f"{self.paths[n]}, line {number}", file.readline())


def _record_text(where: str, line: bytes) -> str:
    """The text of one JSON record; raises ValueError that says where, if it has none."""
    try:
        record = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{where}: not JSON ({error}); expected a record a line") from None
    if not isinstance(record, dict) or not isinstance(record.get("text"), str):
        raise ValueError(f'{where}: expected an object with a "text" string')
    return record["text"].encode("utf-8", "replace").decode()  # web text has lone surrogates


def _pack_rows(
    documents: Sequence[str], encode: Callable[[list[str]], list[list[int]]], config: LlamaConfig,
    n_tokens: int, seq_len: int, seed: int
) -> Tensor:
    """Token rows (rows, seq_len) of documents shuffled by the seed, each closed by EOS, end to end.

    At most `n_tokens` tokens; a last row that is not full is dropped. Raises ValueError for a token
    that the model does not have.
    """
    # [::-1] for no reason but that results are as they always were.
    order = random.Random(seed).sample(range(len(documents)), len(documents))[::-1]
    ids, read = [np.zeros(0, np.int64)], 0
    for at in progress(range(0, len(order), 16), "tokenize", delay=2, leave=False):
        texts = [documents[i][: 16 * n_tokens] for i in order[at : at + 16]]
        for tokens in encode(texts):
            ids.append(np.array(tokens + config.eos_ids, np.int64))
            read += len(ids[-1])
        if read >= n_tokens:
            break
    stream = np.concatenate(ids)[:n_tokens]
    if len(stream) and stream.max() >= config.vocab_size:
        raise ValueError(
            f"the tokenizer gives token {stream.max()}, but the model's vocabulary has only "
            f"{config.vocab_size}; do the tokenizer files belong to this model?"
        )
    n_rows = len(stream) // seq_len
    return torch.from_numpy(stream[: n_rows * seq_len].reshape(n_rows, seq_len))


def load_tokenizer(path: PathLike) -> Callable[[list[str]], list[list[int]]]:
    """The function from texts to token ids of a model directory: BOS as its files say, no EOS.

    BOS comes first, and once, if add_bos_token is true in tokenizer_config.json, and not if it is
    false. Where it is not there, `tokenizer.json`'s own post-processor decides what comes first;
    with `tokenizer.model` BOS does. Raises ValueError without either file.
    """
    folder, settings = Path(path), dict[str, Any]()
    for name in ("special_tokens_map.json", "tokenizer_config.json"):  # the last one wins
        settings |= read_json(folder / name) if (folder / name).is_file() else {}
    try:
        if (folder / "tokenizer.json").is_file():
            from tokenizers import Tokenizer

            tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
            # subtle: it may have been saved with a truncation to a few hundred tokens.
            tokenizer.no_truncation()
            tokenizer.no_padding()
            sample, bos_token = tokenizer.encode("a"), settings.get("bos_token", "<s>")
            first = sample.ids[: (sample.special_tokens_mask + [0]).index(0)]
            bos_token = bos_token.get("content") if isinstance(bos_token, dict) else bos_token
            bos = tokenizer.token_to_id(str(bos_token))

            def encode(texts):
                return [e.ids for e in tokenizer.encode_batch(texts, add_special_tokens=False)]
        else:
            from sentencepiece import SentencePieceProcessor

            pieces = SentencePieceProcessor(model_file=str(folder / "tokenizer.model"))
            bos = pieces.bos_id() if pieces.bos_id() >= 0 else None
            first, encode = [] if bos is None else [bos], pieces.encode
    except Exception as error:  # tokenizers raises nothing narrower
        reason = textwrap.shorten(str(error), 160)
        raise ValueError(f"{folder}: no tokenizer.json or tokenizer.model that can be read "
                         f"({reason})") from None
    if isinstance(settings.get("add_bos_token"), bool):
        first = [] if not settings["add_bos_token"] else first if bos is None else [bos]
    return lambda texts: [ids if first and ids[: len(first)] == first else first + ids
                          for ids in encode(texts)]


# ---- 11 report and command line ------------------------------------------------------------------

_log = logging.getLogger("mha2gqa")


def kv_cache_bytes(config: LlamaConfig, weights: Weights) -> int:
    """Bytes of KV cache for each token of context, in the weights' dtype."""
    numbers = 2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim
    return numbers * weights[block_prefix(0) + "self_attn.k_proj.weight"].element_size()


def report_header(
    model: PathLike, config: LlamaConfig, weights: Weights, kv_heads: int, method: Method
) -> dict[str, Any]:
    """What the report of a conversion or training says of its making, before it has begun."""
    return {
        "versions": {"mha2gqa": __version__, "torch": torch.__version__},
        "date": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()), "command": shlex.join(sys.argv),
        "source": str(model), "method": dataclasses.asdict(method),
        "num_hidden_layers": config.num_hidden_layers,
        "kv_heads": {"source": config.num_key_value_heads, "converted": kv_heads},
        "kv_cache_bytes_per_token": {
            "source": kv_cache_bytes(config, weights),
            "converted": kv_cache_bytes(gqa_config(config, kv_heads), weights)},
    }


def _say_plan(
    report: Mapping[str, Any], config: LlamaConfig, method: Method, device: torch.device
) -> None:
    """Log what a conversion will do, and the memory that it takes; warn if the joint refit, which
    comes last, would not find it."""
    heads, tokens, d, e = report["kv_heads"], report["tokens"], config.hidden_size, config.head_dim
    n_tokens = tokens["calibration"] * (1 + _copies(config, tokens["calibration"], method))
    # A block's weights: attention as it is and converted, MLP.
    before, after = (2 * d * e * (config.num_attention_heads + n) for n in heads.values())
    mlp, kv = 3 * d * config.intermediate_size, heads["source"] * e
    # Bytes, measured. Hidden states; attention and Gram matrices in float64, or a block in float32
    # and bf16 with what trains it, and activations. Then the file to write, the held-out streams.
    block = max(16 * before + 24 * kv**2, (6 * mlp + 16 * after + 2**16 * d) * bool(method.refit))
    walk = 4 * d * n_tokens * (2 if method.refit else 1) + block
    score = min(10**9, 3 * mlp * config.num_hidden_layers) + 12 * d * tokens["held_out"]
    # All attention with gradients and moments, activations between blocks, the head, logits.
    joint = 4 * d * n_tokens + config.num_hidden_layers * (18 * after + 2048 * d)
    joint += 4 * config.vocab_size * (d + 9 * 512) + 6 * (mlp + after)
    needed = 3e8 + (max(walk, joint, score + block) if method.joint else walk + score)
    way = ", ".join(f"{name} {value}" for name, value in report["method"].items())
    _log.info(
        f"{config.num_hidden_layers} blocks, {heads['source']} to {heads['converted']} KV heads "
        f"({way});\n{tokens['calibration']:,} tokens to calibrate in rows of "
        f"{tokens['calibration_seq_len']:,} ({n_tokens:,} with resampled copies);\n"
        f"{tokens['held_out']:,} held out in rows of {tokens['seq_len']:,};\n"
        f"about {needed / 1e9:.1f} GB of memory ({device})")
    sysconf = getattr(os, "sysconf", lambda name: math.inf)  # not on Windows
    free = (torch.cuda.mem_get_info(device)[0] if device.type == "cuda"
            else sysconf("SC_PAGE_SIZE") * sysconf("SC_PHYS_PAGES"))
    if method.joint and needed > free:
        warnings.warn(f"{needed / 1e9:.1f} GB of memory are needed and there are {free / 1e9:.1f}; "
                      "--no-joint takes less", stacklevel=3)


def _peak_memory(device: torch.device) -> dict[str, int]:
    """This process's peak in bytes: the allocator's on CUDA, or else of resident memory, which
    counts mapped weights that the system could drop; {} where it does not tell."""
    if device.type == "cuda":
        return {"cuda_allocated": torch.cuda.max_memory_allocated(device)}
    with contextlib.suppress(ImportError):  # on Windows
        import resource

        unit = 1 if sys.platform == "darwin" else 1024
        return {"host_resident": unit * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss}
    return {}


def table(report: Mapping[str, Any]) -> str:
    """The scores of a report, a line for each metric and a column for each model."""
    scores, cache = report["scores"], report["kv_cache_bytes_per_token"]
    words = {"loss": "loss, nats/token", "kl": "KL to the source"}
    metrics = dict.fromkeys(metric for found in scores.values() for metric in found)
    sizes = (cache["source" if name in ("source", "teacher") else "converted"] for name in scores)
    return "\n".join([
        " " * 23 + "".join(f"{name.replace('_', '-'):>12}" for name in scores),
        *(f"{words.get(metric, metric):<23}"
          + "".join(f"{found[metric]:12.4f}" for found in scores.values()) for metric in metrics),
        "KV cache, bytes a token" + "".join(f"{size:12,}" for size in sizes)])


def write_report(folder: Path, report: Mapping[str, Any], source: Path) -> None:
    """Write mha2gqa.json, and README.md as the hub shows it, with the licence that the card in the
    source's directory names."""
    write_json(folder / "mha2gqa.json", report)
    try:
        from huggingface_hub import ModelCardData, metadata_load
    except ImportError:  # it comes with tokenizers; without them there is no card
        return
    licence = {}
    with contextlib.suppress(Exception):  # there is no card, or its YAML is broken
        head = metadata_load(source / "README.md") or {}
        licence = {name: value for name, value in head.items() if name.startswith("license")}
    base = report["source"]  # a directory, or a name on the hub
    base = Path(base).resolve().name if Path(base).exists() else base
    data = ModelCardData(base_model=base, library_name="transformers",
                         tags=["mha2gqa", "grouped-query-attention"], **licence)
    (folder / "README.md").write_text(
        f"---\n{data.to_yaml()}\n---\n# {base}, grouped-query attention\n\n"
        f"Made by mha2gqa {__version__}; how is in `mha2gqa.json`.\n\n```\n{table(report)}\n```\n\n"
        "It loads as the original does, without code of its own:\n\n```python\n"
        "from transformers import AutoModelForCausalLM, AutoTokenizer\n\n"
        'model = AutoModelForCausalLM.from_pretrained("DIRECTORY")\n'
        'tokenizer = AutoTokenizer.from_pretrained("DIRECTORY")\n```\n\nThe method begins with Jin '
        "et al. 2025, [Align Attention Heads Before Merging Them](https://arxiv.org/abs/2412.20677)"
        ".\n", encoding="utf-8", errors="replace")


def _pick_device(name: str) -> torch.device:
    """The device of that name; raises ValueError if this machine has none."""
    cuda = [f"cuda:{i}" for i in range(torch.cuda.device_count())]
    choices = ["cpu", *(["cuda", *cuda] if cuda else [])]
    if name not in ("auto", *choices):
        raise ValueError(f"device {name!r}: expected auto, {', '.join(choices)} on this machine")
    return torch.device(choices[1 if cuda else 0] if name == "auto" else name)


def progress(items: Iterable, what: str, total: int | None = None, **options) -> Iterable:
    """The items, with tqdm's progress bar; a line a minute of it where there is no terminal."""
    from tqdm import tqdm

    seconds = 0.1 if sys.stderr.isatty() else 60
    return tqdm(items, what, total, mininterval=seconds, maxinterval=10 * seconds, **options)


def plot(folders: Sequence[PathLike], file: PathLike) -> None:
    """Draw one conversion or training, or the losses of several against their KV cache.

    folders: OUT of each. Needs matplotlib. Raises ValueError for a folder without a report.
    """
    from matplotlib.figure import Figure

    figure, folder = Figure((12, 4), layout="constrained"), Path(folders[0])
    if len(folders) > 1:  # what runs cost in loss, against the KV cache that is left
        axis, curves = figure.subplots(), dict[str, list[tuple[float, float]]]()
        for out in map(Path, folders):
            report = read_json((out / "gqa" if (out / "gqa").is_dir() else out) / "mha2gqa.json")
            way, scores = report["method"], report["scores"]
            trained = [name for name in ("refit", "joint") if way[name]]
            label = ", ".join([way["align"], *trained, [*scores][-1]])
            cache, loss = report["kv_cache_bytes_per_token"], [s["loss"] for s in scores.values()]
            curves.setdefault(label, []).append((cache["converted"] / 1024, loss[-1] - loss[0]))
        for label, points in curves.items():
            axis.plot(*np.transpose(sorted(points)), "o-", label=label)
        axis.set(xlabel="KV cache, KiB a token", ylabel="loss above the source's, nats/token",
                 xlim=(0, None), yscale="log" if axis.dataLim.y0 > 0 else "linear")
        figure.legend(loc="outside right upper")
    elif (folder / "metrics.jsonl").exists():  # losses, and how open masks are (its figure 4)
        lines = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
        records = {(s["stage"], s["step"]): s for s in lines}  # a step made again: its last one
        steps = [s for (stage, _), s in records.items() if stage == next(reversed(records))[0]]
        axes = figure.subplots(1, 1 + ("mask_layers" in steps[0]), squeeze=False)[0]
        for name in [n for n in ("kl", "bild", "cross_entropy") if n in steps[0]]:
            axes[0].plot([s["step"] for s in steps], [s[name] for s in steps], ".-", label=name)
        axes[0].set(xlabel="step", ylabel="loss, nats/token", yscale="log")
        axes[0].legend()
        for axis in axes[1:]:
            axis.imshow(np.transpose([s["mask_layers"] for s in steps]), cmap="gray", vmin=0,
                        vmax=1, aspect="auto", origin="lower")
            axis.set(xlabel="step", ylabel="block, white where its masks are open")
    else:  # how well pairs of heads fit before and after they are aligned (figure 3); errors
        layers = read_json(folder / "mha2gqa.json")["layers"]
        middle = layers[n := len(layers) // 2]
        pairs, order = middle.get("pairs", {}), np.concatenate(middle["groups"])
        axes = figure.subplots(1, 1 + len(pairs), squeeze=False)[0]
        shown = {name: np.where(np.eye(len(order)), np.nan, s_KK)[np.ix_(order, order)]
                 for name, s_KK in pairs.items()}
        for axis, (when, s_KK) in zip(axes, shown.items(), strict=False):
            low, high = (of([*shown.values()]) for of in (np.nanmin, np.nanmax))
            axis.set(title=f"KV heads of block {n} by group, {when}", xticks=range(len(order)),
                     xticklabels=order, yticks=range(len(order)), yticklabels=order)
            figure.colorbar(axis.imshow(s_KK, vmin=low, vmax=high), label="similarity, kept share")
        axes[-1].plot([x.get("hidden_state_error", math.nan) for x in layers], label="the result")
        for when in ("before", "after") if "refit" in layers[0] else ():
            axes[-1].plot([x["refit"][when] for x in layers], ".:", label=f"{when} its refit")
        axes[-1].set(xlabel="block", ylabel="error of its hidden states")
        axes[-1].legend()
    figure.savefig(file, dpi=150)


def add_method_arguments(parser: argparse.ArgumentParser) -> None:
    """The options that make a `Method`, all but --joint; see `method_of_arguments`."""
    add = parser.add_argument
    add("--align", choices=Method.CHOICES["align"], default=Method.align,
        help="how heads are made to agree before they are averaged: by maps onto the shared head "
        "that serves them best (linear, the default), by rotations (the paper), or not at all")
    add("--group", choices=Method.CHOICES["group"],
        help="group heads by this: the least energy lost, similarity of values or keys, or none "
        "(default: energy, value, adjacent for --align linear, rotation, none)")
    add("--refit", action=argparse.BooleanOptionalAction, help="train each block's attention and "
        "norms to reproduce the source's hidden states (default: with --align linear)")
    add("--metric", choices=Method.CHOICES["metric"], default=Method.metric, help="similarity: "
        "minus the mean square distance (default), or with rotation or none the mean cosine")
    add("--seed", type=int, default=0, metavar="N", help="of all that is random (%(default)s)")


def method_of_arguments(arguments: argparse.Namespace) -> Method:
    """The method that a command line asks for."""
    names = {field.name for field in dataclasses.fields(Method)}
    return Method(**{name: value for name, value in vars(arguments).items() if name in names})


def _parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    """The command line's arguments; wrong ones end the program."""
    parser = argparse.ArgumentParser(
        "mha2gqa", description="Convert a LLaMA checkpoint to grouped-query attention.",
        usage="mha2gqa MODEL OUT --kv-heads G --text FILE ... [options]\n"
        "       mha2gqa --evaluate MODEL --text FILE ...\n       mha2gqa --plot OUT ...")
    add = parser.add_argument
    add("--version", action="version", version=f"mha2gqa {__version__} (torch {torch.__version__})")
    add("model", metavar="MODEL", nargs="?", help="Hugging Face directory, or its name on the hub")
    add("out", metavar="OUT", nargs="?", help="directory to write; must not exist")
    add("--kv-heads", type=int, metavar="G", help="KV heads wanted, a divisor of the source's")
    add("--text", nargs="+", default=[], metavar="FILE", help="to calibrate with: .jsonl or .json "
        'of records with a "text" field, one a line, or .txt, one document; .gz of either')
    add("--eval-text", nargs="+", default=[], metavar="FILE",
        help="held-out text; without it the first 10%% of --text's tokens; 65,536 at most")
    add("--tokens", type=int, default=Corpus.tokens, metavar="N",
        help="tokens to read of --text (default: %(default)s)")
    add("--seq-len", type=int, metavar="N",
        help="tokens per row (default: 2048, or the model's context if that is less)")
    add_method_arguments(parser)
    add("--joint", action=argparse.BooleanOptionalAction, help="at last train attention and norms "
        "of all blocks together to reproduce the source's predictions (default: with a refit)")
    add("--device", default="auto", help="cpu, cuda, cuda:1, ... (default: cuda if there is one)")
    add("--dry-run", action="store_true", help="check the input, say what would be done, and end")
    add("--evaluate", action="store_true", help="only print MODEL's held-out loss")
    add("--plot", nargs="+", metavar="OUT", help="draw a conversion, a training, or the losses of "
        "several into plot.png (needs matplotlib)")
    a = parser.parse_args(argv)
    converts = a.out and a.kv_heads is not None and a.text
    if not (a.plot or a.model and (converts or a.evaluate and (a.text or a.eval_text))):
        parser.error("expected MODEL OUT --kv-heads G --text FILE, in this order")
    return a


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; returns the exit status: 2 for bad input, with one line on stderr."""
    a = _parse_arguments(argv)
    logging.basicConfig(format="%(message)s", stream=sys.stdout)
    _log.setLevel(logging.INFO)
    try:
        method, corpus = method_of_arguments(a), Corpus(a.text, a.eval_text, a.tokens, a.seq_len)
        if a.plot:
            try:
                plot(a.plot, "plot.png")
            except (KeyError, IndexError):
                raise ValueError(f"{', '.join(a.plot)}: no reports that can be drawn") from None
            print("written to plot.png")
        elif a.evaluate:
            found = evaluate(a.model, corpus, method.seed, a.device)
            print(f"held-out loss {found['loss']:.4f} nats/token, "
                  f"{found['held_out_tokens']:,} tokens")
        else:
            report = convert(a.model, a.out, a.kv_heads, corpus, method, a.device, a.dry_run)
            if not a.dry_run:
                print(f"\n{table(report)}\nwritten to {a.out}")
    except (ValueError, OSError, MemoryError, ImportError, RuntimeError) as error:
        if isinstance(error, RuntimeError) and not _no_memory(error):
            raise
        print(f"error: {str(error).splitlines()[0] if str(error) else 'not enough memory'}",
              file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted: nothing was written", file=sys.stderr)
        return 130
    return 0


def install_signal_handlers() -> None:
    """For programs: SIGTERM and SIGHUP unwind as Ctrl-C does, so that nothing half-written stays.

    A signal that is ignored, as under nohup, stays ignored. And warnings are printed in one line.
    """
    warnings.showwarning = lambda message, *_: print(f"warning: {message}", file=sys.stderr)
    for name in ("SIGTERM", "SIGHUP"):
        number = getattr(signal, name, None)
        if number and signal.getsignal(number) != signal.SIG_IGN:
            signal.signal(number, signal.default_int_handler)


def command() -> None:
    """The program `mha2gqa`."""
    install_signal_handlers()
    sys.exit(main())


if __name__ == "__main__":
    command()
