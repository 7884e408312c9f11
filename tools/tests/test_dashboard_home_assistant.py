"""`stonechat home-assistant`: the fleet in Home Assistant from the collector's database, over a real broker with the
access list of `stonechat broker-config`."""

import contextlib
import json
import os
import pwd
import signal
import ssl
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from agent_process import open_the_way
from fleet_support import Mosquitto, Peer, free_port, needs_mosquitto, wait_for
from stonechat.delivery import Delivery
from stonechat.outbox_memory import MemoryOutbox
from stonechat_tools.dashboard import audit
from stonechat_tools.dashboard.home_messages import Bridge, node
from stonechat_tools.fleet import broker_config, keyring, labels, operator, provision, wire
from stonechat_tools.fleet.store import Store
from stonechat_tools.proofs.dashboard_fleet import MadeFleet
from test_linux_homeassistant import check, check_state

TOPICS = "stonechat/1/fleet/"
DEVICES = 20


def shown(messages: list[tuple[str, bytes]]) -> dict[str, bytes]:
    """The last payload of each topic."""
    return dict(messages)


class Sent(list[tuple[str, bytes]]):
    def __call__(self, topic: str, payload: bytes) -> None:
        self.append((topic, payload))


def bridge(made: MadeFleet, sent: Sent, controls: bool = True) -> Bridge:
    return Bridge(made.store, TOPICS, sent, prefix="homeassistant", controls=controls)


# --- the messages -----------------------------------------------------------------------------------------------------


def test_every_message_is_one_that_home_assistant_takes(tmp_path: Path) -> None:
    made, sent = MadeFleet(tmp_path / "fleet.db", 160), Sent()
    found = bridge(made, sent)
    found.step()
    messages = shown(sent)
    levels, presences = set(), set()
    for name in made.names:
        topic = f"homeassistant/device/{node(name)}/config"
        message, state = json.loads(messages[topic]), json.loads(messages[f"{TOPICS}{name}/home/state"])
        check(message)
        check_state(message, state)
        levels.add(state["level"])
        presences.add(state["presence"])
        assert state["cause"] or state["level"] == "normal"
        unique = {component["unique_id"] for component in message["components"].values()}
        assert all(name in each for each in unique)
    assert levels == {"normal", "watch", "alarm"} and presences >= {"reporting", "silent", "gone", "asleep", "lying"}
    assert found.step() == 0 and len(sent) == 2 * len(made.names)  # nothing has changed
    made.close()


def test_without_an_operator_there_is_nothing_to_press(tmp_path: Path) -> None:
    made, sent = MadeFleet(tmp_path / "fleet.db", 3), Sent()
    found = bridge(made, sent, controls=False)
    found.step()
    for payload in shown(sent).values():
        assert b"command_topic" not in payload and b"button" not in payload
    made.close()


def test_no_device_can_write_to_the_discovery_of_another() -> None:
    """A device may write to homeassistant/device/ID/config where it announces itself; an id has at most 64 letters."""
    assert len(node("pump-1")) > 64 and node("pump-1") != node("pump.1")
    assert set(node("pump.1")) <= set("abcdefghijklmnopqrstuvwxyz0123456789-")


