"""Folders of a tiny model and of an adapter for it, for tests that begin with files."""

import dataclasses
import itertools
import json
from pathlib import Path

import make_tiny
import torch
from safetensors.torch import save_file


def make_model(folder: Path) -> str:
    """Random weights and a tokenizer of bytes, chat in the Llama 3.1 format."""
    config = dataclasses.replace(make_tiny.TINY, max_position_embeddings=256)
    make_tiny.make(folder, config, dtype="float32", seed=0)
    return str(folder)


def make_adapter(folder: Path) -> str:
    """A PEFT adapter of all q_proj and v_proj of that model, strong enough to change its answers."""
    sizes = {"q_proj": 64, "v_proj": 32}
    options = {"peft_type": "LORA", "r": 4, "lora_alpha": 64, "target_modules": list(sizes)}
    (folder / "adapter_config.json").write_text(json.dumps(options))
    generator = torch.Generator().manual_seed(0)
    tensors = {}
    for layer, (name, size) in itertools.product(range(2), sizes.items()):
        module = f"base_model.model.model.layers.{layer}.self_attn.{name}"
        tensors[f"{module}.lora_A.weight"] = torch.randn(4, 64, generator=generator)
        tensors[f"{module}.lora_B.weight"] = torch.randn(size, 4, generator=generator)
    save_file(tensors, folder / "adapter_model.safetensors")
    return str(folder)
