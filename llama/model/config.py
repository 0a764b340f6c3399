"""ModelConfig: the sizes and options of a Llama model, its presets, and how a Hugging Face config.json spells them.

The only place that knows foreign key names. Whatever is not Llama's is refused by name and value; nothing is ignored
that would change a logit. Runs without torch.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llama.api.errors import ConfigError
from llama.files import named, read_json, token_ids

DTYPES = ("float64", "float32", "float16", "bfloat16")


def _checked_integer(name: str, value: Any, low: int, high: int) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
        raise ConfigError(f"{name} must be an integer in [{low}, {high}], got {value!r}")
    return value


def _checked_number(name: str, value: Any, low: float, high: float) -> float:
    """A finite number with low < value <= high."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not low < value <= high:
        raise ConfigError(f"{name} must be a number in ({low:g}, {high:g}], got {value!r}")
    return float(value)


@dataclass(frozen=True, slots=True, kw_only=True)
class RopeScaling:
    """Llama 3.1's stretching of the rotary wavelengths (rope type "llama3")."""

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_max_position_embeddings: int

    def __post_init__(self) -> None:
        _checked_number("rope factor", self.factor, 0, 1e6)
        _checked_number("rope low_freq_factor", self.low_freq_factor, 0, 1e6)
        _checked_number("rope high_freq_factor", self.high_freq_factor, 0, 1e6)
        _checked_integer("rope original_max_position_embeddings", self.original_max_position_embeddings, 1, 1 << 24)
        if self.high_freq_factor <= self.low_freq_factor:
            raise ConfigError(
                f"rope high_freq_factor ({self.high_freq_factor}) must exceed low_freq_factor ({self.low_freq_factor})"
            )


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
    bos_token_id: int | None = None
    eos_token_ids: tuple[int, ...] = ()
    dtype: str | None = None

    def __post_init__(self) -> None:
        _checked_integer("vocab_size", self.vocab_size, 1, 1 << 24)
        _checked_integer("hidden_size", self.hidden_size, 1, 1 << 18)
        _checked_integer("intermediate_size", self.intermediate_size, 1, 1 << 20)
        _checked_integer("num_hidden_layers", self.num_hidden_layers, 1, 1 << 12)
        _checked_integer("num_attention_heads", self.num_attention_heads, 1, 1 << 14)
        _checked_integer("num_key_value_heads", self.num_key_value_heads, 1, 1 << 14)
        _checked_integer("head_dim", self.head_dim, 2, 1 << 14)
        _checked_integer("max_position_embeddings", self.max_position_embeddings, 1, 1 << 24)
        _checked_number("rms_norm_eps", self.rms_norm_eps, 0, 1)
        _checked_number("rope_theta", self.rope_theta, 0, 1e12)
        if self.num_attention_heads % self.num_key_value_heads:
            raise ConfigError(
                f"num_attention_heads ({self.num_attention_heads}) must be a multiple of num_key_value_heads "
                f"({self.num_key_value_heads})"
            )
        if self.head_dim % 2:
            raise ConfigError(f"head_dim must be even for rotary embedding, got {self.head_dim}")
        if not isinstance(self.tie_word_embeddings, bool):
            raise ConfigError(f"tie_word_embeddings must be true or false, got {self.tie_word_embeddings!r}")
        if self.dtype is not None and self.dtype not in DTYPES:
            raise ConfigError(f"dtype must be one of {', '.join(DTYPES)}, got {self.dtype!r}")
        if self.bos_token_id is not None:
            _checked_integer("bos_token_id", self.bos_token_id, 0, self.vocab_size - 1)
        for token_id in self.eos_token_ids:
            _checked_integer("eos_token_id", token_id, 0, self.vocab_size - 1)

    @classmethod
    def preset(cls, name: str) -> "ModelConfig":
        """One of llama-3.1-8b, -70b, -405b, llama-3.2-1b, -3b, tiny."""
        if not isinstance(name, str) or name not in _PRESETS:
            raise ConfigError(f"unknown preset {name!r}; there are {', '.join(_PRESETS)}")
        return _PRESETS[name]

    @classmethod
    def from_pretrained(cls, path: str | Path) -> "ModelConfig":
        """Read `config.json` of a Hugging Face folder (or the file itself). Raises ConfigError."""
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
        heads = _checked_integer("num_attention_heads", values["num_attention_heads"], 1, 1 << 14)
        hidden_size = _checked_integer("hidden_size", values["hidden_size"], 1, 1 << 18)
        head_dim = values.get("head_dim")
        if head_dim is None:
            if hidden_size % heads:
                raise ConfigError(
                    f"hidden_size ({hidden_size}) must be a multiple of num_attention_heads ({heads}) "
                    "where head_dim is not given"
                )
            head_dim = hidden_size // heads
        kv_heads = values.get("num_key_value_heads")
        rope_theta, rope_scaling = _rope_of(values)
        return cls(
            **{key: values[key] for key in _REQUIRED},
            num_key_value_heads=heads if kv_heads is None else kv_heads,
            head_dim=head_dim,
            rope_theta=rope_theta,
            rope_scaling=rope_scaling,
            tie_word_embeddings=values.get("tie_word_embeddings", False),
            bos_token_id=next(iter(token_ids("bos_token_id", values.get("bos_token_id"), ConfigError)), None),
            eos_token_ids=token_ids("eos_token_id", values.get("eos_token_id"), ConfigError),
            dtype=_dtype_of(values),
        )

    def to_hugging_face(self, dtype: str) -> dict[str, Any]:
        """A config.json that transformers 4 and 5 both read; `dtype` is what the weights are saved in."""
        scaling = self.rope_scaling
        rope: dict[str, Any] = {"rope_type": "default"}
        if scaling is not None:
            rope = {
                "rope_type": "llama3",
                "factor": scaling.factor,
                "low_freq_factor": scaling.low_freq_factor,
                "high_freq_factor": scaling.high_freq_factor,
                "original_max_position_embeddings": scaling.original_max_position_embeddings,
            }
        eos = self.eos_token_ids
        return {
            "architectures": ["LlamaForCausalLM"],
            "model_type": "llama",
            **{key: getattr(self, key) for key in _REQUIRED},
            "num_key_value_heads": self.num_key_value_heads,
            "head_dim": self.head_dim,
            "rope_theta": self.rope_theta,
            "rope_scaling": None if scaling is None else rope,
            "tie_word_embeddings": self.tie_word_embeddings,
            "attention_bias": False,
            "mlp_bias": False,
            "hidden_act": "silu",
            "bos_token_id": self.bos_token_id,
            "eos_token_id": None if not eos else eos[0] if len(eos) == 1 else list(eos),
            "torch_dtype": dtype,
        }

    @property
    def num_parameters(self) -> int:
        """Weights of the model; a tied head counts once."""
        heads = self.num_attention_heads + self.num_key_value_heads
        attention = 2 * self.hidden_size * heads * self.head_dim
        layer = attention + 3 * self.hidden_size * self.intermediate_size + 2 * self.hidden_size
        embeddings = self.vocab_size * self.hidden_size * (1 if self.tie_word_embeddings else 2)
        return self.num_hidden_layers * layer + embeddings + self.hidden_size

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


