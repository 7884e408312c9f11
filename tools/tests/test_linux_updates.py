"""stonechat-agent over a real broker, with a real collector or by hand: releases taken, refused, and taken back."""

import hashlib
import signal
import stat
import tempfile
import time
from collections.abc import Iterator
from dataclasses import astuple
from pathlib import Path

import cbor2
import pyhsslms
import pytest
from agent_process import DEVICE, AgentProcess, is_root, quick_model, wait_for
from fleet_support import Mosquitto, Peer, needs_mosquitto
from stonechat import manifest, slots
from stonechat.errors import ConfigError
from stonechat.linux import updates as linux_updates
from stonechat.linux.schemas import LINUX_1, LINUX_PROC_1
from stonechat.model import load_model
from stonechat_tools.fleet import keyring, labels, updates, wire, wire_release
from stonechat_tools.fleet.collector import Collector
from stonechat_tools.fleet.labels import Labels
from stonechat_tools.fleet.monitor import Monitor
from stonechat_tools.fleet.rollout import Stage
from stonechat_tools.fleet.store import Store, releases, rollouts
from stonechat_tools.release.make import golden_digest

pytestmark = [needs_mosquitto, pytest.mark.slow]
KIND = {"lms_type": pyhsslms.lms_sha256_m24_h5, "lmots_type": pyhsslms.lmots_sha256_n24_w8}
DAY_S = 86_400
WINDOWS = 4


def described(model: bytes) -> list[object]:
    meta = load_model(model).metadata
    return [hashlib.sha256(model).digest(), len(model), bytes(meta.schema_id), golden_digest(meta)]


class Vendor:
    def __init__(self, folder: Path, name: str = "vendor.key.pub") -> None:
        self.key = pyhsslms.HssPrivateKey(levels=1, **KIND)
        self.public = self.key.publicKey().serialize()
        self.file = folder / name
        self.file.write_text(f"release HSS/LMS-SHA256-H10-W4 {self.public.hex()}\n")

    def sign(self, model: bytes, version: int, **changes: object) -> bytes:
        now_s = int(time.time())
        fields: dict[int, object] = {0: 1, 1: version, 2: 0, 3: "pump", 4: now_s - DAY_S, 5: now_s + DAY_S}
        fields[6] = described(model)
        fields |= {int(key[1:]): value for key, value in changes.items()}
        packed = cbor2.dumps({key: value for key, value in fields.items() if value is not None}, canonical=True)
        signature = self.key.sign(manifest.to_sign(self.public, packed))
        entry = [manifest.algorithm(self.public), {4: manifest.key_id(self.public)}, signature]
        return cbor2.dumps([b"", {}, packed, [entry]], canonical=True)


class Site:
    """A broker and an agent, both real."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        folder.chmod(0o711)
        self.vendor = Vendor(folder)
        self.factory = quick_model(folder / "model.tflite", learn_windows=4).read_bytes()
        self.second = quick_model(folder / "second.tflite", learn_windows=4, version=2).read_bytes()
        self.broker = Mosquitto.plain(folder).start()
        update = f'[update]\nenabled = true\nclass = "pump"\nkeys = ["{self.vendor.file}"]\nwindows = {WINDOWS}\n'
        update += f'folder = "{folder}/update"\nbytes_per_day = 100000000\nmost_bytes = 20000\n'
        self.agent = AgentProcess(folder, self.broker.port, more=update)

    def close(self) -> None:
        process = self.agent.process
        if process is not None and process.poll() is None:
            process.kill()
            process.wait()
        self.broker.kill()


@pytest.fixture
def site() -> Iterator[Site]:
    with tempfile.TemporaryDirectory(prefix="stonechat-updates-") as folder:  # the agent's user must get there
        made = Site(Path(folder))
        try:
            yield made
        finally:
            made.close()


class Hand:
    """A collector that does what the test says, with the tools' own seals. parts: of the release that it serves, None
    for nothing; wanted: what the agent asked for."""

    def __init__(self, site: Site) -> None:
        self.keys = keyring.DeviceKeys(site.agent.secret, DEVICE)
        self.parts: list[bytes] | None = None
        self.version = 0
        self.wanted: list[wire_release.Want] = []
        self.status: wire.Status | None = None
        self.scored = 0
        self.peer = Peer(site.broker.port, "collector")
        self.peer.topics = [f"stonechat/1/fleet/{DEVICE}/{name}" for name in ("want", "status", "report")]
        self.peer.on_message = self._on_message
        self.site = site

    def _on_message(self, topic: str, payload: bytes) -> None:
        if topic.endswith("/status"):
            status = wire.open_status(DEVICE, self.keys, payload)
            self.status = status if status.online else self.status
        elif topic.endswith("/report"):
            report = wire.open_report(DEVICE, self.keys, payload)
            self.scored += report.score_q8 is not None
            ranges = [(report.sequence, report.sequence)]
            ack = wire.seal_ack(self.keys, report.stream, ranges)
            self.peer.client.publish(f"stonechat/1/fleet/{DEVICE}/ack", ack, 1)
        else:
            want = wire_release.open_want(DEVICE, self.keys, payload)
            self.wanted.append(want)
            if self.parts is not None and want.version == self.version:
                part = self.parts[want.part]
                self.send(wire_release.seal_chunk(self.keys, want.version, want.part, want.offset, part))

    def send(self, message: bytes) -> None:
        self.peer.client.publish(f"stonechat/1/fleet/{DEVICE}/model", message, 1)

    def serve(self, version: int, message: bytes, model: bytes, served: bytes | None = None) -> None:
        """Offer `message`; served: what is sent in its place."""
        self.version, self.parts = version, [message if served is None else served, model]
        self.send(wire_release.seal_offer(self.keys, version, message))

    def until(self, *wanted: int, timeout_s: float = 40.0) -> None:
        """The status's key 24 begins with `wanted`."""
        wait_for(
            lambda: self.status and self.status.update and astuple(self.status.update)[: len(wanted)] == wanted,
            timeout_s,
            lambda: f"{self.status and self.status.update}; {self.site.agent.said()[-1500:]}",
        )

    def __enter__(self) -> "Hand":
        self.peer.start()
        assert self.peer.connected.wait(10)
        return self

    def __exit__(self, *_: object) -> None:
        self.peer.stop()


