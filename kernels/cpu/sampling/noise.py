"""The noise of sampling: a pure function of a row's two key words and a token's id, equal in every bit everywhere.

With lowbias32 (Chris Wellons, "Prospecting for Hash Functions"), all in unsigned 32 bits,

    x ^= x >> 16; x *= 0x7feb352d; x ^= x >> 15; x *= 0x846ca68b; x ^= x >> 16

and key words k0, k1: h = lowbias32(lowbias32(id ^ k0) ^ k1), u = max(h >> 8, 1) * 2^-24, gumbel = -log(-log(u)).

`v ^= v >> 16` is linear over xor and its own inverse. So the first one is taken of id and key apart, and the last of
the first round and the first of the second leave only the key's: a third of the work falls away.
"""

import torch

# The largest and smallest gumbel are 16.636 and -2.812: a token further than this below another never beats it.
GUMBEL_SPAN = 19.5

_MULTIPLIERS = (0x7FEB352D, 0x846CA68B - 2**32)  # as int32


def noise_bits(token_ids: torch.Tensor, keys: torch.Tensor) -> torch.Tensor:
    """h >> 8, int32 in [0, 2^24), of token_ids [rows, n] int64 under keys [rows, 2] int32."""
    first, second = _fold(keys).unsqueeze(2).unbind(1)
    return _mix(_fold(token_ids.to(torch.int32)) ^ first, second)


def block_noise_bits(blocks: torch.Tensor, size: int, keys: torch.Tensor) -> torch.Tensor:
    """h >> 8 [n, size] for the tokens from blocks[i] * size on, under keys[i]; size divides 65,536."""
    first, second = _fold(keys).unsqueeze(2).unbind(1)
    starts = _fold((blocks * size).to(torch.int32))[:, None] ^ first
    return _mix(starts ^ torch.arange(size, dtype=torch.int32, device=blocks.device), second)


def gumbel(bits: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """-log(-log(u)) of noise_bits, in dtype."""
    return bits.clamp_min(1).to(dtype).mul_(2.0**-24).log_().neg_().log_().neg_()


def _fold(words: torch.Tensor) -> torch.Tensor:
    """v ^ (v >> 16) of unsigned 32-bit words: the mask takes off the copies of the sign of an int32 shift."""
    return words ^ ((words >> 16) & 0xFFFF)


def _mix(x: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
    """What lies between the folds of both rounds. Overwrites x; int32 products wrap, as they should."""
    shifted = torch.empty_like(x)
    for last in (False, True):
        x.mul_(_MULTIPLIERS[0])
        torch.bitwise_right_shift(x, 15, out=shifted)
        x ^= shifted.bitwise_and_(0x1FFFF)
        x.mul_(_MULTIPLIERS[1])
        if not last:
            x ^= key
    torch.bitwise_right_shift(x, 24, out=shifted)  # (x ^ (x >> 16)) >> 8
    return x.bitwise_right_shift_(8).bitwise_and_(0xFFFFFF).bitwise_xor_(shifted.bitwise_and_(0xFF))
