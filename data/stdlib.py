"""The embedded model: a small GPT-2 that has read the source of Python's standard library.

    python -m data.stdlib          # makes data/stdlib/ again, from nothing: tokenizer, model

The text is not in the repository: it is the standard library of the Python that runs this, without
its tests and its tables. It is split into train and val by a hash of each file's name, so that a
file stays on its side in every version of Python.
"""

import ast
import builtins
import functools
import hashlib
import io
import json
import keyword
import math
import re
import sys
import sysconfig
import time
import tokenize
from collections import Counter, defaultdict
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

from gpt2 import (
    DATA,
    END_OF_TEXT,
    GPT,
    GPTConfig,
    Parser,
    Progress,
    UserError,
    load_tokenizer,
    printable_bytes,
    write_atomic,
    write_json,
    write_safetensors,
)

LEFT_OUT = {"test", "tests", "idle_test", "site-packages", "encodings", "pydoc_data", "__pycache__"}
CONSTANTS = {"True", "False", "None"}
BUILTINS = set(dir(builtins)) - CONSTANTS
VOCAB_SIZE = 1024  # 256 bytes, 767 merges, end-of-text


def read_files(split, folder=None):
    """The library's source files of one split, as {name: text}, in the order of their names.

    Raises:
        UserError: if this Python has no source of its library on disk.
    """
    folder = Path(folder or sysconfig.get_paths()["stdlib"])
    names = sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*.py"))
    names = [
        name
        for name in names
        if not LEFT_OUT & set(name.split("/")) and "_sysconfigdata" not in name
    ]
    if len(names) < 100:
        raise UserError(
            f"{folder} holds {len(names)} source files of Python's standard library, at least 100 "
            "are needed: run this with a Python that has its library's source on disk"
        )
    is_val = {
        name: hashlib.sha256(name.encode()).digest()[0] < 26 for name in names
    }  # one file in ten
    return {
        name: (folder / name).read_text(encoding="utf-8", errors="replace")
        for name in names
        if is_val[name] == (split == "val")
    }


def load_tokens(tokenizer, split):
    """Token ids of a split (1-D uint16): its files, joined by end-of-text."""
    tokens = []
    for document in tokenizer.encode_ordinary_batch(list(read_files(split).values())):
        tokens += document + [tokenizer.eot_token]
    return np.array(tokens[:-1], dtype=np.uint16)


# ------------------------------------------------------------------------------------------------
# What is true of each token of the text: concepts to hold features against
# ------------------------------------------------------------------------------------------------

WHOLE = {  # concepts that are all of a node of the syntax tree
    "import": (ast.Import, ast.ImportFrom),
    "return statement": ast.Return,
    "raise statement": ast.Raise,
    "assert statement": ast.Assert,
    "comparison": ast.Compare,
    "lambda": ast.Lambda,
    "parameter": ast.arg,
    "comprehension": (ast.ListComp, ast.SetComp, ast.DictComp, ast.GeneratorExp),
}
BODY = {  # and those that are its body
    "class body": ast.ClassDef,
    "loop body": (ast.For, ast.While, ast.AsyncFor),
    "exception handler": ast.ExceptHandler,
    "try body": ast.Try,
    "with body": (ast.With, ast.AsyncWith),
}
PARTS = {  # and those that are other parts of it
    "condition of an if": (ast.If, lambda node: [node.test]),
    "target of an assignment": (ast.Assign, lambda node: node.targets),
    "argument of a call": (ast.Call, lambda node: [*node.args, *node.keywords]),
    "subscript": (ast.Subscript, lambda node: [node.slice]),
}


