"""Tests against independent oracles: transformers, safetensors, formulas in float64.

    python -m pytest -q test_e2e_sae.py
"""

import hashlib
import html.parser
import io
import itertools
import json
import lzma
import multiprocessing
import os
import re
import shutil
import signal
import subprocess
import sys
import tarfile
import threading
from concurrent.futures import ThreadPoolExecutor
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest
import requests
import torch
import torch._dynamo.testing
import torch.nn.functional as F
from safetensors.torch import load_file, save, save_file
from transformers import AutoTokenizer, GPT2Config, GPT2LMHeadModel

import data
import e2e_sae
import gpt2
from data import concepts, load_tokens, openwebtext, stdlib
from e2e_sae import Config, KLLoss, SAE, compute_loss, evaluate
from gpt2 import GPT, GPTConfig, UserError, run_command

os.environ["CUDA_VISIBLE_DEVICES"] = ""  # the CPU everywhere; with a GPU, processes must not fork
torch.set_num_threads(1)
HERE = Path(gpt2.__file__).resolve().parent
STDLIB = HERE / "data" / "stdlib"


# ---- Shared by all tests -------------------------------------------------------------------------

def hf_model(n_layer=3, n_head=2, n_embd=16, n_positions=32, vocab_size=1024):
    """A random GPT-2 from transformers. Its parameters are multiples of 1/128, which half precision
    holds exactly, and whose mean over d_model is exact in float32."""
    torch.manual_seed(0)
    config = GPT2Config(
        n_layer=n_layer, n_head=n_head, n_embd=n_embd,
        n_positions=n_positions, vocab_size=vocab_size)
    model = GPT2LMHeadModel(config).eval()
    for parameter in model.requires_grad_(False).parameters():
        parameter += torch.randn_like(parameter) / 10
        parameter.copy_((128 * parameter).round() / 128)
    return model


def write_model(model, folder, prefix="", dtype=torch.float32):
    """Write a model in the form of openai-community/gpt2, with the embedded model's vocabulary."""
    folder.mkdir(parents=True, exist_ok=True)
    state = model.transformer.state_dict()
    state["h.0.attn.bias"] = torch.ones(1, 1, 4, 4)  # old files contain the causal mask
    state["h.0.attn.masked_bias"] = torch.tensor(-1e4)
    tensors = {prefix + name: tensor.to(dtype).contiguous() for name, tensor in state.items()}
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    (folder / "config.json").write_text(model.config.to_json_string())
    shutil.copy(STDLIB / "vocab.json", folder)
    return folder


@pytest.fixture(scope="session")
def tiny(tmp_path_factory):
    """The folder of a model so small that a training run takes a second."""
    return write_model(hf_model(), tmp_path_factory.mktemp("models") / "tiny")


def sha256(content):
    """The SHA-256 of bytes, as 64 hex digits."""
    return hashlib.sha256(content).hexdigest()


def call_of(function, *args):
    """A function without arguments that calls `function` with these."""
    def call():
        return function(*args)
    return call


def error_of(call, *words):
    """Assert that call() raises a UserError of one line that contains these words."""
    with pytest.raises(UserError) as caught:
        call()
    message = str(caught.value)
    assert "\n" not in message
    for word in words:
        assert str(word) in message


def kill_9(*args):
    """End this process as `kill -9` does, whatever the arguments."""
    os.kill(os.getpid(), signal.SIGKILL)


def killed(call):
    """Run call() in another process. Returns whether kill_9 ended it."""
    process = multiprocessing.get_context("fork").Process(target=call)
    process.start()
    process.join(60)
    return process.exitcode == -signal.SIGKILL


def killed_at(nth, function):
    """A function that does what `function` does, but whose nth call ends the process."""
    calls = itertools.count(1)

    def counted(*args, **more):
        if next(calls) == nth:
            kill_9()
        return function(*args, **more)
    return counted


def change_json(path, keys, value):
    """Set one entry of a JSON file; `keys` lead to it from the outside."""
    whole = json.loads(path.read_text())
    inner = whole
    for key in keys[:-1]:
        inner = inner[key]
    inner[keys[-1]] = value
    path.write_text(json.dumps(whole))


# ---- gpt2.py: the model --------------------------------------------------------------------------

@pytest.mark.parametrize("sizes, prefix, stored", [
    ((2, 2, 16, 32), "", torch.float32),
    ((3, 4, 32, 64), "transformer.", torch.float16),
    ((1, 1, 8, 16), "", torch.bfloat16),
    ((1, 2, 8, 16), "", torch.float64),
], ids=str)
def test_logits_equal_transformers(tmp_path, sizes, prefix, stored):
    """Logits are those of transformers, whichever precision the file has."""
    model = hf_model(*sizes, vocab_size=101)
    gpt = GPT.from_pretrained(write_model(model, tmp_path, prefix, stored))
    for parameter in gpt.parameters():
        assert parameter.dtype == torch.float32
        assert not parameter.requires_grad
    for dtype, bound in (torch.float32, 1e-4), (torch.float64, 1e-9):
        gpt.to(dtype)
        model.to(dtype)
        for length in 1, 7, sizes[-1]:
            tokens = torch.randint(0, 101, (2, length))
            assert (gpt(tokens) - model(tokens).logits).abs().max() < bound


def test_residual_stream_has_zero_mean(tiny):
    """The stream has zero mean over d_model in every layer, and unembeds to the same logits."""
    gpt = GPT.from_pretrained(tiny).double()
    tokens = torch.arange(60).view(2, 30)
    x = gpt.embed(tokens)
    for block in gpt.h:
        x = block(x)
        assert x.mean(-1).abs().max() < 1e-12
        assert x.std() > 0.1
    assert torch.equal(gpt.unembed(x), gpt(tokens))


