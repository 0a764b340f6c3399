"""LoRA on a CPU against one product per token, in float64, for every way that tokens may be spread over adapters."""

import pytest
import torch

from llama.kernels import ops
from llama.kernels.cpu.layout import _FILLED, LoraLayout
from llama.kernels.types import TokenAdapters

ADAPTERS = 9
STARTS = (0, 10, 14, 18)

MIXES = {
    "none": [0, 0, 0],
    "no tokens": [],
    "one": [0, 3, 0],
    "equal counts": [1, 2, 3, 1, 2, 3],
    "filled up": [1, 1, 1, 2, 0, 3, 3],
    "a gap": [1, 3, 4, 6],
    "a long gap": [1, 9, 0, 9],
    "one long": [5] * 40 + [4, 6, 0],
    "all": [0, 9, 8, 7, 6, 5, 4, 3, 2, 1, 9, 9],
}


def make(mix, seed=0):
    generator = torch.Generator().manual_seed(seed)

    def values(*shape):
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    x, y = values(len(mix), 12), values(len(mix), STARTS[-1])
    return x, values(ADAPTERS, 3, 5, 12), y, values(ADAPTERS, STARTS[-1], 5), torch.tensor(mix, dtype=torch.int32)


@pytest.mark.parametrize("mix", MIXES.values(), ids=MIXES)
def test_every_token_gets_its_adapter(mix):
    x, a, y, b, indices = make(mix)
    for unused in set(range(1, ADAPTERS + 1)) - set(mix):
        a[unused - 1] = b[unused - 1] = torch.nan
    adapters, out = TokenAdapters(indices), y.clone()
    ops.lora_expand(ops.lora_shrink(x, a, adapters), out, b, adapters, STARTS)
    for token, index in enumerate(mix):
        expected = y[token].clone()
        for i in range(3 if index else 0):
            columns = slice(*STARTS[i : i + 2])
            expected[columns] += b[index - 1, columns] @ (a[index - 1, i] @ x[token])
        torch.testing.assert_close(out[token], expected, rtol=1e-12, atol=1e-12)
        assert index or torch.equal(out[token], y[token])


@pytest.mark.parametrize("mix", MIXES.values(), ids=MIXES)
def test_embedding(mix):
    _, _, y, b, indices = make(mix)
    generator = torch.Generator().manual_seed(1)
    a = torch.randn(ADAPTERS, 30, 5, generator=generator, dtype=torch.float64)
    token_ids = torch.randint(30, (len(mix),), generator=generator)
    adapters, out = TokenAdapters(indices), y.clone()
    ops.lora_expand(ops.lora_embedding(token_ids, a, adapters), out, b, adapters, (0, STARTS[-1]))
    for token, index in enumerate(mix):
        expected = y[token] + b[index - 1] @ a[index - 1, token_ids[token]] if index else y[token]
        torch.testing.assert_close(out[token], expected, rtol=1e-12, atol=1e-12)


def test_few_rows_only_fill_up():
    for indices in MIXES.values():
        layout = LoraLayout.of(torch.tensor(indices, dtype=torch.int32))
        assert len(layout.tokens) == sum(index > 0 for index in indices)
        assert len(layout.rows) <= len(layout.tokens) + _FILLED * len(set(indices) - {0})
    together = LoraLayout.of(torch.tensor(MIXES["equal counts"]))
    assert len(together.groups) == 1 and together.used is None
    apart = LoraLayout.of(torch.tensor(MIXES["one long"]))
    assert [group.first for group in apart.groups] == [4, 5, 6] and apart.used is None
