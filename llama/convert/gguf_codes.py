"""The codes of a GGUF file's tensors as they are, for a folder whose weights are those of the file, bit for bit.

A block of a row holds codes, half-precision scales and, in some types, the least value of each group. The layouts are
those of llama.cpp (ggml-quants.c), which the gguf package expands; nothing here rounds.
"""

from collections.abc import Callable, Mapping

import gguf
import torch
from gguf import GGMLQuantizationType as Type
from torch import Tensor

from llama.model.weights.coded import CodedWeight

# codes unsigned [blocks, values], scales [blocks, groups], and minima the same or None
_Blocks = tuple[Tensor, Tensor, Tensor | None]


def can_keep(kind: Type) -> bool:
    return kind in _READERS


def has_minima(kind: Type) -> bool:
    """Whether only MLX's affine form can tell it."""
    return kind in (Type.Q4_1, Type.Q4_K)


def read_codes(data: Tensor, kind: Type, *, with_minima: bool) -> CodedWeight:
    """`data` uint8 [rows, bytes], as the file stores them -> the weight [rows, columns].

    `with_minima`: also where the type has none, and codes are whole numbers around a middle.
    """
    values, size = gguf.GGML_QUANT_SIZES[kind]
    rows = len(data)
    codes, scales, minima = _READERS[kind](data.contiguous().view(-1, size))
    bits = 4 if kind in (Type.Q4_0, Type.Q4_1, Type.Q4_K) else 8
    groups = values // scales.shape[1]
    codes, scales = codes.reshape(rows, -1), scales.reshape(rows, -1)
    if minima is None and with_minima:
        minima = scales.float() * -_MIDDLES[kind]
    if minima is None:
        codes = (codes.to(torch.int16) - _MIDDLES[kind]).to(torch.int8)
        return CodedWeight(codes, _narrow(scales), groups=groups, bits=bits)
    return CodedWeight(codes, _narrow(scales), minima=_narrow(minima.reshape(rows, -1)), groups=groups, bits=bits)


def _narrow(values: Tensor) -> Tensor:
    """In float16 where it holds them all."""
    half = values.half()
    return half if torch.equal(half.float(), values.float()) else values.float()


def _half(blocks: Tensor, start: int) -> Tensor:
    return blocks[:, start : start + 2].contiguous().view(torch.float16)


def _nibbles(packed: Tensor, run: int) -> Tensor:
    """uint8 [blocks, n] -> [blocks, 2 n]: of each `run` of bytes first the low halves, then the high ones."""
    parts = packed.reshape(len(packed), -1, run)
    return torch.stack((parts & 15, parts >> 4), dim=2).flatten(1)


def _q4_0(blocks: Tensor) -> _Blocks:
    return _nibbles(blocks[:, 2:], 16), _half(blocks, 0), None


def _q4_1(blocks: Tensor) -> _Blocks:
    return _nibbles(blocks[:, 4:], 16), _half(blocks, 0), _half(blocks, 2)


def _q8_0(blocks: Tensor) -> _Blocks:
    return blocks[:, 2:] ^ 128, _half(blocks, 0), None


def _q4_k(blocks: Tensor) -> _Blocks:
    """Scales and minima of eight groups have 6 bits each: four pairs in their bytes' low bits, and the other four in
    nibbles, with the two highest bits above the first."""
    low, high, nibbles = blocks[:, 4:8], blocks[:, 8:12], blocks[:, 12:16]
    scales = torch.cat((low & 63, (nibbles & 15) | (low >> 2 & 48)), dim=1)
    minima = torch.cat((high & 63, (nibbles >> 4) | (high >> 2 & 48)), dim=1)
    return _nibbles(blocks[:, 16:], 32), _half(blocks, 0).float() * scales, -(_half(blocks, 2).float() * minima)


def _q6_k(blocks: Tensor) -> _Blocks:
    """Four bits of each code in nibbles, two in the bytes behind them."""
    pairs = blocks[:, 128:192].reshape(-1, 2, 32)
    upper = torch.stack([pairs >> shift & 3 for shift in (0, 2, 4, 6)], dim=2).flatten(1)
    scales = _half(blocks, 208).float() * blocks[:, 192:208].view(torch.int8)
    return _nibbles(blocks[:, :128], 64) | upper << 4, scales, None


_READERS: Mapping[Type, Callable[[Tensor], _Blocks]] = {
    Type.Q4_0: _q4_0,
    Type.Q4_1: _q4_1,
    Type.Q8_0: _q8_0,
    Type.Q4_K: _q4_k,
    Type.Q6_K: _q6_k,
}
KEPT = ", ".join(kind.name for kind in _READERS)
# The code that stands for 0.
_MIDDLES = {Type.Q4_0: 8, Type.Q8_0: 128, Type.Q6_K: 32}
