"""What chat and generate share: sampling flags to SamplingParams, loading, and the line with the rates."""

import json
import re
import time
from collections.abc import Iterable, Iterator
from dataclasses import fields, replace
from typing import Any

from llama.api.outputs import Piece, Usage
from llama.api.params import SamplingParams
from llama.cli.flags import NO_TEXTS, EngineFlags, SamplingFlags
from llama.cli.usage import UsageError

# Beyond any that is published: who names one adapter of their own needs no limit on what requests may ask for.
MAX_LORA_RANK = 1024
DTYPES = ("auto", "float64", "float32", "float16", "bfloat16")
FAILED = "the model failed while it wrote this answer"


def sampling_values(flags: SamplingFlags) -> dict[str, Any]:
    """The fields of SamplingParams that the command line names, checked on their own. Raises UsageError."""
    given = {f.name: getattr(flags, f.name) for f in fields(flags)}
    given = {n: v for n, v in given.items() if v is not None and v is not False and v != NO_TEXTS}
    if "logit_bias" in given:
        pairs = [_bias(text) for text in given["logit_bias"]]
        given["logit_bias"] = dict(pairs)
        if len(given["logit_bias"]) < len(pairs):
            raise UsageError("--logit-bias names a token id twice")
    if "stop_token_ids" in given:
        given["stop_token_ids"] = tuple(_integer("--stop-token-ids", text) for text in given["stop_token_ids"])
    if "response_format" in given:
        given["response_format"] = _json("--response-format", given["response_format"])
    try:
        SamplingParams(**({"max_tokens": None} | given))  # the checkpoint's own may allow more min_tokens than ours
    except ValueError as error:
        raise UsageError(str(error)) from None
    return given


def _bias(text: str) -> tuple[int, float]:
    token, _, value = text.partition("=")
    try:
        return int(token), float(value)
    except ValueError:
        raise UsageError(f"--logit-bias takes ID=NUMBER, got {text!r}") from None


def _integer(flag: str, text: str) -> int:
    try:
        return int(text)
    except ValueError:
        raise UsageError(f"{flag} takes token ids, got {text!r}") from None


def _json(flag: str, text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError as error:
        raise UsageError(f"{flag} takes JSON: {error}") from None


def named_adapter(text: str | None) -> tuple[str, str] | None:
    """(name, path) that --lora gives. Raises UsageError."""
    if text is None:
        return None
    name, equals, path = text.partition("=")
    if not (name and equals and path):
        raise UsageError(f"--lora takes NAME=PATH, got {text!r}")
    return name, path


def check_engine(flags: EngineFlags) -> None:
    """Refuse what no model and no machine could mean, before torch is imported. Raises UsageError."""
    if flags.dtype not in DTYPES:
        raise UsageError(f"--dtype must be one of {', '.join(DTYPES)}, got {flags.dtype!r}")
    if not re.fullmatch(r"auto|cpu|cuda(:[0-9]+)?", flags.device):
        raise UsageError(f"--device must be auto, cpu, cuda or cuda:NUMBER, got {flags.device!r}")
    if flags.max_model_len is not None and flags.max_model_len < 2:
        raise UsageError(f"--max-model-len must be at least 2, got {flags.max_model_len}")


def load(model: str, flags: EngineFlags, max_num_seqs: int, adapter: tuple[str, str] | None = None) -> Any:
    """-> LLM. It is imported here because torch comes with it."""
    check_engine(flags)
    from llama.llm.llm import LLM

    llm = LLM(
        model,
        device=flags.device,
        dtype=flags.dtype,
        max_model_len=flags.max_model_len,
        check_weights=flags.check_weights,
        max_num_seqs=max_num_seqs,
        max_loras=0 if adapter is None else 1,
        max_lora_rank=MAX_LORA_RANK,
    )
    if adapter is not None:
        llm.load_lora(*adapter)
    return llm


def params_for(llm: Any, values: dict[str, Any]) -> SamplingParams:
    """What the command line names, over the checkpoint's defaults."""
    try:
        return replace(llm.inputs.defaults, **values)
    except ValueError as error:
        raise UsageError(str(error)) from None


class Timed:
    """Passes pieces on and remembers when they came: the figures of the closing line."""

    def __init__(self, pieces: Iterable[Piece]) -> None:
        self._pieces = pieces
        self._began = time.monotonic()
        self._first: float | None = None
        self._last = self._began
        self._tokens = self._tokens_of_first = 0
        self._usage: Usage | None = None

    def __iter__(self) -> Iterator[Piece]:
        for piece in self._pieces:
            self._last = time.monotonic()
            self._tokens += len(piece.token_ids)
            if self._first is None and piece.token_ids:
                self._first, self._tokens_of_first = self._last, len(piece.token_ids)
            self._usage = piece.usage or self._usage
            yield piece

    def summary(self) -> str:
        """ "12 prompt tokens, 34.5 tokens/s, time to first token 0.08 s", as far as it is known: an answer that was
        stopped has no count of its prompt. The rate is that of the tokens after the first."""
        parts = [] if self._usage is None else [f"{self._usage.prompt_tokens} prompt tokens"]
        if self._first is not None:
            later, seconds = self._tokens - self._tokens_of_first, self._last - self._first
            if later and seconds > 0:
                parts.append(f"{later / seconds:.1f} tokens/s")
            parts.append(f"time to first token {self._first - self._began:.2f} s")
        return ", ".join(parts)
