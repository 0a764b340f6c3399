"""Quantised weights in a model: rounding, products, moves, saving; the same results as from the dense weights."""

import pytest
import torch

from llama.api.errors import ParameterError
from llama.kernels.cpu.matmul import codes_of, nibble_block, pack_nibbles, quantized_matmul, unpack_nibbles, widen
from llama.kernels.types import QuantizedWeight
from llama.model.config import ModelConfig
from llama.model.linear import Linear
from llama.model.packing import linear_shapes
from llama.model.transformer import Transformer
from llama.model.weights import fp8
from llama.model.weights.int8 import FewTokensInt8
from llama.model.weights.quantised import SCHEMES, Joined, Quantised, quantise
from tests.model.models import hugging_face_weights, tiny_model
from tests.quantised.folders import FOLDERS, GOLDEN, copy, weights

IDS = torch.arange(30)[None]
LARGEST = {"int8": 127, "int4": 7, "fp8": 448}


def random(*shape, dtype=torch.float32, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).mul(0.02).to(dtype)


def linears(model):
    return [module for module in model.modules() if isinstance(module, Linear)]


BLOCKS = [
    (512, 128, 256),
    (576, 64, 64),
    (192, 32, 64),
    (64, 16, 64),
    (1024, 1024, 256),
    (1536, 32, 128),
    (60, 60, None),
]


