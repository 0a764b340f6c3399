"""What the attention kernels are launched with by head_dim and element size, chosen for sm_90 and within the limits of
sm_80 and sm_100.

One fixed choice each: neither batch nor length may pick a tile, or a request's result would depend on its neighbours.
"""

import math
from typing import NamedTuple

from torch import Tensor

from llama.kernels.checks import check_paged_attention, check_tensors
from llama.kernels.types import KVLayer, Ragged

LOG2_E = math.log2(math.e)

# (head_dim padded to a power of two, bytes per element) -> keys of a tile, warps, stages, programs per multiprocessor
_DECODE = {
    (64, 2): (64, 4, 4, 3),
    (128, 2): (64, 4, 3, 2),
    (256, 2): (32, 4, 3, 2),
    (64, 4): (32, 4, 3, 2),
    (128, 4): (16, 4, 4, 3),
    (256, 4): (16, 8, 3, 1),
}

# Where K and V are e4m3, which is widened in registers: beside it the addresses of a third stage would spill on sm_80.
_DECODE_E4M3 = _DECODE | {(128, 2): (64, 4, 2, 2)}


class PrefillTile(NamedTuple):
    rows: int  # queries x heads of one group
    keys: int
    warps: int
    stages: int
    # K and V of tiles without masks come through tensor descriptors where a tile of keys lies within one block.
    descriptors: bool = False


# For head_dim 128 in 16 bits, by name: _PREFILL has the first, benchmarks.first_look measures all of them.
PREFILL_CANDIDATES = {
    "128x64": PrefillTile(128, 64, 8, 3),
    "128x128": PrefillTile(128, 128, 8, 2),
    "64x64": PrefillTile(64, 64, 4, 3),
    "64x128": PrefillTile(64, 128, 4, 2),
    "128x64 descriptors": PrefillTile(128, 64, 8, 3, descriptors=True),
    "128x128 descriptors": PrefillTile(128, 128, 8, 2, descriptors=True),
}

# the same as of _DECODE -> tile
_PREFILL = {
    (64, 2): PrefillTile(128, 128, 8, 3),
    (128, 2): PREFILL_CANDIDATES["128x64"],
    (256, 2): PrefillTile(64, 32, 8, 2),
    (64, 4): PrefillTile(32, 32, 8, 2),
    (128, 4): PrefillTile(16, 16, 4, 2),
    (256, 4): PrefillTile(16, 16, 8, 3),
}


def padded(head_dim: int) -> int:
    """head_dim as a power of two that a dot can take."""
    if not 1 <= head_dim <= 256:
        raise ValueError(f"paged_attention: head_dim must be in [1, 256], got {head_dim}")
    return max(16, 1 << (head_dim - 1).bit_length())


def has_room(head_dim: int, element_size: int, group: int, *, is_e4m3: bool) -> bool:
    """Whether the decode kernel has registers left to rotate its tokens and to add up chunks: others would spill, some
    on one architecture alone (benchmarks/LOG.md). See `decode_options`."""
    return element_size == 2 and padded(head_dim) > 64 and group <= 32 and not is_e4m3


def decode_options(
    head_dim: int, element_size: int, group: int, *, is_e4m3: bool = False
) -> tuple[int, dict[str, int]]:
    """-> programs per multiprocessor, all of them resident at once, and the kernel's options. `group`: query heads per
    KV head, times queries of a run; a tile has all of them, padded to what tensor cores take. `is_e4m3`: K and V are,
    while `element_size` is that of the queries."""
    table = _DECODE_E4M3 if is_e4m3 else _DECODE
    keys, warps, stages, programs = table[max(64, padded(head_dim)), element_size]
    rows = max(16, 1 << (group - 1).bit_length())
    if rows > 16:  # twice the registers
        warps, programs = 2 * warps, max(1, programs // 2)
    # The cap per thread leaves room for `programs`: without it ptxas spills to reach one more.
    registers = 255 if is_e4m3 else min(255, 65536 // (32 * warps * programs) // 8 * 8)
    options = {"ROWS": rows, "BLOCK_KEYS": keys, "num_warps": warps, "num_stages": stages, "maxnreg": registers}
    return programs, options


def prefill_tile(head_dim: int, element_size: int) -> PrefillTile:
    return _PREFILL[max(64, padded(head_dim)), element_size]


def prefill_options(tile: PrefillTile, group: int) -> dict[str, int]:
    """The kernel's options for so many query heads per KV head."""
    rows = max(tile.rows, 1 << (group - 1).bit_length())
    return {"ROWS": rows, "BLOCK_KEYS": tile.keys, "num_warps": tile.warps, "num_stages": tile.stages}


def check_attention(q: Tensor, kv_layer: KVLayer, ragged: Ragged, scale: float) -> None:
    """ValueError for what the kernels do not take."""
    check_paged_attention(q, kv_layer, ragged)
    check_tensors(
        "paged_attention",
        q=q,
        cache=kv_layer.k,
        block_tables=ragged.block_tables,
        query_starts=ragged.query_starts,
        context_lens=ragged.context_lens,
    )
    block_size = ragged.block_size
    if block_size & (block_size - 1):
        raise ValueError(f"paged_attention: block size must be a power of two, got {block_size}")
    if scale <= 0:
        raise ValueError(f"paged_attention: scale must be positive, got {scale}")
