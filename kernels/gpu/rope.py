"""Cosines and sines of positions; the rotary embedding of q and k fused with the write of k and v into the paged cache.

    x'[i] = x[i] cos[i] - x[i + D/2] sin[i],   x'[i + D/2] = x[i + D/2] cos[i] + x[i] sin[i]   (half-split pairs)

in float32, rounded once. One launch instead of four (rotate q, rotate k, store k, store v): per token it reads
(heads + 2 kv_heads) D elements and D floats, and writes (heads + 2 kv_heads) D elements. A program takes one token and
a few heads of q, k or v. Slots are 64-bit: a cache may have more than 2^31 elements.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from llama.kernels.checks import check_rope_and_store, check_tensors, require
from llama.kernels.gpu.chain import launch_options, take_turn
from llama.kernels.gpu.e4m3 import to_e4m3
from llama.kernels.gpu.launch import Kinds, Launch, Launcher, cdiv, next_power_of_2
from llama.kernels.types import CosSin, KVLayer, Ragged, kind_of


@triton.jit(do_not_specialize_on_alignment=["positions"])
def _cos_sin_kernel(cos, sin, positions, frequencies, factor, HEAD_DIM: tl.constexpr, DIMS: tl.constexpr):
    token = tl.program_id(0).to(tl.int64)
    dims = tl.arange(0, DIMS)
    mask = dims < HEAD_DIM
    angles = tl.load(positions + token).to(tl.float32) * tl.load(frequencies + dims, mask=mask, other=0.0)
    tl.store(cos + token * HEAD_DIM + dims, tl.cos(angles) * factor, mask=mask)
    tl.store(sin + token * HEAD_DIM + dims, tl.sin(angles) * factor, mask=mask)


@triton.jit
def _rotated(source, cos, sin, dims, mask, HALF_DIM: tl.constexpr):
    """Both halves of the rotated rows at `source`, in float32."""
    # Every head loads them (from the cache) in the layout of its own values: nothing is exchanged between threads.
    cosines = tl.load(tl.broadcast_to(cos + dims, mask.shape), mask=mask)
    sines = tl.load(tl.broadcast_to(sin + HALF_DIM + dims, mask.shape), mask=mask)
    first = tl.load(source, mask=mask).to(tl.float32)
    second = tl.load(source + HALF_DIM, mask=mask).to(tl.float32)
    return first * cosines - second * sines, second * cosines + first * sines


@triton.jit
def _store_halves(target, first, second, mask, HALF_DIM: tl.constexpr):
    if target.dtype.element_ty == tl.uint8:
        tl.store(target, to_e4m3(first), mask=mask)
        tl.store(target + HALF_DIM, to_e4m3(second), mask=mask)
    else:
        tl.store(target, first.to(target.dtype.element_ty), mask=mask)
        tl.store(target + HALF_DIM, second.to(target.dtype.element_ty), mask=mask)


@triton.jit
def _in_steps(first, second, scales, mask, ROUNDED: tl.constexpr):
    """Divided by a head's scale; rounded first to what a cache in the model's dtype would hold."""
    scale = tl.load(tl.broadcast_to(scales, mask.shape), mask=mask, other=1.0)
    first, second = first.to(ROUNDED).to(tl.float32), second.to(ROUNDED).to(tl.float32)
    return tl.div_rn(first, scale), tl.div_rn(second, scale)


@triton.jit
def rotated_rows(source, rotation, token, mask, HEAD_DIM: tl.constexpr, DIMS: tl.constexpr):
    """Rows of a token at `source`, rotated as the kernel below does; `rotation` begins with cos and sin."""
    HALF_DIM: tl.constexpr = HEAD_DIM // 2
    dims = tl.arange(0, DIMS)[None, :]
    angle = token.to(tl.int64) * HEAD_DIM + dims % HALF_DIM
    in_row = dims < HEAD_DIM
    cosines = tl.load(rotation[0] + angle, mask=in_row, other=0.0)
    sines = tl.load(rotation[1] + HALF_DIM + angle, mask=in_row, other=0.0)
    own = tl.load(source + dims, mask=mask, other=0.0).to(tl.float32)
    other = tl.load(source + (dims + HALF_DIM) % HEAD_DIM, mask=mask, other=0.0).to(tl.float32)
    return (own * cosines + other * tl.where(dims < HALF_DIM, -sines, sines)).to(source.dtype.element_ty)


@triton.jit
def store_own(k_target, v_target, k, v, rotation, token, HEAD_DIM: tl.constexpr, DIMS: tl.constexpr):
    """One head's k, rotated, and v of a token into a cache of their dtype."""
    dims = tl.arange(0, DIMS)[None, :]
    mask = dims < HEAD_DIM
    tl.store(k_target + dims, rotated_rows(k, rotation, token, mask, HEAD_DIM, DIMS), mask=mask)
    tl.store(v_target + dims, tl.load(v + dims, mask=mask), mask=mask)


