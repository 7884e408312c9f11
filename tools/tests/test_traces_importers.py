"""Importers: what others captured gives the windows that the device itself would have made."""

import gzip
import json
import struct
from pathlib import Path

import pytest
from stonechat_tools.cli import main
from stonechat_tools.traces.files import read_trace
from stonechat_tools.traces.format import TraceError
from stonechat_tools.traces.importers.counters_csv import Layout, import_csv, parse_columns
from stonechat_tools.traces.importers.network import NETWORK_1
from stonechat_tools.traces.importers.pcap import import_pcap, parse_packet, read_frames
from stonechat_tools.traces.importers.zeek import import_zeek
from stonechat_tools.traces.trace import Trace

DATA = Path(__file__).parents[3] / "shared" / "data"
NAMES = [column[0] for column in NETWORK_1.columns]
DEVICE, PEER, OTHER = "192.168.1.10", "203.0.113.7", "198.51.100.9"


def window(trace: Trace, i: int) -> dict[str, int]:
    return dict(zip(NAMES, trace.deltas[i].tolist(), strict=True))


# ---------------------------------------------------------------------------------------------------------------- zeek

FIELDS = "ts uid id.orig_h id.orig_p id.resp_h id.resp_p proto duration orig_bytes resp_bytes conn_state orig_pkts "
FIELDS += "orig_ip_bytes resp_pkts resp_ip_bytes"
FLOWS = [
    (1000.0, "C1", DEVICE, 40000, PEER, 443, "tcp", 40.0, 100, 50, "SF", 10, 1000, 8, 4000),
    (1005.0, "C2", DEVICE, 40001, OTHER, 23, "tcp", "-", "-", "-", "S0", 1, 60, 0, 0),
    (1012.0, "C3", OTHER, 5353, DEVICE, 53, "udp", 0.5, 20, 20, "SF", 1, 48, 1, 64),
]


def tsv() -> str:
    head = "#separator \\x09\n#fields\t" + "\t".join(FIELDS.split()) + "\n#types\ttime\n"
    return head + "".join("\t".join(map(str, flow)) + "\n" for flow in FLOWS) + "#close\n"


def json_lines() -> str:
    rows = [dict(zip(FIELDS.split(), flow, strict=True)) for flow in FLOWS]
    return "".join(json.dumps({key: value for key, value in row.items() if value != "-"}) + "\n" for row in rows)


def as_csv() -> str:
    return ",".join(FIELDS.split()) + "\n" + "".join(",".join(map(str, flow)) + "\n" for flow in FLOWS)


@pytest.mark.parametrize("text", [tsv(), json_lines(), as_csv()], ids=["tsv", "json", "csv"])
def test_zeek_flows_are_spread_over_their_life(tmp_path: Path, text: str) -> None:
    path = tmp_path / "conn.log.gz"
    path.write_bytes(gzip.compress(text.encode()))
    (trace,) = import_zeek([str(path)], 10_000)
    assert trace.device_names == [DEVICE] and len(trace) == 5
    first, second = window(trace, 0), window(trace, 1)
    assert (first["conn_out"], first["conn_failed"], first["bytes_out"], first["bytes_in"]) == (2, 1, 250 + 60, 1000)
    assert (first["peers"], first["new_peers"], first["dports"]) == (2, 2, 2)
    assert (second["conn_out"], second["udp_flows"], second["bytes_out"]) == (0, 1, 250 + 64)
    assert (second["new_peers"], second["dports"], second["pkts_in"]) == (0, 0, 2 + 1)
    totals = dict(zip(NAMES, trace.deltas.sum(axis=0).tolist(), strict=True))
    assert (totals["bytes_out"], totals["bytes_in"], totals["pkts_out"]) == (1000 + 60 + 64, 4000 + 48, 10 + 1 + 1)
    assert first["top_peer"] == 1250 * 25600 // 1310 and first["mean_out"] == 310 // 3
    (named,) = import_zeek([str(path)], 10_000, [f"{OTHER}=scanner"])
    assert named.device_names == ["scanner"] and window(named, 0)["conn_in"] == 1


