"""An fp8 KV cache: the checkpoint's scales, what is stored and read back, the engine over it."""

import json

import pytest
import torch
from safetensors.torch import load_file

from llama.api.errors import CheckpointError, ParameterError
from llama.api.params import SamplingParams
from llama.cli import main
from llama.engine.config import EngineConfig
from llama.engine.memory import kv_dtype, make_kv_cache
from llama.kernels.cpu.e4m3 import from_e4m3, to_e4m3
from llama.kernels.types import KVLayer
from llama.llm.llm import LLM
from llama.model.kv_cache import KVCache
from llama.model.transformer import Transformer
from tests.model.models import tiny_model
from tests.model.paging import Pages
from tests.quantised.folders import GOLDEN, copy
from tests.tiny_checkpoint import make_model

SCALE = "model.layers.1.self_attn.k_scale"


def test_the_cast_clamps_and_reads_back():
    x = torch.tensor([0.0, 1.0, -3.3, 448.0, 500.0, -1e9, 2.0**-9, 2.0**-11]).view(1, 1, 8)
    stored = to_e4m3(x, torch.tensor([1.0]))
    assert stored.dtype == torch.uint8
    expected = [0.0, 1.0, -3.25, 448.0, 448.0, -448.0, 2.0**-9, 0.0]
    assert from_e4m3(stored, torch.float32).flatten().tolist() == expected
    halved = to_e4m3(x * 2, torch.tensor([2.0]))
    assert torch.equal(halved, stored)
    assert torch.equal(from_e4m3(torch.arange(126, dtype=torch.uint8), torch.bfloat16).float(),
                       from_e4m3(torch.arange(126, dtype=torch.uint8), torch.float32))  # fmt: skip


@pytest.mark.parametrize("name", ["ct_kv_heads", "ct_kv_tensor", "modelopt"])
def test_scales_of_published_folders(name):
    model = Transformer.from_pretrained(GOLDEN / name)
    stored = load_file(GOLDEN / name / "model.safetensors")
    assert model.kv_scales.shape == (2, 2, 2) and model.kv_scales.dtype == torch.float32
    for layer in range(2):
        for index, kind in enumerate("kv"):
            place = f"model.layers.{layer}.self_attn.{f'{kind}_proj.' if name == 'modelopt' else ''}{kind}_scale"
            assert torch.equal(model.kv_scales[layer, index], stored[place].float().flatten().expand(2))
    config = EngineConfig(kv_cache_dtype="fp8")
    kv = make_kv_cache(model, config, 3)
    assert kv.data.dtype == torch.uint8 and torch.equal(kv.layers[1].scales, model.kv_scales[1])
    assert make_kv_cache(model, EngineConfig(), 3).layers[0].scales is None


def test_other_names_one_for_both_and_none(tmp_path):
    def rename(tensors):
        for layer in range(2):
            start = f"model.layers.{layer}.self_attn."
            key, value = tensors.pop(f"{start}k_scale"), tensors.pop(f"{start}v_scale")
            if layer == 0:
                tensors[f"{start}kv_scale"] = key
            else:
                tensors[f"{start}v_proj.output_scale"] = value

    original = load_file(GOLDEN / "ct_kv_tensor" / "model.safetensors")
    scales = Transformer.from_pretrained(copy("ct_kv_tensor", tmp_path / "copy", rename)).kv_scales
    assert bool((scales[0] == original["model.layers.0.self_attn.k_scale"].float()).all())
    assert bool((scales[1] == original["model.layers.1.self_attn.v_scale"].float()).all())
    assert Transformer.from_pretrained(GOLDEN / "ct_w8a8").kv_scales is None


@pytest.mark.parametrize("broken", [torch.zeros(1), torch.tensor([-1.0]), torch.ones(3), torch.tensor([torch.nan])])
def test_scales_that_are_none(broken, tmp_path):
    folder = copy("ct_kv_tensor", tmp_path / "copy", lambda tensors: tensors.update({SCALE: broken}))
    with pytest.raises(CheckpointError, match=f"{SCALE} should be one positive scale or 2, found"):
        Transformer.from_pretrained(folder)


def test_layers_without_any_are_told_once(tmp_path, caplog):
    def drop(tensors):
        for kind in "kv":
            del tensors[f"model.layers.1.self_attn.{kind}_scale"]

    folder = copy("ct_kv_tensor", tmp_path / "copy", drop)
    LLM(folder, num_blocks=8, kv_cache_dtype="fp8")
    [told] = [record.getMessage() for record in caplog.records]
    assert told == f"{folder}: only some layers have scales for an fp8 KV cache; those without take 1: layers 1"
    caplog.clear()
    Transformer.from_pretrained(GOLDEN / "ct_kv_tensor")
    assert not caplog.records


