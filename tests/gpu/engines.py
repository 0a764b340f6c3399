"""Engines on a GPU for tests: tiny models whose float64 copy on the CPU is the oracle, and larger ones in bfloat16."""

from collections.abc import Callable
from typing import TypeVar

import torch

from llama.api.outputs import FinishReason
from llama.engine.engine import Engine
from llama.engine.graph_runner import GraphRunner
from llama.engine.graphs import Record
from llama.model.config import ModelConfig
from llama.model.kv_cache import KVCache
from llama.model.transformer import Transformer
from tests.model.models import tiny_model
from tests.test_equivalence import ASKS, EOS, Case, Run, oracle

DEVICE = "cuda"
T = TypeVar("T")


def tiny() -> Transformer:
    """The oracle's model of tests.test_equivalence in float32, in which none of its tokens flips."""
    return tiny_model(dtype=torch.float32).to(DEVICE)


def small(**changes) -> Transformer:
    """Shapes like a real model's, in bfloat16."""
    values = {
        "vocab_size": 4003,
        "hidden_size": 512,
        "intermediate_size": 1408,
        "num_hidden_layers": 3,
        "num_attention_heads": 8,
        "num_key_value_heads": 2,
        "head_dim": 64,
        "max_position_embeddings": 131_072,
    }
    return Transformer(ModelConfig(**{**values, **changes}), device=DEVICE, dtype=torch.bfloat16, seed=1)


def engine(model: Transformer, case: Case | None = None, *, record: Record | None = None, **options) -> Engine:
    """`record` stands in for CUDA graphs."""
    case = case or Case()
    config = case.config(**options)
    if record is None:
        made = Engine(model, config, eos_token_ids={EOS})
    else:
        kv = KVCache(model.config, config.num_blocks, config.block_size, dtype=model.dtype, device=model.device)
        runner = GraphRunner(model, kv, config, eos_token_ids=frozenset({EOS}), record=record)
        made = Engine(model, config, eos_token_ids={EOS}, runner=runner)
    made.runner.lag = case.lag
    return made


class Unrecorded:
    """In place of graphs: the same functions on the same tensors, launched kernel by kernel."""

    def __call__(self, function: Callable[[], T]) -> Callable[[], T]:
        return function

    def used_bytes(self) -> int:
        return 0


def poison(made: Engine) -> None:
    """Garbage into whatever a step must write before it reads."""
    if isinstance(made.runner, GraphRunner):
        made.runner._logits.fill_(float("nan"))
        made.runner._inputs._data.random_(0, 256)
        if made.runner._shapes:
            made.runner._mixed._mirror._data.random_(0, 256)


def run(made: Engine, before_step: Callable[[], None] = lambda: None) -> dict[tuple[str, int], tuple[list, list]]:
    """-> tokens and log-probabilities of every completion. A step that fails ends its requests with an error: two runs
    that do so would agree."""
    told: dict[tuple[str, int], tuple[list, list]] = {}
    while made.has_unfinished:
        before_step()
        for output in made.step():
            assert output.finish_reason != FinishReason.ERROR, output
            tokens, logprobs = told.setdefault((output.request_id, output.index), ([], []))
            tokens += output.token_ids
            logprobs += output.logprobs or []
        made.check()
    return told


class Poisoned(Run):
    def disturb(self) -> None:
        super().disturb()
        poison(self.engine)


def check_tokens(made: Engine, case: Case) -> None:
    """An engine of `tiny` writes the oracle's tokens, beside garbage wherever nothing must be read."""
    for _ in range(2):  # the second time most of it is replayed
        for asked, index, outputs in Poisoned(case, made).answers(ASKS):
            tokens = [token for output in outputs for token in output.token_ids]
            assert tokens == oracle(asked, index).token_ids, (asked, index)
