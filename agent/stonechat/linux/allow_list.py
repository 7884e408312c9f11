"""Who is never stopped, whatever response is in force: the broker, DNS, the gateways, time servers, and the operator's
own addresses. (DHCP, IPv6 neighbours and loopback are free by rules of their own.)

The list is made anew each time from the configuration and from what the system says at that moment, so that it is the
same after a restart and follows a change of network. An entry wins also where the attacker uses the same address.
"""

import _socket
import _thread
import errno
import sys

from ..compat import epoch_s, ticks_add, ticks_diff, ticks_ms
from .resolver import MAX_ADDRESSES, literal
from .tcp_table import established

MAX_ENTRIES = 32  # of the operator's
MAX_SERVERS = 8  # of each kind: name servers, gateways, time servers
RENEW_MS = 300_000  # names are looked up again,
RENEW_SOON_MS = 30_000  # and while a response is in force
HOLD_MS = 86_400_000  # an address that a name had stays allowed for so long
DEAD_AFTER_MS = 15_000  # an essential connection that is missing for so long has died
_MAX_HELD = 32  # addresses of the broker's name, and
_MAX_HELD_CLOCK = 4  # of each time server's: those of a pool change all the time
_MAX_FILE_BYTES = 65_536
_MAX_LINES = 512
_SHARE = 20  # the table of connections is read for 1/20 of the time at most
_MAPPED = bytes(10) + b"\xff\xff"  # before an IPv4 address that is written as an IPv6 one
_RETRANSMITS = 4  # on end without an answer: by then 3 s and more have passed
_STACK_BYTES = 262_144
_TCP, _UDP = 6, 17
RESOLV_FILES = (
    "/etc/resolv.conf",
    "/run/systemd/resolve/resolv.conf",  # the servers behind systemd's 127.0.0.53,
    "/run/NetworkManager/no-stub-resolv.conf",  # and NetworkManager's dnsmasq
)
CLOCK_FILES = ("/etc/systemd/timesyncd.conf", "/etc/chrony/chrony.conf", "/etc/chrony.conf", "/etc/ntp.conf")
_DNS_PORTS = ((_UDP, 53), (_TCP, 53), (_TCP, 853))


def parse_network(text: str) -> "tuple[bytes, int]":
    """ "192.0.2.7", "192.0.2.0/24", "2001:db8::/32" -> (address, prefix length). Raises ValueError that says what is
    wrong."""
    word, slash, length = text.partition("/")
    address = packed(word)
    if address is None:
        raise ValueError('"%s" is no address: write 192.0.2.7, 192.0.2.0/24 or 2001:db8::/32' % text[:60])
    bits = 8 * len(address)
    if slash and bits == 32 and ":" in word:
        raise ValueError('"%s": write an IPv4 network, such as 192.0.2.0/24' % text[:60])
    if not slash:
        return address, bits
    least = 8 if bits == 32 else 16
    if not (length.isascii() and length.isdigit() and len(length) < 4 and least <= int(length) <= bits):
        raise ValueError('"%s": the prefix must be from %d to %d' % (text[:60], least, bits))
    prefix = int(length)
    if int.from_bytes(address, "big") & (1 << bits - prefix) - 1:
        raise ValueError('"%s" has bits behind its prefix: write %s for this address alone' % (text[:60], word))
    return address, prefix


def packed(word: str) -> "bytes | None":
    """An address in numbers -> 4 or 16 bytes, None for what is none. A zone (fe80::1%eth0) is left out, and
    ::ffff:192.0.2.7 is 192.0.2.7, as its packets are."""
    for family in (_socket.AF_INET, _socket.AF_INET6):
        try:
            return _unmapped(_socket.inet_pton(family, word.split("%")[0] if family == _socket.AF_INET6 else word))
        except (OSError, ValueError):
            continue
    return None


def parse_until(text: str) -> int:
    """ "2027-01-31" (the end of that day, UTC) -> Unix seconds. Raises ValueError."""
    words = text.split("-")
    if [len(word) for word in words] == [4, 2, 2] and all([word.isascii() and word.isdigit() for word in words]):
        year, month, day = [int(word) for word in words]
        leap = year % 4 == 0 and (year % 100 != 0 or year % 400 == 0)
        lengths = (31, 29 if leap else 28, 31, 30, 31, 30, 31, 31, 30, 31, 30, 31)
        if 2020 <= year < 2100 and 1 <= month <= 12 and 1 <= day <= lengths[month - 1]:
            before = year - 1
            days = 365 * before + before // 4 - before // 100 + before // 400 + sum(lengths[: month - 1]) + day
            return (days - 719_162) * 86_400  # from 0001-01-01 to 1970-01-01
    raise ValueError('until = "%s" must be a day such as "2027-01-31"' % text[:60])


