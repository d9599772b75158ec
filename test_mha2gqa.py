"""Tests of mha2gqa.py, in its order, then of train_gqa.py. Seeded, on CPU, minutes; references are
transformers, scipy, plain loops and brute force."""

import ast
import contextlib
import dataclasses
import functools
import gzip
import io
import itertools
import json
import lzma
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
    return m._parse_config({**BASE, **CONFIGS[name], **changes})


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


def logits_of(config, weights, tokens, **keywords):
    model = m.Llama(config).to(next(iter(weights.values())).dtype)
    model.load_state_dict(weights)
    with torch.no_grad():
        return model(tokens, **keywords)


def transformers_model(path):
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()


def assert_transformers_computes_the_same(path):
    config, weights = m.load_checkpoint(path)
    tokens = random_tokens(config, time=64)
    with torch.no_grad():
        wanted = transformers_model(path)(tokens).logits
    found = logits_of(config, weights, tokens)
    assert (found - wanted).abs().max() <= 1e-5 * wanted.abs().max()


def random_tokens(config, batch=2, time=40, seed=1):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(config.vocab_size, (batch, time), generator=generator)


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
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(vocab_size=384, special_tokens=["<unk>", "<s>", "</s>"],
                                  initial_alphabet=pre_tokenizers.ByteLevel.alphabet())
    tokenizer.train_from_iterator(topics, trainer)
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
    (folder / "text.jsonl").write_text("".join(json.dumps({"text": t}) + "\n" for t in topics))
    (folder / "short.jsonl").write_text(
        "".join(json.dumps({"text": t}) + "\n" for t in topics[:20]))
    for name, kv_heads in (("gqa", 4), ("mha", 8)):
        config = config_of(vocab_size=384, hidden_size=64, intermediate_size=128, head_dim=16,
                           num_attention_heads=8, num_key_value_heads=kv_heads,
                           max_position_embeddings=64, tie_word_embeddings=name == "gqa")
        rows, _ = m.text_rows(bpe.parent, config, m.Corpus(folder / "text.jsonl", tokens=100_000))
        save_in_shards(folder / name, config, train_a_little(config, rows), bpe.parent)
    return folder


def save_in_shards(*arguments):
    """`m.save_checkpoint`, with a shard for each block, as of a large model."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(m, "_SHARD_BYTES", 0)
        m.save_checkpoint(*arguments)


@pytest.fixture(autouse=True)
def no_line_yet(monkeypatch):
    """No test prints the line of progress that is due since another one."""
    monkeypatch.setattr(m, "_last_line", [time.monotonic(), ""])


@pytest.fixture(scope="session")
def corpus(trained):
    return m.Corpus(trained / "text.jsonl", tokens=20_000)


def run(trained, source, out, kv_heads, **method):
    corpus = m.Corpus([trained / "text.jsonl"], tokens=20_000)
    return m.convert(trained / source, out, kv_heads, corpus, m.Method(**method))


@pytest.fixture(scope="session")
def converted(trained, tmp_path_factory):
    """(directory, report) of a conversion in the default way, each made once; to be read only."""
    @functools.cache
    def make(source, kv_heads):
        out = tmp_path_factory.mktemp("converted") / "out"
        return out, run(trained, source, out, kv_heads)
    return make


def test_the_public_names_are_those_without_an_underscore():
    """And each says what it is, and comes from this file."""
    tree = ast.parse(PROGRAM.read_text())
    defined = {n.name: ast.get_docstring(n) for n in tree.body
               if isinstance(n, (ast.FunctionDef, ast.ClassDef)) and n.name[0] != "_"}
    assert set(m.__all__) == defined.keys() - {"main"}
    assert all(defined[name] for name in m.__all__)
    header = PROGRAM.read_text()[:300]
    assert "SPDX-License-Identifier: Apache-2.0" in header and m.__version__


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
    weights = random_weights(config)
    m.save_checkpoint(tmp_path / "x", config, weights)
    tokens = random_tokens(config, time=200)
    with torch.no_grad():
        wanted = transformers_model(tmp_path / "x")(tokens).logits
    found = logits_of(config, weights, tokens)
    assert (found - wanted).abs().max() <= 1e-5 * wanted.abs().max()


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
def test_attention_takes_the_kernel_that_it_names(name, dtype):
    """Flash on a CPU; in packed rows a document at a time, so that none sees another."""
    config = config_of(name)
    model = m.Llama(config).to(dtype)
    tokens = random_tokens(config, batch=2, time=40)
    documents = torch.tensor([[7] * 10 + [8] * 30, [8] * 5 + [1] * 20 + [-1] * 15])
    query = torch.empty(2, 8, 40, 6, dtype=dtype)
    for document_BT, lengths in ((None, [40]), (documents, [10, 30, 5, 20, 15])):
        with AttentionCalls() as mode:
            model(tokens, document_BT).sum().backward()
        kernel = m.attention_kernel(query, packed=document_BT is not None)
        assert kernel == "flash"
        assert mode.calls == [("flash_attention", n) for n in lengths] * config.num_hidden_layers


def test_attention_on_cuda_never_stores_the_scores():
    """What is chosen there, by fake tensors: only flash knows shared heads, and float32 not it."""
    from torch._subclasses import FakeTensorMode

    with FakeTensorMode():
        for dtype, packed, kernel in (
                (torch.bfloat16, False, "flash"), (torch.float32, False, "efficient"),
                (torch.float32, True, "efficient"),
                (torch.bfloat16, True, "varlen" if m._HAS_VARLEN else "flash")):
            query = torch.empty(2, 8, 40, 64, dtype=dtype, device="cuda")
            assert m.attention_kernel(query, packed) == kernel
        narrow = torch.empty(2, 8, 40, 100, dtype=torch.bfloat16, device="cuda")
        assert m.attention_kernel(narrow, packed=True) == "flash"  # varlen wants multiples of 8


def test_hidden_states_are_what_the_head_reads():
    config = config_of()
    weights = random_weights(config)
    tokens = random_tokens(config)
    hidden = logits_of(config, weights, tokens, readout=lambda hidden, head: hidden)
    torch.testing.assert_close(hidden @ weights["lm_head.weight"].T,
                               logits_of(config, weights, tokens))


def test_both_rope_spellings_mean_the_same():
    old = config_of(rope_theta=5e5, rope_scaling=LLAMA3)
    new = config_of(rope_parameters={**LLAMA3, "rope_theta": 5e5})
    assert torch.equal(m._inverse_frequencies(old), m._inverse_frequencies(new))


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
    assert statistics.n_tokens == 60 and statistics.first_nonfinite() is None


def test_query_power_counts_all_that_read_a_unit():
    config = config_of("gqa")
    block = {n: w.double() for n, w in m.block_weights(random_weights(config), 0).items()}
    x_BTD = torch.randn(2, 9, 48, generator=torch.Generator().manual_seed(0)).double()
    normed = m._rms_norm(x_BTD, block["input_layernorm.weight"], 1e-5).flatten(0, 1)
    q_NKQE = F.linear(normed, block["self_attn.q_proj.weight"]).unflatten(
        1, (config.num_key_value_heads, -1, config.head_dim))
    wanted = q_NKQE.square().sum((0, 2)).unflatten(1, (2, -1)).sum(1)
    torch.testing.assert_close(m.block_statistics(config, block, x_BTD).query_KP, wanted)


def test_keys_have_the_same_gram_before_and_after_rope():
    config = config_of()
    k_BKTE = torch.randn(1, 4, 50, 12, generator=torch.Generator().manual_seed(0)).double()
    rope, _ = m._rope_and_ends(config, k_BKTE[:, 0])
    turned = m._apply_rope(k_BKTE, rope)
    grams = [m.key_gram(k[0].transpose(0, 1)) for k in (k_BKTE, turned)]
    torch.testing.assert_close(*grams, rtol=1e-6, atol=1e-5)  # cos and sin are float32


def test_output_roots_measure_what_the_output_projection_makes_of_values():
    config = config_of("gqa")
    block = {n: w.double() for n, w in m.block_weights(random_weights(config), 0).items()}
    root_KEE = m.block_statistics(config, block, torch.randn(1, 9, 48).double()).output_KEE
    v_NE = torch.randn(7, config.head_dim, generator=torch.Generator().manual_seed(0)).double()
    wo_DHE = block["self_attn.o_proj.weight"].unflatten(1, (4, config.head_dim))
    for unit, heads in ((0, (0, 1)), (1, (2, 3))):
        wanted = sum((v_NE @ wo_DHE[:, h].T).square().sum() for h in heads)
        torch.testing.assert_close((v_NE @ root_KEE[unit]).square().sum(), wanted)


# ---- 3 alignment ---------------------------------------------------------------------------------


def test_procrustes_by_hand():
    a = torch.tensor([[1.0, 0.0], [0.0, 2.0]])
    b = torch.tensor([[0.0, 1.0], [2.0, 0.0]])  # a with its axes exchanged: a reflection
    torch.testing.assert_close(m.procrustes(a, b), torch.tensor([[0.0, 1.0], [1.0, 0.0]]))
    # Of one plane RoPE allows only turns; Re Σ b conj(a) = 0 and Im = 1 - 4, so a quarter back.
    torch.testing.assert_close(m.rope_procrustes(a, b), torch.tensor([[0.0, -1.0], [1.0, 0.0]]),
                               atol=1e-6, rtol=0)
    for function in (m.procrustes, m.rope_procrustes):
        with pytest.raises(ValueError, match=r"of one shape, found \[2, 2\] and \[3, 2\]"):
            function(a, torch.ones(3, 2))
    with pytest.raises(ValueError, match="E is 3, but RoPE needs an even one"):
        m.rope_procrustes(torch.ones(4, 3), torch.ones(4, 3))


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


def value_gram_of(x_GMNE):
    return torch.einsum("gine,gjnf->gijef", x_GMNE, x_GMNE)


def key_gram_of(x_GMNE):
    z = torch.complex(*x_GMNE.chunk(2, dim=-1))
    return torch.einsum("ginp,gjnp->gpij", z, z.conj())


@pytest.mark.parametrize("rope", [False, True])
def test_generalized_procrustes(rope):
    x_GMNE = caches(3, 5, 60, 8)
    gram = key_gram_of(x_GMNE) if rope else value_gram_of(x_GMNE)
    maps, history = m.generalized_procrustes(gram, rope=rope)
    if rope:
        q = torch.stack([torch.stack([plane_rotation(maps[g, :, i]) for i in range(5)])
                         for g in range(3)])
        history = history.sum(-1)
    else:
        q = maps
    torch.testing.assert_close(q.mT @ q, torch.eye(8).double().expand(3, 5, 8, 8))
    torch.testing.assert_close(q[:, 0], torch.eye(8).double().expand(3, 8, 8))
    assert (history.diff(dim=0) >= 0).all() and len(history) > 2
    y = x_GMNE @ q  # the objective in Gram space is that of the caches
    pairs = sum((y[:, i] * y[:, j]).sum((1, 2)) for i, j in itertools.combinations(range(5), 2))
    torch.testing.assert_close(history[-1], pairs)
    plain = sum((x_GMNE[:, i] * x_GMNE[:, j]).sum((1, 2))
                for i, j in itertools.combinations(range(5), 2))
    assert (pairs > plain).all()
    # At the optimum every head stands best against the sum of the others.
    for i in range(5):
        others = y.sum(1) - y[:, i]
        solve = m.rope_procrustes if rope else m.procrustes
        for g in range(3):
            best = (y[g, i] @ solve(y[g, i], others[g]) * others[g]).sum()
            assert best <= (y[g, i] * others[g]).sum() * (1 + 1e-6)


@pytest.mark.parametrize("rope", [False, True])
def test_generalized_procrustes_undoes_known_maps(rope):
    shared = caches(2, 1, 60, 8).expand(2, 4, 60, 8)
    if rope:
        c = phases(2, 4, 4)
        q = torch.stack([torch.stack([plane_rotation(c[g, i]) for i in range(4)])
                         for g in range(2)])
    else:
        q = orthogonal(2, 4, 8)
        assert {round(d.item()) for d in torch.linalg.det(q).flatten()} == {-1, 1}
    x = shared @ q
    gram = key_gram_of(x) if rope else value_gram_of(x)
    maps, history = m.generalized_procrustes(gram, rope=rope)
    if rope:
        maps = torch.stack([torch.stack([plane_rotation(maps[g, :, i]) for i in range(4)])
                            for g in range(2)])
    y = x @ maps
    torch.testing.assert_close(y, y[:, :1].expand_as(y))
    assert len(history) <= 2  # the pairwise start is already there


def test_momentum_takes_less_than_half_of_the_rounds():
    """Of plain ones, on heads that have nothing in common; and it ends no lower."""
    noise = torch.randn(1, 4, 2000, 32, generator=torch.Generator().manual_seed(0)).double()
    gram = value_gram_of(noise)
    _, history = m.generalized_procrustes(gram)
    maps = m._polar(gram[:, :, 0])
    objective, rounds = [m._inner_products(gram, maps).triu(1).sum()], 0
    while rounds < 2 or objective[-1] - objective[-2] > 1e-8 * objective[-1]:
        for i in range(4):
            maps, rounds = m._rotate_head(gram, maps, i), rounds + (i == 0)
        objective.append(m._inner_products(gram, maps).triu(1).sum())
    assert 2 * len(history) < rounds and history[-1] > (1 - 1e-5) * objective[-1]


def test_a_pair_is_done_at_the_start():
    x = caches(4, 2, 50, 6)
    maps, history = m.generalized_procrustes(value_gram_of(x))
    assert len(history) == 1
    for g in range(4):
        torch.testing.assert_close(maps[g, 1], m.procrustes(x[g, 1], x[g, 0]))


def test_shapes_of_grams_are_checked():
    for gram, rope in ((torch.ones(2, 3, 4), False), (torch.ones(2, 3), True)):
        with pytest.raises(ValueError, match="expected a Gram"):
            m.generalized_procrustes(gram, rope=rope)


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
    stacked = torch.einsum("mef,nmf->nme", s_MEE, v_NME).flatten(1)
    energies = torch.linalg.svdvals(stacked).square()
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
    gram = key_gram_of(x_KNE[None])[0] if rope else value_gram_of(x_KNE[None])[0]
    s = m.head_similarity(gram, 60, metric, rope=rope)
    for i, j in itertools.product(range(5), range(5)):
        turned = x_KNE[j] @ (m.rope_procrustes if rope else m.procrustes)(x_KNE[j], x_KNE[i])
        if metric == "cos":
            wanted = (x_KNE[i] * turned).sum(1).mean()
        else:
            wanted = -(x_KNE[i] - turned).square().sum(1).mean()
        torch.testing.assert_close(s[i, j], wanted)
    with pytest.raises(ValueError, match="metric 'l2': expected cos or dist"):
        m.head_similarity(gram, 60, "l2", rope=rope)


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


def score(s, groups):
    return sum(s[i, j] for group in groups for i, j in itertools.combinations(group, 2))


def all_groupings(heads, size):
    if not heads:
        yield []
        return
    for rest in itertools.combinations(heads[1:], size - 1):
        left = [h for h in heads[1:] if h not in rest]
        for groups in all_groupings(left, size):
            yield [[heads[0], *rest], *groups]


def random_similarity(k, seed):
    s = np.random.default_rng(seed).normal(size=(k, k))
    return s + s.T


def test_four_heads_in_two_groups():
    s = torch.tensor([[0, 1, 9, 1], [1, 0, 1, 8], [9, 1, 0, 1], [1, 8, 1, 0.0]])
    assert m.anneal_groups(s, 2) == [[0, 2], [1, 3]]
    assert m.anneal_groups(s, 1) == [[0, 1, 2, 3]]
    assert m.anneal_groups(s, 4) == [[0], [1], [2], [3]]


@pytest.mark.parametrize("k, n_groups", [(4, 2), (6, 3), (6, 2), (8, 4), (8, 2)])
def test_grouping_finds_the_optimum_of_brute_force(k, n_groups):
    for seed in range(2):
        s = random_similarity(k, seed)
        groups = m.anneal_groups(s, n_groups, seed=seed)
        best = max(score(s, g) for g in all_groupings(list(range(k)), k // n_groups))
        assert score(s, groups) == pytest.approx(best)
        assert sorted(sum(groups, [])) == list(range(k))
    assert groups == m.anneal_groups(s, n_groups, seed=seed)


def descend(s, group):
    """Make the best of all swaps of two heads until none helps; returns the score."""
    while True:
        same = group[:, None] == group
        total = (s * same).sum() / 2
        inside = (s * same).sum(1)
        across = np.stack([s[:, group == g].sum(1) for g in group], 1)  # i with the group of j
        gain = across + across.T - inside[:, None] - inside - 2 * s
        gain[same] = 0
        i, j = np.unravel_index(gain.argmax(), gain.shape)
        if gain[i, j] <= 1e-9:
            return total
        group[[i, j]] = group[[j, i]]


@pytest.mark.slow
@pytest.mark.parametrize("n_groups", [16, 8, 4])
def test_32_heads_as_good_as_200_exhaustive_descents(n_groups):
    for seed in range(2):
        s = random_similarity(32, seed)
        np.fill_diagonal(s, 0)
        rng = np.random.default_rng(seed)
        best = max(descend(s, rng.permutation(32) % n_groups) for _ in range(200))
        start = time.perf_counter()
        found = score(s, m.anneal_groups(s, n_groups))
        assert time.perf_counter() - start < 5  # it takes 0.3; the margin is for busy machines
        assert found >= best - 1e-9
    zero = m.anneal_groups(s, n_groups, temperature=0)  # the paper's rule
    assert sorted(sum(zero, [])) == list(range(32))


def test_annealing_alone():
    """Without the descent that ends it: cold it never falls, warm it gets further on average."""
    s = random_similarity(12, 0)
    np.fill_diagonal(s, 0)
    rng = np.random.default_rng(0)
    start = rng.permuted(np.tile(np.arange(12) // 3, (64, 1)), axis=1)

    def scores(group_RK):
        assert (np.sort(group_RK, 1) == np.repeat(np.arange(4), 3)).all()
        return (s * (group_RK[:, :, None] == group_RK[:, None, :])).sum((1, 2)) / 2

    one = m._metropolis_swaps(s, start, 1, 0.0, np.random.default_rng(1))
    for before, after in zip(start, one, strict=True):
        assert (before != after).sum() in (0, 2)
    cold = [scores(start)]
    for steps in (1, 10, 100, 3000):  # the same proposals, further
        cold.append(scores(m._metropolis_swaps(s, start, steps, 0.0, np.random.default_rng(1))))
        assert (cold[-1] >= cold[0]).all()
    warm = scores(m._metropolis_swaps(s, start, 3000, 2 * s.std(), np.random.default_rng(1)))
    assert cold[0].mean() < cold[1].mean() < cold[3].mean() <= cold[4].mean() < warm.mean()


def test_grouping_refuses():
    with pytest.raises(ValueError, match="6 heads cannot be split into 4 equal groups"):
        m.anneal_groups(np.zeros((6, 6)), 4)
    with pytest.raises(ValueError, match=r"square matrix .* found shape \(2, 3\)"):
        m.anneal_groups(np.zeros((2, 3)), 1)
    with pytest.raises(ValueError, match="found values that are not finite"):
        m.anneal_groups(np.full((4, 4), np.nan), 2)


# ---- 5 map and merge -----------------------------------------------------------------------------


def scrambled(config, weights, seed=0, linear=False):
    """The same model with its units shuffled and every one mapped by random free maps.

    linear: not only rotated, but values mapped by any matrices, planes of keys scaled, too. Normed
    keys are only turned, or their sign changed, as far as the norm's weights allow.
    """
    k, e = config.num_key_value_heads, config.head_dim
    out = m.non_block_weights(weights)
    for i in range(config.num_hidden_layers):
        order = torch.randperm(k, generator=torch.Generator().manual_seed(seed + i)).tolist()
        values, keys = orthogonal(k, e, seed=seed + i), phases(k, e // 2, seed=seed + i)
        if linear:
            generator = torch.Generator().manual_seed(seed + i)
            stretch_KE = 4 ** (2 * torch.rand(k, e, generator=generator).double() - 1)
            size_KP = 4 ** (2 * torch.rand(k, e // 2, generator=generator).double() - 1)
            values = values @ (stretch_KE[..., None] * orthogonal(k, e, seed=-1))
            keys = keys if config.qk_norm else size_KP * keys
        if config.qk_norm:
            norms = [weights[f"{m.block_prefix(i)}self_attn.{n}_norm.weight"].view(2, -1)
                     for n in "qk"]
            turns_P = (norms[0][0] == norms[0][1]) & (norms[1][0] == norms[1][1])
            keys = torch.where(turns_P, keys, keys.real.sign())
        maps = m.HeadMaps.exact(keys, values)
        block = m.transform(m.block_weights(weights, i), config, order, maps)
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


def test_normed_keys_agree_as_far_as_the_norm_lets_them():
    """Turned copies are turned back, and in planes that may not turn the best sign is found; heads
    that were longer before the norm count no more than others."""
    config = config_of("qwen3", rms_norm_eps=1e-12)
    block = m.block_weights(random_weights(config, dtype=torch.float64), 0)
    k, e, name = 4, config.head_dim, "self_attn.k_proj.weight"
    block[name] = block[name][:e].repeat(k, 1)
    order, turns_P = [2, 0, 3, 1], torch.arange(e // 2) % 2 == 0
    keys = torch.where(turns_P, phases(k, e // 2), phases(k, e // 2).real.sign())
    keys = keys * torch.tensor([1.0, 3.0, 0.2, 1.0])[:, None]
    maps = m.HeadMaps.exact(keys, torch.eye(e).double().expand(k, e, e))
    block = m.transform(block, config, order, maps)
    x_BTD = torch.randn(4, 50, config.hidden_size, dtype=torch.float64)
    statistics = m.block_statistics(config, block, x_BTD)
    assert torch.equal(statistics.turns_P, turns_P)
    for align in ("linear", "rotation"):
        method = m.Method(align=align, refit=False)
        found, report = m._align_groups(statistics, [[0, 1, 2, 3]], method)
        merged = m.merge(m.transform(block, config, range(k), found), config, 1)[name]
        heads = m.transform(block, config, range(k), found)[name].view(k, e, -1)
        torch.testing.assert_close(heads, merged.expand(k, e, -1))
        if align == "linear":
            assert report["energy_kept"]["key"] == pytest.approx(1)
    lost, _ = m.discarded_energy(statistics)
    assert lost.max() < 2.1  # of two terms with mean 1; the keys' is 0 or rounding
    quarter = torch.tensor([[[1.0, 0.9j], [-0.9j, 1.0]]] * 2).to(torch.complex128)
    c_MP, kept = m.normed_keys(quarter, torch.tensor([True, False]))
    assert kept.item() == pytest.approx((0.95 + 0.5) / 2)
    assert c_MP[1, 0] == pytest.approx(1j) and c_MP[1, 1].abs() == 1 and c_MP[1, 1].imag == 0


@pytest.mark.slow
def test_qwen3_from_training_to_transformers(trained, corpus, bpe, tmp_path):
    """The oracle: copied, shuffled and turned heads lose nothing. And a conversion of heads that
    have nothing in common is better than their averages, and loads in transformers."""
    rows, _ = m.text_rows(bpe.parent, config_of(vocab_size=384), dataclasses.replace(
        corpus, tokens=100_000, seq_len=64))
    config = config_of(model_type="qwen3", vocab_size=384, hidden_size=64, intermediate_size=128,
                       head_dim=16, num_attention_heads=8, num_key_value_heads=4,
                       max_position_embeddings=64)
    weights = train_a_little(config, rows)
    m.save_checkpoint(tmp_path / "gqa", config, weights, bpe.parent)
    mha, copied = expand_to_mha(config, weights)
    m.save_checkpoint(tmp_path / "mha", mha, scrambled(mha, copied), bpe.parent)
    for align in ("linear", "rotation"):
        report = m.convert(tmp_path / "mha", tmp_path / align, 4, corpus,
                           m.Method(align=align, refit=False))
        loss = report["loss_nats_per_token"]
        assert loss["converted"] == pytest.approx(loss["source"], abs=1e-4)
    report = m.convert(tmp_path / "gqa", tmp_path / "out", 2, corpus)
    loss, kl = report["loss_nats_per_token"], report["kl_nats_per_token"]
    assert kl["converted"] < 0.3 * kl["mean_pooled"] and loss["converted"] < loss["mean_pooled"]
    assert_transformers_computes_the_same(tmp_path / "out")
    assert json.loads((tmp_path / "out/config.json").read_text())["model_type"] == "qwen3"


def test_merge_averages_neighbours_by_hand():
    config = config_of("qwen2")
    block = m.block_weights(random_weights(config), 0)
    merged = m.merge(block, config, 2)
    for part in ("k_proj", "v_proj"):
        for kind in ("weight", "bias"):
            heads = block[f"self_attn.{part}.{kind}"].double().unflatten(0, (4, 12))
            wanted = torch.cat([(heads[0] + heads[1]) / 2, (heads[2] + heads[3]) / 2])
            torch.testing.assert_close(merged[f"self_attn.{part}.{kind}"], wanted)
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


def test_deterministic_masks():
    z = m.hard_concrete(torch.tensor([-20.0, 0.0, 1.0, 20.0]))
    stretched = 1.2 / (1 + math.exp(-1)) - 0.1
    torch.testing.assert_close(z, torch.tensor([0.0, 0.5, stretched, 1.0]))


def test_masks_repeat_with_the_generator_and_pass_gradients():
    log_alpha = torch.linspace(-1, 1, 7, dtype=torch.float64, requires_grad=True)

    def draw(x):
        return m.hard_concrete(x, torch.Generator().manual_seed(5))

    assert torch.equal(draw(log_alpha), draw(log_alpha))
    assert torch.autograd.gradcheck(draw, log_alpha)
    assert torch.autograd.gradcheck(m.open_probability, log_alpha)
    assert torch.autograd.gradcheck(lambda x: m.l0_loss(x, 0.3), log_alpha)


def test_l0_loss_by_hand():
    log_alpha = torch.tensor([[0.0, 2.0], [-1.0, 5.0]], dtype=torch.float64)
    shift = 2 / 3 * np.log(0.1 / 1.1)
    s = np.mean([1 / (1 + np.exp(-(a - shift))) for a in (0, 2, -1, 5)])
    for target in (0.0, 0.5, 1.0):
        assert m.l0_loss(log_alpha, target).item() == pytest.approx(
            abs(s - target) + (s - target) ** 2)


def logit_pair(*shape, dtype=torch.float64):
    generator = torch.Generator().manual_seed(0)
    return (3 * torch.randn(2, *shape, generator=generator)).to(dtype)


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
    for top_k in (1, 41):
        with pytest.raises(ValueError, match=f"top_k {top_k}: expected 2 to the vocabulary's 40"):
            m.bild_loss(student, teacher, top_k=top_k)


def test_losses_have_the_gradients_of_finite_differences():
    student, teacher = logit_pair(3, 12)
    student.requires_grad_(True)
    assert torch.autograd.gradcheck(lambda x: m.kl_loss(x, teacher, 2.0), student)
    assert torch.autograd.gradcheck(lambda x: m.bild_loss(x, teacher, top_k=4), student)


# ---- 7 the walk and the refit --------------------------------------------------------------------


def test_a_method_fills_in_its_defaults():
    found = {align: m.Method(align=align) for align in ("linear", "rotation", "none")}
    assert [(f.refit, f.group) for f in found.values()] == [
        (True, "energy"), (False, "value"), (False, "adjacent")]
    assert m.Method(align="rotation", refit=True, group="key").refit is True
    with pytest.raises(dataclasses.FrozenInstanceError):
        m.Method().align = "none"


@pytest.mark.parametrize("fields, message", [
    ({"align": "lineer"}, "align 'lineer': expected linear, rotation, none"),
    ({"group": "dist"}, "group 'dist': expected energy, value, key, adjacent"),
    ({"metric": "value"}, "metric 'value': expected dist, cos"),
    ({"metric": "cos"}, "metric cos: linear alignment and groups by energy weigh errors"),
    ({"align": "rotation", "group": "energy", "metric": "cos"}, "metric cos: linear alignment"),
    ({"seed": -1}, "seed -1: expected 0 to 4294967295"),
    ({"seed": 2**32}, "seed 4294967296: expected 0 to 4294967295")])
def test_methods_that_are_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        m.Method(**fields)


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
    x_BTD = torch.randn(4, 64, 48, generator=torch.Generator().manual_seed(0))
    block, = m.converted_blocks(config, weights, x_BTD, 2, m.Method(refit=False))
    for name, weight in block.converted.items():
        assert weight.abs().max() <= 4 * block.source[name].abs().max(), name
    kept = block.report["energy_kept"]
    assert all(0 <= share <= 1 + 1e-9 for share in kept.values())
    assert what not in ("keys", "values") or kept[what[:-1]] == pytest.approx(1)


@pytest.mark.parametrize("metric", ["dist", "cos"])
def test_similarities_in_the_report_are_those_of_the_caches(trained, corpus, metric):
    """Before: of the source's heads. After: of the same heads as the aligned block turns them."""
    config, weights = m.load_checkpoint(trained / "mha")
    rows, _ = m.text_rows(trained / "mha", config, corpus)
    x = m.embed(weights, rows, "cpu", torch.float64)
    method = m.Method(align="rotation", metric=metric)
    block = next(m.converted_blocks(config, weights, x.clone(), 2, method))
    source, aligned, layer = block.source, block.aligned, block.report
    normed = m._rms_norm(x, source["input_layernorm.weight"].double(), 1e-5).flatten(0, 1)
    order = sum(layer["groups"], [])
    for name, part in (("key", "k_proj"), ("value", "v_proj")):
        for when, block, of in (("before", source, order), ("after", aligned, range(8))):
            heads = (normed @ block[f"self_attn.{part}.weight"].double().T).unflatten(1, (8, 16))
            if metric == "cos":
                heads = heads / heads.norm(dim=-1, keepdim=True)
            found = []
            for group in (list(of)[:4], list(of)[4:]):
                for i, j in itertools.combinations(group, 2):
                    a, b = heads[:, i], heads[:, j]
                    found.append((a * b).sum(1).mean() if metric == "cos"
                                 else -(a - b).square().sum(1).mean())
            wanted = torch.stack(found).mean().item()
            assert layer["similarity_inside_groups"][name][when] == pytest.approx(wanted, rel=1e-6)


