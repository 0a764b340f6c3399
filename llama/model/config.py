"""ModelConfig: the sizes and options of a Llama model, its presets, and how a Hugging Face config.json spells them.

The only place that knows foreign key names. Whatever is not Llama's is refused by name and value; nothing is ignored
that would change a logit. Runs without torch.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llama.api.errors import ConfigError
from llama.files import check_path, named, read_json, token_ids
from llama.model.rope_scaling import (
    LinearScaling,
    Llama3Scaling,
    RopeScaling,
    YarnScaling,
    checked_integer,
    checked_number,
    read_rope,
)

DTYPES = ("float64", "float32", "float16", "bfloat16")


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelConfig:
    """A Llama's sizes, under Hugging Face's names. `dtype` is what the checkpoint says it is stored in, if it says."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    max_position_embeddings: int
    rms_norm_eps: float = 1e-5
    rope_theta: float = 500_000.0
    rope_scaling: RopeScaling | None = None
    tie_word_embeddings: bool = False
    attention_bias: bool = False
    mlp_bias: bool = False
    bos_token_id: int | None = None
    eos_token_ids: tuple[int, ...] = ()
    dtype: str | None = None

    def __post_init__(self) -> None:
        checked_integer("vocab_size", self.vocab_size, 1, 1 << 24)
        checked_integer("hidden_size", self.hidden_size, 1, 1 << 18)
        checked_integer("intermediate_size", self.intermediate_size, 1, 1 << 20)
        checked_integer("num_hidden_layers", self.num_hidden_layers, 1, 1 << 12)
        checked_integer("num_attention_heads", self.num_attention_heads, 1, 1 << 14)
        checked_integer("num_key_value_heads", self.num_key_value_heads, 1, 1 << 14)
        checked_integer("head_dim", self.head_dim, 2, 1 << 14)
        checked_integer("max_position_embeddings", self.max_position_embeddings, 1, 1 << 24)
        checked_number("rms_norm_eps", self.rms_norm_eps, 0, 1)
        checked_number("rope_theta", self.rope_theta, 0, 1e12)
        if self.num_attention_heads % self.num_key_value_heads:
            raise ConfigError(
                f"num_attention_heads ({self.num_attention_heads}) must be a multiple of num_key_value_heads "
                f"({self.num_key_value_heads})"
            )
        if self.head_dim % 2:
            raise ConfigError(f"head_dim must be even for rotary embedding, got {self.head_dim}")
        for name in ("tie_word_embeddings", "attention_bias", "mlp_bias"):
            if not isinstance(getattr(self, name), bool):
                raise ConfigError(f"{name} must be true or false, got {getattr(self, name)!r}")
        if self.dtype is not None and self.dtype not in DTYPES:
            raise ConfigError(f"dtype must be one of {', '.join(DTYPES)}, got {self.dtype!r}")
        if self.bos_token_id is not None:
            checked_integer("bos_token_id", self.bos_token_id, 0, self.vocab_size - 1)
        for token_id in self.eos_token_ids:
            checked_integer("eos_token_id", token_id, 0, self.vocab_size - 1)

    @classmethod
    def preset(cls, name: str) -> "ModelConfig":
        """One of llama-3.1-8b, -70b, -405b, llama-3.2-1b, -3b, tiny."""
        if not isinstance(name, str) or name not in _PRESETS:
            raise ConfigError(f"unknown preset {name!r}; there are {', '.join(_PRESETS)}")
        return _PRESETS[name]

    @classmethod
    def from_pretrained(cls, path: str | Path) -> "ModelConfig":
        """Read `config.json` of a Hugging Face folder (or the file itself). Raises ConfigError."""
        check_path(path, ConfigError)
        path = Path(path)
        if path.is_dir():
            path = path / "config.json"
        values = read_json(path, error=ConfigError, hint="a model folder needs a config.json")
        with named(path, ConfigError):
            return cls.from_hugging_face(values)

    @classmethod
    def from_hugging_face(cls, values: Mapping[str, Any]) -> "ModelConfig":
        """Build from a config.json's content. Raises ConfigError for what is missing, malformed or not Llama's."""
        _refuse_foreign(values)
        missing = [key for key in _REQUIRED if values.get(key) is None]
        if missing:
            raise ConfigError(f"missing key{'s' if len(missing) > 1 else ''} {', '.join(missing)}")
        heads = checked_integer("num_attention_heads", values["num_attention_heads"], 1, 1 << 14)
        hidden_size = checked_integer("hidden_size", values["hidden_size"], 1, 1 << 18)
        head_dim = values.get("head_dim")
        if head_dim is None:
            if hidden_size % heads:
                raise ConfigError(
                    f"hidden_size ({hidden_size}) must be a multiple of num_attention_heads ({heads}) "
                    "where head_dim is not given"
                )
            head_dim = hidden_size // heads
        kv_heads = values.get("num_key_value_heads")
        rope_theta, rope_scaling = read_rope(values)
        config = cls(
            **{key: values[key] for key in _REQUIRED},
            num_key_value_heads=heads if kv_heads is None else kv_heads,
            head_dim=head_dim,
            rope_theta=rope_theta,
            rope_scaling=rope_scaling,
            tie_word_embeddings=_flag(values, "tie_word_embeddings"),
            attention_bias=_flag(values, "attention_bias"),
            mlp_bias=_flag(values, "mlp_bias"),
            bos_token_id=next(iter(token_ids("bos_token_id", values.get("bos_token_id"), ConfigError)), None),
            eos_token_ids=token_ids("eos_token_id", values.get("eos_token_id"), ConfigError),
            dtype=_dtype_of(values),
        )
        _refuse_windows(values, config.longest_context)
        return config

    def to_hugging_face(self, dtype: str) -> dict[str, Any]:
        """A config.json that transformers 4 and 5 both read; `dtype` is what the weights are saved in."""
        eos = self.eos_token_ids
        return {
            "architectures": ["LlamaForCausalLM"],
            "model_type": "llama",
            **{key: getattr(self, key) for key in _REQUIRED},
            "num_key_value_heads": self.num_key_value_heads,
            "head_dim": self.head_dim,
            "rope_theta": self.rope_theta,
            "rope_scaling": None if self.rope_scaling is None else self.rope_scaling.to_hugging_face(),
            "tie_word_embeddings": self.tie_word_embeddings,
            "attention_bias": self.attention_bias,
            "mlp_bias": self.mlp_bias,
            "hidden_act": "silu",
            "bos_token_id": self.bos_token_id,
            "eos_token_id": None if not eos else eos[0] if len(eos) == 1 else list(eos),
            "torch_dtype": dtype,
        }

    @property
    def num_parameters(self) -> int:
        """Weights and biases of the model; a tied head counts once."""
        heads = self.num_attention_heads + self.num_key_value_heads
        attention = 2 * self.hidden_size * heads * self.head_dim
        layer = attention + 3 * self.hidden_size * self.intermediate_size + 2 * self.hidden_size
        if self.attention_bias:
            layer += (heads + self.num_key_value_heads) * self.head_dim + self.hidden_size
        if self.mlp_bias:
            layer += 2 * self.intermediate_size + self.hidden_size
        embeddings = self.vocab_size * self.hidden_size * (1 if self.tie_word_embeddings else 2)
        return self.num_hidden_layers * layer + embeddings + self.hidden_size

    @property
    def longest_context(self) -> int:
        """The most tokens of a text. max_position_embeddings are the default and never multiplied, as in transformers;
        where RoPE is stretched that may be the context before (Vicuna 16k) or behind it (DeepSeek-Coder)."""
        scaling = self.rope_scaling
        before = self.max_position_embeddings if isinstance(scaling, LinearScaling) else 0
        if isinstance(scaling, YarnScaling):
            before = scaling.original_max_position_embeddings
        return max(self.max_position_embeddings, int(before * scaling.factor) if scaling else 0)

    @property
    def kv_values_per_token(self) -> int:
        """Numbers that the KV cache keeps for one token, all layers together."""
        return 2 * self.num_hidden_layers * self.num_key_value_heads * self.head_dim


