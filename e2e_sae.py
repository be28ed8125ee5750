r"""End-to-end sparse dictionary learning on GPT-2's residual stream, in one file.

Braun, Taylor, Goldowsky-Dill, Sharkey: "Identifying Functionally Important Features with
End-to-End Sparse Dictionary Learning", NeurIPS 2024, arXiv 2405.12241.

At each token GPT-2 keeps a vector, the residual stream, which every block reads and adds to. Let x
be that vector where it enters one block. A sparse autoencoder (SAE) writes x as a sum of a few
elements of a large dictionary; an element's coefficient is called a feature:

    features = relu(W_e x + b_e)               one per dictionary element, most of them zero
    x_hat    = sum_i features_i d_i + b_d      the d_i are the dictionary elements, unit vectors

Usually an SAE is trained to reconstruct x. But the directions in which x varies most need not be
those that the model uses, so such an SAE spends features on what does not matter and misses some
of what does. The remedy: put x_hat in the place of x, run the rest of the model on it, and train
the SAE so that the model's *output* stays the same. The model is frozen; only the SAE learns.

    tokens -> embed -> blocks[:layer] -> x -------> blocks[layer:] -> unembed -> y       clean
                                         | \              |                      |
                                        SAE  mse      downstream                 kl
                                         | /              |                      |
                                         x_hat ---> blocks[layer:] -> unembed -> y_hat   spliced

    --loss local     mse + λ sparsity                      reconstruct x: the usual SAE
    --loss e2e       kl + λ sparsity                       preserve the output
    --loss e2e_ds    kl/2 + β downstream + λ sparsity      preserve the later layers, too
    --loss finish    (α kl + mse)/2 + λ sparsity           ends a local run (--init): α = mse/kl

`mse` is the mean squared error of x_hat; `kl` the divergence between the two next-token
distributions; `downstream` the mean squared error of the residual stream entering later layers;
`sparsity` the features' L1 norm, which keeps most of them at zero. On the small model in
data/stdlib/, at 54 to 59 active features per token, reading x_hat costs 0.49 nats of cross-entropy
per token with `local`, 0.22 with `e2e`, 0.21 with `e2e_ds`, and 79, 37 and 71 % of x's variance are
explained (means of two seeds). Use e2e_ds to keep activations near the model's own, e2e if only its
output counts; or 70 % local, then 30 % `--loss finish --init RUN`: at least 89 % of e2e's gain.

    python e2e_sae.py --model stdlib --layer 3 --loss e2e      a minute on two CPU cores
    python e2e_sae.py --layer 6 --loss e2e                     GPT-2 small, as in the paper
"""

import argparse
import html
import json
import math
import os
import re
import signal
import time
import warnings
from contextlib import nullcontext
from dataclasses import dataclass, field, fields
from itertools import combinations_with_replacement
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F

import gpt2
from data import held_out, load_tokens, run_command, windows
from gpt2 import (  # `ensure` raises a one-line UserError, `writing` swaps a file in atomically
    GPT, OPENAI, ensure, load_tokenizer, lock, progress, read_json, reading, write_json, writing)

# ---- Settings ------------------------------------------------------------------------------------

SPARSITY = {  # default λ by loss: for OpenAI's models (the paper's), for data/stdlib/
    "local": (6.0, 1.15), "e2e": (1.5, 1.8), "e2e_ds": (10.0, 5.0), "finish": (6.0, 1.15)}
EXECUTION = "device", "dtype", "compile", "micro_batch", "checkpoint_minutes"  # see Config


def setting(help, *defaults):
    """A field of Config: its help, the paper's default (a value or a function of the settings above
    it), and the default for other models than OpenAI's if that differs."""
    if defaults and not callable(defaults[0]):
        help += f" (default {'; stdlib '.join(map(str, defaults))})"
    return field(default=None, metadata={"help": help, "defaults": defaults or [None]})


