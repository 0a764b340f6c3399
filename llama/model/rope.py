"""Rotary position embedding: inverse frequencies with Llama 3.1's scaling, and cos/sin of positions.

Everything here is float32, whatever the model's dtype, and the order of operations is transformers', so that both agree
to the last bit. The rotation itself is `ops.rope_and_store`, in the half-split layout.
"""

import math

import torch
from torch import Tensor

from llama.kernels.types import CosSin
from llama.model.config import ModelConfig


def inverse_frequencies(config: ModelConfig, device: torch.device | str | None = None) -> Tensor:
    """[head_dim / 2] float32: theta^(-2i / head_dim), low frequencies stretched as Llama 3.1 does.

    With wavelength w and original context C: w < C / high_freq_factor stays, w > C / low_freq_factor is divided by
    `factor`, between them the two are blended linearly in C / w (Meta's llama-models, `apply_scaling`).
    """
    dims = torch.arange(0, config.head_dim, 2, dtype=torch.float32, device=device)
    inverse = 1.0 / (config.rope_theta ** (dims / config.head_dim))
    scaling = config.rope_scaling
    if scaling is None:
        return inverse
    context, low, high = scaling.original_max_position_embeddings, scaling.low_freq_factor, scaling.high_freq_factor
    wavelengths = 2 * math.pi / inverse
    blend = (context / wavelengths - low) / (high - low)
    stretched = inverse / scaling.factor
    blended = (1 - blend) * inverse / scaling.factor + blend * inverse
    scaled = torch.where(wavelengths > context / low, stretched, blended)
    return torch.where(wavelengths < context / high, inverse, scaled)


def frequencies(config: ModelConfig, device: torch.device | str | None = None) -> Tensor:
    """[head_dim] float32: the inverse frequencies negated, then as they are. See `cos_sin`."""
    inverse = inverse_frequencies(config, device)
    return torch.cat((-inverse, inverse))


def cos_sin(positions: Tensor, frequencies: Tensor) -> CosSin:
    """What `ops.rope_and_store` rotates the tokens at positions [tokens] by.

    A negated frequency gives the same cosine and the negated sine, bit for bit.
    """
    angles = positions.to(torch.float32)[:, None, None] * frequencies
    return angles.cos(), angles.sin()
