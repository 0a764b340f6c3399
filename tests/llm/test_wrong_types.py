"""Arrays, tensors and other things in place of a word, a number, a path or JSON: each is one refusal by name."""

import re
from pathlib import Path

import numpy as np
import pytest
import torch

from llama import LLM, Add, Apply, BeamSearchParams, Capture, ParameterError, Project, SamplingParams
from llama.api.errors import AdapterError, CheckpointError, ConfigError
from llama.engine.config import EngineConfig
from llama.llm.loading import resolve_device, resolve_dtype
from llama.model.checkpoint.quantised import scheme_for
from llama.model.config import ModelConfig
from llama.model.transformer import Transformer
from tests.llm.helpers import GREEDY

ARRAYS = [np.array([1, 2]), np.array([]), np.array([None]), np.array(3), torch.zeros(2), torch.zeros(0)]
POINT = "layers.0.resid_post"
TALK = [{"role": "user", "content": "Hi"}]
CALLS = {
    "logprobs_mode": lambda llm, wrong: SamplingParams(logprobs_mode=wrong),
    "response_format": lambda llm, wrong: SamplingParams(response_format={"type": wrong}),
    "temperature": lambda llm, wrong: BeamSearchParams(beam_width=2, max_tokens=2, temperature=wrong),
    "scheduling_policy": lambda llm, wrong: EngineConfig(scheduling_policy=wrong),
    "kv_cache_dtype": lambda llm, wrong: EngineConfig(kv_cache_dtype=wrong),
    "seed": lambda llm, wrong: EngineConfig(seed=wrong),
    "dtype": lambda llm, wrong: resolve_dtype(wrong),
    "quantization": lambda llm, wrong: scheme_for(wrong, None),
    "quantization_layout": lambda llm, wrong: llm.model.prepare(wrong),
    "reasoning_parser": lambda llm, wrong: LLM(llm.model, num_blocks=16, reasoning_parser=wrong),
    "load_format": lambda llm, wrong: LLM(llm.model, num_blocks=16, load_format=wrong),
    "pooling": lambda llm, wrong: llm.embed("a", wrong),
    "capture": lambda llm, wrong: llm.generate("a", GREEDY, capture=wrong),
    "capture: reduce": lambda llm, wrong: llm.generate("a", GREEDY, capture=Capture("norm", reduce=wrong)),
    "points": lambda llm, wrong: llm.model.run_with_cache(torch.tensor([[1, 2]]), wrong),
    "interventions": lambda llm, wrong: llm.generate("a", GREEDY, interventions=wrong),
    "interventions: point": lambda llm, wrong: llm.generate("a", GREEDY, interventions=[Apply(wrong, torch.relu)]),
    "interventions: mode": lambda llm, wrong: changed(llm, Project(POINT, torch.ones(64), mode=wrong)),
    "interventions: norm_match": lambda llm, wrong: changed(llm, Add(POINT, torch.ones(64), norm_match=wrong)),
    "chat_template_kwargs": lambda llm, wrong: llm.chat(TALK, GREEDY, chat_template_kwargs=wrong),
    "tools: type": lambda llm, wrong: llm.chat(TALK, GREEDY, [{"name": "f", "type": wrong}]),
    "tools: JSON": lambda llm, wrong: llm.chat(TALK, GREEDY, [{"name": "f", "parameters": {"x": wrong}}]),
    "messages: JSON": lambda llm, wrong: llm.chat([{**TALK[0], "name": wrong}], GREEDY),
}


def changed(llm, intervention):
    return llm.generate("a", GREEDY, interventions=[intervention], use_tqdm=False)


@pytest.mark.parametrize("name", CALLS)
def test_an_array_is_refused_by_the_name_of_its_field(llm, name):
    nothing = {"interventions": (1, 2, 5)}  # no change for any of the prompts
    for i, wrong in enumerate(ARRAYS):
        if i in nothing.get(name, ()):
            continue
        with pytest.raises(ParameterError) as caught:
            CALLS[name](llm, wrong)
        assert caught.value.param in (name.partition(":")[0], "points") and len(str(caught.value)) < 600


