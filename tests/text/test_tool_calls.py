"""Tool calls: every written form, unknown names stay text, and any way of cutting gives what the whole gives."""

import json
import re
from pathlib import Path

import jsonschema
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llama.text.tool_calls import PYTHON_TAG, ToolCall, ToolCallParser, parse_tool_calls
from llama.text.tool_calls.contradiction import contradicts
from tests.text.helpers import every_cut

GOLDEN = json.loads((Path(__file__).parents[1] / "golden" / "meta_prompt_cases.json").read_text())["assistant_texts"]
KNOWN = {"f", "f2", "get_weather", "brave_search", "code_interpreter"}
F1 = '{"name": "f", "parameters": {"a": 1}}'
F2 = '{"name": "f2", "parameters": {}}'
CALL_F1, CALL_F2 = ToolCall("f", {"a": 1}), ToolCall("f2", {})


def events(pieces, known=KNOWN):
    """Text and calls in order, neighbouring texts joined."""
    parser = ToolCallParser(known)
    joined: list = []
    for event in [*(e for piece in pieces for e in parser.feed(piece)), *parser.finish()]:
        if joined and isinstance(event, str) and isinstance(joined[-1], str):
            joined[-1] += event
        else:
            joined.append(event)
    return joined


@pytest.mark.parametrize("case", GOLDEN, ids=lambda case: case["text"])
def test_golden_cases(case):
    # The ending tokens are special tokens, which decoding leaves out.
    text = re.sub(r"<\|(eot_id|eom_id)\|>$", "", case["text"])
    known = KNOWN | {"g"}
    expected = [ToolCall(name, arguments) for name, arguments in case["calls"]]
    content, calls = parse_tool_calls(text, known)
    assert calls == expected
    assert content == ("" if calls else text)
    for pieces in every_cut(text):
        assert events(pieces, known) == (expected or [text])


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ('{"name": "f", "arguments": {"a": 1}}', [CALL_F1]),
        ('{"name": "f", "arguments": "{\\"a\\": 1}"}', [CALL_F1]),
        ('{"type": "function", "name": "f", "parameters": {"a": 1}}', [CALL_F1]),
        ('{"type": "function", "function": {"name": "f", "parameters": {"a": 1}}}', [CALL_F1]),
        ('{"function": {"name": "f", "arguments": {"a": 1}}}', [CALL_F1]),
        ('{"type": "function", "function": "f", "parameters": {"a": 1}}', [CALL_F1]),
        ('{"name": "f2", "parameters": null}', [CALL_F2]),
        ('{"type": "function", "name": "f2"}', [CALL_F2]),
        (f" \n{F1}\n ", [CALL_F1]),
        (f"{F1}; {F2}", [CALL_F1, CALL_F2]),
        (f"{F1}\n{F2}", [CALL_F1, CALL_F2]),
        (f"{F1}, {F2}", [CALL_F1, CALL_F2]),
        (f"{F1} {F2};", [CALL_F1, CALL_F2]),
        (f"[{F1}, {F2}]", [CALL_F1, CALL_F2]),
        (f"[ \n{F1}]\n[{F2}]", [CALL_F1, CALL_F2]),
        (f"{PYTHON_TAG}{F1}", [CALL_F1]),
        (f"{PYTHON_TAG} {F1};{PYTHON_TAG}{F2}", [CALL_F1, CALL_F2]),
        ('<function=f>{"a": 1}</function>', [CALL_F1]),
        ('<function=f>{"a": 1}', [CALL_F1]),
        ("<function=f2> </function>", [CALL_F2]),
        ('<function=f>{"a": 1}</function>\n<function=f2>{}</function>', [CALL_F1, CALL_F2]),
        ('f.call(a=1, b="x)", c=\'it\\\'s\')', [ToolCall("f", {"a": 1, "b": "x)", "c": "it's"})]),
        (
            "f.call(t=True, n=None, l=[1, {\"k\": 2}], q='a\\n\"b\"')",
            [ToolCall("f", {"t": True, "n": None, "l": [1, {"k": 2}], "q": 'a\n"b"'})],
        ),
        ("f2.call()", [CALL_F2]),
        (f'{PYTHON_TAG}brave_search.call(query="a; b")', [ToolCall("brave_search", {"query": "a; b"})]),
        (f"{PYTHON_TAG}import x\nprint({{}})", [ToolCall("code_interpreter", {"code": "import x\nprint({})"})]),
        (f'{PYTHON_TAG}{{"a": 1}}', [ToolCall("code_interpreter", {"code": '{"a": 1}'})]),
        (f"{PYTHON_TAG}f.call(1)", [ToolCall("code_interpreter", {"code": "f.call(1)"})]),
        (f"{PYTHON_TAG}", []),
        ('{"name": "f", "parameters": {"s": "two\nlines {[(\\" é \\ud83d\\ude00"}}', [
            ToolCall("f", {"s": 'two\nlines {[(" é 😀'})
        ]),
        # A list in Python's spelling, as Llama 3.2 writes it
        ("[f(a=1)]", [CALL_F1]),
        ("[f(a=1), f2()]", [CALL_F1, CALL_F2]),
        (f" [ f( a = 1 ) ,\nf2() ]\n{PYTHON_TAG}[f2()]", [CALL_F1, CALL_F2, CALL_F2]),
        ("[f(a='it\\'s ])', b=[1, 'two', {'k': None}], c={\"k\": [True]}, d=(1))]",
         ["[f(a='it\\'s ])', b=[1, 'two', {'k': None}], c={\"k\": [True]}, d=(1))]"]),
        ("[f(a='it\\'s ])', b=[1, 'two', {'k': None}, ], c={\"k\": [True]}, d=[], e={})]", [
            ToolCall("f", {"a": "it's ])", "b": [1, "two", {"k": None}], "c": {"k": [True]}, "d": [], "e": {}})
        ]),
        ("[f2()] Done.", [CALL_F2, " Done."]),
        ("<tool_call>[f2()]</tool_call>", [CALL_F2]),
        # Text before and after calls
        ('Let me see. <function=f>{"a": 1}</function> Done.', ["Let me see. ", CALL_F1, " Done."]),
        (f"I search.{PYTHON_TAG}{F1}", ["I search.", CALL_F1]),
        (f"{F1}\n\nThat was it.", [CALL_F1, "\n\nThat was it."]),
        (f'{F1}; {{"name": "unknown", "parameters": {{}}}}', [CALL_F1, '; {"name": "unknown", "parameters": {}}']),
        (f"{F1} </functio", [CALL_F1, " </functio"]),
        # Hermes
        (f"<tool_call>\n{F1}\n</tool_call>", [CALL_F1]),
        ('<tool_call>{"arguments": {"a": 1}, "name": "f"}</tool_call>', [CALL_F1]),
        (f"<tool_call>\n{F1}\n</tool_call>\n<tool_call>\n{F2}\n</tool_call>\n", [CALL_F1, CALL_F2]),
        (f"<tool_call>{F1}", [CALL_F1]),
        (f"<tool_call>\n{F1[:-1]}\n</tool_call> Done. <tool_call>{F2}</tool_call>", [CALL_F1, " Done. ", CALL_F2]),
        (f"<tool_call>{F1[:-1]}</tool_", [f"<tool_call>{F1[:-1]}</tool_"]),
        (f"<tool_call>{F1[:-2]}</tool_call>", [f"<tool_call>{F1[:-2]}</tool_call>"]),
        (f"<tool_call>{F1[:-1]}<b></tool_call>", [f"<tool_call>{F1[:-1]}<b></tool_call>"]),
        (f"<tool_call>{F1}</tool_", [CALL_F1, "</tool_"]),
        (f"<tool_call>\n{F1}\n{F2}\n</tool_call>", [CALL_F1, CALL_F2]),
        (f"<tool_call>{F1}; {F2} </tool_", [CALL_F1, CALL_F2, " </tool_"]),
        (f"<tool_call>{F1} and </tool_call>", [CALL_F1, " and </tool_call>"]),
        (f"I look. <tool_call>{F1}</tool_call> And: <tool_call>{F2}</tool_call> Done.", [
            "I look. ", CALL_F1, " And: ", CALL_F2, " Done."
        ]),
        ('<tool_call>{"name": "f", "arguments": {"s": "a </tool_call> {\\""}}</tool_call>', [
            ToolCall("f", {"s": 'a </tool_call> {"'})
        ]),
        ('<tool_call>{"name": "f", "arguments": {"a": 1', ['<tool_call>{"name": "f", "arguments": {"a": 1']),
        ("a <tool_call>nothing</tool_call> b", ["a <tool_call>nothing</tool_call> b"]),
        (f"<tools>{F1}</tools> <tool", [f"<tools>{F1}</tools> <tool"]),
    ],
)  # fmt: skip
def test_forms(text, expected):
    for pieces in every_cut(text):
        assert events(pieces) == expected


