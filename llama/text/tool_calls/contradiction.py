"""Whether the arguments of a call contradict the JSON schema of its tool.

Small models now and then repeat a tool's definition where a call should be: its arguments are then a schema, not
values. What is not looked at (patterns, formats, bounds) contradicts nothing.
"""

import json
from collections.abc import Mapping
from typing import Any

_MAX_STEPS = 10_000  # a schema that refers to itself may have no end
_TYPES: dict[str, type | tuple[type, ...]] = {
    "string": str,
    "boolean": bool,
    "number": (int, float),
    "integer": (int, float),
    "null": type(None),
    "array": list,
    "object": dict,
}


def contradicts(arguments: Mapping[str, Any], parameters: Any) -> bool:
    """`parameters` is the tool's schema, None where it has none.

    Lenient where models are careless and clients forgive it: a number, a boolean, a list or an object may stand in
    quotes, and null stands for an optional parameter that is left out.
    """
    if not isinstance(parameters, Mapping):
        return False
    known = parameters.get("properties")
    repeats_definition = isinstance(arguments.get("properties"), Mapping) and arguments.get("type") == "object"
    if repeats_definition and not (isinstance(known, Mapping) and known.keys() & {"type", "properties"}):
        return True
    try:
        return not _Check(parameters).fits(arguments, parameters)
    except RecursionError:  # of a schema that refers to itself
        return False


class _Check:
    def __init__(self, root: Mapping[str, Any]) -> None:
        self._root = root
        self._steps = 0

    def fits(self, value: Any, schema: Any) -> bool:
        if self._satisfies(value, schema):
            return True
        unquoted = _unquoted(value)
        return unquoted is not value and self._satisfies(unquoted, schema)

    def _satisfies(self, value: Any, schema: Any) -> bool:
        self._steps += 1
        if self._steps > _MAX_STEPS:
            return True
        if not isinstance(schema, Mapping):
            return schema is not False
        kinds = schema.get("type", [])
        kinds = kinds if isinstance(kinds, list) else [kinds]
        if kinds and not any(_is_a(value, kind) for kind in kinds):
            return value is None and schema.get("nullable") is True
        if isinstance(enum := schema.get("enum"), list) and value not in enum:
            return False
        if "const" in schema and value != schema["const"]:
            return False
        if isinstance(reference := schema.get("$ref"), str) and not self.fits(value, self._target(reference)):
            return False
        if isinstance(every := schema.get("allOf"), list) and not all(self.fits(value, each) for each in every):
            return False
        for key in ("anyOf", "oneOf"):
            if isinstance(some := schema.get(key), list) and not any(self.fits(value, each) for each in some):
                return False
        if isinstance(value, dict):
            return self._object_fits(value, schema)
        return not isinstance(value, list) or all(self.fits(item, schema.get("items")) for item in value)

    def _object_fits(self, value: dict[str, Any], schema: Mapping[str, Any]) -> bool:
        properties, required = schema.get("properties"), schema.get("required")
        properties = properties if isinstance(properties, Mapping) else {}
        required = required if isinstance(required, list) else []
        others = True if "patternProperties" in schema else schema.get("additionalProperties", True)
        return all(key in value for key in required) and all(
            (item is None and key in properties and key not in required) or self.fits(item, properties.get(key, others))
            for key, item in value.items()
        )

    def _target(self, reference: str) -> Any:
        """What a reference inside the schema leads to; True where it leads nowhere."""
        found: Any = self._root
        if not reference.startswith("#"):
            return True
        for step in reference.removeprefix("#").split("/")[1:]:
            key = step.replace("~1", "/").replace("~0", "~")
            if not isinstance(found, Mapping) or key not in found:
                return True
            found = found[key]
        return found


def _is_a(value: Any, kind: Any) -> bool:
    if not isinstance(kind, str) or kind not in _TYPES:
        return True
    if isinstance(value, bool) and kind != "boolean":
        return False
    if kind == "integer" and isinstance(value, float) and not value.is_integer():
        return False
    return isinstance(value, _TYPES[kind])


def _unquoted(value: Any) -> Any:
    """What a string spells, where that is not a string again."""
    if not isinstance(value, str):
        return value
    try:
        spelled = json.loads(value)
    except (ValueError, RecursionError):
        return value
    return value if isinstance(spelled, str) else spelled
