"""Rows for the sampling ops out of plain dicts, for the tests of every tier. Needs torch alone."""

import math

import torch

from llama.kernels.types import LOGPROBS_OFF, LOGPROBS_PROCESSED, LOGPROBS_RAW, SamplerRows, SamplerState

MODES = {None: LOGPROBS_OFF, "raw": LOGPROBS_RAW, "processed": LOGPROBS_PROCESSED}
DEFAULTS = {
    "temperature": 1.0,
    "top_p": 1.0,
    "top_k": 0,
    "min_p": 0.0,
    "repetition_penalty": 1.0,
    "frequency_penalty": 0.0,
    "presence_penalty": 0.0,
    "penalty_row": -1,
    "bias": {},
    "allowed": None,  # token ids, None = all
    "logprobs": None,  # a mode
}


def make_rows(params: list[dict], vocab: int, *, num_logprobs: int = -1, seed: int = 0, device="cpu") -> SamplerRows:
    """One row per dict, what it leaves out from DEFAULTS; its own "key" or one drawn from `seed`."""
    generator = torch.Generator().manual_seed(seed)
    keys = torch.randint(-(2**31), 2**31, (len(params), 2), generator=generator).to(torch.int32)
    for row, param in enumerate(params):
        assert not param.keys() - DEFAULTS.keys() - {"key"}, param
        if "key" in param:
            keys[row] = torch.tensor(param["key"])
    params = [DEFAULTS | param for param in params]

    def column(name, dtype):
        return torch.tensor([param[name] for param in params], dtype=dtype, device=device)

    floats = [name for name, value in DEFAULTS.items() if isinstance(value, float)]
    biases = [param["bias"] for param in params]
    mask = None
    if any(param["allowed"] is not None for param in params):
        mask = torch.stack([allowed_words(param["allowed"], vocab) for param in params]).to(device)
    sampled = [param for param in params if param["temperature"]]
    modes = torch.tensor([MODES[param["logprobs"]] for param in params], dtype=torch.int8, device=device)
    optional = {}
    if any(biases):
        starts = torch.tensor([0] + [len(bias) for bias in biases]).cumsum(0)
        optional = {
            "bias_starts": starts.to(device, torch.int32),
            "bias_ids": torch.tensor([i for bias in biases for i in bias], dtype=torch.int32, device=device),
            "bias_values": torch.tensor([v for bias in biases for v in bias.values()], device=device).float(),
        }
    return SamplerRows(
        penalty_rows=column("penalty_row", torch.int32),
        keys=keys.to(device),
        top_k=column("top_k", torch.int32),
        logprobs_modes=modes,
        mask=mask,
        num_logprobs=num_logprobs,
        any_penalty=any(param["penalty_row"] >= 0 for param in params),
        any_filter=any(param["top_k"] or param["top_p"] < 1 or param["min_p"] for param in sampled),
        all_greedy=not sampled,
        any_processed=any(param["logprobs"] == "processed" for param in params),
        **{name: column(name, torch.float32) for name in floats},
        **optional,
    )


def allowed_words(ids, vocab: int) -> torch.Tensor:
    """Token ids, or None for all, as the int32 words of a grammar mask."""
    bits = torch.zeros(-(-vocab // 32) * 32, dtype=torch.int64)
    bits[torch.arange(vocab) if ids is None else torch.tensor(ids, dtype=torch.int64)] = 1
    return (bits.view(-1, 32) << torch.arange(32)).sum(1).to(torch.int32)


def make_state(vocab: int, texts: list[tuple[list[int], list[int]]], device="cpu") -> SamplerState:
    """A state with one row per (prompt ids, generated ids)."""
    state = SamplerState(len(texts), vocab, device)
    for row, (prompt, generated) in enumerate(texts):
        state.set_row(row, prompt, generated)
    return state


def gumbel(token: int, key: tuple[int, int]) -> float:
    """The noise of a token under a row's key words, in Python's own integers and floats."""

    def lowbias32(x: int) -> int:
        x = (x ^ (x >> 16)) * 0x7FEB352D % 2**32
        x = (x ^ (x >> 15)) * 0x846CA68B % 2**32
        return x ^ (x >> 16)

    low, high = (word % 2**32 for word in key)
    bits = lowbias32(lowbias32(token ^ low) ^ high) >> 8
    return -math.log(-math.log(max(bits, 1) * 2.0**-24))
