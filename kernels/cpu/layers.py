"""Norms, rotary embedding and activation in plain PyTorch: the CPU path and the oracle of the Triton kernels.

On a CPU a decode step costs as much in calls as in arithmetic, so these take few calls and work in place.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from llama.kernels.cpu.layout import StepPlan, rotation


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    size = x.shape[-1]
    dtype = _wide(x.dtype)
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
    x = torch.cat((q, k), dim=1)
    cos, sin = rotation(cos_sin) if plan is None else plan.rotation
    rotated = (x * cos).addcmul_(x.roll(x.shape[2] // 2, -1), sin)  # float32, or float64 as x
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
