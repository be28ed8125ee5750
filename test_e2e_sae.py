"""Tests. Numbers are held against something independent: transformers, safetensors, float64 by hand.

    python -m pytest -q test_e2e_sae.py
"""

import errno
import hashlib
import io
import itertools
import json
import lzma
import math
import multiprocessing
import multiprocessing.connection
import multiprocessing.forkserver
import os
import re
import resource
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import tarfile
import threading
from collections import Counter
from html.parser import HTMLParser
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest
import safetensors.numpy
import safetensors.torch
import tiktoken
import torch
import torch._dynamo.testing
import torch.nn.functional as F
import transformers
from safetensors.numpy import load, save
from tiktoken_ext.openai_public import r50k_pat_str

import e2e_sae
import gpt2
from data import openwebtext, stdlib
from e2e_sae import SAE, ActiveOnly, Config, KLLoss, compute_loss, evaluate, sequences
from gpt2 import GPT, GPTConfig, UserError

HERE = Path(__file__).resolve().parent
STDLIB = HERE / "data" / "stdlib"


# ------------------------------------------------------------------------------------------------
# What the tests share: models written to disk by other people's code, GPT-2 and the losses by hand
# ------------------------------------------------------------------------------------------------


def hf_model(n_layer=3, n_head=2, n_embd=16, n_positions=32, vocab_size=1024, seed=0):
    """A random GPT-2 of transformers, its weights large enough that every part of it matters."""
    torch.manual_seed(seed)
    sizes = dict(n_layer=n_layer, n_head=n_head, n_embd=n_embd, n_positions=n_positions, vocab_size=vocab_size)
    model = transformers.GPT2LMHeadModel(transformers.GPT2Config(**sizes)).eval()
    for parameter in model.parameters():
        parameter.data.add_(torch.randn_like(parameter) * 0.1)
    return model


def write_model(model, folder, prefix="", dtype=torch.float32):
    """Write it as openai-community/gpt2 is, by the safetensors package, with this project's vocabulary."""
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {prefix + k: v.to(dtype).contiguous() for k, v in model.transformer.state_dict().items()}
    tensors[prefix + "h.0.attn.bias"] = torch.ones(1, 1, 4, 4, dtype=torch.uint8)  # buffers that old files have
    tensors[prefix + "h.0.attn.masked_bias"] = torch.tensor(-1e4)
    safetensors.torch.save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(model.config.to_json_string())
    (folder / "vocab.json").write_bytes((STDLIB / "vocab.json").read_bytes())
    return folder


