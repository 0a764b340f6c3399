"""Messages and tools to token ids, by the checkpoint's own chat template or the built-in Llama 3.1 format."""

from llama.api.errors import ChatTemplateError
from llama.text.chat.template import ChatTemplate

__all__ = ["ChatTemplate", "ChatTemplateError"]
