import asyncio
import threading

import pytest

from llama import LLM
from llama.async_llm.async_llm import AsyncLLM
from llama.llm.replies import Replies
from tests.async_llm.helpers import PATIENCE, echo, until
from tests.fakes import ScriptedEngine, byte_tokenizer
from tests.model.models import tiny_model


@pytest.fixture(scope="module")
def parts():
    return tiny_model(vocab_size=257), byte_tokenizer()


@pytest.fixture
def scripted(parts):
    """Makes AsyncLLMs over a ScriptedEngine: (script, arguments) -> (AsyncLLM, the engine)."""
    made = []

    def make(script=echo, *, lag=0, **arguments):
        llm = LLM(*parts, num_blocks=64, max_num_seqs=4, max_model_len=512)
        llm.engine = ScriptedEngine(script, lag=lag)
        llm.replies = Replies(llm.engine, llm.tokenizer)
        made.append(AsyncLLM(llm, **arguments))
        return made[-1], llm.engine

    before = set(threading.enumerate())
    yield make
    for llm in made:
        asyncio.run(llm.close())
        assert llm.num_requests == 0 and llm.num_waiting_tokens == 0
    # Those of tests before may end meanwhile.
    asyncio.run(asyncio.wait_for(until(lambda: before.issuperset(threading.enumerate())), PATIENCE))
