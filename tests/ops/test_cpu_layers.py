"""Norm, rotary embedding and activation on a CPU, against formulas written out in float64."""

import pytest
import torch

from llama.kernels import ops
from llama.kernels.cpu import norm, rope
from llama.kernels.types import KVLayer
from tests.paged_attention import only_slots, rotation

TOLERANCES = {torch.float64: 1e-13, torch.float32: 2e-6, torch.float16: 4e-3, torch.bfloat16: 3e-2}
DTYPES = pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
ROWS = pytest.mark.parametrize("tokens", [0, 1, 3, 40])


def randn(*shape, dtype, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def assert_near(actual, expected):
    tolerance = TOLERANCES[actual.dtype]
    torch.testing.assert_close(actual.double(), expected, atol=tolerance, rtol=tolerance)


@DTYPES
@ROWS
def test_rms_norm(dtype, tokens):
    x, weight = randn(tokens, 72, dtype=dtype), randn(72, dtype=dtype, seed=1)
    wide = x.double()
    expected = wide / (wide.square().mean(-1, keepdim=True) + 1e-5).sqrt() * weight.double()
    result = ops.rms_norm(x, weight, 1e-5)
    assert result.dtype == dtype
    assert_near(result, expected)


@DTYPES
def test_rms_norm_of_a_row_has_the_same_bits_in_any_batch(dtype):
    x, weight = randn(70, 172, dtype=dtype), randn(172, dtype=dtype, seed=1)
    whole = ops.rms_norm(x, weight, 1e-5)
    for start, stop in ((0, 1), (69, 70), (3, 5), (10, 19), (30, 63)):
        assert torch.equal(ops.rms_norm(x[start:stop], weight, 1e-5), whole[start:stop])


@DTYPES
def test_rms_norm_of_outliers(dtype):
    """A few values a thousand times the others, as real hidden states have them."""
    x, weight = randn(30, 576, dtype=dtype), randn(576, dtype=dtype, seed=1)
    x[:, 7] *= 1000
    wide = x.double()
    expected = wide / (wide.square().mean(-1, keepdim=True) + 1e-5).sqrt() * weight.double()
    assert_near(ops.rms_norm(x, weight, 1e-5), expected)
    assert_near(ops.rms_norm(x[:1], weight, 1e-5), expected[:1])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_rms_norm_rounds_before_the_weight(dtype):
    """What Hugging Face's Llama computes, but for values where the last bit of the statistics decides the rounding."""
    x, weight = randn(33, 576, dtype=dtype), randn(576, dtype=dtype, seed=1)
    wide = x.float()
    expected = weight * (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + 1e-5)).to(dtype)
    result = ops.rms_norm(x, weight, 1e-5)
    torch.testing.assert_close(result, expected, atol=0, rtol=2 * torch.finfo(dtype).eps)
    assert (result != expected).double().mean() < 0.002
    late = (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + 1e-5) * weight.float()).to(dtype)
    assert (result != late).double().mean() > 0.2


@DTYPES
@ROWS
def test_add_rms_norm(dtype, tokens):
    x, residual = randn(tokens, 72, dtype=dtype), randn(tokens, 72, dtype=dtype, seed=2)
    weight = randn(72, dtype=dtype, seed=1)
    kept = x.clone(), residual.clone()
    normed, summed = ops.add_rms_norm(x, residual, weight, 1e-5)
    assert torch.equal(summed, x + residual)
    assert torch.equal(normed, ops.rms_norm(summed, weight, 1e-5))
    assert torch.equal(x, kept[0])
    assert torch.equal(residual, kept[1])


