"""The rules of a response, as messages for nf_tables: what is allowed, then what is limited or stopped.

Two tables called `stonechat`, in one batch. Table inet has the chains output and input; every packet on loopback is
free. Table netdev has the chain egress of all interfaces, for frames that a program writes with AF_PACKET past IP,
which output never sees; where a packet comes from IP, it was judged before. What is in force is an element of the set
`quarantine` or `throttle`, with the kernel's timeout: without it all rules are passed by.
"""

from struct import pack

from ..policy import QUARANTINE, THROTTLE
from . import nfnetlink as nf

TABLE = "stonechat"
SETS = {THROTTLE: "throttle", QUARANTINE: "quarantine"}
PASSED, STOPPED = "passed", "stopped"
KEYS = {nf.INET: (b"\x02", b"\x0a"), nf.NETDEV: (b"\x05",)}  # what `meta nfproto` is there
# What throttling leaves at least to those who are not on the allow-list: (number a second, burst)
LIMITS = {
    "connections_out": (8, 40),
    "connections_in": (2, 10),
    "datagrams": (20, 100),  # all that is not TCP
    "bytes_out": (125_000, 500_000),
}
FRAMES = (20, 50)  # of AF_PACKET
CLOCK = (1, 8)  # requests to time servers that are not on the allow-list

TCP, UDP, ICMP, ICMP6 = 6, 17, 1, 58
_FRAGMENT = 44  # the header of IPv6
_IPV4, _IPV6 = 2, 10
_PRIORITY = -150  # before the address translation of output, so that addresses are those that the program called
_ACCEPT, _DROP, _JUMP, _GOTO = 1, 0, -3, -4
_EQUAL, _DIFFERS, _LESS, _AT_MOST, _AT_LEAST = 0, 1, 2, 3, 5
_LINK, _NETWORK, _TRANSPORT = 0, 1, 2
_META_PROTOCOL, _META_INPUT_TYPE, _META_OUTPUT_TYPE, _META_USER = 1, 8, 9, 10
_META_ROUTE_CLASS, _META_FAMILY, _META_TRANSPORT = 13, 15, 16
_LOOPBACK, _ETHERNET = pack("=H", 772), pack("=H", 1)  # linux/if_arp.h
_IP, _IP6 = b"\x08\x00", b"\x86\xdd"
_TAGS = (b"\x81\x00", b"\x88\xa8")
_SET_TIMEOUT = 0x10


def _expression(name: str, *data: bytes) -> bytes:
    return nf.nested(1, nf.text(1, name), nf.nested(2, *data))


def _meta(key: int) -> bytes:
    return _expression("meta", nf.u32(1, 1), nf.u32(2, key))


def _bytes(base: int, offset: int, length: int) -> bytes:
    return _expression("payload", nf.u32(1, 1), nf.u32(2, base), nf.u32(3, offset), nf.u32(4, length))


def _is(value: bytes, how: int = _EQUAL) -> bytes:
    return _expression("cmp", nf.u32(1, 1), nf.u32(2, how), nf.nested(3, nf.attribute(1, value)))


def _masked(mask: bytes) -> bytes:
    zero = nf.nested(5, nf.attribute(1, bytes(len(mask))))
    return _expression(
        "bitwise", nf.u32(1, 1), nf.u32(2, 1), nf.u32(3, len(mask)), nf.nested(4, nf.attribute(1, mask)), zero
    )


def _within(action: int) -> bytes:
    """While `action` is in force."""
    return _meta(_META_FAMILY) + _expression("lookup", nf.text(1, SETS[action]), nf.u32(2, 1))


def _limit(most: tuple, over: bool = True, of_bytes: bool = False) -> bytes:
    rate, burst = most
    return _expression(
        "limit", nf.u64(1, rate), nf.u64(2, 1), nf.u32(3, burst), nf.u32(4, int(of_bytes)), nf.u32(5, int(over))
    )


def _count(name: str) -> bytes:
    return _expression("objref", nf.u32(1, nf.COUNTER), nf.text(2, name))


def _verdict(code: int, chain: str = "") -> bytes:
    where = nf.text(2, chain) if chain else b""
    return _expression("immediate", nf.u32(1, 0), nf.nested(2, nf.nested(2, nf.u32(1, code), where)))


_STOP = _count(STOPPED) + _verdict(_DROP)
_PASS = _count(PASSED) + _verdict(_ACCEPT)
_FREE = _verdict(_ACCEPT)


