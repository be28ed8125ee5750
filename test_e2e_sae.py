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
from contextlib import contextmanager
from functools import partial
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


@pytest.fixture
def copy(tiny, tmp_path):
    """A copy of that folder, for one test to change."""
    return shutil.copytree(tiny, tmp_path / "copy")


def sha256(content):
    """The SHA-256 of bytes, as 64 hex digits."""
    return hashlib.sha256(content).hexdigest()


@contextmanager
def refused(*words):
    """Assert that the block raises a UserError of one line that contains these words."""
    with pytest.raises(UserError) as caught:
        yield
    message = str(caught.value)
    assert "\n" not in message
    for word in words:
        assert str(word) in message


def kill_9():
    """End this process as `kill -9` does."""
    os.kill(os.getpid(), signal.SIGKILL)


def killed(call):
    """Run call() in another process. Returns whether kill_9 ended it."""
    process = multiprocessing.get_context("fork").Process(target=call)
    process.start()
    process.join(60)
    return process.exitcode == -signal.SIGKILL


def at_call(patch, module, name, nth, act, *args):
    """Make the nth call of module.name call act(*args) first."""
    real = getattr(module, name)
    calls = itertools.count(1)

    def counted(*given, **more):
        if next(calls) == nth:
            act(*args)
        return real(*given, **more)
    patch.setattr(module, name, counted)


def see(path):
    """The content of a JSON file."""
    return json.loads(Path(path).read_text())


def change_json(path, keys, value):
    """Set one entry of a JSON file; `keys` lead to it from the outside."""
    whole = see(path)
    inner = whole
    for key in keys[:-1]:
        inner = inner[key]
    inner[keys[-1]] = value
    path.write_text(json.dumps(whole))


# ---- gpt2.py: the model --------------------------------------------------------------------------

@pytest.mark.parametrize("prefix, stored", [
    ("", torch.float32),
    ("transformer.", torch.float16),
    ("", torch.bfloat16),
    ("", torch.float64),
])
def test_logits_equal_transformers(tmp_path, prefix, stored):
    """Logits are those of transformers, whichever precision the file has."""
    model = hf_model()
    gpt = GPT.from_pretrained(write_model(model, tmp_path, prefix, stored))
    for parameter in gpt.parameters():
        assert parameter.dtype == torch.float32
        assert not parameter.requires_grad
    gpt.double()
    model.double()
    for length in 1, 7, 32:
        tokens = torch.randint(0, 1024, (2, length))
        assert (gpt(tokens) - model(tokens).logits).abs().max() < 1e-9


def test_residual_stream_has_zero_mean(tiny):
    """The stream has zero mean over d_model in every layer, and unembeds to the same logits."""
    gpt = GPT.from_pretrained(tiny).double()
    tokens = torch.arange(60).view(2, 30)
    x = gpt.embed(tokens)
    for block in gpt.h:
        x = block(x)
        assert x.mean(-1).abs().max() < 1e-12
    assert torch.equal(gpt.unembed(x), gpt(tokens))


def ids_as_transformers(folder, texts):
    """The ids of texts. Asserts that they are transformers', and that they decode to the texts."""
    tokenizer = gpt2.load_tokenizer(folder)
    oracle = AutoTokenizer.from_pretrained(folder)
    ids = tokenizer.encode_ordinary_batch(texts)
    assert ids == [oracle.encode(text) for text in texts]
    assert tokenizer.decode_batch(ids) == texts
    assert tokenizer.eot_token == oracle.eos_token_id
    return ids


def compare_with_transformers(folder, texts):
    """Assert that transformers opens a folder and agrees on tokens and logits. Returns the loss."""
    ids = ids_as_transformers(folder, texts)
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
    sources = list(stdlib.read_files("val").values())[:20]
    assert compare_with_transformers(STDLIB, sources + ODD_TEXTS) < 3


def test_other_names_of_the_sizes(copy):
    """config.json may name the sizes as transformers' other models do."""
    entries = see(copy / "config.json")
    aliases = {
        "n_layer": "num_hidden_layers",
        "n_head": "num_attention_heads",
        "n_embd": "hidden_size",
        "n_positions": "max_position_embeddings",
    }
    for name, alias in aliases.items():
        entries[alias] = entries.pop(name)
    gpt2.write_json(copy / "config.json", entries)
    oracle = GPT2LMHeadModel.from_pretrained(copy)
    tokens = torch.arange(60).view(2, 30)
    logits = GPT.from_pretrained(copy)(tokens)
    assert (logits - oracle(tokens).logits).abs().max() < 1e-4


def test_what_changes_nothing(copy, tiny):
    """Settings without effect on the logits, and an lm_head that repeats wte, are accepted."""
    entries = {
        "resid_pdrop": 0.5,
        "reorder_and_upcast_attn": True,
        "n_inner": 64,
        "activation_function": "gelu_pytorch_tanh",
        "nobody_knows": [1],
    }
    gpt2.write_json(copy / "config.json", see(copy / "config.json") | entries)
    tensors = load_file(copy / "model.safetensors")
    tensors["lm_head.weight"] = tensors["wte.weight"].clone()
    (copy / "model.safetensors").write_bytes(save(tensors))
    tokens = torch.arange(30).view(1, 30)
    expected = GPT.from_pretrained(tiny)(tokens)
    assert torch.equal(GPT.from_pretrained(copy)(tokens), expected)


# ---- gpt2.py: wrong files ------------------------------------------------------------------------

@pytest.mark.parametrize("name, value", [
    ("scale_attn_by_inverse_layer_idx", True),
    ("scale_attn_weights", False),
    ("activation_function", "gelu"),
    ("n_inner", 32),
    ("tie_word_embeddings", False),
    ("add_cross_attention", True),
    ("model_type", "gpt_neo"),
    ("n_layer", "3"),
    ("n_head", None),
    ("n_embd", [1]),
    ("n_positions", 10**30),
    ("vocab_size", float("inf")),
    ("layer_norm_epsilon", float("nan")),
])
def test_wrong_entry_of_config_json(copy, name, value):
    """An entry that would give other logits, or is no size, is refused by name, with its value."""
    change_json(copy / "config.json", [name], value)
    with refused(copy / "config.json", name, repr(value)):
        GPT.from_pretrained(copy)


@pytest.mark.parametrize("name, value", [("n_head", 3), ("n_embd", 10**5)])
def test_sizes_of_another_model(copy, name, value):
    """A size that the tensors do not have is refused."""
    change_json(copy / "config.json", [name], value)
    with refused(copy):
        GPT.from_pretrained(copy)


LFS_POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n"


@pytest.mark.parametrize("file, content, word", [
    ("config.json", b"\xff", ""),
    ("config.json", b"[" * 10**5, ""),
    ("config.json", b"[]", "JSON object"),
    ("config.json", LFS_POINTER, "git lfs pull"),
    ("vocab.json", b"", ""),
    ("model.safetensors", b"", ""),
    ("model.safetensors", LFS_POINTER, "git lfs pull"),
])
def test_damaged_file(copy, file, content, word):
    """A damaged file, or a pointer in its place, is refused by its path."""
    (copy / file).write_bytes(content)
    load = gpt2.load_tokenizer if file == "vocab.json" else GPT.from_pretrained
    with refused(copy / file, word):
        load(copy)


@pytest.mark.parametrize("name, tensor", [
    ("h.1.ln_2.bias", None),
    ("h.1.more", torch.ones(2)),
    ("h.1.attn.c_attn.weight", torch.ones(48, 16)),
    ("lm_head.weight", torch.ones(1024, 16)),
    ("h.2.mlp.c_proj.bias", torch.ones(16) * np.nan),
    ("ln_f.bias", torch.ones(16) * np.inf),
    ("ln_f.bias", torch.ones(16, dtype=torch.uint8)),
    ("ln_f.bias", torch.ones(16, dtype=torch.int64)),
])
def test_wrong_tensor(copy, name, tensor):
    """A tensor that is missing (None), unknown, misshapen or not finite is refused by name."""
    path = copy / "model.safetensors"
    tensors = load_file(path)
    tensors.pop(name, None)
    if tensor is not None:
        tensors[name] = tensor
    path.write_bytes(save(tensors))
    with refused(path, name):
        GPT.from_pretrained(copy)


def test_model_in_shards(copy):
    """A folder without model.safetensors is refused with the option that writes one."""
    (copy / "model.safetensors").unlink()
    with refused(copy, "max_shard_size"):
        GPT.from_pretrained(copy)


ODD_ENTRIES = [
    None, -1, 2**64, 0.5, "BF16", "I64",
    [], [[]], [-1],
    [0, 2**62, 4], [4, 0], [0, 10**9],
]


def mutants(whole):
    """Damaged copies of a safetensors file: cut, with a bit flipped, with an odd header."""
    for at in range(0, len(whole), 19):
        yield whole[:at]
        flipped = bytearray(whole)
        flipped[at] ^= 1 << at % 8
        yield flipped
    start = 8 + int.from_bytes(whole[:8], "little")
    header = json.loads(whole[8:start])
    fields = "dtype", "shape", "data_offsets"
    for field, value in itertools.product(fields, ODD_ENTRIES):
        entry = header["wpe.weight"] | {field: value}
        head = json.dumps(header | {"wpe.weight": entry}).encode()
        yield len(head).to_bytes(8, "little") + head + whole[start:]


