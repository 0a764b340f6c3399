"""The adapters that requests may name: those loaded at the start, and sub-folders of one folder, loaded on first use.

No path ever comes from a request: a name is looked up among the sub-folders and must not lead outside.
"""

import asyncio
import logging
import re
from pathlib import Path

from llama.api.errors import WorkerLostError
from llama.async_llm.async_llm import AsyncLLM
from llama.server.config import ServerConfig
from llama.server.errors import ApiError, bad_input, no_adapters, unavailable

logger = logging.getLogger(__name__)

Stamp = tuple[tuple[int, int, int], ...]

_FILES = ("adapter_config.json", "adapter_model.safetensors")
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")


class AdapterRegistry:
    """The config's `lora_dir` holds adapters by name; None where only those loaded at the start are served. None of
    these may have a name of the base model (ParameterError)."""

    def __init__(self, llm: AsyncLLM, config: ServerConfig) -> None:
        self._llm = llm
        self._folder = None if config.lora_dir is None else config.lora_dir.resolve()
        self._is_taken = config.serves  # as a name, by the base model
        config.check_adapters(self._loaded())
        self._loading = asyncio.Lock()
        self._stamps: dict[str, Stamp] = {}  # of the files of adapters from the folder, when they were read

    def names(self) -> list[str]:
        """All that a request may name, loaded or not."""
        on_disk = [] if self._folder is None else [path.name for path in self._folder.iterdir()]
        return sorted({*self._loaded(), *(name for name in on_disk if self._path(name) is not None)})

    async def take(self, name: str, param: str = "lora") -> str:
        """Load the adapter if it is not loaded yet, or its files in the folder are new, and return its name. Raises
        ApiError; for an unknown name it lists the known ones. `param` is the field of the request that holds the
        name."""
        if name in self._loaded() and not self._is_stale(name):
            return name
        async with self._loading:
            if name not in self._loaded() or self._is_stale(name):
                await self._load(name, param)
        return name

    def _is_stale(self, name: str) -> bool:
        path = self._path(name) if name in self._stamps else None
        return path is not None and _stamp(path) != self._stamps[name]

    async def _load(self, name: str, param: str) -> None:
        path = self._path(name)
        if path is None:
            raise self._unknown(name)
        stamp = _stamp(path)  # before the files are read: what changes meanwhile is read again
        try:
            await self._llm.load_lora(name, path, replace=True)
            self._stamps[name] = stamp
        except WorkerLostError as error:
            logger.error("adapter %s: %s", name, error)
            raise unavailable("The process that read the adapter was lost, please try again") from None
        except (ValueError, OSError) as error:
            logger.error("adapter %s: %s", name, error)
            self._stamps[name] = stamp
            if name in self._loaded():  # being written, perhaps: what was loaded serves until the files change again
                return
            raise bad_input(f"the adapter '{name}' cannot be loaded: the server's log says why", param) from None

    def _unknown(self, name: str) -> ApiError:
        names = self.names()
        if not names:
            return no_adapters()
        return bad_input(f"no adapter is named '{name[:100]}': there are {', '.join(names)}", "lora")

    def _loaded(self) -> list[str]:
        return [info.name for info in self._llm.list_loras()]

    def _path(self, name: str) -> Path | None:
        """The sub-folder of that name if it holds an adapter and lies inside, links followed."""
        if self._folder is None or not _NAME.fullmatch(name) or self._is_taken(name):
            return None
        path = (self._folder / name).resolve()
        is_adapter = path.is_relative_to(self._folder) and (path / "adapter_config.json").is_file()
        return path if is_adapter else None


def _stamp(path: Path) -> Stamp:
    """Differs once a file of the adapter has been written anew."""
    found = [(path / name).stat() for name in _FILES if (path / name).exists()]
    return tuple((each.st_mtime_ns, each.st_size, each.st_ino) for each in found)
