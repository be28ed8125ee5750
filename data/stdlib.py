"""The embedded model: a small GPT-2 trained on the source of Python's standard library.

    python -m data.stdlib          # makes data/stdlib/ again, from nothing: tokenizer and model

The text is not in the repository: it is the standard library of the Python that runs this, without
tests and tables. A hash of its name puts a file in train or val, the same in all Python versions.
"""

import argparse
import hashlib
import json
import re
import sysconfig
from collections import Counter
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

import gpt2
from gpt2 import ALPHABET, END_OF_TEXT, GPT, GPTConfig, ensure, load_tokenizer, progress

LEFT_OUT = {"test", "tests", "idle_test", "site-packages", "encodings", "pydoc_data", "__pycache__"}
VOCAB_SIZE = 1024  # 256 bytes, 767 merges, end-of-text


# ---- The text ------------------------------------------------------------------------------------

def read_files(split):
    """The library's source files of one split, as {name: text}, sorted by name."""
    folder = Path(sysconfig.get_paths()["stdlib"])
    names = sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*.py"))
    names = [name for name in names
             if not LEFT_OUT & set(name.split("/")) and "_sysconfigdata" not in name]
    ensure(len(names) >= 100, f"{folder} holds {len(names)} source files of Python's standard "
                              "library, too few; use a Python that has its source on disk")
    in_val = lambda name: hashlib.sha256(name.encode()).digest()[0] < 26  # one file in ten
    return {name: (folder / name).read_text(encoding="utf-8", errors="replace")
            for name in names if in_val(name) == (split == "val")}


def load_tokens(tokenizer, split):
    """Token ids of a split (1-D uint16): its files, joined by end-of-text."""
    tokens = []
    for document in tokenizer.encode_ordinary_batch(list(read_files(split).values())):
        tokens += [*document, tokenizer.eot_token]
    return np.array(tokens[:-1], dtype=np.uint16)


# ---- The tokenizer -------------------------------------------------------------------------------

def train_bpe(texts, vocab_size):
    """Byte-pair encoding (Sennrich et al. 2016): the merges, as a list of pairs of byte strings."""
    # GPT-2's split into words, without the `regex` package: the same on all but exotic digits
    split = re.compile(r"'(?:[sdmt]|ll|ve|re)| ?[^\W\d_]+| ?\d+| ?(?:[^\s\w]|_)+|\s+(?!\S)|\s+")
    counts = Counter(word for text in texts for word in split.findall(text))
    words = [([bytes([byte]) for byte in word.encode()], n) for word, n in counts.items()]
    merges = {}  # new token: the pair that it replaces
    while len(merges) < vocab_size - 257:  # 256 bytes and end-of-text are tokens, too
        pairs = Counter()
        for word, n in words:
            for pair in zip(word, word[1:]):
                pairs[pair] += n
        new = (pair for pair in pairs if b"".join(pair) not in merges)  # a token has one id
        best = max(new, key=lambda pair: (pairs[pair], pair))  # the bytes break ties
        merges[b"".join(best)] = best
        for word, _ in words:
            for i in range(len(word)) if best[0] in word else ():
                if tuple(word[i : i + 2]) == best:
                    word[i : i + 2] = [b"".join(best)]
    return list(merges.values())


def write_tokenizer(merges, folder):
    """Write vocab.json and merges.txt in GPT-2's format."""
    characters = {byte: char for char, byte in ALPHABET.items()}
    merges = [["".join(characters[byte] for byte in part) for part in pair] for pair in merges]
    tokens = [*ALPHABET, *map("".join, merges), END_OF_TEXT]
    vocab = json.dumps({token: i for i, token in enumerate(tokens)}, ensure_ascii=False)
    lines = ["#version: 0.2", *map(" ".join, merges), ""]
    for name, text in ("vocab.json", vocab), ("merges.txt", "\n".join(lines)):
        with gpt2.writing(folder / name) as file:
            file.write(text.encode())


# ---- The model and its training: about two hours on two CPU cores --------------------------------

SIZES = GPTConfig(n_layer=6, n_head=4, n_embd=128, n_positions=128, vocab_size=VOCAB_SIZE)
STEPS, BATCH_SIZE = 6144, 32  # 25.2 million tokens, 7.5 times through the text
LR_MATRICES, LR_REST = 0.02, 2e-3


def orthogonalize(matrix):
    """Bring all singular values near 1: Newton-Schulz iteration as in Muon (Jordan et al. 2024).

    torch.optim.Muon does this in bfloat16, twenty times slower on a CPU without bfloat16 hardware.
    """
    x = matrix / (matrix.norm() + 1e-7)
    tall = x.shape[0] > x.shape[1]
    x = x.T if tall else x
    for _ in range(5):
        a = x @ x.T
        x = 3.4445 * x + (-4.7750 * a + 2.0315 * a @ a) @ x
    return x.T if tall else x