def test_they_are_saved(tmp_path):
    model = Transformer.from_pretrained(GOLDEN / "ct_kv_heads")
    model.save_pretrained(tmp_path / "saved")
    assert torch.equal(Transformer.from_pretrained(tmp_path / "saved").kv_scales, model.kv_scales)
    document = json.loads((tmp_path / "saved" / "config.json").read_text())
    assert document["quantization_config"]["kv_cache_scheme"]["strategy"] == "attn_head"


def test_they_are_saved_beside_dense_weights(tmp_path, capsys):
    model = Transformer.from_pretrained(GOLDEN / "ct_kv_heads")
    model.dequantise()
    model.save_pretrained(tmp_path / "saved")
    saved = Transformer.from_pretrained(tmp_path / "saved")
    assert torch.equal(saved.kv_scales, model.kv_scales)
    assert all(torch.equal(a, b) for a, b in zip(saved.parameters(), model.parameters(), strict=True))
    assert main(["info", str(tmp_path / "saved")]) == 0
    assert "stored in bfloat16 (compressed-tensors, no codes)" in capsys.readouterr().out


def test_what_the_option_means():
    bf16, f32 = tiny_model(dtype=torch.bfloat16), tiny_model(dtype=torch.float32)
    for word, dtype in {"auto": torch.bfloat16, "bfloat16": torch.bfloat16, "fp8": torch.uint8}.items():
        assert kv_dtype(bf16, EngineConfig(kv_cache_dtype=word)) == dtype
    assert kv_dtype(f32, EngineConfig(kv_cache_dtype="fp8_e4m3")) == torch.uint8
    with pytest.raises(ParameterError, match="kv_cache_dtype must be auto or fp8 for a model in float32"):
        kv_dtype(f32, EngineConfig(kv_cache_dtype="bfloat16"))
    with pytest.raises(ParameterError, match="must be one of auto, bfloat16, fp8, fp8_e4m3, got 'fp8_e5m2'"):
        EngineConfig(kv_cache_dtype="fp8_e5m2")
    size = KVCache.bytes_per_block(bf16.config, 16, torch.bfloat16)
    assert 2 * KVCache.bytes_per_block(bf16.config, 16, torch.uint8) == size


def test_a_layer_has_scales_where_it_is_bytes():
    cache = torch.zeros(2, 4, 2, 8)
    with pytest.raises(ValueError, match="scales where it is uint8, and there alone"):
        KVLayer(cache.to(torch.uint8), cache.to(torch.uint8))
    with pytest.raises(ValueError, match=r"scales must be float32 .2, 2., got torch.float32 .2."):
        KVLayer(cache.to(torch.uint8), cache.to(torch.uint8), torch.ones(2))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return make_model(tmp_path_factory.mktemp("model"))


def test_a_crowd_with_prefix_hits_and_preemption_writes_what_each_writes_alone(folder):
    params = SamplingParams(temperature=0, max_tokens=24, ignore_eos=True)
    prompts = ["one two three four five six seven eight", "one two three four five six nine", "ten", "eleven twelve"]
    options = {"dtype": "float64", "block_size": 4, "kv_cache_dtype": "fp8"}
    alone = LLM(folder, **options, num_blocks=64, enable_prefix_caching=False)
    expected = [alone.generate([prompt], params)[0].outputs[0].token_ids for prompt in prompts]
    crowd = LLM(folder, **options, num_blocks=28)
    assert [output.outputs[0].token_ids for output in crowd.generate(prompts, params)] == expected
    again = crowd.generate(prompts[:1], params)[0]
    assert again.num_cached_tokens > 0 and again.outputs[0].token_ids == expected[0]
    plain = LLM(folder, **{**options, "kv_cache_dtype": "auto"}, num_blocks=64)
    assert plain.engine.runner.kv.data.dtype == torch.float64


def test_logits_stay_near_those_of_the_wide_cache():
    """Chunks and decodes in one batch, over scattered blocks; each head's scale is its own."""
    model = tiny_model(dtype=torch.float32)
    config = model.config
    scales = torch.linspace(0.02, 0.06, config.num_hidden_layers * 2 * config.num_key_value_heads)
    scales = scales.view(config.num_hidden_layers, 2, config.num_key_value_heads)
    ids = [list(range(1, 18)), list(range(30, 41))]
    logits = []
    for narrow in (False, True):
        pages = Pages(model, [18, 12], 4)
        if narrow:
            pages.kv = KVCache(config, pages.kv.num_blocks, 4, dtype=torch.uint8, device="cpu", scales=scales)
        pages.step([(0, ids[0]), (1, ids[1][:5])])
        pages.step([(1, ids[1][5:])])
        logits.append(pages.step([(0, [5]), (1, [7])]))
    difference = (logits[0] - logits[1]).abs().max()
    assert 0 < difference < 0.1 * logits[0].abs().max()
