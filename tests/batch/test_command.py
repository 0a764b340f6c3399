"""`llama batch` from the outside: its flags, its exit codes, and that a kill costs nothing but time."""

import json
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from llama import LLM, Capture, SamplingParams
from llama.cli.batch import SPEED_ONLY
from llama.cli.common import LoadOptions
from llama.engine.config import EngineConfig
from tests.batch.helpers import by_custom_id, chat, completion, read_lines, said, write_lines
from tests.cli.helpers import one_line, run

FLAGS = ("--dtype", "float64", "--num-blocks", "256", "--max-num-seqs", "8")


@pytest.fixture
def files(tmp_path):
    return tmp_path / "input.jsonl", tmp_path / "output.jsonl"


def batch(capsys, *arguments) -> tuple[int, str]:
    code, out, err = run(capsys, "batch", *map(str, arguments))
    assert out == ""
    return code, err


def test_a_file_in_a_file_out(capsys, tiny, adapter, files):
    source, output = files
    lines = [
        chat("chat", "hello", max_tokens=8, temperature=0, model="name"),
        completion("text", ["ab", "cd"], max_tokens=3),
        chat("tuned", "hello", max_tokens=8, temperature=0, model="tuned"),
        chat("model", "x", model="tiny"),
        "{",
    ]
    write_lines(source, lines)
    more = ("--served-model-name", "name", "--lora", f"tuned={adapter}")
    code, err = batch(capsys, tiny, source, output, *FLAGS, *more)
    assert (code, err) == (0, f"llama: {output}: 5 lines: 3 answered, 1 rejected, 1 failed\n")
    answers = {line["custom_id"]: line for line in read_lines(output)}
    assert answers["chat"]["response"]["body"]["model"] == "name"
    assert said(answers["chat"]) != said(answers["tuned"])
    assert [choice["index"] for choice in answers["text"]["response"]["body"]["choices"]] == [0, 1]
    assert answers["model"]["response"]["status_code"] == 404
    assert answers[None]["error"]["code"] == "invalid_json_line"


def test_paths_by_flags(capsys, tiny, files):
    source, output = files
    write_lines(source, [chat("a", "x", max_tokens=1)])
    for arguments in (
        ("--model", tiny, "-i", source, "-o", output),
        (tiny, "--input-file", source, "--output-file", output),
        (tiny, source, "-o", output),
        ("--model", tiny, source, output),
    ):
        output.unlink(missing_ok=True)
        assert batch(capsys, *arguments, *FLAGS)[0] == 0
        assert len(read_lines(output)) == 1


@pytest.mark.parametrize(
    "arguments, told",
    [
        (("MODEL", "in.jsonl"), "missing: OUTPUT"),
        ((), "missing: MODEL, INPUT, OUTPUT"),
        (("MODEL", "in.jsonl", "out.jsonl", "more"), "'more' is one path too many"),
        (
            ("MODEL", "in.jsonl", "out.jsonl", "--max-num-seqs", "0"),
            "--max-num-seqs must be an integer from 1 to 65536, got 0",
        ),
        (("MODEL", "in.jsonl", "out.jsonl", "--lora", "x"), "--lora: takes NAME=PATH, got 'x'"),
    ],
)
def test_usage_errors(capsys, arguments, told):
    code, err = batch(capsys, *arguments)
    assert code == 2 and one_line(err) and told in err


def test_what_is_missing_is_told_before_any_work(capsys, monkeypatch, tiny, files):
    source, output = files
    write_lines(source, [chat("a", "x", max_tokens=1)])
    source.with_suffix(".parquet").touch()
    monkeypatch.setattr("llama.cli.common.find_spec", lambda name: None)
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    for arguments, told in (
        ((source, output, "--ray"), "--ray needs Ray: pip install 'llama-engine[ray]'"),
        ((source, output, "--ray-address", "auto"), "--ray-address needs --ray"),
        ((source, output.with_suffix(".parquet")), "Parquet files need pyarrow: pip install 'llama-engine[ray]'"),
        ((source.with_suffix(".parquet"), output), "Parquet files need pyarrow: pip install 'llama-engine[ray]'"),
    ):
        code, err = batch(capsys, tiny, *arguments)
        assert code in (1, 2) and one_line(err) and told in err and [*output.parent.glob("output*")] == []


