"""Folders that other packages wrote: our weights and logits are theirs."""

import hashlib
import json

import pytest
import torch
from safetensors.torch import load_file

from llama.model.transformer import Transformer
from tests.quantised.folders import FOLDERS, GOLDEN, Q, copy, weights

# w = code * SCB / 127: bitsandbytes multiplies by SCB, then by a rounded 1 / 127.
NOT_EXACT = "bnb_int8"


def reference(name):
    return load_file(GOLDEN / name / "reference.safetensors")


@pytest.mark.parametrize("name", [name for name in FOLDERS if name != NOT_EXACT])
def test_dense_weights_are_the_writers_own_bit_for_bit(name):
    ours = weights(GOLDEN / name)
    digests = {key[7:]: bytes(value.tolist()) for key, value in reference(name).items() if key.startswith("sha256.")}
    if json.loads((GOLDEN / name / "config.json").read_text())["tie_word_embeddings"]:
        del digests["lm_head.weight"]
    assert len(digests) >= 6
    found = {key: hashlib.sha256((ours[key] + 0.0).contiguous().numpy()).digest() for key in digests}
    assert found == digests


def test_int8_of_bitsandbytes():
    stored = load_file(GOLDEN / NOT_EXACT / "model.safetensors")
    ours = weights(GOLDEN / NOT_EXACT)[f"{Q}.weight"].double()
    exact = stored[f"{Q}.weight"].double() * stored[f"{Q}.SCB"].double()[:, None] / 127
    assert (ours - exact).abs().max() <= 2**-23 * exact.abs().max()


@pytest.mark.parametrize("name", FOLDERS)
def test_logits_are_those_of_transformers(name):
    model = Transformer.from_pretrained(GOLDEN / name, dtype="float32")
    expected = reference(name)
    logits = model.logits(expected["input_ids"])
    assert expected["logits"].abs().max() > 4
    assert (logits - expected["logits"]).abs().max() <= 1e-4


def alone(name, target, file, **changes):
    """A copy whose config.json says nothing: `file` does, with these changes (None = the key is not there)."""
    folder = copy(name, target)
    (folder / "quantize_config.json").unlink(missing_ok=True)
    document = json.loads((folder / "config.json").read_text())
    told = document.pop("quantization_config") | changes
    (folder / "config.json").write_text(json.dumps(document))
    (folder / file).write_text(json.dumps({key: value for key, value in told.items() if value is not None}))
    return folder


# As AutoGPTQ up to 0.7 and the first AutoAWQ left it.
OLD_GPTQ = dict.fromkeys(("quant_method", "method", "checkpoint_format", "format", "pack_dtype", "meta"))
OLD_AWQ = {"quant_method": None, "bits": None, "group_size": None, "w_bit": 4, "q_group_size": 128, "version": "GEMM"}


@pytest.mark.parametrize(
    ("name", "file", "changes"),
    [
        ("gptq", "quantize_config.json", {}),
        ("gptq", "quantize_config.json", OLD_GPTQ),
        ("gptq_desc_act", "quantize_config.json", OLD_GPTQ),
        ("gptq_8bit", "quantize_config.json", OLD_GPTQ),
        ("gptq_v2", "quantize_config.json", {}),
        ("awq", "quant_config.json", OLD_AWQ),
        ("awq", "quantize_config.json", OLD_AWQ),
    ],
)
def test_older_folders_say_it_in_a_file_of_its_own(name, file, changes, tmp_path):
    ours, expected = weights(alone(name, tmp_path / "copy", file, **changes)), weights(GOLDEN / name)
    assert ours.keys() == expected.keys() and all(torch.equal(ours[key], expected[key]) for key in ours)


@pytest.mark.parametrize("name", ["modelopt", "fbgemm_fp8"])  # a scale for all of a weight, one for each row
def test_quark_has_the_tensors_of_fp8_and_names_of_its_own(name, tmp_path):
    def rename(tensors):
        for key in [key for key in tensors if key.endswith(("k_proj.k_scale", "v_proj.v_scale"))]:
            tensors[key.rpartition(".")[0] + ".output_scale"] = tensors.pop(key)
        for key in [key for key in tensors if key.endswith("weight_scale")]:
            tensors[key] = tensors[key].flatten()

    folder = copy(name, tmp_path / "copy", rename)
    document = json.loads((folder / "config.json").read_text())
    weight = {"dtype": "fp8_e4m3", "qscheme": "per_tensor" if name == "modelopt" else "per_channel", "ch_axis": 0}
    document["quantization_config"] = {
        "quant_method": "quark",
        "global_quant_config": {"weight": weight, "input_tensors": {"dtype": "fp8_e4m3"}, "output_tensors": None},
        "layer_quant_config": {"*k_proj": {"weight": weight, "output_tensors": {"dtype": "fp8_e4m3"}}},
        "export": {"kv_cache_group": ["*k_proj", "*v_proj"], "weight_format": "real_quantized"},
        "exclude": ["lm_head"],
    }
    (folder / "config.json").write_text(json.dumps(document))
    ours, theirs = (Transformer.from_pretrained(path, dtype="float32") for path in (folder, GOLDEN / name))
    ids = torch.arange(9)[None]
    assert torch.equal(ours.logits(ids), theirs.logits(ids))
    assert (ours.kv_scales is None) == (theirs.kv_scales is None) == (name != "modelopt")
    assert ours.kv_scales is None or torch.equal(ours.kv_scales, theirs.kv_scales)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("name", ["ct_w4a16_asym", "ct_fp8_block", "bnb_nf4_double", "mlx_4bit"])
def test_other_dtypes_are_rounded_once(name, dtype):
    wide, narrow = weights(GOLDEN / name), weights(GOLDEN / name, dtype)
    assert all(torch.equal(wide[key].to(narrow[key].dtype), narrow[key]) for key in wide)


def test_auto_is_the_dtype_of_the_norms_where_config_json_names_none(tmp_path):
    folder = copy("mlx_4bit_tied", tmp_path / "copy")
    document = json.loads((folder / "config.json").read_text())
    del document["dtype"]
    (folder / "config.json").write_text(json.dumps(document))
    assert Transformer.from_pretrained(folder).dtype == torch.float16
