"""What the verbs print on a terminal: text of others (names of files, devices, labels, features, what a model says) is
shown as it is, without rich's markup in it and without what a terminal would obey."""

from typing import Any

from rich.console import Console
from rich.progress import TextColumn
from rich.text import Text

from .console import safe


class Screen(Console):
    """A rich Console for plain strings; what is to be styled is a Text (`bold`)."""

    def __init__(self, **options: Any) -> None:
        super().__init__(markup=False, emoji=False, **options)

    def render_str(self, text: str, **options: Any) -> Text:
        return super().render_str(safe(text), **options)


def bold(text: str, rest: str = "") -> Text:
    return Text.assemble((safe(text), "bold"), safe(rest))


class Description(TextColumn):
    """The column of a progress bar with its task's description."""

    def __init__(self) -> None:
        super().__init__("{task.description}", markup=False)

    def render(self, task: Any) -> Text:
        text = super().render(task)
        return Text(safe(text.plain), style=text.style, justify=text.justify)
