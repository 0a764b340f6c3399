"""What we write ourselves: Llama 3.1's chat format for checkpoints without a template, and tools for templates that
do not know them.

The format is that of Meta's reference code: no trimming, no system message of its own, no dates, and `<|eom_id|>`
after a message that expects a tool's result. Calls of Meta's own tools start with `<|python_tag|>`, as its
documentation says and its code does not.
"""

import json
from collections.abc import Mapping, Sequence
from typing import Any

from llama.api.errors import ParameterError
from llama.text.chat.calls import CallForm, as_text, with_calls

REQUIRED_TOKENS = ("<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>", "<|eom_id|>")
_SEARCH_TOOLS = frozenset({"brave_search", "wolfram_alpha", "photogen"})
_HEADERS = {"tool": "ipython", "developer": "system"}


def render_llama(messages: Sequence[dict[str, Any]], add_generation_prompt: bool) -> str:
    """Prepared messages in Llama 3.1's format. `stop` ("eom" or "eot") of an assistant's message overrides its end."""
    parts = ["<|begin_of_text|>"]
    for message in with_calls(messages, CallForm(takes_null=False)):
        calls = message.get("tool_calls", ())
        expects_result = message.get("stop", "eom" if calls else "eot") == "eom"
        parts += [
            _header(message["role"]),
            "<|python_tag|>" if calls and _builtin_call(calls[0]) is not None else "",
            as_text(message["content"]),
            "; ".join(map(_call, calls)),
            "<|eom_id|>" if message["role"] == "assistant" and expects_result else "<|eot_id|>",
        ]
    if add_generation_prompt:
        parts.append(_header("assistant"))
    return "".join(parts)


def with_tools_in_text(messages: list[dict[str, Any]], tools: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The messages with the tools told at the start of the first user message."""
    first = next((i for i, message in enumerate(messages) if message["role"] == "user"), None)
    if first is None:
        raise ParameterError("tools need a user message that they can be put into", "tools")
    listed = "".join(json.dumps(tool, indent=4, ensure_ascii=False) + "\n\n" for tool in tools)
    preamble = (
        "You can call the following functions. If one of them helps to answer the request below, reply with nothing "
        'but a JSON object of the form {"name": function name, "parameters": {argument name: value}}, '
        f"without variables.\n\n{listed}"
    )
    told = {**messages[first], "content": preamble + messages[first]["content"]}
    return [*messages[:first], told, *messages[first + 1 :]]


def _header(role: str) -> str:
    return f"<|start_header_id|>{_HEADERS.get(role, role)}<|end_header_id|>\n\n"


def _builtin_call(call: Mapping[str, Any]) -> str | None:
    """Meta's own spelling of a call to one of its own tools."""
    name, arguments = call["function"]["name"], call["function"]["arguments"]
    if not isinstance(arguments, dict):
        return None
    if name in _SEARCH_TOOLS and arguments.keys() == {"query"} and isinstance(arguments["query"], str):
        return f"{name}.call(query={json.dumps(arguments['query'], ensure_ascii=False)})"
    if name == "code_interpreter" and arguments.keys() == {"code"} and isinstance(arguments["code"], str):
        return str(arguments["code"])
    return None


def _call(call: Mapping[str, Any]) -> str:
    function = call["function"]
    builtin = _builtin_call(call)
    if builtin is not None:
        return builtin
    return json.dumps({"type": "function", "name": function["name"], "parameters": function["arguments"]})