def compare_with_transformers(folder, texts):
    """Assert that transformers opens a folder and agrees on tokens and logits. Returns the loss."""
    tokenizer = gpt2.load_tokenizer(folder)
    oracle = AutoTokenizer.from_pretrained(folder)
    ids = tokenizer.encode_ordinary_batch(texts)
    assert ids == [oracle.encode(text) for text in texts]
    assert tokenizer.decode_batch(ids) == texts
    assert tokenizer.eot_token == oracle.eos_token_id

    gpt = GPT.from_pretrained(folder)
    model = GPT2LMHeadModel.from_pretrained(folder).float().requires_grad_(False)
    windows = torch.tensor(sum(ids, []))
    windows = windows.unfold(0, gpt.config.n_positions, gpt.config.n_positions)
    windows = windows[:: len(windows) // 60]
    logits = gpt(windows)
    assert (logits - model(windows).logits).abs().max() < 1e-3
    targets = windows[:, 1:].flatten()
    return F.cross_entropy(logits[:, :-1].flatten(0, 1), targets)


ODD_TEXTS = [
    "", " ", "\n\n  \t x", "naïve café 東京 🐍 \u00a0\u2028", "a'll 'S 12345 ½ ² x_y's",
    "".join(map(chr, range(256))), "    def f(x):\n\t  pass\n"]


def test_embedded_model():
    """Transformers opens the embedded model, agrees with it, and it has learned Python."""
    sources = list(stdlib.read_files("val").values())[:40]
    assert compare_with_transformers(STDLIB, sources + ODD_TEXTS) < 3


def test_other_names_of_the_sizes(tmp_path):
    """config.json may name the sizes as transformers' other models do."""
    model = hf_model()
    write_model(model, tmp_path)
    entries = json.loads((tmp_path / "config.json").read_text())
    aliases = {
        "n_layer": "num_hidden_layers",
        "n_head": "num_attention_heads",
        "n_embd": "hidden_size",
        "n_positions": "max_position_embeddings",
    }
    for name, alias in aliases.items():
        entries[alias] = entries.pop(name)
    (tmp_path / "config.json").write_text(json.dumps(entries))
    oracle = GPT2LMHeadModel.from_pretrained(tmp_path)
    tokens = torch.arange(60).view(2, 30)
    logits = GPT.from_pretrained(tmp_path)(tokens)
    assert (logits - oracle(tokens).logits).abs().max() < 1e-4


@pytest.mark.parametrize("name, value", [
    ("scale_attn_by_inverse_layer_idx", True),
    ("scale_attn_weights", False),
    ("activation_function", "relu"),
    ("activation_function", "gelu"),
    ("n_inner", 32),
    ("tie_word_embeddings", False),
    ("add_cross_attention", True),
    ("model_type", "gpt_neo"),
    ("n_layer", "3"),
    ("layer_norm_epsilon", float("nan")),
])
def test_config_that_changes_the_computation(tmp_path, name, value):
    """An entry of config.json that would give other logits is refused by name, with its value."""
    write_model(hf_model(), tmp_path)
    change_json(tmp_path / "config.json", [name], value)
    error_of(call_of(GPT.from_pretrained, tmp_path), tmp_path / "config.json", name, repr(value))


@pytest.mark.parametrize("name, value", [
    ("resid_pdrop", 0.5),
    ("reorder_and_upcast_attn", True),
    ("n_inner", 64),
    ("activation_function", "gelu_pytorch_tanh"),
    ("nobody_knows", [1]),
])
def test_config_that_changes_nothing(tmp_path, tiny, name, value):
    """An entry of config.json that leaves the logits as they are is no reason to refuse."""
    write_model(hf_model(), tmp_path)
    change_json(tmp_path / "config.json", [name], value)
    tokens = torch.arange(30).view(1, 30)
    expected = GPT.from_pretrained(tiny)(tokens)
    assert torch.equal(GPT.from_pretrained(tmp_path)(tokens), expected)


# ---- gpt2.py: wrong files ------------------------------------------------------------------------

SIZE_NAMES = ["n_layer", "n_head", "n_embd", "n_positions", "vocab_size"]
WRONG_SIZES = [None, "x", [1], 10**30, float("inf")]


@pytest.mark.parametrize("name, value", list(itertools.product(SIZE_NAMES, WRONG_SIZES)))
def test_wrong_sizes(tmp_path, name, value):
    """A size that is no size is refused by name."""
    write_model(hf_model(), tmp_path)
    change_json(tmp_path / "config.json", [name], value)
    error_of(call_of(GPT.from_pretrained, tmp_path), tmp_path / "config.json", name)


@pytest.mark.parametrize("name, value", [
    ("n_layer", 2), ("n_embd", 10**5), ("n_head", 3), ("vocab_size", 10**6)])
def test_sizes_of_another_model(tmp_path, name, value):
    """A size that the tensors do not have is refused."""
    write_model(hf_model(), tmp_path)
    change_json(tmp_path / "config.json", [name], value)
    error_of(call_of(GPT.from_pretrained, tmp_path), tmp_path)


LFS_POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n"


@pytest.mark.parametrize("content, word", [
    (b"", ""),
    (b"[]", "JSON object"),
    (b"{", ""),
    (b"\xff", ""),
    (b"[" * 10**5, ""),
    (LFS_POINTER, "git lfs pull"),
], ids=["empty", "list", "cut", "no UTF-8", "deep", "git-lfs"])
@pytest.mark.parametrize("file", ["config.json", "vocab.json", "model.safetensors"])
def test_damaged_file(tmp_path, file, content, word):
    """A damaged file, or a pointer in its place, is refused by its path."""
    write_model(hf_model(), tmp_path)
    (tmp_path / file).write_bytes(content)
    load = gpt2.load_tokenizer if file == "vocab.json" else GPT.from_pretrained
    if file == "model.safetensors" and content != LFS_POINTER:
        word = ""
    error_of(call_of(load, tmp_path), tmp_path / file, word)


NAN_BIAS = torch.full((16,), float("nan"))
INFINITE_BIAS = torch.full((16,), float("inf"))


@pytest.mark.parametrize("name, tensor", [
    ("h.1.ln_2.bias", None),
    ("h.1.more", torch.ones(2)),
    ("wpe.weight", torch.ones(31, 16)),
    ("h.1.attn.c_attn.weight", torch.ones(48, 16)),
    ("ln_f.weight", torch.ones(1, 16)),
    ("lm_head.weight", torch.ones(1024, 16)),
    ("h.2.mlp.c_proj.bias", NAN_BIAS),
    ("ln_f.bias", INFINITE_BIAS),
    ("ln_f.bias", torch.ones(16, dtype=torch.uint8)),
], ids=str)
def test_wrong_tensor(tmp_path, name, tensor):
    """A tensor that is missing (None), unknown, misshapen or not finite is refused by name."""
    path = write_model(hf_model(), tmp_path) / "model.safetensors"
    tensors = load_file(path)
    tensors.pop(name, None)
    if tensor is not None:
        tensors[name] = tensor
    path.write_bytes(save(tensors))
    error_of(call_of(GPT.from_pretrained, tmp_path), path, name)


def test_lm_head_that_equals_wte(tmp_path, tiny):
    """An lm_head.weight that repeats wte.weight is accepted."""
    path = write_model(hf_model(), tmp_path) / "model.safetensors"
    tensors = load_file(path)
    tensors["lm_head.weight"] = tensors["wte.weight"].clone()
    save_file(tensors, path)
    tokens = torch.arange(30).view(1, 30)
    expected = GPT.from_pretrained(tiny)(tokens)
    assert torch.equal(GPT.from_pretrained(tmp_path)(tokens), expected)


def test_model_in_shards(tmp_path):
    """A folder without model.safetensors is refused with the option that writes one."""
    (write_model(hf_model(), tmp_path) / "model.safetensors").unlink()
    error_of(call_of(GPT.from_pretrained, tmp_path), tmp_path, "max_shard_size")
    error_of(call_of(GPT.from_pretrained, "gpt3"), "gpt3", "gpt2-xl", "stdlib")


ODD_ENTRIES = [
    None, True, -1, 0, 2**31, 2**64, 0.5,
    "", "F32", "BF16", "I64",
    [], [2], [-1], [0, 2**62, 4], {}, [[]], [4, 0], [0, 10**9],
]


def mutants(whole, i, random):
    """Three damaged copies of a safetensors file: cut, with a bit flipped, with a wrong header."""
    start = 8 + int.from_bytes(whole[:8], "little")
    at = random.integers((8, 60, start, len(whole))[i % 4])
    flipped = bytearray(whole)
    flipped[at] ^= 1 << random.integers(8)
    header = json.loads(whole[8:start])
    name = random.choice(list(header))
    field = ("dtype", "shape", "data_offsets")[i % 3]
    header[name][field] = ODD_ENTRIES[random.integers(len(ODD_ENTRIES))]
    head = json.dumps(header).encode()
    return whole[:at], flipped, len(head).to_bytes(8, "little") + head + whole[start:]


def test_mutated_weights(tmp_path):
    """Whatever happens to a file of weights, it loads or is refused in one line."""
    path = write_model(hf_model(1, 1, 2, 2, 2), tmp_path) / "model.safetensors"
    whole = path.read_bytes()
    random = np.random.default_rng(0)
    loaded = refused = 0
    for i in range(200):
        for content in mutants(whole, i, random):
            path.write_bytes(content)
            try:
                GPT.from_pretrained(tmp_path)
                loaded += 1
            except UserError as error:
                assert "\n" not in str(error)
                refused += 1
    assert refused > 400
    assert loaded > 10


# ---- gpt2.py: the tokenizer ----------------------------------------------------------------------

@pytest.fixture
def saved(tmp_path):
    """A folder with the embedded model's tokenizer as transformers saves it, in tokenizer.json."""
    AutoTokenizer.from_pretrained(STDLIB).save_pretrained(tmp_path)
    for old in "vocab.json", "merges.txt":
        (tmp_path / old).unlink(missing_ok=True)
    shutil.copy(STDLIB / "config.json", tmp_path)
    return tmp_path


def assert_ids_of_transformers(folder):
    """Assert that a folder's tokenizer gives transformers' ids for odd texts, and has its end."""
    oracle = AutoTokenizer.from_pretrained(folder)
    tokenizer = gpt2.load_tokenizer(folder)
    assert tokenizer.eot_token == oracle.eos_token_id
    for text in ODD_TEXTS:
        assert tokenizer.encode_ordinary(text) == oracle.encode(text)


def test_tokenizer_json_alone(saved):
    """tokenizer.json is enough, in the form that transformers writes."""
    assert_ids_of_transformers(saved)


def test_special_token_in_front(saved):
    """Ids that a special token in front has shifted are right."""
    vocab = json.loads((STDLIB / "vocab.json").read_text())
    shifted = {token: (i + 1) % len(vocab) for token, i in vocab.items()}
    change_json(saved / "tokenizer.json", ["model", "vocab"], shifted)
    change_json(saved / "tokenizer.json", ["added_tokens", 0, "id"], 0)
    (saved / "tokenizer_config.json").write_text('{"eos_token": "<|endoftext|>"}')
    assert_ids_of_transformers(saved)


@pytest.mark.parametrize("file, keys, value, word", [
    ("tokenizer.json", ["normalizer"], {"type": "NFC"}, "normalizer"),
    ("tokenizer.json", ["pre_tokenizer", "type"], "Digits", "type"),
    ("tokenizer.json", ["pre_tokenizer", "add_prefix_space"], True, "add_prefix_space"),
    ("tokenizer.json", ["pre_tokenizer", "use_regex"], False, "use_regex"),
    ("tokenizer.json", ["pre_tokenizer"], None, ""),
    ("tokenizer.json", ["model", "type"], "WordPiece", "type"),
    ("tokenizer.json", ["model", "end_of_word_suffix"], "</w>", "end_of_word_suffix"),
    ("tokenizer.json", ["model", "dropout"], 0.1, "dropout"),
    ("tokenizer.json", ["added_tokens", 0, "special"], False, "<|endoftext|>"),
    ("tokenizer.json", ["model", "vocab"], {"!": 0}, ""),
    ("tokenizer_config.json", ["add_prefix_space"], True, "add_prefix_space"),
], ids=str)
def test_tokenizer_of_another_kind(saved, file, keys, value, word):
    """A setting with which transformers gives other ids is refused by its name."""
    change_json(saved / file, keys, value)
    error_of(call_of(gpt2.load_tokenizer, saved), saved / file, word)


def test_added_token_that_is_not_special(saved):
    """A token that tokenizer_config.json adds, and that is not special, is refused by name."""
    added = {"7": {"content": "def", "special": False}}
    change_json(saved / "tokenizer_config.json", ["added_tokens_decoder"], added)
    error_of(call_of(gpt2.load_tokenizer, saved), saved, "'def'")


@pytest.mark.parametrize("token, value", [
    ("!", "0"),
    ("!", -1),
    ("!", None),
    ("!", 1),
    ("\u20ac", 0),
    ("<|endoftext|>", 1022),
])
def test_wrong_vocabulary(tmp_path, token, value):
    """An id that is no id, or that two tokens have, is refused."""
    shutil.copy(STDLIB / "vocab.json", tmp_path)
    change_json(tmp_path / "vocab.json", [token], value)
    error_of(call_of(gpt2.load_tokenizer, tmp_path), tmp_path / "vocab.json")


def test_ids_in_another_order(tmp_path):
    """A vocabulary whose ids are not in the order of merges.txt is refused: tiktoken needs it."""
    shutil.copy(STDLIB / "merges.txt", tmp_path)
    vocab = json.loads((STDLIB / "vocab.json").read_text())
    tokens = sorted(vocab, key=vocab.get)
    first, second = tokens[300:302]
    vocab[first], vocab[second] = vocab[second], vocab[first]
    (tmp_path / "vocab.json").write_text(json.dumps(vocab))
    error_of(call_of(gpt2.load_tokenizer, tmp_path), tmp_path / "vocab.json", "order")


def test_missing_byte(tmp_path):
    """A vocabulary without one of the 256 bytes is refused: tiktoken would panic."""
    vocab = json.loads((STDLIB / "vocab.json").read_text())
    vocab["moved"] = vocab.pop("!")
    (tmp_path / "vocab.json").write_text(json.dumps(vocab))
    error_of(call_of(gpt2.load_tokenizer, tmp_path), tmp_path / "vocab.json", "256 bytes")


# ---- gpt2.py: downloads, from a server that answers as the hub does ------------------------------

BODY = np.random.default_rng(0).bytes(1_500_000)
N = len(BODY)
WRONG_BODY = BODY[:-1] + b"?"
CHUNK = 2**18
OPENAI = "/openai-community/gpt2/resolve/607a30d783dfa663caf39e06633721c8d4cfcd7e/"
MEDIUM = "/openai-community/gpt2-medium/resolve/main/model.safetensors"
SUBSET = (
    "/datasets/Skylion007/openwebtext/resolve/39d1a6d3f3a4c838b27bbc65bfb14a2f6f727740/"
    "subsets/urlsf_subset00.tar")


def git_sha1(content):
    """The name that git gives to a file of this content: 40 hex digits."""
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


class Hub(BaseHTTPRequestHandler):
    """The hub's `resolve`, header by header. A small file: 307 with git's SHA-1, to the hub itself.
    A large one: 302 with its SHA-256, to a store that states nothing. /mirror redirects to either.

    A fault changes one answer with a body: `body`, `status` (200: ignore Range), `first` (start
    there), `cut` (break the connection after so many bytes), `hold` (pause until the test is over).
    """
    def log_message(self, *args):
        """Log nothing."""

    def do_GET(self):
        self.server.asked.append(self.path)
        path = self.path.removeprefix("/api/resolve-cache").removeprefix("/cdn")
        body = self.server.files.get(path)
        if self.server.login:
            page = b"<html>log in</html>"
            self.answer(200, page, {"Content-Type": "text/html; charset=utf-8"})
        elif path.startswith("/mirror"):
            self.answer(301, b"", {"Location": path.removeprefix("/mirror")})
        elif body is None:
            self.answer(404, b"", {})
        elif path != self.path:
            self.send_file(body)
        else:
            self.redirect(path, body)

    def redirect(self, path, body):
        """The hub's first answer: what the file is, and where it is kept."""
        headers = {"X-Linked-Size": len(body)}
        if path.endswith(".json"):
            headers["X-Linked-Etag"] = f'"{git_sha1(body)}"'
            headers["Location"] = "/api/resolve-cache" + path
            self.answer(307, b"", headers)
        else:
            headers["X-Linked-Etag"] = f'"{sha256(body)}"'
            headers["Location"] = "/cdn" + path
            if not self.server.states_hashes:
                del headers["X-Linked-Etag"]
            self.answer(302, b"", headers)

    def send_file(self, body):
        """The second answer: the file from the asked byte on, unless a fault changes it."""
        fault = self.server.faults.pop(0) if self.server.faults else {}
        body = fault.get("body", body)
        asked = int(self.headers["Range"].removeprefix("bytes=").removesuffix("-"))
        self.server.ranges.append(asked)
        first = fault.get("first", asked)
        status = fault.get("status", 206 if first < len(body) else 416)
        if status == 206:
            content_range = f"bytes {first}-{len(body) - 1}/{len(body)}"
            self.answer(206, body[first:], {"Content-Range": content_range}, fault.get("cut"))
        elif status == 416:
            self.answer(416, b"", {"Content-Range": f"bytes */{len(body)}"})
        else:
            self.answer(status, body if status == 200 else b"", {}, fault.get("cut"))
        if "hold" in fault:
            self.server.over.wait(60)

    def answer(self, status, body, headers, cut=None):
        """Send an answer, of its body the first `cut` bytes."""
        self.send_response(status)
        self.send_header("Content-Length", len(body))
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body[:cut])
        self.server.sent += len(body[:cut])


