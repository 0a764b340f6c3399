"""A weight as quantised checkpoints hold it: small codes, and a scale for each group of a row."""

from typing import NamedTuple

import torch
from torch import Tensor

_STRIP = 1 << 18  # weights widened at once: 1 MB in float32, which stays in a core's cache


class CodedWeight(NamedTuple):
    """w[n, k] = (codes[n, k] - zeros[n, g]) * scales[n, g] + minima[n, g], g the group of column k.

    codes [N, K] are integers or float8, or uint8 places in a float32 `table` of values; scales, zeros and minima are
    [N, G], or [1, G] where rows share them. Zeros and minima may be None: nothing is subtracted, nothing is added.
    `groups` is the size of each group, or int64 [K] where columns do not lie in order or the last group is smaller.
    Computed in float32, in this order.
    """

    codes: Tensor
    scales: Tensor
    zeros: Tensor | None = None
    minima: Tensor | None = None
    groups: int | Tensor = 0  # 0 = the whole row
    table: Tensor | None = None
    bits: int = 8  # of a code

    def dense_into(self, target: Tensor) -> None:
        """Fill target [N, K], of any float dtype and device, rounding once."""
        rows = max(1, _STRIP // self.codes.shape[1])
        for start in range(0, self.codes.shape[0], rows):
            part = slice(start, start + rows)
            codes = self.codes[part]
            w = codes.float() if self.table is None else self.table[codes.int()]
            flat = w
            if isinstance(self.groups, int) and self.groups:
                w = w.unflatten(1, (-1, self.groups))
            if self.zeros is not None:
                w -= self._broadcast(self.zeros, part)
            w *= self._broadcast(self.scales, part)
            if self.minima is not None:
                w += self._broadcast(self.minima, part)
            target[part].copy_(flat)

    def _broadcast(self, values: Tensor, rows: slice) -> Tensor:
        values = (values if values.shape[0] == 1 else values[rows]).float()
        if isinstance(self.groups, int):
            return values.unsqueeze(-1) if self.groups else values
        return values.index_select(1, self.groups)


def equal_groups(columns: int, size: int) -> int | Tensor:
    """`groups` of a CodedWeight whose columns lie in order; the last group may be smaller."""
    if size >= columns:
        return 0
    return torch.arange(columns, device="cpu") // size if columns % size else size
