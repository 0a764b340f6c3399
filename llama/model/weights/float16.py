"""A matrix as float16 in FBGEMM's layout, multiplied in float32: the fastest on x86 without 16-bit arithmetic."""

import torch
from torch import Tensor

_STRIP = 1 << 24  # numbers: packing them takes four bytes for each beside the two that stay


def is_available() -> bool:
    return torch.backends.quantized.engine in ("x86", "fbgemm")


class Float16Matrix:
    """[rows, columns] of values that float16 holds, in strips of rows: no product knows of another row."""

    def __init__(self, values: Tensor) -> None:
        rows, columns = values.shape
        self._rows, self._step = rows, max(1, _STRIP // columns)
        prepack = torch.ops.quantized.linear_prepack_fp16
        self._strips = [prepack(strip.float(), None) for strip in values.split(self._step)]
        self.nbytes = values.numel() * 2
        # Straight to the kernel: checking the packed object on the way costs four times the call itself.
        self._linear = torch.ops.quantized.linear_dynamic_fp16.default.redispatch
        self._keys = torch._C.DispatchKeySet(torch._C.DispatchKey.CPU)

    def __reduce__(self) -> tuple[type["Float16Matrix"], tuple[Tensor]]:
        return Float16Matrix, (self.to(torch.float16),)  # FBGEMM's layout is not pickled

    def __call__(self, x: Tensor, scales: Tensor | None = None) -> Tensor:
        """x W^T, a column times its scale of `scales` float32 [rows], in x.dtype."""
        wide = x.float()
        if len(self._strips) == 1:
            product = self._linear(self._keys, wide, self._strips[0])
            return (product if scales is None else product.mul_(scales)).to(x.dtype)
        out = x.new_empty(x.shape[0], self._rows)
        for index, strip in enumerate(self._strips):
            part = slice(index * self._step, (index + 1) * self._step)
            product = self._linear(self._keys, wide, strip)
            out[:, part] = product if scales is None else product.mul_(scales[part])
        return out

    def to(self, dtype: torch.dtype) -> Tensor:
        """The values again."""
        first, _ = torch.ops.quantized.linear_unpack_fp16(self._strips[0])
        if len(self._strips) == 1:
            return first.to(dtype)
        values = torch.empty(self._rows, first.shape[1], dtype=dtype, device="cpu")
        for strip, target in zip(self._strips, values.split(self._step), strict=True):
            target.copy_(torch.ops.quantized.linear_unpack_fp16(strip)[0])
        return values
