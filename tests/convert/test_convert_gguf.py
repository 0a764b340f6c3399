"""GGUF -> Hugging Face folder: every quantisation, the demo model against transformers' own loader, and refusals."""

import json
import os
import subprocess
import sys
import unicodedata
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from convert_gguf import main
from gguf import GGMLQuantizationType as Type
from safetensors.torch import load_file
from tokenizers import Tokenizer, pre_tokenizers
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM

from llama import LLM
from llama.cli import main as command
from llama.convert.gguf import convert
from tests.convert.corpus import random_characters, texts
from tests.convert.gguf_files import CONFIG, K_SCALES, SPECIAL, write_gguf

GOLDEN = json.loads((Path(__file__).parents[1] / "golden" / "gguf_demo.json").read_text(encoding="utf-8"))


# The demo model


@pytest.fixture(scope="module")
def demo_float32(demo_gguf_path, tmp_path_factory):
    output = tmp_path_factory.mktemp("demo") / "float32"
    main(["--input", str(demo_gguf_path), "--output", str(output), "--dtype", "float32"])
    return output


def test_demo_logits_equal_transformers_loader(demo_float32):
    model = AutoModelForCausalLM.from_pretrained(demo_float32)
    assert model.dtype == torch.float32
    for token_ids, expected in zip(GOLDEN["token_ids"], GOLDEN["logits"], strict=False):
        with torch.inference_mode():
            logits = model(torch.tensor([token_ids])).logits[0, :, GOLDEN["logit_ids"]]
        assert (logits - torch.tensor(expected)).abs().max() <= 1e-3  # float32


def test_demo_tokens_equal_transformers_loader(demo_model_path):
    tokenizer = AutoTokenizer.from_pretrained(demo_model_path)
    for text, expected in zip(GOLDEN["texts"], GOLDEN["token_ids"], strict=True):
        assert tokenizer(text).input_ids == expected, repr(text)
        assert tokenizer.decode(expected) == text


def test_demo_folder_is_whole(demo_model_path):
    tokenizer = AutoTokenizer.from_pretrained(demo_model_path)
    assert (tokenizer.bos_token, tokenizer.eos_token) == ("<|im_start|>", "<|im_end|>")
    rendered = tokenizer.apply_chat_template([{"role": "user", "content": "Hi"}], tokenize=False)
    assert rendered.endswith("<|im_start|>user\nHi<|im_end|>\n")
    config = json.loads((demo_model_path / "config.json").read_text())
    assert (config["rms_norm_eps"], config["rope_theta"], config["torch_dtype"]) == (1e-5, 1e5, "bfloat16")
    assert json.loads((demo_model_path / "generation_config.json").read_text())["eos_token_id"] == 2


def test_a_digit_is_a_word_of_its_own_in_smollm(demo_model_path):
    """So the whitespace before it keeps together, as in the model's training (pre-tokenizer "smollm" of llama.cpp)."""
    tokenizer = Tokenizer.from_file(str(demo_model_path / "tokenizer.json"))
    assert tokenizer.encode("a  12").tokens == ["a", "ĠĠ", "1", "2"]
    assert tokenizer.encode("x\n\n2.").tokens == ["x", "ĊĊ", "2", "."]
    assert tokenizer.encode("a ½").tokens == ["a", "Ġ", "Â½"]


@pytest.mark.slow
def test_demo_corpus_equals_transformers_loader(demo_gguf_path, demo_model_path):
    """Equal where no number stands; everywhere, once transformers' loader is told that each digit stands alone."""
    reference = AutoTokenizer.from_pretrained(demo_gguf_path.parent, gguf_file=demo_gguf_path.name).backend_tokenizer
    plain = reference.pre_tokenizer
    with_digits = pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), plain])
    ours = Tokenizer.from_file(str(demo_model_path / "tokenizer.json"))
    for text in [*texts(200_000), random_characters(4_000)]:
        has_number = any(unicodedata.category(character).startswith("N") for character in text)
        reference.pre_tokenizer = with_digits if has_number else plain
        ids = ours.encode(text).ids
        assert ids == reference.encode(text).ids, repr(text)
        assert ours.decode(ids, skip_special_tokens=False) == reference.decode(ids, skip_special_tokens=False)


@pytest.mark.slow
def test_demo_weights_equal_transformers_loader(demo_gguf_path, demo_float32):
    reference = AutoModelForCausalLM.from_pretrained(
        demo_gguf_path.parent, gguf_file=demo_gguf_path.name, dtype=torch.float32
    )
    ours = AutoModelForCausalLM.from_pretrained(demo_float32)
    for (name, weight), (other_name, expected) in zip(
        ours.named_parameters(), reference.named_parameters(), strict=True
    ):
        assert name == other_name
        assert torch.equal(weight, expected), name


