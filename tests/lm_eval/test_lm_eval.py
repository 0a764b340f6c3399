"""lm-evaluation-harness in this process: what its hf model says of a local task, this engine says too (make
test-lm-eval)."""

import json

import lm_eval
import make_tiny
import pytest
import torch
from lm_eval.api.instance import Instance
from lm_eval.api.task import ConfigurableTask
from lm_eval.models.huggingface import HFLM
from lm_eval_model import LlamaEngineLM

from llama import LLM, SamplingParams

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