def test_zeek_mistakes(tmp_path: Path) -> None:
    path = tmp_path / "conn.log"
    for text, word in (
        ("a,b\n1,2\n", ":1: not a conn log"),
        (as_csv() + "1,2\n", ":5: 2 cells"),
        (as_csv().replace("1000.0", "now"), ":2:"),
        (as_csv().replace(PEER, "a host"), ":2:"),
        (tsv().splitlines()[1], "no flows"),
        ("{broken\n", ":1: not JSON"),
    ):
        path.write_text(text)
        with pytest.raises(TraceError, match=word):
            import_zeek([str(path)], 10_000)
    path.write_text(as_csv())
    with pytest.raises(TraceError, match="no flow of 10.0.0.1"):
        import_zeek([str(path)], 10_000, ["10.0.0.1"])
    with pytest.raises(TraceError, match="not an IP address"):
        import_zeek([str(path)], 10_000, ["camera"])


@pytest.mark.skipif(not DATA.is_dir(), reason="needs ../shared/data")
def test_iot23_turns_malicious_when_the_device_is_infected(tmp_path: Path) -> None:
    out = tmp_path / "hakai.csv.gz"
    log = DATA / "iot23" / "CTU-Malware-Capture-8-1-labeled.csv.gz"
    assert main(["dataset", "import", "--format", "zeek", str(log), "-o", str(out), "--window", "60"]) == 0
    trace = read_trace(out)
    assert trace.device_names == ["192.168.100.113"]
    assert trace.benign[:68].all() and not trace.benign[68:].any()


# ---------------------------------------------------------------------------------------------------------------- pcap


def ipv4(source: str, target: str, protocol: int, body: bytes, fragment: int = 0) -> bytes:
    addresses = bytes(map(int, source.split("."))) + bytes(map(int, target.split(".")))
    return struct.pack(">BBHHHBBH", 0x45, 0, 20 + len(body), 1, fragment, 64, protocol, 0) + addresses + body


def tcp(source_port: int, target_port: int, flags: int, data: bytes = b"") -> bytes:
    return struct.pack(">HHIIBBHHH", source_port, target_port, 0, 0, 0x50, flags, 0, 0, 0) + data


def udp(source_port: int, target_port: int, data: bytes = b"") -> bytes:
    return struct.pack(">HHHH", source_port, target_port, 8 + len(data), 0) + data


SYN, SYN_ACK, ACK, RST = 0x02, 0x12, 0x10, 0x14
PACKETS = [
    (100.0, ipv4(DEVICE, PEER, 6, tcp(40000, 443, SYN))),
    (100.1, ipv4(PEER, DEVICE, 6, tcp(443, 40000, SYN_ACK))),
    (100.2, ipv4(DEVICE, PEER, 6, tcp(40000, 443, ACK, b"x" * 100))),
    (101.0, ipv4(DEVICE, OTHER, 6, tcp(40001, 23, SYN))),
    (101.1, ipv4(OTHER, DEVICE, 6, tcp(23, 40001, RST))),  # refused
    (102.0, ipv4(DEVICE, OTHER, 6, tcp(40002, 80, SYN))),  # never answered, and sent again
    (103.0, ipv4(DEVICE, OTHER, 6, tcp(40002, 80, SYN))),
    (104.0, ipv4(DEVICE, PEER, 17, udp(5000, 53, b"q" * 12))),
    (104.1, ipv4(PEER, DEVICE, 17, udp(53, 5000, b"a" * 60))),
    (112.0, ipv4(PEER, DEVICE, 6, tcp(50000, 22, SYN))),
    (119.0, ipv4(DEVICE, PEER, 1, b"\x08\0\0\0\0\0\0\0")),
]


