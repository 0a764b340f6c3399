"""Grammars of an answer that may be a call: of strict tools, and of tools beside a response format."""

import jsonschema
import pytest
from hypothesis import given
from hypothesis import strategies as st

from llama import ParameterError
from llama.text.grammar import GrammarCompiler, GrammarError
from llama.text.tool_calls import parse_tool_calls
from tests.server.helpers import TOKENIZER, VOCAB_SIZE

SCHEMA = {
    "type": "object",
    "properties": {"city": {"enum": ["Paris", "Rome"]}, "days": {"type": "integer", "minimum": 1}},
    "required": ["city"],
    "additionalProperties": False,
}
STRICT = {"name": "get_weather", "strict": True, "parameters": SCHEMA}
LOOSE = {"name": "find/all.*", "parameters": SCHEMA}
SCHEMAS = {"get_weather": SCHEMA, "find/all.*": {"type": "object"}}
PARIS = '{"name": "get_weather", "parameters": {"city": "Paris"}}'
WRONG = '{"name": "get_weather", "parameters": {"city": "Oslo"}}'
ANY = '{"name": "find/all.*", "parameters": {"x": [1]}}'


@pytest.fixture(scope="module")
def compiler():
    compiler = GrammarCompiler(TOKENIZER, VOCAB_SIZE)
    yield compiler
    compiler.close()


def accepts(grammar, text: str) -> bool:
    matcher = grammar.matcher()
    try:
        for byte in text.encode():
            matcher.advance(byte)
    except GrammarError:
        return False
    return matcher.is_accepting


TEXTS = [
    "Hello!\nA line / another",
    "",
    '{"answer": 3}',
    '["name"]',
    "a {PARIS}",
    "find/allx.call(",
    "<functions>",
]
NO_TEXTS = [
    WRONG,
    f"  {PARIS}",
    '{ "name": 5}',
    '[{"parameters": {}}]',
    'get_weather.call(city="Oslo")',
    "x <function=get_weather>{}</function>",
    "<|python_tag|>print()",
    f"{PARIS}; {WRONG}",
    f"{PARIS} and more",
]


def test_text_or_calls_that_keep_to_a_strict_schema(compiler):
    grammar = compiler.compile_answer([STRICT, LOOSE])
    for text in (*TEXTS, PARIS, ANY, f"{PARIS}; {ANY}; {PARIS}"):
        assert accepts(grammar, text), text
    for text in NO_TEXTS:
        assert not accepts(grammar, text), text


FRAGMENTS = [*TEXTS, *NO_TEXTS, PARIS, ANY, "; ", " ", "\n", "{", '"', "[", '"name": ', "get_weather", ".call(", "<|"]


@given(st.lists(st.sampled_from(FRAGMENTS), max_size=4).map("".join))
def test_whatever_is_let_through_holds_no_call_that_breaks_a_strict_schema(compiler, text):
    if accepts(compiler.compile_answer([STRICT, LOOSE]), text):
        for call in parse_tool_calls(text, ["get_weather", "find/all.*"])[1]:
            jsonschema.validate(call.arguments, SCHEMAS[call.name])


PERSON = {"type": "object", "properties": {"name": {"type": "string"}}, "required": ["name"]}


@pytest.mark.parametrize(
    ("response_format", "right", "wrong"),
    [
        ({"type": "json_object"}, '{"a": 1}', "text"),
        ({"type": "json_object"}, '{"name": "get_weather", "parameterz": 3}', "[1]"),
        ({"type": "json_schema", "json_schema": PERSON}, '{"name": "Ada"}', '{"name": 5}'),
        ({"type": "json_schema", "json_schema": {"name": "x", "schema": {"enum": [1, "b"]}}}, '"b"', "2"),
        ({"type": "regex", "regex": "a/b\n[/c]+|x\\/y\\d"}, "a/b\n/c", "a/b\n"),
        ({"type": "regex", "regex": "a/b\n[/c]+|x\\/y\\d"}, "x/y5", "x/y"),
    ],
)
def test_a_response_format_leaves_room_for_calls(compiler, response_format, right, wrong):
    grammar = compiler.compile_answer([STRICT, {**LOOSE}], response_format)
    assert accepts(grammar, right) and accepts(grammar, PARIS) and accepts(grammar, f"{PARIS}; {PARIS}")
    assert not accepts(grammar, wrong) and not accepts(grammar, "Hello!")
    assert accepts(grammar, WRONG) is (response_format["type"] == "json_object"), "as JSON, not as a call"


def test_what_does_not_compile_is_named(compiler):
    bad = {"name": "bad", "strict": True, "parameters": {"type": "object", "properties": {"a": {"pattern": "["}}}}
    with pytest.raises(ParameterError, match="the parameters of tool 'bad' at /properties/a: invalid regex") as caught:
        compiler.compile_answer([STRICT, bad])
    assert caught.value.param == "tools"
    with pytest.raises(ParameterError, match=r"response_format.regex: invalid regex") as caught:
        compiler.compile_answer([STRICT], {"type": "regex", "regex": "["})
    assert caught.value.param == "response_format"
    compiler.compile_answer([STRICT, {**bad, "strict": False}])
    unknown = {"type": "json_schema", "json_schema": {"schema": {}, "stricd": True}}
    with pytest.raises(ParameterError, match=r"response_format.json_schema has no key 'stricd'"):
        compiler.compile(unknown)


def test_other_constraints_beside_tools(compiler):
    grammar = compiler.compile_answer([STRICT], {"type": "choice", "choice": ["yes", "no"]}, "structured_outputs")
    assert accepts(grammar, "yes") and accepts(grammar, PARIS) and not accepts(grammar, "perhaps")
    with pytest.raises(ParameterError, match=r"^structured_outputs\.grammar cannot stand beside tools") as caught:
        compiler.compile_answer([STRICT], {"type": "grammar", "grammar": 'start: "a"'}, "structured_outputs")
    assert caught.value.param == "structured_outputs"
