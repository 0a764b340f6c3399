"""One incremental state machine for all forms of tool calls that Llama 3.1 writes.

    {"name": N, "parameters": {...}}     also "arguments", {"type": "function", ...}, nested "function"; a JSON array;
                                         several separated by `;`, commas, line breaks or spaces
    <function=N>{...}</function>
    <tool_call>{...}</tool_call>         as Hermes, Qwen and most small models of today write it
    N.call(key="value")
    [N(key="value"), ...]                as Llama 3.2 writes it where it is told to
    any of these, or Python code, after <|python_tag|>

Calls of JSON, `N.call` or a list stand at the beginning or follow another call; `<function=`, `<tool_call>` and
`<|python_tag|>` are found anywhere. A closing tag may be missing. It is a call only if N is among the tools sent and
its arguments do not contradict that tool's schema; all else is text, passed on as soon as it can be nothing else.
Decisions depend on the characters alone, so the events are the same however the text was cut; but deltas, which tell a
call that is certain from its first characters on, may be longer.
"""

import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from enum import Enum, auto
from typing import Any

from llama.text.tool_calls.contradiction import contradicts
from llama.text.tool_calls.forms import (
    BracketScan,
    NotACall,
    ToolCall,
    ToolCallDelta,
    calls_of_json,
    calls_of_list,
    head_of_call,
    load_arguments,
    load_json,
    load_written,
)

PYTHON_TAG = "<|python_tag|>"
CODE_INTERPRETER = "code_interpreter"
_FUNCTION, _FUNCTION_END = "<function=", "</function>"
_TOOL_CALL, _TOOL_CALL_END = "<tool_call>", "</tool_call>"
MARKERS = (PYTHON_TAG, _FUNCTION, _TOOL_CALL)
# Those that may be tokens of their own; a text that leaves special tokens out must keep them.
CALL_TOKENS = (PYTHON_TAG, _TOOL_CALL, _TOOL_CALL_END)
_MARKER = re.compile("|".join(map(re.escape, MARKERS)))
_SPACE = re.compile(r"\s*")
_SEPARATORS = re.compile(r"[\s;,]*")

Event = str | ToolCall | ToolCallDelta


class _State(Enum):
    START = auto()  # nothing but white space so far
    AFTER_CALL = auto()  # nothing but separators since the last call
    TEXT = auto()
    CODE = auto()  # all that follows is Python code


@dataclass(slots=True)
class _Told:
    """How much of a certain call's arguments was told: from `start` in the buffer up to `so_far`."""

    name: str
    start: int
    scan: BracketScan
    so_far: int
    end: int | None = None


