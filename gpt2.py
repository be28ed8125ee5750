"""GPT-2 in plain PyTorch: the model, its weights, its tokenizer, its text, and one download function.

    gpt = GPT.from_pretrained("gpt2")        # OpenAI's weights, fetched once into data/gpt2/
    gpt = GPT.from_pretrained("stdlib")      # the small model in data/stdlib/, no network needed
    logits = gpt(tokens)                     # (batch, pos) -> (batch, pos, vocab)

The forward pass is only this, so that anything can be done to the residual stream on the way:

    x = gpt.embed(tokens)                    # (batch, pos, d_model), the residual stream
    for block in gpt.h:
        x = block(x)                         # (batch, pos, d_model)
    logits = gpt.unembed(x)                  # (batch, pos, vocab)

What it is not: it has no dropout, no key-value cache and no generation. It is made to be read, run
forward, and differentiated with respect to activations: its parameters are frozen. The modules
bear OpenAI's names, so that every tensor of their file is found by its name.

One thing differs from OpenAI's code, and no output changes by it: the residual stream has zero mean
over d_model at every position. Whatever reads the stream reads it through a LayerNorm, which
subtracts that mean anyway. This is also what TransformerLens does ("center_writing_weights"), so
activations here equal its `blocks.{layer}.hook_resid_pre`.
"""

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
except ImportError:  # Windows has no advisory file locks; `lock` says so when one is wanted
    fcntl = None

DATA = Path(__file__).resolve().parent / "data"
SMALL, MAIN = "607a30d783dfa663caf39e06633721c8d4cfcd7e", "main"  # revisions on the hub
OPENAI = {"gpt2": SMALL, "gpt2-medium": MAIN, "gpt2-large": MAIN, "gpt2-xl": MAIN}
SHA256 = {  # of GPT-2 small's files; those of the others come from the server's X-Linked-Etag
    "model.safetensors": "248dfc3911869ec493c76e65bf2fcf7f615828b0254c12b473182f0f81d3a707",
    "vocab.json": "196139668be63f3b5d6574427317ae82f612a97c5d1cdaf36ed2256dbf636783",
}
MODEL_FILES = "config.json", "vocab.json", "model.safetensors"
TIMEOUT = (4, 30)  # seconds to connect, seconds without a byte


class UserError(ValueError):
    """What a user can cause and mend. The message is one line: the value, the rule, the remedy."""

    exit_code = 2


# ------------------------------------------------------------------------------------------------
# Fetching files
# ------------------------------------------------------------------------------------------------


class Progress:
    """A line on stderr that says what, how far, how fast and how long still.

    On a terminal the line is rewritten in place; in a log there is a new one every ten seconds.
    Nothing is printed of what ends within the first second.
    """

    def __init__(self, what, total, unit="", scale=1, done=0):
        self.what, self.total, self.unit, self.scale = what, total, unit, scale
        self.first, self.start, self.shown = done, time.time(), time.time()
        self.every = 1 if sys.stderr.isatty() else 10

    def __call__(self, done):
        """Say that `done` units of `total` are there (`total` may be None: not known)."""
        now = time.time()
        ended = done == self.total and self.shown > self.start
        if now - self.shown < self.every and not ended:
            return
        self.shown = now
        rate = (done - self.first) / max(now - self.start, 1e-9)
        line = f"{self.what}: {done / self.scale:,.0f}"
        if self.total:
            line += f" of {self.total / self.scale:,.0f}"
        line += f" {self.unit}, {rate / self.scale:,.1f} {self.unit}/s"
        if self.total and rate > 0:
            line += f", {duration((self.total - done) / rate)} left"
        end = "\n" if ended or self.every > 1 else ""
        print(f"\r{line:<78}" if self.every == 1 else line, end=end, file=sys.stderr, flush=True)


def duration(seconds):
    """Seconds as a person says them: 42 s, 3 min 05 s, 2 h 10 min, 3 d 04 h."""
    for unit, size, below, below_size in (
        ("d", 86400, "h", 3600),
        ("h", 3600, "min", 60),
        ("min", 60, "s", 1),
    ):
        if seconds >= size:
            return f"{seconds // size:.0f} {unit} {seconds % size // below_size:02.0f} {below}"
    return f"{seconds:.0f} s"


@contextmanager
def lock(folder, wait=True):
    """Hold `folder` against other processes; released by the system even after `kill -9`.

    Raises:
        UserError: with wait=False, if another process holds it.
    """
    if fcntl is None:
        print(
            f"this system has no file locks: start no second process on {folder}", file=sys.stderr
        )
        yield
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if not wait:
                raise UserError(
                    f"{folder} is in use by another process: wait for it, or stop it"
                ) from None
            print(f"another process is at work in {folder}: waiting for it", file=sys.stderr)
            fcntl.flock(handle, fcntl.LOCK_EX)
        yield
    finally:
        os.close(handle)


