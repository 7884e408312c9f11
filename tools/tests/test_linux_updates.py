"""stonechat-agent over a real broker, with a real collector or by hand: releases taken, refused, and taken back."""

import hashlib
import os
import signal
import stat
import struct
import subprocess
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from agent_process import DEVICE, AgentProcess, is_root, open_the_way, quick_model, wait_for
from fleet_support import Mosquitto, needs_mosquitto
from release_support import Hand, Vendor, described
from stonechat import own_model, slots
from stonechat.detection import ALARM, NORMAL
from stonechat.errors import ConfigError
from stonechat.linux import privileges
from stonechat.linux import updates as linux_updates
from stonechat.linux.own_model_slot import Slot
from stonechat.linux.schemas import LINUX_1, LINUX_PROC_1
from stonechat.model import load_model
from stonechat.own_model_file import seal
from stonechat.updater import Updater
from stonechat_tools.fleet import keyring, labels, updates, wire_release
from stonechat_tools.fleet.collector import Collector
from stonechat_tools.fleet.labels import Labels
from stonechat_tools.fleet.monitor import Monitor
from stonechat_tools.fleet.rollout import Stage
from stonechat_tools.fleet.store import Store, releases, rollouts

pytestmark = [needs_mosquitto, pytest.mark.slow(4)]
WINDOWS = 4


CALM = ((2560, 2816, 0xFFFFF),)  # alarm rules that no window breaks, however busy this machine is,
NERVOUS = ((1, 2, 1),)  # and that each window does


def ruled(path: Path, rules: tuple[tuple[int, int, int], ...]) -> bytes:
    """Give a model file other alarm rules -> its bytes."""
    data = path.read_bytes()
    meta = load_model(data).metadata
    meta.alarm_rules = rules
    path.write_bytes(seal(data, meta))
    return path.read_bytes()


