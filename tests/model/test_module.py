"""Our modules behave as nn.Module does: hooks of every kind fire, children can be replaced, copied and deleted."""

import copy

import pytest
import torch
from torch import nn
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook

from llama.model.module import Module


class Doubled(Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Identity()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return 2 * self.inner(x)


@pytest.mark.parametrize("register", [register_module_forward_hook, register_module_forward_pre_hook])
def test_hooks_on_all_modules_fire(register):
    seen, module = [], Doubled()
    handle = register(lambda module, *rest: seen.append(module))
    module(torch.ones(1))
    handle.remove()
    assert set(seen) == {module, module.inner}
    module(torch.ones(1))
    assert len(seen) == 2


def test_a_hook_before_the_call_changes_its_input():
    module = Doubled()
    module.register_forward_pre_hook(lambda module, args: (args[0] + 1,))
    assert module(torch.ones(1)).item() == 4


def test_a_replaced_child_is_the_one_that_is_called():
    module = Doubled()
    module.inner = Doubled()
    assert module(torch.ones(1)).item() == 4
    assert list(module.children()) == [module.inner]


def test_a_copy_has_children_of_its_own():
    module = Doubled()
    other = copy.deepcopy(module)
    assert other.inner is not module.inner
    assert other.inner is other._modules["inner"]
