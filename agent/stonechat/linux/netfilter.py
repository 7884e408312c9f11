"""What a response does on Linux: the kernel's packet filter, spoken to directly, no nft needed.

Nothing is set up while no response is in force. apply() makes the tables (netfilter_rules.py) in one transaction; the
kernel's own timeout ends the response even if this process is gone; release() takes the tables away. A new start takes
away what a killed agent has left.
"""

import _socket
import errno
import os
from struct import unpack

from ..compat import sleep_ms, ticks_add, ticks_diff, ticks_ms
from ..policy import QUARANTINE
from . import netfilter_rules as rules
from . import nfnetlink as nf
from .allow_list import AllowList
from .usual_rates import UsualRates

MAX_DEVICES = 64  # whose AF_PACKET frames are stopped; the kernel takes 256
MAX_S = 86_400
_TRIES = 3  # an interface may go while the batch is under way
GONE = "the table %s was deleted or changed from outside: nothing is stopped any more" % rules.TABLE


_CLAIM = b"\0stonechat-response"  # an abstract UNIX socket: one for each network namespace, gone with its process
_CLAIM_TRIES, _CLAIM_EVERY_MS = 8, 100
_PEER_CREDENTIALS = 17  # SO_PEERCRED, asm-generic/socket.h


def open_response(config: dict, resolver=None, check: bool = False) -> "Netfilter":
    """What carries a response out, from the daemon's configuration; resolver: of the MQTT client; check: it will not
    respond. Raises OSError where nf_tables can't be used here, or another agent responds."""
    claim = None if check else _claim_in_time()
    peers = (lambda: resolver.addresses) if resolver else None
    allow = AllowList(config["mqtt"]["host"], config["mqtt"]["port"], config["response"]["allow"], peers)
    return Netfilter(allow, claim=claim)


def _claim():
    """One agent responds in a network namespace: its tables are there once, and a second one would open what the first
    has stopped -> a socket to keep open, None where somebody who is neither root nor this user has taken its name.
    Raises OSError where another agent responds."""
    claim = _socket.socket(_socket.AF_UNIX, _socket.SOCK_STREAM | _socket.SOCK_NONBLOCK)
    try:
        claim.bind(_CLAIM)
        claim.listen(8)
        return claim
    except OSError as error:
        claim.close()
        if error.errno != errno.EADDRINUSE:
            raise
    probe = _socket.socket(_socket.AF_UNIX, _socket.SOCK_STREAM | _socket.SOCK_NONBLOCK)
    try:
        probe.connect(_CLAIM)
        owner = unpack("iii", probe.getsockopt(_socket.SOL_SOCKET, _PEER_CREDENTIALS, 12))[1]
    except OSError:  # it has just ended, or does not listen
        return None
    finally:
        probe.close()
    if owner in (0, os.geteuid()):
        raise OSError(errno.EBUSY, "another stonechat-agent responds in this network namespace")
    return None


def what_works() -> str:
    """For people: what a response could do here; nothing is changed. Raises OSError where it could do nothing."""
    response = Netfilter(AllowList("127.0.0.1", 1, []))
    response.detach()
    return response.source


def clear() -> None:
    """Take away what a killed agent has left. Raises OSError where nf_tables can't be used here."""
    kernel = nf.NfTables()
    try:
        for family in (nf.INET, nf.NETDEV):
            try:
                _delete(kernel, family)
            except OSError:
                if family == nf.INET:  # the other one is missing before Linux 5.16
                    raise
    finally:
        kernel.close()


def _claim_in_time():
    """As _claim(); an agent that ends, or only clears, lets go within moments."""
    for _ in range(_CLAIM_TRIES):
        try:
            return _claim()
        except OSError as error:
            if error.errno != errno.EBUSY:
                raise
        sleep_ms(_CLAIM_EVERY_MS)
    return _claim()


def clear_before_a_start() -> None:
    """For an agent that will not respond: what it has left as it was killed may stop the device for an hour. Nothing is
    done while another agent responds, whose tables these are, or where nf_tables is a module that is not loaded."""
    try:
        claim = _claim()
        if not _is_unloaded("nf_tables"):
            clear()
        if claim is not None:
            claim.close()
    except OSError:  # another one responds, or not root, or a kernel without
        pass


