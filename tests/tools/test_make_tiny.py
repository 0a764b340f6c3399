"""Checkpoints of random weights: what transformers reads in them, and how large they come out."""

import json

import pytest
import torch
from make_tiny import LARGE, deepened, main
from transformers import AutoTokenizer, LlamaForCausalLM


def test_a_tiny_checkpoint_is_whole(tmp_path):
    main(["--output", str(tmp_path / "tiny"), "--dtype", "float32", "--seed", "3"])
    model = LlamaForCausalLM.from_pretrained(tmp_path / "tiny")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "tiny")
    ids = tokenizer("Zoë\n<|eot_id|>").input_ids
    assert ids == [256, *"Zoë\n".encode(), 265]
    assert tokenizer.decode(ids) == "<|begin_of_text|>Zoë\n<|eot_id|>"
    assert model.generation_config.eos_token_id == [257, 264, 265]
    logits = model(torch.tensor([ids])).logits
    assert 0.3 < logits.std() < 3


def test_the_seed_decides(tmp_path):
    for name, seed in (("a", "1"), ("b", "1"), ("c", "2")):
        main(["--output", str(tmp_path / name), "--seed", seed])
    a, b, c = ((tmp_path / name / "model.safetensors").read_bytes() for name in "abc")
    assert a == b != c


def test_sizes_of_another_config(tmp_path):
    main(["--output", str(tmp_path / "first")])
    config = json.loads((tmp_path / "first" / "config.json").read_text()) | {"vocab_size": 64, "hidden_size": 32}
    config |= {"bos_token_id": 1, "eos_token_id": 2}
    (tmp_path / "config.json").write_text(json.dumps(config))
    main(["--output", str(tmp_path / "second"), "--config", str(tmp_path / "config.json")])
    assert json.loads((tmp_path / "second" / "config.json").read_text()) == config
    assert not (tmp_path / "second" / "tokenizer.json").exists()  # 64 tokens are too few for all bytes
    assert LlamaForCausalLM.from_pretrained(tmp_path / "second").config.hidden_size == 32


@pytest.mark.parametrize("gigabytes", [0.001, 0.5, 2, 2.5])
def test_layers_are_added_until_the_bytes_are_reached(gigabytes):
    config = deepened(LARGE, gigabytes * 1e9, "bfloat16")
    num_bytes = 2 * config.num_parameters
    assert num_bytes >= gigabytes * 1e9
    assert config.num_hidden_layers == 1 or num_bytes - gigabytes * 1e9 < 0.13e9  # one layer


def test_an_existing_folder_is_left_alone(tmp_path):
    (tmp_path / "note").write_text("mine")
    with pytest.raises(SystemExit, match="exists already"):
        main(["--output", str(tmp_path)])
    assert [path.name for path in tmp_path.iterdir()] == ["note"]