def block_of(config, weights, x_BTD):
    """What our block of these weights makes of the hidden states, rows in turn."""
    x_BTD = x_BTD.clone()
    m._run_block_(config, weights, x_BTD)
    return x_BTD


def error_of(config, weights, x_BTD, wanted_BTD):
    error = block_of(config, weights, x_BTD) - wanted_BTD
    return (1 + error.square().sum(-1) / wanted_BTD.square().sum(-1)).log().mean().item()


@pytest.mark.slow
@pytest.mark.parametrize("dtype, longest", [(torch.float32, 1), (torch.bfloat16, 1),
                                            (torch.float32, 1000)])
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
    assert {w.dtype for w in found.values()} == {torch.float32}
    assert error["before"] == pytest.approx(
        error_of(config, noisy, x[:20].float(), wanted[:20].float()), rel=1e-4)
    short = [block_of(config, w, x_BTD[fresh])[:, 1:] - wanted_BTD[fresh, 1:]
             for w in (noisy, found)]
    assert short[1].square().sum() < 0.3 * short[0].square().sum()
    again, _ = m.refit_block(config, noisy, x, wanted, seed=0)
    assert same_weights(found, again)


def test_a_bias_of_zeros_learns():
    """Models whose biases were added later; but a matrix of zeros has no scale to learn at."""
    weights = {"q.weight": torch.full((2, 4), 0.5), "q.bias": torch.zeros(2),
               "k.weight": torch.zeros(2, 4)}
    assert m._rates(weights, 0.4) == pytest.approx(
        {"q.weight": 0.1, "q.bias": 0.2 / 2**0.5, "k.weight": 0})


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


@pytest.mark.slow
def test_errors_in_the_report_are_those_of_the_written_model(trained, corpus, converted):
    """On the held-out rows: of each block's hidden states, and the predictions' KL."""
    folder, report = converted("mha", 2)
    config, source = m.load_checkpoint(trained / "mha")
    new_config, out = m.load_checkpoint(folder)
    _, rows = m.text_rows(trained / "mha", config, corpus)
    x = m.embed(source, rows, "cpu", torch.float32)
    converted_x = x.clone()
    for i, layer in enumerate(report["layers"]):
        x = block_of(config, m.block_weights(source, i), x)
        converted_x = block_of(new_config, m.block_weights(out, i), converted_x)
        error = ((converted_x - x).square().sum(-1) / x.square().sum(-1)).log1p().mean().item()
        assert layer["hidden_state_error"] == pytest.approx(error, rel=1e-3)
    log_p, log_q = (logits_of(c, w, rows)[:, :-1].log_softmax(-1)
                    for c, w in ((config, source), (new_config, out)))
    kl = F.kl_div(log_q, log_p, reduction="sum", log_target=True) / log_p[..., 0].numel()
    assert report["kl_nats_per_token"]["converted"] == pytest.approx(kl.item(), rel=1e-3)
    assert abs(report["kl_nats_per_token"]["source"]) < 1e-6


@pytest.mark.slow
def test_joint_refit_trains_attention_and_norms_of_all_blocks(trained, corpus, tmp_path):
    """From any start; the KL that it is measured by falls, and what it says of it holds."""
    report = run(trained, "mha", tmp_path / "joint", 2, align="rotation", joint=True)
    alone = run(trained, "mha", tmp_path / "alone", 2, align="rotation")
    kl = [r["kl_nats_per_token"]["converted"] for r in (report, alone)]
    assert kl[0] < 0.6 * kl[1]
    assert report["joint_kl"]["after"] < 0.6 * report["joint_kl"]["before"]
    assert "joint_kl" not in alone and "refit" not in report
    source = m.load_checkpoint(trained / "mha")
    joint = m.load_checkpoint(tmp_path / "joint")
    rows, _ = m.text_rows(trained / "mha", source[0], corpus)
    judges = rows[: math.ceil(len(rows) / 40)]
    found = m.kl_loss(logits_of(*joint, judges), logits_of(*source, judges)).mean().item()
    assert report["joint_kl"]["after"] == pytest.approx(found, rel=1e-4)
    weights = [joint[1], m.load_checkpoint(tmp_path / "alone")[1]]
    for name in weights[0]:
        trainable = "self_attn" in name or "layernorm" in name
        assert torch.equal(*(w[name] for w in weights)) != trainable, name


def test_tokens_on_a_gpu_are_embedded_by_weights_that_are_not():
    """Which this machine need not have: fake tensors know devices, and hold nothing."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode():
        weights = {"model.embed_tokens.weight": torch.empty(97, 48)}
        tokens_BT = torch.empty(2, 5, dtype=torch.int64, device="cuda")
        x_BTD = m.embed(weights, tokens_BT, tokens_BT.device, torch.bfloat16)
    assert x_BTD.shape == (2, 5, 48)
    assert (x_BTD.device.type, x_BTD.dtype) == ("cuda", torch.bfloat16)


def test_resampled_rows_are_half_the_text_and_half_the_source_s_predictions():
    config = config_of(tie_word_embeddings=False)
    weights = random_weights(config)
    weights["lm_head.weight"] = 1000 * weights["lm_head.weight"]  # one token is certain
    tokens_BT = random_tokens(config, time=40)
    found = m.resampled_rows(config, weights, tokens_BT, 3, seed=0, device="cpu")
    assert found.shape == (3 * len(tokens_BT), 40) and found.dtype == torch.int64
    assert torch.equal(found[:, 0], tokens_BT[:, 0].repeat(3))
    predicted = torch.cat([tokens_BT[:, :1], logits_of(config, weights, tokens_BT).argmax(-1)], 1)
    text, drawn = tokens_BT.repeat(3, 1), predicted[:, :-1].repeat(3, 1)
    assert ((found == text) | (found == drawn)).all()
    assert 0.4 < (found == text).float().mean() < 0.65
    again = m.resampled_rows(config, weights, tokens_BT, 3, seed=0, device="cpu")
    other = m.resampled_rows(config, weights, tokens_BT, 3, seed=1, device="cpu")
    assert torch.equal(found, again) and not torch.equal(found, other)


def test_a_short_text_is_resampled_and_seen_more_often():
    config = config_of(hidden_size=576, num_attention_heads=8)
    copies = {n: m._resampled_copies(config, torch.zeros(n // 64, 64), m.Method())[0]
              for n in (640, 16_384, 57_600, 65_536)}
    assert copies == {640: 7, 16_384: 3, 57_600: 0, 65_536: 0}
    assert m._resampled_copies(config, torch.zeros(10, 64), m.Method(refit=False)) == (0, 0)
    epochs = [m._refit_epochs(n) for n in (1000, 40_000, 65_536, 262_144, 2_000_000, 10**9)]
    assert epochs == [5, 5, 4, 2, 1, 1]


@pytest.mark.parametrize("length, cut", [
    (64, 64), (512, 512), (2048, 512), (1000, 500), (513, 256)])
def test_long_rows_are_cut_for_a_refit(length, cut):
    rows_BT = torch.arange(2 * length).view(2, length)
    found = m.calibration_rows(rows_BT)
    assert found.shape[1] == cut and torch.equal(found[0], rows_BT[0, :cut])
    kept = len(found) // 2 * cut
    assert kept > length - 2 and torch.equal(found.flatten()[kept:], rows_BT[1, :kept])


def test_no_copy_is_made_of_the_rows_that_judge_a_refit():
    config = config_of()
    tokens_BT = random_tokens(config, batch=10, time=48)
    rows_BT = m._with_resampled_rows(
        config, random_weights(config), tokens_BT, m.Method(), torch.device("cpu"))
    n_judges = math.ceil(8 * 10 / 40)  # of the rows and seven copies
    assert torch.equal(rows_BT[:10], tokens_BT) and len(rows_BT) == 10 + 7 * (10 - n_judges)
    likeness = (rows_BT[10:, None] == tokens_BT).float().mean(-1)  # half of the tokens stay
    assert (likeness.argmax(1) == torch.arange(n_judges, 10).repeat(7)).all()


# ---- 8 convert and evaluate ----------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("kv_heads", [4, 2, 1])
def test_alignment_beats_mean_pooling(trained, tmp_path, kv_heads):
    for group, metric in (("value", "dist"), ("value", "cos"), ("key", "dist"),
                          ("adjacent", "cos")):
        out = tmp_path / f"{group}-{metric}"
        report = run(trained, "mha", out, kv_heads, align="rotation", group=group, metric=metric)
        loss = report["loss_nats_per_token"]
        assert loss["source"] < loss["converted"] < loss["mean_pooled"], (group, metric)
        for s in report["similarity_inside_groups"].values():
            assert s["before"] < s["after"]
        assert json.loads((out / "mha2gqa.json").read_text()) == report


@pytest.mark.slow
@pytest.mark.parametrize("kv_heads", [4, 2, 1])
def test_linear_alignment_and_refit_beat_rotation(trained, converted, tmp_path, kv_heads):
    folder, default = converted("mha", kv_heads)
    assert default["method"] == dataclasses.asdict(m.Method(align="linear", refit=True)) == {
        "align": "linear", "refit": True, "joint": True, "group": "energy", "metric": "dist",
        "seed": 0}
    reports = {("linear", True): default}
    for align, refit in (("rotation", False), ("rotation", True), ("linear", False)):
        reports[align, refit] = run(trained, "mha", tmp_path / f"{align}{refit}", kv_heads,
                                    align=align, refit=refit)
    gap = {}
    for (align, refit), report in reports.items():
        loss = report["loss_nats_per_token"]
        gap[align, refit] = loss["converted"] - loss["source"]
        for layer in report["layers"] if refit else ():
            assert layer["refit"]["after"] < layer["refit"]["before"]
    assert gap["linear", True] < min(gap["linear", False], gap["rotation", True])
    assert max(gap["linear", False], gap["rotation", True]) < gap["rotation", False]
    (_, source), (_, out) = (m.load_checkpoint(p) for p in (trained / "mha", folder))
    for name in out:
        assert out[name].abs().max() < 10 * source[name].abs().max()


@pytest.mark.slow
def test_the_report_can_be_checked(trained, corpus, converted):
    """Its losses are transformers' on the directories; sizes, config and files are as promised."""
    out, report = converted("mha", 2)
    loss = report["loss_nats_per_token"]
    assert report["kv_cache_bytes_per_token"] == {"source": 2 * 2 * 8 * 16 * 4,
                                                  "converted": 2 * 2 * 2 * 16 * 4}
    config, _ = m.load_checkpoint(trained / "mha")
    _, held_out = m.text_rows(trained / "mha", config, corpus)
    assert report["tokens"] == {"calibration": 281 * 64, "refit": 281 * 64,
                                "held_out": held_out.numel(), "calibration_seq_len": 64,
                                "seq_len": 64}
    for path, wanted in ((trained / "mha", loss["source"]), (out, loss["converted"])):
        with torch.no_grad():
            found = transformers_model(path)(held_out, labels=held_out).loss.item()
        assert found == pytest.approx(wanted, abs=1e-5)
        again = m.evaluate(path, corpus)
        assert again["loss_nats_per_token"] == pytest.approx(wanted, abs=1e-6)
    raw, new = (json.loads((p / "config.json").read_text()) for p in (trained / "mha", out))
    assert new == {**raw, "num_key_value_heads": 2}
    for layer in report["layers"]:
        assert sorted(sum(layer["groups"], [])) == list(range(8))
    assert (out / "tokenizer.json").read_bytes() == (trained / "mha/tokenizer.json").read_bytes()
    assert report["peak_memory_bytes"]["host"] > 0


def test_without_alignment_it_is_mean_pooling_of_neighbours(trained, tmp_path):
    report = run(trained, "mha", tmp_path / "out", 2, align="none")
    assert report["method"]["group"] == "adjacent"
    assert report["layers"][0]["groups"] == [[0, 1, 2, 3], [4, 5, 6, 7]]
    loss = report["loss_nats_per_token"]
    assert loss["converted"] == loss["mean_pooled"]
    (_, source), (_, pooled) = (m.load_checkpoint(p) for p in (trained / "mha", tmp_path / "out"))
    name = "model.layers.1.self_attn.k_proj.weight"
    wanted = source[name].view(2, 4, 16, 64).mean(1).flatten(0, 1)
    torch.testing.assert_close(pooled[name], wanted)
    others = {n: w for n, w in source.items() if ".k_proj." not in n and ".v_proj." not in n}
    assert same_weights(others, {n: pooled[n] for n in others})


@pytest.mark.slow
@pytest.mark.parametrize("source, kv_heads", [("mha", 4), ("mha", 1), ("gqa", 2), ("gqa", 1)])
def test_outputs_in_transformers_with_a_cache(converted, source, kv_heads):
    folder, _ = converted(source, kv_heads)
    config, weights = m.load_checkpoint(folder)
    assert config.num_key_value_heads == kv_heads
    model = transformers_model(folder)
    tokens = random_tokens(config, time=64)
    with torch.no_grad():
        wanted = model(tokens).logits
    found = logits_of(config, weights, tokens)
    assert (found - wanted).abs().max() <= 1e-5 * wanted.abs().max()
    prompt = tokens[:1, :5]
    output = model.generate(prompt, max_new_tokens=20, do_sample=False, eos_token_id=None)
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
    return m._parse_config(raw), weights


@pytest.mark.parametrize("group", ["value", "key"])
@pytest.mark.parametrize("metric", ["dist", pytest.param("cos", marks=pytest.mark.slow)])
def test_the_exact_oracle(trained, corpus, tmp_path, group, metric):
    """Copied, shuffled and rotated heads are found again and undone: no loss at all."""
    config, weights = m.load_checkpoint(trained / "gqa")
    config, weights = expand_to_mha(config, weights)
    m.save_checkpoint(tmp_path / "mha", config, scrambled(config, weights), trained / "gqa")
    method = m.Method(align="rotation", group=group, metric=metric)
    report = m.convert(tmp_path / "mha", tmp_path / "out", 4, corpus, method)
    wanted = m.evaluate(trained / "gqa", corpus)["loss_nats_per_token"]
    loss = report["loss_nats_per_token"]
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
    m.save_checkpoint(tmp_path / "mha", config, hidden, trained / "gqa")
    loss, rotated = (
        m.convert(tmp_path / "mha", tmp_path / method.align, 4, corpus, method)[
            "loss_nats_per_token"]
        for method in (m.Method(refit=refit), m.Method(align="rotation")))
    assert loss["converted"] == pytest.approx(loss["source"], abs=1e-4)
    assert rotated["converted"] > loss["source"] + 0.03


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_dtype_and_the_ties_of_the_source_are_kept(trained, corpus, converted, tmp_path, dtype):
    config, weights = m.load_checkpoint(trained / "gqa")
    narrow = {n: w.to(dtype) for n, w in weights.items()}
    m.save_checkpoint(tmp_path / "narrow", config, narrow, trained / "gqa")
    report = m.convert(tmp_path / "narrow", tmp_path / "out", 2, corpus)
    _, out = m.load_checkpoint(tmp_path / "out")
    assert {w.dtype for w in out.values()} == {dtype} and "lm_head.weight" not in out
    again = m.evaluate(tmp_path / "out", corpus)["loss_nats_per_token"]
    assert report["loss_nats_per_token"]["converted"] == pytest.approx(again, abs=1e-6)
    _, full = converted("gqa", 2)
    assert again == pytest.approx(full["loss_nats_per_token"]["converted"], abs=0.03)
    assert torch.equal(out["model.embed_tokens.weight"], narrow["model.embed_tokens.weight"])


@pytest.mark.slow
def test_a_forward_in_bf16_converts_nearly_as_well(trained, corpus, converted, tmp_path):
    _, full = converted("mha", 2)
    half = m.convert(trained / "mha", tmp_path / "out", 2, corpus, dtype=torch.bfloat16)
    for name, loss in half["loss_nats_per_token"].items():
        assert loss == pytest.approx(full["loss_nats_per_token"][name], abs=0.05)


def test_products_in_bf16_convert_as_well(trained, corpus, tmp_path, monkeypatch):
    """As a GPU makes them: what a conversion costs stays the same to 2 %."""
    gaps = []
    for dtype in (torch.float32, torch.bfloat16):
        monkeypatch.setattr(m, "_forward_products", lambda x, dtype=dtype: dtype)
        report = m.convert(trained / "mha", tmp_path / str(dtype), 2, corpus, m.Method(refit=False))
        loss = report["loss_nats_per_token"]
        gaps.append(loss["converted"] - loss["source"])
    assert report["forward"]["products"] == "bfloat16" and report["forward"]["dtype"] == "float32"
    assert gaps[0] != gaps[1] and gaps[1] == pytest.approx(gaps[0], rel=0.02)


