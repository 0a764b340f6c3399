"""Quantised weights, and deterministic, fused and recorded steps, on a device: sections of first_look.py."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from functools import partial
from typing import Any
from unittest import mock

import numpy as np
import torch
from torch import Tensor

from benchmarks.common import in_turn, ratio
from benchmarks.decode_gpu import decoding, finish, prompt_of, stepped
from benchmarks.first_look_device import Look, attempt
from llama.api.params import SamplingParams
from llama.engine.config import EngineConfig
from llama.engine.engine import Engine
from llama.kernels import ops
from llama.kernels.types import QuantizedWeight
from llama.model.config import ModelConfig
from llama.model.linear import Linear
from llama.model.transformer import Transformer
from llama.model.weights import fp8, int4, int8
from llama.model.weights.quantised import Quantised

SCHEMES: dict[str, Callable[[Tensor], QuantizedWeight]] = {
    "int8": int8.quantise,
    "int4": int4.quantise,
    "fp8": fp8.quantise,
}
FEW = 64  # tokens up to which a row's bits depend on no other


def _form(look: Look, shape: tuple[int, int], quantise: Callable[[Tensor], QuantizedWeight]) -> dict[str, Any]:
    weight = quantise(look.setting.randn(*shape, seed=1) * 0.02)
    num_bytes = sum(tensor.nbytes for tensor in weight.tensors)
    copies = look.timer.num_sets(num_bytes) - 1
    weights = [weight, *(replace(weight, codes=weight.codes.clone()) for _ in range(copies))]
    counts = look.setting.pick([1, 16, FEW, 2048], [1, 4])
    x = look.randn(counts[-1], shape[1])
    outputs = {count: ops.quantized_matmul(x[:count], weight) for count in counts}
    expected = x.double() @ Quantised(weight, look.dtype).dense().double().t()
    found: dict[str, Any] = {"rows have the bits of 1 token": {}}
    for count, y in outputs.items():
        error = ((y.double() - expected[:count]).norm() / expected[:count].norm()).item()
        moved = num_bytes + count * sum(shape) * look.dtype.itemsize
        calls = [partial(ops.quantized_matmul, x[:count], each) for each in weights]
        found[str(count)] = look.share(calls, moved) | {"error": round(error, 6)}
        if 1 < count <= FEW:
            found["rows have the bits of 1 token"][str(count)] = torch.equal(y[:1], outputs[1])
    if wrong := [count for count in map(str, counts) if not found[count]["error"] < 0.02]:
        raise RuntimeError(f"products of {wrong} tokens differ from those with the dense weight: {found}")
    return found


def forms(look: Look) -> dict:
    """Products with codes by scheme and tokens: error, share of the copy's bandwidth, and bits beside other rows."""
    found = {}
    for name, shape in look.weights.items():
        if name not in ("qkv", "head"):
            for scheme, quantise in SCHEMES.items():
                found[f"{name} {scheme}"] = attempt(partial(_form, look, shape, quantise))
                print(name, scheme, found[f"{name} {scheme}"], flush=True)
    if failed := [name for name, told in found.items() if isinstance(told, str)]:
        raise RuntimeError(f"{failed} failed: {found}")
    return found


@contextmanager
def _products_row_by_row() -> Iterator[None]:
    """The interpreter's products are NumPy's, in which a row's bits depend on its place."""
    product = np.matmul

    def by_rows(a: Any, b: Any, **options: Any) -> Any:
        return np.concatenate([product(row[None].copy(), b, **options) for row in a])

    with mock.patch.object(np, "matmul", by_rows):
        yield


def _model(look: Look, quantization: str | None) -> Transformer:
    """A few layers: what is asked is whether bits are equal, and how a layer's time changes."""
    if look.is_tiny:
        preset = replace(ModelConfig.preset("tiny"), num_hidden_layers=1, vocab_size=300)
    else:
        preset = replace(ModelConfig.preset("llama-3.1-8b"), num_hidden_layers=4)
    model = Transformer(preset, device=look.device, dtype=look.dtype)
    if quantization is not None:
        model.quantise(quantization)
    return model


def _engine(look: Look, model: Transformer, **options: Any) -> Engine:
    length, blocks, most = look.setting.pick([4096, 2500, 32], [128, 32, 3])
    config = EngineConfig(
        max_model_len=length, num_blocks=blocks, max_num_seqs=most, enable_prefix_caching=False, **options
    )
    return Engine(model, config)


def _answers(look: Look, engine: Engine, count: int) -> tuple[list[int], list[float]]:
    """Tokens and log-probabilities of a request, beside `count` - 1 others."""
    length, new = look.setting.pick([300, 24], [9, 3])
    params = SamplingParams(max_tokens=new, temperature=0, logprobs=1, ignore_eos=True)
    for i in range(count):
        prompt = prompt_of(length + 7 * i, engine.runner.vocab_size)
        engine.add(engine.request(f"{i}", prompt, params))
    tokens: list[int] = []
    logprobs: list[float] = []
    while engine.has_unfinished:
        for output in stepped(engine):
            if output.request_id == "0":
                tokens += output.token_ids
                told = zip(output.token_ids, output.logprobs, strict=True)
                logprobs += [entries[token].logprob for token, entries in told]
    return tokens, logprobs


