"""The written forms of one tool call: JSON, Meta's `name.call(key="value")`, and a list of `name(key="value")`.

Text arrives in pieces, so scanning for the end of a call keeps its place: each character is looked at once. What can no
longer become a call raises NotACall at the first character that shows it.
"""

import json
import math
import re
import sys
from collections.abc import Collection, Iterable
from dataclasses import dataclass, field
from typing import Any, NoReturn

_CLOSERS = {"{": "}", "[": "]", "(": ")"}
CALL_KEYS = frozenset({"name", "parameters", "arguments", "type", "function", "id"})
_KEY = re.compile(r"\s*([A-Za-z_]\w*)\s*=\s*")
_HEAD = re.compile(r"\s*([^\s(]+)\(")
_SPACE = re.compile(r"\s*")
_SINGLE_QUOTED = re.compile(r"'((?:[^'\\]|\\.)*)'", re.DOTALL)
_CONSTANT = re.compile(r"(?:True|False|None|true|false|null)\b")
_CONSTANTS = {"true": True, "false": False, "none": None, "null": None}
_LARGEST = sys.float_info.max
_MAX_DEPTH = 512
_MAX_PYTHON_DEPTH = 64  # of lists and dicts that are no JSON
_ESCAPES = {"n": "\n", "t": "\t", "r": "\r"}


class NotACall(Exception):
    """What was read cannot be a call."""


@dataclass(frozen=True, slots=True)
class ToolCall:
    """A call of a tool that was offered, with the object of its arguments."""

    name: str
    arguments: dict[str, Any]
    # Of a call that was told while it was written: the arguments as the model spelled them.
    written: str | None = field(default=None, compare=False, repr=False)

    @property
    def arguments_json(self) -> str:
        return json.dumps(self.arguments, ensure_ascii=False) if self.written is None else self.written


@dataclass(frozen=True, slots=True)
class ToolCallDelta:
    """What is new of a call: its name first, then its arguments' JSON piece by piece. `index` counts the calls of one
    answer."""

    index: int
    name: str | None
    arguments: str


def merged_deltas(deltas: Iterable[ToolCallDelta]) -> list[ToolCallDelta]:
    """With what follows one another of the same arguments made one."""
    merged: list[ToolCallDelta] = []
    for delta in deltas:
        if merged and delta.name is merged[-1].name is None and delta.index == merged[-1].index:
            delta = ToolCallDelta(delta.index, None, merged.pop().arguments + delta.arguments)
        merged.append(delta)
    return merged


def head_of_call(name: str) -> list[str]:
    """What stands before the arguments of a call that a grammar writes, in the pieces that JSON has."""
    return ["{", '"name"', ": ", json.dumps(name, ensure_ascii=False), ", ", '"parameters"', ": "]


class BracketScan:
    """Finds where the bracket at `opening` closes, across any number of pieces. Quotes hide brackets.

    `feed` gets the text seen so far, always with the same beginning. With `is_call` it is that of a JSON call or an
    array of them: a first key that no call begins with ends the waiting early. With `stops` it goes no further than a
    "<" in an object's own level: `stopped_at`.
    """

    def __init__(self, opening: int, quotes: str, *, is_call: bool, stops: bool = False) -> None:
        self.stopped_at: int | None = None
        self._stops = stops
        self._position = opening
        self._quotes = quotes
        self._closers: list[str] = []
        self._quote: str | None = None
        self._quote_start = 0
        self._is_escaped = False
        self._first_key_is_due = is_call

    def feed(self, text: str) -> int | None:
        """The end of the call, or None while it is open. Raises NotACall."""
        while self._position < len(text):
            position, character = self._position, text[self._position]
            self._position += 1
            if self._quote is not None:
                self._read_quoted(text, position, character)
            elif self._first_key_is_due and self._closers and not character.isspace():
                self._read_beginning(position, character)
            elif character == "<" and self._stops and self._closers == ["}"]:
                self._position = self.stopped_at = position
                return None
            elif character in self._quotes:
                self._quote, self._quote_start = character, position
            elif character in _CLOSERS:
                self._closers.append(_CLOSERS[character])
            elif character in "}])":
                if self._closers.pop() != character:
                    raise NotACall
                if not self._closers:
                    return self._position
        return None

    def _read_quoted(self, text: str, position: int, character: str) -> None:
        if self._is_escaped:
            self._is_escaped = False
        elif character == "\\":
            self._is_escaped = True
        elif character == self._quote:
            self._quote = None
            if self._first_key_is_due and text[self._quote_start + 1 : position] not in CALL_KEYS:
                raise NotACall
            self._first_key_is_due = False

    def _read_beginning(self, position: int, character: str) -> None:
        if self._closers == ["]"] and character == "{":
            self._closers.append("}")
        elif self._closers[-1] == "}" and character == '"':
            self._quote, self._quote_start = character, position
        else:
            raise NotACall


def calls_of_json(text: str, known: Collection[str]) -> list[ToolCall]:
    """The calls of a JSON object or array. Raises NotACall unless each is one of a known tool."""
    value = load_json(text)
    return [_call_of_object(item, known) for item in (value if isinstance(value, list) else [value])]


