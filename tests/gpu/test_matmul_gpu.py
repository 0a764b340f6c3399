"""Products with codes on a GPU against float64, a row's bits in any company, and quantised models in an engine.

Random weights in every kind of codes that checkpoints have, among them the matrices of Llama 3.1 8B and 70B.
"""

import pytest
import torch

from benchmarks.op_workloads import MATRICES
from benchmarks.random_models import KINDS, cut_preset, random_model, random_weight
from llama import SamplingParams
from llama.kernels import ops
from llama.kernels.cpu.matmul import widen
from llama.model.transformer import Transformer
from llama.model.weights.quantised import SCHEMES
from tests.engine import fakes
from tests.gpu.engines import engine, poison, run
from tests.model.models import tiny_config, tiny_model
from tests.test_equivalence import Case

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")]

DEVICE = "cuda"
# ||y - answer|| / ||answer||. 16 bits: y is rounded once. float32: sums of some thousand terms.
BUDGET = {torch.bfloat16: 2**-8, torch.float16: 2**-11, torch.float32: 5e-6}


def made(kind, shape, tokens, dtype):
    x = torch.randn(tokens, shape[1], generator=torch.Generator(DEVICE).manual_seed(1), device=DEVICE).to(dtype)
    return x, random_weight(KINDS[kind], shape, device=DEVICE, dtype=dtype, seed=0)


def check(x, weight, rows=slice(None)):
    y = ops.quantized_matmul(x, weight)
    assert y.dtype == x.dtype and y.shape == (x.shape[0], weight.shape[0])
    expected = x.double() @ widen(weight, rows).double().T
    error = ((y[:, rows].double() - expected).norm() / expected.norm()).item()
    assert error <= BUDGET[x.dtype], f"relative error {error:.2e}"  # NaN fails
    return y


@pytest.mark.parametrize("dtype", BUDGET, ids=str)
@pytest.mark.parametrize("shape", [(64, 512), (200, 576), (3072, 1536)], ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_error_budget(kind, shape, dtype):
    for tokens in (1, 3, 17, 64, 65, 300):
        check(*made(kind, shape, tokens, dtype))


@pytest.mark.parametrize("shape", MATRICES["8B"] + MATRICES["70B"], ids=str)
@pytest.mark.parametrize("scheme", SCHEMES)
def test_matrices_of_8b_and_70b(scheme, shape):
    x, weight = made(scheme, shape, 2048, torch.bfloat16)
    for tokens in (1, 16, 64, 2048):
        check(x[:tokens], weight)


@pytest.mark.parametrize("shape", [(4096, 4096), (4096, 14336), (28672, 4096)], ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_a_row_has_the_same_bits_in_any_company_of_up_to_64(kind, shape):
    """K of the first two is split among programs."""
    x, weight = made(kind, shape, 64, torch.bfloat16)
    together = check(x, weight)
    for count in (1, 2, 15, 16, 17, 33):
        assert torch.equal(ops.quantized_matmul(x[-count:], weight), together[-count:])
    order = torch.randperm(64, device=DEVICE)
    assert torch.equal(ops.quantized_matmul(x[order], weight), together[order])


@pytest.mark.parametrize(("scheme", "shape"), [("int8", (70_000, 32_768)), ("int4", (270_000, 32_768))])
def test_offsets_beyond_32_bits(scheme, shape):
    x, weight = made(scheme, shape, 3, torch.bfloat16)
    assert weight.codes.numel() > 1 << 31
    check(x, weight, slice(shape[0] - 40, shape[0]))


@pytest.mark.parametrize("kind", KINDS)
def test_strided_rows_and_no_rows(kind):
    x, weight = made(kind, (256, 512), 12, torch.bfloat16)
    assert torch.equal(ops.quantized_matmul(x[::2], weight), ops.quantized_matmul(x[::2].contiguous(), weight))
    assert ops.quantized_matmul(x[:0], weight).shape == (0, 256)


@pytest.mark.parametrize("kind", KINDS)
def test_a_graph_replays_it(kind):
    """With the workspace of its splits."""
    x, weight = made(kind, (1024, 4096), 8, torch.bfloat16)
    ops.quantized_matmul(x, weight)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = ops.quantized_matmul(x, weight)
    for _ in range(2):
        x.normal_()
        graph.replay()
        assert torch.equal(y, ops.quantized_matmul(x, weight))


@pytest.mark.parametrize("scheme", SCHEMES)
def test_logits_of_a_model_in_codes(scheme):
    model, ids = tiny_model(dtype=torch.float32, hidden_size=128, intermediate_size=256), torch.arange(80)[None]
    model.quantise(scheme)
    expected = model.double().logits(ids)
    actual = model.float().to(DEVICE).logits(ids.to(DEVICE))
    torch.testing.assert_close(actual.cpu().double(), expected, rtol=1e-4, atol=1e-4 * expected.abs().max().item())


@pytest.mark.parametrize("scheme", SCHEMES)
def test_a_folder_takes_its_own_bytes(scheme, tmp_path):
    sizes = {"hidden_size": 1024, "intermediate_size": 4096, "num_attention_heads": 8, "head_dim": 128}
    config = tiny_config(**sizes, num_hidden_layers=8, vocab_size=4000)
    random_model(config, scheme, device="cpu", dtype=torch.bfloat16).save_pretrained(tmp_path / "folder")
    size = sum(path.stat().st_size for path in (tmp_path / "folder").glob("*.safetensors"))
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    model = Transformer.from_pretrained(tmp_path / "folder", device=DEVICE)
    model.prepare()
    assert model.layers[0].mlp.down_proj.coded is not None
    assert torch.cuda.max_memory_allocated() - before <= 1.05 * size


@pytest.mark.parametrize("cache", ["auto", "fp8"])
@pytest.mark.parametrize("context", [1024, 131_072])
@pytest.mark.parametrize(
    ("preset", "scheme"),
    [("8b", "int4"), ("8b", "int8"), ("8b", "fp8"), ("70b", "fp8"), ("70b", "int4")],
)
def test_layers_of_8b_and_70b_in_an_engine(preset, scheme, context, cache):
    """Recorded and launched kernel by kernel, over a cache that holds garbage: the same tokens."""
    config = cut_preset(f"llama-3.1-{preset}", layers=1, vocab_size=4003)
    model, told = random_model(config, scheme, device=DEVICE, dtype=torch.bfloat16), []
    generator = torch.Generator().manual_seed(0)
    prompt = torch.randint(0, 4003, (context - 24,), generator=generator).tolist()
    for eager in (False, True):
        options = {"max_model_len": context, "max_num_batched_tokens": 8192, "num_blocks": context // 16}
        case = Case(max_num_seqs=2, lag=1, block_size=16)
        running = engine(model, case, enforce_eager=eager, kv_cache_dtype=cache, **options)
        running.runner.kv.data.fill_(0x7F if cache == "fp8" else float("nan"))
        params = SamplingParams(max_tokens=24, temperature=0, ignore_eos=True, logprobs=0)
        fakes.add(running, "long", prompt, params)
        told.append(run(running, lambda running=running: poison(running))["long", 0])
    assert told[0] == told[1]
    tokens, logprobs = told[0]
    assert len(tokens) == 24
    assert all(-100 < entry[token].logprob <= 0 for token, entry in zip(tokens, logprobs, strict=True))
