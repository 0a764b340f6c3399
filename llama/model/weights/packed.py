"""Weights in the layouts that this machine's CPU libraries multiply fastest.

oneDNN's blocked layout serves float32, and 16-bit floats where the CPU computes with them. Where it does not (AVX2),
FBGEMM keeps 16-bit weights as float16 and multiplies in float32, several times faster than PyTorch's own matmul there.
Nothing here changes a result by more than the dtype's rounding, and `dense()` gives the weight back bit for bit.
"""

from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from llama.model.weights import float16
from llama.model.weights.float16 import Float16Matrix
from llama.model.weights.form import WeightForm

Library = Literal["onednn", "fbgemm"]

_STRIP = 1 << 20  # numbers looked at together
_LARGEST = torch.finfo(torch.float16).max
_SMALL_BITS = torch.tensor(2.0**-17, dtype=torch.bfloat16, device="cpu").view(torch.int16).item()


def pack(weight: Tensor, *, is_gated: bool = False) -> WeightForm | None:
    """Weight [out, in] as the library for its dtype wants it, or None where there is none: it stays a plain tensor.
    `is_gated`: its first half of rows is SwiGLU's gate, the second what the gate multiplies."""
    library = library_of(weight.dtype) if weight.device.type == "cpu" else None
    if library == "onednn":
        return OneDNNGated(weight) if is_gated and weight.dtype.itemsize == 2 else OneDNNWeight(weight)
    return None if library is None else Float16Weight.of(weight)


def library_of(dtype: torch.dtype) -> Library | None:
    """What multiplies packed weights of this dtype on this machine's CPU."""
    if not torch.backends.mkldnn.is_available():
        return None
    if dtype == torch.float32 or _computes_natively(dtype):
        return "onednn"
    if dtype in (torch.bfloat16, torch.float16) and float16.is_available():
        return "fbgemm"
    return None


def _computes_natively(dtype: torch.dtype) -> bool:
    if dtype == torch.bfloat16:
        return torch.ops.mkldnn._is_mkldnn_bf16_supported()
    return dtype == torch.float16 and torch.ops.mkldnn._is_mkldnn_fp16_supported()


def _kernel_rows(rows: int) -> int:
    """At least `rows`: eight numbers for each power of two, and up to an eighth more work."""
    granularity = 1 << max(0, (rows - 1).bit_length() - 4)
    return -(-rows // granularity) * granularity


def _filled(x: Tensor) -> Tensor:
    """x [rows, columns] with rows of zeros behind it, where it has a number of rows that no kernel is made for."""
    rows = x.shape[0]
    if rows <= 16 or (padded := _kernel_rows(rows)) == rows:
        return x
    return F.pad(x, (0, 0, 0, padded - rows))


class OneDNNWeight:
    """The dtype of the weight is that of input and output."""

    def __init__(self, weight: Tensor) -> None:
        self.dtype = weight.dtype
        self.weight = torch.ops.mkldnn._reorder_linear_weight(weight.detach())
        self._linear = torch.ops.mkldnn._linear_pointwise.default

    def __reduce__(self) -> tuple[type["OneDNNWeight"], tuple[Tensor]]:
        return OneDNNWeight, (self.dense(),)  # oneDNN's layout is neither copied nor pickled

    def __call__(self, x: Tensor) -> Tensor:
        """oneDNN makes a kernel for each number of rows, half a megabyte that it keeps: there are few such numbers."""
        filled = _filled(x)
        y = self._linear(filled, self.weight, None, "none", [], "")
        return y if filled is x else y[: x.shape[0]]

    def dense(self) -> Tensor:
        return self.weight.to_dense().to(self.dtype)

    @property
    def nbytes(self) -> int:
        return self.weight.numel() * self.dtype.itemsize


class OneDNNGated:
    """Gate and up of SwiGLU: silu and the product of both are computed on sums that lie in registers still."""

    def __init__(self, weight: Tensor) -> None:
        self.dtype = weight.dtype
        self.gate, self.up = (OneDNNWeight(half.contiguous()) for half in weight.detach().chunk(2))
        self._linear = torch.ops.mkldnn._linear_pointwise.default
        self._times = torch.ops.mkldnn._linear_pointwise.binary

    def __reduce__(self) -> tuple[type["OneDNNGated"], tuple[Tensor]]:
        return OneDNNGated, (self.dense(),)

    def __call__(self, x: Tensor) -> Tensor:
        return torch.cat((self.gate(x), self.up(x)), dim=1)

    def gated(self, x: Tensor) -> Tensor:
        """silu(gate) * up: [tokens, out_features / 2]. Rounded twice where `silu_mul` rounds four times."""
        filled = _filled(x)
        gate = self._linear(filled, self.gate.weight, None, "swish", [], "")
        act = self._times(filled, gate, self.up.weight, None, "mul")
        return act if filled is x else act[: x.shape[0]]

    def dense(self) -> Tensor:
        return torch.cat((self.gate.dense(), self.up.dense()))

    @property
    def nbytes(self) -> int:
        return self.gate.nbytes + self.up.nbytes


class Float16Weight:
    """A bfloat16 or float16 weight as float16: 11 significant bits hold bfloat16's 8 from 2^-17 to 65,504.

    Smaller values are rounded to a multiple of 2^-24, which no sum notices; they are kept aside, for `dense()` alone.
    """

    def __init__(self, weight: Tensor, small: Tensor) -> None:
        self.dtype = weight.dtype
        self.small = small  # flat indices of what float16 rounds
        self.small_values = weight.flatten()[small]
        self._matrix = Float16Matrix(weight)

    @classmethod
    def of(cls, weight: Tensor) -> "Float16Weight | None":
        """None where values are too large for float16, or so many are too small that rounding them might matter."""
        weight = weight.detach()
        lowest, highest = weight.aminmax()
        if not (lowest >= -_LARGEST and highest <= _LARGEST):  # NaN compares false
            return None
        if weight.dtype == torch.float16:
            return cls(weight, torch.empty(0, dtype=torch.int64, device="cpu"))
        # Where 0 < |w| < 2^-17: the bits of a positive bfloat16 grow with its value, and zero's come before them all.
        found = []
        for start, bits in enumerate(weight.view(torch.int16).flatten().split(_STRIP)):
            magnitude = bits & 0x7FFF
            found.append(((magnitude > 0) & (magnitude < _SMALL_BITS)).nonzero().flatten().add_(start * _STRIP))
        small = torch.cat(found)
        return cls(weight, small) if len(small) * 50 <= weight.numel() else None

    def __call__(self, x: Tensor) -> Tensor:
        return self._matrix(x)

    def dense(self) -> Tensor:
        weight = self._matrix.to(self.dtype)
        weight.view(-1)[self.small] = self.small_values
        return weight

    @property
    def nbytes(self) -> int:
        return self._matrix.nbytes + self.small.nbytes + self.small_values.nbytes
