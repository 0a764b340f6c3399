"""The body of /v1/responses, and the chat request that it amounts to. Nothing is kept between requests.

OpenAI's clients send the items of earlier answers back as they came, with nulls and without what they do not know of.
"""

import json
import reprlib
from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, BeforeValidator, Field

from llama.api.neutral import RESPONSES
from llama.files import some_of
from llama.server.errors import bad_input
from llama.server.fields import MAX_MESSAGES, MAX_TOOLS, Integer, refusal
from llama.server.openai.schema import NO_OTHERS, AnsweredRequest, ChatRequest

_ROLES = ("user", "assistant", "system", "developer")
_TEXT_PARTS = {"input_text": "text", "output_text": "text", "text": "text", "refusal": "refusal"}
_NO_MEMORY = "this server keeps no conversations: send all items of the conversation in input"
_LOGPROBS = "message.output_text.logprobs"


# OpenAI's, of tools and pictures that are not here and of thoughts, which are told openly: they change nothing.
_EMPTY_INCLUDES = (
    "code_interpreter_call.outputs",
    "computer_call_output.output.image_url",
    "file_search_call.results",
    "message.input_image.image_url",
    "reasoning.encrypted_content",
    "web_search_call.action.sources",
    "web_search_call.results",
)


def _absent(instead: str) -> BeforeValidator:
    """Of a field that must be absent, null or false; what to do instead."""

    def check(value: Any) -> None:
        if value is not None and value is not False:  # 0 is neither
            raise refusal(f"is not supported: {instead}")

    return BeforeValidator(check)


def _include(value: str) -> str:
    if value != _LOGPROBS and value not in _EMPTY_INCLUDES:
        raise refusal(f"must be one of {', '.join(sorted((_LOGPROBS, *_EMPTY_INCLUDES)))}")
    return value


class TextOptions(BaseModel):
    model_config = NO_OTHERS

    format: dict[str, Any] | None = None
    verbosity: str | None = None  # changes nothing


class ResponsesRequest(AnsweredRequest):
    """`POST /v1/responses`."""

    neutral = RESPONSES

    input: str | list[dict[str, Any]] = Field(max_length=MAX_MESSAGES * 2**10)
    instructions: str | None = None
    max_output_tokens: Integer | None = Field(None, ge=1)
    top_logprobs: Integer | None = Field(None, ge=0)
    include: list[Annotated[str, AfterValidator(_include)]] | None = Field(None, max_length=16)
    text: TextOptions | None = None
    tools: list[dict[str, Any]] | None = Field(None, max_length=MAX_TOOLS)
    tool_choice: str | dict[str, Any] | None = None
    parallel_tool_calls: bool | None = None
    chat_template_kwargs: dict[str, Any] | None = None  # not OpenAI's
    # Memory and work behind the client's back.
    previous_response_id: Annotated[None, _absent(_NO_MEMORY)] = None
    conversation: Annotated[None, _absent(_NO_MEMORY)] = None
    prompt: Annotated[None, _absent("prompts are not stored here: send their text in instructions and input")] = None
    background: Annotated[None, _absent("read the answer as it is written, or wait for it")] = None
    # They change nothing about an answer.
    client_metadata: dict[str, Any] | None = None
    prompt_cache_options: dict[str, Any] | None = None
    reasoning: dict[str, Any] | None = None
    stream_options: dict[str, Any] | None = None
    truncation: Literal["disabled"] | None = None

    @property
    def wants_logprobs(self) -> bool:
        return bool(self.top_logprobs) or _LOGPROBS in (self.include or ())

    def chat(self) -> ChatRequest:
        """Raises ApiError that names the place."""
        tools = [_tool(tool) for tool in self.tools or () if tool.get("type") == "function"]
        tool_choice, tools = _tool_choice(self.tool_choice, tools)
        same = (*AnsweredRequest.model_fields, "parallel_tool_calls", "chat_template_kwargs")
        return ChatRequest.model_construct(
            **{name: getattr(self, name) for name in same},
            messages=_messages(self.input, self.instructions),
            max_completion_tokens=self.max_output_tokens,
            logprobs=self.wants_logprobs,
            top_logprobs=self.top_logprobs or 0 if self.wants_logprobs else None,
            tools=tools or None,
            tool_choice=tool_choice,
            response_format=None if self.text is None else _response_format(self.text.format),
        )


def _tool(tool: Mapping[str, Any]) -> dict[str, Any]:
    return {"type": "function", "function": {k: v for k, v in tool.items() if k != "type" and v is not None}}


