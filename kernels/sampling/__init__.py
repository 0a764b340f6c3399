"""Sampling in Triton: raw logits to token ids and log-probabilities, rows split over programs, no sort.

The rules, their order and formulas are those of `kernels.reference.sampling`. Per row of V logits of e bytes, `sample`
reads V e bytes once for a greedy row, twice for a sampled one and three times for one with filters, as often 4 V of
counts where it has a penalty and V / 8 for each mask; log-probabilities read V e once more. Launches and grids follow
from the number of rows and from what the host knows of them, never from a value, and nothing waits for the device:
`sample` can be captured in a CUDA graph. Filters want a scratch of 8 V bytes per row, most of it never touched.
"""

import torch
from torch import Tensor

from kernels._checks import check_tensors, require
from kernels.sampling.draw import choose_kernel, finish_kernel, scan_kernel
from kernels.sampling.filters import BINS, count_kernel
from kernels.sampling.logprobs import Draw, compute_logprobs
from kernels.sampling.rules import Rules, Tiling, gather_rules
from kernels.types import Logprobs, Sampled, SamplerRows, SamplerState

_INTEGERS = ("slots", "keys", "top_k", "bias_starts", "bias_ids", "mask")
_FLOATS = (
    "temperature",
    "top_p",
    "min_p",
    "repetition_penalty",
    "frequency_penalty",
    "presence_penalty",
    "bias_values",
)


def _check(logits: Tensor, rows: SamplerRows, state: SamplerState | None) -> None:
    tensors = {name: getattr(rows, name) for name in (*_INTEGERS, *_FLOATS) if getattr(rows, name) is not None}
    if rows.any_penalty:
        require(state is not None, "sample: rows with penalties need a SamplerState")
        tensors |= {"prompt_mask": state.prompt_mask, "counts": state.counts}
        sizes = f"{logits.shape[1]} logits per row, {state.counts.shape[1]} counts per slot"
        require(state.counts.shape[1] == logits.shape[1], f"sample: {sizes}")
    check_tensors("sample", logits=logits, modes=rows.logprobs_modes, **tensors)
    for name, tensor in tensors.items():
        dtype = torch.float32 if name in _FLOATS else torch.int32
        require(tensor.dtype == dtype, f"sample: {name} must be {dtype}, got {tensor.dtype}")
        require(tensor.is_contiguous(), f"sample: {name} must be contiguous")


def sample(logits: Tensor, rows: SamplerRows, state: SamplerState | None) -> Sampled:
    """See `kernels.sample`."""
    _check(logits, rows, state)
    (num_rows, vocab), device = logits.shape, logits.device
    token_ids = torch.empty(num_rows, dtype=torch.int64, device=device)
    is_bad = torch.empty(num_rows, dtype=torch.bool, device=device)
    rules, flags = gather_rules(logits, rows, state)
    if num_rows == 0:
        return Sampled(token_ids, is_bad, _logprobs(rules, token_ids, rows, None, flags))

    tiling = Tiling.of(num_rows, vocab)
    per_split = (num_rows, tiling.splits)
    maxima, best_scores = torch.empty(2, *per_split, dtype=torch.float32, device=device)
    argmaxima, best_ids = torch.empty(2, *per_split, dtype=torch.int32, device=device)
    histogram = torch.empty(num_rows, BINS.value, dtype=torch.int32, device=device)
    totals = torch.empty(num_rows, 2, dtype=torch.int64, device=device)
    num_candidates = torch.empty(num_rows, dtype=torch.int32, device=device)
    candidates = torch.empty(num_rows, vocab if rows.any_filter else 0, dtype=torch.int64, device=device)
    cuts = torch.empty(num_rows, dtype=torch.int64, device=device)

    walk = {"splits": tiling.splits, "tiles": tiling.tiles_per_split, **flags, "VOCAB": vocab, "TILE": tiling.tile}
    # Five programs of 4 warps then share a multiprocessor, enough to have many loads in flight, and nothing spills.
    options = {"num_warps": 4, "enable_fp_fusion": False, "maxnreg": 96}
    row_constants = {"MAX_SPLITS": tiling.max_splits, "ID_BITS": tiling.id_bits}
    scan_kernel[per_split](rules, maxima, argmaxima, histogram, totals, num_candidates, **walk, **options)
    if rows.any_filter and not rows.all_greedy:
        count_kernel[per_split](rules, maxima, histogram, totals, **walk, MAX_SPLITS=tiling.max_splits, **options)
    if not rows.all_greedy:
        choose_kernel[per_split](
            rules,
            maxima,
            histogram,
            totals,
            candidates,
            num_candidates,
            best_scores,
            best_ids,
            **walk,
            **row_constants,
            **options,
        )
    counts_here = flags["has_state"] and rows.num_logprobs < 0
    finish_kernel[(num_rows,)](
        rules,
        maxima,
        argmaxima,
        histogram,
        totals,
        candidates,
        num_candidates,
        best_scores,
        best_ids,
        token_ids,
        is_bad,
        cuts,
        splits=tiling.splits,
        has_state=int(counts_here),
        VOCAB=vocab,
        **row_constants,
        num_warps=8,
        enable_fp_fusion=False,
    )
    draw = Draw(is_bad, rows.logprobs_modes, maxima, cuts, tiling.splits)
    return Sampled(token_ids, is_bad, _logprobs(rules, token_ids, rows, draw, flags))


def _logprobs(
    rules: Rules, token_ids: Tensor, rows: SamplerRows, draw: Draw | None, flags: dict[str, int]
) -> Logprobs | None:
    if rows.num_logprobs < 0:
        return None
    return compute_logprobs(rules, token_ids, rows.num_logprobs, draw, flags)


def token_logprobs(logits: Tensor, token_ids: Tensor, num_top: int) -> Logprobs:
    """See `kernels.token_logprobs`."""
    check_tensors("token_logprobs", logits=logits, token_ids=token_ids)
    require(token_ids.is_contiguous(), "token_logprobs: token_ids must be contiguous")
    unused = [token_ids] * (len(Rules._fields) - 2)
    return compute_logprobs(Rules(logits, logits.stride(0), *unused), token_ids, num_top)