def test_mutated_weights(tmp_path):
    """Whatever happens to a file of weights, it loads or is refused in one line."""
    path = write_model(hf_model(1, 1, 2, 2, 2), tmp_path) / "model.safetensors"
    loaded = refused = 0
    for content in mutants(path.read_bytes()):
        path.write_bytes(content)
        try:
            GPT.from_pretrained(tmp_path)
            loaded += 1
        except UserError as error:
            assert "\n" not in str(error)
            refused += 1
    assert refused > 200
    assert loaded > 10


# ---- gpt2.py: the tokenizer ----------------------------------------------------------------------

@pytest.fixture
def saved(tmp_path):
    """A folder with the embedded model's tokenizer as transformers saves it, in tokenizer.json."""
    AutoTokenizer.from_pretrained(STDLIB).save_pretrained(tmp_path)
    shutil.copy(STDLIB / "config.json", tmp_path)
    return tmp_path


def test_tokenizer_json_alone(saved):
    """tokenizer.json is enough, in the form that transformers writes."""
    ids_as_transformers(saved, ODD_TEXTS)


def test_special_token_in_front(saved):
    """Ids that a special token in front has shifted are right. An added_tokens.json beside settings
    that do not say which tokens are special is refused."""
    vocab = see(STDLIB / "vocab.json")
    shifted = {token: (i + 1) % len(vocab) for token, i in vocab.items()}
    change_json(saved / "tokenizer.json", ["model", "vocab"], shifted)
    change_json(saved / "tokenizer.json", ["added_tokens", 0, "id"], 0)
    (saved / "tokenizer_config.json").write_text('{"eos_token": "<|endoftext|>"}')
    ids_as_transformers(saved, ODD_TEXTS)
    (saved / "added_tokens.json").write_text('{"def": 1024}')
    with refused("added_tokens.json"):
        gpt2.load_tokenizer(saved)


ADDED = {"7": {"content": "def", "special": False}}


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
    ("tokenizer_config.json", ["add_prefix_space"], True, "add_prefix_space"),
    ("tokenizer_config.json", ["added_tokens_decoder"], ADDED, "'def'"),
])
def test_tokenizer_of_another_kind(saved, file, keys, value, word):
    """A setting with which transformers gives other ids is refused by its name."""
    change_json(saved / file, keys, value)
    with refused(saved / file, word):
        gpt2.load_tokenizer(saved)


@pytest.mark.parametrize("token, value", [
    ("!", "0"),
    ("!", -1),
    ("\u20ac", 1024),
    ("<|endoftext|>", 1022),
])
def test_wrong_vocabulary(copy, token, value):
    """An id that is no id, or that two tokens have, or a token of no bytes, is refused."""
    change_json(copy / "vocab.json", [token], value)
    with refused(copy / "vocab.json"):
        gpt2.load_tokenizer(copy)


def test_ids_in_another_order(copy):
    """A vocabulary whose ids are not in the order of merges.txt is refused: tiktoken needs it."""
    shutil.copy(STDLIB / "merges.txt", copy)
    vocab = see(copy / "vocab.json")
    change_json(copy / "vocab.json", ["self"], vocab["def"])
    change_json(copy / "vocab.json", ["def"], vocab["self"])
    with refused(copy / "vocab.json", "order"):
        gpt2.load_tokenizer(copy)


def test_missing_bytes(copy):
    """A vocabulary without each of the 256 bytes is refused: tiktoken would panic."""
    (copy / "vocab.json").write_text('{"!": 0}')
    with refused(copy / "vocab.json", "255 of the 256 bytes"):
        gpt2.load_tokenizer(copy)


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
        """Answer a request, as its path says."""
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
        hub.over = threading.Event()
        for name in "gpt2", "gpt2-medium":
            monkeypatch.setitem(gpt2.SIZES, name, config)
        digests = {"model.safetensors": sha256(weights), "vocab.json": sha256(vocab)}
        monkeypatch.setattr(gpt2, "SHA256", digests)
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


@pytest.mark.parametrize("part, faults, sent", [
    (b"", BUSY + [{"cut": 500_000}] * 2 + BUSY, N + 2 * CHUNK),
    (b"", [{"status": 200, "cut": 2**20}, {"status": 200}], N + 2**20),
    (BODY, [], 0),
    (BODY + b"more", [], N),
])
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
    (b"", [{"status": 404}], ["404", "by hand"]),
    (b"", SHORTER * 9, ["--model stdlib"]),
    (WRONG_BODY, [], [sha256(BODY), sha256(WRONG_BODY)]),
])
def test_download_gives_up(hub, tmp_path, part, faults, words):
    """What cannot be had, or has a wrong byte, never gets the name; a later call succeeds."""
    path = tmp_path / "file"
    hub.faults = list(faults)
    (tmp_path / "file.part").write_bytes(part)
    with refused(gpt2.HUB + "/file", *words):
        fetch(path)
    assert not path.exists()
    assert len(hub.ranges) < 10
    hub.faults.clear()
    assert fetch(path).read_bytes() == BODY


def test_login_page(hub, tmp_path):
    """A web page never becomes the file, and leaves what was fetched before as it is."""
    path = tmp_path / "file"
    part = tmp_path / "file.part"
    part.write_bytes(BODY[:1000])
    hub.login = True
    with refused(gpt2.HUB + "/file", path, "web page"):
        fetch(path)
    assert not path.exists()
    assert part.read_bytes() == BODY[:1000]


@pytest.mark.parametrize("fault", [
    {"body": BODY + b"?"},
    {"body": BODY[:2000], "status": 200},
])
def test_size_that_is_not_the_stated_one(hub, tmp_path, fault):
    """An answer of another size than the hub stated is not written."""
    part = tmp_path / "file.part"
    part.write_bytes(BODY[:1000])
    hub.faults = [fault]
    with refused(gpt2.HUB + "/file", "instead of 1500000"):
        fetch(tmp_path / "file")
    assert part.read_bytes() == BODY[:1000]


def test_answer_that_starts_elsewhere(hub, tmp_path):
    """Bytes from another place, or an answer shorter than what is there, leave that as it is."""
    (tmp_path / "file.part").write_bytes(BODY[:1000])
    hub.faults = [{"first": 1001, "cut": CHUNK + 1}, {"body": b"busy", "status": 200}]
    # From the store itself: it states no size, so that nothing else is wrong with the answer
    assert fetch(tmp_path / "file", "/cdn/file", sha256(BODY)).read_bytes() == BODY
    assert hub.ranges == [1000] * 3


@pytest.mark.parametrize("name", ["/cdn/small.json", "/small.json"])
def test_hash_that_nobody_knows(hub, tmp_path, name):
    """Without a pinned or stated SHA-256 nothing is fetched; git's SHA-1 is not taken for one."""
    path = tmp_path / "file"
    with refused(gpt2.HUB + name, path, "by hand"):
        fetch(path, name)
    assert not path.exists()
    assert fetch(path, name, sha256(b"{}")).read_bytes() == b"{}"


def test_download_killed_then_resumed_by_two(hub, tmp_path, monkeypatch):
    """After kill -9, one of two processes goes on where the first stopped, and the other waits."""
    path = tmp_path / "file"
    lock = gpt2.lock
    barrier = threading.Barrier(2, timeout=30)

    def lock_together(folder):
        barrier.wait()
        return lock(folder)
    hub.faults = [{"cut": 600_000}]
    with monkeypatch.context() as during:
        at_call(during, gpt2, "fetch_rest", 2, kill_9)
        assert killed(partial(fetch, path))
    assert not path.exists()
    monkeypatch.setattr(gpt2, "lock", lock_together)
    with ThreadPoolExecutor(2) as pool:  # a lock excludes threads as it excludes processes
        for fetched in pool.map(fetch, [path, path]):
            assert fetched.read_bytes() == BODY
    assert hub.ranges == [0, 2 * CHUNK]


def test_lock(tmp_path, monkeypatch):
    """A folder is locked for one process; on a file system without flock, nothing is."""
    import fcntl  # Windows has no such module
    with gpt2.lock(tmp_path), refused(tmp_path, "in use"):
        gpt2.lock(tmp_path, wait=False)

    def no_flock(file, operation):
        raise OSError(38, "Function not implemented")
    monkeypatch.setattr(fcntl, "flock", no_flock)
    with gpt2.lock(tmp_path), gpt2.lock(tmp_path, wait=False):
        pass


@pytest.mark.parametrize("name", ["gpt2", "gpt2-medium"])
def test_model_from_the_hub(hub, name):
    """A model is fetched, checked and gives transformers' logits; then the hub is not asked."""
    hub.faults = [{"body": hub.files[OPENAI + "vocab.json"][:-1] + b"?"}]
    with refused(OPENAI + "vocab.json", gpt2.SHA256["vocab.json"]):
        GPT.from_pretrained(name)
    tokens = torch.arange(20).view(2, 10)
    logits = GPT.from_pretrained(name)(tokens)
    assert (logits - hf_model()(tokens).logits).abs().max() < 1e-4
    hub.asked.clear()
    GPT.from_pretrained(name)
    gpt2.load_tokenizer(name)
    assert hub.asked == []


def test_hub_out_of_reach(hub, monkeypatch):
    """Without a network the error says where to put the file, and what needs no network."""
    monkeypatch.setattr(gpt2, "HUB", "http://127.0.0.1:1")  # no server is there
    path = gpt2.DATA / "gpt2-xl" / "vocab.json"
    with refused(gpt2.HUB, path, "--model stdlib"):
        GPT.from_pretrained("gpt2-xl")


# ---- data: OpenWebText and the standard library --------------------------------------------------

