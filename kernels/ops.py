"""The ops that the model is made of. Each checks its tensors and calls the function of its name in kernels/gpu or
kernels/cpu: Triton for CUDA tensors (for all under TRITON_INTERPRET=1), else PyTorch. Triton is imported on first use.
Where the host's time counts most, kernels/gpu checks itself, once for each kind of call. Tensors that require a
gradient go through kernels/differentiable.py.

Nothing here knows a model, a request or a configuration: tensors, integers and floats only.
"""

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor, float32, int64

from llama.kernels import checks, differentiable
from llama.kernels.checks import INTERPRETED as _INTERPRETED
from llama.kernels.cpu import activation as cpu_activation
from llama.kernels.cpu import attention as cpu_attention
from llama.kernels.cpu import lora as cpu_lora
from llama.kernels.cpu import matmul as cpu_matmul
from llama.kernels.cpu import norm as cpu_norm
from llama.kernels.cpu import rope as cpu_rope
from llama.kernels.cpu import sampling as cpu_sampling
from llama.kernels.logprobs import Logprobs
from llama.kernels.types import (
    CosSin,
    KVLayer,
    QuantizedWeight,
    Ragged,
    Sampled,
    SamplerRows,
    SamplerState,
    TokenAdapters,
)

if __name__ != "llama.kernels.ops":
    raise ImportError("the ops are imported as llama.kernels.ops: under a second name they would exist twice")


def on_triton(x: Tensor) -> bool:
    """Whether ops over such tensors go to Triton."""
    return _INTERPRETED or x.is_cuda


def on_device(device: torch.device) -> AbstractContextManager[object]:
    """In here ops take tensors of this device: Triton launches on the current CUDA device, wherever they are."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x / sqrt(mean(x^2) + eps) * weight over the last dimension, x [tokens, hidden].

    Statistics in float32 (float64 for float64); the normed value is rounded to x.dtype before the weight multiplies it,
    as Hugging Face's Llama does.
    """
    if on_triton(x) and not x.requires_grad:
        from llama.kernels.gpu import norm

        return norm.rms_norm(x, weight, eps)
    checks.check_rms_norm(x, weight)
    if x.requires_grad:
        return differentiable.rms_norm(x, weight, eps)
    return cpu_norm.rms_norm(x, weight, eps)


def add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """-> (rms_norm(summed), summed) with summed = x + residual in x.dtype: the residual stream's next value."""
    if on_triton(x) and not x.requires_grad:
        from llama.kernels.gpu import norm

        return norm.add_rms_norm(x, residual, weight, eps)
    checks.check_add_rms_norm(x, residual, weight)
    if x.requires_grad:
        return differentiable.add_rms_norm(x, residual, weight, eps)
    return cpu_norm.add_rms_norm(x, residual, weight, eps)


def cos_sin(positions: Tensor, frequencies: Tensor, factor: float = 1.0) -> CosSin:
    """What `rope_and_store` rotates the tokens at `positions` [tokens] by: factor * (cos, sin) of position * frequency,
    each [tokens, 1, head_dim] float32.

    frequencies [head_dim] float32 are the inverse frequencies negated, then as they are: a negated one gives the same
    cosine and the negated sine, bit for bit.
    """
    if positions.dim() != 1 or frequencies.dim() != 1 or frequencies.dtype != float32:
        raise checks.refuse("cos_sin", positions=positions, frequencies=frequencies)
    if on_triton(positions):
        from llama.kernels.gpu import rope

        return rope.cos_sin(positions, frequencies, factor)
    return cpu_rope.cos_sin(positions, frequencies, factor)


def rope_and_store(q: Tensor, k: Tensor, v: Tensor, cos_sin: CosSin, kv_layer: KVLayer, ragged: Ragged) -> Tensor:
    """Rotate q and k, write k and v to their slots in the cache, -> rotated q [tokens, heads, head_dim].

    q [tokens, heads, head_dim], k and v [tokens, kv_heads, head_dim] may be strided views with a contiguous last
    dimension; none of them is modified. The rotation pairs dimension i with i + head_dim / 2 and computes in at least
    float32. A token whose slot is -1 is not stored.
    """
    if on_triton(q) and not q.requires_grad:
        from llama.kernels.gpu import rope

        return rope.rope_and_store(q, k, v, cos_sin, kv_layer, ragged)
    checks.check_rope_and_store(q, k, v, cos_sin, kv_layer, ragged)
    if q.requires_grad:
        return differentiable.rope_and_store(q, k, v, cos_sin, kv_layer, ragged)
    return cpu_rope.rope_and_store(q, k, v, cos_sin, kv_layer, ragged)


def paged_attention(q: Tensor, kv_layer: KVLayer, ragged: Ragged, scale: float) -> Tensor:
    """Causal attention of flat, ragged queries over paged K and V, q [tokens, heads, head_dim] -> the same shape.

    Query j of n of a sequence sees the first context - n + j + 1 of its keys. Softmax in at least float32. Nothing past
    a sequence's context can change the result, NaN included.
    """
    if on_triton(q) and not q.requires_grad:
        from llama.kernels.gpu import attention

        return attention.paged_attention(q, kv_layer, ragged, scale)
    checks.check_paged_attention(q, kv_layer, ragged)
    if q.requires_grad:
        return differentiable.paged_attention(q, kv_layer, ragged, scale)
    return cpu_attention.paged_attention(q, kv_layer, ragged, scale)


