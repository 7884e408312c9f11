"""The sections of the suite's page about further measurements: ramps, fresh devices, steady changes, contamination."""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from stonechat_tools.evaluation.suite.checks import found_later, of_median, upper_middle
from stonechat_tools.evaluation.suite.tables import grid, number, whole


def ramps(figures: dict[str, Any]) -> list[str]:
    rows = [
        (row["device"], row["attack"], whole(row["1000"]), whole(row["4000"]), number(row["largest_unseen"], 3))
        for row in figures["ramps"]
    ]
    text = (
        "An attack that grows feature by feature from nothing to its full strength over 1,000 or 4,000 windows of a "
        "later benign stream: the window of the alarm. Last column: the share of the attack (in eighths) that can be "
        "walked to over 2,000 windows, stay for 2,000 more and never alarm. That is what lies inside the adaptation's "
        "bound of half a deviation, and what this detector does not see."
    )
    head = ("device", "attack", "ramp 1,000", "ramp 4,000", "largest unseen share")
    return ["## Slow ramps: the adaptation can't be exploited", "", text, "", *grid(head, rows)]


def fresh(figures: dict[str, Any]) -> list[str]:
    rows = []
    for row in figures["fresh"]:
        waits = [f"{name} {whole(wait)}" for name, wait in row["attacks"].items()]
        rows.append((row["device"], f"{row['alarms']} in {row['device_days']:.2f}", ", ".join(waits)))
    text = (
        "A device that begins its life in the later session: it takes its own centres and score from its first 128 "
        "windows, then watches. The windows to the alarm of each attack:"
    )
    return ["## A fresh device", "", text, "", *grid(("device", "false alarms in days", "attacks"), rows)]


def starts(figures: dict[str, Any]) -> list[str]:
    if not figures["starts"]:
        return []
    scales, waits = [], []
    for row in figures["starts"]:
        least, median, most = (f"{value:.2f}" for value in np.quantile(row["scale"], [0, 0.5, 1]))
        low, high = of_median(row["scale"])
        places = sorted(row["location"])
        where = f"{places[0]:+.2f} to {places[-1]:+.2f}"
        scales.append((row["device"], f"{least}, {median}, {most}", f"x{low:.2f} to x{high:.2f}", where))
        for attack, each in row["attacks"].items():
            ordered = sorted(math.inf if wait is None else wait for wait in each)
            found = sum(wait < math.inf for wait in ordered)
            shown = [
                whole(None if math.isinf(wait) else wait) for wait in (ordered[0], upper_middle(ordered), ordered[-1])
            ]
            waits.append((row["device"], attack, f"{found} of {len(each)}", *shown))
    text = (
        "One device that begins its life at twelve times of the later session, and learns from 128 windows each time. "
        "The scale of its score (here against the model's) says how surprising a window is. It comes from 64 windows; "
        "so it is the model's, moved a quarter of the way to the device's own and by x.94 to x1.1 at most, "
        "unless the device's own windows would come near an alarm. The device's own scale alone was between x.74 and "
        "x1.84 of the median, and missed `freeze` and `repeat` from some starts. The location is in doublings of the "
        "score, against the model's."
    )
    head = ("device", "scale: least, median, greatest", "against the median start", "location")
    then = "Windows to the alarm, over the starts:"
    return [
        "## Twelve starts of a fresh device",
        "",
        text,
        "",
        *grid(head, scales),
        then,
        "",
        *grid(("device", "attack", "found", "soonest", "median", "latest"), waits),
    ]