@dataclass
class Config:
    """A run's settings: `n_sequences` is the flag --n-sequences and an entry of config.json. None
    becomes the default: the paper's for OpenAI's models, for any other model one that suits
    data/stdlib/ and two CPU cores. UserError if a value is out of range."""
    model: str = setting("gpt2, gpt2-medium, gpt2-large, gpt2-xl, stdlib, or a folder", "gpt2")
    layer: int = setting("the SAE reads the residual stream entering this block", 6, 3)
    loss: str = setting("local, e2e, e2e_ds or finish", "e2e")
    init: str = setting("start from this SAE: a run's folder, a .pt file or apollo:NAME")
    sparsity: float = setting(f"λ, weight of the features' L1 norm (by loss: {SPARSITY})",
                              lambda c: SPARSITY[c.loss][c.model not in OPENAI])
    downstream: float = setting("β (2.5; layer 10 0.05)", lambda c: 0.05 if c.layer == 10 else 2.5)
    n_features: int = setting("dictionary elements (60 d_model; stdlib 8 d_model)")
    n_sequences: int = setting("sequences to train on, in whole batches", 400_000, 3_200)
    context: int = setting("tokens per sequence", 1024, 128)
    batch_size: int = setting("sequences per optimizer step", 16, 4)
    lr: float = setting("Adam's learning rate, which falls to a tenth along a cosine", 5e-4, 5e-3)
    n_eval: int = setting("held-out sequences to evaluate on", 500)
    seed: int = setting("of the SAE's initialisation and the order of the text", 0)
    # Execution settings: they change the result by rounding only, so --resume may change them
    device: str = setting("cuda, mps or cpu (cuda if there is one)",
                          lambda c: "cuda" if torch.cuda.is_available() else "cpu")
    dtype: str = setting("float32 or bfloat16 for matrix products (bfloat16 on cuda)",
                         lambda c: "bfloat16" if c.device == "cuda" else "float32")
    compile: bool = setting("torch.compile the loss (on cuda)", lambda c: c.device == "cuda")
    micro_batch: int = setting("sequences in memory at once (batch_size)", lambda c: c.batch_size)
    checkpoint_minutes: float = setting("minutes between checkpoints", 10.0)
    out: str = setting("the run's folder (out/MODEL-layerN-LOSS)",
                       lambda c: f"out/{Path(c.model).name}-layer{c.layer}-{c.loss}")

    def __post_init__(self):
        ensure(self.loss in (None, *SPARSITY), f"--loss {self.loss}: one of {', '.join(SPARSITY)}")
        for f in fields(self):
            default = f.metadata["defaults"][-(self.model not in (None, *OPENAI))]
            if getattr(self, f.name) is None:
                setattr(self, f.name, default(self) if callable(default) else default)
            value, low = getattr(self, f.name), f.type is int and f.name not in ("layer", "seed")
            fits = f.type not in (int, float) or value is None or low <= value < 1e9
            ensure(fits, f"--{f.name.replace('_', '-')} {value}: must be from {low:d} to 1e9")
        ensure(self.dtype in ("float32", "bfloat16"), f"--dtype {self.dtype}: float32 or bfloat16")
        devices = "cpu", "mps", "cuda" * torch.cuda.is_available()
        ensure(self.device in devices, f"--device {self.device}: not found here; use --device cpu")


# ---- The sparse autoencoder ----------------------------------------------------------------------

APOLLO = "apollo-research/e2e-saes-gpt2/resolve/713515193ec799fd17bd7f6ccf6f209332b07f7d"


class SAE(nn.Module):
    """The paper's sparse autoencoder (section 2): one hidden layer, ReLU, unit dictionary elements.

    The dictionary is normalised in the forward pass. Otherwise features, and with them their L1
    norm, could shrink at no cost while the decoder grows.
    """
    def __init__(self, d_model, n_features):
        super().__init__()
        self.encoder = nn.Linear(d_model, n_features)
        self.decoder = nn.Linear(n_features, d_model)
        # (d_model, n_features) as PyTorch has it, but an element's numbers are adjacent in memory
        self.decoder.weight = nn.Parameter(torch.empty(n_features, d_model).T)
        nn.init.orthogonal_(self.decoder.weight.T)
        self.made_for = {}  # after `load`: its model, layer and context

    @property
    def dictionary(self):
        """The dictionary elements, unit rows (n_features, d_model)."""
        return self.decoder.weight.T * (1 / self.decoder.weight.norm(dim=0)[:, None])

    def encode(self, x):
        """x (..., d_model) -> features (..., n_features), most of them zero."""
        return F.relu(self.encoder(x))

    def decode(self, features, active=math.inf):
        """features (..., n_features) -> x_hat (..., d_model). If few of the features are nonzero
        (give their number, `active`), skipping the zeros is faster on a CPU."""
        if features.is_cpu and not torch.compiler.is_compiling() and active < features.numel() / 20:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # PyTorch announces that CSR tensors are in beta
                nonzero = features.flatten(0, -2).to_sparse_csr()  # (token, n_features)
            x_hat = torch.sparse.mm(nonzero, self.dictionary).unflatten(0, features.shape[:-1])
        else:
            x_hat = features @ self.dictionary
        return x_hat + self.decoder.bias

    def forward(self, x):
        """x (..., d_model) -> x_hat (..., d_model)."""
        return self.decode(self.encode(x))

    def save(self, folder, model, layer, context):
        """Write `cfg.json` and `sae_weights.safetensors`, which SAELens loads as they are."""
        cfg = f"""{{
          "architecture": "standard", "dtype": "float32", "device": "cpu",
          "d_in": {self.encoder.in_features}, "d_sae": {self.encoder.out_features},
          "apply_b_dec_to_input": false, "normalize_activations": "none",
          "reshape_activations": "none", "metadata": {{
            "sae_lens_version": "6.0.0", "model_name": {json.dumps(str(model))},
            "hook_name": "blocks.{layer}.hook_resid_pre", "context_size": {context},
            "prepend_bos": false, "neuronpedia_id": null}}
        }}"""
        tensors = {"W_enc": self.encoder.weight.T, "b_enc": self.encoder.bias,
                   "W_dec": self.dictionary, "b_dec": self.decoder.bias}
        gpt2.write_safetensors(f"{folder}/sae_weights.safetensors", tensors)
        write_json(f"{folder}/cfg.json", json.loads(cfg))

    @classmethod
    def load(cls, path_or_name):
        """Load a folder of `save` or SAELens, a .pt file of the paper's library, or one of the
        paper's SAEs by name, as in apollo:e2e_similar_ce_layer_6 (fetched once). `made_for` gets
        its model, layer and context. UserError if it is not the paper's kind of SAE."""
        path = Path(path_or_name)
        if path.name.startswith("apollo:"):
            path = Path(f"{gpt2.DATA}/apollo/{path.name.removeprefix('apollo:')}.pt")
            gpt2.download(f"{gpt2.HUB}/{APOLLO}/{path.name}", path)
        if path.is_dir():
            cfg = read_json(f"{path}/cfg.json")
            tensors = gpt2.read_safetensors(f"{path}/sae_weights.safetensors")
            with reading(path):
                plain = cfg["architecture"] == "standard" and not cfg["apply_b_dec_to_input"]
                ensure(plain, "it is not the paper's kind of SAE")
                norms = tensors["W_dec"].norm(dim=1)  # SAELens: not 1; fold them into the encoder
                W_enc, b_enc = (tensors["W_enc"] * norms).T.contiguous(), tensors["b_enc"] * norms
                weights = W_enc, b_enc, tensors["W_dec"].T, tensors["b_dec"]
                place, model, context = (cfg["metadata"][k] for k in (
                    "hook_name", "model_name", "context_size"))
        else:
            with reading(path):
                tensors = torch.load(path, map_location="cpu", weights_only=True)
                weights = [tensors[key] for key in sorted(tensors, reverse=True)]  # encoder first
                place, model, context = min(tensors).replace("-", "."), "gpt2", 1024
        with reading(path), torch.device("meta"):  # "meta": no memory, no initialisation
            sae = cls(*weights[2].shape)
            state = {key: weight.clone() for key, weight in zip(sae.state_dict(), weights)}
            sae.load_state_dict(state, assign=True)
            layer = int(re.match(r"blocks\.(\d+)\.hook_resid_pre", place)[1])
        sae.made_for = {"model": model, "layer": layer, "context": context}
        return sae


