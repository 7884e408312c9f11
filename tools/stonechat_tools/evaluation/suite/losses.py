"""Why a peer was better somewhere: one line for each attack that it separates better or that it alarms on sooner, and
the surprise by window of the attacks that alarm late. What the figures do not say by themselves is in NOTES."""

import math
from collections.abc import Sequence
from typing import Any

from stonechat_tools.evaluation.suite.protocol import OWN
from stonechat_tools.evaluation.suite.tables import grid, number, whole

TIE = 0.005  # AUC: closer than this is called a tie
SLOW = 25  # windows: an attack that alarms later is listed with its surprise by window
_LOUD = 2.0  # surprise of the windows that the faster of the default rules needs, 20 in a row
_ALARM_SHARE = 0.005

NOTES = {
    ("iot-lan", "hichip_battery_camera"): (
        "a tenth of the camera's own calibration windows are bursts with one and the same score, and the malware's "
        "windows lie only .3 to .5 doublings above it. Every detector's table is made from these bursts; the peer's "
        "score puts more distance between them and the malware, and less elsewhere"
    ),
}


_UNKNOWN = "not known"


def unexplained(figures: dict[str, Any], peers: Sequence[str]) -> int:
    """How many losses the figures and NOTES give no reason for."""
    return sum(row[-1] == _UNKNOWN for row in _rows(figures, peers))


def losses(figures: dict[str, Any], peers: Sequence[str]) -> list[str]:
    rows = _rows(figures, peers)
    head = ("attack", "against", "AUC", "windows to the alarm", "why")
    notes = [f"{device}: {text}.\n" for (group, device), text in NOTES.items() if device in str(rows)]
    return ["### Every loss", "", *grid(head, rows), *notes] if rows else []


def _rows(figures: dict[str, Any], peers: Sequence[str]) -> list[tuple[str, ...]]:
    rows: list[tuple[str, ...]] = []
    for group, devices in figures["comparison"].items():
        for device, row in devices.items():
            for attack, own in row[OWN]["attacks"].items():
                for peer in peers:
                    why = _why(group, device, row, own, peer, row[peer]["attacks"][attack])
                    if why:
                        rows.append((f"{device}: {attack}", peer, *why))
    return rows


def _why(
    group: str, device: str, row: dict[str, Any], own: dict[str, Any], peer: str, other: dict[str, Any]
) -> tuple[str, str, str] | None:
    """-> both AUCs, both times to the alarm and the reason; None where the peer was not better."""
    worse = own["auc"] < other["auc"] - TIE
    wait = own["windows_to_alarm"]
    later = (wait or math.inf) > (other["windows_to_alarm"] or math.inf)
    if not worse and not later:
        return None
    reasons = []
    if worse and own["auc_high"] >= other["auc_low"]:
        reasons.append(
            f"chance: {own['windows']:.0f} windows, the intervals overlap ({number(own['auc_low'])} to "
            f"{number(own['auc_high'])}, {number(other['auc_low'])} to {number(other['auc_high'])})"
        )
    theirs, ours = row[peer], row[OWN]
    if later and (theirs["alarms"] > ours["alarms"] or theirs["alarm_share"] > ours["alarm_share"] + _ALARM_SHARE):
        share = f"{100 * theirs['alarm_share']:.1f} %"
        reasons.append(f"it has {theirs['alarms']:.0f} false alarms, {share} of the time, against {ours['alarms']:.0f}")
    faint = [value for value in own.get("surprise", [])[: int(wait or 0)] if value < _LOUD]
    if later and wait and faint:
        reasons.append(f"{len(faint)} of the first {wait:.0f} windows have a surprise below 2 (least {min(faint):.2f})")
    note = NOTES.get((group, device))
    if note and (later or not reasons):
        reasons.append("see the note below")
    waits = f"{whole(wait)} against {whole(other['windows_to_alarm'])}"
    return f"{number(own['auc'])} against {number(other['auc'])}", waits, "; ".join(reasons) or _UNKNOWN


def slow_attacks(figures: dict[str, Any], groups: Sequence[str] = ("pi-spectrum", "iot-lan")) -> list[str]:
    """The attacks that alarm after more than SLOW windows, with the surprise of each window up to the alarm."""
    rows = []
    for group in groups:
        for device, row in figures["comparison"].get(group, {}).items():
            for attack, own in row[OWN]["attacks"].items():
                wait = own["windows_to_alarm"]
                if wait is not None and wait > SLOW and own.get("surprise"):
                    each = " ".join(number(value, 1) for value in own["surprise"][: int(wait)])
                    rows.append((device, attack, whole(wait), each))
    text = f"Attacks that alarm after more than {SLOW} windows, with the surprise of each window until then:"
    return [text, "", *grid(("device", "attack", "windows", "surprise by window"), rows)] if rows else []
