"""GraphedDecodes: steps that only decode, as recorded graphs over tensors that never move.

A step of n sequences runs in a graph of the next larger bucket. The rows behind n are padding: they belong to the row
that is nobody's, have no context, store nothing and are drawn greedily. Model and sampler have graphs of their own, so
that their variants do not multiply; logits pass between them. Where a sampler's input has no fixed place (biases,
grammar masks) it runs without one. The model knows of none of this.
"""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import numpy as np
import torch

from llama.api.params import MAX_LOGPROBS
from llama.engine.device import Mirror, Packed
from llama.engine.graphs import Graphs, Record, bucket_of
from llama.engine.plan import Plan, StepResult
from llama.engine.rows import DTYPES, DeviceRows, fetched
from llama.engine.sampler import Flags
from llama.kernels.types import SamplerRows
from llama.model.kv_cache import KVCache
from llama.model.transformer import Transformer


class GraphedDecodes:
    def __init__(self, model: Transformer, kv: KVCache, rows: DeviceRows, record: Record) -> None:
        self._model, self._kv, self._rows = model, kv, rows
        self._graphs = Graphs(record)
        self._generation = rows.adapters.generation
        per_row = {name: ((), dtype) for name, dtype in DTYPES.items()} | rows.sampler.fields
        fields = {name: ((rows.nobody, *shape), dtype) for name, (shape, dtype) in per_row.items()}
        self._inputs = Mirror(fields, model.device)
        self._logits = torch.empty(rows.nobody, model.config.vocab_size, dtype=model.dtype, device=model.device)

    @torch.inference_mode()
    def prepare(self) -> None:
        """Record the largest step before all others, for nobody. They then find room in the memory that it leaves
        behind; in rising order each would take more, and never give it back."""
        self._fill({}, 0)
        nothing = np.zeros(0, np.int64)
        self._rows.sampler.write(nothing, nothing, self._inputs.host)
        self._inputs.send()
        num_logprobs = min(MAX_LOGPROBS, self._logits.shape[1])
        flags = Flags(num_logprobs, any_filter=True, all_greedy=False, any_processed=True)
        for _ in range(2):
            self._run_model(self._rows.nobody, has_adapters=False)
            self._run_sampler(self._rows.nobody, flags)

    @staticmethod
    def takes(plan: Plan) -> bool:
        return plan.only_decodes and plan.prompt_sources is None and not len(plan.copies)

    def launch(self, plan: Plan) -> Callable[[], StepResult]:
        """Start the step -> what waits for its result."""
        if self._generation != self._rows.adapters.generation:
            self._generation = self._rows.adapters.generation
            self._graphs.forget(lambda key: key[0] == "model" and key[2])
        count, sampler = len(plan.rows), self._rows.sampler
        bucket = min(bucket_of(count), self._rows.nobody)
        has_adapters = plan.adapter_indices is not None and bool(plan.adapter_indices.any())
        self._fill(self._rows.numbers(plan), count)
        # Where not all of the sampler's input has a place, there are no flags.
        flags = None
        if plan.masks is None:
            flags = sampler.write(plan.rows, plan.sample_positions, self._inputs.host)
        self._inputs.send()
        self._run_model(bucket, has_adapters)
        if flags is None:
            rows = sampler.rows(plan.rows, plan.sample_positions, plan.masks)
            draws = self._rows.draw(self._logits[:count], rows, self._inputs.device["row_ids"][:count])
        else:
            draws = self._run_sampler(bucket, flags)
        return fetched(draws, count)

    def _fill(self, numbers: Mapping[str, Any], count: int) -> None:
        """Put the numbers of `count` sequences to their places, and padding behind them."""
        padding = {"row_ids": self._rows.nobody, "kv_slots": -1}
        for name in DTYPES:
            neutral = padding.get(name, 0)
            self._inputs.host[name][:count] = numbers.get(name, neutral)
            self._inputs.host[name][count:] = neutral

    def _run_model(self, bucket: int, has_adapters: bool) -> None:
        self._graphs.run(("model", bucket, has_adapters), partial(self._compute, bucket, has_adapters))

    def _run_sampler(self, bucket: int, flags: Flags) -> Packed:
        return self._graphs.run(("sampler", bucket, flags), partial(self._draw, bucket, flags))

    # What follows is recorded: it must depend on its arguments and on tensors that do not move, and never wait.

    def _compute(self, bucket: int, has_adapters: bool) -> None:
        names = [name for name in DTYPES if has_adapters or name != "adapter_indices"]
        batch = self._rows.batch({name: self._inputs.device[name][:bucket] for name in names}, bucket)
        self._logits[:bucket].copy_(self._model(batch, self._kv, self._rows.adapters.stacks))

    def _draw(self, bucket: int, flags: Flags) -> Packed:
        tensors: dict[str, Any] = {name: self._inputs.device[name][:bucket] for name in self._rows.sampler.fields}
        rows = SamplerRows(**tensors, **flags._asdict())
        return self._rows.draw(self._logits[:bucket], rows, self._inputs.device["row_ids"][:bucket])
