"""Write the compressed-tensors folders: pip install --no-deps compressed-tensors==0.20.1 loguru

llm-compressor writes its folders with it. Scales are those of the smallest and largest weight, by its own functions;
nothing is calibrated.
"""

import json
import sys

import base_model
import torch
from compressed_tensors.compressors.base import BaseCompressor
from compressed_tensors.compressors.model_compressors.model_compressor import ModelCompressor
from compressed_tensors.quantization import QuantizationArgs, QuantizationConfig, apply_quantization_config
from compressed_tensors.quantization.quant_scheme import preset_name_to_scheme
from compressed_tensors.quantization.utils import calculate_qparams


def bounds(weight, args):
    """Smallest and largest weight of everything that shares a scale."""
    if args.strategy == "tensor":
        return weight.min().view(1), weight.max().view(1)
    if args.strategy == "channel":
        return weight.amin(1, keepdim=True), weight.amax(1, keepdim=True)
    if args.strategy == "group":
        groups = weight.unflatten(1, (-1, args.group_size))
        return groups.amin(2), groups.amax(2)
    rows, columns = args.block_structure
    blocks = [[block.aminmax() for block in strip.split(columns, 1)] for strip in weight.split(rows)]
    return (torch.stack([torch.stack([pair[i] for pair in strip]) for strip in blocks]) for i in (0, 1))


def make(name, scheme, sizes=base_model.SMALL, ignore=("lm_head",), kv_cache=None):
    folder = base_model.empty(name)
    model = base_model.model(torch.bfloat16, sizes)
    config = QuantizationConfig(config_groups={"group_0": scheme}, ignore=list(ignore), kv_cache_scheme=kv_cache)
    apply_quantization_config(model, config)
    for module in base_model.projections(model).values():
        if getattr(module, "quantization_scheme", None) is None:
            continue
        low, high = bounds(module.weight, scheme.weights)
        scale, zero_point = calculate_qparams(low, high, scheme.weights)
        module.weight_scale.copy_(scale)
        if not scheme.weights.symmetric:
            module.weight_zero_point.copy_(zero_point)
        if hasattr(module, "input_scale"):
            module.input_scale.fill_(0.02)
    if kv_cache is not None:
        generator = torch.Generator().manual_seed(2)
        for layer in model.model.layers:
            for scale in (layer.self_attn.k_scale, layer.self_attn.v_scale):
                scale.copy_(torch.rand(scale.shape, generator=generator) * 0.01 + 0.01)
    compressor = ModelCompressor.from_pretrained_model(model)
    compressor.compress_model(model)
    model.save_pretrained(folder)
    compressor.update_config(folder)
    finish(folder, scheme, sizes)


def finish(folder, scheme, sizes):
    tensors = base_model.stored(folder)
    config = json.loads((folder / "config.json").read_text())["quantization_config"]
    compressor = BaseCompressor.get_value_from_registry(config["format"])
    modules: dict[str, dict[str, torch.Tensor]] = {}
    for name, tensor in tensors.items():
        module, _, leaf = name.rpartition(".")
        modules.setdefault(module, {})[leaf] = tensor
    dense, plain = {}, {}
    for module, parts in modules.items():
        if "weight_scale" not in parts:
            plain |= {f"{module}.{leaf}": tensor for leaf, tensor in parts.items() if leaf == "weight"}
            continue
        parts["weight_scale"] = parts["weight_scale"].float()
        dense[f"{module}.weight"] = compressor.decompress(parts, scheme)["weight"]
    base_model.finish(folder, dense, plain, sizes)


def preset(name, **weights):
    scheme = preset_name_to_scheme(name, ["Linear"])
    return scheme.model_copy(update={"weights": scheme.weights.model_copy(update=weights)}) if weights else scheme


def kv_cache(strategy):
    return QuantizationArgs(num_bits=8, type="float", strategy=strategy, symmetric=True, dynamic=False)


def main():
    make("ct_fp8", preset("FP8"))
    make("ct_fp8_dynamic", preset("FP8_DYNAMIC"))
    make("ct_fp8_block", preset("FP8_BLOCK"))
    make("ct_w8a8", preset("W8A8"))
    make("ct_w8a16", preset("W8A16", group_size=64))
    make("ct_w8a16_channel", preset("W8A16", strategy="channel", group_size=None))
    make("ct_w4a16", preset("W4A16"), base_model.WIDE)
    make("ct_w4a16_asym", preset("W4A16_ASYM", group_size=32), ignore=("lm_head", "re:.*layers.1.mlp.*"))
    make("ct_kv_tensor", preset("FP8_DYNAMIC"), kv_cache=kv_cache("tensor"))
    make("ct_kv_heads", preset("FP8_DYNAMIC"), kv_cache=kv_cache("attn_head"))


if __name__ == "__main__":
    sys.exit(main())
