"""Loaders of the suite's recordings: each gives traces of the schema that its columns make.

    pi-spectrum/DEVICE/   samples_WHAT_DATE_50s.csv.gz; WHAT is normal... or an attack (map-experiment)
    pi3-malware/          ...normal... or an attack in the file's name, 5 s windows (FedRL-RPi3)
    iot-lan/              DEVICE_60s.csv.gz, benign windows of a minute (IoTEnsemble)
    iot23/                Zeek conn logs as CSV with labels (Stratosphere IoT-23)
    ipcam/                Joy flows as JSON lines, benign and anomaly-... (NEMEA-SIoT)

What a folder holds is found by its files, not by a list here: other captures of the same kinds are read as well.
Anybody's captures are described by a manifest, a TOML file; its paths are traces (`stonechat dataset import`), from its
folder:

    [[device]]
    set = "pumps"                              # heading in the report (default: own)
    name = "pump-1"
    benign = ["day-1.csv.gz", "day-2.csv.gz"]  # sessions in the order of time
    train = ["day-1.csv.gz"]                   # those that the model is made from (default: the first)
    attacks = {scan = "scan.csv.gz"}           # recordings of attacks on this device
    overlays = {mirai = "mirai.csv.gz"}        # traffic that is laid over its own last benign windows
"""

import csv
import gzip
import json
import re
from collections import defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from stonechat.errors import ConfigError, StonechatError
from stonechat.features import RATE
from stonechat.schema import Schema
from stonechat.window import DELTA_MAX

from stonechat_tools.console import clipped, read_toml
from stonechat_tools.traces.files import read_trace
from stonechat_tools.traces.trace import Trace, make_trace

FLOW_COLUMNS = (
    "conns", "out", "peers", "ports", "srcports", "fail", "tcp", "udp", "newpp", "bo", "bi", "po", "pi",
)  # fmt: skip
FLOW_SCHEMA = Schema("flows-60s", tuple((name, "1", RATE) for name in FLOW_COLUMNS))
_FIRST_EVENT = "alarmtimer:alarmtimer_fired"  # from here on a Pi recording's columns are kernel-event counts
_INTERFACE = ("iface0RX", "iface0TX")
_FAILED = {"S0", "REJ", "RSTOS0", "RSTRH", "SH", "SHR", "OTH"}


class DatasetError(StonechatError):
    """The recordings can't be read."""


@dataclass
class Device:
    """One device's recordings: benign sessions in the order of time, and attacks by name."""

    name: str
    benign: list[Trace]
    attacks: dict[str, Trace] = field(default_factory=dict)
    overlays: dict[str, Trace] = field(default_factory=dict)
    train: tuple[int, ...] = (0,)  # the sessions that the model is made from


_KEYS = {"set": str, "name": str, "benign": list, "train": list, "attacks": dict, "overlays": dict}


def manifest(path: Path) -> dict[str, list[Device]]:
    """The devices of a manifest, by set. Raises ConfigError, TraceError or OSError."""
    table = read_toml(path)
    rows = table.get("device")
    if not isinstance(rows, list) or not rows or set(table) != {"device"}:
        raise ConfigError(f"{path}: it needs [[device]] tables and nothing else")
    groups: dict[str, list[Device]] = {}
    for row in rows:
        if not isinstance(row, dict):
            raise ConfigError(f"{path}: device is {clipped(row)}, want a table")
        for key, value in row.items():
            if key not in _KEYS or not isinstance(value, _KEYS[key]):
                raise ConfigError(f"{path}: {clipped(key)} is {clipped(value)} (keys: {', '.join(_KEYS)})")
        device = _manifest_device(row, path)
        groups.setdefault(row.get("set", "own"), []).append(device)
    return groups


