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

    umqtt.simple:  publish=lambda topic, payload, qos: client.publish(topic, payload, False, qos)
                   client.set_callback(lambda topic, payload: watch.agent.on_message(topic.decode(), payload))
    mqtt_as:       publish=lambda topic, payload, qos: asyncio.create_task(client.publish(topic, payload, False, qos))

core.py is the same in less memory and states what it leaves out; its notes on tick() hold here too.
"""

from ..agent import Agent
from ..delivery import Delivery
from ..outbox import Outbox
from .device import begin


def _make(device_id, key, collector, model, state, folder, publish, firmware, publish_retained, options):
    extra = options.pop("extra", ())
    on_verdict = options.pop("on_verdict", None)
    outbox = Outbox(folder + "/outbox", options.pop("outbox_bytes", 8192))
    return Agent(
        collector,
        model,
        publish,
        reporter=Delivery(device_id, key, outbox, state=state, **options),
        state=state,
        extra=extra,
        on_verdict=on_verdict,
        firmware=firmware,
        publish_retained=publish_retained,
    )


def start(*device, **options):
    """start(device_id, key, model="model.tflite", *, ...) -> watch.Watch, as core.start, and: outbox_bytes=8192: what
    reports may take on flash; bytes_per_day=40_000, free_on_publish: as in Delivery; extra, on_verdict: as in Agent.
    Raises OutboxError too."""
    return begin(_make, *device, **options)
