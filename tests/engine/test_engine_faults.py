"""Engine: what it does when something breaks, and that aborts leave nothing behind."""

import logging

import numpy as np
import pytest
import torch

from llama.api.errors import EngineDeadError
from llama.api.outputs import FinishReason
from llama.api.params import SamplingParams
from llama.engine.engine import Engine
from tests.engine.fakes import add, config, make, right, run
from tests.model.models import tiny_model


@pytest.mark.parametrize("lag", [0, 1])
def test_a_failing_step_ends_its_requests_and_leaves_a_usable_engine(lag, caplog):
    engine, device = make(lag)
    add(engine, "a", [1] * 6, SamplingParams(n=2, max_tokens=5))
    engine.step()
    engine.step()
    device.faults = [RuntimeError("broken kernel")]
    with caplog.at_level(logging.ERROR):
        ended = run(engine)
    assert [reason for _, reason in ended.values()] == [FinishReason.ERROR] * 2
    assert "broken kernel" in caplog.text
    add(engine, "b", [1] * 6, SamplingParams(max_tokens=5, seed=0))
    assert run(engine) == {("b", 0): right([1] * 6, 0, 5)}


def test_a_result_that_fails_late_ends_all_that_is_in_flight():
    engine, device = make(1)
    add(engine, "a", [1] * 6, SamplingParams(max_tokens=5))
    engine.step()
    add(engine, "b", [2] * 6, SamplingParams(max_tokens=5))
    engine.step()
    device.late_faults = [RuntimeError("broken kernel")]
    assert {key[0] for key, (_, reason) in run(engine).items() if reason is FinishReason.ERROR} == {"a", "b"}
    add(engine, "c", [1] * 6, SamplingParams(max_tokens=5, seed=0))
    assert run(engine) == {("c", 0): right([1] * 6, 0, 5)}


@pytest.mark.parametrize("lag", [0, 1])
def test_out_of_memory_costs_time_but_no_token(lag):
    engine, device = make(lag)
    device.most_tokens = 8
    for i in range(4):
        add(engine, str(i), [i] * 14, SamplingParams(max_tokens=4, seed=i))
    assert run(engine) == {(str(i), 0): right([i] * 14, i, 4) for i in range(4)}
    assert device.plan_sizes[:3] == [32, 16, 8]


def test_out_of_memory_to_the_end_fails_that_step_alone():
    engine, device = make()
    add(engine, "a", [1] * 30, SamplingParams(max_tokens=4, seed=0))
    add(engine, "b", [2] * 4, SamplingParams(max_tokens=4, seed=0))
    device.faults = [torch.OutOfMemoryError("no memory")] * 3
    assert [(o.request_id, o.finish_reason) for o in engine.step()] == [("a", FinishReason.ERROR)]
    assert device.plan_sizes == [32, 16, 8]
    assert run(engine) == {("b", 0): right([2] * 4, 0, 4)}


def test_an_interrupt_passes_through_and_the_step_is_taken_back():
    for late in (False, True):
        engine, device = make()
        add(engine, "a", [1] * 6, SamplingParams(max_tokens=5, seed=0))
        engine.step()
        (device.late_faults if late else device.faults).append(KeyboardInterrupt())
        with pytest.raises(KeyboardInterrupt):
            engine.step()
        engine.check()
        tokens = run(engine)["a", 0][0]
        assert tokens == right([1] * 6, 0, 5)[0][1:]  # the first one came before the interrupt


def test_a_dead_device_makes_a_dead_engine():
    engine, device = make()
    add(engine, "a", [1] * 6, SamplingParams(max_tokens=5))
    device.faults, device.is_dead = [RuntimeError("broken kernel")], True
    with pytest.raises(EngineDeadError, match="the device computes no more"):
        engine.step()
    with pytest.raises(EngineDeadError, match="dead"):
        engine.step()
    with pytest.raises(EngineDeadError, match="dead"):
        add(engine, "b", [1], SamplingParams())
    engine.abort("a")


def test_broken_bookkeeping_makes_a_dead_engine(monkeypatch):
    engine, _ = make()
    add(engine, "a", [1] * 6, SamplingParams(max_tokens=5))
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
        add(engine, name, prompt, params)
    good = run(engine)
    for name, prompt in prompts.items():
        add(engine, name, prompt, params)
    first = {output.request_id: output.token_ids for output in engine.step()}
    running = engine.scheduler.running
    (poisoned,) = [sequence for sequence in running.decoding if sequence.request_id == "b"]
    engine.runner.kv.data[:, :, running.blocks(poisoned.row)[0]] = float("nan")
    ended = run(engine)
    assert ended["b", 0] == ([], FinishReason.ERROR)
    for name in "ac":
        assert (first[name] + ended[name, 0][0], ended[name, 0][1]) == good[name, 0]
    add(engine, "b", prompts["b"], params)
    assert run(engine)["b", 0] == good["b", 0]


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
            add(engine, str(added), prompt, params)
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