def concepts(source):
    """What Python's own tokenize and ast say of each byte of a source file.

    Args:
        source: the text of a Python file.

    Returns:
        {concept: bool array, one entry for each byte of the text in UTF-8}; what is not found in
        the file is not in the dict.

    Raises:
        SyntaxError, tokenize.TokenError: if it is no sound Python of the version that runs.
    """
    lines = io.StringIO(source).readlines()
    starts = np.cumsum([0] + [len(line.encode()) for line in lines])
    size, marks = int(starts[-1]), {}

    def mark(concept, first, last):
        marks.setdefault(concept, np.zeros(size, dtype=bool))[first:last] = True

    def place(row, column):  # tokenize counts rows from 1, and characters
        return size if row > len(lines) else starts[row - 1] + len(lines[row - 1][:column].encode())

    def span(first, last):  # of two nodes; ast counts rows from 1, and bytes
        return starts[first.lineno - 1] + first.col_offset, (
            starts[last.end_lineno - 1] + last.end_col_offset
        )

    depth, brackets, before, at_start, decorator = 0, 0, "", True, None
    for kind, word, begin, end, _ in tokenize.generate_tokens(io.StringIO(source).readline):
        here = place(*begin), place(*end)
        depth += (kind == tokenize.INDENT) - (kind == tokenize.DEDENT)
        if kind == tokenize.COMMENT:
            mark("comment", *here)
        if kind == tokenize.NEWLINE:
            if decorator is not None:
                mark("decorator", decorator, here[1])
            at_start, decorator, before = True, None, ""
        if kind not in (tokenize.NAME, tokenize.NUMBER, tokenize.OP, tokenize.STRING):
            continue
        if at_start:
            if kind != tokenize.STRING:
                mark("first word of a statement", *here)
            decorator = here[0] if word == "@" else None
        if 1 <= depth <= 3:
            mark(f"indented {depth} deep", *here)
        brackets += (kind == tokenize.OP) * ((word in "([{") - (word in ")]}"))
        name, constant = kind == tokenize.NAME, word in CONSTANTS
        for concept, holds in (
            ("number", kind == tokenize.NUMBER),
            ("operator or bracket", kind == tokenize.OP),
            ("closing bracket", kind == tokenize.OP and word in ")]}"),
            ("inside brackets", brackets > 0),
            ("inside two brackets", brackets > 1),
            ("True, False, None", constant),
            ("keyword", keyword.iskeyword(word) and not constant),
            ("name being defined", name and before in ("def", "class")),
            ("attribute after a dot", name and before == "."),
            ("self", word == "self"),
            ("name of a builtin", name and before != "." and word in BUILTINS),
            ("name in capitals", name and len(word) > 1 and word.isupper()),
        ):
            if holds:
                mark(concept, *here)
        before, at_start = word, False

    def visit(node):
        doc = isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef))
        doc = doc and ast.get_docstring(node, clean=False) is not None
        text = isinstance(node, ast.Constant) and isinstance(node.value, (str, bytes))
        if text or isinstance(node, ast.JoinedStr):
            mark("string", *span(node, node))
            return  # what stands in an f-string has no sound place before Python 3.12
        for concept, kinds in WHOLE.items():
            if isinstance(node, kinds):
                mark(concept, *span(node, node))
        for concept, kinds in BODY.items():
            if isinstance(node, kinds):
                mark(concept, *span(node.body[0], node.body[-1]))
        for concept, (kinds, parts) in PARTS.items():
            for part in parts(node) if isinstance(node, kinds) else ():
                mark(concept, *span(part, part))
        if doc:
            mark("docstring", *span(node.body[0], node.body[0]))
        skipped = node.body[0] if doc else None
        for child in ast.iter_child_nodes(node):
            if child is not skipped:
                visit(child)

    visit(ast.parse(source))
    return marks


def labelled_tokens(tokenizer, split="val"):
    """The tokens of a split, and which concepts hold at the last byte of each of them.

    Files that this Python cannot parse are left out.

    Returns:
        (token ids (n,), {concept: bool (n,)}); at end-of-text no concept holds.
    """
    ids, labels, length = [], {}, 0
    for source in read_files(split).values():
        try:
            found = concepts(source)
        except (SyntaxError, tokenize.TokenError):
            continue
        document = tokenizer.encode_ordinary(source)
        ends = np.cumsum([len(tokenizer.decode_single_token_bytes(token)) for token in document])
        for concept, mark in found.items():
            labels.setdefault(concept, []).append(length + np.flatnonzero(mark[ends - 1]))
        ids += [*document, tokenizer.eot_token]
        length = len(ids)
    truth = {concept: np.zeros(length, dtype=bool) for concept in sorted(labels)}
    for concept, places in labels.items():
        truth[concept][np.concatenate(places)] = True
    return np.array(ids, dtype=np.uint16), truth


# ------------------------------------------------------------------------------------------------
# The tokenizer
# ------------------------------------------------------------------------------------------------


def train_bpe(texts, vocab_size):
    """Byte-pair encoding (Sennrich et al. 2016): merge the commonest pair of neighbours, and again.

    Args:
        texts: strings to learn from.
        vocab_size: tokens in all, the 256 bytes and end-of-text among them.

    Returns:
        the merges in order, each a pair of byte strings.
    """
    # GPT-2's split into words, without the `regex` package: the same on all but exotic digits
    words = re.compile(r"'(?:[sdmt]|ll|ve|re)| ?[^\W\d_]+| ?\d+| ?(?:[^\s\w]|_)+|\s+(?!\S)|\s+")
    counts = Counter(word for text in texts for word in words.findall(text))
    words = [[bytes([byte]) for byte in word.encode()] for word in counts]
    counts = list(counts.values())
    pairs, where = (
        Counter(),
        defaultdict(set),
    )  # how often a pair stands side by side; in which words
    for i, word in enumerate(words):
        for pair in zip(word, word[1:]):
            pairs[pair] += counts[i]
            where[pair].add(i)
    merges, made = [], set()
    while len(merges) < vocab_size - 257:
        best = max(
            pairs, key=lambda pair: (pairs[pair], pair)
        )  # ties broken by the bytes: repeatable
        if best[0] + best[1] in made:  # the same bytes by another road: a token has one id
            del pairs[best]
            continue
        made.add(best[0] + best[1])
        merges.append(best)
        for i in where.pop(best):
            old = words[i]
            new, at = [], 0
            while at < len(old):
                together = tuple(old[at : at + 2]) == best
                new.append(old[at] + old[at + 1] if together else old[at])
                at += 1 + together
            for pair in zip(old, old[1:]):
                pairs[pair] -= counts[i]
            for pair in zip(new, new[1:]):
                pairs[pair] += counts[i]
                where[pair].add(i)
            words[i] = new
        del pairs[best]
    return merges


