"""tool_choice: which tools the model is shown, and the schema that its answer is held to where it must call one."""

from collections.abc import Sequence
from typing import Any

from llama.server.errors import bad_input
from llama.server.openai.answers import new_id
from llama.server.schemas.openai import ChatRequest
from llama.text.chat.prepare import prepare_tools, tool_name
from llama.text.tool_calls import ToolCall

Tools = list[dict[str, Any]]


def choose_tools(body: ChatRequest) -> tuple[Tools | None, dict[str, Any] | None]:
    """(tools to show, response_format of a call or None). Raises ApiError."""
    try:
        tools = prepare_tools(body.tools)
    except ValueError as error:
        raise bad_input(str(error), "tools") from None
    choice = body.tool_choice
    if tools is None:
        if choice not in (None, "none", "auto"):
            raise bad_input("tool_choice needs tools", "tool_choice")
        return None, None
    if choice is None or choice == "auto":
        return tools, None
    if choice == "none":
        return None, None
    if choice == "required":
        return tools, _call_format(tools)
    name = _named(choice)
    chosen = [tool for tool in tools if tool_name(tool) == name]
    if not chosen:
        raise bad_input(
            'tool_choice must be \'none\', \'auto\', \'required\' or {"type": "function", "function": {"name": ...}} '
            "with the name of a tool that was sent",
            "tool_choice",
        )
    return tools, _call_format(chosen)


def calls_of(calls: Sequence[ToolCall], body: ChatRequest, first_index: int | None = None) -> list[dict[str, Any]]:
    """Calls as OpenAI writes them; with `first_index`, as parts of a stream, where `index` says which call it is."""
    if body.parallel_tool_calls is False:
        calls = calls[: 1 - (first_index or 0)]
    listed = []
    for i, call in enumerate(calls, start=first_index or 0):
        entry = {
            "id": new_id("call"),
            "type": "function",
            "function": {"name": call.name, "arguments": call.arguments_json},
        }
        listed.append(entry if first_index is None else {"index": i, **entry})
    return listed


def _named(choice: Any) -> Any:
    if not isinstance(choice, dict) or choice.get("type") != "function":
        return None
    function = choice.get("function")
    return function.get("name") if isinstance(function, dict) else None


def _call_format(tools: Tools) -> dict[str, Any]:
    definitions: dict[str, dict[str, Any]] = {}
    calls = [_call_schema(tool["function"], definitions) for tool in tools]
    schema = calls[0] if len(calls) == 1 else {"anyOf": calls}
    return {"type": "json_schema", "json_schema": {**schema, **definitions}}


def _call_schema(function: dict[str, Any], definitions: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """The form that the model is asked for. References point to the root of a schema, so definitions move there."""
    parameters = function.get("parameters")
    if parameters is not None and not isinstance(parameters, dict):
        raise bad_input("the parameters of a tool must be a JSON schema, an object", "tools")
    parameters = dict(parameters or {"type": "object", "properties": {}, "additionalProperties": False})
    for key in ("$defs", "definitions"):
        found = parameters.pop(key, {})
        known = definitions.setdefault(key, {}) if found else {}
        if not isinstance(found, dict) or any(known.get(name, found[name]) != found[name] for name in found):
            raise bad_input(f"the {key} of the tools contradict each other", "tools")
        known.update(found)
    return {
        "type": "object",
        "properties": {"name": {"const": function["name"]}, "parameters": parameters},
        "required": ["name", "parameters"],
        "additionalProperties": False,
    }
