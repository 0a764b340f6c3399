"""A call that a grammar writes is told while it is written: its name at once, then its arguments."""

import itertools
import json
import sys

from hypothesis import given, settings
from hypothesis import strategies as st

from llama.text.tool_calls import ToolCall, ToolCallDelta, ToolCallParser, merged_deltas
from llama.text.tool_calls.forms import head_of_call

NAMES = ["f", "get_weather", 'né "x"\n', "f_2"]
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.sampled_from([0.5, "", "é😀", '"}{\\', "]\n", "; "]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(["a", '"é', "}"]), inner, max_size=3),
    max_leaves=8,
)
CALLS = st.lists(st.tuples(st.sampled_from(NAMES), st.dictionaries(st.sampled_from(["p", "q"]), VALUES)), min_size=1)


def written(name, arguments):
    return "".join(head_of_call(name)) + json.dumps(arguments, ensure_ascii=False) + "}"


def read(pieces, certain=NAMES, tools=NAMES):
    """(text, calls, deltas) of what a parser says of these pieces."""
    parser = ToolCallParser(tools, certain)
    events = [event for piece in pieces for event in parser.feed(piece)] + parser.finish()
    deltas = merged_deltas(event for event in events if isinstance(event, ToolCallDelta))
    calls = [event for event in events if isinstance(event, ToolCall)]
    return "".join(event for event in events if isinstance(event, str)), calls, deltas


def pieces_of(text, cuts):
    ends = sorted({min(cut, len(text)) for cut in cuts} | {0, len(text)})
    return [text[a:b] for a, b in itertools.pairwise(ends)]


@given(CALLS, st.lists(st.integers(0, 200)))
@settings(max_examples=60, deadline=None)
def test_deltas_are_the_calls_however_the_text_is_cut(asked, cuts):
    text = "; ".join(written(*call) for call in asked)
    for pieces in (pieces_of(text, cuts), list(text), [text]):
        said, calls, deltas = read(pieces)
        assert said == "" and [(call.name, call.arguments) for call in calls] == asked
        expected = []
        for i, call in enumerate(calls):
            expected += [ToolCallDelta(i, call.name, ""), ToolCallDelta(i, None, call.arguments_json)]
        assert deltas == expected


@given(CALLS, st.integers(0, 10**6), st.lists(st.integers(0, 200)))
@settings(max_examples=60, deadline=None)
def test_of_a_call_that_is_cut_the_beginning_was_told_and_all_is_text(asked, end, cuts):
    whole = "; ".join(written(*call) for call in asked)
    text = whole[: end % len(whole)]
    said, calls, deltas = read(pieces_of(text, cuts))
    assert (said, calls) == read([text], certain=())[:2]
    assert [(call.name, call.arguments) for call in calls] == asked[: len(calls)]
    for delta in deltas[2 * len(calls) :]:
        assert delta.index == len(calls)
        name, arguments = asked[len(calls)]
        assert name == delta.name or json.dumps(arguments, ensure_ascii=False).startswith(delta.arguments)


def test_what_a_cut_call_holds_in_its_strings_is_no_call():
    inner = '<tool_call>{"name": "f", "arguments": {}}</tool_call>'
    text = written("f", {"a": inner})[:-2]
    assert read(list(text))[:2] == (text, [])


def test_what_is_not_written_as_the_grammar_writes_it_is_read_as_ever():
    for text in ('{"name": "f", "arguments": {"a": 1}}', '{"name":"f","parameters":{"a":1}}', "f.call(a=1)"):
        assert read(list(text)) == ("", [ToolCall("f", {"a": 1})], [])
    assert read('{"name": "f", "parameters": "x"}')[:2] == ('{"name": "f", "parameters": "x"}', [])


def test_numbers_are_told_as_they_are_spelled():
    _, (call,), _ = read(['{"name": "f", "parameters": {"a": 1.50, "b": 1e400, "c": -1e999}}'])
    assert call.arguments_json == '{"a": 1.50, "b": 1e400, "c": -1e999}'
    assert call.arguments == {"a": 1.5, "b": sys.float_info.max, "c": -sys.float_info.max}
