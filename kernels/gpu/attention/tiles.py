"""What both attention kernels share: where a tile of keys lies in the paged cache, and how a row of it is read."""

import triton
import triton.language as tl


@triton.jit
def load_blocks(block_table, first, end, BLOCK_SIZE: tl.constexpr, BLOCK_KEYS: tl.constexpr):
    """Block ids of the keys first .. first + BLOCK_KEYS - 1, of which those from `end` on are not looked up.

    `first` is a multiple of BLOCK_KEYS: a tile that is no longer than a block lies within one, and one id is enough.
    Loops over tiles load the ids of the next tile beside the keys of this one. Loaded where they are needed, they would
    be one more memory latency in every step, and the software pipeline would not run ahead of them.
    """
    if BLOCK_SIZE >= BLOCK_KEYS:
        return tl.load(block_table + first // BLOCK_SIZE, mask=first < end, other=0)
    else:
        keys = first + tl.arange(0, BLOCK_KEYS)
        return tl.load(block_table + keys // BLOCK_SIZE, mask=keys < end, other=0)


@triton.jit
def key_rows(
    blocks,
    first,
    BLOCK_SIZE: tl.constexpr,
    BLOCK_KEYS: tl.constexpr,
    BLOCK_STRIDE: tl.constexpr,
    SLOT_STRIDE: tl.constexpr,
):
    """Offsets in a cache of a tile's keys, as 64-bit numbers: a cache may have more than 2^31 elements.

    The strides are constants, which only the model's shape decides: one multiply-add makes an address.
    """
    within = tl.arange(0, BLOCK_KEYS) % BLOCK_SIZE
    if BLOCK_SIZE > BLOCK_KEYS:
        within += first % BLOCK_SIZE
    return blocks.to(tl.int64) * BLOCK_STRIDE + within * SLOT_STRIDE


@triton.jit
def row_mask(valid, DIMS: tl.constexpr, HEAD_DIM: tl.constexpr):
    """[rows, DIMS] mask of the valid rows; the dimensions that only pad HEAD_DIM to a power of two are not valid."""
    mask = valid[:, None]
    if DIMS != HEAD_DIM:
        mask = mask & (tl.arange(0, DIMS) < HEAD_DIM)[None, :]
    return mask
