"""Both norms at the widths of Llama 3.1 8B, 70B, 405B, of SmolLM2-135M, and one that takes two walks over a row."""

from collections.abc import Iterator

import torch

from llama.kernels.gpu.norm import add_rms_norm, rms_norm
from tests.compile.harness import Case


def _call(add: bool, hidden: int, dtype: torch.dtype) -> object:
    x, residual = torch.empty(2, 64, hidden, dtype=dtype, device="meta")
    weight = torch.empty(hidden, dtype=dtype, device="meta")
    return add_rms_norm(x, residual, weight, 1e-5) if add else rms_norm(x, weight, 1e-5)


def cases() -> Iterator[Case]:
    bf16 = torch.bfloat16
    shapes = [(True, hidden, bf16) for hidden in (4096, 8192, 576, 32768)]
    shapes += [(False, 4096, bf16), (False, 16384, bf16), (True, 4096, torch.float32)]
    for add, hidden, dtype in shapes:
        yield Case(
            f"{'add_' if add else ''}rms_norm {hidden} {str(dtype)[6:]}",
            lambda arguments=(add, hidden, dtype): _call(*arguments),
            wide_loads=("_norm_kernel",),
        )
