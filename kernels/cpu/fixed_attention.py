"""Attention whose result for a token has the same bits in every batch, chunk and kind of step.

All that a sum's order depends on follows from the token's own position: it is given a round number of keys, `num_keys`,
of which those behind it count as nothing, and products are made of rows in pieces that agree (`pieces.py`). A decode
and a prompt's token are computed alike, in at least float32. Decodes with equally many keys share one call.
"""

import math
from collections import defaultdict
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from llama.kernels.cpu.e4m3 import from_e4m3
from llama.kernels.cpu.layout import Layout
from llama.kernels.cpu.pieces import Pieces, find
from llama.kernels.types import KVLayer, Ragged, wide_dtype

_FEWEST_KEYS = 64
_MASK_ENTRIES = 1 << 22  # of one call's mask at most, where a piece of rows can be that small


class Tile(NamedTuple):
    """Queries that see equally many keys, some of them masked."""

    tokens: slice | Tensor  # `queries` of each sequence of the group
    queries: int
    keys: int
    mask: Tensor  # [sequences, 1, rows or 1, keys]: 0 or -inf


class Group(NamedTuple):
    """Sequences whose keys are gathered together, in whole blocks."""

    blocks: Tensor  # of one sequence after the other, as many of each; those past a context are its last one again
    missing: Tensor | None  # int64, places among the slots of these blocks that are past a context
    sequences: int
    keys: int  # of each
    tiles: list[Tile]

    @classmethod
    def of(cls, ragged: Ragged, seqs: list[int], lens: list[int], tiles: list[Tile]) -> "Group":
        """Of sequences with these contexts, which have equally many keys."""
        keys, size = num_keys(lens[0]), ragged.block_size
        visible = torch.tensor(lens, device="cpu").clamp_(min=1)[:, None]
        columns = torch.minimum(torch.arange(-(-keys // size), device="cpu"), (visible - 1) // size)
        blocks = ragged.block_tables[torch.tensor(seqs, device="cpu")].gather(1, columns)
        is_missing = torch.arange(blocks.shape[1] * size, device="cpu") >= visible
        is_missing[:, keys:] = False
        missing = is_missing.flatten().nonzero().squeeze(1)
        return cls(blocks.flatten(), missing if len(missing) else None, len(seqs), keys, tiles)

    def gather(self, cache: Tensor, layout: Layout, name: str, wide: torch.dtype) -> Tensor:
        """[sequences, kv_heads, keys, head_dim], 0 past a context: a NaN would outlive the mask."""
        blocks = layout.gather(cache, self.blocks, name)
        if self.missing is not None:
            blocks.flatten(0, 1).index_fill_(0, self.missing, 0)
        x = from_e4m3(blocks, wide) if blocks.dtype == torch.uint8 else blocks.to(wide)
        return x.view(self.sequences, -1, *x.shape[2:])[:, : self.keys].transpose(1, 2)


def num_keys(context_len: int) -> int:
    """The keys that a token with this context is computed with: eight numbers for each power of two from 512 on."""
    granularity = max(_FEWEST_KEYS, 1 << max(0, (context_len - 1).bit_length() - 4))
    return max(1, -(-context_len // granularity)) * granularity


def find_pieces(heads: int, kv_heads: int, head_dim: int, dtype: torch.dtype) -> Pieces | None:
    """What `Ragged.fixed` must be for a model of this shape on this machine, adapters too; None if nothing serves."""
    wide = wide_dtype(dtype)
    generator = torch.Generator().manual_seed(0)
    k, v = torch.randn(2, 1, kv_heads, num_keys(700), head_dim, generator=generator, device="cpu").to(wide)
    mask = torch.zeros(1, 1, 1, k.shape[2], dtype=wide, device="cpu")

    def product(x: Tensor) -> Tensor:
        q = x.expand(1, kv_heads, -1, -1)
        mixed = F.scaled_dot_product_attention(q, k, v, attn_mask=mask).squeeze(0).transpose(0, 1)
        return torch.cat((mixed.flatten(1), torch.bmm(x[None], k[:, 0, :64].mT).squeeze(0)), dim=1)

    pieces = find(product, torch.randn(128, head_dim, generator=generator, device="cpu").to(wide))
    return None if pieces is None or pieces.most < heads // kv_heads else pieces


def attention(q: Tensor, kv_layer: KVLayer, ragged: Ragged, pieces: Pieces, scale: float) -> Tensor:
    """`paged_attention`; with scales, q and the result are scaled by the caller."""
    kv_heads = kv_layer.k.shape[2]
    group_size = q.shape[1] // kv_heads
    layout, wide = ragged.cpu_layout, wide_dtype(q.dtype)
    groups = layout.groups.get(group_size)
    if groups is None:
        groups = layout.groups[group_size] = _groups(ragged, pieces, group_size, wide)
    out = torch.empty_like(q, memory_format=torch.contiguous_format)
    for group in groups:
        k = group.gather(kv_layer.k, layout, "k", wide)
        v = group.gather(kv_layer.v, layout, "v", wide)
        for tile in group.tiles:
            out[tile.tokens] = _attend(q[tile.tokens], k, v, tile, pieces, scale)
    return out


def _attend(q: Tensor, k: Tensor, v: Tensor, tile: Tile, pieces: Pieces, scale: float) -> Tensor:
    """q [sequences * queries, heads, head_dim]: the queries of a KV head's group become rows of one product."""
    tokens, heads, head_dim = q.shape
    sequences, kv_heads = k.shape[:2]
    group_size = heads // kv_heads
    rows = tile.queries * group_size
    x = q.new_zeros(sequences, kv_heads, pieces.filled(rows), head_dim, dtype=k.dtype)
    in_rows = q.view(sequences, tile.queries, kv_heads, group_size, head_dim).transpose(1, 2)
    x[:, :, :rows].unflatten(2, (tile.queries, group_size)).copy_(in_rows)
    k, v = k[:, :, : tile.keys], v[:, :, : tile.keys]
    mixed = F.scaled_dot_product_attention(x, k, v, attn_mask=tile.mask, scale=scale)[:, :, :rows]
    mixed = mixed.unflatten(2, (tile.queries, group_size)).transpose(1, 2)
    return mixed.reshape(tokens, heads, head_dim).to(q.dtype)


def _groups(ragged: Ragged, pieces: Pieces, group_size: int, wide: torch.dtype) -> list[Group]:
    starts, lens = ragged.query_starts.tolist(), ragged.context_lens.tolist()
    decodes: dict[int, list[int]] = defaultdict(list)
    prefills = []
    for s, context_len in enumerate(lens):
        if starts[s + 1] - starts[s] == 1:
            decodes[num_keys(context_len)].append(s)
        elif starts[s + 1] > starts[s]:
            prefills.append(s)
    groups = []
    for keys, members in decodes.items():
        seqs = torch.tensor(members, device="cpu")
        mask = torch.zeros(len(members), 1, 1, keys, dtype=wide, device="cpu")
        visible = ragged.context_lens[seqs].to(torch.int64)[:, None, None, None]
        mask.masked_fill_(torch.arange(keys, device="cpu") >= visible.clamp(min=1), -math.inf)
        first, last = starts[members[0]], starts[members[-1]]
        in_a_run = last - first + 1 == len(members)
        tokens = slice(first, last + 1) if in_a_run else ragged.query_starts[seqs].to(torch.int64)
        tile = Tile(tokens, 1, keys, mask)
        groups.append(Group.of(ragged, members, [lens[s] for s in members], [tile]))
    for s in prefills:
        first = lens[s] - (starts[s + 1] - starts[s])
        tiles = _tiles(starts[s], first, lens[s], pieces, group_size, wide)
        groups.append(Group.of(ragged, [s], [lens[s]], tiles))
    return groups


def _tiles(first_token: int, first: int, stop: int, pieces: Pieces, group_size: int, wide: torch.dtype) -> list[Tile]:
    """Of the positions first : stop of one sequence."""
    most_rows = min(pieces.most, max(pieces.least, _MASK_ENTRIES // num_keys(stop)))
    most = max(1, most_rows // group_size)
    bounds = []
    while first < stop:
        keys = num_keys(first + 1)
        end = min(stop, first + most, keys)
        bounds.append((first, end, keys))
        first = end
    # One mask serves all: a row of a query at position p is 0 up to column `reach`, which is where key p must lie.
    reach = bounds[-1][0]
    rows = pieces.filled(most * group_size)
    width = reach + max(keys - start for start, _, keys in bounds)
    mask = torch.full((-(-rows // group_size), width), -math.inf, dtype=wide, device="cpu").triu_(reach + 1)
    mask = mask.repeat_interleave(group_size, 0)
    tiles = []
    start_of_all = bounds[0][0]
    for start, end, keys in bounds:
        count = pieces.filled((end - start) * group_size)
        part = mask[:count, reach - start : reach - start + keys]
        place = first_token + start - start_of_all
        tiles.append(Tile(slice(place, place + end - start), end - start, keys, part[None, None]))
    return tiles