def write_tokenizer(merges, folder):
    """Write vocab.json and merges.txt as GPT-2 has them."""
    alphabet = {byte: char for char, byte in printable_bytes().items()}
    show = lambda token: "".join(alphabet[byte] for byte in token)
    tokens = [*alphabet.values(), *(show(a + b) for a, b in merges), END_OF_TEXT]
    vocab = json.dumps({token: i for i, token in enumerate(tokens)}, ensure_ascii=False)
    lines = ["#version: 0.2", *(f"{show(a)} {show(b)}" for a, b in merges)]
    write_atomic(folder / "vocab.json", lambda file: file.write(vocab.encode()))
    write_atomic(folder / "merges.txt", lambda file: file.write("\n".join(lines).encode() + b"\n"))


# The model and its training: about two hours on two CPU cores
SIZES = GPTConfig(n_layer=6, n_head=4, n_embd=128, n_positions=128, vocab_size=VOCAB_SIZE)
STEPS, BATCH_SIZE = 6144, 32  # 25.2 million tokens, seven and a half times through the text
LR_MATRICES, LR_REST = 0.02, 2e-3


def orthogonalize(matrix, steps=5):
    """The nearest semi-orthogonal matrix, roughly: every singular value comes out near 1.

    Newton-Schulz iteration with the coefficients of Jordan et al. 2024 ("Muon"). torch.optim.Muon
    does this in bfloat16, which a CPU without bfloat16 runs twenty times slower than this float32.
    """
    x = matrix / (matrix.norm() + 1e-7)
    tall = x.shape[0] > x.shape[1]
    x = x.T if tall else x
    for _ in range(steps):
        a = x @ x.T
        x = 3.4445 * x + (-4.7750 * a + 2.0315 * a @ a) @ x
    return x.T if tall else x


