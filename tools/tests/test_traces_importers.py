"""Importers: what others captured gives the windows that the device itself would have made."""

import gzip
import json
import struct
from pathlib import Path

import numpy as np
import pytest
from stonechat_tools.cli import main
from stonechat_tools.schemas import NETWORK_1
from stonechat_tools.traces.files import read_trace
from stonechat_tools.traces.format import TraceError
from stonechat_tools.traces.importers.counters_csv import Layout, import_csv, parse_columns
from stonechat_tools.traces.importers.network import Selection
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
    (named,) = import_zeek([str(path)], 10_000, Selection.of([f"{OTHER}=scanner"]))
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
        import_zeek([str(path)], 10_000, Selection.of(["10.0.0.1"]))
    with pytest.raises(TraceError, match="not an IP address"):
        Selection.of(["camera"])


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
    columns, _ = parse_columns("packets=packets,busy=%=share")
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
        ("t,t,n\n1,2,3\n2,3,4\n", Layout("t"), ":1: column 't' comes twice"),
        ("t,s,n\n1,1e17,3\n2,1e17,4\n", Layout("t", elapsed="s"), ":2: s is 1e"),
        ("t,n\n9999-12-31T23:00:00-02:00,3\n9999-12-31T23:00:00-03:00,4\n", Layout("t"), ":2: t: .* years 1 to 9999"),
    ],
)
def test_csv_mistakes(tmp_path: Path, text: str, layout: Layout, word: str) -> None:
    path = tmp_path / "c.csv"
    path.write_text(text)
    with pytest.raises(TraceError, match=word):
        import_csv(str(path), "x", layout)


@pytest.mark.parametrize("label", ["scan\r\nof us", 'scan "of", us', "scan\0of us", "\tscan of us", "scan\u2028of us"])
def test_a_label_of_any_text_can_be_read_again(tmp_path: Path, label: str) -> None:
    quoted = label.replace('"', '""')
    (tmp_path / "c.csv").write_text(f't,n,l\n1,2,"{quoted}"\n2,3,\n3,4,"{quoted}"\n', newline="")
    words = f"dataset import --format csv {tmp_path}/c.csv -o {tmp_path}/o.csv --time t --label-column l"
    assert main(words.split()) == 0
    assert [text.replace(";", "").split() for text in read_trace(tmp_path / "o.csv").labels][0] == ["scan", "of", "us"]


@pytest.mark.parametrize("name", ["x\ny", "x\ry", "x\0y", "x\udcff"])
@pytest.mark.parametrize("option", ["--device", "--schema"])
@pytest.mark.parametrize("ending", [".csv", ".csv.gz", ".parquet"])
def test_what_no_trace_can_hold_leaves_the_file_that_is_there(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str, option: str, ending: str
) -> None:
    (tmp_path / "c.csv").write_text("t,n\n1,2\n2,3\n3,4\n")
    out = tmp_path / ("o" + ending)
    out.write_bytes(b"mine")
    words = ["dataset", "import", "--format", "csv", str(tmp_path / "c.csv"), "-o", str(out), "--time", "t"]
    assert main([*words, option, name]) == 1
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and ("line breaks" in said or "NUL" in said) and out.read_bytes() == b"mine"


def test_a_column_with_decimals_is_kept_by_its_scale_or_refused(tmp_path: Path) -> None:
    path = tmp_path / "c.csv"
    path.write_text("t,celsius\n10,21.4\n20,21.5\n30,21.0\n")
    with pytest.raises(TraceError, match=r":2: celsius is '21.4'.*--columns celsius=UNIT=rate=10"):
        import_csv(str(path), "x", Layout("t"))
    columns, scales = parse_columns("celsius=C=level=10")
    trace = import_csv(str(path), "x", Layout("t", columns=columns, scales=scales))
    assert trace.deltas.tolist() == [[214], [215], [210]] and trace.schema.columns == (("celsius", "C/10", "level"),)
    assert trace.notes["scale of celsius"] == "10"
    columns, scales = parse_columns("celsius=C=level=2")
    with pytest.raises(TraceError, match=":2: celsius"):
        import_csv(str(path), "x", Layout("t", columns=columns, scales=scales))
    for word in ("n=1=level=0", "n=1=level=-1", "n=1=level=x", "n=%=share=10", "n=1=level=10=2", "n=1=level=²"):
        with pytest.raises(TraceError, match="--columns"):
            parse_columns(word)


