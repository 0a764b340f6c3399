"""Products with quantised weights: codes are widened in registers, on their way to the matrix instructions.

    y[t, n] = sum over groups g of s[g, n] (x[t] q[n] - z[g, n] sum x[t]) + m[g, n] sum x[t], over g's columns

Codes become whole numbers (fp8: its own values) in x's dtype, which is exact; scales and zero points act on the float32
sums. Up to `FEW` tokens cost what the codes cost to read: N K bytes, half of it in int4 (`llama.kernels.cpu.matmul`).

For up to `FEW` tokens a row of y depends neither on the other rows nor on their number: one tile of 16 tokens, and one
cut of K into splits, which the weight's shape and the device alone decide. Dense weights may go through the same loop,
and all of that be fused with what is around it (`llama.kernels.gpu.fused`).
"""

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from llama.kernels.checks import check_tensors, multiprocessor_count, require
from llama.kernels.cpu.matmul import nibble_block
from llama.kernels.gpu import chain
from llama.kernels.gpu.chain import take_turn
from llama.kernels.gpu.e4m3 import from_e4m3
from llama.kernels.gpu.fused import (
    FEW,
    SECTOR,
    Fused,
    check_fused,
    inverse_rms,
    load_values,
    request,
    summed,
    swiglu,
)
from llama.kernels.gpu.launch import Kinds, Launch, Launcher, cdiv
from llama.kernels.gpu.nibbles import four_nibbles
from llama.kernels.gpu.split_k import settle_add, splits_of
from llama.kernels.types import QuantizedWeight, kind_of


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
    norm,
    residual,
    num_tokens,
    x_stride,
    eps,
    N: tl.constexpr,
    K: tl.constexpr,
    GROUP_SIZE: tl.constexpr,
    WAY: tl.constexpr,
    HAS_ZEROS: tl.constexpr,
    HAS_MINIMA: tl.constexpr,
    NATIVE: tl.constexpr,  # sm_90 on: arithmetic with pairs of bfloat16, and a conversion of e4m3
    NORM: tl.constexpr,  # the block in which squares are added; 0 = x is taken as it is
    ADD: tl.constexpr,
    SWIGLU: tl.constexpr,
    AHEAD: tl.constexpr,  # blocks of W requested while the kernel in front may still run; 0 = it has ended
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

    # Rows of the result, and those of W that they are made of.
    WIDTH: tl.constexpr = N // 2 if SWIGLU else N
    OUTS: tl.constexpr = ROWS // 2 if SWIGLU else ROWS
    split = tl.program_id(0) % SPLITS
    first = tl.program_id(0) // SPLITS * OUTS
    rows = first + tl.arange(0, ROWS)
    row_mask = rows < N
    if SWIGLU:
        in_half = first + tl.arange(0, ROWS) % OUTS
        rows, row_mask = in_half + tl.arange(0, ROWS) // OUTS * WIDTH, in_half < WIDTH
    tokens = (tl.program_id(1) * TOKENS + tl.arange(0, TOKENS)).to(tl.int64)
    token_mask = tokens < num_tokens
    outs = first + tl.arange(0, OUTS)
    mask_out = token_mask[:, None] & (outs < WIDTH)[None, :]
    if N % ROWS == 0:
        row_mask = tl.full([ROWS], True, tl.int1)  # which the compiler drops
        mask_out = token_mask[:, None] & tl.full([1, OUTS], True, tl.int1)
    if AHEAD:
        LENGTH: tl.constexpr = K // 4 if WAY == "int4" else K
        STEP: tl.constexpr = QUARTER if WAY == "int4" else COLUMNS
        EACH: tl.constexpr = SECTOR * 8 // codes.dtype.element_ty.primitive_bitwidth
        ahead = split * PER_SPLIT * STEP + tl.arange(0, AHEAD * STEP // EACH) * EACH
        ahead = tl.minimum(ahead, LENGTH - 1)[None, :]
        request(codes + tl.minimum(rows, N - 1)[:, None].to(tl.int64) * LENGTH + ahead)
        take_turn()
    if ADD:  # under way while the sum is made
        beside = tl.load(residual + tokens[:, None] * WIDTH + outs[None, :], mask=mask_out, other=0.0)
    x += tokens[:, None] * x_stride
    scale_of_x = tl.zeros([TOKENS], tl.float32)
    if NORM:
        scale_of_x = inverse_rms(x, token_mask, eps, TOKENS, K, NORM)
    total = tl.zeros([TOKENS, ROWS], tl.float32)
    sums = tl.zeros([TOKENS], tl.float32)
    for block in range(split * PER_SPLIT, tl.minimum((split + 1) * PER_SPLIT, BLOCKS)):
        if WAY == "int4":
            quarter = tl.arange(0, QUARTER)
            places = rows[:, None].to(tl.int64) * (K // 4) + block * QUARTER + quarter[None, :]
            words = tl.load(codes + places, mask=row_mask[:, None], other=0)
            part = tl.zeros([TOKENS, ROWS], tl.float32)
            quarters = four_nibbles(words, NATIVE and dtype == tl.bfloat16, dtype)
            for i in tl.static_range(4):
                columns = block * COLUMNS + i * QUARTER + quarter
                values = load_values(x, norm, columns, token_mask[:, None], scale_of_x, NORM, K)
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
                values = load_values(x, norm, columns, token_mask[:, None], scale_of_x, NORM, K)
                narrow = tl.load(codes + places, mask=row_mask[:, None], other=0)
            else:
                inside = (columns < K)[None, :]
                values = load_values(x, norm, columns, token_mask[:, None] & inside, scale_of_x, NORM, K)
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
    if SWIGLU:
        gate, up = tl.split(tl.permute(tl.reshape(total, [TOKENS, 2, OUTS]), (0, 2, 1)))
        product = swiglu(gate, up, dtype)
    else:
        product = total.to(y.dtype.element_ty)
    if ADD:
        product = summed(product, beside)
    target = y + (split * num_tokens.to(tl.int64) + tokens)[:, None] * WIDTH + outs[None, :]
    tl.store(target, product, mask=mask_out)


class Tile(NamedTuple):
    tokens: int
    rows: int
    warps: int
    stages: int


_FEW_TILE = Tile(16, 64, warps=4, stages=4)
_NARROW_TILE = Tile(16, 32, warps=4, stages=8)


def _tile(weight: QuantizedWeight, tokens: int) -> Tile:
    """Many tokens share a tile of W while registers last: scales of groups ask for a second sum beside the first."""
    if tokens <= FEW:
        return _FEW_TILE
    one_sum = weight.codes.dtype != torch.int16 and weight.group_size >= weight.shape[1] and weight.zeros is None
    if one_sum:
        return Tile(128, 128, warps=8, stages=3)
    has_sums = weight.zeros is not None or weight.minima is not None
    return Tile(32, 64, warps=4, stages=2) if has_sums else Tile(64, 32, warps=4, stages=3)


_launch_matmul = Launcher(_matmul_kernel)


class _Settled(NamedTuple):
    product: Launch
    shape: tuple[int, int]  # of y
    partials: tuple[int, int, int] | None  # where K is split
    add: Launch | None


_KINDS: Kinds[_Settled] = Kinds()


def quantized_matmul(x: Tensor, weight: QuantizedWeight) -> Tensor:
    """See `ops.quantized_matmul`."""
    return multiply(x, weight, multiprocessor_count(x.device))


def dense_matmul(x: Tensor, weight: Tensor) -> Tensor:
    """x W^T: x [tokens, K], weight [N, K] of its dtype, for up to `FEW` tokens."""
    return multiply_dense(x, weight, multiprocessor_count(x.device))


def fused_matmul(x: Tensor, weight: Tensor | QuantizedWeight, fused: Fused) -> Tensor:
    """x W^T for up to `FEW` tokens, with what `fused` says before and behind it."""
    if isinstance(weight, QuantizedWeight):
        return multiply(x, weight, multiprocessor_count(x.device), fused)
    return multiply_dense(x, weight, multiprocessor_count(x.device), fused)


def multiply(x: Tensor, weight: QuantizedWeight, processors: int, fused: Fused | None = None) -> Tensor:
    """`quantized_matmul` on a device of so many multiprocessors."""
    kind = *kind_of(x), weight.kind, processors, None if fused is None else fused.kind
    settled = _KINDS.get(kind) or _KINDS.keep(kind, _settle_codes(x, weight, processors, fused))
    codes, scales, zeros, minima = weight.codes, weight.scales, weight.zeros, weight.minima
    if codes.dtype == torch.float8_e4m3fn:
        codes = codes.view(torch.uint8)
    # Where a weight has none of some, others stand in their place.
    parts = codes, scales, scales if zeros is None else zeros, scales if minima is None else minima
    return _product(settled, x, parts, fused)


def multiply_dense(x: Tensor, weight: Tensor, processors: int, fused: Fused | None = None) -> Tensor:
    """`dense_matmul` on a device of so many multiprocessors."""
    kind = *kind_of(x), *kind_of(weight), processors, None if fused is None else fused.kind
    settled = _KINDS.get(kind) or _KINDS.keep(kind, _settle_dense(x, weight, processors, fused))
    return _product(settled, x, (weight, weight, weight, weight), fused)


def _product(settled: _Settled, x: Tensor, weight: tuple[Tensor, ...], fused: Fused | None) -> Tensor:
    product, shape, partials, add = settled
    y = torch.empty(shape, dtype=x.dtype, device=x.device)
    if y.numel() == 0:
        return y
    target = y if partials is None else torch.empty(partials, dtype=torch.float32, device=x.device)
    norm = x if fused is None or fused.norm is None else fused.norm
    residual = None if fused is None else fused.residual
    product(target, x, *weight, norm, x if residual is None else residual)
    if add is not None:
        add(y, target, y if residual is None else residual)
    return y


def _settle_codes(x: Tensor, weight: QuantizedWeight, processors: int, fused: Fused | None) -> _Settled:
    way = {torch.int16: "int4", torch.int8: "int8", torch.float8_e4m3fn: "fp8"}[weight.codes.dtype]
    codes = weight.codes.view(torch.uint8) if way == "fp8" else weight.codes
    check_tensors("quantized_matmul", x=x, codes=codes)
    require(all(tensor.is_contiguous() for tensor in weight.tensors), "quantized_matmul: a weight must be contiguous")
    parts = {
        "WAY": way,
        "GROUP_SIZE": weight.group_size,
        "HAS_ZEROS": weight.zeros is not None,
        "HAS_MINIMA": weight.minima is not None,
        "COLUMNS": _columns(weight, way),
    }
    return _settle(x, weight.shape[0], parts, _tile(weight, x.shape[0]), processors, fused)


def _settle_dense(x: Tensor, weight: Tensor, processors: int, fused: Fused | None) -> _Settled:
    check_tensors("dense_matmul", x=x, weight=weight)
    require(x.dtype == weight.dtype, f"dense_matmul: x is {x.dtype}, the weight {weight.dtype}")
    require(x.shape[0] <= FEW, f"dense_matmul: at most {FEW} tokens, got {x.shape[0]}")
    require(weight.is_contiguous(), "dense_matmul: a weight must be contiguous")
    tile = _FEW_TILE
    if fused is not None:
        processors = 3 * processors // 4  # to add up splits takes longer than what the others would gain
        if cdiv(weight.shape[0], tile.rows) < processors:
            tile = _NARROW_TILE
    parts = {"WAY": "dense", "GROUP_SIZE": weight.shape[1], "HAS_ZEROS": False, "HAS_MINIMA": False}
    return _settle(x, weight.shape[0], parts | {"COLUMNS": 256 // weight.element_size()}, tile, processors, fused)


def _settle(x: Tensor, rows: int, parts: dict[str, Any], tile: Tile, processors: int, fused: Fused | None) -> _Settled:
    """`parts`: the kernel's constants that follow from the form of the weight."""
    tokens, columns = x.shape
    early = chain.launch_options(x.device, fused is not None)
    norm, eps, residual, is_swiglu = fused = Fused() if fused is None else check_fused(x, rows, fused)
    splits = splits_of(rows, columns, parts["COLUMNS"], tile.rows, processors) if tokens <= FEW else 1
    product = Launch(
        _launch_matmul,
        (cdiv(rows, tile.rows) * splits, cdiv(tokens, tile.tokens)),
        (tokens, x.stride(0), eps),
        N=rows,
        K=columns,
        **parts,
        NATIVE=chain.is_native(x.device),
        NORM=0 if norm is None else 2048 // x.element_size(),
        ADD=splits == 1 and residual is not None,
        SWIGLU=splits == 1 and is_swiglu,
        AHEAD=tile.stages if early else 0,
        SPLITS=splits,
        TOKENS=tile.tokens,
        ROWS=tile.rows,
        num_warps=tile.warps,
        num_stages=tile.stages,
        # On sm_90 the compiler else spills registers of fp8 to fit a sixth program in.
        **(early | {"maxnreg": 96} if early and splits == 1 and is_swiglu and norm is None else early),
    )
    shape = tokens, rows // 2 if is_swiglu else rows
    if splits == 1:
        return _Settled(product, shape, None, None)
    return _Settled(product, shape, (splits, tokens, rows), settle_add(shape, rows, splits, fused, early))


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