def _transport(protocol: int) -> bytes:
    return _meta(_META_TRANSPORT) + _is(bytes((protocol,)))


def _ports(source: int, target: int) -> bytes:
    """0: any."""
    return b"".join(
        [_bytes(_TRANSPORT, at, 2) + _is(pack("!H", port)) for at, port in ((0, source), (2, target)) if port]
    )


def _family(version: int, frames: bool) -> bytes:
    if frames:
        return _meta(_META_PROTOCOL) + _is(_IP if version == 4 else _IP6)
    return _meta(_META_FAMILY) + _is(bytes((_IPV4 if version == 4 else _IPV6,)))


def _address(network: bytes, prefix: int, source: bool) -> bytes:
    length = len(network)
    offset = (12 if source else 16) if length == 4 else (8 if source else 24)
    found = _bytes(_NETWORK, offset, length)
    if prefix < 8 * length:
        found += _masked(((1 << prefix) - 1 << 8 * length - prefix).to_bytes(length, "big"))
    return found + _is(network)


def _later_fragment(version: int) -> bytes:
    """A fragment without the ports, which are in the first one."""
    if version == 4:
        return _bytes(_NETWORK, 6, 2) + _masked(b"\x1f\xff") + _is(bytes(2), _DIFFERS)
    header = nf.attribute(2, bytes((_FRAGMENT,)))
    place = _expression("exthdr", nf.u32(1, 1), header, nf.u32(3, 2), nf.u32(4, 2))
    return place + _masked(b"\xff\xf8") + _is(bytes(2), _DIFFERS)


def allowed(entries: list, inward: bool, frames: bool = False) -> list:
    """The rules of a chain that lets pass what is on the allow-list and what keeps the device on its network: DHCP,
    IPv6 neighbours, ICMP errors on their way in, the clock within limits. frames: for table netdev."""
    rules = []
    for network, prefix, protocol, port in entries:
        match = _family(4 if len(network) == 4 else 6, frames) + _address(network, prefix, inward)
        if protocol:
            match += _transport(protocol) + (_ports(port, 0) if inward else _ports(0, port))
        rules.append(match + _FREE)
        version = 4 if len(network) == 4 else 6
        if protocol == UDP and (frames or inward and version == 6):  # a long answer; where IP puts it together later
            whose = _family(version, frames) + _address(network, prefix, inward)
            rules.append(whose + _transport(UDP) + _later_fragment(version) + _FREE)
    for version, client, server in ((4, 68, 67), (6, 546, 547)):  # DHCP
        ports = _ports(server, client) if inward else _ports(client, server)
        rules.append(_family(version, frames) + _transport(UDP) + ports + _FREE)
    kind = _bytes(_TRANSPORT, 0, 1)
    for least, most in ((130, 137), (143, 143)):  # neighbours, routers, groups
        rules.append(_transport(ICMP6) + kind + _is(bytes((least,)), _AT_LEAST) + _is(bytes((most,)), _AT_MOST) + _FREE)
    if inward:
        for code in (3, 11, 12):  # unreachable (and too large), time exceeded, a wrong parameter
            rules.append(_transport(ICMP) + kind + _is(bytes((code,))) + _FREE)
        rules.append(_transport(ICMP6) + kind + _is(bytes((4,)), _AT_MOST) + _FREE)
    clock = _ports(123, 0) if inward else _ports(0, 123)
    rules.append(_transport(UDP) + clock + _limit(CLOCK, over=False) + _FREE)
    return rules


def _beginning_tcp() -> bytes:
    return _transport(TCP) + _bytes(_TRANSPORT, 13, 1) + _masked(b"\x12") + _is(b"\x02")  # SYN without ACK


def chains(entries: list, limits: dict) -> dict:
    """Table inet -> {chain: its rules}; those that are jumped to come first. limits: as LIMITS."""
    found = {}
    for inward, name in ((False, "out"), (True, "in")):
        allow = _verdict(_JUMP, "allow_" + name)
        found["allow_" + name] = allowed(entries, inward)
        found["quarantine_" + name] = [allow, _STOP]
        stops = [_beginning_tcp() + _limit(limits["connections_" + name]) + _STOP]
        if not inward:
            other = _meta(_META_TRANSPORT) + _is(bytes((TCP,)), _DIFFERS)
            stops.append(other + _limit(limits["datagrams"]) + _STOP)
            stops.append(_limit(limits["bytes_out"], of_bytes=True) + _STOP)
        found["throttle_" + name] = [allow, *stops, _PASS]
        found[name + "put"] = [
            _meta(_META_INPUT_TYPE if inward else _META_OUTPUT_TYPE) + _is(_LOOPBACK) + _FREE,
            _within(QUARANTINE) + _verdict(_GOTO, "quarantine_" + name),
            _within(THROTTLE) + _verdict(_GOTO, "throttle_" + name),
        ]
    return found


