"""Types of fields that both dialects share, and pydantic's errors in one line each.

Strict: no text for numbers, no bool for integers. A number with a zero fraction is an integer in JSON (2.0 is 2).
"""

import json
from collections.abc import Sequence
from typing import Annotated, Any

from pydantic import BeforeValidator, ConfigDict, Field
from pydantic_core import ErrorDetails, PydanticCustomError

from llama.api.neutral import Neutral

STRICT = ConfigDict(strict=True, extra="ignore", protected_namespaces=(), hide_input_in_errors=True)

MAX_MESSAGES = 4096
MAX_TOOLS = 128
MAX_STOPS = 16
MAX_STOP_CHARACTERS = 256
MAX_BIASES = 1024
MAX_COMPLETIONS = 64
MAX_LOGPROBS = 20
MAX_PROMPTS = 256

# How pydantic calls a wrong type, and how JSON Schema calls the right one.
_EXPECTED = {
    "float_type": "number",
    "int_type": "integer",
    "int_from_float": "integer",
    "string_type": "string",
    "string_unicode": "string",
    "bool_type": "boolean",
    "list_type": "array",
    "dict_type": "object",
    "model_type": "object",
    "model_attributes_type": "object",
}


def _whole(value: Any) -> Any:
    return int(value) if isinstance(value, float) and value.is_integer() else value


def _real(value: Any) -> Any:
    """An integer too large for a float is out of any range too."""
    if isinstance(value, int) and not isinstance(value, bool):
        try:
            return float(value)
        except OverflowError:
            return float("inf") if value > 0 else float("-inf")
    return value


Integer = Annotated[int, BeforeValidator(_whole), Field(ge=-(2**63), le=2**63 - 1)]
Seed = Annotated[int, BeforeValidator(_whole), Field(ge=-(2**63), le=2**64 - 1)]
Number = Annotated[float, BeforeValidator(_real)]


def pointer(location: Sequence[int | str]) -> str:
    return "/" + "/".join(map(str, location))


def mismatch(location: Sequence[int | str], expected: str, value: Any) -> str:
    return f"Type mismatch of '{pointer(location)}', '{expected}' not in {json_types(value)}"


def json_types(value: Any) -> str:
    """The types that a JSON value has, as Cloudflare's validator lists them."""
    if value is None:
        return "'null'"
    if isinstance(value, bool):
        return "'boolean'"
    if isinstance(value, str):
        return "'string'"
    if isinstance(value, int | float):
        return "'number','integer'" if isinstance(value, int) or value.is_integer() else "'number'"
    return "'array'" if isinstance(value, list) else "'object'"


def explain(error: ErrorDetails, location: Sequence[int | str], neutral: Neutral) -> str:
    """One of pydantic's errors in the words of Cloudflare's validator. `neutral`: fields that the body may have at
    these values alone."""
    where, kind, context = pointer(location), error["type"], error.get("ctx", {})
    if kind == "missing":
        return f"required properties at '{pointer(location[:-1])}' are '{location[-1]}'"
    if kind in _EXPECTED:
        return mismatch(location, _EXPECTED[kind], error["input"])
    if kind == "greater_than_equal":
        return f"'{where}' must be >= {_shown(context['ge'])}"
    if kind == "less_than_equal":
        return f"'{where}' must be <= {_shown(context['le'])}"
    if kind == "greater_than":
        return f"'{where}' must be > {_shown(context['gt'])}"
    if kind in ("string_too_long", "too_long"):
        return f"Length of '{where}' must be <= {context['max_length']}"
    if kind in ("string_too_short", "too_short"):
        return f"Length of '{where}' must be >= {context['min_length']} not met"
    if kind == "finite_number":
        return f"'{where}' must be finite"
    if kind == "literal_error":
        return f"enum not in {context['expected'].replace(chr(39), '')} at '{where}'"
    if kind == "extra_forbidden":
        legal = " or ".join(map(json.dumps, neutral.get(where.removeprefix("/"), ())))
        return f"'{where}' is not a parameter of this server{f', but for {legal}' if legal else ''}"
    if kind == "said":
        return f"'{where}' {error['msg']}"
    return f"'{where}' is not valid: {error['msg']}"


def refusal(message: str) -> PydanticCustomError:
    """An error of our own validators. The message follows the name of the field."""
    return PydanticCustomError("said", "{what}", {"what": message})


def _shown(limit: Any) -> str:
    return f"{limit:g}" if isinstance(limit, float) else str(limit)