def test_a_release_goes_to_the_agent_and_back_and_no_report_is_lost(site: Site) -> None:
    """The real collector, its database and its roll-out."""
    store = Store(str(site.folder / "fleet.db"))
    keys = keyring.Keys({DEVICE: site.agent.secret})
    labels.write(store, {DEVICE: Labels(group="pump", site="here")})
    monitor = Monitor(store)
    found = updates.Updates(store, keys, presence=monitor.presence, judge_s=0.2)
    message = site.vendor.sign(site.second, 2)
    digest = hashlib.sha256(message).digest()
    releases.publish(store, "pump", 2, LINUX_PROC_1.id.hex(), digest, message, site.second, "me", time.time())

    def state() -> list[int]:
        rows = store.rows("SELECT version, slot, trial, tried, result FROM updates", ())
        return [int(value) for value in rows[0]] if rows else []

    def until(*wanted: int) -> None:
        wait_for(lambda: state() == [*wanted], 40, lambda: f"{state()} {site.agent.said()[-1500:]}")

    with Collector(store, keys, port=site.broker.port, monitor=monitor, updates=found), site.agent as agent:
        until(0, 0, 0, 0, slots.NONE)
        (release,) = releases.releases(store)
        assert rollouts.begin(store, release, "", (Stage(3600.0, share=1.0),), "me", time.time()) == ""
        until(2, 1, 0, 2, slots.CONFIRMED)
        assert "update: release 2 is on trial" in agent.said() and "release 2 is confirmed" in agent.said()
        (device,) = store.devices()
        assert device["model"] == hashlib.sha256(site.second).hexdigest()[:16]
        assert agent.stop() == 0
        agent.start()
        wait_for(lambda: "version 2, digest" in agent.said() or store.devices()[0]["boot"] == 2, 20, agent.said)
        (row,) = rollouts.rollouts(store)
        assert not rollouts.change(store, row.id, ("running", "done"), "withdrawn", "me", "", time.time())
        until(0, 0, 0, 2, slots.WITHDRAWN)
        numbers: dict[bytes, list[int]] = {}
        for stream, number in store.rows("SELECT stream, sequence FROM reports", ()):
            numbers.setdefault(bytes(stream) if isinstance(stream, bytes) else stream, []).append(int(number))
    for found_numbers in numbers.values():
        assert sorted(found_numbers) == list(range(min(found_numbers), max(found_numbers) + 1))
    store.close()


def test_the_folder_is_the_agents_alone_and_a_trial_that_is_killed_rolls_back(site: Site) -> None:
    with Hand(site) as hand, site.agent as agent:
        hand.until(0, 0, 0)
        hand.serve(2, site.vendor.sign(site.second, 2), site.second)
        hand.until(0, 0, 1, 2)
        folder = site.folder / "update"
        found = folder.stat()
        assert stat.S_IMODE(found.st_mode) == 0o700
        assert agent.process is not None
        user = int(Path(f"/proc/{agent.process.pid}/status").read_text().split("Uid:")[1].split()[0])
        assert {path.stat().st_uid for path in [folder, *folder.iterdir()]} == {user} and (user != 0 or not is_root())
        for _ in range(3):
            agent.process.send_signal(signal.SIGKILL)
            agent.process.wait()
            hand.status = None
            agent.start()
            assert agent.process is not None
            wait_for(lambda: hand.status, 30, agent.said)
        hand.until(0, 0, 0, 2, slots.RESTARTS)
        before = hand.scored
        wait_for(lambda: hand.scored > before + 2, 20, agent.said)
        assert "too many starts without a confirmation" in agent.said()


