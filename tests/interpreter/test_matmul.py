"""quantized_matmul of every form against its twin, in the interpreter."""

import numpy as np
import pytest
import torch

from llama.kernels import ops
from llama.kernels.cpu import matmul as cpu
from llama.kernels.gpu import matmul
from llama.kernels.gpu.nibbles import UNPACK_PAIRS
from llama.kernels.gpu.split_k import splits_of
from llama.kernels.types import QuantizedWeight

TOLERANCE = {torch.float32: 1e-6, torch.float16: 2**-11}


def made(way, rows, columns, size, *, zeros=False, minima=False, seed=0):
    generator = torch.Generator().manual_seed(seed)
    groups = -(-columns // size)
    if way == "fp8":
        codes = torch.randn(rows, columns, generator=generator).mul(40).to(torch.float8_e4m3fn)
    else:
        least = -8 if way == "int4" else -128
        codes = torch.randint(least, -least, (rows, columns), generator=generator, dtype=torch.int8)
    if way == "int4":
        codes = cpu.pack_nibbles(codes, cpu.nibble_block(columns, size))
    zero_points = torch.randint(-8, 8, (groups, rows), generator=generator, dtype=torch.int8)
    scales, least = torch.rand(2, groups, rows, generator=generator) + 0.5
    return QuantizedWeight(codes, scales, size, zero_points if zeros else None, least if minima else None)


def check(weight, tokens, dtype):
    x = torch.randn(tokens, weight.shape[1], generator=torch.Generator().manual_seed(1)).to(dtype)
    actual = ops.quantized_matmul(x, weight)
    assert actual.dtype == dtype
    w = cpu.widen(weight).double()
    bound = TOLERANCE[dtype] * (x.double().abs() @ w.abs().T)
    assert bool(((actual.double() - x.double() @ w.T).abs() <= bound).all())


SHAPES = {
    "int4": [(8, 64, 16), (24, 192, 32), (70, 192, 64), (64, 512, 128), (33, 320, 320)],
    "int8": [(8, 40, 40), (70, 300, 300), (64, 192, 64), (20, 96, 16), (64, 384, 384)],
    "fp8": [(8, 40, 40), (70, 300, 300), (64, 256, 128), (33, 192, 128)],
}


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize(("way", "shape"), [(way, shape) for way in SHAPES for shape in SHAPES[way]], ids=str)
def test_products(way, shape, dtype):
    check(made(way, *shape), 3, dtype)


@pytest.mark.parametrize(("way", "shape"), [("int4", (24, 192, 32)), ("int8", (24, 192, 64)), ("int8", (8, 40, 40))])
@pytest.mark.parametrize(("zeros", "minima"), [(True, False), (False, True), (True, True)])
def test_zero_points_and_minima(way, shape, zeros, minima):
    check(made(way, *shape, zeros=zeros, minima=minima), 17, torch.float32)


@pytest.mark.parametrize("way", SHAPES)
def test_many_tokens(way):
    check(made(way, 130, 128, 64 if way == "int4" else 128), 65, torch.float32)


def test_all_values_of_e4m3():
    codes = torch.arange(256, dtype=torch.uint8)
    codes[(codes & 0x7F) == 0x7F] = 0  # NaN
    weight = QuantizedWeight(codes.view(torch.float8_e4m3fn).view(16, 16), torch.ones(1, 16), 16)
    for dtype in TOLERANCE:
        assert torch.equal(ops.quantized_matmul(torch.eye(16, dtype=dtype), weight).float(), cpu.widen(weight).T)


def test_all_values_of_int8_and_of_nibbles():
    codes = torch.arange(-128, 128).to(torch.int8).view(4, 64)
    weight = QuantizedWeight(codes, torch.ones(1, 4), 64)
    assert torch.equal(ops.quantized_matmul(torch.eye(64), weight), codes.float().T)
    codes = (torch.arange(256) % 16 - 8).to(torch.int8).view(4, 64)
    weight = QuantizedWeight(cpu.pack_nibbles(codes, 64), torch.ones(4, 4), 16)
    for dtype in TOLERANCE:
        assert torch.equal(ops.quantized_matmul(torch.eye(64, dtype=dtype), weight).float(), codes.float().T)


def emulated(assembly, word):
    """The assembly's four results for registers `word` uint32, by its instructions; `sub.bf16x2` by float32."""
    registers = {"$4": word}

    def value(name):
        return registers[name] if name in registers else np.uint32(int(name, 0))

    def halves(pairs):
        return [(half.astype(np.uint32) << 16).view(np.float32) for half in (pairs & 0xFFFF, pairs >> 16)]

    for line in assembly.strip("{} \n").split(";"):
        op, _, rest = line.strip().partition(" ")
        names = [name.strip() for name in rest.split(",")]
        if op == "mov.b32":
            registers[names[0]] = np.broadcast_to(value(names[1]), word.shape)
        elif op == "shr.b32":
            registers[names[0]] = value(names[1]) >> value(names[2])
        elif op == "lop3.b32":
            assert names[4] == "0xEA"
            registers[names[0]] = value(names[1]) & value(names[2]) | value(names[3])
        elif op == "sub.bf16x2":
            found = [a - b for a, b in zip(halves(value(names[1])), halves(value(names[2])), strict=True)]
            bits = [half.view(np.uint32) for half in found]
            assert not any((half & 0xFFFF).any() for half in bits)  # bfloat16 holds them
            registers[names[0]] = bits[0] >> 16 | bits[1]
        else:
            assert op in (".reg", ""), line
    return [halves(registers[f"${i}"]) for i in range(4)]


def test_the_assembly_that_unpacks_nibbles():
    """All words in both halves of a register: eight values, whatever the other half holds."""
    words = np.arange(65536, dtype=np.uint32)
    other = np.random.default_rng(0).permutation(words)
    found = emulated(UNPACK_PAIRS.value, other << 16 | words)
    for i, (low, high) in enumerate(found):
        assert (low == (words >> 4 * i & 15).astype(np.float32) - 8).all()
        assert (high == (other >> 4 * i & 15).astype(np.float32) - 8).all()


@pytest.mark.parametrize("way", SHAPES)
def test_splits_of_k_and_independent_rows(way, monkeypatch):
    """In whole numbers, whose sums have one value in any order: the order of the interpreter's dot varies."""
    generator = torch.Generator().manual_seed(0)
    codes = torch.randint(-8, 8, (64, 1024), generator=generator, dtype=torch.int8)
    if way == "int4":
        codes = cpu.pack_nibbles(codes, 256)
    elif way == "fp8":
        codes = codes.to(torch.float8_e4m3fn)
    scales = 2.0 ** torch.randint(-2, 3, (8, 64), generator=generator)
    weight = QuantizedWeight(codes, scales, 128)
    x = torch.randint(-4, 5, (20, 1024), generator=generator).float()
    monkeypatch.setattr(matmul, "multiprocessor_count", lambda device: 4)
    assert splits_of(64, 1024, matmul._columns(weight, way), 64, 4) > 1
    expected = x @ cpu.widen(weight).T
    for tokens in (1, 16, 20):
        assert torch.equal(ops.quantized_matmul(x[:tokens], weight), expected[:tokens])


@pytest.mark.usefixtures("row_by_row")
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize(("rows", "columns"), [(70, 300), (64, 1024)])
def test_dense_rows_have_the_same_bits_in_any_number(rows, columns, dtype, monkeypatch):
    monkeypatch.setattr(matmul, "multiprocessor_count", lambda device: 4)  # K of the second is split
    generator = torch.Generator().manual_seed(0)
    x, weight = (torch.randn(count, columns, generator=generator).to(dtype) for count in (40, rows))
    y = matmul.dense_matmul(x, weight)
    bound = TOLERANCE[dtype] * (x.double().abs() @ weight.double().abs().T)
    assert bool(((y.double() - x.double() @ weight.double().T).abs() <= bound).all())
    for start, stop in ((0, 1), (3, 20), (39, 40)):
        assert torch.equal(matmul.dense_matmul(x[start:stop], weight), y[start:stop])


def test_a_dense_product_of_many_tokens_is_refused():
    with pytest.raises(ValueError, match="dense_matmul: at most 64 tokens, got 65"):
        matmul.dense_matmul(torch.empty(65, 8), torch.empty(4, 8))


def test_no_tokens_and_strided_rows():
    weight = made("int8", 8, 64, 64)
    assert ops.quantized_matmul(torch.empty(0, 64), weight).shape == (0, 8)
    x = torch.randn(6, 64)
    assert torch.equal(ops.quantized_matmul(x[::2], weight), ops.quantized_matmul(x[::2].contiguous(), weight))


def test_what_does_not_fit_is_refused():
    with pytest.raises(ValueError, match="quantized_matmul: shapes or dtypes do not fit together: x float32"):
        ops.quantized_matmul(torch.empty(2, 32), made("int8", 8, 64, 64))
    with pytest.raises(ValueError, match="must be contiguous"):
        codes = torch.zeros(64, 8, dtype=torch.int8).T
        ops.quantized_matmul(torch.empty(2, 64), QuantizedWeight(codes, torch.ones(1, 8), 64))
    with pytest.raises(ValueError, match=r"scales must be \[1, 8\], got \[8, 1\]"):
        QuantizedWeight(torch.zeros(8, 64, dtype=torch.int8), torch.ones(8, 1), 64)
