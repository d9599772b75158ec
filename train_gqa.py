"""train_gqa: prune a LLaMA's key and value heads under distillation, with FSDP2.

    torchrun train_gqa.py                                        # the demo, on CPU, within minutes
    torchrun --nproc-per-node 8 train_gqa.py --model MODEL --kv-heads 8 --tasks DIR --out OUT

The program around mha2gqa.py, after Jin et al. 2024 (arXiv 2412.20677). A teacher, the source
fine-tuned on the tasks, or the source itself, watches a student while KL and BiLD keep its logits
close. The student starts as the converted model; or, the paper's way, as the source with its heads
rotated, whose key and value heads fade into new shared ones under hard-concrete masks.

Every batch and every mask is a pure function of (seed, step). So a run depends neither on how many
processes share it nor on where it was interrupted: there is no loader state to save.

Shape suffixes as in mha2gqa.py; here R is packed rows.
"""

import argparse
import contextlib
import dataclasses
import datetime
import functools
import gc
import itertools
import json
import math
import os
import random
import shutil
import signal
import sys
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path

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
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import distribute_tensor
from torch.utils.checkpoint import checkpoint

import mha2gqa

# ---- 1 data --------------------------------------------------------------------------------------

KL, ANSWER = 1, 2  # bits: this prediction enters the KL loss; it is part of an answer


@dataclasses.dataclass(frozen=True)
class Rows:
    """Packed rows: tokens (R, T), what is learned where, and the document each token belongs to.

    `kind[r, t]` is of the prediction made at t, of token t + 1. Text: all but the row's last one
    are KL | ANSWER, and the row counts as one document (`document` None). Tasks: KL within a
    prompt, ANSWER for an answer and its EOS, 0 from one document to the next.
    """

    tokens: Tensor
    kind: Tensor
    document: Tensor | None = None

    def __getitem__(self, rows) -> "Rows":
        return self.map(lambda x: x[rows])

    def map(self, function: Callable[[Tensor], Tensor]) -> "Rows":
        """The function of each tensor."""
        return Rows(*(x if x is None else function(x)
                      for x in (self.tokens, self.kind, self.document)))

    def __len__(self) -> int:
        return len(self.tokens)


def text_to_rows(tokens_RT: Tensor) -> Rows:
    """Rows of plain text: every prediction but the row's last is learned in both losses."""
    kind = torch.full_like(tokens_RT, KL | ANSWER, dtype=torch.uint8)
    kind[:, -1] = 0
    return Rows(tokens_RT, kind)


def choice_list(choices: Iterable[str]) -> str:
    """The choices as a Python list prints them."""
    return f"Choices: {list(choices)!r}"


def boolq(r, _label):
    """(prompt, answer) of a BoolQ record, with `answer` or, in SuperGLUE's spelling, `label`."""
    answer = r["answer"] if "answer" in r else r["label"]
    question = f"Question: {r['question']}?\n{choice_list(['true', 'false'])}"
    said = "true" if str(answer).lower() in ("true", "1") else "false"
    return f"{r['passage']}\n{question}\nAnswer:", said


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
    return ("Please choose the most appropriate text to complete the passage below:\n"
            f"Passage: {ctx}\n{choice_list(r['endings'])}\nAnswer:"), r["endings"][int(r["label"])]


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


def read_task(folder: Path, task: str, dev: bool) -> list[tuple[str, str]]:
    """(prompt, answer) of every record of a task's training or dev file, as published.

    Raises ValueError with file and line for a missing file or a record of another form.
    """
    parse, *names = TASKS[task]
    files = [folder / task / name for name in names[dev] if (folder / task / name).is_file()]
    if not files:
        raise ValueError(f"{folder / task}: no {' or '.join(names[dev])}")
    file = files[0]
    labels_file = file.with_name(f"{file.stem}-labels.lst")
    lines = file.read_text(encoding="utf-8").strip("\n").split("\n")
    if parse in (piqa, siqa) and not labels_file.is_file():
        raise ValueError(f"{labels_file}: no such file; it should hold {file.name}'s labels")
    labels = labels_file.read_text().split() if labels_file.is_file() else [None] * len(lines)
    if len(labels) != len(lines):
        raise ValueError(f"{labels_file}: {len(labels)} labels for {len(lines)} records")
    examples = []
    for number, (line, label) in enumerate(zip(lines, labels, strict=True), 1):
        try:
            examples.append(parse(json.loads(line), label))
        except (ValueError, KeyError, TypeError, IndexError) as error:
            raise ValueError(f"{file}, line {number}: not a record of {task} ({error!r})") from None
    return examples


def encode_examples(examples, encode, eos: Sequence[int], seq_len: int):
    """([(token ids with EOS, length of the prompt)], number of prompts whose left end is lost)."""
    prompts = encode([prompt.strip() for prompt, _ in examples])
    wholes = encode([f"{prompt.strip()} {answer.strip()}" for prompt, answer in examples])
    coded, cut = [], 0
    for prompt, whole in zip(prompts, wholes, strict=True):
        ids = whole + list(eos[:1])
        over = max(0, len(ids) - seq_len)
        cut += over > 0
        coded.append((ids[over:], max(1, len(prompt) - over)))
    return coded, cut


def pack_examples(coded, seq_len: int, seed: int) -> Rows:
    """Many short examples in a row: each into the fullest of the open rows that still holds it."""
    order = random.Random(seed).sample(range(len(coded)), len(coded))
    rows, open_rows = [], []
    for n in order:
        size = len(coded[n][0])
        fits = [row for row in open_rows if row[0] + size <= seq_len]
        row = max(fits, key=lambda row: row[0]) if fits else [0, []]
        if not fits:
            rows.append(row)
            open_rows = [*open_rows, row][-64:]
        row[0] += size
        row[1].append(n)
    tokens = torch.zeros(len(rows), seq_len, dtype=torch.int64)
    kind, document = torch.zeros_like(tokens, dtype=torch.uint8), torch.full_like(tokens, -1)
    for r, (_, members) in enumerate(rows):
        at = 0
        for n in members:
            ids, prompt = coded[n]
            end = at + len(ids)
            tokens[r, at:end], document[r, at:end] = torch.tensor(ids), n
            kind[r, at : at + prompt - 1], kind[r, at + prompt - 1 : end - 1] = KL, ANSWER
            at = end
    return Rows(tokens, kind, document)


