"""Both ends agree: one table of sizes; what each real collector can say at its longest, opened by the real reader."""

import ast
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import cbor2
import pycddl
import pytest
import stonechat
from stonechat import limits
from stonechat.board import hooks
from stonechat.custom_counters import CounterCollector, counter_schema
from stonechat.errors import CollectorError
from stonechat.linux import services
from stonechat.linux.collector import LinuxCollector
from stonechat.loop import Loop
from stonechat.outbox_memory import MemoryOutbox
from stonechat.report import Reporter
from stonechat_tools.fleet import keyring, wire

AGENT = Path(stonechat.__file__).parent
CDDL = (AGENT / "stonechat.cddl").read_text()
NAME_BYTES = 32  # of a schema: the longest that counter_schema takes
KEYS = keyring.DeviceKeys(bytes(32), "pump-1")


def test_the_cddl_has_the_sizes_of_the_table() -> None:
    assert f"has at most {limits.REPORT_BYTES} bytes, a sealed status at most {limits.STATUS_BYTES}" in CDDL
    for text, size in (
        ("7: tstr .size (1..%d)", limits.FIRMWARE_BYTES),
        ("8: bstr .size (1..%d)", limits.DIGEST_BYTES),
        ("9: bstr .size (1..%d)", limits.DIGEST_BYTES),
        ("11: [0*%d source]", limits.SOURCES),
        ("source = tstr .size (1..%d)", limits.SOURCE_BYTES),
        ("14: tstr .size (1..%d)", limits.AGENT_BYTES),
        ("17: [0*%d count]", limits.CAUSES),
        ("25: [1*%d tstr", limits.CHANNELS),
        ("25: [1*12 tstr .size (1..%d)]", limits.CHANNEL_BYTES),
        ("channel = 1..%d", limits.CHANNELS),
        ("13: tstr .size (1..%d)", limits.DETAIL_BYTES),
        ("features = bstr .size (3..%d)", limits.FEATURES_BYTES),
        ("stream = bstr .size %d", limits.STREAM_BYTES),
        ("1: [0*%d count]", limits.ACK_NUMBERS),
        ("4: [0*%d count]", limits.ACK_NUMBERS),
    ):
        assert text % size in CDDL, text % size


def test_what_devices_spell_out_is_in_the_table() -> None:
    """Boards save the memory of the table: their numbers are compared."""
    spelled = {
        ("report.py", "_MAX_ID"): limits.DEVICE_ID_BYTES,
        ("update.py", "CHUNK_BYTES"): limits.CHUNK_BYTES,
    }
    for (name, constant), size in spelled.items():
        assert re.search(rf"^{constant} = const\({size}\)", (AGENT / name).read_text(), re.M), constant
    assert keyring.check_device_id("x" * limits.DEVICE_ID_BYTES)
    assert keyring.MAX_MESSAGE_BYTES == limits.REPORT_BYTES
    checks = (AGENT / "linux/config_checks.py").read_text()
    assert limits.CHANNEL_BYTES == services.MAX_NAME_BYTES and services.MAX_SERVICES + 4 == limits.CHANNELS
    assert f"[:{limits.CHANNEL_BYTES}]" in (AGENT / "fusion.py").read_text()
    assert f"_is_text(value, {limits.FIRMWARE_BYTES})" in checks.partition("def firmware")[2][:200]


def status_of(sources: list[str], **more: Any) -> wire.Status:
    """What an agent says of these sources with every other field at its longest, through the real reader."""
    reporter = Reporter("pump-1", bytes(32), prefix="stonechat/1/fleet", boot=0xFFFFFFFF)
    reporter.uptime_s = reporter._status_number = 0xFFFFFFFE
    reporter.trouble = (0xFFFFFFFF,) * 4  # type: ignore[assignment]
    channels = ["c" * limits.CHANNEL_BYTES] * limits.CHANNELS
    reporter.more = (0xFFFFFFFF, None, None, 0xFFFFFFFF, None, None, None, channels)
    facts: dict[str, Any] = {
        "firmware": "f" * limits.FIRMWARE_BYTES,
        "model": bytes(limits.DIGEST_BYTES),
        "schema": bytes(limits.DIGEST_BYTES),
        "window_ms": 0xFFFFFFFF,
        "sources": sources,
        "adaptation_q8": 0xFFFFFFFF,
        "learning": True,
        "agent": "a" * limits.AGENT_BYTES,
        "unscored": [0xFFFFFFFF] * limits.CAUSES,
    }
    message = bytes(reporter.status(**facts | more))
    pycddl.Schema(f"start = status\n{CDDL}").validate_cbor(KEYS.status.open(message, limits.STATUS_BYTES))
    opened = wire.open_status("pump-1", KEYS, message)
    assert list(opened.channels) == channels
    assert list(opened.sources) == sources and opened.firmware == facts["firmware"]
    return opened


def test_the_longest_status_that_the_table_allows_fits() -> None:
    status_of(["s" * limits.SOURCE_BYTES] * limits.SOURCES)


