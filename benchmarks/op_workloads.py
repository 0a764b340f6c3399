"""What benchmarks/ops.py times: each op at the shapes of Llama 3.1 8B, its bytes and operations, and its peers.

Bytes count each input read once and each output written once: what the op must move, not what a kernel happens to.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.bias import causal_lower_right

from benchmarks.device import Call
from benchmarks.random_models import KINDS, num_bytes, random_weight
from llama.kernels import ops
from llama.kernels.cpu.e4m3 import to_e4m3
from llama.kernels.types import LOGPROBS_OFF, CosSin, KVLayer, Ragged, SamplerRows, SamplerState
from llama.model.weights.quantised import SCHEMES


@dataclass(frozen=True)
class Setting:
    """Where and how large: the shapes of Llama 3.1 8B, or some that the interpreter gets through."""

    device: torch.device
    dtype: torch.dtype
    tiny: bool

    def pick(self, full: list, tiny: list) -> list:
        return tiny if self.tiny else full

    def randn(self, *shape: int, seed: int) -> Tensor:
        generator = torch.Generator(self.device).manual_seed(seed)
        return torch.randn(*shape, generator=generator, device=self.device).to(self.dtype)

    def peer(self, name: str, function: Callable, *inputs: object) -> dict[str, Call]:
        """A peer as it is, and as torch.compile makes it; the latter on a GPU alone, where its time says something."""
        if self.device.type != "cuda":
            return {name: partial(function, *inputs)}
        compiled = torch.compile(function, dynamic=False)
        return {name: partial(function, *inputs), f"{name}, compiled": partial(compiled, *inputs)}

    @property
    def heads(self) -> tuple[int, int, int]:
        """Query heads, K/V heads, head_dim."""
        return (4, 2, 32) if self.tiny else (32, 8, 128)


@dataclass(frozen=True)
class Workload:
    op: str
    shape: dict[str, int | str]
    bytes: int
    flops: int
    make: Callable[[int], dict[str, Call]]  # seed -> candidates over one set of inputs; "ours" is one
    against: list[str] = field(default_factory=lambda: ["copy"])  # which ceiling it should reach


def _add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    summed = x + residual
    return F.rms_norm(summed, weight.shape, weight, 1e-5), summed


def norms(setting: Setting) -> Iterator[Workload]:
    hidden = setting.pick([4096], [96])[0]
    for tokens in setting.pick([1, 64, 256, 2048, 16384], [2]):
        row = tokens * hidden * setting.dtype.itemsize

        def inputs(seed: int, tokens: int = tokens) -> tuple[Tensor, Tensor, Tensor]:
            x, residual = setting.randn(2, tokens, hidden, seed=seed)
            return x, residual, setting.randn(hidden, seed=seed + 1)

        def plain(seed: int, inputs: Callable = inputs) -> dict[str, Call]:
            x, _, weight = inputs(seed)
            ours = {"ours": lambda: ops.rms_norm(x, weight, 1e-5)}
            return ours | setting.peer("F.rms_norm", F.rms_norm, x, (hidden,), weight, 1e-5)

        def fused(seed: int, inputs: Callable = inputs) -> dict[str, Call]:
            x, residual, weight = inputs(seed)

            ours = {"ours": lambda: ops.add_rms_norm(x, residual, weight, 1e-5)}
            return ours | setting.peer("add, F.rms_norm", _add_rms_norm, x, residual, weight)

        shape = {"tokens": tokens, "hidden": hidden}
        yield Workload("rms_norm", shape, 2 * row, 4 * tokens * hidden, plain)
        yield Workload("add_rms_norm", shape, 4 * row, 5 * tokens * hidden, fused)


def _silu_mul(gate_up: Tensor) -> Tensor:
    gate, up = gate_up.chunk(2, dim=-1)
    return F.silu(gate) * up


def activation(setting: Setting) -> Iterator[Workload]:
    size = setting.pick([14336], [160])[0]

    for tokens in setting.pick([1, 64, 256, 2048, 16384], [2]):

        def make(seed: int, tokens: int = tokens) -> dict[str, Call]:
            gate_up = setting.randn(tokens, 2 * size, seed=seed)
            ours = {"ours": lambda: ops.silu_mul(gate_up)}
            return ours | setting.peer("F.silu, mul", _silu_mul, gate_up)

        moved = 3 * tokens * size * setting.dtype.itemsize
        yield Workload("silu_mul", {"tokens": tokens, "size": size}, moved, 5 * tokens * size, make)


def _rope_and_store(q: Tensor, k: Tensor, v: Tensor, cos_sin: CosSin, kv_layer: KVLayer, ragged: Ragged) -> Tensor:
    half = q.shape[2] // 2
    cos, sin = cos_sin[0][..., half:], cos_sin[1][..., half:]

    def rotated(x: Tensor) -> Tensor:
        first, second = x.float().chunk(2, dim=-1)
        return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1).to(x.dtype)

    kv_layer.k.flatten(0, 1).index_copy_(0, ragged.slots, rotated(k))
    kv_layer.v.flatten(0, 1).index_copy_(0, ragged.slots, v)
    return rotated(q)


def rope(setting: Setting) -> Iterator[Workload]:
    heads, kv_heads, head_dim = setting.heads
    block_size = 16

    for tokens in setting.pick([1, 64, 256, 2048, 16384], [3]):

        def make(seed: int, tokens: int = tokens) -> dict[str, Call]:
            qkv = setting.randn(tokens, heads + 2 * kv_heads, head_dim, seed=seed)
            blocks = -(-tokens // block_size) + 1
            caches = [setting.randn(blocks, block_size, kv_heads, head_dim, seed=seed + i) for i in (1, 2)]
            angles = torch.rand(tokens, head_dim // 2, device=setting.device) * 6.28
            slots = torch.randperm(blocks * block_size, device=setting.device)[:tokens]
            signed = torch.cat((-angles, angles), 1)[:, None]
            nobody = torch.zeros(1, dtype=torch.int32, device=setting.device)
            ragged = Ragged(nobody[:0, None], nobody, nobody[:0], slots, num_decodes=0, block_size=block_size)
            q, k, v = qkv.split([heads, kv_heads, kv_heads], dim=1)
            inputs = (q, k, v, (signed.cos(), signed.sin()), KVLayer(*caches), ragged)
            ours = {"ours": lambda: ops.rope_and_store(*inputs)}
            return ours | setting.peer("rotate, index_copy", _rope_and_store, *inputs)

        moved = tokens * (2 * (heads + 2 * kv_heads) * head_dim * setting.dtype.itemsize + 4 * head_dim + 8)
        shape = {"tokens": tokens, "heads": f"{heads}/{kv_heads}", "head_dim": head_dim}
        yield Workload("rope_and_store", shape, moved, 3 * tokens * (heads + kv_heads) * head_dim, make)


def _cache(setting: Setting, shape: tuple[int, ...], seed: int, is_fp8: bool) -> KVLayer:
    """In fp8 each layer's largest value lies within the codes, as calibrated scales have it."""
    caches = [setting.randn(*shape, seed=seed + i) for i in (1, 2)]
    if not is_fp8:
        return KVLayer(*caches)
    scales = torch.full((2, shape[2]), 1 / 64, device=setting.device)
    return KVLayer(*(to_e4m3(cache, scale) for cache, scale in zip(caches, scales, strict=True)), scales)


