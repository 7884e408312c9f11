"""The columns of LINUX_1 that need BPF: the system calls, the connections, and the failed logins.

Each group is started by trying; for one that does not start, `sources` has the kernel's reason and the fix.
"""

import _socket
import errno
import os

from ..errors import CollectorError
from . import bpf
from .connections import Connections, octets, packets
from .known_peers import LearnedPeers, peers_key
from .logins import FailedLogins
from .packet_program import OPENED_TCP, OPENED_UDP, OVERFLOW_OUT, OWN_IN, OWN_OUT, RST_IN, SYN_OUT, SYNACK_IN
from .syscall_classes import CLASSES
from .syscalls import EXEC, FORK, Syscalls, entropy_share_q8
from .tcp_table import opened_connections

_WHOLE_Q8 = 25600
MAX_OPENED = 512

# The columns from sys_open to sys_priv, each a sum of classes.
_CALL_COLUMNS = tuple(
    tuple(CLASSES.index(name) for name in names)
    for names in (
        ("open",),
        ("read",),
        ("write",),
        ("fmeta",),
        ("fmod",),
        ("sockctl",),
        ("nettx", "netrx"),
        ("proc",),
        ("mem",),
        ("priv",),
    )
)

_CAPABILITIES = "CAP_BPF CAP_PERFMON CAP_NET_ADMIN"
_FIXES = {
    errno.EPERM: "start as root, or with " + _CAPABILITIES + " (systemd: AmbientCapabilities=); in a container the "
    "seccomp profile must allow bpf() too",
    errno.EACCES: "start as root, or with " + _CAPABILITIES,
    errno.ENOSYS: "a kernel with CONFIG_BPF_SYSCALL",
    errno.ENOENT: "a kernel with CONFIG_BPF_EVENTS and CONFIG_FTRACE (tracepoints)",
    errno.EINVAL: "Linux 5.10 or later with CONFIG_BPF_EVENTS, CONFIG_CGROUP_BPF",
    errno.ENOMEM: "raise RLIMIT_MEMLOCK (systemd: LimitMEMLOCK=infinity) on kernels before 5.11",
}


def start(interfaces=None, cgroup: "str | None" = None, own_user_id: "int | None" = None, services=()):
    """-> ([Syscalls, Connections, FailedLogins] as far as they started, [(group, source or "", note), ...] of all)."""
    if own_user_id is None and os.getuid():
        own_user_id = os.getuid()
    bpf.raise_memlock()
    started: list = []
    rows = []
    for kind, make in (
        (Syscalls, lambda: Syscalls(cgroup, services=services)),
        (Connections, lambda: Connections(interfaces, cgroup, own_user_id, _services_of(started))),
        (FailedLogins, FailedLogins),
    ):
        try:
            part = make()
            started.append(part)
            rows.append((kind.group, kind.source, part.note))
        except OSError as error:
            fix = _FIXES.get(error.errno or 0, "see dmesg")
            reason = os.strerror(error.errno) if error.errno else str(error)
            rows.append((kind.group, "", "%s does not start: %s (fix: %s)" % (kind.source, reason, fix)))
        except CollectorError as error:
            rows.append((kind.group, "", "%s does not start: %s" % (kind.source, error)))
    return started, rows


def _services_of(started: list):
    """The Services of the Syscalls, where those have started."""
    return started[0].services if started and isinstance(started[0], Syscalls) else None


