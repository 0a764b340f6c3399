"""The bodies of OpenAI's routes. A field that is null counts as absent, as OpenAI's clients send it.

Types and sizes are checked here; ranges of sampling parameters where SamplingParams is made. A field that is not here
is refused by name, unless its value changes nothing: what a server silently leaves out, its client believes it got.
"""

from types import MappingProxyType
from typing import Annotated, Any, ClassVar, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, PlainValidator, WithJsonSchema, model_validator
from pydantic_core import PydanticKnownError

from llama.api.neutral import CHAT, COMPLETION, Neutral, is_neutral
from llama.server.fields import (
    MAX_BIASES,
    MAX_COMPLETIONS,
    MAX_MESSAGES,
    MAX_PROMPTS,
    MAX_STOP_CHARACTERS,
    MAX_STOPS,
    MAX_TOOLS,
    STRICT,
    Integer,
    Number,
    Seed,
    refusal,
)

MAX_STOP_IDS = MAX_BAD_WORDS = 128
MAX_ALLOWED_IDS = 1 << 18


def _stop(value: Any) -> tuple[str, ...] | None:
    if value is None:
        return None
    texts = [value] if isinstance(value, str) else value
    if not isinstance(texts, list) or not all(isinstance(text, str) for text in texts):
        raise refusal("must be a string or an array of strings")
    if len(texts) > MAX_STOPS or not all(0 < len(text) <= MAX_STOP_CHARACTERS for text in texts):
        raise refusal(f"must hold <= {MAX_STOPS} strings of 1 to {MAX_STOP_CHARACTERS} characters")
    return tuple(texts)


def _not_too_many(value: Any) -> Any:
    """Checked before the values, each of which would be an error of its own."""
    if isinstance(value, dict) and len(value) > MAX_BIASES:
        context = {"field_type": "Dictionary", "max_length": MAX_BIASES, "actual_length": len(value)}
        raise PydanticKnownError("too_long", context)
    return value


def _prompts(value: Any) -> list[str | list[int]]:
    """Every form of `prompt` as a list of prompts: text, or token ids."""
    listed = [value] if isinstance(value, str) or _is_ids(value) else value
    legal = "must be a string, an array of token ids, or an array of either"
    if not isinstance(listed, list):
        raise refusal(legal)
    for i, each in enumerate(listed):
        if not (isinstance(each, str) or _is_ids(each)):
            raise refusal(f"{legal}: its entry {i} is neither")
    if not 0 < len(listed) <= MAX_PROMPTS:
        raise refusal(f"must hold 1 to {MAX_PROMPTS} prompts")
    return listed


def _no_number(value: Any) -> Any:
    """To a Literal 0 is False."""
    if isinstance(value, int | float) and not isinstance(value, bool):
        raise PydanticKnownError("bool_type")
    return value