def frame_chains(entries: list, routed: bool) -> dict:
    """Table netdev -> {chain: its rules}. routed: whether the kernel can say which packets come from IP; without,
    frames are stopped but not limited.

    The type that counts is the one in the frame: the one that the program declares may be another. Frames that are
    neither IPv4 nor IPv6 pass (802.1X, LLDP, a field bus)."""
    link_type = _bytes(_LINK, 12, 2)
    ethernet = _meta(_META_OUTPUT_TYPE) + _is(_ETHERNET)
    frames = allowed(entries, False, frames=True)
    if routed:
        frames.append(_within(THROTTLE) + _limit(FRAMES, over=False) + _PASS)
    for outer in (_IP, _IP6):
        frames.append(ethernet + link_type + _is(outer) + _STOP)
        frames.append(_meta(_META_PROTOCOL) + _is(outer) + _STOP)
    for tag in _TAGS:
        for inner in (_IP, _IP6, *_TAGS):
            frames.append(ethernet + link_type + _is(tag) + _bytes(_LINK, 16, 2) + _is(inner) + _STOP)
    frames.append(_meta(_META_OUTPUT_TYPE) + _is(_ETHERNET, _DIFFERS) + _STOP)
    written = _meta(_META_USER) + _is(bytes(4), _AT_LEAST)  # by a program here: what is only handed on has no owner
    egress = [_meta(_META_ROUTE_CLASS) + _is(bytes(4), _AT_LEAST) + _FREE] if routed else []
    egress.append(_within(QUARANTINE) + written + _verdict(_GOTO, "frames"))
    if routed:
        egress.append(_within(THROTTLE) + written + _verdict(_GOTO, "frames"))
    return {"frames": frames, "egress": egress}


def _hook(name: str, devices: list) -> bytes:
    number = {"output": 3, "input": 1, "egress": 1}[name]
    where = [nf.nested(4, *[nf.text(1, device) for device in devices])] if devices else []
    hook = nf.nested(4, nf.u32(1, number), nf.u32(2, _PRIORITY), *where)
    return hook + nf.text(7, "filter") + nf.u32(5, _ACCEPT)


def add_table(batch: nf.Batch, family: int, found: dict, devices: list, action: int, timeout_ms: int) -> int:
    """Into `batch`: the table made anew, with `action` in force for timeout_ms -> the number of its rules."""
    delete_table(batch, family)
    table = nf.text(1, TABLE)
    batch.add("table", nf.NEW_TABLE, family, table)
    for name in (PASSED, STOPPED):
        batch.add(
            "counter " + name, nf.NEW_OBJECT, family, table, nf.text(2, name), nf.u32(3, nf.COUNTER), nf.nested(4)
        )
    for kind, name in SETS.items():
        parts = (nf.text(2, name), nf.u32(3, _SET_TIMEOUT), nf.u32(4, 2), nf.u32(5, 1), nf.u32(10, kind))
        batch.add("set " + name, nf.NEW_SET, family, table, *parts)
    for name in found:
        hook = _hook(name, devices) if name in ("output", "input", "egress") else b""
        batch.add("chain " + name, nf.NEW_CHAIN, family, table, nf.text(3, name), hook)
    for name, rules in found.items():
        for rule in rules:
            batch.add("rule in " + name, nf.NEW_RULE, family, table, nf.text(2, name), nf.nested(4, rule))
    keys = [nf.nested(1, nf.nested(1, nf.attribute(1, key)), nf.u64(4, timeout_ms)) for key in KEYS[family]]
    batch.add("timeout", nf.NEW_ELEMENT, family, table, nf.text(2, SETS[action]), nf.nested(3, *keys))
    return sum([len(rules) for rules in found.values()])


def delete_table(batch: nf.Batch, family: int) -> None:
    """Whether it is there or not."""
    batch.add("table", nf.NEW_TABLE, family, nf.text(1, TABLE))
    batch.add("table", nf.DELETE_TABLE, family, nf.text(1, TABLE))
