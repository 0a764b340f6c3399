"""Requests that share a system prompt, with the prefix cache and without: seconds, hits, and whether tokens agree.

32 requests with the same 400 tokens in front and 20 of their own, 16 new tokens each, greedy, at most 512 tokens per
step. Both ways in turn, on the same weights, in one run.
"""

import argparse
import time

import torch

from benchmarks.common import close, ratio, summary
from llama import Transformer
from llama.api.params import SamplingParams
from llama.engine.config import EngineConfig
from llama.engine.engine import Engine

NUM_REQUESTS, SHARED, OWN, NEW = 32, 400, 20, 16
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def run(model: Transformer, prompts: list[list[int]], caching: bool) -> tuple[float, dict[str, list[int]], float]:
    """Seconds, tokens and the fraction of the prompts' tokens that were found in the cache."""
    config = EngineConfig(
        max_model_len=512, max_num_batched_tokens=512, num_blocks=NUM_REQUESTS * 32, enable_prefix_caching=caching
    )
    engine = Engine(model, config)
    for i, prompt in enumerate(prompts):
        engine.add(engine.request(str(i), prompt, SamplingParams(max_tokens=NEW, temperature=0, ignore_eos=True)))
    tokens: dict[str, list[int]] = {str(i): [] for i in range(len(prompts))}
    start = time.perf_counter()
    while engine.has_unfinished:
        for output in engine.step():
            tokens[output.request_id] += output.token_ids
    seconds = time.perf_counter() - start
    metrics = engine.metrics()
    return seconds, tokens, metrics.num_prefix_hits / metrics.num_prefix_queries


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="checkpoints/smollm2-135m-instruct")
    parser.add_argument("--dtype", choices=DTYPES, default="float32")
    parser.add_argument("--rounds", type=int, default=2)
    args = parser.parse_args()
    model = Transformer.from_pretrained(args.model, dtype=DTYPES[args.dtype])
    model.prepare()
    generator = torch.Generator().manual_seed(0)

    def some_tokens(count: int) -> list[int]:
        return torch.randint(model.config.vocab_size, (count,), generator=generator).tolist()

    shared = some_tokens(SHARED)
    prompts = [shared + some_tokens(OWN) for _ in range(NUM_REQUESTS)]
    seconds: dict[bool, list[float]] = {True: [], False: []}
    answers, hits = {}, 0.0
    for _ in range(args.rounds):
        for caching in (False, True):
            elapsed, answers[caching], found = run(model, prompts, caching)
            seconds[caching].append(elapsed)
            hits = max(hits, found)
            print(f"prefix cache {'on ' if caching else 'off'}: {elapsed:.2f} s")
    faster = ratio(seconds[False], seconds[True])
    equal = sum(answers[True][name] == answers[False][name] for name in answers[True])
    print(f"{faster:.2f} times faster with the cache; {hits:.0%} of the prompts found in it")
    print(f"{equal} of {NUM_REQUESTS} answers are the same")
    close(
        "prefix_sharing",
        dtype=args.dtype,
        shapes={"requests": NUM_REQUESTS, "shared": SHARED, "own": OWN, "new": NEW},
        **summary(seconds[True]),
        ratios={"without / with": faster, "equal answers": equal / NUM_REQUESTS},
    )


if __name__ == "__main__":
    main()
