"""Log-probabilities of one token per row and of the row's best tokens."""

import torch
from torch import Tensor

from llama.kernels.cpu.sampling.blocks import Blocks, leading, top_k_bound
from llama.kernels.logprobs import Logprobs
from llama.kernels.types import wide_dtype

ELEMENTS_AT_ONCE = 2**21  # logits worked on at once: enough that the cost of a call vanishes, 8 MB of float32


def token_logprobs(logits: Tensor, token_ids: Tensor, num_top: int) -> Logprobs[Tensor]:
    """Log-softmax of logits [rows, vocab] at token_ids [rows] and at each row's num_top largest, ties by lower id.

    Computed in float32, or float64 for float64 logits, a few rows at a time.
    """
    answer = no_logprobs(logits, num_top)
    for start, stop in row_ranges(logits):
        blocks = Blocks.of(logits[start:stop].to(wide_dtype(logits.dtype)))
        chosen_ids = token_ids[start:stop, None]
        logprobs, chosen = blocks.logits.log_softmax(1), blocks.logits.gather(1, chosen_ids)
        answer.logprob[start:stop] = logprobs.gather(1, chosen_ids).squeeze(1)
        row, block = (blocks.peaks > chosen).nonzero(as_tuple=True)
        greater = (blocks.read(row, block) > chosen[row]).sum(1)
        answer.rank[start:stop] = torch.ones_like(chosen_ids[:, 0]).index_add_(0, row, greater)
        if num_top:
            top_k = torch.full_like(chosen_ids[:, 0], num_top)
            bound = top_k_bound(blocks, blocks.peaks, top_k, _as_they_are)
            ids = leading(blocks, blocks.peaks, bound, _as_they_are)[0][:, :num_top]
            answer.top_ids[start:stop, : ids.shape[1]] = ids
            top = logprobs.gather(1, ids.clamp_min(0)).masked_fill_(ids < 0, -torch.inf)
            answer.top_logprobs[start:stop, : ids.shape[1]] = top
    return answer


def no_logprobs(logits: Tensor, num_top: int) -> Logprobs[Tensor]:
    num_rows, dtype, device = len(logits), wide_dtype(logits.dtype), logits.device
    return Logprobs(
        torch.zeros(num_rows, dtype=dtype, device=device),
        torch.zeros(num_rows, dtype=torch.int64, device=device),
        torch.full((num_rows, num_top), -1, dtype=torch.int64, device=device),
        torch.full((num_rows, num_top), -torch.inf, dtype=dtype, device=device),
    )


def row_ranges(logits: Tensor) -> list[tuple[int, int]]:
    """Row ranges of about ELEMENTS_AT_ONCE logits."""
    num_rows, vocab = logits.shape
    step = max(1, ELEMENTS_AT_ONCE // vocab)
    return [(start, min(start + step, num_rows)) for start in range(0, num_rows, step)]


def _as_they_are(logits: Tensor, row: Tensor | slice) -> Tensor:
    return logits
