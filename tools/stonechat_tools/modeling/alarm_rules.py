"""Alarm rules, and which of them a budget of false alarms and a benign recording allow.

A recording proves a rate by its length: D silent device-days bound it at 3/D a day (95 %). The rules are nearly nested:
where a fast one is silent, so are the slower ones. So the bound also holds for the one that was chosen by its silence.
"""

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
from stonechat.errors import StonechatError

from .fit import DEFAULT_ALARM_RULES

AlarmRules = tuple[tuple[int, int, int], ...]
DAY_S = 86_400
_CONFIDENCE = 0.05


class CalibrationError(StonechatError):
    """The recording or the budget does not allow a calibration."""


@dataclass(frozen=True)
class AlarmRule:
    """Alarm rules that a device runs in parallel, and the benign windows that justify them. rules: (allowance, cap,
    threshold) each; `windows`: the fewest in which one can alarm. `needs`: later benign windows; `margin`: the greatest
    share of a threshold that their evidence may have."""

    name: str
    rules: tuple[tuple[float, float, float], ...]
    needs: int
    margin: float

    @property
    def windows(self) -> int:
        return min(math.ceil(alarm / (cap - k)) for k, cap, alarm in self.rules)

    @property
    def mean_windows(self) -> float:
        """The windows to an alarm, on average over attacks from faint to loud (_SUSTAINED)."""
        soonest = [min(alarm / (min(cap, level) - k) for k, cap, alarm in self.rules) for level in _SUSTAINED]
        return sum(map(math.ceil, soonest)) / len(soonest)

    @property
    def constants(self) -> AlarmRules:
        return tuple((round(256 * k), round(256 * cap), round(256 * alarm)) for k, cap, alarm in self.rules)


# Slowest first. Benign bursts as loud as any attack lasted up to 24 windows in the recordings that the list of alarm
# rules was made on (an access point's outage, seen from the device), so what alarms in fewer windows has to be earned
# by a recording long enough to hold such bursts if the product has them. `steady` is the default.
ALARM_RULES = (
    AlarmRule("patient", ((1.0, 1.5, 30.0),), 0, 1.0),
    AlarmRule("calm", ((1.0, 1.5, 20.0),), 0, 0.75),
    AlarmRule("steady", tuple((k / 256, cap / 256, alarm / 256) for k, cap, alarm in DEFAULT_ALARM_RULES), 0, 0.5),
    AlarmRule("brisk", ((1.0, 1.5, 11.0), (1.0, 3.0, 20.0)), 3000, 0.5),
    AlarmRule("quick", ((1.0, 2.0, 12.0),), 6000, 0.5),
    AlarmRule("eager", ((1.0, 3.0, 10.0),), 20000, 0.5),
)
# Behind it, for who asks for the fastest: no length earns these, only that the product's own benign windows stay below
# three quarters of the line.
FASTEST = (
    AlarmRule("swift", ((1.0, 3.5, 7.5),), 0, 0.75),
    AlarmRule("instant", ((1.0, 4.0, 6.0),), 0, 0.75),
)
_FASTEST_MARGIN = 0.75
_NEAR = 10.0  # a silence that proves a rate up to this many times the budget is long enough for --fastest
_SUSTAINED = (1.25, 1.5, 2.0, 3.0, 4.0)  # surprise of attacks from faint to loud, window after window


@dataclass(frozen=True)
class Budget:
    """count false alarms in days days, per device."""

    count: float
    days: float

    @property
    def per_day(self) -> float:
        return self.count / self.days

    def __str__(self) -> str:
        return f"{self.count:g}/{self.days:g}d"


