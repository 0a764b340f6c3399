"""Steps of decodes and a few short prompts in a few fixed shapes, so that they can be recorded as graphs.

A shape has places for so many decodes, for so many tokens of prompts behind them, and for PROMPTS prompts. In places
for decodes that stay empty there is padding: tokens of the row that no sequence has, without a context, which store
nothing. Empty places for tokens lie behind the prompts and belong to no sequence; those for prompts have no tokens.
"""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from llama.engine.config import EngineConfig
from llama.engine.device import Mirror
from llama.engine.plan import Plan

# The host takes some milliseconds for a step that is not recorded, as a GPU does for a few hundred tokens: with more of
# them there is nothing to hide.
DECODES = (0, 4, 16)
TOKENS = (32, 64, 128, 256)
PROMPTS = 4


class Shape(NamedTuple):
    decodes: int
    tokens: int  # of prompts
    samples: int

    @property
    def num_tokens(self) -> int:
        return self.decodes + self.tokens

    @property
    def sequences(self) -> int:
        return self.decodes + PROMPTS

    def holds(self, plan: Plan) -> bool:
        decodes = plan.num_decodes
        return (
            decodes <= self.decodes
            and plan.num_tokens - decodes <= self.tokens
            and len(plan.rows) - decodes <= PROMPTS
            and len(plan.sample_sources) <= self.samples
        )


def shapes_of(config: EngineConfig) -> list[Shape]:
    """Those that an engine's steps may take, the smallest first."""
    most, budget = config.max_num_seqs - 1, config.token_budget  # beside a prompt
    found = {
        Shape(decodes, min(tokens, budget - decodes), min(decodes + PROMPTS, config.most_samples))
        for decodes in (min(decodes, most) for decodes in DECODES)
        for tokens in TOKENS
        if decodes < budget
    }
    return sorted(found, key=lambda shape: (shape.num_tokens, shape))


class MixedInputs:
    """What a step of one of these shapes is told, in tensors that do not move."""

    def __init__(self, shapes: Sequence[Shape], padding_row: int, device: torch.device) -> None:
        self._padding_row = padding_row
        largest = Shape(*map(max, zip(*shapes, strict=True)))
        sequences, tokens = (largest.sequences,), (largest.num_tokens,)
        self._mirror = Mirror(
            {
                "row_ids": (sequences, np.int64),
                "context_lens": (sequences, np.int32),
                "query_starts": ((largest.sequences + 1,), np.int32),
                "positions": (tokens, np.int64),
                "kv_slots": (tokens, np.int64),
                "adapter_indices": (tokens, np.int32),
                "token_ids": ((largest.tokens,), np.int64),
                "sources": ((largest.samples,), np.int64),
            },
            device,
        )

    def fill(self, shape: Shape, plan: Plan | None = None, numbers: Mapping[str, Any] | None = None) -> None:
        """Put the numbers of a plan to their places and send them; without a plan all is padding. `numbers` are those
        that `Runner._numbers` finds."""
        host, numbers = self._mirror.host, numbers or {}
        decodes, places = (0 if plan is None else plan.num_decodes), shape.decodes
        for name, neutral in (("row_ids", self._padding_row), ("context_lens", 0)):
            _put(host[name][: shape.sequences], numbers.get(name), decodes, places, neutral)
        for name, neutral in (("positions", 0), ("kv_slots", -1), ("adapter_indices", 0)):
            _put(host[name][: shape.num_tokens], numbers.get(name), decodes, places, neutral)
        _put(host["token_ids"][: shape.tokens], numbers.get("token_ids"), 0, 0, 0)
        starts = host["query_starts"][: shape.sequences + 1]
        starts[: places + 1], starts[places + 1 :] = np.arange(places + 1), places
        sources = host["sources"][: shape.samples]
        sources[:] = 0
        if plan is not None:
            lens = plan.query_lens[decodes:]
            ends = places + np.cumsum(lens)
            starts[places + 1 : places + 1 + len(lens)], starts[places + 1 + len(lens) :] = ends, ends[-1]
            given = plan.sample_sources
            sources[: len(given)] = np.where(given < decodes, given, given - decodes + places)
        self._mirror.send()

    def tensors(self, shape: Shape) -> dict[str, Tensor]:
        device = self._mirror.device
        counts = {"row_ids": shape.sequences, "context_lens": shape.sequences, "query_starts": shape.sequences + 1}
        counts |= {"token_ids": shape.tokens, "sources": shape.samples}
        return {name: tensor[: counts.get(name, shape.num_tokens)] for name, tensor in device.items()}


def _put(target: Any, values: Any, decodes: int, places: int, neutral: int) -> None:
    """`values` to their places, those of the prompts from `places` on; whatever has none is `neutral`."""
    target[:] = neutral
    if values is not None:
        target[:decodes] = values[:decodes]
        target[places : places + len(values) - decodes] = values[decodes:]
