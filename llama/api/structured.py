"""StructuredOutputsParams: what an answer is held to, under vLLM's names. Runs without torch."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

from llama.api.errors import ParameterError, refusal

_FIELD = "structured_outputs"


@dataclass(frozen=True, slots=True, kw_only=True)
class StructuredOutputsParams:
    """Exactly one of: `json`, a JSON schema or its text; `regex`; `choice`, some texts; `grammar`, Lark or GBNF
    (EBNF); `json_object=True`.

    White space in JSON is always fixed here and objects that list their properties are closed, so that the
    `disable_...` of vLLM change nothing. Raises ParameterError.
    """

    json: str | Mapping[str, Any] | None = None
    regex: str | None = None
    choice: Sequence[str] | None = None
    grammar: str | None = None
    json_object: bool | None = None
    disable_fallback: bool = False
    disable_any_whitespace: bool = False
    disable_additional_properties: bool = False
    whitespace_pattern: None = None
    structural_tag: None = None

    def __post_init__(self) -> None:
        given = [name for name in _KINDS if getattr(self, name) is not None]
        for name in ("whitespace_pattern", "structural_tag"):
            if getattr(self, name) is not None:
                raise ParameterError(f"{_FIELD}.{name} is not offered", _FIELD)
        if len(given) != 1:
            found = f"got {' and '.join(given)}" if given else "got none"
            raise ParameterError(f"{_FIELD} must have exactly one of {', '.join(_KINDS)}: {found}", _FIELD)
        if self.json is not None:
            object.__setattr__(self, "json", _schema(self.json))
        if self.json_object is not None and self.json_object is not True:
            raise refusal(_FIELD, "True", self.json_object, ".json_object")
        for name in ("regex", "grammar"):
            if getattr(self, name) is not None and not (isinstance(getattr(self, name), str) and getattr(self, name)):
                raise refusal(_FIELD, "a text that is not empty", getattr(self, name), f".{name}")
        if self.choice is not None:
            object.__setattr__(self, "choice", _choices(self.choice))

    @classmethod
    def of(cls, value: Any) -> "StructuredOutputsParams":
        """The value itself, or made of a mapping of its fields."""
        if isinstance(value, cls):
            return value
        if not isinstance(value, Mapping):
            raise refusal(_FIELD, "a StructuredOutputsParams", value)
        names = [field.name for field in fields(cls)]
        if unknown := sorted(map(str, value.keys() - set(names))):
            raise ParameterError(f"{_FIELD} has no key {unknown[0]!r}; it has {', '.join(names)}", _FIELD)
        return cls(**value)

    @property
    def constraint(self) -> dict[str, Any]:
        """As a response_format spells it, with two more types: "choice" and "grammar"."""
        kind = next(name for name in _KINDS if getattr(self, name) is not None)
        if kind == "json":
            return {"type": "json_schema", "json_schema": {"schema": self.json}}
        return {"type": kind} if kind == "json_object" else {"type": kind, kind: getattr(self, kind)}


_KINDS = ("json", "regex", "choice", "grammar", "json_object")


def _schema(value: Any) -> Mapping[str, Any]:
    schema = value
    if isinstance(value, str):
        try:
            schema = json.loads(value)
        except (ValueError, RecursionError):
            schema = None
    if not isinstance(schema, Mapping):
        raise refusal(_FIELD, "a JSON schema, or the text of one", value, ".json")
    return schema


def _choices(value: Any) -> tuple[str, ...]:
    if not isinstance(value, list | tuple) or not value or not all(isinstance(text, str) for text in value):
        raise refusal(_FIELD, "a list of at least one text", value, ".choice")
    return tuple(value)
