"""GPT-2 in plain PyTorch: the model, its weights, its tokenizer, its text, one download function.

    gpt = GPT.from_pretrained("gpt2")        # OpenAI's weights, fetched once into data/gpt2/
    gpt = GPT.from_pretrained("stdlib")      # the small model in data/stdlib/: no network needed
    logits = gpt(tokens)                     # (batch, pos) -> (batch, pos, vocab)

The forward pass is no more than this, so anything can be done to the residual stream on the way:

    x = gpt.embed(tokens)                    # (batch, pos, d_model), the residual stream
    for block in gpt.h:
        x = block(x)                         # (batch, pos, d_model)
    logits = gpt.unembed(x)                  # (batch, pos, vocab)

What it is not: it has no dropout, no key-value cache, no generation. It is made to be read, to be
run forward, and to be differentiated with respect to activations; its parameters are frozen. The
modules bear OpenAI's names, so each tensor of their file is found by its name.

One thing is not as in OpenAI's code, and no output changes by it: the residual stream has zero mean
over d_model. All that reads it reads it through a LayerNorm, which takes the mean off anyway.
TransformerLens does the same, so activations here equal its `blocks.{layer}.hook_resid_pre`.
"""

import argparse
import hashlib
import json
import math
import os
import sys
import time
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import requests
import tiktoken
import torch
import torch.nn as nn
import torch.nn.functional as F

try:
    import fcntl
except ImportError:  # Windows has no such locks; `lock` says so when one is wanted
    fcntl = None

DATA = Path(__file__).resolve().parent / "data"
OPENAI = {  # the models that can be had by name: layers, heads, d_model
    "gpt2": (12, 12, 768),
    "gpt2-medium": (24, 16, 1024),
    "gpt2-large": (36, 20, 1280),
    "gpt2-xl": (48, 25, 1600),
}
REVISION = {"gpt2": "607a30d783dfa663caf39e06633721c8d4cfcd7e"}  # on the hub; of the others, main
SHA256 = {  # of GPT-2 small's files; for the others the server says it
    "model.safetensors": "248dfc3911869ec493c76e65bf2fcf7f615828b0254c12b473182f0f81d3a707",
    "vocab.json": "196139668be63f3b5d6574427317ae82f612a97c5d1cdaf36ed2256dbf636783",
}
MODEL_FILES = "config.json", "vocab.json", "model.safetensors"
TIMEOUT = (4, 30)  # seconds to connect, seconds without a byte


class UserError(ValueError):
    """What a user can cause and mend. The message is one line: the value, the rule, the remedy."""

    exit_code = 2


class Parser(argparse.ArgumentParser):
    """argparse, but an error of the command line is a UserError, and flags are spelt out."""

    def __init__(self, description):
        super().__init__(description=description.split("\n")[0], allow_abbrev=False)

    def error(self, message):
        """What argparse calls for any error."""
        raise UserError(f"{message}; see --help")


# ------------------------------------------------------------------------------------------------
# Files: progress, locks, atomic writing, fetching
# ------------------------------------------------------------------------------------------------


def duration(seconds):
    """Seconds as a person says them: 42 s, 3 min 05 s, 2 h 10 min, 3 d 04 h."""
    units = ("d", 86400, "h", 3600), ("h", 3600, "min", 60), ("min", 60, "s", 1)
    for unit, size, lower, lower_size in units:
        if seconds >= size:
            return f"{seconds // size:.0f} {unit} {seconds % size // lower_size:02.0f} {lower}"
    return f"{seconds:.0f} s"


class Progress:
    """A line on stderr: what, how far, how fast, how long still.

    On a terminal it is rewritten every second; in a log there is a new one every ten. What is over
    within the first second prints nothing.
    """

    def __init__(self, what, total, unit, scale=1, done=0):
        self.what, self.total, self.unit, self.scale, self.first = what, total, unit, scale, done
        self.start = self.shown = time.time()
        self.every = 1 if sys.stderr.isatty() else 10

    def __call__(self, done):
        """`done` of `total` units are there (`total` may be None: not known)."""
        now = time.time()
        ended = done == self.total and self.shown > self.start
        if now - self.shown < self.every and not ended:
            return
        self.shown = now
        rate = (done - self.first) / (now - self.start)
        of = f" of {self.total / self.scale:,.0f}" if self.total else ""
        left = f", {duration((self.total - done) / rate)} left" if self.total and rate else ""
        line = f"{self.what}: {done / self.scale:,.0f}{of} {self.unit}"
        line += f", {rate / self.scale:,.1f} {self.unit}/s{left}"
        start, end = ("\r", "\n" if ended else "") if self.every == 1 else ("", "\n")
        print(f"{start}{line:<78}", end=end, file=sys.stderr, flush=True)


