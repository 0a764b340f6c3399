"""Lanes: bounded threads for what is prepared, which nobody who leaves keeps busy; and the arguments of AsyncLLM."""

import asyncio
import gc
import threading
import time
import weakref
from concurrent.futures import CancelledError

import pytest

from llama import LLM, SamplingParams
from llama.api.errors import EngineClosedError, QueueFullError
from llama.async_llm.async_llm import AsyncLLM
from llama.async_llm.preparation import Lane, Lanes, grammar_key, size_of
from tests.model.models import tiny_model
from tests.server.helpers import PATIENCE, until, user

SCHEMA = {"type": "json_schema", "json_schema": {"enum": [1, 2]}}


@pytest.fixture
def lane():
    made = Lane("test", 2)
    yield made
    made.stop()
    made.join(PATIENCE)
    assert not any(thread.is_alive() for thread in made._threads)


def test_a_lane_gives_results_and_exceptions_in_order(lane):
    done = []
    futures = [lane.submit(lambda i=i: done.append(i) or i) for i in range(50)]
    assert [future.result(PATIENCE) for future in futures] == list(range(50))
    assert sorted(done) == list(range(50)) and len(lane._threads) <= 2
    with pytest.raises(ZeroDivisionError):
        lane.submit(lambda: 1 / 0).result(PATIENCE)
    assert lane.submit(lambda: "still here").result(PATIENCE) == "still here"


def test_what_is_cancelled_never_begins_or_is_dropped(lane):
    released, begun = threading.Event(), []

    def work():
        begun.append(1)
        assert released.wait(PATIENCE)

    futures = [lane.submit(work) for _ in range(5)]
    until(lambda: len(begun) == 2)
    assert lane.num_waiting == 3
    assert all(future.cancel() for future in futures)
    assert lane.num_waiting == 0
    released.set()
    with pytest.raises(CancelledError):
        futures[0].result(PATIENCE)
    assert lane.submit(lambda: len(begun)).result(PATIENCE) == 2


def test_an_idle_lane_keeps_nothing_alive(lane):
    class Thing:
        pass

    thing = Thing()
    reference = weakref.ref(thing)
    lane.submit(lambda thing=thing: thing).result(PATIENCE)
    del thing
    until(lambda: gc.collect() >= 0 and reference() is None)


def test_a_stopped_lane_lets_nobody_wait():
    lane, released = Lane("test", 1), threading.Event()
    futures = [lane.submit(lambda: released.wait(PATIENCE)) for _ in range(3)]
    until(lambda: lane.num_waiting == 2)
    lane.stop()
    for future in [*futures, lane.submit(lambda: None)]:
        with pytest.raises(EngineClosedError):
            future.result(PATIENCE)
    lane.join(0.01)  # its thread still works, and that is not waited for
    assert lane._threads[0].is_alive()
    released.set()
    lane.join(PATIENCE)
    assert not lane._threads[0].is_alive()


def test_patience_has_an_end():
    lane = Lane("test", 1, patience=0.05)
    first = lane.submit(lambda: time.sleep(0.2))
    second = lane.submit(lambda: None)
    with pytest.raises(QueueFullError, match=r"more than 0\.05 s") as full:
        second.result(PATIENCE)
    assert first.result() is None and full.value.retry_after > 0
    assert lane.submit(lambda: 1).result(PATIENCE) == 1
    lane.stop()


def test_which_lane():
    lanes = Lanes()
    assert lanes.of(10, None) is lanes.quick and lanes.of(1 << 16, None) is lanes.long
    assert lanes.of(10, "a") is lanes.of(10, "") is lanes.grammars
    lanes.compiled("a")
    lanes.compiled("")
    lanes.compiled(None)
    assert lanes.of(10, "a") is lanes.quick and lanes.of(1 << 16, "a") is lanes.long
    assert lanes.of(10, "") is lanes.grammars
    for i in range(100):
        lanes.compiled(str(i))
    assert lanes.of(10, "a") is lanes.of(10, "30") is lanes.grammars and lanes.of(10, "99") is lanes.quick


