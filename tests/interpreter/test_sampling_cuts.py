"""Where top_k and top_p cut a row: sorted as on a GPU, and searched, against the definition."""

from typing import NamedTuple

import numpy as np
import pytest
import torch
import triton
import triton.language as tl

from llama.kernels.gpu.sampling import filters

# Places behind a row's candidates hold numbers that are no depths.
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")


class Cuts(NamedTuple):
    """What `find_cut` reads of the rules."""

    top_k: torch.Tensor
    top_p: torch.Tensor


@triton.jit
def _cut_kernel(cuts, candidates, counts, above, masses, out, SIZE: tl.constexpr, SORTED: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    mass, mass_above = tl.load(masses + row * 2), tl.load(masses + row * 2 + 1)
    count, num_above = tl.load(counts + row), tl.load(above + row)
    cut = filters.find_cut(cuts, row, candidates + row * SIZE, count, num_above, mass, mass_above, SORTED, False, 10)
    tl.store(out + row, cut)


def _kept(packed, top_k, top_p, num_above, mass, mass_above):
    """Those of the packed candidates that are kept, from the definition: sorted, and added up one after the other."""
    packed = np.sort(packed)
    weights = (np.exp(-(packed >> 10).astype(np.int32).view(np.float32)) * np.float32(2**40)).astype(np.int64)
    kept = np.ones(len(packed), bool)
    if 0 < top_k <= num_above + len(packed):
        kept = packed >> 10 <= packed[top_k - num_above - 1] >> 10
    if top_p < 1:
        whole = weights[kept].sum() if top_k else mass
        goal = max(int(np.float32(top_p) * np.float32(whole)), 1)
        kept &= mass_above + np.cumsum(weights) - weights < goal
    return packed[kept].tolist()


def test_sorted_and_searched_cuts_keep_the_same():
    rng, size = np.random.default_rng(0), 32
    filters_of_row = [(0, 0.9), (0, 0.3), (3, 1.0), (10, 0.7), (32, 0.5), (10**6, 0.95), (7, 0.0), (0, 0.9999999)]
    candidates = np.full((32, size), -1, np.int64)  # what lies behind a row's candidates must not be looked at
    rows = []
    for row in range(32):
        top_k, top_p = filters_of_row[row // 4]
        depths = rng.exponential(1 + row % 4 * 4, [1, 5, 16, 32][row % 4]).astype(np.float32)  # some weigh nothing
        depths = np.round(depths * 2) / 2 if row % 3 == 0 else depths  # equals
        ids = rng.permutation(1024)[: len(depths)]
        candidates[row, : len(depths)] = depths.view(np.int32).astype(np.int64) << 10 | ids
        num_above = row % 3 if top_p == 1 or top_k == 0 else 0
        mass_above = num_above * 2**40
        mass = mass_above + int((np.exp(-depths) * 2**40).astype(np.int64).sum()) + row * 2**35
        rows.append((len(depths), top_k, top_p, num_above, mass, mass_above))
    counts, top_k, top_p, num_above, *masses = zip(*rows, strict=True)
    cuts = Cuts(torch.tensor(top_k, dtype=torch.int32), torch.tensor(top_p))
    counts, num_above = (torch.tensor(each, dtype=torch.int32) for each in (counts, num_above))
    inputs = cuts, torch.from_numpy(candidates), counts, num_above, torch.tensor(masses).T.contiguous()
    for sorted_size in (0, 16):
        out = torch.empty(32, dtype=torch.int64)
        _cut_kernel[(32,)](*inputs, out, SIZE=size, SORTED=sorted_size)
        for row, (count, *rest) in enumerate(rows):
            packed = candidates[row, :count]
            assert np.sort(packed[packed <= out[row].item()]).tolist() == _kept(packed, *rest), (sorted_size, row)
