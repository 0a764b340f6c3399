"""The LoRA kernels on a GPU against float64, their bits whoever is in the batch, and one CUDA graph for every mix."""

import pytest
import torch

from llama.kernels.gpu import lora
from llama.kernels.types import TokenAdapters

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")]

DEVICE = "cuda"
ADAPTERS = 8
QKV = (0, 4096, 5120, 6144)
# One rounding of the result; h is rounded to the dtype before B multiplies it, so the product is off by its norm.
EPSILON = {torch.bfloat16: 2**-8, torch.float16: 2**-11, torch.float32: 2**-20}


def make(indices, in_features=4096, starts=QKV, rank=16, dtype=torch.bfloat16):
    generator = torch.Generator(DEVICE).manual_seed(len(indices) * rank)

    def values(*shape, scale=1.0):
        return (torch.randn(shape, generator=generator, device=DEVICE) * scale).to(dtype)

    a = values(ADAPTERS, len(starts) - 1, rank, in_features, scale=in_features**-0.5)
    b = values(ADAPTERS, starts[-1], rank, scale=rank**-0.5)
    tensors = values(len(indices), in_features), a, values(len(indices), starts[-1]), b
    return *tensors, torch.tensor(indices, dtype=torch.int32, device=DEVICE)


def apply(x, a, y, b, indices, starts=QKV):
    y = y.clone()
    adapters = TokenAdapters(indices)
    lora.lora_expand(lora.lora_shrink(x, a, adapters), y, b, adapters, starts)
    return y


def exact(x, a, y, b, indices, starts):
    """y in float64, and by how much a rounding of h may move each row."""
    y, spread = y.double(), torch.zeros(len(y), 1, dtype=torch.float64, device=DEVICE)
    for index in indices.unique().tolist():
        rows = (indices == index).nonzero().flatten()
        for i in range(len(starts) - 1 if index else 0):
            low, high = starts[i : i + 2]
            h = x[rows].double() @ a[index - 1, i].double().t()
            y[rows, low:high] += h @ b[index - 1, low:high].double().t()
            spread[rows] = torch.maximum(spread[rows], h.norm(dim=1, keepdim=True))
    return y, spread


@pytest.mark.parametrize("dtype", EPSILON, ids=str)
@pytest.mark.parametrize("rank", [8, 16, 48, 64, 128])
@pytest.mark.parametrize("indices", [[1], [0, 3, 0, 3, 1], list(range(9)) * 4, [2] * 300 + [5] * 77], ids=len)
@pytest.mark.parametrize(("in_features", "starts"), [(4096, QKV), (576, (0, 576, 768, 960)), (1001, (0, 333))], ids=str)
def test_error_budget(indices, in_features, starts, rank, dtype):
    arguments = make(indices, in_features, starts, rank, dtype)
    actual, (expected, spread) = apply(*arguments, starts), exact(*arguments, starts)
    base = arguments[-1] == 0
    assert torch.equal(actual[base], arguments[2][base])
    # b has rows of norm about 1, at most 3.
    error = (actual.double() - expected).abs()
    assert (error <= EPSILON[dtype] * (expected.abs() + 3 * spread)).all(), f"worst error {error.max():.3g}"


def test_neighbours_change_no_bit():
    indices = torch.randint(0, ADAPTERS + 1, (5000,), generator=torch.Generator().manual_seed(0)).tolist()
    x, a, y, b, indices = make(indices)
    together = apply(x, a, y, b, indices)
    for rows in ([0], [4999, 17], list(range(100, 164)), list(range(40, 2000, 3))):
        assert torch.equal(apply(x[rows], a, y[rows], b, indices[rows]), together[rows])
    assert torch.equal(apply(x, a, y, b, indices), together)


def test_one_cuda_graph_for_every_mix():
    x, a, y, b, indices = make([0] * 32)
    out = y.clone()
    adapters = TokenAdapters(indices)
    apply(x, a, y, b, indices)  # compiles
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out.copy_(y)
        lora.lora_expand(lora.lora_shrink(x, a, adapters), out, b, adapters, QKV)
    for mix in ([0] * 32, [1] * 32, [i % 9 for i in range(32)]):
        indices.copy_(torch.tensor(mix, dtype=torch.int32))
        graph.replay()
        assert torch.equal(out, apply(x, a, y, b, indices))


def test_embedding():
    a, b = torch.randn(ADAPTERS, 1000, 16, device=DEVICE), torch.randn(ADAPTERS, 4096, 16, device=DEVICE)
    y, token_ids = torch.randn(64, 4096, device=DEVICE), torch.randint(1000, (64,), device=DEVICE)
    indices = (torch.arange(64, device=DEVICE) % 9).int()
    out, adapters = y.clone(), TokenAdapters(indices)
    lora.lora_expand(lora.lora_embedding(token_ids, a, adapters), out, b, adapters, (0, 4096))
    h = a[indices.long() - 1, token_ids].double()
    added = torch.einsum("tor,tr->to", b[indices.long() - 1].double(), h) * (indices > 0)[:, None]
    torch.testing.assert_close(out.double(), y.double() + added, rtol=1e-5, atol=1e-4)
    assert torch.equal(out[indices == 0], y[indices == 0])
