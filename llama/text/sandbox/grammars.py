"""Tries whether a grammar compiles, in a worker process: some never end, and nothing shows beforehand which."""

from collections.abc import Callable, Mapping
from typing import Any

# As many alternatives at one place as a schema may have properties, a few times over: each can be several items.
_MAX_ITEMS = 20_000
MAX_STATES = 100_000  # of the automaton: 330 bytes each


def parser_limits() -> Any:
    """llguidance's limits, raised for the largest schema that is accepted; messages do not quote the output."""
    from llguidance import LLParserLimits

    return LLParserLimits(
        max_items_in_row=_MAX_ITEMS,
        step_max_items=10 * _MAX_ITEMS,
        max_lexer_states=MAX_STATES,
        verbose_errors=False,
    )


def start(setup: Mapping[str, Any]) -> Callable[[Mapping[str, Any]], str]:
    """The function returns the error of a request's `grammar`, "" if it has none."""
    from llguidance import LLMatcher, LLTokenizer

    # What takes long does not depend on the vocabulary, so that of single bytes will do.
    tokenizer = LLTokenizer("byte")

    def check(request: Mapping[str, Any]) -> str:
        matcher = LLMatcher(tokenizer, request["grammar"], log_level=0, limits=parser_limits())
        matcher.compute_bitmask()
        return matcher.get_error()

    return check
