"""An e4m3 cache in the interpreter: the cast, the store and attention, against PyTorch's and against the CPU's ops."""

from dataclasses import replace

import pytest
import torch
import triton
import triton.language as tl

from llama.kernels import ops
from llama.kernels.cpu import attention as cpu_attention
from llama.kernels.cpu import rope as cpu_rope
from llama.kernels.cpu.e4m3 import from_e4m3, to_e4m3
from llama.kernels.gpu.e4m3 import to_e4m3 as gpu_to_e4m3
from llama.kernels.types import KVLayer
from tests.paged_attention import make_problem, only_slots, rotation


@triton.jit
def _cast(out, x, SIZE: tl.constexpr):
    index = tl.arange(0, SIZE)
    tl.store(out + index, gpu_to_e4m3(tl.load(x + index)))


def test_the_cast_rounds_as_pytorchs():
    every = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).float()
    every = every[every.isfinite()].unique()
    between = (every[1:] + every[:-1]) / 2  # ties
    near = torch.cat([between.nextafter(between + side) for side in (-1, 1)])
    x = torch.cat(
        (every, between, near, torch.tensor([1e-30, -1e-30, 449.0, 1e9, -1e9, torch.inf, -torch.inf, torch.nan]))
    )
    x = torch.nn.functional.pad(x, (0, 2048 - len(x)))
    out = torch.empty(2048, dtype=torch.uint8)
    _cast[(1,)](out, x, SIZE=2048)
    expected = to_e4m3(x[:, None, None], torch.ones(1)).flatten()
    is_nan = x.isnan()
    assert torch.equal(out[~is_nan], expected[~is_nan]) and bool(from_e4m3(out[is_nan], torch.float32).isnan().all())


def scales(kv_heads):
    return torch.stack((torch.linspace(0.02, 0.05, kv_heads), torch.linspace(0.5, 0.01, kv_heads)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize(("heads", "kv_heads", "head_dim"), [(4, 2, 64), (9, 3, 80)])
def test_the_store(heads, kv_heads, head_dim, dtype):
    generator = torch.Generator().manual_seed(0)
    qkv = torch.randn(5, heads + 2 * kv_heads, head_dim, generator=generator).to(dtype)
    angles = torch.zeros(5, head_dim // 2)  # a rotation might fall on the other side of a tie
    parts = qkv.split([heads, kv_heads, kv_heads], dim=1)
    ragged = only_slots(torch.tensor([3, 9, -1, 0, 7]), 4)
    layers = [
        KVLayer(*torch.full((2, 3, 4, kv_heads, head_dim), 99, dtype=torch.uint8), scales(kv_heads)) for _ in "ab"
    ]
    ops.rope_and_store(*parts, rotation(angles), layers[0], ragged)
    cpu_rope.rope_and_store(*parts, rotation(angles), layers[1], ragged)
    assert torch.equal(layers[0].k, layers[1].k) and torch.equal(layers[0].v, layers[1].v)
    stored = from_e4m3(layers[0].v.flatten(0, 1)[9], torch.float32) * scales(kv_heads)[1, :, None]
    assert (
        (stored - parts[2][1].float()).abs() <= 0.0626 * parts[2][1].float().abs() + scales(kv_heads)[1].max() / 1024
    ).all()
    assert int((layers[0].k.flatten(0, 1) == 99).all(dim=(1, 2)).sum()) == 12 - 4


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("head_dim", [64, 80])
def test_attention(head_dim, dtype):
    problem = make_problem([1, 1, 1, 5, 40], [1, 37, 600, 5, 70], num_decodes=3, head_dim=head_dim, dtype=dtype)
    of_heads = scales(2)
    caches = [
        to_e4m3(cache.float(), scale)
        for cache, scale in zip((problem.kv_layer.k, problem.kv_layer.v), of_heads, strict=True)
    ]
    narrow = KVLayer(*caches, of_heads)
    widened = [
        (from_e4m3(cache, torch.float32) * scale[:, None]).to(torch.float32)
        for cache, scale in zip(caches, of_heads, strict=True)
    ]
    wide = replace(problem, q=problem.q.float(), kv_layer=KVLayer(*widened))
    expected = wide.run(cpu_attention.paged_attention)
    bound = {torch.float32: 2e-5, torch.float16: 4e-3}[dtype] * expected.abs().max()
    for attention in (ops.paged_attention, cpu_attention.paged_attention):
        actual = replace(problem, kv_layer=narrow).run(attention)
        assert actual.dtype == dtype and (actual.float() - expected).abs().max() <= bound
