"""Grammars: whatever the masks let through satisfies the schema; hostile schemas are refused by name."""

import json
import random
import re
import subprocess
import sys

import jsonschema
import numpy as np
import pytest

from llama.api.errors import ParameterError
from llama.text.grammar import GrammarCompiler, GrammarError
from llama.text.tool_calls import ToolCall, parse_tool_calls
from tests.text.helpers import WEATHER_TOOL, llama_backend, write_checkpoint
from tests.text.walks import EOS, VOCAB, allowed, new_row, walk


@pytest.fixture(scope="module")
def compiler(demo_tokenizer):
    compiler = GrammarCompiler(demo_tokenizer, VOCAB, deadline_seconds=0.5)
    yield compiler
    compiler.close()


PERSON = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 12},
        "age": {"type": "integer", "minimum": 0, "maximum": 150},
        "tags": {"type": "array", "items": {"enum": ["a", "b", "é\n"]}, "maxItems": 3},
        "address": {"type": "object", "properties": {"zip": {"type": "string", "pattern": "^[0-9]{5}$"}}},
    },
    "required": ["name", "age"],
}
SCHEMAS = [
    PERSON,
    {"enum": ["x", 1, None, {"a": [True]}]},
    {"type": "array", "items": {"anyOf": [{"type": "boolean"}, {"type": "null"}]}, "minItems": 1, "maxItems": 4},
    {"$ref": "#/$defs/n", "$defs": {"n": {"type": "object", "properties": {"v": {"enum": [1]}}, "required": ["v"]}}},
    {"allOf": [{"type": "string", "maxLength": 6}, {"minLength": 2}], "description": "two to six characters"},
    {"oneOf": [{"type": "integer", "minimum": 3, "maximum": 4000}, {"const": "none"}]},
    {"type": "string", "format": "date"},
]


@pytest.mark.parametrize("number", range(len(SCHEMAS)))
def test_walks_through_the_masks_satisfy_the_schema(compiler, demo_tokenizer, number):
    check_walks(compiler, demo_tokenizer, SCHEMAS[number], range(6))


@pytest.mark.slow
@pytest.mark.parametrize("number", range(len(SCHEMAS)))
def test_many_walks_through_the_masks_satisfy_the_schema(compiler, demo_tokenizer, number):
    check_walks(compiler, demo_tokenizer, SCHEMAS[number], range(6, 200))


def check_walks(compiler, tokenizer, schema, seeds):
    grammar = compiler.compile({"type": "json_schema", "json_schema": schema})
    for seed in seeds:
        jsonschema.validate(json.loads(tokenizer.decode(walk(grammar.matcher(), seed))), schema)


def test_both_wrappings_of_a_schema(compiler):
    bare = compiler.compile({"type": "json_schema", "json_schema": PERSON})
    wrapped = compiler.compile({"type": "json_schema", "json_schema": {"name": "p", "schema": PERSON, "strict": True}})
    assert bare is wrapped


def test_listed_properties_are_all_there_are(compiler, demo_tokenizer):
    grammar = compiler.compile(
        {"type": "json_schema", "json_schema": {"properties": {"a": {"enum": [1]}}, "type": "object"}}
    )
    texts = {demo_tokenizer.decode(walk(grammar.matcher(), seed)) for seed in range(10)}
    assert texts == {"{}", '{"a": 1}'}


def test_json_object(compiler, demo_tokenizer):
    matcher = compiler.compile({"type": "json_object"}).matcher()
    for token_id in demo_tokenizer.encode_plain('{"a": [1, "two", {"b": null}]}'):
        assert token_id in allowed(matcher)
        assert not matcher.is_finished
        matcher.advance(token_id)
    assert matcher.is_finished and matcher.is_accepting
    with pytest.raises(GrammarError):
        compiler.compile({"type": "json_object"}).matcher().advance(demo_tokenizer.encode_plain("[")[0])