@pytest.mark.parametrize(
    "times",
    [
        ["1760000000", "1760000010", "1760000020"],
        ["1760000000.5", "1760000010.5", "1760000020.5"],
        ["1760000000000", "1760000010000", "1760000020000"],
        ["1760000000000000", "1760000010000000", "1760000020000000"],
        ["1760000000000000000", "1760000010000000000", "1760000020000000000"],
        ["2025-10-09T08:53:20Z", "2025-10-09T08:53:30Z", "2025-10-09T08:53:40Z"],
        ["2025-10-09T10:53:20+02:00", "2025-10-09T10:53:30+02:00", "2025-10-09T10:53:40+02:00"],
        ["2025-10-09 08:53:20", "2025-10-09 08:53:30", "2025-10-09 08:53:40"],
        ["17600000000000", "17600000010000", "17600000020000"],
        ["0", "10", "20"],
    ],
)
def test_every_unit_of_time_and_a_byte_order_mark(tmp_path: Path, times: list[str]) -> None:
    path = tmp_path / "c.csv"
    text = "time,n\r\n" + "".join(f"{t},{n}\r\n" for t, n in zip(times, "567", strict=True))
    path.write_bytes(b"\xef\xbb\xbf" + text.encode())
    trace = import_csv(str(path), "x", Layout("time"))
    assert trace.window_ms == 10_000 and trace.deltas.tolist() == [[5], [6], [7]]
    assert (
        main(["dataset", "import", "--format", "csv", str(path), "-o", str(tmp_path / "o.csv"), "--time", "time"]) == 0
    )


def test_rows_of_almost_the_same_length_are_of_one_window(tmp_path: Path) -> None:
    out = []
    for name, step in (("a", 5.013), ("b", 5.017)):
        path = tmp_path / f"{name}.csv"
        path.write_text("t,n\n" + "".join(f"{1000 + i * step:.3f},{i}\n" for i in range(20)))
        out.append(str(tmp_path / f"{name}.out.csv"))
        arguments = ["dataset", "import", "--format", "csv", str(path), "-o", out[-1], "--time", "t", "--schema", "s"]
        assert main(arguments) == 0
    assert main(["dataset", "join", *out, "-o", str(tmp_path / "both.csv")]) == 0
    both = read_trace(tmp_path / "both.csv")
    assert both.window_ms == 5000 and len(both) == 40 and set(both.elapsed_ms.tolist()) <= set(range(5012, 5019))


def test_other_forms_of_the_time_are_no_counters(tmp_path: Path) -> None:
    path = tmp_path / "c.csv"
    rows = [
        f"{1760000000 + 10 * i},{1760000000000 + 10000 * i},2025-10-09T08:53:{20 + 10 * i}Z,{i}\n" for i in range(4)
    ]
    path.write_text("t,epoch_ms,iso,n\n" + "".join(rows))
    assert import_csv(str(path), "x", Layout("t")).schema.columns == (("n", "1", "rate"),)


def test_a_clock_that_is_put_back_in_a_csv(tmp_path: Path) -> None:
    times = [1000 + 10 * i for i in range(150)] + [1200 + 10 * i for i in range(150)]
    path = tmp_path / "c.csv"
    path.write_text("t,n\n" + "".join(f"{t},3\n" for t in times))
    trace = import_csv(str(path), "x", Layout("t"))
    assert len(trace) == 300 and set(trace.elapsed_ms.tolist()) == {10_000}


# --------------------------------------------------------------------- what captures do that a device never does


def capture(frames: list[tuple[float, bytes]]) -> bytes:
    out = struct.pack("<IHHIIII", 0xA1B2C3D4, 2, 4, 0, 0, 65535, 101)
    for t_s, packet in frames:
        out += struct.pack("<IIII", int(t_s), round(t_s % 1 * 1e6), len(packet), len(packet)) + packet
    return out


QUERY = ipv4(DEVICE, PEER, 17, udp(5000, 53, b"q" * 12))


def test_a_device_that_sleeps_for_hours_has_silent_windows(tmp_path: Path) -> None:
    path = tmp_path / "sleepy.pcap"
    path.write_bytes(capture([(1_760_000_000 + 25_200 * day + i / 10, QUERY) for day in range(4) for i in range(5)]))
    (trace,) = import_pcap([str(path)], 60_000)
    assert len(trace) == 3 * 420 + 1 and "gaps" not in trace.notes
    assert np.flatnonzero(trace.deltas[:, NAMES.index("pkts_out")]).tolist() == [0, 420, 840, 1260]
    (short,) = import_pcap([str(path)], 60_000, Selection.of(max_gap_s=3600.0))
    assert len(short) == 4 and short.notes["gaps"].startswith("3 of")
    assert short.deltas[:, NAMES.index("pkts_out")].tolist() == [5, 5, 5, 5]


