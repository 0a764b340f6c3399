"""Any file of a checkpoint or an adapter may be something else: one line says which, what it is, and how to go on."""

import json
import os
import shutil
import threading

import pytest
from make_tiny import TINY, make

from llama.api.errors import AdapterError, CheckpointError, ConfigError
from llama.files import MAX_TOKEN_IDS, open_regular, read_json_if_there, token_ids
from llama.model.checkpoint.load import find_tensors
from llama.model.config import ModelConfig
from llama.model.generation_config import GenerationConfig
from llama.model.lora.adapter_config import read_adapter_config
from llama.text.chat import ChatTemplate
from llama.text.tokenizer import Tokenizer

# file -> how it is read, what a refusal is
READERS = {
    "config.json": (ModelConfig.from_pretrained, ConfigError),
    "generation_config.json": (GenerationConfig.from_pretrained, ConfigError),
    "adapter_config.json": (lambda folder: read_adapter_config(folder, []), AdapterError),
    "tokenizer.json": (Tokenizer.from_pretrained, CheckpointError),
    "tokenizer_config.json": (Tokenizer.from_pretrained, CheckpointError),
    "special_tokens_map.json": (Tokenizer.from_pretrained, CheckpointError),
    "chat_template.jinja": (
        lambda folder: ChatTemplate.from_pretrained(folder, Tokenizer.from_pretrained(folder)),
        CheckpointError,
    ),
    "model.safetensors.index.json": (find_tensors, CheckpointError),
    "model.safetensors": (find_tensors, CheckpointError),
}
TEXTS = [name for name in READERS if name != "model.safetensors"]
CONFIGS = [name for name in TEXTS if name not in ("tokenizer.json", "chat_template.jinja")]


@pytest.fixture(scope="session")
def whole_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("files") / "tiny"
    make(folder, TINY, dtype="float32", seed=0)
    return folder


@pytest.fixture
def folder(whole_folder, tmp_path):
    shutil.copytree(whole_folder, tmp_path / "model")
    return tmp_path / "model"


def refusal(folder, name):
    """The message with which the file is refused, in less than ten seconds."""
    read, kind = READERS[name]
    outcome = []

    def attempt():
        try:
            read(folder)
        except Exception as error:
            outcome.append(error)

    thread = threading.Thread(target=attempt, daemon=True)
    thread.start()
    thread.join(10)
    assert not thread.is_alive(), "reading does not end"
    [error] = outcome
    assert type(error) is kind
    message = str(error)
    assert "\n" not in message and len(message) < 400
    assert message.startswith(f"{folder / name}: ")
    return message


def place(folder, name, content):
    if name == "model.safetensors.index.json":
        (folder / "model.safetensors").unlink(missing_ok=True)
    path = folder / name
    path.unlink(missing_ok=True)
    if content is not None:
        path.write_bytes(content)
    return path


@pytest.mark.parametrize("name", READERS)
def test_pipes_devices_and_folders_are_refused(folder, name):
    path = place(folder, name, None)
    os.mkfifo(path)
    assert "not a regular file" in refusal(folder, name)
    path.unlink()
    path.symlink_to("/dev/zero")
    assert "not a regular file" in refusal(folder, name)
    path.unlink()
    path.mkdir()
    assert "not a regular file" in refusal(folder, name)


@pytest.mark.parametrize("name", TEXTS)
def test_what_is_larger_than_such_a_file_can_be_is_not_read(folder, name):
    path = place(folder, name, b"{}")
    os.truncate(path, 3 * 2**30)
    assert "is larger than the " in refusal(folder, name)


@pytest.mark.parametrize("name", READERS)
def test_pointers_and_pages_are_named(folder, name):
    place(folder, name, b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 5\n")
    assert "is a Git LFS pointer, not the file itself; fetch it with `git lfs pull`" in refusal(folder, name)
    for page in (b"<!DOCTYPE html><html></html>", b"<!doctype html>", b"<html lang='en'><body>Sign in</body></html>"):
        place(folder, name, page)
        assert "is an HTML page, not " in refusal(folder, name)


@pytest.mark.parametrize("name", TEXTS)
def test_what_is_not_text_is_refused(folder, name):
    place(folder, name, b'{"a": "\xff"}')
    assert "byte 7 is not UTF-8 text" in refusal(folder, name)


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize(
    ("content", "what"),
    [
        (b"", "is not JSON: "),
        (b"{", "is not JSON: "),
        (b'{"a":' * 50_000, "is not JSON: it is nested too deeply"),
        (b"[1, 2]", "must hold a JSON object, got list"),
        (b'{"a": ' + b"9" * 5000 + b"}", "Exceeds the limit"),
        (b'{"model_type": "llama", "b": {"c": 1, "d": 2, "c": 1}}', "the key 'c' is there twice"),
    ],
    ids=["empty", "cut", "deep", "list", "digits", "twice"],
)
def test_what_is_no_object_is_refused(folder, name, content, what):
    place(folder, name, content)
    assert what in refusal(folder, name)


@pytest.mark.parametrize("name", ["config.json", "adapter_config.json", "tokenizer.json"])
def test_what_must_be_there(folder, name):
    place(folder, name, None)
    assert "there is no such file" in refusal(folder, name)


def test_what_may_be_absent(tmp_path):
    assert read_json_if_there(tmp_path / "x.json") == {}
    (tmp_path / "dangling.json").symlink_to(tmp_path / "nowhere")
    assert read_json_if_there(tmp_path / "dangling.json") == {}
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="cannot be read: Not a directory"):
        read_json_if_there(tmp_path / "file" / "x.json", error=ConfigError)


def test_links_to_files_are_followed(folder):
    before = ModelConfig.from_pretrained(folder)
    (folder / "config.json").rename(folder / "blob")
    (folder / "config.json").symlink_to("blob")
    assert ModelConfig.from_pretrained(folder) == before


def test_a_refused_file_leaves_no_descriptor_behind(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    before = len(os.listdir("/proc/self/fd"))
    for _ in range(8):
        with pytest.raises(OSError, match="not a regular file"):
            open_regular(tmp_path / "pipe")
    assert len(os.listdir("/proc/self/fd")) == before


def test_token_ids_in_their_spellings():
    assert token_ids("eos_token_id", None) == ()
    assert token_ids("eos_token_id", []) == ()
    assert token_ids("eos_token_id", 2) == (2,)
    assert token_ids("eos_token_id", [2, 5]) == (2, 5)
    for wrong in (True, -1, "2", 2.0, [2, None], [[2]], {"id": 2}):
        with pytest.raises(ValueError, match="eos_token_id must be a token id or a list of them, got "):
            token_ids("eos_token_id", wrong)


@pytest.mark.parametrize("name", ["config.json", "generation_config.json"])
def test_more_ends_than_any_model_has_are_refused(folder, name):
    values = json.loads((folder / name).read_text()) if (folder / name).exists() else {}
    place(folder, name, json.dumps(values | {"eos_token_id": [1] * (MAX_TOKEN_IDS + 1)}).encode())
    assert f"eos_token_id has {MAX_TOKEN_IDS + 1} token ids, more than {MAX_TOKEN_IDS}" in refusal(folder, name)


@pytest.mark.parametrize("value", [0, "false", []])
def test_a_do_sample_that_is_no_boolean_is_refused(folder, value):
    place(folder, "generation_config.json", json.dumps({"do_sample": value}).encode())
    assert "do_sample must be true or false" in refusal(folder, "generation_config.json")
