"""rms_norm and add_rms_norm on a GPU against float64, with budgets counted in roundings of the dtype."""

import pytest
import torch

from llama.kernels import ops

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")]

DEVICE = "cuda"
EPS = 1e-5
# Relative error: the normed value and its product with the weight are rounded once each. float32: the sum as well.
BUDGET = {torch.bfloat16: 2.1 * 2**-8, torch.float16: 2.1 * 2**-11, torch.float32: 2e-6}
SHAPES = [(1, 4096), (256, 4096), (33, 8192), (7, 576), (5, 3072), (3, 16384), (3, 20000), (5, 1001), (2, 1)]


def _inputs(tokens, hidden, dtype):
    generator = torch.Generator(DEVICE).manual_seed(tokens * hidden)
    x, residual = torch.randn(2, tokens, hidden, generator=generator, device=DEVICE).to(dtype)
    weight = (1 + torch.randn(hidden, generator=generator, device=DEVICE) / 4).to(dtype)
    return x, residual, weight


def _check(normed, source, weight):
    wide = source.double()
    expected = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + EPS) * weight.double()
    error = (normed.double() - expected).abs()
    # Values under 2^-14 are subnormal in float16, where the budget is absolute.
    allowed = BUDGET[normed.dtype] * expected.abs().clamp_min(2**-14 if normed.dtype == torch.float16 else 0)
    assert (error <= allowed).all(), f"worst error {(error / expected.abs()).nan_to_num().max():.3g}"


@pytest.mark.parametrize("dtype", BUDGET, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_error_budget(shape, dtype):
    x, residual, weight = _inputs(*shape, dtype)
    _check(ops.rms_norm(x, weight, EPS), x, weight)
    normed, summed = ops.add_rms_norm(x, residual, weight, EPS)
    assert torch.equal(summed, x + residual)
    _check(normed, summed, weight)


@pytest.mark.alone
def test_offsets_beyond_32_bits():
    tokens, hidden = 524_300, 4096  # 2^31 elements and some rows
    x = torch.zeros(tokens, hidden, dtype=torch.bfloat16, device=DEVICE)
    values, _, weight = _inputs(4, hidden, torch.bfloat16)
    x[-4:] = values
    _check(ops.rms_norm(x, weight, EPS)[-4:], values, weight)
    normed, summed = ops.add_rms_norm(x, torch.zeros_like(x), weight, EPS)
    assert torch.equal(summed[-4:], values)
    _check(normed[-4:], values, weight)


def test_a_row_does_not_depend_on_its_batch():
    x, residual, weight = _inputs(256, 4096, torch.bfloat16)
    together = ops.add_rms_norm(x, residual, weight, EPS)
    for row in (0, 100, 255):
        alone = ops.add_rms_norm(x[row : row + 1], residual[row : row + 1], weight, EPS)
        assert all(torch.equal(a[0], b[row]) for a, b in zip(alone, together, strict=True))


def test_strided_rows():
    x, residual, weight = _inputs(64, 4096, torch.bfloat16)
    normed, summed = ops.add_rms_norm(x[::2], residual[1::2], weight, EPS)
    assert torch.equal(summed, x[::2] + residual[1::2])
    _check(normed, summed, weight)