def no_pause(seconds):
    """In place of time.sleep."""


@pytest.fixture
def hub(tmp_path, tiny, monkeypatch):
    """The server. tiny's files stand for OpenAI's models, data/ is empty, tries follow at once."""
    weights = (tiny / "model.safetensors").read_bytes()
    vocab = (tiny / "vocab.json").read_bytes()
    config = gpt2.model_config(tiny)
    with ThreadingHTTPServer(("127.0.0.1", 0), Hub) as hub:
        hub.files = {
            "/file": BODY,
            "/small.json": b"{}",
            SUBSET: SUBSET_TAR,
            MEDIUM: weights,
            OPENAI + "model.safetensors": weights,
            OPENAI + "vocab.json": vocab,
        }
        hub.faults = []
        hub.asked = []  # the path of every request
        hub.ranges = []  # the first byte that each request for a body asked for
        hub.sent = 0
        hub.login = False  # whether a login page answers every request
        hub.states_hashes = True
        hub.over = threading.Event()
        for name in "gpt2", "gpt2-medium":
            monkeypatch.setitem(gpt2.SIZES, name, config)
        monkeypatch.setitem(gpt2.SHA256, "model.safetensors", sha256(weights))
        monkeypatch.setitem(gpt2.SHA256, "vocab.json", sha256(vocab))
        monkeypatch.setattr(openwebtext, "SHA256", [sha256(SUBSET_TAR)])
        monkeypatch.setattr(gpt2, "DATA", tmp_path / "data")
        monkeypatch.setattr(gpt2, "HUB", f"http://127.0.0.1:{hub.server_port}")
        monkeypatch.setattr(gpt2.time, "sleep", no_pause)
        monkeypatch.setenv("NO_PROXY", "127.0.0.1")
        threading.Thread(target=hub.serve_forever, args=(0.01,), daemon=True).start()
        yield hub
        hub.over.set()
        hub.shutdown()


def fetch(path, name="/file", digest=None):
    """Download a file of the test server to `path`."""
    return gpt2.download(gpt2.HUB + name, path, digest)


BUSY = [{"status": 503}] * 3
CUT_TWICE = [{"cut": 500_000}] * 2
TOO_MANY = [{"status": 429}] * 3


@pytest.mark.parametrize("part, faults, sent", [
    (b"", [{"cut": 0}], N),
    (b"", [{"cut": 1}], N + 1),
    (b"", [{"cut": CHUNK}], N + CHUNK),
    (b"", [{"cut": CHUNK + 1}], N + CHUNK),
    (b"", [{"cut": N - 1}], N + CHUNK),
    (b"", BUSY + CUT_TWICE + TOO_MANY, N + 2 * CHUNK),
    (b"", [{"status": 200, "cut": 2**20}, {"status": 200}], N + 2**20),
    (BODY[:1000], [], N - 1000),
    (BODY, [], 0),
    (BODY + b"more", [], N),
], ids=[
    "cut at 0", "cut at 1", "cut at a chunk", "cut after a chunk", "cut at the end", "patience",
    "no Range", "begun", "complete", "too long"])
def test_download_survives(hub, tmp_path, part, faults, sent):
    """A transfer goes on where it stopped; nothing is fetched twice, nothing wrong is appended."""
    hub.faults = list(faults)
    (tmp_path / "file.part").write_bytes(part)
    assert fetch(tmp_path / "file").read_bytes() == BODY
    assert not hub.faults
    assert not (tmp_path / "file.part").exists()
    assert hub.sent <= sent


def test_server_that_falls_silent(hub, tmp_path, monkeypatch):
    """A server that stops sending without closing is left after the timeout, and asked anew."""
    get = requests.get

    def hurried(url, timeout, **more):
        connect, read = timeout
        return get(url, timeout=(connect, read / 100), **more)
    monkeypatch.setattr(requests, "get", hurried)
    hub.faults = [{"cut": 600_000, "hold": True}]
    assert fetch(tmp_path / "file").read_bytes() == BODY
    assert hub.ranges[1] >= 2 * CHUNK


def test_mirror_redirects_once_more(hub, tmp_path):
    """The hash is found on whichever answer of the chain states it."""
    assert fetch(tmp_path / "file", "/mirror/file").read_bytes() == BODY
    assert hub.asked == ["/mirror/file", "/file", "/cdn/file"]


SHORTER = [{"status": 200, "cut": 2**20}, {"status": 200, "cut": 2**19}]


