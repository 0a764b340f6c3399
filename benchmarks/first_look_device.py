"""What the device and its libraries do, apart from our kernels: sections of first_look.py.

Times are medians over replayed graphs, in microseconds; shares are of the bandwidth of a large copy.
"""

import platform
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from benchmarks.common import summary
from benchmarks.device import Call, Timer, ceilings
from benchmarks.op_workloads import Setting

# Weights [out, in] of Llama 3.1 8B.
WEIGHTS = {
    "qkv": (6144, 4096),
    "o": (4096, 4096),
    "gate_up": (28672, 4096),
    "down": (4096, 14336),
    "head": (128256, 4096),
}
TINY_WEIGHTS = {"qkv": (128, 64), "down": (64, 128)}


class Look:
    """The device, and how its calls are timed."""

    def __init__(self, *, is_tiny: bool) -> None:
        self.device = torch.device("cpu" if is_tiny else "cuda")
        self.dtype = torch.float32 if is_tiny else torch.bfloat16
        self.is_tiny = is_tiny
        self.setting = Setting(self.device, self.dtype, is_tiny)
        self.timer = Timer(self.device, 1 if is_tiny else 7)
        self.limits = ceilings(self.timer, self.dtype, tiny=is_tiny)
        self.weights = TINY_WEIGHTS if is_tiny else WEIGHTS

    def has_lost_device(self) -> bool:
        """After an illegal access, say: then all later calls of this process fail."""
        try:
            self.timer.wait()
        except RuntimeError as error:
            print(error, flush=True)
            return True
        return False

    def microseconds(self, calls: list[Call]) -> float:
        """Of one call; `calls` do the same over inputs of their own, which together exceed the cache."""
        seconds, _ = self.timer.measure({"ours": calls})
        return round(summary(seconds["ours"])["median"] * 1e6, 2)

    def share(self, calls: list[Call], num_bytes: int) -> dict[str, float]:
        """Their time, and the bandwidth that it amounts to."""
        us = self.microseconds(calls)
        return {"us": us, "of_copy": round(num_bytes / us * 1e6 / self.limits["copy_bytes_per_second"], 3)}

    def randn(self, *shape: int) -> Tensor:
        return self.setting.randn(*shape, seed=0)

    def some_weights(self, rows: int, columns: int) -> list[Tensor]:
        """As many as are needed to walk past the cache."""
        count = self.timer.num_sets(rows * columns * self.dtype.itemsize)
        return [self.setting.randn(rows, columns, seed=i) * 0.02 for i in range(max(2, count))]


def attempt(function: Callable[[], Any]) -> Any:
    """Its result, or why there is none: a variant that cannot run takes no other with it."""
    try:
        return function()
    except Exception as error:
        return f"{type(error).__name__}: {str(error).strip()[:120]}"


def machine(look: Look) -> dict:
    """What this is, how fast it copies and multiplies, and that `tests` is ours."""
    import tests

    folders = list(tests.__path__)
    if any("site-packages" in folder for folder in folders):
        raise RuntimeError(f"another package is called tests: {folders}")
    found: dict[str, Any] = {"python": platform.python_version(), "torch": torch.__version__, **look.limits}
    found["triton"] = triton.__version__
    if look.device.type == "cuda":
        device = torch.cuda.get_device_properties(look.device)
        found |= {"name": device.name, "sms": device.multi_processor_count, "l2_bytes": device.L2_cache_size}
        found |= {"cuda": torch.version.cuda, "blas": torch.backends.cuda.preferred_blas_library().name}
    data = torch.randn(1 << (16 if look.is_tiny else 28), device=look.device)
    return found | {"sum": look.share([data.sum], data.nbytes)}


def _kernel_names(call: Call) -> list[str]:
    with profile(activities=[ProfilerActivity.CUDA]) as profiled:
        call()
        torch.cuda.synchronize()
    return [event.key[:90] for event in profiled.key_averages() if "mem" not in event.key.lower()]