def _tool_choice(choice: Any, tools: list[dict[str, Any]]) -> tuple[Any, list[dict[str, Any]]]:
    """As chat spells it, and the tools that are then there."""
    if not isinstance(choice, Mapping):
        return choice, tools
    if choice.get("type") == "function":
        return {"type": "function", "function": {"name": choice.get("name")}}, tools
    if choice.get("type") == "allowed_tools":
        listed = choice.get("tools")
        names = (
            [tool.get("name") for tool in listed if isinstance(tool, Mapping)] if isinstance(listed, list) else [None]
        )
        there = [tool["function"].get("name") for tool in tools]
        if unknown := [name for name in names if name not in there]:
            known = some_of(map(str, there)) or "there are none"
            told = f"allowed_tools names {reprlib.repr(unknown[0])}, which is none of tools ({known})"
            raise bad_input(f"tool_choice: {told}", "tool_choice")
        return choice.get("mode", "auto"), [tool for tool in tools if tool["function"].get("name") in names]
    raise bad_input(f"tool_choice of type {choice.get('type')!r} is not supported", "tool_choice")


def _response_format(wanted: Mapping[str, Any] | None) -> dict[str, Any] | None:
    if wanted is None or wanted.get("type") != "json_schema":
        return None if wanted is None else dict(wanted)
    return {"type": "json_schema", "json_schema": {k: v for k, v in wanted.items() if k != "type" and v is not None}}


# Items to messages


def _messages(items: str | list[dict[str, Any]], instructions: str | None) -> list[dict[str, Any]]:
    messages = [] if instructions is None else [{"role": "system", "content": instructions}]
    if isinstance(items, str):
        return [*messages, {"role": "user", "content": items}]
    for i, item in enumerate(items):
        _add(messages, item, f"input[{i}]")
    if not messages:
        raise bad_input("input must hold at least one item", "input")
    if len(messages) > MAX_MESSAGES:
        raise bad_input(f"input must hold <= {MAX_MESSAGES} messages", "input")
    return messages


def _add(messages: list[dict[str, Any]], item: Mapping[str, Any], where: str) -> None:
    """Put one item behind the messages; thought, text and calls of one turn become one message."""
    kind = item.get("type") or "message"
    if kind == "message":
        role = item.get("role")
        if role not in _ROLES:
            raise bad_input(f"{where}.role must be one of {', '.join(_ROLES)}, got {role!r}"[:200], "input")
        text = _text(item.get("content"), f"{where}.content")
        if role != "assistant":
            messages.append({"role": role, "content": text})
            return
        turn = _turn(messages, "content")
        turn["content"] = text if turn["content"] is None else f"{turn['content']}\n{text}"
    elif kind == "reasoning":
        held = "content" if item.get("content") else "summary"
        parts = item.get(held) or []
        if not isinstance(parts, list):
            raise bad_input(f"{where}.{held} must be a list of parts, got {parts!r}"[:200], "input")
        thought = "".join(str(part.get("text", "")) for part in parts if isinstance(part, Mapping))
        if thought:
            _turn(messages, "reasoning_content")["reasoning_content"] = thought
    elif kind == "function_call":
        name, arguments = item.get("name"), item.get("arguments")
        if not isinstance(name, str) or not isinstance(item.get("call_id"), str):
            raise bad_input(f"{where} must have a name and a call_id", "input")
        function = {"name": name, "arguments": arguments if isinstance(arguments, str) else json.dumps(arguments or {})}
        call = {"id": item["call_id"], "type": "function", "function": function}
        _turn(messages, "tool_calls").setdefault("tool_calls", []).append(call)
    elif kind == "function_call_output":
        content = _text(item.get("output"), f"{where}.output")
        messages.append({"role": "tool", "tool_call_id": str(item.get("call_id", "")), "content": content})
    elif kind == "item_reference":
        raise bad_input(f"{where} refers to an item of an earlier answer; {_NO_MEMORY} (store: false)", "input")
    else:
        raise bad_input(f"{where} is of type {str(kind)[:40]!r}, which is not supported", "input")


def _turn(messages: list[dict[str, Any]], adds: str) -> dict[str, Any]:
    """The assistant's turn that something is added to: the last message, unless that is complete before it."""
    last = messages[-1] if messages else {}
    if last.get("role") == "assistant":
        is_before = {
            "reasoning_content": False,
            "content": last["content"] is None or "tool_calls" in last,
            "tool_calls": True,
        }
        if is_before[adds]:
            return last
    messages.append({"role": "assistant", "content": None})
    return messages[-1]


def _text(content: Any, where: str) -> str:
    if isinstance(content, str):
        return content
    if not isinstance(content, list):
        raise bad_input(f"{where} must be a string or an array of text parts", "input")
    texts = []
    for j, part in enumerate(content):
        kind = part.get("type") if isinstance(part, Mapping) else None
        key = _TEXT_PARTS.get(kind) if isinstance(kind, str) else None
        if key is None:
            raise bad_input(f"{where}[{j}] is of type {str(kind)[:40]!r}: this model takes text only", "input")
        if not isinstance(part.get(key), str):
            raise bad_input(f"{where}[{j}].{key} must be a string", "input")
        texts.append(part[key])
    return "".join(texts)