def tar(files):
    """A tar of {name: bytes}, as bytes."""
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w") as archive:
        for name, content in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    return file.getvalue()


def subset_tar(subset):
    """A tar as OpenWebText has them, of {name.xz: {name.txt: text}}."""
    files = {"README": b"not an .xz"}
    for name, texts in subset.items():
        pages = {page: text.encode() for page, text in texts.items()}
        files[name] = lzma.compress(tar(pages))
    return tar(files)


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
    hub.files.clear()
    (tmp_path / "data/openwebtext/urlsf_subset00.tar").unlink()
    assert read_openwebtext() == expected_bins(TEXTS)


@pytest.mark.parametrize("module, name, nth", [
    (gpt2.tiktoken.Encoding, "encode_ordinary_batch", 2),
    (os, "replace", 3),  # of val.bin
    (os, "replace", 4),  # of train.bin
])
def test_openwebtext_after_kill_9(hub, tmp_path, monkeypatch, module, name, nth):
    """After a kill at any point there is no half train.bin, and the next process ends well."""
    with monkeypatch.context() as during:
        at_call(during, module, name, nth, kill_9)
        assert killed(read_openwebtext)
    assert not (tmp_path / "data/openwebtext/train.bin").exists()
    assert read_openwebtext() == expected_bins(TEXTS)


@pytest.mark.parametrize("texts", [
    ["", "the end"],
    ["b" * 900, ""],
    ["", "", "b" * 900],
    ["the " * 300 + "x", "in", "a", "b"],
])
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
    damaged = [SUBSET_TAR[:end] for end in range(0, len(SUBSET_TAR.rstrip(b"\0")), 512)]
    third = subset_tar({"three.xz": DOCUMENTS["three.xz"]})
    for at in range(1536, 1736, 3):  # in the .xz, which three blocks of 512 bytes precede
        flipped = bytearray(third)
        flipped[at] ^= 4
        damaged.append(flipped)
    refused = 0
    for content in damaged:
        path.write_bytes(content)
        try:  # a flip in the index behind the data does no harm
            assert list(openwebtext.documents(path)) == TEXTS[4:6]
        except UserError as error:
            assert str(path) in str(error)
            refused += 1
    assert refused > len(damaged) - 7


def test_text_of_the_standard_library(tmp_path, monkeypatch):
    """The text is the library's source, which must be there."""
    source = Path(os.__file__).with_name("argparse.py").read_text()
    assert stdlib.read_files("train")["argparse.py"] == source
    monkeypatch.setattr("sysconfig.get_paths", partial(dict, stdlib=tmp_path))
    with refused(tmp_path):
        stdlib.read_files("train")


def test_tokens_of_the_standard_library():
    """The tokens are those of the files, joined by end-of-text."""
    tokens = load_tokens("stdlib", "val")
    text = gpt2.load_tokenizer("stdlib").decode(tokens.tolist())
    assert tokens.dtype == np.uint32
    assert text == "<|endoftext|>".join(stdlib.read_files("val").values())


def test_text_of_ones_own(tmp_path):
    """Files below a folder, but no hidden ones, are encoded as in one go and joined by end-of-text
    in the order of their paths, as is what <|endoftext|> separates; the last 5 % of the tokens are
    held out."""
    short = "déjà vu\n \t x"
    long = "\n\n  ".join(list(stdlib.read_files("train").values())[:20])  # several pieces
    (tmp_path / "b").mkdir()
    (tmp_path / "b/2.txt").write_text(long, "utf-8")
    (tmp_path / "a.txt").write_text(f"{short}<|endoftext|>", "utf-8")
    (tmp_path / ".hidden").write_bytes(b"\xff")
    tokenizer = gpt2.load_tokenizer("stdlib")
    expected = tokenizer.encode_ordinary(short) + [1023, 1023] + tokenizer.encode_ordinary(long)
    train = load_tokens("stdlib", "train", tmp_path)
    val = load_tokens("stdlib", "val", tmp_path)
    assert len(long) > 2**17
    assert train.tolist() + val.tolist() == expected
    assert len(val) == len(expected) // 20


def test_split_of_the_standard_library(tmp_path, monkeypatch):
    """Tests, tables and machine-made files, in any Python's library, are no text; of the rest, the
    hash of its name puts a file in train or val. What is one file in Python 3.11, in train, stays
    there as a package."""
    expected = {f"json/{i}.py" for i in range(1000)}
    left_out = {
        "test/test_json.py",
        "json/tests/a.py",
        "site-packages/numpy.py",
        "encodings/cp037.py",
        "config-3.13-x86_64-linux-gnu/python-config.py",
        "_sysconfigdata__linux_x86_64-linux-gnu.py",
    }
    for name in expected | left_out:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    monkeypatch.setattr("sysconfig.get_paths", partial(dict, stdlib=tmp_path))
    val = stdlib.read_files("val")
    assert stdlib.read_files("train").keys() | val.keys() == expected
    for name in expected:
        assert (name in val) == (sha256(name.encode()) < "1a")  # a tenth
    assert stdlib.split_of("zipfile/__init__.py") == "train"
    assert stdlib.split_of("pathlib/__init__.py") == "train"


def test_byte_pair_encoding():
    """The most frequent pair is merged first; of equal ones the greater bytes win."""
    # "ab" occurs 5 times. Then a+ab and a+a occur twice each.
    assert stdlib.train_bpe(["aaab aaab", "ab;ab;ab"], 259) == [(b"a", b"b"), (b"a", b"ab")]


def test_recipe_of_the_embedded_model(tmp_path, monkeypatch):
    """The recipe makes a model that transformers opens, and that has learned something. It does not
    write over a model."""
    source = Path(os.__file__).with_name("shlex.py").read_text()

    def one_file(split):
        return {"shlex.py": source}
    monkeypatch.setattr(stdlib, "read_files", one_file)
    monkeypatch.setattr(stdlib, "CONFIG", GPTConfig(2, 2, 32, 16, 1024))
    stdlib.make(tmp_path, 150)
    with refused("--folder"):
        stdlib.make(tmp_path, 1)
    assert compare_with_transformers(tmp_path, [source]) < 5.5  # untrained: log(1024) = 6.9


# ---- e2e_sae.py: the SAE, the losses, the evaluation, by hand in float64 -------------------------

# In place of the standard library: 200 sequences of 32 tokens each
TRAIN = torch.from_numpy(np.random.default_rng(0).integers(0, 1024, (200, 32)))
VAL = torch.from_numpy(np.random.default_rng(1).integers(0, 1024, (200, 32)))
FACTORS = {  # of the terms in each loss; λ and β are 0.7 and 1.3
    "local": {"mse": 1, "l1": 0.7},
    "e2e": {"kl": 1, "l1": 0.7},
    "e2e_ds": {"kl": 0.5, "downstream_mse": 1.3, "l1": 0.7},
    "finish": {"mse": 0.5, "kl": "computed", "l1": 0.7},
}


def terms_of(loss):
    """The names of the terms that a loss reports: its own, and three that all report."""
    return FACTORS[loss].keys() | {"l0", "l1", "mse"}


def kl_by_hand(log_p, log_q):
    """KL(p || q) at each position."""
    return (log_p.exp() * (log_p - log_q)).sum(-1)


def run(gpt, tokens, layer=None, x_hat=None):
    """The residual streams entering each block and leaving the last, and log-probabilities. With
    `layer`, x_hat takes the place of the stream entering it."""
    x = gpt.embed(tokens)
    streams = []
    for i, block in enumerate(gpt.h):
        if i == layer:
            x = x_hat
        streams.append(x)
        x = block(x)
    streams.append(x)
    y = gpt.unembed(x)
    return streams, y - y.exp().sum(-1, keepdim=True).log()


def sae_by_hand(weights, x):
    """The features and x_hat of an SAE with these W_enc, b_enc, W_dec and b_dec."""
    W_enc, b_enc, W_dec, b_dec = weights
    features = (x @ W_enc + b_enc).clamp(min=0)
    return features, features @ F.normalize(W_dec, dim=1) + b_dec


def make_sae(n_features=40, seed=1):
    """A random SAE in float64 whose W_dec has rows of any length."""
    torch.manual_seed(seed)
    sae = SAE(16, n_features).double()
    sae.W_dec.data *= torch.rand(n_features, 1) + 0.5
    return sae


def weights_of(sae):
    """W_enc, b_enc, W_dec and b_dec, without gradient."""
    return [parameter.detach().clone() for parameter in sae.parameters()]


def squared_errors(spliced, clean):
    """The mean squared difference of the residual streams, layer by layer."""
    return [(s - c).square().mean() for s, c in zip(spliced, clean)]


@pytest.fixture
def gpt(tiny):
    """The tiny model in float64."""
    return GPT.from_pretrained(tiny).double()


def test_initial_values():
    """Encoder and biases start as nn.Linear's do, the columns of W_dec orthonormal."""
    torch.manual_seed(0)
    W_enc, b_enc, W_dec, b_dec = weights_of(SAE(64, 1000))
    for weight, fan in (W_enc, 64), (b_enc, 64), (b_dec, 1000):
        bound = fan**-0.5
        assert 0.8 * bound < weight.abs().max() <= bound
        assert 0.44 * bound < weight.std() < 0.72 * bound  # uniform: 1 / sqrt(3)
    assert (W_dec.T @ W_dec - torch.eye(64)).abs().max() < 1e-5


def test_dictionary_has_unit_rows():
    """The dictionary's rows have unit length, but a row of zeros stays zero."""
    sae = make_sae()
    sae.W_dec.data[3] = 0
    expected = torch.ones(40, dtype=torch.float64)
    expected[3] = 0
    torch.testing.assert_close(sae.dictionary.norm(dim=1), expected)


