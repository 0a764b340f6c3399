"""Write fp8 folders whose writers need a GPU, from their published code and documentation; torch and transformers.

AutoFP8 (vLLM PR 4332), DeepSeek's blocks (by transformers' Fp8Quantize), fbgemm_fp8 (Meta's 405B; transformers'
integrations/fbgemm_fp8.py) and NVIDIA ModelOpt (unified_hf). They differ in names, in scales and in what they leave
dense. Fp8Dequantize of transformers gives the dense weights of all.
"""

import json
from types import SimpleNamespace

import base_model
import torch
from transformers import FineGrainedFP8Config
from transformers.integrations.finegrained_fp8 import Fp8Dequantize, Fp8Quantize


def per_tensor(weight, shape=()):
    scale = weight.float().abs().max() / 448
    return {"weight": (weight.float() / scale).to(torch.float8_e4m3fn), "weight_scale": scale.reshape(shape)}


def per_row(weight):
    scale = weight.float().abs().amax(1, keepdim=True) / 448
    return {"weight": (weight.float() / scale).to(torch.float8_e4m3fn), "weight_scale": scale}


def make(name, quantise, documents, extra=lambda name: {}, skip=(), sizes=base_model.SMALL):
    folder = base_model.empty(name)
    tensors = dict(base_model.model(torch.bfloat16, sizes).state_dict())
    judge = Fp8Dequantize(None)
    dense, plain = {}, {}
    for name in list(tensors):
        weight = tensors[name]
        module = name.removesuffix(".weight")
        if "_proj" not in name or any(part in name for part in skip):
            plain[name] = weight
            continue
        parts = quantise(weight)
        tensors |= {f"{module}.{leaf}": tensor for leaf, tensor in (parts | extra(module)).items()}
        scale = parts.get("weight_scale_inv", parts.get("weight_scale"))
        dense[name] = judge._dequantize_one(parts["weight"], scale.reshape(1, 1) if scale.dim() < 2 else scale)
    base_model.write(folder, tensors, torch.bfloat16, documents.pop("config.json"), sizes=sizes)
    for file, document in documents.items():
        (folder / file).write_text(json.dumps(document, indent=2) + "\n")
    base_model.finish(folder, dense, plain, sizes)


def input_scale(module):
    return {"input_scale": torch.tensor(0.02)}


def modelopt(module):
    kind = module[-6]
    return input_scale(module) | (
        {f"{kind}_scale": torch.tensor(0.01 if kind == "k" else 0.02)} if kind in "kv" else {}
    )


def main():
    autofp8 = {"quant_method": "fp8", "activation_scheme": "static", "ignored_layers": ["lm_head"]}
    make("autofp8", per_tensor, {"config.json": {"quantization_config": autofp8}}, input_scale)

    blocks = {"quant_method": "fp8", "activation_scheme": "dynamic", "weight_block_size": [64, 64], "fmt": "e4m3"}
    hf_quantizer = SimpleNamespace(quantization_config=FineGrainedFP8Config(weight_block_size=(64, 64)))

    def by_block(weight):
        return {
            key.rpartition(".")[2]: tensor
            for key, tensor in Fp8Quantize(hf_quantizer)._quantize_one("module.weight", weight).items()
        }

    make("fp8_blocks", by_block, {"config.json": {"quantization_config": blocks}}, sizes=base_model.WIDE)

    fbgemm = {
        "quant_method": "fbgemm_fp8",
        "activation_scale_ub": 1200.0,
        "modules_to_not_convert": [
            "lm_head",
            *(f"model.layers.{i}.self_attn.{p}_proj" for i in (0, 1) for p in "qkvo"),
        ],
    }
    make("fbgemm_fp8", per_row, {"config.json": {"quantization_config": fbgemm}}, skip=("self_attn",))

    quantization = {"quant_algo": "FP8", "kv_cache_quant_algo": "FP8", "exclude_modules": ["lm_head"]}
    alone = {"producer": {"name": "modelopt", "version": "0.19.0"}, "quantization": quantization}
    make("modelopt_alone", per_tensor, {"config.json": {}, "hf_quant_config.json": alone}, modelopt)

    config = {
        "quant_method": "modelopt",
        "quant_algo": "FP8",
        "kv_cache_scheme": {"dynamic": False, "num_bits": 8, "type": "float"},
        "ignore": ["lm_head"],
        "producer": {"name": "modelopt", "version": "0.33.0"},
        "config_groups": {
            "group_0": {
                "input_activations": {"dynamic": False, "num_bits": 8, "type": "float"},
                "weights": {"dynamic": False, "num_bits": 8, "type": "float"},
                "targets": ["Linear"],
            }
        },
    }
    make("modelopt", per_tensor, {"config.json": {"quantization_config": config}}, modelopt)


if __name__ == "__main__":
    main()
