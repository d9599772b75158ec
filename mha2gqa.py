"""mha2gqa: turn a multi-head-attention LLaMA checkpoint into a grouped-query-attention one.

    python mha2gqa.py MODEL OUT --kv-heads 8 --text c4.jsonl

In multi-head attention (MHA) every query head has a key and a value head of its own, and all of
them wait in the KV cache. In grouped-query attention (GQA) a group of query heads shares one key
and one value head. The plain way from one to the other is to average the heads of a group
(Ainslie et al. 2023); it hurts, because the heads of a trained model live in bases that have
nothing to do with each other. But a head's basis is arbitrary: turn its values and turn the output
projection back, turn its keys and its queries alike, and the model computes the same. So, after
"Align Attention Heads Before Merging Them" (Jin et al. 2024, arXiv 2412.20677), this file

    reads a checkpoint (1) into a LLaMA (2), sums up keys and values on some text (3), finds the
    maps under which heads agree best (4), puts heads that agree into groups (5), maps them,
    averages them (6), trains each block so that it leads to the source's hidden states again, and
    writes a plain GQA checkpoint, block by block (9).

The paper's maps are rotations (`generalized_procrustes`), and it does not train blocks. Rotations
are not all that leaves the model unchanged: `shared_keys` and `shared_values` go one step further.

Two things in one file for the trainer beside it: the masks (7) and the losses (8).

Shape suffixes: B batch, T time, N calibration tokens, L layers, D hidden, H query heads, K source
KV heads, G target KV heads, M units a group, Q query heads a unit, E head dim, P = E/2 RoPE planes,
V vocabulary; in the annealer R restarts, S steps.
A *unit* is one source KV head with the Q = H/K query heads that read it; a group is M = K/G units.
"""

import argparse
import contextlib
import dataclasses
import functools
import gzip
import json
import lzma
import math
import os
import random
import re
import shutil
import signal
import sys
import threading
import time
import warnings
import zipfile
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

PathLike = str | os.PathLike

# ---- 1 config and checkpoints --------------------------------------------------------------------

# The block of these model types is LLaMA's. Qwen2 has biases on q, k and v by definition.
MODEL_TYPES = ("llama", "mistral", "qwen2")
ROPE_FIELDS = {
    "default": (),
    "linear": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
}
# What other architectures call the tensors that this one does not have.
FOREIGN_TENSORS = {
    "QK-norm": ("q_norm", "k_norm"),
    "fused qkv": ("qkv_proj", "W_pack", "c_attn", "query_key_value"),
    "multi-head latent attention (MLA)": ("kv_a_proj",),
    "quantised weights": ("qweight", "weight_scale"),
}
FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
COPIED = ("tokenizer*", "special_tokens_map.json", "added_tokens.json", "vocab.json", "merges.txt",
          "chat_template*", "generation_config.json", "LICENSE*")


