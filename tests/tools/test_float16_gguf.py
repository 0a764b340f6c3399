"""A float16 copy of a GGUF file holds the same weights and says the same of them."""

import numpy as np
from float16_gguf import write_float16
from gguf import GGMLQuantizationType, GGUFReader, GGUFWriter
from gguf.quants import dequantize, quantize

METADATA = {"llama.rope.freq_base": 1e5, "llama.block_count": 30, "general.name": "a small one"}
TOKENS = ["<s>", "é", "日本", ""]


def write_original(path, matrix: np.ndarray, vector: np.ndarray) -> None:
    writer = GGUFWriter(path, "llama")
    writer.add_float32("llama.rope.freq_base", METADATA["llama.rope.freq_base"])
    writer.add_block_count(METADATA["llama.block_count"])
    writer.add_name(METADATA["general.name"])
    writer.add_token_list(TOKENS)
    writer.add_file_type(3)
    kind = GGMLQuantizationType.Q4_1
    writer.add_tensor("token_embd.weight", quantize(matrix, kind), raw_dtype=kind)
    writer.add_tensor("output_norm.weight", vector)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def test_weights_and_metadata_are_the_same(tmp_path):
    draw = np.random.default_rng(0)
    matrix, vector = draw.normal(size=(4, 64)).astype(np.float32), draw.normal(size=64).astype(np.float32)
    write_original(tmp_path / "q4.gguf", matrix, vector)
    write_float16(tmp_path / "q4.gguf", tmp_path / "f16.gguf")
    copy = GGUFReader(tmp_path / "f16.gguf")
    for name, value in METADATA.items():
        stored = copy.fields[name].contents()
        assert stored == (np.float32(value) if isinstance(value, float) else value), name
    assert copy.fields["tokenizer.ggml.tokens"].contents() == TOKENS
    assert copy.fields["general.architecture"].contents() == "llama"
    assert "general.file_type" not in copy.fields
    weights, norm = copy.tensors
    kind = GGMLQuantizationType.Q4_1
    np.testing.assert_array_equal(weights.data, dequantize(quantize(matrix, kind), kind).astype(np.float16))
    np.testing.assert_array_equal(norm.data, vector)
