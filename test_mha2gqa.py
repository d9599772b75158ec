"""Tests of mha2gqa.py, in its order, then of train_gqa.py. Seeded, on CPU, minutes; references are
transformers, scipy, plain loops and brute force."""

import ast
import contextlib
import dataclasses
import errno
import functools
import gzip
import itertools
import json
import math
import os
import pickle
import random
import re
import resource
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import types
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import scipy.linalg
import scipy.special
import scipy.stats
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import nn

import mha2gqa as m
import train_gqa

PROGRAM = Path(m.__file__)
BASE = {
    "model_type": "llama", "vocab_size": 97, "hidden_size": 48, "intermediate_size": 80,
    "num_hidden_layers": 2, "num_attention_heads": 4, "max_position_embeddings": 512,
    "rms_norm_eps": 1e-5, "bos_token_id": 1, "eos_token_id": 2,
}
LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
          "original_max_position_embeddings": 64}
CONFIGS = {
    "mha": {},
    "gqa": {"num_key_value_heads": 2},
    "head_dim": {"head_dim": 20},
    "qwen2": {"model_type": "qwen2", "num_key_value_heads": 4},
    "qwen2 gqa": {"model_type": "qwen2", "num_key_value_heads": 2},
    "qwen3": {"model_type": "qwen3", "num_key_value_heads": 4, "head_dim": 16},
    "qwen3 gqa": {"model_type": "qwen3", "num_key_value_heads": 2, "head_dim": 12,
                  "attention_bias": True},
    "biases": {"attention_bias": True, "mlp_bias": True},
    "mistral": {"model_type": "mistral", "num_key_value_heads": 4, "sliding_window": None},
    "llama3": {"rope_scaling": LLAMA3, "rope_theta": 500000.0},
    "linear": {"rope_scaling": {"type": "linear", "factor": 2.0}},
    "new spelling": {"rope_parameters": {**LLAMA3, "rope_theta": 20000.0}},
    "tied": {"tie_word_embeddings": True},
}
every_config = pytest.mark.parametrize("name", CONFIGS)


def config_of(name="mha", **changes):
    return m.parse_config({**BASE, **CONFIGS[name], **changes})


def random_weights(config, seed=0, dtype=torch.float32):
    """Weights that make attention sharp enough to be worth comparing."""
    generator = torch.Generator().manual_seed(seed)
    weights = {}
    for name, p in m.Llama(config).state_dict().items():
        w = torch.randn(p.shape, generator=generator)
        w = 1 + 0.2 * w if "norm" in name else w * (0.3 if p.ndim == 1 else 2 / p.shape[-1] ** 0.5)
        if "q_norm" in name or "k_norm" in name:  # every second plane may turn
            w.view(2, -1)[1, ::2] = w.view(2, -1)[0, ::2]
        weights[name] = w.to(dtype)
    return weights


def random_tokens(config, batch=2, time=40, seed=1):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(config.vocab_size, (batch, time), generator=generator)


def logits_of(config, weights, tokens, **keywords):
    model = m.Llama(config).to(next(iter(weights.values())).dtype)
    model.load_state_dict(weights)
    with torch.no_grad():
        return model(tokens, **keywords)


def save_checkpoint(path, config, weights, tokenizer_from=None, shard_bytes=m._SHARD_BYTES):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(m, "_SHARD_BYTES", shard_bytes)
        with m.new_checkpoint(path, config, weights, tokenizer_from) as writer:
            for i in range(config.num_hidden_layers):
                writer.write({n: w for n, w in weights.items() if n.startswith(m.block_prefix(i))})
            writer.write(m.non_block_weights(weights))


save_in_shards = functools.partial(save_checkpoint, shard_bytes=0)  # one a block


def transformers_model(path):
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()


def assert_transformers_computes_the_same(path, time=64):
    config, weights = m.load_checkpoint(path)
    tokens = random_tokens(config, time=time)
    with torch.no_grad():
        wanted = transformers_model(path)(tokens).logits
    found = logits_of(config, weights, tokens)
    assert (found - wanted).abs().max() <= 1e-5 * wanted.abs().max(), path


def same_weights(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[n], b[n]) and a[n].dtype == b[n].dtype
                                        for n in a)


def orthogonal(*shape, seed=0):
    """Random orthogonal matrices of float64, of both determinants."""
    generator = torch.Generator().manual_seed(seed)
    q = torch.linalg.qr(torch.randn(*shape, shape[-1], generator=generator).double()).Q
    return q * torch.randn(*shape, generator=generator).sign().double()[..., None, :]


def phases(*shape, seed=0):
    angle = 7 * torch.rand(*shape, generator=torch.Generator().manual_seed(seed)).double()
    return torch.polar(torch.ones_like(angle), angle)


def plane_rotation(c_P):
    """The matrix that acts on row vectors as multiplication of z_p by c_p; written out by hand."""
    p = len(c_P)
    q = torch.zeros(2 * p, 2 * p, dtype=torch.float64)
    for i, c in enumerate(c_P.tolist()):
        q[i, i], q[i, p + i], q[p + i, i], q[p + i, p + i] = c.real, c.imag, -c.imag, c.real
    return q


@pytest.fixture(scope="session")
def topics():
    from pydoc_data.topics import topics

    return list(topics.values())


@pytest.fixture(scope="session")
def bpe(topics, tmp_path_factory):
    """A tokenizer.json with BOS by its post-processor, and a truncation that must not be obeyed."""
    from tokenizers import ByteLevelBPETokenizer, processors

    tokenizer = ByteLevelBPETokenizer()
    tokenizer.train_from_iterator(topics, 384, special_tokens=["<unk>", "<s>", "</s>"])
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", 1)])
    tokenizer.enable_truncation(8)
    file = tmp_path_factory.mktemp("bpe") / "tokenizer.json"
    tokenizer.save(str(file))
    return file


