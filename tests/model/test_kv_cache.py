"""KVCache: shapes, what a block costs, and copies of blocks."""

import pytest
import torch

from llama.model.config import ModelConfig
from llama.model.kv_cache import KVCache
from tests.model.models import tiny_config


@pytest.mark.parametrize(
    ("preset", "bytes_per_token"), [("llama-3.1-8b", 131_072), ("llama-3.1-70b", 327_680), ("llama-3.1-405b", 516_096)]
)
def test_bytes_per_block(preset, bytes_per_token):
    config = ModelConfig.preset(preset)
    assert KVCache.bytes_per_block(config, 1, torch.bfloat16) == bytes_per_token
    assert KVCache.bytes_per_block(config, 16, torch.float32) == 32 * bytes_per_token


def test_layers_are_apart():
    config = tiny_config(num_hidden_layers=3)
    kv = KVCache(config, 5, 4, dtype=torch.float64, device="cpu")
    caches = [cache for layer in kv.layers for cache in (layer.k, layer.v)]
    assert len(caches) == 6
    for number, cache in enumerate(caches):
        assert cache.shape == (5, 4, 2, 16)
        assert cache.is_contiguous()
        cache.fill_(number)
    assert [float(cache.mean()) for cache in caches] == [0, 1, 2, 3, 4, 5]
    size = sum(cache.numel() * cache.itemsize for cache in caches)
    assert size == 5 * KVCache.bytes_per_block(config, 4, torch.float64)


def test_copies_read_before_they_write():
    kv = KVCache(tiny_config(), 5, 4, dtype=torch.float32, device="cpu")
    kv.data.copy_(torch.randn(kv.data.shape))
    before = kv.data.clone()
    kv.copy_blocks([(0, 1), (1, 2), (4, 0)])
    assert torch.equal(kv.data, before[:, :, [4, 0, 1, 3, 4]])
    kv.copy_blocks([])


@pytest.mark.parametrize("sizes", [(0, 4), (4, 0)])
def test_refuses_nothing(sizes):
    with pytest.raises(ValueError, match="must be at least 1, got"):
        KVCache(tiny_config(), *sizes, dtype=torch.float32, device="cpu")
