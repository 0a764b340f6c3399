"""A tokenizer.json is tried out before it is used: what its patterns do to a text shows only when they run."""

import logging
from pathlib import Path

from llama.api.errors import CheckpointError, WorkerLostError
from llama.text.sandbox import Worker, WorkerError
from llama.text.tokenizer.bounds import is_plain, without_vocabulary
from llama.text.tokenizer.tokenizer import Tokenizer

logger = logging.getLogger(__name__)

DEADLINE_SECONDS = 3.0  # of processor time, for a hostile text to be encoded: usual tokenizers take a tenth of one


def try_out(folder: Path, tokenizer: Tokenizer) -> None:
    """Raises CheckpointError, in one line, for a tokenizer.json that a hostile text makes hang, crash or take a
    gigabyte. Nothing is done where only the library's own patterns are used."""
    if is_plain(tokenizer.backend):
        return
    file = folder / "tokenizer.json"
    patterns = without_vocabulary(tokenizer.backend)
    setup = {"path": str(file.resolve())} if patterns is None else {"text": patterns}
    worker = Worker("llama.text.sandbox.tokenizer_trial", setup, deadline_seconds=DEADLINE_SECONDS)
    try:
        worker.ask({})
    except WorkerError as error:
        what = "cannot be used, for a text of all kinds of characters is not encoded"
        raise CheckpointError(f"{file}: {what}: {error}") from None
    except WorkerLostError:
        logger.warning("%s could not be tried out: its worker process was lost", file)
    finally:
        worker.close()
