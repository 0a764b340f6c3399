"""Paged, ragged, causal attention with grouped heads: one kernel for decodes, one for everything with more queries."""

import torch
from torch import Tensor

from llama.kernels.gpu.attention.decode import decode_attention
from llama.kernels.gpu.attention.prefill import prefill_attention
from llama.kernels.types import KVLayer, Ragged


def paged_attention(q: Tensor, kv_layer: KVLayer, ragged: Ragged, scale: float) -> Tensor:
    """See `ops.paged_attention`.

    Rows of an empty context are 0; rows that belong to no sequence are left as they were allocated. Grids and kernels
    follow from shapes alone, and a CUDA graph of decodes holds for any contexts.
    """
    return attend(q, kv_layer, ragged, scale, None)


def attend(q: Tensor, kv_layer: KVLayer, ragged: Ragged, scale: float, counters: Tensor | None) -> Tensor:
    """`paged_attention`. With `counters`, int32 [at least sequences * kv_heads, 3], decodes are launched before the
    kernel in front has ended, and are one kernel where registers allow. Its last column must be zeros, and is again
    afterwards."""
    out = torch.empty_like(q, memory_format=torch.contiguous_format)
    if ragged.num_decodes or ragged.run_len > 1:
        decode_attention(out, q, kv_layer, ragged, scale, counters=counters)
        if ragged.run_len > 1:
            return out
    if ragged.num_decodes < ragged.context_lens.shape[0]:
        prefill_attention(out, q, kv_layer, ragged, scale)
    return out
