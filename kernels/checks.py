"""What every wrapper of a Triton kernel checks before a launch, and the one device property that grids depend on."""

import os
from functools import cache

import torch
from torch import Tensor

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


@cache
def _multiprocessors(index: int) -> int:
    return torch.cuda.get_device_properties(index).multi_processor_count


def multiprocessor_count(device: torch.device) -> int:
    """Of a CUDA device; a small constant for any other, where only correctness counts."""
    if device.type != "cuda":
        return _WITHOUT_GPU
    return _multiprocessors(torch.cuda.current_device() if device.index is None else device.index)
