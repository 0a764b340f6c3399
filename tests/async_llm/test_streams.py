"""AsyncLLM: what its streams give, and that leaving one, in whatever way, ends its request."""

import asyncio
import gc
import threading

import pytest

from llama import SamplingParams
from tests.async_llm.helpers import LONG, PATIENCE, endless, run, text_of, until


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
        await text_of(llm.generate("short", SamplingParams(bad_words=["x" * 1500, "y" * 1500])))
        await text_of(llm.generate("short", SamplingParams(prediction="x" * 5000)))
        with pytest.raises(ValueError, match="negative_prompt has at least"):
            await llm.submit("short", SamplingParams(guidance_scale=2.0, negative_prompt="x" * 5000))

    run(main())
    assert [thread is threading.main_thread() for thread in threads] == [True, False, False, False, False]


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
            task = asyncio.create_task(read())
            await until(lambda: engine.num_steps > 2)
            with pytest.raises(TimeoutError):
                await asyncio.wait_for(task, 0.01)
        else:
            pieces = llm.generate("Hi", LONG, request_id="r")
            await anext(pieces)
            del pieces
            gc.collect()
        # Who is cancelled while submitting gives the seat back before the engine hears of it.
        await until(lambda: engine.aborted and not llm.num_requests)
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
