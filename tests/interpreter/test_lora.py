"""The LoRA kernels in the interpreter against the CPU's. Rows without an adapter, and whose neighbours they are, are
compared to the bit."""

import pytest
import torch

from llama.kernels import ops
from llama.kernels.cpu import lora as cpu_lora
from llama.kernels.gpu import lora
from llama.kernels.types import TokenAdapters

# float32: the order of sums. float16: h and the result are rounded once, the CPU's product once more.
TOLERANCES = {torch.float32: 2e-5, torch.float16: 4e-3}
ADAPTERS = 4
QKV = (0, 40, 56, 72)


@pytest.fixture(autouse=True)
def few_programs(monkeypatch):
    """One per tile and part: the interpreter runs them in turn."""
    monkeypatch.setattr(lora, "_TILES_ALONE", 1)


def make(indices, in_features=48, starts=QKV, rank=16, dtype=torch.float32, seed=0):
    """x, a, y, b, indices; no entry is zero."""
    generator = torch.Generator().manual_seed(seed)

    def values(*shape, scale=1.0):
        return (torch.randn(shape, generator=generator) * scale).to(dtype)

    tokens = len(indices)
    a = values(ADAPTERS, len(starts) - 1, rank, in_features, scale=in_features**-0.5)
    b = values(ADAPTERS, starts[-1], rank, scale=rank**-0.5)
    return values(tokens, in_features), a, values(tokens, starts[-1]), b, torch.tensor(indices, dtype=torch.int32)


def apply(ops, x, a, y, b, indices, starts=QKV):
    """y after both halves, by the ops of `ops`; the given y stays."""
    adapters = TokenAdapters(indices)
    y = y.clone()
    ops.lora_expand(ops.lora_shrink(x, a, adapters), y, b, adapters, starts)
    return y


def check(indices, starts=QKV, **shape):
    arguments = make(indices, starts=starts, **shape)
    before = [tensor.clone() for tensor in arguments]
    actual, expected = apply(lora, *arguments, starts), apply(cpu_lora, *arguments, starts)
    assert all(torch.equal(tensor, old) for tensor, old in zip(arguments, before, strict=True))
    tolerance = TOLERANCES[actual.dtype]
    torch.testing.assert_close(actual, expected, rtol=tolerance, atol=tolerance)
    base = torch.tensor(indices) == 0
    assert torch.equal(actual[base], arguments[2][base])
    assert not (actual[~base] == arguments[2][~base]).all(1).any()


@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
@pytest.mark.parametrize("indices", [[1], [0], [0, 2, 2, 4, 0, 1, 2], [3] * 16 + [1], [4, 0, 3, 1] * 5], ids=str)
def test_any_mix_equals_the_cpus(indices, dtype):
    check(indices, dtype=dtype)


@pytest.mark.parametrize("starts", [(0, 5), (0, 300), (0, 33, 66), (0, 256, 257, 300), (0, 1, 2, 3, 4)], ids=str)
def test_slices(starts):
    check([2, 0, 1], starts)


@pytest.mark.parametrize("rank", [1, 8, 20, 32, 48, 64, 80])
def test_ranks(rank):
    check([2, 0, 1], (0, 40), rank=rank)


@pytest.mark.parametrize("in_features", [1, 100, 1024, 2050])
def test_parts_of_the_input(in_features):
    check([1, 1, 0, 3], (0, 40), in_features=in_features)


def test_no_tokens():
    x, a, y, b, indices = make([])
    assert apply(lora, x, a, y, b, indices).shape == (0, QKV[-1])


def test_neighbours_change_no_bit():
    indices = [1, 2, 2, 0, 3, 1, 4, 2, 1, 1, 2, 3, 4, 0, 1, 2, 3, 1, 2, 0]
    starts = (0, 40)
    x, a, y, b, indices = make(indices, in_features=1100, starts=starts, dtype=torch.float16)
    together = apply(lora, x, a, y, b, indices, starts)
    for some in ([0], [9, 4], [17, 18], [19, 2, 1]):
        assert torch.equal(apply(lora, x[some], a, y[some], b, indices[some], starts), together[some])


def test_the_number_of_programs_changes_no_bit(monkeypatch):
    starts = (0, 40)
    arguments = make([1, 2, 0, 3, 3, 4] * 3, starts=starts)
    expected = apply(lora, *arguments, starts)
    for tiles in (5, 100):  # 3 and 16 programs for each tile
        monkeypatch.setattr(lora, "_TILES_ALONE", tiles)
        assert torch.equal(apply(lora, *arguments, starts), expected)


