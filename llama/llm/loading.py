"""From the arguments of LLM to its parts: model, tokenizer and chat template, engine configuration, defaults."""

import logging
import re
import reprlib
import time
from collections.abc import Collection, Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from llama.api.errors import CheckpointError, ConfigError, ParameterError, is_one_of
from llama.api.params import SamplingParams
from llama.engine.config import BATCHED_TOKENS
from llama.files import check_path
from llama.hub import tokenizer_folder
from llama.model.communicator import Communicator
from llama.model.config import ModelConfig
from llama.model.generation_config import NAMES, GenerationConfig
from llama.model.transformer import Transformer
from llama.text.chat import ChatTemplate
from llama.text.tokenizer import Tokenizer
from llama.text.tokenizer.tokenizer import other_tokenizer
from llama.text.tokenizer.trial import try_out

logger = logging.getLogger(__name__)

DTYPES = {
    "float64": torch.float64,
    "double": torch.float64,
    "float32": torch.float32,
    "float": torch.float32,
    "float16": torch.float16,
    "half": torch.float16,
    "bfloat16": torch.bfloat16,
}


def resolve_device(device: str | torch.device) -> torch.device:
    if str(device) == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        resolved = torch.device(device)
    except (RuntimeError, TypeError, ValueError):
        resolved = None
    if resolved is None or resolved.type not in BATCHED_TOKENS:
        raise ParameterError(f'device must be "auto", "cpu" or "cuda", got {str(device)!r}', "device")
    if resolved.type == "cuda" and not torch.cuda.is_available():
        raise ParameterError(
            f"device={str(device)!r}, but this machine or this build of torch has no CUDA device", "device"
        )
    if resolved.type == "cuda" and (resolved.index or 0) >= torch.cuda.device_count():
        raise ParameterError(
            f"device={str(device)!r}, but this machine has {torch.cuda.device_count()} CUDA devices", "device"
        )
    return resolved


def resolve_dtype(dtype: str | torch.dtype) -> torch.dtype | None:
    """None for "auto"."""
    if isinstance(dtype, torch.dtype) and dtype in DTYPES.values():
        return dtype
    if is_one_of(dtype, ("auto",)):
        return None
    if not isinstance(dtype, str) or dtype not in DTYPES:
        raise ParameterError(f'dtype must be "auto" or one of {", ".join(DTYPES)}, got {str(dtype)!r}', "dtype")
    return DTYPES[dtype]


def load_text(model: Any, tokenizer: Any) -> tuple[Tokenizer | None, ChatTemplate | None]:
    """The tokenizer asked for, or the one in the model's folder, with the chat template that lies beside it (the
    built-in Llama 3.1 format where there is none)."""
    if not isinstance(model, str | Path | Transformer):
        raise ParameterError(f"model must be a folder or a Transformer, got {type(model).__name__}", "model")
    if not isinstance(tokenizer, str | Path | Tokenizer | None):
        raise ParameterError(
            f"tokenizer must be a folder or a llama Tokenizer, got {type(tokenizer).__name__}", "tokenizer"
        )
    given = tokenizer if isinstance(tokenizer, Tokenizer) else None
    if isinstance(model, str | Path):
        check_path(model)
    if isinstance(tokenizer, str):
        tokenizer = tokenizer_folder(tokenizer)
    elif isinstance(tokenizer, Path):
        check_path(tokenizer)
    folder = model if tokenizer is None or isinstance(tokenizer, Tokenizer) else tokenizer
    if isinstance(folder, Transformer):
        return given, None if given is None else ChatTemplate(given)
    is_there = (Path(folder) / "tokenizer.json").exists() or other_tokenizer(Path(folder)) is not None
    if tokenizer is None and not is_there:
        return None, None
    loaded = given
    if loaded is None:
        loaded = Tokenizer.from_pretrained(folder)
        try_out(Path(folder), loaded)
    return loaded, ChatTemplate.from_pretrained(folder, loaded)


def check_model(
    model: str | Path | Transformer, *, device: str | torch.device, dtype: str | torch.dtype, load_format: str
) -> tuple[ModelConfig, torch.device]:
    """What the model is and where it will be, with all that can be refused before weights are read."""
    if not is_one_of(load_format, ("auto", "safetensors", "dummy")):
        raise ParameterError(
            f'load_format must be "auto", "safetensors" or "dummy", got {load_format!r}', "load_format"
        )
    wanted = resolve_dtype(dtype)
    if isinstance(model, Transformer):
        _check_given(model, device, wanted, load_format)
        _check_triton(model.device)
        return model.config, model.device
    where = resolve_device(device)
    _check_triton(where)
    if wanted is torch.float64 and where.type == "cuda":
        raise ParameterError('dtype="float64" needs device="cpu"', "dtype")
    if not Path(model).is_dir():
        raise CheckpointError(f"{model}: there is no such folder")
    return ModelConfig.from_pretrained(model), where


