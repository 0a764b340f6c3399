"""Checkpoints: what is loaded equals what was saved, casts, shards, atomic saving, and memory."""

import json
import os
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file, save_model
from transformers import AutoModelForCausalLM

from llama import LLM
from llama.api.errors import CheckpointError
from llama.model.checkpoint import save_pretrained
from llama.model.transformer import Transformer
from tests.model.models import hugging_face_weights, tiny_config, tiny_model


def assert_same_weights(one, other):
    ours, theirs = hugging_face_weights(one), hugging_face_weights(other)
    assert ours.keys() == theirs.keys()
    for name in ours:
        assert torch.equal(ours[name], theirs[name]), name


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_round_trip(dtype, tied, tmp_path):
    model = tiny_model(dtype=dtype, tie_word_embeddings=tied)
    model.save_pretrained(tmp_path / "new")
    again = Transformer.from_pretrained(tmp_path / "new")
    assert again.dtype == dtype
    assert (again.lm_head.weight is again.embed_tokens.weight) == tied
    assert_same_weights(again, model)


def test_transformers_loads_what_we_save(tmp_path):
    model = tiny_model(dtype=torch.float32)
    save_pretrained(model, model.config, tmp_path / "new", max_shard_bytes=30_000)
    assert len(list((tmp_path / "new").glob("*.safetensors"))) > 3
    ids = torch.arange(20)[None]
    with torch.no_grad():
        theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "new")(ids).logits
    assert (model.logits(ids) - theirs).abs().max() < 1e-4
    assert_same_weights(Transformer.from_pretrained(tmp_path / "new"), model)


def test_saved_files_are_plain_safetensors(tmp_path):
    model = tiny_model(dtype=torch.bfloat16)
    model.save_pretrained(tmp_path / "new")
    loaded = load_file(tmp_path / "new" / "model.safetensors")
    expected = hugging_face_weights(model)
    assert loaded.keys() == expected.keys()
    assert all(torch.equal(loaded[name], expected[name]) for name in loaded)


