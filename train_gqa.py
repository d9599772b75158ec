"""train_gqa: prune a LLaMA's key and value heads under distillation, with FSDP2.

    torchrun train_gqa.py                                        # the demo, on CPU, within minutes
    torchrun --nproc-per-node 8 train_gqa.py --model MODEL --kv-heads 8 --tasks DIR --out OUT

The program around mha2gqa.py, after Jin et al. 2024 (arXiv 2412.20677). A teacher, the source
fine-tuned on the tasks, watches a student: the source with its heads aligned, whose key and value
heads fade into new shared ones under hard-concrete masks, while KL and BiLD keep its logits close.

Every batch and every mask is a pure function of (seed, step). So a run depends neither on how many
processes share it nor on where it was interrupted: there is no loader state to save.

Shape suffixes as in mha2gqa.py; here R is packed rows.
"""

import argparse
import dataclasses
import datetime
import functools
import json
import math
import os
import random
import shutil
import signal
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
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
        return Rows(*(None if x is None else x[rows] for x in dataclasses.astuple(self)))

    def __len__(self) -> int:
        return len(self.tokens)


def text_to_rows(tokens_RT: Tensor) -> Rows:
    """Rows of plain text: every prediction but the row's last is learned in both losses."""
    kind = torch.full_like(tokens_RT, KL | ANSWER)
    kind[:, -1] = 0
    return Rows(tokens_RT, kind)


def choice_list(choices: Sequence[str]) -> str:
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
    choices = [r["sol1"], r["sol2"]]
    return (f"Goal: {r['goal']}\nChoose the most sensible solution to achieve the goal. "
            f"{choice_list(choices)}\nAnswer:"), choices[int(label)]


def winogrande(r, _label):
    """(prompt, answer) of a WinoGrande record, whose answer is 1 or 2."""
    choices = [r["option1"], r["option2"]]
    return ('Choose the most sensible text to replace the "_" in the following sentence: '
            f"{r['sentence']}\n{choice_list(choices)}\nAnswer:"), choices[int(r["answer"]) - 1]


