"""The identities that `provision` makes and the mosquitto that `broker-config` configures, attacked on the wire."""

import os
import signal
import ssl
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from fleet_support import FakeVerdict, Mosquitto, Peer, free_port, needs_mosquitto, wait_for
from paho.mqtt import client as paho
from stonechat.delivery import Delivery
from stonechat.outbox_memory import MemoryOutbox
from stonechat_tools.fleet import broker_config, keyring, provision
from stonechat_tools.fleet.collect import Collector
from stonechat_tools.fleet.store import Store

ACCOUNT = "root" if os.geteuid() == 0 else "mosquitto"


def context(place: Path, certificate: bool = True) -> ssl.SSLContext:
    tls = ssl.create_default_context(cafile=place / "ca.crt")
    if certificate:
        tls.load_cert_chain(place / "client.crt", place / "client.key")
    return tls


@pytest.fixture(params=["mtls", "passwords"])
def fleet(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[tuple[provision.Fleet, Mosquitto]]:
    settings = provision.Settings(broker="localhost", port=free_port(), auth=request.param)
    fleet = provision.Fleet.init(tmp_path / "fleet", settings)
    fleet.add("pump-1")
    fleet.add("pump-2")
    conf = broker_config.write(fleet, "127.0.0.1", ["localhost", "127.0.0.1"], ACCOUNT)
    with Mosquitto(conf, settings.port) as broker:
        yield fleet, broker


def account(fleet: provision.Fleet, name: str, version: int = paho.MQTTv5, client_id: str = "") -> Peer:
    place = fleet.folder / (name if name in provision.ACCOUNTS else f"devices/{name}")
    if fleet.settings.auth == "mtls":
        return Peer(fleet.settings.port, client_id or name, tls=context(place), version=version)
    password = (place / "password").read_text().strip()
    return Peer(
        fleet.settings.port,
        client_id or name,
        tls=context(place, certificate=False),
        user=name,
        password=password,
        version=version,
    )


def topic(device: str, name: str) -> str:
    return f"stonechat/1/fleet/{device}/{name}"


@needs_mosquitto
def test_a_device_reaches_its_own_topics_and_no_others(fleet: tuple[provision.Fleet, Mosquitto]) -> None:
    made, _ = fleet
    collector, operator = account(made, "collector"), account(made, "operator")
    victim, thief = account(made, "pump-1"), account(made, "pump-2")
    collector.topics = ["stonechat/1/fleet/+/report", "stonechat/1/fleet/+/status"]
    victim.topics = [topic("pump-1", "command"), topic("pump-1", "ack")]
    thief.topics = [
        "#",
        "+/+/+/+/+",
        "stonechat/1/fleet/#",
        "stonechat/1/fleet/+/report",
        topic("pump-1", "report"),
        topic("pump-1", "command"),
        topic("pump-2", "command"),
        "$SYS/#",
    ]
    with collector, operator, victim, thief:
        assert all(wait_for(peer.connected.is_set) for peer in (collector, operator, victim, thief))
        time.sleep(0.3)
        attacks = [
            (thief, topic("pump-1", "report")),  # reports as another
            (thief, topic("pump-1", "status")),
            (thief, topic("pump-1", "command")),  # commands another
            (thief, topic("pump-2", "command")),  # commands itself
            (thief, topic("pump-1", "ack")),  # makes another forget
            (thief, topic("collector", "command")),
            (thief, "stonechat/1/other/pump-2/report"),
            (thief, "elsewhere"),
            (collector, topic("pump-1", "report")),  # the collector does not report
            (collector, topic("pump-1", "command")),  # and does not command
            (operator, topic("pump-1", "ack")),
        ]
        refusals = {}
        for peer, name in attacks:
            mid = peer.client.publish(name, b"attack", 1).mid
            wait_for(lambda peer=peer, mid=mid: mid in peer.pubacks)
            refusals[peer, name] = str(peer.pubacks.get(mid))
        assert set(refusals.values()) == {"Not authorized"}, refusals
        victim.publish(topic("pump-1", "report"), b"mine")
        thief.publish(topic("pump-2", "report"), b"his own")
        operator.publish(topic("pump-1", "command"), b"to pump-1")
        operator.publish(topic("pump-2", "command"), b"to pump-2")
        assert wait_for(lambda: len(collector.got) >= 2 and victim.got and thief.got)
        time.sleep(0.5)
        assert sorted(collector.got) == [(topic("pump-1", "report"), b"mine"), (topic("pump-2", "report"), b"his own")]
        assert victim.got == [(topic("pump-1", "command"), b"to pump-1")]
        assert set(thief.got) == {(topic("pump-2", "command"), b"to pump-2")}  # of eight subscriptions


@needs_mosquitto
def test_a_device_cannot_take_over_anothers_session(fleet: tuple[provision.Fleet, Mosquitto]) -> None:
    made, _ = fleet
    victim, thief = account(made, "pump-1"), account(made, "pump-2", client_id="pump-1")
    with victim:
        assert wait_for(victim.connected.is_set)
        with thief:
            assert wait_for(thief.connected.is_set)
            time.sleep(0.5)
            assert victim.connected.is_set()


@needs_mosquitto
def test_strangers_are_refused(fleet: tuple[provision.Fleet, Mosquitto], tmp_path: Path) -> None:
    made, _ = fleet
    port = made.settings.port
    other = provision.Fleet.init(tmp_path / "other", provision.Settings("localhost", port, auth="mtls"))
    place = other.add("pump-1")
    foreign = ssl.create_default_context(cafile=made.folder / "ca.crt")
    foreign.load_cert_chain(place / "client.crt", place / "client.key")
    anonymous = ssl.create_default_context(cafile=made.folder / "ca.crt")
    strangers = [
        Peer(port, "x"),  # no TLS
        Peer(port, "x", tls=anonymous),  # no account
        Peer(port, "x", tls=anonymous, user="pump-1", password="guess"),
        Peer(port, "x", tls=foreign),  # another CA's certificate of the same name
        Peer(port, "x", tls=anonymous, version=paho.MQTTv311),
    ]
    for stranger in strangers:
        with stranger:
            time.sleep(0.4)
            assert not stranger.connected.is_set()


@needs_mosquitto
def test_a_client_does_not_talk_to_a_broker_of_another_ca(
    fleet: tuple[provision.Fleet, Mosquitto], tmp_path: Path
) -> None:
    made, _ = fleet
    other = provision.Fleet.init(tmp_path / "other", provision.Settings("localhost", 1, auth="passwords"))
    with Peer(made.settings.port, "x", tls=context(other.add("pump-1"), certificate=False)) as peer:
        time.sleep(0.4)
        assert not peer.connected.is_set()


@needs_mosquitto
def test_revoked_is_out_and_rotated_is_in(fleet: tuple[provision.Fleet, Mosquitto]) -> None:
    made, broker = fleet
    before, revoked = account(made, "pump-1"), account(made, "pump-2")
    made.rotate("pump-1")
    made.revoke("pump-2")
    broker_config._give_to(ACCOUNT, made.folder / "broker")
    broker.signal(signal.SIGHUP)
    time.sleep(0.5)
    with revoked:
        time.sleep(0.6)
        assert not revoked.connected.is_set()
    with account(made, "pump-1") as after:
        assert wait_for(after.connected.is_set)
    if made.settings.auth == "mtls":
        with before:
            assert wait_for(before.connected.is_set)  # until the rotation is finished
        made.finish_rotation("pump-1")
        broker_config._give_to(ACCOUNT, made.folder / "broker")
        broker.signal(signal.SIGHUP)
        time.sleep(0.5)
        again = Peer(made.settings.port, "pump-1", tls=before.client._ssl_context)
        with again:
            time.sleep(0.6)
            assert not again.connected.is_set()


@needs_mosquitto
def test_a_provisioned_device_reports_to_a_provisioned_collector(fleet: tuple[provision.Fleet, Mosquitto]) -> None:
    made, _ = fleet
    place = made.folder / "devices/pump-1"
    home = made.folder / "collector"
    options = {}
    if made.settings.auth == "passwords":
        options = {"username": "collector", "password": (home / "password").read_text().strip()}
    keys = keyring.Keys(made.folder / "keys")
    store = Store(made.folder / "db")
    tls = context(home, certificate=made.settings.auth == "mtls")
    with Collector(store, keys, host="localhost", port=made.settings.port, tls=tls, **options) as collector:
        assert collector.connected.wait(10), collector.error
        reporter = Delivery(
            "pump-1", keyring.read_secrets(place / "device.key")[0], MemoryOutbox(), heartbeat_windows=1
        )
        device = account(made, "pump-1")
        device.topics = list(reporter.subscriptions)
        device.on_message = reporter.on_message
        with device:
            assert wait_for(device.connected.is_set)
            reporter.observe(FakeVerdict(2), 1000)
            reporter.pump(device.publish, 1000)
            assert wait_for(lambda: reporter.outbox.after(0) is None)
        assert store.count("pump-1") == 1
        assert not any(collector.counts[reason] for reason in keyring.REASONS)
    store.close()
