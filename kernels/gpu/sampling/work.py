"""What the kernels of one call of `sample` leave for one another, and what comes of it."""

from typing import NamedTuple

import torch
from torch import Tensor

from llama.kernels.gpu.sampling.filters import BINS


class Work(NamedTuple):
    """Only what a call needs has been given memory; the rest has no elements."""

    maxima: Tensor  # [rows, splits] float32, of the changed logits, NaN as infinity
    argmaxima: Tensor  # [rows, splits] int32, in greedy rows the lowest id of each maximum
    group_maxima: Tensor  # [rows, groups] float32, of 32 tokens each
    group_ids: Tensor  # [rows, groups] int32, the few groups that hold a row's candidates
    changed: Tensor  # [rows, vocab] float32, the logits after bias, penalties and mask
    histogram: Tensor  # [rows, BINS] int32, tokens per bin of depth
    totals: Tensor  # [rows, 2] int64, the mass of the row and that of the tokens surely kept
    progress: Tensor  # [rows] int32, of rows with filters: MANY, FEW or DRAWN, see `filters`
    candidates: Tensor  # [rows, vocab] int64, packed depths and ids in any order
    num_candidates: Tensor  # [rows] int32
    best_scores: Tensor  # [rows, splits] float32, noise - depth of the best token surely kept
    best_ids: Tensor  # [rows, splits] int32
    cuts: Tensor  # [rows] int64, the largest packed value kept
    token_ids: Tensor  # [rows] int64, the result
    is_bad: Tensor  # [rows] bool, the result

    @classmethod
    def allocate(cls, logits: Tensor, splits: int, groups: int, *, keeps: bool, filters: bool) -> "Work":
        """For `logits` [rows, vocab]. `keeps`: rules change them; `filters`: rows are cut by min_p, top_k or top_p."""
        rows, vocab = logits.shape
        split, group = (rows, splits), (rows, groups)

        def empty(*shape: int, dtype: torch.dtype) -> Tensor:
            return torch.empty(shape, dtype=dtype, device=logits.device)

        # No tensor is a part of another: where it began would depend on the number of rows, and Triton compiles a
        # kernel anew for addresses that are no multiples of 16.
        return cls(
            maxima=empty(*split, dtype=torch.float32),
            argmaxima=empty(*split, dtype=torch.int32),
            group_maxima=empty(*group, dtype=torch.float32),
            group_ids=empty(*group, dtype=torch.int32) if filters else empty(0, dtype=torch.int32),
            changed=empty(rows, vocab if keeps else 0, dtype=torch.float32),
            histogram=empty(rows, BINS.value, dtype=torch.int32),
            totals=empty(rows, 2, dtype=torch.int64),
            progress=empty(rows, dtype=torch.int32),
            candidates=empty(rows, vocab if filters else 0, dtype=torch.int64),
            num_candidates=empty(rows, dtype=torch.int32),
            best_scores=empty(*split, dtype=torch.float32),
            best_ids=empty(*split, dtype=torch.int32),
            cuts=empty(rows, dtype=torch.int64),
            token_ids=empty(rows, dtype=torch.int64),
            is_bad=empty(rows, dtype=torch.bool),
        )