def check(value) -> "str | None":
    """For config_keys.KEYS: the operator's entries -> None, or what they must be."""
    form = 'a list like [{address = "192.0.2.0/24", reason = "office", until = "2027-01-31"}]'
    if not isinstance(value, list) or not all(isinstance(row, dict) for row in value):
        return form
    if len(value) > MAX_ENTRIES:
        return "a list of at most %d entries" % MAX_ENTRIES
    for row in value:
        if not isinstance(row.get("essential", False), bool):
            return form + " (essential must be true or false)"
        if not all([isinstance(word, str) for name, word in row.items() if name != "essential"]):
            return form
        if set(row) - {"address", "reason", "until", "essential"} or not {"address", "reason"} <= set(row):
            return form + " (address and reason are needed, until and essential are not)"
        if not row["reason"].strip() or not row["reason"].isprintable() or len(row["reason"]) > 200:
            return form + " (a reason of 1 to 200 printable characters)"
        try:
            parse_network(row["address"])
            parse_until(row["until"]) if "until" in row else 0
        except ValueError as error:
            return "%s: %s" % (form, error)
    return None


class Names:
    """Looks names up in a thread, one after the other, and holds what they had: an answer that leaves an address out
    does not stop it at once. names: {name: port}, addresses in numbers included, the broker's first."""

    def __init__(self, names: dict) -> None:
        self._ports = names
        self._first = next(iter(names))
        self._codes = {name: name.encode() if name.isascii() else name.encode("idna") for name in names}
        self._held: dict = {}  # (name, address): when it was in an answer last
        self._due_ms = {name: ticks_ms() for name in names}
        self._result: list = []  # what the thread leaves: (name, addresses or None)
        self._looking = ""
        self._began_ms = 0
        self.answered: dict = {}  # name: whether its last look-up had an answer
        for name, port in list(names.items()):
            found = literal(name, port)
            if found is not None:
                self._held[name, packed(name)] = None
                self.answered[name] = True
                del self._due_ms[name]

    @property
    def literal(self) -> bool:
        """Are all of them addresses?"""
        return not self._due_ms

    def of(self, name: str) -> list:
        return [address for held, address in self._held if held == name]

    def silent(self, name: str) -> bool:
        """Has a look-up of this name waited for its answer for too long?"""
        return self._looking == name and ticks_diff(ticks_ms(), self._began_ms) > DEAD_AFTER_MS

    def turn(self, soon: bool) -> None:
        """Start what is due; never waits. soon: look up more often."""
        now_ms = ticks_ms()
        if self._looking:
            if not self._result:
                return
            name, addresses = self._result.pop()
            self._looking = ""
            self.answered[name] = addresses is not None
            for address in (addresses or [])[::-1]:
                self._held.pop((name, address), None)
                self._held[name, address] = now_ms  # last, as the one that was seen last
            self._forget(now_ms)
        every_ms = RENEW_SOON_MS if soon else RENEW_MS
        for name, last_ms in self._due_ms.items():
            if name not in self.answered or ticks_diff(now_ms, last_ms) >= every_ms:
                self._due_ms[name] = now_ms
                self._start(name, now_ms)
                return

    def _forget(self, now_ms: int) -> None:
        kept: dict = {}
        for key in list(self._held)[::-1]:  # what was seen last comes first; no name takes another's place
            name, seen_ms = key[0], self._held[key]
            kept[name] = kept.get(name, 0) + 1
            old = seen_ms is not None and ticks_diff(now_ms, seen_ms) > HOLD_MS and self.answered[name]
            if old or kept[name] > (_MAX_HELD if name == self._first else _MAX_HELD_CLOCK):
                del self._held[key]

    def _start(self, name: str, now_ms: int) -> None:
        self._looking = name
        self._began_ms = now_ms
        before = _thread.stack_size(_STACK_BYTES)
        try:
            _thread.start_new_thread(self._look_up, (name,))
        except RuntimeError:  # a limit on tasks
            self._result.append((name, None))
        finally:
            _thread.stack_size(before)

    def _look_up(self, name: str) -> None:
        """In the thread: touches nothing but _result."""
        try:
            found = _socket.getaddrinfo(self._codes[name], self._ports[name], 0, _socket.SOCK_STREAM)
            addresses = list(dict.fromkeys([packed(str(entry[4][0])) for entry in found]))[:MAX_ADDRESSES]
            self._result.append((name, [address for address in addresses if address]))
        except Exception:  # noqa: BLE001 - whatever it is, the loop must get an answer
            self._result.append((name, None))


