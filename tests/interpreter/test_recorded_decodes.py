"""Recorded steps with every op in Triton's interpreter: the kernels see padding, and inputs that are views."""

from dataclasses import replace

import pytest
import torch

from llama import SamplingParams
from llama.engine import graph_runner, mixed_steps
from tests import drafters
from tests.drafters import Drafter
from tests.engine.fakes import add
from tests.engine.test_graphs import Stand, graph_engine, run
from tests.model.models import tiny_model
from tests.test_equivalence import Case

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")  # infinities meet on purpose

DRAFTS = {"method": "ngram", "num_speculative_tokens": 2}
ASKS = {
    "a": SamplingParams(temperature=0, max_tokens=3, ignore_eos=True),
    "b": SamplingParams(temperature=1.0, top_p=0.9, seed=3, max_tokens=4, ignore_eos=True),
    "c": SamplingParams(temperature=0.9, frequency_penalty=0.5, logprobs=2, seed=4, max_tokens=4, ignore_eos=True),
}


def test_padding_and_views_change_nothing(monkeypatch):
    monkeypatch.setattr(graph_runner, "bucket_of", lambda count: 1000)
    model = tiny_model(dtype=torch.float32)
    stand, told = Stand(), []
    for stands in (stand, None):
        engine = graph_engine(Case(lag=1, max_num_seqs=4, num_tokens=64), stands, model)
        engine.runner.kv.data.fill_(float("nan"))
        for i, (name, params) in enumerate(ASKS.items()):
            add(engine, name, [i + 1, 5, 7], params)
        told.append(run(engine))
    assert told[0] == told[1]
    assert stand.num_replays > 2


def test_prompts_beside_decodes_change_nothing(monkeypatch):
    """A prompt alone, one behind a cached prefix beside a decode, and one beside two."""
    monkeypatch.setattr(mixed_steps, "DECODES", (0, 2))
    monkeypatch.setattr(mixed_steps, "TOKENS", (8,))
    monkeypatch.setattr(graph_runner, "bucket_of", lambda count: 1000)
    prompts = [1, 5, 7, 8, 9, 2, 4, 3], [1, 5, 7, 8, 9, 6], [3, 4]
    model, told, taken = tiny_model(dtype=torch.float32), [], []
    for stand in (Stand(), None):
        options = {"record_prompts": True} if stand else {}
        engine = graph_engine(Case(lag=1, max_num_seqs=4, num_tokens=64), stand, model, **options)
        engine.runner.kv.data.fill_(float("nan"))
        if stand:
            step = engine.runner._run_mixed
            monkeypatch.setattr(engine.runner, "_run_mixed", lambda *way, step=step: taken.append(way[0]) or step(*way))
        outputs = []
        for (name, params), prompt in zip(ASKS.items(), prompts, strict=True):
            add(engine, name, prompt, params)
            outputs += engine.step()
        while engine.has_unfinished:
            outputs += engine.step()
        told.append({name: [t for o in outputs if o.request_id == name for t in o.token_ids] for name in ASKS})
    assert told[0] == told[1] and [len(tokens) for tokens in told[0].values()] == [3, 4, 4]
    assert [shape.decodes for shape in taken] == [0, 2, 2]


def half_right(future: list[int], count: int) -> list[int]:
    return [*future[:1], *range(count)][:count]


def test_drafts_change_nothing(monkeypatch):
    """Runs as decodes of a recorded step and as chunks, half of their drafts right, against a run without."""
    monkeypatch.setattr(graph_runner, "bucket_of", lambda count: 1000)
    model = tiny_model(dtype=torch.float32)
    told: dict[str, list[int]] = {}
    for stand in (None, None, Stand()):
        engine = graph_engine(Case(lag=1, max_num_seqs=2, num_tokens=64), stand, model, speculative_config=DRAFTS)
        source = {name: Drafter(told.get(name, []), half_right) for name in ("b", "c")}
        drafters.use(engine, lambda name, _, source=source: source[name])
        for i, name in enumerate(source):
            wanted = replace(ASKS[name], max_tokens=5, speculative=bool(told))
            add(engine, name, [i + 1, 5, 7], wanted)
        answers = {name: tokens for (name, _), tokens in run(engine).items()}
        assert (engine.metrics().num_accepted_tokens >= 2) == bool(told)
        assert answers == told or not told
        told = answers
    assert ("model", 2 + 2 * 2, False, True) in engine.runner._graphs._ready