def _manifest_device(row: dict[str, Any], path: Path) -> Device:
    names = row.get("benign", [])
    name = row.get("name")
    if not name or not names:
        raise ConfigError(f"{path}: each device needs name and benign")
    train = row.get("train", names[:1])
    unknown = [one for one in train if one not in names]
    if unknown or not train:
        raise ConfigError(f"{path}: {name}: train names {clipped(unknown[:1])}, which is not one of benign")

    def trace(file: Any) -> Trace:
        if not isinstance(file, str):
            raise ConfigError(f"{path}: {name}: {clipped(file)} is not the name of a file")
        return read_trace(path.parent / file)

    benign = [trace(file) for file in names]
    more = [{key: trace(file) for key, file in row.get(part, {}).items()} for part in ("attacks", "overlays")]
    for other in [*benign[1:], *more[0].values(), *more[1].values()]:
        if other.schema.id != benign[0].schema.id or other.window_ms != benign[0].window_ms:
            raise ConfigError(f"{path}: {name}: its traces differ in schema or window")
    for session in benign:
        if not session.benign.all():
            raise ConfigError(f"{path}: {name}: a benign session has windows labelled as an attack")
    return Device(name, benign, more[0], more[1], tuple(names.index(one) for one in train))


def _rows(path: Path) -> tuple[list[str], list[list[str]]]:
    with gzip.open(path, "rt", encoding="utf-8", errors="replace", newline="") as file:
        reader = csv.reader(file)
        header = next(reader, [])
        return header, [row for row in reader if len(row) == len(header)]


