"""Time ops on a device, peers in turn with ours, and the device's own ceilings.

On a GPU the calls of a candidate are captured in one graph, over several sets of inputs that together exceed the
second-level cache, and replays are timed by events: neither launch gaps nor a warm cache are in the numbers. On the CPU
calls are timed one by one; that is for dry runs.
"""

import time
from collections.abc import Callable
from typing import Any

import torch

from benchmarks.common import summary

Call = Callable[[], object]

# A replay lasts at least this long, so that an event's resolution does not matter.
LEAST_SECONDS = 5e-4
# Rounds stop here even if fewer than asked for were run.
MOST_SECONDS = 4.0


class Timer:
    def __init__(self, device: torch.device, rounds: int) -> None:
        self.device, self.rounds = device, rounds
        self.is_cuda = device.type == "cuda"
        self.cache_bytes = torch.cuda.get_device_properties(device).L2_cache_size if self.is_cuda else 0

    def num_sets(self, nbytes: int) -> int:
        """How many sets of inputs of a call that touches `nbytes` are needed to walk past the cache."""
        return min(64, -(-4 * self.cache_bytes // max(nbytes, 1))) if self.is_cuda else 1

    def measure(self, candidates: dict[str, list[Call]]) -> tuple[dict[str, list[float]], dict[str, str]]:
        """-> seconds per call of each candidate, in rounds that go through all of them; what could not run, and why."""
        replays: dict[str, tuple[Call, int]] = {}
        errors: dict[str, str] = {}
        for name, calls in candidates.items():
            try:
                replays[name] = self._capture(calls) if self.is_cuda else (calls[0], 1)
                replays[name][0]()
                self.wait()
            except Exception as error:  # a peer that this machine or build does not have
                if name == "ours":
                    raise
                replays.pop(name, None)
                errors[name] = f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error) else ''}"
        seconds: dict[str, list[float]] = {name: [] for name in replays}
        started = time.perf_counter()
        for _ in range(self.rounds):
            for name, (replay, count) in replays.items():
                seconds[name].append(self._time(replay) / count)
            if time.perf_counter() - started > MOST_SECONDS and len(seconds["ours"]) >= 3:
                break
        return seconds, errors

    def _capture(self, calls: list[Call]) -> tuple[Call, int]:
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for call in [*calls, calls[0]]:  # compiles, and lets libraries make their handles
                call()
        torch.cuda.synchronize()
        repeats = 1
        while True:
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                for _ in range(repeats):
                    for call in calls:
                        call()
            graph.replay()
            once = self._time(graph.replay)
            if once >= LEAST_SECONDS or repeats > 1:
                return graph.replay, repeats * len(calls)
            repeats = min(200, int(LEAST_SECONDS / max(once, 1e-6)) + 1)

    def _time(self, call: Call) -> float:
        if not self.is_cuda:
            start = time.perf_counter()
            call()
            return time.perf_counter() - start
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        call()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / 1e3

    def wait(self) -> None:
        if self.is_cuda:
            torch.cuda.synchronize()


def ceilings(timer: Timer, dtype: torch.dtype, *, tiny: bool) -> dict[str, Any]:
    """Bytes per second of a large copy, read and written, and operations per second of a large product."""
    size = 1 << (16 if tiny else 29)
    source = torch.randn(size, device=timer.device).to(dtype)
    target = torch.empty_like(source)
    copy, _ = timer.measure({"ours": [lambda: target.copy_(source)]})
    width = 128 if tiny else 8192
    a, b = (torch.randn(width, width, device=timer.device).to(dtype) for _ in range(2))
    product, _ = timer.measure({"ours": [lambda: a @ b]})
    return {
        "copy_bytes_per_second": 2 * source.nbytes / summary(copy["ours"])["median"],
        "matmul_flops_per_second": 2 * width**3 / summary(product["ours"])["median"],
    }
