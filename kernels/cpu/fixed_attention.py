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

from llama.kernels.cpu.layout import Keys, Layout, keys_of
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
    """Sequences that have equally many keys."""

    places: Keys  # of a single one; or the blocks of one sequence after the other, as many of each
    keys: int
    wide: Tensor  # [2, sequences, slots, kv_heads, head_dim]: K and V, in memory that all groups and layers share
    behind: list[Tensor]  # parts of `wide` that lie past a context
    tiles: list[Tile]

    @classmethod
    def of(cls, ragged: Ragged, lens: dict[int, int], keys: int, tiles: list[Tile], wide: Tensor) -> "Group":
        """lens: the context of each sequence."""
        size = ragged.block_size
        behind = [wide[:, i, length:] for i, length in enumerate(lens.values()) if length < wide.shape[2]]
        if len(lens) == 1:
            [(s, length)] = lens.items()
            places = keys_of(ragged.block_tables[s], length, size)
            if isinstance(places, slice):
                return cls(places, keys, wide, behind, tiles)
        # Those past a context are its last block again.
        lasts = (torch.tensor(list(lens.values()), device="cpu")[:, None] - 1) // size
        columns = torch.arange(wide.shape[2] // size, device="cpu").minimum(lasts)
        blocks = ragged.block_tables[torch.tensor(list(lens), device="cpu")].gather(1, columns)
        return cls(blocks.flatten(), keys, wide, behind, tiles)

    def fill(self, kv_layer: KVLayer, layout: Layout) -> list[Tensor]:
        """K and V of a layer, [sequences, kv_heads, keys, head_dim]. Past a context they are 0: a NaN would outlive
        the mask."""
        for wide, cache, slots in zip(self.wide, (kv_layer.k, kv_layer.v), kv_layer.slots, strict=True):
            if isinstance(self.places, slice):
                found = slots[self.places]
                wide[0, : len(found)].copy_(_floats(found))
            elif cache.dtype == wide.dtype:
                torch.index_select(cache, 0, self.places, out=wide.view(-1, *cache.shape[1:]))
            else:
                found = layout.gather(cache, self.places, "keys")
                wide.view(found.shape).copy_(_floats(found))
        for part in self.behind:
            part.zero_()
        return [wide[:, : self.keys].transpose(1, 2) for wide in self.wide]


def _floats(values: Tensor) -> Tensor:
    return values.view(torch.float8_e4m3fn) if values.dtype == torch.uint8 else values


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
    layout, kind = ragged.cpu_layout, (q.shape[1:], kv_layer.k.shape[2:], q.dtype)
    groups = layout.groups.get(kind)
    if groups is None:
        groups = layout.groups[kind] = _groups(ragged, pieces, *kind)
    out = torch.empty_like(q, memory_format=torch.contiguous_format)
    for group in groups:
        k, v = group.fill(kv_layer, layout)
        for tile in group.tiles:
            mixed = _attend(q[tile.tokens], k, v, tile, pieces, scale)
            if isinstance(tile.tokens, slice):
                out[tile.tokens].view(mixed.shape).copy_(mixed)
            else:
                out[tile.tokens] = mixed.reshape(-1, *q.shape[1:]).to(q.dtype)
    return out


def _attend(q: Tensor, k: Tensor, v: Tensor, tile: Tile, pieces: Pieces, scale: float) -> Tensor:
    """q [sequences * queries, heads, head_dim] -> [sequences, queries, kv_heads, heads / kv_heads, head_dim], wide: the
    queries of a KV head's group become rows of one product."""
    sequences, kv_heads, _, head_dim = k.shape
    group_size = q.shape[1] // kv_heads
    rows = tile.queries * group_size
    x = q.view(sequences, tile.queries, kv_heads, group_size, head_dim).transpose(1, 2).to(k.dtype)
    x = x.reshape(sequences, kv_heads, rows, head_dim)
    if missing := pieces.filled(rows) - rows:
        x = F.pad(x, (0, 0, 0, missing))
    k, v = k[:, :, : tile.keys], v[:, :, : tile.keys]
    mixed = F.scaled_dot_product_attention(x, k, v, attn_mask=tile.mask, scale=scale)[:, :, :rows]
    return mixed.unflatten(2, (tile.queries, group_size)).transpose(1, 2)


def _groups(ragged: Ragged, pieces: Pieces, heads: torch.Size, kv_heads: torch.Size, dtype: torch.dtype) -> list[Group]:
    """Of such queries [heads, head_dim] and keys [kv_heads, head_dim]."""
    starts, wide = ragged.query_starts.tolist(), wide_dtype(dtype)
    decodes: dict[int, dict[int, int]] = defaultdict(dict)
    parts: list[tuple[int, dict[int, int], list[Tile]]] = []  # keys, context of each sequence, tiles
    for s, context_len in enumerate(ragged.context_lens.tolist()):
        first = context_len - (starts[s + 1] - starts[s])
        if starts[s + 1] - starts[s] == 1:
            decodes[num_keys(context_len)][s] = max(1, context_len)
        elif starts[s + 1] > starts[s]:
            tiles = _tiles(starts[s], first, context_len, pieces, heads[0] // kv_heads[0], wide)
            parts.append((num_keys(context_len), {s: context_len}, tiles))
    parts += [(keys, lens, [_decodes(starts, lens, keys, wide)]) for keys, lens in decodes.items()]
    most = max((len(lens) * _slots(keys, ragged) for keys, lens, _ in parts), default=0)
    memory = torch.empty(2 * most * kv_heads.numel(), dtype=wide, device="cpu")
    groups = []
    for keys, lens, tiles in parts:
        shape = 2, len(lens), _slots(keys, ragged), *kv_heads
        groups.append(Group.of(ragged, lens, keys, tiles, memory[: math.prod(shape)].view(shape)))
    return groups


def _slots(keys: int, ragged: Ragged) -> int:
    """Of the whole blocks that they are in."""
    return -(-keys // ragged.block_size) * ragged.block_size


def _decodes(starts: list[int], lens: dict[int, int], keys: int, wide: torch.dtype) -> Tile:
    """Of sequences with one query each."""
    mask = torch.zeros(len(lens), 1, 1, keys, dtype=wide, device="cpu")
    visible = torch.tensor(list(lens.values()), device="cpu")[:, None, None, None]
    mask.masked_fill_(torch.arange(keys, device="cpu") >= visible, -math.inf)
    tokens = [starts[s] for s in lens]
    in_a_run = tokens == list(range(tokens[0], tokens[0] + len(tokens)))
    return Tile(slice(tokens[0], tokens[-1] + 1) if in_a_run else torch.tensor(tokens, device="cpu"), 1, keys, mask)


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
