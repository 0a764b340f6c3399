"""silu_mul on a GPU against float64, with budgets counted in roundings of the dtype."""

import pytest
import torch

from llama.kernels import ops

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")]

DEVICE = "cuda"
# Relative error: silu and its product with `up` are rounded once each. float32: exp in the last places as well.
BUDGET = {torch.bfloat16: 2.1 * 2**-8, torch.float16: 2.1 * 2**-11, torch.float32: 2e-6}
LEAST = {torch.bfloat16: 1e-30, torch.float16: 2**-14, torch.float32: 1e-30}  # below it values are subnormal


def _gate_up(tokens, size, dtype, scale=3.0):
    generator = torch.Generator(DEVICE).manual_seed(size)
    return (torch.randn(tokens, 2 * size, generator=generator, device=DEVICE) * scale).to(dtype)


def _check(out, gate_up):
    gate, up = gate_up.double().chunk(2, dim=-1)
    silu = gate * torch.sigmoid(gate)
    allowed = BUDGET[out.dtype] * ((silu * up).abs() + LEAST[out.dtype] * (1 + up.abs()))
    assert ((out.double() - silu * up).abs() <= allowed).all()


@pytest.mark.parametrize("dtype", BUDGET, ids=str)
@pytest.mark.parametrize("shape", [(1, 14336), (257, 14336), (3, 28672), (5, 1536), (2, 2049), (4, 1)], ids=str)
def test_error_budget(shape, dtype):
    gate_up = _gate_up(*shape, dtype)
    _check(ops.silu_mul(gate_up), gate_up)


def test_saturation_without_nan():
    gate_up = _gate_up(4, 4096, torch.bfloat16, scale=100.0)
    _check(ops.silu_mul(gate_up), gate_up)


@pytest.mark.alone
def test_offsets_beyond_32_bits():
    size = 14336
    gate_up = torch.zeros(2**31 // (2 * size) + 8, 2 * size, dtype=torch.bfloat16, device=DEVICE)
    gate_up[-4:] = _gate_up(4, size, torch.bfloat16)
    out = ops.silu_mul(gate_up)
    _check(out[-4:], gate_up[-4:])
    assert not out[:-4].any()
