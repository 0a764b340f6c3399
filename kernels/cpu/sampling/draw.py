"""From adjusted logits to a token: temperature, filters and noise, steps 6 to 10 of `sample`.

A row is looked at in blocks of 64 tokens. For the filters those are read again whose maximum is above a bound of the
cut, for the draw those whose maximum plus their largest noise can still win. None of this changes a result.
"""

from dataclasses import dataclass, fields

import torch
from torch import Tensor

from llama.kernels.cpu.sampling.blocks import BLOCK, Blocks, leading, top_k_bound
from llama.kernels.cpu.sampling.noise import GUMBEL_SPAN, block_noise_bits, gumbel, noise_bits
from llama.kernels.types import SamplerRows

SLACK = 1e-3  # more than the rounding of any bound below
FEW_LOGITS = 2**19  # up to here one argmax takes less time than looking at blocks
FIRST_TRY = 64  # about as many tokens does the first attempt at a nucleus look at


@dataclass(frozen=True, slots=True)
class Draws:
    """Rows that are sampled: their logits, and how. x = (logit - best) / temperature everywhere below."""

    blocks: Blocks
    keys: Tensor  # [rows, 2]
    temperature: Tensor  # [rows], as all that follow
    min_p: Tensor
    top_k: Tensor
    top_p: Tensor

    @classmethod
    def of(cls, blocks: Blocks, rows: SamplerRows) -> "Draws":
        return cls(blocks, rows.keys, rows.temperature, rows.min_p, rows.top_k.long(), rows.top_p)

    def take(self, at: Tensor) -> "Draws":
        return Draws(self.blocks.take(at), *(getattr(self, each.name)[at] for each in fields(self)[1:]))

    def scaled(self, logits: Tensor, row: Tensor | slice = slice(None)) -> Tensor:
        """x of logits [n, m] of the given rows [n]. Bounds and values take the same way, so they compare exactly."""
        return (logits - self.blocks.best[row, None]).div_(self.temperature[row, None])


def draw(logits: Tensor, rows: SamplerRows, processed: Tensor | None) -> tuple[Tensor, Tensor]:
    """The tokens [rows] of logits [rows, vocab] after step 5, and which rows are bad [rows] (token 0).

    What a sampled row was drawn from is put into its row of `processed` [rows, vocab].
    """
    if rows.all_greedy and logits.numel() <= FEW_LOGITS:
        best, best_ids = logits.max(1)
        is_bad = _not_finite(best)
        return best_ids.masked_fill_(is_bad, 0), is_bad
    blocks = Blocks.of(logits)
    is_bad = _not_finite(blocks.best)
    if rows.all_greedy:
        return blocks.argmax().masked_fill_(is_bad, 0), is_bad
    draws, sampled = Draws.of(blocks, rows), (rows.temperature > 0) & ~is_bad
    filtered = torch.zeros_like(sampled)
    if rows.any_filter:
        filtered = (draws.min_p > 0) | (draws.top_k > 0) | (draws.top_p < 1)
    tokens: Tensor | None = None
    for chosen, method in ((sampled & ~filtered, _draw_plain), (sampled & filtered, _draw_filtered)):
        at = chosen.nonzero().squeeze(1)
        if len(at) == len(sampled):
            return method(draws, processed), is_bad
        if tokens is None:
            tokens = blocks.argmax().masked_fill_(is_bad, 0)
        if len(at):
            inside = None if processed is None else processed[at]
            tokens[at] = method(draws.take(at), inside)
            if processed is not None and inside is not None:
                processed[at] = inside
    assert tokens is not None
    return tokens, is_bad


def _not_finite(values: Tensor) -> Tensor:
    difference = values - values
    return difference != difference  # no number beside a tensor: that would be made a tensor first


def _draw_plain(draws: Draws, processed: Tensor | None) -> Tensor:
    """Step 10 where no filter is on."""
    blocks, peaks = draws.blocks, draws.scaled(draws.blocks.peaks)
    num_blocks = peaks.shape[1]
    if processed is not None:
        processed.copy_(draws.scaled(blocks.logits)[:, : processed.shape[1]])
    row, block = (peaks >= -GUMBEL_SPAN).nonzero(as_tuple=True)
    x, bits = draws.scaled(blocks.read(row, block), row), block_noise_bits(block, BLOCK, draws.keys[row])
    bound = peaks[row, block] + gumbel(bits.amax(1), x.dtype) + SLACK

    # The block of the highest bound most often holds the winner, and its best score rules out nearly all others.
    first_blocks = torch.arange(0, peaks.numel(), num_blocks, device=row.device)
    bounds = torch.full_like(peaks, -torch.inf).index_put_((row, block), bound)
    lead = torch.searchsorted(row * num_blocks + block, bounds.argmax(1) + first_blocks)
    reached = (x[lead] + gumbel(bits[lead], x.dtype)).amax(1)
    left = (bound >= reached[row]).nonzero().squeeze(1)

    row, block = row[left], block[left]
    score, inner = (x[left] + gumbel(bits[left], x.dtype)).max(1)
    winner = torch.full_like(peaks, -torch.inf).index_put_((row, block), score).argmax(1)
    place = torch.searchsorted(row * num_blocks + block, winner + first_blocks)
    return winner * BLOCK + inner[place]


