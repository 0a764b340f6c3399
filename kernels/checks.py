"""What ops check: that shapes and dtypes fit together, and for Triton kernels what a launch takes for granted. And the
one device property that grids depend on."""

import os
from functools import cache

import torch
from torch import Tensor

from llama.kernels.types import CosSin, KVLayer, Ragged

_DTYPES = (torch.float32, torch.float16, torch.bfloat16)

# Programs of a persistent grid per "multiprocessor" where there is no GPU: few, as the interpreter runs them in turn.
_WITHOUT_GPU = 4

# Triton reads this once, when it is imported: a process is interpreted or it is not.
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"

_TAKEN = frozenset((torch.float32, torch.float16) if INTERPRETED else _DTYPES)


def require(condition: bool, message: str) -> None:
    if not condition:
        raise ValueError(message)


def check_tensors(op: str, **tensors: Tensor) -> None:
    """One device, floating dtypes that the kernels take, a contiguous last dimension; integers may have any dtype.

    The interpreter takes bfloat16 and float8 for integers of their width and silently computes garbage with them, so
    they are refused there.
    """
    device = next(iter(tensors.values())).device
    for name, tensor in tensors.items():  # before each launch: a sentence is made on failure alone
        if tensor.device != device:
            raise _refusal(op, name, tensor, f", but another tensor is on {device}")
        if tensor.stride(-1) != 1 and tensor.numel():
            raise _refusal(op, name, tensor, ": its last dimension must be contiguous")
        if tensor.dtype not in _TAKEN and tensor.is_floating_point():
            legal = "the kernels take float32, float16 and bfloat16"
            if INTERPRETED:
                legal = "Triton's interpreter is right for float32 and float16 alone"
            raise _refusal(op, name, tensor, f": {legal}")


def _refusal(op: str, name: str, tensor: Tensor, what: str) -> ValueError:
    return ValueError(f"{op}: {name} is {tensor.dtype} {tuple(tensor.shape)} on {tensor.device}{what}")


def refuse(op: str, **tensors: Tensor) -> ValueError:
    told = ", ".join(f"{name} {str(t.dtype)[6:]} {list(t.shape)}" for name, t in tensors.items())
    return ValueError(f"{op}: shapes or dtypes do not fit together: {told}")


def check_rms_norm(x: Tensor, weight: Tensor) -> None:
    if x.dim() != 2 or x.shape[1:] != weight.shape or x.dtype != weight.dtype:
        raise refuse("rms_norm", x=x, weight=weight)


def check_add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor) -> None:
    shape, dtype = x.shape, x.dtype
    fits = len(shape) == 2 and shape[1:] == weight.shape and shape == residual.shape
    if not fits or not dtype == residual.dtype == weight.dtype:
        raise refuse("add_rms_norm", x=x, residual=residual, weight=weight)


def check_rope_and_store(q: Tensor, k: Tensor, v: Tensor, cos_sin: CosSin, kv_layer: KVLayer, ragged: Ragged) -> None:
    tokens, _, head_dim = q.shape
    k_shape, cache, slots, (cos, sin) = k.shape, kv_layer.k, ragged.slots, cos_sin
    if k_shape != v.shape or k_shape[0] != tokens or k_shape[2] != head_dim or k_shape[1:] != cache.shape[2:]:
        raise refuse("rope_and_store", q=q, k=k, v=v, cache=cache)
    if slots.shape[0] != tokens or cos.shape != (tokens, 1, head_dim) or cos.shape != sin.shape:
        raise refuse("rope_and_store", q=q, cos=cos, sin=sin, slots=slots)
    if not cos.dtype == sin.dtype == torch.float32 or not (q.dtype == cache.dtype or kv_layer.scales is not None):
        raise refuse("rope_and_store", q=q, cos=cos, sin=sin, cache=cache)


def check_paged_attention(q: Tensor, kv_layer: KVLayer, ragged: Ragged) -> None:
    q_shape, cache = q.shape, kv_layer.k
    _, block_size, kv_heads, head_dim = cache.shape
    fits = q_shape[2] == head_dim and not q_shape[1] % kv_heads and block_size == ragged.block_size
    if not fits or not (q.dtype == cache.dtype or kv_layer.scales is not None):
        raise refuse("paged_attention", q=q, cache=cache)


def check_silu_mul(gate_up: Tensor) -> None:
    if gate_up.dim() != 2 or gate_up.shape[1] % 2:
        raise refuse("silu_mul", gate_up=gate_up)


@cache
def _multiprocessors(index: int) -> int:
    return torch.cuda.get_device_properties(index).multi_processor_count


def multiprocessor_count(device: torch.device) -> int:
    """Of a CUDA device; a small constant for any other, where only correctness counts."""
    if device.type != "cuda":
        return _WITHOUT_GPU
    return _multiprocessors(torch.cuda.current_device() if device.index is None else device.index)
