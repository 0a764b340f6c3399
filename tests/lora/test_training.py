"""Gradients with respect to adapters, and through them, equal PEFT's; what is asked of adapters beside `stacks` is one
clear error."""

import copy
import warnings
from contextlib import contextmanager

import pytest
import torch
from peft import PeftModel
from transformers import LlamaForCausalLM

from llama import Add, ParameterError
from llama.model.lora import LoadedAdapters, read_adapter
from llama.model.transformer import Transformer
from tests.lora.adapters import VOCAB, make_adapter

IDS = torch.randint(0, VOCAB, (2, 13), generator=torch.Generator().manual_seed(1))
WEIGHTS = torch.randn(2, 13, VOCAB, generator=torch.Generator().manual_seed(2))
EVERYTHING = ["q_proj", "v_proj", "o_proj", "up_proj", "down_proj", "embed_tokens", "lm_head"]


def loss(logits):
    return (logits.log_softmax(-1) * WEIGHTS).sum()


def loaded(base_path, path, num=2, **options):
    """Ours with the adapter under the last index, and PEFT's."""
    options = {"target_modules": EVERYTHING, "lora_alpha": 10} | options
    theirs = make_adapter(base_path, path, **options)
    model = Transformer.from_pretrained(base_path)
    adapters = LoadedAdapters(model, num)
    adapters.put(num, read_adapter(path, model, max_rank=64))
    return model, adapters, theirs


@contextmanager
def trained(stacks):
    tensors = [tensor for stack in stacks.values() for tensor in (stack.a, stack.b)]
    for tensor in tensors:
        tensor.requires_grad_()
    yield tensors
    for tensor in tensors:
        tensor.requires_grad_(False)


def close(ours, theirs):
    assert theirs.abs().max() > 1e-3
    torch.testing.assert_close(ours, theirs, rtol=0, atol=2e-5 * max(1.0, float(theirs.abs().max())))


def test_with_respect_to_an_adapter(base_path, tmp_path):
    model, adapters, theirs = loaded(base_path, tmp_path)
    for name, parameter in theirs.named_parameters():
        parameter.requires_grad_("lora_" in name)
    loss(theirs(IDS).logits).backward()
    expected = {name.removeprefix("base_model.model."): p.grad for name, p in theirs.named_parameters()}
    two = torch.tensor([2, 2])
    with trained(adapters.stacks):
        found = model.logits(IDS, adapters.stacks, two, grad=True)
        loss(found).backward()
    with torch.no_grad():
        torch.testing.assert_close(found, model.logits(IDS, adapters.stacks, two), rtol=1e-4, atol=1e-4)
    scale = 10 / 4  # inside our B
    attention = adapters.stacks[model.layers[1].self_attn.qkv_proj]
    for index, (name, rows) in enumerate({"q_proj": slice(0, 96), "k_proj": None, "v_proj": slice(128, 160)}.items()):
        if rows is None:
            continue
        where = f"model.layers.1.self_attn.{name}.lora_"
        close(attention.a.grad[1, index, :4], expected[f"{where}A.default.weight"])
        close(attention.b.grad[1, rows, :4] * scale, expected[f"{where}B.default.weight"])
    embedding = adapters.stacks[model.embed_tokens]
    close(embedding.a.grad[1, :, :4].T, expected["model.embed_tokens.lora_embedding_A.default"])
    close(embedding.b.grad[1, :, :4] * scale, expected["model.embed_tokens.lora_embedding_B.default"])
    head = adapters.stacks[model.lm_head]
    close(head.b.grad[1, :, :4] * scale, expected["lm_head.lora_B.default.weight"])
    assert not any(stack.a.grad[0].any() or stack.b.grad[0].any() for stack in adapters.stacks.values())


def test_what_a_step_makes_of_an_adapter_is_what_peft_makes_of_it(base_path, tmp_path):
    """Trained here beside a sequence of the base model, with gradients and without."""
    model, adapters, theirs = loaded(base_path, tmp_path, num=1, target_modules=["o_proj"], lora_alpha=4)
    theirs = theirs.train()
    own = [p for name, p in theirs.named_parameters() if "lora_" in name]
    ids, one = IDS[:1], torch.tensor([1])
    with trained(adapters.stacks) as tensors:
        ours_sgd, their_sgd = torch.optim.SGD(tensors, 1e-2), torch.optim.SGD(own, 1e-2)
        for _ in range(3):
            for sgd, logits in (
                (ours_sgd, model.logits(ids, adapters.stacks, one, grad=True)),
                (their_sgd, theirs(ids).logits),
            ):
                sgd.zero_grad()
                logits.log_softmax(-1)[0, :-1].gather(1, ids[0, 1:, None]).mean().neg().backward()
                sgd.step()
    both = model.logits(ids.repeat(2, 1), adapters.stacks, torch.tensor([1, 0]))
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        close(both[0], theirs(ids).logits[0])
        theirs.save_pretrained(tmp_path / "trained")
        again = PeftModel.from_pretrained(LlamaForCausalLM.from_pretrained(base_path), tmp_path / "trained")
        close(both[0], again(ids).logits[0])
    assert torch.equal(both[1], model.logits(ids)[0])


