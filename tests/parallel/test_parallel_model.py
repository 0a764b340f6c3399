"""A model cut over ranks against the same model in one process: float64, to 1e-12. Every rank holds the same bits."""

import dataclasses
import shutil
import threading
import time
from contextlib import nullcontext

import pytest
import torch
from safetensors.torch import load_file, save_file

from llama import LLM
from llama.api.errors import CheckpointError, ParameterError
from llama.llm.ranks import Ranks
from llama.model.checkpoint import Checkpoint
from llama.model.checkpoint.shards import read_header
from llama.model.config import ModelConfig
from llama.model.parallel import Shard, sizes
from llama.model.transformer import Transformer
from tests.model.models import tiny_config, tiny_model
from tests.parallel.ranks import logits, on_ranks
from tests.quantised.folders import GOLDEN

MANY = pytest.param(4, marks=pytest.mark.slow)  # more ranks than KV heads
IDS = torch.randint(0, 97, (2, 21), generator=torch.Generator().manual_seed(3))


def saved(folder, **changes):
    model = tiny_model(**changes)
    model.save_pretrained(folder)
    return model


def assert_equal_on(folder, size, expected, ids=IDS, **options):
    def work(communicator):
        model = Transformer.from_pretrained(folder, communicator=communicator, **options)
        model.prepare()
        return logits(model, ids)

    found = on_ranks(ModelConfig.from_pretrained(folder), size, work)
    assert all(torch.equal(found[0], other) for other in found[1:])
    assert (found[0] - expected).abs().max() < 1e-12


@pytest.mark.parametrize("size", [1, 2, MANY])
@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"tie_word_embeddings": True},
        {"attention_bias": True, "mlp_bias": True},
        {"num_key_value_heads": 1},  # which every rank holds
        {"num_key_value_heads": 4},
        {"vocab_size": 2003},
    ],
    ids=lambda changes: "-".join(changes) or "plain",
)
def test_logits_are_those_of_one_process(tmp_path, size, changes):
    whole = saved(tmp_path, **changes)
    assert_equal_on(tmp_path, size, logits(whole, IDS))


@pytest.mark.parametrize(("heads", "kv_heads"), [(64, 8), (128, 8)], ids=["heads of 70B", "heads of 405B"])
@pytest.mark.parametrize("size", [2, pytest.param(4, marks=pytest.mark.slow), pytest.param(16, marks=pytest.mark.slow)])
def test_head_layouts_of_large_models(tmp_path, heads, kv_heads, size):
    changes = {"num_attention_heads": heads, "num_key_value_heads": kv_heads, "head_dim": 16, "vocab_size": 2003}
    whole = saved(tmp_path, **changes, num_hidden_layers=1)
    assert_equal_on(tmp_path, size, logits(whole, IDS))


@pytest.mark.parametrize("scheme", ["int8", "int4", "fp8"])
@pytest.mark.parametrize("size", [2, MANY])
def test_weights_rounded_while_they_are_read_are_rounded_as_in_one_process(tmp_path, scheme, size):
    saved(tmp_path, hidden_size=128, intermediate_size=512, head_dim=128)
    whole = Transformer.from_pretrained(tmp_path, quantization=scheme)
    assert_equal_on(tmp_path, size, logits(whole, IDS), quantization=scheme)


def test_what_ranks_cannot_share_is_refused_before_any_starts(tmp_path, monkeypatch):
    """With the values that are legal: a weight's groups may be whole with fewer ranks."""
    monkeypatch.setattr(Ranks, "start", lambda *_: pytest.fail("ranks were started"))
    saved(tmp_path, hidden_size=128, intermediate_size=512, head_dim=64, num_key_value_heads=4)
    o_proj, down_proj = "model.layers.0.self_attn.o_proj.weight", "model.layers.0.mlp.down_proj.weight"
    for folder, size, options, told in (
        (tmp_path, 3, {}, " must be one of 1, 2, 4 for 4 heads, 4 KV heads and an MLP of 512, got 3"),
        (tmp_path, 4, {"quantization": "int4"}, f" must be one of 1, 2, got 4: {o_proj}: columns 0 to 64"),
        (GOLDEN / "mlx_4bit", 2, {}, f" must be 1, got 2: {down_proj}: columns 0 to 96 are not whole groups of 64"),
        (GOLDEN / "gptq_desc_act", 2, {}, f" must be 1, got 2: {o_proj}: {ACT_ORDER}"),
        (tmp_path, 2, {"quantization": "int4", "load_format": "dummy"}, "=2 takes no quantization with load_format="),
    ):
        with pytest.raises(ParameterError, match=rf"^tensor_parallel_size{told}[^\n]*$"):
            LLM(folder, tensor_parallel_size=size, num_blocks=8, **options)


