r"""End-to-end sparse dictionary learning on GPT-2's residual stream, in one file.

Braun, Taylor, Goldowsky-Dill, Sharkey: "Identifying Functionally Important Features with
End-to-End Sparse Dictionary Learning", NeurIPS 2024, arXiv 2405.12241.

At each token GPT-2 keeps a vector, the residual stream: every block reads it and adds to it. Let x
be that vector where it enters one block. A sparse autoencoder (SAE) rewrites x as a sum of few
elements of a large dictionary; how strongly each of them takes part is a feature:

    features = relu(W_e x + b_e)               one per dictionary element, most of them zero
    x_hat    = sum_i features_i d_i + b_d      the d_i are the dictionary elements, unit vectors

Usually it is trained to rebuild x. But the largest parts of x need not be those that the model
goes on to use, so such an SAE spends features on what does not matter and misses some that does.
The remedy: put x_hat in the place of x, run the rest of the model on it, and ask that the *output*
stays the same. The model runs twice and is frozen; only the SAE learns.

    tokens -> embed -> blocks[:layer] -> x -------> blocks[layer:] -> unembed -> y       clean
                                         | \              |                      |
                                        SAE  mse      downstream                 kl
                                         | /              |                      |
                                         x_hat ---> blocks[layer:] -> unembed -> y_hat   spliced

    --loss local     mse + λ sparsity                      rebuild x: the usual SAE
    --loss e2e       kl + λ sparsity                       keep the output
    --loss e2e_ds    kl/2 + β downstream + λ sparsity      keep the later layers as well
    --loss finish    (α kl + mse)/2 + λ sparsity           end a local run this way: see --init

`mse` is the mean squared error of x_hat; `kl` how far the two next-token distributions differ;
`downstream` the mean squared error of the residual stream in the later layers (e2e alone may reach
the same output through other computations); `sparsity` the features' L1 norm, which holds most of
them at zero. What comes of it: for the same harm to the output, e2e needs fewer features active at
a token (L0), and fewer dictionary elements that are ever active (alive), than local.

    python e2e_sae.py --layer 6 --loss e2e                     GPT-2 small, as in the paper
    python e2e_sae.py --model stdlib --layer 3 --loss e2e      two minutes on two CPU cores
    python e2e_sae.py --init out/A --loss finish ...           local first, then what e2e is about
    python e2e_sae.py --evaluate out/A out/B                   SAEs side by side
    python e2e_sae.py --resume out/A                           go on with a run that was stopped

What it is not: a library. It has no hooks, no registry, and no SAE but the paper's. It reads from
top to bottom; nothing leans on what comes further down.
"""

import argparse
import ctypes
import json
import math
import os
import re
import shutil
import signal
import sys
import time
import warnings
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, field, fields, replace
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F

import gpt2
from gpt2 import GPT, GPTConfig, Parser, Progress, UserError, duration

# ------------------------------------------------------------------------------------------------
# Settings
# ------------------------------------------------------------------------------------------------

PAPER_SPARSITY = {"local": 6.0, "e2e": 1.5, "e2e_ds": 10.0, "finish": 6.0}
STDLIB_SPARSITY = {"local": 0.6, "e2e": 2.0, "e2e_ds": 3.0, "finish": 0.6}
# Setting: (OpenAI's models, as in the paper; any other model, sized for stdlib on two CPU cores)
DEFAULTS = {
    "layer": (6, 3),
    "sparsity": (PAPER_SPARSITY, STDLIB_SPARSITY),
    "n_features": (60, 16),  # times d_model
    "n_sequences": (400_000, 3_200),
    "context": (1024, 128),
    "batch_size": (16, 8),
    "lr": (5e-4, 5e-3),
}
# What says how a run is carried out and not what comes out: may change when it is resumed
EXECUTION = ("device", "compile", "micro_batch", "log_steps", "checkpoint_minutes", "out")


def setting(default, help, low=None, high=10**9):
    """A field of Config: its line of help and its range. Default None: see DEFAULTS."""
    return field(default=default, metadata={"help": help, "low": low, "high": high})


@dataclass
class Config:
    """A run's settings. Each is a flag (`n_sequences` is --n-sequences) and a line of config.json.

    Raises:
        UserError: if a value is not of its kind or out of its range.
    """

    model: str = setting("gpt2", "gpt2, gpt2-medium, gpt2-large, gpt2-xl, stdlib, or a folder")
    layer: int = setting(None, "the SAE sits on the residual stream entering this block", 0)
    loss: str = setting("e2e", "local, e2e, e2e_ds or finish")
    init: str = setting("", "start from this SAE: a run, a .pt file, apollo:NAME (none: random)")
    sparsity: float = setting(None, "λ, the weight of the features' L1 norm", 0)
    downstream: float = setting(None, "β, weight of later layers (2.5; GPT-2's layer 10: 0.05)", 0)
    n_features: int = setting(None, "dictionary elements (60 d_model, stdlib 16 d_model)", 1, 10**7)
    n_sequences: int = setting(None, "sequences to train on, in all", 1)
    context: int = setting(None, "tokens in a sequence", 2)
    batch_size: int = setting(None, "sequences in an optimizer step", 1)
    lr: float = setting(None, "Adam's learning rate; it falls to a tenth along a cosine", 0)
    warmup: int = setting(None, "sequences over which lr rises from zero (a twentieth of all)", 0)
    clip: float = setting(10.0, "the longest gradient: a longer one is scaled down", 0)
    n_eval: int = setting(500, "held-out sequences to evaluate on", 1)
    seed: int = setting(0, "of the SAE's first weights and of the order of the text", 0)
    dtype: str = setting(None, "float32 or bfloat16 products (bfloat16 if the GPU has it)")
    device: str = setting(None, "cuda, mps or cpu (the first of them that is there)")
    compile: bool = setting(None, "torch.compile the loss (with CUDA)")
    micro_batch: int = setting(None, "sequences in memory at once (the batch)", 1)
    log_steps: int = setting(10, "steps from one line of log.jsonl to the next", 1)
    checkpoint_minutes: float = setting(10.0, "minutes from one checkpoint to the next", 0)
    out: str = setting(None, "the run's folder (out/ and what is special about the run)")

    def __post_init__(self):
        self.check("model", type(self.model) is str, "a name or a folder")
        self.check("loss", self.loss in list(PAPER_SPARSITY), "local, e2e, e2e_ds or finish")
        usual = {f.name: f.default for f in fields(self)}  # what is not given becomes
        for name, (openai, other) in DEFAULTS.items():
            value = openai if self.model in gpt2.OPENAI else other
            usual[name] = value[self.loss] if isinstance(value, dict) else value
        usual["n_features"] = None  # known when d_model is: see `fit`
        usual["downstream"] = 0.05 if self.model in gpt2.OPENAI and self.layer == 10 else 2.5
        cuda, mps = torch.cuda.is_available(), torch.backends.mps.is_available()
        usual["device"] = "cuda" if cuda else "mps" if mps else "cpu"
        on_cuda = cuda and self.device in (None, "cuda")
        usual["compile"] = on_cuda
        half = on_cuda and torch.cuda.is_bf16_supported(including_emulation=False)
        usual["dtype"] = "bfloat16" if half else "float32"
        batch = usual["batch_size"] if self.batch_size is None else self.batch_size
        usual["micro_batch"] = batch
        n_sequences = usual["n_sequences"] if self.n_sequences is None else self.n_sequences
        usual["warmup"] = n_sequences // 20 if type(n_sequences) is int else 0
        for f in fields(self):
            if getattr(self, f.name) is None:
                setattr(self, f.name, usual[f.name])
            value, low = getattr(self, f.name), f.metadata["low"]
            high = f.metadata["high"] if f.type is int else 1e38
            if value is None:
                continue
            kinds = {int: "a whole number", float: "a number", str: "a word", bool: "true or false"}
            sound = type(value) is f.type or (f.type is float and type(value) is int)
            self.check(f.name, sound, kinds[f.type])
            if low is not None:  # NaN is in no range
                rule = f"{kinds[f.type]} from {low} to {high:,}"
                self.check(f.name, low <= value <= high, rule)
                setattr(self, f.name, f.type(value))
        self.check("dtype", self.dtype in ("float32", "bfloat16"), "float32 or bfloat16")
        self.check("device", self.device in ("cpu", "cuda", "mps"), "cuda, mps or cpu")
        here = {"cpu": True, "cuda": cuda, "mps": mps}[self.device]
        self.check("device", here, f"there: this machine has none, so {usual['device']}")
        self.check("micro_batch", batch % self.micro_batch == 0, f"a divisor of batch_size {batch}")
        self.check("n_sequences", self.n_sequences >= batch, f"at least a batch, {batch}")
        if self.out is None:
            name = f"{Path(self.model).name}-layer{self.layer}-{self.loss}"
            name += f"-sparsity{self.sparsity:g}"
            for key in usual:  # model, layer, loss, λ, and whatever else is not as usual
                named = key in ("model", "layer", "loss", "sparsity", *EXECUTION)
                if not named and getattr(self, key) != usual[key]:
                    value = str(getattr(self, key)).rstrip("/")  # an init is a path or a name
                    name += f"-{key}{re.split('[/:]', value)[-1]}"
            self.out = str(Path("out") / name)

    def check(self, name, sound, rule):
        """Raise UserError unless `sound`."""
        if not sound:
            value = str(getattr(self, name))[:80]
            raise UserError(f"--{name.replace('_', '-')} is {value}, must be {rule}: change it")

    def fit(self, gpt):
        """Fill in and check what depends on the model. Returns self."""
        sizes = gpt.config
        if self.n_features is None:
            self.n_features = DEFAULTS["n_features"][self.model not in gpt2.OPENAI] * sizes.n_embd
        top = sizes.n_layer - 1 - (self.loss == "e2e_ds")  # e2e_ds needs a layer after its own
        self.check("layer", self.layer <= top, f"at most {top} for {self.loss} on {self.model}")
        longest = sizes.n_positions
        self.check("context", self.context <= longest, f"at most {longest} on {self.model}")
        return self

    @classmethod
    def load(cls, path, flags={}):
        """Read a run's config.json, to go on with the run in that folder.

        Args:
            flags: settings given anew; only those in EXECUTION may differ.

        Raises:
            UserError: if it is missing, or a field of it is missing, unknown or out of range.
        """
        raw = gpt2.read_json(path)
        given = {name for name, value in raw.items() if value is not None}
        for name in sorted(given ^ {f.name for f in fields(cls)}):
            what = "is no setting" if name in raw else "is missing"
            raise UserError(f"{path}: {name[:80]} {what}: give the folder of a run of this version")
        raw["out"] = str(Path(path).parent)  # it may have been moved
        for name, value in flags.items():
            if value != raw[name] and (name not in EXECUTION or name == "out"):
                flag, was = "--" + name.replace("_", "-"), str(raw[name])[:80]
                raise UserError(f"{flag} is {value}, the run in {raw['out']} has {was}: "
                                "leave the flag out, or start another run")
        try:
            return cls(**raw | flags)
        except UserError as error:
            raise UserError(f"{path}: {error}") from None


