"""GraphRunner: a Runner whose decodes run as recorded graphs, over tensors that never move; with `record_prompts` steps
with few tokens of prompts too (`mixed_steps`).

A step of n sequences runs in a graph of the next larger bucket. The rows behind n are padding: they belong to the row
that no sequence has, have no context, store nothing and are drawn greedily. Model and sampler have graphs of their own,
so that their variants do not multiply; logits pass between them. Where a sampler's input has no fixed place (biases,
grammar masks, drafts) it runs without one. So does, once the start has recorded the usual ones, one with penalties or
log-probabilities: the host launches its few kernels while the device computes the model, and no request waits for a
recording. The model knows of none of this.
"""

import logging
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from functools import partial
from itertools import product
from typing import Any

import numpy as np
import torch
from torch import Tensor

from llama.api.errors import refusal
from llama.api.params import MAX_LOGPROBS
from llama.engine.config import EngineConfig
from llama.engine.device import Mirror
from llama.engine.graphs import CudaRecord, Graphs, Record, bucket_of
from llama.engine.memory import make_kv_cache, run_len, warm_up
from llama.engine.mixed_steps import MixedInputs, Shape, shapes_of
from llama.engine.plan import LAST_SAMPLED, Plan, StepResult
from llama.engine.runner import DTYPES, Runner, fetch_result
from llama.kernels import ops
from llama.kernels.types import Sampled, SamplerRows
from llama.model.autocast import own_dtype
from llama.model.communicator import Call
from llama.model.kv_cache import KVCache
from llama.model.lora import AdapterWeights
from llama.model.module import hooks_of
from llama.model.transformer import Transformer

logger = logging.getLogger(__name__)


def make_runner(model: Transformer, config: EngineConfig, num_blocks: int, eos_token_ids: frozenset[int]) -> Runner:
    """With a KV cache of so many blocks, and with graphs on CUDA unless `enforce_eager`."""
    kv = make_kv_cache(model, config, num_blocks)
    is_cuda = model.device.type == "cuda"
    if config.record_prompts and not is_cuda:
        raise refusal("record_prompts", f"False on {model.device.type}", True)
    make: type[Runner] = GraphRunner if is_cuda and not config.enforce_eager else Runner
    runner = make(model, kv, config, eos_token_ids=eos_token_ids)
    if is_cuda and config.num_blocks is not None:  # without it steps have been measured
        with torch.cuda.device(model.device):
            warm_up(model, config)
    return runner


def _with_bar(sizes: list[int], is_silent: bool) -> Iterable[int]:
    try:
        from tqdm.auto import tqdm
    except ModuleNotFoundError:  # machines that only run kernels have none
        return sizes
    disable = True if is_silent else None  # None: where there is no terminal
    bar: Iterable[int] = tqdm(sizes, desc="Recording graphs", disable=disable, leave=False)
    return bar


