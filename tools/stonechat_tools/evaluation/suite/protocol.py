"""What is measured, on which windows, in which order. Every figure of models/REPORT.md is made here.

A device with one benign session is cut in the order of time: 60 % train, 20 % table and threshold, 20 % test. With
several, the first is cut 60/20/20 and the later ones are the test stream. Nothing is shuffled, nothing is tuned to a
file: the same defaults run on all.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from stonechat_tools.evaluation.suite import baselines, captures
from stonechat_tools.evaluation.suite.captures import Device
from stonechat_tools.modeling.alarm_rules import Budget, choose
from stonechat_tools.modeling.device_path import Result, to_features
from stonechat_tools.modeling.fit import DEFAULT_ALARM_RULES, FittedModel, fit, table
from stonechat_tools.modeling.options import FIT_WINDOWS, TABLE_WINDOWS
from stonechat_tools.traces.format import TraceError
from stonechat_tools.traces.trace import Trace

Ints = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float64]
Show = Callable[[str], None]
OWN = "stonechat int8"
MONTH, DAY = Budget(1, 30), Budget(1, 1)
_OVERLAY_WINDOWS = 120
_SHORT_ATTACK = 40
_SURPRISES = 40  # windows of each attack whose surprise is kept

_DAY_S = 86_400


@dataclass
class Subject:
    """One device as the suite uses it: features of each part, and attacks laid at the end of what is benign."""

    group: str
    name: str
    schema: Any
    window_ms: int
    train: Ints
    table: Ints
    rest: Ints  # the last fifth of the first session
    later: list[Ints]  # further benign sessions
    attacks: dict[str, Ints]
    pitch_s: float  # seconds from one window to the next
    overlaid: bool = False  # its attacks lie on its own last benign windows

    @property
    def test(self) -> Ints:
        """The benign windows that nothing has seen."""
        return np.concatenate(self.later) if self.later else self.rest

    def days(self, windows: int) -> float:
        return windows * self.pitch_s / _DAY_S


def subject(group: str, device: Device) -> Subject:
    """Each session that the model is made from is cut 60/20/20; the other sessions are the test stream."""
    parts: list[list[Ints]] = [[], [], []]
    for number in device.train:
        f = to_features(device.benign[number])
        a, b = int(0.6 * len(f)), int(0.8 * len(f))
        for part, rows in zip(parts, (f[:a], f[a:b], f[b:]), strict=True):
            part.append(rows)
    train, table_part, rest = (np.concatenate(part) for part in parts)
    later = [to_features(trace) for number, trace in enumerate(device.benign) if number not in device.train]
    attacks = {name: to_features(trace) for name, trace in device.attacks.items()}
    first = device.benign[device.train[0]]
    pitch = float(np.median(np.diff(first.t_s))) if len(first) > 1 else first.window_ms / 1000
    return Subject(group, device.name, first.schema, first.window_ms, train, table_part, rest, later, attacks, pitch)


def with_overlays(group: str, device: Device, malware: dict[str, Trace]) -> Subject:
    """A device whose attacks are its own test windows with real malware's traffic on top: each capture's windows that
    carry traffic, over and over for two hours, from two starts."""
    one = subject(group, device)
    one.overlaid = True
    base = device.benign[device.train[-1]]
    n = len(base)
    for name, trace in malware.items():
        active = trace.select(trace.deltas[:, 0] > 0)
        if not len(active):
            raise TraceError(f"overlay {name}: no window of it carries traffic")
        repeated = active.select(np.arange(_OVERLAY_WINDOWS) % len(active))
        for number, start in enumerate((int(0.8 * n), (int(0.8 * n) + n) // 2)):
            one.attacks[f"{name} #{number + 1}"] = to_features(captures.lay_over(base, repeated, start))
    return one


def load_manifest(path: Path, show: Show) -> dict[str, list[Subject]]:
    """The devices of a manifest; one that is too short to train on is left out, and show() says so."""
    groups: dict[str, list[Subject]] = {}
    for group, devices in captures.manifest(path).items():
        for device in devices:
            for one in [subject(group, device)] if device.attacks or not device.overlays else []:
                groups.setdefault(group, []).append(one)
            if device.overlays:
                overlaid = with_overlays(f"{group}, overlays", device, device.overlays)
                overlaid.attacks = {name: f for name, f in overlaid.attacks.items() if name not in device.attacks}
                groups.setdefault(overlaid.group, []).append(overlaid)
    return long_enough(groups, show)


def long_enough(groups: dict[str, list[Subject]], show: Show) -> dict[str, list[Subject]]:
    """The subjects that can be trained on and judged; show() names every length, and what is left out."""
    kept: dict[str, list[Subject]] = {}
    for group, subjects in groups.items():
        for one in subjects:
            lengths = f"{len(one.train)} windows to train, {len(one.table)} for the table, {len(one.test)} to judge"
            told = f"{group} {one.name}: {lengths} ({one.days(len(one.test)):.2f} days)"
            if len(one.train) < FIT_WINDOWS or len(one.table) < TABLE_WINDOWS or not len(one.rest):
                show(f"left out: {told}; at least {FIT_WINDOWS} and {TABLE_WINDOWS} are needed")
                continue
            short = [f"{name} {len(f_q8)}" for name, f_q8 in one.attacks.items() if len(f_q8) < _SHORT_ATTACK]
            show(told + (f"; attacks of fewer than {_SHORT_ATTACK} windows: {', '.join(short)}" if short else ""))
            kept.setdefault(group, []).append(one)
    return kept


def load(root: Path) -> dict[str, list[Subject]]:
    """Every set under root -> its subjects."""
    malware = captures.malware_windows(root)
    groups = {
        "pi3-malware": [subject("pi3-malware", device) for device in captures.pi3_malware(root)],
        "pi-spectrum": [subject("pi-spectrum", device) for device in captures.pi_spectrum(root)],
        "iot-lan": [with_overlays("iot-lan", device, malware) for device in captures.iot_lan(root)],
        "iot23": [
            with_overlays("iot23", device, malware)
            for device in captures.iot23(root)
            if not device.attacks and len(device.benign[0]) >= 500
        ],
        "ipcam": [subject("ipcam", _one_session(device)) for device in captures.ipcam(root)],
    }
    return {name: subjects for name, subjects in groups.items() if subjects}


def _one_session(device: Device) -> Device:
    """Short recordings strung together."""
    from stonechat_tools.traces.trace import join

    return Device(device.name, [join(device.benign)], device.attacks)


# ------------------------------------------------------------------------------------------------------- one detector


def auc(benign: npt.ArrayLike, attack: npt.ArrayLike) -> float:
    """The chance that an attack's window scores above a benign one."""
    b, a = np.asarray(benign, dtype=np.float64), np.asarray(attack, dtype=np.float64)
    order = np.sort(b)
    below = np.searchsorted(order, a, side="left") + np.searchsorted(order, a, side="right")
    return float(below.mean() / 2 / len(b))


