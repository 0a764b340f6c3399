"""Checks are made once for each kind of call: a call that fits must not let one pass that does not."""

from dataclasses import replace

import pytest
import torch

from llama.kernels import ops
from llama.kernels.types import KVLayer, Ragged

HEADS, KV_HEADS, DIM, BLOCK = 4, 2, 16, 4


def rows(size, tokens=3, dtype=torch.float32, width=None):
    return torch.ones(tokens, width or size, dtype=dtype)[:, :size]


def spread(tensor):
    """The same values, two apart."""
    return tensor.repeat_interleave(2, -1)[..., ::2]


def paged(dtype=torch.float32, block_size=BLOCK, dim=DIM, kv_heads=KV_HEADS):
    return KVLayer(*torch.ones(2, 3, block_size, kv_heads, dim, dtype=dtype))


def decodes(tokens=3, block_size=BLOCK, device="cpu"):
    starts, lens = torch.arange(tokens + 1, dtype=torch.int32), torch.full((tokens,), 2, dtype=torch.int32)
    tables, slots = torch.zeros(tokens, 1, dtype=torch.int32), torch.arange(tokens)
    tensors = (tensor.to(device) for tensor in (tables, starts, lens, slots))
    return Ragged(*tensors, num_decodes=tokens, block_size=block_size)


def heads(count=HEADS, tokens=3, dim=DIM, dtype=torch.float32):
    return torch.ones(tokens, count, dim, dtype=dtype)


def angles(tokens=3, dim=DIM, dtype=torch.float32):
    return torch.ones(tokens, 1, dim, dtype=dtype)


HALF = torch.float16
META = {"device": "meta"}

# Per op: what fits, and by name of an argument what does not in its place.
CALLS = {
    "rms_norm": (
        {"x": rows(8), "weight": torch.ones(8), "eps": 1e-5},
        {
            "x": [rows(9), rows(8)[None], rows(8, dtype=HALF), rows(8, dtype=torch.float64), spread(rows(8))],
            "weight": [torch.ones(9), torch.ones(1, 8), torch.ones(8, dtype=HALF), torch.ones(8, **META)],
        },
    ),
    "add_rms_norm": (
        {"x": rows(8), "residual": rows(8), "weight": torch.ones(8), "eps": 1e-5},
        {
            "x": [rows(8, 2), rows(9), rows(8, dtype=HALF), spread(rows(8))],
            "residual": [rows(8, 2), rows(9), rows(8, dtype=HALF), spread(rows(8)), torch.ones(3, 8, **META)],
            "weight": [torch.ones(9), torch.ones(8, dtype=HALF), spread(torch.ones(8))],
        },
    ),
    "silu_mul": (
        {"gate_up": rows(8)},
        {"gate_up": [rows(7), rows(8)[None], rows(8, dtype=torch.float64), spread(rows(8))]},
    ),
    "rope_and_store": (
        {
            "q": heads(),
            "k": heads(KV_HEADS),
            "v": heads(KV_HEADS),
            "cos_sin": (angles(), angles()),
            "kv_layer": paged(),
            "ragged": decodes(),
        },
        {
            "q": [heads(tokens=2), heads(dim=32), heads(dtype=HALF), spread(heads()), heads(dim=15)],
            "k": [heads(KV_HEADS, 2), heads(1), heads(KV_HEADS, dim=8), spread(heads(KV_HEADS))],
            "v": [heads(KV_HEADS, 2), heads(1), spread(heads(KV_HEADS)), heads(KV_HEADS, dtype=torch.float64)],
            "cos_sin": [
                (angles(2), angles(2)),
                (angles(), angles(dim=8)),
                (angles(dtype=HALF), angles()),
                (angles(), angles(dim=2 * DIM)[..., ::2]),
                (angles(), angles().to("meta")),
            ],
            "kv_layer": [paged(HALF), paged(dim=8), paged(kv_heads=4)],
            "ragged": [decodes(2), replace(decodes(), slots=torch.arange(3, **META))],
        },
    ),
    "paged_attention": (
        {"q": heads(), "kv_layer": paged(), "ragged": decodes(), "scale": 0.25},
        {
            "q": [heads(dim=32), heads(3), heads(dtype=HALF), spread(heads())],
            "kv_layer": [paged(HALF), paged(dim=8), paged(kv_heads=3), paged(block_size=2)],
            "ragged": [decodes(block_size=2), decodes(device="meta")],
            "scale": [0.0, -1.0],
        },
    ),
}
WRONG = [
    (op, name, index)
    for op, (_, others) in CALLS.items()
    for name, found in others.items()
    for index in range(len(found))
]


@pytest.mark.parametrize(("op", "name", "index"), WRONG)
def test_what_does_not_fit_is_refused_after_a_call_that_did(op, name, index):
    fits, others = CALLS[op]
    getattr(ops, op)(**fits)
    with pytest.raises(ValueError, match=f"^{op}: "):
        getattr(ops, op)(**fits | {name: others[name][index]})
    getattr(ops, op)(**fits)


def test_rows_with_gaps_between_them_are_another_kind():
    x, weight = torch.randn(3, 8, generator=torch.Generator().manual_seed(0)), torch.ones(8)
    with_gaps = torch.full((3, 16), torch.nan)
    with_gaps[:, :8] = x
    assert torch.equal(ops.rms_norm(with_gaps[:, :8], weight, 1e-5), ops.rms_norm(x, weight, 1e-5))
    assert torch.equal(ops.silu_mul(with_gaps[:, :8]), ops.silu_mul(x))
    other_eps = torch.nn.functional.rms_norm(x, (8,), weight, 1.0)
    torch.testing.assert_close(ops.rms_norm(x, weight, 1.0), other_eps, rtol=1e-6, atol=1e-6)