def _draw_filtered(draws: Draws, processed: Tensor | None) -> Tensor:
    """Steps 7 to 10. A nucleus is first sought among the leading tokens, which mostly hold it."""
    peaks = draws.scaled(draws.blocks.peaks)
    bound = draws.min_p.log() - SLACK
    if (draws.top_k > 0).any():
        bound = bound.maximum(top_k_bound(draws.blocks, peaks, draws.top_k, draws.scaled))
    alone = ((draws.top_p < 1) & (draws.top_k == 0)).nonzero().squeeze(1)
    if not len(alone):
        return _draw_above(draws, peaks, bound, None, processed)[0]

    mass = torch.zeros_like(bound)
    mass[alone] = total = _mass(draws if len(alone) == len(bound) else draws.take(alone))
    # Tokens with x < t weigh less than vocab * exp(t) together. Where that is no more than what top_p leaves out, the
    # others hold the nucleus.
    left_out = (1 - draws.top_p[alone]) * total / draws.blocks.values[0].numel()
    bound[alone] = bound[alone].maximum(left_out.log() - SLACK)
    first = bound.clone()
    first[alone] = first[alone].maximum(peaks[alone].topk(min(FIRST_TRY, peaks.shape[1]), dim=1).values[:, -1])
    tokens, complete = _draw_above(draws, peaks, first, mass, processed)
    if not complete.all():
        rest = (~complete).nonzero().squeeze(1)
        inside = None if processed is None else processed[rest]
        tokens[rest], _ = _draw_above(draws.take(rest), peaks[rest], bound[rest], mass[rest], inside)
        if processed is not None and inside is not None:
            processed[rest] = inside
    return tokens


def _mass(draws: Draws) -> Tensor:
    """The sum of all w >= min_p of each row."""
    w = draws.scaled(draws.blocks.logits).exp_()
    if (draws.min_p > 0).any():
        w *= w >= draws.min_p[:, None]
    return w.unflatten(1, (-1, BLOCK)).sum(2).sum(1)  # one long sum would be cut where a row is alone


def _draw_above(
    draws: Draws, peaks: Tensor, bound: Tensor, mass: Tensor | None, processed: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Draws among the tokens with x >= bound [rows]: tokens [rows], and whether those were all that count [rows].

    mass [rows] is the sum of all w >= min_p where top_p is on and top_k off; None where no row has that.
    """
    ids, x = leading(draws.blocks, peaks, bound, draws.scaled)
    w, top_k, complete = x.exp(), draws.top_k[:, None], torch.ones_like(bound, dtype=torch.bool)
    keep = (w >= draws.min_p[:, None]) & (ids >= 0)
    if (top_k > 0).any():
        keep &= (top_k == 0) | (x >= x.gather(1, top_k.clamp(1, x.shape[1]) - 1))
    if (draws.top_p < 1).any():
        until = (w * keep).cumsum(1)
        wanted = until[:, -1] if mass is None else torch.where(draws.top_k > 0, until[:, -1], mass)
        wanted = torch.where(draws.top_p < 1, draws.top_p * wanted, torch.inf)
        keep[:, 1:] &= until[:, :-1] < wanted[:, None]
        complete = (draws.top_p == 1) | (draws.top_k > 0) | (until[:, -1] >= wanted)
    if processed is not None:
        row, place = keep.nonzero(as_tuple=True)
        processed.fill_(-torch.inf).index_put_((row, ids[row, place]), x[row, place])
    size = int(keep.sum(1).amax())
    ids, keep = ids[:, :size], keep[:, :size]
    score = (x[:, :size] + gumbel(noise_bits(ids, draws.keys), x.dtype)).masked_fill_(~keep, -torch.inf)
    winners = score == score.amax(1, keepdim=True)
    return ids.masked_fill(~winners, torch.iinfo(ids.dtype).max).amin(1), complete
