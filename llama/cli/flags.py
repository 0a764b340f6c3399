"""What each command takes, as tyro reads it. Imports nothing but tyro, so that --help answers at once.

Where a value may be absent the type is spelled Optional[...], and lists have a type of their own: for other spellings
tyro imports a type checker, which alone takes as long as all the rest.
"""
# ruff: noqa: UP045

import contextlib
import io
import math
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Annotated, Any, Optional

import tyro
from tyro.conf import FlagCreatePairsOff, OmitArgPrefixes, Positional, arg
from tyro.constructors import PrimitiveConstructorSpec

from llama.cli.usage import UsageError

DEMO_MODEL = "checkpoints/smollm2-135m-instruct"


class Texts(tuple[str, ...]):
    """The values of a flag that takes several."""


NO_TEXTS = Texts()


def _several(metavar: str) -> PrimitiveConstructorSpec[Texts]:
    return PrimitiveConstructorSpec(
        nargs="+",
        metavar=metavar,
        instance_from_str=Texts,
        is_instance=lambda value: isinstance(value, Texts),
        str_from_instance=list,
    )


def _one(kind: Callable[[str], Any], metavar: str, what: str) -> PrimitiveConstructorSpec[Any]:
    """A flag that may be absent; tyro's own reading of it would take the word None for a value."""

    def read(words: list[str]) -> Any:
        try:
            return kind(words[0])
        except ValueError:
            raise ValueError(f"it takes {what}, got {words[0]!r}") from None

    return PrimitiveConstructorSpec(
        nargs=1,
        metavar=metavar,
        instance_from_str=read,
        is_instance=lambda value: value is None or not isinstance(value, tuple),
        str_from_instance=lambda value: [str(value)],
    )


def _from(low: int, high: int = 2**31 - 1, metavar: str = "INT") -> PrimitiveConstructorSpec[Any]:
    """An integer between these, both included."""

    def read(word: str) -> int:
        if low <= (value := int(word)) <= high:
            return value
        raise ValueError

    return _one(read, metavar, f"an integer from {low} to {high}")


def _seconds(word: str) -> float:
    if 0 < (value := float(word)) < math.inf:
        return value
    raise ValueError


NO_HINT = arg(help_behavior_hint=lambda _: "")
Int = Annotated[Optional[int], _one(int, "INT", "an integer"), NO_HINT]
Float = Annotated[Optional[float], _one(float, "NUMBER", "a number"), NO_HINT]
Text = Annotated[Optional[str], _one(str, "TEXT", "a text"), NO_HINT]
Json = Annotated[Optional[str], _one(str, "JSON", "JSON"), NO_HINT]
Adapter = Annotated[Optional[str], _one(str, "NAME=PATH", "NAME=PATH"), NO_HINT]
Mode = Annotated[Optional[str], _one(str, "MODE", "a mode"), NO_HINT]
Switch = Annotated[bool, NO_HINT]
Model = Annotated[Positional[str], arg(metavar="MODEL"), NO_HINT]


@dataclass
class SamplingFlags:
    """Every field of SamplingParams; what is not given keeps the checkpoint's generation_config, else its default."""

    n: Int = None
    """completions per prompt (1)"""
    temperature: Float = None
    """0 = greedy, up to 5 (1)"""
    top_p: Float = None
    """keep the most probable tokens up to this share, 1 = off (1)"""
    top_k: Int = None
    """keep that many tokens, 0 = off (0)"""
    min_p: Float = None
    """keep tokens at least this probable relative to the best (0)"""
    repetition_penalty: Float = None
    """divide the logits of tokens already seen, 1 = off (1)"""
    frequency_penalty: Float = None
    """subtract this for each time a token was generated (0)"""
    presence_penalty: Float = None
    """subtract this if a token was generated (0)"""
    logit_bias: Annotated[Texts, _several("ID=NUMBER"), NO_HINT] = NO_TEXTS
    """add to the logits of these token ids"""
    seed: Int = None
    """makes the answer repeatable"""
    max_tokens: Int = None
    """the most tokens of an answer (256)"""
    min_tokens: Int = None
    """no end before that many tokens (0)"""
    stop: Annotated[Texts, _several("TEXT"), NO_HINT] = NO_TEXTS
    """end before any of these texts"""
    stop_token_ids: Annotated[Texts, _several("ID"), NO_HINT] = NO_TEXTS
    """end at any of these token ids"""
    include_stop_str_in_output: Switch = False
    """keep the text that stopped the answer"""
    ignore_eos: Switch = False
    """go on past the model's own end"""
    logprobs: Int = None
    """log-probabilities of that many top tokens, with --json"""
    prompt_logprobs: Int = None
    """the same for the prompt's tokens"""
    logprobs_mode: Mode = None
    """raw, or processed: after penalties, temperature and filters (raw)"""
    response_format: Json = None
    """constrain the answer, for example '{"type": "json_object"}'"""


@dataclass
class EngineFlags:
    """Where and how the model runs."""

    device: Annotated[str, arg(metavar="DEVICE")] = "auto"
    """auto, cpu or cuda"""
    dtype: Annotated[str, arg(metavar="DTYPE")] = "auto"
    """auto (the checkpoint's), float32, bfloat16, float16 or float64"""
    max_model_len: Int = None
    """tokens of context, prompt and answer together (the model's)"""
    check_weights: Switch = False
    """refuse weights that are NaN or infinite"""


Sampling = Annotated[SamplingFlags, arg(name="")]
Engine = Annotated[EngineFlags, arg(name="")]