def test_a_clock_that_steps_back_during_a_capture(tmp_path: Path) -> None:
    path = tmp_path / "step.pcap"
    times = [1_760_000_000 + i for i in range(3600)] + [1_760_000_600 + i for i in range(3600)]
    path.write_bytes(capture([(t, QUERY) for t in times]))
    (trace,) = import_pcap([str(path)], 60_000)
    assert len(trace) == 120 and trace.notes["clock_steps_back"] == "1"
    assert set(trace.deltas[2:-2, NAMES.index("pkts_out")].tolist()) <= set(range(55, 66))
    late = [(t + (-30.0 if t % 97 == 0 else 0.0), QUERY) for t in map(float, range(2000, 3200))]
    path.write_bytes(capture(late))
    (trace,) = import_pcap([str(path)], 60_000)
    assert len(trace) == 20 and "clock_steps_back" not in trace.notes


def test_captures_in_any_order(tmp_path: Path) -> None:
    paths = []
    for number in (2, 0, 1):
        path = tmp_path / f"part-{number}.pcap"
        path.write_bytes(capture([(5000.0 + 600 * number + i, QUERY) for i in range(600)]))
        paths.append(str(path))
    (trace,) = import_pcap(paths, 60_000)
    assert len(trace) == 30 and set(trace.deltas[:, NAMES.index("pkts_out")].tolist()) == {60}
    overlapping = tmp_path / "other.pcap"
    overlapping.write_bytes(capture([(5000.5 + i, QUERY) for i in range(1800)]))
    (trace,) = import_pcap([str(overlapping), *paths], 60_000)
    assert len(trace) == 30 and set(trace.deltas[1:, NAMES.index("pkts_out")].tolist()) == {120}


@pytest.mark.parametrize("broadcast", ["255.255.255.255", "192.168.1.255", "239.255.255.250"])
def test_a_broadcast_address_is_no_device(tmp_path: Path, broadcast: str) -> None:
    hosts = ["192.168.1.11", "192.168.1.12", DEVICE, DEVICE]
    frames = [(1000.0 + i, ipv4(hosts[i % 4], broadcast, 17, udp(68, 67, b"x"))) for i in range(200)]
    path = tmp_path / "c.pcap"
    path.write_bytes(capture(frames))
    assert import_pcap([str(path)], 10_000)[0].device_names == [DEVICE]


def test_obsolete_blocks_units_and_offsets_of_pcapng(tmp_path: Path) -> None:
    def section(kind: int, options: bytes, ticks_a_second: float, offset_s: int = 0) -> bytes:
        out = block("<", 0x0A0D0D0A, struct.pack("<IHHq", 0x1A2B3C4D, 1, 0, -1))
        out += block("<", 1, struct.pack("<HHI", 101, 0, 0) + options)
        for t_s, packet in PACKETS:
            ticks = round((t_s - offset_s) * ticks_a_second)
            index = struct.pack("<HH", 0, 0xFFFF) if kind == 2 else struct.pack("<I", 0)
            sizes = struct.pack("<IIII", ticks >> 32, ticks & 0xFFFFFFFF, len(packet), len(packet))
            out += block("<", kind, index + sizes + packet)
        return out

    def resolution(value: int) -> bytes:
        return struct.pack("<HHB3x", 9, 1, value)

    wanted = import_pcap([_written(tmp_path, CAPTURES["little.pcapng"])], 10_000)[0].deltas.tolist()
    moved = struct.pack("<HHq", 14, 8, 90)
    for data in (
        section(2, b"", 1e6),
        section(6, resolution(3), 1e3),
        section(6, resolution(9), 1e9),
        section(6, resolution(0x80 | 20), 2.0**20),
        section(6, moved, 1e6, 90),
    ):
        assert import_pcap([_written(tmp_path, data)], 10_000)[0].deltas.tolist() == wanted
    kuznetzov = struct.pack("<IHHIIII", 0xA1B2CD34, 2, 4, 0, 0, 65535, 101)
    for t_s, packet in PACKETS:
        kuznetzov += struct.pack("<IIIIQ", int(t_s), round(t_s % 1 * 1e6), len(packet), len(packet), 0) + packet
    assert import_pcap([_written(tmp_path, kuznetzov)], 10_000)[0].deltas.tolist() == wanted


def _written(folder: Path, data: bytes) -> str:
    path = folder / "capture"
    path.write_bytes(data)
    return str(path)


def zeek_line(t: object, **more: object) -> str:
    row = {"ts": t, "id.orig_h": DEVICE, "id.resp_h": PEER, "id.resp_p": 443, "proto": "tcp", "duration": 1.0}
    return json.dumps({**row, "orig_ip_bytes": 100, "resp_ip_bytes": 60, "orig_pkts": 1, "resp_pkts": 1} | more) + "\n"


@pytest.mark.parametrize("unit", [1, 1000, 1_000_000, 1_000_000_000, "iso"])
def test_zeek_times_of_every_unit(tmp_path: Path, unit: int | str) -> None:
    times = ["2026-01-05T10:00:00.250Z", "2026-01-05T10:01:00.250Z"]
    if isinstance(unit, int):
        times = [1767607200.25 * unit, 1767607260.25 * unit]  # type: ignore[list-item]
    text = "\ufeff" + zeek_line(times[1]) + zeek_line(times[0])  # and out of order
    (trace,) = import_zeek([_written(tmp_path, text.encode())], 30_000)
    assert trace.t_s[0] == pytest.approx(1767607230.25) and trace.deltas[:, 0].tolist() == [1, 0, 1]


