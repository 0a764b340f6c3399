"""Runner: plans into tokens. It owns the model, its KV cache and what is kept per row on the device.

A plan goes to the device as a Batch, through the model, and its logits through the sampler. Sampled tokens stay on the
device as their row's last token, where the next plan finds them; the host gets a small copy.
"""

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

import kernels
from kernels.types import Logprobs
from llama.engine.plan import LogprobArrays, Plan, StepResult
from llama.engine.request import SamplingParams
from llama.engine.sampler import SamplerTable
from llama.model.batch import Batch
from llama.model.kv_cache import KVCache
from llama.model.lora import LoraSlots
from llama.model.transformer import Transformer

# Logits of a prompt are scored in pieces: a full [tokens, vocab] tensor of a long prompt would take gigabytes.
SCORED_LOGITS_BYTES = 32 << 20


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
    ) -> None:
        self.model = model
        self.kv = kv
        self.block_size = kv.block_size
        self.device = model.device
        self.vocab_size = model.config.vocab_size
        self.lag = 0
        self._adapters = LoraSlots(model, max_loras)
        # Block tables are kept where they are needed: here to find slots, on the device for attention.
        self._table = np.zeros((max_num_seqs, -(-max_model_len // kv.block_size)), np.int32)
        self._device_table = torch.from_numpy(self._table).to(self.device)
        self._last_tokens = torch.zeros(max_num_seqs, dtype=torch.int64, device=self.device)
        self._sampler = SamplerTable(
            max_num_seqs, self.vocab_size, eos_token_ids, device=self.device, dtype=model.dtype
        )
        self._scored_rows = max(1, SCORED_LOGITS_BYTES // (8 * self.vocab_size))

    def launch(self, plan: Plan) -> Callable[[], StepResult]:
        """Compute one step -> what waits for its result."""
        result = self._execute(plan)
        return lambda: result

    @torch.inference_mode()
    def _execute(self, plan: Plan) -> StepResult:
        for adapter in plan.adapters:
            self._adapters.put(adapter.slot, adapter.content)
        self._take_over_rows(plan)
        batch = self._batch(plan)
        hidden = None
        if plan.prompt_sources is None and len(plan.sample_rows):
            logits = self.model(batch, self.kv)
        else:
            hidden = self.model.hidden(batch, self.kv)
            logits = self.model.head(hidden, batch, self._on_device(plan.sample_sources))
        result = self._sample(plan, logits)
        self.kv.copy_blocks([(source, target) for source, target in plan.copies.tolist()])
        if hidden is not None and plan.prompt_sources is not None:
            return result._replace(prompt_logprobs=self._score(plan, batch, hidden))
        return result

    def validate(self, params: SamplingParams) -> None:
        """Raise ValueError for parameters that this model cannot serve."""
        self._sampler.validate(params)

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
                self._device_table[self._on_device(rows), self._on_device(columns)] = self._on_device(blocks, np.int32)
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
        slots = self._table[rows, positions // self.block_size].astype(np.int64) * self.block_size
        slots += positions % self.block_size
        longest = int(contexts.max())
        samples_all = len(plan.sample_sources) == plan.num_tokens and plan.num_decodes == len(lens)
        slot_of_token = None if plan.adapter_slots is None else np.repeat(plan.adapter_slots, lens)
        return Batch(
            token_ids=token_ids,
            positions=self._on_device(positions),
            slots=self._on_device(slots),
            query_starts=self._on_device(starts, np.int32),
            context_lens=self._on_device(contexts, np.int32),
            block_tables=self._device_table[self._on_device(plan.rows), : -(-longest // self.block_size)],
            num_decodes=plan.num_decodes,
            max_query_len=int(lens.max()),
            max_context_len=longest,
            logit_rows=None if samples_all else self._on_device(plan.sample_sources),
            adapter_slots=None if slot_of_token is None else self._on_device(slot_of_token, np.int32),
            adapters=self._adapters,
        )

    def _sample(self, plan: Plan, logits: Tensor) -> StepResult:
        if not len(plan.sample_rows):
            return StepResult(np.zeros(0, np.int64), np.zeros(0, np.bool_))
        rows = self._sampler.rows(plan.sample_rows, plan.sample_positions, plan.masks)
        sampled = kernels.sample(logits, rows, self._sampler.state)
        self._last_tokens[self._on_device(plan.sample_rows)] = sampled.token_ids
        logprobs = None if sampled.logprobs is None else _on_host(sampled.logprobs)
        return StepResult(sampled.token_ids.cpu().numpy(), sampled.is_bad.cpu().numpy(), logprobs)

    def _score(self, plan: Plan, batch: Batch, hidden: Tensor) -> LogprobArrays:
        """Log-probabilities of the prompt's tokens, a bounded number of rows of logits at a time."""
        sources, targets = self._on_device(plan.prompt_sources), self._on_device(plan.prompt_targets)
        parts = []
        for some, wanted in zip(sources.split(self._scored_rows), targets.split(self._scored_rows), strict=True):
            logits = self.model.head(hidden, batch, some)
            parts.append(_on_host(kernels.token_logprobs(logits, wanted, plan.num_prompt_logprobs)))
        return LogprobArrays(*(np.concatenate(arrays) for arrays in zip(*parts, strict=True)))

    def _on_device(self, array: np.ndarray, dtype: type = np.int64) -> Tensor:
        """A tensor of its own: plans share arrays, and a tensor that aliased one could change it."""
        return torch.from_numpy(array.astype(dtype)).to(self.device)


def _on_host(logprobs: Logprobs) -> LogprobArrays:
    tensors = (logprobs.logprob, logprobs.rank, logprobs.top_ids, logprobs.top_logprobs)
    return LogprobArrays(*(tensor.cpu().numpy() for tensor in tensors))