@dataclass
class Chat:
    """Talk with a model. /reset forgets the conversation, /save FILE keeps it, /quit leaves; Ctrl-C stops an answer."""

    model: Annotated[Positional[str], arg(metavar="MODEL")] = DEMO_MODEL
    """folder of the checkpoint"""
    system: Text = None
    """the system message"""
    lora: Adapter = None
    """answer with this adapter: a name for it and its PEFT folder"""
    sampling: Sampling = field(default_factory=SamplingFlags)
    engine: Engine = field(default_factory=EngineFlags)


@dataclass
class Generate:
    """Write on from a prompt, or answer it with --chat. Streams to stdout; the rates go to stderr."""

    model: Model
    """folder of the checkpoint"""
    prompt: Annotated[Positional[str], arg(metavar="PROMPT"), NO_HINT]
    """the text, or - to read it from stdin (its last line break is dropped)"""
    chat: Switch = False
    """take the prompt as a user's message"""
    system: Text = None
    """the system message, with --chat"""
    lora: Adapter = None
    """write with this adapter: a name for it and its PEFT folder"""
    json: Switch = False
    """print one JSON object when all is done"""
    sampling: Sampling = field(default_factory=SamplingFlags)
    engine: Engine = field(default_factory=EngineFlags)


@dataclass
class Serve:
    """Serve a model over HTTP, in Cloudflare's and OpenAI's dialects. The first SIGTERM drains, a second one ends."""

    model: Model
    """folder of the checkpoint"""
    host: Annotated[str, arg(metavar="HOST")] = "127.0.0.1"
    """address to listen on"""
    port: Annotated[int, _from(0, 65535, "PORT")] = 8000
    """port to listen on, 0 = any that is free"""
    served_model_name: Annotated[Texts, _several("NAME"), NO_HINT] = NO_TEXTS
    """what clients may call the model (the folder's name)"""
    api_key: Text = None
    """key that every request must bring; visible to whoever lists processes"""
    api_key_file: Text = None
    """file with such keys, one a line"""
    lora: Annotated[Texts, _several("NAME=PATH"), NO_HINT] = NO_TEXTS
    """adapters to load at the start"""
    lora_dir: Text = None
    """folder whose sub-folders are adapters, loaded by name when first asked for"""
    max_loras: Annotated[int, _from(0)] = 8
    """adapters that may work in one step, where there are any"""
    max_lora_rank: Annotated[int, _from(1)] = 64
    """the largest rank of an adapter"""
    max_num_seqs: Annotated[int, _from(1, 65536)] = 256
    """completions that may run at once"""
    max_waiting_requests: Annotated[int, _from(0)] = 1024
    """requests that may wait beyond those"""
    num_blocks: Annotated[Optional[int], _from(1), NO_HINT] = None
    """blocks of KV cache (what memory allows)"""
    shutdown_timeout: Annotated[float, _one(_seconds, "SECONDS", "a number of seconds above 0")] = 30.0
    """for running requests to end, once told to stop"""
    engine: Engine = field(default_factory=EngineFlags)


@dataclass
class Info:
    """Say what a model is and what it needs, from its config.json alone."""

    model: Model
    """folder of the checkpoint, or its config.json"""
    memory: Annotated[Optional[str], _one(str, "SIZE", "a size"), NO_HINT] = None
    """memory to fit into, for example 80GiB or 24GB (this machine's)"""
    dtype: Annotated[Optional[str], _one(str, "DTYPE", "a dtype"), NO_HINT] = None
    """dtype of weights and KV cache (the checkpoint's)"""


Command = Chat | Generate | Serve | Info
_COMMANDS: dict[str, type[Command]] = {"chat": Chat, "generate": Generate, "serve": Serve, "info": Info}


def parse(name: str, arguments: Sequence[str]) -> Command:
    """The command `name` with its arguments. Raises UsageError; SystemExit(0) after --help."""
    _refuse_repeated(arguments)
    words = io.StringIO()
    try:
        with contextlib.redirect_stderr(words):
            parsed: Command = tyro.cli(
                _COMMANDS[name],
                prog=f"llama {name}",
                args=list(arguments),
                config=(FlagCreatePairsOff, OmitArgPrefixes),
            )
    except SystemExit as stop:
        if not stop.code:
            raise
        raise UsageError(_one_line(words.getvalue())) from None
    sys.stderr.write(words.getvalue())
    return parsed


def _refuse_repeated(arguments: Sequence[str]) -> None:
    """Flags that take several values: of two the first would be lost."""
    for flag in ("--stop", "--stop-token-ids", "--logit-bias", "--lora", "--served-model-name"):
        spellings = (flag, flag.replace("-", "_").replace("__", "--", 1))
        if sum(word.partition("=")[0] in spellings for word in arguments) > 1:
            raise UsageError(f"{flag} is given twice: give it once, with all its values behind it")


def _one_line(box: str) -> str:
    """tyro's message (a title, then parts with rules between them) as one line: what is wrong, what may be meant."""
    parts: list[list[str]] = [[]]
    for line in box.splitlines()[1:]:
        text = line.strip("│╭╮╰╯ ")
        if not text.strip("─-"):
            parts.append([])
        else:
            parts[-1].append(text)
    message, *others = [part for part in parts if part]
    if message[0].startswith("For full helptext"):  # the title says it all
        message = [box.splitlines()[0].strip("╭─╮ ")]
    meant = [part[1].split()[0] for part in others if part[0].startswith("Perhaps you meant") and len(part) > 1]
    return " ".join(message).rstrip(".") + (f" (perhaps {meant[0]})" if meant else "")