def test_failures_are_one_line_and_leave_the_files_alone(capsys, tiny, files):
    source, output = files
    code, err = batch(capsys, tiny, source, output)
    assert code == 1 and one_line(err) and str(source) in err and not output.exists()
    write_lines(source, [chat("a", "x", max_tokens=1)])
    code, err = batch(capsys, tiny, source, source)
    assert code == 1 and one_line(err) and "the output is the input" in err and len(read_lines(source)) == 1
    code, err = batch(capsys, tiny, source, output.parent / "none" / "output.jsonl")
    assert code == 1 and one_line(err)
    code, err = batch(capsys, source.parent / "no-model", source, output)
    assert code == 1 and one_line(err) and "no-model" in err


def test_another_model_or_dtype_goes_into_another_file(capsys, tiny, files):
    source, output = files
    write_lines(source, [chat("a", "x", max_tokens=1)])
    assert batch(capsys, tiny, source, output, *FLAGS)[0] == 0
    before = output.read_bytes()
    code, err = batch(capsys, tiny, source, output, "--dtype", "float32")
    assert code == 1 and one_line(err) and "answers 1 lines that this run does not ask" in err
    # What only decides how fast it runs may change; and where nothing is left to do no model is loaded.
    code, err = batch(capsys, tiny, source, output, "--dtype", "float64", "--max-num-seqs", "2")
    assert (code, err) == (
        0,
        f"llama: {output}: 1 lines: 1 answered (1 of them by an earlier run), 0 rejected, 0 failed\n",
    )
    assert output.read_bytes() == before


def test_speed_only_names_options_that_there_are():
    assert {*EngineConfig.__dataclass_fields__, *LoadOptions.__dataclass_fields__} >= SPEED_ONLY


def test_seed_of_the_run_makes_it_repeatable_in_any_order(capsys, tiny, files):
    source, output = files
    lines = [chat(str(i), f"text {i % 3}", max_tokens=8, seed=(None, -1)[i % 2]) for i in range(9)]
    told = []
    for order in (1, -1):
        write_lines(source, lines[::order])
        output.unlink(missing_ok=True)
        assert batch(capsys, tiny, source, output, *FLAGS, "--seed", "7")[0] == 0
        told.append(by_custom_id(read_lines(output)))
    assert told[0] == told[1]
    assert len({said(line) for line in read_lines(output)}) == 9


def kill_once_it_has(count: int, tiny: str, source: Path, output: Path, *more: str | Path) -> None:
    main = "import sys; from llama.cli import main; sys.exit(main())"
    process = subprocess.Popen([sys.executable, "-c", main, "batch", tiny, source, output, *FLAGS, *more])
    output.touch()
    with output.open("rb") as file:
        while count > 0:
            assert process.poll() is None
            count -= file.read().count(b"\n")
            time.sleep(0.001)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL


def killed_and_unbroken(capsys, tiny: str, folder: Path, num_lines: int, num_kills: int) -> None:
    draw = random.Random(num_lines)
    lines = [
        (chat if i % 2 else completion)(
            f"line {i}", "x" * draw.randrange(1, 40), max_tokens=draw.randrange(1, 9), seed=i
        )
        for i in range(num_lines)
    ]
    source, broken, unbroken = write_lines(folder / "input.jsonl", lines), folder / "broken", folder / "unbroken"
    states, wanted = folder / "states", folder / "wanted"
    read = ("--capture", "norm", "--capture-positions", "all", "--capture-to")
    at = sorted(draw.sample(range(2, num_lines - 20), num_kills))
    kept = set()
    for count in at:
        kill_once_it_has(count, tiny, source, broken, *read, states)
        left = broken.read_bytes()
        whole = [json.loads(line) for line in left[: left.rfind(b"\n") + 1].splitlines()]
        assert count <= len(whole) < num_lines and kept <= {json.dumps(line) for line in whole}
        kept = {json.dumps(line) for line in whole}
        assert {line["id"] for line in whole} <= {path.stem for path in states.glob("*.safetensors")}
        with broken.open("ab") as file:  # as a kill within a write leaves it
            file.write(b'{"id":"batch_req_0123","cust'[: draw.randrange(28)] if left.endswith(b"\n") else b"")
    files = [states / f"{json.loads(line)['id']}.safetensors" for line in sorted(kept)[:2]]
    files[0].unlink()
    files[1].write_bytes(files[1].read_bytes()[:-3])  # torn: these two are asked again
    kept -= set(sorted(kept)[:2])
    code, err = batch(capsys, tiny, source, broken, *FLAGS, *read, states)
    assert code == 0 and f"({len(kept):,} of them by an earlier run)" in err
    assert kept <= {json.dumps(line) for line in read_lines(broken)}
    assert batch(capsys, tiny, source, unbroken, *FLAGS, *read, wanted)[0] == 0
    assert {path.name for path in states.glob("*.safetensors")} == {path.name for path in wanted.iterdir()}
    for path in wanted.iterdir():
        torch.testing.assert_close(load_file(states / path.name), load_file(path), rtol=0, atol=1e-10)
    answers = by_custom_id(read_lines(broken))
    assert list(answers) != [] and answers == by_custom_id(read_lines(unbroken))
    assert answers.keys() == {line["custom_id"] for line in lines}


