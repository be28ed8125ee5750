"""GPT-2 in plain PyTorch: the model, its weights, its tokenizer. It needs no other file: copy it.

    gpt = GPT.from_pretrained("gpt2")        # fetched once; or give a folder saved by transformers
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
import re
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


# ---- The model -----------------------------------------------------------------------------------

@dataclass
class GPTConfig:
    """The entries of config.json that this file reads, with transformers' names and defaults."""
    n_layer: int = 12
    n_head: int = 12
    n_embd: int = 768  # d_model
    n_positions: int = 1024  # the longest context
    vocab_size: int = 50257
    layer_norm_epsilon: float = 1e-5


SIZES = {  # OpenAI's models
    "gpt2": GPTConfig(),
    "gpt2-medium": GPTConfig(n_layer=24, n_head=16, n_embd=1024),
    "gpt2-large": GPTConfig(n_layer=36, n_head=20, n_embd=1280),
    "gpt2-xl": GPTConfig(n_layer=48, n_head=25, n_embd=1600),
}


class Attention(nn.Module):
    """Causal multi-head self-attention: (batch, pos, d_model) -> (batch, pos, d_model)."""
    def __init__(self, config):
        super().__init__()
        self.n_head = config.n_head
        self.c_attn = nn.Linear(config.n_embd, 3 * config.n_embd)  # queries, keys, values at once
        self.c_proj = nn.Linear(config.n_embd, config.n_embd)

    def forward(self, x):
        qkv = self.c_attn(x).unflatten(-1, (3, self.n_head, -1))  # (batch, pos, 3, head, d_head)
        qkv = qkv.transpose(1, 3)  # (batch, head, 3, pos, d_head)
        q, k, v = qkv.unbind(2)  # (batch, head, pos, d_head) each
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)  # (batch, head, pos, d_head)
        return self.c_proj(y.transpose(1, 2).flatten(2))


class MLP(nn.Module):
    """Two linear layers with a GELU between: (batch, pos, d_model) -> (batch, pos, d_model)."""
    def __init__(self, config):
        super().__init__()
        self.c_fc = nn.Linear(config.n_embd, 4 * config.n_embd)
        self.c_proj = nn.Linear(4 * config.n_embd, config.n_embd)

    def forward(self, x):
        return self.c_proj(F.gelu(self.c_fc(x), approximate="tanh"))


class Block(nn.Module):
    """A transformer block: (batch, pos, d_model) -> (batch, pos, d_model)."""
    def __init__(self, config):
        super().__init__()
        self.ln_1 = nn.LayerNorm(config.n_embd, config.layer_norm_epsilon)
        self.attn = Attention(config)
        self.ln_2 = nn.LayerNorm(config.n_embd, config.layer_norm_epsilon)
        self.mlp = MLP(config)

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
        self.ln_f = nn.LayerNorm(config.n_embd, config.layer_norm_epsilon)
        self.requires_grad_(False)

    def embed(self, tokens):
        """Token ids (batch, pos) -> the residual stream entering block 0 (batch, pos, d_model)."""
        x = self.wte(tokens) + self.wpe.weight[: tokens.shape[1]]
        return x - x.mean(-1, keepdim=True)  # here, not in wte, because wte also unembeds

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
        """Load one of OpenAI's models by name (see SIZES), "stdlib", or a GPT-2 from the folder
        that transformers saved it in. Parameters are float32, on the CPU, and frozen. UserError if
        the files cannot be obtained, or hold anything that would change the logits."""
        # The tokenizer's vocab.json, too, so that later runs need no network
        folder = model_folder(name_or_folder, ["vocab.json", "model.safetensors"])
        config = model_config(name_or_folder)
        path = folder / "model.safetensors"
        ensure(path.exists(), f"{folder} has no model.safetensors in one piece; write it with "
               'transformers: model.save_pretrained(folder, max_shard_size="10GB")')
        tensors = read_safetensors(path)
        state = {}
        with reading(path):
            for name, tensor in tensors.items():
                name = name.removeprefix("transformer.")
                if name.endswith((".attn.bias", ".attn.masked_bias")):
                    continue  # the causal mask, which old files hold too
                ensure(name not in state, f"{name} is there twice, with a prefix and without")
                weight = finite_float32(name, tensor)
                if ".c_" in name and weight.ndim == 2:
                    weight = weight.T.contiguous()  # OpenAI's (in, out) -> nn.Linear's (out, in)
                if ".c_proj." in name:
                    # c_proj writes to the residual stream, so its output gets zero mean over
                    # d_model, which is dimension 0 of the transposed weight and of the bias.
                    weight -= weight.mean(0)
                state[name] = weight
            lm_head = state.pop("lm_head.weight", state["wte.weight"])
            ensure(lm_head.equal(state["wte.weight"]),
                   "lm_head.weight differs from wte.weight, which gpt2.py unembeds with")
            with torch.device("meta"):  # allocates nothing; the tensors read above are assigned
                gpt = cls(config)
            gpt.load_state_dict(state, assign=True)  # raises for a missing or unexpected tensor
        return gpt


