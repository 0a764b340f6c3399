"""GGUF files that benchmarks/gguf_files.py makes of a model hold its weights, rounded, under llama.cpp's names."""

import pytest
import torch
from gguf import GGMLQuantizationType, GGUFReader
from gguf.quants import dequantize

from benchmarks import gguf_files
from llama.convert.folder import unpermute_rope
from llama.model.config import ModelConfig
from llama.model.transformer import Transformer
from tests.model.models import hugging_face_weights, tiny_model

# Of a block's largest value, and what float16 takes of its scale. Q4_0 has no code for the negative of that value.
ROUNDING = {"Q8_0": 0.005, "Q4_0": 0.13}


@pytest.mark.parametrize("kind", ROUNDING)
def test_the_weights_of_a_folder(kind, tmp_path):
    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 4, "head_dim": 16}
    model = tiny_model(dtype=torch.float32, **sizes)
    model.save_pretrained(tmp_path / "model")
    gguf_files.main(["--model", str(tmp_path / "model"), "--kinds", kind, "--output", str(tmp_path / "out")])
    reader = GGUFReader(tmp_path / "out" / f"{kind}.gguf")
    tensors = {tensor.name: tensor for tensor in reader.tensors}
    weights = hugging_face_weights(model)
    assert len(tensors) == len(weights)
    for name, weight in weights.items():
        stored = tensors[gguf_files.name_of(name)]
        found = torch.from_numpy(dequantize(stored.data, GGMLQuantizationType(stored.tensor_type)).copy())
        if name.endswith(("q_proj.weight", "k_proj.weight")):
            found = unpermute_rope(found, len(found) // 16)
        is_small = stored.tensor_type == GGMLQuantizationType.Q8_0
        bound = 0 if weight.dim() == 1 else ROUNDING["Q8_0" if is_small else kind] * weight.abs().max()
        assert found.shape == weight.shape and (found - weight).abs().max() <= bound, name
        assert weight.dim() == 1 or is_small or name.startswith("model.layers")
    values = {name: field.contents() for name, field in reader.fields.items()}
    assert values["llama.vocab_size"] == 97 == len(values["tokenizer.ggml.tokens"])
    assert values["llama.attention.head_count_kv"] == 2 and values["llama.rope.freq_base"] == 10_000.0


def test_a_preset_cut_down(tmp_path):
    flags = ["--preset", "tiny", "--layers", "1", "--vocab-size", "64", "--kinds", "Q8_0"]
    gguf_files.main([*flags, "--output", str(tmp_path)])
    config = ModelConfig.from_pretrained(tmp_path / "model")
    assert (config.num_hidden_layers, config.vocab_size, config.eos_token_ids) == (1, 64, ())
    assert Transformer.from_pretrained(tmp_path / "model").dtype == torch.bfloat16
    assert (tmp_path / "Q8_0.gguf").stat().st_size > 50_000 and not (tmp_path / "Q4_0.gguf").exists()


def test_what_is_not_written(tmp_path):
    Transformer(ModelConfig.preset("tiny")).save_pretrained(tmp_path / "model")
    with pytest.raises(ValueError, match="a model with scaled RoPE or biases is not written"):
        gguf_files.main(["--model", str(tmp_path / "model"), "--output", str(tmp_path / "out")])
