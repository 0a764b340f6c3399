"""The standard streams of the `llama` command: closed ones, bytes that are no text, a terminal; and paths that are not
there."""

import errno
import os
import pty
import subprocess
import sys
from pathlib import Path

import pytest

from tests.cli.helpers import one_line, run

COMMAND = [sys.executable, "-c", "import sys; from llama.cli import main; sys.exit(main(sys.argv[1:]))"]


def llama(*arguments: str, stdin: bytes = b"", encoding: str = "utf-8", closed: int | None = None):
    """The command in a process of its own, perhaps without one of its streams."""
    return subprocess.run(
        [*COMMAND, *arguments],
        input=stdin,
        capture_output=True,
        env=os.environ | {"PYTHONIOENCODING": encoding},
        preexec_fn=None if closed is None else lambda: os.close(closed),
        check=False,
    )


def test_bytes_on_stdin_that_are_no_text_are_told(tiny):
    done = llama("generate", tiny, "-", stdin=b"caf\xe9", encoding="utf-8:strict")
    assert (done.returncode, done.stdout) == (1, b"")
    assert done.stderr == b"llama: stdin is not UTF-8 text: byte 0xe9 behind 3 characters\n"
    done = llama("chat", tiny, "--max-tokens", "2", stdin=b"caf\xe9\ncafe\n", encoding="utf-8:strict")
    told = done.stderr.decode().splitlines()
    assert done.returncode == 0 and told[0] == "the message is not UTF-8 text: byte 0xe9 behind 3 characters"
    assert "prompt tokens" in told[1] and len(told) == 2


def test_a_prompt_on_the_command_line_that_is_no_text_is_told(capsys, tiny):
    code, out, err = run(capsys, "generate", tiny, os.fsdecode(b"caf\xe9"))
    assert (code, out, err) == (1, "", "llama: PROMPT is not UTF-8 text: byte 0xe9 behind 3 characters\n")


def test_what_stdout_cannot_encode_is_escaped(tiny):
    bias = (
        "--max-tokens",
        "2",
        "--logit-bias",
        "195=100",
        "169=100",
        "--temperature",
        "5",
        "--seed",
        "1",
        "--ignore-eos",
    )
    whole = llama("generate", tiny, "é", *bias).stdout.decode()
    assert not whole.isascii()
    done = llama("generate", tiny, "é", *bias, encoding="ascii")
    assert done.returncode == 0 and done.stdout.decode("ascii") == whole.encode("ascii", "backslashreplace").decode()


@pytest.mark.parametrize(
    ("words", "closed", "code"),
    [
        ("generate MODEL -", 0, 1),
        ("chat MODEL", 0, 0),
        ("generate MODEL hi --max-tokens=2", 1, 0),
        ("info MODEL", 2, 0),
    ],
)
def test_a_closed_stream_is_one_to_nowhere(tiny, words, closed, code):
    done = llama(*words.replace("MODEL", tiny).split(), closed=closed)
    assert done.returncode == code and b"Traceback" not in done.stderr
    assert code == 0 or done.stderr == b"llama: prompt is empty\n"


def test_the_end_of_input_on_a_terminal_ends_the_line(tiny):
    ours, theirs = pty.openpty()
    with subprocess.Popen([*COMMAND, "chat", tiny], stdin=theirs, stdout=theirs, stderr=theirs) as process:
        os.close(theirs)
        seen = b""
        while not seen.endswith(b"> "):
            seen += os.read(ours, 1024)
        os.write(ours, b"\x04")
        while True:
            try:
                seen += os.read(ours, 1024)
            except OSError as error:  # how Linux tells the end of a terminal
                assert error.errno == errno.EIO
                break
    os.close(ours)
    assert process.returncode == 0 and seen.endswith(b"\r\n")


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (
            "convert none out",
            "none: there is no such file or folder; INPUT is the folder that Meta's download made, or",
        ),
        ("convert none.gguf out", "none.gguf: there is no such file or folder; INPUT is the folder that Meta's"),
        (
            "batch MODEL none out",
            "none: there is no such file; the input is a file of requests, one JSON object a line",
        ),
        ("batch MODEL none there", "none: there is no such file; the input is a file of requests"),
        ("batch MODEL folder out", "folder: is a folder; the input is a file of requests, one JSON object a line"),
        ("batch MODEL there folder", "folder: is a folder; the output is a file, which is made where it does not"),
        ("batch MODEL there pipe", "pipe: is not a regular file; the output is a file, which is made where it does"),
        ("batch MODEL there pipe.parquet", "pipe.parquet: is not a regular file; the output is a file"),
        ("batch MODEL there none/out", "none/out: there is no folder none for this file of answers; make it first"),
        ("generate there hi", "there: is a file; a model is a folder with a config.json"),
        ("chat model.gguf", "model.gguf: is a file; a model is a folder with a config.json; llama convert makes one"),
        ("quantize --input MODEL --output there/x --scheme int8", "there: File exists"),
    ],
)
def test_a_path_that_is_not_there_is_named_with_what_is_expected(capsys, monkeypatch, tmp_path, tiny, words, told):
    monkeypatch.chdir(tmp_path)
    Path("folder").mkdir()
    for name in ("there", "model.gguf"):
        Path(name).write_text("x")
    for name in ("pipe", "pipe.parquet"):
        os.mkfifo(name)
    code, out, err = run(capsys, *words.replace("MODEL", tiny).split())
    assert (code, out) == (1, "") and one_line(err) and told in err and "Errno" not in err


def test_an_empty_name_is_no_working_directory(capsys, monkeypatch, tiny):
    monkeypatch.chdir(tiny)
    for words in (["info", ""], ["generate", "", "hi"], ["convert", "", "out"]):
        code, out, err = run(capsys, *words)
        assert (code, out) == (1, "") and one_line(err) and "''" in err
