"""Runner: plans into tokens. It owns the model, its KV cache, and what the device keeps for each row, the place of a
running sequence: block table, last token, sampler's entry.

A plan goes to the device as a Batch, through the model, and its logits through the sampler. Sampled tokens stay on the
device as their row's last token, where the next step finds them; the host gets a small copy. On CUDA `launch` waits for
nothing, so that the host prepares a step while the device computes the one before.
"""

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from llama.engine.config import EngineConfig
from llama.engine.device import fetch, fetch_tensor, pack, to_device
from llama.engine.logit_changes import change_logits, with_raw_logprobs
from llama.engine.memory import num_scored_rows
from llama.engine.plan import Array, Ints, Plan, StepResult, aligned_runs
from llama.engine.sampler import SamplerTable
from llama.engine.verification import sample_behind_drafts
from llama.kernels import ops
from llama.kernels.cpu.pieces import Pieces
from llama.kernels.logprobs import Logprobs
from llama.kernels.types import Runs, Sampled, SamplerRows
from llama.model.adapters import StepAdapters
from llama.model.batch import Batch
from llama.model.communicator import Call
from llama.model.fixed_rows import fix_rows
from llama.model.fused import fuse, unfuse
from llama.model.kv_cache import KVCache
from llama.model.lora import AdapterWeights, LoadedAdapters
from llama.model.taps import Span, StepTaps, names_of
from llama.model.transformer import Transformer

# Multiplications in a step on the CPU up to which one thread computes it: half a millisecond. Telling others costs more
# than they save, and on a busy machine a step waits for each of them at every op.
ALONE = 1 << 23

# What the device is told of a step of decodes: one number per sequence, which is one per token.
DTYPES = {
    "row_ids": np.int64,
    "positions": np.int64,
    "kv_slots": np.int64,
    "context_lens": np.int32,
    "adapter_indices": np.int32,
}


