"""A float16 copy of a GGUF file holds the same weights and says the same of them."""

import numpy as np
from float16_gguf import write_float16
from gguf import GGMLQuantizationType, GGUFReader
from gguf.quants import dequantize


def test_weights_and_metadata_of_the_demo_model_are_the_same(demo_gguf_path, tmp_path):
    write_float16(demo_gguf_path, tmp_path / "f16.gguf")
    before, after = GGUFReader(demo_gguf_path), GGUFReader(tmp_path / "f16.gguf")
    written = {"GGUF.version", "GGUF.tensor_count", "GGUF.kv_count", "general.file_type"}
    assert before.fields.keys() - written == after.fields.keys() - written
    for name in after.fields.keys() - written:
        assert after.fields[name].contents() == before.fields[name].contents(), name
    assert len(before.tensors) == len(after.tensors)
    for old, new in zip(before.tensors, after.tensors, strict=True):
        assert (new.name, new.shape.tolist()) == (old.name, old.shape.tolist())
        values = dequantize(old.data, GGMLQuantizationType(old.tensor_type))
        is_vector = values.ndim == 1
        assert new.tensor_type == (GGMLQuantizationType.F32 if is_vector else GGMLQuantizationType.F16)
        np.testing.assert_array_equal(new.data, values if is_vector else values.astype(np.float16), err_msg=new.name)