def loss_by_hand(gpt, tokens, weights, loss, layer):
    """A loss and its terms, from their formulas."""
    clean, log_p = run(gpt, tokens)
    features, x_hat = sae_by_hand(weights, clean[layer])
    spliced, log_q = run(gpt, tokens, layer, x_hat)
    squares = squared_errors(spliced, clean)
    terms = {
        "l0": (features > 0).sum() / tokens.numel(),
        "l1": features.sum() / tokens.numel() / 16,
        "mse": squares[layer],
        "kl": kl_by_hand(log_p, log_q).mean(),
        "downstream_mse": sum(squares[layer + 1 : 3]) / max(1, 2 - layer),
    }
    factors = dict(FACTORS[loss])
    if loss == "finish":
        factors["kl"] = (terms["mse"] / terms["kl"]).item() / 2
    terms["loss"] = sum(factor * terms[name] for name, factor in factors.items())
    return terms


@pytest.mark.parametrize("loss, layer", [
    ("local", 0), ("local", 2),
    ("e2e", 0), ("e2e", 2),
    ("e2e_ds", 0), ("e2e_ds", 1),
    ("finish", 1),
])
def test_losses_by_hand(gpt, loss, layer):
    """Loss, terms and gradients are those of the formulas."""
    tokens = VAL[:4]
    sae = make_sae()
    weights = [weight.requires_grad_() for weight in weights_of(sae)]
    expected = loss_by_hand(gpt, tokens, weights, loss, layer)
    expected["loss"].backward()
    if loss == "local":  # it runs nothing from `layer` on
        gpt.h = gpt.h[:layer]
        gpt.ln_f = None

    config = Config(model="stdlib", loss=loss, layer=layer, sparsity=0.7, downstream=1.3)
    total, terms = compute_loss(gpt, sae, tokens, config)
    total.backward()

    assert terms.keys() == terms_of(loss)
    assert terms["mse"].requires_grad == (loss in ("local", "finish"))
    assert abs(total - expected["loss"]) < 1e-10
    for name, value in terms.items():
        assert abs(value - expected[name]) < 1e-6, name
    for parameter, weight in zip(sae.parameters(), weights):
        assert (parameter.grad - weight.grad).abs().max() < 1e-10
    assert all(parameter.grad is None for parameter in gpt.parameters())


class MetaOnly(torch.utils._python_dispatch.TorchDispatchMode):
    """While it is active, every tensor must be on the meta device, and no value may be read."""
    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        assert "local_scalar_dense" not in str(function)  # what .item() calls
        result = function(*args, **(kwargs or {}))
        for leaf in torch.utils._pytree.tree_leaves((args, kwargs, result)):
            if isinstance(leaf, torch.Tensor):
                assert leaf.device.type == "meta", function
        return result


@pytest.mark.parametrize("loss", FACTORS)
def test_step_at_the_papers_sizes(loss):
    """A step never leaves its device nor waits for it, and NCCL can sum its gradients."""
    with torch.device("meta"):
        gpt = GPT(GPTConfig())
        sae = SAE(768, 46_080)
        tokens = torch.zeros(16, 1024, dtype=torch.long)
    with MetaOnly():
        total, _ = compute_loss(gpt, sae, tokens, Config(loss=loss))
        total.backward()
    for parameter in sae.parameters():
        assert parameter.grad.is_contiguous()


@pytest.mark.parametrize("n, vocab", [(7, 300_001), (65, 131_073)])
def test_kl_loss(n, vocab):
    """KLLoss and its gradient are those of the formula, also for more than one chunk."""
    h = torch.randn(n, 2, dtype=torch.double, requires_grad=True)
    h_clean = torch.randn(n, 2, dtype=torch.double)
    unembedding = torch.randn(vocab, 2, dtype=torch.double)
    log_p = (h_clean @ unembedding.T).log_softmax(-1)
    log_q = (h @ unembedding.T).log_softmax(-1)
    expected = kl_by_hand(log_p, log_q).mean()
    (expected_gradient,) = torch.autograd.grad(expected, h)

    kl = KLLoss.apply(h, h_clean, unembedding)
    (gradient,) = torch.autograd.grad(kl, h)

    assert abs(kl - expected) < 1e-12
    assert (gradient - expected_gradient).abs().max() < 1e-12


def test_compiled_losses_equal_eager(tiny):
    """Compiled once, as one graph, losses and gradients are the same; in bfloat16 nearly so."""
    gpt = GPT.from_pretrained(tiny)
    sae = make_sae().float()
    configs = [Config(model="stdlib", loss=loss, layer=1) for loss in FACTORS]

    def losses(tokens):
        values = []
        for config in configs:
            loss, terms = compute_loss(gpt, sae, tokens, config)
            values += [loss] + list(terms.values())
        return values
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(losses, fullgraph=True, backend=counter)
    for tokens in VAL[:8].split(4):
        found = compiled(tokens)
        expected = losses(tokens)
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-6)
        gradients = torch.autograd.grad(sum(found), sae.parameters())
        expected_gradients = torch.autograd.grad(sum(expected), sae.parameters())
        torch.testing.assert_close(gradients, expected_gradients, rtol=1e-4, atol=1e-6)
        with torch.autocast("cpu", torch.bfloat16):
            rounded = losses(tokens)
        torch.testing.assert_close(rounded, expected, rtol=0.02, atol=0)
    assert counter.frame_count == 1


def cross_entropy(log, tokens):
    """The mean of -log p of the next token."""
    return -log[:, :-1].gather(-1, tokens[:, 1:, None]).mean()


def test_evaluation_by_hand(gpt):
    """Every measure is its formula, over all tokens."""
    tokens = VAL[:100]
    sae = make_sae()
    sae.b_enc.data[:5] = -99  # never active
    clean, log_p = run(gpt, tokens)
    x = clean[1]
    features, x_hat = sae_by_hand(weights_of(sae), x)
    spliced, log_q = run(gpt, tokens, 1, x_hat)
    _, log_m = run(gpt, tokens, 1, x.mean((0, 1)).expand_as(x))
    ce = cross_entropy(log_p, tokens)
    ce_increase = cross_entropy(log_q, tokens) - ce
    ce_ablated = cross_entropy(log_m, tokens)
    ratio = x_hat.norm(dim=-1) / x.norm(dim=-1)
    mse = squared_errors(spliced, clean)
    means = [c.mean((0, 1)).expand_as(c) for c in clean]
    variance = squared_errors(means, clean)
    explained = [1 - m / v for m, v in zip(mse, variance)]
    expected = {
        "ce": ce,
        "ce_spliced": ce + ce_increase,
        "ce_increase": ce_increase,
        "ce_ablated": ce_ablated,
        "ce_recovered": 1 - ce_increase / (ce_ablated - ce),
        "kl": kl_by_hand(log_p, log_q).mean(),
        "top1_agreement": (log_p.argmax(-1) == log_q.argmax(-1)).double().mean(),
        "l0": (features > 0).sum() / 3200,
        "alive": (features > 0).any(0).any(0).sum(),
        "n_features": 40,
        "tokens": 3200,
        "mse": mse[1],
        "mse_by_layer": mse[1:3],
        "explained_variance": explained[1],
        "explained_variance_by_layer": explained[1:3],
        "l2_ratio": ratio[:, 1:].mean(),
        "l2_ratio_first": ratio[:, 0].mean(),
    }
    found = evaluate(gpt, sae, tokens.numpy().astype(np.uint16), 1)
    assert json.loads(json.dumps(found)).keys() == expected.keys()
    for name, value in expected.items():
        assert np.allclose(found[name], value, rtol=1e-6), name


# ---- e2e_sae.py: settings ------------------------------------------------------------------------

@pytest.mark.parametrize("loss, layer, sparsity, downstream", [
    ("local", None, 6, 2.5),
    ("e2e", None, 1.5, 2.5),
    ("e2e_ds", 2, 10, 2.5),
    ("e2e_ds", 10, 10, 0.05),
    ("finish", None, 6, 2.5),
])
def test_defaults_are_the_papers(loss, layer, sparsity, downstream):
    """For GPT-2 the defaults are the paper's numbers, spelled out."""
    config = Config(loss=loss, layer=layer)
    layer = layer or 6
    assert vars(config) == {
        "model": "gpt2", "text": "openwebtext", "layer": layer, "loss": loss, "init": None,
        "sparsity": sparsity, "downstream": downstream, "n_features": 46_080,
        "n_sequences": 400_000, "context": 1024, "batch_size": 16, "lr": 5e-4, "n_eval": 500,
        "seed": 0, "device": "cpu", "dtype": "float32", "compile": False, "micro_batch": 16,
        "checkpoint_minutes": 10, "out": f"out/gpt2-layer{layer}-{loss}",
    }


def test_defaults_of_a_folder(tiny):
    """A model in a folder gets the paper's settings, fitted to its sizes, and needs --text."""
    config = Config(model=str(tiny), text="stdlib")
    assert (config.layer, config.context, config.n_features) == (1, 32, 960)
    assert (config.lr, config.sparsity, config.n_sequences) == (5e-4, 1.5, 400_000)
    with refused(tiny, "--text"):
        Config(str(tiny))


# ---- e2e_sae.py: SAEs in files -------------------------------------------------------------------

