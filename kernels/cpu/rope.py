"""Rotary embedding of q and k and the write of k and v into the paged cache, in plain PyTorch."""

import torch
from torch import Tensor

from llama.kernels.cpu.e4m3 import to_e4m3
from llama.kernels.types import CosSin, KVLayer, Ragged


def cos_sin(positions: Tensor, frequencies: Tensor, factor: float = 1.0) -> CosSin:
    angles = positions.view(-1, 1, 1) * frequencies  # in float32, as integers beside floats are multiplied
    cos, sin = angles.cos(), angles.sin()
    return (cos, sin) if factor == 1.0 else (cos * factor, sin * factor)


def rope_and_store(q: Tensor, k: Tensor, v: Tensor, cos_sin: CosSin, kv_layer: KVLayer, ragged: Ragged) -> Tensor:
    x = _side_by_side(q, k)
    cos, sin = cos_sin
    rotated = (x * cos).addcmul_(x.roll(x.shape[2] // 2, -1), sin)  # float32, or float64 as x
    if rotated.dtype != q.dtype:
        rotated = rotated.to(q.dtype)
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


def _side_by_side(q: Tensor, k: Tensor) -> Tensor:
    """[tokens, heads + kv_heads, head_dim]; a view where both are parts of one product, as in the model."""
    (tokens, heads, size), strides = q.shape, q.stride()
    start = q.storage_offset()
    is_behind = k.storage_offset() == start + heads * strides[1] and k.stride() == strides
    if is_behind and k.untyped_storage()._cdata == q.untyped_storage()._cdata:
        return q.as_strided((tokens, heads + k.shape[1], size), strides, start)
    return torch.cat((q, k), dim=1)
