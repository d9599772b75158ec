# SPDX-License-Identifier: Apache-2.0
"""train_gqa: distil a LLaMA into one with fewer key and value heads, with FSDP2.

    torchrun train_gqa.py                                        # the demo, on CPU, within minutes
    torchrun --nproc-per-node 8 train_gqa.py --model MODEL --kv-heads 8 --tasks DIR --out OUT

The program around mha2gqa.py, after Jin et al. 2024 (arXiv 2412.20677). The teacher is the source
fine-tuned on the tasks, or the source itself. The student starts as the converted teacher, and KL
and BiLD pull its logits to the teacher's. Or, the paper's way (--align rotation, no refit), the
student starts as the source with its heads rotated, and hard-concrete masks let its key and value
heads fade into the new shared ones.

Every batch, and the random numbers of the masks, are pure functions of (seed, step). So the result
depends, up to rounding, neither on the number of processes nor on where a run was interrupted, and
there is no loader state to save.

     1  batches      packed rows of tokens, and which losses each prediction enters
     2  processes    what ranks do together
     3  models       sharded over the ranks, filled block by block; heads that fade
     4  losses       over packed rows, in chunks
     5  masks        their schedule
     6  training     the loop, its checkpoints
     7  evaluation   loss, KL and exact answers
     8  the run      its stages in order
     9  tasks        the eight tasks from their public files
    10  the demo, command line

Shape suffixes as in mha2gqa.py; here R is packed rows.
"""

import contextlib
import dataclasses
import datetime
import functools
import gc
import io
import itertools
import json
import logging
import math
import os
import random
import re
import shutil
import signal
import sys
import tempfile
import textwrap
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import (
    CPUOffloadPolicy,
    MixedPrecisionPolicy,
    OffloadPolicy,
    fully_shard,
)
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.utils.checkpoint import checkpoint

import mha2gqa

# ---- 1 batches -----------------------------------------------------------------------------------

KL, ANSWER = 1, 2  # bits: this prediction enters the KL loss; it is part of an answer


@dataclasses.dataclass(frozen=True)
class TokenBatch:
    """Packed rows: tokens (R, T), the losses of each prediction, the document of each token.

    `loss_bits[r, t]` says which losses the prediction of token t + 1, made at t, enters. Text: KL |
    ANSWER for all but the row's last one, and the row counts as one document (`document` None).
    Tasks: KL within a prompt, ANSWER for an answer and its EOS, 0 from one document to the next.
    """

    tokens: Tensor
    loss_bits: Tensor
    document: Tensor | None = None

    def __getitem__(self, rows) -> "TokenBatch":
        document = None if self.document is None else self.document[rows]
        return TokenBatch(self.tokens[rows], self.loss_bits[rows], document)

    def to(self, device: torch.device) -> "TokenBatch":
        document = None if self.document is None else self.document.to(device)
        return TokenBatch(self.tokens.to(device, torch.int64), self.loss_bits.to(device), document)

    def __len__(self) -> int:
        return len(self.tokens)


def text_batch(tokens_RT: Tensor) -> TokenBatch:
    """Rows of plain text: every prediction but the row's last enters both losses."""
    loss_bits = torch.full_like(tokens_RT, KL | ANSWER, dtype=torch.uint8)
    loss_bits[:, -1] = 0
    return TokenBatch(tokens_RT, loss_bits)


def concatenate(parts: Sequence[TokenBatch]) -> TokenBatch:
    """The rows of several batches."""
    document = None
    if any(p.document is not None for p in parts):
        document = torch.cat([torch.zeros_like(p.tokens) if p.document is None else p.document
                              for p in parts])
    return TokenBatch(
        torch.cat([p.tokens for p in parts]), torch.cat([p.loss_bits for p in parts]), document)


@functools.lru_cache(maxsize=2)
def epoch_order(n_rows: int, seed: int, epoch: int) -> Tensor:
    """The order of the rows in one epoch."""
    return torch.randperm(n_rows, generator=torch.Generator().manual_seed(seed * 100_003 + epoch))


