"""Schemas as generators write them: every type of pydantic 2, and zod 4's toJSONSchema."""

import datetime
import decimal
import ipaddress
import json
import pathlib
import random
import re
import uuid
from typing import Annotated, Any, Literal

import jsonschema
import numpy as np
import pydantic
import pytest

from llama.text.grammar import GrammarCompiler, GrammarError
from tests.server.helpers import TOKENIZER, VOCAB_SIZE


@pytest.fixture(scope="module")
def compiler(demo_tokenizer):
    compiler = GrammarCompiler(demo_tokenizer, demo_tokenizer.vocab_size)
    yield compiler
    compiler.close()


Tag = Annotated[str, pydantic.Field(pattern="^x")]
PYDANTIC = {
    "bytes": (bytes, "a"),
    "any": (Any, {"a": 1}),
    "set": (set[int], [1, 2]),
    "frozenset": (frozenset[str], ["a"]),
    "pair": (tuple[int, str], [1, "a"]),
    "mapping": (dict[str, int], {"a": 1}),
    "mapping by uuid": (dict[uuid.UUID, int], {"6f7e3a52-6c1a-4c7e-9a53-0c3f4f1c8a11": 1}),
    "mapping by pattern": (dict[Tag, int], {"xa": 1}),
    "literal": (Literal["a", 1], "a"),
    "union": (int | str | None, None),
    "datetime": (datetime.datetime, "2024-01-02T03:04:05Z"),
    "timedelta": (datetime.timedelta, "P1D"),
    "decimal": (decimal.Decimal, 1.5),
    "path": (pathlib.Path, "/tmp"),
    "network": (ipaddress.IPv4Network, "10.0.0.0/8"),
    "secret": (pydantic.SecretStr, "a"),
    "base64": (pydantic.Base64Str, "YQ=="),
    "file": (pydantic.FilePath, "a"),
    "pattern": (re.Pattern, "a+"),
    "url": (pydantic.HttpUrl, "http://a.b/"),
    "few": (Annotated[set[int], pydantic.Field(min_length=1)], [1]),
}
ZOD = {  # zod 4's toJSONSchema
    "record": (
        {"type": "object", "propertyNames": {"type": "string"}, "additionalProperties": {"type": "boolean"}},
        {"a": True},
    ),
    "record of an enum": (
        {
            "type": "object",
            "propertyNames": {"type": "string", "enum": ["a", "b"]},
            "additionalProperties": {"type": "number"},
            "required": ["a", "b"],
        },
        {"a": 1, "b": 2},
    ),
    "emoji": ({"type": "string", "format": "emoji", "pattern": "^[a-z]+$"}, "a"),
    "safe integer": ({"type": "integer", "minimum": -9007199254740991, "maximum": 9007199254740991}, 5),
    "cidr": ({"type": "string", "format": "cidrv4"}, "a"),
    "file": ({"type": "string", "format": "binary", "contentEncoding": "binary"}, "a"),
}
GENERATED = {name: (pydantic.TypeAdapter(kind).json_schema(), value) for name, (kind, value) in PYDANTIC.items()} | ZOD


def accepts(compiler, tokenizer, schema, value):
    matcher = compiler.compile({"type": "json_schema", "json_schema": schema}).matcher()
    try:
        for token in tokenizer.encode(json.dumps(value), add_special_tokens=False):
            matcher.advance(token)
    except GrammarError:
        return False
    return matcher.is_accepting


@pytest.mark.parametrize("name", GENERATED)
def test_schemas_of_generators_are_taken(compiler, demo_tokenizer, name):
    schema, value = GENERATED[name]
    jsonschema.validate(value, schema)
    assert accepts(compiler, demo_tokenizer, schema, value)
    whole = {"type": "object", "properties": {"format": schema, "propertyNames": schema}, "required": ["format"]}
    assert accepts(compiler, demo_tokenizer, whole, {"format": value, "propertyNames": value})


def test_names_of_properties_are_held_where_they_can_be(compiler, demo_tokenizer):
    assert not accepts(compiler, demo_tokenizer, GENERATED["record of an enum"][0], {"a": 1, "c": 2})
    schema = {"type": "object", "propertyNames": {"pattern": "^x"}, "additionalProperties": {"type": "integer"}}
    assert accepts(compiler, demo_tokenizer, schema, {"xa": 1})
    assert not accepts(compiler, demo_tokenizer, schema, {"a": 1})


