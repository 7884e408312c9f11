"""The collector's own MQTT: packets in pieces, long ones, strange ones, in both versions; connections that end."""

import contextlib
import socket
import threading
import time
from pathlib import Path
from typing import Any

import pytest
from fleet_support import Mosquitto, Peer, broker, free_port, needs_mosquitto, wait_for
from hypothesis import given, settings
from hypothesis import strategies as st
from stonechat.errors import ConfigError
from stonechat_tools.fleet import keyring, local_broker, mqtt_codec, wire
from stonechat_tools.fleet.bulk_client import BulkClient
from stonechat_tools.fleet.collector import Collector
from stonechat_tools.fleet.incidents import Policy
from stonechat_tools.fleet.monitor import Monitor
from stonechat_tools.fleet.mqtt_codec import Message
from stonechat_tools.fleet.store import Store

__all__ = ["broker"]
VERSIONS = ("5", "3.1.1")


def fed(version: str, stream: bytes, sizes: list[int]) -> list[Message]:
    codec = mqtt_codec.codec(version)
    found: list[Message] = []
    at = 0
    for size in [*sizes, len(stream)]:
        found += codec.feed(stream[at : at + size]).messages
        at += size
    return found


@given(
    st.sampled_from(VERSIONS),
    st.lists(st.tuples(st.text(max_size=300), st.binary(max_size=9000), st.booleans()), max_size=5),
    st.lists(st.integers(1, 4000), max_size=20),
)
@settings(max_examples=200, deadline=None)
def test_packets_arrive_in_any_pieces(version: str, sent: list[tuple[str, bytes, bool]], sizes: list[int]) -> None:
    sent = [(topic.replace("\0", "") or "t", payload, qos) for topic, payload, qos in sent]
    codec = mqtt_codec.codec(version)
    stream = b"".join(
        codec.publish(topic, payload, int(qos), False, n + 1) for n, (topic, payload, qos) in enumerate(sent)
    )
    found = fed(version, stream, sizes)
    assert [(m.topic, m.mid, m.qos) for m in found] == [
        (topic, n + 1 if qos else 0, int(qos)) for n, (topic, _, qos) in enumerate(sent)
    ]
    for message, (_, payload, _) in zip(found, sent, strict=True):
        assert message.payload == payload or (message.payload == mqtt_codec.OVERSIZE and len(payload) > 7000)


@given(st.sampled_from(VERSIONS), st.binary(max_size=300), st.lists(st.integers(1, 40), max_size=10))
@settings(max_examples=500, deadline=None)
def test_whatever_a_broker_sends_ends_at_most_the_connection(version: str, stream: bytes, sizes: list[int]) -> None:
    with contextlib.suppress(mqtt_codec.ProtocolFault, mqtt_codec.WrongVersion):
        fed(version, stream, sizes)


@pytest.mark.parametrize("version", VERSIONS)
def test_a_message_that_cant_be_read_is_acknowledged_all_the_same(version: str) -> None:
    packet = b"\x32\x08\x00\x02\xff\xfe\x01\x02" + b"\x00x"
    assert fed(version, packet, []) == [Message("", b"", 0x102, 1)]
    assert mqtt_codec.acks([1, 0x102]) == b"\x40\x02\x00\x01\x40\x02\x01\x02"


