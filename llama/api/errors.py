"""Every error that a caller of this package may want to tell apart. Runs without torch."""


class ConfigError(ValueError):
    """A configuration that is malformed, absurd, or not a Llama's."""


class CheckpointError(ValueError):
    """A checkpoint that is missing, damaged, or does not fit its config.json."""


class AdapterError(ValueError):
    """An adapter that is missing, damaged, unsupported, or made for another model."""


class ChatTemplateError(ValueError):
    """The template refused the messages, or did not finish within its limits."""


class ContextLengthError(ValueError):
    """A request needs more tokens than the context holds: `num_tokens` of `max_model_len`."""

    def __init__(self, message: str, num_tokens: int, max_model_len: int) -> None:
        super().__init__(message)
        self.num_tokens = num_tokens
        self.max_model_len = max_model_len


class QueueFullError(RuntimeError):
    """Too many requests, or too many prompt tokens, wait already. `retry_after` is a guess in seconds."""

    def __init__(self, message: str, retry_after: int) -> None:
        super().__init__(message)
        self.retry_after = retry_after


class EngineClosedError(RuntimeError):
    """The engine takes no new requests: it is draining or closed."""


class EngineDeadError(RuntimeError):
    """The engine cannot go on; make a new one."""
