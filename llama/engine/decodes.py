"""GraphedDecodes: steps that only decode, as recorded graphs over tensors that never move.

A step of n sequences runs in a graph of the next larger bucket. The rows behind n are padding: they belong to the row
that is nobody's, have no context, store nothing and are drawn greedily. Model and sampler have graphs of their own, so
that their variants do not multiply; logits pass between them. Where a sampler's input has no fixed place (biases,
grammar masks) it runs without one. The model knows of none of this.

Sampled tokens stay on the device, where the next step finds them: what the host must know to start it is in its plan.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from llama.api.params import MAX_LOGPROBS
from llama.engine.device import Mirror, Packed, to_device
from llama.engine.graphs import Graphs, Record, bucket_of
from llama.engine.plan import LogprobArrays, Plan, StepResult
from llama.engine.sampler import Flags, SamplerTable
from llama.kernels import ops
from llama.kernels.types import Ragged, Sampled, SamplerRows
from llama.model.batch import Batch
from llama.model.kv_cache import KVCache
from llama.model.lora import LoadedAdapters
from llama.model.transformer import Transformer


def packed(sampled: Sampled) -> Packed:
    """All that the host wants to know of a step's draws, to be fetched in one piece."""
    logprobs = sampled.logprobs
    wide = () if logprobs is None else (logprobs.rank, logprobs.top_ids, logprobs.logprob, logprobs.top_logprobs)
    return Packed.of((sampled.token_ids, *wide, sampled.is_bad))


def fetched(draws: Packed, count: int) -> Callable[[], StepResult]:
    """Start the copy of `packed` -> what waits for it and gives the first `count` rows."""
    wait = draws.fetch()

    def result() -> StepResult:
        token_ids, *wide, is_bad = (array[:count] for array in wait())
        if not wide:
            return StepResult(token_ids, is_bad)
        rank, top_ids, logprob, top_logprobs = wide
        return StepResult(token_ids, is_bad, LogprobArrays(logprob, rank, top_ids, top_logprobs))

    return result


