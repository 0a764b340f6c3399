"""EngineConfig: each option has its help, LLM shows them all, and what is left open is filled in once."""

import inspect
import re
from dataclasses import fields

import pytest

from llama import LLM
from llama.api.errors import ParameterError
from llama.engine.adapters import Adapter
from llama.engine.config import EngineConfig
from llama.engine.speculative_config import SpeculativeConfig
from llama.model.rope_scaling import DynamicScaling, LinearScaling, Llama3Scaling, YarnScaling
from tests.engine.fakes import add, make
from tests.llm.helpers import GREEDY
from tests.model.models import tiny_config, tiny_model

LLAMA3 = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}


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


@pytest.mark.parametrize(
    ("rope", "most", "why"),
    [
        (None, 512, "max_position_embeddings"),
        (Llama3Scaling(**LLAMA3, original_max_position_embeddings=64), 512, "max_position_embeddings"),
        (LinearScaling(factor=4.0), 2048, "the context that RoPE was stretched to"),
        (LinearScaling(factor=0.5), 512, "max_position_embeddings"),
        (YarnScaling(factor=4.0, original_max_position_embeddings=128), 512, "max_position_embeddings"),
        (YarnScaling(factor=4.0, original_max_position_embeddings=512), 2048, "the context that RoPE was stretched to"),
        (DynamicScaling(factor=4.0), 512, "max_position_embeddings; beyond it dynamic RoPE would make a text depend"),
    ],
    ids=str,
)
def test_the_longest_context_that_may_be_asked_for(rope, most, why):
    model = tiny_config(rope_scaling=rope)
    assert EngineConfig().resolved(model, "cpu").max_model_len == model.max_position_embeddings == 512
    assert EngineConfig(max_model_len=most).resolved(model, "cpu").max_model_len == most
    with pytest.raises(ParameterError, match=re.escape(f"max_model_len must be an integer in [2, {most}] ({why}")):
        EngineConfig(max_model_len=most + 1).resolved(model, "cpu")
    assert model.longest_context == most


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


def test_drafts_of_the_device_and_of_what_was_asked():
    model = tiny_config()
    speculation = EngineConfig(speculative_config={"method": "ngram"}).resolved(model, "cpu").speculation
    assert speculation == SpeculativeConfig(method="ngram", disable_by_batch_size=8)
    assert (speculation.num_speculative_tokens, speculation.prompt_lookup_min, speculation.prompt_lookup_max) == (
        4,
        1,
        4,
    )
    given = {"method": "ngram", "prompt_lookup_min": 5, "num_speculative_tokens": 7, "disable_by_batch_size": 3}
    config = EngineConfig(speculative_config=given, max_num_seqs=2)
    speculation = config.resolved(model, "cuda").speculation
    assert (speculation.prompt_lookup_min, speculation.prompt_lookup_max) == (5, 5)
    assert speculation.disable_by_batch_size == 3 and config.most_samples == 2 + 2 * 7
    assert EngineConfig().speculation is None and EngineConfig().most_samples == 256


@pytest.mark.parametrize(
    ("given", "told"),
    [
        ("ngram", 'speculative_config must be a mapping such as {"method": "ngram", "num_speculative_tokens": 4}'),
        ({}, 'speculative_config["method"] must be "ngram" or "draft_model", got None'),
        ({"method": "eagle3", "model": "x"}, "got 'eagle3'"),
        (
            {"method": "ngram", "num_speculative_tokens": 0},
            '_tokens"] must be an integer from 1 to 32',
        ),
        ({"method": "ngram", "num_speculative_tokens": True}, "got True"),
        ({"method": "draft_model"}, '["model"] must be the folder of the draft model, got None'),
        (
            {"method": "draft_model", "model": "x", "prompt_lookup_max": 3},
            "'prompt_lookup_max' with method draft_model",
        ),
        ({"method": "ngram", "model": "x"}, "no key 'model' with method ngram"),
        ({"method": "ngram", "prompt_lookup_max": 17}, '_max"] must be an integer from 1 to 16, got 17'),
        ({"method": "ngram", "prompt_lookup_min": 4, "prompt_lookup_max": 3}, "at most prompt_lookup_max (3), got 4"),
        (
            {"method": "ngram", "draft_tensor_parallel_size": 2},
            "no key 'draft_tensor_parallel_size' with method ngram; it has method",
        ),
    ],
)
def test_a_speculative_config_that_cannot_be_meant_is_refused(given, told):
    with pytest.raises(ParameterError, match="speculative_config") as caught:
        EngineConfig(speculative_config=given)
    assert told in str(caught.value) and caught.value.param == "speculative_config" and "\n" not in str(caught.value)
