"""LLM, and Transformer.logits: what they refuse, by name and before anything runs."""

import dataclasses
import pickle
import shutil
import subprocess
import sys
from unittest.mock import Mock

import pytest
import torch

import llama
from llama import LLM, ConfigError, ContextLengthError, ParameterError, QueueFullError, SamplingParams, WorkerLostError
from llama.llm.loading import resolve_device, resolve_dtype
from llama.llm.requests import as_prompts
from llama.text.chat.safe_text import SafeText
from llama.text.tokenizer import Tokenizer
from tests.llm.helpers import GREEDY
from tests.model.models import tiny_model

BAD_PROMPTS = [
    ("", "prompt is empty"),
    ({"prompt": ""}, "prompt is empty"),
    ({"prompt_token_ids": []}, "prompt is empty"),
    ([[]], "prompt is empty"),
    ([1, 2, 99999], r"integers in \[0, \d+\], got 99999"),
    ([1, -1], "got -1"),
    ([1, True], "got True"),
    ([1, 2.0], "got 2.0"),
    ({"text": "x"}, "prompt_token_ids or prompt"),
    ({}, "prompt_token_ids or prompt"),
    ({"prompt": "x", 5: "y"}, "prompt_token_ids or prompt"),
    ({"prompt_token_ids": "x"}, "must be a list"),
    ({"prompt": 5}, "must be a string"),
    ([None], "got NoneType"),
    (5, "got int"),
    ("lone \ud800 surrogate", "surrogate"),
    ("x" * 255, "256 tokens and the context is 256"),
]


@pytest.mark.parametrize("bad, words", BAD_PROMPTS)
def test_one_bad_prompt_refuses_the_batch_before_anything_is_enqueued(llm, bad, words):
    with pytest.raises(ValueError, match=words):
        llm.generate(bad, GREEDY)
    single = as_prompts(bad) if not isinstance(bad, int) else [bad]
    with pytest.raises(ValueError, match=rf"^prompts\[1\]: .*({words})"):
        llm.generate(["good", *single], GREEDY)
    assert not llm.engine.has_unfinished


def test_bad_parameters_are_refused_by_name(llm):
    with pytest.raises(ValueError, match="2 entries for 1 prompts"):
        llm.generate("x", [GREEDY, GREEDY])
    with pytest.raises(ValueError, match="must be a SamplingParams, got dict"):
        llm.generate("x", {"temperature": 0})
    with pytest.raises(ValueError, match="no adapter named 'style'"):
        llm.generate("x", GREEDY, lora="style")
    for lora in ({}, [{}], [[]]):
        with pytest.raises(ValueError):
            llm.generate("x", GREEDY, lora=lora)
    for name in ({}, [], None):
        with pytest.raises(ValueError):
            llm.unload_lora(name)
    with pytest.raises(ParameterError, match="path must be an adapter's folder, got NoneType") as caught:
        llm.load_lora("style", None)
    assert caught.value.param == "path"
    with pytest.raises(ParameterError, match="lora_request must be a LoRARequest, got str") as caught:
        llm.generate("x", GREEDY, lora_request="style")
    assert caught.value.param == "lora_request"
    with pytest.raises(ValueError, match="stop_token_ids must hold"):
        llm.generate("x", SamplingParams(stop_token_ids=[10**6]))
    with pytest.raises(ValueError, match="logit_bias must hold"):
        llm.generate("x", SamplingParams(logit_bias={10**6: 1.0}))
    for messages in ("hello", [[]], {"role": "user"}, ["x"], [{"content": "x"}]):
        with pytest.raises(ValueError):
            llm.chat(messages)
    with pytest.raises(ValueError, match=r"^conversations\[1\]: "):
        llm.chat([[{"role": "user", "content": "x"}], [{"role": "user", "content": 3}]])
    with pytest.raises(ValueError, match="tools and tool_choice need a conversation"):
        llm.stream("x", tools=[{"name": "f"}])