class BpfColumns:
    """parts: what start() started, all three. Fills SYSCALL_COLUMNS, CONNECTION_COLUMNS, LOGIN_COLUMNS."""

    def __init__(self, parts: list, peers_secret: "bytes | None") -> None:
        self._calls, self.connections, self._logins = parts
        self.services = self._calls.services
        if self.services is not None:
            self.services.release_fd()
        self.learned = LearnedPeers(peers_key(peers_secret))
        self._last_classes = [0] * len(CLASSES)
        self._last_syn = (0, 0)
        self._last_overflow = 0
        self.sent: list = []  # bytes to each of learned.contacts in the last window
        self._new_peers = 0
        self._new_peer_bytes = 0
        self._top_share_q8 = 0
        self._opened = dict.fromkeys(opened_connections(MAX_OPENED))  # address: the longest unseen first
        self._strangers: set = set()  # of the last window: who spoke to this machine first

    def fill(self, values: list, at: int) -> None:
        self._fill_calls(values, at)
        self._fill_connections(values, at + 13)
        values[at + 21] = self._logins.read()

    def forks(self) -> int:
        """Processes and threads begun, cumulative, as of the last fill()."""
        return int(self._calls.counts[FORK])

    def own_traffic(self) -> "tuple[int, int, int, int]":
        """What the agent's own connections carried: bytes in, packets in, bytes out, packets out, cumulative."""
        counters = self.connections.counters
        received, sent = counters[OWN_IN], counters[OWN_OUT]
        return octets(received), packets(received), octets(sent), packets(sent)

    def exclude_peer(self, host: str, port: int) -> bool:
        if self.connections.own_user_id is not None:
            return True
        try:
            found = _socket.getaddrinfo(host, port, 0, _socket.SOCK_STREAM)
        except OSError:
            return False
        addresses = sorted({str(entry[4][0]).split("%")[0] for entry in found})
        self.connections.exclude(addresses, port)
        return True

    def close(self) -> None:
        for part in (self._calls, self.connections, self._logins):
            part.close()

    def _fill_calls(self, values: list, at: int) -> None:
        counts = self._calls.read()
        classes = counts[: len(CLASSES)]
        values[at] = sum(classes)
        for i, members in enumerate(_CALL_COLUMNS):
            values[at + 1 + i] = sum([classes[member] for member in members])
        values[at + 11] = entropy_share_q8([new - old for new, old in zip(classes, self._last_classes)])
        values[at + 12] = counts[EXEC]
        self._last_classes = classes

    def _fill_connections(self, values: list, at: int) -> None:
        now = self.connections
        now.read()
        counters = now.counters
        syn = counters[SYN_OUT] - self._last_syn[0]
        accepted = counters[SYNACK_IN] - self._last_syn[1]
        self._last_syn = (counters[SYN_OUT], counters[SYNACK_IN])
        overflow = counters[OVERFLOW_OUT] - self._last_overflow
        self._last_overflow = counters[OVERFLOW_OUT]
        peers = self._count_peers(octets(overflow))
        values[at] = counters[SYN_OUT]
        values[at + 1] = _WHOLE_Q8 * max(0, syn - accepted) // syn if syn else 0
        values[at + 2] = counters[RST_IN]
        values[at + 3] = peers
        values[at + 4] = self._new_peers
        values[at + 5] = self._new_peer_bytes
        values[at + 6] = now.distinct_ports
        values[at + 7] = self._top_share_q8

    def _count_peers(self, overflow_bytes: int) -> int:
        """-> peers of this window. Those without an entry are counted by the bits, and all of them are new."""
        out_bytes = most_bytes = new = 0
        rows = self.connections.peers
        self.learned.next_window()
        strangers = set()
        self.sent = []
        for address, sent, _ in rows:
            sent_bytes = octets(sent)
            out_bytes += sent_bytes
            most_bytes = max(most_bytes, sent_bytes)
            opened = self._has_opened(address)
            if opened:
                self.sent.append(sent_bytes)
            else:
                strangers.add(address)
            if self.learned.is_new(address, opened):
                new += 1
                self._new_peer_bytes += sent_bytes
        self._strangers = strangers
        peers = len(rows)
        if overflow_bytes:
            beyond = max(1, self.connections.distinct_peers - peers)
            peers += beyond
            new += beyond
            out_bytes += overflow_bytes
            self._new_peer_bytes += overflow_bytes
        self._new_peers += new
        if out_bytes:  # a window that sent nothing has no shares: the last one is kept
            self._top_share_q8 = _WHOLE_Q8 * most_bytes // out_bytes
        return peers

    def _has_opened(self, address: bytes) -> bool:
        """Did this machine open what it has with the peer, now or in an earlier window? A datagram that answers one of
        the last window is not a beginning."""
        how = self.connections.opened.get(address)
        known = address in self._opened
        if known:
            del self._opened[address]
        elif not (how == OPENED_TCP or how == OPENED_UDP and address not in self._strangers):
            return False
        elif len(self._opened) >= MAX_OPENED:
            del self._opened[next(iter(self._opened))]
        self._opened[address] = None
        return True
