"""Products with quantised weights: codes are widened in registers, on their way to the matrix instructions.

    y[t, n] = sum over groups g of s[g, n] (x[t] q[n] - z[g, n] sum x[t]) + m[g, n] sum x[t], over g's columns

Codes become whole numbers (fp8: its own values) in x's dtype, which is exact; scales and zero points act on the float32
sums. A batch of up to `_FEW` tokens costs what the codes cost to read: N K bytes, or half of that in int4 (its layout
is told in `llama.kernels.cpu.matmul`).

For up to `_FEW` tokens a row of y depends neither on the other rows nor on their number: one tile of 16 tokens, and one
cut of K into splits, which the weight's shape and the device alone decide; splits are added in order. A dense weight
goes through the same loop where that is asked for.
"""

from functools import cache
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.runtime.driver import driver

from llama.kernels.checks import check_tensors, multiprocessor_count, require
from llama.kernels.cpu.matmul import nibble_block
from llama.kernels.gpu.e4m3 import from_e4m3
from llama.kernels.gpu.launch import Launcher, cdiv
from llama.kernels.types import QuantizedWeight

_FEW = 64
_MOST_SPLITS = 8


@triton.jit
def _from_nibbles(words, SHIFT: tl.constexpr, dtype: tl.constexpr):
    """Four bits of int16 words, as q + 8, -> q. A 16-bit float is built around them, for converting costs more."""
    nibbles = (words >> SHIFT) & 15
    if dtype == tl.bfloat16:
        return (nibbles | 0x4300).to(tl.int16).to(tl.bfloat16, bitcast=True) - 136.0  # 128 + 8
    half = (nibbles | 0x6400).to(tl.int16).to(tl.float16, bitcast=True) - 1032.0  # 1024 + 8
    return half.to(dtype)


# What `_from_nibbles` does, for two words in a register at a time and all four shifts: three shifts, four times (word &
# 15) | 128.0 in one instruction (0xEA = a & b | c), four subtractions of 136.0.
UNPACK_PAIRS = tl.constexpr(
    """{
    .reg .b32 w1, w2, w3, bias;
    mov.b32 bias, 0x43084308;
    shr.b32 w1, $4, 4;
    shr.b32 w2, $4, 8;
    shr.b32 w3, $4, 12;
    lop3.b32 $0, $4, 0x000F000F, 0x43004300, 0xEA;
    lop3.b32 $1, w1, 0x000F000F, 0x43004300, 0xEA;
    lop3.b32 $2, w2, 0x000F000F, 0x43004300, 0xEA;
    lop3.b32 $3, w3, 0x000F000F, 0x43004300, 0xEA;
    sub.bf16x2 $0, $0, bias;
    sub.bf16x2 $1, $1, bias;
    sub.bf16x2 $2, $2, bias;
    sub.bf16x2 $3, $3, bias;
    }"""
)


@triton.jit
def _four_nibbles(words, IN_PAIRS: tl.constexpr, dtype: tl.constexpr):
    """int16 words -> the q of each quarter, the lowest bits first."""
    if IN_PAIRS:
        return tl.inline_asm_elementwise(
            UNPACK_PAIRS,
            "=r,=r,=r,=r,r",
            [words],
            (tl.bfloat16, tl.bfloat16, tl.bfloat16, tl.bfloat16),
            is_pure=True,
            pack=2,
        )
    else:
        return (
            _from_nibbles(words, 0, dtype),
            _from_nibbles(words, 4, dtype),
            _from_nibbles(words, 8, dtype),
            _from_nibbles(words, 12, dtype),
        )


@triton.jit
def _scaled(total, part, sums, scales, zeros, minima, places, mask, HAS_ZEROS: tl.constexpr, HAS_MINIMA: tl.constexpr):
    """total + what a group adds to it."""
    if HAS_ZEROS:
        zero = tl.load(zeros + places, mask=mask, other=0).to(tl.float32)
        part -= sums[:, None] * zero[None, :]
    scale = tl.load(scales + places, mask=mask, other=0.0).to(tl.float32)
    total += part * scale[None, :]
    if HAS_MINIMA:
        minimum = tl.load(minima + places, mask=mask, other=0.0).to(tl.float32)
        total += sums[:, None] * minimum[None, :]
    return total


