"""The agent inside a program on Linux. Beside it: model.tflite (for example models/linux-proc-1/model.tflite)."""

from stonechat.agent import open_agent
from stonechat.linux.collector import LinuxCollector
from stonechat.mqtt import Client

KEY = bytes(32)  # the device's own secret: `stonechat provision` makes it

agent = open_agent("sensor-7", KEY, LinuxCollector(use_bpf=False), "model.tflite", "stonechat-data")
agent.connect(Client("sensor-7", "localhost"))
while True:
    agent.tick()  # scores a window when one has ended
    agent.poll(1)  # sends, receives and reconnects; waits until the next window, at most a second
