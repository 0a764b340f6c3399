"""Low-rank adapters of many requests in one batch in plain PyTorch: y[t] += B[i] (A[i] x[t]), i the adapter of token t.

Tokens are brought together by adapter once per step (`LoraLayout`). Tokens without an adapter are not touched, so that
theirs is the base model's result to the bit.
"""

from itertools import pairwise

import torch
from torch import Tensor

from llama.kernels.types import TokenAdapters


def _wide(x: Tensor) -> Tensor:
    """Few CPUs multiply 16-bit numbers well, and adapters are small enough to be cast in every step."""
    return x.float() if x.element_size() == 2 else x


def lora_shrink(x: Tensor, a: Tensor, adapters: TokenAdapters) -> Tensor:
    layout = adapters.cpu_layout
    x = _wide(x.index_select(0, layout.rows))
    h = x.new_empty(x.shape[0], a.shape[1] * a.shape[2])
    for group in layout.groups:
        weights = _wide(a[group.first - 1 : group.last]).flatten(1, 2)  # [adapters, slices * rank, in]
        torch.bmm(group.of(x), weights.transpose(1, 2), out=group.of(h))
    return h.view(-1, *a.shape[1:3])


def lora_embedding(token_ids: Tensor, a: Tensor, adapters: TokenAdapters) -> Tensor:
    rows = adapters.cpu_layout.rows
    indices = adapters.indices.index_select(0, rows).to(torch.int64) - 1
    return _wide(a[indices, token_ids.index_select(0, rows)]).unsqueeze(1)


def lora_expand(h: Tensor, y: Tensor, b: Tensor, adapters: TokenAdapters, slice_starts: tuple[int, ...]) -> None:
    layout = adapters.cpu_layout
    delta = h.new_empty(h.shape[0], y.shape[1])
    for group in layout.groups:
        weights = _wide(b[group.first - 1 : group.last]).transpose(1, 2)  # [adapters, rank, out]
        group_h, group_delta = group.of(h), group.of(delta)
        for i, (low, high) in enumerate(pairwise(slice_starts)):
            group_delta[:, :, low:high] = torch.bmm(group_h[:, :, i], weights[:, :, low:high])
    used = delta if layout.used is None else delta.index_select(0, layout.used)
    y.index_add_(0, layout.tokens, used.to(y.dtype))