@triton.jit(do_not_specialize=["num_tokens"])
def _matmul_kernel(
    y,  # [SPLITS, tokens, N] float32, or y itself where there is one split
    x,
    codes,
    scales,  # [G, N], as zeros and minima
    zeros,
    minima,
    num_tokens,
    x_stride,
    N: tl.constexpr,
    K: tl.constexpr,
    GROUP_SIZE: tl.constexpr,
    WAY: tl.constexpr,
    HAS_ZEROS: tl.constexpr,
    HAS_MINIMA: tl.constexpr,
    NATIVE: tl.constexpr,  # sm_90 on: arithmetic with pairs of bfloat16, and a conversion of e4m3
    SPLITS: tl.constexpr,
    TOKENS: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    BLOCKS: tl.constexpr = (K + COLUMNS - 1) // COLUMNS
    PER_SPLIT: tl.constexpr = (BLOCKS + SPLITS - 1) // SPLITS
    HAS_SUMS: tl.constexpr = HAS_ZEROS or HAS_MINIMA
    # One scale for a row waits until the end of it.
    AT_THE_END: tl.constexpr = GROUP_SIZE >= K and not HAS_SUMS
    QUARTER: tl.constexpr = COLUMNS // 4
    # Quarters of a block that share a scale.
    TOGETHER: tl.constexpr = GROUP_SIZE // QUARTER if GROUP_SIZE < COLUMNS else 4
    dtype: tl.constexpr = x.dtype.element_ty

    split = tl.program_id(0) % SPLITS
    rows = tl.program_id(0) // SPLITS * ROWS + tl.arange(0, ROWS)
    tokens = (tl.program_id(1) * TOKENS + tl.arange(0, TOKENS)).to(tl.int64)
    row_mask, token_mask = rows < N, tokens < num_tokens
    if N % ROWS == 0:
        row_mask = tl.full([ROWS], True, tl.int1)  # which the compiler drops
    x += tokens[:, None] * x_stride
    total = tl.zeros([TOKENS, ROWS], tl.float32)
    sums = tl.zeros([TOKENS], tl.float32)
    for block in range(split * PER_SPLIT, tl.minimum((split + 1) * PER_SPLIT, BLOCKS)):
        if WAY == "int4":
            quarter = tl.arange(0, QUARTER)
            places = rows[:, None].to(tl.int64) * (K // 4) + block * QUARTER + quarter[None, :]
            words = tl.load(codes + places, mask=row_mask[:, None], other=0)
            part = tl.zeros([TOKENS, ROWS], tl.float32)
            quarters = _four_nibbles(words, NATIVE and dtype == tl.bfloat16, dtype)
            for i in tl.static_range(4):
                columns = block * COLUMNS + i * QUARTER + quarter
                values = tl.load(x + columns[None, :], mask=token_mask[:, None], other=0.0)
                weights = quarters[i]
                if AT_THE_END:
                    total = tl.dot(values, tl.trans(weights), total, input_precision="ieee")
                else:
                    part = tl.dot(values, tl.trans(weights), part, input_precision="ieee")
                    if HAS_SUMS:
                        sums += tl.sum(values.to(tl.float32), axis=1)
                    if i % TOGETHER == TOGETHER - 1:
                        place = (block * COLUMNS + i * QUARTER) // GROUP_SIZE * N + rows
                        total = _scaled(
                            total, part, sums, scales, zeros, minima, place, row_mask, HAS_ZEROS, HAS_MINIMA
                        )
                        part = tl.zeros([TOKENS, ROWS], tl.float32)
                        sums = tl.zeros([TOKENS], tl.float32)
        else:
            columns = block * COLUMNS + tl.arange(0, COLUMNS)
            places = rows[:, None].to(tl.int64) * K + columns[None, :]
            if K % COLUMNS == 0:
                values = tl.load(x + columns[None, :], mask=token_mask[:, None], other=0.0)
                narrow = tl.load(codes + places, mask=row_mask[:, None], other=0)
            else:
                inside = (columns < K)[None, :]
                values = tl.load(x + columns[None, :], mask=token_mask[:, None] & inside, other=0.0)
                narrow = tl.load(codes + places, mask=row_mask[:, None] & inside, other=0)
            if WAY != "fp8":
                weights = narrow.to(dtype)
            elif NATIVE:
                weights = narrow.to(tl.float8e4nv, bitcast=True).to(dtype)
            else:
                weights = from_e4m3(narrow, dtype)
            if AT_THE_END:
                total = tl.dot(values, tl.trans(weights), total, input_precision="ieee")
            else:
                part = tl.dot(values, tl.trans(weights), input_precision="ieee")
                if HAS_SUMS:
                    sums = tl.sum(values.to(tl.float32), axis=1)
                place = block * COLUMNS // GROUP_SIZE * N + rows
                total = _scaled(total, part, sums, scales, zeros, minima, place, row_mask, HAS_ZEROS, HAS_MINIMA)
    if AT_THE_END and WAY != "dense":
        total *= tl.load(scales + rows, mask=row_mask, other=0.0).to(tl.float32)[None, :]
    target = y + (split * num_tokens.to(tl.int64) + tokens)[:, None] * N + rows[None, :]
    tl.store(target, total.to(y.dtype.element_ty), mask=token_mask[:, None] & row_mask[None, :])


@triton.jit(do_not_specialize=["size"])
def _add_kernel(y, partials, size, SPLITS: tl.constexpr, BLOCK: tl.constexpr):
    index = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = index < size
    total = tl.load(partials + index, mask=mask, other=0.0)
    for split in tl.static_range(1, SPLITS):
        total += tl.load(partials + split * size.to(tl.int64) + index, mask=mask, other=0.0)
    tl.store(y + index, total.to(y.dtype.element_ty), mask=mask)


class Tile(NamedTuple):
    tokens: int
    rows: int
    warps: int
    stages: int


_FEW_TILE = Tile(16, 64, warps=4, stages=4)


def _tile(weight: QuantizedWeight, tokens: int) -> Tile:
    """Many tokens share a tile of W while registers last: scales of groups ask for a second sum beside the first."""
    if tokens <= _FEW:
        return _FEW_TILE
    one_sum = weight.codes.dtype != torch.int16 and weight.group_size >= weight.shape[1] and weight.zeros is None
    if one_sum:
        return Tile(128, 128, warps=8, stages=3)
    has_sums = weight.zeros is not None or weight.minima is not None
    return Tile(32, 64, warps=4, stages=2) if has_sums else Tile(64, 32, warps=4, stages=3)


_launch_matmul = Launcher(_matmul_kernel)
_launch_add = Launcher(_add_kernel)


class _Scales(NamedTuple):
    """What acts on the sums; where a weight has none of some, `values` stand in their place."""

    values: Tensor
    zeros: Tensor | None
    minima: Tensor | None
    group_size: int


def quantized_matmul(x: Tensor, weight: QuantizedWeight) -> Tensor:
    """See `ops.quantized_matmul`."""
    return multiply(x, weight, multiprocessor_count(x.device))


def dense_matmul(x: Tensor, weight: Tensor) -> Tensor:
    """x W^T: x [tokens, K], weight [N, K] of its dtype, for up to `_FEW` tokens."""
    return multiply_dense(x, weight, multiprocessor_count(x.device))


def multiply(x: Tensor, weight: QuantizedWeight, processors: int) -> Tensor:
    """`quantized_matmul` on a device of so many multiprocessors."""
    codes = weight.codes
    way = {torch.int16: "int4", torch.int8: "int8", torch.float8_e4m3fn: "fp8"}[codes.dtype]
    if way == "fp8":
        codes = codes.view(torch.uint8)
    check_tensors("quantized_matmul", x=x, codes=codes)
    require(all(tensor.is_contiguous() for tensor in weight.tensors), "quantized_matmul: a weight must be contiguous")
    scales = _Scales(weight.scales, weight.zeros, weight.minima, weight.group_size)
    return _product(way, x, codes, scales, _tile(weight, x.shape[0]), _columns(weight, way), processors=processors)


def multiply_dense(x: Tensor, weight: Tensor, processors: int) -> Tensor:
    """`dense_matmul` on a device of so many multiprocessors."""
    check_tensors("dense_matmul", x=x, weight=weight)
    require(x.dtype == weight.dtype, f"dense_matmul: x is {x.dtype}, the weight {weight.dtype}")
    require(x.shape[0] <= _FEW, f"dense_matmul: at most {_FEW} tokens, got {x.shape[0]}")
    require(weight.is_contiguous(), "dense_matmul: a weight must be contiguous")
    scales = _Scales(weight, None, None, weight.shape[1])
    return _product("dense", x, weight, scales, _FEW_TILE, 256 // weight.element_size(), processors=processors)


def _product(way: str, x: Tensor, codes: Tensor, scales: _Scales, tile: Tile, block: int, *, processors: int) -> Tensor:
    tokens, columns = x.shape
    rows = codes.shape[0]
    y = torch.empty(tokens, rows, dtype=x.dtype, device=x.device)
    if y.numel() == 0:
        return y
    splits = _splits(rows, columns, block, tile.rows, processors) if tokens <= _FEW else 1
    target = y if splits == 1 else torch.empty(splits, tokens, rows, dtype=torch.float32, device=x.device)
    _launch_matmul(
        (cdiv(rows, tile.rows) * splits, cdiv(tokens, tile.tokens)),
        target,
        x,
        codes,
        scales.values,
        scales.values if scales.zeros is None else scales.zeros,
        scales.values if scales.minima is None else scales.minima,
        tokens,
        x.stride(0),
        N=rows,
        K=columns,
        GROUP_SIZE=scales.group_size,
        WAY=way,
        HAS_ZEROS=scales.zeros is not None,
        HAS_MINIMA=scales.minima is not None,
        NATIVE=_is_native(x.device),
        SPLITS=splits,
        TOKENS=tile.tokens,
        ROWS=tile.rows,
        COLUMNS=block,
        num_warps=tile.warps,
        num_stages=tile.stages,
    )
    if splits > 1:
        _launch_add((cdiv(y.numel(), 1024),), y, target, y.numel(), SPLITS=splits, BLOCK=1024, num_warps=4)
    return y


@cache
def _capability(index: int) -> tuple[int, int]:
    return torch.cuda.get_device_capability(index)


def _is_native(device: torch.device) -> bool:
    """sm_90 on; without a GPU (meta tensors) the target that is compiled for, and never in the interpreter."""
    if device.type == "cuda":
        return _capability(torch.cuda.current_device() if device.index is None else device.index) >= (9, 0)
    return device.type == "meta" and driver.active.get_current_target().arch >= 90


def _columns(weight: QuantizedWeight, way: str) -> int:
    """Columns of W that a step of the loop multiplies, which lie in one group each (int4: whose quarters do)."""
    size, columns = weight.group_size, weight.shape[1]
    if way == "int4":
        block = nibble_block(columns, size)
        assert block is not None, "a weight in nibbles has a block"
        return block
    if size >= columns:
        return 128
    block = min(128, size & -size)
    require(block >= 16, f"quantized_matmul: groups must be a multiple of 16 columns, got {size}")
    return block


def _splits(rows: int, columns: int, block: int, tile_rows: int, processors: int) -> int:
    """So many parts of K that there is a program for each processor, if K has so many blocks."""
    splits, tiles, blocks = 1, cdiv(rows, tile_rows), cdiv(columns, block)
    while splits < _MOST_SPLITS and tiles * splits < processors and blocks >= 4 * splits:
        splits *= 2
    return splits
