"""ModelConfig: presets, both spellings of a config.json, and one named error per kind of bad file."""

import json

import pytest
import torch
from transformers import LlamaConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from llama.api.errors import ConfigError
from llama.model.config import ModelConfig
from llama.model.rope import inverse_frequencies
from llama.model.rope_scaling import LinearScaling, Llama3Scaling, YarnScaling

LLAMA_3_1_8B = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "attention_bias": False,
    "bos_token_id": 128000,
    "eos_token_id": [128001, 128008, 128009],
    "hidden_act": "silu",
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "max_position_embeddings": 131072,
    "mlp_bias": False,
    "num_attention_heads": 32,
    "num_hidden_layers": 32,
    "num_key_value_heads": 8,
    "pretraining_tp": 1,
    "rms_norm_eps": 1e-05,
    "rope_scaling": {
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
        "rope_type": "llama3",
    },
    "rope_theta": 500000.0,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "transformers_version": "4.42.3",
    "use_cache": True,
    "vocab_size": 128256,
}


def changed(**changes):
    values = {**LLAMA_3_1_8B, **changes}
    return {key: value for key, value in values.items() if value is not ...}


def test_the_published_config_is_the_preset(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(LLAMA_3_1_8B))
    assert ModelConfig.from_pretrained(tmp_path) == ModelConfig.preset("llama-3.1-8b")
    assert ModelConfig.from_pretrained(tmp_path / "config.json") == ModelConfig.preset("llama-3.1-8b")


def test_the_newer_spelling_says_the_same():
    newer = changed(rope_theta=..., rope_scaling=..., torch_dtype=..., dtype="bfloat16", head_dim=128)
    newer["rope_parameters"] = {**LLAMA_3_1_8B["rope_scaling"], "rope_theta": 500000.0}
    assert ModelConfig.from_hugging_face(newer) == ModelConfig.preset("llama-3.1-8b")


@pytest.mark.parametrize("preset", ["llama-3.1-8b", "llama-3.1-405b", "llama-3.2-1b", "tiny"])
def test_what_we_write_transformers_and_we_read(preset, tmp_path):
    config = ModelConfig.preset(preset)
    (tmp_path / "config.json").write_text(json.dumps(config.to_hugging_face(config.dtype)))
    assert ModelConfig.from_pretrained(tmp_path) == config
    theirs = LlamaConfig.from_pretrained(tmp_path)
    assert theirs.rope_parameters["rope_theta"] == config.rope_theta
    assert theirs.rope_parameters["factor"] == config.rope_scaling.factor
    assert (theirs.head_dim, theirs.num_key_value_heads) == (config.head_dim, config.num_key_value_heads)
    theirs.save_pretrained(tmp_path / "again")
    assert ModelConfig.from_pretrained(tmp_path / "again") == config


@pytest.mark.parametrize("eos", [7, [7], [7, 9], None], ids=str)
def test_eos_token_ids(eos):
    expected = () if eos is None else (7,) if eos == 7 else tuple(eos)
    assert ModelConfig.from_hugging_face(changed(eos_token_id=eos)).eos_token_ids == expected


def test_defaults_of_old_checkpoints():
    config = ModelConfig.from_hugging_face(
        changed(rope_theta=..., rope_scaling=None, num_key_value_heads=..., torch_dtype=..., tie_word_embeddings=...)
    )
    assert (config.rope_theta, config.rope_scaling, config.num_key_value_heads) == (10_000.0, None, 32)
    assert (config.head_dim, config.dtype, config.tie_word_embeddings) == (128, None, False)


