"""AsyncLLM: many readers, one step thread; cancellation, bounds, draining, faults."""

import asyncio
import contextlib
import gc
import random
import threading
import time

import pytest

from llama import LLM, SamplingParams
from llama.async_llm import AsyncLLM, EngineClosedError, EngineDeadError, QueueFullError
from llama.async_llm.seats import Seats
from llama.output import Replies
from tests.fakes import EOS_ID, ScriptedEngine, byte_tokenizer, script_of
from tests.model.models import tiny_model

PATIENCE = 60  # seconds after which a test that waits for something has failed


def endless(prompt, index):
    return [ord("a")] * 1_000_000


def echo(prompt, index):
    return [*prompt, *b"!" * index, EOS_ID]


@pytest.fixture(scope="module")
def parts():
    return tiny_model(vocab_size=257), byte_tokenizer()


@pytest.fixture
def scripted(parts):
    """Makes AsyncLLMs over a ScriptedEngine: (script, arguments) -> (AsyncLLM, the engine)."""
    made = []

    def make(script=echo, *, lag=0, **arguments):
        llm = LLM(*parts, num_blocks=4, max_num_seqs=4, max_model_len=512)
        llm.engine = ScriptedEngine(script, lag=lag)
        llm.replies = Replies(llm.engine, llm.tokenizer)
        made.append(AsyncLLM(llm, **arguments))
        return made[-1], llm.engine

    before = threading.active_count()
    yield make
    for llm in made:
        asyncio.run(llm.close())
        assert llm.num_requests == 0 and llm.num_waiting_tokens == 0
    assert threading.active_count() == before


def run(coroutine):
    return asyncio.run(asyncio.wait_for(coroutine, PATIENCE))


async def until(condition):
    while not condition():
        await asyncio.sleep(0.001)


async def text_of(pieces) -> str:
    return "".join([piece.text async for piece in pieces])


LONG = SamplingParams(max_tokens=None, ignore_eos=True)


def test_pieces_arrive_and_add_up(scripted):
    llm, _ = scripted()

    async def main():
        pieces = [piece async for piece in llm.generate("Käse 🙂")]
        assert "".join(p.text for p in pieces) == "Käse 🙂"
        assert pieces[-1].finish_reason == "stop" and pieces[-1].usage.completion_tokens == 11
        assert await text_of(llm.generate([72, 105])) == "Hi"
        assert await asyncio.gather(*(text_of(llm.generate(f"text {i}")) for i in range(50))) == [
            f"text {i}" for i in range(50)
        ]

    run(main())


def test_result_is_the_whole_answer_with_everything_that_generate_gives(scripted):
    llm, _ = scripted(lag=1)

    async def main():
        stream = await llm.submit("one STOP", SamplingParams(n=2, stop="STOP", logprobs=0), request_id="mine")
        output = await stream.result()
        assert (output.request_id, output.prompt, output.finished) == ("mine", "one STOP", True)
        assert [c.text for c in output.outputs] == ["one ", "one "]
        assert output.outputs[0].stop_reason == "STOP" and output.outputs[0].cumulative_logprob < 0
        assert output.metrics.queued <= output.metrics.first_token <= output.metrics.finished

    run(main())


def test_the_event_loop_turns_while_a_step_runs(scripted):
    llm, engine = scripted()
    turn = threading.Event()
    engine.before_step = lambda: turn.wait(PATIENCE) or pytest.fail("the event loop stood still")

    async def main():
        task = asyncio.create_task(text_of(llm.generate("Hi")))
        await until(lambda: llm.seconds_in_step > 0)
        turn.set()  # only a loop that turns gets here while the step waits
        assert await task == "Hi"
        await until(lambda: llm.seconds_in_step == 0)

    run(main())


def test_long_prompts_are_encoded_off_the_event_loop(scripted, monkeypatch):
    llm, _ = scripted()
    threads = []

    def request(*arguments, really=llm.llm.inputs.request, **names):
        threads.append(threading.current_thread())
        return really(*arguments, **names)

    monkeypatch.setattr(llm.llm.inputs, "request", request)

    async def main():
        assert await text_of(llm.generate("short")) == "short"
        with pytest.raises(ValueError, match="no room is left"):
            await llm.submit("x" * 5000)

    run(main())
    assert threads[0] is threading.main_thread() and threads[1] is not threading.main_thread()


