"""Sequence: one completion of a request on its way through the engine, and what it holds. Runs without torch.

Sequence is the only mutable state of a request, and the scheduler owns it. Everything else here is a value.
"""

import logging
from collections.abc import Collection
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from llama.api.outputs import FinishReason
from llama.api.params import SamplingParams
from llama.engine.adapters import NO_ADAPTER, Adapter
from llama.engine.blocks import NO_SALT, Salt
from llama.engine.ngrams import DraftLength, Ngrams
from llama.engine.request import Taps, TokenMatcher

logger = logging.getLogger(__name__)

BROKEN_GRAMMAR = "grammar"  # the stop_reason of an error: the grammar exceeded a limit while it ran
BROKEN_PROCESSOR = "logits_processors"  # one of them raised, or gave no logits


@dataclass(slots=True)
class TokenOutput:
    """What one step adds to one completion; the token that ended it (end of text, stop id) is in `token_ids`. Behind
    drafts there may be several: all but the last are drafts that were right.

    Not frozen: hundreds are made in every step, and a frozen dataclass costs four times as much to make.
    """

    request_id: str
    index: int
    token_ids: list[int]
    logprobs: list[Any] | None = None  # a dict token id -> Logprob for each token, or a FlatEntry
    finish_reason: FinishReason | None = None
    # The id of stop_token_ids that ended it, BROKEN_GRAMMAR or BROKEN_PROCESSOR with an error; None for the model's
    # own end.
    stop_reason: int | str | None = None
    prompt_logprobs: list[Any] | None = (
        None  # the same or None for each of the prompt's; with the first output of index 0 only
    )
    num_cached_tokens: int = 0
    num_draft_tokens: int = 0  # that were verified for it
    num_prediction_tokens: int = 0  # those of them that come from the prediction
    scheduled: float | None = field(default=None, compare=False)  # see Sequence; with the first output at the latest

    def followed_by(self, next: "TokenOutput") -> "TokenOutput":
        """This one, which ended nothing, and the next one in one."""
        self.token_ids += next.token_ids
        self.logprobs = None if self.logprobs is None else self.logprobs + (next.logprobs or [])
        self.finish_reason, self.stop_reason = next.finish_reason, next.stop_reason
        return self


@dataclass(slots=True, eq=False)
class Sequence:
    """One completion of a request on its way through the engine. The scheduler alone changes it.

    It waits (row -1), runs (it owns a row and its blocks), and may be sent back to wait; in the end it is finished.
    """

    request_id: str
    index: int
    arrival: int  # requests of one priority are served in this order
    params: SamplingParams
    seed: int
    prompt: NDArray[np.int32]  # shared by all completions of the request
    limit: int  # the most tokens, prompt included
    adapter: Adapter = NO_ADAPTER
    matcher: TokenMatcher | None = None
    taps: Taps | None = None  # shared by all completions of the request
    followers: "list[Sequence]" = field(default_factory=list)  # they fork from this one once its prompt is computed
    # Guidance: the same tokens behind the negative prompt. It runs where its leader runs, draws nothing, and the queue
    # does not know it.
    negative: "Sequence | None" = None
    leader: "Sequence | None" = None  # of a negative one

    output_token_ids: list[int] = field(default_factory=list)
    ngrams: Ngrams | None = None  # where its drafts come from; None = not from there
    draft_length: DraftLength | None = None  # how many to ask a draft model for; None = none
    num_draft_computed: int = 0  # its first tokens whose K and V the draft model has
    prompt_logprobs: list[Any] | None = None  # gathered so far; None once handed out or not asked
    num_cached_tokens: int = -1  # -1 = it has never run
    scheduled: float | None = None  # when it was first let in, in seconds of `time.monotonic()`
    row: int = -1
    ready_after: int = -1  # the step whose result must be known before the sequence may run again
    finished: bool = False

    @property
    def speculates(self) -> bool:
        """It may have drafts."""
        return self.ngrams is not None or self.draft_length is not None

    @property
    def needs_last_token(self) -> bool:
        """The host must know its last token before it draws the next one."""
        return self.matcher is not None or bool(self.params.logits_processors)

    @property
    def contexts(self) -> "tuple[Sequence, ...]":
        """What is computed for it: itself, and the one that guides it."""
        return (self,) if self.negative is None else (self, self.negative)

    def guide(self, prompt: NDArray[np.int32]) -> None:
        """Draw its tokens by the logits behind this prompt too."""
        limit = len(prompt) + self.limit - len(self.prompt)
        negative = Sequence(self.request_id, 1, self.arrival, self.params, self.seed, prompt, limit, self.adapter)
        negative.output_token_ids, negative.leader, self.negative = self.output_token_ids, self, negative

    @property
    def order(self) -> tuple[int, int, int]:
        """Who runs first, and in the reverse order who has to go back to wait."""
        return (self.params.priority, self.arrival, self.index)

    def salt(self, block_size: int) -> Salt:
        """What its changes of activations mean for the prefix cache."""
        if self.taps is None or not self.taps.salt:
            return NO_SALT
        return Salt(int(self.taps.first_change) // block_size, self.taps.salt)

    @property
    def num_tokens(self) -> int:
        """Tokens known so far."""
        return len(self.prompt) + len(self.output_token_ids)

    def tokens_between(self, start: int, stop: int) -> NDArray[np.int32]:
        """The known tokens at positions start : stop."""
        split = len(self.prompt)
        if stop <= split:
            return self.prompt[start:stop]
        outputs = np.array(self.output_token_ids[max(0, start - split) : stop - split], np.int32)
        return np.concatenate([self.prompt[start:split], outputs]) if start < split else outputs

    def advance(self, token: int) -> bool:
        """Tell the matcher -> False if it cannot go on, which is the end of this sequence and of no other."""
        if self.matcher is None:
            return True
        try:
            self.matcher.advance(token)
        except Exception:  # a matcher is the caller's: whatever it raises is its own sequence's end, and logged
            logger.exception("a grammar broke off")
            return False
        return True

    def ending(self, eos_token_ids: Collection[int]) -> tuple[FinishReason | None, int | None]:
        """Whether the last token ended the sequence, and the id of `stop_token_ids` that did it."""
        token, params = self.output_token_ids[-1], self.params
        is_long_enough = len(self.output_token_ids) > params.min_tokens
        # With a grammar, EOS comes before min_tokens only where nothing else may.
        if token in eos_token_ids and not params.ignore_eos and (is_long_enough or self.matcher is not None):
            return FinishReason.STOP, None
        if token in params.stop_token_ids and is_long_enough:
            return FinishReason.STOP, token
        return FinishReason.LENGTH if self.num_tokens >= self.limit else None, None

    @property
    def next_to_score(self) -> int:
        """The first position of the prompt whose log-probability is still to be computed; past its end if none is."""
        done = self.prompt_logprobs is None or len(self.prompt_logprobs) >= len(self.prompt)
        return self.limit + 1 if done or self.prompt_logprobs is None else len(self.prompt_logprobs)
