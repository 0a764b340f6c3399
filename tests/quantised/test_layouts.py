"""What `prepare` keeps beside codes on a CPU: the same weights and products in each layout, at its price in bytes."""

from dataclasses import replace

import pytest
import torch

from llama.api.errors import ParameterError
from llama.cli import main as command
from llama.kernels.cpu import matmul
from llama.kernels.cpu.matmul import multiplies_in_tiles, quantized_matmul
from llama.kernels.cpu.pieces import Pieces
from llama.llm.llm import LLM
from llama.model.fixed_rows import fix_rows
from llama.model.transformer import Transformer
from llama.model.weights import int8
from llama.model.weights.int4 import FewTokensInt4
from llama.model.weights.packed import library_of
from llama.model.weights.quantised import LAYOUTS, SCHEMES, Quantised, quantise
from tests.model.models import tiny_config, tiny_model
from tests.quantised.folders import GOLDEN
from tests.tiny_checkpoint import make_model

RELATIVE = {torch.float32: 1e-6, torch.float16: 2**-11, torch.bfloat16: 2**-8}
WIDE = "bfloat16 codes" if library_of(torch.bfloat16) == "onednn" else "float16 codes"
BY_CODES = pytest.mark.skipif(
    torch.backends.quantized.engine not in ("x86", "fbgemm"), reason="FBGEMM multiplies float16 weights on x86 alone"
)


def weight(dtype, rows=64, columns=512):
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(0)).mul(0.02).to(dtype)


def prepared(scheme, layout, dtype=torch.bfloat16):
    form = quantise(weight(dtype), scheme)
    form.prepare(layout)
    return form