def _costs(look: Look, fixed: Engine, plain: Engine) -> dict[str, float]:
    """Seconds with the mode over those without, of steps in turn."""
    rounds = 1 if look.is_tiny else 20
    context, greedy = 20 if look.is_tiny else 1000, {"temperature": 0.0}
    found = {}

    def step(engine: Engine) -> None:
        engine.step()
        look.timer.wait()

    for batch in look.setting.pick([1, 32], [2]):
        asked = batch, context, rounds + 2, greedy
        with decoding(fixed, *asked), decoding(plain, *asked):
            ours, theirs = in_turn(partial(step, fixed), partial(step, plain), rounds)
        found[f"decode of {batch}"] = round(1 / ratio(theirs, ours), 3)
    return found | _costs_of_prompts(look, fixed, plain, look.setting.pick([2048], [20]))


def _costs_of_prompts(look: Look, ours: Engine, plain: Engine, lengths: list[int]) -> dict[str, float]:
    """The same of a prompt's first token."""
    one, found = SamplingParams(max_tokens=1, temperature=0), {}

    def prompt(engine: Engine, length: int) -> None:
        engine.add(engine.request("prompt", prompt_of(length, engine.runner.vocab_size), one))
        finish(engine)
        look.timer.wait()

    for length in lengths:
        calls = (partial(prompt, engine, length) for engine in (ours, plain))
        mine, theirs = in_turn(*calls, 1 if look.is_tiny else 5)
        found[f"prompt of {length}"] = round(1 / ratio(theirs, mine), 3)
    return found


def deterministic(look: Look) -> dict:
    """deterministic=True, dense and int4: how each kind of layer multiplies then, whether a request has its own bits in
    a crowd and in small chunks, and what the mode costs."""
    found: dict[str, Any] = {}
    for scheme in look.setting.pick([None, "int4"], [None]):
        with _products_row_by_row() if look.is_tiny else nullcontext():
            model = _model(look, scheme)
            fixed = _engine(look, model, deterministic=True)
            chunked = _engine(look, model, deterministic=True, max_num_batched_tokens=48)
            ways = {
                name.split(".")[-1]: f"{module.multiply.__name__}, {module.pieces}"
                for name, module in model.named_modules()
                if isinstance(module, Linear)
            }
            alone = _answers(look, fixed, 1)
            crowd = look.setting.pick([32], [3])[0]
            row = {
                "runs": str(model.fixed),
                "ways": ways,
                "has its own bits in a crowd": _answers(look, fixed, crowd) == alone,
                "has its own bits in small chunks": _answers(look, chunked, crowd) == alone,
                "seconds over those without": _costs(look, fixed, _engine(look, _model(look, scheme))),
            }
        found[scheme or "dense"] = row
        print(scheme or "dense", row, flush=True)
    return found


def fused(look: Look) -> dict:
    """fused_decode=True by scheme: how many tokens of an answer are those without, and the seconds over those."""
    found: dict[str, Any] = {}
    for scheme in look.setting.pick([None, "int8", "int4", "fp8"], [None]):
        ours = _engine(look, _model(look, scheme), fused_decode=True)
        plain = _engine(look, _model(look, scheme))
        tokens, expected = (_answers(look, engine, 2)[0] for engine in (ours, plain))
        same = sum(a == b for a, b in zip(tokens, expected, strict=True))
        found[scheme or "dense"] = {"tokens alike": [same, len(expected)], "seconds": _costs(look, ours, plain)}
        print(scheme or "dense", found[scheme or "dense"], flush=True)
    return found


def prompts(look: Look) -> dict:
    """record_prompts=True: how many tokens of an answer are those without, and the seconds of a short prompt over
    those."""
    found: dict[str, Any] = {}
    options = {} if look.is_tiny else {"record_prompts": True}  # which wants CUDA
    for scheme in look.setting.pick([None, "int4"], [None]):
        model = _model(look, scheme)
        ours, plain = _engine(look, model, **options), _engine(look, model)
        tokens, expected = (_answers(look, engine, 2)[0] for engine in (ours, plain))
        same = sum(a == b for a, b in zip(tokens, expected, strict=True))
        costs = _costs_of_prompts(look, ours, plain, look.setting.pick([30, 100, 250], [5]))
        found[scheme or "dense"] = {"tokens alike": [same, len(expected)], "seconds": costs}
        print(scheme or "dense", found[scheme or "dense"], flush=True)
    return found


SECTIONS = {section.__name__: section for section in (forms, deterministic, fused, prompts)}
