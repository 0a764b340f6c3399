"""The LoRA twin against one product per token, in float64, for every way that tokens may be spread over slots."""

import pytest
import torch

from llama.kernels import ops
from llama.kernels.cpu import lora

SLOTS = 9
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


def make(slots, seed=0):
    generator = torch.Generator().manual_seed(seed)

    def values(*shape):
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    x, y = values(len(slots), 12), values(len(slots), STARTS[-1])
    return x, values(SLOTS, 3, 5, 12), y, values(SLOTS, STARTS[-1], 5), torch.tensor(slots, dtype=torch.int32)


@pytest.mark.parametrize("slots", MIXES.values(), ids=MIXES)
def test_every_token_gets_its_adapter(slots):
    x, a, y, b, adapter_slots = make(slots)
    for unused in set(range(1, SLOTS + 1)) - set(slots):
        a[unused - 1] = b[unused - 1] = torch.nan
    plan, out = ops.plan_lora(adapter_slots), y.clone()
    ops.lora_expand(ops.lora_shrink(x, a, plan), out, b, plan, STARTS)
    for token, slot in enumerate(slots):
        expected = y[token].clone()
        for i in range(3 if slot else 0):
            columns = slice(*STARTS[i : i + 2])
            expected[columns] += b[slot - 1, columns] @ (a[slot - 1, i] @ x[token])
        torch.testing.assert_close(out[token], expected, rtol=1e-12, atol=1e-12)
        assert slot or torch.equal(out[token], y[token])


@pytest.mark.parametrize("slots", MIXES.values(), ids=MIXES)
def test_embedding(slots):
    _, _, y, b, adapter_slots = make(slots)
    generator = torch.Generator().manual_seed(1)
    a = torch.randn(SLOTS, 30, 5, generator=generator, dtype=torch.float64)
    token_ids = torch.randint(30, (len(slots),), generator=generator)
    plan, out = ops.plan_lora(adapter_slots), y.clone()
    ops.lora_expand(ops.lora_embedding(token_ids, a, plan), out, b, plan, (0, STARTS[-1]))
    for token, slot in enumerate(slots):
        expected = y[token] + b[slot - 1] @ a[slot - 1, token_ids[token]] if slot else y[token]
        torch.testing.assert_close(out[token], expected, rtol=1e-12, atol=1e-12)


def test_few_rows_only_fill_up():
    for slots in MIXES.values():
        plan = ops.plan_lora(torch.tensor(slots, dtype=torch.int32))
        assert len(plan.tokens) == sum(slot > 0 for slot in slots)
        assert len(plan.rows) <= len(plan.tokens) + lora._FILLED * len(set(slots) - {0})
    together = ops.plan_lora(torch.tensor(MIXES["equal counts"], dtype=torch.int32))
    assert len(together.groups) == 1 and together.used is None
    apart = ops.plan_lora(torch.tensor(MIXES["one long"], dtype=torch.int32))
    assert [group.first for group in apart.groups] == [4, 5, 6] and apart.used is None
