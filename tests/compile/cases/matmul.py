"""Products at the shapes of Llama 3.1 8B: with codes, for few tokens and for many; with dense weights, for few; and for
few those that are fused with a norm, SwiGLU or a residual."""

from collections.abc import Iterator
from functools import partial

import torch
import triton

from llama.kernels.gpu.fused import Fused
from llama.kernels.gpu.matmul import multiply, multiply_dense
from llama.kernels.types import QuantizedWeight
from tests.compile.harness import Case

DTYPES = {"int4": torch.int16, "int8": torch.int8, "fp8": torch.float8_e4m3fn}


def _call(
    way: str, shape: tuple[int, int], size: int, zeros: bool, minima: bool, tokens: int, kind: str = ""
) -> object:
    rows, columns = shape
    groups = columns // size
    codes = torch.empty(rows, columns // 4 if way == "int4" else columns, dtype=DTYPES[way], device="meta")
    scales, least = torch.empty(2, groups, rows, dtype=torch.bfloat16, device="meta")
    points = torch.empty(groups, rows, dtype=torch.int8, device="meta")
    weight = QuantizedWeight(codes, scales, size, points if zeros else None, least if minima else None)
    x = torch.empty(tokens, columns, dtype=torch.bfloat16, device="meta")
    return multiply(x, weight, 132, _fused(x, rows, kind) if kind else None)


def _fused(x: torch.Tensor, rows: int, kind: str) -> Fused:
    tokens, columns = x.shape
    norm = torch.empty(columns, dtype=x.dtype, device="meta") if "norm" in kind else None
    residual = torch.empty(tokens, rows, dtype=x.dtype, device="meta") if "residual" in kind else None
    return Fused(norm, 1e-5, residual, swiglu="swiglu" in kind)


def _fused_dense(shape: tuple[int, int], kind: str) -> object:
    x, weight = (torch.empty(size, shape[1], dtype=torch.bfloat16, device="meta") for size in (1, shape[0]))
    return multiply_dense(x, weight, 132, _fused(x, shape[0], kind))


def _fused_cases() -> Iterator[Case]:
    square, gate_up = (4096, 4096), (28672, 4096)
    kernels = ("_matmul_kernel",)
    every = {"wide_loads": kernels, "tensor_cores": kernels, "requests": kernels, "waits": (*kernels, "_add_kernel")}
    for shape, kind in (((6144, 4096), "norm"), (square, "residual"), (gate_up, "norm swiglu")):
        run = partial(_fused_dense, shape, kind)
        yield Case(f"fused {kind} bfloat16 {shape[0]}x{shape[1]}", run, **every)
    calls = [("int4", gate_up, 128, "swiglu"), ("fp8", gate_up, 4096, "swiglu"), ("int8", square, 4096, "residual")]
    for way, shape, size, kind in calls:
        run = partial(_call, way, shape, size, False, False, 1, kind)
        yield Case(f"fused {kind} {way} {shape[0]}x{shape[1]}", run, **every)


def cases() -> Iterator[Case]:
    # Of a thread in a turn of the loop, one token: 64 rows x 256 columns (int4) or 128 over 128 threads. What has
    # scales in groups smaller than the others', or zero points, is not bound. Triton 3.6 spends 2.67 on int4.
    int4 = 2.7 if triton.__version__.startswith("3.6") else 2.6
    most = {"int4": (128, int4), "int8": (64, 4.3), "fp8": (64, 4.3)}
    square, down, gate_up = (4096, 4096), (4096, 14336), (28672, 4096)
    few = [("int4", square, 128), ("int4", down, 64), ("int8", square, 4096), ("int8", down, 128)]
    few += [("fp8", gate_up, 4096), ("fp8", down, 128)]
    # With the processors of an H200: K of the square ones is split.
    calls = [(way, shape, size, False, False, 1) for way, shape, size in few]
    calls += [("int4", gate_up, 128, True, False, 1), ("int4", gate_up, 32, True, True, 1)]
    calls += [("int4", down, 128, False, False, 2048), ("int4", down, 32, True, True, 2048)]
    calls += [("int8", down, 14336, False, False, 2048), ("fp8", down, 14336, False, False, 2048)]
    for way, shape, size, zeros, minima, tokens in calls:
        is_bound = tokens == 1 and not zeros and size == (128 if way == "int4" else shape[1])
        told = f"{way} {shape[0]}x{shape[1]} groups of {size}{' zeros' * zeros}{' minima' * minima} {tokens}"
        yield Case(
            f"matmul {told}",
            lambda arguments=(way, shape, size, zeros, minima, tokens): _call(*arguments),
            wide_loads=("_matmul_kernel",),
            tensor_cores=("_matmul_kernel",),
            per_weight=("_matmul_kernel", *most[way]) if is_bound else None,
        )
    for dtype, (rows, columns) in ((torch.bfloat16, square), (torch.bfloat16, gate_up), (torch.float32, down)):
        x, weight = (torch.empty(size, columns, dtype=dtype, device="meta") for size in (64, rows))
        yield Case(
            f"matmul {str(dtype)[6:]} {rows}x{columns} 64",
            lambda x=x, weight=weight: multiply_dense(x, weight, processors=132),
            wide_loads=("_matmul_kernel",),
            tensor_cores=("_matmul_kernel",) if dtype.itemsize == 2 else (),
        )
    yield from _fused_cases()
