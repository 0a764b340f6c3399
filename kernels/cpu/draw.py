"""From adjusted logits to a token: temperature, filters and noise, steps 6 to 10 of sampling.py.

A row is looked at in blocks of 64 tokens. Their maxima, one cheap pass, bound what a block can hold, and only blocks
that can matter are read again: for the filters those above a bound of the cut, for the draw those whose maximum plus
their largest noise can still win. None of this changes a result.
"""

from collections.abc import Callable
from dataclasses import dataclass, fields

import torch
from torch import Tensor

from llama.kernels.cpu.noise import GUMBEL_SPAN, block_noise_bits, gumbel, noise_bits
from llama.kernels.types import SamplerRows

BLOCK = 64
SLACK = 1e-3  # more than the rounding of any bound below
FEW_LOGITS = 2**19  # up to here one argmax takes less time than looking at blocks
FIRST_TRY = 64  # about as many tokens does the first attempt at a nucleus look at

Scaling = Callable[[Tensor, Tensor | slice], Tensor]  # (logits [n, m], their rows [n]) -> values that are compared


@dataclass(frozen=True, slots=True)
class Chunk:
    """Some rows of logits, padded with -inf to whole blocks, and their largest values."""

    blocks: Tensor  # [rows, blocks, BLOCK]
    peaks: Tensor  # [rows, blocks] the largest of each block
    best: Tensor  # [rows] the largest of all

    @classmethod
    def of(cls, logits: Tensor) -> "Chunk":
        num_rows, vocab = logits.shape
        if vocab % BLOCK:
            logits = torch.nn.functional.pad(logits, (0, -vocab % BLOCK), value=-torch.inf)
        blocks = logits.reshape(num_rows, logits.shape[1] // BLOCK, BLOCK)
        peaks = blocks.amax(2)
        return cls(blocks, peaks, peaks.amax(1))

    @property
    def logits(self) -> Tensor:
        return self.blocks.flatten(1)

    def argmax(self) -> Tensor:
        """The largest of each row, lowest id on ties: the first block that holds it and the first place in there."""
        block = self.peaks.argmax(1)
        inner = self.read(torch.arange(len(block), device=block.device), block).argmax(1)
        return inner.add_(block, alpha=BLOCK)

    def read(self, row: Tensor, block: Tensor) -> Tensor:
        """The logits [n, BLOCK] of n blocks."""
        return self.blocks.view(-1, BLOCK).index_select(0, row * self.peaks.shape[1] + block)

    def take(self, at: Tensor) -> "Chunk":
        return Chunk(self.blocks[at], self.peaks[at], self.best[at])


@dataclass(frozen=True, slots=True)
class Draws:
    """Rows that are sampled: their logits, and how. x = (logit - best) / temperature everywhere below."""

    chunk: Chunk
    keys: Tensor  # [rows, 2]
    temperature: Tensor  # [rows], as all that follow
    min_p: Tensor
    top_k: Tensor
    top_p: Tensor

    @classmethod
    def of(cls, chunk: Chunk, rows: SamplerRows) -> "Draws":
        return cls(chunk, rows.keys, rows.temperature, rows.min_p, rows.top_k.long(), rows.top_p)

    def take(self, at: Tensor) -> "Draws":
        return Draws(self.chunk.take(at), *(getattr(self, each.name)[at] for each in fields(self)[1:]))

    def scaled(self, logits: Tensor, row: Tensor | slice = slice(None)) -> Tensor:
        """x of logits [n, m] of the given rows [n]. Bounds and values take the same way, so they compare exactly."""
        return (logits - self.chunk.best[row, None]).div_(self.temperature[row, None])


def draw(logits: Tensor, rows: SamplerRows, processed: Tensor | None) -> tuple[Tensor, Tensor]:
    """The tokens [rows] of logits [rows, vocab] after step 5, and which rows are bad [rows] (token 0).

    What a sampled row was drawn from is put into its row of `processed` [rows, vocab].
    """
    if rows.all_greedy and logits.numel() <= FEW_LOGITS:
        best, tokens = logits.max(1)
        is_bad = _not_finite(best)
        return tokens.masked_fill_(is_bad, 0), is_bad
    chunk = Chunk.of(logits)
    is_bad = _not_finite(chunk.best)
    if rows.all_greedy:
        return chunk.argmax().masked_fill_(is_bad, 0), is_bad
    draws, sampled = Draws.of(chunk, rows), (rows.temperature > 0) & ~is_bad
    filtered = torch.zeros_like(sampled)
    if rows.any_filter:
        filtered = (draws.min_p > 0) | (draws.top_k > 0) | (draws.top_p < 1)
    tokens = None
    for chosen, method in ((sampled & ~filtered, _draw_plain), (sampled & filtered, _draw_filtered)):
        at = chosen.nonzero().squeeze(1)
        if len(at) == len(sampled):
            return method(draws, processed), is_bad
        if tokens is None:
            tokens = chunk.argmax().masked_fill_(is_bad, 0)
        if len(at):
            inside = None if processed is None else processed[at]
            tokens[at] = method(draws.take(at), inside)
            if processed is not None:
                processed[at] = inside
    return tokens, is_bad


def _not_finite(values: Tensor) -> Tensor:
    return (values - values) != 0


def _draw_plain(draws: Draws, processed: Tensor | None) -> Tensor:
    """Step 10 where no filter is on."""
    chunk, peaks = draws.chunk, draws.scaled(draws.chunk.peaks)
    num_blocks = peaks.shape[1]
    if processed is not None:
        processed.copy_(draws.scaled(chunk.logits)[:, : processed.shape[1]])
    row, block = (peaks >= -GUMBEL_SPAN).nonzero(as_tuple=True)
    x, bits = draws.scaled(chunk.read(row, block), row), block_noise_bits(block, BLOCK, draws.keys[row])
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
    peaks = draws.scaled(draws.chunk.peaks)
    bound = draws.min_p.log() - SLACK
    if (draws.top_k > 0).any():
        bound = bound.maximum(top_k_bound(draws.chunk, peaks, draws.top_k, draws.scaled))
    alone = ((draws.top_p < 1) & (draws.top_k == 0)).nonzero().squeeze(1)
    if not len(alone):
        return _draw_above(draws, peaks, bound, None, processed)[0]

    mass = torch.zeros_like(bound)
    mass[alone] = total = _mass(draws if len(alone) == len(bound) else draws.take(alone))
    # Tokens with x < t weigh less than vocab * exp(t) together. Where that is no more than what top_p leaves out, the
    # others hold the nucleus.
    left_out = (1 - draws.top_p[alone]) * total / draws.chunk.blocks[0].numel()
    bound[alone] = bound[alone].maximum(left_out.log() - SLACK)
    first = bound.clone()
    first[alone] = first[alone].maximum(peaks[alone].topk(min(FIRST_TRY, peaks.shape[1]), dim=1).values[:, -1])
    tokens, complete = _draw_above(draws, peaks, first, mass, processed)
    if not complete.all():
        rest = (~complete).nonzero().squeeze(1)
        inside = None if processed is None else processed[rest]
        tokens[rest], _ = _draw_above(draws.take(rest), peaks[rest], bound[rest], mass[rest], inside)
        if processed is not None:
            processed[rest] = inside
    return tokens


def _mass(draws: Draws) -> Tensor:
    """The sum of all w >= min_p of each row."""
    w = draws.scaled(draws.chunk.logits).exp_()
    if (draws.min_p > 0).any():
        w *= w >= draws.min_p[:, None]
    return w.sum(1)


def _draw_above(
    draws: Draws, peaks: Tensor, bound: Tensor, mass: Tensor | None, processed: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Draws among the tokens with x >= bound [rows]: tokens [rows], and whether those were all that count [rows].

    mass [rows] is the sum of all w >= min_p where top_p is on and top_k off; None where no row has that.
    """
    ids, x = leading(draws.chunk, peaks, bound, draws.scaled)
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


def top_k_bound(chunk: Chunk, peaks: Tensor, top_k: Tensor, scaled: Scaling) -> Tensor:
    """A bound [rows] that at least top_k [rows] scaled values of each row reach; -inf where top_k is 0.

    The top_k-th largest of the blocks' scaled peaks is one: so many different blocks reach it. All values are looked at
    only where a row asks for more than there are blocks.
    """
    most = int(top_k.amax())
    source = peaks if most <= peaks.shape[1] else scaled(chunk.logits, slice(None))
    largest = source.topk(min(most, source.shape[1]), dim=1).values
    bound = largest.gather(1, top_k[:, None].clamp(1, largest.shape[1]) - 1).squeeze(1)
    return bound.masked_fill_(top_k == 0, -torch.inf)


def leading(chunk: Chunk, peaks: Tensor, bound: Tensor, scaled: Scaling) -> tuple[Tensor, Tensor]:
    """All tokens of each row whose scaled(logits, row) is not below bound [rows], the largest first, ties by lower id.

    Returns ids [rows, n], padded with -1, and the scaled values [rows, n], padded with -inf. peaks are scaled already.
    A token of -inf is never among them.
    """
    bound = bound.clamp_min(torch.finfo(bound.dtype).min)
    row, block = (peaks >= bound[:, None]).nonzero(as_tuple=True)
    values = scaled(chunk.read(row, block), row)
    hit, inner = (values >= bound[row, None]).nonzero(as_tuple=True)
    row, values, found = row[hit], values[hit, inner], block[hit] * BLOCK + inner
    counts = torch.bincount(row, minlength=len(bound))
    place = torch.arange(len(row), device=row.device) - (counts.cumsum(0) - counts)[row]
    shape = (len(bound), max(1, int(counts.amax())))
    ids = torch.full(shape, -1, device=row.device).index_put_((row, place), found)
    padded = torch.full(shape, -torch.inf, dtype=values.dtype, device=row.device).index_put_((row, place), values)
    padded, order = padded.sort(dim=1, descending=True, stable=True)
    return ids.gather(1, order), padded
