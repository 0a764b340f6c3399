"""deterministic=True through Triton's kernels: what tests/test_deterministic.py shows of the CPU's, on a short matrix.

The interpreter's products are made row by row, as a GPU's matrix instructions compute them. Everything else, dense
products too, is what a GPU would be asked to do.
"""

import threading
from dataclasses import replace
from functools import cache

import pytest
import torch
import torch.nn.functional as F
from triton.runtime import interpreter

from llama import SamplingParams
from llama.engine import graph_runner, memory
from llama.engine.config import EngineConfig
from llama.kernels.cpu.pieces import Pieces
from llama.kernels.exact_pieces import ExactPieces
from llama.kernels.gpu import attention
from llama.kernels.gpu.matmul import dense_matmul
from llama.kernels.types import Runs
from llama.model import fixed_rows
from llama.model.linear import Linear
from llama.model.weights import int8
from tests.deterministic_runs import Seen, differences, run
from tests.engine.test_graphs import Stand
from tests.model.models import tiny_model
from tests.parallel.ranks import engine_on_ranks
from tests.test_equivalence import Case, ask

pytestmark = [
    pytest.mark.filterwarnings("ignore::RuntimeWarning"),  # infinities meet on purpose
    pytest.mark.usefixtures("row_by_row"),
]

DTYPES = (torch.float32, torch.float16)
ASKS = (
    ask(0, 1, temperature=0, logprobs=2, max_tokens=7, ignore_eos=True),
    ask(18, 3, temperature=0, max_tokens=5, ignore_eos=True, prompt_logprobs=1),
    ask(17, 2, n=2, temperature=1.0, top_p=0.9, frequency_penalty=0.5, max_tokens=3, ignore_eos=True),
)


@cache
def model(dtype: torch.dtype, quantization: str | None = None):
    made = tiny_model(dtype=dtype, num_attention_heads=2, num_key_value_heads=1)
    if quantization is not None:
        made.quantise(quantization)
    return made


@cache
def alone(dtype: torch.dtype, quantization: str | None = None) -> Seen:
    return run(model(dtype, quantization), Case(budget=4096, max_num_seqs=1, cache="off"), ASKS, max_model_len=64)


CASES = {
    "recorded, drafts, small chunks, poisoned": {"drafts": "mixed", "lag": 1, "budget": 11, "poison": True},
    "small chunks, preempted, poisoned": {"budget": 11, "preempt": True, "poison": True},
    "recorded, drafts, warm cache": {"cache": "warm", "drafts": "mixed", "lag": 1, "block_size": 16},
    "recorded, preempted": {"preempt": True, "budget": 16},
    "drafts, neighbours aborted": {"drafts": "mixed", "strangers": True, "lag": 1},
    "few blocks of one": {"block_size": 1, "num_tokens": 56},
}


def check(dtype: torch.dtype, name: str, monkeypatch, quantization: str | None = None) -> None:
    monkeypatch.setattr(graph_runner, "bucket_of", lambda count: -(-count // 8) * 8)  # recorded steps have padding
    monkeypatch.setattr(attention, "prefill_attention", None)  # its chunks depend on the crowd
    stand = Stand() if "recorded" in name else None
    case = replace(Case(max_num_seqs=4), **CASES[name])
    made, base = model(dtype, quantization), alone(dtype, quantization)
    seen = run(made, case, ASKS, answers=base, record=stand, max_model_len=64)
    assert isinstance(made.fixed, Runs)
    assert not differences(seen, base)
    assert stand is None or stand.num_replays > 2


def test_bits_of_a_request_alone(monkeypatch):
    check(torch.float32, next(iter(CASES)), monkeypatch)


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_matrix(dtype, name, monkeypatch):
    check(dtype, name, monkeypatch)


@pytest.mark.slow
@pytest.mark.parametrize("quantization", ["int8", "int4", "fp8"])
def test_quantised(quantization, monkeypatch):
    check(torch.float16, next(iter(CASES)), monkeypatch, quantization)


def assert_rows_agree(linear: Linear) -> None:
    x = torch.randn(70, linear.in_features, generator=torch.Generator().manual_seed(2))
    y = linear(x)
    for start, stop in ((0, 1), (3, 68), (69, 70)):
        assert torch.equal(linear(x[start:stop]), y[start:stop])


def test_products_with_codes_are_made_of_pieces_that_the_kernel_computes_alike():
    linear = Linear(40, 24, device="cpu", dtype=torch.float32)
    linear.take(fixed_rows.Quantised(int8.quantise(torch.randn(24, 40)), torch.float32))
    linear.pieces, linear.multiply = fixed_rows._way_on_triton(linear)
    assert linear.pieces == Pieces(1, 64)
    assert_rows_agree(linear)


def test_dense_products_are_the_librarys_where_its_rows_agree_and_else_our_kernels(monkeypatch):
    linear = Linear(40, 24, bias=True, device="cpu", dtype=torch.float32)
    for parameter in linear.parameters():
        parameter.normal_(generator=torch.Generator().manual_seed(1))
    linear.pieces, linear.multiply = fixed_rows._way_on_triton(linear)
    assert isinstance(linear.pieces, ExactPieces) and linear.multiply is F.linear
    assert_rows_agree(linear)
    monkeypatch.setattr(fixed_rows, "find_exact", lambda product, x: None)
    linear.pieces, linear.multiply = fixed_rows._way_on_triton(linear)
    assert linear.pieces == Pieces(1, 64) and linear.multiply is dense_matmul
    assert_rows_agree(linear)
    linear.to(torch.float16)
    assert linear.pieces is None and linear.multiply is F.linear


@pytest.mark.parametrize("is_decode", [False, True])
def test_the_worst_step_runs(is_decode, monkeypatch):
    monkeypatch.setattr(memory, "num_scored_rows", lambda *_: 2)
    made = tiny_model(dtype=torch.float32, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=1)
    made.fixed = Runs.of(2)
    memory.worst_step(
        made, EngineConfig(max_model_len=64, max_num_batched_tokens=33, max_num_seqs=2), is_decode=is_decode
    )


@pytest.mark.slow
def test_two_ranks_give_the_same_bits_alone_and_in_a_crowd(tmp_path, monkeypatch):
    """On gloo, as threads of this process; the interpreter runs one launch at a time."""
    lock, launch = threading.Lock(), interpreter.GridExecutor.__call__

    def alone_in_the_interpreter(*arguments, **named):
        with lock:
            return launch(*arguments, **named)

    monkeypatch.setattr(interpreter.GridExecutor, "__call__", alone_in_the_interpreter)
    tiny_model(dtype=torch.float32).save_pretrained(tmp_path)
    config = EngineConfig(
        max_model_len=64, max_num_batched_tokens=13, max_num_seqs=4, num_blocks=40, block_size=4,
        tensor_parallel_size=2, deterministic=True, enable_prefix_caching=False,
    )  # fmt: skip
    params = [SamplingParams(temperature=1.0, seed=i, max_tokens=3, logprobs=2, ignore_eos=True) for i in range(3)]

    def told(engine, numbers):
        found = {number: [] for number in numbers}
        for i in numbers:
            engine.add(engine.request(str(i), [(7 * i + j) % 97 for j in range(3 + 9 * i)], params[i]))
        while engine.has_unfinished:
            for output in engine.step():
                found[int(output.request_id)] += [*output.token_ids, *output.logprobs]
        return found

    with engine_on_ranks(tmp_path, config, dtype="float32") as engine:
        crowd = told(engine, range(3))
        assert all(told(engine, [number])[number] == crowd[number] for number in range(3))
        assert isinstance(engine.model.fixed, Runs)
