"""rope_and_store over views of a fused qkv output, as the model calls it, and what it rotates by."""

from collections.abc import Iterator

import torch

from llama.kernels.gpu.rope import cos_sin, rotate_and_store
from llama.kernels.types import KVLayer
from tests.compile.harness import Case
from tests.paged_attention import only_slots


def _call(head_dim: int, heads: int, kv_heads: int, dtype: torch.dtype, **kind: bool) -> torch.Tensor:
    qkv = torch.empty(64, heads + 2 * kv_heads, head_dim, dtype=dtype, device="meta")
    e4m3 = kind.get("e4m3", False)
    stored = torch.uint8 if e4m3 else dtype
    caches = (torch.empty(262_144, 16, kv_heads, head_dim, dtype=stored, device="meta") for _ in range(2))
    scales = torch.empty(2, kv_heads, device="meta") if e4m3 else None
    cos, sin = (torch.empty(64, 1, head_dim, device="meta") for _ in range(2))
    slots = torch.empty(64, dtype=torch.int64, device="meta")
    q, k, v = qkv.split([heads, kv_heads, kv_heads], dim=1)
    return rotate_and_store(
        q, k, v, (cos, sin), KVLayer(*caches, scales), only_slots(slots, 16), is_early=kind.get("is_early", False)
    )


def cases() -> Iterator[Case]:
    for head_dim, heads, kv_heads, dtype in (
        (128, 32, 8, torch.bfloat16),
        (64, 9, 3, torch.bfloat16),
        (80, 32, 32, torch.float16),
        (128, 32, 8, torch.float32),
    ):
        yield Case(
            f"rope D={head_dim} heads={heads}/{kv_heads} {str(dtype)[6:]}",
            lambda shape=(head_dim, heads, kv_heads, dtype): _call(*shape),
            wide_loads=("_rope_and_store_kernel",),
        )
    yield Case("rope D=128 heads=32/8 bfloat16 e4m3", lambda: _call(128, 32, 8, torch.bfloat16, e4m3=True))
    positions = torch.empty(64, dtype=torch.int64, device="meta")
    frequencies = torch.empty(128, device="meta")
    yield Case("cos_sin D=128", lambda: cos_sin(positions, frequencies, 1.0), stack=("_cos_sin_kernel",))
