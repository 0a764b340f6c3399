"""Generator as Ray Data calls it, without Ray: columns in, columns out."""

import asyncio
import json
import subprocess
import sys

import numpy as np
import pytest

from llama import LLM, SamplingParams
from llama.api.errors import EngineDeadError
from llama.batch import Generator

OPTIONS = {"dtype": "float64", "num_blocks": 256, "max_num_seqs": 8}
GREEDY = {"temperature": 0, "max_tokens": 6}
MESSAGES = [{"role": "user", "content": "hello"}]
ERROR = "__inference_error__"


@pytest.fixture(scope="module")
def generator(tiny, adapter):
    return Generator(tiny, sampling_params=GREEDY, loras={"tuned": adapter}, **OPTIONS)


@pytest.fixture(scope="module")
def llm(tiny, adapter):
    llm = LLM(tiny, **OPTIONS)
    llm.load_lora("tuned", adapter)
    return llm


async def batches(generator, *all_of_them) -> list[dict]:
    async def one(batch):
        [result] = [result async for result in generator(batch)]
        return result

    return await asyncio.gather(*map(one, all_of_them))


def ask(generator, **columns) -> dict:
    [result] = asyncio.run(batches(generator, columns))
    return result


def test_each_form_of_prompt_is_answered_as_llm_does(generator, llm):
    params = SamplingParams(**GREEDY)
    [by_chat] = llm.chat(MESSAGES, params, use_tqdm=False)
    by_text, by_ids = llm.generate(["abc", [5, 6, 7]], params, use_tqdm=False)
    for column, value, expected in (
        ("messages", MESSAGES, by_chat),
        ("messages", json.dumps(MESSAGES), by_chat),
        ("prompt", "abc", by_text),
        ("prompt_token_ids", [5, 6, 7], by_ids),
    ):
        result = ask(generator, **{column: [value]})
        assert result[ERROR] == [""]
        assert result["generated_text"] == [expected.outputs[0].text]
        assert result["generated_tokens"] == [expected.outputs[0].token_ids]
        assert result["num_input_tokens"] == [len(expected.prompt_token_ids)]
        assert result["num_generated_tokens"] == [len(expected.outputs[0].token_ids)]
        assert result["finish_reason"] == [str(expected.outputs[0].finish_reason)]


def test_rows_have_parameters_and_adapters_of_their_own(generator, llm):
    fields = [None, {"temperature": 1.5, "seed": 3, "max_tokens": 5}, {"temperature": 0, "max_tokens": 4}, None]
    loras = [None, None, "tuned", ""]
    params = [SamplingParams(**(each or GREEDY)) for each in fields]
    outputs = llm.generate(["abc"] * 4, params, lora=[name or None for name in loras], use_tqdm=False)
    expected = [output.outputs[0].token_ids for output in outputs]
    assert len({tuple(tokens) for tokens in expected}) == 3
    objects = [None if each is None else SamplingParams(**each) for each in fields]
    texts = [None if each is None else json.dumps(each) for each in fields]
    for column in (fields, objects, texts):
        result = ask(generator, prompt=["abc"] * 4, sampling_params=column, lora=loras)
        assert result["generated_tokens"] == expected


def test_logprobs(generator, llm):
    fields = {**GREEDY, "logprobs": 2}
    [output] = llm.generate(["abc"], SamplingParams(**fields), use_tqdm=False)
    result = ask(generator, prompt=["abc", "abc"], sampling_params=[fields, None])
    tokens, entries = output.outputs[0].token_ids, output.outputs[0].logprobs
    of_tokens = [entry[token].logprob for token, entry in zip(tokens, entries, strict=True)]
    assert result["logprobs"] == [pytest.approx(of_tokens, abs=1e-9), []]
    told = json.loads(result["top_logprobs"][0])
    assert [list(entry) for entry in told] == [[str(token) for token in entry] for entry in entries]
    for entry, expected in zip(told, entries, strict=True):
        assert list(entry.values()) == pytest.approx([each.logprob for each in expected.values()], abs=1e-9)
    assert result["top_logprobs"][1] == ""