def steady(figures: dict[str, Any]) -> list[str]:
    if not figures["steady"]:
        return []
    rows, gains = [], []
    for row in figures["steady"]:
        waits = [(row["without"][name], wait) for name, wait in row["on_top"].items()]
        later = [name for name, wait in row["on_top"].items() if found_later(wait, row["without"][name])]
        both = [f"{whole(_slowest(waits, i))}" for i in range(2)]
        rows.append(
            (
                row["device"],
                row["feature"],
                f"{row['alarms']}",
                f"{100 * row['alarm_share']:.2f} %",
                f"{100 * row['steady_share']:.1f} %",
                " and ".join(both),
                ", ".join(f"{n} {whole(row['without'][n])} to {whole(row['on_top'][n])}" for n in later) or "-",
            )
        )
    for row in figures["steady_attacks"]:
        others = row["others"]
        found = "-"
        if others is not None:
            waits = [wait for wait in others.values() if wait is not None]
            missed = [name for name, wait in others.items() if wait is None]
            found = f"{len(waits)} of {len(others)}, in {min(waits, default=0)} to {max(waits, default=0)} windows"
            found += f"; not {', '.join(missed)}" if missed else ""
        gains.append((row["device"], row["attack"], whole(row["windows_to_alarm"]), whole(row["steady_after"]), found))
    text = (
        "The later session, which begins days after the first, with one feature raised by three deviations for good: "
        "one alarm, and after an hour (64 windows) of it the state changed and steady. Then each attack on top of it."
    )
    head = (
        "device",
        "feature raised",
        "alarms",
        "time in alarm",
        "time steady",
        "slowest attack without and with the change",
        "attacks found later",
    )
    then = (
        "What an attacker gains: each attack, over and over for eight hours. Where it is constant, it becomes steady, "
        "after an alarm of an hour; another attack in its place is then found as follows."
    )
    return [
        "## An alarm that does not end",
        "",
        text,
        "",
        *grid(head, rows),
        then,
        "",
        *grid(("device", "attack", "windows to the alarm", "steady after", "other attacks from there"), gains),
    ]


def _slowest(waits: Sequence[tuple[int | None, int | None]], column: int) -> int | None:
    """The slowest of those found both ways."""
    return max((pair[column] or 0 for pair in waits if None not in pair), default=None)


def unseen(figures: dict[str, Any]) -> list[str]:
    rows = []
    for row in figures["unseen"]:
        waits = list(row["attacks"].values())
        seen = [wait for wait in waits if wait is not None]
        wait = f", in {min(seen):.0f}-{max(seen):.0f} windows" if seen else ""
        rows.append(
            (row["device"], f"{row['alarms']} in {row['device_days']:.2f}", f"{len(seen)} of {len(waits)}{wait}")
        )
    text = (
        "One model fitted on all home devices but one, on the one left out: it learns for 128 windows, then watches "
        "its own benign days, then malware laid over its last fifth. One model for devices as different as a lamp "
        "and a camera is the worst case of a device class: train one per product."
    )
    head = ("device", "false alarms in days", "attacks alarmed")
    return ["## A model for a class, on a device it never saw", "", text, "", *grid(head, rows)] if rows else []


def contamination(figures: dict[str, Any]) -> list[str]:
    keys = ("clean", "trimmed_clean", "untrimmed", "trimmed", "trimmed_more")
    rows = [
        (row["device"], row["attack"], *[number(row[key]) for key in keys], number(row["trimmed_more_share"]))
        for row in figures["contamination"]
    ]
    text = (
        "AUC on the attack's remaining windows when a run of it makes 2 % of the training windows, and 5 % or as much "
        "as half the attack's recording gives (static centre). Trimming leaves out the strangest tenth of the "
        "20-window blocks, then takes back those that a model of the others finds ordinary; what it costs a clean "
        "recording is in the second column. It is an option, for recordings that may hold an attack."
    )
    head = ("device", "attack", "clean", "clean, trimmed", "2 % attack", "2 %, trimmed", "more, trimmed", "its share")
    return ["## Contaminated training data", "", text, "", *grid(head, rows)]


def explanation(figures: dict[str, Any]) -> list[str]:
    rows = [
        (row["group"], row["device"], number(row["top_three"]), number(row["mahalanobis"]))
        for row in figures["explanation"]
    ]
    text = (
        "One feature of an ordinary benign window moved by 4 deviations: how often it is among the first three named. "
        "The last column is what Mahalanobis's distance would name, in floats and with every covariance. Where it "
        "fails too, the injected feature is not the strangest of the window: a device that trained on quiet days has "
        "later windows in which several features lie farther out than 4 deviations."
    )
    head = ("set", "device", "in the top three", "Mahalanobis")
    return ["## Explanation", "", text, "", *grid(head, rows)]


def int8_loss(figures: dict[str, Any]) -> list[str]:
    rows = [
        (
            row["device"],
            row["attack"],
            number(row["int8"], 4),
            number(row["float"], 4),
            f"{row['float'] - row['int8']:+.4f}",
        )
        for row in figures["float"]
    ]
    return ["## int8 against its own float", "", *grid(("device", "attack", "int8", "float", "loss"), rows)]
