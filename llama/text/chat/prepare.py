"""Messages and tools in one spelling, whatever of the usual ones they came in.

Text parts become one text; flat tools and tool calls the nested form; `function_call` and the role `function`, which
OpenAI had before tools, a tool call and the role `tool`. An empty list of tools or tool calls counts as none. What
cannot be meant is refused by its place. What a template wants of the result is decided in forms.py.
"""

import re
import reprlib
from collections.abc import Collection, Mapping, Sequence
from typing import Any

from llama.api.errors import ParameterError, is_one_of

TOOL_ROLES = frozenset({"tool", "ipython"})
_ROLE = re.compile(r"[A-Za-z][A-Za-z0-9_-]{0,63}")
_ROLES = frozenset({"system", "developer", "user", "assistant", "function", *TOOL_ROLES})
_TEXT_PARTS = {"text": "text", "input_text": "text", "output_text": "text", "refusal": "refusal"}  # type -> its key
_THOUGHTS = ("reasoning_content", "reasoning")
_REWRITTEN = frozenset({"content", "tool_calls", "function_call"})


def prepare_messages(messages: Any, control_tokens: Collection[str] = ()) -> list[dict[str, Any]]:
    """Copies of the messages. A role must not complete a control token such as `<|ROLE|>`.

    `content` is text, beside tool calls also None, of a tool's result any JSON. The `arguments` of a call stay what
    they are: an object, or the text that the model wrote.
    """
    if not isinstance(messages, Sequence) or isinstance(messages, str) or not messages:
        raise ParameterError("messages must be a list of at least one message", "messages")
    return [_message(message, f"messages[{i}]", control_tokens) for i, message in enumerate(messages)]


def prepare_tools(tools: Any) -> list[dict[str, Any]] | None:
    """Each tool as {"type": "function", "function": {"name", ...}}; None for none."""
    if tools is None:
        return None
    if not isinstance(tools, Sequence) or isinstance(tools, str | bytes):
        raise _mistyped("tools", "a list", tools, "tools")
    return [_tool(tool, f"tools[{i}]") for i, tool in enumerate(tools)] or None


def tool_name(tool: Mapping[str, Any]) -> str:
    """The name of a prepared tool."""
    name: str = tool["function"]["name"]
    return name


def _message(message: Any, where: str, control_tokens: Collection[str]) -> dict[str, Any]:
    if not isinstance(message, Mapping):
        raise _mistyped(where, "an object with role and content", message, "messages")
    role = message.get("role")
    if not isinstance(role, str) or not _ROLE.fullmatch(role):
        legal = "a name such as user, system or assistant"
        raise ParameterError(f"{where}.role must be {legal}, got {reprlib.repr(role)}", "messages")
    if role not in _ROLES and any(role in token for token in control_tokens):
        raise ParameterError(f"{where}.role must not be part of a control token, got {role!r}", "messages")
    role = "tool" if role == "function" else role
    kept = {k: v for k, v in message.items() if v is not None and k not in _REWRITTEN} | {"role": role}
    content = _content(message.get("content"), role, where)
    _check_id(message.get("tool_call_id"), f"{where}.tool_call_id")
    calls = _tool_calls(message, where)
    kept["content"] = content if calls or content is not None else ""
    if role == "assistant":
        kept |= _thought(kept, where)
    return kept | {"tool_calls": calls} if calls else kept


def _thought(message: Mapping[str, Any], where: str) -> dict[str, str]:
    """Under both of its names, for templates read one or the other."""
    given = {name: message[name] for name in _THOUGHTS if name in message}
    for name, thought in given.items():
        if not isinstance(thought, str):
            raise _mistyped(f"{where}.{name}", "a string", thought, "messages")
    return {name: next(iter(given.values())) for name in _THOUGHTS if given}


def _content(content: Any, role: str, where: str) -> Any:
    if content is None or isinstance(content, str):
        return content
    if isinstance(content, list | tuple):
        if role in TOOL_ROLES and not all(isinstance(p, Mapping) and "type" in p for p in content):
            return list(content)
        return "".join(_part(part, f"{where}.content[{j}]") for j, part in enumerate(content))
    if isinstance(content, Mapping) and role in TOOL_ROLES:
        return dict(content)
    raise _mistyped(f"{where}.content", "a string or a list of text parts", content, "messages")


def _part(part: Any, where: str) -> str:
    if isinstance(part, str):
        return part
    if not isinstance(part, Mapping):
        raise _mistyped(where, "a text part", part, "messages")
    kind = part.get("type")
    if not isinstance(kind, str) or kind not in _TEXT_PARTS:
        raise ParameterError(f"{where} is of type {kind!r}: this model takes text only", "messages")
    text = part.get(_TEXT_PARTS[kind])
    if not isinstance(text, str):
        raise _mistyped(f"{where}.{_TEXT_PARTS[kind]}", "a string", text, "messages")
    return text


def _tool_calls(message: Mapping[str, Any], where: str) -> list[dict[str, Any]]:
    calls, old = message.get("tool_calls"), message.get("function_call")
    if calls is None:
        return [] if old is None else [_tool_call({"function": old}, f"{where}.function_call")]
    if old is not None:
        raise ParameterError(f"{where} has both tool_calls and function_call: give one of them", "messages")
    if not isinstance(calls, list | tuple):
        raise _mistyped(f"{where}.tool_calls", "a list", calls, "messages")
    return [_tool_call(call, f"{where}.tool_calls[{j}]") for j, call in enumerate(calls)]


def _tool_call(call: Any, where: str) -> dict[str, Any]:
    if not isinstance(call, Mapping):
        raise _mistyped(where, "an object", call, "messages")
    nested = "function" in call
    function = call["function"] if nested else call
    if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
        raise ParameterError(f"{where} must name its function", "messages")
    _check_id(call.get("id"), f"{where}.id")
    arguments = function.get("arguments")
    if not isinstance(arguments, Mapping | str | None):
        raise _mistyped(f"{where}: arguments", "an object or its JSON text", arguments, "messages")
    outer = {k: v for k, v in call.items() if nested or k in ("id", "type")}
    inner = dict(function) if nested else {"name": function["name"]}
    return {"type": "function"} | outer | {"function": inner | {"arguments": arguments or {}}}


def _check_id(value: Any, where: str) -> None:
    """Of a call. Numbers pass, as they do in templates."""
    if not isinstance(value, str | int | None):
        raise _mistyped(where, "a string", value, "messages")


def _tool(tool: Any, where: str) -> dict[str, Any]:
    if not isinstance(tool, Mapping):
        raise _mistyped(where, "an object", tool, "tools")
    nested = "function" in tool
    function = tool["function"] if nested else {k: v for k, v in tool.items() if k != "type"}
    if not is_one_of(kind := tool.get("type", "function"), ("function",)):
        raise ParameterError(f"{where}.type must be 'function', got {reprlib.repr(kind)}", "tools")
    if not isinstance(function, Mapping) or not isinstance(function.get("name"), str) or not function["name"]:
        raise ParameterError(f"{where} must name its function", "tools")
    if not isinstance(function.get("parameters"), Mapping | None):
        raise _mistyped(f"{where}: parameters", "a JSON schema", function["parameters"], "tools")
    if not isinstance(function.get("strict"), bool | None):
        raise _mistyped(f"{where}: strict", "true or false", function["strict"], "tools")
    return dict(tool) if nested else {"type": "function", "function": function}


def _mistyped(where: str, legal: str, value: Any, param: str) -> ParameterError:
    return ParameterError(f"{where} must be {legal}, got {type(value).__name__}", param)