@pytest.mark.parametrize("target", ["float64", "float32", "float16", "bfloat16"])
@pytest.mark.parametrize("source", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_casts(source, target, tmp_path):
    model = tiny_model(dtype=source)
    model.save_pretrained(tmp_path / "new")
    loaded = Transformer.from_pretrained(tmp_path / "new", dtype=target)
    wanted = getattr(torch, target)
    for name, tensor in hugging_face_weights(loaded).items():
        assert torch.equal(tensor, hugging_face_weights(model)[name].to(wanted)), name
    assert_same_weights(Transformer.from_pretrained(tmp_path / "new", dtype=wanted), loaded)


def test_casts_in_several_pieces(tmp_path, monkeypatch):
    monkeypatch.setattr("llama.model.checkpoint.shards._STAGE_BYTES", 1000)
    test_casts(torch.bfloat16, "float32", tmp_path)


def test_dtype_without_a_word_in_the_config(tmp_path):
    tiny_model(dtype=torch.float16).save_pretrained(tmp_path / "new")
    config = json.loads((tmp_path / "new/config.json").read_text())
    del config["torch_dtype"]
    (tmp_path / "new/config.json").write_text(json.dumps(config))
    assert Transformer.from_pretrained(tmp_path / "new").dtype == torch.float16
    with pytest.raises(ValueError, match=r"dtype must be one of auto, float64.*, got 'int8'"):
        Transformer.from_pretrained(tmp_path / "new", dtype=torch.int8)


def test_a_tied_head_may_be_stored_twice(tmp_path, caplog):
    model = tiny_model(dtype=torch.float32, tie_word_embeddings=True)
    model.save_pretrained(tmp_path / "new")
    file = tmp_path / "new/model.safetensors"
    weights = load_file(file)
    weights["lm_head.weight"] = weights["model.embed_tokens.weight"].clone()
    weights["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(8)
    save_file(weights, file)
    assert_same_weights(Transformer.from_pretrained(tmp_path / "new"), model)
    assert not caplog.messages
    for other in (weights["lm_head.weight"] + 1, torch.ones(2, 3)):
        caplog.clear()
        save_file(weights | {"lm_head.weight": other}, file)
        assert_same_weights(Transformer.from_pretrained(tmp_path / "new"), model)
        (warning,) = caplog.messages
        assert "model.safetensors: lm_head.weight differs from the embedding, which is used" in warning


def test_of_a_tied_pair_the_head_alone_may_be_stored(tmp_path):
    """safetensors.torch.save_model keeps the first name of a shared tensor."""
    model = tiny_model(dtype=torch.float32, tie_word_embeddings=True)
    model.save_pretrained(tmp_path / "new")
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "new")
    save_model(theirs, str(tmp_path / "new/model.safetensors"), metadata={"format": "pt"})
    names = load_file(tmp_path / "new/model.safetensors").keys()
    assert "lm_head.weight" in names and "model.embed_tokens.weight" not in names
    assert_same_weights(Transformer.from_pretrained(tmp_path / "new"), model)


def test_saving_is_all_or_nothing(tmp_path, monkeypatch):
    model = tiny_model()
    monkeypatch.setattr("llama.model.checkpoint.save.json.dumps", lambda *args, **kwargs: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        model.save_pretrained(tmp_path / "new")
    assert list(tmp_path.iterdir()) == []


def test_saving_does_not_overwrite(tmp_path):
    model = tiny_model()
    (tmp_path / "full").mkdir()
    (tmp_path / "full/notes.txt").write_text("mine")
    with pytest.raises(FileExistsError, match="exists already"):
        model.save_pretrained(tmp_path / "full")
    (tmp_path / "empty").mkdir()
    model.save_pretrained(tmp_path / "empty")
    assert_same_weights(Transformer.from_pretrained(tmp_path / "empty"), model)


def test_no_progress_bar_without_a_terminal(tmp_path, capfd):
    tiny_model().save_pretrained(tmp_path / "new")
    Transformer.from_pretrained(tmp_path / "new")
    assert capfd.readouterr() == ("", "")


def test_check_weights(tmp_path):
    model = tiny_model()
    model.layers[1].mlp.gate_up_proj.weight[100, 3] = float("nan")
    model.save_pretrained(tmp_path / "new")
    Transformer.from_pretrained(tmp_path / "new")
    with pytest.raises(CheckpointError, match=r"model.layers.1.mlp.up_proj.weight holds NaN"):
        Transformer.from_pretrained(tmp_path / "new", check_weights=True)
    with pytest.raises(CheckpointError):
        LLM(tmp_path / "new", check_weights=True)


MEASURE = """
import sys, torch
def status(key):
    for line in open("/proc/self/status"):
        if line.startswith(key):
            return int(line.split()[1]) * 1024
torch.zeros(1)
before = status("VmRSS")
from llama.model.transformer import Transformer
model = Transformer.from_pretrained(sys.argv[1])
size = sum(p.numel() * p.itemsize for p in model.parameters())
print(size, status("VmHWM") - before)
"""


@pytest.mark.slow
@pytest.mark.skipif(not os.path.exists("/proc/self/status"), reason="reads the kernel's account of peak memory")
def test_peak_memory_of_loading_two_gigabytes(tmp_path):
    sizes = {"hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16, "vocab_size": 40_000}
    config = tiny_config(num_attention_heads=16, num_key_value_heads=4, head_dim=128, **sizes)
    Transformer(config, dtype=torch.bfloat16).save_pretrained(tmp_path / "big")
    run = subprocess.run(
        [sys.executable, "-c", MEASURE, tmp_path / "big"], capture_output=True, text=True, check=True, timeout=300
    )
    size, peak = map(int, run.stdout.split())
    assert size > 2_000_000_000
    assert peak <= 1.2 * size
