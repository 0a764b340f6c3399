"""Logits to tokens in plain PyTorch.

For each row, with l its logits in float32 (float64 for float64 logits) and c the counts of its generated tokens:

    1. l += bias                       2. l = l / r if l > 0 else l * r, for tokens in prompt or output
    3. l -= frequency * c              4. l -= presence * [c > 0]          5. l = -inf where the mask forbids
    6. temperature 0: argmax l, lowest id on ties.  Otherwise x = (l - max l) / T, w = exp(x), and
    7. keep w >= min_p                 8. keep x >= the top_k-th largest x
    9. in descending order, ties by lower id, keep a token while the w before it sum to less than top_p of all w left
   10. argmax x + gumbel over what is kept, lowest id on ties (the noise: noise.py)

A row is bad when the largest l after step 5 is not finite: NaN, +inf, or nothing left. It harms no other row.
"""

from dataclasses import fields, replace
from typing import Any

import torch
from torch import Tensor

from llama.kernels.cpu.sampling.draw import draw
from llama.kernels.cpu.sampling.logprobs import no_logprobs, row_ranges, token_logprobs
from llama.kernels.cpu.sampling.rules import adjust, where
from llama.kernels.logprobs import Logprobs
from llama.kernels.types import LOGPROBS_PROCESSED, LOGPROBS_RAW, Sampled, SamplerRows, SamplerState

__all__ = ["sample", "token_logprobs"]


def sample(logits: Tensor, rows: SamplerRows, state: SamplerState | None = None) -> Sampled:
    """Draws one token per row of logits [rows, vocab] and counts it in `state`, where the row has a penalty.

    Raw log-probabilities are those of `logits` as they came. Processed ones are those of the distribution drawn from,
    so -inf outside of what the filters kept; for a greedy row they are the log-softmax of its logits after step 5.
    """
    if rows.any_penalty and state is None:
        raise ValueError("rows with penalties need a SamplerState")
    ranges = row_ranges(logits)
    if len(ranges) < 2:
        return _sample_some(logits, rows, state)
    return _join([_sample_some(logits[start:stop], _slice_rows(rows, start, stop), state) for start, stop in ranges])


def _sample_some(logits: Tensor, rows: SamplerRows, state: SamplerState | None) -> Sampled:
    """`sample` of a few rows."""
    adjusted = adjust(logits, rows, state)
    processed = adjusted.clone() if rows.any_processed else None
    token_ids, is_bad = draw(adjusted, rows, processed)
    logprobs = None
    if rows.num_logprobs >= 0:
        logprobs = no_logprobs(logits, rows.num_logprobs)
        for mode, source in ((LOGPROBS_RAW, logits), (LOGPROBS_PROCESSED, processed)):
            at = where(rows.logprobs_modes == mode)
            if source is not None and at.numel():
                found = token_logprobs(source[at], token_ids[at], rows.num_logprobs)
                for whole, part in zip(logprobs, found, strict=True):
                    whole[at] = part
    if state is not None and rows.any_penalty:
        at = where((rows.penalty_rows >= 0) & ~is_bad)
        one = torch.ones(1, dtype=torch.int32, device=logits.device)
        state.counts.index_put_((rows.penalty_rows[at].long(), token_ids[at]), one, accumulate=True)
    return Sampled(token_ids, is_bad, logprobs)


def _slice_rows(rows: SamplerRows, start: int, stop: int) -> SamplerRows:
    changes: dict[str, Any] = {
        field.name: value[start:stop]
        for field in fields(rows)
        if isinstance(value := getattr(rows, field.name), Tensor) and not field.name.startswith("bias_")
    }
    if rows.bias_starts is not None and rows.bias_ids is not None and rows.bias_values is not None:
        first, last = rows.bias_starts[start].item(), rows.bias_starts[stop].item()
        changes["bias_starts"] = rows.bias_starts[start : stop + 1] - first
        changes["bias_ids"], changes["bias_values"] = rows.bias_ids[first:last], rows.bias_values[first:last]
    return replace(rows, **changes)


def _join(parts: list[Sampled]) -> Sampled:
    """One Sampled of all rows."""
    logprobs = [part.logprobs for part in parts if part.logprobs is not None]
    return Sampled(
        torch.cat([part.token_ids for part in parts]),
        torch.cat([part.is_bad for part in parts]),
        Logprobs(*map(torch.cat, zip(*logprobs, strict=True))) if logprobs else None,
    )
