"""OpenWebText, the text of the paper: web pages that Reddit linked to, as GPT-2 tokens.

    python -m data.openwebtext                 # the first of 21 subsets: 430 million tokens
    python -m data.openwebtext --subsets 2     # the first two

A subset is a tar of .xz files, each of them a tar of .txt documents. This writes train.bin and
val.bin to data/openwebtext/: token ids as uint16, documents joined by end-of-text. e2e_sae.py does
the same when it first needs the text.
"""

import argparse
import io
import lzma
import os
import re
import sys
import tarfile
from itertools import chain, islice
from operator import attrgetter

import numpy as np

import gpt2
from gpt2 import download, ensure, load_tokenizer, lock, progress, reading, run_command, writing

REPO = "datasets/Skylion007/openwebtext/resolve/39d1a6d3f3a4c838b27bbc65bfb14a2f6f727740"
SHA256 = [  # of the first subsets; the server states those of the others
    "cba8c76f8a27ea1d0d1430cfed59a84dc812e29d0e999d10305bc49848cd7127",
    "83891be18f14e9e2e7c7e7604c67f8ac44571f71bec34a6d57fe76e4bfe77c4c",
]


def unpack(xz):
    """Yield the documents of one .xz file, given its bytes."""
    with tarfile.open(fileobj=io.BytesIO(lzma.decompress(xz))) as pages:
        for page in pages:
            if page.name.endswith(".txt"):
                text = pages.extractfile(page).read().decode("utf-8", errors="replace")
                yield re.sub(r"\n\n\n+", "\n\n", text).strip()  # as the data set's own loader


def documents(path):
    """Yield the documents of a subset: three or more newlines become two, the ends are stripped."""
    with reading(path), open(path, "rb") as file, tarfile.open(fileobj=file, mode="r:") as subset:
        size = os.path.getsize(path)
        for member in progress(subset, f"reading {path}", size, "bytes", attrgetter("size")):
            if member.name.endswith(".xz"):
                yield from unpack(subset.extractfile(member).read())
        file.seek(subset.offset)  # where tarfile stopped, without an error if a header is damaged
        ensure(file.read(512) == bytes(512), "it does not end as a tar ends")


def tokenize(paths, tokenizer, target):
    """Write train.bin and val.bin (the last documents: 0.5 % of the tokens, at most a million)."""
    texts = chain.from_iterable(map(documents, paths))
    starts = []  # of the documents, in tokens
    with writing(target / "train.bin") as train:
        while batch := list(islice(texts, 1000)):
            for ids in tokenizer.encode_ordinary_batch(batch, num_threads=os.cpu_count()):
                starts.append(train.tell() // 2)
                train.write(np.array(ids + [tokenizer.eot_token], dtype="<u2"))
        ensure(len(starts) > 1, f"{paths[0]} holds {len(starts)} documents, too few; replace it")
        total = train.tell() // 2 - 1  # end-of-text stands between documents, not at the end
        n_val = min(total // 200, 1_000_000)
        latest = max(starts[1], total - n_val)  # at least one document is for training
        start = max(start for start in starts if start <= latest)
        train.flush()
        with writing(target / "val.bin") as val:
            val.write(np.fromfile(train.name, dtype="<u2", offset=2 * start)[:-1])
        train.truncate(2 * (start - 1))
    print(f"{target}: {start - 1:,} tokens to train on, {total - start:,} held out; "
          "you may delete the .tar files", file=sys.stderr)


def prepare(subsets=1):
    """Make train.bin and val.bin from the first subsets, unless they exist; return their folder."""
    folder = gpt2.DATA / "openwebtext"
    train = folder / "train.bin"  # the last file to be written
    if not train.exists():
        tokenizer = load_tokenizer("gpt2")
        paths = []
        for i in range(subsets):
            path = folder / f"urlsf_subset{i:02}.tar"
            sha256 = SHA256[i] if i < len(SHA256) else None
            paths.append(download(f"{gpt2.HUB}/{REPO}/subsets/{path.name}", path, sha256))
        with lock(folder):
            if not train.exists():  # another process may have been faster
                tokenize(paths, tokenizer, folder)
    return folder


def main():
    """Read the command line and make the text."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], allow_abbrev=False)
    parser.add_argument("--subsets", type=int, default=1, choices=range(1, 22), metavar="N",
                        help="how many of the 21 subsets (default: 1); ignored if train.bin exists")
    prepare(parser.parse_args().subsets)


if __name__ == "__main__":
    run_command(main)
