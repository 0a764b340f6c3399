"""From a model's place and a configuration to its engine: in this process alone, or with other ranks."""

import logging
import os
import tempfile
import weakref
from collections.abc import Mapping
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from llama.api.errors import ParameterError
from llama.engine.budget import threads_of_each
from llama.engine.config import EngineConfig
from llama.engine.engine import Engine
from llama.engine.graph_runner import make_runner
from llama.engine.memory import fitting_blocks
from llama.engine.parallel_runner import ParallelRunner
from llama.llm import torchrun
from llama.llm.loading import load_model
from llama.llm.rank import load_part
from llama.llm.ranks import Ranks
from llama.model.autocast import own_dtype
from llama.model.checkpoint import Checkpoint
from llama.model.transformer import Transformer

logger = logging.getLogger(__name__)

_MUCH = 1.1  # times the room of the rank with the least: worth a word


@own_dtype
def load_engine(
    model: str | Path | Transformer,
    where: torch.device,
    config: EngineConfig,
    *,
    eos_token_ids: frozenset[int],
    **loading: Any,
) -> Engine:
    """`loading` are load_model's own; all arguments have been checked, but for what ranks cannot share."""
    speculation = config.speculation
    draft_path = None if speculation is None else speculation.model
    if config.tensor_parallel_size > 1:
        _check_parallel(model, where, config, draft_path, loading)
        return _parallel_engine(Path(str(model)), where, config, eos_token_ids, loading)
    loaded = load_model(model, where, **loading)
    draft = None
    if speculation is not None and draft_path is not None:
        quantised = speculation.quantization
        draft = load_model(draft_path, where, dtype=loaded.dtype, load_format="auto", quantization=quantised)
    return Engine(loaded, config, eos_token_ids=eos_token_ids, draft=draft)


def ranks_of(engine: Any) -> ParallelRunner | None:
    """The runner of an engine that has other ranks."""
    runner = getattr(engine, "runner", None)
    return runner if isinstance(runner, ParallelRunner) else None


def _check_parallel(
    model: Any, where: torch.device, config: EngineConfig, draft_path: str | None, loading: Mapping[str, Any]
) -> None:
    """What ranks cannot share is refused before any of them starts."""
    size, name = config.tensor_parallel_size, "tensor_parallel_size"
    if isinstance(model, Transformer):
        raise ParameterError(f"{name}={size} needs a folder as model: each rank reads its own part", name)
    if draft_path is not None:
        raise ParameterError(
            f'{name}={size} takes no draft model: speculative_config={{"method": "ngram"}} works', name
        )
    first = where.index or 0
    if where.type == "cuda" and first + size > torch.cuda.device_count():
        have = f"this machine has {torch.cuda.device_count()}"
        raise ParameterError(f'{name}={size} needs {size} CUDA devices from "cuda:{first}" on, {have}', name)
    if loading["load_format"] != "dummy":
        Checkpoint(model).check_ranks(size, loading["quantization"])
    elif loading["quantization"] is not None:
        raise ParameterError(f'{name}={size} takes no quantization with load_format="dummy"', name)


def _parallel_engine(
    path: Path, where: torch.device, config: EngineConfig, eos_token_ids: frozenset[int], loading: Mapping[str, Any]
) -> Engine:
    size = config.tensor_parallel_size
    rank = torchrun.rank_of_this(size)
    if rank:
        torchrun.serve_sibling(rank)
    ranks = (Ranks.start if rank is None else torchrun.join)(size, config.step_timeout)
    # Where the ranks meet. Removed when they have met: the destructor of a FileStore opens its path once more, whatever
    # is there by then.
    meeting = tempfile.TemporaryDirectory(prefix="llama-ranks-")
    try:
        told = {
            "model": os.path.abspath(path),
            "device": where.type,
            "first_device": where.index or 0,
            "size": size,
            "engine": asdict(config),
            "loading": {**loading, "dtype": str(loading["dtype"]).removeprefix("torch.")},
            "eos_token_ids": sorted(eos_token_ids),
            "store": os.path.join(meeting.name, "store"),
            "threads": threads_of_each(size, torch.get_num_threads()),
        }
        return connect(ranks, told)
    except (ValueError, MemoryError):
        ranks.close()
        raise
    except Exception as error:
        lost = ranks.failed(error)
        ranks.close()
        raise lost from error
    except BaseException:
        ranks.close()
        raise
    finally:
        meeting.cleanup()


def connect(ranks: Ranks, told: Mapping[str, Any]) -> Engine:
    """Load rank 0's part while the others load theirs -> the engine of all. The step begins as soon as all have room
    for the same KV blocks: as many as the rank with the least."""
    config, eos_token_ids = EngineConfig(**told["engine"]), frozenset(told["eos_token_ids"])
    ranks.tell(lambda rank: {**told, "rank": rank})
    model = load_part(told, 0, ranks.patient)
    ranks.answers()
    num_blocks = config.num_blocks
    if num_blocks is None:
        ranks.send_all({"measure": True})
        own = fitting_blocks(model, config)
        rooms = [own, *(answer["num_blocks"] for answer in ranks.answers())]
        num_blocks, most = min(rooms), max(rooms)
        if most > _MUCH * num_blocks:
            which = "rank %d has room for %d KV blocks, others for up to %d: the least decides"
            logger.warning(which, rooms.index(num_blocks), num_blocks, most)
    ranks.send_all({"num_blocks": num_blocks})
    runner = make_runner(model, config, num_blocks, eos_token_ids)
    ranks.answers()
    ranks.started()
    parallel = ParallelRunner(runner, ranks)
    engine = Engine(model, replace(config, num_blocks=num_blocks), eos_token_ids=eos_token_ids, runner=parallel)
    engine.adapters.share = parallel.share
    ranks.listen(partial(_bury, weakref.ref(engine)))
    return engine


def _bury(engine: "weakref.ref[Engine]", why: str) -> None:
    if (present := engine()) is not None:
        present.die(why)
