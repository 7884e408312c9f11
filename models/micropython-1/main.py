# An example of a board's main.py: the agent beside a firmware's own loop. It runs on the unix port without a change.
# device.json lies beside it: {"id": "sensor-7", "key": "64 hex digits", "host": "broker.lan", "port": 1883}
# On a board `from stonechat.board import hooks; hooks.install()` comes first in boot.py.
import json
import time

from stonechat.board import hooks

hooks.install()

from stonechat.board import full  # noqa: E402

with open("device.json") as file:
    device = json.load(file)

watch = full.start(device["id"], bytes.fromhex(device["key"]), host=device["host"], port=device["port"], firmware="1.0")
turns = 0
while turns != device.get("turns", -1):  # a board has no "turns" and goes on for ever
    watch.tick()
    turns += 1
    time.sleep_ms(50)  # the firmware's own work

print("connected", watch.transport.connected, "published", watch.agent.reporter.published, "errors", watch.errors)
