"""What can be seen of a chat template without running it."""

from dataclasses import dataclass

MAX_CHARACTERS = 2**18


@dataclass(frozen=True, slots=True)
class TemplateSource:
    """`names` are its variables, `strings` the string constants and attributes that it mentions, `tested` those
    constants that it compares with something or gives to a method, such as `'</think>' in content`."""

    text: str
    names: frozenset[str]
    strings: frozenset[str]
    tested: frozenset[str]

    @property
    def reads_tools(self) -> bool:
        return "tools" in self.names

    @property
    def reads_calls(self) -> bool:
        return "tool_calls" in self.strings


def read_source(text: str) -> TemplateSource:
    """Raises ValueError for a template that is too large or malformed."""
    from jinja2 import TemplateSyntaxError, nodes

    from llama.text.sandbox.chat_templates import make_environment

    if len(text) > MAX_CHARACTERS:
        raise ValueError(f"chat_template: {len(text)} characters are more than {MAX_CHARACTERS}")
    try:
        tree = make_environment().parse(text)
    except TemplateSyntaxError as error:
        raise ValueError(f"chat_template: line {error.lineno}: {error.message}") from None
    except RecursionError:
        raise ValueError("chat_template: nested too deeply") from None

    def constants(node: nodes.Node) -> set[str]:
        own = [node] if isinstance(node, nodes.Const) else []
        found = (each.value for each in (*own, *node.find_all(nodes.Const)))
        return {value for value in found if isinstance(value, str)}

    compared = (part for node in tree.find_all(nodes.Compare) for part in (node.expr, *(op.expr for op in node.ops)))
    calls: list[nodes.Call | nodes.Filter | nodes.Test] = [
        *tree.find_all(nodes.Call),
        *tree.find_all(nodes.Filter),
        *tree.find_all(nodes.Test),
    ]
    given = (argument for node in calls for argument in node.args)
    return TemplateSource(
        text,
        names=frozenset(node.name for node in tree.find_all(nodes.Name)),
        strings=frozenset(constants(tree) | {node.attr for node in tree.find_all(nodes.Getattr)}),
        tested=frozenset(text for node in (*compared, *given) for text in constants(node)),
    )
