"""Classes of devices, and each device beside its siblings: where its scores are among those of its class, by the hour.

A fleet has many devices: what is kept of each is in columns, by an index. Times are in seconds.
"""

from array import array
from collections import Counter, deque
from dataclasses import dataclass
from math import log

from .chance import normal_quantile, upper_rate

YEAR_S = 365 * 86_400.0
MONTH_S = 30 * 86_400.0
HOUR_S = 3600.0
BINS = 64  # of a class's scores, four a factor of two
ALLOWANCE = 0.75  # of the chart of a device against its siblings, in its own standard deviations
LEARN_HOURS = 24

Sign = tuple[int, int]  # feature index, +1 or -1


@dataclass(slots=True)
class Onset:
    at_s: float
    device: str
    model: str
    signs: frozenset[Sign]
    learned: bool = False


class Group:
    """A class of devices: its alarms, their usual rate, its scores."""

    def __init__(self, name: str, now_s: float) -> None:
        self.name = name
        self.size = 0
        self.models: Counter[str] = Counter()
        self.pairs: dict[str, tuple[Group, str]] = {}  # (this class, model), one for all devices of the model
        self.onsets: deque[Onset] = deque()
        self.learned = 1.0  # alarms, a priori one
        self.exposure_s = MONTH_S  # device seconds
        self.by_sign: Counter[Sign] = Counter()
        self.with_signs = 0
        self.learned_s = now_s  # up to when alarms count for the rate
        self.news: set[Sign | str] = set()  # explanations and models of alarms that nobody has looked at
        self.scores = [0.0] * BINS
        self.scored = 0.0

    def rate(self) -> float:
        """Alarms of a device a second, at most."""
        return upper_rate(self.learned, self.exposure_s)


class Siblings:
    """Columns of all devices, by their index. apart: devices unlike their siblings, and since when."""

    def __init__(self, false_per_year: float) -> None:
        self._false_per_year = false_per_year
        self._free: list[int] = []  # of devices that were removed
        self.index: dict[str, int] = {}
        self.of: list[tuple[Group, str]] = []  # class and model
        self.apart: dict[str, float] = {}
        self.level = array("B")
        self.clock = array("B")  # reports in a row with a wrong clock
        self.onset_s = array("d")  # of the last report in alarm
        self._hour_s = array("d")  # begin of the hour that is summed up
        self._total, self._count = array("f"), array("I")  # of places in this hour
        self._mean, self._var = array("f"), array("f")  # of the device's hours
        self._hours = array("I")
        self._chart = array("f")

    def add(self, device: str, of: tuple[Group, str]) -> None:
        if not self._free:
            self._free.append(len(self.of))
            self.of.append(of)
            for column in self._columns():
                column.append(0)
        at = self.index[device] = self._free.pop()
        for column in self._columns():
            column[at] = 0
        self.of[at] = of
        self.onset_s[at] = -YEAR_S
        self._var[at] = 1.0

    def remove(self, device: str) -> tuple[Group, str]:
        at = self.index.pop(device)
        self._free.append(at)
        self.apart.pop(device, None)
        return self.of[at]

    def _columns(self) -> "list[array[int] | array[float]]":
        columns: list[array[int] | array[float]] = [self.level, self.clock, self.onset_s, self._hour_s, self._total]
        return [*columns, self._count, self._mean, self._var, self._hours, self._chart]

    def shift(self, seconds: float) -> None:
        """The clock was set by so much."""
        for at in range(len(self.of)):
            self.onset_s[at] += seconds
            self._hour_s[at] += seconds if self._hour_s[at] else 0.0
            self.clock[at] = 0
        for device in self.apart:
            self.apart[device] += seconds

    def score(self, at: int, device: str, score_q8: int, now_s: float) -> None:
        """The device's place among the scores of its class at this time, hour by hour against its own usual place."""
        group = self.of[at][0]
        bin_ = min(BINS - 1, _log4(score_q8))
        scores = group.scores
        if group.scored >= 20:
            below = sum(scores[:bin_]) + scores[bin_] / 2
            self._total[at] += normal_quantile_of(below, group.scored)
            self._count[at] += 1
        scores[bin_] += 1
        group.scored += 1
        if group.scored > 8 * max(50, group.size):  # old scores count less
            group.scores = [value / 2 for value in scores]
            group.scored /= 2
        if now_s - self._hour_s[at] >= HOUR_S:
            if self._hour_s[at] and self._count[at]:
                self._hour(at, device, now_s)
            self._hour_s[at] = now_s
            self._total[at], self._count[at] = 0.0, 0

    def _hour(self, at: int, device: str, now_s: float) -> None:
        place = self._total[at] / self._count[at]
        self._hours[at] += 1
        mean, var = self._mean[at], self._var[at]
        if self._hours[at] <= LEARN_HOURS:
            part = 1 / self._hours[at]
        else:
            z = (place - mean) / max(0.1, var**0.5)
            chart = self._chart[at] = max(0.0, self._chart[at] + min(3.0, z) - ALLOWANCE)
            if chart > self._chart_limit() and device not in self.apart:
                self.apart[device] = now_s
            elif chart == 0:
                self.apart.pop(device, None)
            if z > 2:  # what is unusual is not learned
                return
            part = 1 / 168
        self._var[at] = var + part * ((place - mean) ** 2 - var)
        self._mean[at] = mean + part * (place - mean)

    def _chart_limit(self) -> float:
        """Of a chart of hours, for false_per_year among all devices: a false alert each exp(2 k h) / (2 k^2) hours."""
        hours = max(1, len(self.index)) * YEAR_S / HOUR_S / self._false_per_year
        return log(2 * ALLOWANCE**2 * hours) / (2 * ALLOWANCE) + 1.2


def _log4(score_q8: int) -> int:
    """Four bins a factor of two, in integers."""
    if score_q8 < 4:
        return score_q8
    bits = score_q8.bit_length()
    return 4 * (bits - 2) + (score_q8 >> (bits - 3) & 3)


_PLACES = [normal_quantile((index + 0.5) / 200) for index in range(200)]


def normal_quantile_of(below: float, total: float) -> float:
    """Where a share of `below` in `total` is on the standard normal's axis, within 2.8 deviations."""
    return _PLACES[min(199, int(200 * below / total))]
