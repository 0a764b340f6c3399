"""`llama info` of quantised folders: what they are, and what they take."""

import json
from pathlib import Path

import pytest
import torch

from llama.cli import info
from llama.model.config import ModelConfig
from llama.model.transformer import Transformer
from tests.cli.helpers import one_line, run
from tests.quantised.folders import FOLDERS, GOLDEN

ACT_ORDER = {"ct_actorder", "gptq_8bit_asym", "gptq_desc_act"}  # they keep an order of the columns as well
FP8_ROWS = {"num_bits": 8, "type": "float", "strategy": "channel", "symmetric": True}


@pytest.fixture
def fp8_70b(tmp_path) -> str:
    """config.json alone."""
    config = ModelConfig.preset("llama-3.1-70b").to_hugging_face("bfloat16")
    groups = {"group_0": {"targets": ["Linear"], "weights": FP8_ROWS}}
    method = {"quant_method": "compressed-tensors", "config_groups": groups, "ignore": ["lm_head"]}
    (tmp_path / "fp8").mkdir()
    (tmp_path / "fp8" / "config.json").write_text(json.dumps(config | {"quantization_config": method}))
    return str(tmp_path / "fp8")


def change(folder: str, **changes) -> None:
    """Of its quantization_config."""
    path = Path(folder) / "config.json"
    config = json.loads(path.read_text())
    config["quantization_config"] |= changes
    path.write_text(json.dumps(config))


@pytest.mark.parametrize("name", sorted({*FOLDERS} - ACT_ORDER))
def test_a_quantised_folder_takes_what_it_says(capsys, name):
    model = Transformer.from_pretrained(GOLDEN / name)
    coded = [module.coded for module in model.modules() if getattr(module, "coded", None) is not None]
    size = sum(form.nbytes for form in coded) + sum(weight.nbytes for weight in model.parameters())
    code, out, _ = run(capsys, "info", str(GOLDEN / name), "--memory", "1GiB")
    method = json.loads((GOLDEN / name / "config.json").read_text()).get("quantization_config", {}).get("quant_method")
    assert code == 0 and f"stored   {size:>20,} bytes" in out
    assert "stored quantised (" in out and (method or "") in out
    assert ("become dense" in out) == (not coded)


def test_bitsandbytes_names_its_width_by_either_word(capsys, fp8_70b):
    for words in ({"load_in_4bit": True}, {"_load_in_4bit": True}, {"_load_in_4bit": False, "_load_in_8bit": True}):
        change(fp8_70b, **{"quant_method": "bitsandbytes", "load_in_4bit": None, **words})
        told = "int8 codes" if "_load_in_8bit" in words else "4 bits that become dense"
        assert f"stored quantised (bitsandbytes, {told})" in run(capsys, "info", fp8_70b)[1]


def test_a_quantised_70b_fits(capsys, fp8_70b):
    _, out, _ = run(capsys, "info", fp8_70b, "--memory", "80GiB")
    assert "stored quantised (compressed-tensors, fp8 codes), the rest in bfloat16" in out
    assert "14,144 of 131,072 tokens of context, fp8 weights (compressed-tensors) of 67.7 GiB in 80.0 GiB" in out
    assert "fits 80GiB" in run(capsys, "info", f"{fp8_70b}/config.json", "--memory", "80GiB")[1]


def test_modules_that_were_left_dense_are_counted_so(capsys, fp8_70b):
    change(fp8_70b, ignore=["lm_head", "model.layers.0.self_attn.q_proj", "layers.1.mlp"])
    dense = 8192 * 8192 + 3 * 8192 * 28_672
    size = 72_669_806_592 + dense - 2 * (8192 + 2 * 28_672 + 8192)  # a byte more for each weight, and no scales
    assert f"stored   {size:>20,} bytes" in run(capsys, "info", fp8_70b)[1]