@contextmanager
def lock(folder, wait=True):
    """Hold `folder` against other processes. The system lets go of it even after `kill -9`.

    Raises:
        UserError: if another process holds it, with wait=False.
    """
    if fcntl is None:
        print(f"no file locks on this system: start no second process on {folder}", file=sys.stderr)
        yield
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if not wait:
                raise UserError(f"{folder} is in use by another process: wait or stop it") from None
            print(f"another process is at work in {folder}: waiting for it", file=sys.stderr)
            fcntl.flock(handle, fcntl.LOCK_EX)
        yield
    finally:
        os.close(handle)


def write_atomic(path, write):
    """Call `write(file)` on a binary file beside `path`, then swap it in: it is never half written.

    Raises:
        UserError: if the disk is full or the folder cannot be written; `path` is as it was.
    """
    path = Path(path)
    beside = path.with_name(path.name + ".part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(beside, "wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(beside, path)
    except (OSError, RuntimeError) as error:  # RuntimeError: torch.save's word for a full disk
        beside.unlink(missing_ok=True)
        reason = str(error).splitlines()[0]
        remedy = "free space or choose another folder"
        raise UserError(f"cannot write {path}: {reason}; {remedy}") from None


def write_json(path, value):
    """Write `value` as JSON, as write_atomic does."""
    write_atomic(path, lambda file: file.write(json.dumps(value, indent=2).encode() + b"\n"))


def read_json(path):
    """Read a JSON object from a file.

    Raises:
        UserError: if there is no such file, or something else in it.
    """
    try:
        value = json.loads(Path(path).read_text(encoding="utf-8"))
        if isinstance(value, dict):
            return value
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}; check the path") from None
    except (ValueError, RecursionError):
        pass
    raise UserError(f"{path} is not a JSON object: delete it, and fetch or save it again")


def hub_url(repo, revision, file):
    """The address of a file on the Hugging Face hub, or on the mirror that E2E_SAE_HUB names."""
    hub = os.environ.get("E2E_SAE_HUB", "https://huggingface.co").rstrip("/")
    return f"{hub}/{repo}/resolve/{revision}/{file}"


class Broken(Exception):
    """A transfer that failed; another try may do."""


class Refused(Exception):
    """A transfer that failed for good."""


def download(url, path, sha256=None):
    """Fetch `url` to `path`, once: a file that is there is neither fetched nor hashed again.

    The transfer goes to `path.part`, goes on from there if it breaks (in a later run, too), and is
    checked against its length and its SHA-256 before it gets its name. Of several processes that
    want files in one folder, one fetches and the others wait.

    Args:
        url: http or https; proxies and certificates are the environment's, as requests has them.
        path: where the file goes.
        sha256: what it must be; if None, what the server's X-Linked-Etag says, if it says so.

    Returns:
        path

    Raises:
        UserError: if the file cannot be had. Nothing is then under its name.
    """
    path = Path(path)
    part = path.with_name(path.name + ".part")

    def give_up(reason):
        raise UserError(f"cannot fetch {url}: {reason}; put the file at {path} by hand, "
                        "or use --model stdlib, which needs no network") from None

    if path.exists():
        return path
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with lock(path.parent):
            start, tries, most = time.time(), 0, 0
            while not path.exists():
                try:
                    fetch_rest(url, part, sha256)
                    os.replace(part, path)
                except (Refused, ValueError) as error:  # ValueError: a header that is no number
                    give_up(error)
                except (Broken, requests.RequestException) as error:
                    size = part.stat().st_size if part.exists() else 0
                    tries, most = (1, size) if size > most else (tries + 1, most)
                    no_network = isinstance(error, requests.ConnectionError) and size == 0
                    if tries == 5 or no_network and time.time() - start > 5:
                        give_up(in_words(error))
                    print(f"{path.name}: {in_words(error)}; trying again", file=sys.stderr)
                    time.sleep(2 ** (tries - 1))
    except OSError as error:
        give_up(f"cannot write {part} ({error.strerror or error})")
    return path


