"""Tokens per second of many requests of unequal lengths: LLM.generate against transformers' padded batches.

Every request asks for its own number of tokens and gets exactly that many. transformers takes the requests in the order
given, in left-padded batches; a batch runs until its longest request is done, and only tokens asked for count.
"""

import argparse
import random

import torch
from transformers import AutoModelForCausalLM

from benchmarks.common import close, ratio, summary, timed
from llama import LLM, SamplingParams


def workload(count: int, longest_prompt: int, longest_output: int, vocab_size: int) -> list[tuple[list[int], int]]:
    """(prompt, tokens wanted) pairs, lengths even between 16 and the longest."""
    draw = random.Random(0)
    return [
        (
            [draw.randrange(vocab_size) for _ in range(draw.randint(16, longest_prompt))],
            draw.randint(16, longest_output),
        )
        for _ in range(count)
    ]


def ours(llm: LLM, requests: list[tuple[list[int], int]]) -> None:
    params = [SamplingParams(temperature=0.0, max_tokens=wanted, ignore_eos=True) for _, wanted in requests]
    outputs = llm.generate([prompt for prompt, _ in requests], params, use_tqdm=False)
    assert [len(output.outputs[0].token_ids) for output in outputs] == [wanted for _, wanted in requests]


def theirs(model: torch.nn.Module, requests: list[tuple[list[int], int]], batch_size: int) -> None:
    for start in range(0, len(requests), batch_size):
        batch = requests[start : start + batch_size]
        width = max(len(prompt) for prompt, _ in batch)
        ids = torch.tensor([[0] * (width - len(prompt)) + prompt for prompt, _ in batch])
        mask = torch.tensor([[0] * (width - len(prompt)) + [1] * len(prompt) for prompt, _ in batch])
        longest = max(wanted for _, wanted in batch)
        lengths = {"min_new_tokens": longest, "max_new_tokens": longest}
        model.generate(ids, attention_mask=mask, do_sample=False, pad_token_id=0, **lengths)


def measure(dtype_name: str, arguments: argparse.Namespace) -> dict:
    dtype = getattr(torch, dtype_name)
    llm = LLM(arguments.model, dtype=dtype, max_model_len=4096, num_blocks=2048, max_num_seqs=64)
    peer = AutoModelForCausalLM.from_pretrained(arguments.model, dtype=dtype)
    sizes = (arguments.requests, arguments.prompt, arguments.output)
    requests = workload(*sizes, llm.model.config.vocab_size)
    prompt_tokens, output_tokens = sum(len(prompt) for prompt, _ in requests), sum(wanted for _, wanted in requests)
    llm.generate(requests[0][0], SamplingParams(max_tokens=2), use_tqdm=False)
    theirs(peer, [(requests[0][0], 2)], 1)
    mine, others = [], []
    for _ in range(arguments.rounds):
        # A fresh order of the same work, so that no prompt is found in the prefix cache of the round before.
        for prompt, _ in requests:
            random.shuffle(prompt)
        mine.append(timed(lambda: ours(llm, requests)))
        others.append(timed(lambda: theirs(peer, requests, arguments.padded_batch)))
    result = {
        "requests": len(requests),
        "prompt_tokens": prompt_tokens,
        "output_tokens": output_tokens,
        "ours": summary(mine),
        "theirs": summary(others),
        "ratio": ratio(others, mine),
    }
    for side in ("ours", "theirs"):
        seconds = result[side]["median"]
        print(f"{dtype_name:<10} {side:<7} {seconds:8.2f} s {output_tokens / seconds:8.1f} output tokens/s")
    print(f"{dtype_name:<10} ratio   {result['ratio']:8.2f}x")
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="checkpoints/smollm2-135m-instruct")
    parser.add_argument("--dtype", nargs="+", default=["bfloat16", "float32"])
    parser.add_argument("--requests", type=int, default=64)
    parser.add_argument("--prompt", type=int, default=256, help="the longest prompt")
    parser.add_argument("--output", type=int, default=64, help="the longest output")
    parser.add_argument("--padded-batch", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--threads", type=int, default=None)
    arguments = parser.parse_args()
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    results = {name: measure(name, arguments) for name in arguments.dtype}
    ratios = {name: result["ratio"] for name, result in results.items()}
    close("throughput", unit="s", model=arguments.model, results=results, ratios=ratios)


if __name__ == "__main__":
    main()
