"""Sequences in runs that begin where positions are multiples of the most that a run may have."""

import numpy as np
import pytest

from llama.engine.plan import aligned_runs


@pytest.mark.parametrize("most", [1, 2, 16])
def test_runs_are_the_tokens_cut_at_multiples(most):
    generator = np.random.default_rng(most)
    contexts = generator.integers(1, 80, 50).astype(np.int32)
    lens = (1 + generator.integers(0, contexts)).astype(np.int32)
    seqs, counts, ends = aligned_runs(lens, contexts, most)
    assert seqs.dtype == counts.dtype == ends.dtype == np.int32
    naive = []
    for seq, (count, context) in enumerate(zip(lens.tolist(), contexts.tolist(), strict=True)):
        start = context - count
        for position in range(start, context):
            if position == start or position % most == 0:
                naive.append([seq, 0, 0])
            naive[-1][1] += 1
            naive[-1][2] = position + 1
    assert np.stack([seqs, counts, ends], axis=1).tolist() == naive
