"""Small text and JSON files of a checkpoint, read with errors that name the file in one line."""

import json
from pathlib import Path
from typing import Any

_LFS_POINTER = b"version https://git-lfs"


def read_text(path: Path) -> str:
    """The file as UTF-8 text. Raises FileNotFoundError, or ValueError for what is not the file it should be."""
    try:
        data = path.read_bytes()
    except (FileNotFoundError, IsADirectoryError, NotADirectoryError):
        raise FileNotFoundError(f"{path}: no such file") from None
    if data.startswith(_LFS_POINTER):
        raise ValueError(f"{path} is a Git LFS pointer, not the file itself: fetch it with git lfs pull")
    if data.lstrip()[:9].lower() in (b"<!doctype", b"<html>"):
        raise ValueError(f"{path} is an HTML page, not the file itself: download it again")
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 text (byte {error.start})") from None


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in the file; an absent file counts as an empty one."""
    if not path.exists():
        return {}
    try:
        value = json.loads(read_text(path))
    except (json.JSONDecodeError, RecursionError) as error:
        raise ValueError(f"{path} is not valid JSON: {error}") from None
    if not isinstance(value, dict):
        raise ValueError(f"{path} must hold a JSON object, found {type(value).__name__}")
    return value
