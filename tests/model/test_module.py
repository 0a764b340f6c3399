"""Our modules behave as nn.Module does: hooks of every kind fire, children can be replaced, copied and deleted."""

import copy

import pytest
import torch
from torch import nn
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook
from torch.nn.utils import parametrize, prune

from llama.model.module import Module, Watch
from llama.model.transformer import Transformer
from tests.model.models import tiny_model
from tests.model.pairs import float64_throughout, make_pair


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


class TwiceTheWeight(nn.Module):
    def forward(self, weight):
        return 2 * weight


def test_weights_may_be_pruned_or_parametrised():
    """Then `weight` is no parameter of the module."""
    ids = torch.tensor([[1, 2, 3]])
    model, expected = tiny_model(), tiny_model()
    down = model.layers[0].mlp.down_proj
    parametrize.register_parametrization(down, "weight", TwiceTheWeight())
    parametrize.register_parametrization(model.norm, "weight", TwiceTheWeight())
    expected.layers[0].mlp.down_proj.weight.mul_(2)
    expected.norm.weight.mul_(2)
    assert torch.equal(model.logits(ids), expected.logits(ids))
    pruned = tiny_model()
    prune.l1_unstructured(pruned.lm_head, "weight", 0.5)
    expected = tiny_model()
    expected.lm_head.weight.mul_(pruned.lm_head.weight_mask)
    assert torch.equal(pruned.logits(ids), expected.logits(ids))


def test_a_parameter_where_one_that_is_gone_has_lain_is_another():
    linear = nn.Linear(2, 2)

    def replace():
        linear.weight = nn.Parameter(torch.zeros(2, 2))

    for _ in range(100):
        replace()
        watch = Watch(linear)
        assert not watch.has_changed()
        replace()
        replace()
        assert watch.has_changed()


@pytest.mark.parametrize("register", ["register_full_backward_hook", "register_full_backward_pre_hook"])
@pytest.mark.parametrize("of_all", [False, True])
def test_backward_hooks_fire(register, of_all, tmp_path):
    """And see what they see in transformers."""
    with float64_throughout():
        theirs, ours = make_pair(tmp_path, seed=4, attn_implementation="eager")
        ids, seen = torch.tensor([[1, 2, 3, 4]]), []
        for model, mlp in ((theirs.model, theirs.model.layers[1].mlp), (ours, ours.layers[1].mlp)):

            def hook(module, *gradients, mlp=mlp):
                if module is mlp:
                    seen.append(gradients[-1][0])  # with respect to the output

            on = getattr(torch.nn.modules.module, register.replace("register_", "register_module_")) if of_all else None
            handle = on(hook) if of_all else getattr(mlp, register)(hook)
            logits = theirs(ids).logits if model is theirs.model else ours.logits(ids, grad=True)
            logits.square().sum().backward()
            handle.remove()
    assert len(seen) == 2
    torch.testing.assert_close(seen[1], seen[0].view_as(seen[1]), rtol=0, atol=1e-9 * float(seen[0].abs().max()))


@pytest.mark.parametrize("assign", [False, True])
@pytest.mark.parametrize("packing", ["never", "always"])
@pytest.mark.parametrize("names", [("embed_tokens.weight",), ("embed_tokens.weight", "lm_head.weight")])
def test_a_tied_head_stays_tied(assign, packing, names):
    """Also where load_state_dict puts tensors in the place of parameters."""
    ids, options = torch.tensor([[1, 2, 3]]), {"dtype": torch.float32, "tie_word_embeddings": True}
    given = tiny_model(seed=5, **options).state_dict()
    expected, model = tiny_model(**options), tiny_model(**options)
    expected.embed_tokens.weight.copy_(given["embed_tokens.weight"])
    model.prepare(packing=packing)
    model.load_state_dict({name: given[name] for name in names}, strict=False, assign=assign)
    torch.testing.assert_close(model.logits(ids), expected.logits(ids), rtol=0, atol=1e-5)
    assert model.requires_grad_().lm_head.weight is model.embed_tokens.weight


@pytest.mark.parametrize("tied", [False, True])
def test_a_model_without_memory_takes_a_state_dict(tied):
    expected = tiny_model(tie_word_embeddings=tied)
    model = Transformer(expected.config, device="meta", dtype=torch.float64)
    model.load_state_dict(expected.state_dict(), assign=True)
    assert torch.equal(model.logits(torch.tensor([[1, 2, 3]])), expected.logits(torch.tensor([[1, 2, 3]])))


@pytest.mark.parametrize("assign", [False, True])
def test_a_tied_head_is_no_other_one(assign):
    given = tiny_model(seed=5).state_dict()
    with pytest.raises(
        RuntimeError, match=r"lm_head\.weight differs from embed_tokens\.weight, to which the config ties"
    ):
        tiny_model(tie_word_embeddings=True).load_state_dict(given, assign=assign)