def test_regex(compiler, demo_tokenizer):
    grammar = compiler.compile({"type": "regex", "regex": "(yes|no|maybe)( [0-9]{1,3})?"})
    for seed in range(10):
        text = demo_tokenizer.decode(walk(grammar.matcher(), seed))
        assert re.fullmatch("(yes|no|maybe)( [0-9]{1,3})?", text)


def test_text_needs_no_grammar(compiler):
    assert compiler.compile(None) is None
    assert compiler.compile({"type": "text"}) is None


CITY_TOOL = {"name": "trip", "parameters": {"$ref": "#/$defs/t", "$defs": {"t": {"properties": {}, "type": "object"}}}}
BOUNDED_TOOL = {
    "name": 'say "hi" é',
    "parameters": {"properties": {"text": {"type": "string", "maxLength": 5}}, "required": ["text"]},
}


def test_tool_choice(compiler, demo_tokenizer):
    tools = [CITY_TOOL, BOUNDED_TOOL, {"name": "now"}, {"name": "empty", "parameters": None}]
    names = [tool["name"] for tool in tools]
    seen = set()
    for seed in range(16):
        text = demo_tokenizer.decode(walk(compiler.compile_tool_choice(tools).matcher(), seed))
        content, [call] = parse_tool_calls(text, names)
        assert content == ""
        seen.add(call.name)
    assert len(seen) > 1
    text = demo_tokenizer.decode(walk(compiler.compile_tool_choice(tools, "now").matcher(), 0))
    assert text == '{"name": "now", "parameters": {}}'
    text = demo_tokenizer.decode(walk(compiler.compile_tool_choice(tools, BOUNDED_TOOL["name"]).matcher(), 0))
    [call] = parse_tool_calls(text, names)[1]
    assert isinstance(call, ToolCall) and len(call.arguments["text"]) <= 5


def test_tool_choice_of_what_was_not_sent(compiler):
    with pytest.raises(ValueError, match="'other'"):
        compiler.compile_tool_choice([WEATHER_TOOL], "other")
    with pytest.raises(ValueError, match="any tool"):
        compiler.compile_tool_choice([])
    with pytest.raises(ValueError, match="must be a JSON schema of an object"):
        compiler.compile_tool_choice([{"name": "f", "parameters": {"type": "string"}}])


def test_the_end_lets_eos_through_and_nothing_else(compiler, demo_tokenizer):
    matcher = compiler.compile({"type": "regex", "regex": "(ab)+"}).matcher()
    first, last = demo_tokenizer.encode_plain("a"), demo_tokenizer.encode_plain("b")
    matcher.advance(first[0])
    assert EOS not in allowed(matcher) and not matcher.is_accepting
    matcher.advance(last[0])
    assert EOS in allowed(matcher) and matcher.is_accepting and not matcher.is_finished
    matcher.advance(EOS)
    assert matcher.is_finished and allowed(matcher) == [EOS]
    matcher.advance(EOS)
    matcher.advance(first[0])
    assert allowed(matcher) == [EOS]
    matcher.rollback(3)
    assert not matcher.is_finished and first[0] in allowed(matcher)


def test_no_mask_allows_a_control_token_or_padding(compiler, demo_tokenizer):
    for response_format in ({"type": "json_object"}, {"type": "regex", "regex": "(.|\n)*"}):
        matcher = compiler.compile(response_format).matcher()
        for token_id in demo_tokenizer.encode_plain('{"'):
            ids = set(allowed(matcher))
            assert not ids & (demo_tokenizer.special_ids - {EOS})
            assert max(ids) < demo_tokenizer.vocab_size
            matcher.advance(token_id)


def test_rollback_and_fork_restore_the_state(compiler):
    grammar = compiler.compile({"type": "json_schema", "json_schema": PERSON})
    chance, matcher, masks, ids = random.Random(5), grammar.matcher(), [], []
    for _ in range(25):
        masks.append(allowed(matcher))
        ids.append(chance.choice(masks[-1]))
        fork = matcher.fork()
        matcher.advance(ids[-1])
        assert allowed(fork) == masks[-1]
        if matcher.is_finished:
            break
    for i in reversed(range(len(ids))):
        matcher.rollback(1)
        assert allowed(matcher) == masks[i]
    for token_id in ids:
        matcher.advance(token_id)
    matcher.rollback(len(ids))
    assert allowed(matcher) == masks[0]