def test_what_is_no_press_is_ignored(tmp_path: Path) -> None:
    made, sent = MadeFleet(tmp_path / "fleet.db", 3), Sent()
    found = bridge(made, sent)
    found.step()
    name = made.names[0]
    assert found.asked(f"{TOPICS}{name}/home/calibrate", b"PRESS", 60, 100) == (name, "calibrate", [])
    assert found.asked(f"{TOPICS}{name}/home/release", b"PRESS", 60, 100) == (name, "release", [])
    assert found.asked(f"{TOPICS}{name}/home/release", b"ON", 60, 100) is None
    assert found.asked(f"{TOPICS}{name}/home/maintenance", b"ON", 60, 100) == (name, "maintenance", [160])
    assert found.asked(f"{TOPICS}{name}/home/maintenance", b"OFF", 60, 100) == (name, "maintenance", [100])
    for topic, payload in (
        (f"{TOPICS}{name}/home/calibrate", b""),
        (f"{TOPICS}{name}/home/calibrate", b"press" * 1000),
        (f"{TOPICS}{name}/home/maintenance", b"PRESS"),
        (f"{TOPICS}{name}/home/stop-responding", b"PRESS"),
        (f"{TOPICS}nobody/home/calibrate", b"PRESS"),
        (f"other/1/fleet/{name}/home/calibrate", b"PRESS"),
        (f"{TOPICS}/home/calibrate", b"PRESS"),
    ):
        assert found.asked(topic, payload, 60, 100) is None, topic
    for payload in (b"", b"{", b"[]", b"{}", b"null", b'{"device": {"identifiers": []}}', b"[" * 100_000):
        assert found.announced("homeassistant/device/x/config", payload) == ""
    gone = "pump-99999"
    for device in (gone, "a/b", "+", "#", "a+b", "", "\ud800", "\0", "x" * 65_000, "../x", "$SYS"):
        state = f"{TOPICS}{device}/home/state"
        payload = json.dumps({"device": {"identifiers": [f"stonechat_{device}"]}, "state_topic": state}).encode()
        with contextlib.suppress(UnicodeEncodeError):  # no name of a topic
            topic = f"homeassistant/device/{node(device)}/config"
            assert found.announced(topic, payload) == (gone if device == gone else ""), device
    made.close()


# --- with a real broker -----------------------------------------------------------------------------------------------


