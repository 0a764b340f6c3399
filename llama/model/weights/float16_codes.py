"""Codes of 8 bits in float16, which holds each of their values: products as fast as with a dense weight."""

import torch
from torch import Tensor

from llama.kernels.types import QuantizedWeight
from llama.model.weights import float16
from llama.model.weights.float16 import Float16Matrix


def fits(weight: QuantizedWeight, dtype: torch.dtype) -> bool:
    """Models of 16 bits on x86, and one scale per row, which acts on the result."""
    if weight.codes.dtype == torch.int16 or weight.zeros is not None or weight.minima is not None:
        return False
    is_there = float16.is_available() and weight.codes.device.type == "cpu"
    return is_there and weight.group_size >= weight.shape[1] and dtype in (torch.bfloat16, torch.float16)


class Float16Codes:
    """x q^T in float32, then the scales. It takes the codes' place, for they can be had back from it."""

    def __init__(self, weight: QuantizedWeight) -> None:
        self._dtype = weight.codes.dtype
        self._q = Float16Matrix(weight.codes)
        self._kept_scales, self._scales = weight.scales, weight.scales[0].float()
        self.nbytes = self._q.nbytes + self._kept_scales.nbytes + self._scales.nbytes

    def __call__(self, x: Tensor) -> Tensor:
        return self._q(x, self._scales)

    def weight(self) -> QuantizedWeight:
        q = self._q.to(self._dtype)
        return QuantizedWeight(q, self._kept_scales, q.shape[1])
