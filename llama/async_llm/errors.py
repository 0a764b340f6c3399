"""What can keep AsyncLLM from answering, by name, so that a server can tell its client which it was."""


class QueueFullError(RuntimeError):
    """Too many requests, or too many prompt tokens, wait already. `retry_after` is a guess in seconds."""

    def __init__(self, message: str, retry_after: int) -> None:
        super().__init__(message)
        self.retry_after = retry_after


class EngineClosedError(RuntimeError):
    """The engine takes no new requests: it is draining or closed."""
