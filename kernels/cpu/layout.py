"""What the CPU's ops need to know of a step and not of a layer, worked out once for all layers."""

import math
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor

from llama.kernels.cpu.pieces import Pieces

# Entries of a mask that is kept for all layers of a step: every sequence may have its own.
_KEPT_MASK = 1 << 16

# Rows per adapter that may only fill up a batched matmul: fewer than would cost what a call costs.
_FILLED = 4

# Keys by which sequences that are gathered together may be padded, all of them: as many as cost what a call more costs.
_PADDED_KEYS = 128

Rows = slice | Tensor  # of a cache seen as [slots, kv_heads, head_dim]: a run, or indices


@dataclass(slots=True)
class Decodes:
    """Sequences whose keys are gathered together."""

    first: int  # among the decodes, in the order of `Layout.order`
    stop: int
    rows: Rows  # of one after the other, each padded to the longest
    mask: Tensor | None  # [sequences, 1, 1, keys] bool at first; None where nothing is padded

    def mask_for(self, dtype: torch.dtype) -> Tensor | None:
        """As SDPA adds it; given bool, it would be made this in every layer."""
        mask = self.mask
        if mask is not None and mask.dtype == torch.bool:
            mask = self.mask = torch.zeros_like(mask, dtype=dtype).masked_fill_(~mask, -math.inf)
        return mask


@dataclass(slots=True)
class Layout:
    """Where in the cache the keys of each sequence lie."""

    decodes: list[Decodes]
    order: Tensor | None  # [decodes] int64, by length; None where they stay as they come
    places: Tensor | None  # its inverse
    prefills: list[tuple[int, int, Rows]]  # first token, end, rows
    stores_all: bool  # no token is padding
    buffers: dict[str, Tensor] = field(default_factory=dict)  # working memory that the layers share
    groups: dict[int, Any] = field(default_factory=dict)  # of fixed_attention.py, by heads per KV head
    masks: dict[tuple[int, int, int], Tensor] = field(default_factory=dict)  # see causal_mask

    @classmethod
    def of(
        cls,
        block_tables: Tensor,
        query_starts: Tensor,
        context_lens: Tensor,
        slots: Tensor,
        *,
        num_decodes: int,
        block_size: int,
        is_fixed: bool = False,
    ) -> "Layout":
        """See `Ragged`."""
        stores_all = -1 not in slots.tolist()
        if is_fixed:
            return cls([], None, None, [], stores_all)
        starts, lens = query_starts.tolist(), context_lens.tolist()
        prefills = [
            (starts[s], starts[s + 1], _rows(block_tables[s], lens[s], block_size))
            for s in range(num_decodes, len(lens))
            if starts[s + 1] > starts[s]
        ]
        decodes = _decodes(block_tables[:num_decodes], context_lens[:num_decodes], lens[:num_decodes], block_size)
        return cls(*decodes, prefills, stores_all)

    def causal_mask(self, queries: int, keys: int, dtype: torch.dtype, times: int = 1) -> Tensor:
        """[times * queries, keys]: 0, and minus infinity for what comes after a query, the last seeing all keys; all
        of it `times` times. Small ones are kept for the layers that follow, which have one dtype."""
        mask = self.masks.get((queries, keys, times))
        if mask is None:
            mask = torch.full((queries, keys), -math.inf, dtype=dtype).triu_(keys - queries + 1)
            mask = mask.repeat(times, 1) if times > 1 else mask
            if mask.numel() <= _KEPT_MASK:
                self.masks[queries, keys, times] = mask
        return mask

    def gather(self, cache: Tensor, rows: Rows, name: str) -> Tensor:
        """Of a cache [slots, kv_heads, head_dim] -> [keys, kv_heads, head_dim]: a view, or a copy that holds until the
        next gather under the same name."""
        if isinstance(rows, slice):
            return cache[rows]
        count, buffer = rows.shape[0], self.buffers.get(name)
        if buffer is None or buffer.shape[0] < count or buffer.dtype != cache.dtype:
            buffer = self.buffers[name] = cache.new_empty(count, *cache.shape[1:])
        return torch.index_select(cache, 0, rows, out=buffer if buffer.shape[0] == count else buffer[:count])


def _decodes(
    block_tables: Tensor, context_lens: Tensor, lens: list[int], block_size: int
) -> tuple[list[Decodes], Tensor | None, Tensor | None]:
    """`decodes`, `order` and `places` of Layout."""
    order = sorted(range(len(lens)), key=lambda i: lens[i])
    bounds = _bounds([lens[i] for i in order])
    if len(bounds) < 3:
        rows_and_mask = _decode_rows(block_tables, context_lens, lens, block_size) if lens else None
        return [] if rows_and_mask is None else [Decodes(0, len(lens), *rows_and_mask)], None, None
    by_length = torch.tensor(order)
    block_tables, context_lens = block_tables.index_select(0, by_length), context_lens.index_select(0, by_length)
    decodes = []
    for first, stop in pairwise(bounds):
        of_them = block_tables[first:stop], context_lens[first:stop], [lens[i] for i in order[first:stop]]
        decodes.append(Decodes(first, stop, *_decode_rows(*of_them, block_size)))
    return decodes, by_length, by_length.argsort()


