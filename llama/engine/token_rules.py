"""Which tokens may come next by lists: those that are allowed at all, and sequences that must not be completed."""

from collections.abc import Callable, Collection, Sequence

import numpy as np
from numpy.typing import NDArray

from llama.engine.request import TokenMatcher


class TokenRules:
    """`allowed`: the tokens that may be drawn, None = all. `banned`: sequences of generated tokens that must not occur.

    Immutable. `matcher` begins one completion, together with a grammar's matcher where there is one.
    """

    def __init__(self, vocab_size: int, allowed: Collection[int] | None, banned: Sequence[Sequence[int]]) -> None:
        bits = np.zeros((vocab_size + 31) // 32 * 32, np.bool_)
        bits[:vocab_size] = True
        if allowed is not None:
            bits[:] = False
            bits[list(allowed)] = True
        bits[[sequence[0] for sequence in banned if len(sequence) == 1]] = False
        self.always = np.packbits(bits, bitorder="little").view("<i4")
        self.longer = [(list(sequence[:-1]), sequence[-1]) for sequence in banned if len(sequence) > 1]

    def matcher(self, grammar: Callable[[], TokenMatcher] | None = None) -> "RuleMatcher":
        return RuleMatcher(self, None if grammar is None else grammar(), [])


class RuleMatcher:
    """Where one completion stands: see `TokenMatcher`."""

    def __init__(self, rules: TokenRules, grammar: TokenMatcher | None, generated: list[int]) -> None:
        self._rules = rules
        self._grammar = grammar
        self._generated = generated

    def fill_mask(self, words: NDArray[np.int32]) -> None:
        """RuntimeError if no token is left."""
        if self._grammar is None:
            words[:] = self._rules.always
        else:
            self._grammar.fill_mask(words)
            words &= self._rules.always
        length = len(self._generated)
        for head, last in self._rules.longer:
            if len(head) <= length and self._generated[-len(head) :] == head:
                words[last >> 5] &= ~np.int32(np.uint32(1 << (last & 31)).astype(np.int32))
        if not words.any():
            raise RuntimeError("allowed_token_ids, bad_words and the grammar leave no token")

    def advance(self, token_id: int) -> None:
        if self._grammar is not None:
            self._grammar.advance(token_id)
        self._generated.append(token_id)

    def rollback(self, num_tokens: int) -> None:
        if self._grammar is not None:
            self._grammar.rollback(num_tokens)
        del self._generated[len(self._generated) - num_tokens :]

    def fork(self) -> "RuleMatcher":
        grammar = None if self._grammar is None else self._grammar.fork()
        return RuleMatcher(self._rules, grammar, self._generated.copy())
