"""DeviceRows: what the device keeps for each row, the place of a running sequence: block table, last token, sampler's
entry. Every step, recorded or not, makes its batch and draws its tokens here.

Sampled tokens stay on the device as their row's last token, where the next step finds them; the host gets a small copy.
"""

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from llama.engine.config import EngineConfig
from llama.engine.device import Packed, to_device
from llama.engine.plan import LogprobArrays, Plan, StepResult
from llama.engine.sampler import SamplerTable
from llama.kernels import ops
from llama.kernels.types import Ragged, SamplerRows
from llama.model.batch import Batch
from llama.model.lora import LoadedAdapters
from llama.model.transformer import Transformer

# What the device is told of a step of decodes: one number per sequence, which is one per token.
DTYPES = {
    "row_ids": np.int64,
    "positions": np.int64,
    "kv_slots": np.int64,
    "context_lens": np.int32,
    "adapter_indices": np.int32,
}


class DeviceRows:
    def __init__(self, model: Transformer, config: EngineConfig, eos_token_ids: frozenset[int]) -> None:
        device, count = model.device, config.max_num_seqs
        self.nobody = count  # one more row, which padding reads and writes
        self.last_tokens = torch.zeros(count + 1, dtype=torch.int64, device=device)
        self.sampler = SamplerTable(count, model.config.vocab_size, eos_token_ids, device=device, dtype=model.dtype)
        self.adapters = LoadedAdapters(model, config.max_loras)
        self._block_size = config.block_size
        # Block tables are kept where they are needed: here to find slots, on the device for attention.
        self._table = np.zeros((count + 1, config.blocks_per_sequence), np.int32)
        self._device_table = torch.from_numpy(self._table).to(device)
        self._decode_starts = torch.arange(count + 1, dtype=torch.int32, device=device)

    def take_over(self, plan: Plan) -> None:
        """Bring all that is kept up to date with the plan."""
        for adapter in plan.adapters:
            self.adapters.put(adapter.index, adapter.content)
        rows, columns, blocks = plan.table_updates
        if len(rows):
            self._table[rows, columns] = blocks
            if self._device_table.device.type != "cpu":  # there both tables are one
                updates = to_device(plan.table_updates, self._device_table.device, np.int64)
                self._device_table.index_put_((updates[0], updates[1]), updates[2].int())
        for join in plan.joins:
            self.sampler.set_row(join.row, join.params, join.seed, join.prompt, join.output_token_ids)

    def numbers(self, plan: Plan) -> dict[str, NDArray[Any]]:
        """What `batch` needs to know of a plan, by name: see DTYPES, and where not all sequences decode query_starts
        [seqs + 1] and the token_ids of the others. The table must be up to date."""
        rows, positions, contexts = plan.rows, plan.context_lens - 1, plan.context_lens
        numbers = {"row_ids": rows, "context_lens": contexts}
        if not plan.only_decodes:
            starts = np.zeros(len(rows) + 1, np.int32)
            np.cumsum(plan.query_lens, out=starts[1:])
            seqs = np.repeat(np.arange(len(rows)), plan.query_lens)
            positions, rows = np.arange(plan.num_tokens) + (contexts - starts[1:])[seqs], rows[seqs]
            numbers |= {"query_starts": starts, "token_ids": plan.token_ids[plan.num_decodes :].astype(np.int64)}
        blocks = self._table[rows, positions // self._block_size].astype(np.int64)
        numbers |= {"positions": positions, "kv_slots": blocks * self._block_size + positions % self._block_size}
        if plan.adapter_indices is not None:
            numbers["adapter_indices"] = np.repeat(plan.adapter_indices, plan.query_lens)
        return numbers

    def batch(
        self,
        tensors: Mapping[str, Tensor],
        num_decodes: int,
        *,
        num_blocks: int | None = None,
        logit_rows: Tensor | None = None,
    ) -> Batch:
        """Of the numbers on the device. No context has more than `num_blocks` blocks, None = any that there may be."""
        row_ids = tensors["row_ids"]
        token_ids = self.last_tokens.index_select(0, row_ids[:num_decodes])
        if "token_ids" in tensors:
            token_ids = torch.cat([token_ids, tensors["token_ids"]])
        ragged = Ragged(
            block_tables=self._device_table[:, :num_blocks].index_select(0, row_ids),
            query_starts=tensors.get("query_starts", self._decode_starts[: num_decodes + 1]),
            context_lens=tensors["context_lens"],
            slots=tensors["kv_slots"],
            num_decodes=num_decodes,
            block_size=self._block_size,
        )
        return Batch(token_ids, tensors["positions"], ragged, logit_rows, tensors.get("adapter_indices"))

    def draw(self, logits: Tensor, rows: SamplerRows, row_ids: Tensor) -> Packed:
        """A token for each row of logits, kept as the last one of its row; all that the host wants to know of it."""
        sampled = ops.sample(logits, rows, self.sampler.state)
        self.last_tokens.index_copy_(0, row_ids, sampled.token_ids)
        found = sampled.logprobs
        wide = () if found is None else (found.rank, found.top_ids, found.logprob, found.top_logprobs)
        return Packed.of((sampled.token_ids, *wide, sampled.is_bad))


def fetched(draws: Packed, count: int) -> Callable[[], StepResult]:
    """Start the copy of what `draw` gave -> what waits for it and gives the first `count` rows."""
    wait = draws.fetch()

    def result() -> StepResult:
        token_ids, *wide, is_bad = (array[:count] for array in wait())
        if not wide:
            return StepResult(token_ids, is_bad)
        rank, top_ids, logprob, top_logprobs = wide
        return StepResult(token_ids, is_bad, LogprobArrays(logprob, rank, top_ids, top_logprobs))

    return result
