"""Rows of logits in blocks of 64 tokens, of which only those are read again whose maximum says that they can matter."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

BLOCK = 64

Scaling = Callable[[Tensor, Tensor | slice], Tensor]  # (logits [n, m], their rows [n]) -> values that are compared


@dataclass(frozen=True, slots=True)
class Blocks:
    """Some rows of logits, padded with -inf to whole blocks, and their largest values."""

    values: Tensor  # [rows, blocks, BLOCK]
    peaks: Tensor  # [rows, blocks] the largest of each block
    best: Tensor  # [rows] the largest of all

    @classmethod
    def of(cls, logits: Tensor) -> "Blocks":
        num_rows, vocab = logits.shape
        if vocab % BLOCK:
            logits = torch.nn.functional.pad(logits, (0, -vocab % BLOCK), value=-torch.inf)
        values = logits.reshape(num_rows, logits.shape[1] // BLOCK, BLOCK)
        peaks = values.amax(2)
        return cls(values, peaks, peaks.amax(1))

    @property
    def logits(self) -> Tensor:
        return self.values.flatten(1)

    def argmax(self) -> Tensor:
        """The largest of each row, lowest id on ties: the first block that holds it and the first place in there."""
        block = self.peaks.argmax(1)
        inner = self.read(torch.arange(len(block), device=block.device), block).argmax(1)
        return inner.add_(block, alpha=BLOCK)

    def read(self, row: Tensor, block: Tensor) -> Tensor:
        """The logits [n, BLOCK] of n blocks."""
        return self.values.view(-1, BLOCK).index_select(0, row * self.peaks.shape[1] + block)

    def take(self, at: Tensor) -> "Blocks":
        return Blocks(self.values[at], self.peaks[at], self.best[at])


def top_k_bound(blocks: Blocks, peaks: Tensor, top_k: Tensor, scaled: Scaling) -> Tensor:
    """A bound [rows] that at least top_k [rows] scaled values of each row reach; -inf where top_k is 0.

    The top_k-th largest of the blocks' scaled peaks is one: so many different blocks reach it. All values are looked at
    only where a row asks for more than there are blocks.
    """
    most = int(top_k.amax())
    source = peaks if most <= peaks.shape[1] else scaled(blocks.logits, slice(None))
    largest = source.topk(min(most, source.shape[1]), dim=1).values
    bound = largest.gather(1, top_k[:, None].clamp(1, largest.shape[1]) - 1).squeeze(1)
    return bound.masked_fill_(top_k == 0, -torch.inf)


def leading(blocks: Blocks, peaks: Tensor, bound: Tensor, scaled: Scaling) -> tuple[Tensor, Tensor]:
    """All tokens of each row whose scaled(logits, row) is not below bound [rows], the largest first, ties by lower id.

    Returns ids [rows, n], padded with -1, and the scaled values [rows, n], padded with -inf. peaks are scaled already.
    A token of -inf is never among them.
    """
    bound = bound.clamp_min(torch.finfo(bound.dtype).min)
    row, block = (peaks >= bound[:, None]).nonzero(as_tuple=True)
    values = scaled(blocks.read(row, block), row)
    hit, inner = (values >= bound[row, None]).nonzero(as_tuple=True)
    row, values, found = row[hit], values[hit, inner], block[hit] * BLOCK + inner
    counts = torch.bincount(row, minlength=len(bound))
    place = torch.arange(len(row), device=row.device) - (counts.cumsum(0) - counts)[row]
    shape = (len(bound), max(1, int(counts.amax())))
    ids = torch.full(shape, -1, device=row.device).index_put_((row, place), found)
    padded = torch.full(shape, -torch.inf, dtype=values.dtype, device=row.device).index_put_((row, place), values)
    padded, order = padded.sort(dim=1, descending=True, stable=True)
    return ids.gather(1, order), padded
