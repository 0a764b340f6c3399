"""What a checkpoint's generation_config.json says: its sampling defaults under our names, and the ids that end a text.

Runs without torch. The values are checked where they are used, by SamplingParams.
"""

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from llama.api.errors import ConfigError

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
        try:
            values = json.loads(file.read_text(encoding="utf-8"))
        except FileNotFoundError:
            return cls()
        except OSError as error:
            raise ConfigError(f"{file}: cannot be read: {error.strerror}") from None
        except (ValueError, RecursionError) as error:
            raise ConfigError(f"{file}: is not JSON: {error}") from None
        if not isinstance(values, dict):
            raise ConfigError(f"{file}: must hold a JSON object, got {type(values).__name__}")
        sampling = {ours: values[theirs] for theirs, ours in _NAMES.items() if values.get(theirs) is not None}
        if values.get("do_sample") is False:
            sampling["temperature"] = 0.0
        return cls(sampling, _token_ids(file, values.get("eos_token_id")))


def _token_ids(file: Path, value: Any) -> tuple[int, ...]:
    ids = () if value is None else tuple(value) if isinstance(value, list) else (value,)
    for token_id in ids:
        if isinstance(token_id, bool) or not isinstance(token_id, int) or token_id < 0:
            raise ConfigError(f"{file}: eos_token_id must be a token id or a list of them, got {value!r}")
    return ids
