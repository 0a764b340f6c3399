"""The ops that the model is made of. Each checks its tensors and then takes the Triton kernel (CUDA tensors, or every
tensor under TRITON_INTERPRET=1) or its plain PyTorch twin in `llama.kernels.cpu`. Triton is imported on first use.

Nothing here knows a model, a request or a configuration: tensors, integers and floats only.
"""

import os

from torch import Tensor, float32, int32, int64

from llama.kernels import cpu
from llama.kernels.cpu.layout import StepPlan
from llama.kernels.cpu.lora import LoraPlan
from llama.kernels.types import Logprobs, Sampled, SamplerRows, SamplerState

# Triton itself reads this once, when it is imported: a process is interpreted or it is not.
_INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"


def _on_triton(x: Tensor) -> bool:
    return _INTERPRETED or x.is_cuda


def _refuse(op: str, **tensors: Tensor) -> ValueError:
    told = ", ".join(f"{name} {str(t.dtype)[6:]} {list(t.shape)}" for name, t in tensors.items())
    return ValueError(f"{op}: shapes or dtypes do not fit together: {told}")


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x / sqrt(mean(x^2) + eps) * weight over the last dimension, x [tokens, hidden].

    Statistics in float32 (float64 for float64); the normed value is rounded to x.dtype before the weight multiplies it,
    as Hugging Face's Llama does.
    """
    if x.dim() != 2 or x.shape[1:] != weight.shape or x.dtype != weight.dtype:
        raise _refuse("rms_norm", x=x, weight=weight)
    if _on_triton(x):
        from llama.kernels.gpu import norm

        return norm.rms_norm(x, weight, eps)
    return cpu.rms_norm(x, weight, eps)


def add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """-> (rms_norm(summed), summed) with summed = x + residual in x.dtype: the residual stream's next value."""
    shape, dtype = x.shape, x.dtype
    fits = len(shape) == 2 and shape[1:] == weight.shape and shape == residual.shape
    if not fits or not dtype == residual.dtype == weight.dtype:
        raise _refuse("add_rms_norm", x=x, residual=residual, weight=weight)
    if _on_triton(x):
        from llama.kernels.gpu import norm

        return norm.add_rms_norm(x, residual, weight, eps)
    return cpu.add_rms_norm(x, residual, weight, eps)


def rope_and_store(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cos_sin: Tensor,
    slots: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    *,
    plan: StepPlan | None = None,
) -> Tensor:
    """Rotate q and k, write k and v into the cache, -> rotated q [tokens, heads, head_dim].

    q [tokens, heads, head_dim], k and v [tokens, kv_heads, head_dim] may be strided views with a contiguous last
    dimension; none of them is modified. cos_sin [tokens, head_dim] float32 holds cosines, then sines, of each token's
    position. The rotation pairs dimension i with i + head_dim / 2 and computes in at least float32. slots [tokens]
    int64 are flat places in the caches [num_blocks, block_size, kv_heads, head_dim]; -1 = the token is not stored.
    """
    tokens, _, head_dim = q.shape
    k_shape, cache_shape = k.shape, k_cache.shape
    if k_shape != v.shape or k_shape[0] != tokens or k_shape[2] != head_dim or k_shape[1:] != cache_shape[2:]:
        raise _refuse("rope_and_store", q=q, k=k, v=v, k_cache=k_cache)
    if cache_shape != v_cache.shape or len(slots) != tokens or cos_sin.shape != (tokens, head_dim):
        raise _refuse("rope_and_store", q=q, cos_sin=cos_sin, slots=slots, k_cache=k_cache, v_cache=v_cache)
    if cos_sin.dtype != float32 or slots.dtype != int64 or q.dtype != k_cache.dtype:
        raise _refuse("rope_and_store", q=q, cos_sin=cos_sin, slots=slots, k_cache=k_cache)
    if _on_triton(q):
        from llama.kernels.gpu import rope

        return rope.rope_and_store(q, k, v, cos_sin, slots, k_cache, v_cache)
    return cpu.rope_and_store(q, k, v, cos_sin, slots, k_cache, v_cache, plan=plan)


