"""Gradients through the network equal those of transformers."""

import pytest
import torch
from torch.autograd import grad
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import apply_activation_checkpointing

from llama.api.errors import ParameterError
from llama.model.interventions import Add, Replace, Scale
from llama.model.transformer import MLP, Attention, Block
from tests.model.models import tiny_model
from tests.model.pairs import float64_throughout, make_pair


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    path = tmp_path_factory.mktemp("gradients")
    with float64_throughout():
        yield make_pair(path, seed=4, vocab_size=61, attn_implementation="eager")


IDS = torch.randint(0, 61, (2, 13), generator=torch.Generator().manual_seed(1))
WEIGHTS = torch.randn(2, 13, 61, dtype=torch.float64, generator=torch.Generator().manual_seed(2))


def loss(logits):
    return (logits.log_softmax(-1) * WEIGHTS).sum()


def close(ours, theirs):
    assert theirs.abs().max() > 1e-3
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-9 * max(1.0, float(theirs.abs().max())))


def test_with_respect_to_what_is_read(pair):
    """Attribution patching: one backward, the gradient at every layer."""
    theirs, ours = pair
    states = theirs(IDS, output_hidden_states=True)
    points = ["embed", "layers.0.resid_post", "layers.1.resid_post"]
    expected = grad(loss(states.logits), states.hidden_states[:3])
    logits, cache = ours.run_with_cache(IDS, points, logits=True, grad=True)
    for ours_, theirs_ in zip(grad(loss(logits), [cache[p] for p in points]), expected, strict=True):
        close(ours_, theirs_)


@pytest.mark.parametrize("name", ["q_pre", "k_pre", "q", "k", "v", "z", "mlp_act", "attn_out", "resid_mid"])
def test_the_gradient_at_a_point_is_the_slope_along_a_direction(name):
    """Points that transformers does not give: (f(x + h d) - f(x - h d)) / 2 h against the gradient times d."""
    ours = tiny_model(vocab_size=61)
    point, h = f"layers.1.{name}", 1e-5
    logits, cache = ours.run_with_cache(IDS, point, logits=True, grad=True)
    [slope] = grad(loss(logits), cache[point])
    along = torch.randn(slope.shape[2:], dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    moved = [loss(ours.logits(IDS, interventions=[Add(point, along, scale=s)])) for s in (h, -h)]
    torch.testing.assert_close((slope * along).sum(), (moved[0] - moved[1]) / (2 * h), rtol=1e-5, atol=1e-5)


def test_with_respect_to_embeddings_that_are_put_in(pair):
    """Integrated gradients."""
    theirs, ours = pair
    start = theirs.model.embed_tokens(IDS[:1]).detach()
    steps = torch.linspace(0.1, 1, 4, dtype=torch.float64)
    for step in steps:
        x = (step * start).requires_grad_()
        [expected] = grad(loss(theirs(inputs_embeds=x).logits), x)
        y = (step * start[0]).requires_grad_()
        logits = ours.logits(IDS[:1], interventions=[Replace("embed", y)], grad=True)
        close(grad(loss(logits), y)[0], expected[0])


def test_with_respect_to_parameters(pair):
    theirs, ours = pair
    [expected] = grad(loss(theirs(IDS).logits), theirs.model.layers[1].mlp.down_proj.weight)
    weight = ours.layers[1].mlp.down_proj.weight.requires_grad_()
    try:
        close(grad(loss(ours.logits(IDS, grad=True)), weight)[0], expected)
        with pytest.raises(ParameterError, match=r"layers.1.mlp.down_proj.weight requires grad.* pass grad=True"):
            ours.logits(IDS)
        with torch.no_grad():
            assert not ours.logits(IDS).requires_grad
    finally:
        weight.requires_grad_(False)


def test_a_vector_that_requires_a_gradient_needs_it_asked_for():
    number = torch.tensor(2.0, dtype=torch.float64, requires_grad=True)
    for needy in (
        Add("embed", torch.zeros(48, requires_grad=True)),
        Add("embed", torch.ones(48), scale=number),
        Scale("layers.0.z", number, heads=[1]),
    ):
        with pytest.raises(ParameterError, match=f"{needy.name} requires grad"):
            tiny_model().logits(IDS, interventions=[needy])
        if needy.number[1] is number:
            assert grad(loss(tiny_model(vocab_size=61).logits(IDS, interventions=[needy], grad=True)), number)[0] != 0


def test_packed_weights_are_differentiated_through_too():
    plain, packed = tiny_model(vocab_size=61, dtype=torch.float32), tiny_model(vocab_size=61, dtype=torch.float32)
    packed.prepare(packing="always")
    both = []
    for model in (plain, packed):
        logits, cache = model.run_with_cache(IDS, "embed", logits=True, grad=True)
        both.append(grad(loss(logits), cache["embed"])[0])
    assert torch.equal(*both)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_the_differentiable_ops_compute_the_same(dtype):
    ours = tiny_model(vocab_size=61, dtype=dtype)
    bound = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 0.05}[dtype]
    expected = ours.logits(IDS)
    found = ours.logits(IDS, grad=True)
    assert found.requires_grad
    torch.testing.assert_close(found.detach(), expected, rtol=0, atol=bound * float(expected.abs().max()))


def test_inference_mode_has_no_gradients():
    with torch.inference_mode(), pytest.raises(ParameterError, match=r"grad=True has no effect inside torch.inference"):
        tiny_model().logits(IDS, grad=True)


@pytest.mark.parametrize("wrapped", [Block, MLP, Attention])
def test_layers_may_be_checkpointed(wrapped):
    plain, ours = tiny_model(vocab_size=61).requires_grad_(), tiny_model(vocab_size=61).requires_grad_()
    apply_activation_checkpointing(ours, check_fn=lambda module: isinstance(module, wrapped))
    both = []
    for model in (plain, ours):
        logits, cache = model.run_with_cache(IDS, ["layers.*.resid_post", "layers.1.z"], logits=True, grad=True)
        read = [cache[point] for point in cache]
        both.append([*read, *grad(loss(logits), [*read, *model.parameters()])])
    for found, expected in zip(*both, strict=True):
        assert torch.equal(found, expected)


def test_quantised_weights_have_no_gradients():
    ours = tiny_model(vocab_size=61)
    ours.quantise("int8")
    with pytest.raises(ParameterError, match="quantised weights have no gradients: dequantise"):
        ours.requires_grad_()
    assert not any(parameter.requires_grad for parameter in ours.parameters())
    ours.requires_grad_(False).embed_tokens.weight.requires_grad_()
    assert grad(loss(ours.logits(IDS, grad=True)), ours.embed_tokens.weight)[0].abs().max() > 0
    ours.dequantise()
    assert all(parameter.requires_grad for parameter in ours.requires_grad_().parameters())
