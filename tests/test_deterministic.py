"""With deterministic=True: the same bits alone and in any crowd, in any chunks, preempted, cached, drafted, restarted.

Logits are compared by torch.equal, and tokens and log-probabilities with them, with those of each request alone in an
engine without a prefix cache. The same matrix without the mode differs, which shows that it can.
"""

import subprocess
import sys
from dataclasses import replace
from functools import cache

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from llama import LLM
from llama.api.errors import ParameterError
from llama.api.params import SamplingParams
from llama.engine.config import EngineConfig
from llama.model.fixed_rows import fix_rows
from llama.model.interventions import Apply
from llama.model.linear import Linear
from llama.model.transformer import Transformer
from tests import drafters
from tests.deterministic_runs import ASKS, Seen, differences, run
from tests.model.models import tiny_config, tiny_model
from tests.test_equivalence import ALONE, Case

DTYPES = (torch.float32, torch.bfloat16)


@cache
def model(dtype: torch.dtype, quantization: str | None = None) -> Transformer:
    # Sizes that no vector divides, and rows enough for two threads.
    made = tiny_model(dtype=dtype, hidden_size=64, intermediate_size=172)
    if quantization is not None:
        made.quantise(quantization)
    made.prepare(packing="always")
    return made


@cache
def alone(dtype: torch.dtype, quantization: str | None = None) -> Seen:
    return run(model(dtype, quantization), Case(budget=4096, max_num_seqs=1, cache="off"))


QUICK = {
    "small chunks, preempted, poisoned": {"budget": 16, "preempt": True, "poison": True, "strangers": True},
    "warm cache, drafts, update lags": {"cache": "warm", "drafts": "mixed", "lag": 1, "block_size": 16},
}


@pytest.mark.parametrize("changes", QUICK.values(), ids=QUICK)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_bits_of_a_request_alone(dtype, changes):
    assert not differences(run(model(dtype), replace(Case(), **changes), answers=alone(dtype)), alone(dtype))


def test_without_the_mode_some_bits_differ():
    """bfloat16, and the same requests: were none to differ, the tests above would show nothing."""
    made = tiny_model(dtype=torch.bfloat16, hidden_size=64, intermediate_size=172)
    made.prepare()
    theirs, ours = (
        run(made, case, deterministic=False)
        for case in (Case(budget=4096, max_num_seqs=1, cache="off"), Case(budget=16))
    )
    assert made.fixed is None and differences(ours, theirs)


MATRIX = {
    **{name: changes for name, changes in ALONE.items() if "num_tokens" not in changes},
    "few blocks": {"num_tokens": 176},
    "blocks of 1": {"block_size": 1},
    "one block": {"block_size": 256},
    "ngram": {"drafts": "ngram"},
    "right drafts": {"drafts": "right", "budget": 300},
    "wrong drafts, preempted": {"drafts": "wrong", "preempt": True},
}


@pytest.mark.slow
@pytest.mark.parametrize("quantization", [None, "int8", "int4", "fp8"])
@pytest.mark.parametrize("dtype", [*DTYPES, torch.float16, torch.float64], ids=str)
def test_matrix(dtype, quantization):
    base = alone(dtype, quantization)
    for name, changes in MATRIX.items():
        case = replace(Case(), **changes)
        assert not differences(run(model(dtype, quantization), case, answers=base), base), name


@pytest.mark.slow
@pytest.mark.parametrize("kv_cache_dtype", ["fp8"])
def test_a_cache_in_fp8(kv_cache_dtype):
    made, options = model(torch.bfloat16), {"kv_cache_dtype": kv_cache_dtype}
    theirs = run(made, Case(budget=4096, max_num_seqs=1, cache="off"), **options)
    ours = run(made, Case(budget=16, preempt=True, cache="warm"), **options)
    assert not differences(ours, theirs)


