"""StepRecord: a step while it is put together, and what is remembered of it until its result is there."""

import logging
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np

from llama.engine.adapters import Adapter
from llama.engine.ngrams import Match
from llama.engine.plan import LAST_SAMPLED, NO_COPIES, Array, Guided, Ints, Join, Plan, Processed, entry_of
from llama.engine.running import Running
from llama.engine.sequence import Sequence
from llama.kernels.logprobs import Logprobs

logger = logging.getLogger(__name__)


class Chunk(NamedTuple):
    """Known tokens of one sequence that a step computes."""

    sequence: Sequence
    row: int
    start: int  # position of the first
    token_ids: Ints
    samples: list[Sequence]  # they draw from the last token's logits; none if more known tokens follow
    score_from: int  # tokens of the prompt at these positions are to be scored
    score_to: int

    @property
    def stop(self) -> int:
        return self.start + len(self.token_ids)


class Run(NamedTuple):
    """The last token of a sequence that decodes, and drafts of what follows: computed together, and a token drawn
    behind each. Those up to the first that is not the next draft are what the sequence gets."""

    sequence: Sequence
    row: int
    start: int  # position of the last token
    token_ids: Ints  # [1 + drafts]
    masks: list[Ints]  # of its grammar, for each token drawn; none without a grammar
    match: Match | None  # None = a draft model's


