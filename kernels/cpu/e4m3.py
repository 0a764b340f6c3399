"""float8 e4m3 as bytes: K and V of a cache, each head with a scale."""

import torch
from torch import Tensor

_LARGEST = torch.finfo(torch.float8_e4m3fn).max


def to_e4m3(x: Tensor, scale: Tensor) -> Tensor:
    """x [..., heads, dim] and scale float32 [heads] -> uint8, to the nearest; clamped, for older casts make NaN."""
    return (x.float() / scale[:, None]).clamp_(-_LARGEST, _LARGEST).to(torch.float8_e4m3fn).view(torch.uint8)


def from_e4m3(codes: Tensor, dtype: torch.dtype) -> Tensor:
    """The values without their scales, which every float dtype holds exactly; `codes` are contiguous or a view."""
    return codes.view(torch.float8_e4m3fn).to(dtype)
