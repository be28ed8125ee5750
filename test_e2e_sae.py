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

import e2e_sae
import gpt2
from data import concepts, load_tokens, openwebtext, run_command, stdlib
from e2e_sae import Config, KLLoss, SAE, compute_loss, evaluate
from gpt2 import GPT, GPTConfig, UserError

HERE = Path(gpt2.__file__).resolve().parent
STDLIB = HERE / "data" / "stdlib"
sha256 = lambda content: hashlib.sha256(content).hexdigest()
kill_9 = lambda *args: os.kill(os.getpid(), 9)


# ---- Shared by all tests -------------------------------------------------------------------------

def hf_model(n_layer=3, n_head=2, n_embd=16, n_positions=32, vocab_size=1024):
    """A random GPT-2 from transformers. Its parameters are multiples of 1/128, which half precision
    holds exactly, and whose mean over d_model is exact in float32."""
    torch.manual_seed(0)
    sizes = dict(n_layer=n_layer, n_head=n_head, n_embd=n_embd, n_positions=n_positions)
    model = GPT2LMHeadModel(GPT2Config(**sizes, vocab_size=vocab_size)).eval()
    for parameter in model.requires_grad_(False).parameters():
        parameter += torch.randn_like(parameter) / 10
        parameter.copy_((128 * parameter).round() / 128)
    return model


def write_model(model, folder, prefix="", dtype=torch.float32):
    """Write a model in the form of openai-community/gpt2, with the embedded model's vocabulary."""
    folder.mkdir(parents=True, exist_ok=True)
    state = model.transformer.state_dict() | {  # old files contain the causal mask
        "h.0.attn.bias": torch.ones(1, 1, 4, 4), "h.0.attn.masked_bias": torch.tensor(-1e4)}
    tensors = {prefix + name: tensor.to(dtype).contiguous() for name, tensor in state.items()}
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    (folder / "config.json").write_text(model.config.to_json_string())
    (folder / "vocab.json").write_bytes((STDLIB / "vocab.json").read_bytes())
    return folder


@pytest.fixture(scope="session")
def tiny(tmp_path_factory):
    """The folder of a model so small that a training run takes a second."""
    return write_model(hf_model(), tmp_path_factory.mktemp("models") / "tiny")


def error_of(call, *words):
    """Assert that call() raises a UserError of one line that contains these words."""
    with pytest.raises(UserError) as caught:
        call()
    message = str(caught.value)
    assert "\n" not in message and all(str(word) in message for word in words), message


def killed(call):
    """Run call() in another process. Returns whether kill_9 ended it."""
    process = multiprocessing.get_context("fork").Process(target=call)
    process.start()
    process.join(60)
    return process.exitcode == -9


# ---- gpt2.py: the model, its tokenizer and its files ---------------------------------------------

@pytest.mark.parametrize("sizes, prefix, stored", [
    ((2, 2, 16, 32), "", torch.float32), ((3, 4, 32, 64), "transformer.", torch.float16),
    ((1, 1, 8, 16), "", torch.bfloat16)])
def test_logits_equal_transformers(tmp_path, sizes, prefix, stored):
    model = hf_model(*sizes, vocab_size=101)
    gpt = GPT.from_pretrained(write_model(model, tmp_path, prefix, stored))
    assert {(p.dtype, p.requires_grad) for p in gpt.parameters()} == {(torch.float32, False)}
    for dtype, bound in (torch.float32, 1e-4), (torch.float64, 1e-9):
        gpt, model = gpt.to(dtype), model.to(dtype)
        for length in 1, 7, sizes[-1]:
            tokens = torch.randint(0, 101, (2, length))
            assert (gpt(tokens) - model(tokens).logits).abs().max() < bound
    x = gpt.embed(tokens)
    for block in gpt.h:
        x = block(x)
        assert x.mean(-1).abs().max() < 1e-12 < x.std()  # zero mean over d_model


