"""Norms, rotary embedding and activation in plain PyTorch: the CPU path and the oracle of the Triton kernels.

On a CPU a decode step costs as much in calls as in arithmetic, so these take few calls and work in place.
"""

import torch
import torch.nn.functional as F
from torch import Tensor


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    wide = x.to(_wide(x.dtype))
    norms = torch.linalg.vector_norm(wide, 2, -1, True)  # [tokens, 1]
    scales = norms.square_().div_(x.shape[-1]).add_(eps).rsqrt_()
    scaled = wide * scales if wide is x else wide.mul_(scales)
    return scaled.to(x.dtype).mul_(weight)


def add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    summed = x + residual
    return rms_norm(summed, weight, eps), summed


def rope_and_store(
    q: Tensor, k: Tensor, v: Tensor, cos_sin: Tensor, slots: Tensor, k_cache: Tensor, v_cache: Tensor
) -> Tensor:
    wide = torch.cat((q, k), dim=1).to(_wide(q.dtype))
    cos, sin = cos_sin.to(wide.dtype).unsqueeze(1).chunk(2, dim=-1)  # [tokens, 1, head_dim / 2]
    first, second = wide.chunk(2, dim=-1)
    rotated = torch.empty_like(wide)
    left, right = rotated.chunk(2, dim=-1)
    torch.mul(first, cos, out=left).addcmul_(second, sin, value=-1)
    torch.mul(second, cos, out=right).addcmul_(first, sin)
    rotated = rotated.to(q.dtype)
    q, k = rotated[:, : q.shape[1]], rotated[:, q.shape[1] :]
    if -1 in slots.tolist():
        stored = slots >= 0
        slots, k, v = slots[stored], k[stored], v[stored]
    k_cache.flatten(0, 1).index_copy_(0, slots, k)
    v_cache.flatten(0, 1).index_copy_(0, slots, v)
    return q


def silu_mul(gate_up: Tensor) -> Tensor:
    gate, up = gate_up.chunk(2, dim=-1)
    return F.silu(gate).mul_(up)
