"""Thoughts of an answer, from the template to the reply: where they begin, and what does not look into them."""

import json
import re

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import AddedToken
from tokenizers import Tokenizer as Backend

from llama import LLM, SamplingParams
from llama.api.params import SamplingParams as Params
from llama.engine.request import Request
from llama.engine.sequence import TokenOutput
from llama.llm.replies import Reply, merged
from llama.text.chat import ChatTemplate
from llama.text.tokenizer import Tokenizer
from tests.fakes import EOS_ID, byte_tokenizer
from tests.model.models import tiny_model
from tests.text.test_reasoning import expected

TEMPLATE = """
{%- for message in messages %}
    {{- message.role + ': ' }}
    {%- if message.reasoning_content %}{{- '[' + message.reasoning_content + ']' }}{% endif %}
    {{- message.content.split('</think>')[-1] + '\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{- 'assistant: ' }}
    {%- if enable_thinking is not defined %}{{- '<think>\\n' }}
    {%- elif enable_thinking is false %}{{- '<think>\\n\\n</think>\\n\\n' }}{% endif %}
{%- endif %}"""
HELLO = [{"role": "user", "content": "Hello </think> <think>"}]
TAGS = ("<think>", "</think>")


def with_tags(special: bool) -> Tokenizer:
    backend = Backend.from_str(byte_tokenizer().backend_json)
    backend.add_tokens([AddedToken(tag, special=special, normalized=False) for tag in TAGS])
    return Tokenizer(backend, eos_token_ids=[EOS_ID])


def reply_to(text, tokenizer, sizes, begins_in_thought, **params):
    """The reply, and its pieces, of a completion that comes in steps of so many tokens."""
    ids = [*tokenizer.encode(text, add_special_tokens=False), EOS_ID]
    request = Request("r", np.array([0], np.int32), Params(**params), begins_in_thought=begins_in_thought)
    reply, pieces = Reply(request, [1], tokenizer, 0.0), []
    while ids:
        size = next(sizes, 1)
        step, ids = ids[:size], ids[size:]
        piece = reply.push(TokenOutput("r", 0, step, finish_reason=None if ids else "stop"))
        pieces += [] if piece is None else [piece]
    return reply, pieces


@pytest.mark.parametrize("tokenizer", [byte_tokenizer(), with_tags(False), with_tags(True)])
@given(
    st.lists(st.sampled_from([*TAGS, "<", "\n", "ab", "stop", "é"]), max_size=10).map("".join),
    st.booleans(),
    st.lists(st.integers(1, 5), max_size=30),
)
def test_pieces_are_the_whole_and_stop_strings_begin_behind_the_thought(tokenizer, text, begins_in_thought, sizes):
    reply, pieces = reply_to(text, tokenizer, iter(sizes), begins_in_thought, stop=["stop", "b\n"])
    thought, content = expected(text, begins_in_thought)
    found = re.search(r"stop|b\n", content)
    content = content[: found.start()] if found else content
    [output] = reply.output.outputs
    assert (output.reasoning_content, output.text) == (thought or None, content)
    assert output.stop_reason == (found[0] if found else None)
    assert "".join(piece.reasoning_content for piece in pieces) == thought
    assert "".join(piece.text for piece in pieces) == content
    parts = merged(pieces)  # text behind a thought begins another one, and so does a step that has both
    assert len(parts) <= (3 if thought else 1)
    assert "".join(part.reasoning_content for part in parts) == thought
    assert "".join(part.text for part in parts) == content


def test_tokens_of_thoughts_are_counted_to_the_end_of_the_tag():
    for tokenizer, count in ((byte_tokenizer(), 2 + 8), (with_tags(True), 2 + 1)):
        assert reply_to("ab</think>c", tokenizer, iter([2, 3]), True)[0].usage().reasoning_tokens == count
    assert reply_to("ab", byte_tokenizer(), iter([]), True)[0].usage().reasoning_tokens == 3  # with the end
    assert reply_to("ab", byte_tokenizer(), iter([]), False)[0].usage().reasoning_tokens == 0
    assert reply_to("ab", byte_tokenizer(), iter([]), None)[0].usage().reasoning_tokens is None