@dataclass(slots=True)
class StepRecord:
    number: int
    decodes: list[Sequence] = field(default_factory=list)
    chunks: list[Chunk] = field(default_factory=list)
    runs: list[Run] = field(default_factory=list)
    published: list[int] = field(default_factory=list)  # blocks that enter the prefix cache before they are computed
    joins: list[Join] = field(default_factory=list)
    copies: list[tuple[int, int]] = field(default_factory=list)
    samples: list[Sequence] = field(default_factory=list)  # one per drawn token; those of `runs` come last
    without_mask: set[int] = field(default_factory=set)  # samples whose matcher failed: nothing drawn for them counts
    captured: dict[Sequence, Mapping[str, Any]] = field(default_factory=dict)  # of runs, until it is handed out
    num_departures: int = 0  # when it was scheduled; later ones mean that rows may have changed hands

    @property
    def members(self) -> list[Sequence]:
        """Every sequence of the step that the queue knows, once."""
        of_chunks = (chunk.sequence.leader or chunk.sequence for chunk in self.chunks)
        return list(dict.fromkeys([*self.samples, *of_chunks]))

    @property
    def num_samples_before_runs(self) -> int:
        return len(self.samples) - sum(len(run.token_ids) for run in self.runs)

    @property
    def num_tokens(self) -> int:
        parts: list[Chunk | Run] = [*self.chunks, *self.runs]
        return len(self.decodes) + sum(len(part.token_ids) for part in parts)

    def join(self, sequence: Sequence) -> None:
        """The sequence has just been given its row."""
        outputs = sequence.output_token_ids.copy()
        self.joins.append(Join(sequence.row, sequence.params, sequence.seed, sequence.prompt, outputs))

    def plan(
        self,
        running: Running,
        adapters: tuple[Adapter, ...],
        rows: Ints,
        constants: dict[str, Ints],
        mask_words: int,
    ) -> Plan:
        """The plan of `decodes`, whose rows are `rows`, and `chunks`. `adapters` are those that some sequence uses;
        `constants`: see `decode_constants`."""
        contexts = running.computed[rows] + 1
        self.samples = self.decodes
        num_scored = -1
        guided: tuple[Guided, ...] = ()
        if not self.chunks and not self.runs:
            own = {"rows": rows, "context_lens": contexts, "sample_rows": rows, "sample_positions": contexts}
            arrays = constants | own
        else:
            self.samples = [*self.decodes, *(sequence for chunk in self.chunks for sequence in chunk.samples)]
            self.samples += [run.sequence for run in self.runs for _ in run.token_ids]
            arrays = _flatten(rows, contexts, self.chunks, self.runs)
            guided = self._guided(arrays["query_lens"])
            if scored := [chunk for chunk in self.chunks if chunk.score_to > chunk.score_from]:
                arrays |= _scored(self.chunks, arrays["query_lens"][len(rows) :][: len(self.chunks)], len(rows))
                num_scored = max(chunk.sequence.params.prompt_logprobs or 0 for chunk in scored)
        if adapters:
            arrays["adapter_indices"] = running.adapter_indices[arrays["rows"]]
        if running.num_watched and (masks := self._masks(mask_words)) is not None:
            arrays["masks"] = masks
        return Plan(
            step=self.number,
            num_decodes=len(rows),
            table_updates=running.take_updates(),
            copies=np.array(self.copies, np.int32) if self.copies else NO_COPIES,
            joins=tuple(self.joins),
            adapters=adapters,
            num_prompt_logprobs=num_scored,
            processed=self._processed() if running.num_watched else (),
            guided=guided,
            taps=self._taps() if running.num_tapped else (),
            **arrays,
        )

    def take_scores(self, scores: Logprobs[Array]) -> None:
        """Give the log-probabilities of their prompts' tokens to the sequences."""
        row = 0
        for chunk in self.chunks:
            sequence = chunk.sequence
            for position in range(chunk.score_from, chunk.score_to):
                if sequence.prompt_logprobs is not None:
                    num_top = sequence.params.prompt_logprobs or 0
                    token = int(sequence.prompt[position])
                    sequence.prompt_logprobs.append(entry_of(sequence.params)(scores, row, token, num_top))
                row += 1

    def hand_out(self, plan: Plan, captured: Mapping[int, Mapping[str, Any]]) -> None:
        """Give the sequences what was captured for them; those of `runs` get theirs by `hand_out_run`."""
        computed = self.computed if captured else []
        for i, values in captured.items():
            number = plan.taps[i][0]
            sequence = computed[number]
            if number >= len(computed) - len(self.runs):
                self.captured[sequence] = values
            elif sequence.taps is not None and not sequence.finished:
                sequence.taps.take(sequence.index, values)

    def hand_out_run(self, run: Run, num_tokens: int) -> None:
        """As far as the drafts of a run were right: it has given `num_tokens`."""
        sequence = run.sequence
        if sequence.taps is not None and sequence in self.captured:
            sequence.taps.take(sequence.index, self.captured[sequence], run.start + num_tokens)

    @property
    def computed(self) -> list[Sequence]:
        """The sequence of each of the plan's."""
        return [*self.decodes, *(chunk.sequence for chunk in self.chunks), *(run.sequence for run in self.runs)]

    def _taps(self) -> tuple[tuple[int, Any], ...]:
        return tuple((i, s.taps.sequence) for i, s in enumerate(self.computed) if s.taps is not None)

    def _processed(self) -> tuple[Processed, ...]:
        return tuple(
            Processed(i, s.request_id, functions, s.prompt, s.output_token_ids.copy())
            for i, s in enumerate(self.samples)
            if (functions := s.params.logits_processors)
        )

    def _guided(self, query_lens: Ints) -> tuple[Guided, ...]:
        if all(chunk.sequence.leader is None for chunk in self.chunks):
            return ()
        last_tokens = dict(zip(self.computed, (np.cumsum(query_lens) - 1).tolist(), strict=True))
        return tuple(
            Guided(i, last_tokens[s.negative], s.params.guidance_scale or 0.0)
            for i, s in enumerate(self.samples)
            if s.negative is not None
        )

    def _masks(self, mask_words: int) -> Ints | None:
        if all(sequence.matcher is None for sequence in self.samples):
            return None
        masks = np.full((len(self.samples), mask_words), -1, np.int32)
        for i, sequence in enumerate(self.samples[: self.num_samples_before_runs]):
            if sequence.matcher is not None:
                try:
                    sequence.matcher.fill_mask(masks[i])
                except Exception:  # a matcher is the caller's: see the scheduler, which ends its sequence alone
                    logger.exception("a grammar broke off")
                    self.without_mask.add(i)
        start = self.num_samples_before_runs
        for run in self.runs:
            if run.masks:
                masks[start : start + len(run.token_ids)] = run.masks
            start += len(run.token_ids)
        return masks


