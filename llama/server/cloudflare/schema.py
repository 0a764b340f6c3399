"""The body of Cloudflare's route. Unknown fields are ignored; an explicit null is an error.

Defaults and ranges are those of the published schema; see the parameter table in docs/http.md.
"""

from typing import Annotated, Any, Literal

from pydantic import BaseModel, Field, PlainValidator, WithJsonSchema

from llama.server.fields import MAX_MESSAGES, MAX_TOOLS, STRICT, Integer, Number, json_types, refusal

MAX_CONTENT = 131_072  # characters


def _content(value: Any) -> Any:
    """Text, text parts, or null (beside tool calls)."""
    if value is None or isinstance(value, str):
        length = len(value or "")
    elif isinstance(value, list):
        if not all(map(_is_text_part, value)):
            raise refusal('must be a string or an array of {"type": "text", "text": string}')
        length = sum(len(part["text"]) for part in value)
    else:
        raise refusal('must be a string or an array of {"type": "text", "text": string}')
    if length > MAX_CONTENT:
        raise refusal(f"must have <= {MAX_CONTENT} characters")
    return value


def _is_text_part(part: Any) -> bool:
    return isinstance(part, dict) and part.get("type") == "text" and isinstance(part.get("text"), str)


Content = Annotated[
    Any,
    PlainValidator(_content),
    WithJsonSchema(
        {
            "anyOf": [
                {"type": "string", "maxLength": MAX_CONTENT},
                {
                    "type": "array",
                    "items": {
                        "type": "object",
                        "properties": {"type": {"const": "text"}, "text": {"type": "string"}},
                        "required": ["type", "text"],
                    },
                },
                {"type": "null"},
            ]
        }
    ),
]


def _tool_choice(value: Any) -> Any:
    """As the library takes it. A tool may be named by its name alone."""
    if isinstance(value, str) and value not in ("auto", "none", "required"):
        return {"type": "function", "function": {"name": value}}
    if not isinstance(value, str | dict):
        raise refusal(f"must be a string or an object, not {json_types(value)}")
    return value


ToolChoice = Annotated[
    Any,
    PlainValidator(_tool_choice),
    WithJsonSchema({"anyOf": [{"type": "string"}, {"type": "object"}], "default": "auto"}),
]


class Message(BaseModel):
    """Further fields (tool_calls, name, tool_call_id) go to the chat template, which checks those that it reads."""

    model_config = {**STRICT, "extra": "allow"}

    role: str
    content: Content = None


class ResponseFormat(BaseModel):
    model_config = STRICT

    type: Literal["json_object", "json_schema"]
    json_schema: dict[str, Any] = Field(default_factory=dict)


def _absent(schema: dict[str, Any]) -> None:
    """A default that stands for no value is none that a client could send."""
    del schema["default"]


class RunRequest(BaseModel):
    """`POST .../ai/run/{model}`. `model_fields_set` holds the fields that the request names."""

    model_config = STRICT

    messages: list[Message] = Field(default_factory=list, min_length=1, max_length=MAX_MESSAGES)
    prompt: str = Field("", min_length=1, max_length=MAX_CONTENT, json_schema_extra=_absent)
    raw: bool = False
    stream: bool = False
    max_tokens: Integer = Field(256, ge=1)
    temperature: Number = Field(0.6, ge=0, le=5)
    top_p: Number = Field(1.0, ge=0, le=2)
    top_k: Integer = Field(0, ge=1, le=50, json_schema_extra=_absent)
    seed: Integer = Field(0, ge=1, le=9_999_999_999, json_schema_extra=_absent)
    repetition_penalty: Number = Field(1.0, ge=0, le=2)
    frequency_penalty: Number = Field(0.0, ge=-2, le=2)
    presence_penalty: Number = Field(0.0, ge=-2, le=2)
    lora: str = Field("", json_schema_extra=_absent)
    tools: list[dict[str, Any]] = Field(default_factory=list, max_length=MAX_TOOLS)
    tool_choice: ToolChoice = "auto"
    functions: list[Any] = Field(default_factory=list, max_length=MAX_TOOLS)
    image: Any = Field(None, json_schema_extra=_absent)
    response_format: ResponseFormat = Field(None, json_schema_extra=_absent)  # type: ignore[assignment]
    guided_json: dict[str, Any] = Field(default_factory=dict)
