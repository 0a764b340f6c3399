"""Every way in which a folder's weights can be wrong: one named error of one line each, before any weight is read."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from llama.api.errors import CheckpointError
from llama.model.checkpoint import save_pretrained
from llama.model.transformer import Transformer
from tests.model.models import tiny_model


@pytest.fixture
def folder(tmp_path):
    tiny_model(dtype=torch.float32).save_pretrained(tmp_path / "model")
    return tmp_path / "model"


@pytest.fixture
def sharded(tmp_path):
    model = tiny_model(dtype=torch.float32)
    save_pretrained(model, model.config, tmp_path / "sharded", max_shard_bytes=60_000)
    return tmp_path / "sharded"


def refuse(folder, message):
    with pytest.raises(CheckpointError, match=message) as caught:
        Transformer.from_pretrained(folder)
    assert "\n" not in str(caught.value)


def rewrite(folder, change):
    weights = load_file(folder / "model.safetensors")
    change(weights)
    save_file(weights, folder / "model.safetensors")


def rewrite_header(folder, change):
    data = (folder / "model.safetensors").read_bytes()
    length = int.from_bytes(data[:8], "little")
    header = change(json.loads(data[8 : 8 + length]))
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    (folder / "model.safetensors").write_bytes(len(text).to_bytes(8, "little") + text + data[8 + length :])


def edit(name, **changes):
    def change(header):
        header[name] |= changes
        return header

    return change


NORM = "model.norm.weight"


def test_no_folder(tmp_path):
    refuse(tmp_path / "none", "there is no such folder")


def test_no_weights(folder):
    (folder / "model.safetensors").unlink()
    refuse(folder, "has neither model.safetensors nor model.safetensors.index.json")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("consolidated.00.pth", "only safetensors are loaded; convert it with `llama convert`"),
        ("pytorch_model.bin", "only safetensors are loaded; save it again as safetensors"),
        ("model.gguf", "only safetensors are loaded; convert it with `llama convert`"),
    ],
)
def test_other_formats_by_extension(folder, name, message):
    (folder / "model.safetensors").rename(folder / name)
    refuse(folder, message)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 5\n", "is a Git LFS pointer"),
        (b"<!DOCTYPE html><html></html>", "is an HTML page"),
        (b"<html><body>Sign in</body></html>", "is an HTML page"),
        (b"PK\x03\x04" + bytes(100), "is a PyTorch pickle, which can run code"),
        (b"\x80\x02}q\x00." + bytes(100), "is a pickle, which can run code"),
        (b"\x80\x04}\x94." + bytes(100), "is a pickle, which can run code"),
        (b"GGUF" + bytes(100), "is a GGUF file; convert it with `llama convert`"),
        (b"", "is not a safetensors file"),
        (b"\x01\x00", "is not a safetensors file"),
        (bytes(100), "is not a safetensors file"),
        (b"\xff" * 100, "is not a safetensors file"),
        ((90).to_bytes(8, "little") + b"{}", "is truncated: 10 bytes, the header alone needs 98"),
        ((4).to_bytes(8, "little") + b"{{{{", "its safetensors header is not JSON"),
        ((90_000).to_bytes(8, "little") + b'{"a":' * 18_000, "its safetensors header is not JSON"),
        ((4).to_bytes(8, "little") + b"[12]", "is not a safetensors file"),
    ],
    ids=lambda value: repr(value[:12]) if isinstance(value, bytes) else "",
)
def test_what_is_not_safetensors(folder, content, message):
    (folder / "model.safetensors").write_bytes(content)
    refuse(folder, message)


@pytest.mark.parametrize("bytes_lost", [1, 5000])
def test_truncated(folder, bytes_lost):
    data = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(data[:-bytes_lost])
    refuse(folder, f"is truncated: {len(data) - bytes_lost} bytes, its header describes {len(data)}")


def test_bytes_left_over(folder):
    with (folder / "model.safetensors").open("ab") as file:
        file.write(b"x")
    refuse(folder, "has bytes after its last tensor")


def test_a_sound_header_may_begin_like_a_pickle(folder):
    """Its length is the file's first bytes: 128 and 2 is how a pickle of protocol 2 begins."""
    rewrite_header(folder, lambda header: json.dumps(header).encode().ljust(0x10280))
    data = (folder / "model.safetensors").read_bytes()
    assert data.startswith(b"\x80\x02")
    Transformer.from_pretrained(folder)