_REQUIRED = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "max_position_embeddings",
    "rms_norm_eps",
)


def _refuse_foreign(values: Mapping[str, Any]) -> None:
    """Options under which the checkpoint would not be the network of transformer.py."""
    architectures = values.get("architectures")
    if architectures is not None and architectures != ["LlamaForCausalLM"]:
        raise ConfigError(f'architectures must be ["LlamaForCausalLM"], got {architectures!r}')
    if values.get("model_type") != "llama":
        raise ConfigError(f'model_type must be "llama", got {values.get("model_type")!r}')
    for key, accepted in _ONLY.items():
        value = values.get(key)
        if value is not None and value not in accepted:
            raise ConfigError(f"{key} must be {' or '.join(repr(a) for a in accepted)}, got {value!r}")


def _refuse_windows(values: Mapping[str, Any], context: int) -> None:
    """A layer that sees less than the whole context: transformers keeps no more than the window in its cache."""
    kinds, window = values.get("layer_types"), values.get("sliding_window")
    if kinds is not None and (not isinstance(kinds, list) or any(kind != "full_attention" for kind in kinds)):
        raise ConfigError(f'layer_types must hold "full_attention" alone, got {kinds!r}')
    if window is None or kinds is not None or values.get("use_sliding_window") is False:
        return
    if not isinstance(window, int) or window < context:
        raise ConfigError(f"sliding_window must be null or at least the context, {context}, got {window!r}")


