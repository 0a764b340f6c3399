"""Speculation: which decodes of a step get drafts, and what became of them. Decisions over counts; runs without torch.

A draft changes no token: the token behind it is drawn as ever and counts only where the draft is what was drawn before
it. So all that is decided here, rightly or wrongly, costs time and nothing else.
"""

import logging
from collections.abc import Iterable
from typing import Any

import numpy as np

from llama.engine.plan import Ints
from llama.engine.request import TokenMatcher
from llama.engine.running import Running
from llama.engine.sequence import Sequence
from llama.engine.speculative_config import SpeculativeConfig
from llama.engine.step import Run, StepRecord

logger = logging.getLogger(__name__)


class Speculation:
    def __init__(self, config: SpeculativeConfig, running: Running, eos_token_ids: Iterable[int], mask_words: int):
        self._num_drafts = 0
        self._num_draft_tokens = 0
        self._num_accepted_at = [0] * config.num_speculative_tokens  # by the draft's place in its run
        self._running = running
        self._eos_token_ids = frozenset(eos_token_ids)
        self._mask_words = mask_words
        self._most_sequences = config.disable_by_batch_size

    def add_runs(self, step: StepRecord, rows: Ints, budget: int) -> Ints:
        """Make runs of those decodes of the step that have drafts, as far as `budget` tokens and spare blocks go -> the
        rows of the other decodes."""
        if self._most_sequences is not None and len(step.decodes) > self._most_sequences:
            return rows
        others = []
        for i, sequence in enumerate(step.decodes):
            run = None if sequence.ngrams is None else self._run(step, sequence, budget)
            if run is None:
                others.append(i)
            else:
                step.runs.append(run)
                budget -= len(run.token_ids) - 1
        if step.runs:
            step.decodes = [step.decodes[i] for i in others]
            rows = rows[others]
        return rows

    def _run(self, step: StepRecord, sequence: Sequence, budget: int) -> Run | None:
        running, row, ngrams = self._running, sequence.row, sequence.ngrams
        assert ngrams is not None
        match = ngrams.find()
        if match is None:
            return None
        start = int(running.computed[row])
        # Behind the last draft a token is drawn too, which may be the last one that the sequence can have.
        count = min(ngrams.lengths[match.size].at(sequence.num_tokens), int(running.last[row]) - start - 1, budget)
        if count <= 0:
            return None
        if sequence.num_tokens != start + 1:  # its last token is still to come: the next step waits for it
            running.awaited_step[row] = step.number
            return None
        drafts = self._before_an_end(sequence, ngrams.copy(match, count))
        masks: list[Ints] = []
        if sequence.matcher is not None:
            drafts, masks = self._allowed(sequence.matcher, drafts)
        drafts = drafts[: running.reserve_drafts(sequence, len(drafts))] if drafts else []
        if not drafts:
            return None
        running.awaited_step[row] = step.number
        last_token = sequence.tokens_between(start, start + 1)
        token_ids = np.concatenate([last_token, np.array(drafts, np.int32)])
        return Run(sequence, row, start, token_ids, masks[: len(token_ids)], match)

    def _before_an_end(self, sequence: Sequence, drafts: list[int]) -> list[int]:
        """Behind a token that ends the sequence nothing comes, and it is drawn without being a draft as well."""
        params = sequence.params
        for place, token in enumerate(drafts):
            if token in params.stop_token_ids or (token in self._eos_token_ids and not params.ignore_eos):
                return drafts[:place]
        return drafts

    def _allowed(self, matcher: TokenMatcher, drafts: list[int]) -> tuple[list[int], list[Ints]]:
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
        except Exception:
            logger.exception("a grammar broke off")
            return [], []
        return drafts[: max(0, len(masks) - 1)], masks

    def learn(self, run: Run, num_tokens: int) -> None:
        """What a run gave: all but the last of its tokens were drafts."""
        drafted, accepted = len(run.token_ids) - 1, max(0, num_tokens - 1)
        assert run.sequence.ngrams is not None
        run.sequence.ngrams.lengths[run.match.size].learn(run.sequence.num_tokens, drafted, accepted)
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
