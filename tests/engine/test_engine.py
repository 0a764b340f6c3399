"""Engine: what it refuses, what it reports, and what it does when something breaks."""

import logging

import numpy as np
import pytest
import torch

from llama.engine import memory
from llama.engine.engine import Engine, EngineConfig, EngineDeadError
from llama.engine.request import FinishReason, SamplingParams
from tests.engine.fakes import FakeRunner, expected
from tests.model.models import tiny_model

VOCAB = 97


class FakeDevice(FakeRunner):
    """A FakeRunner with the rest of what an engine wants, and faults on demand."""

    def __init__(self, config: EngineConfig, lag: int = 0) -> None:
        super().__init__(
            num_rows=config.max_num_seqs,
            num_blocks=config.num_blocks,
            block_size=config.block_size,
            max_model_len=config.max_model_len,
            vocab_size=VOCAB,
        )
        self.lag = lag
        self.faults: list[BaseException] = []  # raised one by one by the next steps
        self.late_faults: list[BaseException] = []  # raised where the result is waited for
        self.most_tokens = 10**9  # that fit into memory
        self.is_dead = False
        self.plan_sizes: list[int] = []

    def launch(self, plan):
        self.plan_sizes.append(plan.num_tokens)
        if self.faults:
            raise self.faults.pop(0)
        if plan.num_tokens > self.most_tokens:
            raise torch.OutOfMemoryError("no memory")
        result = self.execute(plan)

        def wait():
            if self.late_faults:
                raise self.late_faults.pop(0)
            return result

        return wait

    def validate(self, params):
        pass

    def release_memory(self):
        pass

    def check_device(self):
        if self.is_dead:
            raise RuntimeError("the device is gone")


def config(**changes) -> EngineConfig:
    values = {"max_model_len": 64, "max_num_batched_tokens": 32, "max_num_seqs": 8, "block_size": 4, "num_blocks": 64}
    return EngineConfig(**{**values, **changes})


def make(lag: int = 0, **changes) -> tuple[Engine, FakeDevice]:
    device = FakeDevice(config(**changes), lag)
    return Engine(None, config(**changes), runner=device), device


def run(engine: Engine) -> dict[tuple[str, int], tuple[list[int], FinishReason]]:
    """Everything to its end -> tokens and reason of each completion that the engine ended itself."""
    tokens, ended = {}, {}
    while engine.has_unfinished:
        for output in engine.step():
            key = output.request_id, output.index
            assert key not in ended
            tokens.setdefault(key, []).extend(output.token_ids)
            if output.finish_reason is not None:
                ended[key] = tokens[key], output.finish_reason
        engine.check()
    assert engine.metrics().num_used_blocks == 0
    return ended


def right(prompt, seed: int, count: int):
    return expected(prompt, seed, count, VOCAB), FinishReason.LENGTH


# What is refused, and what is made of what is left open.


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"max_model_len": 1}, "max_model_len must be an integer >= 2, got 1"),
        ({"max_num_batched_tokens": 0}, "max_num_batched_tokens must be an integer >= 1, got 0"),
        ({"max_num_seqs": True}, "max_num_seqs must be an integer >= 1, got True"),
        ({"num_blocks": 0}, "num_blocks must be an integer >= 1, got 0"),
        ({"block_size": 24}, "block_size must be a power of two, got 24"),
        ({"seed": -1}, "seed must be an integer >= 0, got -1"),
        ({"gpu_memory_utilization": 1.5}, r"gpu_memory_utilization must be in \(0, 1\], got 1.5"),
    ],
)
def test_wrong_sizes_are_refused_by_name(changes, message):
    with pytest.raises(ValueError, match=message):
        config(**changes)


@pytest.mark.parametrize(
    "prompt, message",
    [
        ([], "non-empty list of integers"),
        ([1.0, 2.0], "non-empty list of integers"),
        ([True, False], "non-empty list of integers"),
        (["1"], "non-empty list of integers"),
        ([[1]], "non-empty list of integers"),
        ([1, VOCAB], r"97 is not in \[0, 97\)"),
        ([-1], r"-1 is not in \[0, 97\)"),
        ([2**70], "non-empty list of integers"),
        ([1] * 64, "the prompt has 64 tokens .* the context holds 64"),
    ],
)
def test_wrong_prompts_are_refused(prompt, message):
    engine, _ = make()
    with pytest.raises(ValueError, match=message):
        engine.add("a", prompt, SamplingParams())
    assert not engine.has_unfinished


