"""Codes of 8 bits in float16, which holds each of their values: products as fast as with a dense weight."""

import torch
from torch import Tensor

from llama.kernels.types import QuantizedWeight


def fits(weight: QuantizedWeight, dtype: torch.dtype) -> bool:
    """Models of 16 bits on x86, and one scale per row, which acts on the result."""
    if weight.codes.dtype == torch.int16 or weight.zeros is not None or weight.minima is not None:
        return False
    is_there = torch.backends.quantized.engine in ("x86", "fbgemm") and weight.codes.device.type == "cpu"
    return is_there and weight.group_size >= weight.shape[1] and dtype in (torch.bfloat16, torch.float16)


class Float16Codes:
    """x q^T in float32, then the scales. It takes the codes' place, for they can be had back from it."""

    def __init__(self, weight: QuantizedWeight) -> None:
        self._dtype = weight.codes.dtype
        self._packed = torch.ops.quantized.linear_prepack_fp16(weight.codes.float(), None)
        self._kept_scales, self._scales = weight.scales, weight.scales[0].float()
        self.nbytes = weight.codes.numel() * 2 + self._kept_scales.nbytes + self._scales.nbytes
        # Straight to the kernel: checking the packed object on the way costs four times the call itself.
        self._linear = torch.ops.quantized.linear_dynamic_fp16.default.redispatch
        self._keys = torch._C.DispatchKeySet(torch._C.DispatchKey.CPU)

    def __call__(self, x: Tensor) -> Tensor:
        return self._linear(self._keys, x.float(), self._packed).mul_(self._scales).to(x.dtype)

    def weight(self) -> QuantizedWeight:
        q, _ = torch.ops.quantized.linear_unpack_fp16(self._packed)
        return QuantizedWeight(q.to(self._dtype), self._kept_scales, q.shape[1])
