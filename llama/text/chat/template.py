"""ChatTemplate: messages and tools in, one prompt out, as text or as token ids.

Messages are prepared (prepare.py) and put into the form that the template reads (forms.py), control tokens in them are
hidden (safe_text.py), the template runs in a process of its own (renderer.py), and what was hidden is encoded as plain
text. The template writes BOS itself.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Self

from llama.api.errors import ChatTemplateError, CheckpointError, ParameterError
from llama.files import named, read_text
from llama.text.chat.builtin import REQUIRED_TOKENS, render_llama, with_tools_in_text
from llama.text.chat.forms import TemplateForms
from llama.text.chat.prepare import prepare_messages, prepare_tools
from llama.text.chat.renderer import DEADLINE_SECONDS, TemplateRenderer
from llama.text.chat.safe_text import SafeText
from llama.text.chat.source import TemplateSource, read_source
from llama.text.reasoning import CLOSE
from llama.text.tokenizer import Tokenizer
from llama.text.tokenizer.tokenizer import read_tokenizer_config

_DEFAULT, _TOOL_USE = "default", "tool_use"
_OUR_ARGUMENTS = frozenset({"messages", "tools", "add_generation_prompt", "continue_final_message"})
# Switches that clients send to every model; off is what a template that writes no thoughts does anyway.
_THINKING = frozenset({"enable_thinking", "thinking"})


class ChatTemplate:
    """How a checkpoint wants to be talked to. Safe to use from several threads."""

    def __init__(
        self,
        tokenizer: Tokenizer,
        templates: Mapping[str, str] | None = None,
        *,
        deadline_seconds: float = DEADLINE_SECONDS,
    ) -> None:
        """`templates` by name, at least "default"; None for the built-in Llama 3.1 format."""
        self._sources = {name: read_source(text) for name, text in (templates or {}).items()}
        written = _written_tokens(tokenizer.added_tokens, self._sources.values())
        is_known = written <= tokenizer.control_tokens
        self._tokenizer = tokenizer if is_known else tokenizer.with_control_tokens(written)
        self._forms: dict[str, TemplateForms] = {}
        self._renderer: TemplateRenderer | None = None
        if templates:
            if _DEFAULT not in templates:
                raise ValueError(f"chat_template: no template is called 'default', only {sorted(templates)}")
            self._renderer = TemplateRenderer(templates, deadline_seconds=deadline_seconds)
            self._forms = {n: self._forms_of(n, source, self._renderer) for n, source in self._sources.items()}

    @classmethod
    def from_pretrained(cls, path: str | Path, tokenizer: Tokenizer) -> Self:
        """chat_template.jinja wins over the field in tokenizer_config.json. Raises CheckpointError, naming the file."""
        folder = Path(path)
        file, templates = _read_templates(folder)
        with named(file):
            return cls(tokenizer, templates)

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        tools: Sequence[Mapping[str, Any]] | None = None,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        **template_arguments: Any,
    ) -> str:
        """The prompt as text. Control tokens that a message spells look here like the template's own: see `encode`."""
        safe, rendered = self._rendered(
            messages, tools, add_generation_prompt, continue_final_message, template_arguments
        )
        return safe.show(rendered)

    def encode(
        self,
        messages: Sequence[Mapping[str, Any]],
        tools: Sequence[Mapping[str, Any]] | None = None,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        **template_arguments: Any,
    ) -> list[int]:
        """The prompt as token ids. Nothing that a message, tool or argument says becomes a control token. With
        continue_final_message it ends with the last message's text, for the model to write on.

        Raises ParameterError for messages that cannot be meant, and its subclass ChatTemplateError where the template
        refuses them.
        """
        safe, rendered = self._rendered(
            messages, tools, add_generation_prompt, continue_final_message, template_arguments
        )
        return safe.encode(rendered)

    def prompt(
        self,
        messages: Sequence[Mapping[str, Any]],
        tools: Sequence[Mapping[str, Any]] | None = None,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        *,
        check: Callable[[str], None] = lambda text: None,
        **template_arguments: Any,
    ) -> tuple[str, list[int]]:
        """(what `render` gives, what `encode` gives), from one rendering. `check` may refuse the text before it is
        encoded, and what the user says last, which every template shows, before it is rendered."""
        safe, rendered = self._rendered(
            messages, tools, add_generation_prompt, continue_final_message, template_arguments, check=check
        )
        text = safe.show(rendered)
        check(text)
        return text, safe.encode(rendered)

    @property
    def num_lost_workers(self) -> int:
        """See Worker.num_lost."""
        return 0 if self._renderer is None else self._renderer.worker.num_lost

    @property
    def knows_thoughts(self) -> bool:
        """Whether it writes the end of a thought, or cuts one off an earlier answer."""
        return any(CLOSE in source.text for source in self._sources.values())

    def close(self) -> None:
        """Ends the process that renders; the next rendering would start another."""
        if self._renderer is not None:
            self._renderer.worker.close()

    def _rendered(
        self,
        messages: Any,
        tools: Any,
        add_generation_prompt: bool,
        continue_final_message: bool,
        arguments: Mapping[str, Any],
        *,
        check: Callable[[str], None] = lambda text: None,
    ) -> tuple[SafeText, str]:
        messages = prepare_messages(messages, self._tokenizer.control_tokens)
        if messages[-1]["role"] == "user" and isinstance(said := messages[-1]["content"], str):
            check(said.strip())
        tools = prepare_tools(tools)
        name = _TOOL_USE if tools and _TOOL_USE in self._sources else _DEFAULT
        source = self._sources.get(name)
        arguments = _read_arguments(arguments, source)
        # A template that gives a method an empty text may replace others by it.
        safe = SafeText(self._tokenizer, source.tested if source and "" in source.tested else ())
        if continue_final_message:
            if add_generation_prompt:
                both = "add_generation_prompt and continue_final_message contradict each other: give one of them"
                raise ParameterError(both, "continue_final_message")
            safe.mark_end(messages[-1])
        try:
            tools = safe.hide(tools, "tools")
            if tools and not (source and source.reads_tools):
                messages, tools = with_tools_in_text(messages, tools), None
            if source is not None:
                messages = self._forms[name].apply(messages)
            messages = self._hidden(messages, safe, source)
            arguments = safe.hide(arguments, "chat_template_kwargs")
        except RecursionError:
            raise ParameterError("messages, tools or template arguments are nested too deeply") from None
        if self._renderer is None:
            rendered = self._render_builtin(messages, add_generation_prompt)
        else:
            variables = self._variables(messages, tools, add_generation_prompt, arguments)
            rendered = self._renderer.render(name, variables)
        return safe, safe.up_to_mark(rendered) if continue_final_message else rendered

    @staticmethod
    def _hidden(
        messages: Sequence[Mapping[str, Any]], safe: SafeText, source: TemplateSource | None
    ) -> list[dict[str, Any]]:
        """What an assistant said keeps the tokens that the template tests for, as the end of a thought that it cuts."""
        tested = frozenset[str]() if source is None else safe.controls_in(source.tested)
        return [
            {
                safe.hide(key, "messages"): safe.hide(
                    value, "messages", tested if key == "content" and message["role"] == "assistant" else ()
                )
                for key, value in message.items()
            }
            for message in messages
        ]

    def _variables(
        self, messages: Any, tools: Any, add_generation_prompt: bool = True, arguments: Mapping[str, Any] | None = None
    ) -> dict[str, Any]:
        ours = {"messages": messages, "tools": tools, "add_generation_prompt": add_generation_prompt}
        return {**self._tokenizer.template_tokens, "documents": None, **(arguments or {}), **ours}

    def _forms_of(self, name: str, source: TemplateSource, renderer: TemplateRenderer) -> TemplateForms:
        def render(messages: Any, tools: Any) -> str | None:
            return renderer.try_render(name, self._variables(messages, tools))

        return TemplateForms(source, render)

    def _render_builtin(self, messages: Sequence[dict[str, Any]], add_generation_prompt: bool) -> str:
        missing = [token for token in REQUIRED_TOKENS if token not in self._tokenizer.control_tokens]
        if missing:
            raise ChatTemplateError(
                f"this checkpoint has no chat template, and its tokenizer lacks {missing[0]} of the Llama 3.1 format: "
                "generate from a prompt instead"
            )
        return render_llama(messages, add_generation_prompt)


