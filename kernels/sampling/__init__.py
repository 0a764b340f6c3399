"""Sampling in Triton: raw logits to token ids and log-probabilities, rows split over programs, no sort.

The rules, their order and formulas are those of `kernels.reference.sampling`. Per row of V logits of e bytes, `sample`
reads V e bytes once for a greedy row, once more for one that is sampled from all tokens or from the top_p of all, and
three times where filters keep very many; with penalties also 4 V of counts, and with any rule that changes logits it
writes them once in float32 and reads those from then on. Log-probabilities read V e once more. Launches and grids
follow from the number of rows and from what the host knows of them, never from a value, and nothing waits for the
device: `sample` can be captured in a CUDA graph. Filters want a scratch of 8 V bytes per row, mostly never touched.
"""

import torch
from torch import Tensor

from kernels._checks import check_tensors, require
from kernels.sampling.draw import choose_kernel, finish_kernel, scan_kernel
from kernels.sampling.filters import BINS, count_kernel
from kernels.sampling.logprobs import Draw, compute_logprobs
from kernels.sampling.plan import plan_kernel
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
        logprobs = None if rows.num_logprobs < 0 else compute_logprobs(rules, token_ids, rows.num_logprobs)
        return Sampled(token_ids, is_bad, logprobs)

    tiling = Tiling.of(num_rows, vocab)
    per_split = (num_rows, tiling.splits)
    num_groups = tiling.splits * tiling.tiles_per_split * tiling.tile // 32
    filters = rows.any_filter and not rows.all_greedy
    keeps = any(flags.values()) and not (rows.all_greedy and not rows.any_processed)

    def scratch(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.empty(shape, dtype=dtype, device=device)

    maxima, best_scores = scratch(2, *per_split)
    argmaxima, best_ids = scratch(2, *per_split, dtype=torch.int32)
    group_maxima = scratch(num_rows, num_groups)
    changed = scratch(num_rows, vocab if keeps else 0)
    histogram = scratch(num_rows, BINS.value, dtype=torch.int32)
    totals = scratch(num_rows, 2, dtype=torch.int64)
    num_candidates, is_few = scratch(2, num_rows, dtype=torch.int32)
    candidates = scratch(num_rows, vocab if filters else 0, dtype=torch.int64)
    cuts = scratch(num_rows, dtype=torch.int64)

    walk = {"splits": tiling.splits, "tiles": tiling.tiles_per_split, "VOCAB": vocab, "TILE": tiling.tile}
    options = {"num_warps": 4, "enable_fp_fusion": False}
    row_options = {"num_warps": 8, "enable_fp_fusion": False}
    sizes = {"MAX_SPLITS": tiling.max_splits, "ID_BITS": tiling.id_bits}
    scan_kernel[per_split](
        rules,
        maxima,
        argmaxima,
        group_maxima,
        changed,
        histogram,
        totals,
        num_candidates,
        **walk,
        keeps=int(keeps),
        **flags,
        **options,
    )
    source = (changed, vocab) if keeps else (logits, logits.stride(0))
    if filters:
        plan_kernel[(num_rows,)](
            rules,
            *source,
            maxima,
            group_maxima,
            scratch(num_rows, num_groups, dtype=torch.int32),
            candidates,
            num_candidates,
            is_few,
            tiling.splits,
            num_groups,
            VOCAB=vocab,
            MAX_GROUPS=tiling.max_splits * tiling.tile // 32,
            **sizes,
            **row_options,
        )
        count_kernel[per_split](
            rules,
            *source,
            maxima,
            is_few,
            histogram,
            totals,
            **walk,
            MAX_SPLITS=tiling.max_splits,
            **options,
        )
    if not rows.all_greedy:
        choose_kernel[per_split](
            rules,
            *source,
            maxima,
            is_few,
            histogram,
            totals,
            candidates,
            num_candidates,
            best_scores,
            best_ids,
            **walk,
            **sizes,
            **options,
        )
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
        has_state=int(flags["has_state"] and rows.num_logprobs < 0),
        VOCAB=vocab,
        **sizes,
        **row_options,
    )
    if rows.num_logprobs < 0:
        return Sampled(token_ids, is_bad, None)
    draw = Draw(*source, is_bad, rows.logprobs_modes, maxima, cuts, tiling.splits)
    return Sampled(
        token_ids, is_bad, compute_logprobs(rules, token_ids, rows.num_logprobs, draw, bool(flags["has_state"]))
    )


def token_logprobs(logits: Tensor, token_ids: Tensor, num_top: int) -> Logprobs:
    """See `kernels.token_logprobs`."""
    check_tensors("token_logprobs", logits=logits, token_ids=token_ids)
    require(token_ids.is_contiguous(), "token_logprobs: token_ids must be contiguous")
    unused = [token_ids] * (len(Rules._fields) - 2)
    return compute_logprobs(Rules(logits, logits.stride(0), *unused), token_ids, num_top)
