"""Computed prefixes kept in files: keys and values of a prompt's full blocks, out of one engine's prefix cache and into
another's. A file says which model and adapter computed it and is refused by any other."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

from llama.api.errors import ParameterError
from llama.engine.adapters import Adapter
from llama.engine.blocks import prefix_root
from llama.engine.engine import Engine
from llama.engine.memory import kv_rounding
from llama.engine.runner import Runner
from llama.model.kept import opened, write


def write_prefix(engine: Engine, token_ids: Sequence[int], adapter: Adapter, path: str | Path) -> int:
    """Keep what the prefix cache has of a prompt -> how many tokens; 0 writes nothing."""
    runner, size = _runner(engine), engine.pool.block_size
    tokens = np.array(token_ids, np.int32)
    blocks = engine.pool.match(_root(engine, adapter), tokens.tobytes(), len(tokens) // size)
    if blocks:
        kept = runner.kv.data[:, :, blocks].flatten(2, 3).cpu()  # [layers, 2, tokens, kv_heads, head_dim]
        content = {"token_ids": torch.from_numpy(tokens[: len(blocks) * size]), "kv": kept}
        write(path, content, _signature(engine, runner, adapter))
    return len(blocks) * size


def read_prefix(engine: Engine, adapter: Adapter, path: str | Path) -> int:
    """Put a kept prefix into the prefix cache -> how many of its tokens are found there from now on."""
    runner, pool = _runner(engine), engine.pool
    engine.notice_changes()  # else the next request would, and forget what is read
    with opened(path) as file:
        if (file.metadata() or {}) != _signature(engine, runner, adapter):
            what = "a prefix that this model, in this dtype and with this adapter, has computed"
            raise ParameterError(f"{path} does not hold {what}", "path")
        tokens, kept = file.get_tensor("token_ids").numpy(), file.get_tensor("kv")
    count = len(tokens) // pool.block_size
    if count > pool.num_available:
        raise ParameterError(f"{path} needs {count} blocks of the KV cache, {pool.num_available} are free", "path")
    used = tokens[: count * pool.block_size]
    blocks = pool.allocate(count)
    try:
        data = runner.kv.data
        values = kept[:, :, : len(used)].unflatten(2, (count, pool.block_size))
        data.index_copy_(2, torch.tensor(blocks, device=data.device), values.to(data.device))
        pool.publish(pool.path(_root(engine, adapter), []), blocks, used.tobytes())
    finally:
        pool.free(blocks)
    return len(used)


def _runner(engine: Engine) -> Runner:
    if engine.model is not None:
        engine.model.needs_whole("a kept prefix")
    if not isinstance(engine.runner, Runner) or not engine.pool.enable_prefix_caching:
        raise ParameterError("kept prefixes need a model and enable_prefix_caching", "enable_prefix_caching")
    if engine.is_sleeping:
        raise ParameterError("the engine sleeps: wake_up() gives it a KV cache")
    return engine.runner


def _root(engine: Engine, adapter: Adapter) -> bytes:
    return prefix_root(engine.scheduler.model, adapter.digest)


def _signature(engine: Engine, runner: Runner, adapter: Adapter) -> dict[str, str]:
    cache = kv_rounding(runner.model, engine.config)
    told = {"model": runner.model.digest(), "adapter": adapter.digest.hex(), "dtype": cache}
    return told if runner.model.fixed is None else told | {"deterministic": str(runner.model.fixed)}