def _library_matmul(look: Look, rows: int, columns: int) -> dict:
    counts = [1, 2, 4] if look.is_tiny else [1, 2, 4, 8, 16, 32, 64, 128, 256]
    weights, x = look.some_weights(rows, columns), look.randn(counts[-1], columns)
    found: dict[str, Any] = {}
    for count in counts:
        moved = (rows * columns + count * (rows + columns)) * look.dtype.itemsize
        found[str(count)] = look.share([partial(F.linear, x[:count], w) for w in weights], moved)
    outputs = {count: F.linear(x[:count], weights[0]) for count in counts}
    one, everything = outputs[1], outputs[counts[-1]]
    found["first row has the bits of 1 token"] = {n: torch.equal(y[:1], one) for n, y in outputs.items()}
    found["rows have the bits of all tokens"] = {n: torch.equal(y, everything[:n]) for n, y in outputs.items()}
    if look.device.type == "cuda":
        found["kernels"] = {n: _kernel_names(partial(F.linear, x[:n], weights[0])) for n in (1, 16, 64, 256)}
    return found


def cublas(look: Look) -> dict:
    """F.linear by tokens: share of the copy's bandwidth, the kernels, and whether a row's bits depend on the others."""
    found = {}
    for name, shape in look.weights.items():
        found[name] = _library_matmul(look, *shape)
        print(name, {n: value for n, value in found[name].items() if n.isdecimal()}, flush=True)
    return found


@triton.jit
def _linear_kernel(
    y,
    x,
    w,
    M,
    N,
    K: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    PDL: tl.constexpr,
):
    m = tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M)
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    k = tl.arange(0, BLOCK_K)
    mask = (m < M)[:, None]
    weights = w + n[:, None].to(tl.int64) * K + k[None, :]
    tokens = x + m[:, None] * K + k[None, :]
    first = tl.load(weights)  # no other kernel writes it, so it may be asked for before the one in front has ended
    if PDL:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    total = tl.dot(tl.load(tokens, mask=mask, other=0.0), tl.trans(first))
    for start in range(BLOCK_K, K, BLOCK_K):
        part = tl.load(tokens + start, mask=mask, other=0.0)
        total = tl.dot(part, tl.trans(tl.load(weights + start)), total)
    tl.store(y + m[:, None] * N + n[None, :], total.to(y.dtype.element_ty), mask=mask)