@pytest.mark.parametrize("quantization", [None, "int8"])
def test_through_adapters_to_what_is_read_and_put_in(base_path, tmp_path, quantization):
    make_adapter(base_path, tmp_path, target_modules=EVERYTHING)
    model = Transformer.from_pretrained(base_path, quantization=quantization, dtype=torch.float64)
    adapters = LoadedAdapters(model, 1)
    adapters.put(1, read_adapter(tmp_path, model, max_rank=64))
    asked = IDS, adapters.stacks, torch.tensor([1, 0])
    vector = torch.zeros(48, dtype=torch.float64, requires_grad=True)
    point, along, h = "layers.1.resid_mid", torch.randn(48, dtype=torch.float64), 1e-5
    logits, cache = model.run_with_cache(
        *asked[:1], point, *asked[1:], interventions=[Add(point, vector)], logits=True, grad=True
    )
    slopes = torch.autograd.grad(loss(logits), [cache[point], vector])
    moved = [loss(model.logits(*asked, interventions=[Add(point, along, scale=s)])) for s in (h, -h)]
    expected = (moved[0] - moved[1]) / (2 * h)
    torch.testing.assert_close((slopes[0] * along).sum(), expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close((slopes[1] * along).sum(), expected, rtol=1e-5, atol=1e-5)


def test_an_adapter_that_requires_a_gradient_needs_it_asked_for(base_path, tmp_path):
    model, adapters, _ = loaded(base_path, tmp_path, target_modules=["down_proj"])
    with (
        trained(adapters.stacks),
        pytest.raises(ParameterError, match=r"an adapter of layers.0.mlp.down_proj requires"),
    ):
        model.logits(IDS, adapters.stacks, torch.tensor([2, 0]))


@pytest.mark.parametrize(
    ("indices", "told"),
    [
        (None, "stacks and adapter_indices go together: adapter_indices is None"),
        ([2, 0], r"must be an int32 or int64 tensor \[2\] of 0 to 2, got \[2, 0\]"),
        (torch.tensor([2]), r"got tensor\(\[2\]\)"),
        (torch.tensor([[2], [0]]), r"tensor \[2\] of 0 to 2"),
        (torch.tensor([3, 0]), r"of 0 to 2, got tensor\(\[3, 0\]\)"),
        (torch.tensor([-1, 0]), r"of 0 to 2, got tensor\(\[-1,  0\]\)"),
        (torch.tensor([1.5, 0]), r"int32 or int64 tensor \[2\]"),
    ],
)
def test_indices_that_are_none_are_one_clear_error(base_path, tmp_path, indices, told):
    model, adapters, _ = loaded(base_path, tmp_path, target_modules=["k_proj"])
    with pytest.raises(ParameterError, match=told):
        model.logits(IDS, adapters.stacks, indices)


def test_indices_without_adapters_are_one_clear_error(base_path):
    with pytest.raises(ParameterError, match="go together: stacks is None"):
        Transformer.from_pretrained(base_path).logits(IDS, adapter_indices=torch.tensor([1, 0]))


def test_adapters_of_another_model_are_one_clear_error(base_path, tmp_path):
    """A copy's modules are others too."""
    model, adapters, _ = loaded(base_path, tmp_path, target_modules=["k_proj"])
    for other in (Transformer.from_pretrained(base_path), copy.deepcopy(model)):
        with pytest.raises(ParameterError, match="stacks hold adapters of another model's modules"):
            other.logits(IDS, adapters.stacks, torch.tensor([2, 0]))


@pytest.mark.parametrize("index", [0, -1, 3, True, 1.0])
def test_an_index_that_is_no_place_of_an_adapter_is_refused(base_path, tmp_path, index):
    """0 is the base model; as a place it was the last adapter's."""
    model, adapters, _ = loaded(base_path, tmp_path, target_modules=["k_proj"])
    before = {module: stack.a.clone() for module, stack in adapters.stacks.items()}
    with pytest.raises(ParameterError, match="an adapter's index must be 1 to 2, got"):
        adapters.put(index, read_adapter(tmp_path, model, max_rank=64))
    assert all(torch.equal(stack.a, before[module]) for module, stack in adapters.stacks.items())
