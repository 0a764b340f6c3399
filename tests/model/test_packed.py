"""Packed weights: the same products within the dtype's rounding, the same weight back bit for bit, moves and saves."""

import pickle
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch

from llama import LLM, SamplingParams
from llama.kernels.cpu.pieces import Pieces
from llama.kernels.ops import silu_mul
from llama.model.fixed_rows import _taking
from llama.model.linear import Linear
from llama.model.transformer import Transformer
from llama.model.weights import float16, packed
from llama.model.weights.float16 import Float16Matrix
from llama.model.weights.packed import Float16Weight, OneDNNGated, OneDNNWeight, library_of, pack
from tests.model.models import hugging_face_weights, tiny_model

TOLERANCES = {torch.float32: 1e-6, torch.bfloat16: 8e-3, torch.float16: 1e-3}


def weight(rows, columns, dtype, scale=0.02):
    values = torch.randn(rows, columns, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    return (values * scale).to(dtype)


@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
@pytest.mark.parametrize("shape", [(1, 1), (7, 5), (96, 64), (33, 300)], ids=str)
@pytest.mark.parametrize("tokens", [0, 1, 2, 17])
def test_products(dtype, shape, tokens):
    w = weight(*shape, dtype)
    x = weight(tokens, shape[1], dtype, scale=1.0)
    result = pack(w)(x)
    assert result.dtype == dtype
    expected = x.double() @ w.double().T
    bound = TOLERANCES[dtype] * (x.double().abs() @ w.double().abs().T)
    assert result.shape == expected.shape
    assert bool(((result.double() - expected).abs() <= bound).all())


@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
def test_the_weight_comes_back_bit_for_bit(dtype):
    w = weight(64, 96, dtype)
    w[3, :5] = torch.tensor([0.0, 2.0**-17, -(2.0**-18) * 1.5, 3e-9, -1e-7], dtype=dtype)
    assert torch.equal(pack(w).dense(), w)


def test_forms_of_16_bit_weights():
    """The one for CPUs that do not compute in bfloat16, whatever this machine is."""
    w = weight(64, 96, torch.bfloat16)
    form = Float16Weight.of(w)
    assert torch.equal(form.dense(), w)
    x = weight(3, 96, torch.bfloat16, scale=1.0)
    torch.testing.assert_close(form(x), x @ w.T, atol=4e-3, rtol=2e-2)


def test_strips_of_rows_change_no_bit(monkeypatch):
    """A matrix is packed in strips, so that a large one is never there as float32 as a whole."""
    w, x = weight(70, 96, torch.bfloat16), weight(5, 96, torch.bfloat16, scale=1.0)
    w[[3, 40, 69], 5] = torch.tensor([2.0**-18 * 1.5, 3e-9, -1e-7], dtype=torch.bfloat16)
    scales = torch.rand(70, generator=torch.Generator().manual_seed(1))
    whole, matrix = Float16Weight.of(w), Float16Matrix(w)
    monkeypatch.setattr(packed, "_STRIP", 1000)
    monkeypatch.setattr(float16, "_STRIP", 16 * 96)
    strips, parts = Float16Weight.of(w), Float16Matrix(w)
    assert len(parts._strips) == 5 and len(matrix._strips) == 1
    assert torch.equal(strips.dense(), w) and torch.equal(whole.dense(), w)
    assert strips.nbytes == whole.nbytes
    for tokens in (0, 1, 5):
        assert torch.equal(strips(x[:tokens]), whole(x[:tokens]))
        assert torch.equal(parts(x[:tokens], scales), matrix(x[:tokens], scales))


@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
@pytest.mark.parametrize("tokens", [0, 1, 3, 17, 40])
def test_gate_and_up_in_their_products(dtype, tokens):
    if library_of(dtype) != "onednn":
        pytest.skip("oneDNN computes with this dtype on other processors")
    w, x = weight(48, 300, dtype, scale=0.2), weight(tokens, 300, dtype, scale=1.0)
    form = OneDNNGated(w)
    assert torch.equal(form.dense(), w) and form.nbytes == w.nbytes
    product = x.double() @ w.double().T
    gate, up = product.chunk(2, dim=1)
    expected, bound = torch.nn.functional.silu(gate) * up, TOLERANCES[dtype] * 8
    torch.testing.assert_close(form(x).double(), product, atol=bound, rtol=bound)
    act = form.gated(x)
    assert act.dtype == dtype and act.shape == (tokens, 24)
    torch.testing.assert_close(act.double(), expected, atol=bound, rtol=bound)


def test_gate_and_up_are_joined_for_whom_the_product_concerns():
    """Adapters, hooks and fixed pieces of rows have the whole product, and silu after it."""
    linear = Linear(64, 96, is_gated=True, device="cpu", dtype=torch.float32)
    w, x = weight(96, 64, torch.float32, scale=0.2), weight(3, 64, torch.float32, scale=1.0)
    linear.take(OneDNNGated(w))
    seen = []
    with torch.inference_mode():
        at_once = linear.gated(x)
        handle = linear.register_forward_hook(lambda module, args, out: seen.append(out))
        torch.testing.assert_close(linear.gated(x), at_once)
        handle.remove()
        linear.pieces = Pieces(4, 32)
        torch.testing.assert_close(linear.gated(x), at_once)
        linear.pieces = None
        doubled = SimpleNamespace(concern=lambda module: module is linear, add=lambda module, x, y: y + y)
        assert torch.equal(linear.gated(x, doubled), silu_mul(linear(x, doubled)))
        of_others = SimpleNamespace(concern=lambda module: False, add=None)
        assert torch.equal(linear.gated(x, of_others), at_once)
    [product_seen] = seen
    torch.testing.assert_close(product_seen, x @ w.T)
    [same] = pickle.loads(pickle.dumps([linear.form]))
    assert torch.equal(same.dense(), w)


@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
def test_rows_are_tried_in_the_form_that_serves(dtype):
    model = tiny_model(dtype=dtype)
    model.prepare(packing="always")
    for linear in (module for module in model.modules() if isinstance(module, Linear)):
        tried = _taking(linear, torch.arange(linear.in_features).flip(0))
        assert type(tried) is type(linear.form), linear.extra_repr()
        assert torch.equal(tried.dense(), linear.dense_weight().flip(1))


@pytest.mark.parametrize("value", [7e4, -7e4, float("inf"), float("nan")])
def test_what_float16_cannot_hold_stays_plain(value):
    w = weight(8, 8, torch.bfloat16)
    w[2, 2] = value
    assert Float16Weight.of(w) is None


def test_many_tiny_weights_stay_plain():
    assert Float16Weight.of(weight(8, 8, torch.bfloat16, scale=1e-6)) is None


def test_float64_and_other_devices_stay_plain():
    assert pack(weight(4, 4, torch.float64)) is None
    assert pack(torch.empty(4, 4, device="meta")) is None


def test_without_the_libraries_weights_stay_plain(monkeypatch):
    monkeypatch.setattr(packed.torch.backends.mkldnn, "is_available", lambda: False)
    assert pack(weight(4, 4, torch.float32)) is None


@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
@pytest.mark.parametrize("tied", [False, True])
def test_a_prepared_model_is_the_same_model(dtype, tied, tmp_path):
    plain, prepared = (tiny_model(dtype=dtype, tie_word_embeddings=tied) for _ in range(2))
    prepared.prepare(packing="always")
    prepared.prepare(packing="always")
    linears = [module for module in prepared.modules() if isinstance(module, Linear)]
    assert all(isinstance(linear.form, OneDNNWeight | OneDNNGated | Float16Weight) for linear in linears)
    assert all(linear.weight is None for linear in linears)

    ids = torch.arange(30)[None]
    expected = plain.logits(ids)
    bound = {torch.float32: 1e-5, torch.float16: 0.02, torch.bfloat16: 0.2}[dtype] * expected.abs().max()
    assert (prepared.logits(ids) - expected).abs().max() <= bound

    wanted = hugging_face_weights(plain)
    for name, tensor in hugging_face_weights(prepared).items():
        assert torch.equal(tensor, wanted[name]), name
    for name, tensor in prepared.state_dict().items():
        assert torch.equal(tensor, plain.state_dict()[name]), name
    prepared.save_pretrained(tmp_path / "new")
    loaded = Transformer.from_pretrained(tmp_path / "new")
    assert torch.equal(loaded.logits(ids), expected)


@pytest.mark.parametrize("tied", [False, True])
def test_weights_that_require_a_gradient_stay_parameters(tied):
    """An optimizer has them, whatever is made of the model before or after."""
    early, late = (tiny_model(dtype=torch.float32, tie_word_embeddings=tied) for _ in range(2))
    names = [name for name, _ in early.named_parameters()]
    early.requires_grad_(True)
    late.prepare(packing="always")
    assert len(list(late.parameters())) < len(names)
    late.requires_grad_(True)
    for model in (early, late):
        held = list(model.parameters())
        model.prepare(packing="always")
        assert [name for name, _ in model.named_parameters()] == names
        model.logits(torch.arange(30)[None], grad=True).square().sum().backward()
        assert all(parameter.grad is not None and parameter.grad.any() for parameter in held)
    late.requires_grad_(False).prepare(packing="always")
    assert all(module.weight is None for module in late.modules() if isinstance(module, Linear))


@pytest.mark.parametrize("edit", ["row", "parameter"])
def test_a_packed_head_follows_the_embedding_that_it_is_tied_to(edit):
    model, other = (tiny_model(dtype=torch.float32, tie_word_embeddings=True) for _ in range(2))
    model.prepare(packing="always")
    ids = torch.arange(30)[None]
    before = model.logits(ids)
    for one in (model, other):
        if edit == "row":
            one.embed_tokens.weight[60] += 1
        else:
            one.embed_tokens.weight = torch.nn.Parameter(one.embed_tokens.weight * 2, requires_grad=False)
    if edit == "parameter":
        other.lm_head.weight = other.embed_tokens.weight
    assert model.lm_head.weight is None
    torch.testing.assert_close(model.logits(ids), other.logits(ids), rtol=0, atol=1e-4)
    assert not torch.allclose(model.logits(ids), before, atol=1e-2)
    [greedy] = LLM(model, num_blocks=16).generate([list(range(30))], SamplingParams(temperature=0, max_tokens=1))
    assert list(greedy.outputs[0].token_ids) == [int(other.logits(ids)[0, -1].argmax())]


@pytest.mark.parametrize("strict", [False, True])
@pytest.mark.parametrize("tied", [False, True])
def test_a_packed_model_takes_a_state_dict(tied, strict):
    model, other = (tiny_model(dtype=torch.float32, seed=seed, tie_word_embeddings=tied) for seed in (0, 1))
    model.prepare(packing="always")
    model.load_state_dict(other.state_dict(), strict=strict)
    assert all(module.weight is None for module in model.modules() if isinstance(module, Linear))
    ids = torch.arange(30)[None]
    torch.testing.assert_close(model.logits(ids), other.logits(ids), rtol=0, atol=1e-4)


def test_a_quantised_model_takes_none():
    model = tiny_model(dtype=torch.float32)
    model.quantise("int8")
    with pytest.raises(RuntimeError, match=r"layers.0.self_attn.qkv_proj.weight is quantised: load the model dense"):
        model.load_state_dict(model.state_dict(), strict=False)


def test_a_cast_undoes_it():
    model = tiny_model(dtype=torch.float32, tie_word_embeddings=True)
    model.prepare(packing="always")
    model = model.double()
    assert model.lm_head.weight is model.embed_tokens.weight
    expected = tiny_model(dtype=torch.float32, tie_word_embeddings=True).double()
    ids = torch.arange(10)[None]
    assert torch.equal(model.logits(ids), expected.logits(ids))


def test_there_are_few_numbers_of_rows_that_a_kernel_is_made_for():
    sizes = [packed._kernel_rows(rows) for rows in range(8193)]
    assert all(rows <= size <= max(rows + 1, rows * 9 / 8) for rows, size in enumerate(sizes))
    assert sizes[:18] == [*range(17), 18] and sizes[2048] == 2048 and len(set(sizes)) < 100


@pytest.mark.slow
def test_kernels_by_shape_take_little_memory():
    """Half a megabyte each: a kernel for each number of rows took 700 MB."""
    script = """
import torch
from llama.model.weights.packed import OneDNNWeight
weights = [OneDNNWeight(torch.randn(96, 64 * i)) for i in (1, 2)]
def rss():
    return int(open("/proc/self/statm").read().split()[1]) * 4096
x = torch.randn(1500, 128)
before = rss()
for weight in weights:
    for rows in range(1, 1501):
        weight(x[:rows, : weight.weight.shape[1]])
print((rss() - before) >> 20)
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert int(done.stdout) < 150
