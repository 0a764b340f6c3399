"""What the CPU's ops need to know of a step and not of a layer, worked out once for all layers."""

import math
import warnings
from dataclasses import dataclass, field
from functools import cache
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor

from llama.kernels.cpu.pieces import Pieces

# Entries of a mask that is kept for all layers of a step: every sequence may have its own.
_KEPT_MASK = 1 << 16

# Rows per adapter that may only fill up a batched matmul: fewer than would cost what a call costs.
_FILLED = 4

# Keys by which sequences that are gathered together may be padded, all of them: as many as cost what a call more costs,
# which is so many numbers of keys (a small model's keys are short).
_PADDED_KEYS, _PADDED_NUMBERS = 128, 24_576

Keys = slice | Tensor  # of one sequence: its slots where they lie in a row, or the blocks that they are in


class Bags(NamedTuple):
    """Where in a cache's [slots * kv_heads, head_dim] the keys of each query head lie: one run of `columns` a head,
    `longest` each. Past a context it is the context's last key again, so that no slot of others is read."""

    columns: Tensor  # [sequences * heads * longest] int32
    starts: Tensor  # [sequences * heads + 1] int32, of each head's run
    pattern: Tensor  # the same as a sparse matrix [sequences * heads, slots * kv_heads] of zeros
    missing: Tensor | None  # bool [sequences, 1, longest], what is past a context

    @classmethod
    def of(cls, some: "Decodes", heads: int, cache: Tensor) -> "Bags":
        num_blocks, block_size, kv_heads, _ = cache.shape
        inside = torch.arange(block_size, dtype=torch.int32, device="cpu")
        blocks = some.block_tables[:, : some.width // block_size, None]
        slots = torch.add(inside, blocks, alpha=block_size).flatten(1)
        missing = None
        if some.missing is None:
            slots = slots[:, : some.longest]
        else:
            lasts, places = torch.tensor(some.lens, device="cpu")[:, None] - 1, torch.arange(some.longest, device="cpu")
            missing = (places > lasts)[:, None]
            slots = slots.gather(1, places.minimum(lasts))
        kv_head = torch.arange(kv_heads, dtype=torch.int32, device="cpu").repeat_interleave(heads // kv_heads)
        columns = torch.add(kv_head[:, None], slots[:, None], alpha=kv_heads).flatten()
        starts = torch.arange(0, columns.shape[0] + 1, some.longest, dtype=torch.int32, device="cpu")
        shape = starts.shape[0] - 1, num_blocks * block_size * kv_heads
        return cls(columns, starts, _sparse(starts, columns, shape), missing)


@dataclass(slots=True)
class Decodes:
    """Sequences whose keys are computed with together."""

    first: int  # among the decodes, in the order of `Layout.order`
    stop: int
    keys: Keys  # of a single one; or the blocks of one sequence after the other, as many of each
    longest: int  # keys that each is computed with
    width: int  # slots in the blocks of one
    missing: Tensor | None  # int64, places in [sequences, width] that are past a context and before `longest`
    block_tables: Tensor  # of these sequences
    lens: list[int]  # their contexts
    mask: Tensor | None = None
    bags: Bags | None = None

    @classmethod
    def of(cls, block_tables: Tensor, lens: list[int], first: int, block_size: int) -> "Decodes":
        longest = max(1, *lens)
        num_blocks = -(-longest // block_size)
        width = num_blocks * block_size
        if lens == [longest]:
            keys = keys_of(block_tables[0], longest, block_size)
            return cls(first, first + 1, keys, longest, width, None, block_tables, lens)
        places: list[int] = []
        for i, length in enumerate(lens):
            places += range(i * width + length, i * width + longest)
        missing = torch.tensor(places, device="cpu") if places else None
        blocks = block_tables[:, :num_blocks].flatten()
        return cls(first, first + len(lens), blocks, longest, width, missing, block_tables, lens)

    def bags_for(self, heads: int, cache: Tensor) -> Bags:
        """The same for all layers."""
        if self.bags is None:
            self.bags = Bags.of(self, heads, cache)
        return self.bags

    def mask_for(self, dtype: torch.dtype) -> Tensor | None:
        """[sequences, 1, 1, longest] as SDPA adds it, one for all layers; None where nothing is missing."""
        if self.mask is None and self.missing is not None:
            mask = torch.zeros(self.stop - self.first, 1, 1, self.width, dtype=dtype, device="cpu")
            mask.view(-1).index_fill_(0, self.missing, -math.inf)
            self.mask = mask[..., : self.longest].contiguous()
        return self.mask


@dataclass(slots=True)
class Layout:
    """Where in the cache the keys of each sequence lie."""

    block_tables: Tensor  # of the decodes
    lens: list[int]  # their contexts
    block_size: int
    prefills: list[tuple[int, int, Keys, int]]  # first token, end, keys, and how many these are
    stores_all: bool  # no token is padding
    decodes: list[Decodes] = field(default_factory=list)  # see parts
    order: Tensor | None = None  # [decodes] int64, by length; None where they stay as they come
    places: Tensor | None = None  # its inverse
    buffers: dict[str, Tensor] = field(default_factory=dict)  # working memory that the layers share
    groups: dict[Any, Any] = field(default_factory=dict)  # of fixed_attention.py, by kind of queries and keys
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
            return cls(block_tables, [], block_size, [], stores_all)
        starts, lens = query_starts.tolist(), context_lens.tolist()
        prefills = [
            (starts[s], starts[s + 1], keys_of(block_tables[s], lens[s], block_size), lens[s])
            for s in range(num_decodes, len(lens))
            if starts[s + 1] > starts[s]
        ]
        return cls(block_tables[:num_decodes], lens[:num_decodes], block_size, prefills, stores_all)

    def parts(self, numbers: int) -> list[Decodes]:
        """The decodes, one at least, where a key is so many numbers: those that are gathered together."""
        if not self.decodes:
            most_padded = max(_PADDED_KEYS, _PADDED_NUMBERS // numbers)
            order = sorted(range(len(self.lens)), key=lambda i: self.lens[i])
            bounds = _bounds([self.lens[i] for i in order], most_padded)
            block_tables = self.block_tables
            if len(bounds) > 2:
                self.order = torch.tensor(order, device="cpu")
                self.places, block_tables = self.order.argsort(), block_tables.index_select(0, self.order)
            else:
                order.sort()
            self.decodes = [
                Decodes.of(block_tables[first:stop], [self.lens[i] for i in order[first:stop]], first, self.block_size)
                for first, stop in pairwise(bounds)
            ]
        return self.decodes

    def causal_mask(self, queries: int, keys: int, dtype: torch.dtype, times: int = 1) -> Tensor:
        """[times * queries, keys]: 0, and minus infinity for what comes after a query, the last seeing all keys; all
        of it `times` times. Small ones are kept for the layers that follow, which have one dtype."""
        mask = self.masks.get((queries, keys, times))
        if mask is None:
            mask = torch.full((queries, keys), -math.inf, dtype=dtype, device="cpu").triu_(keys - queries + 1)
            mask = mask.repeat(times, 1) if times > 1 else mask
            if mask.numel() <= _KEPT_MASK:
                self.masks[queries, keys, times] = mask
        return mask

    def gather(self, cache: Tensor, places: Tensor, name: str) -> Tensor:
        """cache[places], a copy that holds until the next gather under the same name."""
        count, buffer = places.shape[0], self.buffers.get(name)
        if buffer is None or buffer.shape[0] < count or buffer.dtype != cache.dtype:
            buffer = self.buffers[name] = cache.new_empty(count, *cache.shape[1:])
        return torch.index_select(cache, 0, places, out=buffer if buffer.shape[0] == count else buffer[:count])


def _bounds(lens: list[int], most_padded: int) -> list[int]:
    """Cuts of ascending lengths, ends included, between which at most so many keys are missing to the longest."""
    bounds, missing = [len(lens)], 0
    for i in range(len(lens) - 1, -1, -1):
        missing += lens[bounds[-1] - 1] - lens[i]
        if missing > most_padded:
            bounds.append(i + 1)
            missing = 0
    return [0, *reversed(bounds)]


def keys_of(block_table: Tensor, context_len: int, block_size: int) -> Keys:
    blocks = block_table[: -(-context_len // block_size)]
    numbers = blocks.tolist()
    first = numbers[0]
    if numbers == list(range(first, first + len(numbers))):
        return slice(first * block_size, first * block_size + context_len)
    return blocks


def _sparse(starts: Tensor, columns: Tensor, shape: tuple[int, int]) -> Tensor:
    """Zeros in compressed rows."""
    _accept_sparse()
    values = torch.zeros(columns.shape[0], device="cpu")
    return torch.sparse_csr_tensor(starts, columns, values, shape, check_invariants=False, device="cpu")


@cache
def _accept_sparse() -> None:
    """PyTorch says of the first such tensor of a process that they may lack something; what is used here they have."""
    starts = torch.zeros(1, dtype=torch.int32, device="cpu")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.sparse_csr_tensor(starts, starts[:0], starts[:0].float(), (0, 0), check_invariants=False, device="cpu")


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
        lengths = torch.tensor(filled, device="cpu")
        shifts = torch.tensor(firsts, device="cpu") - (lengths.cumsum(0) - lengths)
        used = torch.arange(len(tokens), device="cpu") + shifts.repeat_interleave(lengths)
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