@pytest.mark.parametrize(("columns", "size", "block"), BLOCKS)
def test_nibbles(columns, size, block):
    assert nibble_block(columns, size) == block
    if block is None:
        return
    q = torch.randint(-8, 8, (5, columns), generator=torch.Generator().manual_seed(0), dtype=torch.int8)
    words = pack_nibbles(q, block)
    assert words.dtype == torch.int16 and words.shape == (5, columns // 4)
    assert torch.equal(unpack_nibbles(words, block), q)
    # By the formula, for one word.
    quarter = block // 4
    expected = sum((int(q[3, block * (columns // block - 1) + i * quarter + 2]) + 8) << 4 * i for i in range(4))
    assert int(words[3, quarter * (columns // block - 1) + 2]) & 0xFFFF == expected


@pytest.mark.parametrize("preset", ["llama-3.1-8b", "llama-3.1-70b", "llama-3.1-405b", "llama-3.2-1b", "llama-3.2-3b"])
def test_every_presets_shapes_have_all_forms_of_int4(preset):
    """Nibbles in the largest block, groups of 128, and rows that PyTorch's product takes."""
    for rows, columns in linear_shapes(ModelConfig.preset(preset)).values():
        assert columns % 128 == 0 and nibble_block(columns, 128) == 256 and rows % 16 == 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("scheme", SCHEMES)
def test_rounding_to_nearest(scheme, dtype):
    w = random(40, 192, dtype=dtype)
    w[7] = 0
    form = quantise(w, scheme)
    coded = form.weight
    assert coded.scales.dtype == dtype and form.dtype == dtype
    scales = coded.scales.float().T.repeat_interleave(coded.group_size, dim=1)
    dense = widen(coded)
    assert torch.equal(form.dense(), dense.to(dtype)) and not dense[7].any()
    if scheme == "fp8":
        step = (dense.abs() / 8).clamp_(min=scales.min() * 2**-9)  # 3 bits after the first
        assert bool(((dense - w.float()).abs() <= 0.51 * step).all())
        largest = coded.codes.float().abs().amax(1)
        assert largest[7] == 0 and set(largest.tolist()) <= {0, *fp8._TOPS}
    else:
        held = w.float().abs() <= scales * LARGEST[scheme]  # int4 cuts the largest short
        assert held.float().mean() > 0.9
        assert bool(((dense - w.float()).abs() <= 0.501 * scales)[held].all())
        assert int(codes_of(coded).amin()) >= (-8 if scheme == "int4" else -127)


def test_the_largest_of_an_fp8_row_becomes_the_best_of_seven_codes():
    # The first row's values are codes if the largest is 320, the second row's if it is 448.
    q = torch.tensor([[320.0, 15.0, 13.0, -11.0], [-448.0, 16.0, 18.0, 0.75]])
    scales = torch.tensor([0.02, 0.5])
    coded = quantise(q * scales[:, None], "fp8").weight
    assert torch.equal(coded.codes.float(), q)
    torch.testing.assert_close(coded.scales, scales[None])
    w = random(64, 1024)
    errors = []
    for top in (448, 416, 384, 352, 320, 288, 256):
        scale = w.abs().amax(1, keepdim=True) / top
        errors.append(((w / scale).to(torch.float8_e4m3fn).float() * scale - w).square().sum(1))
    error = (quantise(w, "fp8").dense() - w).square().sum(1)
    torch.testing.assert_close(error, torch.stack(errors).amin(0))
    assert error.sum() < 0.97 * errors[0].sum()


def test_the_clip_of_int4_takes_a_seventh_off_the_error():
    w = random(64, 1024)
    size = 128
    plain = w.view(64, -1, size)
    scale = plain.abs().amax(2, keepdim=True) / 7
    plain_error = ((plain / scale).round() * scale - plain).square().mean()
    error = (quantise(w, "int4").dense() - w).square().mean()
    assert error < 0.87 * plain_error
    assert (error / w.square().mean()).sqrt() < 0.105


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("tokens", [0, 1, 5, 40, 70])
def test_products_are_those_of_the_dense_weight(scheme, dtype, tokens):
    form = quantise(random(48, 384, dtype=dtype), scheme)
    form.prepare()
    x = random(tokens, 384, dtype=dtype, seed=1)
    actual, w = form(x), widen(form.weight).double()
    assert actual.dtype == dtype and actual.shape == (tokens, 48)
    relative = {torch.float64: 1e-12, torch.float32: 1e-6, torch.float16: 2**-11, torch.bfloat16: 2**-8}[dtype]
    assert bool(((actual.double() - x.double() @ w.T).abs() <= relative * (x.double().abs() @ w.abs().T)).all())


def test_int8_takes_x_as_two_parts_of_7_bits_and_no_neighbour_changes_a_bit():
    form = quantise(random(64, 256, dtype=torch.bfloat16), "int8")
    few = FewTokensInt8(form.weight, form.weight.codes.numel())
    x = random(9, 256, dtype=torch.bfloat16, seed=1)
    x[4] = 0
    together = few(x)
    assert not together[4].any()
    for row in range(9):
        assert torch.equal(few(x[row : row + 1])[0], together[row])
    # By hand: what two parts hold of x, in whole numbers.
    scale = x.float().abs().amax(1, keepdim=True).clamp_(min=1e-30) / 63
    first = (x.float() / scale).round()
    second = ((x.float() / scale - first) * 126).round()
    assert first.abs().max() == 63 and second.abs().max() <= 63
    sums = (first * 126 + second).double() @ form.weight.codes.double().T
    expected = sums.float() * scale * (form.weight.scales[0].float() / 126)
    assert torch.equal(together, expected.bfloat16())


def test_float32_and_float64_are_never_rounded_for_it():
    for dtype in (torch.float32, torch.float64):
        form = quantise(random(64, 256, dtype=dtype), "int8")
        form.prepare()
        assert form.few_tokens is None


def test_the_last_group_may_be_smaller():
    codes = torch.randint(-100, 100, (6, 70), generator=torch.Generator().manual_seed(0), dtype=torch.int8)
    weight = QuantizedWeight(codes, torch.rand(3, 6), 32)
    scales = weight.scales.T.repeat_interleave(32, dim=1)[:, :70]
    assert torch.equal(widen(weight), codes * scales)
    x = torch.randn(2, 70)
    torch.testing.assert_close(quantized_matmul(x, weight), x @ (codes * scales).T, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("scheme", SCHEMES)
def test_a_model_rounded_at_load_is_the_one_rounded_in_place(scheme, tmp_path):
    dense = tiny_model(dtype=torch.float32)
    dense.save_pretrained(tmp_path / "dense")
    loaded = Transformer.from_pretrained(tmp_path / "dense", quantization=scheme)
    dense.quantise(scheme)
    forms = [linear.form for linear in linears(loaded)]
    assert all(isinstance(form, Quantised) for form in forms[:-1]) and forms[-1] is None  # the head stays
    assert torch.equal(loaded.logits(IDS), dense.logits(IDS))
    plain = tiny_model(dtype=torch.float32).logits(IDS)
    assert (
        0
        < (loaded.logits(IDS) - plain).abs().max()
        < {"int8": 0.05, "fp8": 0.2, "int4": 0.5}[scheme] * plain.abs().max()
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("scheme", SCHEMES)
def test_prepared_moved_cast_and_widened(scheme, dtype):
    model = tiny_model(dtype=dtype, tie_word_embeddings=True)
    model.quantise(scheme)
    expected, state = model.logits(IDS), {name: tensor.clone() for name, tensor in model.state_dict().items()}
    model.prepare(packing="always")
    model.prepare()
    assert all(linear.is_prepared for linear in linears(model))
    bound = {torch.float32: 1e-5, torch.bfloat16: 0.1}[dtype] * expected.abs().max()
    assert (model.logits(IDS) - expected).abs().max() <= bound
    assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())
    wide = model.double()
    assert isinstance(linears(wide)[0].form, Quantised) and not linears(wide)[0].is_prepared
    assert wide.layers[0].mlp.down_proj.dense_weight().dtype == torch.float64
    wide.dequantise()
    assert all(linear.form is None and linear.weight is not None for linear in linears(wide))


def test_only_a_dense_model_can_be_rounded():
    model = tiny_model(dtype=torch.float32)
    with pytest.raises(ParameterError, match="must be one of int8, int4, fp8 for a dense model, got 'awq'"):
        model.quantise("awq")
    model.quantise("int8")
    with pytest.raises(ParameterError, match="quantization must be None for a quantised model, got 'int4'"):
        model.quantise("int4")


WORDS = {"gptq": ["gptq", "gptq_marlin"], "awq": ["awq", "awq_marlin"], "ct_fp8": ["compressed-tensors"],
         "autofp8": ["fp8"], "fbgemm_fp8": ["fbgemm_fp8"], "modelopt": ["modelopt"], "bnb_int8": ["bitsandbytes"],
         "mlx_4bit": ["mlx"]}  # fmt: skip


@pytest.mark.parametrize("name", WORDS)
def test_the_folders_own_method_may_be_named_and_no_other(name):
    for word in WORDS[name]:
        Transformer.from_pretrained(GOLDEN / name, quantization=word)
    for word in {"int8", "gptq", "awq"} - set(WORDS[name]):
        with pytest.raises(ParameterError, match=f"quantization must be None or .* quantised already, got '{word}'"):
            Transformer.from_pretrained(GOLDEN / name, quantization=word)


TABLES = ("bnb_nf4", "bnb_nf4_double", "bnb_fp4")  # codes of a table become dense


@pytest.mark.parametrize("name", FOLDERS)
def test_a_published_folder_stays_quantised_and_is_saved_so(name, tmp_path):
    model = Transformer.from_pretrained(GOLDEN / name, dtype="float32")
    forms = [linear.coded for linear in linears(model)]
    before, logits = hugging_face_weights(model), model.logits(IDS % 90)
    assert name in TABLES or any(form is not None for form in forms)
    model.save_pretrained(tmp_path / "saved")
    again = Transformer.from_pretrained(tmp_path / "saved", dtype="float32")
    after = hugging_face_weights(again)
    assert before.keys() == after.keys() and all(torch.equal(before[key], after[key]) for key in before)
    if name not in TABLES:
        assert torch.equal(again.logits(IDS % 90), logits)
        assert [type(form) for form in forms] == [type(linear.coded) for linear in linears(again)]


def test_rows_with_one_zero_point_each_are_saved(tmp_path):
    def shifted(tensors):
        for name in [name for name in tensors if name.endswith("weight_scale")]:
            zeros = torch.arange(len(tensors[name]))[:, None] % 7 - 3
            tensors[name.replace("weight_scale", "weight_zero_point")] = zeros.to(torch.int8)

    def said(config):
        config["config_groups"]["group_0"]["weights"]["symmetric"] = False

    model = Transformer.from_pretrained(copy("ct_w8a8", tmp_path / "copy", shifted, said), dtype="float32")
    model.save_pretrained(tmp_path / "saved")
    before, after = hugging_face_weights(model), weights(tmp_path / "saved")
    assert all(torch.equal(before[key], after[key]) for key in before)


@pytest.mark.parametrize("name", [*TABLES, "gptq"])
def test_codes_of_a_table_become_plain_weights_and_that_is_told(name, caplog):
    model = Transformer.from_pretrained(GOLDEN / name)
    dense = [linear for layer in model.layers for linear in linears(layer) if linear.form is None]
    assert caplog.records == [] if name == "gptq" else len(dense) == 4 * len(model.layers)
    if name != "gptq":
        coded = [linear.weight.nbytes for linear in dense]
        size = int(caplog.records[-1].getMessage().split()[-2].replace(",", ""))
        assert 0 < size <= sum(coded) and "weights in nf4 or fp4 have no form of their own" in caplog.text
        model.prepare(packing="always")
        assert all(linear.coded is None for linear in dense)


def test_parts_that_differ_are_joined():
    model = Transformer.from_pretrained(GOLDEN / "ct_actorder", dtype="float32")
    form = model.layers[0].self_attn.qkv_proj.form
    assert isinstance(form, Joined) and len(form.parts) == 3  # unequal orders of columns
    assert weights(GOLDEN / "ct_actorder").keys() == hugging_face_weights(model).keys()
    assert isinstance(model.layers[0].self_attn.o_proj.form, Quantised)


def test_codes_are_what_is_kept():
    model = Transformer.from_pretrained(GOLDEN / "gptq", dtype="float32")
    form = model.layers[0].mlp.down_proj.form
    rows, columns = form.weight.shape
    assert form.weight.codes.nbytes * 2 == rows * columns
    assert form.nbytes < 0.75 * rows * columns