@pytest.mark.slow
def test_biased_models_convert(trained, corpus, tmp_path):
    """Qwen2's biases are aligned and merged with their rows; the oracle is exact there, too."""
    raw = {**json.loads((trained / "gqa/config.json").read_text()), "model_type": "qwen2"}
    config = m._parse_config(raw)
    _, weights = m.load_checkpoint(trained / "gqa")
    weights = random_weights(config) | weights  # only the biases are new
    config, weights = expand_to_mha(config, weights)
    m.save_checkpoint(tmp_path / "mha", config, scrambled(config, weights), trained / "gqa")
    report = m.convert(tmp_path / "mha", tmp_path / "out", 4, corpus)
    loss = report["loss_nats_per_token"]
    assert loss["converted"] == pytest.approx(loss["source"], abs=1e-4)
    assert_transformers_computes_the_same(tmp_path / "out")


@pytest.mark.slow
@pytest.mark.parametrize("joint", ["--joint", "--no-joint"])
def test_memory_does_not_grow_with_the_layers(tmp_path, bpe, topics, joint):
    """But for attention's weights, with the gradients and moments of a joint refit."""
    (tmp_path / "text.txt").write_text("\n".join(topics))
    peaks = []
    for n_layers in (2, 9):
        config = config_of(num_hidden_layers=n_layers, vocab_size=384, hidden_size=256,
                           intermediate_size=4096)
        path = tmp_path / str(n_layers)
        m.save_checkpoint(path, config, random_weights(config), bpe.parent)
        subprocess.run([sys.executable, PROGRAM, path, tmp_path / f"out{n_layers}", "--kv-heads",
                        "2", "--text", tmp_path / "text.txt", "--tokens", "512", "--seq-len",
                        "128", "--group", "adjacent", joint], check=True)
        report = json.loads((tmp_path / f"out{n_layers}/mha2gqa.json").read_text())
        peaks.append(report["peak_memory_bytes"]["host"])
        block = m._n_bytes(m.block_weights(m.load_checkpoint(path)[1], 0).values())
        assert 0.6 < peaks[-1] / report["memory_estimate_bytes"] < 1.2
    attention = m._n_bytes(w for n, w in m.block_weights(m.load_checkpoint(path)[1], 0).items()
                           if n.startswith("self_attn."))
    trained = 7 * 4 * attention if joint == "--joint" else 0
    assert peaks[1] - peaks[0] < trained + 3 * block  # and not 7 blocks more


# ---- 9 checkpoints -------------------------------------------------------------------------------


def test_config_file_keeps_unknown_keys_and_changes_only_the_heads():
    raw = {**BASE, "transformers_version": "4.1", "a_key_of_tomorrow": {"x": [1]}, "head_dim": None}
    config = m._parse_config(raw)
    assert (config.num_key_value_heads, config.head_dim) == (4, 12)
    raw["architectures"] = ["LlamaForCausalLM"]  # what an engine looks for
    assert m._config_json(m.gqa_config(config, 2)) == {**raw, "num_key_value_heads": 2}


def test_config_made_by_hand_can_be_read_again():
    for kind in m._MODEL_TYPES:
        config = m.LlamaConfig(97, 48, 80, 2, 4, model_type=kind, rope_scaling=LLAMA3)
        assert m._parse_config(m._config_json(config)) == config


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_checkpoints_come_back_bit_for_bit(tmp_path, dtype):
    config = config_of("gqa")
    weights = random_weights(config, dtype=dtype)
    (tmp_path / "a").mkdir()  # an empty directory may be written into
    m.save_checkpoint(tmp_path / "a", config, weights)
    found, again = m.load_checkpoint(tmp_path / "a")
    assert found == config and same_weights(again, weights)
    assert sorted(os.listdir(tmp_path)) == ["a"]
    assert [f.name for f in (tmp_path / "a").glob("*.safe*")] == ["model.safetensors"]
    modes = {file.stat().st_mode for file in (tmp_path / "a").iterdir()}
    assert len(modes) == 1  # safetensors alone would leave files that only their owner reads


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
    layouts = {
        "single": {"model.safetensors": weights},
        "sharded": {"model-1-of-2.safetensors": one, "model-2-of-2.safetensors": two},
        "bin": {"pytorch_model.bin": weights},
        "bins": {"pytorch_model-00001-of-00002.bin": one, "pytorch_model-00002-of-00002.bin": two},
    }
    paths = [make_directory(tmp_path / name, config, files) for name, files in layouts.items()]
    aside = make_directory(tmp_path / "aside", config, {"pytorch_model.bin": weights})
    save_file({"lora": torch.ones(2)}, aside / "adapter_model.safetensors")
    old = make_directory(tmp_path / "old", config, {})  # before torch 1.6: not an archive
    torch.save(weights, old / "pytorch_model.bin", _use_new_zipfile_serialization=False)
    # The one file counts, and not what lies beside it from the time when the model was sharded.
    other = {n: w + 1 for n, w in weights.items()}
    stale = make_directory(tmp_path / "stale", config, {
        f"model-{i}-of-2.safetensors": part for i, part in enumerate(halves(other), 1)})
    save_file(weights, stale / "model.safetensors", {"format": "pt"})
    gone = Path(shutil.copytree(stale, tmp_path / "gone"))
    for shard in gone.glob("model-*"):
        shard.unlink()
    both = make_directory(tmp_path / "both", config, {"pytorch_model.bin": other})
    save_file(weights, both / "model.safetensors", {"format": "pt"})
    leftovers = make_directory(tmp_path / "leftovers", config, {"model.safetensors": weights | {
        f"model.layers.0.self_attn.rotary_emb.{name}": torch.ones(6)
        for name in ("inv_freq", "cos_cached", "sin_cached")}})
    tokens = random_tokens(config)
    found = logits_of(config, weights, tokens)
    for path in [*paths, aside, old, stale, gone, both, leftovers]:
        assert same_weights(m.load_checkpoint(path)[1], weights), path.name
        with torch.no_grad():
            wanted = transformers_model(path)(tokens).logits
        assert (found - wanted).abs().max() <= 1e-5 * wanted.abs().max(), path.name


def test_two_sets_of_weights_without_an_index_are_refused(tmp_path):
    config = config_of()
    weights = random_weights(config)
    path = make_directory(tmp_path / "x", config, {"model.fp32.safetensors": weights})
    save_file({n: w + 1 for n, w in weights.items()}, path / "model.other.safetensors")
    with pytest.raises(ValueError, match="is in model.other.safetensors and, with other values"):
        m.load_checkpoint(path)


@pytest.mark.parametrize("rename", [
    lambda n: f"_orig_mod.{n}", lambda n: f"module.{n}", lambda n: f"base_model.model.{n}",
    lambda n: f"module._orig_mod.{n}", lambda n: n.replace("self_attn.", "self_attn._orig_mod."),
    lambda n: n.removeprefix("model."), lambda n: f"model.{n}", lambda n: f"net.{n}",
    lambda n: f"_forward_module.module.{n}",
    lambda n: re.sub("^model.", "model.language_model.", n),
    lambda n: re.sub("^model.", "transformer.", n)])
def test_prefixes_that_wrappers_leave_are_stripped(tmp_path, rename):
    config = config_of()
    weights = random_weights(config)
    path = make_directory(tmp_path / "x", config, {
        "model.safetensors": {rename(n): w for n, w in weights.items()}})
    assert same_weights(m.load_checkpoint(path)[1], weights)


def test_a_model_saved_without_its_head_equals_transformers(tmp_path):
    from transformers import LlamaConfig, LlamaModel

    torch.manual_seed(0)
    LlamaModel(LlamaConfig(**BASE, tie_word_embeddings=True)).save_pretrained(tmp_path / "x")
    config, weights = m.load_checkpoint(tmp_path / "x")
    tokens = random_tokens(config)
    with torch.no_grad():
        wanted = transformers_model(tmp_path / "x")(tokens).logits
    found = logits_of(config, weights, tokens)
    assert (found - wanted).abs().max() <= 1e-5 * wanted.abs().max()
    assert m._config_json(config)["architectures"] == ["LlamaForCausalLM"]


# Changes to config.json that transformers takes as they are.
CONFIG_FILES = {
    "swish": {"hidden_act": "swish"},
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


@pytest.mark.parametrize("name", CONFIG_FILES)
def test_settings_are_taken_as_transformers_takes_them(tmp_path, name):
    raw = {**BASE, **CONFIG_FILES[name]}
    config = m._parse_config(raw)
    weights, tokens = random_weights(config), random_tokens(config, time=200)
    path = make_directory(tmp_path / "x", config, {"model.safetensors": weights})
    assert json.loads((path / "config.json").read_text()) == raw
    with torch.no_grad():
        wanted = transformers_model(path)(tokens).logits
    found = logits_of(config, weights, tokens)
    assert (found - wanted).abs().max() <= 1e-5 * wanted.abs().max()


def test_what_names_the_source_s_own_code_is_not_in_the_result(tmp_path):
    """Yi's old files are LLaMA under another name; the result is one by its own name."""
    raw = {**BASE, "model_type": "Yi", "architectures": ["YiForCausalLM"],
           "auto_map": {"AutoModelForCausalLM": "modeling_yi.YiForCausalLM"}}
    config = m._parse_config(raw)
    weights = random_weights(config)
    m.save_checkpoint(tmp_path / "x", config, weights)
    written = json.loads((tmp_path / "x/config.json").read_text())
    assert "auto_map" not in written and written["architectures"] == ["LlamaForCausalLM"]
    assert type(transformers_model(tmp_path / "x")).__name__ == "LlamaForCausalLM"


def test_the_tokenizer_s_own_code_and_its_files_come_along(tmp_path):
    from transformers import AutoTokenizer

    source = tmp_path / "source"
    source.mkdir()
    (source / "words.py").write_text("def split(text):\n    return text.split()\n")
    (source / "modeling_words.py").write_text("")
    (source / "list.words").write_text("<unk>\none\ntwo\n")
    (source / "notes.words").write_text("not named anywhere")
    (source / "additional_chat_templates").mkdir()
    (source / "additional_chat_templates/tools.jinja").write_text("{{ messages }}")
    (source / "tokenization_words.py").write_text("""
from transformers import PreTrainedTokenizer
from .words import split

class WordTokenizer(PreTrainedTokenizer):
    vocab_files_names = {"vocab_file": "list.words"}

    def __init__(self, vocab_file, **keywords):
        with open(vocab_file) as file:
            self.words = file.read().split()
        super().__init__(unk_token="<unk>", **keywords)

    vocab_size = property(lambda self: len(self.words))
    get_vocab = lambda self: {word: i for i, word in enumerate(self.words)}
    _tokenize = lambda self, text: split(text)
    _convert_token_to_id = lambda self, word: self.get_vocab().get(word, 0)
    _convert_id_to_token = lambda self, i: self.words[i]
""")
    (source / "tokenizer_config.json").write_text(json.dumps({
        "tokenizer_class": "WordTokenizer",
        "auto_map": {"AutoTokenizer": ["tokenization_words.WordTokenizer", None]}}))
    config = config_of()
    m.save_checkpoint(tmp_path / "x", config, random_weights(config), source)
    copied = {str(f.relative_to(tmp_path / "x")) for f in (tmp_path / "x").rglob("*")}
    assert copied >= {"words.py", "list.words", "additional_chat_templates/tools.jinja"}
    assert "notes.words" not in copied
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "x", trust_remote_code=True)
    assert tokenizer("two one three")["input_ids"] == [2, 1, 0]


def test_leftovers_are_dropped_and_tied_embeddings_have_one_name(tmp_path):
    config = config_of("tied")
    weights = random_weights(config)
    embedding = weights["model.embed_tokens.weight"]
    rest = {n: w for n, w in weights.items() if n != "model.embed_tokens.weight"}
    frequencies = {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(6)}
    for name, tensors in {
        "both": weights | frequencies | {"lm_head.weight": embedding.clone()},
        "head": rest | {"lm_head.weight": embedding},
    }.items():
        path = make_directory(tmp_path / name, config, {"model.safetensors": tensors})
        assert same_weights(m.load_checkpoint(path)[1], weights), name
    for name, other in (("two", embedding + 1), ("dtypes", embedding.bfloat16())):
        tensors = weights | {"lm_head.weight": other}
        path = make_directory(tmp_path / name, config, {"model.safetensors": tensors})
        with pytest.raises(ValueError, match="lm_head.weight differs"):
            m.load_checkpoint(path)


def test_one_tensor_under_two_names_can_be_saved(tmp_path):
    config = config_of()  # not tied
    weights = random_weights(config)
    weights["lm_head.weight"] = weights["model.embed_tokens.weight"]
    path = make_directory(tmp_path / "x", config, {"pytorch_model.bin": weights})
    m.save_checkpoint(tmp_path / "y", *m.load_checkpoint(path))
    assert same_weights(m.load_checkpoint(tmp_path / "y")[1], weights)


def anonymous_memory():
    """Bytes of this process's memory that no file backs."""
    status = Path("/proc/self/status").read_text()
    return int(re.search(r"RssAnon:\s+(\d+)", status)[1]) * 1024


def test_reading_is_lazy(tmp_path):
    config = config_of(hidden_size=512, intermediate_size=8192, num_hidden_layers=2)
    weights = {n: torch.zeros(p.shape) for n, p in m.Llama(config).state_dict().items()}
    paths = [
        make_directory(tmp_path / "s", config, {"model.safetensors": weights}),
        make_directory(tmp_path / "b", config, {"pytorch_model.bin": weights}),
    ]
    size = m._n_bytes(weights.values())
    for path in paths:
        before = anonymous_memory()
        _, mapped = m.load_checkpoint(path)
        assert all(w.sum() == 0 for n, w in mapped.items() if "norm" not in n)
        assert anonymous_memory() - before < size / 10


def test_output_is_there_whole_or_not_at_all(tmp_path):
    with pytest.raises(KeyboardInterrupt), m._new_directory(tmp_path / "x") as folder:
        (folder / "half").write_text("x")
        raise KeyboardInterrupt
    assert not list(tmp_path.iterdir())
    config = config_of()
    with pytest.raises(ValueError, match="missing tensor lm_head.weight"):
        m.save_checkpoint(tmp_path / "x", config, {n: w for n, w in random_weights(config).items()
                                                   if n != "lm_head.weight"})
    assert not list(tmp_path.iterdir())


def test_a_signal_that_meets_mkdir_leaves_nothing(tmp_path, monkeypatch):
    mkdir = m.Path.mkdir

    def interrupted(self, *args):
        mkdir(self, *args)
        raise KeyboardInterrupt

    monkeypatch.setattr(m.Path, "mkdir", interrupted)
    with pytest.raises(KeyboardInterrupt), m._new_directory(tmp_path / "out"):
        pass
    assert not list(tmp_path.iterdir())


def test_output_may_be_a_link_to_an_empty_directory(tmp_path):
    (tmp_path / "disk").mkdir(mode=0o700)
    (tmp_path / "link").symlink_to(tmp_path / "disk")
    with m._new_directory(tmp_path / "link") as folder:
        (folder / "file").touch()
    assert (tmp_path / "disk/file").exists() and (tmp_path / "link/file").exists()
    assert (tmp_path / "disk").stat().st_mode & 0o777 == 0o700


# ---- 10 text and tokenizers ----------------------------------------------------------------------


def test_documents_of_all_kinds_of_files(tmp_path):
    records = "".join(json.dumps({"text": t, "url": 1}) + "\n\n" for t in ("größe", "two\nlines"))
    for name, opener in (("a.jsonl", open), ("a.jsonl.gz", gzip.open), ("a.jsonl.xz", lzma.open)):
        with opener(tmp_path / name, "wt", encoding="utf-8") as file:
            file.write(records)
        assert list(m._Documents([tmp_path / name], 100)) == ["größe", "two\nlines"]
    (tmp_path / "b.jsonl").write_text('\ufeff{"text": "half \\ud800 a pair"}')
    assert list(m._Documents([tmp_path / "b.jsonl"], 100)) == ["half ? a pair"]
    (tmp_path / "a.txt").write_text("\ufeffone\ntwo\n", encoding="utf-8")
    assert list(m._Documents([tmp_path / "a.txt"], 100)) == ["one\ntwo\n"]
    (tmp_path / "b.txt").write_text("größer", encoding="utf-8")  # cut within ß, of two bytes
    assert list(m._Documents([tmp_path / "b.txt"], 1)) == ["grö"]
    every = [tmp_path / "a.txt", tmp_path / "a.jsonl.gz", tmp_path / "b.jsonl"]
    documents = m._Documents(every, 100)
    assert [documents[i] for i in (3, 1, 0, 2)] == [
        "half ? a pair", "größe", "one\ntwo\n", "two\nlines"]


@pytest.mark.parametrize("name", [
    "a.ndjson", "a.JSONL", "a.jsonlines", "a.jsonl.txt", "a", "a.txt", "a.bin", "pipe"])
def test_records_are_known_by_what_is_in_the_file(tmp_path, name):
    content = b'\n{"text": "one", "url": 1}\n{"text": ""}\n{"text": "two"}\n   '
    file = tmp_path / name
    if name == "pipe":
        os.mkfifo(file)
        subprocess.Popen(["sh", "-c", f"printf '%s' '{content.decode()}' > {file}"])
    else:
        file.write_bytes(content)
    assert list(m._Documents([file], 100)) == ["one", "two"]
    if name != "pipe":
        file.write_bytes(gzip.compress(content))
        assert list(m._Documents([file], 100)) == ["one", "two"]


@pytest.mark.parametrize("content, found", [
    ('[{"text": "one"},\n {"text": "two\\n"}]', ["one", "two\n"]),
    ('\n[\n  {\n    "text": "one"\n  }\n]\n', ["one"]),
    ("[Verse]\none", ["[Verse]\none"]), ("[ ] buy milk", ["[ ] buy milk"]),
    ("[](https://x)", ["[](https://x)"]), (r"[{\bf A}]", [r"[{\bf A}]"]),
    (json.dumps([{"text": "größe " * i} for i in range(2, 2000)]),  # 24 MB, read in parts
     ["größe " * i for i in range(2, 2000)]),
    ("{one}\n", ["{one}\n"]), ('"one"', ['"one"']),
    ("[1, 2]", ["[1, 2]"])])
def test_arrays_of_records_and_what_only_looks_like_json(tmp_path, content, found):
    (tmp_path / "a").write_text(content)
    assert list(m._Documents([tmp_path / "a"], 100)) == found


def test_parquet(tmp_path, monkeypatch):
    (tmp_path / "a.parquet").write_bytes(b"PAR1 and nothing else")
    with monkeypatch.context() as without:
        without.setitem(sys.modules, "pyarrow", None)
        with pytest.raises(ValueError, match="a.parquet: to read Parquet, pip install pyarrow"):
            m._Documents([tmp_path / "a.parquet"], 100)
    pyarrow, parquet = (pytest.importorskip(name) for name in ("pyarrow", "pyarrow.parquet"))
    with pytest.raises(ValueError, match="a.parquet: cannot be read"):
        m._Documents([tmp_path / "a.parquet"], 100)
    for column in ("text", "body"):
        table = pyarrow.table({column: ["one", None, "two"], "url": [1, 2, 3]})
        parquet.write_table(table, tmp_path / f"{column}.parquet")
    assert list(m._Documents([tmp_path / "text.parquet"], 100)) == ["one", "two"]
    with pytest.raises(ValueError, match='body.parquet: cannot be read .* a column "text"'):
        m._Documents([tmp_path / "body.parquet"], 100)


def test_little_is_held_of_a_large_text(tmp_path, bpe):
    """100 MB of records for 640 tokens: no more memory than the places and a batch take. As lines,
    as an array, as plain text in lines and in one."""
    line = json.dumps({"text": "words and more words " * 50})
    lines = [line] * (100_000_000 // len(line))
    (tmp_path / "a.jsonl").write_text("\n".join(lines))
    (tmp_path / "b.json").write_text(f"[{', '.join(lines)}]")
    (tmp_path / "c.txt").write_text("a line of text\n" * (100_000_000 // 15))
    (tmp_path / "d.txt").write_text("words of text " * (100_000_000 // 14))
    code = ("import sys, mha2gqa as m; from pathlib import Path\n"
            "config = m._parse_config(m.read_json(Path(sys.argv[2])))\n"
            "before = m.Meter(m.torch.device('cpu')); before.lap('')\n"
            "m.text_rows(sys.argv[1], config, m.Corpus(sys.argv[3:], tokens=640, seq_len=64))\n"
            "after = m.Meter(m.torch.device('cpu')); after.lap('')\n"
            "print(after.peak_memory['host'] - before.peak_memory['host'])")
    m.write_json(tmp_path / "config.json", {**BASE, "vocab_size": 384})
    done = subprocess.run(
        [sys.executable, "-c", code, bpe.parent, tmp_path / "config.json",
         *sorted(tmp_path.glob("?.*"))], capture_output=True, text=True, check=True)
    assert int(done.stdout) < 30e6


def letters(texts):
    return [[1, *(ord(c) - 90 for c in text)] for text in texts]


def test_rows_are_shuffled_documents_end_to_end():
    documents = ["aaa", "bbbbb", "cc", "dddd"]
    stream = m._pack_rows(documents, letters, config_of(), 12, 4, seed=3).flatten().tolist()
    assert len(stream) == 12
    whole = m._pack_rows(documents, letters, config_of(), 10**9, 22, seed=3).flatten().tolist()
    assert whole[:12] == stream
    found, at = [], 0
    while at < len(whole):  # BOS, a document, EOS
        end = whole.index(2, at)
        assert whole[at] == 1
        found.append("".join(chr(t + 90) for t in whole[at + 1 : end]))
        at = end + 1
    assert sorted(found) == documents != found
    other = m._pack_rows(documents, letters, config_of(), 10**9, 22, seed=4).flatten().tolist()
    assert sorted(other) == sorted(whole) and other != whole


def test_long_documents_are_encoded_in_pieces():
    """With BOS at the beginning of a document alone, and EOS at its end."""
    lengths = []

    def encode(texts):
        lengths.extend(map(len, texts))
        return letters(texts)

    documents = ["a" * 2_500_000, "bb", "c" * 1_000_000]
    stream = m._pack_rows(documents, encode, config_of(vocab_size=99), 10**7, 1, seed=0)
    assert sorted(lengths) == [0, 2, 500_000, *3 * [1_000_000]]
    found = bytes(stream.flatten().tolist()).split(b"\2")[:-1]
    assert sorted(found) == [b"\1" + bytes(ord(c) - 90 for c in text) for text in documents]


def test_tokens_that_the_model_lacks_are_refused():
    with pytest.raises(ValueError, match="gives token 32, but the model's vocabulary has only 20"):
        m._pack_rows(["zzz"], letters, config_of(vocab_size=20), 100, 2, seed=0)


def test_end_of_text_may_be_a_list_or_missing():
    for eos, end in ((2, [2]), ([7, 8], [7]), (None, [])):
        rows = m._pack_rows(["ab"], letters, config_of(eos_token_id=eos), 100, 3 + len(end), seed=0)
        assert rows.tolist() == [[1, 7, 8, *end]]


def test_tokenizer_json_decides_on_bos(bpe):
    encode = m.load_tokenizer(bpe.parent)
    (ids,) = encode(["Notes on using the statement, at some length, again and again."])
    assert ids[0] == 1 and 1 not in ids[1:] and 2 not in ids and len(ids) > 20


@pytest.mark.parametrize("template", [True, False])
@pytest.mark.parametrize("add_bos", [True, False, None])
@pytest.mark.parametrize("bos_token", ["<s>", {"content": "<s>", "lstrip": False}])
def test_explicit_settings_of_bos_hold_and_it_is_put_once(
        tmp_path, bpe, template, add_bos, bos_token):
    """As in transformers 4; transformers 5 asks tokenizer.json alone."""
    from tokenizers import Tokenizer, processors
    from transformers import AutoTokenizer

    tokenizer = Tokenizer.from_file(str(bpe))
    tokenizer.no_truncation()
    if not template:
        tokenizer.post_processor = processors.ByteLevel()
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "</s>",
                "bos_token": bos_token if isinstance(bos_token, str) else
                {"__type": "AddedToken", **bos_token}}
    if add_bos is not None:
        settings["add_bos_token"] = add_bos
    m.write_json(tmp_path / "tokenizer_config.json", settings)
    texts = ["a text", "and one", "<s>with BOS in it"]
    plain = Tokenizer.from_file(str(tmp_path / "tokenizer.json")).encode_batch(
        texts, add_special_tokens=False)
    found = m.load_tokenizer(tmp_path)(texts)
    with_bos = template if add_bos is None else add_bos
    assert found[:2] == [[1] * with_bos + e.ids for e in plain[:2]]
    assert found[2] == plain[2].ids and found[2].count(1) == 1
    if with_bos == template:
        assert found[:2] == AutoTokenizer.from_pretrained(tmp_path)(texts[:2])["input_ids"]


def test_bos_that_only_the_template_or_another_file_names(tmp_path, bpe):
    from tokenizers import Tokenizer, processors

    shutil.copyfile(bpe, tmp_path / "tokenizer.json")
    for bos_token in (None, "<absent>"):  # the template's stays
        m.write_json(tmp_path / "tokenizer_config.json",
                     {"add_bos_token": True, "bos_token": bos_token})
        assert m.load_tokenizer(tmp_path)(["a text"])[0][0] == 1
    tokenizer = Tokenizer.from_file(str(bpe))
    tokenizer.post_processor = processors.ByteLevel()
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    with pytest.raises(ValueError, match="add_bos_token is true, but no bos_token is named that"):
        m.load_tokenizer(tmp_path)
    m.write_json(tmp_path / "tokenizer_config.json", {"add_bos_token": True})
    m.write_json(tmp_path / "special_tokens_map.json", {"bos_token": "</s>"})
    assert m.load_tokenizer(tmp_path)(["a text"])[0][0] == 2


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


@pytest.fixture
def texts(tmp_path, topics):
    """Two files: all topics as JSONL, the first one as plain text."""
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"text": t}) + "\n" for t in topics))
    (tmp_path / "b.txt").write_text(topics[0])
    return tmp_path / "a.jsonl", tmp_path / "b.txt"


