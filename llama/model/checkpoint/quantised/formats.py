"""How each format lays out one weight [N, K] (out, in): its tensors -> CodedWeight.

Words are little end first: value i of an int32 word of b bits lies at bits [i b, (i + 1) b). The formulas were read in
the packages that write the formats, and run beside them; tests/golden/quantised holds what they wrote.
"""

import json
import math
from collections.abc import Callable, Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from llama.api.errors import CheckpointError
from llama.model.checkpoint.quantised.config import Quantization
from llama.model.checkpoint.shards import StoredTensor
from llama.model.weights.coded import CodedWeight, equal_groups

Shape = tuple[int, int]
Tensors = Mapping[str, Tensor]  # by what follows the module's name

_FLOATS = ("F16", "BF16", "F32", "F64")  # the last of models that were saved in float64
_AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)  # nibble i of a word holds this one of its eight columns
# What rounds activations or the KV cache, and says nothing of the weight. Scales of the cache have many names.
OF_ACTIVATIONS = frozenset("input_scale input_zero_point activation_scale output_scale q_scale k_scale v_scale".split())
OF_ATTENTION = frozenset("q_scale k_scale v_scale kv_scale prob_output_scale".split())


class Format(NamedTuple):
    """`needed` and `optional` are a module's tensors and the codes that they may be stored as."""

    methods: tuple[str, ...]
    needed: dict[str, tuple[str, ...]]
    optional: dict[str, tuple[str, ...]]
    read: Callable[[Tensors, Shape, Quantization], CodedWeight]

    def fits(self, stored: Mapping[str, StoredTensor]) -> bool:
        known = self.needed | self.optional | dict.fromkeys(OF_ACTIVATIONS, _FLOATS)
        return self.needed.keys() <= stored.keys() <= known.keys() and all(
            tensor.code in known[name] for name, tensor in stored.items()
        )


def find_format(stored: Mapping[str, StoredTensor]) -> Format | None:
    """The format of a module that has these tensors."""
    return next((form for form in FORMATS if form.fits(stored)), None)


def unpack(words: Tensor, bits: int) -> Tensor:
    """int32 [..., W] -> uint8 [..., W 32 / bits]: the values of each word, one after the other."""
    values = words.contiguous().view(torch.uint8)
    return values if bits == 8 else torch.stack((values & 15, values >> 4), dim=-1).flatten(-2)


def _shape(tensors: Tensors, name: str, *expected: tuple[int, ...]) -> Tensor:
    tensor = tensors[name]
    if tuple(tensor.shape) not in expected:
        told = " or ".join(str(list(shape)) for shape in expected)
        raise CheckpointError(f"{name} should be {told}, found {list(tensor.shape)}")
    return tensor


def _check_sizes(width: int, size: int, columns: int, quantization: Quantization) -> None:
    """What the tensors tell against what config.json says; `size` is that of a group, `columns` of a whole row."""
    if quantization.widths is not None and width not in quantization.widths:
        raise CheckpointError(f"the codes have {width} bits, config.json says {_told(quantization.widths)}")
    sizes = quantization.group_sizes
    if sizes is not None and size not in {columns if each == -1 else each for each in sizes}:
        raise CheckpointError(f"a scale holds for {size} columns, config.json says {_told(sizes)}")


def _told(values: frozenset[int]) -> str:
    return " or ".join(map(str, sorted(values)))


def _group_size(columns: int, groups: int) -> int:
    if groups < 1 or columns % groups:
        raise CheckpointError(f"{groups} groups do not divide {columns} columns")
    return columns // groups


def _width(name: str, count: int, words: int) -> int:
    width = next((bits for bits in (4, 8) if math.ceil(count * bits / 32) == words), None)
    if width is None:
        raise CheckpointError(f"{name} has {words} words for {count} codes, which is neither 4 nor 8 bits a code")
    return width


def _check_words(shape: Shape, counts: tuple[int, ...], bits: int) -> None:
    if any(count * bits % 32 for count in counts):
        raise CheckpointError(f"a weight {list(shape)} does not fill words of {32 // bits} codes")


