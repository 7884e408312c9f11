"""What only the fleet shows: many devices with one explanation, a model that alarms more, a device unlike its siblings.

Judged against chance. An alarm of each device comes at a rate that is learned for its class; a judgement is made where
that rate makes that many alarms together less often than `false_per_year` times a year in the whole fleet, with all the
looks at it counted (Bonferroni over the alarms of a year, the spans and the classes). An outbreak's own alarms do not
raise the rate. Time is passed in, in seconds; no clock is read here.
"""

from collections import Counter, deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from math import log
from typing import Any

from .chance import normal_quantile, poisson_tail, upper_rate, upper_share
from .wire import Report

YEAR_S = 365 * 86_400.0
MONTH_S = 30 * 86_400.0
SPANS_S = (120.0, 600.0, 3600.0)  # within which alarms count as together
MODEL_SPANS_S = (3600.0, 86_400.0)
LEAST = 3  # devices
SHARE_PERCENT = 15  # of the score that a feature must carry to explain
AGAIN_S = 600.0  # an alarm that returns within this time is the same one
LEARN_AFTER_S = 3600.0  # alarms count for the usual rate only when no outbreak has claimed them by then
FALSE_PER_YEAR = 1.0
QUIET_S = 1800.0  # an outbreak ends when no alarm joined for so long
MAX_NEWS = 100  # explanations looked at in one step
MAX_ONSETS = 50_000  # remembered in a class
CLOCK_S = 300.0  # by which a device's clock may be wrong
CLOCK_REPORTS = 3  # in a row
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


@dataclass(slots=True)
class Outbreak:
    """Devices of one class that alarm with one explanation; kind "outbreak", or "model" for one model's rate."""

    kind: str
    key: str
    of: str  # the class, or the model
    start_s: float
    last_s: float
    expected: float
    chance: float
    span_s: float
    signs: tuple[Sign, ...] = ()
    devices: dict[str, float] = field(default_factory=dict)


class Group:
    """A class of devices: its alarms, their usual rate, its scores."""

    def __init__(self, name: str, now_s: float) -> None:
        self.name = name
        self.size = 0
        self.models: Counter[str] = Counter()
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


class Self:
    """A device beside its siblings, hour by hour."""

    __slots__ = (
        "chart",
        "clock",
        "count",
        "group",
        "hour_s",
        "hours",
        "level",
        "mean",
        "model",
        "onset_s",
        "total",
        "var",
    )

    def __init__(self, group: str, model: str) -> None:
        self.group, self.model = group, model
        self.level = 0
        self.onset_s = -YEAR_S
        self.clock = 0  # reports in a row with a wrong clock
        self.hour_s = 0.0
        self.total, self.count = 0.0, 0
        self.mean, self.var, self.hours, self.chart = 0.0, 1.0, 0, 0.0