def _is_unloaded(module: str) -> bool:
    try:
        with open("/proc/modules") as file:
            loaded = any([line.startswith(module + " ") for line in file])
    except OSError:  # a kernel without modules
        return False
    folder = "/lib/modules/%s/kernel/net/netfilter/%s.ko" % (os.uname().release, module)
    return not loaded and any([os.path.exists(folder + end) for end in ("", ".xz", ".zst", ".gz")])


def _delete(kernel: nf.NfTables, family: int) -> None:
    """Our table, if there is one. Raises OSError."""
    try:
        for _ in kernel.ask(nf.GET_TABLE, family, nf.text(1, rules.TABLE)):
            pass
    except FileNotFoundError:
        return
    batch = nf.Batch()
    rules.delete_table(batch, family)
    kernel.run(batch)


class Netfilter:
    """Enforcer (protocols.pyi) by nf_tables. frames: whether AF_PACKET is to be covered where the kernel can; claim: of
    _claim(), kept open. Raises OSError where nf_tables can't be used here."""

    def __init__(self, allow: AllowList, frames: bool = True, claim=None) -> None:
        self._allow = allow
        self._claimed = claim
        self._usual = UsualRates(allow.proc)
        self._limits = rules.LIMITS
        self._kernel = nf.NfTables()
        self._until_ms: int | None = None  # None: nothing is in force
        self._left = False  # tables that could not be taken away
        self._action = 0
        self._entries: list = []
        self._devices: list = []
        self._rules: dict = {}  # family: how many
        self._generation = 0
        self._before = (0, 0)  # counted by tables that were replaced
        self.routed = False
        self.frames = ""  # why frames of AF_PACKET are not stopped, "" where they are
        try:
            self._probe(frames)
        except OSError:
            self._kernel.close()
            raise

    @property
    def source(self) -> str:
        """For people: what works."""
        return "nf_tables" + (" (without AF_PACKET: %s)" % self.frames if self.frames else ", AF_PACKET too")

    def never_stopped(self) -> list:
        """For people: [(network, what passes, reason)]."""
        return self._allow.lines()

    def apply(self, action: int, seconds: int) -> None:
        try:
            entries = self._allow.entries()
            self._limits = self._usual.limits(rules.LIMITS)
            self._install(action, entries, 1000 * min(seconds, MAX_S))
        except OSError:
            self._quietly_release()
            raise
        self._before = (0, 0)
        self._allow.began()

    def extend(self, seconds: int) -> None:
        """Also takes what has changed on the allow-list."""
        if self._until_ms is None:
            raise OSError(0, "netfilter: nothing is in force")
        trouble = self.turn()
        if trouble or self._until_ms is None:
            raise OSError(0, "netfilter: " + (trouble or "it has ended"))
        self._replace(1000 * min(seconds, MAX_S))

    def release(self) -> None:
        if self._until_ms is not None:
            try:
                self._before = self.counts()
            except OSError:
                pass
        self._until_ms = None
        self._allow.ended()
        self._left = True
        for family in (nf.INET, nf.NETDEV):
            self._delete(family)
        self._left = False

    def counts(self) -> "tuple[int, int]":
        passed, stopped = self._before
        if self._until_ms is None:
            return passed, stopped
        for family in self._rules:
            passed += self._counter(family, rules.PASSED)
            stopped += self._counter(family, rules.STOPPED)
        return passed, stopped

    def essential(self) -> bool:
        return bool(self._allow.essential())

    def close(self) -> None:
        try:
            self.release()
        finally:
            self.detach()

    def detach(self) -> None:
        """Let go, and leave everything as it is: the tables may be another agent's."""
        self._kernel.close()
        if self._claimed is not None:
            self._claimed.close()

    def turn(self) -> str:
        """To be called about once a second: takes away what has ended, follows changes of the allow-list and of the
        interfaces -> "", or what is wrong. Raises OSError."""
        if self._claimed is not None:
            try:
                os.close(self._claimed._accept()[0])  # an agent that has looked whose it is
            except OSError:
                pass
        if self._until_ms is None:
            if self._left:
                self._quietly_release()
            self._allow.turn()
            self._usual.turn()
            return ""
        self._usual.pause()
        self._allow.watch()
        left_ms = ticks_diff(self._until_ms, ticks_ms())
        if left_ms <= 0:  # also after a suspension, in which the kernel's timeout does not run
            self.release()
            return ""
        if not self._intact():
            self._quietly_release()
            return GONE
        if self._allow.entries() != self._entries or not self.frames and self._names() != self._devices:
            self._replace(left_ms)
        return ""

    def _probe(self, frames: bool) -> None:
        """What the kernel would take; nothing is changed."""
        batch = nf.Batch()
        rules.add_table(
            batch, nf.INET, rules.chains([(bytes(4), 32, 6, 1), (bytes(16), 8, 0, 0)], rules.LIMITS), [], QUARANTINE, 1
        )
        self._kernel.run(batch, commit=False)
        if not frames:
            self.frames = "not wanted"
            return
        for self.routed in (True, False):
            batch = nf.Batch()
            rules.add_table(batch, nf.NETDEV, rules.frame_chains([], self.routed), ["lo"], QUARANTINE, 1)
            try:
                self._kernel.run(batch, commit=False)
                self.frames = ""
                return
            except OSError as error:
                self.frames = "%s (Linux 5.16 and CONFIG_NETFILTER_EGRESS)" % error.strerror

    def _install(self, action: int, entries: list, timeout_ms: int) -> None:
        until_ms = ticks_add(ticks_ms(), timeout_ms)
        for attempt in range(_TRIES):
            batch = nf.Batch()
            counted = {
                nf.INET: rules.add_table(batch, nf.INET, rules.chains(entries, self._limits), [], action, timeout_ms)
            }
            devices = self._names() if not self.frames else []
            if devices:
                frames = rules.frame_chains(entries, self.routed)
                counted[nf.NETDEV] = rules.add_table(batch, nf.NETDEV, frames, devices, action, timeout_ms)
            elif nf.NETDEV in self._rules:
                rules.delete_table(batch, nf.NETDEV)
            before = self._read_generation()
            try:
                self._kernel.run(batch)
                break
            except FileNotFoundError:
                if attempt == _TRIES - 1 or devices == self._names():
                    raise
        self._until_ms = until_ms
        self._action, self._entries, self._devices, self._rules = action, entries, devices, counted
        after = self._read_generation()
        if after != before + 1:
            after = -1  # somebody else was at it, too: look at the next turn
        self._generation = after

    def _replace(self, timeout_ms: int) -> None:
        """All of it anew, without a gap; what was counted is kept."""
        counted = self.counts()
        self._install(self._action, self._allow.entries(), timeout_ms)
        self._before = counted

    def _intact(self) -> bool:
        """Is everything there that was installed? One short question while nobody has changed any table."""
        generation = self._read_generation()
        if generation == self._generation:
            return True
        name = rules.SETS[self._action]
        for family, n_rules in self._rules.items():
            table = nf.text(1, rules.TABLE)
            try:
                n_keys = 0
                for buffer, found in self._kernel.ask(nf.GET_ELEMENT, family, table, nf.text(2, name), dump=True):
                    n_keys += len(nf.elements(buffer, found[3])) if 3 in found else 0
                there = sum([1 for _ in self._kernel.ask(nf.GET_RULE, family, table, dump=True)])
            except FileNotFoundError:
                return False
            if n_keys < len(rules.KEYS[family]) or there != n_rules:
                return False
        self._generation = generation
        return True

    def _read_generation(self) -> int:
        for buffer, found in self._kernel.ask(nf.GET_GENERATION, 0):
            return nf.number(buffer, found, 1) or 0
        return 0

    def _counter(self, family: int, name: str) -> int:
        parts = (nf.text(1, rules.TABLE), nf.text(2, name), nf.u32(3, nf.COUNTER))
        for buffer, found in self._kernel.ask(nf.GET_OBJECT, family, *parts):
            if 4 in found:
                return nf.number(buffer, nf.attributes(buffer, *found[4]), 2) or 0
        return 0

    def _delete(self, family: int) -> None:
        try:
            _delete(self._kernel, family)
        except OSError:
            if family == nf.INET or not self.frames:  # else a kernel without
                raise

    def _quietly_release(self) -> None:
        try:
            self.release()
        except OSError:
            self._until_ms = None  # the kernel's timeout ends it

    @staticmethod
    def _names() -> list:
        """The interfaces that frames can leave by, without loopback; those to containers last, of which a machine may
        have more than the kernel takes."""
        names = [name for _, name in _socket.if_nameindex() if name != "lo"]
        return sorted(sorted(names, key=lambda name: (name.startswith("veth"), name))[:MAX_DEVICES])
