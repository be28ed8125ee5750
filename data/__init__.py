"""Text as tokens: which text a model reads. The programs in this folder make that text and models.

    from data import load_tokens
    tokens = load_tokens("stdlib", "train")      # 1-D array of token ids
"""

import os
import sys

import numpy as np
import torch

from gpt2 import OPENAI, UserError, ensure, load_tokenizer


def load_tokens(model, split):
    """Token ids of the "train" or "val" text of a model, a 1-D array of uint16.

    OpenAI's models read OpenWebText (fetched and tokenised on first use); any other model reads the
    source of the running Python's standard library, with the model's own vocabulary.
    """
    from data import openwebtext, stdlib

    if model in OPENAI:
        return openwebtext.load_tokens(split)
    return stdlib.load_tokens(load_tokenizer(model), split)


def windows(tokens, context):
    """A 1-D array of token ids as (sequence, context), without overlap and without a copy."""
    n = len(tokens) // context
    ensure(n > 0, f"--context {context}: the text has only {len(tokens):,} tokens; give fewer")
    return tokens[: n * context].reshape(n, context)


def held_out(config):
    """`n_eval` sequences, spread evenly over the held-out text: an array (n_eval, context)."""
    text = windows(load_tokens(config.model, "val"), config.context)
    n = min(config.n_eval, len(text))
    return text[np.arange(n) * len(text) // n].astype(np.int64)


def run_command(main):
    """Exit with the code that main() returns; print an error of the user as one line."""
    sys.stdout.reconfigure(line_buffering=True)
    try:
        code = main()
    except (UserError, OSError, ImportError, torch.OutOfMemoryError) as error:
        print("error:", " ".join(str(error).split())[:1000], file=sys.stderr)
        code = 1
    except KeyboardInterrupt:
        code = 130
    except SystemExit as end:
        code = end.code
    sys.stdout.flush()
    if "WORLD_SIZE" in os.environ:  # gloo's threads now and then abort a process that ends normally
        os._exit(code or 0)
    sys.exit(code)