@pytest.mark.parametrize("how", ["break", "aclose", "cancel", "timeout", "dropped"])
def test_leaving_a_stream_aborts_its_request(scripted, how):
    llm, engine = scripted(endless)

    async def main():
        async def read():
            async for _ in llm.generate("Hi", LONG, request_id="r"):
                if how == "break":
                    break

        if how == "break":
            await read()
        elif how == "aclose":
            pieces = llm.generate("Hi", LONG, request_id="r")
            await anext(pieces)
            await pieces.aclose()
        elif how == "cancel":
            task = asyncio.create_task(read())
            await until(lambda: engine.num_steps > 2)
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
        elif how == "timeout":
            with pytest.raises(TimeoutError):
                await asyncio.wait_for(read(), 0.01)
        else:
            pieces = llm.generate("Hi", LONG, request_id="r")
            await anext(pieces)
            del pieces
            gc.collect()
        await until(lambda: not llm.num_requests)
        assert engine.aborted == ["r"] and not engine.has_unfinished

    run(main())


def test_cancelling_while_the_engine_has_not_taken_the_request_leaves_nothing(scripted):
    llm, engine = scripted(endless)
    turn = threading.Event()
    engine.before_step = lambda: turn.wait(PATIENCE)

    async def main():
        first = await llm.submit("a", LONG)
        await until(lambda: llm.seconds_in_step > 0)
        waiting = asyncio.create_task(llm.submit("b", LONG))
        await until(lambda: llm.num_requests == 2)
        waiting.cancel()
        with pytest.raises(asyncio.CancelledError):
            await waiting
        assert llm.num_requests == 1
        turn.set()
        first.close()
        await until(lambda: not llm.num_requests and not engine.has_unfinished)

    run(main())


def test_abort_is_idempotent_and_legal_after_the_end(scripted):
    llm, engine = scripted()

    async def main():
        stream = await llm.submit("Hi")
        assert (await stream.result()).outputs[0].finish_reason == "stop"
        stream.close()
        stream.close()
        assert [piece async for piece in stream] == []
        assert await text_of(llm.generate("again")) == "again"

    run(main())
    assert engine.aborted == []


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


def test_seats_are_given_back_once():
    seats = Seats(2, 100)
    seat = seats.take()
    seats.wait_with(seat, 5)
    empty = seats.when_empty()
    assert (seats.taken, seats.waiting_tokens, empty.done()) == (1, 5, False)
    seats.began(seat)
    seats.give_back(seat)
    seats.give_back(seat)
    assert (seats.taken, seats.waiting_tokens, empty.done()) == (0, 0, True) and seats.when_empty().done()


def test_a_slow_reader_gets_its_backlog_in_one_piece(scripted):
    llm, engine = scripted()

    async def main():
        stream = await llm.submit("x" * 200, SamplingParams(n=2))
        await until(lambda: not engine.has_unfinished)
        await until(lambda: not llm.num_requests)
        pieces = [piece async for piece in stream]
        assert [(p.index, p.text) for p in pieces] == [(0, "x" * 200), (1, "x" * 200 + "!")]
        assert [p.usage is None for p in pieces] == [True, False]

    run(main())


def test_a_reader_that_stops_reading_is_given_up(scripted):
    llm, engine = scripted(endless, slow_reader_timeout=0.01)

    async def main():
        stream = await llm.submit("Hi", LONG)
        first = await anext(stream)
        await until(lambda: not llm.num_requests)
        assert not engine.has_unfinished
        pieces = [first, *[piece async for piece in stream]]
        assert pieces[-1].finish_reason == "abort" and pieces[-1].usage.completion_tokens > 0

    run(main())


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


def test_refusals_come_before_the_first_piece_and_leave_nothing(scripted):
    llm, engine = scripted()

    async def main():
        for prompt, params, words in (
            ("", None, "prompt is empty"),
            ([999], None, "prompt_token_ids"),
            ("x" * 512, None, "no room is left"),
            ("Hi", "greedy", "must be a SamplingParams"),
        ):
            with pytest.raises(ValueError, match=words):
                await llm.submit(prompt, params)
        with pytest.raises(ValueError, match="no adapter"):
            await llm.submit("Hi", lora="style")
        with pytest.raises(ValueError, match="no chat template"):
            await llm.submit_chat([{"role": "user", "content": "Hi"}])
        stream = await llm.submit("Hi", request_id="same")
        await stream.result()

    run(main())
    assert not engine.has_unfinished