# ---- The KL divergence ---------------------------------------------------------------------------

class KLLoss(torch.autograd.Function):
    """Mean over positions of KL(clean || spliced) in nats, without all logits in memory. It equals

        log_p, log_q = (h_clean @ W.T).log_softmax(-1), (h_spliced @ W.T).log_softmax(-1)
        kl = (log_p.exp() * (log_p - log_q)).sum(-1).mean()

    Why this way round: KL(p || q) = sum_v p_v (log p_v - log q_v) is large where q is small on a
    token that the clean model, p, finds likely. All that GPT-2 finds likely must stay likely.

    For one position the gradient at the spliced logits y_hat is q - p, since log q_v = y_hat_v
    - log sum_w exp y_hat_w and sum_v p_v = 1; so the gradient at h_spliced is W.T (q - p), known as
    soon as p and q are (W itself is frozen). `forward` takes a chunk of positions at a time, keeps
    this gradient (pos, d_model), and forgets the chunk's logits (vocab, pos).
    """
    @staticmethod
    def forward(ctx, h_spliced, h_clean, unembedding):
        """h_spliced, h_clean (pos, d_model), after ln_f; unembedding W (vocab, d_model) -> kl."""
        n, kl, gradient = len(h_spliced), 0.0, torch.empty_like(h_spliced)
        chunk = max(64, 2**24 // len(unembedding) // 64 * 64, n // 16)  # from 64 MB of logits
        for s, c, g in zip(h_spliced.split(chunk), h_clean.split(chunk), gradient.split(chunk)):
            y = (unembedding @ c.T).to(c.dtype)  # (vocab, chunk): rows of 50,257, odd, are slow
            y_hat = y + unembedding @ (s - c).T  # so that bfloat16 rounds both logits alike
            log_p, log_q = y.log_softmax(0), y_hat.log_softmax(0)
            p = log_p.exp()
            kl += (p * (log_p - log_q)).sum()
            g.copy_((log_q.exp() - p).T @ unembedding)
        ctx.save_for_backward(gradient / n)
        return kl / n

    @staticmethod
    def backward(ctx, grad_kl):
        """The gradient of h_spliced."""
        return ctx.saved_tensors[0] * grad_kl, None, None


# ---- The spliced forward pass and the four losses ------------------------------------------------

def run_blocks(gpt, x, first, last=None):
    """Run x (batch, pos, d_model) through the blocks first to last - 1. Returns the residual
    streams entering each of them, the first being x, and the one that leaves the last."""
    residuals = [x]
    for block in gpt.h[first:last]:
        residuals.append(block(residuals[-1]))
    return residuals


@torch.no_grad()
def entering(gpt, tokens, layer):
    """The clean residual stream entering a layer: tokens (batch, pos) -> (batch, pos, d_model). The
    mean over d_model is zero: every reader's LayerNorm would subtract it anyway (see gpt2.py)."""
    return run_blocks(gpt, gpt.embed(tokens), 0, layer)[-1]


def compute_loss(gpt, sae, tokens, config):
    """One of the four losses on tokens (batch, pos): (loss, unweighted terms).

    GPT-2's parameters are frozen (gpt2.GPT sets requires_grad to False) and the clean run is a
    constant target, so gradients reach the SAE's parameters only: through the frozen later blocks.
    Cost, in operations of matrix products per token for GPT-2 small, layer 6, 46,080 features: the
    first six blocks take 85 million, the SAE 354 (5 products, 2 d_model n_features each: encode,
    decode, then the gradients of features and of both weights). That is `local`, 440 million. The
    others run later blocks and unembedding (162) thrice, clean, spliced and backward: 925 million.
    """
    x = entering(gpt, tokens, config.layer)  # (batch, pos, d_model)
    features = sae.encode(x)  # (batch, pos, n_features)
    n_active = features.count_nonzero()
    x_hat = sae.decode(features, n_active).to(x.dtype)  # (batch, pos, d_model)
    # L1 is divided by d_model below, as mse is a mean over it; bfloat16 is too coarse to sum in
    l1 = features.sum(-1, dtype=x.dtype)
    terms = {"l0": n_active / l1.numel(), "sparsity": l1.mean() / x.shape[-1]}
    penalty = config.sparsity * terms["sparsity"]
    del features  # the largest tensor: free it, unless the backward pass needs it
    if config.loss in ("local", "finish"):
        mse = terms["mse"] = F.mse_loss(x_hat, x)
    if config.loss == "local":  # the blocks after `layer` do not run at all
        return mse + penalty, terms
    with torch.no_grad():
        clean = run_blocks(gpt, x, config.layer)  # entering layer, layer + 1, ..., leaving the last
    spliced = run_blocks(gpt, x_hat, config.layer)
    h_spliced, h_clean = (gpt.ln_f(run[-1]).flatten(0, 1) for run in (spliced, clean))
    kl = terms["kl"] = KLLoss.apply(h_spliced, h_clean, gpt.wte.weight)
    if config.loss == "e2e":
        return kl + penalty, terms
    if config.loss == "finish":  # Karvonen 2025, arXiv 2503.17272: for the end of a local run
        alpha = (mse / kl).detach()  # brings kl to the size of mse
        return 0.5 * (alpha * kl + mse) + penalty, terms
    # e2e_ds. Of two SAEs with the same kl, prefer the one that computes its output as the clean run
    # does. Compared are the streams after x and before the output: an error in x itself is what
    # end-to-end training allows, and the last stream acts through the logits only, which kl covers
    between = zip(spliced[1:-1], clean[1:-1])  # entering layer + 1 ... n_layer - 1
    downstream = terms["downstream"] = torch.stack([F.mse_loss(s, c) for s, c in between]).mean()
    # kl/2 is the paper's: Adam ignores the scale, so this is kl + 2 β downstream + 2 λ sparsity
    return 0.5 * kl + config.downstream * downstream + penalty, terms


# ---- Evaluation ----------------------------------------------------------------------------------

@torch.no_grad()
def evaluate(gpt, sae, tokens, layer):
    """What the model loses if it reads x_hat instead of x, on tokens (sequence, pos): a JSON dict.

    In nats per token: `ce`, the clean model's next-token cross-entropy, `ce_spliced`, their
    difference `ce_increase`, `ce_ablated` (x replaced by its mean), `kl`. As shares: `ce_recovered`
    of what ablation costs, `top1_agreement`, `explained_variance` of x. `l0`: active features per
    token; `alive`: elements, of `n_features`, that fire on `tokens` at all; `l2_ratio`: mean
    |x_hat| / |x|, apart from position 0 (`l2_ratio_first`), where GPT-2's x is many times longer;
    `mse`. `_by_layer`: at the SAE's layer and at each later one."""
    def run(x):  # the streams entering `layer` and each later block, and the log-probabilities
        *streams, last = run_blocks(gpt, x, layer)
        return torch.stack(streams).flatten(1, 2), gpt.unembed(last).log_softmax(-1)

    def loss(log_p):  # next-token cross-entropy of the loop's batch
        return F.nll_loss(log_p[:, :-1].mT, batch[:, 1:])
    tokens = torch.as_tensor(tokens, device=sae.decoder.bias.device).long()
    batches = tokens.split(4)  # the logits of more would be large
    n, mean, fired, r = tokens.numel(), 0, 0, {}
    for batch in batches:  # first the means, to center the variance on
        clean, _ = run(entering(gpt, batch, layer))  # (layers, token, d_model)
        mean += clean.sum(1, keepdim=True) / n

    for batch in progress(batches, "evaluating", len(tokens), "sequences"):
        x = entering(gpt, batch, layer)
        features = sae.encode(x)  # (batch, pos, n_features)
        x_hat = sae.decode(features)
        clean, log_p = run(x)
        spliced, log_q = run(x_hat)
        ratio = x_hat.norm(dim=-1) / x.norm(dim=-1)  # (batch, pos)
        fired += (features > 0).sum((0, 1))
        for name, value in {
            "ce": loss(log_p),
            "ce_spliced": loss(log_q),
            "ce_ablated": loss(run(mean[0].expand_as(x))[1]),
            "kl": (log_p.exp() * (log_p - log_q)).sum(-1).mean(),
            "top1_agreement": (log_p.argmax(-1) == log_q.argmax(-1)).float().mean(),
            "l2_ratio": ratio[:, 1:].mean(),
            "l2_ratio_first": ratio[:, 0].mean(),
            "mse_by_layer": (spliced - clean).pow(2).mean((1, 2)),
            "variance": (clean - mean).pow(2).mean((1, 2))
        }.items():
            r[name] = r.get(name, 0) + np.array(value.tolist()) * batch.numel() / n
    increase, explained = r["ce_spliced"] - r["ce"], 1 - r["mse_by_layer"] / r.pop("variance")
    r |= {
        "ce_increase": increase, "ce_recovered": 1 - increase / (r["ce_ablated"] - r["ce"]),
        "mse": r["mse_by_layer"][0],
        "explained_variance": explained[0], "explained_variance_by_layer": explained,
        "l0": fired.sum().item() / n, "alive": fired.count_nonzero().item(),
        "n_features": len(fired), "tokens": n
    }
    return {name: np.array(value).tolist() for name, value in r.items()}


# ---- Training ------------------------------------------------------------------------------------

def learning_rate(config, done):
    """The learning rate after `done` sequences: linear warm-up, then a cosine down to a tenth."""
    warmup = config.n_sequences / 20
    cosine = math.cos(math.pi * (done - warmup) / (config.n_sequences - warmup))
    return config.lr * min(done / warmup, 0.55 + 0.45 * cosine)


def set_up(config):
    """GPT-2 and the SAE that a run starts from, if its settings fit them. UserError if not."""
    gpt = GPT.from_pretrained(config.model)
    longest, d_model = gpt.wpe.weight.shape
    n_layer = len(gpt.h) - (config.loss == "e2e_ds")  # e2e_ds needs a layer after its own
    ensure(config.layer < n_layer, f"--layer {config.layer}: must be below {n_layer} for --loss "
           f"{config.loss} on {config.model}")
    ensure(1 < config.context <= longest, f"--context {config.context}: must be 2 to {longest}")
    torch.manual_seed(config.seed)
    n_features = config.n_features or d_model * (60 if config.model in OPENAI else 8)
    sae = SAE.load(config.init) if config.init else SAE(d_model, n_features)
    place = sae.made_for.get("layer", config.layer), *sae.encoder.weight.shape
    config.n_features = config.n_features or place[1]
    ensure(place == (config.layer, config.n_features, d_model), f"--init {config.init}: its layer, "
           f"n_features and d_model are {place}, those of the run differ")
    return gpt.to(config.device), sae.to(config.device)


def train(config, resume=False):
    """Train an SAE with one of the four losses, by the paper's recipe; return the SAE. The folder
    `config.out` gets config.json, log.jsonl, checkpoint.pt, the SAE and eval.json; with `resume`
    the run there continues. UserError if a setting does not fit the model (then nothing is written)
    or the loss is not finite; SystemExit after a checkpoint on SIGTERM or Ctrl-C."""
    # Under torchrun each process takes its share of every batch; rank 0 also writes and evaluates
    rank, world = int(os.getenv("RANK", 0)), int(os.getenv("WORLD_SIZE", 1))
    batch_size, device, out = config.batch_size, config.device, config.out
    if device == "cuda":
        torch.cuda.set_device(rank % torch.cuda.device_count())
    if world > 1:
        dist.init_process_group()
    gpt, sae = set_up(config)
    optimizer = torch.optim.Adam(sae.parameters(), lr=config.lr, fused=True)
    torch.set_float32_matmul_precision("high")  # TF32 where the GPU has it
    loss_of = torch.compile(compute_loss, fullgraph=True, disable=not config.compile)
    autocast = torch.autocast(device, torch.bfloat16, enabled=config.dtype == "bfloat16")
    text = windows(load_tokens(config.model, "train"), config.context)
    order = np.random.default_rng(config.seed).permutation(len(text))
    n_steps = math.ceil(config.n_sequences / batch_size)
    path, step, log_size = f"{out}/checkpoint.pt", 0, 0
    if resume and os.path.exists(path):
        with reading(path):
            state = torch.load(path, map_location=device)
            sae.load_state_dict(state["sae"])
            optimizer.load_state_dict(state["optimizer"])
            step, log_size = state["done"]
    if rank == 0 and not resume:
        ensure(not os.path.exists(out), f"{out} exists: --resume {out}, or choose another --out")
        write_json(f"{out}/config.json", vars(config))
    signals = []  # the first SIGTERM or Ctrl-C is noted, to save after the step; a second kills
    def note(number, frame):
        signals.append(number)
        signal.signal(number, signal.default_int_handler)
    for number in signal.SIGTERM, signal.SIGINT:
        signal.signal(number, note)
    with (nullcontext() if rank else lock(out, wait=False),
          open(os.devnull if rank else f"{out}/log.jsonl", "a", 1) as log):  # 1: line by line
        if rank == 0:
            log.seek(log.truncate(log_size))  # drop the lines of steps that will be repeated
            print(f"{config.loss}, layer {config.layer} of {config.model}, {config.n_features:,} "
                  f"features, {device} x {world}: from step {step:,} of {n_steps:,} -> {out}")
        logged, since, saved = step, time.time(), time.time()
        while step < n_steps:
            # The batch depends on settings and step only: resumed and multi-GPU runs see the same
            numbers = np.arange(step * batch_size, (step + 1) * batch_size)[rank::world]
            rows = text[order[numbers % len(order)]]
            tokens = torch.from_numpy(rows).long().to(device)  # (batch_size / world, context)

            # Forward and backward, one micro-batch at a time
            sums = 0  # of the loss and its terms, weighted to be means over the batch
            for part in tokens.split(config.micro_batch):
                with autocast:
                    loss, terms = loss_of(gpt, sae, part, config)
                weight = len(part) / batch_size
                (loss * weight).backward()
                sums += torch.stack([loss, *terms.values()]).detach() * weight
            for tensor in (sums, *(p.grad for p in sae.parameters())) if world > 1 else ():
                dist.all_reduce(tensor)

            # Clip the gradient, set the learning rate, update the SAE
            grad_norm = nn.utils.clip_grad_norm_(sae.parameters(), max_norm=10)
            step += 1
            lr = optimizer.param_groups[0]["lr"] = learning_rate(config, step * batch_size)
            optimizer.step()
            optimizer.zero_grad()

            # Every tenth step: log and print; save if due
            if step % 10 and step not in (1, n_steps) and not signals:
                continue
            values = dict(zip(["loss", *terms], sums.tolist()), grad_norm=grad_norm.item())
            ensure(math.isfinite(sum(values.values())), f"step {step}: the loss is not finite; "
                   f"start again with an --lr below {config.lr} (the last checkpoint is untouched)")
            if rank:
                continue
            seconds = (time.time() - since) / (step - logged)  # per step
            logged, since, speed = step, time.time(), batch_size * config.context / seconds
            line = {"step": step, **values, "lr": lr, "tokens_per_second": speed}
            log.write(json.dumps(line) + "\n")
            shown = "  ".join(f"{name} {value:.4g}" for name, value in values.items())
            shown = shown.replace("sparsity", "L1").replace("downstream", "later mse")
            print(f"{step / n_steps:4.0%}  {shown}  {speed:,.0f} tokens/s  "
                  f"{seconds * (n_steps - step):,.0f} s left")
            if signals or step == n_steps or since - saved >= 60 * config.checkpoint_minutes:
                saved = since
                with writing(path) as file:
                    torch.save({"done": (step, log.tell()), "sae": sae.state_dict(),
                                "optimizer": optimizer.state_dict()}, file)
            if signals:
                print(f"stopped after step {step:,}; continue with --resume {out}")
                raise SystemExit(128 + signals[0])
        if rank:
            raise SystemExit  # rank 0 evaluates
        sae.save(out, config.model, config.layer, config.context)
        result = evaluate(gpt, SAE.load(out).to(device), held_out(config), config.layer)
        write_json(f"{out}/eval.json", result)
    return sae


# ---- The method ends here. What follows looks at the result --------------------------------------

def print_table(results):
    """Print the main results of `evaluate`, {name: result}, a row per SAE."""
    print(f"{'SAE':<36}{'L0':>8}{'CE increase':>13}{'KL':>8}{'alive':>16}{'explained var.':>16}")
    for name, r in results.items():
        alive = f"{r['alive']:,} of {r['n_features']:,}"
        print(f"{name[-35:]:<36}{r['l0']:8.1f}{r['ce_increase']:13.4f}{r['kl']:8.4f}{alive:>16}"
              f"{r['explained_variance']:16.3f}")
    print("L0: active features per token; alive: elements that fire on the held-out text at all;\n"
          "CE increase, KL: what the model loses by reading x_hat instead of x, in nats per token")


def plot(folders, path):
    """Draw the Pareto curves of runs: CE increase against L0, and against alive elements."""
    import matplotlib.pyplot as plt

    runs = [read_json(f"{run}/config.json") | read_json(f"{run}/eval.json") for run in folders]
    plt.figure(figsize=(10, 4))
    for i, key in enumerate(("l0", "alive")):
        plt.subplot(1, 2, i + 1, xlabel=key, ylabel="CE increase (nats per token)")
        for loss in sorted({run["loss"] for run in runs}):
            points = sorted((run[key], run["ce_increase"]) for run in runs if run["loss"] == loss)
            plt.plot(*zip(*points), "o-", label=loss)
        plt.legend()
    with writing(path) as file:
        plt.savefig(file, bbox_inches="tight")
    print(f"{len(runs)} runs drawn in {path}")


@torch.enable_grad()
def effects(gpt, sae, tokens, layer):
    """How much KL(clean || spliced) grows, to first order, where a feature is removed.

    Removing feature i at a token changes KL by about -f_i dKL/df_i (attribution patching): one pass
    forward and back gives that for all. Returns its sum over tokens (sequence, pos), in nats, and
    the number of tokens at which the feature fires, (n_features,) each."""
    effect = fired = 0
    for batch in tokens.split(4):
        x = entering(gpt, batch, layer)
        features = sae.encode(x).detach().requires_grad_()
        h_clean, h_spliced = (gpt.ln_f(run_blocks(gpt, a, layer)[-1]).flatten(0, 1)
                              for a in (x, sae.decode(features)))
        kl = KLLoss.apply(h_spliced, h_clean, gpt.wte.weight) * len(h_clean)  # a sum over tokens
        effect -= (features.detach() * torch.autograd.grad(kl, features)[0]).sum((0, 1))
        fired += (features > 0).sum((0, 1))
    return effect, fired


@torch.no_grad()
def remove(gpt, sae, tokens, layer, feature, pos):
    """The spliced model's next-token probabilities with a feature and without it at position pos[k]
    of sequence k: tokens (k, context), pos (k,) -> (2, k, vocab)."""
    features, k = sae.encode(entering(gpt, tokens, layer)), range(len(tokens))
    removed = features.clone()
    removed[k, pos, feature] = 0
    last = [run_blocks(gpt, sae.decode(f), layer)[-1][k, pos] for f in (features, removed)]
    return gpt.unembed(torch.stack(last)).softmax(-1)


@torch.no_grad()
def compare(opened):
    """Print how alike dictionaries are, pair by pair: {name: what open_sae returns}."""
    alive = {}
    for name, (gpt, sae, tokens, layer) in opened.items():
        index = effects(gpt, sae, tokens, layer)[1].nonzero()[:, 0]
        alive[name] = sae.dictionary[index], index
    torch.manual_seed(2**31)  # for the random directions: no run has this seed
    print(f"{'elements of':<30}{'nearest among those of':<30}{'cosine':>8}{'chance':>8}{'same':>8}")
    for (name, (a, i)), (other, (b, j)) in combinations_with_replacement(alive.items(), 2):
        nearest = (a @ b.T).topk(2)  # b's two nearest to each row of a; one may be itself
        cosines, rows = (part[:, int(name == other)] for part in nearest)
        chance = (a @ F.normalize(torch.randn_like(b)).T).amax(1)
        print(f"{name[-29:]:<30}{other[-29:]:<30}{cosines.mean():8.3f}{chance.mean():8.3f}"
              f"{(j[rows] == i).float().mean():8.1%}")
    print("""cosine: the highest cosine similarity of an alive element, averaged. chance: the same
with as many random directions. same: nearest elements with the same index. Where that is high, the
dictionaries are alike because they began alike: compare runs of different --seed.""")


STYLE = """body { font: 15px/1.4 system-ui; max-width: 62em; margin: 1em auto; padding: 0 1em }
h2 { font-size: 1.1em; margin: 0; border-top: 1px solid #bbb; padding-top: .5em }
pre { font: 13px/1.35 monospace; white-space: pre-wrap; background: #f6f6f6; margin: .4em 0 0 }
i { background: rgba(255, 140, 0, var(--t)); font-style: normal } b { outline: 1px solid }
code { background: #e4ecf7; white-space: pre-wrap } code br { display: none }"""


@torch.no_grad()
def features_page(gpt, sae, tokens, layer, title, ids=None):
    """A page of HTML on the features `ids`, or else on the 100 with the largest effect on `tokens`
    (sequence, pos)."""
    decode = load_tokenizer(sae.made_for["model"]).decode_bytes
    def text(token):  # as in a Python string literal, so control characters are visible
        chars = repr(decode([token]).decode(errors="backslashreplace"))
        return html.escape(chars[1:-1]).replace("\\n", "\\n<br>")
    effect, fired = effects(gpt, sae, tokens, layer)
    ids = ids or effect.argsort(descending=True)[:100].tolist()
    ensure({*ids} <= {*range(len(effect))}, f"--features: IDs are 0 to {len(effect) - 1}")
    strengths = torch.cat([sae.encode(entering(gpt, b, layer))[..., ids] for b in tokens.split(4)])
    dictionary, shown = sae.dictionary, []
    for i, f in zip(ids, strengths.unbind(-1)):  # f (sequence, pos)
        near = (dictionary @ dictionary[i]).topk(4).indices[1:].tolist()
        links = ", ".join(f'<a href="#{j}">{j}</a>' if j in ids else f"{j}" for j in near)
        shown.append(f"""<h2 id="{i}">Feature {i}</h2>{effect[i] / effect.sum():.2%} of the effect,
            fires at {fired[i] / tokens.numel():.2%} of the tokens, nearest elements: {links}""")
        peak, pos = f.max(1)  # of each sequence
        order = peak.argsort(descending=True)[: peak.count_nonzero()]
        rows = torch.cat([order[:4], order[4 :: len(order) // 3 + 1]])  # strongest; weaker ones
        for row, p, q in zip(rows, *remove(gpt, sae, tokens[rows], layer, i, pos[rows])):
            words = [f'<i style="--t:{tint:.2f}">{text(token)}</i>' if tint else text(token)
                     for token, tint in zip(tokens[row].tolist(), (f[row] / peak.max()).tolist())]
            at = pos[row].item()
            words[at] = f"<b>{words[at]}</b>"
            chips = ", ".join(f"<code>{text(c)}</code> {q[c]:.2f} → {p[c]:.2f}"
                              for c in (p - q).abs().topk(4).indices.tolist())
            shown.append(f"""<pre>{"".join(words[max(0, at - 24) : at + 9])}</pre>
                activation {peak[row]:.2f}; next token, without → with: {chips}""")
    return f"""<!doctype html><html lang="en"><meta charset="utf-8"><link rel="icon" href="data:,">
        <title>{html.escape(title)}</title><style>{STYLE}</style><h1>{html.escape(title)}</h1>
        <p>{len(ids)} of {len(effect):,} features. Effect: KL added by removal, to first order.
        Five strongest contexts, then weaker; boxed: the removal.</p>{"".join(shown)}</html>"""


# ---- The command line ----------------------------------------------------------------------------

def open_sae(name, given):
    """A trained SAE with its GPT-2, held-out tokens (sequence, pos) and layer, on one device."""
    config = Config(**SAE.load(name).made_for | given | {"init": name})
    tokens = torch.from_numpy(held_out(config)).to(config.device)
    return *set_up(config), tokens, config.layer


def main(arguments=None):
    """The command line. UserError for what the user can correct."""
    parser = argparse.ArgumentParser(allow_abbrev=False, argument_default=argparse.SUPPRESS)
    parser.error = lambda message: ensure(False, f"{message}; see --help")
    for f in fields(Config):
        kind = {"action": argparse.BooleanOptionalAction} if f.type is bool else {"type": f.type}
        parser.add_argument(f"--{f.name.replace('_', '-')}", help=f.metadata["help"], **kind)
    action = parser.add_mutually_exclusive_group()
    action.add_argument("--resume", metavar="RUN", help="continue a run that was stopped")
    action.add_argument("--evaluate", metavar="SAE", nargs="+", help="print what SAEs cost a model")
    action.add_argument("--plot", metavar="RUN", nargs="+", help="draw the Pareto curves of runs")
    action.add_argument("--compare", metavar="SAE", nargs="+", help="show how alike SAEs are")
    action.add_argument("--features", metavar=("SAE", "ID"), nargs="+",
                        help="make a page of the features that matter most, or of those given")
    given = vars(parser.parse_args(arguments))

    if names := given.pop("plot", None):
        return plot(names, f"{Path(names[0]).parent}/pareto.png")
    if names := given.pop("compare", None):
        return compare({name: open_sae(name, given) for name in names})
    if names := given.pop("features", None):
        name, *ids = names
        ids = [int(i) if i.isdigit() else -1 for i in ids]
        page = features_page(*open_sae(name, given), name, ids)
        with writing(path := f"{name}/features.html") as file:
            file.write(page.encode())
        return print(f"{path}: open it in a browser")
    if names := given.pop("evaluate", None):
        results = {}
        for name in names:
            if os.path.exists(f"{name}/log.jsonl") and not os.path.exists(f"{name}/cfg.json"):
                print(f"{name} is not finished; continue it with --resume {name}")
            elif not name.endswith(".png"):  # what --plot leaves in the same folder
                results[name] = evaluate(*open_sae(name, given))
        return print_table(results)
    if out := given.pop("resume", None):
        saved = read_json(f"{out}/config.json") | {"out": out}
        for name, value in given.items():
            same = name in EXECUTION or value == saved[name]
            ensure(same, f"--{name} {value}: the run in {out} has {saved[name]}; drop the flag")
        given = saved | given
    config = Config(**given)
    train(config, resume=bool(out))
    print_table({config.out: read_json(f"{config.out}/eval.json")})
    print(f"next: python e2e_sae.py --features {config.out}\n"
          f"      python e2e_sae.py --evaluate {Path(config.out).parent}/*")


if __name__ == "__main__":
    run_command(main)