def parse_budget(text: str) -> Budget:
    """'1/30d', '2/week', '1/12h' -> Budget. Raises CalibrationError."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)/(\d+(?:\.\d+)?)?(h|d|w|day|week|month)s?", text.strip())
    if not match:
        raise CalibrationError(f"budget {text!r}: want alarms per time, such as 1/30d, 2/7d or 1/12h")
    unit = {"h": 1 / 24, "d": 1.0, "day": 1.0, "w": 7.0, "week": 7.0, "month": 30.0}[match[3]]
    count, days = float(match[1]), float(match[2] or 1) * unit
    if count <= 0 or days <= 0:
        raise CalibrationError(f"budget {text!r}: both numbers must be above 0")
    return Budget(count, days)


@dataclass
class Choice:
    """The alarm rule that was taken and why. bound_per_30d: what the silence seen proves (95 %, one-sided), None where
    the windows are in_sample: the reason why they prove nothing. trained_on_known: whether the model records what
    it was trained on. shows: whether they are long enough for one alarm of the budget to be due; else `tried` holds
    what they earn, not what keeps the budget."""

    rule: str
    alarm_rules: AlarmRules
    windows_to_alarm: int
    device_days: float
    windows: int
    alarms: int
    bound_per_30d: float | None
    budget: str
    proven: bool
    fastest: bool = False
    tried: list[dict[str, Any]] = field(default_factory=list)
    alarm_share: float = 0.0
    shows: bool = True
    in_sample: str = ""
    trained_on_known: bool = True

    def sentence(self) -> str:
        seen = f"{self.alarms} alarms in {self.device_days:.1f} benign device-days"
        if self.alarms:
            seen += f", {100 * self.alarm_share:.1f} % of the time in alarm"
        why = ", the soonest of those that stayed silent" if self.fastest else ""
        if any(rule.name == self.rule and rule.constants != self.alarm_rules for rule in ALARM_RULES):
            why += ", its threshold raised above the evidence seen"
        return f"alarm rule {self.rule}{why}: {self.windows_to_alarm} windows to an alarm; {seen}{self._claim()}"

    def _claim(self) -> str:
        if self.bound_per_30d is None:
            return f", in-sample, which proves nothing about later days: {self.in_sample}"
        bound = f": at most {self.bound_per_30d:.1f} per 30 days (95 %)"
        if not self.proven:
            return f"{bound}, which is too short to prove the budget"
        if not self.trained_on_known:
            return f"{bound}, which proves the budget if the model was not trained on this recording; it does not say"
        return f"{bound}, which proves the budget"

    def void(self, reason: str) -> None:
        """The windows are in-sample: take back what their silence would prove."""
        self.in_sample = f"{self.in_sample}; {reason}" if self.in_sample else reason
        self.bound_per_30d, self.proven = None, False


def poisson_bound(count: int) -> float:
    """The one-sided 95 % upper bound of a Poisson mean of which `count` were seen (0 -> 3.0)."""
    low, high = float(count), 10.0 + 3.0 * count
    for _ in range(60):
        mean = (low + high) / 2
        seen = sum(math.exp(-mean + k * math.log(mean) - math.lgamma(k + 1)) for k in range(count + 1))
        low, high = (mean, high) if seen > _CONFIDENCE else (low, mean)
    return (low + high) / 2


def excursions(surprise_q8: npt.ArrayLike, constants: tuple[int, int, int]) -> list[int]:
    """The peaks of the evidence between two zeros, without a threshold: the rate of alarms follows from them."""
    k, cap, _ = constants
    peaks: list[int] = []
    e = peak = 0
    for step in (np.minimum(np.asarray(surprise_q8, dtype=np.int64), cap) - k).tolist():
        e = max(0, e + step)
        peak = max(peak, e)
        if not e and peak:
            peaks.append(peak)
            peak = 0
    return [*peaks, peak] if peak else peaks


def rate_above(peaks: Sequence[int], line: float, days: float) -> float:
    """Excursions above `line` a day: counted where there are enough, and beyond by an exponential tail of the highest
    tenth of the peaks (at least five)."""
    if not peaks:
        return 0.0
    ordered = np.sort(np.asarray(peaks, dtype=np.float64))[::-1]
    count = int((ordered >= line).sum())
    if count >= 5 or len(ordered) < 6:
        return count / days
    top = max(5, len(ordered) // 10)
    start = ordered[min(top, len(ordered) - 1)]
    mean = max(float((ordered[:top] - start).mean()), 1.0)
    return max(count, top * math.exp(-max(0.0, line - start) / mean)) / days


def choose(
    streams: Sequence[npt.ArrayLike],
    window_ms: int,
    budget: Budget,
    rules: Sequence[AlarmRule] = ALARM_RULES,
    fastest: bool = False,
) -> Choice:
    """streams: the surprise_q8 of each device's later benign windows -> the fastest alarm rule that keeps the budget.

    Where the streams are long enough to show the budget (at least one alarm would be due), the rate of excursions
    above the alarm rule's threshold decides; where they are not, the alarm rule's own conditions do. fastest: of the
    list of alarm rules and of FASTEST, the one that alarms soonest over attacks from faint to loud, of those whose
    evidence stays at or below three quarters of the threshold. Raises CalibrationError where there is none, or where
    the streams are too short to prove anything near the budget."""
    windows = sum(len(np.asarray(stream)) for stream in streams)
    if not windows:
        raise CalibrationError("no windows to calibrate on")
    days = windows * window_ms / 1000 / DAY_S
    shows = _shows(days, budget)
    if fastest:
        _need_length(days, budget)
    tried: list[dict[str, Any]] = []
    kept_rules: list[AlarmRule] = []
    for rule in (*rules, *FASTEST) if fastest else rules:
        share, rate = _seen(streams, rule.constants, days)
        if fastest:
            kept = share <= _FASTEST_MARGIN
        elif shows:
            kept = rate <= budget.per_day
        else:
            kept = windows >= rule.needs and share <= rule.margin and rate <= max(budget.per_day, 1 / days)
        tried.append(
            {"alarm_rule": rule.name, "kept": bool(kept), "peak_share": round(share, 3), "per_day": round(rate, 4)}
        )
        if kept:
            kept_rules.append(rule)
    if fastest and not kept_rules:
        least, name = min((row["peak_share"], row["alarm_rule"]) for row in tried)
        raise CalibrationError(
            f"no alarm rule stays silent on this recording (the calmest, {name}, reaches {least:.2f} of its threshold; "
            f"{_FASTEST_MARGIN:g} is the most). Record more and train again, or leave out --fastest"
        )
    best = min(kept_rules, key=lambda rule: (rule.mean_windows, rule.windows), default=rules[0])
    constants = best.constants
    if best is rules[0] and (share := _seen(streams, constants, days)[0]) > 0.75:
        # not even the slowest: raise its threshold over what was seen
        constants = tuple((k, cap, math.ceil(alarm * share / 0.75)) for k, cap, alarm in constants)
    counted = [_alarms(stream, constants) for stream in streams]
    alarms, ringing = (sum(each) for each in zip(*counted, strict=True))
    bound = poisson_bound(alarms) / days
    return Choice(
        best.name,
        constants,
        min(math.ceil(alarm / (cap - k)) for k, cap, alarm in constants),
        days,
        windows,
        alarms,
        bound * 30,
        str(budget),
        bound <= budget.per_day,
        fastest,
        tried,
        ringing / windows,
        shows,
    )


def _shows(days: float, budget: Budget) -> bool:
    """Whether one alarm of the budget is due in that time."""
    return days * budget.per_day >= 1


def _need_length(days: float, budget: Budget) -> None:
    """Raises CalibrationError where even silence over N device-days proves nothing near the budget."""
    bound = poisson_bound(0) / days
    if bound > _NEAR * budget.per_day:
        near, full = poisson_bound(0) / (_NEAR * budget.per_day), poisson_bound(0) / budget.per_day
        raise CalibrationError(
            f"{days:.2f} benign device-days after the learning prove at most {30 * bound:.0f} alarms in 30 days, and "
            f"the budget is {30 * budget.per_day:g}: --fastest needs at least {near:.1f} device-days ({full:.0f} prove "
            f"the budget), or a --budget that this recording can come near, such as {math.ceil(bound / _NEAR)}/1d"
        )


def _seen(streams: Sequence[npt.ArrayLike], constants: AlarmRules, days: float) -> tuple[float, float]:
    """-> the greatest share of a threshold that the streams' evidence reached, and the alarms a day."""
    share = rate = 0.0
    for rule in constants:
        peaks = [peak for stream in streams for peak in excursions(stream, rule)]
        share = max(share, max(peaks, default=0) / rule[2])
        rate += rate_above(peaks, rule[2], days)
    return share, rate


def _alarms(surprise_q8: npt.ArrayLike, constants: AlarmRules) -> tuple[int, int]:
    """-> alarms with hysteresis, as detection.Detector counts them, and the windows in alarm."""
    evidence = [0] * len(constants)
    count = windows = 0
    ringing = False
    for surprise in np.asarray(surprise_q8, dtype=np.int64).tolist():
        share = 0
        for i, (k, cap, alarm) in enumerate(constants):
            evidence[i] = min(max(0, evidence[i] + min(surprise, cap) - k), alarm + (alarm >> 1))
            share = max(share, (evidence[i] << 8) // alarm)
        if share >= 256 and not ringing:
            ringing, count = True, count + 1
        elif share < 64:
            ringing = False
        windows += ringing
    return count, windows
