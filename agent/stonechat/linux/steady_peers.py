"""The channel of lasting peers with the state of steady.py: an alarm that lasts for an hour, and for 64 windows at
least, is changed and steady. Its hosts alarm no more, but reports and status say so until they have not been met for
ten minutes or an operator answers; other hosts are looked at as before. After a restart it alarms for an hour again.

On Linux only: a board has no space for it, and its alarm stays."""

from ..detection import ALARM
from ..lasting_peers import LastingPeers

_STEADY_S = 3600
_STEADY_WINDOWS = 64


class _Contacts:
    """Those of the window that are no steady ones."""

    contacts: list = []


class SteadyPeers(LastingPeers):
    """As LastingPeers, for the agent's `extra`, which gives it the State by open(). `steady`, `age`: as a
    SteadyScorer's."""

    def __init__(self, collector, window_ms: int, learn_hours: int, most: int = 256) -> None:
        LastingPeers.__init__(self, _Contacts(), window_ms, None, learn_hours, most)
        self._collector = collector
        self._steady_after = max(_STEADY_WINDOWS, _STEADY_S * 1000 // window_ms)
        self._alarmed = 0  # windows in alarm on end
        self._steady: dict = {}  # peer: its episode
        self.age = 0  # windows of the alarm, and of what follows it

    @property
    def steady(self) -> bool:
        return bool(self._steady)

    def open(self, state) -> "SteadyPeers":
        self._state = state
        self._restore(state.get(self._section, b"") if state else b"")
        return self

    def end_window(self, now_ms: int):
        others = []
        for peer in self._collector.contacts:
            if peer in self._steady:
                self._steady[peer][1] = self._window + 1
                self._steady[peer][2] += 1
            else:
                others.append(peer)
        self._contacts.contacts = others
        verdict = LastingPeers.end_window(self, now_ms)
        for peer, episode in list(self._steady.items()):
            if self._window - episode[1] > self._longest_gap:
                del self._steady[peer]
        self._alarmed = self._alarmed + 1 if verdict.level == ALARM else 0
        if self._alarmed > self._steady_after:
            for peer, episode in list(self._episodes.items()):
                if self._share_q8(episode) >= 256:
                    self._steady[peer] = self._episodes.pop(peer)
            self.age += self._alarmed
            self._alarmed = 0
            self._decide(0, 0)
        self.age = self.age + 1 if self._steady else 0
        verdict.steady = self.steady
        return verdict

    def clear_evidence(self) -> None:
        for peer in list(self._steady):
            self._trust(peer)
        self._steady.clear()
        LastingPeers.clear_evidence(self)

    def save(self, state=None) -> None:
        alarming = self._episodes
        self._episodes = {**alarming, **self._steady}
        LastingPeers.save(self, state)
        self._episodes = alarming