@needs_mosquitto
@pytest.mark.parametrize("mqtt", ["auto", "5", "3.1.1", "paho"])
def test_every_client_stores_and_acknowledges_the_same(tmp_path: Path, broker: Mosquitto, mqtt: str) -> None:
    keys = {f"dev-{n}": bytes([n]) * 32 for n in range(5)}
    made = {name: keyring.DeviceKeys(secret, name) for name, secret in keys.items()}
    with (
        Store(tmp_path / "db") as store,
        Collector(store, keyring.Keys(keys), host="127.0.0.1", port=broker.port, mqtt=mqtt) as collector,
        Peer(broker.port, "sender") as sender,
    ):
        assert collector.connected.wait(20) and sender.connected.wait(20)
        sender.client.subscribe("stonechat/1/fleet/+/ack", 1)
        for n in range(1, 301):
            name = f"dev-{n % 5}"
            fields = {0: 1, 1: n, 2: 1, 3: int(time.time()), 5: 0, 7: 256, 8: 1, 9: 1, 16: b"abcd"}
            sender.client.publish(f"stonechat/1/fleet/{name}/report", made[name].report.seal(wire.encode(fields)), 1)
        sender.client.publish("stonechat/1/fleet/dev-0/report", bytes(70_000), 1)
        sender.client.publish("stonechat/1/fleet/dev-0/report", bytes(7_000), 1)
        sender.client.publish("stonechat/1/fleet/dev-0/status", b"x", 1)
        assert wait_for(lambda: store.count() == 300), (collector.error, collector.counts)
        assert wait_for(lambda: collector.counts["too large"] + collector.counts["malformed"] == 3), collector.counts
        acked = {
            name: {
                number
                for topic, payload in sender.got
                if topic == f"stonechat/1/fleet/{name}/ack"
                for first, last in [pairs_of(made[name], payload)]
                for number in range(first, last + 1)
            }
            for name in made
        }
        assert wait_for(lambda: sender.got)
        assert all(numbers <= set(store.sequences(name)) for name, numbers in acked.items())
    # all that came was acknowledged to the broker, too: it sends nothing again
    with (
        Store(":memory:") as second,
        Collector(second, keyring.Keys(keys), host="127.0.0.1", port=broker.port, mqtt=mqtt) as collector,
    ):
        assert collector.connected.wait(20)
        time.sleep(0.3)
        assert second.count() == 0 and second.rejections() == {}


def pairs_of(keys: keyring.DeviceKeys, payload: bytes) -> tuple[int, int]:
    import cbor2

    numbers = cbor2.loads(keys.ack.open(payload))[1]
    return numbers[0], numbers[1]


