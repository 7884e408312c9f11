"""Start-up shared by both board profiles. Returns a Watch, the object that the firmware ticks."""

import os

from ..compat import const, ticks_ms, tidy
from ..model import load_model
from ..mqtt import Client
from ..state import State
from . import hooks

_MAX_PACKET = const(320)  # an acknowledgement of sixteen ranges, with its topic


class Watch:
    """What start() gives. agent: the loop; transport: the own MQTT client or None; counter: the hook's; errors,
    last_error: what tick() and save() kept from the firmware. The loop has its own (loop.Loop)."""

    def __init__(self, agent, transport, counter, feed=None):
        self.agent = agent
        self._turn = agent.tick  # a method taken from its object anew would allocate
        self.transport = transport
        if transport is not None:
            self._poll = transport.poll
        self.counter = counter
        self.feed = feed
        self.errors = 0
        self.last_error = ""

    def tick(self, _=None):
        """One turn -> the Verdict of a window that has just ended, else None. (The argument is a Timer's.)"""
        self.counter.beat(ticks_ms())
        if self.transport is not None:
            self._quietly(self._poll)
        verdict = self._quietly(self._turn)
        if self.feed is not None:
            self.feed()
        return verdict

    def _quietly(self, call):
        """call() while nothing is counted: what the agent itself does is not the firmware's."""
        self.counter.quiet = True
        try:
            return call()
        except Exception as error:  # the one place that catches everything: the firmware must go on
            self.errors += 1
            self.last_error = repr(error)
        finally:
            self.counter.quiet = False

    async def run(self):
        """tick() for ever under asyncio; cancel the task to stop."""
        from asyncio import sleep

        while True:
            self.tick()
            await sleep(min(self.agent.due_in_ms, 200) / 1000)

    def save(self):
        """Write down what was learned: before a reset or a deep sleep. Counts what goes wrong like tick()."""
        self._quietly(self.agent.save)


def begin(
    make,
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
    feed=None,
    **options,
):
    """device_id: letters, digits, '-', '_', '.'; key: the device's secret, 32 bytes; model: a path. host: the broker
    for the own client (tls: from board.tls), or publish(topic, payload, qos): the firmware's own. folder: where what
    was learned lives; made where it is missing. make: puts the profile's agent together.

    -> Watch. Raises ModelError, StateError or OSError: a device that can't be watched should say so at once; where the
    firmware must go on all the same, call it in a `try`."""
    counter = hooks.install()
    counter.quiet = True
    try:
        try:
            os.mkdir(folder)
        except OSError:
            os.listdir(folder)  # raises where it is not a folder either
        options["prefix"] = prefix + "/" + fleet
        counter.secret = key
        tidy()  # what lives long should lie together: a small heap has few long gaps
        state = State(folder + "/state")
        model = load_model(open(model, "rb"))
        agent = make(device_id, key, counter, model, state, folder, publish, firmware, publish_retained, options)
        transport = None
        if host is not None:
            reporter = agent.reporter
            transport = Client(
                device_id,
                host,
                port,
                user=user,
                password=password,
                tls=tls,
                keepalive_s=keepalive_s,
                will=(reporter.status_topic, reporter.status(online=False), 1, True),
                on_connect=agent.connected,
                socket=hooks.real_socket,
                # without subscriptions, the topic of what the broker may still hold for this device's full profile
                max_packet=_MAX_PACKET if reporter.subscriptions else len(reporter.topic) + 32,
            )
            agent.publish = transport.publish
            agent.publish_retained = lambda topic, payload, qos: transport.publish(topic, payload, qos, True)
            if reporter.subscriptions:
                transport.on_message = agent.on_message
                for topic in reporter.subscriptions:
                    transport.subscribe(topic, 1)
    finally:
        counter.quiet = False
    tidy()
    return Watch(agent, transport, counter, feed)