def test_nothing_leaks_from_other_rows_and_indices():
    x, a, y, b, indices = make([1, 0, 3, 1, 0])
    expected = apply(lora, x, a, y, b, indices)
    x[1] = x[2] = torch.nan
    for weights in (a, b):
        weights[[1, 3]] = torch.nan  # indices 2 and 4, which nobody uses
    actual = apply(lora, x, a, y, b, indices)
    assert torch.equal(actual[[0, 1, 3, 4]], expected[[0, 1, 3, 4]]) and actual[2].isnan().all()


def test_rows_without_an_adapter_keep_nan_and_signed_zero():
    x, a, y, b, indices = make([0, 1, 0])
    y[0], y[2] = torch.nan, -0.0
    actual = apply(lora, x, a, y, b, indices)
    assert torch.equal(actual[[0, 2]].view(torch.int32), y[[0, 2]].view(torch.int32))


def test_strided_rows():
    x, a, y, b, indices = make([1, 2, 0, 3])
    wide_x, wide_y = torch.full((4, 100), torch.nan), torch.full((4, 90), torch.nan)
    wide_x[:, :48], wide_y[:, :72] = x, y
    adapters = TokenAdapters(indices)
    lora.lora_expand(lora.lora_shrink(wide_x[:, :48], a, adapters), wide_y[:, :72], b, adapters, QKV)
    assert torch.equal(wide_y[:, :72], apply(lora, x, a, y, b, indices)) and wide_y[:, 72:].isnan().all()


def test_indices_beyond_2_to_the_31_elements():
    """Only the pages of the last index are touched."""
    x, a, y, b, _ = make([1, 1], in_features=1024, starts=(0, 64))
    last = 1 << 17
    far_a = torch.empty(last, 1, 16, 1024, dtype=torch.float16)
    far_b = torch.empty((1 << 21) + 1, 64, 16, dtype=torch.float16)
    far_a[-1], far_b[last - 1] = a[0], b[0]
    x, y, a, b = x.half(), y.half(), a.half(), b.half()
    far = torch.full((2,), last, dtype=torch.int32)
    expected = apply(lora, x, a, y, b, torch.ones(2, dtype=torch.int32), (0, 64))
    assert torch.equal(apply(lora, x, far_a, y, far_b, far, (0, 64)), expected)


@pytest.mark.parametrize("rank", [1, 16, 48])
def test_embedding(rank):
    generator = torch.Generator().manual_seed(0)
    a, b = torch.randn(ADAPTERS, 30, rank, generator=generator), torch.randn(ADAPTERS, 20, rank, generator=generator)
    y, token_ids = torch.randn(5, 20, generator=generator), torch.tensor([29, 0, 7, 7, 3])
    indices = torch.tensor([1, 4, 0, 2, 1], dtype=torch.int32)
    results = []
    adapters = TokenAdapters(indices)
    for backend in (lora, cpu_lora):
        results.append(y.clone())
        backend.lora_expand(backend.lora_embedding(token_ids, a, adapters), results[-1], b, adapters, (0, 20))
    torch.testing.assert_close(*results, rtol=2e-5, atol=2e-5)
    assert torch.equal(results[0][2], y[2])


def test_public_ops_take_the_kernels():
    x, a, y, b, indices = make([1, 0, 2])
    adapters, actual = TokenAdapters(indices), y.clone()
    ops.lora_expand(ops.lora_shrink(x, a, adapters), actual, b, adapters, QKV)
    assert torch.equal(actual, apply(lora, x, a, y, b, indices))
    assert "cpu_layout" not in vars(adapters)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64], ids=str)
def test_refuses_what_the_interpreter_cannot(dtype):
    with pytest.raises(ValueError, match=str(dtype)):
        apply(lora, *make([1], dtype=dtype))


def test_refuses_tensors_that_it_would_misread():
    x, a, y, b, indices = make([1, 2])
    with pytest.raises(ValueError, match="a must be contiguous"):
        lora.lora_shrink(x, a[:, :, ::2], TokenAdapters(indices))
    with pytest.raises(ValueError, match="adapter indices must be int32"):
        TokenAdapters(indices.long())
    h = lora.lora_shrink(x, a, TokenAdapters(indices))
    with pytest.raises(ValueError, match="h must be float32"):
        lora.lora_expand(h.half(), y, b, TokenAdapters(indices), QKV)
