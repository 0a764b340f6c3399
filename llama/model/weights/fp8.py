"""fp8: w = q s, q in float8 e4m3 (4 significant bits, from 2^-9 to 448) and a scale for each row; and q on x86."""

import torch
from torch import Tensor

from llama.kernels.types import QuantizedWeight
from llama.model.weights.rows import round_rows

_LARGEST = torch.finfo(torch.float8_e4m3fn).max


def quantise(weight: Tensor) -> QuantizedWeight:
    """Round to nearest; scales are rounded to the weight's dtype first, as checkpoints keep them."""
    return round_rows(weight, torch.float8_e4m3fn, _LARGEST)


def float16_codes(weight: QuantizedWeight, dtype: torch.dtype) -> "Float16Codes | None":
    """Models of 16 bits with a scale per row; no CPU computes in 8 bits of float."""
    fits = weight.codes.dtype == torch.float8_e4m3fn and weight.group_size >= weight.shape[1]
    fits = fits and weight.zeros is None and weight.minima is None and weight.codes.device.type == "cpu"
    is_there = torch.backends.quantized.engine in ("x86", "fbgemm")
    return Float16Codes(weight) if fits and is_there and dtype in (torch.bfloat16, torch.float16) else None


class Float16Codes:
    """q in float16, which holds each of its values: x q^T in float32, as fast as with a dense weight.

    It takes the codes' place, for they can be had back from it.
    """

    def __init__(self, weight: QuantizedWeight) -> None:
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
        return QuantizedWeight(q.to(torch.float8_e4m3fn), self._kept_scales, q.shape[1])
