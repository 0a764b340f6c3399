"""The oracle's parameters as SamplerRows, in float64 and keyed by (seed, position); and a measure of fit for draws."""

from collections.abc import Sequence

import numpy as np
import torch

from llama.kernels.cpu.sampling import sample
from llama.kernels.types import LOGPROBS_OFF, LOGPROBS_PROCESSED, SamplerRows, SamplerState
from tests import naive_sampling
from tests.naive_sampling import Params


def make_rows(
    params: Sequence[Params],
    seeds: Sequence[int] | None = None,
    positions: Sequence[int] | None = None,
    *,
    dtype: torch.dtype = torch.float64,
    penalty_rows: Sequence[int] | None = None,
    modes: Sequence[int] | None = None,
    num_logprobs: int = -1,
    allowed: np.ndarray | None = None,
) -> SamplerRows:
    """Row i draws with params[i], seeds[i] (default i) and positions[i] (default 0).

    A row with a penalty has penalty row i unless penalty_rows says otherwise. allowed [rows, vocab] bool is the mask.
    """
    size = len(params)
    seeds, positions = seeds or range(size), positions or [0] * size
    words = [naive_sampling.keys(seed, position) for seed, position in zip(seeds, positions, strict=True)]
    if penalty_rows is None:
        off = (1, 0, 0)
        penalties = [(each.repetition_penalty, each.frequency_penalty, each.presence_penalty) for each in params]
        penalty_rows = [-1 if each == off else index for index, each in enumerate(penalties)]
    modes = list(modes or [LOGPROBS_OFF] * size)
    biases = [each.logit_bias for each in params]
    some_bias = any(biases)

    def column(name: str) -> torch.Tensor:
        return torch.tensor([getattr(each, name) for each in params], dtype=dtype)

    return SamplerRows(
        penalty_rows=torch.tensor(penalty_rows, dtype=torch.int32),
        keys=torch.from_numpy(np.array(words, np.uint32).reshape(size, 2).view(np.int32)),
        temperature=column("temperature"),
        top_p=column("top_p"),
        top_k=column("top_k").int(),
        min_p=column("min_p"),
        repetition_penalty=column("repetition_penalty"),
        frequency_penalty=column("frequency_penalty"),
        presence_penalty=column("presence_penalty"),
        logprobs_modes=torch.tensor(modes, dtype=torch.int8),
        bias_starts=torch.tensor(np.cumsum([0, *map(len, biases)]), dtype=torch.int32) if some_bias else None,
        bias_ids=torch.tensor([each for bias in biases for each in bias], dtype=torch.int32) if some_bias else None,
        bias_values=torch.tensor([each for bias in biases for each in bias.values()], dtype=dtype)
        if some_bias
        else None,
        mask=None if allowed is None else pack_bits(allowed),
        num_logprobs=num_logprobs,
        any_penalty=max(penalty_rows, default=-1) >= 0,
        any_filter=any(each.top_k or each.top_p < 1 or each.min_p for each in params if each.temperature),
        all_greedy=not any(each.temperature for each in params),
        any_processed=LOGPROBS_PROCESSED in modes,
    )


def distribution(logits, prompt=(), generated=(), allowed=None, **params):
    """The probabilities [vocab] that one row is drawn from, and its token."""
    logits = torch.as_tensor(logits, dtype=torch.float64)
    state = SamplerState(1, len(logits))
    state.set_row(0, list(prompt), list(generated))
    mask = None if allowed is None else np.array([allowed])
    rows = make_rows([Params(**params)], modes=[LOGPROBS_PROCESSED], num_logprobs=len(logits), allowed=mask)
    sampled = sample(logits[None], rows, state)
    probs = torch.zeros(len(logits), dtype=torch.float64)
    found = sampled.logprobs.top_ids[0]
    probs[found[found >= 0]] = sampled.logprobs.top_logprobs[0][found >= 0].exp()
    return probs.tolist(), int(sampled.token_ids)


def random_logits(rows=4, vocab=500, seed=0, scale=3.0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(rows, vocab, generator=generator, dtype=torch.float64) * scale


def pack_bits(bits: np.ndarray) -> torch.Tensor:
    """bool [rows, n] -> int32 [rows, ceil(n / 32)], little end first."""
    padded = np.pad(bits, ((0, 0), (0, -bits.shape[1] % 32)))
    return torch.from_numpy(np.packbits(padded, axis=1, bitorder="little").view("<i4"))


def chi_square_score(observed: np.ndarray, probs: np.ndarray) -> float:
    """How many standard deviations the chi-square statistic of counts lies above what `probs` lead to expect.

    Bins expected to hold fewer than 5 are joined. Wilson and Hilferty's cube root makes the statistic nearly normal.
    """
    expected = probs * observed.sum()
    assert observed[expected == 0].sum() == 0, "drew what has no probability"
    small = (expected < 5) & (expected > 0)
    observed = np.append(observed[expected >= 5], observed[small].sum())
    expected = np.append(expected[expected >= 5], expected[small].sum())
    observed, expected = observed[expected > 0], expected[expected > 0]
    degrees = len(expected) - 1
    statistic = ((observed - expected) ** 2 / expected).sum()
    spread = 2 / (9 * degrees)
    return float(((statistic / degrees) ** (1 / 3) - (1 - spread)) / spread**0.5)
