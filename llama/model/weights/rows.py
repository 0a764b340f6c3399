"""Codes with one scale per row, its largest value over a large code: what int8 and fp8 share."""

import torch
from torch import Tensor

from llama.kernels.types import QuantizedWeight

_STRIP = 1 << 20  # weights rounded at once


def round_rows(weight: Tensor, dtype: torch.dtype, tops: tuple[int, ...]) -> QuantizedWeight:
    """Round to the nearest code of `dtype` up to tops[0]; scales are rounded to the weight's dtype first, as
    checkpoints keep them. A row's largest value becomes that one of `tops` which leaves the least squared error."""
    rows, columns = weight.shape
    scales = torch.empty(rows, 1, dtype=weight.dtype, device=weight.device)
    codes = torch.empty(rows, columns, dtype=dtype, device=weight.device)
    step = max(1, _STRIP // columns)
    for start in range(0, rows, step):
        part = slice(start, start + step)
        w = weight[part].float()
        most = w.abs().amax(1, keepdim=True)
        least = torch.full_like(most, torch.inf)
        for top in tops:
            scale = most.div(top).to(weight.dtype)
            scale.masked_fill_(scale == 0, 1)
            q = w / scale.float()
            if not dtype.is_floating_point:
                q.round_()
            q = q.clamp_(-tops[0], tops[0]).to(dtype)  # older casts to float8 make NaN of what lies beyond
            if len(tops) == 1:
                codes[part], scales[part] = q, scale
                break
            error = torch.addcmul(-w, q.float(), scale.float()).square_().sum(1, keepdim=True)
            better = ~(error >= least).flatten()  # NaN too
            codes[part].view(torch.uint8)[better] = q.view(torch.uint8)[better]
            scales[part][better], least[better] = scale[better], error[better]
    return QuantizedWeight(codes, scales.t().contiguous(), columns)