class Runner:
    def __init__(
        self,
        model: Transformer,
        kv: KVCache,
        config: EngineConfig,
        *,
        eos_token_ids: frozenset[int] = frozenset(),
    ) -> None:
        if config.deterministic and model.fixed is None:
            fix_rows(model)
        (fuse if config.fused_decode else unfuse)(model)
        fixed = model.fixed
        self._pieces = fixed if isinstance(fixed, Pieces) else None
        self._aligned = fixed.most if isinstance(fixed, Runs) else 0  # see Runs; 0 = sequences are computed as they are
        device, count = model.device, config.max_num_seqs
        self.model = model
        self.kv = kv
        self.device = device
        self.vocab_size = model.config.vocab_size
        self.lag = 1 if device.type == "cuda" else 0
        self.padding_row = count  # one more row than there are sequences: padding reads and writes it
        self.last_tokens = torch.zeros(count + 1, dtype=torch.int64, device=device)
        self.sampler = SamplerTable(count, self.vocab_size, eos_token_ids, device=device, dtype=model.dtype)
        # The kernels of adapters are made for a rank: with one for all, none depends on who else is loaded.
        self.adapters = LoadedAdapters(model, config.max_loras, config.max_lora_rank if self._aligned else 0)
        # Block tables are kept where they are needed: here to find slots, on the device for attention.
        self._table = np.zeros((count + 1, config.blocks_per_sequence), np.int32)
        self._device_table = torch.from_numpy(self._table).to(device)
        self._decode_starts = torch.arange(config.most_samples + 1, dtype=torch.int32, device=device)
        self._starts = self._decode_starts[:1]  # as many of them as the last step of decodes had
        # What consecutive steps of the same sequences share: rows as a tensor, and their part of the block table.
        self._rows: tuple[Ints, Tensor] | None = None
        self._tables: tuple[Ints, int, Tensor] | None = None
        self._weights = model.config.num_parameters
        self._names = names_of(model)
        self._scored_rows = num_scored_rows(self.vocab_size, device)
        self._is_disjoint = config.speculation is None

    @torch.inference_mode()
    def launch(self, plan: Plan) -> Callable[[], StepResult]:
        """Set the device to one step -> what waits for its result."""
        if self.device.type == "cuda":
            with torch.cuda.device(self.device):
                return self._launch(plan)
        threads = torch.get_num_threads()
        is_small = plan.num_tokens * self._weights <= ALONE and self.model.fixed is None
        if threads == 1 or not is_small or self.device.type != "cpu":
            return self._launch(plan)
        torch.set_num_threads(1)
        try:
            return self._launch(plan)
        finally:
            torch.set_num_threads(threads)

    def _launch(self, plan: Plan) -> Callable[[], StepResult]:
        self._take_over(plan)
        return self._compute(plan)

    def calls(self, plan: Plan) -> list[Call] | None:
        """What ranks say to one another in a step, in order; None where that depends on what is read and changed."""
        if plan.taps:
            return None
        found = self._calls_of_model(plan.num_tokens)
        if count := len(plan.sample_rows):
            found.append(Call(count + len(plan.guided), "gather"))
        if plan.processed:
            found.append(Call(len(plan.processed), "spread"))
        if plan.prompt_sources is not None:
            count, most = len(plan.prompt_sources), self._scored_rows
            found += [Call(min(most, count - start), "gather") for start in range(0, count, most)]
        return found

    def _calls_of_model(self, num_tokens: int) -> list[Call]:
        """As far as the hidden states."""
        return [Call(num_tokens, "sum")] * (1 + 2 * self.model.config.num_hidden_layers)

    @property
    def graph_bytes(self) -> int:
        """Memory that recorded steps take."""
        return 0

    @torch.inference_mode()
    def warm(self, adapter: AdapterWeights) -> None:
        """Have the kernels ready that steps with this adapter need. Legal on any thread, while steps run."""
        if self.device.type == "cuda":  # nothing is compiled elsewhere
            with torch.cuda.device(self.device):
                self.adapters.warm(adapter)

    def record(self, adapter: AdapterWeights) -> None:
        """Record the steps with adapters that this one asks for, where steps are recorded. None may run meanwhile."""

    def renew(self) -> None:
        """The model has other modules than it had, or other parameters."""
        self._names = names_of(self.model)

    def release_memory(self) -> None:
        """Give back what the allocator keeps for later. The KV cache is one fixed allocation and stays."""
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    def sleep(self) -> None:
        """Give the KV cache's memory back. No step may run until `wake_up`."""
        self.kv.release()
        self.release_memory()

    def wake_up(self) -> None:
        """MemoryError where the memory is taken by now."""
        self.kv.take_back()

    def check_device(self) -> None:
        """Raise if the device no longer computes: after some errors a CUDA context never works again."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def _take_over(self, plan: Plan) -> None:
        """Bring what is kept for each row up to date with the plan."""
        for adapter in plan.adapters:
            self.adapters.put(adapter.index, adapter.content)
        rows, columns, blocks = plan.table_updates
        if len(rows):
            self._table[rows, columns] = blocks
            self._tables = None
            if self.device.type != "cpu":  # there both tables are one
                updates = self._on_device(plan.table_updates)
                self._device_table.index_put_((updates[0], updates[1]), updates[2].int())
        for join in plan.joins:
            self.sampler.set_row(join.row, join.params, join.seed, join.prompt, join.output_token_ids)

    def _compute(self, plan: Plan) -> Callable[[], StepResult]:
        numbers = self._numbers(plan)
        tensors = {"row_ids": self._row_ids(numbers.pop("row_ids"))}
        if self._aligned:
            numbers |= self._in_runs(plan)
        tensors |= {name: self._on_device(array, DTYPES.get(name)) for name, array in numbers.items()}
        num_blocks = -(-int(plan.context_lens.max()) // self.kv.block_size)
        if self._aligned:
            block_tables = self._device_table[:, :num_blocks].index_select(0, tensors["seq_rows"])
        else:
            block_tables = self._tables_of(plan.rows, num_blocks, tensors["row_ids"])
        samples_all = len(plan.sample_sources) == plan.num_tokens and plan.only_decodes
        taps = self._taps(plan) if plan.taps else None
        batch = self._batch(
            tensors,
            plan.num_decodes,
            run_len=self._aligned or 1,
            block_tables=block_tables,
            logit_rows=None if samples_all else self._on_device(_sources(plan)),
            taps=taps,
        )
        hidden = self.model.hidden(batch, self.kv)
        result_of = self._sample(plan, batch, hidden)
        if len(plan.copies):
            self.kv.copy_blocks([(source, target) for source, target in plan.copies.tolist()])
        scores_of = [] if plan.prompt_sources is None else self._score(plan, batch, hidden)
        captured_of = None if taps is None else fetch_values(taps.captured)

        def result() -> StepResult:
            drawn = result_of()
            if captured_of is not None:
                drawn = drawn._replace(captured=captured_of())
            if not scores_of:
                return drawn
            parts = [wait() for wait in scores_of]
            logprobs = Logprobs(*map(np.concatenate, zip(*parts, strict=True)))
            return drawn._replace(prompt_logprobs=logprobs)

        return result

    def _numbers(self, plan: Plan) -> dict[str, NDArray[Any]]:
        """What `_batch` needs to know of a plan, by name: see DTYPES, and where not all sequences decode query_starts
        [seqs + 1] and the token_ids of the others. The table must be up to date."""
        rows, positions, contexts = plan.rows, plan.context_lens - 1, plan.context_lens
        numbers = {"row_ids": rows, "context_lens": contexts}
        if not plan.only_decodes:
            starts = np.zeros(len(rows) + 1, np.int32)
            np.cumsum(plan.query_lens, out=starts[1:])
            seqs = np.repeat(np.arange(len(rows)), plan.query_lens)
            positions, rows = np.arange(plan.num_tokens) + (contexts - starts[1:])[seqs], rows[seqs]
            numbers |= {"query_starts": starts, "token_ids": plan.token_ids[plan.num_decodes :].astype(np.int64)}
        block_size = self.kv.block_size
        blocks = self._table[rows, positions // block_size].astype(np.int64)
        numbers |= {"positions": positions, "kv_slots": blocks * block_size + positions % block_size}
        if plan.adapter_indices is not None:
            numbers["adapter_indices"] = np.repeat(plan.adapter_indices, plan.query_lens)
        return numbers

    def _in_runs(self, plan: Plan) -> dict[str, NDArray[Any]]:
        """A plan's sequences as `Runs` wants them: the row of each run, where its tokens begin, its context."""
        seqs, lens, contexts = aligned_runs(plan.query_lens, plan.context_lens, self._aligned)
        starts = np.zeros(len(seqs) + 1, np.int32)
        np.cumsum(lens, out=starts[1:])
        return {"seq_rows": plan.rows[seqs], "query_starts": starts, "context_lens": contexts}

    def _batch(
        self,
        tensors: Mapping[str, Tensor],
        num_decodes: int,
        *,
        run_len: int = 1,
        block_tables: Tensor | None = None,
        logit_rows: Tensor | None = None,
        taps: StepTaps | None = None,
    ) -> Batch:
        """Of the numbers on the device; those with seq_rows are of runs, the row of each, all others of sequences.
        `block_tables` None = of as many blocks as there may be."""
        row_ids = tensors["row_ids"]
        decoding = row_ids if row_ids.shape[0] == num_decodes else row_ids[:num_decodes]
        token_ids = self.last_tokens.index_select(0, decoding)
        if "token_ids" in tensors:
            token_ids = torch.cat([token_ids, tensors["token_ids"]])
        if block_tables is None:
            block_tables = self._device_table.index_select(0, tensors.get("seq_rows", row_ids))
        indices, starts = tensors.get("adapter_indices"), tensors.get("query_starts")
        if "seq_rows" in tensors:
            num_decodes = 0 if run_len > 1 else len(tensors["seq_rows"])
        if starts is None and self._starts.shape[0] != num_decodes + 1:
            self._starts = self._decode_starts[: num_decodes + 1]
        return Batch(
            token_ids=token_ids,
            positions=tensors["positions"],
            block_tables=block_tables,
            query_starts=self._starts if starts is None else starts,
            context_lens=tensors["context_lens"],
            slots=tensors["kv_slots"],
            num_decodes=num_decodes,
            block_size=self.kv.block_size,
            run_len=run_len,
            fixed=self._pieces,
            is_disjoint=self._is_disjoint,
            logit_rows=logit_rows,
            adapters=None if indices is None else StepAdapters.of(self.adapters.stacks, indices, self._pieces),
            taps=taps,
        )

    def _row_ids(self, rows: Ints) -> Tensor:
        """int64, on the device; the same tensor as long as plans share their array."""
        if self._rows is None or self._rows[0] is not rows:
            self._rows = rows, self._on_device(rows)
        return self._rows[1]

    def _tables_of(self, rows: Ints, num_blocks: int, row_ids: Tensor) -> Tensor:
        """The first `num_blocks` blocks of each row, until a table changes."""
        kept = self._tables
        if kept is None or kept[0] is not rows or kept[1] != num_blocks:
            kept = self._tables = rows, num_blocks, self._device_table[:, :num_blocks].index_select(0, row_ids)
        return kept[2]

    def _taps(self, plan: Plan) -> StepTaps:
        firsts = np.cumsum(plan.query_lens) - plan.query_lens
        starts = plan.context_lens - plan.query_lens
        spans = [
            Span(taps, int(firsts[seq]), int(starts[seq]), int(plan.query_lens[seq]), key)
            for key, (seq, taps) in enumerate(plan.taps)
        ]
        return StepTaps(self._names, spans, in_engine=True, communicator=self.model.communicator)

    def _sample(self, plan: Plan, batch: Batch, hidden: Tensor) -> Callable[[], StepResult]:
        if not len(plan.sample_rows):
            return lambda: StepResult(np.zeros(0, np.int64), np.zeros(0, np.bool_))
        logits = self.model.head(hidden, batch, batch.logit_rows)
        if batch.taps is not None:
            logits = batch.taps.logits(self.model, logits, plan.sample_sources.tolist())
        rows = self.sampler.rows(plan.sample_rows, plan.sample_positions, plan.masks)
        row_ids, count = self._row_ids(plan.sample_rows), len(plan.sample_rows)
        if not (plan.processed or plan.guided):
            return fetch_result(*self._draw(logits, rows, row_ids, plan.drafts), count)
        changed = change_logits(logits, rows, self.sampler.state, plan, self.model.communicator)
        draws = self._draw(changed.logits, changed.rows, row_ids, plan.drafts, network=logits[:count])
        result_of = fetch_result(*draws, count)
        return lambda: result_of()._replace(broken=changed.broken)

    def _draw(
        self,
        logits: Tensor,
        rows: SamplerRows,
        row_ids: Tensor,
        drafts: Ints | None = None,
        network: Tensor | None = None,
    ) -> tuple[Tensor | None, Sampled]:
        """A token for each row of logits, kept as the last one of its row -> all of it packed, and as it was. `network`
        are the logits as they came from there, if these are others."""
        if drafts is None:
            sampled = ops.sample(logits, rows, self.sampler.state)
        else:
            sampled, is_last = sample_behind_drafts(logits, rows, self.sampler.state, drafts)
            row_ids = torch.where(is_last, row_ids, self.padding_row)
        if network is not None:
            sampled = with_raw_logprobs(sampled, rows, network)
        self.last_tokens.index_copy_(0, row_ids, sampled.token_ids)
        return pack(_tensors(sampled)), sampled

    def _score(self, plan: Plan, batch: Batch, hidden: Tensor) -> list[Callable[[], list[Array]]]:
        """Log-probabilities of the prompt's tokens, a bounded number of rows of logits at a time -> what waits for each
        part's Logprobs."""
        assert plan.prompt_sources is not None and plan.prompt_targets is not None
        sources, targets = self._on_device(plan.prompt_sources), self._on_device(plan.prompt_targets)
        parts = []
        for some, wanted in zip(sources.split(self._scored_rows), targets.split(self._scored_rows), strict=True):
            logits = self.model.head(hidden, batch, some)
            if batch.taps is not None:
                logits = batch.taps.logits(self.model, logits, some.tolist())
            scores = ops.token_logprobs(logits, wanted, plan.num_prompt_logprobs)
            parts.append(fetch(pack(scores), scores))
        return parts

    def _on_device(self, array: np.ndarray, dtype: type | None = np.int64) -> Tensor:
        """Plans share arrays, and a tensor that aliased one could change it: this one does not."""
        return to_device(array, self.device, dtype)


