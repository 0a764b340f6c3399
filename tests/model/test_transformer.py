"""The forward pass: counts, the oracle, paged steps of any composition, hooks, and the research entry's edges."""

from functools import partial

import pytest
import torch

from llama.api.errors import ParameterError
from llama.model.config import ModelConfig
from llama.model.transformer import MLP, Attention, Block, RMSNorm, Transformer
from tests import naive
from tests.model.models import LLAMA_3_1, hugging_face_weights, tiny_config, tiny_model
from tests.model.paging import Pages


@pytest.mark.parametrize(
    ("preset", "count"),
    [
        ("llama-3.1-8b", 8_030_261_248),
        ("llama-3.1-70b", 70_553_706_496),
        ("llama-3.1-405b", 405_853_388_800),
        ("llama-3.2-1b", 1_235_814_400),
        ("llama-3.2-3b", 3_212_749_824),
    ],
)
def test_parameter_counts(preset, count):
    config = ModelConfig.preset(preset)
    model = Transformer(config, device="meta", dtype=torch.bfloat16)
    assert sum(parameter.numel() for parameter in model.parameters()) == count == config.num_parameters


def prompts(seed, *lengths):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(0, 97, (length,), generator=generator).tolist() for length in lengths]


@pytest.mark.parametrize(
    "changes",
    [
        {"rope_scaling": LLAMA_3_1},
        {"num_key_value_heads": 1, "tie_word_embeddings": True},
        {"num_key_value_heads": 4, "head_dim": 10},
    ],
    ids=str,
)
def test_logits_equal_the_oracle(changes):
    model = tiny_model(**changes)
    ids = torch.tensor(prompts(0, 70, 70))
    weights = hugging_face_weights(model)
    logits = model.logits(ids)
    for row in range(2):
        torch.testing.assert_close(logits[row], naive.forward(weights, model.config, ids[row]), atol=1e-11, rtol=0)


@pytest.mark.parametrize("block_size", [1, 4, 16, 256])
def test_mixed_steps_equal_the_oracle(block_size):
    """Chunks, decodes and a late arrival share batches; unused slots hold NaN; blocks lie scattered."""
    model = tiny_model(rope_scaling=LLAMA_3_1)
    texts = prompts(1, 40, 23, 9)
    pages = Pages(model, [40, 23, 9], block_size)
    seen = {0: [], 1: [], 2: []}

    def step(*chunks):
        chunks = sorted(chunks, key=lambda chunk: chunk[1] != 1)
        taken = []
        for sequence, count in chunks:
            start = pages.computed[sequence]
            taken.append((sequence, texts[sequence][start : start + count]))
        rows = pages.step(taken).split([count for _, count in chunks])
        for (sequence, _), logits in zip(chunks, rows, strict=True):
            seen[sequence].append(logits)

    step((0, 17), (1, 1))
    step((0, 1), (1, 20))
    step((2, 7), (0, 21), (1, 1))
    step((2, 1), (0, 1), (1, 1))
    step((2, 1))
    weights = hugging_face_weights(model)
    for sequence, text in enumerate(texts):
        expected = naive.forward(weights, model.config, text)
        torch.testing.assert_close(torch.cat(seen[sequence]), expected, atol=1e-11, rtol=0)


def test_logit_rows_select_and_repeat():
    model = tiny_model()
    (text,) = prompts(2, 12)
    every = Pages(model, [12], 4).step([(0, text)])
    some = Pages(model, [12], 4).step([(0, text)], logit_rows=[11, 3, 11])
    torch.testing.assert_close(some, every[[11, 3, 11]], atol=1e-12, rtol=0)
    assert Pages(model, [12], 4).step([(0, text)], logit_rows=[]).shape == (0, 97)


def test_empty_batch_and_empty_chunk():
    model = tiny_model()
    (text,) = prompts(3, 6)
    pages = Pages(model, [6, 4], 4)
    assert pages.step([]).shape == (0, 97)
    with_empty = pages.step([(0, text), (1, [])])
    torch.testing.assert_close(with_empty, Pages(model, [6], 4).step([(0, text)]), atol=1e-12, rtol=0)