def test_a_request_that_can_never_fit_is_refused_with_the_numbers():
    engine, _ = make(num_blocks=4)
    message = (
        r"a prompt of 10 tokens and up to 8 new ones can never run: the KV cache holds 16 tokens \(4 blocks of 4\)"
    )
    with pytest.raises(ValueError, match=message):
        engine.add("a", [1] * 10, SamplingParams(max_tokens=8))
    with pytest.raises(ValueError, match="a prompt of 17 tokens"):
        engine.add("a", [1] * 17, SamplingParams(max_tokens=None))
    engine.add("a", [1] * 10, SamplingParams(max_tokens=7, seed=0))  # the last token is never computed
    engine.add("b", [1] * 10, SamplingParams(max_tokens=None, seed=0))
    assert run(engine) == {(name, 0): right([1] * 10, 0, 7) for name in "ab"}


def test_max_tokens_is_clipped_to_the_context():
    engine, _ = make()
    engine.add("a", [1] * 60, SamplingParams(max_tokens=50, seed=0))
    engine.add("b", [2] * 63, SamplingParams(max_tokens=None, seed=0))
    ended = run(engine)
    assert (len(ended["a", 0][0]), len(ended["b", 0][0])) == (4, 1)


def test_an_id_is_used_by_one_request_at_a_time():
    engine, _ = make()
    engine.add("a", [1], SamplingParams(max_tokens=1))
    with pytest.raises(ValueError, match="'a' is in use"):
        engine.add("a", [1], SamplingParams(max_tokens=1))
    run(engine)
    engine.add("a", [1], SamplingParams(max_tokens=1))


def test_what_nobody_can_serve_is_refused():
    engine, _ = make()
    with pytest.raises(ValueError, match="no adapter named 'x'"):
        engine.add("a", [1], SamplingParams(), lora="x")
    with pytest.raises(ValueError, match="response_format"):
        engine.add("a", [1], SamplingParams(response_format={"type": "json_object"}))
    real = Engine(tiny_model(), config())
    with pytest.raises(ValueError, match="logit_bias"):
        real.add("a", [1], SamplingParams(logit_bias={VOCAB: 1.0}))


def test_seeds():
    engine, _ = make(seed=5)
    again, _ = make(seed=5)
    first = engine.add("a", [1], SamplingParams(n=3)), engine.add("b", [1], SamplingParams())
    assert first == (again.add("a", [1], SamplingParams(n=3)), again.add("b", [1], SamplingParams()))
    assert len({*first[0], *first[1]}) == 4
    assert engine.add("c", [1], SamplingParams(seed=9, n=2))[0] == 9
    fresh, _ = make()
    assert fresh.add("a", [1], SamplingParams()) != fresh.add("b", [1], SamplingParams())


def test_metrics():
    engine, _ = make(max_num_seqs=2)
    for name in "abc":
        engine.add(name, [1, 2, 3, 4, 5], SamplingParams(max_tokens=3))
    engine.step()
    metrics = engine.metrics()
    assert (metrics.num_waiting, metrics.num_running, metrics.num_steps) == (1, 2, 1)
    assert (metrics.num_used_blocks, metrics.kv_usage) == (3, 3 / 64)
    assert (metrics.num_prefix_queries, metrics.num_prefix_hits) == (10, 4)
    run(engine)
    metrics = engine.metrics()
    assert (metrics.num_prompt_tokens, metrics.num_generated_tokens) == (15, 9)
    assert metrics.num_cached_blocks > 0 and metrics.num_preemptions == 0


def test_text_level_ends():
    engine, _ = make()
    engine.add("a", [1], SamplingParams(n=2, max_tokens=5, seed=0))
    engine.step()
    engine.finish("a", 1, FinishReason.STOP, "a stop string")
    engine.finish("a", 1, FinishReason.STOP, "a stop string")
    engine.finish("unknown", 0, FinishReason.STOP)
    assert set(run(engine)) == {("a", 0)}


# What breaks.


@pytest.mark.parametrize("lag", [0, 1])
def test_a_failing_step_ends_its_requests_and_leaves_a_usable_engine(lag, caplog):
    engine, device = make(lag)
    engine.add("a", [1] * 6, SamplingParams(n=2, max_tokens=5))
    engine.step()
    engine.step()
    device.faults = [RuntimeError("broken kernel")]
    with caplog.at_level(logging.ERROR):
        ended = run(engine)
    assert [reason for _, reason in ended.values()] == [FinishReason.ERROR] * 2
    assert "broken kernel" in caplog.text
    engine.add("b", [1] * 6, SamplingParams(max_tokens=5, seed=0))
    assert run(engine) == {("b", 0): right([1] * 6, 0, 5)}


