"""Adapters from the engine down through the Triton kernels, in the interpreter, against models they are merged into."""

import pytest
import torch

from llama.api.params import SamplingParams
from llama.engine.adapters import Adapter
from llama.engine.config import EngineConfig
from llama.engine.engine import Engine
from llama.kernels.gpu import lora
from llama.model.lora import LoadedAdapters
from llama.model.lora.adapter import AdapterWeights, Pair, module_sizes
from llama.model.lora.loaded import module_places
from tests.engine.fakes import add
from tests.model.models import tiny_config, tiny_model

CHANGES = {"num_hidden_layers": 1, "hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 2}
TARGETS = {
    1: ("q_proj", "v_proj", "down_proj"),
    2: ("k_proj", "o_proj", "gate_proj", "up_proj", "embed_tokens", "lm_head"),
}
RANKS = {1: 3, 2: 20}


@pytest.fixture(autouse=True)
def few_programs(monkeypatch):
    monkeypatch.setattr(lora, "_TILES_ALONE", 1)


def make_model():
    return tiny_model(dtype=torch.float32, **CHANGES)


def make_adapter(index):
    config = tiny_config(**CHANGES)
    generator = torch.Generator().manual_seed(index)
    pairs = {}
    for name in module_places(make_model()):
        if name.endswith(TARGETS[index]):
            in_features, out_features = module_sizes(config)[name]
            a = torch.randn(RANKS[index], in_features, generator=generator) * in_features**-0.5
            pairs[name] = Pair(a, torch.randn(out_features, RANKS[index], generator=generator) * 0.2)
    digest = bytes([index]) * 16
    return AdapterWeights(path="", pairs=pairs, rank=RANKS[index], targets=TARGETS[index], nbytes=0, digest=digest)


def merged(index):
    model = make_model()
    for name, pair in (make_adapter(index).pairs if index else {}).items():
        module, slice_index, starts = module_places(model)[name]
        delta = pair.b @ pair.a
        if name.endswith("embed_tokens"):
            module.weight += delta.t()
        else:
            module.weight[starts[slice_index] : starts[slice_index + 1]] += delta
    return model


def test_adapters_in_one_batch_equal_merged_models():
    model = make_model()
    loaded = LoadedAdapters(model, 2)
    for index in (1, 2):
        loaded.put(index, make_adapter(index))
    token_ids = torch.randint(0, 97, (3, 3), generator=torch.Generator().manual_seed(0))
    actual = model.logits(token_ids, loaded.stacks, torch.tensor([2, 0, 1]))
    for row, index in enumerate((2, 0, 1)):
        expected = merged(index).logits(token_ids[row : row + 1])[0]
        torch.testing.assert_close(actual[row], expected, rtol=1e-4, atol=1e-4)


def test_the_engine_writes_what_merged_models_would():
    config = EngineConfig(max_model_len=16, max_num_batched_tokens=16, block_size=4, num_blocks=16, max_num_seqs=4)
    engine = Engine(make_model(), config, eos_token_ids=frozenset())
    for index in (1, 2):
        content = make_adapter(index)
        engine.adapters.add(Adapter(f"adapter-{index}", content.digest, content))
    prompt = [5, 3, 60]
    tokens = {0: [], 1: [], 2: []}
    for index in tokens:
        params = SamplingParams(temperature=0, max_tokens=2, ignore_eos=True)
        add(engine, str(index), prompt, params, lora=f"adapter-{index}" if index else None)
    while engine.has_unfinished:
        for output in engine.step():
            tokens[int(output.request_id)] += output.token_ids
    for index, written in tokens.items():
        scores = merged(index).logits(torch.tensor([prompt + written[:1]]))[0, -2:]
        assert scores.argmax(-1).tolist() == written
    assert len({tuple(written) for written in tokens.values()}) == 3
