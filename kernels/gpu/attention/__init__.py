"""Paged, ragged, causal attention with grouped heads: one kernel for decodes, one for everything with more queries."""

import torch
from torch import Tensor

from llama.kernels.gpu.attention.config import has_room
from llama.kernels.gpu.attention.decode import decode_attention
from llama.kernels.gpu.attention.prefill import prefill_attention
from llama.kernels.gpu.rope import rotate_and_store
from llama.kernels.types import CosSin, KVLayer, Ragged


def paged_attention(q: Tensor, kv_layer: KVLayer, ragged: Ragged, scale: float) -> Tensor:
    """See `ops.paged_attention`.

    Rows of an empty context are 0; rows that belong to no sequence are left as they were allocated. Grids and kernels
    follow from shapes alone, and a CUDA graph of decodes holds for any contexts.
    """
    return attend(q, kv_layer, ragged, scale, None)


def rotate_and_attend(
    qkv: Tensor, cos_sin: CosSin, kv_layer: KVLayer, ragged: Ragged, scale: float, counters: Tensor
) -> Tensor:
    """`rope_and_store` and `attend` of qkv [tokens, heads + 2 kv_heads, head_dim], contiguous: as one kernel where all
    sequences are decodes, each of its own, and registers allow. The same numbers are rounded at the same places."""
    kv_heads, head_dim = kv_layer.k.shape[2:]
    q, k, v = qkv.split_with_sizes((qkv.shape[1] - 2 * kv_heads, kv_heads, kv_heads), dim=1)
    is_alone = ragged.is_disjoint and ragged.num_decodes == len(qkv)
    group, is_e4m3 = q.shape[1] // kv_heads, kv_layer.scales is not None
    if is_alone and has_room(head_dim, q.element_size(), group, is_e4m3=is_e4m3):
        return attend(q, kv_layer, ragged, scale, counters, (*cos_sin, ragged.slots))
    return attend(
        rotate_and_store(q, k, v, cos_sin, kv_layer, ragged, is_early=True), kv_layer, ragged, scale, counters
    )


def attend(
    q: Tensor,
    kv_layer: KVLayer,
    ragged: Ragged,
    scale: float,
    counters: Tensor | None,
    rotation: tuple[Tensor, ...] | None = None,
) -> Tensor:
    """`paged_attention`. With `counters`, int32 [at least sequences * kv_heads, 3], decodes are launched before the
    kernel in front has ended, and are one kernel where registers allow. Its last column must be zeros, and is again
    afterwards. `rotation`: see `decode_attention`."""
    out = torch.empty_like(q, memory_format=torch.contiguous_format)
    if ragged.num_decodes or ragged.run_len > 1:
        decode_attention(out, q, kv_layer, ragged, scale, counters=counters, rotation=rotation)
        if ragged.run_len > 1:
            return out
    if ragged.num_decodes < ragged.context_lens.shape[0]:
        prefill_attention(out, q, kv_layer, ragged, scale)
    return out