_ONLY: dict[str, tuple[Any, ...]] = {
    "attention_chunk_size": (None,),
    "hidden_act": ("silu", "swish"),
    "is_causal": (True,),
    "partial_rotary_factor": (1,),
    "rope_interleaved": (False,),
}


def _flag(values: Mapping[str, Any], name: str) -> Any:
    return False if values.get(name) is None else values[name]


def _dtype_of(values: Mapping[str, Any]) -> str | None:
    dtype: str | None = values.get("torch_dtype") if values.get("dtype") is None else values["dtype"]
    if dtype is not None and dtype not in DTYPES:
        raise ConfigError(f"dtype must be one of {', '.join(DTYPES)}, got {dtype!r}")
    return dtype


def _llama3(factor: float, **sizes: Any) -> ModelConfig:
    scaling = Llama3Scaling(
        factor=factor, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=8192
    )
    return ModelConfig(
        vocab_size=128_256,
        max_position_embeddings=131_072,
        num_key_value_heads=8,
        rope_scaling=scaling,
        bos_token_id=128_000,
        eos_token_ids=(128_001, 128_008, 128_009),
        dtype="bfloat16",
        **sizes,
    )


def _sizes(hidden_size: int, intermediate_size: int, layers: int, heads: int, head_dim: int = 128) -> dict[str, Any]:
    return {
        "hidden_size": hidden_size,
        "intermediate_size": intermediate_size,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "head_dim": head_dim,
    }


_PRESETS = {
    "llama-3.1-8b": _llama3(8.0, **_sizes(4096, 14_336, 32, 32)),
    "llama-3.1-70b": _llama3(8.0, **_sizes(8192, 28_672, 80, 64)),
    "llama-3.1-405b": _llama3(8.0, **_sizes(16_384, 53_248, 126, 128)),
    "llama-3.2-1b": _llama3(32.0, **_sizes(2048, 8192, 16, 32, 64), tie_word_embeddings=True),
    "llama-3.2-3b": _llama3(32.0, **_sizes(3072, 8192, 28, 24), tie_word_embeddings=True),
    # For tests and trials: every feature of Llama 3.1 at a size that a CPU runs in a millisecond.
    "tiny": ModelConfig(
        vocab_size=512,
        num_key_value_heads=2,
        max_position_embeddings=4096,
        rope_scaling=Llama3Scaling(
            factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=128
        ),
        dtype="float32",
        **_sizes(64, 160, 2, 4, 16),
    ),
}
