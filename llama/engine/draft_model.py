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
from torch import Tensor

from llama.engine.config import EngineConfig
from llama.engine.device import to_device
from llama.engine.memory import warm_up
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
    stop: int
    draws: bool


class DraftModel:
    def __init__(
        self, model: Transformer, kv: KVCache, running: Running, sampler: SamplerTable, config: EngineConfig
    ) -> None:
        """`sampler` is the other model's: it is read, and nothing is counted in it."""
        self._model, self._kv, self._running, self._sampler = model, kv, running, sampler
        self._budget = config.token_budget
        if model.device.type == "cuda":
            # No step of it is measured. Its own have no drafts, and a cache in its own dtype.
            with torch.cuda.device(model.device):
                warm_up(model, replace(config, speculative_config=None, kv_cache_dtype="auto"))

    @torch.inference_mode()
    def propose(self, asked: list[tuple[Sequence, int]]) -> list[list[int]]:
        """At most so many tokens behind the known ones of each sequence; there is room for their K and V. A sequence
        of which more is to be computed first than a step may gets none yet."""
        most = self._model.config.longest_context
        counts = [min(count, most + 1 - sequence.num_tokens) for sequence, count in asked]  # the last one is not fed
        drafts: list[list[int]] = [[] for _ in asked]
        states: SamplerState | None = None
        if self._sampler.state is not None:
            rows = np.array([sequence.row for sequence, _ in asked])
            states = self._sampler.state.copy_of(to_device(rows, self._model.device, np.int64))
        feeds, known = self._catch_up([sequence for sequence, _ in asked], counts)
        token_ids = to_device(known, self._model.device, np.int64)
        drawn: list[tuple[list[_Feed], Tensor]] = []
        while feeds:
            with ops.on_device(self._model.device):
                token_ids = self._step(feeds, token_ids, states)
            drawing = [feed for feed in feeds if feed.draws]
            drawn.append((drawing, token_ids))
            going_on = [i for i, feed in enumerate(drawing) if len(drawn) < counts[feed.place]]
            feeds = [drawing[i]._replace(start=drawing[i].stop, stop=drawing[i].stop + 1) for i in going_on]
            if 0 < len(feeds) < len(drawing):
                token_ids = token_ids[to_device(np.array(going_on), self._model.device, np.int64)]
        if drawn:
            # One wait for all of them. The host plans with drafts: it cuts them where a text ends, or its grammar.
            told = iter(torch.cat([tokens for _, tokens in drawn]).tolist())
            for drawing, _ in drawn:
                for feed in drawing:
                    drafts[feed.place].append(next(told))
        return drafts

    def _catch_up(self, sequences: list[Sequence], counts: list[int]) -> tuple[list[_Feed], Ints]:
        """The known tokens that the model has not computed, as far as the budget goes, single ones first."""
        feeds, budget = [], self._budget
        for place, sequence in enumerate(sequences):
            start = sequence.num_draft_computed
            stop = min(sequence.num_tokens, start + budget)
            if stop > start and counts[place] > 0:
                feeds.append(_Feed(place, sequence.row, start, stop, stop == sequence.num_tokens))
                sequence.num_draft_computed = stop
                budget -= stop - start
        feeds.sort(key=lambda feed: feed.stop - feed.start > 1)
        pieces = [sequences[feed.place].tokens_between(feed.start, feed.stop) for feed in feeds]
        return feeds, np.concatenate([np.zeros(0, np.int32), *pieces])

    def _step(self, feeds: list[_Feed], token_ids: Tensor, states: SamplerState | None) -> Tensor:
        """Compute the tokens of all, and draw behind those that draw. `states` are the penalties' of all that were
        asked."""
        batch = self._batch(feeds, token_ids)
        hidden = self._model.hidden(batch, self._kv)
        drawing = [feed for feed in feeds if feed.draws]
        if not drawing:
            return token_ids[:0]
        logits = self._model.head(hidden, batch, batch.logit_rows)
        rows = self._sampler.rows(
            np.array([feed.row for feed in drawing], np.int32), np.array([feed.stop for feed in drawing], np.int32)
        )
        places = to_device(np.array([feed.place for feed in drawing], np.int32), self._model.device)
        penalty_rows = torch.where(rows.penalty_rows >= 0, places, -1)
        rows = replace(rows, penalty_rows=penalty_rows, num_logprobs=-1, any_processed=False)
        return ops.sample(logits, rows, states).token_ids

    def _batch(self, feeds: list[_Feed], token_ids: Tensor) -> Batch:
        block_size, device = self._kv.block_size, self._model.device
        lens = np.array([feed.stop - feed.start for feed in feeds], np.int32)
        stops = np.array([feed.stop for feed in feeds], np.int32)
        starts = np.concatenate([[0], np.cumsum(lens)]).astype(np.int32)
        tables = self._running.table[[feed.row for feed in feeds], : -(-int(stops.max()) // block_size)]
        seqs = np.repeat(np.arange(len(feeds)), lens)
        positions = np.arange(starts[-1]) + (stops - starts[1:])[seqs]
        slots = tables[seqs, positions // block_size].astype(np.int64) * block_size + positions % block_size
        draws = np.array([feed.draws for feed in feeds])
        return Batch(
            token_ids=token_ids,
            positions=to_device(positions, device, np.int64),
            block_tables=to_device(tables, device),
            query_starts=to_device(starts, device),
            context_lens=to_device(stops, device),
            slots=to_device(slots, device),
            num_decodes=int(np.count_nonzero(lens == 1)),
            block_size=block_size,
            logit_rows=to_device(starts[1:][draws] - 1, device, np.int64),
        )