class ToolCallParser:
    """`feed` text as it comes, then `finish`; both return text and calls in the order in which they were written."""

    def __init__(self, tools: Mapping[str, Any] | Collection[str], certain: Collection[str] = ()) -> None:
        """`tools` by name, each with the JSON schema of its arguments or None; or the names alone. `certain`: those of
        which a grammar writes each call as `head_of_call` and arguments that satisfy the schema."""
        self._parameters = tools if isinstance(tools, Mapping) else dict.fromkeys(tools)
        self._known = frozenset(tools)
        self._call_starts = {f"{name}.call(": name for name in sorted(self._known)}
        self._state = _State.START
        self._buffer = ""
        self._code: list[str] = []
        self._scan: BracketScan | None = None  # of the call that the buffer begins with, perhaps
        self._closing_tag = ""  # what may follow the last call, or more calls, and says nothing
        self._events: list[Event] = []
        self._heads = {"".join(head_of_call(name)): name for name in sorted(certain)}
        self._told: _Told | None = None  # of the certain call that the buffer begins with
        self._num_calls = 0

    def feed(self, text: str) -> list[Event]:
        """What this text makes certain."""
        return self._run(text, is_end=False)

    def finish(self) -> list[Event]:
        """What was held back: a call of code, or text."""
        return self._run("", is_end=True)

    def _run(self, text: str, *, is_end: bool) -> list[Event]:
        if not self._known:
            return [text] if text else []
        if self._state is _State.CODE:
            self._code.append(text)
        else:
            self._buffer += text
            while self._buffer and self._advance(is_end):
                pass
        if is_end and self._state is _State.CODE:
            self._events.append(ToolCall(CODE_INTERPRETER, {"code": "".join(self._code)}))
            self._num_calls += 1
            self._state, self._code = _State.TEXT, []
        events, self._events = self._events, []
        return events

    def _advance(self, is_end: bool) -> bool:
        """Decides about the beginning of the buffer. False if that takes more text."""
        start = self._pass_text(is_end) if self._state is _State.TEXT else self._pass_separators(is_end)
        if start is None:
            return False
        try:
            end = self._read_call(start)
            if end is None and not is_end:
                return False
            if end is None:
                raise NotACall
        except NotACall:
            end = self._not_a_call(start) if self._told is None else self._cut_call()
        self._scan = self._told = None
        self._buffer = self._buffer[end:]
        return True

    # What precedes a call

    def _pass_text(self, is_end: bool) -> int | None:
        """Emits text up to a marker, which then begins the buffer; None if there is none."""
        marker = _MARKER.search(self._buffer)
        if marker:
            text_end = marker.start()
        else:
            text_end = self._buffer.rfind("<")  # all markers begin with it and hold it once
            may_be_marker = text_end >= 0 and any(m.startswith(self._buffer[text_end:]) for m in MARKERS)
            if is_end or not may_be_marker:
                text_end = len(self._buffer)
        self._emit_text(self._buffer[:text_end])
        self._buffer = self._buffer[text_end:]
        return 0 if marker else None

    def _pass_separators(self, is_end: bool) -> int | None:
        """Where a call or text begins after white space or, after a call, separators; None if that is still open."""
        if self._closing_tag and not self._pass_closing_tag(is_end):
            return None
        is_after_call = self._state is _State.AFTER_CALL
        start = _end_of_match(_SEPARATORS if is_after_call else _SPACE, self._buffer, 0)
        if start < len(self._buffer):
            return start
        if is_end:
            self._emit_text("" if is_after_call else self._buffer)
            self._buffer = ""
        return None

    def _pass_closing_tag(self, is_end: bool) -> bool:
        """Drops the tag after a call that it closes; False if there may still come one."""
        start = _end_of_space(self._buffer, 0)
        end = start + len(self._closing_tag)
        is_open = _may_start(self._closing_tag, self._buffer, start)
        if is_open and end > len(self._buffer) and not is_end:
            return False
        if is_open and end <= len(self._buffer):
            self._buffer, self._closing_tag = self._buffer[end:], ""
        return True

    def _not_a_call(self, start: int) -> int:
        """What stands at `start` is no call: code or text. Returns where the undecided rest begins."""
        if not self._buffer.startswith(PYTHON_TAG, start):
            self._state = _State.TEXT
            self._emit_text(self._buffer[: start + 1])
            return start + 1
        after_tag = start + len(PYTHON_TAG)
        if CODE_INTERPRETER in self._known and self._buffer[after_tag:].strip():
            self._state, self._code = _State.CODE, [self._buffer[after_tag:]]
            return len(self._buffer)
        self._state = _State.TEXT
        self._emit_text(self._buffer[:start])
        return after_tag

    def _cut_call(self) -> int:
        """A call of which the beginning was told: all of it is text."""
        self._state = _State.TEXT
        self._emit_text(self._buffer)
        return len(self._buffer)

    # Calls: each returns the end of the call at `start`, None while it is open, or raises NotACall

    def _read_call(self, start: int) -> int | None:
        text = self._buffer
        if self._told is None and (head := next((h for h in self._heads if text.startswith(h + "{", start)), None)):
            arguments = start + len(head)
            self._told = _Told(self._heads[head], arguments, BracketScan(arguments, '"', is_call=False), arguments)
            self._events.append(ToolCallDelta(self._num_calls, self._told.name, ""))
        if self._told is not None:
            return self._read_certain(self._told)
        if _may_start(PYTHON_TAG, text, start):
            start = _end_of_space(text, start + len(PYTHON_TAG))
            if start >= len(text):
                return None
        closing_tag = ""
        if _may_start(_TOOL_CALL, text, start):
            start, closing_tag = _end_of_space(text, start + len(_TOOL_CALL)), _TOOL_CALL_END
            if start >= len(text):
                return None
        if text[start] in "{[":
            end = self._read_brackets(start, closing_tag)
            if end is not None:
                self._closing_tag = closing_tag or self._closing_tag
            return end
        if _may_start(_FUNCTION, text, start):
            name_start = start + len(_FUNCTION)
            return self._read_function(name_start) if name_start <= len(text) else None
        possible = [call_start for call_start in self._call_starts if _may_start(call_start, text, start)]
        if not possible:
            raise NotACall
        opening = start + len(possible[0]) - 1
        if opening >= len(text):
            return None
        end = self._end_of_bracket(opening, "\"'", is_call=False)
        if end is not None:
            name = self._call_starts[possible[0]]
            self._emit_calls([ToolCall(name, load_arguments(text[opening + 1 : end - 1]))])
        return end

    def _read_brackets(self, start: int, closing_tag: str) -> int | None:
        """Calls as JSON, of which small models leave out the last brace before a closing tag now and then, or as a list
        in Python's spelling."""
        text = self._buffer
        inside = _end_of_space(text, start + 1)
        if text[start] == "{" or text.startswith("{", inside):
            scan = self._scan = self._scan or BracketScan(start, '"', is_call=True, stops=bool(closing_tag))
            end, brace = scan.feed(text), ""
            if end is None and scan.stopped_at is not None:
                if not _may_start(closing_tag, text, scan.stopped_at):
                    raise NotACall
                if text.startswith(closing_tag, scan.stopped_at):
                    end, brace = scan.stopped_at, "}"
            if end is not None:
                self._emit_calls(calls_of_json(text[start:end] + brace, self._known))
            return end
        if inside == len(text):
            return None
        if not any(_may_start(f"{name}(", text, inside) for name in self._known):
            raise NotACall
        end = self._end_of_bracket(start, "\"'", is_call=False)
        if end is not None:
            self._emit_calls(calls_of_list(text[start + 1 : end - 1], self._known))
        return end

    def _read_certain(self, told: _Told) -> int | None:
        text = self._buffer
        if told.end is None:
            told.end = told.scan.feed(text)
            news = text[told.so_far : told.end]
            told.so_far += len(news)
            if news:
                self._events.append(ToolCallDelta(self._num_calls, None, news))
        if told.end is None or told.end == len(text):
            return None
        if text[told.end] != "}":
            raise NotACall
        written = text[told.start : told.end]
        self._events.append(ToolCall(told.name, load_written(written), written))
        self._num_calls += 1
        self._state = _State.AFTER_CALL
        return told.end + 1

    def _read_function(self, name_start: int) -> int | None:
        """`N>{...}` after `<function=`; models leave out the closing tag now and then."""
        text = self._buffer
        possible = [name for name in self._known if _may_start(f"{name}>", text, name_start)]
        if not possible:
            raise NotACall
        name_end = name_start + len(possible[0])
        if name_end >= len(text):
            return None
        opening = _end_of_space(text, name_end + 1)
        if _may_start(_FUNCTION_END, text, opening):
            if opening + len(_FUNCTION_END) > len(text):
                return None
            self._emit_calls([ToolCall(possible[0], {})])
            return opening + len(_FUNCTION_END)
        if text[opening] != "{":
            raise NotACall
        end = self._end_of_bracket(opening, '"', is_call=False)
        if end is not None:
            self._emit_calls([ToolCall(possible[0], load_json(text[opening:end]))])
            self._closing_tag = _FUNCTION_END
        return end

    def _end_of_bracket(self, opening: int, quotes: str, *, is_call: bool) -> int | None:
        if self._scan is None:
            self._scan = BracketScan(opening, quotes, is_call=is_call)
        return self._scan.feed(self._buffer)

    # Events

    def _emit_calls(self, calls: list[ToolCall]) -> None:
        if any(contradicts(call.arguments, self._parameters[call.name]) for call in calls):
            raise NotACall
        self._events += calls
        self._num_calls += len(calls)
        self._state = _State.AFTER_CALL

    def _emit_text(self, text: str) -> None:
        if not text:
            return
        if self._events and isinstance(self._events[-1], str):
            self._events[-1] += text
        else:
            self._events.append(text)


def parse_tool_calls(text: str, tools: Mapping[str, Any] | Collection[str]) -> tuple[str, list[ToolCall]]:
    """(what is not a call, the calls): the stream's events, replayed for the whole text."""
    parser = ToolCallParser(tools)
    events = parser.feed(text) + parser.finish()
    calls = [event for event in events if isinstance(event, ToolCall)]
    return "".join(event for event in events if isinstance(event, str)), calls


def _may_start(prefix: str, text: str, start: int) -> bool:
    """Whether `prefix` stands at `start`, or may once more text has come."""
    seen = text[start : start + len(prefix)]
    return prefix.startswith(seen) and (len(seen) == len(prefix) or start + len(seen) == len(text))


def _end_of_match(pattern: re.Pattern[str], text: str, start: int) -> int:
    match = pattern.match(text, start)
    return match.end() if match else start


def _end_of_space(text: str, start: int) -> int:
    return _end_of_match(_SPACE, text, start)
