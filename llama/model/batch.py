"""Batch: the flat tensors of one step, the only thing that layers see of the engine.

Tokens of all sequences lie behind one another, ragged, without padding and without a batch dimension. Sequences that
compute a single token at the end of their context (decodes) come first, so that attention can treat them apart.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from llama.model.lora.slots import AdapterUse, LoraSlots


@dataclass(frozen=True, slots=True)
class Batch:
    """One step's input. `slots` are flat indices into the paged cache (block id * block size + offset)."""

    token_ids: torch.Tensor  # [tokens] int64
    positions: torch.Tensor  # [tokens] int64, absolute position of each token in its sequence
    slots: torch.Tensor  # [tokens] int64, where each token's K and V go; -1 = padding, nothing is stored
    query_starts: torch.Tensor  # [seqs + 1] int32, sequence s owns tokens query_starts[s] : query_starts[s + 1]
    context_lens: torch.Tensor  # [seqs] int32, tokens of the sequence whose K/V exist once this step has stored its own
    block_tables: torch.Tensor  # [seqs, max_blocks] int32, entries past a sequence's context are arbitrary valid ids
    num_decodes: int  # the first num_decodes sequences have exactly one query token
    max_query_len: int
    max_context_len: int  # an upper bound; grids must not depend on it
    logit_rows: torch.Tensor | None = None  # [rows] int64, tokens whose logits are wanted (repeats allowed); None = all
    adapter_slots: torch.Tensor | None = None  # [tokens] int32, LoRA slot of each token, 0 = none; None = no adapter
    adapters: "LoraSlots | None" = None  # what the slots hold

    def adapter_use(self, rows: torch.Tensor | None = None) -> "AdapterUse | None":
        """The adapters of the tokens `rows` (None = all); None where none of the batch has one."""
        if self.adapters is None or self.adapter_slots is None:
            return None
        return self.adapters.use(self.adapter_slots if rows is None else self.adapter_slots.index_select(0, rows))
