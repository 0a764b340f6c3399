"""The noise of sampling, bit for bit as in `llama.kernels.cpu.sampling.noise`."""

import triton
import triton.language as tl


@triton.jit
def noise_bits(ids, key_low, key_high):
    """24 uniform bits per token id, all in uint32: lowbias32 twice, one key word injected before each round.

    x ^ (x >> 16) is linear over xor and its own inverse: the one that ends the first round and the one that begins the
    second leave only the key's, as in `llama.kernels.cpu.sampling.noise`.
    """
    x = (ids ^ (ids >> 16)) ^ (key_low ^ (key_low >> 16))
    x *= 0x7FEB352D
    x ^= x >> 15
    x *= 0x846CA68B
    x ^= key_high ^ (key_high >> 16)
    x *= 0x7FEB352D
    x ^= x >> 15
    x *= 0x846CA68B
    return (x ^ (x >> 16)) >> 8


@triton.jit
def gumbel(ids, keys, row):
    """The noise of tokens of one row: -log(-log(u)) with u in (0, 1) from the bits."""
    key_low = tl.load(keys + row * 2).to(tl.uint32, bitcast=True)
    key_high = tl.load(keys + row * 2 + 1).to(tl.uint32, bitcast=True)
    bits = noise_bits(ids.to(tl.uint32), key_low, key_high)
    uniform = tl.maximum(bits, 1).to(tl.float32) * (2.0**-24)
    return -tl.log(-tl.log(uniform))