def test_a_result_that_fails_late_ends_all_that_is_in_flight():
    engine, device = make(1)
    engine.add("a", [1] * 6, SamplingParams(max_tokens=5))
    engine.step()
    engine.add("b", [2] * 6, SamplingParams(max_tokens=5))
    engine.step()
    device.late_faults = [RuntimeError("broken kernel")]
    assert {key[0] for key, (_, reason) in run(engine).items() if reason is FinishReason.ERROR} == {"a", "b"}
    engine.add("c", [1] * 6, SamplingParams(max_tokens=5, seed=0))
    assert run(engine) == {("c", 0): right([1] * 6, 0, 5)}


@pytest.mark.parametrize("lag", [0, 1])
def test_out_of_memory_costs_time_but_no_token(lag):
    engine, device = make(lag)
    device.most_tokens = 8
    for i in range(4):
        engine.add(str(i), [i] * 14, SamplingParams(max_tokens=4, seed=i))
    assert run(engine) == {(str(i), 0): right([i] * 14, i, 4) for i in range(4)}
    assert device.plan_sizes[:3] == [32, 16, 8]


def test_out_of_memory_to_the_end_fails_that_step_alone():
    engine, device = make()
    engine.add("a", [1] * 30, SamplingParams(max_tokens=4, seed=0))
    engine.add("b", [2] * 4, SamplingParams(max_tokens=4, seed=0))
    device.faults = [torch.OutOfMemoryError("no memory")] * 3
    assert [(o.request_id, o.finish_reason) for o in engine.step()] == [("a", FinishReason.ERROR)]
    assert device.plan_sizes == [32, 16, 8]
    assert run(engine) == {("b", 0): right([2] * 4, 0, 4)}


def test_an_interrupt_passes_through_and_the_step_is_taken_back():
    for late in (False, True):
        engine, device = make()
        engine.add("a", [1] * 6, SamplingParams(max_tokens=5, seed=0))
        engine.step()
        (device.late_faults if late else device.faults).append(KeyboardInterrupt())
        with pytest.raises(KeyboardInterrupt):
            engine.step()
        engine.check()
        tokens = run(engine)["a", 0][0]
        assert tokens == right([1] * 6, 0, 5)[0][1:]  # the first one came before the interrupt


def test_a_dead_device_makes_a_dead_engine():
    engine, device = make()
    engine.add("a", [1] * 6, SamplingParams(max_tokens=5))
    device.faults, device.is_dead = [RuntimeError("broken kernel")], True
    with pytest.raises(EngineDeadError, match="the device computes no more"):
        engine.step()
    with pytest.raises(EngineDeadError, match="dead"):
        engine.step()
    with pytest.raises(EngineDeadError, match="dead"):
        engine.add("b", [1], SamplingParams())
    engine.abort("a")


def test_broken_bookkeeping_makes_a_dead_engine(monkeypatch):
    engine, _ = make()
    engine.add("a", [1] * 6, SamplingParams(max_tokens=5))
    monkeypatch.setattr(engine.scheduler, "update", lambda plan, result: 1 / 0)
    with pytest.raises(EngineDeadError, match="bookkeeping"):
        engine.step()
    with pytest.raises(EngineDeadError):
        engine.step()


def test_nan_ends_its_request_alone():
    """NaN in the one block that only one of the requests reads."""
    model = tiny_model()
    engine = Engine(model, config())
    prompts = {name: [i + 1] * 9 for i, name in enumerate("abc")}
    params = SamplingParams(max_tokens=6, temperature=0)
    for name, prompt in prompts.items():
        engine.add(name, prompt, params)
    good = run(engine)
    for name, prompt in prompts.items():
        engine.add(name, prompt, params)
    first = {output.request_id: output.token_ids for output in engine.step()}
    running = engine.scheduler.running
    (poisoned,) = [sequence for sequence in running.decoding if sequence.request_id == "b"]
    for cache in (*engine.runner.kv.k, *engine.runner.kv.v):
        cache[running.blocks(poisoned.row)[0]] = float("nan")
    ended = run(engine)
    assert ended["b", 0] == ([], FinishReason.ERROR)
    for name in "ac":
        assert (first[name] + ended[name, 0][0], ended[name, 0][1]) == good[name, 0]
    engine.add("b", prompts["b"], params)
    assert run(engine)["b", 0] == good["b", 0]


