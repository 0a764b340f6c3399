"""Ranks as threads of this process, on gloo: every line of a rank runs, and none waits for an import of torch."""

import threading
from collections.abc import Callable
from typing import Any

import torch
from torch.distributed import HashStore

from llama.model.batch import rectangle
from llama.model.communicator import Communicator
from llama.model.config import ModelConfig
from llama.model.kv_cache import KVCache
from llama.model.parallel import Shard
from llama.model.transformer import Transformer

SECONDS = 60.0


def on_ranks(config: ModelConfig, size: int, work: Callable[[Communicator], Any]) -> list[Any]:
    """What `work` gives on each of `size` ranks; the first failure is raised."""
    store, results, errors = HashStore(), [None] * size, []

    def run(rank: int) -> None:
        try:
            communicator = Communicator(Shard(config, rank, size), store, torch.device("cpu"), seconds=SECONDS)
            results[rank] = work(communicator)
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=run, args=(rank,), daemon=True) for rank in range(size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(SECONDS)
    if errors:
        raise errors[0]
    return results


@torch.inference_mode()
def logits(model: Transformer, token_ids: torch.Tensor, kv: torch.Tensor | None = None) -> torch.Tensor:
    """[rows, length] ids -> [rows, length, vocab]: a prefill of all but the last token, and a decode of that one."""
    rows, length = token_ids.shape
    blocks = -(-length // 16)
    dtype = model.dtype if model.kv_scales is None else torch.uint8
    scales = None if dtype == model.dtype else model.kv_scales
    cache = KVCache(model.local_config, rows * blocks, 16, dtype=dtype, device="cpu", scales=scales)
    first = model(rectangle(token_ids[:, :-1], 0, blocks, 16), cache).view(rows, length - 1, -1)
    last = model(rectangle(token_ids[:, -1:], length - 1, blocks, 16), cache).view(rows, 1, -1)
    return torch.cat([first, last], dim=1)
