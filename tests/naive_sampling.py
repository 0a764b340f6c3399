"""The slow oracle of sampling: one row at a time, written from the rules, sorting everything.

Plain Python and NumPy in float64; imports nothing of llama or kernels, so that a fault there cannot hide here.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

M32, M64 = 2**32 - 1, 2**64 - 1


@dataclass(frozen=True)
class Params:
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    frequency_penalty: float = 0.0
    presence_penalty: float = 0.0
    logit_bias: Mapping[int, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Outcome:
    """`probs` is the distribution that was drawn from, one-hot where greedy; `adjusted` the logits after step 5."""

    token: int
    probs: np.ndarray
    adjusted: np.ndarray


def sample(
    logits: np.ndarray,
    params: Params,
    seed: int,
    position: int,
    *,
    prompt: Sequence[int] = (),
    generated: Sequence[int] = (),
    allowed: np.ndarray | None = None,
) -> Outcome:
    """The token at absolute `position` of a sequence whose next-token logits [vocab] are given."""
    adjusted = adjust(logits, params, prompt, generated, allowed)
    if params.temperature == 0:
        token = int(np.argmax(adjusted))
        return Outcome(token, np.eye(1, len(adjusted), token)[0], adjusted)
    probs = distribution(adjusted, params)
    kept = np.flatnonzero(probs)
    x = (adjusted[kept] - adjusted.max()) / params.temperature
    return Outcome(int(kept[np.argmax(x + gumbel(kept, seed, position))]), probs, adjusted)


def adjust(
    logits: np.ndarray,
    params: Params,
    prompt: Sequence[int] = (),
    generated: Sequence[int] = (),
    allowed: np.ndarray | None = None,
) -> np.ndarray:
    """Bias, the three penalties and the mask."""
    out = [float(value) for value in logits]
    for token, bias in params.logit_bias.items():
        out[token] += bias
    for token in set(prompt) | set(generated):
        penalty = params.repetition_penalty
        out[token] = out[token] / penalty if out[token] > 0 else out[token] * penalty
    for token in set(generated):
        out[token] -= params.frequency_penalty * list(generated).count(token)
        out[token] -= params.presence_penalty
    if allowed is not None:
        out = [value if ok else -math.inf for value, ok in zip(out, allowed, strict=True)]
    return np.array(out)


def distribution(adjusted: np.ndarray, params: Params) -> np.ndarray:
    """Temperature, min_p, top_k, top_p: probabilities [vocab], zero for what is filtered away."""
    x = (adjusted - adjusted.max()) / params.temperature
    weights = np.exp(x)
    order = np.lexsort((np.arange(len(x)), -x))  # by x, the largest first, then by id
    order = order[(weights[order] > 0) & (weights[order] >= params.min_p)]
    if 0 < params.top_k < len(order):
        order = order[x[order] >= x[order[params.top_k - 1]]]
    if params.top_p < 1:
        total, before, nucleus = weights[order].sum(), 0.0, []
        for token in order:
            if nucleus and before >= params.top_p * total:
                break
            nucleus.append(token)
            before += weights[token]
        order = np.array(nucleus)
    probs = np.zeros_like(weights)
    probs[order] = weights[order] / weights[order].sum()
    return probs


def gumbel(tokens: np.ndarray, seed: int, position: int) -> np.ndarray:
    low, high = keys(seed, position)
    bits = lowbias32(lowbias32(tokens.astype(np.uint64) ^ low) ^ high) >> 8
    return -np.log(-np.log(np.maximum(bits, 1) * 2.0**-24))


def keys(seed: int, position: int) -> tuple[int, int]:
    """The low and the high key word of a row."""
    mixed = splitmix64(seed ^ splitmix64((position + 0x9E3779B97F4A7C15) & M64))
    return mixed & M32, mixed >> 32


def child_seed(seed: int, index: int) -> int:
    """The seed of completion `index` of n."""
    mixed = splitmix64(seed ^ splitmix64(index) if index else seed) & (2**53 - 1)
    return seed if index == 0 and seed < 2**53 else mixed


def splitmix64(z: int) -> int:
    """The finaliser of SplitMix64 (Steele, Lea, Flood 2014)."""
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & M64
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & M64
    return z ^ (z >> 31)


def lowbias32(x: Any) -> Any:
    """Of an int, or of an array of uint64 (products stay below 2^64)."""
    x = ((x ^ (x >> 16)) * 0x7FEB352D) & M32
    x = ((x ^ (x >> 15)) * 0x846CA68B) & M32
    return x ^ (x >> 16)
