"""The `llama` command with faults to order: the file that the first argument names says what goes wrong next, once.

Its text is a place and an error ("decoder memory"); whoever comes by that place first takes the order and fails.
"""

import contextlib
import os
import sys
from pathlib import Path

import torch

from llama.cli import main
from llama.engine.runner import Runner
from llama.model.transformer import Transformer
from llama.text.tokenizer import IncrementalDecoder, StopMatcher, Tokenizer
from llama.text.tool_calls.parser import ToolCallParser


class PanicException(BaseException):
    """As pyo3's: its name is all that tells it."""


ERRORS = {
    "exception": ZeroDivisionError,
    "memory": MemoryError,
    "panic": PanicException,
    "oom": torch.OutOfMemoryError,
    "nan": None,
}
PLACES = {
    "decoder": (IncrementalDecoder, "push"),
    "stop": (StopMatcher, "push"),
    "tools": (ToolCallParser, "feed"),
    "naming": (Tokenizer, "token_text"),
    "step": (Runner, "launch"),
    "logits": (Transformer, "head"),
}


def break_on_order(order: Path, place: str) -> None:
    owner, name = PLACES[place]
    really = getattr(owner, name)

    def call(*arguments, **options):
        error = taken(order, place)
        if error == "nan":
            return really(*arguments, **options).fill_(float("nan"))
        if error is not None:
            raise ERRORS[error]("ordered")
        return really(*arguments, **options)

    setattr(owner, name, call)


def taken(order: Path, place: str) -> str | None:
    with contextlib.suppress(FileNotFoundError):
        wanted, _, error = order.read_text().partition(" ")
        if wanted == place:
            os.rename(order, order.with_suffix(".taken"))
            return error
    return None


if __name__ == "__main__":
    file = Path(sys.argv.pop(1))
    for each in PLACES:
        break_on_order(file, each)
    sys.exit(main())
