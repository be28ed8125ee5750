"""Which features match what Python's own parser says about each token of the standard library?

    python -m data.concepts SAE [SAE...]       # SAEs of one layer, as e2e_sae.py --evaluate takes

`tokenize` and `ast` label each token with 37 concepts, from "keyword" to "loop body". For each
concept this prints how well the best single feature of each SAE predicts it, next to three
baselines. To look at the first SAE's feature, run e2e_sae.py --features SAE NUMBER.
"""

import argparse
import ast
import builtins
import io
import keyword
import tokenize
from collections import defaultdict
from contextlib import suppress

import numpy as np
import torch

import e2e_sae
from data import run_command, windows
from data.stdlib import read_files
from gpt2 import END_OF_TEXT, GPT, ensure, load_tokenizer

CONSTANTS = {"True", "False", "None"}
KEYWORDS = set(keyword.kwlist) - CONSTANTS
BUILTINS = set(dir(builtins)) - CONSTANTS


# ---- Where a concept holds -----------------------------------------------------------------------

def token_spans(source):
    """Concepts from `tokenize`: yield (concept, begin, end), each place a (row, column)."""
    depth, brackets, before, decorator = 0, 0, "", None  # before: the statement's previous word
    for kind, word, begin, end, _ in tokenize.generate_tokens(io.StringIO(source).readline):
        depth += (kind == tokenize.INDENT) - (kind == tokenize.DEDENT)
        if kind == tokenize.COMMENT:
            yield "comment", begin, end
        if kind == tokenize.NEWLINE:
            if decorator:
                yield "decorator", decorator, end
            before, decorator = "", None
        if kind not in (tokenize.NAME, tokenize.NUMBER, tokenize.OP, tokenize.STRING):
            continue
        if word == "@" and before == "":
            decorator = begin
        name, op = kind == tokenize.NAME, kind == tokenize.OP
        brackets += op and (word in "([{") - (word in ")]}")
        holds = {
            "first word of a statement": before == "" and kind != tokenize.STRING,
            f"indented {depth} deep": 1 <= depth <= 3,
            "number": kind == tokenize.NUMBER,
            "operator or bracket": op,
            "closing bracket": op and word in ")]}",
            "inside brackets": brackets > 0,
            "inside two brackets": brackets > 1,
            "True, False, None": word in CONSTANTS,
            "keyword": word in KEYWORDS,
            "name being defined": name and before in ("def", "class"),
            "attribute after a dot": name and before == ".",
            "self": word == "self",
            "name of a builtin": name and before != "." and word in BUILTINS,
            "name in capitals": name and len(word) > 1 and word.isupper(),
        }
        yield from ((concept, begin, end) for concept, is_true in holds.items() if is_true)
        before = word


WHOLE, BODY = lambda node: [[node]], lambda node: [node.body]
NODES = {  # concept: types of nodes, and the parts of such a node to label, each a list of nodes
    "import": ((ast.Import, ast.ImportFrom), WHOLE),
    "return statement": (ast.Return, WHOLE),
    "raise statement": (ast.Raise, WHOLE),
    "assert statement": (ast.Assert, WHOLE),
    "comparison": (ast.Compare, WHOLE),
    "lambda": (ast.Lambda, WHOLE),
    "parameter": (ast.arg, WHOLE),
    "comprehension": ((ast.ListComp, ast.SetComp, ast.DictComp, ast.GeneratorExp), WHOLE),
    "class body": (ast.ClassDef, BODY),
    "loop body": ((ast.For, ast.While, ast.AsyncFor), BODY),
    "exception handler": (ast.ExceptHandler, BODY),
    "try body": (ast.Try, BODY),
    "with body": ((ast.With, ast.AsyncWith), BODY),
    "condition of an if": (ast.If, lambda node: [[node.test]]),
    "target of an assignment": (ast.Assign, lambda node: [[part] for part in node.targets]),
    "argument of a call": (ast.Call, lambda node: [[part] for part in node.args + node.keywords]),
    "subscript": (ast.Subscript, lambda node: [[node.slice]]),
}


def tree_spans(node):
    """Concepts from the syntax tree: yield (concept, first node, last node)."""
    value = node.value if isinstance(node, ast.Expr) else node
    if isinstance(value, ast.JoinedStr) or isinstance(getattr(value, "value", None), (str, bytes)):
        yield "string" if value is node else "docstring", node, node
        return  # before Python 3.12 the nodes in an f-string have wrong places
    for concept, (kinds, parts) in NODES.items():
        if isinstance(node, kinds):
            yield from ((concept, part[0], part[-1]) for part in parts(node))
    for child in ast.iter_child_nodes(node):
        yield from tree_spans(child)


def concepts(source):
    """Label a Python file: {concept: bool (byte,)}, all False for a concept that is not in it."""
    lines = io.StringIO(source).readlines()
    starts = np.cumsum([0] + [len(line.encode()) for line in lines])
    marks = defaultdict(lambda: np.zeros(starts[-1], dtype=bool))
    for concept, *places in token_spans(source):  # columns in characters
        begin, end = (starts[row - 1] + len(lines[row - 1][:column].encode())
                      for row, column in places)
        marks[concept][begin:end] = True
    for concept, first, last in tree_spans(ast.parse(source)):  # columns in bytes
        begin = starts[first.lineno - 1] + first.col_offset
        marks[concept][begin : starts[last.end_lineno - 1] + last.end_col_offset] = True
    return marks


