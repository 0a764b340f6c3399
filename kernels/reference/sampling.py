"""Logits to tokens in plain PyTorch: the CPU path, and the oracle of the Triton kernel.

For each row, with l its logits in float32 (float64 for float64 logits) and c the counts of its generated tokens:

    1. l += bias                       2. l = l / r if l > 0 else l * r, for tokens in prompt or output
    3. l -= frequency * c              4. l -= presence * [c > 0]          5. l = -inf where the mask forbids
    6. temperature 0: argmax l, lowest id on ties.  Otherwise x = (l - max l) / T, w = exp(x), and
    7. keep w >= min_p                 8. keep x >= the top_k-th largest x
    9. in descending order, ties by lower id, keep a token while the w before it sum to less than top_p of all w left
   10. argmax x + gumbel over what is kept, lowest id on ties (the noise: noise.py)

A row is bad when the largest l after step 5 is not finite: NaN, +inf, or nothing left. It harms no other row.
"""

from collections.abc import Iterator
from dataclasses import fields, replace

import torch

from kernels.reference.draw import Chunk, draw, where
from kernels.types import LOGPROBS_PROCESSED, LOGPROBS_RAW, Logprobs, Sampled, SamplerRows, SamplerState

CHUNK_ELEMENTS = 2**19  # logits worked on at once: 2 MB of float32, about a second-level cache


def sample(logits: torch.Tensor, rows: SamplerRows, state: SamplerState | None) -> Sampled:
    """Draws one token per row of logits [rows, vocab] and counts it in `state`, where the row has a slot.

    Raw log-probabilities are those of `logits` as they came. Processed ones are those of the distribution drawn from,
    so -inf outside of what the filters kept; for a greedy row they are the log-softmax of its logits after step 5.
    """
    if rows.any_penalty and state is None:
        raise ValueError("rows with penalties need a SamplerState")
    num_rows = len(logits)
    token_ids = torch.zeros(num_rows, dtype=torch.int64, device=logits.device)
    is_bad = torch.zeros(num_rows, dtype=torch.bool, device=logits.device)
    logprobs = _no_logprobs(logits, rows.num_logprobs) if rows.num_logprobs >= 0 else None
    for start, stop in _chunks(logits):
        part = rows if stop - start == num_rows else _slice_rows(rows, start, stop)
        chunk = Chunk.of(_adjusted(logits[start:stop], part, state))
        processed = chunk.logits.clone() if part.any_processed else None
        drawn = draw(chunk, part, processed)
        token_ids[start:stop], is_bad[start:stop] = drawn, chunk.is_bad
        if logprobs is not None and processed is not None:
            wanted = where(part.logprobs_modes == LOGPROBS_PROCESSED)
            _put(logprobs, wanted + start, token_logprobs(processed[wanted], drawn[wanted], rows.num_logprobs))
    if logprobs is not None:
        wanted = where(rows.logprobs_modes == LOGPROBS_RAW)
        if wanted.numel() == num_rows:
            logprobs = token_logprobs(logits, token_ids, rows.num_logprobs)
        else:
            _put(logprobs, wanted, token_logprobs(logits[wanted], token_ids[wanted], rows.num_logprobs))
    if state is not None and rows.any_penalty:
        counted = where((rows.slots >= 0) & ~is_bad)
        one = torch.ones(1, dtype=torch.int32, device=logits.device)
        state.counts.index_put_((rows.slots[counted].long(), token_ids[counted]), one, accumulate=True)
    return Sampled(token_ids, is_bad, logprobs)


def token_logprobs(logits: torch.Tensor, token_ids: torch.Tensor, num_top: int) -> Logprobs:
    """Log-softmax of logits [rows, vocab] at token_ids [rows] and at each row's num_top largest, ties by lower id.

    Computed in float32, or float64 for float64 logits, a few rows at a time.
    """
    answer = _no_logprobs(logits, num_top)
    for start, stop in _chunks(logits):
        chunk = Chunk.of(logits[start:stop].to(_work_dtype(logits)))
        chosen_ids = token_ids[start:stop, None]
        logprobs, chosen = chunk.logits.log_softmax(1), chunk.logits.gather(1, chosen_ids)
        answer.logprob[start:stop] = logprobs.gather(1, chosen_ids).squeeze(1)
        row, block = (chunk.peaks > chosen).nonzero(as_tuple=True)
        greater = (chunk.read(row, block) > chosen[row]).sum(1)
        answer.rank[start:stop] = torch.ones_like(chosen_ids[:, 0]).index_add_(0, row, greater)
        if num_top:
            every = torch.arange(stop - start, device=logits.device)
            ids, _ = chunk.leading(every, chunk.top_k_bound(every, torch.full_like(every, num_top)))
            ids = ids[:, :num_top]
            answer.top_ids[start:stop, : ids.shape[1]] = ids
            top = logprobs.gather(1, ids.clamp_min(0)).masked_fill_(ids < 0, -torch.inf)
            answer.top_logprobs[start:stop, : ids.shape[1]] = top
    return answer


