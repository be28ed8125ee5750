"""GPT-2 in plain PyTorch: the model, its weights and its tokenizer. Copy this file as it is.

    gpt = GPT.from_pretrained("gpt2")        # fetched once; "stdlib" needs no network
    x = gpt.embed(tokens)                    # (batch, pos, d_model), the residual stream
    for block in gpt.h:
        x = block(x)                         # (batch, pos, d_model): change it as you like
    logits = gpt.unembed(x)                  # (batch, pos, vocab), what gpt(tokens) returns

The parameters are frozen: gradients reach activations only. Modules keep OpenAI's names.
One thing differs from OpenAI's code: the residual stream has zero mean over d_model. Outputs do not
change, because every reader of the stream applies LayerNorm first, which subtracts the mean anyway.
TransformerLens does the same, so activations here equal its `blocks.{layer}.hook_resid_pre`.
"""

import hashlib
import json
import os
import sys
import time
from collections import OrderedDict
from contextlib import contextmanager
from dataclasses import dataclass, fields
from pathlib import Path

import numpy as np
import requests
import tiktoken
import torch
import torch.nn as nn
import torch.nn.functional as F

DATA = Path(__file__).resolve().parent / "data"
HUB = os.environ.get("E2E_SAE_HUB", "https://huggingface.co").rstrip("/")  # or a mirror of it
OPENAI = "gpt2", "gpt2-medium", "gpt2-large", "gpt2-xl"
REVISION = {"gpt2": "607a30d783dfa663caf39e06633721c8d4cfcd7e"}  # of the others: main
SHA256 = {  # of the files of "gpt2"; for the other models the server states the hash
    "model.safetensors": "248dfc3911869ec493c76e65bf2fcf7f615828b0254c12b473182f0f81d3a707",
    "vocab.json": "196139668be63f3b5d6574427317ae82f612a97c5d1cdaf36ed2256dbf636783",
}


# ---- The model -----------------------------------------------------------------------------------

@dataclass
class GPTConfig:
    """The sizes in config.json, under their names there. The defaults are GPT-2 small's."""
    n_layer: int = 12
    n_head: int = 12
    n_embd: int = 768  # d_model
    n_positions: int = 1024  # the longest context
    vocab_size: int = 50257
    layer_norm_epsilon: float = 1e-5


class Attention(nn.Module):
    """Causal multi-head self-attention: (batch, pos, d_model) -> (batch, pos, d_model)."""
    def __init__(self, config):
        super().__init__()
        self.n_head = config.n_head
        self.c_attn = nn.Linear(config.n_embd, 3 * config.n_embd)  # queries, keys, values at once
        self.c_proj = nn.Linear(config.n_embd, config.n_embd)

    def forward(self, x):
        q, k, v = self.c_attn(x).unflatten(2, (3, self.n_head, -1)).permute(2, 0, 3, 1, 4)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)  # (batch, head, pos, d_head)
        return self.c_proj(y.transpose(1, 2).flatten(2))


class Block(nn.Module):
    """A transformer block: (batch, pos, d_model) -> (batch, pos, d_model)."""
    def __init__(self, config):
        super().__init__()
        d_model, epsilon = config.n_embd, config.layer_norm_epsilon
        self.ln_1 = nn.LayerNorm(d_model, epsilon)
        self.attn = Attention(config)
        self.ln_2 = nn.LayerNorm(d_model, epsilon)
        c_fc, c_proj = nn.Linear(d_model, 4 * d_model), nn.Linear(4 * d_model, d_model)
        self.mlp = nn.Sequential(OrderedDict(c_fc=c_fc, gelu=nn.GELU("tanh"), c_proj=c_proj))

    def forward(self, x):
        x = x + self.attn(self.ln_1(x))  # each part reads a normalised copy of the stream
        return x + self.mlp(self.ln_2(x))  # and adds its output to it