def in_words(error):
    """The gist of a failed transfer: requests wraps the cause several layers deep."""
    kinds = requests.exceptions
    for kind, words in ((kinds.SSLError, "the server's certificate is not trusted"),
                        (kinds.ProxyError, "the proxy does not answer"),
                        (kinds.Timeout, "no answer in time"),
                        (kinds.ConnectionError, "no connection"),
                        (kinds.ChunkedEncodingError, "the connection broke")):
        if isinstance(error, kind):
            return "no answer in time" if "Read timed out" in str(error) else words
    return str(error)[:200]


def fetch_rest(url, part, sha256):
    """Fetch what `part` still lacks of `url`, and check the whole.

    Raises:
        Broken, Refused, requests.RequestException: if `part` is not the whole, right file now. If
            it holds wrong bytes, it is deleted.
    """
    done = part.stat().st_size if part.exists() else 0
    headers = {"Accept-Encoding": "identity"} | ({"Range": f"bytes={done}-"} if done else {})
    with requests.get(url, headers=headers, stream=True, timeout=TIMEOUT) as answer:
        code, span = answer.status_code, answer.headers.get("Content-Range", "")
        if code in (408, 429) or code >= 500:
            raise Broken(f"the server answers {code}")
        if code not in (200, 206, 416):
            raise Refused(f"the server answers {code} {answer.reason}")
        if answer.headers.get("Content-Type", "").startswith("text/html"):
            raise Refused("the server answers with a web page instead of the file")
        whole = code == 416 and span == f"bytes */{done}"  # nothing is left to fetch
        if not (whole or code == 200 or span.startswith(f"bytes {done}-")):
            part.unlink(missing_ok=True)
            raise Broken("the file on the server is another than before")
        done = 0 if code == 200 else done  # 200: the server sends it from the start
        first = answer.history[0] if answer.history else answer  # a redirect knows size and hash
        length = 0 if whole else answer.headers.get("Content-Length")
        linked = first.headers.get("X-Linked-Size")
        size = int(linked) if linked else None if length is None else done + int(length)
        etag = first.headers.get("X-Linked-Etag", "").strip('"')
        sha256 = sha256 or (etag if len(etag) == 64 else None)
        if done and not sha256:  # no telling whether the two parts belong together
            part.unlink()
            raise Broken("what was there of it cannot be checked")
        resumed, digest = done > 0, hashlib.sha256()
        progress = Progress(part.stem, size, "MB", 1e6, done)
        with open(part, "rb+" if resumed else "wb") as file:
            while resumed and (chunk := file.read(1 << 20)):
                digest.update(chunk)
            for chunk in () if whole else answer.iter_content(1 << 16):
                file.write(chunk)
                digest.update(chunk)
                progress(done := done + len(chunk))
    if size is not None and done < size:
        raise Broken(f"the connection broke after {done:,} of {size:,} bytes")
    if size is not None and done > size:
        wrong = f"{done:,} bytes came instead of {size:,}"
    elif sha256 and digest.hexdigest() != sha256:
        wrong = f"its SHA-256 is {digest.hexdigest()} instead of {sha256}"
    else:
        return
    part.unlink()
    raise (Broken if resumed else Refused)(wrong)  # resumed: the first half may be of another file


# ------------------------------------------------------------------------------------------------
# Safetensors: 8 bytes (the header's length, little-endian), the header (JSON), the raw tensors
# ------------------------------------------------------------------------------------------------

DTYPES = {
    "F64": (np.float64, torch.float64), "F32": (np.float32, torch.float32),
    "F16": (np.float16, torch.float16), "BF16": (np.int16, torch.bfloat16),
    "I64": (np.int64, torch.int64), "I32": (np.int32, torch.int32), "I16": (np.int16, torch.int16),
    "I8": (np.int8, torch.int8), "U8": (np.uint8, torch.uint8), "BOOL": (np.bool_, torch.bool),
}  # fmt: skip
MAX_HEADER = 1 << 20  # bytes; GPT-2 xl's has 90,000