def plan_step(
    block_tables: Tensor,
    query_starts: Tensor,
    context_lens: Tensor,
    slots: Tensor,
    cos_sin: Tensor,
    *,
    num_decodes: int,
    block_size: int,
) -> StepPlan | None:
    """What `rope_and_store` and `paged_attention` of every layer need to know of one step, worked out once.

    None where the kernels read the tensors themselves. A plan may be left away, at the price of its work in each layer.
    """
    if _on_triton(slots):
        return None
    sizes = {"num_decodes": num_decodes, "block_size": block_size}
    return cpu.plan_step(block_tables, query_starts, context_lens, slots, cos_sin, **sizes)


def paged_attention(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    block_tables: Tensor,
    query_starts: Tensor,
    context_lens: Tensor,
    *,
    num_decodes: int,
    max_query_len: int,
    max_context_len: int,
    scale: float,
    plan: StepPlan | None = None,
) -> Tensor:
    """Causal attention of flat, ragged queries over paged K and V -> [tokens, heads, head_dim].

    q [tokens, heads, head_dim]; sequence s owns tokens query_starts[s] : query_starts[s + 1] (int32 [seqs + 1]), the
    last of its context_lens[s] (int32 [seqs]) tokens, whose K and V lie in the blocks block_tables[s] (int32
    [seqs, max_blocks]) of the caches [num_blocks, block_size, kv_heads, head_dim]. Query j of n sees the first
    context - n + j + 1 keys. The first `num_decodes` sequences have one query each. Softmax in at least float32.
    Nothing past a sequence's context can change the result, NaN included. `plan` is `plan_step` of this step.
    """
    q_shape, cache_shape, num_seqs = q.shape, k_cache.shape, len(context_lens)
    if cache_shape != v_cache.shape or q_shape[2] != cache_shape[3] or q_shape[1] % cache_shape[2]:
        raise _refuse("paged_attention", q=q, k_cache=k_cache, v_cache=v_cache)
    if len(block_tables) != num_seqs or len(query_starts) != num_seqs + 1 or q.dtype != k_cache.dtype:
        raise _refuse("paged_attention", q=q, k_cache=k_cache, block_tables=block_tables, context_lens=context_lens)
    if not block_tables.dtype == query_starts.dtype == context_lens.dtype == int32:
        raise _refuse(
            "paged_attention", block_tables=block_tables, query_starts=query_starts, context_lens=context_lens
        )
    if not _on_triton(q):
        return cpu.paged_attention(
            q,
            k_cache,
            v_cache,
            block_tables,
            query_starts,
            context_lens,
            num_decodes=num_decodes,
            max_query_len=max_query_len,
            max_context_len=max_context_len,
            scale=scale,
            plan=plan,
        )
    from llama.kernels.gpu import attention

    return attention.paged_attention(
        q,
        k_cache,
        v_cache,
        block_tables,
        query_starts,
        context_lens,
        num_decodes=num_decodes,
        max_query_len=max_query_len,
        max_context_len=max_context_len,
        scale=scale,
    )


def silu_mul(gate_up: Tensor) -> Tensor:
    """silu(gate) * up for gate_up [tokens, 2 * size], the gate first -> [tokens, size]."""
    if gate_up.dim() != 2 or gate_up.shape[1] % 2:
        raise _refuse("silu_mul", gate_up=gate_up)
    if _on_triton(gate_up):
        from llama.kernels.gpu import activation

        return activation.silu_mul(gate_up)
    return cpu.silu_mul(gate_up)


def plan_lora(adapter_slots: Tensor) -> LoraPlan:
    """What every module's adapters need to know of one step: adapter_slots int32 [tokens], 0 = the base model alone."""
    if adapter_slots.dim() != 1 or adapter_slots.dtype != int32:
        raise _refuse("plan_lora", adapter_slots=adapter_slots)
    return LoraPlan(adapter_slots) if _on_triton(adapter_slots) else cpu.plan_lora(adapter_slots)


