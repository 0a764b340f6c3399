"""NCCL with one rank, which is all that one GPU can show: the communicator, and a model whose sums go through it."""

import pytest
import torch

from llama.model.communicator import Call, Communicator
from llama.model.parallel import Shard
from llama.model.transformer import Transformer
from tests.model.models import tiny_config

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")]


def make(config) -> Communicator:
    store = torch.distributed.HashStore()
    return Communicator(Shard(config, 0, 1), store, torch.device("cuda", 0), seconds=60.0)


def test_one_rank_sums_gathers_and_stands_in():
    config = tiny_config()
    communicator = make(config)
    x = torch.arange(12.0, device="cuda").view(3, 4)
    assert torch.equal(communicator.sum(x.clone()), x)
    logits = torch.randn(2, config.vocab_size, device="cuda")
    assert torch.equal(communicator.gather(logits), logits)
    communicator.stand_in([Call(2, "sum"), Call(1, "gather"), Call(1, "spread")], torch.float32)
    assert communicator.num_calls == 6  # the first was the trial at the start


def test_a_model_of_one_rank_is_the_model():
    config = tiny_config()
    ids = torch.randint(0, config.vocab_size, (1, 20), device="cuda")
    whole = Transformer(config, device="cuda", dtype=torch.float32, seed=1)
    part = Transformer(config, device="cuda", dtype=torch.float32, seed=1, communicator=make(config))
    whole.prepare(), part.prepare()
    assert torch.equal(part.logits(ids), whole.logits(ids))