def _linear(x: Tensor, w: Tensor, y: Tensor, tile: tuple[int, ...], *, pdl: bool = False) -> Any:
    """y = x w^T, each sum over the whole of K in one order; `tile` is BLOCK_M, BLOCK_N, BLOCK_K, warps, stages."""
    block_m, block_n, block_k, warps, stages = tile
    grid = (w.shape[0] // block_n, triton.cdiv(x.shape[0], block_m))
    launch: dict[str, Any] = {"num_warps": warps, "num_stages": stages, **({"launch_pdl": True} if pdl else {})}
    blocks = {"BLOCK_M": block_m, "BLOCK_N": block_n, "BLOCK_K": block_k, "PDL": pdl}
    return _linear_kernel[grid](y, x, w, x.shape[0], w.shape[0], K=x.shape[1], **blocks, **launch)


def invariance(look: Look) -> dict:
    """Whether a product of 16 rows (mma.sync) has the bits of one of 64 or 128 (wgmma), whatever the other blocks."""
    rows, columns = (64, 128) if look.is_tiny else (512, 4096)
    x, w = look.randn(128, columns), look.setting.randn(rows, columns, seed=1)
    tiles = [(16, 32, 128, 4), (16, 64, 64, 4), (16, 64, 256, 4), (32, 64, 128, 4), (64, 64, 128, 4), (128, 128, 64, 8),
             (64, 256, 64, 4)]  # fmt: skip
    if look.is_tiny:
        tiles = [(16, 32, 128, 4), (64, 64, 64, 4)]
    first, library = torch.empty(128, rows, device=look.device), F.linear(x, w)
    _linear(x, w, first, (*tiles[0], 3))

    def is_same(tile: tuple[int, ...]) -> list[Any]:
        y = torch.empty_like(first)
        kernel = _linear(x, w, y, (*tile, 3))
        used = "" if look.is_tiny else "wgmma" if "wgmma" in kernel.asm["ptx"] else "mma"
        return [torch.equal(y, first), used]

    same = {"x".join(map(str, tile[:3])): attempt(partial(is_same, tile)) for tile in tiles}
    return {"same": same, "elements unlike the library's": int((first.to(look.dtype) != library).sum())}


def _own_matmul(look: Look, weights: list[Tensor], count: int, tiles: Sequence[tuple[int, ...]]) -> dict:
    rows, columns = weights[0].shape
    x, y = look.randn(count, columns), torch.empty(count, rows, device=look.device, dtype=look.dtype)
    expected = x.double() @ weights[0].double().t()

    def measured(tile: tuple[int, ...], pdl: bool) -> dict:
        _linear(x, weights[0], y, tile, pdl=pdl)
        error = ((y.double() - expected).norm() / expected.norm()).item()
        calls = [partial(_linear, x, w, y, tile, pdl=pdl) for w in weights]
        return look.share(calls, weights[0].nbytes) | {"error": round(error, 6)}

    variants = {}
    for m, n, k, warps, stages in tiles:
        for pdl in (False,) if look.is_tiny else (False, True):
            name = f"{m}x{n}x{k} warps {warps} stages {stages}{' pdl' if pdl else ''}"
            variants[name] = attempt(partial(measured, (m, n, min(k, columns), warps, stages), pdl))
    return _best(variants)


def matmul(look: Look) -> dict:
    """An own matmul for few tokens by tile, with and without programmatic dependent launch: the four best of each."""
    few = [(16, 32, 256, 4, 4), (16, 64, 128, 4, 4), (16, 16, 256, 2, 5)]
    many = [(64, 32, 128, 4, 4), (64, 64, 128, 4, 4)]
    found = {}
    for name, shape in look.weights.items():
        if name != "head":
            weights = look.some_weights(*shape)
            for count, tiles in {1: few, 16: few, 64: many}.items():
                best = found[f"{name} {count} tokens"] = _own_matmul(look, weights, count, tiles)
                print(name, count, best, flush=True)
    return found


def _best(variants: dict[str, Any], count: int = 4) -> dict[str, Any]:
    """The fastest of them; those that failed come last."""
    ranked = sorted(variants.items(), key=lambda item: item[1]["us"] if isinstance(item[1], dict) else float("inf"))
    return dict(ranked[:count])


@triton.jit
def _add_one(x, n, BLOCK: tl.constexpr, PDL: tl.constexpr):
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(x + at, tl.load(x + at, mask=at < n) + 1, mask=at < n)


def nodes(look: Look) -> dict:
    """What a small node of a graph costs, without and with programmatic dependent launch, and whether order is kept."""
    x = torch.zeros(4096, device=look.device)
    is_cuda = look.device.type == "cuda"

    def add_one(programs: int, pdl: bool) -> None:
        launch = {"launch_pdl": True} if pdl else {}
        _add_one[(programs,)](x, 4096, BLOCK=256, PDL=pdl, num_warps=4, **launch)

    found: dict[str, Any] = {}
    for programs in (1, 7, 132) if is_cuda else (1,):
        for pdl in (False, True) if is_cuda else (False,):
            key = f"{programs} programs{', pdl' if pdl else ''}"
            found[key] = attempt(lambda n=programs, p=pdl: look.microseconds([lambda: add_one(n, p)] * 64))
    other = torch.empty(8192, device=look.device)
    found["torch, elementwise"] = look.microseconds([lambda: other.add_(1)] * 64)
    if is_cuda:
        x.zero_()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            for _ in range(200):
                add_one(16, True)
        for _ in range(20):
            graph.replay()
        found["200 x 20 dependent increments are exact"] = bool((x == 4000).all())
    return found


SECTIONS = {section.__name__: section for section in (machine, cublas, invariance, matmul, nodes)}
