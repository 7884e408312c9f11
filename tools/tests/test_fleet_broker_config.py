"""The identities that `provision` makes and the mosquitto that `broker-config` configures, attacked on the wire."""

import os
import pwd
import shutil
import ssl
import subprocess
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from fleet_support import FakeVerdict, Mosquitto, Peer, free_port, needs_mosquitto, wait_for
from paho.mqtt import client as paho
from stonechat.delivery import Delivery
from stonechat.errors import ConfigError
from stonechat.outbox_memory import MemoryOutbox
from stonechat_tools.fleet import broker_config, certificates, keyring, provision
from stonechat_tools.fleet.bulk_client import BulkClient
from stonechat_tools.fleet.collect import Collector
from stonechat_tools.fleet.connection import explain
from stonechat_tools.fleet.store import Store

pytestmark = pytest.mark.slow(2)
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
    place = fleet.folder / (name if name in fleet.settings.accounts else f"devices/{name}")
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
    collector.topics = [f"stonechat/1/fleet/+/{name}" for name in ("report", "status", "want")]
    victim.topics = [topic("pump-1", name) for name in ("command", "ack", "model")]
    thief.topics = [
        "#",
        "+/+/+/+/+",
        "stonechat/1/fleet/#",
        "stonechat/1/fleet/+/report",
        topic("pump-1", "report"),
        topic("pump-1", "command"),
        topic("pump-2", "command"),
        topic("pump-1", "model"),
        "$SYS/#",
    ]
    with collector, operator, victim, thief:
        assert all(peer.is_ready() for peer in (collector, operator, victim, thief))
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
            (thief, topic("pump-1", "want")),  # pulls another's update
            (thief, topic("pump-1", "model")),  # offers one to another,
            (thief, topic("pump-2", "model")),  # and to itself
            (operator, topic("pump-1", "model")),  # only the collector offers
            (collector, topic("pump-1", "want")),
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
        victim.publish(topic("pump-1", "want"), b"a chunk")
        collector.publish(topic("pump-1", "model"), b"the chunk")
        assert wait_for(lambda: len(collector.got) >= 3 and len(victim.got) >= 2 and thief.got)
        time.sleep(0.5)
        assert sorted(collector.got) == [
            (topic("pump-1", "report"), b"mine"),
            (topic("pump-1", "want"), b"a chunk"),
            (topic("pump-2", "report"), b"his own"),
        ]
        assert sorted(victim.got) == [
            (topic("pump-1", "command"), b"to pump-1"),
            (topic("pump-1", "model"), b"the chunk"),
        ]
        assert set(thief.got) == {(topic("pump-2", "command"), b"to pump-2")}  # of nine subscriptions


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
            assert stranger.is_refused()


@needs_mosquitto
def test_a_client_does_not_talk_to_a_broker_of_another_ca(
    fleet: tuple[provision.Fleet, Mosquitto], tmp_path: Path
) -> None:
    made, _ = fleet
    other = provision.Fleet.init(tmp_path / "other", provision.Settings("localhost", 1, auth="passwords"))
    with Peer(made.settings.port, "x", tls=context(other.add("pump-1"), certificate=False)) as peer:
        assert peer.is_refused()


@needs_mosquitto
def test_revoked_is_out_and_rotated_is_in(fleet: tuple[provision.Fleet, Mosquitto]) -> None:
    made, broker = fleet
    before, revoked = account(made, "pump-1"), account(made, "pump-2")
    made.rotate("pump-1")
    made.revoke("pump-2")
    broker.reload()
    with revoked:
        assert revoked.is_refused()
    with account(made, "pump-1") as after:
        assert wait_for(after.connected.is_set)
    if made.settings.auth == "mtls":
        with before:
            assert wait_for(before.connected.is_set)  # until the rotation is finished
        made.finish_rotation("pump-1")
        broker.reload()
        again = Peer(made.settings.port, "pump-1", tls=before.client._ssl_context)
        with again:
            assert again.is_refused()


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


# --- files of root's, mosquitto as a user of its own ------------------------------------------------------------------

as_root = pytest.mark.skipif(os.geteuid() != 0, reason="mosquitto becomes its own user only where root starts it")


@pytest.fixture
def open_folder() -> Iterator[Path]:
    """A folder that every user can pass, unlike pytest's."""
    folder = Path(tempfile.mkdtemp(prefix="stonechat-fleet-"))
    folder.chmod(0o755)
    yield folder
    shutil.rmtree(folder)