def model_config(name_or_folder):
    """A model's GPTConfig. UserError if config.json asks for something this file does not compute.
    Entries unknown to transformers' GPT2Config are ignored, as they are there."""
    if str(name_or_folder) in SIZES:
        return SIZES[str(name_or_folder)]
    path = model_folder(name_or_folder, []) / "config.json"
    raw = read_json(path)
    aliases = {"n_layer": "num_hidden_layers", "n_head": "num_attention_heads",
               "n_embd": "hidden_size", "n_positions": "max_position_embeddings"}
    config = GPTConfig()
    with reading(path):
        for name, default in vars(config).items():
            value = raw.get(name, default)
            if name in aliases:
                value = raw.get(aliases[name], value)
            ensure(type(value) is type(default) and 0 < value < 1e9, f"{name} is {value!r}")
            setattr(config, name, value)
        ensure(config.n_embd % config.n_head == 0, "n_embd is not a multiple of n_head")
        check_entries(raw, {
            "model_type": ["gpt2"],
            "activation_function": ["gelu_new", "gelu_pytorch_tanh"],
            "n_inner": [None, 4 * config.n_embd],
            "scale_attn_weights": [True],
            "scale_attn_by_inverse_layer_idx": [False],
            "add_cross_attention": [False],
            "is_causal": [True],
            "tie_word_embeddings": [True],
        })
    return config


# ---- The tokenizer -------------------------------------------------------------------------------

END_OF_TEXT = "<|endoftext|>"
SPLIT = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"  # GPT-2's words
# GPT-2 writes each byte of a token as one character: the 188 printable bytes of Latin-1 as
# themselves, the other 68 as U+0100 upward. So a space is written "Ġ".
PRINTABLE = [byte for byte in range(256) if chr(byte).isprintable() and chr(byte) != " "]
OTHERS = [byte for byte in range(256) if byte not in PRINTABLE]
ALPHABET = {chr(byte): byte for byte in PRINTABLE}
ALPHABET |= {chr(256 + i): byte for i, byte in enumerate(OTHERS)}


def load_tokenizer(name_or_folder):
    """A model's tokenizer, a `tiktoken.Encoding`: `encode_ordinary` gives transformers' ids.
    UserError if the folder's files describe a tokenizer of another kind."""
    folder = model_folder(name_or_folder, ["vocab.json"])
    path, vocab, merges = read_vocab(folder)
    with reading(path):
        if merges is None:  # vocab.json alone, as OpenAI's models have it here
            special = {END_OF_TEXT} & vocab.keys()
        else:
            # tiktoken merges in the order of the ids, transformers in the order of its list.
            known = set(ALPHABET)
            merged = []
            for merge in merges:
                left, right = merge.split(" ") if isinstance(merge, str) else merge
                ensure(left in known and right in known,
                       f"the merge {left} {right} comes before those of its parts")
                known.add(left + right)
                merged.append(left + right)
            by_id = sorted(vocab.keys() & set(merged), key=vocab.get)
            ensure(by_id == merged, "the token ids are not in the order of the merges")
            special = vocab.keys() - known  # what is no byte and no merge
        missing = ALPHABET.keys() - vocab.keys()
        ensure(not missing, f"{len(missing)} of the 256 bytes have no token")
        ensure(len(set(vocab.values())) == len(vocab), "two tokens have the same id")
        ranks = {}
        for token in vocab.keys() - special:
            ranks[bytes(ALPHABET[char] for char in token)] = vocab[token]
        return tiktoken.Encoding("gpt2", pat_str=SPLIT, mergeable_ranks=ranks,
                                 special_tokens={token: vocab[token] for token in special})