def _adjusted(logits: torch.Tensor, rows: SamplerRows, state: SamplerState | None) -> torch.Tensor:
    """Steps 1 to 5, in the work dtype. A copy only where there is something to do."""
    changes = rows.bias_ids is not None or rows.any_penalty or rows.mask is not None
    adjusted = logits.to(_work_dtype(logits), copy=changes)
    if rows.bias_starts is not None and rows.bias_ids is not None and rows.bias_values is not None:
        at = (torch.repeat_interleave(rows.bias_starts.diff().long()), rows.bias_ids.long())
        adjusted[at] = adjusted[at] + rows.bias_values
    if rows.any_penalty and state is not None:
        _penalise(adjusted, rows, state)
    if rows.mask is not None:  # l - inf rather than -inf, so that NaN and +inf stay visible
        adjusted = torch.where(_unpack(rows.mask, logits.shape[1]), adjusted, adjusted - torch.inf)
    return adjusted


def _penalise(adjusted: torch.Tensor, rows: SamplerRows, state: SamplerState) -> None:
    """Steps 2 to 4 in place for the rows with a slot, each only where some row has it on."""
    chosen = where(rows.slots >= 0)
    slots = rows.slots[chosen].long()
    repetition, frequency, presence = (
        values[chosen, None] for values in (rows.repetition_penalty, rows.frequency_penalty, rows.presence_penalty)
    )
    x, counts = adjusted[chosen], state.counts[slots]
    if (repetition != 1).any():
        seen = _unpack(state.prompt_mask[slots], x.shape[1]) | (counts > 0)
        x = torch.where(seen, torch.where(x > 0, x / repetition, x * repetition), x)
    if (frequency != 0).any():
        x -= frequency * counts
    if (presence != 0).any():
        x -= presence * (counts > 0)
    adjusted[chosen] = x


def _unpack(words: torch.Tensor, size: int) -> torch.Tensor:
    """int32 [rows, ceil(size / 32)], little end first -> bool [rows, size]."""
    places = torch.arange(32, dtype=torch.int32, device=words.device)
    return ((words.unsqueeze(2) >> places) & 1).flatten(1)[:, :size].bool()


def _work_dtype(logits: torch.Tensor) -> torch.dtype:
    return torch.float64 if logits.dtype == torch.float64 else torch.float32


def _chunks(logits: torch.Tensor) -> Iterator[tuple[int, int]]:
    """Row ranges of about CHUNK_ELEMENTS logits."""
    num_rows, vocab = logits.shape
    step = max(1, CHUNK_ELEMENTS // vocab)
    for start in range(0, num_rows, step):
        yield start, min(start + step, num_rows)


def _slice_rows(rows: SamplerRows, start: int, stop: int) -> SamplerRows:
    changes: dict[str, torch.Tensor] = {
        field.name: value[start:stop]
        for field in fields(rows)
        if isinstance(value := getattr(rows, field.name), torch.Tensor) and not field.name.startswith("bias_")
    }
    if rows.bias_starts is not None and rows.bias_ids is not None and rows.bias_values is not None:
        first, last = rows.bias_starts[start].item(), rows.bias_starts[stop].item()
        changes["bias_starts"] = rows.bias_starts[start : stop + 1] - first
        changes["bias_ids"], changes["bias_values"] = rows.bias_ids[first:last], rows.bias_values[first:last]
    return replace(rows, **changes)


def _no_logprobs(logits: torch.Tensor, num_top: int) -> Logprobs:
    num_rows, dtype, device = len(logits), _work_dtype(logits), logits.device
    return Logprobs(
        torch.zeros(num_rows, dtype=dtype, device=device),
        torch.zeros(num_rows, dtype=torch.int64, device=device),
        torch.full((num_rows, num_top), -1, dtype=torch.int64, device=device),
        torch.full((num_rows, num_top), -torch.inf, dtype=dtype, device=device),
    )


def _put(target: Logprobs, at: torch.Tensor, part: Logprobs) -> None:
    for field in fields(Logprobs):
        getattr(target, field.name)[at] = getattr(part, field.name)
