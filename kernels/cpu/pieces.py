"""Rows in pieces of such sizes that a row has the same bits whatever stands beside it.

Libraries choose their loops, and with them the order of sums, by the number of rows and where a row lies among them.
Which numbers of rows agree is written nowhere and differs between processors, shapes and dtypes: `find` tries it out.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

Product = Callable[[Tensor], Tensor]  # [rows, columns] -> [rows, ...], each row by itself

# Fewer large pieces cost the least; where the numbers up to one of these do not agree, a smaller one is tried.
_MOST = (128, 64, 32)
_MULTIPLES = (1, 3, 4, 6, 8, 12, 16, 32, 64)
_TRIED = (1, 2, 3, 4, 5, 7, 9, 13, 21, 32)  # multiples of the multiple
_LITTLE = 8  # rows that a single one may be filled up to before smaller pieces are better
_FEW = 16  # up to here each number is tried: what fills up would be a large share


class Pieces(NamedTuple):
    """At most `most` rows at once, filled up to a multiple of `multiple` or to one of `few`, the nearer one."""

    multiple: int
    most: int
    few: tuple[int, ...] = ()  # rising

    def filled(self, rows: int) -> int:
        whole = -(-rows // self.multiple) * self.multiple
        return next((number for number in self.few if rows <= number < whole), whole)

    @property
    def least(self) -> int:
        return self.filled(1)

    def apply(self, product: Product, x: Tensor) -> Tensor:
        """product(x), piece by piece."""
        if x.shape[0] <= self.most:
            return self._piece(product, x)
        return torch.cat([self._piece(product, part) for part in x.split(self.most)])

    def _piece(self, product: Product, x: Tensor) -> Tensor:
        rows = x.shape[0]
        missing = self.filled(rows) - rows
        if not missing:
            return product(x)
        if rows == 1:
            return product(x.expand(missing + 1, -1))[:1]
        return product(torch.cat((x, x[:1].expand(missing, -1))))[:rows]


def cancelling(
    columns: int, dtype: torch.dtype, rows: int = max(_MOST), device: torch.device | str = "cpu"
) -> tuple[Tensor, Tensor]:
    """(x [rows, columns], source int64 [columns]): with any W, x W[:, source]^T is rounding errors and nothing else.

    Whatever order a sum has shows in them, even where a result is rounded to 16 bits in the end, and where W has whole
    numbers: values spread over many powers of two leave no sum exact.
    """
    generator = torch.Generator(device).manual_seed(0)
    powers = torch.randint(-6, 7, (rows, columns), generator=generator, device=device)
    x = torch.randn(rows, columns, generator=generator, device=device).mul_(torch.exp2(powers)).to(dtype)
    places = torch.randperm(columns, generator=generator, device=device)
    source = torch.arange(columns, device=device)
    first, second, rest = places.split_with_sizes((columns // 2, columns // 2, columns % 2))
    source[second] = first
    x[:, second], x[:, rest] = -x[:, first], 0
    return x, source


@torch.inference_mode()
def find(product: Product, x: Tensor, most: int | None = None) -> Pieces | None:
    """The largest pieces, of at most `most` rows, that give a row of product(x) the same bits; None if there are none.

    Smaller ones are taken where they need less filling up for a decode: it makes one row after the other, for longer
    than a prompt takes. x [128, columns]; results must be told apart by their bits (see `cancelling`).
    """
    largest = None
    for size in [size for size in _MOST if most is None or size <= most]:
        pieces = _largest(product, x, size)
        if pieces is not None and pieces.least <= _LITTLE:
            return pieces
        largest = largest or pieces
    return largest


def _largest(product: Product, x: Tensor, size: int) -> Pieces | None:
    """With the least multiple."""
    for multiple in _MULTIPLES:
        most = size - size % multiple
        if most > 0 and (few := _agreeing(product, x[:most], multiple)) is not None:
            return Pieces(multiple, most, few)
    return None


def _agreeing(product: Product, x: Tensor, multiple: int) -> tuple[int, ...] | None:
    """None unless all tried multiples, from different places, have the bits of the whole; else the others that do."""
    whole, most = product(x), x.shape[0]
    counts = [multiple * i for i in _TRIED if multiple * i < most]
    others = [count for count in range(1, min(_FEW + 1, most)) if count % multiple]

    def agrees(count: int, start: int) -> bool:
        return torch.equal(product(x[start : start + count]), whole[start : start + count])

    if not all(agrees(count, (most - count) * i // len(counts)) for i, count in enumerate(counts)):
        return None
    order = torch.arange(most, device=x.device).flip(0)  # and where a row lies in a piece
    if not torch.equal(product(x[order]), whole[order]):
        return None
    return tuple(count for count in others if all(agrees(count, start) for start in (0, most - count)))
