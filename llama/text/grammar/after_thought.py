"""A grammar that begins where the answer's thought ends."""

from typing import Self

import numpy as np
from numpy.typing import NDArray

from llama.text.grammar.compiler import Grammar
from llama.text.grammar.matcher import GrammarError, Matcher
from llama.text.reasoning import CLOSE, OPEN
from llama.text.tokenizer import Tokenizer

_Words = NDArray[np.int32]
_OPEN, _CLOSE = OPEN.encode(), CLOSE.encode()
# States of AfterThought, numbers below 256. _OPENING + k and _THINKING + k: k bytes of `<think>` or `</think>` are
# written; up to the first the answer may as well be without a thought, from _ONLY_OPENING on it may not.
_OPENING, _ONLY_OPENING, _THINKING, _THOUGHT = 0, 10, 20, 30
_CONTENT, _NO_THOUGHT = 40, 50  # the grammar has taken the token, behind a thought or without one


class ThoughtMasks:
    """The tokens that may come next. `opening[k]`: what writes on `<think>` behind its first k bytes. `thinking[k]`:
    all but what ends the text, and what completes `</think>`, of which k bytes are there, and has more behind it than
    line breaks, which the grammar would not see. It takes a part of a second to make them for a tokenizer."""

    def __init__(self, tokenizer: Tokenizer, vocab_size: int) -> None:
        self.token_bytes = tokenizer.token_bytes
        num_bits = (vocab_size + 31) // 32 * 32
        opening = np.zeros((len(_OPEN), num_bits), np.bool_)
        thinking = np.tile(np.arange(num_bits) < vocab_size, (len(_CLOSE), 1))
        thinking[:, [token for token in tokenizer.eos_token_ids if token < vocab_size]] = False
        for token in range(min(tokenizer.vocab_size, vocab_size)):
            text = tokenizer.token_bytes(token)
            for k in range(len(_OPEN)) if text else ():
                opening[k, token] = text.startswith(_OPEN[k:]) or _OPEN[k:].startswith(text)
            for k in range(len(_CLOSE)) if b">" in text else ():
                _, tag, behind = (_CLOSE[:k] + text).partition(_CLOSE)
                thinking[k, token] &= not (tag and behind.strip(b"\n"))
        self.opening, self.thinking = (
            np.packbits(bits, axis=1, bitorder="little").view("<i4") for bits in (opening, thinking)
        )

    def opens(self, token: int, k: int) -> bool:
        return bool(self.opening[k, token >> 5] >> (token & 31) & 1)


class AfterThought:
    """Where one completion stands: first its thought, then the grammar. See `Matcher` for the methods.

    Until it is certain that there is a thought, one matcher follows the text as if there were none; another one begins
    behind the thought.
    """

    def __init__(self, masks: ThoughtMasks, without: Matcher, behind: Matcher, states: bytes) -> None:
        self._masks = masks
        self._without = without
        self._behind = behind
        self._states = bytearray(states)  # the first, and that after each token

    @classmethod
    def at_start(cls, masks: ThoughtMasks, grammar: Grammar, is_inside: bool) -> Self:
        """`is_inside`: the prompt has opened the thought."""
        return cls(masks, grammar.matcher(), grammar.matcher(), bytes([_THINKING if is_inside else _OPENING]))

    def fill_mask(self, row: _Words) -> None:
        state = self._states[-1]
        if _THINKING <= state < _THOUGHT:
            row[:] = self._masks.thinking[state - _THINKING]
        elif _ONLY_OPENING <= state < _THINKING:
            row[:] = self._masks.opening[state - _ONLY_OPENING]
        elif state < _ONLY_OPENING:
            self._without.fill_mask(row)
            row |= self._masks.opening[state]
        else:
            (self._without if state == _NO_THOUGHT else self._behind).fill_mask(row)

    def advance(self, token_id: int) -> None:
        state = self._states[-1]
        if state < _THINKING:
            state = self._opened(state, token_id)
        elif state < _THOUGHT:
            state = self._thought(state - _THINKING, self._masks.token_bytes(token_id))
        elif state == _NO_THOUGHT:
            self._without.advance(token_id)
        else:
            self._behind.advance(token_id)
            state = _CONTENT
        self._states.append(state)

    def rollback(self, num_tokens: int) -> None:
        dropped = self._states[len(self._states) - num_tokens :]
        del self._states[len(self._states) - num_tokens :]
        self._behind.rollback(dropped.count(_CONTENT))
        self._without.rollback(sum(state == _NO_THOUGHT or state < _ONLY_OPENING for state in dropped))

    def fork(self) -> Self:
        return type(self)(self._masks, self._without.fork(), self._behind.fork(), bytes(self._states))

    def _opened(self, state: int, token: int) -> int:
        """The state after a token before which there may be a part of `<think>`."""
        k = state % _ONLY_OPENING
        if self._masks.opens(token, k):
            text = self._masks.token_bytes(token)
            if k + len(text) >= len(_OPEN):
                return self._thought(0, text[len(_OPEN) - k :])
            if state >= _ONLY_OPENING or not self._without.takes(token):
                return _ONLY_OPENING + k + len(text)
            self._without.advance(token)
            return _OPENING + k + len(text)
        if state >= _ONLY_OPENING:
            raise GrammarError(f"token {token} writes no {OPEN}")
        self._without.advance(token)
        return _NO_THOUGHT

    @staticmethod
    def _thought(k: int, text: bytes) -> int:
        """The state after text behind k bytes of `</think>`."""
        text = _CLOSE[:k] + text
        if _CLOSE in text:
            return _THOUGHT
        return _THINKING + next(k for k in range(len(_CLOSE) - 1, -1, -1) if text.endswith(_CLOSE[:k]))