def test_killed_once(capsys, tiny, tmp_path):
    killed_and_unbroken(capsys, tiny, tmp_path, 80, 1)


@pytest.mark.slow
def test_two_thousand_lines_killed_three_times(capsys, tiny, tmp_path):
    killed_and_unbroken(capsys, tiny, tmp_path, 2000, 3)


def test_activations_of_each_line_are_kept_and_a_run_that_broke_off_keeps_the_rest(capsys, tiny, files, tmp_path):
    source, output = files
    folder = tmp_path / "states"
    texts = ["hello", "a longer text to read", "x"]
    lines = [chat(f"chat/{i}", text, max_tokens=2) for i, text in enumerate(texts)]
    write_lines(source, [*lines, completion("two", ["ab", "cd"], max_tokens=1)])
    more = ("--capture", "layers.*.resid_post", "norm", "--capture-positions", "prompt", "--capture-to", folder)
    assert batch(capsys, tiny, source, output, *FLAGS, *more)[0] == 0
    answers = {line["custom_id"]: line["id"] for line in read_lines(output)}
    names = [*(answers[f"chat/{i}"] for i in range(3)), answers["two"], f"{answers['two']}.1"]
    assert {path.stem for path in folder.iterdir()} == set(names)
    llm = LLM(tiny, dtype="float64", num_blocks=64)
    read = Capture(["layers.*.resid_post", "norm"], positions="prompt")
    messages = [[{"role": "user", "content": text}] for text in texts]
    expected = [
        *llm.chat(messages, SamplingParams(max_tokens=1), capture=read),
        *llm.generate(["ab", "cd"], SamplingParams(max_tokens=1), capture=read),
    ]
    before = {name: load_file(folder / f"{name}.safetensors") for name in names}
    for name, wanted in zip(names, expected, strict=True):
        torch.testing.assert_close(before[name], wanted.captured, rtol=0, atol=1e-10)

    kept = output.read_text().splitlines(keepends=True)
    output.write_text("".join(kept[:2]) + kept[2][:20])  # as a kill leaves it
    for line in kept[2:]:
        (folder / f"{json.loads(line)['id']}.safetensors").unlink()
    assert batch(capsys, tiny, source, output, *FLAGS, *more)[0] == 0
    for name in names:
        torch.testing.assert_close(load_file(folder / f"{name}.safetensors"), before[name], rtol=0, atol=1e-10)
    code, err = batch(capsys, tiny, source, output, *FLAGS)
    assert code == 1 and "or not with this model and these settings" in err


@pytest.mark.parametrize(
    ("more", "code", "message"),
    [
        (("--capture", "norm"), 2, "--capture and --capture-to need each other"),
        (("--capture-positions", "all"), 2, "--capture-positions needs --capture"),
        (("--capture-mean",), 2, "--capture-mean needs --capture"),
        (("--capture", "layers.9.resid_post", "--capture-to", "x"), 1, "layers.9.resid_post"),
    ],
)
def test_captures_that_cannot_be_are_refused(capsys, tiny, files, more, code, message):
    source, output = files
    write_lines(source, [chat("a", "x", max_tokens=1)])
    found, err = batch(capsys, tiny, source, output, *FLAGS, *more)
    assert found == code and message in err