@pytest.mark.parametrize("part, faults, words", [
    (b"", [{"status": 404}] * 9, ["404", "--model stdlib"]),
    (b"", [{"cut": 0}] * 9, ["--model stdlib"]),
    (b"", SHORTER * 9, ["--model stdlib"]),
    (b"", [{"body": WRONG_BODY}], [sha256(BODY), sha256(WRONG_BODY)]),
    (WRONG_BODY, [], [sha256(BODY), sha256(WRONG_BODY)]),
], ids=["404", "cut", "no Range", "wrong answer", "wrong part"])
def test_download_gives_up(hub, tmp_path, part, faults, words):
    """What cannot be had, or has a wrong byte, never gets the name; a later call succeeds."""
    path = tmp_path / "file"
    hub.faults = list(faults)
    (tmp_path / "file.part").write_bytes(part)
    error_of(call_of(fetch, path), gpt2.HUB + "/file", *words)
    assert not path.exists()
    assert len(hub.ranges) < 10
    hub.faults.clear()
    assert fetch(path).read_bytes() == BODY


@pytest.mark.parametrize("digest", [None, sha256(BODY)], ids=["no hash", "pinned"])
def test_login_page(hub, tmp_path, digest):
    """A web page never becomes the file, and leaves what was fetched before as it is."""
    path = tmp_path / "file"
    part = tmp_path / "file.part"
    part.write_bytes(BODY[:1000])
    hub.login = True
    error_of(call_of(fetch, path, "/file", digest), gpt2.HUB + "/file", path, "web page")
    assert not path.exists()
    assert part.read_bytes() == BODY[:1000]
    hub.login = False
    assert fetch(path, "/file", digest).read_bytes() == BODY
    assert hub.ranges == [1000]


@pytest.mark.parametrize("fault", [
    {"body": BODY + b"?"},
    {"body": BODY[:2000], "status": 200},
    {"first": 0},
    {"first": 2000},
], ids=["longer", "shorter", "starts too early", "starts too late"])
def test_size_that_is_not_the_stated_one(hub, tmp_path, fault):
    """An answer of another size than the hub stated is not written."""
    part = tmp_path / "file.part"
    part.write_bytes(BODY[:1000])
    hub.faults = [fault]
    error_of(call_of(fetch, tmp_path / "file"), gpt2.HUB + "/file", "bytes of 1500000")
    assert part.read_bytes() == BODY[:1000]


@pytest.mark.parametrize("first", [0, 999, 1001])
def test_answer_that_starts_elsewhere(hub, tmp_path, first):
    """Where no size is stated, bytes from another place are not appended but asked for again."""
    (tmp_path / "file.part").write_bytes(BODY[:1000])
    hub.faults = [{"first": first, "cut": 5000}]
    assert fetch(tmp_path / "file", "/cdn/file", sha256(BODY)).read_bytes() == BODY
    assert hub.ranges == [1000, 1000]


def test_hash_that_nobody_knows(hub, tmp_path):
    """Without a pinned or stated SHA-256 nothing is fetched; git's SHA-1 is not taken for one."""
    hub.states_hashes = False
    for name in "/file", "/small.json":
        path = tmp_path / name[1:]
        error_of(call_of(fetch, path, name), gpt2.HUB + name, path, "by hand")
        assert not path.exists()
    pinned = sha256(b"{}")
    assert fetch(tmp_path / "small.json", "/small.json", pinned).read_bytes() == b"{}"


def test_download_killed_then_resumed_by_two(hub, tmp_path, monkeypatch):
    """After kill -9, one of two processes goes on where the first stopped, and the other waits."""
    path = tmp_path / "file"
    lock = gpt2.lock
    barrier = threading.Barrier(2, timeout=30)

    def dying(chunks, *args):
        yield from itertools.islice(chunks, 3)
        kill_9()

    def lock_together(folder):
        barrier.wait()
        return lock(folder)
    with monkeypatch.context() as during:
        during.setattr(gpt2, "progress", dying)
        assert killed(call_of(fetch, path))
    assert not path.exists()
    monkeypatch.setattr(gpt2, "lock", lock_together)
    with ThreadPoolExecutor(2) as pool:  # a lock excludes threads as it excludes processes
        for fetched in pool.map(fetch, [path, path]):
            assert fetched.read_bytes() == BODY
    assert len(hub.ranges) == 2
    assert hub.ranges[1] >= 2 * CHUNK


def test_lock(tmp_path, monkeypatch):
    """A folder is locked for one process; on a file system without flock, nothing is."""
    import fcntl  # Windows has no such module
    with gpt2.lock(tmp_path):
        error_of(call_of(gpt2.lock, tmp_path, False), tmp_path, "in use")

    def no_flock(file, operation):
        raise OSError(38, "Function not implemented")
    monkeypatch.setattr(fcntl, "flock", no_flock)
    with gpt2.lock(tmp_path), gpt2.lock(tmp_path, wait=False):
        pass


@pytest.mark.parametrize("name, weights", [
    ("gpt2", OPENAI + "model.safetensors"), ("gpt2-medium", MEDIUM)])
def test_model_from_the_hub(hub, name, weights):
    """A model is fetched, checked and gives transformers' logits; then the hub is not asked."""
    load = call_of(GPT.from_pretrained, name)
    hub.faults = [{"body": hub.files[OPENAI + "vocab.json"][:-1] + b"?"}]
    error_of(load, OPENAI + "vocab.json", gpt2.SHA256["vocab.json"])
    wrong_weights = hub.files[weights][:-1] + b"?"
    hub.faults = [{}, {"body": wrong_weights}]  # vocab.json is fetched first
    error_of(load, weights, sha256(hub.files[weights]), sha256(wrong_weights))
    assert not (gpt2.DATA / name / "model.safetensors").exists()
    tokens = torch.arange(20).view(2, 10)
    assert (load()(tokens) - hf_model()(tokens).logits).abs().max() < 1e-4
    hub.asked.clear()
    load()
    gpt2.load_tokenizer(name)
    assert hub.asked == []


def test_hub_out_of_reach(hub, monkeypatch):
    """Without a network the error says where to put the file, and what needs no network."""
    monkeypatch.setattr(gpt2, "HUB", "http://127.0.0.1:1")  # no server is there
    path = gpt2.DATA / "gpt2-xl" / "vocab.json"
    error_of(call_of(GPT.from_pretrained, "gpt2-xl"), gpt2.HUB, path, "--model stdlib")


# ---- data: OpenWebText and the standard library --------------------------------------------------

def add_to_tar(archive, name, content):
    """Add a file of these bytes to an open tar."""
    member = tarfile.TarInfo(name)
    member.size = len(content)
    archive.addfile(member, io.BytesIO(content))


def tar(texts):
    """A tar of {name: text}, as bytes."""
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w") as archive:
        for name, text in texts.items():
            add_to_tar(archive, name, text.encode())
    return file.getvalue()


def subset_tar(subset, flip=None):
    """A tar as OpenWebText has them, of {name.xz: {name.txt: text}}; a bit flipped in each .xz."""
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w") as archive:
        add_to_tar(archive, "README", b"not an .xz")
        for name, texts in subset.items():
            xz = bytearray(lzma.compress(tar(texts)))
            if flip is not None:
                xz[flip] ^= 4
            add_to_tar(archive, name, xz)
    return file.getvalue()


PROSE = "In the beginning there was the thin winter, 1984; they're her naïve 東京 ☃.\n"
DOCUMENTS = {
    "one.xz": {"1.txt": PROSE * 9, "2.txt": " \n a\n\nb\n\n\nc\n\n\n\n\n\t<|endoftext|> \t\n"},
    "../evil.xz": {"../../evil.txt": "evil", "/tmp/evil.txt": PROSE, "evil.md": "no document"},
    "three.xz": {"5.txt": PROSE * 4, "6.txt": "the third " * 20},
    "many.xz": {f"{i}.txt": f"the {i}" for i in range(2500)},
}
SUBSET_TAR = subset_tar(DOCUMENTS)
TEXTS = []
for pages in DOCUMENTS.values():
    for name, text in pages.items():
        if name.endswith(".txt"):
            TEXTS.append(re.sub("\n{3,}", "\n\n", text).strip())


def joined(documents):
    """The ids of documents, with end-of-text (1023) between them."""
    result = []
    for ids in documents:
        result += ids + [1023]
    return result[:-1]


def expected_bins(texts):
    """[train, val]: val has the last documents with 0.5 % of the tokens; train has at least one."""
    oracle = AutoTokenizer.from_pretrained(STDLIB)
    ids = [oracle.encode(text, split_special_tokens=True) for text in texts]
    least = len(joined(ids)) // 200
    n = 1
    while n < len(ids) - 1 and len(joined(ids[-n:])) < least:
        n += 1
    return [joined(ids[:-n]), joined(ids[-n:])]


def read_openwebtext():
    """[train, val] as `load_tokens` gives them, as lists."""
    return [load_tokens("gpt2", split).tolist() for split in ("train", "val")]


def test_openwebtext(hub, tmp_path):
    """OpenWebText is fetched, cleaned, encoded and split; then the hub and the tar can go."""
    assert read_openwebtext() == expected_bins(TEXTS)
    assert not list(tmp_path.parent.rglob("*evil*"))
    assert not Path("/tmp/evil.txt").exists()
    hub.files.clear()
    (tmp_path / "data/openwebtext/urlsf_subset00.tar").unlink()
    assert read_openwebtext() == expected_bins(TEXTS)


