"""pcap and pcapng captures (gzip or not) -> one Trace a device, without any library.

Reads classic pcap (both byte orders, micro- and nanoseconds) and pcapng (sections, interfaces, packet blocks), of
Ethernet (with VLAN tags), raw IP, BSD loopback and Linux cooked links; IPv4 and IPv6; TCP, UDP and ICMP. Sources: the
libpcap file format (draft-ietf-opsawg-pcap), pcapng (draft-ietf-opsawg-pcapng), https://www.tcpdump.org/linktypes.html
"""

import heapq
import ipaddress
import math
import struct
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import IO

from ..format import LAST_S, TraceError, opened
from ..trace import Trace
from .network import ICMP, TCP, UDP, Recorder, Selection, busiest, is_local

# byte order, length of a tick, bytes that follow each record's header (of Kuznetzov's patched libpcap, long obsolete)
_PCAP_MAGICS = {
    b"\xa1\xb2\xc3\xd4": (">", 1e-6, 0),
    b"\xd4\xc3\xb2\xa1": ("<", 1e-6, 0),
    b"\xa1\xb2\x3c\x4d": (">", 1e-9, 0),
    b"\x4d\x3c\xb2\xa1": ("<", 1e-9, 0),
    b"\xa1\xb2\xcd\x34": (">", 1e-6, 8),
    b"\x34\xcd\xb2\xa1": ("<", 1e-6, 8),
}
_PCAPNG_MAGIC = b"\x0a\x0d\x0d\x0a"
_MAX_BLOCK_BYTES = 16 << 20
_ANSWER_WITHIN_S = 3.0  # an opening that nobody answers for so long has failed
_LATE_S = 1.0  # a packet that comes so late, or a clock that is put back so far, counts where it comes
_LATE_PACKETS = 4  # in a row, and it is the clock that went back
_MAX_FLOWS = 200_000  # remembered at a time; the oldest is forgotten, and counts as new when it speaks again
_SYN, _RST, _ACK = 0x02, 0x04, 0x10
_EXTENSIONS = (0, 43, 60)  # IPv6 hop-by-hop, routing, destination options


@dataclass(slots=True)
class Packet:
    t_s: float
    source: str
    target: str
    protocol: int
    source_port: int
    target_port: int
    tcp_flags: int
    length: int  # bytes of the IP packet on the wire


def read_frames(path: str) -> Iterator[tuple[float, int, bytes]]:
    """(t_s, link type, frame) of each packet. A file cut short in its last packet ends there; other damage raises
    TraceError."""
    with opened(path) as file:
        magic = file.read(4)
        if magic in _PCAP_MAGICS:
            yield from _pcap_frames(file, path, *_PCAP_MAGICS[magic])
        elif magic == _PCAPNG_MAGIC:
            yield from _pcapng_frames(file, path)
        else:
            raise TraceError(f"{path}: neither pcap nor pcapng (it begins with {magic.hex()})")


def _pcap_frames(
    file: IO[bytes], path: str, order: str, tick_s: float, more: int
) -> Iterator[tuple[float, int, bytes]]:
    head = file.read(20)
    if len(head) < 20:
        raise TraceError(f"{path}: the pcap header is cut short")
    link_type = struct.unpack(order + "I", head[16:20])[0] & 0xFFFF
    while len(record := file.read(16 + more)) == 16 + more:
        seconds, ticks, kept, _ = struct.unpack_from(order + "IIII", record)
        if kept > _MAX_BLOCK_BYTES:
            raise TraceError(f"{path}: a packet of {kept} bytes; the file is damaged")
        frame = file.read(kept)
        if len(frame) < kept:
            return
        yield seconds + ticks * tick_s, link_type, frame


