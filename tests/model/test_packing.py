"""Which weights are packed: by the table, by what the user says, and the same in every process."""

import logging

import pytest
import torch

from llama import LLM
from llama.api.errors import ParameterError
from llama.model import packing
from llama.model.config import ModelConfig
from llama.model.linear import Linear
from llama.model.packing import library_for, linear_shapes
from tests.model.models import tiny_config, tiny_model

LIBRARIES = {
    "AVX2": {torch.float32: "onednn", torch.bfloat16: "fbgemm", torch.float16: "fbgemm"},
    "16-bit arithmetic": {torch.float32: "onednn", torch.bfloat16: "onednn", torch.float16: "onednn"},
    "neither library": {},
}


def forms(model):
    return {type(module.form) for module in model.modules() if isinstance(module, Linear)}


@pytest.mark.parametrize(
    "processor, dtype, plain, packed",
    [
        ("AVX2", torch.float32, (256, 768), (576, 576)),
        ("AVX2", torch.bfloat16, None, (64, 64)),
        ("16-bit arithmetic", torch.bfloat16, (128, 64), (576, 576)),
        ("16-bit arithmetic", torch.float16, (256, 256), (512, 256)),
        ("neither library", torch.float32, (4096, 4096), None),
        ("AVX2", torch.float64, (4096, 4096), None),
    ],
    ids=str,
)
def test_the_table(monkeypatch, processor, dtype, plain, packed):
    monkeypatch.setattr(packing, "library_of", LIBRARIES[processor].get)
    if plain is not None:
        assert library_for(plain, dtype) is None
    if packed is not None:
        assert library_for(packed, dtype) == LIBRARIES[processor][dtype]
        assert library_for(packed, dtype, "never") is None
    assert library_for((1, 1), dtype, "always") == LIBRARIES[processor].get(dtype)


def test_what_the_user_says_holds_for_an_llm_too():
    for said, plain in (("never", True), (None, True), ("always", False)):
        model = tiny_model(dtype=torch.float32)
        model.prepare(packing=said)
        LLM(model, num_blocks=16)
        assert (forms(model) == {type(None)}) is plain, said


def test_a_word_that_means_nothing():
    with pytest.raises(ParameterError, match="packing must be one of auto, always, never, got 'sometimes'"):
        tiny_model().prepare(packing="sometimes")


def test_the_log_tells(caplog):
    with caplog.at_level(logging.DEBUG, "llama.model.packing"):
        tiny_model(dtype=torch.float32).prepare()
    assert "linear layers by form (packing auto): {'plain': " in caplog.text


@pytest.mark.parametrize("changes", [{}, {"head_dim": 24, "num_key_value_heads": 1}], ids=str)
def test_shapes_are_those_of_the_model(changes):
    model = tiny_model(**changes)
    found = {
        name.rsplit(".", 1)[-1]: (module.out_features, module.in_features)
        for name, module in model.named_modules()
        if isinstance(module, Linear)
    }
    assert linear_shapes(tiny_config(**changes)) == found


def test_the_tiny_preset_stays_plain():
    shapes = linear_shapes(ModelConfig.preset("tiny")).values()
    assert not any(library_for(shape, torch.float32) for shape in shapes)
