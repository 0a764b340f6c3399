"""Interventions as a caller hands them over: when they are read, and what is refused."""

import asyncio

import pytest
import torch

from llama import Add, Apply, AsyncLLM, Capture, ParameterError, Scale, attention_pattern
from tests.llm.test_capture import engine, prompt, sampled, vector
from tests.model.models import tiny_model


def test_a_vector_is_taken_as_it_is_when_a_request_is_made():
    """It may change in place afterwards, as one that is trained does: between requests, and while one runs."""
    model = tiny_model()
    llm, long, own, heads = engine(model), prompt(40, 0, 0), vector(1), [1]
    changes = [Add("layers.0.resid_post", own), Scale("layers.1.z", 0.0, heads=heads)]
    read = Capture("layers.1.resid_post")

    def asked(runs, changes):
        [output] = runs.generate(long, sampled(1), interventions=changes, capture=read, use_tqdm=False)
        return output.num_cached_tokens, output.captured["layers.1.resid_post"], output.outputs[0].token_ids

    first = asked(llm, changes)
    pieces = llm.stream(long, sampled(1), interventions=changes)
    own.mul_(-2)
    heads[0] = 2
    assert [token for piece in pieces for token in piece.token_ids] == first[2]
    cached, found, tokens = asked(llm, changes)
    expected = asked(engine(model), [Add("layers.0.resid_post", -2 * vector(1)), Scale("layers.1.z", 0.0, heads=[2])])
    assert cached == 0 and tokens == expected[2] != first[2]
    torch.testing.assert_close(found, expected[1], rtol=0, atol=1e-10)


@pytest.mark.parametrize("wrong", [Add("embed", vector(0)), 5, vector(0)], ids=["one", "number", "tensor"])
def test_what_is_no_list_is_refused(wrong):
    llm = engine(tiny_model())
    with pytest.raises(ParameterError, match="interventions must be one list, or 1 lists or None"):
        llm.generate(prompt(5, 5, 0), interventions=wrong)
    assert not llm.engine.has_unfinished


def test_points_may_be_a_generator_for_many_prompts():
    read = Capture(point for point in ("embed", "layers.0.z"))
    outputs = engine(tiny_model()).generate(
        [prompt(5, 5, i) for i in range(2)], sampled(1), capture=read, use_tqdm=False
    )
    assert [list(output.captured) for output in outputs] == [["embed", "layers.0.z"]] * 2


def test_positions_that_can_be_read_only_once_are_refused():
    llm = engine(tiny_model())
    for asked in (
        {"capture": Capture("embed", positions=(p for p in [1]))},
        {"interventions": [Add("embed", vector(0), positions=(p for p in [1]))]},
    ):
        with pytest.raises(ParameterError, match=r"positions must be all, .* got <generator"):
            llm.generate(prompt(5, 5, 0), **asked)


@pytest.mark.parametrize(
    ("q", "k", "told"),
    [
        ((5, 4, 16), (3, 2, 16), r"got q \(5, 4, 16\), k \(3, 2, 16\)"),
        ((5, 2, 16), (5, 4, 16), "heads that share the heads of k"),
        ((5, 4, 16), (5, 2, 8), "heads that share"),
        ((4, 16), (2, 16), r"of three dimensions, got \(4, 16\), \(2, 16\)"),
        ((0, 4, 16), (0, 2, 16), "of three dimensions"),
    ],
)
def test_what_has_no_attention_pattern_is_refused(q, k, told):
    with pytest.raises(ParameterError, match=told):
        attention_pattern(torch.zeros(q), torch.zeros(k))


def test_the_async_engine_refuses_what_is_no_list_too():
    async def ask():
        async with AsyncLLM(engine(tiny_model())) as llm:
            await llm.submit([1, 2, 3], interventions=vector(0))

    with pytest.raises(ParameterError, match="interventions must be one list, or 1 lists or None"):
        asyncio.run(ask())


def downhill(x):
    """A step against the gradient of a score, as steering by a classifier takes it."""
    with torch.enable_grad():
        x = x.clone().requires_grad_()
        [slope] = torch.autograd.grad((x**3).sum(), x)
    return (x - 0.01 * slope).detach()


def test_a_function_may_compute_gradients_of_its_own():
    model, asked = tiny_model(), prompt(9, 9, 1)
    probe = torch.nn.Linear(48, 48, dtype=torch.float64)
    read, params = Capture("layers.1.resid_post", positions="prompt"), sampled(1, temperature=0)
    for function in (downhill, probe):
        changes = [Apply("layers.0.resid_post", function)]
        [output] = engine(model).generate(asked, params, interventions=changes, capture=read, use_tqdm=False)
        with torch.no_grad():
            _, cache = model.run_with_cache(torch.tensor([asked]), "layers.1.resid_post", interventions=changes)
        assert output.outputs[0].finish_reason == "length"
        found, expected = output.captured["layers.1.resid_post"], cache["layers.1.resid_post"][0]
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-10)


def test_logits_processors_may_compute_gradients_of_their_own():
    def ours(prompt_ids, output_ids, logits):
        return downhill(logits)

    params = sampled(1, temperature=0, logits_processors=[ours])
    [output] = engine(tiny_model()).generate(prompt(5, 5, 0), params, use_tqdm=False)
    assert output.outputs[0].finish_reason == "length"


def test_a_function_with_parameters_needs_gradients_asked_for():
    model, ids = tiny_model(), torch.tensor([[1, 2, 3]])
    changes = [Apply("layers.0.resid_post", torch.nn.Linear(48, 48, dtype=torch.float64))]
    with pytest.raises(
        ParameterError, match=r"what Apply at layers\.0\.resid_post gave requires grad.* pass grad=True"
    ):
        model.logits(ids, interventions=changes)
    assert model.logits(ids, interventions=changes, grad=True).requires_grad
    with torch.no_grad():
        assert not model.logits(ids, interventions=changes).requires_grad


def test_transforms_of_a_vector_alone_are_one_clear_error():
    model = tiny_model()

    def score(v):
        return model.logits(torch.tensor([[1, 2, 3]]), interventions=[Add("embed", v)], grad=True).sum()

    with pytest.raises(ParameterError, match=r"grad=True inside torch\.func .* use torch\.autograd"):
        torch.func.grad(score)(vector(0))
    assert torch.autograd.functional.jacobian(score, vector(0)).shape == (48,)
