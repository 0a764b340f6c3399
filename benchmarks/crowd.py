"""How many texts are the same alone and in a crowd: of the engine, of deterministic=True, and of transformers.

16 prompts over 40 tokens each, first one at a time, then all together among 10 other requests; "drafts" is the crowd
again with n-gram speculation. The prefix cache is emptied in between. Ours runs greedily and at temperature 1 with a
seed per request; transformers, which has no seed per request, runs greedily, alone and in one left-padded batch. The
last columns say by how much the log-probability of a drawn token differs at most, as far as the texts agree.
"""

import argparse
from collections.abc import Sequence
from itertools import takewhile

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from benchmarks.common import close
from llama import LLM, CompletionOutput, SamplingParams

THINGS = ("the sea", "a clock", "rain", "an old friend", "mathematics", "bread", "the moon", "a long walk")
PROMPTS = [f"{start} {thing}" for start in ("Write a poem about", "The history of") for thing in THINGS]
OTHERS = [f"{'Once upon a time, ' * (2 * i + 1)}there was" for i in range(10)]
DRAFTS = {"method": "ngram", "num_speculative_tokens": 4, "disable_by_batch_size": 64}


def params_of(index: int, temperature: float, tokens: int) -> SamplingParams:
    return SamplingParams(max_tokens=tokens, temperature=temperature, seed=index + 1, logprobs=0, ignore_eos=True)


def alone(llm: LLM, temperature: float, tokens: int) -> list[CompletionOutput]:
    llm.reset_prefix_cache()
    params = [params_of(i, temperature, tokens) for i in range(len(PROMPTS))]
    return [llm.generate(p, own, use_tqdm=False)[0].outputs[0] for p, own in zip(PROMPTS, params, strict=True)]


def crowd(llm: LLM, temperature: float, tokens: int) -> list[CompletionOutput]:
    llm.reset_prefix_cache()
    everybody = [*PROMPTS, *OTHERS]
    params = [params_of(i, temperature, tokens) for i in range(len(everybody))]
    return [output.outputs[0] for output in llm.generate(everybody, params, use_tqdm=False)[: len(PROMPTS)]]


def compare(ours: Sequence[CompletionOutput], others: Sequence[CompletionOutput]) -> tuple[int, float]:
    """How many texts are the same; the greatest difference of log-probabilities before the texts part."""
    apart = 0.0
    for one, other in zip(ours, others, strict=True):
        pairs = zip(one.token_ids, other.token_ids, strict=True)
        same = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], pairs))
        for token, first, second in zip(one.token_ids[:same], one.logprobs, other.logprobs, strict=False):
            apart = max(apart, abs(first[token].logprob - second[token].logprob))
    return sum(a.token_ids == b.token_ids for a, b in zip(ours, others, strict=True)), apart


def theirs(path: str, dtype: str, tokens: int) -> int:
    """How many of transformers' texts are the same alone and in a batch."""
    model = AutoModelForCausalLM.from_pretrained(path, dtype=dtype).eval()
    tokenizer = AutoTokenizer.from_pretrained(path, padding_side="left")
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    options = {"max_new_tokens": tokens, "min_new_tokens": tokens, "do_sample": False, "pad_token_id": 0}
    together = tokenizer(PROMPTS, return_tensors="pt", padding=True)
    with torch.inference_mode():
        batch = model.generate(**together, **options)[:, -tokens:]
        single = [model.generate(**tokenizer(p, return_tensors="pt"), **options)[0, -tokens:] for p in PROMPTS]
    return sum(torch.equal(a, b) for a, b in zip(batch, single, strict=True))


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="checkpoints/smollm2-135m-instruct")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtypes", nargs="+", default=["float32", "bfloat16"])
    parser.add_argument("--tokens", type=int, default=40)
    parser.add_argument("--no-peers", action="store_true", help="without transformers")
    given = parser.parse_args(arguments)

    results: dict[str, dict[str, float]] = {}

    def tell(name: str, same: int, apart: float | None = None) -> None:
        results[name] = {"same": same, **({} if apart is None else {"apart": apart})}
        behind = "" if apart is None else f"   log-probabilities at most {apart:.1e} apart"
        print(f"{name:45} {same:2} of {len(PROMPTS)}{behind}", flush=True)

    for dtype in given.dtypes:
        for mode in (False, True):
            options = {"device": given.device, "dtype": dtype, "deterministic": mode, "max_model_len": 1024}
            llm = LLM(given.model, num_blocks=4096, **options)
            drafting = LLM(given.model, num_blocks=4096, speculative_config=DRAFTS, **options)
            for temperature in (0.0, 1.0):
                single = alone(llm, temperature, given.tokens)
                for name, engine in (("crowd", llm), ("crowd, drafts", drafting)):
                    found = compare(single, crowd(engine, temperature, given.tokens))
                    what = "deterministic" if mode else "ours"
                    tell(f"{dtype} {what} {'greedy' if temperature == 0 else 'seeded'} {name}", *found)
        if not given.no_peers:
            tell(f"{dtype} transformers greedy batch", theirs(given.model, dtype, given.tokens))
    close("crowd", results=results, requests=len(PROMPTS), others=len(OTHERS), tokens=given.tokens)


if __name__ == "__main__":
    main()
