"""Attention over the paged cache in plain PyTorch.

No copy of K or V per query head: grouped heads share them (prefill) or lie beside one another as the queries of one
head (decode). Keys come in whole blocks, for a copy of many short pieces costs more than the bytes; what lies past a
sequence's context is cut off or made 0, so that it cannot leak. Large steps in float32 copy nothing.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from llama.kernels.cpu import fixed_attention
from llama.kernels.cpu.e4m3 import from_e4m3
from llama.kernels.cpu.layout import Decodes, Keys, Layout
from llama.kernels.types import KVLayer, Ragged

# Entries of one mask at most (queries x keys), which bounds what a chunk of a long prompt allocates.
MASK_ENTRIES = 1 << 22

# Up to so many queries of a KV head's group, a product for each KV head costs less than one for each head.
FEW_ROWS = 32

# Numbers of K in all contexts of a step's decodes from which float32's K and V are read where they lie, and query heads
# per KV head up to which they are: each of these reads them again.
IN_PLACE, FEW_READERS = 1 << 18, 4


def paged_attention(q: Tensor, kv_layer: KVLayer, ragged: Ragged, scale: float) -> Tensor:
    if kv_layer.scales is None:
        return _attention(q, kv_layer, ragged, scale)
    # Scales of heads go with q and with the result: K and V are widened as they are.
    group = q.shape[1] // kv_layer.k.shape[2]
    of_k, of_v = kv_layer.scales.repeat_interleave(group, dim=1)[:, :, None].unbind()
    mixed = _attention((q * of_k).to(q.dtype), kv_layer, ragged, scale)
    return (mixed * of_v).to(q.dtype)


def _attention(q: Tensor, kv_layer: KVLayer, ragged: Ragged, scale: float) -> Tensor:
    if ragged.fixed is not None:
        return fixed_attention.attention(q, kv_layer, ragged, ragged.fixed, scale)
    num_decodes, layout = ragged.num_decodes, ragged.cpu_layout
    if num_decodes == q.shape[0] and num_decodes:
        return _decode(q, kv_layer, layout, scale)
    parts = []
    if num_decodes:
        parts.append(_decode(q[:num_decodes], kv_layer, layout, scale))
    for start, end, keys, context_len in layout.prefills:
        k = _in_order(kv_layer.k, keys, context_len, layout, "k")
        v = _in_order(kv_layer.v, keys, context_len, layout, "v")
        parts.append(_causal(q[start:end], _widened(k, q), _widened(v, q), scale, layout))
    if (count := sum(map(len, parts))) < len(q):  # a recorded step: behind the last sequence there may be padding
        parts.append(torch.zeros_like(q[count:]))
    if len(parts) == 1:
        return parts[0]
    return torch.cat(parts) if parts else torch.empty_like(q, memory_format=torch.contiguous_format)


def _decode(q: Tensor, kv_layer: KVLayer, layout: Layout, scale: float) -> Tensor:
    """One query per sequence. Sequences of much the same length are computed together: little is padded."""
    decodes = layout.parts(kv_layer.k.shape[2] * kv_layer.k.shape[3])
    attend = _where_they_lie if _in_place(q, kv_layer.k, layout) else _decode_some
    if layout.order is None or layout.places is None:
        return attend(q, kv_layer, layout, decodes[0], scale)
    q = q.index_select(0, layout.order)
    parts = [attend(q[some.first : some.stop], kv_layer, layout, some, scale) for some in decodes]
    return torch.cat(parts).index_select(0, layout.places)


def _decode_some(q: Tensor, kv_layer: KVLayer, layout: Layout, some: Decodes, scale: float) -> Tensor:
    """The heads of a group become the queries of their KV head."""
    sequences, heads, head_dim = q.shape
    kv_heads = kv_layer.k.shape[2]
    if isinstance(some.keys, slice):
        k, v = _run(kv_layer.k, some.keys), _run(kv_layer.v, some.keys)
    else:
        k = _side_by_side(layout.gather(kv_layer.k, some.keys, "k"), some)
        v = _side_by_side(layout.gather(kv_layer.v, some.keys, "v"), some)
    grouped = q.view(sequences, kv_heads, heads // kv_heads, head_dim)
    k, v = _widened(k, q), _widened(v, q)
    mixed = F.scaled_dot_product_attention(grouped, k, v, attn_mask=some.mask_for(q.dtype), scale=scale)
    return mixed.reshape(q.shape)


def _in_place(q: Tensor, k: Tensor, layout: Layout) -> bool:
    """Whether to read K and V where they lie. Padding, which has no context, has no place."""
    kv_heads, head_dim = k.shape[2:]
    if q.shape[1] > FEW_READERS * kv_heads or not q.dtype == k.dtype == torch.float32:
        return False
    return sum(layout.lens) * kv_heads * head_dim >= IN_PLACE and min(layout.lens) > 0


def _where_they_lie(q: Tensor, kv_layer: KVLayer, layout: Layout, some: Decodes, scale: float) -> Tensor:
    """`_decode_some` without a copy of K and V: scores are entries of a sparse product, values are summed in bags."""
    sequences, heads, head_dim = q.shape
    k, v = (slots.view(-1, head_dim) for slots in kv_layer.slots)
    bags = some.bags_for(heads, kv_layer.k)
    product = torch.sparse.sampled_addmm(bags.pattern, q.reshape(-1, head_dim), k.t(), beta=0.0, alpha=scale)
    scores = product.values().view(sequences, heads, some.longest)
    if bags.missing is not None:
        scores.masked_fill_(bags.missing, -math.inf)
    weights = scores.softmax(-1).view(-1)
    mixed = torch.embedding_bag(v, bags.columns, bags.starts, False, 0, False, weights, True)[0]
    return mixed.view(q.shape)


def _side_by_side(blocks: Tensor, some: Decodes) -> Tensor:
    """[sequences * blocks, block_size, kv_heads, head_dim] -> [sequences, kv_heads, keys, head_dim], a view. What lies
    past a context becomes 0: a NaN there would outlive the mask."""
    _, _, kv_heads, head_dim = blocks.shape
    if some.missing is not None:
        blocks.flatten(0, 1).index_fill_(0, some.missing, 0)
    slot = kv_heads * head_dim
    shape = (some.stop - some.first, kv_heads, some.longest, head_dim)
    return blocks.as_strided(shape, (some.width * slot, head_dim, slot, 1))


def _in_order(cache: Tensor, keys: Keys, context_len: int, layout: Layout, name: str) -> Tensor:
    """[keys, kv_heads, head_dim] of one sequence."""
    if isinstance(keys, slice):
        return cache.flatten(0, 1)[keys]
    return layout.gather(cache, keys, name).flatten(0, 1)[:context_len]


def _widened(x: Tensor, q: Tensor) -> Tensor:
    return from_e4m3(x, q.dtype) if x.dtype == torch.uint8 else x


def _run(cache: Tensor, rows: slice) -> Tensor:
    """[1, kv_heads, keys, head_dim] of neighbouring slots, in one call."""
    _, _, kv_heads, head_dim = cache.shape
    _, slot, head, _ = cache.stride()
    start = cache.storage_offset() + rows.start * slot
    return cache.as_strided((1, kv_heads, rows.stop - rows.start, head_dim), (0, head, slot, 1), start)


def _causal(q: Tensor, k: Tensor, v: Tensor, scale: float, layout: Layout) -> Tensor:
    """[queries, heads, head_dim] against the keys up to each query's own, the last query seeing all of them."""
    queries, heads, head_dim = q.shape
    context, kv_heads = k.shape[:2]
    group = heads // kv_heads
    if queries * group <= FEW_ROWS:  # drafts: as in a decode, a group's queries are those of its KV head
        mask = layout.causal_mask(queries, context, q.dtype, group)
        rows = q.view(queries, kv_heads, group, head_dim).permute(1, 2, 0, 3)
        rows = rows.reshape(1, kv_heads, group * queries, head_dim)
        k, v = k.transpose(0, 1)[None], v.transpose(0, 1)[None]
        mixed = F.scaled_dot_product_attention(rows, k, v, attn_mask=mask, scale=scale)
        mixed = mixed.view(kv_heads, group, queries, head_dim).permute(2, 0, 1, 3)
        return mixed.reshape(queries, heads, head_dim).contiguous()
    q, k, v = (x.transpose(0, 1)[None] for x in (q, k, v))  # a batch of one: its result lies token by token
    if queries == context:
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale, enable_gqa=True)
        return mixed[0].transpose(0, 1).contiguous()
    out = torch.empty(queries, heads, head_dim, dtype=q.dtype, device=q.device)
    step = max(16, MASK_ENTRIES // context)
    for start in range(0, queries, step):
        end = min(start + step, queries)
        visible = context - queries + end
        mask = layout.causal_mask(end - start, visible, q.dtype)
        mixed = F.scaled_dot_product_attention(
            q[:, :, start:end], k[:, :, :visible], v[:, :, :visible], attn_mask=mask, scale=scale, enable_gqa=True
        )
        out[start:end] = mixed[0].transpose(0, 1)
    return out