def test_calibration_and_held_out_rows(texts, topics, bpe):
    config, (many, one) = config_of(vocab_size=384), texts
    corpus = m.Corpus(many, tokens=32 * 100 + 5, seq_len=32)
    rows, held_out = m.text_rows(bpe.parent, config, corpus)
    assert (rows.shape, held_out.shape) == ((90, 32), (10, 32))
    everything = m._pack_rows(topics, m.load_tokenizer(bpe.parent), config, 3205, 32, seed=0)
    assert torch.equal(torch.cat([held_out, rows]), everything)  # the first ones are held out
    corpus = dataclasses.replace(corpus, eval_files=[one])
    rows, held_out = m.text_rows(bpe.parent, config, corpus)
    assert rows.shape == (100, 32) and not (rows[:, None] == held_out).all(-1).any()
    none, held_out = m.text_rows(bpe.parent, config, m.Corpus((), one, seq_len=32))
    assert none.shape == (0, 32) and len(held_out) > 10


def test_too_little_text(texts, bpe):
    config, (_, one) = config_of(vocab_size=384), texts
    with pytest.warns(UserWarning, match=r"whole rows of 32, not the 100,000,000 asked for"):
        m.text_rows(bpe.parent, config, m.Corpus(one, tokens=10**8, seq_len=32))
    long = dataclasses.replace(config, max_position_embeddings=10**6)
    with pytest.raises(ValueError, match=r"too little text in .*b.txt: 2 rows of 100000 tokens"):
        m.text_rows(bpe.parent, long, m.Corpus(one, tokens=2 * 10**5, seq_len=10**5))
    with pytest.raises(ValueError, match="1000 tokens: expected at least two rows of 512"):
        m.text_rows(bpe.parent, config, m.Corpus(one, tokens=1000))


def test_row_lengths():
    config = config_of()
    assert [m.row_length(config, n) for n in (None, 2, 512)] == [512, 2, 512]
    assert m.row_length(dataclasses.replace(config, max_position_embeddings=10**5), None) == 2048
    for seq_len in (1, 513):
        with pytest.raises(ValueError, match=f"sequence length {seq_len}: expected 2 to 512"):
            m.row_length(config, seq_len)


def test_a_refit_needs_two_rows():
    rows = torch.zeros(1, 64, dtype=torch.int64)
    m.check_calibration_rows(rows, m.Method(refit=False))
    with pytest.raises(ValueError, match="2 rows of 64 tokens are needed to calibrate with, found"):
        m.check_calibration_rows(rows, m.Method())


# ---- 11 report and command line ------------------------------------------------------------------


def test_without_a_terminal_a_line_a_minute(capfd, monkeypatch):
    """200 blocks of 2 steps of 7 s: 46 minutes and 40 s."""
    clock = itertools.count(0, 7)
    monkeypatch.setattr(m.time, "monotonic", lambda: now[0])
    now = [next(clock)]
    m._last_line[0] = now[0]
    for _ in m.progress(range(200), "convert", 200):
        for _ in m.progress(range(2), "refit", 2, inside=True):
            now[0] = next(clock)
    lines = capfd.readouterr().err.splitlines()
    assert 40 <= len(lines) <= 46
    assert lines[0] == "convert 4/200, 45:44 left: refit 1/2"
    assert re.fullmatch(r"convert 200/200, 00:00 left|convert 19\d/200, .*", lines[-1])


def command(capfd, *arguments):
    """Exit status, standard output and error of the command line."""
    status = m.main([str(a) for a in arguments])
    return status, *capfd.readouterr()


def refused(capfd, folder, message, *arguments):
    """Assert one line that says it, exit status 2, and nothing written anywhere in `folder`."""
    before = sorted(folder.rglob("*"))
    status, out, err = command(capfd, *arguments)
    assert status == 2 and "nats" not in out
    assert re.fullmatch(rf"error: .*{message}.*\n", err), err
    assert sorted(folder.rglob("*")) == before


def test_convert_and_evaluate_by_command(trained, tmp_path, capfd):
    text = trained / "text.jsonl"
    common = ("--text", text, "--tokens", 6000, "--seq-len", 32)
    status, out, err = command(capfd, trained / "mha", tmp_path / "out", "--kv-heads", 4, *common)
    assert (status, err) == (0, "")  # no progress bar where there is no terminal
    *plan, table = out.split("\n", 3)
    assert re.match(r"2 blocks, 8 to 4 KV heads "
                    r"\(align linear, refit, joint, group energy\);\n"
                    r"5,\d{3} tokens to calibrate in rows of 32, resampled to 10,\d{3}; "
                    r"576 held out in rows of 32;\n"
                    r"about 0\.\d+ GB of memory \(cpu\) and 0\.\d+ GB of disk$", "\n".join(plan))
    assert max(len(line) for line in out.splitlines() if str(tmp_path) not in line) <= 100
    table = table.splitlines()
    report = json.loads((tmp_path / "out/mha2gqa.json").read_text())
    converted = report["loss_nats_per_token"]["converted"]
    assert re.search(rf"converted +{converted:.4f} +\+\d\.\d{{4}}", "\n".join(table))
    assert "  2,048 -> 1,024" in table
    for error in (report["refit"], report["joint_kl"]):
        note = ", no gain: left out" * (error["before"] == error["after"])
        assert f"  mean          {error['before']:.4f} -> {error['after']:.4f}{note}" in table
    status, out, err = command(capfd, "--evaluate", tmp_path / "out", *common)
    held_out = report["tokens"]["held_out"]
    assert out == f"held-out loss {converted:.4f} nats/token, {held_out:,} tokens\n"
    status, out, err = command(capfd, "--evaluate", tmp_path / "out", "--eval-text",
                               trained / "short.jsonl")
    assert status == 0 and err == ""


def test_dry_run_writes_nothing(trained, tmp_path, capfd):
    status, out, err = command(capfd, trained / "mha", tmp_path / "out", "--kv-heads", 4, "--text",
                               trained / "text.jsonl", "--dry-run", "--tokens", 1000)
    assert (status, out.count("\n"), err) == (0, 3, "") and not list(tmp_path.iterdir())
    again = command(capfd, "--kv-heads", 4, "--dry-run", "--tokens", 1000, "--text",
                    trained / "text.jsonl", trained / "mha", tmp_path / "out")  # in another order
    assert again == (status, out, err)


@pytest.mark.slow
def test_short_text_is_a_warning(trained, tmp_path):
    done = subprocess.run([sys.executable, PROGRAM, trained / "mha", tmp_path / "out", "--kv-heads",
                           "4", "--text", trained / "text.jsonl", "--tokens", "1000000000",
                           "--dry-run"], capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout.count("\n") == 3
    assert re.fullmatch(r"warning: the text has [\d,]+ tokens in whole rows of 64, not the "
                        r"1,000,000,000 asked for: using those\n", done.stderr)


def test_gigabytes_have_two_digits_and_no_exponent():
    assert [m.gigabytes(n) for n in (4, 17_300_000, 1.25e9, 123e9)] == [
        "0.000000004 GB", "0.017 GB", "1.2 GB", "120 GB"]


# Ways to break a checkpoint that is fine; each gets its folder.


def edit_config(**changes):
    def edit(folder):
        raw = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps({**raw, **changes}))
    return edit


def edit_index(file):
    def edit(folder):
        index = json.loads((folder / "model.safetensors.index.json").read_text())
        index["weight_map"]["model.norm.weight"] = file
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return edit


def edit_file(name, change):
    """Change a file's bytes; None removes it."""
    def edit(folder):
        content = change((folder / name).read_bytes())
        (folder / name).unlink()
        if content is not None:
            (folder / name).write_bytes(content)
    return edit


def edit_weight(change, name="self_attn.q_proj.weight"):
    """Put {name: tensor} in place of a tensor of the first block."""
    def edit(folder):
        file, prefix = folder / "model-00001-of-00003.safetensors", "model.layers.0."
        tensors = load_file(file)
        changed = change(tensors.pop(prefix + name))
        save_file(tensors | {prefix + n: w for n, w in changed.items()}, file, {"format": "pt"})
    return edit


def as_bin(content):
    """Put one pytorch_model.bin in place of the shards; its bytes are made of the whole one's."""
    def edit(folder):
        _, weights = m.load_checkpoint(folder)
        whole = io.BytesIO()
        torch.save(weights, whole)
        for file in folder.glob("model*"):
            file.unlink()
        (folder / "pytorch_model.bin").write_bytes(content(whole.getvalue()))
    return edit


def torch_file(value):
    buffer = io.BytesIO()
    torch.save(value, buffer)
    return buffer.getvalue()


def other_folder(*names):
    """Put these files in place of all that is there."""
    def edit(folder):
        shutil.rmtree(folder)
        for name in names:
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_bytes(b"{}")
    return edit


SHARD, Q = "model-00002-of-00003.safetensors", "self_attn.q_proj.weight"
POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 132\n"
CORRUPT_BIN = "pytorch_model.bin: truncated, corrupt or not a plain file of tensors"
BROKEN = {
    # files
    "no config": (edit_file("config.json", lambda b: None), "config.json: no such file"),
    "config cut": (edit_file("config.json", lambda b: b[:30]), "config.json: not JSON"),
    "config a list": (edit_file("config.json", lambda b: b"[]"), "expected a JSON object"),
    "no shard": (edit_file(SHARD, lambda b: None), f"{SHARD}: missing or not readable; download"),
    "shard cut": (edit_file(SHARD, lambda b: b[:-100]), f"{SHARD}: truncated, corrupt"),
    "shard of rubbish": (edit_file(SHARD, lambda b: b"\xff" * 1000), f"{SHARD}: truncated"),
    "no weights": (lambda folder: [f.unlink() for f in folder.glob("model*")],
                   r"no model\*.safetensors and no pytorch_model\*.bin"),
    "index above": (edit_index("../x.safetensors"), "'../x.safetensors' is outside the directory"),
    "index absolute": (edit_index("/x.safetensors"), "'/x.safetensors' is outside the directory"),
    "bin cut": (as_bin(lambda b: b[:-1000]), CORRUPT_BIN),
    "bin of rubbish": (as_bin(lambda b: b"garbage"), CORRUPT_BIN),
    "bin empty": (as_bin(lambda b: b""), CORRUPT_BIN),
    "bin with code": (as_bin(lambda b: pickle.dumps(Path("code"), protocol=2)),
                      r"pytorch_model.bin: holds Python objects \(pathlib\S*\), not tensors alone"),
    "bin nested": (as_bin(lambda b: torch_file(
        {"epoch": 3, "optimizer": {"step": 1}, "state_dict": {"x": torch.ones(2)}})),
                   "pytorch_model.bin: holds a dict under 'state_dict', expected tensors alone; if "
                   "that is the model's state dict, save it by itself"),
    "bin with numbers for names": (as_bin(lambda b: torch_file({1: torch.ones(2)})),
                                   "pytorch_model.bin: holds a Tensor under 1, expected tensors"),
    "bin of one tensor": (as_bin(lambda b: torch_file(torch.ones(2))),
                          "pytorch_model.bin: holds a Tensor, expected a state dict"),
    "bin sparse": (as_bin(lambda b: torch_file({"x": torch.ones(2, 2).to_sparse()})),
                   "pytorch_model.bin: x is a sparse tensor, or one without values; save plain"),
    "index without shards": (edit_file("model.safetensors.index.json", lambda b: b"{}"),
                             "model.safetensors.index.json: has no weight_map"),
    "pointer for weights": (edit_file(SHARD, lambda b: POINTER),
                            f"{SHARD}: only a Git LFS pointer to the file; run `git lfs pull` in"),
    "pointer for the config": (edit_file("config.json", lambda b: POINTER),
                               "config.json: only a Git LFS pointer"),
    "pointer for the tokenizer": (edit_file("tokenizer.json", lambda b: POINTER),
                                  "tokenizer.json: only a Git LFS pointer"),
    # folders of other kinds
    "adapter": (other_folder("adapter_config.json", "adapter_model.safetensors"),
                "x: holds adapter_config.json, which is a PEFT adapter's; load it with PEFT"),
    "gguf": (other_folder("model.Q4_0.gguf"), "x: holds model.Q4_0.gguf, which is a GGUF file; tr"),
    "Meta's": (other_folder("consolidated.00.pth", "params.json"),
               "x: holds consolidated.00.pth, which is in Meta's own format; transformers' conv"),
    "hub cache": (other_folder("refs/main", "snapshots/0a1b/config.json"),
                  "x: holds snapshots/0a1b, which is a model in a hub cache; MODEL is that folder"),
    "hub": (other_folder("models--a--b/snapshots/0a1b/config.json"),
            "x: holds models--a--b/snapshots/0a1b, which is a model in this hub cache; MODEL is"),
    "models": (other_folder("gqa/config.json", "report.json"),
               "x: holds gqa/config.json, which is a model's; MODEL is the folder that has it"),
    "training checkpoint": (other_folder("__0_0.distcp", ".metadata"),
                            "x: holds __0_0.distcp, which is a part of a training's checkpoint"),
    "LoRA": (edit_weight(lambda w: {Q: w, "self_attn.q_proj.lora_A.weight": w[:2].clone()}),
             "q_proj.lora_A.weight is of a PEFT adapter, such as LoRA; merge it into its"),
    "PEFT's base": (edit_weight(lambda w: {"self_attn.q_proj.base_layer.weight": w}),
                    "q_proj.base_layer.weight is of a PEFT adapter, such as LoRA; merge it"),
    # what config.json asks for
    "model type": (edit_config(model_type="starcoder2"),
                   r"config.json: not supported: model_type 'starcoder2' \(supported: llama, mis"),
    "activation": (edit_config(hidden_act="gelu"), "not supported: hidden_act 'gelu'"),
    "quantised": (edit_config(quantization_config={"bits": 4}), "not supported: quantised weights"),
    "partial rotary": (edit_config(partial_rotary_factor=0.5), "not supported: partial rotary"),
    "partial rotary, new": (edit_config(rope_parameters={"partial_rotary_factor": 0.5}),
                            "not supported: partial rotary"),
    "mistral's default": (edit_config(model_type="mistral"), "not supported: sliding window"),
    "mistral's window": (edit_config(model_type="mistral", sliding_window=4096),
                         "not supported: sliding window"),
    "olmo2": (edit_config(model_type="olmo2"),
              r"model_type 'olmo2', which has norms .* together \(supported: llama, mistral, q"),
    "qwen3's window": (edit_config(model_type="qwen3", use_sliding_window=True), "sliding window"),
    "qwen2's window": (edit_config(model_type="qwen2", use_sliding_window=True),
                       "not supported: sliding window"),
    "layers with windows": (edit_config(layer_types=["full_attention", "sliding_attention"]),
                            "not supported: sliding window"),
    "dynamic rope": (edit_config(rope_scaling={"type": "dynamic", "factor": 2}),
                     r"not supported: rope type 'dynamic' \(supported: default, linear, llama3\)"),
    "yarn": (edit_config(rope_scaling={"rope_type": "yarn"}), "not supported: rope type 'yarn'"),
    "rope without factor": (edit_config(rope_scaling={"type": "linear"}), "config.json: no factor"),
    "rope with factor 0": (edit_config(rope_scaling={"type": "linear", "factor": 0}),
                           "config.json: factor is 0, expected a positive number"),
    "rope with endless factor": (edit_config(rope_scaling={"type": "linear", "factor": math.inf}),
                                 "config.json: factor is inf, expected a positive number"),
    "rope as text": (edit_config(rope_scaling="linear"),
                     "config.json: rope_scaling is 'linear', expected an object or null"),
    "rope of another type": (edit_config(rope_scaling={"rope_type": ["a"]}), "config.json: "),
    "nested theta": (edit_config(rope_parameters={"rope_theta": "x"}), "rope_theta is 'x', expect"),
    "no size": (edit_config(vocab_size=None), "config.json: no vocab_size"),
    "a size as text": (edit_config(hidden_size="48"), "hidden_size is '48', expected a positive"),
    "theta below 0": (edit_config(rope_theta=-1), "rope_theta is -1, expected a positive"),
    "theta of 0": (edit_config(rope_theta=0), "rope_theta is 0, expected a positive number"),
    "theta as text": (edit_config(rope_theta="10000"), "rope_theta is '10000', expected"),
    "eps as text": (edit_config(rms_norm_eps="1e-5"), "rms_norm_eps is '1e-5', expected a"),
    "heads": (edit_config(num_key_value_heads=3), "num_key_value_heads 3 does not divide"),
    "odd heads": (edit_config(head_dim=7), "head_dim is 7, but RoPE needs an even one"),
    "layers": (edit_config(num_hidden_layers=3),
               "2 layers among the weights, but num_hidden_layers is 3 in config.json"),
    "tied": (edit_config(tie_word_embeddings=True), "but lm_head.weight differs"),
    "eos beyond": (edit_config(eos_token_id=384), "config.json: eos_token_id is 384, expected one "
                   "of the vocabulary's 0 to 383, or null"),
    "eos of several beyond": (edit_config(eos_token_id=[-1, 2]), "config.json: eos_token_id is -1"),
    "eos as text": (edit_config(eos_token_id="2"), "config.json: eos_token_id is '2'"),
    # tensors
    "tensor missing": (edit_weight(lambda w: {}), f"missing tensor model.layers.0.{Q}; is config"),
    "tensor unknown": (edit_weight(lambda w: {Q: w, "self_attn.q_norm.weight": w[0].clone()}),
                       "unknown tensor model.layers.0.self_attn.q_norm.weight; is config.json"),
    "shape": (edit_weight(lambda w: {Q: w[:-1].clone()}),
              rf"{Q} has shape \[47, 48\], expected \[48, 48\] from config.json"),
    "dtype": (edit_weight(lambda w: {Q: w.to(torch.int8)}),
              f"{Q} is torch.int8, expected float16, bfloat16 or float32"),
    "no head": (lambda folder: [edit(folder) for edit in (
        edit_file("model.safetensors.index.json", lambda b: None),
        lambda folder: save_file({"model.norm.weight": torch.ones(48),
                                  "model.embed_tokens.weight": torch.ones(384, 48)},
                                 folder / "model-00003-of-00003.safetensors"))],
                "missing tensor lm_head.weight, but tie_word_embeddings is not true in"),
    # the tokenizer
    "no tokenizer": (edit_file("tokenizer.json", lambda b: None),
                     "no tokenizer.json and no tokenizer.model"),
    "tokenizer broken": (edit_file("tokenizer.json", lambda b: b"{}"),
                         "tokenizer.json: cannot be read"),
    "sentencepiece broken": (lambda folder: (folder / "tokenizer.json").rename(
        folder / "tokenizer.model"), "tokenizer.model: cannot be read"),
    "tokenizer of another": (edit_config(vocab_size=97), "the model's vocabulary has only 97; do"),
}


@pytest.mark.parametrize("what", BROKEN)
def test_broken_checkpoints(trained, tmp_path, capfd, what):
    edit, message = BROKEN[what]
    vocabulary = 97 if what == "tokenizer of another" else 384
    config = config_of(vocab_size=vocabulary)
    save_in_shards(tmp_path / "x", config, random_weights(config), trained / "mha")
    edit(tmp_path / "x")
    refused(capfd, tmp_path, message, tmp_path / "x", tmp_path / "out", "--kv-heads", 2,
            "--text", trained / "text.jsonl")


