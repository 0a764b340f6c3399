"""The `llama` command: its help, its errors, `llama info`, flags as parameters, and that parsing stays light."""

import inspect
import itertools
import json
import os
import subprocess
import sys
from dataclasses import fields, replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import llama
from llama import LLM
from llama.api.params import SamplingParams
from llama.cli import parse
from llama.cli.common import LoadOptions, llm_options, params_for, sampling_values
from llama.cli.flags import UsageError, flag
from llama.engine.config import EngineConfig
from llama.model.config import ModelConfig
from llama.model.transformer import Transformer
from tests.cli.helpers import one_line, run


def test_parsing_help_and_info_import_neither_torch_nor_numpy(llama_70b):
    script = """
import contextlib, io, sys
from llama.cli import main
for arguments in (["--help"], ["--version"], ["serve", "--help"], ["generate", "--help"], ["info", sys.argv[1]]):
    with contextlib.suppress(SystemExit), contextlib.redirect_stdout(io.StringIO()) as out:
        main(arguments)
    assert out.getvalue(), arguments
print([name for name in ("torch", "numpy", "tokenizers", "jinja2") if name in sys.modules])
"""
    done = subprocess.run([sys.executable, "-c", script, llama_70b], capture_output=True, text=True, check=False)
    assert (done.stdout, done.stderr) == ("[]\n", "")


OF_PYTHON = {"logits_processors", "flat_logprobs"}  # which no command line can write or show
FROZEN = Path(__file__).with_name("flags.json")


def flags_of(command: str) -> list[str]:
    arguments = {"generate": 2, "convert": 2, "merge": 3}.get(command, 1)
    words = ["--input=x", "--output=x", "--scheme=int8"] if command == "quantize" else ["x"] * arguments
    return sorted(parse([command, *words]).command._option_string_actions.keys() - {"-h", "--help"})


def test_help_names_the_commands(capsys):
    code, out, _ = run(capsys, "--help")
    assert code == 0 and all(f"  {name} " in out for name in json.loads(FROZEN.read_text()))


def test_no_flag_is_lost():
    """A new one is added to the file, and so is seen by whoever reads the change."""
    frozen = json.loads(FROZEN.read_text())
    assert {command: flags_of(command) for command in frozen} == frozen


def test_every_field_is_a_flag_that_the_help_explains(capsys):
    for commands, configs in ((("chat", "generate"), [SamplingParams]), (("serve",), [EngineConfig, LoadOptions])):
        for command, config in itertools.product(commands, configs):
            options = [option for option in fields(config) if option.name not in OF_PYTHON]
            assert {flag(option.name) for option in options} <= {*flags_of(command)}
            said = " ".join(run(capsys, command, "--help")[1].split())
            assert all(option.metadata["help"] in said for option in options)


def test_load_options_are_the_arguments_of_llm_that_the_engine_does_not_have():
    arguments = inspect.signature(LLM).parameters
    rest = [
        name
        for name, argument in arguments.items()
        if argument.kind is not inspect.Parameter.VAR_KEYWORD and name not in {f.name for f in fields(EngineConfig)}
    ]
    assert rest == ["model", *(option.name for option in fields(LoadOptions))]
    assert all(arguments[option.name].default == option.default for option in fields(LoadOptions))


def test_the_version(capsys):
    assert run(capsys, "--version") == (0, f"llama-engine {llama.__version__}\n", "")


def test_without_a_command_the_usage_names_them_all(capsys):
    code, out, err = run(capsys)
    assert (code, out) == (2, "") and err == run(capsys, "--help")[1]
    assert err.startswith("usage: llama ") and all(f"\n    {name} " in err for name in ("chat", "serve", "info"))


