"""Adapters by name at the library's face: loading, listing, and vLLM's way of asking for one."""

import threading
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from llama.api.errors import ParameterError
from llama.engine.adapters import Adapter
from llama.engine.engine import Engine
from llama.hub import adapter_folder
from llama.model.lora import read_adapter
from llama.model.transformer import Transformer


@dataclass(frozen=True, slots=True)
class LoraInfo:
    """A loaded adapter: its largest rank, the modules it adapts, its bytes and a digest of its content."""

    name: str
    rank: int
    targets: tuple[str, ...]
    nbytes: int
    digest: str


@dataclass(frozen=True, slots=True)
class LoRARequest:
    """vLLM's way to name an adapter: it is loaded from `lora_path` when it is first asked for. The name tells adapters
    apart; a new id of a known name says that the files are new: they are read again."""

    lora_name: str
    lora_int_id: int
    lora_path: str


class RequestedLoras:
    """Loads what LoRARequests ask for, from any thread."""

    def __init__(self, load: Callable[[str, str, bool], object]) -> None:
        """`load` takes a name, a path, and whether an adapter of that name may make way."""
        self._load = load
        self._lock = threading.Lock()
        self._known: dict[str, tuple[str, int]] = {}  # name -> the path and the id that asked for it last

    def name(self, request: LoRARequest, loaded_from: str | None) -> str:
        """The adapter's name, once it is loaded. `loaded_from`: what the name stands for now. ParameterError for
        what cannot be loaded, AdapterError for bad files."""
        name, number, path = request.lora_name, request.lora_int_id, str(Path(request.lora_path))
        with self._lock:
            known = self._known.get(name, (loaded_from, number))
            if loaded_from is None or known[1] != number:
                self._load(name, path, True)
            elif known[0] != path:
                raise ParameterError(
                    f"an adapter named {name!r} is loaded from {known[0]}, lora_request says {path}: give a new id",
                    "lora_request",
                )
            self._known[name] = path, number
        return name


def read_lora(engine: Engine, model: Transformer, name: str, path: str | Path, replace: bool = False) -> Adapter:
    """Read and check what is to be loaded, and compile what steps with it need; nothing of the engine is changed."""
    engine.adapters.check_new(name, replace)
    if not isinstance(path, str | Path):
        raise ParameterError(f"path must be an adapter's folder, got {type(path).__name__}", "path")
    check_size = partial(engine.adapters.check_room, name)
    content = read_adapter(adapter_folder(path), model, max_rank=engine.config.max_lora_rank, check_size=check_size)
    adapter = Adapter(name, content.digest, content, content.nbytes)
    engine.warm(adapter)
    return adapter


def describe(adapter: Adapter) -> LoraInfo:
    content = adapter.content
    return LoraInfo(adapter.name, content.rank, content.targets, content.nbytes, adapter.digest.hex())
