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

import math
from dataclasses import fields, replace

import torch
from torch import Tensor

from llama.kernels.cpu.draw import Chunk, draw, leading, top_k_bound
from llama.kernels.types import LOGPROBS_PROCESSED, LOGPROBS_RAW, Logprobs, Sampled, SamplerRows, SamplerState

CHUNK_ELEMENTS = 2**21  # logits worked on at once: enough that the cost of a call vanishes, 8 MB of float32


def sample(logits: Tensor, rows: SamplerRows, state: SamplerState | None = None) -> Sampled:
    """Draws one token per row of logits [rows, vocab] and counts it in `state`, where the row has a slot.

    Raw log-probabilities are those of `logits` as they came. Processed ones are those of the distribution drawn from,
    so -inf outside of what the filters kept; for a greedy row they are the log-softmax of its logits after step 5.
    """
    if rows.any_penalty and state is None:
        raise ValueError("rows with penalties need a SamplerState")
    parts = []
    for start, stop in _chunks(logits) or [(0, 0)]:
        part = rows if stop - start == len(rows) else _slice_rows(rows, start, stop)
        parts.append(_sample_chunk(logits[start:stop], part, state))
    return parts[0] if len(parts) == 1 else _join(parts)


def token_logprobs(logits: Tensor, token_ids: Tensor, num_top: int) -> Logprobs:
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
            top_k = torch.full_like(chosen_ids[:, 0], num_top)
            bound = top_k_bound(chunk, chunk.peaks, top_k, _as_they_are)
            ids = leading(chunk, chunk.peaks, bound, _as_they_are)[0][:, :num_top]
            answer.top_ids[start:stop, : ids.shape[1]] = ids
            top = logprobs.gather(1, ids.clamp_min(0)).masked_fill_(ids < 0, -torch.inf)
            answer.top_logprobs[start:stop, : ids.shape[1]] = top
    return answer


def _sample_chunk(logits: Tensor, rows: SamplerRows, state: SamplerState | None) -> Sampled:
    """`sample` of a few rows."""
    adjusted = _adjusted(logits, rows, state)
    processed = adjusted.clone() if rows.any_processed else None
    token_ids, is_bad = draw(adjusted, rows, processed)
    logprobs = None
    if rows.num_logprobs >= 0:
        logprobs = _no_logprobs(logits, rows.num_logprobs)
        for mode, source in ((LOGPROBS_RAW, logits), (LOGPROBS_PROCESSED, processed)):
            at = _where(rows.logprobs_modes == mode)
            if source is not None and at.numel():
                _put(logprobs, at, token_logprobs(source[at], token_ids[at], rows.num_logprobs))
    if state is not None and rows.any_penalty:
        at = _where((rows.slots >= 0) & ~is_bad)
        one = torch.ones(1, dtype=torch.int32, device=logits.device)
        state.counts.index_put_((rows.slots[at].long(), token_ids[at]), one, accumulate=True)
    return Sampled(token_ids, is_bad, logprobs)


def _adjusted(logits: Tensor, rows: SamplerRows, state: SamplerState | None) -> Tensor:
    """Steps 1 to 5, in the work dtype. A copy only where there is something to do."""
    changes = rows.bias_ids is not None or rows.any_penalty or rows.mask is not None
    adjusted = logits.to(_work_dtype(logits), copy=changes)
    if rows.bias_starts is not None and rows.bias_ids is not None and rows.bias_values is not None:
        places = torch.repeat_interleave(rows.bias_starts.diff().long()), rows.bias_ids.long()
        adjusted[places] = adjusted[places] + rows.bias_values
    if rows.any_penalty and state is not None:
        _penalise(adjusted, rows, state)
    if rows.mask is not None:
        at = _where((rows.mask != -1).any(1))
        adjusted[at] += _mask_terms(rows.mask[at], adjusted)
    return adjusted


def _penalise(adjusted: Tensor, rows: SamplerRows, state: SamplerState) -> None:
    """Steps 2 to 4 in place, touching only the tokens that a row with a slot has seen."""
    at = _where(rows.slots >= 0)
    slots = rows.slots[at].long()
    row, token = _nonzero(state.counts[slots])
    prompt_row, prompt_token = _set_bits(state.prompt_mask[slots])
    seen = at[torch.cat((row, prompt_row))], torch.cat((token, prompt_token))  # what is in both gets one value twice
    value, penalty = adjusted[seen], rows.repetition_penalty[seen[0]]
    adjusted[seen] = torch.where(value > 0, value / penalty, value * penalty)
    counts, row = state.counts[slots[row], token], at[row]
    adjusted[row, token] = adjusted[row, token] - rows.frequency_penalty[row] * counts - rows.presence_penalty[row]


