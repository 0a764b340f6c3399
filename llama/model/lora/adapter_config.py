"""What an adapter_config.json says: which modules are adapted, with which rank and which scale. Runs without torch.

Every key is read or refused: one that we do not know may change what is computed, and answers would be wrong with no
sign of it. Formulas are those of PEFT (peft/tuners/lora/layer.py): scale = alpha / r, or alpha / sqrt(r) (rslora).
"""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llama.api.errors import AdapterError, WorkerLostError
from llama.files import named, read_json
from llama.patterns import matches

_MOST_ALPHA = 1e6  # beyond what anybody trains with; products would soon be infinite

_MODULES = "q_proj, k_proj, v_proj, o_proj, gate_proj, up_proj, down_proj, embed_tokens and lm_head"

# Keys that say how an adapter was trained or where it comes from, not what it computes.
TRAINING_KEYS = frozenset(
    {
        "auto_mapping", "base_model_name_or_path", "inference_mode", "lora_dropout", "peft_version", "revision",
        "task_type", "loftq_config", "eva_config", "corda_config", "lora_ga_config", "megatron_core", "runtime_config",
        "ephemeral_gpu_offload", "qalora_group_size",
    }
)  # fmt: skip
READ_KEYS = frozenset(
    {
        "peft_type", "r", "lora_alpha", "use_rslora", "rank_pattern", "alpha_pattern", "target_modules",
        "exclude_modules", "layers_to_transform", "layers_pattern", "init_lora_weights", "bias", "fan_in_fan_out",
        "model_type",
    }
)  # fmt: skip
# Starting points that leave the base weight as it is. The others (pissa, olora, corda, loftq, ...) train against a
# changed base, so that the adapter alone is not what was trained.
_PLAIN_INITS = (True, False, None, "gaussian", "orthogonal", "eva")


@dataclass(frozen=True, slots=True)
class AdaptedModule:
    """One module of the base model with its rank and scale; `name` as Hugging Face calls it (model.layers.0. ...)."""

    name: str
    rank: int
    scale: float


def read_adapter_config(folder: Path, names: list[str]) -> list[AdaptedModule]:
    """Which of the modules `names` are adapted by `folder`'s adapter_config.json. AdapterError for what is malformed or
    not plain LoRA."""
    path = folder / "adapter_config.json"
    values = read_json(path, error=AdapterError, hint="a PEFT adapter has one")
    with named(path, AdapterError):
        _refuse_foreign(values)
        return _modules(values, names)


def _refuse_foreign(values: Mapping[str, Any]) -> None:
    if values.get("peft_type", "LORA") != "LORA":
        raise AdapterError(f"peft_type must be 'LORA', found {values['peft_type']!r}")
    if values.get("model_type") not in (None, "llama"):  # Workers AI's; PEFT has no such key
        raise AdapterError(f"model_type must be 'llama', found {values['model_type']!r}")
    if values.get("bias", "none") != "none":
        raise AdapterError(f"bias must be 'none', found {values['bias']!r}: an adapter's own biases are not read")
    if values.get("fan_in_fan_out"):
        raise AdapterError("fan_in_fan_out is set, which no module of a Llama is")
    init = values.get("init_lora_weights", True)
    if init not in _PLAIN_INITS:
        raise AdapterError(
            f"init_lora_weights={init!r} changes the base weights; save the adapter again as plain LoRA "
            "(path_initial_model_for_weight_conversion in PEFT's save_pretrained)"
        )
    # use_dora, modules_to_save, layer_replication, use_qalora, alora_invocation_tokens, trainable_token_indices,
    # target_parameters, lora_bias and whatever comes next: each must be off.
    for name, value in values.items():
        is_off = value is None or value is False or value in ({}, [], "")
        if name not in READ_KEYS and name not in TRAINING_KEYS and not is_off:
            raise AdapterError(f"{name}={value!r} is not supported: only plain LoRA is")


def _modules(values: Mapping[str, Any], names: list[str]) -> list[AdaptedModule]:
    rank = _rank("r", values.get("r", 8))
    alpha = _alpha("lora_alpha", values.get("lora_alpha", 8))
    use_rslora = values.get("use_rslora", False)
    if not isinstance(use_rslora, bool):
        raise AdapterError(f"use_rslora must be true or false, found {use_rslora!r}")
    targets = _targets(values, names)
    ranks = _pattern("rank_pattern", values.get("rank_pattern"), targets, _rank)
    alphas = _pattern("alpha_pattern", values.get("alpha_pattern"), targets, _alpha)
    modules = []
    for name in targets:
        r, a = ranks.get(name, rank), alphas.get(name, alpha)
        modules.append(AdaptedModule(name, int(r), a / (math.sqrt(r) if use_rslora else r)))
    return modules