# ------------------------------------------------------------------------------------------------
# The sparse autoencoder
# ------------------------------------------------------------------------------------------------


def read_torch(path):
    """The dict that torch.save wrote to a file, None if it is anything else. Runs no code in it."""
    with open(path, "rb") as file, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            value = torch.load(file, map_location="cpu", weights_only=True)
        except MemoryError:
            raise
        except Exception:  # what torch raises depends on where a file is damaged
            return None
    return value if isinstance(value, dict) and all(isinstance(key, str) for key in value) else None


# The paper's SAEs: repository, revision, and the hashes that are known beforehand
APOLLO = "apollo-research/e2e-saes-gpt2", "713515193ec799fd17bd7f6ccf6f209332b07f7d"
APOLLO_SHA256 = {
    "local_similar_ce_layer_6.pt":
        "c49a66c6d9ae4f6ff636d887f31957caf1cffc6375078fcf9f7eb637a00b4ee4",
    "downstream_similar_ce_layer_6.pt":
        "68a2aaad18bf2855fb6086ce68bdf6e54a6911a89918ae86b41fff2daee17712",
    "e2e_similar_ce_layer_10.pt":
        "f98c3f3f7f21431e4025515987c05ad1edf4a68b78935d7748cf81a0486a85cb",
}  # fmt: skip


class SAE(nn.Module):
    """The paper's sparse autoencoder (section 2): one hidden layer, ReLU, unit dictionary elements.

    The dictionary is normalised in the forward pass. Without that the features, and with them
    their L1 norm, could shrink for free while the decoder grows.
    """

    def __init__(self, d_model, n_features):
        super().__init__()
        self.encoder = nn.Linear(d_model, n_features)
        self.decoder = nn.Linear(n_features, d_model)
        # As PyTorch has it, (d_model, n_features), but an element's numbers side by side in memory
        self.decoder.weight = nn.Parameter(torch.empty(n_features, d_model).T)
        nn.init.orthogonal_(self.decoder.weight.T)  # as an (n_features, d_model) matrix
        self.made_for = {}  # of one that was loaded: {"model", "layer", "context"}

    @property
    def dictionary(self):
        """The dictionary elements, unit rows (n_features, d_model)."""
        norms = self.decoder.weight.norm(dim=0)
        return (self.decoder.weight * norms.clamp(min=1e-12).reciprocal()).T

    def encode(self, x):
        """x (..., d_model) -> features (..., n_features): none is negative, most are zero."""
        return F.relu(self.encoder(x))

    def decode(self, features):
        """features (..., n_features) -> x_hat (..., d_model)."""
        return features @ self.dictionary + self.decoder.bias

    def forward(self, x):
        """x (..., d_model) -> x_hat (..., d_model)."""
        return self.decode(self.encode(x))

    def save(self, folder, model, layer, context):
        """Write `cfg.json` and `sae_weights.safetensors`, as SAELens and its companions read them.

        Raises:
            UserError: if they cannot be written.
        """
        cfg = {"architecture": "standard", "d_in": self.encoder.in_features,
               "d_sae": self.encoder.out_features, "dtype": "float32", "device": "cpu",
               "apply_b_dec_to_input": False, "normalize_activations": "none",
               "reshape_activations": "none"}
        cfg["metadata"] = {"sae_lens_version": "6.0.0", "model_name": model,
                           "hook_name": f"blocks.{layer}.hook_resid_pre", "context_size": context,
                           "prepend_bos": False, "neuronpedia_id": None}
        tensors = {"W_enc": self.encoder.weight.T, "b_enc": self.encoder.bias,
                   "W_dec": self.dictionary, "b_dec": self.decoder.bias}
        gpt2.write_safetensors(Path(folder) / "sae_weights.safetensors", tensors)
        gpt2.write_json(Path(folder) / "cfg.json", cfg)

    @classmethod
    def load(cls, path_or_name, layer=None):
        """Load a trained SAE.

        Args:
            path_or_name: a folder that `save` or SAELens wrote; a .pt file of the paper's library;
                or `apollo:` and the name of one of theirs, as in apollo:e2e_similar_ce_layer_6.
            layer: which SAE, if a .pt file holds several.

        Returns:
            an SAE on the CPU; its `made_for` says for which model, layer and context.

        Raises:
            UserError: if there is none, or one of another kind than the paper's.
        """
        name, path = str(path_or_name), Path(path_or_name)

        def check(sound, what):
            if not sound:
                raise UserError(f"{name}: {what}; give the folder of a finished run, a .pt file of "
                                "the paper's library, or a name as apollo:e2e_similar_ce_layer_6")

        def take(tensors, keys):  # -> W_enc (n, d), b_enc (n,), W_dec (d, n), b_dec (d,), checked
            found = [tensors.get(key) for key in keys]
            floats = all(torch.is_tensor(t) and t.is_floating_point() for t in found)
            sound = floats and all(t.isfinite().all() for t in found)
            check(sound, f"one of {', '.join(keys)} is missing or not finite")
            weight, *others = [t.float() for t in found]
            n, d = weight.shape if weight.ndim == 2 else (0, 0)
            shapes = [tuple(t.shape) for t in others]
            fit = n * d > 0 and shapes == [(n,), (d, n), (d,)]
            check(fit, f"the shapes of {', '.join(keys)} do not fit")
            return weight, *others

        if name.startswith("apollo:"):
            file = name.removeprefix("apollo:") + ".pt"
            path = gpt2.DATA / "apollo" / file
            gpt2.download(gpt2.hub_url(*APOLLO, file), path, APOLLO_SHA256.get(file))
        if path.is_dir():
            check((path / "cfg.json").exists(), "there is no SAE in this folder")
            cfg = gpt2.read_json(path / "cfg.json")
            for key, plain in ("architecture", "standard"), ("normalize_activations", "none"):
                check(cfg.get(key) == plain, f"its {key} is not {plain!r}, as the paper's is")
            about = cfg.get("metadata") if isinstance(cfg.get("metadata"), dict) else {}
            place = re.fullmatch(r"blocks\.(\d{1,4})\.hook_resid_pre", str(about.get("hook_name")))
            check(place, "its hook_name is not blocks.N.hook_resid_pre, a stream entering a block")
            tensors = dict(gpt2.read_safetensors(path / "sae_weights.safetensors"))
            tensors |= {key: t.T for key, t in tensors.items() if t.ndim == 2}
            W_enc, b_enc, W_dec, b_dec = take(tensors, ["W_enc", "b_enc", "W_dec", "b_dec"])
            # SAEs of SAELens may have rows of any length, and take b_dec from their input: the same
            # function in our form has the lengths in the encoder and b_dec in its bias
            if cfg.get("apply_b_dec_to_input"):
                b_enc = b_enc - W_enc @ b_dec
            norms = W_dec.norm(dim=0)
            norms = torch.where((norms - 1).abs() < 1e-5, 1, norms)  # `save`'s stay as they are
            W_enc, b_enc = W_enc * norms[:, None], b_enc * norms
            model = "gpt2" if about.get("model_name") == "gpt2-small" else about.get("model_name")
            context, layer = about.get("context_size"), int(place[1])
        else:
            check(path.exists(), "there is no such file or folder")
            tensors = read_torch(path) or {}
            places = [re.match(r"blocks-(\d{1,4})-hook_resid_pre\.", key) for key in tensors]
            layers = sorted({int(place[1]) for place in places if place})
            check(layers, "there is no SAE in this file")
            known = len(layers) == 1 or layer in layers
            check(known, f"it holds SAEs of layers {layers}: choose one with --layer")
            layer = layers[0] if len(layers) == 1 else layer
            parts = "encoder.0.weight", "encoder.0.bias", "decoder.weight", "decoder.bias"
            keys = [f"blocks-{layer}-hook_resid_pre.{part}" for part in parts]
            W_enc, b_enc, W_dec, b_dec = take(tensors, keys)
            model, context = "gpt2", 1024
        with torch.device("meta"):  # the usual first weights would only be thrown away
            sae = cls(W_enc.shape[1], W_enc.shape[0])
        W_enc, W_dec = W_enc.contiguous(), W_dec.T.contiguous().T  # as __init__ lays them out
        weights = [t.clone() for t in (W_enc, b_enc, W_dec, b_dec)]
        sae.load_state_dict(dict(zip(sae.state_dict(), weights)), assign=True)
        sae.made_for = {"model": model, "layer": layer, "context": context}
        return sae


# PyTorch announces once that these tensors are new to it
warnings.filterwarnings("ignore", "Sparse (CSR tensor support|invariant checks)", UserWarning)