@pytest.mark.parametrize("module, name, nth", [
    (gpt2.tiktoken.Encoding, "encode_ordinary_batch", 2),
    (os, "replace", 1),
    (os, "replace", 2),
    (os, "replace", 3),
    (os, "replace", 4),
], ids=["encoding", "vocab.json", "tar", "val.bin", "train.bin"])
def test_openwebtext_after_kill_9(hub, tmp_path, monkeypatch, module, name, nth):
    """After a kill at any point there is no half train.bin, and the next process ends well."""
    with monkeypatch.context() as during:
        during.setattr(module, name, killed_at(nth, getattr(module, name)))
        assert killed(read_openwebtext)
    assert not (tmp_path / "data/openwebtext/train.bin").exists()
    assert read_openwebtext() == expected_bins(TEXTS)


@pytest.mark.parametrize("texts", [
    ["", "the end"],
    ["b" * 900, ""],
    ["", "", "b" * 900],
    ["the " * 300 + "x", "in", "a", "b"],
], ids=str)
def test_odd_documents(tmp_path, texts):
    """Empty documents, and one that outweighs the others, are split by the rule."""
    pages = {f"{i}.txt": text for i, text in enumerate(texts)}
    (tmp_path / "tar").write_bytes(subset_tar({"a.xz": pages}))
    openwebtext.tokenize([tmp_path / "tar"], gpt2.load_tokenizer("stdlib"), tmp_path)
    train, val = expected_bins(texts)
    assert np.fromfile(tmp_path / "train.bin", "<u2").tolist() == train
    assert np.fromfile(tmp_path / "val.bin", "<u2").tolist() == val


def test_damaged_subset(tmp_path):
    """A subset with a flipped bit or a missing end is refused by its path, or read rightly."""
    path = tmp_path / "tar"
    third = {"three.xz": DOCUMENTS["three.xz"]}
    flips = [subset_tar(third, at) for at in range(0, 200, 3)]
    cuts = [SUBSET_TAR[:end] for end in range(0, len(SUBSET_TAR.rstrip(b"\0")), 512)]
    refused = 0
    for content in flips + cuts:
        path.write_bytes(content)
        try:  # a flip in the index behind the data does no harm
            assert list(openwebtext.documents(path)) == TEXTS[4:6]
        except UserError as error:
            assert str(path) in str(error)
            assert "\n" not in str(error)
            refused += 1
    assert refused > 60 + len(cuts)


def test_text_of_the_standard_library(tmp_path, monkeypatch):
    """The text is the library's source; a file's side is decided by the hash of its name."""
    train = stdlib.read_files("train")
    val = stdlib.read_files("val")
    source = Path(os.__file__).with_name("argparse.py").read_text()
    assert train["argparse.py"] == source
    assert len(val) > len(train) / 20
    for name in list(train) + list(val):
        assert "/test" not in name
        if not name.startswith(("zipfile/", "pathlib/")):  # packages in newer Pythons
            assert (name in val) == (sha256(name.encode()) < "1a")  # a tenth
    monkeypatch.setattr("sysconfig.get_paths", call_of(dict, [("stdlib", str(tmp_path))]))
    error_of(call_of(stdlib.read_files, "train"), tmp_path)


def test_tokens_of_the_standard_library():
    """The tokens are those of the files, joined by end-of-text."""
    tokens = load_tokens("stdlib", "val")
    text = gpt2.load_tokenizer("stdlib").decode(tokens.tolist())
    assert tokens.dtype == np.uint16
    assert text == "<|endoftext|>".join(stdlib.read_files("val").values())


@pytest.mark.parametrize("name, side", [
    ("zipfile/__init__.py", "zipfile.py"),
    ("zipfile/_path/glob.py", "zipfile.py"),
    ("pathlib/_local.py", "pathlib.py"),
])
def test_packages_of_newer_pythons(name, side):
    """What was one file in Python 3.11 stays on that file's side as a package."""
    assert stdlib.split_of(name) == stdlib.split_of(side)


@pytest.mark.parametrize("name, holds", [
    ("argparse.py", True),
    ("json/decoder.py", True),
    ("test/test_json.py", False),
    ("config-3.13-x86_64-linux-gnu/python-config.py", False),
    ("_sysconfigdata__linux_x86_64-linux-gnu.py", False),
])
def test_files_left_out(name, holds):
    """Tests and machine-made files are no text."""
    assert stdlib.is_text(name) == holds


def test_byte_pair_encoding():
    """The most frequent pair is merged first; of equal ones the greater bytes win."""
    # "ab" occurs 5 times. Then a+ab and a+a occur twice each.
    assert stdlib.train_bpe(["aaab aaab", "ab;ab;ab"], 259) == [(b"a", b"b"), (b"a", b"ab")]


def test_recipe_of_the_embedded_model(tmp_path, monkeypatch):
    """The recipe makes a model that transformers opens, and that has learned something."""
    source = stdlib.read_files("train")["argparse.py"]

    def one_file(split):
        return {"argparse.py": source}
    monkeypatch.setattr(stdlib, "read_files", one_file)
    monkeypatch.setattr(stdlib, "CONFIG", GPTConfig(2, 2, 32, 16, 1024))
    stdlib.make(tmp_path, 150)
    assert compare_with_transformers(tmp_path, [source]) < 5.5  # untrained: log(1024) = 6.9


TEXT = {split: np.random.default_rng(i).integers(0, 1024, 6400).astype(np.uint16)
        for i, split in enumerate(("train", "val"))}  # in place of the standard library
TRAIN, VAL = (torch.from_numpy(text.astype(np.int64)).view(200, 32) for text in TEXT.values())
FACTORS = {"local": {"mse": 1}, "e2e": {"kl": 1}, "e2e_ds": {"kl": 0.5, "downstream_mse": 1.3},
           "finish": {"mse": 0.5, "kl": "computed"}}  # of the losses' terms
kl_by_hand = lambda log_p, log_q: (log_p.exp() * (log_p - log_q)).sum(-1)


# ---- e2e_sae.py: the SAE, the losses, the evaluation, by hand in float64 -------------------------

def run(gpt, tokens, layer=0, splice=lambda x: x):
    """The residual streams entering each block and leaving the last, and log-probabilities."""
    x, streams = gpt.embed(tokens), []
    for i, block in enumerate(gpt.h):
        streams.append(splice(x) if i == layer else x)
        x = block(streams[-1])
    return [*streams, x], (y := gpt.unembed(x)) - y.exp().sum(-1, keepdim=True).log()


def sae_by_hand(weights, x):
    """The features and x_hat of an SAE with these weights and biases of encoder and decoder."""
    W_e, b_e, W_d, b_d = weights
    features = (x @ W_e + b_e).clamp(min=0)
    return features, features @ (W_d / W_d.square().sum(1, keepdim=True).sqrt()) + b_d


def make_sae(n_features=40, seed=1):
    """A random SAE in float64 whose decoder has columns of any length."""
    torch.manual_seed(seed)
    sae = SAE(16, n_features).double()
    sae.W_dec.data *= torch.rand(n_features, 1) + 0.5
    return sae


@pytest.fixture
def gpt(tiny):
    return GPT.from_pretrained(tiny).double()


@pytest.mark.parametrize("share", [0.4, 0.03, 0])
@pytest.mark.parametrize("loss, layer", [
    (loss, layer) for loss in FACTORS for layer in range(3 - (loss == "e2e_ds"))])
def test_losses_by_hand(gpt, monkeypatch, loss, layer, share):
    """`share`: how many features are active. With few of them the sparse path is used."""
    (clean, log_p), sae = run(gpt, VAL[:4]), make_sae()
    before = clean[layer] @ sae.W_enc + sae.b_enc
    sae.b_enc.data -= before.detach().quantile(1 - share) + 1e-3
    weights = [p.detach().clone().requires_grad_() for p in sae.parameters()]
    features, x_hat = sae_by_hand(weights, clean[layer])
    spliced, log_q = run(gpt, VAL[:4], layer, lambda x: x_hat)
    squares = [((s - c) ** 2).mean() for s, c in zip(spliced, clean)]
    hand = {"l0": (features > 0).sum() / 128, "l1": features.sum() / 128 / 16,
            "mse": squares[layer], "kl": kl_by_hand(log_p, log_q).mean(),
            "downstream_mse": sum(squares[layer + 1 : 3]) / max(1, 2 - layer)}
    factors = FACTORS[loss] if loss != "finish" else {
        "mse": 0.5, "kl": (hand["mse"] / hand["kl"]).item() / 2}
    hand["loss"] = sum(f * hand[term] for term, f in (factors | {"l1": 0.7}).items())
    hand["loss"].backward()
    if loss == "local":
        gpt.h, gpt.ln_f = gpt.h[:layer], None  # it runs nothing from `layer` on
    config = Config(model="stdlib", loss=loss, layer=layer, sparsity=0.7, downstream=1.3)
    total, terms = compute_loss(gpt, sae, VAL[:4], config)
    total.backward()
    assert terms.keys() == {"l0", "l1", "mse", *FACTORS[loss]}
    for name, value in {"loss": total, **terms}.items():
        assert abs(value - hand[name]) < (1e-6 if name == "l0" else 1e-10), name
    for parameter, weight in zip(sae.parameters(), weights):
        assert (parameter.grad - weight.grad).abs().max() < 1e-10
    assert weight.grad.any() and all(parameter.grad is None for parameter in gpt.parameters())


