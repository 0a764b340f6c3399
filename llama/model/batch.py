"""Batch: one step as flat tensors, the only thing that layers see of the engine.

Tokens of all sequences lie behind one another, ragged, without padding and without a batch dimension. Sequences that
compute a single token at the end of their context (decodes) come first, so that attention can treat them apart.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from llama.kernels.types import Ragged
from llama.model.adapters import StepAdapters
from llama.model.taps import StepTaps


@dataclass(frozen=True, kw_only=True)
class Batch(Ragged):
    """One step's input: Ragged says which tokens belong to which sequence and where their K and V lie."""

    token_ids: Tensor  # [tokens] int64
    positions: Tensor  # [tokens] int64, absolute position of each token in its sequence
    logit_rows: Tensor | None = None  # [rows] int64, tokens whose logits are wanted (repeats allowed); None = all
    adapters: StepAdapters | None = None  # which LoRA adapter each token uses; None = no token has one
    taps: StepTaps | None = None  # what is read and changed on the way; None = nothing
    is_plain: bool = False  # nothing is computed in fewer kernels, not even where a layer could (llama/model/fused.py)


def rectangle(
    token_ids: Tensor,
    start: int,
    num_blocks: int,
    block_size: int,
    *,
    adapters: StepAdapters | None = None,
    taps: StepTaps | None = None,
) -> Batch:
    """Tokens [rows, length] of equally long sequences, from position `start` on: sequence r owns the r-th run of
    `num_blocks` blocks of a cache."""
    rows, length = token_ids.shape
    device, stop = token_ids.device, start + length
    row = torch.arange(rows, device=device)
    positions = torch.arange(start, stop, device=device)
    return Batch(
        token_ids=token_ids.flatten(),
        positions=positions.repeat(rows),
        block_tables=torch.arange(rows * num_blocks, dtype=torch.int32, device=device).view(rows, num_blocks),
        query_starts=torch.arange(0, rows * length + 1, length, dtype=torch.int32, device=device),
        context_lens=torch.full((rows,), stop, dtype=torch.int32, device=device),
        slots=(row[:, None] * (num_blocks * block_size) + positions).flatten(),
        num_decodes=rows if length == 1 else 0,
        block_size=block_size,
        adapters=adapters,
        taps=taps,
    )