def _is_ids(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(type(each) is int for each in value)


Stop = Annotated[
    tuple[str, ...] | None,
    PlainValidator(_stop),
    WithJsonSchema({"anyOf": [{"type": "string"}, {"type": "array", "items": {"type": "string"}}, {"type": "null"}]}),
]
Biases = Annotated[dict[str, Number], BeforeValidator(_not_too_many), Field(max_length=MAX_BIASES)]
Prompts = Annotated[
    list[str | list[int]],
    PlainValidator(_prompts),
    WithJsonSchema({"anyOf": [{"type": "string"}, {"type": "array", "items": {}}]}),
]


NO_OTHERS = ConfigDict(**{**STRICT, "extra": "forbid"})


class StreamOptions(BaseModel):
    """`continuous_usage_stats`, vLLM's: with include_usage each chunk tells the usage so far."""

    model_config = NO_OTHERS

    include_usage: bool | None = None
    continuous_usage_stats: bool | None = None
    include_obfuscation: Annotated[Literal[False] | None, BeforeValidator(_no_number)] = None


class Body(BaseModel):
    """Of any route. `neutral`: fields that are not here, at the values that change nothing."""

    model_config = NO_OTHERS
    neutral: ClassVar[Neutral] = MappingProxyType({})

    model: str | None = None

    @model_validator(mode="before")
    @classmethod
    def _without_neutral(cls, values: Any) -> Any:
        """Clients write out options that they do not use, as null or as the default."""
        if not isinstance(values, dict):
            return values
        return {
            name: value
            for name, value in values.items()
            if name in cls.model_fields or not (value is None or is_neutral(value, cls.neutral.get(name, ())))
        }


class AnsweredRequest(Body):
    """Fields that all bodies share which an answer follows."""

    stream: bool | None = None
    temperature: Number | None = None
    top_p: Number | None = None
    seed: Seed | None = None
    # Not OpenAI's; clients send them in extra_body.
    top_k: Integer | None = None
    min_p: Number | None = None
    repetition_penalty: Number | None = None
    structured_outputs: dict[str, Any] | None = None
    lora: str | None = None
    cache_salt: str | None = None
    priority: Integer | None = None
    # They change nothing about an answer.
    user: str | None = None
    metadata: dict[str, Any] | None = None
    store: bool | None = None
    service_tier: str | None = None
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None
    prompt_cache_retention: str | None = None


class CommonRequest(AnsweredRequest):
    """Fields that chat and completions share."""

    stream_options: StreamOptions | None = None
    n: Integer | None = Field(None, ge=1, le=MAX_COMPLETIONS)
    max_tokens: Integer | None = Field(None, ge=0)
    stop: Stop = None
    frequency_penalty: Number | None = None
    presence_penalty: Number | None = None
    logit_bias: Biases | None = None
    response_format: dict[str, Any] | None = None
    # Not OpenAI's.
    min_tokens: Integer | None = None
    ignore_eos: bool | None = None
    stop_token_ids: list[Integer] | None = Field(None, max_length=MAX_STOP_IDS)
    bad_words: list[Annotated[str, Field(max_length=MAX_STOP_CHARACTERS)]] | None = Field(
        None, max_length=MAX_BAD_WORDS
    )
    allowed_token_ids: list[Integer] | None = Field(None, max_length=MAX_ALLOWED_IDS)
    skip_special_tokens: bool | None = None
    truncate_prompt_tokens: Integer | None = None
    prompt_logprobs: Integer | None = Field(None, ge=-1)  # at most the engine's max_logprobs; -1 = of all tokens
    return_token_ids: bool | None = None
    return_tokens_as_token_ids: bool | None = None  # in log-probabilities
    # What structured_outputs was called before.
    guided_json: dict[str, Any] | str | None = None
    guided_regex: str | None = None
    guided_choice: list[str] | None = None
    guided_grammar: str | None = None
    include_stop_str_in_output: bool | None = None
    guided_decoding_backend: str | None = None  # changes nothing


class ChatRequest(CommonRequest):
    neutral = CHAT

    messages: list[dict[str, Any]] = Field(min_length=1, max_length=MAX_MESSAGES)
    max_tokens: Integer | None = Field(None, ge=1)
    max_completion_tokens: Integer | None = Field(None, ge=1)
    logprobs: bool | None = None
    top_logprobs: Integer | None = Field(None, ge=0)  # at most the engine's max_logprobs
    tools: list[dict[str, Any]] | None = Field(None, max_length=MAX_TOOLS)
    tool_choice: str | dict[str, Any] | None = None
    parallel_tool_calls: bool | None = None
    prediction: dict[str, Any] | None = None
    modalities: list[Literal["text"]] | None = Field(None, max_length=1)
    # vLLM's.
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None
    chat_template_kwargs: dict[str, Any] | None = None


class CompletionRequest(CommonRequest):
    neutral = COMPLETION

    prompt: Prompts
    logprobs: Integer | None = Field(None, ge=0)  # at most the engine's max_logprobs
    echo: bool | None = None
    best_of: Integer | None = Field(None, ge=1, le=MAX_COMPLETIONS)
    suffix: str | None = None
