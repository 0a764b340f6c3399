"""Runner: plans into tokens. It owns the model, its KV cache and what is kept per row on the device.

A plan goes to the device as a Batch, through the model, and its logits through the sampler. Sampled tokens stay on the
device as their row's last token, where the next plan finds them; the host gets a small copy. On CUDA `launch` waits for
nothing, so that the host prepares a step while the device computes the one before, and decodes run as graphs.
"""

from collections.abc import Callable
from contextlib import nullcontext

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from llama.engine.decodes import GraphedDecodes, fetched, packed
from llama.engine.device import Packed, to_device
from llama.engine.graphs import CudaRecord, Record
from llama.engine.memory import num_scored_rows
from llama.engine.plan import Ints, LogprobArrays, Plan, StepResult
from llama.engine.sampler import SamplerTable
from llama.kernels import ops
from llama.kernels.types import Ragged
from llama.model.batch import Batch
from llama.model.kv_cache import KVCache
from llama.model.lora import LoadedAdapters
from llama.model.transformer import Transformer


class Runner:
    def __init__(
        self,
        model: Transformer,
        kv: KVCache,
        *,
        max_num_seqs: int,
        max_model_len: int,
        max_loras: int = 0,
        eos_token_ids: frozenset[int] = frozenset(),
        enforce_eager: bool = False,
        record: Record | None = None,
    ) -> None:
        """`record` makes the graphs that decodes run as; None = CUDA's on CUDA, unless `enforce_eager`, else none."""
        self.model = model
        self.kv = kv
        self.block_size = kv.block_size
        self.device = model.device
        self.vocab_size = model.config.vocab_size
        self.lag = 1 if self.device.type == "cuda" else 0
        self._adapters = LoadedAdapters(model, max_loras)
        # Block tables are kept where they are needed: here to find slots, on the device for attention. The last row is
        # nobody's: padding reads and writes it.
        self._table = np.zeros((max_num_seqs + 1, -(-max_model_len // kv.block_size)), np.int32)
        self._device_table = torch.from_numpy(self._table).to(self.device)
        self._last_tokens = torch.zeros(max_num_seqs + 1, dtype=torch.int64, device=self.device)
        self._sampler = SamplerTable(
            max_num_seqs, self.vocab_size, eos_token_ids, device=self.device, dtype=model.dtype
        )
        self._scored_rows = num_scored_rows(self.vocab_size)
        self._decodes: GraphedDecodes | None = None
        is_default = record is None and self.device.type == "cuda" and not enforce_eager
        if is_default:
            record = CudaRecord(self.device)
        if record is not None:
            self._decodes = GraphedDecodes(
                model,
                kv,
                adapters=self._adapters,
                sampler=self._sampler,
                table=self._device_table,
                last_tokens=self._last_tokens,
                record=record,
            )
        if is_default:
            with torch.cuda.device(self.device):
                self._decodes.prepare()

    @torch.inference_mode()
    def launch(self, plan: Plan) -> Callable[[], StepResult]:
        """Set the device to one step -> what waits for its result."""
        with torch.cuda.device(self.device) if self.device.type == "cuda" else nullcontext():
            for adapter in plan.adapters:
                self._adapters.put(adapter.slot, adapter.content)
            self._take_over_rows(plan)
            if self._decodes is not None and self._decodes.takes(plan):
                return self._decodes.launch(plan, self._kv_slots(plan.rows, plan.context_lens - 1))
            return self._compute(plan)

    def _compute(self, plan: Plan) -> Callable[[], StepResult]:
        batch = self._batch(plan)
        hidden = self.model.hidden(batch, self.kv, self._adapters.stacks)
        draws = self._draw(plan, batch, hidden)
        self.kv.copy_blocks([(source, target) for source, target in plan.copies.tolist()])
        scores = [] if plan.prompt_sources is None else self._score(plan, batch, hidden)
        result_of, scores_of = fetched(draws, len(plan.sample_rows)), [part.fetch() for part in scores]

        def result() -> StepResult:
            drawn = result_of()
            if not scores_of:
                return drawn
            parts = [wait() for wait in scores_of]
            logprobs = LogprobArrays(*(np.concatenate(arrays) for arrays in zip(*parts, strict=True)))
            return drawn._replace(prompt_logprobs=logprobs)

        return result

    def release_memory(self) -> None:
        """Give back what the allocator keeps for later. The KV cache is one fixed allocation and stays."""
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    def check_device(self) -> None:
        """Raise if the device computes no more: some errors poison a CUDA context for good."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def _take_over_rows(self, plan: Plan) -> None:
        rows, columns, blocks = plan.table_updates
        if len(rows):
            self._table[rows, columns] = blocks
            if self.device.type != "cpu":  # there both tables are one
                updates = self._on_device(plan.table_updates)
                self._device_table.index_put_((updates[0], updates[1]), updates[2].int())
        for join in plan.joins:
            self._sampler.set_row(join.row, join.params, join.seed, join.prompt, join.output_token_ids)

    def _batch(self, plan: Plan) -> Batch:
        lens, contexts = plan.query_lens, plan.context_lens
        starts = np.zeros(len(lens) + 1, np.int32)
        np.cumsum(lens, out=starts[1:])
        if plan.num_decodes == len(lens):
            positions, rows = contexts - 1, plan.rows
            token_ids = self._last_tokens[self._on_device(rows)]
        else:
            seqs = np.repeat(np.arange(len(lens)), lens)
            positions = np.arange(plan.num_tokens) + (contexts - starts[1:])[seqs]
            rows = plan.rows[seqs]
            token_ids = self._on_device(plan.token_ids)
            decoding = self._on_device(rows[: plan.num_decodes])
            token_ids[: plan.num_decodes] = self._last_tokens[decoding]
        longest = int(contexts.max())
        samples_all = len(plan.sample_sources) == plan.num_tokens and plan.num_decodes == len(lens)
        index_of_token = None if plan.adapter_slots is None else np.repeat(plan.adapter_slots, lens)
        ragged = Ragged(
            block_tables=self._device_table[self._on_device(plan.rows), : -(-longest // self.block_size)],
            query_starts=self._on_device(starts, np.int32),
            context_lens=self._on_device(contexts, np.int32),
            slots=self._on_device(self._kv_slots(rows, positions)),
            num_decodes=plan.num_decodes,
            block_size=self.block_size,
        )
        return Batch(
            token_ids=token_ids,
            positions=self._on_device(positions),
            ragged=ragged,
            logit_rows=None if samples_all else self._on_device(plan.sample_sources),
            adapter_indices=None if index_of_token is None else self._on_device(index_of_token, np.int32),
        )

    def _kv_slots(self, rows: Ints, positions: Ints) -> NDArray[np.int64]:
        """Where in the cache the tokens at these positions of these rows are."""
        blocks = self._table[rows, positions // self.block_size].astype(np.int64)
        return blocks * self.block_size + positions % self.block_size

    def _draw(self, plan: Plan, batch: Batch, hidden: Tensor) -> Packed:
        """Draw the plan's samples and keep them for the next step."""
        if not len(plan.sample_rows):
            nothing = torch.empty(0, dtype=torch.int64, device=self.device)
            return Packed.of((nothing, nothing.bool()))
        logits = self.model.head(hidden, batch, batch.logit_rows, self._adapters.stacks)
        rows = self._sampler.rows(plan.sample_rows, plan.sample_positions, plan.masks)
        sampled = ops.sample(logits, rows, self._sampler.state)
        self._last_tokens.index_copy_(0, self._on_device(plan.sample_rows), sampled.token_ids)
        return packed(sampled)

    def _score(self, plan: Plan, batch: Batch, hidden: Tensor) -> list[Packed]:
        """Log-probabilities of the prompt's tokens, a bounded number of rows of logits at a time."""
        sources, targets = self._on_device(plan.prompt_sources), self._on_device(plan.prompt_targets)
        parts = []
        for some, wanted in zip(sources.split(self._scored_rows), targets.split(self._scored_rows), strict=True):
            logits = self.model.head(hidden, batch, some, self._adapters.stacks)
            scores = ops.token_logprobs(logits, wanted, plan.num_prompt_logprobs)
            parts.append(Packed.of((scores.logprob, scores.rank, scores.top_ids, scores.top_logprobs)))
        return parts

    def _on_device(self, array: np.ndarray, dtype: type = np.int64) -> Tensor:
        """Plans share arrays, and a tensor that aliased one could change it: this one does not."""
        return to_device(array, self.device, dtype)
