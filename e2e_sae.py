r"""End-to-end sparse dictionary learning on GPT-2's residual stream, in one file.

Braun, Taylor, Goldowsky-Dill, Sharkey: "Identifying Functionally Important Features with
End-to-End Sparse Dictionary Learning", NeurIPS 2024, arXiv 2405.12241.

For each token GPT-2 keeps a vector, the residual stream, which every block reads and adds to. Let x
be that vector where it enters one block. A sparse autoencoder (SAE) writes x as a sum of a few
elements of a large dictionary; the coefficient of an element is called a feature:

    features = relu(x @ W_enc + b_enc)         one per dictionary element, most of them zero
    x_hat    = features @ dictionary + b_dec   the rows of the dictionary are unit vectors

Usually an SAE is trained to reconstruct x. But the directions in which x varies most need not be
those that the model uses, so such an SAE spends features on what does not matter and misses some
of what does. The remedy: put x_hat in the place of x, run the rest of the model on it, and train
the SAE so that the model's *output* stays the same. The model is frozen; only the SAE learns.

    tokens -> embed -> blocks[:layer] -> x -------> blocks[layer:] -> unembed -> y       clean
                                         | \              |                      |
                                        SAE  mse    downstream_mse               kl
                                         | /              |                      |
                                         x_hat ---> blocks[layer:] -> unembed -> y_hat   spliced

    --loss local     mse + λ l1                         reconstruct x: the usual SAE
    --loss e2e       kl + λ l1                          preserve the output
    --loss e2e_ds    kl/2 + β downstream_mse + λ l1     preserve the later layers, too
    --loss finish    (α kl + mse)/2 + λ l1              fine-tune a local SAE on the output, too

`kl` is KL(clean || spliced), the divergence between the two next-token distributions, in nats per
token. `mse` is the mean squared error of x_hat over tokens and d_model, `downstream_mse` the same
for what blocks[layer + 1:] read (not for what the last one writes), averaged over them. `l1` is the
sum of a token's features divided by d_model, averaged over tokens; it keeps most features at zero.
λ (--sparsity) and β (--downstream) are weights that stay fixed during a run: the larger λ, the
fewer features are active and the worse the output. `finish` (Karvonen 2025, arXiv 2503.17272)
starts from a trained SAE (--init) and sets α = mse/kl anew for each micro-batch, as a constant
without gradient, so that both terms have the same value. The factors 1/2 are as published; only the
ratio of the weights matters: Adam divides by the gradient's scale, except where it is clipped.

On the small model in data/stdlib/ (means of two seeds; L0: active features per token; CE increase:
how much next-token cross-entropy grows, in nats per token, when the model reads x_hat, not x):

    --loss     L0    CE increase    variance of x explained
    local      60           0.50                      79 %
    e2e        54           0.21                      44 %
    e2e_ds     56           0.21                      71 %

Use e2e if only the model's output counts, e2e_ds to keep later activations near the clean ones,
too. If most of the training has to be cheap, use local, then finish.

    python e2e_sae.py --model stdlib --layer 3 --loss e2e      a minute on two CPU cores
    python e2e_sae.py --layer 6 --loss e2e                     GPT-2 small, as in the paper
"""

import argparse
import functools
import html
import json
import math
import os
import re
import signal
import sys
import time
import zlib
from contextlib import contextmanager
from dataclasses import dataclass, field, fields
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F

import data
import gpt2
from gpt2 import GPT, UserError, ensure, progress, read_json, reading, write_json, writing


# ---- The sparse autoencoder ----------------------------------------------------------------------

class SAE(nn.Module):
    """The paper's sparse autoencoder (section 2). The rows of W_dec are normalised in the forward
    pass: otherwise the features, and with them l1, could shrink at no cost while W_dec grows."""
    def __init__(self, d_model, n_features):
        super().__init__()
        self.W_enc = nn.Parameter(torch.empty(d_model, n_features))
        self.b_enc = nn.Parameter(torch.empty(n_features))
        self.W_dec = nn.Parameter(torch.empty(n_features, d_model))
        self.b_dec = nn.Parameter(torch.empty(d_model))
        self.made_for = {}  # after `load_sae`: its model, layer and context
        # As in nn.Linear, uniform within 1 / sqrt(inputs); W_dec has orthonormal columns at first
        nn.init.uniform_(self.W_enc, -(d_model**-0.5), d_model**-0.5)
        nn.init.uniform_(self.b_enc, -(d_model**-0.5), d_model**-0.5)
        nn.init.orthogonal_(self.W_dec)
        nn.init.uniform_(self.b_dec, -(n_features**-0.5), n_features**-0.5)

    @property
    def dictionary(self):
        """The dictionary elements, unit rows (n_features, d_model)."""
        norm = self.W_dec.norm(dim=1, keepdim=True).clamp(min=1e-12)
        return self.W_dec * (1 / norm)  # F.normalize keeps two more copies for backward

    def encode(self, x):
        """x (..., d_model) -> features (..., n_features), most of them zero."""
        # Not x @ W_enc + b_enc: under bfloat16 autocast that sum is float32, a second large copy
        return F.relu(F.linear(x, self.W_enc.T, self.b_enc))

    def decode(self, features):
        """features (..., n_features) -> x_hat (..., d_model)."""
        return features @ self.dictionary + self.b_dec

    def forward(self, x):
        """x (..., d_model) -> x_hat (..., d_model)."""
        return self.decode(self.encode(x))


# ---- The KL divergence ---------------------------------------------------------------------------