def read_vocab(folder):
    """The vocabulary of a model: (the file that holds it, {token: id}, merges or None). A merge is
    a pair of tokens, the earliest first. UserError for settings that GPT-2's tokenizer lacks."""
    settings = {}
    path = folder / "tokenizer_config.json"
    if path.exists():
        settings = read_json(path)
        with reading(path):
            check_entries(settings, {"add_prefix_space": [False], "tokenizer_class": [
                "GPT2Tokenizer", "GPT2TokenizerFast", "PreTrainedTokenizerFast",
                "TokenizersBackend", None]})
            check_added(settings.get("added_tokens_decoder", {}).values())
    ensure("added_tokens_decoder" in settings or not (folder / "added_tokens.json").exists(),
           f"{folder}/added_tokens.json: an older form; save the tokenizer anew with transformers")

    path = folder / "tokenizer.json"
    if path.exists():  # all in one file; vocab.json and merges.txt are the older form
        tokenizer = read_json(path)
        with reading(path):
            check_entries(tokenizer, {"normalizer": [None]})
            check_entries(tokenizer["pre_tokenizer"] or {"type": "no pre_tokenizer"}, {
                "type": ["ByteLevel"], "add_prefix_space": [False], "use_regex": [True]})
            check_entries(tokenizer["model"], {
                "type": ["BPE"], "dropout": [None, 0], "ignore_merges": [False],
                "continuing_subword_prefix": ["", None], "end_of_word_suffix": ["", None]})
            added = tokenizer["added_tokens"]
            check_added(added)
            vocab = tokenizer["model"]["vocab"] | {token["content"]: token["id"] for token in added}
            merges = tokenizer["model"]["merges"]
    else:
        path = folder / "vocab.json"
        vocab = read_json(path)
        merges = None
        if (folder / "merges.txt").exists():
            with reading(folder / "merges.txt"):
                lines = (folder / "merges.txt").read_bytes().decode("utf-8").splitlines()
                merges = [line for line in lines if line and not line.startswith("#version")]

    return path, vocab, merges


def check_added(tokens):
    """Raise UserError for an added token that is not special: transformers splits it off before it
    splits text into words, `encode_ordinary` does not."""
    for token in tokens:
        ensure(token["special"], f"the added token {token['content']!r} is not special")


# ---- User errors, reported in one line -----------------------------------------------------------

class UserError(ValueError):
    """A mistake that the user can correct. The message is one line: value, rule and remedy."""


def ensure(condition, message):
    """Raise UserError(message) unless the condition holds."""
    if not condition:
        raise UserError(message)


def check_entries(entries, allowed):
    """Raise UserError for an entry whose value is not one of those allowed, {name: values}. An
    entry that is not there counts as the first of them."""
    for name, values in allowed.items():
        value = entries.get(name, values[0])
        ensure(value in values, f"{name} is {value!r} instead of {values[0]!r}")


def run_command(main):
    """Run a program's main() and exit; print an error of the user as one line."""
    if sys.stdout is None:  # it was closed from the start
        sys.stdout = open(os.devnull, "w")
    sys.stdout.reconfigure(line_buffering=True, errors="backslashreplace")
    code = 0
    try:
        main()
    except BrokenPipeError:
        discard_stdout()
        code = 1
    except (UserError, OSError, ImportError, MemoryError, torch.OutOfMemoryError) as error:
        if os.getenv("RANK", "0") != "0":
            time.sleep(5)  # rank 0 has the same error and reports it; torchrun then ends this one
        print("error:", " ".join(str(error).split())[:1000], file=sys.stderr)
        code = 1
    except KeyboardInterrupt:
        code = 130
    except SystemExit as end:
        code = end.code or 0
    if "WORLD_SIZE" in os.environ:  # gloo's threads now and then abort a process that ends normally
        sys.stdout.flush()
        os._exit(code)
    sys.exit(code)


