"""Decodes that rotate and store their own tokens, in the interpreter."""

from dataclasses import replace

import pytest
import torch

from llama.kernels.gpu import attention
from llama.kernels.gpu.attention import decode, paged_attention, rotate_and_attend, split
from llama.kernels.gpu.launch import Kinds
from llama.kernels.gpu.rope import rope_and_store
from llama.kernels.types import KVLayer
from tests.paged_attention import make_problem, projected


@pytest.mark.parametrize(("dtype", "head_dim"), [(torch.float32, 16), (torch.float16, 24)], ids=str)
def test_decodes_that_rotate_and_store_their_tokens(dtype, head_dim, monkeypatch):
    """The bits of rope_and_store, and then of the decodes, in the cache too; and other steps take both kernels."""
    monkeypatch.setattr(split, "MIN_CHUNK", 64)
    monkeypatch.setattr(split, "_UNROLL", decode.tl.constexpr(2))
    monkeypatch.setattr(decode, "_KINDS", Kinds())
    problem = make_problem([1] * 5, [300, 65, 0, 1, 128], num_decodes=5, dtype=dtype, heads=(4, 2), head_dim=head_dim)
    qkv, by, problem = projected(problem)
    q, k, v = qkv.split([4, 2, 2], dim=1)

    def fresh():
        return KVLayer(problem.kv_layer.k.clone(), problem.kv_layer.v.clone())

    stored = fresh()
    rotated = rope_and_store(q, k, v, by, stored, problem.ragged)
    expected = paged_attention(rotated, stored, problem.ragged, problem.scale)
    assert not torch.equal(stored.k.nan_to_num(), problem.kv_layer.k.nan_to_num())
    monkeypatch.setattr(decode, "has_room", lambda *shape, is_e4m3: True)
    monkeypatch.setattr(attention, "has_room", lambda *shape, is_e4m3: True)
    calls, counters = [], torch.zeros(10, 3, dtype=torch.int32)
    rotate = attention.rotate_and_store
    monkeypatch.setattr(attention, "rotate_and_store", lambda *a, **options: calls.append(1) or rotate(*a, **options))
    for is_disjoint, num_programs in ((True, 1), (True, 3), (True, 16), (False, 3)):
        monkeypatch.setattr(decode, "multiprocessor_count", lambda device, count=num_programs: count)
        monkeypatch.setattr(decode, "_KINDS", Kinds())
        mine, ragged = fresh(), replace(problem.ragged, is_disjoint=is_disjoint)
        out = rotate_and_attend(qkv, by, mine, ragged, problem.scale, counters)
        assert torch.equal(out, expected) and not counters[:, 2].any()
        for ours, theirs in ((mine.k, stored.k), (mine.v, stored.v)):
            assert torch.equal(ours.nan_to_num(nan=77.0), theirs.nan_to_num(nan=77.0))
    assert len(calls) == 1
