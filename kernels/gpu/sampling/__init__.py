"""Sampling in Triton: raw logits to token ids and log-probabilities, rows split over programs, no sort of a row.

The rules, their order and formulas are those of `llama.kernels.cpu.sampling`. Per row of V logits of e bytes, `sample`
reads V e bytes once for a greedy row, once more for one that is sampled from all tokens or from the top_p of all, and
three times where filters keep very many; with penalties also 4 V of counts, and with any rule that changes logits it
writes them once in float32 and reads those from then on. Log-probabilities read V e once more. It launches 2 kernels
where all rows are greedy, else 3, with filters 5, and 2 more for log-probabilities: this and the grids follow from the
number of rows and from what the host knows of them, never from a value, and nothing waits for the device, so a CUDA
graph can hold it. Filters want a scratch of 8 V bytes per row, mostly never touched.
"""

import torch
from torch import Tensor

from llama.kernels.checks import check_tensors, require
from llama.kernels.gpu.launch import Launcher
from llama.kernels.gpu.sampling.draw import choose_kernel, finish_kernel, scan_kernel
from llama.kernels.gpu.sampling.few_groups import few_groups_kernel
from llama.kernels.gpu.sampling.filters import count_kernel
from llama.kernels.gpu.sampling.logprobs import Draw, compute_logprobs
from llama.kernels.gpu.sampling.rules import TILE, Rules, gather_rules, id_bits, max_splits, sort_size, split_rows
from llama.kernels.gpu.sampling.work import Work
from llama.kernels.logprobs import Logprobs
from llama.kernels.types import Sampled, SamplerRows, SamplerState

_INTEGERS = ("penalty_rows", "keys", "top_k", "bias_starts", "bias_ids", "mask")
_FLOATS = (
    "temperature",
    "top_p",
    "min_p",
    "repetition_penalty",
    "frequency_penalty",
    "presence_penalty",
    "bias_values",
)


_launch_scan = Launcher(scan_kernel)
_launch_few_groups = Launcher(few_groups_kernel)
_launch_count = Launcher(count_kernel)
_launch_choose = Launcher(choose_kernel)
_launch_finish = Launcher(finish_kernel)


def _check(logits: Tensor, rows: SamplerRows, state: SamplerState | None) -> None:
    tensors = {name: getattr(rows, name) for name in (*_INTEGERS, *_FLOATS) if getattr(rows, name) is not None}
    if rows.any_penalty:
        if state is None:
            raise ValueError("sample: rows with penalties need a SamplerState")
        tensors |= {"prompt_mask": state.prompt_mask, "counts": state.counts}
        sizes = f"{logits.shape[1]} logits per row, {state.counts.shape[1]} counts per penalty row"
        require(state.counts.shape[1] == logits.shape[1], f"sample: {sizes}")
    check_tensors("sample", logits=logits, modes=rows.logprobs_modes, **tensors)
    for name, tensor in tensors.items():
        dtype = torch.float32 if name in _FLOATS else torch.int32
        require(tensor.dtype == dtype, f"sample: {name} must be {dtype}, got {tensor.dtype}")
        require(tensor.is_contiguous(), f"sample: {name} must be contiguous")


def sample(logits: Tensor, rows: SamplerRows, state: SamplerState | None = None) -> Sampled:
    """See `ops.sample`."""
    _check(logits, rows, state)
    num_rows, vocab = logits.shape
    rules, flags = gather_rules(logits, rows, state)
    keeps = any(flags.values()) and not (rows.all_greedy and not rows.any_processed)
    filters = rows.any_filter and not rows.all_greedy
    splits, tiles = split_rows(num_rows, vocab)
    num_groups = splits * tiles * TILE // 32
    work = Work.allocate(logits, splits, num_groups, keeps=keeps, filters=filters)
    source = (work.changed, vocab) if keeps else (logits, logits.stride(0))

    if num_rows > 0:
        per_split, per_row = (num_rows, splits), (num_rows,)
        sizes = {"VOCAB": vocab, "enable_fp_fusion": False}
        most, bits = {"MAX_SPLITS": max_splits(vocab)}, {"ID_BITS": id_bits(vocab)}
        walk = sizes | {"TILE": TILE, "num_warps": 4}
        whole = sizes | most | bits | {"SORTED": sort_size(vocab), "num_warps": 8}
        # Where log-probabilities are wanted, they are taken before a token is counted.
        counts_here = int(flags["has_state"] and rows.num_logprobs < 0)
        _launch_scan(per_split, rules, work, splits, tiles, int(keeps), *flags.values(), **walk)
        if filters:
            groups = {"MAX_GROUPS": max_splits(vocab) * TILE // 32}
            _launch_few_groups(per_row, rules, work, *source, splits, num_groups, counts_here, **groups, **whole)
            _launch_count(per_split, rules, work, *source, splits, tiles, **most, **walk)
        if not rows.all_greedy:
            _launch_choose(per_split, rules, work, *source, splits, tiles, **most, **bits, **walk)
        _launch_finish(per_row, rules, work, splits, counts_here, **whole)

    logprobs = None
    if rows.num_logprobs >= 0:
        draw = Draw(*source, work.is_bad, rows.logprobs_modes, work.maxima, work.cuts)
        logprobs = compute_logprobs(
            rules, work.token_ids, rows.num_logprobs, draw, splits, counts=bool(flags["has_state"])
        )
    return Sampled(work.token_ids, work.is_bad, logprobs)


def token_logprobs(logits: Tensor, token_ids: Tensor, num_top: int) -> Logprobs[Tensor]:
    """See `ops.token_logprobs`."""
    check_tensors("token_logprobs", logits=logits, token_ids=token_ids)
    require(token_ids.is_contiguous(), "token_logprobs: token_ids must be contiguous")
    unused = [token_ids] * (len(Rules._fields) - 2)
    return compute_logprobs(Rules(logits, logits.stride(0), *unused), token_ids, num_top)