class GPT(nn.Module):
    """GPT-2 (Radford et al. 2019): embed, the blocks `h`, unembed. Its parameters are frozen."""
    def __init__(self, config):
        super().__init__()
        self.config = config
        self.wte = nn.Embedding(config.vocab_size, config.n_embd)  # also the unembedding
        self.wpe = nn.Embedding(config.n_positions, config.n_embd)
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
        """Load "gpt2", "gpt2-medium", "gpt2-large", "gpt2-xl", "stdlib", or a folder of their form.

        Parameters are float32, on the CPU, and frozen. UserError if the files cannot be had.
        """
        folder = model_folder(name_or_folder, ["config.json", "vocab.json", "model.safetensors"])
        raw, state = read_json(folder / "config.json"), {}
        tensors = read_safetensors(folder / "model.safetensors")
        with reading(folder), torch.device("meta"):  # "meta": a model without memory of its own
            config = GPTConfig(*(f.type(raw[f.name]) for f in fields(GPTConfig)))
            ensure(config.n_layer < 1000 and config.n_embd % config.n_head == 0, "impossible sizes")
            ensure(raw["activation_function"] == "gelu_new", "it is not a GPT-2's")
            for name, tensor in tensors.items():
                name = name.removeprefix("transformer.")
                if name.endswith((".attn.bias", "masked_bias")) or name == "lm_head.weight":
                    continue  # the causal mask, and a copy of wte
                if ".c_" in name and tensor.ndim == 2:
                    tensor = tensor.T  # OpenAI stores (in, out), nn.Linear (out, in)
                state[name] = tensor.to(torch.float32, copy=True).contiguous()
                if ".c_proj." in name:  # what a block adds to the residual stream
                    state[name] -= state[name].mean(0)
            gpt = cls(config)
            gpt.load_state_dict(state, assign=True)  # raises for a missing, odd or misshapen tensor
        return gpt


# ---- The tokenizer -------------------------------------------------------------------------------

END_OF_TEXT = "<|endoftext|>"
SPLIT = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"  # GPT-2's words
# GPT-2 writes a byte as one character: the 188 printable bytes of Latin-1 as themselves, the others
# as U+0100 upward. The order is that of token ids 0 to 255.
PRINTABLE = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
OTHERS = [byte for byte in range(256) if byte not in PRINTABLE]
ALPHABET = {chr(b): b for b in PRINTABLE} | {chr(256 + i): b for i, b in enumerate(OTHERS)}


def load_tokenizer(name_or_folder):
    """A model's tokenizer, a `tiktoken.Encoding`. A token's id is its rank among the merges."""
    path = model_folder(name_or_folder, ["vocab.json"]) / "vocab.json"
    vocab = read_json(path)
    with reading(path):
        extra = {END_OF_TEXT: vocab.pop(END_OF_TEXT)}
        ranks = {bytes(ALPHABET[char] for char in token): rank for token, rank in vocab.items()}
        return tiktoken.Encoding("gpt2", pat_str=SPLIT, mergeable_ranks=ranks,
                                 special_tokens=extra, explicit_n_vocab=len({*ranks.values()}) + 1)


def model_folder(name_or_folder, files):
    """The folder of a model. The named files of OpenAI's models are fetched into data/<name>/."""
    name = str(name_or_folder)
    folder = DATA / name if name in (*OPENAI, "stdlib") else Path(name)
    for file in files if name in OPENAI else ():
        url = f"{HUB}/openai-community/{name}/resolve/{REVISION.get(name, 'main')}/{file}"
        download(url, folder / file, SHA256.get(file) if name == "gpt2" else None)
    ensure(folder.is_dir(), f"--model {name}: not a folder, nor {', '.join(OPENAI)} or stdlib")
    return folder


# ---- Plumbing: one-line errors, files that are never half written, downloads, safetensors --------

DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "U8": torch.uint8,
          "BF16": torch.bfloat16, "I64": torch.int64, "I32": torch.int32, "BOOL": torch.bool}


class UserError(ValueError):
    """A mistake that the user can correct. The message is one line: value, rule and remedy."""


def ensure(condition, message):
    """Raise UserError(message) unless the condition holds."""
    if not condition:
        raise UserError(message)


@contextmanager
def reading(path):
    """Turn any error in reading and parsing the file at `path` into a one-line UserError."""
    try:
        yield
    except Exception as error:  # which one depends on where the file is damaged
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        raise UserError(f"cannot read {path}: {reason}; check or replace the file") from None


@contextmanager
def writing(path):
    """Open a file beside `path` and swap it in at the end, so `path` is never half written."""
    part = Path(f"{path}.part")
    try:
        part.parent.mkdir(parents=True, exist_ok=True)
        with open(part, "wb") as file:
            yield file
        os.replace(part, path)
    except (OSError, RuntimeError) as error:  # RuntimeError: torch.save on a full disk
        part.unlink(missing_ok=True)
        why = str(error).splitlines()[0]
        raise UserError(f"cannot write {path}: {why}; free space or write elsewhere") from None


