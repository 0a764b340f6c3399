"""SamplingParams: every field takes what the interface says and refuses the rest by name."""

import contextlib
import copy
import dataclasses
import inspect
import math
import pickle
import subprocess
import sys

import numpy as np
import pytest
import torch

from llama.api.params import SamplingParams
from llama.api.structured import StructuredOutputsParams

NAN, INF = math.nan, math.inf

LEGAL = {
    "n": [1, 128],
    "temperature": [0, 5, 0.7, np.float32(0.5), np.float64(2)],
    "top_p": [0, 1, 0.25],
    "top_k": [-1, 0, 1, 10**6],
    "min_p": [0, 1, 0.5],
    "repetition_penalty": [1e-9, 1.0, 50, 1e300],
    "frequency_penalty": [-2, 2, 0.5],
    "presence_penalty": [-2, 2, 0.5],
    "logit_bias": [None, {}, {5: -100, 6: 100.0}, {np.int64(7): np.float32(1.5)}],
    "seed": [None, 0, -1, -(2**63), 2**64 - 1, np.uint64(2**64 - 1)],
    "max_tokens": [None, 1, 10**9, 2**63 - 1],
    "min_tokens": [0, 256],
    "stop": ["a", (), ["a", "bc"], ("é",), None],
    "stop_token_ids": [(), [1, 2], (3,), {4}, np.array([5, 6]), None],
    "bad_words": [(), None, "a", ["a", "b c"]],
    "allowed_token_ids": [None, [1], np.array([1, 2])],
    "skip_special_tokens": [True, False],
    "detokenize": [True, False],
    "truncate_prompt_tokens": [None, -1, 1, 10**6],
    "include_stop_str_in_output": [True, False],
    "ignore_eos": [True, False],
    "speculative": [True, False],
    "cache_salt": [None, "a", " "],
    "priority": [0, -(2**31), np.int64(2**31 - 1)],
    "prediction": [None, "text", "", [1, 2], ()],
    "logits_processors": [None, [], [max, min]],
    "flat_logprobs": [True, False],
    "guidance_scale": [None, 1, 1.5, -2, 0, 1e30, -1e30],
    "negative_prompt": [None],
    "logprobs": [None, -1, 0, 20, 10**6],
    "prompt_logprobs": [None, 0, 20],
    "logprobs_mode": ["raw", "processed"],
    "response_format": [
        None,
        {"type": "text"},
        {"type": "json_object"},
        {"type": "json_schema", "json_schema": {"type": "object"}},
        {"type": "regex", "regex": "a+"},
    ],
    "structured_outputs": [
        None,
        {"json": {"type": "object"}},
        {"json": '{"type": "object"}', "disable_any_whitespace": True},
        StructuredOutputsParams(choice=["a", ""]),
        {"regex": "a+", "json": None},
        {"grammar": 'start: "a"'},
        {"json_object": True},
    ],
}

ONE_OF = "structured_outputs must have exactly one of json, regex, choice, grammar, json_object"
NOT_NUMBERS = [NAN, INF, -INF, True, None, "1", [1], 1j, 10**400, np.float32("nan")]
NOT_INTEGERS = [True, False, 1.0, 1.5, NAN, "1", [1], np.float64(1), np.bool_(True)]

ILLEGAL = {
    "n": ([0, 129, -1, None, *NOT_INTEGERS], "an integer from 1 to 128"),
    "temperature": ([-0.1, 5.01, *NOT_NUMBERS], "a number from 0 to 5"),
    "top_p": ([-0.1, 1.01, *NOT_NUMBERS], "a number from 0 to 1"),
    "top_k": ([-2, None, *NOT_INTEGERS], "an integer of at least -1"),
    "min_p": ([-0.1, 1.01, *NOT_NUMBERS], "a number from 0 to 1"),
    "repetition_penalty": ([0, -1, 0.0, *NOT_NUMBERS], "a number above 0"),
    "frequency_penalty": ([-2.1, 2.1, *NOT_NUMBERS], "a number from -2 to 2"),
    "presence_penalty": ([-2.1, 2.1, *NOT_NUMBERS], "a number from -2 to 2"),
    "logit_bias": ([[1], "x", 5], "a mapping of token ids to numbers from -100 to 100"),
    "seed": ([-(2**63) - 1, 2**64, *NOT_INTEGERS], f"an integer from {-(2**63)} to {2**64 - 1}"),
    "max_tokens": ([0, -1, 2**63, *NOT_INTEGERS], f"an integer from 1 to {2**63 - 1}"),
    "min_tokens": ([-1, 2**63, None, *NOT_INTEGERS], f"an integer from 0 to {2**63 - 1}"),
    "stop": ([5, b"x", {"a": 1}], "a list of strings, or one string"),
    "stop_token_ids": ([5, "5", {5: 1}, np.array(5), torch.tensor(5)], "a list of token ids"),
    "bad_words": ([5, b"x", {"a": 1}], "a list of strings, or one string"),
    "allowed_token_ids": ([5, "5", {5: 1}], "a list of token ids"),
    "skip_special_tokens": ([0, 1, None, "yes"], "True or False"),
    "detokenize": ([0, 1, None, "yes"], "True or False"),
    "truncate_prompt_tokens": ([-2, *NOT_INTEGERS], "an integer of at least -1"),
    "include_stop_str_in_output": ([0, 1, None, "yes"], "True or False"),
    "ignore_eos": ([0, 1, None, "yes"], "True or False"),
    "speculative": ([0, None, "no"], "True or False"),
    "cache_salt": (["", 5, b"x", True], "a text that is not empty, or None"),
    "priority": ([2**31, None, *NOT_INTEGERS], f"an integer from {-(2**31)} to {2**31 - 1}"),
    "prediction": ([5, {"a": 1}, b"x"], "a list of token ids, or a text"),
    "flat_logprobs": ([0, 1, None, "yes"], "True or False"),
    "logits_processors": ([5, "x", max, [max, 5]], "a list of functions"),
    "guidance_scale": ([NAN, INF, True, "1", [1], 10**400, 1e39, -1e31], "a number from -1e+30 to 1e+30"),
    "negative_prompt": ([5, {"a": 1}, b"x"], "a list of token ids, or a text"),
    "logprobs": ([-2, *NOT_INTEGERS], "an integer from -1 to"),
    "prompt_logprobs": ([-2, *NOT_INTEGERS], "an integer from -1 to"),
    "logprobs_mode": (["RAW", None, 1, "raw_logprobs"], '"raw" or "processed"'),
    "response_format": (["json", ["json_object"]], 'a mapping with a "type"'),
    "structured_outputs": (["json", ["json_object"], True], "a StructuredOutputsParams"),
}


