"""A channel of its own for a quiet, lasting contact: a host that is not the device's own is met again and again.

A control channel of 500 bytes a minute is lost in the counters of a device that moves megabytes, and a peer that is met
in 12 windows is new no longer. So this channel counts contacts for each peer:

    own        a peer that the device has opened a connection to while it learned (learn_hours of windows)
    contact    a window in which the device has sent something to a peer that it had opened a connection to
    episode    contacts with a peer that is not own, without a gap of more than four times their mean interval (a
               minute at least, ten minutes at most)
    evidence   of an episode: contacts of CONTACTS or time of LASTS_S, whichever share is the smaller; the greatest
               episode decides, and an alarm ends with its episode

Neither a period nor a size is asked for: an irregular beacon is found as soon as a regular one. Bounded: own peers and
episodes have a greatest number; a spray of addresses may push out episodes of fewer contacts only. Peers are numbers
that the collector made by a keyed hash; no address is here.
"""

from struct import pack, unpack

from .compat import const
from .detection import ALARM, NORMAL, WATCH, Verdict
from .features import LEVEL, log2_q8

CONTACTS = const(10)
LASTS_S = const(600)
_LONGEST_GAP_S = const(600)
_LEAST_GAP_S = const(60)
_NEW_AT_ONCE = const(16)  # episodes that one window may begin: a scan is not what this channel is for
_FULL_Q8 = const(256)
_HALF_Q8 = const(128)


class _Columns:
    """A schema's attributes; a test holds the id to the columns. The column: contacts of the longest episode."""

    name = "peers-1"
    id = b"\xfa\x9c\x17\x45\x56\x8b\x89\xf7"
    columns = (("lasting_peer", "contacts", LEVEL),)
    kinds = (LEVEL,)

    def __len__(self):
        return 1