@functools.lru_cache(maxsize=2)
def epoch_order(n_rows: int, seed: int, epoch: int) -> Tensor:
    """The order of the rows in one epoch."""
    return torch.randperm(n_rows, generator=torch.Generator().manual_seed(seed * 100_003 + epoch))


def batch(rows: Rows, step: int, size: int, seed: int) -> Rows:
    """The `size` rows of a step: the epochs' permutations, end to end."""
    places = range(step * size, (step + 1) * size)
    index = [epoch_order(len(rows), seed, p // len(rows))[p % len(rows)] for p in places]
    return rows[torch.stack(index)]


# ---- 2 processes and models ----------------------------------------------------------------------


def start_processes() -> torch.device:
    """Join torchrun's processes, or be the only one; returns this process's device.

    Raises ValueError if there are more processes here than GPUs.
    """
    cuda, here = torch.cuda.is_available(), int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    if cuda and here > torch.cuda.device_count():
        raise ValueError(f"{here} processes on this machine, which has {torch.cuda.device_count()} "
                         "GPUs: choose another --nproc-per-node")
    backend = "cpu:gloo,cuda:nccl" if cuda else "gloo"
    if "RANK" in os.environ:
        # The others wait while rank 0 aligns the source: longer than the default timeout allows.
        dist.init_process_group(backend, timeout=datetime.timedelta(hours=12))
    else:
        dist.init_process_group(backend, rank=0, world_size=1, store=dist.HashStore())
    if not cuda:  # torchrun leaves each process one thread
        usable = getattr(os, "sched_getaffinity", lambda _: range(os.cpu_count() or 1))(0)
        torch.set_num_threads(max(1, len(usable) // here))
        return torch.device("cpu")
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
    torch.cuda.set_device(device)
    return device


def is_first() -> bool:
    """Whether this process is rank 0, which reads, writes and speaks for all."""
    return int(os.environ.get("RANK", 0)) == 0


def as_first(value):
    """Rank 0's value, on all processes: what is on the disk may change between two looks."""
    box = [value]
    dist.broadcast_object_list(box)
    return box[0]


def together(function: Callable):
    """What the function returns in this process; what it raises in any is raised in all."""
    found, error = None, None
    try:
        found = function()
    except (ValueError, OSError) as raised:
        error = str(raised)
    errors = [None] * dist.get_world_size()
    dist.all_gather_object(errors, error)
    for error in filter(None, errors):
        raise ValueError(error)
    return found


class LossLlama(mha2gqa.Llama):
    """Llama whose forward ends in a loss: FSDP gathers the head only while the module runs."""

    def forward(self, tokens_BT, document_BT, loss: Callable[[Tensor, Tensor], Tensor]):
        hidden_BTD = super().forward(tokens_BT, document_BT, logits=False)
        return loss(hidden_BTD, self.head.weight)


class FadingLinear(nn.Linear):
    """A key or value projection from K heads to G: W = z W_orig + (1 − z) W_new (eq. 27, 28).

    Weights are mixed, not activations. `z_K` is set before each step.
    """

    def __init__(self, config: mha2gqa.LlamaConfig, kv_heads: int):
        self.shape = config.num_key_value_heads, config.head_dim
        super().__init__(config.hidden_size, math.prod(self.shape), bias=config.qkv_bias)
        self.new = nn.Linear(config.hidden_size, kv_heads * config.head_dim, bias=config.qkv_bias)
        self.z_K = None

    def forward(self, x):
        bias = None if self.bias is None else self.mix(self.bias, self.new.bias)
        return F.linear(x, self.mix(self.weight, self.new.weight), bias)

    def mix(self, w, new):
        k, e = self.shape
        w_KED = w.reshape(k, e, -1)
        new_KED = new.reshape(-1, e, w_KED.shape[-1])
        new_KED = new_KED.repeat_interleave(k // len(new_KED), dim=0)
        z = self.z_K.to(w)[:, None, None]
        return (z * w_KED + (1 - z) * new_KED).reshape(w.shape)


def model_of(config: mha2gqa.LlamaConfig, fading_to: int | None = None) -> LossLlama:
    """Llama on the meta device; with `fading_to` KV heads, its key and value heads can fade."""
    with torch.device("meta"):
        model = LossLlama(config)
        for block in model.model.layers if fading_to else ():
            block.self_attn.k_proj = FadingLinear(config, fading_to)
            block.self_attn.v_proj = FadingLinear(config, fading_to)
    return model


def compute_dtype(device: torch.device) -> torch.dtype:
    """bf16 on CUDA, float32 on CPU."""
    return torch.bfloat16 if device.type == "cuda" else torch.float32


def shard(model: LossLlama, device, stored=torch.float32, recompute=False) -> LossLlama:
    """Shard a model on the meta device over all processes, each block, then the root.

    Its parameters hold nothing yet. `stored`: their dtype, whatever the forward computes in.
    """
    how = {"mesh": init_device_mesh(device.type, (dist.get_world_size(),)),
           "mp_policy": MixedPrecisionPolicy(compute_dtype(device), reduce_dtype=torch.float32)}
    model.to(stored)
    for block in model.model.layers:
        if recompute:
            block.forward = functools.partial(checkpoint, block.forward, use_reentrant=False)
        fully_shard(block, **how)
    fully_shard(model, **how)
    return model.to_empty(device=device)


@torch.no_grad()
def fill_(model: LossLlama, blocks: Iterator[Mapping[str, Tensor]], outer: Mapping) -> LossLlama:
    """Give every process its shards of rank 0's weights, with one block in memory at a time."""
    named = dict(model.named_parameters())
    parts = [mha2gqa.block_weights(named, i) for i in range(model.config.num_hidden_layers)]
    loaded = itertools.chain(blocks, [outer]) if is_first() else itertools.repeat(None)
    for parameters, weights in zip([*parts, mha2gqa.outer_weights(named)], loaded, strict=False):
        for name, p in parameters.items():
            full = weights[name] if is_first() else torch.empty(p.shape)
            part = distribute_tensor(full.to(p.device, p.dtype), p.device_mesh, p.placements)
            p.to_local().copy_(part.to_local())
    return model


def save_model(path: Path, model: LossLlama, config, like: Mapping[str, Tensor], source) -> None:
    """Write the model to `path`, in the dtypes of `like`, with the tokenizer of `source`.

    Of fading heads the new ones. One block at a time comes to rank 0.
    """
    named = dict(model.named_parameters())
    gone = {name.replace(".new.", ".") for name in named if ".new." in name}
    named = {name.replace(".new.", "."): p for name, p in named.items() if name not in gone}
    size = sum(p.numel() * like[name].element_size() for name, p in named.items())
    with mha2gqa.new_directory(path, size) if is_first() else contextlib.nullcontext() as folder:
        for i in range(config.num_hidden_layers + 1):
            prefix = mha2gqa.block_prefix(i)
            part = {name: p for name, p in named.items() if name.startswith(prefix)}
            part = part or mha2gqa.outer_weights(named)
            full = {name: p.full_tensor().to("cpu", like[name].dtype) for name, p in part.items()}
            if is_first():
                mha2gqa.save_shard(folder, config, i, full)
        if is_first():
            mha2gqa.finish_checkpoint(folder, config, source)
    dist.barrier()


# ---- 3 losses over packed rows -------------------------------------------------------------------

# An objective makes of rows the loss that `LossLlama` ends in: sums (parts,) over its predictions.


def in_chunks(function, hidden_ND: Tensor, head_VD: Tensor, *others: Tensor) -> Tensor:
    """Sum of `function` over chunks of 1,024 predictions, recomputed in the backward pass.

    So the logits of a batch, float32 and V wide, never exist all at once.
    """
    chunks = zip(hidden_ND.split(1024), *(x.split(1024) for x in others), strict=True)
    return sum(checkpoint(function, hidden, head_VD, *rest, use_reentrant=False)
               for hidden, *rest in chunks)


def cross_entropy(rows: Rows) -> Callable[[Tensor, Tensor], Tensor]:
    """Objective: nats of the answers' tokens (all of a text's), one part."""
    at = rows.kind & ANSWER > 0
    target = rows.tokens.roll(-1, dims=1)[at]

    def of_chunk(hidden_ND, head_VD, target_N):
        logits = mha2gqa.wide(F.linear(hidden_ND, head_VD))
        return F.cross_entropy(logits, target_N, reduction="sum")[None]

    return lambda hidden, head: in_chunks(of_chunk, hidden[at], head, target)


def distillation(teacher: LossLlama) -> Callable[[Rows], Callable[[Tensor, Tensor], Tensor]]:
    """Objective: KL and BiLD to the teacher (eq. 30), two parts."""
    teacher.reshard()  # subtle: a forward without gradients leaves the root gathered
    teacher_head = teacher.head.weight.full_tensor()

    def of_chunk(hidden_ND, head_VD, teacher_ND, kind_N):
        student, wanted = F.linear(hidden_ND, head_VD), F.linear(teacher_ND, teacher_head)
        kl = mha2gqa.kl_loss(student, wanted)[kind_N & KL > 0].sum()
        bild = mha2gqa.bild_loss(student, wanted)[kind_N & ANSWER > 0].sum()
        return torch.stack([kl, bild])

    def objective(rows: Rows):
        at = rows.kind > 0
        with torch.no_grad():
            teacher_ND = teacher(rows.tokens, rows.document, lambda hidden, _: hidden)[at]
        return lambda hidden, head: in_chunks(
            of_chunk, hidden[at], head, teacher_ND, rows.kind[at])

    return objective


# ---- 4 masks and training ------------------------------------------------------------------------


class Masks:
    """Hard-concrete masks z_LK of all blocks and units, on a schedule, the same on all processes.

    The wanted mean of P(z > 0) falls from 1 to 0 over the first 30 % of the steps. Before every
    step one number is added to all log α so that the mean is met: layers and heads differ only by
    what distillation says. z is 1 at step 0, drawn from (seed, step) after it, and 0 from 80 % on.
    """

    def __init__(self, model: LossLlama, steps: int, lr: float, seed: int):
        self.layers = [(b.self_attn.k_proj, b.self_attn.v_proj) for b in model.model.layers]
        kv_heads = model.config.num_key_value_heads
        self.log_alpha = torch.full((len(self.layers), kv_heads), 3.0, requires_grad=True)
        self.optimizer = torch.optim.Adam([self.log_alpha], lr=lr, betas=(0.9, 0.95))
        self.steps, self.seed, self.lr, self.drawn = steps, seed, lr, None

    def target(self, step: int) -> float:
        return max(0.0, 1 - step / (0.3 * self.steps))

    def hold(self, z: float, device) -> None:
        """Set every z to the same value."""
        self.drawn = None
        self.apply(torch.full_like(self.log_alpha, z), device)

    def apply(self, z_LK: Tensor, device) -> None:
        """Give every projection its z; the backward passes then leave a gradient in `self.z_LK`."""
        self.z_LK = z_LK.detach().to(device).requires_grad_()
        for z_K, projections in zip(self.z_LK, self.layers, strict=True):
            for projection in projections:
                projection.z_K = z_K

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
            self.apply(self.drawn, device)
            opened = mha2gqa.open_probability(self.log_alpha.detach())
        return {"mask_mean": opened.mean().item(), "mask_target": self.target(step),
                "mask_layers": [round(x, 4) for x in opened.mean(1).tolist()],
                "mask_lr": self.lr}

    def step(self) -> None:
        """One Adam step along the gradient that the backward passes left in z."""
        if self.drawn is not None:
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


def micro_batches(rows: Rows, device, tokens: int = 8192) -> Iterator[Rows]:
    """This process's rows of a batch, a few at a time; all processes get as many turns."""
    mine = rows[dist.get_rank() :: dist.get_world_size()]
    size = max(1, tokens // rows.tokens.shape[1])
    for i in range(0, len(mine), size):
        yield mine[i : i + size].map(lambda x: x.to(device))


def train(
    name: str, model, rows: Rows, objective, parts: Mapping[str, int], steps, size, lr,
    folder: Path, device, seed, save_every, masks=None,
) -> None:
    """AdamW over `steps` batches of `size` rows, continued from the newest checkpoint in `folder`.

    The loss is the sum of the objective's parts, each divided by the number of predictions in the
    global batch that carry its bit. Raises FloatingPointError at a loss that is not finite.
    """
    # Fused on CUDA: otherwise a step makes a copy of all parameters.
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, betas=(0.9, 0.95), weight_decay=0,
                                  fused=device.type == "cuda")
    first, metrics = load_newest(folder, model, optimizer, masks), folder.parent / "metrics.jsonl"
    keep_metrics(metrics, name, first)
    with stop_signal() as stopped:
        for step in progress(range(first, steps), name, first, steps):
            start, record = time.perf_counter(), {"stage": name, "step": step}
            if masks:
                record |= masks.draw(step, device)
            chosen = batch(rows, step, size, seed)
            counts = [max(1, int((chosen.kind & bit > 0).sum())) for bit in parts.values()]
            losses = backward(model, chosen, objective, torch.tensor(counts, device=device))
            norm = nn.utils.clip_grad_norm_(model.parameters(), 1.0).full_tensor().item()
            if not math.isfinite(losses.sum().item() + norm):
                if is_first():  # it holds the weights that gave this loss
                    shutil.rmtree(folder / f"step_{step}", ignore_errors=True)
                raise FloatingPointError(
                    f"{name}, step {step}: the loss is {losses.sum().item()}, its gradient's norm "
                    f"{norm}; earlier checkpoints stay in {folder}; a new --out with a lower --lr "
                    "may do")
            for group in optimizer.param_groups:
                group["lr"] = lr * mha2gqa.learning_rate(step, steps)
            optimizer.step()
            optimizer.zero_grad()
            if masks:
                masks.step()
            record |= {
                "loss": losses.sum().item(), **dict(zip(parts, losses.tolist(), strict=True)),
                "lr": lr * mha2gqa.learning_rate(step, steps), "gradient_norm": norm,
                "tokens_per_second": chosen.tokens.numel() / (time.perf_counter() - start)}
            if is_first():
                with open(metrics, "a") as file:
                    file.write(json.dumps(record) + "\n")
            stop = stopped()
            if stop or save_every and (step + 1) % save_every == 0 and step + 1 < steps:
                save_step(folder, step + 1, model, optimizer, masks)
            if stop:
                raise KeyboardInterrupt


def backward(model, rows: Rows, objective, counts: Tensor) -> Tensor:
    """Leave the gradients of a global batch in the model; returns its losses (parts,)."""
    losses = torch.zeros(len(counts), device=counts.device)
    for micro in micro_batches(rows, counts.device):
        found = model(micro.tokens, micro.document, objective(micro)) / counts
        (found.sum() * dist.get_world_size()).backward()  # FSDP averages over processes
        losses += found.detach()
    losses = losses.cpu()
    dist.all_reduce(losses)
    return losses


def keep_metrics(file: Path, stage: str, first: int) -> None:
    """Drop the lines of steps that will be made again."""
    if is_first() and file.exists():
        lines = file.read_text().splitlines()
        records = [json.loads(line) for line in lines if line.endswith("}")]  # a kill can cut one
        kept = [r for r in records if r["stage"] != stage or r["step"] < first]
        new = file.with_suffix(".new")
        new.write_text("".join(json.dumps(r) + "\n" for r in kept))
        new.replace(file)


@contextlib.contextmanager
def stop_signal() -> Iterator[Callable[[], bool]]:
    """Catch SIGTERM in the with block; the function given says whether any process got one."""
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


def progress(items, name: str, initial: int = 0, total: int | None = None):
    """A progress bar, on rank 0, silent when not on a terminal."""
    from tqdm import tqdm

    return tqdm(items, name, total, leave=not name.startswith("evaluate"), initial=initial,
                disable=None if is_first() else True)


# ---- 5 checkpoints -------------------------------------------------------------------------------


def training_state(model, optimizer) -> dict:
    """What a checkpoint holds of model and optimizer, each process its shards."""
    return {"model": get_model_state_dict(model),
            "optimizer": get_optimizer_state_dict(model, optimizer)}


def save_step(folder: Path, step: int, model, optimizer, masks) -> None:
    """Write checkpoint `step_N` whole: under another name first. The two newest are kept."""
    partial = folder / f"partial_{step}"
    try:
        dcp.save(training_state(model, optimizer), checkpoint_id=partial)
        if masks and is_first():
            torch.save([masks.log_alpha, masks.optimizer.state_dict()], partial / "masks.pt")
    except (RuntimeError, dcp.CheckpointException) as error:  # a full disk, for one
        shutil.rmtree(partial, ignore_errors=True)
        raise OSError(f"{partial}: cannot be written ({str(error).splitlines()[0]})") from None
    if is_first():
        partial.replace(folder / f"step_{step}")
        for old in checkpoints(folder)[:-2]:
            shutil.rmtree(folder / f"step_{old}")
    dist.barrier()


def checkpoints(folder: Path) -> list[int]:
    """The steps of the checkpoints in a folder, in order."""
    return sorted(int(path.name.removeprefix("step_")) for path in folder.glob("step_*"))


def load_newest(folder: Path, model, optimizer, masks) -> int:
    """Continue from the newest checkpoint; returns the number of steps done."""
    found = as_first(checkpoints(folder))
    if is_first():
        for partial in folder.glob("partial_*"):
            shutil.rmtree(partial)
    if not found:
        return 0
    path, state = folder / f"step_{found[-1]}", training_state(model, optimizer)
    dcp.load(state, checkpoint_id=path)
    set_model_state_dict(model, state["model"])
    set_optimizer_state_dict(model, optimizer, optim_state_dict=state["optimizer"])
    if masks:
        log_alpha, adam = torch.load(path / "masks.pt", weights_only=True)
        with torch.no_grad():
            masks.log_alpha.copy_(log_alpha)
        masks.optimizer.load_state_dict(adam)
    return found[-1]


# ---- 6 evaluation --------------------------------------------------------------------------------


@torch.no_grad()
def held_out_loss(model: LossLlama, teacher: LossLlama, rows: Rows, device, name: str) -> dict:
    """Of text, over all predictions and in nats/token: the loss, and the KL to the teacher."""
    to_teacher, total = distillation(teacher), torch.zeros(3, dtype=torch.float64)
    for micro in shares(rows, device, name):
        objectives = cross_entropy(micro), to_teacher(micro)
        total += model(micro.tokens, micro.document, lambda hidden, head, of=objectives: torch.cat(
            [objective(hidden, head) for objective in of])).cpu()
    dist.all_reduce(total)
    loss, kl, _ = (total / (rows.kind > 0).sum()).tolist()
    return {"loss": loss, "kl": kl}


def shares(rows: Rows, device, name: str) -> Iterator[Rows]:
    """This process's rows, a few at a time; filled up with rows of which nothing counts."""
    more = rows[[0] * (-len(rows) % dist.get_world_size())]
    rows = join_rows([rows, dataclasses.replace(more, kind=torch.zeros_like(more.kind))])
    return progress(list(micro_batches(rows, device)), f"evaluate {name}")


@torch.no_grad()
def exact_match(model: LossLlama, rows: Rows, n_examples: int, device, name: str) -> float:
    """Share of examples whose every answer token, EOS included, is the argmax: in one pass.

    What greedy generation would answer, but for the answers that it spells with other tokens.
    """
    wrong = torch.zeros(n_examples, dtype=torch.int64)
    for micro in shares(rows, device, name):
        at = micro.kind & ANSWER > 0
        target, document = micro.tokens.roll(-1, dims=1)[at], micro.document[at].cpu()

        def missed(hidden, head, at=at, target=target):
            pairs = zip(hidden[at].split(1024), target.split(1024), strict=True)
            return torch.cat([F.linear(h, head).argmax(-1) != t for h, t in pairs])

        wrong.index_add_(0, document, model(micro.tokens, micro.document, missed).cpu().long())
    dist.all_reduce(wrong)
    return (wrong == 0).double().mean().item()


def judge(model: LossLlama, teacher: LossLlama, data: "Data", device, name: str) -> dict:
    """Of held-out text the loss and the KL to the teacher, in nats/token; of tasks the shares of
    exact answers, and their mean."""
    found = {}
    if data.held_out is not None:
        found = held_out_loss(model, teacher, data.held_out, device, name)
    for task, (rows, n) in data.dev.items():
        found[task] = exact_match(model, rows, n, device, f"{name}, {task}")
    if data.dev:
        found["mean"] = sum(found[task] for task in data.dev) / len(data.dev)
    model.reshard()
    return found


# ---- 7 the run -----------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Data:
    """Rows to train on and to judge by; the dev rows and number of examples of each task."""

    train: Rows
    held_out: Rows | None
    dev: Mapping[str, tuple[Rows, int]]


def load_data(a: argparse.Namespace, config: mha2gqa.LlamaConfig) -> Data:
    """Text, or tasks, or both (then the rows of both, and text to judge by)."""
    train, held_out, dev = [], None, {}
    limit = config.max_position_embeddings
    seq_len = a.seq_len or min(2048, limit)
    if not 2 <= seq_len <= limit:
        raise ValueError(f"--seq-len {seq_len}: expected 2 to {limit} for this model")
    if a.text:
        rows, kept = split_text(a.model, config, a, seq_len)
        train, held_out = [text_to_rows(rows)], text_to_rows(kept)
        say(f"text: {rows.numel():,} tokens to train on, {kept.numel():,} held out")
    if a.tasks:
        coded = []
        for task, is_dev, found, cut in encoded_tasks(a, config, seq_len):
            say(f"{task} {'dev' if is_dev else 'train'}: {len(found):,} examples, "
                f"{sum(len(ids) for ids, _ in found):,} tokens, {cut} prompts cut")
            if is_dev:
                dev[task] = pack_examples(found, seq_len, a.seed), len(found)
            else:
                coded += found
        train.append(pack_examples(coded, seq_len, a.seed))
    rows = join_rows(train)
    if len(train) > 1:  # calibration takes the first ones: of both kinds
        rows = rows[epoch_order(len(rows), a.seed, 0)]
    return Data(rows, held_out, dev)


def split_text(model_dir, config, a, seq_len: int) -> tuple[Tensor, Tensor]:
    """(rows to train on, rows held out) of a.text, these of a.eval_text if there is one."""
    # So many that the held-out rows are the same for every number of steps.
    tokens = max(655_360, a.steps * a.batch_tokens) + 65_536 if a.steps else 10**9
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a short text is read again: epochs
        return mha2gqa.text_rows(
            model_dir, config, a.text, a.eval_text, tokens, seq_len, a.seed)


def encoded_tasks(a, config, seq_len: int) -> Iterator[tuple]:
    """(task, is it the dev file, encoded examples, how many prompts were cut) of a.tasks."""
    tasks, encode = Path(a.tasks), mha2gqa.load_tokenizer(a.model)
    found = [task for task in TASKS if (tasks / task).is_dir()]
    if not found:
        raise ValueError(f"{tasks}: holds none of the folders {', '.join(TASKS)}")
    for task in found:
        for is_dev in (False, True):
            examples = read_task(tasks, task, is_dev)[: a.task_limit]
            yield task, is_dev, *encode_examples(examples, encode, config.eos_token_ids, seq_len)


def join_rows(parts: list[Rows]) -> Rows:
    """All the rows of several kinds."""
    document = None
    if any(p.document is not None for p in parts):
        document = torch.cat([torch.zeros_like(p.tokens) if p.document is None else p.document
                              for p in parts])
    return Rows(torch.cat([p.tokens for p in parts]), torch.cat([p.kind for p in parts]), document)


def say(line: str) -> None:
    """Print a line, once for all processes."""
    if is_first():
        print(line, flush=True)


@dataclasses.dataclass(frozen=True)
class Run:
    """What the stages of a run share. `report` is the one thing that grows, and is on the disk."""

    a: argparse.Namespace
    device: torch.device
    config: mha2gqa.LlamaConfig
    new_config: mha2gqa.LlamaConfig
    weights: Mapping[str, Tensor]
    data: Data
    size: int  # rows a step
    steps: int
    report: dict
    timed: Callable[[str], contextlib.AbstractContextManager]

    @property
    def out(self) -> Path:
        return Path(self.a.out)

    @property
    def taught_by_source(self) -> bool:
        return not (self.a.teacher or self.a.tasks and self.a.sft_epochs)

    def rates(self, steps: int) -> tuple[float, float]:
        """Learning rates of model and masks for a training of so many steps.

        The paper's, 1e-5 and 1e-2, are for a model 4,096 wide and some 10,000 steps; narrower ones
        and shorter runs want more: 1e-5 · 4096/D · √(10⁴/steps), 3e-3 at most, and
        1e-2 · 10⁴/steps, so that a mask can move as far. A refitted student whose teacher is the
        source starts so near it that such steps would lead away: an eighth, but 1e-5 at least.
        """
        short = max(1.0, 10_000 / steps)
        lr = min(3e-3, 1e-5 * max(1.0, 4096 / self.config.hidden_size) * short**0.5)
        if self.a.refit and self.taught_by_source:
            lr = max(1e-5, lr / 8)
        return self.a.lr or lr, self.a.mask_lr or 1e-2 * short

    def train(self, name, model, objective, parts, steps: int, folder: str, masks=None) -> None:
        """`train` as the arguments say, with checkpoints in OUT/folder."""
        with self.timed(name):
            train(name, model, self.data.train, objective, parts, steps, self.size,
                  self.rates(steps)[0], self.out / folder, self.device, self.a.seed,
                  self.a.save_every, masks)

    def frozen(self, config, blocks, outer) -> LossLlama:
        """A sharded model of these weights that is not trained."""
        model = shard(model_of(config), self.device, compute_dtype(self.device))
        return fill_(model.requires_grad_(False), blocks, outer)

    def score(self, name: str, teacher, make_model: Callable[[], LossLlama]) -> None:
        """Judge a model, unless an interrupted run has, and write the report so far."""
        if name not in self.report["scores"]:
            with self.timed("evaluate"):
                self.report["scores"][name] = judge(
                    make_model(), teacher, self.data, self.device, name)
            write_report(self.out, self.report)
            free_memory()


def free_memory() -> None:
    """Let go of sharded models that nothing refers to: they refer to themselves."""
    gc.collect()
    torch.cuda.empty_cache()


def source_blocks(config, weights) -> Iterator[dict[str, Tensor]]:
    """The weights of one block after the other."""
    return (mha2gqa.read_block(weights, i, "cpu") for i in range(config.num_hidden_layers))


@torch.no_grad()
def student_blocks(run: Run) -> Iterator[dict[str, Tensor]]:
    """The aligned source's blocks with new KV heads beside the old; without masks the converted."""
    a, rows = run.a, run.data.train
    rows = rows[: max(2, a.calibration_tokens // rows.tokens.shape[1])]
    x = mha2gqa.embed(run.weights, rows.tokens, {"device": run.device, "dtype": torch.float32})
    walk = mha2gqa.converted_blocks(
        run.config, run.weights, x, a.kv_heads, a.align, a.refit, a.group, a.metric, a.seed,
        None if rows.document is None else rows.document.to(run.device))
    for _, aligned, converted, _ in progress(walk, "align", total=run.config.num_hidden_layers):
        new = {name.replace("_proj.", "_proj.new."): w for name, w in converted.items()
               if "k_proj" in name or "v_proj" in name}
        yield converted if a.no_masks else aligned | new


def prepare(a: argparse.Namespace, report: dict, device, timed) -> Run:
    """Read all input and check it; says what will be done. Raises ValueError for what is wrong."""
    config, weights = mha2gqa.load_checkpoint(a.model)
    new_config = mha2gqa.gqa_config(config, a.kv_heads)
    mha2gqa.check_method(a.align, a.group, a.metric, a.seed)
    if a.teacher:
        load_teacher(a.teacher, config)
    data = load_data(a, config)
    seq_len, n = data.train.tokens.shape[1], dist.get_world_size()
    size = max(1, a.batch_tokens // seq_len)
    if a.refit and len(data.train) < 2:
        raise ValueError(f"a refit needs two rows of {seq_len} tokens, found {len(data.train)}; "
                         "more text, a smaller --seq-len, or --no-refit")
    if size % n:
        raise ValueError(f"--batch-tokens: {size} rows a step cannot be shared by {n} processes; "
                         f"choose a multiple of {seq_len * n}")
    steps = a.steps or math.ceil(a.epochs * len(data.train) / size)
    run = Run(a, device, config, new_config, weights, data, size, steps, report, timed)
    student, teacher = (sum(p.numel() for p in model.parameters()) for model in (
        model_of(new_config) if a.no_masks else model_of(config, a.kv_heads), model_of(config)))
    kept = 3 * 12 if 0 < a.save_every < steps else 0  # two checkpoints, and one being written
    disk = next(path for path in (run.out, *run.out.absolute().parents) if path.exists())
    needed, free = (kept + 8) * student, shutil.disk_usage(disk).free
    if free < needed and not report["scores"]:
        raise ValueError(f"{a.out}: checkpoints and models need {needed:,} bytes, {free:,} are free"
                         " on the disk")
    lr, mask_lr = run.rates(steps)
    memory = (16 * student + compute_dtype(device).itemsize * teacher) / n / 1e9
    say(f"{config.num_hidden_layers} blocks, {config.num_key_value_heads} to {a.kv_heads} KV heads;"
        f" {steps} steps of {size} rows of {seq_len} tokens, learning rate {lr:.1e}"
        + ("" if a.no_masks else f", of masks {mask_lr:.1e}")
        + f"; {n} x {device.type}, {mha2gqa.short(memory)} GB each for weights, gradients and Adam")
    report["kv_cache_bytes_per_token"] = {
        "source": mha2gqa.kv_cache_bytes(config, weights),
        "pruned": mha2gqa.kv_cache_bytes(new_config, weights)}
    return run


def prune(run: Run) -> None:
    """The whole run; the result is OUT/gqa, what was measured stands in the report."""
    config, new_config, outer = run.config, run.new_config, mha2gqa.outer_weights(run.weights)
    teacher_config, tuned = teacher_weights(run)
    teacher = run.frozen(
        teacher_config, source_blocks(teacher_config, tuned), mha2gqa.outer_weights(tuned))
    run.score("source", teacher,
              lambda: run.frozen(config, source_blocks(config, run.weights), outer))
    if tuned is not run.weights:
        run.score("teacher", teacher, lambda: teacher)
    pooled = (mha2gqa.merge(w, config, run.a.kv_heads) for w in source_blocks(config, run.weights))
    run.score("mean-pool", teacher, lambda: run.frozen(new_config, pooled, outer))
    result = run.out / "gqa"
    if not as_first(result.exists()):
        student, masks = student_of(run, teacher)
        parts = {"kl": KL, "bild": ANSWER}
        run.train("prune", student, distillation(teacher), parts, run.steps, "checkpoints", masks)
        with run.timed("write"):
            save_model(result, student, new_config, run.weights, run.a.model)
        del student, masks
        free_memory()
    _, weights = mha2gqa.load_checkpoint(result)
    run.score("pruned", teacher, lambda: run.frozen(
        new_config, source_blocks(new_config, weights), mha2gqa.outer_weights(weights)))


def teacher_weights(run: Run) -> tuple[mha2gqa.LlamaConfig, Mapping[str, Tensor]]:
    """Config and weights of --teacher, or of the source, or of the source after SFT."""
    a, config = run.a, run.config
    if run.taught_by_source:
        return config, run.weights
    folder = Path(a.teacher or run.out / "teacher")
    if not as_first(folder.exists()):
        model = shard(model_of(config), run.device, recompute=a.checkpoint_activations)
        fill_(model, source_blocks(config, run.weights), mha2gqa.outer_weights(run.weights))
        steps = math.ceil(a.sft_epochs * len(run.data.train) / run.size)
        run.train("fine-tune", model, cross_entropy, {"cross_entropy": ANSWER}, steps, "sft")
        save_model(folder, model, config, run.weights, a.model)
        del model
        free_memory()
    if is_first():
        shutil.rmtree(run.out / "sft", ignore_errors=True)
    return load_teacher(folder, config)


def load_teacher(folder, config) -> tuple[mha2gqa.LlamaConfig, Mapping[str, Tensor]]:
    """A teacher's config and weights; raises ValueError if its vocabulary is of another size."""
    found, weights = mha2gqa.load_checkpoint(folder)
    if found.vocab_size != config.vocab_size:
        raise ValueError(f"{folder}: its vocabulary has {found.vocab_size} tokens, the model's has "
                         f"{config.vocab_size}: it cannot be the teacher")
    return found, weights


def student_of(run: Run, teacher: LossLlama) -> tuple[LossLlama, Masks | None]:
    """The student and its masks: aligned and scored, unless there are checkpoints to load."""
    a = run.a
    model = model_of(run.new_config) if a.no_masks else model_of(run.config, a.kv_heads)
    shard(model, run.device, recompute=a.checkpoint_activations)
    masks = None if a.no_masks else Masks(model, run.steps, run.rates(run.steps)[1], a.seed)
    if not as_first(checkpoints(run.out / "checkpoints")):
        with run.timed("align"):
            fill_(model, student_blocks(run), mha2gqa.outer_weights(run.weights))
        if masks:
            masks.hold(0.0, run.device)
        run.score("aligned", teacher, lambda: model)
    return model, masks


def write_report(out: Path, report: dict) -> None:
    """Write OUT/report.json, whole or not at all."""
    if is_first():
        out.mkdir(parents=True, exist_ok=True)
        mha2gqa.write_json(out / ".report.json", report)
        (out / ".report.json").replace(out / "report.json")
    dist.barrier()


def print_report(report: Mapping, out: str) -> None:
    """What a person wants to know of a report."""
    cache, columns = report["kv_cache_bytes_per_token"], list(report["scores"]["source"])
    say("\nHeld-out text in nats/token; shares of the tasks' exact answers.\n"
        f"{'':<10}" + "".join(f"{name:>12}" for name in columns) + "  KV bytes/token")
    for name, scores in report["scores"].items():
        size = cache["source" if name in ("source", "teacher") else "pruned"]
        say(f"{name:<10}" + "".join(f"{scores[c]:12.4f}" for c in columns) + f"{size:16,}")
    say("seconds: " + ", ".join(f"{name} {n:.0f}" for name, n in report["seconds"].items())
        + f"; the model is in {out}/gqa")


# ---- 8 the demo ----------------------------------------------------------------------------------


DEMO = Path("mha2gqa-demo")


def demo_source(a: argparse.Namespace, device: torch.device) -> None:
    """A small MHA LLaMA with a BPE tokenizer, trained a little on Python's own documentation, the
    demo's held-out rows excepted."""
    from pydoc_data.topics import topics

    if is_first():
        save_tokenizer(DEMO / "tokenizer", list(topics.values()))
        (DEMO / "text.jsonl").write_text(
            "".join(json.dumps({"text": text}) + "\n" for text in topics.values()))
    dist.barrier()
    config = mha2gqa.LlamaConfig(1024, 128, 344, 4, 8, max_position_embeddings=128,
                                 tie_word_embeddings=True, bos_token_id=0, eos_token_id=1)
    rows, _ = split_text(DEMO / "tokenizer", config, a, seq_len=128)
    torch.manual_seed(0)
    weights = {name: torch.ones(p.shape) if p.ndim == 1 else 0.04 * torch.randn(p.shape)
               for name, p in model_of(config).named_parameters()}
    model = shard(model_of(config), device)
    fill_(model, source_blocks(config, weights), mha2gqa.outer_weights(weights))
    train("make the source", model, text_to_rows(rows), cross_entropy, {"cross_entropy": ANSWER},
          400, 16, 3e-3, DEMO / "pretraining", device, seed=0, save_every=0)
    save_model(DEMO / "source", model, config, weights, DEMO / "tokenizer")
    if is_first():
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


# ---- 9 command line ------------------------------------------------------------------------------


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    """The command line's arguments; wrong ones end the program with one line."""
    parser = argparse.ArgumentParser(
        prog="train_gqa.py", description=__doc__.split("\n")[0],
        epilog="Without --model: the demo, which makes and converts a small model in mha2gqa-demo.")
    add = parser.add_argument
    add("--model", metavar="DIR", help="Hugging Face directory of the source")
    add("--kv-heads", type=int, metavar="G", help="KV heads wanted, a divisor of the source's")
    add("--out", metavar="DIR", help="where the run goes, and where it continues: the same command "
        "again goes on from the newest checkpoint; the result is DIR/gqa")
    add("--text", nargs="+", default=(), metavar="FILE", help="text to train on, as mha2gqa.py's")
    add("--eval-text", nargs="+", default=(), metavar="FILE", help="held-out text; without it the "
        "first 10%% of --text's rows are held out, 65,536 tokens at most")
    add("--tasks", metavar="DIR", help=f"folders of the public raw files of {', '.join(TASKS)}")
    add("--task-limit", type=int, metavar="N", help="only the first N examples of every file")
    add("--teacher", metavar="DIR", help="a fine-tuned source; without it the source is fine-tuned "
        "on --tasks, or is the teacher itself if there is text alone")
    add("--sft-epochs", type=float, default=2, metavar="N", help="default: 2; 0: no fine-tuning")
    add("--steps", type=int, metavar="N", help="default: what --epochs takes")
    add("--epochs", type=float, default=5, metavar="N", help="passes over the data (default: 5)")
    add("--batch-tokens", type=int, default=131_072, metavar="N", help="tokens a step, over all "
        "processes (default: 131,072, 64 rows of 2,048)")
    add("--seq-len", type=int, metavar="N", help="tokens a row; 2,048, or the context if less")
    add("--lr", type=float, help="of fine-tuning and pruning, after 32 steps of warm-up, then down "
        "to 0 in a cosine; default: 1e-5 * max(1, 4096/hidden_size) * sqrt(max(1, 10000/steps)): "
        "the paper's rate for its model and length, more for narrower models and shorter runs, "
        "3e-3 at most; with --refit, if the source is the teacher, which is near then, an eighth "
        "of it, 1e-5 at least")
    add("--mask-lr", type=float, help="of the masks' log alpha, constant; default: 1e-2 * max(1, "
        "10000/steps): the paper's, and more for shorter runs, so that a mask moves as far")
    add("--no-masks", action="store_true", help="the new heads alone from the first step, as "
        "always with --align linear or --refit, which change more than keys and values")
    add("--align", choices=mha2gqa.CHOICES["align"], default="linear", help="as mha2gqa.py's")
    add("--refit", action=argparse.BooleanOptionalAction, help="as mha2gqa.py's")
    add("--group", choices=mha2gqa.CHOICES["group"], help="as mha2gqa.py's")
    add("--metric", choices=mha2gqa.CHOICES["metric"], default="dist", help="as mha2gqa.py's")
    add("--calibration-tokens", type=int, default=262_144, metavar="N", help="default: 262,144")
    add("--save-every", type=int, default=500, metavar="N", help="steps from one "
        "checkpoint to the next (default: 500; 0: none but on SIGTERM)")
    add("--checkpoint-activations", action="store_true", help="less memory, a third more time")
    add("--seed", type=int, default=0, metavar="N", help="of data, masks and grouping")
    said = f"error: {{}}; see {parser.prog} --help\n" if os.environ.get("RANK", "0") == "0" else ""
    parser.error = lambda message: parser.exit(2, said.format(message))
    a = parser.parse_args(argv)
    if a != parser.parse_args([]) and not (
            a.model and a.out and a.kv_heads is not None and (a.text or a.tasks)):
        parser.error("a run needs --model, --kv-heads, --out, and --text or --tasks")
    a.refit = a.align == "linear" if a.refit is None else a.refit
    a.group = a.group or mha2gqa.GROUP_FOR[a.align]
    a.no_masks = a.no_masks or a.refit or a.align == "linear"
    for name, value in vars(a).items():
        least = 0 if name in ("sft_epochs", "save_every", "seed") else 1e-12
        if isinstance(value, int | float) and not isinstance(value, bool) and value < least:
            parser.error(f"--{name.replace('_', '-')} {value}: expected "
                         + ("0 or more" if least == 0 else "more than 0"))
    return a


def claim(a: argparse.Namespace) -> dict:
    """The report of the run in a.out: a new one if there is none.

    Raises ValueError if the folder holds something else, or a run with other arguments.
    """
    out = Path(a.out)
    free = ("out", "save_every", "checkpoint_activations")  # to change from one session to the next
    arguments = json.loads(json.dumps({n: v for n, v in vars(a).items() if n not in free}))
    if (out / "report.json").exists():
        report = mha2gqa.read_json(out / "report.json")
        before = report.get("arguments", {})
        changed = [n for n in arguments if before.get(n) != arguments[n]]
        if changed:
            raise ValueError(f"{out}: holds a run with --{changed[0].replace('_', '-')} "
                             f"{before.get(changed[0])}, not {arguments[changed[0]]}; choose "
                             "another --out")
        for half_written in out.glob(".mha2gqa-*"):
            shutil.rmtree(half_written)
        return report
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ValueError(f"{out}: exists and is not a run of this program; choose another --out")
    return {"arguments": arguments, "scores": {}, "seconds": {}}


def start(a: argparse.Namespace, device: torch.device) -> None:
    """The demo, or the run that the arguments ask for, or the table of one that is finished."""
    demo = not a.model
    if demo:
        a = parse_arguments([
            "--model", f"{DEMO}/source", "--kv-heads", "2", "--out", str(DEMO), "--text",
            f"{DEMO}/text.jsonl", "--steps", "300", "--batch-tokens", "2048"])
    out, report = Path(a.out), as_first(together(lambda: claim(a) if is_first() else None))
    if "pruned" not in report["scores"]:
        seconds, timed = mha2gqa.stopwatch(device)
        seconds.update(report["seconds"])
        report["seconds"] = seconds
        with mha2gqa.peak_memory(device) as peak:
            report["peak_memory_bytes"] = peak
            if demo and not as_first((out / "source").exists()):
                write_report(out, report)
                with timed("make the source"):
                    demo_source(a, device)
            checked = together(lambda: prepare(a, report, device, timed))
            write_report(out, report)
            prune(checked)
    print_report(report, a.out)


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; returns the exit status: 2 for bad input, with one line on stderr."""
    a = parse_arguments(argv)
    try:
        start(a, start_processes())
    except (ValueError, OSError, FloatingPointError) as error:
        if is_first():
            print(f"error: {error}", file=sys.stderr)
        return 2
    except torch.OutOfMemoryError as error:
        print(f"error: {str(error).splitlines()[0]} More processes, --checkpoint-activations or a "
              "shorter --seq-len take less", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        if is_first():
            print("interrupted: the same command continues", file=sys.stderr)
        return 130
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()
    return 0


if __name__ == "__main__":
    mha2gqa.be_a_program()
    sys.exit(main())
