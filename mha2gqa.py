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

Shape suffixes: B batch, T time, N calibration tokens, L layers, D hidden, H query heads, K source
KV heads, G target KV heads, M units per group, Q query heads per unit, E head dim, P = E/2 RoPE
planes, V vocabulary; in the annealer R restarts, S steps.
A *unit* is one source KV head with the Q = H/K query heads that read it; a group is M = K/G units.
"""

import argparse
import array
import codecs
import contextlib
import dataclasses
import datetime
import glob
import gzip
import itertools
import json
import lzma
import math
import os
import platform
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
from typing import Any, BinaryIO, ClassVar, cast

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

__version__ = "0.2.0"
__all__ = [
    "LlamaConfig", "Llama", "Decoder", "Block", "Attention", "MLP", "RMSNorm", "at_least_float32",
    "causal_attention", "attention_kernel",
    "BlockStatistics", "block_statistics", "value_gram", "key_gram",
    "procrustes", "rope_procrustes", "generalized_procrustes", "shared_keys", "normed_keys",
    "shared_values", "head_similarity", "discarded_energy", "anneal_groups",
    "HeadMaps", "transform", "merge",
    "hard_concrete", "open_probability", "l0_loss", "kl_loss", "bild_loss",
    "Method", "ConvertedBlock", "converted_blocks", "refit_block", "lr_factor", "gqa_config",
    "joint_refit", "resampled_rows", "calibration_rows", "embed", "read_block",
    "Corpus", "convert", "evaluate", "benchmark",
    "load_config", "model_folder", "load_checkpoint", "model_files", "save_checkpoint",
    "new_checkpoint", "CheckpointWriter", "block_prefix", "block_weights", "non_block_weights",
    "read_json", "write_json", "writing", "rename_when_on_disk", "refuse_pointer",
    "text_rows", "row_length", "check_calibration_rows", "load_tokenizer",
    "versions", "provenance", "method_steps", "without_repeats", "write_model_card",
    "kv_cache_bytes", "gigabytes",
    "free_memory", "is_out_of_memory", "Meter", "matrix_rate", "progress", "plot",
    "ArgumentParser", "add_method_arguments", "method_of_arguments", "install_signal_handlers",
    "command",
]

_HAS_VARLEN = torch.__version__ >= "2.12"  # has `varlen_attn` with the arguments that are used here
PathLike = str | os.PathLike[str]
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
        """The token that ends a text, if there is one; of several the first."""
        eos = self.eos_token_id
        return [] if eos is None else [eos] if isinstance(eos, int) else list(eos)[:1]

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
    if not 1 <= kv_heads < source or source % kv_heads:
        choices = [g for g in range(1, source) if source % g == 0]
        raise ValueError(
            f"{kv_heads} KV heads: the source has {source}, "
            + (f"choose one of {', '.join(map(str, choices))}" if choices else "nothing to merge")
        )
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
        self, tokens_BT: Tensor, document_BT: Tensor | None = None,
        readout: Callable[[Tensor, Tensor], Tensor] = F.linear
    ) -> Tensor:
        """Logits (B, T, V); or whatever `readout(hidden_BTD, head_VD)` makes of the hidden states.

        `document_BT` numbers the documents of packed rows, each a run of tokens: attention and
        positions then never cross from one into the next. None: each row is one document.
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
        self.q_norm: nn.Module = nn.Identity()
        self.k_norm: nn.Module = nn.Identity()
        if config.qk_norm:  # of each head (Henry et al. 2020)
            self.q_norm = RMSNorm(config, config.head_dim)
            self.k_norm = RMSNorm(config, config.head_dim)

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
    document ends and the next begins, 0 and B·T included; None: each row is one document. Takes
    `attention_kernel`; none of them looks at other documents, or, with the head dims and dtypes of
    real models, stores the T × T scores.
    """
    kernel, shared = attention_kernel(q_BHTE, ends is not None), q_BHTE.shape[1] != k_BKTE.shape[1]
    if kernel == "efficient" and shared:  # it knows nothing of shared heads
        shared, n = False, q_BHTE.shape[1] // k_BKTE.shape[1]
        k_BKTE, v_BKTE = (x.repeat_interleave(n, dim=1) for x in (k_BKTE, v_BKTE))

    def attend(q, k, v):
        return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=shared)

    if ends is None:
        return attend(q_BHTE, k_BKTE, v_BKTE)
    # All rows end to end: N = B·T.
    q_NHE, k_NKE, v_NKE = (x.transpose(1, 2).flatten(0, 1) for x in (q_BHTE, k_BKTE, v_BKTE))
    if kernel == "varlen":
        from torch.nn.attention.varlen import varlen_attn

        longest = q_BHTE.shape[2]
        y_NHE = cast(Tensor, varlen_attn(q_NHE, k_NKE, v_NKE, ends, ends, longest, longest,
                                         window_size=(-1, 0), enable_gqa=shared))
    else:
        y_NHE = _by_documents(attend, ends, q_NHE, k_NKE, v_NKE)
    return y_NHE.unflatten(0, (len(q_BHTE), -1)).transpose(1, 2)


def _by_documents(attend: Callable[..., Tensor], ends: Tensor, *qkv: Tensor) -> Tensor:
    """`attend` (1, heads, T, E) to one document after the other: (N, H, E)."""
    sizes = ends.diff().tolist()
    documents = zip(*(x.split(sizes) for x in qkv), strict=True)
    return torch.cat([attend(*(x.transpose(0, 1)[None] for x in document))[0].transpose(0, 1)
                      for document in documents])


def attention_kernel(q: Tensor, packed: bool = False) -> str:
    """The kernel that `causal_attention` takes for such queries, in `packed` rows or in whole ones.

    "flash" of F.scaled_dot_product_attention; "efficient", its memory-efficient one, with keys and
    values repeated for every query head: on CUDA for what is not 16 bits wide; "varlen", flash over
    documents of several lengths: on CUDA, if this torch has it. Packed rows take the others, too, a
    document at a time.
    """
    if q.is_cuda and q.dtype not in (torch.bfloat16, torch.float16):
        return "efficient"
    if q.is_cuda and packed and q.shape[-1] % 8 == 0 and q.shape[-1] <= 256 and _HAS_VARLEN:
        return "varlen"
    return "flash"


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
    y = at_least_float32(x)
    y = y * torch.rsqrt(y.square().mean(-1, keepdim=True) + eps)
    return weight * y.to(x.dtype)


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


def _rope_and_ends(config: LlamaConfig, x_BTD: Tensor, document_BT: Tensor | None = None):
    """((cos, sin) of shape (B or 1, 1, T, P), the `ends` of `causal_attention`).

    subtle: computed from the config at every call. A buffer would hold garbage after meta device ->
    to_empty -> load, and angles rounded to bf16 would be wrong.
    """
    time_T = torch.arange(x_BTD.shape[1], device=x_BTD.device)
    position_BT, ends = time_T[None], None
    if document_BT is not None:
        begins_BT = F.pad(document_BT.diff() != 0, (1, 0), value=True)
        position_BT = time_T - (time_T * begins_BT).cummax(-1).values
        ends = F.pad(begins_BT.flatten().nonzero()[:, 0], (0, 1), value=begins_BT.numel()).int()
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
    Only where keys are normed, as in Qwen3 (key_PKK is of what comes out): key_power_K, Σ_n |k[n]|²
    before the norm; turns_P, which planes may turn, see `normed_keys`.
    """

    key_PKK: Tensor
    value_KKEE: Tensor
    query_KP: Tensor
    output_KEE: Tensor
    n_tokens: int
    key_power_K: Tensor | None = None
    turns_P: Tensor | None = None

    def first_nonfinite(self) -> str | None:
        """The first of "keys", "values", "queries" whose sums are not finite, or None."""
        sums = {"keys": self.key_PKK, "values": self.value_KKEE, "queries": self.query_KP}
        return next((n for n, x in sums.items() if not torch.isfinite(x.abs().sum())), None)


