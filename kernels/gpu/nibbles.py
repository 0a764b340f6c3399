"""Four bits of an int16 word as a float: words as `llama.kernels.cpu.matmul.pack_nibbles` lays them."""

import triton
import triton.language as tl


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
def four_nibbles(words, IN_PAIRS: tl.constexpr, dtype: tl.constexpr):
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
