"""The generated card of a model: its data, the command that made it, its figures and its limits."""

from collections.abc import Sequence
from typing import Any

from stonechat.model import load_model

from ..traces.trace import Trace
from .training import Trained

_GENERAL_LIMITS = (
    "It was measured on its own recordings' later parts; your devices differ. Record them, train, and calibrate.",
    "The rate of false alarms is bounded by how long the held-out recording is, not by how silent it was.",
)


def card(
    name: str, version: int, trained: Trained, trace: Trace, command: str, summary: str = "", limits: Sequence[str] = ()
) -> str:
    """-> the Markdown text."""
    figures = trained.figures
    meta = load_model(trained.data).metadata
    lines = [f"# {name} (version {version})", ""]
    lines += [summary, ""] if summary else []
    lines += ["Generated; edit the recipe, not this page. Made by", "", f"    {command}", ""]
    lines += ["## The model", ""]
    lines += _table(
        [
            ("schema", f"`{trace.schema.name}`, {len(trace.schema)} features, id `{trace.schema.id.hex()}`"),
            ("window", f"{trace.window_ms / 1000:g} s"),
            (
                "network",
                f"autoencoder {len(meta)}-{figures['units']}-{len(meta)}, int8, {trained.provenance['backend']}",
            ),
            ("file", f"{figures['file_bytes']} bytes, {figures['macs']} multiply-accumulates a window"),
            ("digest", f"`{figures['digest']}`"),
            ("learns on the device", _learning(meta.learn_windows, trace.window_ms)),
            ("alarm rules (allowance, cap, threshold)", "; ".join(_rule(rule) for rule in meta.alarm_rules)),
            ("quickest alarm", f"{min(_windows_to_alarm(rule) for rule in meta.alarm_rules)} windows"),
        ]
    )
    lines += ["", "## Data", ""]
    lines += _data(trained, trace)
    lines += ["", "## Figures", ""]
    lines += _figures(trained)
    lines += ["", "## Limits", ""]
    lines += [f"- {limit}" for limit in (*limits, *_GENERAL_LIMITS)]
    lines += ["", "## Provenance", ""]
    lines += _provenance(trained)
    return "\n".join(lines) + "\n"


def _table(rows: Sequence[tuple[str, str]]) -> list[str]:
    return ["| | |", "|---|---|", *[f"| {key} | {value} |" for key, value in rows]]


def _rule(rule: tuple[int, int, int]) -> str:
    return "(" + ", ".join(f"{value / 256:g}" for value in rule) + ")"


def _windows_to_alarm(rule: tuple[int, int, int]) -> int:
    k, cap, alarm = rule
    return -(-alarm // (cap - k))


def _learning(windows: int, window_ms: int) -> str:
    return (
        f"{windows} windows ({windows * window_ms / 60_000:.1f} minutes) before it may alarm" if windows else "nothing"
    )


def _data(trained: Trained, trace: Trace) -> list[str]:
    figures = trained.figures
    hours = float(trace.elapsed_ms[trace.benign].sum()) / 3.6e6
    devices = trained.provenance["devices"]
    lines = [
        f"{int(trace.benign.sum())} benign windows, {hours:.2f} device-hours, of {len(devices)} "
        f"device{'s' if len(devices) != 1 else ''}: "
        + ", ".join(f"{name} {count}" for name, count in devices.items())
        + ".",
        "Each device's windows were cut in the order of time: 60 % for the network, 20 % for the calibration table, "
        "20 % held out.",
    ]
    if figures["excluded_attack_windows"]:
        lines.append(f"{figures['excluded_attack_windows']} windows labelled as attacks were left out.")
    if figures["left_out_windows"]:
        conditions = ", ".join(trained.provenance["options"]["leave_out"])
        lines.append(f"{figures['left_out_windows']} windows were left out by the condition {conditions}.")
    if figures["borrowed_windows"]:
        options = trained.provenance["options"]
        busy = ", ".join(options["busy"])
        lines.append(
            f"In {figures['borrowed_windows']} of them other jobs kept the machine busy ({busy}); "
            f"there {', '.join(options['machine_columns'])} come from a random quiet window."
        )
    lines += [f"{key}: {value}." for key, value in sorted(trace.notes.items())]
    return lines


def _figures(trained: Trained) -> list[str]:
    figures = trained.figures
    bound = figures["alarms_per_30_days_at_most_95"]
    lines = [
        "Held-out windows through the device's own integer path, learning and drift included:",
        "",
        "| device | windows | alarms | windows with p < .01 | peak of the evidence (1 is the threshold) |",
        "|---|---|---|---|---|",
    ]
    for name, row in figures["held_out"].items():
        lines.append(
            f"| {name} | {row['windows']} | {row['alarms']} | {row['p_below_01']:.2%} | {row['evidence_peak']:.2f} |"
        )
    lines += [
        "",
        f"Together {figures['held_out_alarms']} alarms in {figures['held_out_device_days']:g} device-days, which "
        f"bounds the rate at {bound} per 30 device-days (95 %, one-sided). Alarm constants: {figures['budget']}.",
        "",
        "Candidates, by the share of injected anomalies (one or three features moved by 3 deviations) scored above "
        "99 % of the benign windows; the best one was kept:",
        "",
        "| bottleneck | seed | found |",
        "|---|---|---|",
    ]
    return lines + [f"| {row['units']} | {row['seed']} | {row['injected_found']:.1%} |" for row in figures["tried"]]


def _provenance(trained: Trained) -> list[str]:
    provenance: dict[str, Any] = trained.provenance
    lines = [f"stonechat {provenance['stonechat']}, numpy {provenance['numpy']}. Recordings (SHA-256):", ""]
    lines += [f"- `{name}` {digest}" for name, digest in provenance["recordings"].items()]
    lines += ["", "Options: " + ", ".join(f"{key} = {value}" for key, value in provenance["options"].items()) + "."]
    return lines
