"""The fleet as a table, one line for each device, for `collect` and `report`."""

import time
from typing import Any

from . import wire
from .monitor import Seen, read_states
from .presence import AWAY
from .store import Store

STALE_S = 60.0  # after the collector's last sign of life
COLOURS = ("green", "yellow", "bold red")  # of the levels
CALM = ("reporting", "unknown", "asleep", "off")


def shown_states(store: Store) -> tuple[list[Seen], float, bool]:
    """-> (the states out of the database, as of when, whether no collector runs): then as it was when one did."""
    now_s = time.time()
    since_s, until_s = store.listening() or (now_s, now_s)
    stale = now_s - until_s > STALE_S
    now_s = until_s if stale else now_s
    return read_states(store, now_s, since_s), now_s, stale


def fleet_table(store: Store, caption: str = "", states: list[Seen] | None = None) -> Any:
    """The fleet as a rich table, one line a device. What devices say is never read as markup. states: those of a
    collector that runs in this process; None: those of the database."""
    if states is None:
        states, now_s, stale = shown_states(store)
        if stale:
            when = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(now_s))
            caption = f"as of {when}, when a collector was last connected" + (f"; {caption}" if caption else "")
    from rich.box import SIMPLE_HEAD
    from rich.table import Table
    from rich.text import Text

    together = common_causes(states)
    if together:
        caption = f"{together}; {caption}" if caption else together
    table = Table(caption=Text(caption), box=SIMPLE_HEAD, padding=0, pad_edge=False, show_edge=False)
    for name in ("device", "presence", "level", "score", "evidence", "reports", "lost", "last seen", "notes"):
        number = name in ("score", "evidence", "reports", "lost")
        # In 80 columns a device's name goes on in the next line; it is never cut off.
        table.add_column(
            name,
            justify="right" if number else "left",
            overflow="fold",
            no_wrap=number or name in ("presence", "last seen"),
            min_width={"device": 10, "level": 10, "notes": 10}.get(name),
        )
    rows = {row["device"]: row for row in store.devices()}
    for seen in states:
        row = rows.get(seen.device)
        if row is None:
            continue
        level = row["level"]
        table.add_row(
            Text(seen.labels.name or seen.device),
            Text(seen.state.state, "" if seen.state.state in CALM else "bold red"),
            Text(wire.LEVELS[level], COLOURS[level])
            + (in_channel(store, row) if level else "")
            + Text("".join(f" ({mark})" for mark in marks(row)), "yellow"),
            figure(row["score"]),
            figure(row["evidence"]),
            str(row["reports"]),
            str(row["lost"]),
            time.strftime("%H:%M:%S", time.localtime(row["last_seen_s"])),
            Text(", ".join(notes(row, seen))),
        )
    return table


def in_channel(store: Store, device: dict[str, Any]) -> str:
    """ " in nginx.service", where the last report of a device that is not normal names a channel."""
    rows = store.history(device["device"], limit=1) if device.get("channels") else []
    name = channel_name(device, rows[-1].channel) if rows else ""
    return f" in {name}" if name else ""


def channel_name(device: dict[str, Any], channel: int) -> str:
    """device: one of Store.devices() -> the name of the service or of the other channel that a report's `channel` is;
    "" for 0, the device itself."""
    names = device.get("channels") or []
    return "" if not channel else str(names[channel - 1]) if channel <= len(names) else f"channel {channel}"


def common_causes(states: list[Seen]) -> str:
    """One line where many devices left together: a router, a broker, a site; "" where none did."""
    away: dict[str, int] = {}
    for seen in states:
        if seen.cause and seen.state.state in AWAY:
            away[seen.cause] = away.get(seen.cause, 0) + 1
    return "; ".join(f"{count} of {len(states)} devices left together: {name}" for name, count in sorted(away.items()))


def marks(device: dict[str, Any]) -> list[str]:
    """What qualifies a device's level, of one of Store.devices()."""
    found = ["learning"] if device.get("learning") else []
    return found + [flag for flag in device["flags"] if flag != "learning"]


def notes(row: dict[str, Any], seen: Seen) -> list[str]:
    """What an operator should look into."""
    found = []
    if seen.state.state == "lying":
        found.append(seen.state.why)
    if seen.flapping:
        found.append("comes and goes")
    if seen.unexplained:
        found.append(f"{seen.unexplained} lost, unexplained")
    if "changed and steady" in row["flags"]:
        since_s = row.get("steady_since_s")
        since = "" if since_s is None else time.strftime(" since %m-%d %H:%M", time.localtime(since_s))
        found.append(f"changed and steady{since}: was-normal or calibrate?")
    if "model does not fit" in row["flags"]:
        found.append("train a model on its own recordings")
    if row["refused"]:
        found.append(f"{row['refused']} refused")
    update = row.get("update")
    if update and (update["trial"] or update["failed"]):
        found.append(update["shown"])
    response = row.get("response")
    if response and response["shown"]:
        found.append(response["shown"])
    if row.get("off_since_s") is not None and seen.state.state == "off":
        found.append(time.strftime("monitoring off since %m-%d %H:%M", time.localtime(row["off_since_s"])))
    own = row.get("own_model")
    if own:
        found.append(f"own model {own['shown']}" + (f", {own['refused']} failed" if own["refused"] else ""))
    return found


def figure(value: float | None) -> str:
    return "" if value is None else f"{value:.2f}"
