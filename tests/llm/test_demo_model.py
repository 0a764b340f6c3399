"""LLM: the demo model says what transformers says."""

import json
import time
from pathlib import Path

import pytest

from llama import LLM, SamplingParams


@pytest.fixture(scope="module")
def demo(demo_model_path) -> LLM:
    return LLM(demo_model_path, dtype="float32", max_model_len=1024, num_blocks=512, max_num_seqs=32)


@pytest.fixture(scope="module")
def cases() -> list[dict]:
    return json.loads((Path(__file__).parents[1] / "golden" / "demo_generation.json").read_text())["cases"]


def agree(cases, outputs):
    """All but at most one answer are transformers' own; that one leaves them where two logits are within 1e-3."""
    strangers = []
    for case, output in zip(cases, outputs, strict=True):
        assert output.prompt_token_ids == case["prompt_token_ids"]
        ours, theirs = output.outputs[0].token_ids, case["token_ids"]
        assert len(ours) == len(theirs) == 64
        if ours == theirs:
            assert output.outputs[0].text == case["text"]
            continue
        at = next(i for i, (a, b) in enumerate(zip(ours, theirs, strict=True)) if a != b)
        assert dict(map(tuple, case["close"])).get(at, 1.0) < 1e-3, f"{case['prompt']!r} differs at token {at}"
        strangers.append(case["prompt"])
    assert len(strangers) <= 1


SIXTY_FOUR = SamplingParams(temperature=0, max_tokens=64, ignore_eos=True)


def test_demo_model_says_what_transformers_says_together_in_one_batch(demo, cases):
    agree(cases, demo.generate([case["prompt"] for case in cases], SIXTY_FOUR, use_tqdm=False))


@pytest.mark.slow
def test_demo_model_says_what_transformers_says_one_by_one(demo, cases):
    agree(cases, [demo.generate(case["prompt"], SIXTY_FOUR, use_tqdm=False)[0] for case in cases])


def test_demo_model_knows_the_capital_of_france(demo):
    question = [{"role": "user", "content": "What is the capital of France?"}]
    output = demo.chat(question, SamplingParams(temperature=0), use_tqdm=False)[0].outputs[0]
    assert (output.text, output.finish_reason) == ("The capital of France is Paris.", "stop")


def test_demo_model_uses_a_tool(demo):
    """What a newcomer would try: a question, the call that must be made, its result, the answer."""
    city = {"type": "string", "description": "The city's name"}
    schema = {"type": "object", "properties": {"city": city}, "required": ["city"]}
    tool = {"name": "get_weather", "description": "Get the current weather of a city", "parameters": schema}
    tools, greedy = [{"type": "function", "function": tool}], SamplingParams(temperature=0, max_tokens=40)
    talk = [{"role": "user", "content": "What is the weather in Paris?"}]
    asked = demo.chat(talk, greedy, tools, tool_choice="required", use_tqdm=False)[0].outputs[0]
    [call] = asked.tool_calls
    assert (call.name, call.arguments, asked.finish_reason) == ("get_weather", {"city": "Paris"}, "tool_calls")
    function = {"name": call.name, "arguments": call.arguments_json}
    talk.append({"role": "assistant", "tool_calls": [{"id": "1", "type": "function", "function": function}]})
    talk.append({"role": "tool", "tool_call_id": "1", "content": "sunny, 24 degrees"})
    answer = demo.chat(talk, greedy, tools, use_tqdm=False)[0].outputs[0]
    assert "sunny" in answer.text and not answer.tool_calls


@pytest.mark.slow
def test_a_shared_prompt_is_computed_once_and_changes_no_text(demo_model_path, capsys):
    """32 requests with a system prompt of about 400 tokens in common, with the prefix cache and without, in turn."""
    system = "You are a careful assistant. " * 66
    talks = [[{"role": "system", "content": system}, {"role": "user", "content": f"Count to {i}."}] for i in range(32)]
    params = SamplingParams(temperature=0, max_tokens=16, ignore_eos=True)
    arguments = {"dtype": "float32", "max_model_len": 1024, "num_blocks": 1200, "max_num_batched_tokens": 512}
    texts, seconds, cached = {}, {}, {}
    for caching in (True, False):
        llm = LLM(demo_model_path, enable_prefix_caching=caching, **arguments)
        llm.generate("warm up", params, use_tqdm=False)
        began = time.monotonic()
        outputs = llm.chat(talks, params, use_tqdm=False)
        seconds[caching] = time.monotonic() - began
        texts[caching] = [o.outputs[0].text for o in outputs]
        cached[caching] = sum(o.num_cached_tokens for o in outputs)
    with capsys.disabled():
        print(f"\nshared prompt: {seconds[False]:.1f} s without, {seconds[True]:.1f} s with the prefix cache")
        print(f"ratio {seconds[False] / seconds[True]:.2f}, {cached[True]} prompt tokens not computed")
    assert texts[True] == texts[False]
    assert cached[False] == 0 and cached[True] > 31 * 350
