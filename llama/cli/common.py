"""What the commands that load a model share: their flags, loading, and the line with the rates."""

import os
import re
import sys
import time
from argparse import Namespace
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from importlib.util import find_spec
from typing import Any, Literal

from llama.api.errors import ParameterError
from llama.api.outputs import Piece, Usage
from llama.api.params import SamplingParams, over_defaults
from llama.cli.flags import Once, Parser, UsageError, add_fields, checked, given, integer, named_adapter
from llama.engine.budget import threads_of_each
from llama.engine.config import EngineConfig
from llama.server.config import ServerConfig

# Beyond any that is published: who names one adapter of their own needs no limit on what requests may ask for.
MAX_LORA_RANK = 1024
FAILED = "the model failed while it wrote this answer"


def _option(default: Any, help: str) -> Any:
    return field(default=default, metadata={"help": help})


@dataclass(frozen=True, kw_only=True)
class LoadOptions:
    """LLM's own arguments; all others are fields of EngineConfig."""

    tokenizer: str | None = _option(None, "folder of the tokenizer (the model's)")
    device: str = _option("auto", "auto, cpu, cuda or cuda:NUMBER")
    dtype: Literal["auto", "float64", "float32", "float16", "bfloat16"] = _option(
        "auto", "dtype of the weights, auto = the checkpoint's"
    )
    load_format: Literal["auto", "dummy"] = _option("auto", "dummy: random weights, from config.json alone")
    quantization: str | None = _option(
        None,
        "int8, int4 or fp8: round a dense model's linear layers as it is loaded; or a quantised folder's method",
    )
    quantization_layout: Literal["compact", "balanced", "fast"] = _option(
        "balanced", "of quantised weights on a CPU: compact, or with a form for few tokens, or with one for many too"
    )
    check_weights: bool = _option(False, "refuse weights that are NaN or infinite")
    revision: str | None = _option(None, "branch, tag or commit of a model on the hub")
    reasoning_parser: str | None = _option(
        None, "deepseek_r1: <think>...</think> is no answer; none: it is (by default what the chat template knows)"
    )

    def __post_init__(self) -> None:
        if not re.fullmatch(r"auto|cpu|cuda(:[0-9]+)?", self.device):
            raise ParameterError(f"device must be auto, cpu, cuda or cuda:NUMBER, got {self.device!r}", "device")


def add_model_flags(parser: Parser, without: Sequence[str] = ()) -> None:
    """Where and how the model runs."""
    add_fields(parser, LoadOptions, "loading")
    add_fields(parser, EngineConfig, "engine", without)


def add_replicas_flag(parser: Parser) -> None:
    text = "engines that share the work: processes of this machine, or with --ray of a cluster (%(default)s)"
    parser.add_argument("--replicas", type=integer(1, 1024), default=1, metavar="INT", help=text)


def check_adapters(options: Namespace, config: ServerConfig) -> None:
    """Raises UsageError for adapters of --lora that requests could not ask for by their names."""
    names = [name for name, _ in options.lora]
    checked(config.check_adapters, {"names": names})
    for name in names:
        if names.count(name) > 1:
            raise UsageError(f"--lora names {name!r} twice")


def add_ray_flags(parser: Parser) -> Any:
    """-> the group, for more of them."""
    group = parser.add_argument_group("Ray (docs/scaling.md)")
    text = "each of --replicas on a Ray cluster, with as many GPUs as it has ranks: the one here, else one of its own"
    group.add_argument("--ray", action="store_true", help=text)
    group.add_argument("--ray-address", action=Once, metavar="ADDRESS", help="another cluster; local: one of its own")
    return group


def check_ray(options: Namespace) -> None:
    if options.ray_address is not None and not options.ray:
        raise UsageError("--ray-address needs --ray")
    if options.ray and find_spec("ray") is None:
        raise UsageError("--ray needs Ray: pip install 'llama-engine[ray]'")


