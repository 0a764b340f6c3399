"""Models with random weights: a preset cut down, and weights drawn as codes, for a 70B's would not fit dense."""

from dataclasses import replace
from typing import NamedTuple

import torch
from torch import nn

from llama.kernels.cpu.matmul import nibble_block
from llama.kernels.types import QuantizedWeight
from llama.model.config import ModelConfig
from llama.model.linear import Linear
from llama.model.transformer import Transformer
from llama.model.weights.quantised import Quantised


def cut_preset(name: str, layers: int | None = None, vocab_size: int | None = None) -> ModelConfig:
    """A preset's shapes, with fewer layers and tokens where that is said; RoPE is not scaled, no token ends a text."""
    config = ModelConfig.preset(name)
    return replace(
        config,
        num_hidden_layers=layers or config.num_hidden_layers,
        vocab_size=vocab_size or config.vocab_size,
        rope_scaling=None,
        bos_token_id=None,
        eos_token_ids=(),
    )


class Kind(NamedTuple):
    way: str  # of the kernel: int4, int8, fp8
    group_size: int  # 0 = a row
    zeros: bool = False
    minima: bool = False


# As checkpoints have them: what `quantization=` makes, and by name what GPTQ and AWQ, MLX and GGUF, FP8_BLOCK write.
KINDS = {
    "int4": Kind("int4", 128),
    "int8": Kind("int8", 0),
    "fp8": Kind("fp8", 0),
    "int4, zero points": Kind("int4", 128, zeros=True),
    "int4, minima": Kind("int4", 64, minima=True),
    "int8, groups": Kind("int8", 64),
    "fp8, blocks": Kind("fp8", 128),
}


def group_size(kind: Kind, columns: int) -> int:
    """Smaller where the kind's own does not divide a row."""
    return next(size for size in (kind.group_size or columns, 64, 32, columns) if columns % size == 0)


def _is_in_nibbles(kind: Kind, columns: int) -> bool:
    """Four bits lie in a byte each where no block of nibbles divides a row."""
    return kind.way == "int4" and nibble_block(columns, group_size(kind, columns)) is not None


def num_bytes(kind: Kind, shape: tuple[int, int], dtype: torch.dtype) -> int:
    """Of a weight, its scales, zero points and minima."""
    rows, columns = shape
    groups = rows * (columns // group_size(kind, columns))
    codes = rows * columns // (2 if _is_in_nibbles(kind, columns) else 1)
    return codes + groups * (dtype.itemsize * (2 if kind.minima else 1) + (1 if kind.zeros else 0))


def random_weight(
    kind: Kind, shape: tuple[int, int], *, device: torch.device | str, dtype: torch.dtype, seed: int
) -> QuantizedWeight:
    """[rows, columns] of about the size of a trained model's weights."""
    rows, columns = shape
    generator = torch.Generator(device).manual_seed(seed)
    size = group_size(kind, columns)
    groups = columns // size

    def drawn(low: int, high: int, shape: tuple[int, int], of: torch.dtype = torch.int8) -> torch.Tensor:
        return torch.randint(low, high, shape, generator=generator, device=device, dtype=of)

    if _is_in_nibbles(kind, columns):
        codes, largest = drawn(-(2**15), 2**15, (rows, columns // 4), torch.int16), 8
    elif kind.way == "int4":
        codes, largest = drawn(-8, 8, (rows, columns)), 8
    elif kind.way == "int8":
        codes, largest = drawn(-127, 128, (rows, columns)), 127
    else:  # a sign, and all magnitudes but NaN, up to 448
        codes = drawn(0, 127, (rows, columns)) | drawn(0, 2, (rows, columns)) * -128
        codes, largest = codes.view(torch.float8_e4m3fn), 448
    scales = torch.rand(groups, rows, generator=generator, device=device).add_(0.5).mul_(0.05 / largest).to(dtype)
    zeros = drawn(-2, 3, (groups, rows)) if kind.zeros else None
    return QuantizedWeight(codes, scales, size, zeros, scales * -0.5 if kind.minima else None)


def random_model(config: ModelConfig, scheme: str, *, device: torch.device | str, dtype: torch.dtype) -> Transformer:
    """The layers' linear weights in codes, embedding, norms and head dense."""
    model = Transformer(config, device="meta", dtype=dtype, seed=None)
    generator = torch.Generator(device).manual_seed(0)
    for seed, (path, module) in enumerate(model.named_modules()):
        if isinstance(module, Linear) and path.startswith("layers."):
            shape = module.out_features, module.in_features
            codes = random_weight(KINDS[scheme], shape, device=device, dtype=dtype, seed=seed)
            module.take(Quantised(codes, dtype))
        for name, parameter in list(module.named_parameters(recurse=False)):
            filled = torch.ones(parameter.shape, device=device, dtype=dtype)
            if parameter.dim() == 2:
                filled.normal_(0.0, 0.02, generator=generator)
            setattr(module, name, nn.Parameter(filled, requires_grad=False))
    model._complete()
    return model