def _paged(
    setting: Setting, batch: int, queries: int, context: int, seed: int, is_fp8: bool = False
) -> tuple[Tensor, Call]:
    """-> q and our call over caches whose blocks lie in no order."""
    heads, kv_heads, head_dim = setting.heads
    block_size = 16
    blocks = -(-context // block_size)
    kv_layer = _cache(setting, (batch * blocks, block_size, kv_heads, head_dim), seed, is_fp8)
    order = torch.randperm(batch * blocks, device=setting.device).to(torch.int32)
    starts = (torch.arange(batch + 1, device=setting.device) * queries).to(torch.int32)
    contexts = torch.full((batch,), context, dtype=torch.int32, device=setting.device)
    q = setting.randn(batch * queries, heads, head_dim, seed=seed)
    ragged = Ragged(
        block_tables=order.view(batch, blocks),
        query_starts=starts,
        context_lens=contexts,
        slots=torch.empty(0, dtype=torch.int64, device=setting.device),
        num_decodes=batch if queries == 1 else 0,
        block_size=block_size,
    )
    return q, partial(ops.paged_attention, q, kv_layer, ragged, head_dim**-0.5)


def _sdpa(setting: Setting, q: Tensor, batch: int, queries: int, context: int, seed: int) -> dict[str, Call]:
    """torch's attention over contiguous K and V: what a cache without pages would allow."""
    _, kv_heads, head_dim = setting.heads
    k, v = (setting.randn(batch, kv_heads, context, head_dim, seed=seed + i) for i in (3, 4))
    q = q.view(batch, queries, -1, head_dim).transpose(1, 2)
    causal: dict[str, object] = {"is_causal": queries == context > 1}
    if 1 < queries < context:
        causal = {"attn_mask": causal_lower_right(queries, context)}

    def run(backend: SDPBackend) -> Tensor:
        with sdpa_kernel(backend):
            return F.scaled_dot_product_attention(q, k, v, enable_gqa=True, **causal)

    backends = {"sdpa cudnn": SDPBackend.CUDNN_ATTENTION, "sdpa flash": SDPBackend.FLASH_ATTENTION}
    if setting.device.type != "cuda":
        backends = {"sdpa math": SDPBackend.MATH}
    return {name: partial(run, backend) for name, backend in backends.items()}


def _attention(setting: Setting, op: str, batch: int, queries: int, context: int, *, is_fp8: bool = False) -> Workload:
    """Peers read a cache of the model's dtype beside one in fp8 too."""
    heads, kv_heads, head_dim = setting.heads

    def make(seed: int) -> dict[str, Call]:
        q, ours = _paged(setting, batch, queries, context, seed, is_fp8)
        return {"ours": ours, **_sdpa(setting, q, batch, queries, context, seed)}

    size = setting.dtype.itemsize
    moved = batch * head_dim * (2 * kv_heads * context * (1 if is_fp8 else size) + 2 * heads * queries * size)
    pairs = queries * context - queries * (queries - 1) // 2  # query and key that see each other
    shape = {
        "batch": batch,
        "queries": queries,
        "context": context,
        "heads": f"{heads}/{kv_heads}",
        "head_dim": head_dim,
    } | ({"cache": "fp8"} if is_fp8 else {})
    against = ["copy"] if queries == 1 else ["matmul"]
    return Workload(op, shape, moved, 4 * batch * heads * head_dim * pairs, make, against)


def decode_attention(setting: Setting) -> Iterator[Workload]:
    sweep = [(1, 1024), (1, 8192), (1, 32768), (1, 131072), (8, 1024), (8, 8192), (32, 1024), (32, 8192), (256, 1024)]
    for batch, context in setting.pick(sweep, [(2, 40)]):
        yield _attention(setting, "decode_attention", batch, 1, context)
    for batch, context in setting.pick([(1, 1024), (1, 131072), (32, 8192)], [(2, 40)]):
        yield _attention(setting, "decode_attention", batch, 1, context, is_fp8=True)


def prefill_attention(setting: Setting) -> Iterator[Workload]:
    whole = [(length, length) for length in (1024, 2048, 8192, 32768, 131072)]
    chunks = [(2048, 32768), (8192, 131072)]
    for queries, context in setting.pick(whole + chunks, [(20, 20), (8, 36)]):
        yield _attention(setting, "prefill_attention", 1, queries, context)
    for queries, context in setting.pick([(2048, 2048), (8192, 131072)], [(8, 36)]):
        yield _attention(setting, "prefill_attention", 1, queries, context, is_fp8=True)


# Of a layer of Llama 3.1 8B, then of the 70B: [out, in].
MATRICES = {
    "8B": [(6144, 4096), (4096, 4096), (28672, 4096), (4096, 14336)],
    "70B": [(10240, 8192), (8192, 8192), (57344, 8192), (8192, 28672)],
}


def quantized_matmul(setting: Setting) -> Iterator[Workload]:
    """Beside the same product with a dense weight."""
    sizes = {"tiny": [(48, 256)]} if setting.tiny else MATRICES
    few, many = setting.pick([1, 16, 64], [3]), setting.pick([2048], [])
    for model, shapes in sizes.items():
        for kind in KINDS:
            is_plain = kind in SCHEMES
            if model == "70B" and not is_plain:
                continue
            for shape in shapes if is_plain else shapes[-2:-1] or shapes:
                for tokens in few + many if model == "8B" else few[:2] + many:
                    yield _product(setting, model, kind, shape, tokens)


def _product(setting: Setting, model: str, kind: str, shape: tuple[int, int], tokens: int) -> Workload:
    rows, columns = shape

    def make(seed: int) -> dict[str, Call]:
        x, dense = setting.randn(tokens, columns, seed=seed), setting.randn(rows, columns, seed=seed + 1) * 0.02
        weight = random_weight(KINDS[kind], shape, device=setting.device, dtype=setting.dtype, seed=seed)
        ours = partial(ops.quantized_matmul, x, weight)
        return {"ours": ours, "F.linear, dense": partial(F.linear, x, dense)}

    moved = num_bytes(KINDS[kind], shape, setting.dtype) + tokens * (rows + columns) * setting.dtype.itemsize
    against = ["matmul"] if tokens > 64 else ["copy"]
    told = {"model": model, "kind": kind, "tokens": tokens, "rows": rows, "columns": columns}
    return Workload("quantized_matmul", told, moved, 2 * tokens * rows * columns, make, against)


# --- sampling


def _rows(setting: Setting, count: int, vocab: int, kind: str) -> tuple[SamplerRows, SamplerState | None]:
    """Rows of one kind; `everything` has every rule at once."""
    everything = kind == "everything"
    integers = {"dtype": torch.int32, "device": setting.device}

    def each(value: float, neutral: float) -> Tensor:
        return torch.full((count,), value if everything else neutral, device=setting.device)

    words = -(-vocab // 32)
    optional = {}
    state = None
    if everything:
        optional = {
            "bias_starts": torch.arange(count + 1, **integers) * 4,
            "bias_ids": torch.arange(4, **integers).repeat(count),
            "bias_values": torch.ones(4 * count, device=setting.device),
            "mask": torch.full((count, words), -1, **integers),
        }
        state = SamplerState(count, vocab, setting.device)
        state.counts[:, ::97] = 1
        state.prompt_mask[:, ::5] = 0x01010101
    rows = SamplerRows(
        penalty_rows=torch.arange(count, **integers) if everything else torch.full((count,), -1, **integers),
        keys=torch.randint(-(2**31), 2**31 - 1, (count, 2), **integers),
        temperature=torch.full((count,), 0.0 if kind == "greedy" else 0.7, device=setting.device),
        top_p=torch.full((count,), 0.9 if kind in ("everything", "top_p") else 1.0, device=setting.device),
        top_k=torch.full((count,), 50 if everything else 0, **integers),
        min_p=each(0.01, 0.0),
        repetition_penalty=each(1.1, 1.0),
        frequency_penalty=each(0.2, 0.0),
        presence_penalty=each(0.2, 0.0),
        logprobs_modes=torch.full((count,), LOGPROBS_OFF, dtype=torch.int8, device=setting.device),
        any_penalty=everything,
        any_filter=kind in ("everything", "top_p"),
        all_greedy=kind == "greedy",
        **optional,
    )
    return rows, state


def _sorting(logits: Tensor, rows: SamplerRows, seen: Tensor, counts: Tensor, allowed: Tensor) -> Tensor:
    """Every rule in the way that needs a sort of the vocabulary, without a loop over rows and without a wait."""
    x = logits.float()
    repetition = rows.repetition_penalty[:, None]
    x = torch.where(seen, torch.where(x > 0, x / repetition, x * repetition), x)
    x = x - rows.frequency_penalty[:, None] * counts - rows.presence_penalty[:, None] * (counts > 0)
    x = x.masked_fill(~allowed, -torch.inf) / rows.temperature[:, None]
    ordered, ids = x.sort(dim=-1, descending=True)
    ordered = torch.where(ordered >= ordered[:, 49:50], ordered, -torch.inf)
    weights = ordered.softmax(-1)
    weights = torch.where(weights >= 0.01 * weights[:, :1], weights, 0.0)
    before = weights.cumsum(-1) - weights
    weights = torch.where(before < rows.top_p[:, None] * weights.sum(-1, keepdim=True), weights, 0.0)
    return ids.gather(1, (weights / torch.empty_like(weights).exponential_()).argmax(-1, keepdim=True))


def _sorting_top_p(logits: Tensor, rows: SamplerRows) -> Tensor:
    ordered, ids = (logits.float() / rows.temperature[:, None]).sort(dim=-1, descending=True)
    weights = ordered.softmax(-1)
    weights = torch.where(weights.cumsum(-1) - weights < rows.top_p[:, None], weights, 0.0)
    return ids.gather(1, (weights / torch.empty_like(weights).exponential_()).argmax(-1, keepdim=True))


def _noise(logits: Tensor, rows: SamplerRows) -> Tensor:
    weights = (logits.float() / rows.temperature[:, None]).softmax(-1)
    return (weights / torch.empty_like(weights).exponential_()).argmax(-1)


def sampling(setting: Setting) -> Iterator[Workload]:
    vocab = setting.pick([128_256], [700])[0]
    for batch in setting.pick([1, 64, 256], [2]):
        for kind in ("greedy", "plain", "top_p", "everything"):

            def make(seed: int, batch: int = batch, kind: str = kind) -> dict[str, Call]:
                # As a model makes them: most tokens lie in a crowd, some far above it.
                logits = setting.randn(batch, vocab, seed=seed) * 2
                logits[:, ::401] += 10
                rows, state = _rows(setting, batch, vocab, kind)
                calls = {"ours": lambda: ops.sample(logits, rows, state)}
                if kind == "greedy":
                    return calls | {"argmax": lambda: logits.argmax(-1)}
                if kind == "plain":
                    return calls | setting.peer("softmax, argmax", _noise, logits, rows)
                if kind == "top_p":
                    return calls | setting.peer("sort", _sorting_top_p, logits, rows)
                seen = torch.rand(batch, vocab, device=setting.device) < 0.02
                return calls | setting.peer("sort", _sorting, logits, rows, seen, state.counts, torch.ones_like(seen))

            moved = batch * vocab * (setting.dtype.itemsize + (4.25 if kind == "everything" else 0))
            shape = {"batch": batch, "vocab": vocab, "rules": kind}
            yield Workload("sample", shape, int(moved), 0, make)


OPS: dict[str, Callable[[Setting], Iterator[Workload]]] = {
    "norm": norms,
    "silu_mul": activation,
    "rope_and_store": rope,
    "decode_attention": decode_attention,
    "prefill_attention": prefill_attention,
    "quantized_matmul": quantized_matmul,
    "sample": sampling,
}
