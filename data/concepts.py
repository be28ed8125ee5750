"""Which features match what Python's own parser says about each token of the standard library?

    python -m data.concepts SAE [SAE...]       # SAEs of one layer, as e2e_sae.py --evaluate takes

`tokenize` and `ast` label each token with 37 concepts, from "keyword" to "loop body". For each
concept this prints how well the best single feature of each SAE predicts it, next to two baselines.
To look at the first SAE's feature, run e2e_sae.py --features SAE NUMBER.
"""

import argparse
import ast
import builtins
import io
import keyword
import tokenize
from collections import defaultdict
from functools import partial

import numpy as np
import torch

import e2e_sae
from data import end_of_text, windows
from data.stdlib import read_files
from gpt2 import GPT, ensure, load_tokenizer, run_command

# ---- Concepts from `tokenize`: what a word is and where it stands --------------------------------

def words_of(source):
    """Yield (kind, word, begin, end) for each token; begin and end are (row, column).

    An f-string is one STRING, as in Python 3.11. Later versions tokenize it into FSTRING_START, its
    parts (with f-strings among them) and FSTRING_END, and a t-string likewise.
    """
    open_strings = []  # where the f-strings around this token begin
    for kind, word, begin, end, _ in tokenize.generate_tokens(io.StringIO(source).readline):
        kind = tokenize.tok_name[kind]
        if kind.endswith("STRING_START"):
            open_strings.append(begin)
        elif kind.endswith("STRING_END"):
            kind = "STRING"
            begin = open_strings.pop()
        if not open_strings:
            yield kind, word, begin, end


def word_concepts(kind, word, before, indent, brackets):
    """Yield the concepts of a word; `before` is the previous word of its statement, or ""."""
    if before == "" and kind != "STRING":
        yield "first word of a statement"
    if 1 <= indent <= 3:
        yield f"indented {indent} deep"
    if brackets > 0:
        yield "inside brackets"
    if brackets > 1:
        yield "inside two brackets"
    if kind == "NUMBER":
        yield "number"
    if kind == "OP":
        yield "operator or bracket"
        if word in ")]}":
            yield "closing bracket"
    if kind == "NAME":
        if word in ("True", "False", "None"):
            yield "True, False, None"
        elif keyword.iskeyword(word):
            yield "keyword"
        elif word in vars(builtins) and before != ".":
            yield "name of a builtin"
        elif word == "self":
            yield "self"
        if before in ("def", "class"):
            yield "name being defined"
        if before == ".":
            yield "attribute after a dot"
        if len(word) > 1 and word.isupper():
            yield "name in capitals"


def token_spans(source):
    """Yield (concept, begin, end), each place a (row, column in characters)."""
    indent = 0
    brackets = 0  # open ones; a closing bracket is outside its own pair
    before = ""  # the previous word of the statement
    decorator = None  # where it begins, if the statement is one
    for kind, word, begin, end in words_of(source):
        if kind == "INDENT":
            indent += 1
        elif kind == "DEDENT":
            indent -= 1
        elif kind == "COMMENT":
            yield "comment", begin, end
        elif kind == "NEWLINE":  # the end of a statement
            if decorator:
                yield "decorator", decorator, end
            before = ""
            decorator = None
        elif kind in ("NAME", "NUMBER", "OP", "STRING"):
            if word == "@" and before == "":
                decorator = begin
            if word in "([{":
                brackets += 1
            elif word in ")]}":
                brackets -= 1
            for concept in word_concepts(kind, word, before, indent, brackets):
                yield concept, begin, end
            before = word


# ---- Concepts from the syntax tree ---------------------------------------------------------------

WHOLE = {  # concept: the nodes that it covers
    "import": (ast.Import, ast.ImportFrom),
    "return statement": ast.Return,
    "raise statement": ast.Raise,
    "assert statement": ast.Assert,
    "comparison": ast.Compare,
    "lambda": ast.Lambda,
    "parameter": ast.arg,
    "comprehension": (ast.ListComp, ast.SetComp, ast.DictComp, ast.GeneratorExp),
}
BODY = {  # concept: the nodes whose body it covers
    "class body": ast.ClassDef,
    "loop body": (ast.For, ast.While, ast.AsyncFor),
    "exception handler": ast.ExceptHandler,
    "try body": ast.Try,
    "with body": (ast.With, ast.AsyncWith),
}


