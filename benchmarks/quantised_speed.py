"""Decode steps and prompts of one model in bfloat16 and in codes, each layout in turn in one process, on a CPU.

    python -m benchmarks.quantised_speed --threads 2                                  the demo model
    python -m benchmarks.quantised_speed --preset llama-3.2-1b --layers 4 --vocab-size 32064 --threads 2

Every round goes through all forms. A ratio is the median over rounds of bfloat16's time / the form's, both from the
same round: above 1 the form is faster. Few layers of a preset want a vocabulary as much smaller, so that the head,
which stays dense, weighs as much as in the whole model. Beside a step stands what its linear layers alone take, one
after the other, gate and up with silu: the rest is attention, norms, the sampler and the engine.
"""

import argparse
import sys
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch

from benchmarks.common import close, ratio, summary, timed
from benchmarks.decode_gpu import WARM_STEPS, decoding, finish, prompt_of
from benchmarks.random_models import cut_preset
from llama import SamplingParams, Transformer
from llama.engine.config import EngineConfig
from llama.engine.engine import Engine
from llama.model.linear import Linear

DENSE = "bfloat16"
FORMS = ("int8 balanced", "int8 fast", "int4 balanced", "int4 fast")
STEPS = 3  # in a row: what the form before left in the caches is gone by then
CONTEXT = 16


def build(given: argparse.Namespace, form: str) -> tuple[Engine, dict[str, Any]]:
    """-> an engine, and what its linear layers are."""
    scheme, _, layout = form.partition(" ")
    if given.preset is None:
        quantization = None if form == DENSE else scheme
        model = Transformer.from_pretrained(given.model, dtype="bfloat16", quantization=quantization)
    else:
        model = Transformer(cut_preset(given.preset, given.layers, given.vocab_size), dtype=torch.bfloat16)
        if form != DENSE:
            model.quantise(scheme)
    model.prepare(layout or "balanced")
    linears = [module for module in model.modules() if isinstance(module, Linear)]
    held = sum(linear.weight.nbytes if linear.form is None else linear.form.nbytes for linear in linears)
    first = linears[0].coded
    told = {"bytes_of_linears": held, "forms": "dense" if first is None else getattr(first, "told", "joined")}
    longest = max(given.prompt, CONTEXT + (given.rounds + 1) * STEPS + WARM_STEPS + 8) + 16
    batch = max(given.batches, default=1)
    config = EngineConfig(
        max_model_len=longest,
        max_num_batched_tokens=max(given.prompt, 512),
        num_blocks=batch * -(-longest // 16) + batch,
        max_num_seqs=batch,
        enable_prefix_caching=False,
    )
    return Engine(model, config), told


def decode(engines: dict[str, Engine], batch: int, rounds: int) -> dict[str, list[float]]:
    """Seconds of a step of `batch` sequences."""
    seconds: dict[str, list[float]] = {name: [] for name in engines}
    with ExitStack() as running:
        for engine in engines.values():
            running.enter_context(decoding(engine, batch, CONTEXT, (rounds + 1) * STEPS, {"temperature": 0}))
        for _ in range(rounds):
            for name, engine in engines.items():
                seconds[name].append(timed(lambda engine=engine: [engine.step() for _ in range(STEPS)]) / STEPS)
    return seconds


@torch.inference_mode()
def linears(engines: dict[str, Engine], rows: int, drawn: int, rounds: int) -> dict[str, list[float]]:
    """Seconds of all linear layers of a model for so many rows, of which the head has those that are `drawn`."""

    def inputs(model: Transformer) -> list[tuple[Callable[[torch.Tensor], torch.Tensor], torch.Tensor]]:
        layers = [module for module in model.modules() if isinstance(module, Linear)]
        counts = [drawn if layer is model.lm_head else rows for layer in layers]
        return [
            (layer.gated if layer.is_gated else layer, x[layer.in_features][:count])
            for layer, count in zip(layers, counts, strict=True)
        ]

    sizes = {module.in_features for module in engines[DENSE].runner.model.modules() if isinstance(module, Linear)}
    x = {size: torch.randn(rows, size).to(torch.bfloat16) for size in sizes}
    pairs = {name: inputs(engine.runner.model) for name, engine in engines.items()}
    seconds: dict[str, list[float]] = {name: [] for name in engines}
    for _ in range(rounds + 1):
        for name, each in pairs.items():
            seconds[name].append(timed(lambda each=each: [multiply(values) for multiply, values in each]))
    return {name: values[1:] for name, values in seconds.items()}


def prefill(engines: dict[str, Engine], length: int, rounds: int) -> dict[str, list[float]]:
    """Seconds of a prompt and its first token."""
    params = SamplingParams(temperature=0, max_tokens=1, ignore_eos=True)

    def once(engine: Engine) -> None:
        engine.add(engine.request("prefill", prompt_of(length, engine.runner.vocab_size), params))
        finish(engine)

    for engine in engines.values():
        once(engine)
    seconds: dict[str, list[float]] = {name: [] for name in engines}
    for _ in range(rounds):
        for name, engine in engines.items():
            seconds[name].append(timed(lambda engine=engine: once(engine)))
    return seconds


def table(workload: str, seconds: dict[str, list[float]], alone: dict[str, list[float]]) -> dict[str, Any]:
    rows = {}
    for name, values in seconds.items():
        row = rows[name] = {"seconds": summary(values), "linears": summary(alone[name])}
        told = f"{workload:16} {name:16} {1e3 * row['seconds']['median']:10.2f} ms"
        told += f", linears {1e3 * row['linears']['median']:10.2f}"
        if name != DENSE:
            pairs = [a / b for a, b in zip(seconds[DENSE], values, strict=True)]
            row["times_bfloat16"] = ratio(seconds[DENSE], values)
            told += f"  {row['times_bfloat16']:6.2f} x bfloat16 ({min(pairs):.2f} to {max(pairs):.2f})"
        print(told, file=sys.stderr, flush=True)
    return rows


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=Path("checkpoints/smollm2-135m-instruct"))
    parser.add_argument("--preset", help="its shapes with random weights, in place of a model")
    parser.add_argument("--layers", type=int, help="of the preset (all)")
    parser.add_argument("--vocab-size", type=int, help="of the preset (its own)")
    parser.add_argument("--forms", nargs="+", default=list(FORMS), metavar="'SCHEME LAYOUT'")
    parser.add_argument("--batches", nargs="*", type=int, default=[1, 8, 32])
    parser.add_argument("--prompt", type=int, default=512)
    parser.add_argument("--rounds", type=int, default=8)
    parser.add_argument("--prompt-rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    given = parser.parse_args(arguments)
    torch.set_num_threads(given.threads)
    engines, forms = {}, {}
    for form in (DENSE, *given.forms):
        engines[form], forms[form] = build(given, form)
        print(f"{form:16} {forms[form]['bytes_of_linears'] / 1e6:10.1f} MB  {forms[form]['forms']}", file=sys.stderr)
    results = {}
    for batch in given.batches:
        name = f"decode batch {batch}"
        found = decode(engines, batch, given.rounds)
        results[name] = table(name, found, linears(engines, batch, batch, -(-given.rounds // 2)))
    name = f"prompt of {given.prompt}"
    found = prefill(engines, given.prompt, given.prompt_rounds)
    results[name] = table(name, found, linears(engines, given.prompt, 1, 1))
    told = given.preset or given.model.name
    close("quantised_speed", unit="s", model=told, layers=given.layers, forms=forms, results=results)


if __name__ == "__main__":
    main()
