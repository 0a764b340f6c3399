"""Kernels that begin before the one in front has ended (programmatic dependent launch, sm_90 on).

Such a kernel begins as soon as every program of the one in front has let it. Each program of each of them calls
`take_turn` once: before it leaves, before it reads what any kernel of the step wrote, and before it writes. As a kernel
ends after its own wait, all that was launched before has ended then, and so has what an ordinary kernel waits for.
"""

from functools import cache

import torch
import triton
import triton.language as tl
from triton.runtime.driver import driver


@triton.jit
def take_turn():
    """Wait for the kernel in front and let the next one begin: every program of every kernel that is launched early
    must, or what comes behind is not held back by what was before it."""
    tl.extra.cuda.gdc_wait()
    tl.extra.cuda.gdc_launch_dependents()


def launch_options(device: torch.device, is_early: bool) -> dict[str, bool]:
    """What a kernel that calls `take_turn` is launched with; empty where it is not early, or no device knows it."""
    return {"launch_pdl": True} if is_early and is_native(device) else {}


def is_native(device: torch.device) -> bool:
    """sm_90 on; without a GPU (meta tensors) the target that is compiled for, and never in the interpreter."""
    if device.type == "cuda":
        return _capability(torch.cuda.current_device() if device.index is None else device.index) >= (9, 0)
    return device.type == "meta" and driver.active.get_current_target().arch >= 90


@cache
def _capability(index: int) -> tuple[int, int]:
    return torch.cuda.get_device_capability(index)
