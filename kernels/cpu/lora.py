"""Low-rank adapters of many requests in one batch, in plain PyTorch: y[t] += B[slot of t] (A[slot of t] x[t]).

Tokens are brought together by adapter once per step (`plan_lora`). Adapters in neighbouring slots that have about as
many tokens share one batched matmul, for which shorter ones are filled up with rows that nobody reads: decoding, where
an adapter has a token or two, would otherwise spend its time on the number of calls. Tokens without an adapter are not
touched, so that theirs is the base model's result to the bit.
"""

from dataclasses import dataclass
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor

# Rows per slot that may fill a batched matmul up: fewer than would cost what a call costs.
_FILLED = 4


class Group(NamedTuple):
    """Slots first .. last, each with `each` rows from row `start` on."""

    first: int
    last: int
    each: int
    start: int

    @property
    def end(self) -> int:
        return self.start + (self.last - self.first + 1) * self.each

    def of(self, rows: Tensor) -> Tensor:
        """The group's part of [rows, ...] as [slots, each, ...], a view."""
        return rows[self.start : self.end].unflatten(0, (-1, self.each))


@dataclass(frozen=True, slots=True)
class LoraPlan:
    """Which tokens use which adapter. The kernels read `slots` alone, the rest serves the twin."""

    slots: Tensor  # [tokens] int32, 0 = no adapter
    rows: Tensor | None = None  # [rows] int64, the token of each row, by slot; any token where a row only fills up
    tokens: Tensor | None = None  # [adapted tokens] int64, by slot
    used: Tensor | None = None  # [adapted tokens] int64, the row of each of `tokens`; None = they are the rows
    groups: tuple[Group, ...] = ()


def _groups(counts: list[int]) -> list[Group]:
    """counts[slot] is the tokens of a slot."""
    groups: list[Group] = []
    total = 0  # tokens of the last group
    for slot, count in enumerate(counts[1:], 1):
        if not count:
            continue
        if groups and groups[-1].last == slot - 1:
            first, _, each, start = groups[-1]
            wider = Group(first, slot, max(each, count), start)
            if wider.end - start - (total + count) <= _FILLED * (slot - first + 1):
                groups[-1] = wider
                total += count
                continue
        groups.append(Group(slot, slot, count, groups[-1].end if groups else 0))
        total = count
    return groups


def plan_lora(adapter_slots: Tensor) -> LoraPlan:
    counts = torch.bincount(adapter_slots, minlength=1).tolist()
    tokens = torch.argsort(adapter_slots, stable=True)[counts[0] :]
    groups = _groups(counts)
    num_rows = groups[-1].end if groups else 0
    if num_rows == len(tokens):
        return LoraPlan(adapter_slots, tokens, tokens, None, tuple(groups))
    firsts = [g.start + i * g.each for g in groups for i in range(g.last - g.first + 1)]
    lengths = torch.tensor([count for g in groups for count in counts[g.first : g.last + 1]])
    shifts = torch.tensor(firsts) - (lengths.cumsum(0) - lengths)
    used = torch.arange(len(tokens)) + shifts.repeat_interleave(lengths)
    rows = tokens[:1].repeat(num_rows)
    rows[used] = tokens
    return LoraPlan(adapter_slots, rows, tokens, used, tuple(groups))


def _wide(x: Tensor) -> Tensor:
    """Few CPUs multiply 16-bit numbers well, and adapters are small enough to be cast in every step."""
    return x.float() if x.element_size() == 2 else x


def lora_shrink(x: Tensor, a: Tensor, plan: LoraPlan) -> Tensor:
    x = _wide(x.index_select(0, plan.rows))
    h = x.new_empty(x.shape[0], a.shape[1] * a.shape[2])
    for group in plan.groups:
        weights = _wide(a[group.first - 1 : group.last]).flatten(1, 2)  # [slots, slices * rank, in]
        torch.bmm(group.of(x), weights.transpose(1, 2), out=group.of(h))
    return h.view(-1, *a.shape[1:3])


def lora_embedding(token_ids: Tensor, a: Tensor, plan: LoraPlan) -> Tensor:
    slots = plan.slots.index_select(0, plan.rows).to(torch.int64) - 1
    return _wide(a[slots, token_ids.index_select(0, plan.rows)]).unsqueeze(1)


def lora_expand(h: Tensor, y: Tensor, b: Tensor, plan: LoraPlan, slice_starts: tuple[int, ...]) -> None:
    delta = h.new_empty(h.shape[0], y.shape[1])
    for group in plan.groups:
        weights = _wide(b[group.first - 1 : group.last]).transpose(1, 2)  # [slots, rank, out]
        group_h, group_delta = group.of(h), group.of(delta)
        for i, (low, high) in enumerate(pairwise(slice_starts)):
            group_delta[:, :, low:high] = torch.bmm(group_h[:, :, i], weights[:, :, low:high])
    used = delta if plan.used is None else delta.index_select(0, plan.used)
    y.index_add_(0, plan.tokens, used.to(y.dtype))