def test_a_refusal_by_the_engine_leaves_nothing_of_the_batch(llm, monkeypatch):
    def add(request, *, really=llm.engine.add):
        if len(request.prompt_token_ids) == 4:
            raise ValueError("can never fit")
        return really(request)

    monkeypatch.setattr(llm.engine, "add", add)
    with pytest.raises(ValueError, match="never fit"):
        llm.generate(["a", "b", "ccc", "d"], GREEDY)


def test_constructor_refuses_by_name(folder, tmp_path):
    small = {"num_blocks": 8, "load_format": "dummy"}
    for arguments, words in (
        ({"device": "tpu"}, "device must be"),
        ({"device": []}, r'device must be "auto", "cpu" or "cuda", got .*\[\]'),
        ({"dtype": "int8"}, "dtype must be"),
        ({"dtype": []}, r"dtype must be .* got .*\[\]"),
        ({"load_format": "pickle"}, "load_format must be"),
        ({"max_model_len": 257}, r"max_model_len must be an integer in \[2, 256\].* got 257"),
        ({"max_model_len": "64"}, "max_model_len must be an integer from 2 to 2147483647, got '64'"),
        ({"gpu_memory_utilization": "0.9"}, r"gpu_memory_utilization must be in \(0, 1\], got '0.9'"),
        ({"enable_prefix_caching": "no"}, "enable_prefix_caching must be True or False, got 'no'"),
        ({"enforce_eager": 1}, "enforce_eager must be True or False, got 1"),
        ({"fused_decode": True}, "fused_decode must be False on cpu, got True"),
        ({"record_prompts": True}, "record_prompts must be False on cpu, got True"),
        (
            {"fused_decode": True, "deterministic": True},
            "fused_decode must be False with deterministic or several ranks",
        ),
        ({"seed": -2}, r"seed must be an integer from 0 to 2\*\*64 - 1, or None, got -2"),
        ({"seed": 2**64}, "seed must be .* got 18446744073709551616"),
        ({"seed": 1.0}, "seed must be .* got 1.0"),
        ({"seed": True}, "seed must be .* got True"),
        ({"tensor_parallel_size": 3}, "tensor_parallel_size must be one of 1, 2, 4 for 4 heads, 2 KV heads"),
        ({"distributed_executor_backend": "ray"}, r"'ray' is not supported .*build_processor"),
        ({"data_parallel_size": 2}, "data_parallel_size=2 is not supported .only 1.: llama serve and"),
        ({"trust_remote_code": "yes"}, "trust_remote_code='yes'"),
        ({"quantization": "awq"}, "quantization must be one of int8, int4, fp8 for a dense model, got 'awq'"),
        ({"rope_theta": 5.0}, "edit the model's config.json"),
        ({"tensor_parallel_size": True}, "tensor_parallel_size must be an integer from 1 to 1024, got True"),
        ({"tokenizer": 5}, "tokenizer must be a folder or a llama Tokenizer, got int"),
    ):
        with pytest.raises(ParameterError, match=words) as caught:
            LLM(folder, **{**small, **arguments})
        assert caught.value.param in arguments
    ranks = {**small, "tensor_parallel_size": 2}
    draft = {"method": "draft_model", "model": str(folder), "num_speculative_tokens": 2}
    with pytest.raises(ValueError, match=r"tensor_parallel_size=2 takes no draft model: .*ngram"):
        LLM(folder, **ranks, speculative_config=draft)
    with pytest.raises(ValueError, match="tensor_parallel_size=2 needs a folder as model"):
        LLM(LLM(folder, **small).model, num_blocks=50, tensor_parallel_size=2)
    with pytest.raises(TypeError, match="no argument 'temprature'"):
        LLM(folder, temprature=1)
    LLM(folder, **small, tensor_parallel_size=1, trust_remote_code=False, swap_space=4, quantization=None)
    LLM(folder, **small, seed=2**64 - 1, enable_lora=True, swap_space=4.0, cpu_offload_gb=0.0, pooler_config=None)
    with pytest.raises(ValueError, match="there is no such folder"):
        LLM(tmp_path / "missing")
    with pytest.raises(ParameterError, match="model must be a folder or a Transformer, got NoneType") as caught:
        LLM(None)
    assert caught.value.param == "model"
    with pytest.raises(ConfigError, match=r"generation_config\.json: cannot be read: Not a directory"):
        LLM(folder / "config.json", tokenizer=folder)
    model = tiny_model()
    with pytest.raises(MemoryError, match=r"num_blocks=2147483647 blocks of 16 tokens take [0-9]+ bytes"):
        LLM(model, num_blocks=2**31 - 1)
    for arguments, words in (
        ({"check_weights": True}, "check_weights=True needs a folder"),
        ({"load_format": "dummy"}, "a Transformer has its weights"),
        ({"device": "tpu"}, "device must be"),
        ({"dtype": "float32"}, "convert it first"),
    ):
        with pytest.raises(ParameterError, match=words) as caught:
            LLM(model, **arguments)
        assert caught.value.param in arguments
    LLM(model, device="cpu:0", num_blocks=8)
    if not torch.cuda.is_available():
        with pytest.raises(ParameterError, match="no CUDA device"):
            LLM(folder, **small, device="cuda")