@torch.no_grad()
def validation_loss(gpt, tokens, batch_size=64):
    """Mean cross-entropy in nats per token, on non-overlapping windows of the longest context."""
    n = gpt.config.n_positions
    windows = torch.from_numpy(tokens[: len(tokens) // n * n].astype(np.int64)).view(-1, n)
    losses = [
        F.cross_entropy(gpt(batch)[:, :-1].flatten(0, 1), batch[:, 1:].flatten(), reduction="sum")
        for batch in windows.split(batch_size)
    ]
    return float(sum(losses)) / (len(windows) * (n - 1))


def train_model(tokens, val_tokens, sizes, steps, batch_size, seed=0, keep=lambda gpt: None):
    """Train a GPT-2 from nothing: Muon for the matrices in the blocks, Adam for the rest.

    The upper half of the blocks joins after two fifths of the steps. Until then it is the identity,
    as every block is at the start, so that nothing jumps, and a sixth of the work is saved.

    Args:
        tokens, val_tokens: 1-D arrays of token ids.
        sizes: a GPTConfig.
        steps: optimizer steps, each on `batch_size` windows cut at random places.
        keep: called with the model after each tenth of the steps.

    Returns:
        (gpt, its validation loss in nats per token)
    """
    torch.manual_seed(seed)
    places = np.random.default_rng(seed)
    gpt = GPT(sizes).requires_grad_(True)
    for name, parameter in gpt.named_parameters():
        if ".c_proj." in name or name.endswith("bias"):
            torch.nn.init.zeros_(parameter)  # each block starts as the identity
        elif name.startswith(("wte", "wpe")):
            torch.nn.init.normal_(parameter, std=0.02)
    matrices = [p for name, p in gpt.named_parameters() if name.startswith("h.") and p.ndim == 2]
    rest = [p for name, p in gpt.named_parameters() if not (name.startswith("h.") and p.ndim == 2)]
    momenta = [torch.zeros_like(p) for p in matrices]
    adam = torch.optim.Adam(rest, betas=(0.9, 0.95), fused=True)
    progress, start = Progress("training the embedded model", steps, "steps"), time.time()
    for step in range(1, steps + 1):
        starts = places.integers(len(tokens) - sizes.n_positions, size=(batch_size, 1))
        rows = tokens[starts + np.arange(sizes.n_positions + 1)]
        batch = torch.from_numpy(rows.astype(np.int64))
        x = gpt.embed(batch[:, :-1])
        for block in gpt.h[: sizes.n_layer if step > 0.4 * steps else sizes.n_layer // 2]:
            x = block(x)
        loss = F.cross_entropy(gpt.unembed(x).flatten(0, 1), batch[:, 1:].flatten())
        loss.backward()
        lr = min(step / 100, (steps - step) / (0.7 * steps), 1)  # warm up, hold, run down to zero
        with torch.no_grad():
            for p, momentum in zip(matrices, momenta):
                if p.grad is None:
                    continue  # of a block that has not joined yet
                momentum.lerp_(p.grad, 0.05)
                update = orthogonalize(p.grad.lerp(momentum, 0.95))  # Nesterov's look ahead
                p -= lr * LR_MATRICES * max(1, p.shape[0] / p.shape[1]) ** 0.5 * update
                p.grad = None
        adam.param_groups[0]["lr"] = lr * LR_REST
        adam.step()
        adam.zero_grad()
        progress(step)
        if step % max(1, steps // 10) == 0 or step == steps:
            val = validation_loss(gpt, val_tokens if step == steps else val_tokens[:50_000])
            print(
                f"step {step:,} of {steps:,}: train loss {loss:.3f}, validation {val:.4f} nats, "
                f"{(time.time() - start) / 60:.1f} min",
                flush=True,
            )
            keep(gpt)
    return gpt.requires_grad_(False), val


@torch.no_grad()
def to_unit_stream(gpt, tokens):
    """Scale the residual stream so that its RMS is 1 where it enters the middle block.

    Muon without weight decay lets the stream grow to any size, and an SAE's learning rate is made
    for activations near 1. What the model computes stays the same: every LayerNorm divides the
    scale out again (its epsilon is scaled too); ln_f makes up for the unembedding, which is wte.
    """
    n = gpt.config.n_positions
    x = gpt.embed(torch.from_numpy(tokens[: 64 * n].astype(np.int64)).view(-1, n))
    for block in gpt.h[: len(gpt.h) // 2]:
        x = block(x)
    scale = 1 / x.pow(2).mean().sqrt()
    for name, parameter in gpt.named_parameters():
        if name.startswith(("wte", "wpe")) or ".c_proj." in name:
            parameter *= scale
        if name.startswith("ln_f"):
            parameter /= scale
    gpt.config.layer_norm_epsilon *= float(scale**2)
    for module in gpt.modules():
        if isinstance(module, torch.nn.LayerNorm):
            module.eps = gpt.config.layer_norm_epsilon


def save_model(gpt, folder):
    """Write config.json and model.safetensors as openai-community/gpt2 has them, in float16."""
    tensors = {
        name: (p.T if ".c_" in name and name.endswith("weight") else p).half()
        for name, p in gpt.named_parameters()
    }
    end = gpt.config.vocab_size - 1  # end-of-text
    config = {
        "model_type": "gpt2",
        "architectures": ["GPT2LMHeadModel"],
        **vars(gpt.config),
        "activation_function": "gelu_new",
        "bos_token_id": end,
        "eos_token_id": end,
    }
    write_safetensors(folder / "model.safetensors", tensors)
    write_json(folder / "config.json", config)


def make(folder, steps):
    """Make the tokenizer and the model in `folder`, from nothing, and say how good the model is."""
    texts = read_files("train")
    print(f"{len(texts)} files, {sum(map(len, texts.values())):,} characters to train on")
    write_tokenizer(train_bpe(texts.values(), VOCAB_SIZE), folder)
    tokenizer = load_tokenizer(folder)
    train, val = load_tokens(tokenizer, "train"), load_tokens(tokenizer, "val")
    print(f"{len(train):,} tokens to train on, {len(val):,} to validate")
    save = functools.partial(save_model, folder=folder)
    gpt, loss = train_model(train, val, SIZES, steps, BATCH_SIZE, keep=save)
    to_unit_stream(gpt, train)
    save(gpt)
    bits = loss / math.log(2) * len(val) / sum(map(len, read_files("val").values()))
    print(f"validation loss {loss:.3f} nats per token, {bits:.3f} bits per character")


def main():
    """The command line."""
    parser = Parser(__doc__)
    parser.add_argument("--folder", type=Path, default=DATA / "stdlib", help="where the files go")
    parser.add_argument("--steps", type=int, default=STEPS, help=f"optimizer steps ({STEPS})")
    try:
        args = parser.parse_args()
        if args.steps < 1:
            raise UserError(f"--steps is {args.steps}, must be at least 1: change it")
        make(args.folder, args.steps)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(error.exit_code)


if __name__ == "__main__":
    main()