class AllowList:
    """host, port: of the broker; operator: entries as check() takes them; peers: a function -> the addresses (texts)
    that the MQTT client has found itself; root: where /etc and /run are."""

    def __init__(self, host: str, port: int, operator: list, peers=None, root: str = "", proc: str = "/proc") -> None:
        self._root = root
        self.proc = proc
        self._port = port
        self._host = host
        self._peers = peers
        self._operator = [
            (*parse_network(row["address"]), row["reason"], parse_until(row["until"]) if "until" in row else 0)
            for row in operator
        ]
        clocks = [name for name in self._clock_names() if name != host]
        self.names = Names(dict([(host, port)] + [(name, 123) for name in clocks]))
        self._clocks = clocks
        self._vital = [parse_network(row["address"]) for row in operator if row.get("essential")]
        self._essential: list = []  # to whom connections lived when the response began
        self._had_dns = False
        self._dead_since_ms: int | None = None
        self._died = False
        self._look_due_ms = ticks_ms()
        self.active = False

    def lines(self) -> list:
        """For people: [(network, what passes, reason)], in the order of the rules."""
        found = []
        for network, prefix, protocol, port, reason in self._made():
            family = _socket.AF_INET if len(network) == 4 else _socket.AF_INET6
            text = _socket.inet_ntop(family, network) + ("" if prefix == 8 * len(network) else "/%d" % prefix)
            found.append((text, "%s %d" % ("tcp" if protocol == _TCP else "udp", port) if protocol else "all", reason))
        if not self.names.of(self._host) and not self._client_peers():
            found.append((self._host, "tcp %d" % self._port, "broker, once its name is looked up"))
        return found

    def entries(self) -> list:
        """-> [(network, prefix, protocol or 0, remote port or 0)]. Raises OSError while no address of the broker is
        known: a response would stop it, too."""
        self.turn()
        if not self.names.of(self._host) and not self._client_peers() and self.names.answered.get(self._host) is None:
            raise OSError(errno.EDESTADDRREQ, "allow-list: no address of the broker %s is known yet" % self._host)
        return list(dict.fromkeys([row[:4] for row in self._made()]))

    def turn(self) -> None:
        """To be called about once a second, whether a response is in force or not. Never waits."""
        self.names.turn(self.active)

    def began(self) -> None:
        """A response begins: what lives now must live on."""
        self.active = True
        self._essential = [whom for whom, alive in self._connections().items() if alive]
        self._had_dns = not self.names.literal and self.names.answered.get(self._host, False)
        self._dead_since_ms = None
        self._died = False

    def ended(self) -> None:
        self.active = False

    def watch(self) -> None:
        """To be called about once a second while a response is in force: does what lived when it began still live?"""
        self.turn()
        if self._had_dns and (self.names.silent(self._host) or not self.names.answered.get(self._host, True)):
            self._died = True
        began_ms = ticks_ms()
        if ticks_diff(began_ms, self._look_due_ms) < 0:
            return
        alive = self._connections() if self._essential else {}
        self._look_due_ms = ticks_add(began_ms, _SHARE * ticks_diff(ticks_ms(), began_ms))
        if all([alive.get(whom, False) for whom in self._essential]):
            self._dead_since_ms = None
        elif self._dead_since_ms is None:
            self._dead_since_ms = ticks_ms()
        elif ticks_diff(ticks_ms(), self._dead_since_ms) >= DEAD_AFTER_MS:
            self._died = True

    def essential(self) -> bool:
        """False where a connection to the broker or to an essential entry, or DNS, has died since the last response
        began."""
        if self.active:
            self.watch()
        return not self._died

    def _made(self) -> list:
        """[(network, prefix, protocol, port, reason)]"""
        now_s = epoch_s()
        found = [
            (network, prefix, 0, 0, reason)
            for network, prefix, reason, until in self._operator
            if not until or now_s < until  # also while the clock is not set
        ]
        for address in sorted(set(self.names.of(self._host) + self._client_peers())):
            found.append((address, 8 * len(address), _TCP, self._port, "broker"))
        for address in self._name_servers():
            for protocol, port in _DNS_PORTS:
                found.append((address, 8 * len(address), protocol, port, "DNS"))
        for address in self._gateways():
            found.append((address, 8 * len(address), 0, 0, "gateway"))
        for name in self._clocks:
            for address in sorted(self.names.of(name)):
                found.append((address, 8 * len(address), _UDP, 123, "NTP"))
        return found

    def _client_peers(self) -> list:
        return [address for address in [packed(text) for text in self._peers()] if address] if self._peers else []

    def _name_servers(self) -> list:
        found: dict = {}
        for path in RESOLV_FILES:
            for words in self._words(path):
                if words[0] == "nameserver" and len(words) > 1:
                    _keep(found, packed(words[1]))
        return list(found)

    def _gateways(self) -> list:
        """Of the default routes."""
        found: dict = {}
        for words in self._words("/net/route", self.proc):
            if len(words) > 7 and words[1] == words[7] == "00000000" and words[2] != "00000000":
                _keep(found, _hexadecimal(words[2], 4, native=True))
        for words in self._words("/net/ipv6_route", self.proc):
            if len(words) > 9 and words[0] == "0" * 32 and words[1] == "00" and words[9] != "lo":
                _keep(found, _hexadecimal(words[4], 16))
        return list(found)

    def _clock_names(self) -> list:
        """The time servers that are named in the usual files, at most MAX_SERVERS."""
        found: dict = {}
        for path in CLOCK_FILES:
            for words in self._words(path):
                if words[0] in ("server", "pool", "peer") and len(words) > 1:
                    names = words[1:2]
                elif words[0].startswith(("NTP=", "FallbackNTP=")):
                    names = [words[0].split("=", 1)[1], *words[1:]]
                else:
                    continue
                for name in names:
                    if name and len(name) < 254 and name.isprintable() and len(found) < MAX_SERVERS:
                        found[name] = None
        return list(found)

    def _words(self, path: str, root: "str | None" = None):
        """The lines of a small file, in words, without comments; nothing where it is missing."""
        try:
            with open((self._root if root is None else root) + path, "rb") as file:
                lines = file.read(_MAX_FILE_BYTES).decode("latin-1").split("\n")
        except OSError:
            return
        for line in lines[:_MAX_LINES]:
            words = line.split("#")[0].split(";")[0].split()
            if words:
                yield words

    def _connections(self) -> dict:
        """-> {whom: does any established TCP connection to it live}: None for the broker, else (network, prefix) of an
        essential entry."""
        brokers = set(self.names.of(self._host) + self._client_peers())
        port = b"%04X" % self._port
        found: dict = {}
        for address, remote_port, retransmits in established(self.proc):
            whose: list = [None] if address in brokers and remote_port == port else []
            whose += [entry for entry in self._vital if _within(address, *entry)]
            for whom in whose:
                found[whom] = found.get(whom, False) or retransmits < _RETRANSMITS
        return found


def _unmapped(address: bytes) -> bytes:
    return address[12:] if len(address) == 16 and address[:12] == _MAPPED else address


def _within(address: bytes, network: bytes, prefix: int) -> bool:
    shift = 8 * len(network) - prefix
    same = len(address) == len(network)
    return same and int.from_bytes(address, "big") >> shift == int.from_bytes(network, "big") >> shift


def _keep(found: dict, address: "bytes | None") -> None:
    """Into `found`, which has at most MAX_SERVERS: no loopback, which is free anyway, and no address of nobody."""
    if address and address[0] != 127 and any(address[:-1]) and len(found) < MAX_SERVERS:
        found[address] = None


def _hexadecimal(word: str, length: int, native: bool = False) -> "bytes | None":
    """native: in words of 32 bits as the processor has them, as /proc/net prints addresses."""
    try:
        data = bytes.fromhex(word)
    except ValueError:
        return None
    if len(data) != length:
        return None
    if native and sys.byteorder == "little":
        return b"".join([data[i : i + 4][::-1] for i in range(0, length, 4)])
    return data
