"""What a ScriptedEngine is to say, and waiting with an end."""

import asyncio

from llama import SamplingParams
from tests.fakes import EOS_ID

PATIENCE = 60  # seconds after which a test that waits for something has failed
LONG = SamplingParams(max_tokens=None, ignore_eos=True)


def endless(prompt, index):
    return [ord("a")] * 1_000_000


def echo(prompt, index):
    return [*prompt, *b"!" * index, EOS_ID]


def run(coroutine):
    return asyncio.run(asyncio.wait_for(coroutine, PATIENCE))


async def until(condition):
    while not condition():
        await asyncio.sleep(0.001)


async def text_of(pieces) -> str:
    return "".join([piece.text async for piece in pieces])