@pytest.mark.parametrize(
    "text",
    [
        "",
        "  \n",
        "Hello",
        f"Hello {F1}",
        f"Hello\n{F1}",
        '{"name": "unknown", "parameters": {}}',
        '{"name": "f"}',
        '{"name": "f", "parameters": 3}',
        '{"name": "f", "parameters": "text"}',
        '{"name": "f", "parameters": {"a": NaN}}',
        '{"name": "f", "parameters": {"a": 1e999}}',
        '{"name": "f", "parameters": {"a": "\\ud800"}}',
        '{"name": "f", "parameters": {"a": 1}',
        '{"name": "f", "parameters": {"a": 1]}}',
        '{"name": ["f"], "parameters": {}}',
        f"[{F1}, 3]",
        f'[{F1}, {{"name": "unknown", "parameters": {{}}}}]',
        "[]",
        "{}",
        "[1, 2]",
        '{"a": {"name": "f", "parameters": {}}}',
        "{not json}",
        "<function=unknown>{}</function>",
        "<function=f>text</function>",
        "<function=f>{'a': 1}</function>",
        "<function=f",
        "<function=",
        "<|python_ta",
        "f.call(",
        "f.call(1)",
        "f.call(a=)",
        "f.call(a=1 b=2)",
        "[f(a=1), unknown()]",
        "[f(1)]",
        "[f(a=1) f2()]",
        "[f(a=1]",
        "[f(a={1: 2})]",
        "[f(a=['x' 'y'])]",
        "[f]",
        "[ff()]",
        "I say [f()]",
        "[f(a=" + "[" * 100 + "'x'" + "]" * 100 + ")]",
        "unknown.call(a=1)",
        "f",
        "get_weath",
        '{"name": "f", "parameters": ' + '{"a": ' * 5000 + "1" + "}" * 5000 + "}",
        '{"name": "f", "parameters": ' + '{"a": ' * 600 + "1" + "}" * 600 + "}",
        '{"name": "f", "parameters": {"a": ' + "9" * 5000 + "}}",
    ],
)
def test_all_else_is_text(text):
    assert parse_tool_calls(text, KNOWN) == (text, [])
    assert events(text) == ([text] if text else [])


