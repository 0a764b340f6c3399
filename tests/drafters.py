"""Sources of drafts that know the answer: right, wrong, or right for a while. They stand in for a sequence's Ngrams."""

import random
from collections.abc import Callable

from llama.engine.engine import Engine
from llama.engine.ngrams import Match

VOCAB = 97  # of the tiny models


class Always:
    """Stands in for DraftLength: always the most drafts that there may be."""

    def __init__(self, most: int) -> None:
        self.most = most

    def at(self, num_tokens: int) -> int:
        return self.most

    def learn(self, num_tokens: int, drafted: int, accepted: int) -> None:
        assert 0 <= accepted <= drafted


class Drafter:
    """`answer` are the tokens that the sequence will have; `draft(future, count)` makes drafts of those to come."""

    def __init__(self, answer: list[int], draft: Callable[[list[int], int], list[int]]) -> None:
        self.answer, self.draft = answer, draft
        self.outputs: list[int] = []  # the sequence's
        self.lengths: dict[int, Always] = {}

    def find(self) -> Match:
        return Match(1, len(self.outputs), None)

    def copy(self, match: Match, count: int) -> list[int]:
        return self.draft(self.answer[match.at :], count)


def right(future: list[int], count: int) -> list[int]:
    return future[:count]


def wrong(future: list[int], count: int) -> list[int]:
    """Tokens that are not the answer's, also behind its end."""
    padded = [*future, *range(count)][:count]
    return [(token + 1) % VOCAB for token in padded]


class Mixed:
    """Right for a random number of tokens, then wrong; sometimes none."""

    def __init__(self, seed: int = 0) -> None:
        self.random = random.Random(seed)

    def __call__(self, future: list[int], count: int) -> list[int]:
        count = self.random.randint(0, count)
        num_right = self.random.randint(0, count)
        return [*future[:num_right], *wrong(future[num_right:], count - num_right)][:count]


KINDS: dict[str, Callable[[list[int]], Drafter]] = {
    "right": lambda answer: Drafter(answer, right),
    "wrong": lambda answer: Drafter(answer, wrong),
    "mixed": lambda answer: Drafter(answer, Mixed(len(answer))),
}


def use(engine: Engine, drafter_of: Callable[[str, int], Drafter]) -> None:
    """Let each sequence of requests to come draft with drafter_of(request_id, index)."""

    def let_speculate(sequences, config, prediction_token_ids) -> None:
        for sequence in sequences:
            drafter = sequence.ngrams = drafter_of(sequence.request_id, sequence.index)
            drafter.outputs = sequence.output_token_ids
            drafter.lengths = {1: Always(config.num_speculative_tokens)}

    engine._let_speculate = let_speculate
