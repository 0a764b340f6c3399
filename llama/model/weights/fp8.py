"""fp8: w = q s, q in float8 e4m3 (4 significant bits, from 2^-9 to 448) and a scale for each row."""

import torch
from torch import Tensor

from llama.kernels.types import QuantizedWeight
from llama.model.weights.rows import round_rows

_LARGEST = torch.finfo(torch.float8_e4m3fn).max


def quantise(weight: Tensor) -> QuantizedWeight:
    """Round to nearest; scales are rounded to the weight's dtype first, as checkpoints keep them."""
    return round_rows(weight, torch.float8_e4m3fn, _LARGEST)