@pytest.mark.parametrize(
    "arguments, words",
    [
        (["sing", "x"], "COMMAND: invalid choice: 'sing' (choose from "),
        ([""], "COMMAND: invalid choice: ''"),
        (["--seed", "1"], "COMMAND"),
        (["generate", "folder"], "PROMPT"),
        (["generate", "folder", "p", "--temprature", "1"], "perhaps --temperature"),
        (["generate", "folder", "p", "--top-k", "many"], "--top-k must be an integer of at least -1, got 'many'"),
        (["generate", "folder", "p", "--temperature", "9"], "--temperature must be"),
        (["generate", "folder", "p", "--temperature", "nan"], "--temperature must be"),
        (["generate", "folder", "p", "--logit-bias", "5"], "ID=NUMBER"),
        (
            ["generate", "folder", "p", "--stop-token-ids", "x"],
            "--stop-token-ids: each id must be an integer of at least 0",
        ),
        (["generate", "folder", "p", "--seed"], "--seed: expected one argument"),
        (["generate", "folder", "p", "--logprobs-mode", "raw", "--json"], "--logprobs-mode needs --logprobs"),
        (["generate", "folder", "p", "more"], "'more' is not understood"),
        (["serve", "m", "--data-parallel-size", "2"], "'--data-parallel-size' is not understood (perhaps --replicas)"),
        (["serve", "m", "--max-replicas", "2"], "--max-replicas needs --ray"),
        (["serve", "m", "--ray-address", "auto"], "--ray-address needs --ray"),
        (["generate", "folder", "p", "--temp", "1"], "'--temp' is not understood (perhaps --temperature)"),
        (["generate", "folder", "p", "--max-tokens", "all"], "--max-tokens must be an integer from 1"),
        (["generate", "folder", "p", "--min-tokens", "none"], "--min-tokens must be an integer from 0"),
        (["generate", "folder", "p", "--logprobs", "2"], "--json"),
        (["generate", "folder", "p", "--no-detokenize"], "--no-detokenize needs --json"),
        (["chat", "folder", "--no-detokenize"], "--no-detokenize is for llama generate --json"),
        (["generate", "folder", "p", "--system", "s"], "--chat"),
        (["generate", "folder", "p", "--response-format", "{"], "--response-format: takes JSON, got '{': Expecting"),
        (["generate", "folder", "p", "--lora", "name"], "NAME=PATH"),
        (["chat", "folder", "--lora", "=path"], "NAME=PATH"),
        (["chat", "folder", "--n", "2"], "one answer"),
        (["generate", "folder", "p", "--dtype", "int8"], "--dtype: invalid choice: 'int8' (choose from "),
        (["chat", "folder", "--device", "tpu"], "--device must be auto,"),
        (["generate", "folder", "p", "--max-model-len", "1"], "--max-model-len must be an integer from 2"),
        (["info", "folder", "--memory", "many"], "--memory: takes a size"),
        (["info", "folder", "--dtype", "int8"], "--dtype: invalid choice: 'int8' (choose from "),
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


@pytest.mark.parametrize(
    ("words", "code", "told"),
    [
        ("serve none", 1, "none"),
        ("serve MODEL -tp 3", 1, "tensor_parallel_size must be one of 1, 2, 4, 8, 16, 32, 64 for 64 heads"),
        ("serve MODEL --max-model-len 131073", 1, "max_model_len must be an integer in [2, 131072]"),
        ("serve MODEL --port 0", 2, "--port must be a port with --ray, got 0"),
        ("batch none INPUT output", 1, "none"),
        ("batch MODEL INPUT output -tp 3", 1, "tensor_parallel_size must be one of 1, 2, 4"),
        ("batch MODEL INPUT output --capture norm --capture-to x", 2, "--capture is not there with --ray"),
    ],
)
def test_what_no_replica_could_do_is_told_before_ray_is_looked_for(
    capsys, monkeypatch, llama_70b, tmp_path, words, code, told
):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("llama.cli.common.find_spec", lambda name: True)
    monkeypatch.setattr("llama.ray_cluster.connect", lambda address: pytest.fail("it was looked for"))
    (tmp_path / "INPUT").write_text('{"custom_id": "a"}\n')
    (tmp_path / "MODEL").symlink_to(llama_70b)
    found, out, err = run(capsys, *words.split(), "--ray")
    assert (found, out) == (code, "") and one_line(err) and told in err


def test_flags_become_sampling_params():
    flags = "--n 2 --temperature 0.5 --stop a --- --stop-token-ids 3 4 --logit-bias 5=-100 6=2.5 --ignore-eos --seed 9"
    options = parse(["generate", "m", "p", *flags.split(), "--response-format", '{"type": "json_object"}', "--json"])
    assert options.json and (options.model, options.prompt) == ("m", "p")
    assert sampling_values(options) == {
        "n": 2,
        "temperature": 0.5,
        "stop": ["a", "---"],
        "stop_token_ids": [3, 4],
        "logit_bias": {5: -100.0, 6: 2.5},
        "ignore_eos": True,
        "seed": 9,
        "response_format": {"type": "json_object"},
    }
    assert parse(["chat"]).model == "checkpoints/smollm2-135m-instruct"
    assert sampling_values(parse(["chat"])) == {}


def test_flags_become_options_of_llm():
    flags = "--gpu-memory-utilization 0.5 --no-enable-prefix-caching --enforce-eager --block-size=32 --seed 3"
    options = parse(["serve", "m", *flags.split(), "--dtype", "float32", "--check-weights", "--max_num_seqs=7"])
    assert llm_options(options, max_num_seqs=1, max_loras=2) == {
        "gpu_memory_utilization": 0.5,
        "enable_prefix_caching": False,
        "enforce_eager": True,
        "block_size": 32,
        "seed": 3,
        "dtype": "float32",
        "check_weights": True,
        "max_num_seqs": 7,
        "max_loras": 2,
    }
    assert llm_options(parse(["chat"])) == {}


@pytest.mark.parametrize(
    "words", ["--seed 1 m p", "m --seed 1 p", "m p --seed 1", "--seed=1 m -- p", "m p --seed 2 --seed 1"]
)
def test_flags_and_arguments_may_stand_in_any_order(words):
    options = parse(["generate", *words.split()])
    assert (options.model, options.prompt, sampling_values(options)) == ("m", "p", {"seed": 1})
    assert parse(["chat", "--seed", "1", "m"]).model == "m"


def test_values_that_begin_with_a_hyphen():
    words = "--presence-penalty -1e-5 --frequency-penalty -.5 --logit-bias 5=-1 6=-1e2 --stop --- -1 --system=-x"
    options = parse(["generate", "m", "-5", *words.split()])
    values = {"presence_penalty": -1e-5, "frequency_penalty": -0.5, "logit_bias": {5: -1.0, 6: -100.0}}
    assert sampling_values(options) == values | {"stop": ["---", "-1"]}
    assert (options.prompt, options.system) == ("-5", "-x")
    with pytest.raises(UsageError, match="--logit-bias: each token id must be an integer of at least 0, got -6"):
        sampling_values(parse(["generate", "m", "p", "--logit-bias", "-6=2"]))


def test_underscores_are_changed_in_names_of_flags_alone():
    options = parse(
        ["generate", "m", "--my_prompt of words", "--max_tokens=5", "--system=--a_b", "--stop", "a_b", "c_d"]
    )
    assert (options.prompt, options.system) == ("--my_prompt of words", "--a_b")
    assert sampling_values(options) == {"max_tokens": 5, "stop": ["a_b", "c_d"]}


def test_the_rest_of_the_context_can_be_asked_for():
    values = sampling_values(parse(["generate", "m", "p", "--max-tokens", "none", "--min-tokens", "300"]))
    assert values == {"max_tokens": None, "min_tokens": 300}
    limited = SimpleNamespace(inputs=SimpleNamespace(defaults=SamplingParams(max_tokens=5)))
    assert params_for(limited, values).max_tokens is None


def test_a_zero_on_the_command_line_is_a_value():
    words = ["m", "p", "--temperature", "0", "--seed", "0", "--min-tokens", "0", "--top-k", "0"]
    assert sampling_values(parse(["generate", *words])) == {"temperature": 0.0, "seed": 0, "min_tokens": 0, "top_k": 0}


def test_min_tokens_are_held_against_the_max_tokens_that_will_count():
    values = sampling_values(parse(["chat", "--min-tokens", "300"]))
    generous, plain = (
        SimpleNamespace(inputs=SimpleNamespace(defaults=SamplingParams(max_tokens=n))) for n in (400, 256)
    )
    assert params_for(generous, values).min_tokens == 300
    with pytest.raises(UsageError, match="--min-tokens must be at most max_tokens"):
        params_for(plain, values)


def test_max_tokens_may_be_fewer_than_the_checkpoint_wants_at_least():
    checkpoint = SimpleNamespace(inputs=SimpleNamespace(defaults=SamplingParams(min_tokens=8)))
    for words, least in (("--max-tokens 3", 3), ("--max-tokens 9", 8), ("--max-tokens none", 8), ("--top-k 1", 8)):
        assert params_for(checkpoint, sampling_values(parse(["chat", *words.split()]))).min_tokens == least


def test_info_of_biases_and_another_rope(capsys, tmp_path):
    config = ModelConfig.preset("tiny").to_hugging_face("float32")
    config |= {"attention_bias": True, "rope_scaling": {"rope_type": "linear", "factor": 4.0}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    out = run(capsys, "info", str(tmp_path))[1]
    assert "rope theta 500000 scaled x4 (linear), biases in attention, separate head" in out
    model = Transformer(ModelConfig.from_pretrained(tmp_path))
    assert f"{sum(weight.numel() for weight in model.parameters()):,}" in out


def test_info_counts_a_draft_model(capsys, llama_70b, tmp_path):
    """(160 GiB * 0.9 - 2 * (70,553,706,496 + 1,235,814,400)) / (327,680 + 32,768) in whole blocks of 16."""
    draft = tmp_path / "draft.json"
    draft.write_text(json.dumps(ModelConfig.preset("llama-3.2-1b").to_hugging_face("bfloat16")))
    _, out, _ = run(capsys, "info", llama_70b, "--memory", "160GiB", "--draft-model", str(draft))
    assert "30,624 of 131,072 tokens of context" in out and "70,553,706,496" in out


@pytest.mark.parametrize("scheme", ["int8", "fp8", "int4"])
def test_info_counts_the_bytes_of_a_quantised_model(capsys, tmp_path, scheme):
    config = replace(ModelConfig.preset("tiny"), intermediate_size=384)
    (tmp_path / "config.json").write_text(json.dumps(config.to_hugging_face("bfloat16")))
    model = Transformer(config, dtype=torch.bfloat16)
    model.quantise(scheme)
    linears = [module for module in model.modules() if getattr(module, "coded", None) is not None]
    size = sum(module.coded.nbytes for module in linears) + sum(weight.nbytes for weight in model.parameters())
    assert f"{scheme:9}{size:>20,} bytes" in run(capsys, "info", str(tmp_path))[1]


def test_70b_fits_when_it_is_quantised(capsys, llama_70b):
    _, out, _ = run(capsys, "info", llama_70b, "--memory", "140GiB", "--quantization", "fp8", "--kv-cache-dtype", "fp8")
    assert "all 131,072 tokens of context, 2 times over, fp8 weights of 67.7 GiB" in out
    assert "163,840 bytes" in out


def test_info_says_which_weights_are_packed(capsys, tmp_path):
    Transformer(ModelConfig.preset("tiny")).save_pretrained(tmp_path / "tiny")
    _, out, _ = run(capsys, "info", str(tmp_path / "tiny"), "--weight-forms")
    assert "qkv_proj          128 x 64 plain" in out and "lm_head           512 x 64 plain" in out
    assert "forms on this CPU" not in run(capsys, "info", str(tmp_path / "tiny"))[1]


def test_info_of_70b(capsys, llama_70b):
    code, out, err = run(capsys, "info", llama_70b, "--memory", "160GiB")
    assert (code, err) == (0, "")
    for words in (
        "80 layers",
        "64 heads and 8 KV heads of 128",
        "scaled x8 from 8,192 (llama3)",
        "70,553,706,496",
        "141,107,412,992 bytes",
        "327,680 bytes",
        "temperature 0.6, top_p 0.9",
        "ends at 128001, 128008, 128009",
        "fits 160GiB",
        "41,232 of 131,072 tokens of context",
    ):
        assert words in out
    assert (
        "no: bfloat16 weights of 131.4 GiB in 22.4 GiB used to 90%"
        in run(capsys, "info", llama_70b, "--memory", "24GB")[1]
    )
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


def test_no_value_of_a_repeated_flag_is_lost():
    options = parse("generate m p --stop a b --stop=c --logit-bias 1=1 --logit_bias=2=1".split())
    assert sampling_values(options) == {"stop": ["a", "b", "c"], "logit_bias": {1: 1.0, 2: 1.0}}
    options = parse("serve m --served-model-name a --lora a=b --served-model-name b c --lora c=d".split())
    assert (options.served_model_name, options.lora) == (["a", "b", "c"], [("a", "b"), ("c", "d")])
    for command in ("chat m", "generate m p"):
        with pytest.raises(UsageError, match="--lora: is given twice"):
            parse(f"{command} --lora a=b --lora c=d".split())


def test_flags_that_want_values_need_some():
    with pytest.raises(UsageError, match="--stop: expected at least one argument"):
        parse(["generate", "m", "p", "--stop"])
    for words in (["5=1", "5=2"], ["5=1", "--logit-bias", "5=2"]):
        with pytest.raises(UsageError, match="--logit-bias: names 5 twice"):
            parse(["generate", "m", "p", "--logit-bias", *words])


def test_info_counts_what_each_rank_holds(capsys, llama_70b):
    _, out, _ = run(capsys, "info", llama_70b, "-tp", "8", "--memory", "80GiB")
    # A layer: 8 of 64 heads and 1 of 8 KV heads of 128, an eighth of the MLP and of both tables; norms are whole.
    layer = 8192 * 128 * (8 + 1 + 1 + 8) + 3 * 8192 * 28_672 // 8 + 2 * 8192
    count = 80 * layer + 2 * 128_256 // 8 * 8192 + 8192
    assert "weights of 1 in 8 " in out and f"{'bfloat16':9}{2 * count:>20,} bytes" in out
    assert f"{'bfloat16':9}{2 * 2 * 80 * 128:>20,} bytes" in out
    assert "on each of 8 ranks" in out
    assert "must be one of 1, 2, 4, 8, 16, 32, 64" in run(capsys, "info", llama_70b, "-tp", "3")[2]
    assert "no place" in run(capsys, "info", llama_70b, "-tp", "2", "--draft-model", "x")[2]