def pcap(order: str = "<", nanoseconds: bool = False, link_type: int = 1) -> bytes:
    out = struct.pack(order + "IHHIIII", 0xA1B23C4D if nanoseconds else 0xA1B2C3D4, 2, 4, 0, 0, 65535, link_type)
    for t_s, packet in PACKETS:
        frame = packet if link_type == 101 else b"\0" * 12 + b"\x08\x00" + packet
        ticks = round(t_s % 1 * (1e9 if nanoseconds else 1e6))
        out += struct.pack(order + "IIII", int(t_s), ticks, len(frame), len(frame)) + frame
    return out


def block(order: str, kind: int, body: bytes) -> bytes:
    body += b"\0" * (-len(body) % 4)
    length = struct.pack(order + "I", len(body) + 12)
    return struct.pack(order + "I", kind) + length + body + length


def pcapng(order: str = "<") -> bytes:
    out = block(order, 0x0A0D0D0A, struct.pack(order + "IHHq", 0x1A2B3C4D, 1, 0, -1))
    out += block(order, 1, struct.pack(order + "HHI", 101, 0, 0) + struct.pack(order + "HHB3xHH", 9, 1, 9, 0, 0))
    out += block(order, 5, b"\0" * 12)  # statistics: skipped
    for t_s, packet in PACKETS:
        ticks = round(t_s * 1e9)
        head = struct.pack(order + "IIIII", 0, ticks >> 32, ticks & 0xFFFFFFFF, len(packet), len(packet))
        out += block(order, 6, head + packet)
    return out


CAPTURES = {
    "little.pcap": pcap("<"),
    "big-nano.pcap": pcap(">", True),
    "raw.pcap": pcap("<", False, 101),
    "little.pcapng": pcapng("<"),
    "big.pcapng": pcapng(">"),
}


@pytest.mark.parametrize("name", CAPTURES)
def test_pcap_windows(tmp_path: Path, name: str) -> None:
    path = tmp_path / (name + ".gz")
    path.write_bytes(gzip.compress(CAPTURES[name]))
    (trace,) = import_pcap([str(path)], 10_000, label="recorded")
    assert trace.device_names == [DEVICE] and len(trace) == 2 and set(trace.labels) == {"recorded"}
    first, second = window(trace, 0), window(trace, 1)
    assert (first["conn_out"], first["conn_failed"], first["udp_flows"], first["conn_in"]) == (3, 2, 1, 0)
    assert (first["pkts_out"], first["pkts_in"]) == (6, 3)
    assert first["bytes_out"] == 40 * 4 + 140 + 40 and first["bytes_in"] == 40 + 40 + 88
    assert (first["peers"], first["new_peers"], first["dports"]) == (2, 2, 4)
    assert (second["conn_in"], second["icmp_flows"], second["conn_out"], second["new_peers"]) == (1, 1, 0, 0)


def test_vlan_ipv6_and_fragments() -> None:
    six = struct.pack(">IHBB", 6 << 28, 32, 0, 64) + b"\xfd" + b"\0" * 14 + b"\x01" + b"\xfd" + b"\0" * 14 + b"\x02"
    six += struct.pack(">BB6x", 17, 0) + udp(5000, 53, b"x" * 16)
    packet = parse_packet(1.0, 1, b"\0" * 12 + b"\x81\x00\x00\x05\x86\xdd" + six)
    assert packet is not None and (packet.source, packet.target_port, packet.length) == ("fd00::1", 53, 72)
    later = parse_packet(1.0, 101, ipv4(DEVICE, PEER, 17, b"\0" * 24, fragment=100))
    assert later is not None and later.source_port == later.target_port == 0
    assert parse_packet(1.0, 1, b"\0" * 12 + b"\x08\x06" + b"\0" * 28) is None  # ARP
    assert parse_packet(1.0, 101, b"\x45\x00") is None
    cooked = parse_packet(1.0, 113, b"\0" * 14 + b"\x08\x00" + PACKETS[0][1])
    assert cooked is not None and cooked.tcp_flags == SYN
    with pytest.raises(TraceError, match="link type 127"):
        parse_packet(1.0, 127, b"\0" * 40)


