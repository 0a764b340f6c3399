"""Runner: plans into tokens. It owns the model and its KV cache; what is kept per sequence is in DeviceRows.

A plan goes to the device as a Batch, through the model, and its logits through the sampler. On CUDA `launch` waits for
nothing, so that the host prepares a step while the device computes the one before, and decodes run as graphs.
"""

from collections.abc import Callable
from contextlib import nullcontext

import numpy as np
import torch
from torch import Tensor

from llama.engine.config import EngineConfig
from llama.engine.decodes import GraphedDecodes
from llama.engine.device import Packed, to_device
from llama.engine.graphs import CudaRecord, Record
from llama.engine.memory import num_scored_rows
from llama.engine.plan import LogprobArrays, Plan, StepResult
from llama.engine.rows import DTYPES, DeviceRows, fetched
from llama.kernels import ops
from llama.model.batch import Batch
from llama.model.kv_cache import KVCache
from llama.model.transformer import Transformer


class Runner:
    def __init__(
        self,
        model: Transformer,
        kv: KVCache,
        config: EngineConfig,
        *,
        eos_token_ids: frozenset[int] = frozenset(),
        record: Record | None = None,
    ) -> None:
        """`record` makes the graphs that decodes run as; None = CUDA's on CUDA, unless `enforce_eager`, else none."""
        self.model = model
        self.kv = kv
        self.device = model.device
        self.vocab_size = model.config.vocab_size
        self.lag = 1 if self.device.type == "cuda" else 0
        self._rows = DeviceRows(model, config, eos_token_ids)
        self._scored_rows = num_scored_rows(self.vocab_size)
        self._decodes: GraphedDecodes | None = None
        if record is not None:
            self._decodes = GraphedDecodes(model, kv, self._rows, record)
        elif self.device.type == "cuda" and not config.enforce_eager:
            self._decodes = GraphedDecodes(model, kv, self._rows, CudaRecord(self.device))
            with torch.cuda.device(self.device):
                self._decodes.prepare()

    @torch.inference_mode()
    def launch(self, plan: Plan) -> Callable[[], StepResult]:
        """Set the device to one step -> what waits for its result."""
        with torch.cuda.device(self.device) if self.device.type == "cuda" else nullcontext():
            self._rows.take_over(plan)
            if self._decodes is not None and self._decodes.takes(plan):
                return self._decodes.launch(plan)
            return self._compute(plan)

    def _compute(self, plan: Plan) -> Callable[[], StepResult]:
        rows = self._rows
        tensors = {name: self._on_device(array, DTYPES.get(name)) for name, array in rows.numbers(plan).items()}
        samples_all = len(plan.sample_sources) == plan.num_tokens and plan.only_decodes
        batch = rows.batch(
            tensors,
            plan.num_decodes,
            num_blocks=-(-int(plan.context_lens.max()) // self.kv.block_size),
            logit_rows=None if samples_all else self._on_device(plan.sample_sources),
        )
        hidden = self.model.hidden(batch, self.kv, rows.adapters.stacks)
        result_of = self._draw(plan, batch, hidden)
        self.kv.copy_blocks([(source, target) for source, target in plan.copies.tolist()])
        scores_of = [] if plan.prompt_sources is None else [part.fetch() for part in self._score(plan, batch, hidden)]

        def result() -> StepResult:
            drawn = result_of()
            if not scores_of:
                return drawn
            parts = [wait() for wait in scores_of]
            logprobs = LogprobArrays(*(np.concatenate(arrays) for arrays in zip(*parts, strict=True)))
            return drawn._replace(prompt_logprobs=logprobs)

        return result

    def _draw(self, plan: Plan, batch: Batch, hidden: Tensor) -> Callable[[], StepResult]:
        if not len(plan.sample_rows):
            return lambda: StepResult(np.zeros(0, np.int64), np.zeros(0, np.bool_))
        logits = self.model.head(hidden, batch, batch.logit_rows, self._rows.adapters.stacks)
        rows = self._rows.sampler.rows(plan.sample_rows, plan.sample_positions, plan.masks)
        return fetched(self._rows.draw(logits, rows, self._on_device(plan.sample_rows)), len(plan.sample_rows))

    def _score(self, plan: Plan, batch: Batch, hidden: Tensor) -> list[Packed]:
        """Log-probabilities of the prompt's tokens, a bounded number of rows of logits at a time."""
        assert plan.prompt_sources is not None and plan.prompt_targets is not None
        sources, targets = self._on_device(plan.prompt_sources), self._on_device(plan.prompt_targets)
        parts = []
        for some, wanted in zip(sources.split(self._scored_rows), targets.split(self._scored_rows), strict=True):
            logits = self.model.head(hidden, batch, some, self._rows.adapters.stacks)
            scores = ops.token_logprobs(logits, wanted, plan.num_prompt_logprobs)
            parts.append(Packed.of((scores.logprob, scores.rank, scores.top_ids, scores.top_logprobs)))
        return parts

    def release_memory(self) -> None:
        """Give back what the allocator keeps for later. The KV cache is one fixed allocation and stays."""
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    def check_device(self) -> None:
        """Raise if the device computes no more: some errors poison a CUDA context for good."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def _on_device(self, array: np.ndarray, dtype: type | None = np.int64) -> Tensor:
        """Plans share arrays, and a tensor that aliased one could change it: this one does not."""
        return to_device(array, self.device, dtype)
