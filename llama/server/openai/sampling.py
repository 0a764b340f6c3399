"""SamplingParams from an OpenAI request: its fields over the checkpoint's defaults."""

from typing import Any

from llama.api.errors import ParameterError
from llama.api.params import SamplingParams, over_defaults
from llama.async_llm.async_llm import Stream
from llama.server.errors import bad_input
from llama.server.openai.schema import CommonRequest
from llama.server.service import Service, Submit

_SAME = (
    "n",
    "temperature",
    "top_p",
    "seed",
    "frequency_penalty",
    "presence_penalty",
    "top_k",
    "min_p",
    "min_tokens",
    "repetition_penalty",
    "ignore_eos",
    "stop",
    "stop_token_ids",
    "include_stop_str_in_output",
    "bad_words",
    "allowed_token_ids",
    "skip_special_tokens",
    "truncate_prompt_tokens",
    "prompt_logprobs",
    "cache_salt",
    "priority",
)


def sampling_params(body: CommonRequest, defaults: SamplingParams, **wanted: Any) -> SamplingParams:
    """`wanted`: fields that the endpoint decides. Raises ApiError that names the parameter."""
    if body.stream_options is not None and not body.stream:
        raise bad_input("stream_options needs stream", "stream_options")
    if body.prompt_logprobs is not None and body.stream:
        raise bad_input("prompt_logprobs needs stream=false: a stream has no place for them", "prompt_logprobs")
    given = {name: getattr(body, name) for name in _SAME if getattr(body, name) is not None}
    given |= {"logit_bias": _bias(body), **wanted}
    given |= {"response_format": body.response_format, "structured_outputs": _structured_outputs(body)}
    try:
        return over_defaults(defaults, given)
    except ParameterError as error:
        _name_as_sent(error, body)
        raise bad_input(str(error), error.param) from None


def blamed_as_sent(submit: Submit, body: CommonRequest) -> Submit:
    """What only `submit` finds wrong with structured_outputs is told of the older name by which the request says it."""

    async def submitted(**more: Any) -> Stream:
        try:
            return await submit(**more)
        except ParameterError as error:
            _name_as_sent(error, body)
            raise

    return submitted if _older_names(body) else submit


def check_logprobs(name: str, asked: int | None, service: Service) -> None:
    """Raises ApiError for more than the engine gives."""
    most = service.llm.llm.engine.config.max_logprobs
    if asked is not None and asked > most != -1:
        raise bad_input(f"'/{name}' must be <= {most}", name)


def _structured_outputs(body: CommonRequest) -> dict[str, Any] | None:
    """With what the older names ask for. Two constraints are refused, where StructuredOutputsParams is made too."""
    wanted, older = dict(body.structured_outputs or {}), _older_names(body)
    for kind, name in older.items():
        if wanted.get(kind) is not None:
            raise bad_input(f"{name} and structured_outputs.{kind} say the same thing: give one of them", name)
    if len(older) > 1 and not wanted:
        first, second, *_ = older.values()
        raise bad_input(f"{first} and {second} both constrain the answer: give one of them", second)
    wanted |= {kind: getattr(body, name) for kind, name in older.items()}
    return wanted if wanted or body.structured_outputs is not None else None


def _older_names(body: CommonRequest) -> dict[str, str]:
    """Those that the request has, by what they are called in structured_outputs."""
    names = {kind: f"guided_{kind}" for kind in ("json", "regex", "choice", "grammar")}
    return {kind: name for kind, name in names.items() if getattr(body, name) is not None}


def _name_as_sent(error: ParameterError, body: CommonRequest) -> None:
    if error.param != "structured_outputs":
        return
    message = str(error)
    said = message.removeprefix(error.param)
    for kind, name in _older_names(body).items():
        if said.startswith(f".{kind}") or body.structured_outputs is None:
            error.args = (message if said == message else name + said.removeprefix(f".{kind}"),)
            error.param = name
            return


def _bias(body: CommonRequest) -> dict[int, float] | None:
    if body.logit_bias is None:
        return None
    for token in body.logit_bias:
        if not (token.isascii() and token.isdecimal() and len(token) < 10):
            raise bad_input(f"logit_bias must map token ids to numbers, got the key '{token[:20]}'", "logit_bias")
    return {int(token): bias for token, bias in body.logit_bias.items()}
