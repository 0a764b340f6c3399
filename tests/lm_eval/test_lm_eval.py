"""lm-evaluation-harness in this process: what its hf model says of a local task, this engine says too (make
test-lm-eval)."""

import json
import re
import sys
from importlib import metadata
from importlib.machinery import ModuleSpec
from types import ModuleType

import lm_eval
import make_tiny
import pytest
import torch
from lm_eval.api.instance import Instance
from lm_eval.api.task import ConfigurableTask
from lm_eval.models.huggingface import HFLM
from lm_eval_model import LlamaEngineLM
from transformers import AutoTokenizer

from llama import LLM, LoRARequest, SamplingParams

QUESTIONS = [
    {"text": f"The {thing} is {'very ' * (i % 4)}", "choices": ["small", " large", "red and blue"], "answer": i % 3}
    for i, thing in enumerate(["cat", "house", "tree", "mountain", "sea", "bird", "car", "moon"])
]
TEXTS = ["A short text.", "x", "one two three " * 30]


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    path = tmp_path_factory.mktemp("lm_eval") / "tiny"
    make_tiny.make(path, make_tiny.TINY, dtype="float32", seed=0)
    ours = LlamaEngineLM(LLM(path, dtype="float32", device="cpu", max_model_len=128, num_blocks=200))
    theirs = HFLM(pretrained=str(path), dtype=torch.float32, device="cpu", batch_size=4, max_length=ours.max_length)
    return ours, theirs


@pytest.fixture
def task(tmp_path):
    file = tmp_path / "questions.jsonl"
    file.write_text("".join(json.dumps(question) + "\n" for question in QUESTIONS))
    config = {
        "task": "local_choice",
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(file)}, "cache_dir": str(tmp_path / "cache")},
        "test_split": "test",
        "output_type": "multiple_choice",
        "doc_to_text": "{{text}}",
        "doc_to_choice": "{{choices}}",
        "doc_to_target": "{{answer}}",
        "metric_list": [{"metric": "acc"}, {"metric": "acc_norm"}],
    }
    return ConfigurableTask(config=config)


def instances(kind, arguments):
    return [Instance(request_type=kind, doc={}, arguments=each, idx=i) for i, each in enumerate(arguments)]


def test_a_local_task_has_the_results_of_the_hf_model(models, task):
    found = []
    for model in models:
        results = lm_eval.simple_evaluate(model, tasks=[task], bootstrap_iters=0, log_samples=True)
        answers = {sample["doc_id"]: sample["filtered_resps"] for sample in results["samples"]["local_choice"]}
        found.append((results["results"]["local_choice"]["acc,none"], answers))
    (accuracy, ours), (expected, theirs) = found
    assert accuracy == expected and ours.keys() == theirs.keys() and len(ours) == len(QUESTIONS)
    for place, answers in theirs.items():
        for (found_logprob, found_greedy), (logprob, is_greedy) in zip(ours[place], answers, strict=True):
            assert found_logprob == pytest.approx(logprob, abs=1e-3) and found_greedy == is_greedy


@pytest.fixture
def vllm_model(models, monkeypatch):
    """The harness's own vllm model, with this package in the place of vLLM."""
    modules = {name: ModuleType(name) for name in ("vllm", "vllm.lora", "vllm.lora.request", "vllm.tokenizers")}
    modules["vllm"].__spec__ = ModuleSpec("vllm", None)
    modules["vllm"].__dict__.update(LLM=LLM, SamplingParams=SamplingParams, TokensPrompt=dict)
    modules["vllm.lora.request"].LoRARequest = LoRARequest
    modules["vllm.tokenizers"].get_tokenizer = lambda name, tokenizer_mode, **more: AutoTokenizer.from_pretrained(name)
    for name, module in modules.items():
        monkeypatch.setitem(sys.modules, name, module)
    # Since 0.8.3 it reads llm_engine.model_config for a chat template, which is not here.
    monkeypatch.setattr(
        metadata, "version", lambda name, version=metadata.version: "0.8.2" if name == "vllm" else version(name)
    )
    from lm_eval.models.vllm_causallms import VLLM

    path = models[1].config._name_or_path
    return VLLM(path, dtype="float32", max_model_len=129, num_blocks=200, batch_size="auto")


def test_its_vllm_model_runs_with_this_package_in_the_place_of_vllm(models, vllm_model):
    _, theirs = models
    pairs = [("The cat", " sat"), ("The cat ", "sat"), ("", "sat"), ("a b c " * 60, "d e")]
    told, expected = (each.loglikelihood(instances("loglikelihood", pairs)) for each in (vllm_model, theirs))
    for (logprob, is_greedy), found in zip(expected, told, strict=True):
        assert found[0] == pytest.approx(logprob, abs=1e-3) and found[1] == is_greedy
    arguments = [(text, {"until": ["\n\n"], "max_gen_toks": 12, "do_sample": False}) for text in ("The cat", "One two")]
    told, expected = (each.generate_until(instances("generate_until", arguments)) for each in (vllm_model, theirs))
    # It asks for the text of special tokens too, which the hf model leaves out.
    assert [re.sub(r"<\|\w+\|>", "", text) for text in told] == expected


def test_log_likelihoods(models):
    pairs = [("The cat", " sat"), ("The cat ", "sat"), ("", "sat"), ("a b c " * 60, "d e")]
    ours, theirs = (model.loglikelihood(instances("loglikelihood", pairs)) for model in models)
    for found, expected in zip(ours, theirs, strict=True):
        assert found[0] == pytest.approx(expected[0], abs=1e-3) and found[1] == expected[1]


def test_rolling_log_likelihoods(models):
    arguments = [(text,) for text in TEXTS]
    asked = [instances("loglikelihood_rolling", arguments) for _ in models]
    ours, theirs = (model.loglikelihood_rolling(each) for model, each in zip(models, asked, strict=True))
    assert ours == pytest.approx([float(value) for value in theirs], rel=1e-4)


def test_texts_until_a_stop(models):
    ours, _ = models
    asked = SamplingParams(temperature=0, max_tokens=12)
    whole = [output.outputs[0].text for output in ours.llm.generate(["The cat", "One two"], asked)]
    stop = whole[0][3]
    arguments = [("The cat", {"until": [stop], "max_gen_toks": 12}), ("One two", {"until": [], "max_gen_toks": 12})]
    found = ours.generate_until(instances("generate_until", arguments))
    assert found == [whole[0].partition(stop)[0], whole[1]]