def _pcapng_frames(file: IO[bytes], path: str) -> Iterator[tuple[float, int, bytes]]:
    order = "<"
    interfaces: list[tuple[int, float, float]] = []
    kind_raw = _PCAPNG_MAGIC
    last_s = 0.0
    while True:
        length_raw = file.read(4)
        if len(length_raw) < 4:
            return
        start = b""
        if kind_raw == _PCAPNG_MAGIC:
            start = file.read(4)
            order = ">" if start == b"\x1a\x2b\x3c\x4d" else "<"
            if start not in (b"\x1a\x2b\x3c\x4d", b"\x4d\x3c\x2b\x1a"):
                raise TraceError(f"{path}: a pcapng section without its byte-order mark")
            interfaces = []
        (kind,) = struct.unpack(order + "I", kind_raw)
        (length,) = struct.unpack(order + "I", length_raw)
        if length < 12 or length % 4 or length > _MAX_BLOCK_BYTES:
            raise TraceError(f"{path}: a block of {length} bytes; the file is damaged")
        body = start + file.read(length - 8 - len(start))
        if len(body) < length - 8:
            return
        body = body[:-4]  # the length again
        if kind == 1:
            interfaces.append(_interface(body, order, path))
        elif kind in (2, 3, 6):
            frame = _pcapng_packet(kind, body, order, interfaces, path, last_s)
            last_s = frame[0]
            if last_s:  # a simple packet before any time is known can't be put into a window
                yield frame
        kind_raw = file.read(4)
        if len(kind_raw) < 4:
            return


def _interface(body: bytes, order: str, path: str) -> tuple[int, float, float]:
    """-> link type, length of a tick, seconds to add to every time."""
    if len(body) < 8:
        raise TraceError(f"{path}: an interface block of {len(body)} bytes")
    link_type = struct.unpack_from(order + "H", body)[0]
    tick_s, offset_s = 1e-6, 0.0
    at = 8
    while at + 4 <= len(body):
        code, size = struct.unpack_from(order + "HH", body, at)
        if code == 9 and size == 1 and at + 4 < len(body):  # if_tsresol
            exponent = body[at + 4]
            tick_s = 2.0 ** -(exponent & 127) if exponent & 128 else 10.0**-exponent
        elif code == 14 and size == 8 and at + 12 <= len(body):  # if_tsoffset
            offset_s = float(struct.unpack_from(order + "q", body, at + 4)[0])
        if code == 0:
            break
        at += 4 + (size + 3) // 4 * 4
    return link_type, tick_s, offset_s


def _pcapng_packet(
    kind: int, body: bytes, order: str, interfaces: list[tuple[int, float, float]], path: str, last_s: float
) -> tuple[float, int, bytes]:
    if kind == 3:  # a simple packet has no time: that of the one before it
        if not interfaces or len(body) < 4:
            raise TraceError(f"{path}: a simple packet without its interface")
        kept = min(struct.unpack_from(order + "I", body)[0], len(body) - 4)
        return last_s, interfaces[0][0], body[4 : 4 + kept]
    if len(body) < 20:
        raise TraceError(f"{path}: a packet block of {len(body)} bytes")
    index, high, low, kept, _ = struct.unpack_from(order + "IIIII", body)
    if kind == 2:  # the obsolete packet block: the interface has 16 bits, then a count of drops
        (index,) = struct.unpack_from(order + "H", body)
    if index >= len(interfaces) or kept > len(body) - 20:
        raise TraceError(f"{path}: a packet of interface {index} with {kept} bytes; the file is damaged")
    link_type, tick_s, offset_s = interfaces[index]
    return (high << 32 | low) * tick_s + offset_s, link_type, body[20 : 20 + kept]


def _network_layer(link_type: int, frame: bytes) -> bytes | None:
    """The IP packet in a frame, None if it carries something else."""
    if link_type == 1:
        at = 12
        while frame[at : at + 2] in (b"\x81\x00", b"\x88\xa8"):
            at += 4
        return frame[at + 2 :] if frame[at : at + 2] in (b"\x08\x00", b"\x86\xdd") else None
    if link_type in (12, 14, 101, 228, 229):
        return frame
    if link_type in (0, 108):
        return frame[4:]
    if link_type == 113:
        return frame[16:] if frame[14:16] in (b"\x08\x00", b"\x86\xdd") else None
    if link_type == 276:
        return frame[20:] if frame[:2] in (b"\x08\x00", b"\x86\xdd") else None
    raise TraceError(f"link type {link_type} is not supported (Ethernet, raw IP, loopback and Linux cooked are)")


