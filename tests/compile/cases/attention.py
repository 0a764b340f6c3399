"""Attention: one call per kernel, so that a row of the table tells of one configuration."""

from collections.abc import Iterator
from unittest import mock

import torch

from llama.kernels.gpu.attention import config, paged_attention, prefill, rotate_and_attend
from llama.kernels.gpu.attention.config import decode_options
from llama.kernels.types import KVLayer, Ragged
from tests.compile.harness import Case

# head_dim, heads, KV heads, block size, dtype: each entry of the tile tables, both ways to find a key's block
# (a tile within one block, a tile over several), a group that is no power of two, a padded head_dim.
CONFIGURATIONS = (
    (128, 32, 8, 16, torch.bfloat16),
    (128, 64, 8, 128, torch.float16),
    (64, 9, 3, 16, torch.bfloat16),
    (80, 32, 32, 1, torch.bfloat16),
    (256, 16, 1, 16, torch.bfloat16),
    (64, 32, 8, 16, torch.float32),
    (128, 32, 8, 16, torch.float32),
    (256, 16, 1, 16, torch.float32),
)

# Runs behind drafts, and those of the deterministic mode: Llama 3.1's of 1B, 8B and 70B.
RUNS = (
    (64, 32, 8, 16, torch.bfloat16, 8),
    (128, 32, 8, 16, torch.bfloat16, 8),
    (128, 32, 8, 16, torch.float32, 8),
    (128, 64, 8, 16, torch.bfloat16, 8),
    (128, 64, 8, 16, torch.bfloat16, 4),
)


