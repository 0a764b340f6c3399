"""RMS normalisation, alone and fused with the residual addition before it.

    summed = x + residual        normed = round(summed / sqrt(mean(summed^2) + eps)) * weight

Statistics in float32. `summed` is rounded to the model's dtype before its square is taken, and
the normed value before the weight multiplies it, as Hugging Face's Llama does. Per token, rms_norm reads and writes one
row each, add_rms_norm two; the weight stays in the cache. One program per token; a row wider than one block is walked
twice, the second time from the cache.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from llama.kernels.checks import check_add_rms_norm, check_rms_norm, check_tensors
from llama.kernels.gpu.launch import Kinds, Launch, Launcher, next_power_of_2
from llama.kernels.types import kind_of

# A row up to this many elements stays in registers between the sum of squares and the scaling.
_MAX_BLOCK = 16384


@triton.jit
def _load(x, residual, columns, mask, ADD: tl.constexpr):
    """The row's values as the norm sees them: the sum already rounded to the model's dtype."""
    values = tl.load(x + columns, mask=mask, other=0.0).to(tl.float32)
    if ADD:
        values += tl.load(residual + columns, mask=mask, other=0.0).to(tl.float32)
        values = values.to(x.dtype.element_ty).to(tl.float32)
    return values


@triton.jit
def _store(normed, summed, weights, values, scale, columns, mask, ADD: tl.constexpr):
    dtype: tl.constexpr = normed.dtype.element_ty
    if ADD:
        tl.store(summed + columns, values.to(dtype), mask=mask)
    scaled = (values * scale).to(dtype).to(tl.float32)
    tl.store(normed + columns, (scaled * weights.to(tl.float32)).to(dtype), mask=mask)


@triton.jit
def _norm_kernel(
    normed,
    summed,
    x,
    residual,
    weight,
    x_stride,
    residual_stride,
    eps,
    HIDDEN: tl.constexpr,
    BLOCK: tl.constexpr,
    ADD: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    x += row * x_stride
    residual += row * residual_stride
    normed += row * HIDDEN
    summed += row * HIDDEN
    columns = tl.arange(0, BLOCK)

    if BLOCK >= HIDDEN:
        mask = columns < HIDDEN
        values = _load(x, residual, columns, mask, ADD)
        weights = tl.load(weight + columns, mask=mask, other=0.0)  # under way while the sum is made
        scale = tl.rsqrt(tl.sum(values * values) / HIDDEN + eps)
        _store(normed, summed, weights, values, scale, columns, mask, ADD)
    else:
        squares = tl.zeros((BLOCK,), tl.float32)
        for start in range(0, HIDDEN, BLOCK):
            values = _load(x, residual, start + columns, start + columns < HIDDEN, ADD)
            squares += values * values
        scale = tl.rsqrt(tl.sum(squares) / HIDDEN + eps)
        for start in range(0, HIDDEN, BLOCK):
            mask = start + columns < HIDDEN
            values = _load(x, residual, start + columns, mask, ADD)
            weights = tl.load(weight + start + columns, mask=mask, other=0.0)
            _store(normed, summed, weights, values, scale, start + columns, mask, ADD)


_launch_norm = Launcher(_norm_kernel)
_KINDS: Kinds[Launch] = Kinds()


def _settle(x: Tensor, residual: Tensor | None, weight: Tensor, eps: float) -> Launch:
    if residual is None:
        check_rms_norm(x, weight)
    else:
        check_add_rms_norm(x, residual, weight)
    tokens, hidden = x.shape
    source = x if residual is None else residual
    check_tensors("rms_norm" if residual is None else "add_rms_norm", x=x, residual=source, weight=weight)
    block = min(next_power_of_2(hidden), _MAX_BLOCK)
    return Launch(
        _launch_norm,
        (tokens,),
        (x.stride(0), source.stride(0), eps),
        HIDDEN=hidden,
        BLOCK=block,
        ADD=residual is not None,
        # Two loads of 16 bytes per thread in 16-bit dtypes.
        num_warps=min(max(block // 512, 1), 16),
        # On sm_90 the compiler else spills two registers of 40 to fit a third program in.
        maxnreg=64 if block >= hidden else 128,
    )


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """See `ops.rms_norm`."""
    kind = *kind_of(x), *kind_of(weight), eps
    launch = _KINDS.get(kind) or _KINDS.keep(kind, _settle(x, None, weight, eps))
    normed = torch.empty_like(x, memory_format=torch.contiguous_format)
    if normed.numel():
        launch(normed, normed, x, x, weight)
    return normed


def add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """See `ops.add_rms_norm`."""
    kind = *kind_of(x), *kind_of(weight), *kind_of(residual), eps
    launch = _KINDS.get(kind) or _KINDS.keep(kind, _settle(x, residual, weight, eps))
    normed = torch.empty_like(x, memory_format=torch.contiguous_format)
    summed = torch.empty_like(normed)
    if normed.numel():
        launch(normed, summed, x, residual, weight)
    return normed, summed
