"""Tiny base models and PEFT adapters of random weights, as transformers and peft save them."""

import warnings

import torch
from peft import LoraConfig, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM

VOCAB = 96


def save_base(path, *, tied, **options):
    torch.manual_seed(7)
    config = LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=48,
        intermediate_size=80,
        num_hidden_layers=3,
        num_attention_heads=6,
        num_key_value_heads=2,
        head_dim=16,
        max_position_embeddings=256,
        tie_word_embeddings=tied,
        **options,
    )
    model = LlamaForCausalLM(config)
    for parameter in model.parameters():
        parameter.data.add_(torch.randn_like(parameter) * 0.1)
    model.save_pretrained(path)
    return path


def make_adapter(base_path, path, *, seed=0, **options):
    """Save an adapter; -> the PEFT model, which computes what ours must."""
    torch.manual_seed(seed)
    options = {"r": 4, "lora_alpha": 6, "target_modules": ["q_proj"], "init_lora_weights": False} | options
    model = LlamaForCausalLM.from_pretrained(base_path)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        adapted = get_peft_model(model, LoraConfig(**options))
        adapted.save_pretrained(path)
    return adapted.eval()
