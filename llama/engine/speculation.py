"""Speculation: which decodes of a step get drafts, and what became of them. Decisions over counts; runs without torch.

A draft changes no token: the token behind it is drawn as ever and counts only where the draft is what was drawn before
it. So all that is decided here, rightly or wrongly, costs time and nothing else.
"""

import logging
from collections.abc import Iterable
from collections.abc import Sequence as SequenceOf
from typing import Any, Protocol

import numpy as np

from llama.engine.ngrams import DraftLength, Match, Ngrams, Text
from llama.engine.plan import Ints
from llama.engine.request import TokenMatcher
from llama.engine.running import Running
from llama.engine.sequence import Sequence
from llama.engine.speculative_config import SpeculativeConfig
from llama.engine.step import Run, StepRecord

logger = logging.getLogger(__name__)


class Drafter(Protocol):
    """What makes drafts that are no copies: a DraftModel."""

    def propose(self, asked: list[tuple[Sequence, int]]) -> list[list[int]]:
        """At most so many tokens behind the known ones of each sequence."""


class _Lost:
    """Stands for a matcher that could not be rolled back: the step that would ask it for a mask ends its sequence."""

    def __init__(self, error: Exception) -> None:
        self._error = error

    def fill_mask(self, words: Ints) -> None:
        raise self._error

    def advance(self, token_id: int) -> None:
        raise self._error

    def rollback(self, num_tokens: int) -> None:
        raise self._error

    def fork(self) -> "_Lost":
        return self


