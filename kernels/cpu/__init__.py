"""Every op in plain PyTorch, under the names and signatures of `kernels`: the CPU path and the oracle."""

from llama.kernels.cpu.attention import paged_attention
from llama.kernels.cpu.layers import add_rms_norm, rms_norm, rope_and_store, silu_mul
from llama.kernels.cpu.layout import plan_step
from llama.kernels.cpu.lora import lora_embedding, lora_expand, lora_shrink, plan_lora
from llama.kernels.cpu.sampling import sample, token_logprobs

__all__ = [
    "add_rms_norm",
    "lora_embedding",
    "lora_expand",
    "lora_shrink",
    "paged_attention",
    "plan_lora",
    "plan_step",
    "rms_norm",
    "rope_and_store",
    "sample",
    "silu_mul",
    "token_logprobs",
]
