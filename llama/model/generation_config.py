"""What a checkpoint's generation_config.json says: its sampling defaults under our names, and the ids that end a text.

Runs without torch. The values are checked where they are used, by SamplingParams.
"""

import reprlib
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from llama.api.errors import ConfigError
from llama.api.neutral import Neutral, is_neutral
from llama.files import named, read_json_if_there, token_ids

# Hugging Face's name -> ours.
NAMES = {
    "temperature": "temperature",
    "top_p": "top_p",
    "top_k": "top_k",
    "min_p": "min_p",
    "repetition_penalty": "repetition_penalty",
    "max_new_tokens": "max_tokens",
    "min_new_tokens": "min_tokens",
    "stop_strings": "stop",
}
# What would change the text and is not here, each with the values at which it does not.
IGNORED: Neutral = {
    "bad_words_ids": ([],),
    "begin_suppress_tokens": ([],),
    "constraints": ([],),
    "diversity_penalty": (0.0,),
    "dola_layers": (),
    "encoder_no_repeat_ngram_size": (0,),
    "encoder_repetition_penalty": (1.0,),
    "epsilon_cutoff": (0.0,),
    "eta_cutoff": (0.0,),
    "exponential_decay_length_penalty": (),
    "force_words_ids": ([],),
    "forced_bos_token_id": (),
    "forced_eos_token_id": (),
    "guidance_scale": (1.0,),
    "max_time": (),
    "min_length": (0,),
    "no_repeat_ngram_size": (0,),
    "num_beam_groups": (1,),
    "num_beams": (1,),
    "num_return_sequences": (1,),
    "penalty_alpha": (0.0,),
    "sequence_bias": ([], {}),
    "suppress_tokens": ([],),
    "token_healing": (False,),
    "top_h": (),
    "typical_p": (1.0,),
    "watermarking_config": (),
}


@dataclass(frozen=True, slots=True)
class GenerationConfig:
    """`sampling` holds keyword arguments of SamplingParams, only those that the file gives; `ignored` what it asks of
    the text in vain."""

    sampling: dict[str, Any] = field(default_factory=dict)
    eos_token_ids: tuple[int, ...] = ()
    ignored: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def from_pretrained(cls, path: str | Path) -> "GenerationConfig":
        """Read generation_config.json of a folder; empty where there is none. Raises ConfigError."""
        file = Path(path) / "generation_config.json"
        values = read_json_if_there(file, error=ConfigError)
        sampling = {ours: values[theirs] for theirs, ours in NAMES.items() if values.get(theirs) is not None}
        if not isinstance(do_sample := values.get("do_sample"), bool | None):
            raise ConfigError(f"{file}: do_sample must be true or false, got {reprlib.repr(do_sample)}")
        if do_sample is False:
            sampling["temperature"] = 0.0
        asked = {name: value for name, value in values.items() if name in IGNORED and value is not None}
        ignored = {name: value for name, value in asked.items() if not is_neutral(value, IGNORED[name])}
        with named(file, ConfigError):
            return cls(sampling, token_ids("eos_token_id", values.get("eos_token_id")), ignored)