def _rank(name: str, value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise AdapterError(f"{name} must be an integer >= 1, found {value!r}")
    return value


def _alpha(name: str, value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < abs(value) <= _MOST_ALPHA:
        raise AdapterError(f"{name} must be a number other than 0 and at most {_MOST_ALPHA:g}, found {value!r}")
    return float(value)


def _targets(values: Mapping[str, Any], names: list[str]) -> list[str]:
    wanted = values.get("target_modules")
    if isinstance(wanted, str) and wanted.lower() == "all-linear":
        chosen = [name for name in names if name.startswith("model.layers.")]
    else:
        chosen = _matching("target_modules", wanted, names)
    chosen = _in_layers(values, wanted, chosen)
    if excluded := values.get("exclude_modules"):
        dropped = set(_matching("exclude_modules", excluded, names))
        chosen = [name for name in chosen if name not in dropped]
    if not chosen:
        raise AdapterError(f"target_modules={wanted!r} matches no module of the model, which has {_MODULES}")
    return chosen


def _matching(key: str, wanted: Any, names: list[str]) -> list[str]:
    """The names that a list of suffixes or a regular expression means."""
    if isinstance(wanted, str):
        return _full_matches(key, wanted, names)
    if not isinstance(wanted, list) or not wanted or not all(isinstance(item, str) for item in wanted):
        raise AdapterError(f"{key} must be a list of names or a string, found {wanted!r}")
    # As in PEFT, a list may name modules of other models too. What must not happen is a tensor without a place.
    return [name for name in names if any(_ends_with(name, item) for item in wanted)]


def _ends_with(name: str, suffix: str) -> bool:
    return name == suffix or name.endswith("." + suffix)


def _full_matches(key: str, pattern: str, names: list[str]) -> list[str]:
    try:
        return matches(pattern, names, "fullmatch")
    except ValueError as error:
        raise AdapterError(f"{key}: {error}") from None
    except WorkerLostError as error:
        raise WorkerLostError(f"{key}: {error}: load the adapter again") from None


def _in_layers(values: Mapping[str, Any], wanted: Any, chosen: list[str]) -> list[str]:
    layers = values.get("layers_to_transform")
    if layers is None or layers == []:
        return chosen
    if isinstance(wanted, str):
        raise AdapterError("layers_to_transform needs target_modules to be a list")
    if values.get("layers_pattern") not in (None, "", [], "layers", ["layers"]):
        raise AdapterError(f"layers_pattern must be 'layers', found {values['layers_pattern']!r}")
    layers = [layers] if isinstance(layers, int) else layers
    if not isinstance(layers, list) or not all(isinstance(i, int) and not isinstance(i, bool) for i in layers):
        raise AdapterError(f"layers_to_transform must be layer numbers, found {layers!r}")
    present = {name.split(".")[2] for name in chosen if name.startswith("model.layers.")}
    for layer in layers:
        if str(layer) not in present:
            raise AdapterError(f"layers_to_transform: there is no layer {layer} to adapt")
    starts = tuple(f"model.layers.{layer}." for layer in layers)
    # As in PEFT, a module that is listed by its whole name is adapted in any case.
    return [name for name in chosen if name.startswith(starts) or name in wanted]


def _pattern(key: str, pattern: Any, targets: Iterable[str], check: Any) -> dict[str, float]:
    """Module -> its value. PEFT takes a key as a regular expression; here it must be a module's name, whole or its end,
    because an expression that matches less than its author thought would change the scale unnoticed."""
    if not pattern:
        return {}
    if not isinstance(pattern, dict):
        raise AdapterError(f"{key} must be an object of module names, found {pattern!r}")
    values: dict[str, float] = {}
    for suffix, value in pattern.items():
        matched = [name for name in targets if _ends_with(name, suffix)]
        if not matched:
            raise AdapterError(f"{key}: {suffix!r} is not the name of an adapted module, whole or its end")
        checked = check(f"{key}[{suffix!r}]", value)
        for name in matched:
            values.setdefault(name, checked)  # the first key that matches wins, as in PEFT
    return values
