"""The agent on a board, in three lines. boot.py, first thing, so that everything after it is seen:

    from stonechat.board import hooks
    hooks.install()

main.py, once the network stands:

    from stonechat.board import boot
    watch = boot.start("sensor-7", KEY, host="broker.lan", firmware="1.4.2")
    while True:
        watch.tick()                                     # or: asyncio.create_task(watch.run())
        do_the_firmwares_work()                          # or: Timer(-1).init(period=200, callback=watch.tick)

With the MQTT client that the firmware already has, `publish` takes the place of `host`; what the collector sends back
(acknowledgements, commands) goes to watch.agent.on_message(topic, payload), from the topics in watch.subscriptions:

    umqtt.simple:  publish=lambda topic, payload, qos: client.publish(topic, payload, False, qos)
                   client.set_callback(lambda topic, payload: watch.agent.on_message(topic.decode(), payload))
    mqtt_as:       publish=lambda topic, payload, qos: asyncio.create_task(client.publish(topic, payload, False, qos))

tick() does not block longer than a window's arithmetic (measured by `stonechat bench board`) and one write to flash;
the look-up of the broker's name at a reconnect is the exception (mqtt.py). It never raises: what goes wrong is counted
in `errors` and told in `last_error`. A watchdog's feed() can be handed in; it is called once a tick.
"""

import os

from ..agent import Agent
from ..compat import ticks_ms
from ..errors import MQTTError
from ..model import load_model
from ..outbox import Outbox
from ..report import Reporter
from ..state import State
from . import hooks
from .collector import BoardCollector


class Watch:
    """What start() gives. agent: the Agent; transport: the own MQTT client or None; counter: the hook's."""

    def __init__(self, agent, transport, counter, feed=None):
        self.agent = agent
        self.transport = transport
        self.counter = counter
        self.feed = feed
        self.errors = 0
        self.last_error = ""
        self.subscriptions = agent.reporter.subscriptions

    def tick(self, _=None):
        """One turn -> the Verdict of a window that has just ended, else None. (The argument is a Timer's.)"""
        counter = self.counter
        counter.beat(ticks_ms())
        counter.quiet = True  # what the agent itself does is not the firmware's
        verdict = None
        try:
            verdict = self._turn()
        except Exception as error:  # the one place that catches everything: the firmware must go on
            self.errors += 1
            self.last_error = "%s: %s" % (type(error).__name__, error)
        counter.quiet = False
        if self.feed is not None:
            self.feed()
        return verdict

    def _turn(self):
        lost = None
        if self.transport is not None:
            try:
                self.transport.poll()
            except (MQTTError, OSError) as error:
                lost = error
        verdict = self.agent.tick()
        if verdict is not None:
            self.agent.stages[0].collector.hold_peers(verdict.level > 0)
        if lost is not None:
            raise lost
        return verdict

    async def run(self):
        """tick() for ever under asyncio; cancel the task to stop."""
        from asyncio import sleep

        while True:
            self.tick()
            await sleep(min(self.agent.due_in_ms, 200) / 1000)

    def save(self):
        """Write down what was learned: before a reset or a deep sleep. Counts what goes wrong like tick()."""
        self.counter.quiet = True
        try:
            self.agent.save()
        except Exception as error:
            self.errors += 1
            self.last_error = "%s: %s" % (type(error).__name__, error)
        self.counter.quiet = False


def start(
    device_id,
    key,
    model="model.tflite",
    *,
    host=None,
    port=1883,
    user=None,
    password=None,
    tls=None,
    keepalive_s=60,
    publish=None,
    publish_retained=None,
    fleet="fleet",
    prefix="stonechat/1",
    folder="stonechat-data",
    firmware="",
    outbox_bytes=8192,
    heartbeat_windows=30,
    bytes_per_day=40_000,
    free_on_publish=False,
    extra=(),
    feed=None,
    on_verdict=None,
):
    """device_id: letters, digits, '-', '_', '.'; key: the device's secret, 32 bytes; model: a path. host: the broker
    for the own client (tls: from board.tls), or publish(topic, payload, qos): the firmware's own. folder: where state
    and outbox live; made where it is missing. The rest is as in Agent and Reporter.

    -> Watch. Raises ModelError, StateError, OutboxError or OSError: a device that can't be watched should say so at
    once; where the firmware must go on all the same, call it in a `try`."""
    counter = hooks.install()
    counter.quiet = True
    try:
        _make_folder(folder)
        state = State(folder + "/state")
        reporter = Reporter(
            device_id,
            key,
            Outbox(folder + "/outbox", outbox_bytes),
            prefix="%s/%s/" % (prefix, fleet),
            heartbeat_windows=heartbeat_windows,
            bytes_per_day=bytes_per_day,
            state=state,
            free_on_publish=free_on_publish,
        )
        transport = None
        if host is not None:
            transport = _own_client(device_id, host, port, user, password, tls, keepalive_s, reporter)
            publish = transport.publish
            publish_retained = lambda topic, payload, qos: transport.publish(topic, payload, qos, True)  # noqa: E731
        agent = Agent(
            BoardCollector(key, counter),
            load_model(open(model, "rb")),
            publish,
            reporter=reporter,
            state=state,
            firmware=firmware,
            publish_retained=publish_retained,
            extra=extra,
            on_verdict=on_verdict,
        )
        if transport is not None:
            transport.on_message = agent.on_message
            transport.on_connect = agent.connected
    finally:
        counter.quiet = False
    return Watch(agent, transport, counter, feed)


def _own_client(device_id, host, port, user, password, tls, keepalive_s, reporter):
    from ..mqtt import Client

    client = Client(
        device_id,
        host,
        port,
        user=user,
        password=password,
        tls=tls,
        keepalive_s=keepalive_s,
        will=(reporter.topics["status"], reporter.status(online=False), 1, True),
        socket=hooks.real_socket(),
    )
    for topic in reporter.subscriptions:
        client.subscribe(topic, 1)
    return client


def _make_folder(path):
    try:
        os.mkdir(path)
    except OSError:
        os.listdir(path)  # raises where it is not a folder either
