"""Steering, patching and ablation while an engine writes, in a crowd with different strengths: the tokens are those of
transformers with the same edit made by hooks."""

import random

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from llama import LLM, Add, Apply, Replace, SamplingParams, Scale
from tests.model.pairs import float64_throughout, make_pair

GREEDY = SamplingParams(temperature=0, max_tokens=10, ignore_eos=True)
VECTORS = torch.randn(4, 48, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    with float64_throughout():
        yield make_pair(tmp_path_factory.mktemp("steering"), seed=8, eos_token_id=None, attn_implementation="eager")


def prompt(length, seed):
    return random.Random(seed).choices(range(97), k=length)


def added(vector, strength):
    return lambda x: x + strength * vector


def patched(x):
    """The prompt's third position; a step of transformers' generate behind it has one token."""
    if x.shape[1] > 1:
        x = x.clone()
        x[:, 2] = VECTORS[3]
    return x


def without_head(x):
    heads = x.clone().view(*x.shape[:2], 4, 16)
    heads[:, :, 3] = 0
    return heads.flatten(2)


CASES = [  # ours, the module in transformers, whether its input is changed, the same change there
    *(
        ([Add("layers.1.resid_post", VECTORS[i % 3], scale=s)], "layers.1", False, added(VECTORS[i % 3], s))
        for i, s in enumerate([0.0, 0.5, 1.0, 2.0, 4.0, 8.0, -3.0])
    ),
    ([Replace("layers.0.resid_post", VECTORS[3], positions=[2])], "layers.0", False, patched),
    ([Scale("layers.2.z", 0.0, heads=[3])], "layers.2.self_attn.o_proj", True, without_head),
    ([Apply("layers.1.mlp_out", torch.tanh)], "layers.1.mlp", False, torch.tanh),
]


def written(theirs, ids, name, is_input, change):
    module = theirs.model.get_submodule(name)
    if is_input:
        handle = module.register_forward_pre_hook(lambda _, args: (change(args[0]), *args[1:]))
    else:

        def hook(_, args, output):
            return (change(output[0]), *output[1:]) if isinstance(output, tuple) else change(output)

        handle = module.register_forward_hook(hook)
    given = torch.tensor([ids])  # without a mask it takes tokens 0 for padding
    found = theirs.generate(
        given, attention_mask=torch.ones_like(given), max_new_tokens=10, do_sample=False, pad_token_id=0
    )
    handle.remove()
    return found[0, len(ids) :].tolist()


@pytest.mark.parametrize("options", [{}, {"max_num_batched_tokens": 13, "num_blocks": 40}], ids=["whole", "pressed"])
def test_tokens_are_those_of_transformers_with_hooks(pair, options):
    theirs, ours = pair
    asks = [(prompt(20 - i % 2, i % 3), case) for i, case in enumerate(CASES)]
    expected = [written(theirs, ids, *case[1:]) for ids, case in asks]
    llm = LLM(ours, **{"block_size": 4, "num_blocks": 300, "max_num_seqs": 16, **options})
    order = [*range(len(asks))] * 2 + [None] * 3
    random.Random(0).shuffle(order)
    prompts = [prompt(20, 0) if i is None else asks[i][0] for i in order]
    changes = [None if i is None else asks[i][1][0] for i in order]
    outputs = llm.generate(prompts, GREEDY, interventions=changes, use_tqdm=False)
    plain = written(theirs, prompt(20, 0), "layers.1", False, lambda x: x)
    for i, output in zip(order, outputs, strict=True):
        assert output.outputs[0].token_ids == (plain if i is None else expected[i]), i
    assert len({tuple(tokens) for tokens in expected}) > 5


def test_vectors_of_all_requests_are_added_in_one_op(pair):
    class Adds(TorchDispatchMode):
        count = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            self.count += func is torch.ops.aten.index_add.default
            return func(*args, **(kwargs or {}))

    llm = LLM(pair[1], enable_prefix_caching=False)
    changes = [[Add("layers.1.resid_post", VECTORS[i % 4], scale=1.0 + i)] for i in range(16)]
    with Adds() as adds:
        llm.generate([prompt(8, i) for i in range(16)], GREEDY, interventions=changes, use_tqdm=False)
    assert adds.count == llm.engine.metrics().num_steps == 10
