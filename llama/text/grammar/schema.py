"""JSON schemas as clients send them: taken out of their wrappings, measured, relaxed and closed.

Relaxing: what generators of schemas write and llguidance does not have. A `format` that it does not know, a pattern
with look-around beside a format, bounds beyond 2**63 and `uniqueItems` are left out; `propertyNames` becomes the
properties that it lists, or the pattern where no properties are given, else it is left out; of a `oneOf` several may
hold. OpenAPI's `nullable` adds null to the type.

Closing: an object that lists its properties gets `additionalProperties: false` unless it says otherwise. Whatever is
then generated satisfies the schema as it was sent; without it, a model may go on inventing properties without end.
"""

import json
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from llama.text.tokenizer.tokenizer import check_unicode

MAX_BYTES = 64 * 1024
MAX_DEPTH = 64
MAX_NAMES = 2000
_WRAPPING = frozenset({"name", "strict", "description"})
_COMBINING = frozenset({"allOf", "if", "then", "else", "dependentSchemas"})
_OPEN_ENDED = frozenset(
    {"additionalProperties", "patternProperties", "unevaluatedProperties", "anyOf", "oneOf", "$ref"}
)
_SCHEMA_MAPS = frozenset({"properties", "patternProperties", "$defs", "definitions", "dependentSchemas"})
_SCHEMA_LISTS = frozenset({"allOf", "anyOf", "oneOf", "prefixItems"})
_SCHEMAS = frozenset({"items", "additionalProperties", "additionalItems", "contains", "not"})
# llguidance's; for JSON Schema a format is an annotation, so that no other one is an error.
_FORMATS = frozenset("date-time time date duration email hostname ipv4 ipv6 uuid uri unknown".split())
# The one spelling in which we have models write JSON: that of Llama's own examples. White space cannot run away.
_OPTIONS = {"item_separator": ", ", "key_separator": ": ", "whitespace_flexible": False, "coerce_one_of": True}
_LOOK_AROUND = ("(?=", "(?!", "(?<=", "(?<!")
_FAR = 2.0**63
_LOWER, _UPPER = ("minimum", "exclusiveMinimum"), ("maximum", "exclusiveMaximum")


def schema_of_response_format(response_format: Mapping[str, Any]) -> Any:
    """The schema of {"type": "json_schema", "json_schema": ...}, bare or wrapped as OpenAI does; of "json_object"."""
    if response_format["type"] == "json_object":
        return {"type": "object"}
    value = response_format.get("json_schema")
    if isinstance(value, Mapping) and "schema" in value and "type" not in value:
        if unknown := value.keys() - _WRAPPING - {"schema"}:
            raise ValueError(f"response_format.json_schema has no key {sorted(unknown, key=str)[0]!r}")
        value = value["schema"]
    elif isinstance(value, Mapping) and value.keys() & {"name", "strict"} and value.keys() <= _WRAPPING:
        raise ValueError("response_format.json_schema has no schema beside its name")
    if not isinstance(value, Mapping | bool):
        raise ValueError("response_format.json_schema must be a JSON schema, or an object with one in schema")
    return value


def schema_of_tool(tool: Mapping[str, Any]) -> dict[str, Any]:
    """What the arguments of a prepared tool must look like: always an object."""
    parameters = tool["function"].get("parameters")
    if parameters is None:
        return {"type": "object", "properties": {}, "additionalProperties": False}
    if not isinstance(parameters, Mapping) or parameters.get("type", "object") != "object":
        raise ValueError(f"the parameters of tool {tool['function']['name']!r} must be a JSON schema of an object")
    if parameters.keys() & {"type", "$ref", "anyOf", "oneOf", "allOf"}:
        return dict(parameters)
    return {"type": "object", **parameters}


def prepared_schema(schema: Any, where: str) -> str:
    """The measured and closed schema as JSON, with our spelling. Raises ValueError that names `where`."""
    try:
        size = len(json.dumps(schema).encode())
    except (TypeError, ValueError, RecursionError):
        raise ValueError(f"{where} is not JSON, or nested too deeply") from None
    if size > MAX_BYTES:
        raise ValueError(f"{where} has {size} bytes, more than {MAX_BYTES}")
    _measure(schema, where)
    if isinstance(schema, bool):
        schema = {} if schema else {"not": {}}
    schema = _relaxed(schema)
    if schema is False:
        raise ValueError(f"{where}: nothing satisfies it")
    closed = schema if _combines(schema) else _closed(schema)
    text = json.dumps({**closed, "x-guidance": _OPTIONS}, ensure_ascii=False)
    check_unicode(text)
    return text


def _measure(schema: Any, where: str) -> None:
    """Depth of the JSON, and the number of properties and enum values."""
    names = 0
    level = [schema]
    for _ in range(MAX_DEPTH + 1):
        names += sum(_names(value) for value in level if isinstance(value, Mapping))
        if names > MAX_NAMES:
            raise ValueError(f"{where} has more than {MAX_NAMES} properties and enum values")
        level = [child for value in level for child in _children(value)]
        if not level:
            return
    raise ValueError(f"{where} is nested deeper than {MAX_DEPTH} levels")


