"""The fleet as a table, one line for each device, for `collect` and `report`."""

import time
from typing import Any

from . import wire
from .store import Store

COLOURS = ("green", "yellow", "bold red")  # of the levels


def fleet_table(store: Store, caption: str = "") -> Any:
    """The fleet as a rich table, one line a device. What devices say is never read as markup."""
    from rich.table import Table
    from rich.text import Text

    table = Table(caption=Text(caption))
    for name in ("device", "link", "level", "score", "evidence", "reports", "lost", "last seen", "notes"):
        table.add_column(name, justify="right" if name in ("score", "evidence", "reports", "lost") else "left")
    for device in store.devices():
        level = device["level"]
        table.add_row(
            Text(device["device"]),
            {True: "online", False: "offline", None: "?"}[device["online"]],
            Text(wire.LEVELS[level], COLOURS[level]) + (" (learning)" if device.get("learning") else ""),
            figure(device["score"]),
            figure(device["evidence"]),
            str(device["reports"]),
            str(device["lost"]),
            time.strftime("%H:%M:%S", time.localtime(device["last_seen_s"])),
            Text(", ".join(notes(device))),
        )
    return table


def notes(device: dict[str, Any]) -> list[str]:
    """What an operator should look into, of one of Store.devices()."""
    found = []
    if device["conflicts"]:
        found.append(f"key used twice ({device['conflicts']})")
    if device["refused"]:
        found.append(f"{device['refused']} refused")
    return found


def figure(value: float | None) -> str:
    return "" if value is None else f"{value:.2f}"
