"""Tries whether a grammar compiles, in a worker process: some take for ever, and nothing tells which."""

from collections.abc import Callable, Mapping
from typing import Any

from llguidance import LLMatcher, LLTokenizer


def start(setup: Mapping[str, Any]) -> Callable[[Mapping[str, Any]], str]:
    """The function returns the error of a request's `grammar`, "" if it has none."""
    # What takes long does not depend on the vocabulary, so that of single bytes will do.
    tokenizer = LLTokenizer("byte")

    def check(request: Mapping[str, Any]) -> str:
        matcher = LLMatcher(tokenizer, request["grammar"], log_level=0)
        matcher.compute_bitmask()
        return matcher.get_error()

    return check