def test_a_row_that_is_refused_stops_no_other(generator):
    rows = [
        ({"prompt": "abc"}, ""),
        ({"prompt": ""}, "prompt is empty"),
        ({}, "a row must have one of messages, prompt_token_ids, prompt, got none of them"),
        ({"prompt": "x", "messages": MESSAGES}, "got messages and prompt"),
        ({"messages": "[{"}, "messages is not valid JSON"),
        ({"messages": [1]}, "messages must be a list of"),
        ({"prompt_token_ids": "abc"}, "prompt_token_ids must be a list of token ids"),
        ({"prompt_token_ids": [10**6]}, "prompt_token_ids must be integers"),
        ({"prompt_token_ids": [1] * 300}, "no room is left"),
        ({"prompt": "x", "sampling_params": {"temperature": -1}}, "temperature"),
        ({"prompt": "x", "sampling_params": {"colour": 1}}, "colour"),
        ({"prompt": "x", "sampling_params": {"n": 2}}, "n must be 1, got 2"),
        ({"prompt": "x", "sampling_params": "{"}, "sampling_params is not valid JSON"),
        ({"prompt": "x", "sampling_params": [1]}, "sampling_params must be an object"),
        ({"prompt": "x", "lora": "unknown"}, "unknown"),
        ({"prompt": "abc"}, ""),
    ]
    names = ("prompt", "messages", "prompt_token_ids", "sampling_params", "lora")
    columns = {name: [row.get(name) for row, _ in rows] for name in names}
    result = ask(generator, **columns, key=list(range(len(rows))))
    for (_, expected), error, text in zip(rows, result[ERROR], result["generated_text"], strict=True):
        assert expected in error if expected else error == "", error
        assert bool(text) == (not expected)
    assert result["key"] == list(range(len(rows)))
    assert result["generated_text"][0] == result["generated_text"][-1]


def test_numpy_batches_as_ray_makes_them(generator):
    """Objects have the keys of all rows, and integers that some rows lack are floats."""
    objects = np.empty(2, dtype=object)
    objects[0] = np.array([{"role": "user", "content": "hello", "tool_calls": None}], dtype=object)
    objects[1] = np.array([{"role": "user", "content": np.str_("hello"), "name": None}], dtype=object)
    fields = np.array([{"temperature": 0, "max_tokens": 6.0, "seed": None, "logit_bias": {"5": None}}] * 2)
    batch = {"messages": objects, "sampling_params": fields, "image": np.zeros((2, 3))}
    for array in batch.values():
        array.flags.writeable = False
    result = ask(generator, **batch)
    expected = ask(generator, messages=[MESSAGES])
    assert result[ERROR] == ["", ""] and result["generated_tokens"] == expected["generated_tokens"] * 2
    assert result["image"] is batch["image"]
    ids = ask(generator, prompt_token_ids=np.array([[5, 6, 7], [5, 6, 7]]))
    assert ids["generated_tokens"] == ask(generator, prompt_token_ids=[[5, 6, 7]] * 2)["generated_tokens"]


def test_logit_bias_of_text_keys(generator):
    fields = [{**GREEDY, "logit_bias": {"65": 100.0, "66": None}}, None]
    assert ask(generator, prompt=["x", "x"], sampling_params=fields)["generated_tokens"][0] == [65] * 6


def test_more_rows_than_the_engine_runs_at_once_and_batches_that_overlap(generator, llm):
    prompts = [f"prompt {i}" for i in range(60)]
    results = asyncio.run(batches(generator, {"prompt": prompts[:50]}, {"prompt": prompts[50:]}))
    expected = llm.generate(prompts, SamplingParams(**GREEDY), use_tqdm=False)
    told = [tokens for result in results for tokens in result["generated_tokens"]]
    assert told == [output.outputs[0].token_ids for output in expected]


def test_batch_without_a_prompt_is_a_mistake_of_the_program(generator):
    with pytest.raises(
        ValueError, match="a batch needs one of the columns messages, prompt_token_ids, prompt, got text"
    ):
        ask(generator, text=["x"])


def test_failed_answer_keeps_its_row(tiny, monkeypatch):
    failing = Generator(tiny, **OPTIONS)
    from llama.api.outputs import FinishReason
    from llama.async_llm.stepper import Stream

    result = Stream.result

    async def failed(self):
        output = await result(self)
        output.outputs[0].finish_reason = FinishReason.ERROR
        return output

    monkeypatch.setattr(Stream, "result", failed)
    told = ask(failing, prompt=["x"])
    assert told[ERROR] == ["the model failed while it wrote this answer"] and told["generated_text"] == [""]


DIE = """
import asyncio, sys
from llama.batch import Generator
generator = Generator(sys.argv[1], exit_on_death=sys.argv[2] == "exit", max_num_seqs=2, num_blocks=64)
def step():
    raise MemoryError("gone")
generator._llm.llm.engine.step = step
async def ask():
    async for _ in generator({"prompt": ["x", "y"]}):
        pass
try:
    asyncio.run(ask())
except RuntimeError as error:
    print(type(error).__name__)
"""


@pytest.mark.parametrize("how, code, told", [("exit", 1, ""), ("raise", 0, EngineDeadError.__name__)])
def test_dead_engine(tiny, how, code, told):
    result = subprocess.run(
        [sys.executable, "-c", DIE, tiny, how], capture_output=True, text=True, timeout=120, check=False
    )
    assert (result.returncode, result.stdout.strip()) == (code, told), result.stderr
