"""RMS normalisation in plain PyTorch. A decode step costs a CPU as much in calls as in arithmetic: these are few."""

from functools import cache

import torch
from torch import Tensor

from llama.kernels.types import wide_dtype


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    dtype = wide_dtype(x.dtype)
    norms = torch.linalg.vector_norm(x, 2, -1, True, dtype=dtype)  # [tokens, 1]
    scales = torch.addcmul(_eps(eps, dtype, x.device), norms, norms, value=1 / x.shape[-1]).rsqrt_()
    normed = torch.mul(x, scales)
    return (normed if normed.dtype == x.dtype else normed.to(x.dtype)).mul_(weight)


@cache
def _eps(eps: float, dtype: torch.dtype, device: torch.device) -> Tensor:
    """A number beside a tensor is made a tensor in every call, which costs as much as the sum."""
    return torch.tensor(eps, dtype=dtype, device=device)


def add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    summed = x + residual
    return rms_norm(summed, weight, eps), summed
