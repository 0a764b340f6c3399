"""Rotary position embedding: inverse frequencies with each rope type's scaling.

Everything here is float32, whatever the model's dtype, and the order of operations is transformers', so that both agree
to the last bit. `ops.cos_sin` makes cosines and sines of them; the rotation itself is `ops.rope_and_store`, in the
half-split layout.
"""

import math

import torch
from torch import Tensor

from llama.model.config import ModelConfig
from llama.model.rope_scaling import LinearScaling, Llama3Scaling, YarnScaling


def inverse_frequencies(config: ModelConfig, device: torch.device | str | None = None) -> Tensor:
    """[head_dim / 2] float32: theta^(-2i / head_dim), scaled as the rope type says."""
    dims = torch.arange(0, config.head_dim, 2, dtype=torch.float32, device=device)
    powers = config.rope_theta ** (dims / config.head_dim)
    scaling = config.rope_scaling
    if isinstance(scaling, Llama3Scaling):
        return _llama3(1.0 / powers, scaling)
    if isinstance(scaling, YarnScaling):
        return _yarn(powers, config, scaling)
    return 1.0 / powers / scaling.factor if isinstance(scaling, LinearScaling) else 1.0 / powers


def _llama3(inverse: Tensor, scaling: Llama3Scaling) -> Tensor:
    """With wavelength w and original context C: w < C / high_freq_factor stays, w > C / low_freq_factor is divided by
    `factor`, between them the two are blended linearly in C / w (Meta's llama-models, `apply_scaling`)."""
    context, low, high = scaling.original_max_position_embeddings, scaling.low_freq_factor, scaling.high_freq_factor
    wavelengths = 2 * math.pi / inverse
    blend = (context / wavelengths - low) / (high - low)
    stretched = inverse / scaling.factor
    blended = (1 - blend) * inverse / scaling.factor + blend * inverse
    scaled = torch.where(wavelengths > context / low, stretched, blended)
    return torch.where(wavelengths < context / high, inverse, scaled)


def _yarn(powers: Tensor, config: ModelConfig, scaling: YarnScaling) -> Tensor:
    """Frequencies that turn more than beta_fast times within the original context stay, those that turn less than
    beta_slow times are divided by `factor`; between the two dimensions the blend is linear (arXiv 2309.00071, 3.2)."""

    def dimension(turns: float) -> float:
        context = scaling.original_max_position_embeddings
        return config.head_dim * math.log(context / (turns * 2 * math.pi)) / (2 * math.log(config.rope_theta))

    low, high = dimension(scaling.beta_fast), dimension(scaling.beta_slow)
    if scaling.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, config.head_dim - 1)
    if low == high:
        high += 0.001
    places = torch.arange(len(powers), dtype=torch.float32, device=powers.device)
    stays = 1 - ((places - low) / (high - low)).clamp(0, 1)
    return 1.0 / (scaling.factor * powers) * (1 - stays) + 1.0 / powers * stays


def attention_factor(config: ModelConfig) -> float:
    """What cos and sin are multiplied by: 1 for every rope type but YaRN."""
    scaling = config.rope_scaling
    if not isinstance(scaling, YarnScaling):
        return 1.0
    if scaling.attention_factor is not None:
        return scaling.attention_factor
    growth = 0.1 * math.log(scaling.factor) if scaling.factor > 1 else 0.0
    if scaling.mscale is not None and scaling.mscale_all_dim is not None:
        return (growth * scaling.mscale + 1.0) / (growth * scaling.mscale_all_dim + 1.0)
    return growth + 1.0


def frequencies(config: ModelConfig, device: torch.device | str | None = None) -> Tensor:
    """[head_dim] float32: the inverse frequencies negated, then as they are. See `ops.cos_sin`."""
    if device is not None and torch.device(device).type == "meta":
        # Arithmetic on meta tensors imports all of torch's compiler, which takes seconds.
        return torch.empty(config.head_dim, dtype=torch.float32, device=device)
    inverse = inverse_frequencies(config, device)
    return torch.cat((-inverse, inverse))