def compare_with_transformers(folder, texts):
    """Assert that transformers opens a folder and agrees on tokens and logits. Returns the loss."""
    gpt, tokenizer = GPT.from_pretrained(folder), gpt2.load_tokenizer(folder)
    model = GPT2LMHeadModel.from_pretrained(folder).float().requires_grad_(False)
    oracle, ids = AutoTokenizer.from_pretrained(folder), tokenizer.encode_ordinary_batch(texts)
    assert ids == [oracle.encode(text) for text in texts]
    assert tokenizer.decode_batch(ids) == texts and tokenizer.eot_token == oracle.eos_token_id
    windows = torch.tensor(sum(ids, [])).unfold(0, gpt.config.n_positions, gpt.config.n_positions)
    windows = windows[:: len(windows) // 60]
    logits = gpt(windows)
    assert (logits - model(windows).logits).abs().max() < 1e-3
    return F.cross_entropy(logits[:, :-1].flatten(0, 1), windows[:, 1:].flatten())


def test_embedded_model():
    odd = ["", " ", "\n\n  \t x", "naïve café 東京 🐍 \u00a0\u2028", "a'll 'S 12345 ½ ² x_y's",
           "".join(map(chr, range(256))), "    def f(x):\n\t  pass\n"]
    assert compare_with_transformers(STDLIB, [*stdlib.read_files("val").values()][:40] + odd) < 3


WRONG = [("config.json", change) for change in (
    b"", b"[]", b"{", b"\xff", b"[" * 10**5, {"n_layer": 2}, {"n_embd": 10**5}, {"n_head": 3},
    {"vocab_size": 10**6}, {"activation_function": "relu"}, {"layer_norm_epsilon": None},
    *({size: value} for size in ("n_layer", "n_head", "n_embd", "n_positions", "vocab_size")
      for value in (None, "x", [1], 10**30, float("inf"))))]
WRONG += [("vocab.json", change) for change in (
    b"", b"{}", {"!": "0"}, {"!": -1}, {"\u20ac": 0}, {"<|endoftext|>": 1024}, {"!": None})]
WRONG += [("model.safetensors", {name: tensor}) for name, tensor in {
    "h.1.ln_2.bias": None, "h.1.more": torch.ones(2), "wpe.weight": torch.ones(31, 16),
    "h.1.attn.c_attn.weight": torch.ones(48, 16), "ln_f.weight": torch.ones(1, 16)}.items()]


@pytest.mark.parametrize("file, change", WRONG, ids=str)
def test_wrong_files(tmp_path, file, change):
    """`change` replaces the content, or entries of it; None deletes an entry."""
    path, tensors = write_model(hf_model(), tmp_path) / file, file == "model.safetensors"
    words = [tmp_path, *(change if tensors else [])]  # a wrong tensor is named
    if isinstance(change, dict):
        content = (load_file(path) if tensors else json.loads(path.read_text())) | change
        content = {name: value for name, value in content.items() if value is not None}
        change = save(content) if tensors else json.dumps(content).encode()
    path.write_bytes(change)
    error_of(lambda: (GPT.from_pretrained(tmp_path), gpt2.load_tokenizer(tmp_path)), *words)


def test_mutated_weights(tmp_path):
    path = write_model(hf_model(1, 1, 2, 2, 2), tmp_path) / "model.safetensors"
    whole, random, seen = path.read_bytes(), np.random.default_rng(0), []
    start = 8 + int.from_bytes(whole[:8], "little")
    odd = [None, True, -1, 0, 2**31, 2**62, 2**64, 0.5, "", "F32", "BF16", "I64", [], [2], [-1],
           [0, 2**62, 4], {}, [[]], [4, 0], [0, 10**9]]
    for i in range(200):
        flipped, header = bytearray(whole), json.loads(whole[8:start])
        at = random.integers((8, 60, start, len(whole))[i % 4])
        flipped[at] ^= 1 << random.integers(8)
        place = ("dtype", "shape", "data_offsets")[i % 3]
        header[random.choice([*header])][place] = odd[random.integers(len(odd))]
        head = json.dumps(header).encode()
        other_header = len(head).to_bytes(8, "little") + head + whole[start:]
        for content in whole[:at], flipped, other_header:
            path.write_bytes(content)
            try:
                seen.append(type(GPT.from_pretrained(tmp_path)))
            except UserError as error:
                seen.append(len(str(error).splitlines()))
    assert set(seen) == {GPT, 1} and seen.count(1) > 400 and seen.count(GPT) > 10


# ---- gpt2.py: downloads, from a server on 127.0.0.1 ----------------------------------------------

BODY, CHUNK = np.random.default_rng(0).bytes(1_500_000), 2**18
N, OTHER = len(BODY), BODY[:-1] + b"?"
GPT2 = "/openai-community/gpt2/resolve/607a30d783dfa663caf39e06633721c8d4cfcd7e/"
SUBSET = ("/datasets/Skylion007/openwebtext/resolve/39d1a6d3f3a4c838b27bbc65bfb14a2f6f727740/"
          "subsets/urlsf_subset00.tar")


class Answer(BaseHTTPRequestHandler):
    """The hub's `resolve`. A fault, for one request: body, status (200: ignore Range), cut (break
    the connection after so many bytes), hold (pause there until the test is over)."""
    log_message = lambda *args: None

    def do_GET(self):
        hub, path = self.server, self.path.removeprefix("/cdn")
        body, headers, rest, fault = hub.files[path], {}, b"", {}
        if path == self.path and not path.endswith(".json"):  # large files are stored elsewhere
            status, headers = 302, {"Location": "/cdn" + path, "X-Linked-Etag": f'"{sha256(body)}"'}
        else:
            fault = hub.faults.pop(0) if hub.faults else {}
            body, first = fault.get("body", body), int(self.headers["Range"][6:-1])
            hub.ranges.append(first)
            status = fault.get("status", 206 if first < len(body) else 416)
            rest = {206: body[first:], 200: body}.get(status, b"")
        now = rest[: fault.get("cut")]
        hub.sent += len(now)
        self.send_response(status)
        for name, value in {"Content-Length": len(rest), **headers}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(now)
        if "hold" in fault:
            hub.over.wait(60)


@pytest.fixture
def hub(tmp_path, tiny, monkeypatch):
    """The server. tiny's files stand for GPT-2's, data/ is empty, tries follow without a pause."""
    patch = monkeypatch.setattr
    with ThreadingHTTPServer(("127.0.0.1", 0), Answer) as hub:
        hub.files = {"/file": BODY, SUBSET: SUBSET_TAR}
        hub.files |= {GPT2 + file.name: file.read_bytes() for file in tiny.iterdir()}
        hub.faults, hub.ranges, hub.sent, hub.over = [], [], 0, threading.Event()
        patch(gpt2, "SHA256", {name: sha256(hub.files[GPT2 + name]) for name in gpt2.SHA256})
        patch(openwebtext, "SHA256", [sha256(SUBSET_TAR)])
        patch(gpt2, "DATA", tmp_path / "data")
        patch(gpt2, "HUB", f"http://127.0.0.1:{hub.server_port}")
        patch(gpt2.time, "sleep", lambda seconds: None)
        monkeypatch.setenv("NO_PROXY", "127.0.0.1")
        threading.Thread(target=hub.serve_forever, args=(0.01,), daemon=True).start()
        yield hub
        hub.over.set()
        hub.shutdown()


@pytest.mark.parametrize("part, faults, sent", [
    *((0, [{"cut": cut}], N + CHUNK) for cut in (0, 1, CHUNK, CHUNK + 1, N - 1)),
    (0, [{"status": 503}] * 3 + [{"cut": 500_000}] * 2 + [{"status": 429}] * 3, N + 2 * CHUNK),
    (0, [{"status": 200, "cut": 2**20}, {"status": 200}], N + 2**20),
    (0, [{"hold": 1, "cut": 600_000}], N + CHUNK),
    (1000, [], N - 1000), (N, [], 0)], ids=str)
def test_download_survives(hub, tmp_path, monkeypatch, part, faults, sent):
    path, beside, get = tmp_path / "file", tmp_path / "file.part", requests.get
    hub.faults, hurry = list(faults), 100 if "hold" in str(faults) else 1
    monkeypatch.setattr(requests, "get", lambda url, timeout, **given: get(
        url, timeout=tuple(seconds / hurry for seconds in timeout), **given))
    beside.write_bytes(BODY[:part])
    assert gpt2.download(gpt2.HUB + "/file", path) == path and path.read_bytes() == BODY
    assert not hub.faults and not beside.exists() and hub.sent <= sent


@pytest.mark.parametrize("part, faults, words", [
    (b"", [{"status": 404}] * 50, ["404", "--model stdlib"]),
    (b"", [{"cut": 0}] * 50, ["--model stdlib"]),
    (b"", [{"status": 200, "cut": cut} for cut in (2**20, 2**19)] * 50, ["--model stdlib"]),
    (b"", [{"body": OTHER}], [sha256(BODY)]), (OTHER, [], [sha256(OTHER)])],
    ids=["404", "cut", "no Range", "wrong answer", "wrong part"])
def test_download_gives_up(hub, tmp_path, part, faults, words):
    hub.faults, path = list(faults), tmp_path / "file"
    fetch = lambda: gpt2.download(gpt2.HUB + "/file", path)
    Path(f"{path}.part").write_bytes(part)
    error_of(fetch, gpt2.HUB + "/file", *words)
    assert not path.exists() and len(hub.ranges) < 10
    hub.faults.clear()
    assert fetch().read_bytes() == BODY


def test_download_killed_then_resumed_by_two(hub, tmp_path, monkeypatch):
    path, barrier, lock = tmp_path / "file", threading.Barrier(2, timeout=30), gpt2.lock
    fetch = lambda *args: gpt2.download(gpt2.HUB + "/file", path)
    with monkeypatch.context() as during:
        during.setattr(gpt2, "progress", lambda chunks, *args: (
            chunk if i < 3 else kill_9() for i, chunk in enumerate(chunks)))
        assert killed(fetch) and not path.exists()
    monkeypatch.setattr(gpt2, "lock", lambda *args: (barrier.wait(), lock(*args))[1])
    with ThreadPoolExecutor(2) as pool:  # a lock excludes threads as it excludes processes
        assert [file.read_bytes() for file in pool.map(fetch, "ab")] == [BODY] * 2
    assert hub.ranges[0] == 0 and hub.ranges[1] >= 2 * CHUNK and len(hub.ranges) == 2
    with lock(tmp_path):
        error_of(lambda: lock(tmp_path, wait=False), tmp_path, "in use")


def test_model_from_the_hub(hub, tiny, monkeypatch):
    for name in "vocab.json", "model.safetensors":  # the second file fetched is wrong
        hub.faults = [{}, {"body": b"?"}]
        error_of(lambda: GPT.from_pretrained("gpt2"), GPT2 + name, gpt2.SHA256[name])
    gpt, tokens = GPT.from_pretrained("gpt2"), torch.arange(20).view(2, 10)
    assert torch.equal(gpt(tokens), GPT.from_pretrained(tiny)(tokens))
    monkeypatch.setattr(gpt2, "HUB", "http://127.0.0.1:1")  # no server is there
    path = gpt2.DATA / "gpt2-xl" / "config.json"
    error_of(lambda: GPT.from_pretrained("gpt2-xl"), gpt2.HUB, path, "--model stdlib")
    error_of(lambda: GPT.from_pretrained("gpt3"), "gpt3", "stdlib")


# ---- data: OpenWebText and the standard library --------------------------------------------------

def tar(files, damage=lambda xz: xz):
    """A tar of {name: text}. In place of a text: the files of a tar inside, compressed."""
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w") as archive:
        for name, text in files.items():
            raw = text.encode() if isinstance(text, str) else damage(lzma.compress(tar(text)))
            member = tarfile.TarInfo(name)
            member.size = len(raw)
            archive.addfile(member, io.BytesIO(raw))
    return file.getvalue()


PROSE = "In the beginning there was the thin winter, 1984; they're her brother's naïve 東京 ☃.\n"
DOCUMENTS = {
    "one.xz": {"1.txt": PROSE * 9, "2.txt": " \n a\n\nb\n\n\nc\n\n\n\n\n\t<|endoftext|> \t\n"},
    "../evil.xz": {"../../evil.txt": "evil", "/tmp/evil.txt": PROSE, "evil.md": "no document"},
    "three.xz": {"5.txt": PROSE * 4, "6.txt": "the third " * 20},
    "many.xz": {f"{i}.txt": f"the {i}" for i in range(2500)}}
SUBSET_TAR = tar({"README": "not an .xz"} | DOCUMENTS)
TEXTS = [re.sub("\n{3,}", "\n\n", text).strip() for pages in DOCUMENTS.values()
         for name, text in pages.items() if name.endswith(".txt")]


def expected_bins(texts):
    """[train, val]: val has the last documents with 0.5 % of the tokens; train has at least one."""
    oracle = AutoTokenizer.from_pretrained(STDLIB)
    ids = [oracle.encode(text, split_special_tokens=True) for text in texts]
    join = lambda documents: [token for ids in documents for token in (*ids, 1023)][:-1]
    least, most = len(join(ids)) // 200, len(ids) - 1
    n = next((n for n in range(1, most) if len(join(ids[-n:])) >= least), most)
    return [join(ids[:-n]), join(ids[-n:])]


@pytest.mark.parametrize("module, name, nth", [
    (os, "replace", 0), (gpt2.tiktoken.Encoding, "encode_ordinary_batch", 2),
    *((os, "replace", nth) for nth in range(1, 5))])
def test_openwebtext(hub, tmp_path, monkeypatch, module, name, nth):
    """A first process is killed at the nth call of a function; 0: there is no first process."""
    read = lambda: [load_tokens("gpt2", split).tolist() for split in ("train", "val")]
    folder, real, calls = tmp_path / "data/openwebtext", getattr(module, name), iter(range(1, 99))
    with monkeypatch.context() as during:
        during.setattr(module, name, lambda *args, **more: (
            kill_9() if next(calls) == nth else real(*args, **more)))
        assert nth == 0 or killed(read) and not (folder / "train.bin").exists()
    assert read() == expected_bins(TEXTS)
    assert not list(tmp_path.parent.rglob("*evil*")) and not Path("/tmp/evil.txt").exists()
    hub.files.clear()
    (folder / "urlsf_subset00.tar").unlink()
    assert read() == expected_bins(TEXTS)  # needs neither the network nor the tar


@pytest.mark.parametrize("texts", [
    ["", "the end"], ["b" * 900, ""], ["", "", "b" * 900], ["the " * 300 + "x", "in", "a", "b"]])
def test_odd_documents(tmp_path, texts):
    (tmp_path / "tar").write_bytes(tar({"a.xz": {f"{i}.txt": t for i, t in enumerate(texts)}}))
    openwebtext.tokenize([tmp_path / "tar"], gpt2.load_tokenizer("stdlib"), tmp_path)
    bins = [np.fromfile(tmp_path / name, "<u2").tolist() for name in ("train.bin", "val.bin")]
    assert bins == expected_bins(texts)


def test_damaged_subset(tmp_path):
    path, refused, third = tmp_path / "tar", 0, {"three.xz": DOCUMENTS["three.xz"]}
    flips = [tar(third, lambda xz: xz[:at] + bytes([xz[at] ^ 4]) + xz[at + 1 :])
             for at in range(0, 200, 3)]
    cuts = [SUBSET_TAR[:end] for end in range(0, len(SUBSET_TAR.rstrip(b"\0")), 512)]
    for content in flips + cuts:
        path.write_bytes(content)
        try:  # a flip in the index behind the data does no harm
            assert list(openwebtext.documents(path)) == TEXTS[4:6]
        except UserError as error:
            refused += str(path) in str(error) and "\n" not in str(error)
    assert refused > 60 + len(cuts)


def test_text_of_the_standard_library(tmp_path, monkeypatch):
    train, val = stdlib.read_files("train"), stdlib.read_files("val")
    source = Path(os.__file__).with_name("argparse.py").read_text()
    assert train["argparse.py"] == source and len(val) > len(train) / 20
    assert all(sha256(name.encode()) < "1a" for name in val)  # a tenth, in any version of Python
    assert all(sha256(name.encode()) >= "1a" and "/test" not in name for name in train)
    tokens, tokenizer = load_tokens("stdlib", "val"), gpt2.load_tokenizer("stdlib")
    assert tokens.dtype == np.uint16
    assert tokenizer.decode(tokens.tolist()) == "<|endoftext|>".join(val.values())
    monkeypatch.setattr("sysconfig.get_paths", lambda: {"stdlib": str(tmp_path)})
    error_of(lambda: stdlib.read_files("train"), tmp_path)


def test_recipe_of_the_embedded_model(tmp_path, monkeypatch):
    # "ab" occurs 5 times. Then a+ab and a+a occur twice each, and the greater bytes win.
    assert stdlib.train_bpe(["aaab aaab", "ab;ab;ab"], 259) == [(b"a", b"b"), (b"a", b"ab")]
    source = stdlib.read_files("train")["argparse.py"]
    monkeypatch.setattr(stdlib, "read_files", lambda split: {"argparse.py": source})
    monkeypatch.setattr(stdlib, "SIZES", GPTConfig(2, 2, 32, 16, 1024))
    stdlib.make(tmp_path, 150)
    assert compare_with_transformers(tmp_path, [source]) < 5.5  # untrained: log(1024) = 6.9


os.environ["CUDA_VISIBLE_DEVICES"] = ""  # the CPU everywhere; with a GPU, processes must not fork
torch.set_num_threads(1)
TEXT = {split: np.random.default_rng(i).integers(0, 1024, 6400).astype(np.uint16)
        for i, split in enumerate(("train", "val"))}  # in place of the standard library
TRAIN, VAL = (torch.from_numpy(text.astype(np.int64)).view(200, 32) for text in TEXT.values())
FACTORS = {"local": {"mse": 1}, "e2e": {"kl": 1}, "e2e_ds": {"kl": 0.5, "downstream": 1.3},
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
    features = (x @ W_e.T + b_e).clamp(min=0)
    return features, features @ (W_d / W_d.square().sum(0).sqrt()).T + b_d


def make_sae(n_features=40, seed=1):
    """A random SAE in float64 whose decoder has columns of any length."""
    torch.manual_seed(seed)
    sae = SAE(16, n_features).double()
    sae.decoder.weight.data *= torch.rand(n_features) + 0.5
    return sae


@pytest.fixture
def gpt(tiny):
    return GPT.from_pretrained(tiny).double()


@pytest.mark.parametrize("share", [0.4, 0.03, 0])
@pytest.mark.parametrize("loss, layer", [
    (loss, layer) for loss in FACTORS for layer in range(3 - (loss == "e2e_ds"))])
def test_losses_by_hand(gpt, monkeypatch, loss, layer, share):
    """`share`: how many features are active. With few of them the sparse path is used."""
    (clean, log_p), sae, sparse, mm = run(gpt, VAL[:4]), make_sae(), [], torch.sparse.mm
    monkeypatch.setattr(torch.sparse, "mm", lambda *args: sparse.append(1) or mm(*args))
    sae.encoder.bias.data -= sae.encoder(clean[layer]).detach().quantile(1 - share) + 1e-3
    weights = [p.detach().clone().requires_grad_() for p in sae.parameters()]
    features, x_hat = sae_by_hand(weights, clean[layer])
    spliced, log_q = run(gpt, VAL[:4], layer, lambda x: x_hat)
    squares = [((s - c) ** 2).mean() for s, c in zip(spliced, clean)]
    hand = {"l0": (features > 0).sum() / 128, "sparsity": features.sum() / 128 / 16,
            "mse": squares[layer], "kl": kl_by_hand(log_p, log_q).mean(),
            "downstream": sum(squares[layer + 1 : 3]) / max(1, 2 - layer)}
    factors = FACTORS[loss] if loss != "finish" else {
        "mse": 0.5, "kl": (hand["mse"] / hand["kl"]).item() / 2}
    hand["loss"] = sum(f * hand[term] for term, f in (factors | {"sparsity": 0.7}).items())
    hand["loss"].backward()
    if loss == "local":
        gpt.h, gpt.ln_f = gpt.h[:layer], None  # it runs nothing from `layer` on
    config = Config(loss=loss, layer=layer, sparsity=0.7, downstream=1.3)
    total, terms = compute_loss(gpt, sae, VAL[:4], config)
    total.backward()
    assert terms.keys() == {"l0", "sparsity", *FACTORS[loss]} and bool(sparse) == (share < 0.05)
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
    gpt, config = GPT.from_pretrained(tiny), Config(loss=loss, layer=1)
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


def write_sae(kind):
    """Write an SAE as the file or folder `kind`. Returns its weights."""
    sae = make_sae().float()
    W_e, b_e, W_d, b_d = weights = [p.detach() for p in sae.parameters()]
    if kind == "x.pt":  # as the paper's
        torch.save({f"blocks-1-hook_resid_pre.{name.replace('encoder', 'encoder.0')}": weight
                    for name, weight in sae.state_dict().items()}, kind)
        return weights
    sae.save(kind, "model", 1, 32)
    if kind == "saelens":  # rows may have any length there: divide the features by it
        norms = W_d.norm(dim=0)
        tensors = {"W_enc": (W_e.T / norms).contiguous(), "b_enc": b_e / norms,
                   "W_dec": W_d.T.contiguous(), "b_dec": b_d}
        save_file(tensors, "saelens/sae_weights.safetensors")
    return weights


def test_evaluation_by_hand(gpt):
    (clean, log_p), sae, tokens, layer = run(gpt, VAL[:100]), make_sae(), VAL[:100], 1
    sae.encoder.bias.data[:5] = -99
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

RUN = ("--model model --layer 1 --context 32 --n-features 40 --n-sequences 160 --batch-size 4 "
       "--lr 0.002 --n-eval 8 --checkpoint-minutes 0 ")
REAL_TEXT = stdlib.load_tokens
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
        patch.setattr(stdlib, "load_tokens", lambda tokenizer, split: TEXT[split])
        assert command(RUN + "--out whole") == 0
        at_call(patch, e2e_sae, "compute_loss", 14, send(signal.SIGTERM))
        assert command(RUN + "--out stopped") == 143
    return folder


@pytest.fixture
def here(runs, tmp_path, monkeypatch):
    monkeypatch.setattr(stdlib, "load_tokens", lambda tokenizer, split: TEXT[split])
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
    assert first.keys() == {"step", "loss", "l0", "sparsity", *FACTORS[loss], "lr", "grad_norm"}
    assert last["loss"] < 0.8 * first["loss"]
    found = evaluate(GPT.from_pretrained("model"), SAE.load("out"), VAL[::25], 1)  # spread evenly
    assert see("out/eval.json") == found


@pytest.mark.parametrize("micro_batch", [4, 3, 1])
def test_recipe(here, micro_batch):
    """Order of the text, warm-up, cosine, clipping and Adam, over more sequences than there are."""
    assert command(RUN + "--n-sequences 240 --sparsity 500 --seed 3 --lr 0.01 --loss local "
                   f"--out out --micro-batch {micro_batch}") == 0
    config, gpt = Config(loss="local", layer=1, sparsity=500), GPT.from_pretrained("model")
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
    sae, (features, x_hat) = SAE.load(kind), sae_by_hand(weights, x)
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
                "neuronpedia_id": None}}
    stop = send(signal.SIGINT, signal.SIGINT)
    monkeypatch.setattr(e2e_sae, "compute_loss", lambda gpt, sae, *more: (
        states.append(str(sae.state_dict())), stop(None)))
    assert command(RUN + f"--loss finish --init {kind} --out out") == 130
    assert command("--resume out") == 130 and states == [str(sae.state_dict())] * 2


