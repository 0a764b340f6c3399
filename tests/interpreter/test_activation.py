"""silu_mul against the CPU's, in the interpreter."""

import pytest
import torch

from llama.kernels import ops
from llama.kernels.cpu import activation as cpu

# float32: exp differs in the last place. float16: one rounding of silu may fall the other way.
TOLERANCE = {torch.float32: 1e-6, torch.float16: 2e-3}


def _check(gate_up):
    actual, expected = ops.silu_mul(gate_up), cpu.silu_mul(gate_up)
    assert actual.dtype == expected.dtype and actual.shape == expected.shape
    tolerance = TOLERANCE[actual.dtype]
    torch.testing.assert_close(actual, expected, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("shape", [(1, 1), (3, 5), (2, 1536), (1, 2048), (2, 2049)], ids=str)
def test_shapes(shape, dtype):
    tokens, size = shape
    _check((torch.randn(tokens, 2 * size, generator=torch.Generator().manual_seed(size)) * 4).to(dtype))


def test_no_tokens():
    assert ops.silu_mul(torch.empty(0, 64)).shape == (0, 32)


def test_strided_rows():
    _check(torch.randn(6, 128, generator=torch.Generator().manual_seed(0))[::2])


@pytest.mark.filterwarnings("ignore:overflow encountered in exp")  # NumPy's word for exp(1e4) = inf, which is meant
def test_saturation_without_nan():
    gate = torch.tensor([-1e4, -100.0, -88.0, 0.0, 100.0, 1e4])
    _check(torch.cat((gate, torch.full((6,), 3.0))).unsqueeze(0))


def test_rows_beyond_32_bit_offsets():
    storage = torch.empty(2**31 + 2**27 + 64, dtype=torch.float16)
    gate_up = storage.as_strided((2, 64), (2**31 + 2**27, 1))
    gate_up.copy_(torch.randn(2, 64, generator=torch.Generator().manual_seed(0)))
    _check(gate_up)


def test_bfloat16_is_refused_by_name():
    with pytest.raises(ValueError, match=r"silu_mul: gate_up is torch\.bfloat16"):
        ops.silu_mul(torch.empty(2, 64, dtype=torch.bfloat16))
