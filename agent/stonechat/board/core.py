"""The core profile: the smallest agent for a board. It learns, scores, alarms and reports.

boot.py, before everything else, so that all later sockets and files are counted:

    from stonechat.board import hooks
    hooks.install()

main.py, after the network is up:

    from stonechat.board import core
    watch = core.start("sensor-7", KEY, host="broker.lan", firmware="1.4.2")
    while True:
        watch.tick()                                     # or: asyncio.create_task(watch.run())
        do_the_firmwares_work()                          # or: Timer(-1).init(period=200, callback=watch.tick)

With the MQTT client that the firmware already has, `publish` takes the place of `host`:

    umqtt.simple:  publish=lambda topic, payload, qos: client.publish(topic, payload, False, qos)
    mqtt_as:       publish=lambda topic, payload, qos: asyncio.create_task(client.publish(topic, payload, False, qos))

tick() does not block longer than the arithmetic of a window (measured by `stonechat bench board`) and one write to
flash; the look-up of the broker's name at a reconnect is the exception (mqtt.py). It never raises: errors of the own
client are counted in `watch.errors`, the last one is in `watch.last_error`; errors of a window or of the flash are
counted in `watch.agent.errors`, and `watch.agent.offline` states why the broker can't be reached. A watchdog's feed()
can be passed; it is called once a tick.

Only the full profile (full.py) has: reports that wait on flash until a collector has them, a limit of bytes a day,
commands, custom counters. The one file of core keeps what was learned.
"""

from struct import unpack_from

from ..loop import Channel, Loop
from ..report import Reporter
from .device import begin


def _make(device_id, key, counter, model, state, folder, publish, firmware, publish_retained, options):
    """The parts of the core profile -> its loop."""
    boot = unpack_from("<I", state.get(b"device", bytes(4)))[0]
    reporter = Reporter(device_id, key, boot=boot + 1, **options)
    return Loop([Channel(counter, model, state)], publish, reporter, state, firmware, publish_retained)


def start(*device, **options):
    """start(device_id, key, model="model.tflite", *, host, port, user, password, tls, keepalive_s, publish,
    publish_retained, fleet, prefix, folder, firmware, feed: as watch.begin takes them; heartbeat_windows: as in
    Reporter) -> watch.Watch. Raises ModelError, StateError or OSError: a device that can't be watched should say so at
    once; where the firmware must go on all the same, call it in a `try`."""
    return begin(_make, *device, **options)