class ActiveOnly(torch.autograd.Function):
    """decode(encode(x)), and its gradients, from the active features alone: only for speed.

    Where a feature is zero it adds nothing to x_hat, nothing comes back to it, and no row of the
    encoder or the dictionary gets a gradient from it. With 200 of 46,080 active, only the encoder's
    own product remains of the SAE's five; the others become sums over (token, feature) pairs.
    """

    @staticmethod
    def usable(features, x, n_active):
        """Whether it can be used (not compiled, MKL on a CPU) and pays (one in twenty active)."""
        if torch.compiler.is_compiling() or x.device.type != "cpu" or features.dtype != x.dtype:
            return False  # another dtype: autocast's
        return bool(n_active < features.numel() / 20) and torch.backends.mkl.is_available()

    @staticmethod
    def forward(ctx, x, W_enc, b_enc, dictionary, features):
        """From x (batch, pos, d_model), the parameters, and features = relu(W_enc x + b_enc).

        Returns:
            (x_hat (batch, pos, d_model) without b_d, the active features, 1-D), both with gradient.
        """
        active = features.flatten(0, 1).to_sparse_csr()  # for each token which are not 0, and these
        ctx.save_for_backward(x, dictionary, active)
        return (active @ dictionary).view_as(x), active.values().clone()

    @staticmethod
    def backward(ctx, grad_x_hat, grad_values):
        """Gradients of encoder, its bias and dictionary; none of x."""
        x, dictionary, active = ctx.saved_tensors
        x, grad_x_hat = x.flatten(0, 1), grad_x_hat.flatten(0, 1)  # (token, d_model)
        n_tokens, n_features = active.shape
        back = torch.sparse.sampled_addmm(active, grad_x_hat, dictionary.T, beta=0).values()
        grad_pre = back + grad_values  # of W_enc x + b_enc, where a feature is active
        token = torch.arange(n_tokens).repeat_interleave(active.crow_indices().diff())
        feature, order = active.col_indices().sort(stable=True)  # now feature by feature
        starts = F.pad(feature.bincount(minlength=n_features).cumsum(0), (1, 0))
        shape = n_features, n_tokens
        by_feature = [torch.sparse_csr_tensor(starts, token[order], values[order], shape)
                      for values in (grad_pre, active.values())]
        grad_W_enc, grad_dictionary = by_feature[0] @ x, by_feature[1] @ grad_x_hat
        grad_b_enc = x.new_zeros(n_features).index_add_(0, feature, grad_pre[order])
        return None, grad_W_enc, grad_b_enc, grad_dictionary, None


# ------------------------------------------------------------------------------------------------
# The loss terms (section 2 of the paper): each a mean over the tokens of a batch
# ------------------------------------------------------------------------------------------------


def mse_loss(x_hat, x):
    """Mean over tokens and d_model of (x_hat - x)^2, for two (batch, pos, d_model)."""
    return F.mse_loss(x_hat, x)


def sparsity_loss(features, d_model):
    """Mean over tokens of the L1 norm of features (batch, pos, n_features), divided by d_model."""
    dtype = torch.promote_types(features.dtype, torch.float32)  # bfloat16 is too coarse for sums
    return features.sum(-1, dtype=dtype).mean() / d_model  # as mse is a mean over d_model


def downstream_loss(spliced, clean):
    """Mean over the later layers of the MSE between their residual streams.

    Args:
        spliced, clean: lists of the residual streams (batch, pos, d_model) entering each of them.
    """
    return torch.stack([F.mse_loss(s, c) for s, c in zip(spliced, clean, strict=True)]).mean()


class KLLoss(torch.autograd.Function):
    """Mean over positions of KL(clean || spliced), with never all the logits in memory.

    For one position let p be the softmax of the clean logits y, q that of the spliced logits y_hat:

        KL = sum_v p_v (log p_v - log q_v),    log q_v = y_hat_v - log sum_w exp y_hat_w,

    and since sum_v p_v = 1,  d KL / d y_hat_v = q_v - p_v.  The unembedding y_hat = W h, of what
    ln_f makes of the spliced stream, is frozen, so d KL / d h = W^T (q - p): the gradient is at
    hand as soon as p and q are. So `forward` takes a chunk of positions at a time, adds up KL,
    keeps the gradient (pos, d_model), and forgets the logits (pos, vocab: GPT-2 has 50,257).
    """

    @staticmethod
    def forward(ctx, h_spliced, h_clean, unembedding, chunk=None):
        """KL between the next-token distributions of two runs.

        Args:
            h_spliced, h_clean: what the unembedding is applied to, (pos, d_model) each.
            unembedding: (vocab, d_model), frozen.
            chunk: positions at a time; if None, so many that their logits take 32 MB in float32,
                on a GPU 256 MB. Four times that is in use.

        Returns:
            the mean KL in nats; its gradient reaches `h_spliced` alone.
        """
        n, vocab = len(h_spliced), len(unembedding)
        if chunk is None:
            n_chunks = math.ceil(n * vocab / (2**26 if h_spliced.is_cuda else 2**24))
            chunk = 64 * math.ceil(n / n_chunks / 64)  # products are slow at odd widths
        kl, gradient = 0.0, torch.empty_like(h_spliced)
        for s, c, g in zip(h_spliced.split(chunk), h_clean.split(chunk), gradient.split(chunk)):
            y = unembedding @ c.T  # (vocab, chunk)
            y = y.to(torch.promote_types(y.dtype, torch.float32))
            y_hat = y + unembedding @ (s - c).T  # so bfloat16 rounds both runs' logits alike
            log_p, log_q = F.log_softmax(y, 0), F.log_softmax(y_hat, 0)
            del y, y_hat
            p = log_p.exp()
            kl = kl + log_p.sub_(log_q).mul_(p).sum()  # in place: from here on log_p is not log p
            g.copy_(log_q.exp_().sub_(p).T @ unembedding)  # nor log_q log q, but q - p
        ctx.save_for_backward(gradient.div_(len(h_spliced)))
        return kl / len(h_spliced)

    @staticmethod
    def backward(ctx, grad_kl):
        """d KL / d h_spliced, times what comes from above."""
        (gradient,) = ctx.saved_tensors
        return gradient * grad_kl, None, None, None


# ------------------------------------------------------------------------------------------------
# The spliced forward pass and the three losses
# ------------------------------------------------------------------------------------------------


def run_blocks(gpt, x, first, last=None):
    """The residual stream (batch, pos, d_model) through the blocks first to last - 1.

    Returns:
        the residual streams entering each of those blocks, the first being x, and the one leaving
        the last of them.
    """
    residuals = [x]
    for block in gpt.h[first:last]:
        residuals.append(block(residuals[-1]))
    return residuals


def compute_loss(gpt, sae, tokens, config):
    """One of the losses, on one batch. Only the SAE's parameters get a gradient.

    With "finish", Karvonen's mix (arXiv 2503.17272) for the last steps of an SAE that was trained
    with "local": kl, scaled to the size that mse has, and mse, half of each.

    Args:
        gpt: a frozen GPT.
        sae: an SAE of its d_model.
        tokens: (batch, pos).
        config: its loss, layer, sparsity (λ) and downstream (β) are used.

    Returns:
        (loss, terms): the scalar to minimise, and its parts before they are weighted, with "l0",
        the mean number of active features a token.
    """
    layer = config.layer
    with torch.no_grad():
        x = run_blocks(gpt, gpt.embed(tokens), 0, layer)[-1]  # (batch, pos, d_model)
    features = sae.encode(x)  # (batch, pos, n_features)
    n_active = features.count_nonzero()
    terms = {"l0": n_active / tokens.numel()}
    if ActiveOnly.usable(features, x, n_active):  # the same, sooner
        parameters = *sae.encoder.parameters(), sae.dictionary
        x_hat, active = ActiveOnly.apply(x, *parameters, features.detach())
        terms["sparsity"] = active.sum() / x.numel()
        x_hat = x_hat + sae.decoder.bias
    else:
        terms["sparsity"] = sparsity_loss(features, x.shape[-1])
        x_hat = sae.decode(features).to(x.dtype)  # (batch, pos, d_model); bfloat16 under autocast
    penalty = config.sparsity * terms["sparsity"]
    del features  # the largest tensor of all: not needed any more, unless for the backward pass

    if config.loss == "local":  # the rest of the model does not run at all
        terms["mse"] = mse_loss(x_hat, x)
        return terms["mse"] + penalty, terms

    with torch.no_grad():
        clean = run_blocks(gpt, x, layer)  # entering layer, layer + 1, ..., leaving the last block
    spliced = run_blocks(gpt, x_hat, layer)
    final = [gpt.ln_f(run[-1]).flatten(0, 1) for run in (spliced, clean)]  # (tokens, d_model) each
    terms["kl"] = KLLoss.apply(*final, gpt.wte.weight)
    if config.loss == "e2e":
        return terms["kl"] + penalty, terms
    if config.loss == "finish":
        terms["mse"] = mse_loss(x_hat, x)
        alpha = (terms["mse"] / terms["kl"]).detach()
        return 0.5 * (alpha * terms["kl"] + terms["mse"]) + penalty, terms

    terms["downstream"] = downstream_loss(spliced[1:-1], clean[1:-1])  # layer + 1 ... n_layer - 1
    return 0.5 * terms["kl"] + config.downstream * terms["downstream"] + penalty, terms


# ------------------------------------------------------------------------------------------------
# Evaluation
# ------------------------------------------------------------------------------------------------


def windows(tokens, context):
    """A 1-D array of token ids cut into (sequence, context), without overlap and without a copy.

    Raises:
        UserError: if the text is shorter than one sequence.
    """
    n = len(tokens) // context
    if n == 0:
        raise UserError(f"--context is {context:,}, the text has {len(tokens):,} tokens, must have "
                        "at least one sequence: give a shorter context, or another text")
    return tokens[: n * context].reshape(n, context)


