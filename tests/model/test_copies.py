"""Copies and pickles of a model compute what it computes, whatever form its weights lie in."""

import copy
import io
import pickle

import pytest
import torch

from llama.model.linear import Linear
from llama.model.weights.quantised import LAYOUTS, SCHEMES
from tests.model.models import tiny_model

IDS = torch.arange(9).view(1, 9)


def by_torch(model):
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


# The pickle module alone knows no float8, whatever holds it.
WAYS = {"deepcopy": copy.deepcopy, "torch.save": by_torch, "pickle": lambda model: pickle.loads(pickle.dumps(model))}


def same(model, other):
    assert torch.equal(other.logits(IDS), model.logits(IDS))
    forms = [[type(m.form) for m in each.modules() if isinstance(m, Linear)] for each in (model, other)]
    assert forms[0] == forms[1]
    before = model.logits(IDS)
    for parameter in other.parameters():
        parameter.zero_()
    assert torch.equal(model.logits(IDS), before)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_packed(dtype, tied, way):
    model = tiny_model(dtype=dtype, tie_word_embeddings=tied)
    model.prepare(packing="always")
    other = WAYS[way](model)
    same(model, other)
    assert (other.lm_head.form is None) == (model.lm_head.form is None)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("scheme", SCHEMES)
def test_quantised(scheme, layout, dtype, way):
    if scheme == "fp8" and way == "pickle":
        pytest.skip("the pickle module knows no float8")  # torch.save and deepcopy, the other ways, do
    model = tiny_model(dtype=dtype, hidden_size=128, intermediate_size=256)
    model.quantise(scheme)
    model.prepare(layout)
    other = WAYS[way](model)
    forms = [each.layers[0].mlp.down_proj.form for each in (model, other)]
    assert forms[0].told == forms[1].told and forms[0].nbytes == forms[1].nbytes
    same(model, other)