class Speculation:
    def __init__(self, config: SpeculativeConfig, running: Running, eos_token_ids: Iterable[int], mask_words: int):
        self._num_drafts = 0
        self._num_draft_tokens = 0
        self._num_accepted_at = [0] * config.num_speculative_tokens  # by the draft's place in its run
        self._running = running
        self._eos_token_ids = frozenset(eos_token_ids)
        self._mask_words = mask_words
        self._most_sequences = config.disable_by_batch_size
        self.draft_model: Drafter | None = None  # asked for all drafts where there is one

    def add_runs(self, step: StepRecord, rows: Ints, budget: int) -> Ints:
        """Make runs of those decodes of the step that have drafts, as far as `budget` tokens and spare blocks go -> the
        rows of the other decodes."""
        if self._most_sequences is not None and len(step.decodes) > self._most_sequences:
            return rows
        asked: dict[Sequence, tuple[int, Match | None]] = {}
        for sequence in step.decodes:
            if sequence.speculates:
                count, match = self._wanted(step, sequence, budget)
                if count > 0:
                    asked[sequence] = count, match
                    budget -= count
        if not asked:
            return rows
        runs = [self._run(sequence, drafts, asked[sequence][1]) for sequence, drafts in self._drafts(asked)]
        step.runs = [run for run in runs if run is not None]
        with_drafts = {run.sequence for run in step.runs}
        others = [i for i, sequence in enumerate(step.decodes) if sequence not in with_drafts]
        self._running.awaited_step[[run.row for run in step.runs]] = step.number
        step.decodes = [step.decodes[i] for i in others]
        return rows[others]

    def _wanted(self, step: StepRecord, sequence: Sequence, budget: int) -> tuple[int, Match | None]:
        """How many drafts to make, for which there are places, and of what."""
        running, row, length, match = self._running, sequence.row, sequence.draft_length, None
        if sequence.ngrams is not None:
            match = sequence.ngrams.find()
            length = None if match is None else sequence.ngrams.lengths[match.size]
        if length is None:
            return 0, None
        start = int(running.computed[row])
        # Behind the last draft a token is drawn too, which may be the last one that the sequence can have.
        count = min(length.at(sequence.num_tokens), int(running.last[row]) - start - 1, budget)
        if count > 0 and sequence.num_tokens != start + 1:  # its last token is still to come: the next step waits
            running.awaited_step[row] = step.number
            return 0, None
        return (running.reserve_drafts(sequence, count) if count > 0 else 0), match

    def _drafts(self, asked: dict[Sequence, tuple[int, Match | None]]) -> Iterable[tuple[Sequence, list[int]]]:
        if self.draft_model is not None:
            drafts = self.draft_model.propose([(sequence, count) for sequence, (count, _) in asked.items()])
            return zip(asked, drafts, strict=True)
        return [
            (sequence, sequence.ngrams.copy(match, count))
            for sequence, (count, match) in asked.items()
            if sequence.ngrams is not None and match is not None
        ]

    def _run(self, sequence: Sequence, drafts: list[int], match: Match | None) -> Run | None:
        """None where no draft is left that can be right."""
        row, start = sequence.row, sequence.num_tokens - 1
        drafts = self._before_an_end(sequence, drafts)
        masks: list[Ints] = []
        if sequence.matcher is not None:
            drafts, masks = self._allowed(sequence, sequence.matcher, drafts)
        if not drafts:
            self._running.shrink(sequence, start + 1)
            return None
        token_ids = np.concatenate([sequence.tokens_between(start, start + 1), np.array(drafts, np.int32)])
        return Run(sequence, row, start, token_ids, masks, match)

    def _before_an_end(self, sequence: Sequence, drafts: list[int]) -> list[int]:
        """Behind a token that ends the sequence nothing comes, and it is drawn without being a draft as well."""
        params = sequence.params
        for place, token in enumerate(drafts):
            if token in params.stop_token_ids or (token in self._eos_token_ids and not params.ignore_eos):
                return drafts[:place]
        return drafts

    def _allowed(self, sequence: Sequence, matcher: TokenMatcher, drafts: list[int]) -> tuple[list[int], list[Ints]]:
        """The drafts before the first that the grammar forbids, and its masks before each and behind the last. The
        matcher stays where it is."""
        masks: list[Ints] = []
        num_advanced = 0
        try:
            for draft in [*drafts, None]:
                mask = np.zeros(self._mask_words, np.int32)
                matcher.fill_mask(mask)
                masks.append(mask)
                if draft is None or not mask[draft >> 5] >> (draft & 31) & 1:
                    break
                matcher.advance(draft)
                num_advanced += 1
        except Exception:  # the caller's: it ends its sequence if the text gets that far, and is logged then
            logger.debug("a grammar broke off over a draft", exc_info=True)
        try:
            matcher.rollback(num_advanced)
        except Exception as error:
            sequence.matcher = _Lost(error)
            return [], []
        return drafts[: max(0, len(masks) - 1)], masks

    def learn(self, run: Run, num_tokens: int) -> None:
        """What a run gave: all but the last of its tokens were drafts."""
        drafted, accepted = len(run.token_ids) - 1, max(0, num_tokens - 1)
        sequence, length = run.sequence, run.sequence.draft_length
        if sequence.ngrams is not None and run.match is not None:
            length = sequence.ngrams.lengths[run.match.size]
        assert length is not None
        length.learn(sequence.num_tokens, drafted, accepted)
        # It has not computed its last draft. What it has computed of wrong ones is computed again.
        sequence.num_draft_computed += min(accepted, drafted - 1) if run.match is None else 0
        self._num_drafts += 1
        self._num_draft_tokens += drafted
        for place in range(accepted):
            self._num_accepted_at[place] += 1

    def counts(self) -> dict[str, Any]:
        """These fields of EngineMetrics."""
        return {
            "num_drafts": self._num_drafts,
            "num_draft_tokens": self._num_draft_tokens,
            "num_accepted_tokens": sum(self._num_accepted_at),
            "num_accepted_tokens_per_pos": tuple(self._num_accepted_at),
        }


def let_speculate(sequences: list[Sequence], config: SpeculativeConfig, prediction_token_ids: SequenceOf[int]) -> None:
    """Give each sequence of a request its source of drafts."""
    if config.method == "draft_model":
        for sequence in sequences:
            sequence.draft_length = DraftLength(config.num_speculative_tokens, config.num_speculative_tokens)
        return
    sizes = range(config.prompt_lookup_min, config.prompt_lookup_max + 1)
    prompt, expected = Text(sequences[0].prompt.tolist(), sizes), None
    if prediction_token_ids:
        context = prompt.token_ids[-config.prompt_lookup_max :]
        expected = Text([*context, *prediction_token_ids], sizes, skip=len(context))
    for sequence in sequences:
        most = config.num_speculative_tokens
        sequence.ngrams = Ngrams(prompt, sequence.output_token_ids, most, expected)
