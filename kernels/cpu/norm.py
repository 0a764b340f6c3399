"""RMS normalisation in plain PyTorch. A decode step costs a CPU as much in calls as in arithmetic: these are few."""

import math

import torch
from torch import Tensor

from llama.kernels.types import wide_dtype


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    size = x.shape[-1]
    dtype = wide_dtype(x.dtype)
    norms = torch.linalg.vector_norm(x, 2, -1, True, dtype=dtype)  # [tokens, 1]
    if norms.numel() == 1:  # calls cost more than arithmetic here, and Python needs none
        norm = norms.item()
        mean = norm * norm / size + eps
        return x.mul(mean**-0.5 if mean else math.inf).mul_(weight)
    scales = norms.square_().div_(size).add_(eps).rsqrt_()
    return torch.mul(x, scales).to(x.dtype).mul_(weight)


def add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    summed = x + residual
    return rms_norm(summed, weight, eps), summed