ROPE = LLAMA_3_1_8B["rope_scaling"]
BAD = {
    "missing key": ({"hidden_size": ...}, "missing key hidden_size"),
    "missing keys": ({"hidden_size": ..., "vocab_size": None}, "missing keys vocab_size, hidden_size"),
    "wrong type": ({"hidden_size": "4096"}, r"hidden_size must be an integer in \[1, 262144\], got '4096'"),
    "fraction": ({"vocab_size": 1.5}, "vocab_size must be an integer"),
    "bool for int": ({"num_hidden_layers": True}, "num_hidden_layers must be an integer"),
    "absurd": ({"hidden_size": 1 << 40}, "hidden_size must be an integer in"),
    "negative": ({"num_hidden_layers": -1}, "num_hidden_layers must be an integer in"),
    "nan": ({"rms_norm_eps": float("nan")}, "rms_norm_eps must be a number in"),
    "infinite": ({"rope_theta": float("inf")}, "rope_theta must be a number in"),
    "kv heads": (
        {"num_key_value_heads": 5},
        r"num_attention_heads \(32\) must be a multiple of num_key_value_heads \(5",
    ),
    "heads": ({"num_attention_heads": 24}, r"hidden_size \(4096\) must be a multiple of num_attention_heads \(24\)"),
    "no heads": ({"num_attention_heads": 0}, "num_attention_heads must be an integer in"),
    "odd head_dim": ({"head_dim": 65}, "head_dim must be even"),
    "architecture": (
        {"architectures": ["MistralForCausalLM"]},
        r"architectures must be .* got \['MistralForCausalLM'\]",
    ),
    "model type": ({"model_type": "qwen2"}, "model_type must be \"llama\", got 'qwen2'"),
    "activation": ({"hidden_act": "gelu"}, "hidden_act must be 'silu' or 'swish', got 'gelu'"),
    "attention bias": ({"attention_bias": 1}, "attention_bias must be true or false, got 1"),
    "mlp bias": ({"mlp_bias": "yes"}, "mlp_bias must be true or false, got 'yes'"),
    "partial rotary": ({"partial_rotary_factor": 0.5}, "partial_rotary_factor must be 1, got 0.5"),
    "nested partial": ({"rope_scaling": {**ROPE, "partial_rotary_factor": 0.5}}, "partial_rotary_factor must be 1"),
    "rope type": ({"rope_scaling": {"rope_type": "longrope", "factor": 4.0}}, "rope type must be .* got 'longrope'"),
    "yarn lacks": ({"rope_scaling": {"rope_type": "yarn"}, "max_position_embeddings": ...}, "max_position_embeddings"),
    "yarn": ({"rope_scaling": {"rope_type": "yarn", "factor": 4.0, "truncate": 1}}, "truncate must be true or false"),
    "yarn range": ({"rope_scaling": {"rope_type": "yarn", "factor": 4, "mscale": -1}}, "rope mscale must be a number"),
    "linear lacks": ({"rope_scaling": {"type": "linear"}}, 'rope type "linear" lacks factor'),
    "factor without type": ({"rope_scaling": {"factor": 4.0}}, "a RoPE factor of 4.0 needs a rope type"),
    "two rope types": ({"rope_scaling": {**ROPE, "type": "linear"}}, "rope_type 'llama3' and type 'linear' contradict"),
    "old rope type": ({"rope_scaling": {"type": "su", "factor": 4.0}}, "rope type must be .* got 'su'"),
    "rope not an object": ({"rope_scaling": "llama3"}, "rope_scaling must be an object"),
    "rope lacks": (
        {"rope_scaling": {"rope_type": "llama3", "factor": 8.0}},
        "lacks original_max_position_embeddings, low_freq_factor, high_freq",
    ),
    "rope factor": ({"rope_scaling": {**ROPE, "factor": 0}}, "rope factor must be a number in"),
    "rope order": ({"rope_scaling": {**ROPE, "high_freq_factor": 0.5}}, "high_freq_factor .* must exceed"),
    "two ropes": ({"rope_parameters": {**ROPE, "factor": 32.0}}, "both given and differ"),
    "rope of each layer": (
        {"rope_parameters": {"full_attention": {"rope_type": "default", "rope_theta": 1e6}}, "rope_scaling": ...},
        "rope_parameters must not hold 'full_attention', only rope_type, .*rope_theta",
    ),
    "rope key": ({"rope_scaling": {**ROPE, "alpha": 3}}, "rope_scaling must not hold 'alpha', only"),
    "window": ({"sliding_window": 4096}, "sliding_window must be null or at least the context, 131072, got 4096"),
    "window type": ({"sliding_window": "4096"}, "sliding_window must be null or .* got '4096'"),
    "layer types": (
        {"layer_types": ["full_attention", "sliding_attention"], "sliding_window": 4096},
        r"layer_types must hold \"full_attention\" alone, got \['full_attention', 'sliding",
    ),
    "layer types type": ({"layer_types": 3}, r"layer_types must hold \"full_attention\" alone, got 3"),
    "chunks": ({"attention_chunk_size": 8192}, "attention_chunk_size must be None, got 8192"),
    "both ways": ({"is_causal": False}, "is_causal must be True, got False"),
    "tie": ({"tie_word_embeddings": "yes"}, "tie_word_embeddings must be true or false"),
    "eos type": ({"eos_token_id": "</s>"}, "eos_token_id must be a token id or a list"),
    "eos range": ({"eos_token_id": [128256]}, "eos_token_id must be an integer in"),
    "dtype": ({"torch_dtype": "int8"}, "dtype must be one of .* got 'int8'"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_configs_are_refused_in_one_line(case, tmp_path):
    changes, message = BAD[case]
    (tmp_path / "config.json").write_text(json.dumps(changed(**changes)))
    with pytest.raises(ConfigError, match=message) as caught:
        ModelConfig.from_pretrained(tmp_path)
    assert "\n" not in str(caught.value)
    assert str(caught.value).startswith(f"{tmp_path / 'config.json'}: ")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"{", "is not JSON"),
        (b"[" * 100_000, "is not JSON"),
        (b"\xff\xfe\x00", "cannot be read"),
        (b"[1, 2]", "must hold a JSON object, got list"),
        (b"version https://git-lfs.github.com/spec/v1", "is a Git LFS pointer"),
        (b"<!DOCTYPE html><html></html>", "is an HTML page"),
        (None, "there is no such file"),
    ],
    ids=["cut", "deep", "binary", "list", "lfs", "html", "absent"],
)
def test_files_that_are_no_config(content, message, tmp_path):
    if content is not None:
        (tmp_path / "config.json").write_bytes(content)
    with pytest.raises(ConfigError, match=message) as caught:
        ModelConfig.from_pretrained(tmp_path)
    assert "\n" not in str(caught.value)


