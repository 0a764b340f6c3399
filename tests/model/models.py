"""Tiny models for tests: random configurations, weights that are not too tame, and their Hugging Face names."""

import torch
from torch import Tensor

from llama.model.checkpoint.layout import layout
from llama.model.checkpoint.save import stored_rows
from llama.model.config import ModelConfig
from llama.model.rope_scaling import Llama3Scaling
from llama.model.transformer import Transformer

LLAMA_3_1 = Llama3Scaling(factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=32)
LLAMA_3_2 = Llama3Scaling(factor=32.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=32)


def tiny_config(**changes) -> ModelConfig:
    values = {
        "vocab_size": 97,
        "hidden_size": 48,
        "intermediate_size": 80,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "max_position_embeddings": 512,
        "rope_theta": 10_000.0,
    }
    return ModelConfig(**{**values, **changes})


def tiny_model(*, dtype: torch.dtype = torch.float64, seed: int = 0, **changes) -> Transformer:
    """Weights large enough that attention is sharp and a wrong position or mask shows."""
    model = Transformer(tiny_config(**changes), dtype=dtype, seed=seed)
    generator = torch.Generator().manual_seed(seed + 1)
    for parameter in model.parameters():
        noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
        parameter.copy_(1 + 0.2 * noise if parameter.dim() == 1 else 0.15 * noise)
    return model


def hugging_face_weights(model: Transformer) -> dict[str, Tensor]:
    return {entry.name: stored_rows(model, entry) for entry in layout(model.config)}