ACT_ORDER = "columns that lie in an order of their own"
REFUSED = dict.fromkeys(("ct_actorder", "gptq_8bit_asym", "gptq_desc_act"), ACT_ORDER)
REFUSED |= dict.fromkeys(("ct_fp8_block", "ct_w8a16", "mlx_4bit", "mlx_8bit"), "not whole groups of")
QUICK = ("awq", "ct_kv_heads", "ct_w4a16_asym", "fp8_blocks", "gptq_desc_act", "mlx_4bit", "mlx_4bit_tied")
FOLDERS = sorted(path.name for path in GOLDEN.iterdir() if (path / "model.safetensors").exists())


def refused(name, error):
    return pytest.raises(error, match=REFUSED[name]) if name in REFUSED else nullcontext()


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=() if name in QUICK else pytest.mark.slow) for name in FOLDERS]
)
def test_published_formats_are_cut_on_group_boundaries_or_refused(name):
    config = ModelConfig.from_pretrained(GOLDEN / name)
    expected = logits(Transformer.from_pretrained(GOLDEN / name, dtype="float64"), IDS % config.vocab_size)
    with refused(name, ParameterError):
        Checkpoint(GOLDEN / name).check_ranks(2)
    with refused(name, CheckpointError):
        assert_equal_on(GOLDEN / name, 2, expected, IDS % config.vocab_size, dtype="float64")


def test_a_part_of_a_model_refuses_what_needs_the_whole(tmp_path):
    saved(tmp_path)
    config = ModelConfig.from_pretrained(tmp_path)
    parts = on_ranks(config, 2, lambda communicator: Transformer.from_pretrained(tmp_path, communicator=communicator))
    for call in (
        lambda part: part.logits(IDS),
        lambda part: part.session(16),
        lambda part: part.unembed(torch.zeros(1, 48)),
        lambda part: part.digest(),
        lambda part: part.save_pretrained(tmp_path / "new"),
        lambda part: part.quantise("int8"),
    ):
        with pytest.raises(ParameterError, match=r"needs the whole model.*tensor_parallel_size=2"):
            call(parts[0])


def test_random_weights_are_parts_of_those_of_one_process():
    config = tiny_config(vocab_size=99, attention_bias=True)
    whole = Transformer(config, dtype=torch.float64, seed=5)
    ids = IDS % 97
    found = on_ranks(config, 2, lambda c: logits(Transformer(config, dtype=torch.float64, seed=5, communicator=c), ids))
    assert (found[1] - logits(whole, ids)).abs().max() < 1e-12


def test_groups_of_two_threads_are_never_called_at_once():
    """PyTorch 2.11 crashes where they are."""
    calling, met = threading.Lock(), []

    class Slow:
        def __init__(self, group):
            self.group = group

        def __getattr__(self, name):
            def call(*arguments):
                met.append(not calling.acquire(blocking=False))
                time.sleep(0.01)  # long enough for the other thread to come in
                work = getattr(self.group, name)(*arguments)
                if not met[-1]:
                    calling.release()
                return work

            return call

    def work(communicator):
        communicator._group = Slow(communicator._group)
        for _ in range(4):
            communicator.sum(torch.ones(3))
            communicator.gather(torch.ones(2, 49))
            communicator.whole("z", torch.ones(2, 2, 16))
            communicator.spread(torch.ones(3))

    on_ranks(tiny_config(), 2, work)
    assert len(met) == 32 and not any(met)


def test_a_rank_reads_its_own_bytes_alone(tmp_path, monkeypatch):
    saved(tmp_path)
    total = sum(tensor.nbytes for tensor in read_header(tmp_path / "model.safetensors"))
    counted = count_bytes(monkeypatch)
    config = ModelConfig.from_pretrained(tmp_path)
    on_ranks(config, 2, lambda communicator: Transformer.from_pretrained(tmp_path, communicator=communicator))
    norms = 5 * config.hidden_size * 8  # whole on each rank
    assert sum(counted) == total + norms