def auc_interval(value: float, positives: int, negatives: int) -> tuple[float, float]:
    """95 % by Hanley and McNeil (1982), as if windows were independent; they are not, so it is the least width."""
    q1, q2 = value / (2 - value), 2 * value * value / (1 + value)
    variance = value * (1 - value) + (positives - 1) * (q1 - value**2) + (negatives - 1) * (q2 - value**2)
    half = 1.96 * math.sqrt(max(variance, 0) / (positives * negatives))
    return max(0.0, value - half), min(1.0, value + half)


def _attack_row(benign: Floats, scores: Floats, threshold: float, alarm: int | None) -> dict[str, Any]:
    value = auc(benign, scores)
    low, high = auc_interval(value, len(scores), len(benign))
    return {
        "auc": value,
        "auc_low": low,
        "auc_high": high,
        "recall": float((scores > threshold).mean()),
        "windows": len(scores),
        "windows_to_alarm": alarm,
    }


def first_alarm(result: Result) -> int | None:
    """The number of windows up to and with the first alarm."""
    return result.alarms[0] + 1 if result.alarms else None


def make_model(one: Subject, train: Ints | None = None, **options: Any) -> FittedModel:
    return fit(one.train if train is None else train, one.schema, one.window_ms, calibration=one.table, **options)


