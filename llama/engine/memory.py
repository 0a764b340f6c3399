"""How many KV blocks fit into the memory that is really free, and what steps need of it beside them."""

import logging
import time
from collections.abc import Callable
from dataclasses import replace
from hashlib import blake2b

import torch

from llama.api.errors import ParameterError
from llama.api.params import MAX_LOGPROBS
from llama.engine.budget import blocks_in, free_cpu_bytes, kv_bytes_on_cpu
from llama.engine.config import EngineConfig
from llama.engine.graphs import GRAPH_BYTES
from llama.kernels import ops
from llama.kernels.types import LOGPROBS_PROCESSED, MOST_RUN_ROWS, Runs, SamplerRows, SamplerState, wide_dtype
from llama.model.autocast import own_dtype
from llama.model.batch import Batch
from llama.model.fixed_rows import fix_rows
from llama.model.fused import fuse
from llama.model.kv_cache import KVCache
from llama.model.transformer import Transformer

logger = logging.getLogger(__name__)

# Logits of a prompt are scored in pieces: a full [tokens, vocab] tensor of a long prompt would take gigabytes. Each
# piece reads the head's weight once, which is what it costs on a GPU.
SCORED_LOGITS_BYTES = {"cpu": 32 << 20, "cuda": 256 << 20}


def free_cuda_bytes(device: torch.device, utilization: float) -> int:
    """What `utilization` of the device leaves beside all that is allocated now."""
    free, total = torch.cuda.mem_get_info(device)
    return int(total * utilization) - (total - free)


