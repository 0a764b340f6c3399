"""The model's ops in plain PyTorch without anything in place: what autograd follows. Chosen by `ops` (`lora` by
`LoraStack`) for tensors that require a gradient, on every device; slower than kernels/cpu and meant for single forwards
of research, not for serving.
"""

from itertools import pairwise

import torch
from torch import Tensor

from llama.kernels.types import CosSin, KVLayer, Ragged, TokenAdapters, wide_dtype


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    wide = x.to(wide_dtype(x.dtype))
    return (wide * (wide.square().mean(-1, keepdim=True) + eps).rsqrt()).to(x.dtype) * weight


def add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    summed = x + residual
    return rms_norm(summed, weight, eps), summed


def rope_and_store(q: Tensor, k: Tensor, v: Tensor, cos_sin: CosSin, kv_layer: KVLayer, ragged: Ragged) -> Tensor:
    """The write into the cache is in place, as everywhere; autograd follows it into a tensor that is no view."""
    cos, sin = cos_sin

    def rotated(x: Tensor) -> Tensor:
        return (x * cos + x.roll(x.shape[2] // 2, -1) * sin).to(x.dtype)

    kv_layer.k.flatten(0, 1).index_copy_(0, ragged.slots, rotated(k))
    kv_layer.v.flatten(0, 1).index_copy_(0, ragged.slots, v)
    return rotated(q)


def paged_attention(q: Tensor, kv_layer: KVLayer, ragged: Ragged, scale: float) -> Tensor:
    starts, lens, size = ragged.query_starts.tolist(), ragged.context_lens.tolist(), ragged.block_size
    parts = []
    for s, context in enumerate(lens):
        at = torch.arange(context, device=q.device)
        slots = ragged.block_tables[s].to(torch.int64)[at // size] * size + at % size
        keys, values = (cache.flatten(0, 1)[slots] for cache in (kv_layer.k, kv_layer.v))
        parts.append(_causal(q[starts[s] : starts[s + 1]], keys, values, scale))
    return torch.cat(parts)


def _causal(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    queries, context, group = len(q), len(k), q.shape[1] // k.shape[1]
    k, v = (x.repeat_interleave(group, 1).to(wide_dtype(q.dtype)) for x in (k, v))
    scores = torch.einsum("qhd,khd->hqk", q.to(k.dtype), k) * scale
    hidden = torch.ones(queries, context, dtype=torch.bool, device=q.device).triu(context - queries + 1)
    weights = scores.masked_fill(hidden, float("-inf")).softmax(-1)
    return torch.einsum("hqk,khd->qhd", weights, v).to(q.dtype)


def silu_mul(gate_up: Tensor) -> Tensor:
    gate, up = gate_up.chunk(2, dim=-1)
    return torch.nn.functional.silu(gate) * up


def lora(
    x: Tensor, y: Tensor, a: Tensor, b: Tensor, *, adapters: TokenAdapters, slice_starts: tuple[int, ...]
) -> Tensor:
    """y + B (A x), of each token's adapter: both halves (`ops.lora_shrink`, `ops.lora_expand`) in one. x [tokens, in],
    or ids of tokens with an `a` of three dimensions. With respect to A and B too."""
    wide = wide_dtype(y.dtype)
    for index in adapters.indices.unique().tolist():
        if index == 0:
            continue
        rows = (adapters.indices == index).nonzero().flatten()
        chosen = x.index_select(0, rows)
        if a.dim() == 3:  # of the embedding
            h = a[index - 1].index_select(0, chosen).to(wide).unsqueeze(1)
        else:
            h = torch.einsum("ti,sri->tsr", chosen.to(wide), a[index - 1].to(wide))
        slices = b[index - 1].to(wide).split([stop - start for start, stop in pairwise(slice_starts)])
        delta = torch.cat([h[:, i] @ part.T for i, part in enumerate(slices)], 1)
        y = y.index_add(0, rows, delta.to(y.dtype))
    return y