def test_every_field_is_tested():
    names = {field.name for field in dataclasses.fields(SamplingParams)}
    assert LEGAL.keys() == names and ILLEGAL.keys() == names


@pytest.mark.parametrize(("name", "value"), [(name, value) for name, values in LEGAL.items() for value in values])
def test_legal(name, value):
    SamplingParams(**{name: value})


@pytest.mark.parametrize(
    ("name", "value"), [(name, value) for name, (values, _) in ILLEGAL.items() for value in values]
)
def test_illegal(name, value):
    with pytest.raises(ValueError) as refusal:
        SamplingParams(**{name: value})
    assert str(refusal.value).startswith(f"{name} must be {ILLEGAL[name][1]}") and ", got " in str(refusal.value)
    assert len(str(refusal.value)) < 200


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"min_tokens": 300}, "min_tokens must be at most max_tokens (256), got 300"),
        ({"stop": ["a", ""]}, "stop must hold strings that are not empty, got ''"),
        ({"stop": [5]}, "stop must hold strings that are not empty, got 5"),
        ({"stop": "a\ud800"}, "stop must hold valid text, got a lone surrogate in 'a\\ud800'"),
        ({"prediction": "a\ud800"}, "prediction must hold valid text, got a lone surrogate in 'a\\ud800'"),
        (
            {"guidance_scale": 2, "negative_prompt": "\udc80"},
            "negative_prompt must hold valid text, got a lone surrogate in '\\udc80'",
        ),
        ({"stop_token_ids": [1, -1]}, "stop_token_ids: each id must be an integer of at least 0, got -1"),
        ({"stop_token_ids": [1.0]}, "stop_token_ids: each id must be an integer of at least 0, got 1.0"),
        ({"prediction": [1, "x"]}, "prediction: each id must be an integer of at least 0, got 'x'"),
        ({"logit_bias": {-1: 0.0}}, "logit_bias: each token id must be an integer of at least 0, got -1"),
        ({"logit_bias": {"5": 0.0}}, "logit_bias: each token id must be an integer of at least 0, got '5'"),
        ({"logit_bias": {5: 100.5}}, "logit_bias[5] must be a number from -100 to 100, got 100.5"),
        ({"logit_bias": {5: NAN}}, "logit_bias[5] must be a number from -100 to 100, got nan"),
        (
            {"response_format": {"type": "xml"}},
            'response_format["type"] must be one of "text", "json_object", "json_schema", "regex", got \'xml\'',
        ),
        ({"response_format": {"type": []}}, 'response_format["type"] must be one of'),
        ({"response_format": {"type": "regex"}}, 'response_format["regex"] must be a regular expression, got None'),
        (
            {"response_format": {"type": "regex", "regex": ""}},
            "response_format[\"regex\"] must be a regular expression, and an empty one allows no text, got ''",
        ),
        (
            {"response_format": {"type": "json_schema", "json_schema": "{}"}},
            "response_format[\"json_schema\"] must be a JSON schema, got '{}'",
        ),
        (
            {"response_format": {"type": "json_object", "schema": {}}},
            "response_format of type json_object has no key 'schema'",
        ),
        ({"structured_outputs": {}}, f"{ONE_OF}: got none"),
        ({"structured_outputs": {"regex": "a", "choice": ["a"]}}, f"{ONE_OF}: got regex and choice"),
        ({"structured_outputs": {"schema": {}}}, "structured_outputs has no key 'schema'; it has json, regex, "),
        ({"structured_outputs": {"json": ""}}, "structured_outputs.json must be a JSON schema, or the text of one"),
        ({"structured_outputs": {"json_object": False}}, "structured_outputs.json_object must be True, got False"),
        ({"structured_outputs": {"choice": []}}, "structured_outputs.choice must be a list of at least one text"),
        ({"structured_outputs": {"choice": [1]}}, "structured_outputs.choice must be a list of at least one text"),
        ({"structured_outputs": {"regex": ""}}, "structured_outputs.regex must be a text that is not empty, got ''"),
        ({"structured_outputs": {"structural_tag": "{}"}}, "structured_outputs.structural_tag is not offered"),
        (
            {"structured_outputs": {"regex": "a"}, "response_format": {"type": "json_object"}},
            "structured_outputs and response_format both constrain the answer: give one of them",
        ),
        ({"max_new_tokens": 5}, "max_new_tokens is called max_tokens here"),
        ({"max_completion_tokens": 5}, "max_completion_tokens is called max_tokens here"),
        ({"num_return_sequences": 2}, "num_return_sequences is called n here"),
        ({"stop_strings": "a"}, "stop_strings is called stop here"),
        ({"do_sample": False}, "do_sample=False is not offered: temperature=0 is greedy decoding"),
        ({"best_of": 4}, "best_of=4 is not offered"),
        ({"bad_words": [""]}, "bad_words must hold strings that are not empty, got ''"),
        ({"allowed_token_ids": []}, "allowed_token_ids must be a list of at least one token id, got []"),
        ({"truncate_prompt_tokens": 0}, "truncate_prompt_tokens must be an integer of at least 1, or -1, got 0"),
        ({"stop": "x", "detokenize": False}, "stop needs detokenize=True"),
        ({"max_new_tokens": 5, "temperature": -1}, "max_new_tokens is called max_tokens here"),
    ],
)
def test_named_refusals(given, message):
    with pytest.raises(ValueError) as refusal:
        SamplingParams(**given)
    assert str(refusal.value).startswith(message)


