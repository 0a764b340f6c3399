"""AsyncLLM: bounds of the queue, draining, closing, faults, and what becomes of what is dropped."""

import asyncio
import gc
import threading

import pytest

from llama import LLM, SamplingParams
from llama.api.errors import EngineClosedError, EngineDeadError, QueueFullError
from llama.async_llm.admission import Admission
from llama.async_llm.async_llm import AsyncLLM
from tests.async_llm.helpers import LONG, PATIENCE, endless, run, text_of, until
from tests.fakes import script_of


def test_the_queue_is_bounded_by_requests(scripted):
    llm, _ = scripted(endless, max_waiting_requests=2)  # and four may run

    async def main():
        streams = [await llm.submit("Hi", LONG) for _ in range(6)]
        with pytest.raises(QueueFullError, match="6 requests run or wait") as full:
            await llm.submit("Hi", LONG)
        assert 1 <= full.value.retry_after <= 60
        streams[0].close()
        await until(lambda: llm.num_requests == 5)
        (await llm.submit("Hi", LONG)).close()
        for stream in streams:
            stream.close()
        await until(lambda: not llm.num_requests)

    run(main())


def test_the_queue_is_bounded_by_prompt_tokens_but_takes_any_prompt_when_empty(scripted):
    llm, engine = scripted(max_waiting_tokens=10)
    turn = threading.Event()

    async def main():
        engine.before_step = lambda: turn.wait(PATIENCE)
        long = asyncio.create_task(text_of(llm.generate("x" * 20)))
        await until(lambda: llm.num_waiting_tokens == 20)
        with pytest.raises(QueueFullError, match="20 prompt tokens wait; 2 more would exceed 10"):
            await llm.submit("Hi")
        assert llm.num_requests == 1
        turn.set()
        assert await long == "x" * 20
        assert await text_of(llm.generate("Hi")) == "Hi"

    run(main())


def test_permits_are_released_once():
    admission = Admission(2, 100)
    permit = admission.admit()
    admission.wait_with(permit, 5)
    empty = admission.when_empty()
    assert (admission.num_requests, admission.num_waiting_tokens, empty.done()) == (1, 5, False)
    admission.began(permit)
    admission.release(permit)
    admission.release(permit)
    assert (admission.num_requests, admission.num_waiting_tokens, empty.done()) == (0, 0, True)
    assert admission.when_empty().done()


def test_drain_finishes_what_was_taken_and_refuses_the_rest(scripted):
    llm, engine = scripted()
    turn = threading.Event()
    engine.before_step = lambda: turn.wait(PATIENCE)

    async def main():
        tasks = [asyncio.create_task(text_of(llm.generate(f"text {i}"))) for i in range(3)]
        await until(lambda: llm.num_requests == 3)
        drained = asyncio.create_task(llm.drain())
        await until(lambda: llm.is_draining)
        with pytest.raises(EngineClosedError):
            await llm.submit("late")
        turn.set()
        await drained
        assert await asyncio.gather(*tasks) == ["text 0", "text 1", "text 2"]
        await llm.drain()

    run(main())


def test_drain_aborts_what_takes_too_long(scripted):
    llm, engine = scripted(endless)

    async def main():
        stream = await llm.submit("Hi", LONG)
        await llm.drain(timeout=0.01)
        assert not engine.has_unfinished
        assert (await stream.result()).outputs[0].finish_reason == "abort"

    run(main())


def test_close_ends_everything_and_what_was_written_stays_readable(scripted):
    llm, engine = scripted(endless)

    async def main():
        async with llm:
            streams = [await llm.submit("Hi", LONG) for _ in range(3)]
            await anext(streams[0])
        for stream in streams:
            assert (await stream.result()).outputs[0].finish_reason == "abort"
        assert not engine.has_unfinished
        await llm.close()
        with pytest.raises(EngineClosedError):
            await llm.submit("late")

    run(main())


