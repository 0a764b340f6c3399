"""What `llama quantize` writes, read by transformers with the compressed-tensors package: the same weights."""

import pytest
import torch
from transformers import AutoModelForCausalLM

from llama.cli import main as command
from llama.model.transformer import Transformer
from tests.model.models import hugging_face_weights, tiny_model


@pytest.fixture(scope="module")
def dense(tmp_path_factory):
    """Rows of one group and of two, and rows that no group divides."""
    folder = tmp_path_factory.mktemp("quantize") / "dense"
    tiny_model(dtype=torch.float32, hidden_size=128, intermediate_size=256).save_pretrained(folder)
    return folder


@pytest.mark.parametrize("scheme", ["int8", "int4", "fp8"])
def test_transformers_reads_the_same_weights(scheme, dense):
    folder = dense.parent / scheme
    assert command(["quantize", "--input", str(dense), "--output", str(folder), "--scheme", scheme]) == 0
    ours = Transformer.from_pretrained(folder, dtype="float32")
    theirs = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    ids = torch.arange(24)[None]
    for module in theirs.modules():  # int8 and fp8 tell others to round x too, which we never do in float32
        if hasattr(module, "quantization_scheme"):
            module.quantization_scheme.input_activations = None
    with torch.no_grad():
        logits = theirs(ids).logits  # the first forward makes the weights dense
    expected = hugging_face_weights(ours)
    weights = {name: value for name, value in theirs.state_dict().items() if name in expected}
    assert weights.keys() == expected.keys()
    for name, value in weights.items():
        assert torch.equal(value, expected[name]), name
    assert (logits - ours.logits(ids)).abs().max() <= 1e-4