@pytest.fixture(scope="session")
def tiny(tmp_path_factory):
    """The folder of a model so small that a run on it takes a second."""
    return write_model(hf_model(), tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture
def text(monkeypatch):
    """Random text in place of the standard library's."""
    tokens = {split: np.random.default_rng(i).integers(0, 1024, 6400).astype(np.uint16)
              for i, split in enumerate(("train", "val"))}
    monkeypatch.setattr(gpt2, "load_tokens", lambda name, split: tokens[split])
    return tokens


def config_of(tiny, **given):
    """Settings for a run on the tiny model."""
    usual = dict(model=str(tiny), layer=1, context=32, n_features=40, n_sequences=128, batch_size=16)
    usual |= dict(n_eval=20, device="cpu")
    return Config(**usual | given)


def by_hand(state, tokens, layer, n_head, replace=None):
    """GPT-2 with an SAE in it, in float64, in plain formulas; shares no code with the project.

    Args:
        state: {OpenAI's name: tensor}, stored (in, out).
        replace: what takes the place of the residual stream at `layer`, a function of it.

    Returns:
        the residual streams entering each block and leaving the last, the logits.
    """
    centre = lambda a: a - a.mean(-1, keepdim=True)

    def norm(a, name):
        variance = ((a - a.mean(-1, keepdim=True)) ** 2).mean(-1, keepdim=True)
        return (a - a.mean(-1, keepdim=True)) / (variance + 1e-5).sqrt() * state[name + ".weight"] + state[name + ".bias"]

    def linear(a, name):
        return a @ state[name + ".weight"] + state[name + ".bias"]

    n = tokens.shape[1]
    x = centre(state["wte.weight"][tokens] + state["wpe.weight"][:n])
    mask = torch.full((n, n), -math.inf, dtype=x.dtype).triu(1)
    residuals = []
    for i in itertools.count():
        if i == layer and replace:
            x = replace(x)
        residuals.append(x)
        if f"h.{i}.ln_1.weight" not in state:
            break
        q, k, v = linear(norm(x, f"h.{i}.ln_1"), f"h.{i}.attn.c_attn").chunk(3, dim=-1)
        heads = []
        for qh, kh, vh in zip(*(part.chunk(n_head, dim=-1) for part in (q, k, v))):
            weights = (qh @ kh.mT / math.sqrt(qh.shape[-1]) + mask).exp()
            heads.append(weights / weights.sum(-1, keepdim=True) @ vh)
        x = x + centre(linear(torch.cat(heads, -1), f"h.{i}.attn.c_proj"))
        a = linear(norm(x, f"h.{i}.ln_2"), f"h.{i}.mlp.c_fc")
        a = 0.5 * a * (1 + torch.tanh(math.sqrt(2 / math.pi) * (a + 0.044715 * a**3)))
        x = x + centre(linear(a, f"h.{i}.mlp.c_proj"))
    return residuals, norm(x, "ln_f") @ state["wte.weight"].T


def losses_by_hand(state, tokens, weights, layer, n_head, lam, beta):
    """All terms and the three losses of DESIGN section 2, from the SAE's four raw parameters."""
    w_e, b_e, w_d, b_d = weights
    features = {}

    def splice(x):
        f = (x @ w_e.T + b_e).clamp(min=0)
        features["f"] = f
        return f @ (w_d / (w_d**2).sum(0).sqrt()).T + b_d

    clean, y = by_hand(state, tokens, layer, n_head)
    spliced, y_hat = by_hand(state, tokens, layer, n_head, splice)
    f, (n, d) = features["f"], (tokens.numel(), w_e.shape[1])
    p, q = (z.exp() / z.exp().sum(-1, keepdim=True) for z in (y, y_hat))
    later = range(layer + 1, len(clean) - 1)
    terms = {
        "mse": ((spliced[layer] - clean[layer]) ** 2).sum() / n / d,
        "sparsity": f.abs().sum() / n / d,
        "kl": (p * (p / q).log()).sum() / n,
        "downstream": sum(((spliced[k] - clean[k]) ** 2).mean() for k in later) / max(1, len(later)),
        "l0": (f > 0).sum() / n,
    }
    penalty = lam * terms["sparsity"]
    return terms, {
        "local": terms["mse"] + penalty,
        "e2e": terms["kl"] + penalty,
        "e2e_ds": 0.5 * terms["kl"] + beta * terms["downstream"] + penalty,
        "finish": 0.5 * ((terms["mse"] / terms["kl"]).detach() * terms["kl"] + terms["mse"]) + penalty,
    }


# ------------------------------------------------------------------------------------------------
# GPT-2, its files and its tokenizer
# ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("sizes", [(2, 2, 16, 32), (3, 4, 32, 64), (1, 1, 8, 16)])
@pytest.mark.parametrize("dtype, bound", [(torch.float32, 1e-4), (torch.float64, 1e-9)])
@pytest.mark.parametrize("prefix", ["", "transformer."])
def test_logits_equal_transformers(tmp_path, sizes, dtype, bound, prefix):
    n_layer, n_head, n_embd, n_positions = sizes
    model = hf_model(n_layer, n_head, n_embd, n_positions, 101)
    gpt = GPT.from_pretrained(write_model(model, tmp_path, prefix)).to(dtype)
    if dtype == torch.float64:  # float32 weights with their mean removed: give the other model the same
        for i, block in enumerate(model.transformer.h):
            for theirs, ours in ((block.attn, gpt.h[i].attn), (block.mlp, gpt.h[i].mlp)):
                theirs.c_proj.weight.data = ours.c_proj.weight.T.clone()
                theirs.c_proj.bias.data = ours.c_proj.bias.clone()
    for length in 1, 7, n_positions:
        tokens = torch.randint(0, 101, (2, length))
        with torch.no_grad():
            theirs = model.to(dtype)(tokens).logits
        assert (gpt(tokens) - theirs).abs().max() < bound
    x = gpt.embed(tokens)
    for block in gpt.h:
        assert x.mean(-1).abs().max() < 1e-5  # the residual stream has zero mean
        x = block(x)
    assert not any(parameter.requires_grad for parameter in gpt.parameters())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_files(tmp_path, dtype):
    model = hf_model()
    gpt = GPT.from_pretrained(write_model(model, tmp_path, dtype=dtype))
    assert torch.equal(gpt.h[2].mlp.c_fc.weight, model.transformer.h[2].mlp.c_fc.weight.to(dtype).float().T)


@pytest.mark.parametrize("change, word", [
    (lambda t: t.pop("h.1.ln_2.bias"), "h.1.ln_2.bias"),
    (lambda t: t.update({"h.1.extra.weight": torch.zeros(2)}), "h.1.extra.weight"),
    (lambda t: t.update({"h.1.attn.c_attn.weight": torch.zeros(48, 16)}), "h.1.attn.c_attn.weight"),
])  # fmt: skip
def test_every_tensor_is_accounted_for(tmp_path, tiny, change, word):
    tensors = safetensors.torch.load_file(tiny / "model.safetensors")
    change(tensors)
    safetensors.torch.save_file(tensors, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_bytes((tiny / "config.json").read_bytes())
    with pytest.raises(UserError, match=word):
        GPT.from_pretrained(tmp_path)


def test_embedded_model_opens_in_transformers():
    theirs = transformers.GPT2LMHeadModel.from_pretrained(STDLIB).eval().float()
    gpt = GPT.from_pretrained("stdlib")
    tokens = torch.from_numpy(stdlib.load_tokens(gpt2.load_tokenizer("stdlib"), "val")[:256].astype(np.int64))
    tokens = tokens.view(2, -1)
    with torch.no_grad():
        assert (gpt(tokens) - theirs(tokens).logits).abs().max() < 1e-3  # a sum of float32 in another order
    loss = F.cross_entropy(gpt(tokens)[:, :-1].flatten(0, 1), tokens[:, 1:].flatten())
    assert loss < 4, "the embedded model has learnt its text"
    assert sum(file.stat().st_size for file in STDLIB.iterdir()) < 8e6


def test_tokenizer_equals_transformers():
    ours, theirs = gpt2.load_tokenizer("stdlib"), transformers.AutoTokenizer.from_pretrained(STDLIB)
    odd = ["", " ", "\n\n  \t x", "naïve café 東京 🐍 \u00a0\u2028", "a'll 'S 12345 ½ ²", "\x00\x7f\x85ÿ", "    def f(x):\n\t  pass\n"]
    files = list(stdlib.read_files("val").values())
    for document in [*odd, *files[:40]]:
        assert ours.encode_ordinary(document) == theirs.encode(document)
        assert ours.decode(ours.encode_ordinary(document)) == document
    assert ours.eot_token == theirs.eos_token_id == 1023
    rare = bytes(range(256)).decode("latin-1")
    assert ours.encode_ordinary(rare) == theirs.encode(rare)


def test_byte_pair_training_by_hand():
    # "aaab" twice and "ab" thrice: ab 5 times, aa 4; then aab... a+ab 2 times, a+a 2 times: bytes decide
    assert stdlib.train_bpe(["aaab aaab", "ab;ab;ab"], 259) == [(b"a", b"b"), (b"a", b"ab")]


def test_split_is_by_file_and_stable():
    train, val = stdlib.read_files("train"), stdlib.read_files("val")
    assert not train.keys() & val.keys() and 0.04 < len(val) / len(train) < 0.25
    assert "argparse.py" in train | val and not any("/test" in name for name in train)


def test_model_recipe_learns(tmp_path):
    tokens = np.tile(np.arange(50, dtype=np.uint16), 40)  # what comes next is certain
    sizes = GPTConfig(n_layer=2, n_head=1, n_embd=16, n_positions=16, vocab_size=64)
    gpt, loss = stdlib.train_model(tokens, tokens[:320], sizes, 400, 8)
    assert loss < 1.5 < math.log(50)
    batch = torch.arange(16).view(1, -1)
    before = gpt(batch)
    stdlib.to_unit_stream(gpt, tokens)
    assert abs(gpt.h[0](gpt.embed(batch)).pow(2).mean() - 1) < 0.1
    assert (gpt(batch) - before).abs().max() < 1e-3  # the same function
    stdlib.save_model(gpt, tmp_path)
    assert (GPT.from_pretrained(tmp_path)(batch) - before).abs().max() < 0.05  # float16 weights


# ------------------------------------------------------------------------------------------------
# The SAE, the losses, the evaluation
# ------------------------------------------------------------------------------------------------


def doubled(tiny):
    """The tiny model in float64, twice: the project's, and the raw tensors with OpenAI's names."""
    gpt = GPT.from_pretrained(tiny).double()
    raw = {k: v.double() for k, v in safetensors.torch.load_file(tiny / "model.safetensors").items()}
    return gpt, raw


@pytest.mark.parametrize("layer", [0, 1, 2])
@pytest.mark.parametrize("loss", ["local", "e2e", "e2e_ds", "finish"])
def test_losses_and_gradients_by_hand(tiny, loss, layer):
    if loss == "e2e_ds" and layer == 2:
        pytest.skip("e2e_ds needs a later layer")
    gpt, raw = doubled(tiny)
    torch.manual_seed(1)
    sae = SAE(16, 40).double()
    sae.decoder.weight.data *= torch.rand(40, dtype=torch.double) + 0.5  # not unit: that is the forward's job
    config = config_of(tiny, loss=loss, layer=layer, sparsity=0.7, downstream=1.3)
    tokens = torch.randint(0, 1024, (3, 20))
    total, terms = compute_loss(gpt, sae, tokens, config)
    total.backward()

    weights = [p.detach().clone().requires_grad_() for p in sae.parameters()]
    hand_terms, hand = losses_by_hand(raw, tokens, weights, layer, 2, 0.7, 1.3)
    hand[loss].backward()
    assert abs(total - hand[loss]) < 1e-8
    wanted = {"local": {"mse"}, "e2e": {"kl"}, "e2e_ds": {"kl", "downstream"}, "finish": {"kl", "mse"}}[loss] | {"sparsity", "l0"}
    assert terms.keys() == wanted
    for name, value in terms.items():
        assert abs(value - hand_terms[name]) < (1e-8 if name != "l0" else 1e-5), name
    for parameter, weight in zip(sae.parameters(), weights):
        assert (parameter.grad - weight.grad).abs().max() < 1e-8
        assert weight.grad.abs().max() > 1e-6
    assert all(parameter.grad is None for parameter in gpt.parameters())


def test_local_never_runs_the_later_blocks(tiny):
    gpt = GPT.from_pretrained(tiny)
    gpt.h[1].forward = gpt.unembed = None  # calling either would fail
    compute_loss(gpt, SAE(16, 40), torch.zeros(1, 8, dtype=torch.long), config_of(tiny, loss="local"))


@pytest.mark.parametrize("chunk", [1, 7, 20, 64])
@pytest.mark.parametrize("compiled", [False, True])
def test_kl_equals_pytorchs(chunk, compiled):
    torch.manual_seed(0)
    spliced, clean, unembedding = (torch.randn(n, 8, dtype=torch.double) for n in (20, 20, 33))
    loss = torch.compile(KLLoss.apply, fullgraph=True, backend="aot_eager") if compiled else KLLoss.apply
    spliced.requires_grad_()
    kl = loss(spliced, clean, unembedding, chunk)
    (3 * kl).backward()
    other = spliced.detach().clone().requires_grad_()
    logs = [F.log_softmax(h @ unembedding.T, -1) for h in (other, clean)]
    expected = F.kl_div(*logs, log_target=True, reduction="batchmean")
    (3 * expected).backward()
    assert abs(kl - expected) < 1e-12
    assert (spliced.grad - other.grad).abs().max() < 1e-12
    if not compiled:
        assert torch.autograd.gradcheck(lambda s: KLLoss.apply(s, clean, unembedding, chunk), spliced)  # finite differences


@pytest.mark.parametrize("silent", [False, True])
@pytest.mark.parametrize("loss", ["local", "e2e", "e2e_ds", "finish"])
def test_active_features_alone_give_the_same(tiny, monkeypatch, loss, silent):
    """Loss, terms and gradients in float64, with tokens where nothing fires and elements that never do."""
    config, gpt = config_of(tiny, loss=loss, sparsity=0.3), GPT.from_pretrained(tiny).double()
    torch.manual_seed(0)
    sae, tokens = SAE(16, 400).double(), torch.randint(0, 1024, (4, 32))
    x = e2e_sae.run_blocks(gpt, gpt.embed(tokens), 0, 1)[-1].flatten(0, 1)
    pre = sae.encoder(x)
    assert not ActiveOnly.usable(sae.encode(x), x, sae.encode(x).count_nonzero())  # half of them fire at first
    sae.encoder.bias.data -= pre.quantile(0.98)
    sae.encoder.bias.data[:40] -= 100
    sae.encoder.bias.data[40:] -= 0.01 * torch.arange(360)
    fired = sae.encode(x) > 0
    assert ActiveOnly.usable(sae.encode(x), x, sae.encode(x).count_nonzero()) and not fired.any(0)[:40].any()
    assert not fired.any(1).all() and fired.any(1).any()
    sae.encoder.bias.data -= 100 * silent  # then not a single one fires
    results = []
    for use in True, False:
        calls = []
        monkeypatch.setattr(ActiveOnly, "usable", staticmethod(lambda features, x, n_active: calls.append(use) or use))
        sae.zero_grad()
        value, terms = compute_loss(gpt, sae, tokens, config)
        value.backward()
        results.append([value.detach(), *(t.detach() for t in terms.values()), *(p.grad.clone() for p in sae.parameters())])
        assert calls == [use]
    for ours, plain in zip(*results, strict=True):
        assert (ours - plain).abs().max() < 1e-12 * max(1, plain.abs().max())


def test_sae_as_defined():
    torch.manual_seed(0)
    sae = SAE(8, 24)
    gram = sae.decoder.weight @ sae.decoder.weight.T  # a tall orthogonal matrix: orthonormal columns
    assert (gram - torch.eye(8)).abs().max() < 1e-5
    sae.decoder.weight.data *= 3
    assert (sae.dictionary.norm(dim=1) - 1).abs().max() < 1e-6
    x = torch.randn(5, 8)
    features = (sae.encoder.weight @ x.T + sae.encoder.bias[:, None]).clamp(min=0).T
    directions = (sae.decoder.weight / sae.decoder.weight.norm(dim=0)).T
    assert (sae.encode(x) - features).abs().max() < 1e-5
    assert (sae(x) - (features @ directions + sae.decoder.bias)).abs().max() < 1e-5


def test_saved_sae_is_read_by_safetensors_and_back(tmp_path):
    sae = SAE(8, 24)
    sae.decoder.weight.data *= 2
    sae.save(tmp_path, "gpt2", 6, 1024)
    tensors = safetensors.numpy.load_file(tmp_path / "sae_weights.safetensors")
    assert {name: t.shape for name, t in tensors.items()} == {
        "W_enc": (8, 24), "b_enc": (24,), "W_dec": (24, 8), "b_dec": (8,)}  # fmt: skip
    assert all(t.dtype == np.float32 for t in tensors.values())
    assert np.abs(np.linalg.norm(tensors["W_dec"], axis=1) - 1).max() < 1e-6
    x = np.random.default_rng(0).normal(size=(5, 8)).astype(np.float32)
    features = np.maximum(x @ tensors["W_enc"] + tensors["b_enc"], 0)
    x_hat = features @ tensors["W_dec"] + tensors["b_dec"]
    again = SAE.load(tmp_path)
    for one in sae, again:
        assert np.abs(one.encode(torch.from_numpy(x)).detach().numpy() - features).max() < 1e-5
        assert np.abs(one(torch.from_numpy(x)).detach().numpy() - x_hat).max() < 1e-5
    assert again.made_for == {"model": "gpt2", "layer": 6, "context": 1024}
    cfg = json.loads((tmp_path / "cfg.json").read_text())
    assert (cfg["architecture"], cfg["d_in"], cfg["d_sae"]) == ("standard", 8, 24)
    assert cfg["metadata"]["hook_name"] == "blocks.6.hook_resid_pre"


def test_sae_of_another_library_is_folded_in(tmp_path):
    """SAELens' SAEs may have rows of any length, and subtract b_dec from their input."""
    g = np.random.default_rng(0)
    t = {k: g.normal(size=s).astype(np.float32) for k, s in
         {"W_enc": (8, 24), "b_enc": 24, "W_dec": (24, 8), "b_dec": 8}.items()}  # fmt: skip
    SAE(8, 24).save(tmp_path, "gpt2", 6, 1024)
    safetensors.numpy.save_file(t, tmp_path / "sae_weights.safetensors")
    cfg = json.loads((tmp_path / "cfg.json").read_text()) | {"apply_b_dec_to_input": True}
    (tmp_path / "cfg.json").write_text(json.dumps(cfg))
    x = g.normal(size=(5, 8)).astype(np.float32)
    x_hat = np.maximum((x - t["b_dec"]) @ t["W_enc"] + t["b_enc"], 0) @ t["W_dec"] + t["b_dec"]
    assert np.abs(SAE.load(tmp_path)(torch.from_numpy(x)).detach().numpy() - x_hat).max() < 1e-4


def test_evaluation_by_hand(tiny):
    gpt, raw = doubled(tiny)
    torch.manual_seed(2)
    sae, tokens, layer = SAE(16, 40).double(), torch.randint(0, 1024, (70, 32)), 1
    result = evaluate(gpt, sae, tokens.numpy(), layer)
    with torch.no_grad():
        w_e, b_e, w_d, b_d = sae.parameters()
        f = lambda x: (x @ w_e.T + b_e).clamp(min=0)
        splice = lambda x: f(x) @ (w_d / w_d.norm(dim=0)).T + b_d
        clean, y = by_hand(raw, tokens, layer, 2)
        spliced, y_hat = by_hand(raw, tokens, layer, 2, splice)
        _, y_mean = by_hand(raw, tokens, layer, 2, lambda x: x.mean((0, 1)).expand_as(x))
        log_p, log_q, log_m = (z - z.exp().sum(-1, keepdim=True).log() for z in (y, y_hat, y_mean))
        ce, ce_spliced, ce_ablated = (-log[:, :-1].gather(-1, tokens[:, 1:, None]).mean() for log in (log_p, log_q, log_m))
        fired = f(clean[layer]) > 0
        ratio = spliced[layer].norm(dim=-1) / clean[layer].norm(dim=-1)
        ev = [1 - ((s - c) ** 2).sum() / ((c - c.mean((0, 1))) ** 2).sum() for s, c in zip(spliced, clean)]
    expected = {
        "ce": ce, "ce_spliced": ce_spliced, "ce_increase": ce_spliced - ce, "ce_ablated": ce_ablated,
        "ce_recovered": 1 - (ce_spliced - ce) / (ce_ablated - ce),
        "kl": (log_p.exp() * (log_p - log_q)).sum(-1).mean(),
        "top1_agreement": (y.argmax(-1) == y_hat.argmax(-1)).double().mean(),
        "l0": fired.sum(-1).double().mean(), "alive": fired.any(0).any(0).sum(), "tokens": tokens.numel(), "n_features": 40,
        "l2_ratio": ratio[:, 1:].mean(), "l2_ratio_first": ratio[:, 0].mean(),
        "mse": ((spliced[1] - clean[1]) ** 2).mean(), "explained_variance": ev[1],
    }  # fmt: skip
    for name, value in expected.items():
        assert abs(result[name] - float(value)) < 1e-6, name
    assert np.abs(np.array(result["explained_variance_by_layer"]) - np.array(ev[1:3])).max() < 1e-8
    mse = [((spliced[k] - clean[k]) ** 2).mean().item() for k in (1, 2)]
    assert np.abs(np.array(result["mse_by_layer"]) - mse).max() < 1e-8
    assert json.loads(json.dumps(result)) == result


def test_identity_costs_nothing(tiny):
    """relu(x) - relu(-x) = x: an SAE that rebuilds everything leaves the model as it was."""
    gpt, sae = GPT.from_pretrained(tiny), SAE(16, 32)
    eye = torch.eye(16)
    for parameter, value in zip(sae.parameters(), (torch.cat([eye, -eye]), 0, torch.cat([eye, -eye], 1), 0)):
        parameter.data.zero_().add_(value)
    tokens = torch.randint(0, 1024, (8, 32))
    result = evaluate(gpt, sae, tokens, 1)
    assert abs(result["kl"]) < 1e-6 and abs(result["ce_increase"]) < 1e-6
    assert result["top1_agreement"] == 1 and abs(result["explained_variance"] - 1) < 1e-6
    _, terms = compute_loss(gpt, sae, tokens, config_of(tiny))
    assert abs(terms["kl"]) < 1e-6


# ------------------------------------------------------------------------------------------------
# Training
# ------------------------------------------------------------------------------------------------


def losses_of(folder):
    """What log.jsonl says of the losses: its lines without the speed."""
    lines = [json.loads(line) for line in (Path(folder) / "log.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if k != "tokens_per_second"} for line in lines]


@pytest.mark.parametrize("loss", ["local", "e2e", "e2e_ds", "finish"])
def test_training_lowers_its_loss(tiny, text, tmp_path, loss):
    sae = e2e_sae.train(config_of(tiny, loss=loss, out=str(tmp_path / "run"), lr=0.01, n_sequences=512, sparsity=0.01))
    log = losses_of(tmp_path / "run")
    assert [line["step"] for line in log] == [1, 10, 20, 30, 32]
    assert log[-1]["loss"] < 0.8 * log[0]["loss"]
    result = json.loads((tmp_path / "run" / "eval.json").read_text())
    again = SAE.load(tmp_path / "run")
    assert evaluate(GPT.from_pretrained(tiny), again, text["val"][:640].reshape(20, 32), 1) == result
    assert torch.equal(again.dictionary, sae.dictionary)


def test_learning_rate_schedule(tiny):
    config = config_of(tiny, lr=1e-3, n_sequences=1000, warmup=100)
    rate = [e2e_sae.learning_rate(config, n) for n in (50, 100, 550, 1000)]
    assert np.allclose(rate, [5e-4, 1e-3, 5.5e-4, 1e-4])


def test_adam_and_clipping_by_hand(tiny, text, tmp_path):
    """One step of the whole training equals Adam's formulas on a clipped gradient."""
    config = config_of(tiny, loss="local", out=str(tmp_path / "run"), n_sequences=16, warmup=0, clip=0.01, lr=0.1)
    torch.manual_seed(config.seed)
    sae = SAE(16, 40)
    rows = text["train"].reshape(-1, 32)[np.random.default_rng([0, 0]).permutation(200)[:16]]
    loss, _ = compute_loss(GPT.from_pretrained(tiny), sae, torch.from_numpy(rows.astype(np.int64)), config)
    grads = torch.autograd.grad(loss, list(sae.parameters()))
    norm = torch.stack([g.pow(2).sum() for g in grads]).sum().sqrt()
    assert norm > 0.01
    expected = [p - 0.01 * c / (c.abs() + 1e-8) for p, c in  # at the last step the rate is a tenth of 0.1
                zip(sae.parameters(), [g * 0.01 / (norm + 1e-6) for g in grads])]  # fmt: skip
    e2e_sae.train(config)
    saved = torch.load(tmp_path / "run" / "checkpoint.pt", weights_only=True)["sae"]
    for value, want in zip(saved.values(), expected):
        assert (value - want).abs().max() < 1e-5


@pytest.mark.parametrize("source", ["run", "published", "saelens"])
def test_start_from_an_sae(tiny, text, tmp_path, monkeypatch, capsys, source):
    """Before the first step it is the SAE it starts from, exactly; also if that step was never saved."""
    path, n = tmp_path / source, 40
    if source == "run":
        e2e_sae.train(config_of(tiny, loss="local", n_sequences=32, out=str(path)))
    elif source == "published":
        path, n = tmp_path / "theirs.pt", 24
        torch.save(published(1), path)
    else:
        SAE(16, 40).save(path, str(tiny), 1, 32)
        tensors = safetensors.torch.load_file(path / "sae_weights.safetensors")
        tensors["W_dec"] = tensors["W_dec"] * torch.linspace(0.5, 2, 40)[:, None]
        safetensors.torch.save_file(tensors, path / "sae_weights.safetensors")
        cfg = json.loads((path / "cfg.json").read_text())
        (path / "cfg.json").write_text(json.dumps(cfg | {"apply_b_dec_to_input": True}))
    gpt, rows = GPT.from_pretrained(tiny), text["val"][:640].reshape(20, 32)
    seen = []

    def first_step(gpt, sae, *more):
        seen.append(evaluate(gpt, sae, rows, 1))
        raise KeyboardInterrupt

    monkeypatch.setattr(e2e_sae, "compute_loss", first_step)
    flags = ["--model", str(tiny), "--layer", "1", "--context", "32", "--loss", "finish", "--init", str(path), "--n-sequences", "16",
             "--n-eval", "20", "--batch-size", "16", "--device", "cpu", "--out", str(tmp_path / "out")]  # fmt: skip
    assert e2e_sae.main(flags) == 130 and e2e_sae.main(["--resume", str(tmp_path / "out")]) == 130
    assert seen == [evaluate(gpt, SAE.load(path), rows, 1)] * 2
    assert json.loads((tmp_path / "out" / "config.json").read_text())["init"] == str(path)
    capsys.readouterr()
    for wrong, words in (["--layer", "2"], "of layer 2"), (["--n-features", "7"], "and 7 elements"):
        assert e2e_sae.main([*flags, *wrong, "--out", str(tmp_path / "other")]) == 2
        only_line(capsys.readouterr().err, "--init is", words, f"layer 1, d_model 16 and {n} elements")
    assert not (tmp_path / "other").exists()


@pytest.mark.parametrize("micro_batch", [1, 2, 4])
def test_micro_batches_give_the_same_step(tiny, text, tmp_path, micro_batch):
    saved = []
    for size in 16, micro_batch:
        out = tmp_path / str(size)
        e2e_sae.train(config_of(tiny, out=str(out), n_sequences=16, warmup=0, micro_batch=size))
        saved.append(torch.load(out / "checkpoint.pt", weights_only=True)["adam"]["state"])
    for whole, parts in zip(saved[0].values(), saved[1].values()):  # after one step exp_avg is a tenth of the gradient
        assert (whole["exp_avg"] - parts["exp_avg"]).norm() < 1e-6 * whole["exp_avg"].norm()


@pytest.mark.parametrize("loss", ["local", "e2e", "e2e_ds", "finish"])
def test_compiled_loss_equals_eager(tiny, loss):
    config, gpt = config_of(tiny, loss=loss), GPT.from_pretrained(tiny)
    torch._dynamo.reset()
    counter = torch._dynamo.testing.CompileCounterWithBackend("inductor")
    compiled = torch.compile(compute_loss, fullgraph=True, backend=counter)
    for step in range(10):
        torch.manual_seed(step)
        sae, tokens = SAE(16, 40), torch.randint(0, 1024, (4, 32))
        loss_c, terms_c = compiled(gpt, sae, tokens, config)
        loss_c.backward()
        grads = [p.grad.clone() for p in sae.parameters()]
        sae.zero_grad()
        loss_e, terms_e = compute_loss(gpt, sae, tokens, config)
        loss_e.backward()
        assert abs(loss_c - loss_e) < 1e-4 * abs(loss_e)
        for compiled_grad, parameter in zip(grads, sae.parameters()):
            assert (compiled_grad - parameter.grad).norm() < 1e-4 * parameter.grad.norm()
        with torch.autocast("cpu", torch.bfloat16):
            loss_h, terms_h = compute_loss(gpt, sae, tokens, config)
        assert loss_h.dtype == torch.float32 and abs(loss_h - loss_e) < 0.02 * abs(loss_e)
    assert counter.frame_count == 1


def test_two_processes_equal_one(tiny, tmp_path):
    """torchrun with two gloo processes: the losses of one process."""
    flags = ["--model", str(tiny), "--layer", "1", "--context", "32", "--n-sequences", "320", "--n-features", "40",
             "--n-eval", "21", "--batch-size", "16", "--log-steps", "1", "--device", "cpu"]  # fmt: skip
    env = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(HERE)}
    two = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    done = subprocess.run([*two, HERE / "e2e_sae.py", *flags, "--out", "two"], cwd=tmp_path, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert e2e_sae.main([*flags, "--out", str(tmp_path / "one")]) == 0
    for a, b in zip(losses_of(tmp_path / "one"), losses_of(tmp_path / "two"), strict=True):
        assert a.keys() == b.keys() and all(abs(a[k] - b[k]) < 1e-5 * max(1, abs(a[k])) for k in a)
    one, other = (json.loads((tmp_path / run / "eval.json").read_text()) for run in ("one", "two"))
    assert abs(one["ce_increase"] - other["ce_increase"]) < 1e-4 and one["tokens"] == other["tokens"]


@pytest.mark.parametrize("victim", [0, 1])
def test_one_of_two_processes_is_killed(tiny, tmp_path, victim):
    """The other ends with an error, without help from torchrun, which would end it anyway."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    flags = ["--model", str(tiny), "--layer", "1", "--context", "32", "--n-features", "40", "--batch-size", "2",
             "--n-sequences", "1000000", "--device", "cpu", "--out", str(tmp_path / "run")]  # fmt: skip
    env = os.environ | {"OMP_NUM_THREADS": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    ranks = [subprocess.Popen([sys.executable, HERE / "e2e_sae.py", *flags], env=env | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
                              stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) for rank in (0, 1)]  # fmt: skip
    try:
        assert any(line.startswith("step 1/") for line in ranks[0].stdout)
        ranks[victim].kill()
        other = ranks[1 - victim]
        _, error = other.communicate(timeout=60)
        assert other.returncode == 1
        assert "error: the run stopped, for another of its processes did" in error and "--resume" in error, error
        assert not (tmp_path / "run" / "eval.json").exists()
    finally:
        for process in ranks:
            process.kill()
            process.communicate()


# ------------------------------------------------------------------------------------------------
# The views
# ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("chunk", [7, 64])
def test_nearest_by_brute_force(chunk):
    torch.manual_seed(0)
    a, b = (F.normalize(torch.randn(n, 8, dtype=torch.double), dim=1) for n in (40, 30))
    for other, own in (a, True), (b, False):
        cosines = [[float(sum(x * y)) if not (own and i == j) else -9 for j, y in enumerate(other)] for i, x in enumerate(a)]
        values, rows = e2e_sae.nearest(a, other, 3, chunk)
        for i, row in enumerate(cosines):
            best = sorted(range(len(row)), key=lambda j: -row[j])[:3]
            assert rows[i].tolist() == best and max(abs(values[i, k] - row[best[k]]) for k in range(3)) < 1e-12


def test_compare_leaves_out_the_dead(tiny, text, tmp_path, capsys):
    """Dictionaries made by hand: the elements that never fire would be each other's nearest."""
    torch.manual_seed(0)
    for name in "ab":
        sae = SAE(16, 8)
        sae.encoder.bias.data[:] = torch.tensor([9.0] * 5 + [-99.0] * 3)
        sae.decoder.weight.data = torch.eye(16)[:, :8] + (0.75 * torch.eye(16)[:, 8:] if name == "b" else 0)
        sae.decoder.weight.data[:, 5:] = 1  # equal to one another
        sae.save(tmp_path / name, str(tiny), 1, 32)
    assert e2e_sae.main(["--compare", str(tmp_path / "a"), str(tmp_path / "b"), "--n-eval", "3"]) == 0
    out = capsys.readouterr().out
    assert out.count("(5 elements)") == 3 and "mean 0.000" in out and "mean 0.800" in out  # 1 / |(1, 0.75)|
    assert " 0.0 to 0.1 100.0%" in out and " 0.8 to 0.9 100.0%" in out or " 0.7 to 0.8 100.0%" in out


SAMPLE = '''"""Sample: módule docstring."""
import os
from sys import path

# a comment
LIMIT = 60


@decorate(1)
class Thing(Base):
    """Of a class."""

    size = [0x1F, "text"]

    def act(self, other=None):
        """Of a
        function."""
        for item in other:
            if item > 2:
                self.total += len(item.parts[0])
        while True:
            break
        try:
            value = {k: v for k in other}
        except OSError:
            raise ValueError("bad")
        with open(path) as file:
            file.read()
        assert value, b"no"
        return lambda x: x
'''
BY_HAND = {  # concept: what it holds for, from the top, pieces parted by |
    "first word of a statement": "import|from|LIMIT|@|class|size|def|for|if|self|while|break|try|value|except|raise|with|file|"
                                 "assert|return",
    "keyword": "import|from|import|class|def|for|in|if|while|break|try|for|in|except|raise|with|as|assert|return|lambda",
    "comment": "# a comment",
    "name in capitals": "LIMIT",
    "operator or bracket": "=|@|(|)|(|):|=|[|,|]|(|,|=|):|:|>|:|.|+=|(|.|[|])|:|:|=|{|:|}|:|(|)|(|)|:|.|()|,|:",
    "number": "60|1|0x1F|2|0",
    "inside brackets": '(1|(Base|[0x1F,|"text"|(self,|other=None|(item.parts[0]|{k:|v|for|k|in|other|("bad"|(path|(',
    "inside two brackets": "[0",
    "closing bracket": ")|)|]|)|])|}|)|)|)",
    "decorator": "@decorate(1)\n",
    "name being defined": "Thing|act",
    "indented 1 deep": '"""Of a class."""|size|=|[0x1F,|"text"]|def|act(self,|other=None):',
    "indented 2 deep": '"""Of a\n        function."""|for|item|in|other:|while|True:|try:|except|OSError:|with|open(path)|as|'
                       'file:|assert|value,|b"no"|return|lambda|x:|x',
    "indented 3 deep": 'if|item|>|2:|break|value|=|{k:|v|for|k|in|other}|raise|ValueError("bad")|file.read()',
    "self": "self|self",
    "True, False, None": "None|True",
    "name of a builtin": "len|OSError|ValueError|open",
    "attribute after a dot": "total|parts|read",
    "docstring": '"""Sample: módule docstring."""|"""Of a class."""|"""Of a\n        function."""',
    "string": '"text"|"bad"|b"no"',
    "import": "import os|from sys import path",
    "target of an assignment": "LIMIT|size|value",
    "class body": SAMPLE[SAMPLE.index('"""Of a class') : -1],
    "parameter": "self|other|x",
    "loop body": "if item > 2:\n                self.total += len(item.parts[0])|break",
    "condition of an if": "item > 2",
    "comparison": "item > 2",
    "argument of a call": '1|item.parts[0]|"bad"|path',
    "subscript": "0",
    "try body": "value = {k: v for k in other}",
    "comprehension": "{k: v for k in other}",
    "exception handler": 'raise ValueError("bad")',
    "raise statement": 'raise ValueError("bad")',
    "with body": "file.read()",
    "assert statement": 'assert value, b"no"',
    "return statement": "return lambda x: x",
    "lambda": "lambda x: x",
}  # fmt: skip


def test_concepts_by_hand():
    found, source = stdlib.concepts(SAMPLE), SAMPLE.encode()
    assert found.keys() == BY_HAND.keys() and len(found) > 25
    for concept, pieces in BY_HAND.items():
        edges = np.flatnonzero(np.diff([0, *found[concept].astype(int), 0]))
        assert [source[a:b].decode() for a, b in zip(edges[::2], edges[1::2])] == pieces.split("|"), concept


def test_labels_of_tokens(monkeypatch):
    """A token has the concepts of its last byte; a file that does not parse is left out."""
    monkeypatch.setattr(stdlib, "read_files", lambda split: {"a.py": SAMPLE, "b.py": "def (:\n", "c.py": "y = 12\n"})
    tokenizer = gpt2.load_tokenizer("stdlib")
    tokens, truth = stdlib.labelled_tokens(tokenizer)
    assert tokenizer.decode(tokens.tolist()) == f"{SAMPLE}<|endoftext|>y = 12\n<|endoftext|>"
    ends = np.cumsum([len(tokenizer.decode_single_token_bytes(token)) for token in tokens])
    marks = stdlib.concepts(SAMPLE)
    for concept, holds in truth.items():
        for end, is_true in zip(ends, holds):
            if end <= len(SAMPLE.encode()):
                assert is_true == marks[concept][end - 1]
    number = [tokenizer.decode([token]) for token in tokens[truth["number"]]]
    assert "".join(number[-2:]).strip() == "12" and not any(holds[-1] for holds in truth.values())


def test_best_features_by_brute_force():
    rng, n, half = np.random.default_rng(0), 60, 30
    truth = rng.random((n, 3)) < 0.3
    features = np.maximum(rng.integers(-6, 6, (n, 5)), 0).astype(np.float32)  # with equals
    features[:, 3] = truth[:, 1] * (1 + np.arange(n))  # this one is concept 1
    features[:, 4] = 0
    found = e2e_sae.firings(lambda x: x, torch.from_numpy(features))
    f1, feature, threshold = e2e_sae.best_features(found, truth, half)
    assert f1[1] == 1 and feature[1] == 3

    def score(i, t, c, rows):
        predicted = features[rows, i] >= t
        return 2 * (predicted & truth[rows, c]).sum() / (predicted.sum() + truth[rows, c].sum())

    first, second = slice(0, half), slice(half, n)
    for c in range(3):
        best = max(score(i, t, c, first) for i in range(5) for t in set(features[first, i]) - {0.0})
        assert abs(score(feature[c], threshold[c], c, first) - best) < 1e-12
        assert abs(score(feature[c], threshold[c], c, second) - f1[c]) < 1e-12


def test_concepts_of_a_planted_feature(tmp_path, tiny, monkeypatch, capsys):
    """The sum of all coordinates is high where the concept holds; one element reads just that."""
    rng = np.random.default_rng(0)
    truth = rng.random(2048) < 0.03
    x = torch.from_numpy(rng.normal(size=(2048, 16)) + truth[:, None]).float()
    x += (3 * torch.from_numpy(truth) - x.mean(1))[:, None]  # the mean is 3 or 0
    monkeypatch.setattr(stdlib, "labelled_tokens", lambda tokenizer: (np.zeros(2048, np.uint16), {"planted": truth}))
    monkeypatch.setattr(e2e_sae, "residuals", lambda gpt, rows, layer: x)
    torch.manual_seed(0)
    sae = SAE(16, 4)
    sae.encoder.weight.data[1], sae.encoder.bias.data[1] = 1, -20
    sae.save(tmp_path / "sae", str(tiny), 1, 32)
    assert e2e_sae.main(["--concepts", str(tmp_path / "sae")]) == 0
    line = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("planted"))
    _, share, planted, coordinate, random, always, number = line.split()
    assert number == "1"
    assert share == f"{truth.mean():.1%}" and float(planted) == 1
    assert max(map(float, (coordinate, random))) < 1 and abs(float(always) - 2 * truth[1024:].mean() / (1 + truth[1024:].mean())) < 0.006


class Page(HTMLParser):
    """What an HTML file asks a browser for, and the texts of its scripts."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.scripts, self.inside = [], [], False
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))
        self.inside = tag == "script"
        if self.inside:
            self.scripts.append("")

    def handle_endtag(self, tag):
        self.inside = False

    def handle_data(self, data):
        if self.inside:
            self.scripts[-1] += data


def test_features_page(tmp_path, tiny, text, monkeypatch, capsys):
    hostile = [b"<script>alert(1)</script>", b"</script>", b"&amp;", b"\"'`${x}", b"\x00\x1b[2J", b"\xe2\x82", b"<!--", "\u2028".encode()]
    real = gpt2.load_tokenizer(tiny)

    class Tokenizer:
        eot_token = real.eot_token

        def decode_single_token_bytes(self, i):
            return hostile[i] if i < len(hostile) else real.decode_single_token_bytes(i)

    monkeypatch.setattr(gpt2, "load_tokenizer", lambda name: Tokenizer())
    torch.manual_seed(0)
    sae = SAE(16, 40)
    sae.encoder.bias.data -= 0.5
    sae.encoder.bias.data[5] = -99
    sae.save(tmp_path / "sae", str(tiny), 1, 32)
    assert e2e_sae.main(["--features", str(tmp_path / "sae"), "--n-eval", "20"]) == 0
    assert "features.html" in capsys.readouterr().out
    written = (tmp_path / "sae" / "features.html").read_text()
    page = Page(written)
    for tag, attributes in page.tags:  # nothing is fetched from anywhere
        assert tag in ("html", "meta", "title", "link", "style", "h1", "h2", "table", "pre", "p", "input", "span", "div", "button",
                       "script"), tag  # fmt: skip
        assert "src" not in attributes and attributes.get("href", "data:,") == "data:,"
    assert "http" not in written.replace(written[written.index('{"name"') : written.rindex("}</script>")], "")
    packed, code = page.scripts
    assert "innerHTML" not in code and "textContent" in code
    data = json.loads(packed)
    assert data["vocab"][:8] == ["<script>alert(1)</script>", "</script>", "&amp;", "\"'`${x}", "\\u0000\\u001b[2J",
                                 "\\xe2\\x82", "<!--", "\\u2028"]  # fmt: skip
    assert data["text"] == text["val"][:640].tolist() and [f["id"] for f in data["features"]] == [*range(40)]

    gpt, loaded = GPT.from_pretrained(tiny), SAE.load(tmp_path / "sae")
    with torch.no_grad():
        rows = torch.from_numpy(text["val"][:640].astype(np.int64)).view(20, 32)
        x = e2e_sae.run_blocks(gpt, gpt.embed(rows), 0, 1)[-1].flatten(0, 1)
        acts = loaded.encode(x).numpy()
        dictionary = loaded.dictionary.numpy().astype(np.float64)
    assert data["features"][5]["contexts"] == [] and data["features"][5]["rate"] == 0
    for f in data["features"]:
        mine = acts[:, f["id"]]
        assert abs(f["rate"] - (mine > 0).mean()) < 1e-9
        if not f["contexts"]:
            continue
        at, first, tints, value, kind = f["contexts"][0]
        assert at == mine.argmax() and kind == "strongest" and abs(float(value) - mine.max()) < 0.01 * mine.max()
        assert [int(tint) for tint in tints] == np.ceil(9 * mine[first : first + len(tints)] / mine.max()).tolist()
        push = gpt.wte.weight.numpy() @ (dictionary[f["id"]] * gpt.ln_f.weight.numpy())
        assert [i for i, _ in f["up"]][:3] == np.argsort(-push)[:3].tolist()
        assert [i for i, _ in f["down"]][:3] == np.argsort(push)[:3].tolist()
        cosines = dictionary @ dictionary[f["id"]]
        cosines[~(acts > 0).any(0)] = -9
        cosines[f["id"]] = -9
        assert f["near"][0][0] == cosines.argmax()


def test_some_features_of_many(tmp_path, tiny, text, capsys):
    SAE(16, 5000).save(tmp_path / "sae", str(tiny), 1, 32)
    call = ["--features", str(tmp_path / "sae"), "--n-eval", "2"]
    shown = []
    for more in [], [], ["--feature-ids", "4999", "3"]:
        assert e2e_sae.main([*call, *more]) == 0
        packed = Page((tmp_path / "sae" / "features.html").read_text()).scripts[0]
        shown.append([f["id"] for f in json.loads(packed)["features"]])
    assert len(set(shown[0])) == 1000 and shown[0] == shown[1] and shown[2] == [4999, 3]
    for bad in "5000", "-1":
        assert e2e_sae.main([*call, f"--feature-ids={bad}"]) == 2
        only_line(capsys.readouterr().err, bad, "4,999")


def test_plot(tmp_path, tiny, text, capsys, monkeypatch):
    for loss in "local", "e2e", "e2e_ds":
        e2e_sae.train(config_of(tiny, loss=loss, n_sequences=16, out=str(tmp_path / loss)))
    runs = [str(tmp_path / loss) for loss in ("local", "e2e", "e2e_ds")]
    assert e2e_sae.main(["--plot", *runs]) == 0
    picture = (tmp_path / "pareto.png").read_bytes()
    assert picture.startswith(b"\x89PNG") and len(picture) > 10_000
    capsys.readouterr()
    assert e2e_sae.main(["--plot", str(tmp_path / "none")]) == 2
    only_line(capsys.readouterr().err, "none")
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert e2e_sae.main(["--plot", *runs]) == 2
    only_line(capsys.readouterr().err, "matplotlib")
    assert (tmp_path / "pareto.png").read_bytes() == picture


# ------------------------------------------------------------------------------------------------
# Runs that are killed, stopped, doubled, out of disk or not finite; and bad input
# ------------------------------------------------------------------------------------------------

RUN = shlex.split("--model model --layer 1 --n-features 24 --n-sequences 80 --batch-size 4 "
                  "--context 16 --n-eval 8 --device cpu --log-steps 1 --checkpoint-minutes 0")
RUN += ["--sparsity", "0.5"]
STEPS = 20
FORKS = multiprocessing.get_context("forkserver")  # its server computes nothing: forks are sound
FORKS.set_forkserver_preload(["torch._dynamo", "e2e_sae", __name__])


def some_text(tokenizer, split):
    """Random text in place of the standard library's."""
    return np.random.default_rng(len(split)).integers(0, 1024, 640).astype(np.uint16)


def wrap(patch, module, name, before, after=lambda: None):
    """Have something happen before, and after, each call of module.name."""
    real = getattr(module, name)

    def wrapped(*args, **kwargs):
        before()
        result = real(*args, **kwargs)
        after()
        return result

    patch(module, name, wrapped)


def at_call(number, act):
    """A function whose call of that number acts."""
    calls = iter(range(1, 10**9))
    return lambda: act() if next(calls) == number else None


def full():
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@pytest.fixture(scope="module")
def stage(tmp_path_factory):
    """A folder with a model, a run that ended ("whole"), and one stopped after step 5 ("run")."""
    folder = tmp_path_factory.mktemp("stage")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", os.pathsep.join([str(HERE), str(Path(__file__).parent)]))
        multiprocessing.forkserver.ensure_running()
    torch.manual_seed(0)
    sizes = GPTConfig(n_layer=3, n_head=2, n_embd=16, n_positions=32, vocab_size=1024)
    stdlib.save_model(GPT(sizes), folder / "model")
    shutil.copy(HERE / "data" / "stdlib" / "vocab.json", folder / "model")
    return folder


@pytest.fixture
def here(stage, tmp_path, monkeypatch):
    """A copy of `stage`, as the current folder."""
    threads = torch.get_num_threads()
    handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    torch.set_num_threads(1)
    monkeypatch.setattr(stdlib, "load_tokens", some_text)
    if not (stage / "whole").exists():
        with pytest.MonkeyPatch.context() as patch:
            patch.chdir(stage)
            assert e2e_sae.main([*RUN, "--out", "whole"]) == 0
            stop = at_call(5, lambda: signal.raise_signal(signal.SIGTERM))
            wrap(patch.setattr, e2e_sae, "compute_loss", stop)
            with pytest.raises(SystemExit):
                e2e_sae.main([*RUN, "--out", "run"])
    shutil.copytree(stage, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    yield tmp_path
    torch.set_num_threads(threads)
    for number, handler in handlers.items():
        signal.signal(number, handler)


def logged(folder, *left_out):
    lines = map(json.loads, Path(folder, "log.jsonl").read_text().splitlines())
    return [{k: v for k, v in line.items() if k not in ("tokens_per_second",
        *left_out)} for line in lines]


def saved(folder):
    return torch.load(Path(folder, "checkpoint.pt"), weights_only=True)


def tree(folder):
    return {path: path.is_file() and path.read_bytes() for path in Path(folder).rglob("*")}


def assert_as_whole(out):
    """The run in `out` equals the one that nothing befell, bit for bit, and left nothing else."""
    assert logged(out) == logged("whole")
    assert [line["step"] for line in logged(out)] == [*range(1, STEPS + 1)]
    assert {p.name for p in Path(out).iterdir()} == {p.name for p in Path("whole").iterdir()}
    for name in ("eval.json", "cfg.json", "sae_weights.safetensors"):
        assert Path(out, name).read_bytes() == Path("whole", name).read_bytes()


def only_line(text, *words):
    """The text, but for a line of progress, is one line of error, and has these words."""
    lines = [line for line in text.splitlines() if not line.startswith("evaluating:")]
    assert len(lines) == 1 and lines[0].startswith("error: "), text
    assert all(word in text for word in words), text


# Other processes


def child(folder, arguments, hook, given):
    """What another process does: something to befall it is set up, then the command line runs."""
    os.chdir(folder)
    sys.stdout, sys.stderr = open(os.devnull, "w"), open(f"{os.getpid()}.txt", "w", buffering=1)
    torch.set_num_threads(1)
    stdlib.load_tokens = some_text
    hook(*given)
    sys.exit(e2e_sae.main(arguments))


def start(arguments, hook, *given):
    process = FORKS.Process(target=child, args=(os.getcwd(), arguments, hook, given))
    process.start()
    return process


def ended(process):
    """Its exit code and what it wrote to stderr."""
    process.join(100)
    return process.exitcode, Path(f"{process.pid}.txt").read_text()


def kill_at(number):
    """Let `kill -9` come at that one of the moments around what is done and written."""
    moments = iter(range(1, 10**9))

    def moment(name):
        if next(moments) == number:
            print(name, file=sys.stderr)
            os.kill(os.getpid(), signal.SIGKILL)

    for module, name in ((e2e_sae, "compute_loss"), (torch, "save"), (os, "rename"),
        (os, "replace")):
        wrap(setattr, module, name, lambda n=name: moment("at " + n),
            lambda n=name: moment("after " + n))


def test_kill_9_at_twenty_moments(here):
    rng, moments, log = np.random.default_rng(0), [], Path("out", "log.jsonl")
    while len(moments) < 20:
        arguments = ["--resume", "out"] if Path("out").exists() else [*RUN, "--out", "out"]
        code, text = ended(start(arguments, kill_at, int(rng.integers(1, 20))))
        assert code == -signal.SIGKILL, text
        moments.append(text.strip())
        done = log.read_text().count("\n") if log.exists() else 0
        assert 0 <= done - (saved("out")["step"] if Path("out",
            "checkpoint.pt").exists() else 0) <= 1
        if done:
            log.write_text(log.read_text() + '{"step": 1')  # as if killed within a line
    assert done > STEPS / 2
    assert {f"{when} {what}" for when in ("at", "after") for what in ("save",
        "replace")} < {*moments}
    assert ended(start(["--resume", "out"], kill_at, 0))[0] == 0
    assert_as_whole("out")


def meet(module, name, barrier, loser_gone):
    """Both processes come to the same place before either goes on; then the winner waits."""
    wrap(setattr, sys.modules[module], name, lambda: barrier.wait(60))
    wrap(setattr, e2e_sae, "compute_loss", lambda: loser_gone.wait(60))


@pytest.mark.parametrize("arguments, module, name, words", [
    ([*RUN, "--out", "out"], "os", "rename", "out is there already"),
    (["--resume", "run"], "gpt2", "lock", "run is in use by another process")])
def test_of_two_at_once_one_wins(here, arguments, module, name, words):
    barrier, loser_gone = FORKS.Barrier(2), FORKS.Event()
    processes = [start(arguments, meet, module, name, barrier, loser_gone) for _ in "ab"]
    first = multiprocessing.connection.wait([p.sentinel for p in processes], 60)
    loser_gone.set()
    loser, winner = sorted(processes, key=lambda p: p.sentinel not in first)
    code, text = ended(loser)
    assert code == 2
    only_line(text, words)
    assert ended(winner)[0] == 0
    assert_as_whole(arguments[-1])
    assert not [*here.glob("*.part")]


def test_a_real_process_is_stopped_twice(here):
    command = [sys.executable, HERE / "e2e_sae.py", *RUN, "--n-sequences", "4000000", "--out",
        "out"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        text=True) as process:
        for line in process.stdout:
            if line.startswith(("step", "stopped")):
                last = line
                process.send_signal(signal.SIGINT)
        assert process.stderr.read() == ""
        assert process.wait() == 130
    step = saved("out")["step"]
    assert f"after step {step:,}: go on with --resume out" in last
    assert [line["step"] for line in logged("out")] == [*range(1, step + 1)]


# Signals, a full disk, numbers that are not finite


@pytest.mark.parametrize("first, second", [
    ("SIGTERM", None), ("SIGINT", None), ("SIGTERM", "SIGTERM"), ("SIGINT", "SIGINT"),
    ("SIGINT", "SIGTERM"), ("SIGTERM", "SIGINT")])
def test_signals(here, monkeypatch, first, second):
    """The first comes within a step, the second while the checkpoint is being written."""
    number = signal.Signals[first]
    with monkeypatch.context() as patch:
        wrap(patch.setattr, e2e_sae, "compute_loss",
            at_call(7, lambda: signal.raise_signal(number)))
        if second:
            wrap(patch.setattr, torch, "save", lambda: signal.raise_signal(signal.Signals[second]))
        with pytest.raises(SystemExit) as stop:
            e2e_sae.main([*RUN, "--checkpoint-minutes", "10", "--out", "out"])
    assert stop.value.code == 128 + number
    assert len(logged("out")) == saved("out")["step"] == 7
    assert e2e_sae.main(["--resume", "out"]) == 0
    assert_as_whole("out")


def limit_files(size):
    """Let no file of this process grow beyond that many bytes."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))


def test_disk_full_for_a_checkpoint(here):
    before = Path("run", "checkpoint.pt").read_bytes()
    code, text = ended(start(["--resume", "run"], limit_files, len(before) // 2))
    assert code == 1
    only_line(text, "cannot write run/checkpoint.pt", "--resume run")
    assert Path("run", "checkpoint.pt").read_bytes() == before
    assert not [*here.rglob("*.part")]
    assert e2e_sae.main(["--resume", "run"]) == 0
    assert_as_whole("run")


@pytest.mark.parametrize("arguments, module, name, call, code", [
    (["--resume", "run"], json, "dumps", 2, 1), (["--resume", "run"], torch, "save", 3, 1),
    (["--resume", "run"], os, "replace", -1, 1), ([*RUN, "--out", "run2"], os, "fsync", 1, 2)])
def test_disk_full_elsewhere(here, monkeypatch, capsys, arguments, module, name, call, code):
    """At a line of the log, a checkpoint, the last file of all, the first."""
    before = tree(here)
    with monkeypatch.context() as patch:
        last = 1 + (STEPS - 5) + 3  # the log, a checkpoint a step, the SAE's two, eval.json
        wrap(patch.setattr, module, name, at_call(call if call > 0 else last, full))
        assert e2e_sae.main(arguments) == code
    only_line(capsys.readouterr().err, "No space left on device")
    assert code == 1 or tree(here) == before
    assert e2e_sae.main(arguments) == 0
    assert_as_whole(arguments[-1])


@pytest.mark.parametrize("what", ["loss", "gradient"])
@pytest.mark.parametrize("flags, checkpoint",
    [("--log-steps 1", 6), ("--log-steps 4 --checkpoint-minutes 9", 5)])
def test_not_finite(here, monkeypatch, capsys, what, flags, checkpoint):
    """Step 7, the second after the resumption, goes wrong; nothing moves from then on."""
    real, weights = e2e_sae.compute_loss, []

    def bad(gpt, sae, *rest):
        loss, terms = real(gpt, sae, *rest)
        weights.append({name: tensor.clone() for name, tensor in sae.state_dict().items()})
        nothing = 0 * sae.decoder.bias.sum()  # the root of zero is zero, its slope infinite
        wrong = nothing + math.nan if what == "loss" else nothing.sqrt()
        return (loss + wrong if len(weights) == 2 else loss), terms

    with monkeypatch.context() as patch:
        patch.setattr(e2e_sae, "compute_loss", bad)
        assert e2e_sae.main(["--resume", "run", *flags.split()]) == 1
    only_line(capsys.readouterr().err, "step 7:", "not finite", "run/checkpoint.pt")
    state = saved("run")
    assert state["step"] == checkpoint
    for now in (state["sae"], *weights[2:]):
        expected = weights[checkpoint - 5 if now is state["sae"] else 1]
        assert all(torch.equal(now[name], expected[name]) for name in expected)
    for adam in state["adam"]["state"].values():
        assert adam["step"] == checkpoint and all(t.isfinite().all() for t in adam.values())
    assert e2e_sae.main(["--resume", "run"]) == 0
    assert_as_whole("run")


def test_too_high_a_learning_rate(here, capsys):
    assert e2e_sae.main([*RUN, "--lr", "1e30", "--loss", "local", "--out", "out"]) == 1
    lines = logged("out")
    only_line(capsys.readouterr().err, f"step {len(lines) + 1}:", "below 1e+30")
    assert all(math.isfinite(value) for line in lines for value in line.values())


# The order of the text, and what may change in a resumed run


def test_a_seed_is_a_run(here):
    for seed in (0, 1):
        assert e2e_sae.main([*RUN, "--seed", str(seed), "--out", f"seed{seed}"]) == 0
    assert_as_whole("seed0")
    assert all(a["loss"] != b["loss"] for a,
        b in zip(logged("seed0"), logged("seed1"), strict=True))


def test_order_of_the_text():
    text = np.arange(33).reshape(11, 3)
    order = sequences(text, 5, 0, 33)
    epochs = order.reshape(3, 11, 3)
    assert all((np.sort(epoch, 0) == text).all() for epoch in epochs)
    assert (epochs[0] != epochs[1]).any() and (epochs[1] != epochs[2]).any()
    for first, count in ((0, 4), (9, 5), (20, 13)):
        assert (sequences(text, 5, first, count) == order[first : first + count]).all()
    assert (sequences(text, 6, 0, 11) != epochs[0]).any()


def test_what_may_change(here, monkeypatch):
    sizes, saves = [], []
    real, save = e2e_sae.compute_loss, torch.save
    monkeypatch.setattr(e2e_sae, "compute_loss", lambda *a: sizes.append(len(a[2])) or real(*a))
    monkeypatch.setattr(torch, "save", lambda *a: saves.append(a) or save(*a))
    flags = "--micro-batch 2 --log-steps 3 --checkpoint-minutes 9 --device cpu --seed 0"
    assert e2e_sae.main(["--resume", "run", *flags.split()]) == 0
    assert sizes == [2] * 2 * (STEPS - 5) and len(saves) == 1
    lines, whole = logged("run"), {line["step"]: line for line in logged("whole")}
    assert [line["step"] for line in lines] == [1, 2, 3, 4, 5, 6, 9, 12, 15, 18, 20]
    for line in lines:
        assert line == pytest.approx(whole[line["step"]], rel=1e-4)


# Bad input

LONG = "x" * 300
ARGUMENTS = [  # of a new run; without words: the message names flag and value
    "--layer 99", "--layer 3", "--layer -1", "--layer 2 --loss e2e_ds", "--loss foo", "--loss ''",
    "--sparsity -1", "--sparsity nan", "--sparsity inf", "--downstream -0.5", "--n-features 0",
    "--n-sequences 0", "--n-sequences 3", "--context 1", "--context 33", "--batch-size 0",
    "--micro-batch 3", "--micro-batch 0", "--lr -1.0", "--lr nan", "--warmup -1", "--clip -1.0",
    "--n-eval 0", "--seed -1", "--seed 99999999999999999999", "--dtype float16", "--device tpu",
    "--log-steps 0", "--checkpoint-minutes -1.0", "--n-features 99999999999999",
    f"--warmup 1{'0' * 400}", ("--context 32 --layer 1e0", "--layer"), ("--layer", "--layer"),
    ("--unknown 1", "--unknown"), ("--lay 1", "--lay"), ("stray", "stray"),
    ("--compile=yes", "--compile"),
    ("--loss 'a\nb'", "--loss"), ("--evaluate run --resume run", "--resume"),
    ("--out run", "--resume run"),
    ("--out model", "model is there"), ("--out model/config.json/x", "model/config.json"),
    (f"--out {LONG}", LONG), ("--out .", "is there"), ("--model nowhere", "nowhere"),
    (f"--model {LONG}", LONG),
    ("--model model/config.json", "no model"), ("--model run", "run"),
    ("--model ''", "config.json")]
RESUME = [
    ("--resume nowhere", "nowhere/config.json"), ("--resume model", "model/config.json"),
    ("--resume '' --model model", "config.json"), ("--resume run/log.jsonl", "log.jsonl"),
    ("--resume run --layer 2", "--layer is 2, the run in run has 1"),
    ("--resume run --sparsity 3", "--sparsity is 3.0, the run in run has 0.5"),
    ("--resume run --loss local", "--loss is local, the run in run has e2e"),
    ("--resume run --n-sequences 96", "--n-sequences is 96, the run in run has 80"),
    ("--resume run --seed 1", "--seed is 1, the run in run has 0"),
    ("--resume run --model gpt2", "--model is gpt2, the run in run has model"),
    ("--resume run --out elsewhere", "--out is elsewhere, the run in run has run"),
    ("--resume run --micro-batch 3", "--micro-batch is 3"),
    ("--resume run --device tpu", "--device is tpu"),
    ("--resume whole --seed 1", "--seed is 1, the run in whole has 0")]
EVALUATE = [
    ("--evaluate nowhere", "nowhere"), ("--evaluate model", "no SAE"),
    ("--evaluate run", "run: there is no SAE"),
    ("--evaluate whole run", "run: there is no SAE"),
    ("--evaluate whole --layer 2", "--layer is 2"),
    ("--evaluate whole --model gpt2", "--model is gpt2"),
    ("--evaluate model/vocab.json", "vocab.json"),
    ("--evaluate whole --n-eval 0", "--n-eval is 0"),
    ("--evaluate whole --context 33", "--context is 33"),
    ("--evaluate ''", "no SAE"), (f"--evaluate {LONG}", LONG), ("--evaluate", "--evaluate"),
    ("--compare whole nowhere", "nowhere"), ("--concepts run", "run: there is no SAE"),
    ("--features nowhere", "nowhere"), ("--features whole --feature-ids 24", "--feature-ids has 24"),
    ("--features whole --feature-ids x", "--feature-ids"), ("--feature-ids 3", "--features"),
    ("--plot run", "eval.json"), ("--plot nowhere", "nowhere"), ("--plot", "--plot"),
    ("--plot whole --compare whole", "--plot")]
NEW, ON, SHOW = "--out out", "--resume run", "--evaluate whole"
FILES = [  # arguments, file, its fate (fields, bytes, how many are kept, None: deleted), words
    *[(ON, "run/config.json", change, "run/config.json") for change in (
        None, 40, b"[]", b"\xff", b"[" * 99999, {"layer": "1"}, {"layer": None}, {"layer": True},
        {"loss": []}, {"model": {}}, {"lr": math.nan}, {"lr": 10**400}, {"compile": 1},
        {"batch_size": None}, {"batch_size": "4"}, {"n_sequences": []}, {"more": 1},
        {"device": "tpu"},
        {"dtype": 32}, {"sparsity": -1}, {"loss": "e2e\n"}, {"micro_batch": 3})],
    *[(ON, "run/config.json", change, words) for change, words in (
        ({"n_features": 23}, "run"), ({"seed": 7}, "run"), ({"sparsity": 2}, "run"),
        ({"layer": 9}, "--layer is 9"), ({"model": "no\0where"}, "no model"))],
    *[(ON, "run/checkpoint.pt", change, "run/checkpoint.pt is damaged") for change in (
        0, 9, 5000, -1, b"hello", b"\x80\x04cposix\nsystem\n(S'touch pwned'\ntR.",
        "version", "step", "sae", "adam", "config", [])],
    (ON, "run/log.jsonl", b"nonsense\n", "run/log.jsonl"),
    (ON, "run/log.jsonl", b"[]\n", "run/log.jsonl"),
    ("--resume whole", "whole/eval.json", b"{}", "whole/eval.json"),
    *[(NEW, "model/config.json", change, "model") for change in (
        None, 30, b"7", {"n_layer": 4}, {"n_layer": 0}, {"n_embd": 17}, {"n_embd": 10**5},
            {"n_head": 3},
        {"n_positions": 64}, {"vocab_size": 1000}, {"vocab_size": "x"},
        {"activation_function": "relu"},
        {"layer_norm_epsilon": None})],
    *[(NEW, "model/model.safetensors", change, "model/model.safetensors") for change in (
        None, 0, 7, 100, -1, b"\xff" * 99, b"\x02" + bytes(7) + b"{}", b"\x02" + bytes(7) + b"[]")],
    *[(NEW, "model/vocab.json", change, "vocab.json") for change in (
        None, 100, b"[]", b"{}", {"a": 5}, {"a": "b"}, {"zz": 1024}, {"": 1024}, {"\u4e2d": 1024})],
    *[(SHOW, "whole/cfg.json", change, "whole") for change in (
        None, b"[]", {"architecture": "topk"}, {"normalize_activations": "layer_norm"},
            {"metadata": 3})],
    *[(SHOW, "whole/cfg.json", {"metadata": {"model_name": "model", "context_size": 16,
       "hook_name": "blocks.1.hook_resid_pre", **change}}, words) for change, words in (
        ({"hook_name": "blocks.1.mlp"}, "hook_name"), ({"hook_name": None}, "whole"),
        ({"hook_name": "blocks.7.hook_resid_pre"}, "--layer is 7"),
        ({"model_name": "nowhere"}, "nowhere"),
        ({"model_name": []}, "model"), ({"context_size": 33}, "--context is 33"),
        ({"context_size": "16"}, "16"))],
    *[(SHOW, "whole/sae_weights.safetensors", change, "whole") for change in (
        None, 0, 50, -1, {"b_enc": torch.ones(3)}, {"W_enc": torch.ones(2, 2, 2)},
            {"b_dec": torch.ones(16) / 0},
        {"W_enc": torch.ones(0, 0)}, {"b_dec": torch.ones(())})],
    *[("--evaluate run/checkpoint.pt", "run/checkpoint.pt", change,
    "run/checkpoint.pt") for change in (
        9, "sae", [], ["blocks-6-hook_resid_pre.x"], [3])]]


def spoil(path, change):
    if change is None:
        path.unlink()
    elif path.suffix == ".safetensors" and isinstance(change, dict):
        gpt2.write_safetensors(path, dict(gpt2.read_safetensors(path)) | change)
    elif isinstance(change, dict):
        path.write_text(json.dumps(json.loads(path.read_text()) | change))
    elif isinstance(change, bytes):
        path.write_bytes(change)
    elif isinstance(change, int):
        path.write_bytes(path.read_bytes()[:change])
    else:  # another file of torch's, or a checkpoint one of whose parts is another's
        torch.save(saved("run") | {change: "other"} if isinstance(change, str) else change, path)


def cases():
    for case in ARGUMENTS:
        arguments, words = case if isinstance(case, tuple) else (case,
            "{} is {}".format(*shlex.split(case)[:2])[:60])
        yield f"--out out {arguments}", None, None, words
    for arguments, words in RESUME + EVALUATE:
        yield arguments, None, None, words
    yield from FILES


@pytest.mark.parametrize("arguments, file, change, words", [
    pytest.param(*case, id=str(i)) for i, case in enumerate(cases())])
def test_bad_input(here, capsys, recwarn, arguments, file, change, words):
    if file:
        spoil(here / file, change)
    before = tree(here)
    new = RUN if arguments.startswith("--out") else []
    assert e2e_sae.main([*new, *shlex.split(arguments)]) == 2
    only_line(capsys.readouterr().err, words)
    assert tree(here) == before and not recwarn.list  # a warning would be lines more


# ------------------------------------------------------------------------------------------------
# Fetching, tokenising, and files that are not to be trusted
# ------------------------------------------------------------------------------------------------

# A miniature of everything that is fetched, in the real formats

ORDER = [*range(33, 127), *range(161, 173), *range(174, 256)]  # bytes that stand for themselves
OTHERS = [byte for byte in range(256) if byte not in ORDER]
CHARS = {b: chr(b) for b in ORDER} | {b: chr(256 + i) for i, b in enumerate(OTHERS)}
RANKS = {token: i for i, token in enumerate([bytes([b]) for b in CHARS]
                                            + [b"th", b"he", b"the", b" t", b" the", b"in", b"er"])}
VOCAB = {"".join(CHARS[b] for b in t): i for t, i in RANKS.items()} | {"<|endoftext|>": 263}
ORACLE = tiktoken.Encoding("oracle", pat_str=r50k_pat_str, mergeable_ranks=RANKS,
                           special_tokens={"<|endoftext|>": 263})
PROSE = "In the beginning there was the thin winter, 1984; they're her brother's naïve 東京 ☃.\n"
DOCUMENTS = {
    "one.xz": {"1.txt": PROSE * 9, "2.txt": " \n a\n\nb\n\n\nc\n\n\n\n\n<|endoftext|> \t\n",
               "3.txt": ""},
    "../evil.xz": {"../../evil.txt": "evil", "/tmp/evil.txt": PROSE, "evil.md": "no document"},
    "three.xz": {"5.txt": PROSE * 4, "6.txt": "the last " * 20},
}
TEXTS = [text for xz in DOCUMENTS.values() for name, text in xz.items() if name.endswith(".txt")]
GELU = {"model_type": "gpt2", "activation_function": "gelu_new", "layer_norm_epsilon": 1e-5}
SIZES = {"n_layer": 3, "n_head": 2, "n_embd": 16, "n_positions": 32, "vocab_size": 264}
sha256 = lambda data: hashlib.sha256(data).hexdigest()


def weights(n_layer, n_embd, n_positions, vocab_size, **_):
    """GPT-2's tensors as OpenAI's file has them: Conv1D as (in, out), a mask that is no weight."""
    rng, d = np.random.default_rng(0), n_embd
    linear = {"attn.c_attn": (d, 3 * d), "attn.c_proj": (d, d), "mlp.c_fc": (d, 4 * d)}
    block = linear | {"mlp.c_proj": (4 * d, d), "ln_1": (d,), "ln_2": (d,)}
    shapes = {"wte.weight": (vocab_size, d), "wpe.weight": (n_positions, d)}
    shapes |= {"ln_f.weight": (d,), "ln_f.bias": (d,)}
    for i in range(n_layer):
        shapes |= {f"h.{i}.{name}.weight": size for name, size in block.items()}
        shapes |= {f"h.{i}.{name}.bias": size[-1:] for name, size in block.items()}
        shapes[f"h.{i}.attn.bias"] = (1, 1, 4, 4)
    return {name: (0.4 * rng.standard_normal(s)).astype("f4") for name, s in shapes.items()}


def tar(files):
    """A tar of {name: bytes}."""
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w") as archive:
        for name, content in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    return file.getvalue()


def subset(documents, damage=lambda name, xz: xz):
    """A subset of OpenWebText: a tar of .xz, each a tar of documents."""
    packed = {name: lzma.compress(tar({n: text.encode() for n, text in texts.items()}))
              for name, texts in documents.items()}
    return tar({"README": b"no .xz"} | {name: damage(name, xz) for name, xz in packed.items()})


def clean(text):
    return re.sub("\n{3,}", "\n\n", text).strip()


def expected_bins(texts):
    """train and val, by the rules of DESIGN section 4."""
    ids = [ORACLE.encode_ordinary(clean(text)) for text in texts]
    join = lambda documents: [token for ids in documents for token in (*ids, 263)][:-1]
    n_val = min(len(join(ids)) // 200, 1_000_000)
    n = next(n for n in range(1, len(ids)) if len(join(ids[-n:])) >= n_val)
    return [join(ids[:-n]), join(ids[-n:])]


BODY = np.random.default_rng(0).bytes(2_500_000)
N, WRONG = len(BODY), BODY[:-1] + b"?"
GPT2 = "/openai-community/gpt2/resolve/607a30d783dfa663caf39e06633721c8d4cfcd7e/"
APOLLO = "/apollo-research/e2e-saes-gpt2/resolve/713515193ec799fd17bd7f6ccf6f209332b07f7d/"
SUBSET = ("/datasets/Skylion007/openwebtext/resolve/39d1a6d3f3a4c838b27bbc65bfb14a2f6f727740/"
          "subsets/urlsf_subset00.tar")
SERVED = {"/file": BODY, SUBSET: subset(DOCUMENTS),
         GPT2 + "config.json": json.dumps(GELU | SIZES).encode(),
         GPT2 + "vocab.json": json.dumps(VOCAB).encode(),
         GPT2 + "model.safetensors": save(weights(**SIZES))}


class Hub(ThreadingHTTPServer):
    """The hub's `resolve` on 127.0.0.1. It counts what it serves, and does what `faults` say."""

    daemon_threads = True
    handle_error = lambda *args: None  # a client that hangs up is none of its concern

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Answer)
        self.url = f"http://127.0.0.1:{self.server_port}"
        self.files, self.ranges, self.served = dict(SERVED), [], Counter()
        self.faults = []  # one a request: {status, html, body, no_range, cut, hold, stall}
        self.arrived, self.release = threading.Event(), threading.Event()


class Answer(BaseHTTPRequestHandler):
    def log_message(self, *args):
        pass

    def answer(self, status, length=0, **headers):
        self.send_response(status)
        for name, value in ({"Content-Length": length} | headers).items():
            self.send_header(name.replace("_", "-"), str(value))
        self.end_headers()

    def do_GET(self):
        hub, path = self.server, self.path.removeprefix("/cdn")
        if path not in hub.files:
            return self.answer(404)
        body = hub.files[path]
        if path == self.path and not path.endswith(".json"):  # in large-file storage: redirect
            about = {"X_Linked_Etag": f'"{sha256(body)}"', "X_Linked_Size": len(body)}
            return self.answer(302, Location="/cdn" + path, **about)
        fault = hub.faults.pop(0) if hub.faults else {}
        body, span = fault.get("body", body), self.headers.get("Range")
        hub.ranges.append(span)
        start = int(re.fullmatch(r"bytes=(\d+)-", span)[1]) if span else 0
        start = 0 if fault.get("no_range") else start
        hub.arrived.set()
        if fault.get("hold"):
            hub.release.wait(60)
        if fault.get("status"):
            return self.answer(fault["status"])
        if fault.get("html"):
            return self.answer(200, Content_Type="text/html; charset=utf-8")
        if start >= len(body):
            return self.answer(416, Content_Range=f"bytes */{len(body)}")
        about = {"Content_Range": f"bytes {start}-{len(body) - 1}/{len(body)}"} if start else {}
        self.answer(206 if start else 200, len(body) - start, **about)
        rest = body[start:][: fault.get("cut")]
        hub.served[path] += len(rest)
        self.wfile.write(rest)
        if fault.get("stall"):
            hub.release.wait(60)


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A Hub; data/ is empty, the pinned hashes are the miniatures', waits take no time."""
    with Hub() as hub:
        threading.Thread(target=hub.serve_forever, args=(0.01,), daemon=True).start()
        monkeypatch.setenv("E2E_SAE_HUB", hub.url + "/")
        monkeypatch.setenv("NO_PROXY", "127.0.0.1")
        monkeypatch.setattr(gpt2, "DATA", tmp_path / "data")
        known = {name: sha256(SERVED[GPT2 + name]) for name in ("vocab.json", "model.safetensors")}
        monkeypatch.setattr(gpt2, "SHA256", known)
        monkeypatch.setattr(openwebtext, "SHA256", [sha256(SERVED[SUBSET])])
        monkeypatch.setattr(gpt2, "TIMEOUT", (1, 0.3))
        monkeypatch.setattr(gpt2.time, "sleep", lambda seconds: None)
        yield hub
        hub.release.set()
        hub.shutdown()


def error_of(call, *words):
    """`call` ends in a UserError of one line, with these words in it."""
    with pytest.raises(gpt2.UserError) as caught:
        call()
    message = str(caught.value)
    assert "\n" not in message and all(str(word) in message for word in words), message


def start_call(call):
    """Run `call` in another process. Returns its pid and what it prints or raises, as a file."""
    read, write = os.pipe()
    pid = os.fork()
    if pid:
        os.close(write)
        return pid, open(read)
    try:
        sys.stderr = open(write, "w", buffering=1)
        call()
        print("fine", file=sys.stderr)
    except BaseException as error:
        print(type(error).__name__, error, file=sys.stderr)
    finally:
        os._exit(0)


def dies(call):
    """Whether `call`, in another process, ends by kill -9."""
    pid, prints = start_call(call)
    return (prints.read(), os.waitpid(pid, 0)[1]) == ("", signal.SIGKILL)


def die(*args, **more):
    os.kill(os.getpid(), signal.SIGKILL)


# download

CUTS = 0, 1, 70_000, 2**20, 2**20 + 1, N - 1


@pytest.mark.parametrize("faults, served", [
    ([], N),
    *(([{"cut": k}], N) for k in CUTS),
    ([{"cut": 2**20}, {"cut": 70_000}, {"status": 503}, {"cut": 2**20}], N),
    ([{"cut": 2**20, "no_range": True}, {"no_range": True}], N + 2**20),
    ([{"status": 429}, {"status": 503}, {"status": 500}, {"status": 408}], N),
    ([{"hold": True}, {"cut": 2**20 + 1, "stall": True}], N),
], ids=str)
def test_download_survives(hub, tmp_path, faults, served):
    hub.faults, path, failures = list(faults), tmp_path / "new" / "file", max(1, len(faults))
    assert gpt2.download(hub.url + "/file", path) == path and path.read_bytes() == BODY
    assert served <= hub.served["/file"] < served + 2**20 * failures  # each may lose a chunk
    assert not hub.faults and not list(tmp_path.rglob("*.part"))
    before = len(hub.ranges)
    gpt2.download(hub.url + "/file", path)
    assert len(hub.ranges) == before <= len(faults) + 1  # what is there is not fetched again


@pytest.mark.parametrize("faults, requests, word", [
    ([{"status": 404}], 1, "404"),
    ([{"status": 403}], 1, "403"),
    ([{"html": True}], 1, "web page"),
    ([{"body": WRONG}], 1, sha256(WRONG)),
    ([{"body": BODY + b"?"}], 1, f"{N + 1:,}"),
    ([{"body": BODY[:-1]}] * 40, 5, f"{N - 1:,} of {N:,}"),
    ([{"status": 503}] * 40, 5, "503"),
    ([{"cut": 0}] * 40, 5, "connection"),
    ([{"hold": True}] * 40, 5, "no answer in time"),
    ([{"stall": True, "cut": 9}] * 40, 5, "no answer in time"),
    ([{"no_range": True, "cut": k} for k in (2**20, 2**21)] * 20, 7, "connection"),
    ([{"body": WRONG, "cut": 2**20}, {"body": WRONG}] * 20, 7, "broke"),
], ids=lambda value: str(value)[:40] if value else None)
def test_download_gives_up(hub, tmp_path, faults, requests, word):
    hub.faults, path = list(faults), tmp_path / "file"
    error_of(lambda: gpt2.download(hub.url + "/file", path), hub.url, path, word, "--model stdlib")
    assert not path.exists() and 1 <= len(hub.ranges) <= requests


@pytest.mark.parametrize("part, served", [
    (BODY[:1000], N - 1000), (BODY, 0), (b"?" * 1000, 2 * N - 1000), (WRONG, N), (BODY + b"?", N),
], ids=["first part", "whole", "other", "other whole", "too long"])
def test_stale_part(hub, tmp_path, part, served):
    (tmp_path / "file.part").write_bytes(part)
    path = gpt2.download(hub.url + "/file", tmp_path / "file", sha256(BODY))
    assert path.read_bytes() == BODY and hub.served["/file"] == served


def test_stale_part_without_a_hash(hub, tmp_path):
    (tmp_path / "config.json.part").write_bytes(b'{"n_layer": 5')
    path = gpt2.download(hub.url + GPT2 + "config.json", tmp_path / "config.json")
    assert path.read_bytes() == SERVED[GPT2 + "config.json"]


def test_no_network_and_no_folder(hub, tmp_path, monkeypatch):
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        monkeypatch.setenv("E2E_SAE_HUB", f"http://127.0.0.1:{closed.getsockname()[1]}")
        folder, words = tmp_path / "data" / "gpt2", ("no connection", "--model stdlib")
        error_of(lambda: gpt2.GPT.from_pretrained("gpt2"), folder, *words)
    assert not list(folder.iterdir())
    (tmp_path / "regular").write_bytes(b"as it was")
    error_of(lambda: gpt2.download(hub.url + "/file", tmp_path / "regular/x/file"), "cannot write")
    assert (tmp_path / "regular").read_bytes() == b"as it was" and not hub.ranges


def test_killed_or_no_space(hub, tmp_path, monkeypatch):
    path, fetch = tmp_path / "file", lambda: gpt2.download(hub.url + "/file", tmp_path / "file")

    def short_of_space():
        resource.setrlimit(resource.RLIMIT_FSIZE, (1_500_000, 1_500_000))
        fetch()

    pid, prints = start_call(short_of_space)
    assert prints.read().startswith("UserError cannot fetch") and os.waitpid(pid, 0)[1] == 0
    for place in (gpt2.Progress, "__call__"), (gpt2.os, "replace"):
        with monkeypatch.context() as patch:
            patch.setattr(*place, die)
            assert dies(fetch) and not path.exists()
    assert fetch().read_bytes() == BODY
    assert hub.ranges[0] is None and None not in hub.ranges[1:] and hub.served["/file"] < 2.5 * N


def test_two_at_once(hub, tmp_path, monkeypatch):
    monkeypatch.setattr(gpt2, "TIMEOUT", (60, 60))
    hub.faults = [{"hold": True}]
    fetch = lambda: gpt2.download(hub.url + "/file", tmp_path / "file")
    first, prints = start_call(fetch)
    assert hub.arrived.wait(30)
    second, also_prints = start_call(fetch)
    assert "waiting" in also_prints.readline()
    hub.release.set()
    assert prints.read().endswith("fine\n") and also_prints.read().endswith("fine\n")
    assert (os.waitpid(first, 0)[1], os.waitpid(second, 0)[1]) == (0, 0)
    assert (tmp_path / "file").read_bytes() == BODY and hub.served["/file"] == N


def test_train_from_nothing(hub, tmp_path, monkeypatch):
    for file in ("gpt2.py", "e2e_sae.py", "data/openwebtext.py", "data/stdlib.py"):
        (tmp_path / file).parent.mkdir(exist_ok=True)
        shutil.copy(Path(gpt2.__file__).parent / file, tmp_path / file)
    code = (f"import sys, e2e_sae, gpt2; from data import openwebtext; gpt2.SHA256 = {gpt2.SHA256};"
            f"openwebtext.SHA256 = {openwebtext.SHA256}; sys.exit(e2e_sae.main(sys.argv[1:]))")
    flags = ("--layer 1 --loss e2e --context 16 --n-sequences 32 --batch-size 16 --n-features 32 "
             "--n-eval 2 --device cpu --no-compile --out").split()
    done = subprocess.run([sys.executable, "-c", code, *flags, "first"], cwd=tmp_path, text=True,
                          capture_output=True)
    assert done.returncode == 0, done.stderr
    (tmp_path / "data/openwebtext/urlsf_subset00.tar").unlink()  # as it says one may
    monkeypatch.setattr(e2e_sae.signal, "signal", lambda *args: None)  # leave pytest's as they are
    assert e2e_sae.main([*flags, str(tmp_path / "second")]) == 0
    assert len(hub.ranges) == 4 and sum(hub.served.values()) == sum(map(len, SERVED.values())) - N
    first, second = (json.loads((tmp_path / out / "eval.json").read_bytes())
                     for out in ("first", "second"))
    assert first["kl"] > 0 and first == second


# Text


def read_bins(folder):
    return [np.fromfile(folder / name, "<u2").tolist() for name in ("train.bin", "val.bin")]


def test_tokens(hub, tmp_path):
    bins = [gpt2.load_tokens("gpt2", split).tolist() for split in ("train", "val")]
    assert bins == expected_bins(TEXTS) == read_bins(tmp_path / "data" / "openwebtext")
    assert not list(tmp_path.parent.rglob("*evil*")) and not Path("/tmp/evil.txt").exists()


@pytest.mark.parametrize("texts", [["", "the end"], ["a", ""], ["", "", "b" * 900],
                                   ["the " * 300, "in", "a", "b"]],
                         ids=["first empty", "last empty", "two empty", "short last ones"])
def test_tokens_of_odd_documents(tmp_path, texts):
    path = tmp_path / "subset.tar"
    path.write_bytes(subset({"a.xz": {f"{i}.txt": text for i, text in enumerate(texts)}}))
    openwebtext.tokenize([path], ORACLE, tmp_path)
    assert read_bins(tmp_path) == expected_bins(texts)


def test_damaged_subset(tmp_path):
    path, refused, last = tmp_path / "subset.tar", 0, {"three.xz": DOCUMENTS["three.xz"]}
    for at in range(0, 200, 3):
        flip = lambda name, xz: xz[:at] + bytes([xz[at] ^ 4]) + xz[at + 1 :]
        path.write_bytes(subset(last, flip))
        try:  # some flips do no harm: those in the index behind the data
            assert list(openwebtext.documents(path)) == [clean(t) for t in TEXTS[-2:]], at
        except gpt2.UserError as error:
            refused += 1
            assert "three.xz" in str(error) and str(path) in str(error)
    assert refused > 60
    whole = SERVED[SUBSET]
    for end in range(0, len(whole.rstrip(b"\0")), 512):
        path.write_bytes(whole[:end])
        error_of(lambda: list(openwebtext.documents(path)), path, "damaged")


BATCH = "encode_ordinary_batch"


@pytest.mark.parametrize("place, nth", [(BATCH, 2), ("replace", 1), ("replace", 2)])
def test_killed_while_tokenising(hub, tmp_path, monkeypatch, place, nth):
    texts = [f"the {i}" for i in range(2500)]  # three batches
    target = tmp_path / "data" / "openwebtext"
    target.mkdir(parents=True)
    content = subset({"a.xz": {f"{i}.txt": text for i, text in enumerate(texts)}})
    (target / "urlsf_subset00.tar").write_bytes(content)
    gpt2.load_tokenizer("gpt2")
    where, calls = os if place == "replace" else tiktoken.Encoding, []
    real = getattr(where, place)

    def nth_dies(*args, **more):
        calls.append(args)
        return (die if len(calls) == nth else real)(*args, **more)

    with monkeypatch.context() as patch:
        patch.setattr(where, place, nth_dies)
        assert dies(openwebtext.prepare) and not (target / "train.bin").exists()
    openwebtext.prepare()
    assert read_bins(target) == expected_bins(texts)


@pytest.mark.parametrize("content, word", [(b"", "0 bytes"), (b"\1\0\2", "3 bytes"),
                                           (b"\1\0\x08\1", "264")])
def test_unsound_bins(hub, tmp_path, content, word):
    bins = {split: tmp_path / f"data/openwebtext/{split}.bin" for split in ("train", "val")}
    bins["val"].parent.mkdir(parents=True)
    for split, path in bins.items():
        for other in bins.values():
            other.write_bytes(b"\1\0\x07\1")
        few = gpt2.load_tokens("gpt2", split)
        error_of(lambda: e2e_sae.windows(few, 3), "--context is 3", "2 tokens")
        path.write_bytes(content)
        error_of(lambda: gpt2.load_tokens("gpt2", split), path, word)


# Published SAEs


def published(layer):
    """An SAE as the paper's files hold it: keys by its place, the decoder not normalised."""
    rng = np.random.default_rng(layer)
    shapes = {"encoder.0.weight": (24, 16), "encoder.0.bias": (24,), "decoder.weight": (16, 24),
              "decoder.bias": (16,)}
    return {f"blocks-{layer}-hook_resid_pre.{name}": torch.from_numpy(rng.normal(size=s)).float()
            for name, s in shapes.items()}


def numpy_by_hand(tokens, layer, sae=None):
    """A float64 pass: (log-probabilities, x, x_hat, features), with x_hat in x's place if `sae`."""
    w = {name: t.astype("f8") for name, t in load(SERVED[GPT2 + "model.safetensors"]).items()}
    (batch, pos), seen = tokens.shape, []
    center = lambda x: x - x.mean(-1, keepdims=True)

    def norm(name, x):
        x = center(x) / np.sqrt(x.var(-1, keepdims=True) + 1e-5)
        return x * w[name + ".weight"] + w[name + ".bias"]

    x = w["wte.weight"][tokens] + w["wpe.weight"][:pos]
    for i in range(3):
        linear = lambda name, x: x @ w[f"h.{i}.{name}.weight"] + w[f"h.{i}.{name}.bias"]
        if i == layer and sae:
            W_e, b_e, W_d, b_d = (tensor.double().numpy() for tensor in sae.values())
            features = np.maximum(center(x) @ W_e.T + b_e, 0)
            x_hat = features @ (W_d / np.sqrt((W_d**2).sum(0))).T + b_d
            x, seen = x_hat, [center(x), x_hat, features]
        qkv = linear("attn.c_attn", norm(f"h.{i}.ln_1", x)).reshape(batch, pos, 3, 2, 8)
        q, k, v = np.moveaxis(qkv, 2, 0)
        a = np.exp(np.einsum("bqhd,bkhd->bhqk", q, k) / np.sqrt(8)) * np.tri(pos)
        y = np.einsum("bhqk,bkhd->bqhd", a / a.sum(-1, keepdims=True), v)
        x = x + linear("attn.c_proj", y.reshape(x.shape))
        u = linear("mlp.c_fc", norm(f"h.{i}.ln_2", x))
        gelu = u / 2 * (1 + np.tanh(np.sqrt(2 / np.pi) * (u + 0.044715 * u**3)))
        x = x + linear("mlp.c_proj", gelu)
    y = norm("ln_f", x) @ w["wte.weight"].T
    return y - np.log(np.exp(y).sum(-1, keepdims=True)), *seen


@pytest.mark.parametrize("layers, layer", [([1], 1), ([0, 2], 2), ([0, 2], 0)])
def test_published_saes(hub, layers, layer):
    file, name = io.BytesIO(), "apollo:e2e_similar_l0_layer_2"
    torch.save({key: t for k in layers for key, t in published(k).items()}, file)
    hub.files[APOLLO + "e2e_similar_l0_layer_2.pt"] = file.getvalue()
    if len(layers) > 1:
        error_of(lambda: e2e_sae.SAE.load(name), layers, "--layer")
    sae = e2e_sae.SAE.load(name, None if len(layers) == 1 else layer)
    assert sae.made_for == {"model": "gpt2", "layer": layer, "context": 1024}
    assert len(hub.ranges) == 1
    tokens = np.random.default_rng(1).integers(264, size=(5, 20))
    got = e2e_sae.evaluate(gpt2.GPT.from_pretrained("gpt2"), sae, tokens, layer)
    (p,), (q, x, x_hat, features) = numpy_by_hand(tokens, layer), numpy_by_hand(tokens, layer, published(layer))
    ce = lambda log_p: -np.take_along_axis(log_p[:, :-1], tokens[:, 1:, None], 2).mean()
    want = {"ce": ce(p), "ce_spliced": ce(q), "kl": (np.exp(p) * (p - q)).sum(-1).mean(),
            "mse": ((x - x_hat) ** 2).mean(), "l0": (features > 0).sum(-1).mean()}
    assert {name: got[name] for name in want} == pytest.approx(want, rel=1e-5) and want["kl"] > 0.01


def test_unsound_published_saes(hub, tmp_path):
    class Evil:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "evil"),)

    path, sound = tmp_path / "saes.pt", published(1)
    first = next(iter(sound))
    W = sound[first]
    for content in (Evil(), sound | {"x": Evil()}, {}, [first], sound | {first: None},
                    sound | {first: W.T}, sound | {first: W * np.nan}, sound | {first: W.int()}):
        torch.save(content, path)
        error_of(lambda: e2e_sae.SAE.load(path), path)
    for content in (b"", b"no archive", path.read_bytes()[:-100]):
        path.write_bytes(content)
        error_of(lambda: e2e_sae.SAE.load(path), path)
    hub.files[APOLLO + "local_similar_ce_layer_6.pt"] = BODY  # its hash is known beforehand
    error_of(lambda: e2e_sae.SAE.load("apollo:local_similar_ce_layer_6"), "c49a66c6d9ae4f6f")
    error_of(lambda: e2e_sae.SAE.load("apollo:nosuch"), "404", "nosuch.pt")
    assert not (tmp_path / "evil").exists() and not list((tmp_path / "data/apollo").iterdir())


# Files that are not what they should be

TINY = {"n_layer": 1, "n_head": 1, "n_embd": 2, "n_positions": 2, "vocab_size": 2}
TENSORS = weights(**TINY)
SOUND = save(TENSORS)
HEAD = 8 + int.from_bytes(SOUND[:8], "little")


def packed(header, body=b""):
    head = header if isinstance(header, bytes) else json.dumps(header).encode()
    return len(head).to_bytes(8, "little") + head + body


def one(dtype="F32", shape=(1,), span=(0, 4), body=b"1234"):
    return packed({"wte.weight": {"dtype": dtype, "shape": shape, "data_offsets": span}}, body)


def model(folder, raw=SOUND, **config):
    """A folder with a model of one block in it, and these changes."""
    config = GELU | TINY | config
    config = {name: value for name, value in config.items() if value != "missing"}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "model.safetensors").write_bytes(raw)
    return folder


