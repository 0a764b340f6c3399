"""Chat templates: the golden cases, parity with transformers, preparation, and files in every form."""

import json
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llama.api.errors import ChatTemplateError
from llama.text.chat import ChatTemplate
from llama.text.tokenizer import Tokenizer
from tests.text.helpers import BOS, TOOL_TEMPLATE, WEATHER_TOOL, llama_backend, write_checkpoint

GOLDEN = Path(__file__).parents[1] / "golden"
SHARED_TEMPLATE = Path(__file__).parents[2] / ".." / "shared" / "data" / "llama_3_1_chat_template.jinja"
TEMPLATE_CASES = json.loads((GOLDEN / "chat_template_cases.json").read_text())["cases"]
META_CASES = json.loads((GOLDEN / "meta_prompt_cases.json").read_text())["prompts"]


@pytest.fixture(scope="module")
def checkpoint_template(llama_tokenizer):
    if not SHARED_TEMPLATE.exists():
        pytest.skip("needs ../shared/data/llama_3_1_chat_template.jinja, which is not part of the repository")
    template = ChatTemplate(llama_tokenizer, {"default": SHARED_TEMPLATE.read_text()})
    yield template
    template.close()


@pytest.fixture(scope="module")
def tool_template(llama_tokenizer):
    template = ChatTemplate(llama_tokenizer, {"default": TOOL_TEMPLATE})
    yield template
    template.close()


@pytest.fixture(scope="module")
def demo_template(demo_model_path, demo_tokenizer):
    template = ChatTemplate.from_pretrained(demo_model_path, demo_tokenizer)
    yield template
    template.close()


def render_case(template, case):
    arguments = dict(case["template_arguments"])
    tools = arguments.pop("tools", None)
    return template.render(case["messages"], tools, **arguments)


@pytest.mark.parametrize("case", TEMPLATE_CASES, ids=lambda case: case["name"])
def test_checkpoint_template(checkpoint_template, case):
    if "ours_differs" in case:
        rendered = render_case(checkpoint_template, case)
        assert rendered == OURS[case["name"]](checkpoint_template, case)
    elif "error" in case:
        with pytest.raises(ChatTemplateError, match=case["error"]):
            render_case(checkpoint_template, case)
    else:
        assert render_case(checkpoint_template, case) == case["expected"]


OURS = {
    "empty tool list": lambda template, case: template.render(case["messages"]),
    "tool call, string arguments, object result": lambda template, case: case["expected"].replace(
        r'"{\"city\":\"Paris\"}"', '{"city": "Paris"}'
    ),
    "empty tool_calls": lambda template, case: template.render(
        [case["messages"][0], {"role": "assistant", "content": "x"}]
    ),
    "two calls in one turn": lambda template, case: template.render(
        [case["messages"][0], *({"role": "assistant", "tool_calls": [c]} for c in case["messages"][1]["tool_calls"])]
    ),
    "content as parts": lambda template, case: case["expected"].replace("[{'type': 'text', 'text': 'a'}]", "a"),
}


def test_every_differing_case_is_told():
    assert {case["name"] for case in TEMPLATE_CASES if "ours_differs" in case} == OURS.keys()


@pytest.mark.parametrize("case", META_CASES, ids=range(len(META_CASES)))
def test_builtin_format(llama_tokenizer, case):
    expected = case["expected"]
    if "note" in case:  # the documented spelling, not that of the code
        assert case["note"].endswith("write the documented form.")
        expected = expected.replace("brave_search.call", "<|python_tag|>brave_search.call")
    template = ChatTemplate(llama_tokenizer)
    assert template.render(case["messages"]) == expected
    assert template.encode(case["messages"]) == llama_tokenizer.encode(expected)


def test_builtin_format_needs_its_tokens(sentencepiece_tokenizer):
    with pytest.raises(ChatTemplateError, match="no chat template"):
        ChatTemplate(sentencepiece_tokenizer).render([{"role": "user", "content": "hi"}])


def test_builtin_format_ends_a_call_with_eom_and_text_with_eot(llama_tokenizer):
    call = {"name": "f", "arguments": "{}"}
    messages = [{"role": "user", "content": "u"}, {"role": "assistant", "content": None, "tool_calls": [call]}]
    rendered = ChatTemplate(llama_tokenizer).render(messages, add_generation_prompt=False)
    assert rendered.endswith('\n\n{"type": "function", "name": "f", "parameters": {}}<|eom_id|>')
    rendered = ChatTemplate(llama_tokenizer).render(
        [{"role": "assistant", "content": "a"}], add_generation_prompt=False
    )
    assert rendered.endswith("a<|eot_id|>")


@pytest.fixture(scope="module")
def peer(demo_model_path):
    from transformers import PreTrainedTokenizerFast  # AutoTokenizer imports every model there is

    return PreTrainedTokenizerFast.from_pretrained(demo_model_path)