def read_json(path):
    """Read a JSON object as a dict."""
    with reading(path):
        return dict(json.loads(Path(path).read_text(encoding="utf-8")))


def write_json(path, value):
    """Write a value as JSON, atomically."""
    with writing(path) as file:
        file.write(json.dumps(value, indent=2).encode() + b"\n")


def lock(folder, wait=True):
    """An open file: until it is closed, no other process can lock `folder` (but on Windows)."""
    file = open(Path(folder) / ".lock", "w")
    if os.name == "posix":
        import fcntl
        try:
            fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except BlockingIOError:
            raise UserError(f"{folder} is in use by another process: wait or stop it") from None
    return file


def progress(items, what, total, unit, size=len):
    """Yield items; every five seconds report what, how far, how fast and how long still."""
    done, start, shown = 0, time.time(), time.time()
    for item in items:
        yield item
        done += size(item)
        if time.time() - shown > 5:
            shown = time.time()
            rate = done / (shown - start)
            print(f"{what}: {done:,} of {total:,} {unit}, {rate:,.0f} {unit}/s, "
                  f"{(total - done) / rate:,.0f} s left", file=sys.stderr)


def download(url, path, sha256=None):
    """Fetch `url` to `path` unless it is there; an interrupted transfer continues where it stopped.
    The file gets its name once its SHA-256 is right: `sha256`, else what the server states. Of
    several processes one fetches, the others wait. UserError if the file cannot be had.
    """
    path, part, failures, most = Path(path), Path(f"{path}.part"), 0, 0
    path.parent.mkdir(parents=True, exist_ok=True)
    with lock(path.parent):
        while not path.exists():
            part.touch()
            headers = {"Accept-Encoding": "identity", "Range": f"bytes={part.stat().st_size}-"}
            try:
                with requests.get(url, headers=headers, stream=True, timeout=(4, 30)) as answer:
                    first = (answer.history or [answer])[0].headers  # large files are redirected
                    expected = sha256 or first.get("X-Linked-Etag", "").strip('"')
                    if answer.status_code != 416:  # 416: nothing is missing
                        answer.raise_for_status()
                        rest = int(answer.headers.get("Content-Length", 0))
                        chunks = answer.iter_content(1 << 18)  # raises if the connection breaks
                        with open(part, "ab" if answer.status_code == 206 else "wb") as file:
                            file.writelines(progress(chunks, f"fetching {url}", rest, "bytes"))
            except requests.RequestException as error:
                done = part.stat().st_size
                failures, most = (0 if done > most else failures + 1), max(done, most)
                ensure(failures < 4, f"cannot fetch {url} ({error}); put the file at {path}, "
                                     "or use --model stdlib, which needs no network")
                time.sleep(2**failures)
                continue
            found = hashlib.sha256(np.memmap(part, np.uint8, "r")).hexdigest()
            if found != (expected or found):
                part.unlink()
                raise UserError(f"{url}: SHA-256 {found} instead of {expected}; try again")
            os.replace(part, path)
    return path


def read_safetensors(path):
    """{name: tensor} of a safetensors file. The tensors are views of a copy-on-write memory map."""
    with reading(path):
        data = np.memmap(path, np.uint8, "c")
        start = 8 + int.from_bytes(data[:8].tobytes(), "little")
        header, tensors = json.loads(data[8:start].tobytes()), {}
        header.pop("__metadata__", None)
        for name, entry in header.items():
            first, last = entry["data_offsets"]
            raw = torch.from_numpy(data[start + first : start + last])
            tensors[name] = raw.view(DTYPES[entry["dtype"]]).view(entry["shape"])
        return tensors


def write_safetensors(path, tensors):
    """Write {name: float32 or float16 tensor} as a safetensors file, atomically."""
    arrays = {name: t.detach().cpu().contiguous().numpy() for name, t in tensors.items()}
    header, end = {}, 0
    for name, array in arrays.items():
        header[name] = {"dtype": f"F{8 * array.itemsize}", "shape": array.shape,
                        "data_offsets": [end, end := end + array.nbytes]}
    head = json.dumps(header).encode()
    with writing(path) as file:
        file.write(len(head).to_bytes(8, "little") + head)
        file.writelines(array.data for array in arrays.values())
