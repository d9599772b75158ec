# SPDX-License-Identifier: Apache-2.0
"""train_gqa: distil a LLaMA into one with fewer key and value heads, with FSDP2.

    torchrun train_gqa.py                                        # the demo, on CPU, within minutes
    torchrun --nproc-per-node 8 train_gqa.py --model MODEL --kv-heads 8 --tasks DIR --out OUT

The program around mha2gqa.py, after Jin et al. 2024 (arXiv 2412.20677). The teacher is the source
fine-tuned on the tasks, or the source itself. The student starts as the converted teacher, or as
what mha2gqa.py has written (--start-from), and KL and BiLD pull its logits to the teacher's. Or,
the paper's way (--align rotation, no refit), the student starts as the source with its heads
rotated, which changes no output, and hard-concrete masks let its key and value heads fade into the
new shared ones.

Every batch, and the random numbers of the masks, are pure functions of (seed, step). So the result
depends, up to rounding, neither on the number of processes nor on where a run was interrupted, and
there is no loader state to save.

     1  processes    what ranks do together
     2  batches      packed rows of tokens, and which losses each prediction enters
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
import errno
import functools
import gc
import io
import itertools
import json
import logging
import math
import os
import random
import shutil
import signal
import sys
import time
import warnings
from argparse import ArgumentParser, Namespace
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, cast

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed import fsdp
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.utils.checkpoint import checkpoint

import mha2gqa
from mha2gqa import Llama, LlamaConfig, Method, Weights

# ---- 1 processes ---------------------------------------------------------------------------------


def start_processes() -> None:
    """Join torchrun's processes, or be the only one; each takes the GPU of its number, if any."""
    cuda = torch.cuda.is_available()
    alone: dict[str, Any] = {"store": dist.HashStore(), "rank": 0, "world_size": 1}
    # The others wait while rank 0 converts: longer than the default timeout allows.
    dist.init_process_group(
        "cpu:gloo,cuda:nccl" if cuda else "gloo", timeout=datetime.timedelta(hours=12),
        **{} if "RANK" in os.environ else alone)
    if cuda:
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", 0)))


def compute_device() -> torch.device:
    """Where this process computes, whatever memory its shards are in."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def is_rank_0() -> bool:
    """Whether this process is rank 0, which reads, writes and prints for all."""
    return os.environ.get("RANK", "0") == "0"


def print_rank_0(line: str) -> None:
    """Print a line, once for all processes."""
    if is_rank_0():
        print(line, flush=True)


def from_rank_0(function: Callable[[], Any]) -> Any:
    """What the function returns on rank 0, on all ranks, which wait for it; what it raises, too."""
    box: list[Any] = [None, None]
    if is_rank_0():
        try:
            box[0] = function()
        except Exception as error:
            box[1] = error
    dist.broadcast_object_list(box)
    if box[1] is not None:
        raise box[1]
    return box[0]


def progress(items: Iterable, name: str, total: int | None = None, **options) -> Iterable:
    """`mha2gqa.progress` on rank 0, nothing on the others."""
    return mha2gqa.progress(items, name, total, **options, disable=not is_rank_0())


# ---- 2 batches -----------------------------------------------------------------------------------

# Bits of a prediction: PROMPT enters KL; ANSWER enters BiLD and cross-entropy. Plain text has both.
PROMPT, ANSWER = 1, 2


@dataclasses.dataclass(frozen=True)
class TokenBatch:
    """Packed rows: tokens (R, T), the losses of each prediction, the document of each token.

    `loss_bits[r, t]` says which losses the prediction of token t + 1, made at t, enters. Text:
    PROMPT | ANSWER for all but the row's last one, and the row counts as one document (`document`
    None). Tasks: PROMPT within a prompt, ANSWER for an answer and its EOS, 0 from one document to
    the next.
    """

    tokens: Tensor
    loss_bits: Tensor
    document: Tensor | None = None

    def __getitem__(self, rows) -> "TokenBatch":
        return TokenBatch(*(cast(Any, x) if x is None else x[rows] for x in vars(self).values()))

    def to(self, device: torch.device) -> "TokenBatch":
        """With the tokens on the device. The rest stays in the host's memory: what is computed of
        it there does not wait for the GPU."""
        return dataclasses.replace(self, tokens=self.tokens.to(device, non_blocking=True).long())

    def inputs(self) -> tuple:
        """What a model takes: the tokens and, of packed rows, positions and ends of documents."""
        return self.tokens, None if self.document is None else mha2gqa.document_positions(
            self.document, self.tokens.device)

    def predictions(self, bits: int) -> list[Tensor]:
        """(Where in the rows, laid end to end, the predictions with one of these bits are, their
        bits), on the device of the tokens."""
        bits_N = self.loss_bits.flatten() & bits
        at = bits_N.nonzero()[:, 0]
        return [x.to(self.tokens.device, non_blocking=True) for x in (at, bits_N[at])]

    def __len__(self) -> int:
        return len(self.tokens)


def text_batch(tokens_RT: Tensor) -> TokenBatch:
    """Rows of plain text: every prediction but the row's last enters all losses."""
    loss_bits = torch.full_like(tokens_RT, PROMPT | ANSWER, dtype=torch.uint8)
    loss_bits[:, -1] = 0
    return TokenBatch(tokens_RT.int(), loss_bits)


Example = tuple[list[int], int]  # (token ids with EOS, length of the prompt)


def pack_examples(examples: Sequence[Example], seq_len: int, seed: int) -> TokenBatch:
    """Many short examples in a row: each into the fullest of the open rows that still holds it."""
    order = random.Random(seed).sample(range(len(examples)), len(examples))
    rows: list[list[int]] = []  # which examples each holds
    room: dict[int, int] = {}  # the open rows, the 64 newest, and the tokens that they still hold
    for n in order:
        size = len(examples[n][0])
        fits = [row for row in room if room[row] >= size]
        row = min(fits, key=lambda row: room[row]) if fits else len(rows)
        if not fits:
            rows.append([])
            room[row] = seq_len
            room = dict(list(room.items())[-64:])
        room[row] -= size
        rows[row].append(n)
    tokens = torch.zeros(len(rows), seq_len, dtype=torch.int32)
    loss_bits, document = torch.zeros_like(tokens, dtype=torch.uint8), torch.full_like(tokens, -1)
    for r, members in enumerate(rows):
        at = 0
        for n in members:
            ids, prompt = examples[n]
            end = at + len(ids)
            tokens[r, at:end], document[r, at:end] = torch.tensor(ids), n
            loss_bits[r, at : at + prompt - 1] = PROMPT
            loss_bits[r, at + prompt - 1 : end - 1] = ANSWER
            at = end
    return TokenBatch(tokens, loss_bits, document)


def concatenate(parts: Sequence[TokenBatch]) -> TokenBatch:
    """The rows of several batches."""
    documents = [torch.zeros_like(p.tokens) if p.document is None else p.document for p in parts]
    packed = any(p.document is not None for p in parts)
    return TokenBatch(torch.cat([p.tokens for p in parts]), torch.cat([p.loss_bits for p in parts]),
                      torch.cat(documents) if packed else None)


@functools.lru_cache(maxsize=2)
def epoch_order(n_rows: int, seed: int, epoch: int) -> Tensor:
    """The order of the rows in one epoch."""
    return torch.randperm(n_rows, generator=torch.Generator().manual_seed(seed * 100_003 + epoch))


