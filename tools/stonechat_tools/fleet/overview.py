"""The fleet as a table, one line for each device, for `collect` and `report`."""

import time
from typing import Any

from . import wire
from .store import Store


def fleet_table(store: Store, caption: str = "") -> Any:
    """The fleet as a rich table, one line a device."""
    from rich.table import Table

    table = Table(caption=caption)
    for name in ("device", "link", "level", "score", "evidence", "reports", "lost", "last seen"):
        table.add_column(name, justify="right" if name in ("score", "evidence", "reports", "lost") else "left")
    colours = ("green", "yellow", "bold red")
    for device in store.devices():
        level = device["level"]
        table.add_row(
            device["device"],
            {True: "online", False: "offline", None: "?"}[device["online"]],
            f"[{colours[level]}]{wire.LEVELS[level]}[/]" + (" (learning)" if device.get("learning") else ""),
            figure(device["score"]),
            figure(device["evidence"]),
            str(device["reports"]),
            str(device["lost"]),
            time.strftime("%H:%M:%S", time.localtime(device["last_seen_s"])),
        )
    return table


def figure(value: float | None) -> str:
    return "" if value is None else f"{value:.2f}"