def test_two_processes_equal_one(here, monkeypatch):
    """By torchrun, with a batch that does not divide evenly and a single held-out sequence."""
    monkeypatch.setattr(stdlib, "load_tokens", REAL_TEXT)
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
    assert log_of("out")[-1]["step"] == checkpoint("out")["done"][0] == 7
    at_call(monkeypatch, e2e_sae, "compute_loss", 2, send(number, number))
    assert command("--resume out") == 130 and checkpoint("out")["done"][0] == 7  # at once
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
    directions = (weights[2] / weights[2].norm(dim=0)).T
    log_q = lambda f: run(gpt, tokens, layer, lambda x: f @ directions + weights[3])[1]
    effect, fired = e2e_sae.effects(gpt, sae, tokens, layer)
    assert torch.equal(fired, (features > 0).sum((0, 1)))
    for i, one in enumerate(torch.eye(40)[:9]):
        more, less = (kl_by_hand(log_p, log_q(features * (1 + s * one))) for s in (step, -step))
        assert (less - more).sum() == pytest.approx(2 * step * effect[i].item(), rel=1e-3)
    i, k = effect.argmax().item(), torch.arange(6)
    pos, removed = features[..., i].argmax(1), features.clone()
    removed[k, pos, i] = 0
    expected = torch.stack([log_q(f)[k, pos].exp() for f in (features, removed)])
    assert (e2e_sae.remove(gpt, sae, tokens, layer, i, pos) - expected).abs().max() < 1e-6


