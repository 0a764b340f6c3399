"""Logits equal PEFT's, from adapters that peft saved and our reader read."""

import pytest
import torch

from llama.model.lora import LoadedAdapters, read_adapter
from llama.model.transformer import Transformer
from tests.lora.adapters import VOCAB, make_adapter, save_base

ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]
MLP = ["gate_proj", "up_proj", "down_proj"]

CASES = {
    **{name: {"target_modules": [name]} for name in (*ATTENTION, *MLP, "embed_tokens", "lm_head")},
    "q,v": {"target_modules": ["q_proj", "v_proj"]},
    "attention": {"target_modules": ATTENTION},
    "mlp": {"target_modules": MLP},
    "all-linear": {"target_modules": "all-linear"},
    "everything": {"target_modules": [*ATTENTION, *MLP, "embed_tokens", "lm_head"]},
    "r=1": {"target_modules": ATTENTION, "r": 1},
    "r=17": {"target_modules": ["k_proj", "up_proj"], "r": 17},
    "r=64": {"target_modules": "all-linear", "r": 64},
    "rslora": {"target_modules": "all-linear", "use_rslora": True, "r": 9},
    "rank_pattern": {"target_modules": "all-linear", "rank_pattern": {"q_proj": 2, "layers.1.mlp.up_proj": 11}},
    "alpha_pattern": {"target_modules": "all-linear", "alpha_pattern": {"self_attn.v_proj": 31, "down_proj": 0.5}},
    "both patterns, rslora": {
        "target_modules": "all-linear",
        "use_rslora": True,
        "rank_pattern": {"q_proj": 8},
        "alpha_pattern": {"model.layers.2.self_attn.q_proj": 3, "q_proj": 20},
    },
    "one layer": {"target_modules": ATTENTION, "layers_to_transform": 1},
    "two layers": {"target_modules": ["q_proj", "down_proj"], "layers_to_transform": [0, 2]},
    "a layer, and whole names": {
        "target_modules": ["q_proj", "model.layers.2.mlp.up_proj", "lm_head"],
        "layers_to_transform": [0],
    },
    "regular expression": {"target_modules": r".*\.[02]\.(self_attn|mlp)\.(q|down)_proj"},
    "excluded": {"target_modules": "all-linear", "exclude_modules": ["k_proj", "layers.1.mlp.up_proj"]},
    "excluded by expression": {"target_modules": ATTENTION, "exclude_modules": r".*\.1\..*"},
}


def both(base_path, path, options):
    """Our logits of two equal sequences, with and without the adapter, and PEFT's."""
    reference = make_adapter(base_path, path, **options)
    model = Transformer.from_pretrained(base_path)
    loaded = LoadedAdapters(model, 3)
    loaded.put(2, read_adapter(path, model, max_rank=64))
    ids = torch.randint(0, VOCAB, (1, 21), generator=torch.Generator().manual_seed(1))
    ours = model.logits(ids.repeat(2, 1), loaded.stacks, torch.tensor([2, 0]))
    with torch.no_grad():
        theirs = reference(ids).logits[0]
    return ours[0], ours[1], theirs, model.logits(ids.repeat(2, 1))[1]


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("case", CASES)
def test_logits_equal_pefts(case, tied, request, tmp_path):
    path = request.getfixturevalue("tied_base_path" if tied else "base_path")
    adapted, plain, theirs, base = both(path, tmp_path, CASES[case])
    assert (adapted - theirs).abs().max() <= 1e-4 * theirs.abs().max()
    assert (adapted - base).abs().max() > 1e-2 * base.abs().max(), "the adapter changes nothing: nothing is tested"
    assert torch.equal(plain, base)


def test_a_base_with_biases(tmp_path):
    base_path = save_base(tmp_path / "base", tied=False, attention_bias=True, mlp_bias=True)
    adapted, plain, theirs, base = both(base_path, tmp_path / "adapter", {"target_modules": "all-linear"})
    assert (adapted - theirs).abs().max() <= 1e-4 * theirs.abs().max()
    assert torch.equal(plain, base)


def test_packed_weights_take_adapters_too(base_path, tmp_path):
    make_adapter(base_path, tmp_path, target_modules="all-linear")
    model = Transformer.from_pretrained(base_path)
    loaded = LoadedAdapters(model, 1)
    loaded.put(1, read_adapter(tmp_path, model, max_rank=64))
    ids, ones = torch.arange(12).view(1, 12), torch.ones(1, dtype=torch.int64)
    unpacked = model.logits(ids, loaded.stacks, ones)
    model.prepare(packing="always")
    torch.testing.assert_close(model.logits(ids, loaded.stacks, ones), unpacked, rtol=1e-5, atol=1e-5)


def test_an_index_holds_nothing_of_what_was_there_before(base_path, tmp_path):
    model = Transformer.from_pretrained(base_path, dtype=torch.float64)
    adapters = []
    for i, options in enumerate(({"target_modules": "all-linear", "r": 40}, {"target_modules": ["k_proj"], "r": 2})):
        make_adapter(base_path, tmp_path / str(i), seed=i, **options)
        adapters.append(read_adapter(tmp_path / str(i), model, max_rank=64))
    ids, ones = torch.arange(12).view(1, 12), torch.ones(1, dtype=torch.int64)
    fresh, reused = LoadedAdapters(model, 1), LoadedAdapters(model, 1)
    fresh.put(1, adapters[1])
    reused.put(1, adapters[0])
    reused.put(1, adapters[1])
    actual, expected = (model.logits(ids, each.stacks, ones) for each in (reused, fresh))
    torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-12)


def test_a_stack_that_grows_keeps_what_it_held(base_path, tmp_path):
    model = Transformer.from_pretrained(base_path, dtype=torch.float64)
    loaded = LoadedAdapters(model, 2)
    ids = torch.arange(12).view(1, 12)
    seen = []
    for index, rank in ((1, 3), (2, 33)):
        make_adapter(base_path, tmp_path / str(rank), r=rank, target_modules=["q_proj", "embed_tokens", "up_proj"])
        loaded.put(index, read_adapter(tmp_path / str(rank), model, max_rank=64))
        seen.append(model.logits(ids, loaded.stacks, torch.ones(1, dtype=torch.int64)))
    assert loaded.generation == 2 * (1 + 3 + 3)  # an embedding, and three layers' qkv and gate_up, twice
    torch.testing.assert_close(seen[0], seen[1], rtol=1e-12, atol=1e-12)