class Site:
    """A broker and an agent, both real."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        open_the_way(folder)
        self.vendor = Vendor(folder)
        self.factory = ruled(quick_model(folder / "model.tflite", learn_windows=4), CALM)
        self.second = ruled(quick_model(folder / "second.tflite", learn_windows=4, version=2), CALM)
        self.broker = Mosquitto.plain(folder).start()
        update = f'[update]\nenabled = true\nclass = "pump"\nkeys = ["{self.vendor.file}"]\nwindows = {WINDOWS}\n'
        update += f'folder = "{folder}/update"\nbytes_per_day = 100000000\nmost_bytes = 20000\n'
        self.agent = AgentProcess(folder, self.broker.port, more=update)

    def rules(self, version: int) -> bytes:
        """A release of alarm rules alone: it is on trial like a model, and pulled in a second."""
        return self.vendor.sign(self.second, version, _6=None, _7=CALM)

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


def hand_of(site: Site) -> Hand:
    return Hand(site.broker.port, site.agent.secret, site.agent.said)


def test_a_release_goes_to_the_agent_and_back_and_no_report_is_lost(site: Site) -> None:
    """The real collector, its database and its roll-out. Its clock is hours ahead at first: what it offers once it is
    right is taken in the same start of the agent."""
    ahead_s = [72_000.0]
    store = Store(str(site.folder / "fleet.db"))
    keys = keyring.Keys({DEVICE: site.agent.secret})
    labels.write(store, {DEVICE: Labels(group="pump", site="here")})
    monitor = Monitor(store)
    found = updates.Updates(
        store,
        keys,
        presence=monitor.presence,
        clock=lambda: time.time() + ahead_s[0],
        steady=time.monotonic,
        judge_s=0.2,
    )

    def stage(version: int, message: bytes, model: bytes | None) -> None:
        digest = hashlib.sha256(message).digest()
        schema = LINUX_PROC_1.id.hex() if model else ""
        releases.publish(store, "pump", version, schema, digest, message, model, "me", time.time())
        (release,) = [each for each in releases.releases(store) if each.version == version]
        assert rollouts.begin(store, release, "", (Stage(3600.0, share=1.0),), "me", time.time()) == ""

    def change(version: int, state: str) -> None:
        (row,) = rollouts.rollouts(store, "pump", version)
        assert not rollouts.change(store, row.id, ("running", "done"), state, "me", "", time.time())

    def state() -> list[int]:
        rows = store.rows("SELECT version, slot, trial, tried, result FROM updates", ())
        return [int(value) for value in rows[0]] if rows else []

    def until(*wanted: int) -> None:
        wait_for(lambda: state() == [*wanted], 40, lambda: f"{state()} {site.agent.said()[-1500:]}")

    with Collector(store, keys, port=site.broker.port, monitor=monitor, updates=found), site.agent as agent:
        until(0, 0, 0, 0, slots.NONE)
        stage(2, site.vendor.sign(site.second, 2), site.second)
        until(2, 1, 0, 2, slots.CONFIRMED)
        ahead_s[0] = 0.0
        change(2, "done")
        stage(3, site.rules(3), None)
        until(3, 2, 0, 3, slots.CONFIRMED)
        change(3, "withdrawn")
        until(2, 1, 0, 3, slots.WITHDRAWN)
        assert "update: release 2 is on trial" in agent.said() and "release 2 is confirmed" in agent.said()
        (device,) = store.devices()
        assert device["model"] == hashlib.sha256(site.second).hexdigest()[:16]
        assert agent.stop() == 0
        agent.start()
        wait_for(lambda: "version 2, digest" in agent.said() or store.devices()[0]["boot"] == 2, 20, agent.said)
        change(2, "withdrawn")
        until(0, 0, 0, 3, slots.WITHDRAWN)
        numbers: dict[bytes, list[int]] = {}
        for stream, number in store.rows("SELECT stream, sequence FROM reports", ()):
            numbers.setdefault(bytes(stream) if isinstance(stream, bytes) else stream, []).append(int(number))
    for found_numbers in numbers.values():
        assert sorted(found_numbers) == list(range(min(found_numbers), max(found_numbers) + 1))
    store.close()


def test_the_folder_is_the_agents_alone_and_a_trial_that_is_killed_rolls_back(site: Site) -> None:
    with hand_of(site) as hand, site.agent as agent:
        hand.until(0, 0, 0)
        hand.serve(2, site.rules(2), b"")
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


def test_an_own_model_is_suspended_by_a_trial_and_made_anew_beside_another_final_model(site: Site) -> None:
    """The own model alarms at every window, the vendor's at none: the level shows whether it decides."""
    site.agent.config.write_text(
        site.agent.config.read_text().replace(
            "[collector]", "personalize = true\npersonalize_windows = 20000\n[collector]"
        )
    )
    state = site.folder / "state"
    state.mkdir(mode=0o700)
    slot = Slot(
        str(state / "state.own-model"),
        site.agent.secret,
        hashlib.sha256(site.factory).digest()[:8],
        LINUX_PROC_1.id,
        "",
        print,
    )
    slot.save(struct.pack("<BHI", own_model.DECIDING, 0, 0) + ruled(quick_model(site.folder / "own.tflite"), NERVOUS))
    user_id = privileges.user_ids("")[0] if is_root() else -1  # -1: as it is
    for path in (state, *state.iterdir(), site.agent.secret_file):
        os.chown(path, user_id, -1)
    with hand_of(site) as hand, site.agent as agent:

        def level(wanted: int) -> None:
            wait_for(lambda: hand.level == wanted, 30, agent.said)

        def phase() -> int:
            return hand.status.own.phase if hand.status and hand.status.own else -1

        def windows() -> int:
            return hand.status.own.done if hand.status and hand.status.own else -1

        hand.until(0, 0, 0)
        assert phase() == own_model.DECIDING
        level(ALARM)
        hand.serve(2, site.rules(2), b"")
        hand.until(0, 0, 1, 2)
        level(NORMAL)
        assert agent.process is not None
        agent.process.send_signal(signal.SIGKILL)
        agent.process.wait()
        hand.status, hand.level = None, -1
        agent.start()
        hand.until(0, 0, 1, 2)
        level(NORMAL)
        assert phase() == own_model.DECIDING
        assert hand.status
        hand.send(wire_release.seal_withdraw(hand.keys, 2, hand.status.stream))
        hand.until(0, 0, 0, 2, slots.WITHDRAWN)
        level(ALARM)  # it decides again
        # The key is another, during the trial.
        hand.serve(3, site.vendor.sign(site.second, 3), site.second)
        hand.until(0, 0, 1, 3)
        site.agent.secret_file.write_text("ab" * 32 + "\n")
        hand.status = None
        hand.keys = keyring.DeviceKeys(site.agent.secret, DEVICE)
        agent.process.send_signal(signal.SIGHUP)
        hand.until(0, 0, 1, 3)
        assert hand.status
        hand.send(wire_release.seal_confirm(hand.keys, 3, hand.status.stream))
        hand.until(3, 1, 0, 3, slots.CONFIRMED)
        level(NORMAL)
        assert phase() == own_model.COLLECTING
        scored = hand.scored
        wait_for(lambda: hand.scored > scored + 10, 30, agent.said)
        hand.send(wire_release.seal_withdraw(hand.keys, 3, hand.status.stream))
        hand.until(0, 0, 0, 3, slots.WITHDRAWN)
        assert phase() == own_model.COLLECTING and windows() < 5, hand.status
        assert agent.stop() == 0
        hand.status = None
        agent.start()
        wait_for(lambda: phase() == own_model.COLLECTING and windows() >= 0, 30, lambda: (hand.status, agent.said()))
        assert "of another reference model" not in agent.said()


