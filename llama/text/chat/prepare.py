"""Messages and tools as templates expect them, whatever of the usual spellings they came in.

Parts become one text, null content the empty text, string arguments the object they spell, flat tools and tool calls
the nested form; an empty list of tools or tool calls counts as none. What cannot be meant is refused by its place.
"""

import json
import re
from collections.abc import Collection, Mapping, Sequence
from typing import Any

_ROLE = re.compile(r"[A-Za-z][A-Za-z0-9_-]{0,63}")
_ROLES = frozenset({"system", "developer", "user", "assistant", "tool", "ipython"})
_TOOL_ROLES = frozenset({"tool", "ipython"})


def prepare_messages(messages: Any, control_tokens: Collection[str] = ()) -> list[dict[str, Any]]:
    """Copies of the messages. A role must not complete a control token such as `<|ROLE|>`."""
    if not isinstance(messages, Sequence) or isinstance(messages, str) or not messages:
        raise ValueError("messages must be a list of at least one message")
    prepared = []
    for i, message in enumerate(messages):
        where = f"messages[{i}]"
        if not isinstance(message, Mapping):
            raise ValueError(f"{where} must be an object with role and content, got {type(message).__name__}")
        role = message.get("role")
        if not isinstance(role, str) or not _ROLE.fullmatch(role):
            raise ValueError(f"{where}.role must be a name such as user, system or assistant, got {role!r}")
        if role not in _ROLES and any(role in token for token in control_tokens):
            raise ValueError(f"{where}.role must not be part of a control token, got {role!r}")
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
        raise ValueError(f"tools must be a list, got {type(tools).__name__}")
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
    raise ValueError(f"{where}.content must be a string or a list of text parts, got {type(content).__name__}")


def _part(part: Any, where: str) -> str:
    if isinstance(part, str):
        return part
    if not isinstance(part, Mapping):
        raise ValueError(f"{where} must be a text part, got {type(part).__name__}")
    if part.get("type") != "text":
        raise ValueError(f"{where} is of type {part.get('type')!r}: this model takes text only")
    if not isinstance(part.get("text"), str):
        raise ValueError(f"{where}.text must be a string, got {type(part.get('text')).__name__}")
    return str(part["text"])


def _tool_calls(calls: Any, where: str) -> list[dict[str, Any]]:
    if calls is None:
        return []
    if not isinstance(calls, list | tuple):
        raise ValueError(f"{where}.tool_calls must be a list, got {type(calls).__name__}")
    return [_tool_call(call, f"{where}.tool_calls[{j}]") for j, call in enumerate(calls)]


def _tool_call(call: Any, where: str) -> dict[str, Any]:
    if not isinstance(call, Mapping):
        raise ValueError(f"{where} must be an object, got {type(call).__name__}")
    nested = "function" in call
    function = call["function"] if nested else call
    if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
        raise ValueError(f"{where} must name its function")
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
        raise ValueError(f"{where}: arguments must be an object or its JSON text, got {type(arguments).__name__}")
    return dict(arguments)


def _tool(tool: Any, where: str) -> dict[str, Any]:
    if not isinstance(tool, Mapping):
        raise ValueError(f"{where} must be an object, got {type(tool).__name__}")
    nested = "function" in tool
    function = tool["function"] if nested else {k: v for k, v in tool.items() if k != "type"}
    if tool.get("type", "function") != "function":
        raise ValueError(f"{where}.type must be 'function', got {tool['type']!r}")
    if not isinstance(function, Mapping) or not isinstance(function.get("name"), str) or not function["name"]:
        raise ValueError(f"{where} must name its function")
    if not isinstance(function.get("parameters"), Mapping | None):
        raise ValueError(f"{where}: parameters must be a JSON schema, got {type(function['parameters']).__name__}")
    return dict(tool) if nested else {"type": "function", "function": function}
