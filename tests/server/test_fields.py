"""docs/fields.md against the code: every field that clients, vLLM and published files know is used, has no effect, or
is refused by name, as the tables say."""

import ast
import dataclasses
import inspect
import json
import re
from pathlib import Path
from types import SimpleNamespace

import peft
import pytest
import transformers
from openai.types import completion_create_params
from openai.types.chat import chat_completion_stream_options_param
from openai.types.chat import completion_create_params as chat_create_params
from openai.types.responses import response_create_params

from llama import LLM, AdapterError, CheckpointError, ConfigError, SamplingParams, StructuredOutputsParams
from llama.engine.config import EngineConfig
from llama.llm.vllm_names import HARMLESS, METHOD_ARGUMENTS, refuse_foreign
from llama.model.config import ModelConfig
from llama.model.generation_config import GenerationConfig
from llama.model.lora.adapter_config import read_adapter_config
from llama.server.cloudflare.schema import RunRequest
from llama.server.openai.responses_body import ResponsesRequest
from llama.server.openai.schema import ChatRequest, CompletionRequest, StreamOptions
from llama.server.openai.tokens import DetokenizeRequest, TokenizeRequest
from llama.text.tokenizer import Tokenizer
from tests.server.helpers import RUN, TOKENIZER, user

DOCS = Path(__file__).parents[2] / "docs" / "fields.md"
USED, NO_EFFECT, ALONE, REFUSED = "used", "no effect", "at this value alone", "refused"
WARNED = "no effect, with a warning"
CHAT, COMPLETION, RESPONSES = "/v1/chat/completions", "/v1/completions", "/v1/responses"
TOKENIZE, DETOKENIZE = "/tokenize", "/detokenize"


def read_tables() -> dict[str, dict[str, dict[str, str]]]:
    """Section -> status -> field -> the values at which it is taken."""
    tables: dict[str, dict[str, dict[str, str]]] = {}
    for section in DOCS.read_text().split("\n## ")[1:]:
        title = section.split("\n")[0]
        statuses = tables[title] = {}
        for status, fields in re.findall(r"^\| ([a-z][a-z ,]+) \| (.+) \|$", section, re.MULTILINE):
            for name, _, values in (text.partition(": ") for text in re.findall(r"`([^`]+)`", fields)):
                assert not any(name in known for known in statuses.values()), f"{title}: {name} stands twice"
                statuses.setdefault(status, {})[name] = values
    return tables


TABLES = read_tables()


def fields(section: str, *statuses: str) -> set[str]:
    return {name for status in statuses or TABLES[section] for name in TABLES[section].get(status, ())}


def cases(status: str, *sections: str) -> list[tuple[str, str]]:
    return [(section, name) for section in sections for name in TABLES[section].get(status, ())]


# HTTP: what a field changes about a plain request.