@pytest.mark.parametrize("n, vocab", [(20, 33), (7, 2**18 + 1), (70, 150_000)])
def test_kl_loss(n, vocab):
    h, clean, unembedding = (torch.randn(k, 2, dtype=torch.double) for k in (n, n, vocab))
    h.requires_grad_()
    by_hand = kl_by_hand(*((a @ unembedding.T).log_softmax(-1) for a in (clean, h))).mean()
    kl = KLLoss.apply(h, clean, unembedding)
    one, other = (torch.autograd.grad(3 * value, h)[0] for value in (kl, by_hand))
    assert abs(kl - by_hand) < 1e-12 and (one - other).abs().max() < 1e-12
    assert vocab > 33 or torch.autograd.gradcheck(KLLoss.apply, (h, clean, unembedding))


@pytest.mark.parametrize("loss", FACTORS)
def test_compiled_loss_equals_eager(tiny, loss):
    backend = "inductor" if loss == "e2e_ds" else "aot_eager"  # inductor takes 20 seconds
    gpt, config = GPT.from_pretrained(tiny), Config(model="stdlib", loss=loss, layer=1)
    torch._dynamo.reset()
    counter = torch._dynamo.testing.CompileCounterWithBackend(backend)
    compiled = torch.compile(compute_loss, fullgraph=True, backend=counter)
    for tokens in VAL[:12].split(4):
        sae, results = make_sae().float(), []
        for function in compiled, compute_loss:
            value, terms = function(gpt, sae, tokens, config)
            results.append([value, *terms.values(), *torch.autograd.grad(value, sae.parameters())])
        torch.testing.assert_close(*results, rtol=1e-4, atol=1e-6)
        with torch.autocast("cpu", torch.bfloat16):
            assert abs(compute_loss(gpt, sae, tokens, config)[0] - value) < 0.02 * value
    assert counter.frame_count == 1


@pytest.mark.parametrize("loss", FACTORS)
def test_loss_on_meta(loss):
    """At the paper's sizes no step needs a tensor on the CPU, and gradients are contiguous."""
    with torch.device("meta"):
        gpt, sae = GPT(GPTConfig()), SAE(768, 46_080)
        tokens = torch.zeros(16, 1024, dtype=torch.long)
        value, _ = compute_loss(gpt, sae, tokens, Config(loss=loss))
        value.backward()
    assert all(parameter.grad.is_contiguous() for parameter in sae.parameters())


def test_initial_values():
    """W_enc, b_enc and b_dec start as nn.Linear's, the dictionary orthogonal."""
    torch.manual_seed(0)
    sae = SAE(64, 4096)
    for weight, bound in (sae.W_enc, 64**-0.5), (sae.b_enc, 64**-0.5), (sae.b_dec, 4096**-0.5):
        assert 0.9 * bound < weight.abs().max() <= bound
    assert (sae.W_dec.T @ sae.W_dec - torch.eye(64)).abs().max() < 1e-5


def write_sae(kind):
    """Write an SAE as the file or folder `kind`. Returns its weights."""
    sae = make_sae().float()
    W_e, b_e, W_d, b_d = weights = [p.detach() for p in sae.parameters()]
    if kind == "x.pt":  # as the paper's
        place = "blocks-1-hook_resid_pre."
        torch.save({place + "encoder.0.weight": W_e.T, place + "encoder.0.bias": b_e,
                    place + "decoder.weight": W_d.T, place + "decoder.bias": b_d}, kind)
        return weights
    e2e_sae.save_sae(sae, kind, "model", 1, 32)
    if kind == "saelens":  # rows may have any length there: divide the features by it
        norms = W_d.norm(dim=1)
        tensors = {"W_enc": (W_e / norms).contiguous(), "b_enc": b_e / norms,
                   "W_dec": W_d.contiguous(), "b_dec": b_d}
        save_file(tensors, "saelens/sae_weights.safetensors")
    return weights


def test_evaluation_by_hand(gpt):
    (clean, log_p), sae, tokens, layer = run(gpt, VAL[:100]), make_sae(), VAL[:100], 1
    sae.b_enc.data[:5] = -99
    features, x_hat = sae_by_hand([p.detach() for p in sae.parameters()], clean[layer])
    spliced, log_q = run(gpt, tokens, layer, lambda x: x_hat)
    _, log_m = run(gpt, tokens, layer, lambda x: x.mean((0, 1)).expand_as(x))
    ce, ce_spliced, ce_ablated = (-log[:, :-1].gather(-1, tokens[:, 1:, None]).mean()
                                  for log in (log_p, log_q, log_m))
    ratio = x_hat.norm(dim=-1) / clean[layer].norm(dim=-1)
    mse = [((s - c) ** 2).mean() for s, c in zip(spliced, clean)]
    explained = [1 - m / (c - c.mean((0, 1))).square().mean() for m, c in zip(mse, clean)]
    expected = {
        "ce": ce, "ce_spliced": ce_spliced, "ce_increase": ce_spliced - ce,
        "ce_ablated": ce_ablated, "ce_recovered": 1 - (ce_spliced - ce) / (ce_ablated - ce),
        "kl": kl_by_hand(log_p, log_q).mean(), "tokens": 3200, "n_features": 40, "mse": mse[layer],
        "top1_agreement": (log_p.argmax(-1) == log_q.argmax(-1)).double().mean(),
        "l0": (features > 0).sum() / 3200, "alive": (features > 0).any(0).any(0).sum(),
        "explained_variance": explained[layer], "explained_variance_by_layer": explained[layer:3],
        "l2_ratio": ratio[:, 1:].mean(), "l2_ratio_first": ratio[:, 0].mean(),
        "mse_by_layer": mse[layer:3]}
    found = json.loads(json.dumps(evaluate(gpt, sae, tokens.numpy().astype(np.uint16), layer)))
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert np.allclose(found[name], value, rtol=1e-6), name


# ---- e2e_sae.py: training ------------------------------------------------------------------------

RUN = ("--model model --text text --layer 1 --context 32 --n-features 40 --n-sequences 160 --batch-size 4 "
       "--lr 0.002 --n-eval 8 --checkpoint-minutes 0 ")
see = lambda name: json.loads(Path(name).read_text())
checkpoint = lambda run: torch.load(Path(run, "checkpoint.pt"), weights_only=True)


def command(line):
    with pytest.raises(SystemExit) as end:
        run_command(lambda: e2e_sae.main(line.split()))
    return end.value.code or 0


def fails(capsys, line, *words):
    """Assert that a command ends with an error of one line that contains these words."""
    code, error = command(line), capsys.readouterr().err
    assert code and error.startswith("error") and error.count("\n") == 1, error
    assert all(word in error for word in words), error


def at_call(patch, module, name, nth, act):
    """Let the nth call of module.name be act(call), where call() is what it would have been."""
    real, calls = getattr(module, name), itertools.count(1)
    patch.setattr(module, name, lambda *args, **more: (
        act(lambda: real(*args, **more)) if next(calls) == nth else real(*args, **more)))


def send(*numbers):
    """For at_call: raise these signals, then make the call."""
    return lambda call: ([signal.raise_signal(number) for number in numbers], call())[1]


@pytest.fixture(scope="session")
def runs(tmp_path_factory, tiny):
    """A folder with a model, a run that ended ("whole") and one that was stopped after step 14."""
    folder = shutil.copytree(tiny, tmp_path_factory.mktemp("runs") / "model").parent
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        Path("text").mkdir()
        for split, ids in TEXT.items():
            ids.tofile(f"text/{split}.bin")
        assert command(RUN + "--out whole") == 0
        at_call(patch, e2e_sae, "compute_loss", 14, send(signal.SIGTERM))
        assert command(RUN + "--out stopped") == 143
    return folder


@pytest.fixture
def here(runs, tmp_path, monkeypatch):
    monkeypatch.chdir(shutil.copytree(runs, tmp_path, dirs_exist_ok=True))
    yield tmp_path
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.default_int_handler)


