"""What the converters share beside the writer of checkpoints: the small files, and the two layouts of RoPE."""

import logging
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from llama.api.errors import ParameterError
from llama.api.params import SamplingParams
from llama.model.checkpoint.save import write_json
from llama.model.config import ModelConfig
from llama.model.rope_scaling import Llama3Scaling

logger = logging.getLogger(__name__)

DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}

# What lies beside the weights of a model and is the same for one that is made of it.
_TEXT_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "chat_template.jinja",
    "additional_chat_templates/*.jinja",
    "generation_config.json",
)

# What the generation_config.json of Meta's own checkpoints says.
LLAMA3_SAMPLING = {"temperature": 0.6, "top_p": 0.9}


def copy_text_files(source: Path, target: Path) -> None:
    """Tokenizer, chat templates and generation defaults, as far as `source` has them."""
    for pattern in _TEXT_FILES:
        for file in source.glob(pattern):
            copy = target / file.relative_to(source)
            copy.parent.mkdir(exist_ok=True)
            shutil.copyfile(file, copy)


def write_generation_config(
    folder: Path, config: ModelConfig, pad_token_id: int | None, sampling: Mapping[str, float] | None = None
) -> None:
    """`sampling`: what a request that names nothing gets, under Hugging Face's names."""
    eos = config.eos_token_ids
    ids = {"bos_token_id": config.bos_token_id, "eos_token_id": eos[0] if len(eos) == 1 else list(eos) or None}
    ids["pad_token_id"] = pad_token_id
    values = ({"do_sample": True} | dict(sampling) if sampling else {}) | ids
    write_json(folder / "generation_config.json", {key: value for key, value in values.items() if value is not None})


def legal_sampling(recommended: Mapping[str, Any]) -> dict[str, float]:
    """Those that a request may have: with others in generation_config.json the folder could not be loaded."""
    legal: dict[str, float] = {}
    for name, value in recommended.items():
        try:
            SamplingParams(**{name: value})
            legal[name] = value
        except ParameterError as error:
            logger.warning("the recommended %s %s is left out: %s", name, value, error)
    return legal


def llama3_rope_scaling(factor: float) -> Llama3Scaling:
    """The scaling of Llama 3.1 (factor 8) and 3.2 (factor 32); the other three numbers never varied."""
    return Llama3Scaling(
        factor=factor, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=8192
    )


def unpermute_rope(weight: torch.Tensor, num_heads: int) -> torch.Tensor:
    """Rows of a q or k projection from the interleaved RoPE layout to the half-split one. weight [heads * D, hidden]

    Meta and GGUF rotate rows (0, 1), (2, 3), ... of a head as pairs; Hugging Face rotates (0, D/2), (1, D/2 + 1), ...
    """
    rows, columns = weight.shape
    pairs = weight.view(num_heads, rows // num_heads // 2, 2, columns)
    return pairs.transpose(1, 2).reshape(rows, columns)
