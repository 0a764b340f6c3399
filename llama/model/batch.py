"""Batch: one step as flat tensors, the only thing that layers see of the engine.

Tokens of all sequences lie behind one another, ragged, without padding and without a batch dimension. Sequences that
compute a single token at the end of their context (decodes) come first, so that attention can treat them apart.
"""

from dataclasses import dataclass

from torch import Tensor

from llama.kernels.types import Ragged
from llama.model.adapters import StepAdapters


@dataclass(frozen=True, slots=True)
class Batch:
    """One step's input."""

    token_ids: Tensor  # [tokens] int64
    positions: Tensor  # [tokens] int64, absolute position of each token in its sequence
    ragged: Ragged  # whose each token is, and where K and V lie
    logit_rows: Tensor | None = None  # [rows] int64, tokens whose logits are wanted (repeats allowed); None = all
    adapters: StepAdapters | None = None  # which LoRA adapter each token uses; None = no token has one
