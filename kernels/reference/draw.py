"""From adjusted logits to a token: temperature, filters and noise, steps 6 to 10 of sampling.py.

A row is looked at in blocks of 64 tokens. Their maxima, one cheap pass, bound what a block can hold, and only blocks
that can matter are read again: for the filters those above a bound of the cut, for the draw those whose maximum plus
their largest noise can still win. None of this changes a result.
"""

from dataclasses import dataclass, fields

import torch

from kernels.reference.noise import GUMBEL_SPAN, block_noise_bits, gumbel, noise_bits
from kernels.types import SamplerRows

BLOCK = 64
SLACK = 1e-3  # more than the rounding of any bound below
FIRST_TRY = 64  # about as many tokens does the first attempt at a nucleus look at


@dataclass(frozen=True, slots=True)
class Chunk:
    """Some rows of logits, padded with -inf to whole blocks."""

    logits: torch.Tensor  # [rows, blocks * BLOCK]
    peaks: torch.Tensor  # [rows, blocks] largest logit of each block
    best: torch.Tensor  # [rows] largest logit
    is_bad: torch.Tensor  # [rows] best is not finite

    @classmethod
    def of(cls, logits: torch.Tensor) -> "Chunk":
        padding = -logits.shape[1] % BLOCK
        whole = torch.nn.functional.pad(logits, (0, padding), value=-torch.inf) if padding else logits.contiguous()
        peaks = whole.unflatten(1, (-1, BLOCK)).amax(2)
        best = peaks.amax(1)
        return cls(whole, peaks, best, ~best.isfinite())

    def read(self, row: torch.Tensor, block: torch.Tensor) -> torch.Tensor:
        """The logits [n, BLOCK] of blocks (row[i], block[i])."""
        return self.logits.view(-1, BLOCK).index_select(0, row * self.peaks.shape[1] + block)

    def argmax(self) -> torch.Tensor:
        """Each row's largest logit, lowest id on ties: the first block that holds it and the first place in there."""
        block = self.peaks.argmax(1)
        return block * BLOCK + self.read(torch.arange(len(block), device=block.device), block).argmax(1)

    def top_k_bound(self, at: torch.Tensor, top_k: torch.Tensor) -> torch.Tensor:
        """A value that at least top_k logits of each row reach, so not above the k-th largest; -inf for top_k = 0.

        The k-th largest peak is one: k different blocks reach it.
        """
        num_blocks = self.peaks.shape[1]
        bound = torch.full_like(self.best[at], -torch.inf)
        for values, chosen in (
            (self.peaks, (top_k > 0) & (top_k <= num_blocks)),
            (self.logits, (top_k > num_blocks) & (top_k <= self.logits.shape[1])),
        ):
            these = where(chosen)
            if these.numel():
                largest = values[at[these]].topk(int(top_k[these].amax()), dim=1).values
                bound[these] = largest.gather(1, top_k[these, None] - 1).squeeze(1)
        return bound

    def leading(
        self, at: torch.Tensor, bound: torch.Tensor, scale: tuple[torch.Tensor, torch.Tensor] | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """All entries of rows `at` not below bound [rows], the largest first, ties by lower id.

        Returns ids [rows, n], padded with -1, and values [rows, n], padded with -inf. With scale = (shift, divisor),
        each [rows], values are (logit - shift) / divisor, and so is the bound meant. -inf is never an entry.
        """
        bound = bound.clamp_min(torch.finfo(bound.dtype).min)
        row, block = (_scaled(self.peaks[at], scale) >= bound[:, None]).nonzero(as_tuple=True)
        values = self.read(at[row], block)
        if scale is not None:
            values = _scaled(values, (scale[0][row], scale[1][row]))
        hit, inner = (values >= bound[row, None]).nonzero(as_tuple=True)
        row = row[hit]
        counts = torch.bincount(row, minlength=len(at))
        place = torch.arange(len(row), device=row.device) - (counts.cumsum(0) - counts)[row]
        shape = (len(at), max(1, int(counts.amax())))
        ids = torch.full(shape, -1, device=row.device).index_put_((row, place), block[hit] * BLOCK + inner)
        padded = torch.full(shape, -torch.inf, dtype=values.dtype, device=row.device)
        padded[row, place] = values[hit, inner]
        padded, order = padded.sort(dim=1, descending=True, stable=True)
        return ids.gather(1, order), padded


def where(chosen: torch.Tensor) -> torch.Tensor:
    """Indices [n] at which a bool vector is set."""
    return chosen.nonzero().squeeze(1)


def _scaled(values: torch.Tensor, scale: tuple[torch.Tensor, torch.Tensor] | None) -> torch.Tensor:
    """(values [rows, n] - shift [rows]) / divisor [rows]; of bounds as of values, so that they compare exactly."""
    return values if scale is None else (values - scale[0][:, None]) / scale[1][:, None]


def draw(chunk: Chunk, rows: SamplerRows, processed: torch.Tensor | None) -> torch.Tensor:
    """The rows' tokens [rows], 0 for bad rows. What a sampled row was drawn from is put into its row of `processed`."""
    if rows.all_greedy:
        return chunk.argmax().masked_fill_(chunk.is_bad, 0)
    greedy, filtered = rows.temperature == 0, torch.zeros_like(chunk.is_bad)
    if rows.any_filter:
        filtered = (rows.top_k > 0) | (rows.top_p < 1) | (rows.min_p > 0)
    tokens = chunk.argmax() if greedy.any() else torch.zeros_like(chunk.best, dtype=torch.int64)
    for chosen, method in ((~filtered, _draw_plain), (filtered, _draw_filtered)):
        at = where(chosen & ~greedy & ~chunk.is_bad)
        if at.numel():
            tokens[at] = method(chunk, rows, at, processed)
    return tokens.masked_fill_(chunk.is_bad, 0)


def _draw_plain(chunk: Chunk, rows: SamplerRows, at: torch.Tensor, processed: torch.Tensor | None) -> torch.Tensor:
    """Step 10 for rows that no filter touches."""
    scale, keys = (chunk.best[at], rows.temperature[at]), rows.keys[at]
    if processed is not None:
        processed[at] = _scaled(chunk.logits[at], scale)
    peaks = _scaled(chunk.peaks[at], scale)
    row, block = (peaks >= -GUMBEL_SPAN).nonzero(as_tuple=True)
    x = _scaled(chunk.read(at[row], block), (scale[0][row], scale[1][row]))
    bits = block_noise_bits(block, keys[row], BLOCK)
    bound = peaks[row, block] + gumbel(bits.amax(1), x.dtype) + SLACK

    # The block of the highest bound most often holds the winner, and its best score rules out nearly all others.
    bounds = torch.full_like(peaks, -torch.inf).index_put_((row, block), bound)
    places = torch.zeros_like(peaks, dtype=torch.int64)
    places[row, block] = torch.arange(len(row), device=row.device)
    lead = places.gather(1, bounds.argmax(1, keepdim=True)).squeeze(1)
    reached = (x[lead] + gumbel(bits[lead], x.dtype)).amax(1)
    left = where(bound >= reached[row])

    score, inner = (x[left] + gumbel(bits[left], x.dtype)).max(1)
    row, block = row[left], block[left]
    scores = torch.full_like(peaks, -torch.inf).index_put_((row, block), score)
    places[row, block] = block * BLOCK + inner
    return places.gather(1, scores.argmax(1, keepdim=True)).squeeze(1)


def _draw_filtered(chunk: Chunk, rows: SamplerRows, at: torch.Tensor, processed: torch.Tensor | None) -> torch.Tensor:
    """Steps 7 to 10. A nucleus is first sought among the leading tokens, which mostly hold it."""
    filters = _Filters.of(chunk, rows, at)
    nucleus_alone = (filters.top_p < 1) & (filters.top_k == 0)
    first = filters.bound
    if nucleus_alone.any():
        few = chunk.top_k_bound(at, torch.where(nucleus_alone, FIRST_TRY, 0))
        first = first.maximum((few - filters.best) / filters.temperature)
    tokens, complete = _draw_within(chunk, filters, first, processed)
    if not complete.all():
        again = where(~complete)
        rest = filters.take(again)
        tokens[again], _ = _draw_within(chunk, rest, rest.bound, processed)
    return tokens


@dataclass(frozen=True, slots=True)
class _Filters:
    """Steps 7 to 9 of some rows, all [rows]."""

    at: torch.Tensor  # the rows' places in the chunk
    best: torch.Tensor
    temperature: torch.Tensor
    keys: torch.Tensor  # [rows, 2]
    min_p: torch.Tensor
    top_k: torch.Tensor
    top_p: torch.Tensor
    mass: torch.Tensor  # the sum of all w >= min_p, where top_p is on and top_k off
    bound: torch.Tensor  # no token with x below it is kept

    @classmethod
    def of(cls, chunk: Chunk, rows: SamplerRows, at: torch.Tensor) -> "_Filters":
        best, temperature = chunk.best[at], rows.temperature[at]
        min_p, top_k, top_p = rows.min_p[at], rows.top_k[at].long(), rows.top_p[at]
        bound = min_p.log() - SLACK
        if (top_k > 0).any():
            bound = bound.maximum((chunk.top_k_bound(at, top_k) - best) / temperature)
        mass = torch.zeros_like(best)
        on = where((top_p < 1) & (top_k == 0))
        if on.numel():
            w = (chunk.logits[at[on]] - best[on, None]).div_(temperature[on, None]).exp_()
            if (min_p[on] > 0).any():
                w *= w >= min_p[on, None]
            mass[on] = w.sum(1)
            # Tokens with x < t weigh less than w.shape[1] * exp(t) together. If that is no more than what top_p leaves
            # out, the others hold the nucleus.
            bound[on] = bound[on].maximum(((1 - top_p[on]) * mass[on] / w.shape[1]).log() - SLACK)
        return cls(at, best, temperature, rows.keys[at], min_p, top_k, top_p, mass, bound)

    def take(self, index: torch.Tensor) -> "_Filters":
        return _Filters(*(getattr(self, each.name)[index] for each in fields(self)))

    def keep(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Which of each row's leading x [rows, n], descending, are kept; and whether no other token is [rows]."""
        w = x.exp()
        kth = x.gather(1, (self.top_k[:, None] - 1).clamp(0, x.shape[1] - 1))
        keep = (w >= self.min_p[:, None]) & ((self.top_k[:, None] == 0) | (x >= kth)) & (x > -torch.inf)
        w = w * keep
        until = w.cumsum(1)
        nucleus = self.top_p * torch.where(self.top_k > 0, until[:, -1], self.mass)
        keep &= (self.top_p == 1)[:, None] | (until - w < nucleus[:, None])
        keep[:, 0] = True
        return keep, (self.top_p == 1) | (self.top_k > 0) | (until[:, -1] >= nucleus)


def _draw_within(
    chunk: Chunk, filters: _Filters, bound: torch.Tensor, processed: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Draws among the tokens with x >= bound [rows]: tokens [rows], and whether those were all that count [rows]."""
    ids, x = chunk.leading(filters.at, bound, (filters.best, filters.temperature))
    keep, complete = filters.keep(x)
    keep, x, ids = (each[:, : int(keep.sum(1).amax())] for each in (keep, x, ids))
    if processed is not None:
        row, place = keep.nonzero(as_tuple=True)
        processed[filters.at] = -torch.inf
        processed[filters.at[row], ids[row, place]] = x[row, place]
    score = (x + gumbel(noise_bits(ids, filters.keys), x.dtype)).masked_fill_(~keep, -torch.inf)
    winners = score == score.amax(1, keepdim=True)
    return ids.masked_fill(~winners, chunk.logits.shape[1]).amin(1), complete
