"""Paged, ragged, causal attention with grouped heads: one kernel for decodes, one for everything with more queries."""

import torch
from torch import Tensor

from llama.kernels.checks import check_tensors, require
from llama.kernels.gpu.attention.decode import decode_attention
from llama.kernels.gpu.attention.prefill import prefill_attention


def paged_attention(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    block_tables: Tensor,
    query_starts: Tensor,
    context_lens: Tensor,
    *,
    num_decodes: int,
    max_query_len: int,
    max_context_len: int,
    scale: float,
) -> Tensor:
    """See `ops.paged_attention`.

    Rows of an empty context are 0; rows that belong to no sequence are left as they were allocated. The two maxima are
    not used: grids and kernels follow from shapes alone, and a CUDA graph of decodes holds for any contexts.
    """
    check_tensors(
        "paged_attention",
        q=q,
        k_cache=k_cache,
        v_cache=v_cache,
        block_tables=block_tables,
        query_starts=query_starts,
        context_lens=context_lens,
    )
    block_size = k_cache.shape[1]
    require(block_size & (block_size - 1) == 0, f"paged_attention: block size must be a power of two, got {block_size}")
    require(k_cache.stride() == v_cache.stride(), "paged_attention: k_cache and v_cache must have the same strides")
    require(scale > 0, f"paged_attention: scale must be positive, got {scale}")
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    if num_decodes:
        decode_attention(out, q, k_cache, v_cache, block_tables, context_lens[:num_decodes], scale)
    if num_decodes < context_lens.shape[0]:
        prefill_attention(out, q, k_cache, v_cache, block_tables, query_starts, context_lens, num_decodes, scale)
    return out
