"""Every kernel of the sampler over the vocabularies of Llama 3.1 and SmolLM2, and the log-probabilities of prompts.

Which rules a call has is an argument of the kernels, not a constant. But where a rule changes logits, all kernels but
the first read them in float32, otherwise as they came.
"""

from collections.abc import Iterator

import torch

from llama.kernels.gpu.sampling import sample, token_logprobs
from llama.kernels.types import SamplerState
from tests.compile.harness import Case
from tests.sampling_rows import make_rows

EVERYTHING = {"top_k": 50, "top_p": 0.9, "penalty_row": 0, "bias": {1: 1.0}, "allowed": [1], "logprobs": "processed"}


def _sample(vocab: int, dtype: torch.dtype, rules: dict) -> object:
    rows = make_rows([rules] * 8, vocab, num_logprobs=20, device="meta")
    return sample(torch.empty(8, vocab, dtype=dtype, device="meta"), rows, SamplerState(8, vocab, "meta"))


def _token_logprobs(vocab: int, dtype: torch.dtype) -> object:
    token_ids = torch.empty(64, dtype=torch.int64, device="meta")
    return token_logprobs(torch.empty(64, vocab, dtype=dtype, device="meta"), token_ids, 20)


def cases() -> Iterator[Case]:
    readers = ("scan_kernel", "count_kernel", "choose_kernel", "logprob_parts_kernel")
    for name, rules in (("everything", EVERYTHING), ("top_k", {"top_k": 50})):
        call = (128_256, torch.bfloat16, rules)
        yield Case(f"sample {name} 128256 bfloat16", lambda call=call: _sample(*call), wide_loads=readers)
    yield Case("token_logprobs 128256 bfloat16", lambda: _token_logprobs(128_256, torch.bfloat16), wide_loads=readers)