@triton.jit(do_not_specialize_on_alignment=["slots"])
def _rope_and_store_kernel(
    out,
    q,
    k,
    v,
    cos,  # [tokens, HEAD_DIM], of which the first half is read
    sin,  # the second half: the first has the other sign
    slots,
    k_cache,
    v_cache,
    kv_scales,  # [2, KV_HEADS] float32, where the caches are e4m3
    q_token_stride,
    q_head_stride,
    k_token_stride,
    k_head_stride,
    v_token_stride,
    v_head_stride,
    cache_block_stride,
    cache_slot_stride,
    cache_head_stride,
    HEADS: tl.constexpr,
    KV_HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    HEADS_PER_PROGRAM: tl.constexpr,
    HALF: tl.constexpr,  # HALF_DIM rounded up to a power of two
    HAS_SCALES: tl.constexpr,
    EARLY: tl.constexpr,
):
    if EARLY:
        take_turn()
    HALF_DIM: tl.constexpr = HEAD_DIM // 2
    Q_PARTS: tl.constexpr = (HEADS + HEADS_PER_PROGRAM - 1) // HEADS_PER_PROGRAM
    KV_PARTS: tl.constexpr = (KV_HEADS + HEADS_PER_PROGRAM - 1) // HEADS_PER_PROGRAM
    token = tl.program_id(0).to(tl.int64)
    part = tl.program_id(1)  # parts of q, then of k, then of v
    dims = tl.arange(0, HALF)[None, :]
    heads = tl.arange(0, HEADS_PER_PROGRAM)[:, None]
    cos += token * HEAD_DIM
    sin += token * HEAD_DIM

    if part < Q_PARTS:
        heads += part * HEADS_PER_PROGRAM
        mask = (heads < HEADS) & (dims < HALF_DIM)
        source = q + token * q_token_stride + heads * q_head_stride + dims
        first, second = _rotated(source, cos, sin, dims, mask, HALF_DIM)
        _store_halves(out + (token * HEADS + heads) * HEAD_DIM + dims, first, second, mask, HALF_DIM)
    else:
        slot = tl.load(slots + token)  # needed for the stores alone: the loads do not wait for it
        heads += (part - Q_PARTS) % KV_PARTS * HEADS_PER_PROGRAM
        mask = (heads < KV_HEADS) & (dims < HALF_DIM)
        place = slot // BLOCK_SIZE * cache_block_stride + slot % BLOCK_SIZE * cache_slot_stride
        place += heads * cache_head_stride + dims
        if part < Q_PARTS + KV_PARTS:
            source = k + token * k_token_stride + heads * k_head_stride + dims
            first, second = _rotated(source, cos, sin, dims, mask, HALF_DIM)
            if HAS_SCALES:
                first, second = _in_steps(first, second, kv_scales + heads, mask, k.dtype.element_ty)
            if slot >= 0:
                _store_halves(k_cache + place, first, second, mask, HALF_DIM)
        else:
            source = v + token * v_token_stride + heads * v_head_stride + dims
            first = tl.load(source, mask=mask).to(tl.float32)
            second = tl.load(source + HALF_DIM, mask=mask).to(tl.float32)
            if HAS_SCALES:
                first, second = _in_steps(first, second, kv_scales + KV_HEADS + heads, mask, v.dtype.element_ty)
            if slot >= 0:
                _store_halves(v_cache + place, first, second, mask, HALF_DIM)