def test_without_tools_everything_passes_at_once():
    parser = ToolCallParser(())
    assert parser.feed(F1[:9]) == [F1[:9]]
    assert parser.feed("") == parser.finish() == []


def test_a_python_tag_without_a_known_call_is_dropped():
    assert parse_tool_calls(f"{PYTHON_TAG}print(1)", {"f"}) == ("print(1)", [])
    assert parse_tool_calls(f'a{PYTHON_TAG}brave_search.call(query="x")', {"f"}) == (
        'abrave_search.call(query="x")',
        [],
    )


@pytest.mark.parametrize(
    ("text", "passed"),
    [
        ("Hello", "Hello"),
        ("[Note", "[Note"),
        ("{ x", "{ x"),
        ('{"answer"', '{"answer"'),
        ("<function=z", "<function=z"),
        ("if x < 3 or x <", "if x < 3 or x "),
        ("fo", "fo"),
        (f"{F1} and", " and"),
    ],
)
def test_text_is_passed_on_as_soon_as_it_can_be_nothing_else(text, passed):
    assert "".join(e for e in ToolCallParser(KNOWN).feed(text) if isinstance(e, str)) == passed


def test_a_call_is_told_as_soon_as_it_is_complete():
    parser = ToolCallParser(KNOWN)
    assert parser.feed(F1[:-1]) == []
    assert parser.feed("}") == [CALL_F1]


