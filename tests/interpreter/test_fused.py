"""Products fused with a norm, SwiGLU or a residual: the bits of the kernels one after another, in the interpreter.

Numbers are whole where that is what makes a sum the same in any order: the interpreter's dot is NumPy's, in which a
place shows, and a norm's squares are added in another order than in the kernel of its own.
"""

from dataclasses import replace

import pytest
import torch

from llama import SamplingParams
from llama.engine import graph_runner
from llama.engine.config import EngineConfig
from llama.engine.memory import fitting_blocks, make_kv_cache
from llama.engine.runner import Runner
from llama.kernels import ops
from llama.kernels.gpu import attention, matmul
from llama.kernels.gpu.attention import decode
from llama.kernels.gpu.fused import Fused
from llama.kernels.gpu.launch import Kinds
from llama.kernels.gpu.matmul import dense_matmul, fused_matmul
from llama.kernels.types import QuantizedWeight
from llama.model.adapters import LoraStack
from llama.model.fused import FusedBlock, fuse
from tests.engine.fakes import add
from tests.engine.test_graphs import Stand, graph_engine, run
from tests.interpreter.test_matmul import made
from tests.model.models import tiny_model
from tests.test_equivalence import Case

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")  # rows that no token has are 0 / 0 where eps is 0

WAYS = {"dense": (36, 600, 600), "int8": (70, 300, 300), "int4": (70, 512, 128), "fp8": (70, 512, 128)}


def whole(generator, *shape, most=4):
    return torch.randint(-most, most + 1, shape, generator=generator).float()


def weight_of(way, dtype):
    """Whole numbers, and scales that are powers of two."""
    rows, columns, size = WAYS[way]
    if way == "dense":
        return whole(torch.Generator().manual_seed(0), rows, columns).to(dtype)
    weight = made(way, rows, columns, size)
    if way != "int4":
        codes = whole(torch.Generator().manual_seed(0), rows, columns).to(weight.codes.dtype)
        weight = QuantizedWeight(codes, weight.scales, size)
    scales = 2.0 ** torch.randint(-5, -3, weight.scales.shape, generator=torch.Generator().manual_seed(1))
    return QuantizedWeight(weight.codes, scales, size)


def one_after_another(x, weight, fused):
    if fused.norm is not None:
        x = ops.rms_norm(x, fused.norm, fused.eps)
    is_dense = isinstance(weight, torch.Tensor)  # whose tile is another then
    y = fused_matmul(x, weight, Fused()) if is_dense else ops.quantized_matmul(x, weight)
    if fused.swiglu:
        y = ops.silu_mul(y)
    if fused.residual is not None:
        y = ops.add_rms_norm(y, fused.residual, torch.ones(y.shape[1], dtype=y.dtype), 1e-5)[1]
    return y


# Whole sums in float32 and split ones in float16 are quick; the other pairs are the same code.
SLOW_PAIR = pytest.mark.slow


@pytest.mark.parametrize(
    ("processors", "dtype"),
    [
        (1, torch.float32),
        (4, torch.float16),
        pytest.param(1, torch.float16, marks=SLOW_PAIR),
        pytest.param(4, torch.float32, marks=SLOW_PAIR),
    ],
    ids=str,
)
@pytest.mark.parametrize("way", WAYS)
def test_bits_are_those_of_kernels_one_after_another(way, processors, dtype, monkeypatch):
    monkeypatch.setattr(matmul, "multiprocessor_count", lambda device: processors)  # with more of them K is split
    generator = torch.Generator().manual_seed(2)
    weight, (rows, columns, _) = weight_of(way, dtype), WAYS[way]
    x = whole(generator, 20, columns).to(dtype)
    norm = torch.rand(columns, generator=generator).to(dtype)
    residual = torch.randn(20, rows, generator=generator).to(dtype)
    signs = (whole(generator, 20, columns, most=1).sign() * 2 + 1).sign().mul(2).to(dtype)  # their rms is exact
    powers = (2.0 ** whole(generator, columns, most=1)).to(dtype)
    cases = (
        (x, Fused()),
        (x, Fused(residual=residual)),
        (x, Fused(norm=norm, eps=1e-5, residual=residual)),
        (x / 8, Fused(swiglu=True)),
        (x / 8, Fused(swiglu=True, residual=residual[:, ::2].contiguous())),
        (signs, Fused(norm=powers, swiglu=True)),
    )
    for values, fused in cases:
        expected = one_after_another(values, weight, fused)
        assert expected.isfinite().all() and expected.unique().numel() > 20
        assert torch.equal(fused_matmul(values, weight, fused), expected)
    if way == "dense":
        assert torch.equal(fused_matmul(x, weight, Fused()), dense_matmul(x, weight))


@pytest.mark.usefixtures("row_by_row")
@pytest.mark.parametrize("processors", [1, 4])
@pytest.mark.parametrize("dtype", [torch.float32, pytest.param(torch.float16, marks=SLOW_PAIR)], ids=str)
def test_rows_have_the_same_bits_in_any_number(dtype, processors, monkeypatch):
    monkeypatch.setattr(matmul, "multiprocessor_count", lambda device: processors)
    generator = torch.Generator().manual_seed(0)
    x, weight = (torch.randn(count, 1030, generator=generator).to(dtype) for count in (40, 36))
    norm, residual = torch.rand(1030, generator=generator).to(dtype), torch.randn(40, 18, generator=generator).to(dtype)

    def product(rows):
        return fused_matmul(x[rows], weight, Fused(norm=norm, eps=1e-5, residual=residual[rows], swiglu=True))

    y = product(slice(0, 40))
    expected = one_after_another(x, weight, Fused(norm=norm, eps=1e-5, residual=residual, swiglu=True))
    torch.testing.assert_close(y, expected, rtol=0, atol=2e-5 if dtype == torch.float32 else 0.5)
    for rows in (slice(0, 1), slice(3, 20), slice(39, 40)):
        assert torch.equal(product(rows), y[rows])