def train_a_little(config, rows, steps=200):
    torch.manual_seed(0)
    model = m.Llama(config)
    for p in model.parameters():
        if p.ndim > 1:
            nn.init.normal_(p, std=0.05)
    optimizer = torch.optim.AdamW(model.parameters(), lr=4e-3)
    for step in range(steps):
        batch = rows[torch.randint(len(rows), (16,), generator=torch.Generator().manual_seed(step))]
        loss = F.cross_entropy(model(batch)[:, :-1].flatten(0, 1), batch[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss < 4  # from ln 384 = 5.95: it has learned something
    return {name: w.detach() for name, w in model.state_dict().items()}


@pytest.fixture(scope="session")
def trained(tmp_path_factory, topics, bpe):
    """A folder with text.jsonl, short.jsonl, and checkpoints: gqa (8 query heads on 4), mha."""
    folder = tmp_path_factory.mktemp("trained")
    for name, texts in (("text.jsonl", topics), ("short.jsonl", topics[:20])):
        (folder / name).write_text("".join(json.dumps({"text": t}) + "\n" for t in texts))
    for name, kv_heads in (("gqa", 4), ("mha", 8)):
        config = config_of(vocab_size=384, hidden_size=64, intermediate_size=128, head_dim=16,
                           num_attention_heads=8, num_key_value_heads=kv_heads,
                           max_position_embeddings=64, tie_word_embeddings=name == "gqa")
        rows, _ = m.text_rows(bpe.parent, config, m.Corpus(folder / "text.jsonl", tokens=100_000))
        save_in_shards(folder / name, config, train_a_little(config, rows), bpe.parent)
    return folder


@pytest.fixture(scope="session")
def corpus(trained):
    return m.Corpus(trained / "text.jsonl", tokens=20_000)


@pytest.fixture(scope="session")
def converted(trained, corpus, tmp_path_factory):
    """(directory, report) of a conversion, the default way or another; each is made once."""
    @functools.cache
    def make(source, kv_heads, **method):
        out = tmp_path_factory.mktemp("converted") / "out"
        return out, m.convert(trained / source, out, kv_heads, corpus, m.Method(**method))
    return make


def losses(report):
    return {name: score["loss"] for name, score in report["scores"].items()}


@pytest.fixture
def command(capfd):
    """A command line in this process: exit status, standard output and error."""
    threads = torch.get_num_threads()

    def run(*arguments, program=m):
        try:
            status = program.main([str(a) for a in arguments])
        except SystemExit as end:  # argparse's
            status = end.code
        if torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()
        torch.set_num_threads(threads)
        return status, *capfd.readouterr()

    return run


@pytest.fixture
def refused(command, tmp_path):
    """Assert one line that says it, exit status 2, and nothing written anywhere in tmp_path.

    Beside bars of progress, that is.
    """
    def run(message, *arguments, program=m):
        before = sorted(tmp_path.rglob("*"))
        status, out, err = command(*arguments, program=program)
        assert status == 2 and "nats" not in out
        said = [line for line in re.split("[\r\n]+", err) if line and "%|" not in line]
        assert len(said) == 1 and re.fullmatch(f"error: .*{message}.*", said[0]), err
        assert sorted(tmp_path.rglob("*")) == before

    return run


def anonymous_memory(pid="self"):
    """Bytes of a process's memory that no file backs."""
    found = re.search(r"RssAnon:\s+(\d+)", Path(f"/proc/{pid}/status").read_text())
    return 1024 * int(found[1]) if found else 0


def peak_of(*arguments):
    """The most anonymous memory that a Python program takes; it must end well."""
    program = subprocess.Popen([sys.executable, *map(str, arguments)], cwd=PROGRAM.parent)
    peak = 0
    while program.poll() is None:
        peak = max(peak, anonymous_memory(program.pid))
        time.sleep(0.005)
    assert program.returncode == 0
    return peak


def test_public_names_are_there_and_say_what_they_are():
    tree = ast.parse(PROGRAM.read_text())
    defined = {n.name: ast.get_docstring(n) for n in tree.body
               if isinstance(n, (ast.FunctionDef, ast.ClassDef))}
    assert all(defined[name] for name in m.__all__)
    assert "SPDX-License-Identifier: Apache-2.0" in PROGRAM.read_text()[:300] and m.__version__


def test_an_import_loads_what_it_needs():
    """torch's compiler alone takes seconds; the others are asked for when they are used."""
    code = "import sys, mha2gqa; print(*sys.modules)"
    loaded = subprocess.run([sys.executable, "-c", code], cwd=PROGRAM.parent, check=True,
                            capture_output=True, text=True).stdout.split()
    late = {"torch._dynamo", "safetensors", "tokenizers", "sentencepiece", "huggingface_hub"}
    assert "mha2gqa" in loaded and not late & set(loaded)


# ---- 1 the model ---------------------------------------------------------------------------------


@every_config
def test_logits_equal_transformers(tmp_path, name):
    config = config_of(name)
    save_checkpoint(tmp_path / "x", config, random_weights(config))
    assert_transformers_computes_the_same(tmp_path / "x", time=200)


def test_packed_documents_do_not_see_each_other():
    config = config_of("llama3", num_key_value_heads=2)
    weights = random_weights(config, dtype=torch.float64)
    tokens = random_tokens(config, batch=2, time=30)
    documents = torch.tensor([[0] * 7 + [1] * 22 + [2], [5] * 11 + [3] * 19])
    packed = logits_of(config, weights, tokens, document_BT=documents)
    for row in range(2):
        for document in documents[row].unique():
            at = documents[row] == document
            alone = logits_of(config, weights, tokens[row, at][None])
            torch.testing.assert_close(packed[row, at], alone[0])


class AttentionCalls(torch.utils._python_dispatch.TorchDispatchMode):
    """Records the kernel of each attention, and how many queries a head has in it."""

    def __enter__(self):
        self.calls = []
        return super().__enter__()

    def __torch_dispatch__(self, function, types, arguments=(), keywords=None):
        name = function.__name__.removeprefix("_scaled_dot_product_").partition(".")[0]
        if name != function.__name__.partition(".")[0] and "backward" not in name:
            self.calls.append((name.removesuffix("_for_cpu"), arguments[0].shape[2]))
        return function(*arguments, **(keywords or {}))


@pytest.mark.parametrize("name", ["mha", "gqa"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_attention_never_stores_the_scores(name, dtype):
    """Flash on a CPU; in packed rows a document at a time, so that none sees another."""
    model = m.Llama(config_of(name)).to(dtype)
    tokens = random_tokens(config_of(name))
    documents = torch.tensor([[7] * 10 + [8] * 30, [8] * 5 + [1] * 20 + [-1] * 15])
    for document_BT, lengths in ((None, [40]), (documents, [10, 30, 5, 20, 15])):
        with AttentionCalls() as mode:
            model(tokens, document_BT).sum().backward()
        assert mode.calls == [("flash_attention", n) for n in lengths] * 2


def test_hidden_states_are_what_the_head_reads():
    config = config_of()
    weights, tokens = random_weights(config), random_tokens(config)
    hidden = logits_of(config, weights, tokens, readout=lambda hidden, head: hidden)
    torch.testing.assert_close(hidden @ weights["lm_head.weight"].T,
                               logits_of(config, weights, tokens))


# ---- 2 statistics --------------------------------------------------------------------------------


@pytest.mark.parametrize("metric", ["dist", "cos"])
def test_grams_of_a_block_are_those_of_its_caches(metric):
    config = config_of("qwen2")
    weights = random_weights(config, dtype=torch.float64)
    block = {n: w.double() for n, w in m.block_weights(weights, 0).items()}
    x_BTD = torch.randn(3, 20, 48, generator=torch.Generator().manual_seed(0)).double()
    statistics = m.block_statistics(config, block, x_BTD, metric)
    normed = m._rms_norm(x_BTD, block["input_layernorm.weight"], 1e-5).flatten(0, 1)
    k, v = (F.linear(normed, block[f"self_attn.{p}.weight"], block[f"self_attn.{p}.bias"])
            for p in ("k_proj", "v_proj"))
    for i, j in itertools.product(range(4), range(4)):
        ki, kj, vi, vj = (y[:, 12 * h : 12 * h + 12] for y, h in ((k, i), (k, j), (v, i), (v, j)))
        if metric == "cos":
            ki, kj, vi, vj = (y / y.norm(dim=1, keepdim=True) for y in (ki, kj, vi, vj))
        torch.testing.assert_close(statistics.value_KKEE[i, j], vi.T @ vj)
        for p in range(6):
            zi, zj = (torch.complex(y[:, p], y[:, p + 6]) for y in (ki, kj))
            torch.testing.assert_close(statistics.key_PKK[p, i, j], (zi * zj.conj()).sum())
    q = F.linear(normed, block["self_attn.q_proj.weight"], block["self_attn.q_proj.bias"])
    for i, p in itertools.product(range(4), range(6)):
        wanted = q[:, 12 * i + p].square().sum() + q[:, 12 * i + p + 6].square().sum()
        torch.testing.assert_close(statistics.query_KP[i, p], wanted)
    assert statistics.n_tokens == 60


def test_all_that_read_a_unit_count():
    """Its queries' power, and what the output projection makes of its values."""
    config = config_of("gqa")
    block = {n: w.double() for n, w in m.block_weights(random_weights(config), 0).items()}
    x_BTD = torch.randn(2, 9, 48, generator=torch.Generator().manual_seed(0)).double()
    statistics = m.block_statistics(config, block, x_BTD)
    normed = m._rms_norm(x_BTD, block["input_layernorm.weight"], 1e-5).flatten(0, 1)
    q_NHE = F.linear(normed, block["self_attn.q_proj.weight"]).unflatten(1, (4, -1))
    wo_DHE = block["self_attn.o_proj.weight"].unflatten(1, (4, -1))
    v_NE = torch.randn(7, config.head_dim, generator=torch.Generator().manual_seed(0)).double()
    for unit, heads in ((0, (0, 1)), (1, (2, 3))):
        power_P = q_NHE[:, heads].square().sum((0, 1)).view(2, -1).sum(0)
        torch.testing.assert_close(statistics.query_KP[unit], power_P)
        wanted = sum((v_NE @ wo_DHE[:, h].T).square().sum() for h in heads)
        found = (v_NE @ statistics.output_KEE[unit]).square().sum()
        torch.testing.assert_close(found, wanted)


def test_keys_have_the_same_gram_before_and_after_rope():
    config = config_of()
    k_BKTE = torch.randn(1, 4, 50, 12, generator=torch.Generator().manual_seed(0)).double()
    rope, _ = m._rope_and_ends(config, k_BKTE[:, 0])
    turned = m._apply_rope(k_BKTE, rope)
    grams = [m.key_gram(k[0].transpose(0, 1)) for k in (k_BKTE, turned)]
    torch.testing.assert_close(*grams, rtol=1e-6, atol=1e-5)  # cos and sin are float32


# ---- 3 alignment ---------------------------------------------------------------------------------


def test_procrustes_by_hand():
    a = torch.tensor([[1.0, 0.0], [0.0, 2.0]])
    b = torch.tensor([[0.0, 1.0], [2.0, 0.0]])  # a with its axes exchanged: a reflection
    torch.testing.assert_close(m.procrustes(a, b), torch.tensor([[0.0, 1.0], [1.0, 0.0]]))
    # Of one plane RoPE allows only turns; Re Σ b conj(a) = 0 and Im = 1 - 4, so a quarter back.
    torch.testing.assert_close(m.rope_procrustes(a, b), torch.tensor([[0.0, -1.0], [1.0, 0.0]]),
                               atol=1e-6, rtol=0)


@given(st.integers(0, 10**6))
@settings(max_examples=20, deadline=None)
def test_procrustes_equals_scipy_and_recovers_a_map(seed):
    a, noise = torch.randn(2, 40, 8, generator=torch.Generator().manual_seed(seed)).double()
    q = orthogonal(8, seed=seed)
    torch.testing.assert_close(m.procrustes(a, a @ q), q)
    wanted, _ = scipy.linalg.orthogonal_procrustes(a.numpy(), noise.numpy())
    torch.testing.assert_close(m.procrustes(a, noise), torch.from_numpy(wanted))
    q = plane_rotation(phases(4, seed=seed))
    torch.testing.assert_close(m.rope_procrustes(a, a @ q), q)


@given(st.integers(0, 10**6))
@settings(max_examples=20, deadline=None)
def test_rope_procrustes_commutes_with_rope_and_is_the_best(seed):
    generator = torch.Generator().manual_seed(seed)
    a, b = torch.randn(2, 40, 8, generator=generator).double()
    q = m.rope_procrustes(a, b)
    torch.testing.assert_close(q.T @ q, torch.eye(8).double())
    assert torch.linalg.det(q) > 0.999
    for position in (1, 7, 1000):
        theta_P = 10.0 ** -torch.arange(4).double()
        rope = plane_rotation(torch.polar(torch.ones_like(theta_P), position * theta_P))
        torch.testing.assert_close(q @ rope, rope @ q)
    error = (a @ q - b).norm()
    assert error < (a - b).norm()
    for other in range(20):  # a random direction away from q, in each plane
        away_P = 0.1 * torch.randn(4, generator=generator).double()
        away = torch.polar(torch.ones_like(away_P), away_P)
        assert error <= (a @ q @ plane_rotation(away) - b).norm() + 1e-12, other


def caches(*shape, seed=0):
    """Heads that share a part: (…, M, N, E)."""
    generator = torch.Generator().manual_seed(seed)
    heads = torch.randn(*shape, generator=generator)
    shared = torch.randn(*shape[:-3], 1, *shape[-2:], generator=generator)
    return (heads + shared).double()


def gram_of(x_GMNE, rope):
    if not rope:
        return torch.einsum("gine,gjnf->gijef", x_GMNE, x_GMNE)
    z = torch.complex(*x_GMNE.chunk(2, dim=-1))
    return torch.einsum("ginp,gjnp->gpij", z, z.conj())


def matrices(maps, rope):
    """Maps (G, M, E, E), those of keys from the phases (G, P, M) of planes."""
    if not rope:
        return maps
    return torch.stack([torch.stack([plane_rotation(c_P) for c_P in c_PM.T]) for c_PM in maps])


@pytest.mark.parametrize("rope", [False, True])
def test_generalized_procrustes(rope):
    x_GMNE = caches(3, 5, 60, 8)
    maps, history = m.generalized_procrustes(gram_of(x_GMNE, rope), rope=rope)
    q, history = matrices(maps, rope), history.sum(-1) if rope else history
    torch.testing.assert_close(q.mT @ q, torch.eye(8).double().expand(3, 5, 8, 8))
    torch.testing.assert_close(q[:, 0], torch.eye(8).double().expand(3, 8, 8))
    assert (history.diff(dim=0) >= 0).all() and len(history) > 2
    y = x_GMNE @ q  # the objective in Gram space is that of the caches
    pairs, plain = (sum((x[:, i] * x[:, j]).sum((1, 2))
                        for i, j in itertools.combinations(range(5), 2)) for x in (y, x_GMNE))
    torch.testing.assert_close(history[-1], pairs)
    assert (pairs > plain).all()
    solve = m.rope_procrustes if rope else m.procrustes
    for i, g in itertools.product(range(5), range(3)):  # each stands best against the others' sum
        others = y[g].sum(0) - y[g, i]
        best = (y[g, i] @ solve(y[g, i], others) * others).sum()
        assert best <= (y[g, i] * others).sum() * (1 + 1e-6)


@pytest.mark.parametrize("rope", [False, True])
def test_generalized_procrustes_undoes_known_maps(rope):
    shared = caches(2, 1, 60, 8).expand(2, 4, 60, 8)
    q = matrices(phases(2, 4, 4), rope) if rope else orthogonal(2, 4, 8)
    assert rope or {round(d.item()) for d in torch.linalg.det(q).flatten()} == {-1, 1}
    x = shared @ q
    maps, history = m.generalized_procrustes(gram_of(x, rope), rope=rope)
    y = x @ matrices(maps, rope)
    torch.testing.assert_close(y, y[:, :1].expand_as(y))
    assert len(history) <= 2  # the pairwise start is already there
    assert len(m.generalized_procrustes(gram_of(caches(4, 2, 50, 6), rope), rope)[1]) == 1  # a pair


def test_shared_keys_by_hand():
    """The best shared key loses the smaller singular values, in closed form."""
    generator = torch.Generator().manual_seed(0)
    z_NM = torch.randn(500, 2, generator=generator, dtype=torch.complex128)
    z_NM[:, 1] = (2 - 1j) * z_NM[:, 0] + 0.3 * z_NM[:, 1]
    power = torch.tensor([3.0, 0.5]).double()
    maps_MP, inverses_MP, kept = m.shared_keys((z_NM.T @ z_NM.conj())[None], power[:, None])
    shared_N = (maps_MP[:, 0] * z_NM).mean(1)
    found = (power * (z_NM - shared_N[:, None] * inverses_MP[:, 0]).abs().square().sum(0)).sum()
    energies = torch.linalg.svdvals(power.sqrt() * z_NM).square()  # Eckart and Young 1936
    assert found == pytest.approx(energies[1].item(), rel=1e-6)
    assert kept == pytest.approx((energies[0] / energies.sum()).item())
    assert torch.allclose(shared_N.abs().square().mean(), z_NM.abs().square().mean())


def test_a_head_without_keys_may_come_first():
    """Of keys that are multiples of one another, zero among them, nothing is lost."""
    s_N = torch.randn(99, generator=torch.Generator().manual_seed(0), dtype=torch.complex128)
    z_NM = s_N[:, None] * torch.tensor([0, 1, 1j, -1])
    gram_PMM, power_MP = (z_NM.T @ z_NM.conj())[None], torch.ones(4, 1).double()
    maps_MP, inverses_MP, kept = m.shared_keys(gram_PMM, power_MP)
    shared_N = (maps_MP[:, 0] * z_NM).mean(1)
    assert torch.allclose(shared_N[:, None] * inverses_MP[:, 0], z_NM) and kept == pytest.approx(1)


def test_shared_values_by_hand():
    """The best shared value loses the smaller singular values, in closed form."""
    generator = torch.Generator().manual_seed(0)
    v_NME = torch.randn(500, 3, 4, generator=generator).double()
    v_NME[:, 1] = v_NME[:, 0] @ torch.randn(4, 4, generator=generator).double() + 0.1 * v_NME[:, 1]
    s_MEE = torch.randn(3, 4, 4, generator=generator).double()
    s_MEE = s_MEE @ s_MEE.mT
    maps, inverses, kept = m.shared_values(torch.einsum("nie,njf->ijef", v_NME, v_NME), s_MEE)
    shared_NE = torch.einsum("mef,nme->nmf", maps, v_NME).mean(1)
    errors = v_NME - torch.einsum("mfe,nf->nme", inverses, shared_NE)
    found = torch.einsum("mef,nmf->nme", s_MEE, errors).square().sum()
    energies = torch.linalg.svdvals(torch.einsum("mef,nmf->nme", s_MEE, v_NME).flatten(1)).square()
    assert found == pytest.approx(energies[4:].sum().item(), rel=1e-6)
    assert kept == pytest.approx((energies[:4].sum() / energies.sum()).item())
    assert torch.allclose(shared_NE.square().mean(), v_NME.square().mean())


# ---- 4 grouping ----------------------------------------------------------------------------------


@pytest.mark.parametrize("rope", [False, True])
@pytest.mark.parametrize("metric", ["cos", "dist"])
def test_head_similarity_equals_alignment_of_the_caches(rope, metric):
    x_KNE = caches(5, 60, 8)
    if metric == "cos":
        x_KNE = x_KNE / x_KNE.norm(dim=-1, keepdim=True)
    s = m.head_similarity(gram_of(x_KNE[None], rope)[0], 60, metric, rope=rope)
    for i, j in itertools.product(range(5), range(5)):
        turned = x_KNE[j] @ (m.rope_procrustes if rope else m.procrustes)(x_KNE[j], x_KNE[i])
        if metric == "cos":
            wanted = (x_KNE[i] * turned).sum(1).mean()
        else:
            wanted = -(x_KNE[i] - turned).square().sum(1).mean()
        torch.testing.assert_close(s[i, j], wanted)


def test_discarded_energy_of_pairs_is_what_sharing_loses():
    generator = torch.Generator().manual_seed(0)
    z_PKN = torch.randn(3, 4, 99, generator=generator, dtype=torch.complex128)
    v_NKE = torch.randn(99, 4, 6, generator=generator).double()
    power_KP, s_KEE = torch.rand(4, 3, generator=generator).double(), orthogonal(4, 6)
    s_KEE = s_KEE @ torch.diag(torch.arange(1.0, 7)).double() @ s_KEE.mT
    statistics = m.BlockStatistics(z_PKN @ z_PKN.mH, m.value_gram(v_NKE), power_KP, s_KEE, 99)
    lost, as_they_are, energy = torch.zeros(3, 2, 4, 4).double()
    for i, j in itertools.combinations(range(4), 2):
        for p in range(3):
            z_2N = power_KP[[i, j], p, None].sqrt() * z_PKN[p, [i, j]]
            lost[0, i, j] += torch.linalg.svdvals(z_2N)[1].square()
            energy[0, i, j] += z_2N.abs().square().sum()
        stacked = torch.cat([v_NKE[:, i] @ s_KEE[i], v_NKE[:, j] @ s_KEE[j]], 1)
        lost[1, i, j] = torch.linalg.svdvals(stacked)[6:].square().sum()
        energy[1, i, j] = stacked.square().sum()
        for n in (i, j):
            z_PN = z_PKN[:, n] - z_PKN[:, [i, j]].mean(1)
            as_they_are[0, i, j] += (power_KP[n, :, None] * z_PN.abs().square()).sum()
            v_NE = (v_NKE[:, n] - v_NKE[:, [i, j]].mean(1)) @ s_KEE[n]
            as_they_are[1, i, j] += v_NE.square().sum()
    wanted, (loss_KK, kept_2KK) = sum(x / x.sum() * 6 for x in lost), m.discarded_energy(statistics)
    torch.testing.assert_close(loss_KK, wanted + wanted.T)
    for way, kept_KK in zip((as_they_are, lost), kept_2KK, strict=True):
        share = sum(x / (y.sum() / 6) for x, y in zip(way, energy, strict=True)) / 2
        torch.testing.assert_close(kept_KK.triu(1), (1 - share).triu(1))
        assert torch.equal(kept_KK, kept_KK.T)
    statistics.key_PKK[:] = 1  # all keys the same: rounding is no loss
    by_value = lost[1] / lost[1].sum() * 6
    torch.testing.assert_close(m.discarded_energy(statistics)[0], by_value + by_value.T,
                               atol=1e-3, rtol=0)


def all_groupings(heads, size):
    if not heads:
        yield []
        return
    for rest in itertools.combinations(heads[1:], size - 1):
        left = [h for h in heads[1:] if h not in rest]
        for groups in all_groupings(left, size):
            yield [[heads[0], *rest], *groups]


def test_four_heads_in_two_groups():
    s = torch.tensor([[0, 1, 9, 1], [1, 0, 1, 8], [9, 1, 0, 1], [1, 8, 1, 0.0]])
    assert m.anneal_groups(s, 2) == [[0, 2], [1, 3]]
    assert m.anneal_groups(s, 1) == [[0, 1, 2, 3]]
    assert m.anneal_groups(s, 4) == [[0], [1], [2], [3]]


@pytest.mark.parametrize("k, n_groups", [(4, 2), (6, 3), (6, 2), (8, 4), (8, 2)])
def test_grouping_finds_the_optimum_of_brute_force(k, n_groups):
    def score(groups):
        return sum(s[i, j] for group in groups for i, j in itertools.combinations(group, 2))

    for seed in range(2):
        s = np.random.default_rng(seed).normal(size=(k, k))
        s += s.T
        groups = m.anneal_groups(s, n_groups, seed=seed)
        assert score(groups) == pytest.approx(
            max(map(score, all_groupings(list(range(k)), k // n_groups))))
        cold = m.anneal_groups(s, n_groups, seed=seed, temperature=0)  # the paper's rule
        for found in (groups, cold):
            assert sorted(sum(found, [])) == list(range(k))
    assert groups == m.anneal_groups(s, n_groups, seed=seed)


# What is refused, of sections 3, 4, 6 and 7: {message: call}.
BAD_VALUES = {
    r"of one shape, found \[2, 2\] and \[3, 2\]":
        lambda: m.procrustes(torch.ones(2, 2), torch.ones(3, 2)),
    r"of one shape, found \[2\] and": lambda: m.rope_procrustes(torch.ones(2), torch.ones(2, 2)),
    "E is 3, but RoPE": lambda: m.rope_procrustes(torch.ones(4, 3), torch.ones(4, 3)),
    "expected a Gram": lambda: m.generalized_procrustes(torch.ones(2, 3, 4)),
    "metric 'l2': expected cos or dist":
        lambda: m.head_similarity(torch.ones(1, 1, 2, 2), 9, "l2"),
    "6 heads cannot be split into 4 equal groups": lambda: m.anneal_groups(np.zeros((6, 6)), 4),
    r"square matrix .* found \[\[0.0, 0.0, 0.0\]": lambda: m.anneal_groups(np.zeros((2, 3)), 1),
    "finite similarities, found .*nan": lambda: m.anneal_groups(np.full((4, 4), np.nan), 2),
    "top_k 1: expected 2 to": lambda: m.bild_loss(torch.ones(1, 9), torch.ones(1, 9), top_k=1),
    "top_k 10: .* 9": lambda: m.bild_loss(torch.ones(1, 9), torch.ones(1, 9), top_k=10),
    "align 'lineer': expected linear, rotation, none": lambda: m.Method(align="lineer"),
    "group 'dist': expected energy, value, key, adjacent": lambda: m.Method(group="dist"),
    "metric 'value': expected dist, cos": lambda: m.Method(metric="value"),
    "metric cos: linear alignment and groups by energy": lambda: m.Method(metric="cos"),
    "metric cos: .* need dist": lambda: m.Method(align="rotation", group="energy", metric="cos"),
    "seed 4294967296: expected 0 to 4294967295": lambda: m.Method(seed=2**32),
    "sequence length 513: expected 2 to 512": lambda: m.row_length(config_of(), 513),
    "3 KV heads: the source has 4, choose one of 1, 2": lambda: m.gqa_config(config_of(), 3),
    "0 KV heads: the source has 4": lambda: m.gqa_config(config_of(), 0),
    "8 KV heads: the source has 4": lambda: m.gqa_config(config_of(), 8),
    "1 KV heads: the source has 1, .* nothing to merge":
        lambda: m.gqa_config(config_of(num_key_value_heads=1), 1),
}


@pytest.mark.parametrize("message", BAD_VALUES)
def test_values_that_are_refused(message):
    with pytest.raises(ValueError, match=message):
        BAD_VALUES[message]()


# ---- 5 map and merge -----------------------------------------------------------------------------


def exact_maps(key_KP, value_KEE):
    """With the inverses that leave the model unchanged."""
    return m.HeadMaps(key_KP, value_KEE, 1 / key_KP, torch.linalg.inv(value_KEE))


def scrambled(config, weights, seed=0, linear=False):
    """The same model with its units shuffled and every one mapped by random free maps.

    linear: not only rotated, but values mapped by any matrices, planes of keys scaled, too. Normed
    keys are only turned, or their sign changed, as far as the norm's weights allow.
    """
    k, e = config.num_key_value_heads, config.head_dim
    out = m.non_block_weights(weights)
    for i in range(config.num_hidden_layers):
        generator = torch.Generator().manual_seed(seed + i)
        order = torch.randperm(k, generator=generator).tolist()
        values, keys = orthogonal(k, e, seed=seed + i), phases(k, e // 2, seed=seed + i)
        if linear:
            stretch_KE = 4 ** (2 * torch.rand(k, e, generator=generator).double() - 1)
            size_KP = 4 ** (2 * torch.rand(k, e // 2, generator=generator).double() - 1)
            values = values @ (stretch_KE[..., None] * orthogonal(k, e, seed=-1))
            keys = keys if config.qk_norm else size_KP * keys
        block = m.block_weights(weights, i)
        if config.qk_norm:
            norms = [block[f"self_attn.{n}_norm.weight"].view(2, -1) for n in "qk"]
            free_plane_P = (norms[0][0] == norms[0][1]) & (norms[1][0] == norms[1][1])
            keys = torch.where(free_plane_P, keys, keys.real.sign())
        block = m.transform(block, config, order, exact_maps(keys, values))
        dtype = weights["model.norm.weight"].dtype
        out |= {m.block_prefix(i) + n: w.to(dtype) for n, w in block.items()}
    return out


@pytest.mark.parametrize("linear", [False, True])
@every_config
def test_transformed_models_are_the_same_model(name, linear):
    config = config_of(name)
    weights = random_weights(config, dtype=torch.float64)
    tokens = random_tokens(config, time=200)
    turned = scrambled(config, weights, linear=linear)
    changed = [n for n in weights if not torch.equal(weights[n], turned[n])]
    assert {n.split(".")[-2] for n in changed} == {"q_proj", "k_proj", "v_proj", "o_proj"}
    difference = logits_of(config, weights, tokens) - logits_of(config, turned, tokens)
    assert difference.abs().max() <= 1e-9


@pytest.mark.parametrize("align", ["linear", "rotation"])
def test_normed_keys_agree_as_far_as_the_norm_lets_them(align):
    """Turned copies are turned back, and in planes that may not turn the best sign is found; heads
    that were longer before the norm count no more than others."""
    config = config_of("qwen3", rms_norm_eps=1e-12, num_hidden_layers=1)
    weights = random_weights(config, dtype=torch.float64)
    k, e, name = 4, config.head_dim, "self_attn.k_proj.weight"
    block = m.block_weights(weights, 0)
    block[name] = block[name][:e].repeat(k, 1)
    keys = phases(k, e // 2)
    keys = torch.where(torch.arange(e // 2) % 2 == 0, keys, keys.real.sign())
    keys = keys * torch.tensor([1.0, 3.0, 0.2, 1.0])[:, None]
    maps = exact_maps(keys, torch.eye(e).double().expand(k, e, e))
    block = m.transform(block, config, [2, 0, 3, 1], maps)
    weights |= {m.block_prefix(0) + n: w for n, w in block.items()}
    found, = m.converted_blocks(config, weights, random_tokens(config, 4, 50), 1,
                                m.Method(align=align, refit=False))
    heads = found.aligned[name].view(k, e, -1)
    torch.testing.assert_close(heads, found.converted[name].expand(k, e, -1).to(heads),
                               atol=1e-5, rtol=1e-5)  # hidden states are in float32


def test_merge_averages_neighbours_by_hand():
    config = config_of("qwen2")
    block = m.block_weights(random_weights(config), 0)
    merged = m.merge(block, config, 2)
    for name in (f"self_attn.{part}_proj.{kind}" for part in "kv" for kind in ("weight", "bias")):
        heads = block[name].double().unflatten(0, (4, 12))
        wanted = torch.cat([(heads[0] + heads[1]) / 2, (heads[2] + heads[3]) / 2])
        torch.testing.assert_close(merged[name], wanted)
    assert all(merged[n] is block[n] for n in block if "k_proj" not in n and "v_proj" not in n)


# ---- 6 masks and losses --------------------------------------------------------------------------


@pytest.mark.parametrize("log_alpha", [-3.0, 0.0, 1.5])
def test_hard_concrete_follows_its_distribution(log_alpha):
    n = 200_000
    z = m.hard_concrete(torch.full((n,), log_alpha), torch.Generator().manual_seed(0)).double()
    beta, gamma, zeta = 2 / 3, -0.1, 1.1

    def cdf(x):  # P(z <= x), Louizos et al. 2017, eq. 8 stretched
        s = (x - gamma) / (zeta - gamma)
        return 1 / (1 + np.exp(-((np.log(s) - np.log1p(-s)) * beta - log_alpha)))

    margin = 4 * 0.5 / n**0.5
    assert abs((z == 0).double().mean() - cdf(0)) < margin
    assert abs((z == 1).double().mean() - (1 - cdf(1))) < margin
    opened = m.open_probability(torch.tensor(log_alpha, dtype=torch.float64))
    assert opened.item() == pytest.approx(1 - cdf(0))
    inside = z[(z > 0) & (z < 1)].numpy()
    law = scipy.stats.kstest(inside[:5000], lambda x: (cdf(x) - cdf(0)) / (cdf(1) - cdf(0)))
    assert law.pvalue > 1e-3


def test_deterministic_masks_and_their_loss_by_hand():
    z = m.hard_concrete(torch.tensor([-20.0, 0.0, 1.0, 20.0]))
    stretched = 1.2 / (1 + math.exp(-1)) - 0.1
    torch.testing.assert_close(z, torch.tensor([0.0, 0.5, stretched, 1.0]))
    log_alpha = torch.tensor([[0.0, 2.0], [-1.0, 5.0]], dtype=torch.float64)
    shift = 2 / 3 * np.log(0.1 / 1.1)
    s = np.mean([1 / (1 + np.exp(-(a - shift))) for a in (0, 2, -1, 5)])
    for target in (0.0, 0.5, 1.0):
        assert m.l0_loss(log_alpha, target).item() == pytest.approx(
            abs(s - target) + (s - target) ** 2)


def test_masks_repeat_with_the_generator_and_pass_gradients():
    log_alpha = torch.linspace(-1, 1, 7, dtype=torch.float64, requires_grad=True)

    def draw(x):
        return m.hard_concrete(x, torch.Generator().manual_seed(5))

    assert torch.equal(draw(log_alpha), draw(log_alpha))
    for function in (draw, m.open_probability, lambda x: m.l0_loss(x, 0.3)):
        assert torch.autograd.gradcheck(function, log_alpha)


def logit_pair(*shape):
    generator = torch.Generator().manual_seed(0)
    return 3 * torch.randn(2, *shape, generator=generator).double()


def test_kl_loss_equals_scipy():
    student, teacher = logit_pair(4, 5, 30)
    for temperature in (1.0, 2.5):
        p, q = (scipy.special.softmax(x.numpy() / temperature, -1) for x in (teacher, student))
        found = m.kl_loss(student, teacher, temperature)
        assert found.shape == (4, 5)
        np.testing.assert_allclose(found, scipy.stats.entropy(p, q, axis=-1))
    assert m.kl_loss(teacher, teacher).abs().max() < 1e-12
    half = student.bfloat16(), teacher.bfloat16()
    for loss in (m.kl_loss, m.bild_loss):  # computed in float32, whatever comes in
        torch.testing.assert_close(loss(*half, temperature=3.0),
                                   loss(*(x.float() for x in half), temperature=3.0))


def test_bild_loss_equals_its_definition():
    student, teacher = logit_pair(6, 40)
    wanted = []
    for s, t in zip(student.tolist(), teacher.tolist(), strict=True):
        total = 0
        for leader in (t, s):
            ids = sorted(range(40), key=lambda i: -leader[i])[:5]
            pairs = list(itertools.combinations(ids, 2))
            p, q = (scipy.special.softmax([(x[i] - x[j]) / 3 for i, j in pairs]) for x in (t, s))
            total += scipy.stats.entropy(p, q)
        wanted.append(total)
    np.testing.assert_allclose(m.bild_loss(student, teacher, top_k=5), wanted)
    torch.testing.assert_close(m.bild_loss(student + 7, teacher), m.bild_loss(student, teacher))


def test_losses_have_the_gradients_of_finite_differences():
    student, teacher = logit_pair(3, 12)
    student.requires_grad_(True)
    assert torch.autograd.gradcheck(lambda x: m.kl_loss(x, teacher, 2.0), student)
    assert torch.autograd.gradcheck(lambda x: m.bild_loss(x, teacher, top_k=4), student)


# ---- 7 the walk and the refit --------------------------------------------------------------------


def test_a_method_fills_in_its_defaults():
    found = [m.Method(align=align) for align in ("linear", "rotation", "none")]
    assert [(f.refit, f.joint, f.group) for f in found] == [
        (True, True, "energy"), (False, False, "value"), (False, False, "adjacent")]
    assert m.Method(align="rotation", refit=True, group="key").joint is True


ZERO = {
    "queries": {"q_proj.weight": slice(None)}, "keys": {"k_proj.weight": slice(None)},
    "values": {"v_proj.weight": slice(None)}, "outputs": {"o_proj.weight": slice(None)},
    "two heads": {f"{part}_proj.weight": slice(0, 24) for part in "qkv"},
    "a plane": {f"{part}_proj.weight": slice(3, None, 6) for part in "qk"},
}


@pytest.mark.parametrize("what", ZERO)
def test_heads_of_zeros_are_no_trouble_to_linear_alignment(what):
    """Blocks that were added as zeros, or pruned: finite, well scaled, and the rest as it was."""
    config = config_of(num_hidden_layers=1)
    weights = random_weights(config)
    for name, rows in ZERO[what].items():
        weights[f"model.layers.0.self_attn.{name}"][rows] = 0
    tokens_BT, source = random_tokens(config, 4, 64), m.block_weights(weights, 0)
    block, = m.converted_blocks(config, weights, tokens_BT, 2, m.Method(refit=False))
    for name, weight in block.converted.items():
        assert weight.abs().max() <= 4 * source[name].abs().max(), name
    kept = block.report["energy_kept"]
    assert all(0 <= share <= 1 + 1e-9 for share in kept.values())
    assert what not in ("keys", "values") or kept[what[:-1]] == pytest.approx(1)


@pytest.mark.parametrize("align", ["linear", "rotation"])
@pytest.mark.parametrize("norm, rows", [(1, 1), (1, 400), (0, 1)])
def test_what_the_text_does_not_show_of_equal_heads_stays_equal(align, norm, rows):
    """Maps that the calibration does not determine, of twelve tokens, are no arbitrary ones."""
    config = config_of(head_dim=24, num_hidden_layers=2)
    weights = random_weights(config)
    weights["model.layers.0.input_layernorm.weight"] *= norm
    for name, w in weights.items():
        if "k_proj" in name or "v_proj" in name:
            w.view(4, 24, 48)[1:] = w.view(4, 24, 48)[:1]
    new_config, out, _ = m.convert_weights(config, weights, torch.arange(12).repeat(rows, 1), 2,
                                           m.Method(align=align, refit=False))
    found, wanted = (logits_of(of, w, random_tokens(config))
                     for of, w in ((new_config, out), (config, weights)))
    # Their own rounding is 40 of float32's epsilons, and so is that of the weights.
    assert (found - wanted).abs().max() <= 200 * 1.2e-7 * wanted.abs().max()


@pytest.mark.parametrize("metric", ["dist", "cos"])
@pytest.mark.parametrize("group, solve", [("key", m.rope_procrustes), ("value", m.procrustes)])
def test_pairs_in_the_report_are_those_of_the_caches(trained, corpus, group, solve, metric):
    """Before: of the source's heads. After: each turned onto the other one."""
    config, weights = m.load_checkpoint(trained / "mha")
    rows_BT, block = m.text_rows(trained / "mha", config, corpus)[0], m.block_weights(weights, 0)
    x_BTD = m.embed(weights, rows_BT, "cpu")
    normed = m._rms_norm(x_BTD, block["input_layernorm.weight"], 1e-5).flatten(0, 1)
    heads_NKE = F.linear(normed, block[f"self_attn.{group[0]}_proj.weight"]).unflatten(1, (8, 16))
    if metric == "cos":
        heads_NKE = heads_NKE / heads_NKE.norm(dim=-1, keepdim=True)
    method = m.Method(align="rotation", group=group, metric=metric)
    found = next(m.converted_blocks(config, weights, rows_BT, 2, method)).report["pairs"]
    for i, j in itertools.combinations(range(8), 2):
        a, b = heads_NKE[:, i], heads_NKE[:, j]
        for when, c in (("before", b), ("after", b @ solve(b, a))):
            wanted = (a * c).sum(1).mean() if metric == "cos" else -(a - c).square().sum(1).mean()
            assert found[when][i][j] == pytest.approx(wanted.item(), rel=0.01, abs=1e-3)


def block_of(config, weights, x_BTD):
    """What our block of these weights makes of the hidden states, rows in turn."""
    x_BTD = x_BTD.clone()
    m._run_block_(config, weights, x_BTD, "block")
    return x_BTD


def error_of(y_BTD, wanted_BTD):
    error = (y_BTD - wanted_BTD).square().sum(-1) / wanted_BTD.square().sum(-1)
    return error.log1p().mean().item()


@pytest.mark.slow
@pytest.mark.parametrize("dtype, longest", [(torch.bfloat16, 1), (torch.float32, 1000)])
def test_refit_brings_a_block_back(dtype, longest):
    """On rows that it has not seen, whether or not the first token of each is much longer."""
    config = config_of("biases")
    right = m.block_weights(random_weights(config), 0)
    generator = torch.Generator().manual_seed(0)
    noisy = {name: w if name.startswith("mlp") else
             w + 0.3 * w.std(correction=0) * torch.randn(w.shape, generator=generator)
             for name, w in right.items()}
    kept = {name: w.clone() for name, w in noisy.items()}
    x_BTD = torch.randn(850, 40, config.hidden_size, generator=generator)
    x_BTD[:, 0] *= longest
    wanted_BTD = block_of(config, right, x_BTD)
    # What no weights can make, on the long tokens alone: it must not steer the rest.
    wanted_BTD[:, 0] += (longest > 1) * longest * torch.randn(850, config.hidden_size,
                                                              generator=generator)
    x, wanted, fresh = x_BTD[:800].to(dtype), wanted_BTD[:800].to(dtype), slice(800, None)
    found, error = m.refit_block(config, noisy, x, wanted, seed=0)
    assert same_weights(noisy, kept) and found.keys() == right.keys()
    assert all(torch.equal(found[name], w) == name.startswith("mlp") for name, w in noisy.items())
    first = block_of(config, noisy, x[:20].float())
    assert error["before"] == pytest.approx(error_of(first, wanted[:20].float()), rel=1e-4)
    before, after = ((block_of(config, w, x_BTD[fresh]) - wanted_BTD[fresh])[:, 1:].square().sum()
                     for w in (noisy, found))
    assert after < 0.3 * before
    assert same_weights(found, m.refit_block(config, noisy, x, wanted, seed=0)[0])


@pytest.mark.slow
def test_refit_lets_a_block_stay():
    """One that is right on the held-out rows, whatever the others say; one of zeros."""
    config = config_of()
    right = m.block_weights(random_weights(config), 0)
    x = torch.randn(80, 40, config.hidden_size, generator=torch.Generator().manual_seed(0))
    made = block_of(config, right, x)
    for wanted in (made, torch.cat([made[:8], made[8:].flip(0)])):
        stays, error = m.refit_block(config, right, x, wanted, seed=0)
        assert same_weights(stays, right) and error["before"] == error["after"] < 1e-9
    nothing, error = m.refit_block(config, {n: 0 * w for n, w in right.items()}, x, x, seed=0)
    assert error == {"before": 0, "after": 0} and not any(w.any() for w in nothing.values())


def test_muon_is_torch_s_of_each_head_by_itself():
    """In three steps; torch's makes its rounds in bf16."""
    config, generator = config_of("gqa", head_dim=20), torch.Generator().manual_seed(0)
    weights = {n: w for n, w in m.block_weights(random_weights(config), 0).items() if "attn" in n}
    found = {n: w.clone().requires_grad_() for n, w in weights.items()}
    axis = {n: int("o_proj" in n) for n in weights}
    heads = {n: [nn.Parameter(h.clone()) for h in w.split(20, axis[n])] for n, w in weights.items()}
    torch_s = {n: torch.optim.Muon(heads[n], momentum=0.85, weight_decay=0,
                                   adjust_lr_fn="match_rms_adamw") for n in weights}
    step = m._muon(found, 20, 0.1)
    for factor in (0.0, 1.0, 0.5):
        for name, w in found.items():
            w.grad = torch.randn(w.shape, generator=generator)
            for head, grad in zip(heads[name], w.grad.split(20, axis[name]), strict=True):
                head.grad = grad.contiguous()
            rate = 0.1 * weights[name].square().mean().sqrt().item()
            # torch's rate is 0.2 √max(E, D) times what it is given.
            torch_s[name].param_groups[0]["lr"] = factor * rate / 0.2
            torch_s[name].step()
        step(factor)
    for name, w in weights.items():
        wanted = torch.cat([h.detach() for h in heads[name]], axis[name]) - w
        assert (found[name].detach() - w - wanted).norm() < 0.03 * wanted.norm(), name


@pytest.mark.slow
def test_errors_in_the_report_are_those_of_the_written_model(trained, corpus, converted):
    """On the held-out rows: of each block's hidden states, and the predictions' KL."""
    folder, report = converted("mha", 2)
    (config, source), (new_config, out) = map(m.load_checkpoint, (trained / "mha", folder))
    _, rows = m.text_rows(trained / "mha", config, corpus)
    x = m.embed(source, rows, "cpu")
    converted_x = x.clone()
    for i, layer in enumerate(report["layers"]):
        x = block_of(config, m.block_weights(source, i), x)
        converted_x = block_of(new_config, m.block_weights(out, i), converted_x)
        assert layer["hidden_state_error"] == pytest.approx(error_of(converted_x, x), rel=1e-3)
        assert layer["refit"]["after"] < layer["refit"]["before"]
    log_p, log_q = (logits_of(c, w, rows)[:, :-1].log_softmax(-1)
                    for c, w in ((config, source), (new_config, out)))
    kl = F.kl_div(log_q, log_p, reduction="sum", log_target=True) / log_p[..., 0].numel()
    assert report["scores"]["converted"]["kl"] == pytest.approx(kl.item(), rel=1e-3)
    assert abs(report["scores"]["source"]["kl"]) < 1e-6


@pytest.mark.slow
def test_joint_refit_trains_attention_and_norms_of_all_blocks(trained, corpus, converted):
    """From any start; the KL that it is measured by falls, and what it says of it holds."""
    out, report = converted("mha", 2, align="rotation", joint=True)
    other, alone = converted("mha", 2, align="rotation")
    kl = [r["scores"]["converted"]["kl"] for r in (report, alone)]
    assert kl[0] < 0.6 * kl[1] and "joint_kl" not in alone
    assert report["joint_kl"]["after"] < 0.6 * report["joint_kl"]["before"]
    source, joint = m.load_checkpoint(trained / "mha"), m.load_checkpoint(out)
    rows, _ = m.text_rows(trained / "mha", source[0], corpus)
    judges = rows[: math.ceil(len(rows) / 40)]
    found = m.kl_loss(logits_of(*joint, judges), logits_of(*source, judges)).mean().item()
    assert report["joint_kl"]["after"] == pytest.approx(found, rel=1e-4)
    for name, w in m.load_checkpoint(other)[1].items():
        trainable = "self_attn" in name or "layernorm" in name
        assert torch.equal(joint[1][name], w) != trainable, name


def test_resampled_rows_are_half_the_text_and_half_the_source_s_predictions():
    """None of the rows that judge a refit: their copies would be trained on."""
    config = config_of(tie_word_embeddings=False)
    weights = random_weights(config)
    weights["lm_head.weight"] = 1000 * weights["lm_head.weight"]  # one token is certain
    tokens_BT = random_tokens(config, batch=10, time=48)
    (found, _), (again, _), (other, _) = (
        m.refit_rows(config, weights, tokens_BT, m.Method(seed=seed), None) for seed in (0, 0, 1))
    n_judges = math.ceil(8 * 10 / 40)  # of the rows and seven copies
    assert len(found) == 10 + 7 * (10 - n_judges) and torch.equal(found[:10], tokens_BT)
    assert torch.equal(found, again) and not torch.equal(found, other)
    predicted = torch.cat([tokens_BT[:, :1], logits_of(config, weights, tokens_BT).argmax(-1)], 1)
    text, drawn = (x[n_judges:].repeat(7, 1) for x in (tokens_BT, predicted[:, :-1]))
    assert ((found[10:] == text) | (found[10:] == drawn)).all()
    assert 0.4 < (found[10:] == text).float().mean() < 0.65


def test_copies_of_packed_rows_have_their_documents():
    """And what is drawn is predicted within each."""
    config = config_of(tie_word_embeddings=False)
    weights = random_weights(config)
    weights["lm_head.weight"] = 1e5 * weights["lm_head.weight"]  # one token is certain
    tokens_BT, document_BT = random_tokens(config, batch=6, time=40), torch.zeros(6, 40).long()
    document_BT[:, 25:] = 1 + torch.arange(6)[:, None]
    rows, document = m.refit_rows(config, weights, tokens_BT, m.Method(), None, document_BT)
    of_row = torch.cat([torch.arange(6), torch.arange(2, 6).repeat(7)])  # two rows judge a refit
    assert torch.equal(document, document_BT[of_row])
    predicted = logits_of(config, weights, tokens_BT, document_BT=document_BT).argmax(-1)[of_row]
    assert ((rows == tokens_BT[of_row]) | (rows == predicted.roll(1, 1)))[6:, 1:].all()
    assert torch.equal(rows[:, 25], tokens_BT[of_row, 25])  # a document's first token stays
    assert (rows != tokens_BT[of_row])[6:].any(0).sum() == 38


def test_resampled_tokens_follow_the_source_s_predictions():
    config = config_of(vocab_size=5)
    weights, tokens_BT = random_weights(config), torch.tensor([[1, 3]]).repeat(900, 1)
    rows = m.refit_rows(config, weights, tokens_BT, m.Method(), None)[0][900:]
    share = torch.bincount(rows[:, 1], minlength=5) / len(rows)
    predicted = logits_of(config, weights, tokens_BT[:1])[0, 0].softmax(-1)
    assert torch.allclose(share, (predicted + F.one_hot(torch.tensor(3), 5)) / 2, atol=0.04)


@pytest.mark.parametrize("length, cut", [(64, 64), (2048, 512), (1000, 500), (513, 256)])
def test_long_rows_are_cut_for_a_refit(length, cut):
    rows_BT = torch.arange(2 * length).view(2, length)
    found = m.calibration_rows(rows_BT, m.Method())
    assert found.shape[1] == cut and torch.equal(found[0], rows_BT[0, :cut])
    kept = len(found) // 2 * cut
    assert kept > length - 2 and torch.equal(found.flatten()[kept:], rows_BT[1, :kept])


# ---- 8 convert and evaluate ----------------------------------------------------------------------


README = (Path(__file__).parent / "README.md").read_text()


@pytest.mark.slow
@pytest.mark.parametrize("name", ["gqa", "mha"])  # with tied embeddings, without
def test_readme_converts_a_model_of_transformers_in_memory(trained, corpus, converted, name):
    """And it is the conversion of the files, to the last bit."""
    out, report = converted(name, 2)
    config, source = m.load_checkpoint(trained / name)
    code = README.split("## From Python")[1].split("```")[1].removeprefix("python")
    load, convert = code.replace("512", "64").replace("=8", "=2").replace("= 8", "= 2").split(
        "\nconfig =")
    names = {"MODEL": trained / name, "TEXT": "One and two. " * 100}
    exec(load, names)
    assert names["tokens_BT"].shape[1] == 64
    names["tokens_BT"], held_out_BT = m.text_rows(trained / name, config, corpus)
    exec(f"config ={convert}", names)
    made, written = names["gqa"].state_dict(), m.load_checkpoint(out)[1]
    assert names["new_config"] == m.load_config(out) and names["model"].num_parameters() > 0
    assert same_weights({n: w for n, w in made.items() if n in written}, written)
    given = names["model"].state_dict()
    assert same_weights({n: w for n, w in given.items() if n in source}, dict(source))
    assert names["report"]["joint_kl"] == report["joint_kl"]
    with torch.no_grad():
        logits = names["gqa"](held_out_BT).logits
    loss = F.cross_entropy(logits[:, :-1].flatten(0, 1), held_out_BT[:, 1:].flatten()).item()
    assert loss == pytest.approx(losses(report)["converted"], rel=1e-5)


@pytest.mark.parametrize("options, said", [
    ({}, "the default"), ({"joint": False}, "`--no-joint`"), ({"refit": False}, "`--no-refit`"),
    ({"align": "rotation"}, "`--align rotation`, the paper's way, to compare")])
def test_the_plan_s_memory_is_readme_s(caplog, monkeypatch, options, said):
    """Of Llama-2-7B's shape with 262,144 tokens, a tenth held out."""
    config = m.LlamaConfig(32000, 4096, 11008, 32, 32)
    report = {"kv_heads": {"source": 32, "converted": 8}, "method": options,
              "tokens": {"calibration": 236_032, "calibration_seq_len": 512, "held_out": 26_112,
                         "seq_len": 2048}}
    monkeypatch.setattr(os, "sysconf", lambda name: 10**9)
    with caplog.at_level("INFO", "mha2gqa"):
        m._say_plan(report, config, m.Method(**options), torch.device("cpu"))
    found = float(re.search(r"about (.*) GB", caplog.text)[1])
    assert f"\n| {said} | " in README and f"| {round(found)} GB |\n" in README.split(said)[1][:40]


def test_what_cannot_be_converted_in_memory_is_said():
    config = config_of("tied")
    weights, tokens_BT = random_weights(config), random_tokens(config)
    for change, message in (
            ({"lm_head.weight": torch.zeros(120, 48)}, "but there is a head of its own"),
            ({"model.norm.weight": torch.ones(3)}, "size mismatch for model.norm.weight"),
            ({"model.norm.weight": torch.full((48,), math.nan)}, "norm.weight holds values"),
            ({"x": torch.ones(3)}, 'Unexpected key.*"x"')):
        with pytest.raises(ValueError, match=message):
            m.convert_weights(config, weights | change, tokens_BT, 2)
    for tokens, kv_heads, message in ((tokens_BT[:1], 2, "2 rows of 40 tokens"),
                                      (tokens_BT, 3, "3 KV heads: the source has 4")):
        with pytest.raises(ValueError, match=message):
            m.convert_weights(config, weights, tokens, kv_heads)


def test_without_memory_for_the_joint_refit_blocks_stay_refitted(monkeypatch):
    config = config_of()
    start = config, random_weights(config), random_tokens(config, batch=6), 2
    monkeypatch.setattr(m, "_copies", lambda *_: 0)
    _, alone, report = m.convert_weights(*start, m.Method(joint=False))
    assert "joint_kl" not in report
    no_memory = RuntimeError("[enforce fail at alloc_cpu.cpp:117] can't allocate memory")
    monkeypatch.setattr(m, "checkpoint", mock.Mock(side_effect=no_memory))
    with pytest.warns(UserWarning, match="no memory for the joint refit"):
        _, found, report = m.convert_weights(*start)
    assert same_weights(found, alone) and report["joint_kl"] is None
    monkeypatch.setattr(m, "checkpoint", mock.Mock(side_effect=RuntimeError("another")))
    with pytest.raises(RuntimeError, match="another"):
        m.convert_weights(*start)


@pytest.mark.slow
@pytest.mark.parametrize("group, metric", [
    ("value", "dist"), ("value", "cos"), ("key", "dist"), ("adjacent", "cos")])
def test_alignment_beats_mean_pooling(converted, group, metric):
    out, report = converted("mha", 2, align="rotation", group=group, metric=metric)
    loss = losses(report)
    assert loss["source"] < loss["converted"] < loss["mean_pooled"]
    assert json.loads((out / "mha2gqa.json").read_text()) == report


@pytest.mark.slow
def test_linear_alignment_and_refit_beat_rotation(trained, converted):
    folder, default = converted("mha", 2)
    assert default["method"] == dataclasses.asdict(m.Method())
    gap = {}
    for align, refit in itertools.product(("linear", "rotation"), (True, False)):
        method = {} if (align, refit) == ("linear", True) else {"align": align, "refit": refit}
        loss = losses(converted("mha", 2, **method)[1])
        gap[align, refit] = loss["converted"] - loss["source"]
    assert gap["linear", True] < min(gap["linear", False], gap["rotation", True])
    assert max(gap["linear", False], gap["rotation", True]) < gap["rotation", False]
    (_, source), (_, out) = (m.load_checkpoint(p) for p in (trained / "mha", folder))
    assert all(out[name].abs().max() < 10 * source[name].abs().max() for name in out)


@pytest.mark.slow
def test_the_report_can_be_checked(trained, corpus, converted):
    """Its losses are transformers' on the directories; sizes, config and files are as promised."""
    out, report = converted("mha", 2)
    loss = losses(report)
    assert report["kv_cache_bytes_per_token"] == {"source": 2 * 2 * 8 * 16 * 4,
                                                  "converted": 2 * 2 * 2 * 16 * 4}
    config, _ = m.load_checkpoint(trained / "mha")
    _, held_out = m.text_rows(trained / "mha", config, corpus)
    assert report["tokens"] == {"calibration": 281 * 64, "calibration_seq_len": 64,
                                "held_out": held_out.numel(), "seq_len": 64}
    for path, wanted in ((trained / "mha", loss["source"]), (out, loss["converted"])):
        with torch.no_grad():
            found = transformers_model(path)(held_out, labels=held_out).loss.item()
        assert found == pytest.approx(wanted, abs=1e-5)
        assert m.evaluate(path, corpus)["loss"] == pytest.approx(wanted, abs=1e-6)
    raw, new = (json.loads((p / "config.json").read_text()) for p in (trained / "mha", out))
    assert new == {**raw, "num_key_value_heads": 2}
    for layer in report["layers"]:
        assert sorted(sum(layer["groups"], [])) == list(range(8))
    assert (out / "tokenizer.json").read_bytes() == (trained / "mha/tokenizer.json").read_bytes()
    assert report["peak_memory_bytes"]["host_resident"] > 0


def test_without_alignment_it_is_mean_pooling_of_neighbours(trained, converted):
    out, report = converted("mha", 2, align="none")
    assert report["layers"][0]["groups"] == [[0, 1, 2, 3], [4, 5, 6, 7]]
    assert losses(report)["converted"] == losses(report)["mean_pooled"]
    (_, source), (_, pooled) = (m.load_checkpoint(p) for p in (trained / "mha", out))
    name = "model.layers.1.self_attn.k_proj.weight"
    wanted = source[name].view(2, 4, 16, 64).mean(1).flatten(0, 1)
    torch.testing.assert_close(pooled[name], wanted)
    others = {n: w for n, w in source.items() if ".k_proj." not in n and ".v_proj." not in n}
    assert same_weights(others, {n: pooled[n] for n in others})


@pytest.mark.slow
@pytest.mark.parametrize("source, kv_heads", [("mha", 2), ("gqa", 2), ("gqa", 1)])
def test_outputs_in_transformers_with_a_cache(converted, source, kv_heads):
    folder, _ = converted(source, kv_heads, **{"refit": False} if kv_heads == 1 else {})
    assert_transformers_computes_the_same(folder)
    config, weights = m.load_checkpoint(folder)
    assert config.num_key_value_heads == kv_heads
    prompt = random_tokens(config, batch=1, time=5)
    output = transformers_model(folder).generate(
        prompt, max_new_tokens=20, do_sample=False, eos_token_id=None)
    assert output.shape == (1, 25)
    logits = logits_of(config, weights, output)[0, 4:-1]  # all at once, without a cache
    chosen = logits.gather(-1, output[0, 5:, None])[:, 0]
    assert (logits.amax(-1) - chosen).max() <= 1e-5 * logits.abs().max()  # the best, or as good


def expand_to_mha(config, weights):
    """A GQA model with every KV head copied to each of its query heads: the same model as MHA."""
    copies, e = config.num_attention_heads // config.num_key_value_heads, config.head_dim
    weights = {n: w.unflatten(0, (-1, e)).repeat_interleave(copies, 0).flatten(0, 1)
               if "k_proj" in n or "v_proj" in n else w for n, w in weights.items()}
    raw = {**config.raw, "num_key_value_heads": config.num_attention_heads}
    return m.parse_config(raw), weights


@pytest.mark.parametrize("group", ["value", "key"])
@pytest.mark.parametrize("metric", ["dist", pytest.param("cos", marks=pytest.mark.slow)])
def test_the_exact_oracle(trained, corpus, tmp_path, group, metric):
    """Copied, shuffled and rotated heads are found again and undone: no loss at all."""
    config, weights = m.load_checkpoint(trained / "gqa")
    config, weights = expand_to_mha(config, weights)
    save_checkpoint(tmp_path / "mha", config, scrambled(config, weights), trained / "gqa")
    method = m.Method(align="rotation", group=group, metric=metric)
    loss = losses(m.convert(tmp_path / "mha", tmp_path / "out", 4, corpus, method))
    wanted = m.evaluate(trained / "gqa", corpus)["loss"]
    assert loss["source"] == pytest.approx(wanted, abs=1e-4)
    assert loss["converted"] == pytest.approx(wanted, abs=1e-4)
    assert loss["mean_pooled"] > wanted + 0.1


@pytest.mark.slow
@pytest.mark.parametrize("refit", [False, True])
def test_the_exact_oracle_of_linear_alignment(trained, corpus, tmp_path, refit):
    """Heads mapped by any matrices and scaled in every plane are found again; rotation cannot."""
    config, weights = m.load_checkpoint(trained / "gqa")
    config, weights = expand_to_mha(config, weights)
    hidden = scrambled(config, weights, linear=True)
    save_checkpoint(tmp_path / "mha", config, hidden, trained / "gqa")
    loss, rotated = (
        losses(m.convert(tmp_path / "mha", tmp_path / method.align, 4, corpus, method))
        for method in (m.Method(refit=refit), m.Method(align="rotation")))
    assert loss["converted"] == pytest.approx(loss["source"], abs=1e-4)
    assert rotated["converted"] > loss["source"] + 0.03


@pytest.mark.parametrize("kind", ["qwen2", "qwen3"])
@pytest.mark.parametrize("align", ["linear", "rotation"])
def test_the_exact_oracle_with_biases_and_normed_keys(trained, corpus, tmp_path, kind, align):
    """Biases are aligned and merged with their rows, normed keys as far as their norm lets them."""
    raw = {**json.loads((trained / "gqa/config.json").read_text()), "model_type": kind}
    config = m.parse_config(raw)
    weights = random_weights(config) | m.load_checkpoint(trained / "gqa")[1]  # biases, norms: new
    config, weights = expand_to_mha(config, weights)
    save_checkpoint(tmp_path / "mha", config, scrambled(config, weights), trained / "gqa")
    loss = losses(m.convert(tmp_path / "mha", tmp_path / "out", 4, corpus,
                            m.Method(align=align, refit=False)))
    assert loss["converted"] == pytest.approx(loss["source"], abs=1e-4) != loss["mean_pooled"]
    assert_transformers_computes_the_same(tmp_path / "out")


@pytest.mark.parametrize("dtype, refit", [
    (torch.float16, False), pytest.param(torch.bfloat16, True, marks=pytest.mark.slow)])
def test_the_dtype_and_the_ties_of_the_source_are_kept(
        trained, corpus, converted, tmp_path, dtype, refit):
    config, weights = m.load_checkpoint(trained / "gqa")
    narrow = {n: w.to(dtype) for n, w in weights.items()}
    save_checkpoint(tmp_path / "narrow", config, narrow, trained / "gqa")
    loss, full = (losses(report)["converted"] for report in (
        m.convert(tmp_path / "narrow", tmp_path / "out", 2, corpus, m.Method(refit=refit)),
        converted("gqa", 2, **{} if refit else {"refit": False})[1]))
    _, out = m.load_checkpoint(tmp_path / "out")
    assert {w.dtype for w in out.values()} == {dtype} and "lm_head.weight" not in out
    assert loss == pytest.approx(m.evaluate(tmp_path / "out", corpus)["loss"], abs=1e-6)
    assert loss == pytest.approx(full, abs=0.03)
    assert torch.equal(out["model.embed_tokens.weight"], narrow["model.embed_tokens.weight"])


def test_products_in_bf16_convert_as_well(converted, trained, corpus, tmp_path, monkeypatch):
    """As a GPU makes them: what a conversion costs stays the same to 2 %."""
    full = losses(converted("mha", 2, refit=False)[1])
    monkeypatch.setattr(m, "_autocast", lambda *_, **__: torch.autocast("cpu", torch.bfloat16))
    loss = losses(m.convert(trained / "mha", tmp_path / "out", 2, corpus, m.Method(refit=False)))
    assert loss["converted"] != full["converted"]
    assert loss["converted"] - loss["source"] == pytest.approx(
        full["converted"] - full["source"], rel=0.02)


@pytest.mark.slow
@pytest.mark.parametrize("steps", ["--no-refit --joint", "--refit --no-joint"])
def test_memory_does_not_grow_with_the_layers(tmp_path, bpe, topics, steps):
    """But for attention's weights, with the gradients and moments of a joint refit.

    Blocks are written one by one here, and not together up to a GB.
    """
    code = "import sys, mha2gqa as m; m._SHARD_BYTES = 0; sys.exit(m.main(sys.argv[1:]))"
    (tmp_path / "text.txt").write_text("\n".join(topics))
    peaks = []
    for n_layers in (2, 7):
        config = config_of(num_hidden_layers=n_layers, vocab_size=384, hidden_size=256,
                           intermediate_size=2048)
        weights, path = random_weights(config), tmp_path / str(n_layers)
        save_checkpoint(path, config, weights, bpe.parent)
        peaks.append(peak_of("-c", code, path, tmp_path / f"out{n_layers}", "--kv-heads", 2,
                             "--text", tmp_path / "text.txt", "--tokens", 128, "--seq-len", 32,
                             "--group", "adjacent", *steps.split()))
    block = 4 * sum(w.numel() for w in m.block_weights(weights, 0).values())
    attention = 4 * 4 * 256 * 256
    trained = 5 * 4 * attention if "--joint" in steps else 0
    assert peaks[1] - peaks[0] < trained + 2 * block  # and not 5 blocks more


# ---- 9 checkpoints -------------------------------------------------------------------------------


def test_config_file_keeps_unknown_keys_and_changes_only_the_heads():
    raw = {**BASE, "transformers_version": "4.1", "a_key_of_tomorrow": {"x": [1]}, "head_dim": None}
    config = m.parse_config(raw)
    assert (config.num_key_value_heads, config.head_dim) == (4, 12)
    raw["architectures"] = ["LlamaForCausalLM"]  # what an engine looks for
    assert m._config_json(m.gqa_config(config, 2)) == {**raw, "num_key_value_heads": 2}
    for kind in ("llama", "mistral", "qwen2", "qwen3"):  # made by hand
        config = m.LlamaConfig(97, 48, 80, 2, 4, model_type=kind, rope_scaling=LLAMA3)
        assert m.parse_config(m._config_json(config)) == config


def test_rope_is_written_in_both_spellings():
    """For readers that know the old one alone, and would take the defaults."""
    config = config_of("new spelling")
    written = m._config_json(config)
    assert written.pop("rope_parameters") == config.raw["rope_parameters"]
    assert m.parse_config(written) == config


# config.json's that are refused: (message, changes of BASE).
BAD_CONFIGS = [
    (r"model_type 'starcoder2' \(supported: llama, mistral, qwen2", {"model_type": "starcoder2"}),
    ("not supported: hidden_act 'gelu'", {"hidden_act": "gelu"}),
    ("not supported: attention that is not causal", {"is_causal": False}),
    ("not supported: partial rotary", {"partial_rotary_factor": 0.5}),
    ("not supported: partial rotary", {"rope_parameters": {"partial_rotary_factor": 0.5}}),
    ("not supported: sliding window", {"model_type": "mistral"}),  # transformers' default is 4096
    ("not supported: sliding window", {"model_type": "mistral", "sliding_window": 4096}),
    ("not supported: sliding window", {
        "model_type": "qwen2", "use_sliding_window": True, "max_window_layers": 1}),
    ("not supported: sliding window", {
        "model_type": "qwen3", "use_sliding_window": True, "max_window_layers": 0}),
    ("layer_types", {"layer_types": ["full_attention", "sliding_attention"]}),
    (r"rope type 'dynamic' \(supported: default, linear, llama3\)",
     {"rope_scaling": {"type": "dynamic", "factor": 2}}),
    ("not supported: rope type 'yarn'", {"rope_scaling": {"rope_type": "yarn"}}),
    ("no factor", {"rope_scaling": {"type": "linear"}}),
    ("factor is 0, expected a positive", {"rope_scaling": {"type": "linear", "factor": 0}}),
    ("factor is inf, expected", {"rope_scaling": {"type": "linear", "factor": math.inf}}),
    ("rope_theta is 'x', expected", {"rope_parameters": {"rope_theta": "x"}}),
    ("rope_theta is -1, expected a positive", {"rope_theta": -1}),
    ("no vocab_size", {"vocab_size": None}),
    ("hidden_size is '48', expected a positive", {"hidden_size": "48"}),
    ("rms_norm_eps is '1e-5', expected a", {"rms_norm_eps": "1e-5"}),
    ("num_key_value_heads 3 does not divide", {"num_key_value_heads": 3}),
    ("head_dim is 7, but RoPE needs an even one", {"head_dim": 7}),
    ("eos_token_id is 97, expected one of the vocabulary's 0 to 96", {"eos_token_id": 97}),
    ("eos_token_id is -1", {"eos_token_id": [-1, 2]}),
    ("eos_token_id is '2'", {"eos_token_id": "2"}),
]


@pytest.mark.parametrize("message, changes", BAD_CONFIGS)
def test_configs_that_are_refused(message, changes):
    with pytest.raises(ValueError, match=message):
        m.parse_config({**BASE, **changes})


# Changes to config.json that transformers takes as they are.
SETTINGS = {
    "swish": {"hidden_act": "swish"},
    "windows after the last layer": {
        "model_type": "qwen2", "num_key_value_heads": 4, "use_sliding_window": True,
        "sliding_window": 8, "max_window_layers": 2},
    "mistral's 8 KV heads": {"model_type": "mistral", "sliding_window": None, "head_dim": 6,
                             "num_attention_heads": 16},
    "llama3, also at the top": {"rope_scaling": LLAMA3, "original_max_position_embeddings": 32},
    "llama3, only at the top": {"rope_scaling": dict(list(LLAMA3.items())[:4]),
                                "original_max_position_embeddings": 32},
    "llama3, nowhere": {"rope_scaling": dict(list(LLAMA3.items())[:4])},
    "two thetas": {"rope_parameters": {"rope_type": "default", "rope_theta": 500.0},
                   "rope_theta": 20000.0},
    "two ropes": {"rope_parameters": {"rope_type": "default", "rope_theta": 500.0},
                  "rope_scaling": {"rope_type": "linear", "factor": 2.0}},
}


@pytest.mark.parametrize("name", SETTINGS)
def test_settings_are_taken_as_transformers_takes_them(tmp_path, name):
    config = m.parse_config({**BASE, **SETTINGS[name]})
    make_directory(tmp_path / "x", config, {"model.safetensors": random_weights(config)})
    assert_transformers_computes_the_same(tmp_path / "x", time=200)


def test_what_names_the_source_s_own_code_is_not_in_the_result(tmp_path):
    """Yi's old files are LLaMA under another name; the result is one by its own name."""
    config = m.parse_config({
        **BASE, "model_type": "Yi", "architectures": ["YiForCausalLM"],
        "quantization_config": {"bits": 4},  # left behind where weights were dequantised
        "auto_map": {"AutoModelForCausalLM": "modeling_yi.YiForCausalLM"}})
    save_checkpoint(tmp_path / "x", config, random_weights(config))
    written = json.loads((tmp_path / "x/config.json").read_text())
    assert not {"auto_map", "quantization_config"} & written.keys()
    assert type(transformers_model(tmp_path / "x")).__name__ == "LlamaForCausalLM"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_checkpoints_come_back_bit_for_bit(tmp_path, dtype):
    config = config_of("gqa")
    weights = random_weights(config, dtype=dtype)
    save_checkpoint(tmp_path / "a", config, weights)
    found, again = m.load_checkpoint(tmp_path / "a")
    assert found == config and same_weights(again, weights)
    assert os.listdir(tmp_path) == ["a"]
    assert [f.name for f in (tmp_path / "a").glob("*.safe*")] == ["model.safetensors"]
    modes = {file.stat().st_mode for file in (tmp_path / "a").iterdir()}
    assert len(modes) == 1  # safetensors alone would leave files that only their owner reads


def test_shards_hold_blocks_up_to_their_size(tmp_path):
    """Four blocks and a rest, in shards of two and a half blocks."""
    config = config_of("gqa", num_hidden_layers=4)
    weights = random_weights(config)
    block = 4 * sum(w.numel() for w in m.block_weights(weights, 0).values())
    save_checkpoint(tmp_path / "out", config, weights, shard_bytes=int(2.5 * block))
    index = json.loads((tmp_path / "out/model.safetensors.index.json").read_text())
    shards = [f"model-{i:05d}-of-00003.safetensors" for i in (1, 2, 3)]
    assert sorted(f.name for f in (tmp_path / "out").glob("*.safetensors")) == shards
    assert index["metadata"]["total_size"] == 4 * sum(w.numel() for w in weights.values())
    assert index["weight_map"] == {n: shards[int(n.split(".")[2]) // 2 if "layers" in n else 2]
                                   for n in weights}
    assert same_weights(m.load_checkpoint(tmp_path / "out")[1], weights)


def make_directory(path, config, files):
    """A checkpoint directory from {file name: tensors}, with an index if there are several."""
    path.mkdir()
    (path / "config.json").write_text(json.dumps(dict(config.raw)))
    for name, tensors in files.items():
        if name.endswith(".bin"):
            torch.save(tensors, path / name)
        else:
            save_file(tensors, path / name, {"format": "pt"})
    if len(files) > 1:
        kind = "model.safetensors" if name.endswith(".safetensors") else "pytorch_model.bin"
        index = {"metadata": {},
                 "weight_map": {n: file for file, tensors in files.items() for n in tensors}}
        (path / f"{kind}.index.json").write_text(json.dumps(index))
    return path


def halves(weights):
    names = sorted(weights)
    return [{n: weights[n] for n in part} for part in (names[::2], names[1::2])]


def test_the_file_layouts_of_the_hub(tmp_path):
    config = config_of()
    weights = random_weights(config)
    one, two = halves(weights)
    other = {n: w + 1 for n, w in weights.items()}  # of another time: must not be read
    other_one, other_two = halves(other)
    tables = {f"model.layers.0.self_attn.rotary_emb.{n}": torch.ones(6)
              for n in ("inv_freq", "cos_cached", "sin_cached")}
    paths = [make_directory(tmp_path / name, config, files) for name, files in {
        "single": {"model.safetensors": weights},
        "sharded": {"model-1-of-2.safetensors": one, "model-2-of-2.safetensors": two},
        "bin": {"pytorch_model.bin": weights},
        "bins": {"pytorch_model-00001-of-00002.bin": one, "pytorch_model-00002-of-00002.bin": two},
        "leftovers": {"model.safetensors": weights | tables},
    }.items()]
    aside = make_directory(tmp_path / "aside", config, {"pytorch_model.bin": weights})
    save_file({"lora": torch.ones(2)}, aside / "adapter_model.safetensors")
    old = make_directory(tmp_path / "old", config, {})  # before torch 1.6: not an archive
    torch.save(weights, old / "pytorch_model.bin", _use_new_zipfile_serialization=False)
    # The one file counts, and not what lies beside it from the time when the model was sharded.
    stale = make_directory(tmp_path / "stale", config, {
        "model-1-of-2.safetensors": other_one, "model-2-of-2.safetensors": other_two})
    save_file(weights, stale / "model.safetensors", {"format": "pt"})
    both = make_directory(tmp_path / "both", config, {"pytorch_model.bin": other})
    save_file(weights, both / "model.safetensors", {"format": "pt"})
    for path in [*paths, aside, old, stale, both]:
        assert same_weights(m.load_checkpoint(path)[1], weights), path.name
        assert_transformers_computes_the_same(path)


@pytest.mark.parametrize("rename", [
    lambda n: f"_orig_mod.{n}", lambda n: f"module._orig_mod.{n}",
    lambda n: n.replace("self_attn.", "self_attn._fsdp_wrapped_module."),
    lambda n: n.replace("layers.0.", "layers.0._checkpoint_wrapped_module.")])
def test_prefixes_that_wrappers_leave_are_stripped(tmp_path, rename):
    config = config_of()
    weights = random_weights(config)
    path = make_directory(tmp_path / "x", config, {
        "model.safetensors": {rename(n): w for n, w in weights.items()}})
    assert same_weights(m.load_checkpoint(path)[1], weights)


def test_tied_embeddings_have_one_name_and_others_are_no_copies(tmp_path):
    config = config_of("tied")
    weights = random_weights(config)
    embedding = weights["model.embed_tokens.weight"]
    rest = {n: w for n, w in weights.items() if n != "model.embed_tokens.weight"}
    for name, tensors in {"both": weights | {"lm_head.weight": embedding.clone()},
                          "head": rest | {"lm_head.weight": embedding}}.items():
        path = make_directory(tmp_path / name, config, {"model.safetensors": tensors})
        assert same_weights(m.load_checkpoint(path)[1], weights), name
    path = make_directory(tmp_path / "x", config, {
        "model.safetensors": weights | {"lm_head.weight": embedding + 1}})
    with pytest.raises(ValueError, match="x: its weights .*: tie_word_embeddings is true, but"):
        m.load_checkpoint(path)
    config, weights = config_of(), weights | {"lm_head.weight": embedding}  # of one storage
    path = make_directory(tmp_path / "z", config, {"pytorch_model.bin": weights})
    save_checkpoint(tmp_path / "y", *m.load_checkpoint(path))
    assert same_weights(m.load_checkpoint(tmp_path / "y")[1], weights)


@pytest.mark.parametrize("file", ["model.safetensors", "pytorch_model.bin"])
def test_reading_is_lazy(tmp_path, file):
    config = config_of(hidden_size=512, intermediate_size=8192, num_hidden_layers=2)
    weights = {n: torch.zeros(p.shape) for n, p in m.Llama(config).state_dict().items()}
    path = make_directory(tmp_path / "x", config, {file: weights})
    before = anonymous_memory()
    _, mapped = m.load_checkpoint(path)
    assert all(w.sum() == 0 for n, w in mapped.items() if "norm" not in n)
    assert anonymous_memory() - before < 4 * sum(w.numel() for w in weights.values()) / 10


def test_the_files_beside_the_weights_come_along(tmp_path):
    source, config = tmp_path / "source", config_of()
    copied = {"tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "merges.txt",
              "generation_config.json", "LICENSE", "chat_template.jinja", "spiece.model"}
    source.mkdir()
    for name in copied | {"notes.txt", "model.safetensors.index.json", "pytorch_model.bin"}:
        (source / name).write_text("{}")
    save_checkpoint(tmp_path / "x", config, random_weights(config), source)
    assert set(os.listdir(tmp_path / "x")) == copied | {"config.json", "model.safetensors"}


def test_output_is_there_whole_or_not_at_all(tmp_path):
    config = config_of()
    weights = random_weights(config)
    for error in (KeyboardInterrupt, OSError):
        with (pytest.raises(error),
              m.new_checkpoint(tmp_path / "x", config, weights) as writer):
            writer.write(weights)
            raise error
    with (pytest.raises(ValueError, match="x: not all weights of model.safetensors were written"),
          m.new_checkpoint(tmp_path / "x", config, weights) as writer):
        writer.write(m.non_block_weights(weights))
    assert not list(tmp_path.iterdir())


# ---- 10 text and tokenizers ----------------------------------------------------------------------


RECORDS = '\n{"text": "größe", "url": 1}\n\n{"text": ""}\n{"text": "two\\nlines"}\n   '.encode()
TEXTS = {
    "a.jsonl": (RECORDS, ["größe", "two\nlines"]),
    "a.json": (RECORDS, ["größe", "two\nlines"]),
    "a.jsonl.gz": (gzip.compress(RECORDS), ["größe", "two\nlines"]),
    "b.jsonl": ('\ufeff{"text": "half \\ud800 a pair"}'.encode(), ["half ? a pair"]),
    "a.txt": ("\ufeffone\n{two}\n".encode(), ["one\n{two}\n"]),
    "a.txt.gz": (gzip.compress(b"one\ntwo\n"), ["one\ntwo\n"]),
}


@pytest.mark.parametrize("name", TEXTS)
def test_documents_of_all_kinds_of_files(tmp_path, name):
    content, documents = TEXTS[name]
    (tmp_path / name).write_bytes(content)
    found = m._Documents([str(tmp_path / name)], 100)
    assert list(found) == documents


def test_documents_of_several_files(tmp_path):
    """Two packed ones of each kind, and lines without an end."""
    for name in TEXTS:
        (tmp_path / name).write_bytes(TEXTS[name][0].rstrip(b"\n "))
    names = [*TEXTS, *reversed(TEXTS)]
    found = m._Documents([str(tmp_path / name) for name in names], 100)
    assert [text.strip() for text in found] == [
        text.strip() for name in names for text in TEXTS[name][1]]


@pytest.mark.slow
def test_little_is_held_of_a_large_text(tmp_path, trained):
    """100 MB of records for 640 tokens: no more memory than the places and a batch take."""
    line = json.dumps({"text": "words and more words " * 50}) + "\n"
    code = ("import sys, mha2gqa as m; path, text = sys.argv[1:]; m.text_rows(path, "
            "m.load_config(path), m.Corpus(text, tokens=640, seq_len=64))")
    peaks = []
    for n in (100, 100_000_000 // len(line)):
        (tmp_path / "a.jsonl").write_text(n * line)
        peaks.append(peak_of("-c", code, trained / "mha", tmp_path / "a.jsonl"))
    assert peaks[1] - peaks[0] < 30e6


def letters(texts):
    return [[1, *(ord(c) - 90 for c in text)] for text in texts]


def test_rows_are_shuffled_documents_end_to_end():
    def stream_of(n_tokens, seq_len, seed, **config):
        return m._pack_rows(documents, letters, config_of(**config), n_tokens, seq_len,
                            seed=seed).flatten().tolist()

    documents = ["aaa", "bbbbb", "cc", "dddd"]
    whole = stream_of(10**9, 22, seed=3)
    assert stream_of(12, 4, seed=3) == whole[:12]
    parts = re.findall("\1([a-d]*)\2", "".join(chr(t + 90 * (t > 2)) for t in whole))
    assert sorted(parts) == documents != parts and len(whole) == 22  # BOS, a document, EOS
    other = stream_of(10**9, 22, seed=4)
    assert sorted(other) == sorted(whole) and other != whole
    documents = ["ab"]
    for eos, end in ((2, [2]), ([7, 8], [7]), (None, [])):
        assert stream_of(100, 3 + len(end), 0, eos_token_id=eos) == [1, 7, 8, *end]


# Whether tokenizer.json puts BOS first, tokenizer_config.json, special_tokens_map.json, what comes
# first.
BOS = [
    (True, {}, {}, [1]),
    (False, {}, {}, []),
    (True, {"add_bos_token": True, "bos_token": "<s>"}, {}, [1]),
    (False, {"add_bos_token": True, "bos_token": "<s>"}, {}, [1]),
    (False, {"add_bos_token": True, "bos_token": {"content": "<s>", "lstrip": False}}, {}, [1]),
    (False, {"add_bos_token": True}, {"bos_token": "</s>"}, [2]),
    (True, {"add_bos_token": False, "bos_token": "<s>"}, {}, []),
    (True, {"add_bos_token": True, "bos_token": "<absent>"}, {}, [1]),  # the template's stays
]


@pytest.mark.parametrize("template, settings, special, first", BOS)
def test_bos_is_put_as_the_files_say_and_once(tmp_path, bpe, template, settings, special, first):
    """Explicit settings hold, as in transformers 4; transformers 5 asks tokenizer.json alone."""
    from tokenizers import Tokenizer, processors
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer.from_file(str(bpe))
    if not template:
        tokenizer.post_processor = processors.ByteLevel()
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    m.write_json(tmp_path / "tokenizer_config.json", settings)
    m.write_json(tmp_path / "special_tokens_map.json", special)
    texts = ["a text of more than the eight tokens of the truncation", "<s>with BOS in it"]
    tokenizer.no_truncation()
    plain = [e.ids for e in tokenizer.encode_batch(texts, add_special_tokens=False)]
    found = m.load_tokenizer(tmp_path)(texts)
    assert found[0] == first + plain[0] and (found[1] == plain[1] or first == [2])
    if not settings:
        fast = PreTrainedTokenizerFast(tokenizer_file=str(tmp_path / "tokenizer.json"))
        assert found[0] == fast(texts[0])["input_ids"]


def test_sentencepiece_puts_bos_first_unless_told(tmp_path, topics):
    import sentencepiece

    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(" ".join(topics[:20]).split(".")), vocab_size=200,
        model_prefix=str(tmp_path / "tokenizer"), minloglevel=2)
    reference = sentencepiece.SentencePieceProcessor(model_file=str(tmp_path / "tokenizer.model"))
    texts = ["the value of an expression", "a name"]
    assert m.load_tokenizer(tmp_path)(texts) == [[1, *reference.encode(t)] for t in texts]
    (tmp_path / "tokenizer_config.json").write_text('{"add_bos_token": false}')
    assert m.load_tokenizer(tmp_path)(texts) == [reference.encode(t) for t in texts]


def test_calibration_and_held_out_rows(trained, topics, tmp_path):
    """The first rows are held out, those of a text of its own, or all there is."""
    path, many, one = trained / "mha", trained / "text.jsonl", tmp_path / "one.txt"
    one.write_text(topics[0])
    config = m.load_config(path)
    corpus = m.Corpus(many, tokens=32 * 100 + 5, seq_len=32)
    rows, held_out = m.text_rows(path, config, corpus)
    assert (rows.shape, held_out.shape) == ((90, 32), (10, 32))
    everything = m._pack_rows(topics, m.load_tokenizer(path), config, 3205, 32, seed=0)
    assert torch.equal(torch.cat([held_out, rows]), everything)
    rows, held_out = m.text_rows(path, config, dataclasses.replace(corpus, eval_files=[one]))
    assert rows.shape == (100, 32) and not (rows[:, None] == held_out).all(-1).any()
    none, held_out = m.text_rows(path, config, m.Corpus((), one, seq_len=32))
    assert none.shape == (0, 32) and len(held_out) > 10
    with pytest.warns(UserWarning, match=r"whole rows of 32, not the 100,000,000 asked for"):
        m.text_rows(path, config, m.Corpus(one, tokens=10**8, seq_len=32))
    assert [m.row_length(config, n) for n in (None, 2, 64)] == [64, 2, 64]
    assert m.row_length(dataclasses.replace(config, max_position_embeddings=10**5), None) == 2048


# ---- 11 report and command line ------------------------------------------------------------------


def test_convert_and_evaluate_by_command(trained, tmp_path, command):
    text = trained / "text.jsonl"
    common = ("--text", text, "--tokens", 6000, "--seq-len", 32)
    status, out, err = command(trained / "mha", tmp_path / "out", "--kv-heads", 4, *common)
    assert status == 0 and "error" not in err and "warning" not in err
    assert max(len(line) for line in out.splitlines() if str(tmp_path) not in line) <= 100
    report = json.loads((tmp_path / "out/mha2gqa.json").read_text())
    assert m.table(report) in out
    for name, metric in (("loss, nats/token", "loss"), ("KL to the source", "kl")):
        numbers = "".join(f"{score[metric]:12.4f}" for score in report["scores"].values())
        assert f"{name:<23}{numbers}\n" in out
    assert f"KV cache, bytes a token{2048:12,}{1024:12,}{1024:12,}\n" in out
    status, out, _ = command("--evaluate", tmp_path / "out", *common)
    held_out, loss = report["tokens"]["held_out"], losses(report)["converted"]
    assert (status, out) == (0, f"held-out loss {loss:.4f} nats/token, {held_out:,} tokens\n")


@pytest.mark.slow
def test_dry_run_writes_nothing(trained, tmp_path):
    """As a program of its own: the plan, and in a line that the text is short."""
    done = subprocess.run([sys.executable, PROGRAM, trained / "mha", tmp_path / "out", "--kv-heads",
                           "4", "--text", trained / "text.jsonl", "--tokens", "1000000000",
                           "--dry-run"], capture_output=True, text=True)
    assert done.returncode == 0 and not list(tmp_path.iterdir())
    assert re.fullmatch(r"2 blocks, 8 to 4 KV heads \(align linear, .*\);\n[\d,]+ tokens to "
                        r"calibrate in rows of 64 \([\d,]+ with resampled copies\);\n25,984 held "
                        r"out in rows of 64;\nabout 0\.\d+ GB of memory \(cpu\)\n", done.stdout)
    assert re.fullmatch(r"warning: the text has [\d,]+ tokens in whole rows of 64, not the "
                        r"1,000,000,000 asked for: using those\n", done.stderr)


# Ways to break a checkpoint that is fine; each gets its folder.


def edit_config(**changes):
    def edit(folder):
        m.write_json(folder / "config.json", {**m.read_json(folder / "config.json"), **changes})
    return edit


def edit_file(name, change):
    """Change a file's bytes; None removes it."""
    def edit(folder):
        content = change((folder / name).read_bytes())
        (folder / name).unlink()
        if content is not None:
            (folder / name).write_bytes(content)
    return edit


def edit_weight(change):
    """Put {name: tensor} in place of the first block's q_proj."""
    def edit(folder):
        file = folder / "model-00001-of-00003.safetensors"
        tensors = load_file(file)
        save_file(tensors | change(tensors.pop(Q)), file, {"format": "pt"})
    return edit


def as_bin(content):
    """Put one pytorch_model.bin in place of the shards; of bytes, or of what torch saves."""
    def edit(folder):
        for file in folder.glob("model*"):
            file.unlink()
        if isinstance(content, bytes):
            (folder / "pytorch_model.bin").write_bytes(content)
        else:
            torch.save(content, folder / "pytorch_model.bin")
    return edit


SHARD, LAST = "model-00002-of-00003.safetensors", "model-00003-of-00003.safetensors"
Q = "model.layers.0.self_attn.q_proj.weight"
OTHER = "x: its weights are not those of config.json: .*"
BROKEN = {
    "no config": (edit_file("config.json", lambda b: None), "config.json: cannot be read .No such"),
    "config cut": (edit_file("config.json", lambda b: b[:30]), "config.json: cannot be read"),
    "config a list": (edit_file("config.json", lambda b: b"[]"), "expected a JSON object"),
    "config of another kind": (edit_config(model_type="gpt2"), "x/config.json: not supported: mod"),
    "rope as text": (edit_config(rope_scaling="linear"), "x/config.json: "),
    "no shard": (edit_file(SHARD, lambda b: None),
                 rf"{SHARD}: cannot be read \(.*No such file.*\)(?!;)"),
    "shard cut": (edit_file(SHARD, lambda b: b[:-100]), f"{SHARD}: cannot be read"),
    "pointer for weights": (edit_file(SHARD, lambda b: b"version https://git-lfs.github.com/"),
                            f"{SHARD}: cannot be read .*Git LFS pointer"),
    "no weights": (lambda folder: [f.unlink() for f in folder.glob("model*")],
                   "no model.safetensors, no pytorch_model.bin"),
    "index without shards": (edit_file("model.safetensors.index.json", lambda b: b"{}"),
                             "model.safetensors.index.json: has no weight_map"),
    "bin of rubbish": (as_bin(b"garbage"), "pytorch_model.bin: cannot be read"),
    "bin empty": (as_bin(b""), "pytorch_model.bin: cannot be read"),
    "bin with code": (as_bin(pickle.dumps(Path("code"), protocol=2)), "pytorch_model.bin: cannot"),
    "bin of a training": (as_bin({"epoch": 3, "state_dict": {"x": torch.ones(2)}}),
                          "pytorch_model.bin: holds more than tensors; save the model's"),
    "layers": (edit_config(num_hidden_layers=3), OTHER + r"Missing .*model\.layers\.2\."),
    "tensor missing": (edit_weight(lambda w: {}), OTHER + f"Missing .*{Q}"),
    "tensor unknown": (edit_weight(lambda w: {Q: w, "lora": w[:2].clone()}), OTHER + "Unexp.*lora"),
    "shape": (edit_weight(lambda w: {Q: w[:-1].clone()}), OTHER + f"{Q}.*47, 48"),
    "no head": (lambda folder: save_file({  # as of a reward model
        n.replace("lm_head", "score"): w for n, w in load_file(folder / LAST).items()},
        folder / LAST), OTHER + 'Missing .*"lm_head.weight".*Unexpected .*"score.weight"'),
    "one shard, no index": (
        lambda folder: [f.unlink() for f in folder.glob("model*") if "00001" not in f.name],
        "no model.safetensors, no pytorch_model.bin, no index of either"),
    "dtype": (edit_weight(lambda w: {Q: w.double()}), f"{Q} is torch.float64, expected float32"),
    "quantised": (edit_weight(lambda w: {Q: w.to(torch.int8)}),
                  f"{Q} is torch.int8, expected .*quantised weights must be dequantised"),
    "packed": (edit_weight(lambda w: {Q.replace("weight", "qweight"): w[:8].int()}),
               "qweight is torch.int32, expected .*quantised weights must be dequantised"),
    "a link to nothing": (lambda folder: (folder / "generation_config.json").symlink_to("nothing"),
                          "No such file or directory: .*generation_config.json"),
    "no tokenizer": (edit_file("tokenizer.json", lambda b: None), "x: no tokenizer.json or tokeni"),
    "tokenizer broken": (edit_file("tokenizer.json", lambda b: b"{}"), "x: no tokenizer.json or"),
    "tokenizer of another": (edit_config(vocab_size=97), "the model's vocabulary has only 97; do"),
}


@pytest.mark.parametrize("what", BROKEN)
def test_broken_checkpoints(trained, tmp_path, refused, what):
    edit, message = BROKEN[what]
    config = config_of(vocab_size=97 if what == "tokenizer of another" else 384)
    save_in_shards(tmp_path / "x", config, random_weights(config), trained / "mha")
    edit(tmp_path / "x")
    refused(message, tmp_path / "x", tmp_path / "out", "--kv-heads", 2, "--text",
            trained / "text.jsonl", "--dry-run")


# Text that is refused: {file name: (content, message)}; None: there is no such file.
BAD_TEXT = {
    "none.txt": (None, "none.txt: no such file"),
    "blank.txt": (b" \n", "blank.txt: holds no text"),
    "empty.jsonl": (b'{"text": ""}\n', "empty.jsonl: holds no text"),
    "latin.txt": (b"\xff\xfe\xff", "latin.txt: cannot be read"),
    "cut.jsonl": (b'{"text": "a"}\n{"text": \n', "cut.jsonl, line 2: not JSON"),
    "other.jsonl": (b'{"text": "a"}\n\n{"body": 1}\n', 'other.jsonl, line 3: .* a "text" string'),
    "array.json": (b'[{"text": "a"}]', 'array.json, line 1: expected an object with a "text"'),
    "deep.jsonl": (b'{"a":' * 100_000, "deep.jsonl, line 1: not JSON"),
    "not.jsonl.gz": (b"no gzip", "not.jsonl.gz: cannot be read"),
    "cut.jsonl.gz": (gzip.compress(b'{"text": "a"}\n')[:-9], "cut.jsonl.gz: cannot be read"),
    "a.parquet": (b"PAR1", r"a.parquet: expected a name that ends in \.jsonl or \.json"),
    "short.txt": (b"too short", "too little text in .*short.txt.*: 2 rows of 64 tokens"),
}


@pytest.mark.parametrize("name", BAD_TEXT)
def test_bad_text(trained, tmp_path, refused, name):
    content, message = BAD_TEXT[name]
    if content is not None:
        (tmp_path / name).write_bytes(content)
    refused(message, trained / "mha", tmp_path / "out", "--kv-heads", 4, "--text", tmp_path / name)


def test_a_temporary_directory_that_is_missing_or_full(tmp_path, monkeypatch):
    """It is no fault of the text, and only text that must be unpacked needs one."""
    for name, content in (("a.jsonl", RECORDS), ("b.jsonl.gz", gzip.compress(RECORDS))):
        (tmp_path / name).write_bytes(content)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "nowhere"))
    assert len(m._Documents([str(tmp_path / "a.jsonl")], 99)) == 2
    with pytest.raises(FileNotFoundError, match="nowhere"):
        m._Documents([str(tmp_path / "b.jsonl.gz")], 99)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.setattr(shutil, "copyfileobj", mock.Mock(side_effect=OSError(errno.ENOSPC, "full")))
    with pytest.raises(OSError, match="^.*/tmp.*: .*full, to unpack .*b.jsonl.gz"):
        m._Documents([str(tmp_path / "b.jsonl.gz")], 99)


# (What is said, MODEL OUT and what follows --kv-heads 4 --text FILE); T: trained, X: tmp_path.
BAD_ARGUMENTS = [
    ("sequence length 65: expected 2 to 64 for this model", "T/mha X/out --seq-len 65"),
    ("too few --tokens: 2 rows of 64", "T/mha X/out --tokens 100"),
    ("2 rows of 64 tokens are needed to calibrate with, found 1; .* or --no-refit",
     "T/mha X/out --eval-text T/text.jsonl --text X/rows.txt"),
    ("too little text in .*little.txt.*: 1 rows", "T/mha X/out --eval-text X/little.txt"),
    ("device 'gpu': ", "T/mha X/out --device gpu"),
    ("seed -1: expected 0 to 4294967295", "T/mha X/out --seed -1"),
    ("metric cos: linear alignment", "T/mha X/out --metric cos"),
    ("3 KV heads: the source has 8, choose one of 1, 2, 4", "T/mha X/out --kv-heads 3"),
    ("0 KV heads: the source has 8", "T/mha X/out --kv-heads 0"),
    ("full: exists; choose another OUT", "T/mha X/full"),
    ("rows.txt: exists; choose another OUT", "T/mha X/rows.txt"),
    ("killed.partial: exists, from a run that was killed", "T/mha X/killed"),
    ("deep: no such directory, or no permission", "T/mha X/deep/out"),
    (r"nowhere: no such directory .*\(RuntimeError: no net\b", "T/nowhere X/out"),
    (r"a/b: no such directory .*\(RuntimeError: no net\b", "a/b X/out"),
    ("text.jsonl/config.json: cannot be read", "T/text.jsonl X/out"),
]


@pytest.mark.parametrize("message, arguments", BAD_ARGUMENTS)
def test_bad_arguments(trained, tmp_path, refused, monkeypatch, message, arguments):
    offline = mock.Mock(side_effect=RuntimeError("no net\nat all"))
    monkeypatch.setattr("huggingface_hub.snapshot_download", offline)
    (tmp_path / "little.txt").write_text("too short")
    (tmp_path / "rows.txt").write_text("".join(map(chr, range(33, 123))))
    for name in ("full", "killed.partial"):
        (tmp_path / name).mkdir()
    model, out, *more = (word.replace("T/", f"{trained}/").replace("X/", f"{tmp_path}/")
                         for word in arguments.split())
    refused(message, model, out, "--kv-heads", 4, "--text", trained / "text.jsonl", *more)


@pytest.mark.parametrize("arguments", [
    "", "x", "x y --kv-heads 4", "--evaluate --text x", "--evaluate x",
    "x y --kv-heads four --text z"])
def test_usage_errors(command, arguments):
    status, out, err = command(*arguments.split())
    assert (status, out) == (2, "") and err.startswith("usage: mha2gqa MODEL OUT")
    assert re.search(r"\n\w+: error: .*\n$", err)


# Weights that make something overflow, of a trained model: (name, change, options, what is said).
NOT_FINITE = [
    ("lm_head.weight", lambda w: w.index_fill(0, torch.tensor(3), math.nan), "--align none",
     "tensor lm_head.weight holds values that are not finite"),
    ("model.embed_tokens.weight", lambda w: w.index_fill(0, torch.tensor(0), -math.inf),
     "--align none", "tensor model.embed_tokens.weight holds"),
    ("model.layers.1.mlp.up_proj.weight", lambda w: w.index_fill(0, torch.tensor(3), math.inf),
     "--align none", "tensor model.layers.1.mlp.up_proj.weight holds values that are not finite"),
    ("model.layers.1.self_attn.k_proj.weight", lambda w: 1e38 * w, "",
     "block 1: its hidden states on this text are not finite"),
    ("model.layers.1.mlp.up_proj.weight", lambda w: 1e38 * w, "--group adjacent",
     "block 1: its hidden states on this text are not finite"),
    # Sharing may need a weight that is beyond float16: all dimensions are the same.
    ("model.layers.0.self_attn.v_proj.weight",
     lambda w: 6e4 * w[:1].half().sign().expand_as(w), "--no-refit", "block 0.* not finite"),
]


@pytest.mark.parametrize("name, change, options, message", NOT_FINITE)
def test_values_that_are_not_finite(trained, tmp_path, refused, name, change, options, message):
    config, weights = m.load_checkpoint(trained / "mha")
    weights = {n: change(w) if n == name else w for n, w in weights.items()}
    if weights[name].dtype == torch.float16:
        weights = {n: w.half() for n, w in weights.items()}
    save_checkpoint(tmp_path / "x", config, weights, trained / "mha")
    refused(message, tmp_path / "x", tmp_path / "out", "--kv-heads", 4, "--text",
            trained / "text.jsonl", "--tokens", 1000, *options.split())


@pytest.mark.parametrize("target", ["safetensors.torch.save_file", "shutil.copyfile",
                                    "mha2gqa.write_json", "mha2gqa.rename_when_on_disk"])
def test_a_full_disk_leaves_nothing(trained, tmp_path, refused, monkeypatch, target):
    full = OSError(28, "No space left on device")
    monkeypatch.setattr(target, mock.Mock(side_effect=full))
    refused("No space left on device", trained / "mha", tmp_path / "out", "--kv-heads", 4, "--text",
            trained / "text.jsonl", "--tokens", 1000, "--align", "none")


def test_too_little_disk_and_memory_are_seen_before(
        trained, corpus, tmp_path, refused, monkeypatch):
    monkeypatch.setattr(os, "sysconf", lambda name: 1000)
    with pytest.warns(UserWarning, match="GB of memory are needed .*; --no-joint takes less"):
        m.convert(trained / "mha", tmp_path / "out", 4, corpus, dry_run=True)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: types.SimpleNamespace(free=1000))
    refused(r"[\d,]+ bytes are needed, 1,000 are free", trained / "mha", tmp_path / "out",
            "--kv-heads", 4, "--text", trained / "text.jsonl", "--no-joint")


@pytest.mark.parametrize("error, said", [
    (RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried"), "error: Default.*\n"),
    (RuntimeError("CUDA error: out of memory"), "error: CUDA error: out of memory\n"),
    (MemoryError(), "error: not enough memory\n"),
    (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 1 GiB"), "error: CUDA out.*\n"),
    (RuntimeError("a mistake of ours"), None)])
def test_too_little_memory_is_one_line(trained, command, monkeypatch, error, said):
    monkeypatch.setattr(m, "convert", mock.Mock(side_effect=error))
    with contextlib.nullcontext() if said else pytest.raises(RuntimeError, match="of ours"):
        status, _, err = command("x", "y", "--kv-heads", 4, "--text", trained / "text.jsonl")
        assert status == 2 and re.fullmatch(said, err)


def test_a_model_of_the_hub_and_the_card_of_the_result(trained, tmp_path, command, monkeypatch):
    """A folder of that name wins; of the hub's files the weights come once, in one format."""
    from huggingface_hub import ModelCard

    hub, asked = tmp_path / "hub/models--owner--name/snapshots/0", []

    def download(name, allow_patterns):
        assert name == "owner/name"
        asked.extend(allow_patterns)
        hub.mkdir(parents=True, exist_ok=True)
        for file in (file for pattern in allow_patterns for file in bins.glob(pattern)):
            shutil.copyfile(file, hub / file.name)
        return str(hub)

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    monkeypatch.chdir(tmp_path)
    config, weights = m.load_checkpoint(trained / "mha")
    bins = make_directory(tmp_path / "bins", config, {"pytorch_model.bin": dict(weights)})
    shutil.copy(trained / "mha/tokenizer.json", bins)
    (bins / "README.md").write_text("---\nlicense: mit\nlanguage:\n- no\n---\n# The model\n")
    (bins / "model.onnx").write_bytes(b"x")
    arguments = ("--kv-heads", 4, "--text", trained / "text.jsonl", "--tokens", 1000, "--align",
                 "none")
    assert command("owner/name", "out", *arguments)[0] == 0
    assert not (hub / "model.onnx").exists() and asked[-1] == "pytorch_model*.bin"
    card = ModelCard.load(tmp_path / "out/README.md")
    assert (card.data.base_model, card.data.license) == ("owner/name", "mit")
    assert card.data.library_name == "transformers" and "mha2gqa" in card.data.tags
    assert m.table(m.read_json(tmp_path / "out/mha2gqa.json")) in card.text
    asked.clear()
    shutil.copytree(trained / "mha", tmp_path / "owner/name")
    (tmp_path / "owner/name/README.md").write_text("---\n: {no yaml\n---\n")
    assert command("owner/name", "out2", *arguments)[0] == 0 and not asked
    assert ModelCard.load(tmp_path / "out2/README.md").data.license is None


def test_plots_of_conversions(trained, converted, tmp_path, command, refused, monkeypatch):
    """What is drawn is what the reports say."""
    figure = pytest.importorskip("matplotlib.figure")
    drawn = []
    monkeypatch.setattr(figure.Figure, "savefig", lambda self, file, dpi: drawn.append(self))
    outs, reports = zip(*(converted("mha", n, refit=False) for n in (4, 2)), strict=True)
    assert command("--plot", *outs)[:2] == (0, "written to plot.png\n")
    gaps = [losses(report)["converted"] - losses(report)["source"] for report in reports]
    assert drawn[0].axes[0].lines[0].get_xydata().tolist() == [[0.5, gaps[1]], [1, gaps[0]]]
    assert command("--plot", outs[1])[0] == 0
    block = reports[1]["layers"][1]
    order = sum(block["groups"], [])
    for axis, pairs in zip(drawn[1].axes, block["pairs"].values(), strict=False):
        pairs = np.where(np.eye(8), np.nan, np.array(pairs)[np.ix_(order, order)])
        np.testing.assert_array_equal(axis.images[0].get_array().filled(np.nan), pairs)
    errors = [layer["hidden_state_error"] for layer in reports[1]["layers"]]
    assert drawn[1].axes[2].lines[0].get_ydata().tolist() == errors
    assert command("--plot", converted("mha", 2, align="none")[0])[0] == 0
    assert len(drawn[2].axes) == 1  # the errors alone
    refused("mha2gqa.json: cannot be read", "--plot", trained / "mha")


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_an_interrupted_conversion_leaves_no_result(trained, tmp_path, refused, number):
    arguments = (trained / "mha", tmp_path / "out", "--kv-heads", "4", "--text",
                 trained / "text.jsonl", "--tokens", "200000")
    program = subprocess.Popen([sys.executable, PROGRAM, *arguments], stderr=subprocess.PIPE,
                               text=True, preexec_fn=heed_signals)
    while not list(tmp_path.iterdir()):
        assert program.poll() is None
        time.sleep(0.01)
    program.send_signal(number)
    err = program.communicate()[1]
    if number == signal.SIGTERM:
        assert err.endswith("interrupted: nothing was written\n") and program.returncode == 130
        assert not list(tmp_path.iterdir())
    else:
        assert os.listdir(tmp_path) == ["out.partial"]
        refused("out.partial: exists, from a run that was killed", *arguments)


def heed_signals():
    """Undo what nohup and background jobs of a shell hand down: ignored signals."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_DFL)


# ---- the trainer: whole runs ---------------------------------------------------------------------

TRAINER = PROGRAM.with_name("train_gqa.py")
WAYS = {"paper": ("--align", "rotation"), "default": ()}
each_way = pytest.mark.parametrize("way", WAYS)
TORCHRUN = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")


ONE_THREAD = {**os.environ, "OMP_NUM_THREADS": "1"}  # bits depend on how many there are


def train_arguments(trained, out, way="paper", *more):
    return [str(x) for x in (
        "--model", trained / "mha", "--kv-heads", "2", "--out", out, "--text",
        trained / "short.jsonl", "--steps", "20", "--batch-tokens", "512", "--save-every", "4",
        "--lr", "1e-3", "--calibration-tokens", "8192", *WAYS[way], *more)]


def train_run(arguments, launch=()):
    """A run as a program of its own, which must end well; what it printed."""
    done = subprocess.run([sys.executable, *launch, TRAINER, *arguments], text=True,
                          stdout=subprocess.PIPE, stderr=subprocess.STDOUT, env=ONE_THREAD)
    assert done.returncode == 0, done.stdout
    return done.stdout


def read_json(out, name="report.json"):
    return json.loads((out / name).read_text())


def read_metrics(out, stage="distill"):
    """By step: of one that is there twice, after a stop, the last line counts."""
    lines = (out / "metrics.jsonl").read_text().splitlines(keepends=True)
    records = (json.loads(line) for line in lines if line.endswith("\n"))  # one is being written
    return {r["step"]: r for r in records if r["stage"] == stage}


@pytest.fixture(scope="session")
def runs(trained, tmp_path_factory):
    """(OUT, what it printed) of 20 steps of a way, by one process or by torchrun's two."""
    @functools.cache
    def run(way, processes=1):
        out = tmp_path_factory.mktemp("runs") / "out"
        launch = TORCHRUN if processes == 2 else ()
        return out, train_run(train_arguments(trained, out, way), launch)

    return run


@pytest.fixture
def alone():
    """This process as the only one of a group."""
    train_gqa.start_processes()
    yield
    torch.distributed.destroy_process_group()


@pytest.mark.slow
@each_way
def test_a_training_run_ends_in_a_better_model_that_transformers_loads(runs, way):
    out, printed = runs(way)
    scores = read_json(out)["scores"]
    loss, kl = ({name: s[of] for name, s in scores.items()} for of in ("loss", "kl"))
    assert list(loss) == ["source", "mean_pooled", "converted", "distilled"]
    assert loss["source"] < loss["distilled"] < loss["converted"] < loss["mean_pooled"]
    assert abs(kl["source"]) < 1e-6 and 0 < kl["distilled"] < kl["converted"] < kl["mean_pooled"]
    for name, column in (("loss, nats/token", loss), ("KL to the source", kl)):
        assert f"{name:<23}" + "".join(f"{x:12.4f}" for x in column.values()) in printed
    assert f"KV cache, bytes a token{2048:12,}{512:12}{512:12}{512:12}\n" in printed
    assert m.load_config(out / "gqa").num_key_value_heads == 2
    assert_transformers_computes_the_same(out / "gqa")
    assert sorted(p.name for p in (out / "checkpoints").iterdir()) == ["step_12", "step_16"]
    assert not (out / "data.pt").exists()
    report = read_json(out / "gqa", "mha2gqa.json")  # as a conversion's
    assert report["scores"] == scores and report["versions"]["mha2gqa"] == m.__version__
    assert report["tokens"]["training"] == 20 * 512 and len(report["layers"]) == 2
    assert f"{loss['distilled']:.4f}" in (out / "gqa/README.md").read_text()


@pytest.mark.slow
def test_the_loss_in_the_report_is_that_of_the_written_model(trained, runs):
    out, _ = runs("paper")
    config, weights = m.load_checkpoint(out / "gqa")
    documents = m._Documents([str(trained / "short.jsonl")], 10**6)
    rows = m._pack_rows(documents, m.load_tokenizer(trained / "mha"), config, 10**6, 64, seed=0)
    rows = rows[: len(rows) // 10]  # held out: the first rows, as many as 10 %
    logits = logits_of(config, weights, rows)[:, :-1].flatten(0, 1)
    loss = F.cross_entropy(logits, rows[:, 1:].flatten()).item()
    assert loss == pytest.approx(read_json(out)["scores"]["distilled"]["loss"])


@pytest.mark.slow
@each_way
def test_what_a_run_logs(runs, way):
    """Masks follow their target on the paper's way, and are 0 from 80 % on."""
    metrics = read_metrics(runs(way)[0])
    assert sorted(metrics) == list(range(20))
    for step, r in metrics.items():
        assert r["loss"] == pytest.approx(r["kl"] + r["bild"], abs=1e-6)
        assert {"lr", "gradient_norm", "tokens_per_second"} < r.keys()
        assert ("mask_mean" in r) == (way == "paper")
        if way == "paper":
            assert r["mask_target"] == pytest.approx(max(0, 1 - step / 6))
            assert r["mask_mean"] == pytest.approx(sum(r["mask_layers"]) / 2, abs=1e-4)
            assert step >= 16 or abs(r["mask_mean"] - r["mask_target"]) <= 0.01
            assert step < 16 or r["mask_layers"] == [0, 0]
    if way == "paper":  # the student starts as the source
        assert abs(metrics[0]["loss"]) < 1e-5 and metrics[4]["loss"] > 1e-3
        assert metrics[16]["loss"] < 1.2 * metrics[15]["loss"]


def assert_nearly_same_run(out, whole):
    found, wanted = read_metrics(out), read_metrics(whole)
    for step in wanted:
        assert found[step]["loss"] == pytest.approx(wanted[step]["loss"], abs=1e-5)
    (_, a), (_, b) = (m.load_checkpoint(p / "gqa") for p in (out, whole))
    assert max((a[n] - b[n]).abs().max() for n in a) < 1e-5


def assert_same_run(out, whole):
    found, wanted = read_metrics(out), read_metrics(whole)
    for record in (*found.values(), *wanted.values()):
        del record["tokens_per_second"]
    assert found == wanted
    (_, a), (_, b) = (m.load_checkpoint(p / "gqa") for p in (whole, out))
    assert same_weights(a, b)


@pytest.mark.slow
@each_way
def test_two_processes_make_the_same_run(runs, way):
    assert_nearly_same_run(runs(way, processes=2)[0], runs(way)[0])


def start_group(arguments, processes, prepare=lambda: None):
    """The run's processes, told of each other as torchrun tells them."""
    def begin():
        heed_signals()
        prepare()

    with socket.socket() as s:
        s.bind(("localhost", 0))
        port = s.getsockname()[1]
    for rank in range(processes):
        environment = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": processes,
                       "LOCAL_WORLD_SIZE": processes, "MASTER_ADDR": "localhost",
                       "MASTER_PORT": port}
        yield subprocess.Popen(
            [sys.executable, TRAINER, *arguments], text=True,
            env={**ONE_THREAD, **{name: str(value) for name, value in environment.items()}},
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, preexec_fn=begin)


def stop_after(steps, group, out, number=signal.SIGTERM):
    """Send one process of a run a signal, or all of them SIGKILL, when it has made so many steps;
    returns what the first has printed."""
    while not (out / "metrics.jsonl").exists() or len(read_metrics(out)) < steps:
        assert all(p.poll() is None for p in group), group[0].communicate()
        time.sleep(0.01)
    for p in group if number == signal.SIGKILL else group[:1]:
        p.send_signal(number)
    return [p.communicate()[0] for p in group][0]


def end(arguments, processes):
    """Let a run end; what the first process printed."""
    group = list(start_group(arguments, processes))
    printed = [p.communicate()[0] for p in group]
    assert [p.returncode for p in group] == [0] * processes, printed
    return printed[0]


@pytest.fixture(scope="session")
def stopped(trained, tmp_path_factory):
    """OUT of the paper's way by two processes, of which one got SIGTERM at step 10; MODEL and the
    text are OUT's neighbours."""
    folder = tmp_path_factory.mktemp("stopped")
    shutil.copytree(trained / "mha", folder / "mha")
    shutil.copyfile(trained / "short.jsonl", folder / "short.jsonl")
    group = list(start_group(train_arguments(folder, folder / "out"), 2))
    printed = stop_after(10, group, folder / "out")
    assert [p.returncode for p in group] == [130, 130]  # both write a checkpoint and end
    assert "the same command continues" in printed and "Traceback" not in printed
    assert not (folder / "out/gqa").exists() and 10 <= len(read_metrics(folder / "out")) < 20
    return folder


@pytest.fixture
def continued(stopped, tmp_path):
    """A copy of `stopped`, MODEL and text, too, and the arguments with which it goes on."""
    shutil.copytree(stopped, tmp_path / "run")
    return tmp_path / "run/out", train_arguments(tmp_path / "run", tmp_path / "run/out")


@pytest.mark.slow
def test_a_stopped_run_continues_bit_for_bit(runs, continued):
    """With the tokens that it began with, whatever has happened to the text."""
    out, arguments = continued
    with open(out / "metrics.jsonl", "a") as file:  # what kills leave
        file.write('{"stage": "dis')
    (out / "gqa.partial").mkdir()
    (out / "checkpoints/step_19").mkdir()
    (out.parent / "short.jsonl").write_text("")
    end(arguments, 2)
    assert_same_run(out, runs("paper", 2)[0])
    assert sorted(os.listdir(out)) == ["checkpoints", "gqa", "lock", "metrics.jsonl", "report.json"]


@pytest.mark.slow
def test_a_run_continues_on_another_number_of_processes(runs, continued):
    out, arguments = continued
    end(arguments, 1)
    assert_nearly_same_run(out, runs("paper")[0])


@pytest.mark.slow
def test_a_run_of_one_process_that_was_killed_continues_bit_for_bit(trained, runs, tmp_path):
    out, arguments = tmp_path / "out", train_arguments(trained, tmp_path / "out", "default")
    stop_after(10, list(start_group(arguments, 1)), out, signal.SIGKILL)
    end(arguments, 1)
    assert_same_run(out, runs("default")[0])


@pytest.mark.slow
@pytest.mark.parametrize("damage", ["the newest", "all"])
def test_checkpoints_that_cannot_be_read(runs, continued, damage):
    """The newest is named and skipped; with none left that is an error, no new beginning."""
    out, arguments = continued
    found = train_gqa.checkpoints(out / "checkpoints")
    assert len(found) == 2
    for path in found if damage == "all" else found[1:]:
        file = path / ("masks.pt" if path == found[0] else "__1_0.distcp")
        file.write_bytes(file.read_bytes()[:100])
    if damage == "all":
        group = list(start_group(arguments, 2))
        printed = [p.communicate()[0] for p in group][0]
        assert [p.returncode for p in group] == [2, 2]
        assert re.search("^error: .*none of its checkpoints can be read", printed, re.M)
    else:
        printed = end(arguments, 2)
        assert_same_run(out, runs("paper", 2)[0])
    assert len(re.findall("^warning: .*step_.* cannot be read", printed, re.M)) == (
        2 if damage == "all" else 1)
    assert "Traceback" not in printed


@pytest.mark.slow
def test_attention_alone_is_trained(trained, runs, tmp_path):
    """On both ways the other weights stay the source's."""
    _, source = m.load_checkpoint(trained / "mha")
    for way in WAYS:
        out = tmp_path / way
        train_run(train_arguments(trained, out, way, "--train", "attention"))
        scores = read_json(out)["scores"]
        assert scores["distilled"]["kl"] < scores["converted"]["kl"]
        _, weights = m.load_checkpoint(out / "gqa")
        for name, w in source.items():
            same = weights[name].shape == w.shape and torch.equal(weights[name], w)
            assert same == ("self_attn" not in name and "norm" not in name), name


@pytest.mark.slow
def test_a_run_from_what_the_converter_wrote(trained, converted, tmp_path):
    """No conversion, and the rate is the one after a refit."""
    start, report = converted("mha", 2)
    out = tmp_path / "out"
    arguments = train_arguments(trained, out, "default", "--start-from", start,
                                "--eval-text", trained / "text.jsonl")
    at = arguments.index("--lr")
    train_run([*arguments[:at], *arguments[at + 2 :]])
    scores = read_json(out)["scores"]
    assert scores["converted"]["kl"] < 0.3 * scores["mean_pooled"]["kl"]
    assert max(r["lr"] for r in read_metrics(out).values()) == pytest.approx(3e-3 / 8, rel=0.05)
    written = read_json(out / "gqa", "mha2gqa.json")
    assert all(written[name] == report[name] for name in ("method", "layers"))


@pytest.mark.slow
def test_finished_runs_print_their_table_again(trained, runs, command):
    out, printed = runs("paper")
    status, again, err = command(
        *train_arguments(trained, out, "paper", "--save-every", 5), program=train_gqa)
    assert (status, err) == (0, "") and f"the run of {trained / 'mha'} that began" in again
    assert printed.endswith(again.split("\n", 1)[1]) and "distilled" in again


@pytest.mark.slow
def test_plots_of_trainings(runs, tmp_path):
    pytest.importorskip("matplotlib")
    (paper, _), (default, _) = runs("paper"), runs("default")
    for folders in ([paper], [default], [paper, default], [default / "gqa"]):
        m.plot(folders, tmp_path / "plot.png")
        assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")
        (tmp_path / "plot.png").unlink()


@pytest.mark.slow
def test_a_full_disk_ends_a_run_in_one_line(trained, runs, tmp_path):
    """At the tokens, a checkpoint, the result; with room again the same command continues."""
    out = tmp_path / "out"
    for limit, save_every in (20_000, 4), (500_000, 4), (300_000, 500):
        arguments = train_arguments(trained, out, "default", "--save-every", save_every)
        (run,) = start_group(arguments, 1, lambda limit=limit: resource.setrlimit(
            resource.RLIMIT_FSIZE, (limit, limit)))
        printed = run.communicate()[0]
        assert run.returncode == 2 and "Traceback" not in printed
        assert len(re.findall("^error: ", printed, re.M)) == 1 and not (out / "gqa").exists()
    end(arguments, 1)
    assert_same_run(out, runs("default")[0])


def test_a_loss_that_is_not_finite_stops_the_run(trained, tmp_path, command):
    out = tmp_path / "out"
    status, _, err = command(*train_arguments(trained, out, "paper", "--lr", "1e30"),
                             program=train_gqa)
    assert status == 2 and not (out / "gqa").exists()
    assert re.search(r"^error: distill, step \d+: the loss is \S+, its gradient's norm", err, re.M)


def test_the_demo_makes_its_source_first(tmp_path, command, monkeypatch):
    """It asks no hub for it, although its name could be one there."""
    monkeypatch.chdir(tmp_path)

    def make(*_):
        raise ValueError("as far as that")

    monkeypatch.setattr(train_gqa, "make_demo_source", make)
    monkeypatch.setattr("huggingface_hub.snapshot_download", None)
    assert command(program=train_gqa)[::2] == (2, "error: as far as that\n")


@pytest.fixture
def stack():
    with contextlib.ExitStack() as stack:
        yield stack


@contextlib.contextmanager
def held_by_another(path):
    """A process that holds the lock of a run."""
    lock = "import fcntl, sys; f = open(sys.argv[1], 'r+'); fcntl.lockf(f, 2); print(); input()"
    with subprocess.Popen([sys.executable, "-c", lock, path], stdin=subprocess.PIPE,
                          stdout=subprocess.PIPE) as other:
        other.stdout.readline()
        yield
        other.stdin.close()


BAD_TRAINING = {  # what is said: more arguments
    "/nowhere: no such directory": ["--model", "/nowhere"],
    "3 KV heads: the source has 8, choose one of 1, 2, 4": ["--kv-heads", "3"],
    "/nowhere.txt: no such file": ["--text", "/nowhere.txt"],
    "holds none of the folders boolq, piqa": ["--tasks", "."],
    "other: its vocab_size is 97, expected 384": ["--teacher", "{other}"],
    "gqa: its num_key_value_heads is 4, expected 8": [
        "--align", "linear", "--teacher", "{trained}/gqa"],
    "mha: its num_key_value_heads is 8, expected 2": [
        "--start", "{trained}/mha", "--eval-text", "{trained}/text.jsonl"],
    "start: its model.embed_tokens.weight is not .*: made of another model": [
        "--start", "{start}", "--eval-text", "{trained}/text.jsonl"],
    "sequence length 65: expected 2 to 64": ["--seq-len", "65"],
    "trained.*: exists and is not a run of this program": ["--out", "{trained}"],
    "holds a run with --lr 0.001, not 1.0; choose another --out": ["--out", "{run}", "--lr", "1"],
    "other: not the model of the run in .*run; choose another": [
        "--out", "{run}", "--model", "{other}"],
    "held: another process trains there": ["--out", "{held}"],
    "begun: another process trains there": ["--out", "{begun}"],
}


@pytest.mark.parametrize("message", BAD_TRAINING)
def test_bad_input_of_the_trainer(trained, tmp_path, refused, message, stack):
    names = ("run", "held", "begun", "other", "start")
    places = {name: tmp_path / name for name in names} | {"trained": trained}
    args = train_gqa.parse_arguments(train_arguments(trained, places["run"]))
    identity = train_gqa.Checkpoint(Path(), *m.load_checkpoint(trained / "mha")).identity()
    for name in ("run", "held", "begun"):
        places[name].mkdir()
        if name != "begun":
            m.write_json(places[name] / "report.json", {
                "arguments": train_gqa.fixed_arguments(args), "identity": identity,
                "source": "x", "date": "y", "scores": {}})
        (places[name] / "lock").touch()
        if name != "run":
            stack.enter_context(held_by_another(places[name] / "lock"))
    save_checkpoint(places["other"], config_of(), random_weights(config_of()))
    config = dataclasses.replace(m.load_config(trained / "mha"), num_key_value_heads=2)
    save_checkpoint(places["start"], config, random_weights(config))
    more = [x.format(**places) for x in BAD_TRAINING[message]]
    refused(message, *train_arguments(trained, tmp_path / "out", "paper", *more), program=train_gqa)


@pytest.mark.parametrize("message, more", [
    ("--steps 0: expected more than 0", ["--steps", "0"]),
    ("--lr -1.0: expected more than 0", ["--lr", "-1"]),
    ("--lr nan: expected more than 0", ["--lr", "nan"]),
    ("--seed -1: expected more than 0, or 0", ["--seed", "-1"]),
    ("unrecognized arguments: --modell x", ["--modell", "x"]),
    ("--start-from and --text need --eval-text, too", ["--start", "x"]),
    ("metric cos: linear", ["--align", "linear", "--metric", "cos"])])
def test_wrong_options_of_the_trainer(trained, tmp_path, command, message, more):
    status, _, err = command(
        *train_arguments(trained, tmp_path / "out", "paper", *more), program=train_gqa)
    assert status == 2 and message in err and not list(tmp_path.iterdir())


def test_rows_that_processes_cannot_share(alone, trained, tmp_path, monkeypatch):
    args = train_gqa.parse_arguments(train_arguments(trained, tmp_path / "out"))
    rows = train_gqa.text_batch(torch.zeros(9, 64, dtype=torch.int64))
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 3)
    with pytest.raises(ValueError, match="8 rows a step cannot be shared by 3 processes; choose a "
                                         "multiple of 192"):
        train_gqa.make_schedule(args, "distill", config_of(), rows)


# ---- the trainer: its parts ----------------------------------------------------------------------


@pytest.fixture
def source(alone, trained):
    return train_gqa.Checkpoint.open(trained / "mha")


def sharded(source, trained="all", **how):
    """A sharded model of the source's weights."""
    model = train_gqa.shard(train_gqa.meta_model(source.config, trained=trained), **how)
    return train_gqa.load_sharded(model, source.parts())


def test_masks_open_are_the_source_and_closed_the_written_model(source, tmp_path):
    config, tokens = source.config, random_tokens(source.config, time=64)
    rows = train_gqa.text_batch(random_tokens(config, batch=60, time=64))
    blocks = train_gqa.student_blocks(source, rows, 2, m.Method(align="rotation"), True, [])
    model = train_gqa.shard(train_gqa.meta_model(config, 2))
    train_gqa.load_sharded(model, source.parts(blocks))
    masks = train_gqa.Masks(model, 20, 1e-2, seed=0)

    def logits():
        with torch.no_grad():
            return model(tokens)

    masks.draw(0)
    wanted = logits_of(config, source.weights, tokens)
    assert (logits() - wanted).abs().max() <= 1e-5 * wanted.abs().max()
    masks.draw(3)
    assert (logits() - wanted).abs().max() > 1e-2 * wanted.abs().max()
    masks.draw(16)
    closed = logits()
    model.reshard()
    train_gqa.save_model(tmp_path / "gqa", model, m.gqa_config(config, 2), source, source)
    with torch.no_grad():
        found = transformers_model(tmp_path / "gqa")(tokens).logits
    assert (found - closed).abs().max() <= 1e-5 * closed.abs().max()


def test_fading_projections_mix_head_by_head():
    config = config_of("qwen2", num_attention_heads=4, num_key_value_heads=4)
    layer = train_gqa.FadingLinear(config, 2)
    layer.z_K = torch.tensor([1.0, 0.25, 0.0, 0.5])
    x = torch.randn(3, config.hidden_size)
    old, new = F.linear(x, layer.weight, layer.bias).view(3, 4, -1), layer.new(x).view(3, 2, -1)
    wanted = [old[:, 0], 0.25 * old[:, 1] + 0.75 * new[:, 0], new[:, 1],
              0.5 * old[:, 3] + 0.5 * new[:, 1]]
    assert torch.allclose(layer(x), torch.cat(wanted, -1), atol=1e-6)


def test_losses_in_chunks_are_the_losses_at_once(alone, monkeypatch):
    """3,000 predictions in chunks of 1,092; values and gradients, of tasks and of text."""
    monkeypatch.setattr(train_gqa, "CHUNK", 2**16)
    generator = torch.Generator().manual_seed(0)
    config = config_of(vocab_size=60, hidden_size=16, head_dim=8, num_attention_heads=2,
                       num_key_value_heads=2, max_position_embeddings=3000)
    weights = random_weights(config)
    teacher = sharded(train_gqa.Checkpoint(Path(), config, weights), "none")
    tokens = random_tokens(config, batch=1, time=3000)
    bits = torch.randint(4, (1, 3000), generator=generator)
    batch = train_gqa.TokenBatch(tokens, bits)
    hidden, head = (torch.randn(*shape, 16, generator=generator).requires_grad_()
                    for shape in ((1, 3000), (60,)))
    student, wanted = F.linear(hidden, head), logits_of(config, weights, tokens)
    kl = m.kl_loss(student, wanted)[bits & 1 > 0].sum()
    bild = m.bild_loss(student, wanted)[bits & 2 > 0].sum()
    found = train_gqa.distillation(teacher).losses_of(batch)(hidden, head)
    assert torch.allclose(found, torch.stack([kl, bild]), rtol=1e-5)
    pairs = zip(torch.autograd.grad(found.sum(), (hidden, head)),
                torch.autograd.grad(kl + bild, (hidden, head)), strict=True)
    assert all(torch.allclose(a, b, rtol=1e-4, atol=1e-4) for a, b in pairs)
    nats = F.cross_entropy(student[0, :-1], tokens[0, 1:], reduction="none")
    bits[0, -1] = 0
    found = train_gqa.cross_entropy().losses_of(batch)(hidden, head)
    assert torch.allclose(found, nats[bits[0, :-1] & 2 > 0].sum()[None], rtol=1e-5)


@pytest.mark.parametrize("how", [(), ("recompute",), ("recompute", "offload", "compiled")])
def test_micro_batches_add_up(source, how):
    """160 rows of 64 tokens go through the model in two parts; gradients as of all at once."""
    if "compiled" in how and not any(map(shutil.which, ("c++", "g++", "clang++", "cl"))):
        pytest.skip("no C++ compiler")
    config = source.config
    model = sharded(source, **dict.fromkeys(how, True))
    rows = train_gqa.text_batch(random_tokens(config, batch=160, time=64))
    assert len(list(train_gqa.micro_batches(rows))) == 2
    found = train_gqa.backward(model, rows, train_gqa.cross_entropy())
    plain = m.Llama(config)
    plain.load_state_dict(source.weights)
    tokens = rows.tokens.long()
    loss = F.cross_entropy(plain(tokens)[:, :-1].flatten(0, 1), tokens[:, 1:].flatten())
    loss.backward()
    assert found.item() == pytest.approx(loss.item(), rel=1e-5)
    for (name, p), wanted in zip(model.named_parameters(), plain.parameters(), strict=True):
        gradient = p.grad.full_tensor()
        assert torch.allclose(gradient, wanted.grad, rtol=1e-3, atol=1e-6), name


def test_what_is_not_trained_is_written_as_it_was(source, tmp_path):
    """Even if it is held in another precision, as on GPUs."""
    model = sharded(source, "attention")
    rows = train_gqa.text_batch(random_tokens(source.config, batch=2, time=16))
    train_gqa.backward(model, rows, train_gqa.cross_entropy())
    with torch.no_grad():
        for name, p in model.named_parameters():
            frozen = "mlp" in name or "embed" in name or "lm_head" in name
            assert (p.grad is None) == frozen, name
            if frozen:
                p.zero_()
    train_gqa.save_model(tmp_path / "out", model, source.config, source, source)
    _, written = m.load_checkpoint(tmp_path / "out")
    assert same_weights(dict(source.weights), written)


def test_exact_match_is_what_greedy_generation_gives(source):
    config, weights = source.config, source.weights
    model = sharded(source, "none")
    coded = []
    for n in range(12):
        ids = random_tokens(config, batch=1, time=4 + n, seed=n)
        for _ in range(1 + n % 5):
            best = logits_of(config, weights, ids)[:, -1:].argmax(-1)
            ids = torch.cat([ids, best], 1)
        coded.append((ids[0].tolist(), 4 + n))

    def score():
        return train_gqa.exact_match(model, train_gqa.pack_examples(coded, 40, seed=0), "test")

    assert score() == 1
    for n in (1, 6, 10):  # the first token of the answer is another
        coded[n][0][4 + n] += 1 if coded[n][0][4 + n] < 300 else -1
    assert score() == pytest.approx(9 / 12)


# Of each task a record as published, the label beside it, and the prompt made of it; "y" is right.
TASK_RECORDS = {
    "boolq": ({"question": "is it", "passage": "P.", "label": False}, None,
              "P.\nQuestion: is it?\nChoices: ['true', 'false']\nAnswer:"),
    "piqa": ({"goal": "G", "sol1": "x", "sol2": "y"}, "1",
             "Goal: G\nChoose the most sensible solution to achieve the goal. Choices: ['x', 'y']\n"
             "Answer:"),
    "siqa": ({"context": "C", "question": "Q", "answerA": "x", "answerB": "y", "answerC": "z"}, "2",
             "C\nQuestion: Q\nChoices: ['x', 'y', 'z']\nAnswer:"),
    "winogrande": ({"sentence": "S _.", "option1": "x", "option2": "y", "answer": "2"}, None,
                   "Choose the most sensible text to replace the \"_\" in the following sentence: "
                   "S _.\nChoices: ['x', 'y']\nAnswer:"),
    "arc-c": ({"question": {"stem": "S", "choices": [
        {"text": "x", "label": "1"}, {"text": "y", "label": "2"}]}, "answerKey": "2"}, None,
        "Question: S\nChoices: ['x', 'y']\nAnswer:"),
    "openbookqa": ({"question": {"stem": "S", "choices": [
        {"text": "x", "label": "A"}, {"text": "y", "label": "B"}]}, "answerKey": "B"}, None,
        "Question: S\nChoices: ['x', 'y']\nAnswer:"),
    "hellaswag": ({"ctx": "C d", "endings": ["x", "y"], "label": 1}, None,
                  "Please choose the most appropriate text to complete the passage below:\n"
                  "Passage: C d\nChoices: ['x', 'y']\nAnswer:"),
}


def write_task(folder, task, n=1, dev=False, broken=None):
    """A task's file of n records and, behind them, a broken one."""
    record, label, _ = TASK_RECORDS[task]
    file = folder / task / train_gqa.TASKS[task][1 + dev]
    file.parent.mkdir(exist_ok=True)
    lines = [json.dumps(record)] * n + ([broken] if broken else [])
    file.write_text("\ufeff" + "\r\n \n".join(lines) + "\n", encoding="utf-8")
    if label:
        file.with_name(f"{file.stem}-labels.lst").write_text(f"{label}\n" * len(lines))


@pytest.mark.parametrize("task", TASK_RECORDS)
def test_tasks_as_they_are_published(tmp_path, task):
    write_task(tmp_path, task, 2)
    answer = "false" if task == "boolq" else "y"
    assert train_gqa.read_task(tmp_path, task, False) == [(TASK_RECORDS[task][2], answer)] * 2
    for broken in ("{}", "x", "[1]", json.dumps({**TASK_RECORDS[task][0], "label": -1, "answer": 9,
                                                 "answerKey": "Z", "context": None, "goal": 3})):
        if task in ("piqa", "siqa") and broken[0] == "{" and len(broken) > 2:
            continue  # their labels are beside them
        write_task(tmp_path, task, 2, broken=broken)
        with pytest.raises(ValueError, match=f"record 3: not of {task}"):
            train_gqa.read_task(tmp_path, task, False)


def test_labels_of_tasks_must_be_as_many_as_the_records(tmp_path):
    write_task(tmp_path, "piqa", 2)
    (tmp_path / "piqa/train-labels.lst").write_text("1\n")
    with pytest.raises(ValueError, match="train.jsonl.*not of piqa"):
        train_gqa.read_task(tmp_path, "piqa", False)
    (tmp_path / "piqa/train-labels.lst").unlink()
    with pytest.raises(OSError, match="train-labels.lst"):
        train_gqa.read_task(tmp_path, "piqa", False)


@pytest.fixture(scope="session")
def task_arguments(trained, tmp_path_factory):
    """The arguments of a run on two small tasks, all but --out."""
    tasks = tmp_path_factory.mktemp("tasks")
    for task, dev in itertools.product(("boolq", "openbookqa"), (False, True)):
        write_task(tasks, task, 20, dev)
    return [str(x) for x in ("--model", trained / "mha", "--kv-heads", "4", "--tasks", tasks,
            "--sft-epochs", "6", "--steps", "8", "--batch-tokens", "128", "--lr", "3e-3",
            "--calibration-tokens", "2048")]


@pytest.fixture(scope="session")
def tuned(task_arguments, tmp_path_factory):
    """(OUT, what it printed) of the run on tasks."""
    out = tmp_path_factory.mktemp("tuned") / "out"
    return out, train_run([*task_arguments, "--out", out])


@pytest.mark.slow
def test_tasks_from_fine_tuning_to_the_table(trained, tuned):
    out, printed = tuned
    assert re.search(r"boolq train: 20 examples", printed)
    scores = read_json(out)["scores"]
    assert list(scores) == ["source", "teacher", "mean_pooled", "converted", "distilled"]
    for found in scores.values():
        assert found["mean"] == (found["boolq"] + found["openbookqa"]) / 2
    assert scores["source"]["mean"] < scores["teacher"]["mean"]
    losses = [r["cross_entropy"] for r in read_metrics(out, "fine-tune").values()]
    assert losses[-1] < 0.7 * losses[0]
    source, teacher = (m.load_checkpoint(p)[1] for p in (trained / "mha", out / "teacher"))
    assert source.keys() == teacher.keys() and not same_weights(source, teacher)


@pytest.mark.slow
def test_tasks_with_text_and_a_teacher_by_two_processes(trained, tuned, task_arguments, tmp_path):
    """No fine-tuning, no masks, and less memory; what is converted is the teacher."""
    out = tmp_path / "out"
    train_run([*task_arguments, "--out", out, "--teacher", tuned[0] / "teacher", "--text",
               trained / "short.jsonl", "--no-masks", "--checkpoint-activations", "--lr", "1e-4"],
              TORCHRUN)
    scores = read_json(out)["scores"]
    assert list(scores["distilled"]) == ["loss", "kl", "boolq", "openbookqa", "mean"]
    assert abs(scores["teacher"]["kl"]) < 1e-6
    assert scores["converted"]["kl"] < 0.1 * scores["source"]["kl"]
    assert scores["distilled"]["kl"] < scores["converted"]["kl"]


def test_packed_examples_keep_everything_apart():
    examples = [("p" * n, "q" * (1 + n % 4)) for n in range(3, 40)]
    coded = train_gqa.encode_examples(examples, letters, [2], seq_len=32)
    assert [len(ids) for ids, _ in coded] == [
        min(32, 1 + n + 1 + 1 + n % 4 + 1) for n in range(3, 40)]
    rows = train_gqa.pack_examples(coded, 32, seed=0)
    for n, (ids, prompt) in enumerate(coded):
        at = rows.document == n
        assert at.any(1).sum() == 1 and rows.tokens[at].tolist() == ids and ids[-1] == 2
        assert rows.loss_bits[at].tolist() == (
            [train_gqa.PROMPT] * (prompt - 1) + [train_gqa.ANSWER] * (len(ids) - prompt) + [0])
    assert (rows.loss_bits[rows.document < 0] == 0).all()
    assert (rows.document >= 0).float().mean() > 0.8


def test_batches_are_permutations_of_the_rows():
    rows = train_gqa.text_batch(torch.arange(10)[:, None].expand(10, 4))
    seen = torch.cat([train_gqa.batch_of_step(rows, step, 4, seed=1).tokens[:, 0]
                      for step in range(5)])
    assert sorted(seen[:10].tolist()) == sorted(seen[10:].tolist()) == list(range(10))
    assert seen[:10].tolist() != seen[10:].tolist()


@pytest.mark.parametrize("target", [0.0, 0.1, 0.5, 1.0])
def test_masks_are_shifted_onto_their_target(target):
    log_alpha = 3 * torch.randn(4, 8, generator=torch.Generator().manual_seed(0))
    shifted = log_alpha + train_gqa.shift_to(log_alpha, target)
    assert abs(m.open_probability(shifted).mean() - target) <= 0.0051


def test_rates_by_width_length_and_start(alone):
    def rates(steps, width, *more, stage="distill"):
        args = train_gqa.parse_arguments([
            "--model", "x", "--kv-heads", "1", "--out", "x", "--text", "x.txt", "--align",
            "rotation", "--steps", str(steps), "--sft-epochs", str(steps), *more])
        rows = train_gqa.text_batch(torch.zeros(1, 131_072, dtype=torch.int64))
        return train_gqa.make_schedule(args, stage, config_of(hidden_size=width), rows)[3:5]

    assert rates(20_000, 4096) == pytest.approx((1e-5, 1e-2))  # the paper's
    assert rates(100, 1024) == pytest.approx((4e-4, 1.0))
    assert rates(100, 1024, "--refit") == pytest.approx((5e-5, 1.0))
    assert rates(100, 1024, "--start", "x", "--eval-text", "x.txt") == pytest.approx((5e-5, 1.0))
    assert rates(100, 1024, "--refit", stage="fine-tune") == pytest.approx((4e-4, 1.0))
    assert rates(1000, 4096, "--refit") == pytest.approx((1e-5, 0.1))
    assert rates(1, 64) == pytest.approx((3e-3, 100.0))
    assert rates(100, 1024, "--refit", "--lr", "0.1") == pytest.approx((0.1, 1.0))


@pytest.mark.parametrize("more, masks", [
    (["--align", "rotation"], True), (["--align", "rotation", "--refit"], False),
    (["--align", "none"], True), ([], False), (["--align", "rotation", "--no-masks"], False),
    (["--align", "rotation", "--start", "x", "--eval-text", "x.txt"], False)])
def test_what_changes_more_than_keys_and_values_goes_without_masks(more, masks):
    args = train_gqa.parse_arguments(["--model", "x", "--kv-heads", "1", "--out", "x", "--text",
                                      "x.txt", *more])
    assert bool(args.masks) == masks


@pytest.mark.slow
@pytest.mark.benchmark
def test_the_speed_of_a_step(source, capsys):
    teacher, student = sharded(source, "none"), sharded(source)
    rows = train_gqa.text_batch(random_tokens(source.config, batch=128, time=64))
    objective, seconds = train_gqa.distillation(teacher), []
    for _ in range(5):
        start = time.perf_counter()
        train_gqa.backward(student, rows, objective)
        seconds.append(time.perf_counter() - start)
    with capsys.disabled():
        print(f"\n{128 * 64 / sorted(seconds)[2]:,.0f} tokens a second of a step of training")


# ---- faults --------------------------------------------------------------------------------------


def kill_at_random(arguments, out, processes, rng, longest):
    """Start a run and kill one or all of its processes; returns whether it ended before."""
    group = list(start_group(arguments, processes))
    stop = time.monotonic() + rng.uniform(0, longest)
    while time.monotonic() < stop and any(p.poll() is None for p in group):
        time.sleep(0.01)
    if all(p.poll() is not None for p in group):
        assert all(p.returncode == 0 for p in group), [p.communicate()[0] for p in group]
        return True
    for p in rng.choice([group, [rng.choice(group)]]):
        p.kill()
    time.sleep(0.1)
    for p in group:
        p.terminate()  # as torchrun does when one of its processes has ended
    time.sleep(1)
    for p in group:
        p.kill()  # and then
        p.communicate()
    if (out / "gqa").exists():
        m.load_checkpoint(out / "gqa")  # whole
    return False


@pytest.mark.slow
@pytest.mark.long
def test_kills_at_random_moments(trained, tmp_path, runs, capfd):
    """20 runs of each way, by one and two processes, each killed up to three times, end as one that
    was not killed, bit for bit."""
    rng, kills = random.Random(0), {(way, n): 0 for way in WAYS for n in (1, 2)}
    for n_run, run in enumerate([*kills] * 5):
        (way, processes), out = run, tmp_path / f"{n_run}"
        arguments = train_arguments(trained, out, way, "--save-every", 1)
        for _ in range(3):
            if kill_at_random(arguments, out, processes, rng, longest=10):
                break
            kills[run] += 1
        end(arguments, processes)
        assert_same_run(out, runs(way, processes)[0])
        assert sorted(os.listdir(out)) == [
            "checkpoints", "gqa", "lock", "metrics.jsonl", "report.json"]
    with capfd.disabled():
        print(f"\n{sum(kills.values())} kills by way and processes, all without loss: {kills}")


def odd_json(value, rng):
    """A JSON value with something in it changed, dropped or nested."""
    if isinstance(value, (dict, list)) and value and rng.random() < 0.9:
        new = value.copy()
        key = rng.choice(list(new) if isinstance(new, dict) else range(len(new)))
        if rng.random() < 0.1:
            del new[key]
        else:
            new[key] = odd_json(new[key], rng)
        return new
    return rng.choice([None, True, -1, 0, 3, 2**31, 10**400, 1e308, math.nan, "", "x", "\ud800", [],
                       {}, [value], [[[]]]])


def odd_bytes(content, rng):
    """Bytes that are truncated, lengthened, flipped, emptied, or partly zeros."""
    at = rng.randrange(len(content) + 1) if rng.random() < 0.7 else min(len(content), 8)
    flipped = bytearray(content)
    for _ in range(rng.choice([1, 3, 100]) if content else 0):
        flipped[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
    return rng.choice([content[:at], content + content[:at], bytes(flipped), b"",
                       content[:at] + bytes(len(content) - at), rng.randbytes(100)])


@pytest.mark.slow
@pytest.mark.long
def test_broken_folders_end_in_one_line(trained, tmp_path, command, capfd):
    """A file with odd bytes or JSON, gone, or in another's place: it converts, or is refused."""
    config, found = config_of(vocab_size=384), {"converted": 0, "refused": 0}
    save_in_shards(tmp_path / "whole", config, random_weights(config), trained / "mha")
    (tmp_path / "text.txt").write_text("Some words of text. " * 100)
    for seed in range(500):
        rng, folder = random.Random(seed), tmp_path / "x"
        shutil.copytree(tmp_path / "whole", folder)
        file, other = rng.sample(sorted(folder.iterdir()), 2)
        if file.suffix == ".json" and rng.random() < 0.7:
            file.write_text(json.dumps(odd_json(json.loads(file.read_text()), rng)))
        elif rng.random() < 0.2:
            file.replace(other)
        else:
            file.write_bytes(odd_bytes(file.read_bytes(), rng))
        status, _, err = command(folder, tmp_path / "out", "--kv-heads", 2, "--text",
                                 tmp_path / "text.txt", "--tokens", 128, "--seq-len", 16,
                                 "--no-refit")
        said = [line for line in re.split("[\r\n]+", err) if line and "%|" not in line]
        assert status == 0 or status == 2 and len(said) == 1 and said[0].startswith("error: "), (
            seed, file, err)
        found["refused" if status else "converted"] += 1
        if status == 0:
            m.load_checkpoint(tmp_path / "out")
            shutil.rmtree(tmp_path / "out")
        shutil.rmtree(folder)
        assert sorted(os.listdir(tmp_path)) == ["text.txt", "whole"], (seed, file)
    with capfd.disabled():
        print(f"\n500 broken folders: {found}")
