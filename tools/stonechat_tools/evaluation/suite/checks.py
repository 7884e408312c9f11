"""What had to be shown, and whether it is: the first table of the suite's page."""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from stonechat_tools.evaluation.suite.baselines import PEERS
from stonechat_tools.evaluation.suite.losses import unexplained
from stonechat_tools.evaluation.suite.protocol import OWN
from stonechat_tools.evaluation.suite.tables import number, whole

AS_FAST = 3  # windows


def checks(figures: dict[str, Any]) -> list[tuple[str, str, bool]]:
    """What had to be shown: (requirement, what came out, met)."""
    rows: list[tuple[str, str, bool]] = []
    comparison = figures["comparison"]
    for device in comparison.get("pi3-malware", {}).values():
        own, rival = device[OWN], device["Mahalanobis"]
        loud = {name: row for name, row in own["attacks"].items() if "idle" not in name}
        worst_auc = min(row["auc"] for row in loud.values())
        worst_recall = min(row["recall"] for row in loud.values())
        rows.append(
            (
                "pi3-malware: AUC and recall at least .99 at FPR at most .02 (all but the idle backdoor)",
                f"AUC {number(worst_auc)}, recall {number(worst_recall)} at FPR {number(own['fpr'])}",
                worst_auc >= 0.99 and worst_recall >= 0.99 and own["fpr"] <= 0.02,
            )
        )
        for name, row in own["attacks"].items():
            if "idle" in name:
                text = f"AUC {number(row['auc'])}; Mahalanobis {number(rival['attacks'][name]['auc'])} here"
                rows.append(("pi3-malware: the idle backdoor, no target", text, True))
    for device in comparison.get("pi3-malware", {}).values():
        waits = [row["windows_to_alarm"] for row in device[OWN]["attacks"].values()]
        text = ", ".join(whole(wait) for wait in waits)
        soon = sum(wait is not None and wait <= 25 for wait in waits)
        rows.append(("pi3-malware: three attacks alarmed within 25 windows", f"{soon}: in {text}", soon >= 3))
    if {"pi3-malware", "pi-spectrum", "iot-lan"} <= set(comparison):
        total = figures["alarms"][OWN]
        text = f"{total['alarms']:.0f} in {total['device_days']:.1f} device-days"
        asked = "every benign window outside training and calibration: at most one alarm"
        rows.append((asked, text, total["alarms"] <= 1))
    for group, limit, outages in (("pi-spectrum", 30.0, 1), ("iot-lan", 30.0, 0)):
        devices = comparison.get(group, {})
        if not devices:
            continue
        owns = [device[OWN] for device in devices.values()]
        alarms, days = sum(one["alarms"] for one in owns), sum(one["device_days"] for one in owns)
        share = sum(one["alarm_share"] * one["device_days"] for one in owns) / days
        asked = "no alarm" if not outages else "at most one alarm (an outage), which ends by itself,"
        text = f"{alarms:.0f} in {days:.1f} device-days, {100 * share:.2f} % of the time in alarm"
        rows.append((f"{group}: {asked} on benign days", text, alarms <= outages and share <= 0.02))
        waits = [row["windows_to_alarm"] for one in owns for row in one["attacks"].values()]
        seen = [wait for wait in waits if wait is not None]
        slowness = float(np.median([math.inf if wait is None else wait for wait in waits])) if waits else math.inf
        text = f"{len(seen)} of {len(waits)}, in {min(seen, default=0):.0f} to {max(seen, default=0):.0f} windows, "
        text += f"median {slowness:.0f}"
        met = len(seen) == len(waits) and max(seen, default=0) <= limit and slowness <= 25
        rows.append((f"{group}: every attack alarmed within {limit:.0f} windows, median at most 25", text, met))
        if group == "pi-spectrum":
            earned = {budget: _earned(figures, group, budget) for budget in ("1/30d", "1/1d")}
            text = f"{earned['1/30d']} for a budget of one alarm in 30 days, {earned['1/1d']} for one a day"
            asked = f"{group}: attacks alarmed in 25 windows by the rules that the devices earn"
            rows.append((asked, f"{text}, of {len(waits)}", earned["1/30d"] == len(waits)))
        else:
            recall = float(np.mean([row["recall"] for one in owns for row in one["attacks"].values()]))
            rows.append((f"{group}: window recall at least .95", number(recall), recall >= 0.95))
    ramps = figures["ramps"]
    if ramps:
        late = {length: [row[length] for row in ramps] for length in ("1000", "4000")}
        worst = {length: None if None in values else max(values) for length, values in late.items()}
        met = worst["1000"] is not None and worst["1000"] <= 1000
        rows.append(("ramp over 1,000 windows: alarm by 1,000", f"latest after {whole(worst['1000'])}", met))
        met = worst["4000"] is not None and worst["4000"] <= 3500
        rows.append(("ramp over 4,000 windows: alarm by 3,500", f"latest after {whole(worst['4000'])}", met))
    if figures["starts"]:
        ranges = [of_median(row["scale"]) for row in figures["starts"]]
        low, high = min(pair[0] for pair in ranges), max(pair[1] for pair in ranges)
        asked = "twelve starts of a fresh device: learned scale within x.85 to x1.25 of the median"
        rows.append((asked, f"x{number(low, 2)} to x{high:.2f}", low >= 0.85 and high <= 1.25))
        missed = 0
        for row in figures["starts"]:
            for each in row["attacks"].values():
                ordered = sorted(math.inf if wait is None else wait for wait in each)
                missed += sum(wait == math.inf for wait in ordered) if upper_middle(ordered) < math.inf else 0
        rows.append(("twelve starts: no attack missed that the median start finds", f"{missed} missed", not missed))
    if figures["steady"]:
        changes = [row for row in figures["steady"] if row["alarms"]]
        share = max((row["alarm_share"] for row in changes), default=1.0)
        own = {name: row[OWN]["alarms"] for name, row in comparison.get("pi-spectrum", {}).items()}
        changes = [
            row for row in changes if row["steady_share"] > 0.1
        ]  # else it is as in the recording, or below a rule
        more = [row["alarms"] - own.get(row["device"], 0) for row in changes]
        met = all(count <= 1 for count in more) and share <= 0.02
        text = f"{sum(more):.0f} alarms in {len(changes)} streams (beside those in the recordings as they are), "
        text += f"{100 * share:.2f} % in alarm"
        asked = "gap of days and a feature 3 sd up for good: one alarm, then changed and steady, at most 2 % in alarm"
        rows.append((asked, f"{text} at most", met and bool(changes)))
        slower = sum(found_later(wait, row["without"][name]) for row in changes for name, wait in row["on_top"].items())
        total = sum(len(row["on_top"]) for row in changes)
        asked = f"an attack on top of it: found as fast as without (within {AS_FAST} windows)"
        rows.append((asked, f"{total - slower} of {total}", not slower))
    unknown = unexplained(figures, tuple(PEERS))
    rows.append(("every loss against a peer has a reason", f"{unknown} without", not unknown))
    daily = [row for row in figures["budgets"] if row["budget"] == "1/1d"]
    if daily:
        over = [row for row in daily if row["alarms"] > max(row["allowed"], 0)]
        total, days = sum(row["alarms"] for row in daily), sum(row["judged_days"] for row in daily)
        text = f"{total} alarms in {days:.1f} judged device-days; over three times the budget: {len(over)} streams"
        rows.append(("budget of one a day: at most three times that on every benign stream", text, not over))
    losses = [row["float"] - row["int8"] for row in figures["float"] if "idle" not in row["attack"]]
    if losses:
        text = f"greatest loss {number(max(losses), 4)} (without the idle backdoor, which is near chance)"
        rows.append(("int8 against its own float: AUC loss at most .002", text, max(losses) <= 0.002))
    spoiled = [row for row in figures["contamination"] if "idle" not in row["attack"]]
    for key, clean, what in (
        ("trimmed", "clean", "2 % contaminated"),
        ("trimmed_more", "trimmed_more_clean", "up to 5 % contaminated, no target"),
    ):
        lost = [row[clean] - row[key] for row in spoiled]
        if lost:
            over = sum(one > 0.01 for one in lost)
            middle = number(float(np.median(lost)))
            text = f"median {middle}, greatest {number(max(lost))}; over .01: {over} of {len(lost)} attacks"
            rows.append((f"{what}, blocks trimmed: at most .01 AUC lost", text, key != "trimmed" or not over))
    named = figures["explanation"]
    if named:
        few = [row for row in named if row["top_three"] < 0.97]
        lost_too = [row for row in few if row["mahalanobis"] < 0.97]
        median = number(float(np.median([row["top_three"] for row in named])))
        text = f"median {median}; below .97: {len(few)} of {len(named)} devices"
        if few:
            least = min(few, key=lambda row: float(row["top_three"]))
            text += f", least {number(least['top_three'])}, where Mahalanobis has {number(least['mahalanobis'])}"
        asked = "explanation: injected feature in the top three in .97, wherever Mahalanobis's is"
        rows.append((asked, text, len(few) == len(lost_too)))
    return rows


def _earned(figures: dict[str, Any], group: str, budget: str) -> int:
    """How many attacks alarm within 25 windows on the alarm rules that calibrate gave the group's devices."""
    rows = [row for row in figures["budgets"] if row["group"] == group and row["budget"] == budget]
    return sum(wait is not None and wait <= 25 for row in rows for wait in row["attack_windows"])


def found_later(wait: int | None, without: int | None) -> bool:
    return without is not None and (wait is None or wait > without + AS_FAST)


def of_median(scales: Sequence[float]) -> tuple[float, float]:
    """The least and the greatest, against the median."""
    middle = float(np.median(scales))
    return min(scales) / middle, max(scales) / middle


def upper_middle(ordered: Sequence[float]) -> float:
    return ordered[len(ordered) // 2]
