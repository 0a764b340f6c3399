"""What is not read here: each is refused in one line, with what to take instead."""

import json

import pytest

from tests.quantised.folders import copy
from tests.quantised.test_traps import refuse

METHODS = {
    "hqq": {"quant_method": "hqq"},
    "aqlm": {"quant_method": "aqlm"},
    "torchao": {"quant_method": "torchao", "quant_type": {"default": {"_type": "Int4WeightOnlyConfig"}}},
    "eetq": {"quant_method": "eetq"},
    r"quark with weights of \('fp4', 'per_group'\)": {
        "quant_method": "quark",
        "global_quant_config": {"weight": {"dtype": "fp8_e4m3", "qscheme": "per_tensor"}},
        "layer_quant_config": {"*.mlp.*": {"weight": {"dtype": "fp4", "qscheme": "per_group"}}},
    },
    "exl2": {"quant_method": "exl2", "bits": 4.0},
    "None": {"load_in_4bit": True},
    "gptq with checkpoint_format 'marlin'": {"quant_method": "gptq", "bits": 4, "checkpoint_format": "marlin"},
    "gptq with bits 3": {"quant_method": "gptq", "bits": 3, "group_size": 128, "sym": True},
    r"gptq with options per module \(dynamic\)": {"quant_method": "gptq", "bits": 4, "dynamic": {"-:.*": {}}},
    "awq with version 'gemv'": {"quant_method": "awq", "bits": 4, "version": "gemv", "group_size": 128},
    "awq with version 'exllama'": {"quant_method": "awq", "bits": 4, "version": "exllama", "group_size": 128},
    "modelopt with quant_algo 'NVFP4'": {"quant_method": "modelopt", "quant_algo": "NVFP4"},
    "compressed-tensors with format 'nvfp4-pack-quantized'": {
        "quant_method": "compressed-tensors",
        "format": "nvfp4-pack-quantized",
    },
    "compressed-tensors with sparsity": {
        "quant_method": "compressed-tensors",
        "sparsity_config": {"format": "sparse-24-bitmask"},
    },
    "compressed-tensors with transforms": {
        "quant_method": "compressed-tensors",
        "transform_config": {"config_groups": {}},
    },
    "compressed-tensors with weights of 4 bits, type 'float',": {
        "quant_method": "compressed-tensors",
        "config_groups": {"group_0": {"weights": {"num_bits": 4, "type": "float", "strategy": "group"}}},
    },
    "fp8 with fmt 'e5m2'": {"quant_method": "fp8", "fmt": "e5m2"},
}


@pytest.mark.parametrize("name", METHODS)
def test_other_methods_are_refused_by_name_with_what_to_take_instead(name, tmp_path):
    folder = copy("ct_w8a8", tmp_path / "copy")
    document = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(document | {"quantization_config": METHODS[name]}))
    refuse(folder, f"config.json: .*{name}.* is not supported; take a folder of the same model in FP8 or W4A16")


@pytest.mark.parametrize("mode", ["mxfp4", "nvfp4"])
def test_other_modes_of_mlx(mode, tmp_path):
    folder = copy("mlx_4bit", tmp_path / "copy", config=lambda config: config.update(mode=mode))
    refuse(folder, f"mlx with mode '{mode}' is not supported")


def test_modelopt_without_a_word_in_config_json(tmp_path):
    folder = copy("modelopt_alone", tmp_path / "copy")
    document = {"quantization": {"quant_algo": "NVFP4"}}
    (folder / "hf_quant_config.json").write_text(json.dumps(document))
    refuse(folder, "hf_quant_config.json: modelopt with quant_algo 'NVFP4' is not supported")


@pytest.mark.parametrize(
    ("file", "told", "words"),
    [
        ("quantize_config.json", {"bits": 3, "group_size": 128, "sym": True, "desc_act": False}, "gptq with bits 3"),
        ("quant_config.json", {"zero_point": True, "w_bit": 4, "q_group_size": 128, "version": "GEMV"}, "'GEMV'"),
    ],
)
def test_a_file_of_its_own_is_named_where_what_it_says_is_not_read(file, told, words, tmp_path):
    folder = copy("ct_w8a8", tmp_path / "copy")
    document = json.loads((folder / "config.json").read_text())
    del document["quantization_config"]
    (folder / "config.json").write_text(json.dumps(document))
    (folder / file).write_text(json.dumps(told))
    refuse(folder, f"{file}: .*{words}.* is not supported; take a folder of the same model in FP8 or W4A16")
    (folder / file).write_text(json.dumps({"recipe": "some other program's"}))
    refuse(folder, "its tensors are those of compressed-tensors, config.json names no quantisation")


@pytest.mark.parametrize(
    "broken",
    [
        [],
        {"quant_method": "gptq", "bits": "4"},
        {"quant_method": "gptq", "bits": 4, "group_size": None, "sym": True},
        {"quant_method": "gptq", "bits": 4, "group_size": 128, "sym": "yes"},
        {"quant_method": "awq"},
        {"quant_method": "compressed-tensors", "config_groups": 3},
        {"quant_method": "compressed-tensors", "config_groups": {"group_0": 3}},
        {"quant_method": "compressed-tensors", "config_groups": {"group_0": {"weights": 3}}},
        {"quant_method": ["gptq"]},
        {"quant_method": "fp8", "weight_block_size": [128]},
    ],
)
def test_a_malformed_quantization_config(broken, tmp_path):
    folder = copy("ct_w8a8", tmp_path / "copy")
    document = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(document | {"quantization_config": broken}))
    refuse(folder, "config.json: ")