def decode_constants(count: int) -> dict[str, Ints]:
    """What a plan of `count` decodes and nothing else always holds."""
    lens, token_ids = np.ones(count, np.int32), np.full(count, LAST_SAMPLED, np.int32)
    return {"query_lens": lens, "token_ids": token_ids, "sample_sources": np.arange(count, dtype=np.int32)}


def _flatten(rows: Ints, contexts: Ints, chunks: list[Chunk], runs: list[Run]) -> dict[str, Ints]:
    count = len(rows)
    known: list[Chunk | Run] = [*chunks, *runs]
    lens = np.ones(count + len(known), np.int32)
    lens[count:] = [len(part.token_ids) for part in known]
    stops = np.array([part.start + len(part.token_ids) for part in known], np.int32)
    contexts = np.concatenate([contexts, stops])
    last_tokens = np.cumsum(lens, dtype=np.int32) - 1
    drawn = [(sequence.row, count + i) for i, chunk in enumerate(chunks) for sequence in chunk.samples]
    drawn_rows, drawn_seqs = np.array(drawn, np.int32).reshape(-1, 2).T
    sample_seqs = np.concatenate([np.arange(count, dtype=np.int32), drawn_seqs])
    arrays = {
        "rows": np.concatenate([rows, np.array([part.row for part in known], np.int32)]),
        "query_lens": lens,
        "context_lens": contexts,
        "token_ids": np.concatenate([np.full(count, LAST_SAMPLED, np.int32), *(part.token_ids for part in known)]),
        "sample_rows": np.concatenate([rows, drawn_rows]),
        "sample_sources": last_tokens[sample_seqs],
        "sample_positions": contexts[sample_seqs],
    }
    if runs:
        arrays["drafts"] = np.full(len(arrays["sample_rows"]), -1, np.int32)
        for name, drawn_behind in _drawn_behind(runs, int(lens.sum())).items():
            arrays[name] = np.concatenate([arrays[name], drawn_behind])
    return arrays


def _drawn_behind(runs: list[Run], num_tokens: int) -> dict[str, Ints]:
    """The samples of runs whose tokens are the last ones of `num_tokens`."""
    lens = [len(run.token_ids) for run in runs]
    drafts = np.concatenate([np.append(run.token_ids[1:], -1) for run in runs])
    positions = np.concatenate([run.start + 1 + np.arange(len(run.token_ids)) for run in runs])
    return {
        "sample_rows": np.repeat([run.row for run in runs], lens).astype(np.int32),
        "sample_sources": np.arange(num_tokens - sum(lens), num_tokens, dtype=np.int32),
        "sample_positions": positions.astype(np.int32),
        "drafts": drafts.astype(np.int32),
    }


def _scored(chunks: list[Chunk], lens: Ints, num_before: int) -> dict[str, Ints]:
    """Where the logits of each token to be scored are (one token before it), and which token that is."""
    firsts = num_before + np.cumsum(lens) - lens
    scored = [
        (chunk, int(first)) for chunk, first in zip(chunks, firsts, strict=True) if chunk.score_to > chunk.score_from
    ]
    positions = [first - chunk.start - 1 + np.arange(chunk.score_from, chunk.score_to) for chunk, first in scored]
    targets = [chunk.sequence.prompt[chunk.score_from : chunk.score_to] for chunk, _ in scored]
    return {
        "prompt_sources": np.concatenate(positions).astype(np.int32),
        "prompt_targets": np.concatenate(targets),
    }
