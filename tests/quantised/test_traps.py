"""What others read wrongly and without an error: each is read rightly here, or refused in one line."""

import json
import math

import pytest
import torch
from safetensors.torch import load_file

from llama.api.errors import CheckpointError
from llama.model.checkpoint.quantised.config import Quantization
from llama.model.checkpoint.quantised.formats import FORMATS
from llama.model.transformer import Transformer
from tests.quantised.folders import GOLDEN, LAYER, Q, copy, weights


def same(first, second):
    return first.keys() == second.keys() and all(torch.equal(first[key], second[key]) for key in first)


def refuse(folder, message):
    with pytest.raises(CheckpointError, match=message) as caught:
        Transformer.from_pretrained(folder)
    assert "\n" not in str(caught.value)


def dense(tensors, shape, method, **facts):
    """Read as the first format of `method` does that takes tensors of these names."""
    reader = next(form for form in FORMATS if method in form.methods and form.needed.keys() <= tensors.keys())
    weight = torch.empty(shape)
    reader.read(tensors, shape, Quantization(method=method, **facts)).dense_into(weight)
    return weight


def words(values, bits):
    """[rows, n] unsigned -> int32 [rows, ceil(n bits / 32)], the first value in the lowest bits."""
    size = 32 // bits
    packed = torch.zeros(len(values), math.ceil(values.shape[1] / size), dtype=torch.int64)
    for column in range(values.shape[1]):
        packed[:, column // size] |= values[:, column] << (bits * (column % size))
    return packed.to(torch.int32)


def random_codes(*shape, bits=4, seed=0):
    return torch.randint(0, 1 << bits, shape, generator=torch.Generator().manual_seed(seed))


# GPTQ


@pytest.mark.parametrize(("name", "says"), [("gptq", "gptq_v2"), ("gptq_v2_sym", "gptq")])
def test_a_symmetric_folder_is_read_by_its_words_whatever_it_says_of_its_version(name, says, tmp_path):
    folder = copy(name, tmp_path / "copy", config=lambda config: config.update(checkpoint_format=says, format=says))
    assert same(weights(folder), weights(GOLDEN / name))


def test_the_version_of_an_asymmetric_folder_shifts_each_zero_point_by_one(tmp_path):
    says_v1 = copy("gptq_v2", tmp_path / "copy", config=lambda config: config.update(checkpoint_format="gptq"))
    ours, shifted = weights(GOLDEN / "gptq_v2")[f"{Q}.weight"], weights(says_v1)[f"{Q}.weight"]
    scales = load_file(GOLDEN / "gptq_v2" / "model.safetensors")[f"{Q}.scales"].float().t()
    assert torch.allclose(ours - shifted, scales.repeat_interleave(32, dim=1), rtol=1e-4)


def test_a_symmetric_folder_with_other_zero_points_is_refused(tmp_path):
    def change(tensors):
        tensors[f"{Q}.qzeros"][0, 3] = 0x77787777

    refuse(copy("gptq", tmp_path / "copy", change), f"{Q}: qzeros of a symmetric folder")


@pytest.mark.parametrize("bits", [4, 8])
def test_zero_points_of_the_first_version_that_borrowed_from_their_neighbours(bits):
    rows, columns, groups = 16, 64, 2
    codes, zeros = random_codes(rows, columns, bits=bits), random_codes(rows, groups, bits=bits, seed=1)
    zeros[::3] = 0
    ones = sum(1 << (bits * i) for i in range(32 // bits))
    stored = ((words(zeros.t(), bits).long() & 0xFFFFFFFF) - ones) % 2**32
    scales = torch.rand(groups, rows)
    tensors = {
        "qweight": words(codes, bits).t(),
        "qzeros": ((stored + 2**31) % 2**32 - 2**31).int(),
        "scales": scales,
    }
    expected = (codes - zeros.repeat_interleave(32, dim=1)) * scales.t().repeat_interleave(32, dim=1)
    facts = {"widths": frozenset((bits,)), "group_sizes": frozenset((32,)), "zeros_less_one": True}
    assert torch.equal(dense(tensors, (rows, columns), "gptq", **facts), expected)


def test_zero_points_that_may_have_been_lost_are_told(tmp_path, caplog):
    """AutoGPTQ wrote a 0, less one, over the next values of its word; gptqmodel borrows from them."""

    def wrap(tensors):
        tensors[f"{Q}.qzeros"][0, 3] = -1

    def by_another(config):
        config["meta"]["quantizer"] = ["auto_gptq:0.7.1"]

    Transformer.from_pretrained(copy("gptq_desc_act", tmp_path / "gptqmodel", wrap))
    Transformer.from_pretrained(copy("gptq_v2", tmp_path / "v2", wrap, by_another))
    Transformer.from_pretrained(copy("gptq", tmp_path / "symmetric", config=by_another))
    assert not caplog.records
    Transformer.from_pretrained(copy("gptq_desc_act", tmp_path / "autogptq", wrap, by_another))
    [record] = caplog.records
    assert f"{tmp_path / 'autogptq'}: zero points of 0 in {Q}" in record.getMessage()


def test_groups_of_columns_need_not_be_those_of_the_neighbours():
    stored = load_file(GOLDEN / "ct_actorder" / "model.safetensors")
    of_q, of_k, of_v = (stored[f"{LAYER}self_attn.{part}_proj.weight_g_idx"] for part in "qkv")
    assert not torch.equal(of_q, of_k) and not torch.equal(of_k, of_v) and not torch.equal(of_q, of_v)
    stored = load_file(GOLDEN / "gptq_desc_act" / "model.safetensors")
    assert not torch.equal(stored[f"{Q}.g_idx"], stored[f"{Q}.g_idx"].sort().values)


def test_a_group_that_is_not_there(tmp_path):
    def change(tensors):
        tensors[f"{Q}.g_idx"][5] = 2

    refuse(copy("gptq_desc_act", tmp_path / "copy", change), r"g_idx should hold a group in \[0, 2\)")


@pytest.mark.parametrize("name", ["gptq", "awq", "ct_w4a16", "fp8_blocks", "bnb_nf4", "mlx_4bit"])
def test_biases_lie_beside_codes(name, tmp_path):
    plain = weights(GOLDEN / name)
    biases = {
        key.replace(".weight", ".bias"): torch.randn(len(value), generator=torch.Generator().manual_seed(1))
        for key, value in plain.items()
        if ".self_attn." in key
    }
    folder = copy(name, tmp_path / "copy", lambda tensors: tensors.update(biases))
    document = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(document | {"attention_bias": True}))
    assert same(weights(folder), plain | biases)


def test_a_bias_of_zeros_is_nothing_and_another_is_refused(tmp_path):
    def add(value):
        return lambda tensors: tensors.update({f"{Q}.bias": torch.full((128,), value).half()})

    assert same(weights(copy("gptq", tmp_path / "zeros", add(0.0))), weights(GOLDEN / "gptq"))
    refuse(copy("gptq", tmp_path / "ones", add(1.0)), "bias is not zero")


# AWQ


@pytest.mark.parametrize(("name", "method"), [("awq", "gptq"), ("gptq", "awq")])
def test_awq_and_gptq_are_not_taken_for_one_another(name, method, tmp_path):
    def claim(config):
        config.update(quant_method=method, sym=False, version="gemm")

    refuse(copy(name, tmp_path / "copy", config=claim), r"qweight should be \[\d+, \d+\], found")


def test_the_order_of_awq_by_hand():
    codes = random_codes(64, 32)  # [K, N]
    order = [0, 2, 4, 6, 1, 3, 5, 7]
    by_word = codes.view(64, 4, 8)[:, :, order].reshape(64, 32)
    tensors = {
        "qweight": words(by_word, 4),
        "qzeros": words(torch.arange(32).remainder(16).view(4, 8)[:, order].reshape(1, 32), 4),
        "scales": torch.ones(1, 32),
    }
    expected = (codes - torch.arange(32).remainder(16)).t().float()
    assert torch.equal(dense(tensors, (32, 64), "awq"), expected)


@pytest.mark.parametrize(("method", "shape"), [("gptq", (12, 64)), ("gptq", (16, 60)), ("awq", (12, 64))])
def test_words_that_a_dimension_does_not_fill(method, shape):
    rows, columns = shape
    packed = (columns, rows // 8) if method == "awq" else (columns // 8, rows)
    tensors = {
        "qweight": torch.zeros(packed, dtype=torch.int32),
        "qzeros": torch.zeros(1, rows // 8, dtype=torch.int32),
        "scales": torch.ones(1, rows),
    }
    with pytest.raises(CheckpointError, match=r"\[1\d, 6\d\] does not fill words of 8 codes"):
        dense(tensors, shape, method)


# compressed-tensors and its like


@pytest.mark.parametrize(
    ("name", "shape"), [("ct_fp8", ()), ("ct_fp8", (1, 1)), ("ct_fp8_dynamic", (-1,)), ("autofp8", (1,))]
)
def test_scales_have_many_shapes(name, shape, tmp_path):
    def change(tensors):
        for key in [key for key in tensors if key.endswith("weight_scale")]:
            tensors[key] = tensors[key].reshape(shape)

    assert same(weights(copy(name, tmp_path / "copy", change)), weights(GOLDEN / name))


@pytest.mark.parametrize("bits", [4, 8])
def test_zero_points_lie_packed_along_the_rows(bits):
    rows, columns = 24, 64
    codes, zeros = random_codes(rows, columns, bits=bits), random_codes(rows, 2, bits=bits, seed=1)
    tensors = {
        "weight_packed": words(codes, bits),
        "weight_scale": torch.full((rows, 2), 0.5),
        "weight_shape": torch.tensor([rows, columns]),
        "weight_zero_point": words(zeros.t(), bits).t(),
    }
    expected = (codes - zeros.repeat_interleave(32, dim=1)) * 0.5
    assert torch.equal(dense(tensors, (rows, columns), "compressed-tensors"), expected)


def test_rows_whose_last_word_is_not_full():
    codes = random_codes(8, 60)
    tensors = {
        "weight_packed": words(codes, 4),
        "weight_scale": torch.ones(8, 1),
        "weight_shape": torch.tensor([8, 60]),
    }
    assert tensors["weight_packed"].shape == (8, math.ceil(60 / 8))
    assert torch.equal(dense(tensors, (8, 60), "compressed-tensors"), codes - 8.0)


def test_int8_with_zero_points_and_with_scales_of_all_shapes():
    codes = random_codes(8, 64, bits=8) - 128
    zeros = torch.arange(8)[:, None] - 3
    tensors = {"weight": codes.to(torch.int8), "weight_scale": torch.full((8, 1), 0.25)}
    with_zeros = dense(tensors | {"weight_zero_point": zeros.to(torch.int8)}, (8, 64), "compressed-tensors")
    assert torch.equal(with_zeros, (codes - zeros) * 0.25)
    scales = torch.arange(1.0, 17).view(8, 2)
    in_groups = dense(tensors | {"weight_scale": scales}, (8, 64), "compressed-tensors")
    assert torch.equal(in_groups, codes * scales.repeat_interleave(32, dim=1))
    for one in (torch.tensor(0.25), torch.tensor([0.25])):
        assert torch.equal(dense(tensors | {"weight_scale": one}, (8, 64), "compressed-tensors"), codes * 0.25)
    in_blocks = dense(tensors | {"weight_scale": scales[:2]}, (8, 64), "compressed-tensors", block=(4, 32))
    assert torch.equal(in_blocks, codes * scales[:2].repeat_interleave(4, dim=0).repeat_interleave(32, dim=1))


def test_the_list_of_dense_modules_may_be_wrong(tmp_path):
    def claim(config):
        config.update(ignore=["lm_head", "model.layers.0.self_attn.q_proj"])  # quantised; layer 1's MLP is dense

    assert same(weights(copy("ct_w4a16_asym", tmp_path / "ct", config=claim)), weights(GOLDEN / "ct_w4a16_asym"))

    def forget(config):
        del config["modules_to_not_convert"]

    folder = copy("awq_skipped_layer", tmp_path / "awq", config=forget)
    assert same(weights(folder), weights(GOLDEN / "awq_skipped_layer"))


@pytest.mark.parametrize("name", ["awq_skipped_layer", "bnb_nf4_double", "ct_w4a16_asym", "fbgemm_fp8"])
def test_some_of_the_layers_are_dense(name):
    names = load_file(GOLDEN / name / "model.safetensors").items()
    floats = {
        key for key, tensor in names if key.endswith("_proj.weight") and tensor.dtype in (torch.bfloat16, torch.float16)
    }
    assert floats  # that they are read is what the logits tell


def test_bitsandbytes_stores_the_same_bytes_as_floats(tmp_path):
    def change(tensors):
        for key in [key for key in tensors if key.endswith("_proj.weight")]:
            tensors[key] = tensors[key].flatten().view(torch.bfloat16).view(-1, 1)

    assert same(weights(copy("bnb_nf4", tmp_path / "copy", change)), weights(GOLDEN / "bnb_nf4"))


# What does not fit together

FIRST = {
    "ct_w4a16_asym": ["weight_packed", "weight_scale", "weight_shape", "weight_zero_point"],
    "ct_actorder": ["weight_g_idx"],
    "ct_w8a8": ["weight", "weight_scale"],
    "ct_fp8_block": ["weight", "weight_scale"],
    "gptq_desc_act": ["qweight", "qzeros", "scales", "g_idx"],
    "awq": ["qweight", "qzeros", "scales"],
    "bnb_int8": ["weight", "SCB"],
    "bnb_nf4_double": [
        "weight",
        "weight.absmax",
        "weight.quant_map",
        "weight.nested_absmax",
        "weight.nested_quant_map",
        "weight.quant_state.bitsandbytes__nf4",
    ],
    "mlx_4bit": ["weight", "scales", "biases"],
}
CHANGES = {
    "longer": lambda tensor: torch.cat((tensor, tensor)),
    "flat": lambda tensor: torch.cat((tensor.flatten(), tensor.flatten()[:1])),
    "empty": lambda tensor: tensor.flatten()[:0],
    "one": lambda tensor: tensor.flatten()[:1].reshape(1, 1, 1),
}


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize(("name", "leaf"), [(name, leaf) for name, leaves in FIRST.items() for leaf in leaves])
def test_every_tensor_of_another_shape_is_refused_by_name(name, leaf, change, tmp_path):
    def edit(tensors):
        tensors[f"{Q}.{leaf}"] = CHANGES[change](tensors[f"{Q}.{leaf}"])

    refuse(copy(name, tmp_path / "copy", edit), f"{Q}: ")


@pytest.mark.parametrize(("name", "leaf"), [(name, leaf) for name, leaves in FIRST.items() for leaf in leaves])
def test_every_tensor_is_needed(name, leaf, tmp_path):
    """g_idx and zero points where config.json tells of them: without them the weights are others."""
    folder = copy(name, tmp_path / "copy", lambda tensors: tensors.pop(f"{Q}.{leaf}"))
    refuse(folder, rf"{Q}: .*{leaf}" if leaf in ("weight_g_idx", "g_idx", "weight_zero_point") else Q)


def test_columns_in_order_need_no_g_idx(tmp_path):
    def remove(tensors):
        for key in [key for key in tensors if key.endswith(".g_idx")]:
            del tensors[key]

    assert same(weights(copy("gptq", tmp_path / "copy", remove)), weights(GOLDEN / "gptq"))


def test_a_tensor_that_no_format_has_is_refused(tmp_path):
    def add(tensors):
        tensors[f"{Q}.weight_mask"] = torch.ones(1)

    refuse(
        copy("ct_w8a8", tmp_path / "copy", add), f"{Q}: its tensors are in no format that is known: .*weight_mask F32"
    )


def test_sizes_are_held_against_config_json(tmp_path):
    folder = copy("gptq_desc_act", tmp_path / "group", config=lambda config: config.update(group_size=64))
    refuse(folder, "_proj: a scale holds for 32 columns, config.json says 64")

    def claim(config):
        config["config_groups"]["group_0"]["weights"]["num_bits"] = 8

    folder = copy("ct_w4a16", tmp_path / "bits", config=claim)
    refuse(folder, "_proj: the codes have 4 bits, config.json says 8")


def test_a_shape_that_is_not_the_weights(tmp_path):
    def change(tensors):
        tensors[f"{Q}.weight_shape"] = torch.tensor([64, 128])

    refuse(
        copy("ct_w4a16", tmp_path / "copy", change), r"weight_shape says \[64, 128\], by config.json it is \[128, 128\]"
    )


def test_a_folder_that_does_not_say_that_it_is_quantised(tmp_path):
    folder = copy("ct_w8a8", tmp_path / "copy")
    document = json.loads((folder / "config.json").read_text())
    del document["quantization_config"]
    (folder / "config.json").write_text(json.dumps(document))
    refuse(folder, "its tensors are those of compressed-tensors, config.json names no quantisation")


def test_a_folder_of_another_method_than_it_says(tmp_path):
    folder = copy("ct_w8a8", tmp_path / "copy", config=lambda config: config.update(quant_method="bitsandbytes"))
    refuse(folder, "those of compressed-tensors, config.json says 'bitsandbytes'")
