"""LLM: tools and tool_choice in chat and stream. The weights are random, so a call comes of its grammar alone."""

import asyncio
import inspect
import json
import shutil

import jsonschema
import make_tiny
import numpy as np
import pytest
import torch

from llama import LLM, AsyncLLM, ParameterError, SamplingParams
from tests.llm.helpers import GREEDY
from tests.model.models import tiny_model
from tests.text.template_shapes import SHAPES

CITY = {"type": "object", "properties": {"city": {"enum": ["Paris", "Rome"]}}, "required": ["city"]}
WEATHER = {"type": "function", "function": {"name": "get_weather", "description": "The weather", "parameters": CITY}}
LEVEL = {"type": "object", "properties": {"level": {"type": "integer", "minimum": 0, "maximum": 9}}}
TOOLS = [WEATHER, {"name": "set_level", "parameters": LEVEL}]
SCHEMAS = {"get_weather": CITY, "set_level": LEVEL}
NAMED = {"type": "function", "function": {"name": "set_level"}}
TALK = [{"role": "user", "content": "Hi"}]


@pytest.fixture(scope="module")
def roomy(folder) -> LLM:
    """Tools are told in the prompt, for which the context of the folder's model is too short."""
    model = tiny_model(vocab_size=make_tiny.VOCAB_SIZE, max_position_embeddings=2048)
    return LLM(model, folder, num_blocks=1000, max_num_seqs=8)


def sampled(seed: int, **fields) -> SamplingParams:
    return SamplingParams(seed=seed, max_tokens=100, **fields)


def check_call(completion, names=tuple(SCHEMAS)):
    [call] = completion.tool_calls
    assert call.name in names
    jsonschema.validate(call.arguments, SCHEMAS[call.name])
    assert (completion.finish_reason, completion.text) == ("tool_calls", "")
    return call.name


def test_required_is_a_call_of_one_of_the_tools(roomy):
    outputs = roomy.chat([TALK] * 6, [sampled(i, n=2) for i in range(6)], TOOLS, tool_choice="required", use_tqdm=False)
    assert {check_call(completion) for output in outputs for completion in output.outputs} == set(SCHEMAS)


def test_a_named_tool_is_the_one_that_is_called(roomy):
    outputs = roomy.chat([TALK] * 4, [sampled(i) for i in range(4)], TOOLS, tool_choice=NAMED, use_tqdm=False)
    assert [check_call(output.outputs[0], ("set_level",)) for output in outputs] == ["set_level"] * 4
    shown = roomy.chat(TALK, GREEDY, TOOLS, use_tqdm=False)[0].prompt_token_ids
    assert outputs[0].prompt_token_ids == shown  # the others are told all the same


def test_none_hides_the_tools(roomy):
    without = roomy.chat(TALK, GREEDY, use_tqdm=False)[0]
    hidden = roomy.chat(TALK, GREEDY, TOOLS, tool_choice="none", use_tqdm=False)[0]
    assert hidden.prompt == without.prompt and hidden.outputs[0].token_ids == without.outputs[0].token_ids
    assert "get_weather" not in hidden.prompt
    assert roomy.chat(TALK, GREEDY, tool_choice="none", use_tqdm=False)[0].prompt == without.prompt


def test_auto_tells_of_the_tools_and_demands_nothing(roomy):
    asked = [roomy.chat(TALK, GREEDY, TOOLS, use_tqdm=False, **more)[0] for more in ({}, {"tool_choice": "auto"})]
    assert "get_weather" in asked[0].prompt and asked[0].outputs[0].finish_reason == "length"
    assert asked[0].outputs[0].token_ids == asked[1].outputs[0].token_ids


@pytest.mark.parametrize("choice", ["required", NAMED], ids=["required", "named"])
def test_a_stream_gives_the_same_call(roomy, choice):
    whole = roomy.chat(TALK, sampled(3, n=2), TOOLS, tool_choice=choice, use_tqdm=False)[0]
    pieces = list(roomy.stream(TALK, sampled(3, n=2), TOOLS, tool_choice=choice))
    for completion in whole.outputs:
        check_call(completion)
        mine = [piece for piece in pieces if piece.index == completion.index]
        assert [call for piece in mine for call in piece.tool_calls] == completion.tool_calls
        assert [token for piece in mine for token in piece.token_ids] == completion.token_ids
        assert "".join(piece.text for piece in mine) == "" and mine[-1].finish_reason == "tool_calls"


def test_a_stream_without_tools_says_what_chat_says(roomy):
    pieces = roomy.stream(TALK, GREEDY, TOOLS, tool_choice="none")
    said = [token for piece in pieces for token in piece.token_ids]
    assert said == roomy.chat(TALK, GREEDY, use_tqdm=False)[0].outputs[0].token_ids


@pytest.mark.parametrize("choice", ["required", "none", NAMED], ids=["required", "none", "named"])
def test_a_prompt_has_no_tools_to_choose_from(roomy, choice):
    for prompt in ("Hi", [1, 2], {"prompt": "Hi"}):
        with pytest.raises(ValueError, match="tools and tool_choice need a conversation"):
            roomy.stream(prompt, GREEDY, tool_choice=choice)
    assert not roomy.engine.has_unfinished


