"""The `llama` command: what it prints, where, with which exit code, and that parsing stays light."""

import dataclasses
import io
import itertools
import json
import os
import subprocess
import sys
from types import SimpleNamespace

import make_tiny
import pytest
import torch
from safetensors.torch import save_file

from llama import LLM
from llama.cli import chat as chat_command
from llama.cli import main
from llama.cli.common import Timed, params_for, sampling_values
from llama.cli.errors import UsageError
from llama.cli.flags import Chat, Generate, SamplingFlags, parse
from llama.engine.request import (
    CompletionOutput,
    FinishReason,
    Piece,
    RequestMetrics,
    RequestOutput,
    SamplingParams,
    Usage,
)
from llama.model.config import ModelConfig


@pytest.fixture(scope="module")
def tiny(tmp_path_factory) -> str:
    """A checkpoint with random weights and a tokenizer of bytes, chat in the Llama 3.1 format."""
    folder = tmp_path_factory.mktemp("cli") / "tiny"
    config = dataclasses.replace(make_tiny.TINY, max_position_embeddings=256)
    make_tiny.make(folder, config, dtype="float32", seed=0)
    return str(folder)


@pytest.fixture(scope="module")
def adapter(tiny, tmp_path_factory) -> str:
    """A PEFT adapter of all q_proj and v_proj of the tiny model, strong enough to change its answers."""
    folder = tmp_path_factory.mktemp("adapter")
    sizes = {"q_proj": 64, "v_proj": 32}
    options = {"peft_type": "LORA", "r": 4, "lora_alpha": 64, "target_modules": list(sizes)}
    (folder / "adapter_config.json").write_text(json.dumps(options))
    generator = torch.Generator().manual_seed(0)
    tensors = {}
    for layer, (name, size) in itertools.product(range(2), sizes.items()):
        module = f"base_model.model.model.layers.{layer}.self_attn.{name}"
        tensors[f"{module}.lora_A.weight"] = torch.randn(4, 64, generator=generator)
        tensors[f"{module}.lora_B.weight"] = torch.randn(size, 4, generator=generator)
    save_file(tensors, folder / "adapter_model.safetensors")
    return str(folder)


@pytest.fixture
def llama_70b(tmp_path) -> str:
    """config.json and generation_config.json alone."""
    config = ModelConfig.preset("llama-3.1-70b").to_hugging_face("bfloat16")
    (tmp_path / "config.json").write_text(json.dumps(config))
    generation = {"do_sample": True, "temperature": 0.6, "top_p": 0.9, "eos_token_id": [128001, 128008, 128009]}
    (tmp_path / "generation_config.json").write_text(json.dumps(generation))
    return str(tmp_path)


def run(capsys, *arguments: str) -> tuple[int, str, str]:
    code = main(arguments)
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def one_line(err: str) -> bool:
    return err.startswith("llama: ") and err.count("\n") == 1 and "Traceback" not in err


def test_parsing_help_and_info_import_neither_torch_nor_numpy(llama_70b):
    script = """
import contextlib, io, sys
from llama.cli import main
for arguments in (["--help"], ["chat", "--help"], ["generate", "--help"], ["info", "--help"], ["info", sys.argv[1]]):
    with contextlib.suppress(SystemExit), contextlib.redirect_stdout(io.StringIO()) as out:
        main(arguments)
    assert out.getvalue(), arguments
print([name for name in ("torch", "numpy", "tokenizers", "typeguard") if name in sys.modules])
"""
    done = subprocess.run([sys.executable, "-c", script, llama_70b], capture_output=True, text=True, check=False)
    assert (done.stdout, done.stderr) == ("[]\n", "")


def test_help_names_the_commands_and_every_sampling_flag(capsys):
    code, out, _ = run(capsys, "--help")
    assert code == 0 and all(f"  {name} " in out for name in ("chat", "generate", "serve", "info"))
    with pytest.raises(SystemExit) as stop:
        main(["generate", "--help"])
    out = capsys.readouterr().out
    assert stop.value.code == 0
    assert [f.name for f in dataclasses.fields(SamplingFlags)] == [f.name for f in dataclasses.fields(SamplingParams)]
    assert all(f"--{f.name.replace('_', '-')}" in out for f in dataclasses.fields(SamplingParams))


