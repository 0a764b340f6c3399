"""What `prepare` keeps beside codes on a CPU: the same weights and products in each layout, at its price in bytes."""

import pytest
import torch

from llama.api.errors import ParameterError
from llama.llm.llm import LLM
from llama.model.transformer import Transformer
from llama.model.weights.int4 import FewTokensInt4
from llama.model.weights.quantised import LAYOUTS, SCHEMES, Quantised, quantise
from tests.model.models import tiny_model
from tests.quantised.folders import GOLDEN
from tests.tiny_checkpoint import make_model

RELATIVE = {torch.float32: 1e-6, torch.bfloat16: 8e-3}
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


@BY_CODES
def test_bytes_of_each_layout():
    dense = weight(torch.bfloat16).nbytes
    sizes = {scheme: [prepared(scheme, layout).nbytes / dense for layout in LAYOUTS] for scheme in SCHEMES}
    expected = {"int4": [0.26, 0.52, 1.52], "int8": [0.5, 1.0, 2.0], "fp8": [0.5, 1.0, 1.0]}
    for scheme in SCHEMES:
        assert sizes[scheme] == pytest.approx(expected[scheme], abs=0.03)


@BY_CODES
def test_which_form_multiplies():
    """In the fast layout the dense copy does, but where codes win; in the balanced one few tokens have their form."""
    fast, balanced = prepared("int8", "fast"), prepared("int8", "balanced")
    x = torch.randn(40, 512).bfloat16()
    assert torch.equal(fast(x), fast.copy(x)) and torch.equal(fast(x[:16]), balanced.few_tokens(x[:16]))
    assert torch.equal(fast(x[:17]), fast.copy(x[:17])) and torch.equal(balanced(x), balanced.few_tokens(x))
    int4 = prepared("int4", "fast")
    assert torch.equal(int4(x[:4]), int4.few_tokens(x[:4])) and torch.equal(int4(x[:5]), int4.copy(x[:5]))
    # In float32 alone a dense copy is all there is to gain.
    wide = prepared("int4", "fast", torch.float32)
    assert wide.few_tokens is None and wide.copy is not None
    for scheme in SCHEMES:
        plain = prepared(scheme, "compact")
        assert plain.is_prepared and plain.few_tokens is plain.copy is None


@BY_CODES
def test_all_values_of_e4m3_come_back_from_float16():
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
    for layout, has_copy in (("compact", False), ("fast", True)):
        llm = LLM(folder, quantization="int4", quantization_layout=layout, num_blocks=16)
        assert (llm.model.layers[0].mlp.down_proj.form.copy is not None) == has_copy
    with pytest.raises(ParameterError, match="quantization_layout must be one of compact, balanced, fast, got 'small'"):
        LLM(folder, quantization_layout="small", num_blocks=16)
    model = tiny_model()
    with pytest.raises(ParameterError, match="quantization_layout"):
        model.prepare("small")
