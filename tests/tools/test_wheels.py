"""Pinned wheels as a source of files."""

import hashlib
import zipfile

import pytest
from wheels import extract, fetch_wheel


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