class Sense:
    """facts_of(device) -> (class, model). false_per_year: of each kind of judgement, in the whole fleet."""

    def __init__(self, facts_of: Callable[[str], tuple[str, str]], false_per_year: float = FALSE_PER_YEAR) -> None:
        self._facts_of = facts_of
        self.false_per_year = false_per_year
        self.groups: dict[str, Group] = {}
        self.devices: dict[str, Self] = {}
        self.open: dict[str, Outbreak] = {}
        self._claimed: set[str] = set()  # devices whose alarm an open outbreak accounts for
        self.wrong_clocks: dict[str, float] = {}  # device: seconds that its clock is off
        self.apart: dict[str, float] = {}  # device unlike its siblings: the hour in which its chart crossed the limit
        self._learned_s: float | None = None

    def moved(self, device: str, now_s: float) -> None:
        """The device is new, or its class or model may have changed."""
        group, model = self._facts_of(device)
        found = self.devices.get(device)
        if found is not None:
            if (found.group, found.model) == (group, model):
                return
            self._leave(found)
            found.group, found.model = group, model
        else:
            self.devices[device] = Self(group, model)
        if group not in self.groups:
            self.groups[group] = Group(group, now_s)
        self.groups[group].size += 1
        self.groups[group].models[model] += 1

    def removed(self, device: str) -> None:
        found = self.devices.pop(device, None)
        if found is not None:
            self._leave(found)
        self.wrong_clocks.pop(device, None)
        self.apart.pop(device, None)

    def _leave(self, found: Self) -> None:
        group = self.groups[found.group]
        group.size -= 1
        group.models[found.model] -= 1
        if not group.models[found.model]:
            del group.models[found.model]
        if not group.size and not group.onsets and group.learned <= 1.0:  # nothing is known of it: a device that
            del self.groups[found.group]  # names a new schema each time leaves nothing behind

    def report(self, report: Report, now_s: float) -> None:
        """A report that was stored for the first time."""
        found = self.devices.get(report.device)
        if found is None:
            self.moved(report.device, now_s)
            found = self.devices[report.device]
        if report.late_s is not None or not report.windows:
            return
        level = report.level
        if level == 2:
            if found.level != 2 and now_s - found.onset_s > AGAIN_S:
                self._onset(found, report, now_s)
            found.onset_s = now_s
        found.level = level
        if report.time_s is not None:
            off_s = now_s - report.time_s
            if -CLOCK_S < off_s < CLOCK_S:
                if found.clock:
                    found.clock = 0
                    self.wrong_clocks.pop(report.device, None)
            else:
                found.clock += 1
                if found.clock >= CLOCK_REPORTS:
                    self.wrong_clocks[report.device] = off_s
        if report.score_q8 is not None and not report.flags & 1:
            self._beside(found, report, now_s)

    # --- together -------------------------------------------------------------------------------------------------

    def _onset(self, found: Self, report: Report, now_s: float) -> None:
        channel = getattr(report, "channel", 0)  # each has features of its own
        signs = frozenset(
            (feature.index + 256 * channel, 1 if feature.deviation >= 0 else -1)
            for feature in report.features
            if feature.share_percent >= SHARE_PERCENT
        )
        group = self.groups[found.group]
        onset = Onset(now_s, report.device, found.model, signs)
        group.onsets.append(onset)
        if len(group.onsets) > MAX_ONSETS:
            group.onsets.popleft()
        for outbreak in self.open.values():
            if self._belongs(outbreak, group, onset):
                outbreak.devices.setdefault(onset.device, now_s)
                outbreak.last_s = now_s
                onset.learned = True
                if outbreak.kind == "outbreak":
                    self._claimed.add(onset.device)
        if len(group.news) < MAX_NEWS:
            group.news.update(signs)
            group.news.add(found.model)

    @staticmethod
    def _belongs(outbreak: Outbreak, group: Group, onset: Onset) -> bool:
        if outbreak.kind == "model":
            return outbreak.of == onset.model
        return outbreak.of == group.name and outbreak.signs[0] in onset.signs

    def _limit(self, group: Group, looks: int) -> float:
        """The chance below which a look says something: false_per_year, shared among the looks of a year."""
        alarms = max(1.0, group.rate() * group.size * YEAR_S)
        return min(0.01, self.false_per_year / (alarms * looks * len(self.groups)))

    def _look(self, group: Group, now_s: float) -> None:
        """At what is new in a class: do too many devices alarm with one explanation, or with one model?"""
        news, group.news = group.news, set()
        by_sign: dict[Sign, list[Onset]] = {each: [] for each in news if not isinstance(each, str)}
        by_model: dict[str, list[Onset]] = {each: [] for each in news if isinstance(each, str) and each}
        for onset in _since(group.onsets, now_s - MODEL_SPANS_S[-1]):
            if onset.device in self._claimed:
                continue
            if onset.model in by_model:
                by_model[onset.model].append(onset)
            if onset.at_s >= now_s - SPANS_S[-1]:
                for sign in onset.signs:
                    if sign in by_sign:
                        by_sign[sign].append(onset)
        for sign, onsets in sorted(by_sign.items(), key=lambda item: (-len(item[1]), item[0])):
            share = upper_share(group.by_sign[sign], group.with_signs)
            usual = group.rate() * group.size * share
            key = f"outbreak-{group.name}-{sign[0]}{'+' if sign[1] > 0 else '-'}"
            found = self._too_many(onsets, SPANS_S, usual, self._limit(group, 3 * len(SPANS_S)), now_s)
            if found is not None and key not in self.open:
                common = Counter(each for onset in found[0] for each in onset.signs)
                often = [each for each, n in common.most_common(4) if each != sign and n >= 0.5 * len(found[0])]
                self._open("outbreak", key, group.name, (sign, *often), *found, now_s)
        for model, onsets in by_model.items():
            usual = group.rate() * group.models[model]
            found = self._too_many(onsets, MODEL_SPANS_S, usual, self._limit(group, len(MODEL_SPANS_S)), now_s)
            if found is not None and f"model-{model}" not in self.open:
                self._open("model", f"model-{model}", model, (), *found, now_s)

    def _too_many(
        self, onsets: list[Onset], spans_s: tuple[float, ...], usual: float, limit: float, now_s: float
    ) -> tuple[list[Onset], float, float, float] | None:
        """onsets: newest first; usual: alarms a second -> (those within the span, the span, how many are usual in it,
        the chance of that), None where there is nothing to see."""
        for span_s in spans_s:
            inside = [each for each in onsets if each.at_s >= now_s - span_s and each.device not in self._claimed]
            devices = len({each.device for each in inside})
            if devices >= LEAST:
                # given the one that came last, the others are Poisson
                chance = poisson_tail(devices - 1, usual * span_s)
                if chance < limit:
                    return inside, span_s, usual * span_s, chance
        return None

    def _open(
        self,
        kind: str,
        key: str,
        of: str,
        signs: tuple[Sign, ...],
        inside: list[Onset],
        span_s: float,
        expected: float,
        chance: float,
        now_s: float,
    ) -> None:
        devices: dict[str, float] = {}
        for onset in inside:
            devices[onset.device] = onset.at_s
            onset.learned = True  # never counts for the usual rate
        start_s = min(devices.values())
        self.open[key] = Outbreak(kind, key, of, start_s, now_s, expected, chance, span_s, signs, devices)
        if kind == "outbreak":
            self._claimed |= devices.keys()

    # --- one beside its siblings ----------------------------------------------------------------------------------

    def _beside(self, found: Self, report: Report, now_s: float) -> None:
        """The device's place among the scores of its class at this time, hour by hour against its own usual place."""
        group = self.groups[found.group]
        bin_ = min(BINS - 1, _log4(report.score_q8 or 0))
        if group.scored >= 20:
            below = sum(group.scores[:bin_]) + group.scores[bin_] / 2
            place = normal_quantile_of(below, group.scored)
            found.total += place
            found.count += 1
        group.scores[bin_] += 1
        group.scored += 1
        if group.scored > 8 * max(50, group.size):  # old scores count less
            group.scores = [value / 2 for value in group.scores]
            group.scored /= 2
        if now_s - found.hour_s >= HOUR_S:
            if found.hour_s and found.count:
                self._hour(found, report.device, now_s)
            found.hour_s = now_s
            found.total, found.count = 0.0, 0

    def _hour(self, found: Self, device: str, now_s: float) -> None:
        place = found.total / found.count
        found.hours += 1
        if found.hours <= LEARN_HOURS:
            part = 1 / found.hours
        else:
            z = (place - found.mean) / max(0.1, found.var**0.5)
            found.chart = max(0.0, found.chart + min(3.0, z) - ALLOWANCE)
            limit = self._chart_limit()
            if found.chart > limit and device not in self.apart:
                self.apart[device] = now_s
            elif found.chart == 0:
                self.apart.pop(device, None)
            if z > 2:  # what is unusual is not learned
                return
            part = 1 / 168
        found.var += part * ((place - found.mean) ** 2 - found.var)
        found.mean += part * (place - found.mean)

    def _chart_limit(self) -> float:
        """Of a chart of hours, for false_per_year among all devices: a false alert each exp(2 k h) / (2 k^2) hours."""
        hours = max(1, len(self.devices)) * YEAR_S / HOUR_S / self.false_per_year
        return log(2 * ALLOWANCE**2 * hours) / (2 * ALLOWANCE) + 1.2

    # --- time -----------------------------------------------------------------------------------------------------

    def step(self, now_s: float) -> None:
        """Look at the alarms that are new, learn the usual rates, end what is over. Once a second."""
        for group in self.groups.values():
            if group.news:
                self._look(group, now_s)
        if self._learned_s is not None and now_s - self._learned_s < 60:
            return
        self._learned_s = now_s
        for group in self.groups.values():
            self._learn(group, now_s - LEARN_AFTER_S)
            while group.onsets and now_s - group.onsets[0].at_s > MODEL_SPANS_S[-1]:
                group.onsets.popleft()
        for key, outbreak in list(self.open.items()):
            quiet_s = QUIET_S if outbreak.kind == "outbreak" else MODEL_SPANS_S[-1]
            if now_s - outbreak.last_s > quiet_s:
                del self.open[key]
                self._claimed = {
                    device for each in self.open.values() if each.kind == "outbreak" for device in each.devices
                }

    def _learn(self, group: Group, until_s: float) -> None:
        """Let the alarms and the devices' time up to until_s count for the usual rate."""
        if until_s <= group.learned_s:
            return
        group.exposure_s += (until_s - group.learned_s) * group.size
        group.learned_s = until_s
        for onset in group.onsets:
            if onset.at_s > until_s:
                break
            if not onset.learned:
                onset.learned = True
                group.learned += 1
                group.with_signs += bool(onset.signs)
                group.by_sign.update(onset.signs)

    def dump_rates(self) -> dict[str, Any]:
        """What is known of each class's usual alarms, for the database."""
        return {
            group.name or "-": {
                "learned": group.learned,
                "exposure_s": group.exposure_s,
                "signs": [[*sign, count] for sign, count in group.by_sign.most_common(500)],
                "with_signs": group.with_signs,
            }
            for group in self.groups.values()
        }

    def load_rate(self, name: str, saved: dict[str, Any], now_s: float) -> None:
        name = "" if name == "-" else name
        group = self.groups.setdefault(name, Group(name, now_s))
        group.learned, group.exposure_s = saved["learned"], saved["exposure_s"]
        group.by_sign = Counter({(index, sign): count for index, sign, count in saved["signs"]})
        group.with_signs = saved["with_signs"]

    def shift(self, seconds: float) -> None:
        """The clock that now_s comes from was set by so much."""
        for group in self.groups.values():
            group.learned_s += seconds
            for onset in group.onsets:
                onset.at_s += seconds
        for found in self.devices.values():
            found.onset_s += seconds
            found.hour_s += seconds if found.hour_s else 0.0
            found.clock = 0
        for outbreak in self.open.values():
            outbreak.start_s += seconds
            outbreak.last_s += seconds
        self.apart = {device: at_s + seconds for device, at_s in self.apart.items()}
        self.wrong_clocks.clear()
        self._learned_s = None

    def siblings(self, device: str, now_s: float) -> tuple[int, int, float]:
        """-> (siblings of the device, how many of them alarmed in the last ten minutes, how many of them chance
        expects)."""
        found = self.devices.get(device)
        if found is None:
            return 0, 0, 0.0
        group = self.groups[found.group]
        others = {onset.device for onset in _since(group.onsets, now_s - AGAIN_S)} - {device}
        return group.size - 1, len(others), group.rate() * (group.size - 1) * AGAIN_S


def _since(onsets: deque[Onset], since_s: float) -> Iterator[Onset]:
    for onset in reversed(onsets):
        if onset.at_s < since_s:
            return
        yield onset


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
