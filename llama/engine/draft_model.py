"""DraftModel: a smaller model that writes on from each sequence, to be checked by the one that matters.

It guesses what the other model will draw, not what is likely: it draws with the request's own noise, penalties, biases
and filters. Where its logits are the other model's, so are its tokens. Its K and V lie in a cache of its own under the
same block ids; what it has not computed (a prefix hit, a sequence that was preempted) it computes when it is asked.
It has no adapters: its drafts are those of the base model.
"""

from dataclasses import replace
from typing import NamedTuple

import numpy as np
import torch

from llama.engine.device import to_device
from llama.engine.plan import Ints
from llama.engine.running import Running
from llama.engine.sampler import SamplerTable
from llama.engine.sequence import Sequence
from llama.kernels import ops
from llama.kernels.types import SamplerState
from llama.model.batch import Batch
from llama.model.kv_cache import KVCache
from llama.model.transformer import Transformer


class _Feed(NamedTuple):
    """Tokens of one sequence that the draft model computes; a token is drawn behind the last one if `draws`."""

    place: int  # in what was asked
    row: int
    start: int  # position of the first
    token_ids: Ints
    draws: bool

    @property
    def stop(self) -> int:
        return self.start + len(self.token_ids)


class DraftModel:
    def __init__(
        self, model: Transformer, kv: KVCache, running: Running, sampler: SamplerTable, max_num_batched_tokens: int
    ) -> None:
        """`sampler` is the other model's: it is read, and nothing is counted in it."""
        self._model, self._kv, self._running, self._sampler = model, kv, running, sampler
        self._budget = max_num_batched_tokens

    @torch.inference_mode()
    def propose(self, asked: list[tuple[Sequence, int]]) -> list[list[int]]:
        """At most so many tokens behind the known ones of each sequence; there is room for their K and V. A sequence
        of which more is to be computed first than a step may gets none yet."""
        most = self._model.config.max_position_embeddings
        counts = [min(count, most + 1 - sequence.num_tokens) for sequence, count in asked]  # the last one is not fed
        drafts: list[list[int]] = [[] for _ in asked]
        states: SamplerState | None = None
        if self._sampler.state is not None:
            rows = np.array([sequence.row for sequence, _ in asked])
            states = self._sampler.state.copy_of(to_device(rows, self._model.device, np.int64))
        feeds = self._catch_up([sequence for sequence, _ in asked], counts)
        while feeds:
            drawn = self._step(feeds, states)
            feeds, before = [], feeds
            for feed, token in zip([feed for feed in before if feed.draws], drawn, strict=True):
                drafts[feed.place].append(token)
                if len(drafts[feed.place]) < counts[feed.place]:
                    feeds.append(_Feed(feed.place, feed.row, feed.stop, np.array([token], np.int32), True))
        return drafts

    def _catch_up(self, sequences: list[Sequence], counts: list[int]) -> list[_Feed]:
        """The known tokens that the model has not computed, as far as the budget goes, single ones first."""
        feeds, budget = [], self._budget
        for place, sequence in enumerate(sequences):
            start = sequence.num_draft_computed
            stop = min(sequence.num_tokens, start + budget)
            if stop > start and counts[place] > 0:
                tokens = sequence.tokens_between(start, stop)
                feeds.append(_Feed(place, sequence.row, start, tokens, stop == sequence.num_tokens))
                sequence.num_draft_computed = stop
                budget -= stop - start
        return sorted(feeds, key=lambda feed: len(feed.token_ids) > 1)

    def _step(self, feeds: list[_Feed], states: SamplerState | None) -> list[int]:
        """Compute all, and draw behind those that draw. `states` are the penalties' of all that were asked."""
        batch = self._batch(feeds)
        hidden = self._model.hidden(batch, self._kv)
        drawing = [feed for feed in feeds if feed.draws]
        if not drawing:
            return []
        logits = self._model.head(hidden, batch, batch.logit_rows)
        rows = self._sampler.rows(
            np.array([feed.row for feed in drawing], np.int32), np.array([feed.stop for feed in drawing], np.int32)
        )
        places = to_device(np.array([feed.place for feed in drawing], np.int32), self._model.device)
        penalty_rows = torch.where(rows.penalty_rows >= 0, places, -1)
        rows = replace(rows, penalty_rows=penalty_rows, num_logprobs=-1, any_processed=False)
        token_ids: list[int] = ops.sample(logits, rows, states).token_ids.tolist()
        return token_ids

    def _batch(self, feeds: list[_Feed]) -> Batch:
        block_size, device = self._kv.block_size, self._model.device
        lens = np.array([len(feed.token_ids) for feed in feeds], np.int32)
        stops = np.array([feed.stop for feed in feeds], np.int32)
        starts = np.concatenate([[0], np.cumsum(lens)]).astype(np.int32)
        tables = self._running.table[[feed.row for feed in feeds], : -(-int(stops.max()) // block_size)]
        seqs = np.repeat(np.arange(len(feeds)), lens)
        positions = np.arange(starts[-1]) + (stops - starts[1:])[seqs]
        slots = tables[seqs, positions // block_size].astype(np.int64) * block_size + positions % block_size
        draws = np.array([feed.draws for feed in feeds])
        return Batch(
            token_ids=to_device(np.concatenate([feed.token_ids for feed in feeds]), device, np.int64),
            positions=to_device(positions, device, np.int64),
            block_tables=to_device(tables, device),
            query_starts=to_device(starts, device),
            context_lens=to_device(stops, device),
            slots=to_device(slots, device),
            num_decodes=int(np.count_nonzero(lens == 1)),
            block_size=block_size,
            logit_rows=to_device(starts[1:][draws] - 1, device, np.int64),
        )