TOOL = {"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}
BODIES = {
    CHAT: {"messages": [user("I say:"), user("Hello world")], "max_tokens": 9},
    COMPLETION: {"prompt": "Hello world", "max_tokens": 9},
    RESPONSES: {"input": [user("I say:"), user("Hello world")], "max_output_tokens": 9},
    TOKENIZE: {"messages": [user("I say:"), user("Hello world")]},
    DETOKENIZE: {"tokens": [65]},
    "/ai/run": {"messages": [user("I say:"), user("Hello world")], "max_tokens": 9},
}
SHARED = {
    "cache_salt": "a",
    "priority": 1,
    "prompt_logprobs": 1,
    "return_token_ids": True,
    "return_tokens_as_token_ids": True,
    "allowed_token_ids": [65],
    "bad_words": ["x"],
    "skip_special_tokens": False,
    "truncate_prompt_tokens": 4,
    "frequency_penalty": 1,
    "ignore_eos": True,
    "guided_choice": ["a"],
    "guided_grammar": 'start: "a"',
    "guided_json": {"type": "object"},
    "guided_regex": "a",
    "include_stop_str_in_output": True,
    "logit_bias": {"65": 1},
    "lora": "none-such",
    "max_completion_tokens": 9,
    "max_tokens": 3,
    "messages": [user("Bye")],
    "min_p": 0.5,
    "min_tokens": 1,
    "model": "none-such",
    "n": 2,
    "presence_penalty": 1,
    "repetition_penalty": 1.5,
    "response_format": {"type": "json_object"},
    "seed": 5,
    "stop": ["wor"],
    "stop_token_ids": [65],
    "structured_outputs": {"regex": "a"},
    "stream": True,
    "stream_options": {"include_usage": True},
    "temperature": 0.5,
    "tool_choice": "required",
    "tools": [TOOL],
    "top_k": 5,
    "top_p": 0.5,
    "prompt": "Bye",
}
CHAT_PROBES = {
    "logprobs": True,
    "top_logprobs": 3,
    "modalities": ["audio"],
    "parallel_tool_calls": [],
    "max_completion_tokens": 3,
    "prediction": {"type": "content", "content": "x"},
    "add_generation_prompt": False,
    "continue_final_message": True,
    "chat_template_kwargs": {"none": "such"},
}
COMPLETION_PROBES = {"best_of": 2, "echo": True, "logprobs": 2}
RUN_PROBES = {"raw": True}
TOKENIZE_PROBES = {"add_special_tokens": True, "return_token_strs": True, "tokens": [66]}
RESPONSES_PROBES = {
    "chat_template_kwargs": {"none": "such"},
    "include": ["message.output_text.logprobs"],
    "input": "Bye",
    "instructions": "Be brief",
    "max_output_tokens": 3,
    "parallel_tool_calls": False,
    "text": {"format": {"type": "json_object"}},
    "tools": [{"type": "function", "name": "f"}],
    "top_logprobs": 3,
}
PROBES = {
    CHAT: SHARED | CHAT_PROBES,
    COMPLETION: SHARED | COMPLETION_PROBES,
    RESPONSES: SHARED | RESPONSES_PROBES,
    TOKENIZE: SHARED | CHAT_PROBES | TOKENIZE_PROBES,
    DETOKENIZE: SHARED | TOKENIZE_PROBES,
    "/ai/run": SHARED | RUN_PROBES,
}
BESIDE = {"return_tokens_as_token_ids": {CHAT: {"logprobs": True}, COMPLETION: {"logprobs": 1}}}  # it says how
MEANINGLESS = ("id", "created", "created_at", "seed", "usage")


def outcome(scripted, section: str, **more) -> tuple:
    """What the engine was asked, and the answer without what differs each time."""
    scripted.engine.asked.clear()
    response = scripted.run({**BODIES[section], **more}, path=RUN if section == "/ai/run" else section)
    asked = [(request.params, request.prompt, request.lora) for request in scripted.engine.asked]
    return asked, re.sub(rf'"({"|".join(MEANINGLESS)})":("[^"]*"|\d+|{{[^}}]*}})', "", response.text)


@pytest.mark.parametrize(("section", "name"), cases(USED, *BODIES))
def test_what_is_used_changes_something(scripted, section, name):
    beside = BESIDE.get(name, {}).get(section, {})
    assert outcome(scripted, section, **beside, **{name: PROBES[section][name]}) != outcome(scripted, section, **beside)


# As its clients write them out; the values of what is not used stand in the tables.
VLLM_DEFAULTS = {"n": 1, "stop": [], "stop_token_ids": [], "logit_bias": {}, "min_p": 0.0, "repetition_penalty": 1.0}
VLLM_DEFAULTS |= {
    "ignore_eos": False,
    "include_stop_str_in_output": False,
    "min_tokens": 0,
    "skip_special_tokens": True,
}
VLLM_DEFAULTS |= {"use_beam_search": False, "spaces_between_special_tokens": True, "echo": False, "stream": False}
VLLM_DEFAULTS |= {"min_tokens": 0, "frequency_penalty": 0.0, "presence_penalty": 0.0, "bad_words": [], "seed": -1}


@pytest.mark.parametrize("section", [CHAT, COMPLETION])
def test_the_defaults_of_vllm_change_nothing(scripted, section):
    more = {"add_generation_prompt": True, "continue_final_message": False} if section == CHAT else {}
    assert outcome(scripted, section, **VLLM_DEFAULTS, **more) == outcome(scripted, section)


ANY = {"metadata": {"a": "b"}, "store": True, "functions": [{"name": "f", "code": ""}]}
ANY |= {name: {"a": "b"} for name in ("client_metadata", "prompt_cache_options", "reasoning", "stream_options")}


@pytest.mark.parametrize(("section", "name"), cases(NO_EFFECT, *BODIES))
def test_what_has_no_effect_has_none(scripted, section, name):
    asked, answer = outcome(scripted, section, **{name: ANY.get(name, "x")})
    assert asked == outcome(scripted, section)[0] != [] and '"error":{' not in answer


@pytest.mark.parametrize(("section", "name"), cases(ALONE, *BODIES))
def test_what_is_taken_at_a_value_alone(scripted, section, name):
    for value in TABLES[section][ALONE][name].split(" or "):
        assert outcome(scripted, section, **{name: json.loads(value)}) == outcome(scripted, section)
    check_refused(scripted, section, name)


@pytest.mark.parametrize(("section", "name"), cases(REFUSED, *BODIES))
def test_what_is_refused_is_named(scripted, section, name):
    check_refused(scripted, section, name)


def check_refused(scripted, section, name):
    for value in (["x"], {"x": 1}, 7):
        response = scripted.run({**BODIES[section], name: value}, path=RUN if section == "/ai/run" else section)
        assert response.status_code == 400 and f"/{name}" in response.text


def test_every_field_of_the_bodies_is_listed():
    common = set(completion_create_params.CompletionCreateParamsBase.__annotations__)
    assert fields(COMPLETION) >= common and fields(COMPLETION) >= CompletionRequest.model_fields.keys()
    assert fields(CHAT) >= chat_create_params.CompletionCreateParamsBase.__annotations__.keys()
    assert fields(CHAT) >= ChatRequest.model_fields.keys()
    assert fields(RESPONSES) >= response_create_params.ResponseCreateParamsBase.__annotations__.keys()
    assert fields(RESPONSES) >= ResponsesRequest.model_fields.keys()
    assert fields(TOKENIZE, USED) == TokenizeRequest.model_fields.keys()
    assert fields(DETOKENIZE) == DetokenizeRequest.model_fields.keys()
    assert fields("/ai/run") == RunRequest.model_fields.keys()
    known = chat_completion_stream_options_param.ChatCompletionStreamOptionsParam.__annotations__
    assert fields("stream_options") >= known.keys() and fields("stream_options") == StreamOptions.model_fields.keys()


# The library


def test_sampling_params():
    section = "SamplingParams"
    assert fields(section, USED) == {field.name for field in dataclasses.fields(SamplingParams)}
    for name, values in TABLES[section][ALONE].items():
        for value in values.split(" or "):
            assert SamplingParams(**{name: ast.literal_eval(value)}) == SamplingParams()
    for name in fields(section, ALONE, REFUSED):
        with pytest.raises(ValueError, match=name):
            SamplingParams(**{name: "x"})


def test_structured_outputs():
    section, json_ = "structured_outputs", {"type": "object"}
    assert fields(section) == {field.name for field in dataclasses.fields(StructuredOutputsParams)}
    used = {"json": json_, "regex": "a", "choice": ["a"], "grammar": 'start: "a"', "json_object": True}
    assert fields(section, USED) == used.keys()
    for name, value in used.items():
        assert StructuredOutputsParams(**{name: value}).constraint
    for name in fields(section, NO_EFFECT):
        assert StructuredOutputsParams(json=json_, **{name: True}).constraint == {
            "type": "json_schema",
            "json_schema": {"schema": json_},
        }
    for name in fields(section, REFUSED):
        with pytest.raises(ValueError, match=f"structured_outputs.{name} is not offered"):
            StructuredOutputsParams(json=json_, **{name: "x"})


def test_arguments_of_llm():
    own = inspect.signature(LLM.__init__).parameters.keys() - {"self", "options"}
    assert fields("LLM", USED) == own | {field.name for field in dataclasses.fields(EngineConfig)}
    assert fields("LLM", ALONE) == HARMLESS.keys()
    assert fields("LLM.generate and LLM.chat", ALONE) == METHOD_ARGUMENTS.keys()
    for name, values in TABLES["LLM"][ALONE].items():
        for value in values.split(" or "):
            refuse_foreign({name: ast.literal_eval(value)})
        with pytest.raises(ValueError, match=name):
            refuse_foreign({name: "x"})


# Files


def test_model_config():
    section = "config.json"
    known = transformers.LlamaConfig().to_dict().keys() - {"_name_or_path"}
    assert fields(section) >= known
    base = transformers.LlamaConfig().to_dict() | {"rope_theta": 10_000.0}
    del base["rope_parameters"]

    def read(**more):
        return ModelConfig.from_hugging_face(base | more)

    plain, rope = read(), {"rope_type": "linear", "factor": 2.0}
    used = {"rope_scaling": rope, "rope_parameters": rope, "rms_norm_eps": 0.5, "dtype": "float16"}
    used |= {"tie_word_embeddings": True, "attention_bias": True, "mlp_bias": True, "torch_dtype": "float16"}
    used |= {"num_key_value_heads": 8}
    for name in fields(section, USED):
        without = {key: value for key, value in base.items() if name != "torch_dtype" or key != "dtype"}
        assert ModelConfig.from_hugging_face(without | {name: used.get(name, 64)}) != plain, name
    for name in fields(section, NO_EFFECT):
        assert read(**{name: 7}) == plain
    for name, values in TABLES[section][ALONE].items():
        for value in values.split(" or "):
            assert read(**{name: json.loads(value)}) == plain
        with pytest.raises(ConfigError, match=name):
            read(**{name: "x"})
    for kind in ("longrope", "su"):
        with pytest.raises(ConfigError, match=f"rope type must be .* got '{kind}'"):
            read(rope_scaling={"rope_type": kind, "factor": 2.0})


def test_generation_config(tmp_path):
    section, values = "generation_config.json", {"temperature": 0.5, "do_sample": False, "eos_token_id": 3}
    known = transformers.GenerationConfig().to_dict().keys() - {"_from_model_config"}
    assert fields(section) >= known

    def read(**more):
        (tmp_path / "generation_config.json").write_text(json.dumps(more))
        return GenerationConfig.from_pretrained(tmp_path)

    plain = read()
    for name in fields(section, USED) - {"bos_token_id"}:  # that is the tokenizer's
        assert read(**{name: values.get(name, 3)}) != plain
    for name in fields(section, NO_EFFECT):
        assert read(**{name: 3}) == plain
    for name in fields(section, WARNED):
        assert read(**{name: 3}) == GenerationConfig(ignored={name: 3}) and read(**{name: None}) == plain


def test_tokenizer_config(tmp_path):
    section, text = "tokenizer_config.json", "Hello <|eot_id|> there"
    (tmp_path / "tokenizer.json").write_text(TOKENIZER.backend_json)

    def read(**more):
        (tmp_path / "tokenizer_config.json").write_text(json.dumps(more))
        tokenizer = Tokenizer.from_pretrained(tmp_path)
        named = (tokenizer.template_tokens, tokenizer.special_tokens, tokenizer.eos_token_ids)
        return SimpleNamespace(ids=tokenizer.encode(text), named=named)

    plain = read()
    used = {"additional_special_tokens": ["<new>"], "extra_special_tokens": {"x": "<new>"}}
    used |= {"added_tokens_decoder": {str(TOKENIZER.vocab_size): {"content": "<new>", "special": True}}}
    for name in fields(section, USED) - {"chat_template"}:
        assert read(**{name: used.get(name, "<|eot_id|>")}) != plain
    for name in fields(section, NO_EFFECT):
        for value in (True, 3):
            assert read(**{name: value}) == plain
    for name in fields(section, REFUSED):
        with pytest.raises(CheckpointError, match=name):
            read(**{name: True})


def test_adapter_config(tmp_path):
    section = "adapter_config.json"
    names = [f"model.layers.{i}.self_attn.{part}_proj" for i in range(2) for part in "qkvo"]
    assert fields(section) >= {field.name for field in dataclasses.fields(peft.LoraConfig)}
    base = {"target_modules": ["q_proj", "v_proj"], "r": 4, "lora_alpha": 8}

    def read(**more):
        (tmp_path / "adapter_config.json").write_text(json.dumps(base | more))
        return read_adapter_config(tmp_path, names)

    plain = read()
    used = {
        "alpha_pattern": {"q_proj": 3},
        "rank_pattern": {"q_proj": 3},
        "exclude_modules": ["v_proj"],
        "layers_to_transform": [0],
        "target_modules": ["o_proj"],
        "use_rslora": True,
        "r": 2,
        "lora_alpha": 3,
    }
    only_plain = {"bias": "all", "fan_in_fan_out": True, "init_lora_weights": "pissa", "peft_type": "X"}
    only_plain |= {"model_type": "mistral", "layers_pattern": "h"}
    for name in fields(section, USED):
        if name in used:
            assert read(**{name: used[name]}) != plain
        else:
            with pytest.raises(AdapterError, match=name):
                read(**{name: only_plain[name], "layers_to_transform": [0]})
    for name in fields(section, NO_EFFECT):
        assert read(**{name: {"a": 3}}) == plain
    for name in fields(section, REFUSED):
        assert read(**{name: None}) == read(**{name: []}) == read(**{name: False}) == plain
        with pytest.raises(AdapterError, match=name):
            read(**{name: [3]})