def test_a_name_twice_in_a_header(folder):
    def double(header):
        entry = json.dumps(header[NORM])
        return json.dumps(header)[:-1].encode() + f', "{NORM}": {entry}}}'.encode()

    rewrite_header(folder, double)
    refuse(folder, f"in its safetensors header, the key {NORM!r} is there twice")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"shape": "48"}, "entry of model.norm.weight is malformed"),
        ({"shape": [-48]}, "entry of model.norm.weight is malformed"),
        ({"shape": [True]}, "entry of model.norm.weight is malformed"),
        ({"data_offsets": [0]}, "entry of model.norm.weight is malformed"),
        ({"data_offsets": [-8, 1 << 70]}, "entry of model.norm.weight is malformed"),
        ({"dtype": 7}, "entry of model.norm.weight is malformed"),
        ({"shape": [49]}, r"model.norm.weight F32 \[49\] needs 196 bytes, its range has 192"),
        ({"data_offsets": [8, 200]}, "overlaps another tensor or leaves a hole"),
    ],
    ids=str,
)
def test_malformed_entries(folder, changes, message):
    rewrite_header(folder, edit(NORM, **changes))
    refuse(folder, message)


def test_an_entry_that_is_no_object(folder):
    rewrite_header(folder, lambda header: header | {"extra": 5})
    refuse(folder, "entry of extra is malformed")


def test_missing_tensor(folder):
    rewrite(folder, lambda weights: weights.pop(NORM))
    refuse(folder, f"missing tensors: {NORM}$")


def test_missing_tensors_are_named_up_to_ten(folder):
    rewrite(folder, lambda weights: [weights.pop(name) for name in list(weights)[:13]])
    refuse(folder, "missing tensors: ([^ ]+, ){9}[^ ]+ and 3 more$")


def test_extra_tensor(folder):
    rewrite(folder, lambda weights: weights.update({"model.layers.0.self_attn.q_proj.bias": torch.ones(64)}))
    refuse(folder, "tensors that no part of the model takes: model.layers.0.self_attn.q_proj.bias$")


def test_wrong_shape(folder):
    rewrite(folder, lambda weights: weights.update({"model.layers.1.self_attn.k_proj.weight": torch.ones(64, 48)}))
    refuse(
        folder,
        r"model.layers.1.self_attn.k_proj.weight should be \[32, 48\] by config.json "
        r"\(num_key_value_heads, head_dim, hidden_size\), found \[64, 48\]$",
    )


def test_vocabulary_against_embedding_rows(folder):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"vocab_size": 98}))
    refuse(folder, r"embed_tokens.weight should be \[98, 48\] by config.json \(vocab_size, .*found \[97, 48\]$")


@pytest.mark.parametrize("dtype", [torch.int8, torch.int64, torch.uint8, torch.bool, torch.float8_e4m3fn], ids=str)
def test_dtypes_that_are_no_weights(folder, dtype):
    rewrite(folder, lambda weights: weights.update({NORM: weights[NORM].to(dtype)}))
    refuse(folder, f"{NORM} is stored as .*; weights must be one of F64, F32, F16, BF16$")


def test_missing_shard(sharded):
    (sharded / "model-00002-of-00004.safetensors").unlink()
    refuse(sharded, "names shards that are missing: model-00002-of-00004.safetensors$")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "is not JSON: "),
        ("[]", "must hold a JSON object, got list$"),
        ("{}", 'has no object "weight_map"$'),
        ('{"weight_map": 3}', 'has no object "weight_map"$'),
    ],
)
def test_malformed_index(sharded, text, message):
    (sharded / "model.safetensors.index.json").write_text(text)
    refuse(sharded, f"index.json: {message}")


@pytest.mark.parametrize("shard", ["../model.safetensors", "/etc/passwd", "model.bin", 5])
def test_index_that_points_elsewhere(sharded, shard):
    index = json.loads((sharded / "model.safetensors.index.json").read_text())
    index["weight_map"][NORM] = shard
    (sharded / "model.safetensors.index.json").write_text(json.dumps(index))
    refuse(sharded, f"{NORM} is said to lie in {shard!r}, which is no safetensors file's name")


def test_a_tensor_in_two_shards(sharded):
    file = sharded / "model-00001-of-00004.safetensors"
    save_file(load_file(file) | {NORM: torch.ones(48)}, file)
    refuse(sharded, f"{NORM} lies in model-00001-of-00004.safetensors as well")


def test_a_shard_without_what_the_index_says(sharded):
    file = sharded / "model-00004-of-00004.safetensors"
    weights = load_file(file)
    weights.pop(NORM)
    save_file(weights, file)
    refuse(sharded, f"model-00004-of-00004.safetensors: lacks {NORM}, which model.safetensors.index.json says")


def test_a_file_that_shrinks_while_it_is_read(folder, monkeypatch):
    def shrink(*args):
        with (folder / "model.safetensors").open("r+b") as file:
            file.truncate(20_000)

    monkeypatch.setattr("llama.model.checkpoint.load._check", shrink)
    refuse(folder, "ends inside model.*; did the file change while it was read")
