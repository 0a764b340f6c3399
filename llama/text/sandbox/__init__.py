"""Worker processes for code and patterns of unknown origin, with limits on time and memory."""

from llama.text.sandbox.worker import LOW_PRIORITY, Worker, WorkerError, WorkerLimitError

__all__ = ["LOW_PRIORITY", "Worker", "WorkerError", "WorkerLimitError"]
