"""A channel of its own for what is sent to each of the device's own hosts, against what is usual for that host.

2 KB a second to a host that the device calls anyway are lost in the counters of the machine; beside what that host is
sent otherwise they are plain. While the device learns its own hosts (learn_peers_hours), this channel learns for each
of them the highest level that was reached:

    level      bytes sent to a host in a window, smoothed: it follows by a quarter of the difference each window
    limit      1.25 times the highest level that was learned, 200 bytes a second at least. A host met in fewer than 12
               windows has no usual of its own: the highest of all hosts counts
    evidence   += log2(the lesser of level and bytes of the window / limit), at most half and at least -1/4 of a
               doubling. An alarm is one and a half doublings: three windows at least, and a single burst is none
    steady     an alarm that lasts for an hour, and for 64 windows at least, becomes a state of its own: the level of
               that moment is the usual one and an alarm no more, but reports and status say it until an operator
               answers ("was normal", "calibrate"), or until the host has been sent as little as before for as long

Nothing moves after the learning but by an operator. Bounded: as many hosts as the channel of lasting peers has, the
ones met last. Needs BPF, which counts bytes by host; peers are numbers made by a keyed hash, no address is here.
"""

from struct import pack, unpack

from ..compat import ticks_diff
from ..detection import ALARM
from ..features import LEVEL, log2_q8
from ..lasting_peers import LastingPeers
from ..schema import Schema

LEAST_A_SECOND = 200
_MARGIN_PERCENT = 125
_FEW_WINDOWS = 12
_UP_Q8, _DOWN_Q8 = 128, -64
_ALARM_Q8 = 384  # one and a half doublings; evidence_q8 is 256 then
_MOST_Q8 = 576
_HALF_Q8 = 128  # of evidence_q8
_HOUR_MS = 3_600_000
_STATED_LEAST = 64
_LEVEL, _USUAL, _WINDOWS, _EVIDENCE, _MET, _BEFORE, _LAST = range(7)
_MAX = 0xFFFFFFFF