def siqa(r, label):
    """(prompt, answer) of a SocialIQA record and its label, 1 to 3."""
    choices = [r["answerA"], r["answerB"], r["answerC"]]
    return (f"{r['context']}\nQuestion: {r['question']}\n{choice_list(choices)}\nAnswer:",
            choices[int(label) - 1])


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
    lines = file.read_text(encoding="utf-8").splitlines()
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
    prompts = encode([prompt for prompt, _ in examples])
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
    kind, document = torch.zeros_like(tokens), torch.full_like(tokens, -1)
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
    """Join torchrun's processes, or be the only one; returns this process's device."""
    cuda = torch.cuda.is_available()
    backend = "cpu:gloo,cuda:nccl" if cuda else "gloo"
    if "RANK" in os.environ:
        # The others wait while rank 0 aligns the source: longer than the default timeout allows.
        dist.init_process_group(backend, timeout=datetime.timedelta(hours=12))
    else:
        dist.init_process_group(backend, rank=0, world_size=1, store=dist.HashStore())
    if not cuda:  # torchrun leaves each process one thread
        here = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
        torch.set_num_threads(max(1, (os.cpu_count() or 1) // here))
        return torch.device("cpu")
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
    torch.cuda.set_device(device)
    return device


def is_first() -> bool:
    """Whether this process is rank 0, which reads, writes and speaks for all."""
    return dist.get_rank() == 0


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


def student_of(config: mha2gqa.LlamaConfig, kv_heads: int) -> LossLlama:
    """The source's model with fading key and value projections, on the meta device."""
    with torch.device("meta"):
        model = LossLlama(config)
        for block in model.model.layers:
            block.self_attn.k_proj = FadingLinear(config, kv_heads)
            block.self_attn.v_proj = FadingLinear(config, kv_heads)
    return model


def plain(config: mha2gqa.LlamaConfig) -> LossLlama:
    """Llama of that config on the meta device."""
    with torch.device("meta"):
        return LossLlama(config)


def shard(model: LossLlama, weights, device, stored=torch.float32, recompute=False) -> LossLlama:
    """Shard a model on the meta device over all processes and load it from rank 0's weights.

    Each block, then the root; compute in bf16 on CUDA, in float32 on CPU. `weights` None leaves
    the values to a checkpoint.
    """
    compute = torch.bfloat16 if device.type == "cuda" else torch.float32
    policy = MixedPrecisionPolicy(param_dtype=compute, reduce_dtype=torch.float32)
    model.to(stored)
    for block in model.model.layers:
        if recompute:
            block.forward = functools.partial(checkpoint, block.forward, use_reentrant=False)
        fully_shard(block, mp_policy=policy)
    fully_shard(model, mp_policy=policy)
    model.to_empty(device=device)
    if weights is not None:
        full = {name: w.to(stored) for name, w in weights.items()} if is_first() else {}
        options = StateDictOptions(full_state_dict=True, broadcast_from_rank0=True)
        set_model_state_dict(model, full, options=options)
    return model


def full_weights(model: nn.Module) -> dict[str, Tensor]:
    """The whole state dict on the CPU of rank 0; empty elsewhere."""
    options = StateDictOptions(full_state_dict=True, cpu_offload=True)
    return get_model_state_dict(model, options=options)


# ---- 3 losses over packed rows -------------------------------------------------------------------


def in_chunks(function, hidden_ND: Tensor, head_VD: Tensor, *others: Tensor) -> Tensor:
    """Sum of `function` over chunks of 1,024 predictions, recomputed in the backward pass.

    So the logits of a batch, float32 and V wide, never exist all at once.
    """
    total = hidden_ND.new_zeros((), dtype=torch.float32)
    for hidden, *rest in zip(hidden_ND.split(1024), *(x.split(1024) for x in others), strict=True):
        total = total + checkpoint(function, hidden, head_VD, *rest, use_reentrant=False)
    return total


def cross_entropy(hidden_ND, head_VD, target_N):
    """Summed nats of the targets."""
    return F.cross_entropy(mha2gqa.wide(F.linear(hidden_ND, head_VD)), target_N, reduction="sum")


def answer_loss(rows: Rows) -> Callable[[Tensor, Tensor], Tensor]:
    """The loss of `LossLlama`: summed cross-entropy of the answers' tokens, in nats."""
    at = rows.kind & ANSWER > 0
    target = rows.tokens.roll(-1, dims=1)[at]
    return lambda hidden, head: in_chunks(cross_entropy, hidden[at], head, target)


def distillation(h_student, w_student, h_teacher, w_teacher, kind, per_token):
    """KL / its tokens + BiLD / its tokens of some predictions (eq. 30); `per_token` (2,)."""
    student, teacher = F.linear(h_student, w_student), F.linear(h_teacher, w_teacher)
    kl = mha2gqa.kl_loss(student, teacher)[kind & KL > 0].sum()
    bild = mha2gqa.bild_loss(student, teacher)[kind & ANSWER > 0].sum()
    return (torch.stack([kl, bild]) * per_token).sum()


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
        self.steps, self.seed, self.drawn = steps, seed, None

    def target(self, step: int) -> float:
        return max(0.0, 1 - step / (0.3 * self.steps))

    def closed(self, step: int) -> bool:
        return step >= 0.8 * self.steps

    def draw(self, step: int, device) -> dict:
        """Set the z of every projection for this step; returns what to log."""
        self.drawn = None
        if step == 0 or self.closed(step):
            z_LK = torch.full_like(self.log_alpha, float(step == 0))
        else:
            with torch.no_grad():
                self.log_alpha += shift_to(self.log_alpha, self.target(step))
            generator = torch.Generator().manual_seed(self.seed * 1_000_003 + step)
            self.drawn = z_LK = mha2gqa.hard_concrete(self.log_alpha, generator)
        self.z_LK = z_LK.detach().to(device).requires_grad_(self.drawn is not None)
        for z_K, projections in zip(self.z_LK, self.layers, strict=True):
            for projection in projections:
                projection.z_K = z_K
        opened = z_LK
        if self.drawn is not None:
            opened = mha2gqa.open_probability(self.log_alpha.detach())
        return {"mask_mean": opened.mean().item(), "mask_target": self.target(step),
                "mask_layers": [round(x, 4) for x in opened.mean(1).tolist()]}

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


def learning_rate(step: int, steps: int) -> float:
    """Linear over 32 steps (or a tenth of few), then a cosine to 0; times the flag's rate."""
    warm_up = min(32, max(1, steps // 10))
    return min(1.0, (step + 1) / warm_up) * (1 + math.cos(math.pi * step / steps)) / 2


def micro_batches(rows: Rows, device, tokens: int = 8192) -> Iterator[Rows]:
    """This process's rows of a batch, a few at a time; all processes get as many turns."""
    mine = rows[dist.get_rank() :: dist.get_world_size()]
    size = max(1, tokens // rows.tokens.shape[1])
    for i in range(0, len(mine), size):
        part = mine[i : i + size]
        yield Rows(*(None if x is None else x.to(device) for x in dataclasses.astuple(part)))


def train(
    model, rows: Rows, objective, steps, size, lr, folder, device, seed, save_every, masks=None
) -> None:
    """AdamW over `steps` batches of `size` rows, continued from the newest checkpoint in `folder`.

    `objective(micro, per_token)` gives the loss for `LossLlama`'s forward; per_token (2,) are 1 /
    the batch's predictions in KL and in ANSWER. Raises FloatingPointError at a loss that is not
    finite.
    """
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, betas=(0.9, 0.95), weight_decay=0)
    first, stopped, start = load_newest(folder, model, optimizer, masks), stop_signal(), time.time()
    metrics = folder.parent / "metrics.jsonl"
    keep_metrics(metrics, folder.name, first)
    for step in progress(first, steps, folder.name):
        record = {"stage": folder.name, "step": step}
        if masks:
            record |= masks.draw(step, device)
        chosen = batch(rows, step, size, seed)
        per_token = torch.tensor([1 / max(1, int((chosen.kind & bit > 0).sum()))
                                  for bit in (KL, ANSWER)], device=device)
        total = torch.zeros((), device=device)
        for micro in micro_batches(chosen, device):
            loss = model(micro.tokens, micro.document, objective(micro, per_token))
            (loss * dist.get_world_size()).backward()  # FSDP averages over processes
            total += loss.detach()
        total = total.cpu()
        dist.all_reduce(total)
        if not torch.isfinite(total):
            raise FloatingPointError(f"step {step}: the loss is {total.item()}; the last good "
                                     f"checkpoint is kept in {folder}")
        norm = nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        rate = learning_rate(step, steps)
        for group in optimizer.param_groups:
            group["lr"] = lr * rate
        optimizer.step()
        optimizer.zero_grad()
        if masks:
            masks.step()
        speed = (step + 1 - first) * chosen.tokens.numel() / (time.time() - start)
        record |= {"loss": total.item(), "lr": lr * rate,
                   "gradient_norm": norm.full_tensor().item(), "tokens_per_second": speed}
        if is_first():
            with open(metrics, "a") as file:
                file.write(json.dumps(record) + "\n")
        stop = torch.tensor(float(stopped()))
        dist.all_reduce(stop)
        if stop or (step + 1) % save_every == 0 and step + 1 < steps:
            save_step(folder, step + 1, model, optimizer, masks)
        if stop:
            raise KeyboardInterrupt


def keep_metrics(file: Path, stage: str, first: int) -> None:
    """Drop the lines of steps that will be made again."""
    if is_first() and file.exists():
        lines = file.read_text().splitlines()
        records = [json.loads(line) for line in lines if line.endswith("}")]  # a kill can cut one
        kept = [r for r in records if r["stage"] != stage or r["step"] < first]
        file.write_text("".join(json.dumps(r) + "\n" for r in kept))


def stop_signal() -> Callable[[], bool]:
    """Catch SIGTERM from now on; the function returned says whether it has come."""
    seen = []
    signal.signal(signal.SIGTERM, lambda *_: seen.append(True))
    return lambda: bool(seen)


def progress(first: int, steps: int, name: str):
    """A progress bar over the steps left, on rank 0, silent when not on a terminal."""
    from tqdm import tqdm

    return tqdm(range(first, steps), initial=first, total=steps, desc=name, unit="step",
                disable=None if is_first() else True)


def training_state(model, optimizer) -> dict:
    """What a checkpoint holds of model and optimizer, each process its shards."""
    return {"model": get_model_state_dict(model),
            "optimizer": get_optimizer_state_dict(model, optimizer)}


def save_step(folder: Path, step: int, model, optimizer, masks) -> None:
    """Write checkpoint `step_N` whole: under another name first. The two newest are kept."""
    partial = folder / f"partial_{step}"
    dcp.save(training_state(model, optimizer), checkpoint_id=partial)
    if is_first():
        if masks:
            torch.save([masks.log_alpha, masks.optimizer.state_dict()], partial / "masks.pt")
        partial.replace(folder / f"step_{step}")
        for old in checkpoints(folder)[:-2]:
            shutil.rmtree(folder / f"step_{old}")
    dist.barrier()


def checkpoints(folder: Path) -> list[int]:
    """The steps of the checkpoints in a folder, in order."""
    return sorted(int(path.name.removeprefix("step_")) for path in folder.glob("step_*"))


def load_newest(folder: Path, model, optimizer, masks) -> int:
    """Continue from the newest checkpoint; returns the number of steps done."""
    found = checkpoints(folder)
    dist.barrier()
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


# ---- 5 evaluation --------------------------------------------------------------------------------


@torch.no_grad()
def held_out_loss(model: LossLlama, rows: Rows, device) -> float:
    """Nats/token over the answers' (or all of the text's) predictions."""
    total = torch.zeros(2, dtype=torch.float64)
    for micro in micro_batches(padded(rows), device):
        total[0] += model(micro.tokens, micro.document, answer_loss(micro)).item()
        total[1] += (micro.kind & ANSWER > 0).sum().item()
    dist.all_reduce(total)
    return (total[0] / total[1]).item()


def padded(rows: Rows) -> Rows:
    """The rows and a few more of which nothing counts, as many as a multiple of the processes."""
    more = -len(rows) % dist.get_world_size()
    extra = rows[:1].tokens.expand(more, -1), torch.zeros_like(rows.kind[:1]).expand(more, -1)
    document = None if rows.document is None else torch.cat(
        [rows.document, rows.document[:1].expand(more, -1)])
    return Rows(torch.cat([rows.tokens, extra[0]]), torch.cat([rows.kind, extra[1]]), document)


@torch.no_grad()
def exact_match(model: LossLlama, rows: Rows, n_examples: int, device) -> float:
    """Share of examples whose every answer token, EOS included, is the argmax: in one pass.

    What greedy generation would answer, but for the answers that it spells with other tokens.
    """
    wrong = torch.zeros(n_examples, dtype=torch.int64)
    for micro in micro_batches(padded(rows), device):
        at = micro.kind & ANSWER > 0
        target, document = micro.tokens.roll(-1, dims=1)[at], micro.document[at].cpu()

        def misses(hidden_ND, head_VD, target_N):
            return (F.linear(hidden_ND, head_VD).argmax(-1) != target_N).float()

        def parts(hidden, head, at=at, target=target):
            pairs = zip(hidden[at].split(1024), target.split(1024), strict=True)
            return torch.cat([misses(h, head, t) for h, t in pairs] or [hidden.new_zeros(0)])

        missed = model(micro.tokens, micro.document, parts)
        wrong.index_add_(0, document, missed.cpu().long())
    dist.all_reduce(wrong)
    return (wrong == 0).double().mean().item()


# ---- 6 the run -----------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Data:
    """Rows to train on and to judge by; the dev rows and number of examples of each task."""

    train: Rows
    held_out: Rows | None
    dev: Mapping[str, tuple[Rows, int]]


def load_data(a: argparse.Namespace, config: mha2gqa.LlamaConfig) -> Data:
    """Text, or tasks, or both (then the rows of both, and text to judge by)."""
    train, held_out, dev = [], None, {}
    seq_len = a.seq_len or min(2048, config.max_position_embeddings)
    if a.text:
        tokens = a.steps * a.batch_tokens if a.steps else 10**9
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # a short text is read again: epochs
            rows, kept = mha2gqa.text_rows(
                a.model, config, a.text, a.eval_text, tokens, seq_len, a.seed)
        train, held_out = [text_to_rows(rows)], text_to_rows(kept)
        say(f"text: {rows.numel():,} tokens to train on, {kept.numel():,} held out")
    if a.tasks:
        encode, coded = mha2gqa.load_tokenizer(a.model), []
        for task in TASKS:
            if not (Path(a.tasks) / task).is_dir():
                continue
            for is_dev in (False, True):
                examples = read_task(Path(a.tasks), task, is_dev)
                examples = examples[: a.task_limit or len(examples)]
                found, cut = encode_examples(examples, encode, config.eos_token_ids, seq_len)
                say(f"{task} {'dev' if is_dev else 'train'}: {len(found):,} examples, "
                    f"{sum(len(ids) for ids, _ in found):,} tokens, {cut} prompts cut")
                if is_dev:
                    dev[task] = pack_examples(found, seq_len, a.seed), len(found)
                else:
                    coded += found
        if not coded:
            raise ValueError(f"{a.tasks}: none of the tasks {', '.join(TASKS)}")
        train.append(pack_examples(coded, seq_len, a.seed))
    return Data(join_rows(train), held_out, dev)


def join_rows(parts: list[Rows]) -> Rows:
    """All the rows of several kinds."""
    if len(parts) == 1:
        return parts[0]
    documents = [torch.zeros_like(p.tokens) if p.document is None else p.document for p in parts]
    return Rows(torch.cat([p.tokens for p in parts]), torch.cat([p.kind for p in parts]),
                torch.cat(documents))


def say(line: str) -> None:
    """Print a line, once for all processes."""
    if is_first():
        print(line, flush=True)


def judge(config, weights, data: Data, device) -> dict:
    """Held-out loss and tasks' accuracies of a whole state dict on rank 0."""
    model = shard(plain(config), weights, device)
    found = {}
    if data.held_out is not None:
        found["loss"] = held_out_loss(model, data.held_out, device)
    for task, (rows, n) in data.dev.items():
        found[task] = exact_match(model, rows, n, device)
    return found


@torch.no_grad()
def align(config, weights, rows: Rows, a, device) -> dict[str, dict[str, Tensor]]:
    """The student's weights, and the GQA models "mean-pool" and "aligned": on rank 0, or empty."""
    if not is_first():
        return {"student": {}, "mean-pool": {}, "aligned": {}}
    group = a.group or ("adjacent" if a.align == "none" else "value")
    outer = {name: w.float() for name, w in mha2gqa.outer_weights(weights).items()}
    models = {name: dict(outer) for name in ("student", "mean-pool", "aligned")}
    some = rows.tokens[: max(1, a.calibration_tokens // rows.tokens.shape[1])]
    x = mha2gqa.embed(weights, some, {"device": device, "dtype": torch.float32})
    walk = mha2gqa.aligned_blocks(config, weights, x, a.kv_heads, a.align, group, a.metric, a.seed)
    for i, (source, aligned, _) in enumerate(walk):
        pooled, merged = (mha2gqa.merge(w, config, a.kv_heads) for w in (source, aligned))
        new = {name.replace("_proj.", "_proj.new."): w for name, w in merged.items()
               if "k_proj" in name or "v_proj" in name}
        for name, block in (("student", aligned | new), ("mean-pool", pooled), ("aligned", merged)):
            models[name] |= {mha2gqa.block_prefix(i) + n: w.float().cpu() for n, w in block.items()}
    return models


def pruned_weights(student: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The GQA model that is left when all masks are closed."""
    gone = {name.replace(".new.", ".") for name in student if ".new." in name}
    return {name.replace(".new.", "."): w for name, w in student.items() if name not in gone}


def prune(a: argparse.Namespace, device: torch.device) -> dict:
    """The whole run on `a.model`; returns the report that stands in OUT/report.json."""
    config, weights = mha2gqa.load_checkpoint(a.model)
    new_config = mha2gqa.gqa_config(config, a.kv_heads)
    out, started = Path(a.out), time.time()
    data = load_data(a, config)
    size = max(1, a.batch_tokens // data.train.tokens.shape[1])
    if size % dist.get_world_size():
        raise ValueError(f"--batch-tokens: {size} rows a step cannot be shared evenly by "
                         f"{dist.get_world_size()} processes")
    steps = a.steps or math.ceil(a.epochs * len(data.train) / size)
    common = {"device": device, "seed": a.seed, "save_every": a.save_every}
    teacher_weights, scores = weights, {}
    if a.teacher or (a.tasks and a.sft_epochs):
        teacher_weights = fine_tuned(a, config, weights, data, size, out, common)
    models = align(config, weights, data.train, a, device)
    scores["source"] = judge(config, weights, data, device)
    if teacher_weights is not weights:
        scores["teacher"] = judge(config, teacher_weights, data, device)
    for name in ("mean-pool", "aligned"):
        scores[name] = judge(new_config, models[name], data, device)
    say(f"{steps} steps of {size} rows of {data.train.tokens.shape[1]} tokens, learning rate "
        f"{rates(a, config, steps)[0]:.1e}, masks {rates(a, config, steps)[1]:.1e}")
    student, masks = shard_student(a, config, new_config, models, device, steps)
    distill(a, config, student, masks, teacher_weights, data, steps, size, out, common)
    pruned = full_weights(student)
    if masks and is_first():
        pruned = pruned_weights(pruned)
    scores["pruned"] = judge(new_config, pruned, data, device)
    report = {
        "scores": scores, "steps": steps, "seconds": time.time() - started,
        "kv_cache_bytes_per_token": {
            "source": mha2gqa.kv_cache_bytes(config, weights),
            "pruned": mha2gqa.kv_cache_bytes(new_config, weights)},
    }
    if is_first():
        stored = {name: w.to(weights[name].dtype) for name, w in pruned.items()}
        if not (out / "gqa").exists():
            mha2gqa.save_checkpoint(out / "gqa", new_config, stored, a.model)
        mha2gqa.write_json(out / "report.json", report)
    dist.barrier()
    return report


def rates(a, config, steps: int) -> tuple[float, float]:
    """Learning rates of model and masks. The paper's, 1e-5 and 1e-2, are for a 4,096 wide model and
    some 10,000 steps; narrower models and shorter runs want more: 1e-5 · 4096/D · √(10⁴/steps), and
    1e-2 · 10⁴/steps, so that a mask can move as far."""
    short = max(1.0, 10_000 / steps)
    lr = 1e-5 * max(1.0, 4096 / config.hidden_size) * short**0.5
    return a.lr or lr, a.mask_lr or 1e-2 * short


def shard_student(a, config, new_config, models, device, steps):
    """(sharded student, its masks): the fading model, or without masks the aligned GQA model."""
    if a.no_masks:
        return shard(plain(new_config), models["aligned"], device,
                     recompute=a.checkpoint_activations), None
    model = student_of(config, a.kv_heads)
    masks = Masks(model, steps, rates(a, config, steps)[1], a.seed)
    return shard(model, models["student"], device, recompute=a.checkpoint_activations), masks


def fine_tuned(a, config, weights, data: Data, size: int, out: Path, common) -> dict[str, Tensor]:
    """The teacher's weights: of --teacher, of an earlier run, or of SFT on the tasks now."""
    folder = Path(a.teacher or out / "teacher")
    if not folder.exists():
        model = shard(plain(config), weights, common["device"], recompute=a.checkpoint_activations)
        steps = math.ceil(a.sft_epochs * len(data.train) / size)

        def objective(micro, per_token):
            loss = answer_loss(micro)
            return lambda hidden, head: loss(hidden, head) * per_token[1]

        (out / "sft").mkdir(exist_ok=True)
        train(model, data.train, objective, steps, size, rates(a, config, steps)[0], out / "sft",
              **common)
        tuned = full_weights(model)
        if is_first():
            tuned = {name: w.to(weights[name].dtype) for name, w in tuned.items()}
            mha2gqa.save_checkpoint(folder, config, tuned, a.model)
            shutil.rmtree(out / "sft")
        dist.barrier()
    teacher_config, tuned = mha2gqa.load_checkpoint(folder)
    if (teacher_config.hidden_size, teacher_config.vocab_size) != (config.hidden_size,
                                                                   config.vocab_size):
        raise ValueError(f"{folder}: not a teacher of this model's sizes")
    return tuned


def distill(a, config, student, masks, teacher_weights, data, steps, size, out, common) -> None:
    """Train the student on the teacher's logits; it changes in place."""
    stored = torch.bfloat16 if common["device"].type == "cuda" else torch.float32
    teacher = shard(plain(config), teacher_weights, common["device"], stored)
    teacher.requires_grad_(False)
    teacher_head = teacher.head.weight.full_tensor()  # it never changes: gathered once

    def objective(micro, per_token):
        at = micro.kind > 0
        with torch.no_grad():
            h_teacher = teacher(micro.tokens, micro.document, lambda hidden, _: hidden)[at]

        def of_chunk(h_student, head, h_teacher, kind):
            return distillation(h_student, head, h_teacher, teacher_head, kind, per_token)

        return lambda hidden, head: in_chunks(of_chunk, hidden[at], head, h_teacher, micro.kind[at])

    (out / "checkpoints").mkdir(exist_ok=True)
    lr = rates(a, config, steps)[0]
    folder = out / "checkpoints"
    train(student, data.train, objective, steps, size, lr, folder, masks=masks, **common)


# ---- 7 the demo ----------------------------------------------------------------------------------


def demo_source(folder: Path, device: torch.device) -> None:
    """A small MHA LLaMA with a BPE tokenizer, trained a little on Python's own documentation."""
    from pydoc_data.topics import topics

    if is_first():
        (folder / "text.jsonl").write_text(
            "".join(json.dumps({"text": text}) + "\n" for text in topics.values()))
        save_tokenizer(folder / "tokenizer", list(topics.values()))
    dist.barrier()
    config = mha2gqa.LlamaConfig(1024, 128, 344, 4, 8, max_position_embeddings=128,
                                 tie_word_embeddings=True, bos_token_id=0, eos_token_id=1)
    text, tokenizer = folder / "text.jsonl", folder / "tokenizer"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # all the text there is, whatever its length
        rows, _ = mha2gqa.text_rows(tokenizer, config, text, tokens=10**6)
    torch.manual_seed(0)
    weights = {name: torch.ones(p.shape) if p.ndim == 1 else 0.04 * torch.randn(p.shape)
               for name, p in plain(config).named_parameters()}
    model = shard(plain(config), weights, device)

    def objective(micro, per_token):
        loss = answer_loss(micro)
        return lambda hidden, head: loss(hidden, head) * per_token[1]

    (folder / "pretraining").mkdir(exist_ok=True)
    train(model, text_to_rows(rows), objective, 400, 16, 3e-3, folder / "pretraining", device,
          seed=0, save_every=10**9)
    weights = full_weights(model)
    if is_first():
        mha2gqa.save_checkpoint(folder / "source", config, weights, folder / "tokenizer")
    dist.barrier()


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


# ---- 8 command line ------------------------------------------------------------------------------


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
        "last 10%% of --text's tokens are held out, 65,536 at most")
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
    add("--lr", type=float, help="default: 1e-5 * 4096/hidden_size * sqrt(10000/steps), at least "
        "1e-5: the paper's rate for its model, more for narrower ones and shorter runs")
    add("--mask-lr", type=float, help="default: 1e-2 * 10000/steps, and not below 1e-2")
    add("--no-masks", action="store_true", help="the new heads alone from the first step")
    add("--align", choices=mha2gqa.CHOICES["align"], default="rotation", help="as mha2gqa.py's")
    add("--group", choices=mha2gqa.CHOICES["group"], help="as mha2gqa.py's")
    add("--metric", choices=mha2gqa.CHOICES["metric"], default="dist", help="as mha2gqa.py's")
    add("--calibration-tokens", type=int, default=262_144, metavar="N", help="default: 262,144")
    add("--save-every", type=int, default=500, metavar="N", help="steps (default: 500)")
    add("--checkpoint-activations", action="store_true", help="less memory, a third more time")
    add("--seed", type=int, default=0, metavar="N", help="of data, masks and grouping")
    parser.error = lambda message: parser.exit(2, f"error: {message}; see --help\n")
    a = parser.parse_args(argv)
    if a.model and not (a.out and a.kv_heads and (a.text or a.tasks)):
        parser.error("a run needs --model, --kv-heads, --out, and --text or --tasks")
    return a


def demo_arguments(device: torch.device) -> argparse.Namespace:
    """Make the demo's source if it is not there; the arguments of the run that converts it."""
    folder = Path("mha2gqa-demo")
    folder.mkdir(exist_ok=True)
    if not (folder / "source").exists():
        demo_source(folder, device)
    return parse_arguments([
        "--model", str(folder / "source"), "--kv-heads", "2", "--out", str(folder), "--text",
        str(folder / "text.jsonl"), "--steps", "300", "--batch-tokens", "2048"])


def print_report(report: Mapping, out: str) -> None:
    """What a person wants to know of a report."""
    columns = list(report["scores"]["source"])
    say(f"\n{'':<12}" + "".join(f"{name:>12}" for name in columns))
    for name, scores in report["scores"].items():
        say(f"{name:<12}" + "".join(f"{scores[column]:12.4f}" for column in columns))
    cache = report["kv_cache_bytes_per_token"]
    say(f"KV cache, bytes a token: {cache['source']:,} -> {cache['pruned']:,}\n"
        f"{report['steps']} steps, {report['seconds']:.0f} seconds; the model is in {out}/gqa")


def run(a: argparse.Namespace, device: torch.device) -> None:
    """The demo, or the run that the arguments ask for, or the table of one that is finished."""
    a = a if a.model else demo_arguments(device)
    out = Path(a.out)
    ours = ("checkpoints", "sft", "source", "teacher", "report.json")
    if out.exists() and any(out.iterdir()) and not any((out / name).exists() for name in ours):
        raise ValueError(f"{out}: exists and is not a run of this program; choose another --out")
    out.mkdir(exist_ok=True)
    done = (out / "report.json").exists()
    print_report(mha2gqa.read_json(out / "report.json") if done else prune(a, device), a.out)


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; returns the exit status: 2 for bad input, with one line on stderr."""
    a, device = parse_arguments(argv), start_processes()
    try:
        run(a, device)
    except (ValueError, OSError, FloatingPointError) as error:
        if is_first():
            print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        say("interrupted: the same command continues from the newest checkpoint")
        return 130
    finally:
        dist.destroy_process_group()
    return 0


if __name__ == "__main__":
    sys.exit(main())