def _read_arguments(arguments: Mapping[str, Any], source: TemplateSource | None) -> dict[str, Any]:
    """The arguments that a template (None: the built-in format) reads. Another one is refused, unless it says what
    holds anyway."""
    names = frozenset[str]() if source is None else source.names
    needless = _THINKING if source is None or "think>" not in source.text else frozenset[str]()
    unread = {name for name in arguments if name not in names or name in _OUR_ARGUMENTS}
    if unknown := sorted(name for name in unread if name not in needless or arguments[name] is not False):
        raise ParameterError(f"the chat template does not read the arguments {unknown}", "chat_template_kwargs")
    return {name: value for name, value in arguments.items() if name not in unread}


def _written_tokens(added: Iterable[str], sources: Iterable[TemplateSource]) -> set[str]:
    """The added tokens, words and white space apart, that a template writes: they separate messages, however the
    tokenizer's file flags them."""
    texts = [source.text for source in sources]
    marks = [t for t in added if any(map(str.isalnum, t)) and not t.replace("_", "").isalnum()]
    return {token for token in marks if any(token in text for text in texts)}


def _read_templates(folder: Path) -> tuple[Path, dict[str, str] | None]:
    """The file that holds the templates, and them by name; None where the checkpoint has none."""
    file = folder / "chat_template.jinja"
    if file.exists():
        others = sorted((folder / "additional_chat_templates").glob("*.jinja"))
        return file, {other.stem: read_text(other) for other in others} | {_DEFAULT: read_text(file)}
    file = folder / "tokenizer_config.json"
    found = read_tokenizer_config(folder).get("chat_template")
    if found is None:
        return file, None
    if isinstance(found, str):
        return file, {_DEFAULT: found}
    if isinstance(found, dict):  # as transformers takes it too
        found = [{"name": name, "template": text} for name, text in found.items()]
    is_list = isinstance(found, list) and all(
        isinstance(t, dict) and isinstance(t.get("name"), str) and isinstance(t.get("template"), str) for t in found
    )
    if not is_list:
        legal = "a string, a list of {name, template} or an object of templates by name"
        raise CheckpointError(f"{file}: chat_template must be {legal}")
    return file, {t["name"]: t["template"] for t in found}
