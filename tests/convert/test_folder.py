"""What the converters share: the two layouts of RoPE, the alphabet of bytes, generation defaults."""

import json

import make_tiny
import pytest
import torch
from transformers.convert_slow_tokenizer import bytes_to_unicode

from llama.convert.bpe import byte_alphabet, write_tokenizer
from llama.convert.folder import unpermute_rope, write_generation_config
from llama.model.config import ModelConfig
from llama.model.generation_config import GenerationConfig


def test_unpermute_rope_sends_pairs_to_halves():
    rows = torch.arange(12.0)[:, None]  # two heads of six: pairs (0, 1), (2, 3), (4, 5)
    assert unpermute_rope(rows, 2).flatten().tolist() == [0, 2, 4, 1, 3, 5, 6, 8, 10, 7, 9, 11]


@pytest.mark.parametrize(("heads", "head_dim"), [(1, 2), (3, 4), (4, 16), (2, 6)])
def test_both_layouts_rotate_alike(heads, head_dim):
    """Interleaved rotation of Wx, its rows then reordered, equals half-split rotation of the reordered W's product."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(heads * head_dim, 5, generator=generator, dtype=torch.float64)
    x = torch.randn(5, generator=generator, dtype=torch.float64)
    angle = torch.rand(head_dim // 2, generator=generator, dtype=torch.float64)
    pairs = torch.view_as_complex((weight @ x).view(heads, head_dim // 2, 2))
    interleaved = torch.view_as_real(pairs * torch.polar(torch.ones_like(angle), angle))
    low, high = (unpermute_rope(weight, heads) @ x).view(heads, 2, head_dim // 2).unbind(1)
    halves = torch.stack((low * angle.cos() - high * angle.sin(), high * angle.cos() + low * angle.sin()), -1)
    torch.testing.assert_close(halves, interleaved, rtol=1e-12, atol=1e-12)


def test_byte_alphabet_is_gpt2s():
    assert byte_alphabet() == bytes_to_unicode()


def test_generation_defaults_are_read_as_they_were_written(tmp_path):
    config = ModelConfig.preset("tiny")
    write_generation_config(tmp_path, config, None)
    assert GenerationConfig.from_pretrained(tmp_path).sampling == {}
    write_generation_config(tmp_path, config, None, {"temperature": 0.6, "top_p": 0.9})
    assert GenerationConfig.from_pretrained(tmp_path).sampling == {"temperature": 0.6, "top_p": 0.9}
    assert json.loads((tmp_path / "generation_config.json").read_text())["do_sample"] is True


def test_a_full_disk_is_an_error_of_the_system(tmp_path):
    (tmp_path / "tokenizer.json").symlink_to("/dev/full")
    with pytest.raises(OSError, match="No space left"):
        write_tokenizer(tmp_path, make_tiny.byte_tokenizer(), model_max_length=8, special={}, chat_template=None)