_launch_cos_sin = Launcher(_cos_sin_kernel)
_launch_rope_and_store = Launcher(_rope_and_store_kernel)
_KINDS: Kinds[Launch] = Kinds()


def cos_sin(positions: Tensor, frequencies: Tensor, factor: float = 1.0) -> CosSin:
    """See `ops.cos_sin`."""
    check_tensors("cos_sin", positions=positions, frequencies=frequencies)
    tokens, head_dim = len(positions), len(frequencies)
    cos, sin = (torch.empty((tokens, 1, head_dim), device=positions.device) for _ in range(2))
    if tokens > 0:
        sizes = {"HEAD_DIM": head_dim, "DIMS": next_power_of_2(head_dim), "num_warps": 1}
        _launch_cos_sin((tokens,), cos, sin, positions, frequencies, float(factor), **sizes)
    return cos, sin


def _settle(
    q: Tensor, k: Tensor, v: Tensor, cos_sin: CosSin, kv_layer: KVLayer, ragged: Ragged, *, is_early: bool
) -> Launch:
    check_rope_and_store(q, k, v, cos_sin, kv_layer, ragged)
    k_cache, (cos, sin) = kv_layer.k, cos_sin
    check_tensors("rope_and_store", q=q, k=k, v=v, cos=cos, sin=sin, slots=ragged.slots, cache=k_cache)
    if q.shape[2] % 2:
        raise ValueError(f"rope_and_store: head_dim must be even, got {q.shape[2]}")
    require(cos.is_contiguous() and sin.is_contiguous(), "rope_and_store: cos and sin must be contiguous")
    tokens, heads, head_dim = q.shape
    kv_heads, block_size = k.shape[1], k_cache.shape[1]
    half = next_power_of_2(head_dim // 2)
    # Two warps with 16 bytes per thread and half: 512 elements of 16 bits.
    heads_per_program = max(1, 64 * 16 // (half * q.element_size()))
    parts = cdiv(heads, heads_per_program) + 2 * cdiv(kv_heads, heads_per_program)
    early = launch_options(q.device, is_early)
    return Launch(
        _launch_rope_and_store,
        (tokens, parts),
        (*q.stride()[:2], *k.stride()[:2], *v.stride()[:2], *k_cache.stride()[:3]),
        HEADS=heads,
        KV_HEADS=kv_heads,
        HEAD_DIM=head_dim,
        BLOCK_SIZE=block_size,
        HEADS_PER_PROGRAM=heads_per_program,
        HALF=half,
        HAS_SCALES=kv_layer.scales is not None,
        EARLY=bool(early),
        num_warps=2,
        **early,
    )


def rope_and_store(q: Tensor, k: Tensor, v: Tensor, cos_sin: CosSin, kv_layer: KVLayer, ragged: Ragged) -> Tensor:
    """See `ops.rope_and_store`."""
    return rotate_and_store(q, k, v, cos_sin, kv_layer, ragged, is_early=False)


def rotate_and_store(
    q: Tensor, k: Tensor, v: Tensor, cos_sin: CosSin, kv_layer: KVLayer, ragged: Ragged, *, is_early: bool
) -> Tensor:
    """`rope_and_store`, launched before the kernel in front has ended if `is_early`."""
    cos, sin = cos_sin
    kind = *kind_of(q), *kind_of(k), *kind_of(v), *kind_of(cos), *kind_of(sin), kv_layer.kind, ragged.kind, is_early
    launch = _KINDS.get(kind)
    if launch is None:
        launch = _KINDS.keep(kind, _settle(q, k, v, cos_sin, kv_layer, ragged, is_early=is_early))
    out = torch.empty_like(q, memory_format=torch.contiguous_format)
    if out.numel():
        k_cache = kv_layer.k
        scales = k_cache if kv_layer.scales is None else kv_layer.scales
        launch(out, q, k, v, cos, sin, ragged.slots, k_cache, kv_layer.v, scales)
    return out