def load_json(text: str) -> Any:
    """Strict in all but line breaks in strings, which models write. Raises NotACall."""
    try:
        value = json.loads(text, strict=False, parse_constant=_refuse, parse_float=_finite)
        json.dumps(value, ensure_ascii=False).encode()  # an escaped lone surrogate is not text
    except (ValueError, RecursionError):
        raise NotACall from None
    return _shallow(value)


def load_written(text: str) -> dict[str, Any]:
    """Arguments that a grammar held; what is too large for a float becomes the largest. Raises NotACall."""
    try:
        value = json.loads(text, parse_float=nearest_float)
    except (ValueError, RecursionError):
        raise NotACall from None
    if not isinstance(value, dict):
        raise NotACall
    return value


def _shallow(value: Any) -> Any:
    """The same. Raises NotACall where it is nested more deeply than every Python reads and writes JSON."""
    level: list[Any] = [value]
    for _ in range(_MAX_DEPTH):
        inside = [node.values() if isinstance(node, dict) else node for node in level if isinstance(node, dict | list)]
        if not inside:
            return value
        level = [child for children in inside for child in children]
    raise NotACall


def nearest_float(number: str) -> float:
    """What JSON spells as a float, the largest where it is too large for one."""
    return max(-_LARGEST, min(_LARGEST, float(number)))


def load_arguments(text: str) -> dict[str, Any]:
    """`key=value, ...` between the parentheses of a call. Raises NotACall."""
    arguments: dict[str, Any] = {}
    position = _after_space(text, 0)
    while position < len(text):
        if not (key := _KEY.match(text, position)):
            raise NotACall
        arguments[key[1]], position = _load_value(text, key.end())
        position = _after_comma(text, position)
    return arguments


def calls_of_list(text: str, known: Collection[str]) -> list[ToolCall]:
    """`name(key=value, ...), ...` between the brackets of a list. Raises NotACall unless each is of a known tool."""
    calls: list[ToolCall] = []
    position = _after_space(text, 0)
    while position < len(text):
        head = _HEAD.match(text, position)
        end = head and BracketScan(head.end() - 1, "\"'", is_call=False).feed(text)
        if not head or not end or head[1] not in known:
            raise NotACall
        calls.append(ToolCall(head[1], load_arguments(text[head.end() : end - 1])))
        position = _after_comma(text, end)
    return calls


def _load_value(text: str, position: int, depth: int = 0) -> tuple[Any, int]:
    if match := _SINGLE_QUOTED.match(text, position):
        return re.sub(r"(?s)\\(.)", lambda m: _ESCAPES.get(m[1], m[1]), match[1]), match.end()
    if match := _CONSTANT.match(text, position):
        return _CONSTANTS[match[0].lower()], match.end()
    try:
        _, end = json.JSONDecoder(strict=False).raw_decode(text, position)
    except (ValueError, RecursionError):
        if text[position : position + 1] in ("[", "{") and depth < _MAX_PYTHON_DEPTH:
            return _load_python(text, position, depth + 1)
        raise NotACall from None
    return load_json(text[position:end]), end


def _load_python(text: str, position: int, depth: int) -> tuple[Any, int]:
    """A list or a dict as Python spells it: its strings in single quotes, True, None."""
    is_dict = text[position] == "{"
    closer, entries, keys = "}" if is_dict else "]", [], []
    position = _after_space(text, position + 1)
    while not text.startswith(closer, position):
        if is_dict:
            key, position = _load_value(text, position, depth)
            position = _after_space(text, position)
            if not isinstance(key, str) or not text.startswith(":", position):
                raise NotACall
            keys.append(key)
            position = _after_space(text, position + 1)
        entry, position = _load_value(text, position, depth)
        entries.append(entry)
        position = _after_space(text, position)
        if text.startswith(",", position):
            position = _after_space(text, position + 1)
        elif not text.startswith(closer, position):
            raise NotACall
    return dict(zip(keys, entries, strict=True)) if is_dict else entries, position + 1


def _after_comma(text: str, position: int) -> int:
    """Where the next entry begins, or the text ends. Raises NotACall where there is neither comma nor end."""
    position = _after_space(text, position)
    if position == len(text):
        return position
    if text[position] != ",":
        raise NotACall
    return _after_space(text, position + 1)


def _after_space(text: str, position: int) -> int:
    match = _SPACE.match(text, position)
    return match.end() if match else position


def _call_of_object(value: Any, known: Collection[str]) -> ToolCall:
    if not isinstance(value, dict):
        raise NotACall
    function = value.get("function")
    inner = function if isinstance(function, dict) else value
    name = function if isinstance(function, str) else inner.get("name")
    given = [inner[key] for key in ("parameters", "arguments") if inner.get(key) is not None]
    arguments = given[0] if given else None
    if not isinstance(name, str) or name not in known:
        raise NotACall
    if arguments is None and ("parameters" in inner or "arguments" in inner or "type" in value):
        arguments = {}
    if isinstance(arguments, str):
        arguments = load_json(arguments)
    if not isinstance(arguments, dict):
        raise NotACall
    return ToolCall(name, arguments)


def _refuse(constant: str) -> NoReturn:
    raise ValueError(f"{constant} is not JSON")


def _finite(number: str) -> float:
    value = float(number)
    if not math.isfinite(value):
        raise ValueError(f"{number} is too large")
    return value
