"""Files that are taken up again: what is none, or cannot be written, is refused in a line that names it."""

import os

import pytest
import torch
from safetensors.torch import save_file

from llama.api.errors import ParameterError
from llama.model.kept import opened, write

TENSORS = {"a": torch.arange(6.0).view(2, 3).t(), "none": torch.empty(0, 4)}


def test_what_was_written_is_read(tmp_path):
    for told in ({"x": "1"}, {"x": "2"}):
        write(tmp_path / "file", TENSORS, told)
        with opened(str(tmp_path / "file")) as file:
            assert file.metadata() == told and file.get_tensor("a").equal(TENSORS["a"])
    assert os.listdir(tmp_path) == ["file"]


def sound(path):
    save_file({"a": torch.arange(60.0)}, path)
    return path.read_bytes()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (lambda path: b"", "is not a safetensors file"),
        (lambda path: b"garbage" * 10, "is not a safetensors file"),
        (lambda path: b"<html>" * 30, "is an HTML page"),
        (lambda path: sound(path)[:-7], "is truncated"),
        (lambda path: sound(path)[:20], "is truncated"),
        (lambda path: sound(path).replace(b"F32", b"F99"), ""),
    ],
)
def test_a_file_that_is_none_is_refused(tmp_path, content, message):
    path = tmp_path / "file"
    path.write_bytes(content(path))
    with pytest.raises(ParameterError) as caught, opened(path):
        pass
    [line] = str(caught.value).splitlines()
    assert line.startswith(f"{path}: {message}") and caught.value.param == "path"


def test_a_file_that_is_not_there_or_lacks_a_tensor_is_refused(tmp_path):
    with pytest.raises(ParameterError, match="none: there is no such file"), opened(tmp_path / "none"):
        pass
    with pytest.raises(ParameterError, match=f"{tmp_path}: cannot be read: it is not a regular file"), opened(tmp_path):
        pass
    write(tmp_path / "file", TENSORS, {})
    with pytest.raises(ParameterError, match=r"file: .*other"), opened(tmp_path / "file") as file:
        file.get_tensor("other")


def test_what_cannot_be_written_names_the_file_and_leaves_nothing(tmp_path, monkeypatch):
    write(tmp_path / "file", TENSORS, {"x": "1"})
    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", lambda *_: 1 // 0)
        with pytest.raises(ZeroDivisionError):
            write(tmp_path / "file", TENSORS, {"x": "2"})
    assert os.listdir(tmp_path) == ["file"]
    with opened(tmp_path / "file") as file:
        assert file.metadata() == {"x": "1"}
    with pytest.raises(OSError, match="/proc/file cannot be written"):
        write("/proc/file", TENSORS, {})


def test_a_path_where_no_file_can_be_is_refused_and_what_lies_there_stays(tmp_path):
    os.mkfifo(tmp_path / "pipe")  # as /dev/null, which a file would replace for everybody
    for path, told in (
        (tmp_path / "no" / "file", f"no/file: there is no folder {tmp_path}/no"),
        (tmp_path, f"{tmp_path}: is a folder"),
        (tmp_path / "pipe", "pipe: is there already and is not a regular file"),
        ("", r"^path must be a file's path, got ''"),
        (None, "^path must be a file's path, got None"),
        (5, "^path must be a file's path, got 5"),
        (b"file", "^path must be a file's path, got b'file'"),
        ("nul\0", r"^path must be a file's path, got 'nul\\x00'"),
        (tmp_path / ("x" * 300), "File name too long"),
    ):
        with pytest.raises(ParameterError, match=told) as caught:
            write(path, TENSORS, {})
        assert caught.value.param == "path"
    assert (tmp_path / "pipe").is_fifo() and os.listdir(tmp_path) == ["pipe"]
    for path in (None, 5, b"file", ""):
        with pytest.raises(ParameterError, match=f"^path must be a file's path, got {path!r}$"), opened(path):
            pass