@pytest.mark.parametrize("wrong", ["", 0, False, {}])
def test_what_is_false_is_no_capture_and_no_template_arguments(llm, wrong):
    with pytest.raises(ParameterError, match=r"^capture must be a Capture, got "):
        llm.generate("a", GREEDY, capture=wrong)
    if wrong != {}:
        with pytest.raises(ParameterError, match=r"^chat_template_kwargs must be a dict, got "):
            llm.chat(TALK, GREEDY, chat_template_kwargs=wrong)


def test_a_large_integer_scales_as_its_float_does(llm):
    vector = torch.full((64,), 1e-12)
    found = [changed(llm, Add(POINT, vector, scale=scale))[0].outputs[0].token_ids for scale in (2**70, 2.0**70)]
    assert found[0] == found[1]


def test_a_name_that_no_file_can_have_is_refused(llm, tmp_path):
    for wrong, told in (("x" * 300, "File name too long"), ("a\0b", "null byte"), ("\ud800", "surrogates")):
        for name in (wrong, Path(wrong)):
            with pytest.raises(CheckpointError, match=told):
                LLM(name)
            with pytest.raises(CheckpointError, match=told):
                LLM(llm.model, name)
            with pytest.raises(AdapterError, match=told):
                llm.load_lora("style", name)
    for path in ("\ud800", tmp_path / ("x" * 300) / "y"):
        with pytest.raises(ParameterError, match=r"names no file or folder") as caught:
            llm.save_prefix("a", path)
        assert caught.value.param == "path"


def test_a_refusal_does_not_repeat_a_long_value(llm):
    long = "x" * 100_000
    for call in (
        lambda: llm.generate("a", GREEDY, lora=long),
        lambda: llm.unload_lora(long),
        lambda: llm.load_lora(long, "folder"),
        lambda: llm.chat([{"role": long, "content": "a"}], GREEDY),
        lambda: llm.chat(TALK, GREEDY, [{"name": "f", "type": long}]),
        lambda: llm.chat(TALK, GREEDY, add_generation_prompt=long),
        lambda: llm.generate("a", GREEDY, capture=Capture(long)),
        lambda: llm.generate("a", GREEDY, interventions=long),
    ):
        with pytest.raises(ParameterError, match=re.escape("xxx")) as caught:
            call()
        assert len(str(caught.value)) < 600


@pytest.mark.parametrize("wrong", [None, 5, [], b"folder", torch.zeros(2)])
def test_what_is_no_path_is_refused(llm, wrong):
    told = f"^a path must be a text or a Path, got {type(wrong).__name__}$"
    with pytest.raises(CheckpointError, match=told):
        Transformer.from_pretrained(wrong)
    with pytest.raises(ConfigError, match=told):
        ModelConfig.from_pretrained(wrong)
    with pytest.raises(ParameterError, match=told):
        llm.model.save_pretrained(wrong)


def test_what_a_model_cannot_be_made_of_is_refused(folder):
    for wrong in ("int8", None, 5, np.array(["auto", "x"])):
        with pytest.raises(ParameterError, match=r"^dtype must be one of auto, "):
            Transformer.from_pretrained(folder, dtype=wrong)
    with pytest.raises(ParameterError, match=r"^device='9223372036854775808' cannot be used"):
        Transformer.from_pretrained(folder, device=2**63)
    config = ModelConfig.preset("tiny")
    for wrong in ("1", 1.0, 2**64, torch.tensor(1)):
        with pytest.raises(ParameterError, match=r"^seed must be an integer from "):
            Transformer(config, seed=wrong)
    same = [Transformer(config, seed=seed).lm_head.weight for seed in (3, np.int64(3))]
    assert torch.equal(same[0], same[1])


@pytest.mark.parametrize("wrong", [2**63, -(2**70), np.array([1, 2])])
def test_what_is_no_device(wrong):
    with pytest.raises(ParameterError, match="device must be "):
        resolve_device(wrong)
