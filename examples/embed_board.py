# The agent inside a firmware on MicroPython. Beside it: model.tflite (models/micropython-1/model.tflite). On a board
# `from stonechat.board import hooks; hooks.install()` is the first line of boot.py, and KEY the device's own secret.
KEY = bytes(32)

from stonechat.board import full  # noqa: E402

watch = full.start("sensor-7", KEY, host="localhost")
while True:
    watch.tick()  # beside the firmware's own work