def held_out(config):
    """The held-out sequences to evaluate on, (n_eval, context)."""
    return windows(gpt2.load_tokens(config.model, "val"), config.context)[: config.n_eval]


def to_device(rows, device):
    """Token ids (batch, pos), a numpy array of any integer type, as int64 on the device."""
    tokens = torch.from_numpy(rows.astype(np.int64))
    if device.type == "cuda":  # from pinned memory the copy does not wait for the GPU
        return tokens.pin_memory().to(device, non_blocking=True)
    return tokens.to(device)


def sum_over_ranks(tensor):
    """Add up a tensor over the processes that torchrun started, in place; alone, do nothing."""
    if dist.is_initialized():
        dist.all_reduce(tensor)
    return tensor


@torch.no_grad()
def evaluate(gpt, sae, tokens, layer):
    """What it costs the model to run on x_hat instead of x (section 2 of the paper).

    Args:
        gpt, sae: on one device.
        tokens: (sequence, pos), an array or a tensor.
        layer: where the SAE sits.

    Returns:
        a dict of numbers and lists, fit for JSON. In nats per token: `ce` of the clean model, for
        the next token; `ce_spliced`; `ce_increase`; `ce_ablated`, with x replaced by its mean over
        all tokens; `kl`. As shares: `ce_recovered` of what ablation costs; `top1_agreement`;
        `explained_variance`, 1 - sum |x_hat - x|^2 / sum |x - mean x|^2. Then `l0`, active features
        a token; `alive`, elements that fire at least once in `tokens`, of `n_features`; `mse`;
        `l2_ratio`, the mean of |x_hat| / |x| after position 0, and `l2_ratio_first` at position 0,
        where GPT-2's x is many times longer; `mse_by_layer` and `explained_variance_by_layer` of
        the residual streams entering `layer`, `layer` + 1, ...; and how many `tokens` there were.
    """
    device = sae.encoder.weight.device
    tokens = np.asarray(tokens)
    n_tokens = tokens.size
    rank, world = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    mine = np.array_split(tokens, world)[rank]
    batches = np.array_split(mine, max(1, math.ceil(mine.size / 2048)))  # the logits are large
    double = torch.float32 if device.type == "mps" else torch.float64  # mps has no float64

    mean = torch.zeros(sae.encoder.in_features, dtype=double, device=device)
    for rows in batches:
        x = run_blocks(gpt, gpt.embed(to_device(rows, device)), 0, layer)[-1]
        mean += x.sum((0, 1), dtype=double)
    mean = (sum_over_ranks(mean) / n_tokens).to(gpt.wte.weight.dtype)

    sums = {}  # name -> a sum over tokens, of any shape
    progress = Progress("evaluating", mine.size, "tokens") if rank == 0 else lambda done: None
    done = 0

    def add(name, value):
        sums[name] = sums.get(name, 0) + value.to(double)

    for rows in batches:
        batch = to_device(rows, device)
        x = run_blocks(gpt, gpt.embed(batch), 0, layer)[-1]
        features = sae.encode(x)
        x_hat = sae.decode(features)
        clean, spliced = run_blocks(gpt, x, layer), run_blocks(gpt, x_hat, layer)
        ablated = run_blocks(gpt, mean.expand_as(x).contiguous(), layer)
        logits = [gpt.unembed(residuals[-1]) for residuals in (clean, spliced, ablated)]
        for name, y in zip(("ce", "ce_spliced", "ce_ablated"), logits):
            guesses, truth = y[:, :-1].flatten(0, 1), batch[:, 1:].flatten()
            add(name, F.cross_entropy(guesses, truth, reduction="sum"))
        log_p, log_q = (F.log_softmax(y, -1) for y in logits[:2])
        add("kl", F.kl_div(log_q, log_p, log_target=True, reduction="sum"))
        add("top1_agreement", (logits[0].argmax(-1) == logits[1].argmax(-1)).sum())
        add("fired", (features > 0).sum((0, 1)))
        ratio = x_hat.norm(dim=-1) / x.norm(dim=-1)  # (batch, pos)
        add("l2_ratio", ratio[:, 1:].sum())
        add("l2_ratio_first", ratio[:, 0].sum())
        for k, (s, c) in enumerate(zip(spliced[:-1], clean[:-1]), layer):
            add(f"error {k}", (s - c).pow(2).sum(dtype=double))
            add(f"square {k}", c.pow(2).sum(dtype=double))
            add(f"sum {k}", c.sum((0, 1), dtype=double))
        progress(done := done + rows.size)

    sums = {name: sum_over_ranks(value).cpu() for name, value in sums.items()}
    n_sequences, d_model, layers = len(tokens), len(mean), range(layer, len(gpt.h))
    n_guesses = n_tokens - n_sequences  # no next token after the last; no position 0
    ce, ce_spliced, ce_ablated = (
        float(sums[name]) / n_guesses for name in ("ce", "ce_spliced", "ce_ablated")
    )
    error = [float(sums[f"error {k}"]) for k in layers]
    variance = [
        float(sums[f"square {k}"] - sums[f"sum {k}"].pow(2).sum() / n_tokens) for k in layers
    ]
    explained = [1 - e / v for e, v in zip(error, variance)]
    mse = [e / (n_tokens * d_model) for e in error]
    return {
        "ce": ce,
        "ce_spliced": ce_spliced,
        "ce_increase": ce_spliced - ce,
        "ce_ablated": ce_ablated,
        "ce_recovered": 1 - (ce_spliced - ce) / (ce_ablated - ce),
        "kl": float(sums["kl"]) / n_tokens,
        "top1_agreement": float(sums["top1_agreement"]) / n_tokens,
        "l0": float(sums["fired"].sum()) / n_tokens,
        "alive": int((sums["fired"] > 0).sum()),
        "n_features": len(sums["fired"]),
        "explained_variance": explained[0],
        "mse": mse[0],
        "l2_ratio": float(sums["l2_ratio"]) / n_guesses,
        "l2_ratio_first": float(sums["l2_ratio_first"]) / n_sequences,
        "explained_variance_by_layer": explained,
        "mse_by_layer": mse,
        "tokens": n_tokens,
    }


def print_table(columns):
    """Print the results of `evaluate` side by side: {name: result}, one column each."""
    rows = [
        ("tokens", "tokens", ",d"),
        ("CE of the model (nats)", "ce", ".4f"),
        ("CE with the SAE", "ce_spliced", ".4f"),
        ("CE increase", "ce_increase", ".4f"),
        ("CE recovered, of mean ablation", "ce_recovered", ".2%"),
        ("KL (nats)", "kl", ".4f"),
        ("top-1 agreement", "top1_agreement", ".2%"),
        ("L0, active features a token", "l0", ".1f"),
        ("alive elements", "alive", ",d"),
        ("  of", "n_features", ",d"),
        ("|x_hat| / |x|", "l2_ratio", ".3f"),
        ("  at position 0", "l2_ratio_first", ".3f"),
    ]
    width = max(14, *map(len, columns)) + 2
    lines = [("", list(columns))]
    for label, key, spec in rows:
        lines.append((label, [format(result[key], spec) for result in columns.values()]))
    for label, key in ("explained variance", "explained_variance"), ("MSE", "mse"):
        series = [result[key + "_by_layer"] for result in columns.values()]
        for k in range(max(map(len, series))):
            where = "at the SAE" if k == 0 else f"{k} layer{'s' * (k > 1)} later"
            cells = [f"{values[k]:.4f}" if k < len(values) else "-" for values in series]
            lines.append((f"{label}, {where}", cells))
    for label, cells in lines:
        print(f"{label:<34}" + "".join(f"{cell:>{width}}" for cell in cells))


# ------------------------------------------------------------------------------------------------
# Training
# ------------------------------------------------------------------------------------------------

CHECKPOINT = "e2e_sae checkpoint 1"  # the version: what is in a checkpoint


class RunFailed(UserError):
    """A run that ends underway. What it had saved is whole."""

    exit_code = 1


@lru_cache(maxsize=2)
def permutation(seed, epoch, n):
    """The order in which an epoch takes the n windows of the text."""
    return np.random.default_rng([seed, epoch]).permutation(n)


