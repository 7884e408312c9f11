"""The full profile of the agent for a board. boot.py, before everything else, so that all later sockets and files are
counted:

    from stonechat.board import hooks
    hooks.install()

main.py, after the network is up:

    from stonechat.board import full
    watch = full.start("sensor-7", KEY, host="broker.lan", firmware="1.4.2")
    while True:
        watch.tick()                                     # or: asyncio.create_task(watch.run())
        do_the_firmwares_work()                          # or: Timer(-1).init(period=200, callback=watch.tick)

With the MQTT client that the firmware already has, `publish` takes the place of `host`; what the collector sends back
(acknowledgements, commands) goes to watch.agent.on_message(topic, payload), from the topics in
watch.agent.reporter.subscriptions:

    umqtt.simple:  publish=lambda topic, payload, qos, retain: client.publish(topic, payload, retain, qos)
                   client.set_callback(lambda topic, payload: watch.agent.on_message(topic.decode(), payload))
    mqtt_as:       def publish(topic, payload, qos, retain):
                       if not client.isconnected():
                           raise OSError("not connected")  # else tasks would pile up in an outage
                       asyncio.create_task(client.publish(topic, payload, retain, qos))

core.py is the same in less memory and states what it leaves out; its notes on tick() hold here too.
"""

from ..agent import open_agent
from . import hooks
from .device import begin


def _follow_switch(agent, collector):
    """Nothing is counted while monitoring is off."""

    def switch(on):
        hooks.active = collector if on else _Off()  # type: ignore[assignment]

    agent.on_switch = switch
    if agent.off:
        switch(False)


class _Off:
    """In place of the hook's collector while monitoring is off: what the hook and the guard ask of one."""

    known = ()
    quiet = None
    _last = (hooks, None, (None, None))  # no address is that

    def add(self, *args, **options):
        return False

    def meet(self, address):
        return None, None

    def failed(self, number):
        pass


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
    fleet="fleet",
    prefix="stonechat/1",
    folder="stonechat-data",
    firmware="",
    heartbeat_windows=30,
    feed=None,
    outbox_bytes=8192,
    bytes_per_day=40_000,
    free_on_publish=False,
    extra=(),
    on_verdict=None,
    learn_peers_hours=24,
    update=None,
    response=None,
):
    """As core.start, and: outbox_bytes: what reports may take on flash; bytes_per_day, free_on_publish: as in Delivery;
    extra, on_verdict, learn_peers_hours, update, response: as in Agent; guard.py makes a response. -> Watch. Raises
    OutboxError too. watch.agent.monitoring(False) is the user's switch: nothing is counted until monitoring(True)."""

    def make(collector):
        agent = open_agent(
            device_id,
            key,
            collector,
            model,
            folder,
            fleet=fleet,
            prefix=prefix,
            firmware=firmware,
            heartbeat_windows=heartbeat_windows,
            bytes_per_day=bytes_per_day,
            outbox_bytes=outbox_bytes,
            free_on_publish=free_on_publish,
            extra=extra,
            on_verdict=on_verdict,
            learn_peers_hours=learn_peers_hours,
            update=update,
            publish=publish,
            response=response,
        )
        _follow_switch(agent, collector)
        return agent

    return begin(make, device_id, key, host, port, user, password, tls, keepalive_s, feed)