@pytest.mark.parametrize(
    "arguments, words",
    [
        ([], "there are chat, generate, serve, info"),
        (["sing", "x"], "'sing' is not a command"),
        (["generate", "folder"], "PROMPT"),
        (["generate", "folder", "p", "--temprature", "1"], "perhaps --temperature"),
        (["generate", "folder", "p", "--top-k", "many"], "--top-k: it takes an integer, got 'many'"),
        (["generate", "folder", "p", "--temperature", "9"], "temperature must be"),
        (["generate", "folder", "p", "--temperature", "nan"], "temperature must be"),
        (["generate", "folder", "p", "--logit-bias", "5"], "ID=NUMBER"),
        (["generate", "folder", "p", "--stop-token-ids", "x"], "token ids"),
        (["generate", "folder", "p", "--logprobs", "2"], "--json"),
        (["generate", "folder", "p", "--system", "s"], "--chat"),
        (["generate", "folder", "p", "--response-format", "{"], "JSON"),
        (["generate", "folder", "p", "--lora", "name"], "NAME=PATH"),
        (["chat", "folder", "--lora", "=path"], "NAME=PATH"),
        (["chat", "folder", "--n", "2"], "one answer"),
        (["generate", "folder", "p", "--dtype", "int8"], "--dtype must be one of auto,"),
        (["chat", "folder", "--device", "tpu"], "--device must be auto,"),
        (["generate", "folder", "p", "--max-model-len", "1"], "--max-model-len must be at least 2, got 1"),
        (["info", "folder", "--memory", "many"], "--memory takes a size"),
        (["info", "folder", "--dtype", "int8"], "--dtype must be one of float64,"),
    ],
)
def test_a_usage_error_is_one_line_and_code_2(capsys, arguments, words):
    code, out, err = run(capsys, *arguments)
    assert (code, out) == (2, "") and one_line(err) and words in err and "--help" in err


def test_a_missing_model_is_one_line_and_code_1(capsys, tmp_path):
    for arguments in (
        ["generate", f"{tmp_path}/none", "p"],
        ["chat", f"{tmp_path}/none"],
        ["info", f"{tmp_path}/none"],
    ):
        code, out, err = run(capsys, *arguments)
        assert (code, out) == (1, "") and one_line(err) and "none" in err


def test_flags_become_sampling_params():
    flags = "--n 2 --temperature 0.5 --stop a --- --stop-token-ids 3 4 --logit-bias 5=-100 6=2.5 --ignore-eos --seed 9"
    command = parse("generate", ["m", "p", *flags.split(), "--response-format", '{"type": "json_object"}', "--json"])
    assert isinstance(command, Generate) and command.json and (command.model, command.prompt) == ("m", "p")
    assert sampling_values(command.sampling) == {
        "n": 2,
        "temperature": 0.5,
        "stop": ("a", "---"),
        "stop_token_ids": (3, 4),
        "logit_bias": {5: -100.0, 6: 2.5},
        "ignore_eos": True,
        "seed": 9,
        "response_format": {"type": "json_object"},
    }
    assert parse("chat", []) == Chat()
    assert sampling_values(SamplingFlags()) == {}


def test_a_zero_on_the_command_line_is_a_value():
    command = parse("generate", ["m", "p", "--temperature", "0", "--seed", "0", "--min-tokens", "0", "--top-k", "0"])
    assert sampling_values(command.sampling) == {"temperature": 0.0, "seed": 0, "min_tokens": 0, "top_k": 0}


def test_min_tokens_are_held_against_the_max_tokens_that_will_count():
    values = sampling_values(SamplingFlags(min_tokens=300))
    generous, plain = (
        SimpleNamespace(inputs=SimpleNamespace(defaults=SamplingParams(max_tokens=n))) for n in (400, 256)
    )
    assert params_for(generous, values).min_tokens == 300
    with pytest.raises(UsageError, match="min_tokens must be at most max_tokens"):
        params_for(plain, values)


