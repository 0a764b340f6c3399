"""The digest of a model: each byte of it counts, the form that it lies in does not."""

import copy
import pickle

import numpy as np
import pytest
import torch
from torch.nn.utils import prune

from llama.model import digest
from tests.model.models import tiny_model


@pytest.fixture
def computed(monkeypatch):
    """What the sums were computed of."""
    seen = []

    def of(self, key, tensor, really=digest._Sums.of):
        seen.append(tensor.numel())
        return really(self, key, tensor)

    monkeypatch.setattr(digest._Sums, "of", of)
    return seen


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_every_number_of_every_weight_counts(dtype):
    model = tiny_model(dtype=dtype, attention_bias=True)
    before = model.digest()
    for name, parameter in model.named_parameters():
        flat = parameter.view(-1)
        for place in (0, len(flat) // 2 + 1, len(flat) - 1):
            kept = flat[place].clone()
            flat[place] = torch.nextafter(kept, kept + 1)
            assert model.digest() != before, (name, place)
            flat[place] = kept
            assert model.digest() == before, (name, place)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_what_adds_up_to_the_same_counts(dtype):
    """Signs, which are the highest bits alone, and places."""
    model = tiny_model(dtype=dtype)
    weight = model.layers[0].self_attn.o_proj.weight
    kept, seen = weight.clone(), {model.digest()}
    for changed in (-kept, kept.roll(16, 1), kept.roll(1, 0), kept.flip(0), torch.cat((-kept[:2], kept[2:]))):
        weight.copy_(changed)
        seen.add(model.digest())
    assert len(seen) == 6


@pytest.mark.parametrize("size", [1, 7, 8, 8 * digest._BLOCK - 8, 8 * digest._BLOCK * 5 + 13])
@pytest.mark.parametrize("start", [0, 3])
@pytest.mark.parametrize("at_once", [2, 256])
def test_sums_are_those_of_the_formula_whatever_is_summed_together(monkeypatch, size, start, at_once):
    monkeypatch.setattr(digest, "_BLOCKS_AT_ONCE", at_once)
    data = torch.randint(0, 256, (start + size,), dtype=torch.uint8, generator=torch.Generator().manual_seed(size))
    numbers = np.zeros(-(-size // (8 * digest._BLOCK)) * digest._BLOCK * 8, np.uint8)
    numbers[:size] = data[start:].numpy()
    factors = np.random.PCG64(0).random_raw(digest._BLOCK).view(np.int64) | 1
    products = numbers.view(np.int64).reshape(-1, digest._BLOCK) * factors
    expected = (products ^ (products >> 32)).sum(1).tobytes()
    assert digest._Sums().of("key", data[start:]) == f"key({size},)torch.uint8".encode() + expected


@pytest.mark.parametrize("scheme", [None, "int8", "int4", "fp8"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_form_does_not_count(scheme, dtype):
    def model(layout=None, **changes):
        made = tiny_model(dtype=dtype, hidden_size=64, intermediate_size=128, **changes)
        if scheme is not None:
            made.quantise(scheme)
        if layout is not None:
            made.prepare(layout, packing="always")
        return made

    expected = model().digest()
    for layout in ("compact", "balanced", "fast"):
        assert model(layout).digest() == expected
        assert model(layout, seed=3).digest() != expected
    if scheme is not None:
        assert tiny_model(dtype=dtype, hidden_size=64, intermediate_size=128).digest() != expected
        changed = model()
        changed.layers[1].mlp.down_proj.form.weight.scales[0, 40] *= 2
        assert changed.digest() != expected


def test_only_what_has_changed_is_read_again(computed):
    model = tiny_model(tie_word_embeddings=True)
    before = model.digest()
    assert len(computed) == len(list(model.parameters())) > 10  # a tied head is one weight
    computed.clear()
    assert model.digest() == before and not computed
    model.layers[1].mlp.down_proj.weight[3, 3] += 1
    assert model.digest() != before and computed == [48 * 80]
    computed.clear()
    model.layers[1].mlp.down_proj.weight[3, 3] -= 1
    model.prepare(packing="always")
    model.digest()
    packed = [module for module in model.modules() if getattr(module, "form", None) is not None]
    assert len(computed) == (len(packed) or 1)


def test_what_pytorch_does_not_count_is_seen_after_forgetting():
    model = tiny_model()
    before = model.digest()
    model.norm.weight.data[5] += 1
    model.digests.forget()
    assert model.digest() != before
    model.norm.weight.data[5] -= 1
    assert model.to(torch.bfloat16).to(torch.float64).digest() not in (before, model.to(torch.float32).digest())


def test_copies_have_digests_of_their_own():
    model = tiny_model()
    before = model.digest()
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert other.digest() == before
        other.norm.weight[5] += 1
        assert other.digest() != before == model.digest()


def test_masks_and_parametrisations_count():
    model, seen = tiny_model(), set()
    seen.add(model.digest())
    prune.l1_unstructured(model.layers[0].mlp.down_proj, "weight", 0.3)
    seen.add(model.digest())
    model.layers[0].mlp.down_proj.weight_mask[0].fill_(0)
    seen.add(model.digest())
    torch.nn.utils.parametrizations.weight_norm(model.layers[1].self_attn.o_proj)
    seen.add(model.digest())
    assert len(seen) == 4


def test_inference_tensors_are_read_each_time():
    with torch.inference_mode():
        model = tiny_model()
        before = model.digest()
        model.norm.weight[5] += 1
        assert model.digest() != before


def test_a_part_of_a_model_counts_what_was_put_into_the_others():
    def digest_after(*updates):
        digests = digest.Digests()
        for name, value in updates:
            digests.add_shared(name, torch.tensor([value]))
        return digests.of(tiny, tiny.config)

    tiny = tiny_model()
    assert digest_after() == tiny.digest()
    seen = [digest_after(), digest_after(("a", 1.0)), digest_after(("a", 2.0)), digest_after(("a", 1.0), ("a", 2.0))]
    assert len(set(seen)) == 4 and digest_after(("a", 1.0)) == seen[1]
