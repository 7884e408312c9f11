"""One cause behind many absences: a site, a router, a broker. It speaks once, for all its members.

A cause opens where more devices leave within a short time than chance explains, at one false cause in a thousand years
for a fleet that loses each device once a day. It is named after the sites, classes and tags of which at least half have
left and which cover its members; without such a label it is "one network". Members join while others still leave; a
cause ends when nine of ten are back, and who is still away then counts alone again.

Time is passed in, in seconds; no clock is read here.
"""

from collections import deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from .chance import poisson_tail

WINDOW_S = 120.0  # last wills arrive up to one and a half keep-alive times after a router has died
LEAST = 3  # devices that make a cause
CHANCE = 1e-8  # that chance alone makes such a burst
LEAVING = 1 / 86_400  # departures that a device is expected to have a second, before it is known better
NAMED_SHARE = 0.5  # of a label's devices have left,
COVERED_SHARE = 0.8  # and the labels together cover that many of the members
BACK_SHARE = 0.9

Label = tuple[str, str]  # ("site", "berlin")


@dataclass(slots=True)
class Cause:
    """start_s: when the first member left. members: all that ever belonged to it; away: those that still are."""

    key: str
    start_s: float
    last_s: float
    members: set[str] = field(default_factory=set)
    away: set[str] = field(default_factory=set)
    labels: tuple[Label, ...] = ()
    chance: float = 1.0
    named: int = 0  # how many members it had when its labels were looked for
    dirty: bool = True  # differs from what is in the database

    def dump(self) -> dict[str, object]:
        return {
            "start_s": self.start_s,
            "last_s": self.last_s,
            "members": sorted(self.members),
            "away": sorted(self.away),
            "chance": self.chance,
        }

    @property
    def name(self) -> str:
        if not self.labels:
            return "one network"
        return " and ".join(f"{kind} {name}" if name else kind for kind, name in self.labels)


class Causes:
    """labels_of(device): the device's labels. left(), back(): feed it; step() -> what is open now. leaving: departures
    of each device a second, for the chance."""

    def __init__(self, labels_of: Callable[[str], Sequence[Label]]) -> None:
        self.open: list[Cause] = []
        self.over: list[str] = []  # keys of those that have ended, for the database
        self._labels_of = labels_of
        self._recent: deque[tuple[float, float, str]] = deque()  # (known, since, device), not in a cause
        self._of: dict[str, Cause] = {}
        self._new = False  # somebody has left since the last look

    def load(self, key: str, saved: dict[str, Any]) -> None:
        """A cause that was open when the collector ended."""
        cause = Cause(key, saved["start_s"], saved["last_s"], chance=saved["chance"], dirty=False)
        cause.members, cause.away = set(saved["members"]), set(saved["away"])
        self.open.append(cause)
        for device in cause.members:
            self._of[device] = cause

    def cause_of(self, device: str) -> Cause | None:
        return self._of.get(device)

    def left(self, device: str, since_s: float, now_s: float) -> None:
        for cause in self.open:
            if now_s - cause.last_s <= WINDOW_S and self._fits(cause, device):
                self._join(cause, device, since_s, now_s)
                return
        self._recent.append((now_s, since_s, device))
        self._new = True

    def _fits(self, cause: Cause, device: str) -> bool:
        if not cause.labels or not cause.labels[0][1]:
            return True
        return any(label in cause.labels for label in self._labels_of(device))

    def back(self, device: str) -> None:
        cause = self._of.get(device)
        if cause is not None:
            cause.away.discard(device)
            cause.dirty = True
        self._recent = deque(entry for entry in self._recent if entry[2] != device)

    def _join(self, cause: Cause, device: str, since_s: float, now_s: float) -> None:
        cause.members.add(device)
        cause.away.add(device)
        cause.dirty = True
        cause.last_s = now_s
        cause.start_s = min(cause.start_s, since_s)
        self._of[device] = cause

    def step(self, now_s: float, population: Callable[[], Iterable[str]], expected: Callable[[str], float]) -> None:
        """population(): all devices; expected(device): how many departures a second are usual for it. Both are asked
        only while devices leave."""
        while self._recent and now_s - self._recent[0][0] > WINDOW_S:
            self._recent.popleft()
        if self._new and len(self._recent) >= LEAST:
            self._look(now_s, population, expected)
        for cause in list(self.open):
            if len(cause.away) <= (1 - BACK_SHARE) * len(cause.members):
                self.open.remove(cause)
                self.over.append(cause.key)
                for device in cause.members:
                    self._of.pop(device, None)

    def _look(self, now_s: float, population: Callable[[], Iterable[str]], expected: Callable[[str], float]) -> None:
        self._new = False
        usual: dict[Label, float] = {}
        for device in population():
            rate = max(LEAVING, expected(device)) * WINDOW_S
            for label in (("fleet", ""), *self._labels_of(device)):
                usual[label] = usual.get(label, 0.0) + rate
        left: dict[Label, set[str]] = {}
        for _, _, device in self._recent:
            for label in (("fleet", ""), *self._labels_of(device)):
                left.setdefault(label, set()).add(device)
        # a burst in one label alone counts as much as one in the whole fleet; each label is one more test
        found: list[tuple[float, Label]] = []
        for label, devices in left.items():
            if len(devices) >= LEAST:
                chance = poisson_tail(len(devices), usual.get(label, LEAVING * WINDOW_S)) * len(left)
                if chance < CHANCE:
                    found.append((chance, label))
        if not found:
            return
        chance, label = min(found)  # the least likely: for a dead site that is the site, if it is labelled
        members = left[label]
        cause = Cause(f"cause-{int(now_s)}-{len(self.open)}", now_s, now_s, chance=chance)
        for _, since_s, device in self._recent:
            if device in members:
                self._join(cause, device, since_s, now_s)
        self._recent = deque(entry for entry in self._recent if entry[2] not in members)
        self.open.append(cause)

    def shift(self, seconds: float) -> None:
        """The clock that now_s comes from was set by so much."""
        self._recent = deque(
            (known_s + seconds, since_s + seconds, device) for known_s, since_s, device in self._recent
        )
        for cause in self.open:
            cause.start_s += seconds
            cause.last_s += seconds

    def name(self, cause: Cause, population: Callable[[], Iterable[str]]) -> None:
        """Find the labels that explain a cause's members; asked before it is shown."""
        if cause.named == len(cause.members):
            return
        cause.named = len(cause.members)
        sizes: dict[Label, int] = {}
        inside: dict[Label, set[str]] = {}
        total = 0
        for device in population():
            total += 1
            for label in self._labels_of(device):
                sizes[label] = sizes.get(label, 0) + 1
                if device in cause.members:
                    inside.setdefault(label, set()).add(device)
        chosen: list[Label] = []
        covered: set[str] = set()
        ranks = {"site": 0, "tag": 1, "class": 2}
        for label in sorted(inside, key=lambda each: (ranks.get(each[0], 3), -len(inside[each]), each)):
            if len(inside[label]) >= NAMED_SHARE * sizes[label] and len(inside[label] - covered) > 0:
                if chosen and chosen[0][0] != label[0]:
                    break  # sites, or classes: not both
                chosen.append(label)
                covered |= inside[label]
                if len(covered) >= COVERED_SHARE * len(cause.members):
                    break
        if len(covered) >= COVERED_SHARE * len(cause.members):
            cause.labels = tuple(chosen)
        elif len(cause.members) >= NAMED_SHARE * total:
            cause.labels = (("the whole fleet", ""),)
        else:
            cause.labels = ()