class GraphRunner(Runner):
    def __init__(
        self,
        model: Transformer,
        kv: KVCache,
        config: EngineConfig,
        *,
        eos_token_ids: frozenset[int] = frozenset(),
        record: Record | None = None,
    ) -> None:
        """`record` makes the graphs; None = CUDA's."""
        super().__init__(model, kv, config, eos_token_ids=eos_token_ids)
        self._hooks = hooks_of(model)
        self._graphs = Graphs(record or CudaRecord(self.device))
        self._generation = self.adapters.generation
        self._records_samplers = True
        self._dtypes: dict[str, type] = dict(DTYPES)
        if config.speculation is not None:
            self._dtypes["token_ids"] = np.int64  # or LAST_SAMPLED: drafts are known to the host
        per_row = {name: ((), dtype) for name, dtype in self._dtypes.items()} | self.sampler.fields
        count = config.most_samples
        fields: dict[str, tuple[tuple[int, ...], type]] = {
            name: ((count, *shape), dtype) for name, (shape, dtype) in per_row.items()
        }
        self._run_len = run_len(model, config)
        if self._run_len > 1:
            fields |= {"run_rows": ((count,), np.int64), "run_contexts": ((count,), np.int32)}
            fields["run_starts"] = ((count + 1,), np.int32)
        self._inputs = Mirror(fields, self.device)
        self._logits = torch.empty(count, self.vocab_size, dtype=model.dtype, device=self.device)
        self._shapes = shapes_of(config) if config.record_prompts else []
        if self._shapes:
            self._mixed = MixedInputs(self._shapes, self.padding_row, self.device)
        if record is None:
            with torch.cuda.device(self.device):
                self.prepare()

    @property
    def graph_bytes(self) -> int:
        return self._graphs.nbytes

    def sleep(self) -> None:
        self.forget_graphs()  # the cache that they know will be elsewhere
        super().sleep()

    def renew(self) -> None:
        super().renew()
        self._hooks = hooks_of(self.model)
        self.forget_graphs()

    def forget_graphs(self) -> None:
        """Steps are recorded anew as they come."""
        self._graphs.forget(lambda key: True)
        self._records_samplers = True

    @own_dtype
    @torch.inference_mode()
    def prepare(self) -> None:
        """Record the decodes of all sizes without adapters, drawn greedily, from all tokens or from filtered ones, and
        with `record_prompts` steps of all shapes, over padding alone. The largest step comes first: the others find
        room in the memory that it leaves behind; in rising order each would take more, and never give it back. All
        ranks do the same, however much memory each has. Nothing is recorded while there are hooks: graphs would keep
        what these do."""
        if any(self._hooks):
            return
        started, count = time.monotonic(), len(self._logits)
        self._fill({}, 0)
        nothing = np.zeros(0, np.int64)
        greedy = self.sampler.write(nothing, nothing, self._inputs.host)
        assert greedy is not None
        self._inputs.send()
        plain = {**greedy, "all_greedy": False}
        filtered = {**plain, "any_filter": True}
        longest = {**filtered, "num_logprobs": min(MAX_LOGPROBS, self.vocab_size), "any_processed": True}
        most_rows = self._bucket(self.padding_row)  # of the sampler's: it draws behind drafts without a graph
        self._record_mixed(has_adapters=False)  # dropped first where there is no memory for all
        for size in _with_bar(self._buckets(), is_silent=self.model.shard.rank > 0):
            flags = [longest] * (size == most_rows) + [filtered, plain, greedy] * (size <= most_rows)
            for _ in range(2):  # a key's second run records it
                for has_runs in self._kinds_of_runs:
                    self._run_model(size, has_adapters=False, has_runs=has_runs)
                for each in flags:
                    self._run_sampler(size, each)
        self._records_samplers = False
        told = len(self._graphs), time.monotonic() - started, self.graph_bytes / 2**20, count
        logger.info("%d graphs recorded in %.1f s, %.0f MiB: decodes of up to %d tokens", *told)

    @own_dtype
    @torch.inference_mode()
    def record(self, adapter: AdapterWeights) -> None:
        self.adapters.reserve(adapter)
        if any(self._hooks) or not self._forget_moved():
            return
        started = time.monotonic()
        with ops.on_device(self.device):
            self._fill({}, 0)
            self._inputs.send()
            self._record_mixed(has_adapters=True)
            for size in _with_bar(self._buckets(), is_silent=False):
                for _, has_runs in product(range(2), self._kinds_of_runs):
                    self._run_model(size, has_adapters=True, has_runs=has_runs)
        logger.info("decodes with adapters recorded in %.1f s", time.monotonic() - started)

    def _forget_moved(self) -> bool:
        """Forget the steps with adapters if these lie elsewhere by now -> whether they do."""
        has_moved = self._generation != self.adapters.generation
        if has_moved:
            self._generation = self.adapters.generation
            self._graphs.forget(lambda key: key[0] in ("model", "mixed") and key[2])
        return has_moved

    def _record_mixed(self, has_adapters: bool) -> None:
        for shape in reversed(self._shapes):
            self._mixed.fill(shape)
            for _ in range(2):
                self._run_mixed(shape, has_adapters)

    @property
    def _kinds_of_runs(self) -> list[bool]:
        """Whether a recorded step may have runs, not have them, or either."""
        has_runs = self._run_len > 1
        return [True, False] if has_runs and not self._aligned else [has_runs]

    def _buckets(self) -> list[int]:
        """All that steps take, the largest first."""
        return sorted({self._bucket(count + 1) for count in range(len(self._logits))}, reverse=True)

    def calls(self, plan: Plan) -> list[Call] | None:
        if (shape := self._shape_of(plan)) is not None:
            return [*self._calls_of_model(shape.num_tokens), Call(shape.samples, "gather")]
        if not self._is_plain(plan):
            return super().calls(plan)
        bucket = self._bucket(plan.num_tokens)
        return [*self._calls_of_model(bucket), Call(bucket, "gather")]

    def _bucket(self, num_tokens: int) -> int:
        return min(bucket_of(num_tokens), len(self._logits))

    def _is_plain(self, plan: Plan) -> bool:
        """Whether graphs of decodes can run it."""
        samples_all = plan.only_decodes or (
            plan.drafts is not None and np.array_equal(plan.sample_sources, np.arange(plan.num_tokens))
        )
        return samples_all and self._has_fixed_steps(plan)

    def _has_fixed_steps(self, plan: Plan) -> bool:
        """A recording would keep hooks, or their absence."""
        is_usual = plan.prompt_sources is None and not len(plan.copies)
        return is_usual and not (plan.taps or plan.processed or plan.guided or any(self._hooks))

    def _shape_of(self, plan: Plan) -> Shape | None:
        """Of a step with prompts that a graph can run."""
        if plan.only_decodes or not self._has_fixed_steps(plan):
            return None
        return next((shape for shape in self._shapes if shape.holds(plan)), None)

    def _compute(self, plan: Plan) -> Callable[[], StepResult]:
        shape = self._shape_of(plan)
        if shape is None and not self._is_plain(plan):
            return super()._compute(plan)
        has_adapters = plan.adapter_indices is not None and bool(plan.adapter_indices.any())
        if has_adapters:
            self._forget_moved()
        if shape is not None:
            return self._compute_mixed(plan, shape, has_adapters)
        count, numbers, runs = plan.num_tokens, self._numbers(plan), self._runs(plan)
        if runs is not None:
            self._fill_runs(runs)
        if plan.drafts is not None:
            # Without runs each token of one is a decode of its own, in the run's blocks: K and V are stored before any
            # is read.
            numbers["row_ids"], numbers["context_lens"] = plan.sample_rows, plan.sample_positions
            numbers["token_ids"] = plan.token_ids
        bucket = self._bucket(plan.num_tokens)
        self._fill(numbers, count)
        # Where not all of the sampler's input has a place, there are no flags.
        flags = None
        if plan.masks is None and plan.drafts is None:
            flags = self.sampler.write(plan.rows, plan.sample_positions, self._inputs.host)
        self._inputs.send()
        self._run_model(bucket, has_adapters, has_runs=runs is not None)
        if flags is None:
            rows = self.sampler.rows(plan.sample_rows, plan.sample_positions, plan.masks)
            draws = self._draw(self._logits[:count], rows, self._inputs.device["row_ids"][:count], plan.drafts)
        else:
            draws = self._run_sampler(bucket, flags)
        return fetch_result(*draws, count)

    def _compute_mixed(self, plan: Plan, shape: Shape, has_adapters: bool) -> Callable[[], StepResult]:
        self._mixed.fill(shape, plan, self._numbers(plan))
        self._run_mixed(shape, has_adapters)
        count = len(plan.sample_rows)
        if not count:
            return lambda: StepResult(np.zeros(0, np.int64), np.zeros(0, np.bool_))
        flags = None
        if plan.masks is None:
            self._fill({"row_ids": plan.sample_rows}, count)
            flags = self.sampler.write(plan.sample_rows, plan.sample_positions, self._inputs.host)
        if flags is not None:
            self._inputs.send()
            return fetch_result(*self._run_sampler(self._bucket(count), flags), count)
        rows = self.sampler.rows(plan.sample_rows, plan.sample_positions, plan.masks)
        return fetch_result(*self._draw(self._logits[:count], rows, self._row_ids(plan.sample_rows)), count)

    def _fill(self, numbers: Mapping[str, Any], count: int) -> None:
        """Put the numbers of `count` tokens to their places, and padding behind them."""
        padding = {"row_ids": self.padding_row, "kv_slots": -1, "token_ids": LAST_SAMPLED}
        for name in self._dtypes:
            neutral = padding.get(name, 0)
            self._inputs.host[name][:count] = numbers.get(name, neutral)
            self._inputs.host[name][count:] = neutral

    def _runs(self, plan: Plan) -> Mapping[str, Any] | None:
        """The plan's tokens in runs, where a step has them."""
        if self._aligned or self._run_len == 1:
            return self._in_runs(plan) if self._aligned > 1 else None
        if plan.drafts is None or int(plan.query_lens.max()) > self._run_len:
            return None
        starts = np.concatenate([[0], np.cumsum(plan.query_lens)])
        return {"seq_rows": plan.rows, "query_starts": starts, "context_lens": plan.context_lens}

    def _fill_runs(self, runs: Mapping[str, Any]) -> None:
        """Runs of a plan's tokens, and empty ones behind them."""
        host, starts, count = self._inputs.host, runs["query_starts"], len(runs["seq_rows"])
        host["run_rows"][:count], host["run_rows"][count:] = runs["seq_rows"], self.padding_row
        host["run_contexts"][:count], host["run_contexts"][count:] = runs["context_lens"], 0
        host["run_starts"][: count + 1], host["run_starts"][count + 1 :] = starts, starts[-1]

    def _run_model(self, bucket: int, has_adapters: bool, has_runs: bool = False) -> None:
        key = ("model", bucket, has_adapters, has_runs)
        self._graphs.run(key, partial(self._model_step, *key[1:]))
        self._count_calls(len(self._calls_of_model(bucket)) + 1)

    def _run_mixed(self, shape: Shape, has_adapters: bool) -> None:
        key = ("mixed", shape, has_adapters)
        self._graphs.run(key, partial(self._mixed_step, *key[1:]))
        self._count_calls(len(self._calls_of_model(shape.num_tokens)) + 1)

    def _count_calls(self, count: int) -> None:
        """What ranks have said in this step: nobody counts it in a graph."""
        if self.model.communicator is not None:
            self.model.communicator.num_calls = count

    def _run_sampler(self, bucket: int, flags: Mapping[str, int]) -> tuple[Tensor | None, Sampled]:
        key = ("sampler", bucket, *flags.items())
        draw = partial(self._sampler_step, bucket, flags)
        return self._graphs.run(key, draw, may_record=self._records_samplers)

    # What follows is recorded: it must depend on its arguments and on tensors that do not move, and never wait.

    def _model_step(self, bucket: int, has_adapters: bool, has_runs: bool) -> None:
        self._count_calls(0)  # a recording that found no memory has counted too
        tensors = {name: self._inputs.device[name][:bucket] for name in self._dtypes}
        if not has_adapters:
            del tensors["adapter_indices"]
        given = tensors.pop("token_ids", None)
        if has_runs:
            inputs = self._inputs.device
            tensors |= {"seq_rows": inputs["run_rows"][:bucket], "context_lens": inputs["run_contexts"][:bucket]}
            tensors["query_starts"] = inputs["run_starts"][: bucket + 1]
        batch = self._batch(tensors, bucket, run_len=self._run_len if has_runs else 1)
        if given is not None:
            batch = replace(batch, token_ids=torch.where(given >= 0, given, batch.token_ids))
        self.model.lm_head.into(self._logits[:bucket], self.model.hidden(batch, self.kv), batch.adapters)

    def _mixed_step(self, shape: Shape, has_adapters: bool) -> None:
        self._count_calls(0)
        tensors = self._mixed.tensors(shape)
        if not has_adapters:
            del tensors["adapter_indices"]
        sources = tensors.pop("sources")
        batch = self._batch(tensors, shape.decodes)
        hidden = self.model.hidden(batch, self.kv)
        self._logits[: shape.samples].copy_(self.model.head(hidden, batch, sources))

    def _sampler_step(self, bucket: int, flags: Mapping[str, Any]) -> tuple[Tensor | None, Sampled]:
        tensors: dict[str, Any] = {name: self._inputs.device[name][:bucket] for name in self.sampler.fields}
        rows = SamplerRows(**tensors, **flags)
        return self._draw(self._logits[:bucket], rows, self._inputs.device["row_ids"][:bucket])