@pytest.mark.parametrize("dtype", RELATIVE, ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("scheme", SCHEMES)
def test_products_and_weights_are_those_of_the_codes(scheme, layout, dtype):
    form, codes = prepared(scheme, layout, dtype), quantise(weight(dtype), scheme)
    assert torch.equal(form.dense(), codes.dense()) and torch.equal(form.codes(), codes.codes())
    for ours, plain in zip(form.weight.tensors, codes.weight.tensors, strict=True):
        assert ours.dtype == plain.dtype and torch.equal(ours, plain)
    part = form.rows(16, 32)
    assert torch.equal(part.dense(), codes.dense()[16:48])
    assert torch.equal(
        form.to(torch.device("cpu"), torch.float64).dense(), codes.to(form.device, torch.float64).dense()
    )
    w = codes.dense().double()
    for tokens in (0, 1, 4, 5, 16, 17, 32, 33, 70):
        x = torch.randn(tokens, 512, generator=torch.Generator().manual_seed(tokens)).to(dtype)
        y = form(x)
        assert y.dtype == dtype and y.shape == (tokens, 64)
        # int8 takes x as 14 bits, and a dense copy is rounded to the model's dtype once.
        assert bool(((y.double() - x.double() @ w.T).abs() <= RELATIVE[dtype] * (x.double().abs() @ w.abs().T)).all())


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("scheme", SCHEMES)
def test_one_row_fills_a_piece_of_several(scheme, layout):
    form = prepared(scheme, layout)
    x = torch.randn(1, 512, generator=torch.Generator().manual_seed(0)).bfloat16()
    assert torch.equal(Pieces(4, 32).apply(form, x), form(x.repeat(4, 1))[:1])


@pytest.fixture(params=[False, True], ids=["no VNNI", "VNNI"])
def has_vnni(request, monkeypatch):
    monkeypatch.setattr(torch.cpu, "_is_vnni_supported", lambda: request.param)
    monkeypatch.setattr(int8, "multiplies_in_tiles", lambda: False)
    return request.param


def large(layout):
    """The form of an int8 weight that counts as one of 2^21 numbers."""
    form = quantise(weight(torch.bfloat16), "int8")
    form.prepare(layout, rows=2**21 // 512)
    return form


@BY_CODES
def test_bytes_of_each_layout(has_vnni):
    dense = weight(torch.bfloat16).nbytes
    layouts = ("compact", "balanced", "fast")
    expected = {"int4": [0.26, 0.52, 1.52], "int8": [0.5, 1.0, 1.5 if has_vnni else 1.0], "fp8": [0.5, 1.0, 1.0]}
    for scheme in SCHEMES:
        sizes = [prepared(scheme, layout).nbytes / dense for layout in layouts]
        assert sizes == pytest.approx(expected[scheme], abs=0.03)
    assert [large(layout).nbytes / dense for layout in layouts] == pytest.approx([0.5, 1.0, 1.5], abs=0.03)


@BY_CODES
def test_which_form_multiplies(has_vnni):
    """In the fast layout the form for many tokens does, but where codes win; in the balanced one few have theirs."""
    fast, balanced = large("fast"), large("balanced")
    x, most = torch.randn(40, 512).bfloat16(), 16 if has_vnni else 8
    assert fast.copy is None and fast._weight is None  # int8 codes in 16 bits serve many tokens, and are the codes
    assert torch.equal(fast(x), fast._wide(x)) and torch.equal(fast(x[:most]), balanced.few_tokens(x[:most]))
    assert torch.equal(fast(x[: most + 1]), fast._wide(x[: most + 1]))
    assert torch.equal(balanced(x), balanced.few_tokens(x))
    assert fast.told == f"fbgemm for up to {most} tokens, {WIDE} for more"
    fast.serve_few()
    assert torch.equal(fast(x), balanced(x))
    int4 = prepared("int4", "fast")
    assert torch.equal(int4(x[:4]), int4.few_tokens(x[:4])) and torch.equal(int4(x[:5]), int4.copy(x[:5]))
    # In float32 alone a dense copy is all there is to gain.
    wide = prepared("int4", "fast", torch.float32)
    assert wide.few_tokens is None and wide.copy is not None
    for scheme in SCHEMES:
        plain = prepared(scheme, "compact")
        assert plain.is_prepared and plain.few_tokens is plain.copy is None


@BY_CODES
def test_small_weights_of_int8_have_integer_products_with_vnni_alone(has_vnni):
    for layout in ("balanced", "fast"):
        small = prepared("int8", layout)
        assert (small.few_tokens is not None) == has_vnni
        assert has_vnni or small.told == WIDE
    assert prepared("int8", "balanced", torch.float32).told == "int8 codes"
    form = quantise(weight(torch.bfloat16), "int8")
    form.prepare("fast", rows=2**24 // 512)
    assert form.told == f"fbgemm for up to 16 tokens, {WIDE} for more"


@pytest.mark.skipif(not multiplies_in_tiles(), reason="needs a processor with AMX")
def test_large_weights_of_int8_in_tiles():
    """Integers whatever the number of tokens: the formula of the module, bit for bit."""
    form, w = quantise(weight(torch.bfloat16), "int8"), quantise(weight(torch.bfloat16), "int8").weight
    form.prepare("balanced", rows=2**24 // 512)
    assert form.told == "onednn for any number of tokens" and form.nbytes == pytest.approx(64 * 512 * 2, rel=0.02)
    x = torch.randn(300, 512, generator=torch.Generator().manual_seed(1)).bfloat16()
    scales = x.float().abs().amax(1, keepdim=True) / 63
    first = (x.float() / scales).round()
    second = ((x.float() / scales - first) * 126).round()
    a, b = (part.long() @ w.codes.long().T for part in (first, second))
    expected = (a.float() * 126 + b.float()) * scales * (w.scales[0].float() / 126)
    y = form(x)
    assert torch.equal(y, expected.bfloat16())
    for start, stop in ((0, 1), (127, 129), (299, 300), (100, 260)):
        assert torch.equal(form(x[start:stop]), y[start:stop])
    fast = quantise(weight(torch.bfloat16), "int8")
    fast.prepare("fast", rows=2**24 // 512)
    assert fast.told == "onednn for up to 16 tokens, bfloat16 codes for more"


@pytest.mark.parametrize("scheme", SCHEMES)
def test_many_tokens_in_bfloat16_where_that_is_fast(scheme, monkeypatch):
    """Codes become the bfloat16 weight that a dense copy would be; few tokens and other dtypes have float32."""
    codes = quantise(weight(torch.bfloat16), scheme)
    x = torch.randn(40, 512, generator=torch.Generator().manual_seed(1)).bfloat16()
    found = {}
    for has_tiles in (False, True):
        monkeypatch.setattr(matmul, "multiplies_in_tiles", lambda has_tiles=has_tiles: has_tiles)
        found[has_tiles] = [quantized_matmul(given, codes.weight) for given in (x, x[:32], x.half(), x.float())]
    many, *others = found[True]
    assert torch.equal(many, torch.nn.functional.linear(x, codes.dense()))
    if scheme != "fp8":
        zeros = torch.randint(-8, 8, codes.weight.scales.shape).to(torch.int8)
        for changed in (replace(codes.weight, zeros=zeros), replace(codes.weight, scales=codes.weight.scales.float())):
            whole = Quantised(changed, torch.bfloat16).dense()
            assert torch.equal(quantized_matmul(x, changed), torch.nn.functional.linear(x, whole))
    assert all(map(torch.equal, others, found[False][1:]))
    torch.testing.assert_close(many, found[False][0], atol=2e-2, rtol=2e-2)


@BY_CODES
@pytest.mark.parametrize("scheme", ["int8", "int4"])
def test_fixed_rows_take_one_form_in_every_layout(scheme):
    model = tiny_model(dtype=torch.bfloat16, hidden_size=128, intermediate_size=256)
    model.quantise(scheme)
    model.prepare("fast")
    fix_rows(model)
    linear = model.layers[0].mlp.down_proj
    x = torch.randn(40, linear.in_features).bfloat16()
    assert torch.equal(linear(x)[:1], linear(x[:1]))


def test_all_values_of_int8_come_back_from_16_bits():
    form = Quantised(quantise(torch.ones(16, 16).bfloat16(), "int8").weight, torch.bfloat16)
    codes = torch.arange(-128, 128).to(torch.int8).view(16, 16)
    form.weight.codes.copy_(codes)
    form.prepare("fast")
    assert torch.equal(form.codes(), codes)


@BY_CODES
def test_all_values_of_e4m3_come_back_from_16_bits():
    codes = torch.arange(256, dtype=torch.uint8)
    codes[(codes & 0x7F) == 0x7F] = 0  # NaN
    form = Quantised(quantise(torch.ones(16, 16).bfloat16(), "fp8").weight, torch.bfloat16)
    form.weight.codes.view(torch.uint8).copy_(codes.view(16, 16))
    form.prepare()
    assert form._weight is None and torch.equal(form.codes().view(torch.uint8), codes.view(16, 16))


def test_int4_is_packed_in_strips_as_in_one_piece():
    form = quantise(weight(torch.bfloat16, rows=528, columns=256), "int4")
    whole = torch.ops.aten._convert_weight_to_int4pack_for_cpu(form.codes().int() + 8, 1)
    assert torch.equal(FewTokensInt4(form.weight)._packed, whole)


def test_columns_in_another_order_have_a_dense_copy_too():
    model = Transformer.from_pretrained(GOLDEN / "gptq_desc_act", dtype="float32")
    form = model.layers[0].mlp.down_proj.form
    assert form.order is not None
    x = torch.randn(3, form.weight.shape[1])
    expected = form(x)
    form.prepare("fast")
    torch.testing.assert_close(form(x), expected, rtol=1e-5, atol=1e-5)


def test_the_layout_is_an_option_of_the_engine(tmp_path):
    folder = make_model(tmp_path)
    for layout, has_copy in (("balanced", False), ("compact", False), ("fast", True)):
        llm = LLM(folder, quantization="int4", quantization_layout=layout, num_blocks=16)
        assert (llm.model.layers[0].mlp.down_proj.form.copy is not None) == has_copy
    with pytest.raises(ParameterError, match="must be one of compact, balanced, fast, got 'small'"):
        LLM(folder, quantization_layout="small", num_blocks=16)
    model = tiny_model()
    with pytest.raises(ParameterError, match="quantization_layout"):
        model.prepare("small")


@pytest.mark.parametrize("scheme", SCHEMES)
def test_info_says_in_which_forms_codes_will_lie(scheme, tmp_path, capsys):
    config, sizes = tiny_config(hidden_size=128, intermediate_size=384), []
    Transformer(config, dtype=torch.bfloat16).save_pretrained(tmp_path / "dense")
    for layout in LAYOUTS:
        model = Transformer(config, dtype=torch.bfloat16)
        model.quantise(scheme)
        model.prepare(layout)
        forms = [module.coded for module in model.modules() if getattr(module, "coded", None) is not None]
        sizes.append(f"{layout} {sum(form.nbytes for form in forms):,}")
    assert command(["info", str(tmp_path / "dense"), "--weight-forms", "--quantization", scheme]) == 0
    out = capsys.readouterr().out
    assert f"in codes     {', '.join(sizes)} bytes" in out
    model = Transformer(config, dtype=torch.bfloat16)
    model.quantise(scheme)
    model.prepare()
    assert f"down_proj         128 x 384 {model.layers[0].mlp.down_proj.form.told}\n" in out


@pytest.mark.parametrize("name", ["gptq_desc_act", "ct_w8a8", "bnb_nf4", "mlx_4bit"])
def test_info_reads_the_forms_of_a_quantised_folder(name, capsys):
    assert command(["info", str(GOLDEN / name), "--weight-forms"]) == 0
    out = capsys.readouterr().out
    model = Transformer.from_pretrained(GOLDEN / name)
    model.prepare()
    linear = model.layers[0].mlp.down_proj
    told = "p" if linear.coded is None else linear.coded.told  # packed or plain
    assert f"{'down_proj':13}{linear.out_features:>8,} x {linear.in_features:,} {told}" in out
    assert ("in codes" in out) == (linear.coded is not None)
