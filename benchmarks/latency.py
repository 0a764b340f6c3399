"""Seconds per decode step and per prefill, ours and transformers in turn on the same weights in one process.

Ours is the whole engine: scheduling, model, greedy sampling, bookkeeping. Theirs is the model with its cache and an
argmax, without the cost of generate(). The closing profile says where a decode step's time goes.

With --preset llama-3.1-8b --random-weights no checkpoint is wanted, and the rest is up to benchmarks/decode_gpu.py.
"""

import argparse
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from transformers import AutoModelForCausalLM
from transformers.cache_utils import DynamicCache

from benchmarks import decode_gpu
from benchmarks.common import close, in_turn, ratio, read_bandwidth, summary, timed
from llama import LLM, SamplingParams, Transformer
from llama.kernels import ops
from llama.model.linear import Linear
from llama.model.weights.packed import OneDNNGated

STEPS = 5  # of decoding in a row
OPS = ("add_rms_norm", "paged_attention", "rms_norm", "rope_and_store", "sample", "silu_mul")


def prompts(count: int, length: int, vocab_size: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(0, vocab_size, (count, length), generator=torch.Generator().manual_seed(seed))


class Decode:
    """Both sides hold the same prompts and write on, greedily, one token per step."""

    def __init__(self, llm: LLM, theirs: torch.nn.Module, batch: int, context: int, steps: int) -> None:
        self.llm, self.theirs = llm, theirs
        ids = prompts(batch, context, llm.model.config.vocab_size)
        params = SamplingParams(temperature=0.0, max_tokens=steps, ignore_eos=True)
        self.requests = [f"decode-{i}" for i in range(batch)]
        for request, row in zip(self.requests, ids.tolist(), strict=True):
            llm.engine.add(llm.engine.request(request, row, params))
        while llm.engine.metrics().num_running < batch or llm.engine.metrics().num_waiting:
            llm.engine.step()
        self.cache = DynamicCache()
        output = theirs(ids, past_key_values=self.cache, use_cache=True, logits_to_keep=1)
        self.tokens = output.logits[:, -1:].argmax(-1)

    def ours_step(self) -> None:
        self.llm.engine.step()

    def theirs_step(self) -> None:
        logits = self.theirs(self.tokens, past_key_values=self.cache, use_cache=True).logits
        self.tokens = logits[:, -1:].argmax(-1)

    def close(self) -> None:
        for request in self.requests:
            self.llm.engine.abort(request)


def step_bytes(model: Transformer, batch: int, context: int) -> int:
    """What a decode step must read: every weight but the input embedding's other rows, and K and V."""
    config = model.config
    weights = config.num_parameters - (0 if config.tie_word_embeddings else config.vocab_size * config.hidden_size)
    return (weights + batch * context * config.kv_values_per_token) * model.dtype.itemsize


def decode(llm: LLM, theirs: torch.nn.Module, batch: int, context: int, rounds: int, bandwidth: float) -> dict:
    pair = Decode(llm, theirs, batch, context, rounds * STEPS + 8)
    ours, others = in_turn(pair.ours_step, pair.theirs_step, rounds, calls=STEPS)
    pair.close()
    needed = step_bytes(llm.model, batch, context)
    result = {"batch": batch, "context": context, "bytes": needed, "ours": summary(ours), "theirs": summary(others)}
    result["of_read_bandwidth"] = needed / result["ours"]["median"] / bandwidth
    result["ratio"] = ratio(others, ours)
    return result


def prefill(llm: LLM, theirs: torch.nn.Module, length: int, rounds: int) -> dict:
    config = llm.model.config
    ids = prompts(1, length, config.vocab_size, seed=1)
    params = SamplingParams(temperature=0.0, max_tokens=1, ignore_eos=True)
    row = ids[0].tolist()

    def ours_run() -> None:
        llm.engine.add(llm.engine.request("prefill", row, params))
        while llm.engine.has_unfinished:
            llm.engine.step()

    def theirs_run() -> None:
        theirs(ids, use_cache=True, logits_to_keep=1).logits[:, -1].argmax(-1)

    ours, others = in_turn(ours_run, theirs_run, rounds)
    body = config.num_parameters - config.vocab_size * config.hidden_size * (1 if config.tie_word_embeddings else 2)
    attention = 2 * config.num_hidden_layers * config.num_attention_heads * config.head_dim * length * length
    result = {
        "length": length,
        "flops": 2 * length * body + attention,
        "ours": summary(ours),
        "theirs": summary(others),
    }
    result["ratio"] = ratio(others, ours)
    return result


@contextmanager
def watched(model: Transformer, seconds: dict[str, float]) -> Iterator[None]:
    """Add up the time within each op and each kind of Linear. The wrappers themselves cost a little."""

    def wrap(name: str, function: Callable) -> Callable:
        def wrapper(*args, **kwargs):
            result = None

            def call() -> None:
                nonlocal result
                result = function(*args, **kwargs)

            seconds[name] += timed(call)
            return result

        return wrapper

    originals = {name: getattr(ops, name) for name in OPS}
    linears = {name: module for name, module in model.named_modules() if isinstance(module, Linear)}
    try:
        for name, function in originals.items():
            setattr(ops, name, wrap(name, function))
        for name, module in linears.items():
            entry = "gated" if isinstance(module.form, OneDNNGated) else "forward"
            setattr(module, entry, wrap(name.rsplit(".", 1)[-1], getattr(module, entry)))
        yield
    finally:
        for name, function in originals.items():
            setattr(ops, name, function)
        for module in linears.values():
            delattr(module, "gated" if isinstance(module.form, OneDNNGated) else "forward")


def profile(llm: LLM, theirs: torch.nn.Module, batch: int, context: int, steps: int) -> dict[str, float]:
    """Share of a decode step's time by what it is spent on."""
    pair = Decode(llm, theirs, batch, context, steps + 8)
    seconds: dict[str, float] = defaultdict(float)
    pair.ours_step()
    with watched(llm.model, seconds):
        total = timed(lambda: [pair.ours_step() for _ in range(steps)])
    pair.close()
    shares = {name: value / total for name, value in sorted(seconds.items(), key=lambda item: -item[1])}
    return shares | {"everything else": 1 - sum(shares.values())}


def measure(path: str, dtype: torch.dtype, arguments: argparse.Namespace) -> dict:
    bandwidth = read_bandwidth()
    start = time.perf_counter()
    model = Transformer.from_pretrained(path, dtype=dtype)
    seconds = {"load": time.perf_counter() - start, "prepare": timed(model.prepare)}
    llm = LLM(model, max_model_len=4096, num_blocks=1024, max_num_seqs=64, enable_prefix_caching=False)
    theirs = AutoModelForCausalLM.from_pretrained(path, dtype=dtype)
    print(
        f"{dtype}: read bandwidth {bandwidth / 1e9:.1f} GB/s, "
        f"load {seconds['load']:.2f} s, prepare {seconds['prepare']:.2f} s"
    )
    print(f"  {'ms':<16} {'ours':>9} {'p10':>9} {'p90':>9} {'theirs':>9} {'p10':>9} {'p90':>9} {'ratio':>7}")
    rows, profiles = {}, {}
    with torch.inference_mode():
        for batch in arguments.batch:
            name = f"decode batch {batch}"
            row = rows[name] = decode(llm, theirs, batch, arguments.context, arguments.rounds, bandwidth)
            show(name, row, f"{row['of_read_bandwidth']:.2f} of the read bandwidth")
        for length in arguments.prefill:
            name = f"prefill {length}"
            row = rows[name] = prefill(llm, theirs, length, max(3, arguments.rounds // 8))
            show(name, row, f"{row['flops'] / row['ours']['median'] / 1e9:.0f} GFLOP/s")
        for batch in arguments.batch:
            shares = profiles[f"decode batch {batch}"] = profile(llm, theirs, batch, arguments.context, 20)
            told = ", ".join(f"{name} {share:.1%}" for name, share in shares.items())
            print(f"  where a decode step at batch {batch} goes: {told}")
    return {"read_bandwidth": bandwidth, "seconds": seconds, "rows": rows, "profiles": profiles}


def show(name: str, row: dict, remark: str) -> None:
    numbers = [row[side][key] * 1e3 for side in ("ours", "theirs") for key in ("median", "p10", "p90")]
    print(f"  {name:<16} " + " ".join(f"{number:9.2f}" for number in numbers) + f" {row['ratio']:6.2f}x  {remark}")


def main() -> None:
    shapes = argparse.ArgumentParser(add_help=False)
    shapes.add_argument("--preset", help="the shapes of a preset in place of a checkpoint")
    shapes.add_argument("--random-weights", action="store_true", help="what a preset has")
    chosen, rest = shapes.parse_known_args()
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], parents=[shapes])
    if chosen.preset is not None:
        if not chosen.random_weights:
            parser.error("a preset has no weights: say --random-weights, or give a checkpoint with --model")
        return decode_gpu.main(["--preset", chosen.preset, *rest])
    parser.add_argument("--model", default="checkpoints/smollm2-135m-instruct")
    parser.add_argument("--dtype", nargs="+", default=["bfloat16", "float32"])
    parser.add_argument("--batch", nargs="+", type=int, default=[1, 8])
    parser.add_argument("--prefill", nargs="+", type=int, default=[512])
    parser.add_argument("--context", type=int, default=128, help="tokens before the first decode step")
    parser.add_argument("--rounds", type=int, default=40)
    parser.add_argument("--threads", type=int, default=None)
    arguments = parser.parse_args()
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    results = {name: measure(arguments.model, getattr(torch, name), arguments) for name in arguments.dtype}
    ratios = {f"{d}, {name}": row["ratio"] for d, result in results.items() for name, row in result["rows"].items()}
    close("latency", unit="s", model=arguments.model, results=results, ratios=ratios)


if __name__ == "__main__":
    main()
