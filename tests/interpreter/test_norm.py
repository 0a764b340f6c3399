"""rms_norm and add_rms_norm against the CPU's, in the interpreter."""

import pytest
import torch

from llama.kernels import ops
from llama.kernels.cpu import norm as cpu
from llama.kernels.gpu import norm

# float32: the order of the sum differs. float16: one rounding of the normed value may fall the other way.
TOLERANCE = {torch.float32: 2e-6, torch.float16: 2e-3}

SHAPES = [(1, 1), (3, 5), (2, 64), (5, 576), (2, 1000), (1, 4096)]


def _inputs(tokens, hidden, dtype, seed=0):
    generator = torch.Generator().manual_seed(seed)
    x, residual = torch.randn(2, tokens, hidden, generator=generator).to(dtype)
    return x, residual, (1 + torch.randn(hidden, generator=generator) / 4).to(dtype)


def _close(actual, expected):
    assert actual.dtype == expected.dtype
    tolerance = TOLERANCE[actual.dtype]
    torch.testing.assert_close(actual, expected, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_rms_norm(shape, dtype):
    x, _, weight = _inputs(*shape, dtype)
    _close(ops.rms_norm(x, weight, 1e-5), cpu.rms_norm(x, weight, 1e-5))


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_add_rms_norm(shape, dtype):
    x, residual, weight = _inputs(*shape, dtype)
    before = x.clone(), residual.clone()
    normed, summed = ops.add_rms_norm(x, residual, weight, 1e-5)
    expected_normed, expected_summed = cpu.add_rms_norm(x, residual, weight, 1e-5)
    assert torch.equal(summed, expected_summed)
    _close(normed, expected_normed)
    assert torch.equal(x, before[0]) and torch.equal(residual, before[1])


@pytest.mark.parametrize("hidden", [100, 128, 129])
def test_row_wider_than_a_block(hidden, monkeypatch):
    monkeypatch.setattr(norm, "_MAX_BLOCK", 64)
    x, residual, weight = _inputs(2, hidden, torch.float32)
    _close(ops.rms_norm(x, weight, 1e-5), cpu.rms_norm(x, weight, 1e-5))
    normed, summed = ops.add_rms_norm(x, residual, weight, 1e-5)
    assert torch.equal(summed, x + residual)
    _close(normed, cpu.rms_norm(summed, weight, 1e-5))


def test_no_tokens():
    x, _, weight = _inputs(0, 64, torch.float32)
    assert ops.rms_norm(x, weight, 1e-5).shape == (0, 64)
    assert [t.shape for t in ops.add_rms_norm(x, x, weight, 1e-5)] == [(0, 64), (0, 64)]


def test_strided_rows():
    x, residual, weight = _inputs(6, 64, torch.float32)
    _close(ops.rms_norm(x[::2], weight, 1e-5), cpu.rms_norm(x[::2], weight, 1e-5))
    _close(
        ops.add_rms_norm(x[::3], residual[1::3], weight, 1e-5)[0],
        cpu.add_rms_norm(x[::3], residual[1::3], weight, 1e-5)[0],
    )


def test_rows_beyond_32_bit_offsets():
    # Two rows 2^31 + 2^27 elements apart: untouched memory in between costs nothing.
    storage = torch.empty(2**31 + 2**27 + 64, dtype=torch.float16)
    x = storage.as_strided((2, 64), (2**31 + 2**27, 1))
    values, _, weight = _inputs(2, 64, torch.float16)
    x.copy_(values)
    _close(ops.rms_norm(x, weight, 1e-5), cpu.rms_norm(values, weight, 1e-5))


def test_large_values_do_not_overflow_float16():
    x = torch.full((1, 64), 6e4, dtype=torch.float16)
    weight = torch.ones(64, dtype=torch.float16)
    _close(ops.rms_norm(x, weight, 1e-5), torch.ones(1, 64, dtype=torch.float16))


def test_bfloat16_is_refused_by_name():
    x, _, weight = _inputs(2, 64, torch.bfloat16)
    with pytest.raises(ValueError, match=r"rms_norm: x is torch\.bfloat16"):
        ops.rms_norm(x, weight, 1e-5)