def discard_stdout():
    """Discard all further output: after a BrokenPipeError, as in `... | head`, nothing reads it."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


# ---- Files: fetched, never half written, errors in one line --------------------------------------

DATA = Path(__file__).resolve().parent / "data"
HUB = os.environ.get("E2E_SAE_HUB", "https://huggingface.co").rstrip("/")  # or a mirror of it
REVISION = "607a30d783dfa663caf39e06633721c8d4cfcd7e"  # of gpt2's files there
SHA256 = {  # of gpt2's files; vocab.json serves all of OpenAI's models
    "model.safetensors": "248dfc3911869ec493c76e65bf2fcf7f615828b0254c12b473182f0f81d3a707",
    "vocab.json": "196139668be63f3b5d6574427317ae82f612a97c5d1cdaf36ed2256dbf636783",
}


def model_folder(name_or_folder, files):
    """The folder of a model. The named files of OpenAI's models are fetched into data/<name>/."""
    name = str(name_or_folder)
    if name in SIZES:
        folder = DATA / name
        for file in files:
            if name == "gpt2" or file == "vocab.json":
                url = f"{HUB}/openai-community/gpt2/resolve/{REVISION}/{file}"
                download(url, folder / file, SHA256[file])
            else:
                url = f"{HUB}/openai-community/{name}/resolve/main/{file}"
                download(url, folder / file)
        return folder
    folder = DATA / "stdlib" if name == "stdlib" else Path(name)
    ensure(folder.is_dir(), f"--model {name}: not a folder, nor {', '.join(SIZES)} or stdlib")
    return folder


def download(url, path, sha256=None):
    """Fetch `url` to `path` unless it is there; an interrupted transfer continues where it stopped.
    The file gets its name once its SHA-256 is right: `sha256`, else the one that the hub states. If
    several processes call this, one fetches and the others wait. UserError if it fails."""
    path = Path(path)
    if path.exists():
        return path
    part = Path(f"{path}.part")
    path.parent.mkdir(parents=True, exist_ok=True)
    failures = 0  # in a row, without a new byte
    most_bytes = 0  # that were there at a failure
    with lock(path.parent):
        while not path.exists():
            part.touch()
            try:
                expected = fetch_rest(url, path, part, sha256)
            except requests.RequestException as error:
                done = part.stat().st_size
                failures = 0 if done > most_bytes else failures + 1  # new bytes: count anew
                most_bytes = max(most_bytes, done)
                ensure(failures < 4, f"cannot fetch {url} ({error}); put the file at {path}, "
                       "or use --model stdlib, which needs no network")
                time.sleep(2**failures)
                continue
            with open(part, "rb") as file:
                found = hashlib.file_digest(file, "sha256").hexdigest()
            if found != expected:
                part.unlink()
                raise UserError(f"{url}: SHA-256 {found} instead of {expected}; try again")
            os.replace(part, path)
    return path


def fetch_rest(url, path, part, sha256):
    """One attempt to fetch what `part` lacks; returns the SHA-256 that the whole file must have.
    RequestException if another attempt may succeed, UserError if the answer is not the file."""
    have = part.stat().st_size
    headers = {"Accept-Encoding": "identity", "Range": f"bytes={have}-"}
    with requests.get(url, headers=headers, stream=True, timeout=(4, 30)) as answer:
        stated_size = None
        for hop in answer.history + [answer]:  # the one that redirects states hash and size
            etag = hop.headers.get("X-Linked-Etag", "").strip('"')
            if re.fullmatch("[0-9a-f]{64}", etag):  # 40 digits are git's SHA-1, of a small file
                sha256 = sha256 or etag
            stated_size = stated_size or hop.headers.get("X-Linked-Size")
        content_range = answer.headers.get("Content-Range", "")
        if answer.status_code == 416:  # the file is no longer than `have`
            if content_range == f"bytes */{have}":
                return sha256
            part.write_bytes(b"")  # too long: raise_for_status raises, the next attempt starts anew
        advice = f"put the file at {path} by hand"
        ensure(answer.status_code not in (401, 403, 404),
               f"{url}: {answer.status_code} {answer.reason}; {advice}, or check its name")
        answer.raise_for_status()
        if answer.status_code == 206 and not content_range.startswith(f"bytes {have}-"):
            raise requests.RequestException(f"got {content_range} instead of bytes {have}-")

        rest = int(answer.headers.get("Content-Length", 0))  # 0: not stated
        size = have + rest if answer.status_code == 206 else rest
        ensure("html" not in answer.headers.get("Content-Type", ""),
               f"{url} answers with a web page, perhaps a login; {advice}")
        ensure(sha256, f"{url}: no SHA-256 is known, and the server states none; {advice}")
        ensure(not rest or stated_size in (None, str(size)),
               f"{url} sends {size} bytes instead of {stated_size}; {advice}")
        if answer.status_code not in (200, 206) or 0 < size < have:  # not the file: keep `part`
            raise requests.RequestException(f"got {answer.status_code} with {rest} bytes")
        print(f"fetching {url}, {size:,} bytes", file=sys.stderr)
        chunks = progress(answer.iter_content(1 << 18), f"fetching {url}", rest, "bytes")
        mode = "ab" if answer.status_code == 206 else "wb"  # 200: all of it, Range is ignored
        with open(part, mode) as file:
            file.writelines(chunks)  # raises if the connection breaks
    return sha256


