"""Drafts from n-grams against a search through the whole text, and how many are tried."""

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llama.engine.ngrams import FIRST_PAUSE, LONGEST_PAUSE, DraftLength, Match, Ngrams, Text

letters = st.lists(st.integers(0, 2), max_size=30)


def last_follower(tokens: list[int], ngram: list[int], first: int, end: int) -> int | None:
    """Position from `first` on and before `end` of what followed the last occurrence of the n-gram."""
    for at in range(end - 1, first - 1, -1):
        if at >= len(ngram) and tokens[at - len(ngram) : at] == ngram:
            return at
    return None


def brute_force(prompt, outputs, expected, sizes, count) -> tuple[int, list[int]] | None:
    """Size of the match and the drafts."""
    tokens = prompt + outputs
    behind = prompt[-sizes[-1] :] + (expected or [])
    num_context = len(behind) - len(expected or [])
    for size in reversed(sizes):
        ngram = tokens[-size:]
        if size > len(tokens):
            continue
        at = last_follower(tokens, ngram, len(prompt), len(tokens))
        if at is None and expected is not None:
            at = last_follower(behind, ngram, num_context, len(behind))
            if at is not None:
                return size, behind[at : at + count]
        if at is None:
            at = last_follower(tokens, ngram, 0, len(prompt))
        if at is not None:
            copied = list(tokens)
            for i in range(count):
                copied.append(copied[at + i])
            return size, copied[len(tokens) :]
    return None


@given(
    prompt=letters.filter(bool),
    outputs=letters,
    expected=st.none() | letters,
    shortest=st.integers(1, 4),
    more=st.integers(0, 3),
    count=st.integers(1, 9),
)
def test_drafts_are_those_of_a_search_through_the_whole_text(prompt, outputs, expected, shortest, more, count):
    sizes = range(shortest, shortest + more + 1)
    shared = Text(prompt, sizes)
    hoped = None if expected is None else Text(prompt[-sizes[-1] :] + expected, sizes, skip=len(prompt[-sizes[-1] :]))
    written: list[int] = []
    ngrams = Ngrams(shared, written, 4, hoped)
    for i in range(len(outputs) + 1):
        match = ngrams.find()
        wanted = brute_force(prompt, written, expected, sizes, count)
        assert (match is None) == (wanted is None)
        if match is not None:
            assert (match.size, ngrams.copy(match, count)) == wanted
        written += outputs[i : i + 1]


def test_an_answer_that_repeats_itself_is_drafted_beyond_its_end():
    outputs = [7, 8, 9, 7, 8]
    ngrams = Ngrams(Text([1, 2], range(1, 3)), outputs, 8)
    assert ngrams.copy(ngrams.find(), 7) == [9, 7, 8, 9, 7, 8, 9]


def test_completions_share_the_index_of_their_prompt():
    prompt = Text([random.Random(0).randrange(50) for _ in range(200)], range(1, 5))
    first, second = Ngrams(prompt, [], 4), Ngrams(prompt, [], 4)
    first.find()
    followers = prompt.followers
    second.find()
    assert prompt.followers is followers and first._own is not second._own


class Counting(list):
    """A list that counts what is read of it."""

    num_reads = 0

    def __getitem__(self, at):
        Counting.num_reads += 1 if isinstance(at, int) else len(range(*at.indices(len(self))))
        return super().__getitem__(at)


def test_the_work_per_token_does_not_grow_with_the_text():
    pick = random.Random(1)
    prompt = Text([pick.randrange(3) for _ in range(100_000)], range(1, 5))
    prompt.followers  # noqa: B018  made once
    prompt.token_ids = Counting(prompt.token_ids)
    outputs = Counting()
    ngrams = Ngrams(prompt, outputs, 4)
    for _ in range(1000):
        outputs.append(pick.randrange(3))
        Counting.num_reads = 0
        ngrams.copy(ngrams.find(), 4)
        assert Counting.num_reads <= 6


def test_the_number_of_drafts_follows_what_became_of_them():
    length = DraftLength(4, 3)
    assert length.at(10) == 3 and DraftLength(4, 9).at(10) == 4
    length.learn(20, 4, 1)
    assert length.at(20) == 2
    length.learn(30, 2, 2)
    assert length.at(30) == 4
    length.learn(40, 4, 4)
    assert length.at(40) == 4


def test_after_drafts_in_vain_there_is_a_pause_that_doubles_and_is_the_first_again_when_two_are_right():
    length, at, pauses = DraftLength(4, 4), 10, []
    for _ in range(9):
        length.learn(at, length.at(at), 0)
        resumes = next(n for n in range(at, at + 1000) if length.at(n))
        pauses.append(resumes - at)
        assert length.at(resumes) == 1
        at = resumes
    assert pauses == [4, 8, 16, 32, 64, 64, 64, 64, 64] and (pauses[0], pauses[-1]) == (FIRST_PAUSE, LONGEST_PAUSE)
    length.learn(at, 1, 1)  # one that is right
    assert length.at(at) == 3
    length.learn(at, 3, 0)
    assert [length.at(at + n) for n in (63, 64)] == [0, 1]
    length.learn(at + 64, 1, 1)
    length.learn(at + 64, 3, 2)
    length.learn(at + 64, 3, 0)
    assert [length.at(at + 64 + n) for n in (3, 4)] == [0, 1]


@pytest.mark.parametrize("count", [1, 5])
def test_a_match_in_what_is_expected_is_copied_up_to_its_end(count):
    expected = Text([5, 6, 1, 2, 3], range(1, 3), skip=2)
    ngrams = Ngrams(Text([5, 6], range(1, 3)), [1], 4, expected)
    match = ngrams.find()
    assert match == Match(2, 3, expected) and ngrams.copy(match, count) == [2, 3][:count]