def block_statistics(
    config: LlamaConfig, weights: Weights, x_BTD: Tensor, metric: str = "dist"
) -> BlockStatistics:
    """The statistics of a block on the hidden states that enter it.

    weights: the block's, named as in `Block`. metric: "cos" first scales every key and value vector
    to length 1 (eq. 7, 8), "dist" does not. Products of some 4,096 tokens at a time are made in
    float32 at least, and summed up in float64.
    """
    sums: dict[str, Tensor] = {}
    key_power_K = torch.zeros((), dtype=torch.float64, device=x_BTD.device)
    parts = x_BTD.split(max(1, 4096 // x_BTD.shape[1]))
    for rows in progress(parts, "statistics", inside=True):
        y_BTD = _rms_norm(rows, weights["input_layernorm.weight"].to(rows), config.rms_norm_eps)
        for name, gram in (("q_proj", _query_power), ("k_proj", key_gram), ("v_proj", value_gram)):
            weight = weights[f"self_attn.{name}.weight"]
            bias = weights.get(f"self_attn.{name}.bias")
            with _forward_autocast(rows):
                heads = F.linear(y_BTD, weight.to(rows), None if bias is None else bias.to(rows))
            heads_NKE = at_least_float32(heads).flatten(0, 1).unflatten(-1, (-1, config.head_dim))
            norm = weights.get(f"self_attn.{name[0]}_norm.weight")
            if norm is not None:
                if name == "k_proj":
                    key_power_K = key_power_K + heads_NKE.double().square().sum((0, 2))
                heads_NKE = _rms_norm(heads_NKE, norm.to(heads_NKE), config.rms_norm_eps)
            if metric == "cos" and name != "q_proj":
                heads_NKE = F.normalize(heads_NKE, dim=-1)
            products = gram(heads_NKE)
            sums[name] = sums.get(name, 0) + products.to(
                torch.promote_types(products.dtype, torch.float64))
    query_KP = sums["q_proj"].unflatten(0, (config.num_key_value_heads, -1)).sum(1)
    # To the CPU: that is where hundreds of small decompositions are fast.
    found = BlockStatistics(sums["k_proj"].cpu(), sums["v_proj"].cpu(), query_KP.cpu(),
                            _output_root(config, weights).cpu(), x_BTD[..., 0].numel())
    if not config.qk_norm:
        return found
    q_2P, k_2P = (weights[f"self_attn.{name}_norm.weight"].cpu().view(2, -1) for name in "qk")
    turns_P = (q_2P[0] == q_2P[1]) & (k_2P[0] == k_2P[1])
    return dataclasses.replace(found, key_power_K=key_power_K.cpu(), turns_P=turns_P)


def value_gram(v_NKE: Tensor) -> Tensor:
    """Gram blocks C_ij = Σ_n v_i[n]ᵀ v_j[n] of all pairs of heads: (K, K, E, E)."""
    n, k, e = v_NKE.shape
    v, gram = v_NKE.reshape(n, k * e), v_NKE.new_zeros(k * e, k * e)
    size = math.ceil(k * e / 8)
    for at in range(0, k * e, size):  # it is symmetric: half the work is enough
        gram[at : at + size, at:] = v[:, at : at + size].T @ v[:, at:]
    gram = gram.triu() + gram.triu(1).T
    return gram.view(k, e, k, e).transpose(1, 2)


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


def _query_power(q_NHE: Tensor) -> Tensor:
    """Σ_n |q|² (H, P) of each head in each RoPE plane."""
    x, y = q_NHE.chunk(2, dim=-1)
    return x.square().sum(0) + y.square().sum(0)


def _output_root(config: LlamaConfig, weights: Weights) -> Tensor:
    """S_i = (Σ WoᵀWo)^½ (K, E, E) over the query heads of a unit: ‖v S_i‖² = Σ ‖v Woᵀ‖²."""
    heads = (config.num_key_value_heads, -1, config.head_dim)
    wo_KQED = weights["self_attn.o_proj.weight"].double().mT.unflatten(0, heads)
    value, vector = torch.linalg.eigh((wo_KQED @ wo_KQED.mT).sum(1))
    root = value.clamp(min=1e-12 * value.max() + 1e-30).sqrt()  # not 0: it will be inverted
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


def _as_heads_of_dim_1(gram_PMM: Tensor) -> Tensor:
    """(…, P, M, M) → (…, P, M, M, 1, 1): a RoPE plane is a head of one complex number.

    Conjugated, because C_ij = X_iᴴ X_j = Σ conj(z_i) z_j, whereas `key_gram` is Σ z_i conj(z_j).
    """
    return gram_PMM.conj()[..., None, None]


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
    gram = _as_heads_of_dim_1(gram) if rope else gram
    maps = _polar(gram[..., :, 0, :, :])  # the start: every head onto the first (eq. 6)
    maps[..., 0, :, :] = torch.eye(gram.shape[-1], dtype=gram.dtype, device=gram.device)
    history = [_inner_products(gram, maps).triu(1).sum((-1, -2))]
    before, run = maps, torch.ones_like(history[0])  # run: rounds since the momentum's last start
    for _ in range(500):
        ahead = maps + ((run - 1) / (run + 2))[..., None, None, None] * (maps - before)
        for i in range(gram.shape[-4]):
            ahead = _rotate_head(gram, ahead, i)
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


def _rotate_head(gram: Tensor, maps: Tensor, i: int) -> Tensor:
    """The maps with q_i ← polar(Σ_(j≠i) C_ij q_j)."""
    others = [j for j in range(maps.shape[-3]) if j != i]
    rotated = maps.clone()
    rotated[..., i, :, :] = _polar((gram[..., i, others, :, :] @ maps[..., others, :, :]).sum(-3))
    return rotated


_TINY = 1e-100  # added to energies, in float64, so that heads of zeros do not divide 0 by 0


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
    # subtle: not 0, since a unit without queries would divide by it.
    root_PM = power_MP.mT.clamp(min=1e-9 * power_MP.max() + _TINY).sqrt()
    energy_PM, vector_PMM = torch.linalg.eigh(
        root_PM[..., :, None] * gram_PMM * root_PM[..., None, :])
    best_P, u_PM = energy_PM[..., -1], vector_PMM[..., -1]
    power_P = gram_PMM.diagonal(dim1=-2, dim2=-1).real.mean(-1)
    sigma_PM = (power_P.clamp(min=_TINY) / best_P.clamp(min=_TINY)).sqrt()[..., None]
    maps_PM = m * sigma_PM * root_PM * u_PM.conj()
    inverses_PM = u_PM / (sigma_PM * root_PM)
    kept = (best_P.sum(-1) + _TINY) / (energy_PM.sum((-1, -2)) + _TINY)
    return maps_PM.mT, inverses_PM.mT, kept


def normed_keys(gram_PMM: Tensor, turns_P: Tensor) -> tuple[Tensor, Tensor]:
    """The maps under which normed keys agree best, as Qwen3's: (c (…, M, P), kept (…)).

    There each head's query and key goes through RMSNorm, whose weights all heads share, and then
    through RoPE. The norm takes any length out, so only rotations are left of the free maps; and a
    plane whose two weights differ (of the queries' norm or of the keys') may only change its sign.
    gram: (…, P, M, M) of the normed keys, C_ij = Σ_n z_i conj(z_j). turns: (P,), which planes turn.
    c: complex of modulus 1, c_i z_i agree. kept: the share of their energy that their mean keeps.
    """
    turned_PM, _ = generalized_procrustes(gram_PMM, rope=True)
    signs_PM = generalized_procrustes(gram_PMM.real[..., None, None])[0][..., 0, 0]
    c_PM = torch.where(turns_P[:, None], turned_PM, signs_PM.to(turned_PM.dtype))
    inner_PMM = _inner_products(_as_heads_of_dim_1(gram_PMM), c_PM[..., None, None])
    energy = gram_PMM.diagonal(dim1=-2, dim2=-1).real.sum((-1, -2))
    kept = (inner_PMM.sum((-1, -2, -3)) / gram_PMM.shape[-1] + _TINY) / (energy + _TINY)
    return c_PM.mT, kept


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
    if rope:
        return _similarity(gram.abs().sum(0), n_tokens, metric)
    inner_KK = gram.diagonal(dim1=-2, dim2=-1).sum(-1)  # only its diagonal, tr C_ii, will stay
    i, j = torch.triu_indices(len(inner_KK), len(inner_KK), 1, device=gram.device)
    inner_KK[i, j] = inner_KK[j, i] = torch.linalg.svdvals(gram[i, j]).sum(-1)
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
    """What linear alignment loses when two heads share: loss (K, K), symmetric; and to look at the
    mean share of keys' and of values' energy that stays (2, K, K), as they are and aligned.

        loss_ij = keys_ij / mean keys + values_ij / mean values

    keys_ij: in each plane a shared key keeps one of the pair's two eigenvalues, the smaller one is
    lost (of normed keys half of the difference of the two, see `normed_keys`). values_ij: a shared
    value keeps E of the pair's 2E eigenvalues, the E smallest are lost. As they are, both become
    their mean (before a norm of keys). The loss of a larger group is taken to be the sum over its
    pairs.
    """
    k, e = statistics.output_KEE.shape[:2]
    root_KP, s_KEE = statistics.query_KP.sqrt(), statistics.output_KEE
    s2_KEE = s_KEE @ s_KEE
    pairs = torch.combinations(torch.arange(k))
    lost_of, energy_of = [], []  # (as they are, aligned) and (keys, values) of each pair
    for chunk in pairs.split(64):  # all at once would be a gigabyte
        i, j = chunk[:, :, None], chunk[:, None, :]
        root = root_KP[chunk].movedim(-1, 0)  # (P, pairs, 2)
        gram = statistics.key_PKK[:, i, j]
        if statistics.turns_P is None:
            keys = torch.linalg.eigvalsh(  # in ascending order
                root[..., :, None] * gram * root[..., None, :])
        else:  # normed keys only turn: their mean keeps one of these parts, and loses the other
            both = gram[..., 0, 1]
            agree = torch.where(statistics.turns_P[:, None], both.abs(), both.real.abs())
            mean = gram.diagonal(dim1=-2, dim2=-1).real.mean(-1)
            power = root.square().mean(-1)
            keys = power[..., None] * torch.stack([mean - agree, mean + agree], -1)
        c = statistics.value_KKEE[i, j]
        values = torch.linalg.eigvalsh(_block_matrix(s_KEE[i] @ c @ s_KEE[j]))
        # Of x and y with weights a and b, a |x − (x+y)/2|² + b |y − (x+y)/2|² = (a+b)/4 |x − y|².
        apart = (gram[..., 0, 0] + gram[..., 1, 1] - 2 * gram[..., 0, 1]).real
        as_they_are = torch.stack([
            (root.square().sum(-1) * apart).sum(0),
            (s2_KEE[chunk].sum(1) * (c[:, 0, 0] + c[:, 1, 1] - 2 * c[:, 0, 1])).sum((1, 2))]) / 4
        lost_of.append(torch.stack([
            as_they_are, torch.stack([keys[..., 0].sum(0), values[:, :e].sum(1)])]))
        energy_of.append(torch.stack([keys.sum((0, 2)), values.sum(1)]))
    lost, energy = torch.cat(lost_of, dim=2), torch.cat(energy_of, dim=1).mean(1, keepdim=True)
    # subtle: losses below a 1e-12th of the energy are rounding, and count as none.
    energy = energy.clamp(min=_TINY)
    loss = (lost[1] / lost[1].mean(1, keepdim=True).clamp(min=1e-12 * energy)).sum(0)
    found_3KK = torch.zeros(3, k, k, dtype=torch.float64)
    found_3KK[:, pairs[:, 0], pairs[:, 1]] = torch.stack([loss, *1 - (lost / energy).mean(1)])
    found_3KK += found_3KK.mT.clone()
    return found_3KK[0], found_3KK[1:]


def anneal_groups(
    s_KK: Tensor | np.ndarray, n_groups: int, seed: int = 0, temperature: float = 2.0
) -> list[list[int]]:
    """Split K heads into equal groups that hold the most similar heads.

        maximise  Σ over groups, Σ_(i<j in the group) s_ij                       (eq. 23, 24)

    Simulated annealing by swaps of two heads (algorithm 2), 512 restarts of 4,000 steps side by
    side; then the best of all swaps until none gains. `temperature` is the initial one, in standard
    deviations of s; it falls to a hundredth of that. 0 is the paper's rule: improvements only.
    Returns `n_groups` sorted lists, ordered by their first heads. Raises ValueError if `n_groups`
    does not divide K or s is not a square matrix of finite numbers.

    >>> anneal_groups(np.array([[0, 1, 9, 1], [1, 0, 1, 8], [9, 1, 0, 1], [1, 8, 1, 0]]), 2)
    [[0, 2], [1, 3]]
    """
    s = torch.as_tensor(s_KK, dtype=torch.float64, device="cpu").numpy().copy()
    k = len(s)
    if s.shape != (k, k) or not np.isfinite(s).all():
        found = "values that are not finite" if s.shape == (k, k) else f"shape {s.shape}"
        raise ValueError(f"expected a square matrix of finite similarities, found {found}")
    if n_groups < 1 or k % n_groups:
        raise ValueError(f"{k} heads cannot be split into {n_groups} equal groups")
    s = (s + s.T) / 2
    np.fill_diagonal(s, 0)
    rng = np.random.default_rng(seed)
    group_RK = rng.permuted(np.tile(np.arange(k) * n_groups // k, (512, 1)), axis=1)
    group_RK = _metropolis_swaps(s, group_RK, 4000, temperature * s.std(), rng)
    group_RK = _steepest_ascent(s, group_RK)
    score_R = ((group_RK[:, :, None] == group_RK[:, None, :]) * s).sum((1, 2))
    best_K = group_RK[score_R.argmax()]
    return sorted(np.flatnonzero(best_K == g).tolist() for g in range(n_groups))


def _affinity(s_KK: np.ndarray, group_RK: np.ndarray) -> np.ndarray:
    """a[r, i, g]: the sum of s between head i and the heads of group g, in restart r.

    If heads i and j of groups g and h change places, the score gains
    a[i, h] − a[i, g] + a[j, g] − a[j, h] − 2 s_ij: the first and third terms count s_ij as if one
    joined the other, but they stay apart.
    """
    return s_KK @ (group_RK[:, :, None] == np.arange(group_RK.max() + 1)).astype(np.float64)


def _metropolis_swaps(s_KK, group_RK, steps, temperature, rng) -> np.ndarray:
    """Propose a swap in every restart; accept it if u < exp(gain / T), u uniform in (0, 1).

    That is gain > T log u, and −log u has the exponential distribution.
    """
    group_RK, a_RKG = group_RK.copy(), _affinity(s_KK, group_RK)
    rows = np.arange(len(group_RK))
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


def _steepest_ascent(s_KK, group_RK) -> np.ndarray:
    """In every restart make the best of all swaps, until none gains."""
    group_RK, rows = group_RK.copy(), np.arange(len(group_RK))
    while True:
        a_RKG = _affinity(s_KK, group_RK)
        to_RKK = np.take_along_axis(a_RKG, group_RK[:, None, :], axis=2)  # a[i, group of j]
        leave_RKK = to_RKK - np.diagonal(to_RKK, axis1=1, axis2=2)[:, :, None]
        gain_RKK = leave_RKK + leave_RKK.transpose(0, 2, 1) - 2 * s_KK
        gain_RKK[group_RK[:, :, None] == group_RK[:, None, :]] = 0
        best_R = gain_RKK.reshape(len(rows), -1).argmax(1)
        i, j = np.unravel_index(best_R, s_KK.shape)
        r = np.flatnonzero(gain_RKK[rows, i, j] > 1e-12 * np.abs(s_KK).max())
        if not len(r):
            return group_RK
        group_RK[r, i[r]], group_RK[r, j[r]] = group_RK[r, j[r]], group_RK[r, i[r]]


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

    @classmethod
    def exact(cls, key_KP: Tensor, value_KEE: Tensor) -> "HeadMaps":
        """With the inverses that leave the model unchanged."""
        return cls(key_KP, value_KEE, 1 / key_KP, torch.linalg.inv(value_KEE))


def transform(
    weights: Weights, config: LlamaConfig, order_K: Sequence[int], maps: HeadMaps
) -> dict[str, Tensor]:
    """A block's weights with its units in a new order, and mapped.

    Attention's weights come back in float64, so that only the last cast rounds.
    """
    order = torch.as_tensor(order_K)
    heads = {name: w_KQED[order] for name, w_KQED in _split_heads(weights, config).items()}
    heads = _map_values(_map_keys(heads, maps), maps)
    mapped = {name: _join_heads(name, w_KQED, weights[name]) for name, w_KQED in heads.items()}
    return {**weights, **mapped}


def _split_heads(weights: Weights, config: LlamaConfig) -> dict[str, Tensor]:
    """Attention's weights and biases as (unit, its heads, E, D), float64; D is 1 for a bias.

    Rows of q_proj, k_proj and v_proj, columns of o_proj, whose bias belongs to no head.
    """
    heads = {}
    for name in weights:
        if "_proj." in name and name.startswith("self_attn.") and name != "self_attn.o_proj.bias":
            rows = weights[name].double().mT if "o_proj" in name else weights[name].double()
            shape = config.num_key_value_heads, -1, config.head_dim, rows[0].numel()
            heads[name] = rows.reshape(shape)
    return heads


def _join_heads(name: str, w_KQED: Tensor, like: Tensor) -> Tensor:
    """The weight or bias of these heads, in the shape of `like`."""
    return w_KQED.flatten(0, 2).mT.contiguous() if "o_proj" in name else w_KQED.reshape(like.shape)


def _map_keys(heads: Weights, maps: HeadMaps) -> dict[str, Tensor]:
    """Multiply every plane of keys by c, of the queries that read them by conj(a)."""
    out = dict(heads)
    for name, w_KQED in heads.items():
        if "k_proj" in name or "q_proj" in name:
            c_KP = maps.key_KP if "k_proj" in name else maps.key_inverse_KP.conj()
            c_KP = c_KP.to(w_KQED.device)
            z_KQPD = torch.complex(*w_KQED.chunk(2, dim=2)) * c_KP[:, None, :, None]
            out[name] = torch.cat([z_KQPD.real, z_KQPD.imag], dim=2)
    return out


def _map_values(heads: Weights, maps: HeadMaps) -> dict[str, Tensor]:
    """Multiply the values by q, what the output projection reads by r: Wv → qᵀ Wv, Wo → Wo rᵀ."""
    out = dict(heads)
    for name, w_KQED in heads.items():
        if "v_proj" in name or "o_proj" in name:  # Wo's heads are its columns: (Wo rᵀ)ᵀ = r Woᵀ
            left_KEE = maps.value_KEE.mT if "v_proj" in name else maps.value_inverse_KEE
            out[name] = left_KEE.to(w_KQED.device)[:, None] @ w_KQED
    return out


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

    CHOICES: ClassVar = {
        "align": ("linear", "rotation", "none"),
        "group": ("energy", "value", "key", "adjacent"),
        "metric": ("dist", "cos"),
    }
    GROUP_FOR: ClassVar = {"linear": "energy", "rotation": "value", "none": "adjacent"}

    align: str = "linear"
    refit: bool | None = None
    joint: bool | None = None
    group: str | None = None
    metric: str = "dist"
    seed: int = 0

    def __post_init__(self):
        if self.refit is None:
            object.__setattr__(self, "refit", self.align == "linear")
        if self.joint is None:
            object.__setattr__(self, "joint", self.refit)
        if self.group is None:
            object.__setattr__(self, "group", self.GROUP_FOR.get(self.align, "energy"))
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

    source: the block as it was. aligned: with its units mapped and in the order of their groups,
    before the merge; None after a refit, which changes other weights, too. converted: the result,
    in the source's dtype. report: its groups and how well they fit.
    """

    source: dict[str, Tensor]
    aligned: dict[str, Tensor] | None
    converted: dict[str, Tensor]
    report: dict[str, Any]


@torch.no_grad()
def converted_blocks(
    config: LlamaConfig, weights: Weights, x_BTD: Tensor, kv_heads: int, method: Method,
    document_BT: Tensor | None = None, lap: Callable[[str], None] = lambda stage: None
) -> Iterator[ConvertedBlock]:
    """Convert one block after the other: in memory are this one, as it was and as it becomes, and
    the next.

    Two streams of hidden states walk along. The source's, `x_BTD`, starts as the embedded
    calibration rows; it gives the statistics, and each block's output is what its refit should
    reproduce. It is overwritten block by block, to save memory. The converted model's stream is
    what the refit starts from.
    `document_BT` as in `Llama.forward`. `lap(stage)` is called as each stage ends, to time it.
    Raises ValueError for weights or activations that are not finite.
    """
    new_config = gqa_config(config, kv_heads)
    source_x, converted_x = x_BTD, x_BTD.clone() if method.refit else torch.empty(0)
    following = read_block(weights, 0, x_BTD.device)
    lap("read")
    for i in range(config.num_hidden_layers):
        source = following
        statistics = block_statistics(config, source, source_x, method.metric)
        if what := statistics.first_nonfinite():
            raise ValueError(f"block {i}: its {what} on this text are not finite")
        lap("calibrate")
        groups, pairs = _choose_groups(statistics, kv_heads, method, method.seed + i)
        maps, report = _align_groups(statistics, groups, method)
        report |= {"pairs": pairs} if pairs else {}
        lap("align")
        mapped = transform(source, config, sum(groups, []), maps)
        converted = _as_dtypes_of(source, merge(mapped, config, kv_heads))
        aligned = None if method.refit else mapped
        del mapped  # in float64: too large to keep through a refit
        lap("merge")
        _run_block_(config, source, source_x, document_BT)
        if not x_BTD.is_cuda:  # there the lap would wait for it, and it computes while we read
            lap("calibrate")
        if i + 1 < config.num_hidden_layers:
            following = read_block(weights, i + 1, x_BTD.device)
        lap("calibrate" if x_BTD.is_cuda else "read")
        # source_x now holds the hidden states after the block, which are the refit's target.
        if method.refit:
            converted, report["refit"] = refit_block(
                new_config, converted, converted_x, source_x, method.seed + i, document_BT)
            if not math.isfinite(report["refit"]["before"]):
                raise ValueError(f"block {i}: its hidden states on this text are not finite")
            _run_block_(new_config, converted, converted_x, document_BT)
            lap("refit")
        yield ConvertedBlock(source, aligned, converted, report)


def _choose_groups(
    statistics: BlockStatistics, kv_heads: int, method: Method, seed: int
) -> tuple[list[list[int]], dict[str, list[list[float]]]]:
    """The units of each of `kv_heads` groups; and for the report, if it was asked, how well pairs
    fit, {"before": (K, K), "after": (K, K)} the alignment, if there is one: with "energy" the share
    that stays, or else the similarity."""
    if method.group == "adjacent":
        return torch.arange(len(statistics.output_KEE)).view(kv_heads, -1).tolist(), {}
    if method.group == "energy":
        loss_KK, shown_2KK = discarded_energy(statistics)
        s_KK = shown_2KK[0] if method.align == "none" else -loss_KK
    else:
        by_key = method.group == "key"
        gram = statistics.key_PKK if by_key else statistics.value_KKEE
        inner_KK = gram.real.sum(0) if by_key else gram.diagonal(dim1=-2, dim2=-1).sum(-1)
        if by_key and statistics.turns_P is not None:  # the others change only their sign
            gram = torch.where(statistics.turns_P[:, None, None], gram, gram.real.to(gram.dtype))
        shown_2KK = torch.stack([
            _similarity(inner_KK, statistics.n_tokens, method.metric),
            head_similarity(gram, statistics.n_tokens, method.metric, rope=by_key)])
        s_KK = shown_2KK[0 if method.align == "none" else 1]
    before, after = ([[float(f"{s:.3g}") for s in row] for row in s_KK.tolist()]
                     for s_KK in shown_2KK)
    pairs = {"before": before} if method.align == "none" else {"before": before, "after": after}
    return anneal_groups(s_KK, kv_heads, seed), pairs


def _align_groups(
    statistics: BlockStatistics, groups: list[list[int]], method: Method
) -> tuple[HeadMaps, dict[str, Any]]:
    """The maps of a block's units, in the order of the groups, and the report on them.

    The report has the groups; for keys and values the mean similarity of pairs inside groups,
    before and after, or with "linear" the share of energy that the shared heads keep.
    """
    g_GM, report = torch.tensor(groups), {"groups": groups}
    m = g_GM.shape[1]
    i, j = g_GM[:, :, None], g_GM[:, None, :]
    value_GMMEE = statistics.value_KKEE[i, j]
    key_GPMM = statistics.key_PKK[:, i, j].movedim(0, 1)
    if method.align == "linear":
        if statistics.turns_P is None:
            keys, key_inverses, key_kept = shared_keys(key_GPMM, statistics.query_KP[g_GM])
        else:
            keys, key_kept = normed_keys(key_GPMM, statistics.turns_P)
            key_inverses = keys.conj()
        values, value_inverses, value_kept = shared_values(
            value_GMMEE, statistics.output_KEE[g_GM])
        kept = {"key": key_kept.mean().item(), "value": value_kept.mean().item()}
        maps = HeadMaps(*(t.flatten(0, 1) for t in (keys, values, key_inverses, value_inverses)))
        return _with_equal_keys(maps, statistics, g_GM), {**report, "energy_kept": kept}
    key_GPM = torch.ones_like(key_GPMM[..., 0])
    value_GMEE = torch.eye(value_GMMEE.shape[-1]).to(value_GMMEE).expand(*g_GM.shape, -1, -1)

    def similarities(key_GPM, value_GMEE):
        planes = _inner_products(_as_heads_of_dim_1(key_GPMM), key_GPM[..., None, None])
        inner = {"key": planes.sum(1), "value": _inner_products(value_GMMEE, value_GMEE)}
        first, second = torch.triu_indices(m, m, 1)
        return {name: _similarity(inner_GMM, statistics.n_tokens, method.metric)
                [:, first, second].mean().item() for name, inner_GMM in inner.items()}

    before = similarities(key_GPM, value_GMEE)
    if method.align == "rotation":
        if statistics.turns_P is None:
            key_GPM, _ = generalized_procrustes(key_GPMM, rope=True)
        else:
            key_GPM = normed_keys(key_GPMM, statistics.turns_P)[0].mT
        value_GMEE, _ = generalized_procrustes(value_GMMEE)
    after = similarities(key_GPM, value_GMEE)
    maps = HeadMaps.exact(key_GPM.mT.flatten(0, 1), value_GMEE.flatten(0, 1))
    if method.align == "rotation":
        maps = _with_equal_keys(maps, statistics, g_GM)
    return maps, {**report, "similarity_inside_groups": {
        name: {"before": before[name], "after": after[name]} for name in before}}


def _with_equal_keys(maps: HeadMaps, statistics: BlockStatistics, g_GM: Tensor) -> HeadMaps:
    """The maps, where keys are normed scaled so that all heads of a group weigh the same in their
    mean: the norm takes the scale out of each, and of the mean."""
    if statistics.key_power_K is None:
        return maps
    root_GM = (statistics.key_power_K[g_GM] + _TINY).sqrt()
    scale_K = (root_GM.mean(1, keepdim=True) / root_GM).flatten()
    return dataclasses.replace(maps, key_KP=maps.key_KP * scale_K[:, None])


# Chosen by held-out loss and KL, in rows of 256 tokens, on a saturated model of 30 blocks, 576 wide
# (3 KV heads to 1), and on two small ones, 96 and 256 wide.
_REFIT_TOKENS = 512  # per step: with few tokens, more and smaller steps
_REFIT_RATE = 0.4  # how much a step at the highest rate changes an output, relative to it
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
        y_BTD = _forward(block, {**weights, **trained}, at_least_float32(x_BTD[rows]), document)
        return _hidden_state_error(y_BTD, target_BTD[rows])

    tokens_BT = x_BTD[..., 0]  # only its shape counts
    fitted, error_of = _fit(_refitted(weights), error, lambda _: _REFIT_RATE, tokens_BT,
                            _refit_epochs(tokens_BT.numel()), seed, "refit")
    return {**weights, **fitted}, error_of


def _refitted(weights: Weights) -> dict[str, Tensor]:
    """Those of a block's weights that a refit trains: attention and the norms.

    The MLPs are two thirds of a model. They have lost nothing, and take more tokens to train.
    """
    return {name: w for name, w in weights.items() if not name.startswith("mlp.")}


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
    config: LlamaConfig, weights: Weights, blocks: Iterable[ConvertedBlock], tokens_BT: Tensor,
    target_BTD: Tensor, kv_heads: int, seed: int
) -> tuple[Iterator[ConvertedBlock], dict[str, float]]:
    """Train attention and norms of all converted blocks together.

        minimise  the mean over tokens of KL(source ‖ converted), see `kl_loss`

    A block alone cannot know which of its errors the output will notice. One pass over the tokens:
    in a second one the KL on other text rose (the hidden states of a block bear several).
    config, weights: the source's. blocks: as from `converted_blocks`, which leaves in its `x_BTD`
    what is the target here, the source's hidden states after the last block. Each row is one
    document. Returns (the blocks again, KL in nats/token before and after, see `_fit`).
    Memory: some 20 bytes for each weight that is trained, and one block, which is run again in the
    backward pass (Chen et al. 2016).
    """
    reports: list[dict[str, Any]] = []
    start: dict[str, Tensor] = {}
    for i, block in enumerate(blocks):
        reports.append(block.report)
        start |= {block_prefix(i) + n: w for n, w in _refitted(block.converted).items()}
        del block  # it would outlive the loop
    device, empty = target_BTD.device, _empty_block(gqa_config(config, kv_heads))
    frozen = {name: w for name, w in weights.items() if ".mlp." in name}
    needed = _n_bytes(frozen.values()) + 24 * sum(w.numel() for w in start.values())
    if needed < (free_memory(device) or 0):  # or else each block's again in each step
        frozen = {name: w.to(device) for name, w in frozen.items()}
    readout = _readout(config, weights, at_least_float32(target_BTD[:1]))

    def run(i, trained, x_BTD):
        block = block_weights({**frozen, **trained}, i)
        return _forward(empty, {name: w.to(device) for name, w in block.items()}, x_BTD)

    def sum_of_kl(x_ND, target_ND):
        return kl_loss(readout(x_ND), readout(target_ND)).sum()

    def kl(trained, rows):
        x_BTD = embed(weights, tokens_BT[rows], device, torch.float32)
        for i in range(config.num_hidden_layers):
            x_BTD = checkpoint(run, i, trained, x_BTD, use_reentrant=False)
        chunks = (at_least_float32(y_BTD).flatten(0, 1).split(256)
                  for y_BTD in (x_BTD, target_BTD[rows]))
        return sum(checkpoint(sum_of_kl, *chunk, use_reentrant=False)
                   for chunk in zip(*chunks, strict=True)) / x_BTD[..., 0].numel()

    def rate(kl):  # which is quadratic in what is wrong with the logits
        return min(_JOINT_RATE, math.sqrt(max(kl, 0)) / 2)

    fitted, error = _fit(start, kl, rate, tokens_BT, 1, seed, "joint refit")

    def block_with_report(i, report):
        source = read_block(weights, i, device)
        converted = {name: fitted.get(block_prefix(i) + name, w) for name, w in source.items()}
        return ConvertedBlock(source, None, converted, report)

    return itertools.starmap(block_with_report, enumerate(reports)), error


@torch.no_grad()
def resampled_rows(
    config: LlamaConfig, weights: Weights, tokens_BT: Tensor, copies: int, seed: int, device
) -> Tensor:
    """More text of the same kind: (copies · B, T), each row with half of its tokens replaced.

    What replaces them is drawn from what the source predicts there, given the row as it is. Such
    text reads badly, but served a refit as well as text that the model wrote from scratch; and it
    takes one forward for all tokens at once, where writing takes one for each.
    """
    x_BTD = embed(weights, tokens_BT, device, torch.float32)
    for i in progress(range(config.num_hidden_layers), "resample"):
        _run_block_(config, read_block(weights, i, device), x_BTD)
        if not x_BTD.isfinite().all():
            raise ValueError(f"block {i}: its hidden states on this text are not finite")
    readout, generator = _readout(config, weights, x_BTD), torch.Generator().manual_seed(seed)
    found_CBT = tokens_BT.repeat(copies, 1, 1)
    for b, x_TD in enumerate(x_BTD):
        drawn_CT = torch.cat([
            torch.multinomial(readout(x).softmax(-1).cpu(), copies, True, generator=generator)
            for x in x_TD[:-1].split(256)]).mT
        replace_CT = torch.rand(drawn_CT.shape, generator=generator) < 0.5
        found_CBT[:, b, 1:][replace_CT] = drawn_CT[replace_CT]
    return found_CBT.flatten(0, 1)


def calibration_rows(rows_BT: Tensor) -> Tensor:
    """The rows, cut into equal ones of at most 512 tokens, a refit's step.

    A step is one row at least, and more and smaller steps make a better model, also when it is then
    measured in longer rows, in less time.
    """
    length = rows_BT.shape[1] // math.ceil(rows_BT.shape[1] / _REFIT_TOKENS)
    return rows_BT[:, : rows_BT.shape[1] // length * length].reshape(-1, length)


def _fit(
    weights: Weights, loss: Callable[[Weights, Tensor], Tensor], rate: Callable[[float], float],
    tokens_BT: Tensor, epochs: int, seed: int, bar: str
) -> tuple[dict[str, Tensor], dict[str, float]]:
    """Minimise `loss(weights, rows)` by Adam; returns (weights, {"before", "after"}).

    rate: for `_rates`, as a function of the loss before. The first fortieth of the rows is held out
    and the loss measured there, with the weights rounded to their dtype; if it does not fall, or is
    not finite, the weights stay as they were.
    """
    size = max(1, _REFIT_TOKENS // tokens_BT.shape[1])
    # On the device of the tokens, so that no step of a block's refit waits for it.
    held_out, rows = torch.arange(len(tokens_BT), device=tokens_BT.device).tensor_split(
        [_held_out_rows(len(tokens_BT))])
    generator = torch.Generator().manual_seed(seed)
    orders = (torch.randperm(len(rows), generator=generator) for _ in range(epochs))
    batches = [batch for order in orders for batch in rows[order.to(rows.device)].split(size)]
    new = {name: at_least_float32(w).clone().requires_grad_() for name, w in weights.items()}
    device = next(iter(new.values())).device
    width = max(w.shape[-1] for w in new.values())
    products = torch.autocast(device.type, torch.bfloat16, enabled=_fast_products(device, width))
    # eps: gradients of a relative error can be far smaller than Adam's usual 1e-8.
    adam = torch.optim.Adam([{"params": w, "name": name} for name, w in new.items()],
                            betas=(0.9, 0.95), eps=1e-15, fused=True)

    def held_out_loss(w):
        parts = held_out.split(size)
        return sum(len(part) * loss(w, part).item() for part in parts) / len(held_out)

    before = held_out_loss(weights)
    rates = _rates(weights, rate(before))
    for step, batch in enumerate(progress(batches, bar, inside=bar == "refit")):
        with torch.enable_grad(), products:
            error = loss(new, batch)
        error.backward()
        for group in adam.param_groups:
            group["lr"] = rates[group["name"]] * lr_factor(step, len(batches))
        adam.step()
        adam.zero_grad()
    fitted = _as_dtypes_of(weights, {name: w.detach() for name, w in new.items()})
    after = held_out_loss(fitted)
    if not after < before:
        return dict(weights), {"before": before, "after": before}
    return fitted, {"before": before, "after": after}


def _held_out_rows(n_rows: int) -> int:
    """How many of the first rows a refit is judged by, and never trained on."""
    return math.ceil(n_rows / 40)


def _fast_products(device: torch.device, width: int) -> bool:
    """Whether products of matrices so wide should be in bf16: if the device gains by that."""
    cpu_features: Mapping[str, Any] = getattr(torch.cpu, "get_capabilities", dict)()
    fast = (torch.cuda.is_bf16_supported(including_emulation=False) if device.type == "cuda"
            else cpu_features.get("avx512_bf16") or cpu_features.get("amx_bf16"))
    return width >= 256 and bool(fast)


def _refit_epochs(n_tokens: int) -> int:
    """Passes of a block's refit: 5 over 40,000 tokens, 4 over 65,536, 2 over 262,144, 1 over 2 M.

    In between, steps grow with the square root of the tokens: with much text, less is gained by
    seeing it again.
    """
    return max(1, min(5, round(4 * math.sqrt(65_536 / n_tokens))))


def _rates(weights: Weights, rate: float) -> dict[str, float]:
    """Adam's learning rate for each weight: rate · rms(W) / √columns.

    For an input of ±1 and a row of n entries: a step of Adam changes each by about its rate r. The
    changes have the signs of the input, so they add up, and the output changes by n r. The entries
    themselves have random signs, and add up to about √n rms(W). So the output changes by the same
    share, `rate`, at any width. (Norms and biases, which meet an input only once, are left to move
    1/√n of that; a bias of n entries alike, one of zeros as if they were its matrix's.)
    """
    rms = {name: at_least_float32(w).square().mean().sqrt().item() for name, w in weights.items()}
    return {name: rate * (rms[name] or rms[name.replace("bias", "weight")]) / math.sqrt(w.shape[-1])
            for name, w in weights.items()}


def _as_dtypes_of(like: Weights, weights: Weights) -> dict[str, Tensor]:
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


def _forward(
    block: Block, weights: Weights, x_BTD: Tensor, document_BT: Tensor | None = None
) -> Tensor:
    """The hidden states after a block with these weights, in the dtype of x."""
    weights = _in_dtype_of(x_BTD, weights)
    rope_and_ends = _rope_and_ends(block.config, x_BTD, document_BT)
    return torch.func.functional_call(block, weights, (x_BTD, *rope_and_ends), strict=True)


def _in_dtype_of(x: Tensor, weights: Weights) -> dict[str, Tensor]:
    """The weights in the dtype of x; or as they are under autocast, which casts what it needs."""
    if torch.is_autocast_enabled(x.device.type):
        return dict(weights)
    return {name: w.to(x.dtype) for name, w in weights.items()}


def _forward_products(x: Tensor) -> torch.dtype:
    """In what a forward of such hidden states makes its products: on a GPU, of float32 ones, bf16.

    There that is ten times faster. What is added up, hidden states and Gram matrices, stays in
    float32 or better.
    """
    fast = x.is_cuda and x.dtype == torch.float32 and _fast_products(x.device, x.shape[-1])
    return torch.bfloat16 if fast else x.dtype


def _forward_autocast(x: Tensor) -> torch.autocast:
    """Autocast to `_forward_products`."""
    dtype = _forward_products(x)
    return torch.autocast(x.device.type, torch.bfloat16, enabled=dtype != x.dtype)


def _run_block_(
    config: LlamaConfig, weights: Weights, x_BTD: Tensor, document_BT: Tensor | None = None
) -> None:
    """Overwrite the hidden states by those after the block, a few rows at a time."""
    block, size = _empty_block(config), max(1, 4096 // x_BTD.shape[1])
    with _forward_autocast(x_BTD):
        weights = _in_dtype_of(x_BTD, weights)  # once for all rows, where it casts
        places = range(0, len(x_BTD), size)
        for at in progress(places, "forward", inside=True):
            rows = slice(at, at + size)
            document = None if document_BT is None else document_BT[rows]
            x_BTD[rows] = _forward(block, weights, x_BTD[rows], document)


def embed(weights: Weights, tokens_BT: Tensor, device, dtype: torch.dtype) -> Tensor:
    """The hidden states (B, T, D) that enter the first block."""
    table_VD = weights["model.embed_tokens.weight"]
    return F.embedding(tokens_BT.to(table_VD.device), table_VD).to(device=device, dtype=dtype)


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
def convert(
    model_dir: PathLike, out_dir: PathLike, kv_heads: int,
    corpus: "Corpus | PathLike | Sequence[PathLike]", method: Method = Method(),
    device: str = "auto", dtype: torch.dtype = torch.float32, dry_run: bool = False,
    log: Callable[[str], None] = lambda line: None
) -> dict[str, Any]:
    """Convert a checkpoint directory to `kv_heads` KV heads; returns the report.

    corpus: a `Corpus`, or just its files. dtype: of hidden states and products, but on a GPU those
    of float32 are made in bf16; the output keeps the source's.
    `log` is called with what will be done, in words; `dry_run` ends there, after all
    checks. Memory holds one block and the tokens' hidden states, however deep the model; in the
    joint refit some 20 bytes for each weight of attention, too.

    `out_dir` becomes a Hugging Face directory with `mha2gqa.json`, the report: losses in
    nats/token, sizes in bytes, times in seconds. It is there whole or not at all. Raises
    ValueError for bad input, as early as possible; OSError if writing fails.
    """
    corpus = corpus if isinstance(corpus, Corpus) else Corpus(corpus)
    place = _pick_device(device)
    for file in map(Path, [*_paths(corpus.files), *_paths(corpus.eval_files)]):
        if not file.exists():
            raise ValueError(f"{file}: no such file")
    _check_new_directory(out_dir, 0)
    if (folder := model_folder(model_dir, weights=False)) != Path(model_dir):
        gqa_config(load_config(folder), kv_heads)  # before much is downloaded
    model_dir = model_folder(model_dir)
    config, weights = load_checkpoint(model_dir)
    like = torch.empty(config.hidden_size, device=place, dtype=dtype)
    new_config = gqa_config(config, kv_heads)
    size = _converted_bytes(config, weights, kv_heads)
    _check_new_directory(out_dir, _disk_bytes(size))
    rows, held_out = text_rows(model_dir, config, corpus, method.seed)
    rows = calibration_rows(rows)
    check_calibration_rows(rows, method)
    copies, copied = _resampled_copies(config, rows, method)
    n_refit = rows.numel() + copies * rows[copied:].numel()
    report: dict[str, Any] = provenance() | {
        "source": str(Path(model_dir).resolve()),
        "text": {"calibration": _paths(corpus.files),
                 "held_out": _paths(corpus.eval_files) or _paths(corpus.files)},
        "method": dataclasses.asdict(method),
        "forward": {"device": str(place)} | {name: str(of).removeprefix("torch.") for name, of in (
            ("dtype", dtype), ("products", _forward_products(like)))},
        "num_hidden_layers": config.num_hidden_layers,
        "kv_heads": {"source": config.num_key_value_heads, "converted": kv_heads},
        "kv_cache_bytes_per_token": {"source": kv_cache_bytes(config, weights),
                                     "converted": kv_cache_bytes(new_config, weights)},
        "tokens": {"calibration": rows.numel(), "refit": n_refit,
                   "calibration_seq_len": rows.shape[1],
                   "held_out": held_out.numel(), "seq_len": held_out.shape[1]},
        "memory_estimate_bytes": _memory_needed(
            config, n_refit, rows.shape[1], held_out.numel(), dtype, method),
        "disk_bytes": _disk_bytes(size),
    }
    log(_plan(report))
    _warn_of_memory(report["memory_estimate_bytes"], place, method)
    if dry_run:
        return report
    with new_checkpoint(out_dir, new_config, size, tokenizer_from=model_dir) as writer:
        report |= _convert_and_measure(
            writer.write, config, new_config, weights, rows, held_out, method, like,
            Meter(place))
        write_json(writer.folder / "mha2gqa.json", report)
        write_model_card(writer.folder, Path(model_dir), report["kv_cache_bytes_per_token"], {
            name: {"loss": loss, "KL": report["kl_nats_per_token"][name]} for name, loss in
            without_repeats(report["loss_nats_per_token"], report["method"]).items()}, _how(report))
    return report


def _resampled_copies(config: LlamaConfig, rows_BT: Tensor, method: Method) -> tuple[int, int]:
    """(How many times the rows are resampled for a refit, the first row that is.)

    To some 100 tokens for each unit of width, eightfold at most: attention has some 4 D² weights a
    block, and a token tells D numbers. None of the rows that a refit is judged by is copied: their
    copies would be trained on.
    """
    if not (method.refit or method.joint):
        return 0, 0
    copies = min(math.ceil(100 * config.hidden_size / rows_BT.numel()) - 1, 7)
    return copies, _held_out_rows((copies + 1) * len(rows_BT))


def _with_resampled_rows(
    config: LlamaConfig, weights: Weights, tokens_BT: Tensor, method: Method, device
) -> Tensor:
    """The rows and, behind them, their resampled copies."""
    copies, first = _resampled_copies(config, tokens_BT, method)
    if not copies:
        return tokens_BT
    return torch.cat([tokens_BT, resampled_rows(
        config, weights, tokens_BT[first:], copies, method.seed, device)])


def _convert_and_measure(
    write: Callable[[Weights], None], config: LlamaConfig, new_config: LlamaConfig,
    weights: Weights, tokens_BT: Tensor, held_out_BT: Tensor, method: Method, like: Tensor,
    meter: "Meter"
) -> dict[str, Any]:
    """Convert all blocks and write them, shard by shard; returns what was measured on the way.

    tokens: the calibration rows. like: on the device and of the dtype to compute with. In the
    report are losses, KL, seconds, memory, and what each block and the joint refit say of
    themselves.
    """
    kv_heads = new_config.num_key_value_heads
    non_block = non_block_weights(weights)
    _check_finite(non_block)
    rows_BT = _with_resampled_rows(config, weights, tokens_BT, method, like.device)
    if len(rows_BT) > len(tokens_BT):
        meter.lap("resample")
    x_BTD = embed(weights, rows_BT, like.device, like.dtype)
    blocks: Iterable[ConvertedBlock] = progress(converted_blocks(
        config, weights, x_BTD, kv_heads, method, lap=meter.lap),
        "convert", config.num_hidden_layers)
    found = {}
    if method.joint:
        blocks, found["joint_kl"] = joint_refit(
            config, weights, blocks, rows_BT, x_BTD, kv_heads, method.seed)
        blocks = progress(blocks, "write", config.num_hidden_layers)
        meter.lap("joint refit")
    scores, reports = _write_and_score(
        write, config, new_config, weights, blocks, held_out_BT, like, meter)
    write(non_block)
    meter.lap("write")
    means = {name: _mean([report[name] for report in reports])
             for name in reports[0] if name not in ("groups", "pairs")}
    return {**scores, **means, **found,
            "seconds": {**meter.seconds, "total": sum(meter.seconds.values())},
            "peak_memory_bytes": meter.peak_memory, "layers": reports}


def _write_and_score(
    write: Callable[[Weights], None], config: LlamaConfig, new_config: LlamaConfig,
    weights: Weights, blocks: Iterable[ConvertedBlock], held_out_BT: Tensor, like: Tensor,
    meter: "Meter"
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Write the blocks, and run the held-out tokens through three models at once.

    Returns loss and KL of the source, of its mean-pooled and of its converted model; and each
    block's report with "hidden_state_error", that of the written model on the held-out rows.
    """
    reports = []
    source_x = embed(weights, held_out_BT, like.device, like.dtype)
    pooled_x, converted_x = source_x.clone(), source_x.clone()
    for i, block in enumerate(blocks):
        _check_finite(block.converted, f"converted {block_prefix(i)}")
        pooled = _as_dtypes_of(
            block.source, merge(block.source, config, new_config.num_key_value_heads))
        _run_block_(config, block.source, source_x)
        _run_block_(new_config, pooled, pooled_x)
        _run_block_(new_config, block.converted, converted_x)
        rows = zip(converted_x, source_x, strict=True)
        error = sum(_hidden_state_error(*row).item() for row in rows) / len(source_x)
        meter.lap("evaluate")
        write({block_prefix(i) + n: w for n, w in block.converted.items()})
        meter.lap("write")
        reports.append({**block.report, "hidden_state_error": error})
    streams = {"source": source_x, "mean_pooled": pooled_x, "converted": converted_x}
    loss, kl = _mean_scores(config, weights, streams, held_out_BT)
    meter.lap("evaluate")
    return {"loss_nats_per_token": loss, "kl_nats_per_token": kl}, reports


@torch.no_grad()
def evaluate(
    model_dir: PathLike, corpus: "Corpus | PathLike | Sequence[PathLike]", seed: int = 0,
    device: str = "auto", dtype: torch.dtype = torch.float32
) -> dict[str, Any]:
    """Held-out loss of a model directory, in nats/token, with the same protocol as `convert`.

    With the same corpus and seed the held-out rows are the same. Raises ValueError for bad input.
    """
    corpus = corpus if isinstance(corpus, Corpus) else Corpus(corpus)
    place = _pick_device(device)
    model_dir = model_folder(model_dir)
    config, weights = load_checkpoint(model_dir)
    _, held_out = text_rows(model_dir, config, corpus, seed)
    _check_finite(non_block_weights(weights))
    x_BTD = embed(weights, held_out, place, dtype)
    for i in progress(range(config.num_hidden_layers), "evaluate"):
        _run_block_(config, read_block(weights, i, place), x_BTD)
    loss, _ = _mean_scores(config, weights, {"source": x_BTD}, held_out)
    return {"loss_nats_per_token": loss["source"], "held_out_tokens": held_out.numel()}


def _mean_scores(
    config: LlamaConfig, weights: Weights, streams: Mapping[str, Tensor], tokens_BT: Tensor
) -> tuple[dict[str, float], dict[str, float]]:
    """Loss of each stream, and KL(source ‖ it), in nats/token over the T − 1 predictions of a row.

    streams: hidden states (B, T, D) after the last block; one of them is "source". Raises
    ValueError for logits that are not finite.
    """
    readout = _readout(config, weights, streams["source"])
    loss, kl = dict.fromkeys(streams, 0.0), dict.fromkeys(streams, 0.0)
    n_rows, n_predictions = len(tokens_BT), tokens_BT.shape[1] - 1
    for row, tokens_T in enumerate(tokens_BT.to(streams["source"].device)):
        for at in range(0, n_predictions, 256):
            here = slice(at, min(at + 256, n_predictions))
            logits = {name: at_least_float32(readout(x[row, here])) for name, x in streams.items()}
            for name, x_TV in logits.items():
                loss[name] += F.cross_entropy(x_TV, tokens_T[1:][here], reduction="sum").item()
                kl[name] += kl_loss(x_TV, logits["source"]).sum().item()
    for name in streams:
        if not math.isfinite(loss[name]):
            raise ValueError(f"the {name.replace('_', '-')} model's logits are not finite")
    n = n_rows * n_predictions
    return {k: v / n for k, v in loss.items()}, {k: v / n for k, v in kl.items()}


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
    "llama": {},
    "mistral": {"num_key_value_heads": 8, "max_position_embeddings": 131_072},
    "qwen2": {"num_key_value_heads": 32, "max_position_embeddings": 32_768},
    "qwen3": {"num_key_value_heads": 32, "head_dim": 128, "max_position_embeddings": 32_768},
}
# What models would need that are often asked for.
_NEEDS = {
    "smollm3": "layers without RoPE", "phi3": "fused qkv_proj and gate_up_proj",
    "olmo": "norms without weights",
    "olmo2": "norms behind attention and MLP, and of all queries or keys together",
    "olmo3": "norms behind attention and MLP, and of all queries or keys together; windows",
    "gemma": "norms of 1 + weight, scaled embeddings, GELU",
    "gemma2": "soft caps of logits and scores, windows, norms of 1 + weight",
    "gemma3_text": "windows, norms of 1 + weight",
    "granite": "factors on embeddings, scores, residuals and logits",
    "cohere": "attention beside the MLP, RoPE of neighbouring dimensions",
    "llama4_text": "experts, layers without RoPE, attention in chunks",
    "mixtral": "experts", "qwen2_moe": "experts", "qwen3_moe": "experts",
    "deepseek_v2": "latent attention, experts", "deepseek_v3": "latent attention, experts",
    "gpt2": "learned positions, LayerNorm", "gpt_neox": "LayerNorm, partial RoPE, fused qkv",
    "qwen3_next": "linear attention, experts",
}
_ROPE_FIELDS: dict[str, tuple[str, ...]] = {
    "default": (),
    "linear": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
}


def _rope_parameters(raw: Mapping[str, Any]) -> dict[str, Any]:
    """Old files have rope_theta at the top and the rest in rope_scaling, new ones all of it in
    rope_parameters; as in transformers rope_scaling wins, and so does a nested rope_theta. But of
    llama3's original_max_position_embeddings the one at the top does, and without any it is
    max_position_embeddings."""
    rope = raw.get("rope_scaling") or raw.get("rope_parameters") or {}
    if not isinstance(rope, Mapping):
        raise ValueError(f"rope_scaling is {rope!r:.40}, expected an object or null")
    rope = {"rope_type": rope.get("type", "default"), **rope}
    if rope["rope_type"] == "llama3":
        name = "original_max_position_embeddings"
        found = raw.get(name), rope.get(name), raw.get("max_position_embeddings")
        rope[name] = next((n for n in found if n is not None), None)
    return rope


def _refuse_unsupported(raw: Mapping[str, Any]) -> None:
    """Raise ValueError that names the first thing that this file's model does not compute."""
    kind, rope = raw.get("model_type"), _rope_parameters(raw)
    # subtle: a mistral config without the key has a window of 4096 in transformers.
    window = {"mistral": raw.get("sliding_window", 4096) is not None,
              "qwen2": bool(raw.get("use_sliding_window")),
              "qwen3": bool(raw.get("use_sliding_window"))}.get(str(kind), False)
    layer_types = raw.get("layer_types") or []
    needs = f", which has {_NEEDS[str(kind)]}" if str(kind) in _NEEDS else ""
    partial = rope.get("partial_rotary_factor") or raw.get("partial_rotary_factor") or 1
    unsupported = {
        f"model_type {kind!r}{needs} (supported: {', '.join(_MODEL_TYPES)})":
            kind not in _MODEL_TYPES,
        f"hidden_act {raw.get('hidden_act')!r} (supported: silu)":
            raw.get("hidden_act", "silu") not in ("silu", "swish"),
        "quantised weights (quantization_config)": bool(raw.get("quantization_config")),
        "partial rotary embedding": partial != 1,
        "sliding window (a mistral model without one has sliding_window null)":
            window or any(t != "full_attention" for t in layer_types),
        f"rope type {rope['rope_type']!r} (supported: {', '.join(_ROPE_FIELDS)})":
            rope["rope_type"] not in _ROPE_FIELDS,
    }
    for name, found in unsupported.items():
        if found:
            raise ValueError(f"not supported: {name}")


_HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")


def model_folder(model: PathLike, weights: bool = True) -> Path:
    """The directory of a model: itself, or what the Hugging Face hub has under that name.

    What is on this machine wins. `weights` False: config.json alone. Raises ValueError if the hub
    cannot be asked, or has no such model.
    """
    path = Path(model)
    if path.exists() or path.parent.is_dir() or not _HUB_NAME.fullmatch(str(model)):
        return path
    from huggingface_hub import snapshot_download

    files = ["*.json", "tokenizer*", "*.model", "model*.safetensors", "README.md", "LICENSE*",
             "NOTICE*", "chat_template*"] if weights else ["config.json"]
    try:
        folder = Path(snapshot_download(str(model), allow_patterns=files))
        if weights and not list(folder.glob("model*.safetensors")):
            snapshot_download(str(model), allow_patterns=["pytorch_model*.bin"])
    except Exception as error:  # of several packages
        kind = type(error).__name__
        reason = {"LocalEntryNotFoundError": "it cannot be reached, and nothing was kept of before",
                  "RepositoryNotFoundError": "it has none of that name, or it wants a login",
                  "GatedRepoError": "it wants a login, hf auth login, and your consent"}.get(
            kind, textwrap.shorten(f"{kind}: " + str(error).strip().split("\n")[0], 80))
        raise ValueError(f"{model}: no such directory, and the hub does not give it ({reason})"
                         ) from None
    return folder


def load_checkpoint(path: PathLike) -> tuple[LlamaConfig, dict[str, Tensor]]:
    """Read a Hugging Face model directory: `(config, weights)`, weights by parameter name.

    The tensors are mapped from their files: a page is read when it is first used, and costs no
    anonymous memory. Names and shapes are those of `Llama(config)`: prefixes that wrappers left are
    stripped, left-over tables of `rotary_emb` and a stored copy of tied embeddings are dropped.
    Raises ValueError, with the file and what to do, for anything that is not such a checkpoint.
    """
    folder = Path(path)
    files = _weight_files(folder)
    config = load_config(folder)
    weights: dict[str, Tensor] = {}
    for file in files:
        found = _read_tensors(file)
        for name in weights.keys() & found.keys():
            if not torch.equal(weights[name], found[name]):
                raise ValueError(f"{folder}: {name} is in {file.name} and, with other values, in a "
                                 "file before it; leave one set of weights there")
        weights |= found
    try:
        weights = _drop_leftovers(config, _plain_names(weights))
        _check_weights(config, weights)
    except ValueError as error:
        raise ValueError(f"{folder}: {error}") from None
    return config, weights


def load_config(path: PathLike) -> LlamaConfig:
    """The config of a model directory; raises ValueError that names what is not supported."""
    file = Path(path) / "config.json"
    raw = read_json(file)
    try:
        return _parse_config(raw)
    except (ValueError, TypeError, AttributeError) as error:  # the last two: of values' types
        raise ValueError(f"{file}: {error}") from None


def _parse_config(raw: Mapping[str, Any]) -> LlamaConfig:
    """The config of a parsed config.json; raises ValueError that names what is not supported."""
    if raw.get("model_type") == "Yi":
        raw = {**raw, "model_type": "llama"}
    _refuse_unsupported(raw)
    rope = _rope_parameters(raw)
    kind = rope["rope_type"]
    types = {f.name: f.type for f in dataclasses.fields(LlamaConfig)}
    fields: dict[str, Any] = {
        name: value for name, value in _MODEL_TYPES[raw["model_type"]].items() if name not in raw}
    fields |= {name: raw[name] for name in types if name != "raw" and raw.get(name) is not None}
    if fields.get("hidden_act") == "swish":  # one function under two names
        fields["hidden_act"] = "silu"
    thetas = (rope.get("rope_theta"), raw.get("rope_theta"), LlamaConfig.rope_theta)
    fields["rope_theta"] = next(theta for theta in thetas if theta is not None)
    fields["rope_scaling"] = None if kind == "default" else rope
    numbers = fields | {name: rope.get(name) for name in _ROPE_FIELDS[kind]}
    needed = [f.name for f in dataclasses.fields(LlamaConfig) if not f.kw_only]
    absent = [name for name in [*needed, *_ROPE_FIELDS[kind]] if numbers.get(name) is None]
    if absent:
        raise ValueError(f"no {', '.join(absent)}")
    for name, value in numbers.items():
        wanted = types.get(name, float)
        most = 2**28 if wanted is int else 1e30  # products of two are sizes of tensors
        if wanted in (int, float) and not (type(value) in (int, wanted) and 0 < value < most):
            raise ValueError(f"{name} is {value!r:.40}, expected a positive number below {most}")
    config = LlamaConfig(**fields, raw=raw)
    for token in config.eos_ids:
        if type(token) is not int or not 0 <= token < config.vocab_size:
            raise ValueError(f"eos_token_id is {token!r}, expected one of the vocabulary's 0 to "
                             f"{config.vocab_size - 1}, or null")
    return config


def _config_json(config: LlamaConfig) -> dict[str, Any]:
    """The content of config.json: what was read, with only num_key_value_heads changed.

    RoPE's parameters are written in transformers' old spelling, too, if they have only the new one.
    What names code of the source's own goes: the result is a model that every engine knows.
    """
    architectures = [f"{config.model_type.capitalize()}ForCausalLM"]
    if config.raw:
        kept = {name: value for name, value in config.raw.items() if name != "auto_map"}
        if "rope_parameters" in kept:  # readers that know only the old spelling would be wrong
            old = {"rope_theta": config.rope_theta, "rope_scaling": config.rope_scaling}
            kept |= {name: value for name, value in old.items() if kept.get(name) is None}
        return {**kept, "architectures": architectures,
                "num_key_value_heads": config.num_key_value_heads}
    fields = {f.name: getattr(config, f.name) for f in dataclasses.fields(config)}
    del fields["raw"]
    if config.model_type == "mistral":
        fields["sliding_window"] = None
    return {"architectures": architectures, **fields}


def read_json(file: Path) -> dict[str, Any]:
    """The object in a JSON file; raises ValueError with the file's name if there is none."""
    if not file.is_file():
        raise ValueError(f"{file}: no such file")
    refuse_pointer(file)
    try:
        value = json.loads(file.read_text(encoding="utf-8-sig"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{file}: not JSON ({error})") from None
    if not isinstance(value, dict):
        raise ValueError(f"{file}: expected a JSON object")
    return value


@contextlib.contextmanager
def writing(file: Path) -> Iterator[None]:
    """In the with block an error of writing the file is made an OSError that names it."""
    from safetensors import SafetensorError

    try:
        yield
    except (OSError, RuntimeError, SafetensorError) as error:  # of Python, torch and safetensors
        reason = getattr(error, "strerror", None) or str(error).split("\n")[0]
        raise OSError(f"{file}: cannot be written ({reason})") from None


def write_json(file: Path, value) -> None:
    """Write a value as an indented JSON file."""
    with writing(file):
        file.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def rename_when_on_disk(new: Path, path: Path) -> None:
    """Give a file or a directory that is finished its name, once the system has written all of it.

    Otherwise a machine that dies could leave the name, and nothing or a part behind it.
    """
    for entry in (*(new.rglob("*") if new.is_dir() else ()), new):
        _flush(entry)
    new.replace(path)
    _flush(path.parent)


def _flush(path: Path) -> None:
    """Wait until a file or the names in a directory are on the disk."""
    flags = getattr(os, "O_DIRECTORY", None) if path.is_dir() else os.O_RDWR
    if flags is None:  # a system that cannot open directories
        return
    opened = os.open(path, flags)
    try:
        # Some network disks cannot do it for a directory.
        with contextlib.suppress(*[OSError] * path.is_dir()):
            os.fsync(opened)
    finally:
        os.close(opened)


def refuse_pointer(file: Path) -> None:
    """Raise ValueError if Git LFS has left a few lines about the file in the file's place."""
    with open(file, "rb") as opened:
        if opened.read(64).startswith(b"version https://git-lfs.github.com/spec/"):
            raise ValueError(f"{file}: only a Git LFS pointer to the file; run `git lfs pull` in "
                             "that repository, or `hf download` it")


# Folders of other kinds, by a file that is in them: (pattern, what it is and what to do).
_OTHER_FOLDERS = (
    ("adapter_config.json", "a PEFT adapter's; load it with PEFT, merge_and_unload() and "
     "save_pretrained(DIR) what comes out"),
    ("*.gguf", "a GGUF file; transformers reads it by from_pretrained(DIR, gguf_file=...), and "
     "save_pretrained writes a directory of it"),
    ("consolidated*", "in Meta's own format; transformers' convert_llama_weights_to_hf.py makes a "
     "directory of it"),
    ("snapshots/*", "a model in a hub cache; MODEL is that folder"),
    ("models--*/snapshots/*", "a model in this hub cache; MODEL is that folder"),
    ("*/config.json", "a model's; MODEL is the folder that has it"),
    ("*.distcp", "a part of a training's checkpoint; its result is in another folder"),
)


def _weight_files(folder: Path) -> list[Path]:
    """The checkpoint's weight files, in the order in which transformers looks for them.

    Raises ValueError that says what is there instead.
    """
    if not folder.is_dir():
        if folder.is_file():
            raise ValueError(f"{folder}: is a file; MODEL is the directory with config.json, the "
                             "weights and the tokenizer")
        raise ValueError(f"{folder}: no such directory (MODEL is one, or OWNER/NAME on the hub)")
    for name in ("model.safetensors", "pytorch_model.bin"):
        if (folder / name).is_file():  # subtle: an index beside it is of older weights
            return [folder / name]
        index = folder / f"{name}.index.json"
        if index.is_file():
            weight_map = read_json(index).get("weight_map")
            if not isinstance(weight_map, dict) or not weight_map:
                raise ValueError(f"{index}: has no weight_map")
            names = set(map(str, weight_map.values()))
            # By name, not by resolved path: a hub cache is full of honest symbolic links.
            for outside in (n for n in names if Path(n).name != n):
                raise ValueError(f"{index}: {outside!r} is outside the directory")
            return [folder / n for n in sorted(names)]
    for pattern in ("model*.safetensors", "pytorch_model*.bin"):
        if files := sorted(folder.glob(pattern)):
            return files
    for pattern, what in _OTHER_FOLDERS:
        for found in sorted(folder.glob(pattern))[:1]:
            raise ValueError(f"{folder}: holds {found.relative_to(folder)}, which is {what}")
    raise ValueError(f"{folder}: no model*.safetensors and no pytorch_model*.bin")


def model_files(folder: PathLike) -> list[Path]:
    """The files that `load_checkpoint` and `load_tokenizer` read in a model directory."""
    folder = Path(folder)
    names = ("config.json", "model.safetensors.index.json", "pytorch_model.bin.index.json",
             "tokenizer.json", "tokenizer.model", *_TOKENIZER_SETTINGS)
    return [*_weight_files(folder), *(folder / n for n in names if (folder / n).is_file())]


def _read_tensors(file: Path) -> dict[str, Tensor]:
    """All tensors of one weight file, mapped and not read."""
    from safetensors.torch import load_file

    if not os.access(file, os.R_OK):
        raise ValueError(f"{file}: missing or not readable; download it again")
    refuse_pointer(file)
    try:
        if file.suffix == ".safetensors":
            return load_file(file)
        mapped = zipfile.is_zipfile(file)  # older files, which are no archives, are read whole
        tensors = torch.load(file, map_location="cpu", weights_only=True, mmap=mapped)
    except Exception as error:  # a broken file can make torch.load raise almost anything
        if found := re.search(r"Unsupported (?:global: GLOBAL|class) (\S+)", str(error)):
            raise ValueError(f"{file}: holds Python objects ({found[1]}), not tensors alone; save "
                             "the model's state dict by itself where it can be loaded") from None
        reason = re.split(r"[.\n]", str(error).strip())[0] or type(error).__name__
        raise ValueError(f"{file}: truncated, corrupt or not a plain file of tensors ({reason}); "
                         "download it again, as safetensors if there are") from None
    if not isinstance(tensors, Mapping):
        raise ValueError(f"{file}: holds a {type(tensors).__name__}, expected a state dict")
    def is_inside(item):  # of a training's file the model's dict tells more than what is beside it
        return isinstance(item[1], Mapping) and any(
            isinstance(value, Tensor) for value in item[1].values())

    for name, value in sorted(tensors.items(), key=is_inside, reverse=True):
        if isinstance(value, Tensor) and (value.is_meta or value.layout != torch.strided):
            raise ValueError(f"{file}: {name} is a sparse tensor, or one without values; save "
                             "plain ones")
        if not isinstance(name, str) or not isinstance(value, Tensor):
            raise ValueError(f"{file}: holds a {type(value).__name__} under {name!r}, expected "
                             "tensors alone; if that is the model's state dict, save it by itself")
    return dict(tensors)


def _plain_names(weights: Weights) -> dict[str, Tensor]:
    """The weights by the model's own names, without what wrappers have put around these.

    torch.compile, FSDP and activation checkpointing put theirs inside a name; DDP, PEFT and other
    models in front; a model that was saved without its head lacks "model.".
    """
    inside = re.compile(r"(_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\.")
    found = {name: inside.sub("", name) for name in weights}
    first = (name.partition("layers.0.") for name in found.values())
    decoder = next((before for before, layer, _ in first if layer), "model.")

    def own_name(name: str) -> str:
        if name.startswith(decoder) and "lm_head." not in name:
            return "model." + name.removeprefix(decoder)
        return name.removeprefix(decoder.removesuffix("model."))

    plain = {own_name(name): weights[stored] for stored, name in found.items()}
    for name in plain:
        if re.search(r"\.(lora_|base_layer\.|modules_to_save\.)", name):
            raise ValueError(f"tensor {name} is of a PEFT adapter, such as LoRA; merge it into its "
                             "model (merge_and_unload()) and save that")
    if len(plain) < len(weights):
        raise ValueError("two tensors have one name, but for prefixes such as module.")
    return plain


def _drop_leftovers(config: LlamaConfig, weights: Weights) -> dict[str, Tensor]:
    """The weights without what old files carry along; one name for tied embeddings."""
    weights = {n: w for n, w in weights.items() if ".rotary_emb." not in n}
    if config.tie_word_embeddings and "lm_head.weight" in weights:
        # A file may hold both of the tied tensors, or only one of them, under either name.
        head = weights.pop("lm_head.weight")
        embedding = weights.setdefault("model.embed_tokens.weight", head)
        if embedding.dtype != head.dtype or not torch.equal(embedding, head):
            raise ValueError(
                "tie_word_embeddings is true, but lm_head.weight differs from "
                "model.embed_tokens.weight; set it to false, or remove lm_head.weight"
            )
    # A .bin file can hold two names of one tensor; in a safetensors file each has bytes of its own.
    owners = {w.data_ptr(): n for n, w in weights.items()}
    return {n: w if owners[w.data_ptr()] == n else w.clone() for n, w in weights.items()}


def _check_weights(config: LlamaConfig, weights: Weights) -> None:
    """Raise ValueError unless the names, shapes and dtypes are those of `Llama(config)`."""
    layers = {name.split(".")[2] for name in weights if name.startswith("model.layers.")}
    if len(layers) != config.num_hidden_layers:
        raise ValueError(f"{len(layers)} layers among the weights, but num_hidden_layers is "
                         f"{config.num_hidden_layers} in config.json")
    with torch.device("meta"):
        expected = {name: p.shape for name, p in Llama(config).named_parameters()}
    unknown, missing = weights.keys() - expected.keys(), expected.keys() - weights.keys()
    if missing == {"lm_head.weight"}:
        raise ValueError("missing tensor lm_head.weight, but tie_word_embeddings is not true in "
                         "config.json; set it if the model reads its embedding as its head")
    for what, names in (("unknown tensor", unknown), ("missing tensor", missing)):
        if names:
            more = f" and {len(names) - 1} more" if len(names) > 1 else ""
            raise ValueError(f"{what} {min(names)}{more}; is config.json this checkpoint's?")
    for name, shape in expected.items():
        if not weights[name].dtype.is_floating_point or weights[name].element_size() == 1:
            raise ValueError(f"tensor {name} is {weights[name].dtype}, expected float16, bfloat16 "
                             "or float32")
        if weights[name].shape != shape:
            raise ValueError(f"tensor {name} has shape {list(weights[name].shape)}, expected "
                             f"{list(shape)} from config.json")


def _n_bytes(tensors: Iterable[Tensor]) -> int:
    """Bytes of some tensors together."""
    return sum(t.numel() * t.element_size() for t in tensors)


def save_checkpoint(
    path: PathLike, config: LlamaConfig, weights: Weights, tokenizer_from: PathLike | None = None
) -> None:
    """Write a Hugging Face directory, as `new_checkpoint` does, of weights that are in memory."""
    _check_weights(config, weights)
    size = _n_bytes(weights.values())
    with new_checkpoint(path, config, size, tokenizer_from) as writer:
        for i in range(config.num_hidden_layers):
            prefix = block_prefix(i)
            writer.write({n: w for n, w in weights.items() if n.startswith(prefix)})
        writer.write(non_block_weights(weights))


_SHARD_BYTES = 5 * 10**9  # at most, of a shard that holds more than one block


@dataclasses.dataclass
class CheckpointWriter:
    """A checkpoint directory that is being written, see `new_checkpoint`."""

    folder: Path
    parts: list[Path] = dataclasses.field(default_factory=list)

    def write(self, weights: Weights) -> None:
        """Write some of the weights: a block, or what is outside of the blocks."""
        self.parts.append(self.folder / f"part-{len(self.parts) + 1:05d}.safetensors")
        _save_tensors(self.parts[-1], {n: w.contiguous().cpu() for n, w in weights.items()})

    def finish(self) -> None:
        """Make of the parts as few shards as hold `_SHARD_BYTES` each, and their index."""
        shards: list[list[Path]] = []
        room = 0
        for part in self.parts:
            room -= part.stat().st_size
            if room < 0:
                shards.append([])
                room = _SHARD_BYTES - part.stat().st_size
            shards[-1].append(part)
        weight_map: dict[str, str] = {}
        size = 0
        for i, shard in enumerate(progress(shards, "write shards", delay=2), 1):
            name = f"model-{i:05d}-of-{len(shards):05d}.safetensors"
            name = "model.safetensors" if len(shards) == 1 else name
            tensors = {n: w for part in shard for n, w in _read_tensors(part).items()}  # mapped
            weight_map |= dict.fromkeys(tensors, name)
            size += _n_bytes(tensors.values())
            if len(shard) == 1:
                shard[0].rename(self.folder / name)
            else:
                _save_tensors(self.folder / name, tensors)
                del tensors  # some systems do not remove a file that is mapped
                for part in shard:
                    part.unlink()
        if len(shards) > 1:
            write_json(self.folder / "model.safetensors.index.json", {
                "metadata": {"total_size": size}, "weight_map": weight_map})


def _save_tensors(file: Path, tensors: Weights) -> None:
    """Write a safetensors file."""
    from safetensors.torch import save_file

    with writing(file):
        save_file(dict(tensors), file, {"format": "pt"})


def _disk_bytes(size: int) -> int:
    """Bytes of disk for a checkpoint of so many: a shard and its parts are there at once."""
    return size + min(size, _SHARD_BYTES)


@contextlib.contextmanager
def new_checkpoint(
    path: PathLike, config: LlamaConfig, size: int, tokenizer_from: PathLike | None = None
) -> Iterator[CheckpointWriter]:
    """A Hugging Face directory to write block by block; it is there whole or not at all.

    `writer.write` in the with block writes some of its weights, `size` bytes in all. At its end
    they are put into shards, and come with index and config.json, and the tokenizer and generation
    files of the directory `tokenizer_from`; then the directory gets its name. Raises ValueError if
    `path` exists and is not empty or the disk has not enough bytes free, OSError if writing fails.
    """
    with _new_directory(path, _disk_bytes(size)) as folder:
        writer = CheckpointWriter(folder)
        yield writer
        writer.finish()
        write_json(folder / "config.json", _config_json(config))
        for file in folder.glob("*.safetensors"):  # safetensors lets only their owner read them
            shutil.copymode(folder / "config.json", file)
        for file in _tokenizer_files(Path(tokenizer_from)) if tokenizer_from else ():
            copied = folder / file.relative_to(cast(PathLike, tokenizer_from))
            copied.parent.mkdir(exist_ok=True)
            with writing(copied):
                shutil.copyfile(file, copied)


def _tokenizer_files(folder: Path) -> list[Path]:
    """The files of a model directory that its tokenizer and its users need beside the weights.

    A tokenizer with code of its own (auto_map) may need any module there, and any file that
    is named in one.
    """
    patterns = ["tokenizer*", "special_tokens_map.json", "added_tokens.json", "vocab.json",
                "vocab.txt", "merges.txt", "*.model", "*.tiktoken", "tekken.json", "chat_template*",
                "additional_chat_templates/*", "generation_config.json", "LICENSE*", "NOTICE*"]
    settings = folder / "tokenizer_config.json"
    if settings.is_file() and "auto_map" in read_json(settings):
        code = "".join(file.read_text(errors="replace") for file in folder.glob("*.py"))
        own = re.compile(r"config\.json|.*\.(safetensors|index\.json|bin|pth?|h5|msgpack|gguf)")
        patterns += ["*.py", *(glob.escape(file.name) for file in folder.iterdir()
                               if file.name in code and not own.fullmatch(file.name))]
    return sorted({file for pattern in patterns for file in folder.glob(pattern) if file.is_file()})


def _check_new_directory(path: PathLike, size: int) -> Path:
    """`path` without links; ValueError unless a directory of `size` bytes can be made there."""
    path = Path(os.path.realpath(path))
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise ValueError(f"{path}: exists and is not an empty directory; choose another one")
    if path.is_mount() or path == Path.cwd():
        raise ValueError(f"{path}: cannot be replaced; choose a new directory inside of it")
    if not path.parent.is_dir() or not os.access(path.parent, os.W_OK):
        raise ValueError(f"{path.parent}: no such directory, or no permission to write into it")
    free = shutil.disk_usage(path.parent).free
    if free < size:
        raise ValueError(f"{path.parent}: {size:,} bytes are needed, {free:,} are free on the disk")
    return path


@contextlib.contextmanager
def _new_directory(path: PathLike, size: int = 0) -> Iterator[Path]:
    """A directory to write into: it becomes `path` if the with block ends well, or else vanishes.

    Raises ValueError as `_check_new_directory` says.
    """
    path = _check_new_directory(path, size)
    prefix = f".mha2gqa-{path.name}-"
    for left in path.parent.glob(f"{glob.escape(prefix)}*"):
        if not _may_run(left.name.removeprefix(prefix)):  # it was killed
            shutil.rmtree(left, ignore_errors=True)
    temporary = path.with_name(f"{prefix}{os.getpid()}")
    try:
        temporary.mkdir()  # within the try: a signal can come the moment it returns
        yield temporary
        if path.exists():
            shutil.copymode(path, temporary)
        rename_when_on_disk(temporary, path)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise


def _may_run(pid: str) -> bool:
    """Whether another process of this number may be running."""
    if os.name != "posix" or not pid.isdecimal():
        return True
    try:
        os.kill(int(pid), 0)
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:
        return True
    return int(pid) != os.getpid()


# ---- 10 text and tokenizers ----------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Corpus:
    """Text to calibrate with, and to measure on.

    files, eval_files: one path or several, of JSON records with a "text" field (JSON lines, an
    array, Parquet) or plain text, .gz and .xz of either. tokens: how many to read of `files`.
    seq_len: tokens per row, None: 2,048 or the model's context if that is less. Without eval_files
    the first 10 % of what is read are held out.
    """

    files: PathLike | Sequence[PathLike]
    eval_files: PathLike | Sequence[PathLike] = ()
    tokens: int = 262_144
    seq_len: int | None = None


def _paths(files: PathLike | Sequence[PathLike]) -> list[str]:
    """One path or several, as a list."""
    return [os.fspath(f) for f in ([files] if isinstance(files, (str, os.PathLike)) else files)]


def text_rows(
    model_dir: PathLike, config: LlamaConfig, corpus: Corpus, seed: int = 0
) -> tuple[Tensor, Tensor]:
    """(calibration rows, held-out rows) of a corpus, both (rows, seq_len).

    Held out are the rows of `eval_files` or else the first 10 % of those read, and never more than
    65,536 tokens. Without `files` there are no calibration rows. Warns if the text is shorter than
    `tokens`; raises ValueError for bad files or too little text.
    """
    seq_len, tokens = row_length(config, corpus.seq_len), corpus.tokens
    files, eval_files = _paths(corpus.files), _paths(corpus.eval_files)
    if files and tokens < 2 * seq_len:
        raise ValueError(f"{tokens} tokens: expected at least two rows of {seq_len}")
    encode = load_tokenizer(model_dir)

    def rows(files, n_tokens, n_least):
        # No tokenizer makes tokens of 16 characters on average.
        documents = _Documents(files, longest=16 * n_tokens)
        found = _pack_rows(documents, encode, config, n_tokens, seq_len, seed)
        if len(found) < n_least:
            raise ValueError(f"too little text in {', '.join(files) or 'no files'}: "
                             f"{n_least} rows of {seq_len} tokens are needed")
        return found

    held_out = rows(eval_files, max(seq_len, 65_536), 1) if eval_files else None
    if held_out is not None and not files:
        return held_out[:0], held_out
    calibration = rows(files, tokens, 1 if eval_files else 2)
    if len(calibration) < tokens // seq_len:
        found = f"the text has {calibration.numel():,} tokens in whole rows of {seq_len}"
        warnings.warn(f"{found}, not the {tokens:,} asked for: using those", stacklevel=2)
    if held_out is None:
        held_out, calibration = _split_held_out(calibration)
    return calibration, held_out


def _split_held_out(rows_BT: Tensor) -> tuple[Tensor, Tensor]:
    """(The first rows, which are held out and stay so if more is read; the others)."""
    n = max(1, min(len(rows_BT) // 10, 65_536 // rows_BT.shape[1]))
    return rows_BT[:n], rows_BT[n:]


def row_length(config: LlamaConfig, seq_len: int | None) -> int:
    """Tokens a row: `seq_len`, or min(2048, max_position_embeddings); ValueError if longer."""
    limit = config.max_position_embeddings
    seq_len = min(2048, limit) if seq_len is None else seq_len
    if not 2 <= seq_len <= limit:
        raise ValueError(f"sequence length {seq_len}: expected 2 to {limit} for this model")
    return seq_len


def check_calibration_rows(rows_BT: Tensor, method: Method) -> None:
    """Raise ValueError if a refit has not at least one row to train on, and one to hold out."""
    if (method.refit or method.joint) and len(rows_BT) < 2:
        raise ValueError(f"2 rows of {rows_BT.shape[1]} tokens are needed to calibrate with, found "
                         f"{len(rows_BT)}; more text, a smaller --seq-len, or --no-refit and "
                         "--no-joint")


class _Documents(Sequence[str]):
    """The documents of text files, in their order; each is read from the disk when asked for.

    JSON lines, a JSON array and, if pyarrow is installed, a Parquet file hold records, whose "text"
    is a document. Any other file is one document, of which `longest` characters are read at most.
    What counts is what is in a file, not its name. Files that cannot be read from the middle (.gz,
    .xz, arrays, Parquet, pipes) are unpacked into a temporary one.
    Raises ValueError with file and line for what cannot be read.
    """

    def __init__(self, files: Iterable[PathLike], longest: int):
        self.paths: list[Path | None] = []  # of each file; None: it is in `unpacked`
        self.unpacked = tempfile.TemporaryFile()  # noqa: SIM115 # it closes with this object
        self.places = array.array("q")  # of each document: file, first byte, bytes, is it a record
        self.longest = longest
        for path in map(Path, files):
            n_before = len(self)
            try:
                self._add(path)
            except (UnicodeError, EOFError, OSError, lzma.LZMAError, zlib.error) as error:
                raise ValueError(f"{path}: cannot be read ({error}); expected JSON lines or plain "
                                 "text in UTF-8, .gz or .xz of either, or Parquet") from None
            if len(self) == n_before:
                raise ValueError(f"{path}: holds no text")

    def __len__(self) -> int:
        return len(self.places) // 4

    def __getitem__(self, i):
        if not 0 <= i < len(self):
            raise IndexError(i)
        n, start, size, is_record = self.places[4 * i : 4 * i + 4]
        path = self.paths[n]
        with open(path, "rb") if path else contextlib.nullcontext(self.unpacked) as file:
            file.seek(start)
            content = file.read(size)
        if is_record:
            return _record_text(f"{path}, byte {start}", content)
        return codecs.getincrementaldecoder("utf-8")().decode(content)  # may end within a character

    def _add(self, path: Path) -> None:
        """Find the documents of a file."""
        if not path.exists() or path.is_dir():
            raise ValueError(f"{path}: {'is a directory' if path.is_dir() else 'no such file'}")
        if path.is_file():
            refuse_pointer(path)
        with open(path, "rb") as file:
            head = file.peek(8)
            is_gz = head.startswith(b"\x1f\x8b") or path.suffix == ".gz"
            if head.startswith(b"PAR1"):
                self._add_unpacked(path, _parquet_records(path))
            elif is_gz or head.startswith(b"\xfd7zXZ") or path.suffix == ".xz":
                with (gzip.open if is_gz else lzma.open)(file) as unpacked:
                    self._add_unpacked(path, _chunks(unpacked))
            elif not path.is_file() or _is_array(file.peek(1 << 13)):
                self._add_unpacked(path, _chunks(file))
            else:
                self._add_open(path, file, path)

    def _add_unpacked(self, path: Path, parts: Iterable[bytes]) -> None:
        """Find the documents of what the parts make together."""
        start, parts = self.unpacked.seek(0, os.SEEK_END), iter(parts)
        first = next(parts, b"")
        parts = itertools.chain([first], parts)
        parts = _array_records(path, parts) if _is_array(first) else parts
        for part in _bytes_progress(parts, f"unpack {path.name}"):
            self.unpacked.write(part)
        self.unpacked.seek(start)
        self._add_open(path, self.unpacked, None)

    def _add_open(self, path: Path, file: BinaryIO, source: Path | None) -> None:
        """Find the documents in the rest of an open file."""
        start, end = file.tell(), file.seek(0, os.SEEK_END)
        file.seek(start)
        if file.read(3) == codecs.BOM_UTF8:
            start += 3
        file.seek(start)
        of_records = _holds_records(path, file.read(1 << 16).lstrip())
        self.paths.append(source)
        file.seek(start)
        parts = iter(file.readline, b"") if of_records else _chunks(file)
        decoder, is_blank, at = codecs.getincrementaldecoder("utf-8")(), True, start
        for number, part in enumerate(_bytes_progress(parts, f"read {path.name}", end - start), 1):
            if b"\0" in part:
                raise ValueError(f"{path}: holds bytes of 0, as no text in UTF-8 does; UTF-16?")
            if not of_records:
                is_blank &= not decoder.decode(part, final=at + len(part) == end).strip()
            elif part.strip() and _record_text(f"{path}, line {number}", part).strip():
                self.places.extend([len(self.paths) - 1, at, len(part), True])
            at += len(part)
        if not of_records and not is_blank:
            if not {".txt", ".text", ".md"} & {suffix.lower() for suffix in path.suffixes}:
                warnings.warn(f"{path}: read as plain text, one document; records would be JSON "
                              "lines or a JSON array", stacklevel=2)
            size = min(end - start, 4 * self.longest)
            self.places.extend([len(self.paths) - 1, start, size, False])


def _chunks(file: Any) -> Iterator[bytes]:
    """The content of an open file, a MB at a time."""
    return iter(lambda: file.read(1 << 20), b"")


def _holds_records(path: Path, head: bytes) -> bool:
    """Whether a file holds JSON records: by its name, or because it begins as an object does, or
    has a record behind its first line."""
    named = {".jsonl", ".json", ".ndjson", ".jsonlines"}
    return bool(named & {suffix.lower() for suffix in path.suffixes}
                or re.match(rb'\{\s*"([^"\\\n]|\\.)*"\s*:|[^\n]*\n\s*\{[^\n]*"text"\s*:', head))


def _is_array(head: bytes) -> bool:
    """Whether a file that begins so holds a JSON array of objects."""
    return re.match(rb'(\xef\xbb\xbf)?\s*\[\s*\{\s*["}]', head) is not None


def _array_records(path: Path, parts: Iterable[bytes]) -> Iterator[bytes]:
    """The records of a JSON array as JSON lines, a MB at a time."""
    decode, utf8 = json.JSONDecoder().raw_decode, codecs.getincrementaldecoder("utf-8-sig")()
    text, begins, least = "", re.compile(r"\s*\[\s*(?=\{)"), 0
    reason = "expected objects, with commas between them, in brackets"
    for part in itertools.chain(parts, [b""]):
        text, at = text + utf8.decode(part, final=not part), 0
        while (found := begins.match(text, at)) and (len(text) >= least or not part):
            try:
                record, at = decode(text, found.end())
            except (ValueError, RecursionError) as error:  # or it is just not whole yet
                reason, least = str(error), 2 * (len(text) - at)
                if least > 1 << 28:
                    raise ValueError(f"{path}: not a JSON array of records ({reason})") from None
                break
            begins, least = re.compile(r"\s*,\s*(?=\{)"), 0
            yield json.dumps(record).encode() + b"\n"
        text = text[at:]
    if text.strip() != "]":
        raise ValueError(f"{path}: not a JSON array of records ({reason})")


def _record_text(where: str, line: bytes) -> str:
    """The text of one JSON record; raises ValueError that says where, if it has none."""
    try:
        record = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{where}: not JSON ({error.args[0]}), in what seems to be a file of "
                         "JSON records, one a line") from None
    if not isinstance(record, dict) or not isinstance(record.get("text"), str):
        raise ValueError(f'{where}: expected an object with a "text" string')
    return record["text"].encode("utf-8", "replace").decode()  # web text has lone surrogates


def _parquet_records(path: Path) -> Iterator[bytes]:
    """The records of a Parquet file as JSON lines."""
    try:
        from pyarrow import ArrowException, parquet
    except ImportError:
        raise ValueError(f"{path}: to read Parquet, pip install pyarrow") from None
    try:
        for batch in parquet.ParquetFile(path).iter_batches(1000, columns=["text"]):
            for text in batch.column("text").to_pylist():
                yield json.dumps({"text": "" if text is None else text}).encode() + b"\n"
    except (ArrowException, KeyError, TypeError) as error:  # the last: of a column of bytes
        raise ValueError(f"{path}: cannot be read ({error}); expected a column \"text\"") from None


_TOKENIZER_SETTINGS = ("special_tokens_map.json", "tokenizer_config.json")  # the last one wins


def load_tokenizer(path: PathLike) -> Callable[[list[str]], list[list[int]]]:
    """The function from texts to token ids of a model directory: BOS as its files say, no EOS.

    BOS comes first, and once, if add_bos_token is true in tokenizer_config.json, and not if it is
    false. Where it is not there, `tokenizer.json`'s own post-processor decides what comes first;
    with `tokenizer.model` BOS does. Raises ValueError without either file.
    """
    folder = Path(path)
    settings: dict[str, Any] = {}
    for file in (folder / name for name in _TOKENIZER_SETTINGS):
        settings |= read_json(file) if file.is_file() else {}
    for name, load in (("tokenizer.json", _from_tokenizer_json),
                       ("tokenizer.model", _from_tokenizer_model)):
        if (folder / name).is_file():
            refuse_pointer(folder / name)
            try:
                encode, first, bos = load(folder / name, settings.get("bos_token", "<s>"))
            except Exception as error:  # tokenizers raises nothing narrower
                raise ValueError(f"{folder / name}: cannot be read ({error})") from None
            if isinstance(add_bos := settings.get("add_bos_token"), bool):
                if add_bos and bos is None and not first:
                    raise ValueError(f"{file}: add_bos_token is true, but no bos_token is "
                                     "named that the vocabulary has")
                first = [] if not add_bos else first if bos is None else [bos]
            return lambda texts: [ids if first and ids[: len(first)] == first else first + ids
                                  for ids in encode(texts)]
    raise ValueError(f"{folder}: no tokenizer.json and no tokenizer.model")


def _from_tokenizer_json(file: Path, bos_token: Any):
    """(encode, what the post-processor puts first, BOS) of a file of the tokenizers package."""
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(file))
    # subtle: a tokenizer.json may have been saved with a truncation to a few hundred tokens.
    tokenizer.no_truncation()
    tokenizer.no_padding()
    sample = tokenizer.encode("a")
    n_first = (sample.special_tokens_mask + [0]).index(0)
    bos_token = bos_token.get("content") if isinstance(bos_token, dict) else bos_token
    bos = tokenizer.token_to_id(bos_token) if isinstance(bos_token, str) else None

    def encode(texts: list[str]) -> list[list[int]]:
        return [e.ids for e in tokenizer.encode_batch(texts, add_special_tokens=False)]

    return encode, sample.ids[:n_first], bos


def _from_tokenizer_model(file: Path, _bos_token: Any):
    """(encode, BOS as a list, BOS) of a file of the sentencepiece package."""
    import sentencepiece

    tokenizer = sentencepiece.SentencePieceProcessor()
    tokenizer.Load(str(file))
    bos = tokenizer.bos_id() if tokenizer.bos_id() >= 0 else None
    return tokenizer.encode, [] if bos is None else [bos], bos


def _text_batches(
    documents: Sequence[str], longest: int, seed: int
) -> Iterator[list[tuple[str, bool, bool]]]:
    """The documents shuffled by the seed, each cut after `longest` characters, as (text, does a
    document begin with it, does one end), in batches and pieces of some million characters: a
    tokenizer takes a hundred bytes for each."""
    order = random.Random(seed).sample(range(len(documents)), len(documents))[::-1]
    batch, size = [], 0
    for i in progress(order, "tokenize", unit=" documents", delay=2):
        text = documents[i][:longest]
        for at in range(0, max(1, len(text)), 1_000_000):
            batch.append((text[at : at + 1_000_000], at == 0, at + 1_000_000 >= len(text)))
            size += len(batch[-1][0])
            if size >= min(1_000_000, longest) or i == order[-1]:
                yield batch
                batch, size = [], 0


def _pack_rows(
    documents: Sequence[str], encode: Callable[[list[str]], list[list[int]]], config: LlamaConfig,
    n_tokens: int, seq_len: int, seed: int
) -> Tensor:
    """Token rows (rows, seq_len) of documents shuffled by the seed, each closed by EOS, end to end.

    At most `n_tokens` tokens; a last row that is not full is dropped. Raises ValueError for a token
    that the model does not have.
    """
    ids, read = [np.zeros(0, np.int32)], 0
    n_first = len(encode([""])[0])  # BOS, or nothing
    # No tokenizer makes tokens of 16 characters on average.
    for batch in _text_batches(documents, 16 * n_tokens, seed):
        coded = encode([text for text, *_ in batch])
        for tokens, (_, begins, ends) in zip(coded, batch, strict=True):
            whole = tokens[0 if begins else n_first :] + (config.eos_ids if ends else [])
            ids.append(np.array(whole, np.int32))
            read += len(whole)
        if read >= n_tokens:
            break
    stream = np.concatenate(ids)[:n_tokens]
    if len(stream) and stream.max() >= config.vocab_size:
        raise ValueError(
            f"the tokenizer gives token {stream.max()}, but the model's vocabulary has only "
            f"{config.vocab_size}; do the tokenizer files belong to this model?"
        )
    n_rows = len(stream) // seq_len
    return torch.from_numpy(stream[: n_rows * seq_len].reshape(n_rows, seq_len)).long()


# ---- 11 report and command line ------------------------------------------------------------------


def kv_cache_bytes(config: LlamaConfig, weights: Weights) -> int:
    """Bytes of KV cache for each token of context, in the weights' dtype."""
    itemsize = weights[block_prefix(0) + "self_attn.k_proj.weight"].element_size()
    heads = config.num_hidden_layers * config.num_key_value_heads
    return 2 * heads * config.head_dim * itemsize


def _converted_bytes(config: LlamaConfig, weights: Weights, kv_heads: int) -> int:
    """Bytes of the weights once they have `kv_heads` KV heads."""
    kv = _n_bytes(w for n, w in weights.items() if ".k_proj." in n or ".v_proj." in n)
    return _n_bytes(weights.values()) - kv + kv * kv_heads // config.num_key_value_heads


def _memory_needed(
    config: LlamaConfig, n_tokens: int, seq_len: int, n_held_out: int, dtype: torch.dtype,
    method: Method
) -> int:
    """Bytes of anonymous memory at a conversion's peak, estimated from its largest parts.

    For so many calibration tokens, in rows of seq_len, and held-out ones.
    """
    d, inner, size = config.hidden_size, config.intermediate_size, dtype.itemsize
    kv, q = (n * config.head_dim for n in (config.num_key_value_heads, config.num_attention_heads))
    attention, mlp = 2 * d * (q + kv), 3 * d * inner
    streams = ((2 if method.refit else 1) * n_tokens + 3 * n_held_out) * d * size
    forward = min(4096, n_tokens) * (6 * d + 4 * inner) * size  # of at most 4,096 tokens at a time
    mapping = 3 * attention * 8  # float64 copies of attention's weights
    # Old and new weights, gradients and moments, and what the backward of a step needs.
    step = min(max(_REFIT_TOKENS, seq_len), n_tokens)
    backward = 4 * step * (8 * d + 3 * (q + 2 * kv) + 5 * inner)
    refit = 4 * (5 * attention + mlp) + backward if method.refit else 0
    block = 2 * (attention + mlp) * size + 4 * kv * kv * 8 + max(forward, mapping, refit)
    head = config.vocab_size * (d * size + 8 * 256 * 4)  # and logits of 256 tokens
    joint = 0
    if method.joint:
        layers = (5 * attention + step * d) * config.num_hidden_layers
        joint = 4 * (layers + 2 * mlp + config.vocab_size * (2 * d + 8 * 256)) + backward
    return 300_000_000 + streams + max(block, head, joint)  # 0.3 GB: Python and torch themselves


def _warn_of_memory(needed: int, device: torch.device, method: Method) -> None:
    """Warn if the device has not so many bytes free: the refits would end hours from now."""
    free = free_memory(device)
    if free is not None and needed > free:
        less = "--no-joint takes less" if method.joint else "fewer --tokens take less"
        warnings.warn(f"about {gigabytes(needed)} of memory are needed, {gigabytes(free)} are "
                      f"free; {less}", stacklevel=3)


def free_memory(device: torch.device) -> int | None:
    """Bytes that are free on the device, None if the system does not tell."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    status = Path("/proc/meminfo")
    if not status.exists():
        return None
    free = 1024 * int(re.findall(r"MemAvailable:\s+(\d+)", status.read_text())[0])
    return min(free, _container_memory(Path("/sys/fs/cgroup")))


def _container_memory(groups: Path) -> int:
    """Bytes that a container's limit leaves, of cgroups in version 2 or 1."""
    free = sys.maxsize
    for limit, statistics, used in (("memory.max", "memory.stat", "anon"),
            ("memory/memory.limit_in_bytes", "memory/memory.stat", "total_rss")):
        with contextlib.suppress(OSError, ValueError):  # "max": there is no limit
            found = dict(line.split() for line in (groups / statistics).read_text().splitlines())
            free = min(free, max(0, int((groups / limit).read_text()) - int(found.get(used, 0))))
    return free


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that there is not enough memory, of the GPU or of the host."""
    return (isinstance(error, (MemoryError, torch.OutOfMemoryError))
            or "can't allocate memory" in str(error))  # a RuntimeError on CPUs


def versions() -> str:
    """What --version prints."""
    return f"mha2gqa {__version__} (torch {torch.__version__})"


def provenance() -> dict[str, Any]:
    """What a report says of its making: versions, the time and the command."""
    ours = Path(sys.argv[0]).stem.replace("-", "_") in ("mha2gqa", "train_gqa")
    return {"versions": {"mha2gqa": __version__, "torch": torch.__version__,
                         "python": platform.python_version()},
            "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
            "command": shlex.join(sys.argv) if ours else None}


def without_repeats(scores: Mapping[str, Any], method: Mapping[str, Any]) -> dict[str, Any]:
    """The scores by model, but for mean-pooling's if by the method that is the converted model."""
    trained = method["refit"] or method.get("joint")
    same = method["align"] == "none" and method["group"] == "adjacent" and not trained
    return {name: of for name, of in scores.items() if not (same and name.startswith("mean"))}


def write_model_card(
    folder: Path, source: Path, cache: Mapping[str, int],
    scores: Mapping[str, Mapping[str, float]], how: str
) -> None:
    """Write README.md as the hub shows it; a source's own stays, below.

    source: its directory. cache: bytes of KV cache a token, of "source" and "converted". scores:
    of some models, the source first and this one last. how: what was done.
    """
    name, old = _base_name(source), ""
    with contextlib.suppress(OSError):
        old = (source / "README.md").read_text("utf-8", errors="replace")
    head, below, before = _card_head(old)
    base = before or name
    columns = list(next(iter(scores.values())))
    rows = [f"| {name.replace('_', '-')} | " + " | ".join(f"{row[c]:.4f}" for c in columns)
            + f" | {cache['source' if name in ('source', 'teacher') else 'converted']:,} |"
            for name, row in scores.items()]
    tasks = " and on tasks in shares of exact answers" if "mean" in columns else ""
    text = "\n".join([
        "---", f"base_model: {json.dumps(base, ensure_ascii=False)}",
        "library_name: transformers", *head, "---", "",
        f"# {base}, grouped-query attention", "",
        f"Made of {name} by mha2gqa {__version__}: {' '.join(how.split())}. What was measured on "
        f"held-out text in nats/token{tasks} (all of it in `mha2gqa.json`):", "",
        f"| | {' | '.join(columns)} | KV cache, bytes a token |", "|---" * (len(columns) + 2) + "|",
        *rows, "", "It loads as the original does, without code of its own:", "", "```python",
        "from transformers import AutoModelForCausalLM, AutoTokenizer", "",
        'model = AutoModelForCausalLM.from_pretrained("DIRECTORY")',
        'tokenizer = AutoTokenizer.from_pretrained("DIRECTORY")', "```", "",
        "The method begins with", "", "```bibtex", _CITATION, "```", ""])
    if below.strip():
        text += f"\n---\n\nThe original's card:\n\n{below.strip()}\n"
    with writing(folder / "README.md"):
        (folder / "README.md").write_text(text, "utf-8")


def _base_name(source: Path) -> str:
    """A model's name on the hub, if it is a download from there, or its directory's name."""
    path = source.resolve()
    found = re.search(r"models--([^/]+)--([^/]+)/snapshots/", path.as_posix())
    return f"{found[1]}/{found[2]}" if found else path.name


_CITATION = """@inproceedings{jin2025align,
  title     = {Align Attention Heads Before Merging Them:
               An Effective Way for Converting {MHA} to {GQA}},
  author    = {Jin, Qingyun and Song, Xiaohui and Zhou, Feng and Qin, Zengchang},
  booktitle = {Findings of the Association for Computational Linguistics: EMNLP 2025},
  year      = {2025},
  note      = {arXiv:2412.20677}
}"""


def _card_head(card: str) -> tuple[list[str], str, str]:
    """(Lines of YAML to keep of a card's head, with our tags; the text below it; the base model, if
    the card is one of ours).

    As text: what does not say of the original what it would not say of the result stays as it is
    (a parser of YAML would make `false` of Norwegian, `no`).
    """
    found = re.match(r"---[ \t]*\n(.*?\n)---[ \t]*(?:\n|$)", card, re.DOTALL)
    key_and_value = r"^([\w-]+):(.*\n(?:[] \t#}-].*\n|\n)*)"
    entries = dict(re.findall(key_and_value, found[1], re.M) if found else [])
    base = re.fullmatch(r"\s*[\"']?([\w./ -]*\w)[\"']?\s*", entries.pop("base_model", ""))
    for name in ("library_name", "model-index", "base_model_relation", "new_version"):
        entries.pop(name, None)
    listed = re.sub(r"(^|\s)#.*", "", entries.pop("tags", ""))
    tags = re.findall(r"[^\s,\[\]\"'-][^\n,\[\]\"']*", listed)
    ours = "mha2gqa" in tags
    tags = [*dict.fromkeys([*map(str.strip, tags), "mha2gqa", "grouped-query-attention"])]
    kept = "".join(f"{name}:{value}" for name, value in entries.items()).splitlines()
    lines = ["tags:", *(f"- {json.dumps(tag, ensure_ascii=False)}" for tag in tags), *kept]
    return lines, card[found.end():] if found else card, base[1] if ours and base else ""


def method_steps(method: Mapping[str, Any]) -> list[str]:
    """What a report's method does, in the words of the options."""
    return [f"align {method['align']}", *(n for n in ("refit", "joint") if method.get(n))]


def _how(report: Mapping[str, Any]) -> str:
    """How a conversion was, or will be, made."""
    heads, method, tokens = report["kv_heads"], report["method"], report["tokens"]
    steps = [*method_steps(method), f"group {method['group']}"]
    if method["align"] != "linear":
        steps.append(f"metric {method['metric']}")
    longer = tokens["refit"] > tokens["calibration"]
    return (
        f"{report['num_hidden_layers']} blocks, {heads['source']} to {heads['converted']} KV heads "
        f"({', '.join(steps)});\n{tokens['calibration']:,} tokens to calibrate in rows of "
        f"{tokens['calibration_seq_len']:,}" + f", resampled to {tokens['refit']:,}" * longer
        + f"; {tokens['held_out']:,} held out in rows of {tokens['seq_len']:,}")


def _plan(report: Mapping[str, Any]) -> str:
    """What a conversion will do, and the memory and disk it takes."""
    return (f"{_how(report)};\nabout {gigabytes(report['memory_estimate_bytes'])} of memory "
            f"({report['forward']['device']}) and {gigabytes(report['disk_bytes'])} of disk")


def gigabytes(n_bytes: float) -> str:
    """Two digits, never with an exponent: "0.017 GB"."""
    return np.format_float_positional(float(f"{n_bytes / 1e9:.2g}"), trim="-") + " GB"


class Meter:
    """Seconds by stage, and the peaks of memory: `lap(stage)` ends a stage and begins the next one.

    peak_memory: {"host": bytes, "cuda": bytes}. host is anonymous memory: the system's high-water
    mark less the pages of mapped files, such as the weights, which it can drop at any time; 0 where
    /proc does not tell. cuda is the allocator's own peak. All may start as an earlier session's.
    """

    def __init__(
        self, device: torch.device, seconds: Mapping[str, float] = {},
        peak_memory: Mapping[str, int] = {}
    ):
        self.device, self.seconds, self.last = device, dict(seconds), time.perf_counter()
        self.peak_memory = {"host": 0, "cuda": 0, **peak_memory}

    def lap(self, stage: str) -> None:
        """Add the time since the last lap to the stage, and look at the memory."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
            self._raise_peak("cuda", torch.cuda.max_memory_allocated(self.device))
        # subtle: pages that are mapped after the mark was set count against it: so at every lap.
        status = Path("/proc/self/status")
        kilobytes = re.findall(r"(\w+):\s+(\d+) kB", status.read_text() if status.exists() else "")
        size = {"VmHWM": 0, "RssFile": 0} | {name: 1024 * int(n) for name, n in kilobytes}
        self._raise_peak("host", size["VmHWM"] - size["RssFile"])
        now = time.perf_counter()
        self.seconds[stage] = self.seconds.get(stage, 0.0) + now - self.last
        self.last = now

    def _raise_peak(self, where: str, n_bytes: int) -> None:
        self.peak_memory[where] = max(self.peak_memory[where], n_bytes)


class _FlopMeter(Meter):
    """Counts the FLOP of each stage's matrix products, too, within `with meter.counter`."""

    def __init__(self, device: torch.device):
        from torch.utils.flop_counter import FlopCounterMode

        super().__init__(device)
        self.counter, self.flop = FlopCounterMode(display=False), dict[str, int]()

    def lap(self, stage: str) -> None:
        made = self.counter.get_total_flops() - sum(self.flop.values())
        self.flop[stage] = self.flop.get(stage, 0) + made
        super().lap(stage)


def matrix_rate(device: torch.device, dtype: torch.dtype) -> float:
    """FLOP/s of large matrix products, the best of three times ten."""
    n, seconds = 8192 if device.type == "cuda" else 1536, []
    a = torch.randn(n, n, device=device, dtype=dtype)
    for _ in range(3):
        meter = Meter(device)
        for _ in range(10):
            a @ a
        meter.lap("products")
        seconds.append(meter.seconds["products"])
    return 10 * 2 * n**3 / min(seconds)


def benchmark(
    model_dir: PathLike, kv_heads: int, tokens: int = Corpus.tokens, seq_len: int | None = None,
    method: Method = Method(), device: str = "auto"
) -> dict[str, Any]:
    """Time the conversion of a model of this shape: random weights and tokens, nothing written.

    Of the directory only config.json is read. Returns "seconds" by stage, which counting makes a
    little longer, and "floor_seconds", what each stage's matrix products would take at this
    machine's `matrix_rate`, in float32, or in bf16 in the refits, and on a GPU in all, if these use
    that; "peak_memory_bytes". Raises ValueError for bad input.
    """
    config, place = load_config(model_folder(model_dir, False)), _pick_device(device)
    new_config, length = gqa_config(config, kv_heads), row_length(config, seq_len)
    if tokens < 2 * length:
        raise ValueError(f"{tokens} tokens: expected at least two rows of {length}")
    generator = torch.Generator().manual_seed(method.seed)
    rows = torch.randint(config.vocab_size, (tokens // length, length), generator=generator)
    held_out, rows = _split_held_out(rows)
    rows = calibration_rows(rows)
    check_calibration_rows(rows, method)
    with torch.device("meta"):
        shapes = {name: p.shape for name, p in Llama(config).named_parameters()}
    first = {name: torch.randn(shape, generator=generator).mul_(0.02).bfloat16()
             for name, shape in shapes.items() if not re.match(r"model\.layers\.[1-9]", name)}
    weights = {name: first[re.sub(r"^model\.layers\.\d+", "model.layers.0", name)]  # all the same
               for name in shapes}
    meter, like = _FlopMeter(place), torch.empty(config.hidden_size, device=place)
    with meter.counter:
        _convert_and_measure(lambda shard: None, config, new_config, weights, rows, held_out,
                             method, like, meter)
    fast = torch.bfloat16 if _fast_products(place, config.hidden_size) else None
    rates = {dtype: matrix_rate(place, dtype) for dtype in (torch.float32, fast) if dtype}
    floor = {stage: n / rates[("refit" in stage or like.is_cuda) and fast or torch.float32]
             for stage, n in meter.flop.items()}
    return {"seconds": meter.seconds, "floor_seconds": floor,
            "flop_per_second": {str(dtype).removeprefix("torch."): r for dtype, r in rates.items()},
            "peak_memory_bytes": meter.peak_memory}


def _mean(found: Sequence):
    """The mean of numbers, or of dicts of them, key by key."""
    if isinstance(found[0], dict):
        return {name: _mean([f[name] for f in found]) for name in found[0]}
    return sum(found) / len(found)


def _pick_device(name: str) -> torch.device:
    """The device of that name; raises ValueError if this machine has none."""
    cuda = [f"cuda:{i}" for i in range(torch.cuda.device_count())]
    if name == "auto":
        name = "cuda" if cuda else "cpu"
    choices = ["cpu", *(["cuda", *cuda] if cuda else [])]
    if name not in choices:
        raise ValueError(f"device {name!r}: expected auto, {', '.join(choices)} on this machine")
    return torch.device(name)


def progress(
    items: Iterable, what: str, total: int | None = None, inside: bool = False, **options
) -> Iterable:
    """A progress bar with an estimate of the time left, and where there is no terminal a line now
    and then. `inside` another bar it comes when it takes longer than a second, and goes.
    `total`, if the items do not know their number."""
    from tqdm import tqdm

    total = len(cast(Sequence, items)) if total is None else total
    if inside and total == 1:
        return items
    if inside:
        options = {"leave": False, "delay": 1, **options}
    if sys.stderr.isatty() or options.get("disable"):
        return tqdm(items, "  " * inside + what, total, **options)
    return _progress_lines(items, what, total, options.get("initial", 0), inside)


_last_line: list = [time.monotonic(), ""]  # when it was printed, what the outer bar says


def _progress_lines(
    items: Iterable, what: str, total: int, initial: int, inside: bool
) -> Iterator:
    """The items, with a line about every minute; inside another bar the line says of both."""
    from tqdm import tqdm

    outer, begin = _last_line, time.monotonic()
    if not inside:
        outer[1] = f"{what} {initial:,}/{total:,}"
    for done, item in enumerate(items, 1):
        yield item
        now, here = time.monotonic(), f"{what} {initial + done:,}/{total:,}"
        if not inside:
            left = (now - begin) / done * (total - initial - done)
            outer[1] = f"{here}, {tqdm.format_interval(left)} left"
        if now - outer[0] > 60:
            outer[0] = now
            print(outer[1] + f": {here}" * inside, file=sys.stderr, flush=True)
    if not inside:
        outer[1] = what


def _bytes_progress(parts: Iterable[bytes], what: str, total: int | None = None) -> Iterator[bytes]:
    """The parts of a file, with a progress bar in bytes if it takes longer than two seconds."""
    from tqdm import tqdm

    with tqdm(None, what, total, unit="B", unit_scale=True, delay=2, disable=None) as bar:
        for part in parts:
            yield part
            bar.update(len(part))


class ArgumentParser(argparse.ArgumentParser):
    """Wrong arguments end the program with one line, and exit status 2."""

    def error(self, message: str):
        self.exit(2, f"error: {message}; see --help\n")


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
    add("--metric", choices=Method.CHOICES["metric"], default=Method.metric,
        help="similarity: minus the mean square distance (default), or the mean cosine (for "
        "--align rotation or none)")
    add("--seed", type=int, default=Method.seed, metavar="N", help="of the order of the text, the "
        "grouping, and all else that is random (default: %(default)s)")


def method_of_arguments(arguments: argparse.Namespace) -> Method:
    """The method that a command line asks for."""
    names = {field.name for field in dataclasses.fields(Method)}
    return Method(**{name: value for name, value in vars(arguments).items() if name in names})


def _parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    """The command line's arguments; wrong ones end the program with one line."""
    parser = ArgumentParser(
        prog="mha2gqa",
        usage="mha2gqa MODEL OUT --kv-heads G --text FILE ... [options]\n"
        "       mha2gqa --evaluate MODEL --text FILE ... [options]\n"
        "       mha2gqa --benchmark MODEL --kv-heads G [options]\n"
        "       mha2gqa --plot OUT ...",
        description="Convert a LLaMA checkpoint to grouped-query attention, block by block.",
    )
    add = parser.add_argument
    add("--version", action="version", version=versions())
    add("model", metavar="MODEL", nargs="?", help="Hugging Face directory to convert, or to "
        "--evaluate, or its name on the hub")
    add("out", metavar="OUT", nargs="?", help="directory to write; must not exist, or be empty")
    add("--kv-heads", type=int, metavar="G", help="KV heads wanted, a divisor of the source's")
    add("--text", nargs="+", default=[], metavar="FILE", help="calibration text: records with a "
        '"text" field (JSON lines, a JSON array, Parquet), or plain text; .gz and .xz of either')
    add("--eval-text", nargs="+", default=[], metavar="FILE", help="held-out text, of which at "
        "most 65,536 tokens are used; without it the first 10%% of --text's tokens are held out")
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
    add("--plot", nargs="+", metavar="OUT", help="draw a conversion or training, or the losses of "
        "several, into plot.png (needs matplotlib)")
    add("--benchmark", action="store_true", help="time the conversion of a model of MODEL's shape, "
        "with random weights and tokens; writes nothing")
    if not (sys.argv[1:] if argv is None else argv):
        parser.exit(2, parser.format_usage() + "the demo, which makes and converts a small model:\n"
                    "       torchrun train_gqa.py, or once it is installed train-gqa\n")
    arguments = parser.parse_args(argv)
    for files in (arguments.text, arguments.eval_text):
        if arguments.model is None:  # `--text FILE MODEL OUT`: the option has taken them all
            first = next((i for i, name in enumerate(files) if Path(name).is_dir()), len(files))
            arguments.model, arguments.out = [*files[first:], None, None][:2]
            del files[first : first + 2]
    if arguments.plot:
        return arguments
    if arguments.benchmark:
        if arguments.model is None or arguments.kv_heads is None or arguments.out:
            parser.error("--benchmark takes MODEL and --kv-heads G, and writes nothing")
        return arguments
    if arguments.evaluate and (arguments.out or arguments.kv_heads or arguments.dry_run):
        parser.error("--evaluate takes MODEL and text, and writes nothing")
    if arguments.evaluate and arguments.model is None:
        parser.error("--evaluate needs MODEL, before --text")
    if not arguments.evaluate and None in (arguments.out, arguments.kv_heads):
        parser.error("a conversion needs MODEL OUT --kv-heads G --text FILE, in this order")
    if not arguments.text and not (arguments.evaluate and arguments.eval_text):
        parser.error("no --text FILE")
    return arguments


def _print_table(report: Mapping[str, Any], out: str) -> None:
    """What a person wants to know of a report."""
    loss, kl = report["loss_nats_per_token"], report["kl_nats_per_token"]
    cache = report["kv_cache_bytes_per_token"]
    print(f"\nheld-out loss, nats/token, {report['tokens']['held_out']:,} tokens; KL to the source")
    for name, value in without_repeats(loss, report["method"]).items():
        gap = "" if name == "source" else f"  {value - loss['source']:+8.4f}{kl[name]:9.4f}"
        print(f"  {name.replace('_', '-'):<12}{value:8.4f}{gap}")
    if "energy_kept" in report:
        print("energy that the shared heads keep")
        for name, share in report["energy_kept"].items():
            print(f"  {name + 's':<12}{share:8.4f}")
    else:
        rotated = report["method"]["align"] == "rotation"
        print(f"similarity inside groups ({report['method']['metric']})"
              + ", before and after" * rotated)
        for name, s in report["similarity_inside_groups"].items():
            after = f" -> {s['after']:.4f}" if rotated else ""
            print(f"  {name + 's':<12}{s['before']:8.4f}{after}")
    for name, what in (("refit", "error of a block's hidden states, before and after its refit"),
                       ("joint_kl", "KL on calibration rows, before and after the joint refit")):
        if name in report:
            mean = report[name]
            note = ", no gain: left out" * (mean["before"] == mean["after"])
            print(f"{what}\n  {'mean':<12}{mean['before']:8.4f} -> {mean['after']:.4f}{note}")
    print(f"KV cache, bytes a token\n  {cache['source']:,} -> {cache['converted']:,}")
    stages = textwrap.fill(", ".join(
        f"{name} {value:.1f}" for name, value in report["seconds"].items()), 96)
    memory = (f"{n} {b / 1e9:.2f} GB" for n, b in report["peak_memory_bytes"].items() if b)
    print(f"seconds\n{textwrap.indent(stages, '  ')}\npeak memory\n  {', '.join(memory)}")
    print(f"written to {out}")


def _print_benchmark(found: Mapping[str, Any]) -> None:
    """What a person wants to know of a benchmark."""
    rates = (f"{rate / 1e12:.3g} TFLOP/s in {n}" for n, rate in found["flop_per_second"].items())
    print(f"{'':<14}{'seconds':>10}{'floor':>10}")
    for stage, seconds in found["seconds"].items():
        print(f"{stage:<14}{seconds:10.2f}{found['floor_seconds'][stage]:10.2f}")
    memory = (f"{n} {gigabytes(b)}" for n, b in found["peak_memory_bytes"].items() if b)
    print(f"floor: the stage's matrix products, at {', '.join(rates)}")
    print(f"peak memory: {', '.join(memory)}")


def plot(folders: Sequence[PathLike], file: PathLike) -> None:
    """Draw one conversion or training, or the losses of several against their KV cache.

    folders: OUT of each. Needs matplotlib. Raises ValueError for a folder without a report.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise ValueError("plots need matplotlib: pip install matplotlib") from None
    folder = Path(folders[0])
    metrics, training = folder / "metrics.jsonl", (folder / "report.json").exists()
    figure = Figure((8.5 if len(folders) > 1 else 12, 4), layout="constrained")
    try:
        if len(folders) > 1:
            _plot_runs(figure.subplots(), [_summary(Path(folder)) for folder in folders])
        elif training:
            lines = metrics.read_text(errors="replace").splitlines(keepends=True)
            _plot_training(figure, [json.loads(line) for line in lines if line.endswith("}\n")])
        else:
            _plot_conversion(figure, read_json(folder / "mha2gqa.json"))
    except (KeyError, IndexError, TypeError, AttributeError, json.JSONDecodeError, OSError):
        raise ValueError(f"{folder}: nothing to draw; expected the OUT of a conversion, or of a "
                         "training that has made steps") from None
    with writing(Path(file)):
        figure.savefig(file, dpi=150)


def _summary(folder: Path) -> tuple[tuple[str, str, str], Mapping[str, int], float]:
    """((how a run was made, of how much text, its source), its bytes of KV cache a token, its loss
    above the source's)."""
    result = folder / "gqa" if (folder / "gqa").is_dir() else folder  # of a training
    report = read_json(result / "mha2gqa.json")
    try:
        losses, tokens = report["loss_nats_per_token"], report["tokens"]
        trained = "distilled" in losses
        way = (", ".join([*method_steps(report["method"]), *["training"] * trained]),
               f"{tokens['training' if trained else 'calibration']:,} tokens",
               _base_name(Path(report["source"])))
        return (way, report["kv_cache_bytes_per_token"],
                losses["distilled" if trained else "converted"] - losses["source"])
    except (KeyError, TypeError, ValueError, AttributeError):
        raise ValueError(f"{result}: no finished run with losses on held-out text") from None


def _plot_runs(
    axes, runs: Sequence[tuple[tuple[str, str, str], Mapping[str, int], float]]
) -> None:
    """What runs cost in loss, against the KV cache that is left; those of one way are joined."""
    ways = [run[0] for run in runs]
    said = [n for n in range(3) if n == 0 or len({way[n] for way in ways}) > 1]  # what differs
    for way, marker in zip(dict.fromkeys(ways), itertools.cycle("os^Dv*P"), strict=False):
        points = sorted((kv["converted"] / 1024, gap) for of, kv, gap in runs if of == way)
        axes.plot(*zip(*points, strict=True), marker + "-", label=", ".join(way[n] for n in said))
    for source in {kv["source"] for _, kv, _ in runs}:
        axes.axvline(source / 1024, color="black", ls=":")
    axes.set_yscale("log" if all(gap > 0 for *_, gap in runs) else "linear")
    axes.margins(y=0.1)
    axes.set(xlabel="KV cache, KiB a token (dotted: the source's)", xlim=(0, None),
             ylabel="loss above the source's, nats/token")
    axes.grid(alpha=0.3)
    axes.figure.legend(loc="outside right upper")


def _plot_training(figure, steps: Sequence[Mapping[str, Any]]) -> None:
    """The losses by step, and how open the masks of each block are (figure 4 of the paper)."""
    steps = [record for record in steps if record["stage"] == steps[-1]["stage"]]
    masked = "mask_layers" in steps[0]
    axes = figure.subplots(1, 1 + masked, squeeze=False)[0]
    for name, style in (("kl", "-"), ("bild", "--"), ("cross_entropy", ":")):
        if name in steps[0]:
            axes[0].plot([r["step"] for r in steps], [r[name] for r in steps], style, label=name,
                         marker="." if len(steps) < 50 else "")
    axes[0].set(xlabel="step", ylabel="loss, nats/token", yscale="log")
    axes[0].legend()
    if masked:
        image = axes[1].imshow(np.array([r["mask_layers"] for r in steps]).T, cmap="gray",
                               aspect="auto", origin="lower", vmin=0, vmax=1,
                               interpolation="nearest")
        axes[1].set(xlabel="step", ylabel="block")
        figure.colorbar(image, label="share of masks that are open")


def _plot_conversion(figure, report: Mapping[str, Any]) -> None:
    """How well the heads of the middle block fit in their groups, before and after they are
    aligned (figure 3 of the paper); the errors by block."""
    layers, method = report["layers"], report["method"]
    i = len(layers) // 2
    groups, pairs = layers[i]["groups"], layers[i].get("pairs", {})
    what = {"energy": "share of energy that stays if two share"}.get(
        method["group"], f"mean cosine of two heads' {method['group']}s"
        if method["metric"] == "cos" else f"minus mean square distance of {method['group']}s")
    curves = {}
    if "hidden_state_error" in layers[0]:
        curves["written model, on held-out text"] = (
            [layer["hidden_state_error"] for layer in layers], ".-")
    for name, style in (("before", ".:"), ("after", ".--")):
        if "refit" in layers[0]:
            curves[f"{name} the refit, on calibration text"] = (
                [layer["refit"][name] for layer in layers], style)
    if not pairs and not curves:
        raise KeyError("pairs")
    axes = list(figure.subplots(1, len(pairs) + bool(curves), squeeze=False)[0])
    order: list[int] = sum(groups, [])
    shown = {name: np.array(s_KK)[np.ix_(order, order)] for name, s_KK in pairs.items()}
    for s_KK in shown.values():
        np.fill_diagonal(s_KK, np.nan)  # a head and itself say nothing
    for axis, (name, s_KK) in zip(axes, shown.items(), strict=False):
        image = axis.imshow(s_KK, interpolation="nearest", vmin=np.nanmin([*shown.values()]),
                            vmax=np.nanmax([*shown.values()]))
        axis.set_facecolor("0.7")
        labels = range(0, len(order), max(1, len(order) // 8))
        axis.set_xticks(labels, [order[n] for n in labels])
        axis.set_yticks(labels, [order[n] for n in labels])
        axis.set(xlabel="KV head", title=f"block {i}, heads "
                 + ("as they were" if name == "before" else "aligned"))
        for at in range(0, len(order), len(groups[0])):
            low, high = at - 0.5, at + len(groups[0]) - 0.5
            axis.plot([low, high, high, low, low], [low, low, high, high, low], "r", lw=3)
    if pairs:
        figure.colorbar(image, ax=axes[: len(pairs)], label=what)
    if curves:
        for label, (curve, style) in curves.items():
            axes[-1].plot(curve, style, label=label)
        low, high = axes[-1].dataLim.intervaly
        axes[-1].set(xlabel="block", ylabel="error of its hidden states",
                     yscale="log" if 0 < low < high / 10 else "linear")
        axes[-1].xaxis.get_major_locator().set_params(integer=True)
        axes[-1].legend(loc="upper center", bbox_to_anchor=(0.5, -0.15))


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; returns the exit status: 2 for bad input, with one line on stderr."""
    a = _parse_arguments(argv)
    try:
        method, corpus = method_of_arguments(a), Corpus(a.text, a.eval_text, a.tokens, a.seq_len)
        if a.plot:
            plot(a.plot, "plot.png")
            print("written to plot.png")
        elif a.benchmark:
            _print_benchmark(benchmark(
                a.model, a.kv_heads, a.tokens, a.seq_len, method, a.device))
        elif a.evaluate:
            found = evaluate(a.model, corpus, method.seed, a.device)
            print(f"held-out loss {found['loss_nats_per_token']:.4f} nats/token, "
                  f"{found['held_out_tokens']:,} tokens")
        else:
            report = convert(a.model, a.out, a.kv_heads, corpus, method, a.device,
                             dry_run=a.dry_run, log=lambda line: print(line, flush=True))
            if not a.dry_run:
                _print_table(report, a.out)
    except (ValueError, OSError, MemoryError, RuntimeError) as error:
        if isinstance(error, RuntimeError) and not is_out_of_memory(error):
            raise
        reason = str(error).split("\n")[0] or "not enough memory"
        print(f"error: {reason}", file=sys.stderr)
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
