"""What depends on the step alone and not on the layer, worked out once for all layers of a step."""

from dataclasses import dataclass, field

import torch
from torch import Tensor

Rows = slice | Tensor  # of a cache seen as [slots, kv_heads, head_dim]: a run, or indices


@dataclass(slots=True)
class AttentionPlan:
    """Where the keys of each sequence lie."""

    decode_rows: Rows  # of all decodes, one after the other, each padded to the longest
    decode_mask: Tensor | None  # [decodes, 1, 1, keys] bool; None where nothing is padded
    prefills: list[tuple[int, int, Rows]]  # first token, end, rows
    buffers: dict[str, Tensor] = field(default_factory=dict)  # working memory that the layers share

    def gather(self, cache: Tensor, rows: Rows, name: str) -> Tensor:
        """[keys, kv_heads, head_dim]: a view, or a copy that holds until the next gather under the same name."""
        cache = cache.flatten(0, 1)
        if isinstance(rows, slice):
            return cache[rows]
        buffer = self.buffers.get(name)
        if buffer is None or buffer.shape[0] < rows.shape[0] or buffer.dtype != cache.dtype:
            buffer = self.buffers[name] = cache.new_empty(rows.shape[0], *cache.shape[1:])
        return torch.index_select(cache, 0, rows, out=buffer[: rows.shape[0]])


@dataclass(frozen=True, slots=True)
class StepPlan:
    attention: AttentionPlan
    stores_all: bool  # no token is padding
    rotation: tuple[Tensor, Tensor]  # see `rotation`


def plan_step(
    block_tables: Tensor,
    query_starts: Tensor,
    context_lens: Tensor,
    slots: Tensor,
    cos_sin: Tensor,
    *,
    num_decodes: int,
    block_size: int,
) -> StepPlan | None:
    attention = plan_attention(block_tables, query_starts, context_lens, num_decodes, block_size)
    return StepPlan(attention, -1 not in slots.tolist(), rotation(cos_sin))


def plan_attention(
    block_tables: Tensor, query_starts: Tensor, context_lens: Tensor, num_decodes: int, block_size: int
) -> AttentionPlan:
    starts, lens = query_starts.tolist(), context_lens.tolist()
    prefills = [
        (starts[s], starts[s + 1], _rows(block_tables[s], lens[s], block_size))
        for s in range(num_decodes, len(lens))
        if starts[s + 1] > starts[s]
    ]
    decodes = _decode_rows(block_tables[:num_decodes], context_lens[:num_decodes], lens[:num_decodes], block_size)
    return AttentionPlan(*decodes, prefills)


def rotation(cos_sin: Tensor) -> tuple[Tensor, Tensor]:
    """[tokens, 1, head_dim] each: x_rotated = x * first + (x with its halves swapped) * second."""
    cos, sin = cos_sin.unsqueeze(1).chunk(2, dim=-1)
    return torch.cat((cos, cos), dim=-1), torch.cat((-sin, sin), dim=-1)


def _decode_rows(
    block_tables: Tensor, context_lens: Tensor, lens: list[int], block_size: int
) -> tuple[Rows, Tensor | None]:
    """`decode_rows` and `decode_mask` of AttentionPlan."""
    if not lens:
        return slice(0), None
    if len(lens) == 1:
        # A padding row without context reads the first slot of its first block, which its mask then drops.
        mask = None if lens[0] else context_lens.new_zeros(1, 1, 1, 1, dtype=torch.bool)
        return _rows(block_tables[0], max(1, lens[0]), block_size), mask
    longest = max(1, *lens)
    keys = torch.arange(longest, device=block_tables.device)
    ends = context_lens[:, None].to(torch.int64)
    # Past its end a sequence reads its own last token again: no slot that is not its own.
    columns = torch.minimum(keys, (ends - 1).clamp_(min=0))  # [decodes, keys]
    blocks = block_tables.to(torch.int64).gather(1, columns // block_size)
    rows = (blocks * block_size + columns % block_size).flatten()
    return rows, (keys < ends)[:, None, None, :] if min(lens) < longest else None


def _rows(block_table: Tensor, context_len: int, block_size: int) -> Rows:
    num_blocks = -(-context_len // block_size)
    blocks = block_table[:num_blocks].tolist()
    first = blocks[0]
    if blocks == list(range(first, first + num_blocks)):
        return slice(first * block_size, first * block_size + context_len)
    offsets = torch.arange(block_size, device=block_table.device)
    return (block_table[:num_blocks, None].to(torch.int64) * block_size + offsets).flatten()[:context_len]