def test_a_fault_of_the_engine_reaches_everyone_who_waits(scripted):
    llm, engine = scripted(endless)

    broken = threading.Event()

    def fail():
        if broken.is_set():
            raise ZeroDivisionError("broken")

    engine.before_step = fail

    async def main():
        streams = [await llm.submit("Hi", LONG) for _ in range(3)]
        broken.set()
        for stream in streams:
            with pytest.raises(EngineDeadError, match="ZeroDivisionError: broken") as dead:
                await stream.result()
            assert isinstance(dead.value.__cause__, ZeroDivisionError)
        assert llm.is_dead and llm.num_requests == 0
        with pytest.raises(EngineDeadError):
            await llm.submit("Hi")
        streams[0].close()
        await llm.drain()

    run(main())


def test_two_engines_and_two_event_loops(scripted):
    first, second = scripted()[0], scripted(lambda prompt, index: script_of("other"))[0]

    async def both():
        return await asyncio.gather(text_of(first.generate("Hi")), text_of(second.generate("Hi")))

    answers = []
    thread = threading.Thread(target=lambda: answers.append(run(both())))
    thread.start()
    answers.append(run(both()))
    thread.join(PATIENCE)
    assert answers == [["Hi", "other"]] * 2


def test_a_stream_is_read_on_another_event_loop_than_it_was_made_on(scripted):
    llm, engine = scripted()
    turn = threading.Semaphore(0)
    engine.before_step = lambda: turn.acquire(timeout=PATIENCE)  # so that each piece is waited for
    first = asyncio.new_event_loop()
    thread = threading.Thread(target=first.run_forever)
    thread.start()
    stream = asyncio.run_coroutine_threadsafe(llm.submit("on another"), first).result(PATIENCE)

    async def main():
        asyncio.get_running_loop().set_debug(True)  # a wake-up from another thread is an error
        task = asyncio.create_task(stream.result())
        while not task.done():
            await asyncio.sleep(0.001)  # so that the reader waits again before each step
            turn.release()
        return (await task).outputs[0].text

    try:
        assert run(main()) == "on another"
    finally:
        first.call_soon_threadsafe(first.stop)
        thread.join(PATIENCE)
        first.close()
        turn.release(1000)


def test_an_event_loop_that_is_gone_takes_its_requests_with_it(scripted):
    llm, engine = scripted(endless)

    async def start():
        return await llm.submit("Hi", LONG)

    stream = run(start())  # kept, never read, its loop closed
    run(until(lambda: not llm.num_requests and not engine.has_unfinished))
    assert stream.request_id


def test_a_dropped_engine_ends_its_thread(parts):
    llm = AsyncLLM(LLM(*parts, num_blocks=4, max_model_len=64))
    thread = llm._stepper.thread
    del llm
    gc.collect()
    thread.join(PATIENCE)
    assert not thread.is_alive()


def test_the_engines_counts_can_be_read_at_any_time(parts):
    llm = AsyncLLM(LLM(*parts, num_blocks=4, max_model_len=64))

    async def main():
        async with llm:
            await (await llm.submit("Hi", SamplingParams(max_tokens=2, ignore_eos=True))).result()
            metrics = llm.metrics()
            assert (metrics.num_waiting, metrics.num_running, metrics.num_blocks) == (0, 0, 4)
            assert (metrics.num_prompt_tokens, metrics.num_generated_tokens) == (2, 2)

    run(main())


def test_arguments_are_checked(parts):
    llm = LLM(*parts, num_blocks=4, max_model_len=64)
    for arguments, words in (
        ({"max_waiting_requests": -1}, "max_waiting_requests"),
        ({"max_waiting_tokens": 1.5}, "max_waiting_tokens"),
        ({"slow_reader_timeout": 0}, "slow_reader_timeout"),
        ({"dtype": "float32"}, "has its arguments already"),
    ):
        with pytest.raises(ValueError, match=words):
            AsyncLLM(llm, **arguments)