def labelled_tokens(tokenizer, split="val"):
    """(token ids (n,), {concept: bool (n,)}): which concepts hold at each token's last byte."""
    ids, files = [], []
    for source in read_files(split).values():
        with suppress(SyntaxError, tokenize.TokenError):  # skip files that this Python cannot parse
            files.append(concepts(source))
            ids += [*tokenizer.encode_ordinary(source), tokenizer.eot_token]
    last = np.cumsum([len(tokenizer.decode_single_token_bytes(i)) for i in ids]) - 1
    labels, end_of_text = {}, np.zeros(len(END_OF_TEXT), dtype=bool)
    for concept in set().union(*files):
        parts = [part for marks in files for part in (marks[concept], end_of_text)]
        labels[concept] = np.concatenate(parts)[last]
    return np.array(ids), labels


# ---- Which features predict it -------------------------------------------------------------------

def best_features(weight, bias, x, truth):
    """For each concept, the feature and threshold with the best F1 on the first half of the text.

    x (token, d_model), features relu(weight @ x + bias), truth bool (concept, token). A feature
    predicts a concept where it is active and at least the threshold. Returns three arrays
    (concept,): F1 on the second half, feature, threshold.
    """
    half = len(x) // 2
    known, tested = truth[:, :half], truth[:, half:]
    n_true = known.sum(1)
    best = [(0.0, 0, np.inf)] * len(truth)  # F1, feature, threshold
    for first in range(0, len(weight), 64):
        part = slice(first, first + 64)
        features = torch.addmm(bias[part, None], weight[part], x[:half].T)  # (feature, token)
        for i, values in enumerate(features.numpy(), first):
            active = np.flatnonzero(values > 0)
            active = active[values[active].argsort()[::-1]]  # strongest first
            values = values[active]
            predicted = (-values).searchsorted(-values, side="right")  # with each as threshold
            for c in range(len(truth)) if len(active) else ():
                f1 = 2 * known[c].take(active).cumsum() / (predicted + n_true[c])
                k = f1.argmax()
                if f1[k] > best[c][0]:
                    best[c] = f1[k], i, values[k]
    _, feature, threshold = map(np.array, zip(*best))
    chosen = weight[feature] @ x[half:].T + bias[feature, None]
    predicted = chosen.numpy() >= threshold[:, None]
    total = predicted.sum(1) + tested.sum(1)
    return 2 * (predicted & tested).sum(1) / np.maximum(1, total), feature, threshold


def baselines(x, sae):
    """Encoders to compare with: the coordinates of x, and a random one with the same L0."""
    unit = torch.eye(x.shape[1])
    coordinates = torch.cat([unit, -unit])
    torch.manual_seed(0)
    random = torch.nn.Linear(*sae.encoder.weight.T.shape)
    sample = x[:2048]
    silent = int((sae.encode(sample) == 0).sum())
    shift = random(sample).flatten().kthvalue(max(1, silent)).values
    return {"best coordinate of x": (coordinates, -coordinates @ x.mean(0)),
            "random SAE": (random.weight, random.bias - shift)}


# ---- The table -----------------------------------------------------------------------------------

@torch.no_grad()
def print_concepts(names):
    """Print the F1 of the best single feature for each concept: SAEs, baselines, always yes."""
    saes = {name: e2e_sae.SAE.load(name) for name in names}
    first = saes[names[0]]
    ensure(all(sae.made_for == first.made_for for sae in saes.values()),
           f"{', '.join(names)}: give SAEs of one model, layer and context")
    model, layer, context = (first.made_for[key] for key in ("model", "layer", "context"))
    tokens, labels = labelled_tokens(load_tokenizer(model))
    gpt, batches = GPT.from_pretrained(model), torch.from_numpy(windows(tokens, context)).split(64)
    x = torch.cat([e2e_sae.entering(gpt, batch, layer) for batch in batches]).flatten(0, 1)
    labels = sorted(labels.items(), key=lambda item: item[1].mean())
    truth = np.stack([label for _, label in labels])[:, : len(x)]  # (concept, token)
    share, tested = truth.mean(1), truth[:, len(x) // 2 :].mean(1)
    encoders = {name: (sae.encoder.weight, sae.encoder.bias) for name, sae in saes.items()}
    encoders |= baselines(x, first)
    f1, features, _ = zip(*(best_features(*encoder, x, truth) for encoder in encoders.values()))
    f1 = np.stack([*f1, 2 * tested / (1 + tested)])  # (column, concept)

    print(f"F1 of the best single feature for each concept, chosen on one half of {len(x):,} "
          "tokens, tested on the other")
    for i, name in enumerate([*encoders, "always yes"], 1):
        print(f"  {i:2}: {name}")
    header = "".join(f"{i:6}" for i in range(1, len(f1) + 1)) + "   feature of 1"
    for title, group in ("rare, under 5% of the tokens", share < 0.05), ("common", share >= 0.05):
        print(f"\n{title:<28}  share{header}")
        for c in np.flatnonzero(group):
            cells = "".join(f"{value:6.2f}" for value in f1[:, c])
            print(f"{labels[c][0]:<28}{share[c]:7.1%}{cells}{features[0][c]:15}")
        print(f"{'mean':<35}" + "".join(f"{value:6.2f}" for value in f1[:, group].mean(1)))


def main():
    """Read the command line and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("saes", nargs="+", metavar="SAE", help="run folders, or as SAE.load takes")
    print_concepts(parser.parse_args().saes)


if __name__ == "__main__":
    run_command(main)
