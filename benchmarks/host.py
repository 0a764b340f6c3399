"""What a step that is not recorded costs the host: a Runner launches decodes of a model on the meta device, and a
prompt beside some, which is recorded as well (`record_prompts`; a replay does nothing here).

There no op computes and no launch reaches a driver, so what is timed is Python: the plan's numbers, the checks, the
search for each kernel's compiled form. Where PyTorch knows a meta tensor by Python alone (linear, empty_like), which a
CUDA tensor does not pass through, one of the host is made in its place. Times are the thread's own. The number of
launches is printed; what a driver and cuBLAS take for each of theirs comes on top. --profile tells where the time goes.
"""

import argparse
import cProfile
import pstats
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from functools import cache
from typing import Any, TypeVar
from unittest import mock

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.common import close, summary
from llama import SamplingParams
from llama.engine import graph_runner
from llama.engine import runner as runners
from llama.engine.config import EngineConfig
from llama.engine.graph_runner import GraphRunner
from llama.engine.memory import make_kv_cache
from llama.engine.plan import LAST_SAMPLED, NO_COPIES, NO_UPDATES, Ints, Plan
from llama.engine.runner import Runner
from llama.kernels import checks, ops
from llama.kernels.gpu import activation, chain, matmul, norm, rope
from llama.kernels.gpu.attention import decode, prefill
from llama.kernels.gpu.launch import Kinds, Launcher
from llama.model.config import ModelConfig
from llama.model.transformer import Transformer

_real_empty_like = torch.empty_like
MULTIPROCESSORS = 132  # an H200's
T = TypeVar("T")


class Launches:
    """Stands in for every compiled kernel, and counts."""

    def __init__(self) -> None:
        self.count = 0
        self.num_early = 0  # before the kernel in front has ended

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        return self._launch

    def early(self) -> "Launches":
        """Stands in for a kernel that is launched early."""
        other = Launches()
        other._launch = self._launch_early  # type: ignore[method-assign]
        return other

    def _launch(self, *arguments: Any) -> None:
        self.count += 1

    def _launch_early(self, *arguments: Any) -> None:
        self.count += 1
        self.num_early += 1


_ON_HOST = torch.empty(1)