def test_listed_names_are_held_beside_properties(compiler, demo_tokenizer):
    schema = {
        "type": "object",
        "properties": {"b": {"type": "boolean"}, "z": {"type": "integer"}},
        "propertyNames": {"enum": ["a", "b"]},
        "additionalProperties": {"type": "integer"},
    }
    assert accepts(compiler, demo_tokenizer, schema, {"b": True, "a": 1})
    for wrong in ({"b": 1}, {"a": True}, {"c": 1}, {"z": 1}):
        assert not accepts(compiler, demo_tokenizer, schema, wrong)


def test_what_must_be_there_may_be_there(compiler, demo_tokenizer):
    """Closing an object must not forbid what it requires."""
    schema = {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a", "b"]}
    assert accepts(compiler, demo_tokenizer, schema, {"a": 1, "b": 2})


def test_the_tool_whose_schema_is_refused_is_named(compiler):
    tools = [{"name": name, "parameters": {"type": "object", "properties": {}}} for name in ("f", "g", "h")]
    tools[1]["parameters"]["properties"] = {"a": {"type": "nonsense"}}
    with pytest.raises(ValueError, match="the parameters of tool 'g' at /properties/a: Invalid type: nonsense"):
        compiler.compile_tool_choice(tools)


@pytest.mark.parametrize(
    ("schema", "place"),
    [
        ({"type": "object", "properties": {"a/b": {"items": {"type": "nonsense"}}}}, "/properties/a~1b/items"),
        ({"anyOf": [{"type": "null"}, {"type": "array", "items": {"type": "nonsense"}}]}, "/anyOf/1/items"),
        (
            {"$defs": {"x": {"type": "nonsense"}}, "type": "object", "properties": {"a": {"$ref": "#/$defs/x"}}},
            "/$defs/x",
        ),
    ],
)
def test_the_place_of_what_is_refused_is_named(compiler, schema, place):
    with pytest.raises(ValueError, match=re.escape(f"json_schema at {place}: Invalid type: nonsense")):
        compiler.compile({"type": "json_schema", "json_schema": schema})
    tools = [
        {"name": "f", "parameters": {"type": "object", "properties": {}}},
        {"name": "g", "parameters": {"type": "object", "properties": {"p": schema}}},
    ]
    if definitions := schema.get("$defs"):
        inside = {name: value for name, value in schema.items() if name != "$defs"}
        tools[1]["parameters"] = {"type": "object", "properties": {"p": inside}, "$defs": definitions}
    inside = place if place.startswith("/$defs") else f"/properties/p{place}"
    with pytest.raises(ValueError, match=re.escape(f"parameters of tool 'g' at {inside}: Invalid type: nonsense")):
        compiler.compile_tool_choice(tools)


def test_of_overlapping_alternatives_one_is_enough(compiler, demo_tokenizer):
    alternatives = [{"type": "object", "properties": {name: {"type": "string"}}} for name in "ab"]
    assert accepts(compiler, demo_tokenizer, {"oneOf": alternatives}, {"a": "x"})


REAL = json.loads((pathlib.Path(__file__).parents[1] / "golden" / "zod_schemas.json").read_text())["schemas"]
CLOSING = [ord(character) for character in '"}],']


def walk(matcher, seed: int, longest: int = 400) -> str | None:
    """A short text that the masks let through; None where it becomes longer."""
    chance, said = random.Random(seed), bytearray()
    while not matcher.is_accepting and len(said) < longest:
        row = np.zeros((VOCAB_SIZE + 31) // 32, np.int32)
        matcher.fill_mask(row)
        allowed = np.flatnonzero(np.unpackbits(row.view(np.uint8), bitorder="little"))
        closing = [token for token in allowed if token in CLOSING]
        readable = [token for token in allowed if 32 <= token < 127] or [token for token in allowed if token < 256]
        said.append(chance.choice(closing if closing and chance.random() < 0.5 else readable))
        matcher.advance(said[-1])
    return said.decode() if matcher.is_accepting else None


def test_every_type_of_zod_is_taken_and_what_comes_of_it_is_valid():
    """The schemas are zod's own, written by the program that the file names."""
    compiler = GrammarCompiler(TOKENIZER, VOCAB_SIZE)
    texts = {}
    for name, schema in REAL.items():
        grammar = compiler.compile({"type": "json_schema", "json_schema": schema})
        texts[name] = [walk(grammar.matcher(), seed) for seed in range(2)]
    compiler.close()
    without_end = {name for name, found in texts.items() if None in found}
    assert without_end <= {"ends:output", "ends:input", "includes:output", "includes:input"}, "random text seldom fits"
    for name in texts.keys() - without_end:
        for text in texts[name]:
            value = json.loads(text)
            if not name.startswith("emoji"):  # whose pattern is left out, for it has look-around
                jsonschema.Draft202012Validator(REAL[name]).validate(value)