def test_a_broker_without_mqtt_5_is_spoken_to_in_3_1_1(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("amqtt")
    monkeypatch.setattr("stonechat_tools.fleet.local_broker.mosquitto_path", lambda: None)
    with local_broker.LocalBroker() as running:
        assert running.kind == "amqtt"
        port = running.port
        states: list[tuple[bool, str]] = []
        client = BulkClient(
            "c",
            ("127.0.0.1", port),
            ["a/+"],
            on_messages=lambda messages: None,
            on_state=lambda *state: states.append(state),
            has_space=lambda: True,
        )
        client.start()
        try:
            assert wait_for(lambda: (True, "") in states), states
        finally:
            client.stop()


def test_the_first_retry_comes_within_a_second_and_the_waits_double() -> None:
    port = free_port()
    tries: list[float] = []
    with socket.create_server(("127.0.0.1", port)) as listener:

        def serve() -> None:
            while len(tries) < 5:
                client, _ = listener.accept()
                tries.append(time.monotonic())
                client.close()

        thread = threading.Thread(target=serve, daemon=True)
        thread.start()
        client = BulkClient(
            "c",
            ("127.0.0.1", port),
            ["a/+"],
            on_messages=lambda messages: None,
            on_state=lambda *state: None,
            has_space=lambda: True,
            version="5",
        )
        client.start()
        thread.join(40)
        client.stop()
    waits = [later - sooner for sooner, later in zip(tries, tries[1:], strict=False)]
    assert len(waits) == 4
    for n, wait_s in enumerate(waits):
        assert 0.09 * 2**n <= wait_s <= 2**n + 1.5, waits


def test_nothing_is_read_while_there_is_no_room() -> None:
    """Back-pressure: the broker's side of the connection fills up, the client's memory does not."""
    room = [False]
    got: list[Message] = []
    states: list[tuple[bool, str]] = []
    sent = [0]
    packet = mqtt_codec.codec("5").publish("a/b", bytes(4000), 0, False, 0)
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def serve() -> None:
            client, _ = listener.accept()
            client.recv(4096)
            client.sendall(b"\x20\x03\x00\x00\x00")
            asked = client.recv(4096)
            client.sendall(b"\x90\x04" + asked[2:4] + b"\x00\x01")
            while sent[0] < 8000:
                client.sendall(packet)
                sent[0] += 1
            while client.recv(4096):
                pass

        threading.Thread(target=serve, daemon=True).start()
        client = BulkClient(
            "c",
            listener.getsockname(),
            ["a/+"],
            on_messages=got.extend,
            on_state=lambda *state: states.append(state),
            has_space=lambda: room[0] or not states,
            version="5",
        )
        client.start()
        assert wait_for(lambda: (True, "") in states), states
        assert wait_for(lambda: sent[0] > 10)
        before = -1
        while before != sent[0]:  # until the sender is stuck
            before = sent[0]
            time.sleep(0.5)
        assert sent[0] < 8000 and len(got) < 2000
        room[0] = True
        client.wake()
        assert wait_for(lambda: len(got) == 8000), len(got)
        client.stop()


@pytest.mark.parametrize("mqtt", ["3.1.1", "paho"])
def test_what_a_broker_sends_before_it_answers_the_subscription_is_acknowledged(mqtt: str) -> None:
    """A broker that kept the session sends what waits right after the log-in: left without an acknowledgement, these
    messages would fill its window, and nothing would come any more."""
    got: list[tuple[int, Message]] = []
    states: list[tuple[bool, str]] = []
    acknowledged: list[bytes] = []
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def serve() -> None:
            peer, _ = listener.accept()
            with peer:
                peer.recv(4096)
                peer.sendall(b"\x20\x02\x01\x00" + mqtt_codec.codec("3.1.1").publish("a/b", b"waited", 1, False, 7))
                asked = peer.recv(4096)
                if asked[:1] == b"\x40":  # the acknowledgement came first
                    acknowledged.append(asked)
                    asked = peer.recv(4096)
                wait_for(lambda: bool(got))
                for _ in range(2):  # one answer too many
                    peer.sendall(b"\x90\x03" + asked[2:4] + b"\x01")
                while data := peer.recv(4096):
                    acknowledged.append(data)

        threading.Thread(target=serve, daemon=True).start()
        place = listener.getsockname()
        options: Any = {"on_state": lambda *state: states.append(state)}

        def keep(messages: list[Message]) -> None:
            got.extend((client.epoch, message) for message in messages)

        if mqtt == "paho":
            from stonechat_tools.fleet.paho_client import PahoClient

            client: Any = PahoClient("c", place, ["a/+"], on_messages=keep, wait_space=lambda _: True, **options)
        else:
            client = BulkClient("c", place, ["a/+"], on_messages=keep, has_space=lambda: True, version=mqtt, **options)
        client.start()
        try:
            assert wait_for(lambda: (True, "") in states), states
            assert [message.payload for _, message in got] == [b"waited"]
            for epoch, message in got:
                client.send([message.mid], [], epoch)
            assert wait_for(lambda: mqtt_codec.acks([7]) in b"".join(acknowledged)), acknowledged
            assert mqtt == "paho" or states.count((True, "")) == 1
        finally:
            client.stop()


def test_a_name_that_a_stranger_chose_is_shown_without_control_characters(tmp_path: Path) -> None:
    (tmp_path / "keys").mkdir(mode=0o700)
    with Store(":memory:") as store:
        monitor = Monitor(store, Policy(), hold_s=0)
        collector = Collector(store, keyring.Keys(tmp_path / "keys"), monitor=monitor)
        monitor.step()
        topic = collector.prefix + "a\x1b[31m\r\nSubject: b\u202e/report"
        collector.take([Message(topic, b"x", number, 1) for number in range(1, 20)])
        monitor.step()
        shown = [*store.rejections(), *(incident.title for incident in monitor.incidents.open.values())]
        assert len(shown) == 2 and all(text.isprintable() for text in shown), shown


def test_the_text_of_a_broker_is_shown_without_control_characters() -> None:
    mqtt5 = pytest.importorskip("mqtt5")
    packet = mqtt5.DisconnectPacket(reason_str="\x1b[2J no\n" + 5000 * "x")
    found = mqtt_codec.codec("5").feed(packet.write())
    assert found.refused.isprintable() and len(found.refused) <= mqtt_codec.MAX_REASON


def test_version_5_without_its_package_is_said_with_the_fix(monkeypatch: pytest.MonkeyPatch) -> None:
    from stonechat_tools.fleet import bulk_client

    monkeypatch.setattr(bulk_client.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"pip install 'stonechat\[tools\]'"):
        bulk_client._versions("5")
    assert bulk_client._versions("auto") == ["3.1.1"]