def owner_and_mode(path: Path) -> tuple[int, int]:
    found = path.lstat()
    return found.st_uid, found.st_mode & 0o777


@as_root
@needs_mosquitto
@pytest.mark.parametrize("auth", ["mtls", "passwords"])
def test_what_provision_adds_later_mosquitto_can_read(auth: str, open_folder: Path) -> None:
    from stonechat_tools.cli import main

    port, base = free_port(), str(open_folder / "fleet")
    assert main(["provision", "--dir", base, "init", "--broker", f"localhost:{port}", "--auth", auth]) == 0
    assert main(["provision", "--dir", base, "add", "pump-1"]) == 0
    assert main(["broker-config", "--dir", base, "--listen", "127.0.0.1", "--name", "127.0.0.1"]) == 0
    made = provision.Fleet(open_folder / "fleet")
    before = {path.name: owner_and_mode(path) for path in (made.folder / "broker").iterdir()}
    conf = shutil.copy(made.folder / "broker/mosquitto.conf", open_folder)
    user = pwd.getpwnam("mosquitto").pw_uid
    assert all(uid == user for uid, _ in before.values())
    with Mosquitto(Path(conf), port) as broker:
        assert Path(f"/proc/{broker.process.pid}").stat().st_uid == user  # type: ignore[union-attr]
        for act in ("add", "rotate", "finish-rotation"):
            assert main(["provision", "--dir", base, act, "pump-2"]) == 0
            assert {path.name: owner_and_mode(path) for path in (made.folder / "broker").iterdir()} == before
            broker.reload()
            collector, thief, victim = account(made, "collector"), account(made, "pump-2"), account(made, "pump-1")
            collector.topics = ["stonechat/1/fleet/+/report"]
            with collector, thief, victim:
                assert all(peer.is_ready() for peer in (collector, thief, victim))
                mid = thief.client.publish(topic("pump-1", "report"), b"as another", 1).mid
                wait_for(lambda mid=mid, thief=thief: mid in thief.pubacks)
                assert str(thief.pubacks.get(mid)) == "Not authorized"
                thief.publish(topic("pump-2", "report"), b"as itself")
                victim.publish(topic("pump-1", "report"), b"as itself")
                assert wait_for(lambda collector=collector: len(collector.got) == 2)
                assert sorted(name for name, _ in collector.got) == [
                    topic("pump-1", "report"),
                    topic("pump-2", "report"),
                ]
        assert main(["provision", "--dir", base, "revoke", "pump-2"]) == 0
        broker.reload()
        with account(made, "pump-1") as still:
            assert wait_for(still.connected.is_set)


@as_root
@needs_mosquitto
def test_the_brokers_user_can_plant_nothing_and_links_are_not_followed(open_folder: Path) -> None:
    made = provision.Fleet.init(open_folder / "fleet", provision.Settings("localhost", 1))
    broker_config.write(made)
    place = made.folder / "broker"
    secret, other = open_folder / "shadow", open_folder / "important"
    secret.write_text("root's\n")
    secret.chmod(0o600)
    other.write_text("important\n")
    before = owner_and_mode(secret), owner_and_mode(other)
    as_mosquitto = ["setpriv", "--reuid=mosquitto", "--regid=mosquitto", "--clear-groups", "sh", "-c"]
    plant = f"ln -s {secret} {place}/x; rm {place}/ca.crt; ln -sf {other} {place}/ca.crt; mv {place}/acl {place}/y"
    subprocess.run([*as_mosquitto, plant], stderr=subprocess.DEVNULL)
    assert sorted(os.listdir(place)) == ["acl", "ca.crt", "crl.pem", "mosquitto.conf", "server.crt", "server.key"]
    os.symlink(secret, place / "x")  # and were it root's own doing
    for name in ("ca.crt", "acl", "server.key"):
        (place / name).unlink()
        os.symlink(other, place / name)
    broker_config.write(made)
    made.add("pump-1")
    assert (owner_and_mode(secret), owner_and_mode(other)) == before
    assert other.read_text() == "important\n" and secret.read_text() == "root's\n"
    assert not any((place / name).is_symlink() for name in ("ca.crt", "acl", "server.key"))
    shutil.rmtree(place)
    os.symlink(open_folder, place)
    with pytest.raises(ConfigError, match="link"):
        broker_config.write(made)