def test_hooks_fire_on_every_module():
    model = tiny_model(tie_word_embeddings=True)
    fired = []
    for module in model.modules():
        if module is not model.layers:
            module.register_forward_hook(lambda module, args, output: fired.append(module))
    model.logits(torch.tensor([[1, 2, 3]]))
    assert {id(module) for module in fired} == {id(m) for m in model.modules() if m is not model.layers}
    kinds = [type(module) for module in fired]
    assert kinds.count(Block) == kinds.count(Attention) == kinds.count(MLP) == 2
    assert kinds.count(RMSNorm) == 5


def test_a_hook_can_change_the_result():
    model = tiny_model()
    ids = torch.tensor([[1, 2, 3]])
    before = model.logits(ids)
    handle = model.layers[0].mlp.register_forward_hook(lambda module, args, output: output * 0)
    assert not torch.equal(model.logits(ids), before)
    handle.remove()
    assert torch.equal(model.logits(ids), before)


def test_the_seed_decides_the_weights():
    config = tiny_config()
    one, same, other = (Transformer(config, seed=seed).logits(torch.tensor([[5, 6]])) for seed in (1, 1, 2))
    assert torch.equal(one, same)
    assert not torch.equal(one, other)


def test_casts_keep_the_rotary_frequencies_and_the_tie():
    model = tiny_model(tie_word_embeddings=True, dtype=torch.float32)
    frequencies = model.frequencies.clone()
    model = model.to(torch.bfloat16)
    assert model.lm_head.weight is model.embed_tokens.weight
    assert model.frequencies.dtype == torch.float32
    assert torch.equal(model.frequencies, frequencies)
    model = Transformer(model.config, device="meta").to_empty(device="cpu")
    assert model.lm_head.weight is model.embed_tokens.weight
    assert torch.equal(model.frequencies, frequencies)


@pytest.mark.parametrize("bad", [[1, 2], [[1.0]], [[97]], [[-1]]], ids=str)
def test_logits_refuses(bad):
    with pytest.raises(ValueError, match="token"):
        tiny_model().logits(torch.tensor(bad))


def test_logits_of_nothing():
    assert tiny_model().logits(torch.zeros(2, 0, dtype=torch.int64)).shape == (2, 0, 97)


@pytest.mark.slow
def test_131072_tokens_of_context():
    """One layer of one head: prefill in chunks, then decode, against the oracle's last rows."""
    length, chunk = 131_072, 4096
    sizes = {"num_hidden_layers": 1, "num_attention_heads": 1, "num_key_value_heads": 1, "head_dim": 8}
    scaling = ModelConfig.preset("llama-3.1-8b").rope_scaling
    model = tiny_model(**sizes, hidden_size=16, max_position_embeddings=length, rope_scaling=scaling)
    (text,) = prompts(5, length)
    pages = Pages(model, [length], 16)
    for start in range(0, length - 2, chunk):
        pages.step([(0, text[start : min(start + chunk, length - 2)])], logit_rows=[])
    logits = torch.cat([pages.step([(0, [token])]) for token in text[-2:]])
    expected = naive.forward(hugging_face_weights(model), model.config, text, last=2)
    torch.testing.assert_close(logits, expected, atol=1e-10, rtol=0)


def test_what_is_no_model_dtype_or_no_ids_is_refused():
    config = ModelConfig.preset("tiny")
    for dtype in (torch.int8, "float32", None):
        with pytest.raises(ValueError, match=r"dtype must be torch\.float64"):
            Transformer(config, dtype=dtype)
    with pytest.raises(ValueError, match="int64 tensor"):
        Transformer(config).logits([[1, 2]])


@pytest.mark.parametrize("device", ["cuda:99", "gpu", "cpu:x", []], ids=str)
def test_a_device_that_is_not_there_is_refused_in_one_line(device, tmp_path):
    for make in (partial(Transformer, ModelConfig.preset("tiny")), partial(Transformer.from_pretrained, tmp_path)):
        with pytest.raises(ParameterError, match=r"^device=.* cannot be used: ") as caught:
            make(device=device)
        assert caught.value.param == "device"
        assert "\n" not in str(caught.value)
