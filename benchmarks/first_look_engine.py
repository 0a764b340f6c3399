"""Our ops and our engine for the first time on a device: sections of first_look.py.

Only the engine is asked, over token ids: neither tokenizer nor checkpoint is needed.
"""

import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import fields, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from benchmarks.common import summary, timed
from benchmarks.decode_gpu import decoding, finish, prompt_of
from benchmarks.first_look_device import Look, attempt
from benchmarks.op_workloads import OPS
from llama.api.params import SamplingParams
from llama.engine.config import EngineConfig
from llama.engine.engine import Engine
from llama.kernels import ops as ours
from llama.kernels.cpu import activation, norm, rope, sampling
from llama.kernels.gpu.attention import config as attention_config
from llama.kernels.gpu.attention.config import PREFILL_CANDIDATES, PrefillTile
from llama.kernels.types import KVLayer, Ragged, SamplerState
from llama.model.config import ModelConfig
from llama.model.transformer import Transformer
from tests.paged_attention import answer, make_problem, only_slots, rotation
from tests.sampling_rows import make_rows

PROFILED_STEPS = 4
TOP_KERNELS = 24
DRAWS: dict[str, dict[str, Any]] = {
    "greedy": {"temperature": 0.0},
    "plain": {"temperature": 1.0},
    "filtered": {"temperature": 0.7, "top_p": 0.9, "top_k": 50},
    "with 20 log-probabilities": {"temperature": 0.0, "logprobs": 20},
}


def _error(actual: Tensor, expected: Tensor) -> float:
    return ((actual.double() - expected.double()).norm() / expected.double().norm()).item()


def _wrong_tokens(look: Look, vocab: int) -> float:
    """The share of tokens that are not those of the CPU in float64."""
    every = [{"temperature": 0.0}, {}, {"top_k": 50, "top_p": 0.9}, {"top_p": 0.9}, {"min_p": 0.05}]
    rows = make_rows(every, vocab, device=look.device)
    logits = look.randn(len(every), vocab) * 3
    drawn = ours.sample(logits, rows, SamplerState(len(every), vocab, look.device)).token_ids.tolist()
    tensors = {each.name: value for each in fields(rows) if isinstance(value := getattr(rows, each.name), Tensor)}
    moved = {
        name: value.cpu().double() if value.is_floating_point() else value.cpu() for name, value in tensors.items()
    }
    expected = sampling.sample(logits.cpu().double(), replace(rows, **moved), None).token_ids.tolist()
    return sum(a != b for a, b in zip(drawn, expected, strict=True)) / len(every)