def test_a_prompt_is_scored_in_pieces():
    model = tiny_model()
    engine = Engine(model, config(max_num_batched_tokens=64, max_model_len=64))
    engine.runner._scored_rows = 5
    sizes = []
    handle = model.lm_head.register_forward_hook(lambda module, args, output: sizes.append(output.shape[0]))
    engine.add("a", list(range(40)), SamplingParams(max_tokens=1, prompt_logprobs=0))
    (output,) = engine.step()
    handle.remove()
    assert len(output.prompt_logprobs) == 40 and max(sizes) == 5


def test_blocks_fit_into_free_memory(monkeypatch, caplog):
    model = tiny_model()
    per_token = 2 * 2 * 2 * 16 * 8  # layers, k and v, heads, head_dim, bytes
    monkeypatch.setattr(memory, "free_cpu_bytes", lambda: int(per_token * 4 * 10.5 / memory.CPU_FRACTION))
    with caplog.at_level(logging.INFO):
        assert Engine(model, config(num_blocks=None)).metrics().num_blocks == 10
    assert len([r for r in caplog.records if "KV cache: 10 blocks of 4 tokens" in r.message]) == 1
    monkeypatch.setattr(memory, "free_cpu_bytes", lambda: 1 << 40)
    assert Engine(model, config(num_blocks=None)).metrics().num_blocks == 8 * 16  # all that eight sequences can fill
    monkeypatch.setattr(memory, "free_cpu_bytes", lambda: 100)
    with pytest.raises(MemoryError, match="one KV block takes 4096 bytes"):
        Engine(model, config(num_blocks=None))


def test_free_memory_is_read():
    assert 0 < memory.free_cpu_bytes() < 1 << 50


def test_two_engines_do_not_mix():
    engines = [Engine(tiny_model(seed=seed), config()) for seed in (0, 1)]
    params = SamplingParams(max_tokens=8, temperature=0)
    alone = []
    for engine in engines:
        engine.add("a", [1, 2, 3], params)
        alone.append(run(engine))
    for engine in engines:
        engine.add("a", [1, 2, 3], params)
    tokens = [[], []]
    while any(engine.has_unfinished for engine in engines):
        for i, engine in enumerate(engines):
            tokens[i] += [token for output in engine.step() for token in output.token_ids]
    assert tokens == [result["a", 0][0] for result in alone] and tokens[0] != tokens[1]


def state_of(engine: Engine, request_id: str) -> str:
    scheduler = engine.scheduler
    siblings = scheduler._requests.get(request_id)
    if siblings is None:
        return "ended"
    if any(sequence.followers for sequence in siblings):
        return "with completions that wait for it"
    if siblings[0] in scheduler.waiting:
        return "preempted" if siblings[0].output_token_ids else "queued"
    if siblings[0] in scheduler.running.prefilling:
        return "in its prompt"
    return "decoding" if len(siblings) == 1 else "decoding several completions"


@pytest.mark.slow
@pytest.mark.parametrize("lag", [0, 1])
def test_a_hundred_thousand_aborts_leak_nothing(lag):
    """50,000 each without and with a step in flight."""
    random = np.random.default_rng(lag)
    engine, _ = make(lag, max_num_batched_tokens=64, max_num_seqs=16, num_blocks=48)
    states: dict[str, int] = {}
    added = 0
    live: list[str] = []
    while sum(states.values()) < 50_000:
        while len(live) < 24:
            added += 1
            prompt = random.integers(0, 3, random.integers(1, 40)).tolist()
            params = SamplingParams(n=int(random.choice([1, 1, 1, 3])), max_tokens=int(random.integers(1, 24)))
            engine.add(str(added), prompt, params)
            live.append(str(added))
        for _ in range(int(random.integers(1, 4))):
            name = live.pop(int(random.integers(len(live))))
            state = state_of(engine, name)
            states[state] = states.get(state, 0) + 1
            engine.abort(name)
            assert name not in engine.scheduler
        engine.step()
        if added % 50 == 0:
            engine.check()
    for name in live:
        engine.abort(name)
    run(engine)
    assert len(states) == 7 and min(states.values()) > 100, states
    assert engine.metrics().num_preemptions > 1000
