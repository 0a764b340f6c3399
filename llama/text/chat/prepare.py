"""Messages and tools as templates expect them, whatever of the usual spellings they came in.

Parts become one text, null content the empty text, string arguments the object they spell, flat tools and tool calls
the nested form; an empty list of tools or tool calls counts as none. What cannot be meant is refused by its place.
"""

import json
import re
from collections.abc import Collection, Mapping, Sequence
from typing import Any

from llama.api.errors import ParameterError

_ROLE = re.compile(r"[A-Za-z][A-Za-z0-9_-]{0,63}")
_ROLES = frozenset({"system", "developer", "user", "assistant", "tool", "ipython"})
_TOOL_ROLES = frozenset({"tool", "ipython"})


def prepare_messages(messages: Any, control_tokens: Collection[str] = ()) -> list[dict[str, Any]]:
    """Copies of the messages. A role must not complete a control token such as `<|ROLE|>`."""
    if not isinstance(messages, Sequence) or isinstance(messages, str) or not messages:
        raise ParameterError("messages must be a list of at least one message", "messages")
    prepared = []
    for i, message in enumerate(messages):
        where = f"messages[{i}]"
        if not isinstance(message, Mapping):
            raise _mistyped(where, "an object with role and content", message, "messages")
        role = message.get("role")
        if not isinstance(role, str) or not _ROLE.fullmatch(role):
            legal = "a name such as user, system or assistant"
            raise ParameterError(f"{where}.role must be {legal}, got {role!r}", "messages")
        if role not in _ROLES and any(role in token for token in control_tokens):
            raise ParameterError(f"{where}.role must not be part of a control token, got {role!r}", "messages")
        kept = {k: v for k, v in message.items() if v is not None and k not in ("content", "tool_calls")}
        kept["content"] = _content(message.get("content"), role, where)
        if calls := _tool_calls(message.get("tool_calls"), where):
            kept["tool_calls"] = calls
        prepared.append(kept)
    return prepared


def prepare_tools(tools: Any) -> list[dict[str, Any]] | None:
    """Each tool as {"type": "function", "function": {"name", ...}}; None for none."""
    if tools is None:
        return None
    if not isinstance(tools, Sequence) or isinstance(tools, str):
        raise _mistyped("tools", "a list", tools, "tools")
    return [_tool(tool, f"tools[{i}]") for i, tool in enumerate(tools)] or None


def tool_name(tool: Mapping[str, Any]) -> str:
    """The name of a prepared tool."""
    name: str = tool["function"]["name"]
    return name


def _content(content: Any, role: str, where: str) -> Any:
    if content is None:
        return ""
    if isinstance(content, str):
        return content
    if isinstance(content, list | tuple):
        if role in _TOOL_ROLES and not all(isinstance(p, Mapping) and "type" in p for p in content):
            return list(content)
        return "".join(_part(part, f"{where}.content[{j}]") for j, part in enumerate(content))
    if isinstance(content, Mapping) and role in _TOOL_ROLES:
        return dict(content)
    raise _mistyped(f"{where}.content", "a string or a list of text parts", content, "messages")


def _part(part: Any, where: str) -> str:
    if isinstance(part, str):
        return part
    if not isinstance(part, Mapping):
        raise _mistyped(where, "a text part", part, "messages")
    if part.get("type") != "text":
        raise ParameterError(f"{where} is of type {part.get('type')!r}: this model takes text only", "messages")
    if not isinstance(part.get("text"), str):
        raise _mistyped(f"{where}.text", "a string", part.get("text"), "messages")
    return str(part["text"])


def _tool_calls(calls: Any, where: str) -> list[dict[str, Any]]:
    if calls is None:
        return []
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
    outer = {k: v for k, v in call.items() if nested or k in ("id", "type")}
    inner = dict(function) if nested else {"name": function["name"]}
    inner["arguments"] = _arguments(function.get("arguments"), where)
    return ({} if nested else {"type": "function"}) | outer | {"function": inner}


def _arguments(arguments: Any, where: str) -> Any:
    """The object; text that spells none stays as it is, for it is what the model once wrote."""
    if arguments is None or arguments == "":
        return {}
    if isinstance(arguments, str):
        try:
            parsed = json.loads(arguments)
        except (ValueError, RecursionError):
            return arguments
        return parsed if isinstance(parsed, dict) else arguments
    if not isinstance(arguments, Mapping):
        raise _mistyped(f"{where}: arguments", "an object or its JSON text", arguments, "messages")
    return dict(arguments)


def _tool(tool: Any, where: str) -> dict[str, Any]:
    if not isinstance(tool, Mapping):
        raise _mistyped(where, "an object", tool, "tools")
    nested = "function" in tool
    function = tool["function"] if nested else {k: v for k, v in tool.items() if k != "type"}
    if tool.get("type", "function") != "function":
        raise ParameterError(f"{where}.type must be 'function', got {tool['type']!r}", "tools")
    if not isinstance(function, Mapping) or not isinstance(function.get("name"), str) or not function["name"]:
        raise ParameterError(f"{where} must name its function", "tools")
    if not isinstance(function.get("parameters"), Mapping | None):
        raise _mistyped(f"{where}: parameters", "a JSON schema", function["parameters"], "tools")
    return dict(tool) if nested else {"type": "function", "function": function}


def _mistyped(where: str, legal: str, value: Any, param: str) -> ParameterError:
    return ParameterError(f"{where} must be {legal}, got {type(value).__name__}", param)