def test_a_request_id_in_use_is_refused_by_the_step_thread(scripted):
    llm, _ = scripted(endless)

    async def main():
        stream = await llm.submit("Hi", LONG, request_id="same")
        with pytest.raises(ValueError, match="'same' is in use"):
            await llm.submit("Hi", LONG, request_id="same")
        assert llm.num_requests == 1
        stream.close()
        await until(lambda: not llm.num_requests)

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


# ---- a crowd on a real engine


def crowd(parts, count: int, seed: int) -> None:
    """Many requests at once, some cancelled at random: the others say what they say alone."""
    chance = random.Random(seed)
    prompts = [[chance.randrange(256) for _ in range(chance.randrange(1, 40))] for _ in range(count)]
    params = [
        SamplingParams(
            seed=number,
            temperature=chance.choice([0.0, 0.7, 1.5]),
            max_tokens=chance.randrange(1, 12),
            ignore_eos=True,
            n=chance.choice([1, 1, 1, 2]),
            stop=chance.choice([(), ("a", "\x01")]),
            repetition_penalty=chance.choice([1.0, 1.3]),
        )
        for number in range(count)
    ]
    leaves_after = [chance.choice([None, None, 0, 1, 3]) for _ in range(count)]
    arguments = {"num_blocks": 64, "block_size": 4, "max_model_len": 64, "max_num_batched_tokens": 48}
    alone = LLM(*parts, max_num_seqs=4, enable_prefix_caching=False, **arguments)
    expected = {
        i: [c.token_ids for c in alone.generate(prompts[i], params[i], use_tqdm=False)[0].outputs]
        for i in range(count)
        if leaves_after[i] is None
    }
    together = LLM(*parts, max_num_seqs=16, **arguments)

    async def ask(llm, number):
        stream = await llm.submit(prompts[number], params[number])
        if leaves_after[number] is None:
            return [c.token_ids for c in (await stream.result()).outputs]
        for _ in range(leaves_after[number]):
            with contextlib.suppress(StopAsyncIteration):
                await anext(stream)
        stream.close()
        return None

    async def main():
        async with AsyncLLM(together, max_waiting_requests=count) as llm:
            answers = await asyncio.gather(*(ask(llm, i) for i in range(count)))
            await llm.drain()
            return answers

    answers = asyncio.run(asyncio.wait_for(main(), 20 * PATIENCE))
    assert {i: answer for i, answer in enumerate(answers) if leaves_after[i] is None} == expected
    assert not together.engine.has_unfinished
    together.engine.check()


def test_survivors_of_a_crowd_say_what_they_say_alone(parts):
    crowd(parts, 60, seed=1)


@pytest.mark.slow
def test_a_thousand_at_once(parts):
    crowd(parts, 1000, seed=2)


@pytest.mark.slow
def test_the_event_loop_does_not_lag_while_long_prompts_are_computed(parts):
    """Told, not asserted: the longest pause of a loop that only sleeps while the engine works."""
    llm = AsyncLLM(LLM(*parts, num_blocks=512, max_model_len=512))

    async def main():
        pauses, done = [], asyncio.Event()

        async def watch():
            while not done.is_set():
                began = time.monotonic()
                await asyncio.sleep(0.001)
                pauses.append(time.monotonic() - began - 0.001)

        watcher = asyncio.create_task(watch())
        greedy = SamplingParams(temperature=0, max_tokens=None, ignore_eos=True)
        texts = await asyncio.gather(*(text_of(llm.generate("x" * 400, greedy)) for _ in range(16)))
        done.set()
        await watcher
        await llm.close()
        return sorted(pauses), texts

    pauses, texts = run(main())
    print(f"event loop lag: p99 {pauses[int(0.99 * len(pauses))] * 1e3:.1f} ms, worst {pauses[-1] * 1e3:.1f} ms")
    assert len(texts) == 16 and len(set(texts)) == 1
