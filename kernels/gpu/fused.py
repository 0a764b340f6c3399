"""What a product of few tokens is computed together with: RMSNorm before it; SwiGLU or the residual's addition behind.

Each rounds where the kernel of its own does (`llama.kernels.gpu.norm`, `llama.kernels.gpu.activation`), and so has its
bits. A norm's sum of squares alone has an order of its own: every program of a product makes it anew, from x, which the
L2 cache holds. So no kernel has to leave something for the next one, and it is made while weights are under way.

The first weights, which no kernel writes, are asked for while the kernel in front may still run
(`llama.kernels.gpu.chain`).
"""

from collections.abc import Hashable
from typing import NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from llama.kernels.checks import check_tensors, require
from llama.kernels.types import kind_of

FEW = 64  # tokens of a product whose rows depend on nothing but themselves
SECTOR = tl.constexpr(32)  # bytes that a request for one of them brings


class Fused(NamedTuple):
    """What there is beside a product x W^T, x [tokens, K] and W [N, K]."""

    norm: Tensor | None = None  # [K]: x is RMSNorm(x) with this weight
    eps: float = 0.0
    residual: Tensor | None = None  # [tokens, N], added to the product
    swiglu: bool = False  # W is gate above up: the result is silu(gate) * up [tokens, N / 2]

    @property
    def kind(self) -> Hashable:
        """What a launch depends on."""
        norm = None if self.norm is None else kind_of(self.norm)
        return norm, self.eps, None if self.residual is None else kind_of(self.residual), self.swiglu


def check_fused(x: Tensor, rows: int, fused: Fused) -> Fused:
    """`fused` if it fits x [tokens, K] and a weight of so many rows; else a ValueError."""
    tokens, columns = x.shape
    require(tokens <= FEW, f"fused_matmul: at most {FEW} tokens, got {tokens}")
    require(not (fused.swiglu and rows % 2), f"fused_matmul: {rows} rows are not a gate and an up")
    width = rows // 2 if fused.swiglu else rows
    for name, tensor, shape in (("norm", fused.norm, (columns,)), ("residual", fused.residual, (tokens, width))):
        if tensor is not None:
            check_tensors("fused_matmul", x=x, **{name: tensor})
            fits = tensor.shape == shape and tensor.dtype == x.dtype and tensor.is_contiguous()
            require(fits, f"fused_matmul: {name} must be {list(shape)} of x's dtype, got {list(tensor.shape)}")
    return fused


@triton.jit
def request(places):
    """Have what lies at these addresses brought into the L2 cache."""
    tl.inline_asm_elementwise(
        "prefetch.global.L2 [$1]; // $0", "=r,l", [places.to(tl.int64)], dtype=tl.int32, is_pure=False, pack=1
    )


@triton.jit
def inverse_rms(x, token_mask, eps, TOKENS: tl.constexpr, K: tl.constexpr, BLOCK: tl.constexpr):
    """x [TOKENS, 1] pointers to rows -> 1 / rms of each."""
    squares = tl.zeros([TOKENS], tl.float32)
    for start in range(0, K, BLOCK):
        columns = start + tl.arange(0, BLOCK)
        mask = token_mask[:, None]
        if K % BLOCK != 0:
            mask = mask & (columns < K)[None, :]
        values = tl.load(x + columns[None, :], mask=mask, other=0.0).to(tl.float32)
        squares += tl.sum(values * values, axis=1)
    return tl.rsqrt(squares / K + eps)


@triton.jit
def load_values(x, norm, columns, mask, scale, NORM: tl.constexpr, K: tl.constexpr):
    """Columns of x's rows, normalised if NORM says so."""
    values = tl.load(x + columns[None, :], mask=mask, other=0.0)
    if NORM:
        dtype: tl.constexpr = x.dtype.element_ty
        weights = tl.load(norm + columns, mask=columns < K, other=0.0)
        scaled = (values.to(tl.float32) * scale[:, None]).to(dtype).to(tl.float32)
        values = (scaled * weights.to(tl.float32)[None, :]).to(dtype)
    return values


@triton.jit
def swiglu(gate, up, dtype: tl.constexpr):
    """float32 sums -> silu(gate) * up."""
    gate = gate.to(dtype).to(tl.float32)
    activated = (gate / (1 + tl.exp(-gate))).to(dtype).to(tl.float32)
    return (activated * up.to(dtype).to(tl.float32)).to(dtype)


@triton.jit
def summed(product, residual):
    """Their sum, both and it in the model's dtype."""
    return (product.to(tl.float32) + residual.to(tl.float32)).to(product.dtype)
