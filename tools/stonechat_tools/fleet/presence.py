"""Who is there: what a device's messages, their absence and the collector's own absence say.

reporting   messages arrive as often as they did before
silent      nothing for two intervals, while a collector listened
gone        the broker published the device's last will: its connection has ended
lying       its key is used twice: one identity and number with other bytes, or two starts that run side by side
unknown     nothing is known of how often it reports
An interval is as many windows as the device lately put into one report. A collector that was not connected has heard
nobody, so its own absence makes no device silent.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

STATES = ("reporting", "silent", "gone", "lying", "unknown")
SLACK_S = 30.0  # for the network, the broker and a batch
COMMON = 3  # devices that fall silent or are gone within one interval have one cause,
COMMON_SHARE = 0.5  # if they are this share of those that were there


@dataclass(frozen=True, slots=True)
class Presence:
    state: str
    since_s: float | None
    why: str


def interval_s(device: dict[str, Any]) -> float | None:
    """Seconds between two reports of one of Store.devices(), None where that is not known."""
    if not device["window_ms"] or not device["heartbeat_windows"]:
        return None
    return float(device["window_ms"]) / 1000 * float(device["heartbeat_windows"])


def presence(device: dict[str, Any], now_s: float, listening_since_s: float) -> Presence:
    """device: one of Store.devices(); listening_since_s: since when a collector has heard everything up to now_s."""
    if device["conflicts"]:
        return Presence("lying", device["conflict_s"], f"its key is used twice ({device['conflicts']} signs of it)")
    if device["online"] is False:
        return Presence("gone", device["online_since_s"], "its connection to the broker ended")
    every_s = interval_s(device)
    if every_s is None:
        return Presence("unknown", None, "no status and report yet")
    heard_s = device["last_seen_s"]
    if now_s - max(heard_s, listening_since_s) > 2 * every_s + SLACK_S:
        return Presence("silent", heard_s + every_s, f"no report for two intervals of {every_s:.0f} s")
    return Presence("reporting", device["online_since_s"], "")


def common_cause(devices: Sequence[tuple[dict[str, Any], Presence]]) -> str:
    """One line where many devices left together: a router, a broker, a site; "" where none did."""
    away = [(found.since_s, device) for device, found in devices if found.state in ("silent", "gone") and found.since_s]
    there = sum(found.state == "reporting" for _, found in devices)
    best: list[float] = []
    times = sorted(since_s for since_s, _ in away if since_s is not None)
    spread_s = SLACK_S + max((interval_s(device) or 0.0 for _, device in away), default=0.0)
    begin = 0
    for end in range(len(times)):
        while times[end] - times[begin] > spread_s:
            begin += 1
        if end - begin + 1 > len(best):
            best = times[begin : end + 1]
    if len(best) < COMMON or len(best) < COMMON_SHARE * (there + len(best)):
        return ""
    return f"{len(best)} of {len(devices)} devices left together: look for one cause (broker, network, power)"