class GraphedDecodes:
    def __init__(
        self,
        model: Transformer,
        kv: KVCache,
        *,
        adapters: LoadedAdapters,
        sampler: SamplerTable,
        table: Tensor,  # [rows + 1, blocks] int32, the runner's, as are:
        last_tokens: Tensor,  # [rows + 1] int64
        record: Record,
    ) -> None:
        self._model, self._kv, self._adapters, self._sampler = model, kv, adapters, sampler
        self._table, self._last_tokens = table, last_tokens
        self._graphs = Graphs(record)
        self._generation = adapters.generation
        device, rows = last_tokens.device, len(last_tokens) - 1
        self._nobody = rows
        per_row = {
            "row_ids": ((), np.int64),
            "positions": ((), np.int64),
            "kv_slots": ((), np.int64),
            "context_lens": ((), np.int32),
            "adapter_slots": ((), np.int32),
        }
        fields = {name: ((rows, *shape), dtype) for name, (shape, dtype) in (per_row | sampler.fields).items()}
        self._inputs = Mirror(fields, device)
        self._query_starts = torch.arange(rows + 1, dtype=torch.int32, device=device)
        self._logits = torch.empty(rows, model.config.vocab_size, dtype=model.dtype, device=device)

    @torch.inference_mode()
    def prepare(self) -> None:
        """Record the largest step before all others, for nobody. They then find room in the memory that it leaves
        behind; in rising order each would take more, and never give it back."""
        self._fill({}, 0)
        nothing = np.zeros(0, np.int64)
        self._sampler.write(nothing, nothing, self._inputs.host)
        self._inputs.send()
        num_logprobs = min(MAX_LOGPROBS, self._logits.shape[1])
        flags = Flags(num_logprobs, any_filter=True, all_greedy=False, any_processed=True)
        for _ in range(2):
            self._run_model(self._nobody, has_adapters=False)
            self._run_sampler(self._nobody, flags)

    @staticmethod
    def takes(plan: Plan) -> bool:
        return plan.num_decodes == len(plan.rows) and plan.prompt_sources is None and not len(plan.copies)

    def launch(self, plan: Plan, kv_slots: NDArray[np.int64]) -> Callable[[], StepResult]:
        """Start the step -> what waits for its result. kv_slots [seqs] say where each token's K and V go."""
        if self._generation != self._adapters.generation:
            self._generation = self._adapters.generation
            self._graphs.forget(lambda key: key[0] == "model" and key[2])
        host, count = self._inputs.host, len(plan.rows)
        bucket = min(bucket_of(count), self._nobody)
        has_adapters = plan.adapter_slots is not None and bool(plan.adapter_slots.any())
        numbers = {"row_ids": plan.rows, "positions": plan.context_lens - 1, "context_lens": plan.context_lens}
        numbers |= {"kv_slots": kv_slots, "adapter_slots": plan.adapter_slots if has_adapters else 0}
        self._fill(numbers, count)
        # Where not all of the sampler's input has a place, there are no flags.
        flags = None if plan.masks is not None else self._sampler.write(plan.rows, plan.sample_positions, host)
        self._inputs.send()
        self._run_model(bucket, has_adapters)
        draws = self._draw_unrecorded(plan) if flags is None else self._run_sampler(bucket, flags)
        return fetched(draws, count)

    def _fill(self, numbers: dict[str, Any], count: int) -> None:
        """Put the numbers of `count` sequences to their places, and padding behind them."""
        padding = {"row_ids": self._nobody, "positions": 0, "kv_slots": -1, "context_lens": 0, "adapter_slots": 0}
        for name, neutral in padding.items():
            self._inputs.host[name][:count] = numbers.get(name, neutral)
            self._inputs.host[name][count:] = neutral

    def _run_model(self, bucket: int, has_adapters: bool) -> None:
        self._graphs.run(("model", bucket, has_adapters), partial(self._compute, bucket, has_adapters))

    def _run_sampler(self, bucket: int, flags: Flags) -> Packed:
        return self._graphs.run(("sampler", bucket, flags), partial(self._draw, bucket, flags))

    # What follows is recorded: it must depend on its arguments and on tensors that do not move, and never wait.

    def _compute(self, bucket: int, has_adapters: bool) -> None:
        inputs = {name: tensor[:bucket] for name, tensor in self._inputs.device.items()}
        ragged = Ragged(
            block_tables=self._table.index_select(0, inputs["row_ids"]),
            query_starts=self._query_starts[: bucket + 1],
            context_lens=inputs["context_lens"],
            slots=inputs["kv_slots"],
            num_decodes=bucket,
            block_size=self._kv.block_size,
        )
        batch = Batch(
            token_ids=self._last_tokens.index_select(0, inputs["row_ids"]),
            positions=inputs["positions"],
            ragged=ragged,
            adapter_indices=inputs["adapter_slots"] if has_adapters else None,
        )
        self._logits[:bucket].copy_(self._model(batch, self._kv, self._adapters.stacks))

    def _draw(self, bucket: int, flags: Flags) -> Packed:
        tensors = {name: self._inputs.device[name][:bucket] for name in self._sampler.fields}
        rows = SamplerRows(**tensors, **flags._asdict())
        sampled = ops.sample(self._logits[:bucket], rows, self._sampler.state)
        self._last_tokens.index_copy_(0, self._inputs.device["row_ids"][:bucket], sampled.token_ids)
        return packed(sampled)

    def _draw_unrecorded(self, plan: Plan) -> Packed:
        rows = self._sampler.rows(plan.rows, plan.sample_positions, plan.masks)
        sampled = ops.sample(self._logits[: len(plan.rows)], rows, self._sampler.state)
        self._last_tokens.index_copy_(0, to_device(plan.rows, self._logits.device, np.int64), sampled.token_ids)
        return packed(sampled)