@as_root
@needs_mosquitto
@pytest.mark.parametrize("auth", ["mtls", "passwords", "plain"])
def test_the_folder_works_in_debians_conf_d_of_another_machine(auth: str, open_folder: Path) -> None:
    """Debian's own file, ours copied below it, in another folder than where it was made."""
    port = free_port()
    made = provision.Fleet.init(open_folder / "fleet", provision.Settings("localhost", port, auth=auth))
    made.add("pump-1")
    there = open_folder / "etc/conf.d"
    there.mkdir(parents=True)
    broker_config.write(made, "127.0.0.1", ["127.0.0.1"], install_dir=there)
    for path in (made.folder / "broker").iterdir():
        shutil.copy(path, there)
        shutil.chown(there / path.name, "mosquitto", "mosquitto")
    made.folder.chmod(0o700)  # nothing is read from where it was made
    state = open_folder / "state"
    state.mkdir()
    shutil.chown(state, "mosquitto")
    main_file = open_folder / "etc/mosquitto.conf"
    main_file.write_text(
        f"pid_file {state}/mosquitto.pid\npersistence true\npersistence_location {state}/\n"
        f"log_dest file {state}/mosquitto.log\ninclude_dir {there}\n"
    )
    with Mosquitto(main_file, port):
        device = Peer(port, "pump-1") if auth == "plain" else account(made, "pump-1")
        with device:
            assert wait_for(device.connected.is_set)


@pytest.mark.parametrize("auth", ["plain", "mtls"])
def test_without_tls_it_listens_on_loopback_unless_asked_otherwise(auth: str, tmp_path: Path) -> None:
    made = provision.Fleet.init(tmp_path / "f", provision.Settings("localhost", 1883, auth=auth))
    lines = broker_config.write(made).read_text().splitlines()
    assert ("listener 1883 127.0.0.1" if auth == "plain" else "listener 1883") in lines
    assert "listener 1883 10.0.0.1" in broker_config.write(made, "10.0.0.1").read_text().splitlines()
    assert "listener 1883" in broker_config.write(made, "").read_text().splitlines()


@needs_mosquitto
def test_a_device_whose_folder_is_gone_can_be_revoked(fleet: tuple[provision.Fleet, Mosquitto]) -> None:
    made, broker = fleet
    stolen = account(made, "pump-2")
    for name in ("pump-1", "pump-2"):
        place = made.folder / "devices" / name
        os.rename(place, made.folder.parent / name)  # it was moved to the device
    made.add("pump-3")  # goes on working, and pump-1 stays
    made.revoke("pump-2")
    broker.reload()
    with stolen:
        assert stolen.is_refused()
    os.rename(made.folder.parent / "pump-1", made.folder / "devices/pump-1")
    for name in ("pump-1", "pump-3"):
        with account(made, name) as still:
            assert wait_for(still.connected.is_set)
    with pytest.raises(ConfigError):
        made.revoke("pump-2")


@needs_mosquitto
@pytest.mark.parametrize("auth", ["mtls", "passwords"])
def test_home_assistant_reads_what_devices_announce_and_a_device_announces_only_itself(
    auth: str, tmp_path: Path
) -> None:
    made = provision.Fleet.init(tmp_path / "fleet", provision.Settings("localhost", free_port(), auth=auth))
    made.add("pump-1")
    made.add_home_assistant()
    made.add_home_assistant()  # twice is as good
    made.add("pump-2")
    assert "discovery = true" in (made.folder / "devices/pump-2/stonechat.toml").read_text()
    conf = broker_config.write(made, "127.0.0.1", ["localhost", "127.0.0.1"], ACCOUNT)
    with Mosquitto(conf, made.settings.port):
        home, device, thief = (account(made, name) for name in ("homeassistant", "pump-1", "pump-2"))
        home.topics = ["homeassistant/#", "stonechat/1/fleet/+/ha/+", "stonechat/1/fleet/+/report", "#"]
        device.topics = ["homeassistant/status", "homeassistant/#"]
        with home, device, thief:
            assert all(peer.is_ready() for peer in (home, device, thief))
            attacks = [
                (thief, "homeassistant/device/pump-1/config"),  # removes or renames another's entities
                (thief, "homeassistant/device/other/config"),
                (thief, "homeassistant/sensor/pump-2/config"),
                (thief, "homeassistant/status"),
                (thief, topic("pump-1", "ha/state")),  # shows another as well
                (thief, topic("pump-1", "ha/online")),
                (thief, topic("pump-2", "ha/other")),
                (home, "homeassistant/device/pump-1/config"),
                (home, topic("pump-1", "command")),
                (home, topic("pump-1", "ha/state")),
            ]
            refusals = {}
            for peer, name in attacks:
                mid = peer.client.publish(name, b"attack", 1).mid
                wait_for(lambda peer=peer, mid=mid: mid in peer.pubacks)
                refusals[peer.client._client_id, name] = str(peer.pubacks.get(mid))
            assert set(refusals.values()) == {"Not authorized"}, refusals
            own = [("homeassistant/device/pump-1/config", b"{}"), (topic("pump-1", "ha/state"), b"{}")]
            for name, payload in own:
                device.publish(name, payload)
            device.publish(topic("pump-1", "report"), b"sealed")  # none of Home Assistant's business
            home.publish("homeassistant/status", b"online")
            assert wait_for(lambda: len(home.got) >= 2 and device.got)
            time.sleep(0.5)
            assert sorted(set(home.got)) == sorted([*own, ("homeassistant/status", b"online")])
            assert set(device.got) == {("homeassistant/status", b"online")}


