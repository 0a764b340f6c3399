"""`llama generate`: what it prints, where, and with which exit code."""

import io
import json
import sys
from dataclasses import replace

import pytest

from llama import LLM
from llama.api.outputs import CompletionOutput, FinishReason, Piece, RequestMetrics, RequestOutput, Usage
from llama.api.params import SamplingParams
from llama.cli.common import Timed
from tests.cli.helpers import one_line, run


def test_the_summary_tells_rates_as_far_as_they_are_known():
    pieces = [Piece(0, "a", [1]), Piece(0, "b", [2]), Piece(0, "", [3], usage=Usage(12, 3))]
    timed = Timed(pieces)
    assert list(timed) == pieces
    rate, unit = timed.summary().split(", ")[1].split()
    assert float(rate) > 0 and unit == "tokens/s"
    assert timed.summary().startswith("12 prompt tokens, ") and "time to first token 0.00 s" in timed.summary()
    stopped = Timed(pieces[:1])
    list(stopped)
    assert stopped.summary() == "time to first token 0.00 s"
    assert Timed([]).summary() == ""


def test_generate_streams_text_to_stdout_and_rates_to_stderr(capsys, tiny):
    code, out, err = run(capsys, "generate", tiny, "Hello", "--max-tokens", "8", "--temperature", "0", "--ignore-eos")
    assert code == 0 and out.endswith("\n") and err.startswith("6 prompt tokens, ") and err.count("\n") == 1
    code, again, _ = run(
        capsys, "generate", tiny, "Hello", "--max-tokens", "8", "--temperature", "0", "--ignore-eos", "--json"
    )
    answer = json.loads(again)
    assert code == 0 and answer["prompt_tokens"] == 6 and answer["outputs"][0]["text"] + "\n" == out
    assert len(answer["outputs"][0]["token_ids"]) == 8 and answer["outputs"][0]["finish_reason"] == "length"


def test_generate_reads_stdin_and_lists_several_answers(capsys, tiny, monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.StringIO("Hel\nlo\n"))
    code, out, _ = run(capsys, "generate", tiny, "-", "--max-tokens", "2", "--json", "--logprobs", "1", "--n", "2")
    answer = json.loads(out)
    assert code == 0 and answer["prompt"] == "Hel\nlo"
    assert [o["index"] for o in answer["outputs"]] == [0, 1]
    assert len(answer["outputs"][0]["logprobs"]) == len(answer["outputs"][0]["token_ids"])
    assert {"token_id", "logprob", "rank", "decoded_token"} == set(answer["outputs"][0]["logprobs"][0][0])
    code, out, _ = run(capsys, "generate", tiny, "x", "--max-tokens", "2", "--n", "2")
    assert code == 0 and out.startswith("[0] ") and "\n[1] " in out


def test_a_failure_of_the_model_is_one_line_and_code_1(capsys, tiny, monkeypatch):
    def stream(self, prompt, params, lora):
        return iter([Piece(0, "Hel", [1]), Piece(0, "", [], finish_reason=FinishReason.ERROR, usage=Usage(3, 1))])

    monkeypatch.setattr("llama.llm.llm.LLM.stream", stream)
    code, out, err = run(capsys, "generate", tiny, "Hello")
    assert (code, out) == (1, "Hel\n") and err.endswith("llama: the model failed while it wrote this answer\n")


@pytest.mark.parametrize("how", [["--json"], ["--n", "2"]])
def test_a_failure_is_code_1_also_where_nothing_is_streamed(capsys, tiny, monkeypatch, how):
    def generate(self, prompt, params, lora, use_tqdm):
        completions = [CompletionOutput(0, finish_reason=FinishReason.STOP)]
        completions.append(CompletionOutput(1, finish_reason=FinishReason.ERROR))
        return [RequestOutput("0", prompt, [1], completions, RequestMetrics(0.0), finished=True)]

    monkeypatch.setattr("llama.llm.llm.LLM.generate", generate)
    code, out, err = run(capsys, "generate", tiny, "Hello", *how)
    assert code == 1 and out and err == "llama: the model failed while it wrote this answer\n"


def test_generate_as_chat_uses_the_chat_format(capsys, tiny):
    code, out, _ = run(capsys, "generate", tiny, "Hi", "--chat", "--system", "Be brief.", "--max-tokens", "1", "--json")
    answer = json.loads(out)
    assert code == 0 and answer["prompt"].startswith("<|begin_of_text|><|start_header_id|>system<|end_header_id|>")
    assert answer["prompt"].endswith("<|start_header_id|>assistant<|end_header_id|>\n\n")


def test_generate_with_an_adapter(capsys, tiny, adapter):
    llm = LLM(tiny, max_model_len=64)
    llm.load_lora("mine", adapter)
    greedy = SamplingParams(temperature=0, max_tokens=8, ignore_eos=True)
    base, adapted = (output.outputs[0] for output in llm.generate(["Hi", "Hi"], greedy, lora=[None, "mine"]))
    assert base.token_ids != adapted.token_ids
    flags = "--max-tokens 8 --temperature 0 --ignore-eos --lora".split()
    code, out, _ = run(capsys, "generate", tiny, "Hi", *flags, f"mine={adapter}", "--json")
    assert code == 0 and json.loads(out)["outputs"][0]["token_ids"] == adapted.token_ids
    code, out, _ = run(capsys, "generate", tiny, "Hi", *flags, f"mine={adapter}")
    assert (code, out) == (0, adapted.text + "\n")


def test_generate_with_guidance(capsys, tiny):
    guided = {"guidance_scale": 3.0, "negative_prompt": "dull"}
    params = SamplingParams(temperature=0, max_tokens=8, ignore_eos=True)
    llm = LLM(tiny, max_model_len=64)
    plain, led = (llm.generate("Hi", replace(params, **more))[0].outputs[0].token_ids for more in ({}, guided))
    assert plain != led
    flags = "--max-tokens 8 --temperature 0 --ignore-eos --guidance-scale 3 --negative-prompt dull --json"
    code, out, _ = run(capsys, "generate", tiny, "Hi", *flags.split())
    assert code == 0 and json.loads(out)["outputs"][0]["token_ids"] == led


@pytest.mark.parametrize("given, words", [("mine=none", "none: is no folder"), ("a/b={}", "must match")])
def test_an_adapter_that_cannot_be_used_is_one_line_and_code_1(capsys, tiny, adapter, given, words):
    code, out, err = run(capsys, "generate", tiny, "Hi", "--lora", given.format(adapter), "--max-tokens", "1")
    assert (code, out) == (1, "") and one_line(err) and words in err


def test_a_prompt_beyond_the_context_is_one_line_with_both_numbers(capsys, tiny):
    code, out, err = run(capsys, "generate", tiny, "x" * 300)
    assert (code, out) == (1, "") and one_line(err) and "301" in err and "256" in err
