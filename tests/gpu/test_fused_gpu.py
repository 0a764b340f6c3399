"""fused_decode=True on a GPU: kernels that begin before the one in front has ended write the usual tokens, eager and
recorded, and the same bits in every run."""

import pytest
import torch

from tests.gpu.engines import check_tokens, engine, poison, run, small, tiny
from tests.gpu.test_runner_gpu import KINDS, add, crowd
from tests.test_equivalence import Case

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")]


@pytest.mark.parametrize("eager", [False, True])
@pytest.mark.parametrize("lag", [0, 1])
def test_tokens_are_those_of_float64_without_a_cache(lag, eager):
    """Prompts in chunks, mixed steps, neighbours that leave; a cache and tensors that hold garbage."""
    case = Case(lag=lag, poison=True, strangers=True)
    made = engine(tiny(), case, enforce_eager=eager, fused_decode=True)
    made.runner.kv.data.fill_(float("nan"))
    check_tokens(made, case)


@pytest.mark.parametrize("eager", [False, True])
@pytest.mark.parametrize(("scheme", "head_dim"), [(None, 64), (None, 128), ("int8", 128), ("int4", 128), ("fp8", 128)])
def test_every_run_has_the_same_bits(scheme, head_dim, eager):
    """A kernel that began too early would read what an earlier step, or another run, left there."""
    model, told = small(num_hidden_layers=4, head_dim=head_dim), []
    if scheme is not None:
        model.quantise(scheme)
    for _ in range(2):
        made = engine(model, Case(max_num_seqs=16, budget=512, lag=1), enforce_eager=eager, fused_decode=True)
        made.runner.kv.data.fill_(float("nan"))
        add(made, crowd(11, max_tokens=40, kinds=tuple(name for name in KINDS if name != "bias")))
        told.append(run(made, lambda made=made: poison(made)))
    assert told[0] == told[1]


def test_contexts_in_chunks():
    """Partial sums of a long context are merged within the chain."""
    told = []
    for fused in (False, True):
        model = small(num_hidden_layers=2).float()
        options = {"max_model_len": 4096, "max_num_batched_tokens": 2048, "block_size": 16, "num_blocks": 512}
        made = engine(model, Case(max_num_seqs=2, lag=1), fused_decode=fused, **options)
        made.runner.kv.data.fill_(float("nan"))
        add(made, [(prompt * 75, params) for prompt, params in crowd(2, max_tokens=20, kinds=("greedy",))])
        told.append({key: tokens for key, (tokens, _) in run(made, lambda made=made: poison(made)).items()})
    assert told[0] == told[1]