def silu_mul(gate_up: Tensor) -> Tensor:
    """silu(gate) * up for gate_up [tokens, 2 * size], the gate first -> [tokens, size]."""
    if on_triton(gate_up) and not gate_up.requires_grad:
        from llama.kernels.gpu import activation

        return activation.silu_mul(gate_up)
    checks.check_silu_mul(gate_up)
    if gate_up.requires_grad:
        return differentiable.silu_mul(gate_up)
    return cpu_activation.silu_mul(gate_up)


def quantized_matmul(x: Tensor, weight: QuantizedWeight) -> Tensor:
    """x W^T with W as `QuantizedWeight` defines it: x [tokens, K] -> [tokens, N] in x.dtype.

    Sums in at least float32; for more than 32 tokens in bfloat16, a CPU with AMX rounds W to bfloat16. On CUDA, for up
    to 64 tokens, a row depends neither on the other rows nor on their number.
    """
    if x.dim() != 2 or x.shape[1] != weight.shape[1] or x.device != weight.codes.device:
        raise checks.refuse("quantized_matmul", x=x, codes=weight.codes)
    if on_triton(x):
        from llama.kernels.gpu import matmul

        return matmul.quantized_matmul(x, weight)
    return cpu_matmul.quantized_matmul(x, weight)


def lora_shrink(x: Tensor, a: Tensor, adapters: TokenAdapters) -> Tensor:
    """The first half of y += B (A x): x [tokens, in], a [adapters, slices, rank, in] -> h, for `lora_expand` alone.

    `slices` are modules that are fused into one matmul (q, k, v). A token of adapter index i reads a[i - 1].
    """
    if a.dim() != 4 or x.dim() != 2 or x.shape[1] != a.shape[3] or x.dtype != a.dtype:
        raise checks.refuse("lora_shrink", x=x, a=a)
    if len(adapters.indices) != x.shape[0]:
        raise checks.refuse("lora_shrink", x=x, indices=adapters.indices)
    if on_triton(x):
        from llama.kernels.gpu import lora

        return lora.lora_shrink(x, a, adapters)
    return cpu_lora.lora_shrink(x, a, adapters)


def lora_embedding(token_ids: Tensor, a: Tensor, adapters: TokenAdapters) -> Tensor:
    """`lora_shrink` of one-hot tokens: token_ids int64 [tokens], a [adapters, vocab, rank] -> h."""
    if a.dim() != 3 or token_ids.shape != adapters.indices.shape or token_ids.dtype != int64:
        raise checks.refuse("lora_embedding", token_ids=token_ids, a=a, indices=adapters.indices)
    if on_triton(a):
        from llama.kernels.gpu import lora

        return lora.lora_embedding(token_ids, a, adapters)
    return cpu_lora.lora_embedding(token_ids, a, adapters)


def lora_expand(h: Tensor, y: Tensor, b: Tensor, adapters: TokenAdapters, slice_starts: tuple[int, ...]) -> None:
    """The second half, in place: y [tokens, out] += B h, b [adapters, out, rank].

    Slice i owns the columns slice_starts[i] : slice_starts[i + 1] of y. Rows without an adapter keep their bits.
    """
    if b.dim() != 3 or y.shape != (len(adapters.indices), b.shape[1]) or y.dtype != b.dtype:
        raise checks.refuse("lora_expand", h=h, y=y, b=b)
    if h.shape[1:] != (len(slice_starts) - 1, b.shape[2]) or slice_starts[0] != 0 or slice_starts[-1] != b.shape[1]:
        raise checks.refuse("lora_expand", h=h, b=b)
    if on_triton(y):
        from llama.kernels.gpu import lora

        lora.lora_expand(h, y, b, adapters, slice_starts)
    else:
        cpu_lora.lora_expand(h, y, b, adapters, slice_starts)


def sample(logits: Tensor, rows: SamplerRows, state: SamplerState | None = None) -> Sampled:
    """Draw one token per row of logits [rows, vocab]; count it in `state` where the row has a penalty.

    The order of the rules and their formulas are told in `llama.kernels.cpu.sampling`. `state` may be None where no row
    has a penalty. A row with a NaN or without one finite logit is marked bad.
    """
    if logits.dim() != 2 or logits.shape[0] != len(rows):
        raise checks.refuse("sample", logits=logits, penalty_rows=rows.penalty_rows)
    if on_triton(logits):
        from llama.kernels.gpu import sampling

        return sampling.sample(logits, rows, state)
    return cpu_sampling.sample(logits, rows, state)


def token_logprobs(logits: Tensor, token_ids: Tensor, num_top: int) -> Logprobs[Tensor]:
    """Log-probabilities of token_ids [rows] int64 and of the num_top best tokens under logits [rows, vocab].

    log-softmax in float32 (float64 for float64). The rank is 1 + the number of tokens with a strictly greater logit.
    """
    if logits.dim() != 2 or token_ids.shape != logits.shape[:1]:
        raise checks.refuse("token_logprobs", logits=logits, token_ids=token_ids)
    if not 0 <= num_top <= logits.shape[1]:
        raise ValueError(f"token_logprobs: num_top must be in [0, {logits.shape[1]}], got {num_top}")
    if on_triton(logits):
        from llama.kernels.gpu import sampling

        return sampling.token_logprobs(logits, token_ids, num_top)
    return cpu_sampling.token_logprobs(logits, token_ids, num_top)
