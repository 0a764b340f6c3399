"""Folders that other packages wrote: our weights and logits are theirs."""

import hashlib
import json

import pytest
import torch
from safetensors.torch import load_file

from llama.model.transformer import Transformer
from tests.quantised.folders import FOLDERS, GOLDEN, Q, copy, weights

# w = code * SCB / 127: bitsandbytes multiplies by SCB, then by a rounded 1 / 127.
NOT_EXACT = "bnb_int8"


def reference(name):
    return load_file(GOLDEN / name / "reference.safetensors")


@pytest.mark.parametrize("name", [name for name in FOLDERS if name != NOT_EXACT])
def test_dense_weights_are_the_writers_own_bit_for_bit(name):
    ours = weights(GOLDEN / name)
    digests = {key[7:]: bytes(value.tolist()) for key, value in reference(name).items() if key.startswith("sha256.")}
    if json.loads((GOLDEN / name / "config.json").read_text())["tie_word_embeddings"]:
        del digests["lm_head.weight"]
    assert len(digests) >= 6
    found = {key: hashlib.sha256((ours[key] + 0.0).contiguous().numpy()).digest() for key in digests}
    assert found == digests


def test_int8_of_bitsandbytes():
    stored = load_file(GOLDEN / NOT_EXACT / "model.safetensors")
    ours = weights(GOLDEN / NOT_EXACT)[f"{Q}.weight"].double()
    exact = stored[f"{Q}.weight"].double() * stored[f"{Q}.SCB"].double()[:, None] / 127
    assert (ours - exact).abs().max() <= 2**-23 * exact.abs().max()


@pytest.mark.parametrize("name", FOLDERS)
def test_logits_are_those_of_transformers(name):
    model = Transformer.from_pretrained(GOLDEN / name, dtype="float32")
    expected = reference(name)
    logits = model.logits(expected["input_ids"])
    assert expected["logits"].abs().max() > 4
    assert (logits - expected["logits"]).abs().max() <= 1e-4


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("name", ["ct_w4a16_asym", "ct_fp8_block", "bnb_nf4_double", "mlx_4bit"])
def test_other_dtypes_are_rounded_once(name, dtype):
    wide, narrow = weights(GOLDEN / name), weights(GOLDEN / name, dtype)
    assert all(torch.equal(wide[key].to(narrow[key].dtype), narrow[key]) for key in wide)


def test_auto_is_the_dtype_of_the_norms_where_config_json_names_none(tmp_path):
    folder = copy("mlx_4bit_tied", tmp_path / "copy")
    document = json.loads((folder / "config.json").read_text())
    del document["dtype"]
    (folder / "config.json").write_text(json.dumps(document))
    assert Transformer.from_pretrained(folder).dtype == torch.float16
