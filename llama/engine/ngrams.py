"""Drafts from text that has been seen: what followed the last tokens when they occurred before. Runs without torch.

The longest n-gram at the end of a sequence that occurred before wins; of its occurrences the last one in the answer,
else in the text that the caller expects, else in the prompt. A token costs one dictionary entry per size of n-gram, and
a look-up as many reads, however long the texts are.
"""

from collections.abc import Iterable
from functools import cached_property
from typing import NamedTuple

Ngram = tuple[int, ...]
Followers = dict[Ngram, int]  # n-gram -> position of what followed its last occurrence

FIRST_PAUSE, LONGEST_PAUSE = 4, 64


class DraftLength:
    """How many drafts to try, by what became of the last ones: at most `most`, two more than before when all were
    right, else one more than were right; `first` at first. Where none was right, none is tried for a pause of some
    tokens: FIRST_PAUSE, then twice as many each time, up to LONGEST_PAUSE. One right draft halves the next pause, two
    make it the first again. Counts alone decide, never a clock: the same requests get the same drafts."""

    def __init__(self, most: int, first: int) -> None:
        self._most, self._length = most, min(most, first)
        self._pause = 0
        self._resumes_at = 0  # number of tokens of the sequence

    def at(self, num_tokens: int) -> int:
        """Drafts to try behind so many tokens."""
        return self._length if num_tokens >= self._resumes_at else 0

    def learn(self, num_tokens: int, drafted: int, accepted: int) -> None:
        """So many drafts were right; the sequence has `num_tokens` by now."""
        if accepted == 0:
            self._pause = min(max(FIRST_PAUSE, 2 * self._pause), LONGEST_PAUSE)
            self._resumes_at = num_tokens + self._pause
        else:
            self._pause = self._pause // 2 if accepted == 1 else 0
        self._length = min(self._most, accepted + (2 if accepted == drafted else 1))


class Text:
    """Tokens that stay as they are. The first `skip` are context alone: nothing is copied from them."""

    def __init__(self, token_ids: Iterable[int], sizes: range, skip: int = 0) -> None:
        self.token_ids = list(token_ids)
        self.sizes = sizes
        self._skip = skip

    @cached_property
    def followers(self) -> dict[int, Followers]:
        """By the size of the n-gram; made when it is first asked for."""
        tokens, count = self.token_ids, len(self.token_ids)
        found = {}
        for size in self.sizes:
            first = max(0, self._skip - size)
            ngrams = zip(*(tokens[first + i :] for i in range(size)), strict=False)
            found[size] = dict(zip(ngrams, range(first + size, count), strict=False))
        return found


class Match(NamedTuple):
    size: int
    at: int  # position of what followed
    text: Text | None  # that the position is in; None = prompt and answer


class Ngrams:
    """One sequence's source of drafts. `outputs` is the list that its tokens are appended to."""

    def __init__(self, prompt: Text, outputs: list[int], most: int, expected: Text | None = None) -> None:
        """`expected`: the text that the answer may be like, behind the prompt's last tokens."""
        # The shorter the n-gram, the less its having been seen says.
        self.lengths = {size: DraftLength(most, size) for size in prompt.sizes}
        self._prompt, self._expected, self._outputs = prompt, expected, outputs
        self._longest = prompt.sizes[-1]
        self._own: dict[int, Followers] = {size: {} for size in prompt.sizes}
        self._last = prompt.token_ids[-self._longest :]  # tokens before the first output that is not indexed yet
        self._num_indexed = 0

    def find(self) -> Match | None:
        """Where the longest n-gram at the end has been seen before."""
        self._index_outputs()
        texts: list[tuple[dict[int, Followers], Text | None]] = [(self._own, None)]
        if self._expected is not None:
            texts.append((self._expected.followers, self._expected))
        texts.append((self._prompt.followers, None))
        for size in range(min(self._longest, len(self._last)), self._prompt.sizes[0] - 1, -1):
            ngram = tuple(self._last[-size:])
            for followers, text in texts:
                at = followers[size].get(ngram)
                if at is not None:
                    return Match(size, at, text)
        return None

    def copy(self, match: Match, count: int) -> list[int]:
        """What followed, at most `count` tokens. Where the answer's own end is reached the copy goes on with itself, as
        a text does that repeats itself."""
        if match.text is not None:
            return match.text.token_ids[match.at : match.at + count]
        prompt, outputs = self._prompt.token_ids, self._outputs
        copied: list[int] = []
        for at in range(match.at, match.at + count):
            if at < len(prompt):
                copied.append(prompt[at])
            elif at - len(prompt) < len(outputs):
                copied.append(outputs[at - len(prompt)])
            else:
                copied.append(copied[at - len(prompt) - len(outputs)])
        return copied

    def _index_outputs(self) -> None:
        for i in range(self._num_indexed, len(self._outputs)):
            for size, followers in self._own.items():
                if size <= len(self._last):
                    followers[tuple(self._last[-size:])] = len(self._prompt.token_ids) + i
            self._last = [*self._last, self._outputs[i]][-self._longest :]
        self._num_indexed = len(self._outputs)
