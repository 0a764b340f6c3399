"""Triton launches on the current CUDA device, whatever device its tensors are on: a model's ops run on the model's."""

from contextlib import contextmanager

import pytest
import torch

from llama import SamplingParams
from llama.kernels import ops
from llama.model import fixed_rows
from tests.engine.fakes import add, run
from tests.engine.test_draft_model import drafting
from tests.model.models import tiny_model

NAMES = "rms_norm add_rms_norm cos_sin rope_and_store paged_attention silu_mul".split()


@pytest.fixture
def current(monkeypatch):
    """The devices that were made the current one, the innermost last; a model's ops want to be in there."""
    devices = []

    @contextmanager
    def enter(device):
        devices.append(device)
        yield
        devices.pop()

    monkeypatch.setattr(ops, "on_device", enter)
    return devices


@pytest.fixture
def model(current, monkeypatch):
    def checked(op):
        def call(*arguments):
            assert current == [torch.device("cpu")]
            return op(*arguments)

        return call

    for name in NAMES:
        monkeypatch.setattr(ops, name, checked(getattr(ops, name)))
    return tiny_model()


def test_forwards_of_research(model, current):
    ids = torch.arange(6)[None]
    _, cache = model.run_with_cache(ids, "layers.0.resid_post")
    model.unembed(cache["layers.0.resid_post"])
    model.session(8)([1, 2, 3])
    assert not current


def test_what_the_deterministic_mode_tries_out(current, monkeypatch):
    find, seen = fixed_rows.find_pieces, []

    def find_here(*arguments):
        seen.extend(current)
        return find(*arguments)

    monkeypatch.setattr(fixed_rows, "find_pieces", find_here)
    fixed_rows.fix_rows(tiny_model())
    assert seen == [torch.device("cpu")]


def test_drafts_of_a_model(current, monkeypatch):
    engine, seen = drafting(tiny_model()), []
    draft = engine.scheduler.speculation.draft_model
    step = draft._step

    def step_here(*arguments):
        seen.extend(current)
        return step(*arguments)

    monkeypatch.setattr(draft, "_step", step_here)
    add(engine, "a", [7, 8, 9], SamplingParams(max_tokens=6, temperature=0, ignore_eos=True))
    run(engine)
    assert set(seen) == {torch.device("cpu")}
