# A plain Pico, without a network: the agent reports over UART 0.
# boot.py: from stonechat.board import hooks; hooks.install()
import time

from machine import UART, Pin
from serial_link import SerialLink
from stonechat.board import full

KEY = bytes(32)  # the device's own: bytes.fromhex() of the text of fleet/devices/sensor-7/device.key

link = SerialLink(UART(0, 115200, tx=Pin(0), rx=Pin(1), txbuf=1024, rxbuf=512, timeout=0))
watch = full.start("sensor-7", KEY, publish=link.publish, firmware="1.0")
while True:
    watch.tick()
    link.poll(watch.agent)
    time.sleep_ms(20)  # the firmware's own work
