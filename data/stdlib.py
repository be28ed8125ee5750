"""The embedded model: a small GPT-2 trained on the source of Python's standard library.

    python -m data.stdlib          # makes it again, from nothing, in data/stdlib-new/

The text is not in the repository: it is the standard library of the Python that runs this, without
tests and tables. A hash of its name puts a file in train or val, the same in all Python versions.
"""

import argparse
import hashlib
import json
import re
import sysconfig
from collections import Counter
from glob import glob
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

import data
import gpt2
from gpt2 import ALPHABET, END_OF_TEXT, GPT, GPTConfig, ensure, run_command, writing


# ---- The text ------------------------------------------------------------------------------------

LEFT_OUT = re.compile(  # tests, other people's packages, tables and machine-made files
    r"(^|/)(test|tests|idle_test|site-packages|encodings|pydoc_data|__pycache__)/"
    r"|^config-|_sysconfigdata")


def split_of(name):
    """The split of a file, "train" or "val": one file in ten is in val, by a hash of its name."""
    # Packages in newer Pythons, single files in 3.11, which the model was trained on
    name = re.sub("^(zipfile|pathlib)/.*", r"\1.py", name)
    return "val" if hashlib.sha256(name.encode()).digest()[0] < 26 else "train"


def read_files(split):
    """The library's source files of one split, as {name: text}, sorted by name."""
    folder = Path(sysconfig.get_paths()["stdlib"])
    names = sorted(glob("**/*.py", root_dir=folder, recursive=True))
    names = [name for name in names if not LEFT_OUT.search(name)]
    ensure(len(names) >= 100, f"{folder} holds {len(names)} source files of Python's standard "
                              "library, too few; use a Python that has its source on disk")
    return {name: (folder / name).read_text("utf-8", errors="replace")
            for name in names if split_of(name) == split}


def load_tokens(folder, split):
    """Token ids of a split, by the tokenizer in `folder`: a 1-D tensor."""
    tokens = data.encode(folder, list(read_files(split).values()))
    return torch.from_numpy(tokens.astype(np.int64))


# ---- The tokenizer -------------------------------------------------------------------------------

VOCAB_SIZE = 1024  # 256 bytes, 767 merges, end-of-text
# GPT-2's split into words, without the `regex` package: the same on all but exotic digits
WORD = re.compile(r"'(?:[sdmt]|ll|ve|re)| ?[^\W\d_]+| ?\d+| ?(?:[^\s\w]|_)+|\s+(?!\S)|\s+")


def merge(word, left, right):
    """Replace each `left`, `right` in a word, a list of tokens, by one token, in place."""
    for i in range(len(word)):  # the word gets shorter; past its end, the slice is empty
        if word[i : i + 2] == [left, right]:
            word[i : i + 2] = [left + right]


def train_bpe(texts, vocab_size):
    """Byte-pair encoding (Sennrich et al. 2016): the merges, as a list of pairs of byte strings."""
    counts = Counter()
    for text in texts:
        counts.update(WORD.findall(text))
    words = []  # (tokens, occurrences); first, each byte is a token
    for word, n in counts.items():
        words.append(([bytes([byte]) for byte in word.encode()], n))
    merges = {}  # new token: the pair that it replaces
    while len(merges) < vocab_size - 257:  # the others are the 256 bytes and end-of-text
        pairs = Counter()
        for word, n in words:
            for pair in zip(word, word[1:]):
                pairs[pair] += n
        new = [pair for pair in pairs if b"".join(pair) not in merges]  # a token has one id
        left, right = max(new, key=lambda pair: (pairs[pair], pair))  # the bytes break ties
        merges[left + right] = (left, right)
        for word, _ in words:
            if left in word:
                merge(word, left, right)
    return list(merges.values())


def write_tokenizer(merges, folder):
    """Write vocab.json and merges.txt in GPT-2's format."""
    characters = dict(zip(ALPHABET.values(), ALPHABET))  # one for each byte
    tokens = list(ALPHABET)
    lines = ["#version: 0.2"]
    for left, right in merges:
        left = "".join(map(characters.get, left))
        right = "".join(map(characters.get, right))
        tokens.append(left + right)
        lines.append(f"{left} {right}")
    tokens.append(END_OF_TEXT)
    vocab = {token: i for i, token in enumerate(tokens)}
    with writing(folder / "vocab.json") as file:
        file.write(json.dumps(vocab, ensure_ascii=False).encode())
    with writing(folder / "merges.txt") as file:
        file.write("\n".join(lines).encode() + b"\n")


# ---- The model and its training: about two hours on two CPU cores --------------------------------

CONFIG = GPTConfig(n_layer=6, n_head=4, n_embd=128, n_positions=128, vocab_size=VOCAB_SIZE)
STEPS = 6144  # 25.2 million tokens, 7.5 times through the text
BATCH_SIZE = 32
LR_MATRICES = 0.02
LR_REST = 2e-3


def next_token_loss(logits, batch):
    """Mean cross-entropy: logits (batch, pos, vocab) for the tokens of `batch` but the first."""
    return F.cross_entropy(logits.flatten(0, 1), batch[:, 1:].flatten())


def orthogonalize(matrix):
    """Bring all singular values near 1: Newton-Schulz iteration as in Muon (Jordan et al. 2024).

    torch.optim.Muon does this in bfloat16, twenty times slower on a CPU without bfloat16 hardware.
    """
    if matrix.shape[0] > matrix.shape[1]:
        return orthogonalize(matrix.T).T
    x = matrix / (matrix.norm() + 1e-7)
    for _ in range(5):
        a = x @ x.T
        x = 3.4445 * x + (-4.7750 * a + 2.0315 * a @ a) @ x
    return x