@cache
def _meta(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def _linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    _real_empty_like(_ON_HOST)
    return _meta((x.shape[0], weight.shape[0]), x.dtype)


def _empty_like(x: Tensor, **options: Any) -> Tensor:
    _real_empty_like(_ON_HOST)
    return _meta(x.shape, x.dtype)


@contextmanager
def without_a_device() -> Iterator[Launches]:
    """Ops over meta tensors take the way of CUDA's up to the driver."""
    launches = Launches()
    known: dict[tuple[int, Any], tuple[Any, tuple[Any, ...]]] = {}

    def form(self: Launcher, arguments: tuple[Any, ...], constants: dict[str, Any]) -> tuple[Any, tuple[Any, ...]]:
        key = id(self), self._key(arguments, constants)
        others = tuple(constants[name] for name in self._kernel.arg_names[len(arguments) :])
        return known.setdefault(key, (launches.early() if constants.get("launch_pdl") else launches, others))

    with (
        ExitStack() as patches,
        mock.patch.object(ops, "_INTERPRETED", True),
        mock.patch.object(checks, "_TAKEN", frozenset(checks._DTYPES)),  # no interpreter computes with them
        mock.patch.object(chain, "is_native", lambda device: True),
        mock.patch.object(matmul, "multiprocessor_count", lambda device: MULTIPROCESSORS),
        mock.patch.object(Launcher, "form", form),
        mock.patch.object(Launcher, "_is_native", lambda self, tensor: True),
        mock.patch.object(torch.Tensor, "pin_memory", lambda self: self),
        mock.patch.object(F, "linear", _linear),
        mock.patch.object(torch, "empty_like", _empty_like),
        mock.patch.object(runners, "fetch_result", lambda *arguments: lambda: None),
        mock.patch.object(graph_runner, "fetch_result", lambda *arguments: lambda: None),
    ):
        for module in (activation, decode, matmul, norm, prefill, rope):  # what is settled here is for here alone
            patches.enter_context(mock.patch.object(module, "_KINDS", Kinds()))
        yield launches


def decodes(batch: int, context: int) -> Plan:
    def full(value: int) -> Ints:
        return np.full(batch, value, np.int32)

    rows = np.arange(batch, dtype=np.int32)
    return Plan(
        step=0,
        rows=rows,
        query_lens=full(1),
        context_lens=full(context),
        num_decodes=batch,
        token_ids=full(LAST_SAMPLED),
        sample_rows=rows,
        sample_sources=rows,
        sample_positions=full(context),
        table_updates=NO_UPDATES,
        copies=NO_COPIES,
    )


class _Replays:
    """Stands in for graphs."""

    def __call__(self, function: Callable[[], T]) -> Callable[[], T]:
        result = function()
        return lambda: result

    def used_bytes(self) -> int:
        return 0


def prompt_beside(decoding: Plan, tokens: int) -> Plan:
    """The same step with a prompt of so many tokens, which ends in it."""
    count = len(decoding.rows)

    def longer(array: Ints, value: int) -> Ints:
        return np.append(array, np.int32(value))

    return decoding._replace(
        rows=longer(decoding.rows, count),
        query_lens=longer(decoding.query_lens, tokens),
        context_lens=longer(decoding.context_lens, tokens),
        token_ids=np.append(decoding.token_ids, np.ones(tokens, np.int32)),
        sample_rows=longer(decoding.sample_rows, count),
        sample_sources=longer(decoding.sample_sources, count + tokens - 1),
        sample_positions=longer(decoding.sample_positions, tokens),
    )


def time_prompts(
    model: Transformer, config: EngineConfig, decoding: Plan, tokens: int, steps: int, launches: Launches
) -> dict[str, Any]:
    """One runner that launches such steps and one that replays them, in turn."""
    plan, kv = prompt_beside(decoding, tokens), make_kv_cache(model, config, 2)
    recording = GraphRunner(model, kv, replace(config, record_prompts=True), record=_Replays())
    runners: dict[str, Runner] = {"launched": Runner(model, kv, config), "replayed": recording}
    times: dict[str, list[float]] = {name: [] for name in runners}
    counts = dict.fromkeys(runners, 0)
    for runner in runners.values():
        for row in range(config.max_num_seqs):
            runner.sampler.set_row(row, SamplingParams(temperature=0), row, np.zeros(1, np.int32), [])
    for step in range(steps + 3):
        for name, runner in runners.items():
            launches.count, start = 0, time.thread_time()
            runner.launch(plan)
            if step >= 3:  # the third of a kind is replayed
                times[name].append(1000 * (time.thread_time() - start))
                counts[name] += launches.count
    return {name: {"launches": counts[name] // steps, **summary(found)} for name, found in times.items()}


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--context", type=int, default=1024)
    parser.add_argument("--prompt", type=int, default=64, help="tokens of the prompt beside 8 decodes")
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--fused", action="store_true", help="with fused_decode, whose products are our kernels too")
    parser.add_argument("--quantization", help="int8, int4 or fp8")
    parser.add_argument("--profile", action="store_true")
    given = parser.parse_args(arguments)

    torch.set_num_threads(1)
    shape = replace(ModelConfig.preset("llama-3.1-8b"), num_hidden_layers=given.layers)
    model = Transformer(shape, device="meta", dtype=torch.bfloat16)
    if given.quantization is not None:
        model.quantise(given.quantization)
    most = {"max_num_seqs": max(9, *given.batches), "max_num_batched_tokens": 2048}
    config = EngineConfig(max_model_len=2 * given.context, fused_decode=given.fused, **most)
    kinds = {"greedy": SamplingParams(temperature=0), "filtered": SamplingParams(temperature=0.8, top_p=0.9, top_k=50)}
    results: dict[str, dict[str, float | int]] = {}
    with without_a_device() as launches:
        for kind, params in kinds.items():
            runner = Runner(model, make_kv_cache(model, config, 2), config)
            for row in range(config.max_num_seqs):
                runner.sampler.set_row(row, params, row, np.zeros(1, np.int32), [])
            for batch in given.batches:
                plan, times = decodes(batch, given.context), []
                runner.launch(plan)
                launches.count = launches.num_early = 0
                profile = cProfile.Profile()
                for _ in range(given.steps):
                    start = time.thread_time()
                    if given.profile:
                        profile.runcall(runner.launch, plan)
                    else:
                        runner.launch(plan)
                    times.append(1000 * (time.thread_time() - start))
                per_step = launches.count // given.steps
                found = {"launches": per_step, "early": launches.num_early // given.steps, **summary(times)}
                results[f"{kind} {batch}"] = found
                print(f"{kind} {batch:3}: {found['median']:.2f} ms of the host a step, {per_step} launches", flush=True)
                if given.profile:
                    pstats.Stats(profile).sort_stats("tottime").print_stats(25)
        if not given.fused:
            found = time_prompts(model, config, decodes(8, given.context), given.prompt, given.steps, launches)
            results[f"prompt of {given.prompt} beside 8"] = found  # type: ignore[assignment]
            told = ", ".join(f"{times['median']:.2f} ms of the host {name}" for name, times in found.items())
            print(f"prompt of {given.prompt} tokens beside 8 decodes: {told}", flush=True)
    close("host", results=results, layers=given.layers, context=given.context)


if __name__ == "__main__":
    main()
