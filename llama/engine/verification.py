"""Several tokens of one row drawn in one call, of which only those count that right drafts lead to."""

from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from llama.engine.device import to_device
from llama.engine.plan import Ints
from llama.kernels import ops
from llama.kernels.types import Sampled, SamplerRows, SamplerState


def sample_behind_drafts(
    logits: Tensor, rows: SamplerRows, state: SamplerState | None, drafts: Ints
) -> tuple[Sampled, Tensor]:
    """`ops.sample` where samples stand behind drafts (see `Plan.drafts`) -> what it gives, and which of the samples
    [rows] bool is the last one of its row that counts. Those that count are counted in `state`, and no others."""
    if state is None or not rows.any_penalty:
        sampled = ops.sample(logits, rows)
    else:
        places = torch.arange(len(drafts), dtype=torch.int32, device=logits.device)
        apart = replace(rows, penalty_rows=torch.where(rows.penalty_rows >= 0, places, -1))
        sampled = ops.sample(logits, apart, _states_behind(state, rows.penalty_rows, drafts))
    token_ids = sampled.token_ids
    expected = to_device(drafts, logits.device, np.int64)
    differs = token_ids != expected
    # A sample counts if none of its row before it differs: as many differ before it as before its row's first.
    num_before = differs.cumsum(0) - differs.long()
    is_first = torch.cat([expected.new_full((1,), -1), expected[:-1]]) < 0
    counts = num_before == torch.where(is_first, num_before, 0).cummax(0).values
    if state is not None and rows.any_penalty:
        once = (counts & ~sampled.is_bad & (rows.penalty_rows >= 0)).int()
        state.counts.index_put_((rows.penalty_rows.clamp(min=0).long(), token_ids), once, accumulate=True)
    return sampled, counts & differs


def _states_behind(state: SamplerState, penalty_rows: Tensor, drafts: Ints) -> SamplerState:
    """The state of each sample: its row's, with the drafts before it counted."""
    behind = state.copy_of(penalty_rows.clamp(min=0).long())
    pairs: list[tuple[int, int]] = []
    before: list[int] = []
    for place, draft in enumerate(drafts.tolist()):
        pairs += [(place, token) for token in before]
        before = [*before, draft] if draft >= 0 else []
    places, tokens = to_device(np.array(pairs, np.int64).reshape(-1, 2).T, penalty_rows.device)
    behind.counts.index_put_((places, tokens), torch.ones_like(places, dtype=torch.int32), accumulate=True)
    return behind