def test_arguments_as_json_text():
    assert ToolCall("f", {"a": "é"}).arguments_json == '{"a": "é"}'


FRAGMENTS = [
    F1, F2, f"[{F1}]", '{"name": "x", "parameters": {}}', '<function=f>{"a": {"b": "}"}}</function>', "<function=f2>",
    "</function>", "<function=", PYTHON_TAG, "<|py", "f.call(a=1)", "f.call(", 'f2.call(q="a\\"b")', "print(1)", "{",
    "}", "[", "]", '"', "\\", ";", ",", " ", "\n", "text", '{"name": "f', "<",
]  # fmt: skip


@given(st.lists(st.sampled_from(FRAGMENTS), max_size=8).map("".join), st.sampled_from([KNOWN, {"f"}, {"f", "f2"}]))
@settings(max_examples=100, deadline=None)
def test_every_cut_gives_what_the_whole_gives(text, known):
    whole = events([text], known)
    for pieces in every_cut(text):
        assert events(pieces, known) == whole


@given(st.lists(st.sampled_from(FRAGMENTS), max_size=8).map("".join))
@settings(max_examples=150, deadline=None)
def test_no_text_is_lost(text):
    """Without a call, the text is the input without the tags; with calls, what is missing was written for them."""
    content, calls = parse_tool_calls(text, {"f", "f2"})
    if not calls:
        assert content == text.replace(PYTHON_TAG, "")
    remaining = iter(text)
    assert all(character in remaining for character in content)


@pytest.mark.slow
@given(st.lists(st.sampled_from(FRAGMENTS), max_size=16).map("".join), st.lists(st.integers(1, 9)))
@settings(max_examples=3_000, deadline=None)
def test_every_cut_gives_what_the_whole_gives_at_length(text, sizes):
    pieces, start = [], 0
    for size in sizes:
        pieces.append(text[start : start + size])
        start += size
    assert events([*pieces, text[start:]]) == events([text])


# Arguments that contradict the tool's own schema are text

WEATHER = {
    "type": "object",
    "properties": {
        "city": {"type": "string"},
        "unit": {"enum": ["C", "F"]},
        "days": {"type": "integer"},
        "at": {"type": "array", "items": {"$ref": "#/$defs/point"}},
        "deep": {"anyOf": [{"type": "object", "additionalProperties": False}, {"type": "boolean"}]},
    },
    "required": ["city"],
    "$defs": {"point": {"type": "object", "properties": {"x": {"type": "number"}}, "required": ["x"]}},
}
LOOSE = {"type": "object", "properties": {}}
CIRCULAR = {"$ref": "#/$defs/a", "$defs": {"a": {"anyOf": [{"$ref": "#/$defs/a"}, {"$ref": "#/$defs/a"}]}}}
OPTIONAL = {"type": "object", "properties": {"s": {"anyOf": [{"type": "string"}, {"type": "null"}], "default": None}}}


def called(arguments, parameters, spelled='{{"name": "get_weather", "parameters": {}}}'):
    """Whether this is a call with just these arguments, else just this text; however it is cut."""
    text = spelled.format(json.dumps(arguments))
    found = [ToolCall("get_weather", arguments)]
    got = events([text], {"get_weather": parameters})
    assert got in (found, [text])
    assert all(events(pieces, {"get_weather": parameters}) == got for pieces in every_cut(text))
    return got == found