def test_what_is_wrong_is_refused_named_in_the_status_and_the_agent_scores_on(site: Site) -> None:
    vendor, second = site.vendor, site.second
    stranger = Vendor(site.folder, "stranger.key.pub")
    now_s = int(time.time())
    digest, _, schema_id, golden = described(second)
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
        (vendor.sign(second, 18, _6=None, _7=NERVOUS), b"", slots.UNSUITED),
        (vendor.sign(second, 18), second, slots.VERSION),  # offered as 19
    )
    with hand_of(site) as hand, site.agent as agent:
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
        hand.offer(25, bytes(10_000_000))
        hand.until(0, 0, 0, 25, slots.TOO_LARGE, refused + 1)
        assert len(hand.wanted) == wanted
        # chunks out of order, of another device, truncated
        message = vendor.sign(second, 30, _2=30)
        hand.version = 30
        hand.offer(30, message)
        wait_for(lambda: len(hand.wanted) > wanted, 10, agent.said)
        hand.chunk(30, 0, 384, message)
        hand.chunk(30, 1, 0, second)
        hand.chunk(30, 0, 0, message, keyring.DeviceKeys(bytes(32), DEVICE))
        hand.chunk(30, 0, 0, message[:100])
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


def test_a_trial_whose_start_can_not_be_counted_does_not_run_and_the_log_names_why(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "update"
    store = slots.Slots(str(folder))
    store.start()
    store.begin_trial(1, 2)
    updater = Updater("pump", [[0, bytes(32)]], str(folder))

    def full() -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(updater.store, "save", full)
    assert updater.open("factory", str, bytes(8), bytes(32)) == "factory"
    level, text = linux_updates.text(updater)
    assert level == "warning" and "2 on trial does not run: the folder of updates can't be written" in text
    assert slots.Slots(str(folder)).start() == 1  # where it can, the trial goes on
    for result in range(2, len(linux_updates.RESULTS)):
        updater.store.result = result
        assert f"ended: {linux_updates.RESULTS[result]}; version 0 runs" in linux_updates.text(updater)[1]


def test_a_check_makes_no_folder_and_names_what_can_not_work(site: Site) -> None:
    def checked(folder: Path, hook: str = "true") -> str:
        text = site.agent.config.read_text().replace(f'folder = "{site.folder}/update"', f'folder = "{folder}"')
        other = site.folder / "other.toml"
        other.write_text(text + f'[response]\nhook = ["{hook}"]\n')
        command = [*site.agent.command[:-1], str(other), "--check"]
        done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
        assert done.returncode == 0, done.stderr
        return done.stdout

    missing = site.folder / "update"
    assert "until then" not in checked(missing) and "hook" not in checked(missing)
    assert not missing.exists()  # as root it would be root's, and the agent could never write there
    assert f"{site.vendor.file} is not a folder; until then no release is taken" in checked(site.vendor.file)
    assert "hook: /none/such is no program that can be started" in checked(missing, "/none/such")
    assert "hook: /etc is no program" in checked(missing, "/etc") and "hook: nosuch is no" in checked(missing, "nosuch")
    # one folder for all: it locks it once
    text = site.agent.config.read_text()
    site.agent.config.write_text(text.replace(f'folder = "{site.folder}/update"', f'folder = "{site.folder}/state/"'))
    with site.agent as agent:
        wait_for(lambda: "connected to" in agent.said(), say=agent.said)


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
    public = "SLH-DSA-SHA2-128s " + "00" * 32
    site.vendor.file.write_text(f"release {public}\nofficer {public}\n")  # the rule of two would be one's
    with pytest.raises(ConfigError, match="a key of its own"):
        linux_updates.read_keys([str(site.vendor.file)])
    for mode in (0o620, 0o602, 0o666):
        site.vendor.file.chmod(mode)
        with pytest.raises(ConfigError, match="chmod 644"):
            linux_updates.read_keys([str(site.vendor.file)])
    assert len(linux_updates.RESULTS) == len(wire_release.UpdateState.RESULTS)
