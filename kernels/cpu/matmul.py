"""Products with quantised weights in plain PyTorch: a strip of rows is widened, multiplied, and forgotten.

The layout of int4 is that of the GPU's kernel. K is cut into blocks of B columns, and a block into four quarters; word
j of a block holds column j of each quarter, the first quarter in its lowest four bits, as q + 8:

    word[n, c B / 4 + j] = sum over i of (q[n, c B + i B / 4 + j] + 8) << 4 i
"""

from functools import cache

import torch
from torch import Tensor

from llama.kernels.types import QuantizedWeight, wide_dtype

# Weights widened at once. A strip for few tokens should stay in a core's cache; many tokens want a wide product.
_STRIP, _WIDE_STRIP, _MANY_TOKENS = 1 << 18, 1 << 20, 64
_IN_TILES = 32  # up to here widening to float32 costs no more, and W is not rounded
_PACKED_ROWS = 256  # at once
_LARGEST_BLOCK, _SMALLEST_BLOCK = 256, 64
_SHIFTS = (0, 4, 8, 12)
_BITS_OF_128 = 0x4300  # as a bfloat16


def nibble_block(columns: int, group_size: int) -> int | None:
    """B: the largest of 256, 128, 64 that divides K and whose quarters lie in one group each; None if there is none."""
    block = _LARGEST_BLOCK
    while block >= _SMALLEST_BLOCK:
        if columns % block == 0 and group_size % (block // 4) == 0:
            return block
        block //= 2
    return None


def pack_nibbles(q: Tensor, block: int) -> Tensor:
    """int8 [N, K] of values from -8 to 7 -> int16 [N, K / 4]."""
    words = torch.zeros(q.shape[0], q.shape[1] // 4, dtype=torch.int16, device=q.device)
    for part, target in zip(q.split(_PACKED_ROWS), words.split(_PACKED_ROWS), strict=True):
        quarters = part.view(part.shape[0], -1, 4, block // 4)
        for i, shift in enumerate(_SHIFTS):
            target |= (quarters[:, :, i].to(torch.int16) + 8).flatten(1) << shift
    return words


def unpack_nibbles(words: Tensor, block: int) -> Tensor:
    """int16 [N, K / 4] -> int8 [N, K]."""
    blocks = words.view(words.shape[0], -1, 1, block // 4)
    shifts = torch.tensor(_SHIFTS, dtype=torch.int16, device=words.device).view(4, 1)
    return ((blocks >> shifts & 15) - 8).to(torch.int8).flatten(1)


def codes_of(weight: QuantizedWeight, rows: slice = slice(None)) -> Tensor:
    """q of some rows [n, K], int8 or float8_e4m3fn."""
    codes = weight.codes[rows]
    if codes.dtype != torch.int16:
        return codes
    block = nibble_block(weight.shape[1], weight.group_size)
    assert block is not None, "a weight in nibbles has a block"
    return unpack_nibbles(codes, block)


def widen(weight: QuantizedWeight, rows: slice = slice(None)) -> Tensor:
    """Rows of W, float32 [n, K]."""
    flat = codes_of(weight, rows).float()
    size, columns = weight.group_size, flat.shape[1]

    def spread(values: Tensor) -> Tensor:
        values = values[:, rows].t().float()
        if columns % size:
            return values.repeat_interleave(size, dim=1)[:, :columns]
        return values.unsqueeze(-1)

    w = flat if columns % size else flat.unflatten(1, (-1, size))
    if weight.zeros is not None:
        w -= spread(weight.zeros)
    w *= spread(weight.scales)
    if weight.minima is not None:
        w += spread(weight.minima)
    return flat


def _has_exact_steps(weight: QuantizedWeight) -> bool:
    """Whether W in bfloat16 takes one rounding in bfloat16 too: that of the product with a scale."""
    is_exact = weight.codes.dtype in (torch.int16, torch.int8) and weight.scales.dtype == torch.bfloat16
    return is_exact and weight.minima is None and weight.shape[1] % weight.group_size == 0


def _widen_rounded(weight: QuantizedWeight, rows: slice) -> Tensor:
    """Rows of W, bfloat16 [n, K]: the bits of `widen` rounded, in half the time."""
    codes = weight.codes[rows]
    if codes.dtype == torch.int16:
        block = nibble_block(weight.shape[1], weight.group_size)
        assert block is not None, "a weight in nibbles has a block"
        shifts = torch.tensor(_SHIFTS, dtype=torch.int16, device=codes.device).view(4, 1)
        nibbles = codes.view(codes.shape[0], -1, 1, block // 4) >> shifts
        # 128 + n is the bfloat16 whose last bits are n.
        flat = nibbles.bitwise_and_(15).bitwise_or_(_BITS_OF_128).view(torch.bfloat16).sub_(128 + 8).flatten(1)
    else:
        flat = codes.to(torch.bfloat16)
    w = flat.unflatten(1, (-1, weight.group_size))
    if weight.zeros is not None:
        w -= weight.zeros[:, rows].t().to(torch.bfloat16).unsqueeze(-1)
    w *= weight.scales[:, rows].t().unsqueeze(-1)
    return flat


@cache
def multiplies_in_tiles() -> bool:
    """Whether this processor multiplies bfloat16 in tiles (AMX), an order of magnitude faster than float32."""
    return torch.cpu._is_amx_tile_supported() and torch.ops.mkldnn._is_mkldnn_bf16_supported()


def quantized_matmul(x: Tensor, weight: QuantizedWeight) -> Tensor:
    """Of many tokens in bfloat16, W is rounded to it where that is what the processor multiplies fast."""
    tokens, (rows, columns) = x.shape[0], weight.shape
    is_rounded = x.dtype == torch.bfloat16 and tokens > _IN_TILES and multiplies_in_tiles()
    wide = x.dtype if is_rounded else wide_dtype(x.dtype)
    make = _widen_rounded if is_rounded and _has_exact_steps(weight) else widen
    out, x_wide = x.new_empty(tokens, rows), x.to(wide)
    step = max(1, (_WIDE_STRIP if tokens > _MANY_TOKENS else _STRIP) // columns)
    for start in range(0, rows, step):
        part = slice(start, min(rows, start + step))
        out[:, part] = torch.nn.functional.linear(x_wide, make(weight, part).to(wide))
    return out
