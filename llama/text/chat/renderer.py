"""Renders chat templates in a worker process: a template is a program that came with a downloaded file.

jinja2's sandbox keeps a template from Python's internals; the worker process bounds its time and memory.
"""

from collections.abc import Mapping
from typing import Any

from llama.api.errors import ChatTemplateError, ParameterError
from llama.text.sandbox import Worker, WorkerError, WorkerLimitError

DEADLINE_SECONDS = 5.0
MAX_CHARACTERS = 16 * 2**20


class TemplateRenderer:
    """Renders named templates; about a millisecond each, one at a time."""

    def __init__(self, templates: Mapping[str, str], *, deadline_seconds: float = DEADLINE_SECONDS) -> None:
        setup = {"templates": dict(templates), "max_characters": MAX_CHARACTERS}
        self.worker = Worker("llama.text.sandbox.chat_templates", setup, deadline_seconds=deadline_seconds)

    def render(self, template: str, variables: Mapping[str, Any]) -> str:
        """Raises ChatTemplateError with the template's own message, or saying which limit it exceeded."""
        try:
            return str(self.worker.ask({"template": template, "variables": variables}))
        except WorkerError as error:
            raise ChatTemplateError(f"chat template: {error}") from None
        except ValueError as error:
            raise ParameterError(f"messages, tools and template arguments must be JSON values: {error}") from None

    def try_render(self, template: str, variables: Mapping[str, Any]) -> str | None:
        """As `render`, and None where the template itself refuses what it is given."""
        try:
            return str(self.worker.ask({"template": template, "variables": variables}))
        except WorkerLimitError as error:
            raise ChatTemplateError(f"chat template: {error}") from None
        except WorkerError:
            return None