@torch.no_grad()
def muon_step(matrix, momentum, lr):
    """Update a matrix and its momentum from its gradient: Nesterov momentum, orthogonalized."""
    momentum.lerp_(matrix.grad, 0.05)
    update = orthogonalize(matrix.grad.lerp(momentum, 0.95))
    stretch = max(1, matrix.shape[0] / matrix.shape[1]) ** 0.5  # for matrices with more outputs
    matrix -= lr * stretch * update


@torch.no_grad()
def new_model(config):
    """A GPT-2 to be trained, in which each block starts as the identity."""
    torch.manual_seed(0)
    gpt = GPT(config).requires_grad_(True)
    for name, parameter in gpt.named_parameters():
        if ".c_proj." in name or name.endswith("bias"):
            parameter.zero_()
        elif name.startswith(("wte", "wpe")):
            parameter.normal_(std=0.02)
    return gpt


def train_model(tokens, config, steps):
    """Train a GPT-2 on token ids (n,): the blocks' matrices by Muon, the rest by Adam.

    The upper half of the blocks joins after 40 % of the steps, which saves a sixth of the work. The
    loss does not jump then, because every block starts as the identity.
    """
    gpt = new_model(config)
    matrices = [p for p in gpt.h.parameters() if p.ndim == 2]
    momenta = [torch.zeros_like(p) for p in matrices]
    rest = [p for name, p in gpt.named_parameters() if not name.startswith("h.") or p.ndim == 1]
    adam = torch.optim.Adam(rest, betas=(0.9, 0.95), fused=True)
    random = np.random.default_rng(0)
    context = config.n_positions
    for step in range(1, steps + 1):
        starts = random.integers(len(tokens) - context, size=(BATCH_SIZE, 1))
        batch = tokens[starts + np.arange(context + 1)]  # inputs, and targets one token further
        n_blocks = config.n_layer if step > 0.4 * steps else config.n_layer // 2
        x = gpt.embed(batch[:, :-1])
        for block in gpt.h[:n_blocks]:
            x = block(x)
        loss = next_token_loss(gpt.unembed(x), batch)
        loss.backward()
        lr = min(step / 100, (steps - step) / (0.7 * steps), 1)  # warm up, hold, decay to zero
        for matrix, momentum in zip(matrices, momenta):
            if matrix.grad is not None:  # None: its block has not joined yet
                muon_step(matrix, momentum, lr * LR_MATRICES)
        adam.param_groups[0]["lr"] = lr * LR_REST
        adam.step()
        gpt.zero_grad()
        if step % 64 == 0:
            print(f"step {step:,} of {steps:,}: loss {loss:.3f} nats")
    return gpt


@torch.no_grad()
def save_model(gpt, tokens, folder):
    """Write config.json and model.safetensors as openai-community/gpt2 has them, in float16.

    First scales the residual stream to an RMS of 1 at the middle block: Muon lets it grow, and an
    SAE's learning rate suits activations near 1. Outputs do not change: LayerNorm divides the scale
    out again (its epsilon is scaled too), and ln_f makes up for the unembedding, which is wte.
    """
    n = gpt.config.n_positions
    x = gpt.embed(tokens[: 64 * n].view(64, n))
    for block in gpt.h[: len(gpt.h) // 2]:
        x = block(x)
    scale = 1 / x.pow(2).mean().sqrt()
    tensors = {}
    for name, p in gpt.named_parameters():
        if name.startswith(("wte", "wpe")) or ".c_proj." in name:  # what writes to the stream
            p *= scale
        elif name.startswith("ln_f"):
            p /= scale
        if ".c_" in name and p.ndim == 2:
            p = p.T  # OpenAI stores (in, out), nn.Linear (out, in)
        tensors[name] = p.half()
    end = gpt.config.vocab_size - 1  # end-of-text
    config = {
        "model_type": "gpt2",
        "architectures": ["GPT2LMHeadModel"],
        **vars(gpt.config),
        "activation_function": "gelu_new",
        "bos_token_id": end,
        "eos_token_id": end,
    }
    config["layer_norm_epsilon"] *= float(scale**2)
    gpt2.write_safetensors(folder / "model.safetensors", tensors)
    gpt2.write_json(folder / "config.json", config)


def validation_loss(gpt, tokens):
    """Mean cross-entropy in nats per token, on non-overlapping windows of the longest context."""
    n = gpt.config.n_positions
    windows = tokens.unfold(0, n, n)
    total = 0
    for batch in windows.split(64):
        total += len(batch) * next_token_loss(gpt(batch[:, :-1]), batch)
    return total / len(windows)


def make(folder, steps):
    """Make the tokenizer and the model in `folder`, from nothing; print the model's loss."""
    ensure(steps > 0, f"--steps {steps}: must be at least 1")
    path = folder / "model.safetensors"
    ensure(not path.exists(), f"{path} exists: choose another --folder")
    write_tokenizer(train_bpe(read_files("train").values(), VOCAB_SIZE), folder)
    train = load_tokens(folder, "train")
    save_model(train_model(train, CONFIG, steps), train, folder)
    loss = validation_loss(GPT.from_pretrained(folder), load_tokens(folder, "val"))
    print(f"validation loss {loss:.3f} nats per token")


def main():
    """Read the command line and make the model."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], allow_abbrev=False)
    parser.add_argument("--folder", type=Path, default="data/stdlib-new", help="for the files")
    parser.add_argument("--steps", type=int, default=STEPS, help=f"of training (default: {STEPS})")
    make(**vars(parser.parse_args()))


if __name__ == "__main__":
    run_command(main)