_ONLY: dict[str, tuple[Any, ...]] = {
    "hidden_act": ("silu", "swish"),
    "attention_bias": (False,),
    "mlp_bias": (False,),
    "partial_rotary_factor": (1,),
    "rope_interleaved": (False,),
}


def _rope_of(values: Mapping[str, Any]) -> tuple[float, RopeScaling | None]:
    """RoPE from either spelling: `rope_theta` beside `rope_scaling`, or all in `rope_parameters`."""
    both = {key: values[key] for key in ("rope_scaling", "rope_parameters") if values.get(key) is not None}
    for key, value in both.items():
        if not isinstance(value, Mapping):
            raise ConfigError(f"{key} must be an object, got {value!r}")
    if len(both) == 2 and dict(both["rope_scaling"]) != dict(both["rope_parameters"]):
        raise ConfigError("rope_scaling and rope_parameters are both given and differ")
    rope: Mapping[str, Any] = next(iter(both.values()), {})
    theta = rope.get("rope_theta", values.get("rope_theta"))
    # Llama 1 and 2 checkpoints have no rope_theta; transformers takes 10,000 there.
    theta = _checked_number("rope_theta", 10_000.0 if theta is None else theta, 0, 1e12)
    kind = rope.get("rope_type", rope.get("type", "default"))
    if rope.get("partial_rotary_factor", 1) != 1:
        raise ConfigError(f"partial_rotary_factor must be 1, got {rope['partial_rotary_factor']!r}")
    if rope.get("type") not in (None, kind):
        raise ConfigError(f"rope_type {kind!r} and type {rope['type']!r} contradict each other")
    if kind == "default":
        if rope.get("factor") not in (None, 1):
            raise ConfigError(f'a RoPE factor of {rope["factor"]!r} needs a rope type, which must be "llama3"')
        return theta, None
    if kind != "llama3":
        raise ConfigError(f'rope type must be "default" or "llama3", got {kind!r}')
    names = ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")
    missing = [name for name in names if rope.get(name) is None]
    if missing:
        raise ConfigError(f'rope type "llama3" lacks {", ".join(missing)}')
    return theta, RopeScaling(**{name: rope[name] for name in names})


def _dtype_of(values: Mapping[str, Any]) -> str | None:
    dtype: str | None = values.get("dtype", values.get("torch_dtype"))
    if dtype is not None and dtype not in DTYPES:
        raise ConfigError(f"dtype must be one of {', '.join(DTYPES)}, got {dtype!r}")
    return dtype


def _llama3(factor: float, **sizes: Any) -> ModelConfig:
    scaling = RopeScaling(
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
        rope_scaling=RopeScaling(
            factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=128
        ),
        dtype="float32",
        **_sizes(64, 160, 2, 4, 16),
    ),
}
