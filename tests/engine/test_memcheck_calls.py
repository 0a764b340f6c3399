"""What `make memcheck` asks of engines on a GPU is legal: the same calls over models on the CPU."""

import pytest

from tests.gpu import engines, test_memcheck_gpu


@pytest.fixture(autouse=True)
def on_the_cpu(monkeypatch):
    monkeypatch.setattr(engines, "DEVICE", "cpu")


def test_every_way_of_sampling():
    test_memcheck_gpu.test_every_way_of_sampling(4)


def test_shapes_of_real_models():
    test_memcheck_gpu.test_shapes_of_real_models()


def test_adapters(tmp_path):
    test_memcheck_gpu.test_adapters(tmp_path)