class Home:
    """A fleet with its broker, the accounts, and the process."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        port = free_port()
        self.fleet = provision.Fleet.init(folder / "fleet", provision.Settings("localhost", port, auth="passwords"))
        for name in ("pump-00003", "camera-00000"):
            self.fleet.add(name)
        self.fleet.add_home_assistant(bridge=True)
        user = pwd.getpwuid(os.geteuid()).pw_name
        conf = broker_config.write(self.fleet, "127.0.0.1", ["localhost", "127.0.0.1"], user)
        self.broker = Mosquitto(conf, port)
        self.made = MadeFleet(folder / "fleet.db", DEVICES)
        self.log = folder / "home.log"

    def peer(self, name: str, *topics: str) -> Peer:
        home = self.fleet.folder / name
        home = home if home.is_dir() else self.fleet.folder / "devices" / name
        tls = ssl.create_default_context(cafile=str(self.fleet.folder / "ca.crt"))
        found = Peer(self.broker.port, name, tls=tls, user=name, password=(home / "password").read_text().strip())
        found.topics = list(topics)
        return found

    @contextlib.contextmanager
    def running(self, *options: str) -> Iterator["subprocess.Popen[bytes]"]:
        command = [sys.executable, "-m", "stonechat_tools.cli", "home-assistant", "--db", self.made.store.path]
        command += ["--account", str(self.fleet.folder / "homebridge"), *options]
        with open(self.log, "ab") as log:
            process = subprocess.Popen(command, stdout=log, stderr=log)
        try:
            yield process
        finally:
            if process.poll() is None:
                process.send_signal(signal.SIGTERM)
            assert process.wait(60) == 0, self.log.read_text()
        assert "Traceback" not in self.log.read_text(), self.log.read_text()


@pytest.fixture
def home(tmp_path: Path) -> Iterator[Home]:
    open_the_way(tmp_path)
    found = Home(tmp_path)
    with found.broker:
        yield found
    found.made.close()


@pytest.mark.slow(8)
@needs_mosquitto
def test_a_fleet_appears_alarms_obeys_and_goes(home: Home) -> None:
    made, sent = home.made, Sent()
    peer = home.peer("homeassistant", "homeassistant/#", f"{TOPICS}+/home/+")
    name = "pump-00003"
    config, base = f"homeassistant/device/{node(name)}/config", f"{TOPICS}{name}/home/"
    with Store(":memory:") as own:
        keys = keyring.Keys(home.fleet.folder / "operator/keys")
        door = operator.Door(
            home.folder / "socket", operator.Operator(keys, own, sent, allow=("calibrate", "maintenance"))
        )
        with peer:  # pressed in another session, and kept by the broker: it must not be pressed at each connection
            assert wait_for(peer.connected.is_set)
            for end, payload in (("calibrate", b"PRESS"), ("release", b"PRESS"), ("maintenance", b"ON")):
                mid = peer.client.publish(f"{TOPICS}camera-00000/home/{end}", payload, 1, True).mid
                assert wait_for(lambda mid=mid: mid in peer.pubacks)
        peer = home.peer("homeassistant", "homeassistant/#", f"{TOPICS}+/home/+")
        with peer, home.running("--operator", str(home.folder / "socket"), "--maintenance", "2h"):
            states = {f"{TOPICS}{each}/home/state" for each in made.names}
            configs = {f"homeassistant/device/{node(each)}/config" for each in made.names}
            assert wait_for(lambda: states | configs <= set(shown(peer.got)), 60), home.log.read_text()
            assert shown(peer.got)[f"{TOPICS}homeassistant/home/online"] == b"online"
            for each in made.names:
                message: dict[str, Any] = json.loads(shown(peer.got)[f"homeassistant/device/{node(each)}/config"])
                check(message)
                assert message["availability_topic"] == f"{TOPICS}homeassistant/home/online"

            # an alarm is an event
            made._now_s = time.time()
            made.put([made.report("camera-00000", 2)])
            made.step()
            event = f"{TOPICS}camera-00000/home/event"
            assert wait_for(lambda: event in shown(peer.got), 30), home.log.read_text()
            assert json.loads(shown(peer.got)[event])["event_type"] == "alarm"
            assert json.loads(shown(peer.got)[event])["cause"]
            assert json.loads(shown(peer.got)[f"{TOPICS}camera-00000/home/state"])["alarm"] is True

            # what is pressed is signed by the operator, and a device obeys it
            peer.publish(base + "calibrate", b"PRESS")
            peer.publish(base + "maintenance", b"ON")
            peer.publish(base + "calibrate", b"nonsense")
            assert wait_for(lambda: len(sent) == 2, 30), home.log.read_text()
            secret = keyring.read_secrets(home.fleet.folder / f"devices/{name}/device.key")[0]
            device = Delivery(name, secret, MemoryOutbox())
            for topic, payload in sent:
                assert topic == f"{TOPICS}{name}/command"
                device.on_message(topic, payload)
            assert device.rejected == 0
            assert wait_for(lambda: len(audit.entries(made.store)) == 2, 20)
            assert {entry["who"] for entry in audit.entries(made.store)} == {"home assistant"}

            # a device can neither press nor announce; Home Assistant can't announce or show a state
            with home.peer("camera-00000") as thief:
                assert wait_for(thief.connected.is_set)
                attacks = [(thief, base + end) for end in ("calibrate", "maintenance", "state", "event")]
                attacks += [(thief, config), (thief, f"{TOPICS}homeassistant/home/online")]
                attacks += [(peer, base + "state"), (peer, config), (peer, f"{TOPICS}{name}/command")]
                for who, topic in attacks:
                    mid = who.client.publish(topic, b"PRESS", 1).mid
                    assert wait_for(lambda who=who, mid=mid: mid in who.pubacks)
                    assert str(who.pubacks[mid]) == "Not authorized", (topic, who.client._client_id)
            assert len(sent) == 2

            # a device that is removed goes
            labels.write(made.store, {name: replace(made.monitor.labels[name], removed_s=time.time())})
            assert wait_for(lambda: shown(peer.got)[config] == b"" and shown(peer.got)[base + "state"] == b"", 30)

            # Home Assistant starts anew, and what is retained has not reached it
            peer.got.clear()
            peer.publish("homeassistant/status", b"online")
            left = configs - {config}
            assert wait_for(lambda: left <= set(shown(peer.got)), 60), home.log.read_text()
        assert wait_for(lambda: shown(peer.got).get(f"{TOPICS}homeassistant/home/online") == b"offline", 20)
        door.close()


@pytest.mark.slow(8)
@needs_mosquitto
def test_a_device_removed_meanwhile_a_broker_that_restarts_and_the_end_of_all(home: Home) -> None:
    made = home.made
    gone = made.names[4]
    with home.running():
        late = home.peer("homeassistant", "homeassistant/#")
        with late:
            assert wait_for(lambda: len([t for t, p in shown(late.got).items() if p]) == DEVICES, 60), (
                home.log.read_text()
            )
        # the broker loses everything that it retained
        home.broker.kill()
        home.broker.start()
        late = home.peer("homeassistant", "homeassistant/#")
        with late:
            assert wait_for(lambda: len([t for t, p in shown(late.got).items() if p]) == DEVICES, 90), (
                home.log.read_text()
            )
    labels.write(made.store, {gone: replace(made.monitor.labels[gone], removed_s=time.time())})
    peer = home.peer("homeassistant", "homeassistant/#", f"{TOPICS}+/home/+")
    with peer:
        with home.running():
            topic = f"homeassistant/device/{node(gone)}/config"
            assert wait_for(lambda: shown(peer.got).get(topic) == b"", 60), home.log.read_text()
        with home.running("--remove") as process:
            assert process.wait(60) == 0
    assert f"removed from Home Assistant: {DEVICES - 1} devices" in home.log.read_text()
    last = home.peer("homeassistant", "homeassistant/#", f"{TOPICS}+/home/+")
    with last:
        assert wait_for(last.connected.is_set)
        time.sleep(0.5)
        assert set(shown(last.got)) <= {f"{TOPICS}homeassistant/home/online"}


def test_wrong_arguments_are_one_line(tmp_path: Path) -> None:
    db = tmp_path / "fleet.db"
    Store(db).close()
    for options, error in (
        (["--db", str(tmp_path / "none.db")], "no such database"),
        (["--maintenance", "5s"], "--maintenance"),
        (["--discovery", "a/#"], "--discovery"),
        (["--broker", "localhost:1", "--plain", "--remove"], "connection refused"),
    ):
        words = [sys.executable, "-m", "stonechat_tools.cli", "home-assistant", "--account", str(tmp_path)]
        words += options if "--db" in options else ["--db", str(db), *options]
        done = subprocess.run(words, capture_output=True, text=True, timeout=60)
        assert done.returncode == 1 and error in done.stderr and len(done.stderr.splitlines()) == 1, done.stderr


def test_a_fleet_of_before_gets_the_accounts_that_it_lacks(tmp_path: Path) -> None:
    fleet = provision.Fleet.init(tmp_path / "fleet", provision.Settings("localhost", 8883, auth="passwords"))
    fleet.add("pump-1")
    fleet.add_home_assistant()
    before = (fleet.folder / "homeassistant/password").read_text()
    fleet.add_home_assistant(bridge=True)
    assert (fleet.folder / "homeassistant/password").read_text() == before
    assert (fleet.folder / "homebridge/password").exists()
    acl = (fleet.folder / "broker/acl").read_text()
    assert "user homebridge" in acl and "pattern write homeassistant/device/%u/config" in acl
    users = {line.partition(":")[0] for line in (fleet.folder / "broker/passwd").read_text().splitlines()}
    assert users == {"collector", "operator", "homeassistant", "homebridge", "pump-1"}
    assert wire.PREFIX == TOPICS
    other = provision.Fleet.init(tmp_path / "other", provision.Settings("localhost", 8883, auth="passwords"))
    other.add_home_assistant(bridge=True)
    other.add("pump-1")
    assert "discovery" not in (other.folder / "devices/pump-1/stonechat.toml").read_text()
    assert "%u/ha/" not in (other.folder / "broker/acl").read_text()
