"""Graphs: functions that are recorded once and replayed, by key. What is recorded never changes: addresses, shapes,
Python values. What changes from call to call must lie in tensors that do not move.

A key's function runs as it is the first time: that makes its kernels ready, which a recording may not do, and a shape
that never comes again costs no graph. The second time it is recorded, from then on replayed. Of graphs that take more
than their share of the memory, those used least lately are dropped. Nothing here knows what the functions do.
"""

import logging
import time
from collections import OrderedDict
from collections.abc import Callable, Hashable
from typing import Any, NamedTuple, Protocol, TypeVar
from weakref import WeakSet

import torch

logger = logging.getLogger(__name__)

T = TypeVar("T")

GRAPH_BYTES = 2**29  # of the device, for all graphs; num_blocks leaves them free


class Record(Protocol):
    """Records what a function would do, without doing it -> what does it, on what the tensors hold by then."""

    def __call__(self, function: Callable[[], T]) -> Callable[[], T]: ...

    def used_bytes(self) -> int:
        """Of the device, by everybody: what a record takes is what this grows by."""
        ...


class Graph(NamedTuple):
    replay: Callable[[], Any]
    nbytes: int


class CudaRecord:
    """CUDA graphs. They share one pool of memory, as only one of them runs at a time: what a graph leaves in memory of
    its own lasts until another one is replayed."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream = torch.cuda.Stream(device)
        self._recorded: WeakSet[torch.cuda.CUDAGraph] = WeakSet()

    def __call__(self, function: Callable[[], T]) -> Callable[[], T]:
        if not self._recorded:  # a pool takes no graph any more once its last one is gone
            self._pool = torch.cuda.graph_pool_handle()
        graph = torch.cuda.CUDAGraph()
        # Other threads may go on using the device while this one records.
        recording = torch.cuda.graph(graph, pool=self._pool, stream=self._stream, capture_error_mode="thread_local")
        with torch.cuda.device(self._device), recording:
            result = function()
        self._recorded.add(graph)

        def replay() -> T:
            graph.replay()
            return result

        return replay

    def used_bytes(self) -> int:
        free, total = torch.cuda.mem_get_info(self._device)
        return total - free


def bucket_of(count: int) -> int:
    """`count` rounded up to a size that has a graph: four sizes per power of two, and at most a fifth is padding."""
    granularity = 1 << max(0, (count - 1).bit_length() - 3)
    return -(-count // granularity) * granularity


class Graphs:
    def __init__(self, record: Record, max_bytes: int = GRAPH_BYTES) -> None:
        self._record = record
        self._max_bytes = max_bytes
        self._ready: set[Hashable] = set()  # their functions have run once
        self._graphs: OrderedDict[Hashable, Graph] = OrderedDict()  # least lately used first
        self._is_full = False

    def __len__(self) -> int:
        return len(self._graphs)

    @property
    def nbytes(self) -> int:
        """Memory of the device that the graphs took when they were recorded."""
        return sum(graph.nbytes for graph in list(self._graphs.values()))

    def run(self, key: Hashable, function: Callable[[], T], *, may_record: bool = True) -> T:
        """Do what `function` does. It must be the same for the same key, but for what tensors hold."""
        graph = self._graphs.get(key)
        if graph is not None:
            self._graphs.move_to_end(key)
        elif key in self._ready and may_record and not self._is_full:
            graph = self._try_record(key, function)
        if graph is not None:
            replayed: T = graph.replay()
            return replayed
        result = function()
        self._ready.add(key)
        return result

    def forget(self, is_stale: Callable[[Any], bool]) -> None:
        """Drop all keys that are stale: tensors that their graphs use have moved."""
        self._ready = {key for key in self._ready if not is_stale(key)}
        self._drop([key for key in self._graphs if is_stale(key)])

    def _drop(self, keys: list[Hashable]) -> None:
        if not keys:
            return
        if torch.cuda.is_initialized():
            torch.cuda.synchronize()  # one of them may be running
        for key in keys:
            del self._graphs[key]
        self._is_full = False

    def _try_record(self, key: Hashable, function: Callable[[], T]) -> Graph | None:
        """None if there is no memory for one more graph: those that exist are kept, all else runs as it is."""
        started, before = time.monotonic(), self._record.used_bytes()
        try:
            replay = self._record(function)
        except torch.OutOfMemoryError as error:
            self._is_full = True
            logger.warning("no memory for more than %d graphs: the others' steps run without (%s)", len(self), error)
            return None
        graph = self._graphs[key] = Graph(replay, max(0, self._record.used_bytes() - before))
        level = logging.INFO if len(self) == 1 else logging.DEBUG
        logger.log(level, "graph %d of %s recorded in %.3f s", len(self), key, time.monotonic() - started)
        self._make_room()
        return graph

    def _make_room(self) -> None:
        """The newest one stays, whatever it takes."""
        excess, dropped = self.nbytes - self._max_bytes, []
        for key, graph in list(self._graphs.items())[:-1]:
            if excess <= 0:
                break
            dropped.append(key)
            excess -= graph.nbytes
        self._drop(dropped)