def test_every_window_of_a_malicious_flow_is_labelled(tmp_path: Path) -> None:
    text = zeek_line(1000.0, label="Benign") + zeek_line(1065.0, duration=200.0, label="Malicious")
    text += zeek_line(1500.0, label="Benign")
    (trace,) = import_zeek([_written(tmp_path, text.encode())], 60_000)
    assert trace.labels.tolist() == ["benign", *["Malicious"] * 4, "benign", "benign", "benign", "benign"]


def test_peers_and_times_can_be_left_out(tmp_path: Path) -> None:
    text = "".join(zeek_line(1000.0 + 60 * i) + zeek_line(1010.0 + 60 * i, **{"id.resp_h": OTHER}) for i in range(5))
    path = _written(tmp_path, text.encode())
    assert set(import_zeek([path], 60_000)[0].deltas[:, 0].tolist()) == {2}
    for what in (OTHER, "198.51.100.0/24"):
        (trace,) = import_zeek([path], 60_000, Selection.of(exclude=[what]))
        assert set(trace.deltas[:, 0].tolist()) == {1}
    (trace,) = import_zeek([path], 60_000, Selection.of(exclude=["1970-01-01T00:17:40/1180"]))
    assert trace.t_s.tolist() == [1060.0, 1240.0, 1300.0]
    for bad in ("camera", "1.2.3.4/x", "0/1/2", "2000/"):
        with pytest.raises(TraceError, match="--exclude"):
            Selection.of(exclude=[bad])
    with pytest.raises(TraceError, match="no window"):
        import_zeek([path], 60_000, Selection.of(exclude=["0/99999"]))


def damaged_gzips() -> dict[str, bytes]:
    good = gzip.compress(as_csv().encode() * 50)
    broken = bytearray(good)
    broken[len(good) // 2] ^= 0xFF
    return {
        "cut short": good[: len(good) // 2],
        "a byte changed": bytes(broken),
        "wrong checksum": good[:-8] + b"\0" * 8,
        "only the magic": b"\x1f\x8b",
        "no deflate": good[:10] + b"\xff" * 50,
    }


BAD_TEXT = {
    "empty": b"",
    "binary": bytes(range(256)) * 4,
    "NUL": b"a,b\0,c\n1,2,\0\n2,3,4\n",
    "not UTF-8": "t,n\n1,é\n".encode("latin-1"),
    "UTF-16": "t,n\n1,2\n2,3\n".encode("utf-16"),
    "5,000 digits": b"t,n\n" + b"9" * 5000 + b",1\n2,3\n",
    "5,000 brackets": b"[" * 5000 + b"\n",
    "nested JSON": b'{"ts":' + b"[" * 5000 + b"]" * 5000 + b"}\n",
    "digits in JSON": b'{"ts":' + b"9" * 5000 + b"}\n",
    "infinite": zeek_line(1000.0, orig_pkts="1e400").encode(),
    "a float of 5,000 digits": zeek_line(1000.0, orig_pkts="9" * 5000).encode(),
    "an endless quote": b't,n\n"' + b"x" * 200_000,
    "one long line": b"x" * 3_000_000,
    "a folder's name in it": b"/etc\n",
}


@pytest.mark.parametrize("form", ["zeek", "pcap", "csv"])
@pytest.mark.parametrize("kind", [*BAD_TEXT, *damaged_gzips()])
def test_bad_input_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str], form: str, kind: str) -> None:
    path = _written(tmp_path, (BAD_TEXT | damaged_gzips())[kind])
    more = ["--time", "t"] if form == "csv" else []
    assert main(["dataset", "import", "--format", form, path, "-o", str(tmp_path / "o.csv"), *more]) == 1
    out, err = capsys.readouterr()
    assert out == "" and err.count("\n") == 1 and err.startswith(f"stonechat dataset: {path}") and len(err) < 500
    assert "unexpected" not in err and not (tmp_path / "o.csv").exists() and len(list(tmp_path.iterdir())) == 1


def test_an_attack_imported_as_a_device_of_its_own_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = _written(tmp_path, "".join(zeek_line(1000.0 + 60 * i) for i in range(5)).encode())
    arguments = ["dataset", "import", "--format", "zeek", path, "-o", str(tmp_path / "o.csv")]
    assert main([*arguments, "--label", "scan"]) == 0
    assert "every window of 192.168.1.10 is labelled as an attack" in capsys.readouterr().err
    assert main(arguments) == 0 and capsys.readouterr().err == ""
