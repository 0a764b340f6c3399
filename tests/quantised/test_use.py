"""Quantised models in an engine, with adapters, merged, and written by `llama quantize`."""

import json
import shutil
from functools import partial

import pytest
import torch

from llama.api.params import SamplingParams
from llama.cli import main as command
from llama.convert.merge import merge
from llama.convert.quantise import quantise
from llama.llm.llm import LLM
from llama.model.linear import Linear
from llama.model.transformer import Transformer
from llama.model.weights.quantised import SCHEMES
from llama.text.chat import ChatTemplate
from llama.text.tokenizer import Tokenizer
from tests.model.models import hugging_face_weights
from tests.tiny_checkpoint import make_adapter, make_model

GREEDY = SamplingParams(temperature=0, max_tokens=24, ignore_eos=True)
PROMPTS = ["one two three four five six seven eight", "one two three four five six nine", "ten", "eleven twelve"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return make_model(tmp_path_factory.mktemp("model"))


def ids(outputs):
    return [output.outputs[0].token_ids for output in outputs]


@pytest.mark.parametrize("scheme", SCHEMES)
def test_a_crowd_with_prefix_hits_and_preemption_writes_what_each_writes_alone(scheme, folder, tmp_path):
    options = {"quantization": scheme, "dtype": "float64", "block_size": 4}
    alone = LLM(folder, **options, num_blocks=64, enable_prefix_caching=False)
    expected = [ids(alone.generate([prompt], GREEDY))[0] for prompt in PROMPTS]
    crowd = LLM(folder, **options, num_blocks=28)  # not enough for all at once
    assert ids(crowd.generate(PROMPTS, GREEDY)) == expected
    again = crowd.generate(PROMPTS[:1], GREEDY)
    assert again[0].num_cached_tokens > 0 and ids(again) == expected[:1]


def test_an_adapter_adds_to_codes_as_to_dense_weights(folder, tmp_path):
    adapter = make_adapter(tmp_path)
    quantised = LLM(folder, quantization="int8", dtype="float64", num_blocks=64, max_loras=1)
    model = Transformer.from_pretrained(folder, dtype="float64", quantization="int8")
    model.dequantise()
    dense = LLM(model, folder, num_blocks=64, max_loras=1)
    written = []
    for llm in (quantised, dense):
        llm.load_lora("a", adapter)
        written.append([ids(llm.generate([PROMPTS[0]], GREEDY, lora=name)) for name in ("a", None)])
    assert written[0][0] == written[1][0] != written[0][1] == written[1][1]


def test_the_command_writes_what_loading_rounds_to(folder, tmp_path, capsys):
    for scheme in SCHEMES:
        target = tmp_path / scheme
        words = ["quantize", "--input", folder, "--output", str(target), "--scheme", scheme]
        assert command(words) == 0
        assert capsys.readouterr().out == f"wrote {target}\n"
        written = hugging_face_weights(Transformer.from_pretrained(target))
        loaded = hugging_face_weights(Transformer.from_pretrained(folder, quantization=scheme))
        assert all(torch.equal(written[name], loaded[name]) for name in loaded)
        assert (target / "tokenizer.json").exists()
        stated = json.loads((target / "config.json").read_text())["quantization_config"]
        assert stated["quant_method"] == "compressed-tensors" and stated["ignore"] in ([], ["lm_head"])
        assert command(words) == 1 and "exists already" in capsys.readouterr().err
        assert command(["quantize", "--input", str(target), "--output", str(tmp_path / "x"), "--scheme", scheme]) == 1
        assert "quantised already" in capsys.readouterr().err and not (tmp_path / "x").exists()


@pytest.mark.parametrize("scheme", SCHEMES)
def test_a_float64_model_is_saved_and_read_again(scheme, folder, tmp_path):
    model = Transformer.from_pretrained(folder, dtype="float64", quantization=scheme)
    model.save_pretrained(tmp_path / "saved")
    saved = Transformer.from_pretrained(tmp_path / "saved")
    ids = torch.arange(12)[None]
    assert saved.dtype == torch.float64 and torch.equal(saved.logits(ids), model.logits(ids))


def test_made_models_keep_all_chat_templates(folder, tmp_path):
    base, merged, quantised = tmp_path / "base", tmp_path / "merged", tmp_path / "quantised"
    shutil.copytree(folder, base)
    (base / "additional_chat_templates").mkdir()
    for name in ("chat_template", "additional_chat_templates/tool_use"):
        (base / f"{name}.jinja").write_text("{{ messages[0].content }} by " + name)
    make_adapter(tmp_path)
    merge(base, tmp_path, merged)
    assert command(["quantize", "--input", str(base), "--output", str(quantised), "--scheme", "int8"]) == 0
    tool = {"type": "function", "function": {"name": "f"}}
    for made in (merged, quantised):
        template = ChatTemplate.from_pretrained(made, Tokenizer.from_pretrained(made))
        assert template.render([{"role": "user", "content": "x"}], [tool]).endswith("tool_use")
        assert template.render([{"role": "user", "content": "x"}]).endswith("chat_template")
        template.close()


def test_a_model_that_cannot_be_written_whole_is_not_there(folder, tmp_path):
    base = tmp_path / "base"
    shutil.copytree(folder, base)
    (base / "special_tokens_map.json").mkdir()  # cannot be copied
    make_adapter(tmp_path)
    before = {path.name for path in tmp_path.iterdir()}
    for make in (partial(merge, base, tmp_path), partial(quantise, base, scheme="int8")):
        with pytest.raises(IsADirectoryError):
            make(output=tmp_path / "made")
        assert {path.name for path in tmp_path.iterdir()} == before


def test_merging_into_a_quantised_base_makes_a_dense_model(folder, tmp_path):
    adapter = make_adapter(tmp_path)
    assert command(["quantize", "--input", folder, "--output", str(tmp_path / "base"), "--scheme", "int4"]) == 0
    merge(tmp_path / "base", tmp_path, tmp_path / "merged")
    merged = Transformer.from_pretrained(tmp_path / "merged")
    assert all(module.form is None for module in merged.modules() if isinstance(module, Linear))
    assert adapter and "quantization_config" not in (tmp_path / "merged" / "config.json").read_text()


def test_a_given_transformer_and_random_weights(folder):
    model = Transformer.from_pretrained(folder)
    llm = LLM(model, quantization="fp8", num_blocks=16)
    assert llm.model.layers[0].mlp.down_proj.coded is not None
    llm = LLM(folder, load_format="dummy", quantization="int4", num_blocks=16)
    assert llm.model.layers[1].self_attn.qkv_proj.coded is not None and llm.model.lm_head.coded is None