ENTRY = {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}
HOSTILE = {
    "empty": b"", "7 bytes": b"\0" * 7, "no JSON": packed(b"{'a'"), "a list": packed([]),
    "not UTF-8": packed(b'{"\xff":1}'), "huge length": b"\xff" * 8 + b"{}",
    "beyond the end": b"\x63" + b"\0" * 7 + b"{}", "deep": packed(b'{"a":' + b"[" * 500_000),
    "deep object": packed(b'{"a":' * 150_000), "surrogate": packed(b'{"\\ud800\\n": {}}'),
    "a million keys": packed({str(i): 0 for i in range(1_000_000)}), "truncated": SOUND[:-1],
    "many keys": packed({str(i): {} for i in range(60_000)}), "no entry": packed({"wte.weight": 7}),
    "dtype": one(dtype="Q4"), "dtype a list": one(dtype=[]), "shape": one(shape=[2]),
    "negative": one(shape=[-1]), "true": one(shape=[True]), "float": one(shape=[1.0]),
    "vast": one(shape=[2**62, 4]), "vast nothing": one("F32", [0, 2**62, 4], [0, 0], b""),
    "beyond": one(span=[4, 8]), "backwards": one(span=[4, 0]), "left over": one(body=b"12345"),
    "gap": one(span=[4, 8], body=b"12345678"), "overlap": packed({"a": ENTRY, "b": ENTRY}, b"1234"),
}


