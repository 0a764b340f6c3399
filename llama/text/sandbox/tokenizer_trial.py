"""Tries out a tokenizer.json in a worker process: its patterns may run for ever, take all memory or panic."""

from collections.abc import Callable, Mapping
from typing import Any

_RUNS = (
    *map(chr, range(0x20, 0x7F)),
    *("\n", "\r\n", "\t", "\0", "é", "你", "\u0301", "\u200d", "😀", "\u3000", "\ufdfa", "\U0010ffff"),
)
# In both orders: what a run is followed by decides whether a pattern has to try all its ways.
HOSTILE = "".join(run * length for length in (1, 64, 300) for run in (*_RUNS, *reversed(_RUNS)))


def start(setup: Mapping[str, Any]) -> Callable[[Mapping[str, Any]], int]:
    """Reads the file at `path`, or `text`; the function encodes the hostile text -> its number of tokens."""
    from tokenizers import Tokenizer

    backend = Tokenizer.from_file(setup["path"]) if "path" in setup else Tokenizer.from_str(setup["text"])
    return lambda request: len(backend.encode(HOSTILE, add_special_tokens=False).ids)
