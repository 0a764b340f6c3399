"""One model with random weights twice: in transformers and here."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.models.llama import modeling_llama

from llama.model.transformer import Transformer

SIZES = {
    "vocab_size": 97,
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 128,
}
SMALL = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "bos_token_id": 1,
}


def norm_in_float64(self: Any, x: torch.Tensor) -> torch.Tensor:
    return self.weight * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.variance_epsilon))


@contextmanager
def float64_throughout() -> Iterator[None]:
    """transformers' norms, and the softmax of its eager attention, compute in float32 whatever the dtype: here they
    follow the same formulas in the dtype of their input."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(modeling_llama.LlamaRMSNorm, "forward", norm_in_float64)
        patch.setattr(modeling_llama.nn.functional, "softmax", lambda x, dim, dtype=None: torch.softmax(x, dim))
        yield


def make_pair(
    path: Path, *, seed: int, dtype: torch.dtype = torch.float64, noise: float = 0.1, **changes: Any
) -> tuple[LlamaForCausalLM, Transformer]:
    """transformers' model, saved under `path`, and what we read there. `noise` makes its weights less tame."""
    torch.manual_seed(seed)
    theirs = LlamaForCausalLM(LlamaConfig(**{**SIZES, **changes})).eval().to(dtype)
    for parameter in theirs.parameters():
        parameter.data.add_(torch.randn_like(parameter) * noise)
    theirs.save_pretrained(path)
    return theirs, Transformer.from_pretrained(path, dtype=dtype)
