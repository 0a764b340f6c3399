"""Where one sequence stands in its grammar. Its Sequence owns it; it lives through preemption."""

import re
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Self

import numpy as np
from numpy.typing import NDArray

from llama.api.errors import panics_caught

if TYPE_CHECKING:
    from llguidance import LLMatcher


# What llguidance puts before a message: a place in the grammar that we wrote, and the whole of a regex.
_PLACE = re.compile(r'at \d+\(\d+\): (?:failed to compile JSON schema: |invalid regex ".*" \(in regex\): )?', re.DOTALL)
_BYTES_PER_BYTE = 1000  # of a grammar's source, once it has run
_BYTES_PER_SECOND = 2**27  # of making states
_MOST_STATES_BYTES = 2**25  # what MAX_STATES of them take
_USUAL_SECONDS = 0.0002  # of a mask whose states are there already
_SOURCE_LINE = re.compile(r"\n *\d+ \| |; following special tokens are available: ")


class GrammarError(RuntimeError):
    """A token that the mask forbids was advanced over, or the grammar exceeded a limit while it ran."""


@dataclass(slots=True, eq=False, weakref_slot=True)
class Automaton:
    """What a grammar and all its matchers hold. States are made when a text first needs them, and stay."""

    source_bytes: int
    seconds: float = 0.0  # of processor time in which states may have been made

    @property
    def nbytes(self) -> int:
        """About what it takes, rather more: llguidance does not say."""
        states = min(_MOST_STATES_BYTES, int(self.seconds * _BYTES_PER_SECOND))
        return _BYTES_PER_BYTE * self.source_bytes + states


class Matcher:
    """Follows the tokens of one sequence and says which may come next.

    A finished grammar allows EOS alone; tokens advanced over after its end are counted and otherwise ignored.
    """

    def __init__(self, matcher: "LLMatcher", vocab_size: int, automaton: Automaton) -> None:
        self._matcher = matcher
        self._automaton = automaton
        self._words = (vocab_size + 31) // 32
        self._after_end = 0

    def fill_mask(self, row: NDArray[np.int32]) -> None:
        """Sets bit t of `row` (int32 [ceil(vocab_size / 32)], contiguous) where token t may come next."""
        if row.dtype != np.int32 or row.shape != (self._words,) or not row.flags.c_contiguous:
            raise ValueError(f"row must be contiguous int32 [{self._words}], got {row.dtype} {row.shape}")
        began = time.thread_time()
        with panics_caught("llguidance"):
            self._matcher.unsafe_compute_mask_ptr(row.ctypes.data, row.nbytes)
        self._automaton.seconds += max(0.0, time.thread_time() - began - _USUAL_SECONDS)
        self._check()

    def advance(self, token_id: int) -> None:
        """Raises GrammarError for a token that the mask forbids."""
        if self._matcher.is_stopped():
            self._check()
            self._after_end += 1
            return
        with panics_caught("llguidance"):
            taken = self._matcher.consume_token(token_id)
        if not taken:
            self._check()

    def takes(self, token_id: int) -> bool:
        """Whether this token may come next."""
        return bool(self._matcher.validate_tokens([token_id]))

    def rollback(self, num_tokens: int) -> None:
        """Takes the last tokens back."""
        ignored = min(num_tokens, self._after_end)
        self._after_end -= ignored
        if num_tokens > ignored and not self._matcher.rollback(num_tokens - ignored):
            self._check()

    def fork(self) -> Self:
        """An independent copy: for another completion of the same prompt."""
        other = type(self)(self._matcher.deep_copy(), 32 * self._words, self._automaton)
        other._after_end = self._after_end
        return other

    @property
    def is_finished(self) -> bool:
        """Nothing can follow but EOS."""
        return self._matcher.is_stopped() and not self._matcher.is_error()

    @property
    def is_accepting(self) -> bool:
        """The text so far is complete, though more may follow."""
        return self.is_finished or self._matcher.is_accepting()

    def _check(self) -> None:
        if self._matcher.is_error():
            raise GrammarError(told(self._matcher.get_error()))


def told(error: str) -> str:
    """What llguidance's message says, in one line: without the parser's state, and without the source, the carets
    that it draws below it, and the tokens that the worker process has."""
    text = _SOURCE_LINE.split(error.split("<state>")[0].replace("<non-verbose/>", ""))[0]
    place = _PLACE.match(text)
    text = text[place.end() :] if place else text
    title, drawn, sentence = text.rpartition("\nerror: ")
    if drawn and title.startswith("regex parse error:"):
        text = f"invalid regex: {sentence}"
    text = " ".join(text.split())
    return "nothing satisfies it" if text == "NoExtensionBias" else text[:300] or "the grammar failed"