def test_the_row_is_checked(compiler):
    matcher = compiler.compile({"type": "json_object"}).matcher()
    for row in (new_row()[:-1], new_row().astype(np.int64), np.zeros(2 * len(new_row()), np.int32)[::2]):
        with pytest.raises(ValueError, match="row must be contiguous int32"):
            matcher.fill_mask(row)


def deep(levels):
    schema = {"type": "string"}
    for _ in range(levels):
        schema = {"type": "array", "items": schema}
    return schema


@pytest.mark.parametrize(
    ("schema", "message"),
    [
        ({"type": "integer", "multipleOf": 7919 * 7907}, "did not finish within 0.5 s|memory|ended the process"),
        ({"type": "integer", "multipleOf": 10**9 + 7}, "fuel exhausted"),
        ({"type": "string", "description": "x" * 70_000}, "70[0-9]{3} bytes, more than 65536"),
        (deep(40), None),
        (deep(65), "nested deeper than 64 levels"),
        (deep(5000), "nested too deeply|more than 65536"),  # as deep as this Python writes JSON
        ({"properties": {str(i): {} for i in range(2001)}}, "more than 2000 properties and enum values"),
        ({"items": [{"enum": list(range(1001))}] * 2}, "more than 2000 properties and enum values"),
        ({"$ref": "#/$defs/a", "$defs": {"a": {"$ref": "#/$defs/a"}}}, "nothing satisfies it"),
        ({"$ref": "http://127.0.0.1/schema.json"}, "json_schema: "),
        ({"$ref": "#/$defs/missing"}, "does not exist"),
        ({"type": "nonsense"}, "nonsense"),
        ({"not": {"type": "string"}}, "not"),
        ({"type": "string", "pattern": "(?=a)b"}, "look-around"),
        ({"type": "string", "pattern": "("}, "json_schema: "),
        (False, "json_schema: "),
        ({"enum": ["\ud800"]}, "surrogate"),
        (3, "must be a JSON schema"),
        (None, "must be a JSON schema"),
        ({"schema": 3}, "must be a JSON schema"),
        ({"default": {1, 2}}, "not JSON"),
    ],
)
def test_schemas_that_are_refused(compiler, schema, message):
    response_format = {"type": "json_schema", "json_schema": schema}
    if message is None:
        assert compiler.compile(response_format) is not None
        return
    with pytest.raises(ValueError, match=message) as raised:
        compiler.compile(response_format)
    assert len(str(raised.value)) < 500 and "\n" not in str(raised.value)


@pytest.mark.parametrize(
    ("response_format", "message"),
    [
        ({"type": "xml"}, "type must be text, json_object, json_schema or regex, got 'xml'"),
        ({}, "got None"),
        ("json_object", "must be an object, got 'json_object'"),
        ({"type": "regex"}, "non-empty string"),
        ({"type": "regex", "regex": ""}, "non-empty string"),
        ({"type": "regex", "regex": "a" * 70_000}, "more than 65536 bytes"),
        ({"type": "regex", "regex": "("}, "regex"),
        ({"type": "regex", "regex": "\ud800"}, "surrogate"),
    ],
)
def test_response_formats_that_are_refused(compiler, response_format, message):
    with pytest.raises(ValueError, match=message):
        compiler.compile(response_format)


CHOICES = ["a", "ab", 'say "no"', "two\nlines", "é😀", "<|im_end|>"]


def test_a_choice_may_begin_another_and_hold_anything(compiler, demo_tokenizer):
    grammar = compiler.compile({"type": "choice", "choice": CHOICES}, "structured_outputs")
    found = {demo_tokenizer.decode(walk(grammar.matcher(), seed), skip_special_tokens=False) for seed in range(60)}
    assert found == set(CHOICES)
    assert walk(compiler.compile({"type": "choice", "choice": [""]}, "structured_outputs").matcher(), 0) == []


