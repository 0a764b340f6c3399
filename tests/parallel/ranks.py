"""Ranks as threads of this process, on gloo: every line of a rank runs, and none waits for an import of torch."""

import contextlib
import socket
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch.distributed import HashStore

from llama.engine.config import EngineConfig
from llama.engine.engine import Engine
from llama.engine.wire import Message
from llama.llm.engines import connect
from llama.llm.rank import serve
from llama.llm.ranks import Peer, Ranks
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


@contextmanager
def engine_on_ranks(
    folder: Path, config: EngineConfig, eos_token_ids: frozenset[int] = frozenset(), dtype: str = "float64"
) -> Iterator[Engine]:
    """An engine whose other ranks run `serve` in threads of this process, as their processes do."""
    peers, threads = [], []
    with tempfile.TemporaryDirectory() as stores:
        for rank in range(1, config.tensor_parallel_size):
            ours, theirs = socket.socketpair()
            peers.append(Peer(rank, ours))
            threads.append(threading.Thread(target=_serve, args=(theirs,), name=f"rank {rank}", daemon=True))
            threads[-1].start()
        ranks = Ranks(peers, config.step_timeout)
        told = {
            "model": str(folder),
            "device": "cpu",
            "first_device": 0,
            "size": config.tensor_parallel_size,
            "engine": asdict(config),
        }
        told |= {"loading": {"dtype": dtype, "load_format": "auto"}, "eos_token_ids": sorted(eos_token_ids)}
        try:
            yield connect(ranks, told | {"store": f"{stores}/store", "threads": 0})
        finally:
            ranks.close()
            for thread in threads:
                thread.join(SECONDS)
    assert not any(thread.is_alive() for thread in threads)


def _serve(stream: socket.socket) -> None:
    lock = threading.Lock()

    def say(content: dict[str, Any]) -> None:
        with lock:
            stream.sendall(Message(content, {}).encoded())

    def beat() -> None:
        with contextlib.suppress(OSError):
            while True:
                say({"beat": True})
                time.sleep(1)

    threading.Thread(target=beat, daemon=True).start()
    try:
        serve(stream, say)
    except Exception as error:
        with contextlib.suppress(OSError):
            say({"error": f"{type(error).__name__}: {error}"})
    finally:
        stream.shutdown(socket.SHUT_RDWR)
