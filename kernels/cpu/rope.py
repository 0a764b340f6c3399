"""Rotary embedding of q and k and the write of k and v into the paged cache, in plain PyTorch."""

import torch
from torch import Tensor

from llama.kernels.cpu.e4m3 import to_e4m3
from llama.kernels.types import CosSin, KVLayer, Ragged, wide_dtype

_PIECE = 1 << 19  # numbers that are rotated together, as in norm.py


def cos_sin(positions: Tensor, frequencies: Tensor, factor: float = 1.0) -> CosSin:
    angles = positions.view(-1, 1, 1) * frequencies  # in float32, as integers beside floats are multiplied
    cos, sin = angles.cos(), angles.sin()
    return (cos, sin) if factor == 1.0 else (cos * factor, sin * factor)


def rope_and_store(q: Tensor, k: Tensor, v: Tensor, cos_sin: CosSin, kv_layer: KVLayer, ragged: Ragged) -> Tensor:
    rotated = _rotated(_side_by_side(q, k), *cos_sin)
    q, k = rotated.split_with_sizes((q.shape[1], k.shape[1]), dim=1)
    slots = ragged.slots
    if not ragged.cpu_layout.stores_all:
        stored = slots >= 0
        slots, k, v = slots[stored], k[stored], v[stored]
    if kv_layer.scales is not None:
        k, v = to_e4m3(k, kv_layer.scales[0]), to_e4m3(v, kv_layer.scales[1])
    cached_k, cached_v = kv_layer.slots
    cached_k.index_copy_(0, slots, k)
    cached_v.index_copy_(0, slots, v)
    return q


def _rotated(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    tokens = max(1, _PIECE // (x.shape[1] * x.shape[2]))
    if x.shape[0] <= tokens:
        return _rotated_piece(x, cos, sin)
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    for start in range(0, x.shape[0], tokens):
        piece = slice(start, start + tokens)
        out[piece] = _rotated_piece(x[piece], cos[piece], sin[piece])
    return out


def _rotated_piece(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Computed in float32, or in float64 as x."""
    wide = x if x.dtype == wide_dtype(x.dtype) else x.to(torch.float32)
    turned = wide.roll(x.shape[2] // 2, -1)
    if wide is x:
        return (x * cos).addcmul_(turned, sin)
    return wide.mul_(cos).addcmul_(turned, sin).to(x.dtype)


def _side_by_side(q: Tensor, k: Tensor) -> Tensor:
    """[tokens, heads + kv_heads, head_dim]; a view where both are parts of one product, as in the model."""
    (tokens, heads, size), strides = q.shape, q.stride()
    start = q.storage_offset()
    is_behind = k.storage_offset() == start + heads * strides[1] and k.stride() == strides
    if is_behind and k.untyped_storage()._cdata == q.untyped_storage()._cdata:
        return q.as_strided((tokens, heads + k.shape[1], size), strides, start)
    return torch.cat((q, k), dim=1)