def read_header(path):
    """Read and check the header of a safetensors file.

    Returns:
        {tensor name: (dtype name, shape, offset in the file)}

    Raises:
        UserError: if the file is missing, truncated, or no sound safetensors file.
    """

    def check(sound, what):
        if not sound:
            raise UserError(f"{path} is not a sound safetensors file ({what}): "
                            "delete it, and fetch or save it again")

    try:
        with open(path, "rb") as file:
            size = os.fstat(file.fileno()).st_size
            length = int.from_bytes(file.read(8), "little")
            check(8 + length <= size, f"a header of {length:,} bytes in a file of {size:,}")
            check(length <= MAX_HEADER, f"a header of {length:,} bytes, at most {MAX_HEADER:,}")
            raw = file.read(length)
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}; check the path") from None
    try:
        header = json.loads(raw)
    except (ValueError, RecursionError):
        header = None
    check(isinstance(header, dict), "its header is not a JSON object")
    header.pop("__metadata__", None)

    def naturals(value):
        return isinstance(value, list) and all(type(n) is int and 0 <= n < 1 << 63 for n in value)

    tensors, spans, end = {}, [], 0
    for name, entry in header.items():
        entry = entry if isinstance(entry, dict) else {}
        dtype, shape, span = (entry.get(key) for key in ("dtype", "shape", "data_offsets"))
        known = isinstance(dtype, str) and dtype in DTYPES
        check(known, f"tensor {name[:80]!r} has no known dtype")
        sound = naturals(shape) and len(shape) <= 8 and math.prod(n or 1 for n in shape) < 1 << 60
        check(sound, f"tensor {name[:80]!r} has no sound shape")
        n_bytes = math.prod(shape) * np.dtype(DTYPES[dtype][0]).itemsize
        fits = naturals(span) and len(span) == 2 and span[1] - span[0] == n_bytes
        check(fits, f"the offsets of tensor {name[:80]!r} do not fit its shape")
        tensors[name] = dtype, shape, 8 + length + span[0]
        spans.append(span)
    for span in sorted(spans):  # side by side: no gap, no overlap, nothing after the last
        check(span[0] == end, "its tensors overlap or leave gaps")
        end = span[1]
    check(8 + length + end == size, f"its tensors end at byte {8 + length + end:,} of {size:,}")
    return tensors


def read_safetensors(path):
    """Yield (name, tensor) of a safetensors file, one by one; the file is mapped, not copied.

    Raises:
        UserError: as read_header does.
    """
    for name, (dtype, shape, offset) in read_header(path).items():
        numpy_dtype, torch_dtype = DTYPES[dtype]
        if math.prod(shape) == 0:
            yield name, torch.empty(shape, dtype=torch_dtype)
            continue  # nothing can be mapped
        mapped = np.memmap(path, numpy_dtype, "c", offset, tuple(shape))  # "c": writable in memory
        yield name, torch.from_numpy(mapped).view(torch_dtype)


def write_safetensors(path, tensors):
    """Write {name: float32 or float16 tensor} as a safetensors file, as write_atomic does."""
    header, end = {}, 0
    for name, tensor in tensors.items():
        span = [end, end := end + tensor.numel() * tensor.element_size()]
        dtype = {torch.float32: "F32", torch.float16: "F16"}[tensor.dtype]
        header[name] = {"dtype": dtype, "shape": list(tensor.shape), "data_offsets": span}
    head = json.dumps(header).encode()
    head += b" " * (-len(head) % 8)  # so that the tensors are aligned

    def write(file):
        file.write(len(head).to_bytes(8, "little") + head)
        for tensor in tensors.values():
            file.write(tensor.detach().cpu().contiguous().numpy().data)

    write_atomic(path, write)


# ------------------------------------------------------------------------------------------------
# The model
# ------------------------------------------------------------------------------------------------


@dataclass
class GPTConfig:
    """The sizes in config.json, by their names there. The defaults are GPT-2 small's."""

    n_layer: int = 12
    n_head: int = 12
    n_embd: int = 768  # d_model
    n_positions: int = 1024  # the longest context
    vocab_size: int = 50257
    layer_norm_epsilon: float = 1e-5

    @classmethod
    def load(cls, path):
        """Read config.json.

        Raises:
            UserError: if a size is missing or impossible, or the model is no GPT-2.
        """
        raw = read_json(path)
        config = cls(**{name: raw.get(name) for name in cls.__dataclass_fields__})
        most = dict(n_layer=1000, n_head=1000, n_embd=10**5, n_positions=10**6, vocab_size=10**6)

        def check(name, sound, rule):
            if not sound:
                raise UserError(f"{path}: {name} is {repr(raw.get(name))[:80]}, must be {rule}: "
                                "fetch or save a GPT-2's config.json again")

        for name, limit in most.items():
            value = getattr(config, name)
            sound = type(value) is int and 1 <= value <= limit
            check(name, sound, f"a whole number from 1 to {limit:,}")
        epsilon = config.layer_norm_epsilon
        check("layer_norm_epsilon", type(epsilon) is float and 0 < epsilon < 1, "between 0 and 1")
        check("n_embd", config.n_embd % config.n_head == 0, f"a multiple of n_head {config.n_head}")
        check("activation_function", raw.get("activation_function") == "gelu_new", "gelu_new")
        return config


