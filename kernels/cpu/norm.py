"""RMS normalisation in plain PyTorch. A decode step costs a CPU as much in calls as in arithmetic: these are few."""

import ctypes
import math

import torch
from torch import Tensor

from llama.kernels.types import wide_dtype


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    size = x.shape[-1]
    dtype = wide_dtype(x.dtype)
    norms = torch.linalg.vector_norm(x, 2, -1, True, dtype=dtype)  # [tokens, 1]
    if norms.numel() == 1:  # calls cost more than arithmetic here, and Python needs none
        rounded = float if dtype == torch.float64 else _float32  # as the tensors below
        norm = norms.item()
        mean = rounded(rounded(rounded(norm * norm) / size) + rounded(eps))
        scale = rounded(1 / rounded(math.sqrt(mean))) if mean else math.inf
        return x.mul(scale).mul_(weight)
    scales = norms.square_().div_(size).add_(eps).rsqrt_()
    return torch.mul(x, scales).to(x.dtype).mul_(weight)


def _float32(x: float) -> float:
    """Rounded once: twice as many bits and two more make each step the same as in float32."""
    return ctypes.c_float(x).value


def add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    summed = x + residual
    return rms_norm(summed, weight, eps), summed
