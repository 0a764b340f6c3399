"""Generation with every op in Triton's interpreter gives the tokens of generation with every op on the CPU.

Both run in this process: which of the two an op takes is looked up at each call.
"""

import pytest
import torch
from triton.runtime import interpreter

from llama import LLM, ModelConfig, SamplingParams, Transformer
from llama.kernels import ops
from llama.kernels.gpu.attention import config, prefill

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")  # infinities meet on purpose

PROMPT = [token * 37 % 500 for token in range(40)]
ASKS = [
    (PROMPT[:5], SamplingParams(temperature=0, max_tokens=6)),
    (PROMPT[:33], SamplingParams(temperature=0, max_tokens=4, repetition_penalty=1.3, logprobs=2, prompt_logprobs=1)),
    (PROMPT[3:20], SamplingParams(temperature=0.8, seed=7, max_tokens=5)),
    (PROMPT[:33], SamplingParams(temperature=1.2, top_p=0.9, top_k=200, seed=3, max_tokens=5, n=2)),
    (
        PROMPT[:9],
        SamplingParams(
            temperature=1.0,
            min_p=0.001,
            top_p=0.95,
            seed=11,
            max_tokens=5,
            min_tokens=5,
            frequency_penalty=0.4,
            presence_penalty=0.2,
            logit_bias={5: 2.0, 9: -100.0},
            logprobs=1,
            logprobs_mode="processed",
        ),
    ),
]


def _generate(dtype, asks=ASKS, **options):
    torch.manual_seed(0)
    model = Transformer(ModelConfig.preset("tiny"), dtype=dtype, seed=1)
    # A budget below the longest prompt: chunked prefill, beside decodes.
    llm = LLM(model, max_model_len=64, num_blocks=32, max_num_seqs=8, max_num_batched_tokens=24, seed=5, **options)
    prompts, params = zip(*asks, strict=True)
    outputs = llm.generate([list(prompt) for prompt in prompts], list(params), use_tqdm=False)
    return [completion for output in outputs for completion in output.outputs], outputs


def _tensors(arguments):
    for argument in arguments:
        if isinstance(argument, torch.Tensor):
            yield argument
        elif isinstance(argument, tuple):
            yield from _tensors(argument)


@pytest.fixture
def launched(monkeypatch):
    """Names of the kernels that the interpreter ran. Their tensors must begin at multiples of 16 bytes: where some do
    and some do not, as batches grow, a GPU's kernel is compiled once for each combination, while requests wait."""
    names = set()
    run = interpreter.GridExecutor.__call__

    def record(self, *args, **kwargs):
        names.add(self.fn.__name__)
        assert all(tensor.data_ptr() % 16 == 0 for tensor in _tensors((*args, *kwargs.values()))), self.fn.__name__
        return run(self, *args, **kwargs)

    monkeypatch.setattr(interpreter.GridExecutor, "__call__", record)
    return names


def test_generation_through_triton(monkeypatch, launched):
    through_triton, outputs = _generate(torch.float32)
    wanted = {"_norm_kernel", "_silu_mul_kernel", "_rope_and_store_kernel", "_prefill_kernel", "_decode_kernel"}
    wanted |= {"scan_kernel", "count_kernel", "choose_kernel", "finish_kernel", "logprob_parts_kernel"}
    assert wanted <= launched
    launched.clear()
    monkeypatch.setattr(ops, "_INTERPRETED", False)
    plain, plain_outputs = _generate(torch.float32)
    assert not launched

    assert [c.token_ids for c in through_triton] == [c.token_ids for c in plain]
    assert [c.finish_reason for c in through_triton] == [c.finish_reason for c in plain]
    for ours, theirs in zip(through_triton, plain, strict=True):
        assert (ours.logprobs is None) == (theirs.logprobs is None)
        for step, expected in zip(ours.logprobs or (), theirs.logprobs or (), strict=True):
            assert {i: entry.rank for i, entry in step.items()} == {i: entry.rank for i, entry in expected.items()}
            for token, entry in step.items():  # float32 through two layers
                assert entry.logprob == pytest.approx(expected[token].logprob, abs=2e-5)
    for ours, theirs in zip(outputs, plain_outputs, strict=True):
        assert (ours.prompt_logprobs is None) == (theirs.prompt_logprobs is None)
        for step, expected in zip(ours.prompt_logprobs or (), theirs.prompt_logprobs or (), strict=True):
            assert (step or {}).keys() == (expected or {}).keys()


@pytest.mark.slow
@pytest.mark.parametrize("block_size", [64, 128])
def test_generation_over_large_blocks_whose_keys_come_by_descriptors(block_size, monkeypatch):
    asks = [(PROMPT[:5], SamplingParams(temperature=0, max_tokens=2))]
    asks += [(PROMPT + PROMPT[::2], SamplingParams(temperature=0, max_tokens=2))]
    made, real = [], prefill._descriptors
    monkeypatch.setattr(prefill, "_descriptors", lambda *given: made.append(real(*given)) or made[-1])
    for key, tile in list(config._PREFILL.items()):
        monkeypatch.setitem(config._PREFILL, key, tile._replace(descriptors=True))
    ours, _ = _generate(torch.float32, asks, block_size=block_size)
    assert made and None not in made
    monkeypatch.setattr(ops, "_INTERPRETED", False)
    theirs, _ = _generate(torch.float32, asks)
    assert [c.token_ids for c in ours] == [c.token_ids for c in theirs]
