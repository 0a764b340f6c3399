"""Runs of requests whose logits and answers are compared bit for bit, on any device."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch

from llama.engine.config import EngineConfig
from llama.engine.engine import Engine
from llama.engine.graph_runner import GraphRunner
from llama.model.kv_cache import KVCache
from llama.model.transformer import Transformer
from tests.test_equivalence import EOS, Case, Run, ask, make_engine

ASKS = (
    ask(0, 1, temperature=0, logprobs=3),
    ask(40, 3, temperature=0, logprobs=2),
    ask(48, 36, temperature=0, ignore_eos=True, max_tokens=20, prompt_logprobs=2),
    ask(32, 33, temperature=0.8, top_p=0.9, logprobs=3),
    ask(17, 5, n=3, temperature=1.5, top_k=20, logprobs=0),
    ask(48, 0, n=2, temperature=1.0, min_p=0.02, ignore_eos=True),
    ask(20, 9, temperature=1.0, repetition_penalty=1.4, frequency_penalty=0.5, logprobs=1, logprobs_mode="processed"),
    ask(48, 90, temperature=1.0, ignore_eos=True, max_tokens=30, logprobs=1),
)
Key = tuple[str, int, int]  # request, completion, position of the token to be drawn


@dataclass
class Seen:
    """What a run gave: the logits that each token was drawn from, and all that the requests were told."""

    logits: dict[Key, torch.Tensor] = field(default_factory=dict)
    outputs: dict[tuple[str, int], list[Any]] = field(default_factory=dict)


def record_logits(engine: Engine, seen: Seen) -> None:
    """Logits behind a wrong draft are replaced by those that are computed in their place."""
    runner, running = engine.runner, engine.scheduler.running
    compute, sample, draw = runner._compute, runner._sample, runner._draw

    def keys_of(plan) -> list[Key]:
        by_row = {s.row: s for s in (*running.prefilling, *running.decoding)}
        return [
            (by_row[row].request_id, by_row[row].index, position)
            for row, position in zip(plan.sample_rows.tolist(), plan.sample_positions.tolist(), strict=True)
        ]

    def recorded_sample(plan, batch, hidden):
        runner.keys = keys_of(plan)
        return sample(plan, batch, hidden)

    def recorded_draw(logits, *rest):
        seen.logits.update(zip(runner.keys, logits.clone(), strict=True))
        return draw(logits, *rest)

    def recorded_compute(plan):
        if not runner._is_plain(plan):
            runner._draw = recorded_draw
            result = compute(plan)
            runner._draw = draw
            return result
        keys, result = keys_of(plan), compute(plan)
        seen.logits.update(zip(keys, runner._logits[: len(keys)].clone(), strict=True))
        return result

    runner._sample = recorded_sample
    if isinstance(runner, GraphRunner):
        runner._compute = recorded_compute
    else:
        runner._draw = recorded_draw


def run(
    made: Transformer, case: Case, asks=ASKS, *, answers: Seen | None = None, record: Callable | None = None, **options
) -> Seen:
    """`record` stands in for CUDA graphs."""

    def answer_to(request_id: str, index: int) -> list[int]:
        given = [] if answers is None else answers.outputs.get((request_id, index), [])
        return [token for entry in given[:1] for token in entry]

    def recorded(made: Transformer, config: EngineConfig) -> GraphRunner:
        kv = KVCache(made.config, config.num_blocks, config.block_size, dtype=made.dtype, device=made.device)
        return GraphRunner(made, kv, config, eos_token_ids=frozenset({EOS}), record=record)

    runner = None if record is None else recorded
    engine = make_engine(case, made, answers=answer_to, runner=runner, **{"deterministic": True} | options)
    if case.poison:
        engine.runner.kv.data.fill_(float("nan"))
    if case.cache == "warm":
        Run(case, engine).answers(asks)
    seen = Seen()
    record_logits(engine, seen)
    running = Run(case, engine)
    for number, (_, index, outputs) in zip(numbers(asks), running.answers(asks), strict=True):
        seen.outputs[f"ask {number}", index] = [
            [token for output in outputs for token in output.token_ids],
            [entry for output in outputs for entry in output.logprobs or ()],
            outputs[0].prompt_logprobs,
            outputs[-1].finish_reason,
        ]
    return seen


def numbers(asks) -> list[int]:
    return [number for number, asked in enumerate(asks) for _ in range(asked.params.n)]


def differences(ours: Seen, theirs: Seen) -> list[object]:
    wrong: list[object] = [key for key, output in theirs.outputs.items() if ours.outputs[key] != output]
    for key, row in theirs.logits.items():
        if key not in ours.logits or not torch.equal(ours.logits[key], row):
            wrong.append(key)
    return wrong
