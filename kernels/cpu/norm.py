"""RMS normalisation in plain PyTorch. A decode step costs a CPU as much in calls as in arithmetic: these are few."""

from functools import cache

import torch
from torch import Tensor

from llama.kernels.types import wide_dtype

# Numbers that are normed together: what is written in between stays in a cache, and in memory that is used again.
_PIECE = 1 << 19


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    rows = max(1, _PIECE // x.shape[-1])
    if x.shape[0] <= rows:
        return _normed(x, eps).mul_(weight)
    out = torch.empty_like(x)
    for start in range(0, x.shape[0], rows):
        piece = slice(start, start + rows)
        out[piece].copy_(_normed(x[piece], eps)).mul_(weight)
    return out


def _normed(x: Tensor, eps: float) -> Tensor:
    dtype = wide_dtype(x.dtype)
    wide = x if x.dtype == dtype else x.to(dtype)
    norms = torch.linalg.vector_norm(wide, 2, -1, True)  # [tokens, 1]
    scales = torch.addcmul(_eps(eps, dtype, x.device), norms, norms, value=1 / x.shape[-1]).rsqrt_()
    return wide * scales if wide is x else wide.mul_(scales).to(x.dtype)


@cache
def _eps(eps: float, dtype: torch.dtype, device: torch.device) -> Tensor:
    """A number beside a tensor is made a tensor in every call, which costs as much as the sum."""
    return torch.tensor(eps, dtype=dtype, device=device)


def add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    summed = x + residual
    return rms_norm(summed, weight, eps), summed