class KLLoss(torch.autograd.Function):
    """Mean over positions of KL(clean || spliced) in nats, without all logits in memory. It equals

        log_p = (h_clean @ W.T).log_softmax(-1)
        log_q = (h_spliced @ W.T).log_softmax(-1)
        kl = (log_p.exp() * (log_p - log_q)).sum(-1).mean()

    It is large where the spliced model makes a token unlikely that the clean model makes likely.

    At one position, the gradient of the KL with respect to the spliced logits is q - p, and so with
    respect to h_spliced (q - p) @ W: it can be computed as soon as p and q are known. `forward`
    takes a chunk of positions at a time, keeps this gradient (pos, d_model), and forgets the
    chunk's logits. W is frozen and gets none.
    """
    @staticmethod
    def forward(ctx, h_spliced, h_clean, unembedding):
        """h_spliced, h_clean (pos, d_model), after ln_f; unembedding W (vocab, d_model) -> kl."""
        n_pos = len(h_clean)
        # A chunk is 64 MB of float32 logits, in multiples of 64 positions, or a sixteenth of the
        # positions if that is more: torch.compile unrolls the loop, so it should be short.
        chunk = max(64, 2**24 // len(unembedding) // 64 * 64)
        chunk = max(chunk, n_pos // 16)
        kl = 0.0
        gradient = torch.empty_like(h_spliced)
        for start in range(0, n_pos, chunk):
            part = slice(start, start + chunk)
            c = h_clean[part]
            s = h_spliced[part]
            # Logits are (vocab, pos) here: rows of an odd length, as 50,257 is, are slower. y_hat
            # is W c + W (s - c), not W s: y's rounding error is in both and cancels between them.
            y = (unembedding @ c.T).to(c.dtype)  # back to float32 if autocast made it bfloat16
            y_hat = y + unembedding @ (s - c).T
            log_p = y.log_softmax(0)
            log_q = y_hat.log_softmax(0)
            p = log_p.exp()
            kl += (p * (log_p - log_q)).sum()
            gradient[part] = (log_q.exp() - p).T @ unembedding
        ctx.save_for_backward(gradient / n_pos)
        return kl / n_pos

    @staticmethod
    def backward(ctx, grad_kl):
        """The gradient of h_spliced."""
        return ctx.saved_tensors[0] * grad_kl, None, None


# ---- The spliced forward pass and the four losses ------------------------------------------------

def run_blocks(gpt, x, first, last=None):
    """Run x (batch, pos, d_model) through the blocks gpt.h[first:last]. Returns the list
    [x, after block first, after block first + 1, ..., after block last - 1]."""
    residuals = [x]
    for block in gpt.h[first:last]:
        residuals.append(block(residuals[-1]))
    return residuals


@torch.no_grad()
def entering(gpt, tokens, layer):
    """The clean residual stream entering a block: tokens (batch, pos) -> (batch, pos, d_model).
    gpt2.py keeps its mean over d_model at zero, which changes no output: each block and ln_f apply
    LayerNorm first, which subtracts the mean."""
    return run_blocks(gpt, gpt.embed(tokens), 0, layer)[-1]


def compute_loss(gpt, sae, tokens, config):
    """One of the four losses on tokens (batch, pos): (loss, {"l0" and the terms before weighting}).

    Only the SAE's parameters get gradients; for all losses but local these come back through
    blocks[layer:]. GPT-2's own are frozen (gpt2.GPT sets requires_grad to False), and the clean run
    is a constant.

    Cost for GPT-2 small, layer 6, 46,080 features, in million operations per token (products with
    weights only, a multiply-add counted as two):

        the blocks before the SAE                                                     85
        the SAE, five products: encode, decode, and the gradients of the features
            and of both matrices (x needs none)                                      354
        local                                                             85 + 354 = 439
        blocks[layer:] and the unembedding                                           162
        the other losses run them three times: clean, spliced, and
            backward through spliced                                 439 + 3 * 162 = 925
    """
    x = entering(gpt, tokens, config.layer)  # (batch, pos, d_model)
    features = sae.encode(x)  # (batch, pos, n_features)
    x_hat = sae.decode(features)  # (batch, pos, d_model)
    l0 = features.count_nonzero() / tokens.numel()
    l1 = features.sum(-1, dtype=x.dtype)  # (batch, pos); bfloat16 would be too coarse to sum in
    l1 = l1.mean() / x.shape[-1]  # divided by d_model, as mse is a mean over d_model
    mse = F.mse_loss(x_hat, x)
    terms = {"l0": l0, "l1": l1, "mse": mse}
    if config.loss == "local":  # the blocks from `layer` on do not run at all
        return mse + config.sparsity * l1, terms

    with torch.no_grad():
        clean = run_blocks(gpt, x, config.layer)  # entering `layer`, ..., leaving the last block
    spliced = run_blocks(gpt, x_hat, config.layer)
    h_clean = gpt.ln_f(clean[-1]).flatten(0, 1)  # (batch * pos, d_model)
    h_spliced = gpt.ln_f(spliced[-1]).flatten(0, 1)
    kl = KLLoss.apply(h_spliced, h_clean, gpt.wte.weight)
    terms["kl"] = kl
    if config.loss == "finish":  # Karvonen 2025, arXiv 2503.17272
        alpha = (mse / kl).detach()  # a constant that makes alpha * kl equal to mse
        return 0.5 * (alpha * kl + mse) + config.sparsity * l1, terms

    terms["mse"] = mse.detach()  # only logged; torch.compile would prepare its gradient
    if config.loss == "e2e":
        return kl + config.sparsity * l1, terms

    # e2e_ds: of two SAEs with the same kl, prefer the one that computes the output as the clean run
    # does. e2e_ds compares the streams entering the blocks after `layer`. x itself may differ, and
    # what leaves the last block is left to kl.
    between = zip(spliced[1:-1], clean[1:-1])
    downstream_mse = torch.stack([F.mse_loss(s, c) for s, c in between]).mean()
    terms["downstream_mse"] = downstream_mse
    return 0.5 * kl + config.downstream * downstream_mse + config.sparsity * l1, terms


# ---- Evaluation ----------------------------------------------------------------------------------

@torch.no_grad()
def evaluate(gpt, sae, tokens, layer):
    """What the model loses if it reads x_hat instead of x, on tokens (sequence, pos): a JSON dict.

    ce, ce_spliced       next-token cross-entropy of the clean and the spliced model, in nats (over
                         all positions but the last, which has no next token)
    ce_increase          ce_spliced - ce
    ce_ablated           ce with the mean of x, over all tokens, in the place of x
    ce_recovered         1 - ce_increase / (ce_ablated - ce)
    kl                   KL(clean || spliced) per token, in nats
    top1_agreement       share of tokens at which both models predict the same token
    l0                   active features per token
    alive, n_features    dictionary elements that are active at least once on `tokens`; all elements
    mse                  mean over tokens and d_model of (x_hat - x)^2
    explained_variance   1 - mse / mean over tokens and d_model of (x - mean of x over tokens)^2
    ..._by_layer         mse and explained_variance for the streams entering blocks[layer:]
    l2_ratio             mean of |x_hat| / |x| over all positions but the first
    l2_ratio_first       and at the first, where GPT-2's x is many times longer
    tokens               how many tokens
    """
    tokens = torch.as_tensor(tokens, device=sae.b_dec.device).long()  # from any type of integer
    batches = tokens.split(4)  # the logits of more would be large

    mean = 0  # of the streams entering `layer` and each later block, over all tokens
    for batch in batches:
        x = entering(gpt, batch, layer)
        clean = torch.stack(run_blocks(gpt, x, layer)[:-1])  # (layers, batch, pos, d_model)
        mean += clean.sum((1, 2), keepdim=True) / tokens.numel()  # (layers, 1, 1, d_model)

    totals = {}
    fired = 0
    for batch in progress(batches, "evaluating", len(tokens), "sequences"):
        x = entering(gpt, batch, layer)
        features = sae.encode(x)  # (batch, pos, n_features)
        fired += (features > 0).sum((0, 1))
        x_hat = sae.decode(features)
        clean = run_blocks(gpt, x, layer)
        spliced = run_blocks(gpt, x_hat, layer)
        log_p = gpt.unembed(clean[-1]).log_softmax(-1)  # (batch, pos, vocab)
        log_q = gpt.unembed(spliced[-1]).log_softmax(-1)
        kl = (log_p.exp() * (log_p - log_q)).sum(-1)  # (batch, pos)
        same_token = log_p.argmax(-1) == log_q.argmax(-1)
        clean = torch.stack(clean[:-1])  # (layers, batch, pos, d_model)
        spliced = torch.stack(spliced[:-1])
        ratio = x_hat.norm(dim=-1) / x.norm(dim=-1)  # (batch, pos)
        measures = {
            "ce": F.nll_loss(log_p[:, :-1].mT, batch[:, 1:]),
            "ce_spliced": F.nll_loss(log_q[:, :-1].mT, batch[:, 1:]),
            "kl": kl.mean(),
            "top1_agreement": same_token.float().mean(),
            "l2_ratio": ratio[:, 1:].mean(),
            "l2_ratio_first": ratio[:, 0].mean(),
            "mse": (spliced - clean).pow(2).mean((1, 2, 3)),  # (layers,)
            "variance": (clean - mean).pow(2).mean((1, 2, 3)),
        }
        share = len(batch) / len(tokens)
        for name, value in measures.items():
            value = np.array(value.tolist())  # float64, off the device
            totals[name] = totals.get(name, 0) + share * value

    # Ablation puts the mean of x at every position. Attention over equal values returns that value,
    # so all positions stay equal, and a run over one of them is enough.
    last = run_blocks(gpt, mean[0], layer)[-1]  # (1, 1, d_model)
    log_m = gpt.unembed(last).log_softmax(-1).flatten()  # (vocab,)
    ce = totals["ce"]
    ce_increase = totals["ce_spliced"] - ce
    ce_ablated = -log_m[tokens[:, 1:]].mean().item()
    mse = totals["mse"]
    explained_variance = 1 - mse / totals.pop("variance")
    totals |= {
        "ce_increase": ce_increase,
        "ce_ablated": ce_ablated,
        "ce_recovered": 1 - ce_increase / (ce_ablated - ce),
        "mse": mse[0],
        "mse_by_layer": mse,
        "explained_variance": explained_variance[0],
        "explained_variance_by_layer": explained_variance,
        "l0": fired.sum().item() / tokens.numel(),
        "alive": fired.count_nonzero().item(),
        "n_features": len(fired),
        "tokens": tokens.numel(),
    }
    return {name: np.array(value).tolist() for name, value in totals.items()}


# ---- Settings ------------------------------------------------------------------------------------

# Defaults: the paper's, for GPT-2, and others for the small model in data/stdlib/ on two CPU cores
PAPER = dict(layer=6, n_sequences=400_000, context=1024, batch_size=16, lr=5e-4)
STDLIB = dict(layer=3, n_sequences=3_200, context=128, batch_size=4, lr=5e-3)
PAPER_SPARSITY = dict(local=6.0, e2e=1.5, e2e_ds=10.0, finish=6.0)
STDLIB_SPARSITY = dict(local=1.15, e2e=1.8, e2e_ds=5.0, finish=1.15)
# Execution settings change the result by rounding only (but for `finish`, whose α is the
# micro-batch's), so --resume may change them
EXECUTION = ("device", "dtype", "compile", "micro_batch", "checkpoint_minutes")


def setting(help, default=None):
    """A field of Config, with its line for --help, which ends with the default in parentheses."""
    return field(default=default, metadata={"help": help})


@dataclass
class Config:
    """A run's settings. Each is a flag (`n_sequences`: --n-sequences) and an entry of config.json.
    What is None gets its default. UserError for a value out of range or unfit for the model."""
    model: str = setting("gpt2, gpt2-medium, gpt2-large, gpt2-xl, stdlib, or a folder (gpt2)")
    text: str = setting("openwebtext, stdlib, a UTF-8 file, a folder of such files, or a folder "
                        "with train.bin and val.bin (what the model was trained on)")
    layer: int = setting("block (from 0) whose input is replaced (6; stdlib 3; folder: the middle)")
    loss: str = setting("local, e2e, e2e_ds or finish (e2e)", "e2e")
    init: str = setting("start from this SAE: a run's folder, an SAE of SAELens, a .pt file of the "
                        "paper's library, or apollo:NAME, one of the paper's own SAEs")
    sparsity: float = setting(f"λ, the weight of l1 (by loss: {PAPER_SPARSITY}; "
                              f"stdlib {STDLIB_SPARSITY})")
    downstream: float = setting("β, the weight of downstream_mse (2.5; gpt2's layer 10: 0.05)")
    n_features: int = setting("dictionary elements (60 d_model; stdlib 8 d_model)")
    n_sequences: int = setting("sequences to train on, in whole batches (400,000; stdlib 3,200)")
    context: int = setting("tokens per sequence (1024; stdlib 128; a folder: at most 1024)")
    batch_size: int = setting("sequences per optimizer step (16; stdlib 4)")
    lr: float = setting("Adam's learning rate, which falls to a tenth (5e-4; stdlib 5e-3)")
    n_eval: int = setting("held-out sequences to evaluate on (500)", 500)
    seed: int = setting("of the SAE's initialisation and the order of the text (0)", 0)
    device: str = setting("cuda, mps or cpu (cuda if there is one)")
    dtype: str = setting("float32 or bfloat16 for matrix products (bfloat16 on cuda)")
    compile: bool = setting("torch.compile the loss (on cuda)")
    micro_batch: int = setting("sequences in memory at once (batch_size)")
    checkpoint_minutes: float = setting("minutes between checkpoints (10)", 10.0)
    out: str = setting("the run's folder (out/MODEL-layerN-LOSS)")

    def __post_init__(self):
        check_choices(self)
        # fill_in sets only what is None, so the first source wins: --init, the model, the paper
        if self.init and None in (self.model, self.layer, self.context, self.n_features):
            sae = load_sae(self.init, self.layer)
            self.fill_in(n_features=len(sae.b_enc), **sae.made_for)
        self.fill_in(model="gpt2")
        sizes = gpt2.model_config(self.model)
        if self.model == "stdlib":
            self.fill_in(n_features=8 * sizes.n_embd)
            self.fill_in(sparsity=STDLIB_SPARSITY[self.loss], **STDLIB)
        elif self.model not in gpt2.SIZES:  # a folder: the middle layer, a context that it has
            self.model = os.path.abspath(self.model)
            self.fill_in(layer=sizes.n_layer // 2)
            self.fill_in(context=min(1024, sizes.n_positions))
        self.fill_in(n_features=60 * sizes.n_embd)
        self.fill_in(sparsity=PAPER_SPARSITY[self.loss], **PAPER)
        if self.model == "gpt2" and self.layer == 10:  # as in the paper
            self.fill_in(downstream=0.05)
        self.fill_in(downstream=2.5)
        self.fill_in(micro_batch=self.batch_size)
        self.fill_in(device="cuda" if torch.cuda.is_available() else "cpu")
        on_cuda = self.device == "cuda"
        self.fill_in(dtype="bfloat16" if on_cuda else "float32", compile=on_cuda)
        name = os.path.basename(self.model)
        self.fill_in(out=f"out/{name}-layer{self.layer}-{self.loss}")
        self.text = data.text_name(self.model, self.text)  # the model's own, or an absolute path
        check_ranges(self, sizes)

    def fill_in(self, **defaults):
        """Set those of the settings that are None."""
        for name, value in defaults.items():
            if getattr(self, name) is None:
                setattr(self, name, value)


# ---- Training ------------------------------------------------------------------------------------

def learning_rate(config, done):
    """The learning rate after `done` sequences: linear warm-up over the first twentieth, then half
    a period of a cosine, from lr down to a tenth of it, where a batch beyond n_sequences stays."""
    warmup = config.n_sequences / 20
    if done < warmup:
        return config.lr * done / warmup
    fraction = (done - warmup) / (config.n_sequences - warmup)
    return config.lr * (0.55 + 0.45 * math.cos(math.pi * min(fraction, 1)))


def train(config, resume=False):
    """Train an SAE with one of the four losses, by the paper's recipe; return the SAE. The folder
    `config.out` gets config.json, log.jsonl, checkpoint.pt, the SAE and eval.json; with `resume`
    the run there continues. UserError if settings, text and model do not match (then nothing is
    written) or the loss is not finite; SystemExit after a checkpoint on SIGTERM, SIGHUP, Ctrl-C."""
    # Under torchrun each process takes its share of every batch; rank 0 also writes and evaluates
    rank = int(os.getenv("RANK", 0))
    world = int(os.getenv("WORLD_SIZE", 1))
    check_start(config, world, resume)
    if config.device == "cuda":
        torch.cuda.set_device(int(os.getenv("LOCAL_RANK", 0)))
    if world > 1:
        dist.init_process_group()

    checkpoint = read_checkpoint(config.out) if resume else None
    gpt, sae = set_up(config, checkpoint)
    optimizer = torch.optim.Adam(sae.parameters(), lr=config.lr, fused=True)
    text = data.load_tokens(config.model, "train", config.text)
    text = data.windows(text, config.context)  # (sequence, context), cut without overlap
    eval_tokens = data.held_out(config)  # already now, so that an unfit text fails at the start
    order = np.random.default_rng(config.seed).permutation(len(text))
    n_steps = math.ceil(config.n_sequences / config.batch_size)
    fingerprint = zlib.crc32(text)
    step, log_size = restore(checkpoint, config, fingerprint, sae, optimizer)
    torch.set_float32_matmul_precision("high")  # TF32 where the GPU has it
    loss_function = torch.compile(compute_loss, fullgraph=True, disable=not config.compile)
    autocast = torch.autocast(config.device, torch.bfloat16, enabled=config.dtype == "bfloat16")

    with open_log(config, rank, resume, log_size) as log, catch_signals(world) as signals:
        if rank == 0:
            print(describe(config), f"x {world}, from step {step:,} of {n_steps:,}")
        last_log = (step, time.time())
        last_save = time.time()
        while step < n_steps:
            # The batch depends on settings and step only: resumed and multi-GPU runs see the same
            numbers = step * config.batch_size + np.arange(rank, config.batch_size, world)
            rows = text[order[numbers % len(order)]].astype(np.int64)
            tokens = torch.from_numpy(rows).to(config.device)  # (batch_size / world, context)

            # Forward and backward, one micro-batch at a time
            sums = 0  # of the loss and its terms, weighted to be means over the batch
            for part in tokens.split(config.micro_batch):
                with autocast:
                    loss, terms = loss_function(gpt, sae, part, config)
                share = len(part) / config.batch_size
                (loss * share).backward()
                values = torch.stack([loss] + list(terms.values()))
                sums += share * values.detach()
            if world > 1:
                dist.all_reduce(sums)
                for parameter in sae.parameters():
                    dist.all_reduce(parameter.grad)

            # Clip the gradient, set the learning rate, update the SAE
            grad_norm = nn.utils.clip_grad_norm_(sae.parameters(), max_norm=10)
            step += 1
            lr = learning_rate(config, step * config.batch_size)
            optimizer.param_groups[0]["lr"] = lr
            optimizer.step()
            optimizer.zero_grad()

            # Every tenth step, and at a signal: log, save if due, stop if asked to. Several
            # processes must do this after the same step, so a signal has to wait for the tenth.
            log_now = step % 10 == 0 or step in (1, n_steps) or (signals and world == 1)
            if not log_now:
                continue
            line = {"step": step}
            line |= dict(zip(["loss"] + list(terms), sums.tolist()))
            line |= {"lr": lr, "grad_norm": grad_norm.item()}
            report(line, log, last_log, n_steps, config, signals)  # a closed stdout is a signal
            last_log = (step, time.time())
            stop = agree(signals, world, config.device)
            due = time.time() - last_save >= 60 * config.checkpoint_minutes
            if rank == 0 and (stop or due or step == n_steps):
                save_checkpoint(config.out, step, log, fingerprint, sae, optimizer)
                last_save = time.time()
            if stop:
                leave(stop, step, config.out, rank, world)

    if rank > 0:
        raise SystemExit  # rank 0 evaluates
    save_results(gpt, sae, eval_tokens, config)
    return sae


# ---- The method ends here. Next: the settings' checks, signals, and a run's files ----------------

def flag(name):
    """The command-line flag of a setting."""
    return "--" + name.replace("_", "-")


def check_choices(config):
    """Raise UserError for an empty setting, one of another type, or an unknown loss or dtype."""
    for f in fields(config):
        value = getattr(config, f.name)
        ensure(value != "", f"{flag(f.name)} is empty: give a value, or leave it out")
        number = f.type is float and isinstance(value, int)
        ensure(value is None or number or isinstance(value, f.type),
               f"{flag(f.name)} {value!r}: must be of type {f.type.__name__}")
    ensure(config.loss in PAPER_SPARSITY, f"--loss {config.loss}: local, e2e, e2e_ds or finish")
    ensure(config.dtype in (None, "float32", "bfloat16"),
           f"--dtype {config.dtype}: float32 or bfloat16")


def check_ranges(config, sizes):
    """Raise UserError for a setting that is out of range or does not fit the machine or model."""
    lowest = dict(sparsity=0, downstream=0, lr=0, seed=0, checkpoint_minutes=0,
                  n_features=1, n_sequences=1, batch_size=1, micro_batch=1, n_eval=1)
    for name, low in lowest.items():
        value = getattr(config, name)
        ensure(low <= value < 1e9, f"{flag(name)} {value}: must be from {low} to 1e9")
    found = {"cpu": True, "cuda": torch.cuda.is_available(),
             "mps": torch.backends.mps.is_available()}
    ensure(found.get(config.device), f"--device {config.device}: not found here; use --device cpu")
    last = sizes.n_layer - 1
    if config.loss == "e2e_ds":
        last -= 1  # it compares the streams entering later blocks, so it needs one
    ensure(0 <= config.layer <= last, f"--layer {config.layer}: must be from 0 to {last} for "
           f"--loss {config.loss} on {config.model}")
    ensure(2 <= config.context <= sizes.n_positions,
           f"--context {config.context}: must be from 2 to {sizes.n_positions}")


def check_start(config, world, resume):
    """Raise UserError if a process has no sequence or no GPU, a new run's folder is not empty, or
    there is no SAE to fine-tune."""
    ensure(config.init or config.loss != "finish",
           "--loss finish fine-tunes an SAE: give one with --init")
    ensure(world <= config.batch_size,
           f"--batch-size {config.batch_size}: each of {world} processes needs a sequence")
    local_rank = int(os.getenv("LOCAL_RANK", 0))
    n_gpus = torch.cuda.device_count()
    ensure(config.device != "cuda" or local_rank < n_gpus,
           f"torchrun --nproc-per-node: there are only {n_gpus} GPUs here")
    if not resume:
        check_empty(config.out)


def check_empty(out):
    """Raise UserError if a folder exists and holds more than a lock."""
    ensure(not os.path.exists(out) or set(os.listdir(out)) <= {".lock"},
           f"{out} exists: --resume {out}, or choose another --out")


def set_up(config, checkpoint=None):
    """GPT-2 and the SAE that a run starts from, on the run's device. A checkpoint has the SAE's
    weights itself, so --init is not read again."""
    gpt = GPT.from_pretrained(config.model)
    shape = (gpt.config.n_embd, config.n_features)
    torch.manual_seed(config.seed)
    if config.init and not checkpoint:
        sae = load_sae(config.init, config.layer)
        found = tuple(sae.W_enc.shape)
        ensure(found == shape, f"--init {config.init}: its d_model and n_features are {found}, "
               f"those of the run {shape}")
    else:
        sae = SAE(*shape)
    return gpt.to(config.device), sae.to(config.device)


@contextmanager
def catch_signals(world):
    """A list to which SIGTERM, Ctrl-C and SIGHUP append their number, so that training can save
    first. In a single process, a second signal has its usual effect; torchrun signals its processes
    more than once, so there every signal is only recorded."""
    numbers = []
    usual = {}

    def restore_handlers():
        for number, handler in usual.items():
            signal.signal(number, handler)

    def on_signal(number, frame):
        numbers.append(number)
        if world == 1:
            restore_handlers()

    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        if signal.getsignal(number) != signal.SIG_IGN:  # as nohup ignores SIGHUP
            usual[number] = signal.signal(number, on_signal)
    try:
        yield numbers
    finally:
        restore_handlers()


def agree(signals, world, device):
    """The number of a signal that any process got, agreed on by all; 0 if there was none."""
    number = signals[0] if signals else 0
    if world > 1:
        highest = torch.tensor(number, device=device)
        dist.all_reduce(highest, dist.ReduceOp.MAX)
        number = highest.item()
    return number


def leave(number, step, out, rank, world):
    """End the process after a signal, once rank 0 has saved."""
    if world > 1:
        dist.barrier()
    if rank == 0:
        print(f"stopped after step {step:,}; continue with --resume {out}")
    raise SystemExit(128 + number)


def describe(config):
    """What a run trains, on which model and text, where and how."""
    return (f"{config.loss} on layer {config.layer} of {config.model}, text {config.text}, "
            f"{config.n_features:,} features -> {config.out}, on {config.device}")


def report(line, log, last, n_steps, config, signals):
    """Append a line to log.jsonl and print it; last: step and time of the line before. A closed
    stdout is treated like a signal. UserError, in all processes, if the loss is not finite."""
    step = line["step"]
    ensure(math.isfinite(sum(line.values())), f"step {step}: the loss is not finite; start again "
           f"with an --lr below {config.lr} (the last checkpoint is untouched)")
    if log is None:
        return  # rank 0 writes
    last_step, last_time = last
    seconds = (time.time() - last_time) / (step - last_step)  # per step
    speed = config.batch_size * config.context / seconds
    log.write(json.dumps(line | {"tokens_per_second": speed}) + "\n")
    shown = []
    for name, value in line.items():
        if name not in ("step", "lr"):
            shown.append(f"{name} {value:.4g}")
    try:
        print(f"{step / n_steps:4.0%}", *shown, f"{speed:,.0f} tokens/s",
              f"{seconds * (n_steps - step):,.0f} s left", sep="  ")
    except OSError:  # a pipe or a terminal that was closed
        gpt2.discard_stdout()
        signals.append(signal.SIGPIPE)


@contextmanager
def open_log(config, rank, resume, size):
    """The run's log, cut to its size at the checkpoint, and a lock on the run's folder, in which a
    new run's config.json is then written. Only rank 0 has them; the other processes get None."""
    if rank > 0:
        yield None
        return
    os.makedirs(config.out, exist_ok=True)
    with gpt2.lock(config.out, wait=False):
        if not resume:
            check_empty(config.out)  # another process may have been faster
            write_json(f"{config.out}/config.json", vars(config))
        with open(f"{config.out}/log.jsonl", "a", buffering=1) as log:
            if log.tell() > size:
                log.truncate(size)
            yield log


def save_checkpoint(out, step, log, fingerprint, sae, optimizer):
    """Write what a run needs to continue, atomically. The fingerprint is its text's."""
    with writing(f"{out}/checkpoint.pt") as file:
        torch.save({"step": step, "log_size": log.tell(), "text": fingerprint,
                    "sae": sae.state_dict(), "optimizer": optimizer.state_dict()}, file)


def read_checkpoint(out):
    """The checkpoint of a run, or None if it was stopped before the first."""
    path = f"{out}/checkpoint.pt"
    if not os.path.exists(path):
        return None
    with reading(path):  # turns errors into a UserError that names the file
        return torch.load(path, map_location="cpu", weights_only=True)


def restore(checkpoint, config, fingerprint, sae, optimizer):
    """Put a checkpoint's state in place; return its step and the size of the log, or 0, 0."""
    if checkpoint is None:
        return 0, 0
    with reading(f"{config.out}/checkpoint.pt"):
        sae.load_state_dict(checkpoint["sae"])
        optimizer.load_state_dict(checkpoint["optimizer"])
        same_text = checkpoint["text"] == fingerprint
    ensure(same_text, f"--text {config.text} has changed since the run in {config.out} began: "
           "restore it, or start a new run")
    return checkpoint["step"], checkpoint["log_size"]


def save_results(gpt, sae, tokens, config):
    """Write the SAE and eval.json, the measures of the SAE as it was written."""
    save_sae(sae, config.out, config.model, config.layer, config.context)
    # As --evaluate does, to give the same figures: the SAE from its file, and no TF32
    saved = load_sae(config.out).to(config.device)
    torch.set_float32_matmul_precision("highest")
    write_json(f"{config.out}/eval.json", evaluate(gpt, saved, tokens, config.layer))


# ---- Files: SAEs as this file, SAELens and the paper's library write them ------------------------

APOLLO = "apollo-research/e2e-saes-gpt2/resolve/713515193ec799fd17bd7f6ccf6f209332b07f7d"
WEIGHTS = ["W_enc", "b_enc", "W_dec", "b_dec"]
# Their names in a file of the paper's library, after "blocks-6-hook_resid_pre."
PAPER_WEIGHTS = ["encoder.0.weight", "encoder.0.bias", "decoder.weight", "decoder.bias"]
# An entry of SAELens' cfg.json that is not known here is harmless if it has one of these values
OFF = (None, False, "none", "", [], {})
# Entries of SAELens' cfg.json, and the values for which SAELens computes the same as the class SAE
COMPUTED = {
    "architecture": ["standard"],
    "activation_fn": ["relu"],
    "activation_fn_str": ["relu"],
    "activation_fn_kwargs": [{}, None],
    "normalize_activations": ["none", None, False],
    "reshape_activations": ["none", None],
    "finetuning_scaling_factor": [False, None],
    "hook_head_index": [None],
    "hook_point_head_index": [None],
    "hook_name_out": [None],
}


def save_sae(sae, folder, model, layer, context):
    """Write `cfg.json` and `sae_weights.safetensors`, which SAELens loads as they are."""
    d_model, n_features = sae.W_enc.shape
    cfg = {
        "architecture": "standard",
        "d_in": d_model,
        "d_sae": n_features,
        "dtype": "float32",
        "device": "cpu",
        "apply_b_dec_to_input": False,
        "normalize_activations": "none",
        "reshape_activations": "none",
        "metadata": {
            "sae_lens_version": "6.0.0",
            "model_name": str(model),
            "hook_name": f"blocks.{layer}.hook_resid_pre",
            "context_size": context,
            "prepend_bos": False,
            "neuronpedia_id": None,
            # SAELens then loads GPT-2 as gpt2.py does: with zero mean in the residual stream
            "model_from_pretrained_kwargs": {"center_writing_weights": True},
        },
    }
    tensors = sae.state_dict() | {"W_dec": sae.dictionary}
    gpt2.write_safetensors(f"{folder}/sae_weights.safetensors", tensors)
    write_json(f"{folder}/cfg.json", cfg)


def load_sae(path_or_name, layer=None):
    """Load a folder of `save_sae` or SAELens, a .pt file of the paper's library (`layer` chooses
    one of several), or one of the paper's SAEs, apollo:e2e_similar_ce_layer_6, fetched once.
    `made_for` gets its model, layer and context. UserError if it is of another kind."""
    path = Path(path_or_name)
    if path.name.startswith("apollo:"):
        name = path.name.removeprefix("apollo:")
        path = gpt2.DATA / "apollo" / f"{name}.pt"
        gpt2.download(f"{gpt2.HUB}/{APOLLO}/{name}.pt", path)
    if path.is_dir():
        weights, made_for = read_saelens(path)
    else:
        weights, made_for = read_paper(path, layer)
    ensure(layer in (None, made_for["layer"]),
           f"--layer {layer}: the SAE in {path} was made for layer {made_for['layer']}")
    with torch.device("meta"):  # no memory, no initialisation
        sae = SAE(*weights["W_enc"].shape)
    with reading(path):
        for name, weight in weights.items():
            # From float64, so what is too large for float32 becomes infinite, and is refused
            weights[name] = gpt2.finite_float32(name, weight).contiguous()
        sae.load_state_dict(weights, assign=True)
    sae.made_for = made_for
    return sae


def checked(tensors, names):
    """The weights of an SAE in float64, {"W_enc": ...}, from {name in the file: tensor}; `names`
    are the file's for W_enc, b_enc, W_dec and b_dec. UserError, with the names, for tensors that
    are not these four, whose shapes do not fit together, or that are not finite."""
    ensure(tensors.keys() == set(names), f"its tensors are {sorted(tensors)} instead of {names}")
    shapes = [tuple(tensors[name].shape) for name in names]
    n_features = tensors[names[1]].numel()
    d_model = tensors[names[3]].numel()
    fitting = [(d_model, n_features), (n_features,), (n_features, d_model), (d_model,)]
    ensure(shapes == fitting and n_features > 0 and d_model > 0,
           f"{', '.join(names)} have the shapes {shapes}, which do not fit together")
    weights = {}
    for ours, name in zip(WEIGHTS, names):
        weights[ours] = gpt2.finite_float32(name, tensors[name]).double()
    return weights


def scale_features(weights, scale):
    """Multiply the features by `scale` (n_features,), each at least 0: scale * relu(z) is
    relu(scale * z). Callers give 0 for a row of zeros in W_dec, so its feature is never active.
    Then make the rows of W_dec unit vectors: the gradient of a very short one would be huge."""
    weights["W_enc"] *= scale
    weights["b_enc"] *= scale
    weights["W_dec"] = F.normalize(weights["W_dec"], dim=1, eps=1e-300)  # eps: only for 0/0


def read_saelens(folder):
    """An SAE as SAELens writes it, in its layout of today or of 2024: (weights, made_for)."""
    ensure((folder / "cfg.json").exists(), f"{folder} has no cfg.json: it is not an SAE, or a run "
           f"that is not finished (continue it with --resume {folder})")
    cfg = read_json(folder / "cfg.json")
    with reading(folder / "cfg.json"):
        made_for, centred, subtract_b_dec = read_cfg(cfg)
    if not centred:
        note(f"{folder}: by its cfg.json, it was trained on a residual stream whose mean was not "
             "removed (or an older version of this file wrote it); here the mean is removed")
    tensors = gpt2.read_safetensors(folder / "sae_weights.safetensors")
    with reading(folder / "sae_weights.safetensors"):
        factor = tensors.pop("scaling_factor", torch.ones(1))
        ensure(bool((factor == 1).all()), "scaling_factor is not 1")
        weights = checked(tensors, WEIGHTS)
        found = tuple(weights["W_enc"].shape)
        stated = (cfg.get("d_in"), cfg.get("d_sae"))
        ensure(found == stated, f"W_enc is {found}, but cfg.json's d_in and d_sae are {stated}")
        if subtract_b_dec:  # features are computed from x - b_dec
            weights["b_enc"] -= weights["b_dec"] @ weights["W_enc"]
        # In SAELens rows may have any length. Move it into the features: x_hat stays the same.
        scale_features(weights, weights["W_dec"].norm(dim=1))
    return weights, made_for


def read_cfg(cfg):
    """What SAELens' cfg.json says: what the SAE was made for, whether the residual stream was
    centred, and whether b_dec is subtracted from x. UserError for what SAE does not compute."""
    flat = "metadata" not in cfg  # the layout of 2024: all entries at the top
    metadata = cfg if flat else cfg["metadata"]
    gpt2.check_entries(cfg, COMPUTED)
    gpt2.check_entries(metadata, COMPUTED)
    if not flat:  # only here is each name known: the other two also hold training settings
        known = {"d_in", "d_sae", "dtype", "device", "apply_b_dec_to_input", "metadata"}
        for name in cfg.keys() - known - COMPUTED.keys():
            ensure(cfg[name] in OFF, f"{name} is {cfg[name]!r}")
    subtract_b_dec = cfg.get("apply_b_dec_to_input", True)
    # If metadata states it, too, it must be the same
    gpt2.check_entries(metadata, {"apply_b_dec_to_input": [subtract_b_dec]})
    ensure(subtract_b_dec in (True, False), f"apply_b_dec_to_input is {subtract_b_dec!r}")

    key = "hook_point" if "hook_point" in metadata else "hook_name"
    hook = str(metadata.get(key))
    match = re.fullmatch(r"blocks\.([0-9]+)\.hook_resid_pre", hook)
    ensure(match, f"{key} is {hook!r} instead of 'blocks.N.hook_resid_pre'")
    model = metadata["model_name"]
    context = metadata["context_size"]
    ensure(isinstance(model, str) and isinstance(context, int),
           f"model_name is {model!r}, context_size {context!r}")
    if model == "gpt2-small":
        model = "gpt2"
    made_for = {"model": model, "layer": int(match[1]), "context": context}
    kwargs = metadata.get("model_from_pretrained_kwargs") or {}
    ensure(isinstance(kwargs, dict), f"model_from_pretrained_kwargs is {kwargs!r}")
    centred = kwargs.get("center_writing_weights", flat)  # in the layout of 2024 it was the default
    return made_for, centred, subtract_b_dec


def read_paper(path, layer):
    """An SAE as the paper's library writes it: (weights, made_for). Its keys are
    blocks-6-hook_resid_pre.encoder.0.weight, .encoder.0.bias, .decoder.weight, .decoder.bias."""
    with reading(path):
        loaded = torch.load(path, map_location="cpu", weights_only=True)
        saes = {}  # by layer
        for key, tensor in loaded.items():
            match = re.fullmatch(r"blocks-([0-9]+)-hook_resid_pre\.(.+)", key)
            ensure(match, f"{key} is not a weight of an SAE at blocks-N-hook_resid_pre")
            sae = saes.setdefault(int(match[1]), {})
            sae[match[2]] = tensor.t()  # nn.Linear's (out, in) -> our (in, out); vectors stay
    if layer is None and len(saes) == 1:
        layer = min(saes)
    ensure(layer in saes, f"{path} has SAEs of the layers {sorted(saes)}: choose with --layer")
    with reading(path):
        weights = checked(saes[layer], PAPER_WEIGHTS)
        # The paper's forward pass normalises rows as SAE.dictionary does. Silence rows of zeros.
        scale_features(weights, weights["W_dec"].any(dim=1))
    return weights, {"model": "gpt2", "layer": layer, "context": 1024}


@functools.cache
def note(message):
    """Print a message to stderr, once."""
    print("note:", message, file=sys.stderr)


# ---- Looking at results --------------------------------------------------------------------------

def print_table(results):
    """Print the main results of `evaluate`, {name: result}, a row per SAE."""
    print(f"{'SAE':<36}{'L0':>8}{'CE increase':>13}{'KL':>8}{'alive':>16}{'explained var.':>16}")
    for name, r in results.items():
        alive = f"{r['alive']:,} of {r['n_features']:,}"
        print(f"{name[-35:]:<36}{r['l0']:8.1f}{r['ce_increase']:13.4f}{r['kl']:8.4f}{alive:>16}"
              f"{r['explained_variance']:16.3f}")
    print("L0: active features per token; alive: elements active at least once on held-out text;\n"
          "CE increase, KL: what the model loses by reading x_hat instead of x, in nats per token")


def plot(folders, path):
    """Draw runs: CE increase against L0, a line per loss and seed, at the dictionary size that most
    of them have (of equals, the first). If sizes differ, CE increase at one L0 by size, too."""
    import matplotlib.pyplot as plt

    lines = {}  # (n_features, loss, seed): the runs with different λ
    sizes = []  # n_features of each run
    setups = set()
    for folder in folders:
        ensure(os.path.exists(f"{folder}/eval.json"),
               f"{folder} has no eval.json: if it is a run that was stopped, --resume {folder}")
        run = read_json(f"{folder}/config.json") | read_json(f"{folder}/eval.json")
        with reading(f"{folder}/eval.json"):
            point = (run["l0"], run["ce_increase"])
            setups.add((run["model"], run["layer"], run["text"]))
        ensure(min(point) > 0, f"{folder}: L0 or CE increase is not above 0; axes are logarithmic")
        n_features = run["n_features"]
        sizes.append(n_features)
        points = lines.setdefault((n_features, run["loss"], run["seed"]), [])
        points.append(point)
    ensure(len(setups) == 1, f"--plot: runs must share model, layer and text: {sorted(setups)}")
    for points in lines.values():
        points.sort()
    usual = max(sizes, key=sizes.count)

    several = {key: points for key, points in lines.items() if len(points) > 1}  # with several λ
    n_panels = 1
    if len({key[0] for key in several}) > 1:
        n_panels = 2
    size = (5 * n_panels, 4.4)
    figure, axes = plt.subplots(1, n_panels, figsize=size, layout="constrained")
    panels = np.atleast_1d(axes)
    curves = {key[1:]: points for key, points in lines.items() if key[0] == usual}
    draw(panels[0], curves, "active features per token (L0)", f"{usual:,} dictionary elements")
    if n_panels == 2:
        l0, curves = at_equal_l0(several)
        draw(panels[1], curves, "dictionary elements", f"at L0 {l0:.1f}, interpolated")
        panels[1].set_xticks(sorted(set(sizes)))
    legend = {}  # of both panels, each line once
    for panel in panels:
        handles, labels = panel.get_legend_handles_labels()
        legend |= zip(labels, handles)
    figure.legend(legend.values(), legend.keys(), loc="outside lower center", ncols=3)
    with writing(path) as file:
        plt.savefig(file, dpi=150)
    print(f"{len(folders)} runs drawn in {path}")


def draw(panel, curves, x_label, title):
    """One panel of the figure, {(loss, seed): points}: a colour per loss, a marker per seed."""
    colors = {"local": "tab:blue", "e2e": "tab:orange", "e2e_ds": "tab:green", "finish": "tab:red"}
    markers = "os^D"
    for (loss, seed), points in sorted(curves.items()):
        x, y = zip(*points)
        panel.plot(x, y, color=colors[loss], marker=markers[seed % 4], markersize=5,
                   label=f"{loss}, seed {seed}")
    panel.set(xscale="log", yscale="log", title=title,
              xlabel=x_label, ylabel="CE increase, nats per token")
    for axis in (panel.xaxis, panel.yaxis):
        axis.get_major_locator().set_params(subs=(1, 2, 5))
        axis.set_major_formatter("{x:,g}")
        axis.set_minor_formatter("")


def at_equal_l0(lines):
    """CE increase at one L0, the middle (in logs) of what all lines share: (L0, {(loss, seed):
    [(n_features, CE increase), ...]}), interpolated between runs in log L0 and log CE increase. A
    line that does not reach this L0 is reported and left out. Prints the table, too."""
    low = max(points[0][0] for points in lines.values())
    high = min(points[-1][0] for points in lines.values())
    l0 = math.sqrt(low * high)
    print(f"CE increase at L0 {l0:.1f}, in nats per token")
    curves = {}
    for (n_features, loss, seed), points in sorted(lines.items()):
        x, y = np.log(points).T
        if points[0][0] <= l0 <= points[-1][0]:
            ce_increase = math.exp(np.interp(math.log(l0), x, y))
            curve = curves.setdefault((loss, seed), [])
            curve.append((n_features, ce_increase))
            print(f"{n_features:6,} elements  {loss:8} seed {seed}: {ce_increase:.3f}")
        else:
            print(f"{n_features:6,} elements  {loss:8} seed {seed}: does not reach this L0")
    return l0, curves


@torch.no_grad()
def alive_features(gpt, sae, tokens, layer):
    """The indices of the features that are active at least once on tokens (sequence, pos)."""
    counts = 0
    for batch in tokens.split(4):
        features = sae.encode(entering(gpt, batch, layer))
        counts += (features > 0).sum((0, 1))
    return counts.nonzero()[:, 0]


def effects(gpt, sae, tokens, layer):
    """How much KL(clean || spliced) grows, to first order, if a feature is removed: a sum over
    tokens (sequence, pos), in nats, (n_features,).

    Removing feature f_i at a token changes the KL by about -f_i dKL/df_i (attribution patching), so
    one pass forward and back gives the effects of all features."""
    effect = 0
    for batch in tokens.split(4):
        with torch.no_grad():
            x = entering(gpt, batch, layer)
            features = sae.encode(x)
            clean = run_blocks(gpt, x, layer)[-1]
            h_clean = gpt.ln_f(clean).flatten(0, 1)
        features.requires_grad_()
        spliced = run_blocks(gpt, sae.decode(features), layer)[-1]
        h_spliced = gpt.ln_f(spliced).flatten(0, 1)
        kl = KLLoss.apply(h_spliced, h_clean, gpt.wte.weight)
        (gradient,) = torch.autograd.grad(kl * batch.numel(), features)
        effect -= (features.detach() * gradient).sum((0, 1))
    return effect


@torch.no_grad()
def remove(gpt, sae, tokens, layer, feature, pos):
    """Next-token probabilities of the spliced model with a feature, and without it at one position
    of each sequence: tokens (sequence, context), pos (sequence,) -> two of (sequence, vocab)."""
    rows = torch.arange(len(tokens), device=tokens.device)
    features = sae.encode(entering(gpt, tokens, layer))
    last = run_blocks(gpt, sae.decode(features), layer)[-1]
    with_feature = gpt.unembed(last[rows, pos]).softmax(-1)
    features[rows, pos, feature] = 0
    last = run_blocks(gpt, sae.decode(features), layer)[-1]
    without = gpt.unembed(last[rows, pos]).softmax(-1)
    return with_feature, without


def nearest(a, b, skip=0):
    """For each row of a: its highest cosine similarity with a row of b, and which row of b that is.
    Both hold unit rows (element, d_model). skip=1 takes the second highest, for b = a."""
    cosines = []
    rows = []
    for part in a.split(1024):
        best = (part @ b.T).topk(skip + 1)
        cosines.append(best.values[:, skip])
        rows.append(best.indices[:, skip])
    return torch.cat(cosines), torch.cat(rows)


@torch.no_grad()
def compare(opened):
    """Print how similar each pair of dictionaries is; opened: {name: (gpt, sae, tokens, layer)}."""
    alive = {}  # of each SAE: the indices of its alive elements, and these elements
    for name, (gpt, sae, tokens, layer) in opened.items():
        index = alive_features(gpt, sae, tokens, layer)
        ensure(len(index) > 1, f"{name}: fewer than two features are active on the held-out text")
        alive[name] = (index, sae.dictionary[index])
    widths = {elements.shape[1] for _, elements in alive.values()}
    ensure(len(widths) == 1, f"--compare: the SAEs have different d_model: {sorted(widths)}")

    torch.manual_seed(2**31)  # no run's: random directions must not equal an SAE's initial ones
    print(f"{'elements of':<30}{'nearest among those of':<30}{'cosine':>8}{'chance':>8}{'same':>8}")
    names = list(alive)
    for i, one in enumerate(names):
        index, elements = alive[one]
        for other in names[i:]:
            other_index, other_elements = alive[other]
            itself = 1 if other == one else 0  # its own nearest, which does not count
            cosine, rows = nearest(elements, other_elements, skip=itself)
            random = F.normalize(torch.randn_like(other_elements))
            chance, _ = nearest(elements, random)
            same = (other_index[rows] == index).float()
            print(f"{one[-29:]:<30}{other[-29:]:<30}{cosine.mean():8.3f}{chance.mean():8.3f}"
                  f"{same.mean():8.1%}")
    print("""cosine: the highest cosine similarity of an alive element with any other, averaged.
chance: the same against equally many random directions. same: nearest elements with the same index.
Where that is high, dictionaries are similar because they started the same: compare runs of
different --seed.""")


# ---- A page of features: what it shows, then how it looks ----------------------------------------

def features_page(gpt, sae, tokens, layer, tokenizer, title, ids=None):
    """A page of HTML on the features `ids`, or else on the 100 with the largest effect on `tokens`
    (sequence, pos)."""
    effect = effects(gpt, sae, tokens, layer)
    ensure(effect.any(), f"{title}: no feature is active on the held-out text")
    if not ids:
        ids = effect.argsort(descending=True)[:100].tolist()
    highest = len(effect) - 1
    ensure(0 <= min(ids) and max(ids) <= highest, f"--features: IDs are 0 to {highest}")
    with torch.no_grad():
        dictionary = sae.dictionary
        parts = []
        for batch in tokens.split(4):
            features = sae.encode(entering(gpt, batch, layer))
            parts.append(features[..., ids])
    activations = torch.cat(parts).unbind(-1)  # of each feature: (sequence, pos)

    body = []
    for feature, active in zip(ids, activations):
        similar = (dictionary @ dictionary[feature]).argsort(descending=True)
        near = [i for i in similar[:4].tolist() if i != feature]
        share = effect[feature] / effect.sum()
        often = active.count_nonzero() / tokens.numel()
        body.append(heading_html(feature, share, often, near, ids))
        for context in contexts(gpt, sae, tokens, layer, feature, active):
            body.append(context_html(context, tokenizer))
    return page_html(title, f"{len(ids)} of {len(effect):,} features.", body)


def contexts(gpt, sae, tokens, layer, feature, active):
    """What the page shows of a feature whose activations are `active` (sequence, pos): at most
    seven contexts, the four in which it is most active and three weaker ones, and what its
    removal changes in each."""
    peak, pos = active.max(1)  # of each sequence
    n_active = peak.count_nonzero()
    order = peak.argsort(descending=True)[:n_active]
    step = n_active // 3 + 1  # more than a third
    weaker = order[4::step]  # so at most three
    rows = torch.cat([order[:4], weaker])
    if len(rows) == 0:
        return []
    both = remove(gpt, sae, tokens[rows], layer, feature, pos[rows])
    result = []
    for row, with_feature, without in zip(rows.tolist(), *both):
        change = (with_feature - without).abs()
        changes = []  # (token, its probability without the feature, and with it)
        for token in change.topk(4).indices.tolist():
            changes.append((token, without[token], with_feature[token]))
        at = pos[row].item()
        first = max(0, at - 24)
        shown = slice(first, at + 9)
        tints = active[row, shown] / peak.max()
        result.append({"tokens": tokens[row, shown].tolist(), "tints": tints.tolist(),
                       "at": at - first, "activation": peak[row], "changes": changes})
    return result


STYLE = """body { font: 15px/1.4 system-ui; max-width: 62em; margin: 1em auto; padding: 0 1em }
h2 { font-size: 1.1em; margin: 1em 0 0; border-top: 1px solid #bbb; padding-top: .5em }
pre { font: 13px/1.35 monospace; white-space: pre-wrap; background: #f6f6f6; margin: .6em 0 .2em }
pre, code { overflow-wrap: anywhere } b { outline: 1px solid }
i { background: rgba(255, 140, 0, var(--t)); font-style: normal }
code { background: #e4ecf7; padding: 0 .2em }
div { display: grid; grid-template-columns: repeat(auto-fill, minmax(11.5em, 1fr)) }"""
LEGEND = """The effect of a feature is the KL that its removal would add, to first order, as a share
of all features' effects. Below each feature: the contexts in which it is most active, then weaker
ones. <i style="--t:.7">Orange</i>: how active it is at a token. <b>Boxed</b>: the token where it is
most active; if it is removed there, the probabilities of the next token change, most for the four
shown: without → with the feature. White space: <code>·</code> a space, <code>⏎</code> a new line,
<code>⇥</code> a tab."""
VISIBLE = {"\n": "⏎", "\t": "⇥"}


def page_html(title, summary, body):
    """The whole page; body: a list of its parts."""
    title = html.escape(title)
    return f"""<!doctype html><html lang="en"><meta charset="utf-8">
        <meta name="viewport" content="width=device-width"><link rel="icon" href="data:,">
        <title>{title}</title><style>{STYLE}</style><h1>{title}</h1>
        <p>{summary} {LEGEND}</p>{"".join(body)}</html>"""


def heading_html(feature, share, often, near, ids):
    """A feature's heading; nearest elements that are on the page are linked."""
    links = []
    for i in near:
        links.append(f'<a href="#{i}">{i}</a>' if i in ids else str(i))
    return f"""<h2 id="{feature}">Feature {feature}</h2>{share:.2%} of the effect, active at
        {often:.2%} of the tokens, nearest elements: {", ".join(links)}"""


def context_html(context, tokenizer):
    """One context, and below it the tokens whose probability changes most."""
    words = []
    for token, tint in zip(context["tokens"], context["tints"]):
        word = token_html(token, tokenizer).replace("⏎", "⏎<br>")
        if tint > 0:
            word = f'<i style="--t:{tint:.2f}">{word}</i>'
        words.append(word)
    at = context["at"]
    words[at] = f"<b>{words[at]}</b>"
    chips = [f"<span>activation {context['activation']:.2f}</span>"]
    for token, without, with_feature in context["changes"]:
        word = token_html(token, tokenizer).replace(" ", "·")
        chips.append(f"<span><code>{word}</code> {without:.2f} → {with_feature:.2f}</span>")
    return f"<pre>{''.join(words)}</pre><div>{''.join(chips)}</div>"


def token_html(token, tokenizer):
    """A token as HTML; unprintable characters are replaced as in VISIBLE, or escaped: \\x00."""
    try:
        text = tokenizer.decode_bytes([token]).decode(errors="backslashreplace")
    except KeyError:  # a row of the unembedding beyond the tokenizer's
        text = f"[{token}]"
    shown = []
    for char in text:
        if not char.isprintable():
            char = VISIBLE.get(char, repr(char)[1:-1])
        shown.append(char)
    return html.escape("".join(shown))


# ---- The command line ----------------------------------------------------------------------------

def open_sae(name, given):
    """A trained SAE with its GPT-2, held-out tokens (sequence, pos) and layer, on one device, and
    its settings. If `name` is a run's folder, text and n_eval default to that run's."""
    settings = {}
    if os.path.exists(f"{name}/config.json"):
        run = read_json(f"{name}/config.json")
        settings = {key: run[key] for key in ("text", "n_eval") if key in run}
    settings |= given
    settings["init"] = name  # a Config that starts from the SAE has its model and layer
    config = Config(**settings)
    gpt, sae = set_up(config)
    tokens = torch.from_numpy(data.held_out(config)).to(config.device)
    return gpt, sae, tokens, config.layer, config


def evaluate_all(names, given):
    """Print the measures of SAEs, a row each. UserError, at the end, for those that cannot be
    evaluated."""
    results = {}
    failed = []
    for name in names:
        try:
            gpt, sae, tokens, layer, _ = open_sae(name, given)
            results[name] = evaluate(gpt, sae, tokens, layer)
        except (UserError, OSError, torch.OutOfMemoryError) as error:
            failed.append(f"{name}: {error}")
    if results:
        print_table(results)
    ensure(not failed, "; ".join(failed))


def resumed_config(out, given):
    """The Config of the run in the folder `out`. Only execution settings may be changed."""
    saved = read_json(f"{out}/config.json") | {"out": out}
    if given.get("device") not in (None, saved.get("device")):
        saved |= {"dtype": None, "compile": None}  # the new device's defaults, unless given
    try:
        config = Config(**saved | given)
    except TypeError as error:  # an unknown setting
        raise UserError(f"{out}/config.json: {error}") from None
    for name, value in given.items():
        ensure(name in EXECUTION or getattr(config, name) == saved.get(name),
               f"{flag(name)} {value}: the run in {out} has {saved.get(name)}; drop the flag, or, "
               f"if files have moved, edit {out}/config.json")
    return config


class Parser(argparse.ArgumentParser):
    """argparse with one-line error messages."""
    def error(self, message):
        raise UserError(f"{message}; see --help")


def main(arguments=None):
    """The command line. UserError for mistakes that the user can correct."""
    parser = Parser(allow_abbrev=False, argument_default=argparse.SUPPRESS)
    for f in fields(Config):
        kind = {"type": f.type}
        if f.type is bool:
            kind = {"action": argparse.BooleanOptionalAction}
        parser.add_argument(flag(f.name), help=f.metadata["help"], **kind)
    action = parser.add_mutually_exclusive_group()
    action.add_argument("--resume", metavar="RUN", help="continue a run that was stopped")
    action.add_argument("--evaluate", metavar="SAE", nargs="+", help="print what SAEs cost a model")
    action.add_argument("--plot", metavar="RUN", nargs="+", help="draw the Pareto curves of runs")
    action.add_argument("--compare", metavar="SAE", nargs="+", help="show how alike SAEs are")
    action.add_argument("--features", metavar=("SAE", "ID"), nargs="+",
                        help="make a page of the features that matter most, or of those given")
    given = vars(parser.parse_args(arguments))  # only the flags that were given
    for name in ("evaluate", "plot", "compare", "features"):
        if name in given:
            ensure(os.getenv("WORLD_SIZE", "1") == "1",
                   f"--{name} is for one process: run it without torchrun")
            # out/* also names the figures and pages that --plot and --features leave there
            given[name] = [sae for sae in given[name] if not sae.endswith((".png", ".html"))]
            ensure(given[name], f"--{name}: no SAE is given")

    if "plot" in given:
        plot(given["plot"], f"{Path(given['plot'][0]).parent}/pareto.png")
    elif "evaluate" in given:
        evaluate_all(given.pop("evaluate"), given)
    elif "compare" in given:
        names = given.pop("compare")
        compare({name: open_sae(name, given)[:4] for name in names})
    elif "features" in given:
        name, *ids = given.pop("features")
        for i in ids:
            ensure(i.isdecimal(), f"--features {name} {i}: IDs are numbers from 0 on")
        *opened, config = open_sae(name, given)
        tokenizer = gpt2.load_tokenizer(config.model)
        page = features_page(*opened, tokenizer, name, [int(i) for i in ids])
        path = f"{name}.html"
        if os.path.isdir(name):
            path = f"{name}/features.html"
        with writing(path) as file:
            file.write(page.encode())
        print(f"{path}: open it in a browser")
    else:
        resume = given.pop("resume", None)
        config = Config(**given) if resume is None else resumed_config(resume, given)
        try:
            train(config, resume=resume is not None)
        except torch._dynamo.exc.TorchDynamoException as error:  # often, no C++ compiler is found
            raise UserError(f"use --resume {config.out} --no-compile: torch.compile fails: {error}"
                            ) from None
        print_table({config.out: read_json(f"{config.out}/eval.json")})
        print(f"next: python e2e_sae.py --features {config.out}\n"
              f"      python e2e_sae.py --evaluate {Path(config.out).parent}/*")


if __name__ == "__main__":
    gpt2.run_command(main)