@pytest.mark.parametrize("ids", ["", "7 3"])
def test_features_page(here, ids):
    hostile = {"<script>alert(1)</script>": 1000, "</pre>": 1001, "<!--": 1002, "\"'&amp;": 1003,
               "\u0100\u011b[2J": 1004, "\u00e2\u0124\u00a8": 1005}  # ^@, Escape, U+2028
    vocab = {token: i for token, i in see("model/vocab.json").items() if i not in hostile.values()}
    Path("model/vocab.json").write_text(json.dumps(vocab | hostile))
    sae, elements, parser = make_sae().float(), [], html.parser.HTMLParser()
    sae.save("a'<b>", "model", 1, 32)
    assert command(f"--features a'<b> {ids} --n-eval 40") == 0
    page = Path("a'<b>/features.html").read_text()
    parser.handle_starttag = lambda tag, attributes: elements.append((tag, dict(attributes)))
    parser.feed(page)
    used = {name for element in elements for name in (element[0], *element[1])}
    assert used <= {*"html lang meta charset link rel href title style h1 p h2 id a pre i b br "
                    "code".split()} and (ids or "alert(1)" in page)
    shown = [int(attributes["id"]) for tag, attributes in elements if tag == "h2"]
    links = {attributes["href"] for tag, attributes in elements if tag == "a"}
    assert links <= {f"#{i}" for i in shown} and (ids or len(links) > 20)
    gpt, rows, tokenizer = GPT.from_pretrained("model"), VAL[::5], gpt2.load_tokenizer("model")
    text = lambda i: repr(tokenizer.decode_bytes([i]).decode(errors="backslashreplace"))[1:-1]
    effect, _ = e2e_sae.effects(gpt, sae, rows, 1)
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
        sae.encoder.bias.data[:100] -= 99 * seed  # dead elements do not count
        sae.save(name, "model", 1, 32)
        alive = (sae.encode(x) > 0).any(0).any(0).nonzero()[:, 0]
        rows[name] = F.normalize(sae.decoder.weight.detach().T[alive]), alive
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
    SAE(128, 64).save("out/stdlib-layer3-e2e", "stdlib", 3, 128)  # where the quick start puts it
    exec(re.search("```python\n(.*?)```", (HERE / "README.md").read_text(), re.S)[1], {})
    kl, l0 = re.match(r"KL (\S+), L0 (\S+)", capsys.readouterr().out).groups()
    assert float(kl) > 0.1 and 0 < float(l0) < 64


def test_files_stay_small():
    for name, most in ("e2e_sae.py", 680), ("gpt2.py", 310):
        assert len((HERE / name).read_text().splitlines()) <= most, name