def parse_packet(t_s: float, link_type: int, frame: bytes) -> Packet | None:
    """A frame -> the packet, None for what is not IP or too short. Later fragments carry no ports: 0."""
    ip = _network_layer(link_type, frame)
    if not ip:
        return None
    first_fragment = True
    if ip[0] >> 4 == 4 and len(ip) >= 20:
        header = (ip[0] & 15) * 4
        length = struct.unpack_from(">H", ip, 2)[0] or len(ip)
        protocol = ip[9]
        first_fragment = not struct.unpack_from(">H", ip, 6)[0] & 0x1FFF
        source, target = ip[12:16], ip[16:20]
    elif ip[0] >> 4 == 6 and len(ip) >= 40:
        header = 40
        length = struct.unpack_from(">H", ip, 4)[0] + 40
        protocol = ip[6]
        source, target = ip[8:24], ip[24:40]
        while protocol in _EXTENSIONS and len(ip) >= header + 8:
            protocol, header = ip[header], header + (ip[header + 1] + 1) * 8
        if protocol == 44 and len(ip) >= header + 8:
            first_fragment = not struct.unpack_from(">H", ip, header + 2)[0] >> 3
            protocol, header = ip[header], header + 8
    else:
        return None
    source_port = target_port = tcp_flags = 0
    if first_fragment and protocol in (TCP, UDP) and len(ip) >= header + 4:
        source_port, target_port = struct.unpack_from(">HH", ip, header)
        if protocol == TCP and len(ip) > header + 13:
            tcp_flags = ip[header + 13]
    return Packet(
        t_s,
        str(ipaddress.ip_address(source)),
        str(ipaddress.ip_address(target)),
        protocol,
        source_port,
        target_port,
        tcp_flags,
        length,
    )


def read_packets(path: str) -> Iterator[Packet]:
    for t_s, link_type, frame in read_frames(path):
        if not 0 <= t_s <= LAST_S:
            raise TraceError(f"{path}: a packet at {t_s:g} s; the file is damaged")
        try:
            packet = parse_packet(t_s, link_type, frame)
        except TraceError as error:
            raise TraceError(f"{path}: {error}") from None
        if packet is not None:
            yield packet


def in_order(paths: Sequence[str]) -> Iterator[Packet]:
    """The packets of several captures in the order of time, in whatever order the files are named; of files that
    overlap, those of both as they come."""
    begins = sorted((next((p.t_s for p in read_packets(path)), math.inf), path) for path in paths)
    waiting = [(t_s, path) for t_s, path in begins if t_s < math.inf]
    heap: list[tuple[float, int, Packet, Iterator[Packet]]] = []
    number = 0
    while waiting or heap:
        while waiting and (not heap or waiting[0][0] <= heap[0][0]):
            packets = read_packets(waiting.pop(0)[1])
            packet = next(packets, None)
            if packet is not None:
                heapq.heappush(heap, (packet.t_s, number, packet, packets))
                number += 1
        if heap:
            _, of, packet, packets = heap[0]
            yield packet
            later = next(packets, None)
            if later is None:
                heapq.heappop(heap)
            else:
                heapq.heapreplace(heap, (later.t_s, of, later, packets))


class Clock:
    """Capture times -> times that never go back, as a device's own ticks don't. A late packet counts where it comes;
    after a step back of the capturing clock, time goes on from where it was."""

    def __init__(self) -> None:
        self.steps = 0
        self._offset_s = 0.0
        self._last_s = 0.0
        self._late: list[float] = []

    def at(self, raw_s: float) -> float:
        t_s = raw_s + self._offset_s
        if t_s >= self._last_s - _LATE_S:
            self._late.clear()
            self._last_s = max(self._last_s, t_s)
            return self._last_s
        self._late.append(raw_s)
        if len(self._late) > _LATE_PACKETS:  # not one that was held up: the clock itself went back
            self.steps += 1
            self._offset_s = self._last_s - self._late[0]
            self._late.clear()
            self._last_s = max(self._last_s, raw_s + self._offset_s)
        return self._last_s


