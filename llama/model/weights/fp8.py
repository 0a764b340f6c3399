"""fp8: w = q s, q in float8 e4m3 (4 significant bits, from 2^-9 to 448) and a scale for each row."""

import torch
from torch import Tensor

from llama.kernels.types import QuantizedWeight

_LARGEST = torch.finfo(torch.float8_e4m3fn).max


def quantise(weight: Tensor) -> QuantizedWeight:
    """Round to nearest; scales are rounded to the weight's dtype first, as checkpoints keep them."""
    rows, columns = weight.shape
    scales = weight.abs().amax(1, keepdim=True).float().div_(_LARGEST).to(weight.dtype)
    scales.masked_fill_(scales == 0, 1)
    codes = torch.empty(rows, columns, dtype=torch.float8_e4m3fn, device=weight.device)
    step = max(1, (1 << 20) // columns)
    for start in range(0, rows, step):
        part = slice(start, start + step)
        # Clamped: older casts make NaN of what lies beyond the largest.
        codes[part] = (weight[part].float() / scales[part].float()).clamp_(-_LARGEST, _LARGEST)
    return QuantizedWeight(codes, scales.t().contiguous(), columns)