@contextmanager
def closing(collector: Any) -> Iterator[Any]:
    try:
        yield collector
    finally:
        collector.close()


def open_collector(**options: Any) -> LinuxCollector:
    return LinuxCollector(peers_secret=bytes(32), **options)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"use_bpf": True},
        {"disks": ["sda", "vda", "nvme0n1"]},
        {"interfaces": ["lo"]},
        {"interfaces": ["lo"] + [f"missing-{n:07}" for n in range(40)]},
    ],
    ids=str,
)
def test_what_each_linux_collector_says_is_taken_whole(options: dict[str, Any]) -> None:
    try:
        collector = open_collector(**options)
    except CollectorError:
        assert options.get("use_bpf")  # where this process may not use BPF
        collector = open_collector()
    rows = (("cgroup", "v2", ""), ("disks", "/proc/diskstats", ""))
    cgroup = SimpleNamespace(sources=rows, schema=SimpleNamespace(id=bytes(8)))
    with closing(collector):
        own = CounterCollector(counter_schema("n" * NAME_BYTES, [("c" * 8, "1", "rate")]), lambda: [0])
        status_of(spoken(collector, own, cgroup))


def spoken(*collectors: Any) -> list[str]:
    """The sources as the agent's loop words them."""
    said: list[Any] = []
    channels = [
        SimpleNamespace(
            collector=collector,
            scorer=SimpleNamespace(
                model=SimpleNamespace(digest=b"12345678"),
                adaptation=SimpleNamespace(distance=lambda: 0),
                learning=False,
            ),
        )
        for collector in collectors
    ]
    reporter = SimpleNamespace(status=lambda **named: said.append(named["sources"]))
    loop = SimpleNamespace(
        channels=channels, reporter=reporter, firmware="", window_ms=1000, learning=False, unscored=[0, 0, 0, 0]
    )
    Loop.status(loop)  # type: ignore[arg-type]
    return list(said[0])


def test_what_the_boards_collector_says_is_taken_whole() -> None:
    own = CounterCollector(counter_schema("n" * NAME_BYTES, [("c" * 8, "1", "rate")]), lambda: [0])
    status_of(
        spoken(SimpleNamespace(sources=hooks.FirmwareCollector.sources, schema=SimpleNamespace(id=bytes(8))), own)
    )


def test_no_group_or_source_that_the_agent_can_name_is_too_long() -> None:
    """Every one that any module of the agent spells out, whether it starts on this machine or not."""
    groups, sources = {""}, {""}
    for path in AGENT.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Assign) and isinstance(node.value, ast.Constant) and type(node.value.value) is str:
                names = {getattr(target, "id", getattr(target, "attr", "")) for target in node.targets}
                groups |= {node.value.value} if "group" in names else set()
                sources |= {node.value.value} if "source" in names else set()
    assert {"syscalls", "bandwidth", "listeners"} <= groups and "raw tracepoint sys_enter" in sources
    assert max(len(group) for group in groups) + 1 + max(len(source) for source in sources) <= limits.SOURCE_BYTES
    assert len(groups) + 3 <= limits.SOURCES  # with a cgroup's, the board's two and own counters


def test_a_status_is_never_refused_for_its_texts() -> None:
    reporter = Reporter("pump-1", bytes(32), prefix="stonechat/1/fleet")
    message = bytes(reporter.status(firmware="\x1b[2J" + "\u00e9" * 60, sources=["\u202e" + "x" * 50] * 14, agent="\n"))
    opened = wire.open_status("pump-1", KEYS, message)
    assert opened.firmware and opened.firmware.startswith("\ufffd[2J") and len(opened.firmware.encode()) <= 70
    assert len(opened.sources) == 14 and opened.sources[0].startswith("\ufffdx") and opened.agent == "\ufffd"


def test_the_longest_report_and_acknowledgement_fit() -> None:
    fields = dict.fromkeys((1, 2, 3, 14, 23), 4294967295) | {0: 1, 17: 11, 5: 2, 6: 7, 7: 65535, 8: 65535, 9: 65535}
    fields |= {10: b"x" * limits.FEATURES_BYTES, 13: "d" * limits.DETAIL_BYTES, 16: b"abcd"}  # type: ignore[dict-item]
    message = KEYS.report.seal(cbor2.dumps(fields, canonical=True))
    pycddl.Schema(f"start = report\n{CDDL}").validate_cbor(KEYS.report.open(message))
    assert len(message) <= limits.REPORT_BYTES
    assert wire.open_report("pump-1", KEYS, message).detail == "d" * limits.DETAIL_BYTES
    ranges = [(0xFFFFFF00, 0xFFFFFFFF)] * (limits.ACK_NUMBERS // 2)
    ack = wire.seal_ack(KEYS, b"abcd", ranges, ranges, 0xFFFFFFFF)
    pycddl.Schema(f"start = ack\n{CDDL}").validate_cbor(KEYS.ack.open(ack))
    assert len(ack) <= limits.REPORT_BYTES
    assert MemoryOutbox().sequence == 1
