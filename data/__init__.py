"""Text as tokens: which text a model reads. The programs in this folder make that text and models.

    from data import load_tokens
    tokens = load_tokens("stdlib", "train")                      # 1-D array of token ids
    tokens = load_tokens("gpt2", "val", text="my_text.txt")
"""

import functools
import hashlib
import json
import os
import re
from pathlib import Path

import numpy as np

import gpt2
from gpt2 import SIZES, ensure, load_tokenizer, progress, reading


def text_name(model, text=None):
    """The text that a model reads: openwebtext, stdlib, or an absolute path. OpenAI's models and
    the embedded one have a default; UserError for another model without a text."""
    if text is None:
        ensure(model in SIZES or model == "stdlib",
               f"--model {model} needs --text: a UTF-8 file, a folder of such files, a folder with "
               "train.bin and val.bin, or by name openwebtext or stdlib")
        return "openwebtext" if model in SIZES else "stdlib"
    return text if text in ("openwebtext", "stdlib") else os.path.abspath(text)


def load_tokens(model, split, text=None):
    """Token ids of the "train" or "val" part of a text, in the model's vocabulary: a 1-D array.

    text: "openwebtext" (fetched on first use) or "stdlib" (the source of the running Python's
    library), or a path: a UTF-8 file or a folder of such files, the last 5 % of whose tokens are
    "val", or a folder with train.bin and val.bin (uint16). UserError if it is none of these. Files
    are read once in a process, and split into documents at each <|endoftext|>.
    """
    from data import openwebtext, stdlib  # here: `python -m data.stdlib` would import it twice

    text = text_name(model, text)
    folder = Path(text)
    if text == "openwebtext":
        ensure(model in SIZES or has_gpt2_vocabulary(model),
               f"--text openwebtext is in GPT-2's tokens, and --model {model} has others")
        folder = openwebtext.prepare()  # which makes train.bin and val.bin
    if text == "stdlib":
        tokens = encode(model, list(stdlib.read_files(split).values()))
    elif (folder / "train.bin").exists():
        with reading(folder / f"{split}.bin"):  # fails if the file is empty or its size is odd
            tokens = np.memmap(folder / f"{split}.bin", dtype="<u2", mode="r")
    else:
        tokens = encode_files(model, text)
        n_train = len(tokens) - len(tokens) // 20
        tokens = tokens[:n_train] if split == "train" else tokens[n_train:]
    rows = gpt2.model_config(model).vocab_size
    highest = tokens.max(initial=0)
    ensure(highest < rows, f"--text {text} has the token {highest}; --model {model} knows {rows}")
    return tokens


def has_gpt2_vocabulary(model):
    """Whether a model has GPT-2's own tokens, id by id."""
    _, vocab, _ = gpt2.read_vocab(gpt2.model_folder(model, []))
    by_id = {token: vocab[token] for token in sorted(vocab, key=vocab.get)}
    return hashlib.sha256(json.dumps(by_id).encode()).hexdigest() == gpt2.SHA256["vocab.json"]


def end_of_text(model, tokenizer):
    """The token that separates documents: config.json's eos_token_id, or else <|endoftext|>."""
    path = gpt2.model_folder(model, []) / "config.json"
    if path.exists():
        token = gpt2.read_json(path).get("eos_token_id")
        if type(token) is int and 0 <= token < tokenizer.n_vocab:
            return token
    ensure(gpt2.END_OF_TEXT in tokenizer.special_tokens_set,
           f"--model {model}: no eos_token_id in config.json, and no {gpt2.END_OF_TEXT} token")
    return tokenizer.eot_token


@functools.lru_cache(maxsize=1)
def encode_files(model, path):
    """The tokens of a text file, or of all files below a folder but hidden ones, in the order of
    their paths."""
    path = Path(path)
    ensure(path.exists(), f"--text {path}: no such file or folder, nor openwebtext or stdlib")
    paths = [path]
    if path.is_dir():
        files = sorted(file for file in path.rglob("*") if file.is_file())
        paths = [file for file in files if "/." not in str(file.relative_to(path.parent))]
    ensure(paths, f"--text {path}: the folder has no files")
    documents = []
    for file in paths:
        with reading(file):
            document = file.read_bytes().decode("utf-8")
            ensure("\0" not in document, "it is not text")
            documents += document.split(gpt2.END_OF_TEXT)  # where the file itself separates them
    return encode(model, documents)


def encode(model, documents):
    """Token ids of documents (a list of strings), joined by end-of-text: a 1-D array."""
    tokenizer = load_tokenizer(model)
    separator = end_of_text(model, tokenizer)
    parts = []
    total = sum(map(len, documents))
    for document in progress(documents, "encoding", total, "characters"):
        cut = list(pieces(document))
        for first in range(0, len(cut), 64):  # a list of ids takes ten times the array's memory
            for ids in tokenizer.encode_ordinary_batch(cut[first : first + 64]):
                parts.append(np.array(ids, np.uint32))
        parts.append(np.array([separator], np.uint32))
    return np.concatenate(parts)[:-1]


def pieces(document, size=1 << 16):
    """Cut a document where the tokens cannot change: before white space that follows a word. None
    of GPT-2's words contains such a place (see SPLIT in gpt2.py). Yields the pieces."""
    cut = re.compile(r"(?<=\S)[ \n]")
    start = 0
    while match := cut.search(document, start + size):
        yield document[start : match.start()]
        start = match.start()
    yield document[start:]


def windows(tokens, context):
    """A 1-D array of token ids as (sequence, context), without overlap and without a copy."""
    n = len(tokens) // context
    ensure(n > 0, f"--context {context}: the text has only {len(tokens):,} tokens; give fewer")
    return tokens[: n * context].reshape(n, context)


def held_out(config):
    """`n_eval` sequences, spread evenly over the held-out text: an array (n_eval, context)."""
    text = windows(load_tokens(config.model, "val", config.text), config.context)
    n = min(config.n_eval, len(text))
    return text[np.arange(n) * len(text) // n].astype(np.int64)