class Attention(nn.Module):
    """Causal multi-head self-attention: each position gathers from itself and those before it."""

    def __init__(self, config):
        super().__init__()
        self.n_head = config.n_head
        self.c_attn = nn.Linear(config.n_embd, 3 * config.n_embd)  # queries, keys, values at once
        self.c_proj = nn.Linear(config.n_embd, config.n_embd)

    def forward(self, x):  # (batch, pos, d_model) -> the same
        batch, pos, d_model = x.shape
        q, k, v = (part.view(batch, pos, self.n_head, -1).transpose(1, 2)
                   for part in self.c_attn(x).split(d_model, dim=2))  # (batch, head, pos, d_head)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.c_proj(y.transpose(1, 2).reshape(batch, pos, d_model))


class MLP(nn.Module):
    """Two layers with GPT-2's GELU, the approximation by tanh."""

    def __init__(self, config):
        super().__init__()
        self.c_fc = nn.Linear(config.n_embd, 4 * config.n_embd)
        self.c_proj = nn.Linear(4 * config.n_embd, config.n_embd)

    def forward(self, x):  # (batch, pos, d_model) -> the same
        return self.c_proj(F.gelu(self.c_fc(x), approximate="tanh"))


class Block(nn.Module):
    """A transformer block: attention, then MLP, each reads a normed copy and adds to the stream."""

    def __init__(self, config):
        super().__init__()
        self.ln_1 = nn.LayerNorm(config.n_embd, eps=config.layer_norm_epsilon)
        self.attn = Attention(config)
        self.ln_2 = nn.LayerNorm(config.n_embd, eps=config.layer_norm_epsilon)
        self.mlp = MLP(config)

    def forward(self, x):  # (batch, pos, d_model) -> the same
        x = x + self.attn(self.ln_1(x))
        return x + self.mlp(self.ln_2(x))


class GPT(nn.Module):
    """GPT-2 (Radford et al. 2019): embed, the blocks `h`, unembed. Its parameters are frozen."""

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.wte = nn.Embedding(config.vocab_size, config.n_embd)  # transposed, it unembeds
        self.wpe = nn.Embedding(config.n_positions, config.n_embd)  # positions
        self.h = nn.ModuleList(Block(config) for _ in range(config.n_layer))
        self.ln_f = nn.LayerNorm(config.n_embd, eps=config.layer_norm_epsilon)
        self.requires_grad_(False)

    def embed(self, tokens):
        """Token ids (batch, pos) -> the residual stream entering block 0 (batch, pos, d_model)."""
        x = self.wte(tokens) + self.wpe.weight[: tokens.shape[1]]
        return x - x.mean(-1, keepdim=True)  # zero mean: see the top of the file

    def unembed(self, x):
        """The residual stream leaving the last block -> logits (batch, pos, vocab)."""
        return F.linear(self.ln_f(x), self.wte.weight)

    def forward(self, tokens):
        """Token ids (batch, pos) -> logits (batch, pos, vocab); pos at most config.n_positions."""
        x = self.embed(tokens)
        for block in self.h:
            x = block(x)
        return self.unembed(x)

    @classmethod
    def from_pretrained(cls, name_or_folder):
        """Load "gpt2", "gpt2-medium", "gpt2-large", "gpt2-xl" (fetched once), "stdlib" or a folder.

        A folder holds `config.json` and `model.safetensors` as openai-community/gpt2 does. Weights
        come out as float32 on the CPU, with the mean taken off the residual stream.

        Raises:
            UserError: if a file cannot be had or is not sound, or a tensor is missing, is no part
                of this GPT-2, or has another shape.
        """
        folder = model_folder(name_or_folder)
        path = folder / "model.safetensors"
        with torch.device("meta"):  # shapes only: memory is taken once the file is known to fit
            gpt = cls(GPTConfig.load(folder / "config.json"))
        wanted, theirs = gpt.state_dict(), {}  # theirs: our name -> the name in the file

        def check(sound, what):
            if not sound:
                raise UserError(f"{path}: {what}: choose files of one and the same GPT-2")

        def stored_transposed(name):  # OpenAI's Conv1D stores (in, out), nn.Linear (out, in)
            return ".c_" in name and name.endswith("weight")

        for name, (_, shape, _) in read_header(path).items():
            ours = name.removeprefix("transformer.")
            if ours.endswith((".attn.bias", ".attn.masked_bias")) or ours == "lm_head.weight":
                continue  # the causal mask, and a copy of wte
            known = ours in wanted and ours not in theirs
            check(known, f"tensor {name[:80]!r} is no part of this GPT-2")
            fits = list(wanted[ours].shape)[:: -1 if stored_transposed(ours) else 1]
            check(shape == fits, f"tensor {name!r} has shape {shape}, config.json says {fits}")
            theirs[ours] = name
        missing = sorted(wanted.keys() - theirs.keys())
        check(not missing, f"tensor {missing[0] if missing else ''!r} is missing")
        gpt.to_empty(device="cpu")
        for name, tensor in read_safetensors(path):
            ours = name.removeprefix("transformer.")
            if ours not in theirs:
                continue
            parameter = gpt.get_parameter(ours)
            parameter.copy_(tensor.T if stored_transposed(ours) else tensor)
            if ".c_proj." in ours:  # what a block adds to the stream has zero mean over d_model
                parameter -= parameter.mean(0)
        return gpt


