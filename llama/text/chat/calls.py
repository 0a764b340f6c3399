"""Tool calls and their results in the form that a template reads."""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from llama.text.chat.prepare import TOOL_ROLES

Message = dict[str, Any]

_SHORT_ID = 9  # characters: what Mistral's templates accept


@dataclass(frozen=True, slots=True)
class CallForm:
    """`arguments` "in_text": the calls stand in the content. `takes_*`: what the content beside a call may be; text
    that is not taken gets a turn of its own before the call's."""

    arguments: str = "object"  # or "text", or "in_text"
    result_role: str = "tool"  # or "ipython", or "user"
    short_ids: bool = False
    one_per_turn: bool = False
    takes_null: bool = True
    takes_empty: bool = True
    takes_text: bool = True
    takes_objects: bool = True  # as results


def with_calls(messages: Sequence[Message], form: CallForm) -> list[Message]:
    """The messages with their calls and results in this form."""
    names: dict[Any, str] = {}  # of the tool, by the call's id
    listed: list[Message] = []
    for message in one_call_per_turn(messages) if form.one_per_turn else messages:
        if "tool_calls" in message:
            names |= {call.get("id"): call["function"]["name"] for call in message["tool_calls"]}
            listed += _turns(message, form)
        elif message["role"] in TOOL_ROLES:
            listed.append(_result(message, form, names))
        else:
            listed.append(message)
    return _merged(listed) if form.result_role == "user" else listed


def one_call_per_turn(messages: Sequence[Message]) -> list[Message]:
    """Several calls of one turn become turns of one call, each followed by its result."""
    listed: list[Message] = []
    rest = list(messages)
    while rest:
        message = rest.pop(0)
        calls = message.get("tool_calls", ())
        if len(calls) < 2:
            listed.append(message)
            continue
        count = next((i for i, other in enumerate(rest) if other["role"] not in TOOL_ROLES), len(rest))
        results, rest = rest[:count], rest[count:]
        ids = {call.get("id") for call in calls}
        for i, call in enumerate(calls):
            listed.append(message | {"tool_calls": [call], "content": message["content"] if i == 0 else None})
            known = (r for r in results if r.get("tool_call_id") == call.get("id") is not None)
            unknown = (r for r in results if r.get("tool_call_id") not in ids - {None})
            if (result := next(known, None) or next(unknown, None)) is not None:
                results.remove(result)
                listed.append(result)
        listed += results
    return listed


def arguments_as_object(arguments: Any) -> Any:
    """Text that spells no object stays as it is: it is what the model once wrote."""
    if not isinstance(arguments, str):
        return arguments
    try:
        parsed = json.loads(arguments)
    except (ValueError, RecursionError):
        return arguments
    return parsed if isinstance(parsed, dict) else arguments


def as_text(content: Any) -> str:
    """Text as it is, anything else as JSON."""
    return content if isinstance(content, str) else json.dumps(content, ensure_ascii=False)


def _turns(message: Message, form: CallForm) -> list[Message]:
    """An assistant's message that calls tools."""
    content, calls = message["content"], [_call(call, form) for call in message["tool_calls"]]
    if form.arguments == "in_text":
        functions = [call["function"] for call in calls]
        lines = [as_text({"name": f["name"], "parameters": f["arguments"]}) for f in functions]
        told = {k: v for k, v in message.items() if k != "tool_calls"}
        return [told | {"content": "\n".join([content, *lines] if content else lines)}]
    if content and not form.takes_text:
        said = {k: v for k, v in message.items() if k != "tool_calls"}
        return [said, *_turns(message | {"content": None}, form)]
    if not content:
        content = None if (content is None and form.takes_null) or not form.takes_empty else ""
    return [message | {"content": content, "tool_calls": calls}]


def _call(call: Mapping[str, Any], form: CallForm) -> dict[str, Any]:
    arguments = call["function"]["arguments"]
    arguments = as_text(arguments) if form.arguments == "text" else arguments_as_object(arguments)
    changed: dict[str, Any] = {"function": {**call["function"], "arguments": arguments}}
    if form.short_ids:
        changed["id"] = _shortened(call.get("id"))
    return {**call, **changed}


def _result(message: Message, form: CallForm, names: Mapping[Any, str]) -> Message:
    content = message["content"]
    if form.result_role == "user":
        name = message.get("name", names.get(message.get("tool_call_id")))
        return {"role": "user", "content": f"Result of {name}: {as_text(content)}" if name else as_text(content)}
    changed: dict[str, Any] = {"content": content if form.takes_objects else as_text(content)}
    if message["role"] == "tool":
        changed["role"] = form.result_role
    if form.short_ids:
        changed["tool_call_id"] = _shortened(message.get("tool_call_id"))
    return message | changed


def _shortened(call_id: Any) -> str:
    return hashlib.sha256(str(call_id).encode()).hexdigest()[:_SHORT_ID]


def _merged(messages: Sequence[Message]) -> list[Message]:
    """Templates without a role for results want users and assistants to take turns."""
    listed: list[Message] = []
    for message in messages:
        if listed and message["role"] == listed[-1]["role"] == "user":
            listed[-1] = listed[-1] | {"content": f"{listed[-1]['content']}\n{message['content']}"}
        else:
            listed.append(message)
    return listed
