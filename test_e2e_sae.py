"""Tests. Numbers are held against something independent: transformers, safetensors, float64 by hand.

    python -m pytest -q test_e2e_sae.py
"""

import itertools
import json
import math
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import safetensors.numpy
import safetensors.torch
import torch
import torch.nn.functional as F
import transformers

import e2e_sae
import gpt2
from data import stdlib
from e2e_sae import SAE, Config, KLLoss, compute_loss, evaluate
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
    usual = dict(model=str(tiny), layer=1, context=32, n_features=40, n_sequences=128, n_eval=20, device="cpu")
    return Config(**usual | given)


def by_hand(state, tokens, sae, layer, n_head, replace=None):
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

    clean, y = by_hand(state, tokens, None, layer, n_head)
    spliced, y_hat = by_hand(state, tokens, None, layer, n_head, splice)
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
    stdlib.save_model(gpt, tmp_path)
    again = GPT.from_pretrained(tmp_path)
    batch = torch.arange(16).view(1, -1)
    assert (again(batch) - gpt(batch)).abs().max() < 0.05  # float16 weights


# ------------------------------------------------------------------------------------------------
# The SAE, the losses, the evaluation
# ------------------------------------------------------------------------------------------------


def doubled(tiny):
    """The tiny model in float64, twice: the project's, and the raw tensors with OpenAI's names."""
    gpt = GPT.from_pretrained(tiny).double()
    raw = {k: v.double() for k, v in safetensors.torch.load_file(tiny / "model.safetensors").items()}
    return gpt, raw


@pytest.mark.parametrize("layer", [0, 1, 2])
@pytest.mark.parametrize("loss", ["local", "e2e", "e2e_ds"])
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
    wanted = {"local": {"mse"}, "e2e": {"kl"}, "e2e_ds": {"kl", "downstream"}}[loss] | {"sparsity", "l0"}
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
        clean, y = by_hand(raw, tokens, None, layer, 2)
        spliced, y_hat = by_hand(raw, tokens, None, layer, 2, splice)
        _, y_mean = by_hand(raw, tokens, None, layer, 2, lambda x: x.mean((0, 1)).expand_as(x))
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


@pytest.mark.parametrize("loss", ["local", "e2e", "e2e_ds"])
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


@pytest.mark.parametrize("micro_batch", [1, 2, 4])
def test_micro_batches_give_the_same_step(tiny, text, tmp_path, micro_batch):
    saved = []
    for size in 16, micro_batch:
        out = tmp_path / str(size)
        e2e_sae.train(config_of(tiny, out=str(out), n_sequences=16, warmup=0, micro_batch=size))
        saved.append(torch.load(out / "checkpoint.pt", weights_only=True)["adam"]["state"])
    for whole, parts in zip(saved[0].values(), saved[1].values()):  # after one step exp_avg is a tenth of the gradient
        assert (whole["exp_avg"] - parts["exp_avg"]).norm() < 1e-6 * whole["exp_avg"].norm()


@pytest.mark.parametrize("loss", ["local", "e2e", "e2e_ds"])
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
    """torchrun with two gloo processes: the losses of one process, and when one dies the other ends."""
    flags = ["--model", str(tiny), "--layer", "1", "--context", "32", "--n-sequences", "320", "--n-features", "40",
             "--n-eval", "21", "--log-steps", "1", "--device", "cpu"]  # fmt: skip
    env = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(HERE)}
    two = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    done = subprocess.run([*two, HERE / "e2e_sae.py", *flags, "--out", "two"], cwd=tmp_path, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert e2e_sae.main([*flags, "--out", str(tmp_path / "one")]) == 0
    for a, b in zip(losses_of(tmp_path / "one"), losses_of(tmp_path / "two"), strict=True):
        assert a.keys() == b.keys() and all(abs(a[k] - b[k]) < 1e-5 * max(1, abs(a[k])) for k in a)
    one, other = (json.loads((tmp_path / run / "eval.json").read_text()) for run in ("one", "two"))
    assert abs(one["ce_increase"] - other["ce_increase"]) < 1e-4 and one["tokens"] == other["tokens"]
