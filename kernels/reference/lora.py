"""Low-rank adapters of many requests in one batch, in plain PyTorch: y[t] += B[slot of t] (A[slot of t] x[t]).

Tokens are brought together by adapter once per step (`plan_lora`); each adapter's tokens then take two small matmuls.
Tokens without an adapter are not touched, so that theirs is the base model's result to the bit.
"""

from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class LoraPlan:
    """Which tokens use which adapter. `order` and `segments` serve the twin alone; the kernels read `slots`."""

    slots: Tensor  # [tokens] int32, 0 = no adapter
    order: Tensor | None = None  # [adapted tokens] int64, by slot
    segments: tuple[tuple[int, int, int], ...] = ()  # slot, first, end in `order`


def plan_lora(adapter_slots: Tensor) -> LoraPlan:
    counts = torch.bincount(adapter_slots, minlength=1).tolist()
    order = torch.argsort(adapter_slots, stable=True)[counts[0] :]
    segments, start = [], 0
    for slot, count in enumerate(counts[1:], 1):
        if count:
            segments.append((slot, start, start + count))
            start += count
    return LoraPlan(adapter_slots, order, tuple(segments))


def lora_shrink(x: Tensor, a: Tensor, plan: LoraPlan) -> Tensor:
    x = x.index_select(0, plan.order)
    h = x.new_empty(x.shape[0], a.shape[1] * a.shape[2])
    for slot, start, end in plan.segments:
        torch.mm(x[start:end], a[slot - 1].flatten(0, 1).t(), out=h[start:end])
    return h.view(-1, *a.shape[1:3])


def lora_expand(h: Tensor, y: Tensor, b: Tensor, plan: LoraPlan, slice_starts: tuple[int, ...]) -> None:
    delta = h.new_empty(h.shape[0], y.shape[1])
    for i, (low, high) in enumerate(pairwise(slice_starts)):
        for slot, start, end in plan.segments:
            delta[start:end, low:high] = h[start:end, i] @ b[slot - 1, low:high].t()
    y.index_add_(0, plan.order, delta)


def lora_embedding(token_ids: Tensor, a: Tensor, plan: LoraPlan) -> Tensor:
    slots = plan.slots.index_select(0, plan.order).to(torch.int64) - 1
    return a[slots, token_ids.index_select(0, plan.order)].unsqueeze(1)
