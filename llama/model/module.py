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


class Watch:
    """Tells whether a model's parameters are other than they were. A change in place counts as PyTorch counts it: one
    through `.data`, or another library's view of the memory, does not."""

    def __init__(self, model: nn.Module) -> None:
        self._own = [module._parameters for module in model.modules() if module._parameters]
        self.renew()

    def has_changed(self) -> bool:
        """Since `renew`: in place, or there are others in their place."""
        return self._look() != (self._known, self._versions)

    def has_others(self) -> bool:
        return self._look()[0] != self._known

    def renew(self) -> None:
        self._known, self._versions = self._look()

    def _look(self) -> tuple[list[int], list[int]]:
        present = [value for own in self._own for value in own.values() if value is not None]
        return list(map(id, present)), [0 if value.is_inference() else value._version for value in present]


def hooks_of(model: nn.Module) -> list[Mapping[int, Any]]:
    """The forward hooks of every module, and those for all modules there are, live: `any` of them tells whether there
    is one."""
    own = [hooks for module in model.modules() for hooks in (module._forward_hooks, module._forward_pre_hooks)]
    return [_global_forward_hooks, _global_forward_pre_hooks, *own]


def num_hooks_made() -> int:
    """Hooks of any kind since torch was imported: where it has not changed, none has come."""
    return RemovableHandle.next_id