CFG = {
    "architecture": "standard", "d_in": 16, "d_sae": 40, "dtype": "float32", "device": "cpu",
    "apply_b_dec_to_input": False, "normalize_activations": "none", "reshape_activations": "none",
    "metadata": {
        "sae_lens_version": "6.0.0", "model_name": "model", "context_size": 32,
        "hook_name": "blocks.1.hook_resid_pre", "prepend_bos": False, "neuronpedia_id": None,
        "model_from_pretrained_kwargs": {"center_writing_weights": True},
    },
}
FLAT_CFG = {  # SAELens in 2024; features are computed from x - b_dec
    "model_name": "gpt2-small", "hook_point": "blocks.1.hook_resid_pre", "hook_point_layer": 1,
    "hook_point_head_index": None, "context_size": 1024, "d_in": 16, "d_sae": 40,
    "dtype": "torch.float32", "device": "mps", "lr": 0.0004, "use_ghost_grads": False,
}


def write_sae(kind):
    """Write an SAE, in whose dictionary row 3 is zero, as the file or folder `kind`. Returns its
    weights."""
    weights = weights_of(make_sae().float())
    W_enc, b_enc, W_dec, b_dec = weights
    W_dec[3] = 0
    if kind == "x.pt":  # as the paper's
        tensors = {
            "blocks-1-hook_resid_pre.encoder.0.weight": W_enc.T,
            "blocks-1-hook_resid_pre.encoder.0.bias": b_enc,
            "blocks-1-hook_resid_pre.decoder.weight": W_dec.T,
            "blocks-1-hook_resid_pre.decoder.bias": b_dec,
        }
        torch.save(tensors, kind)
        return weights
    tensors = {"W_enc": W_enc, "b_enc": b_enc, "W_dec": W_dec, "b_dec": b_dec}
    norms = W_dec.norm(dim=1).clamp(min=0.1)
    if kind == "saelens":  # rows may have any length there: divide the features by it
        cfg = CFG
        tensors["W_enc"] = W_enc / norms
        tensors["b_enc"] = b_enc / norms
    else:  # "flat"
        cfg = FLAT_CFG
        tensors["W_dec"] = W_dec / norms[:, None]
        tensors["b_enc"] = b_enc + b_dec @ W_enc
    gpt2.write_json(f"{kind}/cfg.json", cfg)
    save_file(tensors, f"{kind}/sae_weights.safetensors")
    return weights


@pytest.mark.parametrize("kind, model, context", [
    ("saelens", "model", 32), ("flat", "gpt2", 1024), ("x.pt", "gpt2", 1024)])
def test_load_an_sae(tmp_path, monkeypatch, capsys, kind, model, context):
    """An SAE in any of the formats computes what was written, and nothing is noted about it; a
    feature whose row is zero is never active."""
    monkeypatch.chdir(tmp_path)
    x = torch.randn(5, 16)
    features, x_hat = sae_by_hand(write_sae(kind), x)
    features[:, 3] = 0
    sae = e2e_sae.load_sae(kind)
    torch.testing.assert_close(
        [sae.encode(x), sae(x)], [features, x_hat], rtol=0, atol=1e-5)
    assert sae.made_for == {"model": model, "layer": 1, "context": context}
    assert capsys.readouterr().err == ""


def test_saved_sae_is_saelens(tmp_path):
    """The folder has SAELens' settings, and unit rows, with which its formula gives x_hat."""
    sae = make_sae().float()
    e2e_sae.save_sae(sae, tmp_path, "model", 1, 32)
    assert see(tmp_path / "cfg.json") == CFG
    t = load_file(tmp_path / "sae_weights.safetensors")
    x = torch.randn(5, 16)
    theirs = (x @ t["W_enc"] + t["b_enc"]).relu() @ t["W_dec"] + t["b_dec"]
    torch.testing.assert_close(theirs, sae(x))
    torch.testing.assert_close(t["W_dec"].norm(dim=1), torch.ones(40))


@pytest.mark.parametrize("kwargs", [None, {"center_writing_weights": False}])
def test_note_on_a_stream_with_its_mean(tmp_path, capsys, kwargs):
    """An SAE that was made for another stream gets one line on stderr, once."""
    e2e_sae.save_sae(make_sae(), tmp_path, "model", 1, 32)
    change_json(tmp_path / "cfg.json", ["metadata", "model_from_pretrained_kwargs"], kwargs)
    e2e_sae.load_sae(tmp_path)
    e2e_sae.load_sae(tmp_path)
    assert capsys.readouterr().err.count("\n") == 1


@pytest.mark.parametrize("keys, value", [
    (["architecture"], "topk"),
    (["normalize_activations"], "layer_norm"),
    (["reshape_activations"], "hook_z"),
    (["jump_threshold"], 0.1),
    (["metadata", "hook_head_index"], 3),
    (["metadata", "activation_fn"], "tanh-relu"),
    (["metadata", "hook_name"], "blocks.1.hook_mlp_out"),
])
def test_sae_of_another_kind(tmp_path, keys, value):
    """What would change the mathematics is refused by name, with its value."""
    e2e_sae.save_sae(make_sae(), tmp_path, "model", 1, 32)
    change_json(tmp_path / "cfg.json", keys, value)
    with refused("cfg.json", keys[-1], repr(value)):
        e2e_sae.load_sae(tmp_path)


def test_start_from_an_sae(here, hub, monkeypatch):
    """A run starts from exactly one of the paper's SAEs, also if it was stopped at once."""
    write_sae("x.pt")
    revision = "713515193ec799fd17bd7f6ccf6f209332b07f7d"
    hub.files[f"/apollo-research/e2e-saes-gpt2/resolve/{revision}/x.pt"] = Path("x.pt").read_bytes()
    seen = []

    def stop(gpt, sae, tokens, config):
        seen.append(weights_of(sae))
        raise KeyboardInterrupt
    monkeypatch.setattr(e2e_sae, "compute_loss", stop)
    assert command(RUN + "--loss finish --init apollo:x --out out") == 130
    assert command("--resume out") == 130
    expected = weights_of(e2e_sae.load_sae("x.pt"))
    for weights in seen:
        torch.testing.assert_close(weights, expected, rtol=0, atol=0)
    assert len(seen) == 2


# ---- e2e_sae.py: training ------------------------------------------------------------------------

RUN = ("--model model --text text --layer 1 --context 32 --n-features 40 --n-sequences 160 "
       "--batch-size 4 --lr 0.002 --n-eval 8 --checkpoint-minutes 0 ")
# For two processes: a batch that does not divide evenly, and a single held-out sequence
ODD_RUN = RUN + "--batch-size 5 --n-sequences 200 --n-eval 1 --loss e2e_ds "


def checkpoint(run):
    """The checkpoint of a run."""
    return torch.load(Path(run, "checkpoint.pt"), weights_only=True)


def log_of(run):
    """The lines of a run's log, without the speed."""
    lines = [json.loads(line) for line in Path(run, "log.jsonl").read_text().splitlines()]
    for line in lines:
        assert line.pop("tokens_per_second") > 0
    return lines


def command(line):
    """Run e2e_sae.py in this process. Returns its exit code."""
    with pytest.raises(SystemExit) as end:
        run_command(partial(e2e_sae.main, line.split()))
    return end.value.code or 0


def fails(capsys, line, *words):
    """Assert that a command ends with an error of one line that contains these words."""
    assert command(line)
    error = capsys.readouterr().err
    assert error.startswith("error:")
    assert error.count("\n") == 1
    for word in words:
        assert word in error


def send(*numbers):
    """Send these signals to this process."""
    for number in numbers:
        signal.raise_signal(number)


@pytest.fixture(scope="session")
def runs(tmp_path_factory, tiny):
    """A folder with a model, its text, a run that ended ("whole"), one that was stopped after step
    14 ("stopped"), and one to compare two processes with ("one")."""
    folder = tmp_path_factory.mktemp("runs")
    shutil.copytree(tiny, folder / "model")
    (folder / "text").mkdir()
    TRAIN.numpy().astype(np.uint16).tofile(folder / "text/train.bin")
    VAL.numpy().astype(np.uint16).tofile(folder / "text/val.bin")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        assert command(RUN + "--out whole") == 0
        assert command(ODD_RUN + "--out one") == 0
        at_call(patch, e2e_sae, "compute_loss", 14, send, signal.SIGTERM)
        assert command(RUN + "--out stopped") == 128 + signal.SIGTERM
    return folder


