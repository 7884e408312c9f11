"""What only the fleet shows: many devices with one explanation, a model that alarms more, a device unlike its siblings.

Judged against chance. An alarm of each device comes at a rate that is learned for its class; a judgement is made where
that rate makes that many alarms together less often than `false_per_year` times a year in the whole fleet, with all the
looks at it counted (Bonferroni over the alarms of a year, the spans and the classes). An outbreak's own alarms do not
raise the rate. Time is passed in, in seconds; no clock is read here.
"""

from collections import Counter, deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

from .chance import poisson_tail, upper_share
from .siblings import YEAR_S, Group, Onset, Siblings, Sign
from .wire import Report

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


class Sense:
    """facts_of(device) -> (class, model). false_per_year: of each kind of judgement, in the whole fleet."""

    def __init__(self, facts_of: Callable[[str], tuple[str, str]], false_per_year: float = FALSE_PER_YEAR) -> None:
        self._facts_of = facts_of
        self.false_per_year = false_per_year
        self.groups: dict[str, Group] = {}
        self.beside = Siblings(false_per_year)
        self.devices = self.beside.index
        self.open: dict[str, Outbreak] = {}
        self._claimed: set[str] = set()  # devices whose alarm an open outbreak accounts for
        self.wrong_clocks: dict[str, float] = {}  # device: seconds that its clock is off
        self._learned_s: float | None = None

    def moved(self, device: str, now_s: float) -> None:
        """The device is new, or its class or model may have changed."""
        name, model = self._facts_of(device)
        at = self.devices.get(device)
        if at is not None:
            before, model_before = self.beside.of[at]
            if (before.name, model_before) == (name, model):
                return
            self._leave(before, model_before)
        group = self.groups.get(name)
        if group is None:
            group = self.groups[name] = Group(name, now_s)
        group.size += 1
        group.models[model] += 1
        pair = group.pairs.setdefault(model, (group, model))
        if at is None:
            self.beside.add(device, pair)
        else:
            self.beside.of[at] = pair

    def removed(self, device: str) -> None:
        if device in self.devices:
            self._leave(*self.beside.remove(device))
        self.wrong_clocks.pop(device, None)

    @property
    def apart(self) -> dict[str, float]:
        """Devices unlike their siblings: the hour in which their chart crossed the limit."""
        return self.beside.apart

    def _leave(self, group: Group, model: str) -> None:
        group.size -= 1
        group.models[model] -= 1
        if not group.models[model]:
            del group.models[model], group.pairs[model]
        if not group.size and not group.onsets and group.learned <= 1.0:  # nothing is known of it: a device that
            self.groups.pop(group.name, None)  # names a new schema each time leaves nothing behind

    def report(self, report: Report, now_s: float) -> None:
        """A report that was stored for the first time."""
        at = self.devices.get(report.device)
        if at is None:
            self.moved(report.device, now_s)
            at = self.devices[report.device]
        if report.late_s is not None or not report.windows:
            return
        beside = self.beside
        level = report.level
        if level == 2:
            if beside.level[at] != 2 and now_s - beside.onset_s[at] > AGAIN_S:
                self._onset(*beside.of[at], report, now_s)
            beside.onset_s[at] = now_s
        if level != beside.level[at]:
            beside.level[at] = level
        if report.time_s is not None:
            off_s = now_s - report.time_s
            if -CLOCK_S < off_s < CLOCK_S:
                if beside.clock[at]:
                    beside.clock[at] = 0
                    self.wrong_clocks.pop(report.device, None)
            else:
                beside.clock[at] = min(CLOCK_REPORTS, beside.clock[at] + 1)
                if beside.clock[at] >= CLOCK_REPORTS:
                    self.wrong_clocks[report.device] = off_s
        if report.score_q8 is not None and not report.flags & 1:
            beside.score(at, report.device, report.score_q8, now_s)

    # --- together -------------------------------------------------------------------------------------------------

    def _onset(self, group: Group, model: str, report: Report, now_s: float) -> None:
        channel = getattr(report, "channel", 0)  # each has features of its own
        signs = frozenset(
            (feature.index + 256 * channel, 1 if feature.deviation >= 0 else -1)
            for feature in report.features
            if feature.share_percent >= SHARE_PERCENT
        )
        onset = Onset(now_s, report.device, model, signs)
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
            group.news.add(model)

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
        self.beside.shift(seconds)
        for outbreak in self.open.values():
            outbreak.start_s += seconds
            outbreak.last_s += seconds
        self.wrong_clocks.clear()
        self._learned_s = None

    def siblings(self, device: str, now_s: float) -> tuple[int, int, float]:
        """-> (siblings of the device, how many of them alarmed in the last ten minutes, how many of them chance
        expects)."""
        at = self.devices.get(device)
        if at is None:
            return 0, 0, 0.0
        group = self.beside.of[at][0]
        others = {onset.device for onset in _since(group.onsets, now_s - AGAIN_S)} - {device}
        return group.size - 1, len(others), group.rate() * (group.size - 1) * AGAIN_S


def _since(onsets: deque[Onset], since_s: float) -> Iterator[Onset]:
    for onset in reversed(onsets):
        if onset.at_s < since_s:
            return
        yield onset