def _sources(plan: Plan) -> Ints:
    """The tokens whose logits are wanted: each sample's, then those that guide some."""
    if not plan.guided:
        return plan.sample_sources
    return np.append(plan.sample_sources, np.array([guided.source for guided in plan.guided], np.int32))


def fetch_values(captured: Mapping[int, Mapping[str, tuple[list[int], Tensor]]]) -> Callable[[], dict[int, Any]]:
    """Start the copies of what a step captured -> what waits for them."""
    waits = {
        key: {point: (positions, fetch_tensor(rows)) for point, (positions, rows) in values.items()}
        for key, values in captured.items()
    }
    return lambda: {
        key: {point: (positions, wait()) for point, (positions, wait) in values.items()}
        for key, values in waits.items()
    }


def _tensors(sampled: Sampled) -> list[Tensor]:
    return [sampled.token_ids, sampled.is_bad, *(sampled.logprobs or ())]


def fetch_result(packed: Tensor | None, sampled: Sampled, count: int) -> Callable[[], StepResult]:
    """Start the copy of what `_draw` gave -> what waits for it and gives the first `count` rows."""
    wait = fetch(packed, _tensors(sampled))

    def result() -> StepResult:
        token_ids, is_bad, *logprobs = (array[:count] for array in wait())
        return StepResult(token_ids, is_bad, Logprobs(*logprobs) if logprobs else None)

    return result
