"""What the benchmarks share: pairs in turn, percentiles, the machine's own ceilings, the closing JSON document."""

import json
import platform
import shutil
import statistics
import subprocess
import time
from collections.abc import Callable, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

REPOSITORY = Path(__file__).resolve().parent.parent


def timed(function: Callable[[], object]) -> float:
    """Seconds that one call takes."""
    start = time.perf_counter()
    function()
    return time.perf_counter() - start


def in_turn(
    ours: Callable[[], object], theirs: Callable[[], object], rounds: int, calls: int = 1
) -> tuple[list[float], list[float]]:
    """Seconds of A B A B ..., after one of each that does not count: both see the same weather.

    What follows itself in practice is timed over several `calls` in a row, per call: its caches are its own then.
    """

    def seconds(function: Callable[[], object]) -> float:
        return timed(lambda: [function() for _ in range(calls)]) / calls

    ours()
    theirs()
    pairs = [(seconds(ours), seconds(theirs)) for _ in range(rounds)]
    return [pair[0] for pair in pairs], [pair[1] for pair in pairs]


def summary(values: Sequence[float]) -> dict[str, float | int]:
    tenths = statistics.quantiles(values, n=10, method="inclusive") if len(values) > 1 else [values[0]] * 9
    return {"median": statistics.median(values), "p10": tenths[0], "p90": tenths[-1], "n": len(values)}


def ratio(theirs: Sequence[float], ours: Sequence[float]) -> float:
    """How many times faster we are: the median over pairs that ran side by side."""
    return statistics.median(b / a for a, b in zip(ours, theirs, strict=True))


def read_bandwidth() -> float:
    """Bytes per second that all threads together read from memory: the best of several sums over half a gigabyte."""
    data = torch.zeros(1 << 27)
    data.sum()
    return data.numel() * data.itemsize / min(timed(data.sum) for _ in range(7))


def machine() -> dict[str, Any]:
    model = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        names = [line.split(":", 1)[1].strip() for line in cpuinfo.read_text().splitlines() if "model name" in line]
        model = f"{names[0]} x {len(names)}" if names else model
    return {
        "cpu": model,
        "capability": torch.backends.cpu.get_cpu_capability(),
        "threads": torch.get_num_threads(),
        "bf16_matmul": torch.ops.mkldnn._is_mkldnn_bf16_supported(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
    }


def commit() -> str:
    """Of the working tree, with a + where it differs from that commit; empty where there is no git."""
    if shutil.which("git") is None:
        return ""

    def git(*arguments: str) -> str:
        run = subprocess.run(["git", *arguments], cwd=REPOSITORY, capture_output=True, text=True, check=False)
        return run.stdout.strip()

    return git("rev-parse", "--short", "HEAD") + ("+" if git("status", "--porcelain", "llama", "kernels") else "")


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def close(name: str, **document: Any) -> None:
    """Print the last line."""
    versions = {package: _version(package) for package in ("torch", "triton", "transformers", "numpy")}
    versions["python"] = platform.python_version()
    print(json.dumps({"name": name, "machine": machine(), **document, "versions": versions, "commit": commit()}))