# Synthetic files

KINDS = [Type.F32, Type.F16, Type.BF16, Type.Q8_0, Type.Q4_0, Type.Q4_1, Type.Q5_0, Type.Q5_1, *K_SCALES]


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.name)
def test_every_quantisation(tmp_path, kind):
    expected = write_gguf(tmp_path / "model.gguf", kind)
    convert(tmp_path / "model.gguf", tmp_path / "hf", dtype="float32")
    found = load_file(tmp_path / "hf" / "model.safetensors")
    assert found.keys() == expected.keys()
    for name, weight in found.items():
        assert torch.equal(weight, expected[name]), name


def test_logits_and_rope_scaling(tmp_path):
    state = write_gguf(tmp_path / "model.gguf", Type.F32)
    convert(tmp_path / "model.gguf", tmp_path / "hf", dtype="float32")
    reference = LlamaForCausalLM(CONFIG)
    reference.load_state_dict(state)
    model = LlamaForCausalLM.from_pretrained(tmp_path / "hf")
    assert model.config.rope_parameters == reference.config.rope_parameters
    token_ids = torch.arange(40)[None]
    assert torch.equal(model(token_ids).logits, reference(token_ids).logits)


def test_tokenizer_of_a_llama_file(tmp_path):
    write_gguf(tmp_path / "model.gguf", Type.F16)
    convert(tmp_path / "model.gguf", tmp_path / "hf")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "hf")
    encoded = tokenizer("hello hello 1234<tool><|eot_id|>")
    tokens = ["<|begin_of_text|>", "hello", "Ġhello", "Ġ", "1", "2", "3", "4", "<tool>", "<|eot_id|>"]
    assert tokenizer.convert_ids_to_tokens(encoded.input_ids) == tokens
    assert tokenizer.decode(encoded.input_ids, skip_special_tokens=True) == "hello hello 1234<tool>"
    assert tokenizer.chat_template == "{{ messages[0].content }}"
    generation = json.loads((tmp_path / "hf" / "generation_config.json").read_text())
    assert sorted(tokenizer.convert_ids_to_tokens(generation["eos_token_id"])) == sorted(SPECIAL[1:])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"architecture": "qwen2"}, "architecture 'qwen2'"),
        ({"pre": "tekken"}, "pre-tokenizer 'tekken'"),
        ({"fields": {"llama.expert_count": 8}}, "mixture of 8 experts"),
        ({"fields": {"llama.rope.scaling.type": "yarn"}}, "RoPE scaling 'yarn'"),
        ({"fields": {"llama.attention.value_length": 64}}, "value_length is 64"),
        ({"fields": {"llama.rope.scaling.factor": 4.0}}, "llama.rope.scaling.factor is 4.0"),
        ({"fields": {"llama.rope.scale_linear": 4.0}}, "llama.rope.scale_linear is 4.0"),
        ({"fields": {"llama.attn_logit_softcapping": 50.0}}, "llama.attn_logit_softcapping is 50.0"),
        ({"fields": {"llama.attention.head_count": 0}}, "llama.attention.head_count must be a positive integer"),
        ({"fields": {"tokenizer.ggml.add_eos_token": True}}, "tokenizer.ggml.add_eos_token is set"),
        (
            {"fields": {"tokenizer.ggml.padding_token_id": 999}},
            r"padding_token_id must be an integer in \[0, 271\], got 999",
        ),
        ({"fields": {"tokenizer.ggml.bos_token_id": "<s>"}}, "bos_token_id must be an integer"),
        ({"fields": {"tokenizer.ggml.tokens": 5}}, "tokenizer.ggml.tokens must be a list of texts, got int"),
        ({"fields": {"tokenizer.ggml.merges": 5}}, "tokenizer.ggml.merges must be a list of texts, got int"),
        ({"fields": {"tokenizer.ggml.token_type": 5}}, "token_type must be a list of 272 types"),
        ({"fields": {"tokenizer.chat_template": 5}}, "tokenizer.chat_template must be a text, got 5"),
        ({"fields": {"split.count": 3}}, "model.gguf is one of 3 parts; join them"),
        ({"endianess": gguf.GGUFEndian.BIG}, "model.gguf is of the other byte order"),
        ({"extra": {"blk.0.attn_q.bias": np.zeros(256, np.float32)}}, "blk.0.attn_q.bias"),
    ],
)
def test_what_is_not_llama_is_refused_and_leaves_nothing(tmp_path, change, message):
    write_gguf(tmp_path / "model.gguf", Type.F16, **change)
    with pytest.raises(SystemExit, match=message):
        main(["--input", str(tmp_path / "model.gguf"), "--output", str(tmp_path / "hf")])
    assert [path.name for path in tmp_path.iterdir()] == ["model.gguf"]