def train_model(tokens, sizes, steps):
    """Train a GPT-2 from scratch: the blocks' matrices by Muon, the rest by Adam.

    The upper half of the blocks joins after 40 % of the steps, which saves a sixth of the work. The
    loss does not jump then, because every block starts as the identity.
    """
    torch.manual_seed(0)
    random = np.random.default_rng(0)
    gpt = GPT(sizes).requires_grad_(True)
    matrices, rest = [], []
    for name, parameter in gpt.named_parameters():
        if ".c_proj." in name or name.endswith("bias"):
            torch.nn.init.zeros_(parameter)  # each block starts as the identity
        elif name.startswith(("wte", "wpe")):
            torch.nn.init.normal_(parameter, std=0.02)
        is_matrix = name.startswith("h.") and parameter.ndim == 2
        (matrices if is_matrix else rest).append(parameter)
    momenta = [torch.zeros_like(p) for p in matrices]
    adam = torch.optim.Adam(rest, betas=(0.9, 0.95), fused=True)
    for step in progress(range(1, steps + 1), "training", steps, "steps", lambda step: 1):
        starts = random.integers(len(tokens) - sizes.n_positions, size=(BATCH_SIZE, 1))
        text = tokens[starts + np.arange(sizes.n_positions + 1)].astype(np.int64)
        batch = torch.from_numpy(text)
        x = gpt.embed(batch[:, :-1])
        for block in gpt.h[: sizes.n_layer if step > 0.4 * steps else sizes.n_layer // 2]:
            x = block(x)
        loss = F.cross_entropy(gpt.unembed(x).flatten(0, 1), batch[:, 1:].flatten())
        loss.backward()
        lr = min(step / 100, (steps - step) / (0.7 * steps), 1)  # warm up, hold, decay to zero
        with torch.no_grad():
            for p, momentum in zip(matrices, momenta):
                if p.grad is not None:  # None: its block has not joined yet
                    momentum.lerp_(p.grad, 0.05)
                    update = orthogonalize(p.grad.lerp(momentum, 0.95))  # Nesterov momentum
                    p -= lr * LR_MATRICES * max(1, p.shape[0] / p.shape[1]) ** 0.5 * update
        adam.param_groups[0]["lr"] = lr * LR_REST
        adam.step()
        gpt.zero_grad()
        if step % max(1, steps // 20) == 0:
            print(f"step {step:,} of {steps:,}: loss {loss:.3f} nats", flush=True)
    return gpt


@torch.no_grad()
def save_model(gpt, tokens, folder):
    """Write config.json and model.safetensors as openai-community/gpt2 has them, in float16.

    First scales the residual stream to an RMS of 1 at the middle block: Muon lets it grow, and an
    SAE's learning rate suits activations near 1. Outputs do not change: LayerNorm divides the scale
    out again (its epsilon is scaled too), and ln_f makes up for the unembedding, which is wte.
    """
    n, end = gpt.config.n_positions, gpt.config.vocab_size - 1  # end: end-of-text
    x = gpt.embed(torch.from_numpy(tokens[: 64 * n].astype(np.int64)).unfold(0, n, n))
    for block in gpt.h[: len(gpt.h) // 2]:
        x = block(x)
    scale = 1 / x.pow(2).mean().sqrt()
    tensors = {}
    for name, p in gpt.named_parameters():
        if name.startswith(("wte", "wpe")) or ".c_proj." in name:
            p *= scale
        if name.startswith("ln_f"):
            p /= scale
        tensors[name] = (p.T if ".c_" in name and name.endswith("weight") else p).half()
    config = {"model_type": "gpt2", "architectures": ["GPT2LMHeadModel"], **vars(gpt.config),
              "activation_function": "gelu_new", "bos_token_id": end, "eos_token_id": end}
    config["layer_norm_epsilon"] *= float(scale**2)
    gpt2.write_safetensors(folder / "model.safetensors", tensors)
    gpt2.write_json(folder / "config.json", config)


def validation_loss(gpt, tokens):
    """Mean cross-entropy in nats per token, on non-overlapping windows of the longest context."""
    n, losses = gpt.config.n_positions, []
    for batch in torch.from_numpy(tokens.astype(np.int64)).unfold(0, n, n).split(64):
        y, targets = gpt(batch[:, :-1]), batch[:, 1:]
        losses.append(F.cross_entropy(y.flatten(0, 1), targets.flatten(), reduction="none"))
    return torch.cat(losses).mean()


def make(folder, steps):
    """Make the tokenizer and the model in `folder`, from nothing; print the model's loss."""
    ensure(steps > 0, f"--steps {steps}: must be at least 1")
    write_tokenizer(train_bpe(read_files("train").values(), VOCAB_SIZE), folder)
    tokenizer = load_tokenizer(folder)
    tokens = load_tokens(tokenizer, "train")
    save_model(train_model(tokens, SIZES, steps), tokens, folder)
    loss = validation_loss(GPT.from_pretrained(folder), load_tokens(tokenizer, "val"))
    print(f"validation loss {loss:.3f} nats per token")


def main():
    """Read the command line and make the model."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], allow_abbrev=False)
    parser.add_argument("--folder", type=Path, default=gpt2.DATA / "stdlib", help="for the files")
    parser.add_argument("--steps", type=int, default=STEPS, help=f"of training (default: {STEPS})")
    make(**vars(parser.parse_args()))


if __name__ == "__main__":
    from data import run_command

    run_command(main)
