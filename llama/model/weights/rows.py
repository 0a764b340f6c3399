"""Codes with one scale per row, the row's largest value over the largest code: what int8 and fp8 share."""

import torch
from torch import Tensor

from llama.kernels.types import QuantizedWeight

_STRIP = 1 << 20  # weights rounded at once


def round_rows(weight: Tensor, dtype: torch.dtype, largest: float) -> QuantizedWeight:
    """Round to the nearest code of `dtype` from -largest to largest; scales are rounded to the weight's dtype first, as
    checkpoints keep them."""
    rows, columns = weight.shape
    scales = weight.abs().amax(1, keepdim=True).float().div_(largest).to(weight.dtype)
    scales.masked_fill_(scales == 0, 1)
    codes = torch.empty(rows, columns, dtype=dtype, device=weight.device)
    step = max(1, _STRIP // columns)
    for start in range(0, rows, step):
        part = slice(start, start + step)
        w = weight[part].float() / scales[part].float()
        if not dtype.is_floating_point:
            w.round_()
        codes[part] = w.clamp_(-largest, largest)  # older casts to float8 make NaN of what lies beyond
    return QuantizedWeight(codes, scales.t().contiguous(), columns)