PIECES = [*" \n\t\r<>|_ia0123.,{}\"'\\", "\n\n", "  ", "é", "你", "👩‍👩‍👧", "🇫🇷", "\u00a0", "\x00", "the", "im"]
ORDINARY = st.lists(st.sampled_from(PIECES)).map("".join)


@given(
    st.lists(st.builds(dict, role=st.sampled_from(["system", "user", "assistant"]), content=ORDINARY), min_size=1),
    st.booleans(),
)
@settings(max_examples=60, deadline=None)
def test_ids_equal_those_of_transformers(demo_template, peer, messages, add_generation_prompt):
    expected = peer.apply_chat_template(
        messages, add_generation_prompt=add_generation_prompt, tokenize=True, return_dict=False
    )
    assert demo_template.encode(messages, add_generation_prompt=add_generation_prompt) == expected


def test_tools_reach_a_template_that_never_reads_them(demo_template):
    messages = [{"role": "system", "content": "s"}, {"role": "user", "content": "Weather?"}]
    rendered = demo_template.render(messages, [WEATHER_TOOL])
    user = rendered.split("<|im_start|>user\n")[1]
    assert json.dumps(WEATHER_TOOL, indent=4) in user
    assert user.split("<|im_end|>")[0].endswith("\n\nWeather?")
    assert demo_template.render(messages, []) == demo_template.render(messages)
    with pytest.raises(ValueError, match="need a user message"):
        demo_template.render(messages[:1], [WEATHER_TOOL])


def test_tool_history_reaches_a_template_that_never_reads_it(demo_template):
    messages = [
        {"role": "user", "content": "u"},
        {
            "role": "assistant",
            "content": None,
            "tool_calls": [{"id": "1", "type": "function", "function": {"name": "f", "arguments": '{"a": "é"}'}}] * 2,
        },
        {"role": "tool", "tool_call_id": "1", "content": {"t": 21}},
    ]
    rendered = demo_template.render(messages)
    call = '{"name": "f", "parameters": {"a": "é"}}'
    assert f"<|im_start|>assistant\n{call}\n{call}<|im_end|>" in rendered
    assert '<|im_start|>tool\n{"t": 21}<|im_end|>' in rendered


def test_preparation_before_a_template_with_tools(tool_template):
    """TOOL_TEMPLATE prints what it is given: repr-like for lists, JSON for arguments."""
    flat = {"name": "f", "description": "d", "parameters": {}}
    nested = {"type": "function", "function": flat}
    call = {"type": "function", "function": {"name": "f", "arguments": {"a": 1}}}
    user = {"role": "user", "content": "u"}

    def with_call(tool_call, content=None):
        return [user, {"role": "assistant", "content": content, "tool_calls": [tool_call]}]

    expected = tool_template.render(with_call(call))
    assert 'CALL f {"a": 1}' in expected
    assert tool_template.render(with_call({"name": "f", "arguments": {"a": 1}})) == expected
    assert tool_template.render(with_call({"function": {"name": "f", "arguments": '{"a": 1}'}})) == expected
    assert tool_template.render(with_call(call, [])) == expected
    assert "CALL f {}" in tool_template.render(with_call({"name": "f", "arguments": ""}))
    assert 'CALL f "[1"' in tool_template.render(with_call({"name": "f", "arguments": "[1"}))
    assert tool_template.render([user], [flat]) == tool_template.render([user], [nested])
    assert tool_template.render([user], []) == tool_template.render([user])
    parts = [{"role": "user", "content": [{"type": "text", "text": "a "}, {"type": "text", "text": "b"}]}]
    assert tool_template.render(parts) == tool_template.render([{"role": "user", "content": "a b"}])
    without = [user, {"role": "assistant", "content": "x"}]
    assert tool_template.render(
        [user, {"role": "assistant", "content": "x", "tool_calls": []}]
    ) == tool_template.render(without)
    assert "RESULT [1, 2]" in tool_template.render([user, {"role": "tool", "content": [1, 2]}])


