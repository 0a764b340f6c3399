"""Every adapter that cannot be served is refused with one line that names what is wrong; engine and others go on."""

import json
import subprocess

import pytest
import torch
from safetensors.torch import load_file, save_file

from llama import LLM, SamplingParams
from llama.api.errors import AdapterError, ParameterError, WorkerLostError
from llama.model.lora import read_adapter
from llama.model.transformer import Transformer
from tests.lora.adapters import make_adapter

PREFIX = "base_model.model.model.layers.0.self_attn.q_proj."


@pytest.fixture(scope="module")
def model(base_path):
    return Transformer.from_pretrained(base_path)


@pytest.fixture
def folder(base_path, tmp_path):
    make_adapter(base_path, tmp_path / "adapter", target_modules=["q_proj", "v_proj"])
    return tmp_path / "adapter"


def edit_config(folder, **values):
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def edit_tensors(folder, change):
    path = folder / "adapter_model.safetensors"
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path)


def refusal(folder, model, max_rank=64):
    with pytest.raises(AdapterError) as caught:
        read_adapter(folder, model, max_rank=max_rank)
    message = str(caught.value)
    assert "\n" not in message
    return message


@pytest.mark.parametrize(
    ("values", "told"),
    [
        ({"use_dora": True}, "use_dora"),
        ({"bias": "lora_only"}, "bias"),
        ({"lora_bias": True}, "lora_bias"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save"),
        ({"init_lora_weights": "pissa"}, "pissa"),
        ({"init_lora_weights": "pissa_niter_16"}, "pissa_niter_16"),
        ({"init_lora_weights": "olora"}, "olora"),
        ({"init_lora_weights": "corda"}, "corda"),
        ({"init_lora_weights": "loftq"}, "loftq"),
        ({"layer_replication": [[0, 2], [1, 3]]}, "layer_replication"),
        ({"use_qalora": True}, "use_qalora"),
        ({"alora_invocation_tokens": [1, 2]}, "alora_invocation_tokens"),
        ({"trainable_token_indices": [3]}, "trainable_token_indices"),
        ({"target_parameters": ["x"]}, "target_parameters"),
        ({"ensure_weight_tying": True}, "ensure_weight_tying"),
        ({"a_setting_of_next_year": 3}, "a_setting_of_next_year"),
        ({"peft_type": "IA3"}, "peft_type"),
        ({"fan_in_fan_out": True}, "fan_in_fan_out"),
        ({"r": 0}, "r must be an integer >= 1, found 0"),
        ({"r": "4"}, "r must be"),
        ({"lora_alpha": None}, "lora_alpha"),
        ({"lora_alpha": 0}, "lora_alpha"),
        ({"rank_pattern": {r"layers\.\d+.*q_proj": 4}}, "rank_pattern"),
        ({"alpha_pattern": {"o_proj": 4}}, "alpha_pattern: 'o_proj'"),
        (
            {"target_modules": ["c_attn", "dense"]},
            "['c_attn', 'dense'] matches no module of the model, which has q_proj",
        ),
        ({"model_type": "mistral"}, "model_type must be 'llama', found 'mistral'"),
        ({"target_modules": []}, "target_modules"),
        ({"target_modules": "(q_proj"}, "no regular expression"),
        ({"target_modules": "nothing.*"}, "matches no module"),
        ({"layers_to_transform": [0, 9]}, "no layer 9"),
        ({"layers_pattern": "blocks", "layers_to_transform": [0]}, "layers_pattern"),
        ({"use_rslora": "yes"}, "use_rslora"),
    ],
)
def test_configuration(folder, model, values, told):
    edit_config(folder, **values)
    message = refusal(folder, model)
    assert "adapter_config.json" in message and told in message


@pytest.mark.parametrize(
    "values",
    [
        {"model_type": "llama"},  # which Workers AI's documentation asks for
        {"target_modules": ["q_proj", "v_proj", "c_attn", "query_key_value"]},  # PEFT takes what the model lacks
        {"exclude_modules": ["c_attn"]},
    ],
)
def test_what_changes_nothing_is_taken(folder, model, values):
    before = read_adapter(folder, model, max_rank=64).digest
    edit_config(folder, **values)
    assert read_adapter(folder, model, max_rank=64).digest == before


def test_a_tensor_of_a_module_that_the_model_lacks_is_refused(folder, model):
    edit_config(folder, target_modules=["q_proj", "v_proj", "c_attn"])
    edit_tensors(
        folder,
        lambda tensors: tensors.update({PREFIX.replace("q_proj", "c_attn") + "lora_A.weight": torch.ones(4, 48)}),
    )
    assert "c_attn" in refusal(folder, model)


def test_an_expression_that_never_ends_is_stopped(folder, model, monkeypatch):
    monkeypatch.setattr("llama.patterns.PATTERN_SECONDS", 1)
    edit_config(folder, target_modules=r"(([a-z._0-9])*)*Q")
    assert "does not end" in refusal(folder, model)


def test_rank_above_the_limit(folder, model):
    assert "rank 4, max_lora_rank is 3" in refusal(folder, model, max_rank=3)


@pytest.mark.parametrize("content", ["{", "[]", '"x"', "\x00"])
def test_config_that_is_no_object(folder, model, content):
    (folder / "adapter_config.json").write_text(content)
    assert "JSON" in refusal(folder, model)


def test_missing_files(folder, model, tmp_path):
    assert "is no folder" in refusal(tmp_path / "nowhere", model)
    (folder / "adapter_model.safetensors").rename(folder / "adapter_model.bin")
    assert "pickle" in refusal(folder, model)
    (folder / "adapter_model.bin").unlink()
    assert "adapter_model.safetensors" in refusal(folder, model)
    (folder / "adapter_config.json").unlink()
    assert "adapter_config.json" in refusal(folder, model)


def test_a_truncated_file(folder, model):
    path = folder / "adapter_model.safetensors"
    path.write_bytes(path.read_bytes()[:-5])
    assert "truncated" in refusal(folder, model)


@pytest.mark.parametrize("letter", "AB")
def test_an_adapter_that_was_never_trained_is_refused(folder, model, letter):
    """As PEFT makes one: without effect, whatever is asked of it."""
    edit_tensors(folder, lambda tensors: [tensors[name].zero_() for name in tensors if f"lora_{letter}." in name])
    assert "never trained" in refusal(folder, model)


def test_a_missing_half(folder, model):
    edit_tensors(folder, lambda tensors: tensors.pop(PREFIX + "lora_B.weight"))
    assert PREFIX + "lora_B.weight" in refusal(folder, model)


def test_tensors_that_nothing_takes_are_listed_with_the_nearest_name(folder, model):
    def change(tensors):
        for i in range(12):
            tensors[f"base_model.model.model.layers.{i}.self_attn.qproj.lora_A.weight"] = torch.zeros(4, 48)

    edit_tensors(folder, change)
    message = refusal(folder, model)
    assert "12 of 24 tensors" in message and "and 2 more" in message and "q_proj.lora_A.weight" in message


def test_an_adapter_of_which_nothing_matches(folder, model):
    def change(tensors):
        for name in list(tensors):
            tensors["other." + name] = tensors.pop(name)

    edit_tensors(folder, change)
    assert "12 of 12 tensors" in refusal(folder, model)


def test_shapes_that_do_not_fit(folder, model):
    edit_tensors(folder, lambda tensors: tensors.update({PREFIX + "lora_A.weight": torch.zeros(4, 64)}))
    assert "[4, 48], found [4, 64]" in refusal(folder, model)


def test_integers(folder, model):
    edit_tensors(folder, lambda tensors: tensors.update({PREFIX + "lora_A.weight": torch.zeros(4, 48).int()}))
    assert "I32" in refusal(folder, model)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_nan(folder, model, value):
    edit_tensors(folder, lambda tensors: tensors[PREFIX + "lora_A.weight"].fill_(value))
    assert "NaN or infinity" in refusal(folder, model)


def test_a_stored_base_weight_must_be_the_models(base_path, model, tmp_path):
    make_adapter(base_path, tmp_path, target_modules=["embed_tokens", "lm_head"])
    names = [name for name in load_file(tmp_path / "adapter_model.safetensors") if "base_layer" in name]
    assert len(names) == 2, "peft stores both"
    read_adapter(tmp_path, model, max_rank=64)
    edit_tensors(tmp_path, lambda tensors: tensors[names[0]].add_(1))
    assert names[0] in refusal(tmp_path, model)


def test_the_engine_and_its_other_adapters_go_on(base_path, folder, tmp_path):
    llm = LLM(Transformer.from_pretrained(base_path, dtype=torch.float64), num_blocks=32, max_model_len=64)
    llm.load_lora("good", folder)
    params = SamplingParams(temperature=0, max_tokens=8)
    before = llm.generate([[1, 2, 3]], params, lora="good")[0].outputs[0].token_ids
    make_adapter(base_path, tmp_path / "bad")
    edit_config(tmp_path / "bad", use_dora=True)
    with pytest.raises(AdapterError):
        llm.load_lora("bad", tmp_path / "bad")
    with pytest.raises(ValueError, match=r"'bad' is loaded \(loaded: good"):
        llm.generate([[1, 2, 3]], params, lora="bad")
    assert llm.generate([[1, 2, 3]], params, lora="good")[0].outputs[0].token_ids == before
    assert [info.name for info in llm.list_loras()] == ["good"]


@pytest.mark.parametrize("name", ["", ".hidden", "a/b", "../up", "x" * 65, "a b", "ä", None])
def test_names(base_path, folder, name):
    llm = LLM(Transformer.from_pretrained(base_path), num_blocks=8, max_model_len=64)
    with pytest.raises(ParameterError, match="name must match") as caught:
        llm.load_lora(name, folder)
    assert caught.value.param == "name"


def test_a_name_that_is_loaded_already(base_path, folder):
    llm = LLM(Transformer.from_pretrained(base_path), num_blocks=8, max_model_len=64)
    llm.load_lora("good", folder)
    with pytest.raises(ParameterError, match="an adapter named 'good' is loaded already: unload it first") as caught:
        llm.load_lora("good", folder)
    assert caught.value.param == "name"


def test_adapters_are_bounded_by_bytes_and_none_is_unloaded_behind_its_users_back(base_path, tmp_path):
    paths = [tmp_path / name for name in ("a", "b")]
    for path in paths:
        make_adapter(base_path, path, target_modules=["q_proj"])
    size = LLM(base_path, num_blocks=8).load_lora("a", paths[0]).nbytes
    llm = LLM(base_path, num_blocks=8, max_lora_bytes=2 * size - 1)
    llm.load_lora("a", paths[0])
    told = f"'b' takes {size} bytes and those that are loaded {size}: .*{2 * size - 1}"
    with pytest.raises(ParameterError, match=told) as caught:
        llm.load_lora("b", paths[1])
    assert caught.value.param == "max_lora_bytes"
    assert [info.name for info in llm.list_loras()] == ["a"] and llm.engine.adapters.nbytes == size
    llm.unload_lora("a")
    assert llm.load_lora("b", paths[1]).nbytes == size


def test_the_size_of_an_adapter_is_looked_at_before_its_tensors_are_read(folder, model, monkeypatch):
    def refuse(nbytes):
        raise ValueError(f"{nbytes} bytes")

    monkeypatch.setattr("llama.model.lora.adapter.read_into", None)
    expected = sum(tensor.numel() for tensor in load_file(folder / "adapter_model.safetensors").values()) * 4
    with pytest.raises(ValueError, match=f"^{expected} bytes"):
        read_adapter(folder, model, max_rank=64, check_size=refuse)


@pytest.mark.parametrize("alpha", [1e308, -1e300, 1e7])
def test_an_alpha_that_no_answer_survives(folder, model, alpha):
    edit_config(folder, lora_alpha=alpha)
    assert "lora_alpha must be a number other than 0 and at most 1e+06" in refusal(folder, model)


def test_a_scaled_tensor_that_is_infinite(folder, model):
    edit_config(folder, lora_alpha=1e6)
    edit_tensors(folder, lambda tensors: [t.fill_(1e36) for name, t in tensors.items() if "lora_B" in name])
    assert "is too large for torch.float32" in refusal(folder, model)


def test_a_pattern_process_that_the_system_ends_is_not_the_adapters_fault(folder, model, monkeypatch):
    edit_config(folder, target_modules="model.*(q_proj|v_proj)")
    really, codes = subprocess.run, [-9]

    def run(*arguments, **options):
        done = really(*arguments, **options)
        if codes:
            done.returncode, done.stdout = codes.pop(), ""
        return done

    monkeypatch.setattr(subprocess, "run", run)
    assert read_adapter(folder, model, max_rank=64).targets == ("q_proj", "v_proj")
    codes += [-9, -15]
    with pytest.raises(WorkerLostError, match="load the adapter again"):
        read_adapter(folder, model, max_rank=64)