# Text that is refused: {file name: (content, message)}; None: there is no such file.
BAD_TEXT = {
    "none.txt": (None, "none.txt: no such file"),
    "empty.txt": (b"", "empty.txt: holds no text"),
    "blank.txt": (b" \n", "blank.txt: holds no text"),
    "latin.txt": (b"\xff\xfe\xff", "latin.txt: cannot be read"),
    "cut.jsonl": (b'{"text": "a"}\n{"text": \n', "cut.jsonl, line 2: not JSON"),
    "other.jsonl": (b'{"text": "a"}\n\n{"body": 1}\n', 'other.jsonl, line 3: .* a "text" string'),
    "string.jsonl": (b'"text"\n', "string.jsonl, line 1: expected an object"),
    "not.jsonl.gz": (b"no gzip", "not.jsonl.gz: cannot be read"),
    "cut.jsonl.gz": (gzip.compress(b'{"text": "a"}\n')[:-9], "cut.jsonl.gz: cannot be read"),
    "not.txt.xz": (b"no xz", "not.txt.xz: cannot be read"),
    "pointer.jsonl": (POINTER, "pointer.jsonl: only a Git LFS pointer"),
    "array.json": (b'[{"text": "a"}, {"text"', "array.json: not a JSON array of records"),
    "open.json": (b'[{"text": "a"}, ', "open.json: not a JSON array of records"),
    "mixed.txt": (b'[{"text": "a"}, "b"]', "mixed.txt: not a JSON array of records"),
    "two.txt": (b'[{"text": "a"}][{"text": "b"}]', "two.txt: not a JSON array of records"),
    "array.txt": (b'[{"text": "a"}, {"body": "b"}]', 'array.txt, line 2: .* a "text" string'),
    "trailing.json": (b'[{"text": "a"},]', "trailing.json: not a JSON array of records .expected"),
    "wide.txt": ("a text".encode("utf-16-le"), "wide.txt: holds bytes of 0, as no text in UTF-8"),
    "wide.jsonl": ('{"text": "a"}'.encode("utf-16-le"), "wide.jsonl: holds bytes of 0"),
    "quoted.txt": (b'{"a\\"b": 1, "text": 1}', 'quoted.txt, line 1: .* a "text" string'),
    "empty.txt.txt": (b'[{}, {"text": "a"}]', 'empty.txt.txt, line 1: .* a "text" string'),
    "header.txt": (b'source: web\n{"url": "b", "text": "a"}\n', "header.txt, line 1: not JSON"),
    "indented.txt": (b'{\n  "text": "a"\n}\n{\n  "text": "b"\n}', "indented.txt, line 1: not"),
    "cut.ndjson": (b't": "a"}\n{"text": "b"}\n', "cut.ndjson, line 1: not JSON"),
    "deep.jsonl": (b'{"a":' * 100_000, "deep.jsonl, line 1: not JSON"),
    "deep.txt": (b'[{"a":' * 100_000, "deep.txt: not a JSON array"),
    "short.txt": (b"too short", "too little text in .*short.txt: 2 rows of 64 tokens"),
}


@pytest.mark.parametrize("name", BAD_TEXT)
def test_bad_text(trained, tmp_path, capfd, name):
    content, message = BAD_TEXT[name]
    if content is not None:
        (tmp_path / name).write_bytes(content)
    refused(capfd, tmp_path, message, trained / "mha", tmp_path / "out", "--kv-heads", 4,
            "--text", tmp_path / name)


# Arguments after MODEL OUT --kv-heads 4 --text FILE, and what is said of them.
BAD_ARGUMENTS = {
    "rows too long": (["--seq-len", 65], "sequence length 65: expected 2 to 64 for this model"),
    "rows too short": (["--seq-len", 1], "sequence length 1: expected 2 to 64"),
    "one row": (["--tokens", 100], "100 tokens: expected at least two rows of 64"),
    "nothing to train a refit on": (["--eval-text", "{text}", "--text", "{two rows}"],
                                    "2 rows of 64 tokens are needed to calibrate with, found 1; "
                                    "more text, a smaller --seq-len, or --no-refit and"),
    "a folder as text": (["--text", "{trained}"], "is a directory"),
    "held-out text too short": (["--eval-text", "{little}"], "too little text in .*little.txt: 1"),
    "device": (["--device", "gpu"], "device 'gpu': expected auto, cpu"),
    "seed": (["--seed", -1], "seed -1: expected 0 to 4294967295"),
    "seed too large": (["--seed", 2**32], "seed 4294967296: expected 0 to 4294967295"),
    "cosine": (["--metric", "cos"], "metric cos: linear alignment and groups by energy weigh"),
    "3 heads": (["--kv-heads", 3], "3 KV heads: the source has 8, choose one of 1, 2, 4"),
    "8 heads": (["--kv-heads", 8], "8 KV heads: the source has 8, choose one of 1, 2, 4"),
    "16 heads": (["--kv-heads", 16], "16 KV heads: the source has 8"),
    "0 heads": (["--kv-heads", 0], "0 KV heads: the source has 8"),
    "minus 2 heads": (["--kv-heads=-2"], "-2 KV heads: the source has 8"),
}


@pytest.mark.parametrize("what", BAD_ARGUMENTS)
def test_bad_arguments(trained, tmp_path, capfd, what):
    more, message = BAD_ARGUMENTS[what]
    (tmp_path / "little.txt").write_text("too short")
    (tmp_path / "rows.txt").write_text("".join(map(chr, range(33, 123))))
    places = {"text": trained / "text.jsonl", "trained": trained, "two rows": tmp_path / "rows.txt",
              "little": tmp_path / "little.txt"}
    refused(capfd, tmp_path, message, trained / "mha", tmp_path / "out", "--kv-heads", 4, "--text",
            trained / "text.jsonl", *(str(x).format_map(places) for x in more))


@pytest.mark.parametrize("out, message", [
    ("full", "full: exists and is not an empty directory; choose another one"),
    ("file", "file: exists and is not an empty directory; choose another one"),
    ("deep/out", "deep: no such directory, or no permission to write into it")])
def test_outputs_that_are_refused(trained, tmp_path, capfd, out, message):
    (tmp_path / "full").mkdir()
    (tmp_path / "full/file").touch()
    (tmp_path / "file").touch()
    refused(capfd, tmp_path, message, trained / "mha", tmp_path / out, "--kv-heads", 4, "--text",
            trained / "text.jsonl")


def test_a_directory_that_cannot_be_written(trained, tmp_path, capfd, train_command, monkeypatch):
    allowed = os.access
    monkeypatch.setattr(os, "access", lambda path, mode: mode != os.W_OK and allowed(path, mode))
    refused(capfd, tmp_path, f"{tmp_path}: no such directory, or no permission to write into it",
            trained / "mha", tmp_path / "out", "--kv-heads", 4, "--text", trained / "text.jsonl")
    status, _, err = train_command(*train_arguments(trained, tmp_path / "out"))
    assert (status, err) == (2, f"error: {tmp_path}: no permission to write into it\n")
    assert not list(tmp_path.iterdir())


def test_the_current_directory_is_not_replaced(trained, tmp_path, capfd, monkeypatch):
    monkeypatch.chdir(tmp_path)
    refused(capfd, tmp_path, "cannot be replaced; choose a new directory inside of it",
            trained / "mha", ".", "--kv-heads", 4, "--text", trained / "text.jsonl")


@pytest.mark.parametrize("model, message", [
    ("{trained}/nowhere", r"nowhere: no such directory \(MODEL is one, or OWNER/NAME on the hub\)"),
    ("{trained}/text.jsonl", "text.jsonl: is a file; MODEL is the directory with config.json, th"),
    ("owner/name", r"owner/name: no such directory, and the .* not .* it \(Runt.*: no net\)")])
def test_models_that_are_no_directory(trained, tmp_path, capfd, monkeypatch, model, message):
    def offline(*_, **__):
        raise RuntimeError("no net\nat all")

    monkeypatch.chdir(tmp_path)

    monkeypatch.setattr("huggingface_hub.snapshot_download", offline)
    refused(capfd, tmp_path, message, model.format(trained=trained), tmp_path / "out",
            "--kv-heads", 4, "--text", trained / "text.jsonl")


def test_a_model_of_the_hub(trained, tmp_path, capfd, monkeypatch):
    """A folder of that name wins; of the hub's files the weights come once, in one format."""
    hub, asked = tmp_path / "hub/models--owner--name/snapshots/0", []

    def download(name, allow_patterns):
        assert name == "owner/name"
        asked.extend(allow_patterns)
        for pattern in allow_patterns:
            for file in bins.glob(pattern):
                hub.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(file, hub / file.name)
        return str(hub)

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    monkeypatch.chdir(tmp_path)
    config, weights = m.load_checkpoint(trained / "mha")
    bins = make_directory(tmp_path / "bins", config, {"pytorch_model.bin": dict(weights)})
    for file in (trained / "mha").glob("tokenizer*"):
        shutil.copy(file, bins)
    (bins / "README.md").write_text(
        "---\nlicense: mit\nlanguage:\n- no\ntags: [a]\nmodel-index:\n- name: x\n---\n"
        "# The model\n")
    (bins / "model.onnx").write_bytes(b"x")
    arguments = ("owner/name", "out", "--kv-heads", 4, "--text", trained / "text.jsonl",
                 "--tokens", 1000, "--align", "none")
    status, _, err = command(capfd, *arguments)
    assert (status, err) == (0, "")
    assert not (hub / "model.onnx").exists() and asked[-1] == "pytorch_model*.bin"
    card = (tmp_path / "out/README.md").read_text()
    _, head, text = card.split("---\n", 2)
    assert head.splitlines() == [
        'base_model: "owner/name"', "library_name: transformers", "tags:", '- "a"', '- "mha2gqa"',
        '- "grouped-query-attention"', "license: mit", "language:", "- no"]
    assert text.startswith("\n# owner/name, grouped-query attention\n")
    assert text.endswith("\n# The model\n")
    loss = json.loads((tmp_path / "out/mha2gqa.json").read_text())["loss_nats_per_token"]
    assert re.search(rf"\| source \| {loss['source']:.4f} \| 0.0000 \| 2,048 \|", text)
    assert re.search(rf"\| converted \| {loss['converted']:.4f} \| \d\.\d+ \| 1,024 \|", text)

    (tmp_path / "owner").mkdir()
    shutil.copytree(trained / "mha", tmp_path / "owner/name")
    asked.clear()
    assert command(capfd, *arguments, "--dry-run")[0] == 2  # OUT is there
    assert command(capfd, *arguments[:1], "new", *arguments[2:], "--dry-run")[0] == 0
    assert not asked


def test_rope_is_written_in_both_spellings():
    """For readers that know the old one alone, and would take the defaults."""
    config = config_of("new spelling")
    written = m._config_json(config)
    assert written["rope_parameters"] == config.raw["rope_parameters"]
    assert written["rope_theta"] == 20000.0 and written["rope_scaling"]["rope_type"] == "llama3"
    del written["rope_parameters"]
    assert m._parse_config(written) == config
    assert "rope_theta" not in m._config_json(config_of("mha"))


@pytest.mark.parametrize("readme", [None, "# No head", "---\n: {no yaml\n# Text"])
def test_a_card_of_any_kind_stays_below(trained, tmp_path, readme):
    if readme:
        (tmp_path / "README.md").write_text(readme)
    (tmp_path / "out").mkdir()
    m.write_model_card(tmp_path / "out", tmp_path, {"source": 2, "converted": 1},
                       {"source": {"loss": 3.0}, "converted": {"loss": 3.5}}, "so")
    card = (tmp_path / "out/README.md").read_text()
    assert card.startswith(f'---\nbase_model: "{tmp_path.name}"\n')
    assert "| converted | 3.5000 | 1 |" in card
    assert card.endswith(f"\n---\n\nThe original's card:\n\n{readme}\n" if readme else "```\n")
    (tmp_path / "again").mkdir()  # of what was converted: the base is still the first source
    m.write_model_card(tmp_path / "again", tmp_path / "out", {"source": 2, "converted": 1},
                       {"source": {"loss": 3.0}, "converted": {"loss": 3.5}}, "so")
    again = (tmp_path / "again/README.md").read_text()
    assert again.startswith(f'---\nbase_model: "{tmp_path.name}"\n')
    assert again.count("@inproceedings{jin2025align") == 2


def test_the_head_of_a_card_is_yaml(tmp_path):
    yaml = pytest.importorskip("yaml")
    source = tmp_path / "model: v1"
    source.mkdir()
    (source / "README.md").write_text(
        "---\nlicense: mit\ntags: [\n  x, 'b: c' # so\n]\nwidget:\n- text: tags\nlanguage: 'no'\n"
        "inference: false\nbase_model: {\n a\n}\n---\nText")
    m.write_model_card(tmp_path, source, {"source": 2, "converted": 1},
                       {"source": {"loss": 3.0}, "converted": {"loss": 3.5}}, "so")
    head = yaml.safe_load((tmp_path / "README.md").read_text().split("---\n")[1])
    assert head == {"base_model": "model: v1", "library_name": "transformers",
                    "tags": ["x", "b: c", "mha2gqa", "grouped-query-attention"], "license": "mit",
                    "widget": [{"text": "tags"}], "language": "no", "inference": False}


@pytest.mark.parametrize("files, left", [
    ({}, sys.maxsize), ({"memory.max": "max", "memory.stat": "anon 5\n"}, sys.maxsize),
    ({"memory.max": "100\n", "memory.stat": "anon 30\nfile 60\n"}, 70),
    ({"memory/memory.limit_in_bytes": "100", "memory/memory.stat": "total_rss 120\n"}, 0)])
def test_memory_that_a_container_leaves(tmp_path, files, left):
    """Of its limit, less what is not the disk's anyway."""
    (tmp_path / "memory").mkdir()
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    assert m._container_memory(tmp_path) == left


def test_mean_pooling_is_said_once_where_it_is_the_result():
    scores = {"source": 0.0, "mean_pooled": 2.0, "converted": 2.0}
    plain = {"align": "none", "group": "adjacent", "refit": False}
    assert list(m.without_repeats(scores, plain)) == ["source", "converted"]
    for trained in ("refit", "joint"):
        assert m.without_repeats(scores, {**plain, trained: True}) == scores


def test_one_kv_head_is_nothing_to_merge(trained, tmp_path, capfd):
    config = config_of(vocab_size=384, num_key_value_heads=1)
    m.save_checkpoint(tmp_path / "x", config, random_weights(config), trained / "mha")
    refused(capfd, tmp_path, "1 KV heads: the source has 1, nothing to merge", tmp_path / "x",
            tmp_path / "out", "--kv-heads", 1, "--text", trained / "text.jsonl")


def test_too_small_a_disk_is_seen_before(trained, tmp_path, capfd, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: types.SimpleNamespace(free=1000))
    refused(capfd, tmp_path, r"[\d,]+ bytes are needed, 1,000 are free", trained / "mha",
            tmp_path / "out", "--kv-heads", 4, "--text", trained / "text.jsonl")


@pytest.mark.parametrize("name", ["model.embed_tokens.weight", "lm_head.weight",
                                  "model.layers.1.mlp.up_proj.weight"])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_weights_that_are_not_finite(trained, tmp_path, capfd, name, value):
    config, weights = m.load_checkpoint(trained / "mha")
    weights[name] = weights[name].clone()
    weights[name][3, 5] = value
    m.save_checkpoint(tmp_path / "x", config, weights, trained / "mha")
    refused(capfd, tmp_path, f"tensor {name} holds values that are not finite", tmp_path / "x",
            tmp_path / "out", "--kv-heads", 4, "--text", trained / "text.jsonl", "--tokens", 1000,
            "--align", "none")


def test_activations_that_overflow_are_seen_by_resampling(trained, tmp_path, capfd):
    config, weights = m.load_checkpoint(trained / "mha")
    huge = {n: w * 1e38 if "layers.1.self_attn.k_proj" in n else w for n, w in weights.items()}
    m.save_checkpoint(tmp_path / "x", config, huge, trained / "mha")
    refused(capfd, tmp_path, "block 1: its hidden states on this text are not finite",
            tmp_path / "x", tmp_path / "out", "--kv-heads", 4, "--text", trained / "text.jsonl",
            "--tokens", 1000)


def test_too_little_memory_is_a_warning(trained, corpus, tmp_path, monkeypatch):
    monkeypatch.setattr(m, "_memory_needed", lambda *_: 10**15)
    for method, less in ((m.Method(), "--no-joint"), (m.Method(refit=False), "fewer --tokens")):
        with pytest.warns(UserWarning, match=f"about 1000000 GB of memory are needed, .*{less}"):
            m.convert(trained / "mha", tmp_path / "out", 4, corpus, method, dry_run=True)


@pytest.mark.parametrize("part, factor, what", [
    ("self_attn.k_proj", 1e25, "keys"), ("self_attn.v_proj", 1e25, "values"),
    ("self_attn.q_proj", 1e25, "queries"), ("mlp.up_proj", 1e37, "hidden states")])
def test_activations_that_overflow(trained, tmp_path, capfd, part, factor, what):
    config, weights = m.load_checkpoint(trained / "mha")
    huge = {n: w * factor if f"layers.1.{part}" in n else w for n, w in weights.items()}
    m.save_checkpoint(tmp_path / "x", config, huge, trained / "mha")
    refused(capfd, tmp_path, f"block 1: its {what} on this text are not finite", tmp_path / "x",
            tmp_path / "out", "--kv-heads", 4, "--text", trained / "text.jsonl", "--tokens", 1000,
            "--group", "adjacent")


def test_converted_weights_that_overflow(trained, tmp_path, capfd):
    """Sharing may need a weight that is beyond float16."""
    config, weights = m.load_checkpoint(trained / "mha")
    narrow = {n: w.to(torch.float16) for n, w in weights.items()}
    name = "model.layers.0.self_attn.v_proj.weight"
    narrow[name] = 6e4 * narrow[name][:1].sign().expand_as(narrow[name])  # all dims are the same
    m.save_checkpoint(tmp_path / "x", config, narrow, trained / "mha")
    refused(capfd, tmp_path, f"tensor converted {name} holds values that are not finite",
            tmp_path / "x", tmp_path / "out", "--kv-heads", 4, "--text", trained / "text.jsonl",
            "--tokens", 1000, "--no-refit")


def test_the_benchmark_of_a_conversion(tmp_path, capfd, monkeypatch):
    """From config.json alone; the floor of a stage is its matrix products', counted by hand."""
    m.write_json(tmp_path / "config.json", BASE)
    monkeypatch.setattr(m, "matrix_rate", lambda *_: 1e9)
    before = sorted(tmp_path.rglob("*"))
    found = m.benchmark(tmp_path, 2, 1000, 20)
    assert found["flop_per_second"]["float32"] == 1e9 and found["peak_memory_bytes"]["host"] > 0
    stages = ["resample", "read", "calibrate", "align", "merge", "refit", "joint refit",
              "evaluate", "write"]
    assert list(found["seconds"]) == list(found["floor_seconds"]) == stages
    assert found["floor_seconds"]["write"] == 0 < found["floor_seconds"]["refit"]
    config = m.load_config(tmp_path)

    def matrices(config):
        weights = random_weights(config).items()
        return sum(w.numel() for name, w in weights if w.ndim == 2 and "layers" in name)

    blocks = matrices(config) + 2 * matrices(m.gqa_config(config, 2))
    head = 3 * config.hidden_size * config.vocab_size  # 5 rows of 20 tokens, 19 predictions of each
    assert found["floor_seconds"]["evaluate"] == pytest.approx(
        2 * (100 * blocks + 95 * head) / 1e9)
    status, out, err = command(
        capfd, "--benchmark", tmp_path, "--kv-heads", 2, "--tokens", 1024, "--no-refit")
    assert (status, err) == (0, "") and sorted(tmp_path.rglob("*")) == before
    assert re.search(r"^floor: .* products, at 0.001 TFLOP/s in float32", out, re.M)
    assert re.search(r"^calibrate +\d+\.\d\d +\d+\.\d\d$", out, re.M)
    assert re.search(r"^peak memory: host [\d.]+ GB$", out, re.M)
    refused(capfd, tmp_path, "1000 tokens: expected at least two rows of 512", "--benchmark",
            tmp_path, "--kv-heads", 2, "--tokens", 1000)