@dataclasses.dataclass(frozen=True)
class LlamaConfig:
    """A model's shape; the fields are config.json's own keys (defaults: transformers' for llama).

    `num_key_value_heads` None means MHA, `head_dim` None means hidden_size / num_attention_heads.
    `rope_scaling` is None or a dict with `rope_type` linear or llama3 and that type's fields.
    `raw` is config.json as it was read: `to_json` gives it back with its unknown keys.
    Raises ValueError for sizes that do not fit together.
    """

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int | None = None
    head_dim: int | None = None
    max_position_embeddings: int = 2048
    rms_norm_eps: float = 1e-6
    rope_theta: float = 10000.0
    rope_scaling: Mapping | None = None
    hidden_act: str = "silu"
    attention_bias: bool = False
    mlp_bias: bool = False
    tie_word_embeddings: bool = False
    model_type: str = "llama"
    bos_token_id: int | None = None
    eos_token_id: int | Sequence[int] | None = None
    raw: Mapping = dataclasses.field(default_factory=dict, repr=False, compare=False)

    def __post_init__(self):
        for field in dataclasses.fields(self):
            if field.type in (int, float, bool):
                check_type(field.name, getattr(self, field.name), field.type)
        for name, default in (("num_key_value_heads", self.num_attention_heads),
                              ("head_dim", self.hidden_size // self.num_attention_heads)):
            if getattr(self, name) is None:
                object.__setattr__(self, name, default)
            check_type(name, getattr(self, name), int)
        check_type("num_attention_heads * head_dim", self.num_attention_heads * self.head_dim, int)
        if self.num_attention_heads % self.num_key_value_heads:
            raise ValueError(
                f"num_key_value_heads {self.num_key_value_heads} does not divide "
                f"num_attention_heads {self.num_attention_heads}"
            )
        if self.head_dim % 2:
            raise ValueError(f"head_dim is {self.head_dim}, but RoPE needs an even one")
        if not all(type(i) is int and 0 <= i < self.vocab_size for i in self.eos_token_ids):
            raise ValueError(f"eos_token_id is {self.eos_token_id!r}, expected token ids or null")

    @property
    def eos_token_ids(self) -> list[int]:
        ids = self.eos_token_id
        return [] if ids is None else list(ids) if isinstance(ids, (list, tuple)) else [ids]

    @property
    def qkv_bias(self) -> bool:
        return self.model_type == "qwen2" or self.o_bias

    @property
    def o_bias(self) -> bool:
        return self.model_type == "llama" and self.attention_bias

    @property
    def ffn_bias(self) -> bool:
        return self.model_type == "llama" and self.mlp_bias

    def to_json(self) -> dict:
        """The content of config.json: what was read, with only num_key_value_heads changed."""
        if self.raw:
            return {**self.raw, "num_key_value_heads": self.num_key_value_heads}
        fields = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        del fields["raw"]
        if self.model_type == "mistral":
            fields["sliding_window"] = None
        return {"architectures": [f"{self.model_type.capitalize()}ForCausalLM"], **fields}


def check_type(name: str, value, kind: type) -> None:
    """Raise ValueError unless value is a bool, a positive finite number, or an int below 10^9."""
    if kind is bool:
        fits = isinstance(value, bool)
    else:
        fits = type(value) in (int, kind) and 0 < value < (10**9 if kind is int else math.inf)
    if not fits:
        expected = {int: "a positive integer", float: "a positive number", bool: "true or false"}
        raise ValueError(f"{name} is {value!r}, expected {expected[kind]}")


def parse_config(raw: Mapping) -> LlamaConfig:
    """The config of a parsed config.json; raises ValueError that names what is not supported."""
    refuse_unsupported(raw)
    # Old files keep rope_theta at the top and the rest in rope_scaling, new ones all in
    # rope_parameters; transformers lets rope_scaling win, and the nested rope_theta.
    rope = dict(raw.get("rope_scaling") or raw.get("rope_parameters") or {})
    kind = rope.setdefault("rope_type", rope.get("type", "default"))
    if str(kind) not in ROPE_FIELDS:
        raise ValueError(f"not supported: rope type {kind!r} (supported: {', '.join(ROPE_FIELDS)})")
    for name in ROPE_FIELDS[kind]:
        check_type(f"{name} of rope type {kind!r}", rope.get(name), float)
    known = {f.name for f in dataclasses.fields(LlamaConfig)} - {"raw", "rope_scaling"}
    fields = {name: raw[name] for name in known if raw.get(name) is not None}
    fields["rope_theta"] = rope.get("rope_theta", raw.get("rope_theta", 10000.0))
    required = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers",
                "num_attention_heads")
    if absent := [name for name in required if name not in fields]:
        raise ValueError(f"no {', '.join(absent)}")
    return LlamaConfig(**fields, rope_scaling=None if kind == "default" else rope, raw=raw)


def refuse_unsupported(raw: Mapping) -> None:
    """Raise ValueError for what makes a model another one than LLaMA's block computes."""
    kind = raw.get("model_type")
    rope = raw.get("rope_scaling") or raw.get("rope_parameters") or {}
    layer_types = raw.get("layer_types") or []
    for value, kind_wanted in ((rope, Mapping), (layer_types, list)):
        if not isinstance(value, kind_wanted):
            raise ValueError(f"found {value!r} where config.json has an object or a list")
    # subtle: a mistral config without the key has a window of 4096 in transformers.
    window = kind == "mistral" and raw.get("sliding_window", 4096) is not None
    window |= kind == "qwen2" and bool(raw.get("use_sliding_window"))
    partial = rope.get("partial_rotary_factor", raw.get("partial_rotary_factor")) or 1
    found = {
        f"model_type {kind!r} (supported: {', '.join(MODEL_TYPES)})": kind not in MODEL_TYPES,
        f"hidden_act {raw.get('hidden_act')!r} (supported: silu)":
            raw.get("hidden_act", "silu") != "silu",
        "quantised weights (quantization_config)": bool(raw.get("quantization_config")),
        "QK-norm": any(raw.get(key) for key in ("use_qk_norm", "qk_norm", "qk_layernorm")),
        "multi-head latent attention (MLA)": bool(raw.get("kv_lora_rank")),
        "partial rotary embedding": partial != 1,
        "one RoPE for each layer type": any(isinstance(v, Mapping) for v in rope.values()),
        "sliding window (a mistral model without one has sliding_window null)":
            window or layer_types != ["full_attention"] * len(layer_types),
    }
    for what, is_there in found.items():
        if is_there:
            raise ValueError(f"not supported: {what}")


def load_checkpoint(path: PathLike) -> tuple[LlamaConfig, dict[str, Tensor]]:
    """Read a Hugging Face model directory: `(config, weights)`, weights by parameter name.

    The tensors are mapped from their files, so that a page is read when it is first used and
    costs no anonymous memory: take what you need, when you need it. Names and shapes are those
    of `Llama(config)`; left-over `rotary_emb.inv_freq` and a stored copy of tied embeddings are
    dropped.
    Raises ValueError, with the file and what to do, for anything that is not such a checkpoint.
    """
    folder = Path(path)
    if not folder.is_dir():
        raise ValueError(f"{folder}: no such directory (MODEL is one on this machine)")
    raw = read_json(folder / "config.json")
    try:
        config = parse_config(raw)
    except ValueError as error:
        raise ValueError(f"{folder / 'config.json'}: {error}") from None
    weights = {}
    for file in weight_files(folder):
        weights |= read_tensors(file)
    try:
        weights = tidy_weights(config, weights)
        check_weights(config, weights)
    except ValueError as error:
        raise ValueError(f"{folder}: {error}") from None
    return config, weights


def read_json(file: Path) -> dict:
    """The object in a JSON file; raises ValueError with the file's name if there is none."""
    if not file.is_file():
        raise ValueError(f"{file}: no such file")
    try:
        value = json.loads(file.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{file}: not JSON ({error})") from None
    if not isinstance(value, dict):
        raise ValueError(f"{file}: expected a JSON object")
    return value


def weight_files(folder: Path) -> list[Path]:
    """The checkpoint's weight files: safetensors if there are any, else pytorch_model*.bin."""
    for name in ("model.safetensors", "pytorch_model.bin"):
        if (folder / f"{name}.index.json").is_file():
            return indexed_files(folder / f"{name}.index.json")
        if (folder / name).is_file():
            return [folder / name]
    for pattern in ("*.safetensors", "pytorch_model*.bin"):
        if files := sorted(folder.glob(pattern)):
            return files
    raise ValueError(f"{folder}: no *.safetensors and no pytorch_model*.bin")


def indexed_files(index: Path) -> list[Path]:
    """The files that an index of shards names; raises ValueError if one lies elsewhere."""
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise ValueError(f"{index}: expected a weight_map of names to files")
    for name in weight_map.values():
        # By name, not by resolved path: a hub cache is full of honest symbolic links.
        if not isinstance(name, str) or name in ("", "..") or "\0" in name:
            raise ValueError(f"{index}: {name!r} is not the name of a file")
        if Path(name).name != name:
            raise ValueError(f"{index}: {name!r} is outside the directory")
    return [index.with_name(name) for name in sorted(set(weight_map.values()))]


def read_tensors(file: Path) -> dict[str, Tensor]:
    """All tensors of one weight file, mapped and not read."""
    from safetensors.torch import load_file

    if not os.access(file, os.R_OK):
        raise ValueError(f"{file}: missing or not readable; download it again")
    try:
        if file.suffix == ".safetensors":
            return load_file(file)
        mapped = zipfile.is_zipfile(file)  # older files, which are no archives, are read whole
        tensors = torch.load(file, map_location="cpu", weights_only=True, mmap=mapped)
        if not all(isinstance(n, str) and w.layout == torch.strided for n, w in tensors.items()):
            raise TypeError("it holds other things")
        return dict(tensors)
    except Exception as error:  # a broken file can make torch.load raise almost anything
        reason = re.split(r"[.\n]", str(error).strip())[0] or type(error).__name__
        raise ValueError(f"{file}: truncated, corrupt or not a plain file of tensors ({reason}); "
                         "download it again, as safetensors if there are") from None


def tidy_weights(config: LlamaConfig, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The weights without what old files carry along; one name for tied embeddings."""
    weights = {n: w for n, w in weights.items() if not n.endswith("rotary_emb.inv_freq")}
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


def check_weights(config: LlamaConfig, weights: Mapping[str, Tensor]) -> None:
    """Raise ValueError unless the names, shapes and dtypes are those of `Llama(config)`."""
    layers = {name.split(".")[2] for name in weights if name.startswith("model.layers.")}
    if len(layers) != config.num_hidden_layers:
        raise ValueError(f"{len(layers)} layers among the weights, but num_hidden_layers is "
                         f"{config.num_hidden_layers} in config.json")
    with torch.device("meta"):
        expected = {name: p.shape for name, p in Llama(config).named_parameters()}
    for name in weights.keys() - expected.keys():
        for what, parts in FOREIGN_TENSORS.items():
            if any(part in name for part in parts):
                raise ValueError(f"not supported: {what} ({name})")
    for what, names in (
        ("unknown tensor", weights.keys() - expected.keys()),
        ("missing tensor", expected.keys() - weights.keys()),
    ):
        if names:
            more = f" and {len(names) - 1} more" if len(names) > 1 else ""
            raise ValueError(f"{what} {min(names)}{more}; is config.json this checkpoint's?")
    for name, shape in expected.items():
        dtype, found = weights[name].dtype, weights[name].shape
        if dtype not in FLOATS:
            raise ValueError(f"tensor {name} is {dtype}, expected float16, bfloat16 or float32")
        if found != shape:
            raise ValueError(f"tensor {name} has shape {list(found)}, expected {list(shape)} "
                             "from config.json")


def save_checkpoint(
    path: PathLike,
    config: LlamaConfig,
    weights: Mapping[str, Tensor],
    tokenizer_from: PathLike | None = None,
) -> None:
    """Write a Hugging Face directory: a safetensors shard for each block, index, config.json.

    `tokenizer_from` is a directory whose tokenizer and generation files are copied. `path` is there
    whole or not at all: all is written into a sibling and renamed. Raises ValueError if `path`
    exists and is not empty or the disk is too small, OSError if writing fails.
    """
    check_weights(config, weights)
    blocks = [block_weights(weights, i) for i in range(config.num_hidden_layers)]
    with new_directory(path, n_bytes(weights.values())) as folder:
        for i, block in enumerate(blocks):
            save_shard(folder, config, i, {block_prefix(i) + n: w for n, w in block.items()})
        save_shard(folder, config, len(blocks), outer_weights(weights))
        finish_checkpoint(folder, config, tokenizer_from)


def block_prefix(i: int) -> str:
    """What the names of block i's tensors begin with."""
    return f"model.layers.{i}."


def block_weights(weights: Mapping[str, Tensor], i: int) -> dict[str, Tensor]:
    """The weights of block i, named as the block itself names them."""
    prefix = block_prefix(i)
    return {n.removeprefix(prefix): w for n, w in weights.items() if n.startswith(prefix)}


def outer_weights(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Embedding, last norm and head."""
    return {n: w for n, w in weights.items() if not n.startswith("model.layers.")}


def n_bytes(tensors) -> int:
    """Bytes of some tensors together."""
    return sum(t.numel() * t.element_size() for t in tensors)


def save_shard(folder: Path, config: LlamaConfig, i: int, weights: Mapping[str, Tensor]) -> None:
    """Write shard i of L + 1: block i, or for i = L what stands outside the blocks."""
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    file = folder / f"model-{i + 1:05d}-of-{config.num_hidden_layers + 1:05d}.safetensors"
    try:
        save_file({n: w.contiguous().cpu() for n, w in weights.items()}, file, {"format": "pt"})
    except SafetensorError as error:  # what safetensors makes of a full disk
        raise OSError(f"{file}: cannot be written ({error})") from None


def finish_checkpoint(folder: Path, config: LlamaConfig, tokenizer_from=None) -> None:
    """Write the index of the shards in `folder` and config.json; copy the tokenizer's files."""
    from safetensors import safe_open

    weight_map, total = {}, 0
    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, "pt") as shard:
            tensors = {name: shard.get_tensor(name) for name in shard.keys()}  # noqa: SIM118
        weight_map |= dict.fromkeys(tensors, file.name)
        total += n_bytes(tensors.values())
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    write_json(folder / "model.safetensors.index.json", index)
    write_json(folder / "config.json", config.to_json())
    for file in folder.glob("*.safetensors"):  # safetensors lets only their owner read them
        shutil.copymode(folder / "config.json", file)
    for pattern in COPIED if tokenizer_from else ():
        for file in sorted(Path(tokenizer_from).glob(pattern)):
            if file.is_file():
                shutil.copyfile(file, folder / file.name)


def write_json(file: Path, value) -> None:
    """Write a value as an indented JSON file."""
    file.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def check_new_directory(path: PathLike, size: int) -> Path:
    """`path` without links; ValueError unless a directory of `size` bytes can be made there."""
    path = Path(os.path.realpath(path))
    if path.is_symlink():  # still: it leads back to itself
        raise ValueError(f"{path}: a link to itself; choose another one")
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
def new_directory(path: PathLike, size: int = 0) -> Iterator[Path]:
    """A directory to write into: it becomes `path` if the with block ends well, or else vanishes.

    Raises ValueError as `check_new_directory` says.
    """
    path = check_new_directory(path, size)
    temporary = path.with_name(f".mha2gqa-{time.time_ns():x}")
    try:
        temporary.mkdir()  # within the try: a signal can come the moment it returns
        yield temporary
        if path.exists():
            shutil.copymode(path, temporary)
        temporary.replace(path)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise


# ---- 2 the model ---------------------------------------------------------------------------------


class Llama(nn.Module):
    """LLaMA with the parameter names of its Hugging Face checkpoints, MHA or GQA.

    `Llama(config).load_state_dict(weights)` takes what `load_checkpoint` gave; `model(tokens_BT)`
    gives logits_BTV for token ids of int64. There is nothing to switch with `.eval()`.
    """

    def __init__(self, config: LlamaConfig):
        super().__init__()
        self.config = config
        self.model = nn.Module()
        self.model.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.model.layers = nn.ModuleList(Block(config) for _ in range(config.num_hidden_layers))
        self.model.norm = RMSNorm(config)
        if not config.tie_word_embeddings:
            self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)

    def forward(
        self, tokens_BT: Tensor, document_BT: Tensor | None = None, logits: bool = True
    ) -> Tensor:
        """Logits (B, T, V), or with `logits=False` the normed hidden states (B, T, D) below them.

        `document_BT` numbers the documents of packed rows: attention and positions then never
        cross from one document into its neighbour. None: each row is one document.
        """
        x_BTD = self.model.embed_tokens(tokens_BT)
        rope, mask = rope_and_mask(self.config, x_BTD, document_BT)
        for block in self.model.layers:
            x_BTD = block(x_BTD, rope, mask)
        x_BTD = self.model.norm(x_BTD)
        if not logits:
            return x_BTD
        return F.linear(x_BTD, self.head.weight)

    @property
    def head(self) -> nn.Module:
        """The module whose weight (V, D) makes logits of hidden states."""
        return self.model.embed_tokens if self.config.tie_word_embeddings else self.lm_head


class Block(nn.Module):
    def __init__(self, config: LlamaConfig):
        super().__init__()
        self.input_layernorm = RMSNorm(config)
        self.self_attn = Attention(config)
        self.post_attention_layernorm = RMSNorm(config)
        self.mlp = MLP(config)

    def forward(self, x_BTD, rope, mask=None):
        x_BTD = x_BTD + self.self_attn(self.input_layernorm(x_BTD), rope, mask)
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

    def forward(self, x_BTD, rope, mask=None):
        def heads(y):  # (B, T, heads·E) -> (B, heads, T, E)
            return y.unflatten(-1, (-1, self.head_dim)).transpose(1, 2)

        q_BHTE = apply_rope(heads(self.q_proj(x_BTD)), rope)
        k_BKTE = apply_rope(heads(self.k_proj(x_BTD)), rope)
        y_BHTE = F.scaled_dot_product_attention(
            q_BHTE, k_BKTE, heads(self.v_proj(x_BTD)), mask, is_causal=mask is None, enable_gqa=True
        )
        return self.o_proj(y_BHTE.transpose(1, 2).flatten(2))


class MLP(nn.Module):
    def __init__(self, config: LlamaConfig):
        super().__init__()
        hidden, inner, bias = config.hidden_size, config.intermediate_size, config.ffn_bias
        self.gate_proj = nn.Linear(hidden, inner, bias=bias)
        self.up_proj = nn.Linear(hidden, inner, bias=bias)
        self.down_proj = nn.Linear(inner, hidden, bias=bias)

    def forward(self, x):
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class RMSNorm(nn.Module):
    def __init__(self, config: LlamaConfig):
        super().__init__()
        self.eps = config.rms_norm_eps
        self.weight = nn.Parameter(torch.ones(config.hidden_size))

    def forward(self, x):
        return rms_norm(x, self.weight, self.eps)


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x of length 1 a dimension on average, times the weight (Zhang and Sennrich 2019)."""
    y = wide(x)
    y = y * torch.rsqrt(y.square().mean(-1, keepdim=True) + eps)
    return weight * y.to(x.dtype)


def wide(x: Tensor) -> Tensor:
    """x in float32 at least."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def inverse_frequencies(config: LlamaConfig, device=None) -> Tensor:
    """RoPE's θ_p (P,), radians a position, in float32 as transformers has them."""
    exponent_P = torch.arange(0, config.head_dim, 2, device=device).float() / config.head_dim
    theta_P = 1.0 / config.rope_theta**exponent_P
    rope = config.rope_scaling or {}
    if rope.get("rope_type") == "linear":
        return theta_P / rope["factor"]
    if rope.get("rope_type") == "llama3":
        # Long waves are slowed by the factor, short ones kept, those between blended.
        low, high = rope["low_freq_factor"], rope["high_freq_factor"]
        turns_P = rope["original_max_position_embeddings"] * theta_P / (2 * math.pi)
        keep_P = ((turns_P - low) / (high - low)).clamp(0, 1)
        return (1 - keep_P) * theta_P / rope["factor"] + keep_P * theta_P
    return theta_P


def rope_and_mask(config: LlamaConfig, x_BTD: Tensor, document_BT: Tensor | None = None):
    """((cos, sin) of shape (B or 1, 1, T, P), attention mask (B, 1, T, T) or None if just causal).

    subtle: computed here from the config at every call, since a buffer would be lost on the way
    meta device -> to_empty -> load, and angles rounded to bf16 would be wrong.
    """
    time_T = torch.arange(x_BTD.shape[1], device=x_BTD.device)
    position_BT, mask = time_T[None], None
    if document_BT is not None:
        same_BTT = document_BT[:, :, None] == document_BT[:, None, :]
        position_BT = time_T - same_BTT.byte().argmax(-1)  # argmax: the document's first column
        mask = (same_BTT & (time_T[:, None] >= time_T))[:, None]
    angle = position_BT[:, None, :, None].float() * inverse_frequencies(config, x_BTD.device)
    return (angle.cos().to(x_BTD.dtype), angle.sin().to(x_BTD.dtype)), mask


def apply_rope(x_BHTE: Tensor, rope: tuple[Tensor, Tensor]) -> Tensor:
    """Turn plane p, the complex number x_p + i·x_(p + E/2), by exp(i·position·θ_p)."""
    (x, y), (cos, sin) = x_BHTE.chunk(2, dim=-1), rope
    return torch.cat([x * cos - y * sin, y * cos + x * sin], dim=-1)


# ---- 3 calibration -------------------------------------------------------------------------------


def read_documents(path: PathLike) -> list[str]:
    """A text file's documents: the "text" of each JSONL record, or the whole of any other file.

    .gz and .xz are unpacked. Raises ValueError with file and line for what cannot be read.
    """
    path = Path(path)
    if not path.exists() or path.is_dir():
        raise ValueError(f"{path}: {'is a directory' if path.is_dir() else 'no such file'}")
    unpack = {".gz": gzip.open, ".xz": lzma.open}.get(path.suffix)
    kind = Path(path.stem).suffix if unpack else path.suffix
    try:
        with (unpack or open)(path, "rt", encoding="utf-8-sig") as file:
            if kind in (".jsonl", ".json"):
                lines = enumerate(file, 1)
                documents = [record_text(path, n, line) for n, line in lines if line.strip()]
            else:
                documents = [file.read()]
    except (UnicodeError, EOFError, OSError, lzma.LZMAError, zlib.error) as error:
        formats = ".jsonl or plain text in UTF-8, .gz or .xz of either"
        raise ValueError(f"{path}: cannot be read ({error}); expected {formats}") from None
    documents = [text for text in documents if text.strip()]
    if not documents:
        raise ValueError(f"{path}: holds no text")
    return documents


def record_text(path: Path, number: int, line: str) -> str:
    """The text of one JSONL record; raises ValueError with file and line if it has none."""
    try:
        record = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}, line {number}: not JSON ({error.args[0]})") from None
    if not isinstance(record, dict) or not isinstance(record.get("text"), str):
        raise ValueError(f'{path}, line {number}: expected an object with a "text" string')
    return record["text"].encode("utf-8", "replace").decode()  # web text has lone surrogates


def load_tokenizer(path: PathLike) -> Callable[[list[str]], list[list[int]]]:
    """The function from texts to token ids of a model directory, BOS as its files say, no EOS.

    `tokenizer.json` puts BOS by its own post-processor; with `tokenizer.model` BOS comes first
    unless tokenizer_config.json has add_bos_token false. Raises ValueError without either.
    """
    folder = Path(path)
    if (folder / "tokenizer.json").is_file():
        return from_tokenizer_json(folder / "tokenizer.json")
    if (folder / "tokenizer.model").is_file():
        return from_tokenizer_model(folder / "tokenizer.model", folder / "tokenizer_config.json")
    raise ValueError(f"{folder}: no tokenizer.json and no tokenizer.model")


def from_tokenizer_json(file: Path) -> Callable[[list[str]], list[list[int]]]:
    """`load_tokenizer` of a file of the tokenizers package."""
    from tokenizers import Tokenizer

    try:
        tokenizer = Tokenizer.from_file(str(file))
    except Exception as error:  # tokenizers raises nothing narrower
        raise ValueError(f"{file}: cannot be read ({error})") from None
    # subtle: a tokenizer.json may have been saved with a truncation to a few hundred tokens.
    tokenizer.no_truncation()
    tokenizer.no_padding()

    def encode(texts):
        try:
            return [encoding.ids for encoding in tokenizer.encode_batch(texts)]
        except Exception as error:  # as above
            raise ValueError(f"{file}: cannot encode the text ({error})") from None

    return encode


def from_tokenizer_model(file: Path, config_file: Path) -> Callable[[list[str]], list[list[int]]]:
    """`load_tokenizer` of a file of the sentencepiece package."""
    import sentencepiece

    tokenizer = sentencepiece.SentencePieceProcessor()
    try:
        tokenizer.Load(str(file))
    except (OSError, RuntimeError) as error:
        raise ValueError(f"{file}: cannot be read ({error})") from None
    settings = read_json(config_file) if config_file.is_file() else {}
    add_bos = settings.get("add_bos_token") is not False and tokenizer.bos_id() >= 0
    return lambda texts: tokenizer.encode(texts, add_bos=add_bos)


def pack_rows(
    documents: Sequence[str],
    encode: Callable[[list[str]], list[list[int]]],
    config: LlamaConfig,
    n_tokens: int,
    seq_len: int,
    seed: int,
) -> Tensor:
    """Token rows (rows, seq_len) of documents shuffled by the seed, each closed by EOS, end to end.

    At most `n_tokens` tokens; what does not fill a row is left. Raises ValueError for a token that
    the model does not have.
    """
    end = config.eos_token_ids[:1]
    documents = random.Random(seed).sample(documents, len(documents))
    ids, read = [np.zeros(0, np.int64)], 0
    while documents and read < n_tokens:
        batch, size = [], 0
        while documents and size < 1_000_000:
            # A tokenizer takes a hundred bytes a character: of a huge file, no more than can count.
            batch.append(documents.pop()[: 16 * n_tokens])
            size += len(batch[-1])
        for tokens in encode(batch):
            ids.append(np.array(tokens + end, np.int64))
            read += len(ids[-1])
    stream = np.concatenate(ids)[:n_tokens]
    if len(stream) and stream.max() >= config.vocab_size:
        raise ValueError(
            f"the tokenizer gives token {stream.max()}, but the model's vocabulary has only "
            f"{config.vocab_size}; do the tokenizer files belong to this model?"
        )
    n_rows = len(stream) // seq_len
    return torch.from_numpy(stream[: n_rows * seq_len].reshape(n_rows, seq_len))


def text_rows(
    model_dir: PathLike,
    config: LlamaConfig,
    text: PathLike | Sequence[PathLike],
    eval_text: PathLike | Sequence[PathLike] = (),
    tokens: int = 262_144,
    seq_len: int | None = None,
    seed: int = 0,
) -> tuple[Tensor, Tensor]:
    """(calibration rows, held-out rows), both (rows, seq_len), of `tokens` tokens of the text.

    Held out are the rows of `eval_text` or else the first 10 % of those read, and never more than
    65,536 tokens. `seq_len` is min(2048, max_position_embeddings) unless given. With `eval_text`
    alone there are no calibration rows. Warns if the text is shorter than `tokens`; raises
    ValueError for bad files or too little text.
    """
    limit = config.max_position_embeddings
    seq_len = min(2048, limit) if seq_len is None else seq_len
    if not 2 <= seq_len <= limit:
        raise ValueError(f"sequence length {seq_len}: expected 2 to {limit} for this model")
    if tokens < 2 * seq_len:
        raise ValueError(f"{tokens} tokens: expected at least two rows of {seq_len}")
    encode = load_tokenizer(model_dir)

    def rows(files, n_tokens, n_least):
        files = [files] if isinstance(files, PathLike) else files
        documents = [document for file in files for document in read_documents(file)]
        found = pack_rows(documents, encode, config, n_tokens, seq_len, seed)
        if len(found) < n_least:
            raise ValueError(f"too little text in {', '.join(map(str, files)) or 'no files'}: "
                             f"{n_least} rows of {seq_len} tokens are needed")
        return found

    held_out = rows(eval_text, max(seq_len, 65_536), 1) if eval_text else None
    if held_out is not None and not text:
        return held_out[:0], held_out
    calibration = rows(text, tokens, 1 if eval_text else 2)
    if len(calibration) < tokens // seq_len:
        found = f"the text has {calibration.numel():,} tokens in whole rows of {seq_len}"
        warnings.warn(f"{found}, not the {tokens:,} asked for: using those", stacklevel=2)
    if held_out is None:
        n = max(1, min(len(calibration) // 10, 65_536 // seq_len))
        held_out, calibration = calibration[:n], calibration[n:]  # first: more tokens add to them
    return calibration, held_out


def value_gram(v_NKE: Tensor) -> Tensor:
    """Gram blocks C_ij = Σ_n v_i[n] v_j[n]ᵀ of all pairs of heads: (K, K, E, E)."""
    n, k, e = v_NKE.shape
    v = v_NKE.reshape(n, k * e)
    return (v.T @ v).view(k, e, k, e).transpose(1, 2)


def key_gram(k_NKE: Tensor) -> Tensor:
    """Hermitian M_p[i, j] = Σ_n z_i[n] conj(z_j[n]) of each RoPE plane: complex (P, K, K).

    z_p = k_p + i·k_(p + E/2). The same before and after RoPE, which turns both heads alike.
    """
    z_PKN = torch.complex(*k_NKE.chunk(2, dim=-1)).permute(2, 1, 0)
    return z_PKN @ z_PKN.mH


def query_power(q_NHE: Tensor) -> Tensor:
    """Σ_n |q|² (H, P) of each head in each RoPE plane."""
    return sum(half.square().sum(0) for half in q_NHE.chunk(2, dim=-1))


def block_grams(
    config: LlamaConfig, weights: Mapping[str, Tensor], x_BTD: Tensor, metric: str
) -> dict[str, Tensor]:
    """What a block's alignment needs to know of the hidden states that enter it.

    "key" and "value": the Grams of its heads. "query": Σ_n |q|² (K, P), the power that the query
    heads of each unit have in each RoPE plane. `metric` "cos" first brings every head's key and
    value vector to length 1 (eq. 7, 8), "dist" does not. Products of some thousand tokens are made
    in float32 at least, their sums in float64.
    """
    sums = {"value": ("v_proj", value_gram), "key": ("k_proj", key_gram),
            "query": ("q_proj", query_power)}
    grams = dict.fromkeys(sums, 0)
    for rows in x_BTD.split(max(1, 4096 // x_BTD.shape[1])):
        y_ND = rms_norm(rows, weights["input_layernorm.weight"].to(rows), config.rms_norm_eps)
        for name, (module, make) in sums.items():
            weight, bias = (weights.get(f"self_attn.{module}.{p}") for p in ("weight", "bias"))
            y_NKE = F.linear(y_ND, weight.to(rows), None if bias is None else bias.to(rows))
            y_NKE = wide(y_NKE).flatten(0, 1).unflatten(-1, (-1, config.head_dim))
            if metric == "cos" and name != "query":
                y_NKE = F.normalize(y_NKE, dim=-1)
            gram = make(y_NKE)
            grams[name] += gram.to(torch.promote_types(gram.dtype, torch.float64))
    grams["query"] = grams["query"].unflatten(0, (config.num_key_value_heads, -1)).sum(1)
    return grams


# ---- 4 alignment ---------------------------------------------------------------------------------


def polar(a: Tensor) -> Tensor:
    """The unitary q of shape (…, E, E) with the greatest Re⟨a, q⟩: U Vᴴ of a = U S Vᴴ.

    Of a single complex number, which a head is in a RoPE plane, it is the phase a/|a|.
    """
    if a.is_complex() and a.shape[-1] == 1:
        return torch.polar(torch.ones_like(a.real), a.angle())
    u, _, vh = torch.linalg.svd(a)
    return u @ vh


def procrustes(a_NE: Tensor, b_NE: Tensor) -> Tensor:
    """The orthogonal q (E, E) with the least ‖a q − b‖ (Schönemann 1966; eq. 5, 6).

    Raises ValueError unless a and b are matrices of one shape.
    """
    check_pair(a_NE, b_NE)
    return polar(a_NE.mT @ b_NE)


def rope_procrustes(a_NE: Tensor, b_NE: Tensor) -> Tensor:
    """The same among the rotations that commute with RoPE: one angle for each plane (eq. 14).

    Returns q (E, E) for a q ≈ b. Plane p is dims (p, p + E/2), as in Hugging Face checkpoints.
    Raises ValueError unless a and b are matrices of one shape with an even E.
    """
    check_pair(a_NE, b_NE)
    if a_NE.shape[1] % 2:
        raise ValueError(f"E is {a_NE.shape[1]}, but RoPE needs an even one")
    gram_P22 = key_gram(torch.stack([b_NE, a_NE], dim=1))
    c_P = polar(gram_P22[:, 0, 1, None, None]).flatten()  # the phase of Σ b conj(a)
    cos, sin = c_P.real.diag(), c_P.imag.diag()
    return torch.cat([torch.cat([cos, sin], dim=1), torch.cat([-sin, cos], dim=1)])


def check_pair(a_NE: Tensor, b_NE: Tensor) -> None:
    """Raise ValueError unless both are matrices (N, E)."""
    if a_NE.ndim != 2 or a_NE.shape != b_NE.shape:
        found = f"{list(a_NE.shape)} and {list(b_NE.shape)}"
        raise ValueError(f"expected two matrices (N, E) of one shape, found {found}")


def inner_products(gram: Tensor, maps: Tensor) -> Tensor:
    """Re⟨Y_i, Y_j⟩ (…, M, M) of the mapped heads Y_i = X_i q_i: Re tr(q_iᴴ C_ij q_j)."""
    left = maps.mH[..., :, None, :, :] @ gram  # (…, M, M, E, E)
    return (left * maps.mT[..., None, :, :, :]).sum((-1, -2)).real


def generalized_procrustes(gram: Tensor, rope: bool = False) -> tuple[Tensor, Tensor]:
    """Turn the M heads of a group so that they agree best (algorithm 1, in Gram space).

    gram: (…, M, M, E, E) real, blocks C_ij = X_iᵀ X_j; with rope=True (…, P, M, M) complex,
    Σ_n z_i conj(z_j), a problem of its own for each plane. Leading dims are independent problems.
    Returns (maps, objective history). maps: (…, M, E, E) orthogonal, X_i q_i agree, or (…, P, M)
    complex of modulus 1, c_i z_i agree; the first head's map is the identity. history: (rounds + 1,
    …) or (rounds + 1, …, P) values of Σ_(i<j) ⟨Y_i, Y_j⟩, which never fall.
    Raises ValueError for a Gram of another shape.

    One round turns each head in turn onto the sum of the others, as they now stand: an exact
    maximum in that head's map. Algorithm 1 turns all heads onto one mean that contains them; it
    climbs as surely, but takes several times as many rounds. They end when no problem's objective
    rises by a 1e-10th, or after 500.
    """
    if gram.ndim < (3 if rope else 4) or gram.shape[-1] != gram.shape[-2]:
        raise ValueError(f"expected a Gram (…, M, M, E, E) or (…, P, M, M), found {[*gram.shape]}")
    # A RoPE plane is a head dim of one complex number: the same problem with E = 1.
    gram = gram.conj()[..., None, None] if rope else gram
    maps = polar(gram[..., :, 0, :, :])  # pairwise onto the first (eq. 6)
    maps[..., 0, :, :] = torch.eye(gram.shape[-1], dtype=gram.dtype, device=gram.device)
    history = [inner_products(gram, maps).triu(1).sum((-1, -2))]
    for _ in range(500):
        turned, rise = maps, torch.zeros_like(history[-1])
        for i in range(gram.shape[-4]):
            turned, gain = turn_head(gram, turned, i)
            rise += gain
        if not (rise > 1e-10 * history[-1].abs()).any():
            break
        # subtle: rounding can make a problem that has long converged fall; it keeps its maps.
        maps = torch.where((rise > 0)[..., None, None, None], turned, maps)
        history.append(history[-1] + rise.clamp(min=0))
    maps = maps @ maps[..., :1, :, :].mH  # a rotation common to all heads is free
    return (maps[..., 0, 0] if rope else maps), torch.stack(history)


def turn_head(gram: Tensor, maps: Tensor, i: int) -> tuple[Tensor, Tensor]:
    """(the maps with head i turned onto the sum of its group's other heads, what that gains)."""
    onto = (gram[..., i, :, :, :] @ maps).sum(-3) - gram[..., i, i, :, :] @ maps[..., i, :, :]
    turned = maps.clone()
    turned[..., i, :, :] = polar(onto)
    return turned, ((turned - maps)[..., i, :, :] * onto.conj()).sum((-1, -2)).real


TINY = 1e-100  # the energy of heads that are all zero, lest 0/0; all of this is in float64


def shared_keys(gram_PMM: Tensor, power_MP: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The key that serves M heads best: (maps onto it, ways back, share of energy kept).

    One step beyond rotations: in a RoPE plane a key z_i may be scaled by any complex number, if its
    queries are scaled by the inverse's conjugate. So heads need not become alike to share: it is
    enough that each is some multiple of one key s, z_i ≈ a_i s. An error in z_i costs in proportion
    to the power p_i of the queries that read it, so what is wanted is the best √p_i z_i ≈ u_i s:
    u is the leading eigenvector of √p_i M_p[i, j] √p_j, s = Σ conj(u_i) √p_i z_i (Eckart and Young
    1936), and a_i = u_i/√p_i. Both are scaled so that s has the heads' mean power and weights stay
    near their size. The mean of the mapped keys is s. Energy is Σ p_i |z_i|².
    gram: (…, P, M, M), power: (…, M, P); maps and ways back: (…, M, P) complex; share: (…).
    """
    m = power_MP.shape[-2]
    # subtle: a unit without queries would divide 0 by 0.
    root_PM = power_MP.mT.clamp(min=1e-9 * power_MP.max() + TINY).sqrt()
    energy_PM, vector_PMM = torch.linalg.eigh(
        root_PM[..., :, None] * gram_PMM * root_PM[..., None, :])
    best_P, u_PM = energy_PM[..., -1], vector_PMM[..., -1]
    power_P = gram_PMM.diagonal(dim1=-2, dim2=-1).real.mean(-1)
    scale_PM = (power_P.clamp(min=TINY) / best_P.clamp(min=TINY)).sqrt()[..., None]
    kept = (best_P.sum(-1) + TINY) / (energy_PM.sum((-1, -2)) + TINY)
    return (m * scale_PM * root_PM * u_PM.conj()).mT, (u_PM / (scale_PM * root_PM)).mT, kept


def shared_values(gram_MMEE: Tensor, s_MEE: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The value head that serves M heads best: (maps onto it, ways back, share of energy kept).

    The same for values, which may be mapped by any matrix if Wo takes the way back: v_i ≈ s r_i for
    some r_i is enough. An error in v_i costs what Wo makes of it, ‖δv_i S_i‖ with the symmetric
    S_i of `output_root`, so what is wanted is the best v_i S_i ≈ s U_iᵀ: U has the leading E
    eigenvectors of the Gram of all v_i S_i side by side, s = Σ v_i S_i U_i, and r_i = U_iᵀ S_i⁻¹.
    Again s is scaled to the values' mean power, and is the mean of the mapped values. Energy is
    Σ ‖v_i S_i‖². Rows are vectors, as in `transform`: v → v q.
    gram: (…, M, M, E, E); S, maps, ways back: (…, M, E, E); share: (…).
    """
    m, e = s_MEE.shape[-3], s_MEE.shape[-1]
    stacked = s_MEE[..., :, None, :, :] @ gram_MMEE @ s_MEE[..., None, :, :, :]
    energy_X, vector_XX = torch.linalg.eigh(stacked.transpose(-3, -2).flatten(-2).flatten(-3, -2))
    u_MEE = vector_XX[..., -e:].unflatten(-2, (m, e))
    best, power = energy_X[..., -e:].sum(-1), gram_MMEE.diagonal(dim1=-4, dim2=-3)
    power = power.diagonal(dim1=-3, dim2=-2).sum((-1, -2)) / m
    scale_MEE = (power.clamp(min=TINY) / best.clamp(min=TINY)).sqrt()[..., None, None, None]
    kept = (best + TINY) / (energy_X.sum(-1) + TINY)
    return m * scale_MEE * s_MEE @ u_MEE, u_MEE.mT @ torch.linalg.inv(s_MEE) / scale_MEE, kept


def output_root(config: LlamaConfig, weights: Mapping[str, Tensor]) -> Tensor:
    """S_i = (Σ WoᵀWo)^½ (K, E, E) over a unit's query heads: ‖v S_i‖ is what Wo makes of v."""
    heads = (config.num_key_value_heads, -1, config.head_dim)
    wo_KQED = weights["self_attn.o_proj.weight"].double().mT.unflatten(0, heads)
    value, vector = torch.linalg.eigh((wo_KQED @ wo_KQED.mT).sum(1))
    root = value.clamp(min=1e-12 * value.max() + 1e-30).sqrt()  # it is inverted
    return (vector * root[..., None, :]) @ vector.mT


def discarded_energy(grams: Mapping[str, Tensor], s_KEE: Tensor) -> Tensor:
    """What linear alignment loses when two heads share: (K, K), keys plus values.

    The eigenvalues that `shared_keys` and `shared_values` do not keep; those of keys and of values
    each divided by their mean over all pairs. A larger group is judged by the sum over its pairs.
    """
    k, e = s_KEE.shape[:2]
    pairs, lost, energy = torch.combinations(torch.arange(k)), [], []
    for some in pairs.split(64):  # all at once would be a gigabyte
        i, j = some[:, :, None], some[:, None, :]
        root = grams["query"].sqrt()[some].movedim(-1, 0)  # (P, pairs, 2)
        keys = root[..., :, None] * grams["key"][:, i, j] * root[..., None, :]
        values = (s_KEE[i] @ grams["value"][i, j] @ s_KEE[j]).transpose(-3, -2)
        values = values.flatten(3).flatten(1, 2)
        keys, values = torch.linalg.eigvalsh(keys), torch.linalg.eigvalsh(values)
        lost.append(torch.stack([keys[..., 0].sum(0), values[:, :e].sum(1)]))
        energy.append(torch.stack([keys.sum((0, 2)), values.sum(1)]))
    lost, energy = torch.cat(lost, dim=1), torch.cat(energy, dim=1).mean(1, keepdim=True)
    # subtle: if nothing is lost, what is left is rounding: a 1e-12th of the energy counts as none.
    lost = (lost / lost.mean(1, keepdim=True).clamp(min=1e-12 * energy + TINY)).sum(0)
    energy_KK = torch.zeros(k, k, dtype=torch.float64)
    energy_KK[pairs[:, 0], pairs[:, 1]] = lost
    return energy_KK + energy_KK.mT


def head_similarity(gram: Tensor, n_tokens: int, metric: str, rope: bool = False) -> Tensor:
    """How alike two heads are once the one is best turned onto the other: s (K, K).

    gram: (K, K, E, E) real or, with rope=True, (P, K, K) complex, summed over `n_tokens`.
    metric "cos" (Gram of unit vectors): the mean cosine, eq. 18, 19. "dist": minus the mean square
    distance, eq. 22 squared as in the paper's code. The best inner product is Σ|M_p[i, j]| over the
    planes, or the nuclear norm of C_ij. Raises ValueError for another metric.
    """
    if rope:
        return similarity(gram.abs().sum(0), n_tokens, metric)
    inner_KK = gram.diagonal(dim1=-2, dim2=-1).sum(-1)  # the diagonal: tr C_ii
    i, j = torch.triu_indices(*inner_KK.shape, offset=1, device=gram.device)
    inner_KK[i, j] = inner_KK[j, i] = torch.linalg.svdvals(gram[i, j]).sum(-1)
    return similarity(inner_KK, n_tokens, metric)


def similarity(inner_KK: Tensor, n_tokens: int, metric: str) -> Tensor:
    """The similarity of heads by their inner products ⟨Y_i, Y_j⟩ (…, K, K) over `n_tokens`."""
    if metric == "cos":
        return inner_KK / n_tokens
    if metric != "dist":
        raise ValueError(f"metric {metric!r}: expected cos or dist")
    power_K = inner_KK.diagonal(dim1=-2, dim2=-1)
    return (2 * inner_KK - power_K[..., :, None] - power_K[..., None, :]) / n_tokens


# ---- 5 grouping ----------------------------------------------------------------------------------


def anneal_groups(
    s_KK: Tensor | np.ndarray, n_groups: int, seed: int = 0, temperature: float = 2.0
) -> list[list[int]]:
    """Split K heads into equal groups with the greatest sum of s over pairs inside (eq. 23, 24).

    Simulated annealing by swaps of two heads (algorithm 2), 512 restarts side by side, 4,000 steps;
    then the best swap of all until none helps. `temperature` is the first one, in standard
    deviations of s; it falls to a hundredth. 0 is the paper's rule: improvements only.
    Returns `n_groups` sorted lists, ordered by their first heads. Raises ValueError if `n_groups`
    does not divide K or s is not a square matrix of finite numbers.
    """
    s_KK = torch.as_tensor(s_KK, dtype=torch.float64, device="cpu").numpy().copy()
    k = len(s_KK)
    if s_KK.shape != (k, k) or not np.isfinite(s_KK).all():
        found = "values that are not finite" if s_KK.shape == (k, k) else f"shape {s_KK.shape}"
        raise ValueError(f"expected a square matrix of finite similarities, found {found}")
    if n_groups < 1 or k % n_groups:
        raise ValueError(f"{k} heads cannot be split into {n_groups} equal groups")
    s_KK = (s_KK + s_KK.T) / 2
    np.fill_diagonal(s_KK, 0)
    rng = np.random.default_rng(seed)
    group_RK = rng.permuted(np.tile(np.arange(k) * n_groups // k, (512, 1)), axis=1)
    group_RK = swap_at_random(s_KK, group_RK, 4000, temperature * s_KK.std(), rng)
    group_RK = swap_the_best(s_KK, group_RK)
    score_R = ((group_RK[:, :, None] == group_RK[:, None, :]) * s_KK).sum((1, 2))
    best_K = group_RK[score_R.argmax()]
    return sorted(np.flatnonzero(best_K == g).tolist() for g in range(n_groups))


def attraction(s_KK: np.ndarray, group_RK: np.ndarray) -> np.ndarray:
    """a[r, i, g]: the sum of s between head i and the heads of group g, in restart r."""
    return s_KK @ (group_RK[:, :, None] == np.arange(group_RK.max() + 1)).astype(np.float64)


def swap_at_random(s_KK, group_RK, steps, temperature, rng) -> np.ndarray:
    """Metropolis: propose a swap in every restart, take it if better or with exp(gain / T)."""
    group_RK, a_RKG = group_RK.copy(), attraction(s_KK, group_RK)
    rows = np.arange(len(group_RK))
    cooling = temperature * np.geomspace(1, 0.01, steps)
    i_SR, j_SR = rng.integers(len(s_KK), size=(2, steps, len(rows)))
    threshold_SR = -cooling[:, None] * rng.exponential(size=(steps, len(rows)))
    for i, j, threshold in zip(i_SR, j_SR, threshold_SR, strict=True):
        gi, gj = group_RK[rows, i], group_RK[rows, j]
        # What i and j gain by changing places; their own bond is counted in both, and stays cut.
        gain = a_RKG[rows, i, gj] - a_RKG[rows, i, gi] + a_RKG[rows, j, gi] - a_RKG[rows, j, gj]
        gain -= 2 * s_KK[i, j]
        r = np.flatnonzero((gi != gj) & (gain > threshold))
        i, j, gi, gj = i[r], j[r], gi[r], gj[r]
        moved = s_KK[i] - s_KK[j]  # head i leaves group gi and comes to gj, j the other way
        a_RKG[r, :, gi] -= moved
        a_RKG[r, :, gj] += moved
        group_RK[r, i], group_RK[r, j] = gj, gi
    return group_RK


def swap_the_best(s_KK, group_RK) -> np.ndarray:
    """Steepest ascent: in every restart make the best of all swaps, until none gains."""
    group_RK, rows = group_RK.copy(), np.arange(len(group_RK))
    while True:
        a_RKG = attraction(s_KK, group_RK)
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


# ---- 6 transform and merge -----------------------------------------------------------------------


def transform(
    weights: Mapping[str, Tensor],
    config: LlamaConfig,
    order_K: Sequence[int],
    value_maps_KEE: Tensor | None = None,
    key_maps_KP: Tensor | None = None,
    value_back_KEE: Tensor | None = None,
    key_back_KP: Tensor | None = None,
) -> dict[str, Tensor]:
    """A block's weights with its units in a new order and mapped (eq. 12-17).

    Maps are in the new order, None leaves heads as they are. Values v → v q, hence Wv → qᵀ Wv, and
    what reads them goes back, v ≈ v q r: Wo → Wo rᵀ. Keys z_p → c_p z_p in plane p, and back by
    a_p: queries z_p → conj(a_p) z_p. Ways back that are not given are the inverses r = q⁻¹
    and a = 1/c: the block then computes the same, for any invertible q and any c but 0. Attention
    weights come back in float64: only the last cast rounds.
    """
    k, e, order = config.num_key_value_heads, config.head_dim, torch.as_tensor(order_K)
    if value_maps_KEE is not None and value_back_KEE is None:
        value_back_KEE = torch.linalg.inv(value_maps_KEE)
    if key_maps_KP is not None and key_back_KP is None:
        key_back_KP = 1 / key_maps_KP
    out = dict(weights)
    for name, weight in weights.items():
        module, _, part = name.partition(".")
        if module != "self_attn" or part == "o_proj.bias":
            continue
        # All as (unit, its heads, E, D): rows of q, k, v or columns of o; D = 1 for a bias.
        by_columns = part == "o_proj.weight"
        rows = weight.double().mT if by_columns else weight.double()
        w_KQED = rows.reshape(k, -1, e, rows.shape[1] if rows.ndim > 1 else 1)[order]
        if part[0] in "vo" and value_maps_KEE is not None:
            q_KEE = value_maps_KEE.mT if part[0] == "v" else value_back_KEE
            w_KQED = q_KEE[:, None] @ w_KQED
        if part[0] in "qk" and key_maps_KP is not None:
            c_KP = key_maps_KP if part[0] == "k" else key_back_KP.conj()
            z_KQPD = torch.complex(*w_KQED.chunk(2, dim=2)) * c_KP[:, None, :, None]
            w_KQED = torch.cat([z_KQPD.real, z_KQPD.imag], dim=2)
        rows = w_KQED.reshape(rows.shape)
        out[name] = rows.mT.contiguous() if by_columns else rows
    return out


def merge(weights: Mapping[str, Tensor], config: LlamaConfig, kv_heads: int) -> dict[str, Tensor]:
    """A block with each run of K/G neighbouring key and value heads averaged into one (eq. 25, 26).

    Of untouched weights this is the mean-pooling of Ainslie et al. 2023.
    In float64 for the averaged tensors.
    """
    out = dict(weights)
    for name, weight in weights.items():
        if name.startswith(("self_attn.k_proj.", "self_attn.v_proj.")):
            w_KED = weight.double().reshape(config.num_key_value_heads, config.head_dim, -1)
            merged = w_KED.unflatten(0, (kv_heads, -1)).mean(1)
            out[name] = merged.reshape(-1, *weight.shape[1:])
    return out


# ---- 7 masks -------------------------------------------------------------------------------------

# The hard concrete distribution of Louizos et al. 2017: temperature β, stretched to (γ, ζ).
BETA, GAMMA, ZETA = 2 / 3, -0.1, 1.1


def hard_concrete(log_alpha: Tensor, generator: torch.Generator | None = None) -> Tensor:
    """Masks z in [0, 1] of log_alpha's shape, exactly 0 and 1 with probability above zero.

    s = σ((log u − log(1 − u) + log α)/β) with u uniform from the generator, z = clamp(s(ζ − γ) + γ,
    0, 1); no generator means no sampling: s = σ(log α) (Louizos et al. 2017, eq. 10-13).
    """
    s = torch.sigmoid(log_alpha)
    if generator is not None:
        u = torch.rand(log_alpha.shape, generator=generator, device=log_alpha.device)
        s = torch.sigmoid((torch.logit(u.to(log_alpha.dtype)) + log_alpha) / BETA)
    return (s * (ZETA - GAMMA) + GAMMA).clamp(0, 1)


def open_probability(log_alpha: Tensor) -> Tensor:
    """P(z > 0) = σ(log α − β log(−γ/ζ)), of log_alpha's shape (Louizos et al. 2017, eq. 12)."""
    return torch.sigmoid(log_alpha - BETA * math.log(-GAMMA / ZETA))


def l0_loss(log_alpha: Tensor, target: float) -> Tensor:
    """|s − T| + (s − T)², a scalar, with s the mean P(z > 0) over all masks (eq. 29)."""
    gap = open_probability(log_alpha).mean() - target
    return gap.abs() + gap.square()


# ---- 8 losses ------------------------------------------------------------------------------------


def kl_loss(student: Tensor, teacher: Tensor, temperature: float = 1.0) -> Tensor:
    """KL(teacher ‖ student) of logits (…, V): nats for each token, shape (…), not reduced.

    Both are divided by the temperature; no factor T². In float32 at least.
    """
    log_s, log_t = (F.log_softmax(wide(x) / temperature, dim=-1) for x in (student, teacher))
    return (log_t.exp() * (log_t - log_s)).sum(-1)


def bild_loss(
    student: Tensor, teacher: Tensor, top_k: int = 16, temperature: float = 3.0
) -> Tensor:
    """Bi-directional logits difference loss (Li et al. 2024) of logits (…, V): shape (…).

    The leader's top-k ids i < j by its rank; both models' differences logit_i − logit_j over the
    temperature; softmax over the k(k−1)/2 pairs; KL(teacher ‖ student). Once with the teacher as
    leader, once with the student, added. The ids are constants to the gradient; no factor T².
    Raises ValueError if `top_k` is less than 2 or more than V.
    """
    if not 2 <= top_k <= student.shape[-1]:
        raise ValueError(f"top_k {top_k}: expected 2 to the vocabulary's {student.shape[-1]}")
    i, j = torch.triu_indices(top_k, top_k, offset=1, device=student.device)
    loss = 0
    for leader in (teacher, student):
        ids = leader.detach().topk(top_k, dim=-1).indices
        student_k, teacher_k = (wide(logits.gather(-1, ids)) for logits in (student, teacher))
        student_pairs = student_k[..., i] - student_k[..., j]
        loss = loss + kl_loss(student_pairs, teacher_k[..., i] - teacher_k[..., j], temperature)
    return loss


# ---- 9 convert -----------------------------------------------------------------------------------

CHOICES = {
    "align": ("linear", "rotation", "none"),
    "group": ("energy", "value", "key", "adjacent"),
    "metric": ("dist", "cos"),
}
GROUP_FOR = {"linear": "energy", "rotation": "value", "none": "adjacent"}


def align_block(
    grams: Mapping[str, Tensor],
    s_KEE: Tensor,
    n_tokens: int,
    kv_heads: int,
    align: str,
    group: str,
    metric: str,
    seed: int,
) -> tuple[list[list[int]], tuple[Tensor, ...], dict]:
    """(groups, maps, report) of one block; the maps are `transform`'s, in the order of the groups.

    grams: of `block_grams`, summed over `n_tokens` with this `metric`; s_KEE: `output_root`. The
    report has the groups; for keys and values the mean similarity of pairs inside groups, before
    and after, or with "linear" the share of energy that the shared heads keep.
    """
    k = grams["value"].shape[0]
    groups = torch.arange(k).view(kv_heads, -1).tolist()
    if group == "energy":
        groups = anneal_groups(-discarded_energy(grams, s_KEE), kv_heads, seed)
    elif group != "adjacent":
        s_KK = head_similarity(grams[group], n_tokens, metric, rope=group == "key")
        groups = anneal_groups(s_KK, kv_heads, seed)
    g_GM = torch.tensor(groups)
    i, j = g_GM[:, :, None], g_GM[:, None, :]
    value_GMMEE, key_GPMM = grams["value"][i, j], grams["key"][:, i, j].movedim(0, 1)
    report = {"groups": groups}
    if align == "linear":
        value_maps, value_back, value_kept = shared_values(value_GMMEE, s_KEE[g_GM])
        key_maps, key_back, key_kept = shared_keys(key_GPMM, grams["query"][g_GM])
        maps = value_maps, key_maps, value_back, key_back
        report["energy_kept"] = {"key": key_kept.mean().item(), "value": value_kept.mean().item()}
    else:
        maps = (torch.eye(value_GMMEE.shape[-1]).to(value_GMMEE).expand(*g_GM.shape, -1, -1),
                torch.ones_like(key_GPMM[..., 0]).mT)
        before = similarities(value_GMMEE, key_GPMM, *maps, n_tokens, metric)
        if align == "rotation":
            maps = (generalized_procrustes(value_GMMEE)[0],
                    generalized_procrustes(key_GPMM, rope=True)[0].mT)
        after = similarities(value_GMMEE, key_GPMM, *maps, n_tokens, metric)
        report["similarity_inside_groups"] = {
            name: {"before": before[name], "after": after[name]} for name in before}
    return groups, tuple(q.flatten(0, 1) for q in maps), report


def similarities(value_GMMEE, key_GPMM, value_maps, key_maps, n_tokens, metric) -> dict[str, float]:
    """Mean similarity of the mapped heads, over all pairs inside groups."""
    key_maps = key_maps.mT[..., None, None]  # a head dim of one complex number
    inner = {"key": inner_products(key_GPMM.conj()[..., None, None], key_maps).sum(1),
             "value": inner_products(value_GMMEE, value_maps)}
    i, j = torch.triu_indices(*inner["key"].shape[1:], offset=1)
    return {name: similarity(inner_GMM, n_tokens, metric)[:, i, j].mean().item()
            for name, inner_GMM in inner.items()}


@torch.no_grad()
def convert(
    model_dir: PathLike,
    out_dir: PathLike,
    kv_heads: int,
    text: PathLike | Sequence[PathLike],
    eval_text: PathLike | Sequence[PathLike] = (),
    tokens: int = 262_144,
    seq_len: int | None = None,
    align: str = "linear",
    refit: bool | None = None,
    group: str | None = None,
    metric: str = "dist",
    device: str = "auto",
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
    dry_run: bool = False,
    log: Callable[[str], None] = lambda line: None,
) -> dict:
    """Convert a checkpoint directory to `kv_heads` KV heads; returns the report.

    One pass over the blocks: the calibration tokens of `text` (see `text_rows`) run through a
    block, its keys and values give Grams, heads are grouped, aligned and averaged, the block is
    refitted and written; so memory is a block and the tokens' hidden states, however deep the
    model.
    align: "linear", the best; "rotation", the paper's; "none", plain averages. refit: train each
    block to lead to the source's hidden states, `refit_block` (default: with "linear"). group: by
    the least discarded "energy", by similarity of "value" or "key", or "adjacent" heads (default:
    energy, value, adjacent for the three ways to align). metric of similarity: "dist" or "cos".
    `dtype` is the forward's; what is written has the source's. `log` is given the line that says
    what will be done; `dry_run` ends there, all checks made.

    `out_dir` becomes a Hugging Face directory with `mha2gqa.json`, the report: losses in
    nats/token, sizes in bytes, times in seconds. It is there whole or not at all. Raises
    ValueError for bad input, before any work wherever it shows before; OSError if writing fails.
    """
    refit = align == "linear" if refit is None else refit
    group = group or GROUP_FOR.get(align)
    check_method(align, group, metric, seed)
    to = {"device": pick_device(device), "dtype": dtype}
    config, weights = load_checkpoint(model_dir)
    new_config = gqa_config(config, kv_heads)
    out_bytes = converted_bytes(config, weights, kv_heads)
    check_new_directory(out_dir, out_bytes)
    with peak_memory(to["device"]) as peak:
        rows, held_out = text_rows(model_dir, config, text, eval_text, tokens, seq_len, seed)
        if len(rows) < 1 + refit:
            raise ValueError(f"{1 + refit} rows of {held_out.shape[1]} tokens of text are needed "
                             f"to calibrate with, found {len(rows)}")
        report = {
            "source": str(Path(model_dir).resolve()),
            "text": {"calibration": str(text), "held_out": str(eval_text or text)},
            "method": {"align": align, "refit": refit, "group": group, "metric": metric,
                       "seed": seed},
            "forward": {name: str(value) for name, value in to.items()},
            **sizes(config, new_config, weights, rows, held_out, dtype, refit),
            "seconds_estimate": seconds_needed(config, weights, rows, held_out, to, refit),
        }
        log(plan_line(report))
        if dry_run:
            return report
        with new_directory(out_dir, out_bytes) as folder:
            method = report["method"]
            report |= convert_into(folder, config, weights, kv_heads, rows, held_out, method, to)
            finish_checkpoint(folder, new_config, model_dir)
            report["peak_memory_bytes"] = dict(peak)
            write_json(folder / "mha2gqa.json", report)
    return report


def convert_into(folder, config, weights, kv_heads, rows, held_out, method, to) -> dict:
    """The work of `convert`: write the shards into `folder`, return what was measured.

    rows, held_out: token ids (rows, T). method: the keywords of `converted_blocks`. to: device and
    dtype of the forward. Raises ValueError for weights or activations that are not finite.
    """
    check_finite(outer_weights(weights))
    seconds, timed = stopwatch(to["device"])
    calibration, source_x = (embed(weights, tokens, to) for tokens in (rows, held_out))
    mean_pooled_x, converted_x = source_x.clone(), source_x.clone()
    new_config, layers = gqa_config(config, kv_heads), []
    blocks = converted_blocks(config, weights, calibration, kv_heads, **method, timed=timed)
    for i, (source, _, converted, layer) in enumerate(progress(blocks, config.num_hidden_layers)):
        mean_pooled = {name: w.to(source[name].dtype)
                       for name, w in merge(source, config, kv_heads).items()}
        check_finite(converted, f"converted {block_prefix(i)}")
        with timed("evaluate"):
            run_block_(config, source, source_x)
            run_block_(new_config, mean_pooled, mean_pooled_x)
            run_block_(new_config, converted, converted_x)
        with timed("write"):
            save_shard(folder, config, i, {block_prefix(i) + n: w for n, w in converted.items()})
        layers.append(layer)
    with timed("evaluate"):
        streams = {"source": source_x, "mean_pooled": mean_pooled_x, "converted": converted_x}
        losses = {name: mean_loss(config, weights, x, held_out) for name, x in streams.items()}
    with timed("write"):
        save_shard(folder, config, config.num_hidden_layers, outer_weights(weights))
    return {
        "loss_nats_per_token": losses,
        **{name: mean(layer[name] for layer in layers)
           for name in ("similarity_inside_groups", "energy_kept", "hidden_state_error")
           if name in layers[0]},
        "seconds": {**seconds, "total": sum(seconds.values())},
        "layers": layers,
    }


def converted_blocks(
    config: LlamaConfig,
    weights: Mapping[str, Tensor],
    x_BTD: Tensor,
    kv_heads: int,
    align: str,
    refit: bool,
    group: str,
    metric: str,
    seed: int,
    document_BT: Tensor | None = None,
    timed: Callable[[str], contextlib.AbstractContextManager] = contextlib.nullcontext,
) -> Iterator[tuple[dict[str, Tensor], dict[str, Tensor] | None, dict[str, Tensor], dict]]:
    """Walk the blocks once: (its weights, the same mapped and in group order, converted, report).

    `x_BTD` are the embedded calibration rows; they are moved on in place, block by block.
    `document_BT` as in `Llama.forward`. Mapped weights compute what the block's own do, except with
    "linear", where the ways back are not exact; after a refit they are None. Converted weights have
    the source's dtype. Raises ValueError for weights or activations that are not finite.
    """
    if refit and len(x_BTD) < 2:
        raise ValueError("a refit needs at least two rows of text to calibrate with")
    new_config, converted_x = gqa_config(config, kv_heads), x_BTD.clone() if refit else None
    for i in range(config.num_hidden_layers):
        with timed("read"):
            source = read_block(weights, i, x_BTD.device)
        with timed("calibrate"):
            grams = block_grams(config, source, x_BTD, metric)
        with timed("align"):
            # On the CPU: that is where hundreds of small SVDs are fast.
            grams = {name: gram.cpu() for name, gram in grams.items()}
            for name, gram in grams.items():
                if not torch.isfinite(gram.abs().sum()):
                    raise ValueError(f"block {i}: its {name}s on this text are not finite")
            n_tokens = x_BTD.shape[0] * x_BTD.shape[1]
            groups, maps, layer = align_block(
                grams, output_root(config, source).cpu(), n_tokens, kv_heads, align, group, metric,
                seed + i)
        with timed("merge"):
            order = [unit for group_units in groups for unit in group_units]
            aligned = transform(source, config, order, *(q.to(x_BTD.device) for q in maps))
            converted = {name: w.to(source[name].dtype)
                         for name, w in merge(aligned, config, kv_heads).items()}
        with timed("calibrate"):
            run_block_(config, source, x_BTD, document_BT)
        if refit:
            aligned = None  # frees a block in float64
            with timed("refit"):
                converted, layer["hidden_state_error"] = refit_block(
                    new_config, converted, converted_x, x_BTD, seed + i, document_BT)
                run_block_(new_config, converted, converted_x, document_BT)
            if not math.isfinite(layer["hidden_state_error"]["before"]):
                raise ValueError(f"block {i}: its hidden states on this text are not finite")
        yield source, aligned, converted, layer


REFIT_EPOCHS = 5  # ten take twice the time, and gain little


@torch.no_grad()
def refit_block(
    config: LlamaConfig,
    weights: Mapping[str, Tensor],
    x_BTD: Tensor,
    wanted_BTD: Tensor,
    seed: int,
    document_BT: Tensor | None = None,
) -> tuple[dict[str, Tensor], dict[str, float]]:
    """A block's weights, trained to make `wanted` of x; and its error before and after.

    x: hidden states of the converted model before the block; wanted: the source's after it. So a
    block learns to do without its own heads, and to mend what the blocks before it left wrong. The
    error is the mean of ‖y − wanted‖² / ‖wanted‖² over tokens, as the next norm sees it; otherwise
    the few tokens of large models that are a thousand times longer than the rest would decide
    alone. Adam goes REFIT_EPOCHS times over the rows, except the first tenth, which is held out: if
    the error does not fall there, or is not finite, the block stays as it was.
    """
    with torch.device("meta"):
        block_of = functools.partial(torch.func.functional_call, Block(config))

    def error(weights, rows):
        x, wanted = wide(x_BTD[rows]), wide(wanted_BTD[rows])
        rope_mask = rope_and_mask(config, x, None if document_BT is None else document_BT[rows])
        weights = {name: w.to(x.dtype) for name, w in weights.items()}
        square = (block_of(weights, (x, *rope_mask)) - wanted).square().sum(-1)
        return (square / wanted.square().sum(-1).clamp(min=1e-30)).mean()

    new = {name: wide(w).clone().requires_grad_() for name, w in weights.items()}
    # A step of Adam moves each entry by about its rate, and a row's entries all in concert: its
    # output by columns · rate, where unrelated entries make √columns · rms(W). So rms(W)/√columns
    # is the same relative step at any width; how much of it, and how many tokens a step, was tried.
    rate = {name: 0.4 * (w.square().mean() / w.shape[-1]).sqrt().item() for name, w in new.items()}
    adam = torch.optim.Adam([{"params": w, "name": name} for name, w in new.items()],
                            betas=(0.9, 0.95), eps=1e-15)
    size, generator = max(1, 1024 // x_BTD.shape[1]), torch.Generator().manual_seed(seed)
    held_out, rows = torch.arange(len(x_BTD)).tensor_split([max(1, len(x_BTD) // 10)])
    batches = [batch for _ in range(REFIT_EPOCHS)
               for batch in rows[torch.randperm(len(rows), generator=generator)].split(size)]
    for step, batch in enumerate(batches):
        with torch.enable_grad():
            error(new, batch).backward()
        for group in adam.param_groups:
            group["lr"] = rate[group["name"]] * learning_rate(step, len(batches))
        adam.step()
        adam.zero_grad()
    new = {name: w.detach().to(weights[name].dtype) for name, w in new.items()}  # as written
    before, after = (sum(len(rows) * error(w, rows).item() for rows in held_out.split(size))
                     / len(held_out) for w in (weights, new))
    if not after < before:
        return dict(weights), {"before": before, "after": before}
    return new, {"before": before, "after": after}


def learning_rate(step: int, steps: int) -> float:
    """Share of the highest rate: up from 0 over 32 steps (or a tenth of few), a cosine down to 0.

    0 at step 0: there a student that is its teacher has rounding error for a gradient, which Adam
    would scale up to a full step.
    """
    warm_up = min(32, max(1, steps // 10))
    return min(1.0, step / warm_up) * (1 + math.cos(math.pi * step / steps)) / 2


def read_block(weights: Mapping[str, Tensor], i: int, device) -> dict[str, Tensor]:
    """Block i's weights on the device; raises ValueError if one is not finite."""
    block = {name: w.to(device) for name, w in block_weights(weights, i).items()}
    check_finite(block, block_prefix(i))
    return block


def check_finite(weights: Mapping[str, Tensor], prefix: str = "") -> None:
    """Raise ValueError for the first tensor with a value that is not finite."""
    for name, weight in weights.items():
        if not all(torch.isfinite(bound) for bound in weight.aminmax()):
            raise ValueError(f"tensor {prefix}{name} holds values that are not finite")


def embed(weights: Mapping[str, Tensor], tokens_BT: Tensor, to: Mapping) -> Tensor:
    """The hidden states (B, T, D) that enter the first block."""
    return F.embedding(tokens_BT, weights["model.embed_tokens.weight"]).to(**to)


def run_block_(
    config: LlamaConfig,
    weights: Mapping[str, Tensor],
    x_BTD: Tensor,
    document_BT: Tensor | None = None,
) -> None:
    """Replace the hidden states by what the block of these weights makes of them, rows in turn."""
    with torch.device("meta"):
        block = Block(config)
    weights = {name: w.to(x_BTD.dtype) for name, w in weights.items()}
    size = max(1, 4096 // x_BTD.shape[1])
    for at in range(0, len(x_BTD), size):
        rows, document = x_BTD[at : at + size], document_BT
        if document is not None:
            document = document[at : at + size]
        rope_mask = rope_and_mask(config, rows, document)
        rows.copy_(torch.func.functional_call(block, weights, (rows, *rope_mask), strict=True))


def mean_loss(config, weights, x_BTD: Tensor, tokens_BT: Tensor) -> float:
    """Nats/token over the T − 1 predictions of each row, from the last block's hidden states."""
    norm = weights["model.norm.weight"].to(x_BTD)
    head = weights.get("lm_head.weight", weights["model.embed_tokens.weight"]).to(x_BTD)
    total = 0.0
    for x_TD, tokens_T in zip(x_BTD, tokens_BT.to(x_BTD.device), strict=True):
        for x_D, target in zip(x_TD[:-1].split(1024), tokens_T[1:].split(1024), strict=True):
            logits = F.linear(rms_norm(x_D, norm, config.rms_norm_eps), head)
            total += F.cross_entropy(wide(logits), target, reduction="sum").item()
    return total / (tokens_BT.shape[0] * (tokens_BT.shape[1] - 1))


@torch.no_grad()
def evaluate(
    model_dir: PathLike,
    text: PathLike | Sequence[PathLike] = (),
    eval_text: PathLike | Sequence[PathLike] = (),
    tokens: int = 262_144,
    seq_len: int | None = None,
    device: str = "auto",
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
) -> dict:
    """Held-out loss of a model directory, in nats/token, by the very protocol of `convert`.

    With the same text, tokens, seq_len and seed the held-out rows are the same. Raises ValueError
    for bad input.
    """
    to = {"device": pick_device(device), "dtype": dtype}
    config, weights = load_checkpoint(model_dir)
    _, held_out = text_rows(model_dir, config, text, eval_text, tokens, seq_len, seed)
    check_finite(outer_weights(weights))
    x_BTD = embed(weights, held_out, to)
    for i in progress(range(config.num_hidden_layers), config.num_hidden_layers):
        run_block_(config, read_block(weights, i, to["device"]), x_BTD)
    loss = mean_loss(config, weights, x_BTD, held_out)
    return {"loss_nats_per_token": loss, "held_out_tokens": held_out.numel()}


def check_method(align: str, group: str, metric: str, seed: int) -> None:
    """Raise ValueError for a way of converting that does not exist."""
    for name, value in (("align", align), ("group", group), ("metric", metric)):
        if value not in CHOICES[name]:
            raise ValueError(f"{name} {value!r}: expected {', '.join(CHOICES[name])}")
    if metric == "cos" and (align == "linear" or group == "energy"):
        raise ValueError("metric cos: linear alignment and groups by energy weigh errors, not "
                         "angles, and need dist")
    if not 0 <= seed < 2**32:
        raise ValueError(f"seed {seed}: expected 0 to {2**32 - 1}")


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


def kv_cache_bytes(config: LlamaConfig, weights: Mapping[str, Tensor]) -> int:
    """Bytes of KV cache for each token of context, in the weights' dtype."""
    itemsize = weights[block_prefix(0) + "self_attn.k_proj.weight"].element_size()
    heads = config.num_hidden_layers * config.num_key_value_heads
    return 2 * heads * config.head_dim * itemsize


def converted_bytes(config: LlamaConfig, weights: Mapping[str, Tensor], kv_heads: int) -> int:
    """Bytes of the weights once they have `kv_heads` KV heads."""
    kv = n_bytes(w for n, w in weights.items() if ".k_proj." in n or ".v_proj." in n)
    return n_bytes(weights.values()) - kv + kv * kv_heads // config.num_key_value_heads


def memory_needed(
    config: LlamaConfig, n_calibration: int, n_held_out: int, seq_len: int, dtype, refit: bool
) -> int:
    """Bytes of anonymous memory at a conversion's peak, estimated from its largest parts."""
    d, inner, size = config.hidden_size, config.intermediate_size, dtype.itemsize
    kv, q = (n * config.head_dim for n in (config.num_key_value_heads, config.num_attention_heads))
    attention = 2 * d * (q + kv)
    streams = ((1 + refit) * n_calibration + 3 * n_held_out) * d * size
    block = 2 * (attention + 3 * d * inner) * size  # as read, and in the forward's dtype
    grams = 4 * kv * kv * 8  # the sum, a summand, the old sum, what is picked for the groups
    forward = min(4096, n_calibration) * (6 * d + 4 * inner) * size  # of so many tokens at once
    in_float64 = 3 * attention * 8  # while heads are turned and merged
    # Old and new weights, gradients and Adam's moments; what a step's tokens leave for backward.
    refitted = 5 * 4 * (attention + 3 * d * inner)
    refitted += min(max(1024, seq_len), n_calibration) * (8 * d + 3 * (q + 2 * kv) + 5 * inner) * 4
    head = config.vocab_size * (d * size + 3 * 1024 * 4)  # and logits of 1,024 tokens
    program = 300_000_000  # Python and torch themselves
    return program + streams + max(block + grams + max(forward, in_float64, refit * refitted), head)


def seconds_needed(config, weights, rows, held_out, to, refit: bool) -> float:
    """Estimated seconds of a conversion: all its forwards, by the first block's on some 512 tokens.

    A backward counts as two forwards, the sums for the Grams as 0.3. Alignment, on the CPU, takes
    some 8 seconds a block of 32 heads of 128.
    """
    seconds, timed = stopwatch(to["device"])
    block = read_block(weights, 0, to["device"])
    x_BTD = embed(weights, held_out[: max(1, 512 // held_out.shape[1]), :512], to)
    x_BTD = wide(x_BTD) if refit else x_BTD
    for run in ("first", "second"):  # the first one wakes the device
        with timed(run):
            run_block_(config, block, x_BTD)
    tokens = rows.numel() * (1.3 + refit * (1 + 3 * 0.9 * REFIT_EPOCHS)) + 3 * held_out.numel()
    align = 8 * (config.num_key_value_heads / 32) ** 2 * (config.head_dim / 128) ** 3
    return config.num_hidden_layers * (
        align + seconds["second"] * tokens / x_BTD[..., 0].numel())


def sizes(config, new_config, weights, rows, held_out, dtype, refit) -> dict:
    """The report's numbers that are known before any work: counts, and bytes."""
    models = {"source": config, "converted": new_config}
    return {
        "num_hidden_layers": config.num_hidden_layers,
        "kv_heads": {name: c.num_key_value_heads for name, c in models.items()},
        "kv_cache_bytes_per_token": {n: kv_cache_bytes(c, weights) for n, c in models.items()},
        "tokens": {"calibration": rows.numel(), "held_out": held_out.numel(),
                   "seq_len": rows.shape[1]},
        "memory_estimate_bytes": memory_needed(
            config, rows.numel(), held_out.numel(), rows.shape[1], dtype, refit),
        "disk_bytes": converted_bytes(config, weights, new_config.num_key_value_heads),
    }


def plan_line(report: Mapping) -> str:
    """One line: what a conversion will do, and the memory and disk it takes."""
    heads, method, tokens = report["kv_heads"], report["method"], report["tokens"]
    memory, disk = (short(report[f"{n}_bytes"] / 1e9) for n in ("memory_estimate", "disk"))
    return (
        f"{report['num_hidden_layers']} blocks, {heads['source']} to {heads['converted']} KV heads "
        f"(align {method['align']}{', refit' * method['refit']}, group {method['group']}"
        + (f", metric {method['metric']}" if method["align"] != "linear" else "") + "); "
        f"{tokens['calibration']:,} tokens to calibrate, {tokens['held_out']:,} held out, in rows "
        f"of {tokens['seq_len']:,}; about {memory} GB of memory ({report['forward']['device']}), "
        f"{disk} GB of disk and {duration(report['seconds_estimate'])}"
    )


def duration(seconds: float) -> str:
    """Seconds, minutes or hours."""
    size, unit = next(x for x in ((3600, "hours"), (60, "minutes"), (1, "seconds"))
                      if seconds >= 2 * x[0] or x[0] == 1)
    return f"{short(seconds / size)} {unit}"


def short(number: float) -> str:
    """Two digits of a number, never with an exponent."""
    return np.format_float_positional(float(f"{number:.2g}"), trim="-")


@contextlib.contextmanager
def peak_memory(device: torch.device) -> Iterator[dict]:
    """Within the with block, keeps {"host": bytes, "cuda": bytes} at the peaks so far.

    Host memory is anonymous memory, sampled (mapped weight files are the system's to drop);
    0 where the system does not tell. CUDA is the allocator's peak.
    """
    peak, stop = {"host": anonymous_memory(), "cuda": 0}, threading.Event()
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)

    def sample():
        while not stop.wait(0.02):
            peak["host"] = max(peak["host"], anonymous_memory())
            if device.type == "cuda":
                peak["cuda"] = torch.cuda.max_memory_allocated(device)

    thread = threading.Thread(target=sample, daemon=True)
    thread.start()
    try:
        yield peak
    finally:
        stop.set()
        thread.join()


def anonymous_memory() -> int:
    """Bytes of this process's memory that no file backs; 0 if the system does not tell."""
    try:
        status = Path("/proc/self/status").read_text()
    except OSError:
        return 0
    found = status.partition("RssAnon:")[2].split()
    return int(found[0]) * 1024 if found else 0


def stopwatch(device: torch.device) -> tuple[dict, Callable]:
    """(seconds by stage, context manager that adds a stage's time to them)."""
    seconds = {}

    @contextlib.contextmanager
    def timed(stage):
        start = time.perf_counter()
        yield
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        seconds[stage] = seconds.get(stage, 0.0) + time.perf_counter() - start

    return seconds, timed


def mean(found: Iterator):
    """The mean of numbers, or of dicts of them, key by key."""
    found = list(found)
    if isinstance(found[0], dict):
        return {name: mean(f[name] for f in found) for name in found[0]}
    return sum(found) / len(found)


def pick_device(name: str) -> torch.device:
    """The device of that name; raises ValueError if this machine has none."""
    cuda = [f"cuda:{i}" for i in range(torch.cuda.device_count())]
    if name == "auto":
        name = "cuda" if cuda else "cpu"
    choices = ["cpu", *(["cuda", *cuda] if cuda else [])]
    if name not in choices:
        raise ValueError(f"device {name!r}: expected auto, {', '.join(choices)} on this machine")
    return torch.device(name)


def progress(steps, total: int):
    """A progress bar over the blocks, silent when not on a terminal."""
    from tqdm import tqdm

    return tqdm(steps, total=total, desc="blocks", unit="block", disable=None)


# ---- 10 command line -----------------------------------------------------------------------------


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    """The command line's arguments; wrong ones end the program with one line."""
    parser = argparse.ArgumentParser(
        prog="mha2gqa.py",
        usage="mha2gqa.py MODEL OUT --kv-heads G --text FILE ... [options]\n"
        "       mha2gqa.py --evaluate MODEL --text FILE ... [options]",
        description="Convert a LLaMA checkpoint to grouped-query attention, block by block.",
    )
    add = parser.add_argument
    add("model", metavar="MODEL", help="Hugging Face directory to convert, or to --evaluate")
    add("out", metavar="OUT", nargs="?", help="directory to write; must not exist, or be empty")
    add("--kv-heads", type=int, metavar="G", help="KV heads wanted, a divisor of the source's")
    add("--text", nargs="+", default=(), metavar="FILE", help="calibration text: .jsonl with a "
        '"text" field, or plain text; .gz and .xz of either')
    add("--eval-text", nargs="+", default=(), metavar="FILE", help="held-out text, of which at "
        "most 65,536 tokens are used; without it the first 10%% of --text's tokens are held out")
    add("--tokens", type=int, default=262_144, metavar="N",
        help="tokens to read of --text (default: %(default)s)")
    add("--seq-len", type=int, metavar="N",
        help="tokens a row (default: 2048, or the model's context if that is less)")
    add("--align", choices=CHOICES["align"], default="linear",
        help="how heads are made to agree before they are averaged: by maps onto the shared head "
        "that serves them best (linear, the default), by rotations (the paper), or not at all")
    add("--group", choices=CHOICES["group"],
        help="group heads by this: the least energy lost, similarity of values or keys, or none "
        "(default: energy, value, adjacent for --align linear, rotation, none)")
    add("--refit", action=argparse.BooleanOptionalAction, help="train each block to lead to the "
        "source's hidden states (default: with --align linear)")
    add("--metric", choices=CHOICES["metric"], default="dist",
        help="similarity: minus the mean square distance (default), or the mean cosine (for "
        "--align rotation or none)")
    add("--device", default="auto", help="cpu, cuda, cuda:1, ... (default: cuda if there is one)")
    add("--seed", type=int, default=0, metavar="N",
        help="of the order of the text and of the grouping (default: %(default)s)")
    add("--dry-run", action="store_true", help="check the input, say what would be done, and end")
    add("--evaluate", action="store_true", help="only print MODEL's held-out loss")
    parser.error = lambda message: parser.exit(2, f"error: {message}; see --help\n")
    arguments = parser.parse_args(argv)
    if arguments.evaluate and (arguments.out or arguments.kv_heads or arguments.dry_run):
        parser.error("--evaluate takes MODEL and text, and writes nothing")
    if not arguments.evaluate and None in (arguments.out, arguments.kv_heads):
        parser.error("a conversion needs MODEL OUT --kv-heads G --text FILE")
    if not arguments.text and not (arguments.evaluate and arguments.eval_text):
        parser.error("no --text FILE")
    return arguments


def print_table(report: Mapping, out: str) -> None:
    """What a person wants to know of a report."""
    loss, cache = report["loss_nats_per_token"], report["kv_cache_bytes_per_token"]
    print(f"\nheld-out loss, nats/token, {report['tokens']['held_out']:,} tokens")
    for name, value in loss.items():
        gap = "" if name == "source" else f"  {value - loss['source']:+8.4f}"
        print(f"  {name.replace('_', '-'):<12}{value:8.4f}{gap}")
    if "energy_kept" in report:
        print("energy that the shared heads keep")
        for name, share in report["energy_kept"].items():
            print(f"  {name + 's':<12}{share:8.4f}")
    else:
        print(f"similarity inside groups ({report['method']['metric']}), before and after")
        for name, s in report["similarity_inside_groups"].items():
            print(f"  {name + 's':<12}{s['before']:8.4f} -> {s['after']:.4f}")
    if "hidden_state_error" in report:
        error = report["hidden_state_error"]
        print("relative square error of a block's hidden states, before and after its refit\n"
              f"  {'mean':<12}{error['before']:8.4f} -> {error['after']:.4f}")
    print(f"KV cache, bytes a token\n  {cache['source']:,} -> {cache['converted']:,}")
    stages = ", ".join(f"{name} {value:.1f}" for name, value in report["seconds"].items())
    memory = (f"{n} {b / 1e9:.2f} GB" for n, b in report["peak_memory_bytes"].items() if b)
    print(f"seconds\n  {stages}\npeak memory\n  {', '.join(memory)}\nwritten to {out}")


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; returns the exit status: 2 for bad input, with one line on stderr."""
    arguments = vars(parse_arguments(argv))
    model, only_evaluate = arguments.pop("model"), arguments.pop("evaluate")
    try:
        if only_evaluate:
            names = ("text", "eval_text", "tokens", "seq_len", "device", "seed")
            found = evaluate(model, **{name: arguments[name] for name in names})
            print(f"held-out loss {found['loss_nats_per_token']:.4f} nats/token, "
                  f"{found['held_out_tokens']:,} tokens")
        else:
            out = arguments.pop("out")
            report = convert(model, out, **arguments, log=functools.partial(print, flush=True))
            if not arguments["dry_run"]:
                print_table(report, out)
    except (ValueError, OSError, torch.OutOfMemoryError) as error:
        reason = str(error).split("\n")[0]
        print(f"error: {reason}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted: nothing was written", file=sys.stderr)
        return 130
    return 0


def be_a_program() -> None:
    """Warnings on one line; and being told to end unwinds like Ctrl-C, so that nothing half-written
    stays behind. A signal that is ignored, as under nohup, stays ignored."""
    warnings.formatwarning = lambda message, *_: f"warning: {message}\n"
    for name in ("SIGTERM", "SIGHUP"):
        number = getattr(signal, name, None)
        if number and signal.getsignal(number) != signal.SIG_IGN:
            signal.signal(number, signal.default_int_handler)


if __name__ == "__main__":
    be_a_program()
    sys.exit(main())
