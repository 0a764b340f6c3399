"""Rotary embedding of q and k and the write of k and v into the paged cache, in plain PyTorch."""

import torch
from torch import Tensor

from llama.kernels.cpu.e4m3 import to_e4m3
from llama.kernels.types import CosSin, KVLayer, Ragged


def rope_and_store(q: Tensor, k: Tensor, v: Tensor, cos_sin: CosSin, kv_layer: KVLayer, ragged: Ragged) -> Tensor:
    x = torch.cat((q, k), dim=1)
    cos, sin = cos_sin
    rotated = (x * cos).addcmul_(x.roll(x.shape[2] // 2, -1), sin)  # float32, or float64 as x
    q, k = rotated.to(q.dtype).split_with_sizes((q.shape[1], k.shape[1]), dim=1)
    slots = ragged.slots
    if not ragged.cpu_layout.stores_all:
        stored = slots >= 0
        slots, k, v = slots[stored], k[stored], v[stored]
    if kv_layer.scales is not None:
        k, v = to_e4m3(k, kv_layer.scales[0]), to_e4m3(v, kv_layer.scales[1])
    kv_layer.k.flatten(0, 1).index_copy_(0, slots, k)
    kv_layer.v.flatten(0, 1).index_copy_(0, slots, v)
    return q
