"""int4: w = q s, q from -8 to 7 and a scale for each group of 128 columns; and its product with few tokens on CPUs.

A group's scale is the one of `_CLIPS` with the least squared error: cutting the largest value a little short makes all
others finer. On normally distributed weights that takes 14% off the squared error of the plain max / 7.
"""

import torch
from torch import Tensor

from llama.kernels.cpu.matmul import codes_of, nibble_block, pack_nibbles
from llama.kernels.types import QuantizedWeight

GROUP_SIZES = (128, 64, 32)
_PACKED_ROWS = 256  # a multiple of the rows that lie together in any processor's order
_AT_ONCE = 1 << 18  # weights that are rounded, for the caches of a CPU's cores
_AT_ONCE_ELSEWHERE = 1 << 22  # each piece is a hundred launches
_CLIPS = (1.0, 0.95, 0.9, 0.85, 0.8, 0.75, 0.7)


def quantise(weight: Tensor) -> QuantizedWeight:
    """Groups of 128 columns; of 64 or 32 where 128 does not divide a row; a row where nothing does."""
    rows, columns = weight.shape
    size = next((size for size in GROUP_SIZES if columns % size == 0), columns)
    groups = columns // size
    block = nibble_block(columns, size)
    places, dtype = (columns, torch.int8) if block is None else (columns // 4, torch.int16)
    codes = torch.empty(rows, places, dtype=dtype, device=weight.device)
    scales = torch.empty(rows, groups, dtype=weight.dtype, device=weight.device)
    step = max(1, (_AT_ONCE if weight.device.type == "cpu" else _AT_ONCE_ELSEWHERE) // columns)
    for start in range(0, rows, step):
        part = slice(start, start + step)
        w = weight[part].float().unflatten(1, (groups, size))
        best, scale = _clipped(w, weight.dtype)
        q, scales[part] = best.flatten(1).to(torch.int8), scale
        codes[part] = q if block is None else pack_nibbles(q, block)
    return QuantizedWeight(codes, scales.t().contiguous(), size)


def _clipped(w: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """w float32 [rows, groups, size] -> (q, scales [rows, groups] that fit `dtype`)."""
    largest = w.abs().amax(2, keepdim=True)
    best_q, best_scale = torch.zeros_like(w), torch.ones_like(largest)
    least = torch.full_like(largest, torch.inf)
    for clip in _CLIPS:
        scale = (largest * (clip / 7)).to(dtype).float()
        scale.masked_fill_(scale == 0, 1)
        q = (w / scale).round_().clamp_(-8, 7)
        error = torch.addcmul(-w, q, scale).square_().sum(2, keepdim=True)
        better = error < least
        best_q, best_scale = torch.where(better, q, best_q), torch.where(better, scale, best_scale)
        least = torch.where(better, error, least)
    return best_q, best_scale.squeeze(2)


def few_tokens(weight: QuantizedWeight, dtype: torch.dtype) -> "FewTokensInt4 | None":
    """Models in bfloat16 alone: PyTorch has no other fast path, and float16 could not hold every zero point."""
    rows, _ = weight.shape
    fits = weight.codes.dtype == torch.int16 and weight.group_size in (32, 64, 128, 256) and rows % 16 == 0
    fits = fits and weight.codes.device.type == "cpu" and dtype == torch.bfloat16
    return FewTokensInt4(weight) if fits else None


class FewTokensInt4:
    """PyTorch's own product with int4, x (q s + offset)^T in float32. It widens the weight again for every four tokens.

    Scales and offsets are rounded to bfloat16, as a dense weight would be. An offset is small where zero points lie in
    the middle of the codes, which is where they lie.
    """

    library = "int4pack"
    most_tokens, most_beside_dense = 32, 4

    def __init__(self, weight: QuantizedWeight) -> None:
        rows, columns = weight.shape
        self._packed = torch.empty(rows, columns // 2, dtype=torch.uint8, device="cpu")
        # In strips, for it wants int32. The order inside depends on the processor: it is never saved.
        for start in range(0, rows, _PACKED_ROWS):
            part = slice(start, min(rows, start + _PACKED_ROWS))
            codes = codes_of(weight, part).int() + 8
            self._packed[part] = torch.ops.aten._convert_weight_to_int4pack_for_cpu(codes, 1)
        scales = weight.scales.float()
        offsets = torch.zeros_like(scales) if weight.zeros is None else -weight.zeros.float() * scales
        if weight.minima is not None:
            offsets += weight.minima.float()
        self._scales = torch.stack((scales, offsets), dim=-1).bfloat16()
        self._group_size = weight.group_size
        self.nbytes = self._packed.nbytes + self._scales.nbytes

    def __call__(self, x: Tensor) -> Tensor:
        x = x.contiguous()  # it takes no other, as a row that stands for several is
        return torch.ops.aten._weight_int4pack_mm_for_cpu(x, self._packed, self._group_size, self._scales)
