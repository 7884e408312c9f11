"""Both MQTT clients of the agent on Linux, held to the same: what a report's handle and `resend` mean."""

import os
import signal
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from fleet_support import needs_mosquitto, wait_for
from stonechat.errors import MQTTError
from stonechat.linux.own_client import OwnClient
from stonechat.linux.paho import Paho
from stonechat_tools.fleet.local_broker import LocalBroker

pytestmark = needs_mosquitto


@pytest.fixture
def broker() -> Iterator[LocalBroker]:
    with LocalBroker() as running:
        yield running


def turn(client: Any) -> None:
    try:
        client.poll(0.01)
    except (OSError, MQTTError):
        time.sleep(0.01)


def until(client: Any, condition: Callable[[], Any]) -> None:
    def met() -> Any:
        turn(client)
        return condition()

    assert wait_for(met, 40)


@pytest.mark.parametrize("kind", [OwnClient, Paho], ids=["own", "paho"])
def test_a_handle_is_reported_when_the_broker_has_acknowledged(kind: Any, broker: LocalBroker) -> None:
    client = kind("d", "127.0.0.1", broker.port)
    published: list[Any] = []
    client.on_published = published.append
    client.will = ("gone", b"x", 1, True)
    until(client, lambda: client.connected)
    handles = [client.publish("t", b"%d" % i, 1, False) for i in range(3)]
    assert len(set(handles)) == 3 and None not in handles and published == []
    assert client.publish("t", b"no acknowledgement", 0, False) in (None, b"")
    until(client, lambda: len(published) == 3)
    assert published == handles
    os.kill(broker.pid, signal.SIGSTOP)
    try:
        client.publish("t", b"x", 1, False)
        for _ in range(100):
            turn(client)
        assert len(published) == 3
    finally:
        os.kill(broker.pid, signal.SIGCONT)
    until(client, lambda: len(published) == 4)
    client.close()


@pytest.mark.parametrize("resend", [True, False])
@pytest.mark.parametrize("kind", [OwnClient, Paho], ids=["own", "paho"])
def test_what_was_not_acknowledged_is_sent_again_only_where_asked(kind: Any, resend: bool, broker: LocalBroker) -> None:
    client = kind("d", "127.0.0.1", broker.port)
    published: list[Any] = []
    client.on_published = published.append
    client.resend = resend
    until(client, lambda: client.connected)
    os.kill(broker.pid, signal.SIGSTOP)
    handle = client.publish("t", b"lost with the connection", 1, False)
    turn(client)
    broker.kill()
    until(client, lambda: not client.connected)
    broker.start()
    until(client, lambda: client.connected)
    last = client.publish("t", b"later", 1, False)
    until(client, lambda: last in published)
    assert published == ([handle, last] if resend else [last])
    assert not client.in_flight
    client.close()
