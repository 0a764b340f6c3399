"""Logits changed between network and sampler for single requests: guidance, and functions of a request's own."""

import logging
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from llama.api.errors import is_failure
from llama.engine.plan import Plan, Processed
from llama.kernels import ops
from llama.kernels.cpu.sampling.rules import adjust
from llama.kernels.logprobs import Logprobs
from llama.kernels.types import LOGPROBS_RAW, Sampled, SamplerRows, SamplerState, wide_dtype
from llama.model.autocast import ordinary
from llama.model.communicator import Communicator

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class ChangedLogits:
    """What to draw from, by which rules, and the samples that a function has broken."""

    logits: Tensor
    rows: SamplerRows
    broken: frozenset[int]


def change_logits(
    logits: Tensor,
    rows: SamplerRows,
    state: SamplerState | None,
    plan: Plan,
    communicator: Communicator | None = None,
) -> ChangedLogits:
    """Of logits [samples + guided, vocab], those behind negative prompts last.

    Guidance comes first: log-probabilities p of the prompt and n of the negative prompt become scale * (p - n) + n, as
    transformers' UnbatchedClassifierFreeGuidanceLogitsProcessor has it. Functions get a row behind bias, penalties and
    masks, and what is masked stays so. Of ranks that share a model, rank 0 has the functions.
    """
    count = len(plan.sample_rows)
    changed = logits[:count].to(wide_dtype(logits.dtype), copy=True)
    if plan.guided:
        at = torch.tensor([guided.sample for guided in plan.guided], device=logits.device)
        scales = changed.new_tensor([guided.scale for guided in plan.guided])[:, None]
        said, other = _log_softmax(changed[at]), _log_softmax(logits[count:].to(changed.dtype))
        changed[at] = scales * (said - other) + other
    broken = set()
    if plan.processed:
        adjusted = adjust(changed, rows, state)  # plain PyTorch on every device: Python goes on with it
        at = torch.tensor([one.sample for one in plan.processed], device=logits.device)
        processed = adjusted[at]
        for place, one in enumerate(plan.processed if communicator is None or communicator.shard.rank == 0 else ()):
            row = _processed(one, adjusted[one.sample].clone())
            if row is None:
                broken.add(one.sample)
            processed[place] = torch.nan if row is None else row
        changed[at] = processed if communicator is None else communicator.spread(processed)
        rows = _without_rules(rows, at)
    return ChangedLogits(changed, rows, frozenset(broken))


def _log_softmax(logits: Tensor) -> Tensor:
    """Of each row, with the same bits in any place: on CUDA the order of its sum depends on where it begins among 16
    bytes."""
    if logits.shape[1] * logits.element_size() % 16 == 0:
        return logits.log_softmax(-1)
    return torch.stack([row.clone().log_softmax(-1) for row in logits])


def _processed(one: Processed, row: Tensor) -> Tensor | None:
    """The row behind the functions; None, and a line in the log, where one of them fails."""
    shape, dtype, masked = row.shape, row.dtype, row == -torch.inf
    prompt = one.prompt.tolist()
    try:
        for function in one.functions:
            with ordinary():
                row = function(prompt, one.output_token_ids, row.clone())
            if not isinstance(row, Tensor) or row.shape != shape or row.dtype != dtype:
                found = f"{row.dtype} {list(row.shape)}" if isinstance(row, Tensor) else type(row).__name__
                raise ValueError(f"{function} must give {dtype} {list(shape)}, got {found}")
            row = row.detach().to(masked.device).masked_fill(masked, -torch.inf)
            if not bool(row.max().isfinite()):
                raise ValueError(f"{function} gave NaN, infinity or no finite logit")
    except BaseException as error:  # the caller's function: whatever it raises is the end of its own request
        if not is_failure(error):
            raise
        logger.exception("request %s: one of its logits_processors failed; it ends with an error", one.request_id)
        return None
    return row


def _without_rules(rows: SamplerRows, at: Tensor) -> SamplerRows:
    """Without the bias and the penalties of the rows `at`, whose logits have them already. Tokens are still counted."""

    def with_value(values: Tensor, value: float) -> Tensor:
        return values.index_fill(0, at, value)

    changes: dict[str, Any] = {
        "repetition_penalty": with_value(rows.repetition_penalty, 1.0),
        "frequency_penalty": with_value(rows.frequency_penalty, 0.0),
        "presence_penalty": with_value(rows.presence_penalty, 0.0),
    }
    if rows.bias_starts is not None and rows.bias_values is not None:
        kept = with_value(torch.ones(len(rows), device=at.device), 0.0).bool()
        of_row = torch.repeat_interleave(rows.bias_starts.diff().long())
        changes["bias_values"] = rows.bias_values.where(kept[of_row], 0.0)
    return replace(rows, **changes)


def with_raw_logprobs(sampled: Sampled, rows: SamplerRows, logits: Tensor) -> Sampled:
    """Raw log-probabilities are those of the logits as the network gave them."""
    at = (rows.logprobs_modes == LOGPROBS_RAW).nonzero().squeeze(1)
    if sampled.logprobs is None or not at.numel():
        return sampled
    found = ops.token_logprobs(logits[at], sampled.token_ids[at], rows.num_logprobs)
    pairs = zip(sampled.logprobs, found, strict=True)
    return replace(sampled, logprobs=Logprobs(*(whole.index_copy(0, at, part) for whole, part in pairs)))
