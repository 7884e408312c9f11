"""What `stonechat top` shows of a window: on a terminal with rich, or as plain text."""

from typing import Any

from ..console import plain_table
from .top_view import LEVELS, View

_LEVEL_STYLES = ("green", "yellow", "bold red")


_BAR_CELLS = 16
_BAR_DEVIATIONS = 8


def screen(view: View, by_z: bool, rows: int = 1000, next_s: float | None = None, error: str = "") -> Any:
    """What to print; of the features at most `rows`, then the most unusual ones."""
    from rich.console import Group
    from rich.text import Text

    lines: list[Any] = [_headline(view, next_s)]
    if error:
        lines.append(Text("the last reading failed: " + error, "red"))
    lines.append(_table(view, by_z, rows) if view.shown else Text("waiting for the end of the first window ..."))
    if next_s is not None:
        hidden = len(view.schema) - rows
        more = f"   {hidden} quieter features need a taller terminal" if hidden > 0 else ""
        lines.append(Text("q quit   s sort   r learn anew" + more, "dim"))
    return Group(*lines)


def plain(view: View) -> str:
    """The same window without colours: a device has no rich."""
    lines = [f"stonechat top  {view.schema.name}  model {view.model_name or 'none'}  windows {view.windows}"]
    shown = view.shown or {}
    if verdict := shown.get("verdict"):
        lines.append(
            f"verdict {verdict['level']}  evidence {100 * verdict['evidence']:.0f} % of an alarm  "
            f"surprise {verdict['surprise']:.1f}"
        )
    if learning := view.learning():
        lines.append(learning)
    rows = []
    for name, row in shown.get("features", {}).items():
        share = f"{row['share_percent']} %" if row.get("share_percent") else ""
        rows.append([name, human(row["value"]), row["unit"], "" if row["z"] is None else f"{row['z']:+.1f}", share])
    return "\n".join(lines) + "\n" + plain_table(["feature", "now", "unit", "z", "of score"], rows)


def _headline(view: View, next_s: float | None) -> Any:
    from rich.text import Text

    text = Text.assemble(("stonechat top", "bold"), f"  {view.schema.name}  ")
    text.append(f"model {view.model_name}" if view.model_name else "no model")
    text.append(f"  window {view.window_ms / 1000:g} s, {view.windows} seen")
    if view.shown and view.shown["dropped"]:
        text.append(f", {view.shown['dropped']} dropped", "yellow")
    if next_s is not None:
        text.append(f", next in {next_s:.0f} s")
    verdict = view.shown["verdict"] if view.shown else None
    if verdict:
        evidence = min(1.0, verdict["evidence"])
        text.append("\nverdict ")
        text.append(f"{verdict['level']:<7}", _LEVEL_STYLES[LEVELS.index(verdict["level"])])
        text.append(" evidence ")
        text.append(_cells(evidence, 20), _LEVEL_STYLES[2 if evidence >= 1 else 1 if evidence >= 0.5 else 0])
        text.append(f" {100 * verdict['evidence']:.0f} % of an alarm   surprise {verdict['surprise']:.1f}")
    if learning := view.learning():
        text.append(f"\n{learning}", "cyan")
    return text


def _table(view: View, by_z: bool, rows: int) -> Any:
    from rich.table import Table
    from rich.text import Text

    features = (view.shown or {}).get("features", {})
    table = Table(box=None, padding=(0, 1), header_style="bold")
    for name, justify in (("feature", "left"), ("now", "right"), ("unit", "left"), ("z", "right"), ("", "left")):
        table.add_column(name, justify=justify)  # type: ignore[arg-type]
    with_shares = any("share_percent" in row for row in features.values())
    if with_shares:
        table.add_column("of score", justify="right")
    unusual = sorted(features, key=lambda name: -abs(features[name]["z"] or 0))[:rows]
    for name in unusual if by_z else [name for name in features if name in unusual]:
        row = features[name]
        z = row["z"]
        style = "dim" if z is None or abs(z) < 1 else "red" if abs(z) >= 4 else "yellow" if abs(z) >= 2 else ""
        cells = [name, human(row["value"]), row["unit"], "" if z is None else f"{z:+.1f}", _bar(z)]
        if with_shares:
            cells.append(f"{row['share_percent']} %" if row["share_percent"] else "")
        table.add_row(*(Text(cell, style) for cell in cells))
    return table


def _bar(z: float | None) -> str:
    return "" if z is None else _cells(min(1.0, abs(z) / _BAR_DEVIATIONS), _BAR_CELLS)


def _cells(share: float, cells: int) -> str:
    full = round(share * cells)
    return "█" * full + "·" * (cells - full)


def human(value: float) -> str:
    for limit, factor, suffix in ((1e4, 1, ""), (1e7, 1e3, "k"), (1e10, 1e6, "M")):
        if value < limit:
            scaled = value / factor
            return f"{scaled:.0f}{suffix}" if scaled >= 100 or scaled == int(scaled) else f"{scaled:.1f}{suffix}"
    return f"{value / 1e9:.0f}G"
