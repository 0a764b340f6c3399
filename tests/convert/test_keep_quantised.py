"""GGUF -> a folder that keeps the file's codes: the same weights, in the format that can tell them."""

import json
from pathlib import Path

import pytest
import torch
from convert_gguf import main
from gguf import GGMLQuantizationType as Type
from tokenizers import Tokenizer

from llama.cli import main as command
from llama.convert.gguf import convert
from llama.model.linear import Linear
from llama.model.transformer import Transformer
from llama.model.weights.quantised import Joined, Quantised
from tests.convert.gguf_files import K_SCALES, write_gguf
from tests.model.models import hugging_face_weights


def kept(tmp_path, kind, kinds=None, dtype="float32"):
    """-> (the weights that the file stands for, those of the folder that keeps its codes, its forms by module)"""
    expected = write_gguf(tmp_path / "model.gguf", kind, kinds=kinds)
    dense = convert(tmp_path / "model.gguf", tmp_path / "hf", dtype=dtype, keep_quantised=True)
    model = Transformer.from_pretrained(tmp_path / "hf")
    forms = {name: module.form for name, module in model.named_modules() if isinstance(module, Linear)}
    return dense, expected, hugging_face_weights(model), forms


@pytest.mark.parametrize("kind", [Type.Q4_0, Type.Q8_0, Type.Q4_1, Type.Q4_K, Type.Q6_K], ids=lambda kind: kind.name)
def test_codes_are_kept_bit_for_bit(tmp_path, kind):
    dense, expected, found, forms = kept(tmp_path, kind)
    assert not dense and found.keys() == expected.keys()
    assert all(torch.equal(found[name], weight) for name, weight in expected.items())
    with_minima = kind in (Type.Q4_1, Type.Q4_K)
    document = json.loads((tmp_path / "hf" / "config.json").read_text())
    stated = document["quantization_config"]
    assert stated.get("quant_method") == (None if with_minima else "compressed-tensors")
    assert ("quantization" in document) == with_minima
    for form in forms.values():
        assert isinstance(form, Quantised) and form.weight.group_size == (16 if kind == Type.Q6_K else 32)
        assert (form.weight.minima is not None) == with_minima == (form.weight.zeros is not None)
        # Half precision is what the legacy types have; products of it with 6 bits need more.
        assert form.weight.scales.dtype == (torch.float32 if kind in K_SCALES else torch.float16)
        assert form.weight.codes.dtype == (torch.int8 if kind in (Type.Q8_0, Type.Q6_K) else torch.int16)


def test_one_group_with_minima_puts_the_whole_folder_into_mlx_form(tmp_path):
    kinds = {
        "attn_v": Type.Q6_K,
        "attn_output": Type.Q8_0,
        "ffn_up": Type.Q4_0,
        "ffn_down": Type.Q5_K,
        "output": Type.F16,
    }
    dense, expected, found, forms = kept(tmp_path, Type.Q4_K, kinds)
    assert dense == {"Q5_K": 1, "F16": 1}
    assert all(torch.equal(found[name], weight) for name, weight in expected.items())
    stated = json.loads((tmp_path / "hf" / "config.json").read_text())["quantization"]
    assert (stated["bits"], stated["group_size"]) == (4, 32)
    assert stated["model.layers.0.self_attn.v_proj"] == {"group_size": 16, "bits": 8, "mode": "affine"}
    assert isinstance(forms["layers.0.self_attn.qkv_proj"], Joined)
    assert forms["layers.0.mlp.down_proj"] is None is forms["lm_head"]


def test_types_without_minima_share_a_compressed_tensors_folder(tmp_path):
    dense, expected, found, forms = kept(tmp_path, Type.Q4_0, {"output": Type.Q6_K, "ffn_down": Type.Q8_0}, "bfloat16")
    assert not dense and isinstance(forms["lm_head"], Quantised)
    assert all(torch.equal(found[name], weight.bfloat16()) for name, weight in expected.items())
    stated = json.loads((tmp_path / "hf" / "config.json").read_text())["quantization_config"]
    groups = {
        (group["weights"]["num_bits"], group["weights"]["group_size"]) for group in stated["config_groups"].values()
    }
    assert groups == {(4, 32), (8, 32), (8, 16)}


def test_the_command_keeps_codes_and_tells_what_it_could_not(tmp_path, capsys):
    write_gguf(tmp_path / "model.gguf", Type.Q4_0, kinds={"ffn_down": Type.Q5_1})
    write_gguf(tmp_path / "plain.gguf", Type.F16)
    for name, call in (("a", command), ("b", None)):
        words = [f"{tmp_path}/model.gguf", f"{tmp_path}/{name}", "--keep-quantised"]
        if call is None:
            main(["--input", words[0], "--output", words[1], words[2]])
        else:
            assert call(["convert", *words]) == 0
        assert capsys.readouterr().out.startswith("1 linear layers became dense, for their type is Q5_1\n")
        assert (tmp_path / name / "config.json").exists()
    assert command(["convert", f"{tmp_path}/plain.gguf", f"{tmp_path}/c", "--keep-quantised"]) == 1
    said = capsys.readouterr().err
    assert "nothing to keep quantised: linear layers are F16, kept are Q4_0, Q4_1, Q8_0, Q4_K, Q6_K" in said
    assert not (tmp_path / "c").exists()
    assert command(["convert", str(tmp_path), f"{tmp_path}/c", "--keep-quantised"]) == 2
    assert "--keep-quantised are for a GGUF file" in capsys.readouterr().err


def test_a_tensor_of_another_shape_is_refused_whether_it_is_kept_or_not(tmp_path):
    write_gguf(tmp_path / "model.gguf", Type.Q4_0, fields={"llama.feed_forward_length": 512})
    for keep in (False, True):
        with pytest.raises(ValueError, match=r"blk.0.ffn_gate.weight has shape \[256, 256\], expected \[512, 256\]"):
            convert(tmp_path / "model.gguf", tmp_path / "hf", keep_quantised=keep)


@pytest.mark.slow
def test_the_demo_models_own_codes_lose_nothing(demo_gguf_path, tmp_path):
    convert(demo_gguf_path, tmp_path / "dense", dtype="float32")
    convert(demo_gguf_path, tmp_path / "kept", dtype="float32", keep_quantised=True)
    quantised, dense = Transformer.from_pretrained(tmp_path / "kept"), Transformer.from_pretrained(tmp_path / "dense")
    assert all(module.coded is not None for module in quantised.layers.modules() if isinstance(module, Linear))
    ours, expected = hugging_face_weights(quantised), hugging_face_weights(dense)
    assert all(torch.equal(ours[name], weight) for name, weight in expected.items())
    text = (Path(__file__).parents[1] / "golden" / "python_reference.txt").read_text()[:2000]
    ids = torch.tensor([Tokenizer.from_file(str(tmp_path / "dense" / "tokenizer.json")).encode(text).ids[:256]])
    found, wanted = quantised.logits(ids)[0].log_softmax(-1), dense.logits(ids)[0].log_softmax(-1)
    divergence = (wanted.exp() * (wanted - found)).sum(-1).mean()
    loss = (wanted - found)[:-1].gather(1, ids[0, 1:, None]).mean()
    assert abs(divergence) <= 1e-4 and abs(loss) <= 1e-4
