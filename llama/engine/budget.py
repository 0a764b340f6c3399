"""How memory is shared out: KV cache, adapters, and what must be left for everything else. Runs without torch.

On the CPU, of what is free when the engine starts, caches of a fixed size come first: compiled grammars
(llama/text/grammar), kernels by shape (llama/model/weights/packed.py). Of the rest cpu_memory_utilization goes to the
KV cache, whose pages cost nothing until they are written, and a quarter of that to adapters; activations, the page
cache and everybody else have what remains. On CUDA what steps take is measured (memory.py), and graphs have a share
(graphs.py).
"""

from pathlib import Path

from llama.engine.config import CPU_FRACTION, EngineConfig

CACHES_BYTES = 2**29
_GROUP = Path("/sys/fs/cgroup")


def free_cpu_bytes() -> int:
    """Memory that can be had without swapping, within the limit of the control group."""
    values = {}
    for line in Path("/proc/meminfo").read_text().splitlines():
        name, _, rest = line.partition(":")
        values[name] = rest
    free = int(values["MemAvailable"].split()[0]) * 1024
    try:
        limit, used = ((_GROUP / name).read_text().strip() for name in ("memory.max", "memory.current"))
    except OSError:
        return free
    return free if limit == "max" else min(free, max(0, int(limit) - int(used)))


def threads_of_each(processes: int, threads: int) -> int:
    """Of processes that compute at once, where one alone would have so many: PyTorch counts the machine's cores, and
    the control group may let fewer run."""
    try:
        quota, period = (_GROUP / "cpu.max").read_text().split()
        threads = min(threads, int(quota) // int(period))
    except (OSError, ValueError):  # "max"
        pass
    return max(1, threads // processes)


def usable_cpu_bytes(free: int) -> int:
    """Without what caches of a fixed size may take; of little memory they are not left more than a quarter."""
    return free - min(CACHES_BYTES, free // 4)


def kv_bytes_on_cpu(free: int, share: float = CPU_FRACTION) -> int:
    """For the KV cache, of so much free memory."""
    return int(usable_cpu_bytes(free) * share)


def lora_bytes(config: EngineConfig, free: int) -> int:
    """For the adapters that are loaded, in this process's memory."""
    return config.max_lora_bytes or int(usable_cpu_bytes(free) * config.cpu_memory_utilization / 4)


def blocks_in(budget: int, bytes_per_block: int, config: EngineConfig) -> int:
    """KV blocks that fit, but no more than all sequences together can fill."""
    return min(budget // bytes_per_block, config.max_num_seqs * config.blocks_per_sequence)
