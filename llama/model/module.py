"""The base of our modules: nn.Module, quick to look into and quick to call."""

from collections.abc import Mapping
from typing import Any
from weakref import ref

import torch
from torch import Tensor, is_grad_enabled, nn
from torch.nn.modules.module import _global_forward_hooks, _global_forward_pre_hooks
from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_post_hook
from torch.utils.hooks import RemovableHandle
from torch.utils.weak import WeakTensorKeyDictionary

from llama.api.errors import ParameterError

_DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)


class Module(nn.Module):
    """nn.Module finds a child only after the ordinary look-up has failed, and asks for nine kinds of hooks in a call:
    a microsecond each, and 500 of them in a decode step. Here children are attributes of the instance as well, and a
    call asks for forward hooks alone, unless gradients are on: else backward hooks have nothing to do.
    """

    def __setattr__(self, name: str, value: Any) -> None:
        super().__setattr__(name, value)
        if isinstance(value, nn.Module):
            self.__dict__[name] = value

    @property
    def is_hooked(self) -> bool:
        """Whether a call has to go through nn.Module's."""
        return bool(
            self._forward_hooks
            or self._forward_pre_hooks
            or _global_forward_hooks
            or _global_forward_pre_hooks
            or is_grad_enabled()
        )

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if (  # `is_hooked`, without a call
            self._forward_hooks
            or self._forward_pre_hooks
            or _global_forward_hooks
            or _global_forward_pre_hooks
            or is_grad_enabled()
        ):
            return super().__call__(*args, **kwargs)
        return self.forward(*args, **kwargs)


class _Steps:
    """Steps of optimizers that PyTorch does not count as changes of the parameters: its fused ones write past its
    count, and those of other libraries may."""

    total = 0
    of = WeakTensorKeyDictionary()

    @classmethod
    def count(cls, optimizer: Optimizer, args: object, kwargs: object) -> None:
        is_other = not type(optimizer).__module__.startswith("torch.optim.")
        for group in optimizer.param_groups:
            if is_other or group.get("fused"):
                cls.total += 1
                for parameter in group["params"]:
                    cls.of[parameter] = cls.of.get(parameter, 0) + 1


register_optimizer_step_post_hook(_Steps.count)


def version_of(parameter: Tensor) -> int:
    """Grows with every change of the tensor in place that PyTorch counts, and with every step of an optimizer of it
    that may go uncounted; 0 where PyTorch counts none."""
    if parameter.is_inference():
        return 0
    return parameter._version + (_Steps.of.get(parameter, 0) if _Steps.total else 0)


class Watch:
    """Tells whether a model's parameters are other than they were. A change in place counts as `version_of` counts it:
    one through `.data`, or another library's view of the memory, does not."""

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self.renew()

    def has_changed(self) -> bool:
        """Since `renew`: in place, or there are others in their place, or other modules."""
        return self.has_others() or self._versions() != self._known_versions

    def has_others(self) -> bool:
        if any(tuple(children.values()) != known for children, known in self._children):
            return True
        present = self._present()
        return len(present) != len(self._known) or any(
            known() is not value for known, value in zip(self._known, present, strict=True)
        )

    def renew(self) -> None:
        modules = list(self._model.modules())
        self._children = [(module._modules, tuple(module._modules.values())) for module in modules if module._modules]
        self._own = [module._parameters for module in modules if module._parameters]
        # Not by id: another parameter may lie where one that is gone has lain.
        self._known = list(map(ref, self._present()))
        self._known_versions = self._versions()

    def _present(self) -> list[nn.Parameter]:
        return [value for own in self._own for value in own.values() if value is not None]

    def _versions(self) -> list[int]:
        return list(map(version_of, self._present()))


def hooks_of(model: nn.Module) -> list[Mapping[int, Any]]:
    """The forward hooks of every module, and those for all modules there are, live: `any` of them tells whether there
    is one."""
    own = [hooks for module in model.modules() for hooks in (module._forward_hooks, module._forward_pre_hooks)]
    return [_global_forward_hooks, _global_forward_pre_hooks, *own]


def num_hooks_made() -> int:
    """Hooks of any kind since torch was imported: where it has not changed, none has come."""
    return RemovableHandle.next_id


def check_place(device: torch.device | str, dtype: torch.dtype) -> None:
    """ParameterError unless a model of this dtype can be made there."""
    if dtype not in _DTYPES:
        raise ParameterError(f"dtype must be torch.float64, float32, float16 or bfloat16, got {dtype!r}", "dtype")
    check_device(device)


def check_device(device: torch.device | str) -> None:
    """ParameterError unless this machine, and this build of torch, can hold a tensor there."""
    try:
        torch.empty(0, device=device)
    except (AssertionError, RuntimeError, TypeError, ValueError) as error:
        why = " ".join(str(error).split())[:200]
        raise ParameterError(f"device={str(device)!r} cannot be used: {why}", "device") from None
