"""The agent on a board, in three lines: the full profile. boot.py, first thing, so that everything after it is seen:

    from stonechat.board import hooks
    hooks.install()

main.py, once the network stands:

    from stonechat.board import boot
    watch = boot.start("sensor-7", KEY, host="broker.lan", firmware="1.4.2")
    while True:
        watch.tick()                                     # or: asyncio.create_task(watch.run())
        do_the_firmwares_work()                          # or: Timer(-1).init(period=200, callback=watch.tick)

With the MQTT client that the firmware already has, `publish` takes the place of `host`; what the collector sends back
(acknowledgements, commands) goes to watch.agent.on_message(topic, payload), from the topics in
watch.agent.reporter.subscriptions:

    umqtt.simple:  publish=lambda topic, payload, qos: client.publish(topic, payload, False, qos)
                   client.set_callback(lambda topic, payload: watch.agent.on_message(topic.decode(), payload))
    mqtt_as:       publish=lambda topic, payload, qos: asyncio.create_task(client.publish(topic, payload, False, qos))

core.py is the same in less memory, and says what it leaves out; what holds of tick() there holds here.
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
