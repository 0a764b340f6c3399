"""What changes logits before a token is drawn: bias, penalties and mask, steps 1 to 5 of `sample`."""

import math

import torch
from torch import Tensor

from llama.kernels.types import SamplerRows, SamplerState, wide_dtype


def adjust(logits: Tensor, rows: SamplerRows, state: SamplerState | None) -> Tensor:
    """Steps 1 to 5, in the work dtype. A copy only where there is something to do."""
    changes = rows.bias_ids is not None or rows.any_penalty or rows.mask is not None
    adjusted = logits.to(wide_dtype(logits.dtype), copy=changes)
    if rows.bias_starts is not None and rows.bias_ids is not None and rows.bias_values is not None:
        places = torch.repeat_interleave(rows.bias_starts.diff().long()), rows.bias_ids.long()
        adjusted[places] = adjusted[places] + rows.bias_values
    if rows.any_penalty and state is not None:
        _penalise(adjusted, rows, state)
    if rows.mask is not None:
        at = where((rows.mask != -1).any(1))
        adjusted[at] += _mask_terms(rows.mask[at], adjusted)
    return adjusted


def _penalise(adjusted: Tensor, rows: SamplerRows, state: SamplerState) -> None:
    """Steps 2 to 4 in place, touching only the tokens that a row with a penalty has seen."""
    at = where(rows.penalty_rows >= 0)
    penalty_rows = rows.penalty_rows[at].long()
    row, token = _nonzero(state.counts[penalty_rows])
    prompt_row, prompt_token = _set_bits(state.prompt_mask[penalty_rows])
    seen = at[torch.cat((row, prompt_row))], torch.cat((token, prompt_token))  # what is in both gets one value twice
    value, penalty = adjusted[seen], rows.repetition_penalty[seen[0]]
    adjusted[seen] = torch.where(value > 0, value / penalty, value * penalty)
    counts, row = state.counts[penalty_rows[row], token], at[row]
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


def where(chosen: Tensor) -> Tensor:
    """Indices [n] at which a bool vector is set."""
    return chosen.nonzero().squeeze(1)
