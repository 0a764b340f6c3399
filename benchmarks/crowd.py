"""How many texts are the same alone and in a crowd: of the engine, of deterministic=True, of transformers and of vLLM.

16 prompts and 40 tokens each, first one at a time, then all together among 10 other requests; "drafts" is the crowd
again with n-gram speculation. The prefix cache is emptied in between. Greedily, and at temperature 1 with a seed per
request; transformers, which has no such seed, runs greedily, alone and in one left-padded batch. The last column says
by how much the log-probability of a drawn token differs at most, as far as the texts agree.

vLLM runs in an environment of its own, from the repository's root and one dtype a process:
PYTHON -m benchmarks.crowd --engines vllm --dtypes bfloat16
"""

import argparse
import os
from collections.abc import Sequence
from itertools import takewhile
from typing import Any

import torch

from benchmarks.common import close

THINGS = ("the sea", "a clock", "rain", "an old friend", "mathematics", "bread", "the moon", "a long walk")
PROMPTS = [f"{start} {thing}" for start in ("Write a poem about", "The history of") for thing in THINGS]
OTHERS = [f"{'Once upon a time, ' * (2 * i + 1)}there was" for i in range(10)]
DRAFTS = {"method": "ngram", "num_speculative_tokens": 4, "disable_by_batch_size": 64}


class Ours:
    def __init__(self, path: str, **options: Any) -> None:
        from llama import LLM, SamplingParams

        self.params = SamplingParams
        self.llm: Any = LLM(path, max_model_len=1024, num_blocks=4096, **options)

    def alone(self, temperature: float, tokens: int) -> list[Any]:
        self.llm.reset_prefix_cache()
        return [self._generate([prompt], [i], temperature, tokens)[0] for i, prompt in enumerate(PROMPTS)]

    def crowd(self, temperature: float, tokens: int) -> list[Any]:
        self.llm.reset_prefix_cache()
        everybody = [*PROMPTS, *OTHERS]
        return self._generate(everybody, range(len(everybody)), temperature, tokens)[: len(PROMPTS)]

    def _generate(self, prompts: list[str], seeds: Sequence[int], temperature: float, tokens: int) -> list[Any]:
        same = {"max_tokens": tokens, "temperature": temperature, "logprobs": 0, "ignore_eos": True}
        params = [self.params(seed=seed + 1, **same) for seed in seeds]
        return [output.outputs[0] for output in self.llm.generate(prompts, params, use_tqdm=False)]


class VLLM(Ours):
    def __init__(self, path: str, dtype: str, **options: Any) -> None:
        os.environ |= {"VLLM_CPU_KVCACHE_SPACE": "2", "VLLM_CPU_OMP_THREADS_BIND": "nobind"}
        os.environ |= {"VLLM_LOGGING_LEVEL": "ERROR", "VLLM_ENABLE_V1_MULTIPROCESSING": "0"}
        from vllm import LLM, SamplingParams

        self.params = SamplingParams
        self.llm = LLM(path, dtype=dtype, max_model_len=1024, disable_log_stats=True, **options)


def compare(ours: Sequence[Any], others: Sequence[Any]) -> tuple[int, float]:
    """How many texts are the same; the greatest difference of log-probabilities before the texts part."""
    apart = 0.0
    for one, other in zip(ours, others, strict=True):
        pairs = zip(one.token_ids, other.token_ids, strict=True)
        same = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], pairs))
        for token, first, second in zip(one.token_ids[:same], one.logprobs, other.logprobs, strict=False):
            apart = max(apart, abs(first[token].logprob - second[token].logprob))
    return sum(a.token_ids == b.token_ids for a, b in zip(ours, others, strict=True)), apart


def padded(path: str, dtype: str, tokens: int) -> int:
    """How many of transformers' texts are the same alone and in a left-padded batch."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model: Any = AutoModelForCausalLM.from_pretrained(path, dtype=dtype)
    tokenizer = AutoTokenizer.from_pretrained(path, padding_side="left")
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    options = {"max_new_tokens": tokens, "min_new_tokens": tokens, "do_sample": False, "pad_token_id": 0}
    together = tokenizer(PROMPTS, return_tensors="pt", padding=True)
    batch = model.generate(**together, **options)[:, -tokens:]
    single = [model.generate(**tokenizer(p, return_tensors="pt"), **options)[0, -tokens:] for p in PROMPTS]
    return sum(torch.equal(a, b) for a, b in zip(batch, single, strict=True))


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="checkpoints/smollm2-135m-instruct")
    parser.add_argument("--device", default="cpu", help="of ours")
    parser.add_argument("--dtypes", nargs="+", default=["float32", "bfloat16"])
    parser.add_argument("--tokens", type=int, default=40)
    parser.add_argument(
        "--engines", nargs="+", choices=["ours", "transformers", "vllm"], default=["ours", "transformers"]
    )
    given = parser.parse_args(arguments)

    results: dict[str, dict[str, float]] = {}

    def tell(name: str, same: int, apart: float | None = None) -> None:
        results[name] = {"same": same, **({} if apart is None else {"apart": apart})}
        behind = "" if apart is None else f"   log-probabilities at most {apart:.1e} apart"
        print(f"{name:45} {same:2} of {len(PROMPTS)}{behind}", flush=True)

    def run(name: str, engine: Ours, drafting: Ours | None = None) -> None:
        for how, temperature in (("greedy", 0.0), ("seeded", 1.0)):
            single = engine.alone(temperature, given.tokens)
            tell(f"{name} {how} crowd", *compare(single, engine.crowd(temperature, given.tokens)))
            if drafting is not None:
                tell(f"{name} {how} crowd, drafts", *compare(single, drafting.crowd(temperature, given.tokens)))

    for dtype in given.dtypes:
        if "ours" in given.engines:
            for mode in (False, True):
                options = {"device": given.device, "dtype": dtype, "deterministic": mode}
                drafting = Ours(given.model, speculative_config=DRAFTS, **options)
                run(f"{dtype} {'deterministic' if mode else 'ours'}", Ours(given.model, **options), drafting)
        if "vllm" in given.engines:
            drafts = {"method": "ngram", "num_speculative_tokens": 4, "prompt_lookup_max": 4}
            run(f"{dtype} vllm", VLLM(given.model, dtype), VLLM(given.model, dtype, speculative_config=drafts))
        if "transformers" in given.engines:
            tell(f"{dtype} transformers greedy batch", padded(given.model, dtype, given.tokens))
    close("crowd", results=results, requests=len(PROMPTS), others=len(OTHERS), tokens=given.tokens)


if __name__ == "__main__":
    main()
