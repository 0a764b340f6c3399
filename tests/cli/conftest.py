import dataclasses
import itertools
import json

import make_tiny
import pytest
import torch
from safetensors.torch import save_file

from llama.model.config import ModelConfig


@pytest.fixture(scope="session")
def tiny(tmp_path_factory) -> str:
    """A checkpoint with random weights and a tokenizer of bytes, chat in the Llama 3.1 format."""
    folder = tmp_path_factory.mktemp("cli") / "tiny"
    config = dataclasses.replace(make_tiny.TINY, max_position_embeddings=256)
    make_tiny.make(folder, config, dtype="float32", seed=0)
    return str(folder)


@pytest.fixture(scope="session")
def adapter(tiny, tmp_path_factory) -> str:
    """A PEFT adapter of all q_proj and v_proj of the tiny model, strong enough to change its answers."""
    folder = tmp_path_factory.mktemp("adapter")
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


@pytest.fixture
def llama_70b(tmp_path) -> str:
    """config.json and generation_config.json alone."""
    config = ModelConfig.preset("llama-3.1-70b").to_hugging_face("bfloat16")
    (tmp_path / "config.json").write_text(json.dumps(config))
    generation = {"do_sample": True, "temperature": 0.6, "top_p": 0.9, "eos_token_id": [128001, 128008, 128009]}
    (tmp_path / "generation_config.json").write_text(json.dumps(generation))
    return str(tmp_path)