def rope_inputs(tokens, dtype, heads=6, kv_heads=2, head_dim=16):
    fused = randn(tokens, heads + 2 * kv_heads, head_dim, dtype=dtype)
    angles = torch.arange(tokens).float()[:, None] * torch.rand(head_dim // 2, generator=torch.manual_seed(0))
    caches = [torch.full((9, 4, kv_heads, head_dim), torch.nan, dtype=dtype) for _ in range(2)]
    return fused, fused.split((heads, kv_heads, kv_heads), dim=1), rotation(angles), KVLayer(*caches)


def rotated(x, cos_sin):
    half = x.shape[-1] // 2
    turned = torch.view_as_complex(torch.stack((x[..., :half], x[..., half:]), -1).double())
    turned = turned * torch.complex(cos_sin[0][..., :half].double(), cos_sin[1][..., half:].double())
    return torch.cat((turned.real, turned.imag), -1)


@DTYPES
@pytest.mark.parametrize("tokens", [0, 1, 2, 30])
@pytest.mark.parametrize("head_dim", [2, 16, 128])
def test_rope_and_store(dtype, tokens, head_dim):
    fused, (q, k, v), cos_sin, kv_layer = rope_inputs(tokens, dtype, head_dim=head_dim)
    before = fused.clone()
    slots = torch.randperm(36, generator=torch.manual_seed(1))[:tokens]
    out = ops.rope_and_store(q, k, v, cos_sin, kv_layer, only_slots(slots, 4))
    assert torch.equal(fused, before)
    assert_near(out, rotated(q, cos_sin))
    assert_near(kv_layer.k.flatten(0, 1)[slots], rotated(k, cos_sin))
    assert torch.equal(kv_layer.v.flatten(0, 1)[slots], v)
    for cache in (kv_layer.k, kv_layer.v):
        assert int(cache.isnan().all(-1).sum()) == (36 - tokens) * 2


@DTYPES
@pytest.mark.parametrize("slots", [[-1], [-1, 7, -1, 3], [-1, -1], [3, -1, 9], [*range(20), -1]], ids=str)
def test_padding_is_not_stored(dtype, slots):
    _, (q, k, v), cos_sin, kv_layer = rope_inputs(len(slots), dtype)
    out = ops.rope_and_store(q, k, v, cos_sin, kv_layer, only_slots(torch.tensor(slots), 4))
    assert_near(out, rotated(q, cos_sin))
    stored = (~kv_layer.v.flatten(0, 1).isnan().all(-1).all(-1)).nonzero().flatten().tolist()
    assert stored == sorted(slot for slot in slots if slot >= 0)


@DTYPES
def test_many_rows_in_pieces(dtype, monkeypatch):
    """Bit for bit what they are at once."""
    x, weight = randn(70, 172, dtype=dtype), randn(172, dtype=dtype, seed=1)
    heads, (cos, sin) = randn(70, 5, 16, dtype=dtype), rotation(torch.rand(70, 8))
    normed, rotated = norm.rms_norm(x, weight, 1e-5), rope._rotated(heads, cos, sin)
    assert normed.data_ptr() != x.data_ptr() and normed.dtype == rotated.dtype == dtype
    for numbers in (1, 172 * 3, 172 * 69):
        for module in (norm, rope):
            monkeypatch.setattr(module, "_PIECE", numbers)
        assert torch.equal(norm.rms_norm(x, weight, 1e-5), normed)
        assert torch.equal(rope._rotated(heads, cos, sin), rotated)
    assert torch.equal(x, randn(70, 172, dtype=dtype)) and torch.equal(heads, randn(70, 5, 16, dtype=dtype))
    weight.requires_grad_()  # as where norms alone are trained
    ops.rms_norm(x, weight, 1e-5).sum().backward()
    assert weight.grad is not None and bool(weight.grad.isfinite().all())


@DTYPES
@ROWS
def test_silu_mul(dtype, tokens):
    gate_up = randn(tokens, 50, dtype=dtype)
    gate, up = gate_up.double().chunk(2, -1)
    result = ops.silu_mul(gate_up)
    assert result.is_contiguous()
    assert_near(result, gate * torch.sigmoid(gate) * up)


def test_refusals_name_the_op_and_the_shapes():
    x, weight = torch.zeros(2, 8), torch.zeros(9)
    with pytest.raises(ValueError, match=r"rms_norm: .*x float32 \[2, 8\], weight float32 \[9\]"):
        ops.rms_norm(x, weight, 1e-5)
    with pytest.raises(ValueError, match="add_rms_norm"):
        ops.add_rms_norm(x, x.double(), torch.zeros(8), 1e-5)
    with pytest.raises(ValueError, match="silu_mul"):
        ops.silu_mul(torch.zeros(2, 7))
    _, (q, k, v), (cos, sin), kv_layer = rope_inputs(2, torch.float32)
    arguments = {"q": q, "k": k, "v": v, "cos_sin": (cos, sin), "kv_layer": kv_layer}
    arguments["ragged"] = only_slots(torch.zeros(2, dtype=torch.int64), 4)
    for changed in (
        {"cos_sin": (cos, sin.double())},
        {"cos_sin": (cos[:1], sin)},
        {"k": k[:1]},
        {"ragged": only_slots(torch.zeros(1, dtype=torch.int64), 4)},
    ):
        with pytest.raises(ValueError, match="rope_and_store"):
            ops.rope_and_store(**{**arguments, **changed})
    for positions, frequencies in (
        (cos, cos[0, 0]),
        (slots := torch.zeros(2).long(), cos),
        (slots, cos[0, 0].double()),
    ):
        with pytest.raises(ValueError, match="cos_sin"):
            ops.cos_sin(positions, frequencies)
    with pytest.raises(ValueError, match="slots int64"):
        only_slots(torch.zeros(2, dtype=torch.int32), 4)
