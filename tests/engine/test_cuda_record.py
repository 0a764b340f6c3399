"""CudaRecord over a stand-in for PyTorch's allocator, which refuses a pool whose last graph is gone."""

import weakref
from contextlib import contextmanager, nullcontext

import pytest
import torch

from llama.engine.graphs import CudaRecord, Graphs


class Pools:
    """How many graphs use each pool; their memory may outlive them, as that of cuBLAS's workspaces does."""

    def __init__(self):
        self.num_handles = 0
        self.uses = {}

    def handle(self):
        self.num_handles += 1
        return (self.num_handles, 0)

    def _release(self, pool):
        self.uses[pool] -= 1

    @contextmanager
    def capture(self, graph, *, pool, **options):
        # c10/cuda/CUDACachingAllocator.cpp, create_or_incref_pool
        assert self.uses.get(pool) != 0, "use_count > 0 INTERNAL ASSERT FAILED"
        self.uses[pool] = self.uses.get(pool, 0) + 1
        weakref.finalize(graph, self._release, pool)
        yield


class Graph:
    def replay(self):
        pass


@pytest.fixture
def pools(monkeypatch):
    pools = Pools()
    monkeypatch.setattr(torch.cuda, "Stream", lambda device: None)
    monkeypatch.setattr(torch.cuda, "device", lambda device: nullcontext())
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (0, 0))
    monkeypatch.setattr(torch.cuda, "CUDAGraph", Graph)
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", pools.handle)
    monkeypatch.setattr(torch.cuda, "graph", pools.capture)
    return pools


def run_twice(graphs, key):
    for _ in range(2):  # the second time it is recorded
        assert graphs.run(key, lambda: key) == key


def test_steps_are_recorded_anew_when_all_graphs_have_been_dropped(pools):
    graphs = Graphs(CudaRecord(torch.device("cpu")))
    for _ in range(3):
        run_twice(graphs, "a")
        run_twice(graphs, "b")
        assert sorted(pools.uses.values())[-1:] == [2] and len(graphs) == 2  # of one pool
        graphs.forget(lambda key: True)
        assert not any(pools.uses.values())


def test_a_pool_stays_as_long_as_one_of_its_graphs(pools):
    graphs = Graphs(CudaRecord(torch.device("cpu")))
    run_twice(graphs, "a")
    for key in "bcd":
        run_twice(graphs, key)
        graphs.forget(lambda name: name != "a")
    assert list(pools.uses.values()) == [1]