def write_atomic(path, write):
    """Call `write(file)` on a binary file beside `path`, then swap it in: never a half-written file.

    Raises:
        UserError: if the disk is full or the folder cannot be written; `path` is then as it was.
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
    except (OSError, RuntimeError) as error:  # torch.save reports a full disk as a RuntimeError
        beside.unlink(missing_ok=True)
        raise UserError(
            f"cannot write {path}: {error}; free some space or choose another folder"
        ) from None


def hub_url(repo, revision, file):
    """The address of a file on the Hugging Face hub, or on the mirror that E2E_SAE_HUB names."""
    hub = os.environ.get("E2E_SAE_HUB", "https://huggingface.co").rstrip("/")
    return f"{hub}/{repo}/resolve/{revision}/{file}"


class Broken(Exception):
    """A transfer that failed in a way that another try may mend."""


class Refused(Exception):
    """A transfer that failed for good."""


def download(url, path, sha256=None):
    """Fetch `url` to `path`, once: a file that is there is neither fetched nor hashed again.

    The transfer goes to `path.part`, goes on from there if it breaks (also in a later run), and is
    checked against its length and its SHA-256 before it gets its name. Of several processes that
    want files in one folder, one fetches and the others wait for it.

    Args:
        url: http or https; proxies and certificates are those of the environment, as in requests.
        path: where the file goes.
        sha256: what it must be; if None, what the server's X-Linked-Etag says, if it says so.

    Returns:
        path

    Raises:
        UserError: if the file cannot be had; nothing is left under its name.
    """
    path = Path(path)
    part = path.with_name(path.name + ".part")

    def give_up(reason):
        raise UserError(
            f"cannot fetch {url}: {reason}; put the file at {path} by hand, "
            "or use --model stdlib, which needs no network"
        ) from None

    if path.exists():
        return path
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with lock(path.parent):
            start, tries, before = time.time(), 0, 0
            while not path.exists():
                try:
                    fetch_rest(url, part, sha256)
                    os.replace(part, path)
                except (Refused, ValueError) as error:  # ValueError: a header that is no number
                    give_up(error)
                except (Broken, requests.RequestException) as error:
                    size = part.stat().st_size if part.exists() else 0
                    tries, before = (1 if size > before else tries + 1), size
                    offline = (
                        isinstance(error, requests.ConnectionError) and time.time() - start > 8
                    )
                    if tries == 5 or offline and not size:
                        give_up(in_words(error))
                    print(f"{path.name}: {in_words(error)}; trying again", file=sys.stderr)
                    time.sleep(2 ** (tries - 1))
    except OSError as error:
        give_up(f"cannot write {part}: {error.strerror or error}")
    return path


def in_words(error):
    """The gist of a failed transfer: requests wraps the cause several layers deep."""
    for kind, words in (
        (requests.exceptions.SSLError, "the server's certificate is not trusted"),
        (requests.exceptions.ProxyError, "the proxy does not answer"),
        (requests.exceptions.Timeout, "no answer in time"),
        (requests.exceptions.ConnectionError, "no connection"),
        (requests.exceptions.ChunkedEncodingError, "the connection broke"),
    ):
        if isinstance(error, kind):
            return words
    return str(error)[:200]


def fetch_rest(url, part, sha256):
    """Fetch what `part` still lacks of `url`, and check the whole.

    Raises:
        Broken, Refused, requests.RequestException: if `part` is not now the whole, right file. If
            its bytes were wrong, it is deleted.
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
        if code == 416 or code == 206 and not span.startswith(f"bytes {done}-"):
            if span != f"bytes */{done}":  # else nothing is left to fetch
                part.unlink()
                raise Broken("the file on the server has changed")
        resumed = done if code != 200 else 0  # 200: the server sends all of it again
        first = answer.history[0] if answer.history else answer  # the redirect knows size and hash
        length = answer.headers.get("Content-Length") if code != 416 else 0
        total = int(
            first.headers.get("X-Linked-Size")
            or (resumed + int(length) if length is not None else -1)
        )
        etag = first.headers.get("X-Linked-Etag", "").strip('"')
        sha256 = sha256 or (etag if len(etag) == 64 else None)
        digest = hashlib.sha256()
        progress = Progress(part.stem, total if total > 0 else None, "MB", 1e6, resumed)
        with open(part, "rb+" if resumed else "wb") as file:
            while chunk := file.read(1 << 20) if resumed else b"":
                digest.update(chunk)
            done = resumed
            for chunk in answer.iter_content(1 << 20) if code != 416 else ():
                file.write(chunk)
                digest.update(chunk)
                done += len(chunk)
                progress(done)
    wrong = None
    if 0 <= done < total:
        raise Broken(f"the connection broke after {done:,} of {total:,} bytes")
    if done > total >= 0:
        wrong = f"{done:,} bytes came instead of {total:,}"
    elif sha256 and digest.hexdigest() != sha256:
        wrong = f"its SHA-256 is {digest.hexdigest()} instead of {sha256}"
    if wrong:
        part.unlink()
        raise (
            Broken(wrong) if resumed else Refused(wrong)
        )  # resumed: perhaps only its first half was