def node_spans(node):
    """Yield (concept, first node, last node) for the concepts of one node, without its children."""
    for concept, kinds in WHOLE.items():
        if isinstance(node, kinds):
            yield concept, node, node
    for concept, kinds in BODY.items():
        if isinstance(node, kinds):
            yield concept, node.body[0], node.body[-1]
    if isinstance(node, ast.If):
        yield "condition of an if", node.test, node.test
    if isinstance(node, ast.Subscript):
        yield "subscript", node.slice, node.slice
    if isinstance(node, ast.Assign):
        for target in node.targets:
            yield "target of an assignment", target, target
    if isinstance(node, ast.Call):
        for argument in node.args + node.keywords:
            yield "argument of a call", argument, argument


def is_string(node):
    """Whether a node is a string, bytes, an f-string or a t-string (Python 3.14's TemplateStr)."""
    if isinstance(node, ast.Constant):
        return isinstance(node.value, (str, bytes))
    return type(node).__name__ in ("JoinedStr", "TemplateStr")


def tree_spans(node):
    """Yield (concept, first node, last node) for a node and all below it."""
    if is_string(node):  # do not look inside: Python 3.11 misplaces the nodes in an f-string
        yield "string", node, node
    elif isinstance(node, ast.Expr) and is_string(node.value):
        yield "docstring", node, node
    else:
        yield from node_spans(node)
        for child in ast.iter_child_nodes(node):
            yield from tree_spans(child)


# ---- Labels --------------------------------------------------------------------------------------

def concepts(source):
    """Label a Python file: {concept: bool (byte,)}, all False for a concept that is not in it."""
    lines = io.StringIO(source).readlines()
    starts = np.cumsum([0] + [len(line.encode()) for line in lines])  # of the lines, in bytes
    marks = defaultdict(partial(np.zeros, starts[-1], dtype=bool))

    def offset(row, column):
        return starts[row - 1] + len(lines[row - 1][:column].encode())

    for concept, begin, end in token_spans(source):  # columns in characters
        marks[concept][offset(*begin) : offset(*end)] = True
    for concept, first, last in tree_spans(ast.parse(source)):  # columns in bytes
        begin = starts[first.lineno - 1] + first.col_offset
        end = starts[last.end_lineno - 1] + last.end_col_offset
        marks[concept][begin:end] = True
    return marks


def labelled_tokens(model):
    """The held-out text as token ids (n,), and which concepts hold at each token's last byte:
    {concept: bool (n,)}, the rarest concept first."""
    tokenizer = load_tokenizer(model)
    separator = end_of_text(model, tokenizer)
    ids = []
    places = defaultdict(list)  # concept: indices in `ids`
    for source in read_files("val").values():
        try:
            marks = concepts(source)
        except (SyntaxError, tokenize.TokenError):
            continue  # this Python cannot parse the file
        tokens = tokenizer.encode_ordinary(source)
        lengths = [len(word) for word in tokenizer.decode_tokens_bytes(tokens)]
        last = np.cumsum(lengths) - 1
        for concept, holds in marks.items():
            places[concept].extend(len(ids) + np.flatnonzero(holds[last]))
        ids += tokens + [separator]
    labels = {}
    for concept in sorted(places, key=lambda concept: len(places[concept])):
        labels[concept] = np.isin(np.arange(len(ids)), places[concept])
    return np.array(ids), labels


# ---- Which features predict them -----------------------------------------------------------------

def f1_score(predicted, truth):
    """F1 = 2 hits / (predicted + true) for each concept: bool (concept, token) both."""
    total = predicted.sum(1) + truth.sum(1)
    return 2 * (predicted & truth).sum(1) / np.maximum(1, total)


def best_thresholds(values, truth):
    """Yield each concept's best F1 with one feature, and its threshold; nothing for a silent one.

    values (token,), truth bool (concept, token). The feature predicts a concept where it is active
    and at least the threshold.
    """
    active = np.flatnonzero(values > 0)
    if len(active) == 0:
        return
    active = active[np.argsort(-values[active])]  # strongest first
    values = values[active]  # each is tried as the threshold
    n_predicted = np.searchsorted(-values, -values, side="right")  # counts all equal values
    for holds in truth:
        f1 = 2 * holds[active].cumsum() / (n_predicted + np.count_nonzero(holds))
        best = f1.argmax()
        yield f1[best], values[best]