def own_figures(one: Subject, model: FittedModel) -> tuple[dict[str, Any], dict[str, Result]]:
    """stonechat on one device: its living state through table, rest and later windows, then each attack from there."""
    replay = model.replay()
    threshold = float(np.quantile(replay.run(one.table).score_q8, 0.99))
    streams = {"rest": replay.run(one.rest)}
    for number, part in enumerate(one.later):
        streams[f"later {number + 1}"] = replay.run(part)
    test = [result for name, result in streams.items() if name != "rest"] or [streams["rest"]]
    floor = model.meta.knots[0][0]  # where the table begins: what scores less is not ranked, for the device neither
    lived = np.concatenate([result.score_q8 for result in test]).astype(np.float64)
    benign = np.maximum(floor, lived)
    attacks = {}
    for name, f_q8 in one.attacks.items():
        # an overlay lies on the rest itself, so its living state is that before the rest
        state = model.replay() if one.overlaid else replay
        if one.overlaid:
            state.run(one.table)
        result = state.calm(steady=False).run(f_q8)
        streams[name] = result
        scores = np.maximum(floor, result.score_q8).astype(np.float64)
        attacks[name] = _attack_row(benign, scores, max(threshold, floor), first_alarm(result))
        attacks[name]["surprise"] = [round(value / 256, 2) for value in result.surprise_q8[:_SURPRISES].tolist()]
    benign_results = [result for name, result in streams.items() if name not in attacks]
    windows = sum(map(len, benign_results))
    peak = max(int(result.evidence_q8.max()) for result in benign_results) / 256
    figures = {
        "fpr": float((lived > threshold).mean()),
        "attacks": attacks,
        "alarms": sum(len(result.alarms) for result in benign_results),
        "alarm_share": sum(result.alarm_windows for result in benign_results) / windows,
        "device_days": one.days(windows),
        "evidence_peak": peak,
        "drift_at_bound": float((np.abs(replay.drift) >= (model.meta.drift_cap << model.meta.drift_shift)).mean()),
    }
    return figures, streams


def peer_figures(one: Subject, name: str, seed: int) -> dict[str, Any]:
    """A peer on the same windows, and the same evidence logic behind its score, so that only detectors are compared."""
    model = baselines.make(name, seed)
    model.fit(one.train / 256)
    in_training, in_table = model.score(one.train / 256), model.score(one.table / 256)
    threshold = float(np.quantile(in_table, 0.99))
    curve = _peer_table([in_training, in_table])
    benign_parts = [model.score(part / 256) for part in [one.rest, *one.later]]
    benign = np.concatenate(benign_parts[1:]) if one.later else benign_parts[0]
    attacks = {}
    for attack, f_q8 in one.attacks.items():
        scores = model.score(f_q8 / 256)
        alarms, _ = _evidence_alarms(curve(scores))
        attacks[attack] = _attack_row(benign, scores, threshold, alarms[0] + 1 if alarms else None)
    heard = [_evidence_alarms(curve(part)) for part in benign_parts]
    return {
        "fpr": float((benign > threshold).mean()),
        "attacks": attacks,
        "alarms": sum(len(alarms) for alarms, _ in heard),
        "alarm_share": sum(windows for _, windows in heard) / sum(map(len, benign_parts)),
        "device_days": one.days(sum(len(part) for part in benign_parts)),
    }


def _peer_table(parts: Sequence[Floats]) -> Callable[[Floats], Ints]:
    """A surprise for a peer's score, by the same table and tail over its log score."""

    def log_q8(scores: Floats) -> Ints:
        out: Ints = np.rint(256 * np.log2(np.maximum(scores, 1e-9)) + 8000).astype(np.int64)
        return out

    knots, tail_q8 = table([np.sort(log_q8(part)) for part in parts], 0)
    at, surprise = [knot[0] for knot in knots], [knot[1] for knot in knots]

    def look_up(scores: Floats) -> Ints:
        s = log_q8(scores)
        inside = np.interp(s, at, surprise)
        beyond = surprise[-1] + (s - at[-1]) * tail_q8 / 256
        out: Ints = np.where(s > at[-1], np.minimum(4096, beyond), inside).astype(np.int64)
        return out

    return look_up


