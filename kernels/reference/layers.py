"""Norms, rotary embedding and activation in plain PyTorch: the CPU path and the oracle of the Triton kernels.

On a CPU a decode step costs as much in calls as in arithmetic, so these take few calls and work in place.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.reference.plan import StepPlan, rotation

FEW_VALUES = 1 << 13  # below, a norm costs calls rather than arithmetic


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    size = x.shape[-1]
    if x.numel() <= FEW_VALUES:
        # (x, -x) has mean 0, so its layer norm is x's RMS norm: fewer calls, and twice the arithmetic.
        return torch.layer_norm(torch.cat((x, -x), dim=-1), (2 * size,), None, None, eps).narrow(1, 0, size).mul(weight)
    wide = x.to(_wide(x.dtype))
    norms = torch.linalg.vector_norm(wide, 2, -1, True)  # [tokens, 1]
    scales = norms.square_().div_(size).add_(eps).rsqrt_()
    scaled = wide * scales if wide is x else wide.mul_(scales)
    return scaled.to(x.dtype).mul_(weight)


def add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    summed = x + residual
    return rms_norm(summed, weight, eps), summed


def rope_and_store(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cos_sin: Tensor,
    slots: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    *,
    plan: StepPlan | None = None,
) -> Tensor:
    x = torch.cat((q, k), dim=1).to(_wide(q.dtype))
    cos, sin = rotation(cos_sin) if plan is None else plan.rotation
    rotated = (x * cos).addcmul_(x.roll(x.shape[2] // 2, -1), sin.to(x.dtype))
    q, k = rotated.to(q.dtype).split_with_sizes((q.shape[1], k.shape[1]), dim=1)
    if plan is None or not plan.stores_all:
        stored = slots >= 0
        slots, k, v = slots[stored], k[stored], v[stored]
    k_cache.flatten(0, 1).index_copy_(0, slots, k)
    v_cache.flatten(0, 1).index_copy_(0, slots, v)
    return q


def silu_mul(gate_up: Tensor) -> Tensor:
    gate, up = gate_up.chunk(2, dim=-1)
    return F.silu(gate).mul_(up)