@pytest.mark.parametrize("name", SamplingParams.__dataclass_fields__)
def test_whatever_is_given_nothing_but_a_value_error_comes(name):
    objects = [{"type": value} for value in ([], {}, None, 5)]
    objects += [{"type": "regex", "regex": []}, {"type": "json_schema", "json_schema": []}, {"a": []}, {5: []}]
    for value in ([], {}, [[]], [{}], (), "", b"x", object(), np.ones(3), torch.ones(2), 10**400, *objects):
        with contextlib.suppress(ValueError):
            SamplingParams(**{name: value})


def test_a_name_that_nobody_knows():
    with pytest.raises(TypeError, match=r"SamplingParams has no field temprature; it has .*temperature"):
        SamplingParams(temprature=1.0)


def test_fields_of_vllm_at_their_defaults_change_nothing():
    params = SamplingParams(detokenize=True, skip_special_tokens=True, bad_words=None, best_of=None, temperature=0.5)
    assert params == SamplingParams(temperature=0.5)


def test_values_come_out_plain():
    params = SamplingParams(
        n=np.int64(2),
        temperature=1,
        top_k=-1,
        stop="x",
        stop_token_ids=np.array([5, 3, 5]),
        logit_bias={np.int32(4): np.float32(0.5)},
        response_format={"type": "text"},
    )
    assert type(params.n) is int and type(params.temperature) is float
    assert params.top_k == 0
    assert params.stop == ("x",) and params.stop_token_ids == (5, 3)
    assert params.logit_bias == {4: 0.5} and type(next(iter(params.logit_bias))) is int
    assert params.response_format is None
    assert SamplingParams(stop=None, stop_token_ids=None, logit_bias={}) == SamplingParams()


def test_frozen_and_copied():
    bias = {1: 2.0}
    params = SamplingParams(logit_bias=bias, seed=5)
    bias[1] = 3.0
    assert params.logit_bias == {1: 2.0}
    with pytest.raises(dataclasses.FrozenInstanceError):
        params.temperature = 0.5
    assert dataclasses.replace(params, n=3) == SamplingParams(logit_bias={1: 2.0}, seed=5, n=3)
    assert copy.deepcopy(params) == params == pickle.loads(pickle.dumps(params))
    with pytest.raises(ValueError, match="top_p"):
        dataclasses.replace(params, top_p=2.0)


def test_the_signature_shows_every_field():
    signature = inspect.signature(SamplingParams)
    names = [name for name in signature.parameters if name != "self"]
    assert names == [field.name for field in dataclasses.fields(SamplingParams)]
    assert signature.parameters["max_tokens"].default == 256


def test_runs_without_torch():
    script = "import sys; sys.modules['torch'] = None; from llama.api.params import SamplingParams; SamplingParams()"
    subprocess.run([sys.executable, "-c", script], check=True)
