"""EngineConfig: each option has its help, LLM shows them all, and what is left open is filled in once."""

import inspect
from dataclasses import fields

import pytest

from llama import LLM
from llama.api.errors import ParameterError
from llama.engine.adapters import Adapter
from llama.engine.config import EngineConfig
from tests.engine.fakes import add, make
from tests.llm.helpers import GREEDY
from tests.model.models import tiny_config, tiny_model


def test_each_option_has_one_line_of_help():
    for option in fields(EngineConfig):
        assert option.metadata["help"] and "\n" not in option.metadata["help"], option.name


def test_llm_takes_and_shows_every_option():
    shown = inspect.signature(LLM).parameters
    for option in fields(EngineConfig):
        assert shown[option.name].default == option.default and shown[option.name].annotation == option.type
    asked = {"max_model_len": 64, "max_num_seqs": 3, "num_blocks": 8, "seed": 5, "max_loras": 0, "enforce_eager": True}
    config = LLM(tiny_model(), **asked).engine.config
    assert {name: getattr(config, name) for name in asked} == asked


def test_what_is_left_open_is_the_models_and_the_devices():
    model = tiny_config()
    config = EngineConfig(block_size=32).resolved(model, "cuda")
    assert (config.max_model_len, config.max_num_batched_tokens) == (model.max_position_embeddings, 8192)
    assert config.blocks_per_sequence == -(-model.max_position_embeddings // 32)
    assert EngineConfig().resolved(model, "cpu").max_num_batched_tokens == 2048
    asked = EngineConfig(max_model_len=2, max_num_batched_tokens=7)
    assert asked.resolved(model, "cpu") == asked
    with pytest.raises(ValueError, match=r"max_model_len must be an integer in .*, got 1000000"):
        EngineConfig(max_model_len=10**6).resolved(model, "cpu")


def test_what_can_never_run_is_refused_before_any_of_its_call_is_queued():
    llm = LLM(tiny_model(), num_blocks=2, max_num_seqs=2)
    with pytest.raises(ParameterError, match="can never run: the KV cache holds 32 tokens"):
        llm.generate([[1, 2], [1] * 40], GREEDY, use_tqdm=False)
    assert llm.engine.metrics().num_prompt_tokens == 0


def test_a_request_keeps_its_adapter_when_the_name_goes():
    engine, _ = make()
    adapter = Adapter("style", b"digest")
    engine.adapters.add(adapter)
    request = engine.request("a", [1, 2], GREEDY, lora="style")
    engine.adapters.remove("style")
    with pytest.raises(ValueError, match="no adapter named 'style'"):
        add(engine, "b", [1, 2], GREEDY, lora="style")
    engine.add(request)
    engine.step()
    assert adapter.num_users == 1
