"""Cells and tables of the suite's page."""

from collections.abc import Iterable, Sequence


def grid(head: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    lines += ["| " + " | ".join(row) + " |" for row in rows]
    return [*lines, ""]


def number(value: float | None, digits: int = 3) -> str:
    if value is None:
        return "never"
    text = f"{value:.{digits}f}"
    return text[1:] if text.startswith("0.") else text


def whole(value: float | None) -> str:
    return "never" if value is None else f"{value:.0f}"
