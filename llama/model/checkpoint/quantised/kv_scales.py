"""The scales that a folder has for an fp8 KV cache, under the names that their writers gave them."""

from collections.abc import Mapping

import torch
from torch import Tensor

from llama.api.errors import CheckpointError
from llama.model.checkpoint.shards import StoredTensor, read_codes
from llama.model.config import ModelConfig

# compressed-tensors; ModelOpt; Quark and older compressed-tensors; one for both.
_NAMES = (
    ("k_scale", "k_proj.k_scale", "k_proj.output_scale", "kv_scale"),
    ("v_scale", "v_proj.v_scale", "v_proj.output_scale", "kv_scale"),
)


def read_kv_scales(stored: Mapping[str, StoredTensor], config: ModelConfig) -> tuple[Tensor | None, list[int]]:
    """float32 [layers, 2, kv_heads], of K and of V; None where there is none. A layer without any has 1, and its number
    comes with them; where K or V alone has one it serves both."""
    found = torch.ones(config.num_hidden_layers, 2, config.num_key_value_heads, device="cpu")
    lacking = []
    for layer, of_layer in enumerate(found):
        prefix = f"model.layers.{layer}.self_attn."
        parts = [next((stored[prefix + name] for name in names if prefix + name in stored), None) for names in _NAMES]
        if not any(parts):
            lacking.append(layer)
        for part, tensor in zip(of_layer, (parts[0] or parts[1], parts[1] or parts[0]), strict=True):
            if tensor is not None:
                part.copy_(_read(tensor, config.num_key_value_heads))
    return (None, []) if len(lacking) == len(found) else (found, lacking)


def _read(stored: StoredTensor, kv_heads: int) -> Tensor:
    if stored.code not in ("F32", "F16", "BF16"):
        raise CheckpointError(f"{stored.path}: {stored.name} is stored as {stored.code}, a scale is F32, F16 or BF16")
    values = read_codes(stored).float().flatten()
    if len(values) not in (1, kv_heads) or not bool(((values > 0) & values.isfinite()).all()):
        raise CheckpointError(
            f"{stored.path}: {stored.name} should be one positive scale or {kv_heads}, found {list(stored.shape)}"
        )
    return values