class LastingPeers:
    """A channel beside the device's own, whose collector it reads: `contacts`, a list of whole numbers below 2^30, one
    for each peer met in the window that was read last. It is its own scorer and collector, and needs no model.

    window_ms; state: State; learn_hours: hours of windows that teach the own peers; most: own peers at most, and
    a quarter of that episodes."""

    name = "lasting peers"  # among the channels' names in the status
    schema = _Columns()
    id = schema.id
    sources = ()
    lacks = ""
    learning = False  # what the device learns is in the verdict of its own channel
    cause = 0

    def __init__(self, collector, window_ms, state, learn_hours=24, most=256) -> None:
        self.collector = self.scorer = self.window = self
        self.values = [0]
        self.primed = True
        self.verdict = Verdict(1)
        self.verdict.learning = True  # it decides nothing there (fusion.py)
        self._contacts = collector
        self._learn_windows = learn_hours * 3600000 // window_ms
        self._lasts = max(1, LASTS_S * 1000 // window_ms)  # windows, like the two gaps
        self._longest_gap = max(1, _LONGEST_GAP_S * 1000 // window_ms)
        self._least_gap = max(1, _LEAST_GAP_S * 1000 // window_ms)
        self._most = most
        self._state = state
        self._hold = False
        self._window = 0
        self._learned = 0  # windows
        self._own: dict = {}  # peer: window in which it was met last
        self._episodes: dict = {}  # peer: [window of its first contact, of its last, contacts]
        self._restore(state.get(self._section, b"") if state else b"")

    @property
    def _section(self):
        return b"peers" + self.schema.id

    def end_window(self, now_ms):
        """The contacts of the window that the collector has just read -> the Verdict (reused)."""
        self._window += 1
        learning = self._learned < self._learn_windows
        self._learned += learning
        begun = 0
        for peer in self._contacts.contacts:
            episode = self._episodes.get(peer)
            if peer in self._own:
                self._own[peer] = self._window
            elif learning and not self._hold:
                self._trust(peer)
            elif episode:
                episode[1] = self._window
                episode[2] += 1
            elif begun < _NEW_AT_ONCE:
                begun += 1
                self._begin(peer)
        self._end_episodes()
        share_q8 = contacts = 0
        if not learning:
            for episode in self._episodes.values():
                share = self._share_q8(episode)
                if share > share_q8:
                    share_q8 = share
                    contacts = episode[2]
        return self._decide(share_q8, contacts)

    def _decide(self, share_q8, contacts):
        verdict = self.verdict
        level = verdict.level
        if share_q8 >= _FULL_Q8:
            level = ALARM
        elif share_q8 < _HALF_Q8:
            level = NORMAL
        elif level == NORMAL:
            level = WATCH
        if level == NORMAL:  # below half it has nothing to report, and does not lead
            share_q8 = contacts = 0
        verdict.changed = level != verdict.level
        verdict.level = level
        verdict.evidence_q8 = share_q8
        verdict.surprise_q8 = 3 * share_q8  # 1 in 1,000 at the alarm; rarer where it was measured (docs)
        verdict.score_q8 = log2_q8(1 + contacts)
        verdict.parts[0] = contacts
        verdict.x[0] = min(127, share_q8 >> 2)  # the alarm is at four of what other features call a deviation
        return verdict

    def _share_q8(self, episode):
        """Evidence of an episode, 256 is the alarm."""
        first, last, contacts = episode
        return min((contacts << 8) // CONTACTS, (last - first + 1 << 8) // self._lasts, _FULL_Q8)

    def _end_episodes(self):
        for peer in list(self._episodes):
            first, last, contacts = self._episodes[peer]
            allowed = self._longest_gap
            if contacts > 1:
                allowed = max(self._least_gap, min(4 * (last - first) // (contacts - 1), allowed))
            if self._window - last > allowed:
                del self._episodes[peer]

    def _begin(self, peer):
        episodes = self._episodes
        if len(episodes) >= self._most >> 2:
            del episodes[min(episodes, key=lambda other: (episodes[other][2], episodes[other][1]))]
        episodes[peer] = [self._window, self._window, 1]

    def _trust(self, peer):
        own = self._own
        if len(own) >= self._most:
            del own[min(own, key=lambda other: own[other])]
        own[peer] = self._window
        if peer in self._episodes:
            del self._episodes[peer]

    def hold_peers(self, hold):
        """True while the device is under suspicion: no peer becomes an own one."""
        self._hold = hold

    def recalibrate(self):
        """Learn again (an operator's command, a new firmware)."""
        self._learned = 0
        self.clear_evidence()

    def clear_evidence(self):
        """An operator has marked what was reported as normal: those peers are the device's own."""
        for peer in list(self._episodes):
            if self._share_q8(self._episodes[peer]) >= _HALF_Q8:
                self._trust(peer)
        self._decide(0, 0)

    def save(self, state=None):
        """Put own peers and episodes into the state: four bytes a number."""
        if state:
            numbers = [self._learned, len(self._own)] + sorted(self._own, key=lambda peer: self._own[peer])
            for peer, (first, last, contacts) in self._episodes.items():
                numbers += (peer, self._window - first, self._window - last, min(contacts, 1 << 20))
            state.put(self._section, pack(">%dI" % len(numbers), *numbers))

    def _restore(self, packed):
        n = len(packed) >> 2
        if n < 2 or len(packed) & 3:
            return  # a fresh device
        numbers = unpack(">%dI" % n, packed)
        rest = numbers[2 + min(numbers[1], n) :]
        if numbers[1] > self._most or len(rest) > self._most or len(rest) & 3:
            return
        self._learned = numbers[0]
        self._window = 1 << 24  # so that an episode has begun at a window above 0
        self._own = {peer & 0x3FFFFFFF: 0 for peer in numbers[2 : n - len(rest)]}
        for i in range(0, len(rest), 4):
            peer, since_first, since_last, contacts = rest[i : i + 4]
            self._episodes[peer & 0x3FFFFFFF] = [self._window - since_first, self._window - since_last, contacts]

    def close(self):
        pass