def _nonzero(counts: Tensor) -> tuple[Tensor, Tensor]:
    """Rows and columns of what is not zero in counts [rows, n] >= 0, most of which is: whole blocks are passed over."""
    blocks = counts.unflatten(1, (-1, math.gcd(counts.shape[1], 64)))
    row, block = blocks.amax(2).nonzero(as_tuple=True)
    hit, inner = blocks[row, block].nonzero(as_tuple=True)
    return row[hit], block[hit] * blocks.shape[2] + inner


def _set_bits(words: Tensor) -> tuple[Tensor, Tensor]:
    """Rows and places of the bits set in words [rows, n] int32, little end first."""
    row, word = words.nonzero(as_tuple=True)
    bits = words[row, word, None] >> torch.arange(32, dtype=torch.int32, device=words.device) & 1
    hit, place = bits.nonzero(as_tuple=True)
    return row[hit], word[hit] * 32 + place


def _mask_terms(words: Tensor, like: Tensor) -> Tensor:
    """What to add to logits `like` under bit mask words [rows, n] int32: 0, or -inf where the bit is off.

    Adding keeps NaN and +inf visible. A table maps each byte to its eight terms, little end first.
    """
    byte, bit = torch.arange(256, device=words.device), torch.arange(8, device=words.device)
    table = torch.where(byte[:, None] >> bit & 1 == 1, 0.0, -torch.inf).to(like.dtype)
    return table[words.view(torch.uint8).int()].flatten(1)[:, : like.shape[1]]


def _work_dtype(logits: Tensor) -> torch.dtype:
    return torch.float64 if logits.dtype == torch.float64 else torch.float32


def _chunks(logits: Tensor) -> list[tuple[int, int]]:
    """Row ranges of about CHUNK_ELEMENTS logits."""
    num_rows, vocab = logits.shape
    step = max(1, CHUNK_ELEMENTS // vocab)
    return [(start, min(start + step, num_rows)) for start in range(0, num_rows, step)]


def _slice_rows(rows: SamplerRows, start: int, stop: int) -> SamplerRows:
    changes: dict[str, Tensor] = {
        field.name: value[start:stop]
        for field in fields(rows)
        if isinstance(value := getattr(rows, field.name), Tensor) and not field.name.startswith("bias_")
    }
    if rows.bias_starts is not None and rows.bias_ids is not None and rows.bias_values is not None:
        first, last = rows.bias_starts[start].item(), rows.bias_starts[stop].item()
        changes["bias_starts"] = rows.bias_starts[start : stop + 1] - first
        changes["bias_ids"], changes["bias_values"] = rows.bias_ids[first:last], rows.bias_values[first:last]
    return replace(rows, **changes)


def _no_logprobs(logits: Tensor, num_top: int) -> Logprobs:
    num_rows, dtype, device = len(logits), _work_dtype(logits), logits.device
    return Logprobs(
        torch.zeros(num_rows, dtype=dtype, device=device),
        torch.zeros(num_rows, dtype=torch.int64, device=device),
        torch.full((num_rows, num_top), -1, dtype=torch.int64, device=device),
        torch.full((num_rows, num_top), -torch.inf, dtype=dtype, device=device),
    )


def _put(target: Logprobs, at: Tensor, part: Logprobs) -> None:
    for field in fields(Logprobs):
        getattr(target, field.name)[at] = getattr(part, field.name)


def _join(parts: list[Sampled]) -> Sampled:
    """One Sampled of all rows."""
    logprobs = [part.logprobs for part in parts if part.logprobs is not None]
    return Sampled(
        torch.cat([part.token_ids for part in parts]),
        torch.cat([part.is_bad for part in parts]),
        Logprobs(*(torch.cat([getattr(part, field.name) for part in logprobs]) for field in fields(Logprobs)))
        if logprobs
        else None,
    )


def _as_they_are(logits: Tensor, row: Tensor | slice) -> Tensor:
    return logits


def _where(chosen: Tensor) -> Tensor:
    """Indices [n] at which a bool vector is set."""
    return chosen.nonzero().squeeze(1)
