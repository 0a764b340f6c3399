"""Allowed and banned tokens as masks: against the definition, token by token."""

import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llama.engine.token_rules import TokenRules

VOCAB = 37
TOKENS = st.integers(0, 3)


def test_long_sequences_cost_a_step_nothing_before_they_can_occur():
    matcher = TokenRules(VOCAB, None, [list(range(30_000))] * 128).matcher()
    words, began = np.zeros(2, np.int32), time.process_time()
    for _ in range(100):
        matcher.fill_mask(words)
    assert time.process_time() - began < 1


class EvenTokens:
    """A grammar that allows even tokens alone, and counts what it is told."""

    def __init__(self, told=()):
        self.told = list(told)

    def fill_mask(self, words):
        words[:] = np.packbits(np.arange(64) % 2 == 0, bitorder="little").view("<i4")

    def advance(self, token_id):
        self.told.append(token_id)

    def rollback(self, num_tokens):
        del self.told[len(self.told) - num_tokens :]

    def fork(self):
        return EvenTokens(self.told)


def allowed(matcher):
    words = np.full((VOCAB + 31) // 32, 7, np.int32)
    matcher.fill_mask(words)
    return set(np.flatnonzero(np.unpackbits(words.view(np.uint8), bitorder="little")).tolist())


@given(
    st.none() | st.sets(st.integers(0, VOCAB - 1), min_size=5),
    st.lists(st.lists(TOKENS, min_size=1, max_size=3), max_size=4),
    st.lists(TOKENS, max_size=8),
    st.booleans(),
)
@settings(max_examples=150)
def test_a_mask_holds_what_the_rules_leave(only, banned, generated, with_grammar):
    matcher = TokenRules(VOCAB, only, banned).matcher(EvenTokens if with_grammar else None)
    for token in generated:
        matcher.advance(token)
    expected = {
        token
        for token in range(VOCAB)
        if (only is None or token in only)
        and not any([*generated, token][-len(ban) :] == ban for ban in banned)
        and not (with_grammar and token % 2)
    }
    if not expected:
        with pytest.raises(RuntimeError, match="leave no token"):
            allowed(matcher)
    else:
        assert allowed(matcher) == expected
    other = matcher.fork()
    other.advance(1)
    matcher.rollback(len(generated))
    fresh = TokenRules(VOCAB, only, banned).matcher(EvenTokens if with_grammar else None)
    for made in (matcher, fresh):
        made.advance(2)
    assert matcher._generated == fresh._generated == [2] and other._generated == [*generated, 1]
