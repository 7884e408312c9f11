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

    umqtt.simple:  publish=lambda topic, payload, qos, retain: client.publish(topic, payload, retain, qos)
    mqtt_as:       def publish(topic, payload, qos, retain):
                       if not client.isconnected():
                           raise OSError("not connected")  # else tasks would pile up in an outage
                       asyncio.create_task(client.publish(topic, payload, retain, qos))

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
from ..model import open_model
from ..report import Reporter
from ..state import open_state
from .device import begin


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
):
    """device_id: letters, digits, '-', '_', '.'; key: the device's secret, 32 bytes; model: a path. host: the broker
    for the own client (tls: from board.tls), or publish(topic, payload, qos, retain): the firmware's own. folder: where
    what was learned lives, made where it is missing; firmware: its id, a new one is learned anew; heartbeat_windows: a
    report at least each N windows; feed: a watchdog's.

    -> Watch. Raises ModelError or OSError: a device that can't be watched should say so at once; where the firmware
    must go on all the same, call it in a `try`."""

    def make(collector):
        state = open_state(folder)
        boot = unpack_from("<I", state.get(b"device", bytes(4)))[0]
        reporter = Reporter(
            device_id, key, prefix=prefix + "/" + fleet, boot=boot + 1, heartbeat_windows=heartbeat_windows
        )
        channel = Channel(collector, open_model(model), state)  # the last that may fail (build.py, STEPS)
        return Loop([channel], reporter, state, publish=publish, firmware=firmware)

    return begin(make, device_id, key, host, port, user, password, tls, keepalive_s, feed)