@contextmanager
def reading(path):
    """Turn any error in reading and parsing the file at `path`, including those raised by `ensure`,
    into a UserError of one line that names the file."""
    try:
        if os.path.isfile(path):
            with open(path, "rb") as file:
                ensure(file.read(19) != b"version https://git",
                       "it is a pointer of git-lfs; fetch the file with `git lfs pull`")
        yield
    except torch.OutOfMemoryError:  # the file is not at fault
        raise
    except Exception as error:  # which one depends on where the file is damaged
        reason = " ".join(str(error).split())[:300] or type(error).__name__
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
        if part.exists():
            part.unlink()
        why = " ".join(str(error).split())[:300]
        raise UserError(f"cannot write {path}: {why}; free space or write elsewhere") from None


def read_json(path):
    """Read a JSON object as a dict."""
    with reading(path):
        value = json.loads(Path(path).read_text(encoding="utf-8-sig"))
        ensure(isinstance(value, dict), "it is not a JSON object")
        return value


def write_json(path, value):
    """Write a value as JSON, atomically."""
    with writing(path) as file:
        file.write(json.dumps(value, indent=2).encode() + b"\n")


def lock(folder, wait=True):
    """An open file: until it is closed, no other process can lock `folder`. On Windows, and on a
    file system without flock, nothing is locked."""
    file = open(Path(folder) / ".lock", "w")
    try:
        import fcntl
        fcntl.flock(file, fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise UserError(f"{folder} is in use by another process: wait or stop it") from None
    except (ImportError, OSError):
        pass
    return file


def progress(items, what, total, unit, size=len):
    """Yield items; every five seconds print the progress, the speed and the time left."""
    start = shown = time.time()
    done = 0
    for item in items:
        yield item
        done += size(item)
        if time.time() - shown > 5:
            shown = time.time()
            rate = done / (shown - start)
            print(f"{what}: {done:,} of {total:,} {unit}, {rate:,.0f} {unit}/s, "
                  f"{(total - done) / rate:,.0f} s left", file=sys.stderr)


# A safetensors file is the length of a header (8 bytes, little-endian), the header in JSON,
# {name: {"dtype", "shape", "data_offsets"}}, and the tensors' raw bytes.
DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16,
          "BF16": torch.bfloat16, "U8": torch.uint8, "BOOL": torch.bool}


def read_safetensors(path):
    """{name: tensor} of a safetensors file. The tensors are views of a copy-on-write memory map."""
    with reading(path):
        data = np.memmap(path, np.uint8, "c")
        start = 8 + int.from_bytes(data[:8].tobytes(), "little")
        header = json.loads(data[8:start].tobytes())
        header.pop("__metadata__", None)
        tensors = {}
        for name, entry in header.items():
            ensure(entry["dtype"] in DTYPES, f"{name} has the dtype {entry['dtype']}")
            first, last = entry["data_offsets"]
            ensure(0 <= first <= last <= len(data) - start, f"{name} lies outside of the file")
            raw = torch.from_numpy(data[start + first : start + last])
            tensors[name] = raw.view(DTYPES[entry["dtype"]]).view(entry["shape"])
        return tensors


def finite_float32(name, tensor):
    """A copy of a weight in float32. UserError, with the weight's name, for NaN and infinity."""
    ensure(tensor.is_floating_point(), f"{name} has the dtype {tensor.dtype}")
    weight = tensor.to(torch.float32, copy=True)
    ensure(weight.isfinite().all(), f"{name} holds NaN or infinity")
    return weight


def write_safetensors(path, tensors):
    """Write {name: float32 or float16 tensor} as a safetensors file, atomically."""
    header = {}
    end = 0
    for name, tensor in tensors.items():
        header[name] = {"dtype": f"F{8 * tensor.itemsize}", "shape": tensor.shape,
                        "data_offsets": [end, end + tensor.nbytes]}
        end += tensor.nbytes
    head = json.dumps(header).encode()
    with writing(path) as file:
        file.write(len(head).to_bytes(8, "little") + head)
        for tensor in tensors.values():
            file.write(tensor.detach().cpu().contiguous().numpy().data)