def test_nothing_and_what_does_not_fit():
    weight = torch.ones(8, 16)
    assert fused_matmul(torch.empty(0, 16), weight, Fused(swiglu=True)).shape == (0, 4)
    with pytest.raises(ValueError, match="fused_matmul: at most 64 tokens, got 65"):
        fused_matmul(torch.ones(65, 16), made("int8", 8, 16, 16), Fused())
    with pytest.raises(ValueError, match=r"residual must be \[2, 4\] of x's dtype, got \[2, 8\]"):
        fused_matmul(torch.ones(2, 16), weight, Fused(residual=torch.ones(2, 8), swiglu=True))
    with pytest.raises(ValueError, match=r"norm must be \[16\] of x's dtype, got \[16\]"):
        fused_matmul(torch.ones(2, 16), weight, Fused(norm=torch.ones(16, dtype=torch.float16)))
    with pytest.raises(ValueError, match="7 rows are not a gate and an up"):
        fused_matmul(torch.ones(2, 16), weight[:7], Fused(swiglu=True))


IDS = torch.tensor([[1, 5, 7, 9, 11]])


def fused_model(**options):
    """-> a model of one layer, and a list of what it multiplies in fused products."""
    model, seen = tiny_model(dtype=torch.float32, num_hidden_layers=1, **options), []
    fuse(model)

    def product(x, weight, fused):
        seen.append(weight)
        return fused_matmul(x, weight, fused)

    for layer in model.layers:
        layer.fused._multiply = product
    return model, seen


@pytest.mark.parametrize("quantization", [None, "int8"])
def test_a_model_computes_the_same(quantization):
    (model, seen), plain = fused_model(), tiny_model(dtype=torch.float32, num_hidden_layers=1)
    for each in (model, plain):
        if quantization is not None:
            each.quantise(quantization)
    torch.testing.assert_close(model.logits(IDS), plain.logits(IDS), rtol=2e-5, atol=2e-5)
    assert len(seen) == 4


def test_what_is_more_than_a_weight_or_more_than_few_tokens_goes_the_usual_way():
    model, seen = fused_model()
    (layer,) = model.layers
    plain = tiny_model(dtype=torch.float32, num_hidden_layers=1)
    many = torch.arange(65)[None]
    assert torch.equal(model.logits(many), plain.logits(many))
    handle = layer.mlp.register_forward_hook(lambda *_: None)
    expected = plain.logits(IDS)
    assert torch.equal(model.logits(IDS), expected)
    handle.remove()
    layer.mlp.down_proj.finish = lambda y: y
    assert torch.equal(model.logits(IDS), expected)
    layer.mlp.down_proj.finish = None
    assert not seen
    model.logits(IDS)
    assert len(seen) == 4
    biased, seen = fused_model(attention_bias=True)
    biased.logits(IDS)
    assert not seen


def test_a_later_engine_without_the_flag_computes_the_usual_way():
    model, seen = fused_model()
    config = EngineConfig(max_model_len=64, max_num_seqs=1, num_blocks=4)
    Runner(model, make_kv_cache(model, config, 4), config)
    plain = tiny_model(dtype=torch.float32, num_hidden_layers=1)
    assert torch.equal(model.logits(IDS), plain.logits(IDS)) and not seen
    fitting_blocks(model, replace(config, fused_decode=True, num_blocks=None))  # so that what it measures is warmed
    assert isinstance(model.layers[0].fused, FusedBlock)


def test_a_step_with_an_adapter_or_taps_is_the_usual_one():
    model, seen = fused_model()
    plain, results = tiny_model(dtype=torch.float32, num_hidden_layers=1), {}
    for each in (model, plain):
        linear, stack = each.layers[0].mlp.down_proj, LoraStack((0, 48), is_embedding=False)
        generator = torch.Generator().manual_seed(0)
        stack.reserve(1, linear.in_features, 4, linear.weight)
        a, b = torch.randn(4, linear.in_features, generator=generator), torch.randn(48, 4, generator=generator)
        stack.put(1, 0, a, b)
        results[each] = [each.logits(IDS, {linear: stack}, torch.tensor([index])) for index in (1, 0)]
        logits, cache = each.run_with_cache(IDS, "layers.0.resid_post", logits=True)
        results[each] += [logits, cache["layers.0.resid_post"]]
    assert not seen
    assert all(map(torch.equal, results[model], results[plain]))
    assert not torch.equal(*results[plain][:2])


@pytest.mark.slow
@pytest.mark.parametrize("drafts", ["none", "ngram"])
def test_recorded_steps_and_eager_ones_draw_the_usual_tokens(drafts, monkeypatch):
    for module in (attention, decode):  # else there is room in 16 bits alone
        monkeypatch.setattr(module, "has_room", lambda *shape, is_e4m3: True)
        monkeypatch.setattr(decode, "_KINDS", Kinds())
    monkeypatch.setattr(graph_runner, "bucket_of", lambda count: -(-count // 8) * 8)
    told = []
    for is_fused, stand in ((False, None), (True, None), (True, Stand())):
        model = tiny_model(dtype=torch.float32)
        engine = graph_engine(
            Case(lag=1, max_num_seqs=4, num_tokens=64, drafts=drafts), stand, model, fused_decode=is_fused
        )
        for i in range(3):
            add(
                engine,
                f"{i}",
                [i + 1, 5, 7, 5, 7],
                SamplingParams(temperature=i / 2, seed=i, max_tokens=4, ignore_eos=True),
            )
        told.append(run(engine))
    assert told[0] == told[1] == told[2]