# ------------------------------------------------------------------------------------------------
# Models, tokenizers and text by name
# ------------------------------------------------------------------------------------------------


def model_folder(name_or_folder, files=MODEL_FILES):
    """The folder of a model; OpenAI's files are fetched into data/<name>/ if they are not there.

    Raises:
        UserError: if it is neither a known name nor a folder, or a file cannot be fetched.
    """
    name = str(name_or_folder)
    if name in OPENAI:
        for file in files:
            url = hub_url(f"openai-community/{name}", REVISION.get(name, "main"), file)
            download(url, DATA / name / file, SHA256.get(file) if name == "gpt2" else None)
        return DATA / name
    folder = DATA / "stdlib" if name == "stdlib" else Path(name)
    if not folder.is_dir():
        raise UserError(f"no model {name!r}: give {', '.join(OPENAI)}, stdlib, or a folder")
    return folder


def printable_bytes():
    """GPT-2's alphabet for raw bytes: {character: byte}, in the order of the first 256 token ids.

    The 188 printable Latin-1 characters stand for themselves, the other bytes for U+0100 upward.
    """
    themselves = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in themselves]
    return {chr(b): b for b in themselves} | {chr(256 + i): b for i, b in enumerate(others)}


END_OF_TEXT = "<|endoftext|>"
SPLIT = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"  # GPT-2's words


def load_tokenizer(name_or_folder):
    """A model's byte-pair tokenizer, a `tiktoken.Encoding`, from its `vocab.json`.

    The id of a token is its rank among the merges, so merges.txt is not needed.

    Raises:
        UserError: if vocab.json is missing or no vocabulary of GPT-2's kind.
    """
    path = model_folder(name_or_folder, ["vocab.json"]) / "vocab.json"
    vocab, alphabet = read_json(path), printable_bytes()
    try:
        ranks = {bytes(alphabet[char] for char in token): rank
                 for token, rank in vocab.items() if token != END_OF_TEXT}
        all_bytes = all(bytes([byte]) in ranks for byte in range(256))
        if not all_bytes or sorted(vocab.values()) != list(range(len(vocab))):
            raise ValueError
        special = {END_OF_TEXT: vocab[END_OF_TEXT]}
        return tiktoken.Encoding(path.parent.name, pat_str=SPLIT, mergeable_ranks=ranks,
                                 special_tokens=special, explicit_n_vocab=len(vocab))
    except (KeyError, TypeError, ValueError):
        rule = f"every byte, ids from 0 to n - 1, {END_OF_TEXT}"
        raise UserError(f"{path} is no vocabulary of GPT-2's kind ({rule}): delete it, and fetch "
                        "or save it again") from None


def load_tokens(name_or_folder, split):
    """A model's text: the token ids of its "train" or "val" split, a 1-D array of uint16.

    OpenAI's models read OpenWebText (fetched and tokenised on first use); any other reads the
    source of the running Python's standard library, with its own vocabulary.

    Raises:
        UserError: if the text cannot be had, or its file is not sound.
    """
    from data import openwebtext, stdlib  # here, since they import this file

    if str(name_or_folder) in OPENAI:
        return openwebtext.load_tokens(split)
    tokenizer = load_tokenizer(name_or_folder)
    size = GPTConfig.load(model_folder(name_or_folder, []) / "config.json").vocab_size
    if tokenizer.n_vocab > size:
        raise UserError(f"{name_or_folder}: vocab.json has {tokenizer.n_vocab:,} tokens, "
                        f"config.json {size:,}: choose files of one model")
    return stdlib.load_tokens(tokenizer, split)
