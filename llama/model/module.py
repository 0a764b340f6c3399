"""The base of our modules: nn.Module, quick to look into and quick to call."""

from collections.abc import Mapping
from typing import Any

from torch import nn
from torch.nn.modules.module import _global_forward_hooks, _global_forward_pre_hooks
from torch.utils.hooks import RemovableHandle


class Module(nn.Module):
    """nn.Module finds a child only after the ordinary look-up has failed, and asks for nine kinds of hooks in a call:
    a microsecond each, and 500 of them in a decode step. Here children are attributes of the instance as well, and a
    call asks for forward hooks alone: nothing wants a gradient, so that backward hooks have nothing to do.
    """

    def __setattr__(self, name: str, value: Any) -> None:
        super().__setattr__(name, value)
        if isinstance(value, nn.Module):
            self.__dict__[name] = value

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if self._forward_hooks or self._forward_pre_hooks or _global_forward_hooks or _global_forward_pre_hooks:
            return super().__call__(*args, **kwargs)
        return self.forward(*args, **kwargs)


def hooks_of(model: nn.Module) -> list[Mapping[int, Any]]:
    """The forward hooks of every module, and those for all modules there are, live: `any` of them tells whether there
    is one."""
    own = [hooks for module in model.modules() for hooks in (module._forward_hooks, module._forward_pre_hooks)]
    return [_global_forward_hooks, _global_forward_pre_hooks, *own]


def num_hooks_made() -> int:
    """Hooks of any kind since torch was imported: where it has not changed, none has come."""
    return RemovableHandle.next_id
