"""Rows in pieces of a few exact sizes, in which a row has the same bits whatever stands beside it.

cuBLAS chooses a kernel, and with it the order of sums, by the whole shape of a product. So a product has 64 rows, fewer
being filled up, or one of the larger sizes in which its rows were seen to have the bits that they have among 64.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from llama.kernels.cpu.pieces import Product

LEAST = 64
MOST = 4096
_FILLED = 256  # up to here one larger piece costs less than two: what a product waits for is its weight


class ExactPieces(NamedTuple):
    """The numbers of rows that are multiplied at once, rising from LEAST."""

    sizes: tuple[int, ...]

    def apply(self, product: Product, x: Tensor) -> Tensor:
        """product(x), piece by piece."""
        parts: list[Tensor] = []
        start, rows = 0, x.shape[0]
        while start < rows or not parts:
            size = self._size(rows - start)
            part = x[start : start + size]
            parts.append(_of_size(product, part, size))
            start += size
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def _size(self, rows: int) -> int:
        enough = next((size for size in self.sizes if size >= rows), None)
        if enough is not None and enough <= max(_FILLED, rows):
            return enough
        return max((size for size in self.sizes if size <= rows), default=self.sizes[0])


def _of_size(product: Product, x: Tensor, size: int) -> Tensor:
    rows = x.shape[0]
    if rows == size:
        return product(x)
    filled = torch.cat((x, x.new_zeros(1, x.shape[1]).expand(size - rows, -1)))
    return product(filled)[:rows]


@torch.inference_mode()
def find_exact(product: Product, x: Tensor) -> ExactPieces | None:
    """The sizes up to len(x) that give a row of product(x) the bits that it has in a piece of LEAST; None if there its
    place among them shows. Results must be told apart by their bits (see `cancelling`)."""
    least = torch.cat([product(part) for part in x.split(LEAST)])
    if not torch.equal(product(x[:LEAST].flip(0)).flip(0), least[:LEAST]):
        return None
    sizes = [LEAST]
    while (size := 2 * sizes[-1]) <= len(x):
        sizes.append(size)
    return ExactPieces(tuple(s for s in sizes if s == LEAST or torch.equal(product(x[:s]), least[:s])))