def test_the_command_converts_and_tells_the_defaults(tmp_path, capsys):
    write_gguf(tmp_path / "model.gguf", Type.F16)
    write_gguf(tmp_path / "other.gguf", Type.F16, pre="smollm")
    recommended = {"general.sampling.temp": 0.3, "general.sampling.top_k": 40, "general.sampling.min_p": 0.05}
    write_gguf(tmp_path / "tuned.gguf", Type.F16, fields=recommended)
    told = {"model": "temperature 0.6, top_p 0.9", "other": "", "tuned": "temperature 0.3, top_k 40, min_p 0.05"}
    for name, values in told.items():
        defaults = f"a request that names no sampling gets {values}: see generation_config.json\n" if values else ""
        assert command(["convert", f"{tmp_path}/{name}.gguf", f"{tmp_path}/{name}", "--dtype", "float32"]) == 0
        assert capsys.readouterr().out == f"wrote {tmp_path}/{name}\n{defaults}"
        assert json.loads((tmp_path / name / "config.json").read_text())["torch_dtype"] == "float32"
    assert command(["convert", f"{tmp_path}/model.gguf", f"{tmp_path}/again", "--rope-factor", "8"]) == 2
    assert "--rope-factor and --tokenizer-only are for Meta's release" in capsys.readouterr().err
    assert command(["convert", f"{tmp_path}/none.gguf", f"{tmp_path}/again"]) == 1
    said = capsys.readouterr().err
    assert said.startswith("llama: ") and said.count("\n") == 1 and "none.gguf" in said


def test_recommended_values_that_no_request_may_have_are_left_out_and_told(tmp_path, caplog):
    recommended = {"general.sampling.temp": 7.0, "general.sampling.min_p": 1.5, "general.sampling.top_p": 0.5}
    write_gguf(tmp_path / "model.gguf", Type.F16, fields=recommended)
    convert(tmp_path / "model.gguf", tmp_path / "hf", dtype="float32")
    assert [record.getMessage() for record in caplog.records] == [
        "the recommended temperature 7.0 is left out: temperature must be a number from 0 to 5, got 7.0",
        "the recommended min_p 1.5 is left out: min_p must be a number from 0 to 1, got 1.5",
    ]
    assert LLM(tmp_path / "hf", num_blocks=4).get_default_sampling_params().top_p == 0.5
    written = json.loads((tmp_path / "hf" / "generation_config.json").read_text())
    assert "temperature" not in written and "min_p" not in written


def test_without_gguf_one_line_says_what_to_install():
    script = (
        "import sys; sys.modules['gguf'] = None; from llama.cli import main; main(['convert', sys.executable, 'out'])"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert done.stderr == "llama: GGUF files need gguf: pip install 'llama-engine[tools]'\n"


def test_a_pipe_is_refused(tmp_path):
    os.mkfifo(tmp_path / "model.gguf")
    with pytest.raises(OSError, match="not a regular file"):
        convert(tmp_path / "model.gguf", tmp_path / "hf")


def test_another_file_is_refused(tmp_path):
    (tmp_path / "model.gguf").write_bytes(b"<!DOCTYPE html>")
    with pytest.raises(SystemExit, match="not a GGUF file"):
        main(["--input", str(tmp_path / "model.gguf"), "--output", str(tmp_path / "hf")])


@pytest.mark.parametrize(("merge", "pair"), [("zz q", "'zz' and 'q'"), ("he", "'he' and ''")])
def test_merges_of_no_tokens_are_named(tmp_path, monkeypatch, merge, pair):
    monkeypatch.setattr("tests.convert.gguf_files.MERGES", ["h e", merge])
    write_gguf(tmp_path / "model.gguf", Type.F16)
    with pytest.raises(SystemExit, match=f"{pair} are not tokens that make a third"):
        main(["--input", str(tmp_path / "model.gguf"), "--output", str(tmp_path / "hf")])


@pytest.mark.parametrize("size", [4, 12, 500, 3000, 100_000])
def test_a_truncated_file_is_refused(tmp_path, size):
    write_gguf(tmp_path / "whole.gguf", Type.Q4_0)
    (tmp_path / "model.gguf").write_bytes((tmp_path / "whole.gguf").read_bytes()[:size])
    with pytest.raises(SystemExit, match="truncated or damaged"):
        main(["--input", str(tmp_path / "model.gguf"), "--output", str(tmp_path / "hf")])
    assert not (tmp_path / "hf").exists()


def test_more_tokens_than_embeddings_are_refused(tmp_path):
    write_gguf(tmp_path / "model.gguf", Type.F16, num_tokens=CONFIG.vocab_size + 1)
    with pytest.raises(SystemExit, match="273 tokens, but embeddings for 272"):
        main(["--input", str(tmp_path / "model.gguf"), "--output", str(tmp_path / "hf")])
