"""Every keyword of JSON Schema is held by the grammar, relaxed as docs/http.md says, or refused by tool and path."""

import json
import re
from pathlib import Path

import jsonschema
import pytest
from jsonschema_specifications import REGISTRY

from llama.api.errors import ParameterError
from llama.text.grammar import GrammarCompiler, GrammarError
from tests.server.helpers import TOKENIZER, VOCAB_SIZE

INTEGER, STRING = {"type": "integer"}, {"type": "string"}
TWO = {"type": "object", "properties": {"b": INTEGER, "c": INTEGER}}
MAP = {"type": "object", "additionalProperties": INTEGER}
LIST = {"type": "array", "items": INTEGER}

# keyword: (schema, what satisfies it, what does not)
HELD = {
    "type": ({"type": ["integer", "null"]}, None, "x"),
    "enum": ({"enum": [1, "a"]}, "a", "b"),
    "const": ({"const": {"b": [1]}}, {"b": [1]}, {"b": [2]}),
    "multipleOf": ({"type": "integer", "multipleOf": 3}, 9, 10),
    "multipleOf of a number": ({"type": "number", "multipleOf": 0.5}, 1.5, 1.2),
    "minimum": ({"type": "integer", "minimum": 3}, 3, 2),
    "maximum": ({"type": "number", "maximum": 3}, 2.5, 3.5),
    "exclusiveMinimum": ({"type": "integer", "exclusiveMinimum": 3}, 4, 3),
    "exclusiveMaximum": ({"type": "number", "exclusiveMaximum": 3}, 2.5, 3),
    "exclusiveMinimum near the maximum": ({"type": "number", "exclusiveMinimum": 0, "maximum": 0.5}, 0.01, 0),
    "exclusiveMaximum near the minimum": ({"type": "number", "minimum": -1.5, "exclusiveMaximum": -1}, -1.25, -1),
    "minLength": ({"type": "string", "minLength": 2}, "éé", "é"),
    "maxLength": ({"type": "string", "maxLength": 2}, "éé", "abc"),
    "pattern": ({"pattern": "^a+$"}, "aa", "b"),
    "format": ({"type": "string", "format": "date"}, "2024-02-29", "2024-02-30"),
    "properties": (TWO, {"b": 1}, {"b": "x"}),
    "required": ({**TWO, "required": ["b"]}, {"b": 1}, {"c": 1}),
    "additionalProperties": (MAP, {"x": 1}, {"x": "y"}),
    "patternProperties": (
        {"type": "object", "patternProperties": {"^x": INTEGER, "^y": STRING}, "additionalProperties": False},
        {"xa": 1, "y": "a"},
        {"xa": "y"},
    ),
    "propertyNames": ({**MAP, "propertyNames": {"pattern": "^x"}}, {"xa": 1}, {"a": 1}),
    "minProperties": ({**MAP, "minProperties": 1}, {"a": 1}, {}),
    "maxProperties": ({**TWO, "maxProperties": 1}, {"b": 1}, {"b": 1, "c": 1}),
    "items": (LIST, [1], ["x"]),
    "items, a list of them": ({"type": "array", "items": [INTEGER, STRING]}, [1, "a"], ["a", 1]),
    "additionalItems": ({"type": "array", "items": [INTEGER], "additionalItems": False}, [1], [1, 2]),
    "prefixItems": ({"type": "array", "prefixItems": [INTEGER], "items": STRING}, [1, "a"], [1, 1]),
    "minItems": ({**LIST, "minItems": 1}, [1], []),
    "maxItems": ({**LIST, "maxItems": 1}, [1], [1, 2]),
    "allOf": ({"allOf": [INTEGER, {"minimum": 3}]}, 3, 2),
    "anyOf": ({"anyOf": [INTEGER, STRING]}, "a", []),
    "oneOf": ({"oneOf": [INTEGER, STRING]}, "a", []),
    "$ref": ({"$ref": "#/$defs/x"}, 1, "x"),
    "$defs": ({"$defs": {"y": STRING}, "type": "integer"}, 1, "x"),
    "definitions": ({"definitions": {"y": STRING}, "type": "integer"}, 1, "x"),
}
# keyword: (schema, what satisfies it, what does not and is let through)
RELAXED = {
    "format": ({"type": "string", "format": "ipv4network"}, "10.0.0.0/8", None),
    "pattern": ({"type": "string", "format": "emoji", "pattern": "^(?=a)a$"}, "a", "b"),
    "minimum": ({"type": "integer", "minimum": -(2**64)}, 1, None),
    "uniqueItems": ({**LIST, "uniqueItems": True}, [1, 2], [1, 1]),
    "propertyNames": ({**MAP, "propertyNames": {"maxLength": 1}}, {"a": 1}, {"ab": 1}),
    "oneOf": ({"oneOf": [INTEGER, {"minimum": 3}]}, 1, 4),
}
ANNOTATIONS = {"title": "x", "description": "x", "default": 2, "examples": [3], "deprecated": True, "readOnly": True}
ANNOTATIONS |= {"writeOnly": True, "$comment": "x", "$id": "http://x/y", "$anchor": "x"}
ANNOTATIONS |= {
    "$schema": "https://json-schema.org/draft/2020-12/schema",
    "$vocabulary": {},
    "contentEncoding": "base64",
}
ANNOTATIONS |= {"contentMediaType": "text/html", "contentSchema": INTEGER, "discriminator": {"propertyName": "x"}}
ANNOTATIONS |= {"x-nonsense": 1, "nonsense": {"not": {}}}
REFUSED = {
    "not": {"not": STRING},
    "if": {**INTEGER, "if": {"minimum": 3}, "then": {"multipleOf": 2}, "else": {"maximum": 0}},
    "then": {**INTEGER, "then": {"minimum": 3}},
    "else": {**INTEGER, "else": {"minimum": 3}},
    "contains": {"type": "array", "contains": INTEGER},
    "minContains": {**LIST, "minContains": 2},
    "maxContains": {**LIST, "maxContains": 2},
    "dependentRequired": {**TWO, "dependentRequired": {"b": ["c"]}},
    "dependentSchemas": {**TWO, "dependentSchemas": {"b": {"required": ["c"]}}},
    "dependencies": {**TWO, "dependencies": {"b": ["c"]}},
    "unevaluatedProperties": {"allOf": [TWO], "unevaluatedProperties": False},
    "unevaluatedItems": {"type": "array", "prefixItems": [INTEGER], "unevaluatedItems": False},
    "$dynamicRef": {"$dynamicRef": "#x"},
    "$dynamicAnchor": {**INTEGER, "$dynamicAnchor": "x"},
    "$recursiveRef": {"$recursiveRef": "#"},
    "$ref": {"$ref": "https://x/y.json"},
    "patternProperties": {"type": "object", "patternProperties": {"^x": INTEGER, "^xa": {"minimum": 3}}},
    "pattern": {"type": "string", "pattern": "^(?!a)"},
}
DEFINITIONS = {"$defs": {"x": INTEGER}}