def ops(look: Look) -> dict:
    """Each op once: its relative error against PyTorch (of sampling, the share of other tokens), and the seconds that
    it took, compiling included."""
    hidden, size, vocab = (96, 160, 700) if look.is_tiny else (4096, 14336, 128_256)
    x, residual = look.setting.randn(2, 5, hidden, seed=0)
    weight, gate_up = look.randn(hidden), look.randn(5, 2 * size)
    heads, kv_heads, head_dim = look.setting.heads
    shape = {"heads": (heads, kv_heads), "head_dim": head_dim, "dtype": look.dtype, "device": look.device}

    def attention(queries: list[int], contexts: list[int], num_decodes: int) -> float:
        problem = make_problem(queries, contexts, num_decodes=num_decodes, **shape)
        return _error(problem.run(ours.paged_attention), answer(problem))

    def cosine_error() -> float:
        positions = torch.tensor([0, 1, 300, 8191, 131_071], device=look.device)
        frequencies = torch.rand(head_dim, device=look.device)
        pairs = zip(ours.cos_sin(positions, frequencies), rope.cos_sin(positions, frequencies, 1.0), strict=True)
        return max(_error(actual, expected) for actual, expected in pairs)

    def rotation_error() -> float:
        q, k, v = look.randn(5, heads + 2 * kv_heads, head_dim).split([heads, kv_heads, kv_heads], dim=1)
        cos_sin = rotation(torch.rand(5, head_dim // 2, device=look.device) * 6)
        ragged = only_slots(torch.arange(5, device=look.device), 16)
        caches = [
            KVLayer(*torch.zeros(2, 1, 16, kv_heads, head_dim, device=look.device, dtype=look.dtype)) for _ in "ab"
        ]
        actual = ours.rope_and_store(q, k, v, cos_sin, caches[0], ragged)
        expected = rope.rope_and_store(q, k, v, cos_sin, caches[1], ragged)
        return max(_error(actual, expected), _error(caches[0].k, caches[1].k), _error(caches[0].v, caches[1].v))

    scale = 20 if look.is_tiny else 1
    decodes, prompts, mixed = ([length // scale for length in lengths] for lengths in (
        [20, 129, 0, 5000, 300, 64], [300, 2049, 1000], [700, 640, 90]))  # fmt: skip
    calls: dict[str, Callable[[], Any]] = {
        "add_rms_norm": lambda: _error(
            ours.add_rms_norm(x, residual, weight, 1e-5)[0], norm.add_rms_norm(x, residual, weight, 1e-5)[0]
        ),
        "silu_mul": lambda: _error(ours.silu_mul(gate_up), activation.silu_mul(gate_up)),
        "cos_sin": cosine_error,
        "rope_and_store": rotation_error,
        "decode attention": lambda: attention([1] * 6, decodes, 6),
        "prefill attention": lambda: attention([300 // scale, 17, 128 // scale], prompts, 0),
        "prefill in chunks": lambda: attention([7], [9000 // scale], 0),
        "both": lambda: attention([1, 1, 40 // scale], mixed, 2),
        "sample": lambda: _wrong_tokens(look, vocab),
    }
    found = {}
    for name, call in calls.items():
        started = time.monotonic()
        found[name] = [attempt(call), round(time.monotonic() - started, 1)]
        print(name, *found[name], flush=True)
    if failed := [name for name, (told, _) in found.items() if isinstance(told, str) or not told < 0.02]:
        raise RuntimeError(f"{failed} failed, or differ from PyTorch: {found}")
    return found


def _paged(
    look: Look, batch: int, queries: int, context: int, *, block_size: int, heads_first: bool = False
) -> Callable:
    """A call of attention over a cache whose blocks lie in no order. heads_first: a block's heads before its tokens."""
    heads, kv_heads, head_dim = look.setting.heads
    blocks = -(-context // block_size)
    order = (kv_heads, block_size) if heads_first else (block_size, kv_heads)
    caches = [look.setting.randn(batch * blocks, *order, head_dim, seed=i) for i in (1, 2)]
    ragged = Ragged(
        block_tables=torch.randperm(batch * blocks, device=look.device).int().view(batch, blocks),
        query_starts=torch.arange(batch + 1, device=look.device).int() * queries,
        context_lens=torch.full((batch,), context, device=look.device).int(),
        slots=torch.empty(0, dtype=torch.int64, device=look.device),
        num_decodes=batch if queries == 1 else 0,
        block_size=block_size,
    )
    kv_layer = KVLayer(*(cache.transpose(1, 2) if heads_first else cache for cache in caches))
    q = look.randn(batch * queries, heads, head_dim)
    return partial(ours.paged_attention, q, kv_layer, ragged, head_dim**-0.5)


def decode_layout(look: Look) -> dict:
    """Decode attention by block size and order of a block's tokens and heads: share of the copy's bandwidth."""
    _, kv_heads, head_dim = look.setting.heads
    found = {}
    for batch, context in look.setting.pick([(1, 1024), (1, 8192), (1, 131072), (64, 1024), (32, 8192)], [(2, 40)]):
        num_bytes = batch * context * 2 * kv_heads * head_dim * look.dtype.itemsize
        for block_size in (16, 64):
            for heads_first in (False, True):
                name = (
                    f"batch {batch} context {context} block {block_size} {'heads' if heads_first else 'tokens'} first"
                )
                calls = [
                    _paged(look, batch, 1, context, block_size=block_size, heads_first=heads_first)
                    for _ in range(min(24, look.timer.num_sets(num_bytes)))
                ]
                found[name] = attempt(partial(look.share, calls, num_bytes))
                print(name, found[name], flush=True)
    return found


@contextmanager
def _prefill_tile(key: tuple[int, int], tile: PrefillTile) -> Iterator[None]:
    kept = attention_config._PREFILL[key]
    attention_config._PREFILL[key] = tile
    try:
        yield
    finally:
        attention_config._PREFILL[key] = kept


def prefill_tiles(look: Look) -> dict:
    """Prefill attention by tile of rows x keys and block size, beside torch's kernels: us and TFLOP/s. Tensor
    descriptors want blocks that hold a tile's keys."""
    small = {"16x16": PrefillTile(16, 16, 4, 2), "16x16 descriptors": PrefillTile(16, 16, 4, 2, descriptors=True)}
    tiles = small if look.is_tiny else PREFILL_CANDIDATES
    key = (max(64, look.setting.heads[2]), look.dtype.itemsize)
    found: dict[str, Any] = {}

    def record(name: str, flops: int, call: Callable) -> None:
        us = attempt(lambda: look.microseconds([call]))
        found[name] = us if isinstance(us, str) else [us, round(flops / us / 1e6, 1)]
        print(name, found[name], flush=True)

    for workload in OPS["prefill_attention"](look.setting):
        length = workload.shape["context"]
        if workload.shape["queries"] != length or length not in look.setting.pick([2048, 8192, 32768], [20]):
            continue
        if "cache" in workload.shape:  # in fp8, which the calls below are not
            continue
        for block_size in (16, 64, 128):
            call = _paged(look, 1, length, length, block_size=block_size)
            for name, tile in tiles.items():
                if tile.keys <= block_size if tile.descriptors else block_size != 64:
                    with _prefill_tile(key, tile):
                        record(f"{length} block {block_size} tile {name}", workload.flops, call)
        for name, call in workload.make(0).items():
            if name != "ours":
                record(f"{length} {name}", workload.flops, call)
    return found


def _engine(look: Look, **options: int) -> Engine:
    preset = ModelConfig.preset("tiny" if look.is_tiny else "llama-3.1-8b")
    if look.is_tiny:
        preset = replace(preset, num_hidden_layers=1, vocab_size=300)
    model = Transformer(preset, device=look.device, dtype=look.dtype)
    return Engine(model, EngineConfig(enable_prefix_caching=False, **options))


# Parts of our kernels' names, and which node of a step each is. The first one found counts: some are parts of others.
KERNELS = {
    **dict.fromkeys(("scan_kernel", "few_groups_kernel", "count_kernel", "choose_kernel"), "sampler"),
    **dict.fromkeys(("finish_kernel", "logprob_parts_kernel", "logprob_merge_kernel"), "sampler"),
    "_norm_kernel": "norm",
    "_cos_sin_kernel": "cos_sin",
    "_rope_and_store_kernel": "rope",
    "_decode_kernel": "attention",
    "_merge_kernel": "merge",
    "_prefill_kernel": "attention",
    "_merge_chunks_kernel": "merge",
    "_silu_mul_kernel": "silu",
}
# What a library computes between two of them.
PRODUCTS = {
    ("norm", "rope"): "qkv",
    ("attention", "norm"): "o",
    ("merge", "norm"): "o",
    ("norm", "silu"): "gate_up",
    ("silu", "norm"): "down",
    ("norm", "sampler"): "head",
}


def labels(names: Sequence[str]) -> list[str]:
    """Which node of a step each kernel belongs to, in the order in which they ran."""
    own = [next((label for part, label in KERNELS.items() if part in name), None) for name in names]
    before: list[str | None] = []
    behind: list[str | None] = []
    for order, seen in ((own, before), (own[::-1], behind)):
        last = None
        for label in order:
            last = label or last
            seen.append(last)
    pairs = zip(own, before, behind[::-1], strict=True)
    return [label or PRODUCTS.get((first or "", second or ""), "rest") for label, first, second in pairs]


def _floors(look: Look, model: ModelConfig, batch: int, context: int) -> dict[str, float]:
    """Microseconds of a step that a node's weights, or its keys and values, take at the bandwidth of a large copy."""
    heads, kv_heads, dim = model.num_attention_heads, model.num_key_value_heads, model.head_dim
    hidden, size, layers = model.hidden_size, model.intermediate_size, model.num_hidden_layers
    elements = {
        "qkv": layers * (heads + 2 * kv_heads) * dim * hidden,
        "attention": layers * batch * context * 2 * kv_heads * dim,
        "o": layers * heads * dim * hidden,
        "gate_up": layers * 2 * size * hidden,
        "down": layers * size * hidden,
        "head": model.vocab_size * hidden,
    }
    each = look.dtype.itemsize / look.limits["copy_bytes_per_second"] * 1e6
    return {name: number * each for name, number in elements.items()}


def _profiled(look: Look, step: Callable[[], object]) -> dict:
    """Microseconds of each kernel in one step: their sum, the span from first to last, the longest by name."""
    with profile(
        activities=[ProfilerActivity.CUDA if look.device.type == "cuda" else ProfilerActivity.CPU]
    ) as profiled:
        for _ in range(PROFILED_STEPS):
            step()
        look.timer.wait()
    spans = [
        (event.name[:60], event.time_range.start, event.time_range.end)
        for event in profiled.events()
        if look.is_tiny or event.device_type == torch.autograd.DeviceType.CUDA
    ]
    spans.sort(key=lambda span: span[1])
    total, count = Counter[str](), Counter(name for name, *_ in spans)
    nodes: dict[str, list[float]] = {}
    for label, (name, start, end) in zip(labels([name for name, *_ in spans]), spans, strict=True):
        total[name] += end - start
        us, number = nodes.get(label, (0, 0))
        nodes[label] = [us + (end - start) / PROFILED_STEPS, number + 1 / PROFILED_STEPS]
    kernels = [[name, us / PROFILED_STEPS, count[name] / PROFILED_STEPS] for name, us in total.most_common(TOP_KERNELS)]
    span = max(end for *_, end in spans) - min(start for _, start, _ in spans)
    busy = sum(total.values())
    return {"busy_us": busy / PROFILED_STEPS, "span_us": span / PROFILED_STEPS,
            "nodes": len(spans) / PROFILED_STEPS, "by_node": nodes, "kernels": kernels}  # fmt: skip


def step(look: Look) -> dict:
    """Where a decode step of Llama 3.1 8B goes: wall time, and by the profiler each node beside its floor."""
    length, blocks, most = look.setting.pick([16384, 6000, 64], [256, 64, 4])
    engine = _engine(look, max_model_len=length, num_blocks=blocks, max_num_seqs=most)
    cases = [(1, 1000, "greedy"), (1, 8000, "greedy"), *((1, 1000, name) for name in list(DRAWS)[1:])]
    cases += [(64, 1000, "greedy"), (64, 1000, "filtered")]
    rounds = 1 if look.is_tiny else 30
    found = {}

    def measured(batch: int, context: int, draw: str) -> dict[str, Any]:
        with decoding(engine, batch, context, rounds + PROFILED_STEPS + 2, DRAWS[draw]):
            look.timer.wait()
            seconds = timed(lambda: [engine.step() for _ in range(rounds)])
            row = {"wall_ms": seconds / rounds * 1e3, **_profiled(look, engine.step)}
        return row | {"floor_us": _floors(look, engine.runner.model.config, batch, context)}

    for batch, context, draw in look.setting.pick(cases, [(2, 20, "filtered")]):
        name = f"batch {batch} context {context} {draw}"
        row = found[name] = attempt(partial(measured, batch, context, draw))
        if isinstance(row, str):
            print(name, row, flush=True)
            continue
        print(f"{name}: {row['wall_ms']:.3f} ms, {row['nodes']:.0f} nodes, busy {row['busy_us'] / 1e3:.3f} ms")
        for label, (us, count) in row["by_node"].items():
            floor = row["floor_us"].get(label, 0.0)
            print(f"    {us:10.1f} us, floor {floor:8.1f}, {count:6.1f} x {label}")
        for kernel, us, count in row["kernels"]:
            print(f"    {us:10.1f} us {count:6.1f} x {kernel}", flush=True)
    return found


def eager(look: Look) -> dict:
    """What launching a prompt costs the host: a short one is bound by it. Milliseconds, medians."""
    engine = _engine(look, max_model_len=4096, num_blocks=600, max_num_seqs=4)
    launch, spent = engine.runner.launch, []

    def timed_launch(plan: Any) -> Any:
        started = time.perf_counter()
        result = launch(plan)
        spent.append(time.perf_counter() - started)
        return result

    engine.runner.launch = timed_launch
    params = SamplingParams(max_tokens=1, temperature=0, ignore_eos=True)
    found = {}
    for length in look.setting.pick([16, 128, 512, 2048], [16]):

        def once(length: int = length) -> tuple[float, float]:
            """-> milliseconds of the host's, and until the device was done."""
            engine.add(engine.request("prompt", prompt_of(length, engine.runner.vocab_size), params))
            look.timer.wait()
            spent.clear()
            total = timed(lambda: (finish(engine), look.timer.wait()))
            return sum(spent) * 1e3, total * 1e3

        once()
        host, total = zip(*(once() for _ in range(1 if look.is_tiny else 4)), strict=True)
        found[str(length)] = {"host_ms": summary(host)["median"], "total_ms": summary(total)["median"]}
        print(length, found[str(length)], flush=True)
    return found


SECTIONS = {section.__name__: section for section in (ops, decode_layout, prefill_tiles, step, eager)}