def batch_of_step(data: TokenBatch, step: int, n_rows: int, seed: int) -> TokenBatch:
    """The rows of a step: the permutations of the epochs, end to end."""
    places = range(step * n_rows, (step + 1) * n_rows)
    index = [epoch_order(len(data), seed, p // len(data))[p % len(data)] for p in places]
    return data[torch.stack(index)]


MICRO_TOKENS = 8192


def micro_batches(batch: TokenBatch, device: torch.device) -> Iterator[TokenBatch]:
    """This rank's rows of a batch, a few at a time.

    All ranks get the same number of batches if their number divides the rows.
    """
    mine = batch[dist.get_rank() :: dist.get_world_size()]
    size = max(1, MICRO_TOKENS // batch.tokens.shape[1])
    for i in range(0, len(mine), size):
        yield mine[i : i + size].to(device)


# ---- 2 processes ---------------------------------------------------------------------------------


def start_processes() -> torch.device:
    """Join torchrun's processes, or be the only one; returns this process's device.

    Raises ValueError if there are more processes here than GPUs or these know no bfloat16, if what
    torchrun would have set is not what it sets, or if they do not find each other.
    """
    for name, least in (("RANK", 0), ("LOCAL_RANK", 0), ("WORLD_SIZE", 1), ("LOCAL_WORLD_SIZE", 1),
                        ("MASTER_PORT", 1)):
        found = os.environ.get(name, "1")
        if not found.isdecimal() or int(found) < least:
            raise ValueError(f"the environment has {name}={found!r}, expected a number from "
                             "torchrun; unset it, or start with torchrun")
    cuda, here = torch.cuda.is_available(), int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    if not threads_are_chosen(here):
        torch.set_num_threads(max(1, usable_cores() // here))
    if cuda and here > torch.cuda.device_count():
        raise ValueError(f"{here} processes on this machine, which has {torch.cuda.device_count()} "
                         "GPUs: choose another --nproc-per-node")
    store, rank, size = dist.HashStore(), 0, 1
    try:
        if "RANK" in os.environ:
            store, rank, size = next(dist.rendezvous(
                "env://", timeout=datetime.timedelta(minutes=5)))
        # The others wait while rank 0 converts: longer than the default timeout allows.
        dist.init_process_group("cpu:gloo,cuda:nccl" if cuda else "gloo", store=store, rank=rank,
                                world_size=size, timeout=datetime.timedelta(hours=12))
    except RuntimeError as error:
        raise ValueError(f"the processes do not find each other ({error_line(error)})") from None
    if not cuda:
        return torch.device("cpu")
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
    torch.cuda.set_device(device)
    if not torch.cuda.is_bf16_supported(including_emulation=False):
        raise ValueError(f"{torch.cuda.get_device_name()} does not compute in bfloat16, which "
                         "training on a GPU needs; CUDA_VISIBLE_DEVICES= makes it run on the CPU")
    return device


def threads_are_chosen(processes: int) -> bool:
    """Whether the user has set OMP_NUM_THREADS. torchrun sets it to 1 for several processes, which
    is nobody's wish: then what counts is what it was itself started with."""
    if processes == 1:
        return "OMP_NUM_THREADS" in os.environ
    with contextlib.suppress(OSError):
        return b"OMP_NUM_THREADS=" in Path(f"/proc/{os.getppid()}/environ").read_bytes()
    return os.environ.get("OMP_NUM_THREADS", "1") != "1"


def usable_cores() -> int:
    """How many cores this process and those beside it may use: of its affinity and, in a
    container, of its quota."""
    cores = len(getattr(os, "sched_getaffinity", lambda _: range(os.cpu_count() or 1))(0))
    groups = Path("/sys/fs/cgroup")
    for files in (["cpu.max"], ["cpu/cpu.cfs_quota_us", "cpu/cpu.cfs_period_us"]):  # v2, v1
        with contextlib.suppress(OSError, ValueError):  # "max": there is no quota
            quota, period = " ".join((groups / file).read_text() for file in files).split()
            cores = min(cores, max(1, int(quota) // int(period))) if int(quota) > 0 else cores
    return cores


def is_rank_0() -> bool:
    """Whether this process is rank 0, which reads, writes and prints for all."""
    rank = os.environ.get("RANK", "0")
    return not rank.isdecimal() or int(rank) == 0  # if it is no number, there is only this one


def print_rank_0(line: str) -> None:
    """Print a line, once for all processes."""
    if is_rank_0():
        print(line, flush=True)


def broadcast_from_rank_0(value):
    """Rank 0's value, on all ranks: what is on the disk may change between two looks."""
    box = [value]
    dist.broadcast_object_list(box)
    return box[0]


def is_lost_process(error: BaseException) -> bool:
    """Whether an error says that another process of the group has ended."""
    return isinstance(error, dist.DistError) or "gloo/transport" in str(error)


def raise_on_all_ranks(function: Callable):
    """What the function returns on this rank; or a ValueError if it raises ValueError or OSError on
    any rank, so that none waits for another that has ended. Until then each waits for all."""
    found, error = None, None
    try:
        found = function()
    except (ValueError, OSError) as raised:
        error = str(raised)
    errors: list[str | None] = [None] * dist.get_world_size()
    dist.all_gather_object(errors, error)
    for message in filter(None, errors):
        raise ValueError(message)
    return found


def on_rank_0(function: Callable):
    """`raise_on_all_ranks`, but only rank 0 calls the function; the others return None."""
    return raise_on_all_ranks(function if is_rank_0() else lambda: None)


def progress(items: Iterable, name: str, total: int | None = None, **options) -> Iterable:
    """`mha2gqa.progress` on rank 0, nothing on the others."""
    return mha2gqa.progress(items, name, total, **options, disable=not is_rank_0())


# ---- 3 models ------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Checkpoint:
    """A model directory that was opened; its weights are mapped, and read when they are used."""

    path: Path
    config: mha2gqa.LlamaConfig
    weights: Mapping[str, Tensor]

    @classmethod
    def open(cls, path: str | Path) -> "Checkpoint":
        return cls(Path(path), *mha2gqa.load_checkpoint(path))

    def blocks(self) -> Iterator[dict[str, Tensor]]:
        """The weights of one block after the other."""
        n_layers = self.config.num_hidden_layers
        return (mha2gqa.read_block(self.weights, i, "cpu") for i in range(n_layers))


class FadingLinear(nn.Linear):
    """A key or value projection from K heads to G: W = z W_orig + (1 − z) W_new (eq. 27, 28).

    Weights are mixed, not activations. `z_K` is set before each step.
    """

    z_K: Tensor

    def __init__(self, config: mha2gqa.LlamaConfig, kv_heads: int):
        self.heads = config.num_key_value_heads, config.head_dim
        super().__init__(config.hidden_size, math.prod(self.heads), bias=config.qkv_bias)
        self.new = nn.Linear(config.hidden_size, kv_heads * config.head_dim, bias=config.qkv_bias)

    def forward(self, x):
        bias = None if self.bias is None else self.mix(self.bias, self.new.bias)
        return F.linear(x, self.mix(self.weight, self.new.weight), bias)

    def mix(self, w, new):
        k, e = self.heads
        w_KED = w.reshape(k, e, -1)
        new_KED = new.reshape(-1, e, w_KED.shape[-1])
        new_KED = new_KED.repeat_interleave(k // len(new_KED), dim=0)
        z = self.z_K.to(w)[:, None, None]
        return (z * w_KED + (1 - z) * new_KED).reshape(w.shape)


def meta_model(
    config: mha2gqa.LlamaConfig, fading_to: int | None = None, trained: str = "all"
) -> mha2gqa.Llama:
    """Llama on the meta device; with `fading_to` KV heads, its key and value heads can fade.

    `trained`: which weights get gradients, "all", "none", or "attention", a third of a model, which
    is attention and the norms.
    """
    with torch.device("meta"):
        model = mha2gqa.Llama(config)
        for attention in attentions(model) if fading_to else ():
            attention.k_proj = FadingLinear(config, fading_to or 0)
            attention.v_proj = FadingLinear(config, fading_to or 0)
    for name, p in model.named_parameters():
        in_attention = "self_attn" in name or "norm" in name
        p.requires_grad_(trained == "all" or trained == "attention" and in_attention)
    return model


def attentions(model: mha2gqa.Llama) -> list[mha2gqa.Attention]:
    """The attention of every block."""
    return [module for module in model.modules() if isinstance(module, mha2gqa.Attention)]


def compute_dtype(device: torch.device) -> torch.dtype:
    """bf16 on CUDA, float32 on CPU."""
    return torch.bfloat16 if device.type == "cuda" else torch.float32


@dataclasses.dataclass(frozen=True)
class Place:
    """Where sharded models run, and how.

    recompute: keep no activations within a block for the backward. offload: shards, gradients and
    Adam's moments stay in the host's memory, and the device holds what it computes with, a block at
    a time. compiled: by torch.compile, each block.
    """

    device: torch.device
    recompute: bool = False
    offload: bool = False
    compiled: bool = False


def shard(model: mha2gqa.Llama, place: Place) -> mha2gqa.Llama:
    """Shard a model on the meta device over all ranks, each block, then the root.

    Its parameters hold nothing yet. What is trained will be in float32, all else in the dtype of
    the forward.
    """
    device, dtype = place.device, compute_dtype(place.device)
    mesh = init_device_mesh(device.type, (dist.get_world_size(),))
    precision = MixedPrecisionPolicy(dtype, reduce_dtype=torch.float32)
    offload = CPUOffloadPolicy(device.type == "cuda") if place.offload else OffloadPolicy()
    for p in model.parameters():
        if not p.requires_grad:
            p.data = p.to(dtype)
    if place.compiled:
        prepare_to_compile()
    for block in model.model.layers:
        if place.compiled:
            block.forward = torch.compile(block.forward)  # type: ignore[method-assign]
        if place.recompute:
            block.forward = functools.partial(  # type: ignore[method-assign]
                checkpoint, block.forward, use_reentrant=False)
        fully_shard(block, mesh=mesh, mp_policy=precision, offload_policy=offload)
    fully_shard(model, mesh=mesh, mp_policy=precision, offload_policy=offload)
    model.to_empty(device="cpu" if place.offload else device)
    return model


@functools.cache
def prepare_to_compile() -> None:
    """Settings of torch.compile, once."""
    torch._dynamo.config.recompile_limit = 64  # all models of a run share a block's code
    # Documents of other lengths would have it compiled anew.
    mha2gqa._by_documents = torch.compiler.disable(mha2gqa._by_documents)


def compute_device(model: nn.Module) -> torch.device:
    """Where a sharded model computes, whatever memory its shards are in."""
    p = next(model.parameters())  # gathered or not
    return torch.device(p.device_mesh.device_type) if isinstance(p, DTensor) else p.device


def reshard(model: nn.Module) -> None:
    """Free gathered parameters. subtle: a forward without gradients leaves the root's gathered."""
    model.reshard()  # type: ignore[operator]  # FSDPModule's, which fully_shard makes of the model


def gathered(p: Tensor) -> Tensor:
    """The whole of a sharded tensor; all ranks must ask for it."""
    return p.full_tensor() if isinstance(p, DTensor) else p


@torch.no_grad()
def load_sharded(
    model: mha2gqa.Llama, blocks: Iterator[Mapping[str, Tensor]], non_block: Mapping[str, Tensor]
) -> mha2gqa.Llama:
    """Give every rank its shards of rank 0's weights, with one block in memory at a time."""
    named: dict[str, Tensor] = dict(model.named_parameters())
    parts = [mha2gqa.block_weights(named, i) for i in range(model.config.num_hidden_layers)]
    parts.append(mha2gqa.non_block_weights(named))
    loaded = itertools.chain(blocks, [non_block]) if is_rank_0() else itertools.repeat({})
    for parameters, weights in zip(parts, loaded, strict=False):
        for name, p in parameters.items():
            full = weights[name] if is_rank_0() else torch.empty(p.shape)
            p, full = cast(DTensor, p), full.to(p.device, p.dtype)
            p.to_local().copy_(distribute_tensor(full, p.device_mesh, p.placements).to_local())
    return model


def fill(model: mha2gqa.Llama, source: Checkpoint) -> None:
    """`load_sharded` of a checkpoint."""
    load_sharded(model, source.blocks(), mha2gqa.non_block_weights(source.weights))


def frozen_model(
    config: mha2gqa.LlamaConfig, blocks: Iterator[Mapping[str, Tensor]],
    non_block: Mapping[str, Tensor], place: Place
) -> mha2gqa.Llama:
    """A sharded model of these weights that is not trained."""
    return load_sharded(shard(meta_model(config, trained="none"), place), blocks, non_block)


def frozen_checkpoint(source: Checkpoint, place: Place) -> mha2gqa.Llama:
    """`frozen_model` of a checkpoint."""
    non_block = mha2gqa.non_block_weights(source.weights)
    return frozen_model(source.config, source.blocks(), non_block, place)


def save_model(
    path: Path, model: mha2gqa.Llama, config: mha2gqa.LlamaConfig, source: Checkpoint,
    start: Checkpoint
) -> None:
    """Write the model to `path`, with the source's dtypes and tokenizer.

    Rank 0 gathers one block at a time. Of a `FadingLinear` only the new heads are written. What was
    not trained is written as it is in `start`.
    """
    named: dict[str, Tensor] = dict(model.named_parameters())
    replaced = {name.replace(".new.", ".") for name in named if ".new." in name}
    named = {name.replace(".new.", "."): p for name, p in named.items() if name not in replaced}
    dtypes = {name: source.weights[name].dtype for name in named}
    size = sum(p.numel() * dtypes[name].itemsize for name, p in named.items())
    with contextlib.ExitStack() as stack:
        writer = on_rank_0(lambda: stack.enter_context(
            mha2gqa.new_checkpoint(path, config, size, source.path)))
        prefixes = map(mha2gqa.block_prefix, range(config.num_hidden_layers))
        blocks = ({n: p for n, p in named.items() if n.startswith(prefix)} for prefix in prefixes)
        for part in itertools.chain(blocks, [mha2gqa.non_block_weights(named)]):
            full = {name: gathered(p) for name, p in part.items() if p.requires_grad}
            full |= {name: start.weights[name] for name in part if name not in full}
            on_rank_0(lambda full=full: writer.write(
                {name: w.to("cpu", dtypes[name]) for name, w in full.items()}))
        on_rank_0(stack.close)


def release_memory() -> None:
    """Free sharded models that are no longer used: they are in reference cycles."""
    gc.collect()
    torch.cuda.empty_cache()


# ---- 4 losses ------------------------------------------------------------------------------------

Readout = Callable[[Tensor, Tensor], Tensor]  # (hidden_BTD, head_VD) -> the forward's result


@dataclasses.dataclass(frozen=True)
class Objective:
    """What a training minimises, as a sum of parts.

    parts: name -> bit of the predictions that this part is averaged over. make_readout: gives for a
    batch the `readout` of `Llama.forward`, which returns the parts' sums over the batch, (parts,).
    """

    parts: Mapping[str, int]
    make_readout: Callable[[TokenBatch], Readout]


def max_logits(device: torch.device) -> int:
    """How many logits a loss makes at once: of 512 predictions over 32,000, on a GPU 2,048."""
    return 2 ** (26 if device.type == "cuda" else 24)


def chunk_size(head_VD: Tensor) -> int:
    """How many predictions have `max_logits` of logits."""
    return max(1, max_logits(head_VD.device) // len(head_VD))


def in_chunks(function: Callable, hidden_ND: Tensor, head_VD: Tensor, *others: Tensor) -> Tensor:
    """Sum of `function` over chunks of `chunk_size`, recomputed in the backward pass.

    So the logits of a batch, float32 and V wide, never exist all at once.
    """
    size = chunk_size(head_VD)
    chunks = zip(hidden_ND.split(size), *(x.split(size) for x in others), strict=True)
    sums = [checkpoint(function, hidden, head_VD, *rest, use_reentrant=False)
            for hidden, *rest in chunks]
    return sum(sums[1:], sums[0])


def cross_entropy() -> Objective:
    """Cross-entropy of the answers' tokens, in nats; of plain text, of all tokens."""
    def of_chunk(hidden_ND, head_VD, target_N):
        logits = mha2gqa.at_least_float32(F.linear(hidden_ND, head_VD))
        return torch.stack([F.cross_entropy(logits, target_N, reduction="sum")])

    def make_readout(batch: TokenBatch) -> Readout:
        at = batch.loss_bits & ANSWER > 0
        target = batch.tokens.roll(-1, dims=1)[at]
        return lambda hidden, head: in_chunks(of_chunk, hidden[at], head, target)

    return Objective({"cross_entropy": ANSWER}, make_readout)


def distillation(teacher: mha2gqa.Llama) -> Objective:
    """KL and BiLD to the teacher (eq. 30)."""
    reshard(teacher)
    teacher_head = gathered(teacher.head_weight).to(compute_device(teacher))

    def of_chunk(hidden_ND, head_VD, teacher_ND, bits_N):
        student, target = F.linear(hidden_ND, head_VD), F.linear(teacher_ND, teacher_head)
        kl = (mha2gqa.kl_loss(student, target) * (bits_N & KL > 0)).sum()
        bild = (mha2gqa.bild_loss(student, target) * (bits_N & ANSWER > 0)).sum()
        return torch.stack([kl, bild])

    def make_readout(batch: TokenBatch) -> Readout:
        at = batch.loss_bits > 0
        with torch.no_grad():
            teacher_ND = teacher(batch.tokens, batch.document, lambda hidden, _: hidden)[at]
        return lambda hidden, head: in_chunks(
            of_chunk, hidden[at], head, teacher_ND, batch.loss_bits[at])

    return Objective({"kl": KL, "bild": ANSWER}, make_readout)


# ---- 5 masks -------------------------------------------------------------------------------------


class Masks:
    """Hard-concrete masks z_LK of all blocks and units, on a schedule, the same on all ranks.

    The target of the mean P(z > 0) falls from 1 to 0 over the first 30 % of the steps. Before every
    step one number is added to all log α so that the target is met: layers and heads differ only by
    the gradients of distillation. z is 1 at step 0, then drawn from (seed, step), and 0 from 80 %
    of the steps on.
    """

    def __init__(self, model: mha2gqa.Llama, steps: int, lr: float, seed: int):
        self.layers = [(a.k_proj, a.v_proj) for a in attentions(model)]
        kv_heads = model.config.num_key_value_heads
        self.log_alpha = torch.full((len(self.layers), kv_heads), 3.0, requires_grad=True)
        self.optimizer = torch.optim.Adam([self.log_alpha], lr=lr, betas=(0.9, 0.95))
        self.steps, self.seed, self.lr = steps, seed, lr
        self.drawn: Tensor | None = None  # the sampled masks, differentiable

    def target(self, step: int) -> float:
        return max(0.0, 1 - step / (0.3 * self.steps))

    def hold(self, z: float, device) -> None:
        """Set every z to the same value."""
        self.drawn = None
        self.set_z(torch.full_like(self.log_alpha, z), device)

    def set_z(self, z_LK: Tensor, device) -> None:
        """Give every projection its z; the backward passes then leave a gradient in `self.z_LK`."""
        self.z_LK = z_LK.detach().to(device).requires_grad_()
        for z_K, projections in zip(self.z_LK, self.layers, strict=True):
            for projection in projections:
                projection.z_K = z_K  # type: ignore[assignment]

    def draw(self, step: int, device) -> dict:
        """Set the z of every projection for this step; returns what to log."""
        if step == 0 or step >= 0.8 * self.steps:
            self.hold(float(step == 0), device)
            opened = self.z_LK.detach()
        else:
            with torch.no_grad():
                self.log_alpha += shift_to(self.log_alpha, self.target(step))
            generator = torch.Generator().manual_seed(self.seed * 1_000_003 + step)
            self.drawn = mha2gqa.hard_concrete(self.log_alpha, generator)
            self.set_z(self.drawn, device)
            opened = mha2gqa.open_probability(self.log_alpha.detach())
        return {"mask_mean": opened.mean().item(), "mask_target": self.target(step),
                "mask_layers": [round(x, 4) for x in opened.mean(1).tolist()],
                "mask_lr": self.lr}

    def step(self) -> None:
        """One Adam step along the gradient that the backward passes left in z."""
        if self.drawn is not None and self.z_LK.grad is not None:
            gradient = self.z_LK.grad.cpu()
            dist.all_reduce(gradient)
            self.optimizer.zero_grad()
            self.drawn.backward(gradient / dist.get_world_size())
            self.optimizer.step()


def shift_to(log_alpha: Tensor, target: float) -> float:
    """The number to add to all log α for a mean P(z > 0) of `target`, by bisection."""
    target, low, high = min(max(target, 0.005), 0.995), -50.0, 50.0
    for _ in range(50):
        middle = (low + high) / 2
        above = mha2gqa.open_probability(log_alpha + middle).mean() > target
        low, high = (low, middle) if above else (middle, high)
    return middle


# ---- 6 training ----------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Schedule:
    """A stage of training: its name, length, batches, learning rates of model and masks."""

    stage: str
    steps: int
    batch_size: int
    lr: float
    mask_lr: float
    seed: int
    save_every: int


def train(
    model: mha2gqa.Llama, data: TokenBatch, objective: Objective, schedule: Schedule, folder: Path,
    begin: Callable[[], None], masks: Masks | None = None,
    lap: Callable[[str], None] = lambda stage: None
) -> None:
    """AdamW on the batches of the schedule, continued from the newest checkpoint in `folder` that
    can be read; if there is none, `begin` gives the model its weights.

    The loss is the sum of the objective's parts, each divided by the number of predictions in the
    global batch that carry its bit. `lap(stage)` is called as each part of a step ends, to time it.
    Raises FloatingPointError at a loss that is not finite.
    """
    device = compute_device(model)
    trained = [p for p in model.parameters() if p.requires_grad]
    # Fused: otherwise a step makes a copy of all parameters, and on a CPU takes six times as long.
    optimizer = torch.optim.AdamW(trained, schedule.lr, betas=(0.9, 0.95), weight_decay=0,
                                  fused=True)
    first = load_newest(folder, model, optimizer, masks)
    if first == 0:
        begin()
    metrics, name, steps = folder.parent / "metrics.jsonl", schedule.stage, schedule.steps
    on_rank_0(lambda: drop_metrics_from(metrics, name, first))
    with stop_signal() as stopped:
        for step in progress(range(first, steps), name, steps, initial=first):
            start = time.perf_counter()
            record: dict[str, Any] = {"stage": name, "step": step}
            if masks:
                record |= masks.draw(step, device)
            batch = batch_of_step(data, step, schedule.batch_size, schedule.seed)
            lap("masks and batch")
            losses = backward(model, batch, objective, lap)
            norm = gathered(nn.utils.clip_grad_norm_(model.parameters(), 1.0)).item()
            if not math.isfinite(losses.sum().item() + norm):
                if is_rank_0():  # that checkpoint's weights gave this loss
                    shutil.rmtree(folder / f"step_{step}", ignore_errors=True)
                raise FloatingPointError(
                    f"{name}, step {step}: the loss is {losses.sum().item()}, its gradient's norm "
                    f"{norm}; earlier checkpoints stay in {folder}; a new --out with a lower --lr "
                    "may do")
            lr = schedule.lr * mha2gqa.lr_factor(step, steps)
            for group in optimizer.param_groups:
                group["lr"] = lr
            optimizer.step()
            optimizer.zero_grad()
            lap("optimizer")
            if masks:
                masks.step()
            parts = dict(zip(objective.parts, losses.tolist(), strict=True))
            record |= {"loss": losses.sum().item(), **parts, "lr": lr, "gradient_norm": norm,
                       "tokens_per_second": batch.tokens.numel() / (time.perf_counter() - start)}
            on_rank_0(functools.partial(append_line, metrics, json.dumps(record)))
            stop, done = stopped(), step + 1
            due = schedule.save_every and done % schedule.save_every == 0 and done < steps
            if stop or due:
                save_step(folder, done, model, optimizer, masks)
            if stop:
                raise KeyboardInterrupt


def backward(
    model: mha2gqa.Llama, batch: TokenBatch, objective: Objective,
    lap: Callable[[str], None] = lambda stage: None
) -> Tensor:
    """Leave the gradients of a global batch in the model; returns its losses (parts,)."""
    device = compute_device(model)
    counts = [max(1, int((batch.loss_bits & bit > 0).sum())) for bit in objective.parts.values()]
    count, total = torch.tensor(counts, device=device), torch.zeros(len(counts), device=device)
    batches = list(micro_batches(batch, device))
    for micro in progress(batches, "step", inside=True):
        readout = objective.make_readout(micro)
        lap("teacher")
        losses = model(micro.tokens, micro.document, readout) / count
        lap("forward")
        (losses.sum() * dist.get_world_size()).backward()  # FSDP averages over ranks
        lap("backward")
        total += losses.detach()
    total = total.cpu()
    dist.all_reduce(total)
    return total


def append_line(file: Path, line: str) -> None:
    """Add a line to a file."""
    with mha2gqa.writing(file), open(file, "a") as opened:
        opened.write(line + "\n")


def write_whole(file: Path, write: Callable[[Path], Any]) -> None:
    """Write a file under another name first, so that it is there whole or not at all."""
    new = file.with_name(f".{file.name}")
    try:
        with mha2gqa.writing(file):
            write(new)
            mha2gqa.rename_when_on_disk(new, file)
    finally:
        new.unlink(missing_ok=True)


def drop_metrics_from(file: Path, stage: str, first: int) -> None:
    """Drop the lines of steps that will be made again."""
    if file.exists():
        made = re.compile(r'\{"stage": "(.*?)", "step": (\d+), .*\}')  # a line that is whole
        lines = map(made.fullmatch, file.read_text(errors="replace").splitlines())
        text = "".join(line[0] + "\n" for line in lines
                       if line and (line[1] != stage or int(line[2]) < first))
        write_whole(file, lambda new: new.write_text(text))


@contextlib.contextmanager
def stop_signal() -> Iterator[Callable[[], bool]]:
    """Catch SIGTERM in the with block; yields a function that tells whether any rank got one."""
    seen = torch.zeros(1)
    before = signal.signal(signal.SIGTERM, lambda *_: seen.fill_(1))

    def stopped():
        anywhere = seen.clone()
        dist.all_reduce(anywhere)
        return bool(anywhere)

    try:
        yield stopped
    finally:
        signal.signal(signal.SIGTERM, before)


def training_state(model, optimizer) -> dict:
    """What a checkpoint holds of model and optimizer, each rank its shards."""
    return {"model": get_model_state_dict(model),
            "optimizer": get_optimizer_state_dict(model, optimizer)}


def save_step(folder: Path, step: int, model, optimizer, masks) -> None:
    """Write checkpoint `step_N` whole: under another name first. The two newest are kept."""
    partial = folder / f"partial_{step}"
    try:
        dcp.save(training_state(model, optimizer), checkpoint_id=partial)
    except (RuntimeError, dcp.CheckpointException) as error:  # a full disk, for one
        reason = own_fault(error)
        shutil.rmtree(partial, ignore_errors=True)
        raise OSError(f"{partial}: cannot be written ({reason})") from None

    def finish():
        if masks:
            with mha2gqa.writing(partial / "masks.pt"):
                torch.save([masks.log_alpha, masks.optimizer.state_dict()], partial / "masks.pt")
        mha2gqa.rename_when_on_disk(partial, folder / f"step_{step}")
        for old in checkpoints(folder)[:-2]:
            shutil.rmtree(folder / f"step_{old}")

    on_rank_0(finish)


def error_line(error: BaseException) -> str:
    """The first line of what an error says."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def own_fault(error: BaseException) -> str:
    """What is wrong with a checkpoint, in one line, of the errors that its reading or writing
    raised on all ranks; raises again what is not its fault."""
    failures = error.failures if isinstance(error, dcp.CheckpointException) else {}
    reasons = [reason for reason, _ in failures.values()] or [error]
    for reason in reasons:
        if mha2gqa.is_out_of_memory(reason) or is_lost_process(reason):
            raise reason
    return error_line(reasons[0])


def checkpoints(folder: Path) -> list[int]:
    """The steps of the checkpoints in a folder, in order."""
    names = (re.fullmatch(r"step_([1-9]\d*)", path.name) for path in folder.glob("step_*"))
    return sorted(int(name[1]) for name in names if name)


def load_newest(folder: Path, model, optimizer, masks) -> int:
    """Continue from the newest checkpoint that can be read; returns the number of steps done.

    One that cannot, as a machine may leave that dies while it writes, is put aside.
    """
    def clean():
        for partial in folder.glob("partial_*"):
            shutil.rmtree(partial)

    def put_aside(path: Path, aside: Path):
        shutil.rmtree(aside, ignore_errors=True)
        path.replace(aside)

    on_rank_0(clean)
    for step in reversed(broadcast_from_rank_0(checkpoints(folder))):
        path, aside = folder / f"step_{step}", folder / f"damaged_{step}"
        try:
            raise_on_all_ranks(functools.partial(load_step, path, model, optimizer, masks))
            return step
        except ValueError as error:
            print_rank_0(f"warning: {path} is damaged ({error}); it is called {aside.name} now, "
                         "and the run goes on from what was before it")
        on_rank_0(functools.partial(put_aside, path, aside))
    optimizer.state.clear()  # of a checkpoint that was read in part
    return 0


def load_step(path: Path, model, optimizer, masks) -> None:
    """Load a checkpoint; raises ValueError for one that is damaged."""
    state = training_state(model, optimizer)
    logging.disable(logging.WARNING)  # subtle: torch logs a traceback of what it then raises
    try:
        dcp.load(state, checkpoint_id=path)
    except dcp.CheckpointException as error:
        raise ValueError(own_fault(error)) from None
    finally:
        logging.disable(logging.NOTSET)
    set_model_state_dict(model, state["model"])
    set_optimizer_state_dict(model, optimizer, optim_state_dict=state["optimizer"])
    if masks:
        found = on_rank_0(lambda: read_torch(path / "masks.pt"))
        log_alpha, adam = broadcast_from_rank_0(found)
        with torch.no_grad():
            masks.log_alpha.copy_(log_alpha)
        masks.optimizer.load_state_dict(adam)


def read_torch(file: Path):
    """`torch.load`, mapped; ValueError for whatever is wrong with the file."""
    try:
        return torch.load(file, weights_only=True, mmap=True)
    except Exception as error:  # a broken file can make torch.load raise almost anything
        raise ValueError(f"{file}: cannot be read ({error_line(error)})") from None


# ---- 7 evaluation --------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Data:
    """Rows to train on and to evaluate on; the dev rows and number of examples of each task."""

    train: TokenBatch
    held_out: TokenBatch | None
    dev: Mapping[str, tuple[TokenBatch, int]]


def eval_batches(data: TokenBatch, device: torch.device, name: str) -> Iterable[TokenBatch]:
    """This rank's rows, a few at a time, padded with rows that enter no loss, so that all ranks get
    equally many."""
    padding = data[[0] * (-len(data) % dist.get_world_size())]
    padding = dataclasses.replace(padding, loss_bits=torch.zeros_like(padding.loss_bits))
    batches = list(micro_batches(concatenate([data, padding]), device))
    return progress(batches, f"evaluate {name}", leave=False)


@torch.no_grad()
def held_out_loss(
    model: mha2gqa.Llama, teacher: mha2gqa.Llama, data: TokenBatch, name: str
) -> dict[str, float]:
    """The loss and the KL to the teacher on held-out text, in nats/token over all predictions."""
    objectives, total = (cross_entropy(), distillation(teacher)), torch.zeros(3).double()
    for micro in eval_batches(data, compute_device(model), name):
        readouts = [objective.make_readout(micro) for objective in objectives]
        total += model(micro.tokens, micro.document, lambda hidden, head, readouts=readouts:
                       torch.cat([readout(hidden, head) for readout in readouts])).cpu()
    dist.all_reduce(total)
    loss, kl, _ = (total / (data.loss_bits > 0).sum()).tolist()
    return {"loss": loss, "kl": kl}


@torch.no_grad()
def exact_match(model: mha2gqa.Llama, data: TokenBatch, n_examples: int, name: str) -> float:
    """Share of examples whose every answer token, EOS included, is the argmax, in one forward.

    So greedy generation gives the answer. The converse fails if it uses other tokens for the text.
    """
    wrong = torch.zeros(n_examples, dtype=torch.int64)
    for micro in eval_batches(data, compute_device(model), name):
        at = micro.loss_bits & ANSWER > 0
        target = micro.tokens.roll(-1, dims=1)[at]

        def missed(hidden, head, at=at, target=target):
            size = chunk_size(head)
            pairs = zip(hidden[at].split(size), target.split(size), strict=True)
            return torch.cat([F.linear(h, head).argmax(-1) != t for h, t in pairs])

        missed_N = model(micro.tokens, micro.document, missed).cpu().long()
        if micro.document is not None:
            wrong.index_add_(0, micro.document[at].cpu(), missed_N)
    dist.all_reduce(wrong)
    return (wrong == 0).double().mean().item()


def evaluate_model(
    model: mha2gqa.Llama, teacher: mha2gqa.Llama, data: Data, name: str
) -> dict[str, float]:
    """Loss and KL to the teacher on held-out text, in nats/token; on tasks the shares of exact
    answers, and their mean."""
    found = {}
    if data.held_out is not None:
        found = held_out_loss(model, teacher, data.held_out, name)
    for task, (rows, n) in data.dev.items():
        found[task] = exact_match(model, rows, n, f"{name}, {task}")
    if data.dev:
        found["mean"] = sum(found[task] for task in data.dev) / len(data.dev)
    reshard(model)
    return found


def share(data: Data | None, file: Path) -> Data:
    """Rank 0's data on all ranks, mapped from a file that it writes: no process holds a copy."""
    def fields_of(rows: TokenBatch | None) -> dict[str, Tensor | None] | None:
        return None if rows is None else {**vars(rows), "tokens": rows.tokens.int()}

    def rows_of(fields: dict | None) -> Any:
        return None if fields is None else TokenBatch(**fields)

    def write(whole: Data):
        dev = {task: (fields_of(rows), n) for task, (rows, n) in whole.dev.items()}
        content = {"train": fields_of(whole.train), "held_out": fields_of(whole.held_out),
                   "dev": dev}
        write_whole(file, lambda new: torch.save(content, new))

    on_rank_0(lambda: write(cast(Data, data)))
    found = raise_on_all_ranks(lambda: read_torch(file))
    dev = {task: (rows_of(rows), n) for task, (rows, n) in found["dev"].items()}
    return Data(rows_of(found["train"]), rows_of(found["held_out"]), dev)


# ---- 8 the run -----------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True, kw_only=True)
class Arguments:
    """What a run is asked for: the command line's options, see --help."""

    model: str
    kv_heads: int
    out: Path
    text: Sequence[str] = ()
    eval_text: Sequence[str] = ()
    tasks: str | None = None
    task_limit: int | None = None
    teacher: str | None = None
    sft_epochs: float = 2
    steps: int | None = None
    epochs: float = 5
    batch_tokens: int = 131_072
    seq_len: int | None = None
    lr: float | None = None
    mask_lr: float | None = None
    no_masks: bool = False
    method: mha2gqa.Method = mha2gqa.Method(joint=False)  # the training itself is joint
    calibration_tokens: int = 262_144
    save_every: int = 500
    checkpoint_activations: bool = False
    cpu_offload: bool = False
    compile: bool = False
    train: str = "all"
    benchmark: int | None = None

    def __post_init__(self):
        # Masks mix keys and values, but linear alignment and a refit change other weights, too.
        if self.teacher_is_converted:
            object.__setattr__(self, "no_masks", True)

    @property
    def teacher_is_converted(self) -> bool:
        """Whether the student starts as the converted teacher, and not, as the paper's, source."""
        return self.method.refit or self.method.align == "linear"

    @property
    def source_teaches(self) -> bool:
        """Whether the source is the teacher, without fine-tuning."""
        return not (self.teacher or self.tasks and self.sft_epochs)

    @property
    def corpus(self) -> mha2gqa.Corpus:
        """The text: so many tokens that the held-out rows are the same for any number of steps."""
        tokens = max(655_360, self.steps * self.batch_tokens) + 65_536 if self.steps else 10**9
        return mha2gqa.Corpus(self.text, self.eval_text, tokens, self.seq_len)

    def place(self, device: torch.device) -> Place:
        """Where and how the run's models run."""
        return Place(device, self.checkpoint_activations, self.cpu_offload, self.compile)

    def to_json(self) -> dict[str, Any]:
        """All that must not change from one session of a run to the next."""
        fields = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        for free in ("method", "out", "save_every", "checkpoint_activations", "cpu_offload",
                     "compile", "benchmark"):
            del fields[free]
        method = dataclasses.asdict(self.method)
        del method["joint"]
        return json.loads(json.dumps(fields | method))


class Report:
    """OUT/report.json: the arguments, scores, seconds by stage, bytes. It grows, and is rewritten.

    A folder that holds the report of an earlier session is continued. Raises ValueError if that
    was a run with other arguments, or if the folder holds something else.
    """

    def __init__(self, args: Arguments, device: torch.device):
        self.file = args.out / "report.json"
        self.content: dict[str, Any] = broadcast_from_rank_0(on_rank_0(lambda: self.read(args)))
        self.scores = self.content["scores"]
        self.meter = mha2gqa.Meter(
            device, self.content["seconds"], self.content.get("peak_memory_bytes", {}))

    def read(self, args: Arguments) -> dict[str, Any]:
        out, arguments = args.out, args.to_json()
        if self.file.exists():
            content = mha2gqa.read_json(self.file)
            if not is_report(content):
                raise ValueError(f"{self.file}: not a report of this program; choose another --out")
            before = {"train": "all", **content["arguments"]}  # older reports do not have that
            for name in (n for n in arguments if before.get(n) != arguments[n]):
                raise ValueError(f"{out}: holds a run with --{name.replace('_', '-')} "
                                 f"{before.get(name)}, not {arguments[name]}; choose another --out")
            for half_written in out.glob(".mha2gqa-*"):
                shutil.rmtree(half_written)
            return content
        if out.exists() and (not out.is_dir() or any(
                file.name != ".report.json" for file in out.iterdir())):  # a kill can leave that
            raise ValueError(f"{out}: exists and is not a run of this program; choose another "
                             "--out")
        return {"arguments": arguments, "scores": {}, "seconds": {}}

    def write(self) -> None:
        """Write the file, whole or not at all."""
        self.content["seconds"] = self.meter.seconds
        self.content["peak_memory_bytes"] = self.meter.peak_memory

        def write():
            self.file.parent.mkdir(parents=True, exist_ok=True)
            write_whole(self.file, lambda new: mha2gqa.write_json(new, self.content))

        on_rank_0(write)

    def check_files(self, args: Arguments) -> None:
        """Raise ValueError if a file that the run reads has another size or time than when the run
        began."""
        found = file_stamps(args)
        before = self.content.setdefault("files", found)
        for name in sorted(before.keys() | found.keys()):
            if before.get(name) != found.get(name):
                what = ("has changed" if name in before and name in found else
                        "is new" if name in found else "is gone")
                raise ValueError(f"{name} {what} since the run in {args.out} began; choose another "
                                 "--out, or bring back what was there")

    def score(
        self, name: str, data: Data, teacher: mha2gqa.Llama, model: Callable[[], mha2gqa.Llama]
    ) -> None:
        """Evaluate a model, unless an interrupted session has done so, and write the report."""
        if name not in self.scores:
            self.scores[name] = evaluate_model(model(), teacher, data, name)
            self.meter.lap("evaluate")
            self.write()
            release_memory()


def is_report(content: Mapping[str, Any]) -> bool:
    """Whether a report.json has what this program reads of it."""
    def is_of(kind: Any, value: Any) -> bool:
        return isinstance(value, dict) and all(isinstance(v, kind) for v in value.values())

    scores: Any = content.get("scores")
    number = float | int
    if not (is_of(object, content.get("arguments")) and is_of(number, content.get("seconds"))
            and is_of(number, content.get("peak_memory_bytes", {}))
            and is_of(list, content.get("files", {})) and is_of(dict, scores)
            and all(is_of(number, found) for found in scores.values())):
        return False
    with contextlib.suppress(KeyError, TypeError, ValueError):
        return "distilled" not in scores or bool(table(content))
    return False


def file_stamps(args: Arguments) -> dict[str, list[int]]:
    """[bytes, time of the last change in ns] of every file that a run reads."""
    folders = [Path(folder) for folder in (args.model, args.teacher) if folder]
    files = [file for folder in folders for file in mha2gqa.model_files(folder)]
    files += [Path(file) for file in (*args.text, *args.eval_text)]
    for task, dev in itertools.product(TASKS if args.tasks else (), (False, True)):
        file = task_file(Path(cast(str, args.tasks)), task, dev)
        files += [file, labels_file(file)] if file else []
    return {str(file): [file.stat().st_size, file.stat().st_mtime_ns]
            for file in files if file.is_file()}


def learning_rates(
    args: Arguments, stage: str, hidden_size: int, steps: int
) -> tuple[float, float]:
    """Learning rates of model and masks for a stage of so many steps.

    The paper's, 1e-5 and 1e-2, are for a model 4,096 wide and some 10,000 steps; narrower ones and
    shorter runs need more: 1e-5 · 4096/D · √(10⁴/steps), 3e-3 at most, and 1e-2 · 10⁴/steps, so
    that a mask can move as far. A refitted student starts so near its teacher that such steps would
    lead away: an eighth, but 1e-5 at least.
    """
    short = max(1.0, 10_000 / steps)
    lr = min(3e-3, 1e-5 * max(1.0, 4096 / hidden_size) * short**0.5)
    if args.method.refit and stage == "distill":
        lr = max(1e-5, lr / 8)
    return args.lr or lr, args.mask_lr or 1e-2 * short


def make_schedule(
    args: Arguments, stage: str, config: mha2gqa.LlamaConfig, data: TokenBatch
) -> Schedule:
    """The schedule of stage "distill" or "fine-tune"; ValueError if ranks cannot share a step."""
    seq_len, n = data.tokens.shape[1], dist.get_world_size()
    size = max(1, args.batch_tokens // seq_len)
    if size % n:
        raise ValueError(f"--batch-tokens: {size} rows a step cannot be shared by {n} processes; "
                         f"choose a multiple of {seq_len * n}")
    epochs, steps = (args.epochs, args.steps) if stage == "distill" else (args.sft_epochs, None)
    steps = steps or math.ceil(epochs * len(data) / size)
    rates = learning_rates(args, stage, config.hidden_size, steps)
    return Schedule(stage, steps, size, *rates, args.method.seed, args.save_every)


def text_split(
    model_dir: str | Path, config: mha2gqa.LlamaConfig, corpus: mha2gqa.Corpus, seed: int
) -> tuple[Tensor, Tensor]:
    """`mha2gqa.text_rows` without its warning of a short text, which is read again, in epochs."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="the text has")
        return mha2gqa.text_rows(model_dir, config, corpus, seed)


def load_data(args: Arguments, source: Checkpoint) -> Data:
    """Text, or tasks, or both (then the rows of both, and text to evaluate on)."""
    train, held_out, dev, seed = [], None, {}, args.method.seed
    config = source.config
    if args.text:
        rows_RT, kept_RT = text_split(source.path, config, args.corpus, seed)
        train, held_out = [text_batch(rows_RT)], text_batch(kept_RT)
        print_rank_0(f"text: {rows_RT.numel():,} tokens to train on, {kept_RT.numel():,} held out")
    if args.tasks:
        seq_len = mha2gqa.row_length(config, args.seq_len)
        examples = []
        for task, is_dev, found, n_cut in encoded_tasks(
                Path(args.tasks), source, seq_len, args.task_limit):
            print_rank_0(f"{task} {'dev' if is_dev else 'train'}: {len(found):,} examples, "
                         f"{sum(len(ids) for ids, _ in found):,} tokens, {n_cut} prompts cut")
            if is_dev:
                dev[task] = pack_examples(found, seq_len, seed), len(found)
            else:
                examples += found
        train.append(pack_examples(examples, seq_len, seed))
    rows = concatenate(train)
    if len(train) > 1:  # shuffled: calibration takes the first rows, which should be of both kinds
        rows = rows[epoch_order(len(rows), seed, 0)]
    return Data(rows, held_out, dev)


def read_input(
    args: Arguments, source: Checkpoint, device: torch.device
) -> tuple[Data, Schedule]:
    """(data, schedule) of a run, all checked; prints what will be done.

    Raises ValueError for what is wrong with the input.
    """
    config, model = source.config, student_model(args, source.config)
    if args.teacher:
        open_teacher(args, config)
    data = load_data(args, source)
    mha2gqa.check_calibration_rows(data.train.tokens, args.method)
    schedule = make_schedule(args, "distill", config, data.train)
    n, (student, trained) = dist.get_world_size(), n_parameters(model)
    seq_len = data.train.tokens.shape[1]
    shards, work = memory_needed(args, config, device, seq_len)
    if not (args.out / "report.json").exists():
        # Two checkpoints and one being written, of weights and moments; teacher and result.
        kept = 3 * (4 * student + 8 * trained) if 0 < args.save_every < schedule.steps else 0
        check_disk(args.out, kept + 8 * student)
    how = [*mha2gqa.method_steps(vars(args.method)), f"group {args.method.group}",
           *["masks"] * (not args.no_masks)]
    print_rank_0(
        f"{config.num_hidden_layers} blocks, {config.num_key_value_heads} to {args.kv_heads} KV "
        f"heads ({', '.join(how)});\n{schedule.steps} steps of {schedule.batch_size} rows of "
        f"{seq_len} tokens, learning rate {schedule.lr:.1e}"
        + ("" if args.no_masks else f", of masks {schedule.mask_lr:.1e}")
        + f";\n{n} x {device.type}, each with {mha2gqa.gigabytes(shards)} for weights, gradients "
        f"and Adam, about {mha2gqa.gigabytes(work)} to compute")
    warn_of_memory(args, config, device, seq_len)
    return data, schedule


def n_parameters(model: nn.Module) -> tuple[int, int]:
    """How many parameters a model has, and how many of them are trained."""
    found = [(p.numel(), p.requires_grad * p.numel()) for p in model.parameters()]
    return sum(n for n, _ in found), sum(n for _, n in found)


def memory_needed(
    args: Arguments, config: mha2gqa.LlamaConfig, device: torch.device, seq_len: int
) -> tuple[float, float]:
    """Bytes that a process needs for (its shards, a step's work).

    Shards: of each weight that learns 16, with gradient and Adam's moments; of the others, and the
    teacher's, those of the forward's dtype. Work, estimated: both embeddings, both heads and two
    blocks of each model, gathered; gradients of the student's, once more in float32; what a
    micro-batch's backward needs of each block, with mixed weights where masks are; and the logits
    of a chunk.
    """
    n, size, d = dist.get_world_size(), compute_dtype(device).itemsize, config.hidden_size
    (student, trained), (teacher, _) = map(n_parameters, (
        student_model(args, config), meta_model(config)))
    block = n_parameters(meta_model(config).model.layers[0])[0]
    tokens = max(seq_len, min(MICRO_TOKENS, args.batch_tokens // n))
    queries, keys = (k * config.head_dim for k in (
        config.num_attention_heads, args.kv_heads if args.no_masks else config.num_key_value_heads))
    kept = tokens * (10 * d + queries + 2 * keys + 4 * config.intermediate_size)
    kept += 0 if args.no_masks else 2 * keys * d
    n_layers, head = config.num_hidden_layers, config.vocab_size * d
    activations = kept + tokens * d * n_layers if args.checkpoint_activations else kept * n_layers
    gradients = (size + 4) * max(block, 2 * head if args.train == "all" else 0)
    work = size * (4 * head + 4 * block + activations) + gradients + 24 * max_logits(device)
    return (16 * trained + size * (student - trained + teacher)) / n, work


def warn_of_memory(
    args: Arguments, config: mha2gqa.LlamaConfig, device: torch.device, seq_len: int
) -> None:
    """Warn before any work starts if memory is short, and say what takes less."""
    cuda, here = device.type == "cuda", int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    def needed(**changes) -> float:
        changed = dataclasses.replace(args, **changes)
        shards, work = memory_needed(changed, config, device, seq_len)
        return (1 if cuda else here) * (work + (not (cuda and changed.cpu_offload)) * shards)

    free = mha2gqa.free_memory(device)
    if free is not None and needed() > free:
        less: list[dict[str, Any]] = [
            {"checkpoint_activations": True},
            {"checkpoint_activations": True, "train": "attention"}]
        less += [{"checkpoint_activations": True, "cpu_offload": True}] * cuda
        other = {" ".join(f"--{name.replace('_', '-')}" + f" {value}" * (value is not True)
                          for name, value in changes.items()): needed(**changes)
                 for changes in less}
        better = "".join(f", with {options} {mha2gqa.gigabytes(n)}"
                         for options, n in other.items() if n < needed())
        warnings.warn(
            f"{mha2gqa.gigabytes(needed())} of memory are needed{better}; "
            f"{mha2gqa.gigabytes(free)} are free; and the more GPUs or machines share it, the less "
            "for each", stacklevel=3)
    on_host = here * memory_needed(args, config, device, seq_len)[0]
    free = mha2gqa.free_memory(torch.device("cpu"))
    if cuda and args.cpu_offload and free is not None and on_host > free:
        warnings.warn(f"--cpu-offload needs {mha2gqa.gigabytes(on_host)} of this machine's memory, "
                      f"{mha2gqa.gigabytes(free)} are free", stacklevel=3)


def student_model(args: Arguments, config: mha2gqa.LlamaConfig) -> mha2gqa.Llama:
    """The student on the meta device; on the paper's way its new heads are beside the old ones."""
    new_config = mha2gqa.gqa_config(config, args.kv_heads)
    if args.no_masks:
        return meta_model(new_config, trained=args.train)
    return meta_model(config, args.kv_heads, args.train)


def check_disk(out: Path, needed: int) -> None:
    """Raise ValueError unless so many bytes are free where OUT is, or will be, and can be used."""
    disk = next(path for path in (out, *out.absolute().parents) if path.exists())
    if not os.access(disk, os.W_OK):
        raise ValueError(f"{disk}: no permission to write into it")
    free = shutil.disk_usage(disk).free
    if free < needed:
        raise ValueError(f"{out}: checkpoints and models need {needed:,} bytes, {free:,} are free "
                         "on the disk")


def open_teacher(args: Arguments, config: mha2gqa.LlamaConfig) -> Checkpoint:
    """The checkpoint of --teacher; raises ValueError if it does not fit the source's config.

    Its vocabulary must; and all that shapes the model, if it is the one to be converted.
    """
    teacher = Checkpoint.open(cast(str, args.teacher))
    free = {"max_position_embeddings", "bos_token_id", "eos_token_id"}
    for field in dataclasses.fields(config):
        found, expected = (getattr(c, field.name) for c in (teacher.config, config))
        checked = field.name == "vocab_size" or args.teacher_is_converted and field.compare
        if checked and field.name not in free and found != expected:
            raise ValueError(f"{args.teacher}: its {field.name} is {found}, the model's "
                             f"{expected}: it cannot be the teacher")
    return teacher


def fine_tuned_teacher(
    args: Arguments, source: Checkpoint, data: TokenBatch, device: torch.device
) -> Checkpoint:
    """OUT/teacher, the source after SFT on the answers; trained if it is not there yet."""
    folder, sft = args.out / "teacher", args.out / "sft"
    if not broadcast_from_rank_0(folder.exists()):
        model = shard(meta_model(source.config, trained=args.train), args.place(device))
        schedule = make_schedule(args, "fine-tune", source.config, data)
        train(model, data, cross_entropy(), schedule, sft, lambda: fill(model, source))
        save_model(folder, model, source.config, source, source)
        del model
        release_memory()
    if is_rank_0():
        shutil.rmtree(sft, ignore_errors=True)
    return raise_on_all_ranks(lambda: Checkpoint.open(folder))


@torch.no_grad()
def student_blocks(
    start: Checkpoint, rows: TokenBatch, kv_heads: int, method: mha2gqa.Method, fading: bool,
    note: Callable[[dict], None]
) -> Iterator[dict[str, Tensor]]:
    """The converted blocks; if `fading` the rotated blocks with the new KV heads beside the old.

    rows: to calibrate with, on the device that computes. `note` is called with a block's report.
    """
    tokens_BT = mha2gqa.calibration_rows(rows.tokens)
    document_BT = None if rows.document is None else mha2gqa.calibration_rows(rows.document)
    x_BTD = mha2gqa.embed(start.weights, tokens_BT, tokens_BT.device, torch.float32)
    blocks = mha2gqa.converted_blocks(
        start.config, start.weights, x_BTD, kv_heads, method, document_BT)
    for block in progress(blocks, "convert", start.config.num_hidden_layers):
        note(block.report)
        new = {name.replace("_proj.", "_proj.new."): w for name, w in block.converted.items()
               if "k_proj" in name or "v_proj" in name}
        yield block.aligned | new if fading else block.converted


def run_stages(
    args: Arguments, source: Checkpoint, data: Data, schedule: Schedule, report: Report,
    device: torch.device
) -> None:
    """The whole run; the result is OUT/gqa, measurements go into the report."""
    config, place = source.config, args.place(device)
    new_config = mha2gqa.gqa_config(config, args.kv_heads)
    report.content["kv_cache_bytes_per_token"] = {
        "source": mha2gqa.kv_cache_bytes(config, source.weights),
        "converted": mha2gqa.kv_cache_bytes(new_config, source.weights)}
    seq_len = data.train.tokens.shape[1]
    n_rows = min(len(data.train), max(2, args.calibration_tokens // seq_len))
    report.content |= {
        "num_hidden_layers": config.num_hidden_layers,
        "kv_heads": {"source": config.num_key_value_heads, "converted": args.kv_heads},
        "text": {"training": list(args.text), "held_out": list(args.eval_text or args.text)},
        "tokens": {"calibration": n_rows * seq_len, "calibration_seq_len":
                   mha2gqa.calibration_rows(data.train.tokens[:1]).shape[1],
                   "training": schedule.steps * schedule.batch_size * seq_len,
                   "held_out": data.held_out.tokens.numel() if data.held_out else 0,
                   "seq_len": seq_len},
        "training": {"steps": schedule.steps, "rows": schedule.batch_size, "lr": schedule.lr,
                     "mask_lr": None if args.no_masks else schedule.mask_lr,
                     "weights": args.train, "teacher": args.teacher, "tasks": args.tasks}}
    if args.source_teaches:
        tuned = source
    elif args.teacher:
        tuned = raise_on_all_ranks(lambda: open_teacher(args, config))
    else:
        tuned = fine_tuned_teacher(args, source, data.train, device)
        report.meter.lap("fine-tune")
    teacher = frozen_checkpoint(tuned, place)
    report.score("source", data, teacher, lambda:
                 teacher if args.source_teaches else frozen_checkpoint(source, place))
    if not args.source_teaches:
        report.score("teacher", data, teacher, lambda: teacher)
    start = tuned if args.teacher_is_converted else source
    non_block = mha2gqa.non_block_weights(start.weights)
    pooled = (mha2gqa.merge(block, config, args.kv_heads) for block in start.blocks())
    report.score("mean_pooled", data, teacher,
                 lambda: frozen_model(new_config, pooled, non_block, place))
    result, checkpoints_folder = args.out / "gqa", args.out / "checkpoints"
    if not broadcast_from_rank_0(result.exists()):
        student = shard(student_model(args, config), place)
        masks = None if args.no_masks else Masks(
            student, schedule.steps, schedule.mask_lr, schedule.seed)

        def convert():
            layers: list[dict] = []
            report.content["layers"] = layers
            blocks = student_blocks(start, data.train[:n_rows].to(device), args.kv_heads,
                                    args.method, not args.no_masks, layers.append)
            load_sharded(student, blocks, non_block)
            report.write()
            if masks:
                masks.hold(0.0, device)
            report.meter.lap("convert")
            report.score("converted", data, teacher, lambda: student)

        train(student, data.train, distillation(teacher), schedule, checkpoints_folder, convert,
              masks)
        report.meter.lap("distill")
        save_model(result, student, new_config, source, start)
        report.meter.lap("write")
        del student, masks
        release_memory()
    written = raise_on_all_ranks(lambda: Checkpoint.open(result))
    report.score("distilled", data, teacher, lambda: frozen_checkpoint(written, place))


def describe_result(args: Arguments, report: Mapping[str, Any]) -> None:
    """Write what was done and measured beside the result, as the converter does: mha2gqa.json and a
    model card."""
    folder = args.out / "gqa"
    if "training" not in report or (folder / "README.md").exists():
        return
    method = dataclasses.asdict(args.method)
    heads, tokens, training = report["kv_heads"], report["tokens"], report["training"]
    scores = {name: {"KL" if of == "kl" else of: n for of, n in found.items()}
              for name, found in report["scores"].items()}
    content = {
        **mha2gqa.provenance(), "source": str(Path(args.model).resolve()), "method": method,
        **{name: of for name, of in report.items()
           if name not in ("arguments", "scores", "files", "layers", "done")},
        "loss_nats_per_token": {n: of["loss"] for n, of in scores.items() if "loss" in of},
        "kl_nats_per_token": {n: of["KL"] for n, of in scores.items() if "KL" in of},
        "task_accuracy": {n: {task: x for task, x in of.items() if task not in ("loss", "KL")}
                          for n, of in scores.items() if "mean" in of},
        "layers": report.get("layers", [])}  # not of a run that began before they were kept
    steps = [*mha2gqa.method_steps(method), *["a teacher of its own"] * (not args.source_teaches)]
    how = (f"{heads['source']} to {heads['converted']} KV heads ({', '.join(steps)}), then "
           f"{training['steps']:,} steps of distillation on {tokens['training']:,} tokens")
    write_whole(folder / "mha2gqa.json", lambda new: mha2gqa.write_json(new, content))
    mha2gqa.write_model_card(folder, Path(args.model), report["kv_cache_bytes_per_token"],
                             mha2gqa.without_repeats(scores, method), how)


def table(report: Mapping[str, Any]) -> str:
    """What a person wants to know of a finished run's report: a column for each model."""
    scores = mha2gqa.without_repeats(report["scores"], report["arguments"])
    cache = report["kv_cache_bytes_per_token"]
    sizes = [cache["source" if name in ("source", "teacher") else "converted"] for name in scores]
    rows = [" " * 23 + "".join(f"{name.replace('_', '-'):>12}" for name in scores)]
    for column in scores["source"]:
        name = "KL" if column == "kl" else column
        rows.append(f"{name:<23}" + "".join(f"{of[column]:12.4f}" for of in scores.values()))
    rows.append("KV cache, bytes a token" + "".join(f"{size:12,}" for size in sizes))
    of = "teacher" if "teacher" in scores else "source"
    what = {"loss": f"held-out loss, nats/token; KL to the {of}",
            "mean": "shares of the tasks' exact answers"}
    head = "; ".join(words for column, words in what.items() if column in scores["source"])
    seconds = textwrap.fill(", ".join(
        f"{name} {n:.0f}" for name, n in report["seconds"].items()), 96)
    return "\n".join([head, *rows, "seconds", textwrap.indent(seconds, "  ")])


def filled_at_random(model: mha2gqa.Llama) -> mha2gqa.Llama:
    """A sharded model with random weights, to time it."""
    with torch.no_grad():
        for p in model.parameters():
            cast(DTensor, p).to_local().normal_(0, 0.02)
    return model


def flop_per_token(args: Arguments, config: mha2gqa.LlamaConfig, seq_len: int) -> float:
    """Floating point operations that a step of distillation needs for each of its tokens.

    2 for each weight of a matrix and each of: the teacher's forward, the student's, its gradient of
    what enters, and if it is trained its gradient of the weight. And 2·H·E·T in each block for
    causal attention, once in the teacher and three times in the student. What is computed again
    does not count (Chowdhery et al. 2022, model FLOP utilisation).
    """
    def matrices(model: mha2gqa.Llama) -> list[nn.Parameter]:
        return [p for name, p in model.named_parameters() if p.ndim == 2 and (
            "embed_tokens" not in name or config.tie_word_embeddings)]

    kept = config if not args.no_masks else mha2gqa.gqa_config(config, args.kv_heads)
    teacher, student = matrices(meta_model(config)), matrices(meta_model(kept, trained=args.train))
    trained = [p for p in student if p.requires_grad]
    attention = config.num_hidden_layers * config.num_attention_heads * config.head_dim * seq_len
    return 2 * (sum(p.numel() for p in [*teacher, *student, *student, *trained]) + 4 * attention)


def benchmark(args: Arguments, device: torch.device) -> None:
    """Time `args.benchmark` steps of a student and a teacher of MODEL's shape, and print it.

    Weights and tokens are random; of MODEL only config.json is read. What runs is `train`, in a
    temporary folder.
    """
    model = on_rank_0(lambda: mha2gqa.model_folder(args.model, weights=False))
    config = mha2gqa.load_config(broadcast_from_rank_0(model))
    place, steps = args.place(device), args.benchmark or 0
    seq_len = mha2gqa.row_length(config, args.seq_len)
    n_rows = max(1, args.batch_tokens // seq_len)
    data = text_batch(torch.randint(config.vocab_size, (n_rows, seq_len),
                                    generator=torch.Generator().manual_seed(args.method.seed)))
    on_rank_0(lambda: warn_of_memory(args, config, device, seq_len))
    objective = distillation(filled_at_random(shard(meta_model(config, trained="none"), place)))
    folder = Path(broadcast_from_rank_0(on_rank_0(tempfile.mkdtemp)))

    def timed(args: Arguments) -> mha2gqa.Meter:
        student = filled_at_random(shard(student_model(args, config), place))
        for n in (2, steps):  # the first steps are slower
            schedule = dataclasses.replace(make_schedule(
                dataclasses.replace(args, steps=n), "distill", config, data), save_every=0)
            masks = None if args.no_masks else Masks(student, n, schedule.mask_lr, schedule.seed)
            meter = mha2gqa.Meter(device)
            train(student, data, objective, schedule, folder / "checkpoints", lambda: None, masks,
                  meter.lap)
        return meter

    try:
        meter = timed(args)
        release_memory()
        without = meter if args.no_masks else timed(dataclasses.replace(args, no_masks=True))
    finally:
        on_rank_0(lambda: shutil.rmtree(folder, ignore_errors=True))
    masked = sum(meter.seconds.values()) / sum(without.seconds.values()) - 1
    peaks: list[int] = [0] * dist.get_world_size()
    dist.all_gather_object(peaks, meter.peak_memory["cuda"] or meter.peak_memory["host"])
    seconds = {stage: s / steps for stage, s in meter.seconds.items()}
    speed = data.tokens.numel() / sum(seconds.values())
    rate = mha2gqa.matrix_rate(device, compute_dtype(device))
    mfu = speed * flop_per_token(args, config, seq_len) / (rate * dist.get_world_size())
    print_rank_0(
        f"{steps} steps of {n_rows} rows of {seq_len} tokens, {dist.get_world_size()} x "
        f"{torch.cuda.get_device_name() if device.type == 'cuda' else 'cpu'}: {speed:,.0f} "
        f"tokens/s,\n{mfu:.1%} of the {rate / 1e12:.3g} TFLOP/s of a large matrix product here\n"
        "seconds a step: "
        + ", ".join(f"{stage} {s:.3g}" for stage, s in seconds.items())
        + ("" if args.no_masks else f"\nmasks add {masked:.1%} to a step without")
        + f"\npeak memory: {mha2gqa.gigabytes(max(peaks))} a process")


# ---- 9 tasks -------------------------------------------------------------------------------------


def choice_list(choices: Iterable[str]) -> str:
    """The choices as a Python list prints them."""
    return f"Choices: {list(choices)!r}"


def boolq(r, _label):
    """(prompt, answer) of a BoolQ record, with `answer` or, in SuperGLUE's spelling, `label`."""
    answers = {"true": "true", "1": "true", "false": "false", "0": "false"}
    answer = r["answer"] if "answer" in r else r["label"]
    question = f"Question: {r['question']}?\n{choice_list(['true', 'false'])}"
    return f"{r['passage']}\n{question}\nAnswer:", answers[str(answer).lower()]


def piqa(r, label):
    """(prompt, answer) of a PIQA record and its label, 0 or 1."""
    choices = {"0": r["sol1"], "1": r["sol2"]}
    return (f"Goal: {r['goal']}\nChoose the most sensible solution to achieve the goal. "
            f"{choice_list(choices.values())}\nAnswer:"), choices[label]


def winogrande(r, _label):
    """(prompt, answer) of a WinoGrande record, whose answer is 1 or 2."""
    choices = {"1": r["option1"], "2": r["option2"]}
    return ('Choose the most sensible text to replace the "_" in the following sentence: '
            f"{r['sentence']}\n{choice_list(choices.values())}\nAnswer:"), choices[str(r["answer"])]


def siqa(r, label):
    """(prompt, answer) of a SocialIQA record and its label, 1 to 3."""
    choices = {"1": r["answerA"], "2": r["answerB"], "3": r["answerC"]}
    return (f"{r['context']}\nQuestion: {r['question']}\n{choice_list(choices.values())}\nAnswer:",
            choices[label])


def science(r, _label):
    """ARC and OpenbookQA: {"question": {"stem", "choices"}} or {"question_stem", "choices"}."""
    question = r["question"] if isinstance(r.get("question"), dict) else r
    stem, choices = question.get("stem", question.get("question_stem")), question["choices"]
    if isinstance(choices, dict):
        texts, labels = choices["text"], choices["label"]
    else:
        texts, labels = [c["text"] for c in choices], [c["label"] for c in choices]
    return (f"Question: {stem}\n{choice_list(texts)}\nAnswer:",
            texts[labels.index(r["answerKey"])])


def hellaswag(r, _label):
    """(prompt, answer) of a HellaSwag record, with `ctx` or with `ctx_a` and `ctx_b`."""
    ctx = r["ctx"] if "ctx" in r else f"{r['ctx_a']} {r['ctx_b']}"
    endings = dict(enumerate(r["endings"]))  # not a list, of which label -1 would be the last
    return ("Please choose the most appropriate text to complete the passage below:\n"
            f"Passage: {ctx}\n{choice_list(endings.values())}\nAnswer:"), endings[int(r["label"])]


# task: (parser, training file, dev files in the spellings of its copies)
TASKS = {
    "boolq": (boolq, ["train.jsonl"], ["val.jsonl", "dev.jsonl"]),
    "piqa": (piqa, ["train.jsonl"], ["valid.jsonl", "dev.jsonl"]),
    "hellaswag": (hellaswag, ["hellaswag_train.jsonl"], ["hellaswag_val.jsonl"]),
    "winogrande": (winogrande, ["train_xl.jsonl"], ["dev.jsonl"]),
    "arc-c": (science, ["ARC-Challenge-Train.jsonl"], ["ARC-Challenge-Dev.jsonl"]),
    "arc-e": (science, ["ARC-Easy-Train.jsonl"], ["ARC-Easy-Dev.jsonl"]),
    "openbookqa": (science, ["train.jsonl"], ["dev.jsonl"]),
    "siqa": (siqa, ["train.jsonl"], ["dev.jsonl"]),
}


def task_file(folder: Path, task: str, dev: bool) -> Path | None:
    """The training or dev file of a task that is there."""
    _, *names = TASKS[task]
    return next((file for name in names[dev] if (file := folder / task / name).is_file()), None)


def labels_file(file: Path) -> Path:
    """The file with the labels of a task's file, if they are not in its records."""
    return file.with_name(f"{file.stem}-labels.lst")


def read_task(folder: Path, task: str, dev: bool) -> list[tuple[str, str]]:
    """(prompt, answer) of every record of a task's training or dev file, as published.

    Raises ValueError with file and line for a missing file or a record of another form.
    """
    parse, *names = TASKS[task]
    file = task_file(folder, task, dev)
    if file is None:
        raise ValueError(f"{folder / task}: no {' or '.join(names[dev])}")
    lines = [(n, line) for n, line in enumerate(read_text(file).split("\n"), 1) if line.strip()]
    beside = labels_file(file)
    if parse in (piqa, siqa) and not beside.is_file():
        raise ValueError(f"{beside}: no such file; it should hold {file.name}'s labels")
    labels = read_text(beside).split() if beside.is_file() else [None] * len(lines)
    if len(labels) != len(lines):
        raise ValueError(f"{beside}: {len(labels)} labels for {len(lines)} records")
    examples = []
    for (number, line), label in zip(lines, labels, strict=True):
        try:
            prompt, answer = parse(json.loads(line), label)
            # Web text has lone surrogates, which no tokenizer takes.
            examples.append(tuple(part.encode("utf-8", "replace").decode()
                                  for part in (prompt, answer)))
        except (ValueError, KeyError, TypeError, IndexError, AttributeError,
                RecursionError) as error:
            raise ValueError(f"{file}, line {number}: not a record of {task} ({error!r})") from None
    return examples


def read_text(file: Path) -> str:
    """The text of a file; ValueError for what is not UTF-8, or only a Git LFS pointer."""
    mha2gqa.refuse_pointer(file)
    try:
        return file.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{file}: not UTF-8 ({error})") from None


Example = tuple[list[int], int]  # (token ids with EOS, length of the prompt)


def encode_examples(
    examples: Sequence[tuple[str, str]], encode: Callable, end: list[int], seq_len: int
) -> tuple[list[Example], int]:
    """(the examples, each closed by `end`; number of prompts that were truncated on the left)."""
    prompts = encode([prompt.strip() for prompt, _ in examples])
    wholes = encode([f"{prompt.strip()} {answer.strip()}" for prompt, answer in examples])
    coded, cut = [], 0
    for prompt, whole in zip(prompts, wholes, strict=True):
        ids = whole + end
        over = max(0, len(ids) - seq_len)
        cut += over > 0
        coded.append((ids[over:], max(1, len(prompt) - over)))
    return coded, cut


def pack_examples(examples: Sequence[Example], seq_len: int, seed: int) -> TokenBatch:
    """Many short examples in a row: each into the fullest of the open rows that still holds it."""
    order = random.Random(seed).sample(range(len(examples)), len(examples))
    rows: list[list[int]] = []  # which examples each holds
    free: dict[int, int] = {}  # the open rows, the 64 newest, and the tokens that they still hold
    for n in order:
        size = len(examples[n][0])
        fits = [row for row in free if free[row] >= size]
        row = min(fits, key=lambda row: free[row]) if fits else len(rows)
        if not fits:
            rows.append([])
            free[row] = seq_len
            free = dict(list(free.items())[-64:])
        free[row] -= size
        rows[row].append(n)
    tokens = torch.zeros(len(rows), seq_len, dtype=torch.int64)
    loss_bits, document = torch.zeros_like(tokens, dtype=torch.uint8), torch.full_like(tokens, -1)
    for r, members in enumerate(rows):
        at = 0
        for n in members:
            ids, prompt = examples[n]
            end = at + len(ids)
            tokens[r, at:end], document[r, at:end] = torch.tensor(ids), n
            loss_bits[r, at : at + prompt - 1] = KL
            loss_bits[r, at + prompt - 1 : end - 1] = ANSWER
            at = end
    return TokenBatch(tokens, loss_bits, document)


def encoded_tasks(
    folder: Path, source: Checkpoint, seq_len: int, limit: int | None
) -> Iterator[tuple[str, bool, list[Example], int]]:
    """(task, is it the dev file, its examples, how many prompts were cut) of a folder of tasks."""
    encode, end = mha2gqa.load_tokenizer(source.path), source.config.eos_ids
    found = [task for task in TASKS if (folder / task).is_dir()]
    if not found:
        raise ValueError(f"{folder}: holds none of the folders {', '.join(TASKS)}")
    for task in found:
        for is_dev in (False, True):
            examples = read_task(folder, task, is_dev)[:limit]
            yield task, is_dev, *encode_examples(examples, encode, end, seq_len)


# ---- 10 the demo, command line -------------------------------------------------------------------


DEMO = Path("mha2gqa-demo")


def make_demo_source(corpus: mha2gqa.Corpus, device: torch.device) -> None:
    """A small MHA LLaMA with a BPE tokenizer, trained a little on Python's own documentation, the
    demo's held-out rows excepted."""
    from pydoc_data.topics import topics

    if is_rank_0():
        save_tokenizer(DEMO / "tokenizer", list(topics.values()))
        (DEMO / "text.jsonl").write_text(
            "".join(json.dumps({"text": text}) + "\n" for text in topics.values()))
    dist.barrier()
    config = mha2gqa.LlamaConfig(1024, 128, 344, 4, 8, max_position_embeddings=128,
                                 tie_word_embeddings=True, bos_token_id=0, eos_token_id=1)
    rows, _ = text_split(DEMO / "tokenizer", config, corpus, seed=0)
    torch.manual_seed(0)
    weights = {name: torch.ones(p.shape) if p.ndim == 1 else 0.04 * torch.randn(p.shape)
               for name, p in meta_model(config).named_parameters()}
    start = Checkpoint(DEMO / "tokenizer", config, weights)
    model = shard(meta_model(config), Place(device))
    schedule = Schedule("make the source", 400, 16, 3e-3, 0, seed=0, save_every=0)
    train(model, text_batch(rows), cross_entropy(), schedule, DEMO / "pretraining",
          lambda: fill(model, start))
    save_model(DEMO / "source", model, config, start, start)
    if is_rank_0():
        shutil.rmtree(DEMO / "pretraining", ignore_errors=True)


def save_tokenizer(folder: Path, texts: list[str]) -> None:
    """Train a byte-level BPE on the texts and save it as a tokenizer.json."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    special = ["<s>", "</s>"]
    tokenizer.train_from_iterator(texts, trainers.BpeTrainer(
        vocab_size=1024, special_tokens=special, show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet()))
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", 0)])
    folder.mkdir(exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    mha2gqa.write_json(folder / "tokenizer_config.json", {
        "tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<s>", "eos_token": "</s>"})


def parse_arguments(argv: Sequence[str] | None) -> Arguments | None:
    """The command line's arguments, None for the demo; wrong ones end the program with one line."""
    parser = mha2gqa.ArgumentParser(
        prog="train-gqa", description=__doc__.split("\n")[0],
        epilog="Without --model: the demo, which makes and converts a small model in mha2gqa-demo.")
    add = parser.add_argument
    add("--version", action="version", version=mha2gqa.versions())
    add("--model", metavar="MODEL", help="Hugging Face directory of the source, or its name on the "
        "hub")
    add("--kv-heads", type=int, metavar="G", help="KV heads wanted, a divisor of the source's")
    add("--out", metavar="DIR", help="where the run goes, and where it continues: the same command "
        "again goes on from the newest checkpoint; the result is DIR/gqa")
    add("--text", nargs="+", metavar="FILE", help="text to train on, as mha2gqa.py's")
    add("--eval-text", nargs="+", metavar="FILE", help="held-out text; without it the "
        "first 10%% of --text's rows are held out, 65,536 tokens at most")
    add("--tasks", metavar="DIR", help=f"folders of the public raw files of {', '.join(TASKS)}")
    add("--task-limit", type=int, metavar="N", help="only the first N examples of every file")
    add("--teacher", metavar="MODEL", help="a fine-tuned source; without it the source is "
        "fine-tuned on --tasks, or is the teacher itself if there is text alone")
    add("--sft-epochs", type=float, metavar="N",
        help="default: %(default)s; 0: no fine-tuning")
    add("--steps", type=int, metavar="N", help="default: what --epochs takes")
    add("--epochs", type=float, metavar="N",
        help="passes over the data (default: %(default)s)")
    add("--batch-tokens", type=int, metavar="N", help="tokens per step, over all "
        "processes (default: %(default)s, 64 rows of 2048)")
    add("--seq-len", type=int, metavar="N", help="tokens per row; 2,048, or the context if less")
    add("--lr", type=float, help="of all training, after 32 steps of warm-up, then down "
        "to 0 in a cosine; default: 1e-5 * max(1, 4096/hidden_size) * sqrt(max(1, 10000/steps)): "
        "the paper's rate for its model and length, more for narrower models and shorter runs, "
        "3e-3 at most; with --refit, which starts near the teacher, an eighth of it in the "
        "distillation, 1e-5 at least")
    add("--mask-lr", type=float, help="of the masks' log alpha, constant; default: 1e-2 * max(1, "
        "10000/steps): the paper's, and more for shorter runs, so that a mask moves as far")
    add("--no-masks", action="store_true", help="the new heads alone from the first step, as "
        "always with --align linear or --refit, which change more than keys and values")
    mha2gqa.add_method_arguments(parser)
    add("--calibration-tokens", type=int, metavar="N",
        help="tokens that the conversion reads (default: %(default)s)")
    add("--save-every", type=int, metavar="N", help="steps from one "
        "checkpoint to the next (default: %(default)s; 0: none but on SIGTERM)")
    add("--train", choices=("all", "attention"), help="all weights (default), or attention and the "
        "norms alone, which takes less than half of the memory")
    add("--benchmark", nargs="?", type=int, const=10, metavar="STEPS", help="time so many steps "
        "(10) of a model of --model's shape, with random weights and tokens; writes nothing")
    add("--checkpoint-activations", action="store_true", help="less memory, a third more time")
    add("--cpu-offload", action="store_true", help="keep weights, gradients and Adam's moments in "
        "the host's memory, and a block at a time on the GPU: for a model that it cannot hold")
    add("--compile", action="store_true", help="torch.compile each block: a minute at the start, "
        "then less time a step (on a CPU hardly)")
    defaults = {f.name: f.default for f in dataclasses.fields(Arguments)
                if f.default is not dataclasses.MISSING and f.name != "method"}
    parser.set_defaults(**defaults, joint=False)
    if not (sys.argv[1:] if argv is None else argv):
        return None
    a = parser.parse_args(argv)
    run_has_all = a.out and (a.text or a.tasks) or a.benchmark
    if not (a.model and a.kv_heads is not None and run_has_all):
        parser.error("a run needs --model, --kv-heads, --out, and --text or --tasks")
    for name, value in vars(a).items():
        least = 0 if name in ("sft_epochs", "save_every", "seed") else 1e-12
        number = isinstance(value, int | float) and not isinstance(value, bool)
        if number and not least <= value < math.inf:
            parser.error(f"--{name.replace('_', '-')} {value}: expected "
                         + ("0 or more" if least == 0 else "more than 0"))
    try:
        method = mha2gqa.method_of_arguments(a)
    except ValueError as error:
        parser.error(str(error))
    given = {name: value for name, value in vars(a).items() if name not in vars(method)}
    return Arguments(**given | {"out": Path(a.out or "."), "method": method})


DEMO_ARGUMENTS = Arguments(
    model=f"{DEMO}/source", kv_heads=2, out=DEMO, text=[f"{DEMO}/text.jsonl"], steps=300,
    batch_tokens=2048)


def run(args: Arguments, device: torch.device) -> None:
    """The run that the arguments ask for, or just the table of one that is finished."""
    if args.benchmark:
        benchmark(args, device)
        return
    report = Report(args, device)
    if args is DEMO_ARGUMENTS and not broadcast_from_rank_0((args.out / "source").exists()):
        report.write()
        print_rank_0(f"the demo, in {DEMO}: makes a small model of Python's documentation,\n"
                     "converts it to fewer KV heads and trains it, in some minutes")
        make_demo_source(args.corpus, device)
        report.meter.lap("make the source")
    args = dataclasses.replace(args, **broadcast_from_rank_0(on_rank_0(lambda: {
        name: str(mha2gqa.model_folder(model))
        for name in ("model", "teacher") if (model := getattr(args, name))})))
    on_rank_0(lambda: report.check_files(args))
    if "distilled" not in report.scores:
        source = raise_on_all_ranks(lambda: Checkpoint.open(args.model))
        data, schedule = on_rank_0(lambda: read_input(args, source, device)) or (None, None)
        report.meter.lap("read")
        report.write()
        data, schedule = share(data, args.out / "data.pt"), broadcast_from_rank_0(schedule)
        run_stages(args, source, data, schedule, report, device)
    on_rank_0(lambda: describe_result(args, report.content))
    on_rank_0(lambda: (args.out / "data.pt").unlink(missing_ok=True))
    print_rank_0(f"\n{table(report.content)}\nwritten to {args.out}/gqa")


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; returns the exit status: 2 for bad input, with one line on stderr.

    The process group stays: whoever goes on after this destroys it.
    """
    with contextlib.redirect_stderr(sys.stderr if is_rank_0() else io.StringIO()):
        args = parse_arguments(argv)
    try:
        run(args or DEMO_ARGUMENTS, start_processes())
    except (ValueError, OSError, FloatingPointError) as error:
        # Before there is a group, what is wrong may be so on one machine alone.
        if is_rank_0() if dist.is_initialized() else os.environ.get("LOCAL_RANK", "0") == "0":
            print(f"error: {error}", file=sys.stderr)
        return 2
    except (MemoryError, RuntimeError) as error:
        if mha2gqa.is_out_of_memory(error):
            reason = (str(error) or "not enough memory").splitlines()[0].rstrip(".")
            print(f"error: {reason}. More processes, --checkpoint-activations or a shorter "
                  "--seq-len take less", file=sys.stderr)
            return 2
        if not is_lost_process(error):
            raise
        if os.environ.get("RANK") in ("0", "1"):  # one of them at least has not ended before
            print("error: another process of this run has ended, see above; the same command "
                  "continues", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        if is_rank_0():
            print("interrupted: the same command continues", file=sys.stderr)
        return 130
    return 0


def command() -> None:
    """The program `train-gqa`, and what torchrun starts."""
    mha2gqa.install_signal_handlers()
    status = main()
    sys.stdout.flush()
    sys.stderr.flush()
    # subtle: while torch takes down the threads of a group, another rank's end can abort this one.
    os._exit(status)


if __name__ == "__main__":
    command()
