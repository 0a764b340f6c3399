"""Tile shapes by head_dim and element size, chosen for sm_90 and within the limits of sm_80 and sm_100.

One fixed choice each: neither batch nor length may pick a kernel, or a request's result would depend on its neighbours.
"""

import math
from typing import NamedTuple

LOG2_E = math.log2(math.e)


class DecodeTiles(NamedTuple):
    rows: int  # the query heads of one group, padded to what tensor cores take
    keys: int
    warps: int
    stages: int
    programs: int  # per multiprocessor, all of them resident at once

    @property
    def registers(self) -> int:
        """The cap per thread that leaves room for `programs`: left to itself, ptxas spills to reach one more."""
        return min(255, 65536 // (32 * self.warps * self.programs) // 8 * 8)


class PrefillTiles(NamedTuple):
    rows: int  # queries x heads of one group
    keys: int
    warps: int
    stages: int


# (head_dim padded to a power of two, bytes per element) -> keys, warps, stages, programs
_DECODE = {
    (64, 2): (64, 4, 4, 3),
    (128, 2): (64, 4, 3, 2),
    (256, 2): (32, 4, 3, 2),
    (64, 4): (32, 4, 3, 2),
    (128, 4): (16, 4, 4, 3),
    (256, 4): (16, 8, 3, 1),
}

# the same -> rows, keys, warps, stages
_PREFILL = {
    (64, 2): (128, 128, 8, 3),
    (128, 2): (128, 64, 8, 3),
    (256, 2): (64, 32, 8, 2),
    (64, 4): (32, 32, 8, 2),
    (128, 4): (16, 16, 4, 2),
    (256, 4): (16, 16, 8, 3),
}


def padded(head_dim: int) -> int:
    """head_dim as a power of two that a dot can take."""
    if not 1 <= head_dim <= 256:
        raise ValueError(f"paged_attention: head_dim must be in [1, 256], got {head_dim}")
    return max(16, 1 << (head_dim - 1).bit_length())


def decode_tiles(head_dim: int, element_size: int, group: int) -> DecodeTiles:
    return DecodeTiles(max(16, 1 << (group - 1).bit_length()), *_DECODE[max(64, padded(head_dim)), element_size])


def prefill_tiles(head_dim: int, element_size: int, group: int) -> PrefillTiles:
    rows, *rest = _PREFILL[max(64, padded(head_dim)), element_size]
    return PrefillTiles(max(rows, 1 << (group - 1).bit_length()), *rest)
