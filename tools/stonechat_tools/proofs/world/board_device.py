# mypy: ignore-errors
"""A board of the fleet, on MicroPython in real time. Not imported by the tools: MicroPython runs it.

    micropython board_device.py CONFIG.json

CONFIG: device, fleet, key (hex), profile, model, jobs_model, jobs (a file with a rising number), folder, host, port,
echo_port, client ("own", "simple": the firmware's own client with the interface of umqtt.simple), and for TLS: ca,
user, password.
"""

import json
import sys


def main(path):
    from stonechat.board import hooks

    hooks.install()
    import socket
    import time

    with open(path) as file:
        config = json.load(file)
    if config["profile"] == "core":
        from stonechat.board import core as entry
    else:
        from stonechat.board import full as entry
    options = {"fleet": config["fleet"], "folder": config["folder"], "firmware": "1.0", "heartbeat_windows": 1}
    tls = None
    if config.get("ca"):
        from stonechat.board.tls import tls_context

        with open(config["ca"], "rb") as file:
            tls = tls_context(file.read())
    if config["profile"] == "full":
        options["bytes_per_day"] = 0
        options["outbox_bytes"] = 65536
        if config.get("jobs_model"):
            options["extra"] = (jobs(config),)
    client = None
    if config["client"] == "own":
        for name in ("user", "password"):
            if config.get(name):
                options[name] = config[name]
        options["host"] = config["host"]
        options["port"] = config["port"]
        options["tls"] = tls
        options["keepalive_s"] = 10
    else:
        client = SimpleClient(socket, config)
        options["publish"] = client.publish_report
    key = bytes([int(config["key"][i : i + 2], 16) for i in range(0, 64, 2)])
    watch = entry.start(config["device"], key, config["model"], **options)
    if client is not None:
        client.attach(watch.agent)
    echo = socket.getaddrinfo("127.0.0.1", config["echo_port"])[0][-1]
    while True:
        watch.tick()
        if client is not None:
            client.turn()
        out = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        out.sendto(b"reading", echo)
        out.close()
        time.sleep_ms(100)


def jobs(config):
    """The product's own counter: how many jobs it has done -> (collector, model)."""
    from stonechat.custom_counters import CounterCollector, counter_schema
    from stonechat.features import RATE
    from stonechat.model import load_model

    def read():
        with open(config["jobs"]) as file:
            return (int(file.read()),)

    schema = counter_schema("jobs-1", (("jobs", "jobs/s", RATE),))
    return CounterCollector(schema, read), load_model(open(config["jobs_model"], "rb"))


class SimpleClient:
    """A firmware's own MQTT 3.1.1 client with the calls of umqtt.simple (connect, publish, subscribe, check_msg), for
    this test only; the real one ships with firmware and is not on a package index that pip takes."""

    def __init__(self, socket, config):
        self._socket_module = socket
        self._config = config
        self._socket = None
        self._agent = None
        self._wait = 0

    def attach(self, agent):
        self._agent = agent
        self.topics = list(agent.reporter.subscriptions)

    def turn(self):
        if self._socket is None:
            self._wait -= 1
            if self._wait <= 0:
                self._wait = 20
                try:
                    self.connect()
                except OSError:
                    self._drop()
            return
        try:
            self.check_msg()
        except OSError:
            self._drop()

    def publish_report(self, topic, payload, qos, retain=False):
        if self._socket is None:
            raise OSError(107)
        self.publish(topic, payload, retain, qos)

    def connect(self):
        address = self._socket_module.getaddrinfo(self._config["host"], self._config["port"])[0][-1]
        self._socket = self._socket_module.socket()
        self._socket.settimeout(3)
        self._socket.connect(address)
        name = self._config["device"].encode()
        body = b"\0\x04MQTT\x04\x02\0\x3c" + bytes((len(name) >> 8, len(name) & 255)) + name
        self._socket.write(b"\x10" + bytes((len(body),)) + body)
        if self._exactly(4)[3]:
            raise OSError(13)
        for topic in self.topics:
            self.subscribe(topic)
        self._agent.connected()

    def subscribe(self, topic):
        topic = topic.encode()
        body = b"\0\x01" + bytes((len(topic) >> 8, len(topic) & 255)) + topic + b"\x01"
        self._socket.write(b"\x82" + bytes((len(body),)) + body)

    def publish(self, topic, payload, retain=False, qos=0):
        """QoS 1 without waiting for the broker: the agent's own acknowledgement frees a report."""
        topic = topic.encode()
        body = bytes((len(topic) >> 8, len(topic) & 255)) + topic + (b"\0\x02" if qos else b"") + bytes(payload)
        length = bytes((len(body),)) if len(body) < 128 else bytes((len(body) & 127 | 128, len(body) >> 7))
        try:
            self._socket.write(bytes((0x30 | qos << 1 | retain,)) + length + body)
        except OSError:
            self._drop()
            raise

    def check_msg(self):
        self._socket.setblocking(False)
        try:
            first = self._socket.read(1)
        finally:
            if self._socket is not None:
                self._socket.settimeout(3)
        if first is None:
            return
        if first == b"":
            raise OSError(104)
        length = shift = 0
        while True:
            byte = self._exactly(1)[0]
            length |= (byte & 127) << shift
            shift += 7
            if byte < 128:
                break
        body = self._exactly(length)
        if first[0] >> 4 == 3:
            size = body[0] << 8 | body[1]
            at = 2 + size + (2 if first[0] & 6 else 0)
            self._agent.on_message(body[2 : 2 + size].decode(), body[at:])
            if first[0] & 6:
                self._socket.write(b"\x40\x02" + body[2 + size : 4 + size])

    def _exactly(self, size):
        data = b""
        while len(data) < size:
            more = self._socket.read(size - len(data))
            if not more:
                raise OSError(104)
            data += more
        return data

    def _drop(self):
        if self._socket is not None:
            self._socket.close()
            self._socket = None


if __name__ == "__main__":
    main(sys.argv[1])