def add_single_request_flags(parser: Parser) -> None:
    """What a command that runs one request at a time takes: an adapter, every field of SamplingParams, and the engine's
    but those that follow from the request."""
    text = "use this adapter: a name for it and its PEFT folder"
    parser.add_argument("--lora", action=Once, type=named_adapter, metavar="NAME=PATH", help=text)
    title = "sampling (what is not given is the checkpoint's generation_config.json, else the default shown)"
    add_fields(parser, SamplingParams, title)
    add_model_flags(parser, without=("seed", "max_num_seqs", "max_loras", "max_lora_rank", "max_lora_bytes"))


def sampling_values(options: Namespace) -> dict[str, Any]:
    """The fields of SamplingParams that the command line names, checked on their own. Raises UsageError."""
    values = given(options, SamplingParams)
    checked(SamplingParams, {"max_tokens": None} | values)  # the checkpoint's own may allow more min_tokens than ours
    if "logprobs_mode" in values and "logprobs" not in values:
        raise UsageError("--logprobs-mode needs --logprobs")
    return values


def llm_options(options: Namespace, **defaults: Any) -> dict[str, Any]:
    """The keyword arguments of LLM that the command line gives, over `defaults`; all that no model and no machine could
    mean is refused before torch is imported. Raises UsageError."""
    engine, loading = defaults | given(options, EngineConfig), given(options, LoadOptions)
    checked(EngineConfig, engine)
    checked(LoadOptions, loading)
    return engine | loading


def keep_to_cores() -> None:
    """Compute with no more threads than the control group lets run at once: PyTorch counts the machine's cores. A
    number that the user gave PyTorch stays."""
    if os.environ.get("OMP_NUM_THREADS") or os.environ.get("MKL_NUM_THREADS"):
        return
    import torch

    threads = torch.get_num_threads()
    if (most := threads_of_each(1, threads)) < threads:
        torch.set_num_threads(most)


def load(options: Namespace, values: dict[str, Any]) -> Any:
    """-> LLM for one request of these `sampling_values` at a time. It is imported here because torch comes with it."""
    max_num_seqs = values.get("n", 1) * (2 if "guidance_scale" in values else 1)  # guidance computes two prompts
    max_loras = 1 if options.lora else 0
    arguments = llm_options(options, max_num_seqs=max_num_seqs, max_loras=max_loras, max_lora_rank=MAX_LORA_RANK)
    from llama.llm.llm import LLM

    keep_to_cores()
    llm = LLM(options.model, **arguments)
    if options.lora:
        llm.load_lora(*options.lora)
    return llm


def params_for(llm: Any, values: dict[str, Any]) -> SamplingParams:
    """What the command line names, over the checkpoint's defaults."""
    params: SamplingParams = checked(partial(over_defaults, llm.inputs.defaults), {"given": values})
    return params


def typed(text: str, what: str) -> str:
    """The text, where it is one. Raises ValueError with the byte that is no UTF-8, which Python has put into a lone
    surrogate."""
    for position, character in enumerate(text):
        if "\udc80" <= character <= "\udcff":
            byte = ord(character) - 0xDC00
            raise ValueError(f"{what} is not UTF-8 text: byte 0x{byte:02x} behind {position} characters")
    return text


def show(piece: Piece) -> None:
    """What an answer goes on with; a thought goes to stderr, it is no part of it."""
    print(piece.reasoning_content, end="", file=sys.stderr, flush=True)
    print(piece.text, end="", flush=True)


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
        stopped has no count of its prompt. The rate is that of the tokens after the first. Where drafts were verified,
        how many tokens such a step gave."""
        parts = [] if self._usage is None else [f"{self._usage.prompt_tokens} prompt tokens"]
        if self._first is not None:
            later, seconds = self._tokens - self._tokens_of_first, self._last - self._first
            if later and seconds > 0:
                parts.append(f"{later / seconds:.1f} tokens/s")
            parts.append(f"time to first token {self._first - self._began:.2f} s")
        if self._usage is not None and self._usage.mean_acceptance_length is not None:
            parts.append(f"{self._usage.mean_acceptance_length:.2f} tokens per step with drafts")
        return ", ".join(parts)