def import_pcap(
    paths: Sequence[str], window_ms: int, selection: Selection | None = None, label: str = ""
) -> list[Trace]:
    """paths: captures, in any order -> a trace a device (by default of the local address seen most), every window
    labelled `label`."""
    chosen = selection or Selection()
    wanted = chosen.devices
    if not wanted:
        seen: Counter[str] = Counter()
        senders: set[str] = set()
        for path in paths:
            for p in read_packets(path):
                senders.add(p.source)
                seen.update(host for host in (p.source, p.target) if is_local(host))
        # a directed broadcast address never sends; where no local one does, the capture has one direction only
        wanted = busiest(Counter({h: n for h, n in seen.items() if h in senders}) or seen, paths[0])
    watchers = {address: _Device(address, name, window_ms, chosen) for address, name in wanted.items()}
    clock = Clock()
    last_s = 0.0
    for packet in in_order(paths):
        last_s = clock.at(packet.t_s)
        for address in {packet.source, packet.target}:
            if address in watchers:
                watchers[address].see(packet, last_s)
    for watcher in watchers.values():
        if not watcher.packets:
            raise TraceError(f"{paths[0]}: no packet of {watcher.address}")
        watcher.finish(last_s)
    notes = {"source": "pcap"} | ({"clock_steps_back": str(clock.steps)} if clock.steps else {})
    traces = [chosen.without_times(watcher.recorder.trace(notes)) for watcher in watchers.values()]
    if label:
        for trace in traces:
            trace.labels[:] = label
    return traces


class _Device:
    """Follows one device's flows as far as the counters need."""

    def __init__(self, address: str, name: str, window_ms: int, chosen: Selection) -> None:
        self.address = address
        self.recorder = Recorder(name, window_ms, chosen.max_gap_s)
        self._chosen = chosen
        self.packets = 0
        self._flows: dict[tuple[int, str, int, int], None] = {}
        self._opening: dict[tuple[int, str, int, int], float] = {}  # since when; in order of time

    def see(self, packet: Packet, t_s: float) -> None:
        outgoing = packet.source == self.address
        peer = packet.target if outgoing else packet.source
        if self._chosen.excludes(peer):
            return
        self._give_up(t_s)
        self.recorder.until(t_s)
        self.packets += 1
        own_port = packet.source_port if outgoing else packet.target_port
        peer_port = packet.target_port if outgoing else packet.source_port
        key = (packet.protocol, peer, own_port, peer_port)
        if packet.protocol == TCP:
            self._tcp(packet, key, outgoing, t_s)
        elif (packet.protocol == UDP or packet.protocol in ICMP) and key not in self._flows:
            self._remember(key)
            self.recorder.counters.connection(outgoing, packet.protocol, peer, packet.target_port)
        amounts = (packet.length, 0, 1, 0) if outgoing else (0, packet.length, 0, 1)
        self.recorder.counters.traffic(peer, *amounts)

    def _tcp(self, packet: Packet, key: tuple[int, str, int, int], outgoing: bool, t_s: float) -> None:
        flags = packet.tcp_flags
        if flags & _SYN and not flags & _ACK:
            if key not in self._opening:  # else a retransmission
                self.recorder.counters.connection(outgoing, TCP, key[1], packet.target_port)
                if outgoing:
                    self._opening[key] = t_s
        elif not outgoing and key in self._opening:
            del self._opening[key]
            if flags & _RST:
                self.recorder.counters.failed()

    def _remember(self, key: tuple[int, str, int, int]) -> None:
        if len(self._flows) >= _MAX_FLOWS:
            del self._flows[next(iter(self._flows))]
        self._flows[key] = None

    def _give_up(self, t_s: float) -> None:
        while self._opening:
            key, since_s = next(iter(self._opening.items()))
            if t_s - since_s < _ANSWER_WITHIN_S:
                return
            del self._opening[key]
            self.recorder.until(since_s + _ANSWER_WITHIN_S)
            self.recorder.counters.failed()

    def finish(self, t_s: float) -> None:
        self._give_up(t_s)
        self.recorder.until(t_s)
        self.recorder.until(self.recorder.next_end_s)
