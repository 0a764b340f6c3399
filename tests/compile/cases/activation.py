"""silu_mul at the widths of Llama 3.1 8B and of SmolLM2-135M."""

from collections.abc import Iterator

import torch

from llama.kernels.gpu.activation import silu_mul
from tests.compile.harness import Case


def cases() -> Iterator[Case]:
    for size, dtype in ((14336, torch.bfloat16), (1536, torch.bfloat16), (14336, torch.float32)):
        gate_up = torch.empty(64, 2 * size, dtype=dtype, device="meta")
        yield Case(f"silu_mul {size} {str(dtype)[6:]}", lambda x=gate_up: silu_mul(x), wide_loads=("_silu_mul_kernel",))