def test_arguments_are_refused_before_weights_are_read(folder, monkeypatch):
    def read(*_, **__):
        raise AssertionError("weights were read")

    monkeypatch.setattr("llama.llm.loading.Transformer.from_pretrained", read)
    with pytest.raises(AssertionError):
        LLM(folder)
    for arguments in ({"max_model_len": 257}, {"max_num_seqs": 0}, {"seed": -2}, {"block_size": 3}, {"max_loras": -1}):
        (name,) = arguments
        with pytest.raises(ValueError, match=name):
            LLM(folder, **arguments)
    other = Tokenizer.from_pretrained(folder)
    monkeypatch.setattr(other, "check_vocab", Mock(side_effect=ValueError("larger than the model's")))
    with pytest.raises(ValueError, match="larger than the model's"):
        LLM(folder, other)


def test_logits_of_more_tokens_than_the_context_are_refused():
    model = tiny_model(max_position_embeddings=8)
    assert model.logits(torch.ones(2, 8, dtype=torch.int64)).shape == (2, 8, 97)
    with pytest.raises(ValueError, match="token_ids has 9 tokens a row, the model's context is 8"):
        model.logits(torch.ones(2, 9, dtype=torch.int64))


def test_a_device_that_is_not_there_is_refused_before_anything_is_loaded(folder, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert resolve_device("cuda").index is None and resolve_device("cuda:1").index == 1
    with pytest.raises(ValueError, match="device='cuda:2', but this machine has 2 CUDA devices"):
        LLM(folder, device="cuda:2")
    model = tiny_model()
    monkeypatch.setattr(type(model), "device", torch.device("cuda:0"))
    with pytest.raises(ValueError, match="device='cuda:1' for a Transformer on cuda:0"):
        LLM(model, device="cuda:1")


def test_a_gpu_without_triton_says_what_to_install(folder, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr("llama.llm.loading.find_spec", lambda name: None)
    for device in ("auto", "cuda", "cuda:0"):
        with pytest.raises(ValueError, match=r"^cuda(:0)? needs Triton: pip install 'llama-engine\[triton\]'$"):
            LLM(folder, device=device)
    model = tiny_model()
    monkeypatch.setattr(type(model), "device", torch.device("cuda:0"))
    with pytest.raises(ValueError, match=r"^cuda:0 needs Triton: pip install 'llama-engine\[triton\]'$"):
        LLM(model)


WITHOUT_TRITON = """
import sys
import torch
for name in [name for name in sys.modules if name.split(".")[0] == "triton"]:
    del sys.modules[name]
sys.modules["triton"] = None
from llama import LLM, SamplingParams
llm = LLM(sys.argv[1], max_model_len=64, num_blocks=8)
params = SamplingParams(max_tokens=4, ignore_eos=True, seed=1, top_p=0.9, logprobs=2, repetition_penalty=1.1)
assert len(llm.generate("Hello", params, use_tqdm=False)[0].outputs[0].token_ids) == 4
try:
    import llama.kernels.gpu.norm
except ModuleNotFoundError as error:
    print(error)
"""


def test_without_triton_the_cpu_works_and_the_kernels_say_what_to_install(folder):
    done = subprocess.run([sys.executable, "-c", WITHOUT_TRITON, folder], capture_output=True, text=True, check=False)
    expected = "the kernels of a GPU need Triton: pip install 'llama-engine[triton]'\n"
    assert (done.returncode, done.stdout) == (0, expected), done.stderr


def test_device_and_dtype_names():
    assert resolve_device("cpu") == torch.device("cpu") == resolve_device(torch.device("cpu"))
    assert resolve_dtype("auto") is None and resolve_dtype("half") == resolve_dtype(torch.float16) == torch.float16


TOOL = {"type": "function", "function": {"name": "f", "parameters": {"type": "object", "properties": {}}}}
USER = [{"role": "user", "content": "x"}]
SCHEMA = {"type": "json_schema", "json_schema": {"type": "nonsense"}}
FIELDS = [
    ("prompt", lambda llm: llm.generate("")),
    ("prompt", lambda llm: llm.generate([1, -1])),
    ("prompt", lambda llm: llm.generate("x" * 255)),
    ("prompt", lambda llm: llm.generate("lone \ud800 surrogate")),
    ("prompts", lambda llm: llm.generate(5)),
    ("sampling_params", lambda llm: llm.generate("x", [GREEDY, GREEDY])),
    ("sampling_params", lambda llm: llm.generate("x", {"temperature": 0})),
    ("lora", lambda llm: llm.generate("x", GREEDY, lora="style")),
    ("messages", lambda llm: llm.chat([{"role": "user", "content": 3}])),
    ("messages", lambda llm: llm.chat([{"role": "user", "content": "\ud800"}])),
    ("messages", lambda llm: llm.chat([{"role": "user", "content": "x" * 300}])),
    ("tools", lambda llm: llm.chat(USER, tools=[{}])),
    ("tools", lambda llm: llm.chat(USER, tools=[{"name": "f", "parameters": 3}])),
    ("tools", lambda llm: llm.stream("x", tools=[TOOL])),
    ("tool_choice", lambda llm: llm.chat(USER, tool_choice="required")),
    ("tool_choice", lambda llm: llm.chat(USER, tools=[TOOL], tool_choice="maybe")),
    ("stop_token_ids", lambda llm: llm.generate("x", SamplingParams(stop_token_ids=[10**6]))),
    ("logit_bias", lambda llm: llm.generate("x", SamplingParams(logit_bias={10**6: 1.0}))),
    ("response_format", lambda llm: llm.generate("x", SamplingParams(response_format=SCHEMA))),
    *(
        (name, lambda _, given={name: value}: SamplingParams(**given))
        for name, value in {
            "n": 0,
            "temperature": float("nan"),
            "top_p": 2,
            "top_k": -2,
            "min_p": True,
            "repetition_penalty": 0,
            "frequency_penalty": 3,
            "presence_penalty": "1",
            "logit_bias": {1: 101},
            "seed": 1.5,
            "max_tokens": 0,
            "min_tokens": 257,
            "stop": [""],
            "stop_token_ids": [-1],
            "include_stop_str_in_output": 1,
            "ignore_eos": None,
            "speculative": 1,
            "cache_salt": "",
            "priority": 0.5,
            "prediction": [-1],
            "logits_processors": [5],
            "flat_logprobs": 1,
            "guidance_scale": "2",
            "negative_prompt": "x",
            "logprobs": -2,
            "prompt_logprobs": "x",
            "logprobs_mode": "x",
            "response_format": {"type": "regex"},
            "structured_outputs": {"regex": "a", "grammar": "b"},
            "bad_words": 5,
            "allowed_token_ids": [],
            "skip_special_tokens": None,
            "detokenize": None,
            "truncate_prompt_tokens": 0,
            "max_new_tokens": 5,
            "best_of": 2,
        }.items()
    ),
]


@pytest.mark.parametrize(("param", "ask"), FIELDS, ids=[f"{i}-{param}" for i, (param, _) in enumerate(FIELDS)])
def test_a_refusal_says_which_field_it_is_about(llm, param, ask):
    with pytest.raises(ParameterError) as caught:
        ask(llm)
    assert caught.value.param == param


def test_every_field_of_sampling_params_is_in_the_table():
    assert {field.name for field in dataclasses.fields(SamplingParams)} <= {param for param, _ in FIELDS}


def test_every_error_is_a_public_name():
    defined = {
        name
        for name, value in vars(llama.api.errors).items()
        if isinstance(value, type) and issubclass(value, Exception)
    }
    assert defined <= set(llama.__all__) and all(getattr(llama, name) for name in defined)


def test_the_classes_that_llm_takes_are_public_names():
    for kind in (llama.Transformer, Tokenizer, SamplingParams):
        assert kind.__name__ in llama.__all__ and getattr(llama, kind.__name__) is kind


def test_a_folder_whose_tokenizer_has_another_form_is_refused_at_load(folder, tmp_path):
    shutil.copytree(folder, tmp_path / "model")
    (tmp_path / "model" / "tokenizer.json").rename(tmp_path / "model" / "tokenizer.model")
    with pytest.raises(llama.CheckpointError, match=r"make it of tokenizer\.model with transformers"):
        LLM(tmp_path / "model", num_blocks=8)


@pytest.mark.parametrize(
    "arguments",
    [
        {"sampling_params": 3},
        {"lora": "absent"},
        {"sampling_params": [SamplingParams()] * 3},
        {"prompts": ["x" * 200_000]},
        {"prompts": ["fits", {"prompt": "x" * 200_000}]},
        {"messages": [{"role": "user", "content": "x" * 200_000}]},
        {"messages": [{"role": "user", "content": "x"}], "tools": [{"name": "f", "description": "x" * 200_000}]},
        {"messages": [{"role": "user", "content": "x"}], "tool_choice": "absent"},
        {"messages": [{"role": "user", "content": "x"}], "lora": "absent"},
    ],
)
def test_what_is_cheap_to_check_is_checked_before_a_long_text_is_encoded(llm, monkeypatch, arguments):
    encoded = []
    really = Tokenizer._encode

    def encode(instance, text):
        encoded.append(text)
        return really(instance, text)

    monkeypatch.setattr(Tokenizer, "_encode", staticmethod(encode))
    with pytest.raises(ParameterError):
        if "messages" in arguments:
            llm.chat(**arguments)
        else:
            llm.generate(**{"prompts": ["y" * 100] * 2, **arguments}, use_tqdm=False)
    assert encoded in ([], ["fits"])


@pytest.mark.parametrize("content", ["x" * 200_000, [{"type": "text", "text": "x" * 100_000}] * 2])
def test_what_a_user_says_last_is_refused_before_it_is_rendered(llm, monkeypatch, content):
    monkeypatch.setattr(SafeText, "hide", None)
    with pytest.raises(ContextLengthError, match="at least"):
        llm.chat([{"role": "user", "content": content}], use_tqdm=False)


@pytest.mark.parametrize(
    "error",
    [
        ContextLengthError("too long", 9, 8, "prompt"),
        ParameterError("wrong", "stop"),
        QueueFullError("full", 3),
        WorkerLostError(),
    ],
)
def test_an_error_of_a_process_of_a_pool_arrives(error):
    arrived = pickle.loads(pickle.dumps(error))
    assert type(arrived) is type(error) and str(arrived) == str(error) and vars(arrived) == vars(error)