@pytest.mark.parametrize(
    "text",
    ['start: word (" " word)*\nword: "yes" | /n[o0]{1,3}/', 'root ::= word (" " word)*\nword ::= "yes" | "n" [o0]+'],
)
def test_a_grammar_may_be_lark_or_gbnf(compiler, demo_tokenizer, text):
    grammar = compiler.compile({"type": "grammar", "grammar": text}, "structured_outputs")
    for seed in range(10):
        assert re.fullmatch("(yes|n[o0]+)( (yes|n[o0]+))*", demo_tokenizer.decode(walk(grammar.matcher(), seed)))


@pytest.mark.parametrize(
    ("constraint", "message"),
    [
        ({"type": "grammar", "grammar": "nonsense ((("}, r"structured_outputs\.grammar: "),
        ({"type": "grammar", "grammar": "root ::= missing"}, r"structured_outputs\.grammar: "),
        ({"type": "grammar", "grammar": "start: " + '"a" ' * 20_000}, "structured_outputs.grammar has more than 65536"),
        ({"type": "choice", "choice": ["a" * 70_000]}, "structured_outputs.choice has more than 65536 bytes"),
        ({"type": "json_schema", "json_schema": {"schema": {"not": {}}}}, r"structured_outputs\.json: "),
    ],
)
def test_structured_outputs_that_are_refused(compiler, constraint, message):
    with pytest.raises(ParameterError, match=message) as caught:
        compiler.compile(constraint, "structured_outputs")
    assert caught.value.param == "structured_outputs" and "\n" not in str(caught.value)


def test_user_options_for_the_compiler_do_not_count(compiler):
    schema = {
        "type": "object",
        "properties": {},
        "x-guidance": {"whitespace_flexible": True, "lenient": True},
        "not": {},
    }
    with pytest.raises(ValueError, match="not"):
        compiler.compile({"type": "json_schema", "json_schema": schema})


def test_a_tokenizer_without_eos_and_a_small_vocabulary(tmp_path, llama_tokenizer):
    from llama.text.tokenizer import Tokenizer

    tokenizer = Tokenizer.from_pretrained(write_checkpoint(tmp_path, llama_backend()))
    with pytest.raises(ValueError, match="no EOS token"):
        GrammarCompiler(tokenizer, 512).compile({"type": "json_object"})
    with pytest.raises(ValueError, match="vocab_size is 100"):
        GrammarCompiler(llama_tokenizer, 100)


@pytest.mark.parametrize("name", ["llama_tokenizer", "sentencepiece_tokenizer"])
def test_other_kinds_of_tokenizers(request, name):
    tokenizer = request.getfixturevalue(name)
    compiler = GrammarCompiler(tokenizer, 512)
    matcher = compiler.compile({"type": "regex", "regex": "hello 😀"}).matcher()
    ids, row = [], np.zeros(16, np.int32)
    while not matcher.is_finished:
        matcher.fill_mask(row)
        choices = np.flatnonzero(np.unpackbits(row.view(np.uint8), bitorder="little"))
        ids.append(int(choices[0]))
        matcher.advance(ids[-1])
    assert b"".join(map(tokenizer.token_bytes, ids)).decode() == "hello 😀"
    row[:] = 0
    matcher.fill_mask(row)
    ends = np.flatnonzero(np.unpackbits(row.view(np.uint8), bitorder="little")).tolist()
    assert ends == sorted(tokenizer.eos_token_ids)
    compiler.close()


def test_without_llguidance_the_error_says_what_to_install(llama_path):
    script = (
        "import sys; sys.modules['llguidance'] = None\n"
        "from llama.text.grammar import GrammarCompiler; from llama.text.tokenizer import Tokenizer\n"
        f"compiler = GrammarCompiler(Tokenizer.from_pretrained({str(llama_path)!r}), 512)\n"
        "try: compiler.compile({'type': 'json_object'})\nexcept ImportError as error: print(error)\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert "pip install 'llama-engine[structured]'" in done.stdout
