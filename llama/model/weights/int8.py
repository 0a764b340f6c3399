"""int8: w = q s, q from -127 to 127 and a scale for each row; and its product with few tokens on x86.

FBGEMM multiplies uint8 by int8 in integers. Where the processor adds pairs of products in 16 bits (AVX2), that is exact
for values of 7 bits alone, so x is taken as the sum of two such parts, of 14 bits together:

    x[t] = s[t] (a[t] + b[t] / 126)     a, b integers from -63 to 63, s[t] = max |x[t]| / 63

A row knows nothing of the others, and sums of integers have one result: neighbours change no bit. Two parts are finer
than a bfloat16; what falls below the last of them is lost beside the row's largest value.
"""

import sys

import torch
from torch import Tensor

from llama.kernels.cpu.matmul import multiplies_in_tiles
from llama.kernels.types import QuantizedWeight
from llama.model.weights import float16
from llama.model.weights.rows import round_rows

_MIDDLE = 64  # the uint8 that stands for 0
_PART = 126  # the second part is at most half of a first one's 1, as 63
# Without VNNI such a product wins over one in float16 from so many numbers of a weight on, up to 8 tokens; of a large
# one up to 16 (benchmarks/LOG.md, "When int8 pays without VNNI").
_FEWEST_NUMBERS = 1 << 21
_LARGE = 1 << 24
_AT_ONCE = 128  # tokens, whose products take four times the memory of their results


def quantise(weight: Tensor) -> QuantizedWeight:
    """Round to nearest; scales are rounded to the weight's dtype first, as checkpoints keep them."""
    return round_rows(weight, torch.int8, (127,))


def fits(weight: QuantizedWeight, dtype: torch.dtype) -> bool:
    """Models of 16 bits alone: in float32 and float64 x is never quantised."""
    has_form = weight.codes.dtype == torch.int8 and weight.group_size == weight.shape[1]
    has_form = has_form and weight.zeros is None and weight.minima is None and weight.codes.device.type == "cpu"
    return has_form and float16.is_available() and dtype in (torch.bfloat16, torch.float16)


def few_tokens(weight: QuantizedWeight, dtype: torch.dtype, numbers: int) -> "FewTokensInt8 | Int8InTiles | None":
    """None where it does not fit or does not pay. `numbers`: of the whole weight, of which this may be a sample."""
    pays = numbers >= _FEWEST_NUMBERS or torch.cpu._is_vnni_supported()
    if not pays or not fits(weight, dtype):
        return None
    # oneDNN's call costs more, and FBGEMM has no tiles.
    return Int8InTiles(weight) if numbers >= _LARGE and multiplies_in_tiles() else FewTokensInt8(weight, numbers)


class FewTokensInt8:
    """Twice the rows cost nothing while memory is what a product waits for; many tokens are better off widened."""

    library = "fbgemm"
    most_tokens = 64

    def __init__(self, weight: QuantizedWeight, numbers: int) -> None:
        rows = weight.shape[0]
        is_large = numbers >= _LARGE or torch.cpu._is_vnni_supported()
        self.most_beside_dense = 4 if multiplies_in_tiles() else 16 if is_large else 8
        scales = torch.ones(rows, dtype=torch.float64, device="cpu")
        zeros = torch.zeros(rows, dtype=torch.int64, device="cpu")
        codes = torch._make_per_channel_quantized_tensor(weight.codes, scales, zeros, 0)
        self.nbytes = weight.codes.nbytes
        self._scales = weight.scales[0].float() / _PART
        self._packed = torch.ops.quantized.linear_prepack(codes, None)
        # Straight to the kernel: checking the packed object on the way costs more than a small product.
        self._linear = torch.ops.quantized.linear_with_input_q_dq_qweight_dq_output_fp32.default.redispatch
        self._keys = torch._C.DispatchKeySet(torch._C.DispatchKey.CPU)

    def __call__(self, x: Tensor) -> Tensor:
        parts, scales = _two_parts(x)
        product = self._linear(self._keys, parts, 1.0, _MIDDLE, self._packed)
        return _joined(product, scales, self._scales).to(x.dtype)


class Int8InTiles:
    """The same from products in tiles of int8 (AMX): for large weights, and for many tokens too."""

    library = "onednn"
    most_tokens, most_beside_dense = sys.maxsize, 16

    def __init__(self, weight: QuantizedWeight) -> None:
        rows = weight.shape[0]
        self.nbytes = weight.codes.nbytes
        self._scales = weight.scales[0].float() / _PART
        self._packed = torch.ops.onednn.qlinear_prepack(weight.codes, None)
        ones, zeros = torch.ones(rows, device="cpu"), torch.zeros(rows, dtype=torch.int64, device="cpu")
        self._of_weight = self._packed, ones, zeros, None
        self._linear = torch.ops.onednn.qlinear_pointwise.default

    def __call__(self, x: Tensor) -> Tensor:
        if x.shape[0] <= _AT_ONCE:
            return self._product(x)
        return torch.cat([self._product(piece) for piece in x.split(_AT_ONCE)])

    def _product(self, x: Tensor) -> Tensor:
        parts, scales = _two_parts(x)
        codes = parts.round_().to(torch.int8)
        product = self._linear(codes, 1.0, 0, *self._of_weight, 1.0, 0, torch.float32, "none", [], "")
        return _joined(product, scales, self._scales).to(x.dtype)


def _two_parts(x: Tensor) -> tuple[Tensor, Tensor]:
    """x [tokens, columns] -> (a over b [2 tokens, columns] float32, b not yet rounded; s [tokens, 1])."""
    wide = x.float()  # a copy: x has 16 bits
    scales = wide.abs().amax(1, keepdim=True).div_(63).clamp_(min=torch.finfo(torch.float32).tiny)
    wide /= scales
    parts = wide.new_empty(2, *wide.shape)
    first, second = parts.unbind()
    torch.round(wide, out=first)
    torch.sub(wide, first, out=second).mul_(_PART)
    return parts.flatten(0, 1), scales


def _joined(product: Tensor, scales: Tensor, of_weight: Tensor) -> Tensor:
    """Both parts' products with q, float32 [2 tokens, rows] -> x W^T."""
    a, b = product.split(scales.shape[0])
    return torch.add(b, a, alpha=_PART).mul_(scales).mul_(of_weight)
