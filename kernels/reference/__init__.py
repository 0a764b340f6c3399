"""Every op in plain PyTorch, under the names and signatures of `kernels`: the CPU path and the oracle."""

from kernels.reference.attention import paged_attention
from kernels.reference.layers import add_rms_norm, rms_norm, rope_and_store, silu_mul
from kernels.reference.lora import lora_embedding, lora_expand, lora_shrink, plan_lora
from kernels.reference.plan import plan_step
from kernels.reference.sampling import sample, token_logprobs

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
