"""SamplingParams from an OpenAI request: its fields over the checkpoint's defaults."""

from typing import Any

from llama.api.errors import ParameterError
from llama.api.params import SamplingParams, over_defaults
from llama.server.errors import bad_input
from llama.server.openai.schema import CommonRequest
from llama.server.service import Service

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
)


def sampling_params(body: CommonRequest, defaults: SamplingParams, **wanted: Any) -> SamplingParams:
    """`wanted`: fields that the endpoint decides. Raises ApiError that names the parameter."""
    if body.stream_options is not None and not body.stream:
        raise bad_input("stream_options needs stream", "stream_options")
    given = {name: getattr(body, name) for name in _SAME if getattr(body, name) is not None}
    given |= {"logit_bias": _bias(body), **wanted}
    given |= {"response_format": body.response_format, "structured_outputs": _structured_outputs(body)}
    try:
        return over_defaults(defaults, given)
    except ParameterError as error:
        raise bad_input(str(error), error.param) from None


def check_logprobs(name: str, asked: int | None, service: Service) -> None:
    """Raises ApiError for more than the engine gives."""
    most = service.llm.llm.engine.config.max_logprobs
    if asked is not None and asked > most != -1:
        raise bad_input(f"'/{name}' must be <= {most}", name)


def _structured_outputs(body: CommonRequest) -> dict[str, Any] | None:
    """With what the older names ask for. Two constraints are refused, where StructuredOutputsParams is made too."""
    wanted = dict(body.structured_outputs or {})
    for kind in ("json", "regex", "choice", "grammar"):
        older = getattr(body, f"guided_{kind}")
        if older is not None:
            if wanted.get(kind) is not None:
                both = f"guided_{kind} and structured_outputs.{kind} say the same thing: give one of them"
                raise bad_input(both, f"guided_{kind}")
            wanted[kind] = older
    return wanted if wanted or body.structured_outputs is not None else None


def _bias(body: CommonRequest) -> dict[int, float] | None:
    if body.logit_bias is None:
        return None
    for token in body.logit_bias:
        if not (token.isascii() and token.isdecimal() and len(token) < 10):
            raise bad_input(f"logit_bias must map token ids to numbers, got the key '{token[:20]}'", "logit_bias")
    return {int(token): bias for token, bias in body.logit_bias.items()}