@pytest.fixture(scope="module")
def make():
    tokenizer = with_tags(False)

    def llm(template: str | None = TEMPLATE, **arguments) -> LLM:
        model = tiny_model(vocab_size=tokenizer.vocab_size, max_position_embeddings=2048)
        llm = LLM(model, tokenizer, num_blocks=128, max_num_seqs=8, **arguments)
        llm.inputs.template = ChatTemplate(tokenizer, template and {"default": template})
        return llm

    return llm


@pytest.fixture(scope="module")
def llm(make):
    return make()


def begins(llm, messages=HELLO, **rendering):
    return llm.inputs.chat_request(messages, None, None, **rendering).begins_in_thought


def test_where_thoughts_are_looked_for(make, llm):
    """The prompt says whether one has begun; what a user says of tags does not matter."""
    assert begins(llm) is True
    assert begins(llm, chat_template_kwargs={"enable_thinking": True}) is False
    assert begins(llm, chat_template_kwargs={"enable_thinking": False}) is None
    assert begins(llm, chat_template="{{ messages[0].content }}") is None
    started = [*HELLO, {"role": "assistant", "content": "<think>so"}]
    assert begins(llm, started, continue_final_message=True) is True
    assert begins(llm, [*HELLO, {"role": "assistant", "content": "So"}], continue_final_message=True) is None
    assert llm.inputs.request("<think>", None, None).begins_in_thought is None
    assert begins(make(reasoning_parser="none")) is None
    plain = "{{ messages[0].content }}"
    assert begins(make(plain)) is None and begins(make(plain, reasoning_parser="")) is None
    forced = make(plain, reasoning_parser="deepseek_r1")
    assert begins(forced, [{"role": "user", "content": "x"}]) is False
    with pytest.raises(ValueError, match=r"reasoning_parser must be .*, got 'qwen9'"):
        make(reasoning_parser="qwen9")


def test_history_has_thoughts_under_both_names(llm):
    for name in ("reasoning_content", "reasoning"):
        turn = {"role": "assistant", "content": "Hi", name: "who?</think>"}
        text, ids = llm.inputs.render([*HELLO, turn, {"role": "user", "content": "x"}])
        assert "assistant: [who?</think>]Hi\n" in text
        assert ids.count(llm.tokenizer.token_to_id("</think>")) == 0
    with pytest.raises(ValueError, match=r"messages\[1\]\.reasoning_content must be a string"):
        llm.chat([*HELLO, {"role": "assistant", "content": "", "reasoning_content": 3}], use_tqdm=False)


SCHEMA = {
    "type": "object",
    "properties": {"yes": {"type": "boolean"}},
    "required": ["yes"],
    "additionalProperties": False,
}


@pytest.mark.parametrize("thinking", [None, True, False])
@pytest.mark.parametrize("speculative", [None, {"method": "ngram", "num_speculative_tokens": 3}])
def test_a_format_holds_the_content_and_not_the_thought(make, thinking, speculative):
    llm = make(speculative_config=speculative)
    ends = {llm.tokenizer.token_to_id("</think>"): 5.0}
    params = [
        SamplingParams(
            seed=seed,
            max_tokens=200,
            logit_bias=ends,
            response_format={"type": "json_schema", "json_schema": {"schema": SCHEMA}},
        )
        for seed in range(6)
    ]
    kwargs = {} if thinking is None else {"enable_thinking": thinking}
    outputs = llm.chat([HELLO] * 6, params, chat_template_kwargs=kwargs, use_tqdm=False)
    for output in outputs:
        [completion] = output.outputs
        assert json.loads(completion.text).keys() == {"yes"}
    assert any(output.outputs[0].reasoning_content for output in outputs) is (thinking is not False)
    assert not llm.engine.has_unfinished


def test_a_call_is_looked_for_behind_the_thought(llm):
    tool = {"type": "function", "function": {"name": "f", "parameters": SCHEMA, "strict": True}}
    ends = {llm.tokenizer.token_to_id("</think>"): 5.0}
    for choice in ("required", {"type": "function", "function": {"name": "f"}}):
        params = SamplingParams(seed=3, max_tokens=300, logit_bias=ends)
        [output] = llm.chat(HELLO, params, tools=[tool], tool_choice=choice, use_tqdm=False)
        [completion] = output.outputs
        assert [call.name for call in completion.tool_calls] == ["f"] and completion.text == ""
        assert completion.reasoning_content