def test_yarn_as_transformers_reads_it():
    def yarn(**changes):
        return ModelConfig.from_hugging_face(changed(**changes)).rope_scaling

    old = {"type": "yarn", "factor": 16.0, "original_max_position_embeddings": 4096, "finetuned": True}
    assert yarn(rope_scaling=old) == YarnScaling(factor=16.0, original_max_position_embeddings=4096)
    named = yarn(rope_scaling={"rope_type": "yarn", "factor": 4.0}, original_max_position_embeddings=8192)
    assert named == YarnScaling(factor=4.0, original_max_position_embeddings=8192)
    told = yarn(rope_scaling={"rope_type": "yarn", "original_max_position_embeddings": 32768})
    assert told == YarnScaling(factor=4.0, original_max_position_embeddings=32768)


def test_the_original_context_beside_the_scaling_wins_as_in_transformers():
    values = changed(
        rope_scaling={**ROPE}, rope_theta=1e4, original_max_position_embeddings=4096, max_position_embeddings=16384
    )
    ours = ModelConfig.from_hugging_face(values)
    theirs = LlamaConfig(**{name: value for name, value in values.items() if name != "torch_dtype"})
    expected, _ = ROPE_INIT_FUNCTIONS["llama3"](theirs, "cpu")
    assert torch.equal(inverse_frequencies(ours), expected)
    assert ours.rope_scaling.original_max_position_embeddings == 4096


def test_both_spellings_of_rope_may_say_the_same():
    old, new = {"type": "linear", "factor": 4}, {"rope_type": "linear", "factor": 4.0, "rope_theta": 5e4}
    values = changed(rope_scaling=old, rope_theta=5e4, rope_parameters=new)
    assert ModelConfig.from_hugging_face(values) == ModelConfig.from_hugging_face(
        changed(rope_scaling=..., rope_parameters=new)
    )
    empty = ModelConfig.from_hugging_face(values | {"rope_scaling": {}})
    assert empty.rope_scaling == LinearScaling(factor=4.0)
    with pytest.raises(ConfigError, match="both given and differ"):
        ModelConfig.from_hugging_face(values | {"rope_theta": 1e4})


def test_null_is_absent():
    config = ModelConfig.from_hugging_face(changed(tie_word_embeddings=None, dtype=None, torch_dtype="float16"))
    assert (config.tie_word_embeddings, config.dtype) == (False, "float16")
    rope = {"type": "linear", "rope_type": None, "factor": 4.0, "partial_rotary_factor": None}
    assert ModelConfig.from_hugging_face(changed(rope_scaling=rope)).rope_scaling == LinearScaling(factor=4.0)


def test_a_factor_that_says_nothing_is_taken():
    for factor in (None, 1, 1.0):
        values = LLAMA_3_1_8B | {"rope_scaling": {"rope_type": "default", "type": None, "factor": factor}}
        assert ModelConfig.from_hugging_face(values).rope_scaling is None


@pytest.mark.parametrize(
    "window",
    [
        {"sliding_window": 131072},
        {"sliding_window": 4096, "use_sliding_window": False},
        {"sliding_window": 4096, "layer_types": ["full_attention"] * 32},
        {"sliding_window": None, "layer_types": None, "attention_chunk_size": None, "is_causal": True},
    ],
    ids=str,
)
def test_a_window_that_cuts_nothing_is_taken(window):
    assert ModelConfig.from_hugging_face(LLAMA_3_1_8B | window) == ModelConfig.preset("llama-3.1-8b")


def test_unknown_preset():
    with pytest.raises(ConfigError, match=r"unknown preset 'llama-4'; there are llama-3.1-8b"):
        ModelConfig.preset("llama-4")
    with pytest.raises(ConfigError, match=r"unknown preset \[\]"):
        ModelConfig.preset([])


@pytest.mark.parametrize("factor", [8.0, 32.0, None])
def test_inverse_frequencies_equal_transformers(factor):
    sizes = {key: LLAMA_3_1_8B[key] for key in ("hidden_size", "num_attention_heads", "max_position_embeddings")}
    ours = ModelConfig.from_hugging_face(changed(rope_scaling={**ROPE, "factor": factor} if factor else None))
    rope = {**ROPE, "factor": factor} if factor else {"rope_type": "default"}
    theirs = LlamaConfig(**sizes, rope_parameters={**rope, "rope_theta": 500000.0})
    if factor:
        expected, scale = ROPE_INIT_FUNCTIONS["llama3"](theirs)
        assert scale == 1.0
    else:
        expected = 1.0 / 500000.0 ** (torch.arange(0, 128, 2).float() / 128)
    assert torch.equal(inverse_frequencies(ours), expected)


def test_scaling_refuses_nonsense_by_name():
    with pytest.raises(ConfigError, match="rope original_max_position_embeddings"):
        Llama3Scaling(factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=0)