def batch_of_step(data: TokenBatch, step: int, n_rows: int, seed: int) -> TokenBatch:
    """The rows of a step: the permutations of the epochs, end to end."""
    positions = range(step * n_rows, (step + 1) * n_rows)
    index = [epoch_order(len(data), seed, p // len(data))[p % len(data)] for p in positions]
    return data[torch.stack(index)]


MICRO_TOKENS = 8192


def micro_batches(batch: TokenBatch) -> Iterator[TokenBatch]:
    """This rank's rows of a batch, a few at a time, see `TokenBatch.to`.

    All ranks get the same number of batches if their number divides the rows.
    """
    mine = batch[dist.get_rank() :: dist.get_world_size()]
    size = max(1, MICRO_TOKENS // batch.tokens.shape[1])
    for i in range(0, len(mine), size):
        yield mine[i : i + size].to(compute_device())


# ---- 3 models ------------------------------------------------------------------------------------

@dataclasses.dataclass(frozen=True)
class Checkpoint:
    """A model directory that was opened; its weights are mapped, and read when they are used."""

    path: Path
    config: LlamaConfig
    weights: Weights

    @classmethod
    def open(cls, model: str | Path) -> "Checkpoint":
        """Of a directory, or of a name on the hub, on all ranks."""
        path = from_rank_0(lambda: mha2gqa.model_folder(model))
        from_rank_0(lambda: mha2gqa.load_checkpoint(path) and None)  # all raise what is wrong
        return cls(path, *mha2gqa.load_checkpoint(path))

    def identity(self) -> str:
        """What tells one model from another: the config, a few weights."""
        some = self.weights["model.layers.0.self_attn.q_proj.weight"][0, :8]
        return f"{self.config}, {some.tolist()}"

    def blocks(self) -> Iterator[dict[str, Tensor]]:
        """The weights of one block after the other."""
        n_layers = self.config.num_hidden_layers
        return (mha2gqa.read_block(self.weights, i, "cpu") for i in range(n_layers))

    def parts(self, blocks: Iterable[Weights] | None = None) -> Iterator[Weights]:
        """Its blocks, or others in their place, then its weights that are outside of blocks."""
        return itertools.chain(blocks or self.blocks(), [mha2gqa.non_block_weights(self.weights)])


class FadingLinear(nn.Linear):
    """A key or value projection from K heads to G: W = z W_orig + (1 − z) W_new (eq. 27, 28).

    Weights are mixed, not activations. `z_K` is set before each step.
    """

    z_K: Tensor

    def __init__(self, config: LlamaConfig, kv_heads: int):
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


def meta_model(config: LlamaConfig, fading_to: int | None = None, trained: str = "all") -> Llama:
    """Llama on the meta device; with `fading_to` KV heads, its key and value heads can fade.

    `trained`: "all", "none", or "attention": only attention and norms get gradients, a third of the
    weights of a 7B.
    """
    with torch.device("meta"):
        model = Llama(config)
        for attention in attentions(model) if fading_to else ():
            attention.k_proj = FadingLinear(config, fading_to or 0)
            attention.v_proj = FadingLinear(config, fading_to or 0)
    for name, p in model.named_parameters():
        in_attention = "self_attn" in name or "norm" in name
        p.requires_grad_(trained == "all" or trained == "attention" and in_attention)
    return model


def attentions(model: Llama) -> list[mha2gqa.Attention]:
    """The attention of every block."""
    return [module for module in model.modules() if isinstance(module, mha2gqa.Attention)]


def shard(model: Llama, recompute=False, offload=False, compiled=False) -> Llama:
    """Shard a model on the meta device over all ranks, each block, then the root.

    Its parameters hold nothing yet. What is trained will be in float32, all else in the dtype of
    the forward: bf16 on CUDA, float32 on CPU. recompute: keep no activations within a block for the
    backward. offload: shards, gradients and Adam's moments stay in the host's memory. compiled: by
    torch.compile, each block.
    """
    gc.collect()  # models that are no longer used: they are in reference cycles
    torch.cuda.empty_cache()
    device = compute_device()
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    host = fsdp.CPUOffloadPolicy(device.type == "cuda") if offload else fsdp.OffloadPolicy()
    wrap = functools.partial(
        fsdp.fully_shard, mesh=dist.init_device_mesh(device.type, (dist.get_world_size(),)),
        mp_policy=fsdp.MixedPrecisionPolicy(dtype, torch.float32), offload_policy=host)
    for p in model.parameters():
        if not p.requires_grad:
            p.data = p.to(dtype)
    for block in model.model.layers:
        if compiled:
            torch._dynamo.config.recompile_limit = 64  # all models of a run share a block's code
            block.forward = torch.compile(block.forward)  # type: ignore[method-assign]
        if recompute:
            block.forward = functools.partial(  # type: ignore[method-assign]
                checkpoint, block.forward, use_reentrant=False, preserve_rng_state=False)
        wrap(block)
    wrap(model)
    return model.to_empty(device="cpu" if offload else device)


def gathered(p: Tensor) -> Tensor:
    """The whole of a sharded tensor; all ranks must ask for it."""
    return p.full_tensor() if isinstance(p, DTensor) else p


@torch.no_grad()
def load_sharded(model: Llama, parts: Iterable[Weights]) -> Llama:
    """Give every rank its shards of rank 0's weights, with one block in memory at a time.

    parts: see `Checkpoint.parts`; only rank 0 asks for them.
    """
    named: dict[str, Tensor] = dict(model.named_parameters())
    sharded = [mha2gqa.block_weights(named, i) for i in range(model.config.num_hidden_layers)]
    sharded.append(mha2gqa.non_block_weights(named))
    for parameters, weights in zip(
            sharded, parts if is_rank_0() else itertools.repeat({}), strict=False):
        for name, p in parameters.items():
            full = weights[name] if is_rank_0() else torch.empty(p.shape, device=p.device)
            p, full = cast(DTensor, p), full.to(p.device, p.dtype)
            p.to_local().copy_(distribute_tensor(full, p.device_mesh, p.placements).to_local())
    return model


def save_model(
    path: Path, model: Llama, config: LlamaConfig, source: Checkpoint, origin: Checkpoint
) -> None:
    """Write the model to `path`, with the source's dtypes and tokenizer.

    Rank 0 gathers one block at a time. Of a `FadingLinear` only the new heads are written. What was
    not trained is written as it is in `origin`.
    """
    named: dict[str, Tensor] = dict(model.named_parameters())
    replaced = {name.replace(".new.", ".") for name in named if ".new." in name}
    named = {name.replace(".new.", "."): p for name, p in named.items() if name not in replaced}
    prefixes = [mha2gqa.block_prefix(i) for i in range(config.num_hidden_layers)]
    parts = [{n: p for n, p in named.items() if n.startswith(prefix)} for prefix in prefixes]
    with contextlib.ExitStack() as stack:
        if is_rank_0():
            shutil.rmtree(f"{path}.partial", ignore_errors=True)  # of a run that was killed
            writer = stack.enter_context(
                mha2gqa.new_checkpoint(path, config, source.weights, source.path))
        for part in [*parts, mha2gqa.non_block_weights(named)]:
            full = {name: gathered(p) if p.requires_grad else origin.weights[name]
                    for name, p in part.items()}
            if is_rank_0():
                writer.write({n: w.to("cpu", source.weights[n].dtype) for n, w in full.items()})


# ---- 4 losses ------------------------------------------------------------------------------------

Readout = Callable[[Tensor, Tensor], Tensor]  # (hidden_BTD, head_VD) -> the forward's result
CHUNK = 2**24  # of how many logits a loss is computed at once; on a GPU of 4 times as many


class Objective(NamedTuple):
    """What a training minimises, as a sum of parts.

    parts: name -> bit of the predictions that this part is averaged over. losses_of: makes for a
    batch the function (hidden, head) -> sums of the parts, (parts,), that `Llama.forward` calls
    where it would apply the head: inside the forward FSDP has the head gathered, and no logits of
    all tokens exist.
    """

    parts: Mapping[str, int]
    losses_of: Callable[[TokenBatch], Readout]


def in_chunks(function: Callable, at: Tensor, *others: Tensor) -> Readout:
    """The sum of `function` over chunks of the predictions `at`, recomputed in the backward pass.

    So the logits of a batch, float32 and V wide, never exist all at once. others: as long as `at`;
    `function` gets (hidden_ND, head_VD, *others) of a chunk.
    """
    def readout(hidden_BTD, head_VD):
        size = max(1, (4 * CHUNK if head_VD.is_cuda else CHUNK) // len(head_VD))
        inputs = hidden_BTD.flatten(0, 1)[at], *others
        sums = [checkpoint(function, hidden, head_VD, *rest, use_reentrant=False,
                           preserve_rng_state=False)
                for hidden, *rest in zip(*(x.split(size) for x in inputs), strict=True)]
        return sum(sums[1:], sums[0])

    return readout


def cross_entropy() -> Objective:
    """Cross-entropy of the answers' tokens, in nats; of plain text, of all tokens."""
    def of_chunk(hidden_ND, head_VD, target_N):
        logits = mha2gqa.at_least_float32(F.linear(hidden_ND, head_VD))
        return torch.stack([F.cross_entropy(logits, target_N, reduction="sum")])

    def losses_of(batch: TokenBatch) -> Readout:
        at, _ = batch.predictions(ANSWER)
        return in_chunks(of_chunk, at, batch.tokens.flatten()[at + 1])

    return Objective({"cross_entropy": ANSWER}, losses_of)


def distillation(teacher: Llama) -> Objective:
    """KL and BiLD to the teacher (eq. 30)."""
    teacher.reshard()  # type: ignore[operator]  # FSDPModule's, which fully_shard makes of it
    teacher_head = gathered(teacher.head_weight).to(compute_device())

    def of_chunk(hidden_ND, head_VD, teacher_ND, bits_N):
        student, target = F.linear(hidden_ND, head_VD), F.linear(teacher_ND, teacher_head)
        kl = (mha2gqa.kl_loss(student, target) * (bits_N & PROMPT > 0)).sum()
        bild = (mha2gqa.bild_loss(student, target) * (bits_N & ANSWER > 0)).sum()
        return torch.stack([kl, bild])

    def losses_of(batch: TokenBatch) -> Readout:
        at, bits_N = batch.predictions(PROMPT | ANSWER)
        with torch.no_grad():
            hidden = teacher(*batch.inputs(), lambda hidden, _: hidden)
        return in_chunks(of_chunk, at, hidden.flatten(0, 1)[at], bits_N)

    return Objective({"kl": PROMPT, "bild": ANSWER}, losses_of)


# ---- 5 masks -------------------------------------------------------------------------------------


class Masks:
    """Hard-concrete masks z_LK of all blocks and units, on a schedule, the same on all ranks.

    The target of the mean P(z > 0) falls from 1 to 0 over the first 30 % of the steps. Before every
    step one number is added to all log α so that the target is met: layers and heads differ only by
    the gradients of distillation. z is 1 at step 0, then drawn from (seed, step), and 0 from 80 %
    of the steps on.
    """

    def __init__(self, model: Llama, steps: int, lr: float, seed: int):
        self.layers = [(a.k_proj, a.v_proj) for a in attentions(model)]
        kv_heads = model.config.num_key_value_heads
        self.log_alpha = torch.full((len(self.layers), kv_heads), 3.0, requires_grad=True)
        self.optimizer = torch.optim.Adam([self.log_alpha], lr=lr, betas=(0.9, 0.95))
        self.steps, self.seed = steps, seed
        self.drawn: Tensor | None = None  # the sampled masks, differentiable

    def set_all(self, z: float) -> None:
        """Set every z to the same value: 1 is the old heads, 0 the new ones."""
        self.drawn = None
        self.set_z(torch.full_like(self.log_alpha, z))

    def set_z(self, z_LK: Tensor) -> None:
        """Give every projection its z; the backward passes then leave a gradient in `self.z_LK`."""
        self.z_LK = z_LK.detach().to(compute_device()).requires_grad_()
        for z_K, projections in zip(self.z_LK, self.layers, strict=True):
            for projection in projections:
                projection.z_K = z_K  # type: ignore[assignment]

    def draw(self, step: int) -> dict[str, Any]:
        """Set the z of every projection for this step; returns what to log."""
        target = max(0.0, 1 - step / (0.3 * self.steps))
        if step == 0 or step >= 0.8 * self.steps:  # all open; all closed
            self.set_all(float(step == 0))
            opened = self.z_LK.detach()
        else:
            with torch.no_grad():
                self.log_alpha += shift_to(self.log_alpha, target)
            generator = torch.Generator().manual_seed(self.seed * 1_000_003 + step)
            self.drawn = mha2gqa.hard_concrete(self.log_alpha, generator)
            self.set_z(self.drawn)
            opened = mha2gqa.open_probability(self.log_alpha.detach())
        return {"mask_mean": opened.mean().item(), "mask_target": target,
                "mask_layers": [round(x, 4) for x in opened.mean(1).tolist()]}

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


class Schedule(NamedTuple):
    """A stage of training: its name, length, batches, learning rates of model and masks."""

    stage: str
    steps: int
    batch_size: int  # rows
    lr: float
    mask_lr: float
    seed: int
    save_every: int  # steps


def train(
    model: Llama, data: TokenBatch, objective: Objective, schedule: Schedule, folder: Path,
    initialise: Callable[[], object], masks: Masks | None = None
) -> None:
    """AdamW on the batches of the schedule, continued from the newest checkpoint in `folder` that
    can be read; if there is none, `initialise` gives the model its weights.

    Gradients are cut to norm 1. The loss is the sum of the objective's parts, each divided by the
    number of predictions in the global batch that carry its bit. Each step adds a line to
    metrics.jsonl beside the folder; of steps made twice the last line counts. Raises
    FloatingPointError at a gradient that is not finite, KeyboardInterrupt after SIGTERM and a
    checkpoint.
    """
    trained = [p for p in model.parameters() if p.requires_grad]
    # Fused: otherwise a step makes a copy of all parameters, and on a CPU takes six times as long.
    optimizer = torch.optim.AdamW(trained, schedule.lr, betas=(0.9, 0.95), weight_decay=0,
                                  fused=True)
    first, steps = load_newest(folder, model, optimizer, masks), schedule.steps
    if first == 0:
        initialise()
    metrics = folder.parent / "metrics.jsonl"
    if is_rank_0() and metrics.exists():  # a kill may have left half a line
        os.truncate(metrics, metrics.read_bytes().rfind(b"\n") + 1)
    told_to_stop = torch.zeros(1)
    before = signal.signal(signal.SIGTERM, lambda *_: told_to_stop.fill_(1))
    for step in progress(range(first, steps), schedule.stage, steps, initial=first):
        start = time.perf_counter()
        drawn = masks.draw(step) if masks else {}
        batch = batch_of_step(data, step, schedule.batch_size, schedule.seed)
        losses = backward(model, batch, objective)
        norm = gathered(nn.utils.clip_grad_norm_(model.parameters(), 1.0)).item()
        if not math.isfinite(norm):
            raise FloatingPointError(
                f"{schedule.stage}, step {step}: the loss is {losses.sum().item()}, its "
                f"gradient's norm {norm}; a new --out with a lower --lr may do")
        lr = optimizer.param_groups[0]["lr"] = schedule.lr * mha2gqa.lr_factor(step, steps)
        optimizer.step()
        optimizer.zero_grad()
        if masks:
            masks.step()
        parts = dict(zip(objective.parts, losses.tolist(), strict=True))
        speed = batch.tokens.numel() / (time.perf_counter() - start)
        record = {"stage": schedule.stage, "step": step, **drawn, "loss": losses.sum().item(),
                  **parts, "lr": lr, "gradient_norm": norm, "tokens_per_second": speed}
        if is_rank_0():
            with open(metrics, "a") as file:
                file.write(json.dumps(record) + "\n")
        stop, done = on_any_rank(told_to_stop), step + 1
        if stop or done < steps and done % schedule.save_every == 0:
            save_step(folder, done, model, optimizer, masks)
        if stop:
            raise KeyboardInterrupt
    signal.signal(signal.SIGTERM, before)


def backward(model: Llama, batch: TokenBatch, objective: Objective) -> Tensor:
    """Leave the gradients of a global batch in the model; returns its losses (parts,)."""
    device = compute_device()
    counts = [max(1, int((batch.loss_bits & bit > 0).sum())) for bit in objective.parts.values()]
    count, total = torch.tensor(counts, device=device), torch.zeros(len(counts), device=device)
    for micro in progress(list(micro_batches(batch)), "step", leave=False, delay=1):
        losses = model(*micro.inputs(), objective.losses_of(micro)) / count
        (losses.sum() * dist.get_world_size()).backward()  # FSDP averages over ranks
        total += losses.detach()
    dist.all_reduce(total)
    return total.cpu()


def on_any_rank(flag: Tensor) -> bool:
    """Whether the flag (1,) is set on any rank."""
    flag = flag.clone()
    dist.all_reduce(flag)
    return bool(flag)


def training_state(model, optimizer) -> dict[str, Any]:
    """What a checkpoint holds of model and optimizer, each rank its shards."""
    return dict(zip(("model", "optimizer"), get_state_dict(model, optimizer), strict=True))


def checkpoints(folder: Path) -> list[Path]:
    """The checkpoints step_N in a folder that are whole, in order: DCP writes .metadata last."""
    found = [file.parent for file in folder.glob("step_*/.metadata")]
    return sorted(found, key=lambda path: int(path.name.removeprefix("step_")))


def save_step(folder: Path, step: int, model, optimizer, masks: Masks | None) -> None:
    """Write checkpoint `step_N`; of all in the folder the two newest are kept."""
    path = folder / f"step_{step}"

    def begin():
        shutil.rmtree(path, ignore_errors=True)  # one that is not whole, or could not be read
        path.mkdir(parents=True)
        if masks:
            torch.save([masks.log_alpha, masks.optimizer.state_dict()], path / "masks.pt")

    from_rank_0(begin)
    dcp.save(training_state(model, optimizer), checkpoint_id=path)
    for old in set(folder.glob("step_*")) - {*checkpoints(folder)[-2:]} if is_rank_0() else ():
        shutil.rmtree(old)


def load_newest(folder: Path, model, optimizer, masks: Masks | None) -> int:
    """Continue from the newest checkpoint that can be read; returns the number of steps done, 0 if
    there is no checkpoint. Raises ValueError if there are some and none can be read."""
    found = from_rank_0(lambda: checkpoints(folder))
    for path in reversed(found):
        state = training_state(model, optimizer)
        logging.disable(logging.WARNING)  # subtle: torch logs a traceback of what it then raises
        try:
            dcp.load(state, checkpoint_id=path)
            if masks:
                log_alpha, adam = from_rank_0(functools.partial(
                    torch.load, path / "masks.pt", weights_only=True))
        except (Exception, dcp.CheckpointException) as error:
            if is_out_of_memory(error):  # which is not the checkpoint's fault
                raise
            print_rank_0(f"warning: {path} cannot be read ({error_line(error)})")
            continue
        finally:
            logging.disable(logging.NOTSET)
        set_state_dict(model, optimizer, model_state_dict=state["model"],
                       optim_state_dict=state["optimizer"])
        if masks:
            masks.log_alpha.data.copy_(log_alpha)
            masks.optimizer.load_state_dict(adam)
        return int(path.name.removeprefix("step_"))
    if found:
        raise ValueError(f"{folder}: none of its checkpoints can be read; without it the same "
                         "command begins this stage anew")
    return 0


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error is of too little memory, a GPU's or the host's, on this rank or another."""
    said = f"{error!r} {getattr(error, 'failures', '')}"
    return "MemoryError" in said or "can't allocate memory" in said


def error_line(error: BaseException) -> str:
    """The first line of what an error says; of DCP's, of what the first of its ranks says."""
    if isinstance(error, dcp.CheckpointException):
        error = next(iter(error.failures.values()))[0]
    return (str(error).strip() or repr(error)).splitlines()[0]


# ---- 7 evaluation --------------------------------------------------------------------------------


def eval_batches(data: TokenBatch, name: str) -> Iterable[TokenBatch]:
    """This rank's rows, a few at a time, padded with rows that enter no loss, so that all ranks get
    equally many."""
    padding = data[[0] * (-len(data) % dist.get_world_size())]
    padding = dataclasses.replace(padding, loss_bits=torch.zeros_like(padding.loss_bits))
    batches = list(micro_batches(concatenate([data, padding])))
    return progress(batches, f"evaluate {name}", leave=False, delay=1)


@torch.no_grad()
def held_out_loss(model: Llama, teacher: Llama, data: TokenBatch, name: str) -> dict[str, float]:
    """The loss and the KL to the teacher on held-out text, in nats/token over all predictions."""
    objectives = cross_entropy(), distillation(teacher)
    total = torch.zeros(3, dtype=torch.float64, device=compute_device())
    for micro in eval_batches(data, name):
        readouts = [objective.losses_of(micro) for objective in objectives]
        total += model(*micro.inputs(), lambda hidden, head, readouts=readouts:
                       torch.cat([readout(hidden, head) for readout in readouts]))
    dist.all_reduce(total)
    loss, kl, _ = (total / (data.loss_bits > 0).sum()).tolist()
    return {"loss": loss, "kl": kl}


@torch.no_grad()
def exact_match(model: Llama, data: TokenBatch, name: str) -> float:
    """Share of the packed examples whose every answer token, EOS included, is the argmax, in one
    forward.

    So greedy generation gives the answer. The converse fails if it uses other tokens for the text.
    """
    document = cast(Tensor, data.document)
    wrong = torch.zeros(int(document.max()) + 1, dtype=torch.int64, device=compute_device())

    def count_wrong(hidden_ND, head_VD, target_N, document_N):
        wrong_N = F.linear(hidden_ND, head_VD).argmax(-1) != target_N
        return torch.zeros_like(wrong).index_add(0, document_N, wrong_N.long())

    for micro in eval_batches(data, name):
        at, _ = micro.predictions(ANSWER)
        document_N = cast(Tensor, micro.document)[micro.loss_bits & ANSWER > 0]
        document_N = document_N.to(at.device, non_blocking=True)
        target_N = micro.tokens.flatten()[at + 1]
        wrong += model(*micro.inputs(), in_chunks(count_wrong, at, target_N, document_N))
    dist.all_reduce(wrong)
    return (wrong == 0).double().mean().item()


def evaluate_model(
    model: Llama, teacher: Llama, data: Mapping[str, TokenBatch], name: str
) -> dict[str, float]:
    """Loss and KL to the teacher on the held-out "text", in nats/token; on tasks the shares of
    exact answers, and their mean. data: as of `read_data`."""
    scores = held_out_loss(model, teacher, data["text"], name) if "text" in data else {}
    tasks = {task: exact_match(model, rows, f"{name}, {task}")
             for task, rows in data.items() if task not in ("train", "text")}
    model.reshard()  # type: ignore[operator]  # subtle: without gradients the root stays gathered
    return scores | tasks | ({"mean": sum(tasks.values()) / len(tasks)} if tasks else {})


# ---- 8 the run -----------------------------------------------------------------------------------


def lock(out: Path) -> None:
    """Hold OUT until this process ends, however it ends; ValueError if another one holds it."""
    try:
        import fcntl

        # Never closed: POSIX locks are the process's, also on network disks, and go with it.
        file = os.open(out / "lock", os.O_RDWR | os.O_CREAT, 0o644)
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (ImportError, OSError) as error:  # Windows; network disks that have no locks
        if getattr(error, "errno", None) in (errno.EAGAIN, errno.EACCES):
            raise ValueError(f"{out}: another process trains there; choose another --out, or if "
                             "none does remove its file lock") from None
        print_rank_0(f"warning: {out} cannot be locked ({error}): start no second run there")


def make_schedule(args: Namespace, stage: str, config: LlamaConfig, data: TokenBatch) -> Schedule:
    """The schedule of stage "distill" or "fine-tune"; ValueError if ranks cannot share a step.

    The paper's learning rates, 1e-5 and 1e-2 for masks, are for a model of width D = 4,096 and some
    10,000 steps. Narrower ones and shorter runs need more:
        model  1e-5 · 4096/D · √(10⁴/steps), 3e-3 at most; of a refitted student, which starts near
               its teacher, an eighth in the distillation, 1e-5 at least;
        masks  1e-2 · 10⁴/steps, so that a mask can move as far.
    """
    seq_len, n = data.tokens.shape[1], dist.get_world_size()
    size = max(1, args.batch_tokens // seq_len)
    if size % n:
        raise ValueError(f"--batch-tokens: {size} rows a step cannot be shared by {n} processes; "
                         f"choose a multiple of {seq_len * n}")
    epochs, steps = (args.epochs, args.steps) if stage == "distill" else (args.sft_epochs, None)
    steps = steps or math.ceil(epochs * len(data) / size)
    shortness = max(1.0, 10_000 / steps)
    lr = min(3e-3, 1e-5 * max(1.0, 4096 / config.hidden_size) * shortness**0.5)
    if (args.method.refit or args.start) and stage == "distill":
        lr = max(1e-5, lr / 8)
    return Schedule(stage, steps, size, args.lr or lr, args.mask_lr or 1e-2 * shortness,
                    args.method.seed, args.save_every)


def calibration_batch(args: Namespace, data: TokenBatch) -> TokenBatch:
    """The rows that a conversion reads, of those to train on."""
    return data[: max(2, args.calibration_tokens // data.tokens.shape[1])]


def corpus(args: Namespace) -> mha2gqa.Corpus:
    """The text: so many tokens that the held-out rows are the same for any number of steps."""
    tokens = max(655_360, args.steps * args.batch_tokens) + 65_536 if args.steps else 10**9
    return mha2gqa.Corpus(args.text, args.eval_text, tokens, args.seq_len)


def read_data(args: Namespace, source: Checkpoint) -> dict[str, TokenBatch]:
    """Rows to "train" on, of text, or tasks, or both; to hold out, "text"; of each task's dev file.

    Raises ValueError for bad files or too few tokens.
    """
    train, data, seed = list[TokenBatch](), dict[str, TokenBatch](), args.method.seed
    if args.text:
        rows_RT, kept_RT = mha2gqa.text_rows(source.path, source.config, corpus(args), seed)
        data["text"] = text_batch(kept_RT)
        train.append(text_batch(rows_RT))
        print_rank_0(f"text: {rows_RT.numel():,} tokens to train on, {kept_RT.numel():,} held out")
    if args.tasks:
        seq_len = mha2gqa.row_length(source.config, args.seq_len)
        data |= task_rows(Path(args.tasks), source, seq_len, seed)
        train.append(data["train"])
    rows = concatenate(train)
    if len(train) > 1:  # shuffled: calibration takes the first rows, which should be of both kinds
        rows = rows[epoch_order(len(rows), seed, 0)]
    if not args.start:
        mha2gqa.calibration_rows(rows.tokens, args.method)  # raises if they are too few
    return data | {"train": rows}


# Files, which may be elsewhere by now: the tokens are in data.pt, the source has its `identity`.
STAGED = {"model", "text", "eval_text", "tasks", "start", "teacher"}
FREE = {"method", "joint", "masks", "converts_teacher", "how", "out", "save_every",
        "checkpoint_activations", "cpu_offload", "compile"}


def fixed_arguments(args: Namespace) -> dict[str, Any]:
    """All that must not change from one session of a run to the next: of `STAGED`, whether they
    are given ("...") or not (None)."""
    fixed = (vars(args) | dataclasses.asdict(args.method)).items()
    return {n: "..." if n in STAGED and x else x or None for n, x in fixed if n not in FREE}


def earlier_report(args: Namespace) -> dict[str, Any]:
    """OUT/report.json of an earlier session; {} if there is none. Locks OUT, if that is a run.

    Raises ValueError if that was a run with other arguments, or if OUT holds something else.
    """
    out = args.out
    if (out / "lock").exists():
        lock(out)
    if (out / "report.json").exists():
        report = mha2gqa.read_json(out / "report.json")
        before = report.get("arguments", {})
        for name, value in fixed_arguments(args).items():
            if before.get(name) != value:
                raise ValueError(f"{out}: holds a run with --{name.replace('_', '-')} "
                                 f"{before.get(name)}, not {value}; choose another --out")
        return report
    if out.exists() and any(out.iterdir()) and not (out / "lock").exists():
        raise ValueError(f"{out}: exists and is not a run of this program; choose another --out")
    return {}


def save_report(out: Path, report: Mapping[str, Any]) -> None:
    """Write OUT/report.json, whole or not at all."""
    mha2gqa.write_json(out / "report.partial", report)
    mha2gqa.rename_when_on_disk(out / "report.partial", out / "report.json")


def begin_run(args: Namespace, source: Checkpoint, new_config: LlamaConfig) -> dict[str, Any]:
    """Make OUT with the first report.json and, until the result is there, data.pt: the tokens that
    the run goes on with, whatever happens to the text. What is wrong is raised before."""
    out, config, data = args.out, source.config, read_data(args, source)
    train, calibration = data["train"], calibration_batch(args, data["train"])
    schedule, seq_len = make_schedule(args, "distill", config, train), train.tokens.shape[1]
    report = mha2gqa.report_header(
        args.model, config, source.weights, new_config.num_key_value_heads, args.method)
    report |= {
        "arguments": fixed_arguments(args), "identity": source.identity(), "scores": {},
        "layers": [],
        "tokens": {"calibration": calibration.tokens.numel(), "seq_len": seq_len,
                   "training": schedule.steps * schedule.batch_size * seq_len,
                   "held_out": data["text"].tokens.numel() if args.text else 0}}
    if args.start:  # it says itself how it was made
        made = mha2gqa.read_json(Path(args.start) / "mha2gqa.json")
        report |= {name: made[name] for name in ("method", "layers") if name in made}
        report["tokens"]["calibration"] = made.get("tokens", {}).get("calibration", 0)
    out.mkdir(parents=True, exist_ok=True)
    lock(out)
    if (out / "report.json").exists():
        raise ValueError(f"{out}: another process has begun there; the same command continues")
    torch.save({name: vars(rows) for name, rows in data.items()}, out / "data.partial")
    mha2gqa.rename_when_on_disk(out / "data.partial", out / "data.pt")
    save_report(out, report)
    return report


def result_config(
    args: Namespace, source: Checkpoint, teacher: Checkpoint | None, start: Checkpoint | None,
    report: Mapping[str, Any]
) -> LlamaConfig:
    """The source's config with fewer KV heads; ValueError if teacher or start do not fit it, or if
    the source is not the model that the run began with.

    A teacher's vocabulary must be the source's; and all that shapes the model, if it is the one to
    be converted. A start must be the source with fewer KV heads, made of it: it has its embedding.
    """
    if report and report["identity"] != source.identity():
        raise ValueError(f"{args.model}: not the model of the run in {args.out}; choose another")
    kv_heads = args.kv_heads or cast(Checkpoint, start).config.num_key_value_heads
    new_config = mha2gqa.gqa_config(source.config, kv_heads)
    fields = {field.name for field in dataclasses.fields(new_config) if field.compare}
    shape = fields - {"max_position_embeddings", "bos_token_id", "eos_token_id"}
    of_teacher = shape if args.converts_teacher else {"vocab_size"}
    for model, expected, names in (teacher, source.config, of_teacher), (start, new_config, fields):
        for name in sorted(names):
            if model and getattr(model.config, name) != getattr(expected, name):
                raise ValueError(f"{model.path}: its {name} is {getattr(model.config, name)}, "
                                 f"expected {getattr(expected, name)}, to fit --model")
    name = "model.embed_tokens.weight"
    if start and not torch.equal(start.weights[name].float(), source.weights[name].float()):
        raise ValueError(f"{start.path}: its {name} is not {args.model}'s: made of another model?")
    return new_config


@torch.no_grad()
def student_blocks(
    origin: Checkpoint, rows: TokenBatch, kv_heads: int, method: Method, fading: bool, layers: list
) -> Iterator[dict[str, Tensor]]:
    """The converted blocks; if `fading` the rotated blocks with the new KV heads beside the old.

    rows: to calibrate with. `layers` gets the blocks' reports.
    """
    blocks = mha2gqa.converted_blocks(origin.config, origin.weights, rows.tokens, kv_heads, method,
                                      compute_device(), rows.document)
    for block in progress(blocks, "convert", origin.config.num_hidden_layers):
        layers.append(block.report)
        new = {name.replace("_proj.", "_proj.new."): w for name, w in block.converted.items()
               if "k_proj" in name or "v_proj" in name}
        yield block.aligned | new if fading else block.converted


class Run:
    """A run in OUT, new or continued; `stages` makes what earlier sessions have not made."""

    def __init__(self, args: Namespace, report: dict[str, Any]):
        self.args, self.source = args, Checkpoint.open(args.model)
        self.given_teacher, self.start = (
            Checkpoint.open(model) if model else None for model in (args.teacher, args.start))
        from_rank_0(lambda: mha2gqa.companion_files(self.source.path))
        self.new_config = from_rank_0(lambda: result_config(
            args, self.source, self.given_teacher, self.start, report))
        self.report = report or from_rank_0(lambda: begin_run(args, self.source, self.new_config))
        self.data = {name: TokenBatch(**fields) for name, fields in torch.load(
            args.out / "data.pt", weights_only=True, mmap=True).items()}
        self.report["source"] = str(args.model)  # where it is now
        self.schedule = plan = from_rank_0(lambda: make_schedule(
            args, "distill", self.source.config, self.data["train"]))
        print_rank_0(f"{plan.steps} steps of {plan.batch_size} rows, learning rate {plan.lr:.1e}")

    def stages(self) -> dict[str, Any]:
        """The stages in their order; the result is OUT/gqa. Returns the report."""
        source, new_config, result = self.source, self.new_config, self.args.out / "gqa"
        tuned = self.tuned_teacher()
        self.teacher = self.frozen(tuned.config, tuned.parts())
        self.score("source", lambda: self.teacher if tuned is source else
                   self.frozen(source.config, source.parts()))
        if tuned is not source:
            self.score("teacher", lambda: self.teacher)
        origin = tuned if self.args.converts_teacher else source
        pooled = (mha2gqa.merge(block, source.config, new_config.num_key_value_heads)
                  for block in origin.blocks())
        self.score("mean_pooled", lambda: self.frozen(new_config, origin.parts(pooled)))
        if not from_rank_0(result.exists):
            self.distil(origin)
        written = Checkpoint.open(result)
        self.score("distilled", lambda: self.frozen(new_config, written.parts()))
        return self.report

    def frozen(self, config: LlamaConfig, parts: Iterable[Weights]) -> Llama:
        """A sharded model of these weights that is not trained."""
        return load_sharded(shard(meta_model(config, trained="none"), **self.args.how), parts)

    def tuned_teacher(self) -> Checkpoint:
        """--teacher; or OUT/teacher, the source after SFT on the answers; or the source itself."""
        args, source, folder = self.args, self.source, self.args.out / "teacher"
        if self.given_teacher or not (args.tasks and args.sft_epochs):
            return self.given_teacher or source
        if not from_rank_0(folder.exists):
            model = shard(meta_model(source.config, trained=args.train), **args.how)
            schedule = make_schedule(args, "fine-tune", source.config, self.data["train"])
            train(model, self.data["train"], cross_entropy(), schedule, args.out / "sft",
                  lambda: load_sharded(model, source.parts()))
            save_model(folder, model, source.config, source, source)
        from_rank_0(lambda: shutil.rmtree(args.out / "sft", ignore_errors=True))
        return Checkpoint.open(folder)

    def distil(self, origin: Checkpoint) -> None:
        """Convert `origin`, or take --start, train that, and write OUT/gqa."""
        args, kv_heads = self.args, self.new_config.num_key_value_heads
        student = shard(meta_model(self.source.config, kv_heads, args.train) if args.masks else
                        meta_model(self.new_config, trained=args.train), **args.how)
        masks = Masks(student, self.schedule.steps, self.schedule.mask_lr,
                      self.schedule.seed) if args.masks else None

        def initialise():
            if self.start:
                load_sharded(student, self.start.parts())
            else:
                rows = calibration_batch(args, self.data["train"])
                self.report["layers"] = []
                load_sharded(student, origin.parts(student_blocks(
                    origin, rows, kv_heads, args.method, args.masks, self.report["layers"])))
            if masks:
                masks.set_all(0.0)
            self.score("converted", lambda: student)

        train(student, self.data["train"], distillation(self.teacher), self.schedule,
              args.out / "checkpoints", initialise, masks)
        save_model(args.out / "gqa", student, self.new_config, self.source, self.start or origin)

    def score(self, name: str, make_model: Callable[[], Llama]) -> None:
        """Evaluate a model, unless an earlier session has done so, and write the report; when the
        last one is in it, all is done: so the result's own report and card come before."""
        out, scores = self.args.out, self.report["scores"]
        if name not in scores:
            scores[name] = evaluate_model(make_model(), self.teacher, self.data, name)
            if is_rank_0() and name == "distilled":
                mha2gqa.write_report(out / "gqa", self.report, self.source.path)
            if is_rank_0():
                save_report(out, self.report)


def run(args: Namespace) -> None:
    """The run that the arguments ask for, or just the table of one that is finished."""
    report = from_rank_0(lambda: earlier_report(args))
    if report:
        print_rank_0(f"{args.out}: the run of {report['source']} that began at {report['date']}")
    if "distilled" not in report.get("scores", ()):
        report = Run(args, report).stages()
    from_rank_0(lambda: (args.out / "data.pt").unlink(missing_ok=True))
    print_rank_0(f"\n{mha2gqa.table(report)}\nwritten to {args.out}/gqa")


# ---- 9 tasks -------------------------------------------------------------------------------------

# Each parser gives of a record (the text before the choices, the choices, which of them is right).
Parsed = tuple[str, Sequence[str], int]


def boolq(r) -> Parsed:
    """BoolQ, with `answer` or, in SuperGLUE's spelling, `label`."""
    right = ["true", "false"].index(str(r["answer"] if "answer" in r else r["label"]).lower())
    return f"{r['passage']}\nQuestion: {r['question']}?\n", ["true", "false"], right


def piqa(r) -> Parsed:
    """PIQA; the label, 0 or 1, from the file beside it."""
    return (f"Goal: {r['goal']}\nChoose the most sensible solution to achieve the goal. ",
            [r["sol1"], r["sol2"]], int(r["label"]))


def winogrande(r) -> Parsed:
    """WinoGrande; the answer is "1" or "2"."""
    return ('Choose the most sensible text to replace the "_" in the following sentence: '
            f"{r['sentence']}\n", [r["option1"], r["option2"]], int(r["answer"]) - 1)


def siqa(r) -> Parsed:
    """Social IQa; the label, 1 to 3, from the file beside it."""
    return (f"{r['context']}\nQuestion: {r['question']}\n",
            [r["answerA"], r["answerB"], r["answerC"]], int(r["label"]) - 1)


def science(r) -> Parsed:
    """ARC, and OpenbookQA also as the hub has it: `question_stem`, lists of texts and of labels."""
    if "question_stem" in r:
        stem, texts, labels = r["question_stem"], r["choices"]["text"], r["choices"]["label"]
    else:
        stem, choices = r["question"]["stem"], r["question"]["choices"]
        texts, labels = ([c[of] for c in choices] for of in ("text", "label"))
    return f"Question: {stem}\n", texts, labels.index(r["answerKey"])


def hellaswag(r) -> Parsed:
    """HellaSwag, of the preprocessed text."""
    return ("Please choose the most appropriate text to complete the passage below:\n"
            f"Passage: {r['ctx']}\n", r["endings"], int(r["label"]))


# task: (parser, training file, dev file)
TASKS = {
    "boolq": (boolq, "train.jsonl", "val.jsonl"), "piqa": (piqa, "train.jsonl", "valid.jsonl"),
    "hellaswag": (hellaswag, "hellaswag_train.jsonl", "hellaswag_val.jsonl"),
    "winogrande": (winogrande, "train_xl.jsonl", "dev.jsonl"),
    "arc-c": (science, "ARC-Challenge-Train.jsonl", "ARC-Challenge-Dev.jsonl"),
    "arc-e": (science, "ARC-Easy-Train.jsonl", "ARC-Easy-Dev.jsonl"),
    "openbookqa": (science, "train.jsonl", "dev.jsonl"), "siqa": (siqa, "train.jsonl", "dev.jsonl"),
}


def read_task(folder: Path, task: str, dev: bool) -> list[tuple[str, str]]:
    """(prompt, answer) of every record of a task's training or dev file, as published.

    Raises OSError for a missing file, ValueError with file and record for one of another form.
    """
    parse, *names = TASKS[task]
    file = folder / task / names[dev]
    examples = []
    try:
        # Not splitlines(), which ends a line at characters that JSON may hold as they are.
        lines = [line for line in file.read_text("utf-8-sig").split("\n") if line.strip()]
        labels: Sequence = [None] * len(lines)
        if parse in (piqa, siqa):
            labels = file.with_name(f"{file.stem}-labels.lst").read_text().split()
        for line, label in zip(lines, labels, strict=True):
            text, choices, right = parse({"label": label, **json.loads(line)})
            answer = dict(enumerate(choices))[right]  # not of a list, where -1 would be the last
            examples.append((f"{text}Choices: {list(choices)!r}\nAnswer:".strip(), answer.strip()))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{file}, record {len(examples) + 1}: not of {task} ({error!r})") from None
    if not examples:
        raise ValueError(f"{file}: no records")
    return examples


def encode_examples(
    examples: Sequence[tuple[str, str]], encode: Callable, end: list[int], seq_len: int
) -> list[Example]:
    """The examples, each closed by `end`, and its prompt cut on the left to `seq_len` tokens."""
    prompts = encode([prompt for prompt, _ in examples])
    wholes = encode([f"{prompt} {answer}" for prompt, answer in examples])
    over = [max(0, len(whole + end) - seq_len) for whole in wholes]
    return [((whole + end)[n:], max(1, len(prompt) - n))
            for prompt, whole, n in zip(prompts, wholes, over, strict=True)]


def task_rows(folder: Path, source: Checkpoint, seq_len: int, seed: int) -> dict[str, TokenBatch]:
    """Packed rows: to "train" on, of the training files of all tasks, and of each dev file."""
    encode, end = mha2gqa.load_tokenizer(source.path), source.config.eos_ids
    found = [task for task in TASKS if (folder / task).is_dir()]
    if not found:
        raise ValueError(f"{folder}: holds none of the folders {', '.join(TASKS)}")
    train, dev = list[Example](), {}
    for task, part in itertools.product(found, ("train", "dev")):
        examples = encode_examples(read_task(folder, task, part == "dev"), encode, end, seq_len)
        print_rank_0(f"{task} {part}: {len(examples):,} examples")
        if part == "dev":
            dev[task] = pack_examples(examples, seq_len, seed)
        else:
            train += examples
    return {"train": pack_examples(train, seq_len, seed), **dev}


# ---- 10 the demo, command line -------------------------------------------------------------------

DEMO = Path("mha2gqa-demo")
DEMO_ARGUMENTS = (f"--model {DEMO}/source --kv-heads 2 --out {DEMO}/run --text {DEMO}/text.jsonl "
                  "--steps 300 --batch-tokens 2048").split()


def make_demo_source(args: Namespace) -> None:
    """A small MHA LLaMA with a BPE tokenizer, trained a little on Python's own documentation, the
    demo's held-out rows excepted."""
    from pydoc_data.topics import topics

    print_rank_0(f"the demo, some minutes: a small model of Python's documentation, in {DEMO}")
    from_rank_0(lambda: save_text_and_tokenizer(topics.values()))
    config = LlamaConfig(1024, 128, 344, 4, 8, max_position_embeddings=128,
                                 tie_word_embeddings=True, bos_token_id=0, eos_token_id=1)
    rows, _ = mha2gqa.text_rows(DEMO / "tokenizer", config, corpus(args), seed=0)
    torch.manual_seed(0)
    weights = {name: torch.ones(p.shape) if p.ndim == 1 else 0.04 * torch.randn(p.shape)
               for name, p in meta_model(config).named_parameters()}
    origin, model = Checkpoint(DEMO / "tokenizer", config, weights), shard(meta_model(config))
    schedule = Schedule("make the source", 400, 16, 3e-3, 0, seed=0, save_every=400)
    train(model, text_batch(rows), cross_entropy(), schedule, DEMO / "pretraining",
          lambda: load_sharded(model, origin.parts()))
    save_model(DEMO / "source", model, config, origin, origin)


def save_text_and_tokenizer(texts: Iterable[str]) -> None:
    """Write the demo's text, and a byte-level BPE of it as a tokenizer.json."""
    from tokenizers import ByteLevelBPETokenizer, processors

    folder, tokenizer = DEMO / "tokenizer", ByteLevelBPETokenizer()
    tokenizer.train_from_iterator(texts, vocab_size=1024, min_frequency=0, show_progress=False,
                                  special_tokens=["<s>", "</s>"])
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", 0)])
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    mha2gqa.write_json(folder / "tokenizer_config.json", {
        "tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<s>", "eos_token": "</s>"})
    (DEMO / "text.jsonl").write_text("".join(json.dumps({"text": x}) + "\n" for x in texts))


def add_options(parser: ArgumentParser) -> None:
    """All options but those of the method, see `mha2gqa.add_method_arguments`."""
    add = parser.add_argument
    add("--version", action="version", version=f"train-gqa {mha2gqa.__version__}")
    add("--model", required=True, help="Hugging Face directory of the source, or a name on the hub")
    add("--kv-heads", type=int, metavar="G", help="a divisor of the source's (or --start-from's)")
    add("--out", type=Path, required=True, help="the run, which the same command continues")
    add("--text", nargs="+", default=[], metavar="FILE", help="text to train on, as mha2gqa.py's")
    add("--eval-text", nargs="+", default=[], metavar="FILE", help="default: a tenth of --text")
    add("--tasks", metavar="DIR", help=f"folders of the public raw files of {', '.join(TASKS)}")
    # subtle: torchrun takes --start, wherever it stands, for a short form of its --start-method.
    add("--start-from", "--start", dest="start", metavar="DIR", help="what mha2gqa.py made of "
        "MODEL, to start from; nothing is converted then, and options for that do nothing")
    add("--teacher", metavar="MODEL", help="default: the source, fine-tuned on --tasks")
    add("--sft-epochs", type=float, default=2, help="default: %(default)s; 0: no fine-tuning")
    add("--steps", type=int, help="default: what --epochs takes")
    add("--epochs", type=float, default=5, help="passes over the data (default: %(default)s)")
    add("--batch-tokens", type=int, default=131_072, help="a step (default: %(default)s)")
    add("--seq-len", type=int, help="tokens a row (default: 2048, or the context if less)")
    add("--lr", type=float, help="default: by width and steps, see make_schedule")
    add("--mask-lr", type=float, help="of the masks' log alpha; likewise")
    add("--no-masks", action="store_true", help="as always after linear alignment or a refit")
    add("--calibration-tokens", type=int, default=262_144, help="to convert (%(default)s)")
    add("--save-every", type=int, default=500, help="steps between checkpoints (%(default)s)")
    add("--train", choices=("all", "attention"), default="all", help="what learns; attention "
        "and norms alone take less than half of the memory")
    add("--checkpoint-activations", action="store_true", help="less memory, a third more time")
    add("--cpu-offload", action="store_true", help="weights and moments in the host's memory")
    add("--compile", action="store_true", help="torch.compile each block")


def parse_arguments(argv: Sequence[str]) -> Namespace:
    """The command line's arguments, checked, and what follows from them: `method`, `how`
    to shard models, whether there are `masks`, and whether the run `converts_teacher`."""
    parser = ArgumentParser("train-gqa", description=__doc__.split("\n")[0], epilog=(
        f"Without arguments: the demo, which makes and converts a small model in {DEMO}."))
    add_options(parser)
    mha2gqa.add_method_arguments(parser)
    args = parser.parse_args(argv, Namespace(joint=False))  # the training itself is joint
    if args.start and args.text and not args.eval_text:
        parser.error("--start-from and --text need --eval-text, too: a conversion of the same text "
                     "may have been calibrated on what would be held out here")
    if not (args.kv_heads or args.start) or not (args.text or args.tasks):
        parser.error("a run needs --kv-heads or --start, and --text or --tasks")
    for name, value in vars(args).items():
        least = 0 if name in ("sft_epochs", "seed") else 1e-12
        if type(value) in (int, float) and not least <= value < math.inf:
            parser.error(f"--{name.replace('_', '-')} {value}: expected more than 0"
                         + ("" if least else ", or 0"))
    try:
        args.method = mha2gqa.method_of_arguments(args)
    except ValueError as error:
        parser.error(str(error))
    # Masks mix keys and values, but linear alignment and a refit change other weights, too.
    more_changes = args.method.refit or args.method.align == "linear"
    args.converts_teacher = more_changes and not args.start
    args.masks = not (more_changes or args.start or args.no_masks)
    args.how = {"recompute": args.checkpoint_activations, "offload": args.cpu_offload,
                "compiled": args.compile}
    return args


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; returns the exit status: 2 for bad input, with one line on stderr.

    The process group stays: whoever goes on after this destroys it.
    """
    argv = sys.argv[1:] if argv is None else argv
    with contextlib.redirect_stderr(sys.stderr if is_rank_0() else io.StringIO()):
        args = parse_arguments(argv or DEMO_ARGUMENTS)
    warnings.filterwarnings("ignore", message="the text has")  # less than asked for: in epochs
    try:
        start_processes()
        if not argv and not from_rank_0((DEMO / "source").exists):
            make_demo_source(args)
        run(args)
        return 0
    except KeyboardInterrupt:
        status, line = 130, "interrupted: the same command continues"
    except (ValueError, OSError, FloatingPointError, MemoryError, RuntimeError,
            dcp.CheckpointException) as error:
        status, line = 2, f"error: {error_line(error)}"
        if is_out_of_memory(error):
            line += ("; more processes, --train attention, --checkpoint-activations or a shorter "
                     "--seq-len take less")
        elif "inline_container" in line or isinstance(error, dcp.CheckpointException):
            line += f" while a checkpoint or data.pt was written in {args.out}: is the disk full?"
        elif isinstance(error, RuntimeError):
            raise
    if os.environ.get("LOCAL_RANK", "0") == "0" or "take less" in line:  # others say the same
        print(line, file=sys.stderr)
    return status


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
