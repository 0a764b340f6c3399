"""Right and wrong calls mixed, from tasks and threads: each wrong one harms itself alone, and nothing is left over."""

import asyncio
import logging
import random
import threading

import numpy as np
import pytest
import torch

from llama import LLM, SamplingParams
from llama.api.errors import EngineClosedError, EngineDeadError, ParameterError
from llama.async_llm.async_llm import AsyncLLM
from llama.text.tokenizer import IncrementalDecoder, StopMatcher, Tokenizer
from tests.async_llm.helpers import LONG, PATIENCE, echo, endless, run, text_of, until


def test_a_request_id_that_is_in_use(scripted):
    """The second is refused; the first one goes on."""
    llm, engine = scripted(
        lambda prompt, index: endless(prompt, index) if prompt == [*b"first"] else echo(prompt, index)
    )

    async def main():
        first = await llm.submit("first", LONG, request_id="a")
        with pytest.raises(ParameterError, match="request_id 'a' is in use") as refused:
            await llm.submit("second", request_id="a")
        assert refused.value.param == "request_id"
        steps = engine.num_steps
        await until(lambda: engine.num_steps > steps + 10)
        before = len(first.reply.output.outputs[0].token_ids)
        async for _ in first:
            if len(first.reply.output.outputs[0].token_ids) > before:
                break
        first.close()
        await until(lambda: not llm.num_requests)
        assert await text_of(llm.generate("again", request_id="a")) == "again"
        assert not llm.is_dead

    run(main())


@pytest.mark.parametrize("wrong", ["", "x" * 257, 5, [], b"a"])
def test_what_is_no_request_id(scripted, wrong):
    llm, _ = scripted()
    with pytest.raises(ParameterError, match="request_id must be a string of 1 to 256 characters"):
        run(llm.submit("Hi", request_id=wrong))
    assert run(text_of(llm.generate("Hi", request_id="0"))) == "Hi"
    assert run(text_of(llm.generate("Hi"))) == "Hi"


@pytest.mark.parametrize("wrong", [5, "no", None])
def test_what_is_no_clip(scripted, wrong):
    llm, _ = scripted()
    for ask, prompt in ((llm.submit, "Hi"), (llm.submit_chat, [{"role": "user", "content": "Hi"}])):
        with pytest.raises(ParameterError, match=f"clip must be True or False, got {wrong!r}") as refused:
            run(ask(prompt, clip=wrong))
        assert refused.value.param == "clip"


def test_arrays_are_no_tools_and_no_choice_of_them(scripted):
    llm, _ = scripted()
    talk = [{"role": "user", "content": "Hi"}]
    for wrong in (torch.zeros(2), np.zeros(2), np.array(0)):
        with pytest.raises(ParameterError, match=rf"^tools must be a list, got {type(wrong).__name__}$"):
            run(llm.submit_chat(talk, tools=wrong))
        with pytest.raises(ParameterError, match=r"^tool_choice must be "):
            run(llm.submit_chat(talk, tools=[{"name": "f"}], tool_choice=wrong))
    assert run(text_of(llm.generate("Hi"))) == "Hi" and not llm.num_requests


def test_ids_that_others_choose_are_never_ours(scripted):
    llm, _ = scripted(endless)

    async def main():
        streams = [await llm.submit("Hi", LONG, request_id=str(i)) for i in range(3)]
        streams += [await llm.submit("Hi", LONG) for _ in range(3)]
        for stream in streams:
            stream.close()
        await until(lambda: not llm.num_requests)

    run(main())


async def wrong_call(llm: AsyncLLM, chance: random.Random, taken: list[str]) -> None:
    calls = [
        lambda: llm.submit("x", request_id=chance.choice(taken)) if taken else llm.submit(""),
        lambda: llm.submit("x", SamplingParams(logit_bias={10_000: 1})),
        lambda: llm.submit([5, -1]),
        lambda: llm.submit([5, 10_000]),
        lambda: llm.submit([]),
        lambda: llm.submit(5),
        lambda: llm.submit("x", 5),
        lambda: llm.submit("x", lora="none"),
        lambda: llm.submit("x" * 10_000),
        lambda: llm.submit("x", request_id=[]),
        lambda: llm.submit_chat("x"),
        lambda: llm.submit_chat([{"role": 5}]),
        lambda: llm.submit_chat([{"role": "user", "content": "x"}], tools=5),
        lambda: llm.submit_chat([{"role": "user", "content": "x"}], tool_choice="required"),
        lambda: llm.load_lora("x", "/nowhere"),
        lambda: llm.load_lora("", "/nowhere"),
        lambda: llm.unload_lora("none"),
        lambda: llm.unload_lora([]),
        lambda: llm.drain("soon"),
    ]
    number = chance.randrange(len(calls))
    try:
        stream = await calls[number]()
    except (ValueError, TypeError):
        return
    assert number == 0, number  # the request that had the id may have ended
    stream.close()


