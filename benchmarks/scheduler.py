"""Host time per step: the whole engine with a null model, so that only scheduling and bookkeeping are left.

For 1, 32 and 256 running requests: steady decodes, the same with four drafts each that are always right (five tokens
for each request in a step), and a stream of requests that come, run 64 tokens and go. Then what the prefix cache costs
a prompt that hits nothing, and what a long sequence costs to allocate and to free.
"""

import argparse
from collections.abc import Callable

import numpy as np

from benchmarks.common import close, summary, timed
from llama.api.params import SamplingParams
from llama.engine.blocks import BlockPool, prefix_root
from llama.engine.config import EngineConfig
from llama.engine.engine import Engine
from llama.engine.plan import Plan, StepResult

TARGETS_US = {1: 40.0, 256: 400.0}


class NullRunner:
    """Every token is 7, at once."""

    vocab_size = 128_256
    lag = 0

    def __init__(self) -> None:
        self._results: dict[int, StepResult] = {}

    def launch(self, plan: Plan) -> Callable[[], StepResult]:
        count = len(plan.sample_rows)
        if count not in self._results:
            self._results[count] = StepResult(np.full(count, 7, np.int64), np.zeros(count, np.bool_))
        result = self._results[count]
        return lambda: result

    def validate(self, params: SamplingParams) -> None:
        pass

    def release_memory(self) -> None:
        pass

    def check_device(self) -> None:
        pass


def make_engine(num_seqs: int, drafts: bool = False) -> Engine:
    config = EngineConfig(
        max_model_len=8192,
        max_num_batched_tokens=8192,
        max_num_seqs=num_seqs,
        num_blocks=num_seqs * 512,
        speculative_config={"method": "ngram"} if drafts else None,
    )
    return Engine(None, config, runner=NullRunner(), eos_token_ids={128001, 128008, 128009})


def steady(num_seqs: int, steps: int, drafts: bool = False) -> list[float]:
    """Microseconds of each step while everybody decodes; prompts differ in length, so that blocks fill at any time."""
    engine = make_engine(num_seqs, drafts)
    max_tokens = min(8000, (steps + 40) * (5 if drafts else 1))
    for i in range(num_seqs):
        engine.add(engine.request(str(i), [i] * (100 + i % 16), SamplingParams(max_tokens=max_tokens)))
    while engine.metrics().num_waiting:
        engine.step()
    for _ in range(20):
        engine.step()
    return [timed(engine.step) * 1e6 for _ in range(steps)]


def stream(num_seqs: int, steps: int) -> list[float]:
    """Microseconds of each step while requests of 128 + 64 tokens come and go."""
    engine, params, count = make_engine(num_seqs), SamplingParams(max_tokens=64), 0
    times = []
    for step in range(steps + 64):
        while len(engine.scheduler.running) + engine.metrics().num_waiting < min(num_seqs, step * num_seqs // 64 + 1):
            engine.add(engine.request(str(count), [count % 1000, *range(127)], params))
            count += 1
        times.append(timed(engine.step) * 1e6)
    return times[64:]


def prefix_cache(rounds: int) -> list[float]:
    """Microseconds that look-up and publication add to 1,000 prompt tokens that hit nothing."""
    pool, random = BlockPool(100_000, 16), np.random.default_rng(0)
    root = prefix_root(b"model", b"")
    times = []
    for _ in range(rounds):
        tokens = random.integers(0, 128_000, 1000, dtype=np.int32)
        blocks = pool.allocate(62)

        def look_up_and_publish(tokens=tokens, blocks=blocks) -> None:
            packed = tokens.tobytes()
            path = pool.path(root, pool.match(root, packed, 62))
            pool.publish(path, blocks, packed[: 62 * 64])

        times.append(timed(look_up_and_publish) * 1e6)
        pool.free(blocks)
    return times


def long_sequence(rounds: int) -> tuple[list[float], list[float]]:
    """Microseconds per block to allocate and to free 131,072 tokens."""
    pool = BlockPool(10_000, 16)
    allocations, frees = [], []
    for _ in range(rounds):
        blocks: list[int] = []
        allocations.append(timed(lambda blocks=blocks: blocks.extend(pool.allocate(8192))) * 1e6 / 8192)
        frees.append(timed(lambda blocks=blocks: pool.free(blocks)) * 1e6 / 8192)
    return allocations, frees


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=1000)
    steps = parser.parse_args().steps
    results = {}
    for num_seqs in (1, 32, 256):
        results[f"steady decode, {num_seqs} running"] = summary(steady(num_seqs, steps))
        results[f"steady decode with drafts, {num_seqs} running"] = summary(steady(num_seqs, steps, drafts=True))
        results[f"requests come and go, {num_seqs} running"] = summary(stream(num_seqs, steps))
    results["prefix cache, 1,000 tokens without a hit"] = summary(prefix_cache(steps))
    allocations, frees = long_sequence(max(10, steps // 20))
    results["allocate 131,072 tokens, per block"] = summary(allocations)
    results["free 131,072 tokens, per block"] = summary(frees)
    print(f"{'microseconds':<44} {'median':>9} {'p10':>9} {'p90':>9}")
    for name, row in results.items():
        print(f"{name:<44} {row['median']:9.2f} {row['p10']:9.2f} {row['p90']:9.2f}")
    ratios = {
        f"target / median, {num_seqs} running": target / results[f"steady decode, {num_seqs} running"]["median"]
        for num_seqs, target in TARGETS_US.items()
    }
    close("scheduler", unit="us", results=results, ratios=ratios)


if __name__ == "__main__":
    main()
