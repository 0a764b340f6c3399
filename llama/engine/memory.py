"""How many KV blocks fit into the memory that is really free."""

import logging
from pathlib import Path

import torch

from llama.model.config import ModelConfig
from llama.model.kv_cache import KVCache

logger = logging.getLogger(__name__)

# Of the free RAM when the engine starts. The rest is for activations, the page cache and everybody else; pages of the
# cache that were never written cost nothing.
CPU_FRACTION = 0.4


def free_cpu_bytes() -> int:
    """Memory that can be had without swapping, within the limit of the control group."""
    values = {}
    for line in Path("/proc/meminfo").read_text().splitlines():
        name, _, rest = line.partition(":")
        values[name] = rest
    free = int(values["MemAvailable"].split()[0]) * 1024
    group = Path("/sys/fs/cgroup")
    try:
        limit, used = ((group / name).read_text().strip() for name in ("memory.max", "memory.current"))
    except OSError:
        return free
    return free if limit == "max" else min(free, max(0, int(limit) - int(used)))


def free_cuda_bytes(device: torch.device, utilization: float) -> int:
    """What `utilization` of the device leaves beside all that is allocated now."""
    free, total = torch.cuda.mem_get_info(device)
    return int(total * utilization) - (total - free)


def fitting_blocks(
    config: ModelConfig,
    *,
    block_size: int,
    dtype: torch.dtype,
    device: torch.device,
    gpu_memory_utilization: float,
    most: int,
) -> int:
    """Blocks that fit, `most` at most: more than all sequences together can fill are of no use. MemoryError if none."""
    if device.type == "cuda":
        free, share = free_cuda_bytes(device, gpu_memory_utilization), f"{gpu_memory_utilization:.0%} of the device"
    else:
        free, share = int(free_cpu_bytes() * CPU_FRACTION), f"{CPU_FRACTION:.0%} of the free memory"
    per_block = KVCache.bytes_per_block(config, block_size, dtype)
    blocks = min(free // per_block, most)
    if blocks < 1:
        raise MemoryError(f"one KV block takes {per_block} bytes, but only {max(0, free)} are free ({share})")
    logger.info(
        "KV cache: %d blocks of %d tokens, %.2f GiB (%s would hold %d)",
        blocks,
        block_size,
        blocks * per_block / 2**30,
        share,
        free // per_block,
    )
    return blocks