@pytest.fixture
def here(runs, tmp_path, monkeypatch):
    """A copy of that folder, as the current one."""
    shutil.copytree(runs, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize("loss", FACTORS)
def test_training_lowers_its_loss(here, loss):
    """Each loss falls, its log has its terms, and the saved SAE gives the figures of eval.json."""
    write_sae("x.pt")
    assert command(RUN + f"--loss {loss} --sparsity 0.01 --lr 0.01 --init x.pt --out out") == 0
    log = log_of("out")
    assert log[0].keys() == {"step", "loss", "lr", "grad_norm"} | terms_of(loss)
    assert log[-1]["loss"] < 0.8 * log[0]["loss"]
    sae = e2e_sae.load_sae("out")
    found = evaluate(GPT.from_pretrained("model"), sae, VAL[::25], 1)  # spread evenly
    assert see("out/eval.json") == found


def test_end_to_end_costs_less(tmp_path, monkeypatch):
    """The claim of README: with fewer active features, e2e costs the model less than local."""
    monkeypatch.chdir(tmp_path)
    source = Path(os.__file__).with_name("argparse.py")
    line = (f"--model stdlib --text {source} --n-sequences 320 --context 32 --n-eval 40 "
            "--n-features 256 ")
    assert command(line + "--loss local --out local") == 0
    assert command(line + "--loss e2e --sparsity 7 --out e2e") == 0
    local = see("local/eval.json")
    e2e = see("e2e/eval.json")
    assert e2e["l0"] < local["l0"]
    assert e2e["ce_increase"] < local["ce_increase"] - 0.1


@pytest.mark.parametrize("flags, tolerance", [
    ("--dtype bfloat16", 0.05),
    ("--compile", 1e-3),
])
def test_training_in_another_way(here, flags, tolerance):
    """In bfloat16 and compiled, a run is the same but for rounding."""
    torch._dynamo.reset()
    assert command(RUN + flags + " --out out") == 0
    for line, expected in zip(log_of("out"), log_of("whole"), strict=True):
        assert line == pytest.approx(expected, rel=tolerance)


@pytest.mark.skipif(not Path("/dev/nvidia0").exists(), reason="there is no GPU")
@pytest.mark.parametrize("loss", FACTORS)
@pytest.mark.parametrize("way, tolerance", [
    ("--dtype float32 --no-compile", 0.02),  # TF32 has ten bits after the point
    ("--dtype float32 --compile", 0.02),
    ("--dtype bfloat16 --no-compile", 0.05),
    ("--dtype bfloat16 --compile", 0.05),
])
def test_training_on_a_gpu(here, loss, way, tolerance):
    """On a GPU a run is the CPU's but for rounding, in both precisions, compiled and not."""
    line = RUN + f"--loss {loss} --init whole "
    assert command(line + "--out cpu") == 0
    line += f"--device cuda {way} --out gpu"
    environment = dict(os.environ)
    del environment["CUDA_VISIBLE_DEVICES"]  # set above, for this process
    arguments = [sys.executable, HERE / "e2e_sae.py"] + line.split()
    subprocess.run(arguments, env=environment, check=True)
    for line, expected in zip(log_of("gpu"), log_of("cpu"), strict=True):
        assert line == pytest.approx(expected, rel=tolerance)


def test_recipe(here):
    """Order of the text, warm-up, cosine, clipping and Adam, over more sequences than there are,
    the last batch beyond n_sequences, in micro-batches that do not divide the batch."""
    assert command(RUN + "--n-sequences 237 --sparsity 500 --seed 3 --lr 0.01 --loss local "
                   "--out out --micro-batch 3") == 0
    log = {line["step"]: line for line in log_of("out")}
    config = Config(model="stdlib", loss="local", layer=1, sparsity=500.0)
    gpt = GPT.from_pretrained("model")
    torch.manual_seed(3)
    sae = SAE(16, 40)
    adam = torch.optim.Adam(sae.parameters())
    rows = TRAIN[np.tile(np.random.default_rng(3).permutation(200), 2)]
    for step in range(1, 61):
        loss, _ = compute_loss(gpt, sae, rows[4 * step - 4 : 4 * step], config)
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(sae.parameters(), 10).item()
        done = min(4 * step, 237)
        cosine = np.cos(np.pi * (done - 11.85) / 225.15)  # warm-up is 237 / 20
        lr = 0.01 * min(done / 11.85, 0.55 + 0.45 * cosine)
        adam.param_groups[0]["lr"] = lr
        adam.step()
        adam.zero_grad()
        if step in log:
            expected = log[step] | {"loss": loss.item(), "lr": lr, "grad_norm": norm}
            assert log[step] == pytest.approx(expected, rel=1e-3)
    saved = checkpoint("out")
    assert saved["step"] == 60
    for name, weight in sae.state_dict().items():
        assert (weight - saved["sae"][name]).norm() < 1e-3 * weight.norm()


# ---- e2e_sae.py: several processes ---------------------------------------------------------------

DRIVER = '''
"""e2e_sae.py for torchrun, with an all_reduce as strict as NCCL's, and a signal from rank 1."""
import os, signal, threading
import torch.distributed as dist
import e2e_sae, gpt2

all_reduce, compute_loss = dist.all_reduce, e2e_sae.compute_loss
calls = 0

def strict_all_reduce(tensor, *args):
    if not tensor.is_contiguous():
        raise ValueError("Tensors must be contiguous")
    return all_reduce(tensor, *args)

def signal_torchrun():
    """Signal torchrun, and wait until it has passed the signal on."""
    passed_on = threading.Event()
    usual = signal.getsignal(signal.SIGTERM)
    def note(number, frame):
        usual(number, frame)
        passed_on.set()
    signal.signal(signal.SIGTERM, note)
    os.kill(os.getppid(), signal.SIGTERM)
    passed_on.wait(60)

def counted_loss(*args):
    global calls
    calls += 1
    if calls == 14 and os.environ["RANK"] == "1":
        if os.environ["TARGET"] == "worker":
            signal.raise_signal(signal.SIGTERM)
        if os.environ["TARGET"] == "torchrun":
            signal_torchrun()
    return compute_loss(*args)

dist.all_reduce, e2e_sae.compute_loss = strict_all_reduce, counted_loss
gpt2.run_command(e2e_sae.main)
'''


def torchrun(line, target=""):
    """Run a command in two processes. `target` gets a SIGTERM in step 14: worker or torchrun."""
    Path("driver.py").write_text(DRIVER)
    start = "-m torch.distributed.run --standalone --nproc-per-node=2 driver.py "
    environment = os.environ | {"PYTHONPATH": str(HERE), "TARGET": target}
    return subprocess.run([sys.executable] + (start + line).split(), env=environment,
                          capture_output=True, text=True, timeout=120)


def assert_equals_one_process(run):
    """Assert that a run has the log and the result of "one"."""
    log = log_of(run)
    expected = log_of("one")
    assert log[0]["loss"] == pytest.approx(expected[0]["loss"], rel=1e-6)
    for line, other in zip(log, expected, strict=True):
        assert line == pytest.approx(other, rel=1e-3)
    assert see(f"{run}/eval.json")["kl"] == pytest.approx(see("one/eval.json")["kl"], rel=1e-3)


@pytest.mark.parametrize("target", ["worker", "torchrun"])
def test_signal_to_two_processes(here, target):
    """Two processes, whose all_reduce is as strict as NCCL's, stop after the same step and save;
    continued by one process or by two, the run ends as one that was never stopped."""
    process = torchrun(ODD_RUN + "--checkpoint-minutes 9 --out two", target)
    assert process.returncode != 0
    assert "stopped after step 20" in process.stdout
    assert checkpoint("two")["step"] == 20
    if target == "worker":
        assert command("--resume two") == 0
    else:
        process = torchrun("--resume two")
        assert process.returncode == 0, process.stderr
    assert_equals_one_process("two")


def test_more_processes_than_sequences(here):
    """Two processes cannot share a batch of one sequence: one line says so, nothing is written."""
    process = torchrun(RUN + "--batch-size 1 --out out")
    (error,) = re.findall("^error: (.*)", process.stderr, re.MULTILINE)
    assert "--batch-size 1" in error
    assert process.returncode != 0
    assert not Path("out").exists()


@pytest.mark.parametrize("action", ["--evaluate", "--plot", "--compare", "--features"])
def test_views_under_torchrun(here, monkeypatch, action):
    """What only one process can do is refused under torchrun."""
    monkeypatch.setenv("WORLD_SIZE", "2")
    with refused(action, "torchrun"):
        e2e_sae.main([action, "whole"])


# ---- e2e_sae.py: runs that are killed, stopped, short of disk or not finite ----------------------

MOMENTS = [  # module, function, which of its calls
    (e2e_sae, "compute_loss", 7),
    (torch, "save", 1),
    (os, "replace", 1),
    (os, "replace", 2),
]


def test_killed_at_many_moments(here, monkeypatch):
    """A run that is killed again and again ends with the same files as one that is not."""
    line = RUN + f"--model {see('whole/config.json')['model']} --out out"  # the same cfg.json
    for module, name, nth in MOMENTS:
        with monkeypatch.context() as during:
            at_call(during, module, name, nth, kill_9)
            assert killed(partial(command, line))
        with open("out/log.jsonl", "a") as log:
            log.write('{"step": 1')  # as if killed within a line
        line = "--resume out"
    assert command(line) == 0
    assert log_of("out") == log_of("whole")
    assert sorted(os.listdir("out")) == sorted(os.listdir("whole"))
    for name in "eval.json", "sae_weights.safetensors", "cfg.json":
        assert Path("out", name).read_bytes() == Path("whole", name).read_bytes()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_signals(here, monkeypatch, number):
    """The first signal saves after the step, the second ends at once; handlers are restored."""
    usual = signal.signal(number, signal.default_int_handler)
    at_call(monkeypatch, e2e_sae, "compute_loss", 7, send, number)
    assert command(RUN + "--out out --checkpoint-minutes 9") == 128 + number
    assert log_of("out")[-1]["step"] == 7
    assert checkpoint("out")["step"] == 7

    at_call(monkeypatch, e2e_sae, "compute_loss", 2, send, number, signal.SIGINT)
    assert command("--resume out") == 130
    assert checkpoint("out")["step"] == 7

    assert command("--resume out") == 0
    log = [line for line in log_of("out") if line["step"] != 7]
    assert log == log_of("whole")
    assert see("out/eval.json") == see("whole/eval.json")
    assert signal.signal(number, usual) == signal.default_int_handler


def test_terminal_that_closes(here, monkeypatch):
    """A run whose terminal is closed saves before it ends."""
    def no_terminal(*words, **more):
        raise OSError(5, "Input/output error")
    at_call(monkeypatch, e2e_sae, "report", 2, setattr, e2e_sae, "print", no_terminal)
    killed(partial(command, RUN + "--out out --checkpoint-minutes 9"))
    assert checkpoint("out")["step"] == 10


def test_full_disk(here, monkeypatch, capsys):
    """A checkpoint that cannot be written leaves the one before as it was."""
    before = Path("stopped/checkpoint.pt").read_bytes()
    save = torch.save

    def save_to_full_disk(state, file):
        with open("/dev/full", "wb") as full:
            save(state, full)
    monkeypatch.setattr(torch, "save", save_to_full_disk)
    fails(capsys, "--resume stopped", "cannot write stopped/checkpoint.pt")
    assert Path("stopped/checkpoint.pt").read_bytes() == before
    assert not list(here.rglob("*.part"))


def test_loss_that_is_not_finite(here, monkeypatch, capsys):
    """A run that diverges stops, and its last checkpoint is untouched."""
    before = Path("stopped/checkpoint.pt").read_bytes()

    def not_finite(gpt, sae, tokens, config):
        loss, terms = compute_loss(gpt, sae, tokens, config)
        return loss * np.nan, terms
    monkeypatch.setattr(e2e_sae, "compute_loss", not_finite)
    fails(capsys, "--resume stopped", "step 20", "not finite", "--lr")
    assert Path("stopped/checkpoint.pt").read_bytes() == before


def test_run_in_use(here, monkeypatch, capsys):
    """Two processes cannot train in one folder, nor both begin a run there."""
    with gpt2.lock("stopped"):
        fails(capsys, "--resume stopped", "stopped is in use")
    at_call(monkeypatch, e2e_sae, "set_up", 1, shutil.copytree, "whole", "out")
    fails(capsys, RUN + "--sparsity 3 --out out", "--resume out")
    assert see("out/config.json") == see("whole/config.json")


def test_resume_with_another_text(here, capsys):
    """A text that has changed, be it of the same length, is refused: batches would differ."""
    shutil.copytree("text", "other")
    Path("other/train.bin").write_bytes(bytes(12_800))
    change_json(Path("stopped/config.json"), ["text"], str(here / "other"))
    fails(capsys, "--resume stopped", "other has changed")


def test_resume_without_its_log(here):
    """A log that is shorter than at the checkpoint is left as it is."""
    Path("stopped/log.jsonl").unlink()
    assert command("--resume stopped") == 0
    assert log_of("stopped") == [line for line in log_of("whole") if line["step"] > 14]


# Behind a colon: what the message contains, if not the mistake itself
MISTAKES = """
--layer 3
--layer -1
--layer 2 --loss e2e_ds
--loss foo
--loss finish: --init
--sparsity -1.0
--sparsity nan
--n-features 0
--context 1
--context 33
--batch-size 0
--seed -1
--n-eval 0
--dtype float16
--device tpu
--layer x
--unknown 1
--lay 1
stray
--model nowhere
--model gpt3: gpt2-xl or stdlib
--text nowhere: nowhere
--out whole: --resume whole
--out model/config.json/x: x
--init nowhere: nowhere
--init model: model has no cfg.json
--init stopped: --resume stopped
--features stopped: --resume stopped
--compare whole stopped: --resume stopped
--init whole --n-features 7
--init whole --layer 2: --layer 2: the SAE in whole
--resume nowhere: nowhere/config.json
--resume stopped --layer 2: has 1
--resume stopped --sparsity 3: has 1.5
--evaluate
--evaluate whole --resume whole: --resume
--evaluate whole nowhere: nowhere
--compare whole nowhere: nowhere
--plot stopped: eval.json
--features nowhere: nowhere
--features whole 40: 0 to 39
--features whole x: IDs
""".strip().splitlines()
DAMAGE = [  # an action, a file that it reads, and what becomes of it: bytes, or how much is left
    ("--resume stopped", "stopped/config.json", 40),
    ("--resume stopped", "stopped/checkpoint.pt", -1),
    ("--resume stopped", "stopped/checkpoint.pt", b"hello"),
    ("--evaluate whole", "whole/cfg.json", b"{}"),
    ("--evaluate whole", "whole/sae_weights.safetensors", -1),
    ("--plot whole", "whole/eval.json", 9),
    ("--evaluate x.pt", "x.pt", -1),
]


def contents(folder):
    """The files below a folder, and what is in them."""
    return {path: path.read_bytes() for path in folder.rglob("[!.]*") if path.is_file()}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_mistakes(here, capsys, mistake):
    """A mistake ends in one line that names it, and nothing is written."""
    line, _, word = mistake.partition(": ")
    words = [word] if word else line.split()[:2]
    if not re.match("--(resume|evaluate|features|plot|compare)", line):
        line = RUN + "--out out " + line
    before = contents(here)
    fails(capsys, line, *words)
    assert contents(here) == before
    assert not Path("out").exists()


@pytest.mark.parametrize("line, file, change", DAMAGE)
def test_damaged_files(here, capsys, line, file, change):
    """A damaged file ends in one line that names it or its folder, and stays as it is."""
    write_sae("x.pt")
    content = change if isinstance(change, bytes) else Path(file).read_bytes()[:change]
    Path(file).write_bytes(content)
    before = contents(here)
    fails(capsys, line, file.split("/")[0])
    assert contents(here) == before


# ---- e2e_sae.py: the views -----------------------------------------------------------------------

def test_effects_by_hand(gpt):
    """The effect of a feature is the slope of KL as all its activations shrink."""
    tokens = VAL[:6]
    sae = make_sae()
    clean, log_p = run(gpt, tokens)
    features, _ = sae_by_hand(weights_of(sae), clean[1])
    scale = torch.ones(40, dtype=torch.float64, requires_grad=True)
    _, log_q = run(gpt, tokens, 1, sae.decode(features * scale))
    (slope,) = torch.autograd.grad(kl_by_hand(log_p, log_q).sum(), scale)
    torch.testing.assert_close(e2e_sae.effects(gpt, sae, tokens, 1), -slope)


def test_removal_by_hand(gpt):
    """A feature is removed at one position of each sequence, and nowhere else."""
    tokens = VAL[:6]
    sae = make_sae()
    rows = torch.arange(6)
    clean, _ = run(gpt, tokens)
    features, x_hat = sae_by_hand(weights_of(sae), clean[1])
    pos = features[..., 7].argmax(1)
    removed = features.clone()
    removed[rows, pos, 7] = 0
    _, log_with = run(gpt, tokens, 1, x_hat)
    _, log_without = run(gpt, tokens, 1, sae.decode(removed))
    with_feature, without = e2e_sae.remove(gpt, sae, tokens, 1, 7, pos)
    torch.testing.assert_close(with_feature, log_with[rows, pos].exp())
    torch.testing.assert_close(without, log_without[rows, pos].exp())


# What a page may hold
PAGE_TAGS = set("html meta link title style h1 h2 p a pre i b br code div span".split())
PAGE_ATTRIBUTES = set("lang charset name content rel href id style".split())
HOSTILE = {  # tokens in the printable alphabet, and their ids
    "<script>alert(1)</script>": 1000,
    "</pre>": 1001,
    "<!--": 1002,
    "\"'&amp;": 1003,
    "\u0100\u011b[2J": 1004,  # ^@, Escape
    "\u00e2\u0124\u00a8": 1005,  # U+2028
}


def shown_text(tokens, tokenizer):
    """Tokens as the page writes them: signs for white space, escapes for what is not printable."""
    shown = ""
    for token in tokens.tolist():
        for char in tokenizer.decode_bytes([token]).decode(errors="backslashreplace"):
            escape = char.encode("unicode_escape").decode()
            shown += char if char.isprintable() else {"\n": "⏎", "\t": "⇥"}.get(char, escape)
    return shown


class Elements(html.parser.HTMLParser):
    """The elements of a page: (tag, attributes)."""
    def __init__(self, page):
        super().__init__()
        self.found = []
        self.feed(page)

    def handle_starttag(self, tag, attributes):
        self.found.append((tag, dict(attributes)))


@pytest.fixture
def page_sae(here):
    """An SAE in the folder a'<b> for a model that has hostile tokens."""
    vocab = see("model/vocab.json")
    kept = {token: i for token, i in vocab.items() if i not in HOSTILE.values()}
    Path("model/vocab.json").write_text(json.dumps(kept | HOSTILE))
    sae = make_sae().float()
    e2e_sae.save_sae(sae, "a'<b>", "model", 1, 32)
    return sae


def make_page(ids=""):
    """Make the page. Returns it, and the ids of its features in their order."""
    assert command(f"--features a'<b> {ids} --text text --n-eval 40") == 0
    page = Path("a'<b>/features.html").read_text()
    return page, [int(i) for i in re.findall('<h2 id="(.*?)">', page)]


def test_features_page_is_safe(page_sae):
    """No token of a text, and no folder's name, becomes markup; links lead to features."""
    page, shown = make_page()
    targets = {f"#{i}" for i in shown}
    for tag, attributes in Elements(page).found:
        assert tag in PAGE_TAGS
        assert attributes.keys() <= PAGE_ATTRIBUTES
        if tag == "a":
            assert attributes["href"] in targets
    assert "alert(1)" in page
    assert {c for c in page if not c.isprintable()} == {"\n"}


def test_features_page_shows_what_matters(page_sae):
    """Features come in the order of their effect, each with its strongest contexts."""
    page, shown = make_page()
    gpt = GPT.from_pretrained("model")
    tokens = VAL[::5]
    tokenizer = gpt2.load_tokenizer("model")
    effect = e2e_sae.effects(gpt, page_sae, tokens, 1)
    assert shown == effect.argsort(descending=True).tolist()
    features = page_sae.encode(e2e_sae.entering(gpt, tokens, 1))
    for i, section in zip(shown, page.split("<h2")[1:], strict=True):
        peak, pos = features[..., i].max(1)
        expected = []
        for row in peak.argsort(descending=True)[: peak.count_nonzero()]:
            window = slice(max(0, pos[row] - 24), pos[row] + 9)
            expected.append(shown_text(tokens[row, window], tokenizer))
        found = []
        for context in re.findall("<pre>(.*?)</pre>", section, re.DOTALL):
            found.append(html.unescape(re.sub("<.*?>", "", context)))
        assert found[:4] == expected[:4]
        assert set(found) <= set(expected)


def test_features_page_of_given_ids(page_sae):
    """The features asked for are shown, in that order, even one whose row of the dictionary is zero
    (it is near no element, not even itself)."""
    page_sae.W_dec.data[7] = 0
    e2e_sae.save_sae(page_sae, "a'<b>", "model", 1, 32)
    _, shown = make_page("7 3")
    assert shown == [7, 3]


def test_features_page_of_a_file(here):
    """The page of an SAE that is a file lies beside it."""
    write_sae("x.pt")
    assert command("--features x.pt 3 --model model --context 32 --text text --n-eval 8") == 0
    assert '<h2 id="3">' in Path("x.pt.html").read_text()


def alive_elements(name, seed, n_dead):
    """Write an SAE that shares 300 of its 500 elements with all others, and whose first n_dead are
    never active, the rest always. Return the rest, and their indices."""
    sae = make_sae(500, seed).float()
    sae.W_dec.data[:300] = make_sae(500).W_dec[:300]
    sae.b_enc.data.fill_(99)
    sae.b_enc.data[:n_dead] = -99
    e2e_sae.save_sae(sae, name, "model", 1, 32)
    return sae.dictionary[n_dead:].detach(), torch.arange(n_dead, 500)


def test_compare(here, capsys):
    """Each row compares the alive elements of two SAEs, or an SAE's with one another."""
    elements = {"a": alive_elements("a", 2, 100), "b": alive_elements("b", 3, 200)}
    assert command("--compare a b --text text --n-eval 50") == 0
    lines = capsys.readouterr().out.splitlines()[1:4]
    for line, pair in zip(lines, ["aa", "ab", "bb"], strict=True):
        rows, index = elements[pair[0]]
        other_rows, other_index = elements[pair[1]]
        cosines = rows @ other_rows.T
        if pair[0] == pair[1]:
            cosines.fill_diagonal_(-9)
        random = F.normalize(torch.randn(9, len(other_rows), 16), dim=-1)
        chance = (rows @ random.mT).amax(-1).mean()
        same = (other_index[cosines.argmax(1)] == index).float().mean()

        first, second, cosine, by_chance, share = line.replace("%", "").split()
        assert first + second == pair
        assert abs(float(cosine) - cosines.amax(1).mean()) < 6e-4
        assert abs(float(by_chance) - chance) < 0.01
        assert abs(float(share) - 100 * same) < 0.06


def test_table(here, capsys):
    """The table has the figures of eval.json; what is no finished run is said or left out."""
    Path("pareto.png").touch()
    assert command("--evaluate pareto.png stopped whole --n-eval 8 --init nowhere") == 1
    out, err = capsys.readouterr()
    assert "--resume stopped" in err
    row = out.splitlines()[1]
    assert row.startswith("whole ")
    numbers = [float(word) for word in row.replace(" of ", " ").split()[1:]]
    keys = "l0", "ce_increase", "kl", "alive", "n_features", "explained_variance"
    expected = [see("whole/eval.json")[key] for key in keys]
    assert numbers == pytest.approx(expected, abs=0.05)


def test_plot(here, capsys, monkeypatch):
    """The figure is written next to the runs; without matplotlib there is one line."""
    assert command("--plot whole whole") == 0
    assert Path("pareto.png").read_bytes().startswith(b"\x89PNG")
    capsys.readouterr()
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    fails(capsys, "--plot whole", "matplotlib")


def test_plot_at_equal_l0(here, capsys):
    """Of three sizes, two are compared at the middle of the L0 they share; the third is one run."""
    points = {
        "a": (64, 10, 1.0),
        "b": (64, 40, 0.25),
        "c": (256, 20, 0.4),
        "d": (256, 80, 0.1),
        "e": (512, 30, 0.1),
    }
    for name, (n_features, l0, ce_increase) in points.items():
        gpt2.write_json(f"{name}/config.json",
                        see("whole/config.json") | {"n_features": n_features})
        gpt2.write_json(f"{name}/eval.json", {"l0": l0, "ce_increase": ce_increase})
    assert command("--plot a b c d e") == 0
    # From 20 to 40, in logs the middle is 28.28; there CE increase times L0 is 10, and 8
    printed = capsys.readouterr().out
    assert "at L0 28.3" in printed
    assert "64 elements  e2e      seed 0: 0.354" in printed
    assert "256 elements  e2e      seed 0: 0.283" in printed
    assert "512 elements" not in printed
    change_json(Path("a/config.json"), ["layer"], 0)
    fails(capsys, "--plot a b", "model, layer and text")


# ---- data/concepts.py ----------------------------------------------------------------------------

SAMPLE = '''"""A módule."""
class Thing:
    def act(self, other=None):
        while other > 2:  # é
            self.total[LIMIT] = len({k: "v" for k in other})
'''
BY_HAND = {  # pieces of the text, in order
    "comment": ["# é"],
    "docstring": ['"""A módule."""'],
    "name being defined": ["Thing", "act"],
    "keyword": ["class", "def", "while", "for", "in"],
    "number": ["2"],
    "string": ['"v"'],
    "attribute after a dot": ["total"],
    "comparison": ["other > 2"],
    "self": ["self", "self"],
    "loop body": ['self.total[LIMIT] = len({k: "v" for k in other})'],
    "subscript": ["LIMIT"],
}


def test_concepts_by_hand():
    """A concept holds at the bytes of exactly these pieces of the text."""
    source = SAMPLE.encode()
    marks = concepts.concepts(SAMPLE)
    for concept, pieces in BY_HAND.items():
        edges = np.flatnonzero(np.diff(marks[concept].astype(int), prepend=0, append=0))
        found = [source[a:b].decode() for a, b in edges.reshape(-1, 2)]
        assert found == pieces, concept


def test_labels_of_tokens(here, monkeypatch, capsys):
    """A token has the concepts of its last byte; a file that does not parse is left out."""
    files = {"a": SAMPLE, "b": "def (:\n", "c": "y = 12\n"}

    def read_files(split):
        return files
    monkeypatch.setattr(concepts, "read_files", read_files)
    tokenizer = gpt2.load_tokenizer("stdlib")
    tokens, labels = concepts.labelled_tokens("stdlib")
    assert tokenizer.decode(tokens.tolist()) == f"{SAMPLE}<|endoftext|>y = 12\n<|endoftext|>"
    # The space in front belongs to the tokens, not to the names and numbers
    assert tokenizer.decode(tokens[labels["name being defined"]].tolist()) == " Thing act"
    assert tokenizer.decode(tokens[labels["number"]].tolist()) == " 2 12"

    concepts.print_concepts(["whole"])
    row = re.search(r"^number +(\S+)%", capsys.readouterr().out, re.MULTILINE)
    share = labels["number"][:64].mean()  # of the tokens in whole windows
    assert abs(float(row[1]) - 100 * share) < 0.06


def f1_by_hand(values, threshold, truth):
    """F1 of "active, and at least the threshold" as a prediction."""
    predicted = (values >= threshold) & (values > 0)
    return 2 * (predicted & truth).sum() / (predicted.sum() + truth.sum())


def test_best_features_by_brute_force():
    """For each concept, no feature and threshold do better on the first half of the text."""
    rng = np.random.default_rng(0)
    truth = rng.random((3, 60)) < 0.3
    x = torch.from_numpy(rng.integers(-6, 6, (60, 9))).float()  # with equal values
    bias = torch.full((9,), -1.0)
    f1, feature, threshold = concepts.best_features(torch.eye(9), bias, x, truth)
    features = (x - 1).relu().numpy()
    for c in range(3):
        known = truth[c, :30]
        best = 0
        for i in range(9):
            for value in features[:30, i]:
                best = max(best, f1_by_hand(features[:30, i], value, known))
        chosen = features[:, feature[c]]
        first = f1_by_hand(chosen[:30], threshold[c], known)
        second = f1_by_hand(chosen[30:], threshold[c], truth[c, 30:])
        assert first == pytest.approx(best)
        assert second == pytest.approx(f1[c])


# ---- README.md -----------------------------------------------------------------------------------

def test_snippet_in_readme(tmp_path, monkeypatch, capsys):
    """The snippet runs on the SAE that the quick start makes."""
    monkeypatch.chdir(tmp_path)
    e2e_sae.save_sae(SAE(128, 64), "out/stdlib-layer3-e2e", "stdlib", 3, 128)
    readme = (HERE / "README.md").read_text()
    exec(re.search("```python\n(.*?)```", readme, re.DOTALL)[1], {})
    kl, l0 = re.match(r"KL (\S+), L0 (\S+)", capsys.readouterr().out).groups()
    assert float(kl) > 0.1
    assert 0 < float(l0) < 64
