"""AsyncLLM over a real engine: a crowd that asks, and leaves, at once."""

import asyncio
import contextlib
import random
import time

import pytest

from llama import LLM, SamplingParams
from llama.async_llm.async_llm import AsyncLLM
from tests.async_llm.helpers import PATIENCE, run, text_of


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