CASES = st.builds(
    Case,
    budget=st.sampled_from([3, 7, 16, 64, 100, 4096]),
    block_size=st.sampled_from([1, 4, 16, 64]),
    max_num_seqs=st.sampled_from([1, 2, 5, 16]),
    cache=st.sampled_from(["off", "on", "warm"]),
    num_tokens=st.sampled_from([192, 256, 2048]),
    preempt=st.booleans(),
    strangers=st.booleans(),
    lag=st.integers(0, 1),
    poison=st.booleans(),
    drafts=st.sampled_from(["none", "ngram", *drafters.KINDS]),
    seed=st.integers(0, 1000),
)


@pytest.mark.slow
@settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
@given(case=CASES, dtype=st.sampled_from(DTYPES), quantization=st.sampled_from([None, None, "int8", "int4", "fp8"]))
def test_any_interleaving(case, dtype, quantization):
    base = alone(dtype, quantization)
    assert not differences(run(model(dtype, quantization), case, answers=base), base)


@pytest.mark.slow
def test_a_draft_model(tmp_path):
    """The draft model need not be deterministic: a wrong draft costs time alone."""
    tiny_model(dtype=torch.bfloat16, seed=3).save_pretrained(tmp_path / "draft")
    made = tiny_model(dtype=torch.bfloat16)
    prompts = [list(asked.prompt) for asked in ASKS]
    params = SamplingParams(temperature=1.0, seed=5, max_tokens=24, logprobs=5, ignore_eos=True)
    drafted = {"method": "draft_model", "model": str(tmp_path / "draft"), "num_speculative_tokens": 3}
    told = []
    for speculative, together in ((None, False), (None, True), (drafted, True), (drafted, False)):
        llm = LLM(made, deterministic=True, max_model_len=256, num_blocks=200, speculative_config=speculative)
        asked = [prompts] if together else [[prompt] for prompt in prompts]
        outputs = [output for some in asked for output in llm.generate(some, params, use_tqdm=False)]
        told.append([(output.outputs[0].token_ids, output.outputs[0].logprobs) for output in outputs])
    assert told[0] == told[1] == told[2] == told[3]


DIGEST = """
from hashlib import blake2b
from tests.test_deterministic import *
seen = alone(torch.bfloat16)
told = [(key, row.float().numpy().tobytes()) for key, row in sorted(seen.logits.items())]
print(blake2b(repr(told).encode()).hexdigest())
"""


@pytest.mark.slow
def test_a_restart():
    digests = {
        subprocess.run([sys.executable, "-c", DIGEST], capture_output=True, text=True, check=True).stdout
        for _ in range(2)
    }
    assert len(digests) == 1


def test_what_cannot_be_deterministic_is_refused():
    made = tiny_model(dtype=torch.float32)
    EngineConfig(deterministic=True).resolved(made.config, "cuda")
    with pytest.raises(ParameterError, match=r"^tensor_parallel_size must be 1 or 2 with deterministic, got 4$"):
        EngineConfig(deterministic=True, tensor_parallel_size=4).resolved(tiny_config(num_key_value_heads=4), "cpu")
    llm = LLM(made, deterministic=True, max_model_len=64, num_blocks=16)
    change = Apply("layers.0.resid_post", lambda x: x * 2)
    with pytest.raises(ParameterError, match=r"^interventions: deterministic=True has no Apply at layers.0.resid_post"):
        llm.generate([1, 2, 3], interventions=[change], use_tqdm=False)


def test_pieces_are_those_of_the_models_own_dtype():
    """An update of the weights looks for them again, in whatever autocast it is called."""
    found = []
    for is_on in (False, True):
        made = tiny_model(dtype=torch.float32)
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=is_on):
            fix_rows(made)
        found.append([made.fixed, *(module.pieces for module in made.modules() if isinstance(module, Linear))])
    assert found[0] == found[1]


def test_a_model_that_is_cast_or_moved_leaves_the_mode():
    made = tiny_model(dtype=torch.float32)
    fix_rows(made)
    made.to(torch.bfloat16)
    assert made.fixed is None and made.lm_head.pieces is None