def test_the_line_that_starts_the_broker_works_without_sbin_in_the_path(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Debian has mosquitto in /usr/sbin, which an ordinary user's PATH lacks."""
    from stonechat_tools.cli import main

    provision.Fleet.init(tmp_path / "fleet", provision.Settings("localhost", 1, auth="plain"))
    programs = tmp_path / "sbin"
    programs.mkdir()
    monkeypatch.setenv("PATH", str(tmp_path / "none"))
    for program, shown in ((None, "mosquitto -c"), (programs / "mosquitto", f"{programs}/mosquitto -c")):
        monkeypatch.setattr(broker_config, "mosquitto_path", lambda program=program: program and str(program))
        assert main(["broker-config", "--dir", str(tmp_path / "fleet")]) == 0
        printed = capsys.readouterr().out
        assert f": {shown} " in printed and ("apt-get install mosquitto" in printed) == (program is None)


def test_the_certificate_has_the_name_that_devices_know_and_a_refused_one_its_own_fix(tmp_path: Path) -> None:
    settings = provision.Settings(broker="127.0.0.1", port=1)
    fleet = provision.Fleet.init(tmp_path / "fleet", settings)
    broker_config.write(fleet, names=["broker.example.org"])
    server = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    server.load_cert_chain(fleet.folder / "broker/server.crt", fleet.folder / "broker/server.key")
    strange = ssl.create_default_context(cafile=fleet.folder / "ca.crt")

    def refusal(tls: ssl.SSLContext, name: str) -> str:
        """What a client that expects `name` says of the certificate; "" where it accepts it."""
        into, out = ssl.MemoryBIO(), ssl.MemoryBIO()
        client, peer = tls.wrap_bio(into, out, server_hostname=name), server.wrap_bio(out, into, server_side=True)
        for side in (client, peer, client):
            try:
                side.do_handshake()
            except ssl.SSLWantReadError:
                continue
            except ssl.SSLCertVerificationError as error:
                return explain(name, 8883, error)
        return ""

    assert refusal(strange, "127.0.0.1") == refusal(strange, "broker.example.org") == ""
    assert "broker-config --name other.lan" in refusal(strange, "other.lan")
    assert "see --cafile" in refusal(ssl.create_default_context(), "127.0.0.1")
    with pytest.raises(ConfigError, match="provision add DEVICE"):
        provision.Fleet.init(tmp_path / "fleet", settings)


@needs_mosquitto
def test_a_collector_says_that_its_certificate_has_expired_or_that_another_one_takes_its_place(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = provision.Settings(broker="localhost", port=free_port())
    fleet = provision.Fleet.init(tmp_path / "fleet", settings)
    conf = broker_config.write(fleet, "127.0.0.1", user=ACCOUNT)
    collector = fleet.folder / "collector"
    good = context(collector)
    monkeypatch.setattr(certificates, "CERTIFICATE_DAYS", -0.5)
    fleet._issue("collector", collector)
    said: list[str] = []

    def client(tls: ssl.SSLContext) -> BulkClient:
        made = BulkClient(
            "collector",
            ("localhost", settings.port),
            ["stonechat/1/fleet/+/report"],
            on_messages=lambda messages: None,
            on_state=lambda connected, why: said.append(why),
            has_space=lambda: True,
            tls=tls,
            version="3.1.1",
        )
        made.start()
        return made

    with Mosquitto(conf, settings.port):
        expired = client(context(collector))
        assert wait_for(lambda: any("--cert has expired" in why for why in said)), said
        expired.stop()
        said.clear()
        first = client(good)
        assert wait_for(lambda: "" in said), said
        second = client(good)
        assert wait_for(lambda: any("a second client of the same account" in why for why in said)), said
        first.stop()
        second.stop()
