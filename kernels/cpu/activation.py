"""The gated activation of the MLP in plain PyTorch."""

import torch
import torch.nn.functional as F
from torch import Tensor

# PyTorch gives each thread a run of at least so many numbers, and the last few of a run go through another exp.
_GRAIN, _VECTOR = 32768, 64


def silu_mul(gate_up: Tensor) -> Tensor:
    """A row has the same bits in any batch."""
    rows, size = gate_up.shape[0], gate_up.shape[1] // 2
    gate, up = gate_up.split_with_sizes((size, size), dim=1)
    if rows * size < _GRAIN or _ends_between_vectors(size):
        return F.silu(gate).mul_(up)
    # A run may end within a row: small calls have one run each.
    silu = torch.empty_like(gate, memory_format=torch.contiguous_format)
    step = max(1, (_GRAIN - 1) // size)
    for start in range(0, rows, step):
        part = slice(start, start + step)
        torch.ops.aten.silu.out(gate[part], out=silu[part])
    return silu.mul_(up)


def _ends_between_vectors(size: int) -> bool:
    """Whether rows of this size are cut between vectors, whatever their number."""
    threads = torch.get_num_threads()
    return all(size % (count * _VECTOR) == 0 for count in range(2, threads + 1))