def _call(
    configuration: tuple,
    queries: int,
    sequences: int,
    num_decodes: int,
    e4m3: bool = False,
    run_len: int = 1,
    is_early: bool = False,
) -> torch.Tensor:
    head_dim, heads, kv_heads, block_size, dtype = configuration

    def empty(*shape: int, dtype: torch.dtype = torch.int32) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    cache = (4_194_304 // block_size, block_size, kv_heads, head_dim)
    ragged = Ragged(
        block_tables=empty(sequences, 131_072 // block_size),
        query_starts=empty(sequences + 1),
        context_lens=empty(sequences),
        slots=empty(queries, dtype=torch.int64),
        num_decodes=num_decodes,
        block_size=block_size,
        run_len=run_len,
        is_disjoint=True,
    )
    stored = torch.uint8 if e4m3 else dtype
    scales = empty(2, kv_heads, dtype=torch.float32) if e4m3 else None
    kv_layer = KVLayer(empty(*cache, dtype=stored), empty(*cache, dtype=stored), scales)
    if is_early:
        qkv = empty(queries, heads + 2 * kv_heads, head_dim, dtype=dtype)
        cos_sin = empty(queries, 1, head_dim, dtype=torch.float32), empty(queries, 1, head_dim, dtype=torch.float32)
        counters = empty(sequences * kv_heads, 3)
        return rotate_and_attend(qkv, cos_sin, kv_layer, ragged, head_dim**-0.5, counters)
    return paged_attention(empty(queries, heads, head_dim, dtype=dtype), kv_layer, ragged, head_dim**-0.5)


def _call_in_chunks(configuration: tuple, e4m3: bool = False) -> torch.Tensor:
    """Few queries behind a long context, on a GPU that has multiprocessors for chunks of it."""
    with mock.patch.object(prefill, "multiprocessor_count", lambda device: 132):
        return _call(configuration, 8, 1, 0, e4m3=e4m3)


def _call_with_tile(tile: config.PrefillTile, in_chunks: bool = False) -> torch.Tensor:
    configuration = (128, 32, 8, 128 if tile.descriptors else 16, torch.bfloat16)
    with mock.patch.dict(config._PREFILL, {(128, 2): tile}):
        return _call_in_chunks(configuration) if in_chunks else _call(configuration, 8192, 8, 0)


def _candidates() -> Iterator[Case]:
    """What benchmarks.first_look tries in place of the table's tile; with descriptors, in chunks too."""
    for name, tile in config.PREFILL_CANDIDATES.items():
        for in_chunks in (False, True)[: 1 + tile.descriptors]:
            if tile is not config._PREFILL[128, 2]:
                yield Case(
                    f"{'chunks of ' * in_chunks}prefill tile {name} D=128 bfloat16",
                    lambda arguments=(tile, in_chunks): _call_with_tile(*arguments),
                    # On sm_80 they spill, and the largest of those in chunks on sm_100.
                    architectures=(90,) if in_chunks else (90, 100),
                    wide_loads=("_prefill_kernel",),
                    warp_group=("_prefill_kernel",),
                    descriptors=("_prefill_kernel",) if tile.descriptors else (),
                )


def cases() -> Iterator[Case]:
    for configuration in CONFIGURATIONS:
        head_dim, heads, kv_heads, block_size, dtype = configuration
        name = f"D={head_dim} heads={heads}/{kv_heads} block={block_size} {str(dtype)[6:]}"
        sixteen_bits = dtype.itemsize == 2
        yield Case(
            f"decode {name}",
            lambda configuration=configuration: _call(configuration, 64, 64, 64),
            wide_loads=("_decode_kernel",),
            tensor_cores=("_decode_kernel",) if sixteen_bits else (),
            resident=(("_decode_kernel", decode_options(head_dim, dtype.itemsize, heads // kv_heads)[0]),),
        )
        yield Case(
            f"prefill {name}",
            lambda configuration=configuration: _call(configuration, 8192, 8, 0),
            wide_loads=("_prefill_kernel",),
            warp_group=("_prefill_kernel",) if sixteen_bits else (),
        )
    for configuration in (CONFIGURATIONS[0], CONFIGURATIONS[2]):  # registers of the second's are too few for all in one
        head_dim, heads, kv_heads, block_size, dtype = configuration
        yield Case(
            f"decode D={head_dim} heads={heads}/{kv_heads} block={block_size} {str(dtype)[6:]} early",
            lambda configuration=configuration: _call(configuration, 64, 64, 64, is_early=True),
            architectures=(90, 100),
            wide_loads=("_decode_kernel",),
            waits=("_rope_and_store_kernel", "_decode_kernel", "_merge_kernel"),
            resident=(("_decode_kernel", decode_options(head_dim, dtype.itemsize, heads // kv_heads)[0]),),
        )
    for *configuration, run_len in RUNS:
        head_dim, heads, kv_heads, block_size, dtype = configuration
        yield Case(
            f"decode D={head_dim} heads={heads}/{kv_heads} block={block_size} {str(dtype)[6:]} runs of {run_len}",
            lambda arguments=(configuration, run_len): _call(arguments[0], 64, 64, 0, run_len=arguments[1]),
            wide_loads=("_decode_kernel",),
            tensor_cores=("_decode_kernel",) if dtype.itemsize == 2 else (),
        )
    for configuration in CONFIGURATIONS[:2]:  # Llama 3.1's
        head_dim, heads, kv_heads, block_size, dtype = configuration
        name = f"D={head_dim} heads={heads}/{kv_heads} block={block_size} {str(dtype)[6:]} e4m3"
        for kernel, sizes in (("decode", (64, 64, 64)), ("prefill", (8192, 8, 0))):
            yield Case(
                f"{kernel} {name}",
                lambda arguments=(configuration, *sizes): _call(*arguments, e4m3=True),
                wide_loads=(f"_{kernel}_kernel",),
                tensor_cores=(f"_{kernel}_kernel",),
            )
    for configuration, e4m3 in ((CONFIGURATIONS[0], False), (CONFIGURATIONS[0], True), (CONFIGURATIONS[2], False)):
        head_dim, heads, kv_heads, block_size, dtype = configuration
        name = f"D={head_dim} heads={heads}/{kv_heads} block={block_size} {str(dtype)[6:]}{' e4m3' * e4m3}"
        yield Case(
            f"chunks of prefill {name}",
            lambda arguments=(configuration, e4m3): _call_in_chunks(*arguments),
            wide_loads=("_prefill_kernel",),
            tensor_cores=("_prefill_kernel",),
        )
    yield from _candidates()