def _bounds(lens: list[int]) -> list[int]:
    """Cuts of ascending lengths, ends included, between which at most _PADDED_KEYS are missing to the longest."""
    bounds, missing = [len(lens)], 0
    for i in range(len(lens) - 1, -1, -1):
        missing += lens[bounds[-1] - 1] - lens[i]
        if missing > _PADDED_KEYS:
            bounds.append(i + 1)
            missing = 0
    return [0, *reversed(bounds)]


def _decode_rows(
    block_tables: Tensor, context_lens: Tensor, lens: list[int], block_size: int
) -> tuple[Rows, Tensor | None]:
    """`rows` and `mask` of Decodes."""
    if len(lens) == 1:
        # A padding row without context reads the first slot of its first block, which its mask then drops.
        mask = None if lens[0] else context_lens.new_zeros(1, 1, 1, 1, dtype=torch.bool)
        return _rows(block_tables[0], max(1, lens[0]), block_size), mask
    longest = max(1, *lens)
    keys = torch.arange(max(longest, block_size), dtype=torch.int32, device=block_tables.device)
    blocks = block_tables[:, : -(-longest // block_size), None]
    rows = torch.add(keys[:block_size], blocks, alpha=block_size).flatten(1)[:, :longest]  # [decodes, keys]
    if min(lens) == longest:
        return rows.flatten(), None
    # Past its end a sequence reads its own first token again: no slot that is not its own.
    is_key = keys[:longest] < context_lens[:, None]
    return torch.where(is_key, rows, rows[:, :1]).flatten(), is_key[:, None, None, :]


def _rows(block_table: Tensor, context_len: int, block_size: int) -> Rows:
    num_blocks = -(-context_len // block_size)
    blocks = block_table[:num_blocks].tolist()
    first = blocks[0]
    if blocks == list(range(first, first + num_blocks)):
        return slice(first * block_size, first * block_size + context_len)
    offsets = torch.arange(block_size, device=block_table.device)
    return (block_table[:num_blocks, None].to(torch.int64) * block_size + offsets).flatten()[:context_len]


class LoraGroup(NamedTuple):
    """The adapters first .. last, each with `each` rows, from row `start` on."""

    first: int
    last: int
    each: int
    start: int

    @property
    def end(self) -> int:
        return self.start + (self.last - self.first + 1) * self.each

    def of(self, rows: Tensor) -> Tensor:
        """The group's part of [rows, ...] as [adapters, each, ...], a view."""
        return rows[self.start : self.end].unflatten(0, (-1, self.each))


@dataclass(frozen=True, slots=True)
class LoraLayout:
    """Tokens brought together by adapter.

    Adapters with neighbouring indices and about as many tokens share one batched matmul, for which shorter ones are
    filled up with rows whose results are not read. Without it decoding, where an adapter has a token or two, would
    spend its time on the number of calls.
    """

    rows: Tensor  # [rows] int64, the token of each row, by adapter; any token where a row only fills up
    tokens: Tensor  # [adapted tokens] int64, by adapter
    used: Tensor | None  # [adapted tokens] int64, the row of each of `tokens`; None = they are the rows
    groups: tuple[LoraGroup, ...]

    @classmethod
    def of(cls, indices: Tensor, fixed: Pieces | None = None) -> "LoraLayout":
        """See `TokenAdapters`."""
        counts = torch.bincount(indices, minlength=1).tolist()
        tokens = torch.argsort(indices, stable=True)[counts[0] :]
        if fixed is None:
            groups = _groups(counts)
            filled = [count for g in groups for count in counts[g.first : g.last + 1]]
        else:
            groups, filled = _groups_in_pieces(counts, fixed)
        num_rows = groups[-1].end if groups else 0
        if num_rows == len(tokens):
            return cls(tokens, tokens, None, tuple(groups))
        firsts = [g.start + i * g.each for g in groups for i in range(g.last - g.first + 1)]
        lengths = torch.tensor(filled)
        shifts = torch.tensor(firsts) - (lengths.cumsum(0) - lengths)
        used = torch.arange(len(tokens)) + shifts.repeat_interleave(lengths)
        rows = tokens[:1].repeat(num_rows)
        rows[used] = tokens
        return cls(rows, tokens, used, tuple(groups))


def _groups_in_pieces(counts: list[int], fixed: Pieces) -> tuple[list[LoraGroup], list[int]]:
    """One adapter a group, whose rows are a piece -> the groups, and how many rows of each are tokens."""
    groups: list[LoraGroup] = []
    filled = []
    for index, count in enumerate(counts[1:], 1):
        for first in range(0, count, fixed.most):
            filled.append(min(fixed.most, count - first))
            start = groups[-1].end if groups else 0
            groups.append(LoraGroup(index, index, fixed.filled(filled[-1]), start))
    return groups, filled


def _groups(counts: list[int]) -> list[LoraGroup]:
    """counts[i] is the number of tokens of adapter i."""
    groups: list[LoraGroup] = []
    total = 0  # tokens of the last group
    for index, count in enumerate(counts[1:], 1):
        if not count:
            continue
        if groups and groups[-1].last == index - 1:
            first, _, each, start = groups[-1]
            wider = LoraGroup(first, index, max(each, count), start)
            if wider.end - start - (total + count) <= _FILLED * (index - first + 1):
                groups[-1] = wider
                total += count
                continue
        groups.append(LoraGroup(index, index, count, groups[-1].end if groups else 0))
        total = count
    return groups