def test_info_of_70b(capsys, llama_70b):
    code, out, err = run(capsys, "info", llama_70b, "--memory", "141GiB")
    assert (code, err) == (0, "")
    for words in (
        "80 layers",
        "64 heads and 8 KV heads of 128",
        "scaled x8 from 8,192",
        "70,553,706,496",
        "141,107,412,992 bytes",
        "327,680 bytes",
        "temperature 0.6, top_p 0.9",
        "ends at 128001, 128008, 128009",
        "fits 141GiB",
        "31,403 of 131,072 tokens of context",
    ):
        assert words in out
    assert "no: bfloat16 weights of 131.4 GiB in 22.4 GiB" in run(capsys, "info", llama_70b, "--memory", "24GB")[1]
    assert "all 131,072 tokens" in run(capsys, "info", f"{llama_70b}/config.json", "--memory", "1TiB")[1]
    assert run(capsys, "info", llama_70b, "--memory", "10X")[0] == 2
    assert run(capsys, "info", llama_70b, "--dtype", "int3")[0] == 2


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

    monkeypatch.setattr("llama.llm.LLM.stream", stream)
    code, out, err = run(capsys, "generate", tiny, "Hello")
    assert (code, out) == (1, "Hel\n") and err.endswith("llama: the model failed while it wrote this answer\n")


@pytest.mark.parametrize("how", [["--json"], ["--n", "2"]])
def test_a_failure_is_code_1_also_where_nothing_is_streamed(capsys, tiny, monkeypatch, how):
    def generate(self, prompt, params, lora, use_tqdm):
        completions = [CompletionOutput(0, finish_reason=FinishReason.STOP)]
        completions.append(CompletionOutput(1, finish_reason=FinishReason.ERROR))
        return [RequestOutput("0", prompt, [1], completions, RequestMetrics(0.0), finished=True)]

    monkeypatch.setattr("llama.llm.LLM.generate", generate)
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


@pytest.mark.parametrize("given, words", [("mine=none", "none: is no folder"), ("a/b={}", "must match")])
def test_an_adapter_that_cannot_be_used_is_one_line_and_code_1(capsys, tiny, adapter, given, words):
    code, out, err = run(capsys, "generate", tiny, "Hi", "--lora", given.format(adapter), "--max-tokens", "1")
    assert (code, out) == (1, "") and one_line(err) and words in err


def test_a_prompt_beyond_the_context_is_one_line_with_both_numbers(capsys, tiny):
    code, out, err = run(capsys, "generate", tiny, "x" * 300)
    assert (code, out) == (1, "") and one_line(err) and "301" in err and "256" in err


class FakeLLM:
    """Says the number of messages; `stop_at` raises KeyboardInterrupt after that many pieces."""

    def __init__(self, stop_at=None):
        self.stop_at = stop_at
        self.seen = []
        self.loras = []

    def stream(self, messages, params, lora):
        self.loras.append(lora)
        if sum(len(m["content"]) for m in messages) > 100:
            raise ValueError("the prompt has 101 tokens and the context is 100")
        self.seen.append(messages)
        return self._pieces(len(messages))

    def _pieces(self, count):
        for number, text in enumerate(["I see ", str(count), " messages"]):
            if number == self.stop_at:
                raise KeyboardInterrupt
            yield Piece(0, text, [number], usage=Usage(count, 3) if number == 2 else None)


def talk(monkeypatch, capsys, llm, *lines, arguments=()):
    monkeypatch.setattr(sys, "stdin", io.StringIO("".join(f"{line}\n" for line in lines)))
    monkeypatch.setattr(chat_command, "load", lambda model, flags, max_num_seqs, adapter: llm)
    monkeypatch.setattr(chat_command, "params_for", lambda llm, values: SamplingParams(**values))
    return run(capsys, "chat", "folder", *arguments)