def log_of(run):
    lines = [json.loads(line) for line in Path(run, "log.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if k != "tokens_per_second"} for line in lines]


@pytest.mark.parametrize("loss", FACTORS)
def test_training_lowers_its_loss(here, loss):
    assert command(RUN + f"--loss {loss} --sparsity 0.01 --lr 0.01 --out out") == 0
    first, *_, last = log_of("out")
    assert first.keys() == {"step", "loss", "l0", "l1", "mse", *FACTORS[loss], "lr", "grad_norm"}
    assert last["loss"] < 0.8 * first["loss"]
    found = evaluate(GPT.from_pretrained("model"), e2e_sae.load_sae("out"), VAL[::25], 1)  # spread evenly
    assert see("out/eval.json") == found


@pytest.mark.parametrize("micro_batch", [4, 3, 1])
def test_recipe(here, micro_batch):
    """Order of the text, warm-up, cosine, clipping and Adam, over more sequences than there are."""
    assert command(RUN + "--n-sequences 240 --sparsity 500 --seed 3 --lr 0.01 --loss local "
                   f"--out out --micro-batch {micro_batch}") == 0
    config, gpt = Config(model="stdlib", loss="local", layer=1, sparsity=500), GPT.from_pretrained("model")
    torch.manual_seed(3)
    sae, log = SAE(16, 40), {line["step"]: line for line in log_of("out")}
    adam, order = torch.optim.Adam(sae.parameters()), np.random.default_rng(3).permutation(200)
    rows = TRAIN[[*order, *order]]
    for step in range(1, 61):
        loss, _ = compute_loss(gpt, sae, rows[4 * step - 4 : 4 * step], config)
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(sae.parameters(), 10).item()
        cosine = np.cos(np.pi * (4 * step - 12) / (240 - 12))
        lr = adam.param_groups[0]["lr"] = 0.01 * min(step / 3, 0.1 + 0.9 * (1 + cosine) / 2)
        adam.step()
        adam.zero_grad()
        if step in log:
            expected = log[step] | {"loss": loss.item(), "lr": lr, "grad_norm": norm}
            assert log[step] == pytest.approx(expected, rel=1e-3)
    for name, weight in sae.state_dict().items():
        assert (weight - checkpoint("out")["sae"][name]).norm() < 1e-3 * weight.norm()


@pytest.mark.parametrize("kind", ["run", "saelens", "x.pt", "apollo:x"])
def test_load_an_sae_and_start_from_it(here, hub, monkeypatch, kind):
    """It equals the formulas; a run starts from exactly this SAE, also if it was stopped there."""
    weights, x, states = write_sae(kind.replace("apollo:x", "x.pt")), torch.randn(5, 16), []
    url = "/apollo-research/e2e-saes-gpt2/resolve/713515193ec799fd17bd7f6ccf6f209332b07f7d/x.pt"
    hub.files[url] = Path("x.pt").read_bytes() if kind == "apollo:x" else b""
    sae, (features, x_hat) = e2e_sae.load_sae(kind), sae_by_hand(weights, x)
    assert (sae.encode(x) - features).abs().max() < 1e-5 > (sae(x) - x_hat).abs().max()
    assert [*sae.made_for.values()] == (["gpt2", 1, 1024] if "x" in kind else ["model", 1, 32])
    if kind == "run":
        t = load_file("run/sae_weights.safetensors")
        theirs = (x @ t["W_enc"] + t["b_enc"]).relu() @ t["W_dec"] + t["b_dec"]  # SAELens' formula
        assert (theirs - x_hat).abs().max() < 1e-5 and theirs.dtype == torch.float32
        assert (t["W_dec"].norm(dim=1) - 1).abs().max() < 1e-6 and see("run/cfg.json") == {
            "architecture": "standard", "d_in": 16, "d_sae": 40, "dtype": "float32",
            "device": "cpu", "apply_b_dec_to_input": False, "normalize_activations": "none",
            "reshape_activations": "none", "metadata": {
                "sae_lens_version": "6.0.0", "model_name": "model", "context_size": 32,
                "hook_name": "blocks.1.hook_resid_pre", "prepend_bos": False,
                "neuronpedia_id": None,
                "model_from_pretrained_kwargs": {"center_writing_weights": True}}}
    stop = send(signal.SIGINT, signal.SIGINT)
    monkeypatch.setattr(e2e_sae, "compute_loss", lambda gpt, sae, *more: (
        states.append(str(sae.state_dict())), stop(None)))
    assert command(RUN + f"--loss finish --init {kind} --out out") == 130
    assert command("--resume out") == 130 and states == [str(sae.state_dict())] * 2


def test_two_processes_equal_one(here, monkeypatch):
    """By torchrun, with a batch that does not divide evenly and a single held-out sequence."""
    line = RUN + "--batch-size 5 --n-sequences 100 --n-eval 1 --loss e2e_ds --out "
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    subprocess.run([*torchrun, HERE / "e2e_sae.py", *f"{line} two".split()], check=True)
    assert command(line + "one") == 0
    for one, two in zip(log_of("one"), log_of("two"), strict=True):
        assert two == pytest.approx(one, rel=1e-4)
    assert see("two/eval.json")["kl"] == pytest.approx(see("one/eval.json")["kl"], rel=1e-3)


# ---- e2e_sae.py: runs that are killed, stopped, short of disk or not finite ----------------------

def test_killed_at_many_moments(here, monkeypatch):
    line, after = RUN + "--out out", lambda call: (call(), kill_9())
    for moment, act in itertools.product([(e2e_sae, "compute_loss", 7), (torch, "save", 1), (
            os, "replace", 1), (os, "replace", 2)], [kill_9, after]):
        assert killed(lambda: (at_call(monkeypatch, *moment, act), command(line)))
        Path("out/log.jsonl").open("a").write('{"step": 1')  # as if killed within a line
        line = "--resume out"
    assert command(line) == 0 and log_of("out") == log_of("whole")
    assert sorted(os.listdir("out")) == sorted(os.listdir("whole"))
    for name in "eval.json", "sae_weights.safetensors", "cfg.json":
        assert Path("out", name).read_bytes() == Path("whole", name).read_bytes()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_signals(here, monkeypatch, number):
    at_call(monkeypatch, e2e_sae, "compute_loss", 7, send(number))
    assert command(RUN + "--out out --checkpoint-minutes 9") == 128 + number
    assert log_of("out")[-1]["step"] == checkpoint("out")["step"] == 7
    at_call(monkeypatch, e2e_sae, "compute_loss", 2, send(number, number))
    assert command("--resume out") == 130 and checkpoint("out")["step"] == 7  # at once
    assert command("--resume out") == 0
    assert [line for line in log_of("out") if line["step"] != 7] == log_of("whole")
    assert see("out/eval.json") == see("whole/eval.json")


@pytest.mark.parametrize("module, name, nth, act, words", [
    (torch, "save", 1, lambda call, save=torch.save: save(TRAIN, open("/dev/full", "wb")),
     ["cannot write stopped/checkpoint.pt"]),
    (e2e_sae, "compute_loss", 3, lambda call: (call()[0] * np.nan, call()[1]),
     ["step 20", "not finite", "--lr"])], ids=["full disk", "not finite"])
def test_checkpoint_survives(here, monkeypatch, capsys, module, name, nth, act, words):
    before = Path("stopped/checkpoint.pt").read_bytes()
    at_call(monkeypatch, module, name, nth, act)
    fails(capsys, "--resume stopped", *words)
    assert Path("stopped/checkpoint.pt").read_bytes() == before and not [*here.rglob("*.part")]
    with gpt2.lock("stopped"):
        fails(capsys, "--resume stopped", "stopped is in use")
    assert command("--resume stopped") == 0
    assert see("stopped/eval.json") == see("whole/eval.json")


MISTAKES = [  # behind a colon: what the message contains, if not the mistake itself
    "--layer 3", "--layer -1", "--layer 2 --loss e2e_ds", "--loss foo", "--sparsity -1.0",
    "--sparsity nan", "--n-features 0", "--context 1", "--context 33", "--batch-size 0",
    "--seed -1", "--dtype float16", "--device tpu", "--layer x", "--unknown 1", "--lay 1", "stray",
    "--out whole: --resume whole", "--out model/config.json/x: x", "--model nowhere",
    "--init nowhere: nowhere", "--init model: model/cfg.json", "--init whole --n-features 7",
    "--resume nowhere: nowhere/config.json", "--resume stopped --layer 2: has 1", "--evaluate",
    "--resume stopped --sparsity 3: 3.0", "--evaluate whole --resume whole: --resume",
    "--evaluate whole nowhere: nowhere", "--compare whole nowhere: nowhere",
    "--features nowhere: nowhere", "--features whole 40: 0 to 39", "--features whole x: 0 to 39",
    "--plot stopped: eval.json", "--init whole --layer 2", "--n-eval 0"]
DAMAGE = {  # by file: the action that reads it, and what the file becomes or how much is left
    "stopped/config.json": ("--resume stopped", [40, b"[1]", b"\xff"]),
    "stopped/checkpoint.pt": ("--resume stopped", [0, 99, -1, b"hello"]),
    "whole/cfg.json": ("--evaluate whole", [0, b"{}", b'{"architecture": "topk"}']),
    "whole/sae_weights.safetensors": ("--evaluate whole", [0, 50, -1]),
    "whole/eval.json": ("--plot whole", [9]), "x.pt": ("--evaluate x.pt", [0, 99, -1])}


@pytest.mark.parametrize("line, file, change", [(line, None, None) for line in MISTAKES] + [
    (f"{line}: {file.split('/')[0]}", file, change)
    for file, (line, changes) in DAMAGE.items() for change in changes], ids=str)
def test_mistakes(here, capsys, line, file, change):
    write_sae("x.pt")
    line, _, word = line.partition(": ")
    if file:
        left = Path(file).read_bytes()[:change] if isinstance(change, int) else change
        Path(file).write_bytes(left)
    tree = lambda: {path: path.is_file() and path.read_bytes() for path in here.rglob("[!.]*")}
    before, words = tree(), [word] if word else line.split()[:2]
    new = not re.match("--(resume|evaluate|features|plot|compare)", line)
    fails(capsys, (RUN + "--out out " if new else "") + line, *words)
    assert tree() == before


# ---- e2e_sae.py: the views -----------------------------------------------------------------------

def test_effects_and_removal_by_hand(gpt):
    """The effect of a feature is the slope of KL as all its activations shrink."""
    (clean, log_p), sae, tokens, layer, step = run(gpt, VAL[:6]), make_sae(), VAL[:6], 1, 1e-4
    weights = [p.detach() for p in sae.parameters()]
    features, _ = sae_by_hand(weights, clean[layer])
    directions = weights[2] / weights[2].norm(dim=1, keepdim=True)
    log_q = lambda f: run(gpt, tokens, layer, lambda x: f @ directions + weights[3])[1]
    effect = e2e_sae.effects(gpt, sae, tokens, layer)
    fired = e2e_sae.firing_counts(gpt, sae, tokens, layer)
    assert torch.equal(fired, (features > 0).sum((0, 1)))
    for i, one in enumerate(torch.eye(40)[:9]):
        more, less = (kl_by_hand(log_p, log_q(features * (1 + s * one))) for s in (step, -step))
        assert (less - more).sum() == pytest.approx(2 * step * effect[i].item(), rel=1e-3)
    i, k = effect.argmax().item(), torch.arange(6)
    pos, removed = features[..., i].argmax(1), features.clone()
    removed[k, pos, i] = 0
    expected = torch.stack([log_q(f)[k, pos].exp() for f in (features, removed)])
    found = torch.stack(e2e_sae.remove(gpt, sae, tokens, layer, i, pos))
    assert (found - expected).abs().max() < 1e-6


@pytest.mark.parametrize("ids", ["", "7 3"])
def test_features_page(here, ids):
    hostile = {"<script>alert(1)</script>": 1000, "</pre>": 1001, "<!--": 1002, "\"'&amp;": 1003,
               "\u0100\u011b[2J": 1004, "\u00e2\u0124\u00a8": 1005}  # ^@, Escape, U+2028
    vocab = {token: i for token, i in see("model/vocab.json").items() if i not in hostile.values()}
    Path("model/vocab.json").write_text(json.dumps(vocab | hostile))
    sae, elements, parser = make_sae().float(), [], html.parser.HTMLParser()
    e2e_sae.save_sae(sae, "a'<b>", "model", 1, 32)
    assert command(f"--features a'<b> {ids} --n-eval 40") == 0
    page = Path("a'<b>/features.html").read_text()
    parser.handle_starttag = lambda tag, attributes: elements.append((tag, dict(attributes)))
    parser.feed(page)
    used = {name for element in elements for name in (element[0], *element[1])}
    assert used <= {*"html lang meta charset link rel href title style h1 p h2 id a pre i b br "
                    "code table tr td".split()} and (ids or "alert(1)" in page)
    shown = [int(attributes["id"]) for tag, attributes in elements if tag == "h2"]
    links = {attributes["href"] for tag, attributes in elements if tag == "a"}
    assert links <= {f"#{i}" for i in shown} and (ids or len(links) > 20)
    gpt, rows, tokenizer = GPT.from_pretrained("model"), VAL[::5], gpt2.load_tokenizer("model")
    text = lambda i: repr(tokenizer.decode_bytes([i]).decode(errors="backslashreplace"))[1:-1]
    effect = e2e_sae.effects(gpt, sae, rows, 1)
    assert shown == ([*map(int, ids.split())] or effect.argsort(descending=True).tolist())
    features = torch.cat([sae.encode(e2e_sae.entering(gpt, b, 1)) for b in rows.split(4)])
    for i, part in zip(shown, page.split("<h2")[1:]):
        peak, pos = features[..., i].max(1)
        contexts = ["".join(map(text, rows[k, max(0, pos[k] - 24) : pos[k] + 9].tolist()))
                    for k in peak.argsort(descending=True) if peak[k] > 0]
        found = [html.unescape(re.sub("<.*?>", "", context))
                 for context in re.findall("<pre>(.*?)</pre>", part)]
        assert found[:4] == contexts[:4] and {*found} <= {*contexts}


def test_compare(here, capsys):
    x, rows = e2e_sae.entering(GPT.from_pretrained("model"), VAL[::4], 1), {}
    for name, seed in {"a": 1, "same": 1, "other": 2}.items():
        sae = make_sae(500, seed).float()
        sae.b_enc.data[:100] -= 99 * seed  # dead elements do not count
        e2e_sae.save_sae(sae, name, "model", 1, 32)
        alive = (sae.encode(x) > 0).any(0).any(0).nonzero()[:, 0]
        rows[name] = F.normalize(sae.W_dec.detach()[alive]), alive
    assert command("--compare a same other --n-eval 50") == 0
    lines = capsys.readouterr().out.splitlines()[1:7]
    for line, pair in zip(lines, itertools.combinations_with_replacement(rows, 2), strict=True):
        (a, i), (b, j) = (rows[name] for name in pair)
        cosines = a @ b.T - 9 * (pair[0] == pair[1]) * torch.eye(len(a), len(b))
        chance = (a @ F.normalize(torch.randn(9, *b.shape), dim=-1).mT).amax(-1).mean()
        same = (j[cosines.argmax(1)] == i).float().mean()
        *names, cosine, by_chance, equal = line.replace("%", "").split()
        assert (*names,) == pair and abs(float(cosine) - cosines.amax(1).mean()) < 6e-4
        assert abs(float(by_chance) - chance) < 0.01 and abs(float(equal) - 100 * same) < 0.06
        assert (same == 1) == (pair == ("a", "same"))


def test_table_and_plot(here, capsys, monkeypatch):
    assert command("--plot whole whole") == 0
    assert Path("pareto.png").read_bytes().startswith(b"\x89PNG") and capsys.readouterr()
    assert command("--evaluate pareto.png stopped whole --n-eval 8") == 0
    unfinished, _, row, *_ = capsys.readouterr().out.splitlines()
    assert "--resume stopped" in unfinished and row.startswith("whole ")
    keys = "l0", "ce_increase", "kl", "alive", "n_features", "explained_variance"
    numbers = [float(number) for number in row.split()[1:] if number != "of"]
    assert numbers == pytest.approx([see("whole/eval.json")[key] for key in keys], abs=0.05)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    fails(capsys, "--plot whole", "matplotlib")


# ---- data/concepts.py ----------------------------------------------------------------------------

SAMPLE = '''"""A módule."""
class Thing:
    def act(self, other=None):
        while other > 2:  # é
            self.total[LIMIT] = len({k: "v" for k in other})
'''
BY_HAND = {  # pieces of the text, in order
    "comment": ["# é"], "docstring": ['"""A módule."""'], "name being defined": ["Thing", "act"],
    "keyword": ["class", "def", "while", "for", "in"], "number": ["2"], "string": ['"v"'],
    "attribute after a dot": ["total"], "comparison": ["other > 2"], "self": ["self", "self"],
    "loop body": ['self.total[LIMIT] = len({k: "v" for k in other})'], "subscript": ["LIMIT"]}


def test_concepts_by_hand(here, monkeypatch, capsys):
    files, source = {"a": SAMPLE, "b": "def (:\n", "c": "y = 12\n"}, SAMPLE.encode()
    monkeypatch.setattr(concepts, "read_files", lambda split: files)
    tokenizer, marks = gpt2.load_tokenizer("stdlib"), concepts.concepts(SAMPLE)
    tokens, labels = concepts.labelled_tokens(tokenizer)
    assert tokenizer.decode(tokens.tolist()) == f"{SAMPLE}<|endoftext|>y = 12\n<|endoftext|>"
    ends = np.cumsum([len(tokenizer.decode_single_token_bytes(token)) for token in tokens])
    ends = ends[ends <= len(source)]
    for concept, pieces in BY_HAND.items():
        edges = np.flatnonzero(np.diff([0, *marks[concept].astype(int), 0]))
        assert [source[a:b].decode() for a, b in zip(edges[::2], edges[1::2])] == pieces, concept
        assert (labels[concept][: len(ends)] == marks[concept][ends - 1]).all()  # the last byte's
    concepts.print_concepts(["whole"])
    row = re.search(r"^number +(\S+)%", capsys.readouterr().out, re.MULTILINE)
    assert float(row[1]) == pytest.approx(100 * labels["number"][:64].mean(), abs=0.06)


def test_best_features_by_brute_force():
    rng, bias, half = np.random.default_rng(0), torch.full((70,), -1.0), slice(0, 30)
    truth = rng.random((3, 60)) < 0.3
    x = torch.from_numpy(rng.integers(-6, 6, (60, 70))).float()  # with equal values
    x[:, 66] = 1 + torch.from_numpy(truth[1] * np.arange(1, 61))  # this feature is concept 1
    f1, feature, threshold = concepts.best_features(torch.eye(70), bias, x, truth)
    features = (x - 1).relu().numpy()
    def score(i, t, c, half):
        predicted = (features[half, i] >= t) & (features[half, i] > 0)
        return 2 * (predicted & truth[c, half]).sum() / (predicted.sum() + truth[c, half].sum())

    for c, (i, t) in enumerate(zip(feature, threshold)):
        best = max(score(i, t, c, half) for i in range(70) for t in features[half, i])
        assert (score(i, t, c, half), score(i, t, c, slice(30, 60))) == pytest.approx((best, f1[c]))
    assert f1[1] == 1 and feature[1] == 66


def test_snippet_in_readme(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    e2e_sae.save_sae(SAE(128, 64), "out/stdlib-layer3-e2e", "stdlib", 3, 128)  # where the quick start puts it
    exec(re.search("```python\n(.*?)```", (HERE / "README.md").read_text(), re.S)[1], {})
    kl, l0 = re.match(r"KL (\S+), L0 (\S+)", capsys.readouterr().out).groups()
    assert float(kl) > 0.1 and 0 < float(l0) < 64
