"""deterministic=True on a GPU: the same bits alone and in any crowd, chunked, preempted, cached, drafted, recorded.

In float32 over the tiny model of the equivalence matrix, in bfloat16 and with codes over shapes like a real model's.
"""

from dataclasses import replace
from functools import cache

import pytest
import torch

from llama.kernels.exact_pieces import ExactPieces
from llama.kernels.types import Runs
from llama.model.fixed_rows import fix_rows
from tests.deterministic_runs import Seen, differences, run
from tests.gpu.engines import small, tiny
from tests.test_equivalence import Case

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")]

MODELS = ("float32", "bfloat16", "int8", "int4", "fp8")


@cache
def model(kind: str):
    if kind == "float32":
        return tiny()
    made = small()
    if kind != "bfloat16":
        made.quantise(kind)
    return made


@cache
def alone(kind: str) -> Seen:
    return run(model(kind), Case(budget=4096, max_num_seqs=1, cache="off"), enforce_eager=True)


CASES = {
    "small chunks, preempted, poisoned": {"budget": 16, "preempt": True, "poison": True, "strangers": True, "lag": 1},
    "warm cache, drafts": {"cache": "warm", "drafts": "mixed", "lag": 1, "block_size": 16},
    "wrong drafts, preempted": {"drafts": "wrong", "preempt": True, "lag": 1},
    "few blocks of one": {"block_size": 1, "num_tokens": 176, "lag": 1},
    "three at a time, eager": {"max_num_seqs": 3, "drafts": "right", "lag": 1},
}


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("kind", MODELS)
def test_bits_of_a_request_alone(kind, name):
    case, eager = replace(Case(), **CASES[name]), "eager" in name
    for _ in range(2):  # the second time with what the first one recorded compiled
        seen = run(model(kind), case, answers=alone(kind), enforce_eager=eager)
        assert isinstance(model(kind).fixed, Runs)
        assert not differences(seen, alone(kind))


def test_a_cache_in_fp8():
    options = {"kv_cache_dtype": "fp8"}
    theirs = run(model("bfloat16"), Case(budget=4096, max_num_seqs=1, cache="off"), enforce_eager=True, **options)
    ours = run(model("bfloat16"), Case(budget=16, preempt=True, cache="warm", lag=1), **options)
    assert not differences(ours, theirs)


def test_a_restart():
    """Another model with the same weights finds the same pieces and the same bits."""
    made = small()
    seen = run(made, Case(budget=100, lag=1))
    assert not differences(seen, alone("bfloat16"))
    mine, theirs = ([m.pieces for m in each.modules() if hasattr(m, "pieces")] for each in (made, model("bfloat16")))
    assert mine == theirs


def test_rows_of_dense_products_have_the_same_bits_in_any_number():
    """At shapes of an 8B model, whatever sizes agreed: 1 row to thousands, in any place."""
    made = small(hidden_size=4096, intermediate_size=14336, num_attention_heads=32, num_key_value_heads=8, head_dim=128,
                 num_hidden_layers=1, vocab_size=128_256)  # fmt: skip
    fix_rows(made)
    layer = made.layers[0]
    for linear in (layer.self_attn.qkv_proj, layer.self_attn.o_proj, layer.mlp.gate_up_proj, layer.mlp.down_proj):
        assert isinstance(linear.pieces, ExactPieces)  # cuBLAS agrees with itself in pieces of one size at least
        x = torch.randn(5000, linear.in_features, device="cuda", dtype=torch.bfloat16)
        y = linear(x)
        for start, stop in ((0, 1), (4999, 5000), (17, 90), (1000, 1513), (900, 4996)):
            assert torch.equal(linear(x[start:stop]), y[start:stop])