def test_chat_keeps_the_conversation(monkeypatch, capsys, tmp_path):
    llm = FakeLLM()
    saved = tmp_path / "talk.json"
    code, out, err = talk(
        monkeypatch, capsys, llm, "one", "", "two", f"/save {saved}", "/reset", "three", arguments=["--system", "S"]
    )
    assert code == 0
    assert out.splitlines() == ["I see 2 messages", "I see 4 messages", "I see 2 messages"]
    assert err.count("tokens/s, time to first token") == 3 and "[4 prompt tokens, " in err
    assert json.loads(saved.read_text()) == [
        {"role": "system", "content": "S"},
        {"role": "user", "content": "one"},
        {"role": "assistant", "content": "I see 2 messages"},
        {"role": "user", "content": "two"},
        {"role": "assistant", "content": "I see 4 messages"},
    ]
    assert [m["role"] for m in llm.seen[2]] == ["system", "user"]


def test_every_answer_of_a_chat_comes_from_its_adapter(monkeypatch, capsys):
    for arguments, name in ((["--lora", "mine=folder"], "mine"), ([], None)):
        llm = FakeLLM()
        code, _, _ = talk(monkeypatch, capsys, llm, "one", "/reset", "two", arguments=arguments)
        assert code == 0 and llm.loras == [name, name]


def test_chat_commands(monkeypatch, capsys, tmp_path):
    code, out, err = talk(monkeypatch, capsys, FakeLLM(), "/help", f"/save {tmp_path}/no/where", "/quit", "one")
    assert (code, out) == (0, "") and "/reset forgets" in err and "cannot save" in err


def test_an_interrupt_stops_the_answer_and_not_the_program(monkeypatch, capsys):
    llm = FakeLLM(stop_at=2)
    code, out, err = talk(monkeypatch, capsys, llm, "one", "two")
    assert code == 0 and out.splitlines() == ["I see 1", "I see 3"] and err.count("[stopped]") == 2
    assert llm.seen[1][1] == {"role": "assistant", "content": "I see 1"}


def test_an_interrupt_before_the_first_word_asks_for_the_next_message(monkeypatch, capsys):
    llm = FakeLLM()
    answers = iter([KeyboardInterrupt, None])

    def stream(messages, params, lora, really=llm.stream):
        if (error := next(answers)) is not None:
            raise error
        return really(messages, params, lora)

    llm.stream = stream
    code, out, err = talk(monkeypatch, capsys, llm, "one", "two")
    assert code == 0 and out == "I see 1 messages\n" and "[stopped]" in err
    assert llm.seen == [[{"role": "user", "content": "two"}]]


def test_a_failed_answer_is_told_and_leaves_the_conversation_as_it_was(monkeypatch, capsys):
    llm = FakeLLM()
    failed = Piece(0, "half", [1], finish_reason=FinishReason.ERROR, usage=Usage(3, 1))
    monkeypatch.setattr(llm, "_pieces", lambda count: iter([failed]))
    code, out, err = talk(monkeypatch, capsys, llm, "one", "two")
    assert (code, out) == (0, "half\nhalf\n") and err.count("the model failed while it wrote this answer\n") == 2
    assert [len(messages) for messages in llm.seen] == [1, 1]


def test_a_refused_message_leaves_the_conversation_as_it_was(monkeypatch, capsys):
    llm = FakeLLM()
    code, out, err = talk(monkeypatch, capsys, llm, "x" * 101, "one")
    assert code == 0 and out == "I see 1 messages\n" and "101 tokens" in err and "/reset" in err


def test_chat_answers_with_a_real_model(capsys, tiny, adapter, monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.StringIO("Hello\n/quit\n"))
    code, out, err = run(capsys, "chat", tiny, "--max-tokens", "3", "--seed", "1", "--lora", f"mine={adapter}")
    assert code == 0 and out.endswith("\n") and "prompt tokens" in err and "Traceback" not in err


def test_a_reader_that_has_left_is_no_error(llama_70b):
    reader, writer = os.pipe()
    os.close(reader)
    command = [sys.executable, "-c", "import sys; from llama.cli import main; sys.exit(main(sys.argv[1:]))"]
    done = subprocess.run([*command, "info", llama_70b], stdout=writer, stderr=subprocess.PIPE, text=True, check=False)
    os.close(writer)
    assert (done.returncode, done.stderr) == (1, "")