def num_scored_rows(vocab_size: int, device: torch.device) -> int:
    """Tokens of a prompt that are scored in one piece."""
    return max(1, SCORED_LOGITS_BYTES.get(device.type, SCORED_LOGITS_BYTES["cpu"]) // (8 * vocab_size))


def _rows_with_everything(count: int, vocab_size: int, device: torch.device, dtype: torch.dtype) -> SamplerRows:
    """Rows to sample that use every rule and want log-probabilities, each with a penalty state of its own."""
    wide = wide_dtype(dtype)

    def full(value: float, dtype: torch.dtype = wide) -> torch.Tensor:
        return torch.full((count,), value, dtype=dtype, device=device)

    return SamplerRows(
        penalty_rows=torch.arange(count, dtype=torch.int32, device=device),
        keys=torch.zeros(count, 2, dtype=torch.int32, device=device),
        temperature=full(1.0),
        top_p=full(0.9),
        top_k=full(max(1, vocab_size // 2), torch.int32),
        min_p=full(0.001),
        repetition_penalty=full(1.1),
        frequency_penalty=full(0.1),
        presence_penalty=full(0.1),
        logprobs_modes=full(LOGPROBS_PROCESSED, torch.int8),
        mask=torch.full((count, -(-vocab_size // 32)), -1, dtype=torch.int32, device=device),
        num_logprobs=min(MAX_LOGPROBS, vocab_size),
        any_penalty=True,
        any_filter=True,
        any_processed=True,
    )


def _first_alone(batch: Batch, num_blocks: int) -> Batch:
    """The batch's first token as a prompt, whose table has so many blocks."""
    return replace(
        batch,
        **{name: getattr(batch, name)[:1] for name in ("token_ids", "positions", "slots")},
        block_tables=batch.block_tables.new_zeros(1, num_blocks),
        query_starts=torch.arange(2, dtype=torch.int32, device=batch.slots.device),
        context_lens=torch.ones_like(batch.context_lens[:1]),
        num_decodes=0,
    )


@own_dtype
@torch.inference_mode()
def worst_step(model: Transformer, config: EngineConfig, *, is_decode: bool) -> None:
    """A step as large as any: one prompt of the whole budget, or as many decodes as tokens can be drawn, and each of
    these drawn by every rule.

    How much memory attention takes depends on the number of tokens and not on what they see: all K and V are
    read from a single block, and nothing is stored.
    """
    num_samples, block_size = config.most_samples, config.block_size
    device, vocab_size = model.device, model.config.vocab_size
    kv = make_kv_cache(model, config, 1)
    kv.data.zero_()
    tokens = num_samples if is_decode else config.token_budget
    query_len, most_of_run = (1, run_len(model, config)) if is_decode else (tokens, 1)
    num_blocks = config.blocks_per_sequence if is_decode else -(-query_len // block_size)  # decodes may be split
    if isinstance(model.fixed, Runs):
        most_of_run = run_len(model, config)
        query_len, num_blocks = min(query_len, most_of_run), config.blocks_per_sequence
    seqs = -(-tokens // query_len)
    batch = Batch(
        token_ids=torch.zeros(tokens, dtype=torch.int64, device=device),
        positions=torch.zeros(tokens, dtype=torch.int64, device=device),
        block_tables=torch.zeros(seqs, num_blocks, dtype=torch.int32, device=device),
        query_starts=torch.arange(seqs + 1, dtype=torch.int32, device=device).mul_(query_len).clamp_(max=tokens),
        context_lens=torch.full((seqs,), query_len, dtype=torch.int32, device=device),
        slots=torch.full((tokens,), -1, dtype=torch.int64, device=device),
        num_decodes=seqs if query_len == most_of_run == 1 else 0,
        block_size=block_size,
        run_len=most_of_run,
    )
    if not is_decode and not isinstance(model.fixed, Runs):
        for most in (1, config.blocks_per_sequence):  # few queries have kernels of their own behind long contexts
            model.hidden(_first_alone(batch, most), kv)
    if is_decode and config.fused_decode:  # kernels of steps of decodes alone; of such as have many tokens of prompts
        for other in (replace(batch, is_disjoint=True), replace(batch, is_plain=True)):
            model.hidden(other, kv)
    hidden = model.hidden(batch, kv)
    logits = model.head(hidden, batch, torch.zeros(num_samples, dtype=torch.int64, device=device))
    state = SamplerState(config.max_num_seqs, vocab_size, device)
    apart = state  # behind drafts each sample has one of its own
    if num_samples > config.max_num_seqs:
        apart = state.copy_of(torch.zeros(num_samples, dtype=torch.int64, device=device))
    everything = _rows_with_everything(num_samples, vocab_size, device, model.dtype)
    ops.sample(logits, everything, apart)
    ops.sample(logits, replace(everything, mask=None, any_penalty=False), apart)  # kernels for logits as they came
    if not is_decode:
        scored = torch.zeros(num_scored_rows(vocab_size, device), dtype=torch.int64, device=device)
        ops.token_logprobs(model.head(hidden, batch, scored), scored, min(MAX_LOGPROBS, vocab_size))


def warm_up(model: Transformer, config: EngineConfig) -> None:
    """Compile what steps may need, where none is measured: the worst one, but small."""
    started = time.monotonic()
    num_seqs, num_tokens = min(config.max_num_seqs, 2), min(config.token_budget, 128)
    small = replace(config, max_num_seqs=num_seqs, max_num_batched_tokens=num_tokens)
    for is_decode in (False, True):
        worst_step(model, small, is_decode=is_decode)
    logger.info("kernels made ready in %.1f s", time.monotonic() - started)


def run_len(model: Transformer, config: EngineConfig) -> int:
    """`Ragged.run_len` of a recorded step with drafts, and of every step where the model's rows are fixed. 1: too many
    rows for one tile, or no drafts; each token of a run is a decode of its own then."""
    if isinstance(model.fixed, Runs):
        return model.fixed.most
    if config.speculation is None:
        return 1
    longest = 1 << config.speculation.num_speculative_tokens.bit_length()
    group = model.config.num_attention_heads // model.config.num_key_value_heads
    return longest if longest * group <= MOST_RUN_ROWS else 1


def kv_dtype(model: Transformer, config: EngineConfig) -> torch.dtype:
    """What kv_cache_dtype means for this model; uint8 stands for float8 e4m3. Raises ParameterError."""
    if config.kv_cache_dtype.startswith("fp8"):
        return torch.uint8
    if config.kv_cache_dtype == "bfloat16" and model.dtype != torch.bfloat16:
        told = f"auto or fp8 for a model in {str(model.dtype)[6:]}, got 'bfloat16'"
        raise ParameterError(f"kv_cache_dtype must be {told}", "kv_cache_dtype")
    return model.dtype


def kv_rounding(model: Transformer, config: EngineConfig) -> str:
    """Tells caches apart that hold other numbers for the same keys and values."""
    dtype, scales = kv_dtype(model, config), model.kv_scales
    if dtype != torch.uint8 or scales is None:
        return str(dtype)
    return f"{dtype} {blake2b(scales.cpu().numpy().tobytes(), digest_size=16).hexdigest()}"


def make_kv_cache(model: Transformer, config: EngineConfig, num_blocks: int) -> KVCache:
    dtype = kv_dtype(model, config)
    scales = model.kv_scales if dtype == torch.uint8 else None
    return KVCache(model.local_config, num_blocks, config.block_size, dtype=dtype, device=model.device, scales=scales)


def peak_cuda_bytes(device: torch.device, run: Callable[[], None]) -> int:
    """What the allocator takes from the device at most while `run` runs, beside what it had. Kernels stay compiled."""
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_reserved(device)
    run()
    torch.cuda.synchronize(device)
    peak = torch.cuda.max_memory_reserved(device) - before
    torch.cuda.empty_cache()
    return peak


def bytes_of_steps(model: Transformer, config: EngineConfig) -> int:
    """Memory that steps take on a CUDA device. The graphs of decodes keep theirs to themselves."""
    started = time.monotonic()
    with torch.cuda.device(model.device):
        total = peak_cuda_bytes(model.device, lambda: worst_step(model, config, is_decode=False))
        if not config.enforce_eager:
            total += peak_cuda_bytes(model.device, lambda: worst_step(model, config, is_decode=True))
            logits = config.most_samples * model.config.vocab_size  # between model and sampler
            total += logits * model.dtype.itemsize + GRAPH_BYTES
    logger.info("memory profile: steps take up to %.2f GiB (%.2f s)", total / 2**30, time.monotonic() - started)
    return total


def fitting_blocks(model: Transformer, config: EngineConfig, draft: Transformer | None = None) -> int:
    """Blocks that fit, each with the K and V of both models, but no more than all sequences together can fill.
    MemoryError if none does."""
    if config.deterministic and model.fixed is None:
        fix_rows(model)  # steps take other memory then
    if config.fused_decode:
        fuse(model)
    if model.device.type == "cuda":
        # Measured first: kernels and libraries that it loads take memory too, and are then among what is not free.
        steps = bytes_of_steps(model, config)
        free = free_cuda_bytes(model.device, config.gpu_memory_utilization) - steps
        share = f"{config.gpu_memory_utilization:.0%} of the device"
    else:
        free, share = (
            kv_bytes_on_cpu(free_cpu_bytes(), config.cpu_memory_utilization) // model.shard.size,
            f"{config.cpu_memory_utilization:.0%} of the free memory, caches apart",
        )
    per_block = KVCache.bytes_per_block(model.local_config, config.block_size, kv_dtype(model, config))
    if draft is not None:
        per_block += KVCache.bytes_per_block(draft.config, config.block_size, draft.dtype)
    blocks = blocks_in(free, per_block, config)
    if blocks < 1:
        raise MemoryError(f"one KV block takes {per_block} bytes, but only {max(0, free)} are free ({share})")
    logger.info(
        "KV cache: %d blocks of %d tokens, %.2f GiB (%s would hold %d)",
        blocks,
        config.block_size,
        blocks * per_block / 2**30,
        share,
        free // per_block,
    )
    return blocks