@pytest.fixture(scope="module")
def compiler():
    compiler = GrammarCompiler(TOKENIZER, VOCAB_SIZE)
    yield compiler
    compiler.close()


def parameters(schema):
    return {"type": "object", "properties": {"a": schema}, "required": ["a"], **DEFINITIONS}


def takes(compiler, schema, value):
    matcher = compiler.compile_tool_choice([{"name": "f", "parameters": parameters(schema)}]).matcher()
    try:
        for token in json.dumps({"name": "f", "parameters": {"a": value}}, ensure_ascii=False).encode():
            matcher.advance(token)
    except GrammarError:
        return False
    return matcher.is_accepting


def satisfies(schema, value):
    kind = jsonschema.Draft202012Validator
    if isinstance(schema.get("items"), list) or "definitions" in schema:
        kind = jsonschema.Draft7Validator
    return kind(parameters(schema), format_checker=kind.FORMAT_CHECKER).is_valid({"a": value})


@pytest.mark.parametrize("keyword", HELD)
def test_held(compiler, keyword):
    schema, good, bad = HELD[keyword]
    assert satisfies(schema, good) and not satisfies(schema, bad)
    assert takes(compiler, schema, good) and not takes(compiler, schema, bad)


@pytest.mark.parametrize("keyword", RELAXED)
def test_relaxed(compiler, keyword):
    schema, good, bad = RELAXED[keyword]
    assert satisfies(schema, good) and takes(compiler, schema, good)
    if bad is not None:
        assert takes(compiler, schema, bad)


@pytest.mark.parametrize("keyword", ANNOTATIONS)
def test_annotations_say_nothing(compiler, keyword):
    schema = {"type": "integer", keyword: ANNOTATIONS[keyword]}
    assert takes(compiler, schema, 1) and not takes(compiler, schema, "x")


def test_nullable_is_what_openapi_means(compiler):
    schema = {"type": "integer", "nullable": True}
    assert takes(compiler, schema, None) and takes(compiler, schema, 1) and not takes(compiler, schema, "x")
    assert not takes(compiler, {**schema, "enum": [1]}, None)


@pytest.mark.parametrize("keyword", REFUSED)
def test_refused_by_tool_and_path(compiler, keyword):
    for inside, place in ((REFUSED[keyword], "/properties/a"), ({"items": REFUSED[keyword]}, "/properties/a/items")):
        with pytest.raises(ParameterError) as caught:
            takes(compiler, inside, 1)
        assert (
            str(caught.value).startswith(f"the parameters of tool 'f' at {place}: ") and caught.value.param == "tools"
        )
        if keyword not in ("$ref", "pattern", "patternProperties"):  # of which the value is the matter
            assert f'"{keyword}"' in str(caught.value)


def test_the_tables_have_every_keyword_and_the_docs_say_what_is_not_held():
    meta = "https://json-schema.org/draft/2020-12/meta/"
    parts = ("core", "applicator", "unevaluated", "validation", "meta-data", "format-annotation", "content")
    keywords = {name for part in parts for name in REGISTRY.contents(meta + part)["properties"]}
    keywords |= jsonschema.Draft7Validator.META_SCHEMA["properties"].keys()
    assert keywords <= HELD.keys() | RELAXED.keys() | ANNOTATIONS.keys() | REFUSED.keys()
    docs = (Path(__file__).parents[2] / "docs/http.md").read_text().partition("\n## Schemas\n")[2].partition("\n## ")[0]
    named = set(re.findall(r"`([$\w]+)`", docs))
    assert REFUSED.keys() - {"pattern"} <= named and RELAXED.keys() - {"pattern", "minimum"} <= named