def test_shards_hold_blocks_up_to_their_size(tmp_path, monkeypatch):
    """Four blocks of 20,000 bytes and a rest of 12,000, in shards of 45,000."""
    config = config_of("gqa", num_hidden_layers=4)
    weights = random_weights(config)
    block = m._n_bytes(m.block_weights(weights, 0).values())
    monkeypatch.setattr(m, "_SHARD_BYTES", int(2.5 * block))
    m.save_checkpoint(tmp_path / "out", config, weights)
    index = json.loads((tmp_path / "out/model.safetensors.index.json").read_text())
    shards = [f"model-{i:05d}-of-00003.safetensors" for i in (1, 2, 3)]
    assert sorted(f.name for f in (tmp_path / "out").glob("*.safetensors")) == shards
    assert index["metadata"]["total_size"] == m._n_bytes(weights.values())
    assert index["weight_map"] == {n: shards[int(n.split(".")[2]) // 2 if "layers" in n else 2]
                                   for n in weights}
    assert same_weights(m.load_checkpoint(tmp_path / "out")[1], weights)


def limit_file_size():
    resource.setrlimit(resource.RLIMIT_FSIZE, (60_000, 60_000))


@pytest.mark.slow
def test_a_full_disk_leaves_nothing(trained, tmp_path):
    """As a program of its own, whose files may not grow beyond what the first shard needs."""
    done = subprocess.run(
        [sys.executable, PROGRAM, trained / "mha", tmp_path / "out", "--kv-heads", "4", "--text",
         trained / "text.jsonl", "--tokens", "1000"],
        capture_output=True, text=True, preexec_fn=limit_file_size)
    assert done.returncode == 2 and not list(tmp_path.iterdir())
    assert re.fullmatch(r"error: .*part-00001.*File too large.*\n", done.stderr)


@pytest.mark.parametrize("module, name, calls", [
    (m, "write_json", 1), (m, "write_json", 2), (m, "write_json", 3), (shutil, "copyfile", 1),
    (m, "rename_when_on_disk", 1)])
def test_a_full_disk_at_the_small_files(trained, tmp_path, capfd, monkeypatch, module, name, calls):
    """Of mha2gqa.json, index and config.json, of the tokenizer, and when all is flushed."""
    whole, counter = getattr(module, name), itertools.count(1)

    def write(*arguments):
        if next(counter) == calls:
            raise OSError(28, "No space left on device")
        return whole(*arguments)

    monkeypatch.setattr(module, name, write)
    monkeypatch.setattr(m, "_SHARD_BYTES", 0)  # so that there is an index
    refused(capfd, tmp_path, "No space left on device", trained / "mha", tmp_path / "out",
            "--kv-heads", 4, "--text", trained / "text.jsonl", "--tokens", 1000, "--align", "none")


def test_logits_that_are_not_finite_are_no_result(tmp_path, trained, capfd):
    config, weights = m.load_checkpoint(trained / "mha")
    weights = {**weights, "lm_head.weight": torch.full_like(weights["lm_head.weight"], 1e38)}
    m.save_checkpoint(tmp_path / "x", config, weights, trained / "mha")
    message = "the source model's logits are not finite"
    refused(capfd, tmp_path, message, tmp_path / "x", tmp_path / "out", "--kv-heads", 4, "--text",
            trained / "text.jsonl", "--tokens", 1000, "--align", "none")
    refused(capfd, tmp_path, message, "--evaluate", tmp_path / "x", "--text",
            trained / "text.jsonl")


@pytest.mark.parametrize("error, said", [
    (RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried"), "error: Default.*\n"),
    (MemoryError(), "error: not enough memory\n"),
    (torch.OutOfMemoryError("CUDA o"), "error: CUDA o\n"),
    (RuntimeError("a mistake of ours"), None)])
def test_too_little_memory_is_one_line(capfd, monkeypatch, error, said):
    def convert(*_, **__):
        raise error

    monkeypatch.setattr(m, "convert", convert)
    if said is None:
        with pytest.raises(RuntimeError, match="of ours"):
            command(capfd, "x", "y", "--kv-heads", 4, "--text", "z")
    else:
        status, out, err = command(capfd, "x", "y", "--kv-heads", 4, "--text", "z")
        assert (status, out) == (2, "") and re.fullmatch(said, err)


@pytest.mark.parametrize("arguments, message", [
    (["--text", "x", "--evaluate"], "--evaluate needs MODEL, before --text"),
    (["x"], "a conversion needs MODEL OUT --kv-heads G --text FILE"),
    (["x", "y", "--kv-heads", "4"], "no --text FILE"),
    (["x", "y", "--kv-heads", "four"], "argument --kv-heads: invalid int value: 'four'"),
    (["--evaluate", "x"], "no --text FILE"),
    (["--benchmark", "x"], "--benchmark takes MODEL and --kv-heads G"),
    (["--benchmark", "x", "y", "--kv-heads", "4"], "--benchmark takes MODEL and --kv-heads G"),
    (["--evaluate", "x", "y", "--text", "z"], "--evaluate takes MODEL and text")])
def test_usage_errors_are_one_line(capfd, arguments, message):
    with pytest.raises(SystemExit) as end:
        m.main(arguments)
    assert end.value.code == 2
    err = capfd.readouterr().err
    assert err.startswith(f"error: {message}") and err.count("\n") == 1


@pytest.mark.parametrize("arguments, printed", [
    ([], r"usage: mha2gqa MODEL OUT (.*\n)*the demo, (.*\n)*.*train_gqa.py.*\n"),
    (["--version"], rf"mha2gqa {m.__version__} \(torch .*\)\n")])
def test_what_there_is_to_know_without_a_model(capfd, arguments, printed):
    with pytest.raises(SystemExit):
        m.main(arguments)
    assert re.fullmatch(printed, "".join(capfd.readouterr()))


def test_plots_of_conversions(trained, converted, tmp_path, capfd, monkeypatch):
    """What is drawn is what the reports say."""
    figure = pytest.importorskip("matplotlib.figure")
    drawn = []
    monkeypatch.setattr(figure.Figure, "savefig", lambda self, file, dpi: drawn.append(self))
    outs = [converted("mha", 4)[0], converted("mha", 2)[0]]
    assert command(capfd, "--plot", *outs)[:2] == (0, "written to plot.png\n")
    reports = [json.loads((out / "mha2gqa.json").read_text()) for out in outs]
    (line, _), (label,) = drawn[0].axes[0].lines, drawn[0].legends[0].get_texts()
    losses = [report["loss_nats_per_token"] for report in reports]
    assert label.get_text() == "align linear, refit, joint"
    assert line.get_xydata() == pytest.approx(np.array(
        [[size, loss["converted"] - loss["source"]] for size, loss in
         ((0.5, losses[1]), (1, losses[0]))]))

    assert command(capfd, "--plot", outs[1])[0] == 0
    block = reports[1]["layers"][1]
    order = sum(block["groups"], [])
    for axis, pairs in zip(drawn[1].axes[:2], block["pairs"].values(), strict=True):
        pairs = np.array(pairs)[np.ix_(order, order)]
        np.fill_diagonal(pairs, np.nan)
        np.testing.assert_array_equal(axis.images[0].get_array().filled(np.nan), pairs)
    assert np.mean(block["pairs"]["before"]) < np.mean(block["pairs"]["after"]) < 1
    errors = [layer["hidden_state_error"] for layer in reports[1]["layers"]]
    assert drawn[1].axes[2].lines[0].get_ydata().tolist() == errors
    refused(capfd, tmp_path, "mha2gqa.json: no such file", "--plot", trained / "mha")
    run(trained, "mha", tmp_path / "plain", 4, align="none", refit=False, joint=False)
    assert command(capfd, "--plot", tmp_path / "plain")[0] == 0
    assert len(drawn[2].axes) == 1  # the errors alone
    (tmp_path / "bare").mkdir()  # as of a training with masks and groups of neighbours
    m.write_json(tmp_path / "bare/mha2gqa.json", {
        "method": {"group": "adjacent", "metric": "dist"}, "layers": [{"groups": [[0, 1]]}]})
    refused(capfd, tmp_path, "bare: nothing to draw; expected", "--plot", tmp_path / "bare")


def heed_signals():
    """Undo what nohup and background jobs of a shell hand down: ignored signals."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_DFL)


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_an_interrupted_conversion_leaves_nothing(trained, tmp_path, number):
    program = subprocess.Popen(
        [sys.executable, PROGRAM, trained / "mha", tmp_path / "out", "--kv-heads", "4", "--text",
         trained / "text.jsonl", "--tokens", "200000"],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, preexec_fn=heed_signals)
    program.stdout.readline()  # what will be done
    while not list(tmp_path.iterdir()):
        assert program.poll() is None
        time.sleep(0.01)
    program.send_signal(number)
    assert program.communicate()[1] == "interrupted: nothing was written\n"
    assert program.returncode == 130 and not list(tmp_path.iterdir())


@pytest.mark.slow
def test_the_next_conversion_removes_what_a_killed_one_left(trained, tmp_path):
    """After 4 kills at random moments it writes bit for bit what one alone writes."""
    def start(out):
        program = subprocess.Popen(
            [sys.executable, PROGRAM, trained / "mha", out, "--kv-heads", "2", "--text",
             trained / "text.jsonl", "--tokens", "6000"], stdout=subprocess.PIPE)
        program.stdout.readline()  # what will be done
        return program, time.monotonic()

    (tmp_path / "whole").mkdir()
    program, begin = start(tmp_path / "whole/out")
    program.communicate()
    seconds, rng = time.monotonic() - begin, random.Random(0)
    others = [".mha2gqa-out2-999999999", ".mha2gqa-out-2-999999999", ".mha2gqa-out-x",
              f".mha2gqa-out-{os.getppid()}", "whole"]
    for other in others[:-1]:  # of other conversions, or of one that is running
        (tmp_path / other).mkdir()
    for _ in range(4):
        program, _ = start(tmp_path / "out")
        time.sleep(rng.uniform(0, seconds))
        program.kill()
        program.communicate()
        if (tmp_path / "out").exists():  # it was faster
            m.load_checkpoint(tmp_path / "out")  # whole
            shutil.rmtree(tmp_path / "out")
        left = set(os.listdir(tmp_path)) - set(others)
        assert left <= {f".mha2gqa-out-{program.pid}"}
    program, _ = start(tmp_path / "out")
    program.communicate()
    assert program.returncode == 0 and sorted(os.listdir(tmp_path)) == sorted([*others, "out"])
    (_, a), (_, b) = (m.load_checkpoint(tmp_path / name) for name in ("whole/out", "out"))
    assert same_weights(a, b)


# ---- the trainer: whole runs ---------------------------------------------------------------------

TRAINER = PROGRAM.with_name("train_gqa.py")


WAYS = {"paper": ("--align", "rotation"), "default": ()}
each_way = pytest.mark.parametrize("way", WAYS)
TORCHRUN = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")


def train_arguments(trained, out, way="paper", *more):
    return [str(x) for x in (
        "--model", trained / "mha", "--kv-heads", "2", "--out", out, "--text",
        trained / "short.jsonl", "--steps", "20", "--batch-tokens", "512", "--save-every", "4",
        "--lr", "1e-3", "--calibration-tokens", "8192", *WAYS[way], *more)]


def train_run(arguments, launch=()):
    """A run as a program of its own."""
    done = subprocess.run([sys.executable, *launch, TRAINER, *arguments], capture_output=True,
                          text=True)
    assert done.returncode == 0, done.stderr
    return done


def read_metrics(out, stage="distill"):
    records = map(json.loads, (out / "metrics.jsonl").read_text().splitlines())
    return {r["step"]: r for r in records if r["stage"] == stage}


@pytest.fixture(scope="session")
def runs(trained, tmp_path_factory):
    """(OUT, the finished process) of 20 steps of a way, by one process or by torchrun's two."""
    @functools.cache
    def run(way, processes=1):
        out = tmp_path_factory.mktemp("runs") / "out"
        launch = TORCHRUN if processes == 2 else ()
        return out, train_run(train_arguments(trained, out, way), launch)

    return run


@pytest.fixture
def alone():
    """This process as the only one of a group; its device."""
    threads = torch.get_num_threads()
    yield train_gqa.start_processes()
    torch.distributed.destroy_process_group()
    torch.set_num_threads(threads)


@pytest.mark.slow
@each_way
def test_a_training_run_ends_in_a_better_model_that_transformers_loads(runs, way):
    out, done = runs(way)
    report = json.loads((out / "report.json").read_text())
    loss, kl = ({name: s[of] for name, s in report["scores"].items()} for of in ("loss", "kl"))
    assert list(loss) == ["source", "mean_pooled", "converted", "distilled"]
    assert loss["source"] < loss["distilled"] < loss["converted"] < loss["mean_pooled"]
    assert abs(kl["source"]) < 1e-6 and 0 < kl["distilled"] < kl["converted"] < kl["mean_pooled"]
    for name, column in (("loss", loss), ("KL", kl)):
        assert f"{name:<23}" + "".join(f"{x:12.4f}" for x in column.values()) in done.stdout
    assert f"KV cache, bytes a token{2048:12,}{512:12}{512:12}{512:12}\n" in done.stdout
    assert max(map(len, done.stdout.splitlines()[:-1])) <= 100
    assert m.load_config(out / "gqa").num_key_value_heads == 2
    assert_transformers_computes_the_same(out / "gqa")
    assert sorted(p.name for p in (out / "checkpoints").iterdir()) == ["step_12", "step_16"]


@pytest.mark.slow
def test_the_loss_in_the_report_is_that_of_the_written_model(runs):
    out, _ = runs("paper")
    report = json.loads((out / "report.json").read_text())
    config, weights = m.load_checkpoint(out / "gqa")
    arguments = report["arguments"]
    encode = m.load_tokenizer(arguments["model"])
    documents = m._Documents(arguments["text"], 10**6)
    rows = m._pack_rows(documents, encode, config, 10**6, 64, seed=0)
    rows = rows[: len(rows) // 10]  # held out: the first rows, as many as 10 %
    logits = logits_of(config, weights, rows)[:, :-1].flatten(0, 1)
    loss = F.cross_entropy(logits, rows[:, 1:].flatten()).item()
    assert loss == pytest.approx(report["scores"]["distilled"]["loss"])


@pytest.mark.slow
@each_way
def test_what_a_run_logs(runs, way):
    metrics = read_metrics(runs(way)[0])
    assert sorted(metrics) == list(range(20))
    for r in metrics.values():
        assert r["loss"] == pytest.approx(r["kl"] + r["bild"], abs=1e-6)
        assert {"lr", "gradient_norm", "tokens_per_second"} < r.keys()
        assert ("mask_mean" in r) == (way == "paper")


@pytest.mark.slow
def test_masks_fade_on_the_paper_s_way(runs):
    """The student starts as the source; masks follow their target, and are 0 from 80 % on."""
    metrics = read_metrics(runs("paper")[0])
    assert abs(metrics[0]["loss"]) < 1e-5 and metrics[4]["loss"] > 1e-3
    for step, r in metrics.items():
        assert r["mask_target"] == pytest.approx(max(0, 1 - step / 6))
        assert r["mask_mean"] == pytest.approx(sum(r["mask_layers"]) / 2, abs=1e-4)
        assert r["mask_lr"] > 0
        if 0 < step < 16:
            assert abs(r["mask_mean"] - r["mask_target"]) <= 0.01
        elif step >= 16:
            assert r["mask_layers"] == [0, 0]
    assert metrics[16]["loss"] < 1.2 * metrics[15]["loss"]


@pytest.mark.slow
@each_way
def test_two_processes_make_the_same_run(runs, way):
    (one_out, _), (two_out, _) = runs(way), runs(way, processes=2)
    one, two = read_metrics(one_out), read_metrics(two_out)
    for step in one:
        assert two[step]["loss"] == pytest.approx(one[step]["loss"], abs=1e-5)
    (_, a), (_, b) = (m.load_checkpoint(p / "gqa") for p in (one_out, two_out))
    assert max((a[n] - b[n]).abs().max() for n in a) < 1e-5


def start_group(arguments, processes, prepare=lambda: None, program=(TRAINER,)):
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
            [sys.executable, *program, *arguments], text=True, cwd=PROGRAM.parent,
            env={**os.environ, **{name: str(value) for name, value in environment.items()}},
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, preexec_fn=begin)


@pytest.mark.slow
@pytest.mark.parametrize("number, processes, way", [
    (signal.SIGTERM, 1, "paper"), (signal.SIGTERM, 2, "paper"), (signal.SIGTERM, 2, "default"),
    (signal.SIGKILL, 1, "default"), (signal.SIGKILL, 2, "paper")])
def test_a_stopped_run_continues_bit_for_bit(trained, runs, tmp_path, number, processes, way):
    out, (whole, _) = tmp_path / "out", runs(way, processes)
    arguments = train_arguments(trained, out, way)
    group = list(start_group(arguments, processes))
    while not (out / "metrics.jsonl").exists() or len(read_metrics(out)) < 10:
        assert all(p.poll() is None for p in group)
        time.sleep(0.01)
    for p in group[: processes if number == signal.SIGKILL else 1]:
        p.send_signal(number)
    printed = [p.communicate()[0] for p in group]
    if number == signal.SIGTERM:  # one got it; all write a checkpoint and end
        assert [p.returncode for p in group] == [130] * processes
        assert "the same command continues" in printed[0]
        assert len(list((out / "checkpoints").glob("step_*"))) == 2
    done = len(read_metrics(out))
    assert not (out / "gqa").exists() and 10 <= done < 20
    leave_what_a_kill_leaves(out)
    for p in list(start_group(arguments, processes)):
        assert "error" not in p.communicate()[0] and p.returncode == 0
    assert not list(out.glob(".mha2gqa*"))
    assert_same_run(out, whole)


def test_the_demo_makes_its_source_first(tmp_path, train_command, monkeypatch):
    """It asks no hub for it, although its name could be one there."""
    monkeypatch.chdir(tmp_path)
    made = []

    def make(corpus, device):
        made.append(corpus)
        raise ValueError("as far as that")

    monkeypatch.setattr(train_gqa, "make_demo_source", make)
    monkeypatch.setattr("huggingface_hub.snapshot_download", None)
    assert train_command()[::2] == (2, "error: as far as that\n") and len(made) == 1


def test_models_of_the_hub_in_training(trained, tmp_path, train_command, monkeypatch):
    """Source and teacher alike."""
    monkeypatch.setattr("huggingface_hub.snapshot_download",
                        lambda name, **_: str(trained / name.removeprefix("owner/")))
    arguments = train_arguments(trained, tmp_path / "out", "default", "--teacher", "owner/gqa")
    arguments[1] = "owner/mha"
    status, _, err = train_command(*arguments)
    assert status == 2 and "gqa: its num_key_value_heads is 4, the model's 8: it cannot" in err


@pytest.mark.slow
def test_plots_of_a_training(runs, tmp_path, monkeypatch):
    """And several runs of which one has been trained; the files are pictures."""
    figure = pytest.importorskip("matplotlib.figure")
    (paper, _), (default, _) = runs("paper"), runs("default")
    for name, folders in (("one", [paper]), ("other", [default]), ("both", [paper, default])):
        m.plot(folders, tmp_path / f"{name}.png")
        assert (tmp_path / f"{name}.png").read_bytes().startswith(b"\x89PNG")
    report = json.loads((default / "gqa/mha2gqa.json").read_text())
    losses, tokens = report["loss_nats_per_token"], report["tokens"]
    assert report["versions"]["mha2gqa"] == m.__version__ and report["training"]["steps"] == 20
    assert report["training"]["lr"] == 1e-3 and tokens["training"] == 20 * 512
    assert report["method"] == dataclasses.asdict(m.Method(joint=False))
    (way, *_), _, gap = m._summary(default)
    assert m._summary(default) == m._summary(default / "gqa")
    assert way == "align linear, refit, training" and gap == losses["distilled"] - losses["source"]
    card = (default / "gqa/README.md").read_text()
    assert f"| distilled | {losses['distilled']:.4f} |" in card
    drawn = []
    monkeypatch.setattr(figure.Figure, "savefig", lambda self, file, dpi: drawn.append(self))
    for result in (paper, default):  # what was grouped, as of a conversion
        m.plot([result / "gqa"], tmp_path / "gqa.png")
    assert [[len(axis.images) for axis in one.axes] for one in drawn] == [[1, 1, 0], [1, 1, 0, 0]]


@pytest.mark.slow
def test_attention_alone_is_trained(trained, runs, tmp_path):
    """On both ways the other weights stay the source's; and a run that was stopped continues."""
    def gigabytes(done):
        return float(re.search(r"each with ([\d.]+) GB for weights, gradients", done.stdout)[1])

    _, source = m.load_checkpoint(trained / "mha")
    for way in WAYS:
        whole, out = tmp_path / f"{way} whole", tmp_path / way
        more = ("--train", "attention")
        done = train_run(train_arguments(trained, whole, way, *more))
        stop_after(10, train_arguments(trained, out, way, *more), out, 1)
        train_run(train_arguments(trained, out, way, *more))
        assert_same_run(out, whole)
        scores = json.loads((out / "report.json").read_text())["scores"]
        assert scores["distilled"]["kl"] < 0.95 * scores["converted"]["kl"]
        _, weights = m.load_checkpoint(out / "gqa")
        for name, w in source.items():
            same = weights[name].shape == w.shape and torch.equal(weights[name], w)
            assert same == ("self_attn" not in name and "norm" not in name), name
        assert gigabytes(done) < 0.8 * gigabytes(runs(way)[1])


def leave_what_a_kill_leaves(out):
    """Of one in the middle of a checkpoint, of the result, of a line of metrics."""
    (out / "checkpoints/partial_11").mkdir()
    (out / ".mha2gqa-1").mkdir()
    with open(out / "metrics.jsonl", "a") as file:
        file.write('{"stage": "dis')


def assert_same_run(out, whole):
    found, wanted = read_metrics(out), read_metrics(whole)
    for record in (*found.values(), *wanted.values()):
        del record["tokens_per_second"]
    assert found == wanted
    (_, a), (_, b) = (m.load_checkpoint(p / "gqa") for p in (whole, out))
    assert same_weights(a, b)


@pytest.fixture
def train_command(capfd):
    """The trainer's command line in this process: exit status, standard output and error."""
    threads = torch.get_num_threads()

    def run(*arguments):
        try:
            status = train_gqa.main([str(a) for a in arguments])
        except SystemExit as end:
            status = end.code
        if torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()
        torch.set_num_threads(threads)
        return status, *capfd.readouterr()

    return run


@pytest.mark.slow
def test_finished_runs_print_their_table_again(trained, runs, train_command):
    out, done = runs("paper")
    status, again, err = train_command(*train_arguments(trained, out, "paper", "--save-every", 5))
    assert (status, err) == (0, "") and "distilled" in again
    assert again == done.stdout[-len(again) :]


def test_a_loss_that_is_not_finite_stops_the_run(trained, tmp_path, train_command):
    out = tmp_path / "out"
    status, _, err = train_command(
        *train_arguments(trained, out, "paper", "--lr", "1e30", "--save-every", "1"))
    assert status == 2 and not (out / "gqa").exists()
    step = int(re.fullmatch(r"error: distill, step (\d+): the loss is (?:nan|inf), .*\n", err)[1])
    kept = sorted((out / "checkpoints").iterdir())
    assert step >= 2 and [p.name for p in kept] == [f"step_{step - 1}"]


BAD_TRAINING = {
    "no such model": (["--model", "/nowhere"], "/nowhere: no such directory"),
    "heads": (["--kv-heads", "3"], "3 KV heads: the source has 8, choose one of 1, 2, 4"),
    "no such text": (["--text", "/nowhere.txt"], "/nowhere.txt: no such file"),
    "no tasks": (["--tasks", "."], "holds none of the folders boolq, piqa"),
    "no such teacher": (["--teacher", "/nowhere"], "/nowhere: no such directory"),
    "teacher of another vocabulary": (["--teacher", "{other}"],
                                      "other: its vocab_size is 97, the model's 384: it cannot"),
    "teacher of another shape": (["--align", "linear", "--teacher", "{trained}/gqa"],
                                 "gqa: its num_key_value_heads is 4, the model's 8: it cannot"),
    "rows too long": (["--seq-len", "65"], "sequence length 65: expected 2 to 64"),
    "no steps": (["--steps", "0"], "--steps 0: expected more than 0"),
    "a negative rate": (["--lr", "-1"], "--lr -1.0: expected more than 0"),
    "no rate": (["--lr", "nan"], "--lr nan: expected more than 0"),
    "a negative seed": (["--seed", "-1"], "--seed -1: expected 0 or more"),
    "an option misspelled": (["--modell", "x"], "unrecognized arguments: --modell x"),
    "a way misspelled": (["--align", "lineer"], "argument --align: invalid choice: 'lineer'"),
    "cosine with energy": (["--align", "linear", "--metric", "cos"], "metric cos: linear"),
    "no output": (["--out", ""], "a run needs --model, --kv-heads, --out, and --text or --tasks"),
    "a folder of others": (["--out", "{trained}"], "exists and is not a run of this program"),
    "a run with other arguments": (["--out", "{run}", "--lr", "1"],
                                   "holds a run with --lr 0.001, not 1.0; choose another --out"),
}


@pytest.mark.parametrize("what", BAD_TRAINING)
def test_bad_input_of_the_trainer(trained, tmp_path, train_command, what):
    more, message = BAD_TRAINING[what]
    places = {name: tmp_path / name for name in ("run", "other")} | {"trained": trained}
    places["run"].mkdir()
    m.write_json(places["run"] / "report.json", {"arguments": train_gqa.parse_arguments(
        train_arguments(trained, places["run"])).to_json(), "scores": {}, "seconds": {}})
    m.save_checkpoint(places["other"], config_of(), random_weights(config_of()))
    before = sorted(tmp_path.rglob("*"))
    status, _, err = train_command(
        *train_arguments(trained, tmp_path / "out", "paper", *(x.format(**places) for x in more)))
    assert status == 2 and err.startswith("error: ") and err.count("\n") == 1
    assert message in err and sorted(tmp_path.rglob("*")) == before


RECORD = json.dumps({"goal": "G", "sol1": "one", "sol2": "two"}) + "\n"
BAD_TASKS = {  # files of the tasks' folder, and what is said of them
    "no training file": ({"boolq/val.jsonl": "{}"}, "boolq: no train.jsonl"),
    "no labels": ({"piqa/train.jsonl": RECORD}, "train-labels.lst: no such file; it should hold"),
    "too few labels": ({"piqa/train.jsonl": 2 * RECORD, "piqa/train-labels.lst": "0"},
                       "train-labels.lst: 1 labels for 2 records"),
    "a label that is none": ({"piqa/train.jsonl": 2 * RECORD, "piqa/train-labels.lst": "0 2"},
                             "train.jsonl, line 2: not a record of piqa"),
    "records of another task": ({"boolq/train.jsonl": RECORD}, "line 1: not a record of boolq"),
    "no JSON": ({"boolq/train.jsonl": "x"}, "line 1: not a record of boolq"),
    "no object": ({"arc-e/ARC-Easy-Train.jsonl": "[1]"}, "line 1: not a record of arc-e"),
    "nested deeply": ({"boolq/train.jsonl": "[" * 100_000}, "line 1: not a record of boolq"),
    "an answer that is no text": (
        {"piqa/train.jsonl": RECORD.replace('"one"', "1"), "piqa/train-labels.lst": "0"},
        "line 1: not a record of piqa"),
    "an answer that is neither": ({"boolq/train.jsonl": json.dumps(
        {"passage": "P", "question": "q", "answer": "yes"})}, "line 1: not a record of boolq"),
    "no label": ({"hellaswag/hellaswag_train.jsonl": json.dumps(
        {"ctx": "C", "endings": ["a", "b"], "label": -1})}, "line 1: not a record of hellaswag"),
    "labels not in UTF-8": ({"piqa/train.jsonl": RECORD, "piqa/train-labels.lst": "\ud800"},
                            "train-labels.lst: not UTF-8"),
    "a pointer for labels": ({"piqa/train.jsonl": RECORD, "piqa/train-labels.lst":
                              POINTER.decode()}, "train-labels.lst: only a Git LFS pointer"),
    "a pointer": ({"boolq/train.jsonl": POINTER.decode()}, "train.jsonl: only a Git LFS pointer"),
}


@pytest.mark.parametrize("what", BAD_TASKS)
def test_bad_tasks(trained, tmp_path, train_command, what):
    files, message = BAD_TASKS[what]
    for name, content in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(content.encode(errors="surrogatepass"))
    status, _, err = train_command("--model", trained / "mha", "--kv-heads", 2, "--out",
                                   tmp_path / "out", "--tasks", tmp_path)
    assert status == 2 and message in err and err.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_too_little_memory_for_training(alone, trained, tmp_path, monkeypatch):
    """The shards to the byte; what the backward keeps as autograd counts it; and what is said."""
    args = train_gqa.parse_arguments(train_arguments(trained, tmp_path / "out", "default"))
    source = train_gqa.Checkpoint.open(args.model)
    config, new_config = source.config, m.gqa_config(source.config, args.kv_heads)
    monkeypatch.setattr(m, "free_memory", lambda device: 1_000_000)

    def needed(**changes):
        changed = dataclasses.replace(args, **changes)
        return train_gqa.memory_needed(changed, config, alone, 64)

    kept = {n: w[: len(w) // 4] if "k_proj" in n or "v_proj" in n else w
            for n, w in source.weights.items()}
    shards, work = needed()
    assert shards == (sum(16 * w.numel() for w in kept.values())
                      + m._n_bytes(source.weights.values()))
    assert shards - needed(train="attention")[0] == sum(
        12 * w.numel() for n, w in kept.items() if "mlp" in n or "embed" in n or "head" in n)

    saved, block = {}, m.Block(new_config)
    weights = {p.data_ptr() for p in block.parameters()}

    def pack(x):
        if x.data_ptr() not in weights:
            saved[x.untyped_storage().data_ptr()] = x.untyped_storage()
        return x

    x_BTD = torch.randn(args.batch_tokens // 64, 64, config.hidden_size, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        y_BTD = block(x_BTD, *m._rope_and_ends(new_config, x_BTD))
    found = sum(storage.nbytes() for storage in saved.values())
    n_layers, stream = config.num_hidden_layers, x_BTD.numel() * 4
    less = (work - needed(checkpoint_activations=True)[1] + n_layers * stream) / (n_layers - 1)
    assert y_BTD.requires_grad and less == pytest.approx(found, rel=0.2)

    with pytest.warns(UserWarning, match=r"GB of memory are needed, with --checkpoint-activations "
                                         rf"{m.gigabytes(sum(needed(checkpoint_activations=True)))}"
                                         r", with --checkpoint-activations --train attention [\d.]+"
                                         r" GB; 0.001 GB are free; and the more"):
        train_gqa.read_input(args, source, alone)
    cuda, offload = torch.device("cuda"), dataclasses.replace(args, cpu_offload=True)
    with pytest.warns(UserWarning) as warned:
        train_gqa.warn_of_memory(offload, config, cuda, 64)
    assert ["with --checkpoint-activations --train" in str(w.message) for w in warned] == [1, 0]
    assert "--cpu-offload needs" in str(warned[1].message)


def test_too_small_a_disk_for_training(trained, tmp_path, train_command, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: types.SimpleNamespace(free=1000))
    status, _, err = train_command(*train_arguments(trained, tmp_path / "out"))
    assert status == 2 and not (tmp_path / "out").exists()
    assert re.fullmatch(r"error: .*out: checkpoints and models need [\d,]+ bytes, 1,000 are free "
                        r"on the disk\n", err)


def test_rows_that_processes_cannot_share(alone, trained, tmp_path, monkeypatch):
    args = train_gqa.parse_arguments(train_arguments(trained, tmp_path / "out"))
    rows = train_gqa.text_batch(torch.zeros(9, 64, dtype=torch.int64))
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 3)
    with pytest.raises(ValueError, match="8 rows a step cannot be shared by 3 processes; choose a "
                                         "multiple of 192"):
        train_gqa.make_schedule(args, "distill", config_of(), rows)


# ---- the trainer: its parts ----------------------------------------------------------------------


@pytest.fixture
def source(trained):
    return train_gqa.Checkpoint.open(trained / "mha")


def test_masks_open_are_the_source_and_closed_the_written_model(alone, source, tmp_path):
    config, tokens = source.config, random_tokens(source.config, time=64)
    rows = train_gqa.text_batch(random_tokens(config, batch=60, time=64))
    blocks = train_gqa.student_blocks(source, rows, 2, m.Method(align="rotation"), True,
                                     note=lambda report: None)
    model = train_gqa.shard(train_gqa.meta_model(config, 2), train_gqa.Place(alone))
    train_gqa.load_sharded(model, blocks, m.non_block_weights(source.weights))
    masks = train_gqa.Masks(model, 20, 1e-2, seed=0)

    def logits():
        with torch.no_grad():
            return model(tokens)

    masks.draw(0, alone)
    wanted = logits_of(config, source.weights, tokens)
    assert (logits() - wanted).abs().max() <= 1e-5 * wanted.abs().max()
    masks.draw(3, alone)
    assert (logits() - wanted).abs().max() > 1e-2 * wanted.abs().max()
    masks.draw(16, alone)
    closed = logits()
    train_gqa.reshard(model)
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
    """3,000 predictions in three chunks; values and gradients, of tasks and of text."""
    monkeypatch.setattr(train_gqa, "chunk_size", lambda head_VD: 1024)
    generator = torch.Generator().manual_seed(0)
    config = config_of(vocab_size=60, hidden_size=16, head_dim=8, num_attention_heads=2,
                       num_key_value_heads=2, max_position_embeddings=3000)
    weights = random_weights(config)
    teacher = train_gqa.frozen_checkpoint(
        train_gqa.Checkpoint(None, config, weights), train_gqa.Place(alone))
    tokens = random_tokens(config, batch=1, time=3000)
    bits = torch.randint(4, (1, 3000), generator=generator)
    batch = train_gqa.TokenBatch(tokens, bits)
    hidden, head = (torch.randn(*shape, 16, generator=generator).requires_grad_()
                    for shape in ((1, 3000), (60,)))
    student, wanted = F.linear(hidden, head), logits_of(config, weights, tokens)
    kl = m.kl_loss(student, wanted)[bits & 1 > 0].sum()
    bild = m.bild_loss(student, wanted)[bits & 2 > 0].sum()
    found = train_gqa.distillation(teacher).make_readout(batch)(hidden, head)
    assert torch.allclose(found, torch.stack([kl, bild]), rtol=1e-5)
    pairs = zip(torch.autograd.grad(found.sum(), (hidden, head)),
                torch.autograd.grad(kl + bild, (hidden, head)), strict=True)
    assert all(torch.allclose(a, b, rtol=1e-4, atol=1e-4) for a, b in pairs)
    nats = F.cross_entropy(student[0, :-1], tokens[0, 1:], reduction="none")
    bits[0, -1] = 0
    found = train_gqa.cross_entropy().make_readout(batch)(hidden, head)
    assert torch.allclose(found, nats[bits[0, :-1] & 2 > 0].sum()[None], rtol=1e-5)


@pytest.mark.slow
@pytest.mark.long  # 3.5 GB
def test_losses_take_a_quarter_of_the_memory():
    """4,096 predictions of 32,000 logits, forward and backward, in chunks and at once."""
    code = """if True:
        import resource, sys, torch, torch.nn.functional as F, train_gqa
        shapes = (4096, 16), (32_000, 16), (4096, 16), (32_000, 16)
        hidden, head, teacher, teacher_head = (torch.randn(*s).requires_grad_() for s in shapes)
        def losses(hidden, head, teacher):
            student, wanted = F.linear(hidden, head), F.linear(teacher, teacher_head.detach())
            kl, bild = train_gqa.mha2gqa.kl_loss, train_gqa.mha2gqa.bild_loss
            return torch.stack([kl(student, wanted).sum(), bild(student, wanted).sum()])
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        of = (hidden, head, teacher.detach())
        found = train_gqa.in_chunks(losses, *of) if sys.argv[1] == "chunks" else losses(*of)
        found.sum().backward()
        print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)"""
    chunks, whole = (int(subprocess.run(
        [sys.executable, "-c", code, how], capture_output=True, text=True, check=True,
        cwd=PROGRAM.parent).stdout) for how in ("chunks", "whole"))
    assert chunks < whole / 4


@pytest.mark.parametrize("how", [(), ("recompute",), ("recompute", "offload", "compiled")])
def test_micro_batches_add_up(alone, source, how):
    """160 rows of 64 tokens go through the model in two parts; gradients as of all at once."""
    if "compiled" in how and not any(map(shutil.which, ("c++", "g++", "clang++", "cl"))):
        pytest.skip("no C++ compiler")
    config = source.config
    place = train_gqa.Place(alone, **dict.fromkeys(how, True))
    model = train_gqa.frozen_checkpoint(source, place).requires_grad_(True)
    rows = train_gqa.text_batch(random_tokens(config, batch=160, time=64))
    assert len(list(train_gqa.micro_batches(rows, alone))) == 2
    found = train_gqa.backward(model, rows, train_gqa.cross_entropy())
    plain = m.Llama(config)
    plain.load_state_dict(source.weights)
    logits = plain(rows.tokens)[:, :-1].flatten(0, 1)
    loss = F.cross_entropy(logits, rows.tokens[:, 1:].flatten())
    loss.backward()
    assert found.item() == pytest.approx(loss.item(), rel=1e-5)
    for (name, p), wanted in zip(model.named_parameters(), plain.parameters(), strict=True):
        gradient = p.grad.full_tensor()
        assert torch.allclose(gradient, wanted.grad, rtol=1e-3, atol=1e-6), name


def test_what_is_not_trained_is_written_as_it_was(alone, source, tmp_path, monkeypatch):
    """Although it is held in bf16 where the forward computes in that, as on GPUs."""
    monkeypatch.setattr(train_gqa, "compute_dtype", lambda device: torch.bfloat16)
    meta = train_gqa.meta_model(source.config, trained="attention")
    model = train_gqa.shard(meta, train_gqa.Place(alone))
    train_gqa.fill(model, source)
    dtypes = {name: p.dtype for name, p in model.named_parameters()}
    rows = train_gqa.text_batch(random_tokens(source.config, batch=2, time=16))
    train_gqa.backward(model, rows, train_gqa.cross_entropy())
    for name, p in model.named_parameters():
        assert (p.grad is None) == (dtypes[name] == torch.bfloat16) == ("mlp" in name or (
            "embed" in name or "lm_head" in name)), name
    train_gqa.save_model(tmp_path / "out", model, source.config, source, source)
    _, written = m.load_checkpoint(tmp_path / "out")
    for name, w in source.weights.items():
        assert torch.equal(written[name], w), name


def test_exact_match_is_what_greedy_generation_gives(alone, source):
    config, weights = source.config, source.weights
    model = train_gqa.frozen_checkpoint(source, train_gqa.Place(alone))
    coded = []
    for n in range(12):
        ids = random_tokens(config, batch=1, time=4 + n, seed=n)
        for _ in range(1 + n % 5):
            best = logits_of(config, weights, ids)[:, -1:].argmax(-1)
            ids = torch.cat([ids, best], 1)
        coded.append((ids[0].tolist(), 4 + n))

    def score():
        rows = train_gqa.pack_examples(coded, 40, seed=0)
        return train_gqa.exact_match(model, rows, len(coded), "test")

    assert score() == 1
    for n in (1, 6, 10):  # one token of the answer is another: the first, one within, the last
        coded[n][0][4 + n + (0, 0, 0)[n % 3]] += 1 if coded[n][0][4 + n] < 300 else -1
    assert score() == pytest.approx(9 / 12)


@pytest.fixture(scope="session")
def task_arguments(trained, tmp_path_factory):
    """The arguments of a run on two small tasks, all but --out."""
    tasks = tmp_path_factory.mktemp("tasks")
    for task, names in (("boolq", ("train.jsonl", "val.jsonl")),
                        ("openbookqa", ("train.jsonl", "dev.jsonl"))):
        (tasks / task).mkdir()
        for name in names:
            (tasks / task / name).write_text(
                "".join(json.dumps(TASK_RECORDS[task][n % 2]) + "\n" for n in range(30)))
    return [str(x) for x in ("--model", trained / "mha", "--kv-heads", "4", "--tasks", tasks,
            "--sft-epochs", "6", "--steps", "8", "--batch-tokens", "128", "--lr", "3e-3",
            "--task-limit", "20", "--calibration-tokens", "2048")]


@pytest.fixture(scope="session")
def tuned(task_arguments, tmp_path_factory):
    """(OUT, the finished process) of the run on tasks."""
    out = tmp_path_factory.mktemp("tuned") / "out"
    return out, train_run([*task_arguments, "--out", out])


@pytest.mark.slow
def test_tasks_from_fine_tuning_to_the_table(trained, tuned):
    out, done = tuned
    assert re.search(r"boolq train: 20 examples, [\d,]+ tokens, \d+ prompts cut", done.stdout)
    scores = json.loads((out / "report.json").read_text())["scores"]
    assert list(scores) == ["source", "teacher", "mean_pooled", "converted", "distilled"]
    for found in scores.values():
        assert found["mean"] == (found["boolq"] + found["openbookqa"]) / 2
    assert scores["source"]["mean"] < scores["teacher"]["mean"]
    losses = [r["cross_entropy"] for r in read_metrics(out, "fine-tune").values()]
    assert losses[-1] < 0.7 * losses[0]
    source, teacher = (m.load_checkpoint(p)[1] for p in (trained / "mha", out / "teacher"))
    assert source.keys() == teacher.keys() and not same_weights(source, teacher)
    assert not (out / "sft").exists()


@pytest.mark.slow
def test_tasks_with_text_and_a_teacher_by_two_processes(trained, tuned, task_arguments, tmp_path):
    """No fine-tuning, no masks, and less memory; what is converted is the teacher."""
    out = tmp_path / "out"
    train_run([*task_arguments, "--out", out, "--teacher", tuned[0] / "teacher", "--text",
               trained / "short.jsonl", "--no-masks", "--checkpoint-activations", "--lr", "1e-4"],
              TORCHRUN)
    scores = json.loads((out / "report.json").read_text())["scores"]
    assert list(scores["distilled"]) == ["loss", "kl", "boolq", "openbookqa", "mean"]
    assert abs(scores["teacher"]["kl"]) < 1e-6
    assert scores["converted"]["kl"] < 0.1 * scores["source"]["kl"]
    assert scores["distilled"]["kl"] < scores["converted"]["kl"]


TASK_RECORDS = {
    "boolq": [{"question": "is it", "passage": "P.", "answer": True},
              {"question": "is it", "passage": "P.", "label": 1}],
    "openbookqa": [
        {"question": {"stem": "S", "choices": [{"text": "x", "label": "A"},
                                               {"text": "y", "label": "B"}]}, "answerKey": "B"},
        {"question_stem": "S", "choices": {"text": ["x", "y"], "label": ["A", "B"]},
         "answerKey": "B"}],
    "hellaswag": [{"ctx_a": "C", "ctx_b": "d", "endings": ["x", "y"], "label": "1"},
                  {"ctx": "C d", "endings": ["x", "y"], "label": 1}],
    "winogrande": [{"sentence": "S _.", "option1": "x", "option2": "y", "answer": "2"},
                   {"sentence": "S _.", "option1": "x", "option2": "y", "answer": 2}],
    "arc-c": [{"question": {"stem": "S", "choices": [{"text": "x", "label": "1"},
                                                     {"text": "y", "label": "2"}]},
               "answerKey": "2"}] * 2,
}


@pytest.mark.parametrize("task, prompt, answer", [
    ("winogrande", "Choose the most sensible text to replace the \"_\" in the following sentence: "
     "S _.\nChoices: ['x', 'y']\nAnswer:", "y"),
    ("arc-c", "Question: S\nChoices: ['x', 'y']\nAnswer:", "y"),
    ("boolq", "P.\nQuestion: is it?\nChoices: ['true', 'false']\nAnswer:", "true"),
    ("openbookqa", "Question: S\nChoices: ['x', 'y']\nAnswer:", "y"),
    ("hellaswag", "Please choose the most appropriate text to complete the passage below:\n"
     "Passage: C d\nChoices: ['x', 'y']\nAnswer:", "y")])
def test_tasks_in_both_spellings(tmp_path, task, prompt, answer):
    name = train_gqa.TASKS[task][1][0]
    (tmp_path / task).mkdir()
    lines = [json.dumps(r) for r in TASK_RECORDS[task]]
    (tmp_path / task / name).write_text("\n".join(lines))
    assert train_gqa.read_task(tmp_path, task, dev=False) == [(prompt, answer)] * 2
    (tmp_path / task / name).write_text("\n".join([*lines, "{}"]))
    with pytest.raises(ValueError, match=f"line 3: not a record of {task}"):
        train_gqa.read_task(tmp_path, task, dev=False)


@pytest.mark.parametrize("task, file, record, first", [
    ("piqa", "valid", {"goal": "G", "sol1": "one", "sol2": "two"}, 0),
    ("siqa", "dev", {"context": "C", "question": "Q", "answerA": "one", "answerB": "two",
                     "answerC": "three"}, 1)])
def test_tasks_with_labels_beside_them(tmp_path, task, file, record, first):
    (tmp_path / task).mkdir()
    labels = tmp_path / task / f"{file}-labels.lst"
    (tmp_path / task / f"{file}.jsonl").write_text(json.dumps(record) + "\n" + json.dumps(record))
    with pytest.raises(ValueError, match="no such file; it should hold"):
        train_gqa.read_task(tmp_path, task, dev=True)
    labels.write_text(f"{first + 1}\n{first}\n")
    found = train_gqa.read_task(tmp_path, task, dev=True)
    (prompt, answer), (_, other) = found
    assert (answer, other) == ("two", "one") and "Choices: ['one', 'two'" in prompt.replace(
        "Choose the most", "")
    (tmp_path / task / f"{file}.jsonl").write_text(
        f"\ufeff{json.dumps(record)}\n \n{json.dumps(record)}\r\n  \n", encoding="utf-8")
    labels.write_text(f"\ufeff{first + 1}\n{first}\n\n", encoding="utf-8")
    assert train_gqa.read_task(tmp_path, task, dev=True) == found
    (tmp_path / task / f"{file}.jsonl").write_text(json.dumps(record) + "\n" + json.dumps(record))
    labels.write_text("1\n")
    with pytest.raises(ValueError, match="1 labels for 2 records"):
        train_gqa.read_task(tmp_path, task, dev=True)
    labels.write_text(f"1\n{first - 1}\n")
    with pytest.raises(ValueError, match=f"line 2: not a record of {task}"):
        train_gqa.read_task(tmp_path, task, dev=True)


def test_packed_examples_keep_everything_apart():
    examples = [("p" * n, "q" * (1 + n % 4)) for n in range(3, 40)]
    coded, cut = train_gqa.encode_examples(examples, letters, [2], seq_len=32)
    assert cut == sum(1 + n + 1 + 1 + n % 4 + 1 > 32 for n in range(3, 40))
    rows = train_gqa.pack_examples(coded, 32, seed=0)
    for n, (ids, prompt) in enumerate(coded):
        at = rows.document == n
        assert at.any(1).sum() == 1 and rows.tokens[at].tolist() == ids and ids[-1] == 2
        bits = rows.loss_bits[at].tolist()
        assert bits == ([train_gqa.KL] * (prompt - 1)
                         + [train_gqa.ANSWER] * (len(ids) - prompt) + [0])
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


def test_rates_by_width_length_and_start():
    def rates(steps, width, refit=False, stage="distill", **more):
        method = m.Method(align="rotation", refit=refit)
        args = train_gqa.Arguments(model="", kv_heads=1, out=Path(), method=method, **more)
        return train_gqa.learning_rates(args, stage, width, steps)

    assert rates(20_000, 4096) == pytest.approx((1e-5, 1e-2))  # the paper's
    assert rates(100, 1024) == pytest.approx((4e-4, 1.0))
    assert rates(100, 1024, refit=True) == pytest.approx((5e-5, 1.0))
    assert rates(100, 1024, refit=True, stage="fine-tune") == pytest.approx((4e-4, 1.0))
    assert rates(1000, 4096, refit=True) == pytest.approx((1e-5, 0.1))
    assert rates(1, 64) == pytest.approx((3e-3, 100.0))
    assert rates(100, 1024, refit=True, lr=0.1) == pytest.approx((0.1, 1.0))


def test_linear_alignment_and_refits_go_without_masks():
    for align, refit, masks in (("rotation", False, True), ("rotation", True, False),
                                ("none", None, True), ("linear", False, False)):
        args = train_gqa.Arguments(model="", kv_heads=1, out=Path(),
                                   method=m.Method(align=align, refit=refit))
        assert args.no_masks != masks


@pytest.mark.slow
@pytest.mark.parametrize("processes, chosen", [(1, None), (2, None), (1, 1), (2, 2)])
def test_threads_are_the_cores_or_what_was_chosen(processes, chosen):
    code = ("import os, torch, train_gqa\ntrain_gqa.start_processes()\n"
            "print(os.write(1, f'{torch.get_num_threads()}\\n'.encode()))")
    environment = {k: v for k, v in os.environ.items() if k != "OMP_NUM_THREADS"}
    environment |= {"OMP_NUM_THREADS": str(chosen)} if chosen else {}
    done = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(processes),
         "--no-python", sys.executable, "-c", code], env=environment, cwd=PROGRAM.parent,
        stdout=subprocess.PIPE, text=True, check=True)
    found = re.findall(r"^(\d+)$", done.stdout, re.M)[:1]
    cores = train_gqa.usable_cores()
    assert found == [str(min(chosen, cores) if chosen else max(1, cores // processes))]


@pytest.mark.parametrize("more", [(), ("--align", "rotation"), ("--train", "attention")])
def test_a_benchmark_needs_a_config_alone_and_writes_nothing(
        tmp_path, train_command, monkeypatch, more):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "temporary"))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "temporary").mkdir()
    m.write_json(tmp_path / "config.json", {**BASE, "vocab_size": 384})
    status, out, err = train_command("--benchmark", 2, "--model", tmp_path, "--kv-heads", 2,
                                     "--batch-tokens", 128, "--seq-len", 32, *more)
    left = {p.name for p in tmp_path.rglob("*") if "torch" not in p.name}  # that has a cache there
    assert (status, err, left) == (0, "", {"temporary", "config.json"})
    assert re.fullmatch(
        r"2 steps of 4 rows of 32 tokens, 1 x \w+: [\d,]+ tokens/s,\n"
        r"\d+\.\d% of the [\d.]+ TFLOP/s of a large matrix product here\n"
        r"seconds a step: masks and batch \S+, teacher \S+, "
        r"forward \S+, backward \S+, optimizer [\d.e-]+"
        + r"\nmasks add -?\d+\.\d% to a step without" * ("rotation" in more)
        + r"\npeak memory: [\d.]+ GB a process\n", out), out


@pytest.mark.parametrize("more", [(), ("--train", "attention"), ("--align", "rotation")])
@pytest.mark.parametrize("tied", [True, False])
def test_flop_of_a_step_are_those_that_are_counted(trained, tmp_path, more, tied):
    from torch.utils.flop_counter import FlopCounterMode

    args = train_gqa.parse_arguments(train_arguments(trained, tmp_path, "default", *more))
    config = config_of(tie_word_embeddings=tied)
    kept = config if not args.no_masks else m.gqa_config(config, 2)
    teacher = m.Llama(config)
    student = train_gqa.meta_model(kept, trained=args.train).to_empty(device="cpu")
    tokens = random_tokens(config, batch=2, time=40)
    with FlopCounterMode(display=False) as mode:
        with torch.no_grad():
            teacher(tokens)
        student(tokens).sum().backward()
    counted = mode.get_flop_counts()["Global"][torch.ops.aten.mm]
    assert counted == 80 * train_gqa.flop_per_token(args, config, 0)
    attention, of_none = (train_gqa.flop_per_token(args, config, n) for n in (10, 0))
    assert attention - of_none == 4 * 2 * 10 * config.num_hidden_layers * 4 * config.head_dim


# ---- faults --------------------------------------------------------------------------------------

ODD_VALUES = [None, True, -1, 0, 1, 3, 2**31, 10**18, 10**400, 1e-300, 1e308, math.nan, "", "x",
              "\ud800", [], {}, [0], {"a": 1}, [[[]]]]


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
    if type(value) in (int, float) and rng.random() < 0.4:
        return rng.choice([-value, value + 1, 2 * value, value / 2, value * 10**9, str(value)])
    nested = functools.reduce(lambda inner, _: [inner], range(rng.choice([1, 10, 900])), value)
    return rng.choice([*ODD_VALUES, nested])


def odd_bytes(content, rng):
    """Bytes that are truncated, lengthened, flipped, emptied, or partly zeros."""
    at = rng.randrange(len(content) + 1) if rng.random() < 0.7 else min(len(content), 8)
    flipped = bytearray(content)
    for _ in range(rng.choice([1, 3, 100]) if content else 0):
        flipped[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
    return rng.choice([content[:at], content + content[:at], bytes(flipped), b"",
                       content[:at] + bytes(len(content) - at), rng.randbytes(100)])


def odd_header(content, rng):
    """A safetensors file whose header says something else; its length is right or not."""
    size = int.from_bytes(content[:8], "little")
    header = json.dumps(odd_json(json.loads(content[8 : 8 + size]), rng)).encode()
    n = len(header) if rng.random() < 0.8 else rng.choice([0, 10**6, 2**63])
    return n.to_bytes(8, "little") + header + content[8 + size :]


def break_folder(folder, rng):
    """Break a checkpoint's folder in a random way; returns what was done."""
    file = rng.choice(sorted(folder.iterdir()))
    kind = rng.choice(["bytes", "json", "json", "json", "drop", "swap", "folder", "other", "bin"])
    if kind == "json":
        if file.suffix == ".json":
            value = odd_json(json.loads(file.read_text()), rng)
            file.write_text(json.dumps(value), encoding="utf-8")
        else:
            file.write_bytes(odd_header(file.read_bytes(), rng))
    elif kind == "drop":
        file.unlink()
    elif kind == "swap":
        other = rng.choice(sorted(folder.iterdir()))
        contents = file.read_bytes(), other.read_bytes()
        other.write_bytes(contents[0])
        file.write_bytes(contents[1])
    elif kind == "folder":
        file.unlink()
        file.mkdir()
    elif kind == "other":
        file.rename(folder / rng.choice(["model.safetensors", "pytorch_model.bin", "config.json",
                                         "tokenizer.model", "adapter_config.json", "README.md"]))
    else:
        if kind == "bin":
            as_bin(lambda content: content)(folder)
            file = folder / "pytorch_model.bin"
        file.write_bytes(odd_bytes(file.read_bytes(), rng))
    return f"{kind} {file.name}"


def fuzz(trained, tmp_path, capfd, seeds):
    """Each broken folder converts, or ends in one line and status 2, within 10 s and 1 GB, and
    leaves nothing; returns how many did what."""
    config = config_of(vocab_size=384)
    save_in_shards(tmp_path / "whole", config, random_weights(config), trained / "mha")
    (tmp_path / "text.txt").write_text("Some words of text. " * 100)
    limit = resource.getrlimit(resource.RLIMIT_AS)
    address_space = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (address_space + 10**9, limit[1]))
    found = {"converted": 0, "refused": 0}
    try:
        for seed in seeds:
            rng = random.Random(seed)
            shutil.copytree(tmp_path / "whole", tmp_path / "x")
            what = []
            for _ in range(rng.choice([1, 1, 1, 3])):
                with contextlib.suppress(ValueError, OSError):  # what is broken resists the next
                    what.append(break_folder(tmp_path / "x", rng))
            start = time.perf_counter()
            status, _, err = command(
                capfd, tmp_path / "x", tmp_path / "out", "--kv-heads", 2, "--text",
                tmp_path / "text.txt", "--tokens", 128, "--seq-len", 16, "--no-refit")
            assert time.perf_counter() - start < 10, (seed, what)
            if status == 0:
                m.load_checkpoint(tmp_path / "out")
                shutil.rmtree(tmp_path / "out")
            else:
                assert status == 2 and re.fullmatch("error: .*\n", err), (seed, what, err)
            found["converted" if status == 0 else "refused"] += 1
            shutil.rmtree(tmp_path / "x")
            assert sorted(os.listdir(tmp_path)) == ["text.txt", "whole"], (seed, what)
    finally:
        resource.setrlimit(resource.RLIMIT_AS, limit)
    return found


def test_broken_folders_end_in_one_line(trained, tmp_path, capfd):
    found = fuzz(trained, tmp_path, capfd, range(60))
    assert min(found.values()) > 5


@pytest.mark.slow
@pytest.mark.long
def test_2000_broken_folders_end_in_one_line(trained, tmp_path, capfd):
    found = fuzz(trained, tmp_path, capfd, range(1000, 3000))
    with capfd.disabled():
        print(f"\n2,000 broken folders: {found}")


def test_broken_texts_and_tasks_end_in_one_line(tmp_path):
    """2,000 of each are read, or refused by a ValueError."""
    records = [{"text": "Words, größer and größer. " * n, "url": n} for n in range(4)]
    texts = [json.dumps(records[0]).encode(), json.dumps(records).encode(),
             "\n".join(map(json.dumps, records)).encode(),
             gzip.compress(json.dumps(records).encode()), records[3]["text"].encode()]
    found = {"read": 0, "refused": 0}
    for seed in range(2000):
        rng, file = random.Random(seed), tmp_path / "a"
        content = odd_bytes(rng.choice(texts), rng) if rng.random() < 0.5 else "\n".join(
            json.dumps(odd_json(r, rng)) for r in records).encode()
        file.write_bytes(content)
        try:
            documents = m._Documents([file], 1000)
            assert all(isinstance(text, str) and text.encode() for text in documents)
            found["read"] += 1
        except ValueError as error:
            assert str(file) in str(error)
            found["refused"] += 1
    assert min(found.values()) > 100
    found = {"read": 0, "refused": 0}
    for seed in range(2000):
        rng = random.Random(seed)
        task, record = rng.choice(list(TASK_RECORDS.items()))
        _, (name, *_), _ = train_gqa.TASKS[task]
        file = tmp_path / task / name
        file.parent.mkdir(exist_ok=True)
        file.write_text(json.dumps(odd_json(record[0], rng)))
        try:
            ((prompt, answer),) = train_gqa.read_task(tmp_path, task, False)
            assert prompt.encode() and isinstance(answer, str) and answer.encode() is not None
            found["read"] += 1
        except ValueError as error:
            assert str(file) in str(error)
            found["refused"] += 1
    assert min(found.values()) > 100


def kill_at_random(arguments, out, processes, rng, longest):
    """Start a run and kill one or all of its processes; returns whether it ended before."""
    group = list(start_group(arguments, processes))
    if rng.random() < 0.9:
        group[0].stdout.readline()  # it has begun to work
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
    for p in group:
        printed = p.communicate(timeout=60)[0]  # the others end within a minute
        # Python itself drops, and prints, what a signal raises in the middle of a destructor.
        printed = re.sub("Exception ignored in.*?KeyboardInterrupt: *\n", "", printed, flags=re.S)
        assert "Traceback" not in printed, printed
    if (out / "gqa").exists():
        m.load_checkpoint(out / "gqa")  # whole
    return False


def killed_runs(trained, tmp_path, runs, n_kills, seed, longest):
    """Kill runs at random moments, each up to eight times, until there were so many kills; each
    must end as one that was not killed, bit for bit. Returns the kills by (way, processes)."""
    rng, kills = random.Random(seed), {(way, n): 0 for way in WAYS for n in (1, 2)}
    for n_run, run in enumerate(itertools.cycle(kills)):
        (way, processes), out = run, tmp_path / f"{n_run}"
        arguments = train_arguments(trained, out, way, "--save-every", 1)
        for _ in range(min(rng.randint(1, 8), n_kills - sum(kills.values()))):
            if kill_at_random(arguments, out, processes, rng, longest):
                break
            kills[run] += 1
        else:
            assert kill_at_random(arguments, out, processes, rng, 10**6)
        assert_same_run(out, runs(way, processes)[0])
        assert sorted(os.listdir(out)) == ["checkpoints", "gqa", "metrics.jsonl", "report.json"]
        assert all(re.fullmatch(r"step_\d+", name) for name in os.listdir(out / "checkpoints"))
        if sum(kills.values()) >= n_kills:
            return kills


def stop_after(steps, arguments, out, processes):
    """Start a run, and end it by SIGTERM when it has made so many steps."""
    group = list(start_group(arguments, processes))
    while not (out / "metrics.jsonl").exists() or len(read_metrics(out)) < steps:
        assert all(p.poll() is None for p in group)
        time.sleep(0.01)
    group[0].terminate()
    assert [p.wait() for p in group] == [130] * processes


DAMAGES = {
    "truncated": lambda step, rank: cut(step / f"__{rank}_0.distcp"),
    "empty metadata": lambda step, rank: (step / ".metadata").write_bytes(b""),
    "zeros": lambda step, rank: (step / f"__{rank}_0.distcp").write_bytes(bytes(10**6)),
    "no masks": lambda step, rank: (step / "masks.pt").write_bytes(b""),
}


def cut(file):
    file.write_bytes(file.read_bytes()[:1000])


@pytest.mark.slow
@pytest.mark.parametrize("damage, processes", [
    ("truncated", 2), ("empty metadata", 2), ("zeros", 1), ("no masks", 1)])
def test_a_damaged_checkpoint_is_put_aside(trained, runs, tmp_path, damage, processes):
    out, (whole, _) = tmp_path / "out", runs("paper", processes)
    arguments = train_arguments(trained, out, "paper")
    stop_after(10, arguments, out, processes)
    for other in ("step_99.bak", "step_", "step_x", "step_03"):  # not ours
        (out / "checkpoints" / other).mkdir()
    before, newest = train_gqa.checkpoints(out / "checkpoints")
    damaged = [newest, before] if damage == "truncated" else [newest]
    for step in damaged:  # with none left, it begins anew
        DAMAGES[damage](out / f"checkpoints/step_{step}", processes - 1)
    printed = [p.communicate()[0] for p in list(start_group(arguments, processes))]
    for step in damaged:
        assert re.search(rf"^warning: .*step_{step} is damaged \(.+\); it is called damaged_{step} "
                         "now, and the run goes on from what was before it$", printed[0], re.M)
    assert printed[0].count("warning") == len(damaged) and "Traceback" not in "".join(printed)
    assert_same_run(out, whole)


def test_what_is_not_a_checkpoint_s_fault_is_raised():
    for reason in (torch.OutOfMemoryError("CUDA"),
                   RuntimeError("[/gloo/transport/tcp/pair.cc:534] Connection closed by peer")):
        with pytest.raises(RuntimeError, match="CUDA|Connection"):
            train_gqa.own_fault(train_gqa.dcp.CheckpointException("load", {0: (reason, None)}))
    cut = train_gqa.dcp.CheckpointException("load", {0: (EOFError("Ran out of input"), None)})
    assert train_gqa.own_fault(cut) == "Ran out of input"


@pytest.mark.slow
@pytest.mark.parametrize("first, then", [(1, 2), (2, 1)])
def test_a_run_continues_on_another_number_of_processes(trained, runs, tmp_path, first, then):
    out, (whole, _) = tmp_path / "out", runs("paper")
    arguments = train_arguments(trained, out, "paper")
    stop_after(10, arguments, out, first)
    for p in list(start_group(arguments, then)):
        assert "error" not in p.communicate()[0] and p.returncode == 0
    found, wanted = read_metrics(out), read_metrics(whole)
    for step in wanted:
        assert found[step]["loss"] == pytest.approx(wanted[step]["loss"], abs=1e-5)
    (_, a), (_, b) = (m.load_checkpoint(p / "gqa") for p in (out, whole))
    assert max((a[n] - b[n]).abs().max() for n in a) < 1e-5


# The program, but one of its processes kills itself at its second call of a function, with a part
# of the work done.
DIES = """if True:
    import itertools, os, signal, sys, train_gqa
    calls, whole = itertools.count(), train_gqa.{place}
    def dies(*arguments, **keywords):
        if os.environ["RANK"] == "{rank}" and next(calls) == {calls}:
            os.kill(os.getpid(), signal.SIGKILL)
        return whole(*arguments, **keywords)
    train_gqa.{place} = dies
    train_gqa.command()"""


@pytest.mark.slow
@pytest.mark.parametrize("place, calls, rank", [
    ("dcp.save", 1, 0), ("dcp.load", 0, 1),
    *(pytest.param(*case, marks=pytest.mark.long) for case in (
        ("dcp.save", 1, 1), ("dcp.load", 0, 0), ("mha2gqa.lr_factor", 6, 0),
        ("mha2gqa.lr_factor", 6, 1), ("get_model_state_dict", 1, 0), ("get_model_state_dict", 1, 1),
        ("share", 0, 0), ("share", 0, 1), ("save_model", 0, 0), ("save_model", 0, 1)))])
def test_when_a_process_dies_the_other_says_so_and_ends(
        trained, runs, tmp_path, place, calls, rank):
    out, (whole, _) = tmp_path / "out", runs("default", 2)
    arguments = train_arguments(trained, out, "default")
    if place == "dcp.load":
        stop_after(6, arguments, out, 2)
    dies = DIES.format(place=place, calls=calls, rank=rank)
    group = list(start_group(arguments, 2, program=("-c", dies)))
    printed = group[1 - rank].communicate(timeout=60)[0]
    assert group[rank].wait() == -signal.SIGKILL
    assert group[1 - rank].returncode == 2
    assert re.findall("^error.*$", printed, re.M) == [
        "error: another process of this run has ended, see above; the same command continues"]
    assert "Traceback" not in printed
    for p in list(start_group(arguments, 2)):
        p.communicate()
    assert_same_run(out, whole)


@pytest.mark.slow
@pytest.mark.parametrize("processes, limit, save_every, file", [
    (1, 500, 4, "report.json"), (1, 20_000, 4, "data.pt"), (2, 500_000, 4, "partial_4"),
    (1, 170_000, 0, "part-00001.safetensors")])
def test_a_full_disk_ends_a_run_in_one_line(
        trained, runs, tmp_path, limit, save_every, file, processes):
    """And when there is room again, the same command continues."""
    out, (whole, _) = tmp_path / "out", runs("default", processes)
    arguments = train_arguments(trained, out, "default", "--save-every", save_every)
    group = list(start_group(arguments, processes, lambda: resource.setrlimit(
        resource.RLIMIT_FSIZE, (limit, limit))))
    printed = [p.communicate()[0] for p in group]
    assert [p.returncode for p in group] == [2] * processes
    assert re.findall("^error.*$", "".join(printed), re.M) == [
        line for line in printed[0].splitlines() if line.startswith("error") and file in line]
    assert "Traceback" not in "".join(printed) and len(re.findall("^error", printed[0], re.M)) == 1
    left = {p.name for p in out.rglob("*")}
    assert not any(name.startswith((".", "partial")) for name in left) and "gqa" not in left
    for p in list(start_group(arguments, processes)):
        p.communicate()
    assert_same_run(out, whole)


def test_a_full_disk_at_a_line_of_metrics(trained, tmp_path, train_command, monkeypatch):
    whole = open

    def full(file, *arguments, **keywords):
        if str(file).endswith("metrics.jsonl"):
            raise OSError(28, "No space left on device")
        return whole(file, *arguments, **keywords)

    monkeypatch.setattr("builtins.open", full)
    status, _, err = train_command(*train_arguments(trained, tmp_path / "out"))
    assert status == 2
    assert re.fullmatch(r"error: .*metrics.jsonl: cannot be written \(No space left .*\)\n", err)


@pytest.mark.slow
def test_files_that_changed_since_a_run_began(trained, tmp_path):
    shutil.copytree(trained / "mha", tmp_path / "model")
    shutil.copyfile(trained / "short.jsonl", tmp_path / "text.jsonl")
    out = tmp_path / "out"
    arguments = train_arguments(trained, out, "paper", "--model", tmp_path / "model", "--text",
                                tmp_path / "text.jsonl")
    stop_after(5, arguments, out, 1)
    for file in (tmp_path / "text.jsonl", tmp_path / "model/config.json"):
        content, stamp = file.read_bytes(), file.stat()
        file.write_bytes(content + b"\n")
        (run,) = start_group(arguments, 1)
        assert run.communicate()[0] == (f"error: {file} has changed since the run in {out} began; "
                                        "choose another --out, or bring back what was there\n")
        assert run.returncode == 2
        file.write_bytes(content)
        os.utime(file, ns=(stamp.st_atime_ns, stamp.st_mtime_ns))
    (tmp_path / "model/notes.json").write_text("of no matter")
    for _ in range(2):  # it ends, and prints its table again
        (run,) = start_group(arguments, 1)
        assert "error" not in run.communicate()[0] and run.returncode == 0
    (tmp_path / "text.jsonl").unlink()
    (run,) = start_group(arguments, 1)
    assert f"{tmp_path / 'text.jsonl'} is gone since the run" in run.communicate()[0]


def test_which_files_of_tasks_are_looked_at(trained, tmp_path):
    for name in ("piqa/train.jsonl", "piqa/train-labels.lst", "piqa/dev.jsonl", "boolq/dev.jsonl",
                 "boolq/val.jsonl", "boolq/.DS_Store", "notes/train.jsonl"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    args = train_gqa.parse_arguments(
        train_arguments(trained, tmp_path / "out", "paper", "--tasks", tmp_path))
    found = {Path(name).relative_to(tmp_path).as_posix() for name in train_gqa.file_stamps(args)
             if name.startswith(str(tmp_path))}
    assert found == {"piqa/train.jsonl", "piqa/train-labels.lst", "piqa/dev.jsonl",
                     "boolq/val.jsonl"}


@pytest.mark.slow
def test_processes_that_do_not_find_each_other(trained, tmp_path):
    done = subprocess.run(
        [sys.executable, TRAINER, *train_arguments(trained, tmp_path / "out")], text=True,
        env={**os.environ, "GLOO_SOCKET_IFNAME": "none"}, capture_output=True)
    assert done.returncode == 2
    assert re.fullmatch(r"error: the processes do not find each other \(.*none.*\)\n", done.stderr)


def test_lines_of_metrics_that_will_be_made_again_or_are_broken_go(tmp_path):
    lines = ['{"stage": "fine-tune", "step": 9, "loss": 1}',
             '{"stage": "distill", "step": 0, "loss": 1}']
    others = ['{"stage": "distill", "step": 1, "a": 1}', "{}", "[1]", '{"stage": "dis', "{x}", ""]
    (tmp_path / "metrics.jsonl").write_text("\n".join([lines[0], *others, lines[1]]) + "\n")
    train_gqa.drop_metrics_from(tmp_path / "metrics.jsonl", "distill", 1)
    assert (tmp_path / "metrics.jsonl").read_text().splitlines() == lines


@pytest.mark.parametrize("name, value", [
    ("RANK", "none"), ("WORLD_SIZE", "0"), ("LOCAL_WORLD_SIZE", "0"), ("MASTER_PORT", "-1")])
def test_what_torchrun_would_not_set(trained, tmp_path, train_command, monkeypatch, name, value):
    monkeypatch.setenv(name, value)
    status, _, err = train_command(*train_arguments(trained, tmp_path / "out"))
    assert (status, err) == (2, f"error: the environment has {name}={value!r}, expected a number "
                                "from torchrun; unset it, or start with torchrun\n")


def test_a_process_that_the_others_do_not_meet(trained, tmp_path, train_command, monkeypatch):
    """One that died before: this one says so, and does not wait for hours."""
    whole = torch.distributed.rendezvous
    monkeypatch.setattr(torch.distributed, "rendezvous", lambda url, timeout: whole(
        url, timeout=timeout / 300))
    with socket.socket() as s:
        s.bind(("localhost", 0))
        port = s.getsockname()[1]
    for name, value in {"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "localhost",
                        "MASTER_PORT": str(port)}.items():
        monkeypatch.setenv(name, value)
    status, _, err = train_command(*train_arguments(trained, tmp_path / "out"))
    assert status == 2
    assert re.fullmatch(r"error: the processes do not find each other \(.*1/2 clients joined.*\)\n",
                        err)


@pytest.mark.parametrize("content, message", [
    ("", "report.json: not JSON"), ("{}", "report.json: not a report of this program; choose an"),
    ('{"arguments": {}, "scores": [], "seconds": {}}', "not a report of this program"),
    ('{"arguments": {}, "scores": {"source": 1}, "seconds": {}}', "not a report of this program"),
    ('{"arguments": {}, "scores": {}, "seconds": {"read": "x"}}', "not a report of this program"),
    ('{"arguments": {}, "scores": {}, "seconds": {}, "files": []}', "not a report of this"),
    ('{"arguments": {}, "scores": {"distilled": {}}, "seconds": {}}', "not a report of this")])
def test_reports_that_are_none(trained, tmp_path, train_command, content, message):
    (tmp_path / "out").mkdir()
    (tmp_path / "out/report.json").write_text(content)
    status, _, err = train_command(*train_arguments(trained, tmp_path / "out"))
    assert status == 2 and message in err and err.count("\n") == 1


@pytest.mark.slow
def test_kills_at_random_moments(trained, tmp_path, runs):
    kills = killed_runs(trained, tmp_path, runs, 2, 0, longest=3)
    assert sum(kills.values()) == 2


@pytest.mark.slow
@pytest.mark.long
def test_kills_while_the_teacher_is_fine_tuned(tuned, task_arguments, tmp_path):
    out, rng = tmp_path / "out", random.Random(0)
    arguments = [*task_arguments, "--out", out, "--save-every", "1"]
    for _ in range(8):
        kill_at_random(arguments, out, 1, rng, longest=6)
    assert kill_at_random(arguments, out, 1, rng, 10**6)
    assert_same_run(out, tuned[0])
    assert same_weights(*(m.load_checkpoint(run / "teacher")[1] for run in (out, tuned[0])))


@pytest.mark.slow
@pytest.mark.long
def test_60_kills_at_random_moments(trained, tmp_path, runs, capfd):
    kills = killed_runs(trained, tmp_path, runs, 60, 1, longest=6)
    with capfd.disabled():
        print(f"\nkills by way and processes, all without loss: {kills}")