@pytest.mark.parametrize(
    "tools, choice, words",
    [
        (None, "required", "tool_choice needs tools"),
        ([], NAMED, "tool_choice needs tools"),
        (TOOLS, "sometimes", 'tool_choice must be "auto", "none", "required"'),
        (TOOLS, {"type": "function", "function": {"name": "other"}}, r"name of a tool \(.*set_level.*\), got 'other'"),
        (TOOLS, {"name": "set_level"}, "got {'name': 'set_level'}"),
        (TOOLS, None, "tool_choice must be .*, got None"),
    ],
)
def test_a_choice_that_is_none_is_refused(roomy, tools, choice, words):
    for ask in (roomy.chat, roomy.stream):
        with pytest.raises(ValueError, match=words):
            ask(TALK, GREEDY, tools=tools, tool_choice=choice)
    assert not roomy.engine.has_unfinished


@pytest.mark.parametrize("face", [LLM.chat, LLM.stream])
def test_the_positions_of_the_other_arguments_stay(face):
    parameters = inspect.signature(face).parameters
    assert list(parameters)[2:4] == ["sampling_params", "tools"]
    assert parameters["tool_choice"].kind is inspect.Parameter.KEYWORD_ONLY


def test_the_asynchronous_chat_takes_the_choice_too(folder):
    async def call():
        model = tiny_model(vocab_size=make_tiny.VOCAB_SIZE, max_position_embeddings=2048)
        async with AsyncLLM(model, folder, num_blocks=1000) as llm:
            return [piece async for piece in llm.chat(TALK, sampled(0), TOOLS, tool_choice=NAMED)]

    pieces = asyncio.run(call())
    assert [call.name for piece in pieces for call in piece.tool_calls] == ["set_level"]
    assert pieces[-1].finish_reason == "tool_calls"


@pytest.mark.parametrize("shape", SHAPES)
def test_a_call_goes_back_with_its_result_whatever_the_template(folder, tmp_path, shape):
    """The round trip of a client: question, calls, their results, answer."""
    shutil.copytree(folder, tmp_path / "model", ignore=shutil.ignore_patterns("*.safetensors"))
    (tmp_path / "model" / "chat_template.jinja").write_text(SHAPES[shape])
    model = tiny_model(vocab_size=make_tiny.VOCAB_SIZE, max_position_embeddings=4096)
    # A random model would never end the thought that a template of theirs begins.
    llm = LLM(model, tmp_path / "model", num_blocks=600, max_num_seqs=2, reasoning_parser="none")
    first = llm.chat(TALK, sampled(0, n=2), TOOLS, tool_choice="required", use_tqdm=False)[0]
    calls = [call for completion in first.outputs for call in completion.tool_calls]
    assert len(calls) == 2
    history = [*TALK, {"role": "assistant", "content": None, "tool_calls": []}]
    for i, call in enumerate(calls):
        function = {"name": call.name, "arguments": call.arguments_json}
        history[1]["tool_calls"].append({"id": f"call-{i}", "type": "function", "function": function})
        history.append({"role": "tool", "tool_call_id": f"call-{i}", "content": f"result {i}"})
    second = llm.chat(history, GREEDY, TOOLS, use_tqdm=False)[0]
    told = second.prompt[second.prompt.rindex("Hi") :]
    assert all(call.name in told for call in calls) and told.index("result 0") < told.index("result 1")


def test_a_response_format_leaves_the_model_its_calls(roomy):
    """Each answer is a call or in the format, and among some answers both occur."""
    size = {"type": "object", "properties": {"size": {"enum": [1, 2]}}, "required": ["size"]}
    wanted = {"type": "json_schema", "json_schema": {"name": "size", "schema": size}}
    ask = [sampled(i, response_format=wanted) for i in range(16)]
    completions = [o.outputs[0] for o in roomy.chat([TALK] * 16, ask, TOOLS, use_tqdm=False)]
    made = [completion for completion in completions if completion.tool_calls]
    for completion in completions:
        if completion.tool_calls:
            for call in completion.tool_calls:
                jsonschema.validate(call.arguments, SCHEMAS[call.name])
        else:
            jsonschema.validate(json.loads(completion.text), size)
    assert 0 < len(made) < len(completions)


@pytest.mark.parametrize("strict", [True, False])
def test_a_strict_tool_is_held_to_its_schema_where_the_model_is_free_to_call(roomy, strict):
    tool = {"type": "function", "function": {**WEATHER["function"], "strict": strict}}
    request = roomy.inputs.chat_request(TALK, GREEDY, None, tools=[tool])
    assert (request.new_matcher is not None) is strict
    assert roomy.chat(TALK, GREEDY, [tool], use_tqdm=False)[0].outputs[0].token_ids


@pytest.mark.parametrize("wrong", [torch.zeros(2), torch.zeros(0), np.zeros(2), np.array(0), b"f", "", 0, False, {}, 5])
def test_what_is_no_list_of_tools_is_refused(roomy, wrong):
    for ask, asked in ((roomy.chat, TALK), (roomy.stream, TALK), (roomy.stream, "Hi")):
        with pytest.raises(ParameterError, match=rf"^tools must be a list, got {type(wrong).__name__}$") as caught:
            ask(asked, GREEDY, tools=wrong)
        assert caught.value.param == "tools"
    assert not roomy.engine.has_unfinished


def test_an_array_is_no_choice(roomy):
    for ask, asked in ((roomy.chat, TALK), (roomy.stream, TALK), (roomy.stream, "Hi")):
        with pytest.raises(ParameterError, match=r"^tool"):
            ask(asked, GREEDY, tools=TOOLS, tool_choice=np.array(["auto", "none"]))