def count_bytes(monkeypatch):
    from llama.model.checkpoint import shards

    counted, read_exactly, preadv = [], shards._read_exactly, shards.os.preadv

    def reading(file, stored, flat):
        counted.append(flat.nbytes)
        read_exactly(file, stored, flat)

    def at(descriptor, places, offset):
        counted.append(preadv(descriptor, places, offset))
        return counted[-1]

    monkeypatch.setattr(shards, "_read_exactly", reading)
    monkeypatch.setattr(shards.os, "preadv", at)
    return counted


def test_columns_are_read_in_the_dtype_asked_for(tmp_path):
    saved(tmp_path)
    whole = Transformer.from_pretrained(tmp_path, dtype="float32")

    def work(communicator):
        model = Transformer.from_pretrained(tmp_path, dtype="float32", communicator=communicator)
        return model.layers[1].mlp.down_proj.weight

    parts = on_ranks(ModelConfig.from_pretrained(tmp_path), 2, work)
    assert torch.equal(torch.cat(parts, dim=1), whole.layers[1].mlp.down_proj.weight)


def test_a_tied_head_that_is_stored_as_well_may_differ_and_is_told(tmp_path, caplog):
    saved(tmp_path, tie_word_embeddings=True)
    tensors = load_file(tmp_path / "model.safetensors")
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    save_file(tensors, tmp_path / "model.safetensors")
    config = ModelConfig.from_pretrained(tmp_path)
    on_ranks(config, 2, lambda communicator: Transformer.from_pretrained(tmp_path, communicator=communicator))
    assert not caplog.records
    tensors["lm_head.weight"][90] += 1  # a row of rank 1
    save_file(tensors, tmp_path / "model.safetensors")
    on_ranks(config, 2, lambda communicator: Transformer.from_pretrained(tmp_path, communicator=communicator))
    assert len([record for record in caplog.records if "differs from the embedding" in record.message]) == 1


def test_sizes_that_are_legal():
    assert sizes(ModelConfig.preset("llama-3.1-8b")) == [1, 2, 4, 8, 16, 32]
    assert sizes(ModelConfig.preset("llama-3.1-405b")) == [1, 2, 4, 8, 16, 32, 64, 128]
    assert sizes(ModelConfig.preset("llama-3.2-3b")) == [1, 2, 4, 8]
    with pytest.raises(ParameterError, match="tensor_parallel_size must be one of 1, 2, 4, 8, 16, 32 for 32 heads"):
        Shard(ModelConfig.preset("llama-3.1-8b"), 0, 3)


@pytest.mark.parametrize("size", [2, 4, 8, 16])
def test_parts_cover_every_weight(size):
    config = dataclasses.replace(
        ModelConfig.preset("llama-3.1-70b"), vocab_size=2003, bos_token_id=None, eos_token_ids=()
    )
    shards = [Shard(config, rank, size) for rank in range(size)]
    rows = [row for shard in shards for row in range(2003)[shard.vocabulary]]
    assert rows == list(range(2003))
    for name, whole in (("q_proj", 8192), ("k_proj", 1024), ("gate_proj", 28672)):
        found = [row for shard in shards for row in range(whole)[shard.cut(f"model.layers.0.{name}").rows]]
        assert sorted(set(found)) == list(range(whole))
        assert len(found) == whole * (2 if name == "k_proj" and size == 16 else 1)
    columns = [i for shard in shards for i in range(28672)[shard.cut("model.layers.0.mlp.down_proj").columns]]
    assert columns == list(range(28672))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("preset", "dtype", "bound"), [("llama-3.1-70b", torch.float32, 1e-4), ("llama-3.1-405b", torch.bfloat16, 0.1)]
)
def test_true_widths_of_large_models(tmp_path, preset, dtype, bound):
    sizes = {"num_hidden_layers": 1, "vocab_size": 4096, "bos_token_id": None, "eos_token_ids": ()}
    config = dataclasses.replace(ModelConfig.preset(preset), dtype=str(dtype)[6:], **sizes)
    model = Transformer(config, dtype=dtype, seed=0)
    model.save_pretrained(tmp_path / "model")
    ids = IDS[:1, :5]
    expected = logits(model, ids)
    del model
    found = on_ranks(
        config,
        2,
        lambda communicator: logits(Transformer.from_pretrained(tmp_path / "model", communicator=communicator), ids),
    )
    shutil.rmtree(tmp_path / "model")
    assert torch.equal(found[0], found[1])
    assert (found[0] - expected).abs().max() < bound * expected.abs().max()