def best_features(W_enc, b_enc, x, truth):
    """For each concept, the feature and threshold with the best F1 on the first half of the text.

    x (token, d_model), features relu(x @ W_enc + b_enc), truth bool (concept, token). Returns three
    arrays (concept,): F1 on the second half, feature, threshold.
    """
    half = len(x) // 2
    best = [(0, 0, np.inf)] * len(truth)  # F1, feature, threshold
    for i in range(len(b_enc)):
        values = x[:half] @ W_enc[:, i] + b_enc[i]  # before the ReLU
        found = best_thresholds(values.numpy(), truth[:, :half])
        for c, (f1, threshold) in enumerate(found):
            if f1 > best[c][0]:
                best[c] = (f1, i, threshold)
    _, feature, threshold = np.array(best).T
    feature = feature.astype(int)
    chosen = x[half:] @ W_enc[:, feature] + b_enc[feature]  # (token, concept)
    predicted = chosen.numpy() >= threshold
    return f1_score(predicted.T, truth[:, half:]), feature, threshold


def baselines(x, sae):
    """Encoders to compare with, as {name: (W_enc, b_enc)}."""
    unit = torch.eye(x.shape[1])
    coordinates = torch.cat([unit, -unit], dim=1)  # each one above its mean, and below
    torch.manual_seed(0)
    untrained = e2e_sae.SAE(*sae.W_enc.shape)
    return {
        "coordinates of x": (coordinates, -x.mean(0) @ coordinates),
        "untrained SAE": (untrained.W_enc, untrained.b_enc),
    }


# ---- The table -----------------------------------------------------------------------------------

def residual_stream(tokens, model, layer, context):
    """The clean residual stream entering a layer, on whole windows of tokens: (token, d_model)."""
    gpt = GPT.from_pretrained(model)
    batches = torch.from_numpy(windows(tokens, context)).split(64)
    x = torch.cat([e2e_sae.entering(gpt, batch, layer) for batch in batches])
    return x.flatten(0, 1)


def cells(values):
    """F1 scores as cells of a row."""
    return "".join(f"{value:6.2f}" for value in values)


def print_table(concepts, share, f1, feature):
    """Print a row for each concept, rare ones apart: its share of the tokens, its F1s, its feature.

    concepts, share and feature (concept,), f1 (concept, column).
    """
    header = "".join(f"{i:6}" for i in range(1, f1.shape[1] + 1))
    rare = share < 0.05
    for title, group in ("rare, under 5% of the tokens", rare), ("common", ~rare):
        print(f"\n{title:<28}  share{header}   feature of 1")
        for c in np.flatnonzero(group):
            print(f"{concepts[c]:<28}{share[c]:7.1%}{cells(f1[c])}{feature[c]:15}")
        print(f"{'mean':<35}{cells(f1[group].mean(0))}")


@torch.no_grad()
def print_concepts(names):
    """Print the F1 of the best single feature for each concept, of SAEs and of the baselines."""
    saes = {name: e2e_sae.load_sae(name) for name in names}
    first = saes[names[0]]
    same = all(sae.made_for == first.made_for for sae in saes.values())
    ensure(same, f"{names}: give SAEs of one model, layer and context")
    tokens, labels = labelled_tokens(first.made_for["model"])
    x = residual_stream(tokens, **first.made_for)
    truth = np.stack(list(labels.values()))[:, : len(x)]  # (concept, token)

    encoders = {name: (sae.W_enc, sae.b_enc) for name, sae in saes.items()}
    encoders |= baselines(x, first)
    columns = []  # of the table
    features = []
    for W_enc, b_enc in encoders.values():
        f1, feature, _ = best_features(W_enc, b_enc, x, truth)
        columns.append(f1)
        features.append(feature)

    print(f"F1 of the best single feature for each concept, chosen on one half of {len(x):,} "
          "tokens, tested on the other")
    for i, name in enumerate(encoders, 1):
        print(f"  {i:2}: {name}")
    print_table(list(labels), truth.mean(1), np.stack(columns, axis=1), features[0])


def main():
    """Read the command line and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("SAE", nargs="+", help="a run's folder, or what load_sae takes")
    print_concepts(parser.parse_args().SAE)


if __name__ == "__main__":
    run_command(main)
