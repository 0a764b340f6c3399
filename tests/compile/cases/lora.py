"""LoRA: the fused projections of Llama 3.1 8B and of SmolLM2-135M, a rank beyond one block, the head and embedding."""

from collections.abc import Iterator

import torch

from llama.kernels.gpu.lora import lora_embedding, lora_expand, lora_shrink
from llama.kernels.types import TokenAdapters
from tests.compile.harness import Case

_ADAPTERS = 8
_TOKENS = 64

# in_features, where the slices of the output begin, rank, dtype
CONFIGURATIONS = (
    ("qkv 8B", 4096, (0, 4096, 5120, 6144), 16, torch.bfloat16),
    ("qkv 8B", 4096, (0, 4096, 5120, 6144), 64, torch.bfloat16),
    ("gate_up 8B", 4096, (0, 14336, 28672), 32, torch.float16),
    ("down 8B", 14336, (0, 4096), 16, torch.bfloat16),
    ("down 70B", 28672, (0, 8192), 128, torch.bfloat16),
    ("lm_head 8B", 4096, (0, 128256), 48, torch.bfloat16),
    ("qkv 135M", 576, (0, 576, 768, 960), 16, torch.bfloat16),
    ("qkv 8B", 4096, (0, 4096, 5120, 6144), 16, torch.float32),
    ("down 8B", 14336, (0, 4096), 64, torch.float32),
)


def _empty(*shape: int, dtype: torch.dtype) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def _adapters() -> TokenAdapters:
    return TokenAdapters(_empty(_TOKENS, dtype=torch.int32))


def _pair(in_features: int, starts: tuple[int, ...], rank: int, dtype: torch.dtype) -> None:
    adapters, y = _adapters(), _empty(_TOKENS, starts[-1], dtype=dtype)
    a = _empty(_ADAPTERS, len(starts) - 1, rank, in_features, dtype=dtype)
    h = lora_shrink(_empty(_TOKENS, in_features, dtype=dtype), a, adapters)
    lora_expand(h, y, _empty(_ADAPTERS, starts[-1], rank, dtype=dtype), adapters, starts)


def _embedding(rank: int, dtype: torch.dtype) -> torch.Tensor:
    return lora_embedding(_empty(_TOKENS, dtype=torch.int64), _empty(_ADAPTERS, 128256, rank, dtype=dtype), _adapters())


def cases() -> Iterator[Case]:
    kernels = ("_shrink_kernel", "_expand_kernel")
    for name, in_features, starts, rank, dtype in CONFIGURATIONS:
        yield Case(
            f"lora {name} r={rank} {str(dtype)[6:]}",
            lambda shape=(in_features, starts, rank, dtype): _pair(*shape),
            wide_loads=kernels,
            tensor_cores=kernels if dtype.itemsize == 2 else (),
        )
    yield Case("lora embedding r=16 bfloat16", lambda: _embedding(16, torch.bfloat16))