@pytest.mark.parametrize("raw", HOSTILE.values(), ids=HOSTILE)
def test_hostile_safetensors(tmp_path, raw):
    path = model(tmp_path, raw) / "model.safetensors"
    error_of(lambda: list(gpt2.read_safetensors(path)), path)
    error_of(lambda: gpt2.GPT.from_pretrained(tmp_path), path)


def test_wrong_tensors(tmp_path):
    cases = {"ln_f.bias": {name: t for name, t in TENSORS.items() if name != "ln_f.bias"},
             "h.1.ln_1.bias": TENSORS | {"h.1.ln_1.bias": TENSORS["ln_f.bias"]}}
    for name, shape in {"h.0.mlp.c_fc.weight": (8, 2), "wte.weight": 4, "wpe.weight": (1, 4),
                        "h.0.attn.c_attn.weight": (1, 2, 6)}.items():
        cases[name] = TENSORS | {name: TENSORS[name].reshape(shape)}
    for word, tensors in cases.items():
        path = model(tmp_path, save(tensors)) / "model.safetensors"
        error_of(lambda: gpt2.GPT.from_pretrained(tmp_path), path, word)


BAD = "missing", None, 0, -1, 1.5, True, "1\n2", [1], 10**30


@pytest.mark.parametrize("key, value", [
    *((key, value) for key in TINY for value in BAD),
    ("n_head", 3), ("activation_function", "relu"),
    *(("layer_norm_epsilon", value) for value in ("missing", 0, -1.0, 2.0, float("nan"), "1e-5")),
])
def test_wrong_config(tmp_path, key, value):
    folder = model(tmp_path, **{key: value})
    error_of(lambda: gpt2.GPT.from_pretrained(folder), folder / "config.json", key)


