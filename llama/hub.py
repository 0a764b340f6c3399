"""Models and adapters by their id on the Hugging Face Hub ("org/name"): downloaded once, then read like a folder.

huggingface_hub, which tokenizers brings along, does the work: its cache, HF_HOME, HF_TOKEN, HF_ENDPOINT and
HF_HUB_OFFLINE mean what its users know. Weights come as safetensors alone. Runs without torch.
"""

import hashlib
import logging
import re
from pathlib import Path
from typing import Any

from llama.api.errors import AdapterError, CheckpointError
from llama.files import QUANTISATION_FILES, check_path

logger = logging.getLogger(__name__)

_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")
_CONFIG = ("config.json", "generation_config.json", *QUANTISATION_FILES)
_TEXT = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja",
         "additional_chat_templates/*.jinja")  # fmt: skip
_WEIGHTS = ("model.safetensors.index.json", "*.safetensors")
_ADAPTER = ("adapter_config.json", "adapter_model.safetensors")
# Meta's own files, twice the size, and what lies in folders.
_NEVER = ("original/*", "consolidated*", "*/*.safetensors")
_HASHED_AT_ONCE = 1 << 22


def model_folder(model: str | Path, revision: str | None = None, *, config_only: bool = False) -> Path:
    """The folder itself, or the one in the hub's cache that holds what `model` names; with `config_only` a config.json
    itself may be named. CheckpointError, in one line."""
    check_path(model)
    patterns = _CONFIG if config_only else (*_CONFIG, *_TEXT, *_WEIGHTS)
    if not config_only and Path(model).is_file():
        hint = "; llama convert makes one of a GGUF file" if Path(model).suffix.lower() == ".gguf" else ""
        raise CheckpointError(f"{model}: is a file; a model is a folder with a config.json{hint}")
    return _folder(model, revision, patterns, "config.json", CheckpointError)


def tokenizer_folder(tokenizer: str | Path) -> Path:
    return _folder(tokenizer, None, (*_CONFIG, *_TEXT), "tokenizer.json", CheckpointError)


def adapter_folder(adapter: str | Path) -> Path:
    """AdapterError where there is none."""
    return _folder(adapter, None, _ADAPTER, "adapter_config.json", AdapterError)


def is_hub_id(model: str | Path) -> bool:
    """Whether it has the form of an id and no file or folder of that name is there, which would go first."""
    return isinstance(model, str) and _ID.fullmatch(model) is not None and not Path(model).exists()


def _folder(
    name: str | Path, revision: str | None, patterns: tuple[str, ...], needed: str, error: type[ValueError]
) -> Path:
    check_path(name, error)
    if not is_hub_id(name):
        if revision is not None:
            raise error(
                f"revision={revision!r} is for an id of the hub, {name} is none, or a folder of that name is there"
            )
        if not str(name):  # as a path it would be the working directory
            raise error(f"'' names nothing; a folder with {needed} is needed, or an id of the hub")
        if isinstance(name, str) and _ID.fullmatch(name):
            logger.info("%s: the folder of that name here, not the hub's", name)
        return Path(name)
    try:
        folder = _download(str(name), revision, patterns)
    except _Failure as failure:
        raise error(str(failure)) from None
    if not (folder / needed).exists():
        raise error(f"{name}: has no {needed} on the hub, so that it is none that can be loaded")
    logger.info("%s: revision %s, in %s", name, folder.name, folder)
    return folder


class _Failure(Exception):
    """Why there is no folder, in one line."""


def _download(name: str, revision: str | None, patterns: tuple[str, ...]) -> Path:
    import huggingface_hub as hub
    from huggingface_hub import constants, errors

    at = f"{name}: on {constants.ENDPOINT}"
    blobs = Path(constants.HF_HUB_CACHE) / f"models--{name.replace('/', '--')}" / "blobs"
    before = set(blobs.iterdir()) if blobs.is_dir() else set()
    try:
        options: dict[str, Any] = {"allow_patterns": list(patterns), "ignore_patterns": list(_NEVER)}
        folder = Path(hub.snapshot_download(name, revision=revision, **options))
    except errors.HFValidationError as error:
        raise _Failure(f"{name}: there is no such folder, and it is no id of the hub: {_line(error)}") from None
    except errors.GatedRepoError:
        raise _Failure(
            f"{at} it is gated: ask for access on its page, then set HF_TOKEN or run `hf auth login`"
        ) from None
    except errors.RepositoryNotFoundError:
        what = "there is no such folder, and no such model on"
        raise _Failure(f"{name}: {what} {constants.ENDPOINT} (a private one needs HF_TOKEN)") from None
    except errors.RevisionNotFoundError:
        raise _Failure(f"{at} it has no revision {revision!r}") from None
    except (errors.LocalEntryNotFoundError, errors.OfflineModeIsEnabled) as error:
        where = "HF_HUB_OFFLINE is set" if constants.HF_HUB_OFFLINE else f"{constants.ENDPOINT} cannot be reached"
        raise _Failure(f"{name}: there is no such folder, {where}, and the cache lacks it: {_line(error)}") from None
    except errors.HfHubHTTPError as error:
        raise _Failure(f"{at} the download failed: {_line(error)}") from None
    except Exception as error:  # of the HTTP library, and of the disk
        raise _Failure(
            f"{at} the download was interrupted ({_line(error)}): try again, what has come is kept"
        ) from None
    _check_blobs(name, folder, before)
    return folder


def _check_blobs(name: str, folder: Path, before: set[Path]) -> None:
    """Large files are named by their SHA-256, and only their size is looked at when they come."""
    for file in folder.rglob("*"):
        blob = file.resolve()
        if blob in before or not re.fullmatch("[0-9a-f]{64}", blob.name):
            continue
        digest = hashlib.sha256()
        with blob.open("rb") as data:
            while part := data.read(_HASHED_AT_ONCE):
                digest.update(part)
        if digest.hexdigest() != blob.name:
            blob.unlink()
            raise _Failure(f"{name}: {file.name} came damaged (its SHA-256 is another) and was removed: try again")


def _line(error: BaseException) -> str:
    return " ".join((str(error) or type(error).__name__).split())[:200]
