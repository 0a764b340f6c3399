"""The `llama` command: its help, its errors, `llama info`, flags as parameters, and that parsing stays light."""

import dataclasses
import os
import subprocess
import sys
from types import SimpleNamespace

import pytest

from llama.api.params import SamplingParams
from llama.cli import main
from llama.cli.common import params_for, sampling_values
from llama.cli.flags import Chat, Generate, SamplingFlags, parse
from llama.cli.usage import UsageError
from tests.cli.helpers import one_line, run


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


def test_without_a_command_the_usage_names_them_all(capsys):
    code, out, err = run(capsys)
    assert (code, out) == (2, "") and err == run(capsys, "--help")[1]
    assert err.startswith("usage: llama COMMAND") and all(f"\n  {name} " in err for name in ("chat", "serve", "info"))


@pytest.mark.parametrize(
    "arguments, words",
    [
        (["sing", "x"], "'sing' is not a command: there are chat, generate, serve, info"),
        ([""], "'' is not a command"),
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


def test_a_reader_that_has_left_is_no_error(llama_70b):
    reader, writer = os.pipe()
    os.close(reader)
    command = [sys.executable, "-c", "import sys; from llama.cli import main; sys.exit(main(sys.argv[1:]))"]
    done = subprocess.run([*command, "info", llama_70b], stdout=writer, stderr=subprocess.PIPE, text=True, check=False)
    os.close(writer)
    assert (done.returncode, done.stderr) == (1, "")


@pytest.mark.parametrize(
    "arguments",
    [
        ["generate", "m", "p", "--stop", "a", "--stop", "b"],
        ["generate", "m", "p", "--logit-bias", "1=1", "--logit_bias=2=1"],
        ["serve", "m", "--served-model-name", "a", "--served-model-name", "b"],
        ["serve", "m", "--lora", "a=b", "--lora", "c=d"],
    ],
)
def test_no_value_of_a_repeated_flag_is_lost(arguments):
    with pytest.raises(UsageError, match="is given twice: give it once, with all its values behind it"):
        parse(arguments[0], arguments[1:])


def test_flags_that_want_values_need_some():
    with pytest.raises(UsageError, match=r"Missing value for argument .--stop.. Expected at least one value"):
        parse("generate", ["m", "p", "--stop"])
    assert tuple(parse("generate", ["m", "p", "--stop", "a", "b"]).sampling.stop) == ("a", "b")
    with pytest.raises(UsageError, match="--logit-bias names a token id twice"):
        sampling_values(parse("generate", ["m", "p", "--logit-bias", "5=1", "5=2"]).sampling)