def test_sizes_and_keys():
    assert size_of(None) < 100 and 1000 <= size_of([user("x" * 1000)], None) < 1200
    assert size_of([[[]] * 100] * 100) >= 1 << 16
    deep = []
    for _ in range(100_000):
        deep = [deep]
    assert 1 << 16 <= size_of(deep) < 1 << 18
    assert size_of(["x"] * 10_000_000) < 1 << 25
    tools = [{"type": "function", "function": {"name": "f"}}]
    assert grammar_key(None) is grammar_key({"type": "text"}) is grammar_key(None, tools, "auto") is None
    keys = {grammar_key({"type": "json_object"}), grammar_key(SCHEMA), grammar_key(None, tools, "required")}
    keys.add(grammar_key(SCHEMA, tools, "required"))
    assert len(keys) == 4 and all(keys)
    assert grammar_key({"type": {1, 2}}) == grammar_key({"type": deep}) == grammar_key({"regex": "x" * 70_000}) == ""


# ---- arguments of AsyncLLM


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("slow_reader_timeout", "x", "slow_reader_timeout must be a number of seconds > 0"),
        ("slow_reader_timeout", None, "slow_reader_timeout must be a number of seconds > 0"),
        ("slow_reader_timeout", True, "slow_reader_timeout must be a number of seconds > 0"),
        ("slow_reader_timeout", float("nan"), "slow_reader_timeout must be a number of seconds > 0"),
        ("slow_reader_timeout", 0, "slow_reader_timeout must be a number of seconds > 0"),
        ("max_waiting_requests", "x", "max_waiting_requests must be an integer >= 0"),
        ("max_waiting_tokens", -1, "max_waiting_tokens must be an integer >= 0"),
        ("max_num_seqs", "x", "max_num_seqs must be an integer >= 1"),
        ("max_num_batched_tokens", "x", "max_num_batched_tokens must be an integer >= 1"),
        ("max_model_len", "x", "max_model_len must be"),
        ("num_blocks", "x", "num_blocks must be an integer >= 1"),
        ("block_size", "x", "block_size must be an integer >= 1"),
        ("gpu_memory_utilization", "x", "gpu_memory_utilization must be in (0, 1]"),
        ("max_loras", "x", "max_loras must be an integer >= 0"),
        ("max_lora_rank", "x", "max_lora_rank must be an integer >= 1"),
        ("seed", "x", "seed must be an integer"),
    ],
)
def test_arguments_of_the_wrong_type(name, value, message):
    with pytest.raises(ValueError) as refused:
        AsyncLLM(tiny_model(), **{name: value})
    assert str(refused.value).startswith(message) and str(refused.value).endswith(f"got {value!r}")


@pytest.mark.parametrize("how", ["closed", "dropped"])
def test_an_engine_takes_its_threads_with_it(how):

    async def use(llm):
        stream = await llm.submit([5] * 2000, SamplingParams(max_tokens=1))
        assert (await stream.result()).finished
        if how == "closed":
            await llm.close()

    llm = AsyncLLM(tiny_model(max_position_embeddings=4096), num_blocks=256, max_num_seqs=4)
    asyncio.run(use(llm))
    threads = [llm._stepper.thread, *llm._lanes.quick._threads]
    assert len(threads) == 2
    del llm
    gc.collect()
    for thread in threads:
        thread.join(PATIENCE)
        assert not thread.is_alive()


def test_the_timeout_of_a_drain():
    llm = AsyncLLM(LLM(tiny_model(), num_blocks=4))

    async def main():
        for timeout in ("x", -1, True, float("nan")):
            with pytest.raises(ValueError, match="timeout must be a number of seconds >= 0 or None"):
                await llm.drain(timeout)
        assert not llm.is_draining
        await llm.drain(0)
        await llm.close()

    asyncio.run(main())
