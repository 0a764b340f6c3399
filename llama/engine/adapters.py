"""Adapters: which there are by name, and which of them the device holds under which index. Bookkeeping only; no torch.

An adapter gets an index when a sequence that needs it starts to run. The index goes to another adapter, least recently
used first, once no running sequence needs it. An unloaded adapter loses its name at once; the requests that have it
keep it to their end. As an engine, this is used by one thread at a time; `get` and the checks are legal on any.
"""

import re
import reprlib
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from llama.api.errors import ParameterError

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")


@dataclass(slots=True, eq=False, weakref_slot=True)
class Adapter:
    """A LoRA adapter as the engine sees it. The scheduler says under which index the device holds it."""

    name: str = ""
    digest: bytes = b""  # of its content; part of the prefix cache's keys
    content: Any = None  # what the runner loads
    nbytes: int = 0
    index: int = 0  # 0 = the device does not hold it
    num_users: int = 0  # running sequences


NO_ADAPTER = Adapter()


class Adapters:
    def __init__(self, max_loras: int, max_bytes: int | None = None) -> None:
        self.by_name: dict[str, Adapter] = {}
        self.share: Callable[[Adapter], None] | None = None  # has other ranks read it too
        self._max_bytes = max_bytes
        self._max_loras = max_loras
        self._free_indices = list(range(max_loras, 0, -1))
        self._resident: OrderedDict[Adapter, None] = OrderedDict()  # least recently used first

    def check_new(self, name: str, replace: bool = False) -> None:
        """ParameterError if an adapter cannot be loaded under this name. `replace`: one of that name may be there."""
        if not isinstance(name, str) or not _NAME.fullmatch(name):
            raise ParameterError(f"an adapter's name must match {_NAME.pattern}, got {reprlib.repr(name)}", "name")
        if name in self.by_name and not replace:
            raise ParameterError(f"an adapter named {name!r} is loaded already: unload it first", "name")
        if self._max_loras == 0:
            raise ParameterError("max_loras is 0: this engine takes no adapters", "max_loras")

    @property
    def nbytes(self) -> int:
        """Of those that are loaded."""
        return sum(adapter.nbytes for adapter in list(self.by_name.values()))

    def check_room(self, name: str, nbytes: int) -> None:
        """ParameterError if there is no room for so many bytes under this name: no other one is unloaded for it."""
        known = self.by_name.get(name, NO_ADAPTER)
        others = self.nbytes - known.nbytes
        if self._max_bytes is not None and others + nbytes > self._max_bytes:
            raise ParameterError(
                f"the adapter {name!r} takes {nbytes} bytes and those that are loaded {others}: together more than "
                f"max_lora_bytes, {self._max_bytes}; unload one first",
                "max_lora_bytes",
            )

    def add(self, adapter: Adapter, replace: bool = False) -> None:
        """With `replace` one of that name makes way, unless it has the same content."""
        self.check_new(adapter.name, replace)
        self.check_room(adapter.name, adapter.nbytes)
        known = self.by_name.get(adapter.name)
        if self.share is not None and (known is None or known.digest != adapter.digest):
            self.share(adapter)
        if known is not None and known.digest != adapter.digest:
            self.remove(adapter.name)
        self.by_name.setdefault(adapter.name, adapter)

    def remove(self, name: str) -> None:
        """Requests that use it go on; new ones cannot name it."""
        if name is None:
            raise ParameterError("the base model is no adapter: it cannot be unloaded", "name")
        adapter = self.get(name)
        del self.by_name[name]
        if adapter in self._resident:
            self._resident.move_to_end(adapter, last=False)  # its index is the next to be given away

    def get(self, name: str | None) -> Adapter:
        """None is the base model; an unknown name is a ParameterError that lists those that are known."""
        if name is None:
            return NO_ADAPTER
        if not isinstance(name, str) or name not in self.by_name:
            known = ", ".join(sorted(self.by_name)) or "none"
            raise ParameterError(f"no adapter named {reprlib.repr(name)} is loaded (loaded: {known})", "lora")
        return self.by_name[name]

    def acquire(self, adapter: Adapter) -> bool:
        """Give the adapter an index if it has none -> False if all are in use by others."""
        if adapter is NO_ADAPTER:
            return True
        if adapter in self._resident:
            self._resident.move_to_end(adapter)
            return True
        if not self._free_indices:
            idle = next((other for other in self._resident if not other.num_users), None)
            if idle is None:
                return False
            self._evict(idle)
        adapter.index = self._free_indices.pop()
        self._resident[adapter] = None
        return True

    def running(self) -> tuple[Adapter, ...]:
        """Those that some running sequence uses."""
        return tuple(adapter for adapter in self._resident if adapter.num_users)

    def _evict(self, adapter: Adapter) -> None:
        del self._resident[adapter]
        self._free_indices.append(adapter.index)
        adapter.index = 0

    def check(self) -> None:
        """Prove that every index is free or one adapter's."""
        indices = [*self._free_indices, *(adapter.index for adapter in self._resident)]
        assert sorted(indices) == list(range(1, self._max_loras + 1)), indices
