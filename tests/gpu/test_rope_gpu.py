"""rope_and_store on a GPU against float64, with budgets counted in roundings of the dtype."""

import pytest
import torch

from llama.kernels import ops
from llama.kernels.types import KVLayer
from tests.paged_attention import only_slots, rotation

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")]

DEVICE = "cuda"
# Relative to |x1 cos| + |x2 sin|, as cancellation may leave less: 16 bits are rounded once, float32 three times.
BUDGET = {torch.bfloat16: 1.1 * 2**-8, torch.float16: 1.1 * 2**-11, torch.float32: 3 * 2**-24}


def make(tokens, heads, kv_heads, head_dim, dtype, *, blocks, block_size=16, seed=0):
    generator = torch.Generator(DEVICE).manual_seed(seed)
    shape = (tokens, heads + 2 * kv_heads, head_dim)
    qkv = torch.randn(shape, generator=generator, device=DEVICE).to(dtype)
    angles = torch.rand(tokens, head_dim // 2, generator=generator, device=DEVICE) * 6
    caches = [torch.full((blocks, block_size, kv_heads, head_dim), torch.nan, dtype=dtype, device=DEVICE) for _ in "kv"]
    return *qkv.split([heads, kv_heads, kv_heads], dim=1), rotation(angles), KVLayer(*caches)


def is_rotation(actual, x, cos_sin):
    half = x.shape[2] // 2
    cos, sin = cos_sin[0][..., half:].double(), cos_sin[1][..., half:].double()
    first, second = x.double().chunk(2, dim=-1)
    expected = torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)
    size = torch.cat(((first * cos).abs() + (second * sin).abs(), (second * cos).abs() + (first * sin).abs()), dim=-1)
    # Below 2^-14 float16 is subnormal: its unit is absolute there.
    allowed = BUDGET[actual.dtype] * size.clamp_min(2**-14 if actual.dtype == torch.float16 else 0)
    return bool(((actual.double() - expected).abs() <= allowed).all())


@pytest.mark.parametrize("dtype", BUDGET, ids=str)
@pytest.mark.parametrize(
    ("heads", "kv_heads", "head_dim"), [(32, 8, 128), (64, 8, 128), (9, 3, 64), (5, 5, 80), (3, 1, 2), (8, 1, 256)]
)
@pytest.mark.parametrize("tokens", [1, 3, 1000])
def test_error_budget(tokens, heads, kv_heads, head_dim, dtype):
    q, k, v, cos_sin, kv_layer = make(tokens, heads, kv_heads, head_dim, dtype, blocks=tokens // 16 + 3)
    slots = torch.randperm(kv_layer.k.shape[0] * 16, device=DEVICE)[:tokens]
    out = ops.rope_and_store(q, k, v, cos_sin, kv_layer, only_slots(slots, 16))
    assert is_rotation(out, q, cos_sin)
    assert is_rotation(kv_layer.k.flatten(0, 1)[slots], k, cos_sin)
    assert torch.equal(kv_layer.v.flatten(0, 1)[slots], v)
    for cache in (kv_layer.k, kv_layer.v):  # nothing else was written
        untouched = torch.ones(cache.shape[0] * 16, dtype=torch.bool, device=DEVICE)
        untouched[slots] = False
        assert cache.flatten(0, 1)[untouched].isnan().all()


def test_padding_stores_nothing():
    q, k, v, cos_sin, kv_layer = make(8, 32, 8, 128, torch.bfloat16, blocks=2)
    slots = torch.full((8,), -1, device=DEVICE)
    assert is_rotation(ops.rope_and_store(q, k, v, cos_sin, kv_layer, only_slots(slots, 16)), q, cos_sin)
    assert kv_layer.k.isnan().all() and kv_layer.v.isnan().all()


@pytest.mark.alone
def test_cache_of_more_than_2_to_the_31_elements():
    blocks = (1 << 31) // (16 * 8 * 128) + 2
    q, k, v, cos_sin, kv_layer = make(4, 32, 8, 128, torch.bfloat16, blocks=blocks)
    slots = torch.tensor([blocks * 16 - 1, 0, blocks * 16 - 17, 5], device=DEVICE)
    ops.rope_and_store(q, k, v, cos_sin, kv_layer, only_slots(slots, 16))
    assert is_rotation(kv_layer.k.flatten(0, 1)[slots], k, cos_sin)
    assert torch.equal(kv_layer.v.flatten(0, 1)[slots], v)


def test_a_token_does_not_depend_on_its_batch():
    q, k, v, cos_sin, kv_layer = make(256, 32, 8, 128, torch.bfloat16, blocks=17)
    slots = torch.arange(256, device=DEVICE)
    together = ops.rope_and_store(q, k, v, cos_sin, kv_layer, only_slots(slots, 16))
    other = KVLayer(torch.full_like(kv_layer.k, torch.nan), torch.full_like(kv_layer.v, torch.nan))
    for token in (0, 100, 255):
        one = slice(token, token + 1)
        rotation_of_one = cos_sin[0][one], cos_sin[1][one]
        alone = ops.rope_and_store(q[one], k[one], v[one], rotation_of_one, other, only_slots(slots[one], 16))
        assert torch.equal(alone, together[one])
        assert torch.equal(kv_layer.k.flatten(0, 1)[token], other.k.flatten(0, 1)[token])
        assert torch.equal(kv_layer.v.flatten(0, 1)[token], other.v.flatten(0, 1)[token])


@pytest.mark.parametrize("head_dim", [64, 128])
def test_cosines_and_sines(head_dim):
    """Of angles as float32 has them, to two units of the last place of 1."""
    positions = torch.tensor([0, 1, 77, 8191, 131_071, 1_000_003], device=DEVICE)
    inverse = 500_000.0 ** -(torch.arange(0, head_dim, 2, device=DEVICE) / head_dim)
    frequencies = torch.cat((-inverse, inverse))
    angles = (positions.float()[:, None, None] * frequencies).double()
    cos, sin = ops.cos_sin(positions, frequencies, 1.0)
    assert (cos - angles.cos()).abs().max() <= 2**-23 and (sin - angles.sin()).abs().max() <= 2**-23