def _names(value: Mapping[str, Any]) -> int:
    listed = (value.get(key) for key in ("properties", "patternProperties", "enum"))
    return sum(len(names) for names in listed if isinstance(names, Mapping | list))


def _children(value: Any) -> list[Any]:
    if isinstance(value, Mapping):
        return list(value.values())
    return list(value) if isinstance(value, list | tuple) else []


def _combines(value: Any) -> bool:
    """Whether schemas add to one another anywhere: then no object is complete by itself."""
    if isinstance(value, Mapping):
        adds = value.keys() & {"anyOf", "oneOf", "$ref"} and "properties" in value
        return bool(adds or value.keys() & _COMBINING) or any(map(_combines, value.values()))
    return isinstance(value, list | tuple) and any(map(_combines, value))


def subschemas(schema: Mapping[str, Any]) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """The schemas right inside, each with its place as a JSON pointer."""
    for key, value in schema.items():
        if key in _SCHEMA_MAPS and isinstance(value, Mapping):
            inside = [(f"/{key}/{_escaped(name)}", child) for name, child in value.items()]
        elif key in _SCHEMA_LISTS and isinstance(value, list | tuple):
            inside = [(f"/{key}/{i}", child) for i, child in enumerate(value)]
        else:
            inside = [(f"/{key}", value)] if key in _SCHEMAS else []
        yield from ((place, child) for place, child in inside if isinstance(child, Mapping))


def _escaped(name: Any) -> str:
    return str(name).replace("~", "~0").replace("/", "~1")


def _mapped(schema: Mapping[str, Any], change: Callable[[Any], Any]) -> dict[str, Any]:
    """The schema with the schemas in it changed; what only looks like one, as a value of an enum, stays."""
    changed: dict[str, Any] = {}
    for key, value in schema.items():
        if key in _SCHEMA_MAPS and isinstance(value, Mapping):
            changed[key] = {name: change(child) for name, child in value.items()}
        elif key in _SCHEMA_LISTS and isinstance(value, list | tuple):
            changed[key] = [change(child) for child in value]
        else:
            changed[key] = change(value) if key in _SCHEMAS else value
    return changed


def _closed(schema: Any) -> Any:
    if not isinstance(schema, Mapping):
        return schema
    closed = _mapped(schema, _closed)
    properties, required = schema.get("properties"), schema.get("required", [])
    listed = isinstance(required, list) and all(isinstance(name, str) for name in required)
    is_complete = isinstance(properties, Mapping) and listed and set(required) <= properties.keys()
    if is_complete and not schema.keys() & _OPEN_ENDED:
        closed["additionalProperties"] = False
    return closed


def _relaxed(schema: Any) -> Any:
    if not isinstance(schema, Mapping):
        return schema
    if schema.get("not") in ({}, True) and schema.keys() <= {"not", "description", "title"}:
        return False
    relaxed = _mapped(schema, _relaxed)
    if isinstance(name := relaxed.get("format"), str):
        if name not in _FORMATS:
            del relaxed["format"]
        if isinstance(pattern := relaxed.get("pattern"), str) and any(look in pattern for look in _LOOK_AROUND):
            del relaxed["pattern"]
    for keys, outward in ((_LOWER, -1), (_UPPER, 1)):
        for key in keys:
            if isinstance(bound := relaxed.get(key), int | float) and bound * outward >= _FAR:
                del relaxed[key]
    _move_open_ends(relaxed)
    relaxed.pop("uniqueItems", None)
    if relaxed.get("nullable") is True and isinstance(kind := relaxed.get("type"), str):
        relaxed["type"] = [kind, "null"]
    names = relaxed.pop("propertyNames", None)
    own = relaxed.get("properties", {})
    if isinstance(names, Mapping) and isinstance(own, Mapping) and "patternProperties" not in relaxed:
        others = relaxed.get("additionalProperties", True)
        if isinstance(listed := names.get("enum"), list) and all(isinstance(name, str) for name in listed):
            kept = {name: value for name, value in own.items() if name in listed}
            new = {name: others for name in listed if name not in kept}
            relaxed |= {"properties": kept | new, "additionalProperties": False}
        elif not own and isinstance(pattern := names.get("pattern"), str):
            relaxed |= {"patternProperties": {pattern: others}, "additionalProperties": False}
    return relaxed


def _move_open_ends(schema: dict[str, Any]) -> None:
    """A whole number that is excluded, where the other bound is less than 1 away, is moved a millionth of the way to
    it: llguidance lets that number through."""
    bounds = {name: schema[name] for name in (*_LOWER, *_UPPER) if _is_number(schema.get(name))}
    for end, others in (("exclusiveMinimum", _UPPER), ("exclusiveMaximum", _LOWER)):
        if end in bounds and bounds[end] % 1 == 0:
            spans = [bounds[name] - bounds[end] for name in others if name in bounds]
            if 0 < abs(span := min(spans, key=abs, default=0)) < 1:
                schema[end] = bounds[end] + span * 2**-20


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < _FAR