def _evidence_alarms(surprise_q8: Ints) -> tuple[list[int], int]:
    """The default alarm rules over a peer's surprise -> the windows at which the level became alarm, and how many
    windows it was in alarm."""
    evidence = [0] * len(DEFAULT_ALARM_RULES)
    alarms, ringing, windows = [], False, 0
    for i, surprise in enumerate(surprise_q8.tolist()):
        share = 0.0
        for j, (k, cap, alarm) in enumerate(DEFAULT_ALARM_RULES):
            evidence[j] = min(max(0, evidence[j] + min(surprise, cap) - k), alarm + alarm // 2)
            share = max(share, evidence[j] / alarm)
        if share >= 1 and not ringing:
            ringing = True
            alarms.append(i)
        elif share < 0.25:
            ringing = False
        windows += ringing
    return alarms, windows


# --------------------------------------------------------------------------------------------------------- the suite


def compare(
    groups: dict[str, list[Subject]], seeds: int, show: Show, earlier: dict[str, Any] | None = None
) -> dict[str, Any]:
    """Every detector on every device: medians over the seeds where a seed plays a part. earlier: a comparison from
    which the peers' figures are taken, where it has the device."""
    out: dict[str, Any] = {}
    for group, subjects in groups.items():
        for one in subjects:
            show(f"{group} {one.name}")
            row = {OWN: own_figures(one, make_model(one))[0]}
            known = (earlier or {}).get(group, {}).get(one.name)
            if known:
                out.setdefault(group, {})[one.name] = known | row
                continue
            for name, seeded in baselines.PEERS.items():
                show(f"{group} {one.name}: {name}")
                runs = [peer_figures(one, name, seed) for seed in range(seeds if seeded else 1)]
                row[name] = _median(runs)
            out.setdefault(group, {})[one.name] = row
    return out


def _median(runs: list[dict[str, Any]]) -> dict[str, Any]:
    """The median of each figure of several runs of the same shape; None counts as never."""
    first = runs[0]
    out: dict[str, Any] = {}
    for key, value in first.items():
        values = [run[key] for run in runs]
        if isinstance(value, dict):
            out[key] = _median(values)
        else:
            middle = float(np.median([math.inf if one is None else one for one in values]))
            out[key] = None if math.isinf(middle) else middle
    return out


def budgets(groups: dict[str, list[Subject]], show: Show) -> list[dict[str, Any]]:
    """calibrate on a later recording, then count on what is later still: the first half of the later session where
    there is one (of the rest otherwise) chooses the alarm rule, the second half and the attacks judge it."""
    rows = []
    for group, subjects in groups.items():
        for one in subjects:
            show(f"budget: {group} {one.name}")
            for budget in (MONTH, DAY):
                rows.append(_budget_row(one, budget))
    return rows


def _budget_row(one: Subject, budget: Budget) -> dict[str, Any]:
    model = make_model(one)
    replay = model.replay()
    replay.run(one.table)
    if one.later:
        replay.run(one.rest)
    stream = one.test
    half = len(stream) // 2
    seen = replay.run(stream[:half])
    choice = choose([seen.surprise_q8], round(one.pitch_s * 1000), budget)
    model.meta.alarm_rules = choice.alarm_rules
    after = replay.calm()
    judged = after.run(stream[half:])
    to_alarm = [first_alarm(after.calm().run(f_q8)) for f_q8 in one.attacks.values()] if one.later else []
    days = one.days(len(stream) - half)
    return {
        "group": one.group,
        "device": one.name,
        "budget": str(budget),
        "alarm_rule": choice.rule,
        "calibrated_days": one.days(half),
        "judged_days": days,
        "alarms": len(judged.alarms),
        "allowed": 3 * budget.per_day * days,
        "bound_per_30d": choice.bound_per_30d,
        "proven": choice.proven,
        "attack_windows": to_alarm,
    }