def _pi_trace(path: Path, window_ms: int, columns: list[str] | None) -> tuple[Trace, list[str]]:
    """A recording of kernel-event counts; `columns` picks those of another recording of the device."""
    header, rows = _rows(path)
    if _FIRST_EVENT not in header:
        raise DatasetError(f"{path}: no column {_FIRST_EVENT}")
    if columns is None:
        columns = [name for name in _INTERFACE if name in header] + header[header.index(_FIRST_EVENT) :]
    missing = [name for name in columns if name not in header]
    if missing:
        raise DatasetError(f"{path}: no column {', '.join(missing[:3])}")
    at = [header.index(name) for name in columns]
    seconds, timestamp = header.index("seconds"), header.index("timestamp")
    out = []
    for row in rows:
        try:
            values = [min(DELTA_MAX, max(0, int(float(row[i] or 0)))) for i in at]
            out.append((float(row[timestamp]) / 1000, round(float(row[seconds]) * 1000), "", values))
        except ValueError:
            continue  # a line that the recorder was interrupted in
    good = [row for row in out if window_ms // 2 <= row[1] <= window_ms * 3 // 2]
    schema = Schema(path.parent.name, tuple((name, "1", RATE) for name in columns))
    return make_trace(schema, window_ms, good), columns


def _pi_device(folder: Path, window_ms: int, name_of: Any) -> Device | None:
    files = sorted(folder.glob("*.csv.gz"))
    normal = [path for path in files if "normal" in path.name]
    if not normal:
        return None
    first, columns = _pi_trace(normal[0], window_ms, None)
    benign = sorted([first, *[_pi_trace(path, window_ms, columns)[0] for path in normal[1:]]], key=lambda t: t.t_s[0])
    attacks = {name_of(p.name): _pi_trace(p, window_ms, columns)[0] for p in files if p not in normal}
    return Device(folder.name, benign, attacks)


def pi_spectrum(root: Path) -> list[Device]:
    """Every device under pi-spectrum/."""
    folders = sorted(path for path in (root / "pi-spectrum").glob("*") if path.is_dir())
    found = [_pi_device(folder, 50_000, lambda name: name.split("_")[1]) for folder in folders]
    return [device for device in found if device]


def pi3_malware(root: Path) -> list[Device]:
    """The Raspberry Pi 3 sensor and its malware."""

    def name_of(name: str) -> str:
        words = re.sub(r"_online_samples.*", "", name)
        return {
            "ransom_noexpfs": "ransomware",
            "cnc_opt_1_file_extr": "exfiltration",
            "cnc_backdoor_jakoritar_good_noexpfs": "backdoor, active",
            "cnc_jakoritar_without_shell_poor_detection": "backdoor, idle",
        }.get(words, words)

    device = _pi_device(root / "pi3-malware", 5_000, name_of)
    return [device] if device else []


def iot_lan(root: Path, min_windows: int = 1000) -> list[Device]:
    """The benign home devices that were recorded for long enough."""
    devices = []
    for path in sorted((root / "iot-lan").glob("*_60s.csv.gz")):
        header, rows = _rows(path)
        at = [header.index(name) for name in FLOW_COLUMNS]
        t = header.index("t")
        windows = [(float(row[t]), 60_000, "", [int(float(row[i])) for i in at]) for row in rows]
        if len(windows) >= min_windows:
            devices.append(Device(path.name.replace("_60s.csv.gz", ""), [make_trace(FLOW_SCHEMA, 60_000, windows)]))
    return devices


@dataclass
class Flow:
    """One connection, seen from the device."""

    t_s: float
    outgoing: bool
    peer: str
    port: int
    source_port: int
    failed: bool
    protocol: str
    bytes_out: int
    bytes_in: int
    packets_out: int
    packets_in: int
    malicious: bool


def flow_windows(flows: Iterable[Flow], window_s: int, known: set[tuple[str, int]] | None = None) -> Trace:
    """Flows in the order of time -> windows with the columns of iot-lan's; every flow counts where it began.
    known: peer and port pairs already seen (updated)."""
    known = set() if known is None else known
    buckets: dict[int, list[Flow]] = defaultdict(list)
    for flow in flows:
        buckets[int(flow.t_s // window_s)].append(flow)
    rows = []
    for bucket in range(min(buckets), max(buckets) + 1):
        group = buckets.get(bucket, [])
        pairs = {(flow.peer, flow.port) for flow in group}
        values = [
            len(group),
            sum(flow.outgoing for flow in group),
            len({flow.peer for flow in group}),
            len({flow.port for flow in group}),
            len({flow.source_port for flow in group}),
            sum(flow.failed for flow in group),
            sum(flow.protocol == "tcp" for flow in group),
            sum(flow.protocol == "udp" for flow in group),
            len(pairs - known),
            sum(flow.bytes_out for flow in group),
            sum(flow.bytes_in for flow in group),
            sum(flow.packets_out for flow in group),
            sum(flow.packets_in for flow in group),
        ]
        known |= pairs
        label = "attack" if any(flow.malicious for flow in group) else ""
        rows.append((float(bucket * window_s), window_s * 1000, label, [min(DELTA_MAX, value) for value in values]))
    schema = FLOW_SCHEMA if window_s == 60 else Schema(f"flows-{window_s}s", FLOW_SCHEMA.columns)
    return make_trace(schema, window_s * 1000, rows)


def _zeek_flows(path: Path) -> list[Flow]:
    header, rows = _rows(path)
    column = {name: i for i, name in enumerate(header)}

    def number(row: list[str], name: str) -> int:
        text = row[column[name]]
        return int(float(text)) if text not in ("", "-") else 0

    hosts: dict[str, int] = defaultdict(int)
    for row in rows:
        for side in ("id.orig_h", "id.resp_h"):
            if row[column[side]].startswith(("192.168.", "10.", "172.16.")):
                hosts[row[column[side]]] += 1
    device = max(hosts, key=lambda host: hosts[host])
    flows = []
    for row in sorted(rows, key=lambda row: float(row[column["ts"]])):
        outgoing = row[column["id.orig_h"]] == device
        if not outgoing and row[column["id.resp_h"]] != device:
            continue
        sides = ("orig", "resp") if outgoing else ("resp", "orig")
        flows.append(
            Flow(
                float(row[column["ts"]]),
                outgoing,
                row[column["id.resp_h" if outgoing else "id.orig_h"]],
                number(row, "id.resp_p"),
                number(row, "id.orig_p"),
                row[column["conn_state"]] in _FAILED,
                row[column["proto"]],
                number(row, f"{sides[0]}_ip_bytes"),
                number(row, f"{sides[1]}_ip_bytes"),
                number(row, f"{sides[0]}_pkts"),
                number(row, f"{sides[1]}_pkts"),
                row[column["label"]].strip().lower().startswith("malicious"),
            )
        )
    return flows


def iot23(root: Path) -> list[Device]:
    """IoT-23 captures: a honeypot's are benign; a malware capture is benign up to its first malicious flow."""
    devices = []
    for path in sorted((root / "iot23").glob("*labeled.csv.gz")):
        flows = _zeek_flows(path)
        name = re.sub(r"CTU-|-labeled.csv.gz|Capture-", "", path.name)
        trace = flow_windows(flows, 60)
        bad = np.flatnonzero(~trace.benign)
        first = int(bad[0]) if len(bad) else len(trace)
        device = Device(name, [trace.select(slice(0, first))])
        if len(bad):
            device.attacks["infected"] = trace.select(slice(first, int(bad[-1]) + 1))
        devices.append(device)
    return devices


def malware_windows(root: Path) -> dict[str, Trace]:
    """Malicious flows alone of each IoT-23 capture in windows of a minute, from the first to the last: what is laid
    over benign days."""
    out = {}
    for path in sorted((root / "iot23").glob("*Malware*labeled.csv.gz")):
        flows = [flow for flow in _zeek_flows(path) if flow.malicious]
        if flows:
            out[re.sub(r"CTU-Malware-Capture-|-labeled.csv.gz", "", path.name)] = flow_windows(flows, 60)
    return out


def ipcam(root: Path, window_s: int = 10) -> list[Device]:
    """The camera in windows of ten seconds."""
    files = sorted((root / "ipcam").glob("*.json.gz"))
    sessions = []
    known: set[tuple[str, int]] = set()
    for path in files:
        flows = sorted(_joy_flows(path), key=lambda flow: flow.t_s)
        if flows:
            sessions.append((flows[0].t_s, path.name.replace(".json.gz", ""), flows))
    device = Device("camera", [])
    for _, name, flows in sorted(sessions, key=lambda session: session[0]):
        if not name.startswith("anomaly"):
            device.benign.append(flow_windows(flows, window_s, known))
    for _, name, flows in sessions:
        if name.startswith("anomaly"):
            device.attacks[name] = flow_windows(flows, window_s, set(known))
    return [device] if device.benign else []


def _joy_flows(path: Path) -> Iterator[Flow]:
    device = "192.168.5.20"
    with gzip.open(path, "rt", encoding="utf-8", errors="replace") as file:
        for line in file:
            try:
                record = json.loads(line)
            except ValueError:
                continue
            if "sa" not in record:
                continue
            outgoing = record["sa"] == device
            sent, got = ("out", "in") if outgoing else ("in", "out")
            yield Flow(
                float(record["time_start"]),
                outgoing,
                record["da"] if outgoing else record["sa"],
                int(record.get("dp") or 0),
                int(record.get("sp") or 0),
                not record.get("num_pkts_in", 0),
                {6: "tcp", 17: "udp"}.get(record.get("pr"), "other"),
                int(record.get("bytes_" + sent) or 0),
                int(record.get("bytes_" + got) or 0),
                int(record.get("num_pkts_" + sent) or 0),
                int(record.get("num_pkts_" + got) or 0),
                False,
            )


def lay_over(base: Trace, malware: Trace, start: int) -> Trace:
    """base's windows from `start` on with the malware's counts added, as long as both last."""
    n = min(len(base) - start, len(malware))
    out = base.select(slice(start, start + n))
    out.deltas = np.minimum(out.deltas + malware.deltas[:n], DELTA_MAX)
    return out


def joined(traces: list[Trace]) -> npt.NDArray[np.int64]:
    """The deltas of several sessions, one after the other."""
    return np.concatenate([trace.deltas for trace in traces])