def _matrix(tensors: Tensors, name: str) -> Tensor:
    if tensors[name].dim() != 2:
        raise CheckpointError(f"{name} should have two dimensions, found {list(tensors[name].shape)}")
    return tensors[name]


def _groups_of(g_idx: Tensor, columns: int, groups: int) -> int | Tensor:
    """The group of each column (act-order), which need not lie in order."""
    if g_idx.shape == (columns,) and bool((g_idx == -1).all()):  # unset: they do
        return equal_groups(columns, columns // groups)
    if g_idx.shape != (columns,) or not 0 <= int(g_idx.min()) <= int(g_idx.max()) < groups:
        raise CheckpointError(f"g_idx should hold a group in [0, {groups}) for each of {columns} columns")
    return 0 if groups == 1 else g_idx.long()


def _packed(tensors: Tensors, shape: Shape, quantization: Quantization) -> CodedWeight:
    """compressed-tensors, pack-quantized: unsigned codes along K; zero points packed along N, just as unsigned."""
    rows, columns = shape
    stored = tensors["weight_shape"].flatten().tolist()
    if stored != list(shape):
        raise CheckpointError(f"weight_shape says {stored}, by config.json it is {list(shape)}")
    width = _width("weight_packed", columns, _matrix(tensors, "weight_packed").shape[1])
    words = _shape(tensors, "weight_packed", (rows, math.ceil(columns * width / 32)))
    scales = tensors["weight_scale"]
    if scales.dim() == 2:
        scales = _shape(tensors, "weight_scale", (rows, scales.shape[1]))
    else:
        scales = _shape(tensors, "weight_scale", (), (1,), (rows,)).reshape(-1, 1)
    groups = scales.shape[1]
    size = _group_size(columns, groups)
    _check_sizes(width, size, columns, quantization)
    zeros = torch.full((1, 1), 1 << (width - 1), device="cpu").expand(1, groups)
    if "weight_zero_point" in tensors:
        packed = _shape(tensors, "weight_zero_point", (math.ceil(rows * width / 32), groups))
        zeros = unpack(packed.t(), width).t()[:rows]
    g_idx = tensors.get("weight_g_idx")
    of_columns = equal_groups(columns, size) if g_idx is None else _groups_of(g_idx, columns, groups)
    return CodedWeight(unpack(words, width)[:, :columns], scales, zeros, groups=of_columns, bits=width)


def _bytes(tensors: Tensors, shape: Shape, quantization: Quantization) -> CodedWeight:
    """int8 or float8 codes as they are: a scale for all, for each row, for groups of a row, or for blocks."""
    rows, columns = shape
    codes = _shape(tensors, "weight", shape)
    scales = tensors["weight_scale" if "weight_scale" in tensors else "weight_scale_inv"]  # both multiply
    zeros = tensors.get("weight_zero_point")
    groups: int | Tensor = 0
    block_rows, block_columns = quantization.block
    grid = (math.ceil(rows / block_rows), math.ceil(columns / block_columns))
    if tuple(scales.shape) in ((), (1,), (1, 1)):
        scales = scales.reshape(1, 1)
    elif tuple(scales.shape) in ((rows,), (rows, 1)):
        scales = scales.reshape(rows, 1)
    elif tuple(scales.shape) == grid:
        scales = scales.repeat_interleave(block_rows, dim=0)[:rows]
        groups = equal_groups(columns, block_columns)
    elif scales.dim() == 2 and scales.shape[0] == rows:
        size = _group_size(columns, scales.shape[1])
        _check_sizes(8, size, columns, quantization)
        groups = equal_groups(columns, size)
    else:
        told = f"one, of rows, of groups of a row, or of blocks of {block_rows} x {block_columns}"
        raise CheckpointError(f"the scales {list(scales.shape)} of a weight {list(shape)} are none of these: {told}")
    if zeros is not None and zeros.numel() == scales.numel():
        zeros = zeros.reshape(scales.shape)
    elif zeros is not None:
        raise CheckpointError(f"weight_zero_point is {list(zeros.shape)} where the scales are {list(scales.shape)}")
    return CodedWeight(codes, scales, zeros, groups=groups)


def _gptq(tensors: Tensors, shape: Shape, quantization: Quantization) -> CodedWeight:
    """GPTQ: codes packed along K, zero points along N. The first format (v1) stores zero points less one: one is added
    to the whole word, for the subtraction borrowed from the next value."""
    rows, columns = shape
    (width,) = quantization.widths or (4,)
    _check_words(shape, shape, width)
    words = _shape(tensors, "qweight", (columns * width // 32, rows))
    groups = _matrix(tensors, "scales").shape[0]
    scales = _shape(tensors, "scales", (groups, rows))
    zero_words = _shape(tensors, "qzeros", (groups, rows * width // 32))
    size = _group_size(columns, groups)
    _check_sizes(width, size, columns, quantization)
    ones = 0x11111111 if width == 4 else 0x01010101
    middle = ones << (width - 1)
    if quantization.symmetric:
        found = set(zero_words.unique().tolist())
        middles = {_signed(middle), _signed(middle - ones)}  # as v2 and as v1, whatever config.json says
        if len(found) != 1 or not found <= middles:
            raise CheckpointError("qzeros of a symmetric folder should all be the middle of the codes")
        zeros = torch.full((1, 1), 1 << (width - 1), device="cpu").expand(1, groups)
    else:
        wide = zero_words.long() + (ones if quantization.zeros_less_one else 0)
        zeros = unpack(((wide + 2**31) % 2**32 - 2**31).int(), width).t()
    g_idx = tensors.get("g_idx")
    of_columns = equal_groups(columns, size) if g_idx is None else _groups_of(g_idx, columns, groups)
    return CodedWeight(unpack(words.t(), width), scales.t(), zeros, groups=of_columns, bits=width)


def _gptq_or_awq(tensors: Tensors, shape: Shape, quantization: Quantization) -> CodedWeight:
    """Their tensors have the same names; the shapes of qweight differ, so that none is taken for the other."""
    if "bias" in tensors and bool(tensors["bias"].any()):
        raise CheckpointError("bias is not zero, and config.json says that there is none (attention_bias, mlp_bias)")
    return (_gptq if quantization.method == "gptq" else _awq)(tensors, shape, quantization)


def _signed(word: int) -> int:
    return word - 2**32 if word >= 2**31 else word


def _awq(tensors: Tensors, shape: Shape, quantization: Quantization) -> CodedWeight:
    """AWQ's gemm layout: codes [K, N / 8] and zero points [G, N / 8], both packed along N in its own order."""
    rows, columns = shape
    _check_words(shape, shape[:1], 4)
    groups = _matrix(tensors, "scales").shape[0]
    scales = _shape(tensors, "scales", (groups, rows))
    size = _group_size(columns, groups)
    _check_sizes(4, size, columns, quantization)
    codes = _awq_columns(_shape(tensors, "qweight", (columns, rows // 8)))
    zeros = _awq_columns(_shape(tensors, "qzeros", (groups, rows // 8)))
    return CodedWeight(codes.t().contiguous(), scales.t(), zeros.t(), groups=equal_groups(columns, size), bits=4)


def _awq_columns(words: Tensor) -> Tensor:
    values = unpack(words, 4).unflatten(1, (-1, 8))
    return values[..., torch.tensor(_AWQ_ORDER, device="cpu").argsort()].flatten(1)


def _bnb_int8(tensors: Tensors, shape: Shape, quantization: Quantization) -> CodedWeight:
    """LLM.int8(): w = code * SCB / 127. Its outlier columns are a matter of the matmul, not of the weight."""
    if int(tensors.get("weight_format", torch.tensor(0, device="cpu"))) != 0:
        raise CheckpointError("weight_format should be 0 (rows one after the other)")
    scales = _shape(tensors, "SCB", (shape[0],)).float() / 127
    return CodedWeight(_shape(tensors, "weight", shape), scales.reshape(-1, 1))


def _bnb_4bit(tensors: Tensors, shape: Shape, quantization: Quantization) -> CodedWeight:
    """nf4 and fp4: entries of a table of 16 values, high nibble first, and the largest value of each block of the flat
    weight; that may be an entry of a table of 256 itself (double quantisation)."""
    rows, columns = shape
    name = next(name for name in tensors if name.startswith("weight.quant_state."))
    try:
        state = json.loads(bytes(tensors[name].flatten().tolist()))
        size, stored = int(state["blocksize"]), list(state["shape"])
        nested_size, offset = int(state.get("nested_blocksize", 1)), float(state.get("nested_offset", 0))
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        raise CheckpointError(f"{name} is not the JSON object that bitsandbytes writes") from None
    if stored != list(shape) or size < 1 or nested_size < 1 or columns % size:
        raise CheckpointError(f"{name} tells {stored} in blocks of {size}, by config.json it is {list(shape)}")
    blocks = rows * columns // size
    largest = _shape(tensors, "weight.absmax", (blocks,))
    if "weight.nested_absmax" in tensors:
        outer = _shape(tensors, "weight.nested_absmax", (math.ceil(blocks / nested_size),))
        table = _shape(tensors, "weight.nested_quant_map", (256,))
        largest = table[largest.int()] * outer.repeat_interleave(nested_size)[:blocks] + offset
    packed = tensors["weight"].view(-1).view(torch.uint8)
    if packed.numel() * 2 != rows * columns:
        raise CheckpointError(f"weight has {packed.numel()} bytes, which do not make {list(shape)}")
    codes = torch.stack((packed >> 4, packed & 15), dim=-1).view(shape)
    table = _shape(tensors, "weight.quant_map", (16,))
    return CodedWeight(codes, largest.view(rows, -1), groups=equal_groups(columns, size), table=table, bits=4)


def _mlx(tensors: Tensors, shape: Shape, quantization: Quantization) -> CodedWeight:
    """MLX's affine form: w = code * scale + bias, codes along K."""
    rows, columns = shape
    width = _width("weight", columns, _matrix(tensors, "weight").shape[1])
    words = _shape(tensors, "weight", (rows, columns * width // 32))
    size = _group_size(columns, _matrix(tensors, "scales").shape[1])
    scales = _shape(tensors, "scales", (rows, columns // size))
    minima = _shape(tensors, "biases", (rows, columns // size))
    return CodedWeight(unpack(words, width), scales, minima=minima, groups=equal_groups(columns, size), bits=width)


_NESTED = {"weight.absmax": ("U8",), "weight.nested_absmax": ("F32",), "weight.nested_quant_map": ("F32",)}
_BYTES = ("U8", "BF16", "F16", "F32")  # of the same bytes

FORMATS = (
    Format(
        ("compressed-tensors",),
        {"weight_packed": ("I32",), "weight_scale": _FLOATS, "weight_shape": ("I64", "I32")},
        {"weight_zero_point": ("I32",), "weight_g_idx": ("I32",)},
        _packed,
    ),
    Format(
        ("compressed-tensors",),
        {"weight": ("I8",), "weight_scale": _FLOATS},
        {"weight_zero_point": ("I8",)},
        _bytes,
    ),
    Format(
        ("compressed-tensors", "fp8", "fbgemm_fp8", "modelopt", "quark"),
        {"weight": ("F8_E4M3",), "weight_scale": _FLOATS},
        {},
        _bytes,
    ),
    Format(("fp8",), {"weight": ("F8_E4M3",), "weight_scale_inv": _FLOATS}, {}, _bytes),
    Format(
        ("gptq", "awq"),
        {"qweight": ("I32",), "qzeros": ("I32",), "scales": _FLOATS},
        {"g_idx": ("I32",), "bias": _FLOATS},
        _gptq_or_awq,
    ),
    Format(("bitsandbytes",), {"weight": ("I8",), "SCB": ("F32",)}, {"weight_format": ("U8",)}, _bnb_int8),
    *(
        Format(
            ("bitsandbytes",), {"weight": _BYTES, "weight.quant_map": ("F32",), state: ("U8",)} | largest, {}, _bnb_4bit
        )
        for state in ("weight.quant_state.bitsandbytes__nf4", "weight.quant_state.bitsandbytes__fp4")
        for largest in ({"weight.absmax": ("F32",)}, _NESTED)
    ),
    Format(("mlx",), {"weight": ("U32",), "scales": _FLOATS, "biases": _FLOATS}, {}, _mlx),
)