# ------------------------------------------------------------------------------------------------
# Safetensors: 8 bytes (length of the header, little-endian), the header (JSON), the raw tensors
# ------------------------------------------------------------------------------------------------

DTYPES = {
    "F32": (np.float32, torch.float32),
    "F16": (np.float16, torch.float16),
    "BF16": (np.int16, torch.bfloat16),
    "F64": (np.float64, torch.float64),
    "I64": (np.int64, torch.int64),
    "I32": (np.int32, torch.int32),
    "I16": (np.int16, torch.int16),
    "I8": (np.int8, torch.int8),
    "U8": (np.uint8, torch.uint8),
    "BOOL": (np.bool_, torch.bool),
}
MAX_HEADER = 1 << 20  # GPT-2 xl's is 90 kB


def read_header(path):
    """Read and check the header of a safetensors file.

    Returns:
        {tensor name: (dtype name, shape, offset in the file)}

    Raises:
        UserError: if the file is missing, truncated, or not a sound safetensors file.
    """

    def check(ok, what):
        if not ok:
            raise UserError(
                f"{path} is not a sound safetensors file ({what}): delete it and fetch or save it again"
            )

    try:
        with open(path, "rb") as file:
            size = os.fstat(file.fileno()).st_size
            length = int.from_bytes(file.read(8), "little")
            check(
                size >= 8 and length <= size - 8,
                f"its header would be {length:,} bytes, the file is {size:,}",
            )
            check(
                length <= MAX_HEADER,
                f"its header is {length:,} bytes, at most {MAX_HEADER:,} are read",
            )
            header = json.loads(file.read(length))
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}; check the path") from None
    except (ValueError, RecursionError) as error:
        if isinstance(error, UserError):
            raise
        check(False, "its header is not JSON")
    check(isinstance(header, dict), "its header is not a JSON object")
    header.pop("__metadata__", None)

    def naturals(x):
        return isinstance(x, list) and all(type(n) is int and 0 <= n < 1 << 63 for n in x)

    tensors, spans = {}, []
    for name, entry in header.items():
        check(
            isinstance(entry, dict) and entry.get("dtype") in DTYPES,
            f"tensor {name[:80]!r} has no known dtype",
        )
        shape, span = entry.get("shape"), entry.get("data_offsets")
        check(naturals(shape) and len(shape) <= 8, f"tensor {name[:80]!r} has no sound shape")
        itemsize = np.dtype(DTYPES[entry["dtype"]][0]).itemsize
        check(
            naturals(span) and len(span) == 2 and span[1] - span[0] == math.prod(shape) * itemsize,
            f"tensor {name[:80]!r} has offsets that do not fit its shape",
        )
        tensors[name] = entry["dtype"], shape, 8 + length + span[0]
        spans.append(span)
    end = 0
    for span in sorted(
        spans
    ):  # the tensors lie side by side: no gap, no overlap, nothing after the last
        check(span[0] == end, "its tensors overlap or leave gaps")
        end = span[1]
    check(
        8 + length + end == size,
        f"its tensors end at byte {8 + length + end:,}, the file at {size:,}",
    )
    return tensors


def read_safetensors(path):
    """Yield (name, tensor) of a safetensors file, one at a time; the file is mapped, not copied.

    Raises:
        UserError: as read_header does.
    """
    for name, (dtype, shape, offset) in read_header(path).items():
        numpy_dtype, torch_dtype = DTYPES[dtype]
        if math.prod(shape) == 0:
            yield name, torch.empty(shape, dtype=torch_dtype)
        else:  # mode "c": torch wants writable memory; what is written stays in this process
            yield (
                name,
                torch.from_numpy(np.memmap(path, numpy_dtype, "c", offset, tuple(shape))).view(
                    torch_dtype
                ),
            )