@pytest.mark.parametrize(
    ("listed", "attention", "mlp"),
    [
        ({"ignore": ["lm_head", r"re:.*\.self_attn\.[qkvo]_proj"]}, 80, 0),
        ({"ignore": ["re:model.layers.[01].mlp", "*.79.self_attn*"]}, 1, 2),
        ({"config_groups": {"g": {"targets": ["re:.*mlp.*"], "weights": FP8_ROWS}}}, 80, 0),
        ({"config_groups": {"g": {"targets": [r"re:.*(self_attn|\d\d\.mlp).*"], "weights": FP8_ROWS}}}, 0, 10),
    ],
)
def test_patterns_of_modules_are_counted_too(capsys, fp8_70b, listed, attention, mlp):
    change(fp8_70b, **listed)
    rows = 2 * 8192 + 2 * 1024, 2 * 28_672 + 8192  # each with a scale of two bytes
    dense = attention * (rows[0] * 8192 - 2 * rows[0]) + mlp * (3 * 8192 * 28_672 - 2 * rows[1])
    assert f"stored   {72_669_806_592 + dense:>20,} bytes" in run(capsys, "info", fp8_70b)[1]


def test_a_pattern_that_is_none_is_told(capsys, fp8_70b):
    change(fp8_70b, ignore=["re:("])
    code, out, err = run(capsys, "info", fp8_70b)
    assert (code, out) == (1, "") and one_line(err) and "'(' is no regular expression" in err


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["fp8"], "fp8 weights (compressed-tensors) of 131.4 GiB"),
        (["dense", "--quantization", "int8"], "int8 weights of 131.4 GiB"),
        (["dense", "--quantization", "int4"], "int4 weights of 69.7 GiB"),
        (["dense", "--quantization", "int4", "--dtype", "float16"], "int4 weights of 36.8 GiB"),
    ],
)
def test_a_cpu_holds_the_codes_of_a_16_bit_model_in_two_forms(capsys, fp8_70b, tmp_path, monkeypatch, words, told):
    monkeypatch.setattr(info, "free_cpu_bytes", lambda: 2**40)
    config = ModelConfig.preset("llama-3.1-70b").to_hugging_face("bfloat16")
    (tmp_path / "dense").mkdir()
    (tmp_path / "dense" / "config.json").write_text(json.dumps(config))
    monkeypatch.chdir(tmp_path)
    assert told in run(capsys, "info", *words)[1]


@pytest.mark.parametrize("scheme", ["int8", "fp8", "int4"])
def test_that_is_what_the_default_layout_holds(scheme):
    from llama.model.packing import quantised_forms, sample_of

    for dtype, name in ((torch.bfloat16, "bfloat16"), (torch.float16, "float16"), (torch.float32, "float32")):
        sizes = quantised_forms(sample_of((4096, 4096), dtype, scheme), 4096)[1]
        held = info._copies(name, scheme) * sizes["compact"]
        assert sizes["balanced"] <= held * 1.03


def test_what_llm_refuses_is_refused(capsys, fp8_70b):
    code, out, err = run(capsys, "info", fp8_70b, "--quantization", "int4")
    told = "--quantization must be None or 'compressed-tensors' for a folder that is quantised already, got 'int4'"
    assert (code, out) == (2, "") and one_line(err) and told in err
    change(fp8_70b, quant_method="exl2")
    code, out, err = run(capsys, "info", fp8_70b)
    assert (code, out) == (1, "") and one_line(err) and "the quantisation method 'exl2' is not supported" in err


def test_a_draft_model_may_be_quantised(capsys, llama_70b, fp8_70b):
    """Of its 1,235,814,400 parameters 973,078,528 take a byte, and 376,832 rows a scale of 2: 1,499,303,936 bytes.
    (160 GiB * 0.9 - 141,107,412,992 - those) / (327,680 + 32,768) in whole blocks of 16."""
    path = Path(fp8_70b) / "config.json"
    config = json.loads(path.read_text()) | ModelConfig.preset("llama-3.2-1b").to_hugging_face("bfloat16")
    path.write_text(json.dumps(config))
    _, out, _ = run(capsys, "info", llama_70b, "--memory", "160GiB", "--draft-model", fp8_70b)
    assert "33,312 of 131,072 tokens of context" in out