FUNCTION_TAG = "<function=get_weather>{}</function>"


@pytest.mark.parametrize("spelled", ['{{"name": "get_weather", "parameters": {}}}', FUNCTION_TAG])
@pytest.mark.parametrize(
    ("arguments", "parameters", "is_call"),
    [
        ({"city": "Paris"}, WEATHER, True),
        ({"city": "Paris", "more": 1}, WEATHER, True),
        ({"city": "Paris", "unit": "C", "days": 3, "at": [{"x": 1.5}], "deep": {}}, WEATHER, True),
        ({"city": "Paris", "days": "3", "at": '[{"x": "1.5"}]', "deep": "true"}, WEATHER, True),  # in quotes
        ({"city": "Paris", "days": None}, WEATHER, True),  # left out
        ({"city": "3"}, WEATHER, True),
        ({"anything": {"a": 1}}, LOOSE, True),
        ({}, LOOSE, True),
        ({}, None, True),
        ({"a": 1}, CIRCULAR, True),
        ({"s": None}, OPTIONAL, True),
        ({"type": "object", "properties": {"a": 1}}, {"properties": {"type": {}, "properties": {}}}, True),
        ({}, WEATHER, False),
        ({"city": None}, WEATHER, False),
        ({"city": {"type": "string"}}, WEATHER, False),
        ({"city": 3}, WEATHER, False),
        ({"city": "Paris", "unit": "K"}, WEATHER, False),
        ({"city": "Paris", "days": 1.5}, WEATHER, False),
        ({"city": "Paris", "days": True}, WEATHER, False),
        ({"city": "Paris", "at": [{"y": 1}]}, WEATHER, False),
        ({"city": "Paris", "deep": {"a": 1}}, WEATHER, False),
        ({"city": "Paris", "more": 1}, WEATHER | {"additionalProperties": False}, False),
        (WEATHER, WEATHER, False),
        (LOOSE, LOOSE, False),
        (WEATHER, LOOSE, False),
        (WEATHER, {}, False),
    ],
)
def test_arguments_that_contradict_the_schema_are_text(spelled, arguments, parameters, is_call):
    assert called(arguments, parameters, spelled) is is_call


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers(-2, 2) | st.floats(-1, 1) | st.sampled_from(["", "a", "2", "true"]),
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(st.sampled_from("abc"), inner, max_size=2),
    max_leaves=6,
)
TYPES = st.sampled_from(["string", "integer", "number", "boolean", "null", "array", "object"])
SCHEMAS = st.recursive(
    st.fixed_dictionaries({}, optional={"type": TYPES, "enum": st.lists(VALUES, min_size=1), "const": VALUES}),
    lambda inner: st.fixed_dictionaries(
        {},
        optional={
            "type": TYPES,
            "properties": st.dictionaries(st.sampled_from("abc"), inner, max_size=2),
            "required": st.lists(st.sampled_from("abc"), max_size=1),
            "additionalProperties": st.booleans() | inner,
            "items": inner,
            "anyOf": st.lists(inner, min_size=1, max_size=2),
            "allOf": st.lists(inner, min_size=1, max_size=2),
        },
    ),
    max_leaves=6,
)


@given(st.dictionaries(st.sampled_from("abc"), VALUES, max_size=3), SCHEMAS)
@settings(max_examples=300, deadline=None)
def test_what_satisfies_the_schema_contradicts_nothing(arguments, schema):
    if jsonschema.Draft202012Validator(schema).is_valid(arguments):
        assert not contradicts(arguments, schema)


def test_null_beside_arguments_is_no_choice_of_theirs():
    for text in (
        '{"name": "f", "parameters": null, "arguments": {"a": 1}}',
        '{"name": "f", "arguments": null, "parameters": {"a": 1}}',
        '{"type": "function", "function": {"name": "f", "parameters": null, "arguments": {"a": 1}}}',
    ):
        assert parse_tool_calls(text, KNOWN) == ("", [CALL_F1])