def write_safetensors(path, tensors):
    """Write {name: float tensor} as a safetensors file, atomically.

    Raises:
        UserError: if it cannot be written; a file that was there is then still whole.
    """
    names = {torch.float32: "F32", torch.float16: "F16"}
    header, end = {}, 0
    for name, tensor in tensors.items():
        span = [end, end := end + tensor.numel() * tensor.element_size()]
        header[name] = {
            "dtype": names[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": span,
        }
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
            UserError: if a size is missing or impossible, or the model is not a GPT-2.
        """
        raw = read_json(path)
        if raw.get("activation_function", "gelu_new") != "gelu_new":
            raise UserError(
                f"{path}: activation_function is {str(raw['activation_function'])[:80]!r}, "
                "GPT-2's is 'gelu_new': choose a GPT-2"
            )
        config = cls(**{name: raw.get(name) for name in cls.__dataclass_fields__})
        for name, most in (
            ("n_layer", 1000),
            ("n_head", 1000),
            ("n_embd", 10**5),
            ("n_positions", 10**6),
            ("vocab_size", 10**6),
        ):
            value = getattr(config, name)
            if type(value) is not int or not 1 <= value <= most:
                raise UserError(
                    f"{path}: {name} is {str(value)[:80]}, must be a whole number from 1 to {most:,}: "
                    "fetch or save the file again"
                )
        epsilon = config.layer_norm_epsilon
        if type(epsilon) is not float or not 0 < epsilon < 1:
            raise UserError(
                f"{path}: layer_norm_epsilon is {str(epsilon)[:80]}, must be between 0 and 1: "
                "fetch or save the file again"
            )
        if config.n_embd % config.n_head:
            raise UserError(
                f"{path}: n_embd {config.n_embd} is not a multiple of n_head {config.n_head}: "
                "fetch or save the file again"
            )
        return config


class Attention(nn.Module):
    """Causal multi-head self-attention: each position gathers from itself and those before it."""

    def __init__(self, config):
        super().__init__()
        self.n_head = config.n_head
        self.c_attn = nn.Linear(
            config.n_embd, 3 * config.n_embd
        )  # queries, keys and values at once
        self.c_proj = nn.Linear(config.n_embd, config.n_embd)

    def forward(self, x):  # (batch, pos, d_model) -> the same
        batch, pos, d_model = x.shape
        q, k, v = (
            part.view(batch, pos, self.n_head, -1).transpose(1, 2)  # (batch, head, pos, d_head)
            for part in self.c_attn(x).split(d_model, dim=2)
        )
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
    """GPT-2 (Radford et al. 2019): embed, then the blocks `h`, then unembed. Its parameters are frozen."""

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.wte = nn.Embedding(
            config.vocab_size, config.n_embd
        )  # tokens; transposed, it is the unembedding
        self.wpe = nn.Embedding(config.n_positions, config.n_embd)  # positions
        self.h = nn.ModuleList(Block(config) for _ in range(config.n_layer))
        self.ln_f = nn.LayerNorm(config.n_embd, eps=config.layer_norm_epsilon)
        self.requires_grad_(False)

    def embed(self, tokens):
        """Token ids (batch, pos) -> the residual stream entering block 0 (batch, pos, d_model)."""
        x = self.wte(tokens) + self.wpe.weight[: tokens.shape[1]]
        return x - x.mean(-1, keepdim=True)  # zero mean: see the top of the file

    def unembed(self, x):
        """The residual stream after the last block (batch, pos, d_model) -> logits (batch, pos, vocab)."""
        return F.linear(self.ln_f(x), self.wte.weight)

    def forward(self, tokens):
        """Token ids (batch, pos) -> logits (batch, pos, vocab); pos is at most config.n_positions."""
        x = self.embed(tokens)
        for block in self.h:
            x = block(x)
        return self.unembed(x)

    @classmethod
    def from_pretrained(cls, name_or_folder):
        """Load "gpt2", "gpt2-medium", "gpt2-large", "gpt2-xl" (fetched once), "stdlib", or a folder.

        A folder holds `config.json` and `model.safetensors` as openai-community/gpt2 does. Weights
        come out as float32 on the CPU, with the residual stream's mean removed.

        Raises:
            UserError: if a file cannot be had or is not sound, or a tensor is missing, unexpected
                or of another shape.
        """
        folder = model_folder(name_or_folder)
        path = folder / "model.safetensors"
        with torch.device("meta"):  # shapes only: memory is taken once the file is known to fit
            gpt = cls(GPTConfig.load(folder / "config.json"))
        wanted = gpt.state_dict()
        found = {}  # our name -> their name
        for name in read_header(path):
            ours = name.removeprefix("transformer.")
            if (
                not ours.endswith((".attn.bias", ".attn.masked_bias")) and ours != "lm_head.weight"
            ):  # no weights
                found[ours] = name
        for name in sorted(wanted.keys() ^ found.keys()):
            what = "is missing" if name in wanted else "is not a part of this GPT-2"
            raise UserError(
                f"{path}: tensor {name[:80]!r} {what}: choose a GPT-2 whose config.json belongs to it"
            )
        gpt.to_empty(device="cpu")
        for name, tensor in read_safetensors(path):
            ours = name.removeprefix("transformer.")
            if found.get(ours) != name:
                continue
            if ".c_" in ours and ours.endswith("weight"):
                tensor = tensor.T  # OpenAI's Conv1D stores (in, out), nn.Linear (out, in)
            if tensor.shape != wanted[ours].shape:
                raise UserError(
                    f"{path}: tensor {name!r} has shape {list(tensor.shape)}, config.json says "
                    f"{list(wanted[ours].shape)}: choose files that belong together"
                )
            parameter = gpt.get_parameter(ours)
            parameter.copy_(tensor)
            if ".c_proj." in ours:  # what a block adds to the stream has zero mean over d_model
                parameter -= parameter.mean(0)
        return gpt


# ------------------------------------------------------------------------------------------------
# Models, tokenizers and text by name
# ------------------------------------------------------------------------------------------------


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
    raise UserError(f"{path} is not a JSON object: delete it and fetch or save it again")


def model_folder(name_or_folder, files=MODEL_FILES):
    """The folder of a model, with its files in it: OpenAI's are fetched into data/<name>/ if need be.

    Raises:
        UserError: if it is neither a known name nor a folder, or a file cannot be fetched.
    """
    name = str(name_or_folder)
    if name in OPENAI:
        for file in files:
            sha256 = SHA256.get(file) if name == "gpt2" else None
            download(
                hub_url(f"openai-community/{name}", OPENAI[name], file), DATA / name / file, sha256
            )
        return DATA / name
    folder = DATA / "stdlib" if name == "stdlib" else Path(name)
    if not folder.is_dir():
        raise UserError(f"no model {name!r}: give one of {', '.join(OPENAI)}, stdlib, or a folder")
    return folder


def printable_bytes():
    """GPT-2's alphabet for raw bytes: {character: byte}, in the order of the first 256 token ids.

    The 188 printable Latin-1 characters stand for themselves; the others for U+0100 upward.
    """
    themselves = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in themselves]
    return {chr(b): b for b in themselves} | {chr(256 + i): b for i, b in enumerate(others)}


END_OF_TEXT = "<|endoftext|>"
SPLIT = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"  # GPT-2's words


def load_tokenizer(name_or_folder):
    """A model's byte-pair tokenizer, as a `tiktoken.Encoding`, from its `vocab.json`.

    In GPT-2's vocabulary a token's id is its rank among the merges, so merges.txt is not needed.

    Raises:
        UserError: if vocab.json is missing or is not such a vocabulary.
    """
    path = model_folder(name_or_folder, ["vocab.json"]) / "vocab.json"
    vocab, alphabet = read_json(path), printable_bytes()
    try:
        ranks = {
            bytes(alphabet[c] for c in token): rank
            for token, rank in vocab.items()
            if token != END_OF_TEXT
        }
        if (
            sorted(vocab.values()) != list(range(len(vocab)))
            or not {bytes([b]) for b in range(256)} <= ranks.keys()
        ):
            raise ValueError
        return tiktoken.Encoding(
            path.parent.name,
            pat_str=SPLIT,
            mergeable_ranks=ranks,
            special_tokens={END_OF_TEXT: vocab[END_OF_TEXT]},
            explicit_n_vocab=len(vocab),
        )
    except (KeyError, TypeError, ValueError):
        raise UserError(
            f"{path} is not a GPT-2 vocabulary (every byte, ids 0 to n-1, {END_OF_TEXT}): "
            "delete it and fetch or save it again"
        ) from None


def load_tokens(name_or_folder, split):
    """A model's text: the token ids of its "train" or "val" split, a 1-D array of uint16.

    A model with OpenAI's vocabulary reads OpenWebText (fetched and tokenised on first use); any
    other reads the running Python's standard library, with its own vocabulary.

    Raises:
        UserError: if the text cannot be had, or its file is not sound.
    """
    if str(name_or_folder) in OPENAI:
        from data import openwebtext

        return openwebtext.load_tokens(split)
    from data import stdlib

    return stdlib.load_tokens(load_tokenizer(name_or_folder), split)