@pytest.mark.parametrize(
    ("messages", "message"),
    [
        ([], "at least one message"),
        ("hi", "must be a list"),
        (None, "must be a list"),
        ([1], r"messages\[0\] must be an object"),
        ([{"content": "a"}], r"messages\[0\]\.role must be a name"),
        ([{"role": "user\n", "content": "a"}], "role must be a name"),
        ([{"role": "begin_of_text", "content": "a"}], "part of a control token"),
        ([{"role": "user", "content": 3}], r"messages\[0\]\.content must be a string"),
        ([{"role": "user", "content": {"a": 1}}], "content must be a string"),
        ([{"role": "user", "content": [3]}], r"content\[0\] must be a text part"),
        ([{"role": "user", "content": [{"type": "image_url"}]}], "takes text only"),
        ([{"role": "user", "content": [{"type": "text", "text": None}]}], r"content\[0\]\.text must be a string"),
        ([{"role": "assistant", "tool_calls": {}}], "tool_calls must be a list"),
        ([{"role": "assistant", "tool_calls": [1]}], r"tool_calls\[0\] must be an object"),
        ([{"role": "assistant", "tool_calls": [{}]}], "must name its function"),
        ([{"role": "assistant", "tool_calls": [{"name": "f", "arguments": 3}]}], "arguments must be an object"),
        (
            [{"role": "assistant", "tool_calls": [{"id": [], "name": "f"}]}],
            r"tool_calls\[0\]\.id must be a string, got",
        ),
        ([{"role": "tool", "tool_call_id": {}, "content": "a"}], r"messages\[0\]\.tool_call_id must be a string, got"),
        ([{"role": "user", "content": "a\udfff"}], r"lone surrogate U\+DFFF"),
        ([{"role": "user", "content": "a", "extra": object()}], "must be JSON values"),
    ],
)
def test_messages_that_cannot_be_meant(tool_template, messages, message):
    with pytest.raises(ValueError, match=message):
        tool_template.encode(messages)


@pytest.mark.parametrize(
    "tools",
    [
        "f",
        {},
        [1],
        [{"type": "function"}],
        [{"name": ""}],
        [{"type": "x", "name": "f"}],
        [{"name": "f", "parameters": "x"}],
        [{"type": "function", "function": {"name": "f", "parameters": []}}],
    ],
)
def test_tools_that_cannot_be_meant(tool_template, tools):
    with pytest.raises(ValueError, match="tools"):
        tool_template.encode([{"role": "user", "content": "u"}], tools)


def test_deep_nesting_is_refused(tool_template):
    deep: list = []
    for _ in range(100_000):
        deep = [deep]
    with pytest.raises(ValueError, match="too deeply"):
        tool_template.encode([{"role": "user", "content": "u"}], [{"name": "f", "parameters": {"enum": deep}}])


def test_arguments_that_the_template_does_not_read(tool_template):
    messages = [{"role": "user", "content": "u"}]
    assert "DATE 2024" in tool_template.render(messages, date_string="2024")
    for name in ("messages_", "documents"):
        with pytest.raises(ValueError, match=f"does not read the arguments \\['{name}'\\]"):
            tool_template.render(messages, **{name: "x"})


# Files

HELLO = [{"role": "user", "content": "hi"}]


def read(tmp_path, **files):
    path = write_checkpoint(tmp_path, llama_backend(), **files)
    return ChatTemplate.from_pretrained(path, Tokenizer.from_pretrained(path))


def test_the_jinja_file_wins(tmp_path):
    (tmp_path / "chat_template.jinja").write_text("FILE {{ messages[0].content }}")
    assert read(tmp_path, tokenizer_config={"chat_template": "FIELD"}).render(HELLO) == "FILE hi"
    (tmp_path / "additional_chat_templates").mkdir()
    (tmp_path / "additional_chat_templates" / "tool_use.jinja").write_text("TOOLS {{ tools | length }}")
    template = read(tmp_path)
    assert template.render(HELLO) == "FILE hi"
    assert template.render(HELLO, [WEATHER_TOOL]) == "TOOLS 1"


def test_the_field_as_text_and_by_name(tmp_path):
    assert (
        read(tmp_path, tokenizer_config={"chat_template": "FIELD {{ bos_token }}", "bos_token": BOS}).render(HELLO)
        == f"FIELD {BOS}"
    )
    named = [{"name": "default", "template": "D"}, {"name": "tool_use", "template": "{{ tools | length }}"}]
    for field in (named, {each["name"]: each["template"] for each in named}):
        template = read(tmp_path, tokenizer_config={"chat_template": field})
        assert template.render(HELLO) == "D"
        assert template.render(HELLO, [WEATHER_TOOL]) == "1"


@pytest.mark.parametrize(
    ("field", "message"),
    [
        ("{% for %}", "line 1"),
        ("a\n{{ x", "line 2"),
        ("{{ " + "(" * 5000, "chat_template"),
        ("x" * 300_000, "300000 characters"),
        ([{"name": "tool_use", "template": "x"}], "no template is called 'default'"),
        ({"tool_use": "x"}, "no template is called 'default'"),
        ([1], "must be a string, a list of {name, template} or an object of templates by name"),
        ([{"name": ["default"], "template": "x"}], "must be a string, a list of"),
        ({"default": 3}, "must be a string, a list of"),
        (3, "must be a string, a list of"),
    ],
)
def test_broken_templates_are_named_at_load(tmp_path, field, message):
    with pytest.raises(ValueError, match=message) as raised:
        read(tmp_path, tokenizer_config={"chat_template": field})
    assert "tokenizer_config.json" in str(raised.value)
    assert "\n" not in str(raised.value)
