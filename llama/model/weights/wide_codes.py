"""Codes of 8 bits as 16-bit floats, which hold each of their values: products as fast as with a dense weight."""

import torch
from torch import Tensor

from llama.kernels.types import QuantizedWeight
from llama.model.weights import float16
from llama.model.weights.float16 import Float16Matrix
from llama.model.weights.packed import OneDNNWeight, library_of

_PIECE = 1 << 18  # numbers that are scaled at once: what they are in float32 stays in a cache


def fits(weight: QuantizedWeight, dtype: torch.dtype) -> bool:
    """Models of 16 bits on x86, and one scale per row, which acts on the result."""
    if weight.codes.dtype == torch.int16 or weight.zeros is not None or weight.minima is not None:
        return False
    is_there = float16.is_available() and weight.codes.device.type == "cpu"
    return is_there and weight.group_size >= weight.shape[1] and dtype in (torch.bfloat16, torch.float16)


class WideCodes:
    """x q^T, then the scales. It takes the codes' place, for they can be had back from it.

    In bfloat16 where the processor multiplies that: the product is rounded to x.dtype in front of the scales too. In
    float16 and sums of float32 elsewhere.
    """

    def __init__(self, weight: QuantizedWeight, dtype: torch.dtype) -> None:
        self._dtype = weight.codes.dtype
        is_native = dtype == torch.bfloat16 and library_of(dtype) == "onednn"
        self._q = OneDNNWeight(weight.codes.to(dtype)) if is_native else Float16Matrix(weight.codes)
        self._kept_scales, self._scales = weight.scales, weight.scales[0].float()
        self.nbytes = self._q.nbytes + self._kept_scales.nbytes + self._scales.nbytes

    def __call__(self, x: Tensor) -> Tensor:
        if isinstance(self._q, OneDNNWeight):
            y = self._q(x)
            for piece in y.split(max(1, _PIECE // y.shape[1])):
                piece.mul_(self._scales)
            return y
        return self._q(x, self._scales)

    @property
    def told(self) -> str:
        return "bfloat16 codes" if isinstance(self._q, OneDNNWeight) else "float16 codes"

    def weight(self) -> QuantizedWeight:
        q = self._q.dense().to(self._dtype) if isinstance(self._q, OneDNNWeight) else self._q.to(self._dtype)
        return QuantizedWeight(q, self._kept_scales, q.shape[1])
