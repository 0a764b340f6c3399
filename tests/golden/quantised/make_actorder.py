"""Write a compressed-tensors folder with `actorder: group`: pip install --no-deps compressed-tensors==0.13.0 loguru

Later releases no longer write it; folders of llm-compressor of 2025 have it. The columns' groups are drawn at random,
for q, k and v differently.
"""

import base_model
import torch
from compressed_tensors.compressors.quantized_compressors.pack_quantized import pack_to_int32, unpack_from_int32
from compressed_tensors.quantization import QuantizationArgs, QuantizationConfig, QuantizationScheme
from compressed_tensors.quantization.lifecycle.forward import dequantize, quantize
from compressed_tensors.quantization.utils import calculate_qparams

GROUP = 32


def main():
    folder = base_model.empty("ct_actorder")
    args = QuantizationArgs(num_bits=4, strategy="group", group_size=GROUP, symmetric=True, actorder="group")
    model = base_model.model(torch.bfloat16)
    generator = torch.Generator().manual_seed(3)
    tensors = {name: tensor for name, tensor in model.state_dict().items() if "_proj" not in name}
    plain, dense = dict(tensors), {}
    for name, module in base_model.projections(model).items():
        columns = module.in_features
        groups = torch.arange(columns) // GROUP
        g_idx = groups[torch.randperm(columns, generator=generator)].int()
        ordered = module.weight[:, torch.argsort(g_idx, stable=True)].unflatten(1, (-1, GROUP))
        scale, zero_point = calculate_qparams(ordered.amin(2), ordered.amax(2), args)
        codes = quantize(module.weight, scale, zero_point, args, dtype=torch.int8, g_idx=g_idx)
        packed = pack_to_int32(codes, 4)
        tensors |= {
            f"{name}.weight_packed": packed,
            f"{name}.weight_scale": scale,
            f"{name}.weight_shape": torch.tensor(module.weight.shape),
            f"{name}.weight_g_idx": g_idx,
        }
        codes = unpack_from_int32(packed, 4, module.weight.shape)
        dense[f"{name}.weight"] = dequantize(codes, scale.float(), args=args, g_idx=g_idx)
    scheme = QuantizationScheme(targets=["Linear"], weights=args)
    quantization = QuantizationConfig(
        config_groups={"group_0": scheme}, ignore=["lm_head"], format="pack-quantized", quantization_status="compressed"
    )
    base_model.write(folder, tensors, torch.bfloat16, {"quantization_config": quantization.model_dump(mode="json")})
    base_model.finish(folder, dense, plain)


if __name__ == "__main__":
    main()
