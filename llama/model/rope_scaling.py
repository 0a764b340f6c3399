"""How a config.json stretches RoPE: one class for each rope type, read from the spellings of transformers 4 and 5.

`llama.model.rope` has the formulas. Runs without torch.
"""

from collections.abc import Mapping
from dataclasses import MISSING, asdict, dataclass, fields
from typing import Any, ClassVar

from llama.api.errors import ConfigError


def checked_integer(name: str, value: Any, low: int, high: int) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
        raise ConfigError(f"{name} must be an integer in [{low}, {high}], got {value!r}")
    return value


def checked_number(name: str, value: Any, low: float, high: float) -> float:
    """A finite number with low < value <= high."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not low < value <= high:
        raise ConfigError(f"{name} must be a number in ({low:g}, {high:g}], got {value!r}")
    return float(value)


@dataclass(frozen=True, slots=True, kw_only=True)
class RopeScaling:
    """What all rope types share: the factor by which the context was stretched."""

    rope_type: ClassVar[str]
    factor: float

    def __post_init__(self) -> None:
        checked_number("rope factor", self.factor, 0, 1e6)

    def to_hugging_face(self) -> dict[str, Any]:
        return {"rope_type": self.rope_type} | {name: v for name, v in asdict(self).items() if v is not None}


@dataclass(frozen=True, slots=True, kw_only=True)
class LinearScaling(RopeScaling):
    """Positions divided by the factor."""

    rope_type: ClassVar[str] = "linear"


@dataclass(frozen=True, slots=True, kw_only=True)
class DynamicScaling(RopeScaling):
    """Dynamic NTK: no scaling within max_position_embeddings.

    Beyond it transformers stretches by the length of the longest sequence of the batch, and keys that are cached keep
    what an earlier length gave them: a text would depend on its neighbours. So no sequence is longer here.
    """

    rope_type: ClassVar[str] = "dynamic"


@dataclass(frozen=True, slots=True, kw_only=True)
class _FromContext(RopeScaling):
    original_max_position_embeddings: int

    def __post_init__(self) -> None:
        RopeScaling.__post_init__(self)
        checked_integer("rope original_max_position_embeddings", self.original_max_position_embeddings, 1, 1 << 24)


@dataclass(frozen=True, slots=True, kw_only=True)
class Llama3Scaling(_FromContext):
    """Llama 3.1's stretching of the rotary wavelengths."""

    rope_type: ClassVar[str] = "llama3"
    low_freq_factor: float
    high_freq_factor: float

    def __post_init__(self) -> None:
        _FromContext.__post_init__(self)
        checked_number("rope low_freq_factor", self.low_freq_factor, 0, 1e6)
        checked_number("rope high_freq_factor", self.high_freq_factor, 0, 1e6)
        if self.high_freq_factor <= self.low_freq_factor:
            raise ConfigError(
                f"rope high_freq_factor ({self.high_freq_factor}) must exceed low_freq_factor ({self.low_freq_factor})"
            )


@dataclass(frozen=True, slots=True, kw_only=True)
class YarnScaling(_FromContext):
    """YaRN (Peng et al. 2023, arXiv 2309.00071), with transformers' names and defaults."""

    rope_type: ClassVar[str] = "yarn"
    attention_factor: float | None = None
    beta_fast: float = 32
    beta_slow: float = 1
    mscale: float | None = None
    mscale_all_dim: float | None = None
    truncate: bool = True

    def __post_init__(self) -> None:
        _FromContext.__post_init__(self)
        checked_number("rope beta_fast", self.beta_fast, 0, 1e6)
        checked_number("rope beta_slow", self.beta_slow, 0, 1e6)
        for name in ("attention_factor", "mscale", "mscale_all_dim"):
            if getattr(self, name) is not None:
                checked_number(f"rope {name}", getattr(self, name), 0, 1e6)
        if not isinstance(self.truncate, bool):
            raise ConfigError(f"rope truncate must be true or false, got {self.truncate!r}")


_TYPES = {kind.rope_type: kind for kind in (LinearScaling, DynamicScaling, Llama3Scaling, YarnScaling)}
# What either spelling may hold; as in transformers, a type does not mind what only others read.
_OF_TYPES = dict.fromkeys(field.name for kind in _TYPES.values() for field in fields(kind))
_KEYS = ("rope_type", "type", "rope_theta", "partial_rotary_factor", "finetuned", *_OF_TYPES)


def read_rope(values: Mapping[str, Any]) -> tuple[float, RopeScaling | None]:
    """(theta, scaling) from either spelling: `rope_theta` beside `rope_scaling`, or all in `rope_parameters`."""
    given = {key: values[key] for key in ("rope_scaling", "rope_parameters") if values.get(key) not in (None, {})}
    for key, value in given.items():
        if not isinstance(value, Mapping):
            raise ConfigError(f"{key} must be an object, got {value!r}")
    read = [_read(rope, values) for rope in given.values()] or [_read({}, values)]
    for key, rope in given.items():
        for name in rope:
            if name not in _KEYS and rope[name] is not None:
                raise ConfigError(f"{key} must not hold {name!r}, only {', '.join(_KEYS)}")
    if read[0] != read[-1]:
        raise ConfigError("rope_scaling and rope_parameters are both given and differ")
    return read[0]


def _read(rope: Mapping[str, Any], values: Mapping[str, Any]) -> tuple[float, RopeScaling | None]:
    theta = values.get("rope_theta") if rope.get("rope_theta") is None else rope["rope_theta"]
    # Llama 1 and 2 checkpoints have no rope_theta; transformers takes 10,000 there.
    theta = checked_number("rope_theta", 10_000.0 if theta is None else theta, 0, 1e12)
    kind = next((rope[key] for key in ("rope_type", "type") if rope.get(key) is not None), "default")
    if rope.get("partial_rotary_factor") not in (None, 1):
        raise ConfigError(f"partial_rotary_factor must be 1, got {rope['partial_rotary_factor']!r}")
    if rope.get("type") not in (None, kind):
        raise ConfigError(f"rope_type {kind!r} and type {rope['type']!r} contradict each other")
    if kind == "default":
        if rope.get("factor") not in (None, 1):
            raise ConfigError(f"a RoPE factor of {rope['factor']!r} needs a rope type: {', '.join(_TYPES)}")
        return theta, None
    if not isinstance(kind, str) or kind not in _TYPES:
        raise ConfigError(f"rope type must be one of default, {', '.join(_TYPES)}, got {kind!r}")
    return theta, _scaling(_TYPES[kind], rope, values)


def _scaling(kind: type[RopeScaling], rope: Mapping[str, Any], values: Mapping[str, Any]) -> RopeScaling:
    given = {field.name: rope[field.name] for field in fields(kind) if rope.get(field.name) is not None}
    outside = values.get("original_max_position_embeddings")
    if issubclass(kind, _FromContext) and outside is not None:  # as in transformers, the key beside rope_scaling wins
        given["original_max_position_embeddings"] = outside
    if kind is YarnScaling:
        # As in transformers, both contexts may be the same, and a factor that is not told follows from them.
        context = values.get("max_position_embeddings")
        original = given.setdefault("original_max_position_embeddings", context)
        if "factor" not in given:
            ours = checked_integer("rope original_max_position_embeddings", original, 1, 1 << 24)
            given["factor"] = checked_integer("max_position_embeddings", context, 1, 1 << 24) / ours
    if missing := [field.name for field in fields(kind) if field.default is MISSING and field.name not in given]:
        raise ConfigError(f'rope type "{kind.rope_type}" lacks {", ".join(missing)}')
    return kind(**given)
