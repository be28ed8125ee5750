"""OpenWebText: web pages that Reddit linked to, the paper's text, as GPT-2 tokens.

    python -m data.openwebtext                 # the first of 21 subsets: 430 million tokens
    python -m data.openwebtext --subsets 2     # two of them

A subset is a tar of .xz files, each of them a tar of .txt documents. They are read in memory, one
after the other; nothing is unpacked to disk. Out come train.bin and val.bin in data/openwebtext/:
token ids as uint16, documents joined by end-of-text, the last of them in val.bin. e2e_sae.py does
this by itself when it first needs the text.
"""

import lzma
import os
import re
import sys
import tarfile
from concurrent.futures import ThreadPoolExecutor
from itertools import chain, islice

import numpy as np

import gpt2
from gpt2 import Parser, Progress, UserError

REPO = "datasets/Skylion007/openwebtext", "39d1a6d3f3a4c838b27bbc65bfb14a2f6f727740"
SHA256 = [  # of the subsets that are known beforehand
    "cba8c76f8a27ea1d0d1430cfed59a84dc812e29d0e999d10305bc49848cd7127",
    "83891be18f14e9e2e7c7e7604c67f8ac44571f71bec34a6d57fe76e4bfe77c4c",
]
SUBSETS = 21


def folder():
    """Where the subsets and the tokens are."""
    return gpt2.DATA / "openwebtext"


def documents(path, progress=lambda done: None):
    """Yield the documents of one subset, three newlines or more made two, the ends stripped.

    Raises:
        UserError: if the tar, or an .xz file in it, is damaged; it is named.
    """
    name = "its directory"
    try:
        with open(path, "rb") as file, tarfile.open(fileobj=file, mode="r|") as subset:
            for member in subset:
                if not (member.isfile() and member.name.endswith(".xz")):
                    continue
                name = member.name
                with (
                    lzma.open(subset.extractfile(member)) as plain,
                    tarfile.open(fileobj=plain, mode="r|") as pages,
                ):
                    for page in pages:
                        if page.isfile() and page.name.endswith(".txt"):
                            text = pages.extractfile(page).read().decode("utf-8", errors="replace")
                            yield re.sub(r"\n\n\n+", "\n\n", text).strip()
                progress(file.tell())
            name = "its end"
            file.seek(subset.offset)
            if file.read(512) != bytes(512):  # a tar ends with zeros; tarfile takes any end for one
                raise tarfile.ReadError("it is cut off")
    except (lzma.LZMAError, tarfile.TarError, EOFError) as error:
        remedy = "delete it, and it is fetched again"
        raise UserError(f"{path} is damaged at {name} ({error}): {remedy}") from None


def tokenize(paths, tokenizer, target):
    """Write the tokens of the subsets in `paths` to target/train.bin and target/val.bin.

    val.bin has the last documents: 0.5 % of the tokens or a million, whichever is less. Memory
    holds a few thousand documents at a time.

    Raises:
        UserError: if a subset is damaged or the disk is full; neither file is there then.
    """
    eot = np.array([tokenizer.eot_token], dtype="<u2")
    starts, total = [], 0  # where each document starts, in tokens; how many there are so far
    beside = target / "train.bin.part"

    def batches():
        for path in paths:
            progress = Progress(f"tokenising {path.name}", path.stat().st_size, "MB", 1e6)
            texts = documents(path, progress)
            while batch := list(islice(texts, 1000)):
                yield batch

    def encode(batch):  # tiktoken works on all cores at once
        return tokenizer.encode_ordinary_batch(batch, num_threads=os.cpu_count())

    try:
        with open(beside, "wb+") as file, ThreadPoolExecutor(1) as ahead:
            waiting = None
            for batch in chain(batches(), [None]):  # unpack a batch while the one before is encoded
                encoded, waiting = waiting, batch and ahead.submit(encode, batch)
                for tokens in encoded.result() if encoded else ():
                    if starts:
                        file.write(eot)
                        total += 1
                    starts.append(total)
                    file.write(np.array(tokens, dtype="<u2"))
                    total += len(tokens)
            if len(starts) < 2:
                raise UserError(f"{paths[0]} holds {len(starts)} documents, at least 2 are needed: "
                                "delete it, and it is fetched again")
            n_val = min(total // 200, 1_000_000)
            start = next(s for s in reversed(starts) if total - s >= n_val or s == starts[1])
            file.seek(2 * start)
            gpt2.write_atomic(target / "val.bin", lambda val: val.write(file.read()))
            file.truncate(2 * (start - 1))  # nor the end-of-text between the two
        os.replace(beside, target / "train.bin")
    except OSError as error:
        reason = error.strerror or error
        raise UserError(f"cannot write {target}: {reason}; free some space, start again") from None
    finally:
        beside.unlink(missing_ok=True)
    print(f"{start - 1:,} tokens to train on, {total - start:,} held out; "
          f"{', '.join(str(path) for path in paths)} may be deleted", file=sys.stderr)


def prepare(subsets=1):
    """Fetch and tokenise the first subsets, unless train.bin and val.bin are there.

    Raises:
        UserError: if they cannot be fetched, read or written.
    """
    target = folder()
    done = [target / "train.bin", target / "val.bin"]
    if all(path.exists() for path in done):
        return
    paths = []
    for i in range(subsets):
        file = f"urlsf_subset{i:02}.tar"
        url = gpt2.hub_url(*REPO, f"subsets/{file}")
        paths.append(gpt2.download(url, target / file, SHA256[i] if i < len(SHA256) else None))
    tokenizer = gpt2.load_tokenizer("gpt2")
    with gpt2.lock(target):
        if not all(path.exists() for path in done):  # another process may have been faster
            tokenize(paths, tokenizer, target)


def load_tokens(split):
    """The token ids of "train" or "val", a 1-D array of uint16 that is mapped, not read.

    Raises:
        UserError: if they cannot be had, or the file is not sound.
    """
    prepare()
    path = folder() / f"{split}.bin"
    n_vocab = gpt2.load_tokenizer("gpt2").n_vocab
    size = path.stat().st_size
    if size == 0 or size % 2:
        raise UserError(f"{path} has {size:,} bytes, must be 2 a token: delete it, "
                        "it is made again")
    tokens = np.memmap(path, dtype="<u2", mode="r")
    worst = max(int(tokens[i : i + 2**24].max()) for i in range(0, len(tokens), 2**24))
    if worst >= n_vocab:
        raise UserError(f"{path} has token id {worst}, must be below {n_vocab:,}: delete it, "
                        "it is made again")
    return tokens


def main():
    """The command line."""
    parser = Parser(__doc__)
    help = f"how many of the {SUBSETS} subsets (default 1); train.bin, if it is there, stays"
    numbers = range(1, SUBSETS + 1)
    parser.add_argument("--subsets", type=int, default=1, choices=numbers, metavar="N", help=help)
    try:
        prepare(parser.parse_args().subsets)
        for split in "train", "val":
            print(f"{folder() / split}.bin: {len(load_tokens(split)):,} tokens")
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(error.exit_code)


if __name__ == "__main__":
    main()