def sequences(text, seed, first, count):
    """Training sequences number first to first + count - 1: (count, context).

    They depend on nothing else. So any step can be made again by itself, and neither a resumed run
    nor one on several GPUs sees other text.
    """
    n = len(text)
    rows = [permutation(seed, i // n, n)[i % n] for i in range(first, first + count)]
    return np.stack([text[row] for row in rows])


def learning_rate(config, done):
    """The learning rate after `done` sequences: up a line, then down a cosine to a tenth."""
    if done < config.warmup:
        return config.lr * done / config.warmup
    progress = (done - config.warmup) / max(1, config.n_sequences - config.warmup)
    return config.lr * (0.55 + 0.45 * math.cos(math.pi * progress))


def join_ranks(config):
    """Join the other processes, if torchrun started this one.

    Returns:
        (rank, world, device): which process this is, of how many, and what it computes on.
    """
    world = int(os.environ.get("WORLD_SIZE", "1"))
    local_rank = int(os.environ.get("LOCAL_RANK", "0"))
    device = torch.device(config.device, local_rank if config.device == "cuda" else None)
    if device.type == "cuda":
        n = torch.cuda.device_count()
        config.check("device", local_rank < n, f"a GPU for each process, there are {n}")
        torch.cuda.set_device(device)
    if world == 1:
        return 0, 1, device
    share, rest = divmod(config.batch_size, world)
    config.check("batch_size", rest == 0, f"a multiple of {world}, the number of processes")
    rule = f"a divisor of {share}, each process's share of a batch"
    config.check("micro_batch", share % min(config.micro_batch, share) == 0, rule)
    if not dist.is_initialized():
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    return dist.get_rank(), world, device


def keep_freed_memory():
    """Have Linux's C library keep what is freed, for the next step.

    Otherwise the memory of large tensors goes back to the system, to be mapped and zeroed again at
    every use, which takes a seventh of a step on the CPU.
    """
    mallopt = sys.platform == "linux" and getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt:  # glibc has it
        mallopt(-4, 0)  # M_MMAP_MAX: all from the heap
        mallopt(-1, -1)  # M_TRIM_THRESHOLD: which never shrinks


def start_folder(config):
    """Make the run's folder with its config.json at one stroke: of two who try, one succeeds.

    Raises:
        UserError: if it is there already, or cannot be made.
    """
    out = Path(config.out)
    if not out.exists():
        beside = out.with_name(f"{out.name}.{os.getpid()}.part")
        try:
            gpt2.write_json(beside / "config.json", asdict(config))
            os.rename(beside, out)
            return
        except (OSError, UserError) as error:
            shutil.rmtree(beside, ignore_errors=True)
            if not out.exists():
                raise UserError(f"cannot make {out}: {error}; choose another with --out") from None
    raise UserError(f"{out} is there already: go on with --resume {out}, or choose another --out")


def load_checkpoint(path, sae, optimizer, config):
    """Put a checkpoint back into `sae` and `optimizer`.

    Returns:
        how many steps it has behind it.

    Raises:
        UserError: if it is damaged, or of another version or run; the file stays as it is.
    """
    remedy = "it is left as it is; delete it, and --resume starts from the first step"
    saved = read_torch(path) or {}
    if saved.get("version") != CHECKPOINT:
        raise UserError(f"{path} is damaged or of another version: {remedy}")
    try:
        for name, value in asdict(config).items():
            if name not in EXECUTION and saved["config"][name] != value:
                raise UserError(f"{path} is of a run with {name} {saved['config'][name]}, "
                                f"config.json beside it has {value}: {remedy}")
        sae.load_state_dict(saved["sae"])
        optimizer.load_state_dict(saved["adam"])
        return int(saved["step"])
    except (UserError, torch.OutOfMemoryError):
        raise
    except Exception:  # what torch raises depends on what is missing
        raise UserError(f"{path} is damaged: {remedy}") from None


def open_log(path, step):
    """Open log.jsonl to append to, without the lines of steps after `step`, or a line half written.

    Raises:
        UserError: if there is something else in it.
    """
    kept = b""
    for line in path.read_bytes().splitlines(keepends=True) if path.exists() else ():
        try:
            if not line.endswith(b"\n") or json.loads(line)["step"] > step:
                break
        except (ValueError, KeyError, TypeError):
            raise UserError(f"{path} is no log of a run: move it away, and resume again") from None
        kept += line
    gpt2.write_atomic(path, lambda file: file.write(kept))
    return open(path, "a")


@contextmanager
def noted_signals(rank):
    """Within, SIGTERM and Ctrl-C end nothing: their numbers go to the list that this yields.

    Ranks other than the first ignore them: they are needed until it has finished its step.
    """
    came = []
    note = (lambda number, frame: came.append(number)) if rank == 0 else signal.SIG_IGN
    before = {number: signal.signal(number, note) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield came
    finally:
        for number, handler in before.items():  # the first ends the process: no second disturbs it
            signal.signal(number, signal.SIG_IGN if came else handler)


@contextmanager
def worded_failures(out):
    """Within, what can befall a run becomes a RunFailed that says how to go on."""
    try:
        yield
    except RunFailed:
        raise
    except torch.OutOfMemoryError:
        remedy = f"go on with --resume {out} and a smaller --micro-batch"
        raise RunFailed(f"the GPU's memory is full: {remedy}") from None
    except (OSError, UserError) as error:
        raise RunFailed(f"the run stopped: {error}; then go on with --resume {out}") from None
    except RuntimeError as error:
        if not (isinstance(error, dist.DistError) or "gloo" in str(error)):
            raise  # not what another process's end brings about
        reason = str(error).splitlines()[0][:100]
        raise RunFailed(f"the run stopped, for another of its processes did ({reason}); "
                        f"go on with --resume {out}") from None


def train(config, resume=False):
    """Train an SAE with one of the three losses (section 2 of the paper; its settings in DEFAULTS).

    Under torchrun each process takes its share of every batch, and the first one writes the files.

    Args:
        config: a Config; what depends on the model is filled in.
        resume: go on with the run in `config.out` from its checkpoint.

    Returns:
        the SAE. In the folder `config.out` are then config.json, log.jsonl, checkpoint.pt, the SAE
        (cfg.json, sae_weights.safetensors), and eval.json with the result of `evaluate`.

    Raises:
        UserError: if something is wrong at the start; nothing has been written.
        RunFailed: if the run ends underway (disk full, not finite, ...); its checkpoint stands.
        SystemExit: with 143 at SIGTERM, 130 at Ctrl-C, after a checkpoint.
    """
    torch.set_float32_matmul_precision("high")  # TF32, where the GPU has it
    keep_freed_memory()
    rank, world, device = join_ranks(config)
    gpt = GPT.from_pretrained(config.model)
    out = Path(config.out)
    path = out / "checkpoint.pt"
    resumed = resume and path.exists()
    started = config.init and not resumed and SAE.load(config.init, config.layer)
    if started and config.n_features is None:
        config.n_features = started.encoder.out_features
    config.fit(gpt)
    if started:
        n, d = started.encoder.weight.shape
        sizes = started.made_for["layer"], d, n
        wanted = config.layer, gpt.config.n_embd, config.n_features
        say = "of layer {}, d_model {} and {} elements".format
        config.check("init", sizes == wanted, f"{say(*wanted)}, it is {say(*sizes)}")
    text = windows(gpt2.load_tokens(config.model, "train"), config.context)
    val = held_out(config)
    gpt.to(device)
    torch.manual_seed(config.seed)  # of the CPU's generator: the same first weights on every device
    sae = SAE(gpt.config.n_embd, config.n_features).to(device)
    if started:
        sae.load_state_dict(started.state_dict())
    optimizer = torch.optim.Adam(sae.parameters(), lr=config.lr, fused=True)
    loss_of = torch.compile(compute_loss, fullgraph=True) if config.compile else compute_loss
    autocast = torch.autocast(device.type, torch.bfloat16, enabled=config.dtype == "bfloat16")
    n_steps, share = config.n_sequences // config.batch_size, config.batch_size // world
    failed = torch.zeros((), device=device)  # 1 from the first step on that is not finite
    n_good = torch.zeros((), device=device)  # how many steps there were before that

    if rank == 0 and not resume:
        start_folder(config)
    with ExitStack() as stack:
        if rank == 0:
            stack.enter_context(gpt2.lock(out, wait=False))
        step = began = load_checkpoint(path, sae, optimizer, config) if resumed else 0
        log = stack.enter_context(open_log(out / "log.jsonl", step)) if rank == 0 else None
        stack.enter_context(worded_failures(out))
        if rank == 0:
            on = f"{device.type} x {world}, {config.dtype}" + ", compiled" * config.compile
            print(f"{config.loss} SAE, {config.n_features:,} elements, on the residual stream "
                  f"entering layer {config.layer} of {config.model}: {config.n_sequences:,} "
                  f"sequences of {config.context} tokens, on {on} -> {out}", flush=True)
        saved_at = printed_at = logged_at = time.time()
        logged_step = step
        with noted_signals(rank) as signals:
            while step < n_steps:
                first = step * config.batch_size + rank * share
                tokens = to_device(sequences(text, config.seed, first, share), device)
                sums = 0  # of the loss and its terms
                for part in tokens.split(min(config.micro_batch, share)):
                    with autocast:
                        loss, terms = loss_of(gpt, sae, part, config)
                    weight = len(part) / config.batch_size
                    (loss * weight).backward()
                    sums = sums + torch.stack([loss, *terms.values()]).detach() * weight
                for tensor in (sums, *(p.grad for p in sae.parameters())):
                    sum_over_ranks(tensor)
                norm = nn.utils.clip_grad_norm_(sae.parameters(), config.clip)
                # No step waits for the GPU to see whether all is finite. From the first that is
                # not, the GPU itself holds the optimizer still, and the host looks now and then.
                failed = torch.maximum(failed, (~torch.isfinite(norm + sums[0])).float())
                n_good = n_good + 1 - failed
                optimizer.found_inf = failed  # where this is 1, fused Adam leaves all as it is
                step += 1
                lr = learning_rate(config, step * config.batch_size)
                optimizer.param_groups[0]["lr"] = lr
                optimizer.step()
                optimizer.zero_grad()

                # What is left of the loop keeps the books
                now, stop = time.time(), bool(signals)
                log_due = step % config.log_steps == 0 or step in (1, n_steps)
                timely = rank == 0 and now - saved_at >= 60 * config.checkpoint_minutes
                save_due = timely or stop or step == n_steps
                if not log_due and not save_due:
                    continue
                if failed:
                    last = f"the last checkpoint is {path}" if path.exists() else "no checkpoint"
                    raise RunFailed(f"step {began + int(n_good) + 1:,}: the loss or its gradient "
                                    f"is not finite ({last}); try an --lr below {config.lr:g}")
                if log_due and rank == 0:
                    tokens_done = (step - logged_step) * config.batch_size * config.context
                    speed = tokens_done / (time.time() - logged_at)
                    logged_step, logged_at = step, time.time()
                    values = dict(zip(["loss", *terms], sums.tolist()), grad_norm=norm.item())
                    line = {"step": step, "sequences": step * config.batch_size, **values}
                    line |= {"lr": lr, "tokens_per_second": speed}
                    log.write(json.dumps(line) + "\n")
                    log.flush()
                    if now - printed_at > 2 or step in (1, n_steps):
                        printed_at = now
                        left = (n_steps - step) * config.batch_size * config.context / speed
                        shown = "  ".join(f"{name} {value:.4g}" for name, value in values.items())
                        print(f"step {step:,}/{n_steps:,}  {shown}  {speed:,.0f} tokens/s  "
                              f"{duration(left)} left", flush=True)
                if save_due and rank == 0:
                    saved = {"version": CHECKPOINT, "step": step, "sae": sae.state_dict(),
                             "adam": optimizer.state_dict(), "config": asdict(config)}
                    os.fsync(log.fileno())  # the log is never behind the checkpoint
                    gpt2.write_atomic(path, lambda file: torch.save(saved, file))
                    saved_at = time.time()
                if stop:
                    print(f"stopped after step {step:,}: go on with --resume {out}", flush=True)
                    raise SystemExit(128 + signals[0])

        if rank == 0:
            sae.save(out, config.model, config.layer, config.context)
        # What was written has unit rows in its decoder: evaluate the very numbers that `load` gives
        sae.decoder.weight.data = sae.dictionary.detach().T
        result = evaluate(gpt, sae, val, config.layer)
        if rank == 0:
            gpt2.write_json(out / "eval.json", result)
    if world > 1:
        dist.destroy_process_group()
    return sae


# ------------------------------------------------------------------------------------------------
# How fast it would be here
# ------------------------------------------------------------------------------------------------


def flops_per_token(sizes, n_features, config):
    """Floating-point operations of one training step's matrix products, per token.

    With d = d_model, a block has 24 d^2, the unembedding 2 d vocab, one product of the SAE 2 d
    n_features. The SAE has five: encoder and decoder, and back the gradients of both weights and of
    the features. The blocks before `layer` run once; the rest, unless the loss is local, three
    times: clean, spliced, and back through spliced. Attention's own products, which grow with the
    context, are left out.
    """
    d = sizes.n_embd
    before = config.layer * 24 * d * d
    rest = (sizes.n_layer - config.layer) * 24 * d * d + 2 * d * sizes.vocab_size
    return before + 5 * 2 * d * n_features + (0 if config.loss == "local" else 3 * rest)


def benchmark(config):
    """Print, for each loss, how fast a step's forward and backward pass is on this machine.

    The share is that of the rate which one large matrix product of the same dtype reaches here just
    before. Weights are random if the model's files are not there, which does not change the speed.
    """
    device = torch.device(config.device)
    torch.set_float32_matmul_precision("high")
    keep_freed_memory()
    weights = gpt2.DATA / config.model / "model.safetensors"
    if config.model in gpt2.OPENAI and not weights.exists():
        print(f"the weights of {config.model} are not here: random ones of its shapes are used")
        gpt = GPT(GPTConfig(*gpt2.OPENAI[config.model]))
        for parameter in gpt.parameters():
            nn.init.normal_(parameter, std=0.02)
    else:
        gpt = GPT.from_pretrained(config.model)
    config.fit(gpt)
    gpt.to(device)
    wait = torch.accelerator.synchronize if device.type != "cpu" else lambda: None
    autocast = torch.autocast(device.type, torch.bfloat16, enabled=config.dtype == "bfloat16")

    def seconds(work):  # of one call: the mean of at least three, and of three seconds of them
        work()
        wait()
        start, calls = time.time(), 0
        while calls < 3 or time.time() - start < 3:
            work()
            wait()
            calls += 1
        return (time.time() - start) / calls

    print(f"{config.model}, layer {config.layer}, {config.n_features:,} elements, "
          f"{config.micro_batch} x {config.context} tokens, {device}, {config.dtype}, "
          f"{torch.get_num_threads()} threads, compile {'on' if config.compile else 'off'}")
    print(f"{'loss':8}{'tokens/s':>10}{'MFLOP/token':>13}{'GFLOP/s':>10}{'product':>10}{'share':>7}"
          f"{'peak GB':>9}   {config.n_sequences:,} sequences")
    for loss in ("local", "e2e", "e2e_ds"):
        one = replace(config, loss=loss).fit(gpt)
        torch.manual_seed(config.seed)
        sae = SAE(gpt.config.n_embd, config.n_features).to(device)
        shape = config.micro_batch, config.context
        tokens = torch.randint(gpt.config.vocab_size, shape, device=device)
        loss_of = torch.compile(compute_loss, fullgraph=True) if config.compile else compute_loss
        n = 8192 if device.type == "cuda" else 2048
        square = torch.randn(2, n, n, device=device, dtype=getattr(torch, config.dtype))

        def step(sae=sae, loss_of=loss_of, tokens=tokens, one=one):
            sae.zero_grad()
            with autocast:
                value, _ = loss_of(gpt, sae, tokens, one)
            value.backward()

        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
        rate = 2 * n**3 / seconds(lambda: square[0] @ square[1])
        speed = tokens.numel() / seconds(step)
        flops = flops_per_token(gpt.config, config.n_features, one)
        if device.type == "cuda":
            peak = torch.cuda.max_memory_allocated()
        else:  # of the whole process so far
            import resource  # Windows has it not

            unit = 1 if sys.platform == "darwin" else 1024
            peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
        time_needed = duration(config.n_sequences * config.context / speed)
        done = speed * flops
        print(f"{loss:8}{speed:10,.0f}{flops / 1e6:13,.1f}{done / 1e9:10,.1f}{rate / 1e9:10,.1f}"
              f"{done / rate:7.0%}{peak / 1e9:9.2f}   {time_needed}", flush=True)


# ------------------------------------------------------------------------------------------------
# The method ends here. What follows looks at what came out of it: first, which tokens fire what
# ------------------------------------------------------------------------------------------------


@torch.no_grad()
def residuals(gpt, tokens, layer):
    """The residual stream entering `layer` on tokens (sequence, pos), as (token, d_model)."""
    rows = np.array_split(np.asarray(tokens), math.ceil(tokens.size / 8192))
    device = gpt.wte.weight.device
    runs = (run_blocks(gpt, gpt.embed(to_device(part, device)), 0, layer)[-1] for part in rows)
    return torch.cat([x.flatten(0, 1) for x in runs])


@torch.no_grad()
def firings(encode, x):
    """Which tokens make which features fire, and how strongly.

    Args:
        encode: x (token, d_model) -> features (token, n_features).

    Returns:
        (starts, token, value), numpy arrays: feature i fires at token[starts[i] : starts[i + 1]],
        in the order of the text, with `value` there.
    """
    found = []
    for first, part in zip(range(0, len(x), 4096), x.split(4096)):
        features = encode(part)
        token, feature = features.nonzero(as_tuple=True)
        found.append((feature.cpu(), (token + first).cpu(), features[token, feature].cpu()))
    feature, token, value = (torch.cat(parts) for parts in zip(*found))
    order = feature.argsort(stable=True)
    counts = feature.bincount(minlength=features.shape[1])
    starts = F.pad(counts.cumsum(0), (1, 0))
    return starts.numpy(), token[order].numpy(), value[order].numpy()


# ------------------------------------------------------------------------------------------------
# --plot: the paper's Pareto curves
# ------------------------------------------------------------------------------------------------


def plot(folders, path):
    """Draw CE increase against L0 and against alive elements, and MSE at each later layer.

    Raises:
        UserError: if a folder is no finished run, or matplotlib is missing.
    """
    try:
        import matplotlib
    except ImportError:
        raise UserError("--plot needs matplotlib: pip install matplotlib") from None
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    runs = {}
    for folder in map(Path, folders):
        config = Config.load(folder / "config.json")
        result = gpt2.read_json(folder / "eval.json")
        runs.setdefault(config.loss, []).append((config.layer, result))
    figure, (left, middle, right) = plt.subplots(1, 3, figsize=(13, 4), layout="constrained")
    styles = {"local": "s : 0.45", "e2e": "o - black", "e2e_ds": "^ -- tab:blue",
              "finish": "D -. tab:red"}
    for loss, results in sorted(runs.items()):
        marker, line, color = styles[loss].split()
        style = {"marker": marker, "linestyle": line, "color": color, "label": loss}
        for axis, key in (left, "l0"), (middle, "alive"):
            points = sorted((result[key], result["ce_increase"]) for _, result in results)
            axis.plot(*zip(*points), **style)
        for layer, result in results:
            mse = result["mse_by_layer"]
            right.plot(range(layer, layer + len(mse)), mse, **style)
            style["label"] = None  # one line of the legend is enough
    left.set(xlabel="L0: active features a token", ylabel="CE increase (nats)")
    middle.set(xlabel="alive dictionary elements", ylabel="CE increase (nats)")
    right.set(xlabel="residual stream entering layer", ylabel="MSE, spliced against clean")
    right.xaxis.get_major_locator().set_params(integer=True)
    left.invert_xaxis()  # as in the paper: better is lower and further to the right
    left.legend()
    gpt2.write_atomic(Path(path), lambda file: figure.savefig(file, format="png", dpi=130))
    print(f"{sum(map(len, runs.values()))} runs drawn in {path}")


# ------------------------------------------------------------------------------------------------
# --compare: the geometry of dictionaries
# ------------------------------------------------------------------------------------------------


@torch.no_grad()
def nearest(a, b, k=1, chunk=2048):
    """The k highest cosine similarities of each unit row of a with the rows of b.

    Args:
        a, b: (n, d_model), (m, d_model); if they are one and the same tensor, no row counts as
            similar to itself.
        chunk: rows at a time of each: n times m numbers are never in memory.

    Returns:
        (similarities (n, k), rows of b (n, k)), the highest first.
    """
    best = []
    for i, rows in zip(range(0, len(a), chunk), a.split(chunk)):
        top = rows.new_empty(len(rows), 0), rows.new_empty(len(rows), 0, dtype=torch.long)
        for j, others in zip(range(0, len(b), chunk), b.split(chunk)):
            cosines = rows @ others.T
            if a is b and i == j:
                cosines.fill_diagonal_(-2)
            values, index = cosines.topk(min(k, len(others)))
            values, index = torch.cat([top[0], values], 1), torch.cat([top[1], index + j], 1)
            values, order = values.topk(min(k, values.shape[1]))
            top = values, index.gather(1, order)
        best.append(top)
    return tuple(torch.cat(parts) for parts in zip(*best))


def compare(loaded):
    """Print how similar the first SAE's elements are to one another and to each other SAE's.

    Args:
        loaded: {name: (SAE, its model, Config)}; elements that never fire on the held-out text are
            left out.
    """
    alive = {}
    for name, (sae, gpt, config) in loaded.items():
        starts, _, _ = firings(sae.encode, residuals(gpt, held_out(config), config.layer))
        alive[name] = sae.dictionary.detach()[np.diff(starts) > 0]
    first, *_ = alive
    print("the highest cosine similarity of each alive element of\n"
          f"{first} ({len(alive[first]):,} elements)")
    for name, dictionary in alive.items():
        highest = nearest(alive[first], dictionary)[0].flatten().clamp(-1, 1).cpu()
        whom = "another of its own elements" if name == first else f"an element of\n{name}"
        five = highest.quantile(torch.tensor([0.05, 0.25, 0.5, 0.75, 0.95])).tolist()
        print(f"\nwith {whom} ({len(dictionary):,} elements): mean {highest.mean():.3f}, quantiles "
              "5% {:.3f}  25% {:.3f}  50% {:.3f}  75% {:.3f}  95% {:.3f}".format(*five))
        shares = highest.clamp(min=0).histc(10, 0, 1) / len(highest)
        for i, share in enumerate(shares.tolist()):
            print(f"  {i / 10:.1f} to {(i + 1) / 10:.1f} {share:6.1%} {'#' * round(60 * share)}")


# ------------------------------------------------------------------------------------------------
# --concepts: is there a feature for what we know to be true of a token?
# ------------------------------------------------------------------------------------------------


def best_features(found, truth, half):
    """For each concept the feature and threshold that predict it best, and how well they do.

    Args:
        found: what `firings` returns.
        truth: (token, concept), bool.
        half: tokens before this one choose feature and threshold, the others test them.

    Returns:
        (F1 on the other half, feature, threshold), an array (concept,) each. The prediction is
        "the feature is at least the threshold"; F1 = 2 right / (predicted + true).
    """
    starts, token, value = found
    n_true = truth[:half].sum(0)
    best, feature, threshold = (np.zeros(truth.shape[1]) for _ in range(3))
    for i in range(len(starts) - 1):
        here = slice(starts[i], starts[i + 1])
        t, v = token[here], value[here]
        t, v = t[t < half], v[t < half]
        if len(t) == 0:
            continue
        order = v.argsort()[::-1]  # strongest first: after k of them, the k-th is the threshold
        v, right = v[order], truth[t[order]].cumsum(0, dtype=np.int32)
        f1 = 2 * right / (np.arange(1, len(v) + 1)[:, None] + n_true)
        f1[:-1][v[:-1] == v[1:]] = 0  # no threshold parts equals
        k = f1.argmax(0)
        top = f1[k, np.arange(len(k))]
        feature[top > best], threshold[top > best] = i, v[k[top > best]]
        best = np.maximum(best, top)
    f1 = np.zeros(len(best))
    for c, i in enumerate(feature.astype(int)):
        here = slice(starts[i], starts[i + 1])
        predicted = token[here][(value[here] >= threshold[c]) & (token[here] >= half)]
        total = len(predicted) + truth[half:, c].sum()
        f1[c] = 2 * truth[predicted, c].sum() / max(1, total) * (best[c] > 0)
    return f1, feature.astype(int), threshold


@torch.no_grad()
def concepts(loaded):
    """Print how well single features tell what Python's tokenize and ast say of each token.

    Beside the SAEs stand the coordinates of x (each as two features, above and below its mean), an
    SAE with random weights whose L0 is the first SAE's, and the base rate: to say yes always.

    Raises:
        UserError: if they are not all of one model, layer and context.
    """
    from data.stdlib import labelled_tokens  # here: all else works without data/

    places = {(config.model, config.layer, config.context) for _, _, config in loaded.values()}
    if len(places) > 1:
        raise UserError(f"--concepts has SAEs of {len(places)} (model, layer, context), must be of "
                        f"one: leave out all but those of one of {sorted(places)}")
    (first, gpt, config), *_ = loaded.values()
    tokens, labels = labelled_tokens(gpt2.load_tokenizer(config.model))
    rows = windows(tokens, config.context)
    truth, half = np.stack(list(labels.values()), 1)[: rows.size], rows.size // 2
    x = residuals(gpt, rows, config.layer)
    best = {name: best_features(firings(sae.encode, x), truth, half)
            for name, (sae, _, _) in loaded.items()}
    columns = {name: f1 for name, (f1, _, _) in best.items()}
    _, numbers, _ = next(iter(best.values()))  # the first SAE's features
    centred = x - x.mean(0)
    found = firings(F.relu, torch.cat([centred, -centred], 1))
    columns["best coordinate of x"] = best_features(found, truth, half)[0]
    torch.manual_seed(0)
    random = SAE(x.shape[1], first.encoder.out_features).to(x.device)
    pre, share = random.encoder(x[:2048]), (first.encode(x[:2048]) > 0).float().mean()
    random.encoder.bias -= pre.flatten().sort().values[int((1 - share) * (pre.numel() - 1))]
    columns["random SAE"] = best_features(firings(random.encode, x), truth, half)[0]
    rate, base = truth.mean(0), truth[half:].mean(0)
    columns["always yes"] = 2 * base / (1 + base)
    print(f"F1 of the best single feature for each concept; chosen on {half:,} tokens, "
          f"tested on as many others")
    for i, name in enumerate(columns, 1):
        print(f"  {i:2}: {name}")
    for title, chosen in ("rare, under 5% of the tokens", rate < 0.05), ("common", rate >= 0.05):
        print(f"\n{title:<28}{'share':>7}" + "".join(f"{i:6}" for i in range(1, len(columns) + 1))
              + "   feature of 1")
        for c in sorted(np.flatnonzero(chosen), key=lambda c: rate[c]):
            cells = "".join(f"{f1[c]:6.2f}" for f1 in columns.values())
            print(f"{list(labels)[c]:<28}{rate[c]:7.1%}{cells}{numbers[c]:15}")
        print(f"{'mean':<35}" + "".join(f"{f1[chosen].mean():6.2f}" for f1 in columns.values()))


# ------------------------------------------------------------------------------------------------
# --features: a page to look at them
# ------------------------------------------------------------------------------------------------

PAGE = """<!doctype html><html lang="en"><meta charset="utf-8"><title>Features</title>
<link rel="icon" href="data:,"><style>
body { font: 14px/1.4 sans-serif; max-width: 75em; margin: 1em auto; padding: 0 1em }
table { border-collapse: collapse } td { padding: 0 1em 0 0 } h2 { font-size: 1.1em }
section { border-top: 1px solid #999; padding: .3em 0 } small { color: #555 }
pre { font: 12px/1.3 monospace; white-space: pre-wrap; background: #f6f6f6; margin: .3em 0;
      padding: .3em } .peak { outline: 1px solid #000 }
</style>
<h1 id="title"></h1><table id="table"></table>
<h2>How often features fire</h2><pre id="rates"></pre>
<p><input id="filter" size="40" placeholder="a feature's number, or part of a token">
<span id="count"></span></p><div id="list"></div><button id="more">more</button>
<script type="application/json" id="data">@DATA@</script>
<script>
"use strict";
const get = id => document.getElementById(id);
const data = JSON.parse(get("data").textContent);
function add(parent, tag, text) {  // text stays text, whatever is in it
  const node = parent.appendChild(document.createElement(tag));
  node.textContent = text;
  return node;
}
const token = i => data.vocab[data.text[i]];
const quoted = text => JSON.stringify(text).slice(1, -1);
get("title").textContent = data.name;
for (const row of data.table) {
  const line = get("table").insertRow();
  for (const cell of row) add(line, "td", cell);
}
get("rates").textContent = data.rates.join("\\n");
function show(f) {
  const box = add(get("list"), "section", "");
  add(box, "h2", "Feature " + f.id);
  add(box, "small", `fires at ${(100 * f.rate).toPrecision(3)}% of the tokens, at most ${f.top}`);
  const words = list => list.map(([id, by]) => `${quoted(data.vocab[id])} ${by}`).join("   ");
  add(box, "div", "pushes up: " + words(f.up));
  add(box, "div", "pushes down: " + words(f.down));
  add(box, "div", "nearest: " + f.near.map(([id, cosine]) => `${id} (${cosine})`).join(", "));
  for (const [at, first, tints, value, kind] of f.contexts) {
    add(box, "small", `${kind}: ${value}`);
    const pre = add(box, "pre", "");
    [...tints].forEach((tint, k) => {
      const span = add(pre, "span", token(first + k));
      if (tint !== "0") span.style.background = `rgba(255, 130, 0, ${tint / 9})`;
      if (first + k === at) span.className = "peak";
    });
  }
}
let matches = [], shown = 0;
function more() {
  matches.slice(shown, shown += 20).forEach(show);
  get("more").hidden = shown >= matches.length;
}
function filter() {
  const wanted = get("filter").value;
  const fits = f => wanted === "" || String(f.id) === wanted
    || f.contexts.some(context => token(context[0]).includes(wanted))
    || f.up.some(([id]) => data.vocab[id].includes(wanted));
  matches = data.features.filter(fits);
  get("count").textContent = `${matches.length} of ${data.features.length} features`;
  get("list").textContent = "";
  shown = 0;
  more();
}
get("filter").oninput = filter;
get("more").onclick = more;
filter();
</script></html>
"""


def printable(token):
    """A token's bytes as text that shows all of them: halves of characters, control characters."""
    text = token.decode("utf-8", errors="backslashreplace")
    return "".join(c if c.isprintable() or c in "\n\t" else f"\\u{ord(c):04x}" for c in text)


def context_of(at, token, value, size):
    """The text around a token where a feature fires, for the page.

    Args:
        at: the token's number; token, value: where the feature fires, in order, and how strongly;
        size: tokens in the whole text.

    Returns:
        [at, the first token shown, a digit from 0 to 9 for each token shown, the value at `at`]
    """
    first, last = max(0, at - 24), min(size, at + 9)
    tints = np.zeros(last - first, dtype=int)
    a, b = token.searchsorted([first, last])
    tints[token[a:b] - first] = np.ceil(9 * value[a:b] / value.max())
    strength = f"{value[token.searchsorted(at)]:.3g}"
    return [int(at), int(first), "".join(map(str, tints)), strength]


@torch.no_grad()
def features_page(name, sae, gpt, config, ids=None):
    """An HTML page, as text, that shows an SAE's features and needs nothing but itself.

    Args:
        ids: which features; None: all, or of more than 4,096 a sample of 1,000.

    Raises:
        UserError: if there is no feature of such a number.
    """
    n_features, chance = sae.encoder.out_features, np.random.default_rng(config.seed)
    for i in ids or ():
        if not 0 <= i < n_features:
            raise UserError(f"--feature-ids has {i}, must be 0 to {n_features - 1:,}: change it")
    if ids is None:
        ids = range(n_features)
        if n_features > 4096:
            ids = sorted(chance.choice(n_features, 1000, replace=False).tolist())
    rows = held_out(config)
    text = np.asarray(rows).ravel()
    starts, token, value = firings(sae.encode, residuals(gpt, rows, config.layer))
    share, dictionary = np.diff(starts) / len(text), sae.dictionary
    alive, index = torch.from_numpy(np.flatnonzero(share)), torch.tensor(list(ids))
    cosines, near = nearest(dictionary[index], dictionary[alive], 4)
    near = alive[near.cpu()]

    features = []
    for row, i in enumerate(ids):
        here = slice(starts[i], starts[i + 1])
        t, v = token[here], value[here]
        order, places = v.argsort()[::-1], []  # the strongest first
        for at in t[order]:
            if all(abs(at - other) > 24 for other, _ in places):
                places.append((at, "strongest"))
            if len(places) == 6:
                break
        for kind, part in zip(("upper", "middle", "lower"), np.array_split(order, 3)):
            if len(part):
                places.append((t[chance.choice(part)], f"from the {kind} third"))
        # What the element adds to each logit if the later blocks do nothing, up to one factor
        push = gpt.wte.weight @ (dictionary[i] * gpt.ln_f.weight)
        push = push - push.mean()
        words = []
        for side in push.topk(8), push.topk(8, largest=False):
            pairs = zip(side.indices.tolist(), side.values.tolist())
            words.append([[j, f"{by:+.2f}"] for j, by in pairs])
        others = zip(near[row].tolist(), cosines[row].tolist())
        features.append({
            "id": i, "rate": share[i], "top": f"{v.max(initial=0):.3g}",
            "contexts": [[*context_of(at, t, v, len(text)), kind] for at, kind in places],
            "up": words[0], "down": words[1],
            "near": [[j, f"{cosine:.2f}"] for j, cosine in others if j != i][:3]})

    result = evaluate(gpt, sae, rows, config.layer)
    below, rates = 0, []
    bands = ("never", 0), ("to 0.1%", 1e-3), ("to 1%", 0.01), ("to 10%", 0.1), ("more", 1)
    for label, high in bands:
        amount = int((share <= high).sum()) - below
        below += amount
        rates.append(f"{label:>8} {amount:7,} {'#' * round(60 * amount / n_features)}")
    tokenizer = gpt2.load_tokenizer(config.model)
    vocab = [printable(tokenizer.decode_single_token_bytes(i)) if i != tokenizer.eot_token
             else gpt2.END_OF_TEXT for i in range(gpt.config.vocab_size)]
    data = {"name": f"{name}: {len(features):,} of {n_features:,} features", "features": features,
            "table": [[k, f"{x:.4g}"] for k, x in result.items() if type(x) is not list],
            "rates": rates, "vocab": vocab, "text": text.tolist()}
    packed = json.dumps(data, separators=(",", ":")).replace("<", "\\u003c")  # no tag within
    return PAGE.replace("@DATA@", packed)


# ------------------------------------------------------------------------------------------------
# The command line
# ------------------------------------------------------------------------------------------------


def make_parser():
    """The command line: a flag for each field of Config, and what else can be done than train."""
    parser = Parser(__doc__)
    for f in fields(Config):
        kind = {"action": argparse.BooleanOptionalAction} if f.type is bool else {"type": f.type}
        help = f.metadata["help"] + ("" if f.default is None else f" (default {f.default})")
        flag = "--" + f.name.replace("_", "-")
        parser.add_argument(flag, default=argparse.SUPPRESS, help=help, **kind)
    other = parser.add_mutually_exclusive_group()
    other.add_argument("--resume", metavar="FOLDER", help="go on with a run that was stopped")
    other.add_argument("--evaluate", nargs="+", metavar="SAE", help="what SAEs cost, side by side")
    other.add_argument("--benchmark", action="store_true", help="how fast each loss trains here")
    other.add_argument("--plot", nargs="+", metavar="FOLDER", help="draw runs' Pareto curves")
    other.add_argument("--compare", nargs="+", metavar="SAE", help="how alike dictionaries are")
    other.add_argument("--concepts", nargs="+", metavar="SAE", help="features for known concepts")
    other.add_argument("--features", metavar="SAE", help="write a page to look at its features")
    parser.add_argument("--feature-ids", nargs="+", type=int, help="which of them")
    return parser


def load_all(names, flags):
    """SAEs by name, each with the model, layer and context that it was made for.

    Returns:
        {name: (SAE, its model, Config)}
    """
    torch.set_float32_matmul_precision("high")  # as in `train`
    keep_freed_memory()
    loaded, models = {}, {}
    for name in names:
        sae = SAE.load(name, flags.get("layer"))
        for key in ("model", "layer"):
            if flags.get(key, sae.made_for[key]) != sae.made_for[key]:
                raise UserError(f"--{key} is {flags[key]}, {name} was made for "
                                f"{sae.made_for[key]}: leave the flag out")
        given = sae.made_for | flags
        config = Config(**{key: value for key, value in given.items() if value is not None})
        if config.model not in models:
            models[config.model] = GPT.from_pretrained(config.model).to(config.device)
        gpt = models[config.model]
        config.fit(gpt)
        d_model = sae.encoder.in_features
        if d_model != gpt.config.n_embd:
            raise UserError(f"{name} has d_model {d_model}, {config.model} {gpt.config.n_embd}: "
                            "give an SAE of that model")
        loaded[name] = sae.to(config.device), gpt, config
    return loaded


VIEWS = "evaluate", "plot", "compare", "concepts", "features"


def look(view, names, flags, ids):
    """Carry out one of VIEWS."""
    if view == "plot":
        plot(names, Path(names[0]).parent / "pareto.png")
        return
    loaded = load_all([names] if view == "features" else names, flags)
    if view == "evaluate":
        print_table({name: evaluate(gpt, sae, held_out(config), config.layer)
                     for name, (sae, gpt, config) in loaded.items()})
    elif view == "compare":
        compare(loaded)
    elif view == "concepts":
        concepts(loaded)
    else:
        page = features_page(names, *loaded[names], ids).encode()
        path = Path(names if Path(names).is_dir() else ".") / "features.html"
        gpt2.write_atomic(path, lambda file: file.write(page))
        print(f"{path}, {len(page) / 1e6:.1f} MB: open it in a browser")


def main(arguments=None):
    """The command line. Returns the exit code: 0; 2, bad input; 1, a run that failed underway."""
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    try:
        flags = vars(make_parser().parse_args(arguments))
        asked = {name: flags.pop(name) for name in VIEWS}
        ids, folder, timing = (flags.pop(name) for name in ("feature_ids", "resume", "benchmark"))
        if ids and not asked["features"]:
            raise UserError(f"--feature-ids is {ids}, goes with --features only: give both")
        for view, names in asked.items():
            if names:
                look(view, names, flags, ids)
                return 0
        if timing:
            benchmark(Config(**flags))
            return 0
        resume = folder is not None
        config = Config.load(Path(folder) / "config.json", flags) if resume else Config(**flags)
        path = Path(config.out) / "eval.json"
        if not (resume and path.exists()):
            train(config, resume)
        if int(os.environ.get("RANK", "0")) == 0:
            try:
                print_table({config.out: gpt2.read_json(path)})
            except (KeyError, TypeError, ValueError):
                remedy = "delete it, and --resume makes it again"
                raise UserError(f"{path} is no result of a run: {remedy}") from None
            print(f"\nIn {config.out}: the SAE as SAELens reads it, settings, log, this table")
        return 0
    except (UserError, OSError) as error:  # OSError: a path that the system does not take
        print("error:", " ".join(str(error).split()), file=sys.stderr)
        return getattr(error, "exit_code", 2)
    except torch.OutOfMemoryError:
        print("error: the GPU's memory is full: give a smaller --micro-batch", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("stopped", file=sys.stderr)
        return 130


if __name__ == "__main__":
    code = main()
    if "WORLD_SIZE" in os.environ:  # gloo's threads abort one in thirty that end otherwise
        sys.stdout.flush()
        os._exit(code)
    sys.exit(code)
