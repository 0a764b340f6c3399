"""What a checkpoint's generation_config.json says: its sampling defaults under our names, and the ids that end a text.

Runs without torch. The values are checked where they are used, by SamplingParams.
"""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from llama.api.errors import ConfigError
from llama.files import named, read_json_if_there, token_ids

# Hugging Face's name -> ours, for what api.md calls sampling defaults. What else the file may hold (cache settings,
# beam search, pad ids) does not concern the choice of the next token here.
_NAMES = {
    "temperature": "temperature",
    "top_p": "top_p",
    "top_k": "top_k",
    "min_p": "min_p",
    "repetition_penalty": "repetition_penalty",
    "max_new_tokens": "max_tokens",
}


@dataclass(frozen=True, slots=True)
class GenerationConfig:
    """`sampling` holds keyword arguments of SamplingParams, only those that the file gives."""

    sampling: dict[str, Any] = field(default_factory=dict)
    eos_token_ids: tuple[int, ...] = ()

    @classmethod
    def from_pretrained(cls, path: str | Path) -> "GenerationConfig":
        """Read generation_config.json of a folder; empty where there is none. Raises ConfigError."""
        file = Path(path) / "generation_config.json"
        values = read_json_if_there(file, error=ConfigError)
        sampling = {ours: values[theirs] for theirs, ours in _NAMES.items() if values.get(theirs) is not None}
        if values.get("do_sample") is False:
            sampling["temperature"] = 0.0
        with named(file, ConfigError):
            return cls(sampling, token_ids("eos_token_id", values.get("eos_token_id")))
