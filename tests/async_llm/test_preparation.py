"""Preparation: bounded threads, which nobody who leaves keeps busy; and the arguments of AsyncLLM."""

import asyncio
import gc
import threading
import weakref
from concurrent.futures import CancelledError

import pytest

from llama import LLM, SamplingParams
from llama.api.errors import EngineClosedError, ParameterError, QueueFullError
from llama.async_llm.async_llm import AsyncLLM
from llama.async_llm.preparation import Preparation, grammar_key, size_of
from tests.model.models import tiny_model
from tests.server.helpers import PATIENCE, until, user

SCHEMA = {"type": "json_schema", "json_schema": {"enum": [1, 2]}}
NUM_QUICK = 4
LONG = 1 << 16


@pytest.fixture
def preparation():
    before = set(threading.enumerate())
    made = Preparation()
    yield made
    made.stop()
    until(lambda: made.num_pending == 0 and before.issuperset(threading.enumerate()))


def test_results_and_exceptions(preparation):
    done = []
    futures = [preparation.submit(lambda i=i: done.append(i) or i) for i in range(50)]
    assert [future.result(PATIENCE) for future in futures] == list(range(50))
    assert sorted(done) == list(range(50))
    with pytest.raises(ZeroDivisionError):
        preparation.submit(lambda: 1 / 0).result(PATIENCE)
    assert preparation.submit(lambda: "still here").result(PATIENCE) == "still here"


def test_what_is_cancelled_never_begins_or_is_dropped(preparation):
    released, begun = threading.Event(), []

    def work():
        begun.append(1)
        assert released.wait(PATIENCE)

    futures = [preparation.submit(work) for _ in range(NUM_QUICK + 3)]
    until(lambda: len(begun) == NUM_QUICK)
    assert preparation.num_pending == NUM_QUICK + 3
    assert all(future.cancel() for future in futures)
    assert preparation.num_pending == 0
    released.set()
    with pytest.raises(CancelledError):
        futures[0].result(PATIENCE)
    assert preparation.submit(lambda: len(begun)).result(PATIENCE) == NUM_QUICK


class Thing:
    pass


@pytest.mark.parametrize("how", ["done", "failed", "cancelled while it waits"])
def test_nothing_is_kept_alive(preparation, how):
    """Without a collection: what a request held, perhaps megabytes, goes at once."""
    thing, released = Thing(), threading.Event()
    reference = weakref.ref(thing)

    def work(thing):
        if how == "failed":
            raise ValueError
        return thing

    blockers = [preparation.submit(lambda: released.wait(PATIENCE)) for _ in range(NUM_QUICK)]
    future = preparation.submit(lambda thing=thing: work(thing))
    del thing
    gc.disable()
    try:
        if how == "cancelled while it waits":
            assert future.cancel() and reference() is None
        released.set()
        assert all(blocker.result(PATIENCE) for blocker in blockers)
        until(future.done)
        del future
        until(lambda: reference() is None)
    finally:
        gc.enable()


def test_once_stopped_nobody_waits():
    preparation, released = Preparation(), threading.Event()
    futures = [preparation.submit(lambda: released.wait(PATIENCE)) for _ in range(NUM_QUICK + 2)]
    preparation.stop()
    for future in [*futures, preparation.submit(lambda: None)]:
        with pytest.raises(EngineClosedError):
            future.result(PATIENCE)
    released.set()


def test_patience_has_an_end():
    preparation, released = Preparation(patience=0.05), threading.Event()
    begun = []
    first = [preparation.submit(lambda: begun.append(1) or released.wait(PATIENCE)) for _ in range(NUM_QUICK)]
    until(lambda: len(begun) == NUM_QUICK)
    second = preparation.submit(lambda: None)
    threading.Timer(0.2, released.set).start()
    with pytest.raises(QueueFullError, match=r"more than 0\.05 s") as full:
        second.result(PATIENCE)
    assert all(future.result() for future in first) and full.value.retry_after > 0
    assert preparation.submit(lambda: 1).result(PATIENCE) == 1
    preparation.stop()


def test_which_threads(preparation):
    def where(size, grammar):
        name = preparation.submit(lambda: threading.current_thread().name, size, grammar).result(PATIENCE)
        return name.removeprefix("llama-").split("_")[0]

    assert where(10, None) == "quick" and where(LONG, None) == "long"
    assert where(10, "a") == where(10, "") == "grammars"  # never seen; too long to be remembered
    assert where(10, "a") == "quick" and where(LONG, "a") == "long" and where(10, "") == "grammars"
    with pytest.raises(ZeroDivisionError):
        preparation.submit(lambda: 1 / 0, 10, "wrong").result(PATIENCE)
    assert where(10, "wrong") == "grammars"  # a grammar that could not be compiled is not remembered
    for i in range(100):
        where(10, str(i) * 2000)
    assert where(10, "a") == where(10, "30" * 2000) == "grammars" and where(10, "99" * 2000) == "quick"


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
        ("max_num_seqs", "x", "max_num_seqs must be an integer from 1 to 65536"),
        ("max_num_batched_tokens", "x", "max_num_batched_tokens must be an integer from 1 to 2147483647"),
        ("max_model_len", "x", "max_model_len must be"),
        ("num_blocks", "x", "num_blocks must be an integer from 1 to 2147483647"),
        ("block_size", "x", "block_size must be an integer from 1 to 2147483647"),
        ("gpu_memory_utilization", "x", "gpu_memory_utilization must be in (0, 1]"),
        ("max_loras", "x", "max_loras must be an integer from 0 to 2147483647"),
        ("max_lora_rank", "x", "max_lora_rank must be an integer from 1 to 2147483647"),
        ("seed", "x", "seed must be an integer"),
    ],
)
def test_arguments_of_the_wrong_type(name, value, message):
    with pytest.raises(ParameterError) as refused:
        AsyncLLM(tiny_model(), **{name: value})
    assert refused.value.param == name
    assert str(refused.value).startswith(message) and str(refused.value).endswith(f"got {value!r}")


@pytest.mark.parametrize("how", ["closed", "dropped"])
def test_an_engine_takes_its_threads_with_it(how):

    async def use(llm):
        stream = await llm.submit([5] * 2000, SamplingParams(max_tokens=1))
        assert (await stream.result()).finished
        until(lambda: len(set(threading.enumerate()) - before) == 2)
        if how == "closed":
            await llm.close()

    before = set(threading.enumerate())
    llm = AsyncLLM(tiny_model(max_position_embeddings=4096), num_blocks=256, max_num_seqs=4)
    asyncio.run(use(llm))
    del llm
    gc.collect()
    until(lambda: before.issuperset(threading.enumerate()))


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