class SentToPeers(LastingPeers):
    """collector: has `contacts` as LastingPeers wants them, and `sent`, the bytes sent to each of them. learn_windows:
    how many windows teach what is usual. For the agent's `extra`, which gives it the State by open().

    `steady`, `age`: as a SteadyScorer's."""

    name = "sent to peers"
    schema = Schema("sent-1", (("sent_to_peer", "B", LEVEL),))  # type: ignore[assignment]  # a board spells its own out
    id = schema.id

    def __init__(self, collector, window_ms: int, learn_windows: int, most: int = 256) -> None:
        LastingPeers.__init__(self, collector, window_ms, None, 0, most)
        self._learn_windows = learn_windows
        self._window_ms = window_ms
        self._least = LEAST_A_SECOND * window_ms // 1000
        self._stated = max(_STATED_LEAST, _HOUR_MS // window_ms)
        self._own: dict = {}  # host: what _LEVEL to _LAST name
        self._active: set = set()  # hosts whose level or evidence is not 0
        self._last_ms: "int | None" = None
        self.steady = False
        self.age = self._alarmed = self._back = 0

    def open(self, state) -> "SentToPeers":
        self._state = state
        self._restore(state.get(self._section, b"") if state else b"")
        return self

    @property
    def _section(self) -> bytes:
        return b"sent" + self.schema.id

    def end_window(self, now_ms: int):
        """What the collector has just read -> the Verdict (reused)."""
        elapsed_ms = max(self._window_ms, ticks_diff(now_ms, self._last_ms) if self._last_ms is not None else 0)
        self._last_ms = now_ms
        self._window += 1
        learning = self._learned < self._learn_windows
        self._learned += learning
        sent: dict = {}
        for peer, octets in zip(self._contacts.contacts, self._contacts.sent):
            sent[peer] = sent.get(peer, 0) + octets * self._window_ms // elapsed_ms
            if learning and not self._hold and peer not in self._own:
                self._trust(peer)
        evidence_q8 = level = 0
        for peer in list(self._active.union(sent)):
            if peer not in self._own:
                continue  # a host of others: the channel of lasting peers looks at it
            entry = self._own[peer]
            self._weigh(entry, sent.get(peer), learning)
            if entry[_EVIDENCE] > evidence_q8:
                evidence_q8, level = entry[_EVIDENCE], entry[_LEVEL]
            if entry[_LEVEL] or entry[_EVIDENCE]:
                self._active.add(peer)
            else:
                self._active.discard(peer)
        verdict = self._decide(evidence_q8 * 256 // _ALARM_Q8, level)
        self._count_age(verdict)
        verdict.steady = self.steady
        return verdict

    def _weigh(self, entry: list, octets: "int | None", learning: bool) -> None:
        """octets: of this window, None where the host was not met."""
        entry[_LEVEL] += ((octets or 0) - entry[_LEVEL]) >> 2
        if octets is not None:
            entry[_MET] = self._window
            entry[_LAST] = octets
        if learning:
            if not self._hold:
                entry[_USUAL] = max(entry[_USUAL], entry[_LEVEL])
                entry[_WINDOWS] += octets is not None
            return
        above_q8 = log2_q8(min(entry[_LEVEL], octets or 0)) - log2_q8(self._limit(entry[_USUAL], entry[_WINDOWS]))
        entry[_EVIDENCE] = min(_MOST_Q8, max(0, entry[_EVIDENCE] + max(_DOWN_Q8, min(above_q8, _UP_Q8))))

    def _limit(self, usual: int, windows: int) -> int:
        if windows < _FEW_WINDOWS:
            usual = max([entry[_USUAL] for entry in self._own.values()])
        return max(self._least, usual * _MARGIN_PERCENT // 100)

    def _count_age(self, verdict) -> None:
        """When an alarm becomes steady, and when that ends by itself."""
        if verdict.level == ALARM:
            self._alarmed += 1
            if self._alarmed > self._stated:
                self._take_over()
                self.steady = True
                self.age, self._alarmed = self._alarmed, 0
                self._decide(0, 0)
        else:
            self._alarmed = 0
        if not self.steady:
            return
        self.age += 1
        back = True
        for entry in self._own.values():
            if entry[_BEFORE] is not None and entry[_LEVEL] > self._limit(entry[_BEFORE], entry[_WINDOWS]):
                back = False
        self._back = self._back + 1 if back else 0
        if self._back > self._stated:
            for entry in self._own.values():
                if entry[_BEFORE] is not None:
                    entry[_USUAL] = entry[_BEFORE]
            self._forget()

    def _take_over(self) -> None:
        for entry in self._own.values():
            if entry[_EVIDENCE] * 256 >= _HALF_Q8 * _ALARM_Q8:
                if entry[_BEFORE] is None:
                    entry[_BEFORE] = entry[_USUAL]
                entry[_USUAL] = max(entry[_USUAL], entry[_LEVEL], entry[_LAST])
                entry[_WINDOWS] = max(entry[_WINDOWS], _FEW_WINDOWS)
            entry[_EVIDENCE] = 0

    def _forget(self) -> None:
        """Nothing is steady."""
        self.steady = False
        self.age = self._alarmed = self._back = 0
        for entry in self._own.values():
            entry[_BEFORE] = None

    def _trust(self, peer: int) -> None:
        own = self._own
        if len(own) >= self._most:
            oldest = min(own, key=lambda other: own[other][_MET])
            del own[oldest]
            self._active.discard(oldest)
        own[peer] = [0, 0, 0, 0, self._window, None, 0]

    def recalibrate(self) -> None:
        """Learn again (an operator's command, a new firmware)."""
        self._learned = 0
        self._own.clear()
        self._active.clear()
        self.clear_evidence()

    def clear_evidence(self) -> None:
        """An operator has marked what was reported as normal: it is the usual of those hosts."""
        self._take_over()
        self._forget()
        self._decide(0, 0)

    def save(self, state=None) -> None:
        """Put what was learned into the state, 16 bytes a host."""
        if state:
            numbers = [min(self._learned, _MAX)]
            for peer in sorted(self._own, key=lambda peer: self._own[peer][_MET]):
                entry = self._own[peer]
                before = 0 if entry[_BEFORE] is None else 1 + entry[_BEFORE]
                numbers += (peer, min(entry[_USUAL], _MAX), min(entry[_WINDOWS], _MAX), min(before, _MAX))
            state.put(self._section, pack(">%dI" % len(numbers), *numbers))

    def _restore(self, packed: bytes) -> None:
        n = len(packed) >> 2
        if len(packed) & 3 or n % 4 != 1 or n // 4 > self._most:
            return  # a fresh device, or a damaged record: it learns
        numbers = unpack(">%dI" % n, packed)
        self._learned = numbers[0]
        for i in range(1, n, 4):
            peer, usual, windows, before = numbers[i : i + 4]
            self._own[peer & 0x3FFFFFFF] = [0, usual, windows, 0, 0, before - 1 if before else None, 0]
            if before:
                self.steady = True
                self.age = self._stated