def check_draft(path: str, vocab_size: int, tokenizer: Tokenizer | None) -> None:
    """Raises ConfigError for a draft model whose token ids are not those of the model and its tokenizer."""
    if not Path(path).is_dir():
        raise CheckpointError(f"{path}: there is no such folder (the draft model of speculative_config)")
    drafted = ModelConfig.from_pretrained(path).vocab_size
    if drafted != vocab_size:
        raise ConfigError(f"the draft model {path} has a vocab_size of {drafted}, the model has {vocab_size}")
    if tokenizer is not None and (Path(path) / "tokenizer.json").exists():
        other = Tokenizer.from_pretrained(path)
        differs = next((i for i in range(vocab_size) if tokenizer.id_to_token(i) != other.id_to_token(i)), None)
        if differs is not None:
            texts = f"{other.id_to_token(differs)!r}, the model {tokenizer.id_to_token(differs)!r}"
            raise ConfigError(f"the draft model {path} has another tokenizer: its token {differs} is {texts}")


def _check_triton(device: torch.device) -> None:
    if device.type == "cuda" and find_spec("triton") is None:
        raise ParameterError(f"{device} needs Triton: pip install 'llama-engine[triton]'", "device")


def load_model(
    model: str | Path | Transformer,
    device: torch.device,
    *,
    dtype: str | torch.dtype,
    load_format: str,
    quantization: str | None = None,
    quantization_layout: str = "balanced",
    check_weights: bool = False,
    communicator: Communicator | None = None,
) -> Transformer:
    """Of arguments that `check_model` has accepted, with the device that it found."""
    if isinstance(model, Transformer):
        if check_weights:
            raise ParameterError(
                "check_weights=True needs a folder as model: it looks at weights as they are loaded", "check_weights"
            )
        if quantization is not None:
            model.quantise(quantization)
        model.prepare(quantization_layout)
        return model
    started = time.monotonic()
    wanted = resolve_dtype(dtype)
    if load_format == "dummy":
        config = ModelConfig.from_pretrained(model)
        made = wanted or DTYPES[config.dtype or "float32"]
        loaded = Transformer(config, device=device, dtype=made, seed=0, communicator=communicator)
        if quantization is not None:
            loaded.quantise(quantization)
    else:
        loaded = Transformer.from_pretrained(
            model,
            device=device,
            dtype=wanted or "auto",
            quantization=quantization,
            check_weights=check_weights,
            communicator=communicator,
        )
    loaded.prepare(quantization_layout)
    logger.info("model loaded as %s on %s (%.2f s)", loaded.dtype, device, time.monotonic() - started)
    return loaded


def _check_given(model: Transformer, device: str | torch.device, dtype: torch.dtype | None, load_format: str) -> None:
    if model.device.type not in BATCHED_TOKENS:
        raise ParameterError(f"the Transformer is on {model.device}: it must be on the CPU or a CUDA device", "model")
    if load_format == "dummy":
        raise ParameterError(
            'load_format="dummy" needs a folder as model: a Transformer has its weights', "load_format"
        )
    if dtype not in (None, model.dtype):
        raise ParameterError(
            f"dtype={dtype} for a Transformer of {model.dtype}: convert it first, or leave dtype out", "dtype"
        )
    if str(device) != "auto" and not _same_device(resolve_device(device), model.device):
        raise ParameterError(
            f"device={str(device)!r} for a Transformer on {model.device}: move it, or leave device out", "device"
        )


def _same_device(asked: torch.device, has: torch.device) -> bool:
    return asked.type == has.type and (asked.type == "cpu" or asked.index in (None, has.index))


def load_defaults(model: Any) -> tuple[SamplingParams, frozenset[int]]:
    """What a request that names no sampling gets, and the ids that end a text according to the checkpoint's files."""
    if not isinstance(model, str | Path):
        return SamplingParams(), frozenset()
    generation = GenerationConfig.from_pretrained(model)
    if generation.ignored:
        told = ", ".join(f"{name}={reprlib.repr(value)}" for name, value in generation.ignored.items())
        logger.warning("%s asks for what has no effect here: %s", Path(model) / "generation_config.json", told)
    try:
        return _defaults(generation.sampling), frozenset(generation.eos_token_ids)
    except ValueError as error:
        message = str(error)
        for theirs, ours in NAMES.items():
            message = re.sub(rf"\b{ours}\b", theirs, message, count=1)
        raise ConfigError(f"{Path(model) / 'generation_config.json'}: {message}") from None


def tell_useless_ends(model: Any, eos_token_ids: Collection[int], vocab_size: int) -> None:
    """Of what generation_config.json names: transformers and vLLM take it too, and such a text may have no end."""
    if beyond := sorted(token for token in eos_token_ids if token >= vocab_size):
        told = "%s: no text can end at eos_token_id %s: the model's vocab_size is %s"
        logger.warning(told, Path(model) / "generation_config.json", ", ".join(map(str, beyond)), vocab_size)


def _defaults(sampling: Mapping[str, Any]) -> SamplingParams:
    """Where a file names min_new_tokens alone, more than we write by default, an answer has no other limit."""
    least, most = sampling.get("min_tokens", 0), SamplingParams().max_tokens
    if isinstance(least, int) and most is not None and least > most:
        sampling = {"max_tokens": None, **sampling}
    return SamplingParams(**sampling)
