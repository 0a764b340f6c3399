"""Plan: what one step computes, as flat integer arrays. StepResult: what came of it, as flat arrays too. No torch.

A plan names sequences by their row, a fixed number while they run. Its arrays are never written again: some are shared
by consecutive plans. It does not hold the value of the token that a row sampled last (-1 stands for it), so that it can
be made before that value is known.
"""

from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from llama.api.flat_logprobs import FlatEntry
from llama.api.outputs import Logprob
from llama.api.params import SamplingParams
from llama.engine.adapters import Adapter
from llama.kernels.logprobs import Logprobs

Ints = NDArray[np.int32]
Array = NDArray[Any]
LAST_SAMPLED = -1  # in place of a token id
NO_UPDATES: Ints = np.zeros((3, 0), np.int32)
NO_COPIES: Ints = np.zeros((0, 2), np.int32)


class Join(NamedTuple):
    """A sequence that takes over a row in this step: whatever is kept per row is made anew."""

    row: int
    params: SamplingParams
    seed: int
    prompt: Ints
    output_token_ids: list[int]


class Processed(NamedTuple):
    """A sample whose logits go through functions of its request."""

    sample: int
    request_id: str
    functions: Sequence[Callable[..., Any]]
    prompt: Ints
    output_token_ids: list[int]


class Guided(NamedTuple):
    """A sample whose logits are led away from those behind the token `source`."""

    sample: int
    source: int
    scale: float


class Plan(NamedTuple):
    """One step. Sequences that only decode (one token, the row's last sampled one) come first."""

    step: int
    rows: Ints  # [seqs]
    query_lens: Ints  # [seqs] tokens computed now
    context_lens: Ints  # [seqs] tokens whose K/V exist after the step
    num_decodes: int
    token_ids: Ints  # [tokens] or LAST_SAMPLED
    sample_rows: Ints  # [samples] the row that each drawn token belongs to
    sample_sources: Ints  # [samples] which of the tokens has the logits; completions of one prompt share a source
    sample_positions: Ints  # [samples] position of the token to be drawn
    table_updates: Ints  # [3, updates] row, column, block: what is new in the block tables
    copies: Ints  # [copies, 2] source and target block, copied when the step's K/V are stored
    joins: tuple[Join, ...] = ()
    adapters: tuple[Adapter, ...] = ()  # those that some sequence uses; each is to be loaded at its index
    adapter_indices: Ints | None = None  # [seqs], None if no sequence has an adapter
    # [samples] what a draft expects to be drawn, -1 = no draft does; None if there is none. Sample i + 1 stands behind
    # the draft that sample i has, and means nothing where sample i is another token.
    drafts: Ints | None = None
    masks: Ints | None = None  # [samples, words] grammar bit masks, None if no sample has one
    prompt_sources: Ints | None = None  # [scored] tokens whose successor in the prompt is to be scored
    prompt_targets: Ints | None = None  # [scored] those successors
    num_prompt_logprobs: int = -1  # the most top entries that any of them wants
    processed: tuple[Processed, ...] = ()
    guided: tuple[Guided, ...] = ()
    taps: tuple[tuple[int, Any], ...] = ()  # (sequence of the plan, `Taps.sequence`) where activations are touched

    @property
    def only_decodes(self) -> bool:
        return self.num_decodes == len(self.rows)

    @property
    def num_tokens(self) -> int:
        return len(self.token_ids)


def aligned_runs(query_lens: Ints, context_lens: Ints, most: int) -> tuple[Ints, Ints, Ints]:
    """The new tokens of each sequence in runs of at most `most`, cut at positions that are multiples of it -> the
    sequence of each run, its length, and its context, which ends with it."""
    starts = context_lens - query_lens
    firsts = starts // most
    counts = (context_lens - 1) // most - firsts + 1
    seqs = np.repeat(np.arange(len(counts), dtype=np.int32), counts)
    pieces = firsts[seqs] + np.arange(len(seqs), dtype=np.int32) - np.repeat(np.cumsum(counts) - counts, counts)
    ends = np.minimum((pieces + 1) * most, context_lens[seqs]).astype(np.int32)
    return seqs, ends - np.maximum(pieces * most, starts[seqs]).astype(np.int32), ends


def logprob_entry(found: Logprobs[Array], row: int, token_id: int, num_top: int) -> dict[int, Logprob]:
    """Of one row: the token itself first, then the `num_top` best; equal log-probabilities have equal ranks."""
    entries = {token_id: Logprob(float(found.logprob[row]), int(found.rank[row]))}
    best = found.top_logprobs[row, :num_top].tolist()
    for place, (top_id, logprob) in enumerate(zip(found.top_ids[row, :num_top].tolist(), best, strict=True)):
        if top_id < 0:  # fewer tokens than that have any probability
            break
        if place == 0 or logprob < best[place - 1]:
            rank = place + 1
        entries.setdefault(top_id, Logprob(logprob, rank))
    return entries


def flat_entry(found: Logprobs[Array], row: int, token_id: int, num_top: int) -> FlatEntry:
    """The same as arrays."""
    best, top_ids = found.top_logprobs[row, :num_top], found.top_ids[row, :num_top]
    kept = (top_ids >= 0) & (top_ids != token_id)
    ranks = np.searchsorted(-best, -best) + 1
    return FlatEntry(
        np.concatenate([[token_id], top_ids[kept]]),
        np.concatenate([found.logprob[row : row + 1], best[kept]]),
        np.concatenate([found.rank[row : row + 1], ranks[kept]]),
    )


def entry_of(params: SamplingParams) -> Callable[[Logprobs[Array], int, int, int], dict[int, Logprob] | FlatEntry]:
    """How a request wants its log-probabilities."""
    return flat_entry if params.flat_logprobs else logprob_entry


class StepResult(NamedTuple):
    token_ids: NDArray[np.int64]  # [samples]
    is_bad: NDArray[np.bool_]  # [samples] NaN, or no finite logit: the token means nothing
    logprobs: Logprobs[Array] | None = None  # [samples]
    prompt_logprobs: Logprobs[Array] | None = None  # [scored]
    broken: Collection[int] = ()  # samples for which a function of `Plan.processed` failed; they are bad too
    captured: Mapping[int, Mapping[str, Any]] = {}  # by place in Plan.taps: what `Taps.take` gets