@pytest.mark.parametrize("name", CAPTURES)
def test_damaged_captures_end_or_are_refused(tmp_path: Path, name: str) -> None:
    data = CAPTURES[name]
    path = tmp_path / name
    for cut in range(0, len(data), 7):
        path.write_bytes(data[:cut])
        try:
            frames = list(read_frames(str(path)))
        except TraceError:
            continue
        assert len(frames) <= len(PACKETS)
    path.write_bytes(data[:-3])
    assert len(list(read_frames(str(path)))) >= len(PACKETS) - 1
    path.write_bytes(b"GIF89a")
    with pytest.raises(TraceError, match="neither pcap nor pcapng"):
        list(read_frames(str(path)))


# ----------------------------------------------------------------------------------------------------------------- csv


def test_counts_per_row_and_cumulative_agree(tmp_path: Path) -> None:
    counts = [5, 7, 0, 12]
    rows = "".join(f"{10 * (i + 1)},{count},50.5\n" for i, count in enumerate(counts))
    (tmp_path / "counts.csv").write_text("time,packets,busy\n" + rows)
    total = 100
    rows = "0,100,50.5\n"
    for i, count in enumerate(counts):
        total += count
        rows += f"{10 * (i + 1)},{total},50.5\n"
    (tmp_path / "total.csv").write_text("time,packets,busy\n" + rows)
    columns = parse_columns("packets=packets,busy=%=share")
    one = import_csv(str(tmp_path / "counts.csv"), "router-1", Layout("time", columns=columns))
    two = import_csv(str(tmp_path / "total.csv"), "router-1", Layout("time", columns=columns, cumulative=True))
    assert one.deltas.tolist() == two.deltas.tolist() == [[count, 12928] for count in counts]
    assert one.window_ms == two.window_ms == 10_000 and one.schema.id == two.schema.id


def test_elapsed_labels_and_dropped_rows(tmp_path: Path) -> None:
    path = tmp_path / "c.csv"
    path.write_text("t,n,s,what\n1000,5,5.0,benign\n9000,6,5.1,scan\n30000,7,20.0,benign\n36000,8,4.9,benign\n")
    layout = Layout("t", 1e-3, elapsed="s", label="what")
    trace = import_csv(str(path), "x", layout, "pump")
    assert trace.labels.tolist() == ["benign", "scan", "benign"]  # the row of 20 s is longer than 1.5 windows
    assert trace.deltas.tolist() == [[5], [6], [8]] and trace.elapsed_ms.tolist() == [5000, 5100, 4900]
    assert trace.notes["dropped"] == "1" and trace.t_s.tolist() == [1.0, 9.0, 36.0]


@pytest.mark.parametrize(
    ("text", "layout", "word"),
    [
        ("t,n\n1,2\n2,x\n", Layout("t"), ":3: n is 'x'"),
        ("t,n\n1,2\n2,-1\n", Layout("t"), ":3: n is -1"),
        ("t,n\n1,2\n1,3\n", Layout("t"), ":3: t does not grow"),
        ("t,n\n1,2\n", Layout("t"), "1 rows"),
        ("t,n\n1,2\n2,3\n", Layout("when"), "no column 'when'"),
        ("t,n\n1,2\n2,3\n", Layout("t", elapsed="n", columns=[("m", "1", "rate")]), "no column 'm'"),
        ("t,n,s\n1,2,1\n2,3,0\n", Layout("t", elapsed="s"), ":3: s is 0"),
        ("t,n\n1,2\n2,101\n", Layout("t", columns=[("n", "%", "share")]), ":3: n is 101"),
    ],
)
def test_csv_mistakes(tmp_path: Path, text: str, layout: Layout, word: str) -> None:
    path = tmp_path / "c.csv"
    path.write_text(text)
    with pytest.raises(TraceError, match=word):
        import_csv(str(path), "x", layout)
