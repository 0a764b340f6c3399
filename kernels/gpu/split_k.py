"""A product's parts over K, so that few rows of a weight fill a device: how many, and their sum, in order."""

import triton
import triton.language as tl

from llama.kernels.gpu.chain import take_turn
from llama.kernels.gpu.fused import Fused, summed, swiglu
from llama.kernels.gpu.launch import Launch, Launcher, cdiv

_MOST_SPLITS = 8


def splits_of(rows: int, columns: int, block: int, tile_rows: int, processors: int) -> int:
    """So many parts of K that there is a program for each processor, if K has so many blocks."""
    splits, tiles, blocks = 1, cdiv(rows, tile_rows), cdiv(columns, block)
    while splits < _MOST_SPLITS and tiles * splits < processors and blocks >= 4 * splits:
        splits *= 2
    return splits


@triton.jit
def _added(partials, index, size, mask, SPLITS: tl.constexpr):
    total = tl.load(partials + index, mask=mask, other=0.0)
    for split in tl.static_range(1, SPLITS):
        total += tl.load(partials + split * size.to(tl.int64) + index, mask=mask, other=0.0)
    return total


@triton.jit(do_not_specialize=["size"])
def _add_kernel(
    y,
    partials,
    residual,
    size,  # of a partial
    SPLITS: tl.constexpr,
    ADD: tl.constexpr,
    SWIGLU: tl.constexpr,  # the width of y, whose rows are made of two such; 0 = they are the sums
    EARLY: tl.constexpr,
    BLOCK: tl.constexpr,
):
    index = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    if EARLY:
        take_turn()
    if SWIGLU:
        mask = index < size // 2
        gates = index + index // SWIGLU * SWIGLU
        gate = _added(partials, gates, size, mask, SPLITS)
        product = swiglu(gate, _added(partials, gates + SWIGLU, size, mask, SPLITS), y.dtype.element_ty)
    else:
        mask = index < size
        product = _added(partials, index, size, mask, SPLITS).to(y.dtype.element_ty)
    if ADD:
        product = summed(product, tl.load(residual + index, mask=mask, other=0.0))
    tl.store(y + index, product, mask=mask)


_launch_add = Launcher(_add_kernel)


def settle_add(shape: tuple[int, int], rows: int, splits: int, fused: Fused, early: dict[str, bool]) -> Launch:
    """Of (y, partials, residual): y, of this shape, = the sum of partials [splits, tokens, rows], and what is fused
    behind it. `early`: how the launch is told so."""
    tokens, width = shape
    return Launch(
        _launch_add,
        (cdiv(tokens * width, 1024),),
        (tokens * rows,),
        SPLITS=splits,
        ADD=fused.residual is not None,
        SWIGLU=width if fused.swiglu else 0,
        EARLY=bool(early),
        BLOCK=1024,
        num_warps=4,
        **early,
    )
