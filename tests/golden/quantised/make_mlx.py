"""Write the MLX folders with mx.quantize: pip install --no-deps mlx==0.32.4 mlx-cpu==0.32.4

mlx-lm's layout: embedding and head are quantised as well, config.json says `quantization` (and, since 2024, the same
again as `quantization_config`).
"""

import base_model
import mlx.core as mx
import numpy
import torch


def to_torch(array, dtype=None):
    if array.dtype == mx.bfloat16:
        return torch.from_numpy(numpy.array(array.astype(mx.float32))).bfloat16()
    tensor = torch.from_numpy(numpy.array(array))
    return tensor if dtype is None else tensor.to(dtype)


def make(name, bits, group, dtype, tied=False, sizes=base_model.SMALL):
    folder = base_model.empty(name)
    model = base_model.model(dtype, sizes, tie_word_embeddings=tied)
    tensors, dense, plain = {}, {}, {}
    for name, weight in model.state_dict().items():
        if name == "lm_head.weight" and tied:
            continue
        if weight.dim() == 1:
            tensors[name] = plain[name] = weight
            continue
        kind = mx.bfloat16 if dtype == torch.bfloat16 else mx.float16
        codes, scales, biases = mx.quantize(mx.array(weight.float().numpy()).astype(kind), group, bits)
        prefix = name.removesuffix("weight")
        tensors[name] = to_torch(codes)
        tensors |= {f"{prefix}scales": to_torch(scales), f"{prefix}biases": to_torch(biases)}
        wide = mx.dequantize(codes, scales.astype(mx.float32), biases.astype(mx.float32), group, bits)
        dense[name] = to_torch(wide)
    if tied:
        dense["lm_head.weight"] = dense["model.embed_tokens.weight"].clone()
    quantization = {"group_size": group, "bits": bits, "mode": "affine"}
    base_model.write(
        folder,
        tensors,
        dtype,
        {"quantization": quantization, "quantization_config": quantization},
        sizes=sizes,
        tie_word_embeddings=tied,
    )
    base_model.finish(folder, dense, plain, sizes)


def main():
    make("mlx_4bit", 4, 64, torch.bfloat16)
    make("mlx_8bit", 8, 64, torch.bfloat16)
    make("mlx_4bit_tied", 4, 32, torch.float16, tied=True)


if __name__ == "__main__":
    main()
