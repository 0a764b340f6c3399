"""float8 e4m3 as bytes, by integer arithmetic: older GPUs have no other way, and the interpreter's cast is wrong."""

import triton
import triton.language as tl


@triton.jit
def from_e4m3(codes, dtype: tl.constexpr):
    """uint8 -> the value: sign, exponent and mantissa are put where a wider float has them, times the power of two by
    which the exponents' zeros differ. The codes of NaN become 480."""
    bits = codes.to(tl.int16)
    sign = (bits & 0x80) << 8
    if dtype == tl.bfloat16:
        return (sign | ((bits & 0x7F) << 4)).to(tl.int16).to(tl.bfloat16, bitcast=True) * 1.329227995784916e36  # 2^120
    half = (sign | ((bits & 0x7F) << 7)).to(tl.int16).to(tl.float16, bitcast=True) * 256.0
    return half.to(dtype)


@triton.jit
def to_e4m3(values):
    """float32 -> uint8, to the nearest, ties to even; what lies beyond 448 becomes 448, NaN stays NaN."""
    bits = values.to(tl.int32, bitcast=True)
    size = tl.minimum(tl.abs(values), 448.0)
    size_bits = size.to(tl.int32, bitcast=True)
    # 3 bits of mantissa stay of 23; the exponent's zero is 7, not 127.
    normal = ((size_bits + 0x7FFFF + ((size_bits >> 20) & 1)) >> 20) - (120 << 3)
    # Below 2^-6 codes count steps of 2^-9, which is the last bit of a float32 near 2^14.
    small = (size + 16384.0).to(tl.int32, bitcast=True) - 0x46800000
    code = tl.where(size < 0.015625, small, normal)
    code = tl.where(values != values, 0x7F, code)
    return (code | ((bits >> 24) & 0x80)).to(tl.uint8)


@triton.jit
def load_as(places, mask, dtype: tl.constexpr):
    """What lies at `places`, floats or e4m3's bytes, in `dtype`; 0 where the mask says no."""
    if places.dtype.element_ty == tl.uint8:
        return from_e4m3(tl.load(places, mask=mask, other=0), dtype)
    else:
        return tl.load(places, mask=mask, other=0.0).to(dtype)


@triton.jit
def load_all_as(places, dtype: tl.constexpr):
    """The same where there is no mask."""
    if places.dtype.element_ty == tl.uint8:
        return from_e4m3(tl.load(places), dtype)
    else:
        return tl.load(places).to(dtype)
