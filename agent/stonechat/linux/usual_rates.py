"""How much a device sends on an ordinary day, so that a throttle for no reason does not slow it down.

While no response is in force the kernel's counters are read every SPAN_S, and the highest rates of each BUCKET_S are
kept for a day. The last one or two buckets are left out: an attack may be in them.
"""

from ..compat import ticks_diff, ticks_ms

SPAN_S = 10
BUCKET_S = 600
MAX_BUCKETS = 144
_MARGIN_PERCENT = 150
NAMES = ("connections_out", "connections_in", "datagrams", "bytes_out")
_DATAGRAMS_6 = ("Udp6OutDatagrams", "Icmp6OutMsgs")
_MOST = 200_000_000  # a second; the kernel has 32 bits for a burst
_MAX_FILE_BYTES = 65_536


class UsualRates:
    """proc: where procfs is."""

    def __init__(self, proc: str = "/proc") -> None:
        self._proc = proc
        self._last: list | None = None
        self._last_ms = 0
        self._bucket = [0] * len(NAMES)  # the highest so far, each a second
        self._bucket_ms = ticks_ms()
        self._buckets: list = []

    def turn(self) -> None:
        """To be called about once a second while nothing is in force."""
        now_ms = ticks_ms()
        passed_ms = ticks_diff(now_ms, self._last_ms)
        if self._last is not None and passed_ms < SPAN_S * 1000:
            return
        counts = self._read()
        if self._last is not None and counts is not None and passed_ms < 3000 * SPAN_S:  # else a suspension
            for i in range(len(counts)):
                rate = max(0, counts[i] - self._last[i]) * 1000 // passed_ms
                self._bucket[i] = max(self._bucket[i], rate)
        self._last, self._last_ms = counts, now_ms
        if ticks_diff(now_ms, self._bucket_ms) >= BUCKET_S * 1000:
            self._buckets = [*self._buckets[1 - MAX_BUCKETS :], self._bucket]
            self._bucket = [0] * len(NAMES)
            self._bucket_ms = now_ms

    def pause(self) -> None:
        """A response is in force: what is counted meanwhile is not usual."""
        self._last = None

    def limits(self, least: dict) -> dict:
        """least: {name: (a second, burst)} -> the same, raised to one and a half times what is usual."""
        found = {}
        for i, name in enumerate(NAMES):
            rate, burst = least[name]
            usual = max([bucket[i] for bucket in self._buckets[:-1]], default=0) * _MARGIN_PERCENT // 100
            most = max(rate, min(usual, _MOST))
            found[name] = (most, burst * most // rate)
        return found

    def _read(self) -> "list | None":
        """The counters in the order of NAMES, None where they can't be read."""
        try:
            snmp = self._text("/net/snmp")
            tcp, udp, icmp = [_of(snmp, name) for name in ("Tcp:", "Udp:", "Icmp:")]
            datagrams = udp["OutDatagrams"] + icmp["OutMsgs"] + self._of_ipv6()
            sent = 0
            for line in self._text("/net/dev").split("\n"):
                name, _, rest = line.partition(":")
                words = rest.split()
                if len(words) >= 16 and name.strip() != "lo":
                    sent += int(words[8])
            return [tcp["ActiveOpens"], tcp["PassiveOpens"], datagrams, sent]
        except (OSError, ValueError, KeyError):
            return None

    def _of_ipv6(self) -> int:
        """What the kernel counts apart from IPv4; for TCP it does not. 0 where there is no IPv6."""
        try:
            rows = [line.split() for line in self._text("/net/snmp6").split("\n")]
        except OSError:
            return 0
        return sum([int(row[1]) for row in rows if len(row) == 2 and row[0] in _DATAGRAMS_6])

    def _text(self, path: str) -> str:
        with open(self._proc + path, "rb") as file:
            return file.read(_MAX_FILE_BYTES).decode("latin-1")


def _of(text: str, start: str) -> dict:
    """The two lines of /proc/net/snmp that begin with `start` -> {name: count}. Raises ValueError."""
    lines = [line.split() for line in text.split("\n") if line.startswith(start)]
    if len(lines) != 2:
        raise ValueError(start)
    return dict(zip(lines[0][1:], [int(word) for word in lines[1][1:]]))
