"""rope_and_store in the interpreter against the CPU's: rotations may be fused there, copies are exact."""

import pytest
import torch

from llama.kernels import ops
from llama.kernels.cpu import rope as cpu_rope
from llama.kernels.gpu import rope
from llama.kernels.types import KVLayer
from tests.paged_attention import only_slots, rotation

# One rounding may fall the other way.
TOLERANCES = {torch.float32: 1e-6, torch.float16: 2e-3}


def make(tokens=5, heads=4, kv_heads=2, head_dim=64, block_size=4, dtype=torch.float32, seed=0):
    """Arguments over a fused qkv, and NaN caches; the slots are scattered, one of them -1."""
    generator = torch.Generator().manual_seed(seed)
    qkv = torch.randn(tokens, heads + 2 * kv_heads, head_dim, generator=generator).to(dtype)
    angles = torch.rand(tokens, head_dim // 2, generator=generator) * 6
    blocks = tokens // block_size + 2
    slots = torch.randperm(blocks * block_size, generator=generator)[:tokens]
    slots[tokens // 2] = -1
    caches = [torch.full((blocks, block_size, kv_heads, head_dim), torch.nan, dtype=dtype) for _ in range(2)]
    q, k, v = qkv.split([heads, kv_heads, kv_heads], dim=1)
    return q, k, v, rotation(angles), KVLayer(*caches), only_slots(slots, block_size)


def same(actual, expected):
    return torch.equal(actual.nan_to_num(nan=77.0), expected.nan_to_num(nan=77.0))


def cloned(kv_layer):
    return KVLayer(kv_layer.k.clone(), kv_layer.v.clone())


def check(arguments):
    *inputs, kv_layer, ragged = arguments
    tensors = (*inputs[:3], *inputs[3], ragged.slots)
    before = [tensor.clone() for tensor in tensors]
    cpu_layer = cloned(kv_layer)
    out = rope.rope_and_store(*inputs, kv_layer, ragged)
    expected = cpu_rope.rope_and_store(*inputs, cpu_layer, ragged)
    assert out.is_contiguous()
    tolerance = TOLERANCES[out.dtype]
    torch.testing.assert_close(out, expected, rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(kv_layer.k, cpu_layer.k, rtol=tolerance, atol=tolerance, equal_nan=True)
    assert same(kv_layer.v, cpu_layer.v)
    assert all(torch.equal(tensor, old) for tensor, old in zip(tensors, before, strict=True))


@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
@pytest.mark.parametrize(
    ("heads", "kv_heads", "head_dim"), [(1, 1, 2), (3, 1, 16), (9, 3, 64), (5, 5, 80), (32, 8, 128), (6, 2, 256)]
)
def test_equals_the_cpus(heads, kv_heads, head_dim, dtype):
    check(make(3, heads, kv_heads, head_dim, dtype=dtype))


@pytest.mark.parametrize("block_size", [1, 2, 16, 128])
def test_block_sizes(block_size):
    check(make(block_size=block_size))


def test_no_tokens():
    q, k, v, (cos, sin), kv_layer, ragged = make()
    out = rope.rope_and_store(q[:0], k[:0], v[:0], (cos[:0], sin[:0]), kv_layer, only_slots(ragged.slots[:0], 4))
    assert out.shape == (0, 4, 64) and kv_layer.k.isnan().all() and kv_layer.v.isnan().all()


def test_stores_nothing_of_padding():
    *inputs, kv_layer, ragged = make()
    rope.rope_and_store(*inputs, kv_layer, only_slots(torch.full_like(ragged.slots, -1), 4))
    assert kv_layer.k.isnan().all() and kv_layer.v.isnan().all()


def test_slot_beyond_2_to_the_31_elements():
    """By strides alone: blocks lie 2^30 elements apart, and only the pages of the slots in use are touched."""
    *inputs, _, _ = make(tokens=2, block_size=4, dtype=torch.float16)
    storage = torch.empty((2 << 30) + (2 << 20), dtype=torch.float16)
    caches = [storage.as_strided((3, 4, 2, 64), (1 << 30, 128, 64, 1), offset) for offset in (0, 1 << 20)]
    for cache in caches:
        cache.fill_(torch.nan)
    ragged = only_slots(torch.tensor([11, 1]), 4)
    small = [torch.full((3, 4, 2, 64), torch.nan, dtype=torch.float16) for _ in range(2)]
    rope.rope_and_store(*inputs, KVLayer(*caches), ragged)
    rope.rope_and_store(*inputs, KVLayer(*small), ragged)
    assert all(same(cache, expected) for cache, expected in zip(caches, small, strict=True))


def test_public_op_takes_the_kernel():
    *inputs, kv_layer, ragged = make()
    other = cloned(kv_layer)
    assert torch.equal(ops.rope_and_store(*inputs, kv_layer, ragged), rope.rope_and_store(*inputs, other, ragged))
    assert same(kv_layer.v, other.v)
    assert "cpu_layout" not in vars(ragged)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64], ids=str)
def test_refuses_what_the_interpreter_cannot(dtype):
    with pytest.raises(ValueError, match=str(dtype)):
        rope.rope_and_store(*make(dtype=dtype))


@pytest.mark.parametrize("factor", [1.0, 1.3])
@pytest.mark.parametrize("head_dim", [2, 80, 128])
def test_cosines_and_sines(head_dim, factor):
    positions = torch.tensor([0, 1, 77, 8191, 131_071, 1_000_003])
    inverse = 10_000.0 ** -(torch.arange(0, head_dim, 2) / head_dim)
    frequencies = torch.cat((-inverse, inverse))
    actual = ops.cos_sin(positions, frequencies, factor)
    for ours, expected in zip(actual, cpu_rope.cos_sin(positions, frequencies, factor), strict=True):
        assert ours.shape == (6, 1, head_dim)
        torch.testing.assert_close(ours, expected, rtol=0, atol=2.5e-7)
    assert ops.cos_sin(positions[:0], frequencies)[0].shape == (0, 1, head_dim)