def lora_shrink(x: Tensor, a: Tensor, plan: LoraPlan) -> Tensor:
    """The first half of y += B (A x): x [tokens, in], a [slots, slices, rank, in] -> h, for `lora_expand` alone.

    `slices` are modules that are fused into one matmul (q, k, v). Slot s of a token reads a[s - 1].
    """
    if a.dim() != 4 or x.dim() != 2 or x.shape[1] != a.shape[3] or x.dtype != a.dtype:
        raise _refuse("lora_shrink", x=x, a=a)
    if plan.slots.shape[0] != x.shape[0]:
        raise _refuse("lora_shrink", x=x, slots=plan.slots)
    if _on_triton(x):
        from llama.kernels.gpu import lora

        return lora.lora_shrink(x, a, plan)
    return cpu.lora_shrink(x, a, plan)


def lora_embedding(token_ids: Tensor, a: Tensor, plan: LoraPlan) -> Tensor:
    """`lora_shrink` of one-hot tokens: token_ids int64 [tokens], a [slots, vocab, rank] -> h."""
    if a.dim() != 3 or token_ids.shape != plan.slots.shape or token_ids.dtype != int64:
        raise _refuse("lora_embedding", token_ids=token_ids, a=a, slots=plan.slots)
    if _on_triton(a):
        from llama.kernels.gpu import lora

        return lora.lora_embedding(token_ids, a, plan)
    return cpu.lora_embedding(token_ids, a, plan)


def lora_expand(h: Tensor, y: Tensor, b: Tensor, plan: LoraPlan, slice_starts: tuple[int, ...]) -> None:
    """The second half, in place: y [tokens, out] += B h, b [slots, out, rank].

    Slice i owns the columns slice_starts[i] : slice_starts[i + 1] of y. Rows of slot 0 keep their bits.
    """
    if b.dim() != 3 or y.shape != (plan.slots.shape[0], b.shape[1]) or y.dtype != b.dtype:
        raise _refuse("lora_expand", h=h, y=y, b=b)
    if h.shape[1:] != (len(slice_starts) - 1, b.shape[2]) or slice_starts[0] != 0 or slice_starts[-1] != b.shape[1]:
        raise _refuse("lora_expand", h=h, b=b)
    if _on_triton(y):
        from llama.kernels.gpu import lora

        lora.lora_expand(h, y, b, plan, slice_starts)
    else:
        cpu.lora_expand(h, y, b, plan, slice_starts)


def sample(logits: Tensor, rows: SamplerRows, state: SamplerState | None = None) -> Sampled:
    """Draw one token per row of logits [rows, vocab]; count it in `state` where the row has a slot.

    The order of the rules and their formulas are told in `llama.kernels.cpu.sampling`. `state` may be None where no row
    has a penalty. A row with a NaN or without one finite logit is marked bad.
    """
    if logits.dim() != 2 or logits.shape[0] != len(rows):
        raise _refuse("sample", logits=logits, slots=rows.slots)
    if _on_triton(logits):
        from llama.kernels.gpu import sampling
    else:
        from llama.kernels.cpu import sampling
    return sampling.sample(logits, rows, state)


def token_logprobs(logits: Tensor, token_ids: Tensor, num_top: int) -> Logprobs:
    """Log-probabilities of token_ids [rows] int64 and of the num_top best tokens under logits [rows, vocab].

    log-softmax in float32 (float64 for float64). The rank is 1 + the number of tokens with a strictly greater logit.
    """
    if logits.dim() != 2 or token_ids.shape != logits.shape[:1]:
        raise _refuse("token_logprobs", logits=logits, token_ids=token_ids)
    if not 0 <= num_top <= logits.shape[1]:
        raise ValueError(f"token_logprobs: num_top must be in [0, {logits.shape[1]}], got {num_top}")
    if _on_triton(logits):
        from llama.kernels.gpu import sampling
    else:
        from llama.kernels.cpu import sampling
    return sampling.token_logprobs(logits, token_ids, num_top)