def mixed_calls(parts, count: int, seed: int) -> None:
    chance = random.Random(seed)
    prompts = [[chance.randrange(256) for _ in range(chance.randrange(1, 30))] for _ in range(count)]
    params = [
        SamplingParams(seed=i, max_tokens=chance.randrange(1, 8), ignore_eos=True, n=chance.choice([1, 1, 2]))
        for i in range(count)
    ]
    arguments = {"num_blocks": 64, "block_size": 4, "max_model_len": 64}
    alone = LLM(*parts, **arguments)
    expected = [[c.token_ids for c in o.outputs] for o in alone.generate(prompts, params, use_tqdm=False)]
    together = LLM(*parts, **arguments)
    taken: list[str] = []

    async def right(llm: AsyncLLM, i: int):
        stream = await llm.submit(prompts[i], params[i], request_id=f"id{i}")
        taken.append(stream.request_id)
        output = await stream.result()
        taken.remove(stream.request_id)
        for _ in range(chance.randrange(3)):
            stream.close()  # long after its end; the id may be another's
        return [completion.token_ids for completion in output.outputs]

    async def wrong(llm: AsyncLLM):
        await asyncio.sleep(chance.random() * 0.05)
        await wrong_call(llm, chance, taken)

    async def main():
        async with AsyncLLM(together, max_waiting_requests=2 * count) as llm:
            tasks = [right(llm, i) for i in range(count)] + [wrong(llm) for _ in range(count)]
            chance.shuffle(tasks)
            results = await asyncio.gather(*tasks)
            await until(lambda: llm.num_requests == llm.num_waiting_tokens == 0)
            assert not llm.is_dead
        with pytest.raises(EngineClosedError):
            await llm.submit("late")
        await llm.close()
        return [result for result in results if result is not None]

    answers = asyncio.run(asyncio.wait_for(main(), 20 * PATIENCE))
    assert sorted(answers) == sorted(expected)
    assert not together.engine.has_unfinished and not len(together.replies)
    together.engine.check()


def test_wrong_calls_harm_nobody(parts):
    mixed_calls(parts, 40, seed=1)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(2, 8))
def test_many_wrong_calls_harm_nobody(parts, seed):
    mixed_calls(parts, 300, seed=seed)


# ---- failures in the text of one request


class PanicException(BaseException):
    """As pyo3's: its name is all that tells it."""


PARTS = [(IncrementalDecoder, "push"), (StopMatcher, "push"), (Tokenizer, "token_text")]


@pytest.mark.parametrize("error", [ZeroDivisionError("!"), MemoryError(), PanicException("!")])
@pytest.mark.parametrize(("owner", "name"), PARTS)
@pytest.mark.parametrize("most", [20, 5], ids=["in the middle", "with the last token"])
def test_a_failure_in_one_text_ends_that_request_alone(scripted, monkeypatch, caplog, owner, name, error, most):
    llm, engine = scripted()

    really = getattr(owner, name)

    def fails_at_b(self, argument, *rest):
        if argument in ("B", ord("B"), [ord("B")]):
            raise error
        return really(self, argument, *rest)

    monkeypatch.setattr(owner, name, fails_at_b)
    params = SamplingParams(stop="never", logprobs=1, n=2, max_tokens=most)

    async def main():
        good = [await llm.submit("good", params) for _ in range(2)]
        output = await asyncio.wait_for((await llm.submit("the B one", params, request_id="b")).result(), PATIENCE)
        assert [c.finish_reason for c in output.outputs] == ["error"] * 2 and output.finished
        for stream in good:
            assert [c.text for c in (await stream.result()).outputs] == ["good", "good!"]
        await until(lambda: llm.num_requests == 0 and not engine.has_unfinished)
        assert not llm.is_dead
        assert (await (await llm.submit("good", params, request_id="b")).result()).outputs[0].text == "good"

    with caplog.at_level(logging.ERROR):
        run(main())
    (record,) = caplog.records
    assert "request b:" in record.getMessage() and record.exc_info[1] is error


def test_a_dead_engine_is_told_once(scripted, caplog):
    llm, engine = scripted(endless)

    def fail():
        raise ZeroDivisionError("broken")

    async def main():
        streams = [await llm.submit("Hi", LONG) for _ in range(3)]
        engine.before_step = fail
        for stream in streams:
            with pytest.raises(EngineDeadError):
                await stream.result()
        for _ in range(5):
            with pytest.raises(EngineDeadError):
                await llm.submit("Hi")

    with caplog.at_level(logging.ERROR):
        run(main())
    (record,) = [record for record in caplog.records if record.exc_info]
    assert "the engine died" in record.getMessage() and record.exc_info[0] is ZeroDivisionError


# ---- threads that share an LLM


def test_threads_take_turns(parts):
    llm = LLM(*parts, num_blocks=64, block_size=4, max_model_len=64)
    params = SamplingParams(temperature=0, max_tokens=10, ignore_eos=True)
    prompts = [[i, i + 1, i + 2] for i in range(12)]
    expected = [output.outputs[0].token_ids for output in llm.generate(prompts, params, use_tqdm=False)]
    answers = {}

    def use(i):
        if i % 3 == 0:
            tokens = [token for piece in llm.stream(prompts[i], params) for token in piece.token_ids]
        else:
            tokens = llm.generate(prompts[i], params, use_tqdm=False)[0].outputs[0].token_ids
        answers[i] = tokens
        if i % 4 == 0:
            next(llm.stream(prompts[i], params))  # and is dropped

    threads = [threading.Thread(target=use, args=(i,)) for i in range(12)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(PATIENCE)
    assert [answers.get(i) for i in range(12)] == expected
    assert not llm.engine.has_unfinished and not len(llm.replies)
    llm.engine.check()


def test_calls_from_inside_a_call(scripted):
    """As a destructor or a signal handler would make them."""
    llm, engine = scripted(endless)
    stream = llm.llm.stream("Hi", LONG)
    refused = []

    def inside():
        engine.before_step = lambda: None
        stream.close()
        try:
            llm.llm.generate("Hi", use_tqdm=False)
        except RuntimeError as error:
            refused.append(error)

    other = llm.llm.stream("Ho", LONG)
    engine.before_step = inside
    next(other)
    assert "from inside one of its own calls" in str(refused[0])
    assert len(engine.running) == 1
    other.close()
    assert not engine.running