def test_what_is_wrong_is_refused_named_in_the_status_and_the_agent_scores_on(site: Site) -> None:
    vendor, second = site.vendor, site.second
    stranger = Vendor(site.folder, "stranger.key.pub")
    now_s = int(time.time())
    digest, size, schema_id, golden = described(second)
    corrupt = bytearray(second)
    corrupt[len(corrupt) // 2] ^= 4
    changed = bytearray(vendor.sign(second, 11))
    changed[len(changed) // 2] ^= 1
    other = quick_model(site.folder / "other.tflite", LINUX_1, learn_windows=4).read_bytes()
    cases = (
        (stranger.sign(second, 10), second, slots.SIGNATURE),
        (bytes(changed), second, slots.SIGNATURE),
        (vendor.sign(second, 12, _3="valve"), second, slots.CLASS),
        (vendor.sign(other, 13), other, slots.SCHEMA),
        (vendor.sign(second, 14, _5=now_s - 1), second, slots.EXPIRED),
        (vendor.sign(second, 15, _4=now_s + 3600), second, slots.EARLY),
        (vendor.sign(second, 16, _6=[digest, 10_000_000, schema_id, golden]), second, slots.TOO_LARGE),
        (vendor.sign(second, 17), bytes(corrupt), slots.DIGEST),
        (vendor.sign(second, 18, _6=[digest, size, schema_id, bytes(32)]), second, slots.MODEL),
        (vendor.sign(second, 19, _7=[[1, 2, 1]]), second, slots.UNSUITED),
        (vendor.sign(second, 19), second, slots.VERSION),  # offered as 20
    )
    with Hand(site) as hand, site.agent as agent:
        hand.until(0, 0, 0)
        for number, (message, model, result) in enumerate(cases):
            scored = hand.scored
            hand.serve(10 + number, message, model)
            hand.until(0, 0, 0, 10 + number, result, number + 1)
            wait_for(lambda scored=scored: hand.scored > scored, 10, agent.said)
            assert hand.status and hand.status.model == hashlib.sha256(site.factory).digest()[:8]
        refused = len(cases)
        # 10 MB of manifest; nothing of it is pulled
        wanted = len(hand.wanted)
        hand.version, hand.parts = 25, None
        hand.send(wire_release.seal_offer(hand.keys, 25, bytes(10_000_000)))
        hand.until(0, 0, 0, 25, slots.TOO_LARGE, refused + 1)
        assert len(hand.wanted) == wanted
        # chunks out of order, of another device, truncated
        message = vendor.sign(second, 30, _2=30)
        hand.version = 30
        hand.send(wire_release.seal_offer(hand.keys, 30, message))
        wait_for(lambda: len(hand.wanted) > wanted, 10, agent.said)
        hand.send(wire_release.seal_chunk(hand.keys, 30, 0, 384, message))
        hand.send(wire_release.seal_chunk(hand.keys, 30, 1, 0, second))
        hand.send(wire_release.seal_chunk(keyring.DeviceKeys(bytes(32), DEVICE), 30, 0, 0, message))
        hand.send(wire_release.seal_chunk(hand.keys, 30, 0, 0, message[:100]))
        wait_for(lambda: hand.wanted[-1].offset == 100, 10, agent.said)
        hand.serve(30, message, second)
        hand.until(0, 0, 1, 30)
        assert hand.status
        earlier = wire_release.seal_confirm(hand.keys, 30, b"last")
        hand.send(earlier)
        hand.until(0, 0, 1, 30, slots.NONE, refused + 2)
        hand.send(wire_release.seal_confirm(hand.keys, 30, hand.status.stream))
        hand.until(30, 1, 0, 30, slots.CONFIRMED, refused + 2)
        # an older version, and back below the floor
        hand.serve(29, vendor.sign(second, 29), second)
        hand.until(30, 1, 0, 30, slots.CONFIRMED, refused + 3)
        hand.send(wire_release.seal_withdraw(hand.keys, 30, hand.status.stream))
        scored = hand.scored
        wait_for(lambda: hand.scored > scored + 2, 10, agent.said)
        hand.until(30, 1, 0, 30, slots.CONFIRMED, refused + 3)
        assert hand.status.counters[0] == 1  # the message of another device


def test_the_configuration_names_the_fix(site: Site) -> None:
    text = site.agent.config.read_text()
    lines = {
        'class = "pump"\n': ("", "[update] needs class"),
        f'keys = ["{site.vendor.file}"]': ("", "[update] needs keys"),
        str(site.vendor.file): (str(site.folder / "none"), "none: No such file"),
        f'folder = "{site.folder}/update"': (f'folder = "{site.folder}/open"', "chmod 700"),
    }
    (site.folder / "open").mkdir()
    (site.folder / "open").chmod(0o777)
    for before, (after, wanted) in lines.items():
        site.agent.config.write_text(text.replace(before, after))
        done = site.agent.run_to_end()
        assert done.returncode == 1 and wanted in done.stderr and len(done.stderr.splitlines()) == 1, done.stderr
    for wrong in ("nonsense", "release HSS/LMS-SHA256-H10-W4 00", "boss SLH-DSA-SHA2-128s " + "00" * 32, ""):
        site.vendor.file.write_text(wrong + "\n")
        with pytest.raises(ConfigError, match=r"\[update\] keys"):
            linux_updates.read_keys([str(site.vendor.file)])
    assert len(linux_updates.RESULTS) == len(wire_release.UpdateState.RESULTS)