def test_config_of_another_model(tmp_path):
    call = lambda: gpt2.GPT.from_pretrained(tmp_path)
    for wrong in {"n_embd": 10**5}, {"vocab_size": 10**6, "n_embd": 10**5}, {"n_layer": 9}:
        error_of(call, model(tmp_path, **wrong) / "model.safetensors")
    for raw in (b"", b"[]", b"{", b"\xff", b"[" * 10**5):
        (tmp_path / "config.json").write_bytes(raw)
        error_of(call, tmp_path / "config.json")


def test_fuzz(tmp_path):
    rng, seen = np.random.default_rng(0), Counter()
    pick = lambda values: values[rng.integers(len(values))]
    values = [None, True, -1, 0, 1, 2**31, 2**62, 2**64, 0.5, "", "F32", "BF16", "I64", [], [2],
              [0, 2**62, 4], {}, [[]]]
    places = ["dtype", "shape", "data_offsets", "item"] * 4 + ["name", "entry"]
    path = model(tmp_path) / "model.safetensors"
    gpt2.GPT.from_pretrained(tmp_path)
    with open(path, "r+b", buffering=0) as file:
        for i in range(2400):
            raw, header = bytearray(SOUND), json.loads(SOUND[8:HEAD])
            if i % 4 == 0:
                raw = raw[: rng.integers(len(raw))]
            elif i % 4 == 1:  # a few bits, mostly at the start
                for at in rng.integers(pick([8, 60, 600, len(raw)]), size=rng.integers(1, 4)):
                    raw[at] ^= 1 << rng.integers(8)
            else:  # a well-formed header with something else in one place
                name, place, value = pick(list(header)), pick(places), pick(values)
                if place == "name":
                    header[str(value)] = header.pop(name)
                elif place == "entry":
                    header[name] = value
                elif place == "item":
                    header[name][pick(["shape", "data_offsets"])][0] = value
                else:
                    header[name][place] = value
                raw = packed(header, SOUND[HEAD:])
            file.seek(0)
            file.write(raw)
            file.truncate()
            try:
                list(gpt2.read_safetensors(path))
                gpt2.GPT.from_pretrained(tmp_path)  # slower: only where the reader did not object
                seen["fine"] += 1
            except gpt2.UserError as error:
                assert "\n" not in str(error)
                seen["refused"] += 1
            except Exception as error:
                seen[f"{type(error).__name__}: {error}"[:90]] += 1
    assert seen.keys() == {"fine", "refused"} and seen["refused"] > 2000, seen


@pytest.mark.parametrize("module, arguments, words", [
    (stdlib, ["--steps", "0"], "--steps is 0, must be at least 1"),
    (stdlib, ["--step", "5"], "unrecognized arguments: --step 5"),
    (openwebtext, ["--subsets", "22"], "invalid choice: 22"),
])  # fmt: skip
def test_bad_input_of_the_recipes(monkeypatch, capsys, module, arguments, words):
    monkeypatch.setattr(sys, "argv", ["recipe", *arguments])
    with pytest.raises(SystemExit) as end:
        module.main()
    assert end.value.code == 2
    only_line(capsys.readouterr().err, words)


def test_python_without_its_source(tmp_path):
    with pytest.raises(UserError, match="holds 0 source files"):
        stdlib.read_files("train", tmp_path)
